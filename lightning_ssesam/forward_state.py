"""What a forward draws from and moves, beside gradients: random generators, and tensors that are not trained."""

import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from lightning_ssesam.snapshots import Snapshot, overlaps_itself, rebind, set_torch_random_state, torch_random_state
from lightning_ssesam.tensors import is_sharded

# Attributes of modules that hold what is looked at by itself.
_NOT_STATE = {"_modules", "_parameters", "_buffers"}
# Attribute of parameters that no forward moves.
_STILL = "is_still"
# How deep to look for generators in the containers and plain objects that a module holds.
_DEPTH = 3


def mark_still(parameters: Iterable[Tensor]) -> None:
    """Promise that no forward moves some frozen parameters, so that the first step need not copy them to find out."""
    for parameter in parameters:
        setattr(parameter, _STILL, True)


class _Generator(NamedTuple):
    """A random number generator: functions that return its state and put it back."""

    get: Callable[[], Any]
    put: Callable[[Any], Any]


@dataclass(frozen=True, eq=False)
class _Holder:
    """A dictionary, list or deque that holds tensors. Of a dictionary, only tensors and None count."""

    owner: Any

    def read(self) -> Any:
        if hasattr(self.owner, "items"):
            return {name: value for name, value in self.owner.items() if value is None or isinstance(value, Tensor)}
        return list(self.owner)

    def write(self, held: Any) -> None:
        if isinstance(held, dict):
            for name in self.read().keys() - held.keys():
                del self.owner[name]
            rebind(self.owner, held)
        elif len(held) != len(self.owner) or any(a is not b for a, b in zip(held, self.owner, strict=True)):
            self.owner.clear()
            self.owner.extend(held)

    def tensors(self) -> list[Tensor]:
        held = self.read()
        values = held.values() if isinstance(held, dict) else held
        return [t for t in values if _is_untrained(t)]

    def is_rebound(self, held: Any) -> bool:
        now = self.read()
        if isinstance(now, dict):
            return now.keys() != held.keys() or any(now[name] is not value for name, value in held.items())
        # A list that grows is taken for a record of what happened.
        pairs = zip(now, held, strict=True) if len(now) == len(held) else ()
        return any(isinstance(a, Tensor) and a is not b for a, b in pairs)


class Moment:
    """What a forward meets: the states of generators, the tensors that are held, and copies of them.

    Args:
        generators: Generators whose state is saved.
        holders: Holders whose bindings are saved.
        copied: Holders whose tensors are copied as well.
    """

    def __init__(self, generators: list[_Generator], holders: list[_Holder], copied: list[_Holder]) -> None:
        self.states = [(generator, generator.get()) for generator in generators]
        self.bindings = [(holder, holder.read()) for holder in holders]
        self.copies = [(holder, Snapshot()) for holder in copied]
        for holder, snapshot in self.copies:
            snapshot.save(holder.tensors())

    def restore(self, only: Sequence[_Holder] | None = None) -> None:
        """Let the next forward meet the same. With ``only``, other holders stay as they are."""
        self.restore_generators()
        for holder, held in self.bindings:
            if only is None or holder in only:
                holder.write(held)
        for holder, snapshot in self.copies:
            if only is None or holder in only:
                snapshot.restore()

    def restore_generators(self) -> None:
        """Let the next forward draw the same random numbers."""
        for generator, state in self.states:
            generator.put(state)

    def originals(self) -> dict[tuple[int, torch.Size], Tensor]:
        """Return clones of the copies, by the memory of their originals."""
        return {place: copy for _, snapshot in self.copies for place, copy in snapshot.copies().items()}

    def keep_moved(self) -> None:
        """Keep only the holders that a forward has moved since."""
        # What has not moved needs no restore, and may share its memory with a parameter.
        self.copies = [(holder, copies) for holder, copies in self.copies if copies.differs()]
        changed = [holder for holder, _ in self.copies]
        self.bindings = [(h, held) for h, held in self.bindings if h in changed or h.is_rebound(held)]

    def used_generators(self) -> list[_Generator]:
        """Return the generators that have been drawn from since."""
        return [generator for generator, state in self.states if not _are_same(generator.get(), state)]


