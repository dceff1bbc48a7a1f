"""The import path of the command; see :mod:`lightning_ssesam.experiments.curvature_command`."""

from lightning_ssesam.experiments.curvature_command import curvature

__all__ = ["curvature"]
