"""Train several methods with several seeds on one data set, and put them side by side."""

import inspect
from bisect import insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.optim import Optimizer

from lightning_ssesam._validation import bad_argument, check_fraction, check_integer, check_radius
from lightning_ssesam.data import DigitsLT, LongTailDataModule
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.choices import describe, find_choices, notes
from lightning_ssesam.experiments.class_names import closest, did_you_mean
from lightning_ssesam.experiments.console import quiet
from lightning_ssesam.experiments.experiment import Experiment
from lightning_ssesam.experiments.jobs import Task, make_runs
from lightning_ssesam.experiments.lifetimes import interruption
from lightning_ssesam.experiments.recipe import Recipe, check_factories
from lightning_ssesam.experiments.report import write_report
from lightning_ssesam.experiments.runs import Comparison, Run, RunStore
from lightning_ssesam.experiments.tables import format_table, write_runs
from lightning_ssesam.models import BackboneFactory
from lightning_ssesam.objectives import ERM, SAM, SSESAM, ImbSAM, Objective

METHODS = ("ERM", "SAM", "ImbSAM", "SSESAM")

# These must be the same for all methods, because their accuracies are computed by them.
_GROUPINGS = ("tail_below", "tail_fraction", "many_above", "few_below")


@dataclass
class Method:
    """Options in which one method differs from the others. Those that are not given are the comparison's.

    Args:
        objective: Objective by class path, with its arguments.
        loss: Loss by class path, with its arguments.
        backbone: Network by class path, with its arguments.
        optimizer: Optimizer by class path, with its arguments.
        data: Data module by class path, with its arguments, for example another sampler. Class counts must be equal.
        callbacks: Further callbacks. An objective with stages gets StageSwitch(at=gamma) if none is among them.
        model: Further arguments of LongTailClassifier, such as step_options.
    """

    objective: Callable[[], Objective] = ERM
    loss: Callable[[], nn.Module] | None = None
    backbone: BackboneFactory | None = None
    optimizer: Callable[[Iterable[Any]], Optimizer] | None = None
    data: Callable[[], LongTailDataModule] | None = None
    callbacks: list[Callback] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_factories(vars(self))

    def experiment(self, name: str, recipe: Recipe, gamma: float) -> Experiment:
        """Return the experiment that trains this method with the options of a comparison."""
        shared, model = recipe.model or {}, self.model
        if all(isinstance(arguments.get("step_options"), Mapping) for arguments in (shared, model)):
            # A method may change some step options and keep the others of the comparison.
            model = {**model, "step_options": {**shared["step_options"], **model["step_options"]}}
        parts = {part: getattr(self, part) for part in ("loss", "backbone", "optimizer", "data")}
        given = {part: value for part, value in parts.items() if value is not None}
        options = {**vars(recipe), **given, "model": {**shared, **model}}
        return Experiment(name, self.objective, callbacks=self.callbacks, gamma=gamma, **options)


