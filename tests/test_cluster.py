"""Comparisons on a Dask cluster: a real scheduler and real workers, killed in the middle."""

import asyncio
import json
import os
import signal
import stat
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import distributed
import psutil
import pytest
import yaml
from helpers import STRICT, main_without, start_process, wait_for
from test_compare import made_up

from lightning_ssesam.cli import main
from lightning_ssesam.compare import Method, compare
from lightning_ssesam.errors import ArgumentError, WorkersLostError
from lightning_ssesam.experiments import cluster as module
from lightning_ssesam.experiments.jobs import make_runs
from lightning_ssesam.experiments.tasks import Task
from lightning_ssesam.objectives import ERM, SAM
from lightning_ssesam.runs import Experiment

pytestmark = [
    STRICT,
    pytest.mark.skipif(os.name != "posix", reason="needs signals"),
    # Dask's own servers.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

# A user's own file, in the folder where the command is started. Each training waits in its third epoch for a file.
OWN = """
import os, time
from pathlib import Path
from lightning.pytorch.callbacks import Callback
from lightning_ssesam.experiments import unfinished

class Pause(Callback):
    def setup(self, trainer, pl_module, stage):
        unfinished._BETWEEN = unfinished._TIMES_WRITING = 0.0

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            Path(f"waits-{os.getpid()}").touch()
            while not Path("go").exists():
                time.sleep(0.01)

    def on_exception(self, trainer, pl_module, exception):
        Path(f"ended-{os.getpid()}-{type(exception).__name__}").touch()
"""
METHODS = {name: {"objective": name, "callbacks": [{"class_path": "own.Pause"}]} for name in ("ERM", "SSESAM")}


async def serve(kind, *args, **options):
    async with getattr(distributed, kind)(*args, **options) as server:
        await server.finished()


def begin_scheduler(port):
    asyncio.run(serve("Scheduler", host="127.0.0.1", port=port, dashboard=False))


def begin_worker(address, threads):
    asyncio.run(serve("Worker", address, nthreads=threads, dashboard=False, local_directory=os.getcwd()))


class Cluster:
    """A scheduler and two workers, of which one has several threads."""

    def __init__(self, folder, port):
        self.folder, self.port, self.address = folder, port, f"tcp://127.0.0.1:{port}"
        self.start()

    def start(self):
        self.scheduler = start_process(begin_scheduler, self.port, folder=self.folder, log=self.folder / "scheduler")
        self.workers = [
            start_process(begin_worker, self.address, threads, folder=self.folder, log=self.folder / f"{threads}")
            for threads in (1, 4)
        ]

    def stop(self):
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    # Not the free port of another test.
    made = Cluster(tmp_path_factory.mktemp("cluster"), 20_000 + os.getpid() % 10_000)
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def _own_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-ssesam"])


@pytest.fixture
def own():
    """A comparison of two trainings that wait in the middle, and what becomes of it without a cluster."""
    Path("own.py").write_text(OWN)
    Path("own.yaml").write_text(yaml.safe_dump({"methods": METHODS, "seeds": 1, "epochs": 4}))
    Path("go").touch()
    main(["compare", "--config=own.yaml", "--jobs=1", "--output=one"])
    for path in (*Path().glob("waits-*"), Path("go")):
        path.unlink()
    sys.modules.pop("own")


def runs_in(folder):
    """The runs in a folder, without what may differ, and how often each was cut off."""
    runs = [json.loads(path.read_text())["run"] for path in sorted(Path(folder, "runs").glob("*.json"))]
    return [run | {"seconds": 0, "interruptions": 0} for run in runs], [run["interruptions"] for run in runs]


def begin(cluster, *options):
    """Start the command, and return it when both trainings wait in the middle."""
    where = f"--cluster={cluster.address}"
    command = start_process(main, ["compare", "--config=own.yaml", where, "--output=two", *options], log="log")
    wait_for(lambda: len(list(Path().glob("waits-*"))) == 2 or command.exitcode is not None)
    assert command.exitcode is None, Path("log").read_text()
    return command


def finish(cluster):
    """Run the same command to its end."""
    Path("go").touch()
    main(["compare", "--config=own.yaml", f"--cluster={cluster.address}", "--output=two"])


@pytest.mark.usefixtures("own", "no_pictures")
def test_the_same_bits_also_if_a_worker_is_lost(cluster):
    command = begin(cluster)
    # Its own threads do not train two at a time, nor does a worker with one.
    lost, other = (int(path.name[6:]) for path in Path().glob("waits-*"))
    assert {lost, other} == {worker.pid for worker in cluster.workers}
    os.kill(lost, signal.SIGKILL)
    Path("go").touch()
    command.join(60)
    assert command.exitcode == 0, Path("log").read_text()
    (expected, _), (found, interruptions) = runs_in("one"), runs_in("two")
    assert found == expected
    assert sorted(interruptions) == [0, 1]
    assert not Path("two/unfinished").exists()
    name = ("ERM", "SSESAM")[interruptions.index(1)]
    assert f"with the same numbers: {name} with seed 0." in Path("two/report.html").read_text()
    assert "Training on the workers of tcp://127.0.0.1" in Path("log").read_text()
    cluster.stop()
    cluster.start()


@pytest.mark.usefixtures("no_pictures")
def test_a_worker_trains_with_the_code_of_today(cluster):
    """It has imported the file as it was yesterday."""
    methods = {"own": {"objective": "later.make"}}
    Path("later.yaml").write_text(yaml.safe_dump({"methods": methods, "seeds": 1, "epochs": 2}))
    for rho in (5.0, 0.05):
        Path("later.py").write_text(OWN_OBJECTIVE.replace("5.0", str(rho)))
        options = ["compare", "--config=later.yaml", f"--cluster={cluster.address}", f"--output={rho}"]
        process = start_process(main, options, log="log")
        process.join(60)
        assert process.exitcode == 0, Path("log").read_text()
        (run,) = compare({"own": Method(partial(SAM, rho))}, seeds=1, epochs=2, output=Path("one"))
        assert runs_in(str(rho))[0][0]["curves"] == run.curves


OWN_OBJECTIVE = """
from lightning_ssesam import SAM, Objective

RHO = 5.0

def make() -> Objective:
    return SAM(RHO)
"""


@pytest.mark.usefixtures("own", "no_pictures")
def test_the_same_bits_also_if_the_scheduler_is_lost(cluster):
    command = begin(cluster)
    cluster.scheduler.kill()
    command.join(60)
    printed = Path("log").read_text()
    assert command.exitcode == 2, printed
    assert "Interrupted after 0 of 2 runs, which are in two/runs." in printed
    assert "error: The scheduler of the cluster is gone. Start it again, and then this command" in printed
    assert "Traceback" not in printed
    cluster.stop()
    cluster.start()
    finish(cluster)
    assert runs_in("two") == (runs_in("one")[0], [1, 1])


@pytest.mark.usefixtures("own", "no_pictures")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_trainings_end_if_their_command_does(number, cluster):
    """No thread can be killed, and the same command may come again at once."""
    command = begin(cluster)
    os.kill(command.pid, number)
    command.join(60)
    assert command.exitcode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert ("Interrupted after 0 of 2 runs" in Path("log").read_text()) == (number == signal.SIGINT)
    finish(cluster)
    assert len(list(Path().glob("ended-*-CancelledError"))) == 2
    assert runs_in("two") == (runs_in("one")[0], [1, 1])


def test_nothing_of_a_cluster_on_this_machine_is_left():
    """The command is killed in the middle. Its worker has a process of its own, as a loader has."""
    loader = "subprocess.Popen(['sleep', '60']) if trainer.global_step else None\n            while"
    Path("own.py").write_text(OWN.replace("while", loader).replace("import os,", "import os, subprocess,"))
    Path("own.yaml").write_text(yaml.safe_dump({"methods": METHODS, "seeds": 1, "epochs": 4}))
    options = ["compare", "--config=own.yaml", "--cluster=local", "--jobs=1", "--output=two"]
    command = start_process(main, options, log="log")
    try:
        wait_for(lambda: list(Path().glob("waits-*")) or command.exitcode is not None, seconds=60)
        wait_for(lambda: len(children := psutil.Process(command.pid).children(recursive=True)) >= 3 and children)
        children = psutil.Process(command.pid).children(recursive=True)
        assert "sleep" in {child.name() for child in children}
    finally:
        command.kill()
    wait_for(lambda: not any(child.is_running() and child.status() != "zombie" for child in children), seconds=10)


def test_a_worker_that_is_lost_again_and_again_is_not_waited_for(monkeypatch):
    """Dask gives up a task that has ended four workers."""

    class Lost:
        def submit(self, function, *args, key):
            future = distributed.cfexecutor.cf.Future()
            future.set_exception(distributed.KilledWorker(key, None, 4))
            return future

        def shutdown(self, wait):
            pass

    local = distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None)
    monkeypatch.setattr(distributed.Client, "get_executor", lambda *_, **__: Lost())
    task = Task(Experiment("ERM", ERM), "", 3)
    with local, pytest.raises(WorkersLostError, match="one after the other in the training 'ERM, seed 3'"):
        list(make_runs([task], 1, local.scheduler_address))


