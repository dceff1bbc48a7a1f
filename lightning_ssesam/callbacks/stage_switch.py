"""A callback that moves SSE-SAM from its first stage to its second."""

from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_ssesam.callbacks.switch import Switch, unfit
from lightning_ssesam.objectives import Objective


class StageSwitch(Switch):
    """Sets the objective's stage to 2 at a point of the training (gamma in Lyu et al., "SSE-SAM", AAAI 2025).

    It logs the stage of every step as ``stage``, and announces the switch in one line. A run that is resumed after the
    switch continues in stage 2, even if it has become longer. One object can serve any number of runs.

    Args:
        at: Share of the training's optimizer steps after which stage 2 begins, in (0, 1); 0.7 unless ``epoch`` or
            ``step`` is given. With ``max_epochs=200`` and 0.7, stage 2 begins with the first batch of epoch 140.
        epoch: Epoch with whose first batch stage 2 begins, counted from 0, an integer >= 1.
        step: Number of optimizer steps after which stage 2 begins, an integer >= 1.

    Raises:
        ArgumentError: If an argument is out of range, or more than one is given.
        MisconfigurationException: When training starts, if the module has no objective, or ``at`` is used and the
            number of steps cannot be known.
    """

    switches_stages: ClassVar[bool] = True
    default_at: ClassVar[float] = 0.7
    begins: ClassVar[str] = "stage 2"
    missing: ClassVar[str] = "the second stage"

    @override
    def concerns(self, pl_module: LightningModule) -> bool:
        """Return whether the objective has stages."""
        return _objective(pl_module).num_stages > 1

    @override
    def apply(self, pl_module: LightningModule, switched: bool) -> None:
        _objective(pl_module).stage = 2 if switched else 1

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when the module is set up: warn if its objective has no stages."""
        if not self.concerns(pl_module):
            rank_zero_warn(f"StageSwitch has no effect: {type(_objective(pl_module)).__name__} has a single stage.")
        super().on_fit_start(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before every batch: switch if its point is reached, and log the stage."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.log("stage", float(_objective(pl_module).stage), on_step=True, on_epoch=False)


def _objective(pl_module: LightningModule) -> Objective:
    objective = getattr(pl_module, "objective", None)
    if not isinstance(objective, Objective):
        raise unfit(pl_module, "objective", "StageSwitch needs a module with an `objective`, such as `SSESAM(split)`")
    return objective
