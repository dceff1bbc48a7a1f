"""Many small calls at a time: their order, and what is taken from an iterator."""

import threading
import time

import pytest

from lightning_ssesam.data import threads
from lightning_ssesam.data.threads import in_threads


@pytest.mark.parametrize("number", [0, 1, 256, 257, 40_000])
def test_results_come_in_order(number):
    seen = set()

    def square(item):
        seen.add(threading.get_ident())
        return item * item

    assert list(in_threads(square, iter(range(number)))) == [item * item for item in range(number)]
    assert (len(seen) > 1) == (number > 10_000) or number == 257


def test_calls_wait_at_the_same_time(monkeypatch):
    monkeypatch.setattr(threads, "_CHUNK", 4)
    start = time.perf_counter()
    assert sum(in_threads(lambda item: time.sleep(0.02) or item, range(64))) == sum(range(64))
    # One after the other, they would take 1.28 s.
    assert time.perf_counter() - start < 0.9


def test_few_items_are_held(monkeypatch):
    monkeypatch.setattr(threads, "_CHUNK", 2)
    monkeypatch.setattr(threads, "_BLOCK", 8)
    taken = []
    results = in_threads(str, (taken.append(number) or number for number in range(100)))
    assert [next(results) for _ in range(3)] == ["0", "1", "2"]
    assert len(taken) == 8


def test_an_error_ends_the_calls():
    def fail(item):
        if item == 20_000:
            raise OSError("gone")
        return item

    with pytest.raises(OSError, match="gone"):
        list(in_threads(fail, range(30_000)))