@pytest.mark.usefixtures("no_pictures")
def test_a_cluster_of_a_yaml_file(monkeypatch):
    arguments = {"processes": False, "threads_per_worker": 1, "dashboard_address": None, "n_workers": 0}
    content = {"class_path": "distributed.LocalCluster", "init_args": arguments, "adapt": {"minimum": 0, "maximum": 1}}
    Path("mine.yaml").write_text(yaml.safe_dump(content))
    folder = os.getcwd()
    (run,) = compare("ERM", seeds=1, epochs=1, cluster="mine.yaml", keep_weights=True)
    assert run.accuracy == compare("ERM", seeds=1, epochs=1, output=Path("one"))[0].accuracy
    assert Path(run.weights).is_file()
    assert os.getcwd() == folder
    # A resource that no worker has is waited for; here, the scheduler would wait for ever.
    asked = []
    monkeypatch.setattr(distributed.Client, "get_executor", lambda *_, **options: asked.append(options) or Made())
    content |= {"resources": {"GPU": 1}, "scale": 1}
    del content["adapt"]
    Path("mine.yaml").write_text(yaml.safe_dump(content))
    compare("ERM", seeds=2, epochs=1, cluster="mine.yaml")
    assert [options["resources"] for options in asked] == [{"lightning-ssesam training": 1, "GPU": 1}]


