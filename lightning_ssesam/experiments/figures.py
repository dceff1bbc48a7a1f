"""The pictures of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_ssesam.experiments.tables import by_method
from lightning_ssesam.split import ClassSplit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_ssesam.experiments.runs import Run

# Okabe and Ito's colours, which stay apart for colour-blind readers; a method has the same one in every picture.
_COLORS = ("#000000", "#56B4E9", "#E69F00", "#D55E00", "#009E73", "#0072B2", "#CC79A7", "#8C8C8C")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p")
# More classes than this are shown in as many groups of neighbouring ranks.
_MOST_POINTS = 40


def method_style(number: int) -> tuple[str, str]:
    """Return color and marker of the method of this number."""
    return _COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)]


def _label(name: str) -> str:
    """Return a method's name such that matplotlib takes it for no formula, and leaves it in the legend."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def draw_comparison(
    runs: Sequence[Run],
    split: ClassSplit,
    switch_epoch: float | None,
    title: str,
    path: Path,
    validation: str = "validation",
) -> Path:
    """Draw per-class accuracy against class rank, and head and tail accuracy over epochs.

    Args:
        runs: The runs to show; those of one method are averaged, with their standard deviation as bars and bands.
        split: The class split of the training set.
        switch_epoch: Epoch at which stage 2 begins, or None where no method has stages.
        title: Heading of the picture.
        path: The PNG to write.
        validation: The set that the curves are on.

    Returns:
        ``path``.

    """
    methods = by_method(runs)
    figure = Figure(figsize=(12, 4.6 + 0.2 * (len(methods) // 6)), layout="constrained")
    per_class, head, tail = figure.subplots(1, 3, width_ratios=(1.3, 1, 1), sharey=True)
    _draw_classes(per_class, methods, split)
    for ax, group in ((head, "head"), (tail, "tail")):
        _draw_curves(ax, {name: [run.curves[group] for run in of] for name, of in methods.items()}, switch_epoch)
        ax.set_title(f"{group.capitalize()} classes ({validation})")
    per_class.set(title="Every class (test)", ylabel="accuracy in %", ylim=(-2, 102))
    handles, labels = per_class.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    return path


def draw_trade_off(runs: Sequence[Run], title: str, path: Path) -> Path:
    """Draw the tail's test accuracy against the head's: a small point for every run, a large one for a method's mean.

    Args:
        runs: The runs to show.
        title: Heading of the picture.
        path: The PNG to write.

    Returns:
        ``path``.

    """
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    ax = figure.subplots()
    for number, (name, of) in enumerate(by_method(runs).items()):
        color, marker = method_style(number)
        head, tail = (100 * np.array([run.accuracy[group] for run in of]) for group in ("head", "tail"))
        ax.scatter(head, tail, s=14, color=color, marker=marker, alpha=0.5, linewidths=0)
        ax.scatter(
            head.mean(), tail.mean(), s=90, color=color, marker=marker, edgecolors="white", label=_label(name), zorder=3
        )
    ax.set(xlabel="head accuracy in % (test)", ylabel="tail accuracy in % (test)")
    ax.set_title(title, wrap=True)
    ax.margins(0.1)
    ax.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(len(by_method(runs)), 4), frameon=False)
    figure.savefig(path, dpi=150)
    return path


def draw_confusion(runs: Sequence[Run], path: Path) -> Path:
    """Draw for every method what the head's and the tail's test samples are taken for.

    Args:
        runs: The runs to show; those of one method are averaged.
        path: The PNG to write.

    Returns:
        ``path``.

    """
    methods = by_method(runs)
    figure = Figure(figsize=(10, 1.6 + 0.42 * len(methods)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, group in zip(axes, ("head", "tail"), strict=True):
        shares = [
            [np.mean([100 * run.accuracy[group] for run in of]) for of in methods.values()],
            *(
                [np.mean([100 * run.confusion[f"{group}_to_{to}"] for run in of]) for of in methods.values()]
                for to in ("head", "tail")
            ),
        ]
        left = np.zeros(len(methods))
        labels = ("the right class", "another head class", "another tail class")
        for values, label, color in zip(shares, labels, ("#009E73", "#56B4E9", "#E69F00"), strict=True):
            bars = ax.barh([_label(name) for name in methods], values, left=left, color=color, label=label)
            ax.bar_label(bars, [f"{v:.0f}" if v >= 6 else "" for v in values], label_type="center", fontsize=8)
            left = left + np.nan_to_num(np.array(values))
        ax.set(title=f"Test samples of {group} classes", xlim=(0, 100), xlabel="taken for, in %")
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
    return path


def draw_sweep(trials: Sequence[dict[str, float]], path: Path) -> Path:
    """Draw the head's and the tail's validation accuracy of the trials of a search.

    Args:
        trials: Of each the accuracies of head, tail and all, in [0, 1]; the best one first.
        path: The PNG to write.

    Returns:
        ``path``.

    """
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    ax = figure.subplots()
    head, tail, everything = (100 * np.array([trial[group] for trial in trials]) for group in ("head", "tail", "all"))
    points = ax.scatter(head, tail, c=everything, cmap="viridis")
    ax.scatter(head[:1], tail[:1], s=160, facecolors="none", edgecolors="#D55E00", linewidths=2, label="the best")
    figure.colorbar(points, label="accuracy of all classes in % (validation)")
    ax.set(xlabel="head accuracy in % (validation)", ylabel="tail accuracy in % (validation)")
    ax.set_title(f"Every one of {len(trials)} trials that ended")
    ax.legend()
    ax.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    return path


def _draw_classes(ax: Axes, methods: dict[str, list[Run]], split: ClassSplit) -> None:
    counts = split.class_counts.numpy()
    order = np.argsort(-counts, kind="stable")
    groups = np.array_split(order, min(len(order), _MOST_POINTS))
    ranks = np.array([ranks.mean() for ranks in np.array_split(np.arange(len(order)), len(groups))])
    is_tail = split.tail.numpy()[order]
    if is_tail.any():
        first = int(np.argmax(is_tail))
        ax.axvspan(first - 0.5, len(order) - 0.5, color="0.93", label="tail classes")
    for number, (name, runs) in enumerate(methods.items()):
        color, marker = method_style(number)
        shift = 0.24 * ((number + 0.5) / len(methods) - 0.5) * len(order) / len(groups)
        recalls = [[_nanmean(np.array(run.class_recalls)[group]) for group in groups] for run in runs]
        mean, spread = _mean_and_spread(recalls)
        ax.errorbar(ranks + shift, mean, spread, marker=marker, color=color, label=_label(name), capsize=2)
    # At most some twelve labels fit.
    shown = np.arange(len(order))[:: max(1, len(order) // 12)]
    ax.set_xticks(shown, [f"{count:,}" for count in counts[order][shown]], rotation=0 if len(order) <= 12 else 45)
    ax.set_xlim(-0.5, len(order) - 0.5)
    ax.set_xlabel("training samples of the class, by rank")
    ax.grid(alpha=0.3)


def _draw_curves(ax: Axes, curves: dict[str, list[list[float]]], switch_epoch: float | None) -> None:
    for number, runs in enumerate(curves.values()):
        color = method_style(number)[0]
        mean, spread = _mean_and_spread(runs)
        epochs = np.arange(1, len(mean) + 1)
        # More methods than colors.
        ax.plot(epochs, mean, color=color, linestyle="-" if number < len(_COLORS) else "--")
        ax.fill_between(epochs, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
    if switch_epoch is not None:
        ax.axvline(switch_epoch, color="0.4", linestyle="--", linewidth=1)
        ax.annotate(
            " stage 2 ",
            (switch_epoch, 0.02),
            xycoords=("data", "axes fraction"),
            ha="left" if switch_epoch < ax.get_xlim()[1] / 2 else "right",
            va="bottom",
            color="0.3",
        )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("epoch")
    ax.grid(alpha=0.3)


def _nanmean(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else float("nan")


def _mean_and_spread(accuracies: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over runs and the sample standard deviation, 0 for a single run, in percent."""
    values = 100 * np.array(accuracies)
    return values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
