"""Images that are listed by their paths, and the base of data modules that choose their sets among them."""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.data.image_files import ImageFileModule
from lightning_ssesam.data.images import ImageFiles
from lightning_ssesam.data.packed import PackedTexts
from lightning_ssesam.data.profiles import hold_out
from lightning_ssesam.data.reading import MAX_PIXELS


class ListedImages(ImageFiles):
    """Pairs of an image and its label. Memory holds the characters of each path and 24 bytes an image.

    Attributes:
        names: Path of each image, length N.
        targets: Label of each image, shape ``(N,)``, int64.

    Args:
        names: Path of each image, length N.
        targets: Label of each image, shape ``(N,)``, int64.
        max_pixels: Pixels of the largest image that is read, an integer >= 1, or None for no limit.
    """

    def __init__(self, names: PackedTexts, targets: Tensor, max_pixels: int | None = MAX_PIXELS) -> None:
        self.names, self.targets, self.max_pixels, self.transform = names, targets, max_pixels, None

    @classmethod
    def pack(cls, samples: Iterable[tuple[str, int]]) -> "ListedImages":
        """Return the data set of pairs of a path and a label.

        Args:
            samples: Path and label of each image, taken one by one.
        """
        labels: list[int] = []

        def paths() -> Iterator[str]:
            for path, label in samples:
                labels.append(label)
                yield path

        names = PackedTexts.pack(paths())
        return cls(names, torch.tensor(labels, dtype=torch.int64))

    def choose(self, indices: Tensor) -> "ListedImages":
        """Return some of the images, in the order of ``indices``, shape ``(M,)``, int64."""
        return ListedImages(self.names.take(indices), self.targets[indices], self.max_pixels)

    @property
    def samples(self) -> list[tuple[str, int]]:
        """Path and label of each image, made anew, as torchvision's ``ImageFolder`` has them."""
        return list(zip(self.names, self.targets.tolist(), strict=True))

    @override
    def path(self, index: int) -> str:
        return self.names[index]

    @override
    def paths(self) -> Iterator[str]:
        return iter(self.names)


class ListedImageModule(ImageFileModule):
    """Base of data modules whose constructor lists the images of a folder, and chooses those of each set.

    A subclass sets the attributes.

    Attributes:
        root: Folder of the images.
        listed: Images that were found, by set.
        parts: Images that were chosen, by set.
    """

    root: Path
    listed: dict[str, ListedImages]
    parts: dict[str, ListedImages]

    @override
    def file_sets(self) -> dict[str, ImageFiles]:
        """Return all images of the folder that were found, whether they are chosen or not."""
        return self._limited(self.listed)

    @override
    def fingerprint(self) -> str:
        """Return a text that changes with the name, the size or the time of change of an image of any set."""
        return self.hash_images([images for _, images in sorted(self.parts.items())], self.root)

    @override
    def make_sets(self) -> dict[str, Dataset[Any]]:
        """Return the sets, which the constructor has listed and chosen."""
        return self.with_transforms(self._limited(self.parts), self.image_size)

    def _limited(self, sets: Mapping[str, ListedImages]) -> dict[str, ImageFiles]:
        return {name: ListedImages(images.names, images.targets, self.max_pixels) for name, images in sets.items()}


def divide(images: ListedImages, fractions: Mapping[str, float], seed: int) -> dict[str, ListedImages]:
    """Draw sets with these fractions of each class, rounded. The other images, at least one a class, train.

    Args:
        images: Images of all sets.
        fractions: Fraction of each class in each set, in (0, 1).
        seed: Seed of the draws, an integer >= 0.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    sizes = images.targets.bincount().tolist()
    for name, fraction in fractions.items():
        remaining = images.targets.bincount().tolist()
        counts = [min(math.floor(n * fraction + 0.5), r - 1) for n, r in zip(sizes, remaining, strict=True)]
        if sum(counts) == 0:
            raise bad_argument(f"{name}_fraction", "large enough to hold out an image of some class", fraction)
        picked, others = hold_out(images.targets, counts, generator)
        parts[name], images = images.choose(picked), images.choose(others)
    return {**parts, "train": images}
