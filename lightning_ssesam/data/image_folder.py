"""Images in folders, one folder for each class."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lightning_ssesam._validation import bad_argument, check_fraction, check_integer
from lightning_ssesam.data.image_files import count_text
from lightning_ssesam.data.listed import ListedImageModule, ListedImages, divide
from lightning_ssesam.data.long_tailed import LongTailed
from lightning_ssesam.data.profiles import Profile
from lightning_ssesam.data.reading import shown
from lightning_ssesam.data.walking import find_images, is_hidden
from lightning_ssesam.errors import ArgumentError

_Digests: TypeAlias = NDArray[np.uint64]


class ImageFolderLT(ListedImageModule):
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
        self.class_names, self.listed, self._ignored = _list(self.root)
        # From all training images, so that other seeds and fractions do not change it.
        self.image_size = self.choose_image_size(image_size, self.listed["train"])
        missing = _missing(self.listed, val_fraction, test_fraction)
        self.parts = {**self.listed, **divide(self.listed["train"], missing, self.seed)}
        drawn = [f"{name} {100 * fraction:g} %" for name, fraction in missing.items()]
        if drawn:
            self.division = f"drawn from the images of each class, with seed {self.seed}: {', '.join(drawn)}"
        self.val_is_test = "val" not in self.parts
        train = self.parts["train"]
        self.class_counts: list[int] = train.targets.bincount().tolist()
        if imbalance_factor is not None:
            tailed = LongTailed(train, imbalance_factor, profile, self.seed)
            self.class_counts = tailed.class_counts
            self.parts["train"] = train.choose(tailed.indices)


# Usual names of the folders of a divided data set, which no class is likely to have.
_SETS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


class _Listing(NamedTuple):
    """What is in a root: the class names, the images of each set, and the ignored files of each folder."""

    names: list[str]
    parts: dict[str, ListedImages]
    ignored: dict[str, Counter[str]]


class _Found(NamedTuple):
    """Images of a set, and a digest of the path that each one has when all links are followed, ``(N, 2)``, uint64."""

    images: ListedImages
    digests: _Digests


def _list(root: Path) -> _Listing:
    """Return what is in a root, with the images of ``train`` and of those of ``val`` and ``test`` that exist."""
    names, folders = _layout(root)
    found, ignored = dict[str, _Found](), dict[str, Counter[str]]()
    for part, folder in folders.items():
        found[part] = _find(folder, names, ignored, f"{part}/" if len(folders) > 1 else "")
        present = set(np.unique(found[part].images.targets.numpy()).tolist())
        if not present and part != "train":
            raise bad_argument("root", f"a folder with images in {part}", got_text=f"{root} with none")
        empty = [name for label, name in enumerate(names) if label not in present]
        if part == "train" and empty:
            raise _without_images(folder, empty, ignored)
    _refuse_shared(found)
    return _Listing(names, {part: images for part, (images, _) in found.items()}, ignored)


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
    digests = bytearray()

    def samples() -> Iterator[tuple[str, int]]:
        for label, name in enumerate(names):
            if not (folder / name).is_dir():
                continue
            images, ignored[f"{prefix}{name}"] = find_images(os.path.join(folder, name))
            for image in images:
                digests.extend(hashlib.blake2b(os.fsencode(image.real), digest_size=16).digest())
                yield image.path, label

    try:
        found = ListedImages.pack(samples())
        images, others = find_images(str(folder), recursive=False)
    except OSError as error:
        expected = "a folder that can be read"
        raise bad_argument("root", expected, got_text=f"{shown(str(folder))}: {error.strerror}") from error
    # No class folder has them.
    ignored[str(folder)] = others + Counter(os.path.splitext(image.path)[1].lower() for image in images)
    return _Found(found, np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2))


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
    digests = np.concatenate([digests for _, digests in found.values()])
    # Millions of paths would take more memory, and none of them is needed again if all differ.
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    is_repeated = (digests[order[1:]] == digests[order[:-1]]).all(1)
    repeated = np.unique(np.concatenate([order[1:][is_repeated], order[:-1][is_repeated]]))
    first: dict[bytes, tuple[str, int, str]] = {}
    shared, start = [], 0
    for part, (images, of_part) in found.items():
        for index in (repeated[(repeated >= start) & (repeated < start + len(images))] - start).tolist():
            here = (images.path(index), images.label(index), part)
            path, *place = first.setdefault(of_part[index].tobytes(), here)
            if place != [*here[1:]]:
                shared.append(f"{shown(path)} and {shown(here[0])}")
        start += len(images)
    if shared:
        expected = "a folder whose images are each in one class and in one set"
        more = f" (and {len(shared) - 1} more pairs)" if len(shared) > 1 else ""
        raise bad_argument("root", expected, got_text=f"links to the same file: {shared[0]}{more}")


def _missing(parts: Mapping[str, ListedImages], val_fraction: float, test_fraction: float) -> dict[str, float]:
    """Return, for each missing set, the fraction of each class to draw for it."""
    check_fraction("test_fraction", test_fraction)
    if val_fraction != 0:
        check_fraction("val_fraction", val_fraction)
    fractions = {"test": test_fraction, "val": val_fraction}
    wanted = {name: fraction for name, fraction in fractions.items() if name not in parts and fraction > 0}
    if sum(wanted.values()) >= 1:
        raise bad_argument("val_fraction", f"less than 1 - test_fraction = {1 - test_fraction:g}", val_fraction)
    return wanted
