import csv
import os
import platform
import runpy
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from helpers import SHIPPED_COMPARISONS, SHIPPED_FITS, STRICT, planned_runs
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from lightning_ssesam import StageSwitch
from lightning_ssesam.cli import COMMANDS, main
from lightning_ssesam.experiments.checkpoints import find_config
from lightning_ssesam.experiments.files import locked
from lightning_ssesam.experiments.resume import folder_of_run

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


def test_everything_by_class_path(monkeypatch):
    # The network takes images with three channels, and gets none.
    monkeypatch.setattr("lightning_ssesam.experiments.training_commands.check_network", lambda *_: None)
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
            "--model.step_options.log_sharpness=true",
            "--model.step_options.on_nonfinite=skip",
            "--model.step_options.passes=split",
            "--model.step_options.batch_norm_statistics=group",
            "--model.backbone.norm=batch",
            "--model.step_options.interval=2",
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
        (
            ["trian"],
            f"error: Expected a command, one of {', '.join(COMMANDS)}, but got 'trian'.",
        ),
        (
            ["fit", "--config=nope"],
            f"error: Expected `--config` to be a YAML file or one of {', '.join(SHIPPED_FITS)}, but got 'nope'.",
        ),
        (
            ["test", "-c", "nope.yaml"],
            f"error: Expected `--config` to be a YAML file or one of {', '.join(SHIPPED_FITS)}, but got 'nope",
        ),
        (["sweep", "--config", "digits_lt"], "error: Expected `--config` to be a YAML file, but got 'digits_lt'."),
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


def write_image_list(last_line):
    """Four images in a list file, and a last line of it."""
    for number in range(4):
        Image.new("RGB", (8, 8)).save(f"{number}.png")
    Path("train.txt").write_text("".join(f"{number}.png {number % 2}\n" for number in range(4)) + last_line)
    Path("test.txt").write_text("0.png 0\n1.png 1\n")


LISTS = ["--data=ImageListLT", "--data.train=train.txt", "--data.test=test.txt", "--data.image_size=8"]
NETWORK = ["--backbone=SmallConvNet", "--backbone.in_channels=3"]
COMPARISON = ["compare", *NETWORK, "--methods=ERM", "--seeds=1", "--epochs=1", "--jobs=1"]
FIT = ["fit", "--model.objective=ERM", "--model.backbone=SmallConvNet", "--model.backbone.in_channels=3", *QUICK]


@pytest.mark.parametrize("command", [COMPARISON, ["sweep", *NETWORK, "--trials=1", "--epochs=1"], FIT])
def test_a_wrong_line_in_a_file_of_data_gets_one_line(command):
    write_image_list("0.png cat\n")
    with pytest.raises(SystemExit) as stop:
        main([*command, *LISTS, "--data.num_workers=0"])
    assert str(stop.value).startswith("error: train.txt, line 5: Expected a label")
    assert "\n" not in str(stop.value)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*smaller than the logging interval")
@pytest.mark.parametrize(
    ("command", "workers"),
    [(COMPARISON, 0), (COMPARISON, 1), (FIT, 1)],
    ids=["compare", "compare-worker", "fit-worker"],
)
def test_an_image_that_fails_during_training_gets_one_line(command, workers):
    """In the loader's own process too, of which torch hands on the type of the error and a text with its traceback."""
    write_image_list("4.png 1\n")
    Path("4.png").write_text("no image")
    with pytest.raises(SystemExit) as stop:
        main([*command, *LISTS, f"--data.num_workers={workers}"])
    assert str(stop.value).startswith("error: train.txt, line 5: Expected ")
    assert "\n" not in str(stop.value)


def test_an_interrupt_ends_fit_without_a_traceback(monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "fit", interrupt)
    with pytest.raises(SystemExit) as stop:
        main([*FIT, "--data=DigitsLT", "--model.backbone.in_channels=1"])
    assert stop.value.code == 130


ONE_FOLDER = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs", "--trainer.logger.version=mine"]
SHORT = [
    "--config=digits_lt",
    *QUICK,
    "--model.objective=ERM",
    "--trainer.callbacks=null",
    "--trainer.limit_train_batches=2",
    "--trainer.log_every_n_steps=1",
]


