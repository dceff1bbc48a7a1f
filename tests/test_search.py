"""Searches of several methods: budgets, learning rates, ties, divergence, and what compare reads of them."""

import math
import random
import statistics
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import torch
import yaml
from helpers import SPLIT, STRICT, trial_rows
from optuna.distributions import FloatDistribution
from torch.optim import SGD

from lightning_ssesam import SAM, SSESAM, ClassSplit, DigitsLT, StageSwitch
from lightning_ssesam.cli import main
from lightning_ssesam.compare import METHODS, Method
from lightning_ssesam.errors import NonFiniteError
from lightning_ssesam.experiments import search
from lightning_ssesam.experiments.figures import draw_sweep
from lightning_ssesam.experiments.recorder import count_images
from lightning_ssesam.experiments.search import Candidate
from lightning_ssesam.experiments.search_progress import SearchProgress
from lightning_ssesam.experiments.search_report import Finding, describe_validation, format_finding
from lightning_ssesam.runs import GROUPS, Experiment
from lightning_ssesam.sweep import sweep

pytestmark = [STRICT, pytest.mark.usefixtures("program_name")]


def best_yaml(folder="sweep"):
    return yaml.safe_load(Path(folder, "best.yaml").read_text())


class FakeTrainer:
    """Has the same accuracy in all groups, and a loss."""

    def __init__(self, epochs, accuracy, loss=0.5):
        self.max_epochs, self.current_epoch, self.accuracy, self.loss = epochs, 0, accuracy, loss

    @property
    def callback_metrics(self):
        accuracy = torch.tensor(self.accuracy(self.current_epoch))
        return {"train/loss": self.loss, **{f"val/acc_{group}": accuracy for group in GROUPS}}


def rate_of(experiment):
    return experiment.optimizer([torch.nn.Parameter(torch.zeros(1))]).defaults["lr"]


def values_of(experiment):
    objective = experiment.objective()
    return {name: value for name, value in vars(objective).items() if name.endswith("rho")}


@pytest.fixture
def trained(monkeypatch):
    """Replaces trainings. The smaller a radius, the better; without one, the smaller the learning rate, the better."""
    seen = []

    def fit(self, seed, callbacks):
        values = values_of(self)
        seen.append((self.method, values, self.gamma, rate_of(self), seed))
        worth = 0.9 - sum(values.values()) - rate_of(self)
        trainer = FakeTrainer(self.epochs, lambda epoch: worth * (epoch + 1) / self.epochs)
        for trainer.current_epoch in range(self.epochs):
            callbacks[0].on_train_epoch_end(trainer, torch.nn.Linear(1, 1))
        callbacks[0].on_train_end(trainer, torch.nn.Linear(1, 1))

    monkeypatch.setattr(Experiment, "fit", fit)
    return seen


@pytest.fixture
def planned(monkeypatch):
    """Returns the experiments that compare would train."""

    def experiments(config, *options):
        found = []

        def stop(tasks, *_):
            found.extend(task.experiment for task in tasks)
            sys.exit("planned")

        monkeypatch.setattr("lightning_ssesam.experiments.compare.make_missing", stop)
        with pytest.raises(SystemExit, match="planned"):
            main(["compare", f"--config={config}", "--seeds=1", *options])
        return {experiment.method: experiment for experiment in found}

    return experiments


