"""Accuracy of groups of classes: head and tail; many-, medium- and few-shot."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE
from typing_extensions import override

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.split import ClassSplit


class _GroupAccuracy(Metric):
    """Base of the accuracies: counts correct predictions per class. A subclass names groups of classes."""

    is_differentiable = False
    higher_is_better = True
    full_state_update: bool = False
    plot_lower_bound: float = 0.0
    plot_upper_bound: float = 1.0

    correct: Tensor
    total: Tensor

    def __init__(self, split: ClassSplit, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(split, ClassSplit):
            raise bad_argument("split", "a ClassSplit", split)
        self.validate_args = validate_args
        self.num_classes = split.num_classes
        self._groups = {**self._class_groups(split), "all": torch.ones(split.num_classes, dtype=torch.bool)}
        for state in ("correct", "total"):
            self.add_state(state, torch.zeros(split.num_classes, dtype=torch.long), dist_reduce_fx="sum")

    @staticmethod
    @abstractmethod
    def _class_groups(split: ClassSplit) -> dict[str, Tensor]:
        """Return the mask ``(C,)`` of the classes of each group."""

    @override
    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            preds: Scores ``(N, C, ...)`` of any floating dtype, such as logits, or predicted class indices ``(N, ...)``
                of an integer dtype. A sample with a NaN among its scores counts as wrong.
            target: Class indices ``(N, ...)``, an integer dtype, each in ``[0, C)``.

        Raises:
            ArgumentError: If ``validate_args`` is set and shapes, dtypes or class indices do not fit.
        """
        if self.validate_args:
            _check_batch(preds, target, self.num_classes)
        correct, total = _count(preds, target, self.num_classes)
        self.correct += correct
        self.total += total

    @override
    def compute(self) -> dict[str, Tensor]:
        """Return the mean recall of the classes of each group, in [0, 1]; NaN for a group without samples."""
        recalls = self.class_recalls()
        return {name: recalls[mask.to(recalls.device)].nanmean() for name, mask in self._groups.items()}

    def class_recalls(self) -> Tensor:
        """Return the recall of every class ``(C,)``, as counted in this process; NaN for classes without samples."""
        return self.correct / self.total

    @override
    def plot(
        self, val: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]] | None = None, ax: _AX_TYPE | None = None
    ) -> _PLOT_OUT_TYPE:
        """Plot one result, or several in the order of time.

        Args:
            val: Result of :meth:`compute` or ``forward``, or a list of results; calls :meth:`compute` by default.
            ax: Axes to draw on; a new figure by default.

        Returns:
            The figure, or None if ``ax`` was given, and the axes.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        return self._plot(val, ax)  # type: ignore[arg-type]


class HeadTailAccuracy(_GroupAccuracy):
    """Mean per-class recall of the head classes, of the tail classes, and of all.

    Every class of a group counts the same, however many samples it has. Classes without samples in the evaluation data
    are left out, and a group without samples is NaN. On a balanced test set ``"all"`` is the plain accuracy.

    Args:
        split: Class split, with head and tail.
        validate_args: Whether to check shapes and ranges of every batch; costs a synchronisation on a GPU.
        **kwargs: See :class:`torchmetrics.Metric`.

    Returns:
        A dictionary of scalars ``{"head", "tail", "all"}``, from ``forward`` and ``compute``.

    Raises:
        ArgumentError: If ``split`` is not a :class:`~lightning_ssesam.ClassSplit`.

    Example:
        >>> from torch import tensor
        >>> split = ClassSplit([100, 50, 5], tail=[2])
        >>> metric = HeadTailAccuracy(split)
        >>> metric.update(tensor([0, 0, 1, 1, 2]), tensor([0, 0, 1, 0, 2]))
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
        {'head': 0.833, 'tail': 1.0, 'all': 0.889}
    """

    @staticmethod
    @override
    def _class_groups(split: ClassSplit) -> dict[str, Tensor]:
        return {"head": split.head, "tail": split.tail}


class ManyMediumFewAccuracy(_GroupAccuracy):
    """Mean per-class recall of the many-, medium- and few-shot classes, and of all (Liu et al., CVPR 2019).

    Counted like :class:`HeadTailAccuracy`.

    Args:
        split: Class split, whose ``many_above`` and ``few_below`` bound the groups.
        validate_args: See :class:`HeadTailAccuracy`.
        **kwargs: See :class:`torchmetrics.Metric`.

    Returns:
        A dictionary of scalars ``{"many", "medium", "few", "all"}``, from ``forward`` and ``compute``.

    Raises:
        ArgumentError: If ``split`` is not a :class:`~lightning_ssesam.ClassSplit`.

    Example:
        >>> from torch import tensor
        >>> split = ClassSplit([500, 50, 5], tail=[2], many_above=100, few_below=20)
        >>> metric = ManyMediumFewAccuracy(split)
        >>> metric.update(tensor([0, 1, 1, 2, 0]), tensor([0, 1, 0, 2, 2]))
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
        {'many': 0.5, 'medium': 1.0, 'few': 0.5, 'all': 0.667}
    """

    @staticmethod
    @override
    def _class_groups(split: ClassSplit) -> dict[str, Tensor]:
        return {"many": split.many, "medium": split.medium, "few": split.few}


class HeadTailConfusion(Metric):
    """Error rates by group: the share of a group's samples that is misclassified as another head or tail class.

    Every class of a group counts the same, as in :class:`HeadTailAccuracy`. The accuracy of a group and its two error
    rates add up to 1, unless a score is NaN. A group without samples in the evaluation data is NaN.

    Args:
        split: Class split, with head and tail.
        **kwargs: See :class:`torchmetrics.Metric`.

    Returns:
        A dictionary of scalars in [0, 1], from ``forward`` and ``compute``: ``{"head_to_head", "head_to_tail",
        "tail_to_head", "tail_to_tail"}``. ``"tail_to_head"`` is the share of tail samples predicted as a head class.

    Raises:
        ArgumentError: If ``split`` is not a :class:`~lightning_ssesam.ClassSplit`.

    Example:
        >>> from torch import tensor
        >>> metric = HeadTailConfusion(ClassSplit([100, 50, 5], tail=[2]))
        >>> metric.update(tensor([0, 1, 2, 1, 0]), tensor([0, 0, 1, 2, 2]))
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
        {'head_to_head': 0.25, 'head_to_tail': 0.5, 'tail_to_head': 1.0, 'tail_to_tail': 0.0}
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update: bool = False

    wrong: Tensor
    total: Tensor

    def __init__(self, split: ClassSplit, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(split, ClassSplit):
            raise bad_argument("split", "a ClassSplit", split)
        self.split = split
        self.add_state("wrong", torch.zeros(2, split.num_classes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(split.num_classes, dtype=torch.long), dist_reduce_fx="sum")

    @override
    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch; ``preds`` and ``target`` as in :meth:`HeadTailAccuracy.update`.

        Raises:
            ArgumentError: If shapes, dtypes or class indices do not fit.
        """
        _check_batch(preds, target, self.split.num_classes)
        predicted, target = _predicted(preds).flatten(), target.flatten().long()
        is_error = (predicted != target) & (predicted >= 0)
        is_tail = self.split.tail_on(target.device)[predicted.clamp(min=0)]
        for row, chosen in enumerate((is_error & ~is_tail, is_error & is_tail)):
            self.wrong[row].scatter_add_(0, target, chosen.long())
        self.total.scatter_add_(0, target, torch.ones_like(target))

    @override
    def compute(self) -> dict[str, Tensor]:
        """Return the four error rates."""
        shares = self.wrong / self.total
        groups = {"head": self.split.head.to(shares.device), "tail": self.split.tail_on(shares.device)}
        return {
            f"{source}_to_{target}": row[mask].nanmean()
            for source, mask in groups.items()
            for target, row in zip(groups, shares, strict=True)
        }


def _check_batch(preds: Tensor, target: Tensor, num_classes: int) -> None:
    if target.is_floating_point():
        raise bad_argument("target", "class indices of an integer dtype", target.dtype)
    if preds.is_floating_point():
        expected = (*target.shape[:1], num_classes, *target.shape[1:])
        if preds.shape != expected:
            raise bad_argument("preds", f"scores of shape {expected}", got_text=f"shape {tuple(preds.shape)}")
        checked = {"target": target}
    else:
        if preds.shape != target.shape:
            raise bad_argument(
                "preds", f"class indices of shape {tuple(target.shape)}", got_text=f"shape {tuple(preds.shape)}"
            )
        checked = {"preds": preds, "target": target}
    for name, indices in checked.items():
        if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= num_classes):
            found = f"values from {int(indices.min())} to {int(indices.max())}"
            raise bad_argument(name, f"class indices in [0, {num_classes})", got_text=found)


def _predicted(preds: Tensor) -> Tensor:
    """Return the predicted classes ``(N, ...)``; -1, which is never right, for samples with a NaN score."""
    # `argmax` treats NaN as the largest score.
    return preds.argmax(dim=1).masked_fill(preds.isnan().any(dim=1), -1) if preds.is_floating_point() else preds


def _count(preds: Tensor, target: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return the correct predictions and the samples of each class, both ``(C,)``."""
    target = target.flatten().long()
    hits = (_predicted(preds).flatten() == target).long()
    zeros = torch.zeros(num_classes, dtype=torch.long, device=target.device)
    # `bincount` would wait for the device.
    return zeros.scatter_add(0, target, hits), zeros.scatter_add(0, target, torch.ones_like(target))
