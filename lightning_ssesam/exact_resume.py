"""Checkpoints from which a run goes on bit for bit as if it had never been interrupted."""

import copy
import ctypes
import random
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from lightning_ssesam import lightning_internals as internals
from lightning_ssesam.errors import NonFiniteError
from lightning_ssesam.snapshots import set_torch_random_state, torch_random_state
from lightning_ssesam.trainer_calls import accumulates, is_fitting

State = dict[str, Any]

_WITHOUT = ", or train without exact resume: `step_options = StepOptions(exact_resume=False)`"


class _Mark(NamedTuple):
    """Where a run was when no update was under way."""

    total_batches: int
    batches_of_epoch: int
    loaders: list[Any]
    random_state: State


class ExactResume(Callback):
    """Saves and restores the random state. A checkpoint from within an update records the state before it.

    Lightning saves no random state. A checkpoint that is written while batches are accumulated, or by an exception
    within a step, counts batches that no update has used. They would be lost. Since the last update only counters, the
    position of the loader and the random state have moved, so such a checkpoint gets their values from right after that
    update.

    It is exact in the middle of an epoch if the loader is stateful, as
    ``torchdata.stateful_dataloader.StatefulDataLoader`` is. With other loaders, Lightning begins the data of the epoch
    anew, and says so. :class:`~lightning_ssesam.SharpnessAwareMixin` attaches this callback by itself, unless
    ``StepOptions(exact_resume=False)`` leaves it out.

    Args:
        module: The module whose runs resume exactly. Its training step must run in Lightning's loop for manual
            optimization.

    Raises:
        MisconfigurationException: When a run starts, if Lightning is too new for it.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self.module = module
        self._replacements = internals.Replacements()
        self._reset()

    def _reset(self) -> None:
        self._mark: _Mark | None = None
        self._before_iterator: State | None = None
        self._to_restore: State | None = None
        self._has_resumed = self._has_failed = False
        self._loader_states: list[Any] = []

    # While a run lasts.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called before a checkpoint is loaded: watch where iterators are made and steps end."""
        if stage != "fit":
            return
        self._replacements.undo()
        self._reset()
        if pl_module is self.module:
            internals.preflight(trainer, internals.EXACT_RESUME, _WITHOUT)
            loops = trainer.fit_loop.epoch_loop
            self._replacements.follow(loops.manual_optimization, "run", lambda: self._after_step(trainer))
            internals.precede_iterator(self._replacements, trainer, lambda: self._on_iterator(trainer))
            self._replacements.precede(trainer.fit_loop, "setup_data", lambda: self._before_data(trainer))
            # To skip a finished validation, a resumed run may make an iterator over its data. That draws random
            # numbers, which an unbroken run does not draw.
            name = "increment_progress_to_evaluation_end"
            self._replacements.replace(loops.val_loop, name, isolate_rng()(getattr(loops.val_loop, name)))

    def _before_data(self, trainer: pl.Trainer) -> None:
        """Called before the loader is made, unless there is one: let it be made after the checkpoint is loaded."""
        if self._to_restore is not None:
            internals.end_finished_epoch(trainer)
            # `estimated_stepping_batches` in `configure_optimizers` has made one without a state.
            internals.forget_loader(trainer)

    def _on_iterator(self, trainer: pl.Trainer) -> None:
        """Called before the run's first iterator over the data is made, because making it may draw random numbers."""
        if self._to_restore is not None:
            if self._loader_states and _tells_epochs_apart(trainer):
                _continue_order(trainer, self._loader_states)
            internals.set_epoch_of_samplers(trainer)
            set_random_state(self._to_restore, trainer)
        self._before_iterator = get_random_state(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after the first iterator is made: restore the random state, and note where the run is."""
        if pl_module is not self.module:
            return
        if self._before_iterator is None and trainer.num_training_batches > 0:
            raise internals.missing(*internals.FIRST_ITERATOR, _WITHOUT)
        if self._to_restore is not None and not _uses_first_iterator(trainer):
            # The unbroken run made the iterator of this epoch long ago. Undo what making it again has drawn.
            set_random_state(self._to_restore, trainer)
        self._has_resumed = self._to_restore is not None
        self._to_restore = None
        self._mark_epoch(trainer)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before an epoch's first batch: no update is under way."""
        if pl_module is self.module:
            self._mark_epoch(trainer)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Called before every batch: correct what Lightning miscounts when it resumes."""
        if pl_module is self.module and self._has_resumed:
            internals.correct_logged_step(trainer)
            self._has_resumed = False

    def _after_step(self, trainer: pl.Trainer) -> None:
        """Called after every training step: note where the run is, unless batches wait for an update."""
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if internals.skips_backward(trainer) or not accumulates(trainer, batches - 1):
            self._set_mark(trainer, batches)

    def _mark_epoch(self, trainer: pl.Trainer) -> None:
        loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        continued = loop.restarted_mid_epoch and not _ended_with_last_batch(trainer)
        batches = epoch_loop.batch_progress.current.ready if continued else 0
        self._set_mark(trainer, batches, self._before_iterator if _uses_first_iterator(trainer) else None)

    def _set_mark(self, trainer: pl.Trainer, batches_of_epoch: int, random_state: State | None = None) -> None:
        self._mark = _Mark(
            trainer.fit_loop.epoch_loop.batch_progress.total.ready,
            batches_of_epoch,
            # A copy, because a loader may change the state that it has handed out.
            copy.deepcopy(internals.loader_states(trainer)),
            random_state or get_random_state(trainer),
        )

    def _update_under_way(self, trainer: pl.Trainer) -> _Mark | None:
        """Return where the run was before the update that is under way; None if there is none."""
        mark, ready = self._mark, trainer.fit_loop.epoch_loop.batch_progress.total.ready
        return None if mark is None or mark.total_batches == ready else mark

    # Checkpoints.

    @override
    def state_dict(self) -> State:
        """Return the random state of every process, as plain values and tensors."""
        if not is_fitting(self.module):
            return {}
        trainer = self.module.trainer
        mark = self._update_under_way(trainer)
        states: list[Any] = [get_random_state(trainer) if mark is None else mark.random_state]
        if trainer.world_size > 1 and not self._has_failed:
            # If one process has failed, the others do not come here.
            own_state, states = states[0], [None] * trainer.world_size
            torch.distributed.all_gather_object(states, own_state)
        return {"random_states": states}

    @override
    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: State) -> None:
        """Called when a checkpoint is written: make it one that resumes exactly."""
        if not is_fitting(self.module):
            return
        loops, batches = checkpoint["loops"]["fit_loop"], trainer.fit_loop.epoch_loop.batch_progress.current.ready
        begins_epoch = batches >= trainer.num_training_batches or trainer.is_last_batch
        if mark := self._update_under_way(trainer):
            _rewind(loops, mark)
            begins_epoch = mark.batches_of_epoch == 0
        elif _awaits_validation(trainer):
            # Lightning would leave it out.
            _let_validation_run(loops)
        if begins_epoch and not _tells_epochs_apart(trainer):
            # Without its state, the loader begins the epoch anew.
            loops["state_dict"].pop("combined_loader", None)

    @override
    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: State) -> None:
        """Called when a checkpoint is read: keep its random state and the loaders' states for when the run begins."""
        if not is_fitting(self.module):
            return
        loops = checkpoint.get("loops", {}).get("fit_loop", {})
        self._loader_states = loops.get("state_dict", {}).get("combined_loader", [])
        callbacks = checkpoint.get("callbacks", {})
        # Earlier versions kept the random state in another callback.
        saved = callbacks.get(self.state_key) or callbacks.get("TrainerSupport", {})
        states = saved.get("random_states", [])
        if trainer.global_rank < len(states):
            self._to_restore = states[trainer.global_rank]

    # When a run ends.

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when the run has ended: undo what :meth:`setup` did."""
        self._replacements.undo()
        self._has_failed = False

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Called when the run is interrupted: undo what :meth:`setup` did, since Lightning skips :meth:`teardown`."""
        self._replacements.undo()
        # These two are raised in every process at once.
        self._has_failed = not isinstance(exception, NonFiniteError | SIGTERMException)


def _uses_first_iterator(trainer: pl.Trainer) -> bool:
    """Whether the epoch that begins uses the iterator that was made before the training started."""
    loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    if loop.restarted_mid_epoch or loop.restarted_on_epoch_end:
        return _ended_with_last_batch(trainer) or epoch_loop.batch_progress.current.ready == 0
    return trainer.current_epoch == 0 or getattr(loop, "is_resuming", False) or epoch_loop.restarting


def _ended_with_last_batch(trainer: pl.Trainer) -> bool:
    """Whether the run is resumed from a checkpoint that was written after the last batch of an epoch."""
    epoch_loop = trainer.fit_loop.epoch_loop
    return bool(epoch_loop.restarted_on_train_batch_end and epoch_loop.batch_progress.is_last_batch)


def _tells_epochs_apart(trainer: pl.Trainer) -> bool:
    """Whether the loader, given its state from the end of an epoch, starts the next one, as torchdata's does."""
    are_torchdata = all(type(loader).__module__.startswith("torchdata.") for loader in internals.loaders(trainer))
    return are_torchdata and internals.loaders_are_unlimited(trainer)


def _continue_order(trainer: pl.Trainer, states: list[Any]) -> None:
    """Continue the loader's shuffling after a finished epoch. Lightning would begin with the first epoch's order."""
    loop: Any = trainer.fit_loop
    progress = loop.epoch_loop.batch_progress
    has_ended = progress.is_last_batch and progress.current.completed == progress.current.ready - 1
    if loop.restarting and progress.current.ready > 0 and not has_ended:
        return
    internals.load_loader_states(trainer, states)
    if loop.restarting or getattr(loop, "is_resuming", False):
        # The first iterator is exhausted. Make it here, so that the one that Lightning makes is the new epoch's.
        for loader in internals.loaders(trainer):
            iter(loader)


def _awaits_validation(trainer: pl.Trainer) -> bool:
    """Whether a validation is due after a trained batch, but has not begun."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(batches.completed == batches.processed - 1 and internals.validation_is_due(trainer))


def _rewind(loops: State, mark: _Mark) -> None:
    """Set a checkpoint's counters and loaders back to before the update that is under way."""
    progress = loops["epoch_loop.batch_progress"]
    for name in ("ready", "started", "processed", "completed"):
        progress["total"][name] = mark.total_batches
        progress["current"][name] = mark.batches_of_epoch
    progress["is_last_batch"] = False
    loops["state_dict"]["combined_loader"] = mark.loaders if mark.total_batches > 0 else []


def _let_validation_run(loops: State) -> None:
    """Set the counters so that, to Lightning, the validation has just begun."""
    progress, validation = loops["epoch_loop.batch_progress"], loops["epoch_loop.val_loop.batch_progress"]
    for which in ("total", "current"):
        progress[which]["completed"] = progress[which]["processed"]
    for which, done, begun in (("total", validation["total"]["completed"], 1), ("current", 0, 0)):
        validation[which] = {"ready": done + begun, "started": done + begun, "processed": done, "completed": done}


def get_random_state(trainer: pl.Trainer) -> State:
    """Return the state of the random number generators of torch, Python, NumPy and the loaders."""
    return {
        "torch": torch_random_state(trainer.strategy.root_device),
        "python": random.getstate(),
        "numpy": _numpy_state.read(),
        "loaders": [generator.get_state() for generator in _generators(trainer)],
    }


class _NumPyState:
    """The state of NumPy's global generator. NumPy takes long to return it, so it is read only if it has changed."""

    def __init__(self) -> None:
        self._memory: bytes | None = None
        self._state: tuple[Any, ...] = ()

    def read(self) -> tuple[Any, ...]:
        """Return the state, without arrays, which ``torch.load(weights_only=True)`` refuses."""
        numpys: Any = np.random
        bits = numpys.get_bit_generator()
        # 624 words and a position: `mt19937_state` in numpy/random/src/mt19937/mt19937.h.
        is_known = type(bits) is numpys.MT19937
        memory = ctypes.string_at(bits.ctypes.state_address, 625 * 4) if is_known else None
        # Beside its memory it only has a normal number that it may keep for the next draw.
        if memory is None or memory != self._memory or self._state[3]:
            algorithm, keys, *counters = numpys.get_state()
            self._memory, self._state = memory, (str(algorithm), torch.from_numpy(keys.astype(np.int64)), *counters)
        return self._state


_numpy_state = _NumPyState()


def set_random_state(state: State, trainer: pl.Trainer) -> None:
    """Put back what :func:`get_random_state` returned."""
    set_torch_random_state(state["torch"], trainer.strategy.root_device)
    random.setstate(state["python"])
    algorithm, keys, *counters = state["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), *counters))
    for generator, saved in zip(_generators(trainer), state["loaders"], strict=False):
        generator.set_state(saved)


def _generators(trainer: pl.Trainer) -> list[torch.Generator]:
    owners = [owner for loader in internals.loaders(trainer) for owner in (loader, getattr(loader, "sampler", None))]
    generators = [getattr(owner, "generator", None) for owner in owners]
    return list(dict.fromkeys(generator for generator in generators if isinstance(generator, torch.Generator)))
