"""Trainings of a comparison that are cut off go on from their last checkpoint, and end with the same bits."""

import json
import math
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import STRICT
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_ssesam import ERM, SAM, SSESAM, DigitsLT, StepOptions
from lightning_ssesam.cli import main
from lightning_ssesam.compare import Method, compare
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments import unfinished
from lightning_ssesam.experiments.jobs import Task, make_runs
from lightning_ssesam.experiments.unfinished import KeepUnfinished, Unfinished
from lightning_ssesam.models import SmallConvNet
from lightning_ssesam.runs import Experiment

pytestmark = STRICT
SMALL = partial(SmallConvNet, width=8)
BETWEEN, TIMES_WRITING = unfinished._BETWEEN, unfinished._TIMES_WRITING


@pytest.fixture(autouse=True)
def _always_due(monkeypatch):
    monkeypatch.setattr(unfinished, "_BETWEEN", 0.0)
    monkeypatch.setattr(unfinished, "_TIMES_WRITING", 0)
    monkeypatch.setattr(sys, "argv", ["lightning-ssesam"])


class Killed(Exception):
    """Ends a training as a signal does that cannot be handled: nothing is written any more."""


class Cut(Callback):
    """Ends a training in a hook, at an epoch and the batch of that number, as long as it is asked to."""

    moment: tuple | None = None

    def _look(self, hook, trainer, batch_idx=0):
        if Cut.moment == (hook, trainer.current_epoch, batch_idx):
            raise Killed

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._look("batch", trainer, batch_idx)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self._look("validation", trainer)

    def on_train_end(self, trainer, pl_module):
        self._look("end", trainer)

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self._look("test", trainer)


@pytest.fixture
def cut():
    yield lambda *moment: setattr(Cut, "moment", moment or None)
    Cut.moment = None


def experiment(objective=SSESAM, callbacks=(), **options):
    return Experiment("a", objective, **{"backbone": SMALL, "epochs": 3, **options}, callbacks=[Cut(), *callbacks])


def texts(run, *unlike):
    """The fields of a run as texts, in which NaN is NaN."""
    return {name: repr(value) for name, value in asdict(run).items() if name not in ("seconds", *unlike)}


def cut_off(made, cut, *moments):
    """The run of a training that was cut off at some moments, in a folder that is looked at in between."""
    folder = Unfinished(Path("u").absolute())
    for moment in moments:
        cut(*moment)
        with pytest.raises(Killed):
            made.run(0, None, folder)
    cut()
    return made.run(0, None, folder)


@pytest.mark.parametrize(
    ("moments", "epochs"),
    [
        ([("batch", 0, 3)], 0),
        ([("batch", 2, 4)], 2),
        ([("batch", 1, 0), ("batch", 2, 1), ("batch", 2, 2)], 2),
        ([("validation", 1, 0)], 1),
        ([("end", 3, 0)], 2),
        ([("test", 3, 0)], 2),
    ],
)
def test_goes_on_bit_for_bit(moments, epochs, cut):
    """Both stages, with the curves of all epochs."""
    made = experiment()
    whole, run = made.run(0), cut_off(made, cut, *moments)
    assert texts(run, "interruptions") == texts(whole, "interruptions")
    assert (whole.interruptions, run.interruptions) == (0, len(moments))
    # It was not made anew.
    saved = torch.load("u/last.ckpt", weights_only=True)
    assert saved["epoch"] == 1, "the end of the last epoch but one"
    assert len(saved["callbacks"]["Recorder"]["curves"]["all"]) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"trainer": {"check_val_every_n_epoch": 2}, "epochs": 4},
        {"trainer": {"max_steps": 25}},
        {"model": {"step_options": StepOptions(log_loss=False)}},
        {"callbacks": [EarlyStopping("val/loss", patience=0, min_delta=10.0)], "epochs": 9},
    ],
    ids=["validates now and then", "ends within an epoch", "logs no loss", "stops early"],
)
def test_goes_on_with_what_the_trainer_forgets(options, cut):
    made = experiment(SAM, **options)
    whole, run = made.run(0), cut_off(made, cut, ("batch", 1, 2))
    assert texts(run, "interruptions") == texts(whole, "interruptions")
    assert not run.diverged


