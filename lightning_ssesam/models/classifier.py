"""A ready module for long-tailed classification, every part of it injected."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_choice
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.metrics import HeadTailAccuracy, HeadTailConfusion, ManyMediumFewAccuracy
from lightning_ssesam.mixin import SharpnessAwareMixin
from lightning_ssesam.models.backbones import BackboneFactory
from lightning_ssesam.objectives import SSESAM, Objective
from lightning_ssesam.split import ClassSplit
from lightning_ssesam.step_options import StepOptions


class LongTailClassifier(SharpnessAwareMixin):
    """Image classifier for long-tailed data, trained on a sharpness-aware objective.

    It makes the :class:`~lightning_ssesam.ClassSplit` from the class counts and gives it to the objective, to the loss
    (if the loss has a method ``bind``) and to the metrics. It logs ``train/loss``. On validation data it logs
    ``val/loss`` and ``val/acc_head``, ``_tail``, ``_many``, ``_medium``, ``_few``, ``_all``; on test data the same as
    ``test/...``, and the error rates of :class:`~lightning_ssesam.HeadTailConfusion`, such as ``test/head_to_tail``.

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

    Raises:
        ArgumentError: If an argument is out of range or of the wrong kind, both ``tail_below`` and ``tail_fraction``
            are given, ``objective`` has a split, or ``loss`` is reduced or has other class counts; from ``forward``,
            if the logits of ``backbone`` are not ``(N, C)``.
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
    ) -> None:
        super().__init__()
        # As the default of the argument, it would pass its learning rate on to another optimizer class that the
        # command line sets.
        optimizer = partial(SGD, lr=0.1, momentum=0.9) if optimizer is None else optimizer
        for name, value in {"backbone": backbone, "optimizer": optimizer, "scheduler": scheduler}.items():
            if not callable(value) and not (name == "scheduler" and value is None):
                raise bad_argument(name, "a class or a function that makes it", value)
        if tail_below is None and tail_fraction is None:
            tail_fraction = 0.2
        self.split = ClassSplit.from_counts(class_counts, tail_below, tail_fraction, many_above, few_below)
        self.backbone = backbone if isinstance(backbone, nn.Module) else backbone(num_classes=self.split.num_classes)
        self.objective = SSESAM() if objective is None else objective
        if not isinstance(self.objective, Objective):
            raise bad_argument("objective", "an Objective", objective)
        if self.objective.split is not None:
            message = "Pass `objective` without a split: LongTailClassifier builds the split from `class_counts`."
            raise ArgumentError(message)
        self.objective.bind(self.split)
        self.loss = _bound_loss(loss, self.split)
        self.val_metrics = _make_metrics(self.split)
        self.test_metrics = _make_metrics(self.split).append(HeadTailConfusion(self.split))
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
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Called for every validation batch: logs the loss, and counts the predictions."""
        self._evaluate(batch, "val")

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Called for every test batch: logs the loss, and counts the predictions."""
        self._evaluate(batch, "test")

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
        optimizer = self._make_optimizer(self.parameters())
        if self._make_scheduler is None:
            return optimizer
        scheduler: Any = {"scheduler": self._make_scheduler(optimizer), **self._scheduler_options}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: Literal["val", "test"]) -> None:
        inputs, targets = batch
        logits = self(inputs)
        self.log(f"{stage}/loss", self.loss(logits, targets).mean(), batch_size=len(targets))
        if self.tta == "hflip":
            logits = logits.softmax(1) + self(inputs.flip(-1)).softmax(1)
        for metric in getattr(self, f"{stage}_metrics"):
            metric.update(logits, targets)

    def _log_accuracies(self, stage: Literal["val", "test"]) -> None:
        values: dict[str, Tensor] = {}
        for metric in getattr(self, f"{stage}_metrics"):
            prefix = "" if isinstance(metric, HeadTailConfusion) else "acc_"
            values.update({prefix + name: value for name, value in metric.compute().items()})
            metric.reset()
        for name, value in values.items():
            self.log(f"{stage}/{name}", value, prog_bar=stage == "val" and name in ("acc_head", "acc_tail"))


def _make_metrics(split: ClassSplit) -> nn.ModuleList:
    return nn.ModuleList([HeadTailAccuracy(split), ManyMediumFewAccuracy(split)])


def _bound_loss(loss: nn.Module | None, split: ClassSplit) -> nn.Module:
    if loss is None:
        return nn.CrossEntropyLoss(reduction="none")
    reduction = getattr(loss, "reduction", "none")
    if reduction != "none":
        raise bad_argument("loss", "a module with reduction='none'", got_text=f"reduction={reduction!r}")
    if callable(bind := getattr(loss, "bind", None)):
        bind(split)
    return loss
