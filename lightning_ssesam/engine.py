"""Terms to gradient, in the fewest passes over the model. Needs torch only."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_ssesam._validation import bad_argument, check_choice, check_radius
from lightning_ssesam.errors import ArgumentError, NonFiniteError
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
        sample_losses: Called as ``sample_losses(index, again)``. Returns the unreduced losses, ``(N,)`` or dense
            ``(N, ...)``, of the whole part where ``index`` is None, else of its samples ``index`` ``(M,)``, which is
            on the CPU. ``again`` is False in the one clean pass of every sample that counts (for logs, metrics).
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
        is_difference: Whether the passes were those of ``"difference"``.

    """

    loss: Tensor
    gradient_norm: Tensor | None = None
    gradient_norms: Sequence[Tensor | None] = ()
    sharpness: Sequence[Tensor | None] = ()
    is_difference: bool = False


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
        passes: Literal["auto", "full", "split", "difference"] = "full",
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
                shows that a forward changes buffers. ``"difference"`` is for models with batch norm: one plain pass
                over each part, and to its gradient it adds, for each perturbed term, the difference between the
                gradients at the ascended and at the unperturbed weights, both from a forward of the term's own samples.
                It is exact where no layer mixes samples; elsewhere what a perturbation changes is approximated. It is
                ``"full"`` where the terms do not divide the batch, only one has samples, or one has a single sample in
                a part, of which there is no variance.
            synchronize: Replaces the ``.grad`` of the parameters by their sum (or mean) over several processes.
                Called equally often in each: once at the end, and before that once per term of positive radius.
            ascent: ``"local"`` leaves out the latter, so that each process perturbs for its own samples.
            check_finite: Called at the end with whether the loss and the gradient are finite; returns whether they
                are in every process.
            report: Whether to find the norm of the final gradient, and of the terms of radius 0, too; of the latter
                not with ``synchronize`` or ``"difference"``, which leave them out.

        Returns:
            The mean loss, gradient norms and sharpness.

        Raises:
            ValueError: If ``passes`` or a radius is out of range, or the losses do not have the shape of the weights.
            NonFiniteError: If ``check_finite`` returns False.

        """
        check_choice("passes", passes, ("auto", "full", "split", "difference"))
        check_choice("ascent", ascent, ("global", "local"))
        summands, buffers = _summands(batch), list(buffers)
        params = [p for p in parameters if p.requires_grad]
        if not params:
            raise bad_argument("parameters", "at least one that requires a gradient", got_text="none")
        model = _Model(params, backward, params[0].device)
        gradients, random_state = _gradients(params), torch_random_state(model.device)
        self._buffers.save(buffers)
        try:
            _set_gradients(params, None)
            plan = _plan(batch, summands, self._splits(passes))
            together = synchronize if ascent == "global" else None
            is_difference = passes == "difference" and _is_divided(plan)
            if is_difference:
                loss, summands = self._difference_passes(model, batch, summands, plan, buffers, together)
            else:
                plan = _plan(batch, summands, splits=False) if passes == "difference" else plan
                loss = _clean_passes(model, batch, summands, plan)
                if passes == "auto" and self._forward_moves_buffers is None:
                    self._forward_moves_buffers = self._buffers.differs()
                reports_plain = report and synchronize is None and passes != "difference"
                self._perturbed_passes(model, summands, buffers, together, reports_plain)
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
        return _outcome(loss, norm, summands, len(batch[0].terms))._replace(is_difference=is_difference)

    def _splits(self, passes: str) -> bool:
        if passes == "auto":
            return not self._buffers.any() or self._forward_moves_buffers is False
        return passes in ("split", "difference")

    def _perturbed_passes(
        self,
        model: "_Model",
        summands: list["_Summand"],
        buffers: list[Buffers],
        synchronize: Callable[[], None] | None,
        report: bool,
    ) -> None:
        """Leave in ``.grad`` the sum of the summands' gradients, given those at the unperturbed weights."""
        perturbed = [summand for summand in summands if summand.rho > 0]
        for summand in perturbed:
            _find_norm(model, summand, synchronize)
        for summand in summands:
            if summand.rho == 0:
                _set_gradients(model.params, summand.gradient)
                summand.norm = _norm(model.params, summand.gradient) if report else None
        if not perturbed:
            return
        random_state = torch_random_state(model.device)
        self._save_clean(model, buffers)
        for summand in perturbed:
            self._ascended_passes(model, summand)
        set_torch_random_state(random_state, model.device)

    def _difference_passes(
        self,
        model: "_Model",
        batch: Sequence[MicroBatch],
        summands: list["_Summand"],
        plan: "_Plan",
        buffers: list[Buffers],
        synchronize: Callable[[], None] | None,
    ) -> tuple[Tensor, list["_Summand"]]:
        """Leave in ``.grad`` the gradient of ``"difference"``. Return the mean loss, and what was added up."""
        whole = _Summand(0.0, list(range(len(batch[0].terms))))
        loss = _clean_passes(model, batch, [whole], _plan(batch, [whole], splits=False))
        random_state = torch_random_state(model.device)
        self._save_clean(model, buffers)
        for number, summand in enumerate(summands):
            if summand.rho > 0:
                own = [[forward for forward in forwards if number in forward.shares] for forwards in plan]
                if any(own):
                    _clean_passes(model, batch, summands, own, self._clean_buffers)
                whole.subtract(summand)
                _find_norm(model, summand, synchronize)
                _set_gradients(model.params, whole.gradient)
                self._ascended_passes(model, summand)
                whole.gradient = _gradients(model.params)
        set_torch_random_state(random_state, model.device)
        return loss, [whole, *(summand for summand in summands if summand.rho > 0)]

    def _save_clean(self, model: "_Model", buffers: list[Buffers]) -> None:
        self._clean_buffers.save(buffers)
        self._weights.save([_local(p) for p in model.params])

    def _ascended_passes(self, model: "_Model", summand: "_Summand") -> None:
        """Add to ``.grad`` the gradient of a summand at its ascended weights."""
        if not summand.passes:
            return
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

    @torch.no_grad()
    def subtract(self, other: "_Summand") -> None:
        """Take the gradient of another summand from this one's."""
        assert self.gradient is not None
        for number, theirs in enumerate(other.gradient or []):
            if theirs is not None:
                own = self.gradient[number]
                self.gradient[number] = -theirs if own is None else own.sub_(theirs)


