"""What a search has found: the best trial of each method, tables, trials.csv and best.yaml."""

import math
import statistics
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import partial
from inspect import isclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.files import set_aside, write_text
from lightning_ssesam.experiments.intervals import FEW_IMAGES
from lightning_ssesam.experiments.recipe import Recipe
from lightning_ssesam.experiments.remarks import named_classes
from lightning_ssesam.experiments.runs import GROUPS
from lightning_ssesam.experiments.search import Candidate, has_diverged, is_done
from lightning_ssesam.experiments.tables import write_csv
from lightning_ssesam.split import ClassSplit

if TYPE_CHECKING:
    import optuna

# Values of trials that are closer are equal: accuracies are rounded to float32.
_SAME = 1e-6
# Options with the same meaning in compare.
_SHARED = {field.name for field in fields(Recipe)}


@dataclass(frozen=True)
class Finding:
    """The trials of one method.

    Attributes:
        candidate: The method and what was searched of it.
        trials: All of its trials, by number.
    """

    candidate: Candidate
    trials: Sequence["optuna.trial.FrozenTrial"]

    @property
    def complete(self) -> list["optuna.trial.FrozenTrial"]:
        """The trials that were trained to their end, best first, those that tie for the best before the others."""
        found = [trial for trial in self.trials if trial.state.name == "COMPLETE"]
        highest = max((trial.value or 0.0 for trial in found), default=0.0)
        ties = [trial for trial in found if (trial.value or 0.0) >= highest - _SAME]
        others = [trial for trial in found if trial not in ties]
        return self._nearest_to_median(ties) + sorted(others, key=lambda trial: -(trial.value or 0.0))

    @property
    def ties(self) -> int:
        """Number of trials whose value is the best one."""
        ranked = self.complete
        return sum((trial.value or 0.0) >= (ranked[0].value or 0.0) - _SAME for trial in ranked)

    @property
    def diverged(self) -> list[int]:
        """Numbers of the trials that diverged."""
        return [trial.number for trial in self.trials if has_diverged(trial)]

    @property
    def values(self) -> dict[str, float]:
        """The best values, to four digits."""
        best = self.complete[0]
        return {name: float(f"{best.params[name]:.4g}") for name in self.candidate.bounds}

    def _nearest_to_median(self, trials: list["optuna.trial.FrozenTrial"]) -> list["optuna.trial.FrozenTrial"]:
        """Sort trials by their distance to the median of their values, smaller values first if it is the same."""
        places = {trial.number: self._place(trial) for trial in trials}
        middle = [statistics.median(column) for column in zip(*places.values(), strict=True)]

        def key(trial: "optuna.trial.FrozenTrial") -> tuple[float, float, int]:
            place = places[trial.number]
            distance = sum(abs(x - y) for x, y in zip(place, middle, strict=True))
            return round(distance, 9), round(sum(place), 9), trial.number

        return sorted(trials, key=key)

    def _place(self, trial: "optuna.trial.FrozenTrial") -> list[float]:
        """Return where the values lie between their bounds, from 0 to 1, on the scale on which they are searched."""
        place = []
        for name, bounds in self.candidate.bounds.items():
            scale = float if name == "gamma" else math.log
            low, high, value = (scale(number) for number in (*bounds, trial.params[name]))
            place.append((value - low) / (high - low) if high > low else 0.0)
        return place


