"""Pictures of the curvature: spectra, and landscapes of the loss. They show the first six groups; the table has all."""

import math
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from lightning_ssesam.curvature.lanczos import SpectralDensity
from lightning_ssesam.curvature.landscape import EigenLine
from lightning_ssesam.curvature.measure import Curvature

# Okabe and Ito's blue and vermilion, for positive and negative curvature.
_UP, _DOWN = "#0072B2", "#D55E00"
_MAX_GROUPS = 6
# Standard deviation of the smoothing, in decades of the eigenvalue.
_WIDTH = 0.15


def asinh_density(
    density: SpectralDensity, scale: float, width: float = _WIDTH, points: int = 1001
) -> tuple[np.ndarray, np.ndarray]:
    """Return a spectral density on an axis that is linear around 0 and logarithmic far from it, on both sides.

    The coordinate is u = asinh(eigenvalue / scale) / ln 10; far beyond ``scale``, a unit of u is a decade. The density
    is smoothed in u. It is the share of the eigenvalues per unit of u, and integrates to 1 over u.

    Args:
        density: The spectral density.
        scale: Eigenvalue up to which the axis is about linear, a number > 0.
        width: Standard deviation of the smoothing, in u, a number > 0.
        points: Number of points of the grid, an integer >= 2.

    Returns:
        Eigenvalues ``(G,)``, ascending and evenly spaced in u, and the density there, ``(G,)``.
    """
    on_axis = SpectralDensity([_to_axis(nodes, scale) for nodes in density.nodes], density.weights)
    coordinates = np.concatenate(on_axis.nodes)
    grid = np.linspace(coordinates.min() - 5 * width, coordinates.max() + 5 * width, points)
    return _from_axis(grid, scale), on_axis(grid, width)


def draw_spectra(measured: Mapping[str, Mapping[str, Curvature]], path: Path) -> Path:
    """Draw the spectral densities of the groups, one below the other, with a column for each checkpoint.

    The axis of the eigenvalues is that of :func:`asinh_density`, because outliers are hundreds of times larger than the
    bulk. The density is on a log scale, down to less than a single eigenvalue. Dotted lines mark the ends of the
    spectrum. Waves near 0 come from the distances between Ritz values; the spectrum does not have them.

    Args:
        measured: Result of :func:`measure_curvature`, with densities, by the title of the checkpoint. The first six
            groups are shown.
        path: PNG file to write; it is returned.
    """
    columns = {title: dict(islice(groups.items(), _MAX_GROUPS)) for title, groups in measured.items()}
    names = list(next(iter(columns.values())))
    shown = [curvature for groups in columns.values() for curvature in groups.values()]
    # A tenth of the geometric mean of the smallest eigenvalues, so that the negative side has a decade.
    sizes = [max(abs(c.eigenvalues.smallest), 1e-3 * abs(c.eigenvalues.largest)) or 1.0 for c in shown]
    scale = 0.1 * math.exp(float(np.mean(np.log(sizes))))
    figure = Figure(figsize=(1.2 + 5.6 * len(columns), 1.1 + 2.1 * len(names)), layout="constrained")
    grid = figure.subplots(len(names), len(columns), sharex=True, sharey=True, squeeze=False)
    for column, (title, groups) in enumerate(columns.items()):
        for ax, (name, curvature) in zip(grid[:, column], groups.items(), strict=True):
            _draw_spectrum(ax, curvature, scale)
            ends = curvature.eigenvalues
            heading = f"{name}: from {_short(ends.smallest)} to {_short(ends.largest)}"
            ax.set_title(f"{title}\n{heading}" if ax is grid[0, column] else heading, fontsize=10)
    single = 1 / shown[0].eigenvalues.vectors[0].numel() / (_WIDTH * math.sqrt(2 * math.pi))
    grid[0, 0].set_ylim(0.3 * single, 10)
    _set_asinh_scale(grid[0, 0], shown, scale)
    figure.supxlabel("eigenvalue of the Hessian", fontsize=10)
    figure.supylabel("share of the eigenvalues per decade", fontsize=10)
    figure.savefig(path, dpi=150)
    return path


def draw_lines(lines: Mapping[str, tuple[EigenLine, EigenLine]], title: str, path: Path) -> Path:
    """Draw each group's loss along the eigenvectors of its smallest and its largest eigenvalue, groups side by side.

    A dashed line is the quadratic that slope and eigenvalue predict.

    Args:
        lines: The two lines of :func:`eigen_lines` by group. The first six groups are shown.
        title: Heading of the picture.
        path: PNG file to write; it is returned.
    """
    shown = dict(islice(lines.items(), _MAX_GROUPS))
    figure = Figure(figsize=(0.6 + 3.6 * len(shown), 6.2), layout="constrained")
    grid = figure.subplots(2, len(shown), squeeze=False)
    for column, (group, both_ends) in enumerate(shown.items()):
        for row, (end, line) in enumerate(zip(("smallest", "largest"), both_ends, strict=True)):
            ax, color = grid[row, column], _DOWN if line.eigenvalue < 0 else _UP
            ax.plot(line.offsets, line.losses, color=color, marker="o", markersize=3, label="measured")
            ax.plot(line.offsets, line.quadratic, color="0.35", linestyle="--", label="quadratic model")
            ax.plot(0, line.loss, color="black", marker="+", markersize=11, markeredgewidth=1.8)
            ax.set_title(f"{group}: {end} eigenvalue {_short(line.eigenvalue)}", fontsize=10)
            ax.set_xlabel("distance along its eigenvector")
            ax.grid(alpha=0.3)
    for ax in grid[:, 0]:
        ax.set_ylabel("mean loss of the group")
    grid[0, 0].legend(fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)
    return path


