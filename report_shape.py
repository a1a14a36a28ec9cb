"""The shapes of report.json's parts, so that the report can draw them.

Must not draw or read files. A part that is not ours is left out before anything is drawn; an error while drawing is then a fault of ours
and is not hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

from report_data import VERSION
from shapes import COUNT, FLAG, NUMBER, SCALAR, TEXT, WHOLE, Maybe, fault, words


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
PARTS = {"data": _data, "quality": QUALITY, "samples": SAMPLES}


def sound_parts(tree: Mapping) -> tuple[dict, dict[str, str]]:
    """(report.json's object without the parts that are not ours, {such a part: what is wrong with it})."""
    faults = {}
    for name, shape in PARTS.items():
        if name in tree:
            other = tree.get("version") != VERSION
            wrong = f"version: expected {VERSION}, found {words(tree.get('version'))}" if other else fault(tree[name], shape, name)
            faults |= {name: wrong} if wrong else {}
    return {key: value for key, value in tree.items() if key not in faults}, faults
