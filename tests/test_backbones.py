"""Networks: shapes, numbers of parameters, norms, classifiers."""

import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import STRICT
from torch import nn

from lightning_ssesam.cli import main
from lightning_ssesam.models import CIFARResNet, NormalizedLinear, TimmModel, TorchvisionResNet

pytestmark = STRICT


def size(net):
    return sum(p.numel() for p in net.parameters())


def layers(net, kind):
    return [layer for layer in net.modules() if isinstance(layer, kind)]


# He et al. give 0.27, 0.46 and 0.85 million.
@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (56, 853_018)])
def test_cifar_resnet_has_the_published_size(depth, parameters):
    net = CIFARResNet(10, depth)
    assert size(net) == parameters
    assert len(layers(net, nn.Conv2d | nn.Linear)) == depth
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_cifar_resnet_shortcut_is_that_of_option_a():
    net = CIFARResNet(4, 8).eval()
    block = next(layer for layer in net.features if getattr(layer, "stride", 1) == 2)
    for p in block.residual.parameters():
        nn.init.zeros_(p)
    x = torch.rand(1, 16, 6, 6)
    out = block(x)
    assert out.shape == (1, 32, 3, 3)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert out[:, :8].eq(0).all()
    assert out[:, 24:].eq(0).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda **kwargs: CIFARResNet(7, 20, **kwargs),
        lambda **kwargs: TorchvisionResNet(7, "resnet18", **kwargs),
    ],
)
def test_group_norm_and_normalized_classifier(make):
    net = make(norm="group", normalized=True)
    assert not layers(net, nn.BatchNorm2d)
    (classifier,) = layers(net, NormalizedLinear)
    images = torch.randn(3, 3, 32, 32)
    logits = net(images)
    assert logits.shape == (3, 7)
    assert logits.abs().max() <= 1 + 1e-6
    with torch.no_grad():
        classifier.weight.mul_(5)
    torch.testing.assert_close(net(images), logits)
    # No layer mixes samples.
    torch.testing.assert_close(net(images[:1]), logits[:1])
    assert len(layers(make(norm="batch"), nn.BatchNorm2d)) > 10


def test_normalized_linear_is_a_cosine():
    layer = NormalizedLinear(4, 3)
    x = torch.randn(5, 4)
    expected = [[F.cosine_similarity(row, weight, 0).item() for weight in layer.weight] for row in x]
    torch.testing.assert_close(layer(x), torch.tensor(expected))
    assert layer(torch.zeros(1, 4)).eq(0).all()


def test_stems():
    small, large = TorchvisionResNet(100, "resnet34"), TorchvisionResNet(100, "resnet34", stem="imagenet")
    shapes = []
    for net in (small, large):
        net.net.layer1.register_forward_hook(lambda layer, args, out: shapes.append(out.shape[-1]))
        net(torch.randn(2, 3, 32, 32))
    assert shapes == [32, 8]
    # As torchvision's own with 1000 - 100 classes fewer, and 7 * 7 - 3 * 3 weights a filter.
    assert size(large) == 21_797_672 - 900 * 513
    assert size(large) - size(small) == 64 * 3 * (49 - 9)


def test_timm():
    assert TimmModel(7, "resnet10t", in_channels=1)(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    with pytest.raises(ValueError, match=r"`name` to be a model of timm .* but got 'resnet10'"):
        TimmModel(7, "resnet10")


def test_timm_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match="needs timm: pip install timm"):
        TimmModel(7, "resnet10t")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CIFARResNet(0), "`num_classes` to be an integer >= 1, but got 0"),
        (lambda: CIFARResNet(10, 18), "`depth` to be 6n \\+ 2, such as 20, 32 or 56, but got 18"),
        (lambda: CIFARResNet(10, norm="layer"), "`norm` to be one of 'batch', 'group'"),
        (lambda: NormalizedLinear(0, 3), "`in_features` to be an integer >= 1"),
        (lambda: TorchvisionResNet(10, "resnet19"), "`arch` to be one of .*'resnet18'"),
        (lambda: TorchvisionResNet(10, "vgg11"), "`arch` to be one of "),
        (lambda: TorchvisionResNet(10, weights="DEFAULT"), "`weights` to be None where stem and norm are not"),
        (lambda: TorchvisionResNet(10, stem="small"), "`stem` to be one of 'cifar', 'imagenet'"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "backbone",
    [
        ["CIFARResNet", "--model.backbone.depth=8", "--model.backbone.in_channels=1"],
        [
            "lightning_ssesam.models.TimmModel",
            "--model.backbone.name=resnet10t",
            "--model.backbone.in_channels=1",
        ],
    ],
)
def test_by_class_path(backbone, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-ssesam"])
    quick = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.limit_train_batches=2"]
    quiet = ["--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    none = ["--trainer.enable_checkpointing=false"]
    plain = ["--data=DigitsLT", "--model.objective=ERM"]
    main(["fit", *plain, f"--model.backbone={backbone[0]}", *backbone[1:], *quick, *quiet, *none])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_normalized_classifier_of_zeros_is_finite(dtype):
    layer = NormalizedLinear(4, 3).to(dtype)
    features = torch.zeros(2, 4, dtype=dtype, requires_grad=True)
    logits = layer(features)
    assert logits.eq(0).all()
    logits.sum().backward()
    assert features.grad.isfinite().all()


def test_cifar_resnet_starts_as_published():
    """He et al., ICCV 2015: the standard deviation is sqrt(2 / fan-in)."""
    net = CIFARResNet(100, 20)
    for layer in layers(net, nn.Conv2d | nn.Linear):
        fan_in = layer.weight[0].numel()
        assert float(layer.weight.detach().std()) == pytest.approx((2 / fan_in) ** 0.5, rel=0.1)


def test_unknown_pretrained_weights():
    with pytest.raises(ValueError, match="`weights` to be one of 'IMAGENET1K_V1', 'DEFAULT', but got 'IMAGENET9'"):
        TorchvisionResNet(7, "resnet18", stem="imagenet", weights="IMAGENET9")
