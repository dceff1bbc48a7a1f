"""The training step: batch to terms to gradient to optimizer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_ssesam.batches import Part, find_targets, pick_samples, terms_of_union
from lightning_ssesam.engine import MicroBatch, Outcome, SampleLosses
from lightning_ssesam.errors import NonFiniteError
from lightning_ssesam.exact_resume import ExactResume
from lightning_ssesam.lightning_internals import count_step, skips_backward
from lightning_ssesam.objectives import Objective
from lightning_ssesam.passes import Survey, choose_passes, survey
from lightning_ssesam.processes import Processes
from lightning_ssesam.step_options import StepOptions
from lightning_ssesam.step_state import StepState
from lightning_ssesam.targets import at_least_one, sum_counted
from lightning_ssesam.trainer_calls import (
    accumulates,
    between_forwards,
    callbacks_of,
    has_scaler,
    is_fitting,
    unscaled,
    zero_grad,
)
from lightning_ssesam.trainer_support import TrainerSupport


class SharpnessAwareMixin(pl.LightningModule):
    """Trains a ``LightningModule`` on a sharpness-aware objective.

    Put it first among the bases, set ``self.objective`` and define :meth:`sample_losses`; leave ``training_step`` to
    the mixin (docs/own_module.md). The step optimizes by hand, with one ``optimizer.step()`` per update; for everything
    else, Lightning works as under automatic optimization (see ``replace_step`` in ``lightning_internals.py``).

    Attributes:
        objective: The objective: :class:`~lightning_ssesam.ERM`, :class:`~lightning_ssesam.SAM`,
            :class:`~lightning_ssesam.ImbSAM`, :class:`~lightning_ssesam.SSESAM`, or your own
            :class:`~lightning_ssesam.Objective`.
        step_options: The options of a training step, a :class:`~lightning_ssesam.StepOptions`.
        skipped_updates: Number of updates that ``on_nonfinite="skip"`` has skipped; kept in checkpoints.

    Raises:
        MisconfigurationException: Before training, if ``objective``, its split or ``sample_losses`` is missing,
            ``step_options`` has another type, there are several optimizers, or the Trainer's strategy cannot work. At
            once, if ``automatic_optimization`` is assigned.
    """

    objective: Objective
    step_options: StepOptions = StepOptions()

    # What `to_torchscript` must leave out.
    __jit_ignored_attributes__ = ["objective", "step_options", "_step"]  # noqa: RUF012
    __jit_unused_properties__ = [*pl.LightningModule.__jit_unused_properties__, "in_clean_pass"]  # noqa: RUF012

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._step = StepState()
        self.skipped_updates = 0

    # Methods that a user defines or overrides.

    def sample_losses(self, batch: Any) -> Tensor:
        """Return the unreduced losses of a batch, shape ``(N,)``, or dense ``(N, ...)`` like the targets.

        Called once or more in a training step, at perturbed weights too. The values that it logs are logged once, from
        the clean pass, which is at the unperturbed weights. Guard anything else that must happen once, such as metrics,
        with :attr:`in_clean_pass`.
        """
        raise NotImplementedError(f"`{type(self).__name__}` must define `sample_losses(self, batch)`.")

    def sample_targets(self, batch: Any) -> Tensor:
        """Return the targets of a batch: class indices ``(N,)`` or ``(N, ...)``, or probabilities ``(N, C)``.

        Called once for each batch, and once for each selection of its samples. On an accelerator it is also called with
        the batch before its move to the device.

        The default is the second item of a pair, or ``batch["target"]``, ``batch["label"]`` or ``batch["labels"]``.
        Override it for other batches.
        """
        return find_targets(batch, type(self).__name__)

    def select_samples(self, batch: Any, index: Tensor) -> Any:
        """Return the batch with only the samples at ``index`` ``(M,)``, a CPU tensor. Passes over some samples call it.

        The default picks the rows of every tensor, at any nesting, that has one row per sample. It also picks the items
        of lists of plain values (file names) that have one per sample. Override it for other batches, or if another
        tensor happens to have as many rows as there are samples.
        """
        return pick_samples(batch, index, len(self.sample_targets(batch)))

    @property
    def in_clean_pass(self) -> bool:
        """Whether a training step is calling :meth:`sample_losses` at the unperturbed weights.

        Each sample is seen once there, in one call for each group of samples (split passes) and each accumulated batch.
        """
        return self._step.is_clean is True

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Let :meth:`sample_losses` be called between steps, to measure: it logs nothing."""
        with self._step.having(is_clean=False):
            yield

    # The training step.

    @property
    def automatic_optimization(self) -> bool:
        """False within a training step, which makes its passes by hand, and outside of a fit. Otherwise True.

        So Lightning does clipping, accumulation, schedulers, logged rows and checkpoints as usual.
        """
        return self._step.is_fitting and not self._step.is_by_hand

    @automatic_optimization.setter
    def automatic_optimization(self, value: bool) -> None:
        raise MisconfigurationException(
            f"`{type(self).__name__}` uses SharpnessAwareMixin, which optimizes manually: do not set"
            " `automatic_optimization`."
        )

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Update the weights once. Log the clean loss as ``train/loss``, unless the user has logged that.

        With ``Trainer(accumulate_grad_batches=k)``, batches are kept, and the last of ``k`` makes one update for all of
        them. Gradients are freed when the step is done; ``on_before_optimizer_step`` sees them.

        Returns:
            The mean loss of the samples at the unperturbed weights, a detached scalar; None for a batch that is kept.
        """
        self._check_supported()
        step = self._step
        step.has_stepped = True
        step.logs.clear()
        if skips_backward(self.trainer):
            return self._forward_only(batch)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            # An epoch that was cut short may have left some over.
            step.pending = []
        part = Part(batch, step.host_targets.of(self.sample_targets(batch)))
        if accumulates(self.trainer, batch_idx):
            step.pending.append(part.clone())
            return None
        parts, step.pending = [*step.pending, part], []
        with between_forwards(self.trainer, step.outer_dtype):
            return self._update(parts, batch_idx)

    def _update(self, parts: list[Part], batch_idx: int) -> Tensor:
        # At the end of an epoch there may be fewer parts, and Lightning divides their gradients by k all the same.
        share, layers = len(parts) / self.trainer.accumulate_grad_batches, survey(self)
        try:
            with self._step.having(is_clean=None):
                outcome = self._find_gradient(parts, share, layers)
        except NonFiniteError as error:
            self._skip_or_raise(error)
            return error.loss
        optimizer, steps = self.optimizers(), self.trainer.global_step
        assert not isinstance(optimizer, list)
        with self._step.having(is_by_hand=False):
            self.optimizer_step(self.current_epoch, batch_idx, optimizer, lambda: outcome.loss)
        if self.trainer.global_step == steps:
            # An override may make no step with the optimizer; Lightning counts it all the same.
            count_step(self.trainer)
        # Free the gradients now: until the next step they would only take up memory.
        zero_grad(self.trainer, batch_idx)
        for p in layers.parameters:
            if p.grad is not None:
                p.grad = None
        self._log_outcome(outcome, sum(map(len, parts)), share)
        return outcome.loss

    def _find_gradient(self, parts: list[Part], share: float, layers: Survey) -> Outcome:
        """Leave in ``.grad`` the gradient of the objective on several parts together."""
        options, processes = self.step_options, Processes(self.trainer.strategy)
        shares = processes.size > 1 and options.processes == "global"
        gather = partial(processes.gather, ignore_index=self.objective.ignore_index) if shares else None
        terms = terms_of_union(self.objective, [part.targets for part in parts], gather)
        if (self.trainer.global_step + 1) % options.interval:
            terms = [[term._replace(rho=0.0) for term in terms_of_part] for terms_of_part in terms]
        # An optimizer may train parameters that are not the module's.
        others = [p for group in self.trainer.optimizers[0].param_groups for p in group["params"]]
        checks = options.on_nonfinite != "ignore" and not has_scaler(self.trainer)
        return self._step.engine.compute(
            [
                MicroBatch(self._losses_of(part), terms[number], self.objective.find_ignored(part.targets))
                for number, part in enumerate(parts)
            ],
            list({id(p): p for p in (*layers.parameters, *others)}.values()),
            layers.modules,
            processes.backward(partial(self._backward, share=share)),
            choose_passes(self, layers, options, processes),
            synchronize=processes.synchronize,
            processes=options.processes,
            check_finite=processes.all_agree if checks else None,
            report=options.log_sharpness,
        )

    def _backward(self, loss: Tensor, retain_graph: bool, share: float) -> None:
        # An override of `backward` may take no arguments, and needs none for a single term.
        options = {"retain_graph": True} if retain_graph else {}
        self.manual_backward(loss if share == 1 else share * loss, **options)

    def _losses_of(self, part: Part) -> SampleLosses:
        def sample_losses(index: Tensor | None, is_clean: bool) -> Tensor:
            chosen = part if index is None else self._select(part, index)
            # Kept until the next pass begins, since the backward may forward again (activation checkpointing).
            self._step.is_clean = is_clean
            self._step.logs.samples = len(chosen)
            with self.trainer.precision_plugin.train_step_context():
                return self.sample_losses(chosen.batch)

        return sample_losses

    def _select(self, part: Part, index: Tensor) -> Part:
        """Return some samples of a part."""
        if type(self).select_samples is SharpnessAwareMixin.select_samples:
            batch = pick_samples(part.batch, index, len(part))
        else:
            batch = self.select_samples(part.batch, index)
        chosen = Part(batch, self.sample_targets(batch))
        if len(chosen) != len(index):
            raise MisconfigurationException(
                f"`{type(self).__name__}.select_samples` was asked for {len(index)} samples, but `sample_targets` finds"
                f" {len(chosen)} targets in the batch that it returned. Override both so that they agree."
            )
        return chosen

    def _forward_only(self, batch: Any) -> Tensor:
        part = Part(batch, self.sample_targets(batch))
        with torch.no_grad(), self._step.having(is_clean=None):
            losses, count = sum_counted(self._losses_of(part)(None, True), self.objective.find_ignored(part.targets))
            loss = losses / at_least_one(count)
        self._log_outcome(Outcome(loss), len(part))
        return loss

    def _skip_or_raise(self, error: NonFiniteError) -> None:
        if self.step_options.on_nonfinite == "raise":
            raise NonFiniteError(
                f"The loss or the gradient of step {self.global_step} is infinite or not a number. Weights, buffers and"
                " optimizer are as before the step. Look at the data of the step, lower the learning rate or"
                " the radii, or set `on_nonfinite='skip'` to go on without such steps.",
                error.loss,
            ) from None
        self.skipped_updates += 1
        if self.skipped_updates == 1:
            rank_zero_info(f"The update of step {self.global_step} is skipped: its loss or gradient is not finite.")
        count_step(self.trainer)
        self.log("train/skipped_updates", float(self.skipped_updates))

    # Logging.

    @override
    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log as ``LightningModule.log`` does, but each value once a step: from the clean passes.

        Perturbed passes log nothing. A value that :meth:`sample_losses` logs for several groups of samples (split
        passes) or batches (accumulation) becomes one: the mean over the samples, or what ``reduce_fx`` makes of them.
        For a ``Metric`` object, the epoch's value is exact and the step's value is that of the last group.
        """
        if self._step.is_clean:
            self._step.logs.add(name, value, *args, **kwargs)
        elif self._step.is_clean is None:
            super().log(name, value, *args, **kwargs)

    def _log_outcome(self, outcome: Outcome, size: int, share: float = 1.0) -> None:
        options, names = self.step_options, self._step.logs.flush(super().log)
        if outcome.note is not None:
            rank_zero_info(f"`passes='auto'` forwards the whole batch in every pass: {outcome.note}.")
        if "train/loss" not in names and size > 0:
            self.log("train/loss", outcome.loss, batch_size=size)
            self._step.loss_on_bar = outcome.loss
        if options.on_nonfinite == "skip":
            self.log("train/skipped_updates", float(self.skipped_updates))
        if options.batch_norm_statistics == "group" and any(rise is not None for rise in outcome.sharpness):
            # Made on the device, because copying a number there would wait for it.
            share_of_full = torch.full((), float(not outcome.is_difference), device=self.device)
            self.log("train/full_passes", share_of_full, on_step=False, on_epoch=True)
        if not options.log_sharpness or outcome.gradient_norm is None:
            return
        values = {"train/grad_norm": unscaled(self.trainer, outcome.gradient_norm)}
        terms, number = self.objective.term_names, len(outcome.sharpness)
        terms = terms if len(terms) == number else tuple(map(str, range(number)))
        for term, norm, rise in zip(terms, outcome.gradient_norms, outcome.sharpness, strict=True):
            if norm is not None:
                values[f"train/grad_norm_{term}"] = unscaled(self.trainer, norm) / share
            if rise is not None:
                values[f"train/sharpness_{term}"] = rise
        self.log_dict(values, batch_size=size, sync_dist=self.trainer.world_size > 1)

    # When a run starts.

    @override
    def configure_callbacks(self) -> list[Callback]:
        """Called when a run starts: check the module, and attach the callbacks that it needs.

        An override must return ``[*super().configure_callbacks(), ...]``.
        """
        callbacks = super().configure_callbacks()
        callbacks = list(callbacks) if isinstance(callbacks, Sequence) else [callbacks]
        if is_fitting(self):
            self._check_class()
            self._step.begin()
        attached = callbacks_of(self.trainer)
        if not any(isinstance(callback, TrainerSupport) and callback.module is self for callback in attached):
            callbacks.append(TrainerSupport(self, self._step))
        # Options of another type are refused later, when the module is set up.
        wants_resume = getattr(self.step_options, "exact_resume", False)
        if wants_resume and not any(isinstance(c, ExactResume) and c.module is self for c in attached):
            callbacks.append(ExactResume(self))
        return callbacks

    def _check_supported(self) -> None:
        name = type(self).__name__
        if not is_fitting(self):
            raise MisconfigurationException(
                f"`{name}.training_step` makes an update and needs `Trainer.fit` around it. Call"
                " `sample_losses(batch)` for the losses of a batch."
            )
        # TrainerSupport sets this around every step.
        if not self._step.is_by_hand:
            raise MisconfigurationException(
                f"`{name}.configure_callbacks` overrides SharpnessAwareMixin's and drops its callbacks. Return"
                " `[*super().configure_callbacks(), ...]` from it."
            )

    def _check_class(self) -> None:
        name = type(self).__name__
        if type(self).sample_losses is SharpnessAwareMixin.sample_losses:
            raise MisconfigurationException(
                f"`{name}` uses SharpnessAwareMixin and must define `sample_losses(self, batch)`, which returns the"
                " unreduced losses (N,) of a batch."
            )
        if "_step" not in vars(self):
            raise MisconfigurationException(
                f"`{name}` uses SharpnessAwareMixin: call `super().__init__()` in its `__init__`."
            )
