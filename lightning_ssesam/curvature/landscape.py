"""The loss of a group around the weights: along a line, and over a plane."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from tqdm.auto import tqdm

from lightning_ssesam._validation import bad_argument, check_integer
from lightning_ssesam.curvature.hessian import Hessian
from lightning_ssesam.curvature.lanczos import Eigenvalues

# Largest distance that a line goes from the weights, as a share of their norm.
_FURTHEST = 0.5


@dataclass(frozen=True)
class EigenLine:
    """A group's loss along an eigenvector of its Hessian.

    Attributes:
        eigenvalue: Eigenvalue of the eigenvector v.
        slope: Slope of the loss along v, g . v; never positive, because v points downhill.
        loss: Loss at the weights w.
        offsets: Distances t from the weights, ``(A,)``.
        losses: Losses at ``w + t v``, ``(A,)``.
    """

    eigenvalue: float
    slope: float
    loss: float
    offsets: np.ndarray
    losses: np.ndarray

    @property
    def quadratic(self) -> np.ndarray:
        """Losses ``(A,)`` that slope and eigenvalue predict, L + t g . v + eigenvalue t^2 / 2."""
        return np.asarray(self.loss + self.slope * self.offsets + 0.5 * self.eigenvalue * self.offsets**2)


def eigen_lines(
    hessian: Hessian, ends: Eigenvalues, points: int = 21, progress: str | None = None
) -> tuple[EigenLine, EigenLine]:
    """Return a group's loss along the eigenvectors of the smallest and of the largest eigenvalue.

    A line goes to both sides until the quadratic term is as large as the loss, t = sqrt(2 L / abs(eigenvalue)). It goes
    no further than half of the norm of the weights.

    Args:
        hessian: Hessian of the group's loss.
        ends: Result of :func:`extreme_eigenvalues` for it.
        points: Number of points of each line, an integer >= 3. An odd number includes the weights themselves.
        progress: Title of a progress display; no display by default.
    """
    check_integer("points", points, minimum=3)
    norms = [p.detach().double().norm() for p in hessian.model.parameters() if p.requires_grad]
    furthest = _FURTHEST * math.hypot(*map(float, norms))
    lines = []
    found = zip(("smallest", "largest"), (ends.smallest, ends.largest), ends.vectors, strict=True)
    for name, eigenvalue, vector in found:
        slope = float(hessian.gradient() @ vector)
        reach = math.sqrt(2 * abs(hessian.loss()) / abs(eigenvalue)) if eigenvalue else math.inf
        offsets = np.linspace(-1, 1, points) * (min(reach, furthest) or 1.0)
        losses = line(hessian, -vector if slope > 0 else vector, offsets, progress and f"{progress} {name}")
        lines.append(EigenLine(eigenvalue, -abs(slope), hessian.loss(), offsets, losses))
    return lines[0], lines[1]


def line(
    hessian: Hessian, direction: Tensor, offsets: Sequence[float] | np.ndarray, progress: str | None = None
) -> np.ndarray:
    """Return a group's mean losses ``(A,)`` along a direction, at ``w + t * direction`` for every offset t.

    Its errors, and losses that are not finite, are those of :func:`plane`.

    Args:
        hessian: Hessian of the group's loss. Each offset takes a pass over its data, without derivatives.
        direction: Direction ``(P,)`` of any length, such as an eigenvector of :func:`extreme_eigenvalues`.
        offsets: Values of t, ``(A,)``, finite.
        progress: Title of a progress display; no display by default.
    """
    _checked_direction("direction", direction, hessian)
    return plane(hessian, direction, torch.zeros_like(direction), offsets, [0.0], progress)[:, 0]


def plane(
    hessian: Hessian,
    first: Tensor,
    second: Tensor,
    offsets: Sequence[float] | np.ndarray,
    second_offsets: Sequence[float] | np.ndarray | None = None,
    progress: str | None = None,
) -> np.ndarray:
    """Return a group's mean losses ``(A, B)`` over a plane, at ``w + a * first + b * second``.

    Where the model's losses are infinite or NaN, so are these.

    Args:
        hessian: Hessian of the group's loss. Each point takes a pass over its data, without derivatives.
        first: Direction ``(P,)`` of any length, such as one of :func:`filter_normalized`.
        second: Another direction ``(P,)``.
        offsets: Values of a, ``(A,)``, finite.
        second_offsets: Values of b, ``(B,)``, finite; those of a by default.
        progress: Title of a progress display; no display by default.

    Raises:
        ArgumentError: If a direction has another shape, or it or an offset is not finite.
    """
    first, second = _checked_direction("first", first, hessian), _checked_direction("second", second, hessian)
    rows = _checked_offsets("offsets", offsets)
    columns = rows if second_offsets is None else _checked_offsets("second_offsets", second_offsets)
    losses = np.empty((len(rows), len(columns)))
    with tqdm(total=losses.size, desc=progress, unit="point", leave=False, disable=progress is None) as bar:
        for row, column in np.ndindex(losses.shape):
            losses[row, column] = hessian.loss(at=float(rows[row]) * first + float(columns[column]) * second)
            bar.update()
    return losses


def filter_normalized(model: nn.Module, seed: int = 0) -> Tensor:
    """Return a random direction ``(P,)`` in which each filter is as long as that of the weights.

    It has the type of the weights, but at least float32. It is Gaussian, then scaled filter by filter (Li et al.,
    "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018, arXiv:1712.09913, section 4). Without this scaling, a
    network with normalization looks flatter if its weights are larger. A filter is the weights of one output channel,
    or of one output of a linear layer: an entry of the first dimension. In a transposed convolution it is an entry of
    the second dimension, in one of the groups of the first. Parameters of one dimension (biases, scales of
    normalizations) are not moved, as in their code.

    Args:
        model: Model whose P parameters that require a gradient span the space.
        seed: Seed of the direction, an integer >= 0. A seed gives the same direction on every device.

    Raises:
        ArgumentError: If no parameter that requires a gradient has two dimensions or more, or ``seed`` is out of range.
    """
    generator = torch.Generator().manual_seed(check_integer("seed", seed, minimum=0))
    if all(p.ndim <= 1 for p in model.parameters() if p.requires_grad):
        expected = "one whose trained parameters have filters, that is two dimensions or more"
        raise bad_argument("model", expected, got_text="one without")
    groups = _transposed_groups(model)
    parts = [_like_filters(p.detach(), generator, groups.get(p)) for p in model.parameters() if p.requires_grad]
    return torch.cat([part.flatten() for part in parts])


def _transposed_groups(model: nn.Module) -> dict[Tensor, int]:
    """Return the number of groups by weight of a transposed convolution, also of one with weight or spectral norm."""
    found: dict[Tensor, int] = {}
    for layer in model.modules():
        if isinstance(layer, _ConvTransposeNd):
            shape = (layer.in_channels, layer.out_channels // layer.groups, *layer.kernel_size)
            found |= {p: layer.groups for p in layer.parameters() if p.shape == shape}
    return found


def _like_filters(weights: Tensor, generator: torch.Generator, transposed_groups: int | None) -> Tensor:
    dtype = torch.promote_types(weights.dtype, torch.float32)
    drawn = torch.randn(weights.shape, generator=generator, dtype=torch.float32).to(weights.device, dtype)
    if weights.ndim <= 1:
        return torch.zeros_like(drawn)
    if transposed_groups is None:
        return _with_row_norms(drawn, weights.to(dtype))
    # From (C_in, C_out / G, ...) to (G, C_out / G, C_in / G, ...), a filter being all weights of an output channel.
    shape = (transposed_groups, -1, *weights.shape[1:])
    filters, like = (tensor.reshape(shape).transpose(1, 2) for tensor in (drawn, weights.to(dtype)))
    scaled = _with_row_norms(filters.flatten(0, 1), like.flatten(0, 1))
    return scaled.view(filters.shape).transpose(1, 2).reshape(weights.shape)


def _with_row_norms(drawn: Tensor, like: Tensor) -> Tensor:
    """Scale each entry of the first dimension of ``drawn`` to the norm of that of ``like``."""
    rows = drawn.flatten(1)
    lengths: Tensor = like.flatten(1).norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True)
    return (rows * lengths).view(drawn.shape)


def _checked_direction(name: str, direction: Tensor, hessian: Hessian) -> Tensor:
    if direction.shape != hessian.shape[:1] or not bool(direction.isfinite().all()):
        got = f"one of shape {tuple(direction.shape)}"
        raise bad_argument(name, f"a finite vector of shape {hessian.shape[:1]}", got_text=got)
    return direction.to(hessian.device, hessian.dtype)


def _checked_offsets(name: str, offsets: Sequence[float] | np.ndarray) -> np.ndarray:
    values = np.asarray(offsets, dtype=float)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise bad_argument(name, "finite numbers (A,)", offsets)
    return values
