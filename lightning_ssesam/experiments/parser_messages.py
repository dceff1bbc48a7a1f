"""One line from the message of a parser, which may have eighty: the option, what it must be, and what it got."""

import re
from collections.abc import Collection, Iterable

from lightning_ssesam.experiments.class_names import closest, did_you_mean, guess_class, known_classes, takes_class

# Texts of jsonargparse and argparse. What they do not match is shown as it is, on one line.
_KEY = re.compile(r'[Pp]arser key "([^"]+)"')
_VALUE = re.compile(r"(?:Given value|Got value): (.*?)(?=\. Got value|$)", re.MULTILINE)
_NESTED = re.compile(r"NestedArg\(key='([^']*)', val=(.*)\)$")
_CLASS = re.compile(r"class_path[ =]'([^']+)'")
_UNKNOWN = re.compile(r"(?:Option|does not accept option|Key) '([\w.]+)'(?: is not (?:accepted|expected))?")
_MISSING = re.compile(r"the following arguments are required: ([\w., ]+?)(?=\. Got value|\n|$)")
_UNRECOGNIZED = re.compile(r"unrecognized arguments: (.*)", re.DOTALL)
_NO_VALUE = re.compile(r"argument (\S+): expected (?:one|at least one) argument")
_IMPORT = re.compile(r"No module named '[^']+'|module '[^']+' has no attribute '[^']+'|cannot import name '[^']+'.*")
_WRONG_KIND = re.compile(
    r"Expected '[^']+' to be [^\n]*?(?=\.+(?:\s|$))|[^\n.]*does not correspond to a subclass of \S+"
)
_WRONG_BASE = re.compile(r"Import path does not correspond to a subclass of (\w+)")
_NO_CLASS = ("dot import path", "Not a valid subclass", "Unexpected import path")
_PATH = re.compile(r"dot import path string: (.*?)(?=\. Got value|$)", re.MULTILINE)
_ABSTRACT = re.compile(r"Expected an instantiatable class, but (\S+) is abstract")
# What a class says, and after it what the other types of an option say to the same value, equally far indented.
_PROBLEM = re.compile(r"^( *)- Problem with given class_path ", re.MULTILINE)
# A class of an option with several types, and what its constructor has raised, which is indented further.
_RAISED = re.compile(r"^( *)- Problem with given class_path '([^']+)':\n(?=((?:\1 {2,}\S[^\n]*\n?)+))", re.MULTILINE)
_NO_FUNCTION = "expects a function or a callable class: the following arguments are required"
# The class that the rest of the message is about.
_OWNER = re.compile(
    r"given class_path '([^']+)':\s+(?:Option '[\w.]+' is not accepted|the following arguments are required)"
)
_PARTS = re.compile(r"Subtypes: \[<class 'lightning_ssesam\.[\w.]*?(\w+)'>, <class 'NoneType'>\]")
_REASON = re.compile(r"^( *)- (?!Expected an? <|Does not validate|Problem with)(.+)$", re.MULTILINE)
_TYPE = re.compile(
    r"Expected (?:an? )?(<class '[^']+'>|typing\.\w+\[[^\n]*?\](?=\. |\.?$)|tuple with \d+ elements)", re.MULTILINE
)
_NAMES = {
    "NoneType": "null",
    "list": "a list",
    "collections.abc.Sequence": "a list",
    "dict": "a mapping",
    "tuple": "a list",
}
_SHOWN = 150
# Characters of the longest list of names.
_LISTED = 200


def shorten(message: str, options: Collection[str]) -> str:
    """Return one line for the message of a parser.

    Args:
        message: Message of jsonargparse or argparse.
        options: Names of the command's options, with their dashes, for a guess at a misspelt one.
    """
    message = _without_other_types(message)
    keys = list(dict.fromkeys(_KEY.findall(message)))
    option = ".".join(keys)
    if found := _UNRECOGNIZED.search(message):
        if option and (classes := _CLASS.findall(message)):
            name = found[1].lstrip("-").partition("=")[0].split()[0]
            return _no_argument(classes[-1], option, name)
        return _unknown_options(found[1].split(), options)
    if found := _NO_VALUE.search(message):
        return f"`{found[1].rpartition('/')[2]}` needs a value."
    innermost = message[[0, *(found.end() for found in _KEY.finditer(message))][-1] :]
    if option and (line := _bad_class(message, innermost, option) or _bad_value(innermost, option)):
        return line
    if found := _UNKNOWN.search(message):
        guess = did_you_mean(closest(found[1], [name.lstrip("-") for name in options]))
        return f"The configuration has `{found[1]}`, but there is no option of this name.{guess}"
    if found := _MISSING.search(message):
        return _missing(found[1].split(", "))
    rest = cut(" ".join(innermost.lstrip(": ").split()), 2 * _SHOWN)
    return f"`--{option}`: {rest}" if option else rest


