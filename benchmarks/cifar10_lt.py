"""Compares the objectives on real images in minutes, on a GPU, from a folder with the image files of CIFAR-10.

    python benchmarks/cifar10_lt.py cifar/ --epochs 80 --jobs 14          # cifar/{train,test}/CLASS/*.jpg

The data is CIFAR-10, made long-tailed with imbalance factor 100 (12,406 training images). A ResNet-32 is trained with
four objectives, each with cross-entropy and with logit adjustment, with three seeds.

Each training decodes the images once and keeps them in memory, so that many trainings can share a GPU. The batches are
large, because the calls of a step take longer than its arithmetic.
``lightning-ssesam compare --config compare_cifar10_lt`` makes the full comparison.
"""

import argparse
from functools import partial
from pathlib import Path

from cifar10_lt_cpu import OBJECTIVES
from torch.optim import SGD

from lightning_ssesam.compare import Method, compare
from lightning_ssesam.data import ImageFolderLT
from lightning_ssesam.losses import LogitAdjustedLoss
from lightning_ssesam.models import CIFARResNet


def main():
    """Compare the objectives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with {train,test}/CLASS/*.jpg")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="number of trainings that run at a time")
    parser.add_argument("--output", type=Path, default=Path("cifar10_lt"))
    options = parser.parse_args()
    if not (options.folder / "train").is_dir():
        parser.error(f"argument `folder` must have train/CLASS/*.jpg, but got {str(options.folder)!r}")
    compare(
        {
            f"{name}{suffix}": Method(objective, loss=loss)
            for suffix, loss in (("", None), (" + logit adjustment", LogitAdjustedLoss))
            for name, objective in OBJECTIVES.items()
        },
        seeds=options.seeds,
        epochs=options.epochs,
        # Validation uses the test set, as in the published protocol.
        data=partial(
            ImageFolderLT,
            options.folder,
            imbalance_factor=100,
            val_fraction=0.0,
            image_size=32,
            batch_size=512,
            in_memory=True,
        ),
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
