"""Terms to gradient, in the fewest passes over the model. Needs torch only."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_ssesam._validation import Phrase, bad_argument, check_choice, check_radius
from lightning_ssesam.objectives import Term
from lightning_ssesam.snapshots import (
    Buffers,
    BufferSnapshot,
    Snapshot,
    set_torch_random_state,
    torch_random_state,
)

SampleLosses = Callable[[Tensor | None, bool], Tensor]
Gradients = list[Tensor | None]


class MicroBatch(NamedTuple):
    """A part of the batch that is forwarded at once; most often all of it.

    Args:
        sample_losses: Called as ``sample_losses(index, perturbed)``. Returns the unreduced losses, ``(N,)`` or dense
            ``(N, ...)``, of the whole part where ``index`` is None, else of its samples ``index`` ``(M,)``.
        terms: The objective's terms, each with weights of the shape of this part's losses. Every part of a batch has
            the same number of terms, with the same radii.

    """

    sample_losses: SampleLosses
    terms: Sequence[Term]


class Outcome(NamedTuple):
    """What a step has found out, as detached scalars on the model's device.

    Args:
        loss: Mean loss of the batch at the unperturbed weights; 0 for an empty batch.
        gradient_norm: Norm of the gradient that it leaves, if asked for.
        gradient_norms: Of each term, the norm of its gradient at the unperturbed weights, of all processes together
            where they ascend together; None where it was not needed, or the term shares its backward with others.
        sharpness: Of each term, its loss at the ascended weights minus its loss at the unperturbed ones, in this
            process; None for a term of radius 0.

    """

    loss: Tensor
    gradient_norm: Tensor | None = None
    gradient_norms: Sequence[Tensor | None] = ()
    sharpness: Sequence[Tensor | None] = ()


class NonFiniteError(FloatingPointError):
    """The loss or the gradient of a step is infinite or not a number.

    Args:
        message: What to say.
        loss: The mean loss of the step, a detached scalar.

    """

    def __init__(self, message: str, loss: Tensor) -> None:
        super().__init__(message)
        self.loss = loss


class SharpnessEngine:
    r"""Leaves in ``.grad`` the sum over an objective's terms of the gradients at their ascended weights.

    A term :math:`(a, \rho)` contributes the gradient of :math:`L_a(w) = \sum_i a_i l_i(w)` taken at
    :math:`w + \rho \, g / \|g\|`, where :math:`g = \nabla L_a(w)` and the norm runs over all trainable parameters
    together (Foret et al., ICLR 2021, eq. 2 and 3, without their second-order term); at :math:`w` where either is 0.

    Terms of radius 0 share one clean backward. A term of positive radius costs a clean backward, and a forward and a
    backward at its ascended weights, which draw the random numbers (dropout) of the clean pass they belong to.
    Buffers, such as batch norm's statistics, keep what the clean pass left in them. If a pass raises, weights,
    buffers, gradients and random state are those from before the call again.

    Scratch memory is kept from call to call: one copy of the parameters and two of the buffers. It is never saved.
    """

    def __init__(self) -> None:
        self.release()

    def restored(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a state dictionary with the weights and buffers of before the step, if one is under way.

        For checkpoints that are written in the middle of a pass, by the handler of a signal say.
        """
        saved = {**self._buffers.copies(), **self._weights.copies()}
        if not saved:
            return state
        return {
            name: saved.get((value.data_ptr(), value.shape), value)
            if isinstance(value, Tensor) and not _is_sharded(value)
            else value
            for name, value in state.items()
        }

    def release(self) -> None:
        """Free the scratch memory."""
        self._weights = Snapshot()
        self._buffers = BufferSnapshot()
        self._clean_buffers = BufferSnapshot()
        self._forward_moves_buffers: bool | None = None

    def __getstate__(self) -> dict[str, Any]:
        return SharpnessEngine().__dict__

    def compute(
        self,
        batch: Sequence[MicroBatch],
        parameters: Iterable[Tensor],
        buffers: Iterable[Buffers] = (),
        backward: Callable[..., None] = Tensor.backward,
        passes: Literal["auto", "full", "split"] = "full",
        synchronize: Callable[[], None] | None = None,
        ascent: Literal["global", "local"] = "global",
        check_finite: Callable[[bool], bool] | None = None,
        report: bool = False,
    ) -> Outcome:
        """Run the passes of one step.

        Args:
            batch: The parts of the batch. All of them are forwarded at the unperturbed weights before the first
                perturbed pass, and the result is that of their union (for layers that do not mix samples); in memory
                are the activations of one part at a time.
            parameters: The model's parameters. Those that do not require a gradient are left alone.
            buffers: The dictionaries in which the model's layers keep their buffers.
            backward: Called as ``backward(loss, retain_graph=bool)``; accumulates into ``.grad``.
            passes: ``"full"`` forwards a whole part in every pass, which is exact for every model. ``"split"``
                forwards only the samples of each term, where the terms divide the batch among them; the same to
                rounding if no layer mixes samples. ``"auto"`` is ``"split"``, unless a first step with full passes
                shows that a forward changes buffers.
            synchronize: Replaces the ``.grad`` of the parameters by their sum (or mean) over several processes.
                Called equally often in each: once at the end, and before that once per term of positive radius.
            ascent: ``"local"`` leaves out the latter, so that each process perturbs for its own samples.
            check_finite: Called at the end with whether the loss and the gradient are finite; returns whether they
                are in every process.
            report: Whether to find the norm of the final gradient, and of the terms of radius 0, too; of the latter
                not with ``synchronize``, which leaves them out.

        Returns:
            The mean loss, gradient norms and sharpness.

        Raises:
            ValueError: If ``passes`` or a radius is out of range, or the losses do not have the shape of the weights.
            NonFiniteError: If ``check_finite`` returns False.

        """
        check_choice("passes", passes, ("auto", "full", "split"))
        check_choice("ascent", ascent, ("global", "local"))
        summands, buffers = _summands(batch), list(buffers)
        params = [p for p in parameters if p.requires_grad]
        if not params:
            raise bad_argument("parameters", "at least one that requires a gradient", Phrase("none"))
        model = _Model(params, backward, params[0].device)
        gradients, random_state = _gradients(params), torch_random_state(model.device)
        self._buffers.save(buffers)
        try:
            _set_gradients(params, None)
            loss = _clean_passes(model, batch, summands, split=self._splits(passes))
            if passes == "auto" and self._forward_moves_buffers is None:
                self._forward_moves_buffers = self._buffers.differs()
            if synchronize is not None and ascent == "global":
                _synchronize_directions(params, summands, synchronize)
            self._perturbed_passes(model, summands, buffers, report and synchronize is None)
            if synchronize is not None:
                synchronize()
            norm = _norm(params, _gradients(params)) if report or check_finite else None
            if check_finite is not None and not check_finite(_are_finite(loss, norm)):
                raise NonFiniteError("The loss or the gradient is infinite or not a number.", loss)
        except BaseException:
            self._weights.restore()
            self._buffers.restore()
            _set_gradients(params, gradients)
            set_torch_random_state(random_state, model.device)
            raise
        finally:
            self._weights.forget()
            self._buffers.forget()
            self._clean_buffers.forget()
        return _outcome(loss, norm, summands)

    def _splits(self, passes: Literal["auto", "full", "split"]) -> bool:
        if passes == "auto":
            return not self._buffers.any() or self._forward_moves_buffers is False
        return passes == "split"

    def _perturbed_passes(
        self, model: "_Model", summands: list["_Summand"], buffers: list[Buffers], report: bool
    ) -> None:
        """Leave in ``.grad`` the sum of the summands' gradients."""
        for summand in summands:
            if summand.rho == 0:
                _set_gradients(model.params, summand.gradient)
            if summand.rho > 0 or report:
                summand.norm = _norm(model.params, summand.gradient)
        if not any(summand.rho > 0 for summand in summands):
            return
        random_state = torch_random_state(model.device)
        self._clean_buffers.save(buffers)
        self._weights.save([_local(p) for p in model.params])
        for summand in summands:
            if summand.rho == 0 or not summand.passes:
                continue
            _ascend(model.params, summand)
            # The direction is not needed any more; the passes need its memory.
            summand.gradient = None
            for one in summand.passes:
                set_torch_random_state(one.random_state, model.device)
                loss = _weighted_sum(one.sample_losses(one.index, True), one.weights)
                model.backward(loss, retain_graph=False)
                summand.sharpness = summand.sharpness + loss.detach()
                self._clean_buffers.restore()
            self._weights.restore()
        set_torch_random_state(random_state, model.device)


