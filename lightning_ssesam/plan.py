"""Which samples go through which clean forward pass."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ssesam._validation import bad_argument, check_radius
from lightning_ssesam.objectives import Term
from lightning_ssesam.tensors import rows

SampleLosses = Callable[[Tensor | None, bool], Tensor]


class MicroBatch(NamedTuple):
    """A part of the batch that is forwarded at once. Usually it is the whole batch.

    Args:
        sample_losses: Called as ``sample_losses(index, is_clean)``. Returns the unreduced losses, ``(N,)`` or dense
            ``(N, ...)``. With an index ``(M,)``, a tensor on the CPU, it returns the losses of these samples; with
            None those of the whole part. ``is_clean`` is True in the one clean pass of each sample, which counts for
            logs and metrics.
        terms: The objective's terms, each with weights of the shape of this part's losses. Every part of a batch has
            the same number of terms, with the same radii.
        ignored: Mask of the losses, ``(N, ...)``, that are not part of the mean loss; None for none.
    """

    sample_losses: SampleLosses
    terms: Sequence[Term]
    ignored: Tensor | None = None


class Forward(NamedTuple):
    """One clean forward pass: indices ``(M,)`` of its samples (None for all), and their weights in each summand."""

    samples: Tensor | None
    shares: dict[int, Tensor]


Plan = list[list[Forward]]


def group_terms(batch: Sequence[MicroBatch]) -> list[tuple[float, list[int]]]:
    """Return the radius of each summand of the gradient, and the numbers of its terms.

    The terms of radius 0 make one summand, and each perturbed term one.

    Raises:
        ArgumentError: If there is no part or no term, a radius is out of range, or the parts' radii differ.
    """
    if not batch:
        raise bad_argument("batch", "at least one part", batch)
    if not batch[0].terms:
        raise bad_argument("terms", "at least one term", batch[0].terms)
    radii = [check_radius("rho", term.rho) for term in batch[0].terms]
    for part in batch[1:]:
        if [term.rho for term in part.terms] != radii:
            raise bad_argument("batch", "parts with the same radii", got_text=f"{radii} and others")
    plain = [number for number, rho in enumerate(radii) if rho == 0]
    perturbed = [(rho, [number]) for number, rho in enumerate(radii) if rho > 0]
    return [(0.0, plain), *perturbed] if plain else perturbed


def plan_forwards(weights: Sequence[Tensor], splits: bool) -> list[Forward]:
    """Return the clean forward passes of a part.

    Args:
        weights: Sample weights of each summand, ``(N, ...)``.
        splits: Whether to forward the samples of each summand by themselves. That is possible if each sample has
            weight in exactly one summand; otherwise one pass forwards the whole part.
    """
    whole = Forward(None, dict(enumerate(weights)))
    if not splits or len(weights) == 1 or weights[0].numel() == 0:
        return [whole]
    # One wait for the device for all summands together, and none if the weights are on the host.
    support = torch.stack([w.reshape(len(w), -1).ne(0).any(1) for w in weights]).cpu()
    used = [number for number, row in enumerate(support) if bool(row.any())]
    if bool((support.sum(0) != 1).any()):
        # A sample that several terms weigh (MixUp), or none, must still be logged exactly once.
        return [whole]
    if len(used) == 1:
        return [Forward(None, {used[0]: weights[used[0]]})]
    indices = {number: support[number].nonzero().flatten() for number in used}
    return [Forward(index, {number: rows(weights[number], index)}) for number, index in indices.items()]


def divides_batch(plan: Plan) -> bool:
    """Return whether each forward serves one summand with two samples or more, and not all are of whole parts."""
    forwards = [forward for forwards_of_part in plan for forward in forwards_of_part]
    sizes = [len(weights) for forward in forwards for weights in forward.shares.values()]
    return len(plan) < len(forwards) == len(sizes) and min(sizes) > 1
