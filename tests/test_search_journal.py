"""The journal of a search after kills, full disks and other accidents."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

import optuna
import pytest
import torch
import yaml
from helpers import STRICT

from lightning_ssesam.experiments import search_storage
from lightning_ssesam.experiments.files import locked
from lightning_ssesam.experiments.refusals import without_traceback
from lightning_ssesam.runs import GROUPS, Experiment
from lightning_ssesam.sweep import sweep

pytestmark = STRICT

JOURNAL = Path("sweep/journal.log")
search = partial(sweep, methods="SAM", epochs=1, prune=False)


class Trained:
    """Replaces trainings, which take a moment."""

    max_epochs, current_epoch = 1, 0

    def __init__(self, seconds):
        self.seconds, self.radii = seconds, []

    def fit(self, experiment, seed, callbacks):
        time.sleep(self.seconds)
        rho = experiment.objective().rho
        self.radii.append(rho)
        values = {f"val/acc_{group}": torch.tensor(0.9 - rho) for group in GROUPS}
        self.callback_metrics = {"train/loss": 0.5, **values}
        callbacks[0].on_train_epoch_end(self, None)
        callbacks[0].on_train_end(self, None)


@pytest.fixture
def trained(monkeypatch):
    made = Trained(0.0)
    monkeypatch.setattr(Experiment, "fit", lambda *args: made.fit(*args))
    return made


def test_the_beginning_is_what_optuna_writes_first(tmp_path):
    journal = tmp_path / "journal.log"
    backend = optuna.storages.journal.JournalFileBackend(str(journal))
    optuna.create_study(storage=optuna.storages.JournalStorage(backend))
    assert json.loads(journal.read_text().splitlines()[0])["op_code"] == search_storage._CREATE_STUDY


def states():
    backend = optuna.storages.journal.JournalFileBackend(str(JOURNAL))
    study = optuna.load_study(study_name="SAM", storage=optuna.storages.JournalStorage(backend))
    return [trial.state.name for trial in study.trials]


def test_a_journal_that_was_cut_anywhere_goes_on(trained, capsys):
    """After the first line, which makes the study."""
    search(trials=2)
    whole = JOURNAL.read_bytes()
    generator = random.Random(0)
    for _ in range(8):
        cut = generator.randrange(1, len(whole))
        JOURNAL.write_bytes(whole[:cut])
        capsys.readouterr()
        search(trials=2)
        printed = capsys.readouterr().out
        is_complete = whole[:cut].endswith((b"\n", b"}"))
        try:
            json.loads(whole[:cut].splitlines()[-1])
        except ValueError:
            is_complete = False
        assert ("Dropped the last line of sweep/journal.log: it was cut off" in printed) == (not is_complete)
        assert states().count("COMPLETE") == 2


def test_no_trial_is_lost_if_only_the_end_of_its_line_is(trained):
    search(trials=2)
    JOURNAL.write_bytes(JOURNAL.read_bytes()[:-1])
    trained.radii.clear()
    search(trials=2)
    assert trained.radii == []


def test_zeros_after_a_loss_of_power_are_dropped(trained, capsys):
    search(trials=2)
    whole = JOURNAL.read_bytes()
    JOURNAL.write_bytes(whole + b"\0" * 100)
    search(trials=2)
    assert "Dropped the last line" in capsys.readouterr().out
    assert JOURNAL.read_bytes().startswith(whole)


def lines_with(number, line):
    def damage(text):
        lines = text.splitlines(keepends=True)
        lines[number] = line
        return b"".join(lines)

    return damage


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lines_with(3, b'{"op_co\n'), "line 4 of {n} is damaged"),
        (lines_with(3, b'{"op_co{"op_code":1}\n'), "line 4 of {n} is damaged"),
        (lines_with(1, b"\xff\xfe\n"), "line 2 of {n} is damaged"),
        (lines_with(2, b"\n"), "line 3 of {n} is damaged"),
        (lines_with(2, b"[1, 2]\n"), "line 3 of {n} is damaged"),
        (lines_with(2, b'{"op_code":99}\n'), "Optuna cannot read it"),
        (lines_with(0, b""), "its beginning is missing"),
    ],
)
def test_a_damaged_journal_is_refused_in_one_line_and_left_alone(damage, reason, trained):
    search(trials=2)
    damaged = damage(JOURNAL.read_bytes())
    JOURNAL.write_bytes(damaged)
    before = Path("sweep/best.yaml").read_bytes()
    with pytest.raises(SystemExit) as stop, without_traceback():
        search(trials=2)
    text = str(stop.value)
    assert text.startswith("error: The search in 'sweep/journal.log' cannot go on (")
    assert reason.format(n=len(damaged.splitlines())) in text
    assert "move it away: the search then begins anew." in text
    assert "\n" not in text
    assert JOURNAL.read_bytes() == damaged
    assert Path("sweep/best.yaml").read_bytes() == before
    # The way out.
    JOURNAL.rename("journal.bak")
    search(trials=2)
    assert states() == ["COMPLETE"] * 2


def test_a_journal_that_cannot_be_read_is_refused(trained):
    JOURNAL.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"'sweep/journal.log' cannot go on \(Is a directory\)"):
        search(trials=1)


def test_a_lock_of_a_killed_command_is_said_and_removed(trained, capsys):
    search(trials=1)
    locks = [Path("sweep/journal.log.lock"), Path("sweep/journal.log.lock1234.rename")]
    for lock in locks:
        lock.touch()
    start = time.monotonic()
    search(trials=2)
    # Optuna would wait for 30 seconds.
    assert time.monotonic() - start < 20
    assert "Removed sweep/journal.log.lock: the command that held this lock has ended." in capsys.readouterr().out
    assert not any(lock.exists() for lock in locks)
    assert len(trained.radii) == 2


def test_a_second_search_is_kept_out_of_the_folder(trained):
    search(trials=1)
    journal = JOURNAL.read_bytes()
    with locked(Path("sweep")), pytest.raises(ValueError, match="Another command is at work in 'sweep'"):
        search(trials=2)
    assert JOURNAL.read_bytes() == journal
    search(trials=2)


def finished_trials():
    """The values of the trials that the journal holds."""
    lines = JOURNAL.read_text().splitlines() if JOURNAL.exists() else []
    return [json.loads(line)["values"] for line in lines if '"values":[' in line and line.endswith("}")]


def _search_slowly(trials):
    made = Trained(0.02)
    Experiment.fit = lambda *args: made.fit(*args)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (the process is killed)
    search(trials=trials)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_killed_ten_times_at_random(trained):
    """Every file is whole after each kill, no finished trial is lost, and the result is that of all trials."""
    generator, finished = random.Random(0), []
    for _ in range(10):
        process = multiprocessing.get_context("fork").Process(target=_search_slowly, args=(1000,))
        process.start()
        while process.is_alive() and len(finished_trials()) <= len(finished):
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        done = finished_trials()
        assert done[: len(finished)] == finished
        finished = done
    assert len(finished) >= 10
    search(trials=len(finished) + 2)
    # A kill may come after a trial is written and before Optuna has counted it, so none is made twice.
    assert len(trained.radii) <= 2
    assert states().count("COMPLETE") == len(finished) + 2
    assert "RUNNING" not in states()
    best = max(value for (value,) in finished)
    found = yaml.safe_load(Path("sweep/best.yaml").read_text())["sam_rho"]
    assert 0.9 - found == pytest.approx(max(best, 0.9 - min(trained.radii, default=1.0)), abs=1e-3)
    assert not list(Path("sweep").glob(".*-*"))
