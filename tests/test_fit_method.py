"""`fit --method`: a method of a comparison, trained alone, exactly as `compare` trains it."""

import csv
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import STRICT, assert_same_bits
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from torch.optim import AdamW

from lightning_ssesam import StageSwitch
from lightning_ssesam.cli import main
from lightning_ssesam.compare import METHODS
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.experiment import Experiment
from lightning_ssesam.experiments.fit_config import fit_config
from lightning_ssesam.experiments.recipe import Recipe
from lightning_ssesam.experiments.training_options import defaults

pytestmark = [
    STRICT,
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval", "ignore:.*does not have many workers"),
]

QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
# Every option differs from its default, in the comparison or in one of its methods.
COMPARISON = {
    "data": {"class_path": "DigitsLT", "init_args": {"imbalance_factor": 20, "batch_size": 64}},
    "backbone": {"class_path": "SmallConvNet", "init_args": {"width": 8}},
    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.02}},
    "methods": {
        "ERM": {"objective": "ERM"},
        "SAM + Adam": {
            "objective": {"class_path": "SAM", "init_args": {"rho": 0.1}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}},
            "loss": "lightning_ssesam.losses.LogitAdjustedLoss",
            "data": {
                "class_path": "DigitsLT",
                "init_args": {"imbalance_factor": 20, "sampler": "lightning_ssesam.data.ClassBalancedSampler"},
            },
            "model": {"step_options": {"interval": 2}},
        },
        "SSE-SAM": {"objective": {"class_path": "SSESAM", "init_args": {"head_rho": 0.1}}},
        "SSE-SAM, early": {
            "objective": "SSESAM",
            "callbacks": [{"class_path": "StageSwitch", "init_args": {"at": 0.25}}],
        },
    },
    "epochs": 2,
    "gamma": 0.4,
    "tail_below": 30,
    "model": {"tta": "hflip", "few_below": 5, "step_options": {"log_loss": False}},
    "trainer": {"gradient_clip_val": 1.0, "accelerator": "cpu", "limit_train_batches": 4, "limit_val_batches": 1},
}


@pytest.fixture(autouse=True)
def _own_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-ssesam"])


def written(comparison, name="comparison.yaml"):
    Path(name).write_text(yaml.safe_dump(comparison, sort_keys=False))
    return name


def compared(monkeypatch, *arguments):
    """The experiments that `compare` would run."""
    seen = {}

    def collect(tasks, *_):
        seen.update({task.experiment.method: task.experiment for task in tasks})
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_ssesam.experiments.compare.make_missing", collect)
    with pytest.raises(SystemExit) as stop:
        main(["compare", *arguments])
    assert stop.value.code == 130
    return seen


def saved_weights(version=0):
    (path,) = Path(f"lightning_logs/version_{version}/checkpoints").glob("*.ckpt")
    return torch.load(path, weights_only=True)["state_dict"]


def started(monkeypatch, *args):
    """Trainer and model that `fit` starts with."""
    seen = []
    monkeypatch.setattr(Trainer, "fit", lambda trainer, model, **_: seen.extend([trainer, model]))
    main(["fit", *args])
    return seen


def switches(trainer):
    return [callback.at for callback in trainer.callbacks if isinstance(callback, StageSwitch)]


@pytest.mark.parametrize("method", COMPARISON["methods"])
def test_a_method_is_trained_as_compare_trains_it(method, monkeypatch):
    """The same bits, and again from the configuration that was saved."""
    path = written(COMPARISON)
    experiment = compared(monkeypatch, "--config", path)[method]
    _, model, data = experiment.fit(0)
    main(["fit", "--method", method, "--config", path, *QUIET])
    saved = saved_weights()
    assert_same_bits((saved[name] for name in model.state_dict()), model.state_dict().values())
    config = yaml.safe_load(Path("lightning_logs/version_0/config.yaml").read_text())
    assert "method" not in config
    assert "trust_checkpoint" not in config
    assert (config["model"]["many_above"], config["model"]["few_below"]) == (data.many_above, 5)
    main(["fit", "--config=lightning_logs/version_0/config.yaml"])
    assert_same_bits(saved_weights(1).values(), saved.values())


@pytest.mark.parametrize("method", ["SAM", "SSESAM"])
def test_fit_alone_trains_what_compare_calls_ssesam(method):
    """The defaults of both are the same, and `--method` needs no file."""
    name = ["--method", method] if method != "SSESAM" else []
    main(
        [
            "fit",
            *name,
            *QUIET,
            "--trainer.max_epochs=2",
            "--trainer.limit_train_batches=3",
            "--trainer.limit_val_batches=1",
        ]
    )
    objective = fit_config({}, method)["model"]["objective"]["init_args"]
    arguments = {key: value for key, value in objective.items() if key in ("rho", "head_rho", "tail_rho")}
    trainer = {"accelerator": "cpu", "limit_train_batches": 3, "limit_val_batches": 1}
    kind = getattr(__import__("lightning_ssesam"), method)
    model = Experiment(method=method, objective=lambda: kind(**arguments), epochs=2, trainer=trainer).fit(0)[1]
    assert arguments == ({"rho": 0.2} if method == "SAM" else {"head_rho": 0.05, "tail_rho": 0.2})
    saved = saved_weights()
    assert_same_bits((saved[key] for key in model.state_dict()), model.state_dict().values())


