"""Which passes a model and a strategy allow."""

from collections.abc import Iterator
from typing import Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import SyncBatchNorm

from lightning_ssesam.layers import Layers, survey
from lightning_ssesam.processes import Processes
from lightning_ssesam.step_options import StepOptions

__all__ = ["choose_passes", "survey"]


def choose_passes(
    module: nn.Module, layers: Layers, options: StepOptions, processes: Processes
) -> Literal["auto", "full", "split", "difference"]:
    """Return the passes of a step, as :meth:`SharpnessEngine.compute` takes them.

    Raises:
        MisconfigurationException: If ``passes="split"`` cannot work with the module or the strategy.
    """
    if options.passes == "full":
        return "full"
    obstacle = next(_obstacles(module, layers, options, processes), None)
    if options.passes == "split":
        if obstacle is not None:
            raise MisconfigurationException(f"`passes='split'` cannot work with {obstacle}")
    elif obstacle is not None or layers.is_compiled:
        return "full"
    return "difference" if layers.batch_norms else options.passes


def _obstacles(module: nn.Module, layers: Layers, options: StepOptions, processes: Processes) -> Iterator[str]:
    """Yield what split passes cannot work with, and the ways out."""
    if layers.batch_norms and options.batch_norm_statistics == "batch":
        name = next(name for name, layer in module.named_modules() if layer is layers.batch_norms[0])
        yield (
            f"`{name}`, whose batch statistics are those of the whole batch. Use `passes='auto'` or `passes='full'`, or"
            " put batch norm in evaluation mode; or set `batch_norm_statistics='group'`, which gives each group of"
            " samples statistics of its own."
        )
    elif processes.size > 1 and any(isinstance(layer, SyncBatchNorm) for layer in layers.batch_norms):
        yield "`batch_norm_statistics='group'` and `sync_batchnorm`, because the processes differ in their groups."
    elif processes.is_sharded:
        # Every process must make the same passes, and each has samples of its own.
        yield "ModelParallelStrategy, under which every pass communicates. Use `passes='auto'` or 'full'."