def test_every_method_has_the_same_budget(trained, planned):
    result = sweep(trials=4, epochs=2, prune=False)
    assert [method for method, *_ in trained] == ["SAM", "ImbSAM", "SSESAM"] * 4
    assert {seed for *_, seed in trained} == {1000}
    radii = {name: [v for m, v, *_ in trained if m == name] for name in ("SAM", "ImbSAM", "SSESAM")}
    assert radii["SAM"] == radii["ImbSAM"]
    best = {name: min(found, key=lambda values: sum(values.values())) for name, found in radii.items()}
    expected = {
        "sam_rho": best["SAM"]["rho"],
        "imbsam_rho": best["ImbSAM"]["rho"],
        "head_rho": best["SSESAM"]["head_rho"],
        "tail_rho": best["SSESAM"]["tail_rho"],
        "gamma": next(gamma for _, values, gamma, *_ in trained if values == best["SSESAM"]),
    }
    expected = {name: float(f"{value:.4g}") for name, value in expected.items()}
    found = best_yaml()
    assert found.pop("searched") == [f"{name}={value}" for name, value in expected.items()]
    assert found == expected
    assert {name: value for part in result.values() for name, value in part.items() if name in expected} == expected
    assert result["SAM"]["tail"] == pytest.approx(0.85 - best["SAM"]["rho"])
    assert [row["method"] for row in trial_rows()] == ["SAM"] * 4 + ["ImbSAM"] * 4 + ["SSESAM"] * 4
    experiments = planned("sweep/best.yaml")
    assert values_of(experiments["SSESAM"]) == {name: expected[name] for name in ("head_rho", "tail_rho")}
    assert values_of(experiments["SAM"]) == {"rho": expected["sam_rho"]}
    assert experiments["SSESAM"].gamma == expected["gamma"]


def test_bounds_of_each_radius_are_its_own(trained):
    sweep(trials=2, epochs=1, sam_rho=(1, 2), imbsam_rho=(3, 4), head_rho=(5, 6), tail_rho=(7, 8), lr=(9, 10))
    for method, values, _, rate, _ in trained:
        low = {"SAM": {"rho": 1}, "ImbSAM": {"rho": 3}, "SSESAM": {"head_rho": 5, "tail_rho": 7}}[method]
        assert all(low[name] <= value <= low[name] + 1 for name, value in values.items())
        assert set(values) == set(low)
        assert 9 <= rate <= 10


def test_another_method_joins_a_search(trained):
    sweep(methods="SAM", trials=2, epochs=1)
    sweep(methods="SAM,ImbSAM", trials=2, epochs=1)
    assert [method for method, *_ in trained] == ["SAM", "SAM", "ImbSAM", "ImbSAM"]
    sweep(methods="ImbSAM", trials=3, epochs=1)
    assert [method for method, *_ in trained][4:] == ["ImbSAM"]
    with pytest.raises(ValueError, match="holds a search with other settings"):
        sweep(methods="SAM", trials=2, epochs=1, sam_rho=(0.1, 0.2))


def test_learning_rates_of_every_method(trained, planned):
    sweep(methods="ERM,SAM,SSESAM", trials=8, epochs=1, prune=False, lr=(0.001, 0.1))
    rates = {name: [rate for method, *_, rate, _ in trained if method == name] for name in ("ERM", "SAM", "SSESAM")}
    assert all(0.001 <= rate <= 0.1 for rate in [rate for found in rates.values() for rate in found])
    assert len(set(rates["ERM"])) == 8
    # On a log scale, half of them lie below 0.01.
    assert 2 <= sum(rate < 0.01 for rate in rates["ERM"]) <= 6
    experiments = planned("sweep/best.yaml")
    assert list(experiments) == ["ERM", "SAM", "SSESAM"]
    assert rate_of(experiments["ERM"]) == float(f"{min(rates['ERM']):.4g}")
    searched = dict(item.rsplit("=", 1) for item in best_yaml()["searched"])
    assert list(searched) == ["ERM.lr", "SAM.rho", "SAM.lr", "SSESAM.head_rho", "SSESAM.tail_rho", "gamma", "SSESAM.lr"]
    for name, experiment in experiments.items():
        assert rate_of(experiment) == float(searched[f"{name}.lr"])
        # The other arguments of the optimizer stay.
        optimizer = experiment.optimizer([torch.nn.Parameter(torch.zeros(1))])
        assert optimizer.defaults["momentum"] == 0.9
        radii = {key.split(".")[1]: float(value) for key, value in searched.items() if key.startswith(f"{name}.")}
        radii.pop("lr")
        assert values_of(experiment) == radii
    assert experiments["SSESAM"].gamma == float(searched["gamma"])