def draw_planes(losses: Mapping[str, np.ndarray], offsets: np.ndarray, title: str, path: Path) -> Path:
    """Draw each group's loss over the same plane, side by side, as contours with common levels.

    Args:
        losses: Losses ``(A, A)`` of :func:`plane` by group. The first six groups are shown.
        offsets: Offsets ``(A,)`` in both directions.
        title: Heading of the picture.
        path: PNG file to write; it is returned.
    """
    shown = {group: np.ma.masked_invalid(values) for group, values in islice(losses.items(), _MAX_GROUPS)}
    levels, norm = _levels(shown)
    figure = Figure(figsize=(1.2 + 3.7 * len(shown), 4.2), layout="constrained")
    axes = figure.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
    for ax, (group, values) in zip(axes, shown.items(), strict=True):
        filled = ax.contourf(offsets, offsets, values.T, levels=levels, norm=norm, cmap="viridis")
        ax.contour(offsets, offsets, values.T, levels=levels, norm=norm, colors="white", linewidths=0.4)
        ax.plot(0, 0, color="white", marker="+", markersize=13, markeredgewidth=3.5)
        ax.plot(0, 0, color="black", marker="+", markersize=11, markeredgewidth=1.5)
        ax.set_title(group, fontsize=10)
        ax.set_aspect("equal")
    bar = figure.colorbar(filled, ax=list(axes), label="mean loss of the group", shrink=0.9)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.set_ticks(list(levels[::3]), labels=[_short(level) for level in levels[::3]])
    figure.supxlabel("first direction, in norms of the filters", fontsize=10)
    figure.supylabel("second direction", fontsize=10)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)
    return path


def _draw_spectrum(ax: Axes, curvature: Curvature, scale: float) -> None:
    assert curvature.density is not None
    eigenvalues, values = asinh_density(curvature.density, scale)
    for color, part in ((_UP, eigenvalues >= 0), (_DOWN, eigenvalues <= 0)):
        ax.fill_between(eigenvalues[part], values[part], 1e-12, color=color, alpha=0.25, linewidth=0)
        ax.plot(eigenvalues[part], values[part], color=color, linewidth=1.4)
    ax.axvline(0, color="black", linewidth=0.8)
    for value in (curvature.eigenvalues.smallest, curvature.eigenvalues.largest):
        ax.axvline(value, color=_DOWN if value < 0 else _UP, linestyle=":", linewidth=1.4)
    ax.set_yscale("log")
    ax.grid(alpha=0.3)


def _set_asinh_scale(ax: Axes, shown: list[Curvature], scale: float) -> None:
    ax.set_xscale("asinh", linear_width=scale)
    ends = [end for c in shown for end in (c.eigenvalues.smallest, c.eigenvalues.largest)]
    limits = _to_axis(np.array([min(ends), max(ends)]), scale) + 4 * _WIDTH * np.array([-1, 1])
    ax.set_xlim(*_from_axis(limits, scale))
    powers = 10.0 ** np.arange(math.ceil(math.log10(scale)), math.ceil(math.log10(max(scale, *map(abs, ends)))) + 1)
    # The labels of powers that are closer to 0 than half a decade would overlap with that of 0.
    powers = powers[_to_axis(powers, scale) > 0.45]
    ax.xaxis.set_major_locator(FixedLocator([*-powers[::-1], 0, *powers]))
    ax.xaxis.set_minor_locator(NullLocator())


def _to_axis(eigenvalues: np.ndarray, scale: float) -> np.ndarray:
    return np.asarray(np.arcsinh(eigenvalues / scale) / math.log(10))


def _from_axis(coordinates: np.ndarray, scale: float) -> np.ndarray:
    return np.asarray(np.sinh(coordinates * math.log(10)) * scale)


def _levels(shown: Mapping[str, Any]) -> tuple[np.ndarray, LogNorm | None]:
    low, high = min(float(v.min()) for v in shown.values()), max(float(v.max()) for v in shown.values())
    if low > 0 and high > 10 * low:
        return np.geomspace(low, high, 19), LogNorm(low, high)
    return np.linspace(low, high if high > low else low + 1, 19), None


def _short(value: float) -> str:
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}")
