"""What ascents keep from step to step, and how it goes into checkpoints."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ssesam.after_sum import REUSED
from lightning_ssesam.ascent import State
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.tensors import Gradients, sharded_like, whole
from lightning_ssesam.terms import Objective, Term
from lightning_ssesam.weights import Weights


def keys_of(terms: Sequence[Term], objective: Objective | None) -> list[str]:
    """Return the key of each term: its name, or its number if the objective has another number of names."""
    names, prefix = ((), "") if objective is None else (objective.term_names, objective.state_prefix)
    names = names if len(names) == len(terms) else tuple(map(str, range(len(terms))))
    return [f"{prefix}{name}" for name in names]


def key_of_reuse(objective: Objective | None) -> str:
    """Return the key of what perturbed updates leave for those between them (LookSAM)."""
    return f"{'' if objective is None else objective.state_prefix}{REUSED}"


class AscentStates:
    """The states of ascents, by the key of their term. What a step changes counts when it is committed.

    In a checkpoint, a list with a tensor for each parameter is a mapping by the parameters' names, so that a model may
    freeze or thaw parameters between steps.
    """

    def __init__(self) -> None:
        self._states: dict[str, tuple[Weights | None, State]] = {}
        self._pending: dict[str, tuple[Weights | None, State]] = {}

    def get(self, key: str, weights: Weights) -> State:
        """Return the state of a term, with lists in the order of the parameters; empty if there is none."""
        owner, state = self._states.get(key, (None, {}))
        # A parameter may have been replaced by one of the same name.
        if owner is not None and list(map(id, owner.parameters)) == list(map(id, weights.parameters)):
            return state
        return {name: _aligned(value, owner, weights) for name, value in state.items()}

    def put(self, key: str, weights: Weights, state: State) -> None:
        """Keep a state for when the step is done.

        Args:
            key: Key of the term.
            weights: The parameters that its lists belong to.
            state: The state.
        """
        if state or key in self._states:
            self._pending[key] = weights, state

    @property
    def has_changed(self) -> bool:
        """Whether the step has changed a state."""
        return bool(self._pending)

    def commit(self, is_good: Tensor | None = None) -> None:
        """Let what the step has changed count.

        Args:
            is_good: Whether it counts, a scalar on the device; None if it does. If not, the states before stay.
        """
        for key, (weights, state) in self._pending.items():
            if is_good is not None and weights is not None:
                state = _where(is_good, state, self.get(key, weights))
            self._states[key] = weights, state
        self._pending = {}

    def copy(self) -> "AscentStates":
        """Return the states as they are now. No step changes them."""
        copy = AscentStates()
        copy._states = dict(self._states)
        return copy

    @property
    def held(self) -> dict[str, State]:
        """The states by key. To replace a tensor in one of them replaces it in every copy of these states."""
        return {key: state for key, (_, state) in self._states.items()}

    def hold(self, held: Mapping[str, State]) -> None:
        """Replace the states of some keys, each of which there is one of already."""
        self._states |= {key: (self._states[key][0], state) for key, state in held.items()}

    def become(self, other: "AscentStates") -> None:
        """Take the states of another one."""
        self._states, self._pending = dict(other._states), {}

    def forget(self) -> None:
        """Forget what the step has changed and not committed."""
        self._pending = {}

    def __contains__(self, key: str) -> bool:
        return key in self._states

    def state_dict(self) -> dict[str, Any]:
        """Return all states: tensors, numbers, and mappings from the names of parameters to whole tensors.

        All processes must call it if parameters are sharded.
        """
        return {
            key: {name: value if weights is None else _by_name(value, weights) for name, value in state.items()}
            for key, (weights, state) in self._states.items()
        }

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        if not isinstance(states, Mapping) or not all(isinstance(state, Mapping) for state in states.values()):
            raise ArgumentError(f"Expected the states of ascents to be a mapping of mappings, but got {states!r:.80}.")
        self._states, self._pending = {key: (None, dict(state)) for key, state in states.items()}, {}


def _by_name(value: Any, weights: Weights) -> Any:
    if not isinstance(value, list):
        return value
    named = zip(weights.names, value, weights.parameters, strict=True)
    return {name: whole(t, p) for name, t, p in named if t is not None}


def _aligned(value: Any, owner: Weights | None, weights: Weights) -> Any:
    """Return a value of a state, with a list in the order of the parameters.

    The list may be one of other parameters, its owner's, or a mapping of a checkpoint, which has no owner.
    """
    if owner is None and isinstance(value, Tensor):
        return value.to(weights.device)
    if not isinstance(value, Mapping if owner is None else list):
        return value
    if owner is not None:
        value = dict(zip(owner.names, value, strict=True))
    aligned: Gradients = []
    for name, p, own in zip(weights.names, weights.parameters, weights.values, strict=True):
        tensor = value.get(name)
        if tensor is not None and owner is None:
            tensor = sharded_like(tensor, p) if tensor.shape == p.shape else None
        is_same = tensor is not None and tensor.shape == own.shape
        aligned.append(tensor.to(own.device) if is_same else None)
    return aligned


def _where(is_good: Tensor, new: State, old: State) -> State:
    """Return the new state or the old one, in which what is not there counts as 0. Does not wait for the device."""

    def choose(new: Any, old: Any) -> Any:
        if isinstance(new, list):
            return [choose(a, b) for a, b in zip(new, old or [None] * len(new), strict=True)]
        if not isinstance(new, Tensor):
            return new
        return torch.where(is_good, new, torch.zeros_like(new) if old is None else old)

    return {name: choose(value, old.get(name)) for name, value in new.items()}
