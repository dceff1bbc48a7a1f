"""Recorded steps, on the CPU: a tape stands in for CUDA graphs (tests/tape.py). Those of a GPU are in test_cuda.py."""

import copy
import random
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from helpers import (
    OBJECTIVES,
    SPLIT,
    STRICT,
    Model,
    assert_same_bits,
    batches,
    choose,
    clones,
    convbn,
    fit,
    mlp,
    trainer,
)
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tape import TapeRecorder
from test_family_runs import Failing
from test_resume import Stateful
from torch import nn
from twins import layered

from lightning_ssesam import (
    ASAM,
    CCSAM,
    ERM,
    GSAM,
    LESAM,
    PGN,
    SAM,
    SSESAM,
    WSAM,
    Adaptive,
    Ascent,
    FocalSAM,
    Friendly,
    FriendlySAM,
    ImbSAM,
    MomentumSAM,
    RadiusSchedule,
    RandomSAM,
    Staged,
    StageSwitch,
    StepOptions,
    graph_step,
)
from lightning_ssesam import graphs as graphs_module
from lightning_ssesam.callbacks import DeferredReweighting
from lightning_ssesam.cli import main
from lightning_ssesam.errors import ArgumentError, NonFiniteError
from lightning_ssesam.graph_step import check_graphs
from lightning_ssesam.graphs import RECORDERS, WARM_UP, CUDARecorder
from lightning_ssesam.layers import replays_by_itself
from lightning_ssesam.losses import LDAMLoss
from lightning_ssesam.models import CIFARResNet
from lightning_ssesam.snapshots import torch_random_state
from lightning_ssesam.trees import mapped, others_of, signature, tensors_of

pytestmark = [STRICT, pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")]

FAMILY = {
    "ASAM": lambda: ASAM(0.3),
    "FriendlySAM": lambda: FriendlySAM(0.1),
    "GSAM": lambda: GSAM(0.1),
    "PGN": lambda: PGN(0.1),
    "WSAM": lambda: WSAM(0.1),
    "LESAM": LESAM,
    "MomentumSAM": lambda: MomentumSAM(0.1),
    "FocalSAM": lambda: FocalSAM(SPLIT),
    "SSESAM, friendly": lambda: SSESAM(SPLIT, 0.3, 0.5, ascent=Ascent(Friendly(0.6, 0.8), Adaptive(0.05))),
}
NETS = {"mlp": (mlp, (8,)), "batch norm": (convbn, (3, 4, 4)), "layer norm": (layered, (8,))}


@pytest.fixture(autouse=True)
def tape(monkeypatch):
    monkeypatch.setitem(RECORDERS, "cpu", TapeRecorder)
    monkeypatch.setattr(TapeRecorder, "made", 0)
    monkeypatch.setattr(TapeRecorder, "replayed", 0)
    return TapeRecorder


def attention():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 5))


class Logging(Model):
    """Logs in the clean pass, by itself and through a loss of its own."""

    def sample_losses(self, batch):
        losses = super().sample_losses(batch)
        self.log("loss", losses.mean())
        self.log("largest", losses.max(), reduce_fx="max")
        self.log("one", 1.0)
        return losses


class Notes(Callback):
    """Notes what each step has left: gradients, logged values, momentum."""

    def __init__(self):
        self.steps, self.gradients = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradients = clones(p.grad for p in module.parameters())

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        logged = [trainer.callback_metrics[name].clone() for name in sorted(trainer.callback_metrics)]
        momentum = [
            s["momentum_buffer"].clone()
            for s in trainer.optimizers[0].state.values()
            if s.get("momentum_buffer") is not None
        ]
        self.steps.append([*self.gradients, *logged, *momentum, *clones(module.state_dict().values())])
        assert all(p.grad is None for p in module.parameters())


def train(make_net, objective, given, with_graphs, kind=Model, options=None, callbacks=(), **kwargs):
    torch.manual_seed(0)
    model = kind(make_net(), objective())
    choose(model, passes="full", cuda_graphs=with_graphs, **(options or {}))
    notes = Notes()
    fit(model, given, callbacks=[notes, *(make() for make in callbacks)], **kwargs)
    return model, notes.steps