def files_of(folder):
    # Lightning 2.5 writes hyperparameters too, of which there are none.
    paths = [path for path in Path(folder).iterdir() if path.is_file() and path.name != "hparams.yaml"]
    return {path.name: path.read_text() for path in paths}


def saved_weights(pattern):
    (path,) = Path().glob(pattern)
    return torch.load(path, weights_only=True)["state_dict"]


def test_one_command_resumes_and_nothing_is_lost():
    """Twice, and then an evaluation, in one folder. The weights are those of an uninterrupted training."""
    main(["fit", *SHORT, "--trainer.max_epochs=3"])
    folder = "runs/lightning_logs/mine"
    again = ["fit", *SHORT, *ONE_FOLDER, "--ckpt_path=last"]
    main([*again, "--trainer.max_epochs=1"])
    first = files_of(folder)
    assert set(first) == {"config.yaml", "metrics.csv"}
    main([*again, "--trainer.max_epochs=2"])
    second = files_of(folder)
    assert second["config.yaml"] == first["config.yaml"]
    assert second["metrics-1.csv"] == first["metrics.csv"]
    assert yaml.safe_load(second["config-1.yaml"])["trainer"]["max_epochs"] == 2
    main([*again, "--trainer.max_epochs=3"])
    third = files_of(folder)
    assert set(third) == {*second, "config-2.yaml", "metrics-2.csv"}
    assert (third["config-1.yaml"], third["metrics-2.csv"]) == (second["config-1.yaml"], second["metrics.csv"])
    steps = [row["step"] for name in ("metrics-1.csv", "metrics-2.csv", "metrics.csv") for row in steps_of(third[name])]
    assert steps == ["0", "1", "2", "3", "4", "5"]
    resumed, whole = (
        saved_weights(f"{place}/checkpoints/epoch=2*.ckpt") for place in (folder, "lightning_logs/version_0")
    )
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    main(["test", *SHORT, *ONE_FOLDER, "--ckpt_path=last"])
    assert files_of(folder)["metrics-3.csv"] == third["metrics.csv"]


def steps_of(text):
    return [row for row in csv.DictReader(text.splitlines()) if row.get("train/loss")]


