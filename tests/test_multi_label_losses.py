"""Losses of multi-label data against their papers' formulas, one label of one sample at a time."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import STRICT
from torchvision.ops import sigmoid_focal_loss

from lightning_ssesam import ClassSplit
from lightning_ssesam.losses import (
    AsymmetricLoss,
    BinaryCrossEntropyLoss,
    ClassBalancedBCELoss,
    DistributionBalancedLoss,
    FocalLoss,
    LDAMLoss,
    MultiLabelLoss,
    class_balanced_weights,
    functional,
)

pytestmark = STRICT

COUNTS = [50, 40, 30, 6, 1]
WEIGHTS = [0.5, 1.0, 2.0, 0.0, 3.0]
SAMPLES = 80
LOSSES = {
    "BCE": lambda **kwargs: BinaryCrossEntropyLoss(**kwargs),
    "class-balanced": lambda **kwargs: ClassBalancedBCELoss(COUNTS, beta=0.9, **kwargs),
    "asymmetric": lambda **kwargs: AsymmetricLoss(3.0, 1.5, 0.1, **kwargs),
    "asymmetric default": lambda **kwargs: AsymmetricLoss(**kwargs),
    "distribution-balanced": lambda **kwargs: DistributionBalancedLoss(COUNTS, SAMPLES, 0.2, 8.0, 0.3, 5.0, **kwargs),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def naive(name, z, y, answers):
    """The loss of the label of number y with the logit z, for a sample with these answers."""
    t = answers[y]
    p = 1 / (1 + math.exp(-z))
    if name in ("BCE", "class-balanced"):
        loss = -t * math.log(p) - (1 - t) * math.log(1 - p)
        effective = [(1 - 0.9) / (1 - 0.9**n) for n in COUNTS]
        return loss if name == "BCE" else loss * effective[y] * len(COUNTS) / sum(effective)
    if name.startswith("asymmetric"):
        gamma_neg, gamma_pos, margin = (4.0, 0.0, 0.05) if name.endswith("default") else (3.0, 1.5, 0.1)
        shifted = max(p - margin, 0.0)
        yes = (1 - p) ** gamma_pos * math.log(p)
        no = shifted**gamma_neg * math.log(1 - shifted)
        return -t * yes - (1 - t) * no
    by_this_label = 1 / len(COUNTS) / COUNTS[y]
    by_any_label = sum(answer / len(COUNTS) / n for answer, n in zip(answers, COUNTS, strict=True))
    r = by_this_label / by_any_label if by_any_label else math.inf
    weight = 0.2 + 1 / (1 + math.exp(-8.0 * (r - 0.3)))
    bias = -math.log(SAMPLES / COUNTS[y] - 1)
    shifted = z - -0.05 * bias
    return weight * (t * math.log(1 + math.exp(-shifted)) + (1 - t) * math.log(1 + math.exp(5.0 * shifted)) / 5.0)


@pytest.mark.usefixtures("float64")
@every_loss
@pytest.mark.parametrize("soft", [False, True])
def test_same_as_naive(name, soft):
    logits, targets = 2 * torch.randn(12, 5), (torch.rand(12, 5) < 0.4).double()
    targets[0] = 0
    targets = 0.8 * targets + 0.1 * targets.roll(1, 0) if soft else targets
    rows = zip(logits.tolist(), targets.tolist(), strict=True)
    expected = torch.tensor([[naive(name, z, y, answers) for y, z in enumerate(row)] for row, answers in rows])
    loss = LOSSES[name]()
    actual = loss(logits, targets)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    for reduction in ("mean", "sum"):
        reduced = LOSSES[name](reduction=reduction)(logits, targets)
        torch.testing.assert_close(reduced, getattr(expected, reduction)(), rtol=1e-12, atol=0)
    if name != "class-balanced":
        weighted = LOSSES[name](weight=WEIGHTS)(logits, targets)
        torch.testing.assert_close(weighted, expected * torch.tensor(WEIGHTS), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (BinaryCrossEntropyLoss(), [math.log(2), math.log(2)]),
        # beta=1/2: 1 / (1 - 1/4) to 1 / (1 - 1/2) is 0.8 to 1.2.
        (ClassBalancedBCELoss([2, 1], beta=0.5), [0.8 * math.log(2), 1.2 * math.log(2)]),
        # A no of probability 1/2 with margin 1/4: (1/4)^2 log of 1 / (3/4). A yes: (1/2)^1 log 2.
        (AsymmetricLoss(2.0, 1.0, 0.25), [math.log(2) / 2, math.log(4 / 3) / 16]),
        # The sample is drawn by label 0 alone: r is 1 and 4. Shares of 1/2 shift nothing, of 1/8 by log 7.
        (
            DistributionBalancedLoss([4, 1], num_samples=8, alpha=0.0, beta=1.0, mu=1.0, negative_scale=2.0, kappa=1.0),
            [math.log(2) / 2, math.log(1 + 7**-2) / 2 / (1 + math.exp(-3))],
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_by_hand(loss, expected):
    assert loss(torch.zeros(1, 2), torch.tensor([[1, 0]]))[0].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.usefixtures("float64")
def test_without_margin_and_with_equal_exponents_it_is_the_focal_loss():
    logits, targets = 3 * torch.randn(8, 5), (torch.rand(8, 5) < 0.4).double()
    expected = sigmoid_focal_loss(logits, targets, alpha=-1.0, gamma=2.0)
    torch.testing.assert_close(AsymmetricLoss(2.0, 2.0, 0.0)(logits, targets), expected, rtol=1e-12, atol=1e-15)


@every_loss
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.float16, torch.float32])
def test_answers_of_any_dtype(name, dtype):
    logits, targets = torch.randn(6, 5), torch.rand(6, 5) < 0.4
    loss = LOSSES[name]()
    assert torch.equal(loss(logits, targets.to(dtype)), loss(logits, targets.float()))
    half = loss(logits.half(), targets)
    assert half.dtype == torch.float32
    assert torch.equal(half, loss(logits.half().float(), targets))


@every_loss
@pytest.mark.parametrize("ignore_index", [-100, -1, 255])
def test_missing_labels_have_no_loss_no_gradient_and_no_part_in_the_mean(name, ignore_index):
    logits, targets = torch.randn(6, 5, dtype=torch.float64), torch.rand(6, 5) < 0.4
    missing = torch.rand(6, 5) < 0.3
    given = targets.long().masked_fill(missing, ignore_index)
    extreme = logits.masked_fill(missing, math.inf)
    losses = LOSSES[name](ignore_index=ignore_index)(extreme, given)
    # A missing label is no reason to draw the sample, so it counts as a no for the others.
    expected = LOSSES[name]()(logits, targets & ~missing).masked_fill(missing, 0.0)
    assert torch.equal(losses, expected)
    mean = LOSSES[name](ignore_index=ignore_index, reduction="mean")
    torch.testing.assert_close(mean(logits, given), expected.sum() / (~missing).sum())
    assert mean(logits, torch.full((6, 5), ignore_index)) == 0
    finite = logits.clone().requires_grad_()
    LOSSES[name](ignore_index=ignore_index)(finite, given).sum().backward()
    assert bool((finite.grad[missing] == 0).all())
    assert bool(finite.grad.isfinite().all())


@every_loss
@pytest.mark.parametrize("logit", [0.0, 40.0, -40.0, 1e4, -1e4])
def test_extreme_logits_have_finite_losses_and_gradients(name, logit):
    logits = torch.full((2, 5), logit, requires_grad=True)
    losses = LOSSES[name]()(logits, torch.tensor([[1, 0, 1, 0, 1], [0, 1, 0, 1, 0]]))
    losses.sum().backward()
    assert bool(losses.isfinite().all())
    assert bool(logits.grad.isfinite().all())
    focal = AsymmetricLoss(0.0, 2.0, margin=0.0)(torch.full((1, 5), logit), torch.zeros(1, 5))
    assert focal[0].tolist() == pytest.approx(F.softplus(torch.tensor([logit] * 5)).tolist(), rel=1e-6)
    if logit == 1e4 and name == "BCE":
        assert losses[0].tolist() == [0, 1e4, 0, 1e4, 0]


def test_labels_without_a_training_sample_have_no_loss():
    split = ClassSplit([4, 0, 8], tail=[0], multi_label=True, num_samples=8)
    logits = torch.randn(5, 3, requires_grad=True)
    targets = torch.tensor([[0, 0, 1], [1, 0, 1], [0, 1, 1], [0, 0, 0], [0, 1, 0]])
    for loss in (ClassBalancedBCELoss(), DistributionBalancedLoss()):
        loss.bind(split)
        losses = loss(logits, targets)
        assert losses[:, 1].tolist() == [0] * 5
        # The others do not see it.
        others = copy.deepcopy(loss)
        others = type(loss)(ClassSplit([4, 8], tail=[0], multi_label=True, num_samples=8))
        torch.testing.assert_close(losses[:, [0, 2]], others(logits[:, [0, 2]], targets[:, [0, 2]]))
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        assert bool(gradient.isfinite().all())
    assert BinaryCrossEntropyLoss()(logits, targets)[2, 1] > 0


@pytest.mark.usefixtures("float64")
def test_functions_are_the_formulas_of_the_classes():
    logits, targets, counts = torch.randn(6, 5), (torch.rand(6, 5) < 0.4).double(), torch.tensor(COUNTS).double()
    weight = torch.tensor(WEIGHTS)
    shifts = functional.label_shifts(counts, SAMPLES)
    pairs = {
        "BCE": functional.binary_cross_entropy(logits, targets, weight),
        "asymmetric": functional.asymmetric(logits, targets, 3.0, 1.5, 0.1, weight),
        "distribution-balanced": functional.distribution_balanced(
            logits, targets, counts, shifts, 5.0, 0.2, 8.0, 0.3, weight
        ),
    }
    for name, losses in pairs.items():
        assert torch.equal(losses, LOSSES[name](weight=WEIGHTS)(logits, targets))
    balanced = functional.binary_cross_entropy(logits, targets, class_balanced_weights(COUNTS, 0.9))
    assert torch.equal(balanced, LOSSES["class-balanced"]()(logits, targets))


@pytest.mark.usefixtures("float64")
def test_a_loss_is_a_function_and_a_small_class():
    class RankedLoss(MultiLabelLoss):
        def losses(self, logits, targets, weight):
            return functional.binary_cross_entropy(logits, targets, weight) / self.counts_like(logits)

    loss = pickle.loads(pickle.dumps(AsymmetricLoss()))
    assert repr(loss) == "AsymmetricLoss(reduction='none', gamma_neg=4.0, gamma_pos=0.0, margin=0.05)"
    assert DistributionBalancedLoss(COUNTS, 80).state_dict() == {}
    ranked = RankedLoss()
    ranked.bind(ClassSplit([2, 1], tail=[1], multi_label=True))
    assert ranked(torch.zeros(1, 2), torch.ones(1, 2))[0].tolist() == [math.log(2) / 2, math.log(2)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AsymmetricLoss(gamma_neg=0.5), "`gamma_neg` to be 0 or a finite number >= 1, but got 0.5"),
        (lambda: AsymmetricLoss(gamma_pos=-1), "`gamma_pos` to be 0 or a finite number >= 1, but got -1"),
        (lambda: AsymmetricLoss(margin=1.0), r"`margin` to be a number in \[0, 1\), but got 1.0"),
        (lambda: ClassBalancedBCELoss(beta=1.0), r"`beta` to be a number in \[0, 1\)"),
        (lambda: DistributionBalancedLoss(negative_scale=0), "`negative_scale` to be a finite number > 0"),
        (lambda: DistributionBalancedLoss(mu=math.inf), "`mu` to be a finite number, but got inf"),
        (lambda: DistributionBalancedLoss(COUNTS), "`num_samples` to be an integer >= 50, the largest count, unless"),
        (lambda: DistributionBalancedLoss(COUNTS, 49), "`num_samples` to be an integer >= 50.*, but got 49"),
        (lambda: BinaryCrossEntropyLoss(weight=[-1.0]), "`weight` to be a vector of finite numbers >= 0"),
        (lambda: BinaryCrossEntropyLoss(reduction="batch"), "`reduction` to be one of 'none', 'mean', 'sum'"),
        (lambda: BinaryCrossEntropyLoss(ignore_index=1)(torch.zeros(1, 2), torch.zeros(1, 2)), "outside .* but got 1"),
        (lambda: DistributionBalancedLoss([2, 1], 4, weight=[1.0]), r"`weight` to be of shape \(2,\)"),
        (lambda: BinaryCrossEntropyLoss()(torch.zeros(2, 3), torch.zeros(2)), r"multi-label targets of shape \(2, 3\)"),
        (lambda: BinaryCrossEntropyLoss()(torch.zeros(3), torch.zeros(3)), r"`logits` to be of shape \(N, C\)"),
        (lambda: ClassBalancedBCELoss([2, 1])(torch.zeros(2, 3), torch.zeros(2, 3)), r"of shape \(N, 2\)"),
        (lambda: ClassBalancedBCELoss([2, -1]), "integers >= 0 for every class"),
        (
            lambda: LDAMLoss(ClassSplit([2, 1], [1], multi_label=True)),
            "without `multi_label` for LDAMLoss, but got Cla",
        ),
        (lambda: FocalLoss().bind(ClassSplit([2, 1], [1], multi_label=True)), "without `multi_label` for FocalLoss"),
        (lambda: AsymmetricLoss().bind(ClassSplit([2, 1], [1])), "one with `multi_label` for AsymmetricLoss, but got"),
        (lambda: ClassBalancedBCELoss(ClassSplit([2, 1], [1])), "one with `multi_label` for ClassBalancedBCELoss"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_counts_may_come_later():
    loss = DistributionBalancedLoss(num_samples=80)
    with pytest.raises(RuntimeError, match=r"DistributionBalancedLoss does not know the class counts"):
        loss(torch.zeros(1, 5), torch.zeros(1, 5))
    loss.bind(ClassSplit(COUNTS, tail=[4], multi_label=True))
    balanced = ClassBalancedBCELoss(beta=0.9)
    balanced.bind(ClassSplit(COUNTS, tail=[4], multi_label=True))
    z, y = torch.randn(3, 5), torch.ones(3, 5)
    assert torch.equal(loss(z, y), DistributionBalancedLoss(COUNTS, 80)(z, y))
    assert torch.equal(balanced(z, y), ClassBalancedBCELoss(COUNTS, 0.9)(z, y))
    # The split may know the number of samples.
    other = DistributionBalancedLoss()
    other.bind(ClassSplit(COUNTS, tail=[4], multi_label=True, num_samples=80))
    assert torch.equal(loss(z, y), other(z, y))
    with pytest.raises(ValueError, match="one with the class counts that the ClassBalancedBCELoss has already"):
        balanced.bind(ClassSplit([5, 4, 3, 2, 1], tail=[4], multi_label=True))


def test_binary_cross_entropy_is_torchs():
    logits, targets = torch.randn(4, 3), (torch.rand(4, 3) < 0.5).float()
    assert torch.equal(
        BinaryCrossEntropyLoss(reduction="mean")(logits, targets), F.binary_cross_entropy_with_logits(logits, targets)
    )
