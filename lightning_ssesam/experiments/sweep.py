"""Search for the radii of every method, for the switch of SSE-SAM and for learning rates, on validation data."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lightning_ssesam._validation import bad_argument, check_choice, check_integer
from lightning_ssesam.data.labels import names_of_classes
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.console import limited_threads, quiet
from lightning_ssesam.experiments.files import make_folder, replaced, set_aside
from lightning_ssesam.experiments.lifetimes import interruption
from lightning_ssesam.experiments.methods import Method, make_methods
from lightning_ssesam.experiments.recipe import MOST, Recipe
from lightning_ssesam.experiments.recorder import count_images
from lightning_ssesam.experiments.runs import GROUPS
from lightning_ssesam.experiments.samples import make_sources
from lightning_ssesam.experiments.search import (
    METRICS,
    Candidate,
    Search,
    a_fifth_later,
    check_bounds,
    find_candidates,
    is_done,
)
from lightning_ssesam.experiments.search_place import Place
from lightning_ssesam.experiments.search_progress import SearchProgress
from lightning_ssesam.experiments.search_report import (
    Finding,
    describe_validation,
    format_finding,
    refuse_without_best,
    write_best,
    write_trials,
)
from lightning_ssesam.experiments.search_settings import Settings
from lightning_ssesam.experiments.search_storage import JOURNAL
from lightning_ssesam.experiments.search_turns import Turns, is_surplus, is_taken

if TYPE_CHECKING:
    import optuna

__all__ = ["METRICS", "SEARCHED", "sweep"]

SEARCHED = ("SAM", "ImbSAM", "SSESAM")


def sweep(
    methods: str | list[str] | dict[str, Method] = list(SEARCHED),  # noqa: B006 (never changed; the help shows it)
    trials: int = 30,
    seeds: int = 1,
    sam_rho: tuple[float, float] = (0.01, 0.5),
    imbsam_rho: tuple[float, float] = (0.01, 0.5),
    head_rho: tuple[float, float] = (0.01, 0.5),
    tail_rho: tuple[float, float] = (0.01, 0.5),
    gamma: tuple[float, float] = (0.3, 0.9),
    lr: tuple[float, float] | None = None,
    radii: dict[str, tuple[float, float]] | None = None,
    metric: Literal["all", "tail", "mean_of_head_and_tail"] = "all",
    prune: bool = True,
    output: Path = Path("sweep"),
    config: str | None = None,
    storage: str | None = None,
    **recipe: Any,
) -> dict[str, dict[str, float]]:
    """Search for the radii of every method, and the switch of SSE-SAM, with Optuna on the validation set.

    Every method gets the same number of trials, seeds and epochs. The same command again continues the search. The test
    set is not used, so the data module must have another validation set.

    Writes to the output folder: journal.log (Optuna's), trials.csv, sweep.png, and best.yaml for
    `lightning-ssesam compare --config`.

    Args:
        methods: Any of ERM, SAM, ImbSAM, SSESAM, ASAM, FriendlySAM, GSAM, WSAM, PGN, LESAM, FocalSAM, CCSAM,
            MomentumSAM, RandomSAM, with commas between them. In a YAML file: your own names and their options. The
            radii of their objectives are searched.
        trials: Number of trials of each method, including those of earlier calls.
        seeds: Trainings for a trial, with averaged results. Seeds differ from compare's.
        sam_rho: Smallest and largest radius of SAM. All radii are searched on a log scale.
        imbsam_rho: Smallest and largest radius of ImbSAM, for the tail.
        head_rho: Smallest and largest radius of SSESAM for the head.
        tail_rho: Smallest and largest radius of SSESAM for the tail.
        gamma: Smallest and largest fraction of the training after which SSESAM's stage 2 begins.
        lr: Smallest and largest learning rate, searched on a log scale for every method; the optimizer's by default.
        radii: Smallest and largest value of other radii, such as {ASAM.rho: [0.1, 2]}; by default a
            hundredth of the objective's value and ten times it.
        metric: Accuracy to maximise, after the last epoch. Each class counts the same; in ``mean_of_head_and_tail``,
            each group.
        prune: Early end of trials below the median of their method, after a fifth of stage 2.
        output: Folder for the results.
        config: Configuration of the search, as YAML. Options that compare has as well go to best.yaml. The command line
            fills it in.
        storage: Optuna storage of several machines: journal:PATH, or a URL.
        **recipe: Fields of :class:`~lightning_ssesam.experiments.recipe.Recipe`, such as ``data`` and ``epochs``.

    Returns:
        For each method, the best values, and the accuracies of all groups with them.

    Raises:
        ArgumentError: If an argument is out of range, another command is at work in the folder, its journal is damaged,
            the storage cannot be reached, or no trial of a method was trained to its end.
        ModuleNotFoundError: If Optuna is not installed.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for name, value in {"trials": trials, "seeds": seeds}.items():
        check_integer(name, value, minimum=1, maximum=MOST)
    check_choice("metric", metric, METRICS)
    pairs = {"sam_rho": sam_rho, "imbsam_rho": imbsam_rho, "head_rho": head_rho, "tail_rho": tail_rho, "gamma": gamma}
    bounds = check_bounds(pairs if lr is None else pairs | {"lr": lr})
    others = check_bounds({} if radii is None else radii)
    shared = Recipe(**recipe)
    chosen = make_methods(methods, {name: low for name, (low, _) in bounds.items()})
    named = find_candidates(chosen, bounds, not isinstance(methods, dict), others)
    if not (candidates := [candidate for candidate in named if candidate.bounds]):
        expected = "methods of which something is searched (ERM has no radius; `lr` searches its learning rate)"
        raise bad_argument("methods", expected, got_text=", ".join(chosen))
    place = Place(output, storage)
    prepared = _prepare(named, shared, metric)
    make_folder(output)
    with place.opened() as opened:
        settings = {c.name: Settings(prepared.settings[c.name], seeds, metric, c.bounds, shared) for c in candidates}
        studies = {c.name: _open_study(opened, c, settings[c.name], place) for c in candidates}
        print("\n".join([*prepared.remarks, *(f"{c.name} has nothing to search." for c in named if not c.bounds)]))
        earliest = a_fifth_later(sum(bounds["gamma"]) / 2) if prune else math.inf
        done = sum(min(_count(study), trials) for study in studies.values())
        with SearchProgress(trials * len(candidates), done, seeds, shared.epochs) as progress:
            searches = [(studies[c.name], Search(c, shared, seeds, metric, earliest, progress)) for c in candidates]
            turns = Turns(searches, trials, place, lambda study: settings[study.study_name].check(study, place))
            findings = _search(
                searches, turns.make_all if place.is_shared else partial(_alone, searches, trials), place
            )
        write = partial(write_best, metric=metric, remarks=prepared.remarks, candidates=named, recipe=shared)
        with place.written():
            return _report(findings, output, partial(write, config=config))


class _Prepared(NamedTuple):
    """What is known of a search before it trains: a text that identifies each method's, and remarks on the data."""

    settings: dict[str, str]
    remarks: list[str]


def _prepare(candidates: Sequence[Candidate], recipe: Recipe, metric: str) -> _Prepared:
    """Check every method, and check and download the data."""
    first, *sources = make_sources([recipe.data, *(candidate.method.data or recipe.data for candidate in candidates)])
    if any(source.data.val_is_test for source in [first, *sources]):
        expected = "a data module with its own validation set (for example val_per_class=50)"
        raise bad_argument("data", expected, got_text="one that validates on its test set")
    with quiet():
        for candidate in candidates:
            candidate.check(recipe)
        experiments = [candidate.experiment(recipe, candidate.lowest) for candidate in candidates]
        split = experiments[0].make_split(first.data)
        for experiment, source in zip(experiments, sources, strict=True):
            experiment.check(split, source.data)
    settings = {}
    for experiment, source in zip(experiments, sources, strict=True):
        settings[experiment.method] = experiment.fingerprint(split, source.contents, source.data)
        experiment.check_network(source.prepared)
    remarks = describe_validation(count_images(first.prepared, "val"), split, metric, names_of_classes(first.data))
    return _Prepared(settings, remarks)


def _open_study(storage: Any, candidate: Candidate, settings: Settings, place: Place) -> "optuna.Study":
    """Return the search for a method in a place, or a new one. Interrupted trials will be repeated."""
    import optuna

    study = optuna.create_study(storage=storage, study_name=candidate.name, direction="maximize", load_if_exists=True)
    study.pruner = optuna.pruners.MedianPruner()
    settings.keep(study, place)
    if not place.is_shared:
        _repeat_interrupted(study, candidate, place)
    # A new sampler with the same seed would repeat its first draws.
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))
    return study


