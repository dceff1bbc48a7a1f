"""Several methods side by side: the runs, what is kept of them, tables, pictures, the report."""

import csv
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    NEEDS_BROWSER,
    STRICT,
    colors_in,
    errors_in,
    open_browser,
    planned_runs,
    running,
    show_as,
    wait_for,
)
from lightning.pytorch.callbacks import StochasticWeightAveraging

from lightning_ssesam import ERM, SSESAM, ClassSplit, DigitsLT, StageSwitch, StepOptions
from lightning_ssesam.cli import main
from lightning_ssesam.compare import METHODS, Method, compare
from lightning_ssesam.errors import WorkersLostError
from lightning_ssesam.experiments.devices import free_gpu
from lightning_ssesam.experiments.figures import FIGURES, Figure, draw_comparison, draw_confusion, draw_trade_off
from lightning_ssesam.experiments.intervals import paired_difference
from lightning_ssesam.experiments.jobs import Task, make_runs
from lightning_ssesam.experiments.progress import Begun
from lightning_ssesam.experiments.report import write_report
from lightning_ssesam.experiments.runs import Comparison
from lightning_ssesam.experiments.tables import (
    differences,
    format_table,
    markdown_table,
    write_runs,
    write_summary,
)
from lightning_ssesam.experiments.tasks import Pool
from lightning_ssesam.models import SmallConvNet
from lightning_ssesam.runs import CONFUSIONS, GROUPS, Experiment, Run, RunStore

pytestmark = STRICT

WRITTEN = {
    "report.html",
    "results.csv",
    "summary.csv",
    "classes.csv",
    "confusions.csv",
    "table.md",
    "table.tex",
    *(f"{figure}.png" for figure in ("comparison", "trade_off", "confusion", "curves", "reliability")),
}


@pytest.fixture(autouse=True)
def _own_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-ssesam"])


def rows_of(path):
    with Path(path).open() as file:
        return list(csv.DictReader(file))


def made_up(method, seed, value=0.5, classes=10, epochs=3, **kwargs):
    groups = dict.fromkeys(GROUPS, value)
    confusion = dict.fromkeys(CONFUSIONS, (1 - value) / 2)
    curves = {group: [value / 2] * epochs for group in GROUPS}
    bins = {group: [[3, 0.45, value], [9, 0.95, value]] for group in ("head", "tail", "all")}
    return Run(method, seed, groups, dict(groups), [value] * classes, confusion, curves, reliability=bins, **kwargs)


def test_compare(capsys):
    arguments = ["--epochs=2", "--seeds=2", "--methods=ERM,SSESAM", "--output=out/here", "--data.seed=4", "--jobs=1"]
    main(["compare", *arguments])
    printed = capsys.readouterr().out
    assert "mean and standard deviation over 2 seeds" in printed
    assert "Difference to ERM" in printed
    rows = rows_of("out/here/results.csv")
    assert [(row["method"], row["seed"]) for row in rows] == [(m, s) for m in ("ERM", "SSESAM") for s in ("0", "1")]
    for row in rows:
        recalls = [float(row[f"class_{k}"]) for k in range(10)]
        assert float(row["all"]) == pytest.approx(sum(recalls) / 10, abs=1e-6)
        assert float(row["head"]) == pytest.approx(sum(recalls[:4]) / 4, abs=1e-6)
        assert float(row["tail"]) == pytest.approx(sum(recalls[4:]) / 6, abs=1e-6)
        for group in ("head", "tail"):
            errors = float(row[f"{group}_to_head"]) + float(row[f"{group}_to_tail"])
            assert float(row[group]) + errors == pytest.approx(1, abs=3e-6)
        assert float(row["seconds"]) > 0
    assert WRITTEN | {"runs", ".lock"} == {path.name for path in Path("out/here").iterdir()}
    for picture in ("comparison", "trade_off", "confusion"):
        data = Path(f"out/here/{picture}.png").read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 10_000

    # The same again makes nothing anew, a further seed and other radii only what is not there.
    before = Path("out/here/table.md").read_text()
    main(["compare", *arguments])
    assert "4 of 4 runs are in out/here/runs already." in capsys.readouterr().out
    assert Path("out/here/table.md").read_text() == before
    main(["compare", *arguments, "--seeds=3", "--tail_rho=0.3"])
    assert "2 of 6 runs are in out/here/runs already." in capsys.readouterr().out


@pytest.mark.usefixtures("no_pictures")
def test_runs_are_paired_and_repeatable():
    runs = [compare(["ERM", "SAM"], seeds=1, epochs=1, sam_rho=0.0, output=Path(name)) for name in ("a", "b")]
    # SAM with radius 0 is ERM: same weights, batches and results.
    assert runs[0][0].class_recalls == runs[0][1].class_recalls == runs[1][0].class_recalls
    assert runs[0][0].curves["tail"] == runs[1][1].curves["tail"]


