"""Train several methods with several seeds on one data set, and put them side by side."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

from lightning_ssesam._validation import check_choice, check_flag, check_fraction, check_integer, check_radius
from lightning_ssesam.data import DigitsLT, LongTailDataModule
from lightning_ssesam.experiments.choices import describe, find_choices, note_on_remedies, notes
from lightning_ssesam.experiments.console import quiet
from lightning_ssesam.experiments.experiment import Experiment
from lightning_ssesam.experiments.files import locked, make_folder
from lightning_ssesam.experiments.loggers import LoggerName
from lightning_ssesam.experiments.logs import Logs, plan_logs, prepare_logs
from lightning_ssesam.experiments.methods import DEFAULT_METHODS, Method, make_methods
from lightning_ssesam.experiments.origin import origin, tail_rule
from lightning_ssesam.experiments.recipe import MOST, Recipe
from lightning_ssesam.experiments.recorder import expected_images
from lightning_ssesam.experiments.remarks import about_images
from lightning_ssesam.experiments.report import FigureFormat, write_report
from lightning_ssesam.experiments.results import make_missing
from lightning_ssesam.experiments.runs import Comparison, Run
from lightning_ssesam.experiments.samples import Source, make_sources
from lightning_ssesam.experiments.tables import format_table
from lightning_ssesam.experiments.tasks import Task
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
    cluster: str | None = None,
    logger: LoggerName | None = None,
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
    validation set. Every run is kept in the output folder as soon as it ends, and goes on there if it was cut off. The
    same command again makes only the runs that are missing or were made with other settings, code of your own, or data.

    Writes to the output folder: report.html (everything, in one file that opens offline), results.csv, summary.csv,
    classes.csv, confusions.csv, table.md, table.tex and the pictures.

    Args:
        methods: Any of ERM, SAM, ImbSAM, SSESAM, ASAM, FriendlySAM, GSAM, WSAM, PGN, LESAM, FocalSAM, CCSAM,
            MomentumSAM, RandomSAM, with commas between them. In a YAML file: your own names and their options. The
            others are compared with the first method.
        seeds: Number of seeds, counted from 0, for the initial weights and the batch order.
        sam_rho: Radius of SAM.
        imbsam_rho: Tail radius of ImbSAM.
        head_rho: Head radius of SSESAM, in stage 1.
        tail_rho: Tail radius of SSESAM.
        gamma: Fraction of the training after which SSESAM's stage 2 begins.
        searched: Radii and switches that were searched, by name or as ``name=value``.
        jobs: Number of trainings at a time, each in its own process, spread over the GPUs.
        cluster: Dask cluster to train on: ``local``, an address, or a file.
        logger: Logger of the trainings, by method and seed.
        output: Folder for the results, for one command at a time.
        keep_weights: Checkpoints of the runs, in the folder weights; the best on validation also as best/weights.ckpt.
        fresh: New runs in place of those that are there, which are moved to the folder earlier.
        figure_format: Format of the pictures' files.
        config: Configuration that repeats the comparison, as YAML, for the report. The command line fills it in.
        **recipe: Fields of :class:`~lightning_ssesam.experiments.recipe.Recipe`, such as ``data`` and ``epochs``.

    Returns:
        The runs, method by method.

    Raises:
        ArgumentError: If an argument is out of range.
        ModuleNotFoundError: If matplotlib is not installed, or Dask for a cluster.
        WorkersLostError: If processes or machines that train are lost again and again.
    """
    _check_values({"seeds": seeds, "jobs": jobs}, {"keep_weights": keep_weights, "fresh": fresh}, gamma, figure_format)
    if cluster is not None:
        # Nobody else needs its package.
        import_module("lightning_ssesam.experiments.cluster").check_cluster(cluster)
    shared = Recipe(**recipe)
    logs = plan_logs(logger, shared.trainer, output)
    radii = {"sam_rho": sam_rho, "imbsam_rho": imbsam_rho, "head_rho": head_rho, "tail_rho": tail_rho}
    chosen = make_methods(methods, {name: check_radius(name, radius) for name, radius in radii.items()})
    experiments = [method.experiment(name, shared, gamma) for name, method in chosen.items()]
    first, *sources = make_sources([shared.data, *(experiment.data for experiment in experiments)])
    data = first.data
    split = _check(experiments, sources, data)
    options = {**radii, "gamma": gamma}
    choices = find_choices(experiments, options, _defaults(options), searched, not isinstance(methods, dict))
    tasks = _plan(experiments, sources, split, seeds, logs)
    _say_what_is_tested(first.prepared, split)
    own_data = {e.method: source.data for e, source in zip(experiments, sources, strict=True) if source is not first}
    # They hold samples in memory.
    del first, sources
    make_folder(output)
    with locked(output):
        facts = origin()
        prepare_logs(logs)
        runs = make_missing(tasks, output, keep_weights, fresh, jobs, cluster)
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


def _check_values(
    numbers: Mapping[str, int], flags: Mapping[str, bool], gamma: float, figure_format: FigureFormat
) -> None:
    for name, value in numbers.items():
        check_integer(name, value, minimum=1, maximum=MOST)
    for name, flag in flags.items():
        check_flag(name, flag)
    check_choice("figure_format", figure_format, get_args(FigureFormat))
    check_fraction("gamma", gamma)


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


def _plan(
    experiments: Sequence[Experiment], sources: Sequence[Source], split: ClassSplit, seeds: int, logs: Logs | None
) -> list[Task]:
    """Download the data, because several processes must not do so at once. Check files and networks.

    Return a task for every run, seed by seed, so that an interrupted comparison has as many runs of each method.
    """
    pairs = []
    for experiment, source in zip(experiments, sources, strict=True):
        pairs.append((experiment, experiment.fingerprint(split, source.contents, source.data)))
        experiment.check_network(source.prepared)
    return [
        Task(experiment, fingerprint, seed, logs=logs) for seed in range(seeds) for experiment, fingerprint in pairs
    ]
