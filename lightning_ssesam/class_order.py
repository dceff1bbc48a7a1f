"""Values that come with an index: one for each class, or one for each sample."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from lightning_ssesam._validation import bad_argument
from lightning_ssesam.errors import ArgumentError


def in_class_order(name: str, values: Any) -> Any:
    """Return the values of classes 0, 1, ... in this order, if they come with an index, and else as they are.

    A mapping has an index, its keys, and so has a pandas Series, for example that of ``value_counts()``. The largest
    class comes first there.

    Args:
        name: Name of the argument in the error.
        values: One value for each class.

    Raises:
        ArgumentError: If there is an index, and it is not that of the classes 0 to C-1, each once.
    """
    if isinstance(values, Mapping):
        index, found = list(values.keys()), list(values.values())
    elif _has_index(name, values):
        index, found = list(values.index), list(values.tolist())
    else:
        return values
    by_class = {int(key): value for key, value in zip(index, found, strict=True) if _is_class(key)}
    if by_class.keys() == set(range(len(found))):
        return [by_class[number] for number in range(len(found))]
    kind = type(values).__name__
    expected = f"a {kind} with the class indices 0 to C-1 as its index, each once, or values in class order"
    shown = ", ".join(repr(key) for key in index[:10]) + (", ..." if len(index) > 10 else "")
    raise bad_argument(name, expected, got_text=f"the index [{shown}]")


def in_sample_order(name: str, values: Any, is_ordered: bool = True) -> Any:
    """Return the values of samples without their index, if they have one, and else as they are.

    Args:
        name: Name of the argument in the error.
        values: One value for each sample.
        is_ordered: Whether it matters to which sample a value belongs.

    Raises:
        ArgumentError: If the order matters and the index is that of the samples 0 to N-1, in another order. It is then
            unclear which of the two is that of the data set.
    """
    if not _has_index(name, values):
        return values
    if is_ordered:
        index, in_order = list(values.index), list(range(len(values)))
        if index != in_order and all(map(_is_class, index)) and sorted(index) == in_order:
            expected = "in the order of the samples, with the index 0 to N-1 (see `sort_index` and `reset_index`)"
            raise bad_argument(name, expected, got_text="the samples in another order")
    return values.tolist()


def _has_index(name: str, values: Any) -> bool:
    """Return whether values are a pandas Series, without importing pandas. Refuse other objects with an index."""
    # Sequences have a method of this name.
    if not hasattr(values, "index") or callable(values.index):
        return False
    if getattr(values, "ndim", 1) != 1 or not hasattr(values, "tolist"):
        raise bad_argument(name, "a vector", got_text=f"a {type(values).__name__}")
    return True


def _is_class(key: Any) -> bool:
    return isinstance(key, Real) and not isinstance(key, bool) and float(key).is_integer()


def check_class_names(names: Any, num_classes: int) -> list[str]:
    """Return the names of C classes, or raise ``ArgumentError`` if they are not C different texts."""
    expected = f"{num_classes} different names, one for each class"
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise bad_argument("class_names", expected, names)
    found = [name.strip() for name in names]
    if len(found) != num_classes:
        raise bad_argument("class_names", expected, got_text=f"{len(found)} names")
    repeated = sorted({name for name in found if found.count(name) > 1}) if len(set(found)) < num_classes else []
    if repeated or not all(found):
        got = f"{repeated[0]!r} more than once" if repeated and repeated[0] else "an empty name"
        raise bad_argument("class_names", expected, got_text=got)
    return found


def check_same_classes(known: Sequence[str], names: Sequence[str], who: str) -> None:
    """Raise ``ArgumentError`` if data have other classes than a classifier, or in another order.

    A class may have another name in the same place.

    Args:
        known: Names of the classifier's classes; empty if unknown.
        names: Names of the classes of the data; empty if unknown.
        who: What has the other classes, for the message.
    """
    places = {name: number for number, name in enumerate(names)}
    moved = [name for number, name in enumerate(known) if places.get(name, number) != number]
    if not known or not names or (len(known) == len(names) and not moved):
        return
    missing, new = (sorted(set(a) - set(b)) for a, b in ((known, names), (names, known)))
    if missing or new:
        found = [f"{name!r} is missing" for name in missing[:1]] + [f"{name!r} is new" for name in new[:1]]
    else:
        found = [f"{moved[0]!r} is class {places[moved[0]]}, and not {known.index(moved[0])}"]
    raise ArgumentError(f"{who} has other classes than the classifier was made for: {', '.join(found)}.")
