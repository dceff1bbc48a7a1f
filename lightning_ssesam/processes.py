"""The other processes of a run: targets and gradients that are exchanged with them."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.overrides import distributed
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy, XLAStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_ssesam.batches import one_hot


class Processes:
    """The processes that share a batch among them, under one of Lightning's strategies.

    Under DDP no pass of the engine communicates by itself: what the passes of one process are depends on its samples,
    and the sequence of collectives must not. :meth:`synchronize` sends gradients through DDP's own reducer (buckets,
    communication hooks), a number of times that depends on the objective alone. Under FSDP2 every backward
    communicates, and every process makes the same ones.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._ddp = strategy.model if isinstance(strategy.model, DistributedDataParallel) else None
        self._group: Any = None
        self.size, self.rank = 1, 0
        if isinstance(strategy, ModelParallelStrategy):
            mesh = strategy.device_mesh["data_parallel"]
            self.size, self.rank, self._group = mesh.size(), mesh.get_local_rank(), mesh.get_group()
        elif self._ddp is not None:
            self.size, self.rank = strategy.world_size, strategy.global_rank  # type: ignore[attr-defined]

    @property
    def is_sharded(self) -> bool:
        """Whether the parameters are divided among the processes."""
        return isinstance(self._strategy, ModelParallelStrategy)

    @staticmethod
    def check_supported(strategy: Strategy, processes: str) -> None:
        """Raise MisconfigurationException for a strategy, or an option under it, that cannot work."""
        supported = isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy)
        if not supported or isinstance(strategy, XLAStrategy):
            raise MisconfigurationException(
                f"SharpnessAwareMixin cannot work with {type(strategy).__name__}, which does not leave the gradients of"
                " whole parameters to it. Use strategy='ddp', or ModelParallelStrategy (FSDP2) to shard the model."
            )
        if processes == "local" and isinstance(strategy, ModelParallelStrategy):
            raise MisconfigurationException(
                "`processes='local'` cannot work with ModelParallelStrategy, whose backward passes always communicate."
                " Use `processes='global'`, or strategy='ddp'."
            )
        if getattr(strategy.model, "static_graph", False):
            raise MisconfigurationException(
                "SharpnessAwareMixin cannot work with DDPStrategy(static_graph=True), since its passes differ from"
                " step to step. Leave `static_graph` out."
            )

    def gather(self, targets: Tensor, ignore_index: int) -> tuple[list[Tensor], int]:
        """Return the flattened targets of all processes, and the number of this one."""
        return gather_targets(targets.to(self._strategy.root_device), self._group, ignore_index), self.rank

    def backward(self, function: Callable[..., None]) -> Callable[..., None]:
        """Return a backward that does not communicate, where this strategy can do without."""
        if self._ddp is None:
            return function

        def backward(loss: Tensor, retain_graph: bool) -> None:
            with self._strategy.block_backward_sync():  # type: ignore[attr-defined]
                function(loss, retain_graph=retain_graph)

        return backward

    @property
    def synchronize(self) -> Callable[[], None] | None:
        """Replaces the gradients by their mean over the processes; None where a backward has done it."""
        return None if self._ddp is None else self._synchronize

    def _synchronize(self) -> None:
        assert self._ddp is not None
        params = [p for p in self._ddp.parameters() if p.requires_grad]
        gradients = [p.grad for p in params]
        for p in params:
            p.grad = None
        whole = [torch.zeros_like(p) if g is None else g for p, g in zip(params, gradients, strict=True)]
        with torch.enable_grad():
            if self._ddp.find_unused_parameters:
                # DDP looks for the parameters in the graph of what it is given.
                total = torch.stack([(p * g).sum() for p, g in zip(params, whole, strict=True)]).sum()
                distributed.prepare_for_backward(self._ddp, total)
                torch.autograd.backward(total)
            else:
                distributed.prepare_for_backward(self._ddp, params)
                torch.autograd.backward(params, whole)
        if self._ddp.find_unused_parameters:
            used = torch.tensor([g is not None for g in gradients], dtype=torch.uint8, device=params[0].device)
            torch.distributed.all_reduce(used, torch.distributed.ReduceOp.MAX)
            for p, is_used in zip(params, used.tolist(), strict=True):
                if not is_used:
                    # As in one process: an optimizer leaves parameters without a gradient alone.
                    p.grad = None

    def all_agree(self, decision: bool) -> bool:
        """Return whether the decision of every process is True."""
        return bool(self._strategy.reduce_boolean_decision(decision, all=True))


def gather_targets(targets: Tensor, group: Any, ignore_index: int) -> list[Tensor]:
    """Return the flattened targets ``(M,)`` or ``(M, C)`` of every process of a group, in their order.

    Processes may differ in their number, and one may have class indices and another probabilities.
    """
    size = torch.distributed.get_world_size(group)
    own = torch.tensor([len(targets), targets.shape[1] if targets.ndim > 1 else 0], device=targets.device)
    headers = [torch.empty_like(own) for _ in range(size)]
    torch.distributed.all_gather(headers, own, group=group)
    lengths, classes = torch.stack(headers).t().tolist()
    num_classes = max(classes)
    targets = one_hot(targets, num_classes, ignore_index) if num_classes > 0 else targets.long()
    padded = targets.new_zeros(max(lengths), *targets.shape[1:])
    padded[: len(targets)] = targets
    gathered = [torch.empty_like(padded) for _ in range(size)]
    torch.distributed.all_gather(gathered, padded, group=group)
    return [t[:length] for t, length in zip(gathered, lengths, strict=True)]
