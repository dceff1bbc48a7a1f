"""What a recorded step has read and a replay does not look at again: if it changes, the recording is out of date."""

import copy
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_ssesam.forward_state import is_plain_object

_NUMBERS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_GROWING = (list, dict, deque, set)
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
        is_strict: Whether to look at metrics too, which change between steps.
    """

    def __init__(self, modules: Sequence[nn.Module], others: Iterable[Any] = (), is_strict: bool = False) -> None:
        self._is_strict = is_strict
        self._numbers: list[_Attributes] = []
        self._tensors: list[_Attributes] = []
        self._containers: list[tuple[str, Any, Any]] = []
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
            if (len(container) if isinstance(before, int) else container) != before:
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
        # Lightning's own attributes, and the mixin's, change in every step.
        attributes = vars(module)
        self._look_at(attributes, name, [k for k in attributes if not ("lightning" in homes and k.startswith("_"))])

    def _look_at(self, attributes: Any, owner: str, names: Iterable[str] | None = None) -> None:
        if id(attributes) in self._seen:
            return
        self._seen.add(id(attributes))
        numbers, tensors = [], []
        for name in list(attributes if names is None else names):
            value = attributes[name]
            if isinstance(value, _NUMBERS):
                numbers.append(name)
            elif isinstance(value, Tensor):
                tensors.append(name)
            elif isinstance(value, _GROWING) and name not in ("_modules", "_parameters", "_buffers"):
                self._look_into(value, f"{owner}.{name}")
            elif is_plain_object(value):
                self._look_at(vars(value), f"{owner}.{name}")
        for found, entries in ((numbers, self._numbers), (tensors, self._tensors)):
            if found:
                values = tuple(attributes[name] for name in found)
                entries.append(_Attributes(owner, attributes, found, values, len(attributes)))

    def _look_into(self, container: Any, name: str) -> None:
        items = list(container.values() if isinstance(container, Mapping) else container)
        is_simple = 0 < len(items) <= _LONGEST and all(isinstance(item, _NUMBERS) for item in items)
        self._containers.append((name, container, copy.copy(container) if is_simple else len(items)))
