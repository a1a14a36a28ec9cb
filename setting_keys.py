"""What a key of the settings is: its kind, default, unit, limits and documentation; reads a value as the key's own type.

Must not know which keys there are (config.py does), open a file or read the environment.
"""

from __future__ import annotations

import difflib
import math
import numbers
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


def setting(default: object, doc: str, **rule: object) -> Any:
    """A dataclass field of the tree; `rule` holds optional fields of Key: unit, choices, minimum, above, env, aliases ..."""
    return field(default=default, metadata={"doc": doc} | rule)


class Unfit(Exception):
    """A value that a key does not take; the text goes behind the key's name."""


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError
    return int(value)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise TypeError
    return float(value)


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _text(value: object) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError
    return os.fspath(value)


def _wholes(value: object) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or not value or len(set(map(_whole, value))) < len(value):
        raise TypeError
    return tuple(map(_whole, value))


def _numbers(value: object) -> tuple[float, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise TypeError
    return tuple(map(_number, value))


def _wholes_or_none(value: object) -> tuple[int, ...]:
    return () if value in ("none", [], ()) else _wholes(value)


def _feature_ids(value: object) -> str | tuple[str, ...]:
    return "auto" if isinstance(value, str) and value == "auto" else _names_or_none(value)


def _names_or_none(value: object) -> tuple[str, ...]:
    if isinstance(value, str) and value == "none":
        return ()
    if not isinstance(value, (list, tuple)):
        raise TypeError
    ids = tuple(v if isinstance(v, str) else str(_whole(v)) for v in value)
    if len(set(ids)) < len(ids) or {"", "auto", "none"}.intersection(ids):
        raise ValueError
    return ids


def _path(value: object) -> Path:
    if not _text(value):
        raise ValueError
    return Path(_text(value))


class Kind(NamedTuple):
    convert: Callable[[Any], object]  # raises TypeError or ValueError
    expected: str
    short: str  # for --help


# By the field's annotation.
KINDS: dict[str, Kind] = {
    "bool": Kind(_truth, "true or false", "[BOOL]"),
    "int": Kind(_whole, "a whole number", "INT"),
    "float": Kind(_number, "a number", "NUMBER"),
    "str": Kind(_text, "text (in quotes where YAML takes it for something else)", "TEXT"),
    "tuple[int, ...]": Kind(_wholes, "a list of different whole numbers", "INT ..."),
    "tuple[float, ...]": Kind(_numbers, "a list of numbers", "NUMBER ..."),
    "tuple[()] | tuple[int, ...]": Kind(_wholes_or_none, "none or a list of different whole numbers", "INT ..."),
    "tuple[str, ...]": Kind(_names_or_none, "none or a list of different names, as [item_id, 121]", "NAME ..."),
    "str | tuple[str, ...]": Kind(_feature_ids, "auto, none or a list of different feature ids, as [81, 82]", "ID ..."),
    "Path | None": Kind(_path, "a path", "PATH"),
}


@dataclass(frozen=True)
class Key:
    """A key of the tree (or, with group "", an option of the command line): its kind, default, documentation and limits."""

    group: str
    name: str
    kind: str
    default: object
    doc: str
    unit: str = ""
    choices: tuple = ()
    minimum: float | None = None  # at least
    above: float | None = None
    maximum: float | None = None  # at most
    below: float | None = None
    pattern: str = ""  # the whole text matches it; with choices it decides, and the choices are what is shown
    expects: str = ""  # what a person is told to give, in place of the kind's words
    value_aliases: Mapping[str, object] = field(default_factory=dict)
    env: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return f"{self.group}.{self.name}" if self.group else self.name

    @property
    def is_list(self) -> bool:
        return "tuple" in self.kind

    def limits(self) -> str:
        """The range in words: "at least 0, below 1"."""
        words = {"at least": self.minimum, "above": self.above, "at most": self.maximum, "below": self.below}
        return ", ".join(f"{word} {limit}" for word, limit in words.items() if limit is not None)

    def describe(self) -> str:
        """Documentation, unit, what it may be, its other names: config.yaml's comment and --help's text."""
        choices, limits, others = ", ".join(map(str, (*self.choices, *self.value_aliases))), self.limits(), ", ".join(self.aliases)
        facts = [(self.unit and self.unit not in self.doc.lower(), f"Unit: {self.unit}."), (choices, f"One of: {choices}."),
                 (limits, f"{limits.capitalize()}."), (others, f"Also: {others}."), (self.env, f"Variable: {self.env}.")]  # fmt: skip
        return " ".join([self.doc, *(text for holds, text in facts if holds)])

    def read(self, value: object) -> object:
        """`value` in the key's own type (an int for a float, a list for a tuple); raises Unfit where it does not fit."""
        convert, expected, _ = KINDS[self.kind]
        choices = [str(choice) for choice in (*self.choices, *self.value_aliases)]
        expected = self.expects or (f"one of {', '.join(choices)}" if choices else ", ".join(filter(None, (expected, self.limits()))))
        try:
            result = convert(self.value_aliases.get(value, value) if isinstance(value, str) else value)
            if not (all(map(self._fits, result)) if isinstance(result, tuple) else self._fits(result)):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            close = None if isinstance(value, (list, tuple, dict)) else nearest(str(value)[:200], choices, cutoff=0.7)
            raise Unfit(f"is {show(value)}; expected {expected}{f' (did you mean {close}?)' if close else ''}.") from None
        return result

    def _fits(self, value: Any) -> bool:
        if self.pattern:
            return re.fullmatch(self.pattern, value) is not None
        if self.choices:
            return value in self.choices
        return ((self.minimum is None or value >= self.minimum) and (self.above is None or value > self.above)
                and (self.maximum is None or value <= self.maximum) and (self.below is None or value < self.below))  # fmt: skip


# Aliases of YAML can make nine lines stand for 9^9 values: a plain repr() of them took 28 s and 2 GB.
_BOUNDED = reprlib.Repr()
_BOUNDED.maxlevel, _BOUNDED.maxlist, _BOUNDED.maxdict, _BOUNDED.maxstring, _BOUNDED.maxother, _BOUNDED.maxlong = 3, 20, 20, 200, 200, 200


def show(value: object) -> str:
    """A value in a message, 60 characters at most."""
    if value is None or isinstance(value, bool):
        return {None: "empty (null)", True: "true", False: "false"}[value]
    text = _BOUNDED.repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def nearest(name: str, names: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The valid name most like `name` (case and - for _ aside); None where the likeness (0 to 1) is below `cutoff`."""
    close = difflib.get_close_matches(name.lower().replace("-", "_"), list(names), n=1, cutoff=cutoff)
    return close[0] if close else None