OWN = """
optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.001}}
methods:
  Plain: {objective: ERM}
  Mine: {objective: {class_path: SSESAM, init_args: {tail_rho: 0.3, first_stage: joint}}}
  a=b: {objective: SAM, optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.01, momentum: 0.5}}}
  Tail: {objective: {class_path: ImbSAM, init_args: {tail_weight: 2}}, model: {tta: hflip}}
  Switched: {objective: SSESAM, callbacks: [{class_path: StageSwitch, init_args: {at: 0.5}}]}
"""


def test_methods_of_a_user(trained, planned, capsys):
    Path("own.yaml").write_text(OWN)
    options = ["--trials=2", "--epochs=1", "--sam_rho=[0.1,0.2]", "--imbsam_rho=[0.3,0.4]"]
    main(["sweep", "--config=own.yaml", *options])
    assert "Plain has nothing to search." in capsys.readouterr().out
    assert {method for method, *_ in trained} == {"Mine", "a=b", "Tail", "Switched"}
    # A rho has the bounds of ImbSAM if the objective tells head from tail, and else those of SAM.
    assert all(0.1 <= values["rho"] <= 0.2 for method, values, *_ in trained if method == "a=b")
    assert all(0.3 <= values["rho"] <= 0.4 for method, values, *_ in trained if method == "Tail")
    experiments = planned("sweep/best.yaml")
    assert list(experiments) == ["Plain", "Mine", "a=b", "Tail", "Switched"]
    searched = dict(item.rsplit("=", 1) for item in best_yaml()["searched"])
    for name, experiment in experiments.items():
        radii = {key.split(".")[1]: float(value) for key, value in searched.items() if key.startswith(f"{name}.")}
        assert values_of(experiment) == radii
    assert experiments["Mine"].gamma == float(searched["gamma"])
    assert experiments["Mine"].objective().first_stage == "joint"
    assert experiments["Tail"].objective().tail_weight == 2
    assert experiments["Tail"].model_arguments["tta"] == "hflip"
    assert rate_of(experiments["Mine"]) == 0.001
    assert experiments["a=b"].optimizer([torch.nn.Parameter(torch.zeros(1))]).defaults["momentum"] == 0.5
    assert [callback.at for callback in experiments["Switched"].callbacks] == [0.5]


def test_two_methods_with_stages_have_a_switch_each(trained, planned):
    Path("own.yaml").write_text("methods:\n  One: {objective: SSESAM}\n  Two: {objective: SSESAM}\n")
    main(["sweep", "--config=own.yaml", "--trials=2", "--epochs=1", "--lr=[0.01, 0.1]"])
    searched = dict(item.rsplit("=", 1) for item in best_yaml()["searched"])
    for name, experiment in planned("sweep/best.yaml").items():
        (switch,) = experiment.callbacks
        assert isinstance(switch, StageSwitch)
        assert switch.at == float(searched[f"{name}.gamma"])
        assert rate_of(experiment) == float(searched[f"{name}.lr"])


def test_methods_made_in_python_are_searched_and_returned(trained, capsys):
    Path("sweep").mkdir()
    Path("sweep/best.yaml").write_text("sam_rho: 0.1\n")
    result = sweep(methods={"Mine": Method(partial(SSESAM, first_stage="joint"))}, trials=1, epochs=1)
    (_, values, gamma, _, _) = trained[0]
    found = {**values, "gamma": gamma}
    assert {name: result["Mine"][name] for name in found} == pytest.approx(found, rel=1e-3)
    assert "There is no best.yaml: parts made in Python" in capsys.readouterr().out
    assert not Path("sweep/best.yaml").exists()
    assert Path("sweep/earlier/best-1.yaml").read_text() == "sam_rho: 0.1\n"


