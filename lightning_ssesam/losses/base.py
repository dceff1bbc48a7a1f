"""The base of all losses: counts, weights, checks of a batch."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_choice, check_integer
from lightning_ssesam.class_order import in_class_order
from lightning_ssesam.losses.functional import Counts, along_classes, counts_of
from lightning_ssesam.split import ClassSplit
from lightning_ssesam.targets import IGNORE_INDEX, at_least_one

Weight = Sequence[float] | Tensor | None
Reduction = Literal["none", "mean", "sum"]


class LongTailLoss(nn.Module):
    """Base of the losses: class counts, class weights, checks and reduction. A subclass implements :meth:`losses`.

    Logits in half precision are converted to float32. The ``state_dict`` is empty. A class without training samples
    (``ClassSplit(..., allow_empty=True)``) has no weight: the loss of its samples is 0, and they are not part of the
    mean.

    Args:
        counts: Training samples of each class, ``(C,)``, integers >= 1, or a split; can be bound later. A mapping or a
            pandas Series is read by its keys, the class indices.
        weight: Class weights ``(C,)``, finite and >= 0; none by default. A pandas Series is read by its index.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        ignore_index: Class index that does not count, any integer. Its loss is 0, and it is not part of the mean.

    Example:
        >>> from lightning_ssesam.losses import functional
        >>> class PriorLoss(LongTailLoss):
        ...     def losses(self, logits, targets, weight):
        ...         return functional.adjusted(logits, targets, self.counts_like(logits).log(), weight)
        >>> PriorLoss([9, 1], reduction="sum")(torch.zeros(2, 2), torch.tensor([0, 1]))
        tensor(2.4079)
    """

    weight: Tensor | None
    ignore_index: int = IGNORE_INDEX
    is_multi_label = False
    _needs_counts = True
    _has_empty_class = False

    def __init__(
        self,
        counts: Counts | None = None,
        weight: Weight = None,
        reduction: Reduction = "none",
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__()
        # The default stays an attribute of the class: texts that identify a training are those of earlier versions.
        if check_integer("ignore_index", ignore_index) != IGNORE_INDEX:
            self.ignore_index = int(ignore_index)
        # No buffer, because training steps copy buffers.
        self.class_counts: Tensor | None = None
        if isinstance(counts, ClassSplit):
            self._check_kind(counts)
        if counts is not None:
            self._set_counts(counts_of(counts))
        self._moved: dict[torch.device, Tensor] = {}
        self.reduction = check_choice("reduction", reduction, ("none", "mean", "sum"))
        self.register_buffer("weight", _check_weight(weight), persistent=False)
        if self.weight is not None and self.class_counts is not None:
            _check_length("weight", self.weight, self.class_counts.numel())

    def bind(self, split: ClassSplit) -> None:
        """Set the class counts, if the loss was built without them.

        Args:
            split: The class split of the training set.

        Raises:
            ArgumentError: If ``split`` is not a :class:`~lightning_ssesam.ClassSplit`, has other class counts than the
                loss, does not have one class for each weight, or is of multi-label data and the loss is not.
        """
        if not isinstance(split, ClassSplit):
            raise bad_argument("split", "a ClassSplit", split)
        self._check_kind(split)
        if self.class_counts is not None and not torch.equal(self.class_counts, split.class_counts):
            raise bad_argument("split", f"one with the class counts that the {type(self).__name__} has already", split)
        if self.weight is not None:
            _check_length("weight", self.weight, split.num_classes)
        self._set_counts(split.class_counts)

    @override
    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Check and convert a batch, and return its losses.

        Args:
            logits: Logits ``(N, C)`` or ``(N, C, ...)``, any floating dtype.
            targets: Class indices ``(N, ...)`` in [0, C) or ``ignore_index``, any integer dtype; or class
                probabilities ``(N, C, ...)``, any floating dtype.

        Returns:
            The loss of every sample, ``(N, ...)``, or by ``reduction`` their sum or their plain mean. The mean is over
            those that count, and 0 if none does. The dtype is float64 for float64 logits, else float32.

        Raises:
            ArgumentError: If shapes or dtypes do not fit.
            RuntimeError: If the loss needs class counts and has none.
        """
        self._check_known()
        known = self.weight if self.class_counts is None else self.class_counts
        _check_batch(logits, targets, None if known is None else known.numel())
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets, ignored = self._counted(targets.to(logits.dtype) if targets.is_floating_point() else targets.long())
        losses = self.losses(logits, targets, None if self.weight is None else self.weight.to(logits))
        losses = losses if ignored is None else losses.masked_fill(ignored, 0.0)
        if self.reduction == "mean":
            count = losses.numel() if ignored is None else (~ignored).sum()
            return losses.sum() / at_least_one(count)
        return losses if self.reduction == "none" else losses.sum()

    def _check_known(self) -> None:
        if self._needs_counts and self.class_counts is None:
            name = type(self).__name__
            raise RuntimeError(
                f"{name} does not know the class counts: build it with `{name}(counts=...)`, or call `bind(split)`"
                " before it is used."
            )

    def _check_kind(self, split: ClassSplit) -> None:
        """Raise ``ArgumentError`` for a split of multi-label data in a loss of one class a sample, or the reverse."""
        if split.multi_label != self.is_multi_label:
            kind = "with" if self.is_multi_label else "without"
            raise bad_argument("split", f"one {kind} `multi_label` for {type(self).__name__}", split)

    def _counted(self, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return targets that all are classes with a weight, and a mask of those that do not count."""
        # Nothing here depends on a value, which would wait for the device and break a compiled graph.
        present = self._moved_counts(targets.device) > 0 if self._has_empty_class else None
        if targets.is_floating_point():
            return targets if present is None else targets * along_classes(present, targets), None
        ignored = targets == self.ignore_index
        targets = targets.masked_fill(ignored, 0)
        if present is not None:
            ignored = ignored | ~present[targets]
            targets = targets.masked_fill(ignored, 0)
        return targets, ignored

    def _set_counts(self, counts: Tensor) -> None:
        self.class_counts = counts
        self._has_empty_class = self._needs_counts and not bool(counts.all())

    def losses(self, logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        """Return the losses of a checked batch, as a function of :mod:`lightning_ssesam.losses.functional` does.

        Args:
            logits: Logits ``(N, C)`` or ``(N, C, ...)``, float32 or float64.
            targets: Class indices ``(N, ...)``, int64, or class probabilities of the shape and dtype of the logits.
            weight: Class weights ``(C,)`` of the logits' dtype, or None.

        Returns:
            The loss of every sample, ``(N, ...)``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `losses`.")

    def counts_like(self, logits: Tensor) -> Tensor:
        """Return the class counts ``(C,)`` with the dtype and on the device of the logits."""
        return self._moved_counts(logits.device).to(logits.dtype)

    def _moved_counts(self, device: torch.device) -> Tensor:
        """Return the class counts on a device. They are copied there once and kept."""
        assert self.class_counts is not None
        if device not in self._moved:
            self._moved[device] = self.class_counts.to(device)
        return self._moved[device]

    @override
    def extra_repr(self) -> str:
        """Return the arguments for ``repr``."""
        hidden = ("training", "class_counts")
        fields = {name: value for name, value in vars(self).items() if name[0] != "_" and name not in hidden}
        return ", ".join(f"{name}={value!r}" for name, value in fields.items())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_moved": {}}


def _check_weight(weight: Weight) -> Tensor | None:
    if weight is None:
        return None
    weight = in_class_order("weight", weight)
    try:
        values = torch.as_tensor(weight).detach().to(torch.get_default_dtype(), copy=True)
    except (TypeError, ValueError, RuntimeError):
        raise bad_argument("weight", "a vector of finite numbers >= 0", weight) from None
    if values.ndim != 1 or values.numel() == 0 or not bool((values.isfinite() & (values >= 0)).all()):
        raise bad_argument("weight", "a vector of finite numbers >= 0", weight)
    return values


def _check_length(name: str, values: Tensor, num_classes: int) -> None:
    if values.numel() != num_classes:
        raise bad_argument(name, f"of shape ({num_classes},), one for each class", got_text=f"{values.numel()} values")


def _check_batch(logits: Tensor, targets: Tensor, num_classes: int | None) -> None:
    """Check shapes and dtypes only, because reading values would wait for the device."""
    if not logits.is_floating_point() or logits.ndim < 2 or num_classes not in (None, logits.shape[1]):
        shape = "(N, C) or (N, C, ...)" if num_classes is None else f"(N, {num_classes}) or (N, {num_classes}, ...)"
        found = f"{tuple(logits.shape)} of {logits.dtype}"
        raise bad_argument("logits", f"of shape {shape}, a floating dtype", got_text=found)
    indices, probabilities = (*logits.shape[:1], *logits.shape[2:]), tuple(logits.shape)
    is_other = targets.is_complex() or targets.dtype == torch.bool
    if is_other or targets.shape != (probabilities if targets.is_floating_point() else indices):
        expected = f"class indices of shape {indices} or class probabilities of shape {probabilities}"
        raise bad_argument("targets", expected, got_text=f"shape {tuple(targets.shape)} of {targets.dtype}")
