"""What is searched of each method, and the function that Optuna maximises: train a trial, and return its accuracy."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_fraction, check_positive
from lightning_ssesam.callbacks import StageSwitch
from lightning_ssesam.errors import ArgumentError, NonFiniteError
from lightning_ssesam.experiments.choices import learning_rate
from lightning_ssesam.experiments.experiment import Experiment, about_method
from lightning_ssesam.experiments.methods import OWN_SCALE, RADII, Method
from lightning_ssesam.experiments.recipe import Recipe
from lightning_ssesam.experiments.recorder import weights_are_finite
from lightning_ssesam.experiments.runs import GROUPS
from lightning_ssesam.experiments.search_progress import SearchProgress
from lightning_ssesam.experiments.switches import fixed_radii, needs_switch
from lightning_ssesam.objectives import Objective
from lightning_ssesam.staged import Staged
from lightning_ssesam.trainer_calls import of_first_loader

if TYPE_CHECKING:
    import optuna

METRICS = ("all", "tail", "mean_of_head_and_tail")

Bounds = dict[str, tuple[float, float]]

# Far from the seeds of compare, which begin at 0.
_FIRST_SEED = 1000


# Without a `repr`, the fingerprint of an experiment looks at the parts.
@dataclass(frozen=True, repr=False)
class WithRadii:
    """Makes an objective, and sets its radii.

    Args:
        objective: Makes the objective.
        radii: Value of each radius by name.
    """

    objective: Callable[[], Objective]
    radii: Mapping[str, float]

    def __call__(self) -> Objective:
        """Return the objective."""
        objective = self.objective()
        for name, value in self.radii.items():
            objective.set_radius(name, value)
        return objective


@dataclass(frozen=True)
class Candidate:
    """A method, and which of its values are searched.

    Attributes:
        name: Name of the method.
        method: Options of the method.
        radii: Argument of the objective for the name of each radius that is searched.
        bounds: Smallest and largest value of each name that is searched: radii, ``gamma``, ``lr``.
        is_shipped: Whether it is a shipped method, whose radii and ``gamma`` are options of compare.
    """

    name: str
    method: Method
    radii: Mapping[str, str]
    bounds: Bounds
    is_shipped: bool

    @property
    def needs_entry(self) -> bool:
        """Whether compare needs an entry in its `methods` for the values, because they are no options."""
        has_options = self.is_shipped and self.name in RADII
        return bool(self.bounds) and (not has_options or "lr" in self.bounds)

    @property
    def lowest(self) -> dict[str, float]:
        """The smallest value of each name."""
        return {name: low for name, (low, _) in self.bounds.items()}

    def experiment(self, recipe: Recipe, values: Mapping[str, float]) -> Experiment:
        """Return the experiment that trains the method with some values."""
        objective = self.method.objective
        optimizer: Callable[..., Optimizer] = self.method.optimizer or recipe.optimizer
        if self.radii:
            radii = {argument: values[name] for name, argument in self.radii.items()}
            # The objectives within it have the radii.
            is_staged = isinstance(objective(), Staged)
            objective = WithRadii(objective, radii) if is_staged else partial(objective, **radii)
        if "lr" in values:
            optimizer = partial(optimizer, lr=values["lr"])
        method = replace(self.method, objective=objective, optimizer=optimizer)
        return method.experiment(self.name, recipe, values.get("gamma", StageSwitch.default_at))

    def check(self, recipe: Recipe) -> None:
        """Raise ``ArgumentError`` if the objective or the optimizer does not take the values."""
        experiment = self.experiment(recipe, self.lowest)
        try:
            found = experiment.objective().radius_values
            reason = ""
        except TypeError as error:
            found, reason = {}, f" ({error})"
        wanted = {argument: self.bounds[name][0] for name, argument in self.radii.items()}
        if not wanted.items() <= found.items():
            expected = f"objectives that take their radii as arguments ({', '.join(wanted)})"
            raise bad_argument("methods", expected, got_text=f"another one for {self.name!r}{reason}")
        if "lr" in self.bounds:
            self._check_optimizer(experiment)

    def _check_optimizer(self, experiment: Experiment) -> None:
        try:
            reason = learning_rate(experiment)
        except TypeError as error:
            reason = error
        if reason != self.bounds["lr"][0]:
            expected = "one that takes the argument `lr`, because `lr` is searched"
            raise bad_argument("optimizer", expected, got_text=f"another one for {self.name!r} ({reason})")


def find_candidates(
    methods: Mapping[str, Method], bounds: Bounds, is_shipped: bool, given: Bounds | None = None
) -> list[Candidate]:
    """Return the methods with what is searched of them. Those with nothing to search are among them.

    A ``rho`` of a user's objective has the bounds of ``imbsam_rho`` if the objective tells head from tail, and else
    those of ``sam_rho``. A radius that no option is about lies between a hundredth of its value and ten times that.

    Args:
        methods: Methods by name.
        bounds: Smallest and largest value of each option.
        is_shipped: Whether the methods are shipped ones.
        given: Smallest and largest value of a radius by ``METHOD.name``. It comes before all others.

    Raises:
        ArgumentError: If ``given`` has a name of no radius.
    """
    candidates, given = [], given or {}
    known = []
    for name, method in methods.items():
        with about_method(name):
            objective = method.objective()
        found = fixed_radii(objective, method.callbacks)
        has_options = is_shipped and name in RADII
        radii = RADII[name] if has_options else {radius: radius for radius in objective.radius_names if radius in found}
        limits = {}
        for radius, argument in radii.items():
            known.append(f"{name}.{argument}")
            limits[radius] = given.get(known[-1]) or _bounds_of(objective, radius, found[argument], bounds)
        if needs_switch(objective, method.callbacks):
            limits["gamma"] = bounds["gamma"]
        if "lr" in bounds:
            limits["lr"] = bounds["lr"]
        candidates.append(Candidate(name, method, radii, limits, is_shipped))
    if wrong := sorted(given.keys() - set(known)):
        raise bad_argument("radii", f"bounds of radii ({', '.join(known) or 'there are none'})", got_text=wrong[0])
    return candidates


def _bounds_of(objective: Objective, radius: str, value: float, bounds: Bounds) -> tuple[float, float]:
    """Return the smallest and the largest value of a radius that is searched."""
    shared = bounds | {"rho": bounds["imbsam_rho" if objective.needs_split else "sam_rho"]}
    if value > 0 and (radius not in shared or isinstance(objective, OWN_SCALE)):
        # A default may be far above the values that train, and is rarely far below them.
        return value / 100, 10 * value
    return shared.get(radius, bounds["sam_rho"])


def check_bounds(bounds: Mapping[str, Any]) -> Bounds:
    """Return the smallest and the largest value of each name, or raise ``ArgumentError``."""
    checked = {}
    for name, pair in bounds.items():
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise bad_argument(name, "the smallest and the largest value", pair)
        low, high = ((check_fraction if name == "gamma" else check_positive)(name, bound) for bound in pair)
        if low > high:
            raise bad_argument(name, "the smallest and the largest value, in this order", pair)
        checked[name] = (low, high)
    return checked


@dataclass(frozen=True)
class Search:
    """The function that Optuna maximises for one method: train a trial, and return its accuracy on validation data.

    Attributes:
        candidate: The method and what is searched of it.
        recipe: The options that all methods share.
        seeds: Number of trainings for a trial.
        metric: Accuracy to maximise, one of :data:`METRICS`.
        earliest: Fraction of the training before which no trial of a method without stages is pruned; infinite if none
            is pruned at all.
        progress: The display.
    """

    candidate: Candidate
    recipe: Recipe
    seeds: int
    metric: str
    earliest: float
    progress: SearchProgress

    def __call__(self, trial: "optuna.Trial") -> float:
        """Train a trial. Return its accuracy in [0, 1]."""
        bounds = self.candidate.bounds
        values = {name: trial.suggest_float(name, *bounds[name], log=name != "gamma") for name in bounds}
        experiment = self.candidate.experiment(self.recipe, values)
        self.progress.begin(self.candidate.name, trial.number, best_value(trial.study.trials))
        watch = _Watch(trial, self.metric, self._earliest(values), self.progress)
        try:
            for seed in range(_FIRST_SEED, _FIRST_SEED + self.seeds):
                experiment.fit(seed, [watch])
        except NonFiniteError:
            watch.give_up_diverged()
        finally:
            self.progress.end()
        return value_of(watch.keep(watch.finished), self.metric)

    def _earliest(self, values: Mapping[str, float]) -> float:
        """Return the fraction of the training at which a fifth of stage 2 is over, or its like without stages."""
        if "gamma" in values:
            return max(a_fifth_later(values["gamma"]), math.inf if math.isinf(self.earliest) else 0.0)
        is_switched_elsewhere = self.candidate.method.objective().num_stages > 1
        return math.inf if is_switched_elsewhere else self.earliest


class _Watch(Callback):
    """Reports the accuracy of a trial to Optuna, and ends the trial if it is pruned or has diverged."""

    def __init__(self, trial: "optuna.Trial", metric: str, earliest: float, progress: SearchProgress) -> None:
        self.trial, self.metric, self.earliest, self.progress = trial, metric, earliest, progress
        self.epoch = 0
        self.finished: list[dict[str, float]] = []

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after validation: report the accuracy, and stop a trial that has diverged or is pruned."""
        import optuna

        self.progress.epoch(len(self.finished), trainer.current_epoch + 1)
        if not _loss_is_finite(trainer) and not weights_are_finite(pl_module):
            self.give_up_diverged()
        if not (accuracy := _accuracies(trainer)):
            return
        if math.isnan(value_of(accuracy, self.metric)):
            reason = "the validation set has no images of these classes"
            raise ArgumentError(f"The metric {self.metric!r} is NaN: {reason}. Use another `metric`, or other data.")
        self.trial.report(value_of(accuracy, self.metric), self.epoch)
        self.epoch += 1
        self.keep([*self.finished, accuracy])
        if (trainer.current_epoch + 1) >= self.earliest * (trainer.max_epochs or 1) and self.trial.should_prune():
            raise optuna.TrialPruned

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Without the option `log_loss` there is no loss to look at.
        has_loss = "train/loss" in trainer.callback_metrics
        if not (_loss_is_finite(trainer) if has_loss else weights_are_finite(pl_module)):
            self.give_up_diverged()
        if not (accuracy := _accuracies(trainer)):
            remedy = "Set `check_val_every_n_epoch` to at most `epochs`, and do not switch validation off."
            raise ArgumentError(f"The training ended without a validation. {remedy}")
        self.finished.append(accuracy)

    def give_up_diverged(self) -> None:
        """Mark the trial, and end it. To Optuna it is a pruned one, so that it looks elsewhere."""
        import optuna

        self.trial.set_user_attr("diverged", True)
        raise optuna.TrialPruned

    def keep(self, accuracies: list[dict[str, float]]) -> dict[str, float]:
        """Store the means of the accuracies, one for each seed, in the trial, and return them."""
        means = {group: statistics.mean(accuracy[group] for accuracy in accuracies) for group in GROUPS}
        for group, value in means.items():
            self.trial.set_user_attr(group, value)
        return means


