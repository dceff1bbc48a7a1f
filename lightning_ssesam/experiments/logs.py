"""The logs of a comparison: where they are, what is refused before the first training, and what a training tells."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_ssesam import _version
from lightning_ssesam._validation import bad_argument, check_choice
from lightning_ssesam.callbacks import StageSwitch
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.files import make_folder, write_text
from lightning_ssesam.experiments.fingerprint import data_settings
from lightning_ssesam.experiments.loggers import (
    LOGGERS,
    MLFLOW_ADDRESS,
    CSVRun,
    LoggerName,
    MLflowRun,
    SteadyLogger,
    TensorBoardRun,
    Title,
    WandbRun,
    mlflow_for_now,
    say_failure,
)
from lightning_ssesam.experiments.parser_messages import cut
from lightning_ssesam.experiments.recorder import describe_optimizer
from lightning_ssesam.experiments.unfinished import Unfinished

# What a logger needs: the modules of which one must be there, and the package to install.
_PACKAGES = {
    "tensorboard": (("tensorboard.summary", "tensorboardX"), "tensorboard"),
    "wandb": (("wandb.sdk",), "wandb"),
    "mlflow": (("mlflow.tracking",), "mlflow"),
}
_FILE_LOGGERS: dict[str, Any] = {"tensorboard": TensorBoardRun, "csv": CSVRun, "wandb": WandbRun}
# Seconds to wait for a server.
_PATIENCE = 10


class Logs(NamedTuple):
    """Where the trainings of a comparison are logged.

    Attributes:
        logger: Name of the logger.
        folder: Absolute path of the folder for its files.
        group: Name of the comparison.
        address: Address of MLflow's database or server; empty for the other loggers.
        every: Number of steps between two values of single steps; 0 if only epochs are logged.
    """

    logger: LoggerName
    folder: Path
    group: str
    address: str
    every: int

    def make(self, method: str, seed: int, mark: str) -> SteadyLogger:
        """Return the logger of a training: a new run, or the one that has a mark."""
        title = Title(self.group, method, seed)
        if self.logger == "mlflow":
            return MLflowRun(title, mark, self.address)
        logger: SteadyLogger = _FILE_LOGGERS[self.logger](self.folder, title, mark)
        return logger

    @property
    def is_remote(self) -> bool:
        """Whether a server has the logs, not the folder."""
        return self.logger == "wandb" or ("://" in self.address and not self.address.startswith("sqlite:"))


def plan_logs(logger: LoggerName | None, trainer: Mapping[str, Any] | None, output: Path) -> Logs | None:
    """Return where the trainings of a comparison will be logged; None if they will not. Nothing is written.

    Args:
        logger: Name of the logger.
        trainer: Further arguments of the Trainer.
        output: Output folder of the comparison.

    Raises:
        ArgumentError: If there is no such logger, the Trainer has another one, a package is missing, or nobody is
            logged in.
    """
    if logger is None:
        return None
    check_choice("logger", logger, LOGGERS)
    given = trainer or {}
    if given.get("logger"):
        raise bad_argument("logger", "left out if `trainer` has a logger", logger)
    if logger in _PACKAGES:
        _check_package(logger)
    if logger == "wandb":
        _check_login(logger)
    folder = (output / "logs" / logger).absolute()
    address = os.environ.get(MLFLOW_ADDRESS) or f"sqlite:///{folder / 'mlflow.db'}"
    group = output.absolute().resolve().name
    return Logs(logger, folder, group, address if logger == "mlflow" else "", given.get("log_every_n_steps") or 0)


def prepare_logs(logs: Logs | None) -> None:
    """Make the folder, and the experiment of MLflow, before the first training. Say where the logs will be.

    Raises:
        ArgumentError: If the folder cannot be written to, or MLflow cannot be reached.
    """
    if logs is None:
        return
    make_folder(logs.folder.parent)
    logs.folder.mkdir(exist_ok=True)
    if logs.logger == "mlflow":
        _prepare_mlflow(logs)
    places = {
        "tensorboard": f"{logs.folder}. Look at them: tensorboard --logdir {os.path.relpath(logs.folder)}",
        "csv": f"{logs.folder}",
        "wandb": f"Weights & Biases, group {logs.group!r}; their files are in {logs.folder}.",
        "mlflow": f"MLflow, experiment {logs.group!r}. Look at them: mlflow ui --backend-store-uri {logs.address}",
    }
    print(f"Logs: {places[logs.logger]}")


def _check_package(logger: LoggerName) -> None:
    modules, package = _PACKAGES[logger]
    reasons = []
    for module in modules:
        try:
            import_module(module)
            return
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {cut(' '.join(str(error).split()))}")
    expected = f"one whose package is installed (pip install {package})"
    raise bad_argument("logger", expected, got_text=f"{logger!r} ({reasons[0]})")


def _check_login(logger: LoggerName) -> None:
    """Raise ``ArgumentError`` if Weights & Biases would take no run: nobody is logged in, or it is away."""
    import wandb

    if wandb.run is not None:
        raise bad_argument(
            "logger", "another one than 'wandb' within a run of wandb's (end it: wandb.finish())", "wandb"
        )
    # Newer versions would ask for a key in a terminal.
    silent = {"prompt": False} if "prompt" in signature(wandb.login).parameters else {}
    try:
        wandb.login(timeout=_PATIENCE, verify=True, **silent)
    except Exception as error:
        raise _out_of_reach(logger, "log in by `wandb login`, or set WANDB_MODE=offline", error) from error


def _prepare_mlflow(logs: Logs) -> None:
    """Make database and experiment, once for all processes."""
    from mlflow.tracking import MlflowClient

    try:
        with mlflow_for_now():
            client = MlflowClient(logs.address)
            if client.get_experiment_by_name(logs.group) is None:
                place = None if logs.is_remote else (logs.folder / "artifacts").as_uri()
                client.create_experiment(logs.group, artifact_location=place)
    except Exception as error:
        way_out = f"start the server, or set {MLFLOW_ADDRESS} to another address"
        raise _out_of_reach("mlflow", way_out, error, logs.address) from error


def _out_of_reach(logger: LoggerName, way_out: str, error: Exception, address: str = "") -> ArgumentError:
    reason = cut(" ".join(f"{type(error).__name__}: {error}".split()), 200)
    got = f"{logger!r}{address and f' at {address}'} ({reason})"
    return bad_argument("logger", f"one that can log now ({way_out})", got_text=got)


class TrainingLog(Callback):
    """Logs a training: its settings, the values of every epoch, and the results of the test.

    Attributes:
        logs: Where it is logged.
        method: Name of the method.
        seed: Seed of the training.
        fingerprint: Fingerprint of its settings.
    """

    def __init__(self, logs: Logs, method: str, seed: int, fingerprint: str) -> None:
        self.logs, self.method, self.seed, self.fingerprint = logs, method, seed, fingerprint
        self._logger: SteadyLogger | None = None
        self._place: Path | None = None

    def begin(self, unfinished: Unfinished | None) -> bool:
        """Find the file by which the training finds its run again. Return whether this machine can log."""
        self._place = unfinished.folder / f"{self.logs.logger}.txt" if unfinished else None
        is_here = self.logs.is_remote or os.access(self.logs.folder, os.W_OK | os.X_OK)
        if not is_here:
            print(f"Cannot write to {str(self.logs.folder)!r}: the training is not logged here.", file=sys.stderr)
        return is_here

    def close(self, status: Literal["success", "failed"]) -> None:
        """Close the run, if there is one."""
        if self._logger is not None:
            self._logger.close(status)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when the fit begins: be the logger of the Trainer. Without a logger, the training goes on."""
        if stage != "fit":
            return
        mark = self._place.read_text(encoding="utf-8") if self._place and self._place.is_file() else ""
        try:
            self._logger = self.logs.make(self.method, self.seed, mark)
        except Exception as error:
            say_failure(error)
            return
        self._keep_mark()
        trainer.loggers = [self._logger]
        trainer.log_every_n_steps = self.logs.every  # type: ignore[attr-defined]

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when the optimizers are there: log the settings."""
        if self._logger is None:
            return
        settings = {"method": self.method, "seed": self.seed, **settings_of(trainer, pl_module)}
        versions = {"fingerprint": self.fingerprint[:12], "version": _version.__version__}
        self._logger.begin({**settings, **versions}, values_of(pl_module))
        self._keep_mark()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after validation: log what Lightning logs at single steps only, such as the loss and the stage."""
        if self._logger is None:
            return
        new = trainer.callback_metrics.keys() - self._logger.names
        values = {name: float(trainer.callback_metrics[name]) for name in sorted(new)}
        # The step of the last batch, as Lightning counts.
        self._logger.add({**values, "epoch": trainer.current_epoch}, trainer.global_step - 1)
        self._logger.save()

    def _keep_mark(self) -> None:
        if self._place is not None and self._logger is not None and self._logger.mark:
            write_text(self._place, self._logger.mark)


