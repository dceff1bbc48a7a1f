"""Which passes a model and a strategy allow."""

from typing import Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import SyncBatchNorm

from lightning_ssesam.layers import Layers
from lightning_ssesam.processes import Processes
from lightning_ssesam.step_options import StepOptions


def choose_passes(
    module: nn.Module, layers: Layers, options: StepOptions, processes: Processes
) -> Literal["auto", "full", "split", "difference"]:
    """Return the passes of a step, as :meth:`SharpnessEngine.compute` takes them.

    Raises:
        MisconfigurationException: If ``passes="split"`` cannot work with the module or the strategy.
    """
    if options.passes == "full" or options.cuda_graphs:
        return "full"
    batch_norms = layers.batch_norms
    if options.passes == "auto":
        return "full" if batch_norms or processes.is_sharded or layers.is_compiled else "auto"
    if obstacle := _find_obstacle(module, batch_norms, options, processes):
        raise MisconfigurationException(f"`passes='split'` cannot work with {obstacle}")
    return "difference" if batch_norms else "split"


def _find_obstacle(
    module: nn.Module, batch_norms: list[nn.Module], options: StepOptions, processes: Processes
) -> str | None:
    """Return what split passes cannot work with, and the ways out; None if there is nothing."""
    if batch_norms and options.batch_norm_statistics == "batch":
        name = next(name for name, layer in module.named_modules() if layer is batch_norms[0])
        return (
            f"`{name}`, whose batch statistics are those of the whole batch. Use `passes='auto'` or `passes='full'`, or"
            " put batch norm in evaluation mode; or set `batch_norm_statistics='group'`, which gives each group of"
            " samples statistics of its own."
        )
    if processes.size > 1 and any(isinstance(layer, SyncBatchNorm) for layer in batch_norms):
        return "`batch_norm_statistics='group'` and `sync_batchnorm`, because the processes differ in their groups."
    if processes.is_sharded:
        # Every process must make the same passes, and each has samples of its own.
        return "ModelParallelStrategy, under which every pass communicates. Use `passes='auto'` or 'full'."
    return None
