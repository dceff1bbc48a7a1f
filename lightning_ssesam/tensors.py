"""Rows, moves and local parts of tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Gradients = list[Tensor | None]

_WHOLE = (Tensor, nn.Parameter)


def dtype_of_sums(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of a dtype are summed: float32 at least."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.promote_types(dtype, torch.float32)


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


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Return whether all tensors are real, dense and whole, which takes less time than to ask each one of them."""
    kinds = {(type(t), t.layout, t.dtype) for t in tensors}
    return all(kind in _WHOLE and layout is torch.strided and not dtype.is_complex for kind, layout, dtype in kinds)


def local_parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the :func:`local_part` of each tensor."""
    return list(tensors) if are_plain(tensors) else [local_part(t) for t in tensors]


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, in the same memory."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def dense(tensor: Tensor) -> Tensor:
    """Return a tensor in dense form. Embeddings may have sparse gradients."""
    return tensor.to_dense() if tensor.is_sparse else tensor


def quotient(numerator: Tensor | float, denominator: Tensor) -> Tensor:
    """Return a quotient, and 0 where the denominator >= 0 is 0."""
    return torch.where(denominator > 0, numerator / denominator, torch.zeros_like(denominator))


def gradients_of(parameters: list[Tensor]) -> Gradients:
    """Return the ``.grad`` of each parameter."""
    return [p.grad for p in parameters]


def set_gradients(parameters: list[Tensor], gradients: Gradients | None) -> None:
    """Set the ``.grad`` of each parameter; None frees them all."""
    for p, gradient in zip(parameters, gradients or [None] * len(parameters), strict=True):
        p.grad = gradient


def wrapped(value: Tensor, parameter: Tensor) -> Tensor:
    """Return the part of this process as a ``DTensor`` that is sharded like the parameter, if that is sharded."""
    if not is_sharded(parameter) or is_sharded(value):
        return value
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    shape, stride = parameter.shape, parameter.stride()
    whole: Tensor = DTensor.from_local(value, mesh, placements, run_check=False, shape=shape, stride=stride)
    return whole


def whole(value: Tensor, parameter: Tensor) -> Tensor:
    """Return the values of all processes. All of them must call it."""
    gathered = wrapped(value, parameter)
    return gathered.full_tensor() if is_sharded(gathered) else gathered  # type: ignore[attr-defined]


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return the part of this process of a whole tensor, for a sharded parameter; the tensor for others."""
    if not is_sharded(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(mesh.device_type), mesh, placements).to_local()


def shard_of(parameter: Tensor) -> int:
    """Return the number of the part of a parameter that this process holds; 0 for a whole parameter."""
    if not is_sharded(parameter):
        return 0
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    number = 1
    for size, position, placement in zip(mesh.shape, mesh.get_coordinate(), placements, strict=True):
        # Processes along which it is replicated hold the same part.
        number = number * size + position if placement.is_shard() else number
    return 0 if number == 1 else number
