"""A callback that moves an objective from stage to stage."""

from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_ssesam.callbacks.needs import objective_of, on_device
from lightning_ssesam.callbacks.switch import Switch
from lightning_ssesam.objectives import Objective


class StageSwitch(Switch):
    """Moves the objective to its next stage at points of the training (gamma in Lyu et al., "SSE-SAM", AAAI 2025).

    ``StageSwitch(at=0.7)`` moves an objective with two stages to stage 2. ``StageSwitch(at=[0.5, 0.8])`` moves one with
    three stages to stage 2 and then to stage 3. It logs the stage of every step as ``stage``, and announces each switch
    in one line. A resumed run continues in the stage that it was in, even if it has become longer. One object can serve
    any number of runs.

    Args:
        at: Share of the training's optimizer steps after which the next stage begins, in (0, 1), or a strictly
            increasing list of shares. It is 0.7 unless ``epoch`` or ``step`` is given. With ``max_epochs=200`` and 0.7,
            stage 2 begins with the first batch of epoch 140.
        epoch: Epoch with whose first batch the next stage begins, counted from 0, an integer >= 1, or a strictly
            increasing list of epochs.
        step: Number of optimizer steps after which the next stage begins, an integer >= 1, or a strictly increasing
            list of numbers.

    Raises:
        ArgumentError: If an argument is out of range, or more than one is given.
        MisconfigurationException: When training starts, if the module has no objective, the number of points does not
            fit the number of its stages, or ``at`` is used and the number of steps cannot be known.
    """

    switches_stages: ClassVar[bool] = True
    takes_several: ClassVar[bool] = True
    default_at: ClassVar[float] = 0.7
    begins: ClassVar[str] = "stage 2"
    missing: ClassVar[str] = "the second stage"

    @override
    def concerns(self, pl_module: LightningModule) -> bool:
        """Return whether the objective has stages."""
        return self._objective(pl_module).num_stages > 1

    @override
    def apply(self, pl_module: LightningModule, switched: bool) -> None:
        """Set the stage of the objective: the one after the last switch, or stage 1 if ``switched`` is False."""
        self._objective(pl_module).stage = 1 + max(1, self.num_switched) if switched else 1

    def misfit(self, objective: Objective) -> str:
        """Return what is wrong if the number of points does not fit the stages of an objective, else an empty text."""
        points, needed = self.num_points, objective.num_stages - 1
        if needed in (0, points):
            return ""
        given = next(f"{name}={getattr(self, name)}" for name in ("at", "epoch", "step") if getattr(self, name))
        has = f"{type(self).__name__}({given}) has {_points(points)}"
        needs = f"needs {_points(needed)}, such as {self.example(objective.num_stages)}"
        return f"{has}, but {type(objective).__name__} has {objective.num_stages} stages and {needs}."

    @classmethod
    def example(cls, num_stages: int) -> str:
        """Return a switch through so many stages, as it is written: at the default, or in equal parts."""
        shares = [round(number / num_stages, 2) for number in range(1, num_stages)]
        return f"{cls.__name__}(at={cls.default_at if num_stages == 2 else shares})"

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when the module is set up: refuse another number of points; warn if there is a single stage."""
        objective = self._objective(pl_module)
        if not self.concerns(pl_module):
            rank_zero_warn(f"StageSwitch has no effect: {type(objective).__name__} has a single stage.")
        if misfit := self.misfit(objective):
            raise MisconfigurationException(misfit)
        super().on_fit_start(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before every batch: switch if its point is reached, and log the stage."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        stage = float(self._objective(pl_module).stage)
        self.log("stage", on_device(pl_module, stage), on_step=True, on_epoch=False)

    @override
    def _begins(self) -> str:
        return self.begins if self.num_points == 1 else f"stage {self.num_switched + 1}"

    @override
    def _missing(self) -> str:
        if self.num_points == 1:
            return self.missing
        return " and ".join(f"stage {number + 2}" for number in range(self.num_switched, self.num_points))

    @staticmethod
    def _objective(pl_module: LightningModule) -> Objective:
        return objective_of(pl_module, "StageSwitch")


def _points(number: int) -> str:
    return "1 point" if number == 1 else f"{number} points"
