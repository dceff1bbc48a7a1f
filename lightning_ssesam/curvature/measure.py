"""The curvature of the losses of head, tail, or any other group of classes."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ssesam._validation import bad_argument, check_integer, check_radius
from lightning_ssesam.curvature.hessian import Hessian, SampleLosses
from lightning_ssesam.curvature.lanczos import (
    Eigenvalues,
    SpectralDensity,
    Trace,
    estimate_trace,
    find_ends,
    norm,
    quadrature,
    spectral_density,
)
from lightning_ssesam.split import ClassSplit

GROUPS = ("head", "tail", "all")

# Relative to the largest absolute eigenvalue.
_ZERO = 1e-2


@dataclass(frozen=True)
class Curvature:
    """What was measured of a group's mean loss at a model's weights.

    Attributes:
        samples: How many samples the group has in the data.
        loss: Their mean loss.
        gradient_norm: Norm of its gradient.
        eigenvalues: The ends of the spectrum of its Hessian.
        trace: The trace, None if it was not asked for.
        density: The spectral density, None if it was not asked for.
        sharpness: By how much the loss rises at distance ``rho`` along its gradient.
        rho: That distance.

    """

    samples: float
    loss: float
    gradient_norm: float
    eigenvalues: Eigenvalues
    trace: Trace | None
    density: SpectralDensity | None
    sharpness: float
    rho: float

    def numbers(self) -> dict[str, float]:
        """Return what was measured as numbers, for tables and loggers.

        ``negative_share`` is the share of the eigenvalues below 0 by more than a hundredth of the largest absolute
        one. Most eigenvalues of a network are nearly 0, and on which side is beyond what the density tells.
        """
        ends = self.eigenvalues
        numbers = {
            "loss": self.loss,
            "gradient_norm": self.gradient_norm,
            "largest": ends.largest,
            "smallest": ends.smallest,
            "ratio": ends.ratio,
            "iterations": float(ends.iterations),
            "converged": float(ends.converged),
            "sharpness": self.sharpness,
        }
        if self.trace is not None:
            numbers |= {"trace": self.trace.value, "trace_error": self.trace.standard_error}
        if self.density is not None:
            numbers["negative_share"] = self.density.share_below(-_ZERO * max(abs(ends.largest), abs(ends.smallest)))
        return numbers


def measure_curvature(
    model: nn.Module,
    batches: Iterable[Any] | Mapping[str, Iterable[Any]],
    split: ClassSplit,
    groups: Sequence[str] = GROUPS,
    sample_losses: SampleLosses | None = None,
    rho: float = 0.05,
    tolerance: float = 0.01,
    max_iterations: int = 200,
    trace_samples: int = 10,
    probes: int = 1,
    dtype: torch.dtype | None = None,
    batch_norm: Literal["eval", "batch"] = "eval",
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Curvature]:
    """Measure the curvature of the mean loss of each of several groups of classes, at a model's weights.

    The groups are measured one after the other; only their own samples are forwarded. The model is left as it is.

    Args:
        model: The model: one with :class:`~lightning_ssesam.SharpnessAwareMixin`, or any with ``sample_losses``.
        batches: The data, see :class:`Hessian`; or of each group its own.
        split: Which classes are head, tail, many, medium and few.
        groups: Any of ``"head"``, ``"tail"``, ``"many"``, ``"medium"``, ``"few"``, ``"all"``, ``"class_3"`` for a
            single class, and ``"classes"`` for each of them.
        sample_losses: Called with ``(model, batch)``, returns the losses ``(N,)``; ``model.sample_losses(batch)`` by
            default.
        rho: Distance for the sharpness, a finite number >= 0.
        tolerance: Of the eigenvalues, see :func:`extreme_eigenvalues`.
        max_iterations: Most products with a Hessian for the eigenvalues, an integer >= 1.
        trace_samples: Random vectors for the trace, an integer >= 0; 0 leaves it out.
        probes: Start vectors for the density, an integer >= 0; 0 leaves it out. The first one costs nothing, as it is
            what the eigenvalues are found with.
        dtype: Floating type to compute in, such as ``torch.float64``; that of the weights by default, float32 at least.
        batch_norm: ``"eval"`` (default) or ``"batch"``, see :class:`Hessian`.
        seed: Of all random vectors.
        progress: Whether to show how far it is.

    Returns:
        What was measured of each group, in their order.

    Raises:
        ValueError: If an argument is out of range, or the data has no sample of a group.
        NonFiniteError: If a loss or its gradient is infinite or not a number.

    """
    check_integer("trace_samples", trace_samples, minimum=0)
    check_integer("probes", probes, minimum=0)
    rho = check_radius("rho", rho)
    measured, masks = {}, group_masks(split, groups)
    check_batches(batches, masks)
    for name, classes in masks.items():
        own = batches[name] if isinstance(batches, Mapping) else batches
        hessian = Hessian(model, own, sample_losses, classes, dtype, batch_norm)
        ends, trace, density = _spectrum(
            hessian, tolerance, max_iterations, trace_samples, probes, seed, name if progress else None
        )
        measured[name] = Curvature(
            samples=hessian.weight,
            loss=hessian.loss(),
            gradient_norm=norm(hessian.gradient()),
            eigenvalues=ends,
            trace=trace,
            density=density,
            sharpness=sharpness(hessian, rho),
            rho=rho,
        )
    return measured


def _spectrum(
    hessian: Hessian,
    tolerance: float,
    max_iterations: int,
    trace_samples: int,
    probes: int,
    seed: int,
    progress: str | None,
) -> tuple[Eigenvalues, Trace | None, SpectralDensity | None]:
    ends, iteration = find_ends(hessian, tolerance, max_iterations, seed, progress and f"{progress}: eigenvalues")
    trace = estimate_trace(hessian, trace_samples, seed, iteration) if trace_samples else None
    nodes, weights = quadrature(iteration)
    # Its vectors take the most memory of all, and the next iteration has vectors of its own.
    del iteration
    if probes == 0:
        return ends, trace, None
    if probes == 1:
        return ends, trace, SpectralDensity([nodes], [weights])
    rest = spectral_density(hessian, probes - 1, ends.iterations, seed + 1, progress and f"{progress}: density")
    return ends, trace, SpectralDensity([nodes, *rest.nodes], [weights, *rest.weights])


def sharpness(hessian: Hessian, rho: float) -> float:
    r"""Return how far the group's loss rises within distance rho, to first order: L(w + rho g / ||g||) - L(w).

    The point is the one that SAM evaluates the gradient at (Foret et al., ICLR 2021, eq. 2).

    Args:
        hessian: Of the group, whose loss and gradient are used.
        rho: Distance, a finite number >= 0.

    """
    gradient = hessian.gradient()
    length = norm(gradient)
    if check_radius("rho", rho) == 0 or length == 0:
        return 0.0
    return hessian.loss(at=rho * gradient / length) - hessian.loss()


def group_masks(split: ClassSplit, groups: Sequence[str]) -> dict[str, Tensor]:
    """Return the classes of each group as a boolean mask ``(C,)``, see :func:`measure_curvature`.

    Raises:
        ValueError: If a group is unknown, or has no classes.

    """
    known = {name: getattr(split, name) for name in ("head", "tail", "many", "medium", "few")}
    known["all"] = torch.ones(split.num_classes, dtype=torch.bool)
    masks: dict[str, Tensor] = {}
    for group in [groups] if isinstance(groups, str) else groups:
        single = re.fullmatch(r"class_(\d+)", group)
        if group == "classes":
            masks |= {f"class_{k}": _only(k, split.num_classes) for k in range(split.num_classes)}
        elif single and int(single[1]) < split.num_classes:
            masks[group] = _only(int(single[1]), split.num_classes)
        elif group in known and known[group].any():
            masks[group] = known[group]
        else:
            usable = ", ".join(repr(name) for name, mask in known.items() if mask.any())
            raise bad_argument(
                "groups", f"any of {usable}, 'classes' and 'class_0' to 'class_{split.num_classes - 1}'", group
            )
    if not masks:
        raise bad_argument("groups", "at least one group", groups)
    return masks


def check_batches(batches: Any, masks: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` if the batches of each group are given, but not of all of these."""
    if isinstance(batches, Mapping) and (missing := masks.keys() - batches.keys()):
        raise bad_argument("batches", "data of every group", got_text=f"none of {', '.join(sorted(missing))}")


def _only(number: int, size: int) -> Tensor:
    return torch.arange(size) == number
