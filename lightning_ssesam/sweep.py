"""The import path of searches; see :mod:`lightning_ssesam.experiments.sweep`."""

from lightning_ssesam.experiments.sweep import METRICS, sweep

__all__ = ["METRICS", "sweep"]
