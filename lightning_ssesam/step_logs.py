"""One logged value a step from its several clean passes, when the step has succeeded."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics import Metric

_SIGNATURE = inspect.signature(pl.LightningModule.log)


class _Call(NamedTuple):
    value: Any
    size: int
    options: dict[str, Any]


class StepLogs:
    """Collects the ``log`` calls of a step's clean passes and makes one of each.

    Attributes:
        samples: Number of samples in the current pass.
    """

    def __init__(self) -> None:
        self.samples = 0
        self._calls: dict[str, list[_Call]] = {}

    def add(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Keep one call of ``LightningModule.log`` for later."""
        options = dict(_SIGNATURE.bind(None, name, value, *args, **kwargs).arguments)
        for given in ("self", "name", "value"):
            options.pop(given)
        size = options.pop("batch_size", None) or self.samples or 1
        if isinstance(value, Tensor) and not options.get("enable_graph"):
            # The pass may end before it is logged, and its graph with it. A clone, as it may be overwritten till then.
            value = value.detach().clone()
        self._calls.setdefault(name, []).append(_Call(value, size, options))

    def flush(self, log: Callable[..., None]) -> set[str]:
        """Call ``log`` once for every name, and forget the calls. Return the names."""
        calls, self._calls = self._calls, {}
        for name, same in calls.items():
            size = sum(call.size for call in same)
            log(name, _merge(same), batch_size=size, **same[-1].options)
        return set(calls)

    def clear(self) -> None:
        """Forget the calls of a step that was interrupted."""
        self._calls = {}


def _merge(calls: list[_Call]) -> Any:
    reduce_fx = calls[-1].options.get("reduce_fx", "mean")
    name = reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", None)
    if len(calls) == 1 or isinstance(calls[0].value, Metric) or name not in ("mean", "sum", "min", "max"):
        # Lightning knows what to do with a metric, and what to say of another reduction.
        return calls[-1].value
    values = torch.stack([torch.as_tensor(call.value).detach().reshape(()) for call in calls])
    if name != "mean":
        merged: Tensor = getattr(values, name)()
        return merged
    sizes = torch.tensor([float(call.size) for call in calls]).to(values.device)
    return (values * sizes).sum() / sizes.sum()
