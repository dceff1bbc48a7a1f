"""The numbers of a comparison as text, Markdown and CSV."""

import csv
import html
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lightning_ssesam.experiments.files import replaced
from lightning_ssesam.experiments.intervals import Difference, Pair, classes_of
from lightning_ssesam.experiments.remarks import describe_images, divergence, numbers_of_images, remarks
from lightning_ssesam.experiments.runs import CONFUSIONS, GROUPS, Run, by_method, number_of_seeds

TRAINING = "training"
"""Column of the accuracy on the training images."""

TOP_1 = "top-1"
"""Column of the share of all test images that were classified right."""

IMAGES_NOTE = (
    "Every test image counts the same: top-1 accuracy, and expected calibration error (ECE) of each group, in %"
)

DIVERGED = "†"
"""Mark of a mean over runs of which some diverged."""

_TRAINING_NOTE = f"{TRAINING}: accuracy on the training images. Every class counts the same, as in all."
_DIVERGED_NOTE = f"{DIVERGED} A mean over runs of which some diverged."
_DIFFERENCE_NOTE = "with the 95 % interval over seeds and test images (* excludes 0)"


def differences(runs: Sequence[Run]) -> dict[str, dict[str, Difference]]:
    """Return the difference of every other method to the first one, by method and group, in points of accuracy."""
    methods = by_method(runs)
    first = next(iter(methods))
    pairs = {name: Pair(method_runs, methods[first]) for name, method_runs in methods.items() if name != first}
    return {name: {group: pair.difference(group) for group in GROUPS} for name, pair in pairs.items()}


def seeds_of(runs: Sequence[Run]) -> str:
    """Return the number of seeds of the runs as text."""
    number = number_of_seeds(runs)
    return f"{number} seed{'s' if number > 1 else ''}"


def spread(values: Sequence[float], width: int = 0) -> str:
    """Return mean and standard deviation of accuracies in [0, 1], in percent."""
    percent = [100 * value for value in values]
    deviation = _deviation(percent)
    return f"{statistics.mean(percent):.1f}" + ("" if math.isnan(deviation) else f" ± {deviation:{width}.1f}")


def columns(runs: Sequence[Run]) -> list[str]:
    """Return the columns of a table of accuracies: the groups, and the training if it was measured."""
    return [*GROUPS, *([TRAINING] if any(run.train_accuracy for run in runs) else [])]


def cell(runs: Sequence[Run], column: str, width: int = 0) -> str:
    """Return mean and deviation of a method's accuracy in percent, with a mark if some of its runs diverged."""
    values = [accuracy_in(run, column) for run in runs]
    return spread(values, width) + (f" {DIVERGED}" if any(run.diverged for run in runs) else "")


def accuracy_in(run: Run, column: str) -> float:
    """Return the number of a run that stands in a column; NaN if it was not measured."""
    return run.train_accuracy.get("all", math.nan) if column == TRAINING else run.accuracy[column]


def top1(run: Run) -> float:
    """Return the share of all test images that were classified right, in [0, 1]; NaN if it is not known."""
    if not run.test_images:
        return math.nan
    tested = [(recall, number) for recall, number in zip(run.class_recalls, run.test_images, strict=True) if number]
    if not tested or any(math.isnan(recall) for recall, _ in tested):
        return math.nan
    return sum(round(recall * number) for recall, number in tested) / sum(run.test_images)


