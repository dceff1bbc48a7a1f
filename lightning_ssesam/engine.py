"""Terms to gradient, in the fewest passes over the model. Needs torch only."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_ssesam._validation import bad_argument, check_choice
from lightning_ssesam.objectives import Term

SampleLosses = Callable[[Tensor | None, bool], Tensor]
Gradients = list[Tensor | None]


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

    def release(self) -> None:
        """Free the scratch memory."""
        self._weights = _Snapshot()
        self._buffers = _Snapshot()
        self._clean_buffers = _Snapshot()

    def __getstate__(self) -> dict[str, Any]:
        return SharpnessEngine().__dict__

    def compute(
        self,
        sample_losses: SampleLosses,
        terms: Sequence[Term],
        parameters: Iterable[Tensor],
        buffers: Iterable[Tensor] = (),
        backward: Callable[..., None] = Tensor.backward,
        passes: Literal["full", "split"] = "full",
    ) -> Tensor:
        """Run the passes of one step.

        Args:
            sample_losses: Called as ``sample_losses(index, perturbed)``. Returns the unreduced losses, ``(N,)`` or
                dense ``(N, ...)``, of the whole batch where ``index`` is None, else of the samples ``index`` ``(M,)``.
            terms: The objective's terms, each with weights of the shape of the whole batch's losses.
            parameters: The model's parameters. Those that do not require a gradient are left alone.
            buffers: The model's buffers.
            backward: Called as ``backward(loss, retain_graph=bool)``; accumulates into ``.grad``.
            passes: ``"full"`` forwards the whole batch in every pass, which is exact for every model; ``"split"``
                only the samples that a term gives weight, which is the same to rounding where no layer mixes samples.

        Returns:
            The mean loss at the unperturbed weights, a detached scalar; 0 for an empty batch.

        Raises:
            ValueError: If ``passes`` is unknown, or the losses do not have the shape of the weights.

        """
        check_choice("passes", passes, ("full", "split"))
        params = [p for p in parameters if p.requires_grad]
        device = params[0].device if params else torch.device("cpu")
        gradients, random_state = _gradients(params), _random_state(device)
        state = [b for b in buffers if not _overlaps_itself(b)]
        self._buffers.save(state)
        try:
            _set_gradients(params, None)
            clean = _clean_passes(sample_losses, _plan(terms, passes), params, backward, device)
            _set_gradients(params, clean.plain_gradient)
            if clean.ascents:
                self._perturbed_passes(clean.ascents, sample_losses, params, state, backward, device)
        except BaseException:
            self._weights.restore()
            self._buffers.restore()
            _set_gradients(params, gradients)
            _set_random_state(random_state, device)
            raise
        finally:
            self._weights.forget()
        return clean.mean_loss

    def _perturbed_passes(
        self,
        ascents: list["_Ascent"],
        sample_losses: SampleLosses,
        params: list[Tensor],
        buffers: list[Tensor],
        backward: Callable[..., None],
        device: torch.device,
    ) -> None:
        random_state = _random_state(device)
        self._clean_buffers.save(buffers)
        self._weights.save(params)
        while ascents:
            ascent = ascents.pop(0)
            _ascend(params, ascent.gradient, ascent.rho)
            _set_random_state(ascent.random_state, device)
            losses = sample_losses(ascent.index, True)
            loss = _weighted_sum(losses, ascent.weights)
            # The direction is not needed any more; the backward needs its memory.
            del ascent, losses
            backward(loss, retain_graph=False)
            self._weights.restore()
            self._clean_buffers.restore()
        _set_random_state(random_state, device)


@dataclass
class _Share:
    """One term in the plan: its weights in the clean pass that it shares, and its own perturbed pass."""

    rho: float
    clean_weights: Tensor
    index: Tensor | None
    weights: Tensor


@dataclass
class _CleanPass:
    """One clean forward, of the samples at ``index``, and the terms whose clean gradients come from it."""

    index: Tensor | None
    shares: list[_Share]


@dataclass
class _Ascent:
    """A perturbed pass still to be run: the direction, and what it is the gradient of."""

    gradient: Gradients
    rho: float
    index: Tensor | None
    weights: Tensor
    random_state: list[Tensor]


class _CleanResult(NamedTuple):
    mean_loss: Tensor
    plain_gradient: Gradients | None
    ascents: list[_Ascent]


def _clean_passes(
    sample_losses: SampleLosses,
    plan: list[_CleanPass],
    params: list[Tensor],
    backward: Callable[..., None],
    device: torch.device,
) -> _CleanResult:
    """Run every pass at the unperturbed weights; all of them end before the first weight is perturbed."""
    sums, count = [], 0
    plain_gradient: Gradients | None = None
    ascents = []
    for clean in plan:
        random_state = _random_state(device)
        losses = sample_losses(clean.index, False)
        for number, share in enumerate(clean.shares, start=1):
            backward(_weighted_sum(losses, share.clean_weights), retain_graph=number < len(clean.shares))
            gradient = _gradients(params)
            _set_gradients(params, None)
            if share.rho == 0:
                plain_gradient = gradient
            else:
                ascents.append(_Ascent(gradient, share.rho, share.index, share.weights, random_state))
        sums.append(losses.detach().to(_accumulation_dtype(losses)).sum())
        count += losses.numel()
    return _CleanResult(torch.stack(sums).sum() / max(count, 1), plain_gradient, ascents)


def _plan(terms: Sequence[Term], passes: Literal["full", "split"]) -> list[_CleanPass]:
    """Decide which samples go through which clean pass, and which through each perturbed one."""
    terms = _merge_plain(terms)
    if passes == "full" or terms[0].weights.numel() == 0:
        return _plan_full(terms)
    # One wait for the device, for all terms together.
    support = torch.stack([term.weights.reshape(len(term.weights), -1).ne(0).any(1) for term in terms]).cpu()
    used = [(term, _index(row, term.weights.device)) for term, row in zip(terms, support, strict=True) if row.any()]
    if not used:
        return _plan_full(terms)
    if bool((support.sum(0) > 1).any()):
        # Samples that several terms weigh (mixup) go through one shared clean pass, so that each counts once.
        return [_CleanPass(None, [_Share(t.rho, t.weights, i, _select(t.weights, i)) for t, i in used])]
    selected = [(t.rho, i, _select(t.weights, i)) for t, i in used]
    return [_CleanPass(index, [_Share(rho, weights, index, weights)]) for rho, index, weights in selected]


def _plan_full(terms: Sequence[Term]) -> list[_CleanPass]:
    return [_CleanPass(None, [_Share(term.rho, term.weights, None, term.weights) for term in terms])]


def _merge_plain(terms: Sequence[Term]) -> list[Term]:
    if not terms:
        raise bad_argument("terms", "at least one term", terms)
    plain = [term.weights for term in terms if term.rho == 0]
    merged = [Term(torch.stack(plain).sum(0), 0.0)] if plain else []
    return merged + [term for term in terms if term.rho != 0]


def _index(support: Tensor, device: torch.device) -> Tensor | None:
    return None if bool(support.all()) else support.nonzero().flatten().to(device)


def _select(weights: Tensor, index: Tensor | None) -> Tensor:
    return weights if index is None else weights[index]


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
def _ascend(params: list[Tensor], gradient: Gradients, rho: float) -> None:
    """Add ``rho * g / ||g||`` to the parameters; overwrites ``gradient``."""
    pairs = [(p, g) for p, g in zip(params, gradient, strict=True) if g is not None]
    if not pairs:
        return
    ascended, direction = [p for p, _ in pairs], [g for _, g in pairs]
    norm = _norm(direction)
    scale = torch.where(norm > 0, rho / norm, torch.zeros_like(norm))
    torch._foreach_mul_(direction, scale)
    torch._foreach_add_(ascended, direction)
    # Autocast keeps low-precision copies of the weights it has met.
    torch.clear_autocast_cache()


def _norm(tensors: list[Tensor]) -> Tensor:
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2, dtype)))
    return norm


def _gradients(params: list[Tensor]) -> Gradients:
    return [p.grad for p in params]


def _set_gradients(params: list[Tensor], gradients: Gradients | None) -> None:
    for p, g in zip(params, gradients or [None] * len(params), strict=True):
        p.grad = g


class _Snapshot:
    """Copies of tensors, to be written back bit for bit. The storage is used again by the next ``save``."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._copies: list[Tensor] = []

    @torch.no_grad()
    def save(self, tensors: list[Tensor]) -> None:
        self.forget()
        if [_layout(t) for t in tensors] != [_layout(c) for c in self._copies]:
            self._copies = [torch.empty_like(t) for t in tensors]
        if tensors:
            torch._foreach_copy_(self._copies, tensors)
        self._tensors = tensors

    @torch.no_grad()
    def restore(self) -> None:
        """Write the copies back, if there are any since the last :meth:`forget`."""
        if self._tensors:
            torch._foreach_copy_(self._tensors, self._copies)
            torch.clear_autocast_cache()

    def forget(self) -> None:
        self._tensors = []


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _overlaps_itself(tensor: Tensor) -> bool:
    # An expanded buffer cannot be written to, by a layer or by us.
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
