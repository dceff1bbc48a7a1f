"""What a classifier's checkpoint has besides weights: all that builds the classifier again."""

import os
import re
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from inspect import signature
from pathlib import Path
from typing import IO, Any, NoReturn

import fsspec
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightning_ssesam.data.image_input import ImageInput
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.models.description import parameters_of, restore, unknown_name
from lightning_ssesam.terms import Objective, Term

KEY = "classifier"
"""Key in a checkpoint."""

_WAY_OUT = "pass `weights_only=False`"


def load_content(source: str | Path | IO[bytes], weights_only: bool, way_out: str, kind: str) -> dict[str, Any]:
    """Return the content of a checkpoint, on the CPU.

    Args:
        source: Path or address of the file, or an open file, which is put back to its beginning.
        weights_only: Flag that refuses more than plain data.
        way_out: What to do if a file with more is trusted, for the error.
        kind: What the checkpoint should be one of, for the error.

    Raises:
        ArgumentError: If the file is no checkpoint, or holds more than plain data.
    """
    refusal = f"{str(source)!r} is no checkpoint of {kind}"
    try:
        if not isinstance(source, str | Path):
            content = torch.load(source, map_location="cpu", weights_only=weights_only)
            source.seek(0)
        elif os.path.exists(source):
            # Tensors stay in the file until they are used.
            is_mapped = zipfile.is_zipfile(source)
            content = torch.load(str(source), map_location="cpu", weights_only=weights_only, mmap=is_mapped)
        else:
            with fsspec.open(str(source), "rb") as file:
                content = torch.load(file, map_location="cpu", weights_only=weights_only)
    except Exception as error:
        raise unsafe(source, error, way_out) or ArgumentError(f"{refusal}.") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), Mapping):
        raise ArgumentError(f"{refusal}.")
    return content


def read_plain(source: str | Path | IO[bytes], weights_only: bool = True) -> dict[str, Any]:
    """Return the content of a checkpoint, on the CPU.

    Args:
        source: Path or address of the file, or an open file, which is put back to its beginning.
        weights_only: Flag that refuses more than plain data.

    Raises:
        ArgumentError: If the file is no checkpoint, or holds more than plain data.
    """
    if isinstance(source, str | Path) and "://" not in str(source) and not os.path.exists(source):
        raise ArgumentError(f"No such checkpoint: {str(source)!r}.")
    content = load_content(source, weights_only, _WAY_OUT, "a LongTailClassifier")
    if weights_only:
        _refuse_named_code(source, content)
    return content


def _refuse_named_code(source: object, content: Mapping[str, Any]) -> None:
    """Refuse entries by which Lightning would let a checkpoint choose a class and its arguments (core/saving.py)."""
    given = content.get("hyper_parameters")
    chosen = [str(name) for name in (given if isinstance(given, Mapping) else ()) if str(name).startswith("_")]
    # Names of the same entry in earlier versions of Lightning, which this library never wrote.
    chosen += [name for name in ("hparams", "module_arguments") if name in content]
    if chosen:
        raise _refusal(source, f"`{chosen[0]}`, which may name code", _WAY_OUT)