@pytest.mark.parametrize("place", [ONE_FOLDER, ["--trainer.logger=false", "--trainer.default_root_dir=runs"]])
def test_a_second_training_in_a_folder_overwrites_nothing(place):
    """Lightning refused the folder after it had deleted the metrics."""
    main(["fit", *SHORT, *place])
    paths = [path for path in Path("runs").rglob("*") if path.is_file() and path.name != "hparams.yaml"]
    before = {path: path.read_bytes() for path in paths}
    main(["fit", *SHORT, *place, "--model.objective=SAM"])
    (config,) = Path("runs").rglob("config.yaml")
    (metrics,) = Path("runs").rglob("metrics.csv") if place is ONE_FOLDER else [None]
    kept = {config.with_name("metrics-1.csv") if path == metrics else path: text for path, text in before.items()}
    assert {path: path.read_bytes() for path in kept} == kept
    assert saved_objective(config.with_name("config-1.yaml")) != saved_objective(config)
    first, second = sorted(Path("runs").rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    assert second.name == f"{first.stem}-v1.ckpt"
    assert {find_config(first).name, find_config(second).name} == {"config.yaml", "config-1.yaml"}


def saved_objective(config):
    return yaml.safe_load(config.read_text())["model"]["objective"]


def test_the_checkpoint_that_is_called_last(monkeypatch):
    """It comes before newer ones. Where the folder is always new, the error names the newest of the others."""
    main(["fit", *SHORT])
    with pytest.raises(SystemExit) as stop:
        main(["fit", *SHORT, "--ckpt_path=last"])
    (saved,) = Path("lightning_logs/version_0/checkpoints").iterdir()
    assert str(stop.value).startswith("error: `--ckpt_path last` looks for a checkpoint in the folder of this training")
    assert f"--ckpt_path '{saved.resolve()}'" in str(stop.value)

    loaded = []

    def fit(self, model, datamodule, ckpt_path: str | None = None):
        loaded.append(ckpt_path)

    monkeypatch.setattr(Trainer, "fit", fit)
    folder = Path("runs/lightning_logs/mine/checkpoints")
    main(["fit", *SHORT, *ONE_FOLDER, "--ckpt_path=last"])
    folder.mkdir(parents=True)
    for age, name in enumerate(("b", "last-v1", "a")):
        (folder / f"{name}.ckpt").touch()
        os.utime(folder / f"{name}.ckpt", (age, age))
    main(["fit", *SHORT, *ONE_FOLDER, "--ckpt_path=last"])
    (folder / "last-v1.ckpt").unlink()
    main(["fit", *SHORT, *ONE_FOLDER, "--ckpt_path=last"])
    main(["fit", *SHORT, "--trainer.fast_dev_run=true", "--ckpt_path=last"])
    assert loaded == ["last", "last", str((folder / "a.ckpt").resolve()), "last"]


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_other_errors_keep_their_traceback(error, monkeypatch):
    """Whatever their text is."""

    def fail(*args):
        raise error("Expected argument `x` to be a thing of the user, but got none.")

    monkeypatch.setattr("lightning_ssesam.experiments.experiment.Experiment.run", fail)
    with pytest.raises(error, match="a thing of the user"):
        main(["compare", "--methods=ERM", "--seeds=1", "--jobs=1"])


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help(arguments, capsys):
    main(arguments)
    text = capsys.readouterr().out
    for command in ("fit", "validate", "test", "compare", "sweep", "curvature"):
        assert f"\n  {command} " in text
    shipped = f"for `fit` {', '.join(SHIPPED_FITS)}; for `compare` {', '.join(SHIPPED_COMPARISONS)}."
    assert shipped in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("compare", ["--methods", "--seeds", "--epochs", "--data", "--gamma", "--jobs", "--output", "--config"]),
        ("sweep", ["--trials", "--head_rho", "--metric", "--prune", "--output", "--config"]),
    ],
)
def test_help_names_every_option(command, options, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    for option in options:
        assert f"  {option} " in text
    assert "stage 2 begins" in " ".join(text.split())


def test_as_a_module_and_a_command(monkeypatch, capsys):
    """Each in this process. `test_classes_in_the_working_folder` starts the command as a process of its own."""
    command = Path(sys.executable).parent / "lightning-ssesam"
    monkeypatch.setattr(sys, "argv", [str(command), "--version"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(command), run_name="__main__")
    assert end.value.code is None
    assert capsys.readouterr().out == "lightning-ssesam 0.1.0\n"
    monkeypatch.setattr(sys, "argv", ["lightning_ssesam", "--version"])
    runpy.run_module("lightning_ssesam", run_name="__main__")
    assert capsys.readouterr().out == "lightning-ssesam 0.1.0\n"


IMBSAM = "ImbSAM(rho=0.05, tail_weight=1.0, reduction='batch')"


@pytest.mark.parametrize("name", ["compare_cifar100_lt", "compare_cifar10_lt"])
def test_shipped_comparisons_are_what_they_say(name, monkeypatch):
    """All but the images and the training is real; the published protocol of CIFAR-100-LT is held to the letter."""
    seen = planned_runs(monkeypatch, ["--config", name])
    assert {task.seed for task in seen} == {0, 1, 2}
    experiments = {task.experiment.method: task.experiment for task in seen}
    last = experiments["SSE-SAM"]
    data, model = last.data(), last.make_model(last.data())
    assert last.epochs == 200
    assert [callback.at for callback in last.make_callbacks(model)] == [0.7]
    assert [repr(e.objective()) for e in experiments.values()][:3] == ["ERM()", "SAM(rho=0.05)", IMBSAM]
    if name == "compare_cifar10_lt":
        assert len(experiments) == 8
        assert all((" + " in method) == (e.loss is not None) for method, e in experiments.items())
        assert sum(data.class_counts) == 12_406
        return
    assert_published(data, model)


def assert_published(data, model):
    """The CIFAR-100-LT protocol of the SSE-SAM paper, but for seeds and epochs."""
    assert (data.batch_size, data.val_is_test, model.tta) == (64, True, "hflip")
    assert repr(model.objective) == "SSESAM(head_rho=0.05, tail_rho=0.1, first_stage='grouped')"
    assert sum(data.class_counts) == 10_847
    configured = model.configure_optimizers()
    (group,) = configured["optimizer"].param_groups
    assert [group[key] for key in ("initial_lr", "momentum", "weight_decay")] == [0.01, 0.9, 1e-3]
    assert configured["lr_scheduler"]["interval"] == "epoch"
    assert configured["lr_scheduler"]["scheduler"].T_max == 200
    assert model.split.tail.equal(torch.tensor(data.class_counts) < 100)
    assert (model.split.many_above, model.split.few_below) == (100, 20)
    assert sum(p.numel() for p in model.backbone.parameters()) == 21_328_292  # ResNet-34, 3x3 stem, 100 classes
    assert model.backbone.net.conv1.kernel_size == (3, 3)


def started(monkeypatch, *args):
    """Return the trainer, the model and the data that `fit` starts with."""
    seen = []
    monkeypatch.setattr(
        Trainer, "fit", lambda trainer, model, datamodule, **_: seen.extend([trainer, model, datamodule])
    )
    main(["fit", *args])
    return seen


def test_the_shipped_fit_is_what_it_says(monkeypatch):
    # It would download the images.
    monkeypatch.setattr("lightning_ssesam.experiments.training_commands.TrainingCLI._check_training", lambda _: None)
    trainer, model, data = started(monkeypatch, "--config", "cifar100_lt", "--trainer.accelerator=cpu")
    assert_published(data, model)
    assert trainer.max_epochs == 200
    assert [callback.at for callback in trainer.callbacks if isinstance(callback, StageSwitch)] == [0.7]


def newest_first(*names):
    """Checkpoints of which each is newer than the next."""
    paths = [Path(name) for name in names]
    for age, path in enumerate(reversed(paths)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (age, age))
    return paths


CHECKPOINTS = [f"lightning_logs/version_{number}/checkpoints/epoch={number}.ckpt" for number in (3, 0, 2, 1)]


@pytest.mark.parametrize("command", ["validate", "test"])
def test_an_evaluation_needs_a_checkpoint(command):
    """Random weights were evaluated. The error names the newest checkpoints."""
    newest_first(*CHECKPOINTS)
    with pytest.raises(SystemExit) as stop:
        main([command, *QUICK[1:]])
    named = ", ".join(CHECKPOINTS[:3])
    assert str(stop.value) == f"error: `{command}` needs a checkpoint: give --ckpt_path PATH, such as {named}."


def test_an_evaluation_without_any_checkpoint():
    with pytest.raises(SystemExit, match=r"^error: `test` needs a checkpoint: give --ckpt_path PATH\.$"):
        main(["test", *QUICK[1:], "--trainer.fast_dev_run=true"])


A, B = "a.ckpt", "b.ckpt"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--ckpt_path", A, B],
            "a pattern that matches one file, 'last' or 'hpc', but got 2 files: 'a.c",
        ),
        ([f"--ckpt_path={A}", B, "--trainer.max_epochs=1"], "2 files: 'a.ckpt', 'b.ckpt'."),
        (["--ckpt_path"], "but got nothing."),
        (["--ckpt_path", "--trainer.max_epochs=1"], "but got nothing."),
        (["--ckpt_path="], "but got ''."),
        (["--ckpt_path", ""], "but got ''."),
        (["--ckpt_path=*.ckpt"], "but got 2 files: '*.ckpt', which matches 'a.ckpt', 'b.ckpt'."),
        (["--ckpt_path=c*.ckpt"], "but got 'c*.ckpt', which matches no file."),
        (["--ckpt_path=c.ckpt"], "No such checkpoint: 'c.ckpt'."),
        (["--ckpt_path=folder"], "The checkpoint 'folder' is a folder, which may hold a sharded model."),
        (["--config=mine.yaml"], "No such checkpoint: 'd.ckpt'."),
        (["--ckpt_path=best"], "`--ckpt_path best`: only the program that has trained knows which checkpoint is best."),
    ],
)
@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_checkpoint_is_one_file(command, options, message):
    newest_first(A, B)
    Path("folder").mkdir()
    Path("mine.yaml").write_text("ckpt_path: d.ckpt")
    with pytest.raises(SystemExit) as stop:
        main([command, *QUICK[1:], *options])
    assert message in str(stop.value)
    assert "\n" not in str(stop.value)


