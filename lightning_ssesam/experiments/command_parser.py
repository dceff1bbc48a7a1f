"""The parser of the commands: its errors take one line, and its help names the classes that are mostly used."""

import argparse
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import DefaultHelpFormatter, Namespace
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.class_names import known_classes
from lightning_ssesam.experiments.parser_messages import cut, shorten
from lightning_ssesam.experiments.refusals import place_in_user_code, refuse

_KINDS = {yaml.SequenceNode: "a list", yaml.ScalarNode: "a single value"}


class ShortHelp(DefaultHelpFormatter):
    """Help that lists a few classes by their names instead of all that are known."""

    def _get_help_string(self, action: argparse.Action) -> str:
        """Return the text of one option."""
        text = super()._get_help_string(action)
        if action.dest.endswith(".help"):
            return (
                text.partition(" given subclass")[0].partition(" the help")[0] + " the arguments of a class and exit."
            )
        if action.dest == "print_config":
            return "Print the configuration with all options and exit."
        names = known_classes(action.dest)
        if " (" in text and (names or ", known subclasses: " in text):
            default = re.search(r"default: (.*?)(?:, known subclasses: .*)?\)$", text, re.DOTALL)
            chosen = _short_default(default[1]) if default else ""
            choices = f"{', '.join(names)}, or a class path" if names else "a class path"
            return f"{(action.help or '').partition(' (')[0]} ({choices}{chosen})"
        return text.replace("<class 'Path'>", "path")


class CommandParser(LightningArgumentParser):
    """Parser that ends the program with one line for whatever is wrong with the options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviation would be taken for another option in silence, and jsonargparse is about to drop them.
        super().__init__(*args, **{"formatter_class": ShortHelp, "allow_abbrev": False, **kwargs})

    def option_names(self) -> dict[str, tuple[str, ...]]:
        """Return the names of all options, with their dashes, and the values that each one may have, if they are few."""
        found = re.findall(r"^  (?:-\w[ \w]*, )?(--[\w.]+)(?: \{([^}]*)\})?", self.format_help(), re.MULTILINE)
        return {name: tuple(choices.split(",")) if choices else () for name, choices in found}

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Called with what is wrong: end the program with one line and exit status 2, or raise where that is asked for."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        refuse(shorten(message, parser.option_names()))

    @override
    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Parse options. Whatever the module of a class raises when it is imported ends the program with one line."""
        try:
            return super().parse_args(args, *others, **kwargs)
        except ArgumentError:
            raise
        except Exception as error:
            refuse(_not_imported(error, list(sys.argv[1:] if args is None else args)))


def read_config(path: Path) -> dict[str, Any]:
    """Return the options of a YAML file, or end the program with one line."""
    try:
        loader = yaml.SafeLoader(path.read_bytes().decode())
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            found = _KINDS[type(node)] if node else "nothing"
            refuse(f"Expected `--config` to be a YAML file with options, but {str(path)!r} has {found}.")
        if twice := _find_twice(node, set()):
            refuse(f"{str(path)!r} has `{twice.value}` twice in one place (line {twice.start_mark.line + 1}).")
        return dict(loader.construct_document(node))
    except UnicodeDecodeError as error:
        reason = f"its byte {error.start} is not UTF-8"
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be read"
        reason = f"{problem}, line {mark.line + 1}" if mark else f"{problem}"
    except OSError as error:
        reason = f"{error.strerror}"
    refuse(f"Expected `--config` to be a YAML file, but {str(path)!r} is none: {cut(reason)}.")


def _find_twice(node: yaml.Node, seen: set[int]) -> yaml.Node | None:
    """Return the second key of the same name in a mapping, or None. Aliases are looked at once."""
    if id(node) in seen or isinstance(node, yaml.ScalarNode):
        return None
    seen.add(id(node))
    keys = set()
    children = []
    for child in node.value:
        if isinstance(child, tuple):
            key, child = child
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys and key.value != "<<":
                    return key
                keys.add(key.value)
        children.append(child)
    return next(filter(None, (_find_twice(child, seen) for child in children)), None)


def _short_default(default: str) -> str:
    path = re.search(r"'class_path': '(?:\w+\.)*(\w+)'", default)
    name = path[1] if path else default
    return "" if name in ("null", "None") else f"; default: {name}"


def _not_imported(error: Exception, args: Sequence[str]) -> str:
    """Return the line for an error of a module that was imported for an option."""
    place = place_in_user_code(error)
    module = Path(place.file).stem if place else ""
    named = [arg for arg in args if module and re.search(rf"\b{re.escape(module)}\b", arg)]
    option = next((arg.partition("=")[0] for arg in named if arg.startswith("--")), None)
    if option is None and named:
        option = args[args.index(named[0]) - 1]
    text = cut(" ".join(traceback.format_exception_only(error)[-1].split()))
    return f"Cannot use {f'`{option}`' if option else 'a class of the configuration'}: {text}{place or ''}."
