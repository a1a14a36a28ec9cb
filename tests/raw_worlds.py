"""Small TencentGR-shaped data sets for the tests of the store: one world, written in either layout. Must not use the code under test."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from schema import TENCENT_GR

ITEM_SINGLE = [f.id for f in TENCENT_GR.select("item", "single")]
USER_SINGLE = [f.id for f in TENCENT_GR.select("user", "single")]
USER_MULTI = [f.id for f in TENCENT_GR.select("user", "multi")]
CREATIVE = 10_000_000_000  # creative id of item 1, less 1


@dataclass
class World:
    """users: [{"id", "raw", "features", "events": [(item, action, time)]}]; items {id: features}; candidates [(creative id, features)]."""

    users: list[dict]
    items: dict[int, dict]
    indexer: dict
    candidates: list[tuple[int, dict]] = field(default_factory=list)
    cold: dict[int, dict] = field(default_factory=dict)


def make_world(num_users: int, num_items: int, seed: int = 0, mean_length: int = 12) -> World:
    """A world for training. Features are missing at random, some users and items have none; user numbers have gaps."""
    rng = np.random.default_rng(seed)

    def features(singles: list[str], multis: list[str]) -> dict:
        if rng.random() < 0.05:
            return {}
        out: dict = {i: int(rng.integers(1, 50)) for i in singles if rng.random() < 0.9}
        return out | {i: rng.integers(1, 9, int(rng.integers(1, 4))).tolist() for i in multis if rng.random() < 0.8}

    items = {item: features(ITEM_SINGLE, []) for item in range(1, num_items + 1)}
    users = []
    for number in sorted(rng.choice(np.arange(1, 2 * num_users + 1), num_users, replace=False).tolist()):
        length = int(rng.integers(1, 2 * mean_length))
        times = np.sort(rng.integers(1_700_000_000, 1_710_000_000, length)).tolist()
        events = list(zip(rng.integers(1, num_items + 1, length).tolist(), rng.integers(0, 2, length).tolist(), times, strict=True))
        users.append({"id": number, "raw": f"user_{number * 7}", "features": features(USER_SINGLE, USER_MULTI), "events": events})
    indexer = {"u": {f"user_{n * 7}": n for n in range(1, 2 * num_users + 1)}, "i": {CREATIVE + i: i for i in range(1, num_items + 1)},
               "f": {i: {str(v): v for v in range(1, 41)} for i in ITEM_SINGLE + USER_SINGLE + USER_MULTI}}  # fmt: skip
    return World(users, items, indexer)


def make_predict_world(train: World, num_users: int, seed: int = 1) -> World:
    """Users to predict: a fifth unknown, repeats, one without events; cold items in sequences and candidates; cold values as strings."""
    rng = np.random.default_rng(seed)
    num_items = len(train.items)
    cold = {2**63 + 11 + k * 1_000_003: {i: int(rng.integers(1, 50)) for i in ITEM_SINGLE if rng.random() < 0.7} for k in range(30)}
    for features in list(cold.values())[::2]:
        features["102"] = "never seen"
    users = []
    for k in range(num_users):
        known = train.users[int(rng.integers(len(train.users)))]
        events = [
            (int(rng.choice(list(cold))) if rng.random() < 0.1 else int(rng.integers(1, num_items + 1)), 0, 1_720_000_000 + t)
            for t in range(int(rng.integers(1, 20)))
        ]
        user = {"id": known["id"], "raw": known["raw"], "features": known["features"], "events": events if k != 3 else []}
        users.append(user if k % 5 else user | {"id": 10_000_000 + k, "raw": str(10_000_000 + k), "features": {"103": 4, "106": [1, 2]}})
    users.append(users[0])
    creatives = [CREATIVE + int(i) for i in rng.choice(np.arange(1, num_items + 1), num_items // 2, replace=False)] + list(cold)[10:]
    rng.shuffle(creatives)
    candidates = [(c, cold[c] if c in cold else train.items[c - CREATIVE]) for c in creatives]
    return World(users, train.items, train.indexer, candidates, cold)


def write_jsonl(world: World, folder: Path, *, predict: bool = False, item_dict: bool = True) -> Path:
    """Layout A. The profile record's place differs from line to line."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "predict_seq" if predict else "seq"
    offsets, place = [], 0
    with open(folder / f"{name}.jsonl", "wb") as out:
        for k, user in enumerate(world.users):
            uid = user["raw"] if predict else user["id"]
            records = [[uid, i, None, world.items.get(i) or world.cold.get(i, {}), a, t] for i, a, t in user["events"]]
            records.insert(k % (len(records) + 1), [uid, None, user["features"], None, None, records[-1][5] if records else 0])
            offsets.append(place)
            place += out.write(json.dumps(records).encode() + b"\n")
    _dump(folder / f"{name}_offsets.pkl", offsets)
    _dump(folder / "indexer.pkl", world.indexer)
    if item_dict:
        (folder / "item_feat_dict.json").write_text(json.dumps({str(i): f for i, f in world.items.items()}))
    if predict:
        lines = [json.dumps({"creative_id": c, "retrieval_id": k + 1, "features": f}) for k, (c, f) in enumerate(world.candidates)]
        (folder / "predict_set.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_parquet(world: World, folder: Path, *, predict: bool = False, parts: int = 3) -> Path:
    """Layout B, in parts. Cold items' features stand in item_feat under their creative id."""
    folder.mkdir(parents=True, exist_ok=True)
    _dump(folder / "indexer.pkl", world.indexer)
    event = pa.struct([("item_id", pa.uint64() if predict else pa.int64()), ("action_type", pa.int8()), ("timestamp", pa.int64())])
    seqs = [[{"item_id": i, "action_type": a, "timestamp": t} for i, a, t in u["events"]] for u in world.users]
    _write(pa.table({"user_id": [u["id"] for u in world.users], "seq": pa.array(seqs, pa.list_(event))}), folder / "seq", parts)
    profiles = list({u["id"]: u["features"] for u in world.users}.items())[::-1]
    columns = {"user_id": [i for i, _ in profiles]} | {n: [f.get(n) for _, f in profiles] for n in USER_SINGLE + USER_MULTI}
    _write(pa.table(columns), folder / "user_feat", parts)
    rows = [(i, f) for i, f in world.items.items()] + [
        (i, {k: v if type(v) is int else None for k, v in f.items()}) for i, f in world.cold.items()
    ]
    columns = {"item_id": pa.array([i for i, _ in rows], pa.uint64() if predict else pa.int64())}
    _write(pa.table(columns | {n: pa.array([f.get(n) for _, f in rows], pa.int32()) for n in ITEM_SINGLE}), folder / "item_feat", parts)
    if predict:
        _write_candidates(world, folder / "candidate")
    return folder


def _write_candidates(world: World, folder: Path) -> None:
    def cell(value: object) -> dict | None:
        return None if value is None else {"feature_value": str(value), "is_str": int(isinstance(value, str))}

    columns = {"creative_id": pa.array([c for c, _ in world.candidates], pa.uint64()),
               "reid_creative_id": list(range(len(world.candidates))),
               "retrieval_id": list(range(1, len(world.candidates) + 1))}  # fmt: skip
    kind = pa.struct([("feature_value", pa.string()), ("is_str", pa.int8())])
    _write(pa.table(columns | {n: pa.array([cell(f.get(n)) for _, f in world.candidates], kind) for n in ITEM_SINGLE}), folder, 1)


def _write(table: pa.Table, folder: Path, parts: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    size = -(-table.num_rows // parts)
    for k in range(parts):
        pq.write_table(table.slice(k * size, size), folder / f"part-{k:05d}.parquet")


def _dump(path: Path, tree: object) -> None:
    with open(path, "wb") as out:
        pickle.dump(tree, out)
