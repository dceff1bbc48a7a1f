"""The picture of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_ssesam.split import ClassSplit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_ssesam.compare import Run

# Okabe and Ito's colours, which stay apart for colour-blind readers.
_COLORS = ("#000000", "#56B4E9", "#E69F00", "#D55E00", "#009E73", "#CC79A7")
_MARKERS = ("o", "s", "^", "D", "v", "P")


def draw_comparison(runs: list[Run], split: ClassSplit, switch_epoch: float | None, path: Path) -> Path:
    """Draw per-class accuracy against class size, and head and tail accuracy over epochs.

    Args:
        runs: The runs to show; those of one method are averaged, with their standard deviation as a band.
        split: The class split of the training set.
        switch_epoch: Epoch at which stage 2 begins, or None where no method has stages.
        path: The PNG to write.

    Returns:
        ``path``.

    """
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    per_class, head, tail = figure.subplots(1, 3, width_ratios=(1.35, 1, 1))
    methods: dict[str, list[Run]] = {}
    for run in runs:
        methods.setdefault(run.method, []).append(run)
    _draw_classes(per_class, methods, split)
    _draw_curves(head, {name: [run.head_curve for run in of] for name, of in methods.items()}, switch_epoch)
    _draw_curves(tail, {name: [run.tail_curve for run in of] for name, of in methods.items()}, switch_epoch)
    head.set_title("Head classes, validation")
    tail.set_title("Tail classes, validation")
    per_class.legend(loc="lower left")
    figure.savefig(path, dpi=120)
    return path


def _draw_classes(ax: Axes, methods: dict[str, list[Run]], split: ClassSplit) -> None:
    order = np.argsort(-split.class_counts.numpy(), kind="stable")
    ranks = np.arange(len(order))
    num_head = int(split.head.sum())
    ax.axvspan(num_head - 0.5, len(order) - 0.5, color="0.93", label="tail classes")
    for (name, runs), color, marker in zip(methods.items(), _COLORS, _MARKERS, strict=False):
        recalls = 100 * np.array([run.class_recalls for run in runs])[:, order]
        ax.plot(ranks, recalls.mean(0), marker=marker, color=color, label=name, alpha=0.85)
    # At most some twelve labels fit.
    shown = ranks[:: max(1, len(ranks) // 12)]
    ax.set_xticks(shown, [str(count) for count in split.class_counts.numpy()[order][shown]])
    ax.set_xlim(-0.5, len(order) - 0.5)
    ax.set(title="Accuracy of every class, test", xlabel="training samples of the class", ylabel="accuracy in %")
    ax.grid(alpha=0.3)


def _draw_curves(ax: Axes, curves: dict[str, list[list[float]]], switch_epoch: float | None) -> None:
    for (name, runs), color in zip(curves.items(), _COLORS, strict=False):
        values = 100 * np.array(runs)
        mean, spread = values.mean(0), values.std(0)
        epochs = np.arange(1, len(mean) + 1)
        ax.plot(epochs, mean, color=color, label=name)
        ax.fill_between(epochs, mean - spread, mean + spread, color=color, alpha=0.1, linewidth=0)
    if switch_epoch is not None:
        ax.axvline(switch_epoch, color="0.4", linestyle="--", linewidth=1)
        ax.annotate(
            "SSESAM: stage 2",
            (switch_epoch, 0.03),
            xycoords=("data", "axes fraction"),
            rotation=90,
            ha="right",
            va="bottom",
            color="0.3",
        )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="epoch", ylabel="accuracy in %")
    ax.grid(alpha=0.3)
