"""The curvature of the losses of head, tail, or any other group of classes."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ssesam._validation import bad_argument, check_radius
from lightning_ssesam.curvature import lanczos
from lightning_ssesam.curvature.hessian import Hessian, SampleLosses
from lightning_ssesam.curvature.settings import CurvatureSettings
from lightning_ssesam.split import ClassSplit

GROUPS = ("head", "tail", "all")


@dataclass(frozen=True)
class Curvature:
    """Curvature of a group's mean loss at a model's weights.

    Attributes:
        samples: Number of samples that the group has in the data; of losses of its labels, for multi-label data.
        loss: Mean loss of the group.
        gradient_norm: Norm of its gradient.
        eigenvalues: Ends of the spectrum of its Hessian.
        trace: Trace of its Hessian; None if it was not measured.
        density: Spectral density of its Hessian; None if it was not measured.
        sharpness: Rise of the loss at distance ``rho`` along its gradient.
        rho: Distance at which the sharpness was measured.
    """

    samples: float
    loss: float
    gradient_norm: float
    eigenvalues: lanczos.Eigenvalues
    trace: lanczos.Trace | None
    density: lanczos.SpectralDensity | None
    sharpness: float
    rho: float

    def numbers(self) -> dict[str, float]:
        """Return the measured numbers by name, for tables and loggers.

        ``negative_share`` is the share of the eigenvalues that lie below 0 by more than a hundredth of the largest
        absolute one. Most eigenvalues of a network are nearly 0, and the density cannot tell their signs.
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
            numbers["negative_share"] = self.density.share_below(-1e-2 * max(abs(ends.largest), abs(ends.smallest)))
        return numbers


def measure_curvature(
    model: nn.Module,
    batches: Iterable[Any] | Mapping[str, Iterable[Any]],
    split: ClassSplit,
    groups: Sequence[str] = GROUPS,
    sample_losses: SampleLosses | None = None,
    progress: bool = False,
    **settings: Any,
) -> dict[str, Curvature]:
    """Return the curvature of the mean loss of each group of classes at a model's weights, in the order of the groups.

    The groups are measured one after the other; only their own samples are forwarded. The model is left as it is. With
    a split of multi-label data, the mean loss of a group is that of its labels over all samples.

    Args:
        model: Model with :class:`~lightning_ssesam.SharpnessAwareMixin`, or any other with ``sample_losses``.
        batches: Data for all groups, or a dictionary with the data of each group; see :class:`Hessian`.
        split: Classes of head, tail, many, medium and few.
        groups: Names of groups: ``"head"``, ``"tail"``, ``"many"``, ``"medium"``, ``"few"``, ``"all"``, ``"class_3"``
            for a single class, and ``"classes"`` for each of them.
        sample_losses: Function of ``(model, batch)`` that returns the losses of the samples; see :class:`Hessian`.
        progress: Whether to show a progress display.
        **settings: Fields of :class:`CurvatureSettings`, such as ``tolerance``.

    Raises:
        ArgumentError: If an argument is out of range, or the data has no sample of a group.
        NonFiniteError: If a loss or its gradient is infinite or not a number.

    Example:
        A bowl for the head, and a saddle for the tail.

        >>> def sample_losses(model, batch):
        ...     inputs, targets = batch
        ...     x, y = model.weight[0]
        ...     return torch.where(targets == 1, x**2 - y**2, x**2 + y**2)
        >>> model, batch = nn.Linear(2, 1, bias=False), (torch.zeros(4, 2), torch.tensor([0, 0, 0, 1]))
        >>> split = ClassSplit([3, 1], tail=[1])
        >>> measured = measure_curvature(model, [batch], split, ["head", "tail"], sample_losses)
        >>> {group: round(curvature.eigenvalues.smallest, 3) for group, curvature in measured.items()}
        {'head': 2.0, 'tail': -2.0}
    """
    chosen = CurvatureSettings(**settings)
    measured, masks = {}, group_masks(split, groups)
    check_batches(batches, masks)
    for name, classes in masks.items():
        data = batches[name] if isinstance(batches, Mapping) else batches
        hessian = Hessian(
            model, data, sample_losses, classes, chosen.dtype, chosen.batch_norm, multi_label=split.multi_label
        )
        measured[name] = _measure(hessian, chosen, name if progress else None)
    return measured


