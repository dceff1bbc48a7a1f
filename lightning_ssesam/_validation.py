"""Checks of arguments, and the one form of their error messages."""

import inspect
import math
from collections.abc import Callable, Collection
from functools import partial
from numbers import Integral, Real
from types import UnionType
from typing import Any, TypeVar, get_origin, get_type_hints

from lightning_ssesam.errors import ArgumentError

Choice = TypeVar("Choice", bound=str)
Made = TypeVar("Made")

# Characters of a wrong value that an error shows.
_SHOWN = 80


def bad_argument(name: str, expected: str, got: Any = None, *, got_text: str | None = None) -> ArgumentError:
    """Build the error for a refused argument.

    Args:
        name: Name of the argument.
        expected: Completes "Expected argument `name` to be ...".
        got: The value, shown by its ``repr``.
        got_text: Text to show instead of the value, where the value itself would say little.
    """
    return ArgumentError(
        f"Expected argument `{name}` to be {expected}, but got {repr(got) if got_text is None else got_text}."
    )


def _check_real(expected: str, is_valid: Callable[[float], bool], name: str, value: Any) -> float:
    """Return ``value`` as a float if it is a valid number, else raise ``ArgumentError``."""
    if not isinstance(value, Real) or isinstance(value, bool) or not is_valid(float(value)):
        raise bad_argument(name, expected, value)
    return float(value)


check_radius = partial(_check_real, "a finite number >= 0", lambda x: 0 <= x < math.inf)
check_positive = partial(_check_real, "a finite number > 0", lambda x: 0 < x < math.inf)
check_fraction = partial(_check_real, "a number strictly between 0 and 1", lambda x: 0 < x < 1)
check_beta = partial(_check_real, "a number in [0, 1)", lambda x: 0 <= x < 1, "beta")


def check_integer(name: str, value: Any, minimum: int | None = None) -> int:
    """Return ``value`` as an int if it is an integer >= ``minimum``, if there is one. Else raise ``ArgumentError``."""
    if not isinstance(value, Integral) or isinstance(value, bool) or (minimum is not None and value < minimum):
        raise bad_argument(name, "an integer" if minimum is None else f"an integer >= {minimum}", value)
    return int(value)


def check_flag(name: str, value: Any) -> bool:
    """Return ``value`` if it is True or False, else raise ``ArgumentError``."""
    if not isinstance(value, bool):
        raise bad_argument(name, "True or False", value)
    return value


def check_choice(name: str, value: Choice, choices: Collection[str]) -> Choice:
    """Return ``value`` if it is one of ``choices``, else raise ``ArgumentError``."""
    if not isinstance(value, str) or value not in choices:
        raise bad_argument(name, "one of " + ", ".join(repr(choice) for choice in choices), value)
    return value


def check_factory(name: str, factory: Any, kind: type) -> None:
    """Raise ``ArgumentError`` for what cannot be called, and for what is known to make another kind of object.

    A class is of a kind itself. A function says it by the annotation of what it returns, if there is one.
    """
    if not callable(factory):
        raise bad_argument(name, "a class or a function that makes it", factory)
    made = returned_type(factory)
    # Whoever promises a wider type, such as `object`, may make the right one.
    if made is not None and not issubclass(made, kind) and not issubclass(kind, made):
        function = inner_function(factory)
        called = f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"
        raise bad_argument(name, _maker(kind), got_text=called if made is function else f"{called}, which does not")


def check_made(name: str, value: Made, kind: type) -> Made:
    """Return what the factory of an argument has made, if it is of the kind that was asked for."""
    if not isinstance(value, kind):
        text = " ".join(repr(value).split())
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        raise bad_argument(name, _maker(kind), got_text=f"one that makes {shown}")
    return value


def returned_type(factory: Any) -> type | None:
    """Return the class that a class or an annotated function makes, and None if it is not known."""
    function = inner_function(factory)
    if isinstance(function, type):
        return function
    call = function if inspect.isroutine(function) else type(function).__call__
    try:
        made = get_type_hints(call).get("return")
    except (NameError, AttributeError, TypeError):
        # An annotation that cannot be resolved, or a function of C that has none.
        return None
    origin = get_origin(made) or made
    return origin if isinstance(origin, type) and origin is not UnionType else None


def inner_function(factory: Any) -> Any:
    """Return the class or the function that a ``functools.partial`` calls."""
    while isinstance(factory, partial):
        factory = factory.func
    return factory


def _maker(kind: type) -> str:
    return f"a class or a function that makes it, of type {kind.__name__}"
