"""Tiny ImageNet as it is published, made long-tailed."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lightning_ssesam._validation import bad_argument, check_integer
from lightning_ssesam.data.listed import ListedImageModule, ListedImages
from lightning_ssesam.data.long_tailed import LongTailed
from lightning_ssesam.data.profiles import Profile, hold_out
from lightning_ssesam.data.reading import shown
from lightning_ssesam.data.walking import find_images
from lightning_ssesam.errors import ArgumentError


class TinyImageNetLT(ListedImageModule):
    """Long-tailed Tiny ImageNet by the protocol of Cao et al., "LDAM", NeurIPS 2019.

    ``root`` is the folder of the published archive, http://cs231n.stanford.edu/tiny-imagenet-200.zip, unpacked:
    ``train/n01443537/images/*.JPEG``, ``val/images/*.JPEG`` and ``val/val_annotations.txt``. The first class keeps most
    training images. The published validation images, 50 of each of the 200 classes, are the test set. They validate as
    well, as published. The published test images have no labels and are not read.

    Batches are pairs of images ``(N, 3, image_size, image_size)``, float32, and class indices ``(N,)``, int64, in the
    order of the sorted folder names.

    Attributes:
        class_names: Names of the classes: the first word of each in ``words.txt``, or the folders' names without it.

    Args:
        root: Folder of the published files.
        imbalance_factor: Largest over smallest class size, or its inverse; > 0.
        profile: ``"exponential"`` or ``"step"``; see :func:`~lightning_ssesam.data.long_tailed_counts`.
        val_per_class: Training images of each class that are held out for validation before the others are made
            long-tailed, an integer >= 0. With 0 the test set validates.
        image_size: Height and width of the images, an integer >= 1.
        seed: Seed that chooses the images, an integer >= 0.
        **kwargs: See :class:`~lightning_ssesam.data.ImageFileModule`. Images are normalised as for ImageNet.

    Raises:
        ArgumentError: If the folder is not as published; when a run starts, if images cannot be read.
    """

    def __init__(
        self,
        root: str | Path = "data/tiny-imagenet-200",
        imbalance_factor: float = 100.0,
        profile: Profile = "exponential",
        val_per_class: int = 0,
        image_size: int = 64,
        *,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root, self.seed = Path(root), check_integer("seed", seed, minimum=0)
        self.imbalance_factor, self.profile = imbalance_factor, profile
        folders = _class_folders(self.root)
        self.class_names = _names(self.root, folders)
        ignored: dict[str, Counter[str]] = {}
        train = ListedImages.pack(_train(self.root, folders, ignored))
        self.listed = {"train": train, "test": ListedImages.pack(_test(self.root, folders))}
        self._ignored = ignored
        self.image_size = self.choose_image_size(image_size, train)
        self.val_per_class = check_integer("val_per_class", val_per_class, minimum=0)
        self.val_is_test = val_per_class == 0
        self.parts, self.class_counts = self._divide(train, len(folders))

    def _divide(self, train: ListedImages, num_classes: int) -> tuple[dict[str, ListedImages], list[int]]:
        """Hold out the validation images, and make the others long-tailed."""
        labels = train.targets
        if self.val_per_class >= (smallest := int(labels.bincount().min())):
            raise bad_argument("val_per_class", f"less than the {smallest} images of a class", self.val_per_class)
        generator = torch.Generator().manual_seed(self.seed)
        held_out, others = hold_out(labels, [self.val_per_class] * num_classes, generator)
        kept = train.choose(others)
        tailed = LongTailed(kept, self.imbalance_factor, self.profile, self.seed)
        parts = {"train": kept.choose(tailed.indices), "test": self.listed["test"]}
        return ({**parts, "val": train.choose(held_out)} if self.val_per_class else parts), tailed.class_counts


def _not_published(root: Path, got: str) -> ArgumentError:
    expected = "the folder of tiny-imagenet-200.zip (http://cs231n.stanford.edu/tiny-imagenet-200.zip), unpacked"
    return bad_argument("root", expected, got_text=f"{shown(str(root))}, which {got}")


def _class_folders(root: Path) -> list[str]:
    try:
        folders = sorted(entry.name for entry in os.scandir(root / "train") if entry.is_dir())
    except OSError as error:
        raise _not_published(root, f"has no readable folder `train` ({error.strerror})") from error
    if not folders:
        raise _not_published(root, "has no folders in `train`")
    return folders


def _train(root: Path, folders: list[str], ignored: dict[str, Counter[str]]) -> Iterator[tuple[str, int]]:
    """Yield the training images. Every class folder also has a text file, which is no news."""
    for label, folder in enumerate(folders):
        images, others = find_images(os.path.join(root, "train", folder))
        if not images:
            raise _not_published(root, f"has no images in `train/{folder}`")
        others.pop(".txt", None)
        ignored[folder] = others
        yield from ((image.path, label) for image in images)


def _test(root: Path, folders: list[str]) -> list[tuple[str, int]]:
    """Return the published validation images, whose classes are in a text file."""
    path, labels = root / "val" / "val_annotations.txt", {folder: label for label, folder in enumerate(folders)}
    try:
        lines = [line.split("\t") for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise _not_published(root, f"has no readable file `val/val_annotations.txt` ({error})") from error
    unknown = next((fields for fields in lines if len(fields) < 2 or fields[1] not in labels), None)
    if unknown is not None or not lines:
        got = f"the line {shown(' '.join(unknown))}" if unknown else "no lines"
        raise _not_published(root, f"has {got} in `val/val_annotations.txt`, not an image and a class of `train`")
    return [(os.path.join(root, "val", "images", fields[0]), labels[fields[1]]) for fields in lines]


def _names(root: Path, folders: list[str]) -> list[str]:
    """Return names of the classes. Where two would have the same name, both have that of their folder as well."""
    try:
        lines = (root / "words.txt").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return folders
    words = {folder: text.split(",")[0].strip() for folder, _, text in (line.partition("\t") for line in lines)}
    names = [words.get(folder) or folder for folder in folders]
    repeated = {name for name, number in Counter(names).items() if number > 1}
    return [f"{name} {folder}" if name in repeated else name for name, folder in zip(names, folders, strict=True)]
