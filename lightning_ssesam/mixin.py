"""The training step: batch to terms to gradient to optimizer."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from lightning_ssesam._validation import check_choice
from lightning_ssesam.engine import SharpnessEngine
from lightning_ssesam.objectives import Objective
from lightning_ssesam.split_logs import SplitLogs
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
        passes: ``"full"`` forwards the whole batch in every pass, which is exact for every model. ``"split"``
            forwards only the samples that a term gives weight: the same numbers for less work, where no layer mixes
            samples. ``"auto"`` (default) takes split passes unless the model has batch norm in training mode, changes
            other buffers in its forward, or trains in several processes. Choose ``"full"`` for a model that mixes the
            samples of a batch in some other way.

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
            lacks its split, ``passes`` is unknown, or ``configure_optimizers`` returns several optimizers.

    """

    objective: Objective
    passes: Literal["auto", "full", "split"] = "auto"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False
        self._sharpness_engine = SharpnessEngine()
        self._current_pass: Literal["clean", "perturbed"] | None = None
        self._split_logs = SplitLogs()
        self._logged: set[str] = set()
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

        By default the second item of a pair, or ``batch["target"]``, ``batch["label"]`` or ``batch["labels"]``.
        Override it for batches of another form.
        """
        if isinstance(batch, Mapping):
            for key in ("target", "label", "labels"):
                if key in batch:
                    return torch.as_tensor(batch[key])
        elif isinstance(batch, Sequence) and len(batch) == 2 and isinstance(batch[1], Tensor):
            return batch[1]
        raise MisconfigurationException(
            "Expected a batch that is a pair (inputs, targets) or a mapping with the key 'target', 'label' or"
            f" 'labels', but got {_describe(batch)}. Override `sample_targets(self, batch)` in"
            f" `{type(self).__name__}`."
        )

    def select_samples(self, batch: Any, index: Tensor) -> Any:
        """Return the batch with only the samples at ``index`` ``(M,)``; used by split passes.

        By default picks the rows of every tensor in the batch, whatever its nesting, that has one row per sample, and
        the items of every list of plain values (file names) that has one per sample. Override it for batches of
        another form, or with a tensor that happens to have as many rows as there are samples.
        """
        return _pick(batch, index, len(self.sample_targets(batch)))

    @property
    def in_clean_pass(self) -> bool:
        """Whether a training step is calling :meth:`sample_losses` at the unperturbed weights.

        With split passes that is once per group of samples, so that each sample is seen once.
        """
        return self._current_pass == "clean"

    # What the mixin does.

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Make one update of the objective and log the clean loss as ``train/loss``, unless the user has logged that.

        Gradients are freed when the step is done; ``on_before_optimizer_step`` sees them.

        Returns:
            The mean loss of the batch at the unperturbed weights, a detached scalar.

        """
        self._check_supported()
        self._has_stepped = True
        self._logged.clear()
        self._split_logs.clear()
        targets = self.sample_targets(batch)
        try:
            loss: Tensor = self._sharpness_engine.compute(
                self._losses_of(batch),
                self.objective.terms(targets),
                self.parameters(),
                [module._buffers for module in self.modules() if module._buffers],
                self.manual_backward,
                self._choose_passes(),
            )
        finally:
            self._current_pass = None
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.step()
        # Now and not before the next step, so that no pass shares the memory with gradients that are used up.
        self.zero_grad()
        self._split_logs.flush(super().log)
        if "train/loss" not in self._logged and len(targets) > 0:
            self.log("train/loss", loss, prog_bar=True, batch_size=len(targets))
        return loss

    @override
    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log as ``LightningModule.log`` does, but each value once a step: from the clean pass.

        Silent in perturbed passes. With split passes a value that :meth:`sample_losses` logs for each group of
        samples becomes one value for the batch, a mean over the samples unless ``reduce_fx`` says otherwise. Of a
        ``Metric`` object the epoch's value is exact, the step's value is that of the last group.
        """
        if self._current_pass == "perturbed":
            return
        self._logged.add(name)
        if self._current_pass == "clean" and self._split_logs.samples is not None:
            self._split_logs.add(name, value, *args, **kwargs)
        else:
            super().log(name, value, *args, **kwargs)

    @override
    def configure_callbacks(self) -> list[Callback]:
        """Called when a run starts: check the module, and attach what manual optimization takes away.

        An override must return ``[*super().configure_callbacks(), ...]``.
        """
        callbacks = super().configure_callbacks()
        callbacks = list(callbacks) if isinstance(callbacks, Sequence) else [callbacks]
        if self.trainer.state.fn != TrainerFn.FITTING:
            return callbacks
        self._check_class()
        self._has_stepped = False
        attached: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, TrainerSupport) and callback.module is self for callback in attached):
            return callbacks
        return [*callbacks, TrainerSupport(self)]

    def _losses_of(self, batch: Any) -> Callable[[Tensor | None, bool], Tensor]:
        def sample_losses(index: Tensor | None, perturbed: bool) -> Tensor:
            selected = batch if index is None else self.select_samples(batch, index)
            # Until the next pass begins, since the backward of this one may forward again (activation checkpointing).
            self._current_pass = "perturbed" if perturbed else "clean"
            self._split_logs.samples = None if index is None else len(index)
            return self.sample_losses(selected)

        return sample_losses

    def _choose_passes(self) -> Literal["auto", "full", "split"]:
        if self.passes == "full":
            return "full"
        if self.trainer.world_size > 1:
            # Split passes differ from process to process, and their collectives with them.
            if self.passes == "split":
                raise MisconfigurationException(
                    "`passes='split'` cannot work in several processes. Use 'auto' or 'full'."
                )
            return "full"
        mixing = next((name for name, module in self.named_modules() if _mixes_samples(module)), None)
        if self.passes == "split" and mixing is not None:
            raise MisconfigurationException(
                f"`passes='split'` cannot work with `{mixing}`, whose batch statistics are those of the whole batch."
                " Use `passes='auto'` or `passes='full'`, or put batch norm in evaluation mode."
            )
        if mixing is not None:
            return "full"
        # Of batch norm it is known when it changes its buffers; the engine finds out about others.
        unknown = any(module._buffers and not isinstance(module, _BatchNorm) for module in self.modules())
        return self.passes if unknown else "split"

    def _check_supported(self) -> None:
        if not self._is_supported:
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
        if self.automatic_optimization:
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
        try:
            objective.check_ready()
            check_choice("passes", self.passes, ("auto", "full", "split"))
        except (RuntimeError, ValueError) as error:
            raise MisconfigurationException(f"`{name}` cannot train as it is. {error}") from error


def _mixes_samples(module: torch.nn.Module) -> bool:
    """Whether a layer's output for a sample depends on which other samples it is forwarded with."""
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def _pick(item: Any, index: Tensor, size: int) -> Any:
    if isinstance(item, Tensor):
        return item[index] if item.ndim > 0 and item.shape[0] == size else item
    if isinstance(item, list | tuple) and not hasattr(item, "_fields"):
        if len(item) == size and not any(isinstance(value, Tensor | Mapping | list | tuple) for value in item):
            return type(item)(item[i] for i in index.tolist())
        return type(item)(_pick(value, index, size) for value in item)
    if isinstance(item, dict):
        return {key: _pick(value, index, size) for key, value in item.items()}
    return apply_to_collection(item, Tensor, partial(_pick, index=index, size=size))


def _describe(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a mapping with the keys {sorted(map(str, batch))}"
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return f"a {type(batch).__name__} of {len(batch)} items"
    return f"a {type(batch).__name__}"
