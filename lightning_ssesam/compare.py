"""The import path of comparisons; see :mod:`lightning_ssesam.experiments.compare`."""

from lightning_ssesam.experiments.compare import compare
from lightning_ssesam.experiments.jobs import usable_jobs
from lightning_ssesam.experiments.methods import METHODS, Method
from lightning_ssesam.experiments.recipe import DEFAULT_SGD

__all__ = ["DEFAULT_SGD", "METHODS", "Method", "compare", "usable_jobs"]
