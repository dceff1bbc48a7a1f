"""Losses for long-tailed data, unreduced by default, as the objectives need them."""

from abc import abstractmethod
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_choice, check_positive, check_radius
from lightning_ssesam.split import ClassSplit, _as_counts

Counts = ClassSplit | Sequence[int] | Tensor
Weight = Sequence[float] | Tensor | None
Reduction = Literal["none", "mean", "sum"]


def class_balanced_weights(counts: Counts, beta: float = 0.9999) -> Tensor:
    r"""Return class weights by the effective number of samples (Cui et al., CVPR 2019, arXiv:1901.05555).

    .. math:: w_j \propto (1 - \beta) / (1 - \beta^{n_j}), \quad \sum_j w_j = C

    Args:
        counts: Training samples of each class, ``(C,)``, integers >= 1, or a split that has them.
        beta: A number in [0, 1); 0 weighs all classes the same.

    Returns:
        The weights ``(C,)``, float64, on the CPU.

    Raises:
        ValueError: If a count is not an integer >= 1, or ``beta`` is out of range.

    Example:
        >>> class_balanced_weights([2, 1], beta=0.5)
        tensor([0.8000, 1.2000], dtype=torch.float64)

    """
    exponents = _class_counts(counts).double() * torch.tensor(check_beta(beta), dtype=torch.float64).log()
    weights = -1 / torch.expm1(exponents)
    return weights * (weights.numel() / weights.sum())


class _LongTailLoss(nn.Module):
    """Class counts, class weights, checks and reduction; subclasses implement ``_losses``.

    Half precision logits are taken in float32. Class weights multiply the loss of a sample by the weight of its class;
    for class probabilities t it is the sum over the classes of t_j w_j l_j. Nothing of this is in the ``state_dict``.
    """

    weight: Tensor | None
    _needs_counts = True

    def __init__(self, counts: Counts | None = None, weight: Weight = None, reduction: Reduction = "none") -> None:
        super().__init__()
        # No buffer: steps of the mixin copy buffers, and a conversion to half precision would leave it alone anyway.
        self.class_counts = None if counts is None else _class_counts(counts)
        self._moved: dict[torch.device, Tensor] = {}
        self.reduction = check_choice("reduction", reduction, ("none", "mean", "sum"))
        self.register_buffer("weight", _check_weight(weight), persistent=False)
        if self.weight is not None and self.class_counts is not None:
            _check_length("weight", self.weight, self.class_counts.numel())

    def bind(self, split: ClassSplit) -> None:
        """Set the class counts, where the loss was built without.

        Args:
            split: The class split of the training set.

        Raises:
            ValueError: If ``split`` is no :class:`ClassSplit`, or its counts do not fit those or the weights given.

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
            logits: Of shape ``(N, C)`` or ``(N, C, ...)``, any floating dtype.
            targets: Class indices ``(N, ...)`` in [0, C), any integer dtype; or class probabilities ``(N, C, ...)``,
                any floating dtype.

        Returns:
            The loss of every sample, ``(N, ...)``; with another ``reduction`` their plain mean or sum. Float32, or
            float64 if the logits are.

        Raises:
            ValueError: If shapes or dtypes do not fit.
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
        losses = self._losses(logits, targets, None if self.weight is None else self.weight.to(logits))
        return losses if self.reduction == "none" else losses.mean() if self.reduction == "mean" else losses.sum()

    @abstractmethod
    def _losses(self, logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        """Return the losses ``(N, ...)``; ``targets`` and ``weight`` are of the logits' dtype, or ``targets`` long."""

    def _counts_as(self, logits: Tensor) -> Tensor:
        assert self.class_counts is not None
        if logits.device not in self._moved:
            self._moved[logits.device] = self.class_counts.to(logits.device)
        return self._moved[logits.device].to(logits.dtype)

    @override
    def extra_repr(self) -> str:
        """Return the arguments as they are shown."""
        hidden = ("training", "class_counts")
        fields = {name: value for name, value in vars(self).items() if name[0] != "_" and name not in hidden}
        return ", ".join(f"{name}={value!r}" for name, value in fields.items())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_moved": {}}


