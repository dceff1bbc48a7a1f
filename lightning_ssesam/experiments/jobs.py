"""Trainings one after the other, several at a time in processes of this machine, or on the workers of a cluster."""

import os
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from multiprocessing import get_context

import torch

from lightning_ssesam.errors import WorkersLostError
from lightning_ssesam.experiments.lifetimes import bound_processes
from lightning_ssesam.experiments.progress import Begun, Progress, received, send_through, shown
from lightning_ssesam.experiments.runs import Run
from lightning_ssesam.experiments.tasks import Pool, Task, run_on_free_gpu

# Seconds between two looks at what the workers report.
_BETWEEN_LOOKS = 0.5
# Number of times in a row that a process is lost before a run is finished.
_MOST_LOSSES = 3


def make_runs(tasks: Sequence[Task], jobs: int, cluster: str | None = None) -> Generator[Run, None, None]:
    """Train up to ``jobs`` tasks at a time, or as many as a cluster has workers. Yield each run when it is finished.

    All processes of this machine that make trainings end when this generator is closed, and when the process that runs
    it ends. A training whose process is lost is made by another one.

    Args:
        tasks: Trainings to make, all of the same length.
        jobs: Number of processes of this machine.
        cluster: Dask cluster, see :func:`~cluster.workers`.

    Raises:
        WorkersLostError: If processes are lost again and again, or the cluster is.
    """
    epochs, jobs = tasks[0].experiment.epochs if tasks else 0, min(jobs, len(tasks))
    with shown(len(tasks), epochs) as progress:
        if cluster is None and jobs <= 1:
            yield from _one_by_one(tasks, progress)
        elif cluster is None:
            yield from _in_pool(tasks, partial(_processes, jobs), progress)
        else:
            from lightning_ssesam.experiments.cluster import workers

            yield from _in_pool(tasks, partial(workers, cluster, jobs), progress)


def usable_jobs() -> int:
    """Return how many trainings fit this machine: one for each GPU, or else one for each CPU core, at most eight."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


def _one_by_one(tasks: Sequence[Task], progress: Progress) -> Iterator[Run]:
    for task in tasks:
        yield task.run()
        progress.finish(task.name)


def _in_pool(
    tasks: Sequence[Task], open_pool: Callable[[], AbstractContextManager[Pool]], progress: Progress
) -> Iterator[Run]:
    missing, begun, losses = dict(enumerate(tasks)), Counter[str](), 0
    while missing:
        try:
            with open_pool() as pool:
                running = {pool.submit(task): number for number, task in missing.items()}
                while running:
                    finished, _ = wait(running, timeout=_BETWEEN_LOOKS, return_when=FIRST_COMPLETED)
                    for report in pool.reports():
                        if isinstance(report, Begun):
                            begun[report.training] += 1
                        else:
                            progress.show(report)
                    # Failed runs come last: `result` raises, and would lose the other runs that have finished.
                    for future in sorted(finished, key=lambda each: each.cancelled() or each.exception() is not None):
                        number = running.pop(future)
                        run, task, losses = future.result(), missing.pop(number), 0
                        run.interruptions = max(run.interruptions, begun[task.name] - 1)
                        progress.finish(task.name)
                        yield run
        except BrokenExecutor as error:
            losses += 1
            if losses == _MOST_LOSSES:
                reason = f"A process that trained was ended from outside, {losses} times in a row"
                raise WorkersLostError(f"{reason}. Is memory short? Fewer `jobs` need less.") from error
            print("\nA process that trained was ended from outside. What was under way goes on in others.")


@contextmanager
def _processes(jobs: int) -> Iterator[Pool]:
    receiver, sender = get_context("spawn").Pipe(duplex=False)
    with receiver, sender, bound_processes(jobs, send_through, sender) as executor:
        yield Pool(lambda task: executor.submit(run_on_free_gpu, task), partial(received, receiver))
