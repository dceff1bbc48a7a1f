"""The engine against the definition, and what it leaves behind."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    OBJECTIVES,
    SPLIT,
    STRICT,
    assert_same_bits,
    classification_batch,
    clones,
    compute,
    convbn,
    engine_gradient,
    mlp,
    naive_gradient,
    sample_losses_of,
    stage_2,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ssesam import ERM, SAM, SSESAM, ImbSAM, Term
from lightning_ssesam.engine import NonFiniteError, SharpnessEngine

pytestmark = STRICT

BATCHES = {
    "mixed": range(5),
    "no tail": range(3),
    "no head": (3, 4),
    "one class": (4,),
}


@pytest.mark.usefixtures("float64")
class TestDefinition:
    @pytest.mark.parametrize("passes", ["full", "split"])
    @pytest.mark.parametrize("classes", BATCHES)
    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_equals_naive_twin(self, objective, classes, passes):
        net, (x, y) = mlp(), classification_batch(classes=BATCHES[classes])
        terms = OBJECTIVES[objective]().terms(y)
        expected = naive_gradient(net, terms, x, y)
        torch.testing.assert_close(engine_gradient(net, terms, x, y, passes), expected, rtol=0, atol=1e-14)

    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_batch_norm_full_passes(self, objective):
        net, (x, y) = convbn(), classification_batch(shape=(3, 6, 6))
        terms = OBJECTIVES[objective]().terms(y)
        expected = naive_gradient(copy.deepcopy(net), terms, x, y)
        torch.testing.assert_close(engine_gradient(net, terms, x, y), expected, rtol=0, atol=1e-14)

    @pytest.mark.parametrize("passes", ["full", "split"])
    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_class_probabilities(self, objective, passes):
        net, (x, _) = mlp(), classification_batch()
        targets = torch.rand(24, 5).softmax(1)
        targets[:6] = F.one_hot(torch.arange(6) % 5, 5)
        terms = OBJECTIVES[objective]().terms(targets)
        expected = naive_gradient(net, terms, x, targets)
        torch.testing.assert_close(engine_gradient(net, terms, x, targets, passes), expected, rtol=0, atol=1e-14)

    @pytest.mark.parametrize("passes", ["full", "split"])
    @pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "own"])
    def test_dense_targets(self, objective, passes):
        net = nn.Conv2d(3, 5, 3, padding=1)
        x, y = torch.randn(6, 3, 4, 4), torch.randint(5, (6, 4, 4))
        y[:2], y[2:4] = y[:2] % 3, 3
        terms = OBJECTIVES[objective]().terms(y)
        expected = naive_gradient(net, terms, x, y)
        torch.testing.assert_close(engine_gradient(net, terms, x, y, passes), expected, rtol=0, atol=1e-14)

    @pytest.mark.parametrize("passes", ["full", "split"])
    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_empty_batch_has_zero_gradient_and_loss(self, objective, passes):
        net, (x, y) = mlp(), classification_batch(n=0)
        loss = compute(sample_losses_of(net, x, y), OBJECTIVES[objective]().terms(y), net.parameters(), passes=passes)
        assert loss.item() == 0
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in net.parameters())

    def test_zero_gradient_is_not_perturbed(self):
        w = torch.zeros(3, requires_grad=True)
        compute(lambda index, is_clean: (w**2).sum().expand(2), [Term(torch.ones(2), 0.5)], [w])
        assert torch.equal(w.grad, torch.zeros(3))

    def test_returns_mean_clean_loss(self):
        net, (x, y) = mlp(), classification_batch()
        terms = ImbSAM(SPLIT, 0.05, tail_weight=2.0, reduction="group").terms(y)
        expected = F.cross_entropy(net(x), y)
        for passes in ("full", "split"):
            loss = compute(sample_losses_of(net, x, y), terms, net.parameters(), passes=passes)
            torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-15)

    def test_several_steps_reuse_scratch(self):
        engine, net, (x, y) = SharpnessEngine(), mlp(), classification_batch()
        for size in (24, 7, 24):
            terms = SSESAM(SPLIT).terms(y[:size])
            expected = naive_gradient(net, terms, x[:size], y[:size])
            compute(sample_losses_of(net, x[:size], y[:size]), terms, net.parameters(), passes="split", engine=engine)
            torch.testing.assert_close([p.grad for p in net.parameters()], expected, rtol=0, atol=1e-14)
            with torch.no_grad():
                for p in net.parameters():
                    p.sub_(p.grad)
        engine.release()
        other = nn.Linear(8, 5)
        terms = SAM(0.1).terms(y)
        expected = naive_gradient(other, terms, x, y)
        compute(sample_losses_of(other, x, y), terms, other.parameters(), engine=engine)
        torch.testing.assert_close([p.grad for p in other.parameters()], expected, rtol=0, atol=1e-14)


class TestPasses:
    """Forward and backward calls, and the samples they see, are what the mathematics needs."""

    # objective: full forwards, backwards; split forwards, backwards, samples forwarded (20 head, 4 tail)
    COSTS = (
        ("ERM", ERM(), (1, 1), (1, 1, 24)),
        ("SAM", SAM(0.05), (2, 2), (2, 2, 48)),
        ("ImbSAM", ImbSAM(SPLIT, 0.05), (2, 3), (3, 3, 28)),
        ("SSESAM 1", SSESAM(SPLIT), (3, 4), (4, 4, 48)),
        ("SSESAM 2", stage_2(SSESAM(SPLIT)), (2, 3), (3, 3, 28)),
        ("SSESAM joint 1", SSESAM(SPLIT, first_stage="joint"), (2, 2), (2, 2, 48)),
        ("SAM rho=0", SAM(0.0), (1, 1), (1, 1, 24)),
        ("SSESAM rho=0", SSESAM(SPLIT, 0.0, 0.0), (1, 1), (1, 1, 24)),
    )

    @staticmethod
    def count(objective, passes, targets):
        net, x, calls = mlp(), torch.randn(len(targets), 8), {"samples": [], "backward": 0}
        net.register_forward_hook(lambda module, args, output: calls["samples"].append(len(args[0])))

        def backward(loss, retain_graph):
            calls["backward"] += 1
            loss.backward(retain_graph=retain_graph)

        compute(
            sample_losses_of(net, x, targets),
            objective.terms(targets),
            net.parameters(),
            backward=backward,
            passes=passes,
        )
        return len(calls["samples"]), calls["backward"], sum(calls["samples"])

    @pytest.mark.parametrize(("name", "objective", "full", "split"), COSTS, ids=[case[0] for case in COSTS])
    def test_counts(self, name, objective, full, split):
        targets = torch.tensor([0, 1, 2, 0, 1] * 4 + [3, 4, 3, 4])
        assert self.count(objective, "full", targets) == (*full, full[0] * 24)
        assert self.count(objective, "split", targets) == split

    def test_split_skips_what_no_sample_needs(self):
        assert self.count(SSESAM(SPLIT), "split", torch.tensor([0, 1, 2, 0])) == (2, 2, 8)
        assert self.count(ImbSAM(SPLIT), "split", torch.tensor([3, 3, 4])) == (2, 2, 6)

    def test_split_is_full_where_terms_share_most_samples(self):
        mixed = torch.full((6, 5), 0.2)
        mixed[0] = torch.tensor([1.0, 0, 0, 0, 0])
        assert self.count(SSESAM(SPLIT), "split", mixed) == (3, 4, 18)

        class Half(ERM):
            def terms(self, targets):
                weights = (torch.arange(len(targets)) % 2) / len(targets)
                return Term(weights, 0.1), Term(0 * weights, 0.2)

        # Three samples are forwarded for the logs alone.
        assert self.count(Half(), "split", torch.zeros(6).long()) == (3, 2, 9)

        class AllAndTail(ImbSAM):
            def terms(self, targets):
                _, tail = super().terms(targets)
                return Term(torch.full((len(targets),), 0.5 / len(targets)), 0.0), tail

        # Two clean forwards, of which the tail's serves both terms; then only the tail is perturbed.
        assert self.count(AllAndTail(SPLIT), "full", torch.tensor([0, 1, 2, 0, 1, 3])) == (2, 3, 12)
        assert self.count(AllAndTail(SPLIT), "split", torch.tensor([0, 1, 2, 0, 1, 3])) == (3, 4, 7)


class Fault(Exception):
    pass


class Rebinding(nn.Module):
    """Replaces its buffer instead of writing to it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x):
        self.steps = self.steps + 1
        return x


