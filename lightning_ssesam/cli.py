"""The command ``lightning-ssesam``."""

import io
import math
import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from importlib import import_module
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning_ssesam

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from lightning_ssesam.experiments.command_parser import CommandParser
    from lightning_ssesam.experiments.training_options import Option

_USAGE = """usage: lightning-ssesam COMMAND [OPTIONS]

Train classifiers on imbalanced classes (long-tailed data) with sharpness-aware methods.

commands:
{commands}

`lightning-ssesam COMMAND --help` lists the options of a command. `lightning-ssesam completion SHELL` prints a script by
which bash, zsh or fish completes them. `fit`, `validate` and `test` are Lightning's command line. Give options one by
one, or in a YAML file with `--config`. The names of these shipped files suffice there:
{shipped}

examples:
  lightning-ssesam suggest images
  lightning-ssesam compare
  lightning-ssesam fit --method SAM
  lightning-ssesam fit --config digits_lt --model.objective SAM --model.objective.rho 0.1
  lightning-ssesam curvature lightning_logs/version_0/checkpoints/*.ckpt
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Command and options. By default those with which the program was started.
    """
    name, *options = list(sys.argv[1:] if args is None else args) or ["--help"]
    if name == "help" and options:
        name, options = options[0], ["--help"]
    if name in ("-h", "--help", "help"):
        commands = "\n".join(f"  {command:<10} {text}" for command, (_, text) in COMMANDS.items())
        names = {command: ", ".join(_shipped_configs(command)) for command in ("fit", "compare")}
        shipped = textwrap.fill(f"for `fit` {names['fit']}; for `compare` {names['compare']}.", 118)
        print(_USAGE.format(commands=commands, shipped=shipped), end="")
    elif name in ("-V", "--version"):
        print(f"lightning-ssesam {lightning_ssesam.__version__}")
    elif name == "completion":
        _print_completion(options)
    elif name in COMMANDS:
        run, _ = COMMANDS[name]
        from lightning_ssesam.experiments.refusals import without_traceback

        with without_traceback(options), _classes_of_working_folder():
            run(_with_shipped_configs(name, options))
    else:
        from lightning_ssesam.experiments.class_names import closest, did_you_mean
        from lightning_ssesam.experiments.parser_messages import cut
        from lightning_ssesam.experiments.refusals import refuse

        guess = did_you_mean(closest(name, COMMANDS))
        refuse(f"Expected a command, one of {', '.join(COMMANDS)}, but got {cut(name)!r}.{guess}")


@contextmanager
def _classes_of_working_folder() -> Iterator[None]:
    """Let class paths name modules of the working folder.

    The folder comes last, so that a file such as ``random.py`` in it takes the place of no other module. Processes that
    are started meanwhile search the same folders.
    """
    folder, is_new = os.getcwd(), os.getcwd() not in sys.path
    if is_new:
        sys.path.append(folder)
    try:
        yield
    finally:
        if is_new and folder in sys.path:
            sys.path.remove(folder)


def _print_completion(options: Sequence[str]) -> None:
    """Print the script of a shell. The words are those of the help of every command."""
    from lightning_ssesam.experiments.completion import SHELLS, completion_script, options_in
    from lightning_ssesam.experiments.loggers import LOGGERS
    from lightning_ssesam.experiments.methods import METHODS
    from lightning_ssesam.experiments.refusals import refuse

    if len(options) != 1 or options[0] not in SHELLS:
        got = repr(" ".join(options)) if options else "nothing"
        refuse(f"Expected `completion` to be followed by one of {', '.join(SHELLS)}, but got {got}.")
    words: dict[str, dict[str, Sequence[str]]] = {}
    for command in COMMANDS:
        with redirect_stdout(io.StringIO()) as text, suppress(SystemExit):
            main([command, "--help"])
        words[command] = {**options_in(text.getvalue()), "--config": _shipped_configs(command)}
        if "--methods" in words[command] and command != "adjust":
            words[command]["--methods"] = METHODS
        if "--logger" in words[command]:
            words[command]["--logger"] = LOGGERS
    more = {"completion": dict.fromkeys(SHELLS, ()), "help": dict.fromkeys(COMMANDS, ())}
    print(completion_script(options[0], {**words, **more}), end="")


def _train(command: str, options: list[str]) -> None:
    from lightning_ssesam.experiments.training_commands import run_training_command

    run_training_command(command, options)


def _compare(options: list[str]) -> None:
    from lightning_ssesam.compare import compare, usable_jobs
    from lightning_ssesam.experiments.fit_config import write_fit_configs
    from lightning_ssesam.experiments.weights import copy_best

    runs, config = _call(compare, "compare", options, jobs=usable_jobs())
    if written := write_fit_configs(runs, config):
        config, weights = os.path.relpath(written[0]), os.path.relpath(written[0].with_name("seed-0.ckpt"))
        print(f"Test weights with: lightning-ssesam test --config {config} --ckpt_path {weights}")
        folder = written[0].parents[2] / "best"
        if best := copy_best(runs, folder):
            print(f"Best on the validation images: {best.method}, seed {best.seed}. Predict new images with it:")
            print(f"lightning-ssesam predict {shlex.quote(os.path.relpath(folder / 'weights.ckpt'))} FOLDER")


