"""Reads indexer.pkl (raw ids to numbers) into arrays, a large one in a process of its own that gives its memory back.

Must not know of sequences or of the store.
indexer.pkl is {'u': {raw user id: int}, 'i': {creative id: int}, 'f': {feature id: {raw value: int}}}.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from columns import StringColumn, is_number
from errors import EXIT_USER_MISTAKE, RunError, UserError, run_cli
from plain_pickle import load_plain_pickle
from sources import INT32_MAX
from store_files import ArrayFiles, load_array, write_json

FOLDER = "indexer"  # of the scratch folder, for what that process found
OWN_PROCESS_BYTES = 32 << 20  # 4.8 M items and 2 M values unpickle to some 1.5 GB, which Python would keep


class Indexer(NamedTuple):
    """num_items: the largest item number. item_raw (num_items+1): uint64 creative ids, or StringColumn where one is no number; 0 or '' at
    entry 0 and at numbers without one. user_numbers (N) int64 ascending; user_raw: their raw ids. feature_max: largest value a feature.
    """

    num_items: int
    item_raw: np.ndarray | StringColumn
    user_numbers: np.ndarray
    user_raw: StringColumn
    feature_max: dict[str, int]

    @property
    def max_user(self) -> int:
        return int(self.user_numbers[-1]) if len(self.user_numbers) else 0

    def raw_users(self, numbers: np.ndarray) -> tuple[StringColumn, np.ndarray]:
        """Raw ids of user numbers (N), the number itself where there is none, and which have one (N) bool."""
        places = np.searchsorted(self.user_numbers, numbers)
        places = np.minimum(places, max(len(self.user_numbers) - 1, 0))
        known = self.user_numbers[places] == numbers if len(self.user_numbers) else np.zeros(len(numbers), dtype=bool)
        if known.all():
            return self.user_raw.select(places), known
        names = [self.user_raw[p] if k else str(n) for p, k, n in zip(places.tolist(), known.tolist(), numbers.tolist(), strict=True)]
        return StringColumn.from_list(names), known


def no_indexer() -> Indexer:
    """Of converted data, where the numbers are the raw ids; num_items 0 means not known."""
    none = np.zeros(0, dtype=np.int64)
    return Indexer(0, np.zeros(1, dtype=np.uint64), none, StringColumn.from_list([]), {})


def read_indexer(path: Path, scratch: Path) -> Indexer:
    """Read indexer.pkl; scratch: an existing folder for a large one. UserError where it is not what it should be."""
    if path.stat().st_size < OWN_PROCESS_BYTES:
        return parse_indexer(load_plain_pickle(path), path)
    environment = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run(
        [sys.executable, __file__, str(path), str(scratch)], stderr=subprocess.PIPE, text=True, env=environment, check=False
    )
    if done.returncode == EXIT_USER_MISTAKE:
        raise UserError(done.stderr.strip().removeprefix("error: "))
    if done.returncode:
        raise RunError(f"{path}: reading it failed (status {done.returncode}): {done.stderr.strip()[-400:]}")
    return _load(scratch)


def parse_indexer(tree: object, path: Path) -> Indexer:
    """The arrays of an unpickled indexer; `path` for messages."""
    if not isinstance(tree, dict) or not all(isinstance(tree.get(k), dict) for k in "uif"):
        found = f"keys {', '.join(map(repr, list(tree)[:6]))}" if isinstance(tree, dict) else type(tree).__name__
        raise UserError(
            f"{path}: expected a dict with 'u', 'i' and 'f' (dicts of raw id to number); found {found}.\nTake the indexer.pkl of this data."
        )
    items = _numbers(tree["i"], path, "i")
    num_items = int(items.max(initial=0))
    item_raw = _item_raw(tree["i"], items, num_items, path)
    users = _numbers(tree["u"], path, "u")
    order = np.argsort(users)
    names = list(map(str, tree["u"]))
    user_raw = StringColumn.from_list([names[k] for k in order.tolist()])
    feature_max = {}
    for feature, values in tree["f"].items():
        if not isinstance(values, dict):
            found = f"'f' of feature {str(feature)[:40]!r} is of type {type(values).__name__}"
            raise UserError(f"{path}: {found}; expected a dict of raw value to number.\nTake the indexer.pkl of this data.")
        feature_max[str(feature)] = int(_numbers(values, path, f"f'][{str(feature)[:40]!r}", distinct=False).max(initial=0))
    if not num_items:
        raise UserError(f"{path}: 'i' holds no item; expected creative ids with their numbers.\nTake the indexer.pkl of this data.")
    return Indexer(num_items, item_raw, users[order], user_raw, feature_max)


def _numbers(mapping: dict, path: Path, name: str, *, distinct: bool = True) -> np.ndarray:
    """The numbers of a mapping, in its order: plain ints in 1..2^31-1, each once (feature values may share and may be 0)."""
    values = list(mapping.values())
    try:
        if set(map(type, values)) - {int}:
            raise ValueError
        numbers = np.fromiter(values, np.int64, len(values))
        if len(numbers) and (numbers.min() < (1 if distinct else 0) or numbers.max() >= INT32_MAX):
            raise ValueError
    except (ValueError, OverflowError):
        key, value = next((k, v) for k, v in mapping.items() if type(v) is not int or not (1 if distinct else 0) <= v < INT32_MAX)
        raise UserError(f"{path}: ['{name}'][{str(key)[:40]!r}] is {str(value)[:40]!r}; expected a number in 1..{INT32_MAX - 1}.\n"
                        "Take the indexer.pkl of this data.") from None  # fmt: skip
    if distinct and len(np.unique(numbers)) != len(numbers):
        value, count = np.unique(numbers, return_counts=True)
        raise UserError(
            f"{path}: ['{name}'] gives number {value[count > 1][0]} to {count.max()} raw ids; expected one each.\n"
            "Take the indexer.pkl of this data."
        )
    return numbers


def _item_raw(mapping: dict, numbers: np.ndarray, num_items: int, path: Path) -> np.ndarray | StringColumn:
    if num_items > 4 * len(numbers) + 1_000_000:
        raise UserError(f"{path}: ['i'] has {len(numbers):,} items but numbers up to {num_items:,}; expected numbers from 1 with few gaps.")
    keys = list(mapping)
    try:
        if set(map(type, keys)) - {int}:
            keys = [int(k) if is_number(str(k)) else _not_a_number(k) for k in keys]
        raw = np.zeros(num_items + 1, dtype=np.uint64)
        raw[numbers] = np.fromiter(keys, np.uint64, len(keys))
    except (_NotANumberError, OverflowError):
        names = [""] * (num_items + 1)
        for key, number in zip(map(str, mapping), numbers.tolist(), strict=True):
            names[number] = str(int(key)) if is_number(key) else key
        return StringColumn.from_list(names)
    return raw


class _NotANumberError(Exception):
    pass


def _not_a_number(key: object) -> int:
    raise _NotANumberError(key)


def _load(scratch: Path) -> Indexer:
    folder = scratch / FOLDER
    plain = json.loads((folder / "indexer.json").read_text(encoding="utf-8"))
    arrays = {name: np.array(load_array(folder, name, spec)) for name, spec in plain["arrays"].items()}
    item_raw = arrays["item_raw"]
    if "item_offsets" in arrays:
        item_raw = StringColumn(arrays["item_offsets"], item_raw)
    users = StringColumn(arrays["user_offsets"], arrays["user_raw"])
    return Indexer(plain["num_items"], item_raw, arrays["user_numbers"], users, plain["feature_max"])


def _save(indexer: Indexer, scratch: Path) -> None:
    arrays = {"user_numbers": indexer.user_numbers, "user_offsets": indexer.user_raw.offsets, "user_raw": indexer.user_raw.data}
    if isinstance(indexer.item_raw, StringColumn):
        arrays |= {"item_offsets": indexer.item_raw.offsets, "item_raw": indexer.item_raw.data}
    else:
        arrays["item_raw"] = indexer.item_raw
    folder = scratch / FOLDER
    folder.mkdir()
    files = ArrayFiles(folder)
    for name, array in arrays.items():
        files.write(name, array)
    write_json(folder / "indexer.json", {"num_items": indexer.num_items, "feature_max": indexer.feature_max, "arrays": files.arrays})


def _main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    path, scratch = map(Path, sys.argv[1:])
    _save(parse_indexer(load_plain_pickle(path), path), scratch)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(_main))
