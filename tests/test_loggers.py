"""The logs of a comparison: a run of a logger for each training, which goes on if the training does."""

import csv
import json
import os
import shutil
import struct
import sys
from contextlib import suppress
from dataclasses import asdict
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from helpers import STRICT
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger

from lightning_ssesam import ERM, SSESAM, DigitsLT
from lightning_ssesam.cli import main
from lightning_ssesam.compare import compare
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments import unfinished
from lightning_ssesam.experiments.jobs import Task
from lightning_ssesam.experiments.loggers import CSVRun
from lightning_ssesam.experiments.logs import plan_logs, prepare_logs
from lightning_ssesam.experiments.results import make_missing
from lightning_ssesam.models import SmallConvNet
from lightning_ssesam.runs import GROUPS, Experiment

pytestmark = STRICT
SMALL = partial(SmallConvNet, width=8)
MODULES = {"tensorboard": "tensorboard.summary", "wandb": "wandb.sdk", "mlflow": "mlflow.tracking"}
OUTPUT = Path("out")


def is_there(module):
    with suppress(ModuleNotFoundError):
        return find_spec(module) is not None
    return False


def needs(kind):
    absent = kind in MODULES and not is_there(MODULES[kind])
    return pytest.param(kind, marks=pytest.mark.skipif(absent, reason=f"{kind} is not installed"))


EVERY = [needs(kind) for kind in ("csv", "tensorboard", "wandb", "mlflow")]


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch):
    monkeypatch.setattr(unfinished, "_BETWEEN", 0.0)
    monkeypatch.setattr(unfinished, "_TIMES_WRITING", 0)
    monkeypatch.setattr(sys, "argv", ["lightning-ssesam"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


class Cut(Callback):
    """Ends a training before a batch of an epoch, as long as it is asked to."""

    moment: tuple | None = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if Cut.moment == (trainer.current_epoch, batch_idx):
            raise RuntimeError("cut off")


@pytest.fixture
def cut():
    yield lambda *moment: setattr(Cut, "moment", moment or None)
    Cut.moment = None


def experiment(name="a", objective=SSESAM, callbacks=(), **options):
    made = {"backbone": SMALL, "epochs": 3, "gamma": 0.5, **options}
    return Experiment(name, objective, callbacks=[Cut(), *callbacks], **made)


@pytest.fixture(scope="session", autouse=True)
def _one_database(tmp_path_factory):
    """MLflow takes five seconds to make an empty database, which is made once here and copied."""
    planned.database = tmp_path_factory.mktemp("mlflow") / "mlflow.db"


def planned(kind, trainer=None):
    """The place of the logs of a comparison, ready for its trainings."""
    logs = plan_logs(kind, trainer, OUTPUT)
    database = logs.folder / "mlflow.db"
    logs.folder.mkdir(parents=True, exist_ok=True)
    if kind == "mlflow" and planned.database.is_file() and not database.is_file():
        shutil.copy(planned.database, database)
    prepare_logs(logs)
    if database.is_file() and not planned.database.is_file():
        shutil.copy(database, planned.database)
    return logs


def train(made, logs, seed=0, fresh=False):
    [run] = make_missing([Task(made, "f" * 64, seed, logs=logs)], OUTPUT, fresh=fresh)
    return run


@cache
def without_logs(seed, epochs):
    """What a run is without a logger."""
    return texts(experiment(epochs=epochs).run(seed))


def texts(run):
    """The fields of a run as texts, in which NaN is NaN."""
    return {name: repr(value) for name, value in asdict(run).items() if name not in ("seconds", "interruptions")}


# What is in the logs, of every kind: the runs by name, each with settings, values by name and step, and how it ended.


def runs_in_csv(folder):
    for metrics in sorted(folder.glob("*/*/metrics.csv")):
        values = {}
        for row in csv.DictReader(metrics.open(newline="")):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    values.setdefault(name, []).append((int(row["step"]), float(value)))
        yield str(metrics.parent), yaml.safe_load((metrics.parent / "hparams.yaml").read_text()), values, None


def runs_in_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data

    for run in sorted(path for path in folder.glob("*/*") if path.is_dir()):
        events = EventAccumulator(str(run)).Reload()
        names = set(events.Tags()["scalars"]) - {"epoch"}
        values = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}
        session = events.PluginTagToContent("hparams")[SESSION_START_INFO_TAG]
        found = parse_session_start_info_plugin_data(session).hparams
        settings = {name: getattr(value, value.WhichOneof("kind")) for name, value in found.items()}
        # It is written at the end.
        assert settings.keys() == yaml.safe_load((run / "hparams.yaml").read_text()).keys()
        yield str(run), settings, values, None


def runs_in_mlflow(folder):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder.absolute() / 'mlflow.db'}")
    [group] = [found for found in client.search_experiments() if found.name != "Default"]
    assert group.name == "out"
    for run in client.search_runs([group.experiment_id], order_by=["attributes.start_time"]):
        histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
        values = {name: [(each.step, each.value) for each in found] for name, found in histories.items()}
        texts = run.data.params
        settings = {name: text if name == "method" else yaml.safe_load(text) for name, text in texts.items()}
        yield run.info.run_name, settings, values, run.info.status == "FINISHED"