def compare(
    methods: str | list[str] | dict[str, Method] = list(METHODS),  # noqa: B006 (never changed; the help shows it)
    seeds: int = 5,
    sam_rho: float = 0.2,
    imbsam_rho: float = 0.2,
    head_rho: float = 0.05,
    tail_rho: float = 0.2,
    gamma: float = 0.7,
    searched: list[str] | None = None,
    jobs: int = 1,
    output: Path = Path("comparison"),
    config: str | None = None,
    **recipe: Any,
) -> list[Run]:
    """Train every method with every seed on one data set, print a table, and write a report.

    Methods with the same seed get the same initial weights, batch order and number of epochs. Accuracies are on the
    test set, after the last epoch; the curves are on the validation set. Every run is kept in the output folder as soon
    as it ends. The same command again makes only the runs that are missing or were made with other settings.

    Writes to the output folder: report.html (everything, in one file that opens offline), results.csv (a row for each
    run), summary.csv, table.md, comparison.png, trade_off.png and confusion.png.

    Args:
        methods: Any of ERM, SAM, ImbSAM, SSESAM, with commas between them. In a YAML file: your own names, and the
            options of each method. The others are compared with the first method.
        seeds: Number of seeds, counted from 0, for the initial weights and the batch order.
        sam_rho: Radius of SAM.
        imbsam_rho: Radius of ImbSAM, for the tail.
        head_rho: Radius of SSESAM for the head, in stage 1.
        tail_rho: Radius of SSESAM for the tail.
        gamma: Fraction of the training after which SSESAM's stage 2 begins.
        searched: Names of the radii and switches that were searched on validation data, for the report. ``name=value``
            counts only as long as the option has this value. The best.yaml of a search fills it in.
        jobs: Number of trainings at a time, each in its own process. They are spread over the GPUs.
        output: Folder for the results.
        config: Configuration that repeats the comparison, as YAML, for the report. The command line fills it in.
        **recipe: Fields of :class:`~lightning_ssesam.experiments.recipe.Recipe`, such as ``data`` and ``epochs``.

    Returns:
        The runs, method by method.

    Raises:
        ArgumentError: If an argument is out of range.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    for name, value in {"seeds": seeds, "jobs": jobs}.items():
        check_integer(name, value, minimum=1)
    check_fraction("gamma", gamma)
    shared = Recipe(**recipe)
    radii = {"sam_rho": sam_rho, "imbsam_rho": imbsam_rho, "head_rho": head_rho, "tail_rho": tail_rho}
    chosen = _methods(methods, {name: check_radius(name, radius) for name, radius in radii.items()})
    experiments = [method.experiment(name, shared, gamma) for name, method in chosen.items()]
    # Build every part once: a wrong one is refused before anything is trained or written.
    data = shared.make_data()
    with quiet():
        split = experiments[0].make_split(data)
        pairs = [(experiment, experiment.fingerprint(split)) for experiment in experiments]
        experiments[0].make_trainer([])
    options = {**radii, "gamma": gamma}
    choices = find_choices(experiments, options, _defaults(options), searched, not isinstance(methods, dict))
    # Download the data here, because several processes must not do so at once.
    modules = [method.data() if method.data else data for method in chosen.values()]
    for module in {id(module): module for module in (data, *modules)}.values():
        module.prepare_data()
        module.check_files()
    for experiment, module in zip(experiments, modules, strict=True):
        experiment.check_network(module)
    # In the order of seeds, so that an interrupted comparison has as many runs of each method.
    tasks = [Task(experiment, fingerprint, seed) for seed in range(seeds) for experiment, fingerprint in pairs]
    runs = _finish(tasks, RunStore(output / "runs"), jobs, output)
    is_switched = any(experiment.is_switched_at_gamma(experiment.objective()) for experiment in experiments)
    remarks = notes(choices, list(chosen), isinstance(data, DigitsLT))
    comparison = Comparison(
        runs, split, data, shared.epochs, gamma if is_switched else None, config, describe(choices), remarks
    )
    print("\n".join([format_table(runs), *remarks]))
    written = write_report(comparison, output)
    print(f"\nWritten: {', '.join(str(path) for path in written)}")
    return runs


def _defaults(names: Iterable[str]) -> dict[str, float]:
    return {name: inspect.signature(compare).parameters[name].default for name in names}


def _methods(methods: str | Sequence[str] | dict[str, Method], radii: dict[str, float]) -> dict[str, Method]:
    if isinstance(methods, dict) and methods:
        for name, method in methods.items():
            if wrong := sorted(method.model.keys() & _GROUPINGS):
                expected = f"methods on the same groups of classes (no {'/'.join(_GROUPINGS)})"
                raise bad_argument("methods", expected, got_text=f"{', '.join(wrong)} for {name!r}")
        return methods
    names = [name.strip() for name in methods.split(",")] if isinstance(methods, str) else list(methods)
    if not names or len(set(names)) < len(names) or not set(names) <= set(METHODS):
        guess = next((closest(name, METHODS) for name in map(str, names) if name not in METHODS), None)
        error = bad_argument("methods", f"some of {', '.join(METHODS)}, each once", methods)
        raise ArgumentError(f"{error}{did_you_mean(guess)}")
    makers: dict[str, Callable[[], Objective]] = {
        "ERM": ERM,
        "SAM": partial(SAM, rho=radii["sam_rho"]),
        "ImbSAM": partial(ImbSAM, rho=radii["imbsam_rho"]),
        "SSESAM": partial(SSESAM, head_rho=radii["head_rho"], tail_rho=radii["tail_rho"]),
    }
    return {name: Method(makers[name]) for name in names}


def _finish(tasks: list[Task], store: RunStore, jobs: int, output: Path) -> list[Run]:
    """Make the runs that are missing. Return all of them, method by method."""
    kept = [store.load(task.experiment.method, task.seed, task.fingerprint) for task in tasks]
    missing = [task for task, run in zip(tasks, kept, strict=True) if run is None]
    if len(missing) < len(tasks):
        print(f"{len(tasks) - len(missing)} of {len(tasks)} runs are in {store.folder} already.")
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
    return runs
