"""Trainings one after the other, or several at a time in processes."""

import multiprocessing
import os
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from lightning_ssesam.experiments.experiment import Experiment
from lightning_ssesam.experiments.lifetimes import end_with_parent, killed_on_error
from lightning_ssesam.experiments.runs import Run


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
    for experiment, _, seed in (progress := tqdm(tasks, unit="run")):
        progress.set_description(f"{experiment.method}, seed {seed}")
        yield experiment.run(seed)


def _in_processes(tasks: Sequence[Task], jobs: int) -> Generator[Run, None, None]:
    gpus = torch.cuda.device_count()
    free_devices: list[int | None] = [number % gpus if gpus else None for number in reversed(range(jobs))]
    waiting, running = deque(tasks), dict[Future[Run], int | None]()
    # A process that has used several threads or a GPU cannot be forked.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(jobs, context, initializer=end_with_parent)
    with killed_on_error(executor), tqdm(total=len(tasks), unit="run") as progress:
        while waiting or running:
            while waiting and free_devices:
                task, device = waiting.popleft(), free_devices.pop()
                running[executor.submit(task.experiment.run, task.seed, device)] = device
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            # Failed runs come last: `result` raises, and would lose the other runs that have finished.
            for future in sorted(finished, key=lambda future: future.exception() is not None):
                free_devices.append(running.pop(future))
                run = future.result()
                progress.update()
                progress.set_description(f"{run.method}, seed {run.seed}")
                yield run
