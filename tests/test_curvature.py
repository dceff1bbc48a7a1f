"""Curvature per group: against dense Hessians, planted saddles and plain definitions."""

import copy
import gc
import math
import random
import warnings
import weakref
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SPLIT, Model, assert_same_bits, batches, convbn, mlp
from scipy.integrate import trapezoid
from scipy.sparse.linalg import eigsh
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_ssesam import ClassSplit
from lightning_ssesam.curvature import (
    CurvatureSettings,
    Hessian,
    SpectralDensity,
    estimate_trace,
    extreme_eigenvalues,
    group_masks,
    measure_curvature,
    sharpness,
    spectral_density,
)
from lightning_ssesam.curvature.lanczos import Lanczos, find_ends
from lightning_ssesam.errors import ArgumentError, NonFiniteError

TAIL, HEAD = SPLIT.tail, SPLIT.head


def losses_of(net, batch):
    inputs, targets = batch
    return F.cross_entropy(net(inputs), targets, reduction="none")


def group_norm():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)
    )


class Attention(nn.Module):
    """Tokens to classes: an embedding, whose rows are partly unused, and a transformer's layer."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(12, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True, activation="gelu")
        self.head = nn.Linear(4, 5)

    def forward(self, tokens):
        return self.head(self.layer(self.tokens(tokens)).mean(1))


def used(net):
    """A batch norm with statistics of its own."""
    net.train()
    for _ in range(3):
        net(2 * torch.randn(24, 3, 5, 5) + 1)
    return net


def token_batches():
    return [(torch.randint(10, (32, 6)), targets) for _, targets in batches(1, 32)]


NETWORKS = {
    "mlp": (mlp, lambda: batches(2, 16)),
    "group norm": (group_norm, lambda: batches(2, 16, (3, 5, 5))),
    "batch norm": (lambda: used(convbn()), lambda: batches(2, 16, (3, 5, 5))),
    "attention and embedding": (Attention, token_batches),
}


def dense_hessian(net, data, classes, loss=losses_of):
    """The definition: all derivatives of the mean loss of some classes, in float64."""
    net = copy.deepcopy(net).double().eval()
    inputs, targets = (torch.cat(parts) for parts in zip(*data, strict=True))
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    chosen = classes[targets]
    named = dict(net.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def mean_loss(flat):
        parts = (part.view_as(p) for part, p in zip(flat.split(sizes), named.values(), strict=True))
        values = dict(zip(named, parts, strict=True))
        batch = inputs[chosen], targets[chosen]
        return loss(lambda x: functional_call(net, values, (x,)), batch).mean()

    flat = torch.cat([p.detach().flatten() for p in named.values()])
    # The attention's fused kernel and group norm have no forward derivatives.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        if isinstance(net, nn.Sequential) and not any(isinstance(layer, nn.GroupNorm) for layer in net):
            return torch.func.hessian(mean_loss)(flat)
        return torch.autograd.functional.hessian(mean_loss, flat, vectorize=True)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("classes", [HEAD, TAIL], ids=["head", "tail"])
def test_against_the_dense_hessian(name, classes):
    make_net, make_data = NETWORKS[name]
    net, data = make_net(), make_data()
    dense = dense_hessian(net, data, classes)
    hessian = Hessian(net, data, losses_of, classes, dtype=torch.float64)
    assert hessian.shape == dense.shape
    vectors = torch.randn(len(dense), 3, dtype=torch.float64)
    torch.testing.assert_close(hessian @ vectors, dense @ vectors, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(hessian @ vectors[:, 0], dense @ vectors[:, 0], rtol=1e-10, atol=1e-12)
    exact, exact_vectors = torch.linalg.eigh(dense)
    ends, iteration = find_ends(hessian, tolerance=1e-6)
    assert ends.converged
    assert ends.smallest == pytest.approx(exact[0].item(), rel=1e-6)
    assert ends.largest == pytest.approx(exact[-1].item(), rel=1e-6)
    for vector, true in zip(ends.vectors, (exact_vectors[:, 0], exact_vectors[:, -1]), strict=True):
        assert abs(float(vector @ true)) == pytest.approx(1, abs=1e-6)
    trace = estimate_trace(hessian, samples=100, known=iteration)
    assert abs(trace.value - dense.trace().item()) < 4 * trace.standard_error + 1e-9
    assert trace.standard_error < estimate_trace(dense, samples=100).standard_error
    density = spectral_density(hessian, probes=10, steps=15)
    width = 0.05 * (ends.largest - ends.smallest)
    grid = np.linspace(ends.smallest - 2 * width, ends.largest + 2 * width, 50)
    assert density(grid, width) == pytest.approx(smoothed(exact, grid, width), abs=0.2 / width / 2.5)


def smoothed(eigenvalues, grid, width):
    bells = np.exp(-0.5 * ((grid[:, None] - eigenvalues.numpy()) / width) ** 2) / (width * math.sqrt(2 * math.pi))
    return bells.mean(1)


def test_as_a_user_would():
    net, data = mlp(), batches(1, 96)
    model = Model(net)
    measured = measure_curvature(
        model, data, SPLIT, ["head", "tail", "all", "class_3"], tolerance=1e-5, rho=0.1, probes=8
    )
    for name, classes in {"head": HEAD, "tail": TAIL, "all": HEAD | TAIL, "class_3": torch.arange(5) == 3}.items():
        curvature, exact = measured[name], torch.linalg.eigvalsh(dense_hessian(net, data, classes))
        inputs, targets = (torch.cat(parts) for parts in zip(*data, strict=True))
        chosen = classes[targets]
        assert curvature.samples == chosen.sum()
        twin = copy.deepcopy(net)
        loss = losses_of(twin, (inputs[chosen], targets[chosen])).mean()
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in twin.parameters()])
        with torch.no_grad():
            for p in twin.parameters():
                p += 0.1 * p.grad / gradient.norm()
            rise = losses_of(twin, (inputs[chosen], targets[chosen])).mean() - loss
        numbers = curvature.numbers()
        assert numbers["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert numbers["gradient_norm"] == pytest.approx(gradient.norm().item(), rel=1e-4)
        assert numbers["sharpness"] == pytest.approx(rise.item(), rel=1e-3)
        assert numbers["largest"] == pytest.approx(exact[-1].item(), rel=1e-4)
        assert numbers["smallest"] == pytest.approx(exact[0].item(), rel=1e-4)
        assert numbers["ratio"] == pytest.approx(-(exact[0] / exact[-1]).item(), rel=2e-4)
        assert abs(numbers["trace"] - exact.sum().item()) < 4 * numbers["trace_error"] + 1e-4
        below = -0.01 * exact.abs().max()
        assert numbers["negative_share"] == pytest.approx((exact < below).double().mean().item(), abs=0.1)
        assert numbers["converged"] == 1


class Planted(nn.Module):
    """A head loss that is a bowl, and a tail loss with a direction of curvature -3."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(6))

    def sample_losses(self, batch):
        _, targets = batch
        head = 0.5 * (torch.tensor([5.0, 4, 3, 2, 1, 0.5]) * self.w**2).sum()
        tail = 0.5 * (torch.tensor([2.0, 1, 1, 1, 1, -3]) * self.w**2).sum()
        return torch.where(targets == 1, tail, head)

    def sample_targets(self, batch):
        return batch[1]


