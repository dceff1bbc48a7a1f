"""The gradient of a step while it is being summed: its summands, and the clean passes that begin them."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ssesam.ascent import PLAIN, Ascent
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.forward_state import ForwardState, Moment
from lightning_ssesam.layers import Buffers
from lightning_ssesam.norms import gradient_norm
from lightning_ssesam.plan import (
    Forward,
    Group,
    MicroBatch,
    Plan,
    SampleLosses,
    plain_ratio,
    plan_forwards,
    sum_weights,
)
from lightning_ssesam.snapshots import BufferSnapshot
from lightning_ssesam.targets import at_least_one, sum_counted
from lightning_ssesam.tensors import Gradients, dtype_of_sums, gradients_of, is_sharded, move, set_gradients


class Outcome(NamedTuple):
    """Results of one step, as detached scalars on the model's device.

    Args:
        loss: Mean loss of the batch at the unperturbed weights; 0 for an empty batch.
        gradient_norm: Norm of the final gradient, if asked for.
        gradient_norms: Norm of each term's gradient at the unperturbed weights. With ``processes="global"`` it is that
            of all processes together. None if it was not needed, or if the term shares its backward pass.
        sharpness: Loss of each term at the ascended weights minus its loss at the unperturbed ones, in this process.
            None for a term of radius 0.
        is_difference: Whether the passes were those of ``"difference"``.
        note: With ``passes="auto"``, why passes are full from this step on, if this step has found that out.
    """

    loss: Tensor
    gradient_norm: Tensor | None = None
    gradient_norms: Sequence[Tensor | None] = ()
    sharpness: Sequence[Tensor | None] = ()
    is_difference: bool = False
    note: str | None = None


@dataclass(frozen=True)
class CleanPass:
    """A clean pass as a perturbed one has to repeat it: which samples, their weights, what the forward met."""

    sample_losses: SampleLosses
    samples: Tensor | None
    weights: Tensor
    met: Moment


@dataclass(eq=False)
class Summand:
    """Running state of one summand of the gradient: one perturbed term, or all unperturbed terms together."""

    rho: float
    terms: list[int]
    ascent: Ascent = PLAIN
    # Whether clean passes find its gradient.
    needs_gradient: bool = True
    # Whether its clean passes are at the ascended weights, and no others follow.
    is_displaced: bool = False
    passes: list[CleanPass] = field(default_factory=list)
    gradient: Gradients | None = None
    norm: Tensor | None = None
    sharpness: Tensor | float = 0.0

    @property
    def is_perturbed(self) -> bool:
        """Whether perturbed passes follow its clean ones."""
        return self.rho > 0 and not self.is_displaced

    def weights(self, part: MicroBatch, splits: bool) -> Tensor:
        """Return the sample weights of this summand in one part of the batch."""
        if splits or part.moved is None:
            return sum_weights([part.terms[number].weights for number in self.terms])
        return sum_weights([part.moved[number] for number in self.terms])

    @torch.no_grad()
    def subtract(self, other: "Summand") -> None:
        """Subtract the gradient of another summand from this one's."""
        assert self.gradient is not None
        for number, subtrahend in enumerate(other.gradient or []):
            if subtrahend is not None:
                minuend = self.gradient[number]
                self.gradient[number] = -subtrahend if minuend is None else minuend.sub_(subtrahend)