def _repeat_interrupted(study: "optuna.Study", candidate: Candidate, place: Place) -> None:
    """Mark the trials that a command has begun, and put their values into the queue. The command has ended."""
    import optuna

    running = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.RUNNING]
    if any(map(is_taken, running)):
        found = f"Other processes are at work on the search in {place.name!r}."
        raise ArgumentError(f"{found} Join them by `storage`: journal:{place.output / JOURNAL}")
    for trial in running:
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        if len(trial.params) == len(candidate.bounds):
            study.enqueue_trial(trial.params)


def _count(study: "optuna.Study") -> int:
    return sum(map(is_done, study.trials))


def _search(
    searches: Sequence[tuple["optuna.Study", Search]], make_trials: Callable[[], None], place: Place
) -> list[Finding]:
    """Make the trials that are missing, and write a table of all, also after an interruption."""
    with quiet(), limited_threads(searches[0][1].recipe.threads):
        try:
            make_trials()
        except (KeyboardInterrupt, SystemExit) as error:
            print("\nInterrupted; run it again to go on.")
            raise interruption(error) from None
        finally:
            with place.written():
                findings = [_finding(study, search) for study, search in searches]
                write_trials(findings, place.output / "trials.csv")
    return findings


def _finding(study: "optuna.Study", search: Search) -> Finding:
    return Finding(search.candidate, [trial for trial in study.trials if not is_surplus(trial)])