USER_METHODS = """
methods:
  plain:
    objective: ERM
  switched early, reweighted late:
    objective:
      class_path: SSESAM
      init_args: {head_rho: 0.01}
    loss:
      class_path: torch.nn.CrossEntropyLoss
      init_args: {reduction: none, label_smoothing: 0.1}
    backbone:
      class_path: SmallConvNet
      init_args: {width: 8}
    optimizer:
      class_path: torch.optim.AdamW
      init_args: {lr: 0.01}
    callbacks:
      - class_path: StageSwitch
        init_args: {epoch: 1}
    model: {step_options: {interval: 2}}
data:
  class_path: DigitsLT
  init_args: {imbalance_factor: 20}
model: {tta: hflip, many_above: 60}
trainer: {gradient_clip_val: 1.0}
tail_below: 20
epochs: 3
seeds: 1
jobs: 1
"""


@pytest.mark.usefixtures("no_pictures")
def test_methods_of_a_user_from_one_file(monkeypatch):
    seen = {}
    fit = Experiment.fit

    def spied(self, *args):
        seen[self.method] = trainer, model, data = fit(self, *args)
        return trainer, model, data

    monkeypatch.setattr(Experiment, "fit", spied)
    Path("mine.yaml").write_text(USER_METHODS)
    main(["compare", "--config=mine.yaml", "--output=mine"])
    assert list(seen) == ["plain", "switched early, reweighted late"]
    trainer, model, data = seen["switched early, reweighted late"]
    assert repr(model.objective) == "SSESAM(head_rho=0.01, tail_rho=0.1, first_stage='grouped')"
    assert model.objective.stage == 2
    assert [callback._switched_at for callback in trainer.callbacks if type(callback).__name__ == "StageSwitch"] == [
        trainer.num_training_batches
    ]
    assert (model.loss.label_smoothing, model.step_options.interval, model.tta) == (0.1, 2, "hflip")
    assert isinstance(trainer.optimizers[0], torch.optim.AdamW)
    assert trainer.gradient_clip_val == 1.0
    assert data.class_counts[-1] == 5
    assert model.split.tail.equal(torch.tensor(data.class_counts) < 20)
    assert seen["plain"][1].loss.label_smoothing == 0
    report = Path("mine/report.html").read_text()
    assert "switched early, reweighted late" in report
    assert "label_smoothing: 0.1" in report
    assert "classes with more than 60 training samples" in report


def test_a_class_takes_over_nothing_from_the_default(monkeypatch):
    chosen = ["--optimizer=AdamW", "--backbone=CIFARResNet", "--backbone.in_channels=1", "--methods=ERM"]
    Path("data.yaml").write_text("data: {class_path: DigitsLT, init_args: {seed: 3}}\noptimizer: torch.optim.Adagrad\n")
    Path("arguments.yaml").write_text("data: {init_args: {seed: 5}}\n")
    files = [["--config=data.yaml", "--methods=ERM", "--optimizer=Adagrad"], ["--config=arguments.yaml"]]
    commands = ([*chosen, "--data.seed=2"], *files, [])
    seen = planned_runs(monkeypatch, *(["--seeds=1", *options] for options in commands))
    first, second, third, default = (seen[number][0] for number in (0, 1, 2, -1))
    model = first.make_model(first.data())
    assert model.configure_optimizers()["optimizer"].param_groups[0]["initial_lr"] == 1e-3
    assert isinstance(model.backbone.features[1], torch.nn.BatchNorm2d)
    assert [e.data().seed for e in (first, second, third, default)] == [2, 3, 5, 0]
    assert second.optimizer(model.parameters()).param_groups[0]["lr"] == 0.01
    assert default.optimizer(model.parameters()).param_groups[0]["lr"] == 0.05


def test_settings_tell_runs_apart(monkeypatch):
    def fingerprint(**kwargs):
        settings = {"data": DigitsLT, "backbone": SmallConvNet, "objective": ERM, "optimizer": sgd, "epochs": 2}
        experiment = Experiment("name", **{**settings, **kwargs})
        return experiment.fingerprint(DigitsLT().split(tail_fraction=0.2))

    changes = [
        {},
        {"data": lambda: DigitsLT(seed=1)},
        {"data": lambda: DigitsLT(batch_size=16)},
        {"backbone": lambda num_classes: SmallConvNet(num_classes, width=8)},
        {"objective": lambda: SSESAM(head_rho=0.1)},
        {"objective": lambda: SSESAM(head_rho=0.2)},
        {"optimizer": lambda params: torch.optim.SGD(params, lr=0.2)},
        {"optimizer": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)},
        {"epochs": 3},
        {"gamma": 0.5},
        {"loss": lambda: torch.nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)},
        {"model": {"tail_below": 10}},
        {"model": {"step_options": {"interval": 2}}},
        {"model": {"step_options": {"interval": 3}}},
        {"model": {"tta": "hflip"}},
        {"trainer": {"gradient_clip_val": 1.0}},
        {"callbacks": [StochasticWeightAveraging(swa_lrs=0.1)]},
        {"callbacks": [StochasticWeightAveraging(swa_lrs=0.2)]},
        {"loss": lambda: torch.nn.CrossEntropyLoss(reduction="none", weight=torch.ones(10))},
        {"loss": lambda: torch.nn.CrossEntropyLoss(reduction="none", weight=torch.arange(10.0))},
    ]
    texts = [fingerprint(**change) for change in changes]
    assert len(set(texts)) == len(changes)
    assert texts == [fingerprint(**change) for change in changes]
    # Factories tell what the text of a network does not, but not where they lie in memory.
    quiet_nets = [partial(QuietNet, secret=secret) for secret in (1, 2)]
    assert len({fingerprint(backbone=net) for net in quiet_nets}) == 2
    factories = [lambda: DigitsLT() for _ in range(2)]
    assert len({fingerprint(data=factory) for factory in factories}) == 1
    monkeypatch.setattr("lightning_ssesam._version.__version__", "another")
    assert fingerprint() not in texts


