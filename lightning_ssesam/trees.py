"""Tensors in nested tuples, lists, mappings and dataclasses: what a batch is made of."""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
"""Numbers, texts and the like: what two trees may share by its value."""


def mapped(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Return a copy of a tree in which a function has replaced every tensor. What is no container stays the same."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, list | tuple):
        items = [mapped(function, item) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, MutableMapping):
        mapping = copy.copy(tree)
        for key, item in tree.items():
            mapping[key] = mapped(function, item)
        return mapping
    if is_dataclass(tree) and not isinstance(tree, type):
        new = copy.copy(tree)
        for field in fields(tree):
            # A frozen dataclass refuses `setattr`.
            object.__setattr__(new, field.name, mapped(function, getattr(tree, field.name)))
        return new
    return tree


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors of a tree, in the order of :func:`mapped`."""
    found: list[Tensor] = []
    mapped(found.append, tree)
    return found


def signature(tree: Any) -> Any:
    """Return a hashable value that two trees share if they differ in nothing but the values of their tensors."""
    if isinstance(tree, Tensor):
        return tree.shape, tree.stride(), tree.dtype, tree.device
    if isinstance(tree, PLAIN):
        return type(tree), tree
    if (items := _items(tree)) is None:
        return type(tree), id(tree)
    names = tuple(tree) if isinstance(tree, Mapping) else ()
    return type(tree), names, *map(signature, items)


def others_of(tree: Any) -> Iterator[Any]:
    """Yield what is in a tree and neither a tensor, a container, a number nor a text."""
    if isinstance(tree, (Tensor, *PLAIN)):
        return
    if (items := _items(tree)) is None:
        yield tree
        return
    for item in items:
        yield from others_of(item)


def _items(tree: Any) -> list[Any] | None:
    """Return what a container holds; None if it is none."""
    if isinstance(tree, list | tuple):
        return list(tree)
    if isinstance(tree, Mapping):
        return list(tree.values())
    if is_dataclass(tree) and not isinstance(tree, type):
        return [getattr(tree, field.name) for field in fields(tree)]
    return None
