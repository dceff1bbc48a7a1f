"""Writes the tables of ``benchmarks/gpu.py`` into the documentation, from the results alone."""

import re
import statistics
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from gpu_parts import plan
from gpu_parts.images import SOURCES

Found = Mapping[str, Any]

_METHODS = (*plan.MAIN, *plan.LATE, *plan.FAMILY)
_GROUPS = ("all", "head", "tail", "many", "medium", "few")


def write(found: Found, source: Path, target: Path) -> None:
    """Write the pages with their tables.

    Args:
        found: Results by path, as :func:`gpu_parts.results.read_all` returns them.
        source: Folder of the pages. What lies between the marks ``<!-- gpu: NAME -->`` and ``<!-- end of gpu -->`` is
            replaced.
        target: Folder to write them into.
    """
    target.mkdir(parents=True, exist_ok=True)
    for page in ("results.md", "performance.md"):
        text = filled((source / page).read_text(), found)
        (target / page).write_text(text)


def filled(text: str, found: Found) -> str:
    """Return a page with the tables between its marks."""

    def between(match: re.Match[str]) -> str:
        return f"{match[1]}\n\n{TABLES[match[2]](found)}\n\n{match[3]}"

    return re.sub(r"(<!-- gpu: (\w+) -->).*?(<!-- end of gpu -->)", between, text, flags=re.DOTALL)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in [list(head), *map(list, rows)]]
    lines.insert(1, "|" + "---|" * lines[0].count(" |"))
    return "\n".join(re.sub(r"(?<=\|) +(?=\|)", " ", line) for line in lines)


def percent(values: Iterable[float]) -> str:
    """Return mean and standard deviation in %."""
    shares = [100 * value for value in values]
    deviation = f" ± {statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{statistics.mean(shares):.1f}{deviation}" if shares else ""


def where(results: Iterable[Mapping[str, Any]]) -> str:
    """Return the hardware and the versions of results, in words."""
    pairs = {f"{one['hardware']}, torch {one['torch']}, lightning {one['lightning']}" for one in results}
    return "; ".join(sorted(pairs))


# Trainings.


def trainings(found: Found) -> str:
    """Return the tables of the trainings through the Trainer."""
    runs = [one for one in found.values() if "radii" in one]
    kinds = sorted({(run["is_search"], list(SOURCES).index(run["data"]), -run["epochs"]) for run in runs})
    blocks = []
    for is_search, place, epochs in kinds:
        kind = list(SOURCES)[place], -epochs
        chosen = [run for run in runs if (run["data"], run["epochs"], run["is_search"]) == (*kind, is_search)]
        blocks.append((_search if is_search else _accuracies)(chosen, *kind))
    return "\n\n".join(blocks) or "No training through the Trainer has been made yet."


def _accuracies(chosen: list[dict[str, Any]], data: str, epochs: int) -> str:
    rows: dict[tuple[int, int, float], list[dict[str, Any]]] = {}
    for run in sorted(chosen, key=lambda run: run["seed"]):
        key = list(plan.LOSSES).index(run["loss"]), _METHODS.index(run["method"]), run["radius"] or 0.0
        rows.setdefault(key, []).append(run)
    lines = []
    for _, seeds in sorted(rows.items()):
        first = seeds[0]
        cells = [_mean_of(seeds, "accuracy", group) for group in _GROUPS]
        cells.append(_mean_of(seeds, "training_accuracy", "tail"))
        seconds = f"{statistics.mean(run['seconds'] for run in seeds):.0f}"
        about = [plan.LOSSES[first["loss"]], first["method"], _radii(first), str(len(seeds))]
        lines.append([*about, *cells, seconds])
    head = ["loss", "method", "radii", "seeds", *_GROUPS, "training images of the tail", "seconds"]
    jobs = ", ".join(map(str, sorted({run["jobs"] for run in chosen})))
    title = f"**{SOURCES[data].title}, {epochs} epochs.** {where(chosen)}; trainings at a time: {jobs}."
    return f"{title}\n\n{table(head, lines)}"


def _mean_of(runs: list[dict[str, Any]], key: str, group: str) -> str:
    """Return the mean of an accuracy, in %; nothing for a group without classes."""
    return percent(run[key][group] for run in runs if group in run[key])


def _radii(run: Mapping[str, Any]) -> str:
    if not run["radii"]:
        return "" if run["method"] == "ERM" else "default"
    return " / ".join(f"{radius:g}" for radius in run["radii"].values())


