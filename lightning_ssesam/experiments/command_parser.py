"""The parser of the commands: its errors take one line, and its help names the classes that are mostly used."""

import argparse
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from lightning_ssesam.data import LongTailDataModule
from lightning_ssesam.data.labels import names_of_classes
from lightning_ssesam.errors import ArgumentError
from lightning_ssesam.experiments.class_names import known_classes
from lightning_ssesam.experiments.completion import options_in
from lightning_ssesam.experiments.parser_messages import cut, reason_in_unions, shorten
from lightning_ssesam.experiments.refusals import place_in_user_code, refuse

_MOST_NODES = 100_000
_NO_OUTPUT = "Expected `--output` to be a folder, but got nothing."
# Types as people write them in a YAML file.
_TYPES = {
    "<class 'Path'>": "path",
    "Optional[list[str]]": "list | null",
    "list[str] | null": "list | null",
    "Optional[dict[str, Any]]": "mapping | null",
    "Optional[dict[str, tuple[float, float]]]": "mapping | null",
    "dict[str, Any] | null": "mapping | null",
    "dict[str, tuple[float, float]] | null": "mapping | null",
    "Union[float, list[float], null]": "number | list | null",
    "str | list[str] | dict[str, Method]": "names | mapping",
}
_KINDS = {yaml.SequenceNode: "a list", yaml.ScalarNode: "a single value"}


class ShortHelp(DefaultHelpFormatter):
    """Help that lists a few classes by their names instead of all that are known."""

    # HelpFormatter (argparse.py) has no public method for the text of an option. jsonargparse overrides this one, too
    # (_formatters.py), and adds the list of all classes in it. So the list can be shortened only here.
    @override
    def _expand_help(self, action: argparse.Action) -> str:
        """Return the text of one option."""
        # The texts of Lightning are written for its documentation.
        text = re.sub(r":\w+:`~?(?:\w+\.)*(\w+)`", r"\1", str(super()._expand_help(action)))
        if action.dest.endswith(".help"):
            return "Show the arguments of a class and exit."
        if " --> " in "".join(action.option_strings):
            # The name says it: an argument of the model that comes from the data module.
            return ""
        if action.dest == "print_config":
            return "Print the configuration with all options and exit."
        text = re.sub(r", known subclasses: .*(?=\)$)", "", text, flags=re.DOTALL)
        text = re.sub(r"\{'class_path': '(?:\w+\.)*(\w+)'(?:, 'init_args':( .*\}))?\}(?=\)$)", r"\1\2", text)
        if names := known_classes(action.dest):
            text = re.sub(r" \((?:required, )?type: .*?(?=, default: |\)$)", f" ({', '.join(names)}, or a path", text)
        # The values stand behind the name of the option.
        text = re.sub(r"type: Literal\[[^\]]*\], ", "", text)
        if found := re.search(r"Optional\[Literal\[([^\]]*)\]\]|Literal\[([^\]]*)\] \| null", text):
            text = text.replace(found[0], " | ".join([*re.findall(r"'([^']*)'", found[0]), "null"]))
        # The default is named behind the type.
        text = re.sub(r"\s*Default: (?:``[^`]*``|\d+)\.\s*(?=\(type)", " ", text)
        for written, plain in _TYPES.items():
            text = text.replace(written, plain)
        return text


def names_class(value: Any) -> bool:
    """Return whether an option names a class, or no class. Arguments alone are for the default class.

    The default of such an option must be taken away: the chosen class would take over its arguments, such as the
    learning rate.
    """
    return not isinstance(value, Mapping) or "class_path" in value


def link_data_to_model(parser: LightningArgumentParser) -> None:
    """Let the model take class counts, channels, class names and the kind of the labels from the data module."""
    for name in ("class_counts", "in_channels", "multi_label"):
        parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")
    parser.link_arguments("data", "model.class_names", _class_names, apply_on="instantiate")
    parser.link_arguments("data", "model.num_samples", _num_samples, apply_on="instantiate")


def _class_names(data: LongTailDataModule) -> list[str] | None:
    return names_of_classes(data) or None


