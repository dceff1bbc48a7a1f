"""The command ``lightning-ssesam``."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import lightning_ssesam

_USAGE = """usage: lightning-ssesam COMMAND [OPTIONS]

Train classifiers on long-tailed data with sharpness-aware methods.

commands:
{commands}

`lightning-ssesam COMMAND --help` lists the options of a command. `fit`, `validate` and `test` are Lightning's command
line. Give options one by one, or in a YAML file with `--config`. The names of these shipped files suffice there: for
`fit` {fit}; for `compare` {compare}.

examples:
  lightning-ssesam compare
  lightning-ssesam fit --config digits_lt
  lightning-ssesam fit --config digits_lt --model.objective SAM --model.objective.rho 0.1
  lightning-ssesam curvature lightning_logs/version_0/checkpoints/*.ckpt
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Command and options. By default those with which the program was started.
    """
    name, *options = list(sys.argv[1:] if args is None else args) or ["--help"]
    if name in ("-h", "--help"):
        commands = "\n".join(f"  {command:<10} {text}" for command, (_, text) in COMMANDS.items())
        shipped = {command: ", ".join(_shipped_configs(command)) for command in ("fit", "compare")}
        print(_USAGE.format(commands=commands, **shipped), end="")
    elif name == "--version":
        print(f"lightning-ssesam {lightning_ssesam.__version__}")
    elif name in COMMANDS:
        run, _ = COMMANDS[name]
        from lightning_ssesam.experiments.refusals import without_traceback

        with without_traceback():
            run(_with_shipped_configs(name, options))
    else:
        sys.exit(f"error: Expected a command, one of {', '.join(COMMANDS)}, but got {name!r}.")


def _train(command: str, options: list[str]) -> None:
    from lightning_ssesam.experiments.training_commands import run_training_command

    run_training_command(command, options)


def _compare(options: list[str]) -> None:
    from lightning_ssesam.compare import compare, usable_jobs

    _call(compare, "compare", options, jobs=usable_jobs())


def _sweep(options: list[str]) -> None:
    from lightning_ssesam.experiments.sweep import sweep

    _call(sweep, "sweep", options)


def _curvature(options: list[str]) -> None:
    from jsonargparse import ArgumentParser

    from lightning_ssesam.experiments.curvature_command import curvature
    from lightning_ssesam.experiments.lifetimes import ended_in_order

    parser = ArgumentParser(prog="lightning-ssesam curvature", description=_description(curvature))
    parser.add_argument("checkpoints", nargs="+", type=Path, help="Checkpoints, of one training or of several.")
    parser.add_function_arguments(curvature, as_group=False, skip={"checkpoints"})
    chosen = vars(parser.parse_args(options))
    with ended_in_order():
        curvature(**chosen)


COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "fit": (partial(_train, "fit"), "train a LongTailClassifier"),
    "validate": (partial(_train, "validate"), "evaluate a classifier on the validation data"),
    "test": (partial(_train, "test"), "evaluate a classifier on the test data"),
    "compare": (
        _compare,
        "train ERM, SAM, ImbSAM and SSESAM, or your own methods, and write tables, pictures and an HTML report",
    ),
    "sweep": (_sweep, "search for the radii of every method and the switch of SSESAM, on validation data"),
    "curvature": (_curvature, "measure and draw the curvature of head loss and tail loss, at checkpoints of fit"),
}
"""By name, the function of each command and its text for the usage. The error for unknown commands lists the names."""


def _call(function: Callable[..., Any], name: str, options: list[str], **defaults: Any) -> None:
    """Call a function with arguments from the command line. Its argument ``config`` gets all of them, as YAML."""
    from jsonargparse import ArgumentParser

    from lightning_ssesam.experiments.lifetimes import ended_in_order
    from lightning_ssesam.experiments.recipe import DEFAULT_SGD

    parser = ArgumentParser(prog=f"lightning-ssesam {name}", description=_description(function))
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    parser.add_function_arguments(function, as_group=False, skip={"config"})
    parser.set_defaults(optimizer={"class_path": "torch.optim.SGD", "init_args": DEFAULT_SGD.keywords}, **defaults)
    # Otherwise a chosen class takes over arguments of the default class, such as the learning rate.
    parser.set_defaults(dict.fromkeys(_names_given(options) & {"data", "backbone", "optimizer"}))
    chosen = parser.parse_args(options)
    # Newer versions of jsonargparse have `instantiate`, and warn about the older name.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    arguments = {**vars(instantiate(chosen)), "config": parser.dump(chosen)}
    with ended_in_order():
        function(**arguments)


def _description(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").partition("Args:")[0].replace("\n    ", "\n").strip()


def _names_given(options: list[str]) -> set[str]:
    """Return the options that are given, on the command line or in a file. ``--data.seed`` does not give ``data``."""
    import yaml

    names = {arg.removeprefix("--").partition("=")[0] for arg in options if arg.startswith("--")}
    for position, arg in enumerate(options):
        option, _, value = arg.partition("=")
        path = Path(value or "".join(options[position + 1 : position + 2]))
        if option == "--config" and path.is_file() and isinstance(content := yaml.safe_load(path.read_text()), dict):
            # Arguments without a class are for the default class.
            names |= {name for name, value in content.items() if not isinstance(value, dict) or "class_path" in value}
    return names


def _shipped_configs(command: str) -> list[str]:
    """Return the names of the shipped YAML files for a command, without their suffix."""
    if command == "sweep":
        return []
    paths = [Path(resource.name) for resource in files("lightning_ssesam.configs").iterdir()]
    # macOS puts files such as `._digits_lt.yaml` on drives of other systems.
    names = sorted(path.stem for path in paths if path.suffix == ".yaml" and path.stem[0] != ".")
    return [name for name in names if name.startswith("compare_") == (command == "compare")]


def _with_shipped_configs(command: str, options: list[str]) -> list[str]:
    """Replace the names of shipped YAML files by their paths."""
    shipped, resolved = _shipped_configs(command), list(options)
    for position, arg in enumerate(options):
        option, equals, value = arg.partition("=")
        if not equals and position > 0:
            option, value = options[position - 1], arg
        if option not in ("--config", "-c") or Path(value).exists():
            continue
        if value not in shipped:
            expected = f"a YAML file or one of {', '.join(shipped)}" if shipped else "a YAML file"
            sys.exit(f"error: Expected `--config` to be {expected}, but got {value!r}.")
        with as_file(files("lightning_ssesam.configs") / f"{value}.yaml") as path:
            resolved[position] = f"{option}={path}" if equals else str(path)
    return resolved
