"""Layers and losses that mix the samples of a batch, or move something in a forward, beside the naive twin.

`passes="auto"` has to tell which samples must be forwarded together. A perturbed pass has to meet what its clean pass
met, and after a step everything has to be as after one forward at the unperturbed weights.
"""

import copy
import math
import random
from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SPLIT, Model, batches, choose, fit
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_ssesam import SSESAM
from lightning_ssesam.engine import MicroBatch, SharpnessEngine

SPLIT_PASSES, FULL_PASSES = "split", "full"


def layer(function):
    """A layer from a function of the features (N, 8)."""

    class Layer(nn.Module):
        def forward(self, x):
            return function(x)

    return Layer


class HandmadeBatchNorm(nn.Module):
    def forward(self, x):
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()


class EvalIsPlain(nn.Module):
    def forward(self, x):
        return x - x.mean(0) if self.training else x


class BatchRenorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(8))

    def forward(self, x):
        y = x - 0.5 * x.mean(0) - 0.5 * self.running_mean
        self.running_mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return y


class ReboundBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x):
        self.scale = 0.9 * self.scale + 0.1 * x.detach().abs().mean(0)
        return x / self.scale


class VectorQuantizer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randn(4, 8))

    def forward(self, x):
        nearest = torch.cdist(x.detach(), self.codes).argmin(1)
        quantized = self.codes[nearest]
        for code in nearest.unique():
            self.codes[code] = 0.8 * self.codes[code] + 0.2 * x.detach()[nearest == code].mean(0)
        return x + (quantized - x).detach() + 0.1 * x


