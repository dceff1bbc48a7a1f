"""Which trainings ``benchmarks/gpu.py`` makes, in which order, and how long each one takes."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gpu_parts.images import SOURCES
from gpu_parts.settings import Settings

Found = Mapping[str, Any]
"""Results by path, as :func:`gpu_parts.results.read_all` returns them."""

LOSSES = {"LA": "logit adjustment", "CE": "cross-entropy"}
SEARCHED = ("SAM", "ImbSAM", "SSE-SAM")
MAIN = ("ERM", *SEARCHED)
LATE = tuple(f"late {method}" for method in SEARCHED)
FAMILY = ("ASAM", "FriendlySAM", "GSAM", "WSAM", "PGN", "LESAM", "FocalSAM", "CCSAM", "MomentumSAM", "RandomSAM")
"""The other methods, with the radii that their objectives have by default."""

GRID = (0.05, 0.1, 0.2)
"""Radii of the search, the same for all methods: of SAM, or of the tail in ImbSAM and SSE-SAM, whose head has half."""

HELD_OUT = 0.2
"""Share of each class's training images that a search holds out."""

# Milliseconds of a plain update, as long as nothing has been measured: with a margin over what an H200 takes.
_PLAIN_MS = 6.0
# Seconds that a training takes apart from its updates: data, first steps, evaluation.
_EXTRA = 10.0


@dataclass(frozen=True)
class Run:
    """A training.

    Args:
        data: Name of the images, one of :data:`~gpu_parts.images.SOURCES`.
        loss: ``"LA"`` or ``"CE"``.
        method: Name of the method.
        radius: Radius in the sense of :data:`GRID`; None for ERM and for :data:`FAMILY`.
        seed: Seed of weights, order and augmentation.
        epochs: Number of epochs.
        is_search: Whether it belongs to the search of a radius, and is measured on images that it holds out.
    """

    data: str
    loss: str
    method: str
    radius: float | None
    seed: int
    epochs: int
    is_search: bool = False

    @property
    def path(self) -> str:
        """Path of its result in the folder of the results."""
        radius = "" if self.radius is None else f"_{self.radius:g}"
        name = f"{self.loss}_{self.method}{radius}_{self.epochs}_epochs_seed_{self.seed}".replace(" ", "_")
        return f"{self.data}/{'search/' if self.is_search else ''}{name}.json"

    @property
    def radii(self) -> dict[str, float]:
        """Radii of the objective by name; empty if they are its own."""
        method = self.method.removeprefix("late ")
        if self.radius is None:
            return {}
        return {"head_rho": self.radius / 2, "tail_rho": self.radius} if method == "SSE-SAM" else {"rho": self.radius}

    @property
    def switches(self) -> list[float]:
        """Shares of the training after which the next stage begins."""
        late = [0.8] if self.method.startswith("late") else []
        return late + ([0.9 if late else 0.7] if self.method.endswith("SSE-SAM") else [])

    @property
    def updates(self) -> int:
        """Updates of the training with batches of 128; the last, smaller batch of an epoch is left out."""
        images = SOURCES[self.data].num_images * (1 - HELD_OUT * self.is_search)
        return int(images) // 128 * self.epochs

    @property
    def cost(self) -> float:
        """Cost of an update on average, in plain updates, with full passes."""
        stages = {"ERM": 1.0, "SAM": 2.0, "ImbSAM": 8 / 3, "SSE-SAM": 0.7 * 11 / 3 + 0.3 * 8 / 3}
        one_pass = dict.fromkeys(("MomentumSAM", "RandomSAM"), 1.0)
        # A clean pass, and for each class a backward, and a forward and a backward.
        classes = {"CCSAM": (1 + 5 * SOURCES[self.data].num_classes) / 3, "FocalSAM": 8 / 3}
        if self.method == "late SSE-SAM":
            return 0.8 + 0.1 * 11 / 3 + 0.1 * 8 / 3
        if self.method.startswith("late "):
            return 0.8 + 0.2 * stages[self.method.removeprefix("late ")]
        return {**stages, **one_pass, **classes}.get(self.method, 2.0)