def reason_in_unions(message: str) -> str:
    """Return what a class says about its arguments, from a message that lists several types; else an empty text."""
    reasons = _REASON.findall(message) if message.startswith("Does not validate against any of the Union") else []
    return max(reasons, key=lambda found: len(found[0]), default=("", ""))[1]


def raised_in_unions(message: str) -> str:
    """Return what the constructor of a class has raised, with the class before it; else an empty text."""
    found = [(path.rpartition(".")[2], " ".join(text.split())) for _, path, text in _RAISED.findall(message)]
    raised = [f"{name}: {text}" for name, text in found if not text.startswith(("- ", "Does not validate"))]
    return raised[-1] if raised else ""


def _without_other_types(message: str) -> str:
    """Return a message without what other types of an option say to a value, if it is about a class of one of them.

    An option that takes a class or a list of classes has two of these, of which the first one knows the class.
    """
    for found in _PROBLEM.finditer(message):
        before, after = message[: found.end()], message[found.end() :]
        # Its lines are indented further.
        other = (
            rf"^{found[1]}- (?:Not a valid subclass|Problem with given class_path)[^\n]*\n(?:{found[1]} +[^\n]*\n?)*"
        )
        shorter = before + re.sub(other, "", after, flags=re.MULTILINE)
        if shorter != message:
            return _without_other_types(shorter)
    return message


def _no_argument(path: str, option: str, argument: str) -> str:
    """Return the line for an argument that a class does not have."""
    return f"{path.rpartition('.')[2]} has no argument `--{option}.{argument}`." + _guess_argument(
        option, path, argument
    )


def cut(text: str, length: int = _SHOWN) -> str:
    """Return a text with at most so many characters. Dots mark what is missing."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _unknown_options(given: Iterable[str], options: Collection[str]) -> str:
    names = [text.partition("=")[0] for text in given if text.startswith("-")]
    if not names:
        return f"Expected options that begin with --, but got {cut(' '.join(given))!r}."
    guess = closest(names[0].lstrip("-"), [option.lstrip("-") for option in options])
    return f"There is no option `{cut(names[0])}`.{did_you_mean(f'--{guess}' if guess else None)}"


# What is given by its place, without the name of an option.
_BY_PLACE = {"checkpoints": "one or more checkpoints", "checkpoint": "a checkpoint", "images": "images"}


def _missing(names: list[str]) -> str:
    """Return the line for required options. Those of Lightning's commands have the command before their names."""
    if all(name in _BY_PLACE for name in names):
        return f"Expected {' and '.join(_BY_PLACE[name] for name in names)}, but got none."
    command = names[0].partition(".")[0]
    options = " and ".join(f"`--{name.removeprefix(f'{command}.')}`" for name in names)
    return f"`{command}` needs {options}, on the command line or in a file (`--config`)."


