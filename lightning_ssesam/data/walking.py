"""The image files below a folder: hidden files, files of other kinds, and symbolic links."""

import os
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from lightning_ssesam.data.reading import image_endings

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


class FoundImage(NamedTuple):
    """An image file below a folder: its path, and the path that it has when all links are followed."""

    path: str
    real: str


def find_images(folder: str, recursive: bool = True) -> tuple[list[FoundImage], Counter[str]]:
    """Return the images below a folder, sorted, and how many other files there are, by ending or kind.

    Symbolic links are followed. A file that is reached twice counts once, and so does a folder. A link to a folder that
    contains it is not followed.

    Args:
        folder: Path of the folder.
        recursive: Whether to look into its folders.

    Raises:
        OSError: If a folder cannot be read.
    """
    found: list[tuple[str, str, FoundImage, bool]] = []
    others: Counter[str] = Counter()
    for path, real, entries in _walk(folder, others, recursive):
        for entry in entries:
            if kind := _kind_of_other(entry):
                others[kind] += 1
                continue
            target = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
            found.append((path, entry.name, FoundImage(entry.path, target), entry.is_symlink()))
    # A file counts by its own name, if that is here, and else by its first link.
    first: dict[str, str] = {}
    for *_, image, _ in sorted(found, key=lambda item: (item[3], item[:2])):
        first.setdefault(image.real, image.path)
    images = [image for _, _, image, _ in sorted(found) if first[image.real] == image.path]
    if repeated := len(found) - len(images):
        others["links to images that count already"] += repeated
    return images, others


def _walk(folder: str, others: Counter[str], recursive: bool) -> Iterator[tuple[str, str, list[os.DirEntry[str]]]]:
    """Yield every folder once: its path, its path without links, and its files."""
    top = os.path.realpath(folder)
    waiting, links, seen = [(folder, top)], list[tuple[str, str]](), set[str]()
    while waiting or links:
        # Links come last: a folder counts by its own name, if that is here.
        path, real = waiting.pop() if waiting else links.pop(0)
        if real in seen:
            others["links to folders that count already"] += 1
            continue
        seen.add(real)
        with os.scandir(path) as entries:
            content = sorted(entries, key=lambda entry: entry.name)
        yield path, real, [entry for entry in content if not _is_folder(entry)]
        for entry in content if recursive else ():
            if not _is_folder(entry) or is_hidden(entry.name):
                continue
            if not entry.is_symlink():
                waiting.append((entry.path, os.path.join(real, entry.name)))
            elif _contains(target := os.path.realpath(entry.path), real) or _contains(target, top):
                others["links to a folder above"] += 1
            else:
                links.append((entry.path, target))


def _contains(folder: str, path: str) -> bool:
    return os.path.join(path, "").startswith(os.path.join(folder, ""))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A link that leads to itself.
        return False


def _kind_of_other(entry: os.DirEntry[str]) -> str:
    """Return what a file is, if it is no image that counts, else an empty text."""
    if is_hidden(entry.name):
        return "hidden"
    ending = os.path.splitext(entry.name)[1].lower()
    if ending not in image_endings():
        return ending if ending.isprintable() and ending else "no ending"
    # A link to nothing stays: to open it gives an error that names it.
    return "" if entry.is_symlink() or entry.is_file() else "special files"
