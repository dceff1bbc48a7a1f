"""What `compare` shows while it trains: epochs of all trainings, in one process and in several."""

import io
import math
import multiprocessing
import os
import sys
import time
from functools import partial

import pytest
from helpers import STRICT
from lightning.pytorch.callbacks import EarlyStopping

from lightning_ssesam import ERM
from lightning_ssesam.experiments import progress
from lightning_ssesam.experiments.jobs import Task, make_runs
from lightning_ssesam.experiments.progress import EpochEnd, Progress, listen, received, send_through, shown
from lightning_ssesam.models import SmallConvNet
from lightning_ssesam.runs import Experiment

pytestmark = STRICT

SMALL = partial(SmallConvNet, width=8)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def seen(monkeypatch):
    """The states of every bar: what is counted, and what is shown beside."""
    states = []

    class Bar:
        def __init__(self, total, **options):
            self.n, self.total, self.text = 0, total, ""
            states.append(self.state)

        @property
        def state(self):
            return self.n, self.total, self.text

        def set_postfix_str(self, text, refresh):
            assert not refresh
            self.text = text

        def update(self, number):
            self.n += number
            states.append(self.state)

        def close(self):
            pass

    monkeypatch.setattr(progress, "tqdm", Bar)
    return states


def tasks(seeds=1, **kwargs):
    experiment = Experiment("a", ERM, **{"backbone": SMALL, "epochs": 3, **kwargs})
    return [Task(experiment, "", seed) for seed in range(seeds)]


def test_every_epoch_counts_with_the_best_accuracy_so_far(seen):
    runs = list(make_runs(tasks(2), 1))
    expected, count = [(0, 6, "")], 0
    for run in runs:
        for epoch in range(3):
            best, count = 100 * max(run.curves["all"][: epoch + 1]), count + 1
            expected.append((count, 6, f"a, seed {run.seed}: epoch {epoch + 1}/3, best validation {best:.1f} %"))
        # The end of a training adds what is missing.
        expected.append((count, 6, expected[-1][2]))
    assert seen == expected
    assert progress._listener is None


def test_a_training_that_stops_early_counts_as_a_whole(seen):
    stop = EarlyStopping("val/loss", patience=1, mode="max", stopping_threshold=-1.0)
    list(make_runs(tasks(2, epochs=40, callbacks=[stop]), 1))
    # It stops after the first epoch, as the threshold is reached.
    assert [count for count, *_ in seen] == [0, 1, 40, 41, 80]


def test_reports_change_no_result(monkeypatch):
    (task,) = tasks()
    (watched,) = make_runs([task], 1)
    alone = task.experiment.run(0)
    assert watched.curves == alone.curves
    assert watched.class_recalls == alone.class_recalls


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(monkeypatch):
    for stream, longest in ((Terminal(), None), (io.StringIO(), 3)):
        monkeypatch.setattr(sys, "stderr", stream)
        with shown(10, 100) as display:
            for seed in range(10):
                for epoch in range(100):
                    display.show(EpochEnd(f"a, seed {seed}", epoch + 1, 100, 0.5))
                display.finish(f"a, seed {seed}")
        text = stream.getvalue()
        assert "1000/1000" in text
        assert "a, seed 9: epoch 100/100, best validation 50.0 %" in text
        if longest:
            assert "\r" not in text
            assert 1 <= len(text.splitlines()) <= longest
        else:
            assert "\r" in text


def test_lines_come_at_intervals(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress, "_BETWEEN_LINES", 0.1)
    with shown(1, 1000) as display:
        end = time.monotonic() + 0.65
        while time.monotonic() < end:
            display.show(EpochEnd("a", int(1000 * (0.65 - end + time.monotonic())), 1000, math.nan))
            time.sleep(0.002)
    lines = sys.stderr.getvalue().splitlines()
    assert 3 <= len(lines) <= 9
    # A line has the time that is left for all trainings, and the training.
    assert all("<" in line and line.endswith("]") for line in lines)
    assert "a: epoch" in lines[-1]
    assert "best" not in lines[-1]


def test_nothing_is_shown_if_nothing_is_to_be_made(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(make_runs([], 3)) == []
    assert sys.stderr.getvalue() == ""


@pytest.mark.skipif(os.name != "posix", reason="needs pipes that do not block")
def test_a_training_never_waits_for_the_display():
    """Nobody reads, and then nobody is there."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    try:
        send_through(sender)
        end = EpochEnd("x" * 10_000, 1, 2, 0.5)
        start = time.perf_counter()
        for _ in range(5000):
            progress._listener(end)
        assert time.perf_counter() - start < 2
        arrived = list(received(receiver))
        assert 100 < len(arrived) < 5000
        # Each of them is whole.
        assert set(arrived) == {end._replace(training="x" * 200)}
        receiver.close()
        progress._listener(end)
    finally:
        listen(None)


def test_reports_take_next_to_no_time():
    receiver, sender = multiprocessing.Pipe(duplex=False)
    display = Progress(1, 10_000)
    try:
        send_through(sender)
        start = time.perf_counter()
        for epoch in range(1000):
            progress._listener(EpochEnd("a", epoch, 10_000, 0.5))
            for end in received(receiver):
                display.show(end)
        # Less than 2 ms an epoch, on a machine that has other things to do.
        assert time.perf_counter() - start < 2
    finally:
        listen(None)
        display.close()