def parse_run(text: str, data: str, epochs: int) -> Run:
    """Return the training that a text such as ``SAM:0.1:LA:0`` asks for: method, radius, loss and seed.

    Raises:
        SystemExit: If it is no such text.
    """
    try:
        method, radius, loss, seed = text.split(":")
        run = Run(data, loss, method, float(radius) if radius else None, int(seed), epochs)
        is_radius = method == "ERM" if run.radius is None else method != "ERM" and 0 < run.radius < math.inf
        if method not in (*MAIN, *LATE) or loss not in LOSSES or not is_radius or not 0 <= run.seed < 2**32:
            raise ValueError
        return run
    except ValueError:
        known = ", ".join((*MAIN, *LATE))
        expected = (
            f"METHOD:RADIUS:LOSS:SEED, with a method of {known}, a finite radius > 0 (none for ERM), the loss LA or CE,"
            " and a seed from 0 to 2**32 - 1"
        )
        raise SystemExit(f"Expected argument `--runs` to be {expected}, but got {text!r}.") from None


def search(data: str, loss: str, method: str, epochs: int) -> list[Run]:
    """Return the trainings that find the radius of a method: the grid, each a fifth as long as the trainings."""
    return [Run(data, loss, method, radius, 0, max(1, epochs // 5), is_search=True) for radius in GRID]


def found_radius(found: Found, data: str, loss: str, method: str, epochs: int) -> float | None:
    """Return the radius with the best mean recall on held-out images; None as long as the search is not done.

    Of equal ones the smaller counts.
    """
    runs = search(data, loss, method, epochs)
    if any(run.path not in found for run in runs):
        return None
    best = max(runs, key=lambda run: (found[run.path]["accuracy"]["all"], -(run.radius or 0)))
    return best.radius


def ordered(found: Found, data: list[str], epochs: int, seeds: int) -> Iterator[Run]:
    """Yield all trainings whose radius is known, with those that find the others, in the order of their use.

    Seed by seed, so that there is a table early, and searches just before the trainings that need them.
    """
    for methods in (MAIN + LATE, FAMILY):
        for seed in range(seeds):
            for name in data:
                for loss in LOSSES:
                    for method in methods:
                        yield from _of_method(found, name, loss, method, seed, epochs)


def _of_method(found: Found, data: str, loss: str, method: str, seed: int, epochs: int) -> Iterator[Run]:
    base = method.removeprefix("late ")
    if base not in SEARCHED:
        yield Run(data, loss, method, None, seed, epochs)
        return
    if base == method:
        yield from search(data, loss, method, epochs)
    if (radius := found_radius(found, data, loss, base, epochs)) is not None:
        yield Run(data, loss, method, radius, seed, epochs)


def estimate(run: Run, measured: list[dict[str, Any]]) -> float:
    """Return how many seconds a training will take.

    Args:
        run: The training.
        measured: Trainings on the same hardware, with as many at a time: ``data``, ``method``, ``updates``, ``cost``
            and ``seconds``. Those of the same method count, else all; the slowest one decides.
    """
    same = [one for one in measured if one["method"] == run.method] or measured
    per_unit = max((one["seconds"] / one["updates"] / one["cost"] for one in same), default=_PLAIN_MS / 1000)
    return per_unit * run.updates * run.cost + _EXTRA


def best_number(settings: Settings) -> int:
    """Return how many trainings at a time are fastest, as measured; else 1. A larger number must gain a tenth."""
    rates = settings.found().get("sharing.json", {"rates": {}})["rates"].get(settings.modes[-1], {})
    best = 1
    for number, rate in sorted((int(number), rate) for number, rate in rates.items()):
        if number > 1 and rate > 1.1 * rates[str(best)]:
            best = number
    return best


def describe(run: Run) -> dict[str, Any]:
    """Return the entries of a result that are known before the training."""
    return {**asdict(run), "radii": run.radii, "switches": run.switches, "updates": run.updates, "cost": run.cost}
