"""Terms to gradient, in the fewest passes over the model. Needs torch only."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_ssesam._validation import Phrase, bad_argument, check_choice, check_radius
from lightning_ssesam.objectives import Term

SampleLosses = Callable[[Tensor | None, bool], Tensor]
Gradients = list[Tensor | None]
Buffers = dict[str, Tensor | None]


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
        self._buffers = _BufferSnapshot()
        self._clean_buffers = _BufferSnapshot()
        self._forward_moves_buffers: bool | None = None

    def __getstate__(self) -> dict[str, Any]:
        return SharpnessEngine().__dict__

    # torch.compile(module) would compile the arithmetic too; a network that is compiled by itself stays compiled.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def compute(
        self,
        sample_losses: SampleLosses,
        terms: Sequence[Term],
        parameters: Iterable[Tensor],
        buffers: Iterable[Buffers] = (),
        backward: Callable[..., None] = Tensor.backward,
        passes: Literal["auto", "full", "split"] = "full",
    ) -> Tensor:
        """Run the passes of one step.

        Args:
            sample_losses: Called as ``sample_losses(index, perturbed)``. Returns the unreduced losses, ``(N,)`` or
                dense ``(N, ...)``, of the whole batch where ``index`` is None, else of the samples ``index`` ``(M,)``.
            terms: The objective's terms, each with weights of the shape of the whole batch's losses.
            parameters: The model's parameters. Those that do not require a gradient are left alone.
            buffers: The dictionaries in which the model's layers keep their buffers.
            backward: Called as ``backward(loss, retain_graph=bool)``; accumulates into ``.grad``.
            passes: ``"full"`` forwards the whole batch in every pass, which is exact for every model. ``"split"``
                forwards only the samples of each term, where the terms divide the batch among them; the same to
                rounding if no layer mixes samples. ``"auto"`` is ``"split"``, unless a first step with full passes
                shows that a forward changes buffers.

        Returns:
            The mean loss of the batch at the unperturbed weights, a detached scalar; 0 for an empty batch.

        Raises:
            ValueError: If ``passes`` or a radius is out of range, or the losses do not have the shape of the weights.

        """
        check_choice("passes", passes, ("auto", "full", "split"))
        terms, buffers = _merge_plain(terms), list(buffers)
        params = [p for p in parameters if p.requires_grad]
        if not params:
            raise bad_argument("parameters", "at least one that requires a gradient", Phrase("none"))
        model = _Model(sample_losses, params, backward, params[0].device)
        gradients, random_state = _gradients(params), _random_state(model.device)
        self._buffers.save(buffers)
        try:
            _set_gradients(params, None)
            clean = _clean_passes(model, _split(terms) if self._splits(passes) else [_CleanPass(None, terms)])
            if passes == "auto" and self._forward_moves_buffers is None:
                self._forward_moves_buffers = self._buffers.differs()
            _set_gradients(params, clean.plain_gradient)
            if clean.ascents:
                self._perturbed_passes(model, clean.ascents, buffers)
        except BaseException:
            self._weights.restore()
            self._buffers.restore()
            _set_gradients(params, gradients)
            _set_random_state(random_state, model.device)
            raise
        finally:
            self._weights.forget()
            self._buffers.forget()
            self._clean_buffers.forget()
        return clean.mean_loss

    def _splits(self, passes: Literal["auto", "full", "split"]) -> bool:
        if passes == "auto":
            return not self._buffers.any() or self._forward_moves_buffers is False
        return passes == "split"

    def _perturbed_passes(self, model: "_Model", ascents: list["_Ascent"], buffers: list[Buffers]) -> None:
        random_state = _random_state(model.device)
        self._clean_buffers.save(buffers)
        self._weights.save(model.params)
        while ascents:
            ascent = ascents.pop(0)
            _ascend(model.params, ascent.gradient, ascent.rho)
            _set_random_state(ascent.random_state, model.device)
            loss = _weighted_sum(model.sample_losses(ascent.index, True), ascent.weights)
            # The direction is not needed any more; the backward needs its memory.
            del ascent
            model.backward(loss, retain_graph=False)
            self._weights.restore()
            self._clean_buffers.restore()
        _set_random_state(random_state, model.device)


@dataclass
class _Model:
    """What the passes run on."""

    sample_losses: SampleLosses
    params: list[Tensor]
    backward: Callable[..., None]
    device: torch.device


@dataclass
class _CleanPass:
    """One clean forward, and the terms on its samples: the whole batch where ``index`` is None."""

    index: Tensor | None
    terms: list[Term]


@dataclass
class _Ascent:
    """A perturbed pass still to be run: its direction, and what that is the gradient of."""

    gradient: Gradients
    rho: float
    index: Tensor | None
    weights: Tensor
    random_state: list[Tensor]


class _CleanResult(NamedTuple):
    mean_loss: Tensor
    plain_gradient: Gradients | None
    ascents: list[_Ascent]


def _clean_passes(model: _Model, plan: list[_CleanPass]) -> _CleanResult:
    """Run every pass at the unperturbed weights; all of them end before the first weight is perturbed."""
    sums, count = [], 0
    plain_gradient: Gradients | None = None
    ascents = []
    for clean in plan:
        random_state = _random_state(model.device)
        losses = model.sample_losses(clean.index, False)
        for number, (weights, rho) in enumerate(clean.terms, start=1):
            model.backward(_weighted_sum(losses, weights), retain_graph=number < len(clean.terms))
            gradient = [_owned(g) for g in _gradients(model.params)]
            _set_gradients(model.params, None)
            if rho == 0:
                plain_gradient = gradient
            else:
                ascents.append(_Ascent(gradient, rho, clean.index, weights, random_state))
        sums.append(losses.detach().to(_accumulation_dtype(losses)).sum())
        count += losses.numel()
    return _CleanResult(torch.stack(sums).sum() / max(count, 1), plain_gradient, ascents)


def _merge_plain(terms: Sequence[Term]) -> list[Term]:
    if not terms:
        raise bad_argument("terms", "at least one term", terms)
    for term in terms:
        check_radius("rho", term.rho)
    plain = [term.weights for term in terms if term.rho == 0]
    merged = [Term(torch.stack(plain).sum(0), 0.0)] if plain else []
    return merged + [term for term in terms if term.rho != 0]


def _split(terms: list[Term]) -> list[_CleanPass]:
    """Give each term its own clean pass, if every sample has weight in exactly one of them."""
    whole = [_CleanPass(None, terms)]
    if terms[0].weights.numel() == 0:
        return whole
    # One wait for the device, for all terms together.
    support = torch.stack([term.weights.reshape(len(term.weights), -1).ne(0).any(1) for term in terms]).cpu()
    if bool((support.sum(0) != 1).any()):
        # Samples that several terms weigh (mixup) or none does count once in what is logged all the same.
        return whole
    used = [(term, row) for term, row in zip(terms, support, strict=True) if bool(row.any())]
    if len(used) == 1:
        return [_CleanPass(None, [used[0][0]])]
    indices = [row.nonzero().flatten().to(term.weights.device) for term, row in used]
    return [
        _CleanPass(index, [Term(term.weights[index], term.rho)]) for index, (term, _) in zip(indices, used, strict=True)
    ]


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


def _owned(gradient: Tensor | None) -> Tensor | None:
    # A view into a larger buffer (DDP's buckets) is overwritten by the next backward.
    if gradient is None or gradient.untyped_storage().nbytes() == gradient.nbytes:
        return gradient
    return gradient.clone()


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

    def differs(self) -> bool:
        """Whether a tensor has another value than when it was saved."""
        return not all(torch.equal(t, c) for t, c in zip(self._tensors, self._copies, strict=True))

    def forget(self) -> None:
        self._tensors = []


class _BufferSnapshot:
    """The same for buffers, which a layer may also replace by other tensors."""

    def __init__(self) -> None:
        self._values = _Snapshot()
        self._bindings: list[tuple[Buffers, Buffers]] = []

    def save(self, buffers: list[Buffers]) -> None:
        self._values.save([t for of in buffers for t in of.values() if t is not None and not _overlaps_itself(t)])
        self._bindings = [(of, dict(of)) for of in buffers]

    def restore(self) -> None:
        for of, saved in self._bindings:
            of.update(saved)
        self._values.restore()

    def differs(self) -> bool:
        """Whether a buffer is another tensor, or has another value, than when it was saved."""
        rebound = any(of[name] is not t for of, saved in self._bindings for name, t in saved.items())
        return rebound or self._values.differs()

    def any(self) -> bool:
        """Whether there is any buffer."""
        return any(t is not None for _, saved in self._bindings for t in saved.values())

    def forget(self) -> None:
        self._values.forget()
        self._bindings = []


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
