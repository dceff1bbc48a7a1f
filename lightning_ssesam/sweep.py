"""Search for the radii and the switch of SSE-SAM on validation data."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.optim import Optimizer
from tqdm.auto import tqdm
from typing_extensions import override

from lightning_ssesam._validation import (
    bad_argument,
    check_choice,
    check_fraction,
    check_integer,
    check_positive,
)
from lightning_ssesam.compare import DEFAULT_SGD
from lightning_ssesam.data import DigitsLT, LongTailDataModule
from lightning_ssesam.models import BackboneFactory, SmallConvNet
from lightning_ssesam.objectives import SSESAM
from lightning_ssesam.runs import GROUPS, Experiment, limited_threads, make_folder, quiet
from lightning_ssesam.tables import write_csv

if TYPE_CHECKING:
    import optuna

METRICS = ("all", "tail", "mean_of_head_and_tail")


def sweep(
    trials: int = 30,
    seeds: int = 1,
    epochs: int = 60,
    data: Callable[[], LongTailDataModule] = DigitsLT,
    backbone: BackboneFactory = SmallConvNet,
    optimizer: Callable[[Iterable[Any]], Optimizer] = DEFAULT_SGD,
    loss: Callable[[], nn.Module] | None = None,
    head_rho: tuple[float, float] = (0.01, 0.5),
    tail_rho: tuple[float, float] = (0.01, 0.5),
    gamma: tuple[float, float] = (0.3, 0.9),
    metric: Literal["all", "tail", "mean_of_head_and_tail"] = "all",
    tail_fraction: float | None = None,
    tail_below: int | None = None,
    model: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    prune: bool = True,
    threads: int = 1,
    output: Path = Path("sweep"),
    config: str | None = None,
) -> dict[str, float]:
    """Search for head_rho, tail_rho and gamma of SSE-SAM with Optuna, on the validation set.

    Trials that come out worse than the median of the earlier ones are given up early, but not before stage 2 has
    had a fifth of its epochs, since the tail catches up in it. The same command again goes on where it was; the test
    set is not looked at. Writes to the output folder: journal.log (Optuna's), trials.csv, sweep.png and best.yaml,
    which `lightning-ssesam compare --config` takes.

    Args:
        trials: How many trials in all, those of earlier calls included.
        seeds: Trainings for a trial, whose accuracies are averaged. They differ from those of compare.
        epochs: Length of each training.
        data: Data module by class path, with its arguments; its validation set must not be its test set.
        backbone: Network by class path, with its arguments.
        optimizer: Optimizer by class path, with its arguments.
        loss: Loss by class path, with its arguments; cross-entropy by default.
        head_rho: Smallest and largest radius for the head, searched on a log scale.
        tail_rho: Smallest and largest radius for the tail, searched on a log scale.
        gamma: Smallest and largest share of the training after which stage 2 begins.
        metric: What is to be large, after the last epoch: accuracy of all classes or of the tail, every class
            counting the same, or the mean of head and tail accuracy, the two groups counting the same.
        tail_fraction: Tail classes are the rarest ones that hold at most this fraction of the training samples; 0.2
            if tail_below is not given either.
        tail_below: Tail classes have fewer training samples than this.
        model: Further arguments of LongTailClassifier.
        trainer: Further arguments of the Trainer.
        prune: Whether to give up trials early.
        threads: CPU threads for an operation.
        output: Folder for the results.
        config: The configuration of the search as YAML, of which best.yaml takes what compare needs; the command line
            fills it in.

    Returns:
        The best values found, and the accuracies of head, tail and all that came of them.

    Raises:
        ValueError: If an argument is out of range.
        ModuleNotFoundError: If Optuna is not installed.

    """
    import optuna

    for name, value in {"trials": trials, "seeds": seeds, "epochs": epochs, "threads": threads}.items():
        check_integer(name, value, minimum=1)
    check_choice("metric", metric, METRICS)
    bounds_of = {"head_rho": head_rho, "tail_rho": tail_rho, "gamma": gamma}
    for name, bounds in bounds_of.items():
        if not isinstance(bounds, Sequence) or len(bounds) != 2:
            raise bad_argument(name, "the smallest and the largest value", bounds)
        low, high = ((check_fraction if name == "gamma" else check_positive)(name, bound) for bound in bounds)
        if low > high:
            raise bad_argument(name, "the smallest and the largest value, in this order", bounds)
        bounds_of[name] = (low, high)
    tail = {"tail_fraction": tail_fraction, "tail_below": tail_below}

    def experiment(head: float, tail_radius: float, switch: float) -> Experiment:
        return Experiment(
            "SSESAM",
            data,
            backbone,
            partial(SSESAM, head_rho=head, tail_rho=tail_radius),
            optimizer,
            epochs,
            loss=loss,
            gamma=switch,
            model={**tail, **(model or {})},
            trainer=trainer or {},
            threads=threads,
        )

    module = data()
    if module.val_is_test:
        expected = "a data module with a validation set of its own (such as val_per_class=50)"
        raise bad_argument("data", expected, got_text="one that validates on its test set")
    with quiet():
        first = experiment(head_rho[0], tail_rho[0], gamma[0])
        settings = first.fingerprint(first.make_split(module))
    module.prepare_data()
    study = _open_study(output, f"{settings} {seeds} {metric} {bounds_of}")

    def objective(trial: optuna.Trial) -> float:
        radii = [
            trial.suggest_float(name, *bounds, log=True)
            for name, bounds in (("head_rho", head_rho), ("tail_rho", tail_rho))
        ]
        switch = trial.suggest_float("gamma", *gamma)
        watch = _Watch(trial, metric, switch + 0.2 * (1 - switch) if prune else math.inf)
        for seed in range(_FIRST_SEED, _FIRST_SEED + seeds):
            experiment(radii[0], radii[1], switch).fit(seed, [watch])
        return watch.finish()

    left = trials - sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in study.trials)
    with quiet(), limited_threads(threads):
        try:
            for _ in tqdm(range(max(left, 0)), unit="trial"):
                study.optimize(objective, n_trials=1)
        except (KeyboardInterrupt, SystemExit):
            print("\nInterrupted; run it again to go on.")
            raise KeyboardInterrupt from None
        finally:
            _write_trials(study.trials, output / "trials.csv")
    return _report(study, output, config)


# Those of compare begin at 0.
_FIRST_SEED = 1000
_PARAMETERS = ("head_rho", "tail_rho", "gamma")
# What compare has as well, and should do alike.
_SHARED = {*Experiment.__dataclass_fields__, "tail_fraction", "tail_below"} - {"method", "objective", "callbacks"}


def _open_study(output: Path, settings: str) -> "optuna.Study":
    """Return the search in a folder, a new one if there is none; trials that were cut off are to be made again."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    make_folder(output)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = str(output / "journal.log")
    storage = JournalStorage(JournalFileBackend(path, lock_obj=JournalFileOpenLock(path)))
    study = optuna.create_study(
        storage=storage,
        study_name="sweep",
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(),
    )
    if study.user_attrs.setdefault("settings", settings) != settings:
        raise bad_argument("output", "a folder without a search of other settings", str(output))
    study.set_user_attr("settings", settings)
    for trial in study.trials:
        if trial.state == optuna.trial.TrialState.RUNNING:
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            if len(trial.params) == len(_PARAMETERS):
                study.enqueue_trial(trial.params)
    # A sampler that is made anew would draw again what it drew first.
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))
    return study


