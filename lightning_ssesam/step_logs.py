"""One logged value a step from its several clean passes, when the step has succeeded."""

import inspect
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import Metric

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.engine import Outcome
from lightning_ssesam.tensors import move

_SIGNATURE = inspect.signature(pl.LightningModule.log)
_DEFAULTS = {
    name: parameter.default
    for name, parameter in _SIGNATURE.parameters.items()
    if name not in ("self", "name", "value", "batch_size")
}
_REDUCTIONS = ("mean", "avg", "sum", "min", "max")


class _Call(NamedTuple):
    value: Any
    size: Any
    options: dict[str, Any]


class StepLogs:
    """Collects the ``log`` calls of a step's clean passes and makes one of each.

    Lightning sees them after the update. So what it would refuse is refused before, at the line that calls ``log``.

    Attributes:
        samples: Number of samples in the current pass.
        calls: Calls of the present step, by name. Those of a recorded step stand for those of its replays.
    """

    def __init__(self) -> None:
        self.samples = 0
        self.calls: dict[str, list[_Call]] = {}
        self._as_given: dict[str, dict[str, Any]] = {}
        self._as_meant: dict[str, dict[str, Any]] = {}
        self._metrics: dict[int, str] = {}

    def add(self, module: pl.LightningModule, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Keep one call of ``LightningModule.log`` for later.

        Raises:
            ArgumentError: If the value, its name or the batch size cannot be logged.
            MisconfigurationException: If the options do not go together, or differ from those of an earlier call.
        """
        if not isinstance(name, str):
            raise bad_argument("name", "a string, in `self.log(name, value)`", name)
        value = _checked(name, value)
        options = self.note(module, name, value, *args, **kwargs)
        size = options.pop("batch_size", None) or self.samples or 1
        if not isinstance(size, Real | Tensor):
            raise bad_argument("batch_size", f"a number, in `self.log({name!r}, ...)`", size)
        if isinstance(value, Tensor) and not options.get("enable_graph"):
            # The pass may end before it is logged, and its graph with it. A clone, as it may be overwritten till then.
            value = value.detach().clone()
        self.calls.setdefault(name, []).append(_Call(value, size, options))

    def note(self, module: pl.LightningModule, name: str, value: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Check the options of a call of ``log`` within the training step, and return them."""
        if not args and not isinstance(value, Metric):
            # Most often the same call as in the step before.
            given = {key: option for key, option in kwargs.items() if key != "batch_size"}
            if self._as_given.get(name) == given:
                return kwargs
        options = dict(_SIGNATURE.bind(module, name, value, *args, **kwargs).arguments)
        given = {key: option for key, option in options.items() if key not in ("self", "name", "value", "batch_size")}
        if isinstance(value, Metric):
            given["metric_attribute"] = given.get("metric_attribute") or self._attribute(module, value)
        if self._as_given.get(name) != given:
            meant = _meant(name, {**_DEFAULTS, **given}, module.trainer.world_size > 1)
            if self._as_meant.setdefault(name, meant) != meant:
                raise MisconfigurationException(
                    f"You called `self.log({name!r}, ...)` twice in the training step with different arguments. Use the"
                    " same arguments, or another name."
                )
            self._as_given[name] = given
        return {key: option for key, option in options.items() if key not in ("self", "name", "value")}

    def _attribute(self, module: pl.LightningModule, metric: Metric) -> str:
        """Return the name of a metric in the module."""
        if id(metric) not in self._metrics:
            self._metrics = {id(part): name for name, part in module.named_modules() if isinstance(part, Metric)}
        if id(metric) not in self._metrics:
            raise MisconfigurationException(
                f"You logged a {type(metric).__name__} that is no attribute of `{type(module).__name__}`. Make it an"
                " attribute, or log its value."
            )
        return self._metrics[id(metric)]

    def flush(self, log: Callable[..., None]) -> set[str]:
        """Call ``log`` once for every name, and forget the calls. Return the names."""
        calls, self.calls = self.calls, {}
        for name, same in calls.items():
            size = sum(call.size for call in same)
            log(name, _merge(same), batch_size=size, **same[-1].options)
        return set(calls)

    def clear(self) -> None:
        """Forget the calls of a step that was interrupted."""
        self.calls = {}


def _checked(name: str, value: Any) -> Any:
    """Return a value that Lightning can log."""
    if isinstance(value, Tensor) and value.numel() != 1:
        got = f"one of shape {tuple(value.shape)}. You can try `.mean()`"
        raise bad_argument("value", f"a tensor of a single element, in `self.log({name!r}, value)`", got_text=got)
    if not isinstance(value, Tensor | Metric | Real):
        raise bad_argument("value", f"a number, a tensor or a metric, in `self.log({name!r}, value)`", value)
    # Torch makes no tensors of other numbers, such as fractions.
    return float(value) if isinstance(value, Real) and not isinstance(value, int | float | np.number) else value


def _meant(name: str, options: dict[str, Any], is_distributed: bool) -> dict[str, Any]:
    """Return options with their defaults in a training step, as Lightning compares them, if it would take them."""
    reduce_fx = options["reduce_fx"]
    reduction = reduce_fx.lower() if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", None)
    builtin = reduce_fx in (torch.mean, torch.sum, torch.min, torch.max, sum, min, max)
    if reduction not in _REDUCTIONS or not (builtin or isinstance(reduce_fx, str)):
        raise MisconfigurationException(
            f"Expected `reduce_fx` of `self.log({name!r}, ...)` to be one of {', '.join(map(repr, _REDUCTIONS))}, but"
            f" got {reduce_fx!r}. For another reduction, log a `torchmetrics.Metric`."
        )
    meant = {**options, "reduce_fx": "mean" if reduction == "avg" else reduction}
    for key, default in {"on_step": True, "on_epoch": False, "logger": True}.items():
        meant[key] = default if options[key] is None else bool(options[key])
    if not meant["on_step"] and not meant["on_epoch"]:
        raise MisconfigurationException(
            f"`self.log({name!r}, ..., on_step=False)` logs nothing in a training step. Add `on_epoch=True`."
        )
    if options["add_dataloader_idx"] and "/dataloader_idx_" in name:
        raise MisconfigurationException(f"Log {name!r} under a name without `/dataloader_idx_`.")
    meant["sync_dist"] = bool(options["sync_dist"]) and is_distributed
    return meant


def _merge(calls: list[_Call]) -> Any:
    reduce_fx = calls[-1].options.get("reduce_fx", "mean")
    name = reduce_fx if isinstance(reduce_fx, str) else reduce_fx.__name__
    name = {"avg": "mean"}.get(name.lower(), name.lower())
    if len(calls) == 1 or isinstance(calls[0].value, Metric):
        # Lightning knows what to do with a metric.
        return calls[-1].value
    values = torch.stack([torch.as_tensor(call.value).detach().reshape(()) for call in calls])
    if name != "mean":
        merged: Tensor = getattr(values, name)()
        return merged
    sizes = move(torch.tensor([float(call.size) for call in calls]), values.device)
    return (values * sizes).sum() / sizes.sum()


def norms_and_sharpness(
    outcome: Outcome, term_names: tuple[str, ...], unscaled: Callable[[Tensor], Tensor], share: float
) -> dict[str, Tensor]:
    """Return what ``log_sharpness`` logs of a step, by name. ``share`` is the part of the update that it made."""
    assert outcome.gradient_norm is not None
    values, number = {"train/grad_norm": unscaled(outcome.gradient_norm)}, len(outcome.sharpness)
    names = term_names if len(term_names) == number else tuple(map(str, range(number)))
    for name, norm, rise in zip(names, outcome.gradient_norms, outcome.sharpness, strict=True):
        if norm is not None:
            values[f"train/grad_norm_{name}"] = unscaled(norm) / share
        if rise is not None:
            values[f"train/sharpness_{name}"] = rise
    return values
