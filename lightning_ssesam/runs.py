"""The import path of runs; see :mod:`lightning_ssesam.experiments.runs`."""

from lightning_ssesam.experiments.runs import CONFUSIONS, GROUPS, Experiment, Run, RunStore

__all__ = ["CONFUSIONS", "GROUPS", "Experiment", "Run", "RunStore"]
