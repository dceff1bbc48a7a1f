"""The files of a comparison: runs, weights and tables; two commands in one folder, and what a killed one leaves."""

import csv
import errno
import json
import multiprocessing
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from helpers import STRICT, start_process, wait_for
from test_compare import made_up, rows_of

from lightning_ssesam import ERM, SAM, DigitsLT
from lightning_ssesam.cli import main
from lightning_ssesam.compare import Method, compare
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.files import locked, make_folder, replaced, write_text
from lightning_ssesam.experiments.methods import _check_method_name
from lightning_ssesam.experiments.origin import origin, tail_rule
from lightning_ssesam.experiments.recipe import Recipe
from lightning_ssesam.experiments.refusals import without_traceback
from lightning_ssesam.experiments.report import write_report
from lightning_ssesam.experiments.runs import Comparison, file_stem
from lightning_ssesam.experiments.tables import write_csv
from lightning_ssesam.experiments.weights import WeightStore
from lightning_ssesam.models import SmallConvNet
from lightning_ssesam.runs import Experiment, RunStore

pytestmark = STRICT


@pytest.fixture(autouse=True)
def _own_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-ssesam"])


REPORT = "lightning_ssesam.experiments.compare.write_report"


@pytest.fixture
def made(monkeypatch):
    """The runs that were made: what is trained is left out."""
    runs = []

    def run(self, seed, *_):
        runs.append((self.method, seed, self.epochs))
        return made_up(self.method, seed, epochs=self.epochs)

    monkeypatch.setattr(Experiment, "run", run)
    monkeypatch.setattr(REPORT, lambda *_: [])
    return runs


def test_runs_of_other_settings_stay_beside(made):
    for epochs, number in ((3, 2), (4, 4), (3, 4), (4, 4)):
        compare("ERM,SAM", seeds=1, epochs=epochs)
        assert len(made) == number
    names = sorted(path.name for path in Path("comparison/runs").iterdir())
    assert len(names) == 4
    assert all(re.fullmatch(r"(ERM|SAM)-[0-9a-f]{8}-0-[0-9a-f]{12}\.json", name) for name in names)


def test_fresh_makes_runs_anew_and_keeps_the_earlier_ones(made):
    compare("ERM,SAM", seeds=1, epochs=3)
    compare("ERM", seeds=1, epochs=4)
    earlier = {path.name: path.read_text() for path in Path("comparison/runs").iterdir()}
    for number in (1, 2):
        compare("ERM,SAM", seeds=1, epochs=3, fresh=True)
        assert len(made) == 3 + 2 * number
    assert {path.name for path in Path("comparison/runs").iterdir()} == {*earlier, "earlier"}
    kept = sorted(path.name for path in Path("comparison/runs/earlier").iterdir())
    assert [re.sub("-[0-9a-f]{12}-", "-", name[13:]) for name in kept] == ["0-1.json", "0-2.json"] * 2
    assert Path("comparison/runs/earlier", kept[0]).read_text() in earlier.values()
    compare("ERM,SAM", seeds=1, epochs=3)
    assert len(made) == 7


RUN = made_up("ERM", 0)
SAVED = json.dumps({"fingerprint": "abc", "run": vars(RUN)})
NAN = float("nan")


def damaged(**values):
    """The file of a run with other values."""
    return json.dumps({"fingerprint": "abc", "run": {**vars(RUN), **values}}).encode()


