"""Which classes are head and tail, and which are many-, medium- and few-shot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_ssesam._validation import bad_argument, check_flag, check_fraction, check_integer
from lightning_ssesam.class_order import in_class_order, in_sample_order
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.targets import IGNORE_INDEX, label_indices

Counts: TypeAlias = Sequence[int] | Mapping[int, int] | Tensor


@dataclass(frozen=True, eq=False)
class ClassSplit:
    """Training samples per class, and the groups of classes that follow from them.

    Objectives, metrics, losses and plots all take the groups from here. Every class is either head or tail.
    Independently, it is many-, medium- or few-shot, with more than 100, 20 to 100 or fewer than 20 training samples by
    default (Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019).

    With ``multi_label``, a sample may have any number of labels, and a class is a label. Its count is the number of
    training samples that have it, and it may be 0. Objectives, losses and metrics then take targets ``(N, C)`` of 0
    and 1.

    Args:
        class_counts: Training samples of each class, shape ``(C,)``, integers >= 1. A mapping or a pandas Series is
            read by its keys, the class indices 0 to C-1.
        tail: Tail classes, as a boolean mask of shape ``(C,)`` or as class indices in ``[0, C)``.
        many_above: Training samples above which a class is many-shot, an integer >= 0.
        few_below: Training samples below which a class is few-shot, an integer in ``[0, many_above + 1]``.
        allow_empty: Whether a class may have no training sample. Such a class is tail. It has no weight in losses that
            need the class counts.
        multi_label: Flag of data whose samples have any number of labels each.
        num_samples: Training samples, an integer >= the largest count, for losses that need the share of each label;
            None if unknown. Only with ``multi_label``, because it is the sum of the counts otherwise.

    Raises:
        ArgumentError: If a count is not an integer >= 1 (with ``allow_empty`` or ``multi_label`` >= 0, and one of them
            > 0), or an argument has the wrong shape or range.

    Example:
        >>> split = ClassSplit.from_counts([500, 120, 40, 5], tail_below=100)
        >>> split.tail.tolist()
        [False, False, True, True]
        >>> split.many.tolist(), split.few.tolist()
        ([True, True, False, False], [False, False, False, True])
    """

    class_counts: Tensor
    tail: Tensor
    many_above: int = 100
    few_below: int = 20
    allow_empty: bool = False
    multi_label: bool = False
    num_samples: int | None = None
    _moved: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __init__(
        self,
        class_counts: Counts,
        tail: Sequence[int] | Sequence[bool] | Tensor,
        many_above: int = 100,
        few_below: int = 20,
        allow_empty: bool = False,
        multi_label: bool = False,
        num_samples: int | None = None,
    ) -> None:
        counts = as_counts(class_counts, _may_be_empty(allow_empty, multi_label))
        _check_number(num_samples, counts, multi_label)
        many_above = check_integer("many_above", many_above, minimum=0)
        few_below = check_integer("few_below", few_below, minimum=0)
        if few_below > many_above + 1:
            raise bad_argument("few_below", f"at most many_above + 1 = {many_above + 1}", few_below)
        mask = _as_mask(tail, counts.numel()) | (counts == 0)
        # The dataclass is frozen, and refuses to set an attribute.
        vars(self).update(class_counts=counts, tail=mask, many_above=many_above, few_below=few_below)
        vars(self).update(allow_empty=allow_empty, multi_label=multi_label, num_samples=num_samples, _moved={})

    @classmethod
    def from_counts(
        cls,
        class_counts: Counts,
        tail_below: int | None = None,
        tail_fraction: float | None = None,
        many_above: int = 100,
        few_below: int = 20,
        allow_empty: bool = False,
        multi_label: bool = False,
        num_samples: int | None = None,
    ) -> Self:
        """Choose the tail by class size.

        Args:
            class_counts: Training samples of each class, see :class:`ClassSplit`.
            tail_below: Training samples below which a class is tail, an integer >= 1 (eta in ImbSAM, ICCV 2023).
            tail_fraction: Fraction of the training samples, in (0, 1), that the tail classes hold at most. The rarest
                classes are chosen first; of two classes of equal size the one with the higher index is the rarer. With
                ``multi_label``, a sample counts once for each of its labels.
            many_above: See :class:`ClassSplit`.
            few_below: See :class:`ClassSplit`.
            allow_empty: See :class:`ClassSplit`.
            multi_label: See :class:`ClassSplit`.
            num_samples: See :class:`ClassSplit`.

        Raises:
            ArgumentError: If not exactly one of ``tail_below`` and ``tail_fraction`` is given, or one is out of range.
        """
        if (tail_below is None) == (tail_fraction is None):
            raise ArgumentError(
                "Expected exactly one of the arguments `tail_below` and `tail_fraction`,"
                f" but got tail_below={tail_below!r}, tail_fraction={tail_fraction!r}."
            )
        counts = as_counts(class_counts, _may_be_empty(allow_empty, multi_label))
        if tail_below is not None:
            tail = counts < check_integer("tail_below", tail_below, minimum=1)
        else:
            tail = _rarest(counts, check_fraction("tail_fraction", tail_fraction))
        return cls(counts, tail, many_above, few_below, allow_empty, multi_label, num_samples)

    @classmethod
    def from_labels(
        cls,
        labels: Sequence[int] | Tensor,
        num_classes: int | None = None,
        ignore_index: int = IGNORE_INDEX,
        **kwargs: Any,
    ) -> Self:
        """Count the training labels, and split by class size or, with ``tail=...``, as the constructor does.

        Args:
            labels: Label of every training sample, shape ``(N,)``, integers in ``[0, C)`` or ``ignore_index``. With
                ``multi_label=True``, 0, 1 or ``ignore_index`` for every label, shape ``(N, C)``.
            num_classes: C; the largest label + 1 by default, or the columns of multi-label targets.
            ignore_index: Label that does not count, any integer.
            **kwargs: Arguments of :meth:`from_counts`, or ``tail`` and the thresholds of :class:`ClassSplit`.

        Raises:
            ArgumentError: If a label is out of range, or a class has no training sample and ``allow_empty`` is not set.
        """
        if num_classes is not None:
            check_integer("num_classes", num_classes, minimum=1)
        if kwargs.get("multi_label", False):
            counts = _count_positives(labels, num_classes, ignore_index)
            kwargs = {"num_samples": len(labels), **kwargs}
            return cls(counts, **kwargs) if "tail" in kwargs else cls.from_counts(counts, **kwargs)
        # The index of a pandas Series does not matter here.
        labels = in_sample_order("labels", labels, is_ordered=False)
        values = as_labels(labels, num_classes=num_classes, ignore_index=ignore_index)
        counts = count_labels(values, num_classes or 0, ignore_index, allow_empty=kwargs.get("allow_empty", False))
        return cls(counts, **kwargs) if "tail" in kwargs else cls.from_counts(counts, **kwargs)

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return self.class_counts.numel()

    @cached_property
    def head(self) -> Tensor:
        """Mask of the classes that are not tail, shape ``(C,)``, bool."""
        return ~self.tail

    @cached_property
    def many(self) -> Tensor:
        """Mask of the many-shot classes, shape ``(C,)``, bool."""
        return self.class_counts > self.many_above

    @cached_property
    def few(self) -> Tensor:
        """Mask of the few-shot classes, shape ``(C,)``, bool."""
        return self.class_counts < self.few_below

    @cached_property
    def medium(self) -> Tensor:
        """Mask of the classes that are neither many- nor few-shot, shape ``(C,)``, bool."""
        return ~(self.many | self.few)

    def tail_on(self, device: torch.device) -> Tensor:
        """Return the tail mask on ``device``. It is copied there once and kept."""
        if device not in self._moved:
            self._moved[device] = self.tail.to(device)
        return self._moved[device]

    def __repr__(self) -> str:
        tail = self.tail.nonzero().flatten().tolist()
        shown = tail if len(tail) <= 10 else f"<{len(tail)} classes>"
        number = int(self.class_counts.sum())
        if self.multi_label:
            return f"ClassSplit(num_classes={self.num_classes}, labels={number}, tail={shown}, multi_label=True)"
        return f"ClassSplit(num_classes={self.num_classes}, samples={number}, tail={shown})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_moved": {}}


# Otherwise a checkpoint with a split among its hyperparameters would not load with ``weights_only=True``.
torch.serialization.add_safe_globals([ClassSplit])


def as_labels(
    labels: Sequence[int] | Tensor,
    name: str = "labels",
    num_classes: int | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Return labels as an int64 vector ``(N,)``.

    Args:
        labels: Class indices, integers >= 0 or ``ignore_index``; at least one is a class.
        name: Name of the labels in the error.
        num_classes: C, which labels must be less than; no limit by default.
        ignore_index: Label that does not count, any integer.

    Raises:
        ArgumentError: If ``labels`` is anything else.
    """
    expected = "a non-empty vector of class indices"
    values = _as_tensor(name, expected, in_sample_order(name, labels))
    whole = not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
    if values.ndim != 1 or values.numel() == 0 or not whole:
        got = f"{str(values.dtype).removeprefix('torch.')} values of shape {tuple(values.shape)}"
        raise bad_argument(name, expected, got_text=got)
    # Unsigned integers have no `min`.
    values = values.long()
    counted = values[values != check_integer("ignore_index", ignore_index)]
    if counted.numel() == 0:
        raise bad_argument(name, expected, got_text=f"only {ignore_index}, which is ignored")
    smallest, largest = int(counted.min()), int(counted.max())
    if smallest < 0 or (num_classes is not None and largest >= num_classes):
        expected = f"class indices in [0, {'C' if num_classes is None else num_classes})"
        raise bad_argument(name, expected, got_text=f"values from {smallest} to {largest}")
    return values


