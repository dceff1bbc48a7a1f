"""Classes without training samples, where they are allowed: tail, without weight, and nothing is NaN."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import STRICT, batches_loader, trainer
from torch import nn
from torch.utils.data import TensorDataset

from lightning_ssesam import (
    SAM,
    SSESAM,
    ClassSplit,
    DeferredReweighting,
    HeadTailAccuracy,
    HeadTailConfusion,
    ImbSAM,
    LongTailClassifier,
    ManyMediumFewAccuracy,
)
from lightning_ssesam.curvature import group_masks
from lightning_ssesam.data import (
    ClassBalancedSampler,
    LongTailDataModule,
    ProgressivelyBalancedSampler,
    SquareRootSampler,
)
from lightning_ssesam.losses import (
    BalancedSoftmaxLoss,
    ClassBalancedLoss,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    VSLoss,
    class_balanced_weights,
)

pytestmark = STRICT

# Classes 1 and 4 have no samples.
COUNTS = [50, 0, 30, 6, 0]
PRESENT = [0, 2, 3]
SPLIT = ClassSplit(COUNTS, tail=[3], allow_empty=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda **kwargs: ClassSplit(COUNTS, tail=[3], **kwargs),
        lambda **kwargs: ClassSplit(torch.tensor(COUNTS), tail=[False, False, False, True, False], **kwargs),
        lambda **kwargs: ClassSplit.from_counts(COUNTS, tail_below=10, **kwargs),
        lambda **kwargs: ClassSplit.from_counts(COUNTS, tail_fraction=0.1, **kwargs),
        lambda **kwargs: ClassSplit.from_labels([0] * 50 + [2] * 30 + [3] * 6, num_classes=5, tail_below=10, **kwargs),
        lambda **kwargs: ClassSplit.from_labels([0] * 50 + [2] * 30 + [3] * 6, num_classes=5, tail=[3], **kwargs),
    ],
)
def test_an_empty_class_is_tail_where_it_is_allowed(make):
    split = make(allow_empty=True)
    assert split.class_counts.tolist() == COUNTS
    assert split.tail.nonzero().flatten().tolist() == [1, 3, 4]
    assert split.few.nonzero().flatten().tolist() == [1, 3, 4]
    for twin in (copy.deepcopy(split), pickle.loads(pickle.dumps(split))):
        assert twin.allow_empty
    with pytest.raises(ValueError, match=r"integers >= 1 .*`allow_empty`, see ClassSplit\)|labels of every class"):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassSplit([0, 0], [], allow_empty=True), "`class_counts` to be more than 0 for some class"),
        (lambda: ClassSplit([2, -1], [], allow_empty=True), "integers >= 0 for every class, but got -1 for class 1"),
        (lambda: ClassSplit([2.5, 0], [], allow_empty=True), "a vector of integers >= 0"),
        (lambda: ClassSplit([2, 0], [], allow_empty=1), "`allow_empty` to be True or False, but got 1"),
        (lambda: LDAMLoss([5, 0]), "`class_counts` to be integers >= 1 for every class, but got 0 for class 1"),
        (lambda: ImbSAM(ClassSplit([0, 4], [1], allow_empty=True)), "both head and tail classes"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


LOSSES = {
    "LDAM": lambda counts: LDAMLoss(counts, max_margin=0.4, scale=3.0),
    "LogitAdjusted": lambda counts: LogitAdjustedLoss(counts, tau=1.3),
    "BalancedSoftmax": BalancedSoftmaxLoss,
    "VS": lambda counts: VSLoss(counts, gamma=0.3, tau=0.8),
    "ClassBalanced": lambda counts: ClassBalancedLoss(counts, beta=0.99),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_nothing_is_nan(name, kind, dtype):
    """Also for samples of a class without training samples, as validation data may have: their loss is 0."""
    logits = (100 * torch.randn(10, 5)).to(dtype).requires_grad_()
    targets = torch.arange(10) % 5
    given = targets if kind == "indices" else F.one_hot(targets, 5).to(dtype)
    losses = LOSSES[name](SPLIT)(logits, given)
    assert losses.isfinite().all()
    assert not losses[SPLIT.class_counts[targets] == 0].any()
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert gradient.isfinite().all()
    assert LOSSES[name](SPLIT)(logits, torch.full((10,), 4)).sum() == 0


@pytest.mark.parametrize("name", ["LogitAdjusted", "BalancedSoftmax", "VS"])
@pytest.mark.parametrize("smoothed", [False, True])
def test_adjusted_losses_are_those_without_the_class(name, smoothed, float64):
    """As the count goes to 0, so does the share of the class in the softmax."""
    logits, targets = torch.randn(8, 5), torch.randint(3, (8,))
    full = torch.tensor(PRESENT)[targets]
    if smoothed:
        targets = torch.rand(8, 3).softmax(1)
        full = torch.zeros(8, 5).index_copy(1, torch.tensor(PRESENT), targets)
    expected = LOSSES[name]([50, 30, 6])(logits[:, PRESENT], targets)
    torch.testing.assert_close(LOSSES[name](SPLIT)(logits, full), expected, rtol=0, atol=1e-13)


def test_margins_are_those_without_the_class(float64):
    loss, without = LDAMLoss(SPLIT), LDAMLoss([50, 30, 6])
    torch.testing.assert_close(loss.margins[PRESENT], without.margins, rtol=0, atol=1e-15)
    assert loss.margins[[1, 4]].tolist() == [0, 0]
    logits, targets = torch.randn(6, 5), torch.tensor([0, 2, 3, 0, 2, 3])
    margins = torch.zeros(6, 5).scatter(1, targets[:, None], loss.margins[targets][:, None])
    expected = F.cross_entropy(30 * (logits - margins), targets, reduction="none")
    torch.testing.assert_close(loss(logits, targets), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("beta", [0.0, 0.99, 0.9999])
def test_class_balanced_weights_are_those_without_the_class(beta):
    weights = class_balanced_weights(SPLIT, beta)
    torch.testing.assert_close(weights[PRESENT], class_balanced_weights([50, 30, 6], beta), rtol=0, atol=1e-15)
    assert weights[[1, 4]].tolist() == [0, 0]


def test_means_leave_out_the_samples_of_an_empty_class(float64):
    logits, targets = torch.randn(6, 5), torch.tensor([0, 1, 3, 4, -100, 2])
    mean = BalancedSoftmaxLoss(SPLIT, reduction="mean")(logits, targets)
    counted = [0, 2, 5]
    torch.testing.assert_close(mean, BalancedSoftmaxLoss(SPLIT)(logits[counted], targets[counted]).mean())


def test_a_loss_without_counts_keeps_the_class(float64):
    loss, logits, targets = FocalLoss(gamma=0.0), torch.randn(5, 5), torch.arange(5)
    loss.bind(SPLIT)
    torch.testing.assert_close(loss(logits, targets), F.cross_entropy(logits, targets, reduction="none"))


@pytest.mark.parametrize("kind", [ClassBalancedSampler, SquareRootSampler, ProgressivelyBalancedSampler])
def test_samplers_never_draw_it(kind):
    labels = torch.tensor([0] * 50 + [2] * 30 + [3] * 6)
    options = {"num_epochs": 2} if kind is ProgressivelyBalancedSampler else {}
    sampler = kind(labels, num_samples=3000, **options)
    sampler.set_epoch(5)
    drawn = labels[list(sampler)].bincount(minlength=5) / 3000
    assert drawn[[1, 4]].tolist() == [0, 0]
    roots = torch.tensor([50.0, 30.0, 6.0]).sqrt()
    expected = roots / roots.sum() if kind is SquareRootSampler else torch.full((3,), 1 / 3)
    torch.testing.assert_close(drawn[PRESENT], expected, rtol=0, atol=0.04)


def test_groups_and_metrics():
    # The evaluation data have samples of class 1, and none of class 4.
    targets, preds = torch.tensor([0, 0, 1, 1, 2, 3]), torch.tensor([0, 1, 1, 0, 2, 4])
    values = {**HeadTailAccuracy(SPLIT)(preds, targets), **HeadTailConfusion(SPLIT)(preds, targets)}
    expected = {"head": 0.75, "tail": 0.25, "all": 0.5, "head_to_head": 0.0, "head_to_tail": 0.25}
    assert values == pytest.approx({**expected, "tail_to_head": 0.25, "tail_to_tail": 0.5})
    few = ManyMediumFewAccuracy(SPLIT)(preds, targets)
    assert few["few"] == 0.25
    assert group_masks(SPLIT, ["tail"])["tail"].tolist() == [False, True, False, True, True]


class Points(LongTailDataModule):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.class_counts = COUNTS

    def make_sets(self):
        labels = torch.arange(5).repeat_interleave(torch.tensor(COUNTS))
        train = TensorDataset(torch.randn(86, 8), labels)
        return {"train": train, "val": TensorDataset(torch.randn(20, 8), torch.arange(20) % 5), "test": train}


@pytest.mark.parametrize("loss", [None, *LOSSES])
@pytest.mark.parametrize("objective", [SAM, SSESAM])
def test_training_has_no_nan(loss, objective):
    data = Points(sampler=ClassBalancedSampler)
    assert data.split(tail_below=10, allow_empty=True).tail.tolist() == SPLIT.tail.tolist()
    model = LongTailClassifier(
        data.class_counts, nn.Linear(8, 5), objective(), loss and LOSSES[loss](None), tail_below=10, allow_empty=True
    )
    callbacks = [DeferredReweighting(at=0.5)] if loss != "ClassBalanced" else []
    run = trainer(max_epochs=2, callbacks=callbacks)
    run.fit(model, datamodule=data)
    assert model.split.tail.tolist() == SPLIT.tail.tolist()
    assert all(p.isfinite().all() for p in model.parameters())
    # No class has more than 100 samples.
    names = {name for name, value in run.callback_metrics.items() if not value.isfinite()}
    assert names == {"val/acc_many"}
    with pytest.raises(ValueError, match="allowed with `allow_empty`"):
        LongTailClassifier(data.class_counts, nn.Linear(8, 5), tail_below=10)


def test_loss_of_the_training_batches_is_that_of_the_others(float64):
    """A batch that has no sample of an empty class is not touched by the rule for them."""
    model = LongTailClassifier(COUNTS, nn.Linear(8, 5), SAM(0.0), LDAMLoss(), tail_below=10, allow_empty=True)
    x, y = torch.randn(9, 8), torch.tensor(PRESENT * 3)
    expected = LDAMLoss(SPLIT)(model(x), y).mean()
    run = trainer()
    run.fit(model, batches_loader([(x, y)]))
    torch.testing.assert_close(run.callback_metrics["train/loss"], expected, rtol=0, atol=1e-14)