def same_both_ways(make_net, objective, given, replays, **kwargs):
    """Train with and without recordings; every step is the same to the bit."""
    _, expected = train(make_net, objective, given, False, **kwargs)
    model, actual = train(make_net, objective, given, True, **kwargs)
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert_same_bits(a, b)
    assert TapeRecorder.replayed == replays
    return model


# The same numbers.


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", [*OBJECTIVES, *FAMILY])
def test_every_step_is_the_same_to_the_bit(name, net, float64):
    make_net, shape = NETS[net]
    make = {**OBJECTIVES, **FAMILY}[name]
    # A term that remembers has other first steps than later ones.
    first = 1 if "riendly" in name else 0
    if name == "MomentumSAM":
        # Its first step has no momentum.
        first = 0
    same_both_ways(
        make_net, make, batches(7, shape=shape), 7 - WARM_UP - first, options={"log_sharpness": True}, kind=Logging
    )


@pytest.mark.parametrize("options", [{}, {"interval": 2}, {"interval": 3, "reuse": 0.7}, {"on_nonfinite": "skip"}])
def test_stages_intervals_and_a_smaller_last_batch(options):
    given = [*batches(8, n=12), *batches(1, n=5)]
    for make, switch in (
        (lambda: SSESAM(SPLIT, 0.1, 0.2), 0.5),
        (lambda: Staged([ERM(), SAM(0.2), ImbSAM(SPLIT, 0.3)]), [0.3, 0.6]),
    ):
        TapeRecorder.replayed = 0
        _, expected = train(
            mlp, make, given, False, options=options, callbacks=[lambda at=switch: StageSwitch(at)], max_epochs=4
        )
        _, actual = train(
            mlp, make, given, True, options=options, callbacks=[lambda at=switch: StageSwitch(at)], max_epochs=4
        )
        for a, b in zip(actual, expected, strict=True):
            assert_same_bits(a, b)
        assert TapeRecorder.replayed > 8


def test_accumulated_batches_clipping_schedulers_and_precision():
    def with_steps(optimizer):
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), "interval": "step"}]

    class Scheduled(Logging):
        def __init__(self, net, objective):
            super().__init__(net, objective, scheduler=with_steps)

    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "precision": "bf16-mixed"}
    same_both_ways(convbn, OBJECTIVES["SSESAM 1"], batches(13, shape=(3, 4, 4)), 3, kind=Scheduled, **options)


def test_channels_last_masks_dense_and_soft_targets():
    inputs = [torch.randn(6, 3, 4, 4).to(memory_format=torch.channels_last) for _ in range(6)]
    dense = [(x, torch.randint(5, (6, 4, 4))) for x in inputs]
    for _, y in dense:
        y[0, 0] = -100
    net = lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1))  # noqa: E731
    same_both_ways(net, OBJECTIVES["SSESAM 1"], dense, 3)
    TapeRecorder.replayed = 0
    soft = [(torch.randn(6, 8), torch.rand(6, 5).softmax(1)) for _ in range(6)]
    same_both_ways(mlp, OBJECTIVES["SSESAM 1"], soft, 3)


def test_batches_in_mappings_and_of_other_kinds_of_layers():
    class OfMapping(Model):
        def sample_losses(self, batch):
            return super().sample_losses((batch["x"], batch["label"]))

    given = [{"x": torch.randn(6, 3, 8), "label": torch.randint(5, (6,)), "scale": 2.0} for _ in range(6)]
    same_both_ways(attention, OBJECTIVES["SSESAM 1"], given, 3, kind=OfMapping)


class Recurrent(nn.Module):
    """An LSTM over embedded words; the embedding is also the last layer."""

    def __init__(self):
        super().__init__()
        self.words, self.lstm, self.last = nn.Embedding(5, 6), nn.LSTM(6, 6, batch_first=True), nn.Linear(6, 5)
        self.last.weight = self.words.weight

    def forward(self, x):
        return self.last(self.lstm(self.words((x[:, :6] > 0).long()))[0][:, -1])


def convolutions(norm):
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


def with_spectral_norm():
    return nn.Sequential(torch.nn.utils.parametrizations.spectral_norm(nn.Linear(8, 16)), nn.Tanh(), nn.Linear(16, 5))