def count_labels(
    labels: Tensor, num_classes: int = 0, ignore_index: int = IGNORE_INDEX, allow_empty: bool = False
) -> Tensor:
    """Return the samples of each class in labels ``(N,)``, int64. Ignored labels do not count.

    It raises ``ArgumentError`` if a class has no sample, unless ``allow_empty`` is set.
    """
    counts = torch.bincount(labels[labels != ignore_index], minlength=num_classes)
    if not allow_empty and bool((counts == 0).any()):
        missing = (counts == 0).nonzero().flatten().tolist()
        raise bad_argument("labels", "labels of every class", got_text=f"none of the classes {missing}")
    return counts


def _count_positives(labels: Any, num_classes: int | None = None, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Return how many samples have each label of multi-label targets ``(N, C)``, int64. Missing ones do not count."""
    values = _as_tensor("labels", "multi-label targets (N, C) of 0 and 1", labels)
    columns = (values.shape[1] if values.ndim == 2 else 0) if num_classes is None else num_classes
    label_indices(values, columns, ignore_index)
    return (values == 1).sum(0)


def _may_be_empty(allow_empty: bool, multi_label: bool) -> bool:
    """Return whether a class may have no training sample."""
    return check_flag("allow_empty", allow_empty) | check_flag("multi_label", multi_label)


def _check_number(num_samples: int | None, counts: Tensor, multi_label: bool) -> None:
    if num_samples is None:
        return
    if not multi_label:
        raise bad_argument("num_samples", "None without multi_label=True, as the class counts tell it", num_samples)
    check_integer("num_samples", num_samples, minimum=int(counts.max()))


def _as_tensor(name: str, expected: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError, LookupError, OverflowError):
        raise bad_argument(name, expected, value) from None


def as_counts(class_counts: Counts, allow_empty: bool = False) -> Tensor:
    """Return class counts as an int64 vector ``(C,)``.

    It raises ``ArgumentError`` if they are not integers >= 1; with ``allow_empty``, not integers >= 0, or all 0.
    """
    least = 0 if allow_empty else 1
    expected = f"a vector of integers >= {least}"
    counts = _as_tensor("class_counts", expected, in_class_order("class_counts", class_counts))
    if counts.ndim != 1 or counts.numel() == 0 or counts.dtype == torch.bool or counts.is_complex():
        raise bad_argument("class_counts", f"a non-empty vector of integers >= {least}", class_counts)
    if counts.is_floating_point() and not bool((counts.isfinite() & (counts == counts.floor())).all()):
        raise bad_argument("class_counts", f"a vector of integers >= {least}", class_counts)
    counts = counts.to(torch.int64, copy=True)
    wrong = (counts < least).nonzero().flatten()
    if wrong.numel():
        way_out = " (allowed with `allow_empty`, see ClassSplit)" if int(counts[wrong[0]]) == 0 else ""
        found = f"{int(counts[wrong[0]])} for class {int(wrong[0])}{way_out}"
        raise bad_argument("class_counts", f"integers >= {least} for every class", got_text=found)
    if not counts.any():
        raise bad_argument("class_counts", "more than 0 for some class", class_counts)
    return counts


def _as_mask(tail: Sequence[int] | Sequence[bool] | Tensor, num_classes: int) -> Tensor:
    expected = "a boolean mask or a vector of class indices"
    tail = _mask_in_class_order(tail, expected)
    if isinstance(tail, list | tuple) and len({isinstance(value, bool) for value in tail}) > 1:
        raise bad_argument("tail", expected, tail)
    values = _as_tensor("tail", expected, tail)
    if values.dtype == torch.bool:
        if values.shape != (num_classes,):
            got = f"shape {tuple(values.shape)}"
            raise bad_argument("tail", f"a mask of shape ({num_classes},), one per class", got_text=got)
        return values.clone()
    mask = torch.zeros(num_classes, dtype=torch.bool)
    if values.numel() == 0:
        return mask
    if values.ndim != 1 or values.is_floating_point():
        raise bad_argument("tail", expected, tail)
    if int(values.min()) < 0 or int(values.max()) >= num_classes:
        raise bad_argument("tail", f"class indices in [0, {num_classes})", tail)
    mask[values.long()] = True
    return mask


def _mask_in_class_order(tail: Any, expected: str) -> Any:
    """Read a mask that comes with an index by it. The index of a Series of class indices says nothing."""
    values = list(tail.values()) if isinstance(tail, Mapping) else in_sample_order("tail", tail, is_ordered=False)
    if values is not tail and all(isinstance(value, bool) for value in values):
        return in_class_order("tail", tail)
    if isinstance(tail, Mapping):
        raise bad_argument("tail", expected, tail)
    return values


def _rarest(counts: Tensor, fraction: float) -> Tensor:
    # Flipped before the stable sort, because among equal counts the higher index comes first.
    order = counts.numel() - 1 - counts.flip(0).argsort(stable=True)
    samples = counts[order].cumsum(0).double()
    # The slack makes up for rounding: 0.29 * 100 is 28.999..., and a class with exactly 29 samples must fit.
    fits = samples <= fraction * float(counts.sum()) * (1 + 1e-12)
    tail = torch.zeros_like(counts, dtype=torch.bool)
    tail[order[fits]] = True
    return tail
