"""Images with any number of labels each, named in a CSV file."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_below_one, check_fraction, check_integer
from lightning_ssesam.data.contents import hash_files
from lightning_ssesam.data.image_files import ImageFileModule
from lightning_ssesam.data.images import ImageFiles
from lightning_ssesam.data.label_table import Columns, LabelTable, read_table
from lightning_ssesam.data.packed import PackedTexts
from lightning_ssesam.data.reading import MAX_PIXELS, shown
from lightning_ssesam.errors import ArgumentError


class ImageTableLT(ImageFileModule):
    """Long-tailed images with any number of labels each: a CSV file names the images and their labels.

    The table has a column of file names, and the labels in one of two forms. Either one column has the names of an
    image's labels, such as ``cat|dog``, and nothing for no label. Or there is a column for each label, with 1 for yes,
    0 for no, and nothing for a missing label. A column ``split`` may say ``train``, ``val`` or ``test``. Otherwise the
    sets are drawn at random, so that each of them has about the same share of the images of each label.

    Batches are pairs of images ``(N, 3, image_size, image_size)``, float32, and answers ``(N, C)``, int64: 0, 1 or -100
    (missing). Before training, the header and the end of every file are looked at.

    Attributes:
        class_names: Name of each label, length C.
        class_counts: Training images that have each label, length C.
        num_samples: Number of training images.
        image_size: Height and width of the images, as given or chosen.

    Args:
        table: CSV file in UTF-8 with a first line of column names. Commas, semicolons or tabs stand between columns.
        root: Folder that the file names are relative to; by default that of the table.
        files: Column of the file names.
        labels: Column of label names, or a list of columns of 0 and 1. By default the column ``labels``, or else all
            columns but those of files and sets.
        split: Column of the sets; by default ``split``, if there is such a column.
        separator: Text between label names in a cell; ``|`` or ``;`` by default.
        class_names: Name of each label. By default those that training images have, in alphabetical order, or the names
            of the columns.
        val_fraction: Fraction of the images that validates if the sets are drawn, in [0, 1). With 0 the test set does.
        test_fraction: Fraction of the images that tests if the sets are drawn, in (0, 1).
        image_size: Height and width of the images, an integer >= 1. By default the median of the shorter sides of up to
            200 training images, spread evenly over the table, and at most 64.
        batch_size: Samples in a training batch, an integer >= 1.
        num_workers: Processes that load samples, an integer >= 0; 0 loads them in the training process.
        seed: Seed that draws the sets, an integer >= 0.
        **kwargs: See :class:`~lightning_ssesam.data.ImageFileModule` for ``max_pixels``, and
            :class:`~lightning_ssesam.data.ImageDataModule`. Images are normalised as for ImageNet. A ``sampler`` is
            refused, because it draws one class a sample.

    Raises:
        ArgumentError: If the table cannot be read, a column is missing, a row is wrong, a set is empty, or no training
            image has a label; when a run starts, if images cannot be read. The message has the line.
    """

    multi_label = True
    num_samples: int

    def __init__(
        self,
        table: str | Path,
        root: str | Path | None = None,
        files: str = "file",
        labels: str | list[str] | None = None,
        split: str | None = None,
        separator: str | None = None,
        class_names: list[str] | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        image_size: int | None = None,
        batch_size: int = 64,
        num_workers: int = 4,
        *,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, **kwargs)
        if self.sampler is not None:
            expected = "None for multi-label data, because a sampler draws samples of one class"
            raise bad_argument("sampler", expected, got_text="one")
        self.table, self.root = str(table), os.path.dirname(table) if root is None else str(root)
        self.seed = check_integer("seed", seed, minimum=0)
        if separator == "":
            raise bad_argument("separator", "a text that is not empty, or None", separator)
        content = read_table(table, Columns(files, labels, split, separator), class_names)
        fractions = {"test": check_fraction("test_fraction", test_fraction)}
        if check_below_one("val_fraction", val_fraction):
            fractions["val"] = float(val_fraction)
        self._members = self._find_sets(content, fractions)
        self._content, self.class_names = content, content.class_names
        self.val_is_test = "val" not in self._members
        train = self._images("train")
        self.num_samples, self.class_counts = len(train), (train.targets == 1).sum(0).tolist()
        if not any(self.class_counts):
            raise ArgumentError(f"{shown(self.table)}: Expected training images with labels, but got none.")
        self.image_size = self.choose_image_size(image_size, train)

    def _find_sets(self, content: LabelTable, fractions: dict[str, float]) -> dict[str, list[int]]:
        """Return the rows of each set: those of the table, or drawn ones."""
        if content.sets is None:
            if sum(fractions.values()) >= 1:
                got = " + ".join(f"{fraction:g}" for fraction in fractions.values())
                raise bad_argument("test_fraction", "less than 1 together with val_fraction", got_text=got)
            drawn = ", ".join(f"{name} {100 * fraction:g} %" for name, fraction in fractions.items())
            self.division = f"drawn from the images of each label, with seed {self.seed}: {drawn}"
            return _draw_sets(content.answers == 1, fractions, self.seed)
        members: dict[str, list[int]] = {}
        for number, name in enumerate(content.sets):
            members.setdefault(name, []).append(number)
        if missing := {"train", "test"} - members.keys():
            name = min(missing)
            raise ArgumentError(f"{shown(self.table)}: Expected images of the set {name!r}, but got none.")
        return members

    def _images(self, name: str) -> "_TableImages":
        return _TableImages(self._content, self._members[name], self.root, self.max_pixels)

    @override
    def file_sets(self) -> dict[str, ImageFiles]:
        """Return the images of all sets."""
        return {name: self._images(name) for name in self._members}

    @override
    def fingerprint(self) -> str:
        """Return a text that changes with the table, the sets, or the size or the time of change of an image."""
        images = [images for _, images in sorted(self.file_sets().items())]
        return f"{hash_files([self.table], os.path.dirname(self.table))} {self.hash_images(images, self.root)}"

    @override
    def make_sets(self) -> dict[str, Dataset[Any]]:
        """Return the sets, which the constructor has found."""
        return self.with_transforms(self.file_sets(), self.image_size)


class _TableImages(ImageFiles):
    """Pairs of an image of a table and its answers ``(C,)``, int64."""

    def __init__(
        self, content: LabelTable, members: Sequence[int], root: str, max_pixels: int | None = MAX_PIXELS
    ) -> None:
        self.table, self.root, self.max_pixels, self.transform = content.path, root, max_pixels, None
        # No lists of Python objects: each worker of a loader would copy them.
        self.files = PackedTexts.pack(content.files[number] for number in members)
        self.lines = torch.tensor([content.lines[number] for number in members])
        self.targets = content.answers[list(members)]

    @override
    def path(self, index: int) -> str:
        return os.path.join(self.root, self.files[index])

    @override
    def label(self, index: int) -> Tensor:
        return self.targets[index].long()

    @override
    def place(self, index: int) -> str:
        return f"{shown(self.table)}, line {self.lines[index]}: {shown(self.path(index))}"

    @override
    def refusal(self, index: int, reason: str) -> ArgumentError:
        return ArgumentError(f"{shown(self.table)}, line {self.lines[index]}: {super().refusal(index, reason)}")

    @override
    def image(self, index: int) -> Any:
        try:
            return super().image(index)
        except ArgumentError as error:
            raise ArgumentError(f"{shown(self.table)}, line {self.lines[index]}: {error}") from error


def _draw_sets(has_label: Tensor, fractions: dict[str, float], seed: int) -> dict[str, list[int]]:
    """Return the rows of each set, drawn label by label, the rarest first. One image of each draw trains.

    Args:
        has_label: Mask of the labels of each image, ``(N, C)``.
        fractions: Fraction of the images of each set but that which trains.
        seed: Seed of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(has_label), generator=generator)
    waiting = torch.ones(len(has_label), dtype=torch.bool)
    members: dict[str, list[int]] = {name: [] for name in ("train", *fractions)}
    counts = has_label.sum(0)
    # Last come the images without a label.
    of_groups = [has_label[:, label] for label in counts.argsort(stable=True).tolist()]
    for mask in [*of_groups, ~has_label.any(1)]:
        rows = order[(mask & waiting)[order]].tolist()
        waiting &= ~mask
        start = 0
        for name, fraction in fractions.items():
            # One image at least trains.
            stop = max(start, min(start + round(fraction * len(rows)), len(rows) - 1))
            members[name] += rows[start:stop]
            start = stop
        members["train"] += rows[start:]
    # With few images of each label, every fraction of them may be less than a half.
    for name in fractions:
        if not members[name]:
            if len(members["train"]) < 2:
                raise ArgumentError(f"Expected an image for each set, but got {len(has_label)} in all.")
            members[name].append(members["train"].pop())
    return {name: sorted(rows) for name, rows in members.items()}