def test_defaults_are_those_of_compare():
    config = fit_config({}, "SSESAM")
    flat = {f"{room}.{name}": value for room in ("model", "trainer") for name, value in config[room].items()}
    for name, value in defaults([]).items():
        expected = {**flat, "data": config["data"]}[name]
        if isinstance(value, dict):
            value, expected = (
                (part["class_path"], {key: part.get("init_args", {}).get(key) for key in value.get("init_args", {})})
                for part in (value, expected)
            )
        assert value == expected, name
    assert Recipe().epochs == config["trainer"]["max_epochs"]


def test_a_chosen_class_takes_nothing_over_from_a_default(monkeypatch):
    _, model = started(monkeypatch, *QUIET, "--model.optimizer=AdamW", "--data.imbalance_factor=10")
    configured = model.configure_optimizers()
    defaults_of_adamw = AdamW([torch.zeros(1)]).defaults
    assert {key: configured["optimizer"].defaults[key] for key in ("lr", "weight_decay")} == {
        key: defaults_of_adamw[key] for key in ("lr", "weight_decay")
    }
    assert configured["lr_scheduler"]["scheduler"].T_max == 60
    Path("mine.yaml").write_text("model: {objective: {class_path: SSESAM}, scheduler: null}\ntrainer: {max_epochs: 7}")
    trainer, model = started(monkeypatch, *QUIET, "--config=mine.yaml")
    assert (model.objective.head_rho, model.objective.tail_rho) == (0.05, 0.1)
    assert isinstance(model.configure_optimizers(), torch.optim.SGD)
    assert trainer.max_epochs == 7


@pytest.mark.parametrize(
    ("arguments", "epochs", "period"),
    [
        ([], 60, 60),
        (["--trainer.max_epochs", "5"], 5, 5),
        (["--trainer.max_epochs=5", "--model.scheduler.T_max=9"], 5, 9),
        (["--trainer.max_steps=100"], None, None),
        (["--trainer.max_time=00:00:01:00"], None, None),
        (["--trainer.max_epochs=-1"], -1, None),
    ],
)
def test_the_learning_rate_falls_over_the_epochs_that_are_asked_for(arguments, epochs, period, monkeypatch):
    trainer, model = started(monkeypatch, *QUIET, *arguments)
    assert trainer.max_epochs == epochs
    configured = model.configure_optimizers()
    assert (configured["lr_scheduler"]["scheduler"].T_max if isinstance(configured, dict) else None) == period


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], [0.7]),
        (["--model.objective=SAM"], []),
        (["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"], [0.7]),
        (["--trainer.callbacks=StageSwitch", "--trainer.callbacks.at=0.3"], [0.3]),
        (["--trainer.callbacks=null"], [0.7]),
        (["--method=SSESAM"], [0.7]),
    ],
)
def test_stages_get_their_switch(arguments, expected, monkeypatch, capsys):
    """And a line says so, unless the configuration has it."""
    trainer, _ = started(monkeypatch, *QUIET, *arguments)
    assert switches(trainer) == expected
    for callback in trainer.callbacks:
        if isinstance(callback, LambdaCallback):
            callback.on_fit_start(trainer, None)
    is_attached = expected == [0.7] and arguments != ["--method=SSESAM"]
    assert ("StageSwitch is attached" in capsys.readouterr().err) == is_attached


def test_the_winner_of_a_search_is_trained(monkeypatch):
    best = {"epochs": 3, "tail_below": 20, "head_rho": 0.11, "tail_rho": 0.22, "gamma": 0.33}
    trainer, model = started(monkeypatch, *QUIET, "--method", "SSESAM", "--config", written(best, "best.yaml"))
    assert (model.objective.head_rho, model.objective.tail_rho, trainer.max_epochs) == (0.11, 0.22, 3)
    assert switches(trainer) == [0.33]
    assert model.split.tail.equal(model.split.class_counts < 20)
    assert model.configure_optimizers()["lr_scheduler"]["scheduler"].T_max == 3


def test_later_options_change_a_method(monkeypatch):
    """Wherever they stand: the file is read first. The schedule follows the epochs."""
    path = written(COMPARISON)
    trainer, model = started(monkeypatch, "--trainer.max_epochs=9", "--method=SAM + Adam", f"--config={path}", *QUIET)
    assert trainer.max_epochs == 9
    assert model.configure_optimizers()["lr_scheduler"]["scheduler"].T_max == 9
    assert model.objective.rho == 0.1