def unsafe(source: object, error: BaseException, way_out: str) -> ArgumentError | None:
    """Return the error for a file that holds more than plain data, if that is why torch has refused it."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return found and _refusal(source, f"{found[1]}, which is no plain data", way_out)


def _refusal(source: object, held: str, way_out: str) -> ArgumentError:
    return ArgumentError(
        f"The checkpoint {str(source)!r} holds {held} and could run code when it is loaded."
        f" If you trust whoever made the file, {way_out}."
    )


def saved_content(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint says of its classifier: its arguments, class names, form of the input, and class.

    All of it is empty in a checkpoint of another module or of an earlier version.
    """
    saved = checkpoint.get(KEY, {})
    try:
        image_input = saved.get("image_input")
        return {
            "arguments": dict(saved.get("arguments", {})),
            "class_names": _texts(saved.get("class_names", [])),
            "made_by": str(saved.get("made_by", "")),
            "image_input": None if image_input is None else ImageInput(**image_input),
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise ArgumentError(f"The checkpoint has a wrong entry {KEY!r}: {error}") from error


def _texts(values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"class names {values!r}")
    return values


def restored_arguments(saved: Mapping[str, Any], given: Collection[str], factory: type) -> dict[str, Any]:
    """Return the arguments of a classifier that a checkpoint describes, except those that are given.

    A part that the checkpoint could not describe is replaced by one that raises ``ArgumentError`` when it is used.

    Args:
        saved: Descriptions of the arguments, by name.
        given: Names of the arguments that the caller gives.
        factory: Class of the classifier. Arguments that it does not have are left out.

    Raises:
        ArgumentError: If the network is unknown, or a description names something that is not allowed.
    """
    names = set(parameters_of(factory))
    chosen = {name: value for name, value in saved.items() if name in names and name not in given}
    restored = {}
    for name, description in chosen.items():
        unknown = unknown_name(description)
        if unknown is not None and name not in _STAND_INS:
            raise _lost(name, unknown)
        restored[name] = restore(description) if unknown is None else _STAND_INS[name](unknown)
    return restored


def _lost(name: str, unknown: str) -> ArgumentError:
    return ArgumentError(
        f"The checkpoint does not have the {name}: it was {unknown}, which is no class of lightning-ssesam, torch or"
        f" torchvision. Give it: `load_from_checkpoint(path, {name}=...)`."
    )


def name_of_class(kind: type) -> str:
    """Return the name of a class with its module, as a checkpoint keeps it."""
    return f"{kind.__module__}.{kind.__qualname__}"


def check_maker(made_by: str, kind: type, given: Collection[str]) -> None:
    """Check that a class can build the classifier of a checkpoint.

    Args:
        made_by: Name of the class that has saved the checkpoint; empty if unknown.
        kind: Class that loads it. A warning says if it is another one.
        given: Names of the arguments that the caller gives.

    Raises:
        ArgumentError: If a subclass has arguments of its own that are not given.
    """
    if made_by not in ("", name_of_class(kind)):
        rank_zero_warn(
            f"The checkpoint was saved by {made_by}, and is loaded by {name_of_class(kind)}. If the former changes how"
            " logits are computed, this classifier predicts other classes. Load it by the class that has saved it."
        )
    own = signature(kind).parameters.values()
    needed = [p.name for p in own if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if missing := [name for name in needed if name not in given and name not in ("class_counts", "backbone")]:
        arguments = ", ".join(f"{name}=..." for name in missing)
        raise ArgumentError(f"{kind.__name__} has arguments of its own: `load_from_checkpoint(path, {arguments})`.")


def build(load: Callable[..., Any], arguments: Mapping[str, Any], given: Collection[str]) -> Any:
    """Return what a function makes with the arguments of a checkpoint, without those that a subclass sets itself.

    Args:
        load: Function that is called with the arguments.
        arguments: Arguments by name.
        given: Names of the arguments that the caller gives.
    """
    try:
        return load(**arguments)
    except TypeError as error:
        repeated = re.search(r"multiple values for (?:keyword )?argument '(\w+)'", str(error))
        if repeated is None or repeated[1] in given or repeated[1] not in arguments:
            raise
    return build(load, {name: value for name, value in arguments.items() if name != repeated[1]}, given)


class _LostObjective(Objective):
    def __init__(self, unknown: str) -> None:
        super().__init__()
        self.unknown_name = unknown

    @override
    def terms(self, targets: Tensor) -> tuple[Term, ...]:
        raise _lost("objective", self.unknown_name)


class _LostLoss(nn.Module):
    def __init__(self, unknown: str) -> None:
        super().__init__()
        self.unknown_name = unknown

    @override
    def forward(self, logits: Tensor, targets: Tensor) -> NoReturn:
        raise _lost("loss", self.unknown_name)


def _lost_optimizer(parameters: Iterable[Any], unknown: str) -> Optimizer:
    raise _lost("optimizer", unknown)


def _lost_scheduler(optimizer: Optimizer, unknown: str) -> LRScheduler:
    raise _lost("scheduler", unknown)


_STAND_INS: dict[str, Callable[[str], Any]] = {
    "objective": _LostObjective,
    "loss": _LostLoss,
    "optimizer": lambda unknown: partial(_lost_optimizer, unknown=unknown),
    "scheduler": lambda unknown: partial(_lost_scheduler, unknown=unknown),
}
