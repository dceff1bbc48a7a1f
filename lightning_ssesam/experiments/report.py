"""The report of a comparison: tables, pictures, and one HTML file that holds them all."""

import base64
import platform
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jinja2 import Environment, StrictUndefined

from lightning_ssesam import _version
from lightning_ssesam.experiments import class_table, tables
from lightning_ssesam.experiments.figures import FIGURES
from lightning_ssesam.experiments.files import replaced, write_text
from lightning_ssesam.experiments.intervals import FEW_IMAGES
from lightning_ssesam.experiments.remarks import FITTED, ONE_SEED, describe_images, divergence, remarks
from lightning_ssesam.experiments.runs import GROUPS, Comparison, by_method, number_of_seeds

# The table of classes in the report leaves out the middle of more classes than this.
_MAX_CLASSES = 200


def write_report(comparison: Comparison, folder: Path) -> list[Path]:
    """Write report.html, which opens offline, and the files it is made of. Return their paths, the report first."""
    results, summary, classes, table = (
        folder / name for name in ("results.csv", "summary.csv", "classes.csv", "table.md")
    )
    tables.write_runs(comparison.runs, results)
    tables.write_summary(comparison.runs, summary)
    class_table.write_classes(comparison, classes)
    values = [f"Radii and switch: {comparison.values}."] if comparison.values else []
    paragraphs = [tables.markdown_table(comparison.runs, comparison.validation_set), *values, *comparison.notes]
    write_text(table, "\n\n".join(text.rstrip() for text in paragraphs) + "\n")
    pictures = [folder / f"{figure.name}.png" for figure in FIGURES]
    for figure, picture in zip(FIGURES, pictures, strict=True):
        with replaced(picture) as unfinished:
            figure.draw(comparison).savefig(unfinished, dpi=150)
    report = folder / "report.html"
    write_text(report, _render(comparison, pictures))
    return [report, *pictures, results, summary, classes, table]


def _render(comparison: Comparison, pictures: Sequence[Path]) -> str:
    runs, columns = comparison.runs, tables.columns(comparison.runs)
    methods, to_first = by_method(runs), tables.differences(runs)
    rows = class_table.class_rows(comparison)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("lightning_ssesam.templates") / "report.html").read_text("utf-8"))
    return template.render(
        comparison=comparison,
        facts=_facts(comparison),
        groups=GROUPS,
        columns=columns,
        seeds=tables.seeds_of(runs),
        has_intervals=number_of_seeds(runs) > 1,
        one_seed=ONE_SEED,
        summary={
            method: {
                "last": {column: tables.cell(method_runs, column) for column in columns},
                "best": {group: tables.spread([run.best[group] for run in method_runs]) for group in GROUPS},
                "divergence": divergence(method_runs),
                "mark": f" {tables.DIVERGED}" if divergence(method_runs) else "",
            }
            for method, method_runs in methods.items()
        },
        every_run=[(run, [tables.accuracy_in(run, column) for column in columns]) for run in runs],
        baseline=runs[0].method,
        differences=to_first,
        few_images=FEW_IMAGES,
        fitted=round(100 * FITTED),
        training=tables.TRAINING if tables.TRAINING in columns else "",
        is_diverged=any(run.diverged for run in runs),
        remarks=remarks(runs),
        images=describe_images(runs),
        classes=class_table.cut_rows(rows, _MAX_CLASSES),
        number_of_classes=len(rows),
        class_headers=class_table.accuracy_headers(comparison),
        pictures=[
            (base64.b64encode(picture.read_bytes()).decode(), figure.is_small, figure.caption(comparison))
            for figure, picture in zip(FIGURES, pictures, strict=True)
        ],
    )


def _facts(comparison: Comparison) -> dict[str, Any]:
    split, counts = comparison.split, comparison.split.class_counts
    devices = ", ".join(sorted({run.device for run in comparison.runs} - {""}))
    return {
        "Training samples": f"{int(counts.sum()):,} of {split.num_classes:,} classes, {int(counts.max()):,} of the"
        f" largest and {int(counts.min()):,} of the smallest",
        "Tail": f"{int(split.tail.sum()):,} classes with {int(counts[split.tail].sum()):,} samples"
        + (f": {comparison.tail_rule}" if comparison.tail_rule else ""),
        "Many, medium, few": f"{int(split.many.sum()):,} classes with more than {split.many_above} training samples,"
        f" {int(split.medium.sum()):,} between, {int(split.few.sum()):,} with fewer than {split.few_below}",
        **({"Sets": comparison.data.division} if comparison.data.division else {}),
        "Training": f"{comparison.epochs} epoch{'s' if comparison.epochs > 1 else ''}"
        + ("" if comparison.gamma is None else f", stage 2 after {100 * comparison.gamma:g} % of them"),
        **({"Radii and switch": comparison.values} if comparison.values else {}),
        "Made with": f"lightning-ssesam {_version.__version__}, torch {torch.__version__}, lightning"
        f" {pl.__version__}, Python {platform.python_version()}" + (f", on {devices}" if devices else ""),
        "Time": f"{sum(run.seconds for run in comparison.runs) / 60:.1f} minutes of training, summed over the runs",
        **comparison.origin,
    }
