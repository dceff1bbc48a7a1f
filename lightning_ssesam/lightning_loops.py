"""What a step asks of Lightning: where its loops are, and to leave the precision of the forward."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer import call


def accumulates(trainer: pl.Trainer) -> bool:
    """Whether the current batch waits for others before the next update."""
    return trainer.fit_loop._should_accumulate()


def skips_backward(trainer: pl.Trainer) -> bool:
    """Whether this epoch only forwards, as StochasticWeightAveraging's last one does for batch norm's statistics."""
    return trainer.fit_loop._skip_backward


def count_step(trainer: pl.Trainer) -> None:
    """Count an update that is skipped as a step, as Lightning does where a GradScaler skips it."""
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    progress.increment_ready()
    progress.increment_completed()


def has_scaler(trainer: pl.Trainer) -> bool:
    """Whether a GradScaler looks after non-finite gradients."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and scaler.is_enabled()


def unscaled(trainer: pl.Trainer, norm: torch.Tensor) -> torch.Tensor:
    """Return a gradient's norm without the factor that a GradScaler has put into it."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return norm if scaler is None else norm / scaler.scale(torch.ones_like(norm))


@contextmanager
def between_forwards(trainer: pl.Trainer, dtype: torch.dtype) -> Iterator[None]:
    """Leave the precision of the training step, as automatic optimization does for backward passes and updates.

    Args:
        trainer: The Trainer.
        dtype: The default dtype outside of the step.

    """
    inside = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.autocast(trainer.strategy.root_device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(inside)


def zero_grad(trainer: pl.Trainer, batch_idx: int) -> None:
    """Free the gradients through the hooks that automatic optimization calls for it."""
    optimizer = trainer.optimizers[0]
    call._call_callback_hooks(trainer, "on_before_zero_grad", optimizer)
    call._call_lightning_module_hook(trainer, "on_before_zero_grad", optimizer)
    call._call_lightning_module_hook(trainer, "optimizer_zero_grad", trainer.current_epoch, batch_idx, optimizer)


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether ``torch.compile`` has been called on a module."""
    return isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None
