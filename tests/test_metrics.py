import copy

import matplotlib as mpl
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, recall_score
from torch import multiprocessing, tensor

from lightning_ssesam import ClassSplit, HeadTailAccuracy, HeadTailConfusion, ManyMediumFewAccuracy

SPLIT = ClassSplit([500, 300, 50, 30, 5, 4], tail=[3, 4, 5])


def naive(preds, target, groups):
    """Mean over the classes that occurred of their recall, one sample at a time."""
    result = {}
    for name, mask in groups.items():
        recalls = []
        for k in mask.nonzero().flatten().tolist():
            hits = [int(p) == k for p, t in zip(preds, target, strict=True) if int(t) == k]
            if hits:
                recalls.append(sum(hits) / len(hits))
        result[name] = sum(recalls) / len(recalls) if recalls else float("nan")
    return result


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("missing", [[], [2], [0, 5]])
def test_all_is_balanced_accuracy_and_macro_recall(missing):
    """The names of other libraries for these numbers; scikit-learn leaves classes without samples out of the first."""
    torch.manual_seed(0)
    target = torch.randint(6, (200,))
    target = target[~torch.isin(target, tensor(missing))]
    preds = torch.where(torch.rand(len(target)) < 0.5, target, torch.randint(6, target.shape))
    metric = HeadTailAccuracy(SPLIT)
    metric.update(preds, target)
    found = metric.compute()
    assert found["all"].item() == pytest.approx(balanced_accuracy_score(target, preds), abs=1e-6)
    few = ManyMediumFewAccuracy(SPLIT)
    few.update(preds, target)
    for name, mask in {
        "head": SPLIT.head,
        "tail": SPLIT.tail,
        "all": SPLIT.head | SPLIT.tail,
        "few": SPLIT.few,
    }.items():
        labels = [k for k in mask.nonzero().flatten().tolist() if k not in missing]
        expected = recall_score(target, preds, labels=labels, average="macro")
        value = few.compute()["few"] if name == "few" else found[name]
        assert value.item() == pytest.approx(expected, abs=1e-6)
    if not missing:
        assert found["all"].item() == pytest.approx(recall_score(target, preds, average="macro"), abs=1e-6)


GROUPS = {
    HeadTailAccuracy: {"head": SPLIT.head, "tail": SPLIT.tail, "all": SPLIT.head | SPLIT.tail},
    ManyMediumFewAccuracy: {
        "many": SPLIT.many,
        "medium": SPLIT.medium,
        "few": SPLIT.few,
        "all": SPLIT.head | SPLIT.tail,
    },
}


@pytest.mark.parametrize("metric_class", GROUPS)
@pytest.mark.parametrize("classes", [6, 4, 2])
@pytest.mark.parametrize("scores", [True, False])
def test_equals_naive_twin_over_batches(metric_class, classes, scores):
    target, logits = torch.randint(classes, (60,)), torch.randn(60, 6)
    logits[torch.arange(60), target] += 1
    metric = metric_class(SPLIT)
    for batch in range(0, 60, 13):
        chosen = logits[batch : batch + 13]
        metric.update(chosen if scores else chosen.argmax(1), target[batch : batch + 13])
    expected = naive(logits.argmax(1), target, GROUPS[metric_class])
    value = metric.compute()
    assert list(value) == list(expected)
    assert {k: v.item() for k, v in value.items()} == pytest.approx(expected, nan_ok=True)


def test_group_without_samples_is_nan():
    metric = HeadTailAccuracy(SPLIT)
    metric.update(tensor([0, 1]), tensor([0, 0]))
    value = metric.compute()
    assert value["head"] == 0.5
    assert value["tail"].isnan()
    assert value["all"] == 0.5
    metric.reset()
    metric.update(torch.empty(0, 6), torch.empty(0, dtype=torch.long))
    assert all(v.isnan() for v in metric.compute().values())


def test_nan_scores_are_wrong():
    metric = HeadTailAccuracy(SPLIT)
    metric.update(torch.full((3, 6), float("nan")), tensor([0, 1, 3]))
    assert all(value == 0 for value in metric.compute().values())


def test_dense_and_forward_and_reset():
    metric = HeadTailAccuracy(SPLIT)
    target = torch.randint(6, (2, 4, 4))
    scores = torch.randn(2, 6, 4, 4)
    value = metric(scores, target)
    expected = naive(scores.argmax(1).flatten(), target.flatten(), GROUPS[HeadTailAccuracy])
    assert {k: v.item() for k, v in value.items()} == pytest.approx(expected)
    metric.reset()
    metric.update(target, target)
    assert metric.compute()["all"] == 1


def _count_in_process(rank, port, results):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    metric = HeadTailAccuracy(SPLIT)
    # Rank 0 sees head classes alone, rank 1 a tail class and an uneven number of samples.
    target = tensor([0, 0, 1]) if rank == 0 else tensor([3, 3, 3, 3, 0])
    preds = tensor([0, 2, 1]) if rank == 0 else tensor([3, 3, 3, 0, 0])
    metric.update(preds, target)
    results[rank] = {k: v.item() for k, v in metric.compute().items()}
    torch.distributed.destroy_process_group()