def sgd(params):
    return SGD(params, lr=0.1)


def fixed(rho_of_mine=0.1):
    return SAM(rho_of_mine)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": "ERM"}, r"`methods` to be methods of which something is searched .* but got ERM\."),
        ({"methods": "SAM,Adam"}, f"`methods` to be some of {', '.join(METHODS)}, each once, but got 'SAM,Adam'"),
        ({"methods": []}, rf"`methods` to be some of {', '.join(METHODS)}, each once, but got \[\]"),
        ({"methods": {"A": Method(partial(SAM, 0.1))}}, r"take their radii as arguments \(rho\).* for 'A' \(SAM"),
        ({"methods": {"A": Method(fixed)}}, r"take their radii as arguments \(rho\).* for 'A' \(fixed"),
        ({"lr": (0.1, 0.2), "optimizer": sgd}, r"`optimizer` to be one that takes the argument `lr`.*'SAM' \(sgd"),
        ({"lr": (0.0, 0.2)}, r"`lr` to be a finite number > 0, but got 0\.0"),
        ({"lr": 0.2}, r"`lr` to be the smallest and the largest value, but got 0\.2"),
        ({"sam_rho": (0.2, 0.1)}, "`sam_rho` to be the smallest and the largest value, in this order"),
        ({"imbsam_rho": "ab"}, "`imbsam_rho` to be the smallest and the largest value, but got 'ab'"),
    ],
)
def test_refuses_before_it_trains(arguments, message, monkeypatch):
    monkeypatch.setattr(Experiment, "fit", lambda *args: pytest.fail("trained"))
    with pytest.raises(ValueError, match=message):
        sweep(trials=1, **arguments)
    assert not Path("sweep").exists()


def test_trials_of_a_method_without_stages_are_pruned_at_a_like_moment(trained):
    """With gamma in the middle of its bounds, at 0.6, a fifth of stage 2 is over at 0.68."""
    sweep(methods="SAM", trials=9, epochs=10)
    assert {row["state"] for row in trial_rows()} == {"complete", "pruned"}
    backend = optuna.storages.journal.JournalFileBackend("sweep/journal.log")
    study = optuna.load_study(study_name="SAM", storage=optuna.storages.JournalStorage(backend))
    lengths = {len(t.intermediate_values) for t in study.trials if t.state == optuna.trial.TrialState.PRUNED}
    assert lengths == {7}


def trial(number, value, **params):
    bounds = {name: (0.3, 0.9) if name == "gamma" else (0.01, 1.0) for name in params}
    distributions = {name: FloatDistribution(*pair, log=name != "gamma") for name, pair in bounds.items()}
    groups = dict.fromkeys(GROUPS, value)
    made = optuna.trial.create_trial(params=params, distributions=distributions, value=value, user_attrs=groups)
    made.number = number
    return made


def finding(*trials):
    names = trials[0].params
    bounds = {name: (0.3, 0.9) if name == "gamma" else (0.01, 1.0) for name in names}
    return Finding(Candidate("A", Method(), {}, bounds, is_shipped=True), trials)


def test_ties_are_called_ties_and_their_middle_wins():
    found = finding(
        trial(0, 0.84, rho=0.01, gamma=0.5),
        trial(1, 0.84 + 1e-8, rho=0.9, gamma=0.5),
        trial(2, 0.80, rho=0.1, gamma=0.6),
        trial(3, 0.84, rho=0.08, gamma=0.6),
        trial(4, 0.84, rho=0.1, gamma=0.7),
    )
    assert found.ties == 4
    assert found.complete[0].number == 3
    assert found.complete[-1].number == 2
    assert "4 trials tie at 84.0 %; trial 3 is the nearest to the median of their values." in format_finding(found)


