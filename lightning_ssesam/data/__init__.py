"""Long-tailed data sets."""

from lightning_ssesam.data.base import LongTailDataModule
from lightning_ssesam.data.digits import DigitsLT
from lightning_ssesam.data.profiles import long_tailed_counts, long_tailed_indices

__all__ = ["DigitsLT", "LongTailDataModule", "long_tailed_counts", "long_tailed_indices"]