def describe_validation(counts: Sequence[int], split: ClassSplit, metric: str, names: Sequence[str] = ()) -> list[str]:
    """Return how coarse the accuracies are, and a warning if classes have few validation images.

    Args:
        counts: Number of validation images of each class; nothing if it is not known.
        split: Head and tail classes.
        metric: Accuracy that is searched for.
        names: Name of each class, or nothing.
    """
    if not any(counts):
        return []
    is_tail = split.tail.tolist()
    head, tail = ([n for n, is_in in zip(counts, is_tail, strict=True) if is_in == group and n] for group in (0, 1))
    weights = {"all": [(head + tail, 1.0)], "tail": [(tail, 1.0)]}.get(metric, [(head, 0.5), (tail, 0.5)])
    worth = max((100 * weight / len(group) / min(group) for group, weight in weights if group), default=math.nan)
    present = [number for number in counts if number]
    sizes = f"{min(present)}" if min(present) == max(present) else f"{min(present)} to {max(present)}"
    lines = [f"Validation images of a class: {sizes}. One image is worth up to {worth:.1f} points of {metric!r}."]
    numbers = np.array(counts)
    if absent := named_classes(names, numbers, numbers == 0):
        lines.append(f"No validation images: {absent}. The trials are compared without them.")
    if small := named_classes(names, numbers, (numbers > 0) & (numbers < FEW_IMAGES)):
        effect = "Small differences between trials are chance."
        lines.append(f"Fewer than {FEW_IMAGES} validation images: {small}. {effect}")
    return lines


def format_finding(finding: Finding) -> str:
    """Return the table of one method: its ten best trials, and what ended the others."""
    names, shown, ranked = list(finding.candidate.bounds), ("head", "tail", "all"), finding.complete
    number = len(finding.diverged)
    pruned = sum(trial.state.name == "PRUNED" for trial in finding.trials) - number
    ended = f"({pruned} more were given up early" + (f", {number} diverged)" if number else ")")
    lines = [f"{finding.candidate.name}: validation accuracy in %, the best of {len(ranked)} trials {ended}"]
    if ranked:
        lines.append(" ".join(f"{name:>10}" for name in ("trial", *names, *shown)))
    for trial in ranked[:10]:
        cells = [f"{trial.number:10}", *(f"{trial.params[name]:10.3g}" for name in names)]
        lines.append(" ".join([*cells, *(f"{100 * trial.user_attrs[group]:10.1f}" for group in shown)]))
    if ranked and finding.ties > 1:
        lines.append(f"{_tie(finding)}. You may choose among them by head and tail.")
    if number:
        trials = ", ".join(map(str, finding.diverged))
        lines.append(f"Diverged, with a loss that is not finite: trial{'s' if number > 1 else ''} {trials}")
    return "\n".join(lines)


def _tie(finding: Finding) -> str:
    value = 100 * (finding.complete[0].value or 0.0)
    first = finding.complete[0].number
    return f"{finding.ties} trials tie at {value:.1f} %; trial {first} is the nearest to the median of their values"


def write_trials(findings: Sequence[Finding], path: Path) -> None:
    """Write a CSV file with a row for each trial: its method, state, values and accuracies."""
    values = dict.fromkeys(name for finding in findings for name in finding.candidate.bounds)
    columns, rows = (*values, *GROUPS), []
    for finding in findings:
        for trial in finding.trials:
            found = trial.params | trial.user_attrs
            state = "diverged" if has_diverged(trial) else trial.state.name.lower()
            rows.append([finding.candidate.name, trial.number, state, *(found.get(name, "") for name in columns)])
    write_csv(path, ["method", "trial", "state", *columns], rows)


def refuse_without_best(findings: Sequence[Finding], files: Sequence[Path]) -> None:
    """Raise ``ArgumentError`` if a method has no trial that ended well. Earlier results are set aside."""
    without = [finding for finding in findings if not finding.complete]
    if not without:
        return
    for path in files:
        set_aside(path)
    names = ", ".join(finding.candidate.name for finding in without)
    bounds = ", ".join(dict.fromkeys(f"`{name}`" for f in without for name in f.candidate.bounds if name != "gamma"))
    trials = sum(is_done(trial) for finding in without for trial in finding.trials)
    raise ArgumentError(
        f"No trial of {names} was trained to its end: {sum(len(f.diverged) for f in without)} of {trials} diverged, so"
        f" there is no best one. Use a smaller learning rate or smaller bounds ({bounds}), and another `output`."
    )