def with_weight_norm():
    return nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 16)), nn.Tanh(), nn.Linear(16, 5))


def with_frozen_layer():
    net = mlp()
    return net.requires_grad_(False).append(nn.Linear(5, 5).requires_grad_(True))


OTHER_NETS = {
    "group norm": (lambda: convolutions(nn.GroupNorm(2, 4)), (3, 4, 4)),
    "instance norm": (lambda: convolutions(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)), (3, 4, 4)),
    "residual": (lambda: CIFARResNet(5, depth=8), (3, 8, 8)),
    "attention": (attention, (3, 8)),
    "recurrent, shared": (Recurrent, (8,)),
    "spectral norm": (with_spectral_norm, (8,)),
    "weight norm": (with_weight_norm, (8,)),
    "frozen": (with_frozen_layer, (8,)),
}


@pytest.mark.parametrize("net", OTHER_NETS)
@pytest.mark.parametrize("name", ["SSESAM 1", "SSESAM 2", "FriendlySAM"])
def test_other_networks(name, net, float64):
    make_net, shape = OTHER_NETS[net]
    replays = 6 - WARM_UP - ("riendly" in name)
    same_both_ways(make_net, {**OBJECTIVES, **FAMILY}[name], batches(6, n=8, shape=shape), replays)


def test_precise_numbers_in_double():
    given = [(x.double(), y) for x, y in batches(7)]
    same_both_ways(lambda: mlp().double(), lambda: GSAM(0.2), given, 4, precision="64-true")


def test_python_code_runs_only_while_a_step_is_recorded():
    calls = []

    class Counting(Model):
        def sample_losses(self, batch):
            calls.append(self.in_clean_pass)
            return super().sample_losses(batch)

    train(mlp, lambda: SAM(0.1), batches(9), True, kind=Counting)
    assert calls == [True, False] * (WARM_UP + 1)


