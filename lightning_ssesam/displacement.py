"""How an ascent moves the weights."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.after_sum import AfterSum, Combine
from lightning_ssesam.ascent import Ascent, Norms, State
from lightning_ssesam.ascent_states import AscentStates
from lightning_ssesam.gradient_sum import Summand
from lightning_ssesam.norms import ascend, gradient_norm, tensor_norms
from lightning_ssesam.plan import Group
from lightning_ssesam.tensors import Gradients, dense, local_part, quotient, wrapped
from lightning_ssesam.weights import Weights


@torch.no_grad()
def displace(ascent: Ascent, rho: float, weights: Weights, gradient: Gradients, state: State) -> State:
    r"""Move parameters in place by :math:`r \, T^2 d / \|T d\|`. Return the state of the direction.

    Args:
        ascent: The ascent.
        rho: Radius of the term.
        weights: The parameters that the ascent moves.
        gradient: Gradient of the term for each of them: the part of this process, dense.
        state: State that the direction has returned in the last perturbed step.
    """
    direction, new_state = ascent.direction.find(gradient, weights, state)
    factors = [None] * len(direction) if ascent.scale is None else ascent.scale.factors(weights)
    _check_shapes("direction", direction, weights)
    _check_shapes("scale", factors, weights)
    # Autocast keeps low-precision copies of the weights it has met, also for a clean pass without gradients.
    torch.clear_autocast_cache()
    scaled = [d if t is None or d is None else t * d for t, d in zip(factors, direction, strict=True)]
    if any(d is not None for d in scaled):
        lengths = _lengths(ascent, rho, weights, scaled)
        moves = [d if t is None or d is None else t * d for t, d in zip(factors, scaled, strict=True)]
        moved = [(p, e * r) for p, e, r in zip(weights.values, moves, lengths, strict=True) if e is not None]
        torch._foreach_add_([p for p, _ in moved], [e.to(p.dtype) for p, e in moved])
    return new_state


def _check_shapes(part: str, tensors: Sequence[Tensor | None], weights: Weights) -> None:
    """Refuse what a part of an ascent has returned, if it does not fit the parameters."""
    shapes = [None if t is None else t.shape for t in tensors]
    pairs = zip(shapes, weights.values, strict=False)
    if len(shapes) != len(weights.values) or any(shape not in (None, p.shape) for shape, p in pairs):
        expected = "one that returns a tensor of its shape, or None, for each parameter"
        raise bad_argument(part, expected, got_text=f"the shapes {[s and tuple(s) for s in shapes]}")


def _lengths(ascent: Ascent, rho: float, weights: Weights, scaled: Gradients) -> Sequence[Tensor]:
    """Return the factor of each parameter's T^2 d."""
    parameters = weights.parameters
    td = [None if d is None else wrapped(d, p) for d, p in zip(scaled, parameters, strict=True)]
    per_tensor = bool(getattr(ascent.radius, "per_tensor", False))
    norm = tensor_norms(parameters, td) if per_tensor else gradient_norm(parameters, td)
    radius: Any = rho
    if ascent.radius is not None:
        size = sum(p.numel() for p in parameters)
        radius = ascent.radius(Norms(norm, rho, size, lambda: gradient_norm(parameters, parameters)))
        if isinstance(radius, Tensor) and radius.shape not in (norm.shape, ()):
            expected = f"one that returns a tensor of the shape {tuple(norm.shape)} of `norms.direction`"
            raise bad_argument("radius", expected, got_text=f"the shape {tuple(radius.shape)}")
    length = quotient(radius, norm)
    return length.unbind() if per_tensor else [length] * len(parameters)


class Ascender:
    """Moves the weights of one step, term by term.

    Args:
        states: The states of the ascents.
        params: Parameters that are trained.
        find_weights: Finds their names and roles, which SAM's ascent does not need.
        keys: Key of each term, by which its state is kept, and that of what ``reuse`` adds.
        loss_scale: Factor of the gradients.
    """

    def __init__(
        self,
        states: AscentStates,
        params: list[Tensor],
        find_weights: Callable[[], Weights],
        keys: Sequence[str],
        loss_scale: Tensor | float,
    ) -> None:
        self._states, self._params, self._find_weights = states, params, find_weights
        (*self._keys, self._reused), self._loss_scale = keys, loss_scale

    @cached_property
    def weights(self) -> Weights:
        """All parameters that are trained."""
        return self._find_weights()

    @staticmethod
    def refuse_states(groups: Sequence[Group]) -> None:
        """Refuse ascents whose states would differ among the processes."""
        for group in groups:
            if group.rho > 0 and group.ascent.direction.keeps_state:
                got = f"'local' with {group.ascent.direction!r}, which would remember other gradients in each process"
                raise bad_argument("processes", "'global'", got_text=got)

    def ascend(self, summand: Summand) -> None:
        """Move the weights as the ascent of a summand says, given its gradient, which may be overwritten."""
        ascent = summand.ascent
        gradient = [None] * len(self._params) if summand.gradient is None else summand.gradient
        if ascent.is_plain:
            assert summand.norm is not None
            ascend(self._params, gradient, summand.norm, summand.rho)
            return
        key, indices = self._keys[summand.terms[0]], self.weights.indices(ascent.only)
        # What is drawn differs from term to term.
        moving = replace(self.weights.at(indices), seed=self.weights.seed + zlib.crc32(key.encode()))
        local = [None if (g := gradient[i]) is None else self._unscaled(dense(local_part(g))) for i in indices]
        state = displace(ascent, summand.rho, moving, local, self._states.get(key, moving))
        self._states.put(key, moving, state)

    def keep_difference(self, after: AfterSum) -> None:
        """Keep the part of the sum's gradient across the clean one, for updates that are not perturbed."""
        difference: Gradients = [None] * len(self._params)
        for number, tensor in zip(after.numbers, after.difference(), strict=True):
            difference[number] = self._unscaled(tensor)
        self._states.put(self._reused, self.weights, {"difference": difference})

    def reuse(self, after: AfterSum, alpha: float) -> None:
        """Add the difference that was kept."""
        difference = self._states.get(self._reused, self.weights)["difference"]
        after.reuse([difference[number] for number in after.numbers], alpha)

    def combine(self, after: AfterSum, function: Combine) -> None:
        """Let a function make the gradient for the optimizer, of gradients without the factor."""
        after.combine(function, self._loss_scale if self._is_scaled else None)

    def commit(self) -> None:
        """Let the states of the step count, unless the optimizer gets a gradient that a GradScaler refuses."""
        is_good = None
        if self._states.has_changed and isinstance(self._loss_scale, Tensor):
            is_good = gradient_norm(self._params, [p.grad for p in self._params]).isfinite()
        self._states.commit(is_good)

    @property
    def _is_scaled(self) -> bool:
        return isinstance(self._loss_scale, Tensor) or self._loss_scale != 1

    def _unscaled(self, gradient: Tensor) -> Tensor:
        return gradient / self._loss_scale if self._is_scaled else gradient
