"""Where the values of a comparison come from: searched, given, or defaults; and what that means for its methods."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import nn

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.callbacks import DeferredReweighting, StageSwitch
from lightning_ssesam.data import LongTailDataModule
from lightning_ssesam.experiments.experiment import Experiment
from lightning_ssesam.experiments.methods import RADII, WithSampler
from lightning_ssesam.experiments.switches import fixed_radii


class Choice(NamedTuple):
    """A value that a comparison's method was trained with.

    Attributes:
        method: Name of the method.
        name: Name of the option, such as ``sam_rho``; without one, ``METHOD.rho``.
        value: The value.
        origin: Where it comes from.
    """

    method: str
    name: str
    value: float
    origin: Literal["searched", "default", "given"]

    @property
    def is_of_objective(self) -> bool:
        """Whether it is no option, but an argument of the method's objective."""
        return "." in self.name

    def __str__(self) -> str:
        """Return the name, the value and its origin."""
        default = "the objective's" if self.is_of_objective else "chosen on 8x8 digits"
        default = "the published value" if self.name == "gamma" else default
        texts = {"searched": "searched on validation data", "default": f"a default, {default}", "given": "given"}
        return f"{self.name} = {self.value:.4g} ({texts[self.origin]})"


def find_choices(
    experiments: Sequence[Experiment],
    options: Mapping[str, float],
    defaults: Mapping[str, float],
    searched: Sequence[str] | None,
    is_shipped: bool,
) -> list[Choice]:
    """Return the values of the methods of a comparison.

    Args:
        experiments: The experiment of each method.
        options: Values of the options ``sam_rho``, ``imbsam_rho``, ``head_rho``, ``tail_rho`` and ``gamma``.
        defaults: Defaults of these options.
        searched: Names of values that were searched. ``name=value`` counts only as long as the value is the same.
        is_shipped: Whether the methods are shipped ones, whose values are options or defaults of their objectives.

    Raises:
        ArgumentError: If ``searched`` contains a name of no value.
    """
    choices = []
    for experiment in experiments:
        values = _values_of(experiment, options, is_shipped)
        if any(str(item).startswith(f"{experiment.method}.lr") for item in searched or []):
            rate = learning_rate(experiment)
            values |= {f"{experiment.method}.lr": float(rate)} if isinstance(rate, int | float) else {}
        for name, value in values.items():
            is_default = value == defaults[name] if name in defaults else is_shipped and not name.endswith(".lr")
            choices.append(Choice(experiment.method, name, value, "default" if is_default else "given"))
    names = dict.fromkeys([*options, *(choice.name for choice in choices)])
    search_values = _check_searched(searched or [], list(names))

    def is_searched(choice: Choice) -> bool:
        value = search_values.get(choice.name, math.inf)
        return value is None or math.isclose(value, choice.value)

    return [choice._replace(origin="searched") if is_searched(choice) else choice for choice in choices]


def _values_of(experiment: Experiment, options: Mapping[str, float], is_shipped: bool) -> dict[str, float]:
    objective = experiment.objective()
    if is_shipped and experiment.method in RADII:
        values = {option: options[option] for option in RADII[experiment.method]}
    else:
        radii = fixed_radii(objective, experiment.callbacks)
        values = {f"{experiment.method}.{name}": radius for name, radius in radii.items()}
    if experiment.is_switched_at_gamma(objective):
        values["gamma"] = options["gamma"]
    elif objective.num_stages > 1:
        for callback in experiment.callbacks:
            values |= _shares_of(experiment.method, callback.at) if isinstance(callback, StageSwitch) else {}
    return values


def _shares_of(method: str, at: float | Sequence[float] | None) -> dict[str, float]:
    """Return the shares of the training after which a StageSwitch switches a method, by name."""
    if isinstance(at, Sequence):
        return {f"{method}.gamma_{number}": share for number, share in enumerate(at, 1)}
    return {} if at is None else {f"{method}.gamma": at}


def learning_rate(experiment: Experiment) -> Any:
    """Return the argument ``lr`` of the optimizer of an experiment, or None."""
    return experiment.optimizer(nn.Linear(1, 1).parameters()).defaults.get("lr")


def _check_searched(searched: Sequence[str], names: Sequence[str]) -> dict[str, float | None]:
    """Return the value that each searched name had, or None if it does not matter."""
    values: dict[str, float | None] = {}
    for item in [searched] if isinstance(searched, str) else searched:
        name, has_value, text = (item, "", "") if item in names else str(item).rpartition("=")
        try:
            value = float(text) if has_value else None
        except ValueError:
            name = ""
        if isinstance(searched, str) or name not in names:
            expected = f"a list of names of values ({', '.join(names)}), each alone or as name=value"
            raise bad_argument("searched", expected, searched)
        values[name] = value
    return values


def describe(choices: Sequence[Choice]) -> str:
    """Return the radii and switches with their origin. A learning rate is among them only if it was searched."""
    shown = [str(choice) for choice in choices if choice.origin == "searched" or not choice.name.endswith(".lr")]
    return "; ".join(dict.fromkeys(shown))


def notes(choices: Sequence[Choice], methods: Sequence[str], is_digits: bool) -> list[str]:
    """Return what a reader must know before comparing the methods.

    Args:
        choices: The values of all methods.
        methods: Names of all methods.
        is_digits: Whether the data are those that the defaults were chosen on.
    """
    searched = [choice for choice in choices if choice.origin == "searched"]
    if not searched:
        return _notes_on_defaults([c for c in choices if c.origin == "default" and c.name != "gamma"], is_digits)
    with_search = {choice.method for choice in searched}
    with_rate = {choice.method for choice in searched if choice.name.endswith(".lr")}
    to_search = {choice.method for choice in choices if not choice.name.endswith(".lr")}
    behind = [name for name in methods if name not in with_search and (name in to_search or with_rate)]
    if not behind:
        return []
    ahead = [name for name in methods if name in with_search]
    return [
        f"Values of {_list(ahead)} were searched on validation data, and none of {_list(behind)}: the comparison is"
        f" not fair to {_list(behind)}."
    ]


def _notes_on_defaults(defaults: Sequence[Choice], is_digits: bool) -> list[str]:
    """Return what must be known of a comparison in which nothing was searched."""
    made = [f"{choice.name} = {choice.value:.4g}" for choice in defaults if not choice.is_of_objective]
    others = dict.fromkeys(choice.method for choice in defaults if choice.is_of_objective)
    advice = "Search with `lightning-ssesam sweep` before you prefer a method."
    found = []
    if made and not is_digits:
        values = ", ".join(made)
        found.append(
            f"Nothing was searched on these data. Defaults made for 8x8 digits were compared: {values}. {advice}"
        )
    if others:
        found.append(f"The radii of {_list(list(others))} are defaults that were chosen on no data. {advice}")
    return found


def note_on_remedies(experiments: Sequence[Experiment], data: LongTailDataModule) -> list[str]:
    """Return a hint at losses and samplers for imbalanced classes, if no method has one."""
    has_one = data.sampler is not None or any(
        experiment.loss is not None
        or isinstance(experiment.data, WithSampler)
        or any(isinstance(callback, DeferredReweighting) for callback in experiment.callbacks)
        for experiment in experiments
    )
    if has_one:
        return []
    return [
        "No method has a loss or a sampler for imbalanced classes. These often change more than the objective does: try"
        " logit adjustment and ClassBalancedSampler, as the shipped configuration compare_folder does."
    ]


def _list(names: Sequence[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), names[-1]])
