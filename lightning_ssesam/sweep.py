"""The import path of searches; see :mod:`lightning_ssesam.experiments.sweep`."""

from lightning_ssesam.experiments.sweep import METRICS, SEARCHED, sweep

__all__ = ["METRICS", "SEARCHED", "sweep"]
