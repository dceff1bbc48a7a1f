import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import STRICT

from lightning_ssesam.cli import main
from lightning_ssesam.compare import GROUPS, Run, compare, format_table

pytestmark = STRICT

QUICK = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


@pytest.fixture(autouse=True)
def _own_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-ssesam"])


def saved_config(version=0):
    return yaml.safe_load(Path(f"lightning_logs/version_{version}/config.yaml").read_text())


def logged(column, version=0):
    with Path(f"lightning_logs/version_{version}/metrics.csv").open() as file:
        return [row[column] for row in csv.DictReader(file) if row.get(column)]


def test_fit_then_validate_and_test_from_the_saved_config(capsys):
    main(["fit", "--config", "digits_lt", *QUICK, "--trainer.max_epochs=2", "--data.imbalance_factor=10"])
    config = saved_config()
    assert config["data"]["init_args"]["imbalance_factor"] == 10
    assert config["model"]["objective"]["class_path"] == "lightning_ssesam.SSESAM"
    stages = [float(stage) for stage in logged("stage")]
    assert stages == sorted(stages)
    assert set(stages) == {1.0, 2.0}
    fitted = logged("val/acc_tail")[-1]

    (checkpoint,) = Path("lightning_logs/version_0/checkpoints").iterdir()
    torch.load(checkpoint, weights_only=True)
    for version, command in enumerate(("validate", "test"), start=1):
        main([command, "-c=lightning_logs/version_0/config.yaml", f"--ckpt_path={checkpoint}", *QUICK[1:]])
        assert logged(f"{command.removesuffix('idate')}/acc_all", version)
    assert float(logged("val/acc_tail", 1)[0]) == pytest.approx(float(fitted), abs=1e-6)
    assert "test/acc_tail" in capsys.readouterr().out


@pytest.mark.parametrize("objective", ["ERM", "SAM", "ImbSAM", "SSESAM", "lightning_ssesam.SAM"])
def test_objectives_by_class_path(objective):
    main(["fit", "--data=DigitsLT", "--model.backbone=SmallConvNet", f"--model.objective={objective}", *QUICK])
    assert saved_config()["model"]["objective"]["class_path"] == f"lightning_ssesam.{objective.split('.')[-1]}"


def test_everything_by_class_path():
    main(
        [
            "fit",
            "--data=DigitsLT",
            "--model.backbone=torchvision.models.squeezenet1_1",
            "--model.objective=ImbSAM",
            "--model.objective.reduction=group",
            "--model.loss=torch.nn.CrossEntropyLoss",
            "--model.loss.reduction=none",
            "--model.optimizer=AdamW",
            "--model.optimizer.lr=0.01",
            "--model.scheduler=StepLR",
            "--model.scheduler.step_size=1",
            "--model.tail_below=10",
            "--trainer.limit_train_batches=0",
            "--trainer.limit_val_batches=0",
            *QUICK,
        ]
    )
    model = saved_config()["model"]
    assert model["optimizer"]["init_args"]["lr"] == 0.01
    assert model["scheduler"]["class_path"] == "torch.optim.lr_scheduler.StepLR"
    assert model["tail_below"] == 10


