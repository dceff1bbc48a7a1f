"""Train several methods with several seeds on one data set, and put them side by side."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.optim import SGD, Optimizer
from tqdm.auto import tqdm

from lightning_ssesam._validation import bad_argument, check_fraction, check_integer, check_radius
from lightning_ssesam.data import DigitsLT, LongTailDataModule
from lightning_ssesam.models import BackboneFactory, SmallConvNet
from lightning_ssesam.objectives import ERM, SAM, SSESAM, ImbSAM, Objective
from lightning_ssesam.report import Comparison, write_report
from lightning_ssesam.runs import Experiment, Run, RunStore, quiet
from lightning_ssesam.tables import format_table, write_runs

METHODS = ("ERM", "SAM", "ImbSAM", "SSESAM")

DEFAULT_SGD = partial(SGD, lr=0.05, momentum=0.9, weight_decay=5e-4)

# What has to be the same for all methods, since their accuracies are by it.
_GROUPINGS = ("tail_below", "tail_fraction", "many_above", "few_below")

# The methods come one after the other for every seed, so that whatever ends early is a fair comparison.
_Task = tuple[Experiment, str, int]


@dataclass
class Method:
    """What sets one method of a comparison apart; what is not given is the comparison's own.

    Args:
        objective: Objective by class path, with its arguments.
        loss: Loss by class path, with its arguments.
        backbone: Network by class path, with its arguments.
        optimizer: Optimizer by class path, with its arguments.
        data: Data module by class path, with its arguments: another sampler, say. Class counts must be the same.
        callbacks: Further callbacks. An objective with stages gets StageSwitch(at=gamma) if none is among them.
        model: Further arguments of LongTailClassifier, such as interval.

    """

    objective: Callable[[], Objective] = ERM
    loss: Callable[[], nn.Module] | None = None
    backbone: BackboneFactory | None = None
    optimizer: Callable[[Iterable[Any]], Optimizer] | None = None
    data: Callable[[], LongTailDataModule] | None = None
    callbacks: list[Callback] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)


def compare(
    methods: str | list[str] | dict[str, Method] = list(METHODS),  # noqa: B006 (never changed; the help shows it)
    seeds: int = 5,
    epochs: int = 60,
    data: Callable[[], LongTailDataModule] = DigitsLT,
    backbone: BackboneFactory = SmallConvNet,
    optimizer: Callable[[Iterable[Any]], Optimizer] = DEFAULT_SGD,
    loss: Callable[[], nn.Module] | None = None,
    sam_rho: float = 0.2,
    imbsam_rho: float = 0.2,
    head_rho: float = 0.05,
    tail_rho: float = 0.2,
    gamma: float = 0.7,
    tail_fraction: float | None = None,
    tail_below: int | None = None,
    model: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    threads: int = 1,
    jobs: int = 1,
    output: Path = Path("comparison"),
    config: str | None = None,
) -> list[Run]:
    """Train every method with every seed on one data set; print a table, write a report.

    With one seed every method gets the same initial weights, batch order and number of epochs; the learning rate falls
    to 0 along a cosine. Accuracies are on the test set, after the last epoch; the curves are on the validation set.
    Every run is kept in the output folder as soon as it ends: the same command again, after an interruption say, makes
    only those that are not there, or were made with other settings.

    Writes to the output folder: report.html (everything, in one file that opens offline), results.csv (a row for each
    run), summary.csv, table.md, comparison.png, trade_off.png and confusion.png.

    Args:
        methods: Any of ERM, SAM, ImbSAM, SSESAM, with commas between them; or, in a YAML file, names of your own and
            what sets each method apart. The others are compared with the first.
        seeds: How many seeds, counted from 0, for the initial weights and the batch order.
        epochs: Length of each training.
        data: Data module by class path, with its arguments.
        backbone: Network by class path, with its arguments.
        optimizer: Optimizer by class path, with its arguments.
        loss: Loss by class path, with its arguments; cross-entropy by default.
        sam_rho: Radius of SAM.
        imbsam_rho: Radius of ImbSAM, for the tail.
        head_rho: Radius of SSESAM for the head, in stage 1.
        tail_rho: Radius of SSESAM for the tail.
        gamma: Share of the training after which SSESAM's stage 2 begins.
        tail_fraction: Tail classes are the rarest ones that hold at most this fraction of the training samples; 0.2
            if tail_below is not given either.
        tail_below: Tail classes have fewer training samples than this.
        model: Further arguments of LongTailClassifier, such as tta or passes.
        trainer: Further arguments of the Trainer, such as precision or accelerator.
        threads: CPU threads for an operation. More than one pays for large networks only.
        jobs: Trainings at a time, each in a process of its own; with several GPUs, each on the next one.
        output: Folder for the results.
        config: What the report shows as the configuration that repeats it; the command line fills it in.

    Returns:
        The runs, method by method.

    Raises:
        ValueError: If an argument is out of range.
        ModuleNotFoundError: If matplotlib is not installed.

    """
    for name, value in {"seeds": seeds, "epochs": epochs, "threads": threads, "jobs": jobs}.items():
        check_integer(name, value, minimum=1)
    check_fraction("gamma", gamma)
    radii = {"sam_rho": sam_rho, "imbsam_rho": imbsam_rho, "head_rho": head_rho, "tail_rho": tail_rho}
    of_method = _methods(methods, {name: check_radius(name, radius) for name, radius in radii.items()})
    tail = {"tail_fraction": tail_fraction, "tail_below": tail_below}
    experiments = [
        Experiment(
            name,
            method.data or data,
            method.backbone or backbone,
            method.objective,
            method.optimizer or optimizer,
            epochs,
            loss=method.loss or loss,
            callbacks=method.callbacks,
            gamma=gamma,
            model={**tail, **(model or {}), **method.model},
            trainer=trainer or {},
            threads=threads,
        )
        for name, method in of_method.items()
    ]
    # Whatever cannot be built is refused before anything is trained or written.
    module = data()
    with quiet():
        split = experiments[0].make_split(module)
        fingerprints = {experiment.method: experiment.fingerprint(split) for experiment in experiments}
        experiments[0].make_trainer([])
    # Here, not in several processes at once.
    for of_data in (module, *(method.data() for method in of_method.values() if method.data)):
        of_data.prepare_data()
    store = RunStore(output / "runs")
    tasks = [(experiment, fingerprints[experiment.method], seed) for seed in range(seeds) for experiment in experiments]
    runs = _finish(tasks, store, jobs, output)
    switch = gamma if any(of.is_switched_at_gamma(of.objective()) for of in experiments) else None
    comparison = Comparison(runs, split, module, epochs, switch, config)
    print(format_table(runs))
    written = write_report(comparison, output)
    print(f"\nWritten: {', '.join(str(path) for path in written)}")
    return runs


def _methods(methods: str | Sequence[str] | dict[str, Method], radii: dict[str, float]) -> dict[str, Method]:
    if isinstance(methods, dict) and methods:
        for name, method in methods.items():
            if wrong := sorted(method.model.keys() & _GROUPINGS):
                got = f"{', '.join(wrong)} for {name!r}"
                expected = f"methods on the same groups of classes (no {'/'.join(_GROUPINGS)})"
                raise bad_argument("methods", expected, got_text=got)
        return methods
    names = [name.strip() for name in methods.split(",")] if isinstance(methods, str) else list(methods)
    if not names or len(set(names)) < len(names) or not set(names) <= set(METHODS):
        raise bad_argument("methods", f"some of {', '.join(METHODS)}, each once", methods)
    makers: dict[str, Callable[[], Objective]] = {
        "ERM": ERM,
        "SAM": partial(SAM, radii["sam_rho"]),
        "ImbSAM": partial(ImbSAM, rho=radii["imbsam_rho"]),
        "SSESAM": partial(SSESAM, head_rho=radii["head_rho"], tail_rho=radii["tail_rho"]),
    }
    return {name: Method(makers[name]) for name in names}


def _finish(tasks: list[_Task], store: RunStore, jobs: int, output: Path) -> list[Run]:
    """Make the runs that are missing. Return all of them, method by method."""
    done = {(e.method, seed): store.load(e.method, seed, fingerprint) for e, fingerprint, seed in tasks}
    missing = [task for task in tasks if done[task[0].method, task[2]] is None]
    if len(missing) < len(tasks):
        print(f"{len(tasks) - len(missing)} of {len(tasks)} runs are in {store.folder} already.")
    order = list(dict.fromkeys(experiment.method for experiment, _, _ in tasks))

    def finished() -> list[Run]:
        runs = [run for run in done.values() if run is not None]
        return sorted(runs, key=lambda run: order.index(run.method))

    make = _one_by_one if jobs == 1 or len(missing) < 2 else partial(_in_processes, jobs=min(jobs, len(missing)))
    fingerprints = {experiment.method: fingerprint for experiment, fingerprint, _ in tasks}
    try:
        for run in make(missing):
            store.save(run, fingerprints[run.method])
            done[run.method, run.seed] = run
            write_runs(finished(), output / "results.csv")
    except (KeyboardInterrupt, SystemExit, BrokenProcessPool) as error:
        # Lightning turns the first into the second.
        print(f"\nInterrupted after {len(finished())} of {len(tasks)} runs, which are in {store.folder}.")
        print("Run it again to make the others.")
        if finished():
            print(format_table(finished()))
        if isinstance(error, BrokenProcessPool):
            raise
        raise KeyboardInterrupt from None
    return finished()


def _one_by_one(tasks: list[_Task]) -> Iterator[Run]:
    for experiment, _, seed in (progress := tqdm(tasks, unit="run")):
        progress.set_description(f"{experiment.method}, seed {seed}")
        yield experiment.run(seed)


def _in_processes(tasks: list[_Task], jobs: int) -> Iterator[Run]:
    # Not forked: a process that has used several threads, or a GPU, cannot be.
    context = multiprocessing.get_context("spawn")
    gpus = torch.cuda.device_count()
    free = context.Queue()
    for number in range(jobs):
        free.put(number % gpus if gpus else None)
    executor = ProcessPoolExecutor(jobs, context, initializer=_start_worker, initargs=(free,))
    try:
        waiting = {executor.submit(_run, experiment, seed) for experiment, _, seed in tasks}
        with tqdm(total=len(tasks), unit="run") as progress:
            while waiting:
                ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                # What has ended well is kept, if another one fails at the same time.
                for future in sorted(ended, key=lambda future: future.exception() is not None):
                    run = future.result()
                    progress.update()
                    progress.set_description(f"{run.method}, seed {run.seed}")
                    yield run
    except BaseException:
        _kill(executor)
        raise
    finally:
        executor.shutdown(cancel_futures=True)


_device: int | None = None


def _start_worker(free: Any) -> None:
    global _device
    _device = free.get()
    # Ctrl-C reaches every process of a terminal; the first one deals with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run(experiment: Experiment, seed: int) -> Run:
    return experiment.run(seed, _device)


def _kill(executor: ProcessPoolExecutor) -> None:
    for process in list((executor._processes or {}).values()):
        process.kill()


def usable_jobs() -> int:
    """Return how many trainings fit this machine at a time: one for each GPU, or for each CPU core, up to eight."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)
