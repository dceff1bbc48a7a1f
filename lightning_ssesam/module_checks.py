"""What a module with the mixin must have, and what it must not have."""

from collections.abc import Iterable
from inspect import getattr_static
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import LBFGS, Optimizer

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.ascent import Momentum
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.objectives import Objective
from lightning_ssesam.step_options import StepOptions
from lightning_ssesam.trainer_calls import is_fitting, trained_parameters
from lightning_ssesam.weights import Names, momentum_of

_HOOKS = ("sample_losses", "sample_targets", "select_samples", "configure_callbacks")
_OWN = ("in_clean_pass", "measuring", "skipped_updates", "automatic_optimization")


def check_bases(kind: type) -> None:
    """Refuse a class that derives from a module of ``pytorch_lightning``, when it is defined."""
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] == "pytorch_lightning":
            raise MisconfigurationException(
                f"`{kind.__name__}` derives from `{base.__name__}` of `pytorch_lightning`, but SharpnessAwareMixin"
                " works with `lightning`. Write `import lightning.pytorch as pl` everywhere in place of"
                " `import pytorch_lightning as pl`, also for the Trainer and its callbacks."
            )


def check_class(module: pl.LightningModule, mixin: type) -> None:
    """Refuse a module that lacks ``sample_losses`` or the mixin's ``__init__``, or takes its names."""
    name = type(module).__name__
    if getattr(type(module), "sample_losses", None) is vars(mixin)["sample_losses"]:
        raise MisconfigurationException(
            f"`{name}` uses SharpnessAwareMixin and must define `sample_losses(self, batch)`, which returns the"
            " unreduced losses (N,) of a batch."
        )
    if f"_{mixin.__name__}__step" not in vars(module):
        raise MisconfigurationException(
            f"`{name}` uses SharpnessAwareMixin: call `super().__init__()` in its `__init__`."
        )
    _check_names(module, mixin)


def check_step(module: pl.LightningModule, is_by_hand: bool) -> None:
    """Refuse a training step outside of a fit, or without the mixin's callbacks."""
    name = type(module).__name__
    if not is_fitting(module):
        raise MisconfigurationException(
            f"`{name}.training_step` makes an update and needs `Trainer.fit` around it. Call"
            " `sample_losses(batch)` for the losses of a batch."
        )
    if not is_by_hand:
        raise MisconfigurationException(
            f"`{name}.configure_callbacks` overrides SharpnessAwareMixin's and drops its callbacks. Return"
            " `[*super().configure_callbacks(), ...]` from it."
        )


def _check_names(module: pl.LightningModule, mixin: type) -> None:
    """Refuse attributes of a module that take the place of something that the mixin reads."""
    kind = type(module)
    parts = {*vars(module)["_modules"], *vars(module)["_parameters"], *vars(module)["_buffers"]}
    for name in _OWN:
        if name in parts or name in vars(module) or getattr_static(kind, name) is not vars(mixin)[name]:
            raise _taken(kind, name, "is what SharpnessAwareMixin itself says of a step")
    for name in _HOOKS:
        if name in parts or not callable(getattr(module, name)):
            raise _taken(kind, name, "is a method that SharpnessAwareMixin calls")
    if not callable(getattr(kind, "log", None)):
        raise _taken(kind, "log", "is the method that logs values")


def _taken(kind: type, name: str, what: str) -> MisconfigurationException:
    return MisconfigurationException(f"`{kind.__name__}.{name}` {what}. Give your attribute another name.")


def check_count(name: str, value: Any) -> int:
    """Return a number of skipped updates."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        expected = "the number of updates that SharpnessAwareMixin has skipped; give your attribute another name"
        raise bad_argument(name, expected, value)
    return value


def check_attributes(module: pl.LightningModule) -> tuple[Objective, StepOptions]:
    """Return the module's objective and options, if they can be used."""
    name, objective = type(module).__name__, getattr(module, "objective", None)
    options: Any = getattr(module, "step_options", None)
    if not isinstance(objective, Objective):
        raise MisconfigurationException(
            f"`{name}` uses SharpnessAwareMixin and must set `self.objective` to an Objective, such as"
            f" `SAM(rho=0.05)`, but it is {objective!r}."
        )
    if not isinstance(options, StepOptions) or "step_options" in vars(module)["_modules"]:
        raise MisconfigurationException(
            f"`{name}.step_options` must be a StepOptions, such as `StepOptions(interval=2)`, but it is {options!r}."
        )
    try:
        objective.check_ready()
    except (RuntimeError, ValueError) as error:
        raise MisconfigurationException(f"`{name}` cannot train as it is. {error}") from error
    return objective, options


def check_ascents(module: pl.LightningModule, objective: Objective, options: StepOptions, trainer: pl.Trainer) -> None:
    """Refuse ascents that cannot work with the module, its optimizer or several processes."""
    trained = trained_parameters(trainer, module.parameters())
    try:
        check_selections(objective, module, trained)
        check_momentum(objective, trainer.optimizers[0], trained)
    except ArgumentError as error:
        raise MisconfigurationException(f"`{type(module).__name__}` cannot train as it is. {error}") from error
    for ascent in objective.ascents():
        if ascent.direction.keeps_state and options.processes == "local" and trainer.world_size > 1:
            raise MisconfigurationException(
                f"`processes='local'` cannot work with {ascent.direction!r}, which would remember other gradients in"
                " each process. Use `processes='global'`."
            )


def check_selections(objective: Objective, module: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Raise ``ArgumentError`` if an ascent of an objective finds none of the parameters that are trained."""
    layers, trained = list(module.modules()), [p for p in parameters if p.requires_grad]
    selections = [ascent.only for ascent in objective.ascents() if not ascent.is_plain]
    if not selections or any(map(is_lazy, trained)):
        return
    weights = Names(layers, trained).weights(trained)
    for only in selections:
        weights.indices(only)


def check_momentum(objective: Objective, optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Raise ``ArgumentError`` if an ascent of an objective needs the momentum of an optimizer that has none."""
    trained = [p for p in parameters if p.requires_grad]
    if any(isinstance(ascent.direction, Momentum) for ascent in objective.ascents()) and not any(map(is_lazy, trained)):
        momentum_of(optimizer, trained)


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse an optimizer that evaluates the loss several times a step."""
    if isinstance(optimizer, LBFGS):
        raise MisconfigurationException(
            "LBFGS evaluates the loss several times a step, which SharpnessAwareMixin cannot serve. Use an optimizer"
            " that takes one gradient a step, such as SGD or AdamW."
        )
