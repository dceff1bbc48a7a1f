"""The evaluation of a classifier: losses and predictions of validation and test data, counted by group and by class."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

import lightning.pytorch as pl
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.average_precision import GroupAveragePrecision, LabelAveragePrecision
from lightning_ssesam.metrics import (
    ClassRecall,
    HeadTailAccuracy,
    HeadTailConfusion,
    ManyMediumFewAccuracy,
    _GroupMetric,
)
from lightning_ssesam.split import ClassSplit
from lightning_ssesam.targets import find_ignored, missing_labels, sum_counted

Stage = Literal["val", "test"]


class GroupEvaluation(pl.LightningModule):
    """Base of :class:`~lightning_ssesam.LongTailClassifier`: validates, tests and predicts.

    A subclass calls :meth:`prepare_evaluation` in ``__init__``.
    """

    split: ClassSplit
    loss: nn.Module
    ignore_index: int
    tta: Literal["none", "hflip"]
    log_recalls: bool
    class_names: list[str]

    def prepare_evaluation(self) -> None:
        """Make the metrics of validation and test."""
        self.val_metrics = nn.ModuleList(self._make_metrics("val")).to(self.device)
        self.test_metrics = nn.ModuleList(self._make_metrics("test")).to(self.device)
        # The metrics of further loaders come and go with an evaluation, and are no modules.
        self._further_metrics: dict[int, list[_GroupMetric]] = {}

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called for every validation batch: logs the loss, and counts the predictions."""
        self._evaluate(batch, "val", dataloader_idx)

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called for every test batch: logs the loss, and counts the predictions."""
        self._evaluate(batch, "test", dataloader_idx)

    @override
    def on_validation_epoch_start(self) -> None:
        """Called before the first validation batch: forgets what an interrupted validation has counted."""
        self._forget_counts("val")

    @override
    def on_test_epoch_start(self) -> None:
        """Called before the first test batch: forgets what an interrupted test has counted."""
        self._forget_counts("test")

    @override
    def on_validation_epoch_end(self) -> None:
        """Called after the last validation batch: logs the accuracies."""
        self._log_accuracies("val")

    @override
    def on_test_epoch_end(self) -> None:
        """Called after the last test batch: logs the accuracies and the error rates."""
        self._log_accuracies("test")

    @override
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Called for every batch to predict: returns the class probabilities ``(N, C)``, float32.

        Those of multi-label data are the probabilities of a yes to each label.

        Args:
            batch: Inputs ``(N, ...)``, or a tuple or list whose first element they are.
            batch_idx: Not used.
            dataloader_idx: Not used.
        """
        inputs: Tensor = batch[0] if isinstance(batch, tuple | list) else batch
        return self.probabilities(inputs)

    def probabilities(self, inputs: Tensor) -> Tensor:
        """Return the class probabilities ``(N, C)``, float32, of inputs ``(N, ...)``.

        With ``tta="hflip"`` they are the mean over each image and its mirror image.
        """
        probabilities = self._normalized(self(inputs).float())
        if self.tta == "hflip":
            probabilities = (probabilities + self._normalized(self(inputs.flip(-1)).float())) / 2
        return probabilities

    def _normalized(self, logits: Tensor) -> Tensor:
        """Return the probabilities of logits, in their dtype."""
        return logits.sigmoid() if self.split.multi_label else logits.softmax(1)

    def _make_metrics(self, stage: Stage) -> list[_GroupMetric]:
        names = _names_in_logs(self.class_names) or None
        if self.split.multi_label:
            metrics = [GroupAveragePrecision(self.split, ignore_index=self.ignore_index)]
            by_label = [LabelAveragePrecision(self.split, names, ignore_index=self.ignore_index)]
            return [*metrics, *(by_label if self.log_recalls else ())]
        kinds = (HeadTailAccuracy, ManyMediumFewAccuracy, *((HeadTailConfusion,) if stage == "test" else ()))
        accuracies: list[_GroupMetric] = [kind(self.split, ignore_index=self.ignore_index) for kind in kinds]
        if self.log_recalls:
            accuracies.append(ClassRecall(self.split, names, ignore_index=self.ignore_index))
        return accuracies

    def _metrics_of(self, stage: Stage, loader: int) -> Iterable[_GroupMetric]:
        """Return the metrics of a loader, counted from 0."""
        if loader == 0:
            return cast("Iterable[_GroupMetric]", self.val_metrics if stage == "val" else self.test_metrics)
        if loader not in self._further_metrics:
            self._further_metrics[loader] = [metric.to(self.device) for metric in self._make_metrics(stage)]
        return self._further_metrics[loader]

    def _forget_counts(self, stage: Stage) -> None:
        self._further_metrics.clear()
        for metric in self._metrics_of(stage, 0):
            metric.reset()

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: Stage, loader: int) -> None:
        inputs, targets = batch
        logits = self(inputs)
        is_multi_label = self.split.multi_label
        find = missing_labels if is_multi_label else find_ignored
        losses = losses_of(self.loss, logits, targets, is_multi_label)
        total, count = sum_counted(losses, find(targets, self.ignore_index))
        if number := int(count):
            self.log(f"{stage}/loss", total / number, batch_size=number)
        if self.tta == "hflip":
            logits = (self._normalized(logits) + self._normalized(self(inputs.flip(-1)))) / 2
        for metric in self._metrics_of(stage, loader):
            metric.update(logits, targets)
            if metric.update_count == 1 and self._has_several_loaders(stage):
                for name in metric.names():
                    # Lightning names it by the loader, and computes it after the last batch.
                    self._log_value(stage, metric, name, metric.view(name), metric_attribute=f"{stage}_metrics")

    def _has_several_loaders(self, stage: Stage) -> bool:
        batches = self.trainer.num_val_batches if stage == "val" else self.trainer.num_test_batches
        return len(batches) > 1

    def _log_value(self, stage: Stage, metric: _GroupMetric, name: str, value: Tensor | Metric, **kwargs: Any) -> None:
        has_groups = isinstance(metric, HeadTailAccuracy) or type(metric) is GroupAveragePrecision
        on_bar = stage == "val" and has_groups and name in ("head", "tail")
        self.log(f"{stage}/{metric.log_prefix}{name}", value, on_step=False, on_epoch=True, prog_bar=on_bar, **kwargs)

    def _log_accuracies(self, stage: Stage) -> None:
        if self._has_several_loaders(stage):
            # The steps have logged them.
            return
        for metric in self._metrics_of(stage, 0):
            values = metric.compute()
            metric.reset()
            for name, value in values.items():
                self._log_value(stage, metric, name, value)


def losses_of(loss: nn.Module, logits: Tensor, targets: Tensor, is_multi_label: bool) -> Tensor:
    """Return what a loss makes of a batch. With multi-label data, it gets targets of the logits' dtype.

    Raises:
        ArgumentError: If it does not return a loss for each label of multi-label data.
    """
    losses: Tensor = loss(logits, targets.to(logits.dtype) if is_multi_label else targets)
    if is_multi_label and losses.shape != logits.shape:
        expected = "a module that returns a loss for each label (N, C), as with reduction='none'"
        raise bad_argument("loss", expected, got_text=f"one with an output of shape {tuple(losses.shape)}")
    return losses


def _names_in_logs(names: Sequence[str]) -> list[str]:
    """Return class names without spaces and slashes, which the names of logged values have a meaning for."""
    found: dict[str, None] = {}
    for name in names:
        safe = free = re.sub(r"[\s/\\]+", "_", name)
        number = 1
        while free in found:
            number += 1
            free = f"{safe}_{number}"
        found[free] = None
    return list(found)