def runs_in_wandb(folder):
    by_name = {}
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        settings, values, name, ended = {}, {}, None, None
        for record in records_of(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                name = record.run.display_name
                assert (record.run.run_group, record.run.project) == ("out", "lightning-ssesam")
                assert record.run.run_id == path.stem.removeprefix("run-")
            elif kind == "config":
                settings |= {item.key: json.loads(item.value_json) for item in record.config.update}
            elif kind == "history":
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                row = {key: value for key, value in row.items() if key[0] != "_"}
                for key, value in row.items():
                    values.setdefault(key, []).append((row["trainer/global_step"], value))
            elif kind == "exit":
                ended = record.exit.exit_code == 0
        key = (name, path.stem)
        earlier = by_name[key][2] if key in by_name else {}
        joined = {each: earlier.get(each, []) + values.get(each, []) for each in earlier.keys() | values.keys()}
        by_name[key] = name, settings, joined, ended
    yield from by_name.values()


def records_of(path):
    """The records of a file of Weights & Biases, a log of LevelDB: blocks of 32 KiB, parts with a head of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, content = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (rest := 32768 - place % 32768) < 7:
            place += rest
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        content += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield Record.FromString(content)
            content = b""


def logged(kind):
    read = {"csv": runs_in_csv, "tensorboard": runs_in_tensorboard, "mlflow": runs_in_mlflow, "wandb": runs_in_wandb}
    return list(read[kind](OUTPUT / "logs" / kind))


def check_values(values, run):
    """Every epoch has the curves of the run, loss and stage, and the end has the results of the test."""
    steps = [9 * epoch + 8 for epoch in range(len(run.curves["all"]))]
    expected = {f"val/acc_{group}": (steps, run.curves[group]) for group in GROUPS}
    expected |= {f"test/acc_{group}": ([steps[-1] + 1], [run.accuracy[group]]) for group in GROUPS}
    expected |= {f"test/{name}": ([steps[-1] + 1], [share]) for name, share in run.confusion.items()}
    for name, (at, numbers) in expected.items():
        assert [step for step, _ in values[name]] == at, name
        assert [value for _, value in values[name]] == pytest.approx(numbers, abs=1e-6), name
    for name in ("train/loss", "val/loss"):
        assert [step for step, _ in values[name]] == steps


@pytest.mark.parametrize("kind", EVERY)
def test_a_training_is_logged_and_its_results_are_the_same(kind, capsys):
    """The same bits as without a logger. The stage is that of the last batch of an epoch: 13 of 27 come before."""
    run = train(experiment(), logs := planned(kind), seed=3)
    assert texts(run) == without_logs(3, 3)
    train(experiment("b", ERM, epochs=1), logs)
    [first, second] = sorted(logged(kind), key=lambda each: each[1]["method"])
    check_values(first[2], run)
    assert first[2]["stage"] == [(8, 1), (17, 2), (26, 2)]
    assert "stage" not in second[2]
    expected = {"method": "a", "seed": 3, "objective": "SSESAM", "head_rho": 0.05, "tail_rho": 0.1, "gamma": 0.5}
    expected |= {
        "lr": 0.05,
        "data": "DigitsLT",
        "data.seed": 0,
        "data.batch_size": 32,
        "epochs": 3,
        "loss": "CrossEntropyLoss",
    }
    assert expected.items() <= first[1].items()
    assert first[1]["optimizer"] == "SGD(lr=0.05, momentum=0.9, weight_decay=0.0005)" == second[1]["optimizer"]
    assert (second[1]["objective"], "gamma" in second[1]) == ("ERM", False)
    names = {"csv": str(OUTPUT / "logs/csv/a/seed-3"), "tensorboard": str(OUTPUT / "logs/tensorboard/a/seed-3")}
    assert first[0] == names.get(kind, "a, seed 3")
    assert (first[3], second[3]) == ((None, None) if kind in names else (True, True))
    assert "failed" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", EVERY)
def test_a_training_that_goes_on_goes_on_in_its_run(kind, cut):
    """It is cut off in its second epoch and at the begin of its third. A step is there once, where that can be."""
    made, logs = experiment(), planned(kind)
    for moment in ((1, 4), (2, 0)):
        cut(*moment)
        with pytest.raises(RuntimeError, match="cut off"):
            train(made, logs)
    if kind in ("mlflow", "wandb"):
        assert [ended for *_, ended in logged(kind)] == [False]
    cut()
    run = train(made, logs)
    assert run.interruptions == 2
    [(_, settings, values, ended)] = logged(kind)
    check_values(values, run)
    assert values["stage"] == [(8, 1), (17, 2), (26, 2)]
    assert settings["seed"] == 0
    assert ended in (True, None)


@pytest.mark.parametrize("kind", ["csv", needs("tensorboard")])
def test_what_is_made_again_is_not_there_twice(kind, cut, monkeypatch):
    """Without a checkpoint, the training begins anew. Epochs that it had logged are logged again."""
    monkeypatch.setattr(unfinished, "_BETWEEN", 99.0)
    made, logs = experiment(), planned(kind)
    cut(2, 3)
    with pytest.raises(RuntimeError, match="cut off"):
        train(made, logs)
    cut()
    run = train(made, logs)
    [(_, _, values, _)] = logged(kind)
    check_values(values, run)


@pytest.mark.parametrize("moment", ["renamed", "half written"])
def test_no_row_is_lost_by_a_kill_between_two_files(moment, cut):
    """Lightning deletes the metrics of a folder. A kill at this moment leaves them under another name."""
    made, logs = experiment(), planned("csv")
    cut(2, 0)
    with pytest.raises(RuntimeError, match="cut off"):
        train(made, logs)
    folder = OUTPUT / "logs/csv/a/seed-0"
    before = (folder / "metrics.csv").read_text()
    (folder / "metrics.csv").rename(folder / "metrics-before.csv")
    if moment == "half written":
        (folder / "metrics.csv").write_text(before[:300])
    cut()
    run = train(made, logs)
    [(_, _, values, _)] = logged("csv")
    check_values(values, run)
    assert sorted(path.name for path in folder.iterdir()) == ["hparams.yaml", "metrics.csv"]


@pytest.mark.parametrize("kind", EVERY)
def test_a_training_that_is_made_again_has_its_own_run(kind):
    made, logs = experiment(epochs=1), planned(kind)
    train(made, logs)
    contents = {path: path.read_bytes() for path in (OUTPUT / "logs").rglob("*") if path.is_file()}
    [before] = logged(kind)
    train(made, logs, fresh=True)
    first, second = logged(kind)
    assert first[2] == before[2]
    assert first[2]["test/acc_all"] == second[2]["test/acc_all"]
    if kind in ("csv", "tensorboard"):
        assert [Path(name).name for name, *_ in (first, second)] == ["seed-0", "seed-0-2"]
        assert all(path.read_bytes() == content for path, content in contents.items())


NAMES = ["a b/../../c", "..", "~", "$HOME", "::", "🙂", "🙂🙂", "CON.", "x" * 200, "x" * 199 + "y", "é", "a=1,b"]


@pytest.mark.parametrize("kind", EVERY)
def test_names_of_methods_hold_any_character(kind, capsys):
    logs = planned(kind)
    for number, name in enumerate(NAMES):
        logger = logs.make(name, 0, "")
        logger.begin({"method": name}, ["a"])
        logger.add({"a": number}, 4)
        logger.close("success")
    found = {settings["method"]: values["a"] for _, settings, values, _ in logged(kind)}
    cut_by = 250 if kind == "mlflow" else 999
    assert found == {name[:cut_by]: [(4, number)] for number, name in enumerate(NAMES)}
    assert len(list((OUTPUT / "logs" / kind).glob("*/seed-0"))) in (0, len(NAMES))
    assert {path.name for path in Path().iterdir()} == {"out"}
    assert "failed" not in capsys.readouterr().err


@pytest.mark.parametrize("place", ["__init__", "_go_on", "add_later", "_close", "log_metrics, save"])
def test_a_logger_that_fails_loses_no_run(place, monkeypatch, capsys):
    """At its begin, at the first value, at a later one, at its end, at all of them. It is said once."""
    logs, calls = planned("csv"), []

    def fail(self, *args, **kwargs):
        calls.append(args)
        if place != "add_later" or len(calls) == 2:
            raise OSError(28, "No space left on device")

    for name in {"add_later": "log_metrics"}.get(place, place).split(", "):
        monkeypatch.setattr(CSVRun if name.startswith("_") else CSVLogger, name, fail)
    assert texts(train(experiment(epochs=1), logs)) == without_logs(0, 1)
    said = capsys.readouterr().err
    assert said.count("The logger of a training has failed (OSError: [Errno 28] No space left on device).") == 1


@pytest.mark.parametrize("kind", EVERY)
def test_a_training_that_fails_closes_its_run(kind, cut):
    """The next one of the same process has its own."""
    logs, before = planned(kind), settings_of_mlflow()
    cut(1, 0)
    with pytest.raises(RuntimeError, match="cut off"):
        train(experiment("fails", ERM, epochs=2), logs)
    cut()
    train(experiment("works", ERM, epochs=1), logs)
    assert settings_of_mlflow() == before
    found = {settings["method"]: (values, ended) for _, settings, values, ended in logged_of_failures(kind)}
    assert [len(values["val/acc_all"]) for values, _ in found.values()] == [1, 1]
    assert "test/acc_all" not in found["fails"][0]
    if kind in ("wandb", "mlflow"):
        assert (found["fails"][1], found["works"][1]) == (False, True)


def settings_of_mlflow():
    """Those of this process, which further trainings and their processes have."""
    return {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}


def logged_of_failures(kind):
    if kind == "tensorboard":
        # Its file of settings is written at the end.
        folder = OUTPUT / "logs/tensorboard/fails/seed-0"
        if not (folder / "hparams.yaml").is_file():
            (folder / "hparams.yaml").write_text((OUTPUT / "logs/tensorboard/works/seed-0/hparams.yaml").read_text())
    return logged(kind)


def test_nothing_is_logged_within_an_epoch_unless_it_is_asked_for(monkeypatch):
    """A value of a step would make the training wait for the device."""
    steps = []
    monkeypatch.setattr(CSVRun, "log_metrics", lambda self, metrics, step: steps.append((step, sorted(metrics))))
    train(experiment(epochs=2), planned("csv"))
    assert [step for step, _ in steps] == [8, 17, 18]
    assert all("stage" not in names and "train/loss" not in names for _, names in steps)
    steps.clear()
    made = experiment("b", epochs=1, trainer={"log_every_n_steps": 3}, callbacks=[LearningRateMonitor()])
    train(made, planned("csv", made.trainer))
    assert [(step, "train/loss" in names) for step, names in steps if "stage" in names] == [
        (2, True),
        (5, True),
        (8, True),
    ]


def test_the_logger_of_the_trainer_works_as_before():
    trainer = {"logger": CSVLogger(".", "mine", "v"), "log_every_n_steps": 1}
    experiment(epochs=1, trainer=trainer).run(0)
    with Path("mine/v/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["train/loss"]] == [str(step) for step in range(9)]


class Described(DigitsLT):
    """Data with settings of its own, one of which has the name of another setting."""

    def __init__(self, seed=7, kind="described"):
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.parametrize("kind", EVERY)
def test_settings_of_a_data_module_are_logged_too(kind, capsys):
    train(experiment(epochs=1, data=Described), planned(kind))
    [(_, settings, _, _)] = logged(kind)
    assert settings["seed"] == 0
    if kind != "tensorboard":
        assert settings["kind"] == "described"
    assert "failed" not in capsys.readouterr().err


def test_a_machine_without_the_folder_trains_without_logs(capsys):
    logs = plan_logs("csv", None, Path("elsewhere"))
    run = Task(experiment(epochs=1), "f" * 64, 0, logs=logs).run()
    assert texts(run) == without_logs(0, 1)
    assert not Path("elsewhere").exists()
    assert "the training is not logged here" in capsys.readouterr().err


def test_the_command_logs_and_finds_its_runs_again_with_another_logger(capsys, no_pictures):
    options = ["--epochs=1", "--seeds=1", "--methods=ERM,SAM", "--output=out", "--jobs=1", "--backbone.width=8"]
    main(["compare", *options, "--logger=csv"])
    assert f"Logs: {Path('out/logs/csv').absolute()}\n" in capsys.readouterr().out
    runs = {settings["method"]: settings for _, settings, _, _ in logged("csv")}
    assert {name: runs[name].get("rho") for name in runs} == {"ERM": None, "SAM": 0.2}
    results = Path("out/results.csv").read_bytes()
    main(["compare", *options])
    assert "2 of 2 runs are in" in capsys.readouterr().out
    assert Path("out/results.csv").read_bytes() == results
    assert not Path("out/unfinished").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"logger": "tensorbord"},
            r"`logger` to be one of 'tensorboard', 'csv', 'wandb', 'mlflow', but got 'tensorbord'",
        ),
        (
            {"logger": "csv", "trainer": {"logger": True}},
            "`logger` to be left out if `trainer` has a logger, but got 'csv'",
        ),
    ],
)
def test_bad_logger(options, message):
    with pytest.raises(ArgumentError, match=message):
        compare(["ERM"], seeds=1, epochs=1, output=OUTPUT, **options)
    assert not OUTPUT.exists()


@pytest.mark.parametrize("kind", MODULES)
def test_a_package_that_is_missing_is_named_before_anything(kind, monkeypatch):
    for module in (MODULES[kind], "tensorboardX", kind):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ArgumentError, match=rf"`logger` to be one whose package is installed \(pip install {kind}\), but got '{kind}'"
    ):
        compare(["ERM"], seeds=1, epochs=1, output=OUTPUT, logger=kind)
    assert not OUTPUT.exists()


def test_a_folder_that_cannot_be_made_is_refused_before_the_first_training():
    OUTPUT.mkdir()
    (OUTPUT / "logs").touch()
    with pytest.raises(ArgumentError, match=r"Expected argument `output` .*out/logs"):
        compare(["ERM"], seeds=1, epochs=1, output=OUTPUT, logger="csv")
    assert not (OUTPUT / "results.csv").exists()


@pytest.mark.parametrize("kind", [needs("wandb")])
def test_nobody_logged_in(kind, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(
        wandb, "login", lambda **_: (_ for _ in ()).throw(wandb.errors.UsageError("No API key configured."))
    )
    with pytest.raises(
        ArgumentError, match=r"log in by `wandb login`, or set WANDB_MODE=offline\), but got 'wandb' \(UsageError"
    ):
        plan_logs(kind, None, OUTPUT)


@pytest.mark.parametrize("kind", [needs("mlflow")])
def test_a_server_that_is_away(kind, monkeypatch, free_port):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ArgumentError, match="start the server, or set MLFLOW_TRACKING_URI"):
        planned(kind)


def test_a_search_takes_no_logger(capsys):
    with pytest.raises(SystemExit):
        main(["sweep", "--logger=csv"])
    assert capsys.readouterr().err == "error: There is no option `--logger`.\n"
