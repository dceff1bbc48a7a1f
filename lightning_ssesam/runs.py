"""One training of a comparison: what it needs, what comes of it, and where that is kept."""

import copy
import hashlib
import inspect
import json
import logging
import math
import os
import platform
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from typing_extensions import override

import lightning_ssesam
from lightning_ssesam._validation import bad_argument
from lightning_ssesam.callbacks import StageSwitch
from lightning_ssesam.data import LongTailDataModule
from lightning_ssesam.metrics import HeadTailAccuracy
from lightning_ssesam.models import BackboneFactory, LongTailClassifier
from lightning_ssesam.objectives import Objective
from lightning_ssesam.split import ClassSplit

GROUPS = ("head", "tail", "many", "medium", "few", "all")
CONFUSIONS = ("head_to_head", "head_to_tail", "tail_to_head", "tail_to_tail")


@dataclass
class Run:
    """One training and what it came to.

    Attributes:
        method: Name of the method.
        seed: Seed of the initial weights and the batch order.
        accuracy: Test accuracy in [0, 1] of each of :data:`GROUPS`, after the last epoch.
        best: Validation accuracy of each group after the epoch that was best for ``"all"``.
        class_recalls: Test recall of each class in [0, 1], length C; NaN for a class that the test set lacks.
        confusion: Each of :data:`CONFUSIONS`, in [0, 1] (:class:`~lightning_ssesam.HeadTailConfusion`).
        curves: For each group its validation accuracy after every epoch.
        seconds: How long it took.
        diverged: Whether the last training loss was not finite.
        device: What it was trained on.

    """

    method: str
    seed: int
    accuracy: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    class_recalls: list[float] = field(default_factory=list)
    confusion: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    diverged: bool = False
    device: str = ""