@pytest.mark.parametrize(
    "content",
    [
        SAVED[:-20].encode(),
        b"",
        b"\xff\xfe\x00",
        b"[1, 2]",
        b"null",
        b'{"fingerprint": "abc"}',
        b"[" * 100_000,
        SAVED.replace('"abc"', '"abd"').encode(),
        SAVED.replace('"ERM"', '"SAM"').encode(),
        SAVED.replace('"tail"', '"tale"').encode(),
        SAVED.replace('"diverged": false', '"diverged": "no"').encode(),
        SAVED.replace('"seconds"', '"minutes"').encode(),
        damaged(class_recalls=["x", *[0.5] * 9]),
        damaged(class_recalls=[True, *[0.5] * 9]),
        damaged(class_recalls=[1.5, *[0.5] * 9]),
        damaged(accuracy={**RUN.accuracy, "all": float("nan")}),
        damaged(accuracy={**RUN.accuracy, "tail": "x"}),
        damaged(best={**RUN.best, "all": [0.5]}),
        damaged(confusion={"head_to_tail": -1}),
        damaged(train_accuracy={"all": None}),
        damaged(curves={**RUN.curves, "all": [0.5]}),
        damaged(curves={**RUN.curves, "all": 0.5}),
        damaged(curves={**RUN.curves, "all": ["x"] * 3}),
        damaged(groups={"head": "1" * 9}),
        damaged(groups={"head": "2" * 10}),
        damaged(groups={"head": 1}),
        damaged(class_names=["a"] * 9),
        damaged(class_names=[1] * 10),
        damaged(val_images=[3.5] * 10),
        damaged(test_images=[3] * 11),
        damaged(test_hits=["01"] * 9),
        damaged(test_hits=["0x"] * 10),
        damaged(test_hits=[1] * 10),
        damaged(test_hits=["011"] * 10),
        damaged(test_hits=["", *["01"] * 9]),
        damaged(calibration={"all": 0.5}),
        damaged(calibration=dict.fromkeys(RUN.accuracy, 2)),
        damaged(reliability={"all": [[1, 0.5]]}),
        damaged(reliability={"all": [[1, 0.5, "x"]]}),
        damaged(reliability={"all": [[0.5, 0.5, 0.5]]}),
        damaged(reliability={"all": 3}),
        damaged(confused_pairs=[[0, 1]]),
        damaged(confused_pairs=[[0, 0, 1]], test_images=[9] * 10),
        damaged(confused_pairs=[[0, 10, 1]], test_images=[9] * 10),
        damaged(confused_pairs=[[0, -1, 1]], test_images=[9] * 10),
        damaged(confused_pairs=[[0, 1, 10]], test_images=[9] * 10),
        damaged(confused_pairs=[[0, 1, 1]]),
        damaged(confused_pairs=["abc"], test_images=[9] * 10),
        damaged(tail_mistakes=[[3, 0, 1]]),
        damaged(tail_mistakes=[[3, 0, 1, 1.5]]),
        damaged(tail_mistakes=[[-1, 0, 1, 0.5]]),
        damaged(tail_mistakes=[[3.5, 0, 1, 0.5]]),
        damaged(tail_mistakes=[[3, 0, 12, 0.5]]),
        damaged(parameters="many"),
        damaged(parameters=-1),
        damaged(optimizer=3),
    ],
)
def test_a_damaged_run_is_made_again_and_a_line_says_so(content, capsys):
    store = RunStore(Path("runs"))
    store.save(RUN, "abc")
    assert store.load("ERM", 0, "abc") == RUN
    assert capsys.readouterr().out == ""
    (path,) = Path("runs").iterdir()
    path.write_bytes(content)
    assert store.load("ERM", 0, "abc") is None
    assert capsys.readouterr().out == f"{path} is damaged. Its run is made again.\n"
    path.unlink()
    assert store.load("ERM", 0, "abc") is None
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "values",
    [
        {"test_hits": ["01"] * 10, "test_images": [2] * 10, "class_names": ["a"] * 10, "groups": {"head": "1" * 10}},
        {"test_hits": ["", *["0110"] * 9], "class_recalls": [NAN, *[0.5] * 9]},
        {
            "calibration": dict.fromkeys(RUN.accuracy, NAN),
            "reliability": {"all": [[3, 0.5, 1], [0, NAN, NAN]]},
            "confused_pairs": [[0, 1, 9], [9, 0, 1]],
            "test_images": [9] * 10,
            "tail_mistakes": [[0, 9, 0, 1.0]],
            "parameters": 12,
        },
        # No class was tested; a training without validation; one that diverged.
        {"class_recalls": [NAN] * 10, "accuracy": dict.fromkeys(RUN.accuracy, NAN)},
        {"best": dict.fromkeys(RUN.best, NAN), "curves": {group: [NAN] * 2 for group in RUN.curves}},
        {"accuracy": dict.fromkeys(RUN.accuracy, NAN), "diverged": True},
    ],
)
def test_a_whole_run_is_not_made_again(values, capsys):
    store = RunStore(Path("runs"))
    store.save(made_up("ERM", 0), "abc")
    (path,) = Path("runs").iterdir()
    path.write_bytes(damaged(**values))
    assert store.load("ERM", 0, "abc") is not None
    assert capsys.readouterr().out == ""


