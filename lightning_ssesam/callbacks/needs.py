"""What callbacks need of a module and of a Trainer, and the errors if it is not there."""

import math

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_ssesam.objectives import Objective


def unfit(pl_module: LightningModule, name: str, need: str) -> MisconfigurationException:
    """Build the error for a module whose attribute ``name`` is not what a callback needs."""
    got = f"`{type(pl_module).__name__}.{name}` is {getattr(pl_module, name, None)!r}"
    return MisconfigurationException(f"{need}, but {got}.")


def objective_of(pl_module: LightningModule, who: str) -> Objective:
    """Return the objective of a module that the callback ``who`` needs."""
    objective = getattr(pl_module, "objective", None)
    if not isinstance(objective, Objective):
        raise unfit(pl_module, "objective", f"{who} needs a module with an `objective`, such as `SSESAM(split)`")
    return objective


def on_device(pl_module: LightningModule, value: float) -> Tensor:
    """Return a number as a scalar on the module's device, to be logged. It is made there: a copy would wait."""
    return torch.full((), value, device=pl_module.device)


def steps_of_training(trainer: Trainer, who: str, way_out: str, if_earlier: str) -> int:
    """Return the number of optimizer steps that the training will make.

    Args:
        trainer: The Trainer of the run, whose counters are in place.
        who: The callback that needs it, as messages show it.
        way_out: Advice if the number is not known, which begins with "Use".
        if_earlier: Advice if the training may end before this number.

    Raises:
        MisconfigurationException: If it is not known.
    """
    total = trainer.estimated_stepping_batches
    if not 0 < total < math.inf:
        problem = f"{who} needs the number of steps that the training will make, but it is unknown"
        cause = "the data set has no length, or epochs and steps have no limit"
        raise MisconfigurationException(f"{problem}: {cause}. {way_out}")
    if trainer.num_training_batches == math.inf and (trainer.max_epochs or -1) != -1:
        assumed = f"{who} takes max_steps={trainer.max_steps} for the length of the training."
        rank_zero_warn(f"{assumed} If max_epochs={trainer.max_epochs} ends it earlier, {if_earlier}")
    return int(total)