class _Watch(Callback):
    """Tells Optuna how a trial does, and gives it up if Optuna says so."""

    def __init__(self, trial: "optuna.Trial", metric: str, earliest: float) -> None:
        self.trial, self.metric, self.earliest = trial, metric, earliest
        self.epoch = 0
        self.finished: list[dict[str, float]] = []

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after validation: report, and stop a trial that is not worth its time."""
        import optuna

        if not (accuracy := _accuracies(trainer)):
            return
        if math.isnan(_value(accuracy, self.metric)):
            expected = "an accuracy of classes that the validation set has"
            raise bad_argument("metric", expected, got_text=f"{self.metric!r}, which is NaN")
        self.trial.report(_value(accuracy, self.metric), self.epoch)
        self.epoch += 1
        self._keep([*self.finished, accuracy])
        if (trainer.current_epoch + 1) >= self.earliest * (trainer.max_epochs or 1) and self.trial.should_prune():
            raise optuna.TrialPruned

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after the last epoch: note what the trial came to."""
        if not (accuracy := _accuracies(trainer)):
            raise bad_argument("trainer", "settings with which it validates at least once", got_text="none at all")
        self.finished.append(accuracy)

    def finish(self) -> float:
        """Return what the trial came to, averaged over its seeds."""
        return _value(self._keep(self.finished), self.metric)

    def _keep(self, accuracies: list[dict[str, float]]) -> dict[str, float]:
        means = {group: statistics.mean(accuracy[group] for accuracy in accuracies) for group in GROUPS}
        for group, value in means.items():
            self.trial.set_user_attr(group, value)
        return means


def _accuracies(trainer: pl.Trainer) -> dict[str, float]:
    """Return the last validation's accuracies; none before the first, which may take more than an epoch."""
    metrics = trainer.callback_metrics
    return {group: metrics[f"val/acc_{group}"].item() for group in GROUPS if f"val/acc_{group}" in metrics}


def _value(accuracy: dict[str, float], metric: str) -> float:
    return (accuracy["head"] + accuracy["tail"]) / 2 if metric == METRICS[2] else accuracy[metric]


def _write_trials(trials: Sequence["optuna.trial.FrozenTrial"], path: Path) -> None:
    rows = [
        [trial.number, trial.state.name.lower()]
        + [trial.params.get(name, "") for name in _PARAMETERS]
        + [trial.user_attrs.get(group, "") for group in GROUPS]
        for trial in trials
    ]
    write_csv(path, ["trial", "state", *_PARAMETERS, *GROUPS], rows)


def _report(study: "optuna.Study", output: Path, config: str | None) -> dict[str, float]:
    import yaml

    from lightning_ssesam.figures import draw_sweep

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
    draw_sweep([trial.user_attrs for trial in ranked], output / "sweep.png")
    print(f"\nWritten: {', '.join(str(output / name) for name in ('trials.csv', 'sweep.png', 'best.yaml'))}")
    return {**settings, **{group: best.user_attrs[group] for group in GROUPS}}
