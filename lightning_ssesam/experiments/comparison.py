"""The results of a comparison, from which its tables, pictures and report are made."""

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_ssesam.data import LongTailDataModule
from lightning_ssesam.experiments.runs import Run
from lightning_ssesam.split import ClassSplit


@dataclass(frozen=True)
class Comparison:
    """The results of a comparison.

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