def test_a_replay_copies_its_inputs_and_results():
    # The loader may use its memory again, and a callback may keep what was logged.
    x, y = batches(1)[0]
    kept = []

    class Keep(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            batch[0].fill_(float(batch_idx))

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            kept.append((outputs["loss"], trainer.callback_metrics["loss"]))

    model = Logging(mlp(), SAM(0.1), optimizer=lambda ps: torch.optim.SGD(ps, lr=0.0))
    choose(model, cuda_graphs=True)
    fit(model, [(x, y)] * 8, callbacks=[Keep()])
    expected = [F.cross_entropy(model.net(torch.full_like(x, float(number))), y) for number in range(8)]
    for loss, logged, value in zip(*zip(*kept, strict=True), expected, strict=True):
        assert torch.allclose(torch.stack([loss, logged]), value)


def test_memory_is_one_more_set_of_inputs_and_gradients():
    model = Model(mlp(), SSESAM(SPLIT, 0.1, 0.2))
    choose(model, cuda_graphs=True)
    sizes = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            step = module._SharpnessAwareMixin__step
            for recording in step.graphs._recordings.values():
                tensors = [
                    *recording.inputs,
                    *recording.states_before,
                    *recording.gradients,
                    *tensors_of(recording.result),
                ]
                sizes.append(sum(t.nbytes for t in tensors))

    given = batches(6)
    fit(model, given, callbacks=[Look()])
    of_batch = sum(t.nbytes for t in given[0]) + 2 * 24 * 8
    of_gradients = sum(p.nbytes for p in model.parameters())
    assert len(sizes) == 3
    assert max(sizes) <= of_batch + of_gradients + 64
    assert not model._SharpnessAwareMixin__step.graphs._recordings


@pytest.mark.parametrize(("patience", "replays"), [(10, 6 * 2), (1000, 3 * 2)])
def test_only_a_few_recordings_are_kept(patience, replays, monkeypatch):
    """A recording makes room if it was not used for a while; else steps of a new kind are made as usual."""
    monkeypatch.setattr(graphs_module, "_MOST", 3)
    monkeypatch.setattr(graphs_module, "_PATIENCE", patience)
    monkeypatch.setattr(Numbers, "found", [])
    given = [batch for n in range(4, 10) for batch in batches(WARM_UP + 2, n=n)]
    same_both_ways(mlp, lambda: SAM(0.1), given, replays, callbacks=[Numbers])
    assert max(Numbers.found) == 3


class Numbers(Callback):
    """Notes how many recordings there are."""

    found: list[int] = []  # noqa: RUF012

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.found.append(len(module._SharpnessAwareMixin__step.graphs._recordings))


def test_recordings_of_an_earlier_stage_are_freed(monkeypatch):
    monkeypatch.setattr(Numbers, "found", [])
    callbacks = [lambda: StageSwitch(step=6), Numbers]
    same_both_ways(mlp, lambda: SSESAM(SPLIT, 0.1, 0.2), batches(12), 3 + 3, callbacks=callbacks)
    assert Numbers.found == [0] * 12 + [*[0] * WARM_UP, *[1] * 9]


def test_batches_in_which_plain_terms_follow_from_the_others():
    """Of a single class, the plain term is a multiple of the perturbed one, and needs no backward pass."""
    one, several = batches(8, classes=[3]), batches(8)
    same_both_ways(mlp, lambda: FocalSAM(SPLIT, 0.5), [b for pair in zip(one, several, strict=True) for b in pair], 10)


def test_momentum_that_is_loaded_anew():
    class Load(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 6:
                optimizer = trainer.optimizers[0]
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    same_both_ways(mlp, lambda: MomentumSAM(0.3), batches(12), 3 + 3, callbacks=[Load])


# What a replay would not see.


class Smoothed(Model):
    smoothing = 0.0

    def __init__(self, net, objective):
        super().__init__(net, objective)
        self.loss = nn.CrossEntropyLoss(reduction="none")
        self.scales, self._factors = [1.0], {"of": {"losses": torch.ones(())}}
        self._shift, self.settings = 0.0, Settings()
        self.array, self.long = np.ones(3), [1.0] * 200
        self.by_name, self.power = {"losses": 1.0, "others": 2.0}, lambda losses: losses

    def sample_losses(self, batch):
        x, y = batch
        self.loss.label_smoothing = self.smoothing
        losses = self.loss(self.net(x), y) * self.scales[0] * self.settings.factor
        losses = losses * self._factors["of"]["losses"] + self._shift * losses.square()
        return self.power(losses * float(self.array[1]) * self.long[150] * self.by_name["losses"])


class Settings:
    factor = 1.0

    def __init__(self):
        self.factor = 1.0


def set_scale(module):
    module.scales[0] = 0.5


def set_private(module):
    module._shift = 0.5


def replace_nested_tensor(module):
    module._factors["of"]["losses"] = torch.tensor(2.0)


def replace_list(module):
    module.scales = [0.5]


def replace_settings(module):
    module.settings = Settings()
    module.settings.factor = 0.5


def replace_function(module):
    module.power = torch.square


def replace_forward(module):
    module.net[1].forward = torch.relu


def swap_names(module):
    module.by_name = {"others": 1.0, "losses": 2.0}


def swap_names_in_place(module):
    first, second = module.by_name.pop("losses"), module.by_name.pop("others")
    module.by_name |= {"others": first, "losses": second}


def set_in_array(module):
    module.array[1] = 0.5


def set_in_long_list(module):
    module.long[150] = 0.5


def set_factor(module):
    module.settings.factor = 0.5


def set_smoothing(module):
    module.smoothing = 0.1


def replace_weight(module):
    module.loss.weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])


def freeze(module):
    module.net[0].weight.requires_grad_(False)


def replace_data(module):
    module.net[0].weight.data = module.net[0].weight.data * 2


def replace_layer(module):
    module.net[1] = nn.ReLU()


def change_mode(module):
    module.net[1].eval()


def add_hook(module):
    module.net[1].register_forward_hook(lambda layer, inputs, output: 2 * output)


def set_alpha(module):
    module.objective.alpha = 0.1


NUMBERS = [set_scale, set_private, set_factor, set_smoothing, set_alpha, set_in_array, set_in_long_list]
NAMES = [replace_list, replace_settings, replace_function, replace_forward, swap_names, swap_names_in_place]
PARTS = [replace_weight, replace_nested_tensor, freeze, replace_data, replace_layer, change_mode, add_hook]


