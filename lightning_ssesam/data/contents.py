"""What identifies the contents of data sets: names, sizes and times of files, and the values of arrays."""

import argparse
import hashlib
import numbers
import os
import stat
import sys
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.parsing import AttributeDict
from torch import nn
from torch.utils.data import Dataset

from lightning_ssesam.data.threads import in_threads

# Elements of an array that are copied at a time.
_CHUNK = 2**22
_SCALARS = (numbers.Number, np.generic, type(None), range)
_BYTES = (bytes, bytearray, array)
# Code and settings, which count elsewhere. Lightning keeps hyperparameters as an `AttributeDict`.
_NO_CONTENTS = (type, ModuleType, nn.Module, pl.Trainer, AttributeDict)


def hash_files(paths: Iterable[str], root: str | Path | None = None) -> str:
    """Return a text that changes with the name, the size or the time of change of any of these files.

    Args:
        paths: Paths of the files, in the order that counts. A missing file counts as such.
        root: Folder of the files, whose own path does not count.
    """
    above, hashed = 0 if root is None else len(os.path.join(os.path.expanduser(root), "")), hashlib.sha256()
    for text in in_threads(partial(_describe, above), paths):
        hashed.update(text)
    return hashed.hexdigest()


def _describe(above: int, path: str) -> bytes:
    try:
        found = os.stat(path)
        state = f"{found.st_size} {found.st_mtime_ns}"
    except (OSError, ValueError):
        state = "missing"
    return os.fsencode(path[above:]) + f"\0{state}\0".encode()


def hash_array(values: torch.Tensor | np.ndarray[Any, Any]) -> str:
    """Return a text that changes with the shape, the type or a value of an array."""
    hashed = hashlib.sha256(f"{tuple(values.shape)} {values.dtype}".encode())
    if isinstance(values, torch.Tensor):
        flat = (values.to_dense() if values.layout != torch.strided else values).detach().reshape(-1)
        for chunk in torch.split(flat, _CHUNK):
            hashed.update(chunk.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    elif values.dtype.hasobject:
        hashed.update(repr(values.tolist()).encode())
    else:
        elements = values.reshape(-1)
        for start in range(0, elements.size, _CHUNK):
            hashed.update(elements[start : start + _CHUNK].tobytes())
    return hashed.hexdigest()


def hash_attributes(owner: object) -> str:
    """Return a text that changes with the contents among the attributes of an object.

    Contents are numbers, texts, bytes, arrays, the state of files that are named, and what lists, mappings and objects
    have of these. Of a data module, numbers and texts are settings and do not count. No sample is loaded.
    """
    walk = _Walk()
    walk.visit(owner)
    return walk.hashed.hexdigest()


class _Walk:
    """Visits objects once each, and hashes what is found."""

    def __init__(self) -> None:
        self.hashed = hashlib.sha256()
        # The objects are kept, because the address of one that is gone may be used again.
        self._seen: dict[int, tuple[int, Any]] = {}

    def visit(self, value: Any) -> None:
        """Hash the contents of a value."""
        if isinstance(value, str | Path):
            self._add(f"{str(value)!r} {_state_of(value)}")
        elif isinstance(value, _SCALARS):
            self._add(repr(value))
        elif id(value) in self._seen:
            self._add(f"seen {self._seen[id(value)][0]}")
        else:
            self._seen[id(value)] = len(self._seen), value
            self._visit_new(value)

    def _visit_new(self, value: Any) -> None:
        if isinstance(value, torch.Tensor | np.ndarray) and not _has_objects(value):
            self._add(hash_array(value))
        elif isinstance(value, _BYTES):
            self._add(f"bytes {hashlib.sha256(value).hexdigest()}")
        elif isinstance(value, Mapping):
            self._visit_list("mapping", [part for pair in value.items() for part in pair])
        elif isinstance(value, list | tuple | deque):
            self._visit_list("list", value)
        elif isinstance(value, set | frozenset):
            self._visit_list("set", sorted(value, key=repr))
        elif isinstance(value, np.ndarray):
            self._visit_list(f"array {value.shape}", value.reshape(-1).tolist())
        elif hasattr(value, "to_numpy") and not isinstance(value, type):
            # Tables of pandas.
            self.visit(value.to_numpy())
        elif not isinstance(value, _NO_CONTENTS):
            self._visit_object(value)

    def _visit_list(self, kind: str, values: Iterable[Any]) -> None:
        parts = list(values)
        self._add(f"{kind} {len(parts)}")
        if all(issubclass(part, _SCALARS) and not issubclass(part, str) for part in set(map(type, parts))):
            # Much faster than a visit for each of millions of labels.
            self._add(repr(parts))
        else:
            for part in parts:
                self.visit(part)

    def _visit_object(self, owner: Any) -> None:
        kind = type(owner)
        self._add(kind.__qualname__)
        # The attributes of Python's own objects, such as loggers, change by themselves.
        is_python = kind.__module__.partition(".")[0] in sys.stdlib_module_names
        if is_python and not isinstance(owner, argparse.Namespace | SimpleNamespace):
            return
        has_settings = isinstance(owner, pl.LightningDataModule)
        for name, value in sorted(dict(_attributes(owner)).items()):
            is_path = isinstance(value, str | Path) and isinstance(owner, Dataset | pl.LightningDataModule)
            if isinstance(value, _NO_CONTENTS) or (has_settings and isinstance(value, _SCALARS)):
                continue
            state = _state_of(os.path.expanduser(value)) if is_path else ""
            if is_path and (state or not has_settings):
                self._add(f"{name} {_name_of(value)!r} {state}")
            elif not is_path:
                self._add(name)
                self.visit(value)

    def _add(self, text: str) -> None:
        self.hashed.update(f"{text}\n".encode())


def _has_objects(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.hasobject


def _attributes(owner: Any) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of an object, with those in slots."""
    yield from getattr(owner, "__dict__", {}).items()
    for kind in type(owner).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            if name != "__dict__" and hasattr(owner, name):
                yield name, getattr(owner, name)


def _state_of(path: str | Path) -> str:
    """Return the size and the time of change of a file, or an empty text if it is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return ""
    return f"{found.st_size} {found.st_mtime_ns}" if stat.S_ISREG(found.st_mode) else ""


def _name_of(path: str | Path) -> str:
    """Return the name of a file or a folder, however its path is written, and any other text as it is."""
    text = str(path)
    has_folder = bool(os.path.dirname(text)) and "\0" not in text and os.path.exists(os.path.expanduser(text))
    return os.path.basename(os.path.realpath(os.path.expanduser(text))) if has_folder else text
