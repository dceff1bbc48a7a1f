"""The base of all losses: counts, weights, checks of a batch."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_choice
from lightning_ssesam.class_order import in_class_order
from lightning_ssesam.losses.functional import Counts, counts_of
from lightning_ssesam.split import ClassSplit

Weight = Sequence[float] | Tensor | None
Reduction = Literal["none", "mean", "sum"]


class LongTailLoss(nn.Module):
    """Base of the losses: class counts, class weights, checks and reduction. A subclass implements :meth:`losses`.

    Logits in half precision are converted to float32. The ``state_dict`` is empty.

    Args:
        counts: Training samples of each class, ``(C,)``, integers >= 1, or a split; can be bound later. A mapping or a
            pandas Series is read by its keys, the class indices.
        weight: Class weights ``(C,)``, finite and >= 0; none by default. A pandas Series is read by its index.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Example:
        >>> from lightning_ssesam.losses import functional
        >>> class PriorLoss(LongTailLoss):
        ...     def losses(self, logits, targets, weight):
        ...         return functional.adjusted(logits, targets, self.counts_like(logits).log(), weight)
        >>> PriorLoss([9, 1], reduction="sum")(torch.zeros(2, 2), torch.tensor([0, 1]))
        tensor(2.4079)
    """

    weight: Tensor | None
    _needs_counts = True

    def __init__(self, counts: Counts | None = None, weight: Weight = None, reduction: Reduction = "none") -> None:
        super().__init__()
        # No buffer, because training steps copy buffers.
        self.class_counts = None if counts is None else counts_of(counts)
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
                loss, or does not have one class for each weight.
        """
        if not isinstance(split, ClassSplit):
            raise bad_argument("split", "a ClassSplit", split)
        if self.class_counts is not None and not torch.equal(self.class_counts, split.class_counts):
            raise bad_argument("split", f"one with the class counts that the {type(self).__name__} has already", split)
        if self.weight is not None:
            _check_length("weight", self.weight, split.num_classes)
        self.class_counts = split.class_counts

    @override
    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Check and convert a batch, and return its losses.

        Args:
            logits: Logits ``(N, C)`` or ``(N, C, ...)``, any floating dtype.
            targets: Class indices ``(N, ...)`` in [0, C), any integer dtype; or class probabilities ``(N, C, ...)``,
                any floating dtype.

        Returns:
            The loss of every sample, ``(N, ...)``, or their plain mean or sum by ``reduction``. The dtype is float64
            for float64 logits, else float32.

        Raises:
            ArgumentError: If shapes or dtypes do not fit.
            RuntimeError: If the loss needs class counts and has none.
        """
        if self._needs_counts and self.class_counts is None:
            name = type(self).__name__
            raise RuntimeError(
                f"{name} does not know the class counts: build it with `{name}(counts=...)`, or call `bind(split)`"
                " before it is used."
            )
        known = self.weight if self.class_counts is None else self.class_counts
        _check_batch(logits, targets, None if known is None else known.numel())
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = targets.to(logits.dtype) if targets.is_floating_point() else targets.long()
        losses = self.losses(logits, targets, None if self.weight is None else self.weight.to(logits))
        return losses if self.reduction == "none" else losses.mean() if self.reduction == "mean" else losses.sum()

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
        assert self.class_counts is not None
        if logits.device not in self._moved:
            self._moved[logits.device] = self.class_counts.to(logits.device)
        return self._moved[logits.device].to(logits.dtype)

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
