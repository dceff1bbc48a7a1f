"""Counts, weights, masks and labels that come with an index: read by it, or refused."""

import collections
import types

import numpy as np
import pytest
import torch
from helpers import STRICT

from lightning_ssesam import ClassSplit, LongTailClassifier
from lightning_ssesam.curvature import Hessian
from lightning_ssesam.data import ClassBalancedSampler, LongTailed, long_tailed_indices
from lightning_ssesam.losses import LDAMLoss, LogitAdjustedLoss, class_balanced_weights
from lightning_ssesam.models import SmallConvNet

pytestmark = STRICT


class Series:
    """Does what a pandas Series does: values by label, in the order of the labels given."""

    ndim = 1

    def __init__(self, data, index=None):
        self.values = list(data)
        self.index = list(range(len(self.values))) if index is None else list(index)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, label):
        return self.values[self.index.index(label)] if label in self.index else {}[label]

    def __iter__(self):
        return iter(self.values)

    def tolist(self):
        return list(self.values)


def series_of(kind, data, index=None):
    return Series(data, index) if kind == "stand-in" else pytest.importorskip("pandas").Series(data, index)


KINDS = pytest.mark.parametrize("kind", ["stand-in", "pandas"])

# Classes 0 to 3 have 3, 40, 500 and 7 training samples.
COUNTS = [3, 40, 500, 7]
SORTED = {2: 500, 1: 40, 3: 7, 0: 3}
INDEXED = {
    "list": lambda: COUNTS,
    "tuple": lambda: tuple(COUNTS),
    "numpy": lambda: np.array(COUNTS, dtype=np.uint16),
    "tensor": lambda: torch.tensor(COUNTS),
    "dict": lambda: SORTED,
    "Counter": lambda: collections.Counter(np.repeat(list(SORTED), list(SORTED.values())).tolist()),
    "numpy keys": lambda: {np.int64(key): np.int32(value) for key, value in SORTED.items()},
    "proxy": lambda: types.MappingProxyType(SORTED),
    "UserDict": lambda: collections.UserDict(SORTED),
    "stand-in": lambda: Series(SORTED.values(), SORTED.keys()),
    "stand-in in class order": lambda: Series(COUNTS),
    "whole numbers": lambda: Series(SORTED.values(), map(float, SORTED)),
    "value_counts": lambda: pandas_labels().value_counts(),
    "value_counts of floats": lambda: pandas_labels().astype(float).value_counts(),
    "value_counts of integers with gaps": lambda: pandas_labels().astype("Int64").value_counts(),
    "value_counts of a category": lambda: pandas_labels().astype("category").value_counts(),
    "groupby": lambda: pandas_labels().groupby(pandas_labels()).size(),
}


def pandas_labels():
    return pytest.importorskip("pandas").Series(np.repeat(list(SORTED), list(SORTED.values())))


@pytest.mark.parametrize("kind", INDEXED)
def test_counts_are_read_by_their_index(kind):
    counts = INDEXED[kind]()
    assert ClassSplit.from_counts(counts, tail_below=10).tail.tolist() == [True, False, False, True]
    assert ClassSplit.from_counts(counts, tail_fraction=0.02).class_counts.tolist() == COUNTS
    assert ClassSplit(counts, tail=[0]).class_counts.tolist() == COUNTS
    assert LDAMLoss(counts).class_counts.tolist() == COUNTS
    assert LogitAdjustedLoss(counts).class_counts.tolist() == COUNTS
    assert class_balanced_weights(counts).equal(class_balanced_weights(COUNTS))
    assert LongTailClassifier(counts, SmallConvNet).split.class_counts.tolist() == COUNTS
    labels = np.repeat(range(4), 600)
    chosen = long_tailed_indices(labels, counts, torch.Generator().manual_seed(0))
    assert np.bincount(labels[chosen]).tolist() == COUNTS


@KINDS
@pytest.mark.parametrize(
    ("data", "index", "shown"),
    [
        ([5, 3], [2, 0], "[2, 0]"),
        ([5, 3], [1, 2], "[1, 2]"),
        ([5, 3], ["cat", "dog"], "['cat', 'dog']"),
        ([5, 3], ["0", "1"], "['0', '1']"),
        ([5, 3, 2], [0, 1, 1], "[0, 1, 1]"),
        ([5, 3], [0.0, 0.5], "[0.0, 0.5]"),
        ([5, 3], [False, True], "[False, True]"),
        ([5, 3], [-1, 0], "[-1, 0]"),
        ([5, 3], [0, float("nan")], "[0"),
        (range(1, 13), range(1, 13), "9, 10, ...]"),
    ],
)
def test_an_index_that_is_not_understood_is_refused(kind, data, index, shown):
    counts = series_of(kind, data, index)
    for refuse in (lambda: ClassSplit(counts, tail=[0]), lambda: LDAMLoss(counts)):
        with pytest.raises(ValueError, match="Expected argument `class_counts` to be a Series with the class ind") as e:
            refuse()
        assert shown in str(e.value).replace("np.False_", "False").replace("np.True_", "True")


