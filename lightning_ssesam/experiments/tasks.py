"""One training of a comparison, as it is made in a process that makes one at a time."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lightning_ssesam.experiments.devices import free_gpu
from lightning_ssesam.experiments.experiment import Experiment
from lightning_ssesam.experiments.logs import Logs, TrainingLog
from lightning_ssesam.experiments.progress import Begun, EpochReports, Report, tell
from lightning_ssesam.experiments.runs import Run
from lightning_ssesam.experiments.unfinished import Unfinished


class Task(NamedTuple):
    """One training to make.

    Attributes:
        experiment: Experiment that is trained.
        fingerprint: Fingerprint of its settings.
        seed: Seed of the training.
        unfinished: Absolute path of the folder of the training while it is under way; None if it has none.
        logs: Where the training is logged; None if it is not.
    """

    experiment: Experiment
    fingerprint: str
    seed: int
    unfinished: Path | None = None
    logs: Logs | None = None

    @property
    def name(self) -> str:
        """Name of the training, such as ``"SSESAM, seed 3"``, for the display."""
        return f"{self.experiment.method[:150]}, seed {self.seed}"

    def run(self, device: int | None = None) -> Run:
        """Train, and report each epoch. Without the folder above ``unfinished``, no checkpoint is kept."""
        callbacks = [*self.experiment.callbacks, EpochReports(self.name)]
        unfinished = None if self.unfinished is None else Unfinished(self.unfinished)
        # A worker of a cluster may not have the folder, or may not write there.
        is_kept = unfinished is not None and os.access(unfinished.folder.parent, os.W_OK | os.X_OK)
        log = TrainingLog(self.logs, self.experiment.method, self.seed, self.fingerprint) if self.logs else None
        experiment = replace(self.experiment, callbacks=callbacks)
        return experiment.run(self.seed, device, unfinished if is_kept else None, log)


class Pool(NamedTuple):
    """Several processes, each of which makes one run at a time.

    Attributes:
        submit: Function that gives a task to the first process that is free.
        reports: Function that returns what the processes have reported since it was called last.
    """

    submit: Callable[[Task], Future[Run]]
    reports: Callable[[], Iterable[Report]]


def run_on_free_gpu(task: Task) -> Run:
    """Make a run beside others, on a GPU that no other run takes."""
    tell(Begun(task.name))
    with free_gpu() as device:
        return task.run(device)
