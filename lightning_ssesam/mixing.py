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


@torch.no_grad()
def samples_mix(part: MicroBatch, groups: list[Forward], losses: Tensor, met: Moment) -> bool:
    """Return whether the losses of some samples depend on others, by forwarding a part of the batch once more.

    The samples of one group stay where they are. Copies of them take the places of all others. Shape, weights and
    random numbers are the same, so the losses of the group are the same to the last bit, unless samples mix or the
    forward depends on what the first one has moved. This cannot show a dependence on the number of samples alone.
    Where a forward draws no random numbers, the group is therefore forwarded alone as well.

    Args:
        part: A part of the batch that has been forwarded.
        groups: The forwards of its groups, at least two.
        losses: The losses ``(N, ...)`` of that forward.
        met: What that forward met. Only the generators are put back.
    """
    samples = min((group.samples for group in groups if group.samples is not None), key=len)
    index = samples[torch.arange(len(losses)) % len(samples)]
    index[samples] = samples
    expected, draws = rows(losses, samples), bool(met.used_generators())
    met.restore_generators()
    if not _same_bits(rows(part.sample_losses(index, False), samples), expected):
        return True
    if draws:
        return False
    alone = part.sample_losses(samples, False)
    tolerance = _ROUNDING_OF_DOUBLE if losses.dtype == torch.float64 else _ROUNDING
    size = float(expected.abs().max())
    return not torch.allclose(alone, expected, rtol=tolerance, atol=tolerance * size, equal_nan=True)


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return bool(((first == second) | (first.isnan() & second.isnan())).all())
