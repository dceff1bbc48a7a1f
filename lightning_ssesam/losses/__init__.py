"""Losses for long-tailed data, unreduced by default, as the objectives need them.

The formulas are functions in :mod:`lightning_ssesam.losses.functional`. The classes hold counts, weights and
checks. They raise ``ArgumentError`` if an argument is out of range, or does not fit the others.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_beta, check_choice, check_positive, check_radius
from lightning_ssesam.losses import functional
from lightning_ssesam.losses.base import LongTailLoss, Reduction, Weight
from lightning_ssesam.losses.contrastive import BalancedContrastiveLoss
from lightning_ssesam.losses.functional import Counts, class_balanced_weights
from lightning_ssesam.losses.multi_label import (
    AsymmetricLoss,
    BinaryCrossEntropyLoss,
    ClassBalancedBCELoss,
    DistributionBalancedLoss,
    MultiLabelLoss,
)
from lightning_ssesam.split import ClassSplit
from lightning_ssesam.targets import IGNORE_INDEX

__all__ = [
    "AsymmetricLoss",
    "BalancedContrastiveLoss",
    "BalancedSoftmaxLoss",
    "BinaryCrossEntropyLoss",
    "ClassBalancedBCELoss",
    "ClassBalancedLoss",
    "DistributionBalancedLoss",
    "FocalLoss",
    "LDAMLoss",
    "LogitAdjustedLoss",
    "LongTailLoss",
    "MultiLabelLoss",
    "VSLoss",
    "class_balanced_weights",
]


class LDAMLoss(LongTailLoss):
    """Label-distribution-aware margin loss (Cao et al., NeurIPS 2019, arXiv:1906.07413); see :func:`.ldam`.

    It is made for a normalized classifier, whose logits are cosines in [-1, 1]. With
    :class:`~lightning_ssesam.callbacks.DeferredReweighting` it is the paper's LDAM-DRW.

    Args:
        counts: Training samples of each class, ``(C,)``, or a split; can be bound later.
        max_margin: The margin of the rarest class, a finite number >= 0.
        scale: The factor s on the logits, a finite number > 0.
        **kwargs: ``weight``, ``reduction`` and ``ignore_index``, see :class:`LongTailLoss`.

    Example:
        >>> loss = LDAMLoss([16, 1], max_margin=0.5, scale=1.0)
        >>> loss.margins
        tensor([0.2500, 0.5000])
        >>> loss(torch.tensor([[0.25, 0.0], [0.25, 0.0]]), torch.tensor([0, 1]))
        tensor([0.6931, 1.1369])
    """

    def __init__(
        self, counts: Counts | None = None, max_margin: float = 0.5, scale: float = 30.0, **kwargs: Any
    ) -> None:
        super().__init__(counts, **kwargs)
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
        margins = functional.ldam_margins(self.counts_like(logits), self.max_margin)
        return functional.ldam(logits, targets, margins, self.scale, weight)


class LogitAdjustedLoss(LongTailLoss):
    """Logit-adjusted cross-entropy (Menon et al., ICLR 2021, arXiv:2007.07314); see :func:`.logit_adjusted`.

    Args:
        counts: Training samples of each class, ``(C,)``, or a split; can be bound later.
        tau: Factor on the log of the class frequencies, a finite number >= 0; 0 is plain cross-entropy.
        **kwargs: ``weight``, ``reduction`` and ``ignore_index``, see :class:`LongTailLoss`.

    Example:
        >>> LogitAdjustedLoss([9, 1])(torch.zeros(2, 2), torch.tensor([0, 1]))
        tensor([0.1054, 2.3026])
    """

    def __init__(self, counts: Counts | None = None, tau: float = 1.0, **kwargs: Any) -> None:
        super().__init__(counts, **kwargs)
        self.tau = check_radius("tau", tau)

    @override
    def losses(self, logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        return functional.logit_adjusted(logits, targets, self.counts_like(logits), self.tau, weight)


class BalancedSoftmaxLoss(LongTailLoss):
    r"""Balanced softmax (Ren et al., NeurIPS 2020, arXiv:2007.10740).

    The cross-entropy of :math:`z_j + \log n_j`; the same as :class:`LogitAdjustedLoss` with ``tau=1``. Its arguments
    are those of :class:`LongTailLoss`.

    Example:
        >>> BalancedSoftmaxLoss([9, 1])(torch.zeros(2, 2), torch.tensor([0, 1]))
        tensor([0.1054, 2.3026])
    """

    @override
    def losses(self, logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        return functional.adjusted(logits, targets, functional.log_counts(self.counts_like(logits)), weight)


class VSLoss(LongTailLoss):
    """Vector-scaling loss (Kini et al., NeurIPS 2021, arXiv:2103.01550); see :func:`.vector_scaling`.

    Args:
        counts: Training samples of each class, ``(C,)``, or a split; can be bound later.
        gamma: Exponent of the factors on the logits, a finite number >= 0; 0 is :class:`LogitAdjustedLoss`.
        tau: Factor on the log of the class frequencies, a finite number >= 0.
        **kwargs: ``weight``, ``reduction`` and ``ignore_index``, see :class:`LongTailLoss`.

    Example:
        >>> VSLoss([16, 1], gamma=0.25, tau=0.0)(torch.ones(2, 2), torch.tensor([0, 1]))
        tensor([0.4741, 0.9741])
    """

    def __init__(self, counts: Counts | None = None, gamma: float = 0.15, tau: float = 1.25, **kwargs: Any) -> None:
        super().__init__(counts, **kwargs)
        self.gamma = check_radius("gamma", gamma)
        self.tau = check_radius("tau", tau)

    @override
    def losses(self, logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        return functional.vector_scaling(logits, targets, self.counts_like(logits), self.gamma, self.tau, weight)


class ClassBalancedLoss(LongTailLoss):
    """Cross-entropy times the :func:`class_balanced_weights` (Cui et al., CVPR 2019, arXiv:1901.05555).

    Args:
        counts: Training samples of each class, ``(C,)``, or a split; can be bound later, which sets ``weight``.
        beta: Number in [0, 1), see :func:`class_balanced_weights`.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        ignore_index: Class index that does not count, see :class:`LongTailLoss`.

    Example:
        >>> ClassBalancedLoss([2, 1], beta=0.5)(torch.zeros(2, 2), torch.tensor([0, 1]))
        tensor([0.5545, 0.8318])
    """

    def __init__(
        self,
        counts: Counts | None = None,
        beta: float = 0.9999,
        reduction: Reduction = "none",
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__(counts, None, reduction, ignore_index)
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
            self.weight = functional.balanced_weights(self.class_counts, self.beta).to(torch.get_default_dtype())

    @override
    def losses(self, logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        return functional.cross_entropy(logits, targets, weight)


class FocalLoss(LongTailLoss):
    """Focal loss (Lin et al., ICCV 2017, arXiv:1708.02002); see :func:`.focal` and :func:`.sigmoid_focal`.

    Args:
        gamma: Exponent, a finite number >= 0; 0 is cross-entropy. With ``"sigmoid"`` not between 0 and 1, because the
            gradient of certain answers would be infinite.
        kind: ``"softmax"`` or ``"sigmoid"``.
        alpha: Weight in [0, 1] of yes, with ``"sigmoid"``; no has the weight 1 - alpha. None by default.
        weight: Class weights ``(C,)``, finite and >= 0; none by default.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        ignore_index: Class index that does not count, see :class:`LongTailLoss`.

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
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__(None, weight, reduction, ignore_index)
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