def test_the_middle_of_ties_equals_its_naive_twin():
    generator = random.Random(0)
    for number in range(20):
        values = [(10 ** generator.uniform(-2, 0), generator.uniform(0.3, 0.9)) for _ in range(2 + number % 5)]
        found = finding(*(trial(k, 0.5, rho=rho, gamma=gamma) for k, (rho, gamma) in enumerate(values)))
        scaled = [((math.log10(rho) + 2) / 2, (gamma - 0.3) / 0.6) for rho, gamma in values]
        middle = [statistics.median(column) for column in zip(*scaled, strict=True)]
        distances = [round(abs(x - middle[0]) + abs(y - middle[1]), 9) for x, y in scaled]
        nearest = [k for k, distance in enumerate(distances) if distance == min(distances)]
        # Of two trials, both are as near: the smaller values win.
        expected = min(nearest, key=lambda k, scaled=scaled: sum(scaled[k]))
        assert found.complete[0].number == expected


def test_no_tie_is_called_one():
    found = finding(trial(0, 0.5, rho=0.1), trial(1, 0.6, rho=0.2))
    assert found.ties == 1
    assert "tie" not in format_finding(found)
    assert [t.number for t in found.complete] == [1, 0]


def test_ties_are_written_into_best(monkeypatch):
    def fit(self, seed, callbacks):
        callbacks[0].on_train_epoch_end(FakeTrainer(1, lambda epoch: 0.5), None)
        callbacks[0].on_train_end(FakeTrainer(1, lambda epoch: 0.5), None)

    monkeypatch.setattr(Experiment, "fit", fit)
    sweep(methods="SAM", trials=3, epochs=1)
    radii = sorted(float(row["sam_rho"]) for row in trial_rows())
    assert best_yaml()["sam_rho"] == float(f"{radii[1]:.4g}")
    assert "# SAM: trial " in (text := Path("sweep/best.yaml").read_text())
    assert "3 trials tie at 50.0 %" in text


class Wild(torch.nn.Linear):
    """A module whose weights are not finite."""

    def __init__(self):
        super().__init__(1, 1)
        torch.nn.init.constant_(self.weight, math.nan)


@pytest.mark.parametrize("kind", ["at the end", "by its weights", "refused by the step"])
def test_a_diverged_trial_never_wins(kind, monkeypatch, capsys):
    """Its accuracy is the best of all."""

    def fit(self, seed, callbacks):
        is_wild = values_of(self)["rho"] > 0.06
        trainer = FakeTrainer(2, lambda epoch: 0.9 if is_wild else 0.4, loss=math.nan if is_wild else 0.5)
        module = Wild() if is_wild and kind == "by its weights" else torch.nn.Linear(1, 1)
        callbacks[0].on_train_epoch_end(trainer, module)
        if is_wild and kind == "refused by the step":
            raise NonFiniteError("no", torch.tensor(math.nan))
        assert not is_wild or kind == "at the end", "an epoch too many"
        callbacks[0].on_train_end(trainer, module)

    monkeypatch.setattr(Experiment, "fit", fit)
    sweep(methods="SAM", trials=8, epochs=2, prune=False)
    wild = [row["trial"] for row in trial_rows() if float(row["sam_rho"]) > 0.06]
    assert 2 <= len(wild) <= 7
    assert [row["trial"] for row in trial_rows() if row["state"] == "diverged"] == wild
    assert best_yaml()["sam_rho"] <= 0.06
    printed = capsys.readouterr().out
    assert f"Diverged, with a loss that is not finite: trials {', '.join(wild)}" in printed
    assert f"the best of {8 - len(wild)} trials (0 more were given up early, {len(wild)} diverged)" in printed


def test_a_step_that_is_skipped_is_no_divergence(monkeypatch):
    """With `on_nonfinite="skip"` a loss may be NaN while the weights are fine; it counts at the end alone."""

    def fit(self, seed, callbacks):
        callbacks[0].on_train_epoch_end(FakeTrainer(2, lambda epoch: 0.4, loss=math.inf), torch.nn.Linear(1, 1))
        callbacks[0].on_train_end(FakeTrainer(2, lambda epoch: 0.4), torch.nn.Linear(1, 1))

    monkeypatch.setattr(Experiment, "fit", fit)
    assert sweep(methods="SAM", trials=1, epochs=2)["SAM"]["all"] == pytest.approx(0.4)


