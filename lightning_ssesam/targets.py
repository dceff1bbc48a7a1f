"""Which targets count. Positions whose target is the ignored index have no weight anywhere."""

import math

import torch
from torch import Tensor

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.tensors import dtype_of_sums, move, rows

IGNORE_INDEX = -100
"""The target that is ignored by default, as in :func:`torch.nn.functional.cross_entropy`."""

NO_CLASS = -math.inf
"""The probabilities of an ignored class index, where indices are made probabilities. No other target is infinite."""


def ignored_mask(targets: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Return which positions are ignored, bool, of the shape of the losses. Does not wait for the device.

    Args:
        targets: Class indices ``(N, ...)``, any integer dtype; or class probabilities ``(N, C, ...)``, any floating
            dtype. Of these, a row is ignored if it is :data:`NO_CLASS` everywhere.
        ignore_index: Ignored target, any integer.
    """
    if targets.is_floating_point():
        is_ignored = targets == NO_CLASS
        return is_ignored.all(1) if targets.ndim > 1 else is_ignored
    # In its own dtype, an unsigned integer of 156 equals -100.
    return targets.long() == ignore_index


def find_ignored(targets: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor | None:
    """Return the :func:`ignored_mask`, or None if the targets are on the CPU and none of them is ignored."""
    ignored = ignored_mask(targets, ignore_index)
    return None if ignored.device.type == "cpu" and not bool(ignored.any()) else ignored


def fill_ignored(targets: Tensor, ignored: Tensor | None, value: float = 0) -> Tensor:
    """Return targets with ``value`` at the ignored positions: class 0, or no mass on any class."""
    if ignored is None:
        return targets
    return targets.masked_fill(ignored.unsqueeze(1) if targets.ndim > ignored.ndim else ignored, value)


def label_indices(targets: Tensor, num_classes: int, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Return the label (column) of each multi-label target ``(N, C)``, int64, and ``ignore_index`` for a missing one.

    Each label of each sample has its own loss. With its label in place of yes or no, it is a dense class index, whose
    class says whether it is head or tail. Such class indices are returned as they are.

    Args:
        targets: 0 (no), 1 (yes) or ``ignore_index`` (missing) for each label, ``(N, C)``, any real dtype. Floating ones
            may lie between 0 and 1.
        num_classes: C.
        ignore_index: Target of missing labels, an integer outside [0, C) and neither 0 nor 1.

    Raises:
        ArgumentError: If the shape is another one, a target on the CPU is out of range, or ``ignore_index`` is.
    """
    check_missing_label(ignore_index, num_classes)
    expected = f"multi-label targets (N, {num_classes}) of 0, 1 and {ignore_index} (missing)"
    if targets.ndim != 2 or targets.shape[1] != num_classes:
        raise bad_argument("targets", expected, got_text=f"shape {tuple(targets.shape)} of {targets.dtype}")
    missing = missing_labels(targets, ignore_index)
    labels = torch.arange(num_classes, device=targets.device).expand(targets.shape)
    if targets.device.type == "cpu":
        is_valid = (targets >= 0) & (targets <= 1) | missing
        if not bool(is_valid.all()) and not torch.equal(
            targets.masked_fill(missing, 0), labels.masked_fill(missing, 0)
        ):
            wrong = targets[~is_valid]
            raise bad_argument("targets", expected, got_text=f"values such as {wrong[0].item():g}")
    return labels.masked_fill(missing, ignore_index)


def missing_labels(targets: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Return which multi-label targets are missing, bool, of their shape. Does not wait for the device."""
    return (targets if targets.is_floating_point() else targets.long()) == ignore_index


def check_missing_label(ignore_index: int, num_classes: int) -> None:
    """Raise ``ArgumentError`` if the target of missing labels is that of others, or a label's index."""
    if 0 <= ignore_index < max(2, num_classes):
        expected = f"an integer outside [0, {max(2, num_classes)}) for multi-label targets"
        raise bad_argument("ignore_index", expected, ignore_index)


def sum_counted(losses: Tensor, ignored: Tensor | None, samples: Tensor | None = None) -> tuple[Tensor, Tensor | int]:
    """Return the sum of the losses ``(N, ...)`` that are not ignored, in float32 at least, and their number.

    Args:
        losses: Losses of some samples, or of all.
        ignored: Mask of the ignored positions of all samples; None for none.
        samples: Indices ``(N,)`` of the samples, on the CPU; None for all.
    """
    losses = losses.detach().to(dtype_of_sums(losses.dtype))
    if ignored is None:
        return losses.sum(), losses.numel()
    ignored = ignored if samples is None else rows(ignored, samples)
    # Not by a product, because the loss of an ignored position may be infinite.
    return losses.masked_fill(move(ignored, losses.device), 0.0).sum(), (~ignored).sum()


def at_least_one(count: Tensor | int) -> Tensor | int:
    """Return a number to divide by: 1 where nothing counts."""
    return max(count, 1) if isinstance(count, int) else count.clamp(min=1)


def check_class_indices(targets: Tensor, num_classes: int, ignore_index: int = IGNORE_INDEX) -> None:
    """Raise ``ArgumentError`` if targets on the CPU, of any shape, are not class indices in ``[0, num_classes)``.

    Ignored targets may be any integer. On an accelerator, reading the values would wait for the device, and the loss
    checks them there itself.
    """
    if targets.device.type != "cpu" or targets.numel() == 0:
        return
    low, high = map(int, targets.aminmax())
    if low < 0 or high >= num_classes:
        targets = targets[~ignored_mask(targets, ignore_index)]
        low, high = map(int, targets.aminmax()) if targets.numel() else (0, 0)
    if low < 0 or high >= num_classes:
        got = f"values from {low} to {high} (`ignore_index` is {ignore_index})"
        raise bad_argument("targets", f"class indices in [0, {num_classes})", got_text=got)


def check_probabilities(probabilities: Tensor, ignored: Tensor | None) -> None:
    """Raise ``ArgumentError`` if class probabilities ``(N, ..., C)`` on the CPU do not add up to 1 or are negative."""
    if probabilities.device.type != "cpu" or probabilities.numel() == 0:
        return
    # Probabilities in half precision add up to 1 within a hundredth.
    is_valid = (probabilities >= 0).all(-1) & ((probabilities.sum(-1) - 1).abs() < 1e-2)
    if not bool((is_valid if ignored is None else is_valid | ignored).all()):
        raise bad_argument("targets", "class probabilities that add up to 1", got_text="some that do not")
