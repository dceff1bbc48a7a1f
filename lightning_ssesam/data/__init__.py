"""Long-tailed data sets. All classes and functions raise ``ArgumentError`` if an argument is out of range."""

from lightning_ssesam.data.base import LongTailDataModule
from lightning_ssesam.data.cifar import CIFAR10LT, CIFAR100LT
from lightning_ssesam.data.digits import DigitsLT
from lightning_ssesam.data.image_files import ImageFileModule
from lightning_ssesam.data.image_folder import ImageFolderLT
from lightning_ssesam.data.image_list import ImageList, ImageListLT
from lightning_ssesam.data.images import ImageDataModule
from lightning_ssesam.data.long_tailed import LongTailed
from lightning_ssesam.data.profiles import long_tailed_counts, long_tailed_indices
from lightning_ssesam.data.samplers import (
    ClassBalancedSampler,
    ClassSampler,
    ProgressivelyBalancedSampler,
    SquareRootSampler,
)

__all__ = [
    "CIFAR10LT",
    "CIFAR100LT",
    "ClassBalancedSampler",
    "ClassSampler",
    "DigitsLT",
    "ImageDataModule",
    "ImageFileModule",
    "ImageFolderLT",
    "ImageList",
    "ImageListLT",
    "LongTailDataModule",
    "LongTailed",
    "ProgressivelyBalancedSampler",
    "SquareRootSampler",
    "long_tailed_counts",
    "long_tailed_indices",
]
