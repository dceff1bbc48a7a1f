"""Mean average precision of groups of labels, beside a plain version."""

import copy

import matplotlib as mpl
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import multiprocessing, tensor
from torchmetrics import MetricCollection

from lightning_ssesam import ClassSplit, GroupAveragePrecision, HeadTailAccuracy, HeadTailConfusion

SPLIT = ClassSplit([500, 300, 50, 30, 5, 0], tail=[3, 4], multi_label=True)
GROUPS = {"head": [0, 1, 2], "tail": [3, 4, 5], "many": [0, 1], "medium": [2, 3], "few": [4, 5], "all": range(6)}


def naive(scores, target, ignore_index=-100):
    """Mean over the labels of the mean, over their yeses, of the precision among all that rank as high."""
    precisions = {}
    for label in range(6):
        rows = [(s, t) for s, t in zip(scores[:, label].tolist(), target[:, label].tolist(), strict=True)]
        rows = [(s, int(t)) for s, t in rows if t != ignore_index]
        yeses = [s for s, t in rows if t]
        if yeses:
            precisions[label] = sum(
                sum(t for s, t in rows if s >= yes) / sum(s >= yes for s, _ in rows) for yes in yeses
            ) / len(yeses)
    result = {}
    for name, members in GROUPS.items():
        found = [precisions[label] for label in members if label in precisions]
        result[name] = sum(found) / len(found) if found else float("nan")
    return result


def batch(n=60, missing=0.0):
    target = (torch.rand(n, 6) < tensor([0.5, 0.4, 0.3, 0.2, 0.1, 0.1])).long()
    scores = torch.randn(n, 6) + target
    return scores, target.masked_fill(torch.rand(n, 6) < missing, -100)


def values_of(metric):
    return {name: value.item() for name, value in metric.compute().items()}


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.int8])
def test_equals_naive_twin_over_batches(missing, dtype):
    scores, target = batch(missing=missing)
    # Some samples have the same score.
    scores = scores.mul(4).round().div(4)
    metric = GroupAveragePrecision(SPLIT)
    for start in range(0, 60, 13):
        metric.update(scores[start : start + 13], target[start : start + 13].to(dtype))
    assert list(metric.compute()) == list(GROUPS) == metric.names()
    assert values_of(metric) == pytest.approx(naive(scores, target))
    if not missing:
        expected = [average_precision_score(target[:, label], scores[:, label]) for label in range(6)]
        assert metric.label_precisions().tolist() == pytest.approx(expected)


def test_by_hand():
    metric = GroupAveragePrecision(ClassSplit([9, 2], tail=[1], multi_label=True))
    # Yeses at ranks 1 and 3 of label 0, and at rank 2 of label 1.
    metric.update(tensor([[0.9, 0.1], [0.5, 0.8], [0.4, 0.7]]), tensor([[1, 0], [0, 0], [1, 1]]))
    expected = {"head": (1 + 2 / 3) / 2, "tail": 1 / 2, "all": (1 + 2 / 3 + 1) / 4}
    assert {name: values_of(metric)[name] for name in expected} == pytest.approx(expected)


def test_scores_far_from_0_keep_their_order():
    """In float32 the sigmoid of 20 and 30 is 1."""
    metric = GroupAveragePrecision(ClassSplit([9], tail=[], multi_label=True))
    metric.update(tensor([[30.0], [20.0], [-200.0]]), tensor([[1], [0], [1]]))
    assert values_of(metric)["all"] == pytest.approx((1 + 2 / 3) / 2)
    metric.reset()
    metric.update(tensor([[0.9]]), tensor([[0]]))
    metric.update(tensor([[5.0], [0.2]]), tensor([[0], [1]]))
    assert values_of(metric)["all"] == pytest.approx(1 / 3)


def test_groups_without_a_yes_are_nan_and_left_out():
    scores, target = batch()
    target[:, 3:] = 0
    metric = GroupAveragePrecision(SPLIT)
    metric.update(scores, target)
    found = values_of(metric)
    assert found == pytest.approx(naive(scores, target), nan_ok=True)
    assert metric.compute()["tail"].isnan()
    assert metric.label_precisions()[3:].isnan().all()
    metric.reset()
    metric.update(torch.empty(0, 6), torch.empty(0, 6))
    assert all(value.isnan() for value in metric.compute().values())
    assert GroupAveragePrecision(ClassSplit([500, 400], tail=[1], multi_label=True)).empty_groups() == ["medium", "few"]


