"""The losses as functions of tensors. Each is the formula of its paper, and returns one loss for each sample.

Nothing is checked here: the classes of :mod:`lightning_ssesam.losses` do that. In all functions, ``logits`` z are
``(N, C)`` or ``(N, C, ...)``, float32 or float64. ``targets`` are class indices y, ``(N, ...)``, int64, or class
probabilities t of the shape and dtype of the logits. ``class_counts`` n are the training samples of each class,
``(C,)``, in the dtype of the logits, and pi_j = n_j / sum_k n_k. The loss of a sample is multiplied by the ``weight``
w, ``(C,)``, of its class; for class probabilities it is the sum of t_j w_j l_j, where l_j is the loss for class j.

A count may be 0. Then the log of the class frequency is that of the smallest number of the dtype. So the class has no
part in the softmax, and its own loss is large and finite.

Three functions are of multi-label data: :func:`binary_cross_entropy`, :func:`asymmetric` and
:func:`distribution_balanced`. Their ``targets`` y are answers in [0, 1], ``(N, C)``, in the dtype of the logits. They
return a loss for each label of each sample, ``(N, C)``, times the ``weight`` of the label.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ssesam._validation import check_beta
from lightning_ssesam.split import ClassSplit, as_counts
from lightning_ssesam.split import Counts as ClassCounts

__all__ = [
    "adjusted",
    "asymmetric",
    "binary_cross_entropy",
    "class_balanced_weights",
    "cross_entropy",
    "distribution_balanced",
    "focal",
    "label_shifts",
    "ldam",
    "ldam_margins",
    "logit_adjusted",
    "sigmoid_focal",
    "vector_scaling",
]

Counts = ClassSplit | ClassCounts


def class_balanced_weights(counts: Counts, beta: float = 0.9999) -> Tensor:
    r"""Return class weights by the effective number of samples (Cui et al., CVPR 2019, arXiv:1901.05555).

    .. math:: w_j \propto (1 - \beta) / (1 - \beta^{n_j}), \quad \sum_j w_j = C

    Args:
        counts: Training samples of each class, ``(C,)``, integers >= 1, or a split that has them.
        beta: A number in [0, 1); 0 gives all classes the same weight.

    Returns:
        The weights ``(C,)``, float64, on the CPU. A class without samples, which only a split may have, has weight 0,
        and C counts the others.

    Raises:
        ArgumentError: If a count is not an integer >= 1, or ``beta`` is out of range.

    Example:
        >>> class_balanced_weights([2, 1], beta=0.5)
        tensor([0.8000, 1.2000], dtype=torch.float64)
    """
    return balanced_weights(counts_of(counts), beta)


def balanced_weights(class_counts: Tensor, beta: float) -> Tensor:
    """Return :func:`class_balanced_weights` for checked counts ``(C,)``, of which some may be 0."""
    numbers = class_counts.double()
    exponents = numbers * torch.tensor(check_beta(beta), dtype=torch.float64).log()
    weights = (-1 / torch.expm1(exponents)).masked_fill(numbers == 0, 0.0)
    return weights * ((numbers > 0).sum() / weights.sum())


def counts_of(counts: Counts, allow_empty: bool = False) -> Tensor:
    """Return class counts ``(C,)``, int64, given as such or as a split."""
    return counts.class_counts if isinstance(counts, ClassSplit) else as_counts(counts, allow_empty)


def cross_entropy(logits: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the cross-entropies ``(N, ...)``. No class index is ignored here, the classes of losses do that."""
    return F.cross_entropy(logits, targets, weight=weight, ignore_index=-(2**62), reduction="none")


def ldam_margins(class_counts: Tensor, max_margin: float = 0.5) -> Tensor:
    r"""Return the margins of LDAM, ``(C,)`` (Cao et al., NeurIPS 2019, arXiv:1906.07413, eq. 13).

    .. math:: m_j = m_\max (\min_k n_k / n_j)^{1/4}

    The minimum is over the classes with samples. A class without samples has no margin.

    Example:
        >>> ldam_margins(torch.tensor([16.0, 1.0]), max_margin=0.5)
        tensor([0.2500, 0.5000])
    """
    is_empty = class_counts == 0
    smallest = class_counts.masked_fill(is_empty, math.inf).min()
    return (max_margin * (smallest / class_counts) ** 0.25).masked_fill(is_empty, 0.0)


