"""Fine-tuning of pretrained networks: what is frozen is not copied, not perturbed, not measured, and does not move."""

import copy
import sys
from functools import partial
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from helpers import STRICT, fit, trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_ssesam import ASAM, SAM, SSESAM, LongTailClassifier, StepOptions
from lightning_ssesam.models import TimmModel
from lightning_ssesam.snapshots import Snapshot

pytestmark = [STRICT, pytest.mark.filterwarnings("ignore:Found .* in eval mode")]

COUNTS = [50, 40, 30, 6, 5]
TINY_VIT = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 12, "num_heads": 3}
has_peft = find_spec("peft") is not None
NEEDS_PEFT = pytest.mark.skipif(not has_peft, reason="needs peft")
TRAINABLE = ["classifier", pytest.param("lora", marks=NEEDS_PEFT)]


def vit(trainable, **kwargs):
    return TimmModel(5, "vit_tiny_patch16_224", options=TINY_VIT, trainable=trainable, **kwargs)


def resnet(trainable, **kwargs):
    return TimmModel(5, "resnet10t", trainable=trainable, **kwargs)


def model_of(net, objective, **kwargs):
    optimizer = kwargs.pop("optimizer", lambda params: torch.optim.SGD(params, lr=0.1, weight_decay=0.1))
    return LongTailClassifier(COUNTS, net, objective, optimizer=optimizer, tail_below=10, **kwargs)


def steps_of(number=2, size=10, pixels=16):
    return [(torch.randn(size, 3, pixels, pixels), torch.arange(size) % 5) for _ in range(number)]


def trained(net):
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def frozen(net):
    state = {name: value.clone() for name, value in net.state_dict().items()}
    return {name: value for name, value in state.items() if name not in trained(net)}


@pytest.mark.parametrize("trainable", TRAINABLE)
@pytest.mark.parametrize("make", [vit, resnet])
def test_what_is_trained(trainable, make):
    if make is resnet and trainable == "lora":
        net = make(trainable, lora_layers=["conv2"], lora_rank=2)
    else:
        net = make(trainable, lora_rank=2)
    classifier = {name for name in trained(net) if "lora" not in name}
    assert classifier == ({"net.head.weight", "net.head.bias"} if make is vit else {"net.fc.weight", "net.fc.bias"})
    adapters = set(trained(net)) - classifier
    assert bool(adapters) == (trainable == "lora")
    if trainable == "lora" and make is vit:
        # Two matrices for each of four layers in each of two blocks.
        assert len(adapters) == 2 * 4 * 2
        assert {min(trained(net)[name].shape) for name in adapters} == {2}


@NEEDS_PEFT
@pytest.mark.usefixtures("float64")
def test_adapter_is_the_papers_formula():
    """W x + (alpha / r) B A x (Hu et al., ICLR 2022, eq. 3); B = 0 at first, so that training begins as pretrained."""
    torch.manual_seed(0)
    plain = vit("all")
    torch.manual_seed(0)
    net = vit("lora", lora_rank=2, lora_alpha=6.0)
    images = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(net.eval()(images), plain.eval()(images), rtol=0, atol=1e-12)
    layer = net.net.blocks[0].mlp.fc1
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(up)
    x = torch.randn(7, 12)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 6.0 / 2 * x @ down.T @ up.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("trainable", TRAINABLE)
@pytest.mark.parametrize("passes", ["auto", "full"])
@pytest.mark.usefixtures("float64")
def test_only_what_is_trained_is_copied_and_moves(trainable, passes, monkeypatch):
    """The bytes of all copies of weights, and every frozen tensor in every forward, to the bit."""
    copied, net = [], vit(trainable)
    save = Snapshot.save
    ids = {id(p): name for name, p in net.named_parameters()}

    def watched(self, tensors):
        copied.append({ids[id(t)]: t.nbytes for t in tensors if id(t) in ids})
        save(self, tensors)

    monkeypatch.setattr(Snapshot, "save", watched)
    before, seen = frozen(net), []
    net.register_forward_pre_hook(lambda *_: seen.append((frozen(net), [p.clone() for p in trained(net).values()])))
    model = model_of(net, SSESAM(head_rho=0.05, tail_rho=0.1), step_options=StepOptions(passes=passes))
    fit(model, steps_of())
    weights = [sizes for sizes in copied if sizes]
    assert weights
    assert all(sizes == {name: p.nbytes for name, p in trained(net).items()} for sizes in weights)
    total = sum(p.nbytes for p in net.parameters())
    assert sum(weights[0].values()) < total / 2
    distinct = {tuple(float(p.sum()) for p in values) for _, values in seen}
    assert len(distinct) >= 6, "the clean and the two perturbed weights of two updates"
    for state in [frozen(net), *(state for state, _ in seen)]:
        assert state.keys() == before.keys()
        assert all(torch.equal(state[name], value) for name, value in before.items())