def _sweep(options: list[str]) -> None:
    from lightning_ssesam.experiments.sweep import sweep

    _call(sweep, "sweep", options)


def _run(name: str, options: list[str]) -> None:
    """Run a command that takes checkpoints, data or images by their places."""
    from lightning_ssesam.experiments.lifetimes import ended_in_order

    function, parser = _command_with_places(name)
    chosen = vars(parser.parse_args(options))
    with ended_in_order():
        function(**chosen)


def _command_with_places(name: str) -> tuple[Callable[..., Any], "CommandParser"]:
    """Return the function of a command, and its parser."""
    from lightning_ssesam.experiments.command_parser import CommandParser

    function = getattr(import_module(f"lightning_ssesam.experiments.{name}_command"), name)
    places = " ".join(argument.upper() for argument in _PLACES[name])
    parser = CommandParser(prog=f"lightning-ssesam {name} {places}", description=_description(function))
    for argument, (number, text) in _PLACES[name].items():
        parser.add_argument(argument, nargs=number, type=Path, help=text)
    parser.add_function_arguments(function, as_group=False, skip=set(_PLACES[name]))
    return function, parser


_PLACES: dict[str, dict[str, tuple[str | None, str]]] = {
    "adjust": {"checkpoint": (None, "Checkpoint of a training.")},
    "curvature": {"checkpoints": ("+", "Checkpoints, of one training or of several.")},
    "predict": {
        "checkpoint": (None, "Checkpoint of the classifier."),
        "images": (None, "Folder with images, a list file with a path in each line, or a single image."),
    },
    "suggest": {
        "data": (
            None,
            "Folder with a folder for each class, list file, CSV file, data module, or YAML file with data.",
        ),
    },
}
"""The arguments of commands that are given by their place, each with how many there are and its text for the help."""


COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "fit": (partial(_train, "fit"), "train a LongTailClassifier"),
    "validate": (partial(_train, "validate"), "evaluate a classifier on the validation data"),
    "test": (partial(_train, "test"), "evaluate a classifier on the test data"),
    "suggest": (
        partial(_run, "suggest"),
        "look at imbalanced classes, say what to begin with, and write a file for compare",
    ),
    "compare": (
        _compare,
        "train ERM, SAM, ImbSAM and SSESAM, or your own methods, and write tables, pictures and an HTML report",
    ),
    "sweep": (_sweep, "search for the radii of every method and the switch of SSESAM, on validation data"),
    "predict": (partial(_run, "predict"), "predict the classes of new images, by a checkpoint"),
    "adjust": (partial(_run, "adjust"), "correct a trained classifier for the class sizes, or its confidence"),
    "curvature": (
        partial(_run, "curvature"),
        "measure and draw the curvature of head loss and tail loss, at checkpoints of fit",
    ),
}
"""By name, the function of each command and its text for the usage. The error for unknown commands lists the names."""


def _call(function: Callable[..., Any], name: str, options: list[str], **defaults: Any) -> tuple[Any, str]:
    """Call a function with arguments from the command line. Its argument ``config`` gets all of them, as YAML.

    Return what it returns, and the YAML.
    """
    from lightning_ssesam.experiments.lifetimes import ended_in_order
    from lightning_ssesam.experiments.training_options import value_of
    from lightning_ssesam.experiments.trust import check_functions

    parser = _function_parser(function, name, **defaults)
    options = _with_methods_of_file(options)
    parser.set_defaults(dict.fromkeys(_names_given(options) & {"data", "backbone", "optimizer"}))
    chosen = parser.parse_args(options)
    if isinstance(chosen.methods, str) and isinstance(given := value_of(chosen.methods), dict):
        # As a text it would pass, and what is wrong with it would not be said.
        parser.parse_object({"methods": given})
    check_functions(chosen.as_dict())
    arguments = {**vars(_instantiate(parser, chosen)), "config": parser.dump(chosen)}
    with ended_in_order():
        return function(**arguments), arguments["config"]


def _instantiate(parser: "CommandParser", chosen: "Namespace") -> "Namespace":
    """Return the objects that options describe. An error of a method says which one it is."""
    from lightning_ssesam.experiments.command_parser import instantiate
    from lightning_ssesam.experiments.experiment import about_method

    try:
        return instantiate(parser, chosen)
    except ValueError:
        methods = chosen.methods if isinstance(chosen.methods, dict) else {}
        others = chosen.clone()
        # It fails here if no method is the cause.
        others.methods = {}
        instantiate(parser, others)
        for name, method in methods.items():
            others.methods = {name: method}
            with about_method(name):
                instantiate(parser, others)
        raise


