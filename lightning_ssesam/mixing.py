"""Whether a model mixes the samples of a batch, measured at a step."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_ssesam.forward_state import Moment
from lightning_ssesam.gradient_sum import GradientSum
from lightning_ssesam.plan import Forward, MicroBatch
from lightning_ssesam.snapshots import BufferSnapshot
from lightning_ssesam.tensors import rows

# Relative difference that is taken for rounding if a group is forwarded alone: in float64, and in other types.
_ROUNDING_OF_DOUBLE, _ROUNDING = 1e-6, 1e-2
_NOT_FINITE = "a loss is infinite or not a number"


class MixingMemory:
    """What is known of a model: whether it mixes samples, in each of its states (modes of modules, what is trained).

    Attributes:
        mark: The present state of the model.
        note: Why passes are full from now on, if the present step has found that out.
    """

    def __init__(self) -> None:
        self.mark = b""
        self.note: str | None = None
        self._mixes: dict[bytes, bool] = {}

    def passes(
        self, step: GradientSum, buffers: BufferSnapshot, modules: Iterable[nn.Module]
    ) -> Literal["full", "split"]:
        """Return the passes of ``"auto"``. Where they are not known, forward a part of the batch to find out."""
        if self.mark not in self._mixes:
            pairs = zip(step.batch, step.plan(splits=True), strict=True)
            part, groups = next((pair for pair in pairs if len(pair[1]) > 1), (None, []))
            if part is None or step.device.type == "meta":
                # There is nothing to compare.
                return "split"
            try:
                with torch.no_grad():
                    reason = _why_full(step, part, groups, buffers, modules)
            finally:
                step.start.restore()
                buffers.restore()
                # Autocast keeps the copies of weights that it has made without gradients.
                torch.clear_autocast_cache()
            if reason is _NOT_FINITE:
                # The next batch may tell.
                return "full"
            self._mixes[self.mark], self.note = reason is not None, reason
        return "full" if self._mixes[self.mark] else "split"

    def look_at(self, buffers: BufferSnapshot) -> None:
        """Note if a clean pass has changed a buffer of a model that was found not to mix samples."""
        if self._mixes.get(self.mark) is False and buffers.has_moved():
            self._mixes[self.mark], self.note = True, "a forward has changed a buffer"

    def forget_note(self) -> None:
        """Forget what a step has found out that failed: it may come of the fault."""
        if self.note is not None:
            self._mixes.pop(self.mark, None)
        self.note = None

    def take_note(self) -> str | None:
        """Return the note, and end the step."""
        note, self.note = self.note, None
        return note


def _why_full(
    step: GradientSum, part: MicroBatch, groups: list[Forward], buffers: BufferSnapshot, modules: Iterable[nn.Module]
) -> str | None:
    """Return why groups of samples cannot be forwarded apart; None if they can."""
    state = step.state
    try:
        losses = part.sample_losses(None, False)
    except Exception as error:
        return f"a forward outside of the clean pass fails ({error})"
    if state.is_new:
        state.learn(step.start, is_clean=False)
    if not isinstance(losses, Tensor) or losses.shape != part.terms[0].weights.shape:
        # The clean pass will say so.
        return None
    if buffers.differs():
        return "a forward changes buffers"
    if state.moves_parameters:
        return "a forward moves parameters that are not trained"
    if counts_batch(modules):
        return "an embedding with `scale_grad_by_freq` counts the whole batch"
    if not bool(losses.isfinite().all()):
        return _NOT_FINITE
    return why_not_apart(part, groups, losses, step.start)


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
