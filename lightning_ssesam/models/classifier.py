"""A ready module for long-tailed classification, every part of it injected."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_choice, check_integer
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.factories import check_factory, check_made
from lightning_ssesam.metrics import HeadTailAccuracy, HeadTailConfusion, ManyMediumFewAccuracy, _GroupMetric
from lightning_ssesam.mixin import SharpnessAwareMixin
from lightning_ssesam.models.backbones import BackboneFactory, make_backbone
from lightning_ssesam.objectives import SSESAM, Objective
from lightning_ssesam.split import ClassSplit
from lightning_ssesam.step_options import StepOptions
from lightning_ssesam.targets import IGNORE_INDEX, find_ignored, sum_counted
from lightning_ssesam.trainer_calls import monitored

Stage = Literal["val", "test"]


class LongTailClassifier(SharpnessAwareMixin):
    """Image classifier for long-tailed data, trained on a sharpness-aware objective.

    It makes the :class:`~lightning_ssesam.ClassSplit` from the class counts and gives it to the objective, to the loss
    (if the loss has a method ``bind``) and to the metrics. It logs ``train/loss``. On validation data it logs
    ``val/loss`` and ``val/acc_head``, ``_tail``, ``_many``, ``_medium``, ``_few``, ``_all``; on test data the same as
    ``test/...``, and the error rates of :class:`~lightning_ssesam.HeadTailConfusion`, such as ``test/head_to_tail``.
    Each of several loaders has its own values, with names such as ``val/acc_tail/dataloader_idx_1``.

    Attributes:
        split: Class split made from the class counts.

    Args:
        class_counts: Training samples of each class, length C; the command line takes them from the data module.
        backbone: Class or function that makes the network from ``num_classes=C``, such as ``SmallConvNet``; or a
            network from inputs ``(N, ...)`` to logits ``(N, C)``.
        objective: Objective to train on, without a split; ``SSESAM()`` by default.
        loss: Module ``(logits, targets) -> (N,)`` of unreduced losses; cross-entropy by default.
        optimizer: Class or function that makes the optimizer from the parameters; by default SGD with learning rate
            0.1 and momentum 0.9.
        scheduler: Class or function that makes a learning-rate scheduler from the optimizer; none by default.
        scheduler_interval: Unit of the scheduler's steps, ``"epoch"`` (default) or ``"step"``.
        scheduler_monitor: Logged value that a ``ReduceLROnPlateau`` monitors, such as ``"val/loss"``.
        tail_below: Training samples below which a class is tail, an integer >= 1.
        tail_fraction: Fraction of the training samples, in (0, 1), that the tail classes hold at most; 0.2 if
            ``tail_below`` is not given either.
        many_above: Training samples above which a class is many-shot, an integer >= 0.
        few_below: Training samples below which a class is few-shot, an integer in [0, many_above + 1].
        step_options: Options of the training step.
        tta: Test-time augmentation, for validation and test. ``"hflip"`` averages the class probabilities of every
            image ``(N, C, H, W)`` and of its horizontal mirror image; ``"none"`` is the default.
        ignore_index: Target that does not count, any integer. The objective, the metrics and the loss (if it has an
            attribute ``ignore_index``) get it from here.
        allow_empty: Whether a class may have no training sample, see :class:`~lightning_ssesam.ClassSplit`.
        in_channels: Channels of the images, for a ``backbone`` that has an argument ``in_channels`` and was not given
            it; None if unknown. The command line takes them from the data module.

    Raises:
        ArgumentError: If an argument is out of range or of the wrong kind, both ``tail_below`` and ``tail_fraction``
            are given, ``objective`` has a split, ``loss`` is reduced or has other class counts, one of both ignores
            another target, or ``backbone`` was given another number of channels; from ``forward``, if the logits of
            ``backbone`` are not ``(N, C)``.
        MisconfigurationException: When training starts, if a callback or the scheduler monitors the accuracy of a group
            without classes.
    """

    def __init__(
        self,
        class_counts: Sequence[int],
        backbone: BackboneFactory,
        objective: Objective | None = None,
        loss: nn.Module | None = None,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        tail_below: int | None = None,
        tail_fraction: float | None = None,
        many_above: int = 100,
        few_below: int = 20,
        scheduler_interval: Literal["epoch", "step"] = "epoch",
        scheduler_monitor: str | None = None,
        step_options: StepOptions = StepOptions(),  # noqa: B008 (frozen)
        tta: Literal["none", "hflip"] = "none",
        ignore_index: int = IGNORE_INDEX,
        allow_empty: bool = False,
        in_channels: int | None = None,
    ) -> None:
        super().__init__()
        # As the default of the argument, it would pass its learning rate on to another optimizer class that the
        # command line sets.
        optimizer = partial(SGD, lr=0.1, momentum=0.9) if optimizer is None else optimizer
        _check_factories(backbone, optimizer, scheduler)
        if tail_below is None and tail_fraction is None:
            tail_fraction = 0.2
        thresholds = (tail_below, tail_fraction, many_above, few_below)
        self.split = ClassSplit.from_counts(class_counts, *thresholds, allow_empty=allow_empty)
        network = (
            backbone if isinstance(backbone, nn.Module) else make_backbone(backbone, len(class_counts), in_channels)
        )
        self.backbone: nn.Module = check_made("backbone", network, nn.Module)
        self.objective = _bound_objective(objective, self.split)
        self.loss = _bound_loss(loss, self.split)
        self.ignore_index = check_integer("ignore_index", ignore_index)
        for name, part in {"objective": self.objective, "loss": self.loss}.items():
            _hand_on_ignore_index(name, part, self.ignore_index)
        self.val_metrics = nn.ModuleList(self._make_metrics("val"))
        self.test_metrics = nn.ModuleList(self._make_metrics("test"))
        # The metrics of further loaders come and go with an evaluation, and are no modules.
        self._further_metrics: dict[int, list[_GroupMetric]] = {}
        self._make_optimizer, self._make_scheduler = optimizer, scheduler
        check_choice("scheduler_interval", scheduler_interval, ("epoch", "step"))
        self._scheduler_options = {"interval": scheduler_interval, "monitor": scheduler_monitor}
        if not isinstance(step_options, StepOptions):
            raise bad_argument("step_options", "a StepOptions", step_options)
        self.step_options = step_options
        self.tta = check_choice("tta", tta, ("none", "hflip"))

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits ``(N, C)`` of inputs ``(N, ...)``."""
        logits: Tensor = self.backbone(inputs)
        # TorchScript knows no checks, and a trace takes them for constants.
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            self._check_logits(logits)
        return logits

    def _check_logits(self, logits: Tensor) -> None:
        is_traced = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        if not is_traced and logits.shape[1:2] != (self.split.num_classes,):
            expected = f"a network with logits (N, {self.split.num_classes}), one for each class"
            raise bad_argument("backbone", expected, got_text=f"one with an output of shape {tuple(logits.shape)}")

    @override
    def sample_losses(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss of every sample, ``(N,)``."""
        inputs, targets = batch
        losses: Tensor = self.loss(self(inputs), targets)
        return losses

    @override
    def on_fit_start(self) -> None:
        """Called when training starts: refuses to monitor what is always NaN."""
        empty = {f"val/acc_{group}" for metric in self._metrics_of("val", 0) for group in metric.empty_groups()}
        for who, value in monitored(self.trainer):
            if value.partition("/dataloader_idx_")[0] in empty:
                raise MisconfigurationException(
                    f"{who} monitors {value!r}, which is always NaN: that group has no classes in {self.split}, with"
                    f" many_above={self.split.many_above} and few_below={self.split.few_below}. Monitor another value,"
                    " such as 'val/acc_all', or choose other bounds."
                )

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
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Called when a run starts: makes the optimizer and the scheduler."""
        optimizer = check_made("optimizer", self._make_optimizer(self.parameters()), Optimizer)
        if self._make_scheduler is None:
            return optimizer
        made = check_made("scheduler", self._make_scheduler(optimizer), LRScheduler)
        scheduler: Any = {"scheduler": made, **self._scheduler_options}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _make_metrics(self, stage: Stage) -> list[_GroupMetric]:
        kinds = (HeadTailAccuracy, ManyMediumFewAccuracy, *((HeadTailConfusion,) if stage == "test" else ()))
        return [kind(self.split, ignore_index=self.ignore_index) for kind in kinds]

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
        total, count = sum_counted(self.loss(logits, targets), find_ignored(targets, self.ignore_index))
        if number := int(count):
            self.log(f"{stage}/loss", total / number, batch_size=number)
        if self.tta == "hflip":
            logits = logits.softmax(1) + self(inputs.flip(-1)).softmax(1)
        for metric in self._metrics_of(stage, loader):
            metric.update(logits, targets)
            if metric.update_count == 1 and self._has_several_loaders(stage):
                for name in metric.names():
                    # Lightning names it by the loader, and computes it after the last batch.
                    self._log_value(stage, metric, name, metric.view(name), metric_attribute=f"{stage}_metrics")

    def _has_several_loaders(self, stage: Stage) -> bool:
        batches = self.trainer.num_val_batches if stage == "val" else self.trainer.num_test_batches
        return len(batches) > 1

    def _log_value(self, stage: Stage, metric: Metric, name: str, value: Tensor | Metric, **kwargs: Any) -> None:
        prefix = "" if isinstance(metric, HeadTailConfusion) else "acc_"
        on_bar = stage == "val" and name in ("head", "tail")
        self.log(f"{stage}/{prefix}{name}", value, on_step=False, on_epoch=True, prog_bar=on_bar, **kwargs)

    def _log_accuracies(self, stage: Stage) -> None:
        if self._has_several_loaders(stage):
            # The steps have logged them.
            return
        for metric in self._metrics_of(stage, 0):
            values = metric.compute()
            metric.reset()
            for name, value in values.items():
                self._log_value(stage, metric, name, value)


def _check_factories(backbone: Any, optimizer: Any, scheduler: Any) -> None:
    if not isinstance(backbone, nn.Module):
        check_factory("backbone", backbone, nn.Module)
    check_factory("optimizer", optimizer, Optimizer)
    if scheduler is not None:
        check_factory("scheduler", scheduler, LRScheduler)


def _bound_objective(objective: Objective | None, split: ClassSplit) -> Objective:
    bound = SSESAM() if objective is None else objective
    if not isinstance(bound, Objective):
        raise bad_argument("objective", "an Objective", objective)
    if bound.split is not None:
        message = "Pass `objective` without a split: LongTailClassifier builds the split from `class_counts`."
        raise ArgumentError(message)
    bound.bind(split)
    return bound


def _hand_on_ignore_index(name: str, part: Any, ignore_index: int) -> None:
    """Let a part ignore the same target, unless it was told another one."""
    own = getattr(part, "ignore_index", ignore_index)
    if own not in (ignore_index, IGNORE_INDEX):
        raise bad_argument("ignore_index", f"{own}, which `{name}` has", ignore_index)
    if own != ignore_index:
        part.ignore_index = ignore_index


def _bound_loss(loss: nn.Module | None, split: ClassSplit) -> nn.Module:
    if loss is None:
        return nn.CrossEntropyLoss(reduction="none")
    if isinstance(loss, type) or not callable(loss):
        raise bad_argument("loss", "a module with reduction='none'", loss)
    reduction = getattr(loss, "reduction", "none")
    if reduction != "none":
        raise bad_argument("loss", "a module with reduction='none'", got_text=f"reduction={reduction!r}")
    if callable(bind := getattr(loss, "bind", None)):
        bind(split)
    return loss
