"""Which samples go through which clean forward pass."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ssesam._validation import bad_argument, check_radius
from lightning_ssesam.ascent import PLAIN, Ascent
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
        moved: The weights of the terms on the device of the losses, where they are there already. Passes over the whole
            part take them; None to move the weights in every pass.
    """

    sample_losses: SampleLosses
    terms: Sequence[Term]
    ignored: Tensor | None = None
    moved: Sequence[Tensor] | None = None


class Forward(NamedTuple):
    """One clean forward pass: indices ``(M,)`` of its samples (None for all), and their weights in each summand."""

    samples: Tensor | None
    shares: dict[int, Tensor]


Plan = list[list[Forward]]

# Passes over some samples are less efficient, and more of them are needed where summands share samples.
_LEAST_SAVING = 0.9


class Group(NamedTuple):
    """The terms of one summand of the gradient: their numbers, their radius and their ascent."""

    rho: float
    terms: list[int]
    ascent: Ascent = PLAIN


def group_terms(batch: Sequence[MicroBatch]) -> list[Group]:
    """Return the summands of the gradient: one of all terms of radius 0, and one of each perturbed term.

    Raises:
        ArgumentError: If there is no part or no term, a radius is out of range, or the parts' radii or ascents differ.
    """
    if not batch:
        raise bad_argument("batch", "at least one part", batch)
    if not batch[0].terms:
        raise bad_argument("terms", "at least one term", batch[0].terms)
    radii = [check_radius("rho", term.rho) for term in batch[0].terms]
    ascents = [term.ascent for term in batch[0].terms]
    for part in batch[1:]:
        if [term.rho for term in part.terms] != radii:
            raise bad_argument("batch", "parts with the same radii", got_text=f"{radii} and others")
        if [term.ascent for term in part.terms] != ascents:
            raise bad_argument("batch", "parts with the same ascents", got_text=f"{ascents} and others")
    plain = [number for number, rho in enumerate(radii) if rho == 0]
    perturbed = [Group(rho, [number], ascents[number]) for number, rho in enumerate(radii) if rho > 0]
    return [Group(0.0, plain), *perturbed] if plain else perturbed


def plain_ratio(batch: Sequence[MicroBatch], groups: Sequence[Group]) -> float | None:
    """Return the ratio between the weights of the terms of radius 0 and those of all perturbed terms together.

    If there is one, the gradient of the former is that multiple of the latter's gradients, and needs no backward pass.
    None if there is none, or the weights are not on the host.
    """
    if len(groups) < 2 or groups[0].rho > 0 or not all(g.ascent.direction.needs_gradient for g in groups):
        return None
    numbers = [number for group in groups[1:] for number in group.terms]
    ratio = None
    for part in batch:
        plain, perturbed = ([part.terms[i].weights for i in chosen] for chosen in (groups[0].terms, numbers))
        if any(w.device.type != "cpu" for w in (*plain, *perturbed)):
            return None
        if plain[0].numel() == 0:
            continue
        total, of_plain = sum_weights(perturbed).reshape(-1), sum_weights(plain).reshape(-1)
        # The first sample most often tells: where head and tail are apart, it belongs to one of them.
        a, b = float(of_plain[0]), float(total[0])
        if b == 0 and a == 0 and bool(total.any()):
            first = int(total.ne(0).byte().argmax())
            a, b = float(of_plain[first]), float(total[first])
        if b == 0 or ratio not in (None, a / b) or not torch.equal(b * of_plain, a * total):
            return None
        ratio = a / b
    return ratio


def sum_weights(weights: Sequence[Tensor]) -> Tensor:
    """Return the sample weights of several terms together."""
    return weights[0] if len(weights) == 1 else torch.stack(tuple(weights)).sum(0)


def plan_forwards(weights: Sequence[Tensor], are_perturbed: Sequence[bool], splits: bool) -> list[Forward]:
    """Return the clean forward passes of a part.

    Args:
        weights: Sample weights of each summand, ``(N, ...)``.
        are_perturbed: Whether each summand makes perturbed passes, which repeat its clean ones.
        splits: Whether to forward only the samples of a summand in its passes. Samples that the same summands weigh
            are forwarded together. If summands share samples, and it would save little, one pass forwards all.
    """
    whole = Forward(None, dict(enumerate(weights)))
    if not splits or len(weights) == 1 or weights[0].numel() == 0:
        return [whole]
    # One wait for the device for all summands together, and none if the weights are on the host.
    support = torch.stack([w.reshape(len(w), -1).ne(0).any(1) for w in weights]).cpu()
    used = [number for number, row in enumerate(support) if bool(row.any())]
    if bool((support.sum(0) == 1).all()):
        if len(used) == 1:
            return [Forward(None, {used[0]: weights[used[0]]})]
        sets = [([number], support[number]) for number in used]
    else:
        patterns, members = torch.unique(support, dim=1, return_inverse=True)
        sets = [(row.nonzero().flatten().tolist(), members == number) for number, row in enumerate(patterns.t())]
        everything = [(list(range(len(weights))), torch.ones_like(members, dtype=torch.bool))]
        is_many = len(sets) > len(weights) + 1
        if is_many or _cost(sets, are_perturbed) > _LEAST_SAVING * _cost(everything, are_perturbed):
            return [whole]
    indices = [(numbers, chosen.nonzero().flatten()) for numbers, chosen in sets]
    return [Forward(index, {n: rows(weights[n], index) for n in numbers}) for numbers, index in indices]


def _cost(sets: Sequence[tuple[list[int], Tensor]], are_perturbed: Sequence[bool]) -> int:
    """Return what passes over sets of samples cost, in forwards of a sample. A backward counts as two forwards."""
    passes = [1 + sum(5 if are_perturbed[number] else 2 for number in numbers) for numbers, _ in sets]
    return sum(int(chosen.sum()) * cost for cost, (_, chosen) in zip(passes, sets, strict=True))


def divides_batch(plan: Plan) -> bool:
    """Return whether each forward serves one summand with two samples or more, and not all are of whole parts."""
    forwards = [forward for forwards_of_part in plan for forward in forwards_of_part]
    sizes = [len(weights) for forward in forwards for weights in forward.shares.values()]
    serve_one = all(len(forward.shares) == 1 for forward in forwards)
    return serve_one and len(plan) < len(forwards) and min(sizes) > 1
