"""The base of data modules that read image files: checks of the files before training, and the size of the images."""

import hashlib
import os
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_ssesam._validation import check_integer
from lightning_ssesam.data.contents import hash_files
from lightning_ssesam.data.images import ImageDataModule, ImageFiles
from lightning_ssesam.data.reading import MAX_PIXELS, find_problem, shown, size_of
from lightning_ssesam.data.threads import in_threads
from lightning_ssesam.errors import ArgumentError

MAX_CHECKED_FILES = 500_000
"""Files of each set that are looked at before training by default. All published long-tailed sets have fewer."""

# Images whose headers tell the size, and the largest size that they can choose: a CPU can train on it.
_SAMPLE = 200
_LARGEST = 64
# Bad files that an error names, and folders of which a notice names the ignored files.
_NAMED = 5
_FOLDERS_NAMED = 10

# The files that this process has checked. Methods of a comparison may have data modules of their own on the same files.
_CHECKED: set[Hashable] = set()


class ImageFileModule(ImageDataModule):
    """Base of data modules that read image files. A subclass overrides :meth:`file_sets`.

    Before the first training, the header and the end of every file are looked at. This takes less than 10 s for 100,000
    JPEG files on a local disk (0.09 ms a file on one core). Damage in the middle of a file is found when it is read. Of
    sets with more files than ``max_checked_files``, that many are looked at, spread evenly over the set.

    Args:
        max_checked_files: Number of files of each set that are looked at before training, and whose size and time of
            change ``compare`` looks at, an integer >= 0, or None for all. A smaller one helps where opening a file is
            slow, as on a network disk.
        max_pixels: Pixels of the largest image that is read, an integer >= 1, or None for no limit. A small file may
            have a header of gigabytes of pixels. A larger limit than Pillow's replaces that, for the whole program.
        **kwargs: See :class:`~lightning_ssesam.data.images.ImageDataModule`.
    """

    image_size: int

    def __init__(
        self, max_pixels: int | None = MAX_PIXELS, max_checked_files: int | None = MAX_CHECKED_FILES, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if max_checked_files is not None:
            check_integer("max_checked_files", max_checked_files, minimum=0)
        self.max_checked_files = max_checked_files
        self.max_pixels = None if max_pixels is None else check_integer("max_pixels", max_pixels, minimum=1)
        self.in_channels = self.count_channels()
        self._ignored: Mapping[str, Counter[str]] = {}
        self._remarks: list[str] = []

    def file_sets(self) -> Mapping[str, ImageFiles]:
        """Return the data sets whose files are checked."""
        raise NotImplementedError(f"{type(self).__name__} has no `file_sets`.")

    @override
    def prepare_data(self) -> None:
        """Called in one process when a run starts: checks the files, unless that has been done."""
        self.check_files()

    @override
    def check_files(self) -> None:
        """Look at header and end of up to ``max_checked_files`` images of each set, once in a process.

        Lines say which files are ignored, and how many are not looked at.

        Raises:
            ArgumentError: If files are missing, broken, too large or no images. The message counts them and names the
                first five.
        """
        if self._files_checked:
            return
        sets = self.file_sets()
        ends = [(images.path(0), images.path(-1), len(images)) for images in sets.values() if len(images)]
        key = (type(self), self.max_pixels, self.max_checked_files, *ends)
        if key not in _CHECKED:
            for line in [*self._remarks, *_notice(self._ignored)]:
                rank_zero_info(line)
            check_images(list(sets.values()), self.max_checked_files)
        _CHECKED.add(key)
        self._files_checked = True

    def hash_images(self, sets: Iterable[ImageFiles], root: str | Path) -> str:
        """Return a text that changes with the name of an image, or with the size or the time of those that are checked.

        Args:
            sets: Images, in the order that counts.
            root: Folder of the images, whose own path does not count.
        """
        found, limit = list(sets), self.max_checked_files
        states = hash_files((path for images in found for _, path in spread_paths(images, limit)), root)
        if all(looked_at(len(images), limit) == len(images) for images in found):
            return states
        names, above = hashlib.sha256(), len(os.path.join(os.path.expanduser(root), ""))
        for images in found:
            for path in images.paths():
                names.update(os.fsencode(path[above:]) + b"\0")
        return f"{states} {names.hexdigest()}"

    def choose_image_size(self, image_size: int | None, images: ImageFiles) -> int:
        """Return a size that is given, or choose one: the median of the shorter sides of images, at most 64.

        The headers of up to 200 images, spread evenly over the set, are read. The lower of two medians counts. If no
        header can be read, the size is 64.
        """
        if image_size is not None:
            self.check_in_memory(check_integer("image_size", image_size, minimum=1), len(images))
            return int(image_size)
        side = median_side(images.path, len(images), self.max_pixels)
        median = _LARGEST if side is None else side
        if median > _LARGEST:
            self._remarks.append(
                f"Images are reduced to {_LARGEST}x{_LARGEST} pixels (the median of their shorter sides is {median})."
                " Give `image_size` for another size."
            )
        return min(_LARGEST, median)


def median_side(path: Callable[[int], str], number: int, max_pixels: int | None = MAX_PIXELS) -> int | None:
    """Return the median of the shorter sides of images; None if no header can be read.

    Args:
        path: Path of each image, by its index.
        number: Number of the images. The headers of up to 200 of them, spread evenly, are read.
        max_pixels: Pixels of the largest image that is read, an integer >= 1, or None for no limit.
    """
    sampled = min(_SAMPLE, number)
    sizes = (size_of(path(k * number // sampled), max_pixels) for k in range(sampled))
    sides = [min(size) for size in sizes if size is not None]
    return statistics.median_low(sides) if sides else None


def looked_at(number: int, limit: int | None) -> int:
    """Return how many of a number of files are looked at: no more than a limit, or all if that is None."""
    return number if limit is None else min(number, limit)


def spread_paths(images: ImageFiles, limit: int | None) -> Iterator[tuple[int, str]]:
    """Return index and path of the files of a set that are looked at, spread evenly over it."""
    number = len(images)
    if (chosen := looked_at(number, limit)) == number:
        return enumerate(images.paths())
    return ((index, images.path(index)) for index in (k * number // chosen for k in range(chosen)))


def check_images(sets: list[ImageFiles], limit: int | None = None) -> None:
    """Raise ``ArgumentError`` if an image of the sets cannot be read, as far as its header and its end show.

    Args:
        sets: Images to look at.
        limit: Images of each set that are looked at, spread evenly, an integer >= 0; None for all.
    """
    from PIL import Image

    total = sum(map(len, sets))
    checked = sum(looked_at(len(images), limit) for images in sets)
    if checked < total:
        others = "Damage in the others is found when they are read. `max_checked_files=None` looks at all."
        rank_zero_info(f"{checked:,} of {total:,} image files are looked at before training. {others}")
    with warnings.catch_warnings():
        # The error says it.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        bad = [
            (images, index, problem)
            for images in sets
            for index, problem in _problems(images, limit)
            if problem is not None
        ]
    if len(bad) == 1:
        ((images, index, problem),) = bad
        raise images.refusal(index, problem)
    if bad:
        named = "; ".join(f"{images.place(index)} ({problem})" for images, index, problem in bad[:_NAMED])
        more = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        expected = f"Expected {checked} files to be images that can be read"
        found = f"{len(bad)} that cannot be read: {named}{more}"
        raise ArgumentError(f"{expected}, but got {found}. Replace or remove them.")


def _problems(images: ImageFiles, limit: int | None) -> Iterator[tuple[int, str | None]]:
    """Yield the index of each image that is looked at, and what is wrong with it."""
    paths = spread_paths(images, limit)
    return in_threads(lambda pair: (pair[0], find_problem(pair[1], images.max_pixels)), paths)


def count_text(counts: Counter[str]) -> str:
    """Return how many files there are of each kind, the most frequent kind first: ``".heic 3, .gif 1"``."""
    return ", ".join(
        f"{kind} {number}" for kind, number in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    )


def _notice(ignored: Mapping[str, Counter[str]]) -> list[str]:
    """Return lines that say which files are ignored, for each folder with such files."""
    totals = {folder: sum(counts.values()) for folder, counts in ignored.items() if counts}
    lines = []
    for folder in list(totals)[:_FOLDERS_NAMED]:
        files = "1 file is" if totals[folder] == 1 else f"{totals[folder]} files are"
        subject, _, verb = files.rpartition(" ")
        lines.append(f"{subject} of {shown(folder)!r} {verb} ignored: {count_text(ignored[folder])}")
    if others := list(totals.values())[_FOLDERS_NAMED:]:
        lines.append(f"{sum(others)} files of {len(others)} more folders are ignored.")
    return lines