def _measure(hessian: Hessian, settings: CurvatureSettings, title: str | None) -> Curvature:
    seed = settings.seed
    title_of_search, title_of_density = (f"{title}: {part}" if title else None for part in ("eigenvalues", "density"))
    ends, iteration = lanczos.find_ends(hessian, settings.tolerance, settings.max_iterations, seed, title_of_search)
    trace = lanczos.estimate_trace(hessian, settings.trace_samples, seed, iteration) if settings.trace_samples else None
    nodes, weights = ([part] for part in iteration.quadrature())
    # The vectors of an iteration take the most memory. Free them before the next iteration collects its own.
    del iteration
    if settings.probes > 1:
        others = lanczos.spectral_density(hessian, settings.probes - 1, ends.iterations, seed + 1, title_of_density)
        nodes, weights = nodes + others.nodes, weights + others.weights
    return Curvature(
        samples=hessian.weight,
        loss=hessian.loss(),
        gradient_norm=lanczos.norm(hessian.gradient()),
        eigenvalues=ends,
        trace=trace,
        density=lanczos.SpectralDensity(nodes, weights) if settings.probes else None,
        sharpness=sharpness(hessian, settings.rho),
        rho=float(settings.rho),
    )


def sharpness(hessian: Hessian, rho: float) -> float:
    r"""Return the rise of the group's loss at distance rho along its gradient, L(w + rho g / ||g||) - L(w).

    SAM evaluates its gradient at the same point (Foret et al., ICLR 2021, eq. 2).

    Args:
        hessian: Hessian of the group's loss.
        rho: Distance, a finite number >= 0.
    """
    gradient = hessian.gradient()
    length = lanczos.norm(gradient)
    if check_radius("rho", rho) == 0 or length == 0:
        return 0.0
    return hessian.loss(at=rho * gradient / length) - hessian.loss()


def group_masks(split: ClassSplit, groups: Sequence[str]) -> dict[str, Tensor]:
    """Return the classes of each group as a boolean mask ``(C,)``. See :func:`measure_curvature` for the names.

    It raises ``ArgumentError`` if a group is unknown, or has no classes.
    """
    known = {name: getattr(split, name) for name in ("head", "tail", "many", "medium", "few")}
    known["all"] = torch.ones(split.num_classes, dtype=torch.bool)
    masks: dict[str, Tensor] = {}
    numbers = torch.arange(split.num_classes)
    for group in [groups] if isinstance(groups, str) else groups:
        single_class = re.fullmatch(r"class_(\d+)", group)
        if group == "classes":
            masks |= {f"class_{k}": numbers == k for k in range(split.num_classes)}
        elif single_class and int(single_class[1]) < split.num_classes:
            masks[group] = numbers == int(single_class[1])
        elif group in known and known[group].any():
            masks[group] = known[group]
        else:
            usable = ", ".join(repr(name) for name, mask in known.items() if mask.any())
            classes = f"'classes' and 'class_0' to 'class_{split.num_classes - 1}'"
            raise bad_argument("groups", f"any of {usable}, {classes}", group)
    if not masks:
        raise bad_argument("groups", "at least one group", groups)
    return masks


def check_batches(batches: Any, masks: Mapping[str, Tensor]) -> None:
    """Raise ``ArgumentError`` if batches are given by group, and a group has none."""
    if isinstance(batches, Mapping) and (missing := masks.keys() - batches.keys()):
        raise bad_argument("batches", "data of every group", got_text=f"none of {', '.join(sorted(missing))}")
