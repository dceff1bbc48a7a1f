"""Rows, moves and local parts of tensors."""

import torch
from torch import Tensor

Gradients = list[Tensor | None]


def rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Return the rows of a tensor at an index that is on the host."""
    return tensor[move(index, tensor.device)]


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device. Does not wait for the device where that is safe, as Lightning does for batches."""
    return tensor.to(device, non_blocking=device.type not in ("cpu", "mps"))


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a ``DTensor``, whose parts lie on several processes."""
    # An isinstance check would import torch.distributed.tensor, which takes a second.
    return hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, in the same memory."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def dense(tensor: Tensor) -> Tensor:
    """Return a tensor in dense form. Embeddings may have sparse gradients."""
    return tensor.to_dense() if tensor.is_sparse else tensor


def gradients_of(parameters: list[Tensor]) -> Gradients:
    """Return the ``.grad`` of each parameter."""
    return [p.grad for p in parameters]


def set_gradients(parameters: list[Tensor], gradients: Gradients | None) -> None:
    """Set the ``.grad`` of each parameter; None frees them all."""
    for p, gradient in zip(parameters, gradients or [None] * len(parameters), strict=True):
        p.grad = gradient
