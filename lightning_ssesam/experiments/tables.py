"""The numbers of a comparison as text, Markdown and CSV."""

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from lightning_ssesam.experiments.files import replaced
from lightning_ssesam.experiments.runs import CONFUSIONS, GROUPS, Run


class Difference(NamedTuple):
    """Difference of one method to another, over the seeds that both were run with.

    Attributes:
        mean: Mean of the differences.
        margin: Half of the width of its 95 % confidence interval (Student's t, paired); NaN for a single seed.
    """

    mean: float
    margin: float

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes 0."""
        return abs(self.mean) > self.margin

    def __str__(self) -> str:
        """Return the difference in points with its margin, and a star if it is significant."""
        if math.isnan(self.mean):
            return "nan"
        margin = "" if math.isnan(self.margin) else f" ± {self.margin:.1f}"
        return f"{self.mean:+.1f}{margin}{'*' if self.is_significant else ''}"


def paired_difference(values: dict[int, float], others: dict[int, float]) -> Difference:
    """Return the difference of ``values`` to ``others``, both by seed, over the seeds that both have.

    Example:
        >>> print(paired_difference({0: 4.0, 1: 6.0, 2: 5.0}, {0: 1.0, 1: 2.0, 2: 3.0}))
        +3.0 ± 2.5*
    """
    from scipy.stats import t

    differences = [values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())]
    number = len(differences)
    if number < 2:
        return Difference(differences[0] if differences else math.nan, math.nan)
    error = _deviation(differences) / math.sqrt(number)
    return Difference(statistics.mean(differences), float(t.ppf(0.975, number - 1)) * error)


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs of each method. Methods are in the order of their first runs."""
    methods = dict.fromkeys(run.method for run in runs)
    return {method: [run for run in runs if run.method == method] for method in methods}


def differences(runs: Sequence[Run]) -> dict[str, dict[str, Difference]]:
    """Return the difference of every other method to the first one, by method and group, in points of accuracy."""
    points = {
        method: {group: {run.seed: 100 * run.accuracy[group] for run in method_runs} for group in GROUPS}
        for method, method_runs in by_method(runs).items()
    }
    first, *others = points
    return {
        method: {group: paired_difference(points[method][group], points[first][group]) for group in GROUPS}
        for method in others
    }


def seeds_of(runs: Sequence[Run]) -> str:
    """Return the number of seeds of the runs as text."""
    number = len({run.seed for run in runs})
    return f"{number} seed{'s' if number > 1 else ''}"


def spread(values: Sequence[float], width: int = 0) -> str:
    """Return mean and standard deviation of accuracies in [0, 1], in percent."""
    percent = [100 * value for value in values]
    deviation = _deviation(percent)
    return f"{statistics.mean(percent):.1f}" + ("" if math.isnan(deviation) else f" ± {deviation:{width}.1f}")


def _deviation(values: Sequence[float]) -> float:
    # `statistics.stdev` raises on NaN, which a group without classes has.
    return statistics.stdev(values) if len(values) > 1 and not any(map(math.isnan, values)) else math.nan


def format_table(runs: Sequence[Run]) -> str:
    """Return a table of the accuracies as text. Several methods and seeds get a second one, of the differences."""
    methods = by_method(runs)
    width = max(6, *map(len, methods))

    def row(name: str, cells: Iterable[object]) -> str:
        return " ".join([f"{name:{width}}", *(f"{cell!s:>12}" for cell in cells)])

    lines = [f"Test accuracy in %, mean and standard deviation over {seeds_of(runs)}", row("", GROUPS)]
    for name, method_runs in methods.items():
        lines.append(row(name, [spread([run.accuracy[group] for run in method_runs], 4) for group in GROUPS]))
    if len(methods) > 1 and len({run.seed for run in runs}) > 1:
        lines += ["", f"Difference to {next(iter(methods))}, with its 95 % interval over paired seeds (* excludes 0)"]
        lines += [row("", GROUPS), *(row(name, by_group.values()) for name, by_group in differences(runs).items())]
    if diverged := diverged_runs(runs):
        lines.append(f"Diverged, with a loss that is not finite: {diverged}")
    return "\n".join(lines)


def diverged_runs(runs: Sequence[Run]) -> str:
    """Return the names of the runs whose loss was not finite at the end."""
    return ", ".join(f"{run.method} with seed {run.seed}" for run in runs if run.diverged)


def markdown_table(runs: Sequence[Run], validation: str = "validation") -> str:
    """Return the tables of :func:`format_table` as one in Markdown, with the accuracy after the best epoch."""
    methods = by_method(runs)
    lines = [
        f"Test accuracy in %, mean and standard deviation over {seeds_of(runs)}, after the last epoch; `best epoch`: on"
        f" the {validation} set, after the epoch that was best there.",
        "",
        f"| | {' | '.join(GROUPS)} | all, best epoch | difference in tail | in all |",
        "|---" * (len(GROUPS) + 4) + "|",
    ]
    to_first = differences(runs)
    for name, method_runs in methods.items():
        cells = [spread([run.accuracy[group] for run in method_runs]) for group in GROUPS]
        cells.append(spread([run.best["all"] for run in method_runs]))
        cells += [str(to_first[name][group]) if name in to_first else "" for group in ("tail", "all")]
        lines.append(f"| {name.replace('|', '&#124;')} | {' | '.join(cells)} |")
    note = f"Differences are to {next(iter(methods))}, with the 95 % interval over paired seeds (* excludes 0)."
    return "\n".join([*lines, "", note, ""])


def write_runs(runs: Sequence[Run], path: Path) -> None:
    """Write a CSV file with a row for each run."""
    classes = [f"class_{k}" for k in range(len(runs[0].class_recalls))]
    best = [f"best_{group}" for group in GROUPS]
    header = ["method", "seed", *GROUPS, *best, *CONFUSIONS, "seconds", "diverged", *classes]
    rows = []
    for run in runs:
        shares = [values[group] for values in (run.accuracy, run.best) for group in GROUPS]
        shares += [run.confusion[name] for name in CONFUSIONS]
        row = [run.method, run.seed, *shares, round(run.seconds, 1), run.diverged, *run.class_recalls]
        rows.append([round(value, 6) if isinstance(value, float) else value for value in row])
    write_csv(path, header, rows)


def write_summary(runs: Sequence[Run], path: Path) -> None:
    """Write a CSV file with a row for each method and group: mean, deviation, difference to the first method."""
    to_first, rows = differences(runs), []
    for name, method_runs in by_method(runs).items():
        for group in GROUPS:
            values = [run.accuracy[group] for run in method_runs]
            mean, margin = to_first.get(name, {}).get(group, Difference(math.nan, math.nan))
            numbers = (statistics.mean(values), _deviation(values), mean / 100, margin / 100)
            rows.append([name, group, len(values), *("" if math.isnan(x) else round(x, 6) for x in numbers)])
    write_csv(path, ["method", "group", "seeds", "mean", "std", "difference", "margin_95"], rows)


def write_csv(path: Path, header: list[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a CSV file: all of it, or nothing if the program ends before.

    Text that a spreadsheet would take for a formula gets an apostrophe in front.
    """
    with replaced(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        # Quotes keep together what a spreadsheet would divide at a semicolon.
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC)
        writer.writerows([[_harmless(cell) for cell in row] for row in (header, *rows)])


def _harmless(cell: object) -> object:
    """Return a cell that a spreadsheet does not calculate. Numbers stay numbers, also as text."""
    if not isinstance(cell, str) or not (cell.lstrip().startswith(("=", "+", "-", "@")) or cell[:1].isspace()):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell
