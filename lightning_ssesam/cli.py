"""The command ``lightning-ssesam``."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import lightning_ssesam

_LIGHTNING_COMMANDS = ("fit", "validate", "test")

_USAGE = """usage: lightning-ssesam COMMAND [OPTIONS]

Train classifiers on long-tailed data with sharpness-aware methods.

commands:
  fit        train a LongTailClassifier
  validate   evaluate it on the validation data
  test       evaluate it on the test data
  compare    train ERM, SAM, ImbSAM and SSESAM, or methods of your own, side by side; tables, pictures, an HTML report
  sweep      search for the radii of SSESAM and its switch, on validation data
  curvature  measure and draw how the losses of head and tail bend, at checkpoints of fit

`lightning-ssesam COMMAND --help` lists the options of a command. `fit`, `validate` and `test` are Lightning's command
line. Give options one by one or in a YAML file with `--config`, where a name without a suffix is a shipped file: for
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
        args: Command and options; those the program was started with by default.

    """
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(
            _USAGE.format(fit=", ".join(_shipped_configs("fit")), compare=", ".join(_shipped_configs("compare"))),
            end="",
        )
    elif args[0] == "--version":
        print(f"lightning-ssesam {lightning_ssesam.__version__}")
    elif args[0] == "compare":
        _compare(args[1:])
    elif args[0] == "sweep":
        _sweep(args[1:])
    elif args[0] == "curvature":
        _curvature(args[1:])
    elif args[0] in _LIGHTNING_COMMANDS:
        _lightning(_with_shipped_configs(args))
    else:
        commands = ", ".join([*_LIGHTNING_COMMANDS, "compare", "sweep", "curvature"])
        sys.exit(f"error: Expected a command, one of {commands}, but got {args[0]!r}.")


def _compare(args: list[str]) -> None:
    from lightning_ssesam.compare import compare, usable_jobs

    _call(compare, "compare", args, jobs=usable_jobs())


def _sweep(args: list[str]) -> None:
    from lightning_ssesam.sweep import sweep

    _call(sweep, "sweep", args)


def _curvature(args: list[str]) -> None:
    from jsonargparse import ArgumentParser

    from lightning_ssesam.curvature.command import curvature

    parser = ArgumentParser(prog="lightning-ssesam curvature", description=_description(curvature))
    parser.add_argument("checkpoints", nargs="+", type=Path, help="Checkpoints, of one training or of several.")
    parser.add_function_arguments(curvature, as_group=False, skip={"checkpoints"})
    with _one_line_errors(), _quiet_interrupt():
        curvature(**vars(parser.parse_args(_with_shipped_configs(["curvature", *args])[1:])))


def _call(function: Callable[..., Any], name: str, args: list[str], **defaults: Any) -> None:
    """Call a function with what the command line says of its arguments, and with all of that as ``config``, in YAML."""
    from jsonargparse import ArgumentParser

    from lightning_ssesam.compare import DEFAULT_SGD

    parser = ArgumentParser(prog=f"lightning-ssesam {name}", description=_description(function))
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    parser.add_function_arguments(function, as_group=False, skip={"config"})
    parser.set_defaults(optimizer={"class_path": "torch.optim.SGD", "init_args": DEFAULT_SGD.keywords}, **defaults)
    args = _with_shipped_configs([name, *args])[1:]
    # Else a class that is chosen takes over what it can of the default's arguments: the learning rate, say.
    parser.set_defaults(dict.fromkeys(_names_given(args) & {"data", "backbone", "optimizer"}))
    with _one_line_errors(), _quiet_interrupt():
        chosen = parser.parse_args(args)
        # The later name; versions that have it warn of the earlier one.
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
        arguments = vars(instantiate(chosen))
        function(**{**arguments, "config": parser.dump(chosen)})


def _description(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").partition("Args:")[0].replace("\n    ", "\n").strip()


def _names_given(args: list[str]) -> set[str]:
    """Return the options that are given as such (not ``--data.seed``, for ``data``), in files too."""
    import yaml

    names = {arg.removeprefix("--").partition("=")[0] for arg in args if arg.startswith("--")}
    for position, arg in enumerate(args):
        option, _, value = arg.partition("=")
        path = Path(value or "".join(args[position + 1 : position + 2]))
        if option == "--config" and path.is_file() and isinstance(content := yaml.safe_load(path.read_text()), dict):
            # Arguments without a class are for the default one.
            names |= {name for name, value in content.items() if not isinstance(value, dict) or "class_path" in value}
    return names


def _lightning(args: list[str]) -> None:
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from lightning_ssesam.data import LongTailDataModule
    from lightning_ssesam.models import LongTailClassifier

    class CLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.link_arguments("data.class_counts", "model.class_counts", apply_on="instantiate")

        def instantiate_classes(self) -> None:
            with _one_line_errors():
                super().instantiate_classes()

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            commands = LightningCLI.subcommands()
            return {name: commands[name] for name in _LIGHTNING_COMMANDS}

    # Lightning warns of arguments that are not the program's own.
    sys.argv = [sys.argv[0], *args]
    try:
        CLI(
            LongTailClassifier,
            LongTailDataModule,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": "lightning-ssesam"},
        )
    except MisconfigurationException as error:
        sys.exit(f"error: {error}")


@contextmanager
def _quiet_interrupt() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """End the program where an argument is refused, with the line that says which and why."""
    try:
        yield
    except ValueError as error:
        refused = re.search(r"Expected (argument|exactly one|at most one).*", str(error))
        if refused is None:
            raise
        sys.exit(f"error: {refused.group()}")


def _shipped_configs(command: str) -> list[str]:
    """Return the names of the shipped YAML files for a command, without their suffix."""
    names = sorted(resource.name for resource in files("lightning_ssesam.configs").iterdir())
    names = [name.removesuffix(".yaml") for name in names if name.endswith(".yaml")]
    if command == "sweep":
        return []
    return [name for name in names if name.startswith("compare_") == (command == "compare")]


def _with_shipped_configs(args: list[str]) -> list[str]:
    """Replace the names of shipped YAML files by their paths."""
    shipped = _shipped_configs(args[0])
    resolved = list(args)
    for position, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        if not equals and position > 0:
            option, value = args[position - 1], arg
        if option not in ("--config", "-c") or Path(value).exists():
            continue
        if value not in shipped:
            expected = f"a YAML file or one of {', '.join(shipped)}" if shipped else "a YAML file"
            sys.exit(f"error: Expected `--config` to be {expected}, but got {value!r}.")
        with as_file(files("lightning_ssesam.configs") / f"{value}.yaml") as path:
            resolved[position] = f"{option}={path}" if equals else str(path)
    return resolved
