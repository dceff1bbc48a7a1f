"""Trainings one after the other, or several at a time in processes."""

import multiprocessing
import os
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch

from lightning_ssesam.experiments.experiment import Experiment
from lightning_ssesam.experiments.lifetimes import end_with_parent, killed_on_error
from lightning_ssesam.experiments.progress import EpochReports, received, send_through, shown
from lightning_ssesam.experiments.runs import Run

# Seconds between two looks at what the workers report.
_BETWEEN_LOOKS = 0.5


class Task(NamedTuple):
    """One training to make: an experiment, its fingerprint, and a seed."""

    experiment: Experiment
    fingerprint: str
    seed: int


def make_runs(tasks: Sequence[Task], jobs: int) -> Generator[Run, None, None]:
    """Train up to ``jobs`` tasks at a time. Yield each run as soon as it is finished.

    All processes of the trainings end when this generator is closed, and when the process that runs it ends.
    """
    jobs = min(jobs, len(tasks))
    return _in_processes(tasks, jobs) if jobs > 1 else _one_by_one(tasks)


def usable_jobs() -> int:
    """Return how many trainings fit this machine: one for each GPU, or else one for each CPU core, at most eight."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


def _one_by_one(tasks: Sequence[Task]) -> Generator[Run, None, None]:
    with shown(len(tasks), _epochs_of(tasks)) as progress:
        for task in tasks:
            yield _watched(task).run(task.seed)
            progress.finish(_name_of(task))


def _in_processes(tasks: Sequence[Task], jobs: int) -> Generator[Run, None, None]:
    gpus = torch.cuda.device_count()
    free_devices: list[int | None] = [number % gpus if gpus else None for number in reversed(range(jobs))]
    waiting, running = deque(tasks), dict[Future[Run], tuple[Task, int | None]]()
    # A process that has used several threads or a GPU cannot be forked.
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(jobs, context, initializer=partial(_begin_worker, sender))
    with killed_on_error(executor), shown(len(tasks), _epochs_of(tasks)) as progress, receiver, sender:
        while waiting or running:
            while waiting and free_devices:
                task, device = waiting.popleft(), free_devices.pop()
                running[executor.submit(_watched(task).run, task.seed, device)] = task, device
            finished, _ = wait(running, timeout=_BETWEEN_LOOKS, return_when=FIRST_COMPLETED)
            for end in received(receiver):
                progress.show(end)
            # Failed runs come last: `result` raises, and would lose the other runs that have finished.
            for future in sorted(finished, key=lambda future: future.exception() is not None):
                task, device = running.pop(future)
                free_devices.append(device)
                run = future.result()
                progress.finish(_name_of(task))
                yield run


def _begin_worker(sender: Connection) -> None:
    """Called when a worker starts: let it end with its parent, and report to it."""
    end_with_parent()
    send_through(sender)


def _watched(task: Task) -> Experiment:
    """Return the experiment of a task, whose training reports each epoch."""
    callbacks = [*task.experiment.callbacks, EpochReports(_name_of(task))]
    return replace(task.experiment, callbacks=callbacks)


def _name_of(task: Task) -> str:
    return f"{task.experiment.method}, seed {task.seed}"


def _epochs_of(tasks: Sequence[Task]) -> int:
    return tasks[0].experiment.epochs if tasks else 0