def test_the_duration_is_that_of_all_attempts(cut):
    """The first attempt waits."""
    made = experiment(ERM, [waits := Wait()])
    waits.seconds = 1.0
    folder = Unfinished(Path("u").absolute())
    cut("batch", 1, 0)
    with pytest.raises(Killed):
        made.run(0, None, folder)
    waits.seconds = 0.0
    cut()
    start = time.perf_counter()
    run = experiment(ERM).run(0, None, folder)
    assert 1.0 <= run.seconds - (time.perf_counter() - start) < 3.0


class Wait(Callback):
    seconds = 0.0

    def on_validation_start(self, trainer, pl_module):
        time.sleep(self.seconds)


class Stateful(DigitsLT):
    """Its loader knows where it is."""

    def train_dataloader(self):
        loader = super().train_dataloader()
        return StatefulDataLoader(loader.dataset, batch_size=16, shuffle=True)


def test_goes_on_within_an_epoch_if_the_loader_knows_where_it_is(cut):
    made = experiment(SAM, data=Stateful, epochs=2)
    whole = made.run(0)
    cut("batch", 0, 9)
    with pytest.raises(Killed):
        made.run(0, None, Unfinished(Path("u").absolute()))
    assert torch.load("u/last.ckpt", weights_only=True)["global_step"] == 9
    assert texts(cut_off(made, cut), "interruptions") == texts(whole, "interruptions")


def test_goes_on_within_the_last_epoch(cut):
    made = experiment(SAM, data=Stateful, epochs=1)
    whole, run = made.run(0), cut_off(made, cut, ("batch", 0, 9))
    assert torch.load("u/last.ckpt", weights_only=True)["global_step"] > 9
    assert texts(run, "interruptions") == texts(whole, "interruptions")


def test_goes_on_with_processes_that_load(cut):
    made = experiment(SAM, data=partial(DigitsLT, num_workers=1))
    whole, run = made.run(0), cut_off(made, cut, ("batch", 2, 1))
    assert texts(run, "interruptions") == texts(whole, "interruptions")
    assert torch.load("u/last.ckpt", weights_only=True)["epoch"] == 1


class Staying(DigitsLT):
    """Its processes stay from epoch to epoch."""

    def _workers_stay(self, name):
        return True


def test_begins_anew_with_processes_that_stay(cut):
    made = experiment(SAM, data=partial(Staying, num_workers=1))
    whole, run = made.run(0), cut_off(made, cut, ("batch", 2, 1))
    assert texts(run, "interruptions") == texts(whole, "interruptions")
    assert not Path("u/last.ckpt").exists()


def test_a_full_disk_costs_the_checkpoint_alone(monkeypatch, capsys):
    def fail(self, path, *_, **__):
        raise OSError(28, "No space left on device", str(path))

    made = experiment(ERM)
    whole = made.run(0)
    monkeypatch.setattr("lightning.pytorch.Trainer.save_checkpoint", fail)
    run = made.run(0, None, Unfinished(Path("u").absolute()))
    assert texts(run) == texts(whole)
    assert "u/last.ckpt': No space left on device. The training goes on without" in capsys.readouterr().out
    assert [path.name for path in Path("u").iterdir()] == ["begun.txt"]


def test_a_file_in_the_way_is_named():
    Path("comparison").mkdir()
    Path("comparison/unfinished").touch()
    with pytest.raises(ArgumentError, match="a folder without a file of the name 'unfinished', but got 'comparison'"):
        compare("ERM", seeds=1, epochs=1)


@pytest.mark.parametrize("damage", ["cut", "another file", "objects"])
def test_a_checkpoint_that_cannot_be_read_is_one_of_no_training(damage, cut, capsys):
    made = experiment(ERM)
    whole = made.run(0)
    folder = Unfinished(Path("u").absolute())
    cut("batch", 2, 1)
    with pytest.raises(Killed):
        made.run(0, None, folder)
    cut()
    content = folder.checkpoint.read_bytes()
    if damage == "objects":
        torch.save({"code": made.run}, folder.checkpoint)
    else:
        folder.checkpoint.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    run = made.run(0, None, folder)
    assert texts(run, "interruptions") == texts(whole, "interruptions")
    assert f"{folder.checkpoint} cannot be read (" in capsys.readouterr().out


