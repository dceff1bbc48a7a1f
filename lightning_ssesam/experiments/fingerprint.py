"""A text that identifies settings: equal for equal ones in every process, whatever only speed depends on."""

import functools
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelSummary, ProgressBar
from torch import nn

from lightning_ssesam.ascent import Ascent
from lightning_ssesam.data.contents import hash_array, hash_files
from lightning_ssesam.step_options import StepOptions

# Options of data modules by which no sample changes.
_SPEED = {"num_workers", "persistent_workers", "pin_memory", "prefetch_factor", "download"}
# Options of data modules by which no sample changes as long as they are off.
_OFF = {"in_memory"}
# Attributes of data modules and callbacks that belong to Lightning.
_LIGHTNING = {"trainer", "prepare_data_per_node", "allow_zero_length_dataloader_with_multiple_devices"}
# Options of the Trainer that say where it runs, what it writes and what it shows.
_SURROUNDINGS = {
    *("accelerator", "devices", "num_nodes", "strategy", "logger", "log_every_n_steps", "default_root_dir", "profiler"),
    *("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "num_sanity_val_steps"),
}
_DEEPEST = 6


def digest(parts: Any) -> str:
    """Return the SHA-256 of a description, as 64 hexadecimal digits."""
    return hashlib.sha256(describe(parts).encode()).hexdigest()


def describe(value: Any, above: tuple[int, ...] = ()) -> str:
    """Return a text that is equal for equal values, in any process.

    Arrays and tensors count by all of their elements, sets and mappings without their order, files and folders by where
    they are, functions by their name, and other objects by their class and their attributes, if their ``repr`` has not
    been written for them.

    Args:
        value: Value to describe.
        above: Identities of the containers and objects that the value is in. One of them is not described again.
    """
    if isinstance(value, torch.Tensor | np.ndarray):
        return hash_array(value)
    if isinstance(value, Path):
        return f"path {os.path.realpath(os.path.expanduser(value))}"
    if id(value) in above:
        return "..."
    within = (*above, id(value))
    if isinstance(value, Mapping):
        pairs = sorted(f"{key!r}: {describe(part, within)}" for key, part in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(describe(part, within) for part in value)}]"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(describe(part, within) for part in value))}}}"
    return _describe_object(value, within)


def _describe_object(value: Any, within: tuple[int, ...]) -> str:
    if isinstance(value, functools.partial):
        return f"partial {describe([value.func, value.args, value.keywords], within)}"
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        return value.__qualname__
    if isinstance(value, MethodType):
        return f"{value.__qualname__} {describe(value.__self__, within)}"
    if isinstance(value, nn.Module):
        return describe_module(value)
    if isinstance(value, StepOptions):
        # Recorded steps compute the numbers of full passes.
        passes = "full" if value.cuda_graphs else value.passes
        return repr(replace(value, passes=passes, cuda_graphs=False)).replace(", cuda_graphs=False", "")
    is_plain = type(value).__repr__ is object.__repr__  # type: ignore[comparison-overlap]
    if is_plain and len(within) <= _DEEPEST:
        return f"{type(value).__qualname__} {describe(getattr(value, '__dict__', {}), within)}"
    return without_addresses(repr(value))


def describe_module(module: nn.Module) -> str:
    """Return the ``repr`` of a network, with the simple attributes of its layers, which the ``repr`` may leave out."""
    attributes = {
        f"{path}.{name}": value
        for path, layer in module.named_modules()
        for name, value in vars(layer).items()
        if not name.startswith("_") and name != "training" and isinstance(value, bool | int | float | str)
    }
    return f"{without_addresses(repr(module))} {describe(attributes)}"


def data_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the public attributes or arguments of a data module on which its samples depend."""
    skipped = _SPEED | _LIGHTNING | {name for name in _OFF if values.get(name) is False}
    return {name: _as_path(value) for name, value in values.items() if not name.startswith("_") and name not in skipped}


def data_factory(factory: Any) -> Any:
    """Return what makes a data module, with those of its arguments on which its samples depend."""
    if isinstance(factory, functools.partial):
        return [factory.func, [_as_path(value) for value in factory.args], data_settings(factory.keywords)]
    return [factory, [], {}]


def files_of(factory: Any) -> str:
    """Return a text that changes with the files that a factory gets by name, such as pretrained weights."""
    given = [*factory.args, *factory.keywords.values()] if isinstance(factory, functools.partial) else []
    names = [str(value) for value in given if isinstance(value, str | Path) and _exists(str(value))]
    return hash_files(path for path in map(os.path.realpath, names) if os.path.isfile(path))


def _as_path(value: Any) -> Any:
    """Return a path as it counts, however it is written: a name in the working folder as a text, else a Path.

    A text without a folder, such as "exponential", stays as it is, also if there is a file of that name.
    """
    if isinstance(value, str):
        is_path = _exists(value) and (os.path.dirname(value) or os.path.islink(value))
    else:
        is_path = isinstance(value, Path)
    if not is_path:
        return value
    folder, name = os.path.split(os.path.realpath(os.path.expanduser(value)))
    return name if folder == os.path.realpath(os.curdir) else Path(folder, name)


def _exists(text: str) -> bool:
    # The same folder may be written in several ways.
    return 0 < len(text) < 1000 and "\0" not in text and os.path.exists(os.path.expanduser(text))


def trainer_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a Trainer on which the weights depend."""
    return {name: value for name, value in arguments.items() if name not in _SURROUNDINGS}


def callback_settings(callbacks: Iterable[Callback]) -> list[Any]:
    """Return the classes and the attributes of callbacks, except of those that only show something."""
    shown = (ProgressBar, ModelSummary)
    return [
        [type(callback).__qualname__, {name: value for name, value in vars(callback).items() if name not in _LIGHTNING}]
        for callback in callbacks
        if not isinstance(callback, shown)
    ]


def ascent_settings(ascent: Ascent) -> str:
    """Return a text with the parts of an ascent, each with its class and its attributes."""
    parts = vars(ascent).items()
    return describe({name: [type(part).__qualname__, getattr(part, "__dict__", None), part] for name, part in parts})


def without_addresses(text: str) -> str:
    """Return a ``repr`` without the places of objects in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)