@dataclass
class _Model:
    """What the passes run on."""

    params: list[Tensor]
    backward: Callable[..., None]
    device: torch.device


@dataclass(frozen=True)
class _Pass:
    """A clean forward, as a perturbed one must repeat it: the whole part where ``index`` is None."""

    sample_losses: SampleLosses
    index: Tensor | None
    weights: Tensor
    random_state: list[Tensor]


@dataclass
class _Summand:
    """A term of positive radius, or all terms of radius 0 together, and what is known of it so far."""

    rho: float
    terms: list[int]
    passes: list[_Pass] = field(default_factory=list)
    gradient: Gradients | None = None
    norm: Tensor | None = None
    sharpness: Tensor | float = 0.0

    def weights(self, terms: Sequence[Term]) -> Tensor:
        """Return the sample weights of this summand, given the terms of one part of the batch."""
        own = [terms[number].weights for number in self.terms]
        return own[0] if len(own) == 1 else torch.stack(own).sum(0)


def _summands(batch: Sequence[MicroBatch]) -> list[_Summand]:
    if not batch:
        raise bad_argument("batch", "at least one part", batch)
    if not batch[0].terms:
        raise bad_argument("terms", "at least one term", batch[0].terms)
    radii = [check_radius("rho", term.rho) for term in batch[0].terms]
    for part in batch[1:]:
        if [term.rho for term in part.terms] != radii:
            raise bad_argument("batch", "parts with the same radii", Phrase(f"{radii} and others"))
    plain = [number for number, rho in enumerate(radii) if rho == 0]
    summands = [_Summand(0.0, plain)] if plain else []
    return summands + [_Summand(rho, [number]) for number, rho in enumerate(radii) if rho > 0]


