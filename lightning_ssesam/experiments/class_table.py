"""The classes of a comparison: how many images of each were trained on, validated and tested, and what came of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lightning_ssesam.experiments.remarks import divergence, name_of_class, numbers_of_images
from lightning_ssesam.experiments.runs import Comparison, by_method
from lightning_ssesam.experiments.tables import write_csv


class ClassRow(NamedTuple):
    """A class.

    Attributes:
        number: Index of the class.
        name: Name of the class, or its index as text.
        groups: Groups that the class belongs to, such as ``("tail", "few")``.
        images: Numbers of its training, validation and test images; None where it is not known.
        accuracies: Mean accuracy of each method in [0, 1]; NaN without test images.
    """

    number: int
    name: str
    groups: tuple[str, str]
    images: tuple[int | None, int | None, int | None]
    accuracies: tuple[float, ...]


def class_rows(comparison: Comparison) -> list[ClassRow]:
    """Return the classes, the one with the most training images first."""
    runs, split = comparison.runs, comparison.split
    counts = split.class_counts.tolist()
    recalls = [np.mean([run.class_recalls for run in method_runs], 0) for method_runs in by_method(runs).values()]
    validated, tested = (numbers_of_images(runs, name) for name in ("val_images", "test_images"))
    is_tail, is_many, is_few = (mask.tolist() for mask in (split.tail, split.many, split.few))
    return [
        ClassRow(
            number,
            name_of_class(runs, number),
            (
                "tail" if is_tail[number] else "head",
                "many" if is_many[number] else "few" if is_few[number] else "medium",
            ),
            (counts[number], *(None if known is None else int(known[number]) for known in (validated, tested))),
            tuple(float(recall[number]) for recall in recalls),
        )
        for number in sorted(range(split.num_classes), key=lambda number: -counts[number])
    ]


def folded_rows(rows: Sequence[ClassRow], most: int) -> list[Sequence[ClassRow]]:
    """Return all rows, or the first, those between and the last. First and last are together at most ``most``."""
    half = most // 2
    return [rows] if len(rows) <= most else [rows[:half], rows[half:-half], rows[-half:]]


def accuracy_headers(comparison: Comparison) -> list[str]:
    """Return the methods, with the number of runs that diverged."""
    return [name + divergence(runs) for name, runs in by_method(comparison.runs).items()]


def write_classes(comparison: Comparison, path: Path) -> None:
    """Write a CSV file with a row for each class."""
    header = ["class", "name", "head_or_tail", "many_medium_few", "train_images", "val_images", "test_images"]
    rows = [
        [
            row.number,
            row.name,
            *row.groups,
            *("" if number is None else number for number in row.images),
            *("" if np.isnan(share) else round(share, 6) for share in row.accuracies),
        ]
        for row in sorted(class_rows(comparison))
    ]
    write_csv(path, [*header, *(f"accuracy of {method}" for method in accuracy_headers(comparison))], rows)
