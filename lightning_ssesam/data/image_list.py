"""Images named in list files, as ImageNet-LT, Places-LT and iNaturalist 2018 are published."""

import os
from array import array
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_integer
from lightning_ssesam.class_order import check_class_names
from lightning_ssesam.data.contents import hash_files
from lightning_ssesam.data.image_files import ImageFileModule, looked_at
from lightning_ssesam.data.images import ImageFiles, Transform
from lightning_ssesam.data.reading import MAX_PIXELS, read_image, shown
from lightning_ssesam.data.walking import is_hidden
from lightning_ssesam.errors import ArgumentError

_BOM = b"\xef\xbb\xbf"

# Lines whose places are read as numbers of Python at a time.
_PART = 2**16

# Labels are stored in 32 bits.
_MAX_CLASSES = 2**31


class ImageList(ImageFiles):
    """The images that a list file names. A line has a path, which may contain spaces, a space and the label.

    Memory holds the start and the label of each line, 12 bytes an image. A path is read from the file when its image is
    requested. Blank lines are skipped, and so are lines of hidden files, such as ``cat/.1.jpg``.

    Attributes:
        targets: Label of every image, shape ``(N,)``, int32.
        num_classes: C.

    Args:
        path: List file.
        root: Folder that the paths in the list are relative to.
        num_classes: C, an integer in [1, 2**31]; by default the largest label + 1.
        transform: Transform from a PIL image in RGB to an element of a batch.
        max_pixels: Pixels of the largest image that is read, an integer >= 1, or None for no limit.

    Raises:
        ArgumentError: If the file cannot be read, or a line of it is wrong; when an image is requested, if it cannot
            be read. The message names file and line.
    """

    def __init__(
        self,
        path: str | Path,
        root: str | Path = ".",
        num_classes: int | None = None,
        transform: Transform | None = None,
        max_pixels: int | None = MAX_PIXELS,
    ) -> None:
        self.max_pixels = None if max_pixels is None else check_integer("max_pixels", max_pixels, minimum=1)
        limit = _MAX_CLASSES if num_classes is None else check_integer("num_classes", num_classes, minimum=1)
        if limit > _MAX_CLASSES:
            raise bad_argument("num_classes", f"at most {_MAX_CLASSES}", num_classes)
        self.list_file, self.root, self.transform = str(path), str(root), transform
        try:
            starts, labels = _scan(self.list_file, limit)
        except OSError as error:
            raise _bad_file(self.list_file, error.strerror or repr(error)) from error
        if not labels:
            raise _bad_file(self.list_file, "a file without any (lines of hidden files do not count)")
        self._starts = torch.frombuffer(starts, dtype=torch.int64)
        self.targets = torch.frombuffer(labels, dtype=torch.int32)
        self.num_classes = int(self.targets.max()) + 1 if num_classes is None else num_classes

    @override
    def path(self, index: int) -> str:
        # Opened each time, because an open file cannot be shared with the processes of a loader.
        with self._opened() as file:
            return self._read_path(file, index, int(self._starts[index]), int(self.targets[index]))

    @override
    def paths(self) -> Iterator[str]:
        with self._opened() as file:
            # In parts, because a list of all numbers would take more memory than the numbers.
            for number, starts in enumerate(torch.split(self._starts, _PART)):
                labels = self.targets[number * _PART : (number + 1) * _PART].tolist()
                for index, (start, label) in enumerate(zip(starts.tolist(), labels, strict=True), start=number * _PART):
                    yield self._read_path(file, index, start, label)

    @override
    def place(self, index: int) -> str:
        return f"{self._line(index)}: {shown(self.path(index))}"

    @override
    def refusal(self, index: int, reason: str) -> ArgumentError:
        return self._bad_line(index, str(super().refusal(index, reason)))

    @override
    def image(self, index: int) -> Any:
        # The error for a line that has changed names the line already.
        path = self.path(index)
        try:
            return read_image(path, self.max_pixels)
        except ArgumentError as error:
            raise self._bad_line(index, str(error)) from error

    def _opened(self) -> BinaryIO:
        try:
            return open(self.list_file, "rb")
        except OSError as error:
            raise _bad_file(self.list_file, error.strerror or repr(error)) from error

    def _read_path(self, file: BinaryIO, index: int, start: int, label: int) -> str:
        file.seek(start)
        fields = file.readline().rsplit(None, 1)
        if len(fields) != 2 or fields[1].lstrip(b"0") != (b"%d" % label).lstrip(b"0"):
            raise self._bad_line(index, "Expected the line that was here when the file was scanned, but got another.")
        return os.path.join(self.root, os.fsdecode(fields[0]))

    def _bad_line(self, index: int, sentence: str) -> ArgumentError:
        return ArgumentError(f"{self._line(index)}: {sentence}")

    def _line(self, index: int) -> str:
        """Return the list file and the number of the line of an image, as text."""
        with self._opened() as file:
            number, remaining = 1, int(self._starts[index])
            while chunk := file.read(min(remaining, 2**20)):
                number, remaining = number + chunk.count(b"\n"), remaining - len(chunk)
        return f"{shown(self.list_file)}, line {number}"


