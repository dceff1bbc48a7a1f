"""The base of callbacks that change a module at points of the training."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_ssesam._validation import Number, check_fraction, check_increasing, check_integer
from lightning_ssesam.callbacks.needs import steps_of_training
from lightning_ssesam.errors import ArgumentError


class Switch(Callback, ABC):
    """Changes a module at a point of the training, and announces the switch in one line.

    Subclass it and implement :meth:`apply`. A run that is resumed after the switch stays switched, even if it has
    become longer. One object can serve any number of runs. A subclass with ``takes_several = True`` can switch at
    several points: each argument then also takes a strictly increasing list. Its :meth:`apply` reads
    :attr:`num_switched`.

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
    takes_several: ClassVar[bool] = False
    """Whether it can switch at several points."""
    begins: ClassVar[str] = "the second part"
    """Name of the part that begins with the switch, as the announcement uses it."""
    missing: ClassVar[str] = "the second part"
    """The same name, as the warning uses it if the training ended before the switch."""
    switches_stages: ClassVar[bool] = False
    """Whether it sets the stage of an objective. The Trainer support warns if no callback does where one should."""

    def __init__(
        self,
        at: float | Sequence[float] | None = None,
        *,
        epoch: int | Sequence[int] | None = None,
        step: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if sum(value is not None for value in (at, epoch, step)) > 1:
            got = f"at={at!r}, epoch={epoch!r}, step={step!r}"
            raise ArgumentError(f"Expected at most one of the arguments `at`, `epoch` and `step`, but got {got}.")
        count = partial(check_integer, minimum=1)
        self.epoch = None if epoch is None else self._checked("epoch", epoch, count, "integers >= 1")
        self.step = None if step is None else self._checked("step", step, count, "integers >= 1")
        share = self.default_at if at is None else at
        fractions = "numbers strictly between 0 and 1"
        is_share = epoch is None and step is None
        self.at = self._checked("at", share, check_fraction, fractions) if is_share else None
        self._switch_step: list[int] | None = None
        # As in checkpoints: the step of the switch, -1 before it; with several points the steps of those made.
        self._switched_at: int | list[int] = [] if self.num_points > 1 else -1

    def _checked(
        self, name: str, value: Any, check: Callable[[str, Any], Number], expected: str
    ) -> Number | list[Number]:
        """Return a point, or several if there may be several."""
        is_list = self.takes_several and isinstance(value, Sequence) and not isinstance(value, str)
        return check_increasing(name, value, check, expected) if is_list else check(name, value)

    @abstractmethod
    def apply(self, pl_module: LightningModule, switched: bool) -> None:
        """Bring the module into its state after the last switch that was made, or before any if ``switched`` is False.

        Called when training starts and before every batch, so it should cost nothing if nothing has changed.
        """

    def concerns(self, pl_module: LightningModule) -> bool:
        """Return whether it applies to the module. Raise ``MisconfigurationException`` if it should but cannot."""
        return True

    def should_switch(self, step_idx: int, epoch_idx: int) -> bool:
        """Return whether a switch comes after ``step_idx`` optimizer steps, in epoch ``epoch_idx`` counted from 0.

        Called before every batch, until it has returned True for every point. It is about the point after those that
        :attr:`num_switched` counts. Override it for another policy.
        """
        if self.epoch is not None:
            return epoch_idx >= self._next(_as_list(self.epoch))
        return self._switch_step is not None and step_idx >= self._next(self._switch_step)

    def _next(self, points: Sequence[int]) -> int:
        return points[min(self.num_switched, len(points) - 1)]

    @property
    def num_points(self) -> int:
        """Number of points at which it switches."""
        return len(_as_list(next(point for point in (self.at, self.epoch, self.step) if point is not None)))

    @property
    def num_switched(self) -> int:
        """Number of switches that the run has made."""
        return len(self._made())

    def _made(self) -> list[int]:
        """Return the steps of the switches that were made."""
        return [step for step in _as_list(self._switched_at) if step >= 0]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when a run starts, before a checkpoint is loaded: forget the switches of an earlier run."""
        if stage == "fit" and trainer.global_step == 0:
            self._keep([])

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when the module is set up and callback states are loaded: switch if the run is resumed after it."""
        if self.concerns(pl_module) and self.num_switched > 0:
            # Not left to the first batch: a run that is resumed at its end has none.
            self.apply(pl_module, switched=True)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when counters and checkpoints are loaded: find the steps of the switches."""
        if self.at is not None:
            self._switch_step = self._shares_of_steps(trainer)
        elif self.step is not None:
            self._switch_step = _as_list(self.step)
        self._update(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before every batch: switch if its point is reached."""
        self._update(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when training ends: warn if it ended before a switch."""
        is_short = trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.num_switched < self.num_points and self.concerns(pl_module) and not is_short:
            kind, points = ("step", self._switch_step or []) if self.epoch is None else ("epoch", _as_list(self.epoch))
            set_for = " and ".join(f"{kind} {point}" for point in points[self.num_switched :])
            announced = f"{self._missing()}, which {type(self).__name__} had set for {set_for}"
            rank_zero_warn(f"The training ended at step {trainer.global_step} without {announced}.")

    def _update(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.concerns(pl_module):
            return
        # In a short training, several points may be one step.
        while self.num_switched < self.num_points and self.should_switch(trainer.global_step, trainer.current_epoch):
            self._keep([*self._made(), trainer.global_step])
            point = f"step {trainer.global_step} (epoch {trainer.current_epoch})"
            rank_zero_info(f"{type(self).__name__}: {self._begins()} from {point}.")
        self.apply(pl_module, switched=self.num_switched > 0)

    def _begins(self) -> str:
        """Return the name of the part that the last switch has begun."""
        return self.begins

    def _missing(self) -> str:
        """Return the name of the parts that have not begun."""
        return self.missing

    def _keep(self, steps: list[int]) -> None:
        """Keep the steps of the switches that were made."""
        self._switched_at = steps[: self.num_points] if self.num_points > 1 else next(iter(steps), -1)

    def __getstate__(self) -> dict[str, Any]:
        # `log` and `log_dict` are attached by the Trainer and refer to the last module.
        return {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the step of the switch, -1 before it; with several points the list of the switches made so far."""
        return {"switched_at": self._switched_at}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned, with as many points or fewer."""
        self._keep([int(step) for step in _as_list(state_dict["switched_at"]) if step >= 0])

    def _shares_of_steps(self, trainer: Trainer) -> list[int]:
        name = type(self).__name__
        advice = f"Use {name}(epoch=...), {name}(step=...), or Trainer(max_steps=...)."
        total = steps_of_training(trainer, f"{name}(at={self.at})", advice, f"use {name}(epoch=...).")
        # `at` is taken as the decimal number that the user wrote: as floats, 0.07 * 100 is 7.000000000000001.
        return [math.ceil(Fraction(repr(at)) * total) for at in _as_list(self.at)]


def _as_list(points: Any) -> list[Any]:
    return list(points) if isinstance(points, Sequence) else [points]
