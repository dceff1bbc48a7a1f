"""What must stay when the code is moved: names, paths, keys, options and files that users and their files rely on.

`contract.json` beside this file lists them. A line may be added there; one that goes is a break, and needs a line in
CHANGELOG.md.
"""

import contextlib
import importlib
import inspect
import io
import json
import random
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from helpers import REFERENCE, SPLIT, STRICT, Model, choose, fit, trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_ssesam import (
    SSESAM,
    CurvatureMonitor,
    DeferredReweighting,
    DigitsLT,
    LongTailClassifier,
    RadiusSchedule,
    StageSwitch,
    StepOptions,
)
from lightning_ssesam.cli import main
from lightning_ssesam.losses import LDAMLoss
from lightning_ssesam.models import SmallConvNet
from lightning_ssesam.runs import Run, RunStore

pytestmark = STRICT

CONTRACT = json.loads((Path(__file__).parent / "contract.json").read_text())
CONFIGS = Path(inspect.getfile(importlib.import_module("lightning_ssesam.configs"))).parent


def found(path):
    """What a dotted path leads to, through the longest module that it begins with."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            value = importlib.import_module(".".join(parts[:end]))
            for name in parts[end:]:
                value = getattr(value, name)
            return value
    raise AssertionError(path)


@pytest.mark.parametrize("path", CONTRACT["import paths"])
def test_import_path(path):
    assert found(path) is not None


def test_root_names():
    root = importlib.import_module("lightning_ssesam")
    assert set(CONTRACT["root names"]) <= set(root.__all__)


@pytest.mark.parametrize("path", CONTRACT["classes in checkpoints"])
def test_module_path_of_a_class_that_checkpoints_hold(path):
    kind = found(path)
    assert f"{kind.__module__}.{kind.__qualname__}" == path
    assert kind in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("command", CONTRACT["options"])
def test_command_line_options(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-ssesam"])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        main([command, "--help"])
    options = set(re.findall(r"(?<![\w.])--[a-z][\w.]*", printed.getvalue()))
    assert set(CONTRACT["options"][command]) <= options


def test_shipped_configurations():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} >= set(CONTRACT["configurations"])


def test_class_paths_of_shipped_configurations():
    for path in CONFIGS.glob("*.yaml"):
        for class_path in re.findall(r"class_path: (lightning_ssesam\S+)", path.read_text()):
            assert inspect.isclass(found(class_path)), class_path
        assert yaml.safe_load(path.read_text())


def test_callback_states_and_logged_names():
    data = DigitsLT()
    model = LongTailClassifier(
        data.class_counts,
        lambda num_classes: SmallConvNet(num_classes, norm="batch"),
        SSESAM(head_rho=0.05, tail_rho=0.1),
        LDAMLoss(),
        step_options=StepOptions(
            passes="split", batch_norm_statistics="group", on_nonfinite="skip", log_sharpness=True
        ),
    )
    monitor = CurvatureMonitor(every_n_epochs=2, samples=2, max_iterations=2)
    switches = [StageSwitch(at=0.5), DeferredReweighting(at=0.5), RadiusSchedule("tail_rho", 0.1, 0.2)]
    callbacks = [*switches, monitor, ModelCheckpoint(save_last=True)]
    run = trainer(max_epochs=2, limit_train_batches=2, callbacks=callbacks, enable_checkpointing=True)
    logged = set()
    for name in ("fit", "validate", "test"):
        getattr(run, name)(model, datamodule=data)
        logged |= set(run.callback_metrics)
    assert logged == set(CONTRACT["logged names"])
    (saved,) = Path("checkpoints").glob("last.ckpt")
    states = torch.load(saved, weights_only=True)["callbacks"]
    ours = {key: sorted(state) for key, state in states.items() if not key.startswith("ModelCheckpoint")}
    assert ours == CONTRACT["callback states"]
    assert sorted(monitor.history[0]) == CONTRACT["columns of CurvatureMonitor.history"]


def test_run_files(tmp_path):
    """A file that is written now has its name and its keys."""
    saved = CONTRACT["run file"]
    store = RunStore(tmp_path)
    (tmp_path / saved["name"]).write_text(json.dumps(saved["content"]))
    run = store.load("SSE-SAM + logit adjustment", 3, saved["content"]["fingerprint"])
    assert run == Run(**saved["content"]["run"])
    store.save(run, saved["content"]["fingerprint"])
    (path,) = tmp_path.iterdir()
    assert path.name == saved["name"]
    assert json.loads(path.read_text()) == saved["content"]
    assert [field.name for field in fields(Run)] == list(saved["content"]["run"])


def test_run_file_of_an_earlier_version(tmp_path):
    """What it does not hold is unknown, and it is not made again."""
    saved = CONTRACT["run file of an earlier version"]
    (tmp_path / saved["name"]).write_text(json.dumps(saved["content"]))
    run = RunStore(tmp_path).load("SSE-SAM + logit adjustment", 3, saved["content"]["fingerprint"])
    assert run == Run(**saved["content"]["run"])
    assert (run.calibration, run.confused_pairs, run.parameters, run.optimizer) == ({}, [], 0, "")


class Dropping(Model):
    """Drops samples at random, by Python's numbers: those of torch differ between its versions."""

    def __init__(self, objective):
        super().__init__(objective=objective)
        self.save_hyperparameters()

    def sample_losses(self, batch):
        losses = super().sample_losses(batch)
        if self.in_clean_pass:
            self.kept = torch.tensor([float(random.random() < 0.5) for _ in range(len(losses))])
        return losses * self.kept


def fixed_batches():
    x = torch.sin(torch.arange(4 * 12 * 8, dtype=torch.float64)).reshape(4, 12, 8)
    y = (torch.arange(4 * 12).reshape(4, 12) * 7) % 5
    return list(zip(x, y, strict=True))


@pytest.mark.usefixtures("float64")
def test_checkpoint_of_an_earlier_version_goes_on():
    """It was saved after the first of two epochs. Beside it are the weights after the second."""
    expected = torch.load(REFERENCE / "checkpoint_after.pt", weights_only=True)
    model = Dropping(SSESAM(SPLIT, 0.05, 0.1))
    choose(model, passes="full")
    path = REFERENCE / "checkpoint.ckpt"
    run = fit(model, fixed_batches(), ckpt_path=path, max_epochs=2, callbacks=[StageSwitch(at=0.75)])
    assert run.global_step == 8
    assert model.objective.stage == 2
    assert model.skipped_updates == 0
    torch.testing.assert_close(model.net.state_dict(), expected, rtol=0, atol=1e-12)
    hyperparameters = torch.load(path, weights_only=True)["hyper_parameters"]
    assert repr(hyperparameters["objective"]) == repr(SSESAM(SPLIT, 0.05, 0.1))