def test_nan_scores_rank_last():
    metric = GroupAveragePrecision(ClassSplit([9], tail=[], multi_label=True))
    metric.update(tensor([[float("nan")], [-1e9], [0.0]]), tensor([[1], [0], [0]]))
    assert values_of(metric)["all"] == pytest.approx(1 / 3)


def test_forward_group_view_and_collection():
    scores, target = batch()
    metric = GroupAveragePrecision(SPLIT)
    first = metric(scores[:30], target[:30])
    assert {k: v.item() for k, v in first.items()} == pytest.approx(naive(scores[:30], target[:30]), nan_ok=True)
    metric(scores[30:], target[30:])
    expected, view = naive(scores, target), metric.view("tail")
    assert values_of(metric) == pytest.approx(expected)
    assert view.compute().item() == pytest.approx(expected["tail"])
    groups = MetricCollection({name: metric.group(name) for name in ("head", "few")})
    groups.update(scores, target)
    assert {k: v.item() for k, v in groups.compute().items()} == pytest.approx(
        {name: expected[name] for name in ("head", "few")}
    )
    twin = copy.deepcopy(metric)
    metric.reset()
    assert values_of(twin) == pytest.approx(expected)
    with pytest.raises(ValueError, match="`name` to be a group with classes, but got 'few', which has none"):
        GroupAveragePrecision(ClassSplit([500, 400], tail=[1], multi_label=True)).group("few")


def _count_in_process(rank, port, results, scores, target):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    metric = GroupAveragePrecision(SPLIT)
    # One process has a single batch, the other one two.
    for rows in [slice(0, 10)] if rank == 0 else [slice(10, 37), slice(37, 60)]:
        metric.update(scores[rows], target[rows])
    results[rank] = values_of(metric)
    torch.distributed.destroy_process_group()


def test_two_processes_rank_all_samples_together(free_port):
    scores, target = batch(missing=0.1)
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        arguments = (free_port, results, scores, target)
        multiprocessing.start_processes(_count_in_process, arguments, nprocs=2, start_method="fork")
        for rank in (0, 1):
            assert results[rank] == pytest.approx(naive(scores, target))


def test_plot():
    mpl.use("Agg")
    metric = GroupAveragePrecision(SPLIT)
    metric.update(*batch())
    _, ax = metric.plot()
    drawn = [line.get_ydata()[0] for line in ax.lines]
    assert drawn == pytest.approx(list(values_of(metric).values()))


@pytest.mark.parametrize(
    ("preds", "target", "message"),
    [
        (
            torch.zeros(2, 5),
            torch.zeros(2, 5),
            r"`preds` to be scores \(N, 6\) of a floating dtype, but got shape \(2, 5",
        ),
        (
            torch.zeros(2, 6, dtype=torch.long),
            torch.zeros(2, 6),
            r"floating dtype, but got shape \(2, 6\) of torch.int64",
        ),
        (
            torch.zeros(2, 6),
            torch.zeros(2),
            r"`target` to be multi-label targets of shape \(2, 6\), but got shape \(2,",
        ),
        (torch.zeros(1, 6), torch.full((1, 6), 2), "`target` to be 0, 1 or `ignore_index` for each label, but got 2"),
        (torch.zeros(1, 6), torch.full((1, 6), 0.5), "but got 0.5"),
    ],
)
def test_bad_batches(preds, target, message):
    with pytest.raises(ValueError, match=message):
        GroupAveragePrecision(SPLIT).update(preds, target)


def test_bad_splits():
    for kind in (HeadTailAccuracy, HeadTailConfusion):
        with pytest.raises(
            ValueError, match=f"without `multi_label` for {kind.__name__} .GroupAveragePrecision is for"
        ):
            kind(SPLIT)
    with pytest.raises(ValueError, match="one with `multi_label` for GroupAveragePrecision"):
        GroupAveragePrecision(ClassSplit([2, 1], tail=[1]))
    with pytest.raises(ValueError, match="`ignore_index` to be an integer outside"):
        GroupAveragePrecision(SPLIT, ignore_index=1)
