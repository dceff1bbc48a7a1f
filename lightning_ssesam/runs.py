"""The import path of runs; see :mod:`lightning_ssesam.experiments.runs` and its neighbour ``experiment``."""

from lightning_ssesam.experiments.experiment import Experiment
from lightning_ssesam.experiments.runs import CONFUSIONS, GROUPS, Run, RunStore

__all__ = ["CONFUSIONS", "GROUPS", "Experiment", "Run", "RunStore"]
