"""The layers of a model: found by one walk, and found again only if the model has changed."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from operator import attrgetter, is_, methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Buffers = dict[str, Tensor | None]

# Functions in C, because they run for every layer in every step.
_NAMES, _VALUES = methodcaller("keys"), methodcaller("values")
_MODULES, _PARAMETERS, _BUFFERS = map(attrgetter, ("_modules", "_parameters", "_buffers"))
_MODE, _COMPILED = attrgetter("training"), attrgetter("_compiled_call_impl")


class Contents:
    """Dictionaries and what is in them, by identity: no two tensors are compared by their values."""

    def __init__(self, dictionaries: Iterable[Mapping[str, object]]) -> None:
        self._dictionaries = list(filter(len, dictionaries))
        self._sizes, names, values = self._look(self._dictionaries)
        self._names, self._values = list(names), list(values)

    def are_in(self, dictionaries: Iterable[Mapping[str, object]]) -> bool:
        """Return whether the dictionaries are the same ones, with the same names and values in the same order.

        Empty dictionaries do not count.
        """
        filled = list(filter(len, dictionaries))
        if len(filled) != len(self._dictionaries) or not all(map(is_, filled, self._dictionaries)):
            return False
        sizes, names, values = self._look(filled)
        return sizes == self._sizes and list(names) == self._names and all(map(is_, values, self._values))

    @staticmethod
    def _look(filled: list[Mapping[str, object]]) -> tuple[list[int], Iterable[str], Iterable[object]]:
        """Return the sizes of dictionaries, and their names and values one after the other."""
        names, values = map(_NAMES, filled), map(_VALUES, filled)
        return list(map(len, filled)), chain.from_iterable(names), chain.from_iterable(values)


class Layers:
    """The layers of a model, in the order of ``modules()``, and what a step asks of them.

    One walk finds the tree of modules and parameters. :meth:`are_of` tells whether another walk would find the same.
    All else is looked at when it is asked for: modes, what is trained, what is compiled, and what a buffer is bound to.

    Args:
        modules: A model, or all of its modules.

    Attributes:
        modules: The modules.
        parameters: Their parameters, each once, in the order of ``parameters()``.
    """

    def __init__(self, modules: nn.Module | Iterable[nn.Module] = ()) -> None:
        self.modules = list(modules.modules() if isinstance(modules, nn.Module) else modules)
        self._tree = Contents(self._find_tree())
        found = chain.from_iterable(module._parameters.values() for module in self.modules)
        self.parameters: list[Tensor] = list({id(p): p for p in found if p is not None}.values())
        self._norms = [module for module in self.modules if isinstance(module, _BatchNorm)]
        self._has_compiled_parts = any(map(is_compiled, self.modules))

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.modules)

    def are_of(self, model: nn.Module | list[nn.Module]) -> bool:
        """Return whether they are the layers of a model as it is now. Takes a third of the time of a walk."""
        is_same = self.modules[:1] == [model] if isinstance(model, nn.Module) else self.modules == model
        return is_same and self._tree.are_in(self._find_tree())

    def _find_tree(self) -> Iterable[Mapping[str, object]]:
        return chain(map(_MODULES, self.modules), map(_PARAMETERS, self.modules))

    @property
    def buffers(self) -> list[Buffers]:
        """The dictionaries in which the modules keep their own buffers, without the empty ones."""
        # `named_buffers` gives no access to the bindings, which a layer may change and a restore has to undo.
        return list(filter(len, map(_BUFFERS, self.modules)))

    @property
    def batch_norms(self) -> list[nn.Module]:
        """The batch norm layers that normalize by statistics of the batch."""
        # In evaluation mode batch norm uses the statistics of the batch only if it has no others.
        return [layer for layer in self._norms if layer.training or layer.running_mean is None]

    @property
    def is_compiled(self) -> bool:
        """Whether ``torch.compile`` has been called on a layer."""
        return self._has_compiled_parts or any(map(_COMPILED, self.modules))

    def mark(self, parameters: Iterable[Tensor]) -> bytes:
        """Return a mark of the modes of the modules, of which parameters are trained, and of the numbers of buffers."""
        sizes = [size % 256 for size in map(len, self.buffers)]
        return bytes(map(_MODE, self.modules)) + bytes([p.requires_grad for p in parameters]) + bytes(sizes)


def survey(model: nn.Module | Iterable[nn.Module], known: Layers | None = None) -> Layers:
    """Return the layers of a model, or of all of its modules: the known ones, unless the model has changed.

    Called in every step, since layers may be frozen, added or replaced between steps.
    """
    if isinstance(model, Layers):
        return model
    model = model if isinstance(model, nn.Module) else list(model)
    return known if known is not None and known.are_of(model) else Layers(model)


def is_compiled(module: nn.Module) -> bool:
    """Return whether ``torch.compile`` has been called on a module."""
    return module._compiled_call_impl is not None or isinstance(module, torch._dynamo.OptimizedModule)


def replays_by_itself(module: nn.Module) -> bool:
    """Return whether a module is compiled with CUDA graphs of its own (``mode="reduce-overhead"``)."""
    functions: tuple[Any, ...] = (module._compiled_call_impl, getattr(module, "forward", None))
    configs = [f.get_compiler_config() or {} for f in functions if hasattr(f, "get_compiler_config")]
    return any(config.get("triton.cudagraphs", False) for config in configs)