@dataclass(eq=False)
class GradientSum:
    """The gradient of one step, made of summands whose gradients take turns in the parameters' ``.grad``.

    ``params`` require a gradient, and only clean passes may move ``buffers`` and ``state``. See
    :meth:`SharpnessEngine.compute`.
    """

    batch: Sequence[MicroBatch]
    params: list[Tensor]
    buffers: list[Buffers]
    backward: Callable[..., None]
    summands: list[Summand]
    synchronize: Callable[[], None] | None
    state: ForwardState
    start: Moment
    clean_buffers: BufferSnapshot
    is_difference: bool = False
    plain_ratio: float | None = None
    keeps_clean: bool = False
    # At the unperturbed weights: those of all processes together, and those of this process.
    clean: tuple[Gradients, Gradients] | None = None
    _has_begun: bool = False
    _holder: Summand | None = None

    @property
    def is_perturbed(self) -> bool:
        """Whether perturbed passes follow."""
        return self.is_difference or any(summand.is_perturbed for summand in self.summands)

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return self.params[0].device

    def plain_terms(self) -> list[int]:
        """Return the numbers of the terms of radius 0."""
        return [number for number, term in enumerate(self.batch[0].terms) if term.rho == 0]

    def total(self, summands: Sequence[Summand], factor: float = 1.0) -> Gradients:
        """Return a multiple of the sum of summands' gradients at the unperturbed weights, in new memory."""
        gradients = [] if factor == 0 else [s.gradient for s in summands if s.gradient is not None]
        return sum_gradients(gradients, factor, len(self.params))

    def keep_clean(self, perturbed: Sequence[Summand]) -> None:
        """Keep the gradient at the unperturbed weights: that of perturbed summands and what ``.grad`` holds."""
        found, here = [self.total(perturbed)], [gradients_of(self.params)]
        # The gradients of perturbed summands are synchronized if anything is.
        if self.synchronize is None:
            found, here = [], [*found, *here]
        size = len(self.params)
        self.clean = sum_gradients(found, 1.0, size), sum_gradients(here, 1.0, size)

    def clean_gradient(self, synchronize: Callable[[Gradients], Gradients]) -> Gradients:
        """Return the gradient at the unperturbed weights, that of all processes together."""
        assert self.clean is not None
        everywhere, here = self.clean
        # Decided by what is the same in every process.
        if self.synchronize is None or self.is_difference or self.plain_terms():
            here = synchronize(here)
        pairs = zip(everywhere, here, strict=True)
        return [a if b is None else (b if a is None else a + b) for a, b in pairs]

    def plan(self, splits: bool) -> Plan:
        """Return the clean forward passes of every part of the batch."""
        are_perturbed = [summand.is_perturbed for summand in self.summands]
        weights = ([summand.weights(part, splits) for summand in self.summands] for part in self.batch)
        return [plan_forwards(weights_of_part, are_perturbed, splits) for weights_of_part in weights]

    def hold(self, summand: Summand | None) -> None:
        """Let the parameters' ``.grad`` be the gradient of this summand, and keep that of the one before.

        Without a holder every ``.grad`` is None.
        """
        if summand is self._holder:
            return
        gradient = None if summand is None else summand.gradient
        if self._holder is not None:
            self._holder.gradient = _owned(gradients_of(self.params))
        if self._holder is not None or gradient is not None:
            set_gradients(self.params, gradient)
        if summand is not None:
            summand.gradient = None
        self._holder = summand

    def clean_passes(self, plan: Plan, repeats: bool = False) -> Tensor:
        """Run passes at the unperturbed weights, which leave each summand its gradient there. Return the mean loss.

        Args:
            plan: Forward passes of every part of the batch.
            repeats: Whether the samples have had their clean pass before. These passes then leave only gradients.
        """
        pairs = [(part, forward) for part, forwards in zip(self.batch, plan, strict=True) for forward in forwards]
        sums: list[Tensor] = []
        count: Tensor | int = 0
        for part, forward in pairs:
            losses = self._clean_pass(part, forward, repeats, is_last=len(sums) == len(pairs) - 1)
            total, counted = sum_counted(losses, part.ignored, forward.samples)
            sums.append(total)
            count = count + counted
        return (sums[0] if len(sums) == 1 else torch.stack(sums).sum()) / at_least_one(count)

    def _clean_pass(self, part: MicroBatch, forward: Forward, repeats: bool, is_last: bool) -> Tensor:
        """Run one forward pass and its backward passes. Return its losses."""
        samples, shares = forward
        met = self.state.moment() if self._has_begun else self.start
        self._has_begun = True
        backwards = sum(self.summands[number].needs_gradient for number in shares)
        with nullcontext() if backwards else torch.no_grad():
            losses = part.sample_losses(samples, not repeats)
        is_perturbed = self.is_perturbed
        if self.state.is_new and is_perturbed:
            self.state.learn(met, is_clean=True)
        # A backward pass may forward again (activation checkpointing), and move buffers once more.
        checks = not repeats and is_perturbed and self.state.backward_moves is not False
        if not repeats and is_perturbed and (is_last or checks):
            self.clean_buffers.save_buffers(self.buffers)
        for number, weights in shares.items():
            summand = self.summands[number]
            loss = weighted_sum(losses, weights)
            if summand.needs_gradient:
                backwards -= 1
                self.hold(summand)
                self.backward(loss, retain_graph=backwards > 0)
            if summand.is_perturbed:
                summand.sharpness = summand.sharpness - loss.detach()
                summand.passes.append(CleanPass(part.sample_losses, samples, weights, met))
        if checks and self.state.backward_moves is None:
            self.state.backward_moves = self.clean_buffers.differs()
        if repeats or (checks and self.state.backward_moves):
            self.clean_buffers.restore()
        return losses.detach()

    def find_norm(self, summand: Summand) -> None:
        """Find the norm of a summand's direction, that of all processes if they share the perturbation."""
        if not summand.needs_gradient:
            return
        if self.synchronize is not None:
            self.hold(summand)
            self.synchronize()
        self.hold(None)
        summand.norm = gradient_norm(self.params, summand.gradient or [])