def test_a_planted_saddle_is_found_in_its_group_only():
    split = ClassSplit([9, 2], tail=[1])
    data = [(torch.zeros(11), torch.tensor([0] * 9 + [1] * 2))]
    measured = measure_curvature(Planted(), data, split, tolerance=1e-5, dtype=torch.float64)
    ends = {name: curvature.eigenvalues for name, curvature in measured.items()}
    assert (ends["head"].smallest, ends["head"].largest) == pytest.approx((0.5, 5))
    assert (ends["tail"].smallest, ends["tail"].largest) == pytest.approx((-3, 2))
    assert ends["tail"].ratio == pytest.approx(1.5)
    # The mean over all samples hides it.
    assert ends["all"].smallest == pytest.approx((9 * 0.5 - 2 * 3) / 11)
    assert abs(ends["tail"].vectors[0][5].item()) == pytest.approx(1)
    assert measured["tail"].numbers()["negative_share"] > 0
    assert measured["head"].numbers()["negative_share"] == 0


def state_of(net):
    tensors = [t.clone() for t in net.state_dict().values()]
    gradients = [p.grad if p.grad is None else p.grad.clone() for p in net.parameters()]
    return tensors, gradients, [layer.training for layer in net.modules()]


@pytest.mark.parametrize("batch_norm", ["eval", "batch"])
def test_everything_is_left_as_it_was(batch_norm):
    net = convbn()
    net[1].eval()
    data = DataLoader(batches(6, shape=(3, 5, 5)), batch_size=None, shuffle=True)
    losses_of(net, next(iter(data))).mean().backward()
    tensors, gradients, modes = state_of(net)
    generators = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    measure_curvature(net, data, SPLIT, sample_losses=losses_of, batch_norm=batch_norm, max_iterations=3)
    assert torch.get_rng_state().equal(generators[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == generators[1:]
    after = state_of(net)
    assert_same_bits(after[0], tensors)
    assert_same_bits(after[1], gradients)
    assert after[2] == modes
    for p in net.parameters():
        assert p.requires_grad


def test_statistics_of_the_batch():
    """In training mode the whole batch is forwarded, whatever the group."""
    net, data = used(convbn()), batches(2, shape=(3, 5, 5))
    hessian = Hessian(net, data, losses_of, TAIL, torch.float64, batch_norm="batch")
    twin = copy.deepcopy(net).double().train()
    total = 0.0
    for inputs, targets in data:
        total = total + (losses_of(twin, (inputs.double(), targets)) * TAIL[targets]).sum()
    loss = total / sum(int(TAIL[targets].sum()) for _, targets in data)
    gradient = torch.autograd.grad(loss, list(twin.parameters()), create_graph=True)
    vector = torch.randn(hessian.shape[0], dtype=torch.float64)
    flat = torch.cat([g.flatten() for g in gradient])
    product = torch.cat([g.flatten() for g in torch.autograd.grad(flat @ vector, list(twin.parameters()))])
    assert hessian.loss() == pytest.approx(loss.item())
    torch.testing.assert_close(hessian @ vector, product)
    # Without running statistics it is like that in evaluation mode, too.
    net[1].running_mean = net[1].running_var = None
    torch.testing.assert_close(Hessian(net, data, losses_of, TAIL, torch.float64) @ vector, product)


def test_only_the_samples_of_the_group_are_forwarded_once_a_product():
    net, data, seen = mlp(), batches(5), []

    def spied(net, batch):
        seen.append(len(batch[1]))
        assert TAIL[batch[1]].all()
        return losses_of(net, batch)

    hessian = Hessian(net, data, spied, TAIL)
    number = int(sum(TAIL[targets].sum() for _, targets in data))
    assert hessian.weight == number
    for _ in range(2):
        seen.clear()
        hessian @ torch.randn(hessian.shape[0], 4)
        assert sum(seen) == number
    seen.clear()
    ends = extreme_eigenvalues(hessian, max_iterations=7, tolerance=1e-9)
    assert sum(seen) == 7 * number
    assert (ends.iterations, ends.converged) == (7, False)


class Marked(torch.autograd.Function):
    """Does nothing, but that one can tell whether its graph is alive."""

    alive: ClassVar = weakref.WeakSet()

    @staticmethod
    def forward(ctx, losses):
        ctx.mark = nn.Identity()
        Marked.alive.add(ctx.mark)
        return losses.view_as(losses)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_one_batch_is_held_at_a_time():
    held = []

    def spied(net, batch):
        held.append(len(Marked.alive))
        return Marked.apply(losses_of(net, batch))

    hessian = Hessian(mlp(), batches(4), spied)
    hessian.gradient()
    hessian @ torch.randn(hessian.shape[0], 2)
    hessian.loss(at=torch.zeros(hessian.shape[0]))
    assert held == [0] * 12


@pytest.mark.parametrize("parts", [1, 3, 24])
def test_the_cut_into_batches_does_not_matter(parts):
    net, (batch,) = mlp(), batches(1)
    cut = list(zip(*(tensor.chunk(parts) for tensor in batch), strict=True))
    vector = torch.randn(sum(p.numel() for p in net.parameters()), dtype=torch.float64)
    products = [Hessian(net, data, losses_of, TAIL, torch.float64) @ vector for data in ([batch], cut)]
    torch.testing.assert_close(*products)


def test_batches_and_targets_of_other_forms():
    net, (pair,) = mlp(), batches(1)
    inputs, targets = pair
    vector = torch.randn(sum(p.numel() for p in net.parameters()), dtype=torch.float64)
    expected = Hessian(net, [pair], losses_of, TAIL, torch.float64) @ vector

    def of_mapping(net, batch):
        return F.cross_entropy(net(batch["x"]), batch["label"], reduction="none")

    mapped = Hessian(net, [{"x": inputs, "label": targets}], of_mapping, TAIL, torch.float64)
    torch.testing.assert_close(mapped @ vector, expected)
    soft = [(inputs, F.one_hot(targets, 5).float())]
    torch.testing.assert_close(Hessian(net, soft, losses_of, TAIL, torch.float64) @ vector, expected)

    def dense(net, batch):
        return torch.stack([losses_of(net, (batch[0], batch[1][:, k])) for k in (0, 1)], 1)

    twice = [(inputs, torch.stack([targets, targets.flip(0)], 1))]
    flipped = Hessian(net, [(inputs, targets.flip(0))], losses_of, TAIL, torch.float64) @ vector
    hessian = Hessian(net, twice, dense, TAIL, torch.float64)
    assert hessian.weight == 2 * TAIL[targets].sum()
    torch.testing.assert_close(hessian @ vector, (expected + flipped) / 2)


def test_mixed_targets_count_with_their_mass():
    net, (inputs, _) = mlp(), batches(1)[0]
    targets = torch.rand(24, 5).softmax(1)
    hessian = Hessian(net, [(inputs, targets)], losses_of, TAIL)
    mass = targets[:, 3:].sum(1)
    losses = losses_of(net, (inputs, targets))
    assert hessian.weight == pytest.approx(mass.sum().item())
    assert hessian.loss() == pytest.approx(((losses * mass).sum() / mass.sum()).item())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(8, 5).requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.second(self.first(x).tanh()).tanh())


def test_tied_and_frozen_weights():
    net, data = Tied(), batches(2)
    hessian = Hessian(net, data, losses_of, dtype=torch.float64)
    assert hessian.shape == (64, 64)
    dense = hessian @ torch.eye(64, dtype=torch.float64)
    torch.testing.assert_close(dense, dense.T)
    start, step = hessian.loss(), 1e-4 * torch.randn(64, dtype=torch.float64)
    rise = hessian.loss(at=step) + hessian.loss(at=-step) - 2 * start
    assert rise == pytest.approx(float(step @ dense @ step), rel=1e-3)


def test_dtype_by_its_name():
    net, data = mlp(), batches(1)
    expected = Hessian(net, data, losses_of, dtype=torch.float64).gradient()
    assert Hessian(net, data, losses_of, dtype="float64").gradient().equal(expected)
    measured = measure_curvature(net, data, SPLIT, ["all"], losses_of, dtype="float64", max_iterations=1)
    assert measured["all"].gradient_norm == pytest.approx(expected.norm().item(), rel=1e-12)


def test_low_precision_is_measured_in_float32():
    net, data = mlp().bfloat16(), batches(2)
    hessian = Hessian(net, data, losses_of)
    assert hessian.dtype == torch.float32
    torch.testing.assert_close(
        hessian @ torch.eye(hessian.shape[0]), Hessian(net.float(), data, losses_of) @ torch.eye(hessian.shape[0])
    )


def test_under_autocast_and_without_gradients():
    net, data = mlp(), batches(2)
    vector = torch.randn(sum(p.numel() for p in net.parameters()))
    expected = Hessian(net, data, losses_of) @ vector
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert (Hessian(net, data, losses_of) @ vector).equal(expected)


def test_compiled_networks():
    net, data = mlp(), batches(2)
    compiled = torch.compile(net, backend="aot_eager")
    vector = torch.randn(sum(p.numel() for p in net.parameters()))
    expected = Hessian(net, data, losses_of) @ vector
    torch.testing.assert_close(Hessian(compiled, data, losses_of) @ vector, expected)
    compiled_losses = torch.compile(losses_of, backend="aot_eager")
    torch.testing.assert_close(Hessian(net, data, compiled_losses) @ vector, expected)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6)), nn.Linear(6, 5)

    def forward(self, x):
        return self.last(checkpoint(self.first, x, use_reentrant=False).tanh())


