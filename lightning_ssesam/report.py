"""The report of a comparison: tables, pictures, and one HTML file that holds them all."""

import base64
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jinja2 import Environment, StrictUndefined

import lightning_ssesam
from lightning_ssesam.data import LongTailDataModule
from lightning_ssesam.figures import draw_comparison, draw_confusion, draw_trade_off
from lightning_ssesam.runs import GROUPS, Run
from lightning_ssesam.split import ClassSplit
from lightning_ssesam.tables import (
    by_method,
    differences,
    diverged_runs,
    format_difference,
    markdown_table,
    seeds_of,
    spread,
    write_runs,
    write_summary,
)


@dataclass(frozen=True)
class Comparison:
    """All that a report is made of.

    Attributes:
        runs: The runs, method by method.
        split: The class split of the training set.
        data: The data module.
        epochs: Length of each training.
        gamma: Share of the training after which stage 2 begins, or None where no method is switched there.
        config: The configuration that repeats it, as YAML, if there is one.

    """

    runs: Sequence[Run]
    split: ClassSplit
    data: LongTailDataModule
    epochs: int
    gamma: float | None = None
    config: str | None = None


def write_report(comparison: Comparison, folder: Path) -> list[Path]:
    """Write report.html and the files it is made of to a folder. Return their paths, the report first.

    The HTML file holds its pictures and styles itself: it can be sent to somebody, and opens without a network.
    """
    runs, name = comparison.runs, type(comparison.data).__name__
    title = f"{name}: mean over {seeds_of(runs)}, with one standard deviation"
    switch = None if comparison.gamma is None else comparison.gamma * comparison.epochs
    validation = _validation_set(comparison)
    write_runs(runs, folder / "results.csv")
    write_summary(runs, folder / "summary.csv")
    (folder / "table.md").write_text(markdown_table(runs, validation), encoding="utf-8")
    pictures = [
        draw_comparison(runs, comparison.split, switch, title, folder / "comparison.png", validation),
        draw_trade_off(runs, f"{name}: every run (small) and the mean over {seeds_of(runs)}", folder / "trade_off.png"),
        draw_confusion(runs, folder / "confusion.png"),
    ]
    report = folder / "report.html"
    report.write_text(_render(comparison, name, pictures), encoding="utf-8")
    return [report, *pictures, folder / "results.csv", folder / "summary.csv", folder / "table.md"]


def _render(comparison: Comparison, name: str, pictures: Sequence[Path]) -> str:
    runs, split = comparison.runs, comparison.split
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("lightning_ssesam.templates") / "report.html").read_text("utf-8"))
    return template.render(
        name=name,
        facts=_facts(comparison),
        groups=GROUPS,
        seeds=seeds_of(runs),
        validation=_validation_set(comparison),
        summary={
            method: {
                "last": {group: spread([run.accuracy[group] for run in of]) for group in GROUPS},
                "best": {group: spread([run.best[group] for run in of]) for group in GROUPS},
            }
            for method, of in by_method(runs).items()
        },
        baseline=next(iter(by_method(runs))),
        differences={
            method: {group: (format_difference(d), d.is_significant, d.mean > 0) for group, d in of_group.items()}
            for method, of_group in differences(runs).items()
        },
        diverged=diverged_runs(runs),
        runs=runs,
        pictures=[
            (base64.b64encode(picture.read_bytes()).decode(), picture.stem == "trade_off", caption)
            for picture, caption in zip(pictures, _captions(comparison), strict=True)
        ],
        num_tail=int(split.tail.sum()),
        config=comparison.config,
    )


def _facts(comparison: Comparison) -> dict[str, Any]:
    split, counts = comparison.split, comparison.split.class_counts
    seconds = sum(run.seconds for run in comparison.runs)
    devices = ", ".join(sorted({run.device for run in comparison.runs} - {""}))
    return {
        "Training samples": f"{int(counts.sum()):,} of {split.num_classes:,} classes, {int(counts.max()):,} of the"
        f" largest and {int(counts.min()):,} of the smallest",
        "Tail": f"{int(split.tail.sum()):,} classes with {int(counts[split.tail].sum()):,} samples",
        "Many, medium, few": f"{int(split.many.sum()):,} classes with more than {split.many_above} training samples,"
        f" {int(split.medium.sum()):,} between, {int(split.few.sum()):,} with fewer than {split.few_below}",
        "Training": f"{comparison.epochs} epochs"
        + ("" if comparison.gamma is None else f", stage 2 after {100 * comparison.gamma:g} % of them"),
        "Made with": f"lightning-ssesam {lightning_ssesam.__version__}, torch {torch.__version__}, lightning"
        f" {pl.__version__}, Python {platform.python_version()}" + (f", on {devices}" if devices else ""),
        "Time": f"{seconds / 60:.1f} minutes of training, summed over the runs",
    }


def _validation_set(comparison: Comparison) -> str:
    return "test" if comparison.data.val_is_test else "validation"


def _captions(comparison: Comparison) -> tuple[str, str, str]:
    switched = " The dashed line is the switch to stage 2." if comparison.gamma is not None else ""
    return (
        "Left: test accuracy of every class, the largest first; tail classes on grey. Right: accuracy of head and tail"
        f" on the {_validation_set(comparison)} set over the epochs; bands are one standard deviation over"
        f" seeds.{switched}",
        "What a method gains on the tail and what it pays on the head. Up and to the right is better.",
        "Where the errors go: what the test samples of head and of tail classes are taken for; every class counts the"
        " same.",
    )
