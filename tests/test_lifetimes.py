"""Processes that end with the one that started them: real ones, really killed."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import STRICT, running, wait_for
from lightning.pytorch.utilities.exceptions import SIGTERMException

import lightning_ssesam.experiments
from lightning_ssesam.cli import main
from lightning_ssesam.experiments import lifetimes
from lightning_ssesam.experiments.lifetimes import Terminated, ended_in_order, interruption
from lightning_ssesam.runs import Experiment

pytestmark = [STRICT, pytest.mark.skipif(os.name != "posix", reason="needs process groups")]

# It imports the file alone, because torch and Lightning would take seconds in each of its processes. During a long call
# of a function in C, no Python code runs in a process: no other thread, and no handler of a signal.
PROGRAM = f"""
import multiprocessing, os, subprocess, sys, time
from pathlib import Path

sys.path.insert(0, {str(Path(lightning_ssesam.experiments.__file__).parent)!r})
import lifetimes

def note(pid):
    Path(f"{{pid}}.pid").touch()

def stuck():
    note(os.getpid())
    sum(range(10**12))

def train(number):
    note(subprocess.Popen(["sleep", "60"]).pid)
    multiprocessing.get_context("fork").Process(target=stuck).start()
    stuck()

def pool():
    with lifetimes.bound_processes(2, str) as executor:
        futures = [executor.submit(train, number) for number in range(2)]
        while len(list(Path().glob("*.pid"))) < 6:
            time.sleep(0.01)
        Path("ready").touch()
        if "raise" in sys.argv:
            raise RuntimeError("the disk is full")
        futures[0].result()

def alone():
    children = [multiprocessing.get_context("fork").Process(target=stuck, daemon=True) for _ in range(2)]
    for child in children:
        child.start()
    while len(list(Path().glob("*.pid"))) < 2:
        time.sleep(0.01)
    Path("ready").touch()
    time.sleep(60)

if __name__ == "__main__":
    try:
        with lifetimes.ended_in_order():
            pool() if "pool" in sys.argv else alone()
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.fixture
def start():
    """Starts a command in a session of its own, of which nothing is left after the test."""
    started = []

    def begin(*command, **options):
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **options}
        started.append(subprocess.Popen([sys.executable, *command], start_new_session=True, **options))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()
        for path in Path().glob("*.pid"):
            with suppress(ProcessLookupError):
                os.kill(int(path.stem), signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL, None])
def test_a_pool_ends_with_its_parent(number, start):
    """Workers that hold Python's lock in a C call, with a process and a forked process of their own."""
    Path("program.py").write_text(PROGRAM)
    process = start("program.py", "pool", *(["raise"] if number is None else []))
    wait_for(Path("ready").exists)
    if number is not None:
        assert len(running(process.pid)) >= 9  # The parent; of two workers each itself, its two, and its guard.
        process.send_signal(number)
    expected = {None: 1, signal.SIGKILL: -signal.SIGKILL}
    assert process.wait(20) == expected.get(number, 128 + (number or 0))
    wait_for(lambda: not running(process.pid), seconds=3)


@pytest.mark.parametrize("moment", [0, 0.02, 0.05, 0.1, 0.2])
def test_workers_that_are_starting_end_with_their_parent(moment, start):
    """Before they know that they have to."""
    Path("program.py").write_text(PROGRAM)
    process = start("program.py", "pool")
    wait_for(lambda: len(running(process.pid)) >= 2)
    time.sleep(moment)
    process.kill()
    process.wait(20)
    wait_for(lambda: not running(process.pid), seconds=5)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no signal at the death of a parent")
