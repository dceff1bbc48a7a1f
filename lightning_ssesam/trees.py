"""Tensors in nested tuples, lists, mappings and dataclasses: what a batch is made of."""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


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
    if isinstance(tree, _PLAIN):
        return type(tree), tree
    if isinstance(tree, list | tuple):
        return type(tree), *map(signature, tree)
    if isinstance(tree, Mapping):
        return type(tree), *((key, signature(item)) for key, item in tree.items())
    if is_dataclass(tree) and not isinstance(tree, type):
        return type(tree), *(signature(getattr(tree, field.name)) for field in fields(tree))
    return type(tree), id(tree)


def others_of(tree: Any) -> Iterator[Any]:
    """Yield what is in a tree and neither a tensor, a container, a number nor a text."""
    if isinstance(tree, list | tuple):
        items: Any = tree
    elif isinstance(tree, Mapping):
        items = tree.values()
    elif is_dataclass(tree) and not isinstance(tree, type):
        items = [getattr(tree, field.name) for field in fields(tree)]
    else:
        if not isinstance(tree, (Tensor, *_PLAIN)):
            yield tree
        return
    for item in items:
        yield from others_of(item)
