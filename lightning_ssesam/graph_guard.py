"""What a recorded step has read and a replay does not look at again: if it changes, the recording is out of date."""

import copy
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ssesam.forward_state import is_plain_object

_NUMBERS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_CONTAINERS = (list, tuple, dict, deque, set, frozenset)
# Longer containers are told by their length alone.
_LONGEST = 64


class Guard:
    """Remembers numbers and texts by their values, tensors by their place in memory. A check takes microseconds.

    Args:
        modules: All modules of the model.
        others: Further objects whose attributes a step reads, such as the objective.
        is_strict: Whether to look at metrics too, which change between steps.
    """

    def __init__(self, modules: Sequence[nn.Module], others: Iterable[Any] = (), is_strict: bool = False) -> None:
        self._is_strict = is_strict
        self._values: list[tuple[Mapping[str, Any], str, Any]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._owners: dict[int, str] = {}
        self._seen: set[int] = set()
        for module in modules:
            self._look_at_module(module)
        for other in others:
            self._look_at(vars(other), type(other).__name__)
        found = [value for _, _, value in self._values if isinstance(value, Tensor)]
        self._places = [(t, t.data_ptr(), t.requires_grad) for t in found]

    def change(self) -> str | None:
        """Return what is no longer as it was, in words; None if everything is."""
        for attributes, name, value in self._values:
            now = attributes.get(name, self)
            if now is not value and (isinstance(value, Tensor) or type(now) is not type(value) or now != value):
                return f"`{self._owners[id(attributes)]}.{name}`"
        for container, before in self._containers:
            if (len(container) if isinstance(before, int) else container) != before:
                return f"`{self._owners[id(container)]}`"
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
        own = [key for key in attributes if not ("lightning" in homes and key.startswith("_"))]
        self._look_at(attributes, name, own)

    def _look_at(self, attributes: Any, name: str, keys: Iterable[str] | None = None) -> None:
        if id(attributes) in self._seen:
            return
        self._seen.add(id(attributes))
        self._owners[id(attributes)] = name
        for key in list(attributes if keys is None else keys):
            value = attributes[key]
            if isinstance(value, (*_NUMBERS, Tensor)):
                self._values.append((attributes, key, value))
            elif isinstance(value, _CONTAINERS) and key not in ("_modules", "_parameters", "_buffers"):
                self._look_into(value, f"{name}.{key}")
            elif is_plain_object(value):
                self._look_at(vars(value), f"{name}.{key}")

    def _look_into(self, container: Any, name: str) -> None:
        self._owners[id(container)] = name
        items = list(container.values()) if isinstance(container, Mapping) else list(container)
        is_simple = len(items) <= _LONGEST and all(isinstance(item, _NUMBERS) for item in items)
        if isinstance(container, tuple | frozenset):
            return
        self._containers.append((container, copy.copy(container) if is_simple and items else len(items)))
