"""Whether a model mixes the samples of a batch, measured at a step."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_ssesam.forward_state import Moment
from lightning_ssesam.plan import Forward, MicroBatch
from lightning_ssesam.tensors import rows

# Relative difference that is taken for rounding if a group is forwarded alone: in float64, and in other types.
_ROUNDING_OF_DOUBLE, _ROUNDING = 1e-6, 1e-2


def counts_batch(modules: Iterable[nn.Module]) -> bool:
    """Return whether the backward of a layer depends on the whole batch, although its forward does not."""
    embeddings = (layer for layer in modules if isinstance(layer, nn.Embedding | nn.EmbeddingBag))
    return any(layer.scale_grad_by_freq for layer in embeddings)


def why_not_apart(part: MicroBatch, groups: list[Forward], losses: Tensor, met: Moment) -> str | None:
    """Return why groups of samples cannot be forwarded apart, after forwarding a part of the batch again; else None.

    For each group, its samples stay where they are, and copies of them take the places of all others. Shape, weights
    and random numbers are the same, so the losses of the group are the same to the last bit, unless samples mix or the
    forward depends on what the first one has moved. This cannot show a dependence on the number of samples alone.
    Where a forward draws no random numbers, the group is therefore forwarded alone as well.

    Args:
        part: A part of the batch that has been forwarded.
        groups: The forwards of its groups, at least two, each with its samples.
        losses: The losses ``(N, ...)`` of that forward, all finite.
        met: What that forward met. Only the generators are put back.
    """
    draws = bool(met.used_generators())
    for group in groups:
        samples = group.samples
        assert samples is not None
        expected = rows(losses, samples)
        index = samples[torch.arange(len(losses)) % len(samples)]
        index[samples] = samples
        met.restore_generators()
        try:
            among_copies = part.sample_losses(index, False)
            alone = None if draws else part.sample_losses(samples, False)
        except Exception as error:
            # The whole batch has just been forwarded, so this comes of picking samples.
            return f"samples cannot be picked from the batch ({error})"
        if not torch.equal(rows(among_copies, samples), expected):
            return "the loss of a sample depends on the other samples of the batch"
        if alone is not None and not _same_up_to_rounding(alone, expected):
            return "the loss of a sample depends on the number of samples in the batch"
    return None


def _same_up_to_rounding(alone: Tensor, expected: Tensor) -> bool:
    tolerance = _ROUNDING_OF_DOUBLE if expected.dtype == torch.float64 else _ROUNDING
    return torch.allclose(alone, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
