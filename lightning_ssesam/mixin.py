"""The training step: batch to terms to gradient to optimizer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from lightning_ssesam.batches import HostTargets, clone_tensors, find_targets, pick_samples, terms_of_union
from lightning_ssesam.distributed import Processes
from lightning_ssesam.engine import MicroBatch, Outcome, SampleLosses, SharpnessEngine
from lightning_ssesam.errors import NonFiniteError
from lightning_ssesam.lightning_loops import (
    accumulates,
    between_forwards,
    count_step,
    has_scaler,
    is_compiled,
    skips_backward,
    unscaled,
    zero_grad,
)
from lightning_ssesam.objectives import Objective
from lightning_ssesam.snapshots import Buffers
from lightning_ssesam.step_logs import StepLogs
from lightning_ssesam.step_options import StepOptions
from lightning_ssesam.trainer_support import TrainerSupport


class SharpnessAwareMixin(pl.LightningModule):
    """Trains a ``LightningModule`` on a sharpness-aware objective.

    Put it first among the bases, set ``self.objective`` and define :meth:`sample_losses`; leave ``training_step`` to
    the mixin. It uses Lightning's manual optimization and makes one ``optimizer.step()`` per update, so that
    ``global_step``, schedulers and callbacks count as they do under automatic optimization.

    Attributes:
        objective: What to optimize: :class:`~lightning_ssesam.ERM`, :class:`~lightning_ssesam.SAM`,
            :class:`~lightning_ssesam.ImbSAM`, :class:`~lightning_ssesam.SSESAM`, or an
            :class:`~lightning_ssesam.Objective` of your own.
        step_options: How to make a step, a :class:`~lightning_ssesam.StepOptions`; the defaults if it is not set.
        skipped_updates: Number of updates that ``on_nonfinite="skip"`` has skipped; kept in checkpoints.

    Example::

        class Model(SharpnessAwareMixin, L.LightningModule):
            def __init__(self, net, split):
                super().__init__()
                self.net = net
                self.objective = SSESAM(split, head_rho=0.05, tail_rho=0.1)

            def sample_losses(self, batch):
                images, targets = batch
                return F.cross_entropy(self.net(images), targets, reduction="none")

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    Raises:
        MisconfigurationException: Before training, if ``objective`` or ``sample_losses`` is missing, the objective
            lacks its split, ``step_options`` is no StepOptions, ``configure_optimizers`` returns several
            optimizers, or the Trainer's strategy is one that it cannot work with.

    """

    objective: Objective
    step_options: StepOptions = StepOptions()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False
        self._sharpness_engine = SharpnessEngine()
        self._current_pass: Literal["clean", "repeated"] | None = None
        self._step_logs = StepLogs()
        self._host_targets = HostTargets()
        self._pending: list[tuple[Any, Tensor]] = []
        self._loss_on_bar: Tensor | None = None
        self.skipped_updates = 0
        self._outer_dtype = torch.get_default_dtype()
        self._is_pretending = False
        self._is_supported = False
        self._has_stepped = False

    # What the user defines.

    def sample_losses(self, batch: Any) -> Tensor:
        """Return the unreduced losses of a batch, shape ``(N,)``, or dense ``(N, ...)`` like the targets.

        Called once or more in a training step, at perturbed weights too. What it logs is logged once, from the clean
        pass; guard anything else that must happen once (metrics) with :attr:`in_clean_pass`.
        """
        raise NotImplementedError(f"`{type(self).__name__}` must define `sample_losses(self, batch)`.")

    def sample_targets(self, batch: Any) -> Tensor:
        """Return the targets of a batch: class indices ``(N,)`` or ``(N, ...)``, or probabilities ``(N, C)``.

        Called outside of the step too, with the batch as it is before it is moved to the device.

        By default the second item of a pair, or ``batch["target"]``, ``batch["label"]`` or ``batch["labels"]``.
        Override it for batches of another form.
        """
        return find_targets(batch, type(self).__name__)

    def select_samples(self, batch: Any, index: Tensor) -> Any:
        """Return the batch with only the samples at ``index`` ``(M,)``, a CPU tensor; used by split passes.

        By default picks the rows of every tensor in the batch, whatever its nesting, that has one row per sample, and
        the items of every list of plain values (file names) that has one per sample. Override it for batches of
        another form, or with a tensor that happens to have as many rows as there are samples.
        """
        return pick_samples(batch, index, len(self.sample_targets(batch)))

    @property
    def in_clean_pass(self) -> bool:
        """Whether a training step is calling :meth:`sample_losses` at the unperturbed weights.

        With split passes that is once per group of samples, and with accumulated batches once per batch, so that each
        sample is seen once.
        """
        return self._current_pass == "clean"

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        """Let :meth:`sample_losses` be called between steps, to measure: it logs nothing."""
        before, self._current_pass = self._current_pass, "repeated"
        try:
            yield
        finally:
            self._current_pass = before

    # What the mixin does.

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Make one update of the objective and log the clean loss as ``train/loss``, unless the user has logged that.

        With ``Trainer(accumulate_grad_batches=k)`` batches are kept, and the last of ``k`` makes the update of all of
        them together. Gradients are freed when the step is done; ``on_before_optimizer_step`` sees them.

        Returns:
            The mean loss of the samples at the unperturbed weights, a detached scalar; None for a batch that is kept.

        """
        self._check_supported()
        self._has_stepped = True
        self._step_logs.clear()
        if skips_backward(self.trainer):
            return self._forward_only(batch)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            # An epoch that was cut short may have left some over.
            self._pending.clear()
        part = batch, self._host_targets.of(self.sample_targets(batch))
        if accumulates(self.trainer):
            self._pending.append(clone_tensors(part))
            return None
        parts, self._pending = [*self._pending, part], []
        with between_forwards(self.trainer, self._outer_dtype):
            return self._update(parts, batch_idx)

    def _update(self, parts: list[tuple[Any, Tensor]], batch_idx: int) -> Tensor:
        # The last group of an epoch may be shorter, and Lightning divides its gradients as if it was not.
        share = len(parts) / self.trainer.accumulate_grad_batches
        try:
            outcome = self._find_gradient(parts, share)
        except NonFiniteError as error:
            self._current_pass = None
            self._skip_or_raise(error)
            return error.loss
        finally:
            self._current_pass = None
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        steps = self.trainer.global_step
        self.optimizer_step(self.current_epoch, batch_idx, optimizer, lambda: outcome.loss)
        if self.trainer.global_step == steps:
            # An override may leave the optimizer alone; Lightning counts its call.
            count_step(self.trainer)
        # Now and not before the next step, so that no pass shares the memory with gradients that are used up.
        zero_grad(self.trainer, batch_idx)
        self.zero_grad()
        self._log_outcome(outcome, sum(len(targets) for _, targets in parts), share)
        return outcome.loss

    def _find_gradient(self, parts: list[tuple[Any, Tensor]], share: float) -> Outcome:
        """Leave in ``.grad`` the gradient of the objective on several batches together, each with its targets."""
        processes, layers = Processes(self.trainer.strategy), _survey(self)
        gather = processes.gather if processes.size > 1 and self.step_options.processes == "global" else None
        terms = terms_of_union(self.objective, [targets for _, targets in parts], gather)
        if (self.trainer.global_step + 1) % self.step_options.interval:
            terms = [[term._replace(rho=0.0) for term in of_part] for of_part in terms]
        checks = self.step_options.on_nonfinite != "ignore" and not has_scaler(self.trainer)
        return self._sharpness_engine.compute(
            [MicroBatch(self._losses_of(batch), of_part) for (batch, _), of_part in zip(parts, terms, strict=True)],
            self._trained_parameters(),
            layers.buffers,
            processes.backward(partial(self._backward, share=share)),
            self._choose_passes(layers, processes),
            synchronize=processes.synchronize,
            ascent=self.step_options.processes,
            check_finite=processes.all_agree if checks else None,
            report=self.step_options.log_sharpness,
        )

    def _trained_parameters(self) -> list[Tensor]:
        # An optimizer may train some that are not the module's.
        groups = self.trainer.optimizers[0].param_groups
        return list(dict.fromkeys([*self.parameters(), *(p for group in groups for p in group["params"])]))

    def _backward(self, loss: Tensor, retain_graph: bool, share: float) -> None:
        # An override of `backward` may know no arguments, and need none for a single term.
        options = {"retain_graph": True} if retain_graph else {}
        self.manual_backward(loss if share == 1 else share * loss, **options)

    def _losses_of(self, batch: Any) -> SampleLosses:
        def sample_losses(index: Tensor | None, again: bool) -> Tensor:
            selected = batch if index is None else self.select_samples(batch, index)
            # Until the next pass begins, since the backward of this one may forward again (activation checkpointing).
            self._current_pass = "repeated" if again else "clean"
            self._step_logs.samples = len(self.sample_targets(selected))
            with self.trainer.precision_plugin.train_step_context():
                return self.sample_losses(selected)

        return sample_losses

    def _forward_only(self, batch: Any) -> Tensor:
        try:
            with torch.no_grad():
                loss = self._losses_of(batch)(None, False).mean()
        finally:
            self._current_pass = None
        self._log_outcome(Outcome(loss), len(self.sample_targets(batch)))
        return loss

    def _skip_or_raise(self, error: NonFiniteError) -> None:
        if self.step_options.on_nonfinite == "raise":
            raise NonFiniteError(
                f"The loss or the gradient of step {self.global_step} is infinite or not a number. Weights, buffers and"
                " optimizer are those from before the step. Look at the data of the step, lower the learning rate or"
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

        Silent in perturbed passes. What :meth:`sample_losses` logs for each group of samples (split passes) or each of
        several batches (accumulation) becomes one value for all of them, a mean over the samples unless ``reduce_fx``
        says otherwise. Of a ``Metric`` object the epoch's value is exact, the step's value is that of the last group.
        """
        if self._current_pass == "clean":
            self._step_logs.add(name, value, *args, **kwargs)
        elif self._current_pass is None:
            super().log(name, value, *args, **kwargs)

    def _log_outcome(self, outcome: Outcome, size: int, share: float = 1.0) -> None:
        names = self._step_logs.flush(super().log)
        if "train/loss" not in names and size > 0:
            self.log("train/loss", outcome.loss, batch_size=size)
            self._loss_on_bar = outcome.loss
        if self.step_options.on_nonfinite == "skip":
            self.log("train/skipped_updates", float(self.skipped_updates))
        if self.step_options.batch_norm_statistics == "group" and any(rise is not None for rise in outcome.sharpness):
            # Made on the device: copying a number there would wait for it.
            share_of_full = torch.full((), float(not outcome.is_difference), device=self.device)
            self.log("train/full_passes", share_of_full, on_step=False, on_epoch=True)
        if not self.step_options.log_sharpness or outcome.gradient_norm is None:
            return
        values = {"train/grad_norm": unscaled(self.trainer, outcome.gradient_norm)}
        for term, norm, rise in zip(self._term_names(outcome), outcome.gradient_norms, outcome.sharpness, strict=True):
            if norm is not None:
                values[f"train/grad_norm_{term}"] = unscaled(self.trainer, norm) / share
            if rise is not None:
                values[f"train/sharpness_{term}"] = rise
        self.log_dict(values, batch_size=size, sync_dist=self.trainer.world_size > 1)

    def _term_names(self, outcome: Outcome) -> Sequence[str]:
        names, number = self.objective.term_names, len(outcome.sharpness)
        return names if len(names) == number else [str(term) for term in range(number)]

    def __getstate__(self) -> dict[str, Any]:
        # No data in what is pickled or copied.
        return {**super().__getstate__(), "_pending": [], "_host_targets": HostTargets()}

    # When a run starts.

    @override
    def configure_callbacks(self) -> list[Callback]:
        """Called when a run starts: check the module, and attach what manual optimization takes away.

        An override must return ``[*super().configure_callbacks(), ...]``.
        """
        callbacks = super().configure_callbacks()
        callbacks = list(callbacks) if isinstance(callbacks, Sequence) else [callbacks]
        attached: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, TrainerSupport) and callback.module is self for callback in attached):
            callbacks.append(TrainerSupport(self))
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._check_class()
            self._has_stepped = False
            self._pending = []
            # Until TrainerSupport is set up: Lightning's next check would refuse to clip or to accumulate.
            self.automatic_optimization = self._is_pretending = True
        return callbacks

    def _choose_passes(self, layers: "_Survey", processes: Processes) -> Literal["auto", "full", "split", "difference"]:
        if self.step_options.passes == "full":
            return "full"
        obstacle = None
        if layers.batch_norms and self.step_options.batch_norm_statistics == "batch":
            obstacle = (
                f"`{next(iter(layers.batch_norms))}`, whose batch statistics are those of the whole batch. Use"
                " `passes='auto'` or `passes='full'`, or put batch norm in evaluation mode; or set"
                " `batch_norm_statistics='group'`, which gives each group of samples statistics of its own."
            )
        elif processes.size > 1 and any(isinstance(layer, SyncBatchNorm) for layer in layers.batch_norms.values()):
            obstacle = "`batch_norm_statistics='group'` and `sync_batchnorm`, as the processes differ in their groups."
        elif processes.is_sharded:
            # Every process must make the same passes, and each has samples of its own.
            obstacle = "ModelParallelStrategy, under which every pass communicates. Use `passes='auto'` or 'full'."
        if self.step_options.passes == "split":
            if obstacle is not None:
                raise MisconfigurationException(f"`passes='split'` cannot work with {obstacle}")
        elif obstacle is not None or layers.is_compiled:
            return "full"
        if layers.batch_norms:
            return "difference"
        # Of batch norm it is known when it changes its buffers; the engine finds out about others.
        return self.step_options.passes if layers.has_unknown_buffers else "split"

    def _check_supported(self) -> None:
        if self._trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            raise MisconfigurationException(
                f"`{type(self).__name__}.training_step` makes an update and needs `Trainer.fit` around it. Call"
                " `sample_losses(batch)` for the losses of a batch."
            )
        if not self._is_supported:
            self.automatic_optimization = False
            raise MisconfigurationException(
                f"`{type(self).__name__}.configure_callbacks` overrides SharpnessAwareMixin's and drops what it"
                " attaches. Return `[*super().configure_callbacks(), ...]` from it."
            )

    def _check_class(self) -> None:
        name = type(self).__name__
        if type(self).sample_losses is SharpnessAwareMixin.sample_losses:
            raise MisconfigurationException(
                f"`{name}` uses SharpnessAwareMixin and must define `sample_losses(self, batch)`, which returns the"
                " unreduced losses (N,) of a batch."
            )
        if self.automatic_optimization and not self._is_pretending:
            raise MisconfigurationException(
                f"`{name}` uses SharpnessAwareMixin, which optimizes manually: call `super().__init__()` in its"
                " `__init__`, and do not set `automatic_optimization`."
            )

    def _check_objective(self) -> None:
        name = type(self).__name__
        objective = getattr(self, "objective", None)
        if not isinstance(objective, Objective):
            raise MisconfigurationException(
                f"`{name}` uses SharpnessAwareMixin and must set `self.objective` to an Objective, such as"
                f" `SAM(rho=0.05)`, but it is {objective!r}."
            )
        if not isinstance(self.step_options, StepOptions):
            raise MisconfigurationException(
                f"`{name}.step_options` must be a StepOptions, such as `StepOptions(interval=2)`, but it is"
                f" {self.step_options!r}."
            )
        try:
            objective.check_ready()
        except (RuntimeError, ValueError) as error:
            raise MisconfigurationException(f"`{name}` cannot train as it is. {error}") from error


class _Survey(NamedTuple):
    """What the choice of passes depends on."""

    buffers: list[Buffers]
    batch_norms: dict[str, _BatchNorm]  # Those that normalize by statistics of the batch, by name.
    has_unknown_buffers: bool
    is_compiled: bool


def _survey(module: torch.nn.Module) -> _Survey:
    buffers: list[Buffers] = []
    batch_norms: dict[str, _BatchNorm] = {}
    unknown = compiled = False
    for name, layer in module.named_modules():
        is_batch_norm = isinstance(layer, _BatchNorm)
        if layer._buffers:
            buffers.append(layer._buffers)
            unknown = unknown or not is_batch_norm
        if is_batch_norm and (layer.training or layer.running_mean is None):
            batch_norms[name] = layer
        compiled = compiled or is_compiled(layer)
    return _Survey(buffers, batch_norms, unknown, compiled)
