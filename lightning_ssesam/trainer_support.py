"""Lets Lightning do for the mixin what it does under automatic optimization, and refuses what cannot work."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial, wraps
from types import MethodType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from lightning.pytorch.callbacks.spike import SpikeDetection
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ssesam import lightning_internals as internals
from lightning_ssesam.graph_step import check_graphs
from lightning_ssesam.layers import Layers
from lightning_ssesam.module_checks import check_ascents, check_attributes, check_optimizer
from lightning_ssesam.processes import Processes
from lightning_ssesam.step_state import StepState
from lightning_ssesam.trainer_calls import callbacks_of, is_fitting, monitored


class TrainerSupport(Callback):
    """Serves a module with the mixin, which attaches this callback. Leaves the Trainer's other modules alone."""

    def __init__(self, module: Any, step: StepState, skip_batch: Callable[[int], None]) -> None:
        self.module: Any = module
        self._step, self._skip_batch = step, skip_batch
        self._replacements = internals.Replacements()
        self._has_validated = False

    # When a run starts.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called before the optimizers are made: put everything in its place."""
        if stage != "fit":
            return
        self._has_validated = False
        self._replacements.undo()
        if pl_module is not self.module:
            return
        internals.preflight(trainer, internals.STEP)
        replace = self._replacements.replace
        internals.replace_step(self._replacements, trainer, lambda: self._step.having(is_by_hand=True))
        replace(trainer.strategy, "training_step", self._with_skips(trainer.strategy.training_step))
        internals.share_step_count(trainer)
        replace(pl_module, "configure_optimizers", _with_one_optimizer(pl_module))
        state_dict = trainer.strategy.lightning_module_state_dict
        replace(trainer.strategy, "lightning_module_state_dict", lambda: self._step.engine.restored(state_dict()))
        if trainer.strategy.root_device.type != "cpu":
            replace(trainer.strategy, "batch_to_device", self._watched(trainer.strategy.batch_to_device, trainer))
        if (bar := trainer.progress_bar_callback) is not None:
            replace(bar, "get_metrics", self._with_loss(bar.get_metrics, trainer))
        step = MethodType(type(pl_module).training_step, pl_module)
        # torch.compile (torch/_dynamo/eval_frame.py) keeps there what it compiled. Another step that is assigned stays.
        if getattr(vars(pl_module).get("training_step"), "_torchdynamo_orig_callable", None) == step:
            # torch.compile(module) would compile the arithmetic too; `forward` and the networks stay compiled.
            replace(pl_module, "training_step", step)
        if Layers(pl_module).is_compiled:
            # One step may make one backward from a forward, and the next step two; compiled code must bear both.
            replace(torch._functorch.config, "donated_buffer", False)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when the module is set up and has its optimizer: refuse what cannot work."""
        if pl_module is not self.module:
            return
        objective, options = check_attributes(pl_module)
        Processes.check_supported(trainer.strategy, options.processes)
        check_ascents(pl_module, objective, options, trainer)
        check_graphs(pl_module, objective, options, trainer)
        if trainer.world_size > 1:
            self._step.engine.seed = trainer.strategy.broadcast(torch.initial_seed())
        has_switch = any(getattr(callback, "switches_stages", False) for callback in callbacks_of(trainer))
        if objective.num_stages > objective.stage and not has_switch:
            rank_zero_warn(
                f"{type(objective).__name__} stays in stage {objective.stage}, since no StageSwitch is among the"
                " callbacks of the Trainer."
            )
        check_optimizer(trainer.optimizers[0])

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when counters and checkpoints are in place: look at the callbacks that accumulate batches."""
        if pl_module is not self.module:
            return
        self._step.outer_dtype = torch.get_default_dtype()
        schedulers = [c for c in callbacks_of(trainer) if isinstance(c, GradientAccumulationScheduler)]
        goes_to_accumulate = any(scheduler.going_to_accumulate_grad_batches() for scheduler in schedulers)
        watches_spikes = any(isinstance(callback, SpikeDetection) for callback in callbacks_of(trainer))
        if watches_spikes and (goes_to_accumulate or trainer.accumulate_grad_batches > 1):
            raise MisconfigurationException(
                "SpikeDetection looks at the loss of every batch, and where batches are accumulated"
                " SharpnessAwareMixin has one for all batches of an update. Use `on_nonfinite='skip'` instead, or"
                " do not accumulate."
            )
        for scheduler in schedulers:
            # Lightning asks it when an epoch starts, and not when it is resumed in the middle.
            scheduler.on_train_epoch_start(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after every batch: find out whether the mixin's step was in use."""
        if pl_module is self.module and outputs and not self._step.has_seen_batch:
            raise MisconfigurationException(
                f"`{type(pl_module).__name__}.training_step` takes the place of SharpnessAwareMixin's, so that nothing"
                " is trained. Remove it and define `sample_losses`, or call `super().training_step(batch, batch_idx)`."
            )

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after a validation: say after the first one if a callback monitors a value that is NaN."""
        if self._has_validated or trainer.sanity_checking or not is_fitting(self.module):
            return
        self._has_validated = True
        for who, name in monitored(trainer):
            value = trainer.callback_metrics.get(name)
            if value is not None and bool(value.isnan().any()):
                rank_zero_warn(
                    f"{who} monitors {name!r}, which is NaN after the first validation. The accuracy of a group is NaN"
                    " if the group has no classes, or no samples in the validation data."
                )

    def _with_skips(self, training_step: Callable[..., Any]) -> Callable[..., Any]:
        """Return a ``training_step`` that does without the batches that an override of the module's skips."""

        def call(*args: Any, **kwargs: Any) -> Any:
            trainer = self.module.trainer
            steps, self._step.has_seen_batch = trainer.global_step, False
            self._step.ascents_before = self._step.engine.states.copy()
            output = training_step(*args, **kwargs)
            self._step.ascents_before = None
            # An override may also have made a step of its own.
            if output is None and not self._step.has_seen_batch and trainer.global_step == steps:
                self._skip_batch(trainer.fit_loop.epoch_loop.batch_idx)
            if isinstance(output, Mapping) and output.get("loss") is None:
                # The loss of a batch that is kept is not known yet.
                return {key: value for key, value in output.items() if key != "loss"}
            return output

        return call

    def _watched(self, batch_to_device: Callable[..., Any], trainer: pl.Trainer) -> Callable[..., Any]:
        """Return a ``batch_to_device`` that notes the targets on the host, so that no step waits to see them."""
        owners = [self.module, getattr(trainer, "datamodule", None)]
        hooks = ["transfer_batch_to_device", "on_after_batch_transfer"]
        may_change = any(owner is not None and is_overridden(hook, owner) for owner in owners for hook in hooks)

        def call(batch: Any, *args: Any, **kwargs: Any) -> Any:
            moved = batch_to_device(batch, *args, **kwargs)
            self._step.host_targets.forget()
            if trainer.training and not may_change:
                # What fails here fails in the step again, or looks for the targets on the device and finds them there.
                with suppress(Exception):
                    self._step.host_targets.note(*map(self.module.sample_targets, (batch, moved)))
            return moved

        return call

    def _with_loss(self, get_metrics: Callable[..., Any], trainer: pl.Trainer) -> Callable[..., Any]:
        """Return a ``get_metrics`` that puts the loss among the Trainer's ``progress_bar_metrics``."""

        # With `self.log(..., prog_bar=True)`, Lightning would wait for the loss in every step, not only to draw a bar.
        def call(*args: Any, **kwargs: Any) -> Any:
            if (loss := self._step.loss_on_bar) is not None:
                internals.show_on_bar(trainer, "train/loss", loss.item())
            return get_metrics(*args, **kwargs)

        return call

    # Checkpoints.

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the number of skipped updates, and what ascents keep from step to step."""
        if not is_fitting(self.module):
            return {}
        # Such a checkpoint goes on before the update (`ExactResume`).
        ascents = (self._step.ascents_before or self._step.engine.states).state_dict()
        return {"skipped_updates": self.module.skipped_updates, **({"ascents": ascents} if ascents else {})}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned, for a training that goes on with it."""
        if is_fitting(self.module):
            self.module.skipped_updates = int(state_dict["skipped_updates"])
            self._step.engine.states.load_state_dict(state_dict.get("ascents", {}))

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Called before a checkpoint's counters are restored: count the steps that were made without the mixin."""
        if is_fitting(self.module):
            internals.share_saved_step_count(checkpoint)

    # When a run ends.

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when the run has ended: undo what :meth:`setup` did."""
        self._end()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Called when the run is interrupted, after which Lightning does not call :meth:`teardown`."""
        self._end()

    def _end(self) -> None:
        self._replacements.undo()
        self._step.end()


def _with_one_optimizer(module: pl.LightningModule) -> Callable[..., Any]:
    """Return a ``configure_optimizers`` that refuses several. Lightning would advise to switch off the automatic."""
    configure_optimizers = module.configure_optimizers

    @wraps(configure_optimizers)
    def call(self: pl.LightningModule, *args: Any, **kwargs: Any) -> Any:
        # A copy of the module that is made within a fit takes this along, and must not optimize the original.
        own = configure_optimizers if self is module else partial(type(self).configure_optimizers, self)
        configured = own(*args, **kwargs)
        if _count_optimizers(configured) > 1:
            raise MisconfigurationException(
                f"`{type(module).__name__}.configure_optimizers` must return one optimizer under SharpnessAwareMixin,"
                " but it returned several. Use one optimizer with several parameter groups."
            )
        return configured

    return MethodType(call, module)


def _count_optimizers(configured: Any) -> int:
    if isinstance(configured, Mapping):
        return _count_optimizers(configured.get("optimizer"))
    if isinstance(configured, list | tuple):
        return sum(map(_count_optimizers, configured))
    return int(isinstance(configured, Optimizer))
