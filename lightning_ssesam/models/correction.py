"""What corrects the logits of a classifier after its training."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_ssesam._validation import bad_argument

Factors: TypeAlias = Sequence[float] | Tensor | float


class LogitCorrection(nn.Module):
    """A factor and a summand for the logit of each class: ``logits * scale + shift``.

    Logit adjustment subtracts the logarithms of the priors (Menon et al., ICLR 2021), temperature scaling divides by
    the temperature (Guo et al., ICML 2017), and LWS learns the factors (Kang et al., ICLR 2020).

    Attributes:
        scale: Factors ``(C,)``, a buffer in float32.
        shift: Summands ``(C,)``, a buffer in float32.

    Args:
        num_classes: C, an integer >= 1.
        scale: Factors ``(C,)``, or one number for all classes; 1 by default.
        shift: Summands ``(C,)``, or one number for all classes; 0 by default.

    Raises:
        ArgumentError: If there is not one finite number, or one for each class.

    Example:
        >>> correction = LogitCorrection(2, shift=[0.0, 1.0]).then(scale=0.5)
        >>> correction(torch.tensor([[4.0, 3.0]]))
        tensor([[2., 2.]])
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, num_classes: int, scale: Factors = 1.0, shift: Factors = 0.0) -> None:
        super().__init__()
        for name, values in {"scale": scale, "shift": shift}.items():
            self.register_buffer(name, _vector(name, values, num_classes))

    def then(self, scale: Factors = 1.0, shift: Factors = 0.0) -> "LogitCorrection":
        """Return the correction that applies this one first, then another one with these numbers."""
        other = LogitCorrection(self.scale.numel(), scale, shift).to(self.scale.device)
        return LogitCorrection(self.scale.numel(), self.scale * other.scale, self.shift * other.scale + other.shift)

    @override
    def forward(self, logits: Tensor) -> Tensor:
        """Return the corrected logits of logits ``(N, C)``, in their dtype."""
        return logits * self.scale.to(logits.dtype) + self.shift.to(logits.dtype)


def _vector(name: str, values: Factors, num_classes: int) -> Tensor:
    expected = f"one finite number, or {num_classes}, one for each class"
    try:
        vector = torch.as_tensor(values).detach().to(torch.float32)
        if vector.ndim > 1 or not bool(vector.isfinite().all()):
            raise ValueError
        return vector.expand(num_classes).clone()
    except (TypeError, ValueError, RuntimeError):
        raise bad_argument(name, expected, values) from None