class Recurrent(nn.Module):
    """Makes its initial state anew, in PyTorch's default type."""

    def __init__(self):
        super().__init__()
        self.cells, self.last = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 5)

    def forward(self, x):
        state = torch.zeros(1, len(x), 4), torch.zeros(1, len(x), 4)
        return self.last(self.cells(x.view(-1, 4, 2), state)[0][:, -1])


@pytest.mark.parametrize(
    "make_net",
    [
        Checkpointed,
        Recurrent,
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 6)), nn.Tanh(), nn.Linear(6, 5)),
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 6)), nn.Tanh(), nn.Linear(6, 5)),
    ],
    ids=["checkpointed", "recurrent", "weight norm", "spectral norm"],
)
def test_against_differences_of_gradients(make_net):
    hessian = Hessian(make_net(), batches(2), losses_of, TAIL, torch.float64)
    vector, other = torch.randn(2, hessian.shape[0], dtype=torch.float64)
    step, base = 1e-3 * vector, hessian.loss()
    rise = (hessian.loss(at=step) + hessian.loss(at=-step) - 2 * base) / 1e-6
    assert float(vector @ (hessian @ vector)) == pytest.approx(rise, rel=1e-3, abs=1e-6)
    assert float(other @ (hessian @ vector)) == pytest.approx(float(vector @ (hessian @ other)), rel=1e-9)


