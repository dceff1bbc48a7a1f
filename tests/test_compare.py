"""Several methods side by side: the runs, what is kept of them, tables, pictures, the report."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import NEEDS_BROWSER, STRICT, colors_in, errors_in, open_browser, planned_runs, show_as

from lightning_ssesam import ERM, SSESAM, ClassSplit, DigitsLT
from lightning_ssesam.cli import main
from lightning_ssesam.compare import Method, compare
from lightning_ssesam.figures import draw_comparison, draw_confusion, draw_trade_off
from lightning_ssesam.models import SmallConvNet
from lightning_ssesam.report import Comparison, write_report
from lightning_ssesam.runs import CONFUSIONS, GROUPS, Experiment, Run, RunStore
from lightning_ssesam.tables import differences, format_table, markdown_table, paired_difference

pytestmark = STRICT

WRITTEN = {"report.html", "results.csv", "summary.csv", "table.md", "comparison.png", "trade_off.png", "confusion.png"}


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
    return Run(method, seed, groups, dict(groups), [value] * classes, confusion, curves, **kwargs)


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
    assert WRITTEN | {"runs"} == {path.name for path in Path("out/here").iterdir()}
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


def test_runs_are_paired_and_repeatable():
    runs = [compare(["ERM", "SAM"], seeds=1, epochs=1, sam_rho=0.0, output=Path(name)) for name in ("a", "b")]
    # SAM with radius 0 is ERM: same weights, batches and results.
    assert runs[0][0].class_recalls == runs[0][1].class_recalls == runs[1][0].class_recalls
    assert runs[0][0].curves["tail"] == runs[1][1].curves["tail"]


METHODS_OF_ONES_OWN = """
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
    model: {interval: 2}
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


def test_methods_of_ones_own_from_one_file(monkeypatch):
    seen = {}
    fit = Experiment.fit

    def spied(self, *args):
        seen[self.method] = trainer, model, data = fit(self, *args)
        return trainer, model, data

    monkeypatch.setattr(Experiment, "fit", spied)
    Path("mine.yaml").write_text(METHODS_OF_ONES_OWN)
    main(["compare", "--config=mine.yaml", "--output=mine"])
    assert list(seen) == ["plain", "switched early, reweighted late"]
    trainer, model, data = seen["switched early, reweighted late"]
    assert repr(model.objective) == "SSESAM(head_rho=0.01, tail_rho=0.1, first_stage='grouped')"
    assert model.objective.stage == 2
    assert [callback._switched_at for callback in trainer.callbacks if type(callback).__name__ == "StageSwitch"] == [
        trainer.num_training_batches
    ]
    assert (model.loss.label_smoothing, model.interval, model.tta) == (0.1, 2, "hflip")
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
    commands = ([*chosen, "--data.seed=2"], ["--config=data.yaml", "--methods=ERM", "--optimizer=Adagrad"], [])
    seen = planned_runs(monkeypatch, *(["--seeds=1", *options] for options in commands))
    first, second, default = (experiment for experiment, _, _ in seen[:3])
    model = first.make_model(first.data())
    assert model.configure_optimizers()["optimizer"].param_groups[0]["initial_lr"] == 1e-3
    assert isinstance(model.backbone.features[1], torch.nn.BatchNorm2d)
    assert (first.data().seed, second.data().seed, default.data().seed) == (2, 3, 0)
    assert second.optimizer(model.parameters()).param_groups[0]["lr"] == 0.01
    assert default.optimizer(model.parameters()).param_groups[0]["lr"] == 0.05


def test_settings_tell_runs_apart():
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
        {"model": {"interval": 2}},
        {"model": {"tta": "hflip"}},
        {"trainer": {"gradient_clip_val": 1.0}},
    ]
    texts = [fingerprint(**change) for change in changes]
    assert len(set(texts)) == len(changes)
    assert texts == [fingerprint(**change) for change in changes]


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def test_store_keeps_whole_runs_only(tmp_path):
    store = RunStore(tmp_path / "runs")
    runs = [made_up(name, seed, seed / 4) for name in ("A/B", "A-B", "ä") for seed in (1, 2)]
    runs[0].class_recalls[3] = math.nan
    for run in runs:
        store.save(run, run.method)
    for run in runs:
        assert json.dumps(vars(store.load(run.method, run.seed, run.method))) == json.dumps(vars(run))
    assert store.load("A/B", 1, "other settings") is None
    assert store.load("A/B", 3, "A/B") is None
    path = store._path("A/B", 1)
    path.write_text(path.read_text()[:-5])
    assert store.load("A/B", 1, "A/B") is None
    path.write_text("{}")
    assert store.load("A/B", 1, "A/B") is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_leaves_the_finished_runs_and_says_so(error, monkeypatch, capsys):
    calls = []

    def interrupted(self, seed, device=None):
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
    assert "over 1 seed\n" in printed
    main(["compare", "--seeds=1", "--output=crash", "--jobs=1"])
    assert calls == ["ERM", "SAM", "SAM", "ImbSAM", "SSESAM"]
    assert Path("crash/report.html").exists()


