"""Shared by the data sets of images: a base for data modules, reading of files, the usual transforms."""

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_ssesam._validation import check_integer
from lightning_ssesam.data.base import LongTailDataModule
from lightning_ssesam.errors import ArgumentError

Transform: TypeAlias = Callable[[Any], Any]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Images up to this size are not cropped at the test, as is usual for CIFAR and Tiny ImageNet.
_SMALL = 64


# Folders that operating systems, file servers and tools put among data, for previews, copies and deleted files.
_SYSTEM_FOLDERS = {
    *("__macosx", "__pycache__", "lost+found", "system volume information", "$recycle.bin"),
    *("@eadir", "#eadir", "@recycle", "#recycle", "#snapshot", "@recently-snapshot"),
    *(".ipynb_checkpoints", ".appledouble", ".trashes", ".trash-1000", ".spotlight-v100", ".fseventsd", ".thumbnails"),
}


def is_hidden(path: str) -> bool:
    """Return whether a path is that of a hidden or a system's file or folder, or leads through one.

    A name is hidden if it begins with a dot. The folders above an absolute path's file may be hidden, because the whole
    data set may lie in one such as ``~/.cache``.

    Args:
        path: Path relative to the folder of the data, or an absolute path.
    """
    folder, _, name = path.replace(os.sep, "/").rpartition("/")
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS or _leads_through_hidden(folder)


@lru_cache(maxsize=10_000)
def _leads_through_hidden(folder: str) -> bool:
    names = folder.split("/")
    dotted = [] if os.path.isabs(folder) else [name for name in names if name.startswith(".")]
    return any(name not in (".", "..") for name in dotted) or not _SYSTEM_FOLDERS.isdisjoint(map(str.lower, names))


class ImageDataModule(LongTailDataModule):
    """Base of data modules of images. :meth:`make_sets` of a subclass gives its sets the two :meth:`transforms`.

    Args:
        train_transform: Transform from PIL images to tensors; by default random crops and flips, and normalisation.
        test_transform: Transform from PIL images to tensors; by default the centre of the image, normalised.
        **kwargs: See :class:`~lightning_ssesam.data.LongTailDataModule`.
    """

    def __init__(
        self, train_transform: Transform | None = None, test_transform: Transform | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.train_transform, self.test_transform = train_transform, test_transform

    def transforms(self, image_size: int, **options: Any) -> tuple[Transform, Transform]:
        """Return the transforms of training and of test images: the arguments, or the usual ones by default.

        Args:
            image_size: Height and width of the images, an integer >= 1.
            **options: See :func:`default_transforms`.
        """
        to_train, to_test = default_transforms(image_size, **options)
        return self.train_transform or to_train, self.test_transform or to_test


class ImageFiles(Dataset[tuple[Any, int]]):
    """Pairs of an image, read from its file as RGB and transformed, and its label.

    Attributes:
        targets: Label of every image, shape ``(N,)``.
        transform: Transform from a PIL image to an element of a batch.
    """

    targets: Tensor
    transform: Transform | None

    def path(self, index: int) -> str:
        """Return the path of an image."""
        raise NotImplementedError(f"{type(self).__name__} has no `path`.")

    def image(self, index: int) -> Any:
        """Return an image before its transform, a PIL image in RGB.

        Raises:
            ArgumentError: If the file is missing or is no image. The message has its path.
        """
        return read_image(self.path(index))

    @override
    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.image(index)
        return image if self.transform is None else self.transform(image), int(self.targets[index])

    def __len__(self) -> int:
        return len(self.targets)


def read_image(path: str) -> Any:
    """Return the image in a file, converted to a PIL image in RGB."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            # Pillow would clip the values of these modes to white.
            if image.mode.startswith(("I", "F")):
                raise TypeError(f"more than 8 bits a channel (mode {image.mode!r})")
            return image.convert("RGB")
    # A broken file makes Pillow raise almost any kind of exception.
    except Exception as error:
        raise ArgumentError(f"Expected {path} to be an image that can be read, but got {error!r}.") from error


def default_transforms(
    image_size: int, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD, resize: bool = True
) -> tuple[Transform, Transform]:
    """Return the usual transforms of training and of test images, from PIL images to tensors.

    Args:
        image_size: Height and width of the result, an integer >= 1. Up to 64, training images are shifted by up to an
            eighth of it. Above 64, training images are random crops of any size, and test images lose their edges.
        mean: Mean of each channel, which is subtracted.
        std: Standard deviation of each channel, by which is divided.
        resize: Whether to resize images first, if ``image_size`` is at most 64.
    """
    from torchvision.transforms import v2

    size = check_integer("image_size", image_size, minimum=1)
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    if size > _SMALL:
        train = [v2.RandomResizedCrop(size)]
        test = [v2.Resize(size * 8 // 7), v2.CenterCrop(size)]
    else:
        test = [v2.Resize((size, size))] if resize else []
        train = [*test, v2.RandomCrop(size, padding=size // 8)]
    return v2.Compose([*train, v2.RandomHorizontalFlip(), *to_tensor]), v2.Compose([*test, *to_tensor])
