"""Each method of the family against its plain version in `twins.py`, step by step."""

import copy

import pytest
import torch
import torch.nn.functional as F
import twins
from helpers import STRICT, classification_batch, stage_2
from torch import nn
from twins import COUNTS, SELECTED, Twin, layered

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
    ClassSplit,
    FocalSAM,
    Friendly,
    FriendlySAM,
    ImbSAM,
    InverseNorm,
    Momentum,
    MomentumSAM,
    Noise,
    PACBayesRadius,
    RandomSAM,
    Term,
)
from lightning_ssesam.engine import MicroBatch, SharpnessEngine

pytestmark = [STRICT, pytest.mark.usefixtures("float64")]

SPLIT = ClassSplit(COUNTS, tail=[3, 4])
OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.02),
}

# The objective, and its plain version with the same settings.
METHODS = {
    "ASAM": (ASAM(0.5, 0.03), lambda *a: twins.asam(*a, 0.5, 0.03, "plain")),
    "ASAM eta=0": (ASAM(0.7, 0.0, "adaptive"), lambda *a: twins.asam(*a, 0.7, 0.0, "adaptive")),
    "FriendlySAM": (FriendlySAM(0.3, 0.5, 0.7), lambda *a: twins.friendly_sam(*a, 0.3, 0.5, 0.7)),
    "FriendlySAM decay=0": (FriendlySAM(0.3, 1.5, 0.0), lambda *a: twins.friendly_sam(*a, 0.3, 1.5, 0.0)),
    "FriendlySAM sigma=0": (FriendlySAM(0.3, 0.0, 0.9), lambda *a: twins.friendly_sam(*a, 0.3, 0.0, 0.9)),
    "GSAM": (GSAM(0.3, 0.6), lambda *a: twins.gsam(*a, 0.3, 0.6)),
    "GSAM alpha=1.7": (GSAM(0.3, 1.7), lambda *a: twins.gsam(*a, 0.3, 1.7)),
    "WSAM": (WSAM(0.2, 0.9), lambda *a: twins.wsam(*a, 0.2, 0.9)),
    "WSAM gamma=0.3": (WSAM(0.2, 0.3), lambda *a: twins.wsam(*a, 0.2, 0.3)),
    "PGN": (PGN(0.3, 0.8), lambda *a: twins.pgn(*a, 0.3, 0.8)),
    "PGN alpha=1.3": (PGN(0.3, 1.3), lambda *a: twins.pgn(*a, 0.3, 1.3)),
    "PGN alpha=1": (PGN(0.3, 1.0), lambda *a: twins.pgn(*a, 0.3, 1.0)),
    "LESAM": (LESAM(0.04, 0.2), lambda *a: twins.lesam(*a, 0.04, 0.2)),
    "LESAM at its limit": (LESAM(9.0, 0.2), lambda *a: twins.lesam(*a, 9.0, 0.2)),
    "FocalSAM": (FocalSAM(SPLIT, 0.3, 2.0, 0.8), lambda *a: twins.focal_sam(*a, 0.3, 2.0, 0.8)),
    "FocalSAM sharpness=1.3": (FocalSAM(SPLIT, 0.3, 0.5, 1.3), lambda *a: twins.focal_sam(*a, 0.3, 0.5, 1.3)),
    "FocalSAM gamma=0": (FocalSAM(SPLIT, 0.3, 0.0, 0.6), lambda *a: twins.focal_sam(*a, 0.3, 0.0, 0.6)),
    "CCSAM": (CCSAM(SPLIT, 0.2, 0.3), lambda *a: twins.cc_sam(*a, 0.2, 0.3, twins.CLASSIFIER)),
    "CCSAM share=1": (CCSAM(SPLIT, 0.5, 1.0), lambda *a: twins.cc_sam(*a, 0.5, 1.0, twins.CLASSIFIER)),
    "MomentumSAM": (MomentumSAM(0.5), lambda *a: twins.momentum_sam(*a, 0.5)),
}


def indices():
    return classification_batch(12)


def without_some_classes():
    return classification_batch(12, classes=[0, 2, 4])


def mixed():
    x, y = classification_batch(12)
    y = F.one_hot(y, 5).double()
    return x, 0.7 * y + 0.3 * y.roll(1, 0)


def ignored():
    x, y = classification_batch(12)
    y[[0, 3, 7]] = -100
    return x, y


BATCHES = {"indices": indices, "some classes": without_some_classes, "mixed": mixed, "ignored": ignored}


