"""The pictures of a comparison and of a search."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lightning_ssesam.experiments.predictions import DIAGRAMS
from lightning_ssesam.experiments.remarks import diverged_runs, divergence
from lightning_ssesam.experiments.runs import GROUPS, Comparison, Run, by_method
from lightning_ssesam.experiments.tables import seeds_of
from lightning_ssesam.split import ClassSplit

# Okabe and Ito's colours, which colour-blind readers can tell apart. A method has the same one in every picture.
_COLORS = ("#000000", "#56B4E9", "#E69F00", "#D55E00", "#009E73", "#0072B2", "#CC79A7", "#8C8C8C")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p")
# More classes than this are shown in groups of neighbouring ranks.
_MAX_POINTS = 40


class Figure(NamedTuple):
    """A picture of the report.

    Attributes:
        name: Name of its file, without the suffix.
        draw: Function that draws a comparison.
        caption: Function that returns the text below the picture.
        is_small: Whether it takes half of the page's width.
        is_known: Function that says whether the runs hold what the picture shows. Runs of earlier versions may not.
    """

    name: str
    draw: Callable[[Comparison], matplotlib.figure.Figure]
    caption: Callable[[Comparison], str]
    is_small: bool = False
    is_known: Callable[[Comparison], bool] = lambda _: True


def draw_comparison(comparison: Comparison) -> matplotlib.figure.Figure:
    """Draw the accuracy of each class against its rank, and of head and tail over epochs, with deviations over runs."""
    methods = by_method(comparison.runs)
    figure = matplotlib.figure.Figure(figsize=(12, 4.6 + 0.2 * (len(methods) // 6)), layout="constrained")
    per_class, head, tail = figure.subplots(1, 3, width_ratios=(1.3, 1, 1), sharey=True)
    _draw_classes(per_class, methods, comparison.split)
    switch_epoch = None if comparison.gamma is None else comparison.gamma * comparison.epochs
    for ax, group in ((head, "head"), (tail, "tail")):
        _draw_curves(ax, [[run.curves[group] for run in runs] for runs in methods.values()], switch_epoch)
        ax.set_title(f"{group.capitalize()} classes ({comparison.validation_set})")
    per_class.set(title="Every class (test)", ylabel="accuracy in %", ylim=(-2, 102))
    handles, labels = per_class.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False)
    figure.suptitle(f"{comparison.name}: mean over {seeds_of(comparison.runs)}, with one standard deviation")
    return figure


def draw_trade_off(comparison: Comparison) -> matplotlib.figure.Figure:
    """Draw tail accuracy against head accuracy: a small point for each run, a large one for the mean of a method.

    A point of accuracy is as long on both axes. Arrows lead from the mean of the first method to the others.
    """
    methods = by_method(comparison.runs)
    figure = matplotlib.figure.Figure(figsize=(6.4, 6.4), layout="constrained")
    ax = figure.subplots()
    means: list[tuple[float, float]] = []
    for number, (name, runs) in enumerate(methods.items()):
        color, marker = method_style(number)
        head, tail = (100 * np.array([run.accuracy[group] for run in runs]) for group in ("head", "tail"))
        ax.scatter(head, tail, s=14, color=color, marker=marker, alpha=0.5, linewidths=0)
        mean = float(head.mean()), float(tail.mean())
        ax.scatter(*mean, s=70, color=color, marker=marker, edgecolors="white", label=_label(name, runs), zorder=3)
        means.append(mean)
    _draw_changes(ax, means)
    ax.set(xlabel="head accuracy in % (test)", ylabel="tail accuracy in % (test)")
    _equal_scales(ax, *(100 * np.array([run.accuracy[group] for run in comparison.runs]) for group in ("head", "tail")))
    ax.set_title(f"{comparison.name}: every run (small) and the mean over {seeds_of(comparison.runs)}", wrap=True)
    ax.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(len(methods), 4), frameon=False)
    return figure


def draw_confusion(comparison: Comparison) -> matplotlib.figure.Figure:
    """Draw, for each method, which classes the test samples of head and tail are taken for."""
    methods = by_method(comparison.runs)
    figure = matplotlib.figure.Figure(figsize=(10, 1.6 + 0.42 * len(methods)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    names = [_label(*method) for method in methods.items()]
    for ax, group in zip(axes, ("head", "tail"), strict=True):
        start = np.zeros(len(methods))
        for answer, label, color in (
            (group, "the right class", "#009E73"),
            (f"{group}_to_head", "another head class", "#56B4E9"),
            (f"{group}_to_tail", "another tail class", "#E69F00"),
        ):
            values = [[100 * (run.accuracy | run.confusion)[answer] for run in runs] for runs in methods.values()]
            shares = np.array([np.mean(percents) for percents in values])
            bars = ax.barh(names, shares, left=start, color=color, label=label)
            texts = [f"{share:.0f}" if share >= 6 else "" for share in shares]
            ax.bar_label(bars, texts, label_type="center", fontsize=8, color="black")
            start = start + np.nan_to_num(shares)
        ax.set(title=f"Test samples of {group} classes", xlim=(0, 100), xlabel="taken for, in %")
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_curves(comparison: Comparison) -> matplotlib.figure.Figure:
    """Draw the validation accuracy of every group over epochs, with deviations over runs."""
    methods = by_method(comparison.runs)
    figure = matplotlib.figure.Figure(figsize=(12, 6 + 0.2 * (len(methods) // 6)), layout="constrained")
    switch_epoch = None if comparison.gamma is None else comparison.gamma * comparison.epochs
    for ax, group in zip(figure.subplots(2, 3, sharex=True).flat, GROUPS, strict=True):
        _draw_curves(ax, [[run.curves[group] for run in runs] for runs in methods.values()], switch_epoch)
        lowest, highest = ax.get_ylim()
        ax.set(title=group, xlabel="", ylim=(max(-2, lowest - 2), min(102, highest + 2)))
        for line, label in zip(ax.lines, (_label(*method) for method in methods.items()), strict=False):
            line.set_label(label)
    for ax in figure.axes[:: len(GROUPS) // 2]:
        ax.set_ylabel("accuracy in %")
    for ax in figure.axes[len(GROUPS) // 2 :]:
        ax.set_xlabel("epoch")
    lines = figure.axes[0].lines[: len(methods)]
    figure.legend(handles=lines, loc="outside lower center", ncols=min(len(methods), 5), frameon=False)
    return figure


def draw_reliability(comparison: Comparison) -> matplotlib.figure.Figure:
    """Draw accuracy against confidence of each method, for head, tail and all: the bins of all its runs together.

    The size of a point grows with the number of images in its bin.
    """
    methods = by_method(comparison.runs)
    figure = matplotlib.figure.Figure(figsize=(12, 4.9 + 0.2 * (len(methods) // 6)), layout="constrained")
    axes = figure.subplots(1, len(DIAGRAMS), sharey=True)
    for ax, group in zip(axes, DIAGRAMS, strict=True):
        ax.plot([0, 100], [0, 100], color="0.5", linestyle=":", linewidth=1)
        for number, (name, runs) in enumerate(methods.items()):
            color, marker = method_style(number)
            images, confidence, accuracy = _pooled_bins(runs, group)
            style = "-" if number < len(_COLORS) else "--"
            ax.plot(confidence, accuracy, color=color, linestyle=style, linewidth=1, label=_label(name, runs))
            size = 4 + 60 * images / max(1, images.sum())
            ax.scatter(confidence, accuracy, s=size, color=color, marker=marker, linewidths=0)
        ax.set(title=f"{group} (test)", xlabel="confidence in %", xlim=(-2, 102), ylim=(-2, 102), aspect="equal")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy in %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(methods), 5), frameon=False)
    return figure


def _pooled_bins(runs: Sequence[Run], group: str) -> np.ndarray:
    """Return number of images, mean confidence and accuracy in % of the bins that have images, over all runs."""
    bins = [np.array(run.reliability[group]).reshape(-1, 3) for run in runs if group in run.reliability]
    if not bins:
        return np.empty((3, 0))
    images = np.sum([rows[:, 0] for rows in bins], 0)
    sums = np.nansum([rows[:, :1] * rows[:, 1:] for rows in bins], 0)
    is_met = images > 0
    return np.vstack([images[is_met], 100 * (sums[is_met] / images[is_met, None]).T])


def _comparison_caption(comparison: Comparison) -> str:
    switch = "" if comparison.gamma is None else " The dashed line is the switch to stage 2."
    return (
        "Left: test accuracy of every class, the largest first; tail classes on grey. Right: accuracy of head and tail"
        f" on the {comparison.validation_set} set over the epochs; bands are one standard deviation over seeds.{switch}"
        f"{_divergence_caption(comparison)}"
    )


def _trade_off_caption(comparison: Comparison) -> str:
    return (
        "Tail accuracy against head accuracy of each method. Up and to the right is better. Arrows lead from the first"
        " method to the others. A point of accuracy is as long on both axes."
        f"{_divergence_caption(comparison)}"
    )


def _confusion_caption(comparison: Comparison) -> str:
    return (
        "How test samples of head and tail classes are classified. Every class counts the same."
        f"{_divergence_caption(comparison)}"
    )


def _curves_caption(comparison: Comparison) -> str:
    return (
        f"Accuracy of each group on the {comparison.validation_set} set over the epochs. Bands are one standard"
        f" deviation over seeds.{_divergence_caption(comparison)}"
    )


def _reliability_caption(comparison: Comparison) -> str:
    return (
        "Reliability: how often predictions of a confidence are right. On the dotted line, the probability of a"
        " prediction is the share that is right. Below it, a method is too sure. Large points hold many test images."
        f"{_divergence_caption(comparison)}"
    )


def _has_reliability(comparison: Comparison) -> bool:
    return any(run.reliability for run in comparison.runs)


FIGURES = (
    Figure("comparison", draw_comparison, _comparison_caption),
    Figure("trade_off", draw_trade_off, _trade_off_caption, is_small=True),
    Figure("confusion", draw_confusion, _confusion_caption),
    Figure("curves", draw_curves, _curves_caption),
    Figure("reliability", draw_reliability, _reliability_caption, is_known=_has_reliability),
)
"""The pictures of the report, in their order. To add one, write a function that draws it, and add an entry."""


def draw_sweep(methods: Mapping[str, Sequence[Mapping[str, float]]]) -> matplotlib.figure.Figure:
    """Draw head and tail accuracy of the trials of each method, its best trial first. Accuracies are in [0, 1]."""
    figure = matplotlib.figure.Figure(figsize=(6.4, 5.2), layout="constrained")
    ax = figure.subplots()
    for number, (name, trials) in enumerate(methods.items()):
        color, marker = method_style(number)
        head, tail = (100 * np.array([trial[group] for trial in trials]) for group in ("head", "tail"))
        ax.scatter(head, tail, s=24, color=color, marker=marker, alpha=0.6, linewidths=0, label=_label(name))
        ax.scatter(head[:1], tail[:1], s=120, color=color, marker=marker, edgecolors="white", zorder=3)
    ax.set(xlabel="head accuracy in % (validation)", ylabel="tail accuracy in % (validation)")
    ax.set_title("Every trial that ended (small) and the best of each method")
    # A point counts the same on both axes.
    ax.set_aspect("equal", adjustable="datalim")
    ax.margins(0.1)
    ax.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(len(methods), 4), frameon=False)
    return figure


def method_style(number: int) -> tuple[str, str]:
    """Return the colour and the marker of a method by its number."""
    return _COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)]


def _label(name: str, runs: Sequence[Run] = ()) -> str:
    """Return a method's name, and how many of its runs diverged.

    Matplotlib does not read it as a formula, nor leave it out of the legend.
    """
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$") + divergence(runs)


def _draw_changes(ax: Axes, means: Sequence[tuple[float, float]]) -> None:
    """Draw an arrow from the first of several means to each other, and lines through the first one."""
    (head, tail), *others = means
    if not np.isfinite([head, tail]).all() or not others:
        return
    ax.axvline(head, color="0.5", linewidth=0.8, linestyle=":")
    ax.axhline(tail, color="0.5", linewidth=0.8, linestyle=":")
    for number, mean in enumerate(others, start=1):
        if np.isfinite(mean).all() and mean != (head, tail):
            arrow = {"arrowstyle": "->", "color": method_style(number)[0], "shrinkA": 4, "shrinkB": 4, "alpha": 0.8}
            ax.annotate("", mean, (head, tail), arrowprops=arrow)


def _equal_scales(ax: Axes, head: np.ndarray, tail: np.ndarray) -> None:
    """Show all points, with a square range, so that a point of accuracy is as long on both axes."""
    ax.set_aspect("equal")
    finite = [values[np.isfinite(values)] for values in (head, tail)]
    if not all(map(len, finite)):
        return
    half = max(1.0, *(0.6 * float(np.ptp(values)) for values in finite))
    # There is nothing above 100 %.
    head_middle, tail_middle = (min(float(v.max() + v.min()) / 2, 100 - 0.8 * half) for v in finite)
    ax.set(xlim=(head_middle - half, head_middle + half), ylim=(tail_middle - half, tail_middle + half))


def _divergence_caption(comparison: Comparison) -> str:
    diverged = diverged_runs(comparison.runs)
    return f" Diverged: {diverged}." if diverged else ""


def _draw_classes(ax: Axes, methods: dict[str, list[Run]], split: ClassSplit) -> None:
    counts = split.class_counts.numpy()
    order = np.argsort(-counts, kind="stable")
    groups = np.array_split(order, min(len(order), _MAX_POINTS))
    ranks = np.array([ranks.mean() for ranks in np.array_split(np.arange(len(order)), len(groups))])
    is_tail = split.tail.numpy()[order]
    if is_tail.any():
        first = int(np.argmax(is_tail))
        ax.axvspan(first - 0.5, len(order) - 0.5, color="0.5", alpha=0.15, linewidth=0, label="tail classes")
    for number, (name, runs) in enumerate(methods.items()):
        color, marker = method_style(number)
        shift = 0.24 * ((number + 0.5) / len(methods) - 0.5) * len(order) / len(groups)
        recalls = [[_nanmean(np.array(run.class_recalls)[group]) for group in groups] for run in runs]
        mean, spread = _mean_and_spread(recalls)
        ax.errorbar(ranks + shift, mean, spread, marker=marker, color=color, label=_label(name, runs), capsize=2)
    # There is room for about twelve labels.
    shown = np.arange(len(order))[:: max(1, len(order) // 12)]
    ax.set_xticks(shown, [f"{count:,}" for count in counts[order][shown]], rotation=0 if len(order) <= 12 else 45)
    ax.set(xlim=(-0.5, len(order) - 0.5), xlabel="training samples of the class, by rank")
    ax.grid(alpha=0.3)


def _draw_curves(ax: Axes, methods: Sequence[Sequence[list[float]]], switch_epoch: float | None) -> None:
    for number, curves in enumerate(methods):
        color = method_style(number)[0]
        mean, spread = _mean_and_spread(curves)
        epochs = np.arange(1, len(mean) + 1)
        # Dashes tell apart methods of the same colour. A single epoch makes no line.
        style = "-" if number < len(_COLORS) else "--"
        ax.plot(epochs, mean, color=color, linestyle=style, marker="." if len(mean) == 1 else None)
        ax.fill_between(epochs, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
    if switch_epoch is not None:
        ax.axvline(switch_epoch, color="0.5", linestyle="--", linewidth=1)
        side = "left" if switch_epoch < ax.get_xlim()[1] / 2 else "right"
        place, coordinates = (switch_epoch, 0.02), ("data", "axes fraction")
        ax.annotate(" stage 2 ", place, xycoords=coordinates, ha=side, va="bottom", color="0.5")
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
