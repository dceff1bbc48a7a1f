"""Which passes a model and a strategy allow."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_ssesam.processes import Processes
from lightning_ssesam.step_options import StepOptions


class Survey(NamedTuple):
    """What a step needs to know of a module.

    Attributes:
        parameters: Its parameters, each once.
        modules: The module and all layers.
        batch_norms: The batch norm layers that normalize by statistics of the batch.
        is_compiled: Whether ``torch.compile`` has been called on a layer.
    """

    parameters: list[Tensor]
    modules: list[nn.Module]
    batch_norms: list[nn.Module]
    is_compiled: bool


def survey(module: nn.Module) -> Survey:
    """Walk the module tree once. Called in every step, since layers may be frozen or replaced between steps."""
    parameters: dict[int, Tensor] = {}
    batch_norms: list[nn.Module] = []
    has_compiled = False
    # By hand and from the layers' dictionaries: `modules()` and each layer's `parameters()` would take several times as
    # long, in every step. The order is that of `module.parameters()`.
    seen: dict[nn.Module, None] = {}
    stack: list[nn.Module | None] = [module]
    while stack:
        layer = stack.pop()
        if layer is None or layer in seen:
            continue
        seen[layer] = None
        if children := layer._modules:
            stack.extend(reversed(list(children.values())))
        parameters.update((id(p), p) for p in layer._parameters.values() if p is not None)
        # In evaluation mode batch norm uses the statistics of the batch only if it has no others.
        if isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None):
            batch_norms.append(layer)
        has_compiled = has_compiled or is_compiled(layer)
    return Survey(list(parameters.values()), list(seen), batch_norms, has_compiled)


def is_compiled(module: nn.Module) -> bool:
    """Return whether ``torch.compile`` has been called on a module."""
    return module._compiled_call_impl is not None or isinstance(module, torch._dynamo.OptimizedModule)


def replays_by_itself(module: nn.Module) -> bool:
    """Return whether a module is compiled with CUDA graphs of its own (``mode="reduce-overhead"``)."""
    functions: tuple[Any, ...] = (module._compiled_call_impl, getattr(module, "forward", None))
    configs = [f.get_compiler_config() or {} for f in functions if hasattr(f, "get_compiler_config")]
    return any(config.get("triton.cudagraphs", False) for config in configs)


def choose_passes(
    module: nn.Module, layers: Survey, options: StepOptions, processes: Processes
) -> Literal["auto", "full", "split", "difference"]:
    """Return the passes of a step, as :meth:`SharpnessEngine.compute` takes them.

    Raises:
        MisconfigurationException: If ``passes="split"`` cannot work with the module or the strategy.
    """
    if options.passes == "full" or options.cuda_graphs:
        return "full"
    obstacle = next(_obstacles(module, layers, options, processes), None)
    if options.passes == "split":
        if obstacle is not None:
            raise MisconfigurationException(f"`passes='split'` cannot work with {obstacle}")
    elif obstacle is not None or layers.is_compiled:
        return "full"
    return "difference" if layers.batch_norms else options.passes


def _obstacles(module: nn.Module, layers: Survey, options: StepOptions, processes: Processes) -> Iterator[str]:
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