class ImageListLT(ImageFileModule):
    """A long-tailed data set of list files, such as ImageNet-LT, Places-LT and iNaturalist 2018.

    The constructor reads the training list. Before training, ``prepare_data`` looks at the header of every image of all
    lists, up to ``max_checked_files`` of each, and ``setup`` reads the first image of each list. Symbolic links are
    followed. Batches are pairs of images ``(N, 3, image_size, image_size)``, float32, and class indices ``(N,)``,
    int64.

    Attributes:
        image_size: Height and width of the images, as given or chosen.

    Args:
        train: List file of the training images; see :class:`~lightning_ssesam.data.ImageList`.
        test: List file of the test images.
        val: List file of the validation images; without one the test set validates.
        root: Folder that the paths in the lists are relative to.
        num_classes: C, an integer >= 1; by default the largest training label + 1.
        class_names: Text file with the name of class 0 in its first line, and so on; or the names themselves. Without
            it, the classes are named by their labels.
        image_size: Height and width of the images, an integer >= 1. By default the median of the shorter sides of up to
            200 training images, spread evenly over the list, and at most 64.
        batch_size: Samples in a training batch, an integer >= 1.
        num_workers: Processes that load samples, an integer >= 0; 0 loads them in the training process.
        **kwargs: See :class:`~lightning_ssesam.data.ImageFileModule` for ``max_pixels``, and
            :class:`~lightning_ssesam.data.ImageDataModule`. Images are normalised as for ImageNet.

    Raises:
        ArgumentError: If a file cannot be read, a line of it is wrong, or a class has no training image.
    """

    def __init__(
        self,
        train: str | Path,
        test: str | Path,
        val: str | Path | None = None,
        root: str | Path = ".",
        num_classes: int | None = None,
        image_size: int | None = None,
        batch_size: int = 64,
        num_workers: int = 4,
        class_names: str | Path | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, **kwargs)
        self.root, self.test, self.val = root, test, val
        self.val_is_test = val is None
        self._train = ImageList(train, root, num_classes, max_pixels=self.max_pixels)
        self.image_size = self.choose_image_size(image_size, self._train)
        self.class_counts = counts_of_images(self._train)
        if class_names is not None:
            self.class_names = check_class_names(_read_names(class_names), self.num_classes)

    @override
    def file_sets(self) -> dict[str, ImageFiles]:
        """Return the images of all lists."""
        lists = {"test": self.test} if self.val is None else {"val": self.val, "test": self.test}
        return {"train": self._train, **{name: self._list(path) for name, path in lists.items()}}

    @override
    def fingerprint(self) -> str:
        """Return a text that changes with a list, or with the size or the time of change of an image."""
        lists = [os.path.realpath(path) for path in (self._train.list_file, self.test, self.val) if path is not None]
        images = chain.from_iterable(_listed(path, self.root, self.max_checked_files) for path in lists)
        return f"{hash_files(lists, os.path.dirname(lists[0]))} {hash_files(images, self.root)}"

    @override
    def make_sets(self) -> dict[str, Dataset[Any]]:
        """Read the other lists, and the first image of each list."""
        sets = self.file_sets()
        for images in sets.values():
            images.image(0)
        return self.with_transforms(sets, self.image_size)

    def _list(self, path: str | Path) -> ImageList:
        return ImageList(path, self.root, self.num_classes, max_pixels=self.max_pixels)


def _read_names(names: str | Path | list[str]) -> list[str]:
    """Return the names of the classes: those that are given, or the lines of a file."""
    if not isinstance(names, str | Path):
        return names
    try:
        return Path(names).read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, ValueError) as error:
        raise bad_argument(
            "class_names", "a text file with a name in each line", got_text=f"{names}: {error}"
        ) from error


def _scan(path: str, limit: int) -> tuple["array[int]", "array[int]"]:
    """Return the start and the label of each line that is not blank."""
    starts, labels = array("q"), array("i")
    with open(path, "rb") as file:
        start = file.seek(len(_BOM) if file.read(len(_BOM)) == _BOM else 0)
        for number, line in enumerate(file, start=1):
            fields = line.rsplit(None, 1)
            # Every label has at most ten digits, and `int` raises on thousands of them.
            if len(fields) == 2 and len(fields[1]) <= 10 and fields[1].isdigit() and (label := int(fields[1])) < limit:
                if not is_hidden(os.fsdecode(fields[0])):
                    starts.append(start)
                    labels.append(label)
            elif fields:
                expected = "a path and a label" if len(fields) == 1 else f"a label that is an integer in [0, {limit})"
                raise ArgumentError(f"{path}, line {number}: Expected {expected}, but got {os.fsdecode(fields[-1])!r}.")
            start += len(line)
    return starts, labels


def _listed(path: str, root: str | Path, limit: int | None) -> Iterator[str]:
    """Yield the paths of a list file, also those of hidden files, or a number of them that is spread over it evenly."""
    try:
        with open(path, "rb") as file:
            number = sum(not line.isspace() for line in file)
            chosen, next_one = looked_at(number, limit), 0
            file.seek(0)
            for index, line in enumerate(line for line in file if not line.isspace()):
                if next_one < chosen and index * chosen >= next_one * number:
                    next_one += 1
                    if fields := line.removeprefix(_BOM).rsplit(None, 1):
                        yield os.path.join(root, os.fsdecode(fields[0]))
    except OSError as error:
        raise _bad_file(path, error.strerror or repr(error)) from error


def _bad_file(path: str, got: str) -> ArgumentError:
    return ArgumentError(f"{path}: Expected a text file with lines of a path and a label, but got {got}.")


def counts_of_images(images: ImageList) -> list[int]:
    """Return the images of each class, length C, or raise ``ArgumentError`` if a class has none."""
    # Not `bincount`, which would make a vector of length 2,000,000,000 for a label of that size.
    present, counts = np.unique(images.targets.numpy(), return_counts=True)
    missing = images.num_classes - len(present)
    if missing:
        gaps = np.flatnonzero(present != np.arange(len(present)))
        first = int(gaps[0]) if len(gaps) else len(present)
        expected = f"{images.list_file}: Expected an image of every class in [0, {images.num_classes})"
        raise ArgumentError(f"{expected}, but got none of {missing} of them, such as class {first}.")
    return [int(count) for count in counts]