class EvoNormB0(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("running_var", torch.ones(8))

    def forward(self, x):
        variance = x.var(0, unbiased=False)
        self.running_var.mul_(0.9).add_(0.1 * variance.detach())
        return x / torch.maximum((variance + 1e-5).sqrt(), x.var(1, keepdim=True).sqrt() + x)


class SequenceFirstAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        x = x.unsqueeze(1)
        return self.attention(x, x, x)[0].squeeze(1)


class BatchFormer(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)

    def forward(self, x):
        return self.encoder(x.unsqueeze(1)).squeeze(1)


class SampleAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        x = x.view(len(x), 2, 4)
        return self.attention(x, x, x)[0].flatten(1)


class RecurrentOverBatch(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.batch_first = batch_first
        self.gru = nn.GRU(8, 8, batch_first=batch_first)

    def forward(self, x):
        return self.gru(x.unsqueeze(1))[0].squeeze(1)


class Frequencies(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embedding = nn.Embedding(3, 8, **options)

    def forward(self, x):
        return x + self.embedding((x.detach()[:, 0] > 0).long())


class Capacity(nn.Module):
    """A mixture of two experts, each of which takes its first samples up to a share of the batch."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        chosen, out = (x.detach()[:, 0] > 0).long(), x
        for number, expert in enumerate(self.experts):
            mine = (chosen == number).nonzero().flatten()[: len(x) // 3]
            out = out.index_add(0, mine, expert(x[mine]))
        return out


class Momentum(nn.Module):
    """A momentum encoder, whose parameters are not trained."""

    def __init__(self, assigns):
        super().__init__()
        self.query = nn.Linear(8, 8)
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.assigns = assigns

    def forward(self, x):
        for key, query in zip(self.key.parameters(), self.query.parameters(), strict=True):
            if self.assigns:
                key.data = 0.9 * key.data + 0.1 * query.data
            else:
                key.data.mul_(0.9).add_(query.data, alpha=0.1)
        return self.query(x) * self.key(x).sigmoid()


class SpectralVectors(nn.Module):
    """Spectral norm with its vector as a parameter that is not trained, as older code has it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.u = nn.Parameter(F.normalize(torch.randn(8), dim=0), requires_grad=False)

    def forward(self, x):
        weight = self.linear.weight
        v = F.normalize(weight.detach().T @ self.u, dim=0)
        self.u.data = F.normalize(weight.detach() @ v, dim=0)
        return F.linear(x, weight / (self.u @ weight @ v), self.linear.bias)


class PlainAttribute(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(8)

    def forward(self, x):
        y = x - self.mean
        self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        return y


class AttributeInPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.state = {"mean": torch.zeros(8)}

    def forward(self, x):
        y = x - self.state["mean"]
        self.state["mean"].lerp_(x.detach().mean(0), 0.5)
        return y


class LateAttribute(nn.Module):
    def forward(self, x):
        before = getattr(self, "mean", x.detach().mean(0))
        self.mean = 0.5 * before + 0.5 * x.detach().mean(0)
        return x - self.mean


class Queue(nn.Module):
    """A memory of earlier batches."""

    def __init__(self):
        super().__init__()
        self.queue = deque([torch.ones(8)], maxlen=1)

    def forward(self, x):
        y = x * self.queue[-1]
        self.queue.append(x.detach().std(0))
        return y


class Bank:
    def __init__(self):
        self.mean = torch.zeros(8)


class PlainObject(nn.Module):
    """Keeps its state in an object that is no module."""

    def __init__(self):
        super().__init__()
        self.bank = Bank()

    def forward(self, x):
        y = x - self.bank.mean
        self.bank.mean = 0.5 * self.bank.mean + 0.5 * x.detach().mean(0)
        return y


class ListState(nn.Module):
    def __init__(self):
        super().__init__()
        self.state = [torch.zeros(8)]

    def forward(self, x):
        y = x - self.state[0]
        self.state[0] = 0.5 * self.state[0] + 0.5 * x.detach().mean(0)
        return y


class BufferQueue(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.randn(16, 8))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        y = x + self.queue.mean(0)
        places = (self.place + torch.arange(len(x))) % 16
        self.queue[places] = x.detach()
        self.place += len(x)
        return y


class Checkpointed(nn.Module):
    """Batch norm whose activations are not kept, so that a backward forwards it once more."""

    def __init__(self, reentrant):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


class NumpyMask(nn.Module):
    def forward(self, x):
        return x * torch.from_numpy(np.random.rand(*x.shape) > 0.3)


class PythonScale(nn.Module):
    def forward(self, x):
        return x * random.uniform(0.5, 2)


class OwnGenerators(nn.Module):
    def __init__(self):
        super().__init__()
        self.numpy = {"generators": [np.random.default_rng(3), np.random.RandomState(4)]}
        self.python = random.Random(5)

    def forward(self, x):
        generator, old = self.numpy["generators"]
        return x * generator.random() * old.rand() * self.python.random()


class TorchGenerator(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def __deepcopy__(self, memo):
        twin = TorchGenerator()
        twin.generator.set_state(self.generator.get_state())
        return twin

    def forward(self, x):
        return x * torch.rand(x.shape, generator=self.generator)


class Observed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fake_quantize = torch.ao.quantization.FakeQuantize(
            torch.ao.quantization.MovingAverageMinMaxObserver, quant_min=0, quant_max=255
        )

    def forward(self, x):
        return x + self.fake_quantize(x)


class StoredFeatures(nn.Module):
    """Keeps its input for whoever looks at it later. That is no state."""

    def __init__(self):
        super().__init__()
        self.features = None

    def forward(self, x):
        self.features = x.detach()
        return x


class Scripted(nn.Module):
    def __init__(self, norm, trace=False):
        super().__init__()
        net = nn.Sequential(nn.Linear(8, 8), norm)
        self.net = torch.jit.trace(net, torch.randn(3, 8)) if trace else torch.jit.script(net)
        self.arguments = (copy.deepcopy(norm), trace)

    def __deepcopy__(self, memo):
        twin = Scripted(*self.arguments)
        twin.load_state_dict(self.state_dict())
        return twin

    def forward(self, x):
        return self.net(x)


def plain_loss(net, x, y):
    return F.cross_entropy(net(x), y, reduction="none")


def supervised_contrastive(net, x, y):
    features = F.normalize(net(x), dim=1)
    similar = features @ features.T - 1e9 * torch.eye(len(x))
    same = (y[:, None] == y).double() - torch.eye(len(x))
    return -(same * similar.log_softmax(1)).sum(1) / same.sum(1).clamp(min=1)


def sinkhorn(net, x, y):
    scores = net(x).exp()
    for _ in range(3):
        scores = scores / scores.sum(0)
        scores = scores / scores.sum(1, keepdim=True)
    return -scores.gather(1, y[:, None]).squeeze(1).log()


def over_the_batch(net, x, y):
    return plain_loss(net, x, y) / len(x)


def weighted_by_batch_counts(net, x, y):
    return plain_loss(net, x, y) / torch.bincount(y, minlength=5)[y]


def decorrelated(net, x, y):
    out = net(x)
    return F.cross_entropy(out, y, reduction="none") + 0.1 * torch.cov(out.T).square().mean()


def focal(net, x, y):
    losses = plain_loss(net, x, y)
    return (1 - (-losses).exp()) ** 2 * losses


class Case(NamedTuple):
    layer: type
    passes: str
    loss: object = plain_loss
    per_pass: bool = False


CASES = {
    # Nothing mixes.
    "identity": Case(nn.Identity, SPLIT_PASSES),
    "layer norm": Case(lambda: nn.LayerNorm(8), SPLIT_PASSES),
    "group norm": Case(lambda: nn.GroupNorm(2, 8), SPLIT_PASSES),
    "instance norm": Case(
        lambda: nn.Sequential(nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2), nn.Flatten()), SPLIT_PASSES
    ),
    "batch norm in evaluation mode": Case(lambda: nn.BatchNorm1d(8).eval(), SPLIT_PASSES),
    "batch-first attention": Case(SampleAttention, SPLIT_PASSES),
    "batch-first GRU": Case(lambda: RecurrentOverBatch(batch_first=True), SPLIT_PASSES),
    "weight norm": Case(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), SPLIT_PASSES),
    "embedding": Case(Frequencies, SPLIT_PASSES),
    "stored features": Case(StoredFeatures, SPLIT_PASSES, per_pass=True),
    "focal loss": Case(nn.Identity, SPLIT_PASSES, focal),
    "dropout": Case(lambda: nn.Dropout(0.3), SPLIT_PASSES, per_pass=True),
    "NumPy's random numbers": Case(NumpyMask, SPLIT_PASSES, per_pass=True),
    "Python's random numbers": Case(PythonScale, SPLIT_PASSES, per_pass=True),
    "generators in containers": Case(OwnGenerators, SPLIT_PASSES, per_pass=True),
    "a generator of torch": Case(TorchGenerator, SPLIT_PASSES, per_pass=True),
    "scripted layer norm": Case(lambda: Scripted(nn.LayerNorm(8)), SPLIT_PASSES),
    # Samples mix.
    "batch norm": Case(lambda: nn.BatchNorm1d(8), FULL_PASSES),
    "batch norm without statistics": Case(lambda: nn.BatchNorm1d(8, track_running_stats=False), FULL_PASSES),
    "batch norm by hand": Case(HandmadeBatchNorm, FULL_PASSES),
    "batch renorm": Case(BatchRenorm, FULL_PASSES),
    "EvoNorm": Case(EvoNormB0, FULL_PASSES),
    "sequence-first attention": Case(SequenceFirstAttention, FULL_PASSES),
    "BatchFormer": Case(BatchFormer, FULL_PASSES),
    "GRU over the batch": Case(lambda: RecurrentOverBatch(batch_first=False), FULL_PASSES),
    "minibatch deviation": Case(layer(lambda x: x * x.std(0).mean()), FULL_PASSES),
    "graph norm without a batch vector": Case(layer(lambda x: x - 0.7 * x.mean(0)), FULL_PASSES),
    "softmax over the batch": Case(layer(lambda x: x.softmax(0) * 10), FULL_PASSES),
    "neighbour": Case(layer(lambda x: x + 0.5 * x.roll(1, 0)), FULL_PASSES),
    "largest of the batch": Case(layer(lambda x: x / x.abs().amax()), FULL_PASSES),
    "batch norm with dropout": Case(lambda: nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.3)), FULL_PASSES),
    "capacity by batch": Case(Capacity, FULL_PASSES),
    "scale_grad_by_freq": Case(lambda: Frequencies(scale_grad_by_freq=True), FULL_PASSES),
    "supervised contrastive loss": Case(nn.Identity, FULL_PASSES, supervised_contrastive),
    "Sinkhorn loss": Case(nn.Identity, FULL_PASSES, sinkhorn),
    "loss over the batch": Case(nn.Identity, FULL_PASSES, over_the_batch),
    "loss by counts of the batch": Case(nn.Identity, FULL_PASSES, weighted_by_batch_counts),
    "decorrelation": Case(nn.Identity, FULL_PASSES, decorrelated),
    "scripted batch norm": Case(lambda: Scripted(nn.BatchNorm1d(8)), FULL_PASSES),
    "scripted batch norm without statistics": Case(
        lambda: Scripted(nn.BatchNorm1d(8, track_running_stats=False)), FULL_PASSES
    ),
    "traced batch norm": Case(lambda: Scripted(nn.BatchNorm1d(8), trace=True), FULL_PASSES),
    # A forward moves something.
    "spectral norm": Case(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), FULL_PASSES),
    "older spectral norm": Case(lambda: nn.utils.spectral_norm(nn.Linear(8, 8)), FULL_PASSES),
    "spectral norm with a parameter": Case(SpectralVectors, FULL_PASSES),
    "vector quantization": Case(VectorQuantizer, FULL_PASSES),
    "instance norm with statistics": Case(
        lambda: nn.Sequential(nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten()),
        FULL_PASSES,
    ),
    "observer": Case(Observed, FULL_PASSES),
    "rebound buffer": Case(ReboundBuffer, FULL_PASSES),
    "momentum encoder in place": Case(lambda: Momentum(assigns=False), FULL_PASSES),
    "momentum encoder by assignment": Case(lambda: Momentum(assigns=True), FULL_PASSES),
    "plain attribute": Case(PlainAttribute, FULL_PASSES),
    "attribute in place": Case(AttributeInPlace, FULL_PASSES),
    "attribute from the first forward": Case(LateAttribute, FULL_PASSES),
    "object": Case(PlainObject, FULL_PASSES),
    "list": Case(ListState, FULL_PASSES),
    "queue": Case(Queue, FULL_PASSES),
    "queue of buffers": Case(BufferQueue, FULL_PASSES),
    "checkpointed batch norm": Case(lambda: Checkpointed(reentrant=False), FULL_PASSES),
    "reentrant checkpoint": Case(lambda: Checkpointed(reentrant=True), FULL_PASSES),
}


