"""What the trainings of each method cost: parameters and time; and their optimizer."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from lightning_ssesam.experiments.remarks import divergence
from lightning_ssesam.experiments.runs import Run, by_method


class Training(NamedTuple):
    """How a method was trained, as texts; ``"?"`` for what is not known.

    Attributes:
        method: Name of the method.
        optimizer: Optimizer with its learning rate.
        parameters: Number of parameters of the network.
        trained: Number of these that were trained.
        seconds: Duration of a training and its test, the mean over the runs, in seconds.
        per_epoch: The same, divided by the number of epochs.
    """

    method: str
    optimizer: str
    parameters: str
    trained: str
    seconds: str
    per_epoch: str


def trainings(runs: Sequence[Run], epochs: int) -> list[Training]:
    """Return how each method was trained."""
    return [
        _training(name + divergence(method_runs), method_runs, epochs) for name, method_runs in by_method(runs).items()
    ]


def _training(name: str, runs: Sequence[Run], epochs: int) -> Training:
    known = next((run for run in runs if run.parameters), None)
    sizes = ("?", "?") if known is None else (f"{known.parameters:,}", f"{known.trained_parameters:,}")
    seconds = statistics.mean(run.seconds for run in runs)
    optimizer = next((run.optimizer for run in runs if run.optimizer), "?")
    return Training(name + divergence(runs), optimizer, *sizes, f"{seconds:,.1f}", f"{seconds / epochs:,.2f}")