def weighted_sum(losses: Tensor, weights: Tensor) -> Tensor:
    """Return the loss of a summand, given the losses and the weights of the samples, both ``(N, ...)``."""
    if not isinstance(losses, Tensor) or losses.shape != weights.shape:
        got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else repr(losses)
        raise ArgumentError(
            "Expected `sample_losses` to return one unreduced loss for each target, a tensor of shape"
            f" {tuple(weights.shape)} (reduction='none'), but got {got}."
        )
    weights = weights.to(dtype_of_sums(losses.dtype))
    return (move(weights, losses.device) * losses).sum()


def sum_gradients(gradients: Sequence[Gradients], factor: float, size: int) -> Gradients:
    """Return the sum of several gradients of so many parameters times a factor, in new memory."""
    if not gradients:
        return [None] * size
    total: Gradients = []
    for tensors in zip(*gradients, strict=True):
        given = [factor * t for t in tensors if t is not None]
        total.append(sum(given[1:], start=given[0]) if given else None)
    return total


def _owned(gradients: Gradients) -> Gradients:
    # A view into a larger buffer (DDP's buckets) is overwritten by the next backward pass.
    return [g if g is None or g.is_sparse or g.untyped_storage().nbytes() == g.nbytes else g.clone() for g in gradients]


def make_summands(
    batch: Sequence[MicroBatch], groups: list[Group], passes: str, keeps_clean: bool, params: list[Tensor]
) -> tuple[list[Summand], float | None]:
    """Return the summands that need passes, and the ratio by which the plain one follows from the others, if any.

    The ratio depends on the samples of this process. With sharded parameters, all processes must make the same passes.
    """
    ratio = plain_ratio(batch, groups)
    if ratio is not None and any(map(is_sharded, params)):
        ratio = None
    wants_all = keeps_clean or passes == "difference"
    summands = [
        Summand(group.rho, group.terms, group.ascent, group.ascent.direction.needs_gradient or wants_all)
        for group in (groups if ratio is None else groups[1:])
    ]
    if len(groups) == 1 and groups[0].rho > 0 and not (keeps_clean or groups[0].ascent.direction.needs_gradient):
        # Nobody needs a pass at the unperturbed weights.
        summands[0].is_displaced = summands[0].needs_gradient = True
    return summands, ratio


def outcome_of(step: GradientSum, loss: Tensor, norm: Tensor | None) -> Outcome:
    """Return the results of a step."""
    number_of_terms = len(step.batch[0].terms)
    norms: list[Tensor | None] = [None] * number_of_terms
    sharpness: list[Tensor | None] = [None] * number_of_terms
    for summand in step.summands:
        if len(summand.terms) == 1:
            norms[summand.terms[0]] = summand.norm
        if summand.is_perturbed:
            sharpness[summand.terms[0]] = loss.new_zeros(()) + summand.sharpness
    return Outcome(loss, norm, norms, sharpness, step.is_difference)
