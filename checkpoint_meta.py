"""What a checkpoint's meta.json must hold: each key with its type. Must not open files, nor judge whether values fit anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _is_text(value: Any) -> bool:
    return isinstance(value, str)  # torch.__version__ is of a class of its own


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0  # type: True is an int to isinstance


def _is_number_or_null(value: Any) -> bool:
    return value is None or type(value) in (int, float)


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: type(value) is list and all(isinstance(item, kind) for item in value)


def _is_dict(value: Any) -> bool:
    return type(value) is dict


def _is_metrics(value: Any) -> bool:
    return type(value) is dict and all(map(_is_number_or_null, value.values()))


def _is_files(value: Any) -> bool:
    seals = [value.get(name) for name in ("model.pt", "trainer.pt")] if type(value) is dict else [None]
    return all(type(seal) is dict and _is_text(seal.get("sha256")) and _is_count(seal.get("size")) for seal in seals)


_TEXT, _COUNT, _DICT = (_is_text, "text"), (_is_count, "a whole number from 0"), (_is_dict, "an object")
_NAMES = (_is_list_of(str), "a list of names")
# key -> (check, what is expected). All of them have been written since format 2.
KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "format_version": _COUNT,
    "step": _COUNT,
    "valid_loss": (_is_number_or_null, "a number or null"),
    "files": (_is_files, "sha256 and size of model.pt and trainer.pt"),
    "config": _DICT,
    "schema": _DICT,
    "layout": (_is_list_of(dict), "a list of objects"),
    "embeddings": _NAMES,
    "num_items": _COUNT,
    "num_users": _COUNT,
    "num_events": _COUNT,
    "item_ids": _TEXT,
    "store": _TEXT,
    "epoch": _COUNT,
    "metrics": (_is_metrics, "numbers by name"),
    "torch": _TEXT,
}
# Those that came later, or that not every checkpoint has: `averaged` is a mean's, the last three are of runs on CPU.
LATER_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "averaged": _NAMES,
    "device": _TEXT,
    "cpu_capability": _TEXT,
    "threads": _COUNT,
    "numba": (lambda value: type(value) is bool, "true or false"),
}


def fault(meta: dict) -> str:
    """The first key that is missing or has a value of another type, with what is expected; "" where there is none."""
    for key, (check, expected) in (KEYS | LATER_KEYS).items():
        if key not in meta and key in KEYS:
            return f"{key} is missing; expected {expected}"
        if key in meta and not check(meta[key]):
            return f"{key} is {meta[key]!r:.60}; expected {expected}"
    return ""
