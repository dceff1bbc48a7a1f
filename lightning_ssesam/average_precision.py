"""Mean average precision of groups of labels, for multi-label data."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multilabel_average_precision
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.class_order import check_class_names
from lightning_ssesam.metrics import _GroupMetric
from lightning_ssesam.split import ClassSplit
from lightning_ssesam.targets import IGNORE_INDEX, check_missing_label, missing_labels


class GroupAveragePrecision(_GroupMetric):
    """Mean average precision of the head, tail, many-, medium- and few-shot labels, and of all.

    The average precision of a label is that of torchmetrics' ``MultilabelAveragePrecision``: all samples are ranked by
    their score of the label. Every label of a group counts the same. Labels without a yes in the evaluation data are
    left out, and a group without other labels is NaN. The metric keeps all scores, 4 bytes for each.

    Args:
        split: Class split of multi-label data.
        validate_args: Whether to check shapes and ranges of every batch; costs a synchronisation on a GPU.
        ignore_index: Target of missing labels, which do not count, an integer that is neither 0 nor 1 nor the index of
            a label.
        **kwargs: See :class:`torchmetrics.Metric`.

    Returns:
        A dictionary of scalars in [0, 1], from ``forward`` and ``compute``: ``{"head", "tail", "many", "medium", "few",
        "all"}``.

    Raises:
        ArgumentError: If ``split`` is no :class:`~lightning_ssesam.ClassSplit` of multi-label data.

    Example:
        >>> metric = GroupAveragePrecision(ClassSplit([30, 4], tail=[1], multi_label=True))
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.4, 0.7]]), torch.tensor([[1, 0], [0, 0], [1, 1]]))
        >>> {name: value.item() for name, value in metric.compute().items() if name in ("head", "tail", "all")}
        {'head': 1.0, 'tail': 0.5, 'all': 0.75}
    """

    higher_is_better = True
    log_prefix = "map_"
    is_multi_label = True
    plot_lower_bound: float = 0.0
    plot_upper_bound: float = 1.0
    plot = Metric._plot

    preds: list[Tensor]
    target: list[Tensor]

    def __init__(
        self, split: ClassSplit, validate_args: bool = True, ignore_index: int = IGNORE_INDEX, **kwargs: Any
    ) -> None:
        super().__init__(split, validate_args, ignore_index, **kwargs)
        check_missing_label(self.ignore_index, split.num_classes)
        for name in ("preds", "target"):
            self.add_state(name, [], dist_reduce_fx="cat")

    @override
    def update(self, preds: Tensor, target: Tensor) -> None:
        """Keep the scores of a batch.

        Args:
            preds: Scores ``(N, C)`` of any floating dtype, such as logits. A score of NaN ranks last.
            target: 0 (no), 1 (yes) or ``ignore_index`` (missing, does not count), ``(N, C)``, any real dtype.

        Raises:
            ArgumentError: If ``validate_args`` is set and shapes, dtypes or targets do not fit.
        """
        missing = missing_labels(target, self.ignore_index)
        if self.validate_args:
            _check_batch(preds, target, missing, self.num_classes)
        answers = target.masked_fill(missing, -1).to(torch.int8)
        self.preds.append(torch.where(preds.isnan(), -torch.inf, preds).detach())
        self.target.append(answers)
        self.total += (answers == 1).sum(0)

    @override
    def _count(self, predicted: Tensor, target: Tensor) -> None:
        """Do nothing: :meth:`update` keeps scores instead."""

    @override
    def _classes_of_values(self) -> dict[str, Tensor]:
        groups = {name: getattr(self.split, name) for name in ("head", "tail", "many", "medium", "few")}
        return {**groups, "all": torch.ones(self.split.num_classes, dtype=torch.bool)}

    @override
    def _values(self) -> dict[str, Tensor]:
        precisions = self.label_precisions()
        return {
            name: precisions[mask.to(precisions.device)].nanmean() for name, mask in self._classes_of_values().items()
        }

    def label_precisions(self) -> Tensor:
        """Return the average precision of every label ``(C,)``, as counted in this process.

        It is NaN for labels without a yes.
        """
        found = torch.full((self.num_classes,), torch.nan, device=self.total.device)
        labels = self.total.nonzero().flatten()
        if len(labels):
            scores, answers = dim_zero_cat(self.preds)[:, labels].cpu(), dim_zero_cat(self.target)[:, labels].cpu()
            options = {"num_labels": len(labels), "average": "none", "ignore_index": -1, "validate_args": False}
            values = multilabel_average_precision(_ranks(scores), answers.long(), **options)  # type: ignore[arg-type]
            found[labels] = values.to(found).reshape(-1)
        return found


class LabelAveragePrecision(GroupAveragePrecision):
    """Average precision of every label, by name. Counted like :class:`GroupAveragePrecision`.

    Args:
        split: Class split of multi-label data.
        class_names: Name of each label, length C; by default its index.
        **kwargs: See :class:`GroupAveragePrecision`.

    Returns:
        A dictionary of scalars by name, from ``forward`` and ``compute``; NaN for a label without a yes.

    Raises:
        ArgumentError: If the names are not C different texts.

    Example:
        >>> metric = LabelAveragePrecision(ClassSplit([30, 4], tail=[1], multi_label=True), ["cat", "dog"])
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.4, 0.7]]), torch.tensor([[1, 0], [0, 0], [1, 1]]))
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'cat': 1.0, 'dog': 0.5}
    """

    log_prefix = "ap/"

    def __init__(self, split: ClassSplit, class_names: Sequence[str] | None = None, **kwargs: Any) -> None:
        super().__init__(split, **kwargs)
        names = list(map(str, range(split.num_classes))) if class_names is None else class_names
        self.class_names = check_class_names(names, split.num_classes)

    @override
    def _classes_of_values(self) -> dict[str, Tensor]:
        return dict(zip(self.class_names, torch.eye(self.num_classes, dtype=torch.bool), strict=True))

    @override
    def _values(self) -> dict[str, Tensor]:
        return dict(zip(self.class_names, self.label_precisions(), strict=True))


def _ranks(scores: Tensor) -> Tensor:
    """Return scores in [0, 1] of the same order. The metric would take the sigmoid of others, which is 1 above 17."""
    values, ranks = torch.unique(scores, return_inverse=True)
    scaled: Tensor = ranks.double() / len(values)
    return scaled


def _check_batch(preds: Tensor, target: Tensor, missing: Tensor, num_labels: int) -> None:
    if not preds.is_floating_point() or preds.ndim != 2 or preds.shape[1] != num_labels:
        got = f"shape {tuple(preds.shape)} of {preds.dtype}"
        raise bad_argument("preds", f"scores (N, {num_labels}) of a floating dtype", got_text=got)
    if target.shape != preds.shape:
        raise bad_argument(
            "target", f"multi-label targets of shape {tuple(preds.shape)}", got_text=f"shape {tuple(target.shape)}"
        )
    is_wrong = (target != 0) & (target != 1) & ~missing
    if bool(is_wrong.any()):
        raise bad_argument("target", "0, 1 or `ignore_index` for each label", target[is_wrong][0].item())
