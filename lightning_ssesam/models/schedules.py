"""A learning rate that rises at first, as the published recipes for long-tailed data have it."""

import math
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightning_ssesam._validation import bad_argument, check_increasing, check_integer, check_share


class WarmupLR(LRScheduler):
    """Learning rate that rises along a line, and then falls along a cosine to 0 or in jumps.

    In the epochs 1 to w of the warm-up it is 1/w, 2/w, ..., 1 times the rate of the optimizer. LDAM, PaCo and BCL have
    it on CIFAR. With ``scheduler_interval="step"``, all numbers are updates instead of epochs.

    Args:
        optimizer: Optimizer.
        total: Epochs of the training, an integer >= 1, as ``max_epochs``.
        warmup: Epochs of the warm-up, an integer in [0, total).
        milestones: Epochs after which the rate is multiplied by ``gamma``, increasing integers >= 1, such as
            ``[160, 180]``; by default the rate falls along a cosine.
        gamma: Factor at a milestone, a number in [0, 1].

    Raises:
        ArgumentError: If an argument is out of range.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> schedule, rates = WarmupLR(optimizer, total=6, warmup=2, milestones=[4]), []
        >>> for _ in range(6):
        ...     rates.append(schedule.get_last_lr()[0])
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [0.5, 1.0, 1.0, 1.0, 0.1, 0.1]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total: int,
        warmup: int = 5,
        milestones: Sequence[int] | None = None,
        gamma: float = 0.1,
    ) -> None:
        self.total = check_integer("total", total, minimum=1)
        self.warmup = check_integer("warmup", warmup, minimum=0)
        if warmup >= total:
            raise bad_argument("warmup", f"less than total = {total}", warmup)
        if milestones is not None:
            milestones = check_increasing("milestones", milestones, _check_epoch, "integers >= 1")
        self.milestones, self.gamma = milestones, check_share("gamma", gamma)
        super().__init__(optimizer)

    @override
    def get_lr(self) -> list[float]:  # type: ignore[override, unused-ignore]
        """Return the rates of the present epoch, one for each group of parameters."""
        return [float(rate) * self._factor(self.last_epoch) for rate in self.base_lrs]

    def _factor(self, epoch: int) -> float:
        if epoch < self.warmup:
            return (epoch + 1) / self.warmup
        if self.milestones is not None:
            return float(self.gamma ** sum(epoch >= milestone for milestone in self.milestones))
        progress = min((epoch - self.warmup) / (self.total - self.warmup), 1.0)
        return 0.5 * (1 + math.cos(math.pi * progress))


def _check_epoch(name: str, value: int) -> int:
    return check_integer(name, value, minimum=1)