@pytest.mark.parametrize("change", [*NUMBERS, *NAMES, *PARTS])
def test_a_change_that_python_code_would_see_ends_a_recording(change):
    class At(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 6:
                change(module)

    same_both_ways(mlp, lambda: GSAM(0.1, alpha=0.7), batches(14), 2 * 3 + 2, kind=Smoothed, callbacks=[At])


def test_deferred_reweighting_is_seen():
    class WithLoss(Model):
        def __init__(self, net, objective):
            super().__init__(net, objective)
            self.split, self.loss = SPLIT, LDAMLoss([50, 40, 30, 6, 5], reduction="none")

        def sample_losses(self, batch):
            return self.loss(self.net(batch[0]), batch[1])

    callbacks = [lambda: DeferredReweighting(0.5)]
    same_both_ways(
        mlp, lambda: SAM(0.1), batches(6), 6 * 4 - 2 * WARM_UP, kind=WithLoss, callbacks=callbacks, max_epochs=4
    )


def test_the_epoch_is_seen():
    class ByEpoch(Model):
        def sample_losses(self, batch):
            return super().sample_losses(batch) * (1 + self.trainer.current_epoch)

    same_both_ways(mlp, lambda: SAM(0.1), batches(6), 3 * 3, kind=ByEpoch, max_epochs=3)


def test_radii_that_change_in_every_step_are_made_as_usual(monkeypatch):
    monkeypatch.setattr(graphs_module, "_PATIENCE", 6)
    schedule, given = [lambda: RadiusSchedule("rho", 0.1, 0.2)], batches(8)
    _, expected = train(mlp, lambda: SAM(0.1), given, False, callbacks=schedule)
    with pytest.warns(UserWarning, match="makes every step as usual: no two steps are alike"):
        _, actual = train(mlp, lambda: SAM(0.1), given, True, callbacks=schedule)
    for a, b in zip(actual, expected, strict=True):
        assert_same_bits(a, b)
    assert TapeRecorder.made == 0


def test_something_that_changes_in_every_step_is_named(monkeypatch):
    monkeypatch.setattr(graphs_module, "_PATIENCE", 40)

    class Often(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            module.seen = batch_idx

    with pytest.warns(UserWarning, match=r"`Model.seen` changes again and again. If no step reads it"):
        train(mlp, lambda: SAM(0.1), batches(100), True, callbacks=[Often])


def test_cc_sam_is_made_as_usual():
    same_both_ways(mlp, lambda: CCSAM(SPLIT), batches(6), 0)


# What cannot be recorded.


def refused(match, kind=Model, objective=lambda: SAM(0.1), make_net=mlp, given=None, before=None, **kwargs):
    """A training is refused, and the weights are those from before it."""
    model = kind(make_net(), objective())
    choose(model, cuda_graphs=True)
    before = clones(model.parameters())
    with pytest.raises(MisconfigurationException, match=match) as caught:
        fit(model, given or batches(6), **kwargs)
    assert len(str(caught.value)) < 400, caught.value
    return model, before


def test_random_numbers_are_refused_at_the_first_step():
    class WithNumPy(Model):
        def sample_losses(self, batch):
            return super().sample_losses(batch) * (1 + random.random())

    with_dropout = lambda: nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 5))  # noqa: E731
    for kwargs in ({"make_net": with_dropout}, {"kind": WithNumPy}):
        model, before = refused("`cuda_graphs=True`: a step draws random numbers", **kwargs)
        assert_same_bits(model.parameters(), before)
    refused(r"`Noise\(\)` draws random numbers", objective=lambda: RandomSAM(0.1))


def test_waiting_for_the_device_is_refused():
    class Waiting(Model):
        def sample_losses(self, batch):
            losses = super().sample_losses(batch)
            return losses * (1.0 if losses.max().item() < 1e9 else 0.0)

    class LooksAtInputs(Model):
        def sample_losses(self, batch):
            return super().sample_losses(batch) if bool((batch[0] < 1e9).all()) else None

    refused("a step waits for the device", kind=Waiting)
    # The tape knows what comes from the device only when it records.
    refused("a step cannot be recorded", kind=LooksAtInputs)


class Total(torchmetrics.Metric):
    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros(()))

    def update(self, value):
        self.total = self.total + value

    def compute(self):
        return self.total


