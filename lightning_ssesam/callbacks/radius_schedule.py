"""A callback that moves a radius of the objective with the training's progress."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_ssesam._validation import (
    bad_argument,
    check_choice,
    check_fraction,
    check_increasing,
    check_radius,
    check_share,
)
from lightning_ssesam.callbacks.needs import objective_of, on_device, steps_of_training
from lightning_ssesam.objectives import Objective
from lightning_ssesam.trainer_calls import callbacks_of

_POINTS = (0.5, 0.75)


class RadiusSchedule(Callback):
    """Moves a radius of the objective from one value to another while a model trains.

    Before every optimizer step it sets the radius by the progress: the steps done over the steps of the whole training.
    It logs the value of every step under the radius's name, such as ``radius/head_rho``. A run that is resumed follows
    the schedule that it began with, even if it has become longer: it then stays at ``end``. The radius keeps its last
    value when the training ends. Several schedules can move different radii, with or without a
    :class:`~lightning_ssesam.StageSwitch`. One object can serve any number of runs.

    For class-imbalanced data, Rangwani et al. (NeurIPS 2022, arXiv:2212.13827) raise the radius in the training.

    Args:
        name: Name of the radius, an attribute of the objective such as ``"rho"``, ``"head_rho"`` or ``"tail_rho"``. In
            a :class:`~lightning_ssesam.Staged` it is the radius of all objectives that have it.
        start: Radius of the first step, a finite number >= 0.
        end: Radius at the end, a finite number >= 0.
        shape: Form of the way: ``"linear"`` is a line, ``"cosine"`` half a cosine, ``"steps"`` jumps of equal size.
        begin: Progress up to which the radius is ``start``, in [0, 1); for ``"linear"`` and ``"cosine"``.
        finish: Progress from which on the radius is ``end``, in (begin, 1]; for ``"linear"`` and ``"cosine"``.
        points: Progress at each jump of ``"steps"``, a strictly increasing list in (0, 1); (0.5, 0.75) by default.

    Raises:
        ArgumentError: If an argument is out of range, or does not belong to the shape.
        MisconfigurationException: When training starts, if the objective has no radius of this name, another
            schedule moves it too, or the number of steps cannot be known.

    Example:
        >>> schedule = RadiusSchedule("rho", 0.0, 0.1, shape="steps", points=[0.5, 0.75])
        >>> [schedule.value_at(progress) for progress in (0.0, 0.49, 0.5, 0.75, 1.0)]
        [0.0, 0.0, 0.05, 0.1, 0.1]
    """

    log: Callable[..., None]  # attached by the Trainer

    def __init__(
        self,
        name: str = "rho",
        start: float = 0.05,
        end: float = 0.0,
        shape: Literal["linear", "cosine", "steps"] = "linear",
        begin: float = 0.0,
        finish: float = 1.0,
        points: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(name, str) or not name.isidentifier():
            raise bad_argument("name", "the name of a radius, such as 'rho'", name)
        self.name = name
        self.start, self.end = check_radius("start", start), check_radius("end", end)
        self.shape = check_choice("shape", shape, ("linear", "cosine", "steps"))
        self.begin, self.finish = check_share("begin", begin), check_share("finish", finish)
        if self.begin >= self.finish:
            raise bad_argument("finish", f"greater than `begin`, which is {begin}", finish)
        self.points = None
        if points is not None:
            self.points = check_increasing("points", points, check_fraction, "numbers strictly between 0 and 1")
        for argument, value, default in (("begin", begin, 0.0), ("finish", finish, 1.0)):
            if shape == "steps" and value != default:
                raise bad_argument(argument, f"{default} with shape='steps', which takes `points`", value)
        if shape != "steps" and points is not None:
            raise bad_argument("points", f"None with shape={shape!r}, which takes `begin` and `finish`", points)
        self._total: int | None = None  # optimizer steps of the whole training

    def value_at(self, progress: float) -> float:
        """Return the radius at a share of the training's steps, a finite number >= 0. From 1 on it is ``end``."""
        check_radius("progress", progress)
        if self.shape == "steps":
            points = self.points or _POINTS
            share = bisect_right(points, progress) / len(points)
        else:
            share = min(max((progress - self.begin) / (self.finish - self.begin), 0.0), 1.0)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        # The end exactly: a sum would be off by rounding.
        return self.end if share == 1 else self.start + (self.end - self.start) * share

    def misfit(self, objective: Objective) -> str:
        """Return what is wrong if an objective has no radius of this name, else an empty text."""
        if self.name in objective.radius_values:
            return ""
        names = ", ".join(objective.radius_values)
        has = f"whose radii are {names}: name one of them" if names else "which has no radius: leave it away"
        return f"RadiusSchedule(name={self.name!r}) cannot move a radius of {type(objective).__name__}, {has}."

    @property
    @override
    def state_key(self) -> str:
        """The key of the state in checkpoints. It has the name of the radius: each has its own schedule."""
        return f"{type(self).__qualname__}(name={self.name!r})"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when a run starts, before a checkpoint is loaded: forget the length of an earlier run."""
        if stage == "fit" and trainer.global_step == 0:
            self._total = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when the module is set up: refuse a radius that the objective does not have, or that moves twice."""
        if misfit := self.misfit(objective_of(pl_module, "RadiusSchedule")):
            raise MisconfigurationException(misfit)
        schedules = [callback for callback in callbacks_of(trainer) if isinstance(callback, RadiusSchedule)]
        if sum(schedule.name == self.name for schedule in schedules) > 1:
            raise MisconfigurationException(
                f"Several RadiusSchedules move `{self.name}`. Leave one of them in the callbacks of the Trainer."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when counters and checkpoints are loaded: find the length of the training, and set the radius."""
        if self._total is None:
            advice = "Use Trainer(max_steps=...)."
            self._total = steps_of_training(trainer, "RadiusSchedule", advice, "set `max_steps` to what it makes.")
        self._set(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before every batch: set the radius, and log it."""
        value = on_device(pl_module, self._set(trainer, pl_module))
        self.log(f"radius/{self.name}", value, on_step=True, on_epoch=False)

    def _set(self, trainer: Trainer, pl_module: LightningModule) -> float:
        """Set the radius of the next step, and return it."""
        assert self._total is not None
        value = self.value_at(trainer.global_step / self._total)
        objective_of(pl_module, "RadiusSchedule").set_radius(self.name, value)
        return value

    def __getstate__(self) -> dict[str, Any]:
        # `log` and `log_dict` are attached by the Trainer and refer to the last module.
        return {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the number of optimizer steps of the whole training; None before the first one."""
        return {"total_steps": self._total}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        total = state_dict["total_steps"]
        self._total = None if total is None else int(total)
