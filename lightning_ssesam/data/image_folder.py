"""Images in folders, one folder for each class."""

import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_fraction, check_integer
from lightning_ssesam.data.contents import hash_files
from lightning_ssesam.data.image_files import ImageFileModule, count_text
from lightning_ssesam.data.images import ImageFiles, Transform
from lightning_ssesam.data.long_tailed import LongTailed
from lightning_ssesam.data.profiles import Profile, hold_out
from lightning_ssesam.data.reading import MAX_PIXELS, shown
from lightning_ssesam.data.walking import FoundImage, find_images, is_hidden
from lightning_ssesam.errors import ArgumentError

Samples: TypeAlias = list[tuple[str, int]]
_Found: TypeAlias = list[tuple[FoundImage, int]]


class _ListedImages(ImageFileModule):
    """Base of data modules whose constructor lists the images of a folder, and chooses those of each set.

    A subclass sets ``root``, and in ``_listed`` and ``_parts`` the images that were found and those that were chosen.
    """

    root: Path
    _listed: dict[str, Samples]
    _parts: dict[str, Samples]

    @override
    def file_sets(self) -> dict[str, ImageFiles]:
        """Return all images of the folder that were found, whether they are chosen or not."""
        return {name: _Files(samples, max_pixels=self.max_pixels) for name, samples in self._listed.items()}

    @override
    def fingerprint(self) -> str:
        """Return a text that changes with the name, the size or the time of change of an image of any set."""
        paths = (path for _, samples in sorted(self._parts.items()) for path, _ in samples)
        return hash_files(paths, self.root)

    @override
    def make_sets(self) -> dict[str, Dataset[Any]]:
        """Return the sets, which the constructor has listed and chosen."""
        sets = {name: _Files(samples, max_pixels=self.max_pixels) for name, samples in self._parts.items()}
        return self.with_transforms(sets, self.image_size)


