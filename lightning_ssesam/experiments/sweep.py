"""Search for the radii and the switch of SSE-SAM on validation data."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from tqdm.auto import tqdm
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_choice, check_fraction, check_integer, check_positive
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.console import limited_threads, quiet
from lightning_ssesam.experiments.experiment import Experiment
from lightning_ssesam.experiments.files import make_folder
from lightning_ssesam.experiments.lifetimes import interruption
from lightning_ssesam.experiments.recipe import Recipe
from lightning_ssesam.experiments.runs import GROUPS
from lightning_ssesam.experiments.tables import write_csv
from lightning_ssesam.objectives import SSESAM

if TYPE_CHECKING:
    import optuna

METRICS = ("all", "tail", "mean_of_head_and_tail")


def sweep(
    trials: int = 30,
    seeds: int = 1,
    head_rho: tuple[float, float] = (0.01, 0.5),
    tail_rho: tuple[float, float] = (0.01, 0.5),
    gamma: tuple[float, float] = (0.3, 0.9),
    metric: Literal["all", "tail", "mean_of_head_and_tail"] = "all",
    prune: bool = True,
    output: Path = Path("sweep"),
    config: str | None = None,
    **recipe: Any,
) -> dict[str, float]:
    """Search for head_rho, tail_rho and gamma of SSE-SAM with Optuna, on the validation set.

    Trials below the median of earlier ones are pruned, but not before a fifth of stage 2, in which the tail catches up.
    The same command again continues the search. The test set is not used, so the data module must have another
    validation set.

    Writes to the output folder: journal.log (Optuna's), trials.csv, sweep.png, and best.yaml for
    `lightning-ssesam compare --config`.

    Args:
        trials: Number of trials in all, including those of earlier calls.
        seeds: Number of trainings for a trial; their accuracies are averaged. Their seeds differ from those of compare.
        head_rho: Smallest and largest radius for the head, searched on a log scale.
        tail_rho: Smallest and largest radius for the tail, searched on a log scale.
        gamma: Smallest and largest fraction of the training after which stage 2 begins.
        metric: Accuracy to maximise, after the last epoch. In ``all`` and ``tail``, each class counts the same. In
            ``mean_of_head_and_tail``, the two groups count the same.
        prune: Whether to end bad trials early.
        output: Folder for the results.
        config: Configuration of the search, as YAML. Options that compare has as well go to best.yaml. The command line
            fills it in.
        **recipe: Fields of :class:`~lightning_ssesam.experiments.recipe.Recipe`, such as ``data`` and ``epochs``.

    Returns:
        The best values, and the accuracies of all groups with them.

    Raises:
        ArgumentError: If an argument is out of range.
        ModuleNotFoundError: If Optuna is not installed.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for name, value in {"trials": trials, "seeds": seeds}.items():
        check_integer(name, value, minimum=1)
    check_choice("metric", metric, METRICS)
    bounds = _check_bounds({"head_rho": head_rho, "tail_rho": tail_rho, "gamma": gamma})
    search = _Search(Recipe(**recipe), seeds, metric, bounds, prune)
    study = _open_study(output, search.prepare())
    missing = trials - sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in study.trials)
    with quiet(), limited_threads(search.recipe.threads):
        try:
            for _ in tqdm(range(max(missing, 0)), unit="trial"):
                study.optimize(search, n_trials=1)
        except (KeyboardInterrupt, SystemExit) as error:
            print("\nInterrupted; run it again to go on.")
            raise interruption(error) from None
        finally:
            _write_trials(study.trials, output / "trials.csv")
    return _report(study, output, config)


def _check_bounds(bounds: dict[str, Any]) -> dict[str, tuple[float, float]]:
    checked = {}
    for name, pair in bounds.items():
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise bad_argument(name, "the smallest and the largest value", pair)
        low, high = ((check_fraction if name == "gamma" else check_positive)(name, bound) for bound in pair)
        if low > high:
            raise bad_argument(name, "the smallest and the largest value, in this order", pair)
        checked[name] = (low, high)
    return checked


@dataclass(frozen=True)
class _Search:
    """The function that Optuna maximises: train a trial, and return its accuracy on the validation set."""

    recipe: Recipe
    seeds: int
    metric: str
    bounds: dict[str, tuple[float, float]]
    prune: bool

    def prepare(self) -> str:
        """Check and download the data. Return a text that identifies the search."""
        data = self.recipe.make_data()
        if data.val_is_test:
            expected = "a data module with its own validation set (for example val_per_class=50)"
            raise bad_argument("data", expected, got_text="one that validates on its test set")
        with quiet():
            first = self._experiment({name: low for name, (low, _) in self.bounds.items()})
            settings = first.fingerprint(first.make_split(data))
        data.prepare_data()
        data.check_files()
        first.check_network(data)
        return f"{settings} {self.seeds} {self.metric} {self.bounds}"

    def __call__(self, trial: "optuna.Trial") -> float:
        chosen = {name: trial.suggest_float(name, *self.bounds[name], log=name != "gamma") for name in _PARAMETERS}
        # The time at which a fifth of stage 2 is over.
        earliest = chosen["gamma"] + 0.2 * (1 - chosen["gamma"]) if self.prune else math.inf
        watch = _Watch(trial, self.metric, earliest)
        for seed in range(_FIRST_SEED, _FIRST_SEED + self.seeds):
            self._experiment(chosen).fit(seed, [watch])
        return _value(watch.keep(watch.finished), self.metric)

    def _experiment(self, chosen: dict[str, float]) -> Experiment:
        objective = partial(SSESAM, head_rho=chosen["head_rho"], tail_rho=chosen["tail_rho"])
        return Experiment("SSESAM", objective, gamma=chosen["gamma"], **vars(self.recipe))


