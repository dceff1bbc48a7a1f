"""Compares the objectives on real images in minutes, on a GPU, from a folder with the image files of CIFAR-10.

    python benchmarks/cifar10_lt.py cifar/ --epochs 80 --jobs 14          # cifar/{train,test}/CLASS/*.jpg

The data is CIFAR-10, made long-tailed with imbalance factor 100 (12,406 training images). A ResNet-32 is trained with
four objectives, each with cross-entropy and with logit adjustment, with three seeds.

The images are decoded once and kept in memory, so that many trainings can share a GPU. The batches are large, because
the calls of a step take longer than its arithmetic. ``lightning-ssesam compare --config compare_cifar10_lt`` makes the
full comparison.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from cifar10_lt_cpu import OBJECTIVES
from PIL import Image
from torch.optim import SGD
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from typing_extensions import override

from lightning_ssesam.compare import Method, compare
from lightning_ssesam.data import CIFAR10LT, LongTailDataModule, LongTailed, long_tailed_counts
from lightning_ssesam.losses import LogitAdjustedLoss
from lightning_ssesam.models import CIFARResNet


class Images(Dataset):
    """Decoded images. They are augmented at random and normalised, a whole batch at a time."""

    def __init__(self, images, targets, augment):
        self.images, self.targets, self.augment = images, targets, augment

    def __len__(self):
        return len(self.targets)

    def __getitems__(self, indices):
        """Return the images and labels of a batch."""
        images, labels = self.images[indices], self.targets[indices]
        if self.augment:
            images = move_and_mirror(images)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR10LT._mean, CIFAR10LT._std))
        return (images / 255 - mean) / std, labels


def move_and_mirror(images, padding=4):
    """Pad each image, crop it at a random place, and mirror half of the images."""
    number, _, height, width = images.shape
    offsets = torch.randint(2 * padding + 1, (2, number, 1))
    rows, columns = offsets[0] + torch.arange(height), offsets[1] + torch.arange(width)
    mirrored = torch.rand(number, 1) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(images, [padding] * 4)
    samples = torch.arange(number)
    # Advanced indices around a slice put the channels last.
    return padded[samples[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class DecodedCIFAR10LT(LongTailDataModule):
    """CIFAR-10-LT from a file of decoded images. Validation uses the test set, as in the published protocol."""

    val_is_test = True

    def __init__(self, file, imbalance_factor=100, batch_size=512):
        super().__init__(batch_size)
        self.file, self.imbalance_factor = file, imbalance_factor
        self.class_counts = long_tailed_counts(10, 5000, imbalance_factor)

    @override
    def make_sets(self):
        """Return the data sets, with a long-tailed choice of training images."""
        sets = torch.load(self.file)
        train = Images(*sets["train"], augment=False)
        chosen = LongTailed(train, self.imbalance_factor).indices
        return {
            "train": Images(train.images[chosen], train.targets[chosen], augment=True),
            "test": Images(*sets["test"], augment=False),
        }

    def _loader(self, name, **options):
        return super()._loader(name, collate_fn=as_it_is, **options)


def as_it_is(batch):
    """Return the batch unchanged: the data set has collated it already."""
    return batch


def decode(path):
    """Return an image as an array ``(3, H, W)``."""
    return np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)


def decode_all(folder, file):
    """Write all images and their labels into one file."""
    sets = {}
    with ProcessPoolExecutor() as pool:
        for name in ("train", "test"):
            samples = ImageFolder(folder / name).samples
            images = list(pool.map(decode, [path for path, _ in samples], chunksize=500))
            sets[name] = torch.from_numpy(np.stack(images)), torch.tensor([label for _, label in samples])
    unfinished = file.with_suffix(".tmp")
    torch.save(sets, unfinished)
    os.replace(unfinished, file)


def main():
    """Decode the images, then compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with {train,test}/CLASS/*.jpg")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="number of trainings that run at a time")
    parser.add_argument("--output", type=Path, default=Path("cifar10_lt"))
    options = parser.parse_args()
    if not (options.folder / "train").is_dir():
        parser.error(f"argument `folder` must have train/CLASS/*.jpg, but got {str(options.folder)!r}")
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "images.pt"
    if not file.exists():
        decode_all(options.folder, file)
    compare(
        {
            f"{name}{suffix}": Method(objective, loss=loss)
            for suffix, loss in (("", None), (" + logit adjustment", LogitAdjustedLoss))
            for name, objective in OBJECTIVES.items()
        },
        seeds=options.seeds,
        epochs=options.epochs,
        data=partial(DecodedCIFAR10LT, file),
        backbone=partial(CIFARResNet, depth=32),
        optimizer=partial(SGD, lr=0.2, momentum=0.9, weight_decay=5e-4),
        tail_below=500,
        model={"tta": "hflip", "many_above": 1000, "few_below": 200},
        trainer={"check_val_every_n_epoch": 5},
        jobs=options.jobs,
        output=options.output,
    )


if __name__ == "__main__":
    main()
