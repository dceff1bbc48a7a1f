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

from lightning_ssesam.batches import (
    Part,
    SkippedPart,
    checked_losses,
    find_targets,
    losses_of,
    select_part,
    skipped_by_one,
    terms_of_union,
)
from lightning_ssesam.engine import MicroBatch, Outcome, SampleLosses
from lightning_ssesam.errors import NonFiniteError
from lightning_ssesam.exact_resume import ExactResume
from lightning_ssesam.graph_step import GraphStep
from lightning_ssesam.layers import Layers, survey
from lightning_ssesam.lightning_internals import count_step, skips_backward
from lightning_ssesam.module_checks import check_bases, check_class, check_count, check_step
from lightning_ssesam.optimizer_closure import OptimizerClosure
from lightning_ssesam.passes import choose_passes
from lightning_ssesam.processes import Processes
from lightning_ssesam.selection import SelectionError, pick_samples
from lightning_ssesam.step_logs import norms_and_sharpness
from lightning_ssesam.step_options import StepOptions
from lightning_ssesam.step_state import StepState
from lightning_ssesam.targets import at_least_one, sum_counted
from lightning_ssesam.tensors import set_gradients
from lightning_ssesam.terms import Objective, Term, is_perturbed, unperturbed
from lightning_ssesam.trainer_calls import (
    accumulates,
    between_forwards,
    callbacks_of,
    has_scaler,
    has_several_loaders,
    is_fitting,
    loss_scale,
    trained_parameters,
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
        objective: The objective, such as :class:`~lightning_ssesam.SSESAM`, or your own
            :class:`~lightning_ssesam.Objective`.
        step_options: The options of a training step, a :class:`~lightning_ssesam.StepOptions`.
        skipped_updates: Number of updates that ``on_nonfinite="skip"`` has skipped; kept in checkpoints.

    Raises:
        MisconfigurationException: Before training, if ``objective``, its split or ``sample_losses`` is missing,
            ``step_options`` has another type, an attribute takes a name of the mixin's, there are several optimizers,
            or the strategy cannot work. At the first update, if the optimizer needs gradients at other weights. At
            once, if ``automatic_optimization`` is assigned, or a base class is of ``pytorch_lightning``.
    """

    objective: Objective
    step_options: StepOptions = StepOptions()
    # What `to_torchscript` must leave out.
    __jit_ignored_attributes__ = ["objective", "step_options"]  # noqa: RUF012
    __jit_unused_properties__ = [*pl.LightningModule.__jit_unused_properties__, "in_clean_pass", "skipped_updates"]  # noqa: RUF012

    # Private names have two underscores: Python puts the class's name before them, so that no attribute or method of a
    # user's module takes their place.

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_bases(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__step = StepState()

    # Methods that a user defines or overrides.

    def sample_losses(self, batch: Any) -> Tensor:
        """Return the unreduced losses of a batch, shape ``(N,)``, or dense ``(N, ...)`` like the targets.

        Called once or more in a training step, at perturbed weights too. The values that it logs are logged once, from
        the clean pass, which is at the unperturbed weights. Guard anything else that must happen once, such as metrics,
        with :attr:`in_clean_pass`.

        With a second parameter named ``batch_idx``, it also gets the number of the batch. Return None to skip a bad
        batch, as from ``training_step`` under automatic optimization.
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

        The default picks the rows of every tensor and array, at any nesting, that has one row per sample. It also picks
        the items of lists that have one per sample, such as file names or images of several sizes. Override it for
        other batches, or if another tensor happens to have as many rows as there are samples.

        Raises:
            MisconfigurationException: If the default cannot tell what belongs to which sample (docs/own_module.md).
        """
        return pick_samples(batch, index, len(self.sample_targets(batch)), type(self).__name__)

    @property
    def in_clean_pass(self) -> bool:
        """Whether a training step is calling :meth:`sample_losses` at the unperturbed weights.

        Each sample is seen once there, in one call for each group of samples (split passes) and each accumulated batch.
        """
        return self.__step.is_clean is True

    @property
    def skipped_updates(self) -> int:
        """Number of updates that were skipped, because a loss or gradient was not finite."""
        return self.__step.skipped_updates

    @skipped_updates.setter
    def skipped_updates(self, value: int) -> None:
        self.__step.skipped_updates = check_count("skipped_updates", value)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Let :meth:`sample_losses` be called between steps, to measure: it logs nothing."""
        with self.__step.having(is_clean=False):
            yield

    # The training step.

    @property
    def automatic_optimization(self) -> bool:
        """False within a training step, which makes its passes by hand, and outside of a fit. Otherwise True.

        So Lightning does clipping, accumulation, schedulers, logged rows and checkpoints as usual.
        """
        return self.__step.is_fitting and not self.__step.is_by_hand

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
            The mean loss of the samples at the unperturbed weights, a detached scalar; None for a batch that is kept or
            skipped.
        """
        step = self.__step
        # TrainerSupport sets this around every step.
        check_step(self, step.is_by_hand)
        step.has_seen_batch = True
        step.logs.clear()
        if skips_backward(self.trainer):
            return self.__forward_only(batch, batch_idx)
        targets = self.objective.positions(step.host_targets.of(self.sample_targets(batch)))
        return self.__keep(Part(batch, targets, batch_idx), batch_idx)

    def __skip_batch(self, batch_idx: int) -> None:
        """Called for a batch that an override of ``training_step`` keeps from the mixin: update for those before."""
        self.__step.logs.clear()
        if self.trainer.world_size > 1:
            raise skipped_by_one(type(self).__name__)
        if not skips_backward(self.trainer):
            self.__keep(None, batch_idx)

    def __keep(self, part: Part | None, batch_idx: int) -> Tensor | None:
        """Keep a part, if there is one. Update if no other batch belongs to the update."""
        step, waits = self.__step, accumulates(self.trainer, batch_idx)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            # An epoch that was cut short may have left some over.
            step.pending = []
        if part is not None:
            step.pending.append(part.clone() if waits else part)
        return None if waits else self.__update(batch_idx)

    def __update(self, batch_idx: int) -> Tensor | None:
        """Update the weights for the batches that are kept. Return their loss; None if the last one is skipped."""
        step, trainer = self.__step, self.trainer
        parts, step.pending = step.pending, []
        layers, outcome, last = survey(self, step.engine.layers), None, parts[-1] if parts else None
        trained = trained_parameters(trainer, layers.parameters)
        with between_forwards(trainer, step.outer_dtype):
            try:
                with step.having(is_clean=None):
                    while parts and outcome is None:
                        try:
                            # There may be fewer parts at last. Lightning divides their gradients by k all the same.
                            share = len(parts) / trainer.accumulate_grad_batches
                            outcome = self.__find_gradient(parts, share, layers, trained)
                        except SkippedPart as skipped:
                            step.logs.clear()
                            parts = [part for part in parts if part is not skipped.part]
            except NonFiniteError as error:
                self.__skip_or_raise(error)
                return error.loss
            self.__step_optimizer(None if outcome is None else outcome.loss, batch_idx, layers, trained)
            if outcome is None:
                return None
            self.__log_outcome(outcome, sum(map(len, parts)), share)
        return outcome.loss if parts[-1] is last else None

    def __step_optimizer(self, loss: Tensor | None, batch_idx: int, layers: Layers, trained: list[Tensor]) -> None:
        """Let the optimizer move the weights, through the hooks of automatic optimization."""
        step, trainer, optimizer = self.__step, self.trainer, pl.LightningModule.optimizers(self)
        assert not isinstance(optimizer, list)
        steps, closure = trainer.global_step, OptimizerClosure(loss, trained, is_first=not step.has_updated)
        with step.having(is_by_hand=False), closure.watch():
            self.optimizer_step(trainer.current_epoch, batch_idx, optimizer, closure)
        step.has_updated = True
        if trainer.global_step == steps:
            # An override may make no step with the optimizer; Lightning counts it all the same.
            count_step(trainer)
        # Free the gradients now: until the next step they would only take up memory.
        zero_grad(trainer, batch_idx)
        set_gradients(layers.parameters, None)

    def __find_gradient(self, parts: list[Part], share: float, layers: Layers, trained: list[Tensor]) -> Outcome:
        """Leave in ``.grad`` the gradient of the objective on several parts together."""
        trainer, options, objective = self.trainer, self.step_options, self.objective
        processes = Processes(trainer.strategy)
        shares = processes.size > 1 and options.processes == "global"
        gather = partial(processes.gather, ignore_index=objective.ignore_index) if shares else None
        terms = terms_of_union(objective, [part.targets for part in parts], gather)
        reuse = options.reuse if is_perturbed(terms[0]) else None
        if not options.perturbs(trainer.global_step, self.__step.engine.can_reuse(objective)):
            terms = [unperturbed(own) for own in terms]
        checks = options.on_nonfinite != "ignore" and not has_scaler(trainer)
        compute = partial(
            self.__step.engine.compute,
            parameters=trained,
            modules=layers,
            backward=processes.backward(partial(self.__backward, share=share)),
            passes=choose_passes(self, layers, options, processes),
            synchronize=processes.synchronize,
            processes=options.processes,
            objective=objective,
            optimizer=trainer.optimizers[0],
            loss_scale=loss_scale(trainer, share),
            reuse=reuse,
        )
        if options.cuda_graphs:
            graphed = GraphStep(self, self.__step, layers, trained, checks)
            compute = partial(compute, report=options.log_sharpness or checks)
            return graphed.compute(parts, terms, self.__micro_batch, compute, (options, share, reuse))
        batch = list(map(self.__micro_batch, parts, terms, (objective.find_ignored(part.targets) for part in parts)))
        return compute(batch, check_finite=processes.all_agree if checks else None, report=options.log_sharpness)

    def __micro_batch(self, part: Part, terms: Sequence[Term], *more: Any) -> MicroBatch:
        return MicroBatch(self.__losses_of(part, terms[0].weights), terms, *more)

    def __backward(self, loss: Tensor, retain_graph: bool, share: float) -> None:
        # An override of `backward` may take no arguments, and needs none for a single term.
        options = {"retain_graph": True} if retain_graph else {}
        type(self).manual_backward(self, loss if share == 1 else share * loss, **options)

    def __losses_of(self, part: Part, weights: Tensor) -> SampleLosses:
        def sample_losses(index: Tensor | None, is_clean: bool) -> Tensor:
            chosen = part if index is None else select_part(part, index, self.__select(part, index), self)
            # Kept until the next pass begins, since the backward may forward again (activation checkpointing).
            self.__step.is_clean = is_clean
            self.__step.logs.samples = len(chosen)
            with self.trainer.precision_plugin.train_step_context():
                losses = losses_of(self, chosen.batch, chosen.batch_idx)
            checked: Tensor = checked_losses(losses, part, chosen, weights.shape[1:], self)
            return checked

        return sample_losses

    def __select(self, part: Part, index: Tensor) -> Any:
        """Return the batch of a part with only some samples."""
        if getattr(self.select_samples, "__func__", None) is not SharpnessAwareMixin.select_samples:
            return self.select_samples(part.batch, index)
        owner = type(self).__name__
        if has_several_loaders(self.trainer, part.batch):
            raise SelectionError("A batch joins those of several loaders, which have no samples in common.", owner)
        return pick_samples(part.batch, index, len(part), owner)

    def __forward_only(self, batch: Any, batch_idx: int) -> Tensor | None:
        part = Part(batch, self.objective.positions(self.sample_targets(batch)), batch_idx)
        try:
            with torch.no_grad(), self.__step.having(is_clean=None):
                losses = self.__losses_of(part, part.targets)(None, True)
        except SkippedPart:
            return None
        total, count = sum_counted(losses, self.objective.find_ignored(part.targets))
        loss: Tensor = total / at_least_one(count)
        self.__log_outcome(Outcome(loss), len(part))
        return loss

    def __skip_or_raise(self, error: NonFiniteError) -> None:
        if self.step_options.on_nonfinite == "raise":
            raise NonFiniteError(
                f"The loss or the gradient of step {self.trainer.global_step} is infinite or not a number. Weights,"
                " buffers and optimizer are as before the step. Look at the data of the step, lower the learning rate"
                " or the radii, or set `on_nonfinite='skip'` to go on without such steps.",
                error.loss,
            ) from None
        self.skipped_updates += 1
        if self.skipped_updates == 1:
            rank_zero_info(
                f"The update of step {self.trainer.global_step} is skipped: its loss or gradient is not finite."
            )
        count_step(self.trainer)
        type(self).log(self, "train/skipped_updates", float(self.skipped_updates))

    # Logging.

    @override
    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log as ``LightningModule.log`` does, but each value once a step: from the clean passes.

        Perturbed passes log nothing. A value that :meth:`sample_losses` logs for several groups of samples (split
        passes) or batches (accumulation) becomes one: the mean over the samples, or what ``reduce_fx`` makes of them.
        For a ``Metric`` object, the epoch's value is exact and the step's value is that of the last group.
        """
        step = self.__step
        if step.is_clean:
            step.logs.add(self, name, value, *args, **kwargs)
        elif step.is_clean is None:
            super().log(name, value, *args, **kwargs)
            if step.is_by_hand:
                step.logs.note(self, name, value, *args, **kwargs)

    def __log_outcome(self, outcome: Outcome, size: int, share: float = 1.0) -> None:
        options, names = self.step_options, self.__step.logs.flush(super().log)
        if outcome.note is not None:
            rank_zero_info(f"`passes='auto'` forwards the whole batch in every pass: {outcome.note}.")
        # Not `self.log`, because a module may have a logger of that name.
        log = partial(type(self).log, self)
        if options.log_loss and "train/loss" not in names and size > 0:
            log("train/loss", outcome.loss, batch_size=size)
            self.__step.loss_on_bar = outcome.loss
        if options.on_nonfinite == "skip":
            log("train/skipped_updates", float(self.skipped_updates))
        if options.batch_norm_statistics == "group" and any(rise is not None for rise in outcome.sharpness):
            # Made on the device, because copying a number there would wait for it.
            share_of_full = torch.full((), float(not outcome.is_difference), device=outcome.loss.device)
            log("train/full_passes", share_of_full, on_step=False, on_epoch=True)
        if not options.log_sharpness or outcome.gradient_norm is None:
            return
        values = norms_and_sharpness(outcome, self.objective.term_names, partial(unscaled, self.trainer), share)
        for name, value in values.items():
            log(name, value, batch_size=size, sync_dist=self.trainer.world_size > 1)

    # When a run starts.

    @override
    def configure_callbacks(self) -> list[Callback]:
        """Called when a run starts: check the module, and attach the callbacks that it needs.

        An override must return ``[*super().configure_callbacks(), ...]``.
        """
        callbacks = super().configure_callbacks()
        callbacks = list(callbacks) if isinstance(callbacks, Sequence) else [callbacks]
        if is_fitting(self):
            check_class(self, SharpnessAwareMixin)
            self.__step.begin()
        attached = callbacks_of(self.trainer)
        if not any(isinstance(callback, TrainerSupport) and callback.module is self for callback in attached):
            callbacks.append(TrainerSupport(self, self.__step, self.__skip_batch))
        # Options of another type are refused later, when the module is set up.
        wants_resume = getattr(self.step_options, "exact_resume", False)
        if wants_resume and not any(isinstance(c, ExactResume) and c.module is self for c in attached):
            callbacks.append(ExactResume(self))
        return callbacks