class Net(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(8, 8), inner, nn.Linear(8, 5)

    def forward(self, x):
        return self.last(self.inner(self.first(x)))


def trained(net):
    return [p for p in net.parameters() if p.requires_grad]


def random_states():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def set_random_states(states):
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])


def naive_step(net, loss, terms, x, y):
    """The gradient of every term from a copy of the model as it is before the step; then one forward of the model."""
    clean, states = [p.detach().clone() for p in trained(net)], random_states()
    total = [torch.zeros_like(p) for p in clean]

    def gradient(weights, values):
        twin = copy.deepcopy(net)
        set_random_states(states)
        params = trained(twin)
        with torch.no_grad():
            for p, value in zip(params, values, strict=True):
                p.copy_(value)
                p.grad = torch.zeros_like(p)
        (weights * loss(twin, x, y)).sum().backward()
        return [p.grad for p in params]

    for weights, rho, *_ in terms:
        g = gradient(weights, clean)
        norm = torch.sqrt(sum((part**2).sum() for part in g))
        if rho > 0 and norm > 0:
            g = gradient(weights, [w + rho * part / norm for w, part in zip(clean, g, strict=True)])
        total = [t + part for t, part in zip(total, g, strict=True)]
    set_random_states(states)
    with torch.no_grad():
        loss(net, x, y)
    return total


