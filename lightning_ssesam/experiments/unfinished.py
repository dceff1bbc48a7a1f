"""The checkpoint of a training that is under way, from which the same training goes on after it was cut off."""

import math
import shutil
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from typing_extensions import override

from lightning_ssesam.experiments.files import remove_unfinished, replaced
from lightning_ssesam.lightning_internals import loader_states, loaders

# Seconds of training between two checkpoints, and how much longer than the writing of one that must be at least.
_BETWEEN = 30.0
_TIMES_WRITING = 20


class Unfinished:
    """The folder of a training that is under way. A training that has ended needs it no more.

    Args:
        folder: Path of the folder. It is made when a training begins.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = folder / "last.ckpt"
        self._begun = folder / "begun.txt"

    def begin(self) -> int:
        """Note that the training begins or goes on. Return how often it did before, and was cut off.

        Raises:
            OSError: If nothing can be written there.
        """
        self.folder.mkdir(exist_ok=True)
        remove_unfinished(self.folder)
        # A byte for each time: what is written by one call is written whole.
        with self._begun.open("ab") as file:
            before = file.tell()
            file.write(b".")
        return before

    def resume(self, trainer: pl.Trainer) -> Path | None:
        """Let a training keep its checkpoint here. Return the one to go on from, if there is one."""
        # After all others: it saves what they have become. In the list that a Trainer is made with, it would be moved.
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.append(KeepUnfinished(self.checkpoint))
        if not self.checkpoint.is_file():
            return None
        try:
            # Only the values are read. What stays in the file is read by the Trainer.
            torch.load(self.checkpoint, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            print(f"{self.checkpoint} cannot be read ({type(error).__name__}). Its training begins anew.")
            return None
        return self.checkpoint

    def remove(self) -> None:
        """Remove the folder, if there is one."""
        shutil.rmtree(self.folder, ignore_errors=True)


class KeepUnfinished(Checkpoint):
    """Saves a training now and then: at the end of an epoch and, if the loaders have a state, within one.

    Resumed from it, the training ends with the same bits (:class:`~lightning_ssesam.StepOptions`, ``exact_resume``).
    Without the state of a loader, an epoch can only be begun, not be continued. With processes of a loader that stay,
    nothing is saved.

    Args:
        path: Path of the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._due = 0.0
        self._may_be_within = False

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when the training begins or goes on: wait, for ever if it could not go on with the same bits."""
        evaluation = trainer.val_dataloaders or []
        every = [*loaders(trainer), *(evaluation if isinstance(evaluation, list | tuple) else [evaluation])]
        # Processes that stay have random states of their own.
        is_exact = not any(getattr(loader, "persistent_workers", False) for loader in every)
        self._due = time.monotonic() + _BETWEEN if is_exact else math.inf
        # Others draw random numbers in the middle of an epoch, too.
        self._may_be_within = not any(getattr(loader, "num_workers", 0) for loader in loaders(trainer))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after a batch: save if it is time, and the loaders know where they are."""
        # Most batches end here: the rest takes longer.
        if not self._may_be_within or time.monotonic() < self._due:
            return
        if not (trainer.is_last_batch or _stops(trainer)) and loader_states(trainer):
            self._save(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after validation: save if it is time. After the last epoch there is nothing to go on with."""
        is_last = trainer.current_epoch + 1 == trainer.max_epochs
        if time.monotonic() >= self._due and not (is_last or _stops(trainer)):
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        start = time.monotonic()
        try:
            with replaced(self.path) as unfinished:
                trainer.save_checkpoint(unfinished)
        except OSError as error:
            # The training can do without.
            print(f"\nCannot write {str(self.path)!r}: {error.strerror}. The training goes on without a checkpoint.")
        end = time.monotonic()
        self._due = end + max(_BETWEEN, _TIMES_WRITING * (end - start))


def _stops(trainer: pl.Trainer) -> bool:
    """Return whether the training stops after this batch, whatever the epoch."""
    return bool(trainer.should_stop) or trainer.global_step >= trainer.max_steps > -1