def test_two_processes_that_see_different_classes(free_port):
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        # Forked, they need no imports; nothing here has used threads.
        multiprocessing.start_processes(_count_in_process, (free_port, results), nprocs=2, start_method="fork")
        expected = {"head": (2 / 3 + 1) / 2, "tail": 0.75, "all": (2 / 3 + 1 + 0.75) / 3}
        assert results[0] == pytest.approx(expected)
        assert results[1] == pytest.approx(expected)


@pytest.mark.parametrize("metric_class", GROUPS)
def test_plot(metric_class):
    mpl.use("Agg")
    metric = metric_class(SPLIT)
    metric.update(tensor([0, 3, 4]), tensor([0, 3, 5]))
    _, ax = metric.plot()
    drawn = [line.get_ydata()[0] for line in ax.lines]
    expected = [v.item() for v in metric.compute().values() if not v.isnan()]
    assert all(any(abs(float(y) - value) < 1e-6 for y in drawn) for value in expected)
    metric.plot([metric.compute(), metric.compute()], ax=ax)


def test_copies():
    metric = HeadTailAccuracy(SPLIT)
    metric.update(tensor([0]), tensor([0]))
    assert copy.deepcopy(metric).compute()["head"] == 1


@pytest.mark.parametrize(
    ("preds", "target", "message"),
    [
        (torch.rand(3, 5), tensor([0, 1, 2]), r"`preds` to be scores of shape \(3, 6\), but got shape \(3, 5\)"),
        (torch.rand(2, 6), tensor([0, 1, 2]), r"`preds` to be scores of shape \(3, 6\), but got shape \(2, 6\)"),
        (tensor([0, 1]), tensor([0, 1, 2]), r"`preds` to be class indices of shape \(3,\), but got shape \(2,\)"),
        (tensor([0, 6]), tensor([0, 1]), r"`preds` to be class indices in \[0, 6\), but got values from 0 to 6"),
        (tensor([0, 1]), tensor([0, 6]), r"`target` to be class indices in \[0, 6\), but got values from 0 to 6"),
        (tensor([0, 1]), tensor([0, -1]), r"`target` to be class indices in \[0, 6\), but got values from -1 to 0"),
        (tensor([0, 1]), tensor([0.0, 1.0]), "`target` to be class indices of an integer dtype"),
    ],
)
def test_bad_batches(preds, target, message):
    with pytest.raises(ValueError, match=message):
        HeadTailAccuracy(SPLIT).update(preds, target)


def test_bad_split():
    with pytest.raises(ValueError, match=r"`split` to be a ClassSplit, but got \[1, 2\]"):
        HeadTailAccuracy([1, 2])


class TestConfusion:
    @pytest.mark.parametrize("classes", [6, 4, 2])
    @pytest.mark.parametrize("scores", [True, False])
    def test_equals_naive_twin_over_batches(self, classes, scores):
        target, logits = torch.randint(classes, (80,)), torch.randn(80, 6)
        metric = HeadTailConfusion(SPLIT)
        for start in range(0, 80, 13):
            chosen = logits[start : start + 13]
            metric.update(chosen if scores else chosen.argmax(1), target[start : start + 13])
        preds, groups = logits.argmax(1).tolist(), {"head": SPLIT.head.tolist(), "tail": SPLIT.tail.tolist()}
        for source, mask in groups.items():
            for name, is_in_group in groups.items():
                shares = []
                for k in [k for k in range(6) if mask[k] and k in target]:
                    predicted = [p for p, t in zip(preds, target.tolist(), strict=True) if t == k]
                    shares.append(sum(p != k and is_in_group[p] for p in predicted) / len(predicted))
                expected = sum(shares) / len(shares) if shares else float("nan")
                assert metric.compute()[f"{source}_to_{name}"].item() == pytest.approx(expected, nan_ok=True)

    def test_shares_and_accuracy_make_one(self):
        target, preds = torch.randint(6, (200,)), torch.randint(6, (200,))
        accuracy, confusion = HeadTailAccuracy(SPLIT)(preds, target), HeadTailConfusion(SPLIT)(preds, target)
        for group in ("head", "tail"):
            total = accuracy[group] + confusion[f"{group}_to_head"] + confusion[f"{group}_to_tail"]
            assert total.item() == pytest.approx(1)

    def test_nan_is_an_error_of_no_kind(self):
        scores = torch.tensor([[float("nan"), 0, 0, 0, 0, 0.0], [1, 0, 0, 0, 0, 0.0]])
        value = HeadTailConfusion(SPLIT)(scores, tensor([1, 1]))
        assert value["head_to_head"] == 0.5
        assert value["head_to_tail"] == 0
        assert value["tail_to_head"].isnan()

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="`split` to be a ClassSplit, but got 3"):
            HeadTailConfusion(3)
        with pytest.raises(ValueError, match="`target` to be class indices in \\[0, 6\\)"):
            HeadTailConfusion(SPLIT).update(tensor([0]), tensor([6]))
