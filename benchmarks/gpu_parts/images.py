"""The images that ``benchmarks/gpu.py`` trains on: finds them, and lays them out as folders."""

import sys
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple


class Source(NamedTuple):
    """A set of images.

    Args:
        folder: Folder of the images, in an archive or in the file system: ``{train,test}/CLASS/FILE``.
        archive: Name of the archive.
        imbalance_factor: Imbalance factor to make it long-tailed with; None if it is so already.
        largest: Training images of the largest class.
        title: Title of its tables.
        tail_below: Training images below which a class is tail.
        many_above: Training images above which a class is many-shot.
        few_below: Training images below which a class is few-shot.
        num_images: Training images.
        num_classes: Number of classes.
    """

    folder: str
    archive: str
    imbalance_factor: float | None
    largest: int
    title: str
    tail_below: int
    many_above: int
    few_below: int
    num_images: int
    num_classes: int


SOURCES = {
    "cifar10lt": Source(
        *("cifar", "cifar10-images.tar.xz", 100, 5000, "CIFAR-10-LT (JPEG copy), imbalance factor 100"),
        *(500, 1000, 200, 12406, 10),
    ),
    "tiny100lt": Source(
        *("tiny100lt", "tiny100lt-images.tar.xz", None, 500, "tiny100lt (100 classes of Tiny ImageNet, 32x32)"),
        *(100, 100, 20, 10847, 100),
    ),
}
"""The sets by name."""

PARTS = ("train", "test")


def find(paths: Iterable[Path]) -> dict[str, Path]:
    """Return the folder or archive of each set that is found at the given paths, by its name.

    Args:
        paths: Folders and archives. A folder is either that of the images or has folders or archives of them.

    Raises:
        SystemExit: If a path has none. The message says what is needed.
    """
    found: dict[str, Path] = {}
    for path in paths:
        here = {name: place for name, source in SOURCES.items() if (place := _place(path, source)) is not None}
        if not here:
            needed = " or ".join(f"{s.folder}/{{train,test}}/CLASS/FILE ({s.archive})" for s in SOURCES.values())
            got = f"{path}, which has none" if path.exists() else f"{path}, which does not exist"
            raise SystemExit(f"Expected argument `--images` to be folders or archives with {needed}, but got {got}.")
        found.update(here)
    return found


def _place(path: Path, source: Source) -> Path | None:
    if path.is_dir():
        places = [path / source.folder, path / source.archive, *([path] if path.name == source.folder else [])]
        return next((place for place in places if place.is_file() or _is_laid_out(place)), None)
    if path.is_file() and tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            first = archive.next()
        return path if first is not None and PurePosixPath(first.name).parts[:1] == (source.folder,) else None
    return None


def _is_laid_out(folder: Path) -> bool:
    return all((folder / part).is_dir() for part in PARTS)


def lay_out(name: str, place: Path, target: Path) -> None:
    """Write the images of a set, long-tailed, into a folder; link to them if they are in a folder.

    Of each training class, the first files in the order of their names are taken, so that everybody has the same ones.

    Args:
        name: Name of the set, one of :data:`SOURCES`.
        place: Folder or archive of the images.
        target: New folder for ``{train,test}/CLASS/FILE``.
    """
    source, classes = SOURCES[name], defaultdict[tuple[str, str], dict[str, bytes | Path]](dict)
    for part, label, file, content in _files(place):
        classes[part, label][file] = content
    labels, counts = sorted({label for _, label in classes}), dict[str, int]()
    if source.imbalance_factor is not None:
        from lightning_ssesam.data import long_tailed_counts

        sizes = long_tailed_counts(len(labels), source.largest, source.imbalance_factor)
        counts = dict(zip(labels, sizes, strict=True))
    for (part, label), files in classes.items():
        folder = target / part / label
        folder.mkdir(parents=True)
        for file in sorted(files)[: counts.get(label) if part == "train" else None]:
            content = files[file]
            if isinstance(content, Path):
                (folder / file).symlink_to(content.resolve())
            else:
                (folder / file).write_bytes(content)


def _files(place: Path) -> Iterator[tuple[str, str, str, bytes | Path]]:
    """Yield set, class, name and content of every file of an archive or a folder."""
    if place.is_dir():
        for path in place.glob("*/*/*"):
            if (parts := path.relative_to(place).parts)[0] in PARTS:
                yield parts[0], parts[1], parts[2], path
        return
    with tarfile.open(place) as archive:
        for member in archive:
            parts = PurePosixPath(member.name).parts
            # Nothing else of a name is used, so that no file lands outside of the target.
            if member.isfile() and len(parts) == 4 and parts[1] in PARTS and ".." not in parts:
                content = archive.extractfile(member)
                assert content is not None
                yield parts[1], parts[2], parts[3], content.read()


if __name__ == "__main__":
    lay_out(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
