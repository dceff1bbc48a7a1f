import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch

from lightning_ssesam import ClassSplit
from lightning_ssesam.split import as_labels


def test_masks():
    split = ClassSplit([500, 101, 100, 20, 19], tail=[3, 4])
    assert split.class_counts.tolist() == [500, 101, 100, 20, 19]
    assert split.class_counts.dtype == torch.int64
    assert split.num_classes == 5
    assert split.tail.tolist() == [False, False, False, True, True]
    assert split.head.tolist() == [True, True, True, False, False]
    assert split.many.tolist() == [True, True, False, False, False]
    assert split.medium.tolist() == [False, False, True, True, False]
    assert split.few.tolist() == [False, False, False, False, True]


def test_published_thresholds_of_cifar10_lt():
    split = ClassSplit.from_counts([5000, 1000, 999, 200, 199], tail_below=200, many_above=1000, few_below=200)
    assert split.many.tolist() == [True, False, False, False, False]
    assert split.few.tolist() == [False, False, False, False, True]


@pytest.mark.parametrize(
    "tail",
    [[1, 2], (2, 1), torch.tensor([1, 2]), np.array([2, 1, 1]), [False, True, True], torch.tensor([0, 1, 1]).bool()],
)
def test_tail_as_mask_or_indices(tail):
    assert ClassSplit([9, 2, 1], tail=tail).tail.tolist() == [False, True, True]


def test_counts_of_any_integer_type():
    assert ClassSplit(np.array([300, 2], dtype=np.uint16), tail=[1]).class_counts.tolist() == [300, 2]
    assert ClassSplit(torch.tensor([3.0, 2.0]), tail=[1]).class_counts.tolist() == [3, 2]


def test_empty_tail():
    assert not ClassSplit([3, 2], tail=[]).tail.any()


def test_tail_below():
    assert ClassSplit.from_counts([500, 100, 99], tail_below=100).tail.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("counts", "fraction", "tail"),
    [
        ([50, 30, 10, 10], 0.2, [2, 3]),
        ([50, 30, 10, 10], 0.1, [3]),
        ([50, 30, 10, 10], 0.09, []),
        ([10, 50, 10, 30], 0.2, [0, 2]),
        # 0.29 * 100 is 28.999999999999996 in floating point.
        ([71, 29], 0.29, [1]),
        ([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50], 0.1, [5, 6, 7, 8, 9]),
    ],
)
def test_tail_fraction(counts, fraction, tail):
    assert ClassSplit.from_counts(counts, tail_fraction=fraction).tail.nonzero().flatten().tolist() == tail


def test_from_labels():
    labels = [0, 0, 0, 1, 1, 2]
    assert ClassSplit.from_labels(labels, tail_below=2).class_counts.tolist() == [3, 2, 1]
    assert ClassSplit.from_labels(torch.tensor(labels), tail=[0]).tail.tolist() == [True, False, False]
    assert ClassSplit.from_labels(np.array(labels), num_classes=3, tail_fraction=0.2).tail.tolist() == [0, 0, 1]


def test_counts_are_copied_and_frozen():
    counts = torch.tensor([3, 2])
    split = ClassSplit(counts, tail=[1])
    counts[0] = 7
    assert split.class_counts.tolist() == [3, 2]
    with pytest.raises(dataclasses.FrozenInstanceError):
        split.many_above = 5


def test_copies_and_pickles():
    split = ClassSplit([3, 2], tail=[1], many_above=2, few_below=1)
    split.tail_on(torch.device("cpu"))
    for twin in (copy.deepcopy(split), pickle.loads(pickle.dumps(split))):
        assert twin.tail.tolist() == [False, True]
        assert twin.many.tolist() == [True, False]
    assert repr(split) == "ClassSplit(num_classes=2, samples=5, tail=[1])"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassSplit([3, 0], tail=[1]), "`class_counts` to be integers >= 1 for every class, but got 0 for"),
        (lambda: ClassSplit([3, -2], tail=[1]), "`class_counts` to be integers >= 1 for every class, but got -2 for"),
        (lambda: ClassSplit([3.5, 2], tail=[1]), "`class_counts` to be a vector of integers >= 1, but got"),
        (lambda: ClassSplit([float("nan"), 2], tail=[1]), "`class_counts` to be a vector of integers >= 1, but got"),
        (lambda: ClassSplit([float("inf"), 2], tail=[1]), "`class_counts` to be a vector of integers >= 1, but got"),
        (lambda: ClassSplit([3, 2], tail=[True, 0]), r"`tail` to be a boolean mask or .*, but got \[True, 0\]"),
        (lambda: ClassSplit([], tail=[]), "`class_counts` to be a non-empty vector"),
        (lambda: ClassSplit([[1, 2]], tail=[1]), "`class_counts` to be a non-empty vector"),
        (lambda: ClassSplit("many", tail=[1]), "`class_counts` to be a vector of integers >= 1, but got 'many'"),
        (lambda: ClassSplit([3, 2], tail=[True]), r"`tail` to be a mask of shape \(2,\), one per class, but got"),
        (lambda: ClassSplit([3, 2], tail=[2]), r"`tail` to be class indices in \[0, 2\), but got \[2\]"),
        (lambda: ClassSplit([3, 2], tail=[-1]), r"`tail` to be class indices in \[0, 2\), but got \[-1\]"),
        (lambda: ClassSplit([3, 2], tail=[0.5]), "`tail` to be a boolean mask or a vector of class indices"),
        (lambda: ClassSplit([3, 2], tail="last"), "`tail` to be a boolean mask or a vector of class indices"),
        (lambda: ClassSplit([3, 2], tail=[1], many_above=-1), "`many_above` to be an integer >= 0, but got -1"),
        (lambda: ClassSplit([3, 2], tail=[1], many_above=5, few_below=7), "`few_below` to be at most many_above"),
        (lambda: ClassSplit.from_counts([3, 2]), "exactly one of the arguments `tail_below` and `tail_fraction`"),
        (lambda: ClassSplit.from_counts([3, 2], 1, 0.5), "exactly one of the arguments"),
        (lambda: ClassSplit.from_counts([3, 2], tail_below=0), "`tail_below` to be an integer >= 1, but got 0"),
        (lambda: ClassSplit.from_counts([3, 2], tail_fraction=1.0), "`tail_fraction` to be a number strictly between"),
        (
            lambda: ClassSplit.from_labels([0, 2], tail_below=3),
            r"`labels` to be labels of every class, but got none of the classes \[1\]",
        ),
        (
            lambda: ClassSplit.from_labels([0, 1], num_classes=1, tail_below=3),
            r"`labels` to be class indices in \[0, 1\)",
        ),
        (lambda: ClassSplit.from_labels([-1, 1], tail_below=3), r"`labels` to be class indices in \[0, C\)"),
        (lambda: ClassSplit.from_labels([], tail_below=3), "`labels` to be a non-empty vector of class indices"),
        (
            lambda: ClassSplit.from_labels([0.0, 1.0], tail_below=3),
            "`labels` to be a non-empty vector of class indices",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.int16])
def test_labels_of_any_integers(dtype):
    labels = torch.tensor([0, 0, 0, 1, 2]).to(dtype)
    assert ClassSplit.from_labels(labels, tail_below=2).class_counts.tolist() == [3, 1, 1]
    assert as_labels(labels).tolist() == [0, 0, 0, 1, 2]