def ldam(logits: Tensor, targets: Tensor, margins: Tensor, scale: float = 30.0, weight: Tensor | None = None) -> Tensor:
    r"""Return the LDAM losses ``(N, ...)`` for ``margins`` m, ``(C,)`` (Cao et al., NeurIPS 2019, eq. 12).

    .. math:: l_y(z) = -\log \frac{e^{s (z_y - m_y)}}{e^{s (z_y - m_y)} + \sum_{k \ne y} e^{s z_k}}

    Example:
        >>> ldam(torch.tensor([[0.25, 0.0]]), torch.tensor([0]), margins=torch.tensor([0.25, 0.5]), scale=1.0)
        tensor([0.6931])
    """
    margins, logits = scale * margins, scale * _centred(logits)
    if not targets.is_floating_point():
        margin = torch.zeros_like(logits).scatter(1, targets.unsqueeze(1), margins[targets].unsqueeze(1))
        return cross_entropy(logits - margin, targets, weight)
    # The log-sum-exp over all classes but j is log(1 - p_j), which is exact if p_j <= 1/2. Only the class of the
    # largest logit can have more, so its sum is computed without it.
    log_p = logits.log_softmax(1)
    is_top = torch.zeros_like(log_p, dtype=torch.bool).scatter(1, log_p.argmax(1, keepdim=True), True)
    others = log_p.masked_fill(is_top, torch.finfo(log_p.dtype).min)
    log_of_others = torch.where(is_top, others.logsumexp(1, keepdim=True), torch.log1p(-others.exp()))
    losses = -F.logsigmoid(log_p - log_of_others - along_classes(margins, logits))
    return _expectation(losses, targets, weight)


def vector_scaling(
    logits: Tensor,
    targets: Tensor,
    class_counts: Tensor,
    gamma: float = 0.15,
    tau: float = 1.25,
    weight: Tensor | None = None,
) -> Tensor:
    r"""Return the vector-scaling losses ``(N, ...)`` (Kini et al., NeurIPS 2021, arXiv:2103.01550).

    The cross-entropy of :math:`\Delta_j z_j + \tau \log \pi_j`, with :math:`\Delta_j = (n_j / \max_k n_k)^\gamma`.

    Example:
        >>> vector_scaling(torch.ones(1, 2), torch.tensor([0]), torch.tensor([16.0, 1.0]), gamma=0.25, tau=0.0)
        tensor([0.4741])
    """
    factors = along_classes((class_counts / class_counts.max()) ** gamma, logits)
    return logit_adjusted(factors * logits, targets, class_counts, tau, weight)


