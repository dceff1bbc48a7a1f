"""Does all that needs a GPU, in one go and in a given time: tests, costs of steps, real trainings, and their tables.

    python benchmarks/gpu.py --minutes 8 --images ../shared/data

It runs, one after the other:

- the tests that need a GPU;
- milliseconds and memory of a step through the Trainer, for four networks, eager and with CUDA graphs;
- what several processes gain on one GPU;
- trainings of a ResNet-32, for the time that is left.

Each runs in a process of its own with a time limit. A crash, a hang or a lack of memory loses nothing else.

The results are small JSON files. A result that exists is not made again, so the next call goes on where this one ended.
The folder ``logs`` has the outputs of the processes. Without ``--output``, the results go to ``benchmarks/results``,
and their tables into the documentation. With it, nothing is written elsewhere, and this does both afterwards:

    python benchmarks/gpu.py --write --output FOLDER

``--images`` takes folders or archives with ``cifar/{train,test}/CLASS/FILE`` or ``tiny100lt/{train,test}/CLASS/FILE``.
They are not part of the project. Without them, nothing is trained. docs/performance.md says more.
"""

import argparse
import hashlib
import os
import shutil
import sys
import time
from pathlib import Path

from gpu_parts import images, tables
from gpu_parts.children import Child, Children
from gpu_parts.folders import thrown_away
from gpu_parts.results import COMMITTED, read_all, read_json, write_json
from gpu_parts.settings import NO_GPU, Settings
from gpu_parts.timetable import NUMBERS, add_up, best_number

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = ("ResNet-32", "ResNet-34", "ResNet-50", "ViT-B/16")
PARTS = ("tests", "steps", "sharing", "trainings")
# Seconds that the parts may take at most, each network by itself.
LIMITS = {"tests": 120, "ResNet-32": 110, "ResNet-34": 70, "ResNet-50": 70, "ViT-B/16": 70, "sharing": 75}
# Seconds at the end to write the tables and to remove the images.
_END = 8
_RESTARTS = 3


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="time after which it has ended (default: 8)")
    parser.add_argument("--images", type=Path, nargs="+", default=[], metavar="PATH", help="folders or archives")
    parser.add_argument("--output", type=Path, help="folder for all files (default: build/gpu)")
    parser.add_argument("--epochs", type=int, default=200, help="epochs of a training (default: 200)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each method (default: 3)")
    parser.add_argument("--jobs", type=int, default=0, help="trainings at a time (default: as many as are fastest)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to run (default: all)")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu", help="cpu: with --tiny, to try the script")
    parser.add_argument("--tiny", action="store_true", help="tiny networks and few images")
    parser.add_argument("--write", action="store_true", help="only write the tables into the documentation")
    options = parser.parse_args(arguments)
    for name, least in (("minutes", 0.1), ("epochs", 1), ("seeds", 1), ("jobs", 0)):
        if getattr(options, name) < least:
            parser.error(f"Expected argument `--{name}` to be at least {least}, but got {getattr(options, name)}.")
    if options.device == "cpu" and not options.tiny:
        parser.error("Expected argument `--device` to be gpu, or cpu with `--tiny`, but got cpu without it.")
    return options


def fingerprint() -> str:
    """Return a text that changes with the project's code."""
    found = hashlib.sha256()
    for path in sorted((ROOT / "lightning_ssesam").rglob("*.py")):
        found.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:12]


