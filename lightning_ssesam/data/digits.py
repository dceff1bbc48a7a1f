"""Scikit-learn's handwritten digits, made long-tailed: real images that need no download."""

from typing import Any

import torch
from torch.utils.data import Dataset, TensorDataset
from typing_extensions import override

from lightning_ssesam._validation import check_integer
from lightning_ssesam.data.base import LongTailDataModule
from lightning_ssesam.data.image_input import ImageInput
from lightning_ssesam.data.profiles import Profile, hold_out, long_tailed_counts

# The rarest digit has 174 scans: enough for these three numbers together.
_TEST_PER_CLASS = 50
_VAL_PER_CLASS = 20
_LARGEST_CLASS = 100


class DigitsLT(LongTailDataModule):
    """Long-tailed digits: 8x8 scans of ten classes from the UCI data set that comes with scikit-learn.

    The training set has 100 images of the digit 0, and fewer of every further digit. The validation and the test set
    have 20 and 50 images of each class, and share no image with the training set. A class with more than 50 training
    images is many-shot, with fewer than 10 few-shot. Batches are pairs of images ``(N, 1, 8, 8)``, float32 with zero
    mean and unit variance over the whole set, and class indices ``(N,)``, int64.

    Args:
        imbalance_factor: Largest over smallest class size, from 1 to 100, or its inverse.
        profile: ``"exponential"`` or ``"step"``; see :func:`~lightning_ssesam.data.long_tailed_counts`.
        seed: Seed that chooses which image goes into which set, an integer >= 0.
        **kwargs: See :class:`~lightning_ssesam.data.LongTailDataModule`.

    Raises:
        ModuleNotFoundError: From ``setup``, if scikit-learn is not installed.
    """

    many_above = 50
    few_below = 10
    in_channels = 1
    image_size = 8
    class_names = tuple("0123456789")
    # Pixels are integers from 0 to 16. These are their mean and their standard deviation, divided by 16.
    image_input = ImageInput(8, channels=1, mean=(0.3052603,), std=(0.3760509,))

    def __init__(
        self, imbalance_factor: float = 50.0, profile: Profile = "exponential", *, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.class_counts = long_tailed_counts(10, _LARGEST_CLASS, imbalance_factor, profile)
        self.seed = check_integer("seed", seed, minimum=0)

    @override
    def fingerprint(self) -> str:
        """Return the same text always, since the published samples do not change."""
        return "" if type(self).make_sets is DigitsLT.make_sets else super().fingerprint()

    @override
    def make_sets(self) -> dict[str, Dataset[Any]]:
        """Choose the images of each set."""
        from sklearn.datasets import load_digits

        pixels, digits = load_digits(return_X_y=True)
        labels = torch.from_numpy(digits).long()
        images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8)
        images = (images - images.mean()) / images.std()
        generator = torch.Generator().manual_seed(self.seed)
        remaining = torch.arange(len(labels))
        sets: dict[str, Dataset[Any]] = {}
        wanted = {"test": [_TEST_PER_CLASS] * 10, "val": [_VAL_PER_CLASS] * 10, "train": self.class_counts}
        for name, counts in wanted.items():
            picked, others = hold_out(labels[remaining], counts, generator)
            sets[name] = TensorDataset(images[remaining[picked]], labels[remaining[picked]])
            remaining = remaining[others]
        return sets
