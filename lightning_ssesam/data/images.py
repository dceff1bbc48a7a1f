"""Shared by the data sets of images: a base for data modules, a data set of files, the usual transforms."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_flag, check_integer
from lightning_ssesam.data.base import LongTailDataModule
from lightning_ssesam.data.image_input import IMAGENET_MEAN, IMAGENET_STD, SMALL, ImageInput
from lightning_ssesam.data.in_memory import BatchTransform, InMemoryImages, collate, decode
from lightning_ssesam.data.reading import MAX_PIXELS, read_image, shown, unreadable
from lightning_ssesam.errors import ArgumentError

Transform: TypeAlias = Callable[[Any], Any]

# Bytes of the images that the processes of a loader keep in memory, all together at most.
_MEMORY = 2**29


class ImageDataModule(LongTailDataModule):
    """Base of data modules of images. :meth:`make_sets` of a subclass gives its sets the two :meth:`transforms`.

    Args:
        train_transform: Transform from PIL images to tensors; by default random crops and flips, and normalisation.
        test_transform: Transform from PIL images to tensors; by default the centre of the image, normalised.
        in_memory: Flag that keeps the decoded images in memory, for images of up to 64x64 pixels and without transforms
            of your own. Whole batches get the usual random crops and flips and are normalised at once, on a CUDA device
            that trains if a quarter of its free memory holds the images of a set, else on the host. ``num_workers``
            processes decode the images when a run starts, and the training process makes the batches. An image takes
            ``3 * image_size**2`` bytes, in every process that trains.
        **kwargs: See :class:`~lightning_ssesam.data.LongTailDataModule`.

    Raises:
        ArgumentError: If ``in_memory`` comes with a transform, or with images above 64x64 pixels; from ``setup``, if
            the samples are no such images.
    """

    _batch_transforms: tuple[int, BatchTransform, BatchTransform] | None = None

    def __init__(
        self,
        train_transform: Transform | None = None,
        test_transform: Transform | None = None,
        in_memory: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.train_transform, self.test_transform = train_transform, test_transform
        self.in_memory = check_flag("in_memory", in_memory)
        self.check_in_memory()

    def check_in_memory(self, image_size: int | None = None, number: int | None = None) -> None:
        """Refuse ``in_memory`` together with what it cannot work with.

        Args:
            image_size: Height and width of the images; None if they are not known yet.
            number: Number of the images, for the message.

        Raises:
            ArgumentError: If there is a transform, or the images have more than 64x64 pixels.
        """
        if not self.in_memory:
            return
        for name in ("train_transform", "test_transform"):
            if getattr(self, name) is not None:
                expected = "None with in_memory=True, which makes whole batches by the usual transforms"
                raise bad_argument(name, expected, getattr(self, name))
        if image_size is not None and image_size > SMALL:
            size, images = 3 * image_size**2, "an image" if number is None else f"{number:,} training images"
            got = f"{image_size} ({size * (number or 1) / 2**20:,.1f} MiB for {images})"
            raise bad_argument("image_size", f"at most {SMALL} with in_memory=True", got_text=got)

    def transforms(self, image_size: int, **options: Any) -> tuple[Transform, Transform]:
        """Return the transforms of training and of test images: the arguments, or the usual ones by default.

        With ``in_memory`` they only decode and resize. The batches get the rest of the usual ones.

        Args:
            image_size: Height and width of the images, an integer >= 1.
            **options: See :func:`default_transforms`.
        """
        if self.test_transform is None:
            self.image_input = ImageInput(image_size, **options)
        if self.in_memory:
            self.check_in_memory(image_size)
            to_pixels, *of_batches = batch_transforms(image_size, **options)
            self._batch_transforms = image_size, of_batches[0], of_batches[1]
            return to_pixels, to_pixels
        to_train, to_test = default_transforms(image_size, **options)
        return self.train_transform or to_train, self.test_transform or to_test

    @override
    def setup(self, stage: str) -> None:
        """Called when a run starts: makes the data sets, once. With ``in_memory``, decodes them before a training."""
        super().setup(stage)
        if self.in_memory:
            self._checked_transforms()
            for name in list(self._sets) if stage == "fit" else ():
                self._set(name)

    @override
    def _set(self, name: str) -> Dataset[Any]:
        found = super()._set(name)
        if not self.in_memory or isinstance(found, InMemoryImages):
            return found
        size, to_train, to_test = self._checked_transforms()
        decoded = decode(found, size, to_train if name == "train" else to_test, self.num_workers)
        self._sets[name] = decoded
        return decoded

    def _checked_transforms(self) -> tuple[int, BatchTransform, BatchTransform]:
        if self._batch_transforms is None:
            expected = f"False for {type(self).__name__}, whose sets do not get their transforms from `transforms`"
            raise bad_argument("in_memory", expected, self.in_memory)
        return self._batch_transforms

    @override
    def _loader(self, name: str, **options: Any) -> DataLoader[Any]:
        images = self._set(name)
        if not isinstance(images, InMemoryImages):
            return super()._loader(name, **options)
        if self.trainer is not None:
            images = self._sets[name] = images.placed(self.trainer.strategy.root_device)
        # What lies on a device cannot be pinned.
        pin_memory = torch.cuda.is_available() and images.images.device.type == "cpu"
        return super()._loader(name, **{"num_workers": 0, "collate_fn": collate, "pin_memory": pin_memory, **options})

    @override
    def _workers_stay(self, name: str) -> bool:
        """Return whether the processes that load a set keep its images in memory."""
        return getattr(self._set(name), "_kept", None) is not None

    def with_transforms(self, sets: Mapping[str, "ImageFiles"], image_size: int) -> dict[str, Dataset[Any]]:
        """Give sets their transforms, and let them keep small images in memory, because decoding photos takes long.

        Args:
            sets: Sets of images by name. ``"train"`` is the one that trains.
            image_size: Height and width of the images, an integer >= 1.
        """
        transforms = dict(zip(("train", "test"), self.transforms(image_size), strict=True))
        may_keep = image_size <= SMALL and not self.in_memory
        memory = 3 * image_size**2 * sum(map(len, sets.values()))
        for name, images in sets.items():
            kind = "train" if name == "train" else "test"
            images.transform = transforms[kind]
            is_own = (self.train_transform if kind == "train" else self.test_transform) is not None
            if may_keep and memory * max(1, self.num_workers) <= _MEMORY and not is_own:
                images.keep_resized(image_size)
        return dict(sets)

    def count_channels(self) -> int | None:
        """Return the channels of the images: 3, or what ``test_transform`` makes of an image; None if unknown."""
        if self.test_transform is None:
            return 3
        from PIL import Image

        # The transform may be of any kind, and the first batch will show its errors.
        with suppress(Exception), torch.random.fork_rng(devices=[]):
            shape = tuple(self.test_transform(Image.new("RGB", (64, 64))).shape)
            return int(shape[0]) if len(shape) == 3 else None
        return None


class ImageFiles(Dataset[tuple[Any, Any]]):
    """Pairs of an image, read from its file as RGB and transformed, and its label.

    Attributes:
        targets: Label of every image, shape ``(N,)``; of multi-label data ``(N, C)``.
        transform: Transform from a PIL image to an element of a batch.
        max_pixels: Pixels of the largest image that is read; None for no limit.
    """

    targets: Tensor
    transform: Transform | None
    max_pixels: int | None = MAX_PIXELS
    _kept: dict[int, Any] | None = None

    def keep_resized(self, size: int) -> None:
        """Keep each image in memory once it is read, resized as the usual transforms of small images do first.

        Args:
            size: Height and width, an integer >= 1.
        """
        from torchvision.transforms import v2

        self._kept, self._resize = {}, v2.Resize((size, size))

    def path(self, index: int) -> str:
        """Return the path of an image."""
        raise NotImplementedError(f"{type(self).__name__} has no `path`.")

    def paths(self) -> Iterator[str]:
        """Yield the path of every image, in order."""
        return map(self.path, range(len(self)))

    def place(self, index: int) -> str:
        """Return where an image is, for a message."""
        return shown(self.path(index))

    def refusal(self, index: int, reason: str) -> ArgumentError:
        """Return the error for an image that cannot be read. The reason completes "but got"."""
        return unreadable(self.path(index), reason)

    def image(self, index: int) -> Any:
        """Return an image before its transform, a PIL image in RGB.

        Raises:
            ArgumentError: If the file is missing or is no image. The message has its path.
        """
        return read_image(self.path(index), self.max_pixels)

    def label(self, index: int) -> Any:
        """Return the label of an image."""
        return int(self.targets[index])

    @override
    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if self._kept is None:
            image = self.image(index)
        elif (image := self._kept.get(index)) is None:
            image = self._kept[index] = self._resize(self.image(index))
        return image if self.transform is None else self.transform(image), self.label(index)

    def __len__(self) -> int:
        return len(self.targets)


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

    usual = ImageInput(image_size, mean=mean, std=std, resize=resize)
    if image_size > SMALL:
        train = [v2.RandomResizedCrop(image_size)]
    else:
        train = [*usual.resizing(), v2.RandomCrop(image_size, padding=_largest_shift(image_size))]
    return v2.Compose([*train, v2.RandomHorizontalFlip(), *usual.to_tensor()]), usual.transform()


def _largest_shift(size: int) -> int:
    return size // 8


def batch_transforms(
    image_size: int, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD, resize: bool = True
) -> tuple[Transform, BatchTransform, BatchTransform]:
    """Return the transform from a PIL image to its pixels, uint8, and those of training and of test batches.

    Together they do what :func:`default_transforms` does. The arguments are its, for images of up to 64x64 pixels.
    """
    from torchvision.transforms import v2

    size = check_integer("image_size", image_size, minimum=1)
    to_pixels = v2.Compose([*([v2.Resize((size, size))] if resize else []), v2.PILToTensor()])
    means, deviations = tuple(mean), tuple(std)
    return to_pixels, BatchTransform(means, deviations, _largest_shift(size)), BatchTransform(means, deviations)