def test_what_a_replay_would_not_do_is_refused():
    class Metric(Model):
        def __init__(self, net, objective):
            super().__init__(net, objective)
            self.metric = Total()

        def sample_losses(self, batch):
            losses = super().sample_losses(batch)
            if self.in_clean_pass:
                self.metric.update(losses.detach().sum())
            return losses

    class Recording(Model):
        def __init__(self, net, objective):
            super().__init__(net, objective)
            self.history = []

        def sample_losses(self, batch):
            losses = super().sample_losses(batch)
            self.history.append(losses.detach())
            return losses

    class Counting(Model):
        calls = 0

        def sample_losses(self, batch):
            self.calls += 1
            return super().sample_losses(batch)

    for kind, what in ((Metric, "Total._update_count"), (Recording, "Recording.history"), (Counting, "Counting.calls")):
        refused(f"a step changes `{what}`, which a replay would not do", kind=kind)


def test_layers_that_assign_what_they_compute_are_refused():
    old = lambda: nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(8, 5)))  # noqa: E731
    refused("a step changes `Linear.weight`, which a replay would not do", make_net=old)


def test_numbers_of_the_step_are_refused():
    class ByStep(Model):
        def sample_losses(self, batch):
            return super().sample_losses(batch) / (1 + self.global_step)

    class ByBatch(Model):
        def sample_losses(self, batch, batch_idx):
            return super().sample_losses(batch)

    refused("reads `global_step`", kind=ByStep)
    refused("`sample_losses` has a parameter `batch_idx`", kind=ByBatch)


def test_strange_batches_are_refused():
    class Box:
        def __init__(self, x, y):
            self.x, self.y = x, y

        def __len__(self):
            return len(self.y)

    class OfBox(Model):
        def sample_losses(self, batch):
            return super().sample_losses((batch[0].x, batch[1]))

    given = [(Box(x, y), y) for x, y in batches(2)]
    refused("a batch holds a Box, whose tensors cannot be copied", kind=OfBox, given=given)

    class OfEither(OfBox):
        def sample_losses(self, batch):
            kind = OfBox if isinstance(batch[0], Box) else Model
            return kind.sample_losses(self, batch)

    # Also after steps that were replayed.
    refused("a batch holds a Box, whose tensors cannot be copied", kind=OfEither, given=[*batches(6), *given])
    assert TapeRecorder.replayed == 6 - WARM_UP


def test_a_replay_does_not_look_at_its_batch_again(monkeypatch):
    looks = []
    monkeypatch.setattr(graph_step, "others_of", lambda tree: looks.append(tree) or others_of(tree))
    train(mlp, lambda: SAM(0.1), batches(7), True)
    # The steps that are made as usual, and the one that is recorded.
    assert len(looks) == WARM_UP + 1


class Hooked(Model):
    def on_after_backward(self):
        pass


class HookedCallback(Callback):
    def on_before_backward(self, trainer, module, loss):
        pass


def test_hooks_that_a_replay_does_not_call_are_refused():
    refused("a replay does not call `Hooked.on_after_backward`", kind=Hooked)
    refused("a replay does not call `HookedCallback.on_before_backward`", callbacks=[HookedCallback()])

    def with_hook():
        net = mlp()
        net[0].weight.register_hook(lambda g: g)
        return net

    refused("a replay does not call the hooks of parameters", make_net=with_hook)


def test_a_cpu_is_refused(monkeypatch):
    monkeypatch.delitem(RECORDERS, "cpu")
    refused("needs an NVIDIA GPU, but the Trainer uses the device 'cpu'")


def test_split_passes_are_refused():
    with pytest.raises(ArgumentError, match="`passes` to be 'auto' or 'full' with `cuda_graphs=True`"):
        StepOptions(passes="split", cuda_graphs=True)
    with pytest.raises(ArgumentError, match="`cuda_graphs`"):
        StepOptions(cuda_graphs=1)