@pytest.mark.parametrize("model", [None, {"step_options": {"log_loss": False}}])
def test_a_search_in_which_all_diverged_says_so(model, capsys):
    Path("sweep").mkdir()
    Path("sweep/best.yaml").write_text("sam_rho: 0.1\n")
    wild = partial(SGD, lr=1e30)
    with pytest.raises(ValueError, match=r"No trial of SAM was trained to its end: 2 of 2 diverged.*\(`sam_rho`\)"):
        sweep(methods="SAM", trials=2, epochs=2, optimizer=wild, model=model)
    assert [row["state"] for row in trial_rows()] == ["diverged"] * 2
    # No file of another search is left to be taken for the result of this one, and none is lost.
    assert not Path("sweep/best.yaml").exists()
    assert Path("sweep/earlier/best-1.yaml").read_text() == "sam_rho: 0.1\n"
    assert "Diverged, with a loss that is not finite: trials 0, 1" in capsys.readouterr().out
    # They count, so the same command does not make them again.
    with pytest.raises(ValueError, match="2 of 2 diverged"):
        sweep(methods="SAM", trials=2, epochs=2, optimizer=wild, model=model)
    assert len(trial_rows()) == 2
    # A second file that is set aside does not replace the first.
    Path("sweep/best.yaml").write_text("sam_rho: 0.2\n")
    with pytest.raises(ValueError, match="2 of 2 diverged"):
        sweep(methods="SAM", trials=2, epochs=2, optimizer=wild, model=model)
    assert [path.read_text() for path in sorted(Path("sweep/earlier").iterdir())] == [
        "sam_rho: 0.1\n",
        "sam_rho: 0.2\n",
    ]


def test_how_coarse_the_validation_set_is():
    """SPLIT's classes 3 and 4 are tail."""
    counts = [20, 15, 40, 12, 10]
    assert SPLIT.tail.tolist() == [False] * 3 + [True] * 2
    worth = {"all": 100 / 5 / 10, "tail": 100 / 2 / 10, "mean_of_head_and_tail": 50 / 2 / 10}
    for metric, value in worth.items():
        (line,) = describe_validation(counts, SPLIT, metric)
        assert (
            line
            == f"Validation images of a class: 10 to 40. One image is worth up to {value:.1f} points of {metric!r}."
        )
    line, *warnings = describe_validation([20, 15, 40, 9, 0], SPLIT, "tail")
    # A class without images is not part of the mean.
    assert line.startswith(f"Validation images of a class: 9 to 40. One image is worth up to {100 / 9:.1f} points")
    assert warnings == [
        "No validation images: class 4. The trials are compared without them.",
        "Fewer than 10 validation images: class 3 (9). Small differences between trials are chance.",
    ]
    (*_, few) = describe_validation([20, 15, 40, 9, 12], SPLIT, "tail", ["ant", "bee", "cat", "dog", "eel"])
    assert few.startswith("Fewer than 10 validation images: 'dog' (9).")
    (*_, many) = describe_validation([20, *[1] * 9], ClassSplit([20] * 10, tail=[9]), "tail")
    assert "class 8 (1), and 1 more. Small" in many
    assert describe_validation([], SPLIT, "all") == []
    assert count_images(DigitsLT(), "val") == [20] * 10


class Several(DigitsLT):
    """Has two validation loaders. The first one has a target that does not count."""

    def val_dataloader(self):
        first = torch.utils.data.TensorDataset(torch.zeros(4, 1), torch.tensor([0, 3, 3, -100]))
        return [torch.utils.data.DataLoader(first), super().val_dataloader()]


