"""The import path of comparisons; see :mod:`lightning_ssesam.experiments.compare`."""

from lightning_ssesam.experiments.compare import METHODS, Method, compare
from lightning_ssesam.experiments.jobs import usable_jobs
from lightning_ssesam.experiments.recipe import DEFAULT_SGD

__all__ = ["DEFAULT_SGD", "METHODS", "Method", "compare", "usable_jobs"]