def a_fifth_later(gamma: float) -> float:
    """Return the fraction of the training at which a fifth of stage 2 is over."""
    return gamma + 0.2 * (1 - gamma)


def is_done(trial: "optuna.trial.FrozenTrial") -> bool:
    """Return whether a trial counts as one of `trials`: it was trained to its end, was pruned, or diverged."""
    return trial.state.name in ("COMPLETE", "PRUNED")


def has_diverged(trial: "optuna.trial.FrozenTrial") -> bool:
    """Return whether the loss of a trial was not finite."""
    return bool(trial.user_attrs.get("diverged"))


def best_value(trials: Sequence["optuna.trial.FrozenTrial"]) -> float | None:
    """Return the highest accuracy of the trials that were trained to their end, if there are any."""
    values = [trial.value for trial in trials if trial.state.name == "COMPLETE" and trial.value is not None]
    return max(values, default=None)


def value_of(accuracy: Mapping[str, float], metric: str) -> float:
    """Return the value of a metric of :data:`METRICS`, from the accuracies of the groups."""
    return (accuracy["head"] + accuracy["tail"]) / 2 if metric == METRICS[2] else accuracy[metric]


def _accuracies(trainer: pl.Trainer) -> dict[str, float]:
    """Return the accuracies of the last validation. There may be none for several epochs."""
    metrics = of_first_loader(trainer.callback_metrics)
    return {group: metrics[f"val/acc_{group}"].item() for group in GROUPS if f"val/acc_{group}" in metrics}


def _loss_is_finite(trainer: pl.Trainer) -> bool:
    return math.isfinite(trainer.callback_metrics.get("train/loss", math.nan))
