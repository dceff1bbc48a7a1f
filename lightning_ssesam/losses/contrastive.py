"""Balanced contrastive learning: the loss of views of samples, and of a centre for each class."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_integer, check_positive
from lightning_ssesam.targets import IGNORE_INDEX

__all__ = ["BalancedContrastiveLoss", "balanced_contrastive"]


def balanced_contrastive(
    features: Tensor, targets: Tensor, centers: Tensor, temperature: float = 0.1, ignored: Tensor | None = None
) -> Tensor:
    r"""Return the balanced contrastive losses ``(N,)`` (Zhu et al., CVPR 2022, arXiv:2207.09052).

    The views of all samples and the centres c of all classes are compared. For a view z of class y,

    .. math:: -\frac{1}{|P|} \sum_{p \in P} \log \frac{e^{z \cdot p / \tau}}
        {\sum_j \frac{1}{|B_j|} \sum_{k \in B_j} e^{z \cdot k / \tau}}

    where :math:`B_j` has the views of class j and its centre (*class-complement*: no class is absent). The mean over
    :math:`B_j` gives every class the same share (*class-averaging*). The view z itself is not in :math:`B_y`, as in the
    published code, and :math:`P = B_y`. The loss of a sample is the mean over its views.

    Args:
        features: Features z of each view, of length 1, ``(N, V, D)``, float32 or float64.
        targets: Class indices y, ``(N,)``, int64, in [0, C).
        centers: Centres c, of length 1, ``(C, D)``, in the dtype of the features.
        temperature: Temperature tau, > 0.
        ignored: Mask ``(N,)`` of samples that are not compared. Their loss is 0.

    Example:
        >>> axes = torch.eye(2)
        >>> balanced_contrastive(axes.unsqueeze(1), torch.tensor([0, 1]), axes, temperature=1.0)
        tensor([0.3133, 0.3133])
    """
    number, views, _ = features.shape
    num_classes = len(centers)
    anchors = features.flatten(0, 1)
    labels = (targets if ignored is None else targets.masked_fill(ignored, num_classes)).repeat_interleave(views)
    classes = torch.cat([labels, torch.arange(num_classes, device=labels.device)])
    similarities = anchors @ torch.cat([anchors, centers]).T / temperature
    is_same = labels.unsqueeze(1) == classes
    # One class more, for the samples that are ignored.
    sizes = features.new_zeros(num_classes + 1).index_add(0, classes, features.new_ones(len(classes)))[classes]
    is_out = torch.eye(len(labels), len(classes), dtype=torch.bool, device=labels.device) | (classes == num_classes)
    positives = is_same & ~is_out
    log_sizes = (sizes - is_same.to(sizes.dtype)).clamp(min=1).log()
    log_sums = (similarities - log_sizes).masked_fill(is_out, -torch.inf).logsumexp(1)
    losses = log_sums - (similarities * positives).sum(1) / positives.sum(1).clamp(min=1)
    losses = losses.reshape(number, views).mean(1)
    return losses if ignored is None else losses.masked_fill(ignored, 0.0)


class BalancedContrastiveLoss(nn.Module):
    """Balanced contrastive loss (Zhu et al., CVPR 2022, arXiv:2207.09052); see :func:`.balanced_contrastive`.

    Its losses depend on all samples of a batch. So a step needs full passes: ``passes="auto"`` finds that out, and
    ``passes="split"`` would be wrong. Accumulated batches, and those of several processes, are compared apart.

    Args:
        temperature: Temperature, a finite number > 0; 0.1 for CIFAR and 0.07 for larger data in the paper.
        ignore_index: Class index that does not count, any integer. Its loss is 0, and no sample is compared with it.

    Raises:
        ArgumentError: If an argument is out of range; from ``forward``, if shapes or dtypes do not fit.

    Example:
        >>> loss = BalancedContrastiveLoss(temperature=1.0)
        >>> loss(2 * torch.eye(2).unsqueeze(1), torch.tensor([0, 1]), torch.eye(2))
        tensor([0.3133, 0.3133])
    """

    def __init__(self, temperature: float = 0.1, ignore_index: int = IGNORE_INDEX) -> None:
        super().__init__()
        self.temperature = check_positive("temperature", temperature)
        self.ignore_index = check_integer("ignore_index", ignore_index)

    @override
    def forward(self, features: Tensor, targets: Tensor, centers: Tensor) -> Tensor:
        """Normalize the vectors to length 1, and return the loss of every sample, ``(N,)``, float32 or float64.

        Args:
            features: Features of V >= 1 views of each sample, ``(N, V, D)``, any floating dtype.
            targets: Class indices ``(N,)`` in [0, C) or ``ignore_index``, any integer dtype.
            centers: Vector of each class, ``(C, D)``, any floating dtype.
        """
        _check_shapes(features, targets, centers)
        dtype = torch.promote_types(features.dtype, torch.float32)
        targets = targets.long()
        ignored = targets == self.ignore_index
        # Half precision has too few digits for the exponentials.
        with torch.autocast(features.device.type, enabled=False):
            directions = F.normalize(features.to(dtype), dim=-1), F.normalize(centers.to(dtype), dim=-1)
            return balanced_contrastive(directions[0], targets, directions[1], self.temperature, ignored)

    @override
    def extra_repr(self) -> str:
        """Return the arguments for ``repr``."""
        return f"temperature={self.temperature}, ignore_index={self.ignore_index}"


def _check_shapes(features: Tensor, targets: Tensor, centers: Tensor) -> None:
    if features.ndim != 3 or not features.is_floating_point():
        found = f"{tuple(features.shape)} of {features.dtype}"
        raise bad_argument("features", "of shape (N, V, D), V views of N samples, a floating dtype", got_text=found)
    if centers.ndim != 2 or centers.shape[1] != features.shape[2]:
        expected = f"of shape (C, {features.shape[2]}), one vector for each class"
        raise bad_argument("centers", expected, got_text=f"shape {tuple(centers.shape)}")
    if targets.shape != features.shape[:1] or targets.is_floating_point() or targets.dtype == torch.bool:
        expected = f"class indices of shape ({len(features)},), since only whole samples can be compared"
        raise bad_argument("targets", expected, got_text=f"shape {tuple(targets.shape)} of {targets.dtype}")