def test_networks_that_replay_by_themselves_are_told():
    plain, own = (torch.compile(mlp(), mode=mode) for mode in (None, "reduce-overhead"))
    inside = mlp()
    inside.compile(mode="reduce-overhead")
    by_option = torch.compile(mlp(), options={"triton.cudagraphs": True})
    assert [replays_by_itself(net) for net in (mlp(), plain, own, inside, by_option)] == [
        False,
        False,
        True,
        True,
        True,
    ]
    # On a CPU they do not.
    fit(Model(nn.Sequential(own)), [])


def test_networks_that_replay_by_themselves_are_refused_on_a_gpu():
    model = Model(nn.Sequential(torch.compile(mlp(), mode="reduce-overhead")))
    on_gpu = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda")))
    with pytest.raises(MisconfigurationException, match=r"`Model.net.0` is compiled with .*cuda_graphs=True"):
        check_graphs(model, model.objective, model.step_options, on_gpu)


class Device:
    """Notes what a recorder asks of torch.cuda."""

    def __init__(self, monkeypatch):
        self.calls, self.mode = [], 0
        own, outside = (SimpleNamespace(name=name) for name in ("own", "outside"))
        for stream in (own, outside):
            stream.wait_stream = lambda other, s=stream: self.calls.append(f"{s.name} waits for {other.name}")
        graph = SimpleNamespace(replay=lambda: self.calls.append("replay"))
        names = {
            "Stream": lambda device: own,
            "current_stream": lambda device: outside,
            "graph_pool_handle": lambda: "pool",
            "CUDAGraph": lambda: graph,
            "graph": lambda *args, **kwargs: self.noted(f"capture {args == (graph, 'pool', own)} {kwargs}"),
            "stream": lambda stream: self.noted(f"on {stream.name}"),
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": self.set_mode,
        }
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def set_mode(self, mode):
        self.mode = mode
        self.calls.append(f"mode {mode}")

    @contextmanager
    def noted(self, text):
        self.calls.append(text)
        yield


def test_what_is_asked_of_a_gpu(monkeypatch):
    device = Device(monkeypatch)
    recorder = CUDARecorder(torch.device("cuda"))
    for is_strict, error in ((False, None), (True, KeyError)):
        device.calls.clear()
        with suppress(KeyError), recorder.apart(is_strict):
            assert device.mode == ("error" if is_strict else 0)
            if error is not None:
                raise error
        strict = ["mode error"] * is_strict
        assert device.calls == ["own waits for outside", *strict, "on own", "mode 0", "outside waits for own"]
    device.calls.clear()
    result, replay = recorder.record(lambda inputs: 2 * inputs, 21)
    replay()
    assert result == 42
    assert device.calls == ["capture True {'capture_error_mode': 'thread_local'}", "replay"]


# Steps that fail, and going on.


@pytest.mark.parametrize("on_nonfinite", ["skip", "raise"])
@pytest.mark.parametrize("bad", [1, 6])
def test_a_step_that_is_not_finite_leaves_nothing(on_nonfinite, bad):
    make = lambda: SSESAM(SPLIT, 0.3, 0.5, ascent=Ascent(Friendly(0.6, 0.8)))  # noqa: E731
    given = batches(9, shape=(3, 4, 4))
    given[bad][0][0] = float("nan")
    options = {"on_nonfinite": on_nonfinite}
    if on_nonfinite == "skip":
        # The steps that are skipped have no gradient to note.
        _, expected = train(convbn, make, given, False, options=options)
        _, actual = train(convbn, make, given, True, options=options)
        for a, b in zip(actual, expected, strict=True):
            assert_same_bits(a, b)
        return
    models = []
    for with_graphs in (False, True):
        torch.manual_seed(0)
        model = Model(convbn(), make())
        choose(model, passes="full", cuda_graphs=with_graphs, **options)
        with pytest.raises(NonFiniteError, match=f"of step {bad} is infinite or not a number"):
            fit(model, given)
        models.append(model)
    assert_same_bits(models[1].state_dict().values(), models[0].state_dict().values())


def stateful_run(data, ckpt_path=None, callbacks=()):
    """Two epochs in another order each, of an objective that remembers."""
    torch.manual_seed(0)
    model = Model(mlp(), SSESAM(SPLIT, 0.3, 0.5, ascent=Ascent(Friendly(0.6, 0.8))))
    choose(model, cuda_graphs=True)
    torch.manual_seed(9 if ckpt_path is None else 10)
    callbacks = [StageSwitch(at=0.5), *callbacks]
    run = trainer(max_epochs=2, callbacks=callbacks, enable_checkpointing=True)
    run.fit(model, Stateful(data), ckpt_path=ckpt_path)
    return model