class ForwardState:
    """What the forwards of a model draw from and move, apart from buffers of torch's normalizations.

    The first forward tells: :meth:`learn` compares before and after. From then on, only what has moved is saved.
    Perturbed passes put back what they would move themselves. What only a clean pass moves is a message of the user's
    to the perturbed passes (``in_clean_pass``), and stays.

    Args:
        modules: All modules of the model.
        device: Device of the model.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        self.is_new, self.is_sure, self.moves_parameters = True, False, False
        # Whether a backward moves buffers; None until it has been seen.
        self.backward_moves: bool | None = None
        self._modules = modules
        # Torch's own generators are always saved: it costs next to nothing, and dropout may begin at any time.
        self._generators = [_torchs_generator(device)]
        self._holders: list[_Holder] = []
        self._copied: list[_Holder] = []

    @property
    def returning(self) -> list[_Holder]:
        """The holders that a perturbed pass puts back."""
        return self._holders if self.is_sure else []

    def moment(self) -> Moment:
        """Return what the next forward will meet, as far as is known."""
        return Moment(self._generators, self._holders, self._copied)

    def everything(self) -> Moment:
        """Return whatever the next forward may meet."""
        generators = [*self._generators, *_global_generators(), *_generators_of(self._modules)]
        holders = list(_holders_of(self._modules))
        return Moment(generators, holders, holders)

    def learn(self, before: Moment, is_clean: bool) -> None:
        """Find out what the first forward has drawn from and moved, since :meth:`everything`."""
        self._generators += [g for g in before.used_generators() if g is not self._generators[0]]
        self._keep_moved(before)
        self.is_new, self.is_sure = False, not is_clean or not self._holders

    def is_returning(self, before: Moment) -> bool:
        """Return whether the first perturbed forward has moved what it should have met. Called right after it."""
        self._keep_moved(before)
        self.is_sure = True
        return bool(self._holders)

    def _keep_moved(self, before: Moment) -> None:
        before.keep_moved()
        self._holders = [holder for holder, _ in before.bindings]
        self._copied = [holder for holder, _ in before.copies]
        parameters = {id(module._parameters) for module in self._modules}
        self.moves_parameters = any(id(holder.owner) in parameters for holder in self._holders)


def generators_before(modules: Sequence[nn.Module], device: torch.device) -> Moment:
    """Return the states of all generators that a forward may draw from, to be asked later for those it has used."""
    return Moment([_torchs_generator(device), *_global_generators(), *_generators_of(modules)], [], [])


def _are_same(first: Any, second: Any) -> bool:
    """Return whether two states of a generator are the same."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, list | tuple):
        return all(map(_are_same, first, second))
    if isinstance(first, dict):
        return all(_are_same(value, second[name]) for name, value in first.items())
    return bool((first == second).all()) if hasattr(first, "all") else bool(first == second)


def _is_untrained(value: Any) -> bool:
    """Return whether a value is a tensor that a forward may move, and that can be copied and written to."""
    if not isinstance(value, Tensor) or is_lazy(value) or value.requires_grad or is_sharded(value):
        return False
    if getattr(value, _STILL, False):
        return False
    is_plain = value.layout == torch.strided and not (value.is_nested or value.is_meta or value.is_inference())
    return is_plain and not overlaps_itself(value)


def _holders_of(modules: Sequence[nn.Module]) -> Iterator[_Holder]:
    for module in modules:
        attributes = vars(module)
        yield _Holder(attributes)
        if any(_is_untrained(p) for p in module._parameters.values()):
            yield _Holder(module._parameters)
        # Those of torch's normalizations do not change what a forward in training mode returns.
        if module._buffers and not isinstance(module, _NormBase):
            yield _Holder(module._buffers)
        for name, value in attributes.items():
            if name in _NOT_STATE or "hooks" in name:
                continue
            if isinstance(value, list | dict | deque):
                yield _Holder(value)
            elif is_plain_object(value):
                yield _Holder(vars(value))


def is_plain_object(value: Any) -> bool:
    """Return whether a value is an object of the user's that may hold state, such as a memory bank."""
    is_foreign = _leads_outside(value) or type(value).__module__.partition(".")[0] in ("builtins", "torch")
    is_data = isinstance(value, torch.utils.data.Dataset | torch.utils.data.DataLoader)
    return hasattr(value, "__dict__") and not (is_foreign or is_data or isinstance(value, nn.Module | type))


def _leads_outside(value: Any) -> bool:
    """Return whether a value is Lightning's or this project's, such as the Trainer, and no part of the model."""
    return type(value).__module__.startswith("lightning")


def _torchs_generator(device: torch.device) -> _Generator:
    return _Generator(lambda: torch_random_state(device), lambda states: set_torch_random_state(states, device))


def _global_generators() -> Iterator[_Generator]:
    yield _Generator(random.getstate, random.setstate)
    # A program that has not imported NumPy does not draw from it.
    if (numpy := sys.modules.get("numpy")) is not None:
        yield _Generator(numpy.random.get_state, numpy.random.set_state)


def _generators_of(modules: Sequence[nn.Module]) -> Iterator[_Generator]:
    """Yield the generators that modules hold, also in containers and plain objects."""
    seen: set[int] = set()
    pending = [(value, 0) for module in modules for name, value in vars(module).items() if name not in _NOT_STATE]
    while pending:
        value, depth = pending.pop()
        if id(value) in seen or _leads_outside(value) or isinstance(value, nn.Module | Tensor | type):
            continue
        seen.add(id(value))
        if generator := _as_generator(value):
            yield generator
        elif depth < _DEPTH:
            pending += [(item, depth + 1) for item in _inside(value)]


def _as_generator(value: Any) -> _Generator | None:
    if isinstance(value, torch.Generator):
        return _Generator(value.get_state, value.set_state)
    if isinstance(value, random.Random):
        return _Generator(value.getstate, value.setstate)
    if type(value).__module__.startswith("numpy.random"):
        if isinstance(value, sys.modules["numpy"].random.RandomState):
            return _Generator(value.get_state, value.set_state)
        bits = getattr(value, "bit_generator", value)
        return _Generator(lambda: bits.state, partial(setattr, bits, "state"))
    return None


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, list | tuple | deque):
        return value
    return vars(value).values() if hasattr(value, "__dict__") else ()
