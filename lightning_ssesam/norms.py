r"""Norms of gradients, and SAM's step along one: :math:`w + \rho \, g / \|g\|` (Foret et al., ICLR 2021, eq. 2).

Functions of plain tensors, which may be sharded.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ssesam.errors import NonFiniteError
from lightning_ssesam.tensors import are_plain, dense, is_sharded, local_parts, move, quotient, wrapped


@torch.no_grad()
def gradient_norm(parameters: Sequence[Tensor], gradient: Sequence[Tensor | None]) -> Tensor:
    """Return the Euclidean norm of a gradient over all parameters together.

    Args:
        parameters: The parameters, dense or sharded.
        gradient: The gradient of each parameter, or None.

    Returns:
        A scalar on the parameters' device: float64 if any parameter is float64 or complex128, else float32. It is 0 if
        every gradient is None.

    Example:
        >>> gradient_norm([torch.zeros(2), torch.zeros(1)], [torch.tensor([3.0, 0.0]), torch.tensor([4.0])])
        tensor(5.)
    """
    dtype, tensors = _norm_dtype(parameters), [g for g in gradient if g is not None]
    if not tensors:
        return torch.zeros((), dtype=dtype, device=parameters[0].device)
    norms: list[Tensor] = []
    whole = tensors if are_plain(tensors) else [t for t in map(_as_real, tensors) if not is_sharded(t)]
    if whole:
        norms += torch._foreach_norm(whole, 2, dtype)
    if len(whole) < len(tensors):
        sharded = [t.to(dtype) for t in map(_as_real, tensors) if is_sharded(t)]
        # One communication for all of them. Sharded tensors know no norm in another dtype than their own.
        norm_of_sharded: Any = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(sharded, 2)))
        norms.append(norm_of_sharded.full_tensor())
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def check_finite(loss: Tensor, norm: Tensor, agree: Callable[[bool], bool] = bool) -> None:
    """Raise NonFiniteError if the loss of a step or the norm of its gradient is not finite. Waits for the device once.

    Args:
        loss: Mean loss of the step, a detached scalar.
        norm: Norm of its gradient.
        agree: Function that is called with whether they are finite here. Returns whether they are in every process.
    """
    if not agree(bool(torch.stack([loss.isfinite(), move(norm, loss.device).isfinite()]).all())):
        raise NonFiniteError("The loss or the gradient is infinite or not a number.", loss)


@torch.no_grad()
def tensor_norms(parameters: Sequence[Tensor], gradient: Sequence[Tensor | None]) -> Tensor:
    """Return the Euclidean norm of each tensor of a gradient, ``(P,)``, in the dtype of :func:`gradient_norm`."""
    dtype = _norm_dtype(parameters)
    zero = torch.zeros((), dtype=dtype, device=parameters[0].device)
    return torch.stack(
        [zero if g is None else gradient_norm([p], [g]).to(dtype) for p, g in zip(parameters, gradient, strict=True)]
    )


@torch.no_grad()
def inner_products(parameters: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Return the inner product of each pair of tensors, ``(P,)``, in the dtype of :func:`gradient_norm`.

    Args:
        parameters: The parameters, dense or sharded.
        first: A tensor for each parameter: the part that this process holds.
        second: The same.
    """
    dtype = _norm_dtype(parameters)
    if first is second and not any(is_sharded(p) for p in parameters):
        return torch.stack(torch._foreach_norm(list(map(_as_real, first)), 2, dtype)).square()
    products = []
    for p, a, b in zip(parameters, first, second, strict=True):
        product = torch.view_as_real(a * b.conj())[..., 0] if a.is_complex() else a.to(dtype) * b.to(dtype)
        products.append(wrapped(product.to(dtype), p).sum())
    return torch.stack([t.full_tensor() if is_sharded(t) else t for t in products])  # type: ignore[attr-defined]


@torch.no_grad()
def ascend(parameters: Sequence[Tensor], gradient: Sequence[Tensor | None], norm: Tensor, rho: float) -> None:
    r"""Move the parameters in place by :math:`\rho \, g / \|g\|`. Overwrites the gradient.

    Args:
        parameters: The parameters, dense or sharded.
        gradient: The gradient g of each parameter. Parameters with None stay where they are.
        norm: The norm of g, a scalar. Nothing moves where it is 0.
        rho: Length of the step.

    Example:
        >>> weights = torch.zeros(2)
        >>> ascend([weights], [torch.tensor([3.0, 4.0])], torch.tensor(5.0), rho=0.1)
        >>> weights
        tensor([0.0600, 0.0800])
    """
    pairs = [(p, g) for p, g in zip(parameters, gradient, strict=True) if g is not None]
    if not pairs:
        return
    moved, direction = local_parts([p for p, _ in pairs]), local_parts([g for _, g in pairs])
    direction = direction if are_plain(direction) else list(map(dense, direction))
    torch._foreach_mul_(direction, quotient(rho, norm))
    torch._foreach_add_(moved, direction)
    # Autocast keeps low-precision copies of the weights it has met.
    torch.clear_autocast_cache()


def _as_real(tensor: Tensor) -> Tensor:
    tensor = dense(tensor)
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _norm_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    is_double = not {torch.float64, torch.complex128}.isdisjoint([p.dtype for p in parameters])
    return torch.float64 if is_double else torch.float32