def batch_norm_net():
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), Rebinding(), nn.Linear(6, 5))


@pytest.mark.parametrize("error", [Fault, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "loss", "backward", "after backward"])
@pytest.mark.parametrize(("passes", "number"), [("full", n) for n in range(1, 5)] + [("split", n) for n in range(1, 5)])
def test_fault_in_any_pass_leaves_no_trace(error, where, passes, number):
    """The passes of stage 1: clean, clean, head perturbed, tail perturbed (full passes share one clean forward)."""
    net, (x, y) = batch_norm_net(), classification_batch()
    compute(sample_losses_of(net, x, y), ERM().terms(y), net.parameters())
    if passes == "full" and where in ("forward", "loss"):
        number = min(number, 3)
    calls = {"forward": 0, "loss": 0, "backward": 0, "after backward": 0}

    def point(name):
        calls[name] += 1
        if name == where and calls[name] == number:
            raise error("injected")

    def sample_losses(index, is_clean):
        select = slice(None) if index is None else index
        point("forward")
        logits = net(x[select])
        point("loss")
        return F.cross_entropy(logits, y[select], reduction="none")

    def backward(loss, retain_graph):
        point("backward")
        loss.backward(retain_graph=retain_graph)
        point("after backward")

    net[1].eval() if passes == "split" else net[1].train()
    modes = [module.training for module in net.modules()]
    gradients = [p.grad for p in net.parameters()]
    before = clones([*net.parameters(), *net.buffers(), *gradients, torch.get_rng_state()])
    with pytest.raises(error):
        compute(sample_losses, SSESAM(SPLIT).terms(y), net.parameters(), net, backward, passes)
    assert calls[where] == number
    now = [p.grad for p in net.parameters()]
    assert_same_bits([*net.parameters(), *net.buffers(), *now, torch.get_rng_state()], before)
    assert all(a is b for a, b in zip(now, gradients, strict=True))
    assert [module.training for module in net.modules()] == modes


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("passes", ["full", "split"])
def test_weights_come_back_from_non_finite_gradients(value, passes):
    net, (x, y) = batch_norm_net(), classification_batch()
    net[1].train(passes == "full")
    engine, before = SharpnessEngine(), clones(net.parameters())

    def poisoned(index, is_clean):
        losses = sample_losses_of(net, x, y)(index, is_clean)
        return losses * value

    compute(poisoned, SSESAM(SPLIT).terms(y), net.parameters(), net, passes=passes, engine=engine)
    assert_same_bits(net.parameters(), before)
    assert not all(p.grad.isfinite().all() for p in net.parameters())