def test_what_the_trainer_gives():
    main(
        [
            "fit",
            "--data=DigitsLT",
            "--model.backbone=SmallConvNet",
            "--model.scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau",
            "--model.scheduler.patience=0",
            "--model.scheduler.threshold=1000.0",
            "--model.scheduler_interval=step",
            "--model.scheduler_monitor=train/loss",
            "--model.log_sharpness=true",
            "--model.on_nonfinite=skip",
            "--model.passes=split",
            "--model.batch_norm=group",
            "--model.backbone.norm=batch",
            "--model.interval=2",
            "--trainer.gradient_clip_val=1.0",
            "--trainer.accumulate_grad_batches=2",
            "--trainer.limit_train_batches=8",
            "--trainer.log_every_n_steps=1",
            *QUICK,
        ]
    )
    (metrics,) = Path().rglob("metrics.csv")
    with metrics.open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert rows[-1]["step"] == "3"
    assert float(rows[-1]["train/sharpness_tail"]) != 0
    assert float(rows[-1]["train/skipped_updates"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.objective=SAM", "--model.objective.rho=-1"], "error: Expected argument `rho` to be a finite number"),
        (["--data.imbalance_factor=0"], "error: Expected argument `imbalance_factor` to be a finite number > 0"),
        (
            ["--trainer.callbacks=StageSwitch", "--trainer.callbacks.at=1"],
            "error: Expected argument `at` to be a number",
        ),
        (["--model.tail_below=5", "--model.tail_fraction=0.5"], "error: Expected exactly one of the arguments `tail_b"),
    ],
)
def test_bad_values_get_one_line(arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--data=DigitsLT", "--model.backbone=SmallConvNet", *QUICK, *arguments])
    assert str(stop.value).startswith(message)
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "error: Expected a command, one of fit, validate, test, compare, but got 'trian'."),
        (["fit", "--config=nope"], "error: Expected `--config` to be a YAML file or one of digits_lt, but got 'nope'."),
        (
            ["test", "-c", "nope.yaml"],
            "error: Expected `--config` to be a YAML file or one of digits_lt, but got 'nope",
        ),
        (
            ["fit", "--config=digits_lt", "--model.optimizer=torch.optim.LBFGS", *QUICK],
            "error: LBFGS evaluates the loss several times",
        ),
    ],
)
def test_misuse_gets_one_line(arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert str(stop.value).startswith(message)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help(arguments, capsys):
    main(arguments)
    text = capsys.readouterr().out
    for command in ("fit", "validate", "test", "compare"):
        assert f"\n  {command} " in text
    assert "digits_lt" in text
    assert max(map(len, text.splitlines())) <= 120


def test_help_of_compare_names_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    text = capsys.readouterr().out
    for option in ("--methods", "--seeds", "--epochs", "--data", "--gamma", "--output"):
        assert option in text
    assert "Share of the training after which" in text


def test_as_a_module_and_a_command():
    for command in ([sys.executable, "-m", "lightning_ssesam"], [Path(sys.executable).parent / "lightning-ssesam"]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == "lightning-ssesam 0.1.0\n"


def test_compare(capsys):
    main(["compare", "--epochs=2", "--seeds=2", "--methods=ERM,SSESAM", "--output=out/here", "--data.seed=4"])
    printed = capsys.readouterr().out
    assert "mean and standard deviation over 2 seeds" in printed
    with Path("out/here/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("ERM", "0"),
        ("SSESAM", "0"),
        ("ERM", "1"),
        ("SSESAM", "1"),
    ]
    for row in rows:
        recalls = [float(row[f"class_{k}"]) for k in range(10)]
        assert float(row["all"]) == pytest.approx(sum(recalls) / 10, abs=1e-6)
        assert float(row["head"]) == pytest.approx(sum(recalls[:4]) / 4, abs=1e-6)
        assert float(row["tail"]) == pytest.approx(sum(recalls[4:]) / 6, abs=1e-6)
    picture = Path("out/here/comparison.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


def test_compare_is_paired_and_repeatable():
    runs = [compare(["ERM", "SAM"], seeds=1, epochs=1, sam_rho=0.0, output=Path(name)) for name in ("a", "b")]
    # SAM with radius 0 is ERM: same weights, batches and results.
    assert runs[0][0].class_recalls == runs[0][1].class_recalls == runs[1][0].class_recalls
    assert runs[0][0].tail_curve == runs[1][1].tail_curve


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_leaves_the_finished_runs_and_says_so(error, monkeypatch, capsys):
    calls = []

    def interrupted(run, *args):
        calls.append(run)
        if len(calls) == 2:
            raise error
        run.accuracy, run.class_recalls = dict.fromkeys(GROUPS, 0.5), [0.5] * 10

    monkeypatch.setattr("lightning_ssesam.compare._train", interrupted)
    Path("crash").mkdir()
    Path("crash/comparison.png").touch()
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--seeds=1", "--output=crash"])
    assert stop.value.code == 130
    with Path("crash/results.csv").open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["ERM"]
    assert not Path("crash/comparison.png").exists()
    printed = capsys.readouterr().out
    assert "Interrupted after 1 of 4 runs, which are in crash/results.csv" in printed
    assert "over 1 seed\n" in printed


def test_what_cannot_be_built_replaces_nothing():
    Path("comparison").mkdir()
    Path("comparison/results.csv").write_text("earlier")
    for wrong in ("--backbone.width=9", "--optimizer.lr=-1"):
        with pytest.raises((SystemExit, ValueError)):
            main(["compare", wrong])
    assert Path("comparison/results.csv").read_text() == "earlier"


def test_divergence_is_reported(capsys):
    compare("ERM", seeds=1, epochs=2, optimizer=lambda params: torch.optim.SGD(params, lr=1e20))
    assert "Diverged, with a loss that is not finite: ERM with seed 0" in capsys.readouterr().out


def test_table():
    runs = [
        Run(method, seed, dict.fromkeys(GROUPS, value + seed / 10))
        for method, value in (("ERM", 0.5), ("SSESAM", 0.7))
        for seed in (0, 1)
    ]
    lines = format_table(runs).splitlines()
    assert lines[1].split() == list(GROUPS)
    assert lines[2].split()[:4] == ["ERM", "55.0", "±", "7.1"]
    assert lines[3].split()[:4] == ["SSESAM", "75.0", "±", "7.1"]
    assert "±" not in format_table(runs[:1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods=[SGD]"], "`methods` to be some of ERM, SAM, ImbSAM, SSESAM, each once, but got ['SGD']"),
        (["--methods=[]"], "`methods` to be some of"),
        (["--methods=[ERM, ERM]"], "`methods` to be some of"),
        (["--seeds=0"], "`seeds` to be an integer >= 1, but got 0"),
        (["--epochs=0"], "`epochs` to be an integer >= 1, but got 0"),
        (["--threads=0"], "`threads` to be an integer >= 1, but got 0"),
        (["--gamma=1"], "`gamma` to be a number strictly between 0 and 1, but got 1.0"),
        (["--sam_rho=-1"], "`sam_rho` to be a finite number >= 0, but got -1.0"),
        (["--data.imbalance_factor=1000"], "`imbalance_factor` to be at most max_count = 100"),
        (["--tail_fraction=2"], "`tail_fraction` to be a number strictly between 0 and 1"),
        (["--output=file/here"], "`output` to be a folder that can be made (Not a directory), but got 'file/here'"),
        (["--tail_fraction=0.001"], "`split` to be a ClassSplit with both head and tail classes"),
    ],
)
def test_compare_refuses_before_it_trains(arguments, message, monkeypatch):
    monkeypatch.setattr("lightning_ssesam.compare._train", lambda *args: pytest.fail("trained"))
    Path("file").touch()
    with pytest.raises(SystemExit) as stop:
        main(["compare", *arguments])
    assert str(stop.value).startswith(f"error: Expected argument {message}")
    assert not Path("comparison").exists()