def _with_methods_of_file(options: Sequence[str]) -> list[str]:
    """Let ``--methods A,B`` choose among the methods that a configuration defines, instead of replacing them."""
    import yaml

    from lightning_ssesam._validation import bad_argument
    from lightning_ssesam.experiments.methods import METHODS
    from lightning_ssesam.experiments.training_options import content_of, split_options

    given = split_options(options)
    contents = [content_of(option) for option in given if option.name == "--config"]
    defined = next((content["methods"] for content in reversed(contents) if "methods" in content), None)
    if not isinstance(defined, dict):
        return list(options)
    arguments: list[str] = []
    for option in given:
        names = _names_of_methods(option, defined) if option.name == "--methods" else []
        if not names or set(names) <= set(METHODS) - defined.keys():
            arguments += option.arguments
        elif wrong := [name for name in names if name not in defined]:
            known = f"some of those in the file ({', '.join(map(str, defined))})"
            raise bad_argument("methods", known, ", ".join(wrong))
        else:
            chosen = {name: defined[name] for name in names}
            text = yaml.safe_dump(chosen, default_flow_style=True, sort_keys=False, width=math.inf)
            # The parser would merge it with the methods of the file.
            arguments += ["--methods=null", f"--methods={text.strip()}"]
    return arguments


def _names_of_methods(option: "Option", defined: Container[str]) -> list[str]:
    """Return the names that an option lists, as ``A,B`` or ``[A,B]``; nothing if it defines methods itself."""
    from lightning_ssesam.experiments.training_options import value_of

    text = ",".join(option.values)
    value = text if text in defined else value_of(text)
    if isinstance(value, list):
        return [str(name) for name in value]
    return (
        [] if isinstance(value, dict) else [value] if value in defined else [n.strip() for n in str(value).split(",")]
    )


def _function_parser(function: Callable[..., Any], name: str, **defaults: Any) -> "CommandParser":
    """Return the parser of a command that is a function."""
    from lightning_ssesam.experiments.command_parser import CommandParser
    from lightning_ssesam.experiments.recipe import default_optimizer

    parser = CommandParser(prog=f"lightning-ssesam {name}", description=_description(function))
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    parser.add_function_arguments(function, as_group=False, skip={"config"})
    parser.set_defaults(optimizer=default_optimizer(), **defaults)
    return parser


def _description(function: Callable[..., Any]) -> str:
    return (function.__doc__ or "").partition("Args:")[0].replace("\n    ", "\n").strip()


def _names_given(options: Sequence[str]) -> set[str]:
    """Return the options that are given, on the command line or in a file. ``--data.seed`` does not give ``data``."""
    from lightning_ssesam.experiments.command_parser import names_class
    from lightning_ssesam.experiments.training_options import content_of, split_options

    given = split_options(options)
    names = {option.name.removeprefix("--") for option in given}
    contents = [content_of(option) for option in given if option.name == "--config"]
    return names | {name for content in contents for name, value in content.items() if names_class(value)}


def _shipped_configs(command: str) -> list[str]:
    """Return the names of the shipped YAML files for a command, without their suffix."""
    if command == "sweep":
        return []
    paths = [Path(resource.name) for resource in files("lightning_ssesam.configs").iterdir()]
    # macOS puts files such as `._digits_lt.yaml` on drives of other systems.
    names = sorted(path.stem for path in paths if path.suffix == ".yaml" and path.stem[0] != ".")
    return [name for name in names if name.startswith("compare_") == (command == "compare")]


def _with_shipped_configs(command: str, options: list[str]) -> list[str]:
    """Replace the names of shipped YAML files by their paths, and refuse files that cannot be read."""
    from lightning_ssesam.experiments.command_parser import read_config

    shipped, resolved = _shipped_configs(command), list(options)
    if any(arg.partition("=")[0] == "--method" for arg in options):
        # A method is one of a comparison.
        shipped += _shipped_configs("compare")
    for position, arg in enumerate(options):
        option, equals, value = arg.partition("=")
        if not equals and position > 0:
            option, value = options[position - 1], arg
        if option not in ("--config", "-c") or (not value and not equals):
            continue
        if os.path.exists(value):
            # They say what they make of the configuration of a training.
            if command not in ("adjust", "curvature"):
                read_config(Path(value))
            continue
        if value not in shipped:
            _refuse_config(value, shipped)
        with as_file(files("lightning_ssesam.configs") / f"{value}.yaml") as path:
            resolved[position] = f"{option}={path}" if equals else str(path)
    return resolved


def _refuse_config(value: str, shipped: Sequence[str]) -> None:
    from lightning_ssesam.experiments.class_names import closest, did_you_mean
    from lightning_ssesam.experiments.parser_messages import cut
    from lightning_ssesam.experiments.refusals import refuse

    expected = f"a YAML file or one of {', '.join(shipped)}" if shipped else "a YAML file"
    refuse(f"Expected `--config` to be {expected}, but got {cut(value)!r}.{did_you_mean(closest(value, shipped))}")
