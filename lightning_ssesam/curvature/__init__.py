"""Curvature of the loss of a group of classes: eigenvalues, trace, spectral density, sharpness."""

from lightning_ssesam.curvature.hessian import Hessian
from lightning_ssesam.curvature.lanczos import (
    Eigenvalues,
    SpectralDensity,
    Trace,
    estimate_trace,
    extreme_eigenvalues,
    spectral_density,
)
from lightning_ssesam.curvature.landscape import filter_normalized, line, plane
from lightning_ssesam.curvature.measure import Curvature, group_masks, measure_curvature, sharpness
from lightning_ssesam.curvature.samples import choose_samples
from lightning_ssesam.curvature.settings import CurvatureSettings

__all__ = [
    "Curvature",
    "CurvatureSettings",
    "Eigenvalues",
    "Hessian",
    "SpectralDensity",
    "Trace",
    "choose_samples",
    "estimate_trace",
    "extreme_eigenvalues",
    "filter_normalized",
    "group_masks",
    "line",
    "measure_curvature",
    "plane",
    "sharpness",
    "spectral_density",
]
