"""Targets that do not count: -100 without being told, another one by an argument."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    STRICT,
    Automatic,
    Model,
    batches_loader,
    choose,
    engine_gradient,
    fit,
    mlp,
    naive_gradient,
    stage_2,
    trainer,
)
from torch import nn

from lightning_ssesam import (
    ERM,
    SAM,
    SSESAM,
    ClassSplit,
    HeadTailAccuracy,
    HeadTailConfusion,
    ImbSAM,
    LongTailClassifier,
    ManyMediumFewAccuracy,
    Term,
)
from lightning_ssesam.batches import one_hot, terms_of_union
from lightning_ssesam.curvature import Hessian, choose_samples
from lightning_ssesam.data import ClassBalancedSampler, LongTailed
from lightning_ssesam.losses import (
    BalancedSoftmaxLoss,
    ClassBalancedLoss,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    VSLoss,
)
from lightning_ssesam.processes import gather_targets
from lightning_ssesam.targets import check_class_indices

pytestmark = STRICT

SPLIT = ClassSplit([50, 40, 30, 6, 5], tail=[3, 4])
COUNTS = [50, 40, 30, 6, 5]
OBJECTIVES = {
    "ERM": lambda i: ERM(ignore_index=i),
    "SAM": lambda i: SAM(0.05, ignore_index=i),
    "ImbSAM": lambda i: ImbSAM(SPLIT, 0.05, 2.0, ignore_index=i),
    "ImbSAM group": lambda i: ImbSAM(SPLIT, 0.05, reduction="group", ignore_index=i),
    "SSESAM 1": lambda i: SSESAM(SPLIT, 0.05, 0.1, ignore_index=i),
    "SSESAM 2": lambda i: stage_2(SSESAM(SPLIT, 0.05, 0.1, ignore_index=i)),
    "SSESAM joint": lambda i: SSESAM(SPLIT, 0.05, 0.1, "joint", ignore_index=i),
}


def ignoring(shape, ignore_index=-100, share=0.3):
    """Targets, some of which are ignored."""
    targets = torch.randint(5, shape)
    targets[torch.rand(shape) < share] = ignore_index
    return targets


def naive_terms(name, targets, ignore_index):
    """The weights and radii of an objective, one position after the other."""
    counted = [y for y in targets.flatten().tolist() if y != ignore_index]
    tails = sum(y in (3, 4) for y in counted)

    def weights(head, tail):
        values = [0.0 if y == ignore_index else tail if y in (3, 4) else head for y in targets.flatten().tolist()]
        return torch.tensor(values, dtype=torch.float64).reshape(targets.shape)

    each = 1 / max(len(counted), 1)
    if name in ("ERM", "SAM", "SSESAM joint"):
        return [Term(weights(each, each), 0.0 if name == "ERM" else 0.05)]
    head, tail, rho, tail_rho = each, each, 0.0, 0.05
    if name == "ImbSAM":
        tail = 2 * each
    elif name == "ImbSAM group":
        head, tail = 1 / max(len(counted) - tails, 1), 1 / max(tails, 1)
    else:
        rho, tail_rho = (0.05 if name == "SSESAM 1" else 0.0), 0.1
    return [Term(weights(head, 0.0), rho), Term(weights(0.0, tail), tail_rho)]


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(
    ("shape", "ignore_index", "dtype"),
    [
        ((12,), -100, torch.int64),
        ((3, 4, 5), -100, torch.int32),
        ((12,), 255, torch.uint8),
        ((2, 3), -1, torch.int8),
        # A class may be ignored, such as the background.
        ((12,), 0, torch.int64),
        ((12,), 4, torch.int64),
    ],
)
def test_terms_equal_their_naive_twin(name, shape, ignore_index, dtype):
    targets = ignoring(shape, ignore_index).to(dtype)
    terms, expected = OBJECTIVES[name](ignore_index).terms(targets), naive_terms(name, targets, ignore_index)
    assert [term.rho for term in terms] == [term.rho for term in expected]
    for term, twin in zip(terms, expected, strict=True):
        torch.testing.assert_close(term.weights, twin.weights, rtol=0, atol=1e-16)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("passes", ["full", "split"])
def test_gradient_equals_its_naive_twin(name, passes, float64):
    net, x, y = mlp(), torch.randn(12, 8), ignoring((12,))
    expected = naive_gradient(net, naive_terms(name, y, -100), x, y)
    gradient = engine_gradient(net, OBJECTIVES[name](-100).terms(y), x, y, passes)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_all_ignored(name, float64):
    targets = torch.full((4,), -100)
    assert all(not term.weights.any() for term in OBJECTIVES[name](-100).terms(targets))
    model = Model(objective=OBJECTIVES[name](-100), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    before = copy.deepcopy(model.net.state_dict())
    run = fit(model, [(torch.randn(4, 8), targets)])
    torch.testing.assert_close(model.net.state_dict(), before, rtol=0, atol=0)
    assert run.callback_metrics["train/loss"] == 0


def test_an_unsigned_target_is_not_taken_for_a_negative_index():
    # In 8 bits, 156 is -100.
    assert ERM().terms(torch.tensor([0, 156], dtype=torch.uint8))[0].weights.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("objective", ["ERM", "SSESAM 1"])
def test_other_values_are_still_refused(objective):
    message = r"`targets` to be class indices in \[0, 5\), but got values from 0 to 255 \(`ignore_index` is -100\)"
    if objective != "ERM":
        with pytest.raises(ValueError, match=message):
            OBJECTIVES[objective](-100).terms(torch.tensor([0, -100, 255]))
    with pytest.raises(ValueError, match=message):
        check_class_indices(torch.tensor([0, -100, 255]), 5)
    for wrong in (0.5, None, "255", True):
        with pytest.raises(ValueError, match="`ignore_index` to be an integer, but got"):
            OBJECTIVES[objective](wrong)


class Pixels(nn.Module):
    """Logits ``(N, 5, H, W)`` of images ``(N, 8, H, W)``."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 5, 1))

    def forward(self, x):
        return self.layers(x)


