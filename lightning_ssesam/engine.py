"""From terms to the gradient, in the fewest passes over the model. Needs torch only."""

import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lightning_ssesam._validation import bad_argument, check_choice
from lightning_ssesam.ascent import ascend, gradient_norm
from lightning_ssesam.errors import NonFiniteError
from lightning_ssesam.forward_state import ForwardState, Moment
from lightning_ssesam.gradient_sum import GradientSum, Summand, weighted_sum
from lightning_ssesam.mixing import counts_batch, why_not_apart
from lightning_ssesam.plan import Forward, MicroBatch, Plan, SampleLosses, divides_batch, group_terms
from lightning_ssesam.snapshots import BufferSnapshot, Snapshot, buffers_of
from lightning_ssesam.tensors import gradients_of, is_sharded, local_part, set_gradients

Passes = Literal["auto", "full", "split", "difference"]

_NOT_FINITE = "a loss is infinite or not a number"

__all__ = ["MicroBatch", "NonFiniteError", "Outcome", "SampleLosses", "SharpnessEngine"]


class Outcome(NamedTuple):
    """Results of one step, as detached scalars on the model's device.

    Args:
        loss: Mean loss of the batch at the unperturbed weights; 0 for an empty batch.
        gradient_norm: Norm of the final gradient, if asked for.
        gradient_norms: Norm of each term's gradient at the unperturbed weights. With ``processes="global"`` it is that
            of all processes together. None if it was not needed, or if the term shares its backward pass.
        sharpness: Loss of each term at the ascended weights minus its loss at the unperturbed ones, in this process.
            None for a term of radius 0.
        is_difference: Whether the passes were those of ``"difference"``.
        note: With ``passes="auto"``, why passes are full from this step on, if this step has found that out.
    """

    loss: Tensor
    gradient_norm: Tensor | None = None
    gradient_norms: Sequence[Tensor | None] = ()
    sharpness: Sequence[Tensor | None] = ()
    is_difference: bool = False
    note: str | None = None


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

    def release(self) -> None:
        """Free the scratch memory."""
        self._weights = Snapshot()
        self._buffers = BufferSnapshot()
        self._clean_buffers = BufferSnapshot()
        self._start: Moment | None = None
        self._state: ForwardState | None = None
        self._modules: list[nn.Module] = []
        self._mark = 0
        self._mixes: dict[int, bool] = {}
        self._note: str | None = None

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
    ) -> Outcome:
        r"""Run the passes of one step.

        Args:
            batch: Parts of the batch. All clean passes come before the first perturbed pass, unless ``passes`` is
                ``"difference"``. If no layer mixes samples, the result is that of the whole batch. Memory holds the
                activations of one part at a time.
            parameters: The model's parameters. Those that do not require a gradient are left alone.
            modules: The model, or all of its modules (``net.modules()``). A perturbed pass meets the buffers and other
                tensors that its clean pass met, and leaves none of them moved.
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

        Returns:
            The mean loss, gradient norms and sharpness.

        Raises:
            ArgumentError: If an argument is out of range, or the losses do not have the shape of the weights.
            NonFiniteError: If ``check_finite`` returns False.
        """
        check_choice("passes", passes, get_args(Passes))
        check_choice("processes", processes, ("global", "local"))
        summands = [Summand(rho, terms) for rho, terms in group_terms(batch)]
        parameters = list(parameters)
        params = [p for p in parameters if p.requires_grad]
        if not params:
            raise bad_argument("parameters", "at least one that requires a gradient", got_text="none")
        modules = list(modules.modules() if isinstance(modules, nn.Module) else modules)
        buffers = buffers_of(modules)
        mark = bytes([module.training for module in modules]) + bytes([p.requires_grad for p in parameters])
        state = self._state_of(modules, zlib.crc32(mark + bytes([len(b) % 256 for b in buffers])), params[0].device)
        is_perturbed = any(summand.rho > 0 for summand in summands)
        self._start = start = state.everything() if state.is_new and is_perturbed else state.moment()
        self._buffers.save_buffers(buffers)
        shared = synchronize if processes == "global" else None
        step = GradientSum(batch, params, buffers, backward, summands, shared, state, start, self._clean_buffers)
        gradients = gradients_of(params)
        try:
            if any(gradient is not None for gradient in gradients):
                set_gradients(params, None)
            loss = self._all_passes(step, passes, reports_plain=report and synchronize is None)
            if synchronize is not None:
                synchronize()
            norm = gradient_norm(params, gradients_of(params)) if report or check_finite else None
            if check_finite and norm is not None and not check_finite(bool(loss.isfinite()) and bool(norm.isfinite())):
                raise NonFiniteError("The loss or the gradient is infinite or not a number.", loss)
        except BaseException:
            self._forget_note()
            self._weights.restore()
            start.restore()
            self._buffers.restore()
            set_gradients(params, gradients)
            raise
        finally:
            self._start = None
            self._weights.forget()
            self._buffers.forget()
            self._clean_buffers.forget()
        note, self._note = self._note, None
        return _outcome(step, loss, norm)._replace(note=note)

    def _all_passes(self, step: GradientSum, passes: str, reports_plain: bool) -> Tensor:
        """Leave in ``.grad`` the gradient of a step. Return the mean loss."""
        if passes == "difference":
            plan = step.plan(splits=True)
            if divides_batch(plan):
                return self._difference_passes(step, plan)
            passes, reports_plain = "full", False
        if passes == "auto":
            passes = self._measured_passes(step)
        loss = step.clean_passes(step.plan(splits=passes == "split"))
        if self._mixes.get(self._mark) is False and self._buffers.has_moved():
            self._mixes[self._mark], self._note = True, "a forward has changed a buffer"
        self._perturbed_passes(step, reports_plain)
        return loss

    def _measured_passes(self, step: GradientSum) -> Literal["full", "split"]:
        """Return the passes of ``"auto"``. Where they are not known, forward a part of the batch to find out."""
        if self._mark not in self._mixes:
            pairs = zip(step.batch, step.plan(splits=True), strict=True)
            part, groups = next((pair for pair in pairs if len(pair[1]) > 1), (None, []))
            if part is None or step.device.type == "meta":
                # There is nothing to compare.
                return "split"
            try:
                with torch.no_grad():
                    reason = self._why_full(step, part, groups)
            finally:
                step.start.restore()
                self._buffers.restore()
                # Autocast keeps the copies of weights that it has made without gradients.
                torch.clear_autocast_cache()
            if reason is _NOT_FINITE:
                # The next batch may tell.
                return "full"
            self._mixes[self._mark], self._note = reason is not None, reason
        return "full" if self._mixes[self._mark] else "split"

    def _why_full(self, step: GradientSum, part: MicroBatch, groups: list[Forward]) -> str | None:
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
        if self._buffers.differs():
            return "a forward changes buffers"
        if state.moves_parameters:
            return "a forward moves parameters that are not trained"
        if counts_batch(self._modules):
            return "an embedding with `scale_grad_by_freq` counts the whole batch"
        if not bool(losses.isfinite().all()):
            return _NOT_FINITE
        return why_not_apart(part, groups, losses, step.start)

    def _forget_note(self) -> None:
        """Forget what a step has found out that failed: it may come of the fault."""
        if self._note is not None:
            self._mixes.pop(self._mark, None)
        self._note = None

    def _state_of(self, modules: list[nn.Module], mark: int, device: torch.device) -> ForwardState:
        """Return what the forwards of the model move. A change of the model asks for a new one."""
        if modules != self._modules:
            self._state, self._modules, self._mixes = None, modules, {}
        if self._state is None or mark != self._mark:
            self._state, self._mark = ForwardState(modules, device), mark
        return self._state

    def _perturbed_passes(self, step: GradientSum, reports_plain: bool) -> None:
        """Leave in ``.grad`` the sum of the summands' gradients, given those at the unperturbed weights."""
        perturbed = [summand for summand in step.summands if summand.rho > 0]
        for summand in perturbed:
            step.find_norm(summand)
        for summand in step.summands:
            if summand.rho == 0:
                step.hold(summand)
                summand.norm = gradient_norm(step.params, gradients_of(step.params)) if reports_plain else None
        if perturbed:
            end = step.state.moment()
            self._weights.save([local_part(p) for p in step.params])
            for summand in perturbed:
                self._ascended_passes(step, summand, end)
            end.restore(step.state.returning)

    def _difference_passes(self, step: GradientSum, split_plan: Plan) -> Tensor:
        """Leave in ``.grad`` the gradient of ``"difference"``. Return the mean loss."""
        terms, whole = step.summands, Summand(0.0, list(range(len(step.batch[0].terms))))
        step.summands, step.is_difference = [whole], True
        loss = step.clean_passes(step.plan(splits=False))
        step.summands = terms
        end = step.state.moment()
        self._weights.save([local_part(p) for p in step.params])
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

    def _ascended_passes(self, step: GradientSum, summand: Summand, end: Moment) -> None:
        """Add to ``.grad`` the gradient of a summand at its ascended weights."""
        if not summand.passes:
            return
        assert summand.gradient is not None
        assert summand.norm is not None
        ascend(step.params, summand.gradient, summand.norm, summand.rho)
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


def _outcome(step: GradientSum, loss: Tensor, norm: Tensor | None) -> Outcome:
    number_of_terms = len(step.batch[0].terms)
    norms: list[Tensor | None] = [None] * number_of_terms
    sharpness: list[Tensor | None] = [None] * number_of_terms
    for summand in step.summands:
        if len(summand.terms) == 1:
            norms[summand.terms[0]] = summand.norm
        if summand.rho > 0:
            sharpness[summand.terms[0]] = loss.new_zeros(()) + summand.sharpness
    return Outcome(loss, norm, norms, sharpness, step.is_difference)
