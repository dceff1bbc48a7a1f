"""Balanced accuracy (macro recall) of groups of classes: head and tail; many-, medium- and few-shot; each class."""

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import Self, override

from lightning_ssesam._validation import bad_argument, check_choice, check_integer
from lightning_ssesam.class_order import check_class_names
from lightning_ssesam.split import ClassSplit
from lightning_ssesam.targets import IGNORE_INDEX, ignored_mask


class _GroupMetric(Metric):
    """Base of the metrics: holds the split, checks batches, and counts the samples of each class."""

    is_differentiable = False
    full_state_update: bool = False
    is_multi_label = False

    log_prefix: str = "acc_"
    """What a classifier writes before the name of a value in its logs."""

    total: Tensor
    _chosen: str | None = None

    def __init__(
        self, split: ClassSplit, validate_args: bool = True, ignore_index: int = IGNORE_INDEX, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(split, ClassSplit):
            raise bad_argument("split", "a ClassSplit", split)
        if split.multi_label != self.is_multi_label:
            kind, other = ("with", "HeadTailAccuracy") if self.is_multi_label else ("without", "GroupAveragePrecision")
            expected = f"one {kind} `multi_label` for {type(self).__name__} ({other} is for the others)"
            raise bad_argument("split", expected, split)
        self.split, self.num_classes, self.validate_args = split, split.num_classes, validate_args
        self.ignore_index = check_integer("ignore_index", ignore_index)
        self.add_state("total", torch.zeros(split.num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def group(self, name: str) -> Self:
        """Return a new metric of one value alone, a scalar, such as the accuracy of ``"tail"``.

        ``LightningModule.log`` and the wrappers of torchmetrics take it (``MetricTracker``, ``BootStrapper``,
        ``MinMaxMetric``). In a ``MetricCollection``, the values of the same counts are counted once.

        Args:
            name: Key of the value in what :meth:`compute` returns.

        Returns:
            A metric of this class and its arguments that has counted nothing. Its ``compute`` and ``forward`` return
            the scalar.

        Raises:
            ArgumentError: If there is no such value, or its group has no classes, so that it would always be NaN.
        """
        check_choice("name", name, self._classes_of_values())
        if name in self.empty_groups():
            raise bad_argument("name", "a group with classes", got_text=f"{name!r}, which has none in {self.split}")
        metric = copy.deepcopy(self)
        metric.reset()
        metric._chosen = name
        return metric

    def view(self, name: str) -> Self:
        """Return a metric of one value that shares the counts of this one, until one of the two is reset.

        Args:
            name: Key of the value in what :meth:`compute` returns.
        """
        metric = copy.copy(self)
        metric._chosen = name
        return metric

    def names(self) -> list[str]:
        """Return the keys of what :meth:`compute` returns."""
        return list(self._classes_of_values())

    def empty_groups(self) -> list[str]:
        """Return the names of the values whose group has no classes in the split, and which are always NaN."""
        return [name for name, classes in self._classes_of_values().items() if not bool(classes.any())]

    @abstractmethod
    def _classes_of_values(self) -> dict[str, Tensor]:
        """Return the mask ``(C,)``, on the CPU, of the classes whose samples each value measures."""

    @abstractmethod
    def _values(self) -> dict[str, Tensor]:
        """Return all values."""

    @override
    def compute(self) -> Any:
        """Return the values, each in [0, 1] and NaN for a group without samples; one of them after :meth:`group`."""
        values = self._values()
        return values if self._chosen is None else values[self._chosen]

    @override
    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            preds: Scores ``(N, C, ...)`` of any floating dtype, such as logits, or predicted class indices ``(N, ...)``
                of an integer dtype. A sample with a NaN among its scores counts as wrong.
            target: Class indices ``(N, ...)``, an integer dtype, each in ``[0, C)`` or ``ignore_index``, which does not
                count.

        Raises:
            ArgumentError: If ``validate_args`` is set and shapes, dtypes or class indices do not fit.
        """
        if self.validate_args:
            _check_batch(preds, target, self.num_classes, self.ignore_index)
        target = target.flatten().long()
        ignored = ignored_mask(target, self.ignore_index)
        # An ignored sample becomes one of class 0 that is never right and is no error, as -1 is no class.
        target = target.masked_fill(ignored, 0)
        self._count(_predicted(preds).flatten().long().masked_fill(ignored, -1), target)
        # `bincount` would wait for the device.
        self.total.scatter_add_(0, target, (~ignored).long())

    @abstractmethod
    def _count(self, predicted: Tensor, target: Tensor) -> None:
        """Count the predictions of a batch; -1 is never right. Both are vectors."""


class _GroupAccuracy(_GroupMetric):
    """Base of the accuracies: counts correct predictions per class. A subclass names groups of classes."""

    higher_is_better = True
    plot_lower_bound: float = 0.0
    plot_upper_bound: float = 1.0
    plot = Metric._plot

    correct: Tensor

    def __init__(
        self, split: ClassSplit, validate_args: bool = True, ignore_index: int = IGNORE_INDEX, **kwargs: Any
    ) -> None:
        super().__init__(split, validate_args, ignore_index, **kwargs)
        self._groups = {**self._class_groups(split), "all": torch.ones(split.num_classes, dtype=torch.bool)}
        self.add_state("correct", torch.zeros(split.num_classes, dtype=torch.long), dist_reduce_fx="sum")

    @staticmethod
    @abstractmethod
    def _class_groups(split: ClassSplit) -> dict[str, Tensor]:
        """Return the mask ``(C,)`` of the classes of each group."""

    @override
    def _count(self, predicted: Tensor, target: Tensor) -> None:
        self.correct.scatter_add_(0, target, (predicted == target).long())

    @override
    def _classes_of_values(self) -> dict[str, Tensor]:
        return self._groups

    @override
    def _values(self) -> dict[str, Tensor]:
        """Return the mean recall of the classes of each group."""
        recalls = self.class_recalls()
        return {name: recalls[mask.to(recalls.device)].nanmean() for name, mask in self._groups.items()}

    def class_recalls(self) -> Tensor:
        """Return the recall of every class ``(C,)``, as counted in this process; NaN for classes without samples."""
        return self.correct / self.total


class HeadTailAccuracy(_GroupAccuracy):
    """Mean per-class recall of the head classes, of the tail classes, and of all.

    Every class of a group counts the same, however many samples it has. Classes without samples in the evaluation data
    are left out, and a group without samples is NaN. So ``"all"`` is the balanced accuracy, also called macro recall:
    that of scikit-learn's ``balanced_accuracy_score``, and of its ``recall_score(average="macro")`` if every class has
    samples. On a balanced test set it is the plain accuracy.

    Args:
        split: Class split, with head and tail.
        validate_args: Whether to check shapes and ranges of every batch; costs a synchronisation on a GPU.
        ignore_index: Target that does not count, any integer.
        **kwargs: See :class:`torchmetrics.Metric`.

    Returns:
        A dictionary of scalars ``{"head", "tail", "all"}``, from ``forward`` and ``compute``.

    Raises:
        ArgumentError: If ``split`` is not a :class:`~lightning_ssesam.ClassSplit`.

    Example:
        >>> metric = HeadTailAccuracy(ClassSplit([100, 50, 5], tail=[2]))
        >>> metric.update(torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 0, 2]))
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
        {'head': 0.833, 'tail': 1.0, 'all': 0.889}
    """

    @staticmethod
    @override
    def _class_groups(split: ClassSplit) -> dict[str, Tensor]:
        return {"head": split.head, "tail": split.tail}


class ManyMediumFewAccuracy(_GroupAccuracy):
    """Mean per-class recall of the many-, medium- and few-shot classes, and of all (Liu et al., CVPR 2019).

    Each value is the balanced accuracy (macro recall) of a group. Counted like :class:`HeadTailAccuracy`, whose
    arguments and errors it has. The split's ``many_above`` and ``few_below`` bound the groups.

    Returns:
        A dictionary of scalars ``{"many", "medium", "few", "all"}``, from ``forward`` and ``compute``.

    Example:
        >>> metric = ManyMediumFewAccuracy(ClassSplit([500, 50, 5], tail=[2], many_above=100, few_below=20))
        >>> metric.update(torch.tensor([0, 1, 1, 2, 0]), torch.tensor([0, 1, 0, 2, 2]))
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
        {'many': 0.5, 'medium': 1.0, 'few': 0.5, 'all': 0.667}
    """

    @staticmethod
    @override
    def _class_groups(split: ClassSplit) -> dict[str, Tensor]:
        return {"many": split.many, "medium": split.medium, "few": split.few}


class ClassRecall(_GroupAccuracy):
    """Recall of every class, by name: the share of its samples that is predicted right.

    Args:
        split: Class split, for the number of classes.
        class_names: Name of each class, length C; by default its index.
        validate_args: See :class:`HeadTailAccuracy`.
        ignore_index: Target that does not count, any integer.
        **kwargs: See :class:`torchmetrics.Metric`.

    Returns:
        A dictionary of scalars by name, from ``forward`` and ``compute``; NaN for a class without samples.

    Raises:
        ArgumentError: If the names are not C different texts.

    Example:
        >>> metric = ClassRecall(ClassSplit([100, 50, 5], tail=[2]), class_names=["cat", "dog", "owl"])
        >>> metric.update(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 2]))
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'cat': 1.0, 'dog': 0.5, 'owl': 1.0}
    """

    log_prefix = "recall/"

    def __init__(
        self,
        split: ClassSplit,
        class_names: Sequence[str] | None = None,
        validate_args: bool = True,
        ignore_index: int = IGNORE_INDEX,
        **kwargs: Any,
    ) -> None:
        super().__init__(split, validate_args, ignore_index, **kwargs)
        names = list(map(str, range(split.num_classes))) if class_names is None else class_names
        self.class_names = check_class_names(names, split.num_classes)

    @staticmethod
    @override
    def _class_groups(split: ClassSplit) -> dict[str, Tensor]:
        return {}

    @override
    def _classes_of_values(self) -> dict[str, Tensor]:
        return dict(zip(self.class_names, torch.eye(self.num_classes, dtype=torch.bool), strict=True))

    @override
    def names(self) -> list[str]:
        """Return the names of the classes."""
        return list(self.class_names)

    @override
    def empty_groups(self) -> list[str]:
        """Return nothing: every value has its class."""
        return []

    @override
    def _values(self) -> dict[str, Tensor]:
        return dict(zip(self.class_names, self.class_recalls(), strict=True))


class HeadTailConfusion(_GroupMetric):
    """Error rates by group: the share of a group's samples that is misclassified as another head or tail class.

    Every class of a group counts the same, as in :class:`HeadTailAccuracy`, whose arguments and errors this has. The
    accuracy of a group and its two error rates add up to 1, unless a score is NaN. A group without samples in the
    evaluation data is NaN.

    Returns:
        A dictionary of scalars in [0, 1], from ``forward`` and ``compute``: ``{"head_to_head", "head_to_tail",
        "tail_to_head", "tail_to_tail"}``. ``"tail_to_head"`` is the share of tail samples predicted as a head class.

    Example:
        >>> metric = HeadTailConfusion(ClassSplit([100, 50, 5], tail=[2]))
        >>> metric.update(torch.tensor([0, 1, 2, 1, 0]), torch.tensor([0, 0, 1, 2, 2]))
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
        {'head_to_head': 0.25, 'head_to_tail': 0.5, 'tail_to_head': 1.0, 'tail_to_tail': 0.0}
    """

    higher_is_better = False
    log_prefix = ""

    wrong: Tensor

    def __init__(
        self, split: ClassSplit, validate_args: bool = True, ignore_index: int = IGNORE_INDEX, **kwargs: Any
    ) -> None:
        super().__init__(split, validate_args, ignore_index, **kwargs)
        self.add_state("wrong", torch.zeros(2, split.num_classes, dtype=torch.long), dist_reduce_fx="sum")

    @override
    def _count(self, predicted: Tensor, target: Tensor) -> None:
        is_error = (predicted != target) & (predicted >= 0)
        is_tail = self.split.tail_on(target.device)[predicted.clamp(min=0)]
        for row, chosen in enumerate((is_error & ~is_tail, is_error & is_tail)):
            self.wrong[row].scatter_add_(0, target, chosen.long())

    @override
    def _classes_of_values(self) -> dict[str, Tensor]:
        groups = {"head": self.split.head, "tail": self.split.tail}
        return {f"{source}_to_{target}": mask for source, mask in groups.items() for target in groups}

    @override
    def _values(self) -> dict[str, Tensor]:
        """Return the four error rates."""
        shares = self.wrong / self.total
        masks = self._classes_of_values()
        # The rows are errors to the head and errors to the tail.
        return {
            name: row[mask.to(row.device)].nanmean()
            for (name, mask), row in zip(masks.items(), (*shares, *shares), strict=True)
        }


def _check_batch(preds: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> None:
    if target.is_floating_point():
        raise bad_argument("target", "class indices of an integer dtype", target.dtype)
    has_scores = preds.is_floating_point()
    shape = (*target.shape[:1], num_classes, *target.shape[1:]) if has_scores else tuple(target.shape)
    if preds.shape != shape:
        expected = f"{'scores' if has_scores else 'class indices'} of shape {shape}"
        raise bad_argument("preds", expected, got_text=f"shape {tuple(preds.shape)}")
    checked = {"target": target} if has_scores else {"preds": preds, "target": target}
    counted = ~ignored_mask(target, ignore_index)
    for name, values in checked.items():
        # Unsigned integers of more than 8 bits have no `min`.
        indices = values[counted].long()
        if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= num_classes):
            found = f"values from {int(indices.min())} to {int(indices.max())}"
            raise bad_argument(name, f"class indices in [0, {num_classes})", got_text=found)


def _predicted(preds: Tensor) -> Tensor:
    """Return the predicted classes ``(N, ...)``; -1, which is never right, for samples with a NaN score."""
    # `argmax` treats NaN as the largest score.
    return preds.argmax(dim=1).masked_fill(preds.isnan().any(dim=1), -1) if preds.is_floating_point() else preds
