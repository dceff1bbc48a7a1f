"""What makes a resumed run the same, bit for bit, as one that was never interrupted."""

import copy
import random
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch, sized_len

from lightning_ssesam.snapshots import set_torch_random_state, torch_random_state

State = dict[str, Any]


class _Mark(NamedTuple):
    """Where a run was when no update was under way."""

    total_batches: int
    batches_of_epoch: int
    loaders: list[Any]
    random_state: State


class Resumption:
    """Puts the random state into checkpoints and back, and dates checkpoints from within an update before it.

    Lightning saves no random state. And a checkpoint that is written while batches are accumulated, or by an exception
    within a step, counts batches as read that no update has seen; they would be lost. As nothing but counters, the
    position of the loader and the random state has moved since the last update, such a checkpoint gets those of then.

    Exact in the middle of an epoch if the loader is stateful, as ``torchdata.stateful_dataloader.StatefulDataLoader``
    is; Lightning begins the data of the epoch anew with others, and says so.
    """

    def __init__(self) -> None:
        self._mark: _Mark | None = None
        self._before_iterator: State | None = None
        self._to_restore: State | None = None
        self._has_resumed = False
        self._loader_states: list[Any] = []

    def mark(self, trainer: pl.Trainer) -> None:
        """Take note that no update is under way."""
        self._set_mark(trainer, trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    def _mark_epoch(self, trainer: pl.Trainer) -> None:
        loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        continued = loop.restarted_mid_epoch and not _ended_with_last_batch(trainer)
        batches = epoch_loop.batch_progress.current.ready if continued else 0
        self._set_mark(trainer, batches, self._before_iterator if _uses_first_iterator(trainer) else None)

    def _set_mark(self, trainer: pl.Trainer, batches_of_epoch: int, random_state: State | None = None) -> None:
        loader = trainer.fit_loop._combined_loader
        self._mark = _Mark(
            trainer.fit_loop.epoch_loop.batch_progress.total.ready,
            batches_of_epoch,
            # A loader may hand out what it goes on to change.
            [] if loader is None else copy.deepcopy(loader._state_dicts()),
            random_state or get_random_state(trainer),
        )

    def before_iterator(self, trainer: pl.Trainer) -> None:
        """Called before the run's first iterator over the data is made, which may draw random numbers."""
        if self._to_restore is not None:
            if self._loader_states and _tells_epochs_apart(trainer):
                _continue_order(trainer, self._loader_states)
            for loader in _loaders(trainer):
                # Lightning tells it the epoch after it has made the iterator.
                progress: Any = trainer.fit_loop.epoch_progress.current
                _set_sampler_epoch(loader, progress.processed)
            set_random_state(self._to_restore, trainer)
        self._before_iterator = get_random_state(trainer)

    def on_train_start(self, trainer: pl.Trainer) -> None:
        """Called after that: in the middle of an epoch its iterator was made long ago."""
        if self._to_restore is not None and not _uses_first_iterator(trainer):
            set_random_state(self._to_restore, trainer)
        self._has_resumed = self._to_restore is not None
        self._to_restore = None
        self._mark_epoch(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer) -> None:
        """Called before an epoch's first batch."""
        self._mark_epoch(trainer)

    def state_dict(self, trainer: pl.Trainer) -> State:
        """Return the random state, plain values and tensors."""
        if self._mark is not None and self._is_under_way(trainer):
            return _to_plain(self._mark.random_state)
        return _to_plain(get_random_state(trainer))

    def load_state_dict(self, state: State) -> None:
        """Take what :meth:`state_dict` returned, for when the run begins."""
        self._to_restore = _from_plain(state)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take note of the loader's state in a checkpoint."""
        loops = checkpoint.get("loops", {}).get("fit_loop", {})
        self._loader_states = loops.get("state_dict", {}).get("combined_loader", [])

    def amend(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Make a checkpoint one that Lightning resumes from exactly."""
        loops = checkpoint["loops"]["fit_loop"]
        begins_epoch = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        if self._mark is not None and self._is_under_way(trainer):
            self._rewind(loops)
            begins_epoch = self._mark.batches_of_epoch == 0
        elif _awaits_validation(trainer):
            # Lightning would leave it out.
            _let_validation_run(loops)
        if begins_epoch and not _tells_epochs_apart(trainer):
            # The loader begins anew, as after other checkpoints from the end of an epoch.
            loops["state_dict"].pop("combined_loader", None)

    def _rewind(self, loops: State) -> None:
        assert self._mark is not None
        progress = loops["epoch_loop.batch_progress"]
        for name in ("ready", "started", "processed", "completed"):
            progress["total"][name] = self._mark.total_batches
            progress["current"][name] = self._mark.batches_of_epoch
        progress["is_last_batch"] = False
        loops["state_dict"]["combined_loader"] = self._mark.loaders if self._mark.total_batches > 0 else []

    def on_train_batch_start(self, trainer: pl.Trainer) -> None:
        """Called before a batch: Lightning may have counted a step when it resumed, for what it logs."""
        if self._has_resumed:
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
            self._has_resumed = False

    def _is_under_way(self, trainer: pl.Trainer) -> bool:
        assert self._mark is not None
        return trainer.fit_loop.epoch_loop.batch_progress.total.ready != self._mark.total_batches


def _uses_first_iterator(trainer: pl.Trainer) -> bool:
    """Whether the epoch that begins takes the iterator that was made before the training started."""
    loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    if loop.restarted_mid_epoch or loop.restarted_on_epoch_end:
        return _ended_with_last_batch(trainer) or epoch_loop.batch_progress.current.ready == 0
    return trainer.current_epoch == 0 or getattr(loop, "is_resuming", False) or epoch_loop.restarting


def _ended_with_last_batch(trainer: pl.Trainer) -> bool:
    """Whether the run is resumed from a checkpoint that was written after the last batch of an epoch."""
    epoch_loop = trainer.fit_loop.epoch_loop
    return bool(epoch_loop.restarted_on_train_batch_end and epoch_loop.batch_progress.is_last_batch)


def _tells_epochs_apart(trainer: pl.Trainer) -> bool:
    """Whether the loader takes its state at the end of an epoch for the start of the next, as torchdata's does."""
    loaders = _loaders(trainer)
    if not all(type(loader).__module__.startswith("torchdata.") for loader in loaders):
        return False
    combined: Any = trainer.fit_loop._combined_loader
    limits = combined.limits or [None] * len(loaders)
    return all(limit in (None, float("inf"), sized_len(loader)) for limit, loader in zip(limits, loaders, strict=True))


def _loaders(trainer: pl.Trainer) -> list[Any]:
    loader: Any = trainer.fit_loop._combined_loader
    return [] if loader is None else loader.flattened


def _continue_order(trainer: pl.Trainer, states: list[Any]) -> None:
    """Go on with the order of a loader whose epoch has ended, which Lightning would begin with that of the first."""
    loop: Any = trainer.fit_loop
    progress = loop.epoch_loop.batch_progress
    has_ended = progress.is_last_batch and progress.current.completed == progress.current.ready - 1
    if loop.restarting and progress.current.ready > 0 and not has_ended:
        return
    loop._combined_loader._load_state_dicts(states)
    loop._combined_loader_states_to_load = []
    if loop.restarting or getattr(loop, "is_resuming", False):
        # This iterator has nothing left. The next is that of the new epoch, and Lightning makes just one.
        for loader in loop._combined_loader.flattened:
            iter(loader)


def _awaits_validation(trainer: pl.Trainer) -> bool:
    """Whether a batch has been trained on that a validation follows, which has not begun."""
    loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    batches: Any = epoch_loop.batch_progress.current
    is_after_batch = batches.completed == batches.processed - 1
    return is_after_batch and loop._data_fetcher is not None and epoch_loop._should_check_val_fx(loop._data_fetcher)


def _let_validation_run(loops: State) -> None:
    """Put counters to where Lightning takes a checkpoint for one of a validation that has just begun."""
    progress, validation = loops["epoch_loop.batch_progress"], loops["epoch_loop.val_loop.batch_progress"]
    for which in ("total", "current"):
        progress[which]["completed"] = progress[which]["processed"]
    for which, begun in (("total", 1), ("current", 0)):
        done = validation[which]["completed"] if which == "total" else 0
        validation[which] = {"ready": done + begun, "started": done + begun, "processed": done, "completed": done}


def get_random_state(trainer: pl.Trainer) -> State:
    """Return the state of the random number generators of torch, Python, NumPy, and those of the loader's own."""
    return {
        "torch": torch_random_state(trainer.strategy.root_device),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "loaders": [generator.get_state() for generator in _generators(trainer)],
    }


def set_random_state(state: State, trainer: pl.Trainer) -> None:
    """Put back what :func:`get_random_state` returned."""
    set_torch_random_state(state["torch"], trainer.strategy.root_device)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    for generator, saved in zip(_generators(trainer), state["loaders"], strict=False):
        generator.set_state(saved)


def _generators(trainer: pl.Trainer) -> list[torch.Generator]:
    owners = [owner for loader in _loaders(trainer) for owner in (loader, getattr(loader, "sampler", None))]
    generators = [getattr(owner, "generator", None) for owner in owners]
    return list(dict.fromkeys(generator for generator in generators if isinstance(generator, torch.Generator)))


def _to_plain(state: State) -> State:
    """Return a random state without NumPy arrays, which ``torch.load(weights_only=True)`` refuses."""
    name, keys, *rest = state["numpy"]
    return {**state, "numpy": (str(name), torch.from_numpy(keys.astype(np.int64)), *rest)}


def _from_plain(state: State) -> State:
    name, keys, *rest = state["numpy"]
    return {**state, "numpy": (name, keys.numpy().astype(np.uint32), *rest)}