class QuietNet(SmallConvNet):
    def __init__(self, num_classes, secret):
        super().__init__(num_classes)
        self.secret = secret


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def test_store_keeps_whole_runs_only(tmp_path):
    store = RunStore(tmp_path / "runs")
    runs = [made_up(name, seed, seed / 4) for name in ("A/B", "A-B", "ä") for seed in (1, 2)]
    runs[0].class_recalls[3] = math.nan
    for run in runs:
        store.save(run, "abc")
    for run in runs:
        assert json.dumps(vars(store.load(run.method, run.seed, "abc"))) == json.dumps(vars(run))
    assert store.load("A/B", 1, "other settings") is None
    assert store.load("A/B", 3, "abc") is None
    path = store._path("A/B", 1, "abc")
    path.write_text(path.read_text()[:-5])
    assert store.load("A/B", 1, "abc") is None
    path.write_text("{}")
    assert store.load("A/B", 1, "abc") is None


def test_what_is_cut_off_while_it_is_written_leaves_what_was_there(monkeypatch):
    store = RunStore(Path("runs"))
    runs = [made_up("ERM", 0, value) for value in (0.25, 0.5)]
    store.save(runs[0], "same")
    write_runs(runs[:1], Path("results.csv"))
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("cut off"))
    for write in (lambda: store.save(runs[1], "same"), lambda: write_runs(runs[1:], Path("results.csv"))):
        with pytest.raises(pytest.fail.Exception):
            write()
    assert store.load("ERM", 0, "same") == runs[0]
    assert rows_of("results.csv")[0]["all"] == "0.25"


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_leaves_the_finished_runs_and_says_so(error, monkeypatch, capsys):
    calls = []

    def interrupted(self, seed, *_):
        calls.append(self.method)
        if len(calls) == 2:
            raise error
        return made_up(self.method, seed)

    monkeypatch.setattr(Experiment, "run", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--seeds=1", "--output=crash", "--jobs=1"])
    assert stop.value.code == 130
    assert [row["method"] for row in rows_of("crash/results.csv")] == ["ERM"]
    assert not Path("crash/report.html").exists()
    printed = capsys.readouterr().out
    assert "Interrupted after 1 of 4 runs, which are in crash/runs" in printed
    assert "Test accuracy in % of one run\n" in printed
    main(["compare", "--seeds=1", "--output=crash", "--jobs=1"])
    assert calls == ["ERM", "SAM", "SAM", "ImbSAM", "SSESAM"]
    assert Path("crash/report.html").exists()


@pytest.mark.usefixtures("no_pictures")
def test_goes_on_after_a_kill_and_several_processes_make_the_same_runs():
    options = ["compare", "--seeds=2", "--epochs=3", "--methods=[ERM,ImbSAM,SSESAM]"]
    code = "from lightning_ssesam.experiments import progress; progress._BETWEEN_LINES = 0.0\n"
    code += f"from lightning_ssesam.cli import main; main({[*options, '--jobs=2', '--output=k']})"
    with Path("progress.txt").open("wb") as file:
        command = [sys.executable, "-c", code]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(list(Path("k/runs").glob("[!.]*.json") if Path("k/runs").exists() else [])) < 3:
        assert process.poll() is None, "ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    # The first process alone, which can tell the others nothing.
    process.kill()
    process.wait()
    wait_for(lambda: not running(process.pid), seconds=5)
    # The workers have told the first process how far they were.
    assert re.search(r"ERM, seed [01]: epoch [123]/3, best validation [\d.]+ %", Path("progress.txt").read_text())
    kept = {path: path.stat().st_mtime_ns for path in Path("k/runs").glob("[!.]*.json")}
    assert 3 <= len(kept) < 6
    main([*options, "--jobs=1", "--output=k"])
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(rows_of("k/results.csv")) == 6
    assert len({row["tail"] for row in rows_of("k/results.csv")}) > 1
    main([*options, "--jobs=1", "--output=one"])
    order = [[(row["method"], row["seed"]) for row in rows_of(f"{name}/results.csv")] for name in ("k", "one")]
    assert order[0] == order[1]
    for path in Path("k/runs").glob("[!.]*.json"):
        one, several = (json.loads(run.read_text()) for run in (Path("one/runs", path.name), path))
        unlike = {"seconds": 0, "interruptions": 0}
        assert one["run"] | unlike == several["run"] | unlike


class BrokenPool:
    """Its processes finish some of the tasks at hand, and are then lost."""

    def __init__(self, *finished):
        self.finished, self.asked = list(finished), []

    @contextmanager
    def __call__(self, jobs):
        number = self.finished.pop(0)
        self.asked.append([])

        def submit(task):
            self.asked[-1].append(task.seed)
            future = Future()
            if len(self.asked[-1]) <= number:
                future.set_result(made_up("ERM", task.seed))
            else:
                future.set_exception(BrokenProcessPool("killed"))
            return future

        yield Pool(submit, lambda: [Begun(f"ERM, seed {seed}") for seed in self.asked[-1][: number + 1]])


def test_a_training_whose_process_is_lost_goes_on_in_another(monkeypatch, capsys):
    tasks = [Task(Experiment("ERM", ERM), "", seed) for seed in range(5)]
    monkeypatch.setattr("lightning_ssesam.experiments.jobs._processes", pool := BrokenPool(1, 0, 1, 0, 9))
    made = list(make_runs(tasks, 2))
    assert pool.asked == [[0, 1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [2, 3, 4], [2, 3, 4]]
    # Each of them was begun once more than it was lost.
    assert sorted((run.seed, run.interruptions) for run in made) == [(0, 0), (1, 2), (2, 2), (3, 0), (4, 0)]
    assert capsys.readouterr().out.count("goes on in others") == 4


def test_processes_that_are_lost_again_and_again_are_not_waited_for(monkeypatch, capsys):
    monkeypatch.setattr("lightning_ssesam.experiments.jobs._processes", pool := BrokenPool(1, 0, 0, 9))
    with pytest.raises(WorkersLostError, match="was ended from outside, 3 times in a row"):
        compare("ERM", seeds=3, epochs=3, jobs=2)
    assert len(pool.asked) == 3
    assert "Interrupted after 1 of 3 runs" in capsys.readouterr().out


def test_what_cannot_be_built_replaces_nothing():
    Path("comparison").mkdir()
    Path("comparison/results.csv").write_text("earlier")
    for wrong in ("--backbone.width=9", "--optimizer.lr=-1"):
        with pytest.raises((SystemExit, ValueError, TypeError)):
            main(["compare", wrong])
    assert Path("comparison/results.csv").read_text() == "earlier"


def test_divergence_is_reported(capsys):
    compare("ERM", seeds=1, epochs=2, optimizer=lambda params: torch.optim.SGD(params, lr=1e20))
    assert "Diverged, with a loss that is not finite: ERM with seed 0" in capsys.readouterr().out
    assert "Diverged, with a loss that is not finite: ERM with seed 0" in Path("comparison/report.html").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_a_training_may_stop_early_and_validate_now_and_then():
    (run,) = compare("ERM", seeds=1, epochs=5, trainer={"max_steps": 27, "check_val_every_n_epoch": 2})
    seen = [not math.isnan(value) for value in run.curves["all"]]
    assert seen == [False, True, True, False, False]
    assert run.best["all"] == run.curves["all"][1]
    assert Path("comparison/report.html").exists()


def test_a_class_of_nobody_leaves_a_group_empty(monkeypatch):
    """As where no class is few-shot: the group is NaN in every run."""
    monkeypatch.setattr(Experiment, "run", lambda self, seed, *_: with_few(made_up(self.method, seed), math.nan))
    compare(["ERM", "SAM"], seeds=2, epochs=3)
    assert [row["few"] for row in rows_of("comparison/results.csv")] == ["nan"] * 4
    few = [row for row in rows_of("comparison/summary.csv") if row["group"] == "few"]
    assert [(row["mean"], row["std"], row["difference"]) for row in few] == [("", "", "")] * 2
    assert "| 50.0 ± 0.0 | nan | 50.0 ± 0.0 |" in Path("comparison/table.md").read_text()
    assert "<td>nan</td>" in Path("comparison/report.html").read_text()


def with_few(run, value):
    run.accuracy["few"] = run.best["few"] = value
    return run


@pytest.mark.usefixtures("no_pictures")
def test_a_switch_among_the_callbacks_is_not_shown_at_gamma(monkeypatch):
    monkeypatch.setattr(Experiment, "run", lambda self, seed, *_: made_up(self.method, seed))
    compare({"own": Method(SSESAM, callbacks=[StageSwitch(epoch=1)])}, seeds=1, epochs=3)
    assert "3 epochs</dd>" in Path("comparison/report.html").read_text()
    compare({"plain": Method(ERM), "switched": Method(SSESAM)}, seeds=1, epochs=3, gamma=0.6)
    assert "3 epochs, stage 2 after 60 % of them</dd>" in Path("comparison/report.html").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_methods_with_spaces_between_and_data_that_is_prepared_once(monkeypatch):
    prepared = []
    monkeypatch.setattr(DigitsLT, "prepare_data", lambda self: prepared.append(self.seed))
    monkeypatch.setattr(Experiment, "run", lambda self, seed, *_: made_up(self.method, seed))
    assert [run.method for run in compare("ERM, SAM", seeds=1, epochs=3)] == ["ERM", "SAM"]
    compare({"one": Method(ERM), "other": Method(ERM, data=lambda: DigitsLT(seed=7))}, seeds=1, epochs=3)
    assert prepared == [0, 0, 7]


def test_workers_share_the_gpus(monkeypatch, tmp_path):
    """Three trainings at a time on two GPUs. Whichever ends leaves its place to the next."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with ExitStack() as first, ExitStack() as second:
        assert [first.enter_context(free_gpu()), second.enter_context(free_gpu())] == [0, 1]
        with free_gpu() as third:
            assert third == 0
        second.close()
        with free_gpu() as third, free_gpu() as fourth:
            assert (third, fourth) == (1, 0)
    with free_gpu() as gpu:
        assert gpu == 0
    # A process that sees one of the two, by another number.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert [path.name for path in tmp_path.glob("*/gpu-1-0*")] == ["gpu-1-0.lock"]
    with free_gpu() as gpu:
        assert gpu == 0
        assert not (tmp_path / "gpu-0-1.lock").exists()


def test_an_experiment_copies_callbacks_and_takes_the_thresholds_of_its_data():
    data = partial(DigitsLT, imbalance_factor=20)
    experiment = Experiment("name", SSESAM, data=data, optimizer=sgd, epochs=7, callbacks=[StageSwitch(epoch=1)])
    model = experiment.make_model(data())
    (callback,) = experiment.make_callbacks(model)
    assert callback.epoch == 1
    assert callback is not experiment.callbacks[0]
    assert (model.split.many_above, model.split.few_below) == (data().many_above, data().few_below) == (50, 10)
    assert model.configure_optimizers()["lr_scheduler"]["scheduler"].T_max == 7


def test_plan(monkeypatch):
    options = ["--seeds=2", "--sam_rho=0.1", "--imbsam_rho=0.2", "--head_rho=0.3", "--tail_rho=0.4"]
    Path("own.yaml").write_text(
        "methods: {own: {objective: ERM, model: {step_options: {interval: 3}}}}\n"
        "model: {step_options: {interval: 2, passes: full}, tta: hflip}\n"
    )
    seen = planned_runs(monkeypatch, options, ["--config=own.yaml", "--seeds=1"])
    methods = ("ERM", "SAM", "ImbSAM", "SSESAM")
    assert [(task.experiment.method, task.seed) for task in seen[:8]] == [
        (method, seed) for seed in (0, 1) for method in methods
    ]
    objectives = [experiment.objective() for experiment, *_ in seen[:4]]
    assert (objectives[1].rho, objectives[2].rho) == (0.1, 0.2)
    assert (objectives[3].head_rho, objectives[3].tail_rho) == (0.3, 0.4)
    model = seen[8][0].make_model(DigitsLT())
    assert model.step_options == StepOptions(interval=3, passes="full")
    assert model.tta == "hflip"


@pytest.mark.usefixtures("no_pictures")
def test_seeds_differ():
    first, second = compare("ERM", seeds=2, epochs=1)
    assert first.class_recalls != second.class_recalls


def test_one_training_takes_one_gpu(monkeypatch):
    monkeypatch.setattr("lightning.pytorch.accelerators.CPUAccelerator.auto_device_count", staticmethod(lambda: 4))
    experiment = Experiment("name", ERM, optimizer=sgd, epochs=1, trainer={"accelerator": "cpu"})
    assert experiment.make_trainer([]).num_devices == 1


def test_a_worker_with_a_gpu_trains_on_the_cpu_if_told_so():
    experiment = Experiment("name", ERM, optimizer=sgd, epochs=1, trainer={"accelerator": "cpu"})
    assert experiment.make_trainer([], device=3).num_devices == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods=[SGD]"], f"`methods` to be some of {', '.join(METHODS)}, each once, but got ['SGD']"),
        (["--methods=[]"], "`methods` to be some of"),
        (["--methods=[ERM, ERM]"], "`methods` to be some of"),
        (["--seeds=0"], "`seeds` to be an integer from 1 to 10000, but got 0"),
        (["--epochs=0"], "`epochs` to be an integer >= 1, but got 0"),
        (["--threads=0"], "`threads` to be an integer >= 1, but got 0"),
        (["--jobs=0"], "`jobs` to be an integer from 1 to 10000, but got 0"),
        (["--gamma=1"], "`gamma` to be a number strictly between 0 and 1, but got 1.0"),
        (["--sam_rho=-1"], "`sam_rho` to be a finite number >= 0, but got -1.0"),
        (["--data.imbalance_factor=1000"], "`imbalance_factor` to be at most max_count = 100"),
        (["--tail_fraction=2"], "`tail_fraction` to be a number strictly between 0 and 1"),
        (
            ["--output=file/here"],
            "`output` to be a folder that can be made (Not a directory), but got 'file/here'.",
        ),
        (["--tail_fraction=0.001"], "`split` to be a ClassSplit with both head and tail classes"),
        (["--model={nonsense: 1}"], "`model` to be arguments of LongTailClassifier, except those set elsewhere"),
        (
            ["--trainer={precison: 16, max_epochs: 3}"],
            "`trainer` to be arguments of Trainer, except those set elsewhere (callbacks, max_epochs),"
            " but got 'max_epochs', 'precison'",
        ),
        (["--trainer={devices: 2}"], "`trainer` to be settings with a single device (`jobs` makes several"),
        (
            ['--model={"step_options": {"intervall": 2, "pases": 1}}'],
            "`step_options` to be any of passes, batch_norm_statistics, interval, reuse, processes, on_nonfinite,"
            " log_sharpness, exact_resume, log_loss, cuda_graphs, but got 'intervall', 'pases'.",
        ),
        (["--model={step_options: {interval: 0}}"], "`interval` to be an integer >= 1, but got 0."),
        (["--model={step_options: split}"], "`step_options` to be a StepOptions"),
        (["--config=own.yaml"], "`interval` to be an integer >= 1, but got 'two'."),
    ],
)
def test_refuses_before_it_trains(arguments, message, monkeypatch):
    monkeypatch.setattr(Experiment, "run", lambda *args: pytest.fail("trained"))
    Path("file").touch()
    Path("own.yaml").write_text("methods: {own: {objective: ERM, model: {step_options: {interval: two}}}}")
    with pytest.raises(SystemExit) as stop:
        main(["compare", *arguments])
    # What is wrong with one method names it.
    method = "The method 'own': " if any("own.yaml" in argument for argument in arguments) else ""
    assert str(stop.value).startswith(f"error: {method}Expected argument {message}")
    assert not Path("comparison").exists()


def test_methods_must_share_their_classes():
    methods = {"one": Method(ERM), "other": Method(ERM, data=lambda: DigitsLT(imbalance_factor=10))}
    with pytest.raises(ValueError, match="same training samples per class, but got other class counts for 'other'"):
        compare(methods)
    with pytest.raises(
        ValueError, match=r"`methods` to be .* same groups .* but got few_below, tail_below for 'other'"
    ):
        compare({"one": Method(ERM), "other": Method(ERM, model={"tail_below": 9, "tta": "hflip", "few_below": 3})})


class TestTables:
    RUNS = tuple(
        made_up(method, seed, value + gain * seed)
        for method, value, gain in (("ERM", 0.5, 0.1), ("SSESAM", 0.7, 0.11), ("worse", 0.4, 0.1))
        for seed in (0, 1, 2)
    )

    def test_text(self):
        lines = format_table(self.RUNS).splitlines()
        assert lines[1].split() == list(GROUPS)
        assert lines[2].split()[:4] == ["ERM", "60.0", "±", "10.0"]
        assert lines[3].split()[:4] == ["SSESAM", "81.0", "±", "11.0"]
        # Differences 20, 21, 22: standard error 1 / sqrt(3), t = 4.3027 with two degrees of freedom.
        assert lines[8].split()[:4] == ["SSESAM", "+21.0", "±", "2.5*"]
        assert "±" not in format_table(self.RUNS[:1])
        assert "Difference" not in format_table(self.RUNS[:3])

    def test_markdown(self):
        lines = markdown_table(self.RUNS).splitlines()
        assert {line.count("|") for line in lines if line.startswith("|")} == {11}
        assert "| 81.0 ± 11.0 | +21.0 ± 2.5* | +21.0 ± 2.5* |" in lines[5]
        assert markdown_table([made_up("a|b", 0)]).splitlines()[4].count("|") == 11

    def test_differences_are_paired(self):
        assert differences(self.RUNS)["SSESAM"]["tail"].mean == pytest.approx(21)
        assert differences(self.RUNS)["worse"]["all"].margin == pytest.approx(0, abs=1e-12)
        # Only seeds that both have count, whatever their order.
        difference = paired_difference({2: 5.0, 1: 3.0, 7: 100.0}, {1: 1.0, 2: 1.0, 9: -50.0})
        assert difference.mean == 3
        assert difference.margin == pytest.approx(12.706 * 1, rel=1e-4)
        assert not difference.is_significant
        assert paired_difference({0: 2.0}, {0: 1.5}).mean == 0.5
        assert math.isnan(paired_difference({0: 2.0}, {0: 1.5}).margin)
        assert math.isnan(paired_difference({0: 2.0}, {1: 1.5}).mean)

    def test_summary(self):
        write_summary(self.RUNS, Path("summary.csv"))
        first, second = (row for row in rows_of("summary.csv") if row["group"] == "tail" and row["method"] != "worse")
        numbers = ("mean", "std", "difference", "margin_95")
        assert [first[name] for name in numbers] == ["0.6", "0.1", "", ""]
        assert [second[name] for name in numbers] == ["0.81", "0.11", "0.21", "0.024841"]

    @pytest.mark.usefixtures("no_pictures")
    def test_best_is_not_the_last(self):
        run = made_up("ERM", 0, 0.5)
        run.best = dict.fromkeys(GROUPS, 0.75)
        write_runs([run], Path("results.csv"))
        (row,) = rows_of("results.csv")
        assert (row["tail"], row["best_tail"]) == ("0.5", "0.75")
        write_summary([run], Path("summary.csv"))
        assert {row["mean"] for row in rows_of("summary.csv")} == {"0.5"}
        assert markdown_table([run]).splitlines()[4].split("|")[7:9] == [" 50.0 ", " 75.0 "]
        text = report_of([run], SPLIT).read_text()
        last, best, each = (
            text.partition(f'id="{name}"')[2].partition("</table>")[0] for name in ("last", "best", "runs")
        )
        assert (last.count("<td>50.0</td>"), best.count("<td>75.0</td>"), each.count("<td>50.0</td>")) == (6, 6, 6)

    @pytest.mark.usefixtures("no_pictures")
    def test_report_colours_what_is_significant(self):
        text = report_of(self.RUNS, SPLIT).read_text()
        assert text.count('<td class="good">+21.0 ± 2.5*</td>') == 6
        # The same difference for every seed: no star, and no colour.
        assert text.count("<td>-10.0 ± 0.0 (no spread)</td>") == 6
        worse = [made_up("ERM", seed, 0.5 + seed / 100) for seed in range(3)]
        worse += [made_up("worse", seed, 0.4 + seed / 200) for seed in range(3)]
        assert report_of(worse, SPLIT).read_text().count('<td class="bad">-10.5 ± 1.2*</td>') == 6
        unsure = [made_up("a", 0, 0.5), made_up("a", 1, 0.5), made_up("b", 0, 0.6), made_up("b", 1, 0.5)]
        assert "<td>+5.0 ± 63.5</td>" in report_of(unsure, SPLIT).read_text()

    def test_facts(self):
        runs = [made_up("ERM", 0, seconds=90.0, device="chip"), made_up("ERM", 1, seconds=60.0, device="chip")]
        text = report_of(runs, ClassSplit([500, 120, 60, 8], tail=[2, 3])).read_text()
        assert "688 of 4 classes, 500 of the largest and 8 of the smallest" in text
        assert "<dd>2 classes with 68 samples</dd>" in text
        assert "2 classes with more than 100 training samples, 1 between, 1 with fewer than 20" in text
        assert "2.5 minutes of training" in text
        assert re.search(r"Python [\d.]+, on chip</dd>", text)
        assert "on the validation set over the epochs" in text

    def test_the_report_names_the_set_that_validates(self, monkeypatch):
        monkeypatch.setattr(DigitsLT, "val_is_test", True)
        text = report_of(self.RUNS, SPLIT, None).read_text()
        assert "on the test set over the epochs" in text
        assert "`best epoch`: on the test set" in Path("table.md").read_text()
        assert "switch to stage 2" not in text
        assert "switch to stage 2" in report_of(self.RUNS, SPLIT).read_text()

    def test_interval_holds_its_promise(self):
        generator = np.random.default_rng(0)
        hits = 0
        for _ in range(2000):
            values, others = generator.normal(1.0, 1.0, 5), generator.normal(0.0, 1.0, 5)
            difference = paired_difference(dict(enumerate(values)), dict(enumerate(others)))
            hits += abs(difference.mean - 1) <= difference.margin
        assert hits / 2000 == pytest.approx(0.95, abs=0.015)


class _Page(HTMLParser):
    """Collects what a page would fetch."""

    def __init__(self):
        super().__init__()
        self.sources = []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def comparison_of(runs, split, gamma=0.5, epochs=3):
    data = DigitsLT()
    data.class_counts = split.class_counts.tolist()
    return Comparison(runs, split, data, epochs, gamma, "epochs: 3\nname: <b>&")


def report_of(*args):
    return write_report(comparison_of(*args), Path())[0]


SPLIT = DigitsLT().split(tail_fraction=0.2)


def test_report_holds_all_that_it_shows():
    runs = [made_up(name, seed, (seed + 1) / 4) for name in ("ERM", "<script>x</script>") for seed in (0, 1)]
    text = report_of(runs, SPLIT).read_text()
    page = _Page()
    page.feed(text)
    assert len(page.sources) == len(FIGURES)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "url(" not in text
    assert "@import" not in text
    assert "<script>" not in text
    assert "name: &lt;b&gt;&amp;" in text
    assert "37.5 ± 17.7" in text


def test_a_new_figure_is_one_entry(monkeypatch):
    new = Figure("new", draw_confusion, lambda comparison: f"Text on {comparison.name}.", is_small=True)
    monkeypatch.setattr("lightning_ssesam.experiments.report.FIGURES", (*FIGURES, new))
    written = write_report(comparison_of([made_up("ERM", 0)], SPLIT), Path())
    assert Path("new.png") in written
    assert Path("new.png").read_bytes() == Path("confusion.png").read_bytes()
    *_, last = re.findall('<img( class="small")? .*?<figcaption>(.*?)</figcaption>', written[0].read_text())
    assert last == (' class="small"', "Text on DigitsLT.")


def test_names_are_no_formulas_and_stay_in_the_legend(monkeypatch):
    monkeypatch.setattr(DigitsLT, "val_is_test", True)
    comparison = comparison_of([made_up(name, 0) for name in (r"$\no$", "_own")], SPLIT)
    figures = [draw_comparison(comparison), draw_trade_off(comparison)]
    for figure in figures:
        figure.draw_without_rendering()
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert labels[-2:] == [r"\$\no\$", "\u200b_own"]
    assert figures[0].axes[1].get_title() == "Head classes (test)"


def test_pictures_show_the_numbers():
    runs = [made_up("ERM", 0), made_up("ERM", 1)]
    for run, value in zip(runs, (0.2, 0.4), strict=True):
        run.class_recalls = [0.1, value, 0.3]
        run.accuracy |= {"head": 0.6, "tail": value}
        run.curves |= {"head": [0.5, 0.6], "tail": [0.1, value]}
        run.confusion = dict(zip(CONFUSIONS, (0.15, 0.25, 0.5, 0.2), strict=True))
    comparison = comparison_of(runs, ClassSplit([50, 500, 5], tail=[2]), 0.75, 2)
    figures = [draw(comparison) for draw in (draw_comparison, draw_trade_off, draw_confusion)]
    (per_class, head, tail), (trade_off,), confusion = (figure.axes for figure in figures)
    # By rank; the deviation of 20 and 40 is sqrt(200).
    assert per_class.lines[0].get_ydata() == pytest.approx([30, 10, 30])
    (bar, *_), *_ = per_class.containers[0].lines[2][0].get_segments()
    assert abs(bar[1] - 30) == pytest.approx(200**0.5)
    assert head.lines[0].get_ydata() == pytest.approx([50, 60])
    assert tail.lines[0].get_ydata() == pytest.approx([10, 30])
    # The switch after three quarters of two epochs.
    assert list(tail.lines[1].get_xdata()) == [1.5, 1.5]
    assert trade_off.collections[1].get_offsets().tolist() == [pytest.approx([60, 30])]
    widths = [[bars[0].get_width() for bars in ax.containers] for ax in confusion]
    assert widths == [pytest.approx([60, 15, 25]), pytest.approx([30, 50, 20])]


@NEEDS_BROWSER
def test_report_in_a_browser():
    names = ["ERM", "SSE-SAM with a name that does not fit", *(f"method {k}" for k in range(8))]
    runs = [made_up(name, seed, (seed + 1) / 4) for name in names for seed in (0, 1)]
    report = report_of(runs, SPLIT).resolve()
    with open_browser(Path("profile").resolve()) as browser:
        for width, dark in itertools.product((1280, 390), (False, True)):
            look_at_report(browser, report, width, dark)


def look_at_report(browser, report, width, dark):
    show_as(browser, width, dark)
    browser.get(report.as_uri())
    assert browser.title == "DigitsLT: comparison of 10 methods"
    assert browser.execute_script("return innerWidth") == width
    # Wide tables scroll within themselves; the page does not.
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return [...document.images].every(i => i.complete && i.naturalWidth > 600)")
    for table in ("last", "differences", "best"):
        rows = browser.execute_script(f"return document.querySelectorAll('#{table} tbody tr').length")
        assert rows == (9 if table == "differences" else 10)
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return document.querySelector('#runs').offsetHeight") > 300
    ground, text = colors_in(browser)
    assert (ground < 150) == dark
    assert abs(ground - text) > 450
    assert not errors_in(browser)


@pytest.mark.parametrize("classes", [2, 100, 10_000])
def test_pictures_of_any_number_of_classes_methods_and_epochs(classes):
    counts = np.maximum(1, (500 * 0.01 ** (np.arange(classes) / (classes - 1))).astype(int))
    split = ClassSplit.from_counts(torch.from_numpy(counts), tail_below=100)
    runs = [made_up(f"method {k}", 0, k / 11, classes=classes, epochs=1) for k in range(11)]
    for run in runs:
        run.class_recalls[-1] = math.nan  # absent from the test set
    assert report_of(runs, split, None, 1).stat().st_size < 2_000_000
    assert all(Path(f"{figure.name}.png").stat().st_size > 10_000 for figure in FIGURES)
