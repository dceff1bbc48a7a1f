"""The options of ``fit``, ``validate`` and ``test`` before Lightning's command line reads them."""

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.command_parser import names_class
from lightning_ssesam.experiments.fit_config import (
    built_in,
    cosine,
    fit_config,
    is_comparison,
    method_names,
    thresholds,
)
from lightning_ssesam.experiments.parser_messages import cut
from lightning_ssesam.experiments.recipe import default_optimizer

_EPOCHS = 60
_CHECKPOINT = "a file, a pattern that matches one file, 'last' or 'hpc'"


@dataclass(frozen=True)
class Option:
    """An option with its values, as they stand in the command."""

    name: str
    values: tuple[str, ...]
    arguments: tuple[str, ...]


def split_options(arguments: Sequence[str]) -> list[Option]:
    """Return the options of a command, each with the values that follow it."""
    groups: list[list[str]] = []
    for argument in arguments:
        # A negative number is a value.
        if groups and not (argument.startswith("-") and not argument[1:2].isdigit()):
            groups[-1].append(argument)
        else:
            groups.append([argument])
    options = []
    for group in groups:
        name, equals, value = group[0].partition("=")
        name = {"-c": "--config"}.get(name, name)
        options.append(Option(name, (*((value,) if equals else ()), *group[1:]), tuple(group)))
    return options


def translate_method(options: Sequence[Option], folder: Path) -> tuple[list[str], dict[str, Any] | None]:
    """Replace a comparison and the name of a method by the configuration that trains it.

    Args:
        options: Options of the command.
        folder: Folder for the new configuration.

    Returns:
        The arguments of the command, and the comparison if a method is named.

    Raises:
        ArgumentError: If there is a comparison and no method, or no such method.
    """
    methods = [value for option in options if option.name == "--method" for value in option.values or ("",)]
    compared = [option for option in options if option.name == "--config" and is_comparison(content_of(option))]
    if not methods:
        if compared:
            names = cut(", ".join(method_names(content_of(compared[0]))))
            found = f"{compared[0].values[0]!r} is a comparison of several methods."
            raise ArgumentError(f"{found} Choose one with --method: {names}.")
        return [argument for option in options for argument in option.arguments], None
    if len(methods) > 1 or len(compared) > 1:
        got = ", ".join([*map(repr, methods), *(option.values[0] for option in compared)])
        raise bad_argument("method", "one name, with the YAML file of one comparison", got_text=got)
    comparison = content_of(compared[0]) if compared else {}
    config = fit_config(comparison, methods[0])
    # `fit` makes the schedule, since another option may change the number of epochs.
    config["model"].pop("scheduler")
    path = folder / "method.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    kept = [option for option in options if option.name != "--method" and option not in compared]
    arguments = [argument for option in kept for argument in option.arguments]
    return [f"--config={path}", *arguments], comparison


def check_checkpoint_option(options: Sequence[Option]) -> None:
    """Refuse a checkpoint that is no single path, such as `*.ckpt` where the shell has found two files."""
    for option in options:
        if option.name == "--ckpt_path" and (len(option.values) != 1 or not option.values[0]):
            got = ", ".join(map(repr, option.values)) or "nothing"
            raise bad_argument("ckpt_path", _CHECKPOINT, got_text=_counted(len(option.values), got))


def one_checkpoint(path: str) -> str:
    """Return the path of a checkpoint: a pattern stands for the file that it matches.

    Raises:
        ArgumentError: If there is no such file, or several.
    """
    if path in ("last", "best", "hpc") or "://" in path or path.startswith("registry") or os.path.exists(path):
        return path
    if not glob.has_magic(path):
        raise ArgumentError(f"No such checkpoint: {path!r}." if path else "No checkpoint: `ckpt_path` is empty.")
    found = sorted(glob.glob(path))
    if len(found) != 1:
        got = _counted(len(found), f"{path!r}, which matches {', '.join(map(repr, found)) or 'no file'}")
        raise bad_argument("ckpt_path", _CHECKPOINT, got_text=got)
    return found[0]


def _counted(number: int, text: str) -> str:
    return f"{number} files: {text}" if number > 1 else text


def defaults(options: Sequence[Option]) -> dict[str, Any]:
    """Return the defaults of a command: those of ``compare``, without the parts that the options name."""
    given = dict(_given(options))
    parts: dict[str, Any] = {
        "data": {"class_path": "lightning_ssesam.DigitsLT"},
        "model.backbone": {"class_path": "lightning_ssesam.models.SmallConvNet"},
        "model.objective": built_in("SSESAM", {}),
        "model.optimizer": default_optimizer(),
    }
    if given.keys().isdisjoint({"trainer.max_steps", "trainer.max_time"}):
        parts["trainer.max_epochs"] = _EPOCHS
    epochs = given.get("trainer.max_epochs", parts.get("trainer.max_epochs"))
    if isinstance(epochs, int) and epochs > 0:
        parts["model.scheduler"] = cosine(epochs)
    data = given.get("data", parts["data"])
    split = {f"model.{name}": value for name, value in thresholds(data).items()}
    chosen = {name: None if names_class(given.get(name, {})) else value for name, value in parts.items()}
    return {**chosen, **split}


def _given(options: Sequence[Option]) -> Iterator[tuple[str, Any]]:
    """Yield the dotted names that are given, with their values, in their order."""
    for option in options:
        if option.name == "--config":
            yield from _flat("", content_of(option))
        elif option.name.startswith("--") and option.values:
            yield option.name[2:].removesuffix("+"), value_of(option.values[0])


def _flat(prefix: str, content: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(content, Mapping):
        for name, value in content.items():
            yield f"{prefix}{name}", value
            yield from _flat(f"{prefix}{name}.", value)


def value_of(text: str) -> Any:
    """Return what a value of the command line means as YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def content_of(option: Option) -> dict[str, Any]:
    """Return the content of a configuration file. Lightning's command line refuses what cannot be read."""
    try:
        content = yaml.safe_load(Path(option.values[0]).read_text(encoding="utf-8"))
    except (IndexError, OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
