"""The search for radii and switch of SSE-SAM. `test_search.py` searches other methods."""

import math
from functools import partial
from pathlib import Path

import optuna
import pytest
import yaml
from helpers import STRICT, trial_rows

from lightning_ssesam import DigitsLT
from lightning_ssesam.cli import main
from lightning_ssesam.runs import GROUPS, Experiment
from lightning_ssesam.sweep import sweep as search

pytestmark = [STRICT, pytest.mark.usefixtures("program_name")]

FOUND = ("head_rho", "tail_rho", "gamma")

sweep = partial(search, methods="SSESAM")


class FakeTrainer:
    """Reports accuracies that depend on the radii, and counts epochs."""

    def __init__(self, epochs, accuracy):
        self.max_epochs, self.current_epoch, self.accuracy = epochs, 0, accuracy

    @property
    def callback_metrics(self):
        accuracies = {f"val/acc_{group}": _Value(self.accuracy(group, self.current_epoch)) for group in GROUPS}
        return {"train/loss": 0.5, **accuracies}


class _Value(float):
    def item(self):
        return float(self)


@pytest.fixture
def trained(monkeypatch):
    """Replaces trainings: the best is head_rho 0.1 and tail_rho 0.2, and more epochs are better."""
    seen = []

    def fit(self, seed, callbacks):
        objective = self.objective()
        seen.append((objective.head_rho, objective.tail_rho, self.gamma, seed))
        worth = 0.9 - abs(objective.head_rho - 0.1) - abs(objective.tail_rho - 0.2)
        trainer = FakeTrainer(self.epochs, lambda group, epoch: worth * (epoch + 1) / self.epochs)
        for trainer.current_epoch in range(self.epochs):
            callbacks[0].on_train_epoch_end(trainer, None)
        callbacks[0].on_train_end(trainer, None)

    monkeypatch.setattr(Experiment, "fit", fit)
    return seen


def test_command(capsys):
    arguments = ["--methods=SSESAM", "--epochs=3", "--gamma=[0.4, 0.6]", "--data.seed=4"]
    main(["sweep", "--trials=3", *arguments])
    printed = capsys.readouterr().out
    assert "the best of 3 trials (0 more were given up early)" in printed
    (heading,) = [line for line in printed.splitlines() if "head_rho" in line]
    assert heading.split() == ["trial", "head_rho", "tail_rho", "gamma", "head", "tail", "all"]
    best = max(trial_rows(), key=lambda row: float(row["all"]))
    settings = yaml.safe_load(Path("sweep/best.yaml").read_text())
    assert {name: settings[name] for name in FOUND} == {name: float(f"{float(best[name]):.4g}") for name in FOUND}
    assert settings["data"]["init_args"]["seed"] == 4
    assert 0.4 <= settings["gamma"] <= 0.6
    assert Path("sweep/sweep.png").read_bytes().startswith(b"\x89PNG")
    assert len({row["head_rho"] for row in trial_rows()}) == 3

    # It goes on where it was, and compare takes what it found.
    before = trial_rows()
    main(["sweep", "--trials=4", *arguments])
    assert trial_rows()[:3] == before
    assert len(trial_rows()) == 4
    assert len({row["head_rho"] for row in trial_rows()}) == 4
    main(["compare", "--config=sweep/best.yaml", "--methods=SSESAM", "--seeds=1", "--epochs=2", "--jobs=1"])
    shown = Path("comparison/report.html").read_text()
    best = yaml.safe_load(Path("sweep/best.yaml").read_text())
    assert f"tail_rho: {best['tail_rho']}" in shown
    assert "seed: 4" in shown

    with pytest.raises(SystemExit) as stop:
        main(["sweep", "--trials=4", *arguments, "--data.seed=5"])
    assert str(stop.value) == (
        "error: 'sweep' holds a search with other settings. Use another `output`, or delete the folder."
    )


def test_small_radii_are_not_rounded_away_and_bounds_are_settings(trained):
    assert 1e-5 <= sweep(trials=1, epochs=1, head_rho=(1e-5, 2e-5))["SSESAM"]["head_rho"] <= 2e-5
    assert 1e-5 <= yaml.safe_load(Path("sweep/best.yaml").read_text())["head_rho"] <= 2e-5
    with pytest.raises(ValueError, match="holds a search with other settings"):
        sweep(trials=1, epochs=1, head_rho=(1e-5, 3e-5))