def _clean_passes(model: _Model, batch: Sequence[MicroBatch], summands: list[_Summand], split: bool) -> Tensor:
    """Run every pass at the unperturbed weights; find the summands' gradients there. Return the mean loss."""
    sums, count = [], 0
    for part in batch:
        for index, shares in _forwards([summand.weights(part.terms) for summand in summands], split):
            random_state = torch_random_state(model.device)
            losses = part.sample_losses(index, False)
            for left, (number, weights) in zip(reversed(range(len(shares))), shares, strict=True):
                summand = summands[number]
                loss = _weighted_sum(losses, weights)
                _set_gradients(model.params, summand.gradient)
                model.backward(loss, retain_graph=left > 0)
                summand.gradient = [_owned(g) for g in _gradients(model.params)]
                _set_gradients(model.params, None)
                summand.sharpness = summand.sharpness - loss.detach()
                summand.passes.append(_Pass(part.sample_losses, index, weights, random_state))
            sums.append(losses.detach().to(_accumulation_dtype(losses)).sum())
            count += losses.numel()
    return torch.stack(sums).sum() / max(count, 1)


def _forwards(weights: list[Tensor], split: bool) -> list[tuple[Tensor | None, list[tuple[int, Tensor]]]]:
    """Return what to forward of a part of the batch, each with the summands (by number) that it serves.

    With ``split`` every summand has its own samples, if each sample has weight in exactly one summand.
    """
    whole: list[tuple[Tensor | None, list[tuple[int, Tensor]]]] = [(None, list(enumerate(weights)))]
    if not split or weights[0].numel() == 0:
        return whole
    # One wait for the device, for all summands together.
    support = torch.stack([w.reshape(len(w), -1).ne(0).any(1) for w in weights]).cpu()
    if bool((support.sum(0) != 1).any()):
        # Samples that several terms weigh (mixup) or none does count once in what is logged all the same.
        return whole
    used = [number for number, row in enumerate(support) if bool(row.any())]
    if len(used) == 1:
        return [(None, [(used[0], weights[used[0]])])]
    indices = [support[number].nonzero().flatten().to(weights[number].device) for number in used]
    return [(index, [(number, weights[number][index])]) for number, index in zip(used, indices, strict=True)]


def _synchronize_directions(params: list[Tensor], summands: list[_Summand], synchronize: Callable[[], None]) -> None:
    for summand in summands:
        if summand.rho > 0:
            _set_gradients(params, summand.gradient)
            synchronize()
            summand.gradient = [_owned(g) for g in _gradients(params)]
            _set_gradients(params, None)


