"""When SSE-SAM moves from its first stage to its second."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_ssesam._validation import check_fraction, check_integer
from lightning_ssesam.objectives import Objective


class StageSwitch(Callback):
    """Sets the objective's stage to 2 at a point of the training (gamma in Lyu et al., "SSE-SAM", AAAI 2025).

    Logs the stage of every step as ``stage`` and says in one line when it switched. A run that is resumed after the
    switch continues in stage 2, even if it has become longer. One object serves any number of runs.

    Args:
        at: Share of the training's optimizer steps after which stage 2 begins, in (0, 1); 0.7 unless ``epoch`` or
            ``step`` is given. With ``max_epochs=200`` and 0.7 the first batch of epoch 140 is in stage 2.
        epoch: Stage 2 begins with the first batch of this epoch, counted from 0; an integer >= 1.
        step: Stage 2 begins after this many optimizer steps; an integer >= 1.

    Raises:
        ValueError: If an argument is out of range, or more than one is given.
        MisconfigurationException: When training starts, if the module has no objective, or ``at`` is used and the
            number of steps cannot be known.

    """

    log: Callable[..., None]  # attached by the Trainer

    def __init__(self, at: float | None = None, *, epoch: int | None = None, step: int | None = None) -> None:
        super().__init__()
        if sum(value is not None for value in (at, epoch, step)) > 1:
            raise ValueError(
                "Expected at most one of the arguments `at`, `epoch` and `step`,"
                f" but got at={at!r}, epoch={epoch!r}, step={step!r}."
            )
        self.epoch = None if epoch is None else check_integer("epoch", epoch, minimum=1)
        self.step = None if step is None else check_integer("step", step, minimum=1)
        self.at = check_fraction("at", 0.7 if at is None else at) if epoch is None and step is None else None
        self._switch_step: int | None = None
        self._switched_at: int | None = None

    def should_switch(self, step_idx: int, epoch_idx: int) -> bool:
        """Decide whether stage 2 holds for the next batch.

        Override it for a policy of your own; it is asked before every batch until it says yes.

        Args:
            step_idx: Optimizer steps made so far in the whole training.
            epoch_idx: Current epoch, counted from 0.

        """
        if self.epoch is not None:
            return epoch_idx >= self.epoch
        return self._switch_step is not None and step_idx >= self._switch_step

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when a run starts, before a checkpoint is loaded: begin anew in stage 1."""
        if stage == "fit" and trainer.global_step == 0:
            self._switched_at = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when the module is set up: look at its objective."""
        objective = _objective(pl_module)
        if objective.num_stages < 2:
            rank_zero_warn(f"StageSwitch has no effect: {type(objective).__name__} has a single stage.")
        elif self._switched_at is not None:
            # Resumed, perhaps from the end of the training, where no batch follows.
            objective.stage = 2

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when counters and checkpoints are in place: find the step of the switch."""
        self._switch_step = self.step if self.at is None else _share_of_steps(trainer, self.at)
        self._apply(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Called before every batch: switch when it is time, and log the stage."""
        self._apply(trainer, pl_module)
        self.log("stage", float(_objective(pl_module).stage), on_step=True, on_epoch=False)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training ends: warn if it ended before the switch."""
        if self._switched_at is None and _objective(pl_module).num_stages > 1 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            point = f"epoch {self.epoch}" if self.epoch is not None else f"step {self._switch_step}"
            rank_zero_warn(
                f"The training ended at step {trainer.global_step} without the second stage, which StageSwitch had"
                f" set for {point}."
            )

    def _apply(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        objective = _objective(pl_module)
        if objective.num_stages < 2:
            return
        if self._switched_at is None and self.should_switch(trainer.global_step, trainer.current_epoch):
            self._switched_at = trainer.global_step
            rank_zero_info(f"StageSwitch: stage 2 from step {trainer.global_step} (epoch {trainer.current_epoch}).")
        objective.stage = 1 if self._switched_at is None else 2

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the step of the switch, -1 before it."""
        return {"switched_at": -1 if self._switched_at is None else self._switched_at}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        switched_at = int(state_dict["switched_at"])
        self._switched_at = None if switched_at < 0 else switched_at


def _objective(pl_module: pl.LightningModule) -> Objective:
    objective = getattr(pl_module, "objective", None)
    if not isinstance(objective, Objective):
        raise MisconfigurationException(
            f"StageSwitch needs a module with an `objective`, such as `SSESAM(split)`, but"
            f" `{type(pl_module).__name__}.objective` is {objective!r}."
        )
    return objective


def _share_of_steps(trainer: pl.Trainer, at: float) -> int:
    total = trainer.estimated_stepping_batches
    if not 0 < total < math.inf:
        raise MisconfigurationException(
            f"StageSwitch(at={at}) needs the number of steps that the training will make, which cannot be known here"
            " (a data set without length, or no limit on epochs and steps). Use StageSwitch(epoch=...),"
            " StageSwitch(step=...), or Trainer(max_steps=...)."
        )
    if trainer.num_training_batches == math.inf and (trainer.max_epochs or -1) != -1:
        rank_zero_warn(
            f"StageSwitch(at={at}) takes max_steps={trainer.max_steps} for the length of the training. If"
            f" max_epochs={trainer.max_epochs} ends it earlier, use StageSwitch(epoch=...)."
        )
    # The decimal number that was written: 0.07 * 100 is 7.000000000000001 in floating point.
    return math.ceil(Fraction(repr(at)) * int(total))