@contextmanager
def opened(log: TrainingLog | None, unfinished: Unfinished | None) -> Iterator[list[Callback]]:
    """Yield the callbacks that log a training. The run is closed at the end of the block.

    The folder of a training that is under way has the mark of its run, so that both go on or begin anew.

    Args:
        log: Log of the training; None if there is none.
        unfinished: Folder of the training while it is under way.
    """
    if log is None or not log.begin(unfinished):
        yield []
        return
    status: Literal["success", "failed"] = "failed"
    try:
        yield [log]
        status = "success"
    finally:
        log.close(status)


def settings_of(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    """Return the settings of a training by name: what it is told from others by, as numbers and short texts."""
    classifier: Any = module
    objective, data = classifier.objective, trainer.datamodule  # type: ignore[attr-defined]
    parts = {"objective": objective, "loss": classifier.loss, "backbone": classifier.backbone, "data": data}
    settings: dict[str, Any] = {name: type(part).__name__ for name, part in parts.items()}
    settings |= objective.radius_values
    switches = [callback for callback in trainer.callbacks if isinstance(callback, StageSwitch)]  # type: ignore[attr-defined]
    if objective.num_stages > 1 and switches:
        points = {"gamma": switches[0].at, "switch_epoch": switches[0].epoch, "switch_step": switches[0].step}
        settings |= {name: point for name, point in points.items() if point is not None}
    settings["epochs"] = trainer.max_epochs
    settings["optimizer"] = ", ".join(map(describe_optimizer, trainer.optimizers))
    settings["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
    settings |= {f"data.{name}": value for name, value in data_settings(vars(data)).items()}
    # Marks of places in memory and long lists tell nothing.
    plain = {name: value for name, value in settings.items() if isinstance(value, bool | int | float | str)}
    return {name: cut(value, 200) if isinstance(value, str) else value for name, value in plain.items()}


def values_of(module: pl.LightningModule) -> list[str]:
    """Return the names of the values that a training logs in each epoch, and at its end."""
    classifier: Any = module
    names = ["train/loss", *(["stage"] if classifier.objective.num_stages > 1 else [])]
    for stage in ("val", "test"):
        names += [f"{stage}/loss"]
        for metric in getattr(classifier, f"{stage}_metrics"):
            names += [f"{stage}/{metric.log_prefix}{name}" for name in metric.names()]
    return names