def test_without_exact_resume_it_begins_anew(cut):
    made = experiment(ERM, model={"step_options": StepOptions(exact_resume=False)})
    whole, run = made.run(0), cut_off(made, cut, ("batch", 2, 1))
    assert texts(run, "interruptions") == texts(whole, "interruptions")
    assert sorted(path.name for path in Path("u").iterdir()) == ["begun.txt"]


def test_a_checkpoint_is_written_now_and_then(monkeypatch):
    """Half a minute after the last one, and at most a twentieth of the time."""
    monkeypatch.setattr(unfinished, "_BETWEEN", BETWEEN)
    monkeypatch.setattr(unfinished, "_TIMES_WRITING", TIMES_WRITING)
    clock, written = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(unfinished, "loaders", lambda trainer: [])

    class Trainer:
        max_epochs, max_steps, current_epoch, global_step, should_stop = 1000, -1, 0, 0, False
        val_dataloaders = None

        def save_checkpoint(self, path):
            written.append(clock[0])
            clock[0] += 3.0 if len(written) == 1 else 0.25

    keep = KeepUnfinished(Path("last.ckpt").absolute())
    keep.on_train_start(Trainer(), None)
    for _ in range(150):
        clock[0] += 1.0
        keep.on_train_epoch_end(Trainer(), None)
    assert written == [130.0, 193.0, 223.25, 253.5]


def test_a_comparison_that_is_interrupted_goes_on(cut, capsys):
    """The folder goes with the run, and with the last one that of all."""
    methods = {name: Method(partial(ERM), callbacks=[Cut()]) for name in ("one", "two/ü")}
    options = {"seeds": 1, "epochs": 3, "backbone": SMALL}
    expected = compare(methods, **options, output=Path("whole"))
    cut("batch", 2, 0)
    for _ in range(2):
        with pytest.raises(Killed):
            compare(methods, **options)
    (folder,) = Path("comparison/unfinished").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["begun.txt", "last.ckpt"]
    cut()
    runs = compare(methods, **options)
    assert [texts(run, "interruptions") for run in runs] == [texts(run, "interruptions") for run in expected]
    assert [run.interruptions for run in runs] == [2, 0]
    assert not Path("comparison/unfinished").exists()
    named = "Cut off and then made to the end, with the same numbers: one with seed 0 (2 times)."
    assert named in capsys.readouterr().out
    assert named in Path("comparison/report.html").read_text()
    assert not Path("whole/unfinished").exists()


@pytest.mark.usefixtures("no_pictures")
def test_fresh_runs_begin_anew_and_those_of_other_settings_stay(cut):
    cut("batch", 1, 3)
    for epochs in (2, 3):
        with pytest.raises(Killed):
            compare({"one": Method(ERM, callbacks=[Cut()])}, seeds=1, epochs=epochs, backbone=SMALL)
    assert len(list(Path("comparison/unfinished").iterdir())) == 2
    cut()
    (run,) = compare({"one": Method(ERM, callbacks=[Cut()])}, seeds=1, epochs=3, backbone=SMALL, fresh=True)
    assert run.interruptions == 0
    (other,) = Path("comparison/unfinished").iterdir()
    (run,) = compare({"one": Method(ERM, callbacks=[Cut()])}, seeds=1, epochs=2, backbone=SMALL)
    assert run.interruptions == 1
    assert not other.exists()


@pytest.mark.usefixtures("no_pictures")
def test_a_run_of_an_earlier_version_says_nothing_of_interruptions():
    main(["compare", "--methods=ERM", "--seeds=1", "--epochs=1", "--jobs=1"])
    (path,) = Path("comparison/runs").glob("*.json")
    content = json.loads(path.read_text())
    del content["run"]["interruptions"]
    path.write_text(json.dumps(content))
    (run,) = compare("ERM", seeds=1, epochs=1)
    assert run.interruptions == 0
    assert math.isfinite(run.accuracy["all"])
    content["run"]["interruptions"] = -1
    path.write_text(json.dumps(content))
    (run,) = compare("ERM", seeds=1, epochs=1)
    assert run.interruptions == 0


def test_where_there_is_no_folder_nothing_is_kept():
    """On a worker of a cluster that shares no folder with the command."""
    task = Task(experiment(ERM, epochs=2), "", 0, Path("nowhere/of/a").absolute())
    (run,) = make_runs([task], 1)
    assert len(run.curves["all"]) == 2
    assert not Path("nowhere").exists()
