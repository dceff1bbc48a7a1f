"""Measures what several trainings at a time gain on one GPU: steps a second of several processes together."""

import itertools
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any

import torch

from gpu_parts import contenders
from gpu_parts.results import write_json
from gpu_parts.settings import Settings, about, settings_of_child, silence

NETWORK, METHOD = "ResNet-32", "SSE-SAM stage 1"
NUMBERS = (1, 2, 4, 8)
SECONDS = 3.0
Rates = dict[tuple[str, int], float]
meeting: Barrier


def numbers(settings: Settings) -> tuple[int, ...]:
    """Return how many processes measure at a time."""
    return NUMBERS[:2] if settings.tiny else NUMBERS


def measure(index: int, settings: Settings) -> Rates:
    """Make steps whenever it is the turn of this process. All processes wait for one another before each turn.

    Returns:
        Steps a second, by the kind of training and the number of processes.
    """
    silence()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    starts, rates = contenders.makers(NETWORK, METHOD, settings), {}
    try:
        racing = {mode: starts[mode]() for mode in settings.modes}
        for contender in racing.values():
            contender.steps(8)
        for mode, number in itertools.product(racing, numbers(settings)):
            meeting.wait()
            if index < number:
                began, steps = time.time(), 0
                while time.time() - began < (SECONDS / 10 if settings.tiny else SECONDS):
                    steps += 5
                    racing[mode].steps(5)
                rates[mode, number] = steps / (time.time() - began)
        for contender in racing.values():
            contender.end()
    except BaseException:
        # The others would wait for this process.
        meeting.abort()
        raise
    return rates


def meet_at(barrier: Barrier) -> None:
    """Called when a process starts: note where it meets the others."""
    global meeting
    meeting = barrier


def add_up(found: list[Rates]) -> dict[str, dict[str, float]]:
    """Return the steps a second of all processes together, by kind and number of processes."""
    together: dict[str, dict[str, float]] = {}
    for mode, number in sorted({key for rates in found for key in rates}):
        total = sum(rates.get((mode, number), 0.0) for rates in found)
        together.setdefault(mode, {})[str(number)] = round(total, 2)
    return together


def main() -> None:
    """Measure in several processes, once for a GPU."""
    settings, _ = settings_of_child()
    known: dict[str, Any] = settings.found().get("sharing.json", {})
    if known.get("hardware") == about(settings)["hardware"]:
        print("measured already", flush=True)
        return
    size, context = max(numbers(settings)), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(size, context, initializer=meet_at, initargs=(context.Barrier(size),)) as executor:
        rates = add_up(list(executor.map(partial(measure, settings=settings), range(size))))
    result = {"network": NETWORK, "method": METHOD, "rates": rates, **about(settings)}
    write_json(Path(settings.output) / "sharing.json", result)


if __name__ == "__main__":
    main()