def test_buffers_are_those_of_one_plain_forward():
    net, (x, y) = batch_norm_net(), classification_batch()
    twin = copy.deepcopy(net)
    twin(x)
    compute(sample_losses_of(net, x, y), SSESAM(SPLIT).terms(y), net.parameters(), net)
    assert_same_bits(net.buffers(), twin.buffers())
    assert net[1].num_batches_tracked == 1


def test_any_buffer_moves_once_and_expanded_buffers_are_left_alone():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(8, 5)
            self.register_buffer("calls", torch.zeros(1))
            self.register_buffer("expanded", torch.ones(1).expand(4))

        def forward(self, x):
            self.calls.data += 1
            return super().forward(x)

    net, (x, y) = Counting(), classification_batch()
    compute(sample_losses_of(net, x, y), SSESAM(SPLIT).terms(y), net.parameters(), net)
    assert net.calls == 1
    assert torch.equal(net.expanded, torch.ones(4))


@pytest.mark.parametrize("in_place", [True, False])
def test_auto_passes_are_full_for_a_model_whose_forward_moves_buffers(in_place):
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(8, 5)
            self.register_buffer("calls", torch.zeros(1))
            self.forwards = 0

        def forward(self, x):
            self.forwards += 1
            if self.training and in_place:
                self.calls += 1
            elif self.training:
                self.calls = self.calls + 1
            return super().forward(x)

    net, (x, y), engine = Counting(), classification_batch(), SharpnessEngine()

    def step():
        losses, terms = sample_losses_of(net, x, y), SSESAM(SPLIT).terms(y)
        compute(losses, terms, net.parameters(), net, passes="auto", engine=engine)

    for number in range(1, 4):
        step()
        assert net.calls == number
    # One forward more, to see whether a buffer moves.
    assert net.forwards == 1 + 3 * 3
    net.eval()
    step()
    step()
    # Five forwards more, to see whether samples mix.
    assert net.forwards == 10 + 5 + 2 * 4


def test_auto_passes_are_split_from_the_first_step_without_buffers():
    # Instance norm names its buffers, but has none unless it tracks statistics.
    net, samples = nn.Sequential(nn.InstanceNorm1d(1), nn.Flatten(), nn.Linear(8, 5)), []
    net.register_forward_hook(lambda module, args, output: samples.append(len(args[0])))
    x, y = torch.randn(6, 1, 8), torch.tensor([0, 1, 2, 0, 3, 4])
    compute(sample_losses_of(net, x, y), SSESAM(SPLIT).terms(y), net.parameters(), net, passes="auto")
    # The whole batch; for each group the batch of its copies, and the group alone; then the passes.
    assert samples == [6, 6, 4, 6, 2, 4, 2, 4, 2]