def environment(scratch: Path) -> dict[str, str]:
    """Return the environment of the parts: all that they write goes to the scratch folder."""
    paths = [str(ROOT), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    caches = ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "MPLCONFIGDIR", "CUDA_CACHE_PATH")
    for name in caches:
        (scratch / name.lower()).mkdir(parents=True, exist_ok=True)
    return {
        **os.environ,
        **{name: str(scratch / name.lower()) for name in caches},
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        # The compiler's processes would keep files open after their parent has ended.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }


class Call:
    """One call of the script: its settings, its time and its processes.

    Args:
        settings: Settings for the parts.
        children: Starts the processes.
        end: Time at which the call has ended, as of ``time.time()``.
    """

    def __init__(self, settings: Settings, children: Children, end: float) -> None:
        self.settings, self.children, self.end = settings, children, end
        self.scratch = Path(settings.scratch)

    def command(self, part: str, *words: str) -> list[str]:
        """Return the command of a part."""
        return [sys.executable, "-m", f"gpu_parts.{part}", str(self.settings.write()), *words]

    def run(self, name: str, command: list[str]) -> None:
        """Run a process to its end, or to its time limit."""
        until = min(time.time() + LIMITS[name], self.end - _END)
        if until < time.time() + 1:
            self.say(f"{name}: no time left")
            return
        status, end = self.children.run(name.replace("/", "_"), command, until)
        if status == NO_GPU:
            raise SystemExit("Expected a GPU that torch can use, but there is none (torch.cuda.is_available()).")
        self.say(f"{name}: {end}")

    def say(self, text: str) -> None:
        """Print a line, with the seconds that are left."""
        print(f"[{self.end - time.time():4.0f} s left] {text}", flush=True)

    def tests(self) -> None:
        """Run the test files that need a GPU."""
        self.run("tests", self.command("cuda_tests"))

    def steps(self) -> None:
        """Measure the steps of every network, each in a process of its own."""
        for network in NETWORKS:
            self.run(network, self.command("steps", network))

    def sharing(self) -> None:
        """Measure several processes at a time, once for a GPU."""
        found = read_all(map(Path, self.settings.folders))
        measured, steps = found.get("sharing.json"), found.get("steps/ResNet-32.json")
        if measured and (steps is None or steps["hardware"] == measured["hardware"]):
            self.say("sharing: measured already")
            return
        folder, number = self.scratch / "sharing", 2 if self.settings.tiny else max(NUMBERS)
        until = min(time.time() + LIMITS["sharing"], self.end - _END)
        command = self.command("sharing")
        processes = [self.children.start(f"sharing_{k}", [*command, str(k)]) for k in range(number)]
        _wait_for([folder / f"ready_{k}" for k in range(number)], processes, until)
        write_json(folder / "start", time.time() + 0.5)
        files = [folder / f"rates_{k}.json" for k in range(number)]
        _wait_for(files, processes, until)
        for process in processes:
            process.kill()
        if all(path.exists() for path in files):
            write_json(Path(self.settings.output) / "sharing.json", add_up(files, read_json(folder / "ready_0")))
        self.say("sharing: done" if all(path.exists() for path in files) else "sharing: failed")

    def trainings(self, places: dict[str, Path], folder: Path) -> None:
        """Lay out the images in a folder, and train for the rest of the time."""
        for name, place in places.items():
            target = folder / name
            command = [sys.executable, "-m", "gpu_parts.images", name, str(place), str(target)]
            status, end = self.children.run(f"images_{name}", command, self.end - _END)
            self.say(f"images of {name}: {end}")
            if status == 0:
                self.settings.images[name] = str(target)
        if not self.settings.images:
            self.say("trainings: none, since there are no images (--images)")
            return
        self.settings.deadline = self.end - _END
        self.settings.jobs = self.settings.jobs or best_number(self.settings)
        command, jobs = self.command("training"), self.settings.jobs
        workers = {k: self.children.start(f"training_{k}", command) for k in range(jobs)}
        restarts = _RESTARTS * jobs
        while workers and time.time() < self.settings.deadline:
            time.sleep(0.2)
            for k, worker in list(workers.items()):
                status = worker.process.poll()
                if status is not None:
                    del workers[k]
                    if status not in (0, NO_GPU) and restarts:
                        restarts -= 1
                        self.say(f"trainings: process {k} failed (status {status}), and starts again")
                        workers[k] = self.children.start(f"training_{k}", command)
        for worker in workers.values():
            worker.kill()
        self.say(f"trainings: done, {jobs} at a time")


def _wait_for(files: list[Path], processes: list[Child], until: float) -> None:
    while time.time() < until and not all(path.exists() for path in files):
        if any(process.process.poll() not in (None, 0) for process in processes):
            return
        time.sleep(0.05)


def run(options: argparse.Namespace, places: dict[str, Path], output: Path) -> None:
    """Run the parts."""
    end = time.time() + 60 * options.minutes
    folders = [str(output / "results")] if options.tiny else [str(COMMITTED), str(output / "results")]
    settings = Settings(str(output / "results"), "", folders)
    settings.device, settings.tiny, settings.source = options.device, options.tiny, fingerprint()
    settings.epochs, settings.seeds, settings.jobs = options.epochs, options.seeds, options.jobs
    with thrown_away(output) as (scratch, folder):
        settings.scratch = str(scratch)
        try:
            with Children(output / "logs", scratch, environment(scratch)) as children:
                call = Call(settings, children, end)
                for part in options.parts:
                    getattr(call, part)(*([places, folder] if part == "trainings" else []))
        finally:
            for path in (output / "results").rglob("*.tmp"):
                path.unlink()


def write_tables(options: argparse.Namespace, output: Path) -> None:
    """Write the tables, into the documentation unless a run has an output folder of its own."""
    in_place = options.write or (options.output is None and not options.tiny)
    if options.write and options.output is not None and not (output / "results").is_dir():
        raise SystemExit(f"No such folder: {str(output / 'results')!r}.")
    if in_place and (output / "results").is_dir():
        shutil.copytree(output / "results", COMMITTED, dirs_exist_ok=True)
    found = read_all([COMMITTED] if in_place else [COMMITTED, output / "results"])
    tables.write(found, ROOT / "docs", ROOT / "docs" if in_place else output / "docs")


def main() -> None:
    """Run the parts, and write the tables."""
    options = parse_arguments()
    output = (options.output or Path("build/gpu")).resolve()
    if options.write:
        write_tables(options, output)
        return
    places = images.find([path.resolve() for path in options.images])
    try:
        run(options, places, output)
    finally:
        write_tables(options, output)


if __name__ == "__main__":
    main()