@pytest.mark.parametrize("step", [2, 6, 9, 17])
def test_a_killed_training_goes_on_to_the_bit(tmp_path, step):
    """From a checkpoint, and from one that is written when a recorded step is under way."""
    data = batches(9, n=12)
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=step, save_top_k=-1)
    whole = stateful_run(data, callbacks=[keep])
    resumed = stateful_run(data, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert_same_bits(resumed.state_dict().values(), whole.state_dict().values())
    callbacks = [Failing("on_before_optimizer_step", step), OnExceptionCheckpoint(tmp_path, "failed")]
    with pytest.raises(KeyError, match="injected"):
        stateful_run(data, callbacks=callbacks)
    resumed = stateful_run(data, ckpt_path=tmp_path / "failed.ckpt")
    assert_same_bits(resumed.state_dict().values(), whole.state_dict().values())


def test_a_second_fit_records_anew():
    model = Model(mlp(), SAM(0.1))
    choose(model, cuda_graphs=True)
    for _ in range(2):
        fit(model, batches(5))
    assert TapeRecorder.made == 2
    assert copy.deepcopy(model)._SharpnessAwareMixin__step.graphs._recordings == {}


def test_checkpoints_are_those_of_plain_steps(tmp_path):
    saved, given = [], batches(5)
    for with_graphs in (False, True):
        save = ModelCheckpoint(tmp_path / str(with_graphs), every_n_train_steps=5)
        train(
            mlp,
            lambda: FriendlySAM(0.1),
            given,
            with_graphs,
            callbacks=[lambda save=save: save],
            enable_checkpointing=True,
        )
        saved.append(torch.load(save.best_model_path, weights_only=False))
    for first, second in zip(*(tensors_of(s) for s in saved), strict=True):
        assert torch.equal(first, second)


# Trees, and the random state of a GPU.


def test_trees():
    Pair = StepOptions  # a frozen dataclass without tensors
    tree = [(torch.ones(2), {"a": torch.zeros(1), "b": 3}), "text", None, Pair(), torch.tensor(2)]
    doubled = mapped(lambda t: 2 * t, tree)
    assert [t.tolist() for t in tensors_of(doubled)] == [[2, 2], [0], 4]
    assert tree[0][0].tolist() == [1, 1]
    assert signature(tree) == signature(doubled)
    for other in (
        [(torch.ones(3), {"a": torch.zeros(1), "b": 3}), *tree[1:]],
        [*tree[:1], "other", *tree[2:]],
        tree[:-1],
    ):
        assert signature(other) != signature(tree)
    assert signature(True) != signature(1)
    assert signature(torch.ones(2, 3)) != signature(torch.ones(3, 2).t())


def test_the_random_state_of_a_gpu_is_not_read_while_it_records(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(16, dtype=torch.uint8))
    for is_capturing, number in ((False, 2), (True, 1)):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda value=is_capturing: value)
        assert len(torch_random_state(torch.device("cuda"))) == number


@pytest.mark.parametrize("command", ["fit", "compare", "sweep"])
def test_the_commands_refuse_without_a_gpu(command, monkeypatch, capsys):
    """In one line, before anything is written."""
    monkeypatch.delitem(RECORDERS, "cpu")
    options = ["--trainer.accelerator", "cpu", "--model.step_options.cuda_graphs", "true"]
    if command != "fit":
        Path("graphs.yaml").write_text("model: {step_options: {cuda_graphs: true}}\ntrainer: {accelerator: cpu}\n")
        options = ["--config", "graphs.yaml"]
    with pytest.raises(SystemExit) as caught:
        main([command, *options])
    assert caught.value.code == 2 or "needs an NVIDIA GPU" in str(caught.value.code)
    (line,) = [x for x in f"{capsys.readouterr().err}{caught.value.code}".splitlines() if "NVIDIA" in x]
    assert len(line) < 400
    assert sorted(path.name for path in Path().iterdir()) == ["graphs.yaml"] * (command != "fit")
