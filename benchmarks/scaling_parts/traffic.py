"""What the processes of a training exchange in an update: by formula, by count, and on the wire."""

import os
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from math import ceil
from typing import Any

from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_ssesam import Term

# Name of an operator, up to its overload: the kind of collective, and which of its arguments is the whole tensor.
_OPERATORS = {
    "allreduce_": ("all-reduce", 0),
    "allgather_": ("all-gather", 0),
    "_allgather_base_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "broadcast_": ("broadcast", 0),
    "all_reduce": ("all-reduce", 0),
}
# They send no tensor. An operator that is in neither table is an error, so that none goes uncounted.
_SILENT = ("barrier", "wait_tensor", "_wrap_tensor_autograd")

INTEGER = 8
"""Bytes of a class index, or of a number of targets."""


def gradient_exchanges(terms: Sequence[Term], is_local: bool, keeps_clean: bool = False) -> int:
    """Return how often an update averages the gradient over the processes under DDP.

    Args:
        terms: Terms of the update, as the objective makes them for the batch of all processes.
        is_local: Whether ``processes="local"``.
        keeps_clean: Whether the gradient at the unperturbed weights is kept: by GSAM, and by ``reuse`` in an update
            that is perturbed.

    Returns:
        One exchange of the final gradient. With ``processes="global"`` one more for each perturbed term whose
        direction needs a gradient. One more for a clean gradient that these have not found.
    """
    perturbed = [term for term in terms if term.rho > 0]
    keeps_clean = keeps_clean and bool(perturbed)
    ascents = [term for term in perturbed if keeps_clean or term.ascent.direction.needs_gradient]
    has_plain = len(perturbed) < len(terms)
    return 1 + (0 if is_local else len(ascents)) + (keeps_clean and (is_local or has_plain))


def of_targets(processes: int, targets: int, num_classes: int = 0) -> Counter[str]:
    """Return the bytes of the exchange of targets, which ``processes="global"`` makes once an update.

    Args:
        processes: Number of processes.
        targets: Number of targets of the process that has most, those of accumulated batches together.
        num_classes: Number of classes for class probabilities, which travel in float64; 0 for class indices.
    """
    width = INTEGER * max(num_classes, 1)
    return Counter({"all-gather": processes * (2 * INTEGER + targets * width)})


def under_ddp(parameters: Iterable[Tensor], exchanges: int, finds_unused: bool = False) -> Counter[str]:
    """Return the bytes of the gradients of an update under DDP.

    Args:
        parameters: Parameters of the module. Those that are not trained are not sent.
        exchanges: How often the gradient is averaged.
        finds_unused: Whether ``find_unused_parameters``: each exchange says twice which parameters were used, in 4
            bytes and in 1 byte a parameter.
    """
    trained = [p for p in parameters if p.requires_grad]
    return Counter({"all-reduce": exchanges * sum(p.nbytes + 5 * finds_unused for p in trained)})


def passes(terms: Sequence[Term]) -> tuple[int, int]:
    """Return how many forward and backward passes an update of one batch makes, if all are full passes."""
    perturbed = sum(term.rho > 0 for term in terms)
    has_plain = perturbed < len(terms)
    return 1 + perturbed, 2 * perturbed + has_plain


def under_fsdp2(
    parameters: Iterable[Tensor],
    processes: int,
    terms: Sequence[Term],
    batches: int = 1,
    stays: Callable[[Tensor], bool] = lambda parameter: False,
) -> Counter[str]:
    """Return the bytes of parameters, gradients and norms of an update under FSDP2, for ascents as in SAM.

    Each pass gathers the parameters and frees them again: the forward, and each of the backward passes. Each backward
    pass divides the sum of the gradients. Each ascent sums the squared norms of the gradients of all parameters.

    Args:
        parameters: Whole parameters, before they are divided. FSDP2 fills up their first dimension to a multiple of
            the number of processes.
        processes: Number of processes.
        terms: Terms of the update.
        batches: Number of accumulated batches.
        stays: Function of a parameter that returns whether it stays whole from a forward to its first backward pass
            (``reshard_after_forward=False``, the default for what ``fully_shard`` of the whole network divides).
    """
    forwards, backwards = passes(terms)
    total: Counter[str] = Counter()
    for p in parameters:
        nbytes = batches * p.element_size() * p[:1].numel() * processes * ceil(len(p) / processes)
        total["all-gather"] += nbytes * (backwards if stays(p) else forwards + backwards)
        total["reduce-scatter"] += nbytes * backwards
        total["all-reduce"] += p.element_size() * sum(term.rho > 0 for term in terms)
    return total


def ring_bytes(found: Counter[str], processes: int) -> float:
    """Return the bytes that each process sends if every collective goes around a ring.

    An all-gather and a reduce-scatter send every part of the tensor but one, an all-reduce is one after the other
    (Patarasuk and Yuan, JPDC 2009). Of a broadcast, which is passed on, each process but the last sends the whole.
    """
    share = (processes - 1) / processes
    factors = {"all-reduce": 2 * share, "all-gather": share, "reduce-scatter": share, "broadcast": share}
    return sum(factors[kind] * nbytes for kind, nbytes in found.items())


class Traffic(TorchDispatchMode):
    """Counts the collectives of this process while it is active: ``calls`` and ``nbytes`` by kind.

    ``nbytes`` counts the whole tensor of a collective: what is averaged, or what has been gathered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.nbytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called for every operator: count it, if it is a collective."""
        if any(issubclass(kind, DTensor) for kind in types):
            # Divided tensors turn an operator into others, the collectives among them. These come here in their turn.
            return NotImplemented
        name = func._schema.name.rpartition("::")[2]
        if func.namespace in ("c10d", "_c10d_functional") and name not in _SILENT:
            kind, place = _OPERATORS[name]
            self.calls[kind] += 1
            self.nbytes[kind] += sum(t.nbytes for t in tree_leaves(args[place]) if isinstance(t, Tensor))
        return func(*args, **(kwargs or {}))


class TrafficOfSteps(Callback):
    """Counts what each training step exchanges.

    ``steps`` has a :class:`Traffic` for each step. ``wire`` has the bytes that sockets sent, if ``counts_wire``. DDP
    arranges its buckets anew in one of the first two updates, for which it broadcasts a few numbers.
    """

    def __init__(self, counts_wire: bool = False) -> None:
        self.steps: list[Traffic] = []
        self.wire: list[int] = []
        self.counts_wire = counts_wire

    def on_train_batch_start(self, *args: Any) -> None:
        """Called before each step: begin to count."""
        self.wire.append(-sent_by_sockets() if self.counts_wire else 0)
        self.steps.append(Traffic())
        self.steps[-1].__enter__()

    def on_train_batch_end(self, *args: Any) -> None:
        """Called after each step: end the count."""
        self.steps[-1].__exit__(None, None, None)
        self.wire[-1] += sent_by_sockets() if self.counts_wire else 0


def sent_by_sockets() -> int:
    """Return the bytes that the TCP sockets of this process have sent since they were opened. Linux 4.19 or newer."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        link = f"/proc/self/fd/{name}"
        if not os.path.lexists(link) or not os.readlink(link).startswith("socket:"):
            continue
        with socket.socket(fileno=os.dup(int(name))) as found:
            if found.type == socket.SOCK_STREAM and found.family in (socket.AF_INET, socket.AF_INET6):
                # The field tcpi_bytes_sent of the kernel's struct tcp_info.
                total += struct.unpack_from("Q", found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 208), 200)[0]
    return total