def engine_step(engine, net, loss, terms, x, y, passes):
    sizes = []

    def sample_losses(index, is_clean):
        chosen = slice(None) if index is None else index
        sizes.append((is_clean, len(x[chosen])))
        return loss(net, x[chosen], y[chosen])

    outcome = engine.compute([MicroBatch(sample_losses, terms)], net.parameters(), net, passes=passes)
    return outcome, [size for is_clean, size in sizes if is_clean]


def held_tensors(net):
    """Parameters, buffers, and the tensors in attributes, also in dictionaries and deques there."""
    yield from net.state_dict().items()
    for path, part in net.named_modules():
        for name, value in vars(part).items():
            inside = value.values() if isinstance(value, dict) else value if isinstance(value, deque) else [value]
            if not name.startswith("_"):
                yield from ((f"{path}.{name}", item) for item in inside if isinstance(item, torch.Tensor))


def assert_same_state(net, twin):
    for (name, value), (_, expected) in zip(held_tensors(net), held_tensors(twin), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12, msg=name)


def train(net, loss, passes, exact=True, thaw=None):
    """Step the engine and the naive twin side by side, in both stages. Return the clean passes and notes of each step.

    With ``exact=False`` (split passes that draw random numbers, or store a group's features), only the engine runs.
    """
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    twin, engine, seen, notes = copy.deepcopy(net), SharpnessEngine(), [], []
    for number in range(4):
        if thaw is not None and number == 2:
            thaw(net)
            thaw(twin)
        x, y = torch.randn(12, 8), torch.tensor([0, 1, 2, 3, 4, 0, 0, 1, 1, 2, 3, 0])
        objective = SSESAM(SPLIT, 0.2, 0.4)
        objective.stage = 1 + number % 2
        terms, before = objective.terms(y), random_states()
        outcome, sizes = engine_step(engine, net, loss, terms, x, y, passes)
        seen.append(sizes)
        notes.append(outcome.note)
        if exact:
            after = random_states()
            set_random_states(before)
            expected = naive_step(twin, loss, terms, x, y)
            for p, gradient in zip(trained(net), expected, strict=True):
                torch.testing.assert_close(p.grad, gradient, rtol=0, atol=1e-13)
            assert_same_state(net, twin)
            assert str(after) == str(random_states())
        with torch.no_grad():
            for p, q in zip(trained(net), trained(twin), strict=True):
                p -= 0.1 * p.grad
                q.copy_(p)
    return seen, notes


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad", "ignore::DeprecationWarning")
@pytest.mark.parametrize("passes", ["auto", "full"])
@pytest.mark.parametrize("name", CASES)
def test_layers_and_losses(name, passes, float64):
    case = CASES[name]
    takes_split = passes == "auto" and case.passes == SPLIT_PASSES
    seen, notes = train(Net(case.layer()), case.loss, passes, exact=not (takes_split and case.per_pass))
    # Nine samples of the head and three of the tail, or all in one pass.
    assert seen == [[9, 3] if takes_split else [12]] * 4
    assert [note is not None for note in notes] == [passes == "auto" and not takes_split, False, False, False]