@pytest.mark.parametrize("trainable", TRAINABLE)
@pytest.mark.parametrize("objective", [SAM, ASAM])
@pytest.mark.usefixtures("float64")
def test_perturbation_and_norm_are_those_of_the_trained_weights_alone(trainable, objective):
    """The length of the move is rho, over what is trained. A naive twin knows nothing of the frozen weights."""
    net, rho = vit(trainable), 0.05
    for parameter in trained(net).values():
        nn.init.normal_(parameter, std=0.3)
    twin, (batch,) = copy.deepcopy(net), steps_of(1)
    weights = list(trained(twin).values())
    scales = [w.detach().abs() + 0.01 if w.ndim > 1 else torch.ones_like(w) for w in weights]
    if objective is SAM:
        scales = [torch.ones_like(w) for w in weights]

    def gradient():
        return torch.autograd.grad(F.cross_entropy(twin(batch[0]), batch[1]), weights)

    found = gradient()
    moves = [scale * scale * g for scale, g in zip(scales, found, strict=True)]
    norm = torch.sqrt(sum(((scale * g) ** 2).sum() for scale, g in zip(scales, found, strict=True)))
    start = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w, move in zip(weights, moves, strict=True):
            w.add_(rho / norm * move)
    for value, (w, g) in zip(start, zip(weights, gradient(), strict=True), strict=True):
        w.data = value - 0.1 * g
    seen = []
    net.register_forward_pre_hook(lambda *_: seen.append([p.detach().clone() for p in trained(net).values()]))
    model = model_of(net, objective(rho), optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    fit(model, [batch])
    clean, perturbed = seen[0], seen[-1]
    lengths = [((b - a) / scale) ** 2 for a, b, scale in zip(clean, perturbed, scales, strict=True)]
    assert float(torch.sqrt(sum(length.sum() for length in lengths))) == pytest.approx(rho, rel=1e-9)
    for name, p in trained(net).items():
        torch.testing.assert_close(p, dict(twin.named_parameters())[name], rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_frozen_batch_norms_keep_their_statistics(trainable):
    """Through training and validation, which change the modes; and so passes need not be full."""
    net = resnet(trainable, lora_layers=["conv2"])
    norms = {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    for layer in norms.values():
        nn.init.normal_(layer.running_mean)
    before = {name: copy.deepcopy(layer.state_dict()) for name, layer in norms.items()}
    model, steps, modes = model_of(net, SAM(0.05)), steps_of(pixels=32), []
    net.register_forward_pre_hook(lambda *_: modes.append((net.training, any(n.training for n in norms.values()))))
    loaders = DataLoader(steps, batch_size=None), DataLoader(steps, batch_size=None)
    trainer(max_epochs=2, num_sanity_val_steps=1).fit(model, *loaders)
    assert {(True, False), (False, False)} == set(modes)
    for name, layer in norms.items():
        assert all(torch.equal(value, before[name][key]) for key, value in layer.state_dict().items()), name
    net.train()
    assert not any(layer.training for layer in norms.values())
    assert net.net.get_classifier().training
    # Unfrozen, as a callback may do, they train again.
    net.requires_grad_(True)
    assert all(layer.training for layer in resnet("all").modules())
    assert all(layer.training for layer in net.train().modules())


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_checkpoint_builds_it(trainable, tmp_path):
    model = LongTailClassifier(
        COUNTS,
        partial(TimmModel, name="vit_tiny_patch16_224", options=TINY_VIT, trainable=trainable),
        SAM(0.05),
    )
    run = fit(model, steps_of(1))
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = LongTailClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    assert set(trained(loaded)) == set(trained(model))
    (images, _), *_ = steps_of(1)
    torch.testing.assert_close(loaded.eval()(images), model.eval()(images), rtol=0, atol=0)


def test_all_is_what_it_was():
    """The default freezes nothing and adds nothing."""
    assert set(trained(vit("all"))) == {name for name, _ in vit("all").named_parameters()}
    assert TimmModel(5, "resnet10t").state_dict().keys() == resnet("all").state_dict().keys()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vit("head"), "`trainable` to be one of 'all', 'classifier', 'lora', but got 'head'"),
        (lambda: vit("lora", lora_rank=0), "`lora_rank` to be an integer >= 1, but got 0"),
        (lambda: vit("lora", lora_alpha=0), "`lora_alpha` to be a finite number > 0, but got 0"),
        pytest.param(
            lambda: vit("lora", lora_layers=["nothing"]),
            r"`lora_layers` .*, such as \['blocks.1.mlp.fc2'\], but got \['nothing'\]",
            marks=NEEDS_PEFT,
        ),
        pytest.param(lambda: vit("lora", lora_layers="qkv"), "`lora_layers` .*, but got 'qkv'", marks=NEEDS_PEFT),
        pytest.param(lambda: resnet("lora"), "no linear layer but the classifier, but got None", marks=NEEDS_PEFT),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_peft_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r"`trainable='lora'` needs peft: pip install peft"):
        vit("lora")
