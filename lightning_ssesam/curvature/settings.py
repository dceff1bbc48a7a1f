"""The settings of a curvature measurement: types, texts and checks in one place."""

from dataclasses import dataclass
from typing import Literal

import torch

from lightning_ssesam._validation import bad_argument, check_choice, check_integer, check_positive, check_radius

BATCH_NORM = ("eval", "batch")


@dataclass(frozen=True)
class CurvatureSettings:
    """How curvature is measured.

    :func:`measure_curvature`, :class:`~lightning_ssesam.CurvatureMonitor` and ``lightning-ssesam curvature`` take these
    settings as their own arguments. The last two have other defaults for some of them.

    Args:
        rho: Distance from the weights at which the sharpness is measured, a finite number >= 0.
        tolerance: Relative error at which the search for the eigenvalues stops, a finite number > 0.
        max_iterations: Maximum number of products with a Hessian in that search, an integer >= 1.
        trace_samples: Number of random vectors for the trace, an integer >= 0; 0 leaves the trace out.
        probes: Number of start vectors for the spectral density, an integer >= 0; 0 leaves the density out. The first
            one costs nothing, because the search for the eigenvalues has used it.
        dtype: Floating type to compute in: a ``torch.dtype``, or its name such as ``"float64"``. None takes the type of
            the weights, but at least float32.
        batch_norm: Statistics that batch norm uses. ``"eval"`` takes the running ones. ``"batch"`` takes those of each
            batch, all samples of which are then forwarded.
        seed: Seed of all random vectors, an integer >= 0.

    Raises:
        ArgumentError: If a value is out of range.
    """

    rho: float = 0.05
    tolerance: float = 0.01
    max_iterations: int = 200
    trace_samples: int = 10
    probes: int = 1
    dtype: str | torch.dtype | None = None
    batch_norm: Literal["eval", "batch"] = "eval"
    seed: int = 0

    def __post_init__(self) -> None:
        check_radius("rho", self.rho)
        check_positive("tolerance", self.tolerance)
        for name, minimum in (("max_iterations", 1), ("trace_samples", 0), ("probes", 0), ("seed", 0)):
            check_integer(name, getattr(self, name), minimum)
        check_dtype(self.dtype)
        check_choice("batch_norm", self.batch_norm, BATCH_NORM)


def check_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return a floating type that is given as such or by its name, else raise ``ArgumentError``. None stays None."""
    found = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if found is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise bad_argument("dtype", "a floating type", dtype)
    return found
