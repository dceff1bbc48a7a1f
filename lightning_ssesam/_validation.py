"""The one sentence form in which every argument is refused."""

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any, TypeVar

Choice = TypeVar("Choice", bound=str)


class Phrase(str):
    """Words about an argument, to be shown without quotes where its value itself would say little."""

    __slots__ = ()
    __repr__ = str.__str__


def bad_argument(name: str, expected: str, got: Any) -> ValueError:
    """Build the error for a refused argument: its name, what it must be, what it got."""
    return ValueError(f"Expected argument `{name}` to be {expected}, but got {got!r}.")


def check_radius(name: str, value: Any) -> float:
    """Return ``value`` as a float if it is a finite number >= 0, else raise ``ValueError``."""
    if not _is_real(value) or not math.isfinite(value) or value < 0:
        raise bad_argument(name, "a finite number >= 0", value)
    return float(value)


def check_positive(name: str, value: Any) -> float:
    """Return ``value`` as a float if it is a finite number > 0, else raise ``ValueError``."""
    if not _is_real(value) or not math.isfinite(value) or value <= 0:
        raise bad_argument(name, "a finite number > 0", value)
    return float(value)


def check_fraction(name: str, value: Any) -> float:
    """Return ``value`` as a float if it lies strictly between 0 and 1, else raise ``ValueError``."""
    if not _is_real(value) or not 0 < value < 1:
        raise bad_argument(name, "a number strictly between 0 and 1", value)
    return float(value)


def check_integer(name: str, value: Any, minimum: int) -> int:
    """Return ``value`` as an int if it is an integer >= ``minimum``, else raise ``ValueError``."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < minimum:
        raise bad_argument(name, f"an integer >= {minimum}", value)
    return int(value)


def check_choice(name: str, value: Choice, choices: Collection[str]) -> Choice:
    """Return ``value`` if it is one of ``choices``, else raise ``ValueError``."""
    if not isinstance(value, str) or value not in choices:
        raise bad_argument(name, "one of " + ", ".join(repr(choice) for choice in choices), value)
    return value


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
