"""The import path of runs; see :mod:`lightning_ssesam.experiments.runs`."""

from lightning_ssesam.experiments.run_store import RunStore
from lightning_ssesam.experiments.runs import CONFUSIONS, GROUPS, Experiment, Run

__all__ = ["CONFUSIONS", "GROUPS", "Experiment", "Run", "RunStore"]