@pytest.mark.parametrize("passes", ["full", "split"])
def test_perturbed_pass_sees_the_dropout_of_its_clean_pass(passes):
    masks = {False: [], True: []}
    dropout, weight, (x, y) = nn.Dropout(0.5), torch.ones(8, requires_grad=True), classification_batch()

    def sample_losses(index, is_clean):
        inputs = torch.ones_like(x) if index is None else torch.ones_like(x[index])
        dropped = dropout(inputs)
        masks[is_clean].append(dropped.detach())
        return (dropped * weight).sum(1)

    torch.manual_seed(3)
    compute(sample_losses, SSESAM(SPLIT).terms(y), [weight], passes=passes)
    state = torch.get_rng_state()
    assert_same_bits(masks[False], masks[True] * (2 if passes == "full" else 1))

    # The generator has moved on by the clean passes alone.
    torch.manual_seed(3)
    for mask in masks[True]:
        dropout(torch.ones_like(mask))
    assert torch.equal(torch.get_rng_state(), state)


def test_gradients_that_share_a_buffer():
    """DDP may leave gradients as views into buckets, which the next backward overwrites."""
    net, (x, y) = mlp(), classification_batch()
    params = list(net.parameters())
    bucket = torch.zeros(sum(p.numel() for p in params))
    views = [part.view_as(p) for part, p in zip(bucket.split([p.numel() for p in params]), params, strict=True)]

    def backward(loss, retain_graph):
        before = [0 if p.grad is None else p.grad.clone() for p in params]
        gradients = torch.autograd.grad(loss, params, retain_graph=retain_graph)
        for p, view, old, new in zip(params, views, before, gradients, strict=True):
            p.grad = view.copy_(old + new)

    terms = SSESAM(SPLIT).terms(y)
    compute(sample_losses_of(net, x, y), terms, params, backward=backward)
    expected = naive_gradient(net, terms, x, y)
    torch.testing.assert_close([p.grad for p in params], expected, rtol=1e-5, atol=1e-6)


def test_random_numbers_go_on_from_the_clean_pass():
    weight, (_, y) = torch.ones(1, requires_grad=True), classification_batch()

    def sample_losses(index, is_clean):
        torch.rand(3 if is_clean else 5)
        return weight.expand(24)

    torch.manual_seed(3)
    compute(sample_losses, SAM(0.1).terms(y), [weight])
    state = torch.get_rng_state()
    torch.manual_seed(3)
    torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("passes", ["full", "split"])
def test_frozen_and_unused_parameters(passes):
    net, (x, y) = mlp(), classification_batch()
    net.unused = nn.Parameter(torch.randn(3))
    net.unused.grad = torch.ones(3)
    net[0].requires_grad_(False)
    net[0].weight.grad = torch.full_like(net[0].weight, 7.0)
    terms = SSESAM(SPLIT).terms(y)
    before = clones(net.parameters())
    compute(
        lambda index, is_clean: sample_losses_of(nn.Sequential(*list(net)), x, y)(index, is_clean),
        terms,
        net.parameters(),
        passes=passes,
    )
    expected = naive_gradient(nn.Sequential(*list(net)), terms, x, y)
    assert net.unused.grad is None
    assert torch.equal(net[0].weight.grad, torch.full_like(net[0].weight, 7.0))
    torch.testing.assert_close([net[2].weight.grad, net[2].bias.grad], expected, rtol=1e-5, atol=1e-6)
    assert_same_bits(net.parameters(), before)


def test_part_of_the_model_that_only_one_term_uses():
    """A branch for the tail alone: its gradient is None in the head's passes."""
    head, tail = nn.Linear(8, 5), nn.Linear(8, 5)
    x, y = classification_batch()
    params = [*head.parameters(), *tail.parameters()]

    def sample_losses(index, is_clean):
        net = tail if bool((y[index] > 2).all()) else head
        return F.cross_entropy(net(x[index]), y[index], reduction="none")

    compute(sample_losses, SSESAM(SPLIT, 0.0, 0.1).terms(y), params, passes="split")
    tail_terms = [Term(SSESAM(SPLIT).terms(y)[1].weights[y > 2], 0.1)]
    torch.testing.assert_close(
        [p.grad for p in tail.parameters()], naive_gradient(tail, tail_terms, x[y > 2], y[y > 2]), rtol=1e-5, atol=1e-6
    )


