"""Tar shards of images: how they are written, and the index that says what is in them."""

import io
import json
import os
import random
import tarfile
from collections import Counter
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

from lightning_ssesam._validation import bad_argument, check_integer
from lightning_ssesam.data.images import ImageFiles
from lightning_ssesam.data.reading import image_endings, shown
from lightning_ssesam.errors import ArgumentError

INDEX = "index.json"
"""Name of the index in the folder of the shards."""

# Bytes of a block of a tar file. One of zeros is its end.
_BLOCK = 512


class Shard(NamedTuple):
    """A tar file with images.

    Attributes:
        path: Path of the file.
        size: Size of the file, in bytes.
        counts: Number of images of each class that is in it.
    """

    path: str
    size: int
    counts: dict[int, int]

    @property
    def number(self) -> int:
        """Number of images."""
        return sum(self.counts.values())


def expand(pattern: str | Path) -> list[str]:
    """Return the paths of shards, sorted: ``train-{000..146}.tar`` with all numbers between, or a ``*`` pattern.

    Raises:
        ArgumentError: If there are none.
    """
    from braceexpand import braceexpand

    paths = [path for text in braceexpand(str(pattern)) for path in (sorted(glob(text)) if "*" in text else [text])]
    if not paths:
        raise bad_argument("shards", "a pattern of tar files that exist, such as train-{000..146}.tar", str(pattern))
    return paths


def write_shards(images: ImageFiles, folder: str | Path, name: str, samples: int = 10_000, seed: int = 0) -> list[Path]:
    """Write images into tar shards ``FOLDER/NAME-000000.tar`` and so on, in a random order, and the index.

    The files are copied as they are. A sample is the picture and a ``.cls`` file with its label.

    Args:
        images: Images to write, such as :class:`~lightning_ssesam.data.ImageList`.
        folder: Folder of the shards. It is made if it does not exist.
        name: Beginning of the names of the shards, such as ``"train"``.
        samples: Number of images in a shard, an integer >= 1. Have at least as many shards as processes that load.
        seed: Seed of the order, an integer >= 0.

    Returns:
        The paths of the shards.

    Raises:
        ArgumentError: If an argument is out of range.
        OSError: If a file cannot be read or written.
    """
    check_integer("samples", samples, minimum=1)
    order = list(range(len(images)))
    random.Random(check_integer("seed", seed, minimum=0)).shuffle(order)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, start in enumerate(range(0, len(order), samples)):
        paths.append(target / f"{name}-{number:06d}.tar")
        with tarfile.open(paths[-1], "w") as tar:
            for index in order[start : start + samples]:
                _add(tar, images, index)
    index_shards([str(path) for path in paths])
    return paths


def _add(tar: tarfile.TarFile, images: ImageFiles, index: int) -> None:
    path, key = images.path(index), f"{index:09d}"
    tar.add(path, f"{key}{os.path.splitext(path)[1].lower()}", recursive=False)
    label = str(images.label(index)).encode()
    about = tarfile.TarInfo(f"{key}.cls")
    about.size = len(label)
    tar.addfile(about, io.BytesIO(label))


def index_shards(shards: str | Path | Sequence[str]) -> None:
    """Look into shards, and write what is in them to the index in each folder. What it says of others stays.

    Pictures are not decoded.

    Args:
        shards: Pattern of the shards, such as ``"shards/train-{000..146}.tar"``, or their paths.

    Raises:
        ArgumentError: If a shard is cut off, or a picture in it has no label or a label no picture. The message names
            both.
    """
    folders: dict[str, dict[str, Any]] = {}
    for path in expand(shards) if isinstance(shards, str | Path) else shards:
        counts = _counts(path)
        entry = {"size": os.path.getsize(path), "counts": {str(label): counts[label] for label in sorted(counts)}}
        folders.setdefault(os.path.dirname(path), {})[os.path.basename(path)] = entry
    for folder, found in folders.items():
        index = Path(folder, INDEX)
        known = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
        unfinished = index.with_name(f".{INDEX}.unfinished")
        unfinished.write_text(json.dumps({**known, **found}, indent=1, sort_keys=True), encoding="utf-8")
        os.replace(unfinished, index)