def _search(chosen: list[dict[str, Any]], data: str, epochs: int) -> str:
    lines = []
    for loss, name in plan.LOSSES.items():
        for method in plan.SEARCHED:
            same = [run for run in chosen if (run["loss"], run["method"]) == (loss, method)]
            found = {run["radius"]: run["accuracy"]["all"] for run in same}
            best = max(found, key=lambda radius: (found[radius], -radius)) if len(found) == len(plan.GRID) else None
            cells = [f"{100 * found[radius]:.1f}" if radius in found else "" for radius in plan.GRID]
            cells = [f"**{cell}**" if radius == best else cell for radius, cell in zip(plan.GRID, cells, strict=True)]
            lines += [[name, method, *cells]] if found else []
    head = ["loss", "method", *(f"{radius:g}" for radius in plan.GRID)]
    title = f"**The search for the radius, {SOURCES[data].title}, {epochs} epochs.** {where(chosen)}."
    return f"{title}\n\n{table(head, lines)}"


# The first table, without a Trainer.


def captured(found: Found) -> str:
    """Return the table of the trainings without a Trainer."""
    blocks = []
    for one in (value for path, value in found.items() if path.startswith("captured/")):
        counts = one["class_counts"]
        tail = [count < one["tail_below"] for count in counts]
        tail_a_batch = one["batch"] * sum(n for n in counts if n < one["tail_below"]) / sum(counts)
        rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for run in one["runs"]:
            rows.setdefault((run["loss"], run["method"]), []).append(run)
        lines = []
        for (loss, method), runs in rows.items():
            groups = [_mean_recalls(runs, tail, which) for which in ((False, True), (False,), (True,))]
            fitted = [run["train"]["right_tail_a_batch"] / tail_a_batch for run in runs if tail_a_batch]
            cells = [percent(values) for values in (*groups, fitted)]
            lines.append([plan.LOSSES[loss], method, str(len(runs)), *cells, f"{_captured_cost(one, runs[0]):.1f}"])
        lines.sort(key=_place_of)
        head = ["loss", "method, radius", "seeds", "all", "head", "tail", "training images of the tail", "cost"]
        blocks.append(f"{one['device']}, torch {one['torch']}.\n\n{table(head, lines)}")
    return "\n\n".join(blocks)


def _place_of(line: list[str]) -> tuple[int, int, str]:
    method = line[1].removeprefix("late ").partition(" ")[0]
    order = _METHODS.index(method if line[1].startswith(method) else f"late {method}")
    return list(plan.LOSSES.values()).index(line[0]), order, line[1]


def _mean_recalls(runs: list[dict[str, Any]], tail: list[bool], which: tuple[bool, ...]) -> list[float]:
    """Return the mean recall of a group in each training; nothing for a group without classes."""
    recalls = [[r for r, is_tail in zip(run["recall"], tail, strict=True) if is_tail in which] for run in runs]
    return [statistics.mean(of_group) for of_group in recalls if of_group]


def _captured_cost(one: Mapping[str, Any], run: Mapping[str, Any]) -> float:
    """Return the cost of a training in plain trainings, from the milliseconds of its stages."""
    cost, before = 0.0, 0.0
    for until, head_rho, tail_rho in run["stages"]:
        kind = ("ERM" if tail_rho == 0 else "SAM") if head_rho is None else "SSE-SAM stage 1" if head_rho else "ImbSAM"
        cost, before = cost + (until - before) * one["replayed_ms"][kind], until
    return cost / one["replayed_ms"]["ERM"]


# Steps.


def steps(found: Found) -> str:
    """Return the tables of milliseconds and memory."""
    blocks = [_steps_of(one) for path, one in found.items() if path.startswith("steps/")]
    return "\n\n".join(blocks) or "No step through the Trainer has been measured with graphs yet."


def _steps_of(one: Mapping[str, Any]) -> str:
    lines, errors = [], []
    for method, row in one["methods"].items():
        errors += [f"{method}, {name}: {value['error']}." for name, value in row.items() if "error" in value]
        plain = row["plain"].get("ms")
        memory = [_number(row, name, "peak_mib", ".0f") for name in ("eager", "graphs")]
        reserved = _number(row, "graphs", "reserved_mib", ".0f")
        peers = [
            f"{name}: {_cost(row, name, plain)}" for name in row if name not in ("plain", "eager", "graphs", "engine")
        ]
        costs = [_cost(row, name, plain) for name in ("eager", "graphs", "engine")]
        lines.append([method, _number(row, "plain", "ms", ".1f"), *costs, *memory, reserved, "; ".join(peers)])
    head = ["", "plain, ms", "eager", "with graphs", "engine alone"]
    head += ["peak, MiB: eager", "with graphs", "reserved", "others"]
    about = f"batches of {one['batch']}, {one['image_size']}x{one['image_size']} pixels, {one['precision']}"
    text = f"**{one['network']}**, {about}. {where([one])}.\n\n{table(head, lines)}"
    notes = [*errors, *_over_engine(one["methods"]), *_bits(one.get("bits", {})), *_waits(one.get("waits"))]
    return text + "".join(f"\n\n{note}" for note in notes)


