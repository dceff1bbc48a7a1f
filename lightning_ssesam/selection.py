"""Some samples of a batch, whatever its form."""

import copy
from collections import UserDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cached_property
from numbers import Number
from pathlib import PurePath
from typing import Any, NoReturn

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_ssesam.tensors import rows

_PLAIN = (str, bytes, Number, PurePath, torch.Size, set, frozenset, type(None))


class SelectionError(MisconfigurationException):
    """Samples cannot be picked from a batch of this form."""

    def __init__(self, problem: str, owner: str) -> None:
        super().__init__(
            f"{problem} Override `select_samples(self, batch, index)` in `{owner}`, or let every pass take the whole"
            " batch: `step_options = StepOptions(passes='full')`."
        )


def pick_samples(batch: Any, index: Tensor, size: int, owner: str) -> Any:
    """Return a batch of ``size`` samples with only those at ``index`` (on the CPU), whatever its nesting.

    Raises:
        SelectionError: If it cannot be told what belongs to which sample; names the class ``owner`` as the place to say
            so.
    """
    return _Picker(index, size, owner).pick(batch, "batch")


class _Picker:
    """Picks samples from every item of a batch. ``path`` says where in the batch an item stands."""

    def __init__(self, index: Tensor, size: int, owner: str) -> None:
        self.index, self.size, self.owner = index, size, owner

    @cached_property
    def positions(self) -> list[int]:
        """The index as a list."""
        positions: list[int] = self.index.tolist()
        return positions

    def pick(self, item: Any, path: str) -> Any:
        """Return an item for the picked samples; as it is, if it belongs to no sample."""
        if isinstance(item, _PLAIN):
            return item
        if isinstance(item, Tensor):
            if item.is_nested or item.layout != torch.strided:
                self._refuse(path, "a nested tensor" if item.is_nested else f"a tensor of layout {item.layout}")
            return rows(item, self.index) if self._fits(item) else item
        if isinstance(item, np.ndarray):
            return item[self.index.numpy()] if self._fits(item) else item
        if isinstance(item, PackedSequence):
            self._refuse(path, "a PackedSequence")
        names = _names(item)
        if self._is_of_graphs(item, names):
            self._refuse(path, f"a {type(item).__name__} of graphs, whose nodes and edges are no samples")
        if isinstance(item, tuple) and names:
            return type(item)._make(map(self.pick, item, (f"{path}.{name}" for name in names)))  # type: ignore[attr-defined]
        if isinstance(item, Sequence):
            return self._pick_sequence(item, path)
        if isinstance(item, Mapping):
            return self._pick_mapping(item, path)
        if is_dataclass(item) and not isinstance(item, type):
            return self._pick_attributes(item, path, names)
        return self._keep(item, path)

    def _pick_sequence(self, item: Sequence[Any], path: str) -> Any:
        if len(item) == self.size and self._has_one_per_sample(item, path):
            picked = [item[position] for position in self.positions]
        else:
            picked = [self.pick(value, f"{path}[{number}]") for number, value in enumerate(item)]
        try:
            return type(item)(picked)  # type: ignore[call-arg]
        except TypeError:
            # A sequence of another kind, such as a range.
            return picked

    def _pick_mapping(self, item: Mapping[Any, Any], path: str) -> Any:
        if isinstance(item, UserDict):
            # With what a subclass keeps beside its data, such as the encodings of transformers' BatchEncoding.
            return self._pick_attributes(item, path, ())
        picked = {key: self.pick(value, f"{path}[{key!r}]") for key, value in item.items()}
        if type(item) is dict:
            return picked
        if not isinstance(item, dict):
            try:
                return type(item)(picked)  # type: ignore[call-arg]
            except TypeError:
                self._refuse(path, f"a {type(item).__name__}, which cannot be made from a dictionary")
        # A copy keeps what a subclass adds: a default, or access by attribute.
        copied = copy.copy(item)
        for key, value in picked.items():
            copied[key] = value
        return copied

    def _pick_attributes(self, item: Any, path: str, names: Iterable[str]) -> Any:
        """Return an object like the item, of picked attributes. No constructor runs: it may check or change them."""
        made = object.__new__(type(item))
        for name in {**dict.fromkeys(names), **getattr(item, "__dict__", {})}:
            # What was computed and kept for all samples is computed again.
            is_kept = isinstance(getattr(type(item), name, None), cached_property)
            if not is_kept and hasattr(item, name):
                object.__setattr__(made, name, self.pick(getattr(item, name), f"{path}.{name}"))
        return made

    def _keep(self, item: Any, path: str) -> Any:
        """Return an object of another kind as it is, if it holds no data."""
        slots = getattr(type(item), "__slots__", ())
        values = [*getattr(item, "__dict__", {}).values(), *(getattr(item, name, None) for name in slots)]
        is_sized = hasattr(type(item), "__len__") and len(item) == self.size
        moves = callable(getattr(item, "to", None))
        if moves or is_sized or any(isinstance(value, Tensor) or self._fits(value) for value in values):
            self._refuse(path, f"a {type(item).__name__}, of which it is not known what belongs to which sample")
        return item

    def _is_of_graphs(self, item: Any, names: Sequence[str]) -> bool:
        """Return whether tensors of an item have a row for each node or edge, as in a batch of PyTorch Geometric."""
        if {"num_graphs", "edge_index"} & set(names) or hasattr(item, "num_graphs"):
            return True
        graphs = (item["batch"] if isinstance(item, Mapping) else item.batch) if "batch" in names else None
        is_vector = isinstance(graphs, Tensor) and graphs.ndim == 1 and not graphs.is_floating_point()
        return is_vector and not self._fits(graphs)

    def _has_one_per_sample(self, items: Sequence[Any], path: str) -> bool:
        """Return whether a sequence as long as the batch has an item for each sample. Else it has parts for all."""
        present = [item for item in items if item is not None]
        fitting = [self._fits(item) for item in present]
        if len({_kind(item) for item in present}) > 1:
            return not any(fitting) and all(isinstance(item, Tensor | np.ndarray) for item in present)
        if not all(fitting) or not present:
            # The samples are alike, but not in their size.
            return True
        is_pair = path == "batch" and self.size == 2
        has_several_forms = len({getattr(item, "ndim", 0) for item in present}) > 1
        if self.size > 1 and not is_pair and not has_several_forms:
            self._refuse(path, f"a {type(items).__name__} of {self.size} items of length {self.size}")
        return False

    def _fits(self, item: Any) -> bool:
        """Return whether an item, or an item in it, has a row for each sample."""
        if isinstance(item, Tensor | np.ndarray):
            return item.ndim > 0 and item.shape[0] == self.size
        if isinstance(item, _PLAIN):
            return False
        if isinstance(item, Sequence):
            return len(item) == self.size or any(map(self._fits, item))
        if isinstance(item, Mapping):
            return any(map(self._fits, item.values()))
        return any(self._fits(getattr(item, name, None)) for name in _names(item))

    def _refuse(self, path: str, what: str) -> NoReturn:
        raise SelectionError(
            f"Expected a batch from which some of {self.size} samples can be picked, but `{path}` is {what}.",
            self.owner,
        )


def _names(item: Any) -> tuple[str, ...]:
    """Return the names of what an item holds: those of a named tuple, a dataclass or a mapping."""
    if isinstance(item, Mapping):
        return tuple(key for key in item if isinstance(key, str))
    if is_dataclass(item):
        return tuple(field.name for field in fields(item))
    return getattr(item, "_fields", ()) if isinstance(item, tuple) else ()


def _kind(item: Any) -> Any:
    if isinstance(item, Tensor | np.ndarray):
        return item.dtype, item.ndim == 0
    return "plain" if isinstance(item, _PLAIN) else type(item)