def thaw_norm(net):
    net.inner.train()


@pytest.mark.parametrize("passes", ["auto", "full"])
@pytest.mark.parametrize(
    ("make", "freeze", "thaw"),
    [
        (lambda: nn.BatchNorm1d(8), lambda net: net.inner.eval(), thaw_norm),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), lambda net: net.inner.eval(), thaw_norm),
        (lambda: nn.Sequential(nn.BatchNorm1d(8), HandmadeBatchNorm()), lambda net: net.inner.eval(), thaw_norm),
        (EvalIsPlain, lambda net: net.inner.eval(), thaw_norm),
        (nn.Identity, lambda net: net.inner.eval(), lambda net: setattr(net, "inner", HandmadeBatchNorm())),
    ],
    ids=["batch norm", "spectral norm", "mixing all along", "mixing in training mode", "replaced layer"],
)
def test_thawed_late(make, freeze, thaw, passes, float64):
    """A change of the modes, or of the layers, is measured anew."""
    net = Net(make())
    freeze(net)
    mixes_at_once = isinstance(net.inner, nn.Sequential)
    seen, notes = train(net, plain_loss, passes, thaw=thaw)
    first = [12] if passes == "full" or mixes_at_once else [9, 3]
    assert seen == [first, first, [12], [12]]
    if passes == "auto":
        assert [note is not None for note in notes] == [mixes_at_once, False, True, False]