class Made:
    """It knows the runs without training."""

    def submit(self, *_, key):
        future = distributed.cfexecutor.cf.Future()
        future.set_result(made_up("ERM", int(key.partition("seed ")[2][0])))
        return future

    def shutdown(self, wait):
        pass


@pytest.mark.usefixtures("no_pictures")
def test_a_cluster_that_a_job_scheduler_makes(monkeypatch):
    """SLURM's two commands start and end a shell script on this machine. The rest is dask-jobqueue."""
    scripts = {
        "sbatch": 'cp "$1" "$FOLDER/job.sh"; setsid sh "$FOLDER/job.sh" > "$FOLDER/job.log" 2>&1 < /dev/null &\n'
        'echo $! > "$FOLDER/job.pid"; echo "Submitted batch job $!"',
        "scancel": 'touch "$FOLDER/cancelled"; kill -TERM -- "-$1"',
    }
    for name, text in scripts.items():
        path = Path(name)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("FOLDER", os.getcwd())
    monkeypatch.setenv("PATH", f"{os.getcwd()}{os.pathsep}{os.environ['PATH']}")
    content = {
        "class_path": "dask_jobqueue.SLURMCluster",
        "init_args": {
            "cores": 1,
            "memory": "8GB",
            "local_directory": os.getcwd(),
            "worker_extra_args": ["--resources", "GPU=1"],
            "scheduler_options": {"dashboard": False, "host": "127.0.0.1"},
        },
        "scale": 1,
    }
    Path("slurm.yaml").write_text(yaml.safe_dump(content))
    try:
        (run,) = compare("ERM", seeds=1, epochs=1, cluster="slurm.yaml")
    finally:
        with suppress(ProcessLookupError, FileNotFoundError):
            os.killpg(int(Path("job.pid").read_text()), signal.SIGKILL)
    assert run.accuracy == compare("ERM", seeds=1, epochs=1, output=Path("one"))[0].accuracy
    assert "--resources GPU=1" in Path("job.sh").read_text()
    assert Path("cancelled").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("here", "Expected argument `cluster` to be 'local', an address such as tcp://scheduler:8786, a scheduler"),
        ("slurm.yaml", "(.json), or a YAML file, but got 'slurm.yaml', and there is no such file"),
        ("tcp://127.0.0.1:1", "to be a scheduler that can be reached, but got 'tcp://127.0.0.1:1' (Timed out"),
        ("no://127.0.0.1:1", "to be a scheduler that can be reached, but got 'no://127.0.0.1:1' (unknown address"),
        ("list.yaml", "to be a YAML file with class_path and any of init_args, scale, adapt, resources, but got 'list"),
        ("wrong.yaml", "but got 'wrong.yaml' with class_path, workers"),
        ("broken.yaml", "but got 'broken.yaml' (while parsing a flow"),
        (
            "unknown.yaml",
            "to be a YAML file of a cluster that can be made, but got 'unknown.yaml' (ModuleNotFoundError",
        ),
        ("arguments.yaml", "'arguments.yaml' (TypeError: "),
    ],
)
def test_a_cluster_that_cannot_be_had_is_refused(given, message, monkeypatch, capsys):
    monkeypatch.setattr(module, "_PATIENCE", 0.5)
    contents = {
        "list": ["a"],
        "wrong": {"class_path": "distributed.LocalCluster", "workers": 3},
        "unknown": {"class_path": "nowhere.Cluster"},
        "arguments": {"class_path": "distributed.LocalCluster", "init_args": {"n_worker": 3, "processes": False}},
    }
    for name, content in contents.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(content))
    Path("broken.yaml").write_text("{")
    with pytest.raises(SystemExit) as stop:
        main(["compare", f"--cluster={given}", "--epochs=1", "--seeds=1", "--methods=ERM"])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    # Only what a class raises is known when the display is there.
    assert printed.count("\n") == (3 if given == "arguments.yaml" else 1)
    assert not Path("comparison/results.csv").exists()


