"""The options of ``compare`` and ``sweep`` that say how a network is trained: types, texts and checks in one place."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Sampler

from lightning_ssesam._validation import bad_argument, check_integer
from lightning_ssesam.data import DigitsLT, LongTailDataModule
from lightning_ssesam.factories import check_factory, check_made
from lightning_ssesam.models import BackboneFactory, ContrastiveBranch, LongTailClassifier, SmallConvNet
from lightning_ssesam.objectives import Objective
from lightning_ssesam.step_options import StepOptions

MOST = 10_000
"""Upper limit of the options that are numbers of trainings: ``seeds``, ``jobs`` and ``trials``."""

DEFAULT_SGD = partial(SGD, lr=0.05, momentum=0.9, weight_decay=5e-4)


def default_optimizer() -> dict[str, Any]:
    """Return :data:`DEFAULT_SGD` by class path, as in a configuration."""
    return {"class_path": "torch.optim.SGD", "init_args": dict(DEFAULT_SGD.keywords)}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Options that all trainings of a comparison or a search share, checked when the recipe is made.

    Args:
        data: Data module, by class path.
        backbone: Network by class path, with its arguments.
        optimizer: Optimizer by class path, with its arguments.
        loss: Loss by class path, with its arguments; cross-entropy by default.
        epochs: Epochs of each training. The learning rate falls to 0 along a cosine.
        tail_fraction: Tail classes are the rarest ones that hold at most this fraction of the training samples; 0.2
            if tail_below is not given either.
        tail_below: Tail classes have fewer training samples than this.
        model: Further arguments of LongTailClassifier, such as tta or step_options.
        trainer: Further arguments of the Trainer, such as precision or accelerator.
        threads: CPU threads for each operation, an integer >= 1. Several threads pay off for large networks only.

    Raises:
        ArgumentError: If an argument is out of range, ``model`` or ``trainer`` contains a wrong name, or the training
            would use several devices.
    """

    data: Callable[[], LongTailDataModule] = DigitsLT
    backbone: BackboneFactory = SmallConvNet
    optimizer: Callable[[Iterable[Any]], Optimizer] = DEFAULT_SGD
    loss: Callable[[], nn.Module] | None = None
    epochs: int = 60
    tail_fraction: float | None = None
    tail_below: int | None = None
    model: dict[str, Any] | None = None
    trainer: dict[str, Any] | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("data", "backbone", "optimizer"):
            if getattr(self, name) is None:
                raise bad_argument(name, "a class or a function", None)
        check_factories(vars(self))
        check_integer("epochs", self.epochs, minimum=1)
        check_integer("threads", self.threads, minimum=1)
        set_elsewhere = {"class_counts", "backbone", "objective", "loss", "optimizer", "scheduler"}
        of_data = {"multi_label", "num_samples"}
        _check_names("model", self.model or {}, LongTailClassifier, set_elsewhere | of_data)
        _check_names("trainer", self.trainer or {}, pl.Trainer, {"max_epochs", "callbacks"})
        devices = (self.trainer or {}).get("devices", 1)
        is_list = isinstance(devices, Sequence) and not isinstance(devices, str)
        if devices not in (1, "1") and not (is_list and len(devices) == 1):
            expected = "settings with a single device (`jobs` makes several runs at a time)"
            raise bad_argument("trainer", expected, devices)
        _make_parts(self.model or {})

    def make_data(self) -> LongTailDataModule:
        """Return the data module."""
        return check_made("data", self.data(), LongTailDataModule)

    @property
    def model_arguments(self) -> dict[str, Any]:
        """The further arguments of LongTailClassifier, with the tail."""
        model, tail = self.model or {}, {"tail_fraction": self.tail_fraction, "tail_below": self.tail_below}
        return {**tail, **model, **_make_parts(model)}


KINDS: dict[str, type] = {
    "data": LongTailDataModule,
    "backbone": nn.Module,
    "optimizer": Optimizer,
    "loss": nn.Module,
    "objective": Objective,
    "scheduler": LRScheduler,
    "sampler": Sampler,
}
"""By the name of an option that takes a class path, the class of what is made from it."""


def check_factories(parts: Mapping[str, Any]) -> None:
    """Raise ``ArgumentError`` if an option that takes a class path makes another kind of object. None makes nothing."""
    for name in KINDS.keys() & parts.keys():
        is_made = name == "backbone" and isinstance(parts[name], nn.Module)
        if parts[name] is not None and not is_made:
            check_factory(name, parts[name], KINDS[name])


# Arguments of LongTailClassifier that a YAML file gives as a mapping.
_MAPPINGS: dict[str, type] = {"step_options": StepOptions, "contrast": ContrastiveBranch}


def _make_parts(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``step_options`` and ``contrast`` as objects, where they are mappings, as in a YAML file."""
    parts = {}
    for name, kind in _MAPPINGS.items():
        if not isinstance(arguments := model.get(name), Mapping):
            continue
        names = list(inspect.signature(kind).parameters)
        if wrong := sorted(arguments.keys() - names):
            raise bad_argument(name, f"any of {', '.join(names)}", got_text=", ".join(map(repr, wrong)))
        parts[name] = kind(**arguments)
    return parts


def _check_names(name: str, arguments: Mapping[str, Any], owner: type, set_elsewhere: set[str]) -> None:
    allowed = inspect.signature(owner).parameters.keys() - set_elsewhere
    if wrong := sorted(arguments.keys() - allowed):
        expected = f"arguments of {owner.__name__}, except those set elsewhere ({', '.join(sorted(set_elsewhere))})"
        raise bad_argument(name, expected, got_text=", ".join(map(repr, wrong)))
