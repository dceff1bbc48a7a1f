"""The base of callbacks that change a module at a point of the training."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from fractions import Fraction
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_ssesam._validation import check_fraction, check_integer
from lightning_ssesam.errors import ArgumentError


class Switch(Callback, ABC):
    """Changes a module at a point of the training, and announces the switch in one line.

    Subclass it and implement :meth:`apply`. A run that is resumed after the switch stays switched, even if it has
    become longer. One object can serve any number of runs.

    Args:
        at: Share of the training's optimizer steps after which it switches, in (0, 1); ``default_at`` unless
            ``epoch`` or ``step`` is given.
        epoch: Epoch before whose first batch it switches, counted from 0, an integer >= 1.
        step: Number of optimizer steps after which it switches, an integer >= 1.

    Raises:
        ArgumentError: If an argument is out of range, or more than one is given.
        MisconfigurationException: When training starts, if ``at`` is used and the number of steps cannot be known.

    Example:
        >>> class Freeze(Switch):
        ...     begins = missing = "the frozen backbone"
        ...
        ...     def apply(self, pl_module, switched):
        ...         pl_module.backbone.requires_grad_(not switched)
        >>> switch = Freeze(epoch=2)
        >>> [switch.should_switch(step_idx=100 * epoch, epoch_idx=epoch) for epoch in range(4)]
        [False, False, True, True]
    """

    log: Callable[..., None]  # attached by the Trainer

    default_at: ClassVar[float] = 0.5
    """Value of ``at`` if no point is given."""
    begins: ClassVar[str] = "the second part"
    """Name of the part that begins with the switch, as the announcement uses it."""
    missing: ClassVar[str] = "the second part"
    """The same name, as the warning uses it if the training ended before the switch."""
    switches_stages: ClassVar[bool] = False
    """Whether it sets the stage of an objective. The Trainer support warns if no callback does where one should."""

    def __init__(self, at: float | None = None, *, epoch: int | None = None, step: int | None = None) -> None:
        super().__init__()
        if sum(value is not None for value in (at, epoch, step)) > 1:
            got = f"at={at!r}, epoch={epoch!r}, step={step!r}"
            raise ArgumentError(f"Expected at most one of the arguments `at`, `epoch` and `step`, but got {got}.")
        self.epoch = None if epoch is None else check_integer("epoch", epoch, minimum=1)
        self.step = None if step is None else check_integer("step", step, minimum=1)
        share = self.default_at if at is None else at
        self.at = check_fraction("at", share) if epoch is None and step is None else None
        self._switch_step: int | None = None
        self._switched_at = -1  # the step of the switch, -1 before it

    @abstractmethod
    def apply(self, pl_module: LightningModule, switched: bool) -> None:
        """Bring the module into its state after the switch, or before it if ``switched`` is False.

        Called when training starts and before every batch, so it should cost nothing if nothing has changed.
        """

    def concerns(self, pl_module: LightningModule) -> bool:
        """Return whether it applies to the module. Raise ``MisconfigurationException`` if it should but cannot."""
        return True

    def should_switch(self, step_idx: int, epoch_idx: int) -> bool:
        """Return whether the switch comes after ``step_idx`` optimizer steps, in epoch ``epoch_idx`` counted from 0.

        Called before every batch, until it returns True. Override it for another policy.
        """
        if self.epoch is not None:
            return epoch_idx >= self.epoch
        return self._switch_step is not None and step_idx >= self._switch_step

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when a run starts, before a checkpoint is loaded: forget the switch of an earlier run."""
        if stage == "fit" and trainer.global_step == 0:
            self._switched_at = -1

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when the module is set up and callback states are loaded: switch if the run is resumed after it."""
        if self.concerns(pl_module) and self._switched_at >= 0:
            # Not left to the first batch: a run that is resumed at its end has none.
            self.apply(pl_module, switched=True)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when counters and checkpoints are loaded: find the step of the switch."""
        self._switch_step = self.step if self.at is None else self._share_of_steps(trainer, self.at)
        self._update(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before every batch: switch if its point is reached."""
        self._update(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when training ends: warn if it ended before the switch."""
        if self._switched_at < 0 and self.concerns(pl_module) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            point = f"epoch {self.epoch}" if self.epoch is not None else f"step {self._switch_step}"
            announced = f"{self.missing}, which {type(self).__name__} had set for {point}"
            rank_zero_warn(f"The training ended at step {trainer.global_step} without {announced}.")

    def _update(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.concerns(pl_module):
            return
        if self._switched_at < 0 and self.should_switch(trainer.global_step, trainer.current_epoch):
            self._switched_at = trainer.global_step
            point = f"step {trainer.global_step} (epoch {trainer.current_epoch})"
            rank_zero_info(f"{type(self).__name__}: {self.begins} from {point}.")
        self.apply(pl_module, switched=self._switched_at >= 0)

    def __getstate__(self) -> dict[str, Any]:
        # `log` and `log_dict` are attached by the Trainer and refer to the last module.
        return {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the step of the switch, -1 before it."""
        return {"switched_at": self._switched_at}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        self._switched_at = int(state_dict["switched_at"])

    def _share_of_steps(self, trainer: Trainer, at: float) -> int:
        name, total = type(self).__name__, trainer.estimated_stepping_batches
        if not 0 < total < math.inf:
            problem = f"{name}(at={at}) needs the number of steps that the training will make, but it is unknown"
            cause = "the data set has no length, or epochs and steps have no limit"
            advice = f"Use {name}(epoch=...), {name}(step=...), or Trainer(max_steps=...)."
            raise MisconfigurationException(f"{problem}: {cause}. {advice}")
        if trainer.num_training_batches == math.inf and (trainer.max_epochs or -1) != -1:
            assumed = f"{name}(at={at}) takes max_steps={trainer.max_steps} for the length of the training."
            rank_zero_warn(f"{assumed} If max_epochs={trainer.max_epochs} ends it earlier, use {name}(epoch=...).")
        # `at` is taken as the decimal number that the user wrote: as floats, 0.07 * 100 is 7.000000000000001.
        return math.ceil(Fraction(repr(at)) * int(total))


def unfit(pl_module: LightningModule, name: str, need: str) -> MisconfigurationException:
    """Build the error for a module whose attribute ``name`` is not what a callback needs."""
    got = f"`{type(pl_module).__name__}.{name}` is {getattr(pl_module, name, None)!r}"
    return MisconfigurationException(f"{need}, but {got}.")
