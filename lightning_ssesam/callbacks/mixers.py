"""What mixes the samples of a batch (MixUp, CutMix): where people keep it, and how it is turned off and on."""

import inspect
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from operator import attrgetter
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor, nn

# A mixing transform lies a few steps from its module, and in no long list. Data sets are longer.
_DEEPEST = 8
_MOST_ITEMS = 100
# Packages whose methods use no transform of the user.
_PACKAGES = {"builtins", "lightning", "lightning_ssesam", "pytorch_lightning", "timm", "torch", "torchvision"}
_ABSENT = object()


def unmixed(*inputs: Any, **_: Any) -> Any:
    """Return what a mixing transform was given, as torchvision's transforms return it."""
    return inputs if len(inputs) != 1 else inputs[0]


class Mixer:
    """An attribute that has another value while there is no mixing.

    Args:
        owner: Object that has the attribute.
        name: Name of the attribute.
        off: Value of the attribute while there is no mixing.
    """

    def __init__(self, owner: Any, name: str, off: Any) -> None:
        self.owner, self.name, self.off = owner, name, off
        self._kept: Any = None
        self.is_off = False

    @property
    def key(self) -> tuple[int, str]:
        """What two mixers share if they are the same."""
        return id(self.owner), self.name

    def turn(self, off: bool) -> None:
        """Turn mixing off, or on as it was."""
        if off == self.is_off:
            return
        self.is_off = off
        if off:
            self._kept = vars(self.owner).get(self.name, _ABSENT)
            setattr(self.owner, self.name, self.off)
        elif self._kept is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self._kept)


def mixers_in(root: Any) -> list[Mixer]:
    """Return the mixers that an object holds, or that its methods use: those of torchvision, and of timm's kind."""
    found: dict[tuple[int, str], Mixer] = {}
    # The nearest first, because what is seen too deep is not looked at again.
    waiting, seen = deque([(root, 0)]), set[int]()
    while waiting:
        value, depth = waiting.popleft()
        if id(value) in seen or depth > _DEEPEST:
            continue
        seen.add(id(value))
        if (mixer := _known_mixer(value)) is not None:
            found[mixer.key] = mixer
        else:
            waiting += [(part, depth + 1) for part in _parts(value)]
    return list(found.values())


def mixers_of(given: Any) -> list[Mixer]:
    """Return the mixers of an object that mixes; none if it cannot be turned off. A module needs to be of no kind."""
    return mixers_in(given) or ([Mixer(given, "forward", unmixed)] if isinstance(given, nn.Module) else [])


def named_mixers(roots: Iterable[Any], name: str) -> list[Mixer]:
    """Return the mixers of the first of some objects that has an attribute of a name such as ``"augment.mix"``."""
    path, _, last = name.rpartition(".")
    for root in roots:
        try:
            owner = attrgetter(path)(root) if path else root
            value = getattr(owner, last)
        except AttributeError:
            continue
        if mixers := mixers_of(value):
            return mixers
        if isinstance(value, bool | int | float):
            return [Mixer(owner, last, type(value)())]
        return [Mixer(owner, last, unmixed)] if callable(value) else []
    return []


def loaders_in(tree: Any) -> Iterator[Any]:
    """Yield the loaders of the Trainer's ``train_dataloader``: one, or nested lists and mappings of several."""
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if not isinstance(tree, list | tuple):
        yield tree
        return
    for part in tree:
        yield from loaders_in(part)


def _known_mixer(value: Any) -> Mixer | None:
    # If the transforms have not been imported, there is none of them.
    v2 = sys.modules.get("torchvision.transforms.v2")
    if v2 is not None and isinstance(value, v2.MixUp | v2.CutMix):
        return Mixer(value, "forward", unmixed)
    is_object = not isinstance(value, type | types.ModuleType)
    has_flag = is_object and isinstance(_attributes(value).get("mixup_enabled"), bool)
    return Mixer(value, "mixup_enabled", False) if has_flag else None


def _parts(value: Any) -> list[Any]:
    """Return what may hold or be a mixing transform in an object."""
    if isinstance(value, type | types.ModuleType | Tensor | Trainer | str | bytes):
        return []
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return list(value) if len(value) <= _MOST_ITEMS else []
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if inspect.ismethod(value):
        return [value.__self__, value.__func__]
    if inspect.isfunction(value):
        # A variable of a closure may have no value yet.
        with suppress(ValueError):
            used = inspect.getclosurevars(value)
            return [*used.nonlocals.values(), *used.globals.values()]
        return []
    return [*_attributes(value).values(), *_methods(type(value))]


def _methods(kind: type) -> Iterator[Any]:
    """Yield the functions of a class of the user. They may use a transform that is a global variable."""
    for parent in kind.__mro__:
        if parent.__module__.partition(".")[0] not in _PACKAGES:
            yield from filter(inspect.isfunction, vars(parent).values())


def _attributes(value: Any) -> dict[str, Any]:
    return getattr(value, "__dict__", None) or {}