class ImageFolderLT(_ListedImages):
    """Images in folders, one folder for each class, already long-tailed or made so.

    ``root`` has either a folder for each class, or the folders ``train``, ``test`` and perhaps ``val``, which have a
    folder for each class. A missing set is drawn at random from the training images of each class. No image is in two
    sets, and every class keeps at least one training image. Hidden folders and files, whose name begins with a dot, and
    those of systems, such as ``__MACOSX`` and ``@eaDir``, are ignored.

    Every kind of picture is read that Pillow can open here. A notice counts the files that are ignored, by their
    ending. Symbolic links are followed. A file that links reach twice within a class counts once; in two classes, or in
    two sets, it is an error. A link to a folder above is not followed.

    Batches are pairs of images ``(N, 3, image_size, image_size)``, float32, and class indices ``(N,)``, int64, in the
    order of the sorted folder names.

    Attributes:
        class_names: Names of the folders, length C.
        image_size: Height and width of the images, as given or chosen.

    Args:
        root: Folder of the images.
        imbalance_factor: Largest over smallest class size of the training set to make, or its inverse, > 0; see
            :class:`~lightning_ssesam.data.LongTailed`. By default all training images are kept.
        profile: ``"exponential"`` or ``"step"``.
        val_fraction: Fraction of each class that validates if there is no ``val``, in [0, 1). With 0 the test set does.
        test_fraction: Fraction of each class that tests if there is no ``test``, in (0, 1).
        image_size: Height and width of the images, an integer >= 1. By default the median of the shorter sides of up to
            200 images of the folder, spread evenly over it, and at most 64.
        seed: Seed that chooses the images of each set, an integer >= 0.
        **kwargs: See :class:`~lightning_ssesam.data.ImageFileModule` for ``max_pixels``, and
            :class:`~lightning_ssesam.data.ImageDataModule`. Images are normalised as for ImageNet.

    Raises:
        ArgumentError: If the folder is not as above, or a test class has no training images; when a run starts, if
            images cannot be read.
    """

    def __init__(
        self,
        root: str | Path,
        imbalance_factor: float | None = None,
        profile: Profile = "exponential",
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        image_size: int | None = None,
        *,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root = Path(root)
        self.seed = check_integer("seed", seed, minimum=0)
        self.class_names, parts, self._ignored = _list(self.root)
        self._listed = parts
        # From all training images, so that other seeds and fractions do not change it.
        self.image_size = self.choose_image_size(image_size, _Files(parts["train"]))
        missing = _missing(parts, val_fraction, test_fraction)
        self._parts = {**parts, **divide(parts["train"], missing, self.seed)}
        drawn = [f"{name} {100 * fraction:g} %" for name, fraction in missing.items()]
        if drawn:
            self.division = f"drawn from the images of each class, with seed {self.seed}: {', '.join(drawn)}"
        self.val_is_test = "val" not in self._parts
        train = _Files(self._parts["train"])
        self.class_counts: list[int] = train.targets.bincount().tolist()
        if imbalance_factor is not None:
            tailed = LongTailed(train, imbalance_factor, profile, self.seed)
            self.class_counts = tailed.class_counts
            self._parts["train"] = _chosen(train.samples, tailed.indices)


class _Files(ImageFiles):
    def __init__(
        self, samples: Samples, transform: Transform | None = None, max_pixels: int | None = MAX_PIXELS
    ) -> None:
        self.samples, self.transform, self.max_pixels = samples, transform, max_pixels
        self.targets = torch.tensor([label for _, label in samples])

    @override
    def path(self, index: int) -> str:
        return self.samples[index][0]


# Usual names of the folders of a divided data set, which no class is likely to have.
_SETS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


class _Listing(NamedTuple):
    """What is in a root: the class names, the samples of each set, and the ignored files of each folder."""

    names: list[str]
    parts: dict[str, Samples]
    ignored: dict[str, Counter[str]]


def _list(root: Path) -> _Listing:
    """Return what is in a root, with the samples of ``train`` and of those of ``val`` and ``test`` that exist."""
    names, folders = _layout(root)
    found, ignored = dict[str, _Found](), dict[str, Counter[str]]()
    for part, folder in folders.items():
        found[part] = _find(folder, names, ignored, f"{part}/" if len(folders) > 1 else "")
        present = {label for _, label in found[part]}
        if not present and part != "train":
            raise bad_argument("root", f"a folder with images in {part}", got_text=f"{root} with none")
        empty = [name for label, name in enumerate(names) if label not in present]
        if part == "train" and empty:
            raise _without_images(folder, empty, ignored)
    _refuse_shared(found)
    samples = {part: [(image.path, label) for image, label in images] for part, images in found.items()}
    return _Listing(names, samples, ignored)


def _layout(root: Path) -> tuple[list[str], dict[str, Path]]:
    """Return the class names, and the folder of each set, ``train`` first."""
    folders = _folders(root)
    expected = "a folder with `train` and `test`, perhaps `val`, or with a folder for each class"
    if not {"train", "test"} <= set(folders):
        if set(folders) <= _SETS:
            raise bad_argument("root", expected, got_text=f"{root} with only {', '.join(folders)}")
        return folders, {"train": root}
    if others := set(folders) - {"train", "val", "test"}:
        raise bad_argument("root", expected, got_text=f"{root} with also {', '.join(sorted(others))}")
    names = _folders(root / "train")
    parts = ["train", *sorted({"val", "test"} & set(folders))]
    for part in parts[1:]:
        if unknown := set(_folders(root / part)) - set(names):
            expected = f"a folder whose {part} classes are among its training classes"
            raise bad_argument("root", expected, got_text=f"{root} with {', '.join(sorted(unknown))} only in {part}")
    return names, {part: root / part for part in parts}


def _find(folder: Path, names: list[str], ignored: dict[str, Counter[str]], prefix: str) -> _Found:
    """Return the images of a set with their labels. Add the other files of each class to ``ignored``."""
    found: _Found = []
    try:
        for label, name in enumerate(names):
            if not (folder / name).is_dir():
                continue
            images, ignored[f"{prefix}{name}"] = find_images(os.path.join(folder, name))
            found += [(image, label) for image in images]
        images, others = find_images(str(folder), recursive=False)
    except OSError as error:
        expected = "a folder that can be read"
        raise bad_argument("root", expected, got_text=f"{shown(str(folder))}: {error.strerror}") from error
    # No class folder has them.
    ignored[str(folder)] = others + Counter(os.path.splitext(image.path)[1].lower() for image in images)
    return found


def _without_images(folder: Path, empty: list[str], ignored: Mapping[str, Counter[str]]) -> ArgumentError:
    files = [
        f"{name} {count_text(counts)}"
        for name in empty
        for key, counts in ignored.items()
        if counts and key in (name, f"train/{name}")
    ]
    seen = f", whose files are no images: {'; '.join(files)}" if files else ""
    got = f"{folder} with none for the classes {', '.join(empty)}{seen}"
    return bad_argument("root", "a folder with images of every class", got_text=got)


def _folders(root: Path) -> list[str]:
    from torchvision.datasets.folder import find_classes

    expected = "a folder with folders of images"
    try:
        found = list(find_classes(root)[0])
    except OSError as error:
        raise bad_argument("root", expected, got_text=f"{shown(str(root))}: {error}") from error
    if not (folders := [name for name in found if not is_hidden(name)]):
        raise bad_argument("root", expected, got_text=f"{root} with only hidden folders: {', '.join(found)}")
    return folders


def _refuse_shared(found: Mapping[str, _Found]) -> None:
    """Refuse a file that links lead to from two classes, or from two sets."""
    first: dict[str, tuple[str, int, str]] = {}
    shared = []
    for part, images in found.items():
        for image, label in images:
            path, *place = first.setdefault(image.real, (image.path, label, part))
            if place != [label, part]:
                shared.append(f"{shown(path)} and {shown(image.path)}")
    if shared:
        expected = "a folder whose images are each in one class and in one set"
        more = f" (and {len(shared) - 1} more pairs)" if len(shared) > 1 else ""
        raise bad_argument("root", expected, got_text=f"links to the same file: {shared[0]}{more}")


def _missing(parts: Mapping[str, Samples], val_fraction: float, test_fraction: float) -> dict[str, float]:
    """Return, for each missing set, the fraction of each class to draw for it."""
    check_fraction("test_fraction", test_fraction)
    if val_fraction != 0:
        check_fraction("val_fraction", val_fraction)
    fractions = {"test": test_fraction, "val": val_fraction}
    wanted = {name: fraction for name, fraction in fractions.items() if name not in parts and fraction > 0}
    if sum(wanted.values()) >= 1:
        raise bad_argument("val_fraction", f"less than 1 - test_fraction = {1 - test_fraction:g}", val_fraction)
    return wanted


def divide(samples: Samples, fractions: Mapping[str, float], seed: int) -> dict[str, Samples]:
    """Draw sets with these fractions of each class, rounded. The other samples, at least one a class, train.

    Args:
        samples: Path and label of each image.
        fractions: Fraction of each class in each set, in (0, 1).
        seed: Seed of the draws, an integer >= 0.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    sizes = _Files(samples).targets.bincount().tolist()
    for name, fraction in fractions.items():
        labels = _Files(samples).targets
        remaining = labels.bincount().tolist()
        counts = [min(math.floor(n * fraction + 0.5), r - 1) for n, r in zip(sizes, remaining, strict=True)]
        if sum(counts) == 0:
            raise bad_argument(f"{name}_fraction", "large enough to hold out an image of some class", fraction)
        picked, others = hold_out(labels, counts, generator)
        parts[name], samples = _chosen(samples, picked), _chosen(samples, others)
    return {**parts, "train": samples}


def _chosen(samples: Samples, indices: Tensor) -> Samples:
    return [samples[index] for index in indices.tolist()]