class Told(Model):
    def __init__(self, *args, ignore_index=-100, smoothing=0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.options = {"ignore_index": ignore_index, "label_smoothing": smoothing}

    def sample_losses(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1], reduction="none", **self.options)


class ToldAutomatic(Automatic):
    def __init__(self, *args, options, **kwargs):
        super().__init__(*args, **kwargs)
        self.options = options

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1], **self.options)
        self.log("train/loss", loss)
        return loss


@pytest.mark.parametrize("ignore_index", [-100, 255])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(8,), (2, 3, 4)])
def test_erm_is_automatic_optimization(ignore_index, smoothing, shape, float64):
    net = mlp() if len(shape) == 1 else Pixels()
    batches = [(torch.randn(shape[0], 8, *shape[1:]), ignoring(shape, ignore_index)) for _ in range(4)]
    objective = ERM() if ignore_index == -100 else ERM(ignore_index=255)
    model = Told(copy.deepcopy(net), objective, ignore_index=ignore_index, smoothing=smoothing)
    run = fit(model, batches)
    plain = ToldAutomatic(net, options=model.options)
    expected = fit(plain, batches)
    torch.testing.assert_close(model.net.state_dict(), plain.net.state_dict(), rtol=0, atol=1e-14)
    actual = run.callback_metrics["train/loss"]
    torch.testing.assert_close(actual, expected.callback_metrics["train/loss"], rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["ERM", "ImbSAM", "SSESAM 1"])
def test_accumulated_batches_share_their_number(name, float64):
    """One update of several batches is that of their union, though the batches ignore different numbers."""
    batches = [
        (torch.randn(n, 8), ignoring((n,), share=share)) for n, share in ((6, 0.0), (6, 0.6), (5, 1.1), (3, 0.5))
    ]
    union = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    model, whole = Model(objective=OBJECTIVES[name](-100)), Model(objective=OBJECTIVES[name](-100))
    whole.net.load_state_dict(model.net.state_dict())
    run = fit(model, batches, accumulate_grad_batches=4)
    once = fit(whole, [union])
    torch.testing.assert_close(model.net.state_dict(), whole.net.state_dict(), rtol=0, atol=1e-14)
    losses = [run.callback_metrics["train/loss"], once.callback_metrics["train/loss"]]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-14)


@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_indices_and_probabilities_in_one_update(ignore_index):
    indices, probabilities = torch.tensor([1, ignore_index, 3]), torch.tensor([[0.5, 0, 0, 0.5, 0]])
    parts = terms_of_union(SSESAM(SPLIT, ignore_index=ignore_index), [indices, probabilities])
    assert [[term.weights.tolist() for term in terms] for terms in parts] == [
        [[1 / 3, 0, 0], [0, 0, 1 / 3]],
        [[0.5 / 3], [0.5 / 3]],
    ]
    ((term,), _) = terms_of_union(ERM(ignore_index=ignore_index), [indices, probabilities])
    assert term.weights.tolist() == [1 / 3, 0, 1 / 3]
    assert one_hot(indices, 5, ignore_index)[1].tolist() == [-math.inf] * 5


def test_samples_of_other_processes_share_the_number():
    mine, theirs = torch.tensor([1, -100, 3]), torch.tensor([-100, 4, 2, -100])
    ((head, tail),) = terms_of_union(SSESAM(SPLIT), [mine], lambda union: ([theirs, union], 1))
    # Two processes, whose gradients are averaged; four samples count.
    assert head.weights.tolist() == [2 / 4, 0, 0]
    assert tail.weights.tolist() == [0, 0, 2 / 4]


