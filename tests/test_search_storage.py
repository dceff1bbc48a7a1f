"""Searches that several processes share: on a journal, SQLite and PostgreSQL, with kills, races and wrong addresses."""

import csv
import multiprocessing
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import torch
import yaml
from helpers import STRICT
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

from lightning_ssesam.cli import main
from lightning_ssesam.experiments import figures, search_database, search_place, search_storage, search_turns
from lightning_ssesam.experiments.files import locked
from lightning_ssesam.experiments.fingerprint import digest
from lightning_ssesam.experiments.search_database import Database
from lightning_ssesam.experiments.search_place import Place
from lightning_ssesam.experiments.search_storage import JournalLock
from lightning_ssesam.runs import GROUPS, Experiment
from lightning_ssesam.sweep import sweep

FORKS = pytest.mark.skipif(sys.platform != "linux", reason="forks")
pytestmark = [STRICT, pytest.mark.usefixtures("program_name")]

JOURNAL = "journal:shared.log"
FORK = multiprocessing.get_context("fork") if sys.platform == "linux" else None

search = partial(sweep, methods="SAM", epochs=1, prune=False, storage=JOURNAL)


class Trained:
    """Replaces trainings. Each is a line of the file `trained.txt`, which all processes write."""

    max_epochs, current_epoch = 1, 0

    def __init__(self, meanwhile=lambda: None, epochs=1):
        self.meanwhile, self.max_epochs = meanwhile, epochs

    def fit(self, experiment, seed, callbacks):
        rho = experiment.objective().rho
        with Path("trained.txt").open("a") as file:
            file.write(f"{os.getpid()} {rho!r}\n")
        for epoch in range(self.max_epochs):
            self.current_epoch = epoch
            values = {f"val/acc_{group}": torch.tensor(0.9 - rho) for group in GROUPS}
            self.callback_metrics = {"train/loss": 0.5, **values}
            callbacks[0].on_train_epoch_end(self, None)
            self.meanwhile()
        callbacks[0].on_train_end(self, None)


@pytest.fixture
def replaced(monkeypatch):
    """Replaces trainings by one that takes no time, or does something meanwhile. Data and pictures are not made."""

    def prepare(candidates, recipe, metric):
        return SimpleNamespace(settings={c.name: digest([c.name, vars(recipe)]) for c in candidates}, remarks=["Data."])

    def draw(found):
        return SimpleNamespace(savefig=lambda path, dpi: path.write_text(repr(sorted(found))))

    monkeypatch.setattr("lightning_ssesam.experiments.sweep._prepare", prepare)
    monkeypatch.setattr(figures, "draw_sweep", draw)

    def replace(*args, **kwargs):
        made = Trained(*args, **kwargs)
        monkeypatch.setattr(Experiment, "fit", lambda *args: made.fit(*args))

    replace()
    return replace


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(search_turns, "_BETWEEN_LOOKS", 0.02)


def trained():
    """The process and the radius of each training."""
    lines = Path("trained.txt").read_text().split() if Path("trained.txt").exists() else []
    return list(zip(map(int, lines[::2]), map(float, lines[1::2]), strict=True))


def rows(folder="sweep"):
    with Path(folder, "trials.csv").open() as file:
        return list(csv.DictReader(file))


def study_of(storage=JOURNAL):
    """The study as another process reads it."""
    with Place(Path("other"), storage).opened() as opened:
        return optuna.load_study(study_name="SAM", storage=opened)


@pytest.fixture
def other(replaced):
    """A search that begins with a trial, and its study as another process has it."""
    Path("other").mkdir()
    search(trials=1)
    Path("trained.txt").unlink()
    return study_of()


def begin(**arguments):
    """Start a search in another process, which is a fork of this one."""

    def run():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (the process may be killed)
        search(**arguments)

    process = FORK.Process(target=run)
    process.start()
    return process


def make(study, trial, value):
    """Make a trial in the place of another process."""
    trial.suggest_float("sam_rho", 0.01, 0.5, log=True)
    for step in range(10):
        trial.report(value, step)
    for group in GROUPS:
        trial.set_user_attr(group, value)
    study.tell(trial, value)