def image_columns(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Return what every test image counts the same in, in [0, 1], one value for each run: top-1, and the ECE.

    What is known of no run is left out.
    """
    values = {TOP_1: [top1(run) for run in runs]}
    values |= {f"ECE {group}": [run.calibration.get(group, math.nan) for run in runs] for group in GROUPS}
    return {column: shares for column, shares in values.items() if not all(map(math.isnan, shares))}


def image_cells(runs: Sequence[Run], width: int = 0) -> dict[str, list[str]]:
    """Return the cells of a table of :func:`image_columns`, by method with the number of runs that diverged."""
    shown, cells = image_columns(runs), {}
    for name, method_runs in by_method(runs).items():
        places = [place for place, run in enumerate(runs) if run.method == name]
        mark = f" {DIVERGED}" if any(run.diverged for run in method_runs) else ""
        texts = [spread([values[place] for place in places], width) + mark for values in shown.values()]
        cells[name + divergence(method_runs)] = texts
    return cells


def _deviation(values: Sequence[float]) -> float:
    # `statistics.stdev` raises on NaN, which a group without classes has.
    return statistics.stdev(values) if len(values) > 1 and not any(map(math.isnan, values)) else math.nan


def format_table(runs: Sequence[Run]) -> str:
    """Return a table of the accuracies as text. Several methods and seeds get a second one, of the differences."""
    methods = {name + divergence(method_runs): method_runs for name, method_runs in by_method(runs).items()}
    shown = columns(runs)
    cells = {name: [cell(method_runs, column, 4) for column in shown] for name, method_runs in methods.items()}
    spread_text = f", mean and standard deviation over {seeds_of(runs)}" if number_of_seeds(runs) > 1 else ""
    lines = [f"Test accuracy in %{spread_text or ' of one run'}", *_aligned(shown, cells)]
    lines += [note for note in (describe_images(runs), *_notes(runs)) if note]
    if len(methods) > 1 and number_of_seeds(runs) > 1:
        lines += ["", f"Difference to {runs[0].method}, {_DIFFERENCE_NOTE}"]
        lines += _aligned(GROUPS, {name: by_group.values() for name, by_group in differences(runs).items()})
    if images := image_columns(runs):
        lines += ["", IMAGES_NOTE, *_aligned(list(images), image_cells(runs, 4))]
    if found := remarks(runs):
        lines += ["", *found]
    return "\n".join(lines)


def _aligned(header: Sequence[str], rows: Mapping[str, Iterable[object]]) -> list[str]:
    """Return the lines of a table whose columns are as wide as their longest cell, and at least 12."""
    cells = {"": list(header)} | {name: [str(value) for value in values] for name, values in rows.items()}
    name_width = max(6, *map(len, cells))
    widths = [max(12, *map(len, column)) for column in zip(*cells.values(), strict=True)]
    return [
        " ".join([f"{name:{name_width}}", *(f"{value:>{width}}" for value, width in zip(values, widths, strict=True))])
        for name, values in cells.items()
    ]


def _notes(runs: Sequence[Run]) -> list[str]:
    """Return what explains the columns and marks of a table."""
    notes = [_TRAINING_NOTE] if TRAINING in columns(runs) else []
    return [*notes, *([_DIVERGED_NOTE] if any(run.diverged for run in runs) else [])]


def markdown_table(runs: Sequence[Run], validation: str = "validation") -> str:
    """Return the tables of :func:`format_table` as one in Markdown, with the accuracy after the best epoch."""
    shown = columns(runs)
    lines = [
        f"Test accuracy in %, mean and standard deviation over {seeds_of(runs)}, after the last epoch; `best epoch`: on"
        f" the {validation} set, after the epoch that was best there.",
        "",
        f"| | {' | '.join(shown)} | all, best epoch | difference in tail | in all |",
        "|---" * (len(shown) + 4) + "|",
    ]
    to_first = differences(runs)
    for name, method_runs in by_method(runs).items():
        cells = [cell(method_runs, column) for column in shown]
        mark = f" {DIVERGED}" if any(run.diverged for run in method_runs) else ""
        cells.append(spread([run.best["all"] for run in method_runs]) + mark)
        cells += [str(to_first[name][group]) if name in to_first else "" for group in ("tail", "all")]
        lines.append(f"| {_in_markdown(name + divergence(method_runs))} | {' | '.join(cells)} |")
    notes = [f"Differences are to {_in_markdown(runs[0].method)}, {_DIFFERENCE_NOTE}.", *_notes(runs)]
    if images := describe_images(runs):
        notes.append(f"{images}. All numbers of images are in classes.csv.")
    if found := remarks(runs):
        notes.append("\n".join(f"- {_in_markdown(remark)}" for remark in found))
    return "\n".join([*lines, "", "\n\n".join(notes), "", *_markdown_of_images(runs)])


def _markdown_of_images(runs: Sequence[Run]) -> list[str]:
    """Return the lines of a table of what every test image counts the same in, if anything of it is known."""
    if not (shown := image_columns(runs)):
        return []
    rows = [f"| {_in_markdown(name)} | {' | '.join(cells)} |" for name, cells in image_cells(runs).items()]
    return [f"{IMAGES_NOTE}.", "", f"| | {' | '.join(shown)} |", "|---" * (len(shown) + 1) + "|", *rows, ""]


def _in_markdown(text: str) -> str:
    """Return a text without what would end a cell or begin an element."""
    return " ".join(html.escape(text, quote=False).replace("|", "&#124;").split())


def write_runs(runs: Sequence[Run], path: Path) -> None:
    """Write a CSV file with a row for each run."""
    classes = [f"class_{k}" for k in range(len(runs[0].class_recalls))]
    best, train = ([f"{prefix}_{group}" for group in GROUPS] for prefix in ("best", "train"))
    header = ["method", "seed", *GROUPS, *best, *CONFUSIONS, "seconds", "diverged", *train, *classes]
    header += ["top_1", *(f"ece_{group}" for group in GROUPS), "parameters", "trained_parameters", "optimizer"]
    rows = []
    for run in runs:
        shares = [values[group] for values in (run.accuracy, run.best) for group in GROUPS]
        shares += [run.confusion[name] for name in CONFUSIONS]
        trained = [run.train_accuracy.get(group, "") for group in GROUPS]
        row = [run.method, run.seed, *shares, round(run.seconds, 1), run.diverged, *trained, *run.class_recalls]
        row += [_known(top1(run)), *(run.calibration.get(group, "") for group in GROUPS)]
        row += [run.parameters or "", run.trained_parameters if run.parameters else "", run.optimizer]
        rows.append([round(value, 6) if isinstance(value, float) else value for value in row])
    write_csv(path, header, rows)


def write_summary(runs: Sequence[Run], path: Path) -> None:
    """Write a CSV file with a row for each method and group: mean, deviation, difference to the first method."""
    header = ["method", "group", "seeds", "mean", "std", "difference", "margin_95"]
    to_first, rows = differences(runs), []
    for name, method_runs in by_method(runs).items():
        for group in GROUPS:
            values = [run.accuracy[group] for run in method_runs]
            difference = to_first.get(name, {}).get(group, Difference(math.nan, math.nan))
            trained = statistics.mean([run.train_accuracy.get(group, math.nan) for run in method_runs])
            shares = (statistics.mean(values), _deviation(values), difference.mean / 100, difference.margin / 100)
            numbers = [_known(share) for share in (*shares, trained)]
            further = [sum(run.diverged for run in method_runs), difference.doubt, _tested(method_runs, group)]
            errors = [run.calibration.get(group, math.nan) for run in method_runs]
            further += [_known(statistics.mean(errors)), _known(_deviation(errors))]
            rows.append([name, group, len(values), *numbers, *further])
    write_csv(path, [*header, "train_mean", "diverged", "doubt", "test_images", "ece_mean", "ece_std"], rows)


def _known(value: float) -> float | str:
    """Return a number for a CSV file, or nothing for NaN."""
    return "" if math.isnan(value) else round(value, 6)


def _tested(runs: Sequence[Run], group: str) -> int | str:
    """Return the number of test images of a group, or nothing if it is not known."""
    numbers = numbers_of_images(runs, "test_images")
    return "" if numbers is None or not runs[0].groups else int(numbers[classes_of(runs[0], group)].sum())


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
