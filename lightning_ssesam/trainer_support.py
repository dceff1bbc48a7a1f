"""What manual optimization takes away, put back.

With lightning_loops.py, resume.py and distributed.py, this is where the project touches private Lightning names; each
is held by a test that compares with automatic optimization.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.callbacks.spike import SpikeDetection
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from lightning_ssesam.callbacks import StageSwitch
from lightning_ssesam.distributed import Processes
from lightning_ssesam.errors import NonFiniteError
from lightning_ssesam.lightning_loops import is_compiled
from lightning_ssesam.resume import Resumption

if TYPE_CHECKING:
    from lightning_ssesam.mixin import SharpnessAwareMixin


class TrainerSupport(Callback):
    """Lets Lightning do what it does under automatic optimization only, and makes runs resume exactly.

    Lightning asks ``module.automatic_optimization`` before it configures and steps learning-rate schedulers, clips
    gradients, accumulates, decides when to log and when to save. The answer is True while it runs those places.
    :class:`~lightning_ssesam.SharpnessAwareMixin` attaches this callback by itself.

    Args:
        module: The module that it serves; it leaves others alone that the same Trainer trains.

    """

    def __init__(self, module: SharpnessAwareMixin) -> None:
        self.module = module
        self._undo_steps: list[Callable[[], None]] = []
        self._resumption = Resumption()
        self._has_failed = False

    # When a run starts.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called before the optimizers are made: put everything in its place."""
        if stage != "fit":
            return
        self._undo()
        self._resumption = Resumption()
        if pl_module is not self.module:
            return
        epoch_loop = trainer.fit_loop.epoch_loop
        for owner, name in _asking_for_automatic_optimization(trainer):
            self._replace(owner, name, _as_if_automatic(getattr(owner, name), pl_module))
        _share_step_count(trainer)
        for owner, name, afterwards in [
            (epoch_loop.manual_optimization, "run", self._after_batch),
            (trainer.fit_loop, "_load_combined_loader_states", self._resumption.before_iterator),
        ]:
            self._replace(owner, name, _followed_by(getattr(owner, name), partial(afterwards, trainer)))
        clean = _then(trainer.strategy.lightning_module_state_dict, self.module._sharpness_engine.restored)
        self._replace(trainer.strategy, "lightning_module_state_dict", clean)
        if trainer.strategy.root_device.type != "cpu":
            self._replace(trainer.strategy, "batch_to_device", self._watched(trainer.strategy.batch_to_device, trainer))
        if (bar := trainer.progress_bar_callback) is not None:
            self._replace(bar, "get_metrics", self._with_loss(bar.get_metrics, trainer))
        # When it resumes, Lightning may make an iterator over the validation data that an unbroken run has not made.
        skip = epoch_loop.val_loop.increment_progress_to_evaluation_end
        self._replace(epoch_loop.val_loop, "increment_progress_to_evaluation_end", isolate_rng()(skip))
        if any(is_compiled(module) for module in pl_module.modules()):
            # One step may make one backward from a forward, and the next step two; compiled code must bear both.
            config = torch._functorch.config
            self._undo_steps.append(partial(setattr, config, "donated_buffer", config.donated_buffer))
            config.donated_buffer = False
        if "training_step" in vars(pl_module):
            # torch.compile(module) would compile the arithmetic too; `forward` and the networks stay compiled.
            self._replace(pl_module, "training_step", MethodType(type(pl_module).training_step, pl_module))
        self.module._is_supported = True

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when the module is set up and has its optimizer: refuse what cannot work."""
        if pl_module is not self.module:
            return
        self.module._check_objective()
        Processes.check_supported(trainer.strategy, self.module.step_options.processes)
        objective = self.module.objective
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if objective.num_stages > objective.stage and not any(isinstance(c, StageSwitch) for c in callbacks):
            rank_zero_warn(
                f"{type(objective).__name__} stays in stage {objective.stage}, since no StageSwitch is among the"
                " callbacks of the Trainer."
            )
        if isinstance(trainer.optimizers[0], torch.optim.LBFGS):
            raise MisconfigurationException(
                "LBFGS evaluates the loss several times a step, which SharpnessAwareMixin cannot serve. Use an"
                " optimizer that takes one gradient a step, such as SGD or AdamW."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when counters and checkpoints are in place: go on with the random numbers of the checkpoint."""
        if pl_module is not self.module:
            return
        self.module._outer_dtype = torch.get_default_dtype()
        self._resumption.on_train_start(trainer)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        schedulers = [c for c in callbacks if isinstance(c, GradientAccumulationScheduler)]
        accumulates = (
            any(c.going_to_accumulate_grad_batches() for c in schedulers) or trainer.accumulate_grad_batches > 1
        )
        for callback in callbacks:
            if isinstance(callback, SpikeDetection) and accumulates:
                raise MisconfigurationException(
                    "SpikeDetection looks at the loss of every batch, and where batches are accumulated"
                    " SharpnessAwareMixin has one for all batches of an update. Use `on_nonfinite='skip'` instead, or"
                    " do not accumulate."
                )
        for scheduler in schedulers:
            # Lightning asks it when an epoch starts, and not when it is resumed in the middle.
            scheduler.on_train_epoch_start(trainer)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before an epoch's first batch: no update is under way."""
        if pl_module is self.module:
            self._resumption.on_train_epoch_start(trainer)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Called before every batch: set right what Lightning miscounts when it resumes."""
        if pl_module is self.module:
            self._resumption.on_train_batch_start(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after every batch: find out at the first one whether the mixin's step is in use."""
        if pl_module is self.module and outputs and not self.module._has_stepped:
            raise MisconfigurationException(
                f"`{type(pl_module).__name__}.training_step` takes the place of SharpnessAwareMixin's, so that nothing"
                " is trained. Remove it and define `sample_losses`, or call `super().training_step(batch, batch_idx)`."
            )

    def _watched(self, batch_to_device: Callable[..., Any], trainer: pl.Trainer) -> Callable[..., Any]:
        """Return a ``batch_to_device`` that notes the targets on the host, so that no step waits to see them."""
        owners = [self.module, getattr(trainer, "datamodule", None)]
        hooks = ["transfer_batch_to_device", "on_after_batch_transfer"]
        may_change = any(owner is not None and is_overridden(hook, owner) for owner in owners for hook in hooks)

        def call(batch: Any, *args: Any, **kwargs: Any) -> Any:
            moved = batch_to_device(batch, *args, **kwargs)
            self.module._host_targets.forget()
            if trainer.training and not may_change:
                # What fails here fails in the step again, or looks for the targets on the device and finds them there.
                with suppress(Exception):
                    self.module._host_targets.note(*map(self.module.sample_targets, (batch, moved)))
            return moved

        return call

    def _with_loss(self, get_metrics: Callable[..., Any], trainer: pl.Trainer) -> Callable[..., Any]:
        """Return a ``get_metrics`` that finds the loss among the Trainer's ``progress_bar_metrics``.

        To log it with ``prog_bar=True`` would wait for it every step, and not only when a bar is drawn.
        """

        def call(*args: Any, **kwargs: Any) -> Any:
            if (loss := self.module._loss_on_bar) is not None:
                trainer._logger_connector._progress_bar_metrics["train/loss"] = loss.item()
            return get_metrics(*args, **kwargs)

        return call

    def _after_batch(self, trainer: pl.Trainer) -> None:
        if not self.module._pending:
            self._resumption.mark(trainer)

    # Checkpoints.

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the random state of every process, and how many updates were skipped."""
        trainer = self.module.trainer
        if not self._serves(trainer):
            return {}
        own = self._resumption.state_dict(trainer)
        states: list[Any] = [own]
        if trainer.world_size > 1 and not self._has_failed:
            # Where one process has failed the others do not come here.
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, own)
        return {"random_states": states, "skipped_updates": self.module.skipped_updates}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, for a training that goes on with it."""
        if not self._serves(self.module.trainer):
            return
        self.module.skipped_updates = int(state_dict["skipped_updates"])
        states = state_dict["random_states"]
        rank = self.module.trainer.global_rank
        if rank < len(states):
            self._resumption.load_state_dict(states[rank])

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Called when a checkpoint is written: make it one that resumes exactly."""
        if self._serves(trainer):
            self._resumption.amend(trainer, checkpoint)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Called before a checkpoint's counters are restored: count the steps made without the mixin too."""
        if not self._serves(trainer):
            return
        self._resumption.on_load_checkpoint(checkpoint)
        loops = checkpoint.get("loops", {}).get("fit_loop", {})
        automatic = loops.get("epoch_loop.automatic_optimization.optim_progress")
        manual = loops.get("epoch_loop.manual_optimization.optim_step_progress")
        if automatic and manual and manual["total"]["completed"] == 0:
            loops["epoch_loop.manual_optimization.optim_step_progress"] = automatic["optimizer"]["step"]

    def _serves(self, trainer: pl.Trainer) -> bool:
        return trainer.state.fn == TrainerFn.FITTING and trainer.lightning_module is self.module

    # When a run ends.

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when the run has ended: undo what :meth:`setup` did."""
        self._undo()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Called when the run is interrupted, after which Lightning does not call :meth:`teardown`."""
        self._undo()
        # These two are raised in every process at once.
        self._has_failed = not isinstance(exception, NonFiniteError | SIGTERMException)

    def _replace(self, owner: object, name: str, value: Any) -> None:
        own = vars(owner)
        undo = partial(setattr, owner, name, own[name]) if name in own else partial(delattr, owner, name)
        self._undo_steps.append(undo)
        setattr(owner, name, value)

    def _undo(self) -> None:
        while self._undo_steps:
            self._undo_steps.pop()()
        self._has_failed = False
        self.module.automatic_optimization = self.module._is_pretending = False
        self.module._is_supported = False
        self.module._pending.clear()
        self.module._host_targets.forget()
        self.module._loss_on_bar = None
        self.module._sharpness_engine.release()


def _asking_for_automatic_optimization(trainer: pl.Trainer) -> list[tuple[Any, str]]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [
        (trainer.strategy, "setup_optimizers"),
        (trainer.fit_loop.epoch_loop, "_update_learning_rates"),
        (trainer.precision_plugin, "_clip_gradients"),
        (trainer._logger_connector, "update_train_step_metrics"),
        *((callback, "on_train_batch_end") for callback in callbacks if isinstance(callback, ModelCheckpoint)),
        *((c, "on_train_start") for c in callbacks if isinstance(c, GradientAccumulationScheduler)),
    ]


def _share_step_count(trainer: pl.Trainer) -> None:
    """Let Lightning count the optimizer's steps once, whichever of its two counts it looks at or saves."""
    loop = trainer.fit_loop.epoch_loop
    automatic, manual = loop.automatic_optimization.optim_progress.optimizer, loop.manual_optimization
    counts = automatic.step, manual.optim_step_progress
    automatic.step = manual.optim_step_progress = max(counts, key=lambda count: count.total.completed)


def _then(function: Callable[[], Any], change: Callable[[Any], Any]) -> Callable[[], Any]:
    return lambda: change(function())


def _followed_by(function: Callable[..., Any], afterwards: Callable[[], None]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        output = function(*args, **kwargs)
        afterwards()
        return output

    return call


def _as_if_automatic(function: Callable[..., Any], pl_module: pl.LightningModule) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with _automatic(pl_module):
            return function(*args, **kwargs)

    return call


@contextmanager
def _automatic(pl_module: pl.LightningModule) -> Iterator[None]:
    pl_module.automatic_optimization = True
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("Training with multiple optimizers is only supported with manual optimization"):
            raise
        raise MisconfigurationException(
            f"`{type(pl_module).__name__}.configure_optimizers` must return one optimizer under SharpnessAwareMixin,"
            " but it returned several. Use one optimizer with several parameter groups."
        ) from None
    finally:
        pl_module.automatic_optimization = False
