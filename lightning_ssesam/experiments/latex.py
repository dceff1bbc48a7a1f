"""The table of a comparison for a paper, in LaTeX."""

import math
from collections.abc import Sequence
from itertools import compress

from lightning_ssesam.experiments import tables
from lightning_ssesam.experiments.remarks import divergence
from lightning_ssesam.experiments.runs import GROUPS, Run, by_method

_ESCAPES = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    # In the encoding of a plain document, they are other characters.
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
}


def latex_table(runs: Sequence[Run]) -> str:
    """Return a ``tabular`` with a row for each method: accuracies, and the ECE of tail and all, in percent.

    It needs the package booktabs.
    """
    all_columns = list(tables.image_columns(runs))
    # More columns would not fit the page of a paper.
    kept = [column in (tables.TOP_1, "ECE tail", "ECE all") for column in all_columns]
    shown = [*GROUPS, *compress(all_columns, kept)]
    lines = [
        f"% Test accuracy in %, mean and standard deviation over {tables.seeds_of(runs)}. \\usepackage{{booktabs}}",
        "% In a group, every class counts the same.",
        *(["% In top-1 and ECE (expected calibration error), every test image does."] if any(kept) else []),
        rf"\begin{{tabular}}{{l{'r' * len(shown)}}}",
        r"\toprule",
        _row(["method", *shown]),
        r"\midrule",
    ]
    images = tables.image_cells(runs)
    for name, method_runs in by_method(runs).items():
        label = name + divergence(method_runs)
        accuracies = [tables.spread([run.accuracy[group] for run in method_runs]) for group in GROUPS]
        cells = [*accuracies, *(text.removesuffix(f" {tables.DIVERGED}") for text in compress(images[label], kept))]
        lines.append(_row([escaped(label), *map(_number, cells)]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def escaped(text: str) -> str:
    """Return a text in which no character is a command of LaTeX, on one line."""
    printable = (character for character in " ".join(text.split()) if character.isprintable())
    return "".join(_ESCAPES.get(character, character) for character in printable)


def _number(cell: str) -> str:
    """Return mean and deviation in LaTeX; a dash for what is not known."""
    return "--" if cell.startswith(f"{math.nan}") else cell.replace("±", r"$\pm$")


def _row(cells: Sequence[str]) -> str:
    return f"{' & '.join(cells)} \\\\"
