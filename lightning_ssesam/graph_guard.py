"""What a recorded step has read and a replay does not look at again: if it changes, the recording is out of date."""

from collections import deque
from collections.abc import Container, Iterable, Mapping, Sequence
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_ssesam.forward_state import is_plain_object

_NUMBERS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_CONTAINERS = (list, tuple, dict, deque, set)
# Longer containers are told by their length alone.
_LONGEST = 64


class _Attributes(NamedTuple):
    """Some of the attributes of an object, and the values that they had: all of them tensors, or none."""

    owner: str
    attributes: Mapping[str, Any]
    names: list[str]
    values: tuple[Any, ...]
    size: int

    def now(self) -> tuple[Any, ...]:
        # The first name again, since for a single one the getter returns no tuple.
        found: tuple[Any, ...] = itemgetter(*self.names, self.names[0])(self.attributes)
        return found[:-1]

    def changed(self) -> str:
        """Return the first name whose value is another one."""
        pairs = zip(self.names, self.values, strict=True)
        return next((name for name, value in pairs if self.attributes.get(name, self) is not value), self.names[0])


class Guard:
    """Remembers numbers and texts by their values, and tensors by their place in memory.

    Args:
        modules: All modules of the model.
        others: Further objects whose attributes a step reads, such as the objective.
        hidden: Names of attributes that are not looked at.
        is_strict: Whether to look at metrics too, which change between steps.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        others: Iterable[Any] = (),
        hidden: Container[str] = (),
        is_strict: bool = False,
    ) -> None:
        self._hidden, self._is_strict = hidden, is_strict
        self._numbers: list[_Attributes] = []
        self._tensors: list[_Attributes] = []
        self._containers: list[tuple[str, Any, list[Any] | int]] = []
        self._seen: set[int] = set()
        for module in modules:
            self._look_at_module(module)
        for other in others:
            self._look_at(vars(other), type(other).__name__)
        found = [t for entry in self._tensors for t in entry.values if t.layout == torch.strided]
        self._places = [(t, t.data_ptr(), t.requires_grad) for t in found]

    def change(self) -> str | None:
        """Return what is no longer as it was, in words; None if everything is. Takes a fraction of a millisecond."""
        try:
            for entry in self._numbers:
                if entry.now() != entry.values:
                    return f"`{entry.owner}.{entry.changed()}`"
                # An attribute of a class may be hidden by a new one of the object.
                if len(entry.attributes) != entry.size:
                    return f"the set of attributes of `{entry.owner}`"
            for entry in self._tensors:
                if not all(map(is_, entry.now(), entry.values)):
                    return f"`{entry.owner}.{entry.changed()}`"
        except KeyError as error:
            return f"`{entry.owner}.{error.args[0]}`"
        for name, container, before in self._containers:
            # Most are the empty dictionaries of hooks.
            if (container or before) and not _are_same(container, before):
                return f"`{name}`"
        for tensor, place, requires_grad in self._places:
            if tensor.data_ptr() != place or tensor.requires_grad is not requires_grad:
                return "the memory of a tensor, or whether it is trained,"
        return None

    def _look_at_module(self, module: nn.Module) -> None:
        homes = {kind.__module__.partition(".")[0] for kind in type(module).__mro__}
        if "torchmetrics" in homes and not self._is_strict:
            return
        name = type(module).__name__
        for tensors in (module._parameters, module._buffers):
            self._look_at(tensors, name)
        self._look_at(vars(module), name)

    def _look_at(self, attributes: Any, owner: str) -> None:
        if id(attributes) in self._seen:
            return
        self._seen.add(id(attributes))
        numbers, tensors = [], []
        for name, value in attributes.items():
            if name in self._hidden:
                continue
            if isinstance(value, _NUMBERS):
                numbers.append(name)
            elif isinstance(value, Tensor):
                tensors.append(name)
            elif name not in ("_modules", "_parameters", "_buffers"):
                self._look_into(value, f"{owner}.{name}")
        for found, entries in ((numbers, self._numbers), (tensors, self._tensors)):
            if found:
                values = tuple(attributes[name] for name in found)
                entries.append(_Attributes(owner, attributes, found, values, len(attributes)))

    def _look_into(self, value: Any, name: str) -> None:
        """Look at what a container or an object of the user's holds."""
        if isinstance(value, _CONTAINERS):
            if id(value) in self._seen:
                return
            self._seen.add(id(value))
            items = _items(value)
            self._containers.append((name, value, items if len(items) <= _LONGEST else len(items)))
            for item in items[:_LONGEST]:
                self._look_into(item, name)
        elif is_plain_object(value):
            self._look_at(vars(value), name)


def _items(container: Any) -> list[Any]:
    return list(container.values() if isinstance(container, Mapping) else container)


def _are_same(container: Any, before: list[Any] | int) -> bool:
    if isinstance(before, int):
        return len(container) == before
    items = _items(container)
    pairs = zip(items, before, strict=False)
    return len(items) == len(before) and all(a is b or (isinstance(a, _NUMBERS) and a == b) for a, b in pairs)