def logit_adjusted(
    logits: Tensor, targets: Tensor, class_counts: Tensor, tau: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    r"""Return the cross-entropies ``(N, ...)`` of :math:`z_j + \tau \log \pi_j` (Menon et al., ICLR 2021, eq. 10).

    Example:
        >>> logit_adjusted(torch.zeros(1, 2), torch.tensor([1]), torch.tensor([9.0, 1.0]))
        tensor([2.3026])
    """
    return adjusted(logits, targets, tau * log_counts(class_counts / class_counts.sum()), weight)


def adjusted(logits: Tensor, targets: Tensor, offsets: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the cross-entropies ``(N, ...)`` of logits to which an offset for each class, ``(C,)``, is added.

    With ``offsets = log_counts(class_counts)`` it is balanced softmax (Ren et al., NeurIPS 2020, arXiv:2007.10740).

    Example:
        >>> adjusted(torch.zeros(1, 2), torch.tensor([1]), torch.tensor([9.0, 1.0]).log())
        tensor([2.3026])
    """
    # Centred first: a float32 near 10,000 keeps only three digits of an offset.
    return cross_entropy(_centred(logits) + along_classes(offsets, logits), targets, weight)


def focal(logits: Tensor, targets: Tensor, gamma: float = 2.0, weight: Tensor | None = None) -> Tensor:
    r"""Return the focal losses ``(N, ...)`` of a softmax (Lin et al., ICCV 2017, arXiv:1708.02002, eq. 4).

    .. math:: l = \sum_j t_j (1 - p_j)^\gamma (-\log p_j)

    Example:
        >>> focal(torch.zeros(1, 2), torch.tensor([0]), gamma=2.0)
        tensor([0.1733])
    """
    log_p = logits.log_softmax(1)
    if targets.is_floating_point():
        return _expectation(_modulated(-log_p, gamma), targets, weight)
    losses = _modulated(-log_p.gather(1, targets.unsqueeze(1)).squeeze(1), gamma)
    return losses if weight is None else losses * weight[targets]


def sigmoid_focal(
    logits: Tensor, targets: Tensor, gamma: float = 2.0, alpha: float | None = None, weight: Tensor | None = None
) -> Tensor:
    """Return the focal losses ``(N, ...)`` of a sigmoid, summed over the classes.

    Each class is a question with the answer yes or no (Lin et al., ICCV 2017, arXiv:1708.02002, eq. 5). ``alpha`` is
    the weight of yes; that of no is 1 - alpha. For class probabilities the loss is multiplied by the sum of t_j w_j.

    Example:
        >>> sigmoid_focal(torch.zeros(1, 2), torch.tensor([0]), gamma=0.0)
        tensor([1.3863])
    """
    from torchvision.ops import sigmoid_focal_loss

    if not targets.is_floating_point():
        targets = torch.zeros_like(logits).scatter(1, targets.unsqueeze(1), 1.0)
    losses: Tensor = sigmoid_focal_loss(logits, targets, alpha=-1.0 if alpha is None else alpha, gamma=gamma).sum(1)
    return losses if weight is None else losses * (targets * along_classes(weight, targets)).sum(1)


def binary_cross_entropy(logits: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the binary cross-entropies ``(N, C)`` of the labels."""
    return F.binary_cross_entropy_with_logits(logits, targets, weight, reduction="none")


def asymmetric(
    logits: Tensor,
    targets: Tensor,
    gamma_neg: float = 4.0,
    gamma_pos: float = 0.0,
    margin: float = 0.05,
    weight: Tensor | None = None,
) -> Tensor:
    r"""Return the asymmetric losses ``(N, C)`` (Ridnik et al., ICCV 2021, arXiv:2009.14119, eq. 4 to 7).

    .. math:: l = -y (1 - p)^{\gamma_+} \log p - (1 - y) \, q^{\gamma_-} \log(1 - q), \quad q = \max(p - m, 0)

    Example:
        >>> asymmetric(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), gamma_neg=2.0, margin=0.0)
        tensor([[0.6931, 0.1733]])
    """
    # The log of 1 - q, which without a margin is exact for any logit.
    of_no = F.logsigmoid(-logits) if margin == 0 else ((-logits).sigmoid() + margin).clamp(max=1).log()
    yes, no = _modulated(-F.logsigmoid(logits), gamma_pos), _modulated(-of_no, gamma_neg)
    losses = targets * yes + (1 - targets) * no
    return losses if weight is None else losses * weight


def label_shifts(class_counts: Tensor, num_samples: int, kappa: float = 0.05) -> Tensor:
    r"""Return the shifts of the distribution-balanced loss, ``(C,)`` (Wu et al., ECCV 2020, section 3.2).

    .. math:: \nu_j = \kappa \log(1 / p_j - 1), \quad p_j = n_j / N

    A share of 0 or 1 counts as the nearest number of the dtype that is neither.

    Example:
        >>> label_shifts(torch.tensor([4.0, 1.0]), num_samples=8, kappa=1.0)
        tensor([-0.0000, 1.9459])
    """
    return -kappa * torch.logit(class_counts / num_samples, eps=torch.finfo(class_counts.dtype).eps)


def distribution_balanced(
    logits: Tensor,
    targets: Tensor,
    class_counts: Tensor,
    shifts: Tensor | None = None,
    negative_scale: float = 2.0,
    alpha: float = 0.1,
    beta: float = 10.0,
    mu: float = 0.2,
    weight: Tensor | None = None,
) -> Tensor:
    r"""Return the distribution-balanced losses ``(N, C)`` (Wu et al., ECCV 2020, arXiv:2007.09654, section 3).

    .. math::

        l_j = \hat r_j \left[ y_j \log(1 + e^{-(z_j - \nu_j)})
            + \tfrac{1}{\lambda} (1 - y_j) \log(1 + e^{\lambda (z_j - \nu_j)}) \right]

        \hat r_j = \alpha + \sigma(\beta (r_j - \mu)), \quad r_j = \frac{1 / n_j}{\sum_k y_k / n_k}

    Here r is the chance to draw the sample by label j, over that to draw it by any of its labels. Without a label, r is
    infinite. The ``shifts`` are :math:`\nu`, ``(C,)``; None for 0.

    Example:
        >>> distribution_balanced(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([4.0, 1.0]))
        tensor([[0.4159, 0.7607]])
    """
    inverse = torch.where(class_counts > 0, 1 / class_counts, 0)
    total = targets @ inverse
    ratio = torch.where(total.unsqueeze(1) > 0, inverse / total.unsqueeze(1), torch.finfo(logits.dtype).max)
    factors = alpha + (beta * (ratio - mu)).sigmoid()
    shifted = logits if shifts is None else logits - shifts
    of_no = F.logsigmoid(-negative_scale * shifted) / negative_scale
    losses = -factors * (targets * F.logsigmoid(shifted) + (1 - targets) * of_no)
    return losses if weight is None else losses * weight


def _modulated(losses: Tensor, gamma: float) -> Tensor:
    miss = -torch.expm1(-losses)
    # Same value. Without it, gamma < 1 gives an infinite slope at miss = 0 and a NaN gradient.
    miss = torch.where(miss > 0, miss, torch.zeros_like(miss))
    return losses * miss**gamma


def log_counts(class_counts: Tensor) -> Tensor:
    """Return the logs of counts or frequencies ``(C,)``, with the smallest number of the dtype in the place of 0."""
    return class_counts.clamp(min=torch.finfo(class_counts.dtype).tiny).log()


def along_classes(values: Tensor, logits: Tensor) -> Tensor:
    """Return values ``(C,)`` in a shape that multiplies logits ``(N, C, ...)``."""
    return values.reshape(-1, *[1] * (logits.ndim - 2))


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.detach().amax(1, keepdim=True)


def _expectation(losses: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
    mass = targets if weight is None else targets * along_classes(weight, targets)
    return (mass * losses).sum(1)
