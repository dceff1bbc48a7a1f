r"""What is made of the sum of the terms' gradients, given the gradient at the unperturbed weights.

LookSAM (Liu et al., CVPR 2022, arXiv:2203.02714): between two perturbed updates, the part of the last perturbed
gradient that lies across the clean one is used again. With one tensor G of the sum and g of the clean gradient,

.. math:: v = G - \frac{\langle G, g \rangle}{\langle g, g \rangle} g, \qquad D = g + \alpha \frac{\|g\|}{\|v\|} v .
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.norms import inner_products
from lightning_ssesam.tensors import Gradients, dense, gradients_of, local_part, quotient, set_gradients

Combine = Callable[..., Sequence[Tensor]]

REUSED = "reused difference"
"""Key of the state that holds the last part across the clean gradient."""

# As in the code that made the reference numbers, where v is 0.
_SMALL = 1e-8


@torch.no_grad()
def synchronized(parameters: list[Tensor], synchronize: Callable[[], None] | None, gradient: Gradients) -> Gradients:
    """Return a gradient summed (or averaged) over the processes. Leaves ``.grad`` as it is."""
    if synchronize is None:
        return gradient
    held = gradients_of(parameters)
    # The buckets of DDP are overwritten by each communication.
    held = [None if g is None else g.clone() for g in held]
    set_gradients(parameters, gradient)
    synchronize()
    found = [None if g is None else g.clone() for g in gradients_of(parameters)]
    set_gradients(parameters, held)
    return found


class AfterSum:
    """The clean gradient of a step and the sum of its terms' gradients, for the parameters that have any.

    Args:
        parameters: Parameters that are trained.
        clean: Their gradient at the unperturbed weights; None for 0. Without it, there is nothing but the sum.
    """

    def __init__(self, parameters: list[Tensor], clean: Gradients | None = None) -> None:
        pairs = enumerate(zip(parameters, clean or [None] * len(parameters), strict=True))
        self.numbers = [number for number, (p, g) in pairs if p.grad is not None or g is not None]
        self.parameters = [parameters[number] for number in self.numbers]
        for p in self.parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else dense(p.grad)
        self.gradient = [local_part(g) for g in gradients_of(self.parameters) if g is not None]
        given = [clean[number] for number in self.numbers] if clean else []
        self.clean = [
            torch.zeros_like(total) if g is None else dense(local_part(g))
            for g, total in zip(given, self.gradient, strict=bool(clean))
        ]

    def inner(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
        """Return the inner products of two lists, tensor by tensor, ``(P,)``."""
        return inner_products(self.parameters, first, second)

    def _norms(self, tensors: Sequence[Tensor]) -> Tensor:
        return self.inner(tensors, tensors).sqrt()

    @torch.no_grad()
    def combine(self, function: Combine, factor: Tensor | float | None = None) -> None:
        """Let a function make the gradient for the optimizer.

        Args:
            function: Gets both gradients, divided by the factor.
            factor: Factor of the gradients; None for 1.
        """
        if factor is not None:
            for tensor in (*self.clean, *self.gradient):
                tensor.div_(factor)
        combined = function(self.clean, self.gradient, self.inner)
        if [getattr(t, "shape", None) for t in combined or ()] != [t.shape for t in self.gradient]:
            raise bad_argument("combine", "a function that returns a tensor for each gradient", combined)
        for old, new in zip(self.gradient, combined, strict=True):
            if old is not new:
                old.copy_(new)
            if factor is not None:
                old.mul_(factor)

    @torch.no_grad()
    def difference(self) -> list[Tensor]:
        """Return the part of each tensor of the sum that lies across the clean gradient."""
        ratios = quotient(self.inner(self.gradient, self.clean), self.inner(self.clean, self.clean))
        pairs = zip(self.gradient, self.clean, ratios, strict=True)
        return [total - (ratio * g).to(g.dtype) for total, g, ratio in pairs]

    @torch.no_grad()
    def reuse(self, difference: Sequence[Tensor | None], alpha: float) -> None:
        """Add a difference to a clean gradient, alpha times as long as that, tensor by tensor."""
        given = [torch.zeros_like(g) if v is None else v for v, g in zip(difference, self.gradient, strict=True)]
        lengths = self._norms(self.gradient) / (self._norms(given) + _SMALL)
        for g, v, length in zip(self.gradient, given, lengths, strict=True):
            g.add_((alpha * length * v).to(g.dtype))
