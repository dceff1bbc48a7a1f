"""Calibration by group: against torchmetrics, numbers worked out by hand, and a naive twin."""

import copy
import pickle

import matplotlib as mpl
import pytest
import torch
from helpers import STRICT
from torch import multiprocessing, tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassCalibrationError

from lightning_ssesam import ClassSplit, GroupCalibrationError, HeadTailAccuracy
from lightning_ssesam.calibration import top_probabilities

pytestmark = STRICT

SPLIT = ClassSplit([500, 300, 50, 30, 5, 4], tail=[3, 4, 5])
GROUPS = {
    "head": [0, 1, 2],
    "tail": [3, 4, 5],
    "many": [0, 1],
    "medium": [2, 3],
    "few": [4, 5],
    "all": [0, 1, 2, 3, 4, 5],
}


def batch(n=60, classes=6):
    target = torch.randint(classes, (n,))
    return 2 * torch.randn(n, 6) + 2 * torch.eye(6)[target], target


def naive(probabilities, target, classes, n_bins=15):
    """The error of the samples of some classes, one bin at a time, in float64."""
    chosen = [i for i, t in enumerate(target.tolist()) if t in classes]
    confidence = [max(probabilities[i].double().tolist()) for i in chosen]
    hit = [float(probabilities[i].argmax() == target[i]) for i in chosen]
    error = 0.0
    for k in range(n_bins):
        inside = [
            j for j, p in enumerate(confidence) if k / n_bins <= p < (k + 1) / n_bins or (p == 1 and k + 1 == n_bins)
        ]
        error += abs(sum(hit[j] - confidence[j] for j in inside)) / len(chosen)
    return error


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize("n_bins", [1, 7, 15])
def test_equals_torchmetrics_on_the_samples_of_each_group(norm, n_bins):
    metric, (scores, target) = GroupCalibrationError(SPLIT, n_bins, norm), batch(200)
    for start in range(0, 200, 33):
        metric.update(scores[start : start + 33], target[start : start + 33])
    values = metric.compute()
    assert list(values) == list(GROUPS) == metric.names()
    for group, classes in GROUPS.items():
        chosen = torch.isin(target, tensor(classes))
        expected = MulticlassCalibrationError(6, n_bins, norm)(scores[chosen].softmax(1), target[chosen])
        assert values[group] == pytest.approx(float(expected), abs=1e-6)


def test_equals_its_naive_twin():
    (scores, target), metric = batch(300), GroupCalibrationError(SPLIT)
    values = metric(scores, target)
    for group, classes in GROUPS.items():
        assert values[group].item() == pytest.approx(naive(scores.softmax(1), target, classes), abs=1e-6)


def test_by_hand():
    """Two bins. Head: 0.6 right, 0.8 wrong, 0.9 right. Tail: 0.7 wrong, and 1.0 right."""
    metric = GroupCalibrationError(ClassSplit([200, 5], tail=[1]), n_bins=2)
    first = tensor([0.6, 0.2, 0.9, 0.7, 0.0])
    metric.update(torch.stack([first, 1 - first], 1), tensor([0, 0, 0, 1, 1]))
    values = {name: value.item() for name, value in metric.compute().items()}
    head = abs(2 / 3 - 2.3 / 3)
    # torchmetrics gives the confidence 1 a bin of its own.
    tail = 0.7 / 2
    everything = abs(2 / 4 - 3.0 / 4) * 4 / 5
    expected = {"head": head, "tail": tail, "many": head, "medium": float("nan"), "few": tail, "all": everything}
    assert values == pytest.approx(expected, nan_ok=True)
    samples, confidence, accuracy = metric.reliability("all")
    assert samples.tolist() == [0, 5]
    assert confidence.tolist() == pytest.approx([float("nan"), 4.0 / 5], nan_ok=True)
    assert accuracy.tolist() == pytest.approx([float("nan"), 3 / 5], nan_ok=True)
    assert metric.reliability("tail").accuracy[1] == 0.5
    assert metric.reliability("medium").samples.tolist() == [0, 0]