class Watching(TorchFunctionMode):
    """Stands in for a GPU: notes for which functions cuDNN is switched on."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        self.seen.setdefault(name, set()).add(torch.backends.cudnn.enabled)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: nn.LSTM(2, 4, num_layers=2, batch_first=True), "lstm"),
        (lambda: nn.LSTM(2, 4, proj_size=3, bidirectional=True, batch_first=True), "lstm"),
        (lambda: nn.GRU(2, 4, bidirectional=True, batch_first=True), "gru"),
        (lambda: nn.RNN(2, 4, batch_first=True), "rnn_tanh"),
        (lambda: nn.RNN(2, 4, nonlinearity="relu", batch_first=True), "rnn_relu"),
    ],
)
def test_recurrent_layers_are_computed_without_cudnn(make, name):
    """It has no second derivatives, and no first ones in evaluation mode. Other layers keep it."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.cells, self.last = nn.Conv1d(4, 4, 1), make(), nn.LazyLinear(5)

        def forward(self, x):
            return self.last(self.cells(self.conv(x.view(-1, 4, 2)))[0][:, -1])

    net = Net()
    net(torch.zeros(1, 8))
    with Watching() as watching:
        hessian = Hessian(net, batches(1), losses_of)
        hessian @ torch.ones(hessian.shape[0])
        hessian.loss(at=torch.zeros(hessian.shape[0]))
    assert watching.seen[name] == {False}
    assert watching.seen["conv1d"] == {True}
    assert torch.backends.cudnn.enabled


