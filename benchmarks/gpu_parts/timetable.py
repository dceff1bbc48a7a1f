"""When each process measures, if several of them share a GPU, and what their measurements add up to."""

from pathlib import Path
from typing import Any

from gpu_parts.results import read_json
from gpu_parts.settings import Settings

NUMBERS = (1, 2, 4, 8)
SECONDS = 3.0


def modes(settings: Settings) -> list[str]:
    """Return the kinds of trainings that are measured."""
    return ["eager", "graphs"] if settings.on_gpu else ["eager"]


def timetable(settings: Settings, start: float) -> list[tuple[str, int, float, float]]:
    """Return kind, number of processes, beginning and end of every measurement."""
    seconds = 0.3 if settings.tiny else SECONDS
    numbers = NUMBERS[:2] if settings.tiny else NUMBERS
    pairs = [(mode, number) for mode in modes(settings) for number in numbers]
    return [(mode, n, start + k * 1.2 * seconds, start + (k * 1.2 + 1) * seconds) for k, (mode, n) in enumerate(pairs)]


def add_up(files: list[Path], hardware: dict[str, Any]) -> dict[str, Any]:
    """Return the steps a second of all processes together, by kind and number of processes."""
    rates: dict[str, dict[str, float]] = {}
    for path in files:
        for mode, number, rate in read_json(path) or []:
            of_mode = rates.setdefault(mode, {})
            of_mode[str(number)] = round(of_mode.get(str(number), 0.0) + rate, 2)
    return {"network": "ResNet-32", "method": "SSE-SAM stage 1", "rates": rates, **hardware}


def best_number(settings: Settings) -> int:
    """Return how many trainings at a time are fastest, as measured; else 1. A larger number must gain a tenth."""
    rates = settings.found().get("sharing.json", {"rates": {}})["rates"].get(modes(settings)[-1], {})
    best = 1
    for number, rate in sorted((int(number), rate) for number, rate in rates.items()):
        if number > 1 and rate > 1.1 * rates[str(best)]:
            best = number
    return best