class LDAMLoss(_LongTailLoss):
    r"""Label-distribution-aware margin loss (Cao et al., NeurIPS 2019, arXiv:1906.07413).

    .. math:: l_y(z) = -\log \frac{e^{s (z_y - m_y)}}{e^{s (z_y - m_y)} + \sum_{k \ne y} e^{s z_k}}, \quad
        m_j = m_\max \left(\min_k n_k / n_j\right)^{1/4}

    Made for a normalized classifier, whose logits are cosines in [-1, 1]. For class probabilities t the loss is the
    sum over the classes of t_j l_j, each with the margin on j. With
    :class:`~lightning_ssesam.callbacks.DeferredReweighting` it is the paper's LDAM-DRW.

    Args:
        counts: Training samples of each class, ``(C,)``, or a split; may be bound later.
        max_margin: The margin of the rarest class, a finite number >= 0.
        scale: The factor s on the logits, a finite number > 0.
        weight: Class weights ``(C,)``, finite and >= 0; none by default.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Shape:
        Of logits, targets and losses: see :meth:`forward`.

    Raises:
        ValueError: If an argument is out of range or does not fit the others.

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
        return None if self.class_counts is None else self._margins(self.class_counts.to(torch.get_default_dtype()))

    def _margins(self, counts: Tensor) -> Tensor:
        return self.max_margin * (counts.min() / counts) ** 0.25

    @override
    def _losses(self, logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        margins = self.scale * self._margins(self._counts_as(logits))
        logits = self.scale * _centred(logits)
        if not targets.is_floating_point():
            margin = torch.zeros_like(logits).scatter(1, targets.unsqueeze(1), margins[targets].unsqueeze(1))
            return _cross_entropy(logits - margin, targets, weight)
        # The softmax over all but j: 1 - p_j loses nothing where p_j <= 1/2; the largest logit is left out by hand.
        log_p = logits.log_softmax(1)
        is_top = torch.zeros_like(log_p, dtype=torch.bool).scatter(1, log_p.argmax(1, keepdim=True), True)
        others = log_p.masked_fill(is_top, torch.finfo(log_p.dtype).min)
        log_rest = torch.where(is_top, others.logsumexp(1, keepdim=True), torch.log1p(-others.exp()))
        losses = -F.logsigmoid(log_p - log_rest - _along_classes(margins, logits))
        return _expectation(losses, targets, weight)


class _AdjustedCrossEntropy(_LongTailLoss):
    """Cross-entropy of logits that are multiplied and shifted by class."""

    @abstractmethod
    def _adjust(self, logits: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the multiplied logits, and what to add to those of each class, ``(C,)``."""

    @override
    def _losses(self, logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        logits, offsets = self._adjust(logits, self._counts_as(logits))
        # Centred first: next to 10,000 a float32 knows log n to three digits only.
        logits = _centred(logits) + _along_classes(offsets, logits)
        return _cross_entropy(logits, targets, weight)


class LogitAdjustedLoss(_AdjustedCrossEntropy):
    r"""Logit-adjusted cross-entropy (Menon et al., ICLR 2021, arXiv:2007.07314).

    The cross-entropy of :math:`z_j + \tau \log \pi_j`, with the class frequencies :math:`\pi_j = n_j / \sum_k n_k`.

    Args:
        tau: A finite number >= 0; 0 is plain cross-entropy.
        counts, weight, reduction: See :class:`LDAMLoss`.

    Shape:
        Of logits, targets and losses: see :meth:`forward`.

    Raises:
        ValueError: If an argument is out of range or does not fit the others.

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
    def _adjust(self, logits: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        return logits, self.tau * (counts / counts.sum()).log()


class BalancedSoftmaxLoss(_AdjustedCrossEntropy):
    r"""Balanced softmax (Ren et al., NeurIPS 2020, arXiv:2007.10740).

    The cross-entropy of :math:`z_j + \log n_j`; the same as :class:`LogitAdjustedLoss` with ``tau=1``.

    Args:
        counts, weight, reduction: See :class:`LDAMLoss`.

    Shape:
        Of logits, targets and losses: see :meth:`forward`.

    Raises:
        ValueError: If an argument is out of range or does not fit the others.

    Example:
        >>> BalancedSoftmaxLoss([9, 1])(torch.zeros(2, 2), torch.tensor([0, 1]))
        tensor([0.1054, 2.3026])

    """

    @override
    def _adjust(self, logits: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        return logits, counts.log()


class VSLoss(_AdjustedCrossEntropy):
    r"""Vector-scaling loss (Kini et al., NeurIPS 2021, arXiv:2103.01550).

    The cross-entropy of :math:`\Delta_j z_j + \tau \log \pi_j`, with :math:`\Delta_j = (n_j / \max_k n_k)^\gamma` and
    the class frequencies :math:`\pi_j = n_j / \sum_k n_k`.

    Args:
        gamma: A finite number >= 0; 0 is :class:`LogitAdjustedLoss`.
        tau: A finite number >= 0.
        counts, weight, reduction: See :class:`LDAMLoss`.

    Shape:
        Of logits, targets and losses: see :meth:`forward`.

    Raises:
        ValueError: If an argument is out of range or does not fit the others.

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
    def _adjust(self, logits: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        multipliers = (counts / counts.max()) ** self.gamma
        return _along_classes(multipliers, logits) * logits, self.tau * (counts / counts.sum()).log()


class ClassBalancedLoss(_LongTailLoss):
    """Cross-entropy times the :func:`class_balanced_weights` (Cui et al., CVPR 2019, arXiv:1901.05555).

    Args:
        counts: Training samples of each class, ``(C,)``, or a split; may be bound later, which sets ``weight``.
        beta: A number in [0, 1).
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Shape:
        Of logits, targets and losses: see :meth:`forward`.

    Raises:
        ValueError: If an argument is out of range.

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
    def _losses(self, logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        return _cross_entropy(logits, targets, weight)


class FocalLoss(_LongTailLoss):
    r"""Focal loss (Lin et al., ICCV 2017, arXiv:1708.02002).

    ``"softmax"`` is :math:`\sum_j t_j (1 - p_j)^\gamma (-\log p_j)` with p the softmax of the logits and t the target;
    ``"sigmoid"`` is :func:`torchvision.ops.sigmoid_focal_loss`, one yes or no for each class, summed over the classes.

    Args:
        gamma: A finite number >= 0; 0 is cross-entropy. With ``"sigmoid"`` not between 0 and 1, where the gradient of
            certain answers would not be finite.
        kind: ``"softmax"``, or ``"sigmoid"``, which needs torchvision.
        alpha: With ``"sigmoid"``, the weight in [0, 1] of yes, that of no being 1 - alpha; none by default.
        weight, reduction: See :class:`LDAMLoss`.

    Shape:
        Of logits, targets and losses: see :meth:`forward`.

    Raises:
        ValueError: If an argument is out of range or does not fit the others.

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
    def _losses(self, logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        if self.kind == "sigmoid":
            return self._sigmoid_losses(logits, targets, weight)
        log_p = logits.log_softmax(1)
        if targets.is_floating_point():
            return _expectation(self._modulated(-log_p), targets, weight)
        losses = self._modulated(-log_p.gather(1, targets.unsqueeze(1)).squeeze(1))
        return losses if weight is None else losses * weight[targets]

    def _modulated(self, losses: Tensor) -> Tensor:
        miss = -torch.expm1(-losses)
        # Of the same value; but the infinite slope of a root at 0 is kept out of the gradient, in which it is NaN.
        miss = torch.where(miss > 0, miss, torch.zeros_like(miss))
        return losses * miss**self.gamma

    def _sigmoid_losses(self, logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        from torchvision.ops import sigmoid_focal_loss

        if not targets.is_floating_point():
            targets = torch.zeros_like(logits).scatter(1, targets.unsqueeze(1), 1.0)
        alpha = -1.0 if self.alpha is None else self.alpha
        losses: Tensor = sigmoid_focal_loss(logits, targets, alpha=alpha, gamma=self.gamma).sum(1)
        return losses if weight is None else losses * (targets * _along_classes(weight, targets)).sum(1)


def _class_counts(counts: Counts) -> Tensor:
    return counts.class_counts if isinstance(counts, ClassSplit) else _as_counts(counts)


def check_beta(beta: Any) -> float:
    """Return ``beta`` as a float if it lies in [0, 1), else raise ``ValueError``."""
    if isinstance(beta, bool) or not isinstance(beta, Real) or not 0 <= float(beta) < 1:
        raise bad_argument("beta", "a number in [0, 1)", beta)
    return float(beta)


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
    """Look at shapes and dtypes alone: values would have to be waited for."""
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


def _cross_entropy(logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
    # No class index is ignored, -100 neither: it is out of range in every loss.
    return F.cross_entropy(logits, targets, weight=weight, ignore_index=-(2**62), reduction="none")


def _along_classes(values: Tensor, logits: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (logits.ndim - 2))


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.detach().amax(1, keepdim=True)


def _expectation(losses: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
    mass = targets if weight is None else targets * _along_classes(weight, targets)
    return (mass * losses).sum(1)