@pytest.mark.parametrize("counts", [{"cat": 5}, {1: 5}, {0: 5, 2: 1}, collections.Counter("aab")])
def test_a_mapping_that_is_not_understood_is_refused(counts):
    with pytest.raises(
        ValueError, match=rf"`class_counts` to be a {type(counts).__name__} with the class indices 0 to"
    ):
        ClassSplit.from_counts(counts, tail_below=3)


def test_other_objects_with_an_index_are_refused():
    frame = pytest.importorskip("pandas").DataFrame({"count": [5, 3]})
    for name, refuse in (
        ("class_counts", lambda: ClassSplit(frame, [0])),
        ("labels", lambda: ClassSplit.from_labels(frame, tail=[0])),
        ("tail", lambda: ClassSplit([5, 3], frame)),
    ):
        with pytest.raises(ValueError, match=f"Expected argument `{name}` to be a vector, but got a DataFrame"):
            refuse()


@KINDS
def test_masks_and_weights_are_read_by_their_index(kind):
    """As those that are made from `value_counts()`: `counts < 10` and `1 / counts`."""
    mask = series_of(kind, [count < 10 for count in SORTED.values()], list(SORTED))
    assert ClassSplit(SORTED, tail=mask).tail.tolist() == [True, False, False, True]
    assert ClassSplit(SORTED, tail={key: count < 10 for key, count in SORTED.items()}).tail.tolist() == [1, 0, 0, 1]
    # Class indices with an index of any kind.
    assert ClassSplit(SORTED, tail=series_of(kind, [3, 0], [7, 5])).tail.tolist() == [True, False, False, True]
    weight = series_of(kind, [1 / count for count in SORTED.values()], list(SORTED))
    torch.testing.assert_close(LDAMLoss(weight=weight).weight, 1 / torch.tensor(COUNTS))
    hessian = Hessian(torch.nn.Linear(2, 4), [], lambda *_: torch.zeros(1), classes=mask)
    assert hessian.classes.tolist() == [True, False, False, True]
    for refuse, name in (
        (lambda: ClassSplit([3, 40], tail=series_of(kind, [True, False], [1, 2])), "tail"),
        (lambda: ClassSplit([3, 40], tail={0: 1, 1: 0}), "tail"),
        (lambda: LDAMLoss(weight=series_of(kind, [0.5, 0.2], ["a", "b"])), "weight"),
    ):
        with pytest.raises(ValueError, match=f"Expected argument `{name}` to be a"):
            refuse()


@KINDS
@pytest.mark.parametrize("index", [None, [9, 4, 7, 30, 2], ["a", "b", "c", "d", "d"], [0, 1, 2, 3, 3]])
def test_labels_with_an_index(kind, index):
    """With gaps as in a part of a table, and with names."""
    labels = series_of(kind, [1, 0, 1, 1, 2], index)
    assert ClassSplit.from_labels(labels, tail_below=2).class_counts.tolist() == [1, 3, 1]
    assert list(ClassBalancedSampler(labels)) == list(ClassBalancedSampler([1, 0, 1, 1, 2]))
    made, expected = (LongTailed(range(5), 1, labels=values) for values in (labels, [1, 0, 1, 1, 2]))
    assert made.targets.equal(expected.targets)
    assert long_tailed_indices(labels, [1, 3, 1], torch.Generator()).tolist() == [0, 1, 2, 3, 4]


@KINDS
def test_labels_in_another_order_count_but_do_not_tell_samples(kind):
    labels = series_of(kind, [1, 0, 1, 1, 2], [4, 3, 2, 1, 0])
    assert ClassSplit.from_labels(labels, tail_below=2).class_counts.tolist() == [1, 3, 1]
    for refuse in (lambda: ClassBalancedSampler(labels), lambda: LongTailed(range(5), 1, labels=labels)):
        with pytest.raises(ValueError, match="`labels` to be in the order of the samples, with the index 0 to N-1"):
            refuse()


@KINDS
@pytest.mark.parametrize("values", [[0.5, 1.0], ["a", "b"], [None, 1]])
def test_labels_that_are_none_are_refused(kind, values):
    with pytest.raises(ValueError, match="`labels` to be a non-empty vector of class indices"):
        ClassSplit.from_labels(series_of(kind, values), tail_below=2)