def _num_samples(data: LongTailDataModule) -> int | None:
    # Data modules of one label a sample may have an attribute of this name for something else.
    return data.num_samples if data.multi_label else None


def instantiate(parser: ArgumentParser, chosen: Namespace) -> Namespace:
    """Return the objects that the options of a parser describe."""
    # Newer versions of jsonargparse warn about the name `instantiate_classes`, older ones have no other.
    make = getattr(parser, "instantiate", None) or parser.instantiate_classes
    try:
        made: Namespace = make(chosen)
    except ValueError as error:
        if reason := reason_in_unions(str(error)):
            raise ArgumentError(reason) from error
        raise
    return made


class CommandParser(LightningArgumentParser):
    """Parser that ends the program with one line for whatever is wrong with the options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviation would be taken for another option in silence, and jsonargparse is about to drop them.
        super().__init__(*args, **{"formatter_class": ShortHelp, "allow_abbrev": False, **kwargs})

    @override
    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Return the help. Its first lines do not repeat the options."""
        prog = self.prog.replace(" [options]", "")
        text = super().format_help(*args, **kwargs)
        return re.sub(r"\Ausage: .*?\n\n", f"usage: {prog} [options]\n\n", text, flags=re.DOTALL)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Called with what is wrong: end the program with one line and exit status 2, or raise where that is asked."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        refuse(shorten(message, options_in(parser.format_help())))

    @override
    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Parse options. Whatever the module of a class raises when it is imported ends the program with one line."""
        given = list(sys.argv[1:] if args is None else args)
        # Path makes the working folder of an empty text.
        if "--output=" in given or ("--output", "") in pairwise(given):
            refuse(_NO_OUTPUT)
        try:
            return super().parse_args(args, *others, **kwargs)
        except ArgumentError:
            raise
        except Exception as error:
            if isinstance(error, argparse.ArgumentError) and not self.exit_on_error:
                # It is the parser of a class within a class. The parser above says which option it is about.
                raise
            refuse(_not_imported(error, given))


def read_config(path: Path) -> dict[str, Any]:
    """Return the options of a YAML file, or end the program with one line."""
    try:
        loader = yaml.SafeLoader(path.read_bytes().decode())
        node = loader.get_single_node()
        _check_aliases(node)
        content = {} if node is None else loader.construct_document(node)
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        refuse(f"Expected `--config` to be a YAML file, but {str(path)!r} is none: {cut(_reason(error))}.")
    if not isinstance(node, yaml.MappingNode):
        found = _KINDS[type(node)] if node else "nothing"
        refuse(f"Expected `--config` to be a YAML file with options, but {str(path)!r} has {found}.")
    if twice := _find_twice(node, set()):
        refuse(f"{str(path)!r} has `{twice.value}` twice in one place (line {twice.start_mark.line + 1}).")
    if content.get("output") == "":
        refuse(_NO_OUTPUT)
    return dict(content)


def _check_aliases(root: yaml.Node | None) -> None:
    """Raise ``ConstructorError`` if aliases make a file contain itself, or become too much if they are written out."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            # Stands for a node whose children are being counted.
            sizes[id(node)] = 0
            children = [] if isinstance(node, yaml.ScalarNode) else node.value
            parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
            sizes[id(node)] = 1 + sum(map(size, parts))
        elif not sizes[id(node)]:
            raise yaml.constructor.ConstructorError(problem="a part contains itself", problem_mark=node.start_mark)
        return sizes[id(node)]

    if root is not None and size(root) - len(sizes) > _MOST_NODES:
        raise yaml.constructor.ConstructorError(problem=f"its aliases stand for more than {_MOST_NODES:,} values")


def _reason(error: Exception) -> str:
    """Return why a file cannot be read."""
    if isinstance(error, UnicodeDecodeError):
        return f"its byte {error.start} is not UTF-8"
    if isinstance(error, OSError):
        return str(error.strerror)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be read"
    mark = getattr(error, "problem_mark", None)
    return f"{problem}, line {mark.line + 1}" if mark else str(problem)


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