def test_autocast_sees_the_perturbed_weights():
    """Autocast caches low-precision weights; a stale copy would make the perturbed pass a clean one."""
    net, (x, y) = mlp(), classification_batch()
    terms = SAM(2.0).terms(y)
    with torch.autocast("cpu", torch.bfloat16):
        cached = engine_gradient(net, terms, x, y)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = engine_gradient(net, terms, x, y)
    assert_same_bits(cached, expected)
    with torch.autocast("cpu", torch.bfloat16):
        plain = engine_gradient(net, ERM().terms(y), x, y)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(cached, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_losses_are_summed_in_float32(dtype):
    weight = torch.ones(1, requires_grad=True)
    n = 4096
    loss = compute(
        lambda index, is_clean: (weight * torch.full((n,), 3.0)).to(dtype),
        ERM().terms(torch.zeros(n).long()),
        [weight],
    )
    assert loss.dtype == torch.float32
    assert loss.item() == 3.0


def test_norm_of_bfloat16_gradients_is_taken_in_float32():
    weight = torch.zeros(300, dtype=torch.bfloat16, requires_grad=True)
    seen = []

    def sample_losses(index, is_clean):
        seen.append(weight.detach().clone())
        return weight.float().sum().reshape(1)

    compute(sample_losses, [Term(torch.ones(1), 1.0)], [weight])
    torch.testing.assert_close(seen[1].float().norm(), torch.tensor(1.0), rtol=4e-3, atol=0)


@pytest.mark.parametrize("losses", [torch.tensor(1.0), torch.ones(23), torch.ones(24, 1), None])
@pytest.mark.parametrize("passes", ["full", "split"])
def test_losses_must_be_per_sample(losses, passes):
    _, y = classification_batch()
    with pytest.raises(ValueError, match=r"Expected `sample_losses` to return one unreduced loss .* shape \(24,\)"):
        compute(lambda *_: losses, ERM().terms(y), [torch.ones(1, requires_grad=True)], passes=passes)


def test_bad_arguments():
    with pytest.raises(
        ValueError,
        match=r"Expected argument `passes` to be one of 'auto', 'full', 'split', 'difference', but got 'half'\.",
    ):
        compute(lambda *_: torch.ones(1), [Term(torch.ones(1), 0.0)], [], passes="half")
    with pytest.raises(ValueError, match=r"Expected argument `rho` to be a finite number >= 0, but got -0\.1"):
        compute(lambda *_: torch.ones(1), [Term(torch.ones(1), -0.1)], [])
    with pytest.raises(ValueError, match="Expected argument `terms` to be at least one term"):
        compute(lambda *_: torch.ones(1), [], [])


def test_scratch_is_neither_copied_nor_saved():
    engine, net, (x, y) = SharpnessEngine(), mlp(), classification_batch()
    compute(sample_losses_of(net, x, y), SAM(0.1).terms(y), net.parameters(), engine=engine)
    fresh = len(pickle.dumps(SharpnessEngine()))
    assert len(pickle.dumps(engine)) == fresh
    assert len(pickle.dumps(copy.deepcopy(engine))) == fresh


class Reads(TorchDispatchMode):
    """Counts how often a value of a tensor is read, for which a GPU would have to be waited for."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_the_check_for_finite_values_waits_once():
    net, (x, y) = mlp(), classification_batch()
    terms, numbers, told = SAM(0.1).terms(y), [], []
    for options in ({}, {"check_finite": lambda are_finite: told.append(are_finite) or True}):
        with Reads() as reads:
            compute(sample_losses_of(net, x, y), terms, net.parameters(), net, **options)
        numbers.append(reads.number)
    assert numbers[1] - numbers[0] == 1
    assert told == [True]


@pytest.mark.parametrize("what", ["loss", "gradient", "neither"])
def test_what_is_not_finite(what):
    """A root has no finite derivative at 0, and an infinite constant leaves the gradient finite."""
    weight, told = torch.nn.Parameter(torch.ones(3)), []

    def sample_losses(index, is_clean):
        losses = (weight * 0).abs().sqrt() if what == "gradient" else weight * 2
        return losses + (torch.inf if what == "loss" else 0)

    options = {"check_finite": lambda are_finite: told.append(are_finite) or are_finite}
    with pytest.raises(NonFiniteError, match="infinite or not a number") if what != "neither" else nullcontext():
        compute(sample_losses, ERM().terms(torch.arange(3)), [weight], **options)
    assert told == [what == "neither"]
    assert (weight.grad is None) == (what != "neither")