def test_buffer_that_begins_to_move(float64):
    """It is seen by the buffer's version, after a step with split passes."""

    class Later(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.moves = False

        def forward(self, x):
            self.seen += self.moves
            return x

    def start(net):
        net.inner.moves = True

    class Rebinds(Later):
        def forward(self, x):
            if self.moves:
                self.seen = self.seen + 1
            return x

    for make in (Rebinds, Later):
        seen, notes = train(Net(make()), plain_loss, "auto", exact=False, thaw=start)
        if make is Rebinds:
            assert seen == [[9, 3], [9, 3], [9, 3], [12]]
            assert notes == [None, None, "a forward has changed a buffer", None]
        else:
            # An addition of nothing is a change as well.
            assert seen == [[9, 3], [12], [12], [12]]


def test_measuring_leaves_no_trace(float64):
    """The first step is that of split passes, to the last bit, and draws the same random numbers."""
    results = []
    for passes in ("auto", "split"):
        torch.manual_seed(2)
        net, x, y = Net(nn.Dropout(0.3)), torch.randn(12, 8), torch.tensor([0, 1, 2, 3, 4, 0, 0, 1, 1, 2, 3, 0])
        engine_step(SharpnessEngine(), net, plain_loss, SSESAM(SPLIT).terms(y), x, y, passes)
        results.append([*(p.grad for p in net.parameters()), torch.get_rng_state()])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_measuring_costs_forwards_once(float64):
    """The whole batch, and for each group the batch of its copies and the group alone."""
    sizes, net = [], Net(nn.Identity())
    net.inner.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    train(net, plain_loss, "auto", exact=False)
    stages = [[9, 3, 9, 3], [9, 3, 3]] * 2
    assert sizes == [12, 12, 9, 12, 3, *stages[0], *stages[1], *stages[2], *stages[3]]


def test_samples_that_cannot_be_picked(float64):
    net, x, y = Net(nn.Identity()), torch.randn(5, 8), torch.tensor([0, 1, 2, 3, 4])

    def sample_losses(index, is_clean):
        if index is not None:
            raise TypeError("no rows")
        return plain_loss(net, x, y)

    engine = SharpnessEngine()
    outcome = engine.compute([MicroBatch(sample_losses, SSESAM(SPLIT).terms(y))], net.parameters(), net, passes="auto")
    assert outcome.note == "samples cannot be picked from the batch (no rows)"


def test_table_of_the_documentation():
    """It names every case, with the passes that are tested."""
    page = (Path(__file__).parents[1] / "docs" / "batches_and_modules.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ") and "; " in line]
    rows += [["", "batch norm in evaluation mode", "split passes"]]
    listed = {name: passes for _, names, passes in rows for name in names.split("; ")}
    assert listed == {name: f"{case.passes} passes" for name, case in CASES.items()}


