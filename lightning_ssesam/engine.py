"""From terms to the gradient, in the fewest passes over the model. Needs torch only."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ssesam import norms
from lightning_ssesam._validation import bad_argument, check_choice, check_radius
from lightning_ssesam.after_sum import AfterSum, Combine, synchronized
from lightning_ssesam.ascent_states import AscentStates, key_of_reuse, keys_of
from lightning_ssesam.displacement import Ascender
from lightning_ssesam.errors import NonFiniteError
from lightning_ssesam.forward_state import ForwardState, Moment
from lightning_ssesam.gradient_sum import GradientSum, Outcome, Summand, make_summands, outcome_of, weighted_sum
from lightning_ssesam.layers import Layers, survey
from lightning_ssesam.mixing import MixingMemory
from lightning_ssesam.plan import (
    Group,
    MicroBatch,
    Plan,
    SampleLosses,
    divides_batch,
    group_terms,
)
from lightning_ssesam.snapshots import BufferSnapshot, Snapshot
from lightning_ssesam.tensors import gradients_of, is_sharded, local_parts, set_gradients
from lightning_ssesam.terms import Objective
from lightning_ssesam.weights import Names, Weights

Passes = Literal["auto", "full", "split", "difference"]

__all__ = ["MicroBatch", "NonFiniteError", "Outcome", "SampleLosses", "SharpnessEngine"]


class SharpnessEngine:
    r"""Computes the gradient of each term at its ascended weights, and leaves their sum in ``.grad``.

    A term :math:`(a, \rho)` contributes the gradient of :math:`L_a(w) = \sum_i a_i l_i(w)` at
    :math:`w + \rho \, g / \|g\|`, with :math:`g = \nabla L_a(w)`. The norm runs over all trainable parameters together
    (Foret et al., ICLR 2021, eq. 2 and 3, without the second-order term). If :math:`\rho` or g is 0, it contributes g.

    A clean pass runs at the unperturbed weights w. Terms of radius 0 share one clean backward pass. Every other term
    costs a clean backward pass, and a forward and a backward pass at its ascended weights. These draw the same random
    numbers (dropout) as the clean pass. Buffers, such as batch norm's statistics, keep the values of the clean pass. If
    a pass raises an exception, weights, buffers, gradients and random state are those from before the call again.

    Scratch memory is kept from call to call: one copy of the parameters and two of the buffers. It is never saved.

    Attributes:
        states: What ascents keep from step to step, with ``state_dict()`` and ``load_state_dict(states)``. It is not
            copied or pickled with the engine.
        seed: Seed of :class:`~lightning_ssesam.Noise`, an integer; None for ``torch.initial_seed()``.

    Example:
        >>> import torch
        >>> from lightning_ssesam import SAM
        >>> net, x, y = torch.nn.Linear(3, 2), torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
        >>> def sample_losses(index, is_clean):
        ...     chosen = slice(None) if index is None else index
        ...     return torch.nn.functional.cross_entropy(net(x[chosen]), y[chosen], reduction="none")
        >>> batch = [MicroBatch(sample_losses, SAM(rho=0.05).terms(y))]
        >>> outcome = SharpnessEngine().compute(batch, net.parameters(), modules=net)
        >>> bool(outcome.sharpness[0] > 0), net.weight.grad.shape
        (True, torch.Size([2, 3]))
    """

    def __init__(self) -> None:
        self.begin()
        self.release()

    def restored(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a state dictionary with the weights and buffers from before the step, if a step is under way.

        For checkpoints that are written in the middle of a pass, for example by a signal handler.
        """
        of_forward = {} if self._start is None else self._start.originals()
        saved = {**of_forward, **self._buffers.copies(), **self._weights.copies()}
        if not saved:
            return state
        return {
            name: saved.get((value.data_ptr(), value.shape), value)
            if isinstance(value, Tensor) and not is_sharded(value)
            else value
            for name, value in state.items()
        }

    def can_reuse(self, objective: Objective | None = None) -> bool:
        """Return whether a perturbed step with this objective has left a difference that ``reuse`` can add."""
        return key_of_reuse(objective) in self.states

    def protect(self, layers: Layers) -> Callable[[], None]:
        """Return a function that puts back what the next step changes, apart from gradients."""
        buffers, states = self._before, self.states.copy()
        buffers.save_buffers(layers.buffers)
        moment = None if self._state is None else self._state.moment()

        def undo() -> None:
            buffers.restore()
            self.states.become(states)
            if moment is not None:
                moment.restore()

        return undo

    @property
    def scratch(self) -> list[list[Tensor]]:
        """The scratch memory that a step writes to."""
        return [self._weights.memory, self._buffers.memory, self._clean_buffers.memory]

    def begin(self) -> None:
        """Begin a training: forget the states of ascents and the seed of an earlier one."""
        self.states = AscentStates()
        self.seed: int | None = None

    def release(self) -> None:
        """Free the scratch memory."""
        self._weights = Snapshot()
        self._buffers = BufferSnapshot()
        self._clean_buffers = BufferSnapshot()
        self._before = BufferSnapshot()
        self._start: Moment | None = None
        self._state: ForwardState | None = None
        self.layers = Layers()
        self._mixing = MixingMemory()
        self._names: Names | None = None
        self._ascender: Ascender | None = None

    def __getstate__(self) -> dict[str, Any]:
        return SharpnessEngine().__dict__

    def compute(
        self,
        batch: Sequence[MicroBatch],
        parameters: Iterable[Tensor],
        modules: nn.Module | Iterable[nn.Module] = (),
        backward: Callable[..., None] = Tensor.backward,
        passes: Passes = "full",
        synchronize: Callable[[], None] | None = None,
        processes: Literal["global", "local"] = "global",
        check_finite: Callable[[bool], bool] | None = None,
        report: bool = False,
        objective: Objective | None = None,
        optimizer: Optimizer | None = None,
        loss_scale: Tensor | float = 1.0,
        reuse: float | None = None,
    ) -> Outcome:
        r"""Run the passes of one step.

        Args:
            batch: Parts of the batch. All clean passes come before the first perturbed pass, unless ``passes`` is
                ``"difference"``. If no layer mixes samples, the result is that of the whole batch. Memory holds the
                activations of one part at a time.
            parameters: The model's parameters. Those that do not require a gradient are left alone.
            modules: The model, or all of its modules (``net.modules()``). A perturbed pass meets the buffers and other
                tensors that its clean pass met, and leaves none of them moved. They also tell an ascent the names of
                the parameters, by which it knows biases and layers.
            backward: Called as ``backward(loss, retain_graph=bool)``; accumulates into ``.grad``.
            passes: Samples that each pass forwards. ``"full"`` forwards a whole part in every pass, which is exact for
                every model. ``"split"`` forwards only the samples of each term, if the terms divide the batch; equal
                up to rounding if no layer mixes samples. ``"auto"`` is ``"split"``, unless samples mix or a forward
                moves something. It is measured by forwards without gradients before the first step, and again when
                modules change their mode, or other parameters are trained. ``"difference"`` is for models with batch
                norm: one plain pass over each part, plus
                :math:`\nabla \tilde L_a(w + \rho g / \|g\|) - \nabla \tilde L_a(w)` for each perturbed term, with
                :math:`\tilde L_a` the loss of the term's own samples (docs/performance.md). It is exact if no layer
                mixes samples. It is ``"full"`` if the terms do not divide the batch, only one has samples, or one has a
                single sample in a part, which has no variance.
            synchronize: Replaces the ``.grad`` of the parameters by their sum (or mean) over several processes. Called
                equally often in each process: once per term of positive radius, and once at the end.
            processes: Processes whose samples a perturbation is computed from. With ``"local"``, each process perturbs
                for its own samples, and ``synchronize`` is called only at the end.
            check_finite: Called at the end with whether the loss and the gradient are finite in this process. Returns
                whether they are in every process.
            report: Whether to compute the norm of the final gradient, and that of the terms of radius 0. The latter is
                left out with ``synchronize`` or ``"difference"``.
            objective: Objective that has made the terms. :attr:`states` are kept by the names that it gives them, and
                its ``combine`` makes the gradient for the optimizer (:class:`~lightning_ssesam.GSAM`).
            optimizer: Optimizer whose momentum :class:`~lightning_ssesam.Momentum` takes.
            loss_scale: Factor of the gradients that ``backward`` accumulates (of a GradScaler), by which they are
                divided before an ascent sees them. If it is a tensor, gradients that are not finite leave
                :attr:`states` as they were.
            reuse: Factor alpha of LookSAM, a number >= 0. If a term is perturbed, the part of the sum's gradient that
                lies across the clean one is kept; if none is, it is added, alpha times as long as the clean one.

        Returns:
            The mean loss, gradient norms and sharpness.

        Raises:
            ArgumentError: If an argument is out of range, or the losses do not have the shape of the weights.
            NonFiniteError: If ``check_finite`` returns False.
        """
        check_choice("passes", passes, get_args(Passes))
        check_choice("processes", processes, ("global", "local"))
        if reuse is not None:
            check_radius("reuse", reuse)
        combine = objective.combine if objective is not None and objective.needs_clean_gradient else None
        groups, shared = group_terms(batch), synchronize if processes == "global" else None
        keeps_clean = (combine is not None or reuse is not None) and any(group.rho > 0 for group in groups)
        step = self._begin(batch, groups, list(parameters), modules, backward, passes, shared, keeps_clean)
        names = self._weights_of(step.params, optimizer)
        keys = [*keys_of(batch[0].terms, objective), key_of_reuse(objective)]
        self._ascender = Ascender(self.states, step.params, names, keys, loss_scale)
        if synchronize is not None and processes == "local":
            self._ascender.refuse_states(groups)
        gradients = gradients_of(step.params)
        try:
            if [g for g in gradients if g is not None]:
                set_gradients(step.params, None)
            loss = self._all_passes(step, passes, reports_plain=report and synchronize is None)
            if synchronize is not None:
                synchronize()
            self._after_sum(step, synchronize, combine, None if reuse is None else (reuse, keys[-1] in self.states))
            norm = norms.gradient_norm(step.params, gradients_of(step.params)) if report or check_finite else None
            if check_finite is not None and norm is not None:
                norms.check_finite(loss, norm, check_finite)
            self._ascender.commit()
        except BaseException:
            self._mixing.forget_note()
            self._weights.restore()
            step.start.restore()
            self._buffers.restore()
            set_gradients(step.params, gradients)
            raise
        finally:
            self._start = self._ascender = None
            for kept in (self._weights, self._buffers, self._clean_buffers, self.states):
                kept.forget()
        return outcome_of(step, loss, norm)._replace(note=self._mixing.take_note())

    def _begin(
        self,
        batch: Sequence[MicroBatch],
        groups: list[Group],
        parameters: list[Tensor],
        modules: nn.Module | Iterable[nn.Module],
        backward: Callable[..., None],
        passes: Passes,
        synchronize: Callable[[], None] | None,
        keeps_clean: bool,
    ) -> GradientSum:
        """Save what the passes of a step may move, and return its sum, which has no gradient yet."""
        params = [p for p in parameters if p.requires_grad]
        if not params:
            raise bad_argument("parameters", "at least one that requires a gradient", got_text="none")
        summands, ratio = make_summands(batch, groups, passes, keeps_clean, params)
        layers = survey(modules, self.layers)
        state, buffers = self._state_of(layers, layers.mark(parameters), params[0].device), layers.buffers
        is_perturbed = any(summand.is_perturbed for summand in summands)
        self._start = start = state.everything() if state.is_new and is_perturbed else state.moment()
        self._buffers.save_buffers(buffers)
        saved = state, start, self._clean_buffers
        return GradientSum(
            batch, params, buffers, backward, summands, synchronize, *saved, plain_ratio=ratio, keeps_clean=keeps_clean
        )

    def _all_passes(self, step: GradientSum, passes: str, reports_plain: bool) -> Tensor:
        """Leave in ``.grad`` the gradient of a step. Return the mean loss."""
        if step.summands[0].is_displaced:
            return self._displaced_passes(step)
        if passes == "difference":
            plan = step.plan(splits=True)
            # Where there is a ratio, samples belong to several terms.
            if step.plain_ratio is None and divides_batch(plan):
                return self._difference_passes(step, plan)
            passes, reports_plain = "full", False
        if passes == "auto":
            passes = self._mixing.passes(step, self._buffers, self.layers)
        loss = step.clean_passes(step.plan(splits=passes == "split"))
        self._mixing.look_at(self._buffers)
        self._perturbed_passes(step, reports_plain)
        return loss

    def _state_of(self, layers: Layers, mark: bytes, device: torch.device) -> ForwardState:
        """Return what the forwards of the model move. A change of the model asks for a new one."""
        if layers.modules != self.layers.modules:
            self._state, self._mixing, self._names = None, MixingMemory(), None
        self.layers = layers
        if self._state is None or mark != self._mixing.mark:
            self._state, self._mixing.mark = ForwardState(layers.modules, device), mark
        return self._state

    def _perturbed_passes(self, step: GradientSum, reports_plain: bool) -> None:
        """Leave in ``.grad`` the sum of the summands' gradients, given those at the unperturbed weights."""
        perturbed = [summand for summand in step.summands if summand.rho > 0]
        if step.plain_ratio is not None:
            # That of this process, which may differ from others in what it can do without a backward pass.
            step.hold(None)
            plain = step.total(perturbed, step.plain_ratio)
            step.summands.insert(0, Summand(0.0, step.plain_terms(), gradient=plain))
        for summand in perturbed:
            step.find_norm(summand)
        for summand in step.summands:
            if summand.rho == 0:
                step.hold(summand)
                summand.norm = norms.gradient_norm(step.params, gradients_of(step.params)) if reports_plain else None
        if step.keeps_clean:
            step.keep_clean(perturbed)
        if perturbed:
            end = step.state.moment()
            self._weights.save(local_parts(step.params))
            for summand in perturbed:
                self._ascended_passes(step, summand, end)
            end.restore(step.state.returning)

    def _difference_passes(self, step: GradientSum, split_plan: Plan) -> Tensor:
        """Leave in ``.grad`` the gradient of ``"difference"``. Return the mean loss."""
        terms, whole = step.summands, Summand(0.0, list(range(len(step.batch[0].terms))))
        step.summands, step.is_difference = [whole], True
        loss = step.clean_passes(step.plan(splits=False))
        if step.keeps_clean:
            step.keep_clean([])
        step.summands = terms
        end = step.state.moment()
        self._weights.save(local_parts(step.params))
        for number, summand in enumerate(terms):
            if summand.rho > 0:
                plan = [[forward for forward in forwards if number in forward.shares] for forwards in split_plan]
                if any(plan):
                    step.clean_passes(plan, repeats=True)
                step.hold(None)
                whole.subtract(summand)
                step.find_norm(summand)
                step.hold(whole)
                self._ascended_passes(step, summand, end)
        end.restore(step.state.returning)
        step.summands = [whole, *(summand for summand in terms if summand.rho > 0)]
        return loss

    def _displaced_passes(self, step: GradientSum) -> Tensor:
        """Leave in ``.grad`` the gradient of a single term whose ascent needs no gradient. Return the mean loss.

        The only pass is at the ascended weights, so that it counts as the clean one.
        """
        assert self._ascender is not None
        self._weights.save(local_parts(step.params))
        self._ascender.ascend(step.summands[0])
        loss = step.clean_passes(step.plan(splits=False))
        self._weights.restore()
        return loss

    def _after_sum(
        self,
        step: GradientSum,
        synchronize: Callable[[], None] | None,
        combine: Combine | None,
        reuse: tuple[float, bool] | None,
    ) -> None:
        """Make the gradient for the optimizer from the sum of the terms' gradients."""
        assert self._ascender is not None
        if step.keeps_clean:
            after = AfterSum(step.params, step.clean_gradient(partial(synchronized, step.params, synchronize)))
            if reuse is not None:
                self._ascender.keep_difference(after)
            if combine is not None:
                self._ascender.combine(after, combine)
        elif reuse is not None and reuse[1]:
            self._ascender.reuse(AfterSum(step.params), reuse[0])

    def _weights_of(self, params: list[Tensor], optimizer: Optimizer | None) -> Callable[[], Weights]:
        """Return a function that finds the names and roles of parameters, which plain ascents do not need."""

        def find() -> Weights:
            if self._names is None or not self._names.knows(params):
                self._names = Names(self.layers.modules, params)
            return self._names.weights(params, optimizer, torch.initial_seed() if self.seed is None else self.seed)

        return find

    def _ascended_passes(self, step: GradientSum, summand: Summand, end: Moment) -> None:
        """Add to ``.grad`` the gradient of a summand at its ascended weights."""
        if not summand.passes and summand.ascent.is_plain:
            return
        assert self._ascender is not None
        self._ascender.ascend(summand)
        # Free the direction, because the passes need its memory.
        summand.gradient = None
        for clean in summand.passes:
            clean.met.restore(step.state.returning)
            losses = clean.sample_losses(clean.samples, False)
            if not step.state.is_sure and step.state.is_returning(end) and not step.is_difference:
                # The first perturbed forward shows what returns. So it has not met what its clean pass met.
                clean.met.restore(step.state.returning)
                losses = clean.sample_losses(clean.samples, False)
            loss = weighted_sum(losses, clean.weights)
            step.backward(loss, retain_graph=False)
            summand.sharpness = summand.sharpness + loss.detach()
            self._clean_buffers.restore()
        self._weights.restore()