def test_of_several_validation_loaders_the_first_counts():
    assert count_images(Several(), "val") == [1, 0, 0, 2, 0, 0, 0, 0, 0, 0]
    assert count_images(Several(), "test") == [50] * 10
    metrics = {f"val/acc_{group}/dataloader_idx_{k}": torch.tensor(0.5 + k) for group in GROUPS for k in (0, 1)}
    assert search._accuracies(SimpleNamespace(callback_metrics=metrics)) == dict.fromkeys(GROUPS, 0.5)


class Coarse(DigitsLT):
    """Has four validation images of class 9."""

    def make_sets(self):
        sets = super().make_sets()
        _, labels = sets["val"].tensors
        kept = torch.cat([(labels != 9).nonzero(), (labels == 9).nonzero()[:4]]).flatten()
        return {**sets, "val": torch.utils.data.Subset(sets["val"], kept.tolist())}


def test_few_validation_images_are_said_before_it_trains(trained, capsys):
    sweep(methods="SAM", trials=1, epochs=1, data=Coarse)
    warning = "Fewer than 10 validation images: '9' (4)."
    assert warning in capsys.readouterr().out
    assert warning in Path("sweep/best.yaml").read_text()


def test_progress():
    with SearchProgress(total=6, done=2, seeds=2, epochs=10) as progress:
        progress.begin("SAM", 7, 0.8421)
        assert progress.bar.n == 2
        progress.epoch(seed=0, epoch=5)
        assert progress.bar.n == pytest.approx(2.25)
        assert progress.bar.postfix == "SAM trial 7: training 1/2, epoch 5/10, best 84.2 %"
        progress.epoch(seed=1, epoch=10)
        assert progress.bar.n == pytest.approx(3)
        progress.end()
        progress.begin("ImbSAM", 0, None)
        progress.epoch(seed=0, epoch=1)
        assert progress.bar.postfix == "ImbSAM trial 0: training 1/2, epoch 1/10"
        # A trial that is given up early counts as one.
        progress.end()
        assert progress.bar.n == 4


def test_progress_is_written_in_lines_where_there_is_no_terminal(monkeypatch, capsys):
    def text():
        with SearchProgress(total=1, done=0, seeds=1, epochs=1000) as progress:
            progress.begin("SAM", 0, None)
            for epoch in range(1000):
                progress.epoch(seed=0, epoch=epoch + 1)
            progress.end()
        return capsys.readouterr().err

    first, last = text().splitlines()
    assert "0.0/1 trials" in first
    assert "1.0/1 trials" in last
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "\r" in text()


def test_progress_shows_epochs_and_the_best(trained, monkeypatch):
    shown = []
    monkeypatch.setattr(SearchProgress, "_show", lambda self, share, text: shown.append((round(share, 6), text)))
    sweep(methods="SAM", trials=2, epochs=2, prune=False)
    best = 100 * (0.85 - trained[0][1]["rho"])
    assert shown == [
        (0, "SAM trial 0"),
        (0.5, "SAM trial 0: epoch 1/2"),
        (1, "SAM trial 0: epoch 2/2"),
        (0, "SAM trial 0"),
        (0, f"SAM trial 1, best {best:.1f} %"),
        (0.5, f"SAM trial 1: epoch 1/2, best {best:.1f} %"),
        (1, f"SAM trial 1: epoch 2/2, best {best:.1f} %"),
        (0, "SAM trial 1"),
    ]


def test_the_picture_shows_every_method_and_its_best():
    methods = {"A": [{"head": 0.5, "tail": 0.4}, {"head": 0.6, "tail": 0.1}], "B": [{"head": 0.3, "tail": 0.7}]}
    (axes,) = draw_sweep(methods).axes
    points = [collection.get_offsets().tolist() for collection in axes.collections]
    assert points == [[[50, 40], [60, 10]], [[50, 40]], [[30, 70]], [[30, 70]]]
    assert axes.get_aspect() == 1.0