class Backbone(Model):
    """A backbone with batch norm that is thawed in the second epoch, under a layer by hand in which samples mix."""

    def __init__(self, *args, mixes):
        super().__init__(nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 5)), *args)
        self.mixes = mixes

    def on_train_batch_start(self, batch, batch_idx):
        self.net[0].train(self.current_epoch > 0 and not self.mixes)

    def sample_losses(self, batch):
        losses = super().sample_losses(batch)
        return losses + self.mixes * losses.mean()


@pytest.mark.parametrize("mixes", [False, True])
def test_in_a_training(mixes, float64, caplog):
    """`auto` ends with the weights of `full`, and says once why it forwards whole batches."""
    torch.manual_seed(0)
    start, data = Backbone(SSESAM(SPLIT, 0.1, 0.2), mixes=mixes), batches()
    models = [copy.deepcopy(start) for _ in range(2)]
    for model, passes in zip(models, ("auto", "full"), strict=True):
        choose(model, passes=passes)
        with caplog.at_level("INFO"):
            fit(model, data, max_epochs=2)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=1e-13)
    said = [record.getMessage() for record in caplog.records if "passes='auto'" in record.getMessage()]
    reason = "the loss of a sample depends on the other samples of the batch."
    assert said == [f"`passes='auto'` forwards the whole batch in every pass: {reason}"] * mixes


@pytest.mark.parametrize("passes", ["auto", "full"])
@pytest.mark.parametrize("exists", [True, False])
def test_message_of_the_clean_pass(passes, exists, float64):
    """What only the clean pass writes is for the perturbed passes to read, and is not put back."""
    net, x, y = Net(nn.Identity()), torch.randn(12, 8), torch.arange(12) % 5
    weights, read = torch.linspace(0.5, 1.5, 12), []
    if exists:
        net.message = torch.zeros(12)

    def sample_losses(index, is_clean):
        chosen = slice(None) if index is None else index
        if is_clean:
            net.message = weights.clone()
        read.append(net.message[chosen].clone())
        return net.message[chosen] * plain_loss(net, x[chosen], y[chosen])

    outcome = SharpnessEngine().compute(
        [MicroBatch(sample_losses, SSESAM(SPLIT).terms(y))], net.parameters(), net, passes=passes
    )
    if passes == "auto" and not exists:
        assert outcome.note.startswith("a forward outside of the clean pass fails ('Net' object has no attribute")
    used = read[1:] if exists and passes == "auto" else read
    assert sum(map(torch.sum, used[-2:])) == weights.sum() * (1 if outcome.note is None and passes == "auto" else 2)
    assert torch.equal(net.message, weights)


def test_step_that_fails_finds_out_nothing(float64):
    net, (x, y), engine = Net(nn.Identity()), (torch.randn(12, 8), torch.arange(12) % 5), SharpnessEngine()

    def step(fault):
        def sample_losses(index, is_clean):
            if fault:
                raise ConnectionError("injected")
            return plain_loss(net, x if index is None else x[index], y if index is None else y[index])

        batch = [MicroBatch(sample_losses, SSESAM(SPLIT).terms(y))]
        return engine.compute(batch, net.parameters(), net, passes="auto").note

    with pytest.raises(ConnectionError):
        step(fault=True)
    assert step(fault=False) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("make", [nn.Identity, HandmadeBatchNorm])
def test_first_batch_that_is_not_finite_decides_nothing(make, value, float64):
    """It takes full passes, and the next batch is measured."""
    net, engine, seen, notes = Net(make()), SharpnessEngine(), [], []
    for first in (value, 0.0):
        x, y = torch.randn(12, 8), torch.tensor([0, 1, 2, 3, 4, 0, 0, 1, 1, 2, 3, 0])
        x[3, 0] += first
        outcome, sizes = engine_step(engine, net, plain_loss, SSESAM(SPLIT).terms(y), x, y, "auto")
        seen.append(sizes)
        notes.append(outcome.note)
    mixes = make is HandmadeBatchNorm
    assert seen == [[12], [12] if mixes else [9, 3]]
    assert notes == [None, "the loss of a sample depends on the other samples of the batch" if mixes else None]