def test_another_process_has_probabilities(monkeypatch):
    """Class indices are made probabilities for it, in which an ignored index stays one."""
    mine, theirs = torch.tensor([1, 255, 3]), torch.full((2, 5), 0.2, dtype=torch.float64)

    def all_gather(outputs, tensor, group):
        outputs[0].copy_(tensor)
        if tensor.ndim == 1:
            outputs[1].copy_(torch.tensor(theirs.shape))
        else:
            outputs[1][: len(theirs)] = theirs

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    here, there = gather_targets(mine, None, 255)
    assert torch.equal(there, theirs)
    weights = [term.weights.tolist() for term in ImbSAM(SPLIT, ignore_index=255).terms(torch.cat([here, there]))]
    assert weights == [pytest.approx([0.25, 0, 0, 0.15, 0.15]), pytest.approx([0, 0, 0.25, 0.1, 0.1])]


LOSSES = [LDAMLoss, LogitAdjustedLoss, BalancedSoftmaxLoss, VSLoss, ClassBalancedLoss, FocalLoss]


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("ignore_index", [-100, 255, 2])
@pytest.mark.parametrize("shape", [(12,), (2, 3, 4)])
def test_losses(kind, ignore_index, shape, float64):
    """An ignored position has loss and gradient 0; the mean is over the others, whose losses do not change."""
    make = kind if kind is FocalLoss else lambda **kwargs: kind(COUNTS, **kwargs)
    options = {} if ignore_index == -100 else {"ignore_index": ignore_index}
    logits = torch.randn(shape[0], 5, *shape[1:], requires_grad=True)
    targets = ignoring(shape, ignore_index)
    losses = make(**options)(logits, targets)
    counted = targets != ignore_index
    rows = logits.movedim(1, -1)[counted].detach()
    torch.testing.assert_close(losses[counted], make()(rows, targets[counted]), rtol=0, atol=1e-14)
    assert not losses[~counted].any()
    mean = make(reduction="mean", **options)(logits, targets)
    torch.testing.assert_close(mean, make()(rows, targets[counted]).mean(), rtol=0, atol=1e-14)
    (gradient,) = torch.autograd.grad(mean, logits)
    assert gradient.isfinite().all()
    assert not gradient.movedim(1, -1)[~counted].any()
    assert make(reduction="mean", **options)(logits, torch.full_like(targets, ignore_index)) == 0


