"""Losses for long-tailed data, unreduced by default, as the objectives need them.

The formulas are functions in :mod:`lightning_ssesam.losses.functional`. The classes hold counts, weights and checks.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_beta, check_choice, check_positive, check_radius
from lightning_ssesam.losses import functional
from lightning_ssesam.losses.functional import Counts, class_balanced_weights, counts_of
from lightning_ssesam.split import ClassSplit

__all__ = [
    "BalancedSoftmaxLoss",
    "ClassBalancedLoss",
    "FocalLoss",
    "LDAMLoss",
    "LogitAdjustedLoss",
    "VSLoss",
    "class_balanced_weights",
]

Weight = Sequence[float] | Tensor | None
Reduction = Literal["none", "mean", "sum"]


class _LongTailLoss(nn.Module):
    """Class counts, class weights, checks and reduction; subclasses implement :meth:`losses`.

    Half precision logits are converted to float32. Nothing is in the ``state_dict``.
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
            ArgumentError: If ``split`` is no :class:`ClassSplit`, or its counts do not fit those or the weights given.

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
        """Return the losses.

        Args:
            logits: Logits ``(N, C)`` or ``(N, C, ...)``, any floating dtype.
            targets: Class indices ``(N, ...)`` in [0, C), any integer dtype; or class probabilities ``(N, C, ...)``,
                any floating dtype.

        Returns:
            The loss of every sample, ``(N, ...)``; with another ``reduction`` their plain mean or sum. Float64 if the
            logits are, else float32.

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

    @abstractmethod
    def losses(self, logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        """Return the losses ``(N, ...)``, as the functions of :mod:`lightning_ssesam.losses.functional` do."""

    def _counts_as(self, logits: Tensor) -> Tensor:
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


class LDAMLoss(_LongTailLoss):
    r"""Label-distribution-aware margin loss (Cao et al., NeurIPS 2019, arXiv:1906.07413).

    See :func:`~lightning_ssesam.losses.functional.ldam`. It is made for a normalized classifier, whose logits are
    cosines in [-1, 1]. With :class:`~lightning_ssesam.callbacks.DeferredReweighting` it is the paper's LDAM-DRW.

    Args:
        counts: Training samples of each class, ``(C,)``, or a split; can be bound later.
        max_margin: The margin of the rarest class, a finite number >= 0.
        scale: The factor s on the logits, a finite number > 0.
        weight: Class weights ``(C,)``, finite and >= 0; none by default.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        ArgumentError: If an argument is out of range or does not fit the others.

    Example:
        >>> loss = LDAMLoss([16, 1], max_margin=0.5, scale=1.0)
        >>> loss.margins
        tensor([0.2500, 0.5000])
        >>> loss(torch.tensor([[0.25, 0.0], [0.25, 0.0]]), torch.tensor([0, 1]))
        tensor([0.6931, 1.1369])

    """

    def __init__(
        self,
        counts: Counts | None = None,
        max_margin: float = 0.5,
        scale: float = 30.0,
        weight: Weight = None,
        reduction: Reduction = "none",
    ) -> None:
        super().__init__(counts, weight, reduction)
        self.max_margin = check_radius("max_margin", max_margin)
        self.scale = check_positive("scale", scale)

    @property
    def margins(self) -> Tensor | None:
        """The margins m, ``(C,)``, of the default dtype; None while the counts are not known."""
        if self.class_counts is None:
            return None
        return functional.ldam_margins(self.class_counts.to(torch.get_default_dtype()), self.max_margin)

    @override
    def losses(self, logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        margins = functional.ldam_margins(self._counts_as(logits), self.max_margin)
        return functional.ldam(logits, targets, margins, self.scale, weight)


class LogitAdjustedLoss(_LongTailLoss):
    r"""Logit-adjusted cross-entropy (Menon et al., ICLR 2021, arXiv:2007.07314).

    See :func:`~lightning_ssesam.losses.functional.logit_adjusted`.

    Args:
        tau: A finite number >= 0; 0 is plain cross-entropy.
        counts, weight, reduction: See :class:`LDAMLoss`.

    Raises:
        ArgumentError: If an argument is out of range or does not fit the others.

    Example:
        >>> LogitAdjustedLoss([9, 1])(torch.zeros(2, 2), torch.tensor([0, 1]))
        tensor([0.1054, 2.3026])

    """

    def __init__(
        self, counts: Counts | None = None, tau: float = 1.0, weight: Weight = None, reduction: Reduction = "none"
    ) -> None:
        super().__init__(counts, weight, reduction)
        self.tau = check_radius("tau", tau)

    @override
    def losses(self, logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        return functional.logit_adjusted(logits, targets, self._counts_as(logits), self.tau, weight)


class BalancedSoftmaxLoss(_LongTailLoss):
    r"""Balanced softmax (Ren et al., NeurIPS 2020, arXiv:2007.10740).

    The cross-entropy of :math:`z_j + \log n_j`; the same as :class:`LogitAdjustedLoss` with ``tau=1``.

    Args:
        counts, weight, reduction: See :class:`LDAMLoss`.

    Raises:
        ArgumentError: If an argument is out of range or does not fit the others.

    Example:
        >>> BalancedSoftmaxLoss([9, 1])(torch.zeros(2, 2), torch.tensor([0, 1]))
        tensor([0.1054, 2.3026])

    """

    @override
    def losses(self, logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        return functional.adjusted(logits, targets, self._counts_as(logits).log(), weight)


class VSLoss(_LongTailLoss):
    r"""Vector-scaling loss (Kini et al., NeurIPS 2021, arXiv:2103.01550).

    See :func:`~lightning_ssesam.losses.functional.vector_scaling`.

    Args:
        gamma: A finite number >= 0; 0 is :class:`LogitAdjustedLoss`.
        tau: A finite number >= 0.
        counts, weight, reduction: See :class:`LDAMLoss`.

    Raises:
        ArgumentError: If an argument is out of range or does not fit the others.

    Example:
        >>> VSLoss([16, 1], gamma=0.25, tau=0.0)(torch.ones(2, 2), torch.tensor([0, 1]))
        tensor([0.4741, 0.9741])

    """

    def __init__(
        self,
        counts: Counts | None = None,
        gamma: float = 0.15,
        tau: float = 1.25,
        weight: Weight = None,
        reduction: Reduction = "none",
    ) -> None:
        super().__init__(counts, weight, reduction)
        self.gamma = check_radius("gamma", gamma)
        self.tau = check_radius("tau", tau)

    @override
    def losses(self, logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        return functional.vector_scaling(logits, targets, self._counts_as(logits), self.gamma, self.tau, weight)


class ClassBalancedLoss(_LongTailLoss):
    """Cross-entropy times the :func:`class_balanced_weights` (Cui et al., CVPR 2019, arXiv:1901.05555).

    Args:
        counts: Training samples of each class, ``(C,)``, or a split; can be bound later, which sets ``weight``.
        beta: A number in [0, 1).
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        ArgumentError: If an argument is out of range.

    Example:
        >>> ClassBalancedLoss([2, 1], beta=0.5)(torch.zeros(2, 2), torch.tensor([0, 1]))
        tensor([0.5545, 0.8318])

    """

    def __init__(self, counts: Counts | None = None, beta: float = 0.9999, reduction: Reduction = "none") -> None:
        super().__init__(counts, None, reduction)
        self.beta = check_beta(beta)
        self._balance()

    @override
    def bind(self, split: ClassSplit) -> None:
        was_known = self.class_counts is not None
        super().bind(split)
        if not was_known:
            self._balance()

    def _balance(self) -> None:
        if self.class_counts is not None:
            self.weight = class_balanced_weights(self.class_counts, self.beta).to(torch.get_default_dtype())

    @override
    def losses(self, logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        return functional.cross_entropy(logits, targets, weight)


class FocalLoss(_LongTailLoss):
    r"""Focal loss (Lin et al., ICCV 2017, arXiv:1708.02002).

    See :func:`~lightning_ssesam.losses.functional.focal` and
    :func:`~lightning_ssesam.losses.functional.sigmoid_focal`.

    Args:
        gamma: A finite number >= 0; 0 is cross-entropy. With ``"sigmoid"`` not between 0 and 1, because the gradient
            of certain answers would be infinite.
        kind: ``"softmax"``, or ``"sigmoid"``, which needs torchvision.
        alpha: With ``"sigmoid"``, the weight in [0, 1] of yes, that of no being 1 - alpha; none by default.
        weight, reduction: See :class:`LDAMLoss`.

    Raises:
        ArgumentError: If an argument is out of range or does not fit the others.

    Example:
        >>> FocalLoss(gamma=2.0)(torch.zeros(1, 2), torch.tensor([0]))
        tensor([0.1733])

    """

    _needs_counts = False

    def __init__(
        self,
        gamma: float = 2.0,
        kind: Literal["softmax", "sigmoid"] = "softmax",
        alpha: float | None = None,
        weight: Weight = None,
        reduction: Reduction = "none",
    ) -> None:
        super().__init__(None, weight, reduction)
        self.gamma = check_radius("gamma", gamma)
        self.kind = check_choice("kind", kind, ("softmax", "sigmoid"))
        if kind == "sigmoid" and 0 < gamma < 1:
            raise bad_argument("gamma", "0 or >= 1 with kind='sigmoid'", gamma)
        if alpha is not None and kind != "sigmoid":
            raise bad_argument("alpha", "None unless kind='sigmoid' (use `weight`)", alpha)
        if alpha is not None and not 0 <= check_radius("alpha", alpha) <= 1:
            raise bad_argument("alpha", "a number in [0, 1]", alpha)
        self.alpha = alpha

    @override
    def losses(self, logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        if self.kind == "sigmoid":
            return functional.sigmoid_focal(logits, targets, self.gamma, self.alpha, weight)
        return functional.focal(logits, targets, self.gamma, weight)


def _check_weight(weight: Weight) -> Tensor | None:
    if weight is None:
        return None
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
        raise bad_argument(
            "logits", f"of shape {shape}, a floating dtype", got_text=f"{tuple(logits.shape)} of {logits.dtype}"
        )
    indices, probabilities = logits.shape[:1] + logits.shape[2:], logits.shape
    is_other = targets.is_complex() or targets.dtype == torch.bool
    if is_other or targets.shape != (probabilities if targets.is_floating_point() else indices):
        raise bad_argument(
            "targets",
            f"class indices of shape {tuple(indices)} or class probabilities of shape {tuple(probabilities)}",
            got_text=f"shape {tuple(targets.shape)} of {targets.dtype}",
        )
