"""Train several methods with several seeds on one data set, and put them side by side."""

import csv
import logging
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm.auto import tqdm
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_fraction, check_integer, check_radius
from lightning_ssesam.callbacks import StageSwitch
from lightning_ssesam.data import DigitsLT, LongTailDataModule
from lightning_ssesam.metrics import HeadTailAccuracy
from lightning_ssesam.models import BackboneFactory, LongTailClassifier, SmallConvNet
from lightning_ssesam.objectives import ERM, SAM, SSESAM, ImbSAM, Objective

METHODS = ("ERM", "SAM", "ImbSAM", "SSESAM")
PICTURE = "comparison.png"
GROUPS = ("head", "tail", "many", "medium", "few", "all")


@dataclass
class Run:
    """One training and what it came to.

    Attributes:
        method: Name of the method.
        seed: Seed of the initial weights and the batch order.
        accuracy: Test accuracy in [0, 1] of each of :data:`GROUPS`.
        class_recalls: Test recall of each class in [0, 1], length C.
        head_curve: Validation accuracy of the head after every epoch.
        tail_curve: Validation accuracy of the tail after every epoch.
        diverged: Whether the last training loss was not finite.

    """

    method: str
    seed: int
    accuracy: dict[str, float] = field(default_factory=dict)
    class_recalls: list[float] = field(default_factory=list)
    head_curve: list[float] = field(default_factory=list)
    tail_curve: list[float] = field(default_factory=list)
    diverged: bool = False


def compare(
    methods: str | list[str] = list(METHODS),  # noqa: B006 (never changed; the command line shows it)
    seeds: int = 5,
    epochs: int = 60,
    data: Callable[[], LongTailDataModule] = DigitsLT,
    backbone: BackboneFactory = SmallConvNet,
    optimizer: Callable[[Iterable[Any]], Optimizer] = lambda params: SGD(
        params, lr=0.05, momentum=0.9, weight_decay=5e-4
    ),
    sam_rho: float = 0.2,
    imbsam_rho: float = 0.2,
    head_rho: float = 0.05,
    tail_rho: float = 0.2,
    gamma: float = 0.7,
    tail_fraction: float = 0.2,
    threads: int = 1,
    output: Path = Path("comparison"),
) -> list[Run]:
    """Train every method with every seed on one data set, then print a table and draw a picture.

    With one seed every method gets the same initial weights, batch order and number of epochs; the learning rate falls
    to 0 along a cosine. Writes to the output folder, replacing earlier files: results.csv (a row for each run,
    written as soon as it ends) and comparison.png. Accuracies are on the test set, after the last epoch; the curves
    are on the validation set.

    Args:
        methods: Any of ERM, SAM, ImbSAM, SSESAM, with commas between them.
        seeds: How many seeds, counted from 0, for the initial weights and the batch order.
        epochs: Length of each training.
        data: Data module by class path, with its arguments.
        backbone: Network by class path, with its arguments.
        optimizer: Optimizer by class path, with its arguments.
        sam_rho: Radius of SAM.
        imbsam_rho: Radius of ImbSAM, for the tail.
        head_rho: Radius of SSESAM for the head, in stage 1.
        tail_rho: Radius of SSESAM for the tail.
        gamma: Share of the training after which SSESAM's stage 2 begins.
        tail_fraction: Tail classes are the rarest ones that hold at most this fraction of the training samples.
        threads: CPU threads for an operation. More than one pays for large networks only.
        output: Folder for the results.

    Returns:
        The runs, method by method.

    Raises:
        ValueError: If an argument is out of range.
        ModuleNotFoundError: If matplotlib is not installed.

    """
    from lightning_ssesam.figures import draw_comparison

    check_integer("seeds", seeds, minimum=1)
    check_integer("epochs", epochs, minimum=1)
    check_integer("threads", threads, minimum=1)
    check_fraction("gamma", gamma)
    if isinstance(methods, str):
        methods = methods.split(",")
    objectives = _objectives(methods, sam_rho, imbsam_rho, head_rho, tail_rho)
    module = data()
    split = module.split(tail_fraction=tail_fraction)
    for make in objectives.values():
        make().bind(split)

    def make_model(method: str) -> LongTailClassifier:
        return LongTailClassifier(
            module.class_counts,
            backbone,
            objectives[method](),
            optimizer=optimizer,
            scheduler=lambda optimizer: CosineAnnealingLR(optimizer, epochs),
            tail_fraction=tail_fraction,
            many_above=split.many_above,
            few_below=split.few_below,
        )

    def train(run: Run) -> None:
        pl.seed_everything(run.seed, verbose=False)
        _train(run, make_model(run.method), module, epochs, gamma)

    # Whatever cannot be built is refused before the results of an earlier comparison are replaced.
    make_model(methods[0]).configure_optimizers()
    _prepare_folder(output)
    runs = [Run(method, seed) for seed in range(seeds) for method in methods]
    with _quiet(), _threads(threads):
        _train_all(runs, train, output / "results.csv", split.num_classes)
    runs.sort(key=lambda run: methods.index(run.method))
    print(format_table(runs))
    switch = gamma * epochs if "SSESAM" in methods else None
    title = f"{type(module).__name__}: mean over {_seeds(runs)}, with one standard deviation"
    picture = draw_comparison(runs, split, switch, title, output / PICTURE)
    print(f"\nWritten: {output / 'results.csv'}, {picture}")
    return runs