def await_(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def drawn(number):
    """What the sampler of a trial draws, while it draws at random."""
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=number))
    return study.ask().suggest_float("sam_rho", 0.01, 0.5, log=True)


# Several processes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def postgres():
    """The folder of a PostgreSQL server without a port. Its user is `searcher`, whose password is `s3cr:t@pg`."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    programs = found[-1].parent if found else Path(shutil.which("initdb") or "missing").parent
    user = "postgres" if os.getuid() == 0 else None
    has_user = user is None or any(entry.pw_name == user for entry in pwd.getpwall())
    if not ((programs / "initdb").exists() and has_user):
        pytest.skip("needs PostgreSQL")
    pytest.importorskip("psycopg")
    # The path of a socket must be short, and the server does not run as root.
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    call = partial(subprocess.run, check=True, user=user, cwd=folder, stdout=subprocess.DEVNULL)
    try:
        (folder / "password").write_text("s3cr:t@pg\n")
        if user:
            for path in (folder, folder / "password"):
                shutil.chown(path, user)
        login = ["-U", "searcher", "--auth=scram-sha-256", f"--pwfile={folder}/password"]
        call([programs / "initdb", "-D", "data", *login, "--no-sync"])
        options = f"-k {folder} -c listen_addresses='' -c fsync=off"
        call([programs / "pg_ctl", "-D", "data", "-o", options, "-l", "log", "-w", "start"])
        yield folder, partial(call, [programs / "pg_ctl", "-D", "data", "-m", "immediate", "stop"])
    finally:
        if (folder / "data" / "postmaster.pid").exists():
            call([programs / "pg_ctl", "-D", "data", "-m", "immediate", "stop"])
        shutil.rmtree(folder)


@pytest.fixture(params=["journal", "sqlite", "postgresql"])
def storage(request):
    if request.param == "postgresql":
        folder, _ = request.getfixturevalue("postgres")
        return f"postgresql://searcher:s3cr%3At%40pg@/postgres?host={folder}"
    return {"journal": JOURNAL, "sqlite": "sqlite:///shared.db"}[request.param]


@FORKS
def test_two_processes_make_each_trial_once(storage, replaced):
    # The first training of each process waits for that of the other.
    replaced(lambda: await_(lambda: len({pid for pid, _ in trained()}) == 2))
    processes = [begin(trials=3, storage=storage, output=Path(name)) for name in ("a", "b")]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    # Both took part, and no trial was made twice. Each number draws by its own seed, whoever makes it.
    assert {pid for pid, _ in trained()} == {process.pid for process in processes}
    assert sorted(rho for _, rho in trained()) == sorted(map(drawn, range(3)))
    assert [float(row["sam_rho"]) for row in rows("a")] == [drawn(number) for number in range(3)]
    assert {row["state"] for row in rows("a")} == {"complete"}
    for name in ("trials.csv", "best.yaml", "sweep.png"):
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes()
    best = min(rho for _, rho in trained())
    assert yaml.safe_load(Path("a/best.yaml").read_text())["sam_rho"] == float(f"{best:.4g}")
    # A third one finds nothing to do, and has all results.
    assert search(trials=3, storage=storage, output=Path("c"))["SAM"]["sam_rho"] == float(f"{best:.4g}")
    assert len(trained()) == 3
    assert Path("c/trials.csv").read_bytes() == Path("a/trials.csv").read_bytes()


@FORKS
@pytest.mark.parametrize("is_here", [True, False])
def test_the_trial_of_a_killed_process_is_made_again(is_here, replaced, monkeypatch, capsys):
    """At once if it ran on this machine; elsewhere when its beats have stopped."""
    if not is_here:
        monkeypatch.setattr(search_turns, "_system", lambda: None)
        monkeypatch.setattr(search_turns, "_SILENT", 0.3)
    # Its reports are written: a process that is killed while it writes leaves a lock.
    replaced(lambda: (Path("asleep").touch(), time.sleep(60)))
    killed = begin(trials=3, output=Path("killed"))
    await_(Path("asleep").exists)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    replaced()
    start = time.monotonic()
    search(trials=3)
    # On this machine, nobody waits two minutes for the beats of a process that has ended.
    assert time.monotonic() - start < 60
    assert f"SAM trial 0 is made again: process {killed.pid} on " in capsys.readouterr().out
    radii = [rho for _, rho in trained()]
    assert len(radii) == 4
    assert radii.count(radii[0]) == 2
    assert [row["state"] for row in rows()].count("complete") == 3
    assert [row["state"] for row in rows()].count("fail") == 1
    assert "running" not in [row["state"] for row in rows()]


@FORKS
def test_a_process_waits_for_the_trials_of_others_and_leaves_them_alone(replaced, monkeypatch, capsys):
    """A training that takes longer than the silence of a lost process is not made again: it beats."""
    monkeypatch.setattr(search_turns, "_system", lambda: None)
    monkeypatch.setattr(search_turns, "_SILENT", 0.5)
    monkeypatch.setattr(search_turns, "_BETWEEN_BEATS", 0.05)
    replaced(lambda: time.sleep(1.2))
    slow = begin(trials=1, output=Path("slow"))
    await_(trained)
    search(trials=1)
    slow.join()
    assert [pid for pid, _ in trained()] == [slow.pid]
    assert [row["state"] for row in rows()] == ["complete"]
    text = f"No trial is left to begin. Waiting for SAM trial 0 (process {slow.pid} on "
    assert text in " ".join(capsys.readouterr().out.split())


def test_a_last_trial_that_two_processes_take_at_once_is_made_once(other, replaced, monkeypatch):
    ask, taken = optuna.Study.ask, []

    def ask_too_late(study):
        if study is not other and len(study.trials) == 1:
            taken.append(ask(other))
        return ask(study)

    monkeypatch.setattr(optuna.Study, "ask", ask_too_late)
    # The other process ends its trial while this one waits.
    monkeypatch.setattr(search_turns.time, "sleep", lambda seconds: make(other, taken.pop(), 0.5))
    search(trials=2)
    assert trained() == []
    assert [trial.state.name for trial in study_of().trials] == ["COMPLETE", "COMPLETE", "FAIL"]
    # It was never begun.
    assert [row["state"] for row in rows()] == ["complete"] * 2
    # With more trials, the search goes on.
    search(trials=3)
    assert len(trained()) == 1
    assert [row["trial"] for row in rows()] == ["0", "1", "3"]


def test_a_process_that_was_silent_for_too_long_does_not_count(other, replaced, capsys):
    def be_given_up():
        if len(trained()) == 1:
            other.tell(1, state=optuna.trial.TrialState.FAIL)

    replaced(be_given_up)
    search(trials=2)
    assert "SAM trial 1 was made again: this process was silent for too long." in capsys.readouterr().out
    assert len(trained()) == 2
    assert [row["state"] for row in rows()] == ["complete", "fail", "complete"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit(143)])
def test_an_interrupted_process_gives_its_trial_back(error, other, replaced):
    def interrupt():
        raise error

    replaced(interrupt)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        search(trials=2)
    replaced()
    search(trials=2)
    assert len({rho for _, rho in trained()}) == 1
    assert [row["state"] for row in rows()] == ["complete", "fail", "complete"]


def test_an_error_of_a_training_ends_the_search_and_its_trial(other, replaced):
    def fail():
        raise RuntimeError("out of memory")

    replaced(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        search(trials=2)
    assert [trial.state.name for trial in study_of().trials] == ["COMPLETE", "FAIL"]


def test_trials_are_pruned_by_those_that_other_processes_make_meanwhile(replaced):
    Path("other").mkdir()

    def be_overtaken():
        study = study_of()
        if len(study.trials) == 1:
            for _ in range(5):
                make(study, study.ask(), 0.99)

    replaced(be_overtaken, epochs=10)
    search(trials=6, epochs=10, prune=True)
    # With gamma in the middle of its range, no trial is pruned before 68 % of the training.
    assert [row["state"] for row in rows()] == ["pruned"] + ["complete"] * 5
    assert len(study_of().trials[0].intermediate_values) == 7


def test_real_trainings_by_the_command_are_those_of_any_other_process():
    given = ["--methods=SAM", "--epochs=1", "--sam_rho=[0.1,0.2]", "--trainer.limit_train_batches=2", "--trials=2"]
    main(["sweep", *given, "--storage=sweep/mine.log"])
    trainer = {"limit_train_batches": 2}
    bounds = {"sam_rho": (0.1, 0.2)}
    search(trials=2, trainer=trainer, prune=True, storage="sqlite:///other/mine.db", output=Path("other"), **bounds)
    assert [row["state"] for row in rows()] == ["complete"] * 2
    assert rows() == rows("other")
    found = yaml.safe_load(Path("sweep/best.yaml").read_text())
    assert "storage" not in found
    assert 0.1 <= found["sam_rho"] <= 0.2


# Settings and folders --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"epochs": 2}, "`epochs`"),
        ({"seeds": 2}, "`seeds`"),
        ({"metric": "tail"}, "`metric`"),
        ({"sam_rho": (0.1, 0.2)}, "`sam_rho`"),
        ({"lr": (0.1, 0.2)}, "`lr`"),
        ({"tail_below": 20, "seeds": 3}, "`tail_below`, `seeds`"),
        ({"trainer": {"max_steps": 3}}, "`trainer`"),
    ],
)
def test_other_settings_are_refused_and_named(settings, names, other):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is compared)
        search(**{"trials": 2, **settings})
    assert str(caught.value) == (
        f"'journal:shared.log' holds a search of SAM with other settings ({names}). Use another `storage`, or the same"
        " settings in all commands."
    )
    assert trained() == []


def test_settings_of_another_command_that_began_at_the_same_moment_are_refused(other, replaced):
    replaced(lambda: other.set_user_attr("settings", other.user_attrs["settings"].replace(" all ", " tail ")))
    with pytest.raises(ValueError, match="with other settings \\(`metric`\\)"):
        search(trials=3)
    assert len(trained()) == 1


def test_a_search_that_has_its_folder_for_itself_keeps_shared_ones_out(replaced, monkeypatch):
    monkeypatch.setattr(search_place, "_BEGIN", 0.05)
    sweep(methods="SAM", epochs=1, trials=1)
    with locked(Path("sweep")):
        with pytest.raises(ValueError, match="Another command is at work in 'sweep'"):
            search(trials=1)
        with pytest.raises(ValueError, match=r"Another command is at work in 'sweep'.*another `storage`"):
            search(trials=1, output=Path("other"), storage="journal:sweep/journal.log")
    # It may be shared from now on, and alone again.
    search(trials=2, storage="journal:sweep/journal.log")
    sweep(methods="SAM", epochs=1, trials=3, prune=False)
    assert [row["state"] for row in rows()] == ["complete"] * 3


def test_a_search_alone_leaves_the_trials_of_a_shared_one_alone(replaced):
    def try_alone():
        with pytest.raises(ValueError, match=r"Other processes are at work on the search in 'sweep'\. Join them by"):
            sweep(methods="SAM", epochs=1, trials=2)

    replaced(try_alone)
    search(trials=1, storage="sweep/journal.log")
    assert [row["state"] for row in rows()] == ["complete"]


# The journal -----------------------------------------------------------------------------------------------------


def test_a_lock_and_half_a_line_of_a_killed_process_do_not_stop_the_others(other, replaced, monkeypatch, capsys):
    monkeypatch.setattr(search_storage, "_GRACE", 0.1)
    journal, whole = Path("shared.log"), Path("shared.log").read_bytes()

    def be_killed():
        if not Path("killed").exists():
            Path("killed").touch()
            with journal.open("ab") as file:
                file.write(b'{"op_code":8,"work')
            Path("shared.log.lock").touch()

    replaced(be_killed, epochs=2)
    search(trials=2)
    assert "Dropped the last line of shared.log" in capsys.readouterr().out
    assert [row["state"] for row in rows()] == ["complete"] * 2
    # What was written next is not lost.
    assert list(study_of().trials[1].intermediate_values) == [0, 1]
    assert journal.read_bytes().startswith(whole)
    assert not Path("shared.log.lock").exists()


def test_a_lock_that_others_take_in_turns_is_waited_for(monkeypatch):
    monkeypatch.setattr(search_storage, "_GRACE", 0.2)
    lock, path, end = JournalLock(Path("x.log")), Path("x.log.lock"), time.monotonic() + 0.6
    path.touch()

    def take_turns():
        while time.monotonic() < end:
            os.utime(path)
            time.sleep(0.02)
        path.unlink()

    others = threading.Thread(target=take_turns)
    others.start()
    assert lock.acquire()
    assert time.monotonic() >= end
    others.join()
    lock.release()
    assert not path.exists()


# Addresses -------------------------------------------------------------------------------------------------------

KINDS = "journal:PATH, a path that ends in .log, or the URL of a database"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("shared", f"to be {KINDS}, such as .* but got 'shared'"),
        ("", f"to be {KINDS}.* but got ''"),
        (3, f"to be {KINDS}.* but got 3"),
        ("journal:", f"to be {KINDS}.* but got 'journal:'"),
        ("redis://u:hunter2@host/1", f"to be {KINDS}.* but got 'redis://u:\\*\\*\\*@host/1'"),
        ("postgresql:/u:hunter2@host/x", f"to be {KINDS}.* but got 'postgresql:/u:\\*\\*\\*@host/x'"),
        ("u:hunter2@host/x", f"to be {KINDS}.* but got 'u:\\*\\*\\*@host/x'"),
        ("host=h password=hunter2", f"to be {KINDS}.* but got 'host=h password=\\*\\*\\*'"),
        ("postgresql://u:hunter2@host:port/x", f"to be {KINDS}.*"),
        ("postgresql://u:hun@ter2@host/x", "to be a URL with %40 for each @ of the password, but got another one"),
        ("journal:missing/x.log", "to be a file in a folder that exists, but got 'journal:missing/x.log'"),
        ("missing/x.log", "to be a file in a folder that exists, but got 'journal:missing/x.log'"),
        ("sqlite:///missing/x.db", "to be a file in a folder that exists, but got 'sqlite:///missing/x.db'"),
        ("sqlite://", "to be a database that other processes can reach, but got 'sqlite://'"),
        ("sqlite:///:memory:", "to be a database that other processes can reach"),
        (
            "mysql+missing_driver://u:hunter2@host/x",
            f"to be {KINDS}.* but got 'mysql\\+missing_driver://u:\\*\\*\\*@host/x'",
        ),
    ],
)
def test_a_wrong_address_is_refused_before_the_search(address, message, monkeypatch):
    monkeypatch.setattr(Experiment, "fit", lambda *args: pytest.fail("trained"))
    with pytest.raises(ValueError, match=f"Expected argument `storage` {message}") as caught:
        search(trials=1, storage=address)
    assert not {"hunter2", "hun", "ter2"} & set(str(caught.value).replace("@", ":").split(":"))
    assert "\n" not in str(caught.value)
    assert os.listdir() == []


@pytest.mark.parametrize("name", ["postgresql", "postgres", "postgresql+psycopg"])
def test_a_server_that_is_not_there_is_refused_in_one_line(name, free_port):
    pytest.importorskip("psycopg")
    address = f"{name}://u:hunter2@127.0.0.1:{free_port}/x"
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "--trials=1", f"--storage={address}"])
    text = str(stop.value)
    assert text.startswith("error: Expected argument `storage` to be a database that can be reached (connection failed")
    assert text.endswith(f"but got '{name}://u:***@127.0.0.1:{free_port}/x'.")
    assert "hunter2" not in text
    assert "\n" not in text
    assert not Path("sweep").exists()


@pytest.mark.parametrize(
    ("address", "module", "package"),
    [
        ("postgresql://u:hunter2@host/x", "psycopg", "psycopg[binary]"),
        ("postgresql+psycopg2://u:hunter2@host/x", "psycopg2", "psycopg2-binary"),
        ("mysql://u:hunter2@host/x", "pymysql", "pymysql"),
        ("mysql+mysqldb://u:hunter2@host/x", "MySQLdb", "mysqlclient"),
    ],
)
def test_a_missing_driver_is_named_with_its_package(address, module, package, monkeypatch):
    monkeypatch.setattr(search_database, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is compared)
        search(trials=1, storage=address)
    assert str(caught.value) == (
        f"Expected argument `storage` to be a database whose driver is installed (pip install '{package}'), but got"
        f" {address.replace('hunter2', '***')!r}."
    )


def test_any_driver_that_is_installed_will_do(monkeypatch):
    monkeypatch.setattr(search_database, "find_spec", lambda name: name == "psycopg2" or None)
    monkeypatch.setattr(search_database.Database, "_check_driver", lambda *args: None)
    assert Database("postgresql://host/x", "")._url.drivername == "postgresql+psycopg2"
    assert Database("postgresql+psycopg://host/x", "")._url.drivername == "postgresql+psycopg"


def test_a_password_with_braces_and_signs_reaches_the_database(monkeypatch):
    seen = []
    monkeypatch.setattr(Database, "_check_driver", lambda *args: None)
    monkeypatch.setattr(optuna.storages, "RDBStorage", lambda url, **kwargs: seen.append(url.format(SCHEMA_VERSION=1)))
    address = "postgresql+psycopg2://u:%7Ba%7D%25b@h/x{y}"
    Database(address, "").open()
    assert make_url(seen[0]) == make_url(address)
    assert (make_url(seen[0]).password, make_url(seen[0]).database) == ("{a}%b", "x{y}")


@pytest.mark.parametrize("secret", ["hunt er2", "hunt%20er2", "t0ken"])
def test_what_a_driver_says_is_shown_without_the_password(secret, monkeypatch):
    monkeypatch.setattr(Database, "_check_driver", lambda *args: None)
    database = Database("postgresql+psycopg2://u:hunt%20er2@h/x?sslpassword=t0ken", "")
    error = OperationalError("SELECT 1", {}, RuntimeError(f'missing "=" after "{secret}"\nin the address.'))
    with pytest.raises(ValueError) as caught, database.errors_named():  # noqa: PT011 (the text is compared)
        raise error
    assert str(caught.value) == (
        'The storage \'postgresql+psycopg2://u:***@h/x\' has failed (missing "=" after "***" in the address). Finished'
        " trials are kept, and the same command goes on."
    )
    assert caught.value.__suppress_context__


def test_the_password_is_nowhere_and_a_server_that_ends_loses_nothing(postgres, replaced, capfd):
    """The last test of this server."""
    folder, stop = postgres
    address = f"postgresql://searcher:s3cr%3At%40pg@/postgres?host={folder}"
    with pytest.raises(ValueError, match='password authentication failed for user "searcher"') as caught:
        search(trials=1, storage=address.replace("s3cr", "wr0ng"))
    assert "wr0ng" not in f"{caught.value}{caught.value.__cause__}"
    options = ["--methods=ImbSAM", "--trials=2", "--epochs=1", f"--storage={address}"]
    main(["sweep", *options])
    replaced(stop)
    with pytest.raises(SystemExit) as lost:
        main(["sweep", *options, "--trials=3"])
    assert str(lost.value).startswith("error: The storage 'postgresql://searcher:***@/postgres' has failed (")
    written = "".join(path.read_text(errors="replace") for path in Path("sweep").rglob("*") if path.is_file())
    assert "complete" in written
    printed = capfd.readouterr()
    everything = f"{written}{printed.out}{printed.err}{lost.value}"
    assert not [secret for secret in ("s3cr", "t@pg", "%40pg", "wr0ng") if secret in everything]