def test_goes_on_after_a_kill_and_several_processes_make_the_same_runs():
    options = ["compare", "--seeds=2", "--epochs=3", "--methods=[ERM,ImbSAM,SSESAM]"]
    command = [sys.executable, "-m", "lightning_ssesam", *options, "--jobs=2", "--output=k"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(list(Path("k/runs").glob("*.json") if Path("k/runs").exists() else [])) < 3:
        assert process.poll() is None, "ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in Path("k/runs").glob("*.json")}
    assert 3 <= len(kept) < 6
    main([*options, "--jobs=2", "--output=k"])
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(rows_of("k/results.csv")) == 6
    assert len({row["tail"] for row in rows_of("k/results.csv")}) > 1
    main([*options, "--jobs=1", "--output=one"])
    order = [[(row["method"], row["seed"]) for row in rows_of(f"{name}/results.csv")] for name in ("k", "one")]
    assert order[0] == order[1]
    for path in Path("k/runs").glob("*.json"):
        one, several = (json.loads(run.read_text()) for run in (Path("one/runs", path.name), path))
        assert one["run"] | {"seconds": 0} == several["run"] | {"seconds": 0}


def test_a_process_that_dies_is_not_waited_for(capsys):
    with pytest.raises(BrokenProcessPool, match="terminated abruptly"):
        compare(["ERM", "SAM"], seeds=1, epochs=1, jobs=2, backbone=DeadlyNet(os.getpid()), output=Path("dead"))
    assert "Interrupted after 0 of 2 runs" in capsys.readouterr().out


class DeadlyNet:
    """Kills every process that builds it but one."""

    def __init__(self, survivor):
        self.survivor = survivor

    def __call__(self, num_classes):
        if os.getpid() != self.survivor:
            os.kill(os.getpid(), signal.SIGKILL)
        return SmallConvNet(num_classes)


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


def test_a_training_may_stop_early_and_validate_now_and_then():
    (run,) = compare("ERM", seeds=1, epochs=5, trainer={"max_steps": 27, "check_val_every_n_epoch": 2})
    seen = [not math.isnan(value) for value in run.curves["all"]]
    assert seen == [False, True, True, False, False]
    assert run.best["all"] == run.curves["all"][1]
    assert Path("comparison/report.html").exists()


def test_a_worker_with_a_gpu_trains_on_the_cpu_if_told_so():
    experiment = Experiment("name", DigitsLT, SmallConvNet, ERM, sgd, epochs=1, trainer={"accelerator": "cpu"})
    assert experiment.make_trainer([], device=3).num_devices == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods=[SGD]"], "`methods` to be some of ERM, SAM, ImbSAM, SSESAM, each once, but got ['SGD']"),
        (["--methods=[]"], "`methods` to be some of"),
        (["--methods=[ERM, ERM]"], "`methods` to be some of"),
        (["--seeds=0"], "`seeds` to be an integer >= 1, but got 0"),
        (["--epochs=0"], "`epochs` to be an integer >= 1, but got 0"),
        (["--threads=0"], "`threads` to be an integer >= 1, but got 0"),
        (["--jobs=0"], "`jobs` to be an integer >= 1, but got 0"),
        (["--gamma=1"], "`gamma` to be a number strictly between 0 and 1, but got 1.0"),
        (["--sam_rho=-1"], "`sam_rho` to be a finite number >= 0, but got -1.0"),
        (["--data.imbalance_factor=1000"], "`imbalance_factor` to be at most max_count = 100"),
        (["--tail_fraction=2"], "`tail_fraction` to be a number strictly between 0 and 1"),
        (
            ["--output=file/here"],
            "`output` to be a folder that can be made (Not a directory), but got 'file/here/",
        ),
        (["--tail_fraction=0.001"], "`split` to be a ClassSplit with both head and tail classes"),
        (["--model={nonsense: 1}"], "`model` to be arguments of LongTailClassifier, but for those set elsewhere"),
        (
            ["--trainer={precison: 16, max_epochs: 3}"],
            "`trainer` to be arguments of Trainer, but for those set elsewhere (callbacks, max_epochs),"
            " but got 'max_epochs', 'precison'",
        ),
    ],
)
def test_refuses_before_it_trains(arguments, message, monkeypatch):
    monkeypatch.setattr(Experiment, "run", lambda *args: pytest.fail("trained"))
    Path("file").touch()
    with pytest.raises(SystemExit) as stop:
        main(["compare", *arguments])
    assert str(stop.value).startswith(f"error: Expected argument {message}")
    assert not Path("comparison").exists()


def test_methods_must_share_their_classes():
    methods = {"one": Method(ERM), "other": Method(ERM, data=lambda: DigitsLT(imbalance_factor=10))}
    with pytest.raises(ValueError, match="same training samples per class, but got other class counts for 'other'"):
        compare(methods)


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


def report_of(runs, split, gamma=0.5, epochs=3):
    data = DigitsLT()
    data.class_counts = split.class_counts.tolist()
    return write_report(Comparison(runs, split, data, epochs, gamma, "epochs: 3\nname: <b>&"), Path())[0]


SPLIT = DigitsLT().split(tail_fraction=0.2)


def test_report_holds_all_that_it_shows():
    runs = [made_up(name, seed, (seed + 1) / 4) for name in ("ERM", "<script>x</script>") for seed in (0, 1)]
    text = report_of(runs, SPLIT).read_text()
    page = _Page()
    page.feed(text)
    assert len(page.sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "url(" not in text
    assert "@import" not in text
    assert "<script>" not in text
    assert "name: &lt;b&gt;&amp;" in text
    assert "37.5 ± 17.7" in text


@NEEDS_BROWSER
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_report_in_a_browser(width, dark):
    names = ["ERM", "SSE-SAM with a name that does not fit", *(f"method {k}" for k in range(8))]
    runs = [made_up(name, seed, (seed + 1) / 4) for name in names for seed in (0, 1)]
    report = report_of(runs, SPLIT).resolve()
    with open_browser(Path("profile").resolve(), *(["force-dark-mode"] if dark else [])) as browser:
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
    draw_comparison(runs, split, None, "title", Path("a.png"))
    draw_trade_off(runs, "title", Path("b.png"))
    draw_confusion(runs, Path("c.png"))
    assert all(Path(f"{name}.png").stat().st_size > 10_000 for name in "abc")
    assert report_of(runs, split, None, 1).stat().st_size < 2_000_000
