"""Compares the objectives on small real images, on a CPU, from a folder with the image files of CIFAR-10.

    python benchmarks/cifar10_lt_cpu.py cifar/            # cifar/{train,test}/CLASS/*.jpg

The data is CIFAR-10, reduced to 16x16 pixels with 1,000 training and 200 test images of each class. It is then made
long-tailed with imbalance factor 100, which leaves 2,478 training images. A small network with group norm is trained
for 20 epochs, with four objectives, each with cross-entropy and with logit adjustment, with three seeds.

This shows how far the methods come in the same few epochs, not how far they can come. On a GPU,
``lightning-ssesam compare --config compare_cifar10_lt`` makes the full comparison. docs/results.md has the results.
"""

import sys
from functools import partial
from pathlib import Path

from PIL import Image
from torch.optim import SGD

from lightning_ssesam import ERM, SAM, SSESAM, ImbSAM
from lightning_ssesam.compare import Method, compare
from lightning_ssesam.data import ImageFolderLT
from lightning_ssesam.data.walking import is_hidden
from lightning_ssesam.losses import LogitAdjustedLoss
from lightning_ssesam.models import SmallConvNet

OBJECTIVES = {
    "ERM": ERM,
    "SAM": partial(SAM, rho=0.05),
    "ImbSAM": partial(ImbSAM, rho=0.05),
    "SSE-SAM": partial(SSESAM, head_rho=0.05, tail_rho=0.1),
}


def reduce(source, target, kept):
    """Copy the first images of each class at 16x16 pixels; ``kept`` is their number, by the name of the set."""
    for folder in sorted(path for path in source.glob("*/*") if path.is_dir() and not is_hidden(path.name)):
        images = sorted(path for path in folder.iterdir() if not is_hidden(path.name))
        for number, path in enumerate(images[: kept[folder.parent.name]]):
            copy = target / folder.relative_to(source) / f"{number:04}.png"
            copy.parent.mkdir(parents=True, exist_ok=True)
            Image.open(path).convert("RGB").resize((16, 16), Image.Resampling.BOX).save(copy)


def main():
    """Reduce the images, then compare."""
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "train").is_dir():
        sys.exit("usage: python benchmarks/cifar10_lt_cpu.py FOLDER   # with FOLDER/{train,test}/CLASS/*.jpg")
    output = Path("cifar10_lt_cpu")
    if not (output / "images").exists():
        reduce(Path(sys.argv[1]), output / "unfinished", {"train": 1000, "test": 200})
        (output / "unfinished").rename(output / "images")
    compare(
        {
            f"{name}{suffix}": Method(objective, loss=loss)
            for suffix, loss in (("", None), (" + logit adjustment", LogitAdjustedLoss))
            for name, objective in OBJECTIVES.items()
        },
        seeds=3,
        epochs=20,
        # Validation uses the test set, as in the published protocol.
        data=partial(
            ImageFolderLT, output / "images", imbalance_factor=100, val_fraction=0.0, image_size=16, batch_size=32
        ),
        backbone=partial(SmallConvNet, in_channels=3, width=16),
        optimizer=partial(SGD, lr=0.05, momentum=0.9, weight_decay=5e-4),
        tail_below=100,
        model={"many_above": 200, "few_below": 40},
        trainer={"accelerator": "cpu"},
        output=output,
    )


if __name__ == "__main__":
    main()