def test_refuses_a_metric_of_classes_that_are_not_there(monkeypatch):
    def fit(self, seed, callbacks):
        callbacks[0].on_train_epoch_end(FakeTrainer(1, lambda group, epoch: math.nan if group == "tail" else 0.5), None)

    monkeypatch.setattr(Experiment, "fit", fit)
    with pytest.raises(ValueError, match="The metric 'tail' is NaN: the validation set has no images of these classes"):
        sweep(trials=1, epochs=1, metric="tail")


def test_the_same_search_twice_and_settings_tell_searches_apart(trained):
    sweep(trials=12, epochs=1, output=Path("a"))
    sweep(trials=12, epochs=1, output=Path("b"))
    assert trained[:12] == trained[12:]
    # On a log scale half of [0.01, 0.5] lies below 0.07.
    sweep(trials=10, epochs=1, seeds=1, output=Path("c"))
    assert 3 <= sum(head < 0.07 for head, *_ in trained[-10:]) <= 8
    for other in ({"seeds": 2}, {"metric": "tail"}, {"epochs": 2}):
        with pytest.raises(ValueError, match="holds a search with other settings"):
            sweep(**{"trials": 12, "epochs": 1, "output": Path("a"), **other})


def test_averages_over_seeds_also_while_it_trains(monkeypatch):
    averages = []

    def fit(self, seed, callbacks):
        trainer = FakeTrainer(1, lambda group, epoch: {1000: 0.2, 1001: 0.6}[seed])
        callbacks[0].on_train_epoch_end(trainer, None)
        averages.append(callbacks[0].trial.user_attrs["tail"])
        callbacks[0].on_train_end(trainer, None)

    monkeypatch.setattr(Experiment, "fit", fit)
    assert sweep(trials=1, seeds=2, epochs=1)["SSESAM"]["tail"] == pytest.approx(0.4)
    assert averages == [0.2, pytest.approx(0.4)]
    assert load().best_value == pytest.approx(0.4)


def test_gives_up_nothing_if_told_so_and_passes_on_what_compare_shares(trained):
    config = "trials: 15\nmodel: {tta: hflip}\ntail_below: 20\nmetric: all\nepochs: 20\n"
    sweep(trials=15, epochs=20, prune=False, config=config)
    assert {row["state"] for row in trial_rows()} == {"complete"}
    settings = yaml.safe_load(Path("sweep/best.yaml").read_text())
    assert list(settings) == ["model", "tail_below", "epochs", *FOUND, "searched"]


def test_trials_that_were_given_up_count(trained):
    sweep(trials=15, epochs=20)
    assert "pruned" in {row["state"] for row in trial_rows()}
    number = len(trained)
    sweep(trials=15, epochs=20)
    assert len(trained) == number == 15


def test_bounds_are_two():
    with pytest.raises(ValueError, match=r"`head_rho` to be the smallest and the largest value, but got 0\.1"):
        sweep(head_rho=0.1)


def test_finds_what_is_best(trained):
    best = sweep(trials=40, epochs=10, prune=False)["SSESAM"]
    assert best["head_rho"] == pytest.approx(0.1, abs=0.06)
    assert best["tail_rho"] == pytest.approx(0.2, abs=0.08)
    assert {seed for *_, seed in trained} == {1000}


def test_gives_up_what_is_worse_but_not_before_stage_2(trained):
    sweep(trials=30, epochs=20)
    states = [row["state"] for row in trial_rows()]
    assert states.count("pruned") >= 5
    assert set(states) == {"pruned", "complete"}
    for row, trial in zip(trial_rows(), load().trials, strict=True):
        epochs = len(trial.intermediate_values)
        if row["state"] == "pruned":
            assert epochs >= 20 * (float(row["gamma"]) + 0.2 * (1 - float(row["gamma"])))
        else:
            assert epochs == 20


def load():
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    backend = JournalFileBackend("sweep/journal.log", lock_obj=JournalFileOpenLock("sweep/journal.log"))
    return optuna.load_study(study_name="SSESAM", storage=JournalStorage(backend))