@dataclass(frozen=True)
class Experiment:
    """How one method is trained; can be sent to another process if its parts can.

    Attributes:
        method: Its name.
        data: Makes the data module.
        backbone: Makes the network.
        objective: Makes the objective, without a split.
        optimizer: Makes the optimizer from the parameters.
        epochs: Length of the training; the learning rate falls to 0 along a cosine.
        loss: Makes the loss; cross-entropy by default.
        callbacks: Are copied for every run.
        gamma: Share of the training after which an objective with stages is switched.
        model: Further arguments of :class:`~lightning_ssesam.LongTailClassifier`.
        trainer: Further arguments of the ``Trainer``.
        threads: CPU threads for an operation.

    """

    method: str
    data: Callable[[], LongTailDataModule]
    backbone: BackboneFactory
    objective: Callable[[], Objective]
    optimizer: Callable[[Iterable[Any]], Optimizer]
    epochs: int
    loss: Callable[[], nn.Module] | None = None
    callbacks: Sequence[Callback] = ()
    gamma: float = 0.7
    model: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    threads: int = 1

    def __post_init__(self) -> None:
        own = {"class_counts", "backbone", "objective", "loss", "optimizer", "scheduler"}
        _check_names("model", self.model, LongTailClassifier, own)
        _check_names("trainer", self.trainer, pl.Trainer, {"max_epochs", "callbacks"})
        if (devices := self.trainer.get("devices", 1)) not in (1, "1") and not _is_one(devices):
            raise bad_argument(
                "trainer", "settings with a single device (`jobs` makes several runs at a time)", devices
            )

    def make_model(self, data: LongTailDataModule) -> LongTailClassifier:
        """Return a module to train on ``data``."""
        thresholds = {"many_above": data.many_above, "few_below": data.few_below}
        return LongTailClassifier(
            data.class_counts,
            self.backbone,
            self.objective(),
            loss=None if self.loss is None else self.loss(),
            optimizer=self.optimizer,
            scheduler=self._make_scheduler,
            **{**thresholds, **self.model},
        )

    def make_split(self, data: LongTailDataModule) -> ClassSplit:
        """Return the class split that its modules make of ``data``; leaves the random numbers as they are."""
        with torch.random.fork_rng(devices=[]):
            return self.make_model(data).split

    def _make_scheduler(self, optimizer: Optimizer) -> CosineAnnealingLR:
        return CosineAnnealingLR(optimizer, self.epochs)

    def make_callbacks(self, model: LongTailClassifier) -> list[Callback]:
        """Return the callbacks of one run; a :class:`StageSwitch` among them where the objective has stages."""
        callbacks = [copy.deepcopy(callback) for callback in self.callbacks]
        if self.is_switched_at_gamma(model.objective):
            callbacks.append(StageSwitch(at=self.gamma))
        return callbacks

    def is_switched_at_gamma(self, objective: Objective) -> bool:
        """Return whether ``gamma`` says when stage 2 begins, and no :class:`StageSwitch` among the callbacks."""
        return objective.num_stages > 1 and not any(isinstance(callback, StageSwitch) for callback in self.callbacks)

    def make_trainer(self, callbacks: list[Callback], device: int | None = None) -> pl.Trainer:
        """Return a Trainer that says and writes nothing; on one device, the GPU of a number if that is given."""
        silent: dict[str, Any] = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "devices": 1 if device is None or self.trainer.get("accelerator") == "cpu" else [device],
        }
        return pl.Trainer(max_epochs=self.epochs, callbacks=callbacks, **{**silent, **self.trainer})

    def fingerprint(self, split: ClassSplit) -> str:
        """Return a text that is the same for trainings that are the same, but for their seed.

        Raises:
            ValueError: If a part cannot be built.

        """
        data = self.data()
        with torch.random.fork_rng(devices=[]):
            model = self.make_model(data)
        if list(data.class_counts) != split.class_counts.tolist():
            expected = "methods on data with the same training samples per class"
            raise bad_argument("methods", expected, got_text=f"other class counts for {self.method!r}")
        parts = {
            "version": lightning_ssesam.__version__,
            "data": {"class": type(data).__qualname__, **_settings(vars(data))},
            "counts": split.class_counts.tolist(),
            "tail": model.split.tail.tolist(),
            "model": _without_addresses(repr(model)),
            "loss": _settings({**vars(model.loss), **dict(model.loss.named_buffers())}),
            "objective": repr(model.objective),
            "optimizer": _without_addresses(repr(self.optimizer(model.parameters()))),
            "made_by": [_without_addresses(repr(factory)) for factory in (self.data, self.backbone, self.loss)],
            "callbacks": [
                (type(callback).__qualname__, _settings(vars(callback), private=True)) for callback in self.callbacks
            ],
            "settings": [self.epochs, self.gamma, _settings(self.model), _settings(self.trainer)],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def fit(
        self, seed: int, callbacks: Sequence[Callback] = (), device: int | None = None
    ) -> tuple[pl.Trainer, LongTailClassifier, LongTailDataModule]:
        """Train once, with further callbacks. Return what took part."""
        pl.seed_everything(seed, verbose=False)
        data = self.data()
        model = self.make_model(data)
        trainer = self.make_trainer([*callbacks, *self.make_callbacks(model)], device)
        trainer.fit(model, datamodule=data)
        return trainer, model, data

    def run(self, seed: int, device: int | None = None) -> Run:
        """Train and test once."""
        run, start = Run(self.method, seed), time.perf_counter()
        with quiet(), limited_threads(self.threads):
            trainer, model, data = self.fit(seed, [_Recorder(run)], device)
            (tested,) = trainer.test(model, datamodule=data, verbose=False)
        run.accuracy = {group: tested[f"test/acc_{group}"] for group in GROUPS}
        run.confusion = {name: tested[f"test/{name}"] for name in CONFUSIONS}
        # A training that was stopped early has nothing to show for the epochs that it was spared.
        for curve in run.curves.values():
            curve += [math.nan] * (self.epochs - len(curve))
        epoch = max(range(self.epochs), key=lambda epoch: _or_nothing(run.curves["all"][epoch]))
        run.best = {group: curve[epoch] for group, curve in run.curves.items()}
        run.device = _name_of(trainer.strategy.root_device)
        run.seconds = time.perf_counter() - start
        return run


class RunStore:
    """A folder with a JSON file for every run that has ended.

    Args:
        folder: Is made if need be.

    Raises:
        ValueError: If it cannot be made.

    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_folder(folder)

    def load(self, method: str, seed: int, fingerprint: str) -> Run | None:
        """Return the run if it is there, whole, and was made with the same settings."""
        try:
            saved = json.loads(self._path(method, seed).read_text())
            return Run(**saved["run"]) if saved["fingerprint"] == fingerprint else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, run: Run, fingerprint: str) -> None:
        """Write a run, all of it or nothing."""
        path = self._path(run.method, run.seed)
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps({"fingerprint": fingerprint, "run": asdict(run)}))
        os.replace(unfinished, path)

    def _path(self, method: str, seed: int) -> Path:
        # Names that differ in punctuation only must not share a file.
        mark = hashlib.sha256(method.encode()).hexdigest()[:8]
        return self.folder / f"{re.sub('[^A-Za-z0-9]+', '-', method)}-{mark}-{seed}.json"


def make_folder(folder: Path) -> None:
    """Make a folder of the output, or raise ``ValueError``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise bad_argument("output", f"a folder that can be made ({error.strerror})", str(folder)) from error


class _Recorder(Callback):
    def __init__(self, run: Run) -> None:
        self.run = run
        run.curves.update({group: [] for group in GROUPS})

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after validation: note the curves."""
        for group, curve in self.run.curves.items():
            # Not there yet where the Trainer was told to validate now and then.
            curve.append(float(trainer.callback_metrics.get(f"val/acc_{group}", math.nan)))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after the last epoch: note whether the training came to anything."""
        self.run.diverged = not trainer.callback_metrics["train/loss"].isfinite().item()

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before the module resets its metrics: note the recalls."""
        assert isinstance(pl_module, LongTailClassifier)
        self.run.class_recalls = cast("HeadTailAccuracy", pl_module.test_metrics[0]).class_recalls().tolist()


def _check_names(name: str, arguments: dict[str, Any], of: type, own: set[str]) -> None:
    allowed = inspect.signature(of).parameters.keys() - own
    if wrong := sorted(arguments.keys() - allowed):
        kept = f", but for those set elsewhere ({', '.join(sorted(own))})"
        raise bad_argument(name, f"arguments of {of.__name__}{kept}", got_text=", ".join(map(repr, wrong)))


def _is_one(devices: Any) -> bool:
    return isinstance(devices, Sequence) and not isinstance(devices, str) and len(devices) == 1


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def _or_nothing(accuracy: float) -> float:
    return -1.0 if math.isnan(accuracy) else accuracy


def _settings(values: dict[str, Any], private: bool = False) -> dict[str, str]:
    """Return the public values among the attributes of an object, as text; the private ones too if asked."""
    skipped = ("trainer", "prepare_data_per_node", "allow_zero_length_dataloader_with_multiple_devices")
    return {
        # The text of a long tensor leaves out its middle.
        name: _without_addresses(repr(value.tolist() if isinstance(value, torch.Tensor) else value))
        for name, value in values.items()
        if (private or not name.startswith("_")) and name not in skipped
    }


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)


@contextmanager
def limited_threads(number: int) -> Iterator[None]:
    """Give an operation so many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet() -> Iterator[None]:
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
