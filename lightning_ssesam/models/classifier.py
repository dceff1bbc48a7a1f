"""A ready module for long-tailed classification, every part of it injected."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import IO, Any, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import Self, override

from lightning_ssesam._validation import bad_argument, check_choice, check_flag, check_integer
from lightning_ssesam.class_order import check_class_names, check_same_classes
from lightning_ssesam.data.image_input import ImageInput
from lightning_ssesam.data.labels import names_of_classes
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.factories import check_factory, check_made
from lightning_ssesam.losses import BinaryCrossEntropyLoss
from lightning_ssesam.mixin import SharpnessAwareMixin
from lightning_ssesam.models.backbones import BackboneFactory, make_backbone
from lightning_ssesam.models.contrast import ContrastiveBranch
from lightning_ssesam.models.correction import Factors, LogitCorrection
from lightning_ssesam.models.description import describe, unknown_name
from lightning_ssesam.models.evaluation import GroupEvaluation, losses_of
from lightning_ssesam.models.saved_parts import (
    KEY,
    build,
    check_maker,
    name_of_class,
    read_plain,
    restored_arguments,
    saved_content,
)
from lightning_ssesam.objectives import SSESAM, Objective
from lightning_ssesam.split import ClassSplit
from lightning_ssesam.step_options import StepOptions
from lightning_ssesam.targets import IGNORE_INDEX
from lightning_ssesam.trainer_calls import monitored


class LongTailClassifier(SharpnessAwareMixin, GroupEvaluation):
    """Image classifier for long-tailed data, trained on a sharpness-aware objective.

    It makes the :class:`~lightning_ssesam.ClassSplit` from the class counts and gives it to the objective, to the loss
    (if the loss has a method ``bind``) and to the metrics. It logs ``train/loss``. On validation data it logs
    ``val/loss`` and ``val/acc_head``, ``_tail``, ``_many``, ``_medium``, ``_few``, ``_all``; on test data the same as
    ``test/...``, and the error rates of :class:`~lightning_ssesam.HeadTailConfusion`, such as ``test/head_to_tail``.
    Each of several loaders has its own values, with names such as ``val/acc_tail/dataloader_idx_1``.

    With ``multi_label``, a sample may have any number of labels. Targets are 0, 1 or ``ignore_index`` (missing) for
    each label, ``(N, C)``, and probabilities are those of a sigmoid. Mean average precisions take the place of the
    accuracies and error rates: ``val/map_head``, ``_tail``, ``_many``, ``_medium``, ``_few`` and ``_all``, see
    :class:`~lightning_ssesam.GroupAveragePrecision`.

    Its checkpoints have what builds it, the names of the classes and how a picture becomes an input. So
    :meth:`load_from_checkpoint` needs the path alone, and :meth:`predict_step` returns class probabilities.

    Attributes:
        split: Class split made from the class counts.
        class_names: Name of each class, length C; empty if unknown.
        image_input: Way from a picture to an input, as the data module of the training has it; None if unknown.
        correction: What corrects the logits after the training, see :meth:`correct`; None by default.

    Args:
        class_counts: Training samples of each class, or that have each label, length C; the command line takes them
            from the data module.
        backbone: Class or function that makes the network from ``num_classes=C``, such as ``SmallConvNet``; or a
            network from inputs ``(N, ...)`` to logits ``(N, C)``.
        objective: Objective to train on, without a split; ``SSESAM()`` by default.
        loss: Module ``(logits, targets) -> (N,)`` of unreduced losses; cross-entropy by default. With ``multi_label``,
            ``(N, C)`` losses of floating targets, and binary cross-entropy by default.
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
        class_names: Name of each class, length C; by default those of the data module, when a run starts.
        log_recalls: Flag that logs the recall of each class of validation and test data, such as ``val/recall/cat``;
            with ``multi_label`` the average precision of each label, such as ``val/ap/cat``.
        multi_label: Flag of data whose samples have any number of labels each, see
            :class:`~lightning_ssesam.ClassSplit`. The command line takes it from the data module.
        num_samples: Training samples of multi-label data, for losses that need the share of each label; None if
            unknown. The command line takes it from the data module.
        contrast: Branch that contrasts several views of the training images; none by default.

    Raises:
        ArgumentError: If an argument is out of range or of the wrong kind, both ``tail_below`` and ``tail_fraction``
            are given, ``objective`` has a split, ``loss`` is reduced or has other class counts, one of both ignores
            another target, or ``backbone`` was given another number of channels; from ``forward``, if the logits of
            ``backbone`` are not ``(N, C)``.
        MisconfigurationException: When training starts, if a callback or the scheduler monitors the accuracy of a group
            without classes; at once, if ``step_options`` asks for split passes and ``contrast`` is given.
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
        class_names: Sequence[str] | None = None,
        log_recalls: bool = False,
        multi_label: bool = False,
        num_samples: int | None = None,
        contrast: ContrastiveBranch | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        # As the default of the argument, it would pass its learning rate on to another optimizer class that the
        # command line sets.
        optimizer = partial(SGD, lr=0.1, momentum=0.9) if optimizer is None else optimizer
        _check_factories(backbone, optimizer, scheduler)
        if tail_below is None and tail_fraction is None:
            tail_fraction = 0.2
        thresholds = (tail_below, tail_fraction, many_above, few_below)
        self.split = ClassSplit.from_counts(class_counts, *thresholds, allow_empty, multi_label, num_samples)
        network = (
            backbone if isinstance(backbone, nn.Module) else make_backbone(backbone, len(class_counts), in_channels)
        )
        # Before the network, whose classifier is the last linear layer, for ascents and objectives that move it alone.
        self.contrast = contrast
        self.backbone: nn.Module = check_made("backbone", network, nn.Module)
        self.objective = _bound_objective(objective, self.split)
        self.loss = _bound_loss(loss, self.split)
        self.ignore_index = check_integer("ignore_index", ignore_index)
        for name, part in {"objective": self.objective, "loss": self.loss}.items():
            _hand_on_ignore_index(name, part, self.ignore_index)
        if contrast is not None:
            _check_contrast(contrast, step_options, self.split)
            contrast.attach(self.backbone, len(class_counts), self.ignore_index)
        self.log_recalls = check_flag("log_recalls", log_recalls)
        self.class_names = [] if class_names is None else check_class_names(class_names, len(class_counts))
        self.prepare_evaluation()
        self._make_optimizer, self._make_scheduler = optimizer, scheduler
        check_choice("scheduler_interval", scheduler_interval, ("epoch", "step"))
        self._scheduler_options = {"interval": scheduler_interval, "monitor": scheduler_monitor}
        if not isinstance(step_options, StepOptions):
            raise bad_argument("step_options", "a StepOptions", step_options)
        self.step_options = step_options
        self.tta = check_choice("tta", tta, ("none", "hflip"))
        self.image_input: ImageInput | None = None
        self.correction: LogitCorrection | None = None
        # What the parts were before the training changed them.
        self._arguments = {name: describe(value) for name, value in given.items()}
        self._arguments["class_counts"] = self.split.class_counts.tolist()

    @classmethod
    @override
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        **kwargs: Any,
    ) -> Self:
        """Return the classifier of a checkpoint, built by what the checkpoint says.

        Args:
            checkpoint_path: Path of the file, or an open file.
            map_location: Device for the weights, as in :func:`torch.load`.
            hparams_file: See Lightning. It is not needed.
            strict: Whether the names of all weights must fit; True by default.
            weights_only: Flag that refuses a file with more than plain data, which could run code. Only False lets such
                a file pass.
            **kwargs: Arguments of the class, in place of those of the checkpoint. A network, objective, loss, optimizer
                or scheduler of your own must be given: a checkpoint names no code but that of this library, torch and
                torchvision. Without it, the others work.

        Raises:
            ArgumentError: If the file holds more than plain data, the network is one of your own, or a subclass needs
                arguments that are not given.
        """
        is_plain = weights_only is not False
        saved = saved_content(read_plain(checkpoint_path, is_plain))
        arguments = {**restored_arguments(saved["arguments"], kwargs.keys(), cls), **kwargs}
        # Lightning 2.5 has no such argument. The file has been checked.
        has_option = "weights_only" in signature(super().load_from_checkpoint).parameters
        options = {"weights_only": is_plain} if has_option else {}
        check_maker(saved["made_by"], cls, kwargs)
        load = partial(super().load_from_checkpoint, checkpoint_path, map_location, hparams_file, strict, **options)
        model: Self = build(load, arguments, kwargs)
        lost = {name: value for name, value in saved["arguments"].items() if unknown_name(value) and name not in kwargs}
        model._arguments.update(lost)
        return model

    @override
    def setup(self, stage: str) -> None:
        """Called when a run starts: takes class names and the form of the input from the data module."""
        data: Any = getattr(self.trainer, "datamodule", None)
        names = names_of_classes(data)
        check_same_classes(self.class_names, names, f"The data module {type(data).__name__}")
        if not self.class_names and len(names) == self.split.num_classes:
            self._take_names(names)
        if stage == "fit" or self.image_input is None:
            self.image_input = getattr(data, "image_input", None) or self.image_input

    def _take_names(self, names: list[str]) -> None:
        self.class_names = check_class_names(names, self.split.num_classes) if names else []
        if self.log_recalls:
            self.prepare_evaluation()

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Called when a checkpoint is made: adds what builds the classifier, as plain values."""
        checkpoint[KEY] = {
            "arguments": self._arguments,
            "class_names": self.class_names,
            "image_input": None if self.image_input is None else self.image_input.as_plain(),
            "made_by": name_of_class(type(self)),
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Called before the weights are loaded: takes the names, the input and the form of the correction."""
        saved = saved_content(checkpoint)
        check_same_classes(saved["class_names"], self.class_names, "The data module of this run")
        if not self.class_names:
            self._take_names(saved["class_names"])
        self.image_input = self.image_input or saved["image_input"]
        # A sharded checkpoint comes without its weights here.
        if (weights := checkpoint.get("state_dict")) is not None:
            is_corrected = any(name.startswith("correction.") for name in weights)
            self.correction = LogitCorrection(self.split.num_classes).to(self.device) if is_corrected else None

    def correct(self, scale: Factors = 1.0, shift: Factors = 0.0) -> None:
        """Correct the logits from now on, also in checkpoints and exported models: ``logits * scale + shift``.

        Args:
            scale: Factors ``(C,)``, or one number for all classes.
            shift: Summands ``(C,)``, or one number for all classes.

        Raises:
            ArgumentError: If there is not one finite number, or one for each class.
        """
        before = LogitCorrection(self.split.num_classes) if self.correction is None else self.correction
        self.correction = before.then(scale, shift).to(self.device)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits ``(N, C)`` of inputs ``(N, ...)``."""
        logits: Tensor = self.backbone(inputs)
        # TorchScript knows no checks, and a trace takes them for constants.
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            self._check_logits(logits)
        return logits if self.correction is None else self.correction(logits)

    def _check_logits(self, logits: Tensor) -> None:
        is_traced = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        if not is_traced and logits.shape[1:2] != (self.split.num_classes,):
            expected = f"a network with logits (N, {self.split.num_classes}), one for each class"
            raise bad_argument("backbone", expected, got_text=f"one with an output of shape {tuple(logits.shape)}")

    @override
    def sample_losses(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss of every sample, ``(N,)``, or of every label of every sample, ``(N, C)``."""
        inputs, targets = batch
        if self.contrast is not None:
            return self.contrast.losses(inputs, targets, self.backbone, self, self.loss)
        return losses_of(self.loss, self(inputs), targets, self.split.multi_label)

    @override
    def on_fit_start(self) -> None:
        """Called when training starts: refuses to monitor what is always NaN, or never logged, and wrong passes."""
        if self.contrast is not None:
            _check_contrast(self.contrast, self.step_options, self.split)
        metrics, prefix = list(self._metrics_of("val", 0)), "map" if self.split.multi_label else "acc"
        empty = {f"val/{metric.log_prefix}{group}" for metric in metrics for group in metric.empty_groups()}
        for who, value in monitored(self.trainer):
            if self.split.multi_label and value.startswith("val/acc_"):
                raise MisconfigurationException(
                    f"{who} monitors {value!r}, which multi-label data do not have. Monitor another value, such as"
                    " 'val/map_all'."
                )
            if value.partition("/dataloader_idx_")[0] in empty:
                raise MisconfigurationException(
                    f"{who} monitors {value!r}, which is always NaN: that group has no classes in {self.split}, with"
                    f" many_above={self.split.many_above} and few_below={self.split.few_below}. Monitor another value,"
                    f" such as 'val/{prefix}_all', or choose other bounds."
                )

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Called when a run starts: makes the optimizer and the scheduler."""
        optimizer = check_made("optimizer", self._make_optimizer(self.parameters()), Optimizer)
        if self._make_scheduler is None:
            return optimizer
        made = check_made("scheduler", self._make_scheduler(optimizer), LRScheduler)
        scheduler: Any = {"scheduler": made, **self._scheduler_options}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


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


def _check_contrast(contrast: ContrastiveBranch, step_options: StepOptions, split: ClassSplit) -> None:
    if not isinstance(contrast, ContrastiveBranch):
        raise bad_argument("contrast", "a ContrastiveBranch", contrast)
    if split.multi_label:
        raise bad_argument("contrast", "None for multi-label data", contrast)
    if step_options.passes == "split":
        raise MisconfigurationException(
            "`passes='split'` cannot work with `contrast`, whose losses compare all samples of a batch. Use"
            " `passes='auto'` or `passes='full'`."
        )


def _hand_on_ignore_index(name: str, part: Any, ignore_index: int) -> None:
    """Let a part ignore the same target, unless it was told another one."""
    own = getattr(part, "ignore_index", ignore_index)
    if own not in (ignore_index, IGNORE_INDEX):
        raise bad_argument("ignore_index", f"{own}, which `{name}` has", ignore_index)
    if own != ignore_index:
        part.ignore_index = ignore_index


def _bound_loss(loss: nn.Module | None, split: ClassSplit) -> nn.Module:
    if loss is None:
        return BinaryCrossEntropyLoss() if split.multi_label else nn.CrossEntropyLoss(reduction="none")
    if isinstance(loss, type) or not callable(loss):
        raise bad_argument("loss", "a module with reduction='none'", loss)
    reduction = getattr(loss, "reduction", "none")
    if reduction != "none":
        raise bad_argument("loss", "a module with reduction='none'", got_text=f"reduction={reduction!r}")
    if callable(bind := getattr(loss, "bind", None)):
        bind(split)
    return loss