def test_the_mean_is_that_of_cross_entropy(float64):
    logits, targets = torch.randn(2, 5, 3, 4), ignoring((2, 3, 4))
    mean = FocalLoss(gamma=0.0, reduction="mean")(logits, targets)
    torch.testing.assert_close(mean, F.cross_entropy(logits, targets), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", [HeadTailAccuracy, ManyMediumFewAccuracy, HeadTailConfusion])
@pytest.mark.parametrize("ignore_index", [-100, 255, 1])
@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize("validate_args", [True, False])
def test_metrics_count_the_others(kind, ignore_index, scores, validate_args):
    options = {} if ignore_index == -100 else {"ignore_index": ignore_index}
    preds, targets = torch.randn(4, 5, 9), ignoring((4, 9), ignore_index)
    counted = targets != ignore_index
    metric, expected = kind(SPLIT, validate_args, **options), kind(SPLIT)
    metric.update(preds if scores else preds.argmax(1), targets)
    expected.update(preds.movedim(1, -1)[counted], targets[counted])
    torch.testing.assert_close(metric.compute(), expected.compute(), rtol=0, atol=0, equal_nan=True)
    assert metric.total.sum() == counted.sum()


def test_metrics_refuse_other_values():
    with pytest.raises(ValueError, match=r"`target` to be class indices in \[0, 5\), but got values from 0 to 255"):
        HeadTailAccuracy(SPLIT).update(torch.tensor([0, 0, 0]), torch.tensor([0, -100, 255]))
    # Predictions of ignored samples may be anything.
    HeadTailAccuracy(SPLIT).update(torch.tensor([0, -100]), torch.tensor([0, -100]))


@pytest.mark.parametrize("ignore_index", [-100, 255])
@pytest.mark.parametrize("loss", [None, nn.CrossEntropyLoss, BalancedSoftmaxLoss])
def test_classifier_hands_it_on(ignore_index, loss, float64):
    """One argument sets the objective, the loss and the metrics; values are those without the ignored samples."""
    options = {} if ignore_index == -100 else {"ignore_index": ignore_index}
    loss = loss and (lambda kind=loss: kind(reduction="none"))
    batches = [(torch.randn(9, 8), ignoring((9,), ignore_index)) for _ in range(3)]
    batches.append((torch.randn(9, 8), torch.full((9,), ignore_index)))
    kept = [(x[y != ignore_index], y[y != ignore_index]) for x, y in batches[:3]]
    models, nets = [], [nn.Linear(8, 5)]
    nets.append(copy.deepcopy(nets[0]))
    for net, given in zip(nets, (options, {}), strict=True):
        models.append(LongTailClassifier(COUNTS, net, SSESAM(), loss and loss(), tail_below=10, **given))
        choose(models[-1], passes="full")
    results = []
    for model, data in zip(models, (batches[:3], kept), strict=True):
        run = trainer()
        with pytest.warns(UserWarning, match="stays in stage 1"):
            run.fit(model, batches_loader(data))
        results.append(run.test(model, batches_loader(batches if data is not kept else kept), verbose=False)[0])
    torch.testing.assert_close(nets[0].state_dict(), nets[1].state_dict(), rtol=0, atol=1e-14)
    assert results[0] == pytest.approx(results[1], abs=1e-12, nan_ok=True)
    assert {"test/loss", "test/acc_tail", "test/tail_to_head"} <= set(results[0])


def test_classifier_refuses_parts_that_disagree():
    message = "`ignore_index` to be 255, which `{}` has, but got -100"
    with pytest.raises(ValueError, match=message.format("objective")):
        LongTailClassifier(COUNTS, nn.Linear(8, 5), SSESAM(ignore_index=255))
    with pytest.raises(ValueError, match=message.format("loss")):
        LongTailClassifier(COUNTS, nn.Linear(8, 5), loss=FocalLoss(ignore_index=255))
    model = LongTailClassifier(COUNTS, nn.Linear(8, 5), SSESAM(ignore_index=255), FocalLoss(), ignore_index=255)
    assert model.objective.ignore_index == model.loss.ignore_index == model.val_metrics[0].ignore_index == 255


def test_texts_that_identify_a_training_stay():
    assert repr(ERM()) == "ERM()"
    assert repr(ERM(ignore_index=255)) == "ERM(ignore_index=255)"
    assert repr(BalancedSoftmaxLoss()) == "BalancedSoftmaxLoss(reduction='none')"
    assert repr(BalancedSoftmaxLoss(ignore_index=255)) == "BalancedSoftmaxLoss(ignore_index=255, reduction='none')"


def test_class_counts_from_labels():
    assert ClassSplit.from_labels([0, -100, 0, 1, -100], tail_below=2).class_counts.tolist() == [2, 1]
    masks = torch.tensor([0, 0, 1, 255], dtype=torch.uint8)
    assert ClassSplit.from_labels(masks, ignore_index=255, tail_below=2).class_counts.tolist() == [2, 1]
    assert ClassSplit.from_labels(masks, num_classes=2, ignore_index=255, tail=[1]).class_counts.tolist() == [2, 1]
    with pytest.raises(ValueError, match=r"`labels` to be .*, but got only -100, which is ignored"):
        ClassSplit.from_labels([-100], tail_below=2)


def test_samples_without_a_class_are_never_drawn():
    labels = torch.tensor([-100, 0, 0, 0, -100, 1, 0, -100])
    sampler = ClassBalancedSampler(labels, num_samples=400)
    assert sampler.class_counts.tolist() == [4, 1]
    assert set(sampler) == {1, 2, 3, 5, 6}
    assert len(ClassBalancedSampler(labels)) == 5
    told = ClassBalancedSampler(labels.where(labels >= 0, torch.tensor(255)), num_samples=400, ignore_index=255)
    assert list(told) == list(sampler)
    data = torch.utils.data.TensorDataset(torch.arange(8.0), labels)
    tailed = LongTailed(data, imbalance_factor=4)
    assert tailed.class_counts == [4, 1]
    assert sorted(tailed.indices.tolist()) == [1, 2, 3, 5, 6]
    chosen = choose_samples(data, torch.utils.data.default_collate, ClassSplit([4, 1], [1]), ["all", "tail"], samples=8)
    assert [chosen[group][0][0].tolist() for group in ("all", "tail")] == [[1, 2, 3, 5, 6], [5]]


def test_curvature(float64):
    net, x, y = mlp(), torch.randn(9, 8), ignoring((9,))
    model = Model(net)
    hessian = Hessian(model, [(x, y)], classes=torch.ones(5, dtype=torch.bool))
    assert hessian.weight == (y != -100).sum()
    assert hessian.loss() == pytest.approx(F.cross_entropy(net(x), y).item(), abs=1e-14)
    model.objective = ERM(ignore_index=255)
    told = Hessian(model, [(x[y >= 0], y[y >= 0]), (x, torch.full_like(y, 255))], classes=SPLIT.head)
    assert told.loss() == pytest.approx(Hessian(model, [(x[y >= 0], y[y >= 0])], classes=SPLIT.head).loss(), abs=1e-14)
