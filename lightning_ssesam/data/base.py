"""What every long-tailed data module tells about itself."""

from typing import Any

import lightning.pytorch as pl

from lightning_ssesam.split import ClassSplit


class LongTailDataModule(pl.LightningDataModule):
    """A data module that knows its class counts as soon as it is built.

    Attributes:
        class_counts: Training samples of each class, length C.
        many_above: Classes with more training samples than this are many-shot.
        few_below: Classes with fewer training samples than this are few-shot.

    """

    class_counts: list[int]
    many_above: int = 100
    few_below: int = 20

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.class_counts)

    def split(self, **kwargs: Any) -> ClassSplit:
        """Return the :class:`~lightning_ssesam.ClassSplit` of the training set.

        Args:
            **kwargs: The arguments of ``ClassSplit.from_counts``; the data set's own thresholds by default.

        """
        thresholds = {"many_above": self.many_above, "few_below": self.few_below}
        return ClassSplit.from_counts(self.class_counts, **{**thresholds, **kwargs})