def _bad_class(message: str, innermost: str, option: str) -> str | None:
    """Return the line for a class that cannot be used, or for arguments of a class. None for other messages."""
    outer = _KEY.findall(message)[0]
    classes = [*_CLASS.findall(message), *_OWNER.findall(message)]
    # The types around the innermost one name a wider value, such as all methods.
    value = cut(_value_of(innermost) or _value_of(message) or "")
    if takes_class(option) and any(text in message for text in _NO_CLASS):
        value = cut([value, *_PATH.findall(message)][-1])
        return f"Expected `--{option}` to be {_known(option)}the path of a class, but got {value!r}." + (
            guess_class(option, value)
        )
    if found := _ABSTRACT.search(message):
        return (
            f"Expected `--{option}` to be {_known(option)}the path of a class, but got {found[1]!r}, which is abstract."
        )
    if found := _WRONG_BASE.search(message):
        function = re.search(r"a function that returns <class '(?:\w+\.)*(\w+)'>", message)
        other = f" or of a function that is annotated to return a {function[1]}" if function else ""
        return f"Expected `--{option}` to be {_known(option)}the path of a {found[1]}{other}, but got {value!r}."
    if found := _IMPORT.search(message):
        within = re.match(r":?\s*Problem with given class_path '([^']+)'", innermost)
        path = within[1] if within else value or classes[-1]
        kind = "a class" if takes_class(option) else "a class or a function"
        return f"Expected `--{option}` to be {kind} that can be imported, but got {path!r}: {cut(found[0])}." + (
            guess_class(option, path)
        )
    if "Unexpected import object" in message:
        return f"Expected `--{option}` to be a class or a function, but got {value!r}."
    if not (owned := _OWNER.search(message)) and (found := _WRONG_KIND.search(message)):
        return f"`--{option}`: {cut(_plain(found[0])).rstrip('.')}."
    if "fail_untyped" in message:
        return f"`--{option}`: {cut(_plain(message.splitlines()[-1].rpartition('. ')[2]))} Give it a type in the code."
    name = classes[-1].rpartition(".")[2] if classes else ""
    if (found := _UNKNOWN.search(message)) and name:
        return _no_argument(classes[-1], option, found[1])
    if _NO_FUNCTION in message and not takes_class(option):
        return None
    if (found := _MISSING.search(message)) and name:
        needed = " and ".join(f"`--{option}.{argument}`" for argument in found[1].split(", "))
        return f"`--{option if owned else outer} {name}` needs {needed}."
    return None


def _known(option: str) -> str:
    """Return the names of the classes that an option takes, if they are few, as the beginning of a list."""
    names = known_classes(option)
    if len(names) == 1:
        return f"{names[0]} or "
    listed = ", ".join(names)
    return f"one of {listed}, or " if 0 < len(listed) < _LISTED else ""


def _bad_value(innermost: str, option: str) -> str | None:
    # The types of an option around this one come after the value.
    expected, _, _ = innermost.partition("Given value")
    kinds = _TYPE.findall(expected if "Union subtypes" in expected else expected.partition("Got value")[0])
    types = list(dict.fromkeys(map(_plain, kinds)))
    if not types:
        return None
    # The list of types is long, and names what is within a class, too, if it does not come first.
    if "Callable[" in innermost.partition("Errors:")[0] and "Union subtypes" in innermost:
        types.append("the path of a function")
    if types[0] == "null" and takes_class(option):
        types = [f"{_known(option)}the path of a class"]
    elif types[0] == "null" and (found := _PARTS.search(innermost)):
        types = [f"arguments of {found[1]}", "null"]
    # What stands for "not given" is named last.
    types.sort(key=lambda kind: kind == "null")
    value = _value_of(innermost)
    return f"Expected `--{option}` to be {cut(' or '.join(types))}, but got {cut(value or 'nothing')!r}."


def _value_of(message: str) -> str | None:
    """Return the value that was refused, as it was written."""
    for text in _VALUE.findall(message):
        if found := _NESTED.match(text):
            return str(found[2]).strip("'")
        if found := re.match(r"(?:\{'class_path': |Namespace\(class_path=)'([^']*)'", text):
            return str(found[1])
        if not text.startswith("Namespace("):
            return str(text)
    found = re.search(r"import path string: (.*)", message)
    return str(found[1]) if found else None


def _plain(kind: str) -> str:
    """Return the name of a type as people write it."""
    for written, plain in _NAMES.items():
        kind = kind.replace(f"<class '{written}'>", plain)
    kind = re.sub(r"<class '(?:[\w]+\.)*(\w+)'>", r"\1", kind)
    kind = re.sub(r"typing\.Literal\[(.*)\]", r"one of \1", kind)
    return re.sub(r"tuple with (\d+) elements", r"a list of \1 values", kind)


def _guess_argument(option: str, path: str, argument: str) -> str:
    """Return a sentence with the argument that was probably meant, or an empty text."""
    from jsonargparse import ArgumentParser

    module, _, name = path.rpartition(".")
    try:
        parser = ArgumentParser(exit_on_error=False)
        added = parser.add_class_arguments(getattr(__import__(module, fromlist=[name]), name), fail_untyped=False)
    except Exception:
        # A guess must not fail, whatever the class is.
        return ""
    guess = closest(argument, added)
    return did_you_mean(f"--{option}.{guess}" if guess else None)