class Padded(nn.Module):
    """Means over padding too, which PyTorch's fast path for evaluation sets to 0."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        self.layers, self.last = nn.TransformerEncoder(layer, 1), nn.Linear(8, 5)

    def forward(self, x):
        padding = torch.arange(3).expand(len(x), 3) >= torch.arange(1, len(x) + 1).clamp(max=3).view(-1, 1)
        return self.last(self.layers(x.unsqueeze(1).expand(-1, 3, -1), src_key_padding_mask=padding).mean(1))


def test_losses_with_and_without_derivatives_are_the_same():
    hessian = Hessian(Padded(), batches(1), losses_of)
    assert hessian.loss(at=torch.zeros(hessian.shape[0])) == pytest.approx(hessian.loss(), rel=1e-6)
    assert torch.backends.mha.get_fastpath_enabled()


class Merging(nn.Linear):
    """Like LoRA's layers: `eval()` puts what is beside the weight into it."""

    def train(self, mode=True):
        if mode != self.training:
            self.weight.data += -1 if mode else 1
        return super().train(mode)


def test_a_model_that_changes_with_its_mode_is_left_as_it_was():
    net = Merging(8, 5)
    before = net.weight.detach().clone()
    Hessian(net, batches(1), losses_of).loss()
    assert net.training
    assert net.weight.equal(before)


