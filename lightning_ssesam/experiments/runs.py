"""The results of one training (a run), the folder that keeps runs, and the results of a comparison."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lightning_ssesam.data import LongTailDataModule
from lightning_ssesam.experiments.files import make_folder, write_text
from lightning_ssesam.split import ClassSplit

GROUPS = ("head", "tail", "many", "medium", "few", "all")
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


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs of each method. Methods are in the order of their first runs."""
    methods: dict[str, list[Run]] = {}
    for run in runs:
        methods.setdefault(run.method, []).append(run)
    return methods


class RunStore:
    """A folder with a JSON file for every finished run.

    Args:
        folder: Path of the folder. It is made if it does not exist.

    Raises:
        ArgumentError: If the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_folder(folder)

    def load(self, method: str, seed: int, fingerprint: str) -> Run | None:
        """Return a finished run with this fingerprint, or None if there is none, or its file is not complete."""
        try:
            saved = json.loads(self._path(method, seed).read_text())
            return Run(**saved["run"]) if saved["fingerprint"] == fingerprint else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, run: Run, fingerprint: str) -> None:
        """Write a run: all of it, or nothing if the program ends before."""
        write_text(self._path(run.method, run.seed), json.dumps({"fingerprint": fingerprint, "run": asdict(run)}))

    def _path(self, method: str, seed: int) -> Path:
        # The hash keeps names apart that differ only in punctuation.
        mark = hashlib.sha256(method.encode()).hexdigest()[:8]
        return self.folder / f"{re.sub('[^A-Za-z0-9]+', '-', method)}-{mark}-{seed}.json"


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
    """

    runs: Sequence[Run]
    split: ClassSplit
    data: LongTailDataModule
    epochs: int
    gamma: float | None = None
    config: str | None = None

    @property
    def name(self) -> str:
        """Name of the data set."""
        return type(self.data).__name__

    @property
    def validation_set(self) -> str:
        """Name of the set that validates."""
        return "test" if self.data.val_is_test else "validation"