def _summands(batch: Sequence[MicroBatch]) -> list[_Summand]:
    if not batch:
        raise bad_argument("batch", "at least one part", batch)
    if not batch[0].terms:
        raise bad_argument("terms", "at least one term", batch[0].terms)
    radii = [check_radius("rho", term.rho) for term in batch[0].terms]
    for part in batch[1:]:
        if [term.rho for term in part.terms] != radii:
            raise bad_argument("batch", "parts with the same radii", got_text=f"{radii} and others")
    plain = [number for number, rho in enumerate(radii) if rho == 0]
    summands = [_Summand(0.0, plain)] if plain else []
    return summands + [_Summand(rho, [number]) for number, rho in enumerate(radii) if rho > 0]


class _Forward(NamedTuple):
    """A clean forward: of which samples, all where that is None, and the weights of the summands that it serves."""

    samples: Tensor | None
    shares: dict[int, Tensor]


_Plan = list[list[_Forward]]


def _plan(batch: Sequence[MicroBatch], summands: list[_Summand], splits: bool) -> _Plan:
    """Return the clean forwards of every part of the batch, each with the summands (by number) that it serves.

    If it splits, every summand has its own samples, where each sample has weight in exactly one summand.
    """
    plan: _Plan = []
    for part in batch:
        weights = [summand.weights(part.terms) for summand in summands]
        whole = _Forward(None, dict(enumerate(weights)))
        if not splits or len(weights) == 1 or weights[0].numel() == 0:
            plan.append([whole])
            continue
        # One wait for the device, for all summands together, and none where the weights are on the host.
        support = torch.stack([w.reshape(len(w), -1).ne(0).any(1) for w in weights]).cpu()
        used = [number for number, row in enumerate(support) if bool(row.any())]
        if bool((support.sum(0) != 1).any()):
            # Samples that several terms weigh (mixup) or none does count once in what is logged all the same.
            plan.append([whole])
        elif len(used) == 1:
            plan.append([_Forward(None, {used[0]: weights[used[0]]})])
        else:
            indices = {number: support[number].nonzero().flatten() for number in used}
            plan.append([_Forward(index, {n: rows(weights[n], index)}) for n, index in indices.items()])
    return plan


def _is_divided(plan: _Plan) -> bool:
    """Whether every forward serves one summand with two samples or more, and not all of them are of whole parts."""
    forwards = [forward for of_part in plan for forward in of_part]
    sizes = [len(weights) for forward in forwards for weights in forward.shares.values()]
    return len(plan) < len(forwards) == len(sizes) and min(sizes) > 1


def _clean_passes(
    model: _Model,
    batch: Sequence[MicroBatch],
    summands: list[_Summand],
    plan: _Plan,
    buffers: BufferSnapshot | None = None,
) -> Tensor:
    """Run passes at the unperturbed weights; find the summands' gradients there. Return the mean loss.

    With buffers to restore the samples have had their clean pass, and these passes leave nothing but gradients.
    """
    sums, count = [], 0
    for part, forwards in zip(batch, plan, strict=True):
        for index, shares in forwards:
            random_state = torch_random_state(model.device)
            losses = part.sample_losses(index, buffers is not None)
            for left, (number, weights) in zip(reversed(range(len(shares))), shares.items(), strict=True):
                summand = summands[number]
                loss = _weighted_sum(losses, weights)
                _set_gradients(model.params, summand.gradient)
                model.backward(loss, retain_graph=left > 0)
                summand.gradient = [_owned(g) for g in _gradients(model.params)]
                _set_gradients(model.params, None)
                summand.sharpness = summand.sharpness - loss.detach()
                summand.passes.append(_Pass(part.sample_losses, index, weights, random_state))
            if buffers is not None:
                buffers.restore()
            sums.append(losses.detach().to(_accumulation_dtype(losses)).sum())
            count += losses.numel()
    return torch.stack(sums).sum() / max(count, 1)


def rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Return the rows of a tensor at an index on the host."""
    return tensor[move(index, tensor.device)]


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, without a wait where that is safe (as Lightning moves batches)."""
    return tensor.to(device, non_blocking=device.type not in ("cpu", "mps"))


def _find_norm(model: _Model, summand: _Summand, synchronize: Callable[[], None] | None) -> None:
    """Find the norm of a summand's direction, which becomes that of all processes if they ascend together."""
    if synchronize is not None:
        _set_gradients(model.params, summand.gradient)
        synchronize()
        summand.gradient = [_owned(g) for g in _gradients(model.params)]
        _set_gradients(model.params, None)
    summand.norm = _norm(model.params, summand.gradient)


def _outcome(loss: Tensor, norm: Tensor | None, summands: list[_Summand], number_of_terms: int) -> Outcome:
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
        raise ArgumentError(
            "Expected `sample_losses` to return one unreduced loss for each target, a tensor of shape"
            f" {tuple(weights.shape)} (reduction='none'), but got"
            f" {f'shape {tuple(losses.shape)}' if isinstance(losses, Tensor) else repr(losses)}."
        )
    return (move(weights.to(_accumulation_dtype(losses)), losses.device) * losses).sum()


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