def test_several_seeds_are_averaged(trained):
    sweep(trials=2, seeds=3, epochs=4, prune=False)
    assert [seed for *_, seed in trained] == [1000, 1001, 1002] * 2
    assert len(load().trials[0].intermediate_values) == 12


@pytest.mark.parametrize(("metric", "expected"), [("all", 0.5), ("tail", 0.1), ("mean_of_head_and_tail", 0.45)])
def test_metric(metric, expected, monkeypatch):
    values = {"head": 0.8, "tail": 0.1, "all": 0.5, "many": 1.0, "medium": 0.3, "few": 0.0}

    def fit(self, seed, callbacks):
        trainer = FakeTrainer(1, lambda group, epoch: values[group])
        callbacks[0].on_train_epoch_end(trainer, None)
        callbacks[0].on_train_end(trainer, None)

    monkeypatch.setattr(Experiment, "fit", fit)
    sweep(trials=1, epochs=1, metric=metric)
    assert load().best_value == pytest.approx(expected)
    assert {group: float(trial_rows()[0][group]) for group in GROUPS} == values


def test_validation_now_and_then():
    sweep(trials=1, epochs=3, trainer={"check_val_every_n_epoch": 3})
    assert len(load().trials[0].intermediate_values) == 1


def test_a_training_may_stop_early():
    result = sweep(trials=1, epochs=3, trainer={"max_steps": 10})
    assert result["SSESAM"]["all"] == float(trial_rows()[0]["all"]) > 0


def test_refuses_never_to_validate():
    with pytest.raises(ValueError, match="The training ended without a validation"):
        sweep(trials=1, epochs=1, trainer={"limit_val_batches": 0})


def test_a_trial_that_was_cut_off_is_made_again(trained, monkeypatch):
    fit = Experiment.fit

    def killed(self, seed, callbacks):
        if len(trained) == 2:
            raise KeyboardInterrupt
        fit(self, seed, callbacks)

    monkeypatch.setattr(Experiment, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep(trials=4, epochs=2)
    study = load()
    # As after a kill, which leaves it running.
    cut_off = study.ask()
    cut_off.suggest_float("head_rho", 0.01, 0.5, log=True)
    cut_off.suggest_float("tail_rho", 0.01, 0.5, log=True)
    cut_off.suggest_float("gamma", 0.3, 0.9)
    monkeypatch.setattr(Experiment, "fit", fit)
    trained.clear()
    sweep(trials=5, epochs=2)
    assert trained[0][:3] == pytest.approx(tuple(cut_off.params.values()))
    states = [row["state"] for row in trial_rows()]
    assert "running" not in states
    assert states.count("fail") == 2
    assert len(states) - states.count("fail") == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials=0"], "`trials` to be an integer from 1 to 10000, but got 0"),
        (["--seeds=0"], "`seeds` to be an integer from 1 to 10000, but got 0"),
        (["--head_rho=[0, 1]"], "`head_rho` to be a finite number > 0, but got 0.0"),
        (["--tail_rho=[0.5, 0.1]"], "`tail_rho` to be the smallest and the largest value, in this order, but got (0.5"),
        (["--gamma=[0.5, 1]"], "`gamma` to be a number strictly between 0 and 1, but got 1.0"),
        (["--tail_fraction=0.001"], "`split` to be a ClassSplit with both head and tail classes"),
        (["--output=file/x"], "`output` to be a folder that can be made (Not a directory), but got 'file/x'"),
    ],
)
def test_refuses_before_it_trains(arguments, message, monkeypatch):
    monkeypatch.setattr(Experiment, "fit", lambda *args: pytest.fail("trained"))
    Path("file").touch()
    with pytest.raises(SystemExit) as stop:
        main(["sweep", *arguments])
    assert str(stop.value).startswith(f"error: Expected argument {message}")
    assert not Path("sweep").exists()


def test_does_not_choose_by_test_data():
    class OnTest(DigitsLT):
        val_is_test = True

    with pytest.raises(ValueError, match=r"with its own validation set .* but got one that validates"):
        sweep(trials=1, data=OnTest)