def _outcome(loss: Tensor, norm: Tensor | None, summands: list[_Summand]) -> Outcome:
    number_of_terms = sum(len(summand.terms) for summand in summands)
    norms: list[Tensor | None] = [None] * number_of_terms
    sharpness: list[Tensor | None] = [None] * number_of_terms
    for summand in summands:
        if len(summand.terms) == 1:
            norms[summand.terms[0]] = summand.norm
        if summand.rho > 0:
            sharpness[summand.terms[0]] = loss.new_zeros(()) + summand.sharpness
    return Outcome(loss, norm, norms, sharpness)


def _are_finite(loss: Tensor, norm: Tensor | None) -> bool:
    return bool(loss.isfinite()) and (norm is None or bool(norm.isfinite()))


def _accumulation_dtype(losses: Tensor) -> torch.dtype:
    return torch.promote_types(losses.dtype, torch.float32)


def _weighted_sum(losses: Tensor, weights: Tensor) -> Tensor:
    if not isinstance(losses, Tensor) or losses.shape != weights.shape:
        raise ValueError(
            "Expected `sample_losses` to return one unreduced loss for each target, a tensor of shape"
            f" {tuple(weights.shape)} (reduction='none'), but got"
            f" {f'shape {tuple(losses.shape)}' if isinstance(losses, Tensor) else repr(losses)}."
        )
    return (weights.to(losses.device, _accumulation_dtype(losses)) * losses).sum()


@torch.no_grad()
def _ascend(params: list[Tensor], summand: _Summand) -> None:
    """Add ``rho * g / ||g||`` to the parameters; overwrites ``g``."""
    assert summand.gradient is not None
    assert summand.norm is not None
    pairs = [(_local(p), _dense(_local(g))) for p, g in zip(params, summand.gradient, strict=True) if g is not None]
    if not pairs:
        return
    ascended, direction = [p for p, _ in pairs], [g for _, g in pairs]
    scale = torch.where(summand.norm > 0, summand.rho / summand.norm, torch.zeros_like(summand.norm))
    torch._foreach_mul_(direction, scale)
    torch._foreach_add_(ascended, direction)
    # Autocast keeps low-precision copies of the weights it has met.
    torch.clear_autocast_cache()


@torch.no_grad()
def _norm(params: list[Tensor], gradient: Gradients | None) -> Tensor:
    """Return the norm, of a type and on a device that are the same whether there is a gradient or not."""
    is_double = any(p.dtype in (torch.float64, torch.complex128) for p in params)
    dtype = torch.float64 if is_double else torch.float32
    tensors = [_as_real(g) for g in gradient or [] if g is not None]
    if not tensors:
        return torch.zeros((), dtype=dtype, device=params[0].device)
    norms: list[Tensor] = []
    if whole := [t for t in tensors if not _is_sharded(t)]:
        norms += torch._foreach_norm(whole, 2, dtype)
    if sharded := [t.to(dtype) for t in tensors if _is_sharded(t)]:
        # One communication for all of them. They know no norm in another type than their own.
        of_sharded: Any = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(sharded, 2)))
        norms.append(of_sharded.full_tensor())
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def _as_real(tensor: Tensor) -> Tensor:
    tensor = _dense(tensor)
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _dense(tensor: Tensor) -> Tensor:
    # Embeddings may have sparse gradients. To go along them takes their dense form.
    return tensor.to_dense() if tensor.is_sparse else tensor


def _local(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that this process holds; shares its memory."""
    return tensor.detach().to_local() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _is_sharded(tensor: Tensor) -> bool:
    # Importing torch.distributed.tensor to ask for its DTensor takes a second.
    return hasattr(tensor, "to_local")


def _gradients(params: list[Tensor]) -> Gradients:
    return [p.grad for p in params]


def _set_gradients(params: list[Tensor], gradients: Gradients | None) -> None:
    for p, g in zip(params, gradients or [None] * len(params), strict=True):
        p.grad = g


def _owned(gradient: Tensor | None) -> Tensor | None:
    # A view into a larger buffer (DDP's buckets) is overwritten by the next backward.
    if gradient is None or gradient.is_sparse or gradient.untyped_storage().nbytes() == gradient.nbytes:
        return gradient
    return gradient.clone()
