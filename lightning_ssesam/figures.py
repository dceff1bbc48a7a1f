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

# Okabe and Ito's colours, which stay apart for colour-blind readers; a method has the same one in every picture.
_STYLES = {
    "ERM": ("#000000", "o"),
    "SAM": ("#56B4E9", "s"),
    "ImbSAM": ("#E69F00", "^"),
    "SSESAM": ("#D55E00", "D"),
}


def draw_comparison(runs: list[Run], split: ClassSplit, switch_epoch: float | None, title: str, path: Path) -> Path:
    """Draw per-class accuracy against class size, and head and tail accuracy over epochs.

    Args:
        runs: The runs to show; those of one method are averaged, with their standard deviation as bars and bands.
        split: The class split of the training set.
        switch_epoch: Epoch at which stage 2 begins, or None where no method has stages.
        title: Heading of the picture.
        path: The PNG to write.

    Returns:
        ``path``.

    """
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    per_class, head, tail = figure.subplots(1, 3, width_ratios=(1.3, 1, 1), sharey=True)
    methods: dict[str, list[Run]] = {}
    for run in runs:
        methods.setdefault(run.method, []).append(run)
    _draw_classes(per_class, methods, split)
    _draw_curves(head, {name: [run.head_curve for run in of] for name, of in methods.items()}, switch_epoch)
    _draw_curves(tail, {name: [run.tail_curve for run in of] for name, of in methods.items()}, switch_epoch)
    per_class.set(title="Every class (test)", ylabel="accuracy in %", ylim=(-2, 102))
    head.set_title("Head classes (validation)")
    tail.set_title("Tail classes (validation)")
    handles, labels = per_class.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    return path


def _draw_classes(ax: Axes, methods: dict[str, list[Run]], split: ClassSplit) -> None:
    order = np.argsort(-split.class_counts.numpy(), kind="stable")
    ranks = np.arange(len(order))
    num_head = int(split.head.sum())
    ax.axvspan(num_head - 0.5, len(order) - 0.5, color="0.93", label="tail classes")
    for (name, runs), shift in zip(methods.items(), np.linspace(-0.12, 0.12, len(methods)), strict=True):
        color, marker = _STYLES[name]
        mean, spread = _mean_and_spread([run.class_recalls for run in runs])
        ax.errorbar(ranks + shift, mean[order], spread[order], marker=marker, color=color, label=name, capsize=2)
    # At most some twelve labels fit.
    shown = ranks[:: max(1, len(ranks) // 12)]
    ax.set_xticks(shown, [str(count) for count in split.class_counts.numpy()[order][shown]])
    ax.set_xlim(-0.5, len(order) - 0.5)
    ax.set_xlabel("training samples of the class")
    ax.grid(alpha=0.3)


def _draw_curves(ax: Axes, curves: dict[str, list[list[float]]], switch_epoch: float | None) -> None:
    for name, runs in curves.items():
        color = _STYLES[name][0]
        mean, spread = _mean_and_spread(runs)
        epochs = np.arange(1, len(mean) + 1)
        ax.plot(epochs, mean, color=color)
        ax.fill_between(epochs, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
    if switch_epoch is not None:
        ax.axvline(switch_epoch, color="0.4", linestyle="--", linewidth=1)
        ax.annotate(
            " SSESAM: stage 2",
            (switch_epoch, 0.02),
            xycoords=("data", "axes fraction"),
            ha="left" if switch_epoch < ax.get_xlim()[1] / 2 else "right",
            va="bottom",
            color="0.3",
        )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("epoch")
    ax.grid(alpha=0.3)


def _mean_and_spread(accuracies: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over runs and the sample standard deviation, 0 for a single run, in percent."""
    values = 100 * np.array(accuracies)
    return values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