def test_a_shipped_comparison_is_found_by_name(monkeypatch):
    # It would download the images.
    monkeypatch.setattr("lightning_ssesam.experiments.training_commands.TrainingCLI._check_training", lambda _: None)
    trainer, model = started(monkeypatch, *QUIET, "--method=SSE-SAM", "--config=compare_cifar100_lt")
    assert (trainer.max_epochs, model.objective.tail_rho, model.tta) == (200, 0.1, "hflip")


NAMES = "'ERM', 'SAM + Adam', 'SSE-SAM', 'SSE-SAM, early'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method=SAM"], f"Expected argument `method` to be one of {NAMES}, but got 'SAM'."),
        ([], "'comparison.yaml' is a comparison of several methods. Choose one with --method: ERM, SAM + Adam, SSE-"),
        (["--method=ERM", "--method=SAM"], "Expected argument `method` to be one name, with the YAML file of one"),
        (["--method"], f"Expected argument `method` to be one of {NAMES}, but got ''."),
        (["--method=ERM", "--config=comparison.yaml"], "Expected argument `method` to be one name, with the YAML"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "test"])
def test_wrong_names_get_one_line(command, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main([command, "--config", written(COMPARISON), *arguments])
    assert str(stop.value).startswith(f"error: {message}")
    assert "\n" not in str(stop.value)


def test_a_file_names_no_method():
    Path("mine.yaml").write_text("method: SAM\n")
    with pytest.raises(SystemExit, match=r"^error: Expected argument `method` to be an option of the command"):
        main(["fit", "--config=mine.yaml", *QUIET])


@pytest.mark.parametrize(
    ("comparison", "message"),
    [
        ({"methods": "ERM,Foo"}, f"argument `methods` to be some of {', '.join(METHODS)}, each once, but got 'Foo'"),
        ({"methods": 5}, "argument `methods` to be names, or a mapping from names to options, but got 5"),
        ({"epochs": "many"}, "cannot be used: .*epochs"),
        ({"nonsense": 1}, "cannot be used: .*nonsense"),
        ({"epochs": 0}, "argument `epochs` to be an integer >= 1, but got 0"),
        ({"methods": {"ERM": {"objective": "os.system"}}}, "cannot be used: "),
    ],
)
def test_wrong_comparisons_get_one_line(comparison, message):
    with pytest.raises(ArgumentError, match=message) as error:
        fit_config(comparison, "ERM")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", [-1, 0.5, True])
def test_bad_seed(seed):
    with pytest.raises(ArgumentError, match="argument `seed` to be an integer >= 0"):
        fit_config({}, "ERM", seed)


def test_threads_and_loader_processes_are_those_of_compare(monkeypatch):
    """They decide rounding and augmentation. Without `--method`, they are Lightning's."""
    seen = []
    monkeypatch.setattr(
        Trainer, "fit", lambda *_, **__: seen.append((torch.get_num_threads(), os.environ["PL_SEED_WORKERS"]))
    )
    torch.set_num_threads(2)
    try:
        main(["fit", *QUIET])
        main(["fit", *QUIET, "--method=ERM"])
        main(["fit", *QUIET, "--method=ERM", "--config", written({"threads": 3})])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert seen == [(2, "1"), (1, "0"), (3, "0")]


def test_kept_weights_can_be_tested_and_measured(capsys, monkeypatch):
    """The numbers of the comparison come out of the configuration and the checkpoint that it leaves."""
    monkeypatch.setattr("lightning_ssesam.experiments.report.FIGURES", ())
    Path("c.yaml").write_text(
        "methods:\n  mine: {objective: SSESAM, sampler: lightning_ssesam.data.ClassBalancedSampler,"
        " backbone: {class_path: SmallConvNet, init_args: {width: 8}}}\n"
    )
    main(["compare", "--config=c.yaml", "--epochs=1", "--seeds=2", "--jobs=1", "--keep_weights=true"])
    printed = capsys.readouterr().out
    (command,) = re.findall(r"^Test weights with: lightning-ssesam (.*)$", printed, re.MULTILINE)
    main([*command.replace("seed-0", "seed-1").split(), "--trainer.accelerator=cpu", "--trainer.logger=false"])
    (share,) = re.findall(r"test/acc_all\s+([\d.]+)", capsys.readouterr().out)
    with Path("comparison/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(share) == pytest.approx(float(rows[1]["all"]), abs=1e-6)
    config = yaml.safe_load(Path(command.split()[2]).read_text())
    assert config["data"]["init_args"]["sampler"]["class_path"].endswith("ClassBalancedSampler")
    main(["curvature", command.split()[4], "--samples=3", "--landscape=false", "--probes=0", "--groups=all"])
    assert Path("curvature/curvature.csv").exists()