def _alone(searches: Sequence[tuple["optuna.Study", Search]], trials: int) -> None:
    """Make the trials that are missing, in turns, so that an interrupted search has as many of each method."""
    done = [_count(study) for study, _ in searches]
    for number in range(trials):
        for (study, search), before in zip(searches, done, strict=True):
            if number >= before:
                study.optimize(search, n_trials=1)


def _report(
    findings: Sequence[Finding], output: Path, write_best: Callable[[Sequence[Finding], Path], bool]
) -> dict[str, dict[str, float]]:
    from lightning_ssesam.experiments.figures import draw_sweep

    print("\n\n".join(map(format_finding, findings)))
    table, picture, best = (output / name for name in ("trials.csv", "sweep.png", "best.yaml"))
    refuse_without_best(findings, [picture, best])
    with replaced(picture) as unfinished:
        drawn = {finding.candidate.name: [trial.user_attrs for trial in finding.complete] for finding in findings}
        draw_sweep(drawn).savefig(unfinished, dpi=150)
    written = [table, picture]
    if write_best(findings, best):
        written.append(best)
    else:
        set_aside(best)
        print("\nThere is no best.yaml: parts made in Python cannot be written down. `sweep` returns the values.")
    print(f"\nWritten: {', '.join(map(str, written))}")
    return {f.candidate.name: {**f.values, **{g: f.complete[0].user_attrs[g] for g in GROUPS}} for f in findings}