def test_the_diagram_adds_up_to_the_error():
    (scores, target), metric = batch(500), GroupCalibrationError(SPLIT, n_bins=10)
    values = metric(scores, target)
    for group, classes in GROUPS.items():
        samples, confidence, accuracy = metric.reliability(group)
        assert samples.sum() == torch.isin(target, tensor(classes)).sum()
        gaps = (samples * (confidence - accuracy).abs()).nan_to_num()
        assert (gaps.sum() / samples.sum()).item() == pytest.approx(values[group].item(), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_and_probabilities_are_told_apart(dtype):
    scores, _ = batch(50)
    expected = scores.to(dtype).float().softmax(1).amax(1)
    tolerance = 0.005 if dtype == torch.bfloat16 else 1e-6
    for given in (scores.to(dtype), scores.to(dtype).softmax(1)):
        torch.testing.assert_close(top_probabilities(given), expected, rtol=0, atol=tolerance)
    # An untrained classifier has logits of 0, which are in [0, 1] and no probabilities.
    assert top_probabilities(torch.zeros(3, 4, dtype=dtype)).tolist() == [0.25] * 3
    assert top_probabilities(torch.rand(3, 4) / 100).tolist() == pytest.approx([0.25] * 3, abs=0.01)
    # Logits may add up to 1, too.
    expected = tensor([[2.0, -1.0]]).softmax(1).amax(1)
    torch.testing.assert_close(top_probabilities(tensor([[2.0, -1.0]], dtype=dtype)), expected)
    assert top_probabilities(torch.full((1, 2), 1e30, dtype=dtype)).tolist() == [0.5]


def test_dense_targets_and_ignored_ones():
    scores, target = torch.randn(3, 6, 4, 4), torch.randint(6, (3, 4, 4))
    target[:, 0] = 255
    metric = GroupCalibrationError(SPLIT, ignore_index=255)
    values = metric(scores, target)
    kept = target.flatten() != 255
    flat = scores.movedim(1, -1).reshape(-1, 6)[kept]
    expected = GroupCalibrationError(SPLIT)(flat, target.flatten()[kept])
    assert {k: v.item() for k, v in values.items()} == pytest.approx({k: v.item() for k, v in expected.items()})
    assert metric.reliability("all").samples.sum() == kept.sum() == metric.total.sum()


def test_nan_scores_make_their_groups_nan():
    scores, target = batch(40)
    scores[target == 4, 2] = float("nan")
    values = GroupCalibrationError(SPLIT)(scores, target)
    assert {name for name, value in values.items() if value.isnan()} == {"tail", "few", "all"}


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_what_was_not_counted_is_nan():
    metric = GroupCalibrationError(SPLIT)
    assert all(value.isnan() for value in metric.compute().values())
    metric = GroupCalibrationError(SPLIT)
    metric.update(torch.empty(0, 6), torch.empty(0, dtype=torch.long))
    assert all(value.isnan() for value in metric.compute().values())
    assert metric.reliability("all").samples.tolist() == [0] * 15


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_alone(name):
    metric, whole = GroupCalibrationError(SPLIT).group(name), GroupCalibrationError(SPLIT)
    for _ in range(2):
        scores, target = batch()
        assert metric(scores, target) == whole(scores, target)[name]
    for twin in (metric, copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), whole.view(name)):
        assert twin.compute() == whole.compute()[name]
    assert not metric.higher_is_better


def test_a_collection_of_groups_keeps_the_samples_once():
    kinds = {name: GroupCalibrationError(SPLIT).group(name) for name in ("head", "tail")}
    collection = MetricCollection({**kinds, "accuracy": HeadTailAccuracy(SPLIT).group("tail")})
    whole = GroupCalibrationError(SPLIT)
    for _ in range(3):
        scores, target = batch()
        collection.update(scores, target)
        whole.update(scores, target)
    found, expected = collection.compute(), whole.compute()
    assert (found["head"], found["tail"]) == (expected["head"], expected["tail"])
    assert sorted(map(len, collection.compute_groups.values())) == [1, 2]


def test_plot():
    mpl.use("Agg")
    metric = GroupCalibrationError(SPLIT)
    metric.update(*batch())
    _, ax = metric.plot()
    drawn = [float(line.get_ydata()[0]) for line in ax.lines]
    assert all(any(abs(y - value.item()) < 1e-6 for y in drawn) for value in metric.compute().values())


def _in_process(rank, port, results):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    metric = GroupCalibrationError(SPLIT)
    torch.manual_seed(0)
    for scores, target in [batch(), batch(11)]:
        # The second process has no samples at all.
        if rank == 0:
            metric.update(scores, target)
    results[rank] = {name: value.item() for name, value in metric.compute().items()}
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_a_process_may_have_no_samples(free_port):
    whole = GroupCalibrationError(SPLIT)
    torch.manual_seed(0)
    for scores, target in [batch(), batch(11)]:
        whole.update(scores, target)
    expected = {name: value.item() for name, value in whole.compute().items()}
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.start_processes(_in_process, (free_port, results), nprocs=2, start_method="fork")
        assert results[0] == pytest.approx(expected)
        assert results[1] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupCalibrationError(SPLIT, n_bins=0), "`n_bins` to be an integer >= 1, but got 0"),
        (lambda: GroupCalibrationError(SPLIT, norm="l3"), "`norm` to be one of 'l1', 'l2', 'max', but got 'l3'"),
        (lambda: GroupCalibrationError(3), "`split` to be a ClassSplit, but got 3"),
        (
            lambda: GroupCalibrationError(SPLIT, validate_args=False).update(tensor([0]), tensor([0])),
            "`preds` to be scores, such as logits: class indices have no confidence, but got torch.int64",
        ),
        (
            lambda: GroupCalibrationError(SPLIT).update(torch.rand(2, 5), tensor([0, 1])),
            r"`preds` to be scores of shape \(2, 6\), but got shape \(2, 5\)",
        ),
        (lambda: GroupCalibrationError(SPLIT).reliability("x"), "`group` to be one of 'head', 'tail', 'many'"),
        (lambda: GroupCalibrationError(SPLIT).group("x"), "`name` to be one of 'head', 'tail', 'many'"),
        (
            lambda: GroupCalibrationError(ClassSplit([90, 20], tail=[1])).group("many"),
            "`name` to be a group with classes, but got 'many'",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