def test_without_a_cluster_no_package_of_one_is_imported():
    options = ["compare", "--methods=ERM", "--seeds=1", "--epochs=1", "--jobs=1"]
    process = start_process(main_without, {"distributed", "dask"}, options, log="log")
    process.join(60)
    assert process.exitcode == 0, Path("log").read_text()


def test_a_package_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, module.__name__)
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--cluster=local"])
    assert stop.value.code == 2
    assert "`--cluster` needs the package 'distributed'. Install it: pip install 'lightning-ssesam[cluster]'" in (
        capsys.readouterr().err
    )


def test_workers_of_another_version_are_refused(cluster, monkeypatch):
    facts = module._facts() | {"torch": "1.0"}
    compare_facts = module._compare
    monkeypatch.setattr(module, "_compare", lambda found, _, address: compare_facts(found, facts, address))
    with pytest.raises(ArgumentError, match=r"The worker tcp://\S+ has torch .*, and this command 1\.0\. Results of"):
        compare("ERM", seeds=1, epochs=1, cluster=cluster.address)


def test_weights_need_a_folder_that_workers_share(tmp_path):
    from lightning_ssesam.experiments.weights import KeepWeights

    task = Task(Experiment("ERM", ERM, callbacks=[KeepWeights(tmp_path / "no" / "weights" / "a" / "0.ckpt")]), "", 0)
    with pytest.raises(ArgumentError, match=r"`keep_weights` to be False where machines .* has no '.*/no/weights'"):
        task.run()
