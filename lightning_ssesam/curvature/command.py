"""The command ``lightning-ssesam curvature``. It lives in ``lightning_ssesam.experiments``."""

from lightning_ssesam.experiments.curvature_command import curvature

__all__ = ["curvature"]
