"""The report of a comparison: tables, pictures, and one HTML file that holds them all."""

import base64
import io
import platform
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import torch
from jinja2 import Environment, StrictUndefined

from lightning_ssesam import _version
from lightning_ssesam.experiments import class_table, tables
from lightning_ssesam.experiments.costs import trainings
from lightning_ssesam.experiments.figures import FIGURES, Figure
from lightning_ssesam.experiments.files import replaced, write_text
from lightning_ssesam.experiments.gallery import make_gallery
from lightning_ssesam.experiments.intervals import FEW_IMAGES
from lightning_ssesam.experiments.latex import latex_table
from lightning_ssesam.experiments.pairs import pair_rows, write_pairs
from lightning_ssesam.experiments.remarks import FITTED, ONE_SEED, describe_images, divergence, remarks
from lightning_ssesam.experiments.runs import GROUPS, Comparison, by_method, number_of_seeds

# The table of classes in the report folds the middle of more classes than this.
_MAX_CLASSES = 200
# The table of confused pairs in the report has the first ones.
_MAX_PAIRS = 20

FigureFormat = Literal["png", "svg", "pdf"]
"""Formats of the files of pictures."""


def write_report(comparison: Comparison, folder: Path, figure_format: FigureFormat = "png") -> list[Path]:
    """Write report.html, which opens offline, and the files it is made of. Return their paths, the report first.

    Args:
        comparison: Results.
        folder: Folder for the files, which exists.
        figure_format: Format of the files of the pictures. The report holds PNG instead of PDF.
    """
    results, summary, classes, confusions, table, paper = (
        folder / name
        for name in ("results.csv", "summary.csv", "classes.csv", "confusions.csv", "table.md", "table.tex")
    )
    tables.write_runs(comparison.runs, results)
    tables.write_summary(comparison.runs, summary)
    class_table.write_classes(comparison, classes)
    write_pairs(comparison, confusions)
    values = [f"Radii and switch: {comparison.values}."] if comparison.values else []
    paragraphs = [tables.markdown_table(comparison.runs, comparison.validation_set), *values, *comparison.notes]
    write_text(table, "\n\n".join(text.rstrip() for text in paragraphs) + "\n")
    write_text(paper, latex_table(comparison.runs))
    figures = [figure for figure in FIGURES if figure.is_known(comparison)]
    paths = [folder / f"{figure.name}.{figure_format}" for figure in figures]
    pictures = [_draw(figure, comparison, path) for figure, path in zip(figures, paths, strict=True)]
    report = folder / "report.html"
    write_text(report, _render(comparison, pictures))
    return [report, *paths, results, summary, classes, confusions, table, paper]


class _Picture(NamedTuple):
    """A picture of the report: its data URI, whether it takes half of the width, and its caption."""

    source: str
    is_small: bool
    caption: str


def _draw(figure: Figure, comparison: Comparison, path: Path) -> _Picture:
    """Draw a picture into a file, in the format of its suffix, and return it for the report."""
    import matplotlib as mpl

    drawn, kind = figure.draw(comparison), path.suffix[1:]
    # Journals refuse the fonts that matplotlib writes into a PDF by default.
    with replaced(path) as unfinished, mpl.rc_context({"pdf.fonttype": 42}):
        drawn.savefig(unfinished, dpi=150)
        content = unfinished.read_bytes()
    if kind == "pdf":
        # Browsers show no PDF as a picture.
        drawn.savefig(file := io.BytesIO(), dpi=150, format="png")
        content = file.getvalue()
    media = "image/svg+xml" if kind == "svg" else "image/png"
    source = f"data:{media};base64,{base64.b64encode(content).decode()}"
    return _Picture(source, figure.is_small, figure.caption(comparison))


def _render(comparison: Comparison, pictures: Sequence[_Picture]) -> str:
    runs, columns = comparison.runs, tables.columns(comparison.runs)
    methods, to_first = by_method(runs), tables.differences(runs)
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
        pictures=pictures,
        **_classes_and_images(comparison),
    )


def _classes_and_images(comparison: Comparison) -> dict[str, Any]:
    """Return what the page shows of single classes, single images, and networks."""
    rows, pairs = class_table.class_rows(comparison), pair_rows(comparison)
    gallery, problem = make_gallery(comparison)
    return {
        "classes": class_table.folded_rows(rows, _MAX_CLASSES),
        "number_of_classes": len(rows),
        "class_headers": class_table.accuracy_headers(comparison),
        "image_columns": tables.image_columns(comparison.runs),
        "image_cells": tables.image_cells(comparison.runs),
        "pairs": pairs[:_MAX_PAIRS],
        "number_of_pairs": len(pairs),
        "gallery": gallery,
        "gallery_problem": problem,
        "trainings": trainings(comparison.runs, comparison.epochs),
    }


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