def test_a_full_disk_names_the_file(monkeypatch, capsys):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(full))
    with pytest.raises(SystemExit), without_traceback():
        write_text(Path("table.md"), "x")
    assert capsys.readouterr().err == "error: Cannot write 'table.md': No space left on device.\n"
    assert not list(Path().iterdir())


@pytest.mark.parametrize("error", [NotImplementedError(), OSError(errno.ENOLCK, "No locks available")])
def test_a_file_system_without_locks(error, monkeypatch, capsys):
    monkeypatch.setattr(FileLock, "acquire", lambda *_, **__: (_ for _ in ()).throw(error))
    with locked(Path()):
        pass
    assert capsys.readouterr().err == "The file system of '.' has no locks. Run one command at a time there.\n"


def test_a_lock_that_cannot_be_opened_is_an_error(monkeypatch):
    error = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(FileLock, "acquire", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(PermissionError), locked(Path()):
        pytest.fail("went on")


def test_no_two_names_share_a_file():
    names = [
        "SSE-SAM",
        "sse-sam",
        "SSE SAM",
        "SSE/SAM",
        "é",
        "e\u0301",
        "..",
        "../..",
        "CON",
        "x" * 200,
        "x" * 199 + "y",
    ]
    stems = {file_stem(name).lower() for name in names}
    assert len(stems) == len(names)
    assert all(re.fullmatch("[a-z0-9-]{1,70}", stem) for stem in stems)
    weights = WeightStore(Path("weights"))
    assert len({str(weights.path(name, 0, "abc")).lower() for name in names}) == len(names)


@pytest.mark.parametrize("key", ["1", "1.5", "on", "null", "'a\\tb'", '"a\\nb"', "''", "' '", "x" * 201, '"a\\u2028b"'])
def test_names_that_are_no_line_of_text_are_refused(key, monkeypatch):
    monkeypatch.setattr(Experiment, "run", lambda *args: pytest.fail("trained"))
    Path("own.yaml").write_text(f"methods:\n  {key}: {{objective: ERM}}\n".replace("\\t", "\t"))
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--config=own.yaml", "--jobs=1"])
    message = str(stop.value)
    assert re.match(
        "error: Expected argument `methods` to be methods whose names are text: a line of 1 to 200", message
    )
    assert "\n" not in message
    assert len(message) < 300
    assert ("quote it" in message) == (key[0] not in "'\"x")
    assert not Path("comparison").exists()


def test_names_may_be_any_other_text():
    for name in (
        "SSE-SAM",
        "1",
        "on",
        "=1+1",
        "Методы",
        "方法",
        "x" * 200,
        'a|b <c> & "d"',
        "👩\u200d🔬",
        "ن\u200cی",
    ):
        _check_method_name(name)
    for name in (True, None, 1, 2.5, b"ERM", "a\rb", "a\x1b[31mb", "\ud800", "a\u202eb", "\u200b"):
        with pytest.raises(ArgumentError, match="names are text"):
            _check_method_name(name)


FORMULAS = ["=1+1", "+1+1", "-1+cmd|' /C calc'!A0", "@SUM(A1)", "\t=1", "\r=1", " =1+1", "-x"]


def test_formulas_in_tables_are_defused():
    numbers = ["-0.5", "+1e3", "-inf", -0.5, True, 3, "", "nan"]
    write_csv(
        Path("table.csv"), ["method", "=header"], [[name, "a;=1+1"] for name in FORMULAS] + [[n, "x"] for n in numbers]
    )
    with Path("table.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["method", "'=header"]
    assert [row[0] for row in rows] == [f"'{name}" for name in FORMULAS] + [str(number) for number in numbers]
    # A spreadsheet that divides at semicolons keeps this in one cell.
    assert '"a;=1+1"' in Path("table.csv").read_text()
    assert "\n-0.5,x\n" in Path("table.csv").read_text().replace('"', "").replace("\r", "")


def test_a_method_with_the_name_of_a_formula(made, monkeypatch):
    monkeypatch.setattr(REPORT, write_report)
    methods = {name: Method(ERM) for name in ("=1+1", "-x", "@a")}
    compare(methods, seeds=2, epochs=3)
    assert {row["method"] for row in rows_of("comparison/results.csv")} == {"'=1+1", "'-x", "'@a"}
    assert {row["method"] for row in rows_of("comparison/summary.csv")} == {"'=1+1", "'-x", "'@a"}
    assert [run.method for run in compare(methods, seeds=2, epochs=3)][::2] == list(methods)
    assert len(made) == 6


def hold():
    Path("out").mkdir()
    with locked(Path("out")), replaced(Path("out/half.txt")) as path:
        path.write_text("half")
        Path("ready").touch()
        multiprocessing.parent_process().join()


def test_two_commands_in_one_folder(made, capsys):
    process = start_process(hold)
    try:
        wait_for(Path("ready").exists, seconds=90)
        with pytest.raises(SystemExit) as stop:
            main(["compare", "--output=out", "--epochs=3", "--jobs=1"])
        message = str(stop.value)
        assert message.startswith(f"error: Another command is at work in 'out' (process {process.pid} on ")
        assert "\n" not in message
        assert not made
        # In another folder it is at work.
        main(["compare", "--output=other", "--epochs=3", "--jobs=1", "--seeds=1"])
        assert len(made) == 4
    finally:
        process.kill()
        process.join()
    # The killed command leaves no lock, and what it was writing is removed.
    assert [path.suffix for path in Path("out").glob(".unfinished-*")] == [".txt"]
    main(["compare", "--output=out", "--epochs=3", "--jobs=1", "--seeds=1"])
    assert not list(Path("out").glob(".unfinished-*"))
    assert not Path("out/.owner").exists()
    with locked(Path("out")):
        pass


def test_what_a_killed_command_was_writing_is_removed_everywhere(made):
    compare("ERM", seeds=1, epochs=3)
    folder = Path("comparison/weights/ERM-1")
    folder.mkdir(parents=True)
    Path("comparison/runs/mine.txt").touch()
    for place in (folder, Path("comparison"), Path("comparison/runs")):
        (place / ".unfinished-x.png").touch()
    compare("ERM", seeds=1, epochs=3, keep_weights=True)
    assert not list(Path("comparison").rglob(".unfinished-*"))
    assert Path("comparison/runs/mine.txt").exists()


@pytest.mark.parametrize("name", ["table.md", "comparison.png", "report.html"])
def test_pictures_and_pages_are_whole_or_not_there(name, monkeypatch):
    """A command that is killed while it writes leaves what was there."""
    comparison = Comparison([RUN], DigitsLT().split(tail_fraction=0.2), DigitsLT(), epochs=3)
    Path(name).write_text("earlier")
    replace, seen = os.replace, []

    def cut_off(source, target):
        if Path(target).name == name:
            seen.append(Path(source).stat().st_size)
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", cut_off)
    with pytest.raises(KeyboardInterrupt):
        write_report(comparison, Path())
    assert seen[0] > 100
    assert Path(name).read_text() == "earlier"


def test_a_folder_in_which_nothing_can_be_written(monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ArgumentError, match=r"`output` to be a folder that can be written to \(Permission denied\)"):
        make_folder(Path("out"))


def test_files_have_the_rights_of_other_files(monkeypatch):
    before = os.umask(0o027)
    try:
        write_text(Path("text.txt"), "ä")
    finally:
        os.umask(before)
    assert Path("text.txt").stat().st_mode & 0o777 == 0o640
    assert Path("text.txt").read_bytes() == "ä".encode()
    with replaced(Path("x" * 200 + ".txt")) as path:
        path.touch()
    assert Path("x" * 200 + ".txt").exists()


def test_weights_are_kept(capsys, monkeypatch):
    monkeypatch.setattr(REPORT, lambda *_: [])
    options = {"seeds": 2, "epochs": 1, "backbone": partial(SmallConvNet, width=8), "keep_weights": True}
    methods = {"ERM": Method(ERM), "erm": Method(partial(SAM, 0.05))}
    runs = compare(methods, **options)
    paths = sorted(Path("comparison/weights").rglob("*"))
    assert [path.name for path in paths if path.is_file()] == ["seed-0.ckpt", "seed-1.ckpt"] * 2
    assert len({path.parent.name.lower() for path in paths if path.is_file()}) == 2
    store = WeightStore(Path("comparison/weights"))
    experiment = methods["erm"].experiment("erm", recipe_of(options), 0.7)
    fingerprint = experiment.fingerprint(experiment.make_split(DigitsLT()))
    path = store.path("erm", 1, fingerprint)
    saved = torch.load(path, weights_only=True)
    assert "optimizer_states" not in saved
    model, data = experiment.make_model(DigitsLT()), DigitsLT()
    (tested,) = experiment.make_trainer([]).test(model, datamodule=data, ckpt_path=str(path), verbose=False)
    assert tested["test/acc_tail"] == runs[3].accuracy["tail"]

    # Nothing is made again, but a run whose weights are missing is.
    first = path.stat().st_mtime_ns
    compare(methods, **options)
    assert path.stat().st_mtime_ns == first
    path.unlink()
    capsys.readouterr()
    compare(methods, **options)
    assert "3 of 4 runs are in comparison/runs already." in capsys.readouterr().out
    assert torch.load(path, weights_only=True)["state_dict"].keys() == saved["state_dict"].keys()
    for name, value in torch.load(path, weights_only=True)["state_dict"].items():
        assert value.equal(saved["state_dict"][name])
    compare({"erm": methods["erm"]}, **{**options, "seeds": 1}, fresh=True)
    assert [path.name for path in (path.parent / "earlier").iterdir()] == ["seed-0-1.ckpt"]
    # A new run without weights must not be taken for the one whose weights are there.
    zero = path.with_name("seed-0.ckpt")
    assert zero.is_file()
    compare({"erm": methods["erm"]}, **{**options, "seeds": 1, "keep_weights": False}, fresh=True)
    assert not zero.exists()


def recipe_of(options):
    return Recipe(epochs=options["epochs"], backbone=options["backbone"])


def run_git(*arguments):
    names = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    done = subprocess.run(["git", *names, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_origin(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["/bin/lightning-ssesam", "compare", "--output=my results", "--methods", "ERM,SAM"]
    )
    assert origin()["Command"] == "lightning-ssesam compare '--output=my results' --methods ERM,SAM"
    monkeypatch.setattr(sys, "argv", ["/x/lightning_ssesam/__main__.py", "compare"])
    monkeypatch.setattr(sys, "orig_argv", ["/venv/bin/python", "-m", "lightning_ssesam", "compare"])
    assert origin()["Command"] == "python -m lightning_ssesam compare"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d [+-]\d{4}", origin()["Date"])
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(Path.cwd().parent))
    assert "Commit" not in origin()
    run_git("init", "-q")
    assert "Commit" not in origin()
    Path("code.py").write_text("1")
    run_git("add", "code.py")
    run_git("commit", "-qm", "first")
    commit = run_git("rev-parse", "--short=12", "HEAD")
    Path("comparison").mkdir()
    Path("comparison/table.md").touch()
    assert origin()["Commit"] == commit
    Path("code.py").write_text("2")
    assert origin()["Commit"] == f"{commit} + changes"
    monkeypatch.setenv("PATH", "")
    assert "Commit" not in origin()


def test_rule_of_the_split():
    assert tail_rule({}) == "the rarest classes that hold at most 20 % of the training samples (tail_fraction=0.2)"
    assert tail_rule({"tail_fraction": 0.05}).endswith("hold at most 5 % of the training samples (tail_fraction=0.05)")
    assert tail_rule({"tail_below": 20}) == "the classes with fewer than 20 training samples (tail_below=20)"


@pytest.mark.usefixtures("no_pictures")
def test_the_report_says_where_it_comes_from(made, monkeypatch):
    monkeypatch.setattr(REPORT, write_report)
    facts = {
        "Date": "2026-11-28 03:37 +0000",
        "Command": "lightning-ssesam <compare>",
        "Commit": "0123456789ab + changes",
    }
    monkeypatch.setattr("lightning_ssesam.experiments.compare.origin", lambda: facts)
    compare("ERM", seeds=1, epochs=3, model={"tail_below": 20})
    text = Path("comparison/report.html").read_text()
    assert "<dt>Date</dt><dd>2026-11-28 03:37 +0000</dd>" in text
    assert "<dt>Command</dt><dd>lightning-ssesam &lt;compare&gt;</dd>" in text
    assert "<dt>Commit</dt><dd>0123456789ab + changes</dd>" in text
    assert "samples: the classes with fewer than 20 training samples (tail_below=20)</dd>" in text
