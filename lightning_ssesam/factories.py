"""Checks of factories: classes and functions that make a part, such as a network from a number of classes."""

import inspect
from functools import partial
from types import UnionType
from typing import Any, TypeVar, get_origin, get_type_hints

from lightning_ssesam._validation import bad_argument

Made = TypeVar("Made")

# Characters of a wrong value that an error shows.
_SHOWN = 80


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