def test_a_pattern_that_matches_one_file(monkeypatch):
    main(["fit", *SHORT])
    loaded = []

    def fit(self, model, datamodule, ckpt_path: str | None = None):
        loaded.append(ckpt_path)

    monkeypatch.setattr(Trainer, "fit", fit)
    (saved,) = Path("lightning_logs").rglob("*.ckpt")
    main(["fit", *SHORT, "--ckpt_path", "lightning_logs/*/*/*.ckpt"])
    # The name of this file is a pattern that does not match it.
    saved.rename("epoch[1].ckpt")
    main(["fit", *SHORT, "--ckpt_path", "epoch[1].ckpt"])
    assert loaded == [str(saved), "epoch[1].ckpt"]


def test_trainings_that_start_at_once_have_folders_of_their_own(tmp_path):
    """A logger counts the folders that are there: two that looked at the same time found the same number."""
    chosen, gate = [], threading.Barrier(4)

    def start():
        trainer = Trainer(logger=CSVLogger(str(tmp_path)), accelerator="cpu", enable_progress_bar=False)
        gate.wait()
        with folder_of_run(trainer, "fit", {"trainer": {}}):
            chosen.append(Path(trainer.log_dir).name)
            assert Path(trainer.log_dir).is_dir()

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(chosen) == [f"version_{number}" for number in range(4)]
    assert sorted(path.name for path in (tmp_path / "lightning_logs").glob("version_*")) == sorted(chosen)


