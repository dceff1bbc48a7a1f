"""The results of one training (a run), the folder that keeps runs, and the results of a comparison."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

from lightning_ssesam.data import LongTailDataModule
from lightning_ssesam.experiments.files import make_folder, set_aside, write_text
from lightning_ssesam.split import ClassSplit

GROUPS = ("head", "tail", "many", "medium", "few", "all")
FEW_IMAGES = 10
"""A class or a group with fewer test images than this is called small. A difference there gets no star."""

CONFUSIONS = ("head_to_head", "head_to_tail", "tail_to_head", "tail_to_tail")


@dataclass
class Run:
    """The results of one training.

    Attributes:
        method: Name of the method.
        seed: Seed of the initial weights and the batch order.
        accuracy: Test accuracy in [0, 1] of each of :data:`GROUPS`, after the last epoch.
        best: Validation accuracy of each group after the epoch that was best for ``"all"``.
        class_recalls: Test recall of each class in [0, 1], length C; NaN for a class without test images.
        confusion: Each of :data:`CONFUSIONS`, in [0, 1] (:class:`~lightning_ssesam.HeadTailConfusion`).
        curves: Validation accuracy of each group after every epoch.
        seconds: Duration.
        diverged: Whether the last training loss was not finite.
        device: Name of the device that trained.
        train_accuracy: Accuracy of each group on the training images after the last epoch; empty if it is not known.
        groups: Classes of each group but ``"all"``: a text of C digits, 1 where the class belongs to the group.
        class_names: Name of each class, length C; empty if the data module has none.
        val_images: Number of validation images of each class, length C.
        test_images: Number of test images of each class, length C.
        test_hits: For each class a text of digits, one for each of its test images in their order: 1 where it was
            classified right. Empty if the order of the images is not known.
        weights: Path of the checkpoint of the run; empty if none was kept.
        calibration: Expected calibration error of each group on the test images, in [0, 1]
            (:class:`~lightning_ssesam.GroupCalibrationError`); empty if it is not known.
        reliability: Number of test images, mean confidence and accuracy in each bin of confidence, of the groups
            ``"head"``, ``"tail"`` and ``"all"``; NaN for a bin without images.
        confused_pairs: True class, predicted class and number of test images of the most frequent errors, at most 1,000
            pairs; the pair with the largest share of its true class first.
        tail_mistakes: Test images of tail classes that were classified wrong with the highest probability, highest
            first: position in the test set, true class, predicted class, and its probability. Empty if the order of the
            images is not known.
        parameters: Number of parameters of the network; 0 if it is not known.
        trained_parameters: Number of these that the training changed.
        optimizer: Optimizer with its learning rate, as text.
        interruptions: How often the training was cut off, and went on from its last checkpoint or began anew.
    """

    method: str
    seed: int
    accuracy: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    class_recalls: list[float] = field(default_factory=list)
    confusion: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    diverged: bool = False
    device: str = ""
    train_accuracy: dict[str, float] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    class_names: list[str] = field(default_factory=list)
    val_images: list[int] = field(default_factory=list)
    test_images: list[int] = field(default_factory=list)
    test_hits: list[str] = field(default_factory=list)
    weights: str = ""
    calibration: dict[str, float] = field(default_factory=dict)
    reliability: dict[str, list[list[float]]] = field(default_factory=dict)
    confused_pairs: list[list[int]] = field(default_factory=list)
    tail_mistakes: list[list[float]] = field(default_factory=list)
    parameters: int = 0
    trained_parameters: int = 0
    optimizer: str = ""
    interruptions: int = 0


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs of each method. Methods are in the order of their first runs."""
    methods: dict[str, list[Run]] = {}
    for run in runs:
        methods.setdefault(run.method, []).append(run)
    return methods


def number_of_seeds(runs: Sequence[Run]) -> int:
    """Return how many seeds the runs were made with."""
    return len({run.seed for run in runs})


