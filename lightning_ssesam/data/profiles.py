"""How many training samples each class keeps in a long-tailed data set, and which ones."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_ssesam._validation import bad_argument, check_choice, check_integer
from lightning_ssesam.class_order import in_class_order
from lightning_ssesam.split import as_labels

Profile = Literal["exponential", "step"]


def long_tailed_counts(
    num_classes: int, max_count: int, imbalance_factor: float, profile: Profile = "exponential"
) -> list[int]:
    """Return how many samples each class keeps, the largest class first.

    The protocol of Cao et al., "LDAM", NeurIPS 2019: with r the smallest over the largest class size,
    ``"exponential"`` gives class k ``floor(max_count * r ** (k / (C - 1)))`` samples, and ``"step"`` gives the first
    half of the classes ``max_count`` and the others ``floor(max_count * r)``.

    Args:
        num_classes: C, an integer >= 1.
        max_count: Samples of the largest class, an integer >= 1.
        imbalance_factor: Largest over smallest class size, or its inverse: 100 and 0.01 mean the same; > 0.
        profile: ``"exponential"`` or ``"step"``.

    Raises:
        ArgumentError: If the smallest class would get no sample.

    Example:
        >>> long_tailed_counts(10, 5000, 100)
        [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    """
    check_integer("num_classes", num_classes, minimum=1)
    check_integer("max_count", max_count, minimum=1)
    counts = [_count(max_count, share) for share in _shares(num_classes, imbalance_factor, profile)]
    if min(counts) < 1:
        largest = f"at most max_count = {max_count}, so that every class keeps a sample"
        raise bad_argument("imbalance_factor", largest, imbalance_factor)
    return counts


def largest_max_count(class_sizes: Sequence[int], imbalance_factor: float, profile: Profile = "exponential") -> int:
    """Return the largest ``max_count`` for which every class has enough samples for :func:`long_tailed_counts`.

    ``class_sizes`` are the available samples of each class, length C, the largest class first, integers >= 1.

    Example:
        >>> largest_max_count([60, 50, 7], 4)
        31
        >>> long_tailed_counts(3, 31, 4)
        [31, 15, 7]
    """
    shares = _shares(len(class_sizes), imbalance_factor, profile)

    def too_many(max_count: int) -> bool:
        return any(_count(max_count, share) > size for share, size in zip(shares, class_sizes, strict=True))

    # One sample of each class is never too many.
    return bisect_left(range(2, class_sizes[0] + 1), True, key=too_many) + 1


def long_tailed_indices(
    labels: Sequence[int] | Tensor, class_counts: Sequence[int], generator: torch.Generator
) -> Tensor:
    """Choose the samples of a long-tailed data set at random.

    Args:
        labels: Label of every available sample, shape ``(N,)``, integers in [0, C).
        class_counts: Samples to keep of each class, length C, integers >= 0; a pandas Series is read by its index.
        generator: Source of the random choice.

    Returns:
        Indices into ``labels``, ascending, int64.

    Raises:
        ArgumentError: If a class has fewer samples than it should keep.
    """
    class_counts = in_class_order("class_counts", class_counts)
    class_counts = class_counts.tolist() if isinstance(class_counts, Tensor) else class_counts
    labels = as_labels(labels, num_classes=len(class_counts))
    # Sorting once is fast with thousands of classes, where a search for each class is not.
    order = labels.argsort(stable=True)
    bounds = torch.searchsorted(labels[order], torch.arange(len(class_counts) + 1)).tolist()
    chosen = []
    for label, count in enumerate(class_counts):
        members = order[bounds[label] : bounds[label + 1]]
        if len(members) < check_integer("class_counts", count, minimum=0):
            raise bad_argument("class_counts", f"at most the {len(members)} samples at hand of class {label}", count)
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(chosen).sort().values


def hold_out(labels: Tensor, class_counts: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Choose samples as :func:`long_tailed_indices` does; return their indices and those of all others."""
    picked = long_tailed_indices(labels, class_counts, generator)
    is_other = torch.ones(len(labels), dtype=torch.bool)
    is_other[picked] = False
    return picked, is_other.nonzero().flatten()


def _shares(num_classes: int, imbalance_factor: float, profile: Profile) -> list[float]:
    """Return the size of each class over that of the largest."""
    check_choice("profile", profile, ("exponential", "step"))
    ratio = _smallest_over_largest(imbalance_factor)
    if profile == "step":
        return [1.0 if k < num_classes / 2 else ratio for k in range(num_classes)]
    return [ratio ** (k / max(num_classes - 1, 1)) for k in range(num_classes)]


def _count(max_count: int, share: float) -> int:
    # The slack makes up for rounding: a product that is an integer, as 5000 * 0.01, must not fall below it.
    return math.floor(max_count * share * (1 + 1e-12))


def _smallest_over_largest(imbalance_factor: Any) -> float:
    factor = imbalance_factor
    if not isinstance(factor, Real) or isinstance(factor, bool) or not math.isfinite(factor) or factor <= 0:
        raise bad_argument("imbalance_factor", "a finite number > 0, such as 100 or 0.01", factor)
    return min(float(factor), 1 / float(factor))
