"""Checks of arguments, and the one form of their error messages."""

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, TypeVar

from lightning_ssesam.errors import ArgumentError

Choice = TypeVar("Choice", bound=str)
Number = TypeVar("Number", int, float)


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


def check_real(expected: str, is_valid: Callable[[float], bool], name: str, value: Any) -> float:
    """Return ``value`` as a float if it is a valid number, else raise ``ArgumentError``."""
    if not isinstance(value, Real) or isinstance(value, bool) or not is_valid(float(value)):
        raise bad_argument(name, expected, value)
    return float(value)


check_radius = partial(check_real, "a finite number >= 0", lambda x: 0 <= x < math.inf)
check_positive = partial(check_real, "a finite number > 0", lambda x: 0 < x < math.inf)
check_fraction = partial(check_real, "a number strictly between 0 and 1", lambda x: 0 < x < 1)
check_share = partial(check_real, "a number in [0, 1]", lambda x: 0 <= x <= 1)
check_below_one = partial(check_real, "a number in [0, 1)", lambda x: 0 <= x < 1)
check_beta = partial(check_below_one, "beta")


def check_integer(name: str, value: Any, minimum: int | None = None, maximum: float = math.inf) -> int:
    """Return ``value`` as an int if it is an int64 between the limits, else raise ``ArgumentError``.

    A maximum needs a minimum.
    """
    low = -math.inf if minimum is None else minimum
    if not isinstance(value, Integral) or isinstance(value, bool) or not low <= int(value) <= maximum:
        limits = f" >= {minimum}" if maximum == math.inf else f" from {minimum} to {maximum}"
        raise bad_argument(name, "an integer" if minimum is None else f"an integer{limits}", value)
    if not -(2**63) <= int(value) < 2**63:
        raise bad_argument(name, "an integer of at most 64 bits", value)
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


def check_increasing(name: str, values: Any, check: Callable[[str, Any], Number], expected: str) -> list[Number]:
    """Return ``values`` as a list if they are a strictly increasing sequence of what ``check`` takes, at least one.

    Args:
        name: Name of the argument.
        values: The values.
        check: Returns a value that is valid, or raises ``ArgumentError``.
        expected: What the values must be, in the plural, for the message.
    """
    try:
        if isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0:
            checked = [check(name, value) for value in values]
            if all(low < high for low, high in pairwise(checked)):
                return checked
    except ArgumentError:
        pass
    raise bad_argument(name, f"a strictly increasing list of {expected}", values)