@pytest.mark.parametrize("what", ["the parent is stopped", "the guards are killed"])
def test_a_pool_ends_with_its_parent_also_if(what, start):
    """As by Ctrl-Z, and as where memory is short."""
    Path("program.py").write_text(PROGRAM)
    process = start("program.py", "pool")
    wait_for(Path("ready").exists)
    if what == "the parent is stopped":
        process.send_signal(signal.SIGSTOP)
    else:
        listed = subprocess.run(
            ["ps", "-A", "-o", "sess=,pid=,args="], capture_output=True, text=True, check=True
        ).stdout
        lines = [line.split(None, 2) for line in listed.splitlines() if " -I -S -c" in line]
        guards = [int(pid) for session, pid, _ in lines if session == str(process.pid)]
        assert guards
        for pid in guards:
            os.kill(pid, signal.SIGKILL)
    process.kill()
    process.wait(20)
    # The workers and their forks. Without a guard, another program that a worker has started goes on.
    programs = ("sleep",) if what == "the guards are killed" else ()
    wait_for(lambda: all(command.split()[0] in programs for command in running(process.pid)), seconds=5)


def test_a_pool_ends_with_its_terminal(start):
    """The window is closed: the program gets SIGHUP, and its output an error."""
    Path("program.py").write_text(PROGRAM)
    screen, terminal = os.openpty()
    process = start(
        "-c",
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        " os.execv(sys.executable, [sys.executable, 'program.py', 'pool'])",
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    try:
        wait_for(Path("ready").exists)
    finally:
        os.close(screen)
    process.wait(20)
    wait_for(lambda: not running(process.pid), seconds=5)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no signal at the death of a parent")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_forked_processes_end_with_their_parent(number, start):
    """As the workers of a DataLoader, of which torch looks after its parent between two batches."""
    Path("program.py").write_text(PROGRAM)
    process = start("program.py")
    wait_for(Path("ready").exists)
    assert len(running(process.pid)) == 3
    process.send_signal(number)
    assert process.wait(20) == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    wait_for(lambda: not running(process.pid), seconds=3)


@pytest.fixture
def _own_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-ssesam"])


@pytest.mark.usefixtures("_own_arguments")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
@pytest.mark.parametrize("command", ["compare", "sweep"])
def test_a_signal_ends_a_command_with_its_status(command, number, status, monkeypatch, capsys):
    def end(self, *_):
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr(Experiment, "run" if command == "compare" else "fit", end)
    with pytest.raises(SystemExit) as stop:
        main([command, "--epochs=1", *(["--jobs=1", "--methods=ERM"] if command == "compare" else ["--trials=1"])])
    assert stop.value.code == status
    assert "Interrupted" in capsys.readouterr().out
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)] == [signal.SIG_DFL] * 2


def test_signals_that_are_ignored_or_handled_stay_so():
    """As SIGHUP under `nohup`."""
    seen = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGTERM, lambda n, _: seen.append(n))
    try:
        with ended_in_order():
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM]
    finally:
        for number, handler in zip((signal.SIGHUP, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)


def test_a_second_signal_does_not_cut_off_the_end():
    def end_slowly():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            Path("finished").touch()

    with pytest.raises(Terminated) as stop, ended_in_order():
        end_slowly()
    assert stop.value.code == 143
    assert Path("finished").exists()


@pytest.mark.parametrize(
    ("error", "expected"), [(KeyboardInterrupt(), None), (SystemExit(1), None), (SIGTERMException(), 143)]
)
def test_what_ends_the_program_after_an_interrupt(error, expected):
    """Lightning raises the second one at an interrupt, and the third one at SIGTERM, with a status of success."""
    found = interruption(error)
    assert isinstance(found, KeyboardInterrupt) if expected is None else found.code == expected


@pytest.mark.usefixtures("_own_arguments")
def test_sigterm_ends_fit_with_its_status(monkeypatch):
    def end(*_, **__):
        raise SIGTERMException

    monkeypatch.setattr("lightning.pytorch.Trainer.fit", end)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config=digits_lt", "--trainer.accelerator=cpu"])
    assert stop.value.code == 143


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no signal at the death of a parent")
def test_forks_are_bound_while_a_command_runs_alone():
    """What is forked later may outlive the thread that has forked it, as before."""
    with ended_in_order():
        assert lifetimes._forks_are_bound
    assert not lifetimes._forks_are_bound
