"""What identifies the contents of data sets: names, sizes and times of files, and the values of arrays."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

# Of larger arrays, every second, third, ... element is read, so that it takes less than a second.
_MOST_BYTES = 2**28


def hash_files(paths: Iterable[str], root: str | Path | None = None) -> str:
    """Return a text that changes with the name, the size or the time of change of any of these files.

    Args:
        paths: Paths of the files, in the order that counts. A missing file counts as such.
        root: Folder of the files, whose own path does not count.
    """
    above, hashed = 0 if root is None else len(os.path.join(os.path.expanduser(root), "")), hashlib.sha256()
    for path in paths:
        try:
            found = os.stat(path)
            state = f"{found.st_size} {found.st_mtime_ns}"
        except (OSError, ValueError):
            state = "missing"
        hashed.update(os.fsencode(path[above:]) + f"\0{state}\0".encode())
    return hashed.hexdigest()


def hash_array(values: torch.Tensor | np.ndarray[Any, Any]) -> str:
    """Return a text that changes with the shape, the type or a value of an array."""
    hashed = hashlib.sha256(f"{tuple(values.shape)} {values.dtype}".encode())
    if isinstance(values, torch.Tensor):
        flat = (values.to_dense() if values.layout != torch.strided else values).detach().reshape(-1)
        step = max(1, -(-flat.nbytes // _MOST_BYTES))
        hashed.update(flat[::step].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    elif values.dtype == object:
        hashed.update(repr(values.tolist()).encode())
    else:
        step = max(1, -(-values.nbytes // _MOST_BYTES))
        hashed.update(values.reshape(-1)[::step].tobytes())
    return hashed.hexdigest()


def hash_attributes(owner: object) -> str:
    """Return a text that changes with the files, the arrays and the data sets among the attributes of an object.

    Lists and mappings are looked into, as the ``samples`` of torchvision's data sets. No sample is loaded.
    """
    found = {name: _hash_value(value) for name, value in getattr(owner, "__dict__", {}).items()}
    texts = [f"{name} {text}" for name, text in sorted(found.items()) if text]
    return hashlib.sha256("\n".join([type(owner).__qualname__, *texts]).encode()).hexdigest()


def _hash_value(value: Any) -> str:
    """Return a text for contents, and an empty one for anything else, such as a setting."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return hash_array(value)
    if isinstance(value, Dataset):
        return hash_attributes(value)
    if isinstance(value, str | Path):
        path = os.path.realpath(os.path.expanduser(value)) if value and "\0" not in str(value) else ""
        return hash_files([path]) if os.path.isfile(path) else ""
    if isinstance(value, Mapping):
        return " ".join(f"{key} {_hash_value(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return _hash_list(value)
    # Tables of pandas.
    return hash_array(value.to_numpy()) if hasattr(value, "to_numpy") else ""


def _hash_list(values: list[Any] | tuple[Any, ...]) -> str:
    if any(isinstance(part, torch.Tensor | np.ndarray | Dataset) for part in values[:1]):
        return " ".join(map(_hash_value, values))
    flat = [item for part in values for item in (part if isinstance(part, list | tuple) else (part,))]
    numbers = [item for item in flat if isinstance(item, int | float)]
    # A name that is none of a file counts, too: as one of a file that is missing.
    files = hash_files(str(item) for item in flat if isinstance(item, str | Path))
    return files + hashlib.sha256(repr(numbers).encode()).hexdigest()
