"""The classes that are confused most often: true class, predicted class, and the share of the true class."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lightning_ssesam.experiments.predictions import order_of_pairs
from lightning_ssesam.experiments.remarks import divergence, name_of_class, numbers_of_images
from lightning_ssesam.experiments.runs import Comparison, Run, by_method
from lightning_ssesam.experiments.tables import write_csv


class PairRow(NamedTuple):
    """Two classes that are confused.

    Attributes:
        true: Index of the true class.
        predicted: Index of the class that it was taken for.
        true_name: Name of the true class, or its index as text.
        predicted_name: Name of the class that it was taken for, or its index as text.
        tested: Number of test images of the true class.
        shares: Share of them that each method takes for the other class, in [0, 1], the mean over its runs.
    """

    true: int
    predicted: int
    true_name: str
    predicted_name: str
    tested: int
    shares: tuple[float, ...]


def pair_rows(comparison: Comparison) -> list[PairRow]:
    """Return the pairs, the one with the largest share of any method first.

    Pairs whose true class has few test images come last.
    """
    runs, methods = comparison.runs, by_method(comparison.runs)
    tested = numbers_of_images(runs, "test_images")
    pairs = list(dict.fromkeys((true, predicted) for run in runs for true, predicted, _ in run.confused_pairs))
    if tested is None or not pairs:
        return []
    positions = {pair: position for position, pair in enumerate(pairs)}
    shares = np.zeros((len(methods), len(pairs)))
    for row, method_runs in zip(shares, methods.values(), strict=True):
        for run in method_runs:
            for true, predicted, number in run.confused_pairs:
                row[positions[true, predicted]] += number / run.test_images[true] / len(method_runs)
    trues = np.array([true for true, _ in pairs])
    order = order_of_pairs(trues, shares.max(0) * tested[trues], tested)
    columns = shares.T.tolist()
    return [_row(runs, pairs[place], int(tested[trues[place]]), columns[place]) for place in order.tolist()]


def _row(runs: Sequence[Run], pair: tuple[int, int], tested: int, shares: list[float]) -> PairRow:
    true, predicted = pair
    return PairRow(true, predicted, name_of_class(runs, true), name_of_class(runs, predicted), tested, tuple(shares))


def write_pairs(comparison: Comparison, path: Path) -> None:
    """Write a CSV file with a row for each pair."""
    methods = [f"share of {name}{divergence(runs)}" for name, runs in by_method(comparison.runs).items()]
    rows = [[*row[:5], *(round(share, 6) for share in row.shares)] for row in pair_rows(comparison)]
    write_csv(path, ["class", "predicted", "name", "predicted_name", "test_images", *methods], rows)
