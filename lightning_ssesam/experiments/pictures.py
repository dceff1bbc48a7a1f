"""The pictures to predict: those of a folder or of a list file, with their labels where these are known."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.data.image_files import count_text
from lightning_ssesam.data.packed import PackedTexts
from lightning_ssesam.data.reading import image_endings, read_image, shown
from lightning_ssesam.data.walking import find_images
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.class_names import closest, did_you_mean
from lightning_ssesam.experiments.trust import say


class Pictures(NamedTuple):
    """Pictures: their paths, and the class index of each one; None if the classes are not known."""

    paths: list[str]
    labels: list[int] | None


class Batch(NamedTuple):
    """Some pictures as inputs ``(N, ...)``, their places in the list, and why others cannot be read."""

    inputs: Tensor
    places: list[int]
    unreadable: list[str]


class PictureSet(Dataset[tuple[int, Tensor | str]]):
    """The place of each picture and its input, or the reason why it cannot be read.

    Args:
        paths: Paths of the pictures.
        transform: Transform from a PIL image to an input.
    """

    def __init__(self, paths: Sequence[str], transform: Callable[[Any], Tensor]) -> None:
        self.paths, self.transform = PackedTexts.pack(paths), transform

    @override
    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            image = read_image(self.paths[index])
        except ArgumentError as error:
            return index, str(error)
        return index, self.transform(image)

    def __len__(self) -> int:
        return len(self.paths)


def collate(samples: Sequence[tuple[int, Tensor | str]]) -> Batch:
    """Return the batch of some elements of a :class:`PictureSet`."""
    read = [(place, value) for place, value in samples if isinstance(value, Tensor)]
    inputs = torch.stack([value for _, value in read]) if read else torch.empty(0)
    unreadable = [value for _, value in samples if isinstance(value, str)]
    return Batch(inputs, [place for place, _ in read], unreadable)


def find_pictures(source: Path, class_names: Sequence[str], is_labelled: bool | None = None) -> Pictures:
    """Return the pictures of a folder, a list file, or a single file.

    A folder is labelled if all of its pictures lie in folders with names of classes. A list file has a path in each
    line, relative to the folder of the list. It is labelled if the name or the index of a class follows each path.

    Args:
        source: Folder, list file or picture.
        class_names: Name of each class.
        is_labelled: Whether the classes of the pictures are known; found out by default.

    Raises:
        ArgumentError: If there are no pictures, or they have no labels although ``is_labelled`` is set.
    """
    if source.is_dir():
        return _of_folder(source, class_names, is_labelled)
    if not source.is_file():
        raise bad_argument(
            "images", "a folder, a list file or an image", got_text=f"{str(source)!r}, which is not there"
        )
    if source.suffix.lower() in image_endings():
        if is_labelled:
            raise bad_argument("labelled", "False for a single image", is_labelled)
        return Pictures([str(source)], None)
    return _of_list(source, class_names, is_labelled)


def _of_folder(folder: Path, class_names: Sequence[str], is_labelled: bool | None) -> Pictures:
    try:
        images, others = find_images(str(folder))
    except OSError as error:
        raise bad_argument("images", "a folder that can be read", got_text=f"{folder}: {error.strerror}") from error
    if not images:
        seen = f" but other files: {count_text(others)}" if others else ""
        raise bad_argument("images", "a folder with images", got_text=f"{str(folder)!r} with none{seen}")
    paths = [image.path for image in images]
    folders = [Path(path).relative_to(folder).parts[0] for path in paths]
    index = {name: number for number, name in enumerate(class_names)}
    unknown = sorted({name for name, path in zip(folders, paths, strict=True) if name not in index})
    if is_labelled and unknown:
        guess = did_you_mean(closest(unknown[0], class_names))
        expected = "a labelled folder, whose images lie in folders with the names of classes"
        raise ArgumentError(f"{bad_argument('images', expected, got_text=f'one with {shown(unknown[0])!r}')}{guess}")
    if is_labelled is None and unknown and not index.keys().isdisjoint(folders):
        guess = did_you_mean(closest(unknown[0], class_names))
        say(f"The images count as not labelled, because {shown(unknown[0])!r} is no class.{guess}")
    if is_labelled is False or unknown:
        return Pictures(paths, None)
    return Pictures(paths, [index[name] for name in folders])


def _of_list(file: Path, class_names: Sequence[str], is_labelled: bool | None) -> Pictures:
    try:
        text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise bad_argument("images", "a file that can be read", got_text=f"{file}: {error.strerror}") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not lines or "\0" in text:
        raise bad_argument("images", "a list file with a path in each line", got_text=f"{str(file)!r}, which is none")
    classes = _Classes(class_names)
    if is_labelled is None:
        is_labelled = not _resolve(file, lines[0][1]).exists() and classes.divide(lines[0][1]) is not None
    if not is_labelled:
        return Pictures([str(_resolve(file, line)) for _, line in lines], None)
    paths, labels = [], []
    for number, line in lines:
        if (divided := classes.divide(line)) is None:
            expected = "a path and the name or the index of a class"
            raise ArgumentError(f"{file}, line {number}: Expected {expected}, but got {shown(line)!r}.")
        paths.append(str(_resolve(file, divided[0])))
        labels.append(divided[1])
    return Pictures(paths, labels)


def _resolve(file: Path, path: str) -> Path:
    return file.parent / os.path.expanduser(path)


class _Classes:
    """The classes by name, found at the end of a line in a time that does not depend on how many there are."""

    def __init__(self, class_names: Sequence[str]) -> None:
        self.index: dict[str, int] = {}
        self.number = len(class_names)
        for number, name in enumerate(class_names):
            self.index.setdefault(name, number)
        # A name may contain spaces. The longest one counts.
        self.lengths = sorted({len(name) for name in self.index if name}, reverse=True)

    def divide(self, line: str) -> tuple[str, int] | None:
        """Return path and class of a line, or None if it does not end with the name or the index of a class."""
        for length in self.lengths:
            path, name = line[:-length], line[-length:]
            if name in self.index and path.rstrip() not in ("", path):
                return path.rstrip(), self.index[name]
        path, _, label = line.rpartition(" ") if " " in line else line.rpartition("\t")
        is_index = label.isascii() and label.isdigit() and len(label) < 10 and int(label) < self.number
        return (path.rstrip(), int(label)) if path and is_index else None