# Far from the seeds of compare, which begin at 0.
_FIRST_SEED = 1000
_PARAMETERS = ("head_rho", "tail_rho", "gamma")
# Options with the same meaning in compare.
_SHARED = {field.name for field in fields(Recipe)} | {"gamma"}


def _open_study(output: Path, settings: str) -> "optuna.Study":
    """Return the search in a folder, or a new one. Interrupted trials will be repeated."""
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    make_folder(output)
    path = str(output / "journal.log")
    storage = optuna.storages.JournalStorage(JournalFileBackend(path, lock_obj=JournalFileOpenLock(path)))
    study = optuna.create_study(storage=storage, study_name="sweep", direction="maximize", load_if_exists=True)
    study.pruner = optuna.pruners.MedianPruner()
    if study.user_attrs.setdefault("settings", settings) != settings:
        found = f"{str(output)!r} holds a search with other settings."
        raise ArgumentError(f"{found} Use another `output`, or delete the folder.")
    study.set_user_attr("settings", settings)
    for trial in study.trials:
        if trial.state == optuna.trial.TrialState.RUNNING:
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            if len(trial.params) == len(_PARAMETERS):
                study.enqueue_trial(trial.params)
    # A new sampler with the same seed would repeat its first draws.
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))
    return study


class _Watch(Callback):
    """Reports the accuracy of a trial to Optuna, and ends the trial if Optuna prunes it."""

    def __init__(self, trial: "optuna.Trial", metric: str, earliest: float) -> None:
        self.trial, self.metric, self.earliest = trial, metric, earliest
        self.epoch = 0
        self.finished: list[dict[str, float]] = []

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after validation: report the accuracy, and stop a trial that is pruned."""
        import optuna

        if not (accuracy := _accuracies(trainer)):
            return
        if math.isnan(_value(accuracy, self.metric)):
            reason = "the validation set has no images of these classes"
            raise ArgumentError(f"The metric {self.metric!r} is NaN: {reason}. Use another `metric`, or other data.")
        self.trial.report(_value(accuracy, self.metric), self.epoch)
        self.epoch += 1
        self.keep([*self.finished, accuracy])
        if (trainer.current_epoch + 1) >= self.earliest * (trainer.max_epochs or 1) and self.trial.should_prune():
            raise optuna.TrialPruned

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not (accuracy := _accuracies(trainer)):
            remedy = "Set `check_val_every_n_epoch` to at most `epochs`, and do not switch validation off."
            raise ArgumentError(f"The training ended without a validation. {remedy}")
        self.finished.append(accuracy)

    def keep(self, accuracies: list[dict[str, float]]) -> dict[str, float]:
        """Store the means of the accuracies, one for each seed, in the trial, and return them."""
        means = {group: statistics.mean(accuracy[group] for accuracy in accuracies) for group in GROUPS}
        for group, value in means.items():
            self.trial.set_user_attr(group, value)
        return means


def _accuracies(trainer: pl.Trainer) -> dict[str, float]:
    """Return the accuracies of the last validation. There may be none for several epochs."""
    metrics = trainer.callback_metrics
    return {group: metrics[f"val/acc_{group}"].item() for group in GROUPS if f"val/acc_{group}" in metrics}


def _value(accuracy: dict[str, float], metric: str) -> float:
    return (accuracy["head"] + accuracy["tail"]) / 2 if metric == METRICS[2] else accuracy[metric]


def _write_trials(trials: Sequence["optuna.trial.FrozenTrial"], path: Path) -> None:
    columns, rows = (*_PARAMETERS, *GROUPS), []
    for trial in trials:
        found = trial.params | trial.user_attrs
        rows.append([trial.number, trial.state.name.lower(), *(found.get(name, "") for name in columns)])
    write_csv(path, ["trial", "state", *columns], rows)


def _report(study: "optuna.Study", output: Path, config: str | None) -> dict[str, float]:
    import yaml

    from lightning_ssesam.experiments.figures import draw_sweep

    complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    ranked = sorted(complete, key=lambda trial: -(trial.value or 0.0))
    pruned = sum(trial.state.name == "PRUNED" for trial in study.trials)
    shown = ("head", "tail", "all")
    print(f"Validation accuracy in %, the best of {len(complete)} trials ({pruned} more were given up early)")
    print(" ".join(f"{name:>9}" for name in ("trial", *_PARAMETERS, *shown)))
    for trial in ranked[:10]:
        cells = [f"{trial.number:9}", *(f"{trial.params[name]:9.3g}" for name in _PARAMETERS)]
        print(" ".join([*cells, *(f"{100 * trial.user_attrs[group]:9.1f}" for group in shown)]))
    best = ranked[0]
    settings = {name: float(f"{best.params[name]:.4g}") for name in _PARAMETERS}
    shared = {name: value for name, value in yaml.safe_load(config or "{}").items() if name in _SHARED}
    (output / "best.yaml").write_text(yaml.safe_dump({**shared, **settings}, sort_keys=False))
    draw_sweep([trial.user_attrs for trial in ranked]).savefig(output / "sweep.png", dpi=150)
    print(f"\nWritten: {', '.join(str(output / name) for name in ('trials.csv', 'sweep.png', 'best.yaml'))}")
    return {**settings, **{group: best.user_attrs[group] for group in GROUPS}}
