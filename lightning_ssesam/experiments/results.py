"""The results of a comparison in its output folder: those that are there, and those that are missing."""

from bisect import insort
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.errors import WorkersLostError
from lightning_ssesam.experiments.files import make_folder, remove_unfinished
from lightning_ssesam.experiments.jobs import make_runs
from lightning_ssesam.experiments.lifetimes import interruption
from lightning_ssesam.experiments.runs import Run, RunStore, run_stem
from lightning_ssesam.experiments.tables import format_table, write_runs
from lightning_ssesam.experiments.tasks import Task
from lightning_ssesam.experiments.unfinished import Unfinished
from lightning_ssesam.experiments.weights import KeepWeights, WeightStore, set_weights_aside


def make_missing(
    tasks: Sequence[Task],
    output: Path,
    keep_weights: bool = False,
    fresh: bool = False,
    jobs: int = 1,
    cluster: str | None = None,
) -> list[Run]:
    """Make the runs that are missing in an output folder. Return all runs, method by method.

    Args:
        tasks: Trainings of the comparison, at least one.
        output: Output folder, which this process has locked.
        keep_weights: Whether each run needs a checkpoint, too.
        fresh: Whether all runs are made anew.
        jobs: Number of trainings at a time.
        cluster: Dask cluster that makes the runs; None makes them on this machine.

    Raises:
        WorkersLostError: If processes or machines that train are lost again and again.
    """
    if (output / "unfinished").is_file():
        raise bad_argument("output", "a folder without a file of the name 'unfinished'", str(output))
    store, weights = RunStore(output / "runs"), WeightStore(output / "weights") if keep_weights else None
    remove_unfinished(store.folder)
    kept = _load(tasks, store, weights, fresh)
    missing = [task for task, run in zip(tasks, kept, strict=True) if run is None]
    if len(missing) < len(tasks):
        print(f"{len(tasks) - len(missing)} of {len(tasks)} runs are in {store.folder} already.")
    for task in missing:
        # Weights of an earlier run would be taken for those of the new one.
        set_weights_aside(output / "weights", *_key(task))
    if weights is not None:
        missing = [_with_weights(task, weights) for task in missing]
    by_name = {(task.experiment.method, task.seed): task for task in tasks}
    methods = list(dict.fromkeys(task.experiment.method for task in tasks))

    def place(run: Run) -> tuple[int, int]:
        return methods.index(run.method), run.seed

    runs = sorted(filter(None, kept), key=place)
    with (
        _told_if_interrupted(runs, len(tasks), store),
        _under_way(missing, output, fresh) as begun,
        closing(make_runs(begun, jobs, cluster)) as made,
    ):
        for run in made:
            task = by_name[run.method, run.seed]
            store.save(run, task.fingerprint)
            _folder_of(task, output).remove()
            insort(runs, run, key=place)
            write_runs(runs, output / "results.csv")
    if weights is not None:
        for run in runs:
            run.weights = str(weights.path(*_key(by_name[run.method, run.seed])))
    return runs


def _key(task: Task) -> tuple[str, int, str]:
    return task.experiment.method, task.seed, task.fingerprint


def _load(tasks: Sequence[Task], store: RunStore, weights: WeightStore | None, fresh: bool) -> list[Run | None]:
    """Return the runs that need not be made, and None for each of the others."""
    found: list[Run | None] = []
    for task in tasks:
        if fresh:
            store.set_aside(*_key(task))
        has_weights = weights is None or weights.path(*_key(task)).is_file()
        found.append(store.load(*_key(task)) if has_weights else None)
    return found


def _with_weights(task: Task, weights: WeightStore) -> Task:
    """Return a task that keeps the weights."""
    callbacks = [*task.experiment.callbacks, KeepWeights(weights.path(*_key(task)))]
    return task._replace(experiment=replace(task.experiment, callbacks=callbacks))


def _folder_of(task: Task, output: Path) -> Unfinished:
    """Return the folder of a training while it is under way."""
    return Unfinished((output / "unfinished" / run_stem(*_key(task))).absolute())


@contextmanager
def _under_way(tasks: Sequence[Task], output: Path, fresh: bool) -> Iterator[list[Task]]:
    """Yield tasks that keep checkpoints while they are under way. Those of a fresh comparison begin anew."""
    folder = output / "unfinished"
    make_folder(folder)
    try:
        if fresh:
            for task in tasks:
                _folder_of(task, output).remove()
        yield [task._replace(unfinished=_folder_of(task, output).folder) for task in tasks]
    finally:
        # Trainings of other settings may be there.
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def _told_if_interrupted(runs: Sequence[Run], number: int, store: RunStore) -> Iterator[None]:
    """Say at an interrupt how many of the runs are there."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, WorkersLostError) as error:
        print(f"\nInterrupted after {len(runs)} of {number} runs, which are in {store.folder}.")
        print("Run it again to make the others.")
        if runs:
            print(format_table(runs))
        if isinstance(error, WorkersLostError):
            raise
        raise interruption(error) from None
