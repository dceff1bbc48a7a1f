"""Images in folders, one folder for each class."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_fraction, check_integer
from lightning_ssesam.data.contents import hash_files
from lightning_ssesam.data.images import ImageDataModule, ImageFiles, Transform, is_hidden
from lightning_ssesam.data.long_tailed import LongTailed
from lightning_ssesam.data.profiles import Profile, hold_out

Samples: TypeAlias = list[tuple[str, int]]


class ImageFolderLT(ImageDataModule):
    """Images in folders, one folder for each class, already long-tailed or made so.

    ``root`` has either a folder for each class, or the folders ``train``, ``test`` and perhaps ``val``, which have a
    folder for each class. A missing set is drawn at random from the training images of each class. No image is in two
    sets, and every class keeps at least one training image. Hidden folders and files, whose name begins with a dot, and
    those of systems, such as ``__MACOSX`` and ``@eaDir``, are ignored.

    Batches are pairs of images ``(N, 3, image_size, image_size)``, float32, and class indices ``(N,)``, int64, in the
    order of the sorted folder names.

    Attributes:
        class_names: Names of the folders, length C.

    Args:
        root: Folder of the images.
        imbalance_factor: Largest over smallest class size of the training set to make, or its inverse, > 0; see
            :class:`~lightning_ssesam.data.LongTailed`. By default all training images are kept.
        profile: ``"exponential"`` or ``"step"``.
        val_fraction: Fraction of each class that validates if there is no ``val``, in [0, 1). With 0 the test set does.
        test_fraction: Fraction of each class that tests if there is no ``test``, in (0, 1).
        image_size: Height and width of the images, an integer >= 1.
        seed: Seed that chooses the images of each set, an integer >= 0.
        **kwargs: See :class:`~lightning_ssesam.data.images.ImageDataModule`. Images are normalised as for ImageNet.

    Raises:
        ArgumentError: If the folder is not as above, or a test class has no training images; when a batch is made, if
            an image cannot be read.
    """

    def __init__(
        self,
        root: str | Path,
        imbalance_factor: float | None = None,
        profile: Profile = "exponential",
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        image_size: int = 224,
        *,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root = Path(root)
        self.image_size = check_integer("image_size", image_size, minimum=1)
        self.seed = check_integer("seed", seed, minimum=0)
        self.class_names, parts = _parts(self.root)
        missing = _missing(parts, val_fraction, test_fraction)
        self._parts = {**parts, **_divide(parts["train"], missing, self.seed)}
        self.val_is_test = "val" not in self._parts
        train = _Files(self._parts["train"])
        self.class_counts: list[int] = train.targets.bincount().tolist()
        if imbalance_factor is not None:
            tailed = LongTailed(train, imbalance_factor, profile, self.seed)
            self.class_counts = tailed.class_counts
            self._parts["train"] = _chosen(train.samples, tailed.indices)

    @override
    def fingerprint(self) -> str:
        """Return a text that changes with the name, the size or the time of change of an image of any set."""
        paths = (path for _, samples in sorted(self._parts.items()) for path, _ in samples)
        return hash_files(paths, self.root)

    @override
    def make_sets(self) -> dict[str, Dataset[Any]]:
        """Return the sets, which the constructor has listed and drawn."""
        to_train, to_test = self.transforms(self.image_size)
        return {
            name: _Files(samples, to_train if name == "train" else to_test) for name, samples in self._parts.items()
        }


class _Files(ImageFiles):
    def __init__(self, samples: Samples, transform: Transform | None = None) -> None:
        self.samples, self.transform = samples, transform
        self.targets = torch.tensor([label for _, label in samples])

    @override
    def path(self, index: int) -> str:
        return self.samples[index][0]


# Usual names of the folders of a divided data set, which no class is likely to have.
_SETS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


def _parts(root: Path) -> tuple[list[str], dict[str, Samples]]:
    """Return the class names, and the samples of ``train`` and of those of ``val`` and ``test`` that exist."""
    folders = _folders(root)
    expected = "a folder with `train` and `test`, perhaps `val`, or with a folder for each class"
    if not {"train", "test"} <= set(folders):
        if set(folders) <= _SETS:
            raise bad_argument("root", expected, got_text=f"{root} with only {', '.join(folders)}")
        return folders, {"train": _samples(root, folders)}
    if others := set(folders) - {"train", "val", "test"}:
        raise bad_argument("root", expected, got_text=f"{root} with also {', '.join(sorted(others))}")
    names = _folders(root / "train")
    parts = {"train": _samples(root / "train", names)}
    for part in {"val", "test"} & set(folders):
        if unknown := set(_folders(root / part)) - set(names):
            expected = f"a folder whose {part} classes are among its training classes"
            raise bad_argument("root", expected, got_text=f"{root} with {', '.join(sorted(unknown))} only in {part}")
        parts[part] = _samples(root / part, names, allow_empty=True)
        if not parts[part]:
            raise bad_argument("root", f"a folder with images in {part}", got_text=f"{root} with none")
    return names, parts


def _folders(root: Path) -> list[str]:
    from torchvision.datasets.folder import find_classes

    expected = "a folder with folders of images"
    try:
        found = list(find_classes(root)[0])
    except OSError as error:
        raise bad_argument("root", expected, got_text=f"{root}: {error}") from error
    if not (folders := [name for name in found if not is_hidden(name)]):
        raise bad_argument("root", expected, got_text=f"{root} with only hidden folders: {', '.join(found)}")
    return folders


def _samples(root: Path, names: list[str], allow_empty: bool = False) -> Samples:
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    above = len(os.path.join(os.path.expanduser(root), ""))
    classes = {name: label for label, name in enumerate(names)}
    samples: Samples = make_dataset(
        root,
        classes,
        is_valid_file=lambda path: path.lower().endswith(IMG_EXTENSIONS) and not is_hidden(path[above:]),
        allow_empty=True,
    )
    empty = sorted(classes.keys() - {names[label] for _, label in samples})
    if empty and not allow_empty:
        found = f"{root} with none for the classes {', '.join(empty)} (images end with {', '.join(IMG_EXTENSIONS)})"
        raise bad_argument("root", "a folder with images of every class", got_text=found)
    return samples


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


def _divide(samples: Samples, fractions: Mapping[str, float], seed: int) -> dict[str, Samples]:
    """Draw sets with these fractions of each class, rounded. The other samples, at least one a class, train."""
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