class Ours:
    """A network that the engine trains, as the mixin calls it."""

    def __init__(self, net, objective, make_optimizer, **options):
        self.net, self.objective, self.options = net, objective, options
        self.optimizer, self.engine = make_optimizer(list(net.parameters())), SharpnessEngine()

    def sample_losses(self, x, y):
        def call(index, is_clean):
            inputs, targets = (x, y) if index is None else (x[index], y[index])
            return F.cross_entropy(self.net(inputs), targets, reduction="none")

        return call

    def compute(self, x, y, **options):
        objective = self.objective
        part = MicroBatch(self.sample_losses(x, y), objective.terms(y), objective.find_ignored(y))
        options = {"objective": objective, "optimizer": self.optimizer, **self.options, **options}
        return self.engine.compute([part], self.net.parameters(), self.net, **options)

    def step(self, x, y, **options):
        outcome = self.compute(x, y, **options)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return outcome


def assert_same(net, twin, atol=1e-13):
    torch.testing.assert_close(list(net.parameters()), list(twin.parameters()), rtol=0, atol=atol)


@pytest.fixture
def drawn(monkeypatch):
    """What Noise draws, one list of tensors after the other."""
    lists, find = [], Noise.find

    def recorded(self, *args):
        noise, state = find(self, *args)
        lists.append(noise)
        return noise, state

    monkeypatch.setattr(Noise, "find", recorded)
    return lists


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_equals_naive_twin(method, optimizer):
    """Full and split passes, with every kind of targets, over steps that share a state."""
    objective, plain = METHODS[method]
    net = layered()
    ours = [Ours(copy.deepcopy(net), objective, OPTIMIZERS[optimizer], passes=p) for p in ("full", "split")]
    twin = Twin(net, OPTIMIZERS[optimizer])
    for make_batch in (*BATCHES.values(), indices):
        x, y = make_batch()
        for one in ours:
            one.step(x, y)
        twin.step(plain(twin, x, y))
        for one in ours:
            assert_same(one.net, net)


@pytest.mark.parametrize("method", METHODS)
def test_dense_targets_with_ignored_elements(method):
    objective, plain = METHODS[method]
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 5, 1))
    if method.startswith("CCSAM"):
        plain = lambda *a: twins.cc_sam(*a, objective.radius, objective.share, ("2.weight", "2.bias"))  # noqa: E731
    ours = Ours(copy.deepcopy(net), objective, OPTIMIZERS["sgd"])
    twin = Twin(net, OPTIMIZERS["sgd"])
    for _ in range(3):
        x, y = torch.randn(4, 3, 3, 3), torch.randint(5, (4, 3, 3))
        y[torch.rand(4, 3, 3) < 0.3] = -100
        ours.step(x, y)
        twin.step(plain(twin, x, y))
        assert_same(ours.net, net)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_random_sam(optimizer, drawn):
    net = layered()
    ours, twin = Ours(copy.deepcopy(net), RandomSAM(0.4), OPTIMIZERS[optimizer]), Twin(net, OPTIMIZERS[optimizer])
    for make_batch in BATCHES.values():
        x, y = make_batch()
        state = torch.get_rng_state()
        ours.step(x, y)
        assert torch.equal(torch.get_rng_state(), state)
        twin.step(twins.sam_along(twin, x, y, 0.4, drawn[-1]))
        assert_same(ours.net, net)
    assert [t.shape for t in drawn[0]] == [p.shape for p in net.parameters()]
    flat = torch.cat([t.flatten() for noise in drawn for t in noise])
    # Standard normal numbers, drawn anew in every step.
    assert abs(flat.mean()) < 0.2
    assert abs(flat.std() - 1) < 0.15
    assert len(flat.unique()) == len(flat)


class ThreeTerms(ERM):
    """Overlapping terms, two of them perturbed."""

    term_names = ("first", "second", "third")

    def __init__(self, ascent=None):
        super().__init__()
        self.ascent = ascent or self.ascent

    def terms(self, targets):
        n = max(len(targets), 1)
        weights = torch.linspace(0.0, 1.0, len(targets)).clamp(min=0.3) - 0.3
        return (
            Term(weights / n, 0.2, self.ascent),
            Term(1 / n - weights, 0.0),
            Term(weights.flip(0) / n, 0.4, self.ascent),
        )


