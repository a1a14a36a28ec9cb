"""What report.json must look like, so that the report can draw it: a shape for each part, and a check that says what is wrong where.

Must not draw or read files. A part that is not ours is left out before anything is drawn; an error while drawing is then a fault of ours
and is not hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from report_data import VERSION
from report_html import number


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
NUMBER = Plain("a number", lambda value: number(value) is not None)
FLAG = Plain("true or false", lambda value: isinstance(value, bool))
TEXT = Plain("a text", lambda value: isinstance(value, str))
SCALAR = Plain("a text or a number", lambda value: isinstance(value, (str, int, float)))


def _histogram(value: Mapping) -> dict:
    """As many counts as names."""
    names = value.get("names")
    return {"names": [TEXT], "counts": (COUNT,) * (len(names) if isinstance(names, list) else 0)}


def _data(value: Mapping) -> dict:
    last = Maybe(NUMBER) if value.get("first_time") is None else NUMBER  # data without events have neither
    times = {"gaps": _histogram, "hours": (COUNT,) * 24, "weekdays": (COUNT,) * 7, "first_time": Maybe(NUMBER), "last_time": last}
    return {
        "num_users": COUNT,
        "num_items": COUNT,
        "num_events": COUNT,
        "rejected": Maybe(COUNT),
        "has_time": FLAG,
        "splits": {"train": COUNT, "valid": COUNT, "test": COUNT},
        "notes": [TEXT],
        "lengths": lambda lengths: _histogram(lengths) | dict.fromkeys(("p10", "median", "mean", "p90", "max"), NUMBER),
        "popularity": {"curve": [(COUNT, COUNT)], "top_1": NUMBER, "top_10": NUMBER},
        "coverage": [
            {"id": TEXT, "name": TEXT, "side": TEXT, "kind": TEXT, "covered": NUMBER, "largest": Maybe(COUNT), "mean_values?": NUMBER,
             "width?": COUNT}
        ],
        "cold": dict.fromkeys(("candidates", "targets", "targets_no_candidate"), Maybe(NUMBER)),
        "users_looked_at": COUNT,
        "actions": {str: COUNT},
    } | (times if value.get("has_time") is True or "first_time" in value else {})  # fmt: skip


def _answer(value: Mapping) -> dict:
    cosine = Maybe(NUMBER) if value.get("nearest") is None else NUMBER
    return {"item": WHOLE, "score": NUMBER, "nearest": Maybe(WHOLE), "cosine": cosine, "shared": [(TEXT, SCALAR)]}


QUALITY = {
    "slices": [{"slice": TEXT, "group": TEXT, "num_users": COUNT, "hr@10": NUMBER, "ndcg@10": NUMBER, "ndcg_error": Maybe(NUMBER)}],
    "ranks": lambda ranks: _histogram(ranks) | {"without": COUNT},
}
FEATURES = {str: [SCALAR]}
EVENT = {"item": WHOLE, "action": WHOLE, "time": Maybe(NUMBER)}
SAMPLES = {
    "users": [
        {"user": SCALAR, "features": FEATURES, "num_events": COUNT, "history": [EVENT], "next": EVENT, "rank": WHOLE, "top": [_answer],
         "near_next": [(WHOLE, NUMBER)], "near_first": [(WHOLE, NUMBER)]}
    ],
    "items": {str: {"raw": SCALAR, "count": COUNT, "features": FEATURES}},
}  # fmt: skip
# A shape is a Plain, a Maybe, [shape of all], (shape of each, ...), {key: shape} ("key?" may be missing; str stands for any key), or a
# function that gives the shape of an object.
PARTS = {"data": _data, "quality": QUALITY, "samples": SAMPLES}


def fault(value: object, shape: object, place: str) -> str:
    """What is wrong with a value of JSON and where, "" where it has the shape."""
    if isinstance(shape, Maybe):
        return "" if value is None else fault(value, shape.shape, place)
    if isinstance(shape, Plain):
        return "" if shape.holds(value) else f"{place}: expected {shape.words}, found {_words(value)}"
    if isinstance(shape, (list, tuple)):
        if not isinstance(value, list) or (isinstance(shape, tuple) and len(value) != len(shape)):
            size = f" of {len(shape)}" if isinstance(shape, tuple) else ""
            return f"{place}: expected a list{size}, found {_words(value)}"
        shapes = shape if isinstance(shape, tuple) else shape * len(value)
        return _first(fault(one, of_one, f"{place}[{n}]") for n, (one, of_one) in enumerate(zip(value, shapes)))
    if not isinstance(value, dict):
        return f"{place}: expected an object, found {_words(value)}"
    shape = shape(value) if callable(shape) else shape
    if str in shape:
        return _first(fault(one, shape[str], f"{place}.{key}") for key, one in value.items())
    missing = next((key for key in shape if not key.endswith("?") and key not in value), None)
    if missing is not None:
        return f"{place}: has no {missing}"
    found = ((key.removesuffix("?"), of_one) for key, of_one in shape.items())
    return _first(fault(value[key], of_one, f"{place}.{key}") for key, of_one in found if key in value)


def _first(faults) -> str:
    return next(filter(None, faults), "")


def _words(value: object) -> str:
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else f"{value!r:.40}"


def sound_parts(tree: Mapping) -> tuple[dict, dict[str, str]]:
    """(report.json's object without the parts that are not ours, {such a part: what is wrong with it})."""
    faults = {}
    for name, shape in PARTS.items():
        if name in tree:
            other = tree.get("version") != VERSION
            words = f"version: expected {VERSION}, found {_words(tree.get('version'))}" if other else fault(tree[name], shape, name)
            faults |= {name: words} if words else {}
    return {key: value for key, value in tree.items() if key not in faults}, faults