def test_a_folder_in_which_a_training_is_at_work_is_refused(capsys):
    """Nothing of the first one is touched."""
    options = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs", "--trainer.logger.version=mine"]
    folder = Path("runs/lightning_logs/mine")
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("epoch\n0\n")
    with locked(folder, beside=True), pytest.raises(SystemExit) as stop:
        main(["fit", *options, *QUICK])
    assert [path.name for path in folder.iterdir()] == ["metrics.csv"]
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        f"error: Another command is at work in '{folder}' (process {os.getpid()} on {platform.node()}). Wait until it"
        " has ended, or choose another version of the logger.\n"
    )
    main(["fit", *options, *QUICK])
    assert (folder / "metrics-1.csv").read_text() == "epoch\n0\n"


METHODS_OF_FILE = """
methods:
  ERM: {objective: ERM}
  mine: {objective: {class_path: SAM, init_args: {rho: 0.3}}}
  "a, b": {objective: {class_path: ImbSAM, init_args: {rho: 0.4}}}
"""


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("mine", ["mine"]),
        ("mine,ERM", ["mine", "ERM"]),
        ("[mine,ERM]", ["mine", "ERM"]),
        ("['a, b',mine]", ["a, b", "mine"]),
        ("a, b", ["a, b"]),
        ("SAM,SSESAM", ["SAM", "SSESAM"]),
    ],
)
def test_methods_of_a_file_are_chosen_by_name(chosen, expected, monkeypatch):
    """The first one that is named is what the others are compared with."""
    Path("mine.yaml").write_text(METHODS_OF_FILE)
    for options in ([f"--methods={chosen}"], ["--methods", chosen]):
        planned = planned_runs(monkeypatch, ["--config=mine.yaml", "--seeds=1", *options])
        assert [task.experiment.method for task in planned] == expected
        radii = {task.experiment.method: getattr(task.experiment.objective(), "rho", None) for task in planned}
        assert all(radii[name] == rho for name, rho in (("mine", 0.3), ("a, b", 0.4)) if name in radii)


def test_methods_that_the_command_defines_are_added_to_those_of_a_file(monkeypatch):
    Path("mine.yaml").write_text("methods:\n  ERM: {objective: ERM}\n")
    chosen = "--methods={new: {objective: {class_path: SAM, init_args: {rho: 0.7}}}}"
    planned = planned_runs(monkeypatch, ["--config=mine.yaml", "--seeds=1", chosen])
    assert planned[-1].experiment.method == "new"
    assert planned[-1].experiment.objective().rho == 0.7


def test_a_wrong_name_beside_a_file_names_those_of_the_file(capsys):
    Path("mine.yaml").write_text(METHODS_OF_FILE)
    with pytest.raises(SystemExit):
        main(["compare", "--config=mine.yaml", "--methods=mine,nope"])
    assert capsys.readouterr().err == (
        "error: Expected argument `methods` to be some of those in the file (ERM, mine, a, b), but got 'nope'.\n"
    )
