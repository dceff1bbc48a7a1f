"""Losses of multi-label data: one for each label of each sample, because a sample may have any number of labels."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_ssesam._validation import (
    bad_argument,
    check_below_one,
    check_beta,
    check_integer,
    check_positive,
    check_radius,
    check_real,
)
from lightning_ssesam.losses import functional
from lightning_ssesam.losses.base import LongTailLoss, Reduction, Weight, _check_length
from lightning_ssesam.losses.functional import Counts, counts_of
from lightning_ssesam.split import ClassSplit
from lightning_ssesam.targets import IGNORE_INDEX, at_least_one, check_missing_label, missing_labels


class MultiLabelLoss(LongTailLoss):
    """Base of the losses of multi-label data. A subclass implements :meth:`losses`.

    Logits in half precision are converted to float32. The ``state_dict`` is empty. In losses that need counts, a label
    that no training sample has gets the loss 0.

    Args:
        counts: Training samples that have each label, ``(C,)``, integers >= 0, or a split; can be bound later. A
            mapping or a pandas Series is read by its keys, the label indices.
        **kwargs: ``weight``, a factor >= 0 for each label ``(C,)``; ``reduction``, ``"none"``, ``"mean"`` or ``"sum"``;
            ``ignore_index``, the target of missing labels, whose loss is 0 and which are not part of the mean.

    Example:
        >>> loss = BinaryCrossEntropyLoss(reduction="mean")
        >>> loss(torch.zeros(1, 3), torch.tensor([[1, 0, -100]]))
        tensor(0.6931)
    """

    is_multi_label = True

    def __init__(self, counts: Counts | None = None, **kwargs: Any) -> None:
        known = None if counts is None else counts_of(counts, allow_empty=True)
        if isinstance(counts, ClassSplit):
            self._check_kind(counts)
        super().__init__(**kwargs)
        if known is not None:
            self._set_counts(known)
            if self.weight is not None:
                _check_length("weight", self.weight, known.numel())

    @override
    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Check and convert a batch, and return its losses.

        Args:
            logits: Logits ``(N, C)``, any floating dtype.
            targets: 0 (no), 1 (yes) or ``ignore_index`` (missing) for each label, ``(N, C)``, any real dtype. Floating
                ones may lie between 0 and 1.

        Returns:
            The loss of every label of every sample, ``(N, C)``, or by ``reduction`` their sum or their mean. The mean
            is over those that count, and 0 if none does. The dtype is float64 for float64 logits, else float32.

        Raises:
            ArgumentError: If shapes or dtypes do not fit, or ``ignore_index`` is 0, 1 or the index of a label.
            RuntimeError: If the loss needs class counts and has none.
        """
        self._check_known()
        known = self.weight if self.class_counts is None else self.class_counts
        _check_batch(logits, targets, None if known is None else known.numel())
        check_missing_label(self.ignore_index, logits.shape[1])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        ignored = missing_labels(targets, self.ignore_index)
        answers = targets.masked_fill(ignored, 0).to(logits.dtype)
        losses = self.losses(logits, answers, None if self.weight is None else self.weight.to(logits))
        if self._has_empty_class:
            ignored = ignored | (self._moved_counts(logits.device) == 0)
        losses = losses.masked_fill(ignored, 0.0)
        if self.reduction == "mean":
            return losses.sum() / at_least_one((~ignored).sum())
        return losses if self.reduction == "none" else losses.sum()

    @override
    def losses(self, logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        """Return the losses of a checked batch, as a function of :mod:`lightning_ssesam.losses.functional` does.

        Args:
            logits: Logits ``(N, C)``, float32 or float64.
            targets: Answers in [0, 1], ``(N, C)``, of the logits' dtype; 0 for missing ones.
            weight: Factors of the labels ``(C,)`` of the logits' dtype, or None.

        Returns:
            The loss of every label of every sample, ``(N, C)``.
        """
        return super().losses(logits, targets, weight)


class BinaryCrossEntropyLoss(MultiLabelLoss):
    """Binary cross-entropy of each label; missing labels have no loss. See :func:`.binary_cross_entropy`.

    Args:
        weight: Factors of the labels ``(C,)``, finite and >= 0; none by default.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        ignore_index: Target of missing labels, an integer that is neither 0 nor 1 nor the index of a label.

    Example:
        >>> BinaryCrossEntropyLoss()(torch.zeros(1, 2), torch.tensor([[1, -100]]))
        tensor([[0.6931, 0.0000]])
    """

    _needs_counts = False

    def __init__(self, weight: Weight = None, reduction: Reduction = "none", ignore_index: int = IGNORE_INDEX) -> None:
        super().__init__(weight=weight, reduction=reduction, ignore_index=ignore_index)

    @override
    def losses(self, logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        return functional.binary_cross_entropy(logits, targets, weight)


class ClassBalancedBCELoss(MultiLabelLoss):
    """Binary cross-entropy times the :func:`class_balanced_weights` of the labels (Cui et al., CVPR 2019).

    A label's weight multiplies the losses of its yes and of its no.

    Args:
        counts: Training samples that have each label, ``(C,)``, or a split; can be bound later.
        beta: Number in [0, 1), see :func:`class_balanced_weights`.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        ignore_index: Target of missing labels, see :class:`MultiLabelLoss`.

    Example:
        >>> ClassBalancedBCELoss([2, 1], beta=0.5)(torch.zeros(1, 2), torch.tensor([[1, 0]]))
        tensor([[0.5545, 0.8318]])
    """

    def __init__(
        self,
        counts: Counts | None = None,
        beta: float = 0.9999,
        reduction: Reduction = "none",
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        self.beta = check_beta(beta)
        super().__init__(counts, reduction=reduction, ignore_index=ignore_index)

    @override
    def _set_counts(self, counts: Tensor) -> None:
        if self.class_counts is None:
            self.weight = functional.balanced_weights(counts, self.beta).to(torch.get_default_dtype())
        super()._set_counts(counts)

    @override
    def losses(self, logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        return functional.binary_cross_entropy(logits, targets, weight)


class AsymmetricLoss(MultiLabelLoss):
    """Asymmetric loss (Ridnik et al., ICCV 2021, arXiv:2009.14119, eq. 4 to 7); see :func:`.asymmetric`.

    With ``margin=0`` and two equal exponents it is the focal loss without alpha. The defaults are those of the authors
    for MS-COCO. Their training code adds the losses of a batch up, and takes no gradient of the focusing factors.

    Args:
        gamma_neg: Exponent by which certain noes count less, 0 or a finite number >= 1.
        gamma_pos: Exponent by which certain yeses count less, 0 or a finite number >= 1.
        margin: Probability m, in [0, 1), below which a no has no loss.
        weight: Factors of the labels ``(C,)``, finite and >= 0; none by default.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        ignore_index: Target of missing labels, see :class:`MultiLabelLoss`.

    Example:
        >>> AsymmetricLoss(gamma_neg=2.0, margin=0.0)(torch.zeros(1, 2), torch.tensor([[1, 0]]))
        tensor([[0.6931, 0.1733]])
    """

    _needs_counts = False

    def __init__(
        self,
        gamma_neg: float = 4.0,
        gamma_pos: float = 0.0,
        margin: float = 0.05,
        weight: Weight = None,
        reduction: Reduction = "none",
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__(weight=weight, reduction=reduction, ignore_index=ignore_index)
        self.gamma_neg = _check_exponent("gamma_neg", gamma_neg)
        self.gamma_pos = _check_exponent("gamma_pos", gamma_pos)
        self.margin = check_below_one("margin", margin)

    @override
    def losses(self, logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        return functional.asymmetric(logits, targets, self.gamma_neg, self.gamma_pos, self.margin, weight)


class DistributionBalancedLoss(MultiLabelLoss):
    """Distribution-balanced loss (Wu et al., ECCV 2020, arXiv:2007.09654); see :func:`.distribution_balanced`.

    The defaults are those of the authors for COCO-MLT, without the focal factor that their release adds.

    Args:
        counts: Training samples that have each label, ``(C,)``, or a split; can be bound later.
        num_samples: Training samples N, an integer >= the largest count; that of the split by default.
        alpha: Least weight, a finite number >= 0.
        beta: Steepness of the weights, a finite number >= 0.
        mu: Ratio of the sampling frequencies at which the weight is ``alpha`` + 1/2, a finite number.
        negative_scale: Factor lambda on the logits of noes, whose losses are divided by it, a finite number > 0.
        kappa: Factor of the shifts, a finite number >= 0; 0 needs no ``num_samples``. The release divides it by lambda.
        **kwargs: ``weight``, ``reduction`` and ``ignore_index``, see :class:`MultiLabelLoss`.

    Example:
        >>> loss = DistributionBalancedLoss([4, 1], num_samples=8, negative_scale=2.0, kappa=0.0)
        >>> loss(torch.zeros(1, 2), torch.tensor([[1, 1]]))
        tensor([[0.4159, 0.7607]])
    """

    def __init__(
        self,
        counts: Counts | None = None,
        num_samples: int | None = None,
        alpha: float = 0.1,
        beta: float = 10.0,
        mu: float = 0.2,
        negative_scale: float = 2.0,
        kappa: float = 0.05,
        **kwargs: Any,
    ) -> None:
        self.num_samples = None if num_samples is None else check_integer("num_samples", num_samples, minimum=1)
        self.alpha, self.beta = check_radius("alpha", alpha), check_radius("beta", beta)
        self.mu = check_real("a finite number", lambda x: abs(x) < float("inf"), "mu", mu)
        self.negative_scale = check_positive("negative_scale", negative_scale)
        self.kappa = check_radius("kappa", kappa)
        self._total: int | None = None
        super().__init__(counts, **kwargs)
        if counts is not None:
            self._find_total(counts.num_samples if isinstance(counts, ClassSplit) else None)

    @override
    def bind(self, split: ClassSplit) -> None:
        """Set the class counts and the number of samples, if the loss was built without them."""
        super().bind(split)
        self._find_total(split.num_samples)

    def _find_total(self, number: int | None) -> None:
        """Find the number of training samples, which the shifts need."""
        total = number if self.num_samples is None else self.num_samples
        assert self.class_counts is not None
        most = int(self.class_counts.max())
        if self.kappa > 0 and (total is None or total < most):
            expected = f"an integer >= {most}, the largest count, unless the split has it or `kappa` is 0"
            raise bad_argument("num_samples", expected, total)
        self._total = total

    @override
    def losses(self, logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        mapping = (self.alpha, self.beta, self.mu)
        shifts = None
        if self.kappa > 0:
            assert self._total is not None
            shifts = functional.label_shifts(self.counts_like(logits), self._total, self.kappa)
        return functional.distribution_balanced(
            logits, targets, self.counts_like(logits), shifts, self.negative_scale, *mapping, weight
        )


def _check_exponent(name: str, value: float) -> float:
    return check_real("0 or a finite number >= 1", lambda x: x == 0 or 1 <= x < float("inf"), name, value)


def _check_batch(logits: Tensor, targets: Tensor, num_classes: int | None) -> None:
    """Check shapes and dtypes only, because reading values would wait for the device."""
    if not logits.is_floating_point() or logits.ndim != 2 or num_classes not in (None, logits.shape[1]):
        shape = f"(N, {'C' if num_classes is None else num_classes})"
        found = f"{tuple(logits.shape)} of {logits.dtype}"
        raise bad_argument("logits", f"of shape {shape}, a floating dtype", got_text=found)
    if targets.is_complex() or targets.shape != logits.shape:
        expected = f"multi-label targets of shape {tuple(logits.shape)}"
        raise bad_argument("targets", expected, got_text=f"shape {tuple(targets.shape)} of {targets.dtype}")