def _over_engine(methods: Mapping[str, Any]) -> list[str]:
    """Return how much longer a step with graphs takes in the Trainer than the engine alone."""
    both = {name: (row.get("graphs", {}).get("ms"), row.get("engine", {}).get("ms")) for name, row in methods.items()}
    ratios = [f"{name} {graphs / engine:.2f}" for name, (graphs, engine) in both.items() if graphs and engine]
    told = f"A step with graphs through the Trainer, in steps of the engine alone: {', '.join(ratios)}."
    return [told] if ratios else []


def _number(row: Mapping[str, Any], name: str, key: str, form: str) -> str:
    value = row.get(name, {}).get(key)
    return "" if value is None else format(value, form)


def _cost(row: Mapping[str, Any], name: str, plain: float | None) -> str:
    ms = row.get(name, {}).get("ms")
    if ms is None or plain is None:
        return "" if ms is None else f"{ms:.1f}"
    return f"{ms:.1f} ({ms / plain:.2f})"


def _bits(bits: Mapping[str, Any]) -> list[str]:
    notes = []
    for kind, whose in (("with graphs", "with graphs"), ("eager again", "of a second eager training")):
        compared = {method: row[kind] for method, row in bits.items() if kind in row}
        same = [method for method, row in compared.items() if row.get("differing") == []]
        if same:
            notes.append(f"After 50 steps the weights {whose} are the eager ones to the last bit: {', '.join(same)}.")
        for method, row in compared.items():
            if "error" in row:
                notes.append(f"The weights {whose} could not be compared for {method}: {row['error']}.")
            elif row["differing"]:
                number = f"{len(row['differing'])} of {row['tensors']} tensors"
                notes.append(
                    f"After 50 steps the weights {whose} are not the eager ones for {method}: {number} differ, by"
                    f" {row['share_of_the_way']:.1e} of the way."
                )
    return notes


def _waits(waits: Mapping[str, str] | None) -> list[str]:
    if waits is None:
        return []
    waiting = [f"{name} ({error})" for name, error in waits.items() if error]
    return [f"Steps that wait for the GPU: {'; '.join(waiting) or 'none'}."]


def sharing(found: Found) -> str:
    """Return the table of several processes on one GPU."""
    if (one := found.get("sharing.json")) is None:
        return "What several processes gain has not been measured with graphs yet."
    numbers = sorted({int(number) for rates in one["rates"].values() for number in rates})
    lines = [[mode, *(f"{rates[str(n)]:.0f}" for n in numbers)] for mode, rates in one["rates"].items()]
    about = f"{one['network']}, {one['method']}, steps a second of all together. {where([one])}."
    title = f"**Several trainings at a time**, {about}"
    return f"{title}\n\n{table(['processes', *map(str, numbers)], lines)}"


def tests(found: Found) -> str:
    """Return a sentence about the tests that need a GPU."""
    if (one := found.get("tests.json")) is None:
        return "The tests that need a GPU have no result here yet."
    failed = f", {one['failed']} failed ({', '.join(one['failures'])})" if one["failed"] else ""
    return (
        f"Tests of {', '.join(one['files'])}: {one['passed']} passed{failed}, {one['skipped']} skipped. {where([one])}."
    )


def counts_of_tests(report: Path) -> dict[str, Any] | None:
    """Return the numbers of tests from pytest's report; None if there is none."""
    try:
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return None
    failures = [case.get("name", "") for case in cases if any(case.find(n) is not None for n in ("failure", "error"))]
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(failures) - skipped
    return {"passed": passed, "failed": len(failures), "failures": failures, "skipped": skipped}


TABLES: dict[str, Callable[[Found], str]] = {
    "trainings": trainings,
    "captured": captured,
    "steps": steps,
    "sharing": sharing,
    "tests": tests,
}
"""The tables by the names of their marks."""