DIRECTIONS = {"gradient": None, "friendly": Friendly(0.6, 0.8), "momentum": Momentum(), "noise": Noise()}
NAIVE_DIRECTIONS = {"friendly": ("friendly", 0.6, 0.8)}
SCALES = {None: None, (0.05, "plain"): Adaptive(0.05), (0.0, "adaptive"): Adaptive(0.0, "adaptive")}
RADII = {
    None: None,
    ("inverse", 0.05, 0.4): InverseNorm(0.05, 0.4),
    ("pac", 0.2, 731, 0.01, 0.3, False): PACBayesRadius(0.2, 731, 0.01, 0.3),
    ("pac", 0.2, 731, 0.0, float("inf"), True): PACBayesRadius(0.2, 731, per_tensor=True),
}
CHOICES = [
    *((only, SELECTED[only]) for only in SELECTED),
    (lambda name, p: name.startswith("0.") and p.ndim == 2, lambda name: name == "0.weight"),
]
GROUPINGS = {
    "SSESAM 1": lambda ascent: SSESAM(SPLIT, 0.3, 0.6, ascent=ascent),
    "SSESAM 2": lambda ascent: stage_2(SSESAM(SPLIT, 0.3, 0.6, ascent=ascent)),
    "ImbSAM": lambda ascent: ImbSAM(SPLIT, 0.5, 2.0, "group", ascent=ascent),
    "three terms": ThreeTerms,
    "SAM": lambda ascent: SAM(0.5, ascent=ascent),
}
COMBINED = [(d, s, r) for d in DIRECTIONS for s in SCALES for r in RADII]


@pytest.mark.parametrize(("direction", "scale", "radius"), COMBINED)
def test_any_ascent_with_any_terms(direction, scale, radius, drawn):
    number = COMBINED.index((direction, scale, radius))
    # Each takes its turn, and all pairs are among the cases.
    for turn in range(2):
        grouping = list(GROUPINGS)[(number + 2 * turn) % 5]
        only, naive_only = CHOICES[(number // 5 + number + 2 * turn) % 5]
        ascent = Ascent(DIRECTIONS[direction] or Ascent().direction, SCALES[scale], RADII[radius], only)
        plain = {
            "direction": NAIVE_DIRECTIONS.get(direction, direction),
            "scale": scale,
            "radius": radius,
            "only": naive_only,
        }
        _compare_with_any_terms(GROUPINGS[grouping](ascent), plain, drawn)


def _compare_with_any_terms(objective, plain, drawn):
    net, passes = layered(), ("full", "split")
    ours, twin = [Ours(copy.deepcopy(net), objective, OPTIMIZERS["sgd"], passes=p) for p in passes], Twin(net, sgd)
    for classes in (range(5), range(3), range(5)):
        x, y = classification_batch(8, classes=classes)
        terms = objective.terms(y)
        keys = objective.term_names
        for one in ours:
            del drawn[:]
            one.step(x, y)
        noise = dict(zip([k for k, term in zip(keys, terms, strict=True) if term.rho > 0], drawn, strict=False))
        twin.step(twins.any_terms(twin, terms, x, y, keys, plain, noise))
        for one in ours:
            assert_same(one.net, net)


sgd = OPTIMIZERS["sgd"]


@pytest.mark.parametrize("name", ["friendly adaptive", "inverse", "per tensor", "noise", "momentum", "norm"])
def test_split_equals_full_for_every_objective(name):
    """Also together with what the objectives set themselves, where that is allowed."""
    ascent = {
        "friendly adaptive": Ascent(Friendly(0.6, 0.8), Adaptive(0.05)),
        "inverse": Ascent(radius=InverseNorm(0.05, 0.4)),
        "per tensor": Ascent(radius=PACBayesRadius(0.2, 731, per_tensor=True)),
        "noise": Ascent(Noise()),
        "momentum": Ascent(Momentum()),
        "norm": Ascent(only="norm"),
    }[name]
    allowed = 0
    for make in OBJECTIVES_WITH_ASCENTS:
        try:
            objective = make(ascent)
        except ValueError as error:
            assert "Expected argument `ascent` to be an Ascent" in str(error)  # noqa: PT017
            continue
        allowed += 1
        torch.manual_seed(1)
        net = layered()
        nets = []
        for passes in ("split", "full"):
            torch.manual_seed(2)
            ours = Ours(copy.deepcopy(net), objective, OPTIMIZERS["adamw"], passes=passes)
            for make_batch in BATCHES.values():
                ours.step(*make_batch())
            nets.append(ours.net)
        assert_same(*nets)
    assert allowed >= 6


OBJECTIVES_WITH_ASCENTS = [
    lambda ascent: ASAM(0.5, ascent=ascent),
    lambda ascent: FriendlySAM(0.3, ascent=ascent),
    lambda ascent: GSAM(0.3, ascent=ascent),
    lambda ascent: WSAM(0.3, 0.6, ascent=ascent),
    lambda ascent: PGN(0.3, ascent=ascent),
    lambda ascent: LESAM(ascent=ascent),
    lambda ascent: FocalSAM(SPLIT, 0.3, ascent=ascent),
    lambda ascent: CCSAM(SPLIT, 0.3, ascent=ascent),
    lambda ascent: MomentumSAM(0.3, ascent=ascent),
    lambda ascent: RandomSAM(0.3, ascent=ascent),
    *GROUPINGS.values(),
]
