"""Train several methods with several seeds on one data set, and put them side by side."""

import inspect
from bisect import insort
from collections.abc import Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from lightning_ssesam._validation import check_choice, check_flag, check_fraction, check_integer, check_radius
from lightning_ssesam.data import DigitsLT, LongTailDataModule
from lightning_ssesam.experiments.choices import describe, find_choices, note_on_remedies, notes
from lightning_ssesam.experiments.console import quiet
from lightning_ssesam.experiments.experiment import Experiment
from lightning_ssesam.experiments.files import locked, make_folder, remove_unfinished
from lightning_ssesam.experiments.jobs import Task, make_runs
from lightning_ssesam.experiments.lifetimes import interruption
from lightning_ssesam.experiments.methods import DEFAULT_METHODS, Method, make_methods
from lightning_ssesam.experiments.origin import origin, tail_rule
from lightning_ssesam.experiments.recipe import MOST, Recipe
from lightning_ssesam.experiments.recorder import expected_images
from lightning_ssesam.experiments.remarks import about_images
from lightning_ssesam.experiments.report import FigureFormat, write_report
from lightning_ssesam.experiments.runs import Comparison, Run, RunStore
from lightning_ssesam.experiments.samples import Source, make_sources
from lightning_ssesam.experiments.tables import format_table, write_runs
from lightning_ssesam.experiments.weights import KeepWeights, WeightStore, set_weights_aside
from lightning_ssesam.split import ClassSplit


