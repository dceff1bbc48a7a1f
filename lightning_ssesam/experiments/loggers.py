"""Lightning's loggers for the trainings of a comparison: one run for each, which goes on if its training goes on."""

import csv
import os
import re
import sys
import tempfile
import uuid
import warnings
from abc import abstractmethod
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from typing_extensions import override

from lightning_ssesam.experiments.parser_messages import cut
from lightning_ssesam.experiments.runs import file_stem

LoggerName = Literal["tensorboard", "csv", "wandb", "mlflow"]
LOGGERS: tuple[LoggerName, ...] = get_args(LoggerName)

# Limits of Weights & Biases: characters of the name of a group, and of a kind of jobs.
_LONGEST_GROUP, _LONGEST_JOB = 128, 64
METRICS_ARE_DELETED = "Experiment logs directory .* exists and is not empty"
"""Warning of CSVLogger, which is wrong where earlier metrics are kept."""
MLFLOW_ADDRESS = "MLFLOW_TRACKING_URI"
"""Variable of the environment that has the address of MLflow."""
# MLflow tries a server that is away seven times, and each time longer: the training would wait for minutes.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class Title(NamedTuple):
    """What a run of a logger is named by.

    Attributes:
        group: Name of the comparison.
        method: Name of the method.
        seed: Seed of the training.
    """

    group: str
    method: str
    seed: int

    @property
    def run(self) -> str:
        """Name of the run, such as ``"SSESAM, seed 3"``."""
        return f"{cut(self.method, _LONGEST_GROUP - 20)}, seed {self.seed}"


