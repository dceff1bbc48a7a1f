"""How far trainings have come: a bar in a terminal, a line now and then elsewhere, for one process or several."""

import math
import os
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import IO, Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from tqdm.auto import tqdm
from typing_extensions import override

from lightning_ssesam.trainer_calls import of_first_loader

# Seconds between two lines where the output is no terminal.
_BETWEEN_LINES = 30.0


class EpochEnd(NamedTuple):
    """What a training reports after an epoch.

    Attributes:
        training: Name of the training, such as ``"SSESAM, seed 3"``.
        epoch: Number of epochs that are finished.
        epochs: Length of the training.
        best: Best validation accuracy of all classes so far, in [0, 1]; NaN before the first validation.
    """

    training: str
    epoch: int
    epochs: int
    best: float

    def __str__(self) -> str:
        """Return it as the display shows it."""
        best = "" if math.isnan(self.best) else f", best validation {100 * self.best:.1f} %"
        return f"{self.training}: epoch {self.epoch}/{self.epochs}{best}"


class Begun(NamedTuple):
    """What a process reports when it begins a training.

    Attributes:
        training: Name of the training.
    """

    training: str


Report = EpochEnd | Begun

_listener: Callable[[Any], None] | None = None


def listen(listener: Callable[[Any], None] | None) -> None:
    """Send what the trainings of this process report to a function, or to none."""
    global _listener
    _listener = listener


def tell(report: Report) -> None:
    """Report to the listener of the process, if there is one."""
    if _listener is not None:
        _listener(report)


def send_through(connection: Connection) -> None:
    """Send what the trainings of this process report to another process.

    A report is small, so it is written at once or not at all: no lock is needed, which a killed process could keep. It
    is dropped if the other process has stopped reading, or is gone.
    """
    if os.name == "posix":
        os.set_blocking(connection.fileno(), False)

    def send(report: Report) -> None:
        with suppress(OSError):
            connection.send(report._replace(training=report.training[:200]))

    listen(send)


class EpochReports(Callback):
    """Reports the end of each epoch to the listener of the process.

    Args:
        training: Name of the training.
    """

    def __init__(self, training: str) -> None:
        self.training = training
        self._best = math.nan

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the best accuracy so far, for a training that is cut off and goes on."""
        return {"best": self._best}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best = state_dict["best"]

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after validation: report."""
        accuracy = float(of_first_loader(trainer.callback_metrics).get("val/acc_all", math.nan))
        self._best = accuracy if math.isnan(self._best) else max(self._best, accuracy)
        tell(EpochEnd(self.training, trainer.current_epoch + 1, trainer.max_epochs or 0, self._best))


class Progress:
    """A display of the epochs of several trainings, with the time that is left for all of them.

    Args:
        trainings: Number of trainings.
        epochs: Length of each training.
    """

    def __init__(self, trainings: int, epochs: int) -> None:
        self._epochs = epochs
        self._finished: dict[str, int] = {}
        # The time that is left comes from the average speed: trainings of several methods alternate.
        self._bar = tqdm(
            total=trainings * epochs, unit="epoch", smoothing=0, miniters=1, disable=not trainings, **display_options()
        )

    def show(self, end: EpochEnd) -> None:
        """Count an epoch, and show which training has finished it."""
        self._bar.set_postfix_str(str(end), refresh=False)
        self._count(end.training, min(end.epoch, self._epochs))

    def finish(self, training: str) -> None:
        """Count the remaining epochs of a training that has ended, maybe early."""
        self._count(training, self._epochs)

    def _count(self, training: str, epoch: int) -> None:
        self._bar.update(epoch - self._finished.get(training, 0))
        self._finished[training] = epoch

    def close(self) -> None:
        """End the display."""
        self._bar.close()


@contextmanager
def shown(trainings: int, epochs: int) -> Iterator[Progress]:
    """Show the trainings of this process, and those that :meth:`Progress.show` is told of, until the block ends."""
    progress = Progress(trainings, epochs)
    listen(progress.show)
    try:
        yield progress
    finally:
        listen(None)
        progress.close()


def received(connection: Connection) -> Generator[Report, None, None]:
    """Yield what other processes have sent so far."""
    with suppress(EOFError, OSError):
        while connection.poll():
            yield connection.recv()


def display_options() -> dict[str, Any]:
    """Return the options of a bar: where the output is no terminal, it shows a line now and then."""
    # A notebook has a display of its own.
    if sys.stderr.isatty() or "ipykernel" in sys.modules:
        return {}
    return {"file": _Lines(sys.stderr), "mininterval": _BETWEEN_LINES, "maxinterval": _BETWEEN_LINES, "ascii": True}


class _Lines:
    """A stream that gets each state of a bar as a line of its own."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()
