"""Long-tailed data sets. All classes and functions raise ``ArgumentError`` if an argument is out of range."""

from lightning_ssesam.data.augment import AutoAugmentCutout, SeveralViews, SimAugment
from lightning_ssesam.data.base import LongTailDataModule
from lightning_ssesam.data.cifar import CIFAR10LT, CIFAR100LT
from lightning_ssesam.data.digits import DigitsLT
from lightning_ssesam.data.image_files import ImageFileModule
from lightning_ssesam.data.image_folder import ImageFolderLT
from lightning_ssesam.data.image_input import ImageInput
from lightning_ssesam.data.image_list import ImageList, ImageListLT
from lightning_ssesam.data.image_shards import ImageShardsLT
from lightning_ssesam.data.image_table import ImageTableLT
from lightning_ssesam.data.images import ImageDataModule
from lightning_ssesam.data.long_tailed import LongTailed
from lightning_ssesam.data.profiles import long_tailed_counts, long_tailed_indices
from lightning_ssesam.data.samplers import (
    ClassBalancedSampler,
    ClassSampler,
    ProgressivelyBalancedSampler,
    SquareRootSampler,
)
from lightning_ssesam.data.shard_index import index_shards, write_shards
from lightning_ssesam.data.tiny_imagenet import TinyImageNetLT

__all__ = [
    "CIFAR10LT",
    "CIFAR100LT",
    "AutoAugmentCutout",
    "ClassBalancedSampler",
    "ClassSampler",
    "DigitsLT",
    "ImageDataModule",
    "ImageFileModule",
    "ImageFolderLT",
    "ImageInput",
    "ImageList",
    "ImageListLT",
    "ImageShardsLT",
    "ImageTableLT",
    "LongTailDataModule",
    "LongTailed",
    "ProgressivelyBalancedSampler",
    "SeveralViews",
    "SimAugment",
    "SquareRootSampler",
    "TinyImageNetLT",
    "index_shards",
    "long_tailed_counts",
    "long_tailed_indices",
    "write_shards",
]