class SteadyLogger(Logger):
    """Base of the loggers: what fails in one is said once, and its training goes on without it.

    Nothing is written before :meth:`begin`, and the end of the fit is not the end of the run: the test comes after it.

    Attributes:
        mark: Name of the run by which the same training finds it again.
        names: Names of the values that Lightning has logged.
    """

    mark: str = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._has_begun = self._has_failed = self._has_step = False
        self._settings: dict[str, Any] = {}
        self.names: set[str] = set()

    def begin(self, settings: Mapping[str, Any], values: Iterable[str]) -> None:
        """Open the run.

        Args:
            settings: Settings of the training by name.
            values: Names of the values that will be logged.
        """
        self._has_begun = True
        self._settings.update(settings)
        self._try(self._open, self._settings, sorted(values))

    def close(self, status: Literal["success", "failed"]) -> None:
        """Close the run. Nothing is logged afterwards."""
        if self._has_begun and self._has_failed:
            # It has been said. What is held must be let go all the same.
            with suppress(Exception):
                self._close("failed")
        elif self._has_begun:
            self._try(self._close, status)
        self._has_failed = True

    @abstractmethod
    def _open(self, settings: dict[str, Any], values: list[str]) -> None: ...

    def _go_on(self, step: int) -> None:
        """Called before the first value: remove what an attempt that was cut off has logged from a step on."""

    @abstractmethod
    def _close(self, status: Literal["success", "failed"]) -> None: ...

    @override
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Called by Lightning with values, and the number of the step."""
        self.names |= metrics.keys()
        self.add(metrics, step)

    def add(self, metrics: Mapping[str, float], step: int | None) -> None:
        """Log values that Lightning does not log."""
        if not self._has_step and step is not None:
            self._has_step = True
            self._try(self._go_on, step)
        self._try(super().log_metrics, metrics, step)  # type: ignore[safe-super]

    @override
    def log_hyperparams(self, params: dict[str, Any] | Namespace | None = None, *args: Any, **kwargs: Any) -> None:
        """Called with settings that a data module or a callback has to tell. Those that are there already stay."""
        given = vars(params) if isinstance(params, Namespace) else params or {}
        new = {name: value for name, value in given.items() if name not in self._settings}
        self._settings.update(new)
        if self._has_begun and new:
            self._try(self._add, new)

    def _add(self, settings: dict[str, Any]) -> None:
        """Log settings after the run was opened."""
        super().log_hyperparams(settings)  # type: ignore[safe-super]

    @override
    def save(self) -> None:
        """Called after values are logged: write them."""
        if self._has_step:
            self._try(super().save)

    @override
    def finalize(self, status: str = "success") -> None:
        """Called at the end of the fit and of the test: do nothing, because :meth:`close` follows."""

    def _try(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if self._has_failed:
            return
        try:
            function(*args, **kwargs)
        except Exception as error:
            self._has_failed = True
            say_failure(error)


def say_failure(error: Exception) -> None:
    """Say that a logger has failed, and why."""
    text = cut(" ".join(f"{type(error).__name__}: {error}".split()), 200)
    print(f"\nThe logger of a training has failed ({text}). The training goes on without it.", file=sys.stderr)


class TensorBoardRun(SteadyLogger, TensorBoardLogger):
    """A folder with events. Settings and values stand in the tab HPARAMS."""

    def __init__(self, folder: Path, title: Title, mark: str) -> None:
        self._folder, self._is_new = _folder_of(folder, title, mark)
        self.mark = self._folder.name
        super().__init__(self._folder.parent.parent, self._folder.parent.name, self.mark, default_hp_metric=False)

    @property
    @override
    def log_dir(self) -> str:
        """The folder. Lightning would take a dollar sign in its path for a variable."""
        return str(self._folder)

    @override
    def _open(self, settings: dict[str, Any], values: list[str]) -> None:
        self._add(settings)
        writer = self.experiment
        summary = import_module(f"{type(writer).__module__.rpartition('.')[0]}.summary")
        # The third part says that the run has ended.
        for part in summary.hparams(settings, dict.fromkeys(values, 0))[:2]:
            writer.file_writer.add_summary(part)
        TensorBoardLogger.save(self)

    @override
    def _go_on(self, step: int) -> None:
        if not self._is_new:
            # TensorBoard hides the later events of the files before this one.
            self.experiment.close()
            self.experiment.purge_step = step

    @override
    def _close(self, status: Literal["success", "failed"]) -> None:
        TensorBoardLogger.finalize(self, status)


class CSVRun(SteadyLogger, CSVLogger):
    """A folder with metrics.csv and hparams.yaml."""

    def __init__(self, folder: Path, title: Title, mark: str) -> None:
        self._folder, _ = _folder_of(folder, title, mark)
        self.mark = self._folder.name
        self._columns: list[str] = []
        super().__init__(self._folder.parent.parent, self._folder.parent.name, self.mark)

    @override
    def _open(self, settings: dict[str, Any], values: list[str]) -> None:
        self._columns = values

    @override
    def _add(self, settings: dict[str, Any]) -> None:
        # Before the first value, Lightning would delete what is there.
        if self._has_step:
            super()._add(settings)

    @override
    def _go_on(self, step: int) -> None:
        metrics, aside = (self._folder / name for name in ("metrics.csv", "metrics-before.csv"))
        # Lightning deletes the file, and so a kill in between would lose it. If both are there, one was not finished.
        if metrics.is_file() and not aside.is_file():
            metrics.rename(aside)
        rows: list[dict[str, Any]] = []
        if aside.is_file():
            with aside.open(newline="", encoding="utf-8") as file:
                rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", METRICS_ARE_DELETED)
            writer: Any = self.experiment
        # With another column, Lightning writes the file anew.
        writer.metrics_keys = sorted({"epoch", "step", *self._columns})
        writer.metrics = [row for row in rows if float(row["step"]) < step]
        self._add(self._settings)
        CSVLogger.save(self)
        aside.unlink(missing_ok=True)

    @override
    def _close(self, status: Literal["success", "failed"]) -> None:
        if self._has_step:
            CSVLogger.finalize(self, status)


class WandbRun(SteadyLogger, WandbLogger):
    """A run of Weights & Biases, in the project ``WANDB_PROJECT``, with the method as the kind of the job."""

    def __init__(self, folder: Path, title: Title, mark: str) -> None:
        import wandb

        self.mark = mark or uuid.uuid4().hex
        super().__init__(
            name=title.run,
            # A machine of a cluster may not have the folder.
            save_dir=folder if folder.is_dir() else tempfile.gettempdir(),
            version=self.mark,
            project=os.environ.get("WANDB_PROJECT", "lightning-ssesam"),
            group=cut(os.environ.get("WANDB_RUN_GROUP", title.group), _LONGEST_GROUP),
            job_type=cut(title.method, _LONGEST_JOB),
            settings=wandb.Settings(console="off", silent=True),
        )

    @override
    def _open(self, settings: dict[str, Any], values: list[str]) -> None:
        self._add(settings)

    @override
    def _close(self, status: Literal["success", "failed"]) -> None:
        # Otherwise the next training of this process would go on in this run.
        self.experiment.finish(exit_code=0 if status == "success" else 1)


class MLflowRun(SteadyLogger, MLFlowLogger):
    """A run of MLflow, in an experiment with the name of the comparison."""

    def __init__(self, title: Title, mark: str, address: str) -> None:
        self._process = ExitStack()
        tags = {"method": title.method, "seed": str(title.seed)}
        super().__init__(title.group, title.run, address, tags, run_id=mark or None)

    @override
    def _open(self, settings: dict[str, Any], values: list[str]) -> None:
        self._process.enter_context(mlflow_for_now())
        self._add(settings)
        self.mark = str(self.run_id)
        # A run that was closed before goes on.
        self.experiment.update_run(self.mark, status="RUNNING")

    @override
    def _close(self, status: Literal["success", "failed"]) -> None:
        with self._process:
            MLFlowLogger.finalize(self, status)


@contextmanager
def mlflow_for_now() -> Iterator[None]:
    """Let MLflow give up soon. Afterwards, this process has the settings of MLflow that it had before.

    Lightning makes the address of its logger the one of the process, and of those that it starts.
    """
    import mlflow

    before = {name: os.environ.get(name) for name in (MLFLOW_ADDRESS, *_PATIENCE)}
    os.environ.update({name: value for name, value in _PATIENCE.items() if name not in os.environ})
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before[MLFLOW_ADDRESS])
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


def _folder_of(folder: Path, title: Title, mark: str) -> tuple[Path, bool]:
    """Return the folder of a run, and whether it is new. A run without a mark gets a name that no folder has."""
    is_plain = re.fullmatch("[A-Za-z0-9](?:[A-Za-z0-9_.+=-]{0,58}[A-Za-z0-9])?", title.method)
    method = folder / (title.method if is_plain else file_stem(title.method))
    if mark:
        (method / mark).mkdir(parents=True, exist_ok=True)
        return method / mark, False
    names = (f"seed-{title.seed}{'' if number == 1 else f'-{number}'}" for number in count(1))
    while True:
        new = method / next(names)
        try:
            new.mkdir(parents=True)
        except FileExistsError:
            continue
        return new, True