class Scaled(nn.Module):
    """Losses with a parameter of their own, which is not the model's."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, net, batch):
        return self.scale * losses_of(net, batch)


def test_losses_with_parameters():
    net, data = mlp(), batches(2)
    hessian = Hessian(net, data, Scaled(), dtype=torch.float64)
    expected = 2 * Hessian(net, data, losses_of, dtype=torch.float64).gradient()
    torch.testing.assert_close(hessian.gradient(), expected)


def test_empty_batches_do_not_count():
    net, data, empty = mlp(), batches(1), (torch.empty(0, 8), torch.empty(0, dtype=torch.int64))
    for classes in (None, TAIL):
        assert Hessian(net, [empty, *data], losses_of, classes).loss() == Hessian(net, data, losses_of, classes).loss()


def test_the_order_of_the_samples_does_not_matter():
    """Of mixed targets, whose masses add up to another float in another order."""
    inputs, targets = torch.randn(60, 8), torch.rand(60, 5, dtype=torch.float64).softmax(1)
    generator = torch.Generator()
    loader = DataLoader(TensorDataset(inputs, targets), 7, shuffle=True, generator=generator)
    hessian = Hessian(mlp(), loader, losses_of, TAIL)
    for _ in range(20):
        hessian @ torch.ones(hessian.shape[0])


def test_one_iteration_is_kept_at_a_time():
    """Its vectors are what takes memory."""
    kept = []

    def spied(net, batch):
        kept.append(sum(type(thing) is Lanczos for thing in gc.get_objects()))
        return losses_of(net, batch)

    measure_curvature(mlp(), batches(1), SPLIT, ["head", "tail"], spied, max_iterations=2, probes=3, trace_samples=1)
    assert max(kept) == 1


def test_a_seed_decides_everything():
    net = nn.Sequential(mlp(), nn.Dropout(0.5))
    loader = DataLoader(TensorDataset(torch.randn(60, 8), torch.arange(60) % 5), 16, shuffle=True)
    measured = []
    for seed in (1, 1, 2):
        torch.rand(3)
        (curvature,) = measure_curvature(
            net, loader, SPLIT, ["tail"], losses_of, probes=2, seed=seed, tolerance=1e-3
        ).values()
        measured.append((curvature.numbers(), [nodes.tolist() for nodes in curvature.density.nodes]))
    assert measured[0] == measured[1]
    assert measured[0][1][0] != measured[0][1][1]
    assert measured[0][0] != measured[2][0]
    for name in ("largest", "smallest"):
        assert measured[0][0][name] == pytest.approx(measured[2][0][name], rel=2e-3)


def test_augmented_data_is_the_same_in_every_pass():
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, index):
            return torch.randn(8) + np.random.rand() + random.random(), index % 5

    hessian = Hessian(mlp(), DataLoader(Noisy(), 8), losses_of)
    identity = torch.eye(hessian.shape[0])
    dense = hessian @ identity
    assert dense.equal(hessian @ identity)
    torch.testing.assert_close(dense, dense.T, rtol=1e-4, atol=1e-5)


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"sample_losses": None}, "`sample_losses` to be a function of the model and a batch"),
            ({"batches": iter([1])}, "`batches` to be an iterable that can be iterated again"),
            ({"classes": [3, 4]}, r"`classes` to be a boolean mask \(C,\), but got \[3, 4\]"),
            ({"dtype": torch.int64}, "`dtype` to be a floating type, but got torch.int64"),
            ({"batch_norm": "train"}, "`batch_norm` to be one of 'eval', 'batch', but got 'train'"),
            ({"model": mlp().requires_grad_(False)}, "`model` to be one with parameters that require a gradient"),
        ],
    )
    def test_arguments(self, change, message):
        with pytest.raises(ValueError, match=message):
            Hessian(**{"model": mlp(), "batches": [], "sample_losses": losses_of, **change})

    @pytest.mark.parametrize("data", [[], [(torch.randn(4, 8), torch.arange(3).repeat(2)[:4])]], ids=["empty", "head"])
    def test_no_sample_of_the_group(self, data):
        with pytest.raises(ValueError, match="`batches` to be data with samples of the group's classes, but got none"):
            extreme_eigenvalues(Hessian(mlp(), data, losses_of, TAIL))
        with pytest.raises(ValueError, match="`batches` to be data with samples of the group's classes, but got none"):
            Hessian(mlp(), data, losses_of, TAIL).loss(at=torch.zeros(229))

    def test_reduced_losses(self):
        with pytest.raises(ValueError, match=r"of the shape \(\d+,\) of the targets, but got losses of shape \(\)"):
            Hessian(mlp(), batches(1), lambda net, batch: losses_of(net, batch).mean(), TAIL).loss()
        with pytest.raises(ValueError, match=r"`sample_losses` to be unreduced, but got losses of shape \(\)"):
            Hessian(mlp(), batches(1), lambda net, batch: losses_of(net, batch).mean()).loss()

    @pytest.mark.parametrize("label", [-1, 5])
    def test_labels_of_no_class(self, label):
        inputs, targets = batches(1)[0]
        targets[:3] = label
        with pytest.raises(ValueError, match=r"class indices in \[0, 5\), but got values from"):
            Hessian(mlp(), [(inputs, targets)], losses_of, TAIL).loss()

    def test_products_that_are_not_symmetric(self):
        matrix = torch.randn(20, 20)
        with pytest.warns(UserWarning, match="not those of a symmetric matrix"):
            extreme_eigenvalues(matrix)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            extreme_eigenvalues(matrix + matrix.T)

    def test_other_samples_in_a_later_pass(self):
        data = batches(2)
        hessian = Hessian(mlp(), data, losses_of)
        hessian.loss()
        data[1] = batches(1)[0]
        with pytest.raises(ValueError, match="`batches` to be an iterable that gives the same samples every time"):
            hessian @ torch.randn(hessian.shape[0])

    def test_not_finite(self):
        net = mlp()
        net[0].weight.data[0, 0] = math.nan
        with pytest.raises(NonFiniteError, match="loss or its gradient is infinite or not a number"):
            measure_curvature(Model(net), batches(1), SPLIT)
        matrix = torch.diag(torch.tensor([1.0, math.inf]))
        with pytest.raises(NonFiniteError, match="A product with the matrix"):
            extreme_eigenvalues(matrix)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"groups": ["heads"]}, "`groups` to be any of 'head', 'tail', 'many', 'few', 'all', 'classes' and"),
            ({"groups": ["class_5"]}, "'class_0' to 'class_4', but got 'class_5'"),
            ({"groups": ["medium"]}, "but got 'medium'"),
            ({"groups": []}, "`groups` to be at least one group"),
            (
                {"batches": {"head": []}, "groups": ["tail"]},
                "`batches` to be data of every group, but got none of tail",
            ),
            ({"tolerance": 0.0}, "`tolerance` to be a finite number > 0"),
            ({"max_iterations": 0}, "`max_iterations` to be an integer >= 1"),
            ({"trace_samples": -1}, "`trace_samples` to be an integer >= 0"),
            ({"probes": 1.5}, "`probes` to be an integer >= 0"),
            ({"rho": -1}, "`rho` to be a finite number >= 0"),
            ({"batch_norm": "train"}, "`batch_norm` to be one of 'eval', 'batch', but got 'train'"),
            ({"dtype": "int32"}, "`dtype` to be a floating type, but got 'int32'"),
            ({"dtype": "float65"}, "`dtype` to be a floating type, but got 'float65'"),
            ({"seed": -1}, "`seed` to be an integer >= 0, but got -1"),
        ],
    )
    def test_measure(self, change, message):
        split = ClassSplit([500, 400, 300, 6, 5], tail=[3, 4])
        with pytest.raises(ValueError, match=message):
            measure_curvature(**{"model": Model(), "batches": batches(1), "split": split, **change})
        if change.keys() & vars(CurvatureSettings()).keys():
            with pytest.raises(ArgumentError, match=message):
                CurvatureSettings(**change)

    def test_unknown_setting(self):
        with pytest.raises(TypeError, match="unexpected keyword argument 'tolerence'"):
            measure_curvature(Model(), batches(1), SPLIT, tolerence=0.1)


def test_groups():
    split = ClassSplit([500, 50, 5], tail=[2])
    names = ["head", "tail", "many", "medium", "few", "all", "class_1", "classes"]
    masks = {name: mask.int().tolist() for name, mask in group_masks(split, names).items()}
    assert masks == {
        "head": [1, 1, 0],
        "tail": [0, 0, 1],
        "many": [1, 0, 0],
        "medium": [0, 1, 0],
        "few": [0, 0, 1],
        "all": [1, 1, 1],
        "class_0": [1, 0, 0],
        "class_1": [0, 1, 0],
        "class_2": [0, 0, 1],
    }


def test_data_of_its_own_for_each_group():
    data = {"head": [batches(1)[0]], "tail": [batches(1)[0]]}
    measured = measure_curvature(Model(), data, SPLIT, ["head", "tail"], max_iterations=1)
    for name, classes in (("head", HEAD), ("tail", TAIL)):
        assert measured[name].samples == classes[data[name][0][1]].sum()


class Counted:
    """A diagonal matrix that counts its products."""

    def __init__(self, values):
        self.values, self.number = values, 0
        self.shape, self.dtype, self.device = (len(values), len(values)), values.dtype, values.device

    def __matmul__(self, vectors):
        self.number += 1
        return self.values.reshape(-1, *[1] * (vectors.ndim - 1)) * vectors


def spectrum(size=2000):
    """As networks have it: a few large eigenvalues, a bulk at 0, and a negative edge."""
    generator = torch.Generator().manual_seed(0)
    bulk = 0.01 * torch.randn(size - 9, generator=generator, dtype=torch.float64)
    return torch.cat([torch.tensor([90.0, 60, 30, 20, 10, 5, 2, -3, -2.7], dtype=torch.float64), bulk])


class TestLanczos:
    @pytest.mark.parametrize("tolerance", [0.1, 0.01, 1e-4])
    def test_tolerance(self, tolerance):
        ends = extreme_eigenvalues(Counted(spectrum()), tolerance)
        assert ends.converged
        for value, true, error in ((ends.smallest, -3, ends.errors[0]), (ends.largest, 90, ends.errors[1])):
            assert abs(value - true) <= error + 1e-12
            assert error <= tolerance * abs(value)

    def test_no_more_products_than_scipy_needs(self):
        def product(vector):
            return (matrix @ torch.from_numpy(vector)).numpy()

        from scipy.sparse.linalg import LinearOperator

        matrix = Counted(spectrum())
        operator = LinearOperator(matrix.shape, matvec=product, dtype=float)
        start = np.random.default_rng(0).normal(size=2000)
        eigsh(operator, 2, which="BE", tol=0.01, v0=start)
        scipy, matrix.number = matrix.number, 0
        ends = extreme_eigenvalues(matrix)
        assert ends.iterations == matrix.number <= scipy

    def test_no_negative_curvature(self):
        """Where the bulk ends at 0 no relative error is small, and the iteration ends all the same."""
        values = spectrum().clamp(min=0)
        ends = extreme_eigenvalues(values.diag())
        assert ends.converged
        assert abs(ends.smallest) < 1e-5 * 90
        assert ends.iterations < 100

    def test_few_distinct_eigenvalues_end_it_early(self):
        ends = extreme_eigenvalues(torch.diag(torch.tensor([3.0] * 50 + [-1.0] * 50)), tolerance=1e-5)
        assert (ends.largest, ends.smallest) == pytest.approx((3, -1), abs=1e-5)
        assert ends.iterations <= 3
        ends = extreme_eigenvalues(torch.zeros(5, 5))
        assert (ends.largest, ends.smallest, ends.iterations, ends.ratio) == (0, 0, 1, math.inf)

    def test_a_single_parameter(self):
        ends = extreme_eigenvalues(torch.tensor([[-2.0]]))
        assert (ends.smallest, ends.largest, ends.iterations) == (-2, -2, 1)

    def test_bounds_hold_where_the_iteration_ends_by_rounding(self):
        """A bulk that is beyond the rounding of the largest eigenvalue."""
        values = torch.cat([torch.tensor([1000.0]), torch.linspace(-2e-4, 2e-4, 400)])
        ends = extreme_eigenvalues(values.diag(), tolerance=1e-9)
        assert ends.errors[0] > 0.1 * abs(ends.smallest + 2e-4)
        assert not ends.converged

    def test_does_not_stop_before_it_has_got_anywhere(self):
        """The first vector is nearly an eigenvector of the bulk, and its residual small."""
        values = torch.ones(10_000, dtype=torch.float64)
        values[0] = 1.3
        assert extreme_eigenvalues(Counted(values)).largest == pytest.approx(1.3)

    def test_the_basis_stays_orthonormal(self):
        """Also in float32, where ends that have long converged would come back."""
        iteration = Lanczos(Counted(spectrum().float()), torch.randn(2000))
        for _ in range(60):
            iteration.step()
        basis = torch.stack([iteration.combine(row) for row in np.eye(60)])
        torch.testing.assert_close(basis @ basis.T, torch.eye(60), rtol=0, atol=2e-6)

    def test_millions_of_parameters(self):
        ends = extreme_eigenvalues(Counted(torch.full((6_000_000,), 3.0)), tolerance=1e-5)
        assert (ends.smallest, ends.largest) == pytest.approx((3, 3), rel=1e-6)

    def test_scipy(self):
        net, data = mlp(), batches(2)
        hessian = Hessian(net, data, losses_of, dtype=torch.float64)
        values = eigsh(hessian.linear_operator(), 2, which="BE", return_eigenvectors=False)
        ends = extreme_eigenvalues(hessian, 1e-8)
        assert sorted(values) == pytest.approx([ends.smallest, ends.largest], rel=1e-8)
        columns = np.random.default_rng(0).normal(size=(hessian.shape[0], 3))
        assert hessian.linear_operator() @ columns == pytest.approx((hessian @ torch.from_numpy(columns)).numpy())
        assert Hessian(net, data, losses_of).linear_operator().dtype == np.float32


class TestTrace:
    def test_unbiased_with_an_honest_error(self):
        matrix = torch.randn(60, 60, dtype=torch.float64)
        matrix = matrix + matrix.T + 40 * torch.diag((torch.arange(60) < 2).double())
        scores, known_scores, errors = [], [], []
        known = find_ends(matrix, max_iterations=10, tolerance=1e-9)[1]
        for seed in range(200):
            trace, better = (estimate_trace(matrix, 12, seed, iteration) for iteration in (None, known))
            scores.append((trace.value - matrix.trace().item()) / trace.standard_error)
            known_scores.append((better.value - matrix.trace().item()) / better.standard_error)
            errors.append((trace.standard_error, better.standard_error))
        for normalized in (scores, known_scores):
            assert abs(np.mean(normalized)) < 4 * 1.15 / math.sqrt(200)
            # Student's t with 11 degrees of freedom.
            assert np.std(normalized) == pytest.approx(math.sqrt(11 / 9), rel=0.2)
        assert np.mean(errors, 0)[1] < 0.9 * np.mean(errors, 0)[0]

    def test_exact_where_everything_is_known(self):
        matrix = torch.diag(torch.arange(6.0))
        iteration = find_ends(matrix, tolerance=1e-9)[1]
        assert iteration.steps == 6
        trace = estimate_trace(matrix, 1, known=iteration)
        assert (trace.value, trace.standard_error) == (pytest.approx(15, rel=1e-5), 0)

    def test_a_single_sample_has_no_error(self):
        assert math.isnan(estimate_trace(torch.ones(3, 3), 1).standard_error)


class TestDensity:
    def test_moments(self):
        """With m steps the quadrature is exact for degree 2m - 1: in the mean a moment of the spectrum."""
        values = torch.linspace(-1, 2, 300, dtype=torch.float64)
        density = spectral_density(Counted(values), probes=200, steps=5)
        assert {len(nodes) for nodes in density.nodes} == {5}
        for power in range(10):
            moments = [(w * n**power).sum() for n, w in zip(density.nodes, density.weights, strict=True)]
            error = np.std(moments, ddof=1) / math.sqrt(200)
            assert abs(np.mean(moments) - (values**power).mean().item()) < 4 * error + 1e-9
        assert density.share_below(0.0) == pytest.approx(1 / 3, abs=0.05)

    def test_smoothed(self):
        density = SpectralDensity([np.array([0.0, 1.0]), np.array([2.0])], [np.array([0.25, 0.75]), np.array([1.0])])
        grid = np.linspace(-5, 7, 2001)
        values = density(grid, 0.3)
        assert trapezoid(values, grid) == pytest.approx(1)
        height = 1 / (0.3 * math.sqrt(2 * math.pi))
        around_1 = 0.75 * height + (0.25 + 1) * height * math.exp(-0.5 / 0.09)
        assert density(np.array([1.0]), 0.3)[0] == pytest.approx(around_1 / 2)
        assert density.share_below(0.5) == pytest.approx(0.125)
        with pytest.raises(ValueError, match="`width` to be a finite number > 0"):
            density(grid, 0)


def test_sharpness_of_a_quadratic():
    """L = sum(c w^2) / 2 at w = 1: the gradient is c."""
    model = Planted()
    model.w.data.fill_(1)
    data = [(torch.zeros(3), torch.zeros(3, dtype=torch.int64))]
    c = torch.tensor([5.0, 4, 3, 2, 1, 0.5])
    ascended = 1 + 0.2 * c / c.norm()
    hessian = Hessian(model, data)
    assert sharpness(hessian, 0.2) == pytest.approx((0.5 * c * (ascended**2 - 1)).sum().item(), rel=1e-4)
    assert sharpness(hessian, 0) == 0
    model.w.data.zero_()
    assert sharpness(Hessian(model, data), 0.2) == 0


def test_nothing_is_logged_or_counted(monkeypatch):
    class Logging(Model):
        def sample_losses(self, batch):
            losses = super().sample_losses(batch)
            self.log("mine", losses.mean())
            assert not self.in_clean_pass
            return losses

    monkeypatch.setattr("lightning.pytorch.LightningModule.log", lambda *_, **__: pytest.fail("logged"))
    model = Logging()
    for measured in (model, torch.compile(model, backend="eager")):
        assert Hessian(measured, batches(1)).loss() > 0
        assert model._SharpnessAwareMixin__step.is_clean is None
    # Another thing of that name is left alone.
    net = mlp()
    net.measuring = False
    assert Hessian(net, batches(1), losses_of).loss() > 0


def test_progress_is_shown(capsys):
    measure_curvature(Model(), batches(1), SPLIT, ["tail"], max_iterations=3, progress=True)
    assert "tail: eigenvalues: 3product" in capsys.readouterr().err
    measure_curvature(Model(), batches(1), SPLIT, ["tail"], max_iterations=3)
    assert not capsys.readouterr().err
