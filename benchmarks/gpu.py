"""Does all that needs a GPU, in one go and in a given time: tests, costs of steps, real trainings, and their tables.

    python benchmarks/gpu.py --minutes 8 --images IMAGES

It runs, one after the other:

- the tests that need a GPU;
- milliseconds and memory of a step through the Trainer, for four networks, eager and with CUDA graphs;
- what several processes gain on one GPU;
- trainings of a ResNet-32, for the time that is left.

Each runs in a process of its own with a time limit. A crash, a hang or a lack of memory loses nothing else.

The results are small JSON files. A result that exists is not made again, so the next call goes on where this one ended.
Only one call at a time can use a folder. Results of ``--tiny`` have a folder of their own, and are never published.
The folder ``logs`` has the outputs of the processes. Without ``--output``, the results go to ``benchmarks/results``,
and their tables into the documentation. With it, nothing is written elsewhere, and this does both afterwards:

    python benchmarks/gpu.py --write --output FOLDER

``--images`` takes folders or archives with ``cifar/{train,test}/CLASS/FILE`` or ``tiny100lt/{train,test}/CLASS/FILE``.
They are not part of the project. Without them, nothing is trained. docs/performance.md says more.
"""

import argparse
import math
import os
import shutil
import sys
import time
from pathlib import Path

from gpu_parts import images, tables
from gpu_parts.children import Children
from gpu_parts.folders import locked, thrown_away
from gpu_parts.plan import best_number
from gpu_parts.results import COMMITTED, fingerprint, read_all
from gpu_parts.settings import NO_GPU, Settings

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
    parser.add_argument("--output", type=Path, help="folder for all files (default: build/gpu, or build/gpu_tiny)")
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
        if (until := self.limit(name)) is not None:
            status, end = self.children.run(name.replace("/", "_"), command, until)
            _check_gpu(status)
            self.say(f"{name}: {end}")

    def limit(self, name: str) -> float | None:
        """Return the time at which a part has to end; None, and a line that says so, if there is no time left."""
        until = min(time.time() + LIMITS.get(name, math.inf), self.end - _END)
        if until > time.time() + 1:
            return until
        self.say(f"{name}: no time left")
        return None

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
        """Measure several processes at a time."""
        self.run("sharing", self.command("sharing"))

    def trainings(self, places: dict[str, Path], folder: Path) -> None:
        """Lay out the images in a folder, and train for the rest of the time."""
        for name, place in places.items():
            if (until := self.limit(f"images of {name}")) is not None:
                command = [sys.executable, "-m", "gpu_parts.images", name, str(place), str(folder / name)]
                status, end = self.children.run(f"images_{name}", command, until)
                self.say(f"images of {name}: {end}")
                if status == 0:
                    self.settings.images[name] = str(folder / name)
        if (until := self.limit("trainings")) is None:
            return
        if not self.settings.images:
            reason = "the images could not be laid out (logs)" if places else "there are no images (--images)"
            self.say(f"trainings: none, since {reason}")
            return
        self.settings.deadline = until
        self.settings.jobs = self.settings.jobs or best_number(self.settings)
        command, jobs = self.command("training"), self.settings.jobs
        workers = {k: self.children.start(f"training_{k}", command) for k in range(jobs)}
        restarts, failed = _RESTARTS * jobs, 0
        while workers and time.time() < self.settings.deadline:
            time.sleep(0.2)
            for k, worker in list(workers.items()):
                status = worker.process.poll()
                _check_gpu(status)
                if status is not None:
                    del workers[k]
                    if status != 0 and restarts:
                        restarts -= 1
                        self.say(f"trainings: process {k} failed (status {status}), and starts again")
                        workers[k] = self.children.start(f"training_{k}", command)
                    else:
                        failed += status != 0
        for worker in workers.values():
            worker.kill()
        ended = f"{failed} of {jobs} processes failed (logs)" if failed else f"done, {jobs} at a time"
        self.say(f"trainings: {ended}")


def _check_gpu(status: int | None) -> None:
    if status == NO_GPU:
        raise SystemExit("Expected a GPU that torch can use, but there is none (torch.cuda.is_available()).")


def run(options: argparse.Namespace, places: dict[str, Path], output: Path) -> None:
    """Run the parts."""
    end = time.time() + 60 * options.minutes
    folders = [str(output / "results")] if options.tiny else [str(COMMITTED), str(output / "results")]
    settings = Settings(str(output / "results"), "", folders)
    settings.device, settings.tiny = options.device, options.tiny
    settings.source = fingerprint(sorted((ROOT / "lightning_ssesam").rglob("*.py")), ROOT)
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


def check_results(output: Path, tiny: bool) -> None:
    """Check that a folder does not have both results of ``--tiny`` and others.

    Raises:
        SystemExit: If it has the other kind.
    """
    found = read_all([output / "results"], tiny=True)
    if other := [name for name, one in found.items() if bool(one.get("tiny")) != tiny]:
        expected = "only results of `--tiny`" if tiny else "no results of `--tiny`"
        got = f"{str(output)!r}, which has {other[0]}"
        raise SystemExit(f"Expected argument `--output` to be a folder with {expected}, but got {got}.")


def write_tables(options: argparse.Namespace, output: Path) -> None:
    """Write the tables, into the documentation unless a run has an output folder of its own."""
    in_place = options.write or (options.output is None and not options.tiny)
    if options.write and options.output is not None and not (output / "results").is_dir():
        raise SystemExit(f"No such folder: {str(output / 'results')!r}.")
    if in_place and (output / "results").is_dir():
        check_results(output, tiny=False)
        shutil.copytree(output / "results", COMMITTED, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.tmp"))
    found = read_all([COMMITTED] if in_place else [COMMITTED, output / "results"], options.tiny)
    tables.write(found, ROOT / "docs", ROOT / "docs" if in_place else output / "docs")


def main() -> None:
    """Run the parts, and write the tables."""
    options = parse_arguments()
    output = (options.output or Path("build/gpu_tiny" if options.tiny else "build/gpu")).resolve()
    if options.write:
        write_tables(options, output)
        return
    places = images.find([path.resolve() for path in options.images])
    with locked(output):
        check_results(output, options.tiny)
        try:
            run(options, places, output)
        finally:
            write_tables(options, output)


if __name__ == "__main__":
    main()
