"""What is asked of the Trainer, by public names of Lightning."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor


def callbacks_of(trainer: pl.Trainer) -> list[Callback]:
    """Return the callbacks of the Trainer, those that its module has attached included."""
    return trainer.callbacks  # type: ignore[attr-defined,no-any-return]


def is_fitting(module: pl.LightningModule) -> bool:
    """Return whether a Trainer is fitting the module, and not another module that it was given since."""
    try:
        trainer = module.trainer
    except RuntimeError:
        # There is no Trainer.
        return False
    return trainer.state.fn == TrainerFn.FITTING and trainer.lightning_module is module


def monitored(trainer: pl.Trainer) -> list[tuple[str, str]]:
    """Return the logged values that callbacks and schedulers monitor, each after the name of the class that does."""
    found = [(type(callback).__name__, getattr(callback, "monitor", None)) for callback in callbacks_of(trainer)]
    plateau = [config for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
    found += [(type(config.scheduler).__name__, config.monitor) for config in plateau]
    return [(who, value) for who, value in found if isinstance(value, str)]


def accumulates(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Return whether a batch waits for others before the next update."""
    batches = batch_idx + 1
    is_last = trainer.is_last_batch or batches == trainer.num_training_batches
    return not is_last and batches % trainer.accumulate_grad_batches != 0


def has_scaler(trainer: pl.Trainer) -> bool:
    """Return whether a GradScaler looks after non-finite gradients."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and scaler.is_enabled()


def loss_scale(trainer: pl.Trainer, share: float) -> Tensor | float:
    """Return the factor of the gradients of an update: that of a GradScaler, and the share of its batches."""
    if not has_scaler(trainer):
        return share
    return share * trainer.precision_plugin.scaler.scale(torch.ones((), device=trainer.strategy.root_device))  # type: ignore[attr-defined,no-any-return]


def unscaled(trainer: pl.Trainer, norm: Tensor) -> Tensor:
    """Return a gradient's norm without the factor that a GradScaler has put into it."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return norm if scaler is None else norm / scaler.scale(torch.ones_like(norm))


@contextmanager
def between_forwards(trainer: pl.Trainer, dtype: torch.dtype) -> Iterator[None]:
    """Leave the precision of the step for backward passes and updates: the default dtype is that outside of it."""
    inside = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        device = trainer.strategy.root_device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            yield
    finally:
        torch.set_default_dtype(inside)


def zero_grad(trainer: pl.Trainer, batch_idx: int) -> None:
    """Free the gradients through the hooks that automatic optimization calls for it."""
    optimizer, module = trainer.optimizers[0], trainer.lightning_module
    for callback in callbacks_of(trainer):
        callback.on_before_zero_grad(trainer, module, optimizer)
    module.on_before_zero_grad(optimizer)
    module.optimizer_zero_grad(trainer.current_epoch, batch_idx, optimizer)


def trained_parameters(trainer: pl.Trainer, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return a module's parameters and those that only the optimizer has, each once."""
    found = list(parameters)
    known = set(map(id, found))
    others = [p for group in trainer.optimizers[0].param_groups for p in group["params"] if id(p) not in known]
    return [*found, *{id(p): p for p in others}.values()]


def has_several_loaders(trainer: pl.Trainer, batch: Any) -> bool:
    """Return whether a batch consists of a batch of each of several loaders."""
    loaders: Any = trainer.train_dataloader
    if isinstance(loaders, Mapping):
        return isinstance(batch, Mapping) and batch.keys() == loaders.keys()
    is_list = isinstance(loaders, list | tuple) and isinstance(batch, list | tuple)
    return is_list and len(batch) == len(loaders)


def of_first_loader(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return logged values by name. With several loaders, the names are those of the first one."""
    return {name.removesuffix("/dataloader_idx_0"): value for name, value in metrics.items()}