def compare(
    methods: str | list[str] | dict[str, Method] = list(DEFAULT_METHODS),  # noqa: B006 (never changed; the help shows it)
    seeds: int = 5,
    sam_rho: float = 0.2,
    imbsam_rho: float = 0.2,
    head_rho: float = 0.05,
    tail_rho: float = 0.2,
    gamma: float = 0.7,
    searched: list[str] | None = None,
    jobs: int = 1,
    output: Path = Path("comparison"),
    keep_weights: bool = False,
    fresh: bool = False,
    figure_format: FigureFormat = "png",
    config: str | None = None,
    **recipe: Any,
) -> list[Run]:
    """Train every method with every seed on one data set, print a table, and write a report.

    Methods with the same seed get the same initial weights, batch order and number of epochs. Accuracies are
    means over classes (balanced accuracy, macro recall) on the test set, after the last epoch; the curves are on the
    validation set. Every run is kept in the output folder as soon
    as it ends. The same command again makes only the runs that are missing or were made with other settings, other code
    of your own, or other data. Runs of other settings stay in the folder.

    Writes to the output folder: report.html (everything, in one file that opens offline), results.csv, summary.csv,
    classes.csv, confusions.csv, table.md, table.tex and the pictures.

    Args:
        methods: Any of ERM, SAM, ImbSAM, SSESAM, ASAM, FriendlySAM, GSAM, WSAM, PGN, LESAM, FocalSAM, CCSAM,
            MomentumSAM, RandomSAM, with commas between them. In a YAML file: your own names and their options. The
            others are compared with the first method.
        seeds: Number of seeds, at most 10,000, counted from 0, for the initial weights and the batch order.
        sam_rho: Radius of SAM.
        imbsam_rho: Radius of ImbSAM, for the tail.
        head_rho: Radius of SSESAM for the head, in stage 1.
        tail_rho: Radius of SSESAM for the tail.
        gamma: Fraction of the training after which SSESAM's stage 2 begins.
        searched: Radii and switches that were searched, by name or as ``name=value``. A search's best.yaml has them.
        jobs: Number of trainings at a time, each in its own process. They are spread over the GPUs.
        output: Folder for the results. Only one command at a time may use it.
        keep_weights: Checkpoints of the runs, in the folder weights. The best one on the validation images is also
            best/weights.ckpt.
        fresh: New runs in place of those that are there already, which are moved to the folder earlier.
        figure_format: Format of the pictures' files.
        config: Configuration that repeats the comparison, as YAML, for the report. The command line fills it in.
        **recipe: Fields of :class:`~lightning_ssesam.experiments.recipe.Recipe`, such as ``data`` and ``epochs``.

    Returns:
        The runs, method by method.

    Raises:
        ArgumentError: If an argument is out of range.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    for name, value in {"seeds": seeds, "jobs": jobs}.items():
        check_integer(name, value, minimum=1, maximum=MOST)
    for name, flag in {"keep_weights": keep_weights, "fresh": fresh}.items():
        check_flag(name, flag)
    check_choice("figure_format", figure_format, get_args(FigureFormat))
    check_fraction("gamma", gamma)
    shared = Recipe(**recipe)
    radii = {"sam_rho": sam_rho, "imbsam_rho": imbsam_rho, "head_rho": head_rho, "tail_rho": tail_rho}
    chosen = make_methods(methods, {name: check_radius(name, radius) for name, radius in radii.items()})
    experiments = [method.experiment(name, shared, gamma) for name, method in chosen.items()]
    first, *sources = make_sources([shared.data, *(experiment.data for experiment in experiments)])
    data = first.data
    split = _check(experiments, sources, data)
    options = {**radii, "gamma": gamma}
    choices = find_choices(experiments, options, _defaults(options), searched, not isinstance(methods, dict))
    tasks = _plan(experiments, sources, split, seeds)
    _say_what_is_tested(first.prepared, split)
    own_data = {e.method: source.data for e, source in zip(experiments, sources, strict=True) if source is not first}
    # They hold samples in memory.
    del first, sources
    make_folder(output)
    with locked(output):
        facts = origin()
        runs = _finish(tasks, jobs, output, keep_weights, fresh)
        comparison = Comparison(
            runs,
            split,
            data,
            shared.epochs,
            gamma if any(each.is_switched_at_gamma(each.objective()) for each in experiments) else None,
            config,
            origin=facts,
            tail_rule=tail_rule(shared.model_arguments),
            own_data=own_data,
            values=describe(choices),
            notes=[*notes(choices, list(chosen), isinstance(data, DigitsLT)), *note_on_remedies(experiments, data)],
        )
        print("\n".join([format_table(runs), *comparison.notes]))
        print(f"\nWritten: {', '.join(map(str, write_report(comparison, output, figure_format)))}")
    return runs


def _say_what_is_tested(data: LongTailDataModule, split: ClassSplit) -> None:
    """Print what is known of the results before the training: classes with few or no images."""
    for remark in about_images([expected_images(data, split)]):
        print(remark)


def _defaults(names: Iterable[str]) -> dict[str, float]:
    return {name: inspect.signature(compare).parameters[name].default for name in names}


def _check(experiments: Sequence[Experiment], sources: Sequence[Source], data: LongTailDataModule) -> ClassSplit:
    """Build every part once: a wrong one is refused before anything is trained or written. Return the class split."""
    with quiet():
        split = experiments[0].make_split(data)
        for experiment, source in zip(experiments, sources, strict=True):
            experiment.check(split, source.data)
        experiments[0].make_trainer([])
    return split


def _plan(experiments: Sequence[Experiment], sources: Sequence[Source], split: ClassSplit, seeds: int) -> list[Task]:
    """Download the data, because several processes must not do so at once. Check files and networks.

    Return a task for every run, seed by seed, so that an interrupted comparison has as many runs of each method.
    """
    pairs = []
    for experiment, source in zip(experiments, sources, strict=True):
        pairs.append((experiment, experiment.fingerprint(split, source.contents, source.data)))
        experiment.check_network(source.prepared)
    return [Task(experiment, fingerprint, seed) for seed in range(seeds) for experiment, fingerprint in pairs]


def _load(tasks: Sequence[Task], store: RunStore, weights: WeightStore | None, fresh: bool) -> list[Run | None]:
    """Return the runs that need not be made, and None for each of the others."""
    found: list[Run | None] = []
    for task in tasks:
        key = (task.experiment.method, task.seed, task.fingerprint)
        if fresh:
            store.set_aside(*key)
        has_weights = weights is None or weights.path(*key).is_file()
        found.append(store.load(*key) if has_weights else None)
    return found


def _with_weights(task: Task, weights: WeightStore) -> Task:
    """Return a task that keeps the weights."""
    path = weights.path(task.experiment.method, task.seed, task.fingerprint)
    callbacks = [*task.experiment.callbacks, KeepWeights(path)]
    return task._replace(experiment=replace(task.experiment, callbacks=callbacks))


def _finish(tasks: list[Task], jobs: int, output: Path, keep_weights: bool, fresh: bool) -> list[Run]:
    """Make the runs that are missing. Return all of them, method by method."""
    store, weights = RunStore(output / "runs"), WeightStore(output / "weights") if keep_weights else None
    remove_unfinished(store.folder)
    kept = _load(tasks, store, weights, fresh)
    missing = [task for task, run in zip(tasks, kept, strict=True) if run is None]
    if len(missing) < len(tasks):
        print(f"{len(tasks) - len(missing)} of {len(tasks)} runs are in {store.folder} already.")
    for task in missing:
        # Weights of an earlier run would be taken for those of the new one.
        set_weights_aside(output / "weights", task.experiment.method, task.seed, task.fingerprint)
    if weights is not None:
        missing = [_with_weights(task, weights) for task in missing]
    fingerprints = {task.experiment.method: task.fingerprint for task in tasks}
    methods = list(fingerprints)

    def place(run: Run) -> tuple[int, int]:
        return methods.index(run.method), run.seed

    runs = sorted(filter(None, kept), key=place)
    try:
        with closing(make_runs(missing, jobs)) as made:
            for run in made:
                store.save(run, fingerprints[run.method])
                insort(runs, run, key=place)
                write_runs(runs, output / "results.csv")
    except (KeyboardInterrupt, SystemExit, BrokenProcessPool) as error:
        print(f"\nInterrupted after {len(runs)} of {len(tasks)} runs, which are in {store.folder}.")
        print("Run it again to make the others.")
        if runs:
            print(format_table(runs))
        if isinstance(error, BrokenProcessPool):
            raise
        raise interruption(error) from None
    if weights is not None:
        for run in runs:
            run.weights = str(weights.path(run.method, run.seed, fingerprints[run.method]))
    return runs