def _counts(path: str) -> Counter[int]:
    """Return the number of samples of each class in a shard."""
    pictures, labels = Counter[str](), dict[str, int]()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, ending = split_name(member.name)
                if not member.isreg() or key is None:
                    continue
                if ending == ".cls":
                    file = tar.extractfile(member)
                    labels[key] = read_label(b"" if file is None else file.read(), f"{shown(path)}: {key}")
                elif ending in image_endings():
                    pictures[key] += 1
            # tarfile takes a file that is cut off between two members for a whole one.
            with open(path, "rb") as content:
                content.seek(tar.offset)
                is_whole = content.read(_BLOCK) == bytes(_BLOCK)
    except (OSError, tarfile.TarError) as error:
        raise ArgumentError(f"Expected {shown(path)} to be a whole tar file, but got an error: {error}") from error
    if not is_whole:
        raise ArgumentError(f"Expected {shown(path)} to be a whole tar file, but got one without its end.")
    if wrong := sorted(key for key in labels.keys() | pictures.keys() if key not in labels or pictures[key] != 1):
        expected = "one picture and one .cls file of each sample"
        got = f"{pictures[wrong[0]]} and {int(wrong[0] in labels)} of {wrong[0]!r}"
        more = f" (and {len(wrong) - 1} more samples)" if len(wrong) > 1 else ""
        raise ArgumentError(f"Expected {shown(path)} to have {expected}, but got {got}{more}.")
    return Counter(labels.values())


def split_name(name: str) -> tuple[str | None, str]:
    """Return the key of a member of a shard, and its ending from the first dot of its name on; no key if hidden."""
    folder, _, file = name.rpartition("/")
    stem, dot, ending = file.partition(".")
    return (f"{folder}/{stem}" if folder else stem) if stem else None, f"{dot}{ending}".lower()


def read_label(content: bytes, place: str) -> int:
    """Return the label that a .cls file holds, or raise ``ArgumentError`` with the place of the file."""
    text = content.strip()
    if not text.isdigit() or len(text) > 10:
        got = repr(text[:20].decode(errors="replace"))
        raise ArgumentError(f"Expected the label of {place} to be an integer >= 0, but got {got}.")
    return int(text)


def read_index(pattern: str | Path) -> list[Shard]:
    """Return the shards of a pattern, as the index in their folder has them.

    Raises:
        ArgumentError: If a shard is not there, or not as large as when it was indexed.
    """
    shards, known = [], dict[str, dict[str, Any]]()
    for path in expand(pattern):
        folder, name = os.path.split(path)
        if folder not in known:
            known[folder] = _read(folder, pattern)
        entry = known[folder].get(name)
        size = os.path.getsize(path) if os.path.isfile(path) else -1
        if entry is None or entry["size"] != size:
            state = "not there" if size < 0 else "new" if entry is None else "of another size"
            expected = f"tar files as they were indexed ({_REMEDY.format(pattern)})"
            raise bad_argument("shards", expected, got_text=f"{shown(path)}, which is {state}")
        shards.append(Shard(path, size, {int(label): number for label, number in entry["counts"].items()}))
    return shards


_REMEDY = "index them: lightning_ssesam.data.index_shards({!r})"


def _read(folder: str, pattern: str | Path) -> dict[str, Any]:
    try:
        content = json.loads(Path(folder, INDEX).read_text(encoding="utf-8"))
        if all(isinstance(entry["size"], int) and isinstance(entry["counts"], dict) for entry in content.values()):
            return dict(content)
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        pass
    expected = f"tar files beside an {INDEX} ({_REMEDY.format(str(pattern))})"
    raise bad_argument("shards", expected, got_text=f"{str(pattern)!r}, without a readable one")
