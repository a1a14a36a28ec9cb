"""Shapes that values of JSON must have, for files that may have come from anywhere, and a check that says what is wrong where.

A shape is a Plain, a Maybe, [shape of all], (shape of each, ...), {key: shape} ("key?" may be missing, str stands for any key, other keys
may be there), or a function that gives the shape of an object. Must not open files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Plain(NamedTuple):
    """A value that is no list and no object. words: what was expected."""

    words: str
    holds: Callable[[object], bool]


class Maybe(NamedTuple):
    """null, or a value of this shape."""

    shape: object


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63


WHOLE = Plain("a whole number", _is_whole)
COUNT = Plain("a whole number of 0 or more", lambda value: _is_whole(value) and value >= 0)
NUMBER = Plain("a number", lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100)
FLAG = Plain("true or false", lambda value: isinstance(value, bool))
TEXT = Plain("a text", lambda value: isinstance(value, str))
SCALAR = Plain("a text or a number", lambda value: isinstance(value, (str, int, float)))
OBJECT = Plain("an object", lambda value: isinstance(value, dict))


def fault(value: object, shape: object, place: str = "") -> str:
    """What is wrong with a value of JSON and where, "" where it has the shape. place: what the value is called."""
    where = f"{place}: " if place else ""
    if isinstance(shape, Maybe):
        return "" if value is None else fault(value, shape.shape, place)
    if isinstance(shape, Plain):
        return "" if shape.holds(value) else f"{where}expected {shape.words}, found {words(value)}"
    if isinstance(shape, (list, tuple)):
        if not isinstance(value, list) or (isinstance(shape, tuple) and len(value) != len(shape)):
            size = f" of {len(shape)}" if isinstance(shape, tuple) else ""
            return f"{where}expected a list{size}, found {words(value)}"
        shapes = shape if isinstance(shape, tuple) else shape * len(value)
        return _first(fault(one, of_one, f"{place}[{n}]") for n, (one, of_one) in enumerate(zip(value, shapes)))
    if not isinstance(value, dict):
        return f"{where}expected an object, found {words(value)}"
    shape = shape(value) if callable(shape) else shape
    if str in shape:
        return _first(fault(one, shape[str], _inner(place, key)) for key, one in value.items())
    missing = next((key for key in shape if not key.endswith("?") and key not in value), None)
    if missing is not None:
        return f"{where}has no {missing}"
    found = ((key.removesuffix("?"), of_one) for key, of_one in shape.items())
    return _first(fault(value[key], of_one, _inner(place, key)) for key, of_one in found if key in value)


def _inner(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


def _first(faults) -> str:
    return next(filter(None, faults), "")


def words(value: object) -> str:
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else f"{value!r:.40}"