def format_table(runs: list[Run]) -> str:
    """Return the accuracies of each method in percent, mean and standard deviation over seeds, as text."""
    width = max(len(method) for method in METHODS)
    lines = [
        f"Test accuracy in %, mean and standard deviation over {_seeds(runs)}",
        " ".join([f"{'':{width}}", *(f"{group:>12}" for group in GROUPS)]),
    ]
    for method in dict.fromkeys(run.method for run in runs):
        cells = []
        for group in GROUPS:
            values = [100 * run.accuracy[group] for run in runs if run.method == method]
            spread = f" ± {statistics.stdev(values):4.1f}" if len(values) > 1 else ""
            cells.append(f"{f'{statistics.mean(values):.1f}{spread}':>12}")
        lines.append(" ".join([f"{method:{width}}", *cells]))
    if diverged := [f"{run.method} with seed {run.seed}" for run in runs if run.diverged]:
        lines.append(f"Diverged, with a loss that is not finite: {', '.join(diverged)}")
    return "\n".join(lines)


def _seeds(runs: list[Run]) -> str:
    number = len({run.seed for run in runs})
    return f"{number} seed{'s' if number > 1 else ''}"


def _objectives(
    methods: list[str], sam_rho: float, imbsam_rho: float, head_rho: float, tail_rho: float
) -> dict[str, Callable[[], Objective]]:
    if not methods or len(set(methods)) < len(methods) or not set(methods) <= set(METHODS):
        raise bad_argument("methods", f"some of {', '.join(METHODS)}, each once", methods)
    radii = {"sam_rho": sam_rho, "imbsam_rho": imbsam_rho, "head_rho": head_rho, "tail_rho": tail_rho}
    for name, radius in radii.items():
        check_radius(name, radius)
    makers: dict[str, Callable[[], Objective]] = {
        "ERM": ERM,
        "SAM": lambda: SAM(sam_rho),
        "ImbSAM": lambda: ImbSAM(rho=imbsam_rho),
        "SSESAM": lambda: SSESAM(head_rho=head_rho, tail_rho=tail_rho),
    }
    return {method: makers[method] for method in methods}


def _prepare_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / PICTURE).unlink(missing_ok=True)
    except OSError as error:
        raise bad_argument("output", f"a folder that can be made ({error.strerror})", str(output)) from error


def _train_all(runs: list[Run], train: Callable[[Run], None], path: Path, num_classes: int) -> None:
    """Train one run after the other; each is in the file as soon as it has ended."""
    finished: list[Run] = []
    with path.open("w", newline="") as file:
        results = csv.writer(file)
        results.writerow(["method", "seed", *GROUPS, *(f"class_{k}" for k in range(num_classes))])
        try:
            for run in (progress := tqdm(runs, unit="run")):
                progress.set_description(f"{run.method}, seed {run.seed}")
                train(run)
                values = [*(run.accuracy[group] for group in GROUPS), *run.class_recalls]
                results.writerow([run.method, run.seed, *(round(value, 6) for value in values)])
                file.flush()
                finished.append(run)
        except (KeyboardInterrupt, SystemExit):
            # Lightning turns the first into the second.
            print(f"\nInterrupted after {len(finished)} of {len(runs)} runs, which are in {path}.")
            if finished:
                print(format_table(finished))
            raise KeyboardInterrupt from None


class _Recorder(Callback):
    def __init__(self, run: Run) -> None:
        self.run = run

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after validation: note the curves."""
        self.run.head_curve.append(trainer.callback_metrics["val/acc_head"].item())
        self.run.tail_curve.append(trainer.callback_metrics["val/acc_tail"].item())

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after the last epoch: note whether the training came to anything."""
        self.run.diverged = not trainer.callback_metrics["train/loss"].isfinite().item()

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before the module resets its metrics: note the recalls."""
        assert isinstance(pl_module, LongTailClassifier)
        self.run.class_recalls = cast("HeadTailAccuracy", pl_module.test_metrics[0]).class_recalls().tolist()


def _train(run: Run, model: LongTailClassifier, data: LongTailDataModule, epochs: int, gamma: float) -> None:
    callbacks: list[Callback] = [_Recorder(run)]
    if model.objective.num_stages > 1:
        callbacks.append(StageSwitch(at=gamma))
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, datamodule=data)
    (tested,) = trainer.test(model, datamodule=data, verbose=False)
    run.accuracy = {group: tested[f"test/acc_{group}"] for group in GROUPS}


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what Lightning says of every single training."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated.*")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
