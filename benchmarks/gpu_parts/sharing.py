"""Measures what several trainings at a time gain on one GPU: steps of SSE-SAM in several processes.

Each process makes its trainings ready, then all of them follow one timetable. The parent adds up what they write.
"""

import time
from pathlib import Path

import torch

from gpu_parts import contenders
from gpu_parts.results import read_json, write_json
from gpu_parts.settings import about, settings_of_child
from gpu_parts.timetable import modes, timetable


def main() -> None:
    """Make trainings ready, wait for the start, and measure."""
    settings, (index,) = settings_of_child()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    folder, starts = Path(settings.scratch) / "sharing", contenders.makers("ResNet-32", "SSE-SAM stage 1", settings)
    racing = {mode: starts[mode]() for mode in modes(settings)}
    for contender in racing.values():
        contender.steps(8)
    write_json(folder / f"ready_{index}", about(settings))
    while (start := read_json(folder / "start")) is None:
        time.sleep(0.05)
    rates = []
    for mode, number, begin, end in timetable(settings, start):
        if int(index) < number:
            time.sleep(max(0.0, begin - time.time()))
            began, steps = time.time(), 0
            while time.time() < end:
                racing[mode].steps(5)
                steps += 5
            rates.append((mode, number, steps / (time.time() - began)))
    write_json(folder / f"rates_{index}.json", rates)
    for contender in racing.values():
        contender.end()


if __name__ == "__main__":
    main()