def write_best(
    findings: Sequence[Finding],
    path: Path,
    *,
    metric: str,
    remarks: Sequence[str],
    candidates: Sequence[Candidate],
    recipe: Recipe,
    config: str | None,
) -> bool:
    """Write the best values as a configuration of compare. Return False if Python objects cannot be written."""
    given = yaml.safe_load(config or "{}")
    settings: dict[str, Any] = {name: value for name, value in given.items() if name in _SHARED}
    # The option gamma will do for a single method, and the pictures of compare show it.
    staged = [finding for finding in findings if "gamma" in finding.values]
    has_entries, has_gamma = any(f.candidate.needs_entry for f in findings), len(staged) == 1
    pairs: dict[str, float] = {}
    for finding in findings:
        for name, value in finding.values.items():
            is_option = not has_entries or (name == "gamma" and has_gamma)
            argument = finding.candidate.radii.get(name, name)
            pairs[name if is_option else f"{finding.candidate.name}.{argument}"] = value
            if is_option:
                settings[name] = value
    if has_entries:
        values = {f.candidate.name: {k: v for k, v in f.values.items() if k not in settings} for f in findings}
        entries = {c.name: _entry(c, values.get(c.name, {}), recipe, given) for c in candidates}
        if None in entries.values():
            return False
        settings["methods"] = entries
    settings["searched"] = [f"{name}={value}" for name, value in pairs.items()]
    header = "".join(f"# {line}\n" for line in _comment(findings, metric, remarks))
    write_text(path, header + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    return True


def _comment(findings: Sequence[Finding], metric: str, remarks: Sequence[str]) -> list[str]:
    """Return what best.yaml says about itself."""
    lines = [f"Found by `lightning-ssesam sweep`: the best trials by {metric!r} on validation data."]
    for finding in findings:
        best, number = finding.complete[0], sum(map(is_done, finding.trials))
        value = f"{100 * (best.value or 0.0):.1f} %"
        line = f"{finding.candidate.name}: trial {best.number}, the best of {number}: {value}."
        lines.append(line + (f" {_tie(finding)}." if finding.ties > 1 else ""))
    return [*lines, *remarks]


def _entry(
    candidate: Candidate, values: Mapping[str, float], recipe: Recipe, given: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return a method as compare reads it, or None if its parts are known as Python objects only."""
    written = given.get("methods")
    if isinstance(written, dict):
        entry: dict[str, Any] = deepcopy(written[candidate.name])
    elif candidate.is_shipped:
        entry = {"objective": {"class_path": candidate.name}}
    else:
        return None
    for name, argument in candidate.radii.items():
        if name in values:
            entry["objective"] = _with_radius(entry["objective"], argument, values[name])
    if "gamma" in values:
        switch = {"class_path": "lightning_ssesam.StageSwitch", "init_args": {"at": values["gamma"]}}
        entry["callbacks"] = [*(entry.get("callbacks") or []), switch]
    if "lr" in values:
        optimizer = entry.get("optimizer") or given.get("optimizer") or _described(recipe.optimizer)
        if optimizer is None:
            return None
        entry["optimizer"] = deepcopy(optimizer)
        _set_argument(entry, "optimizer", "lr", values["lr"])
    return entry


def _with_radius(objective: Any, name: str, value: float) -> dict[str, Any]:
    """Return an objective by class path with a radius. In a Staged, all objectives that have the radius get it."""
    spec: dict[str, Any] = {"class_path": objective} if isinstance(objective, str) else dict(objective)
    arguments = dict(spec.get("init_args") or {})
    if "objectives" in arguments:
        parts = [
            (part, {"objectives", name} & (part.get("init_args") or {}).keys()) for part in arguments["objectives"]
        ]
        arguments["objectives"] = [_with_radius(part, name, value) if has_it else part for part, has_it in parts]
    else:
        arguments[name] = value
    return {**spec, "init_args": arguments}


def _set_argument(entry: dict[str, Any], part: str, name: str, value: float) -> None:
    if isinstance(entry[part], str):
        entry[part] = {"class_path": entry[part]}
    entry[part]["init_args"] = {**(entry[part].get("init_args") or {}), name: value}


def _described(factory: Any) -> dict[str, Any] | None:
    """Return class path and arguments of a class, or of a partial call of one."""
    kind, arguments = (factory.func, factory.keywords) if isinstance(factory, partial) else (factory, {})
    if not isclass(kind):
        return None
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": dict(arguments)}
