"""What a recorded step has read and a replay does not look at again: if it changes, the recording is out of date."""

from collections import deque
from collections.abc import Container, Iterable, Mapping, Sequence
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_ssesam.forward_state import is_plain_object
from lightning_ssesam.trees import PLAIN

_CONTAINERS = (list, tuple, dict, deque, set)
# Arrays and containers of other things than numbers are not looked into beyond this size.
_LARGEST = 1000


class _Attributes(NamedTuple):
    """Attributes of an object, and the values that they had."""

    owner: str
    attributes: Mapping[str, Any]
    names: list[str]
    values: tuple[Any, ...]
    size: int

    def change(self) -> str | None:
        """Return the first attribute that is another object now, and no equal number; None if there is none."""
        try:
            # The first name again, since for a single one the getter returns no tuple.
            now = itemgetter(*self.names, self.names[0])(self.attributes)
        except KeyError as error:
            return f"`{self.owner}.{error.args[0]}`"
        if not all(map(is_, now, self.values)):
            for name, a, b in zip(self.names, now, self.values, strict=False):
                if not _is_same(a, b):
                    return f"`{self.owner}.{name}`"
        # An attribute of a class may be hidden by a new one of the object.
        return None if len(self.attributes) == self.size else f"the set of attributes of `{self.owner}`"


class Guard:
    """Remembers numbers and texts by their values, and all else by its identity or its place in memory.

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
        self._attributes: list[_Attributes] = []
        self._containers: list[tuple[str, Any, list[Any]]] = []
        self._arrays: list[tuple[str, Any, bytes]] = []
        self._seen: set[int] = set()
        for module in modules:
            self._look_at_module(module)
        for other in others:
            self._look_at(vars(other), type(other).__name__)
        tensors = {id(t): t for entry in self._attributes for t in entry.values if isinstance(t, Tensor)}.values()
        self._places = [(t, t.data_ptr(), t.requires_grad) for t in tensors if t.layout == torch.strided]

    def change(self) -> str | None:
        """Return what is no longer as it was, in words; None if everything is. Takes a fraction of a millisecond."""
        for entry in self._attributes:
            if (change := entry.change()) is not None:
                return change
        for name, container, before in self._containers:
            # Most are the empty dictionaries of hooks.
            if (container or before) and not _are_same(_items(container), before):
                return f"`{name}`"
        for name, array, content in self._arrays:
            if array.tobytes() != content:
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
        names = [name for name in attributes if name not in self._hidden]
        if names:
            values = itemgetter(*names, names[0])(attributes)
            self._attributes.append(_Attributes(owner, attributes, names, values, len(attributes)))
        for name in names:
            if name not in ("_modules", "_parameters", "_buffers"):
                self._look_into(attributes[name], f"{owner}.{name}")

    def _look_into(self, value: Any, name: str) -> None:
        """Look at what a container, an array or an object of the user's holds."""
        if isinstance(value, _CONTAINERS):
            if id(value) in self._seen:
                return
            self._seen.add(id(value))
            items = _items(value)
            self._containers.append((name, value, items))
            for item in items[:_LARGEST]:
                self._look_into(item, name)
        elif hasattr(value, "__array_interface__"):
            if value.size <= _LARGEST:
                self._arrays.append((name, value, value.tobytes()))
        elif is_plain_object(value):
            self._look_at(vars(value), name)


def _items(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, Mapping) else list(container)


def _is_same(now: Any, before: Any) -> bool:
    return now is before or (isinstance(before, PLAIN) and type(now) is type(before) and now == before)


def _are_same(now: list[Any], before: list[Any]) -> bool:
    return len(now) == len(before) and (all(map(is_, now, before)) or all(map(_is_same, now, before)))