class RunStore:
    """A folder with a JSON file for every finished run.

    The name of a file has a part of the fingerprint of its settings. So runs of other settings stay beside, and are
    found again when the settings are.

    Args:
        folder: Path of the folder. It is made if it does not exist.

    Raises:
        ArgumentError: If the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_folder(folder)

    def load(self, method: str, seed: int, fingerprint: str) -> Run | None:
        """Return a finished run with this fingerprint, or None if there is none.

        A file that is not complete counts as none, and a line says so.
        """
        path = self._path(method, seed, fingerprint)
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            run = Run(**saved["run"])
            if saved["fingerprint"] == fingerprint and _is_complete(run) and (run.method, run.seed) == (method, seed):
                return run
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            pass
        print(f"{path} is damaged. Its run is made again.")
        return None

    def save(self, run: Run, fingerprint: str) -> None:
        """Write a run: all of it, or nothing if the program ends before."""
        content = {"fingerprint": fingerprint, "run": asdict(run)}
        write_text(self._path(run.method, run.seed, fingerprint), json.dumps(content))

    def set_aside(self, method: str, seed: int, fingerprint: str) -> None:
        """Rename the file of a run, if there is one, so that the run is made again. Nothing is lost."""
        set_aside(self._path(method, seed, fingerprint))

    def _path(self, method: str, seed: int, fingerprint: str) -> Path:
        return self.folder / f"{run_stem(method, seed, fingerprint)}.json"


def file_stem(method: str) -> str:
    """Return a name for the files of a method, which no other method has, also where upper case is lower case."""
    # The hash keeps names apart that differ only in punctuation, in case, or after many characters.
    mark = hashlib.sha256(method.encode()).hexdigest()[:8]
    return f"{re.sub('[^A-Za-z0-9]+', '-', method)[:60]}-{mark}"


def run_stem(method: str, seed: int, fingerprint: str) -> str:
    """Return a name for the files of a run, which no run of another method, seed or other settings has."""
    return f"{file_stem(method)}-{seed}-{fingerprint[:12]}"


def _is_complete(run: Run) -> bool:
    """Return whether all fields of a run have values of their types that fit together, and no group is missing."""
    kinds = all(isinstance(getattr(run, part.name), _kind_of(part)) for part in fields(run))
    if not kinds or not all(set(GROUPS) <= values.keys() for values in (run.accuracy, run.best, run.curves)):
        return False
    tables = (run.accuracy, run.best, run.confusion, run.train_accuracy, run.calibration)
    shares = chain(run.class_recalls, *(table.values() for table in tables), *run.curves.values())
    counts = [*run.val_images, *run.test_images]
    if not all(map(_is_share, shares)) or not all(map(_is_number, counts)):
        return False
    classes = len(run.class_recalls)
    lists = (run.class_names, run.val_images, run.test_images, run.test_hits)
    lengths = [*(len(values) for values in lists if values), *map(len, run.groups.values())]
    is_untested = all(map(math.isnan, run.class_recalls))
    return (
        set(lengths) <= {classes}
        and len({len(curve) for curve in run.curves.values()}) == 1
        and all(isinstance(name, str) for name in run.class_names)
        and all(isinstance(text, str) and set(text) <= {"0", "1"} for text in [*run.groups.values(), *run.test_hits])
        and (run.diverged or math.isnan(run.accuracy["all"]) == is_untested)
        and all(map(_agrees, run.class_recalls, run.test_hits))
        and _has_whole_predictions(run, classes)
    )


def _has_whole_predictions(run: Run, classes: int) -> bool:
    """Return whether what is kept of predictions has values of its types. Runs of earlier versions have none."""
    bins = [row for rows in run.reliability.values() for row in rows]
    return (
        set(run.calibration) in (set(), set(GROUPS))
        and all(_is_number(number) and _is_share(confidence) and _is_share(right) for number, confidence, right in bins)
        and all(
            _is_error(true, taken, classes) and _is_number(number) and number <= run.test_images[true]
            for true, taken, number in run.confused_pairs
        )
        and all(
            _is_number(place) and _is_error(true, taken, classes) and _is_share(probability)
            for place, true, taken, probability in run.tail_mistakes
        )
        and min(run.parameters, run.trained_parameters, run.interruptions) >= 0
    )


def _is_error(true: Any, predicted: Any, classes: int) -> bool:
    return all(_is_number(value) and value < classes for value in (true, predicted)) and true != predicted


def _is_number(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and (math.isnan(value) or 0 <= value <= 1)


def _agrees(recall: float, hits: str) -> bool:
    """Return whether the recall of a class is the fraction of its images that were classified right."""
    return abs(hits.count("1") / len(hits) - recall) < 1e-5 if hits else math.isnan(recall)


def _kind_of(part: Field[Any]) -> type | tuple[type, ...]:
    """Return the types of a field: those of its default."""
    if part.default is None:
        return object
    if part.default is not MISSING:
        return (int, float) if isinstance(part.default, float) else type(part.default)
    return object if part.default_factory is MISSING else type(part.default_factory())


@dataclass(frozen=True)
class Comparison:
    """The results of a comparison, from which its tables, pictures and report are made.

    Attributes:
        runs: The runs, method by method.
        split: The class split of the training set.
        data: The data module.
        epochs: Length of each training.
        gamma: Fraction of the training after which stage 2 begins, or None if no method is switched there.
        config: Configuration that repeats the comparison, as YAML, if there is one.
        values: Radii and switches of the methods, and where they come from.
        notes: What a reader must know before comparing the methods, in sentences.
        origin: Facts on where the comparison comes from, by name, such as the date and the command.
        tail_rule: What makes a class a tail class, in words, if it is known.
        own_data: Data module of each method that has its own.
    """

    runs: Sequence[Run]
    split: ClassSplit
    data: LongTailDataModule
    epochs: int
    gamma: float | None = None
    config: str | None = None
    values: str = ""
    notes: Sequence[str] = ()
    origin: Mapping[str, str] = field(default_factory=dict)
    tail_rule: str | None = None
    own_data: Mapping[str, LongTailDataModule] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the data set."""
        return type(self.data).__name__

    @property
    def validation_set(self) -> str:
        """Name of the set that validates."""
        return "test" if self.data.val_is_test else "validation"

    def data_of(self, method: str) -> LongTailDataModule:
        """Return the data module of a method."""
        return self.own_data.get(method, self.data)
