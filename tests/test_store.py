"""The store: equal arrays from either layout, by brute force; the cache, its locks and its crashes; predict data; bad input."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_worlds import CREATIVE, ITEM_SINGLE, USER_MULTI, USER_SINGLE, World, make_predict_world, make_world, write_jsonl, write_parquet

from columns import ItemLookup, RaggedColumn, StringColumn
from errors import RunError, UserError
from store import Store, content_hash, has_embedding, open_store

ROOT = Path(__file__).resolve().parents[1]
COLD = 2**63 + 11  # the first cold creative id of make_predict_world


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(50, 120)


def opened(data: Path, cache: Path, **more: object) -> Store:
    return open_store(data, cache, progress=False, log=lambda _: None, **more)


def row(features: dict, names: list[str]) -> list[int]:
    return [v if isinstance(v := features.get(n), int) else 0 for n in names]


def check_against(store: Store, world: World) -> None:
    """Every array of a training store against the world, user by user and item by item."""
    users = sorted(world.users, key=lambda u: u["id"])
    assert store.user_ids.tolist() == [u["id"] for u in users]
    assert store.raw_user_ids.take(range(store.num_users)) == [u["raw"] for u in users]
    assert np.diff(store.user_offsets).tolist() == [len(u["events"]) for u in users]
    for column, place in ((store.item_ids, 0), (store.action_types, 1), (store.timestamps, 2)):
        assert column.tolist() == [e[place] for u in users for e in u["events"]]
    assert store.user_single.tolist() == [row(u["features"], USER_SINGLE) for u in users]
    for name in USER_MULTI:
        values, counts = store.user_multi[name].gather(np.arange(len(users)))
        assert values.tolist() == [v for u in users for v in u["features"].get(name, [])]
        assert counts.tolist() == [len(u["features"].get(name, [])) for u in users]
    assert store.item_single.tolist() == [[0] * 13] + [row(world.items.get(i, {}), ITEM_SINGLE) for i in range(1, store.num_items + 1)]
    creatives, num = list(world.indexer["i"]), store.num_items + 1  # names that are all numbers are held as numbers
    held = store.raw_item_ids.tolist() if isinstance(store.raw_item_ids, np.ndarray) else store.raw_item_ids.take(range(num))
    assert held[0] in (0, "") and list(map(str, held[1:])) == list(map(str, creatives))
    assert (store.num_users, store.num_items, store.num_known_items, store.num_events) == (
        len(users),
        len(creatives),
        len(creatives),
        sum(len(u["events"]) for u in users),
    )


@pytest.mark.parametrize("shuffled", [False, True])
def test_both_layouts_give_the_worlds_arrays(world: World, tmp_path: Path, shuffled: bool) -> None:
    users = [world.users[k] for k in np.random.default_rng(3).permutation(len(world.users))] if shuffled else world.users
    mixed = World(users, world.items, world.indexer)
    a, b = (opened(write(mixed, tmp_path / name), tmp_path / "cache") for write, name in ((write_jsonl, "a"), (write_parquet, "b")))
    for store in (a, b):
        check_against(store, world)
        assert store.item_ids.dtype == np.int32 and store.action_types.dtype == np.int8 and store.user_offsets.dtype == np.int64
        assert not store.item_ids.flags.writeable and store.summary["rejected"] == 0 and not store.summary["differences"]
        assert store.cardinalities["100"] == max(40, int(store.item_single[:, 0].max())) and store.cardinalities["110"] == 40
        assert store.manifest["fingerprint"] in str(store.path) and not list(store.path.glob("unordered*"))
    assert content_hash(a) == content_hash(b)
    assert {f.name for f in (tmp_path / "cache").iterdir()} == {f"{s.path.name}{end}" for s in (a, b) for end in ("", ".lock")}


def test_records_serve_where_the_item_dictionary_is_missing(world: World, tmp_path: Path) -> None:
    store = opened(write_jsonl(world, tmp_path / "a", item_dict=False), tmp_path / "cache")
    seen = set(store.item_ids.tolist())
    for item in range(1, 121):
        assert store.item_single[item].tolist() == (row(world.items[item], ITEM_SINGLE) if item in seen else [0] * 13)
    assert "no item_feat_dict.json" in store.summary["warnings"][0]


def test_differences_and_gaps_of_the_item_dictionary_are_counted(world: World, tmp_path: Path) -> None:
    folder = write_jsonl(world, tmp_path / "a")
    tree = json.loads((folder / "item_feat_dict.json").read_text())
    first, second = (
        dict.fromkeys(e[0] for u in world.users for e in u["events"]).keys()
        and sorted({e[0] for u in world.users for e in u["events"]})[:2]
    )
    tree[str(first)] = {"100": 49}
    del tree[str(second)]
    (folder / "item_feat_dict.json").write_text(json.dumps(tree))
    store = opened(folder, tmp_path / "cache")
    assert store.item_single[first].tolist() == [49] + [0] * 12
    assert store.item_single[second].tolist() == row(world.items[second], ITEM_SINGLE)
    (count,) = store.summary["differences"].values()
    assert count == sum(e[0] == first for u in world.users for e in u["events"])


def test_the_second_opening_maps_what_is_there(world: World, tmp_path: Path) -> None:
    folder = write_parquet(world, tmp_path / "b")
    said: list[str] = []
    first = open_store(folder, tmp_path / "cache", progress=False, log=said.append)
    assert not first.cache_hit and "50 users" in " ".join(said)
    said.clear()
    second = open_store(folder, tmp_path / "cache", progress=False, log=said.append)
    assert second.cache_hit and not said and content_hash(first) == content_hash(second) and second.summary == first.summary
    assert opened(folder, tmp_path / "cache", max_bad_lines=3).path != first.path
    os.utime(folder / "indexer.pkl", ns=(1, 1))
    assert not opened(folder, tmp_path / "cache").cache_hit


@pytest.mark.parametrize("damage", ["missing", "short", "manifest", "version"])
def test_a_broken_store_is_compiled_anew_and_said(world: World, tmp_path: Path, damage: str) -> None:
    folder = write_jsonl(world, tmp_path / "a")
    store = opened(folder, tmp_path / "cache")
    whole = content_hash(store)
    target = store.path / ("item_ids.bin" if damage in ("missing", "short") else "manifest.json")
    if damage == "missing":
        target.unlink()
    elif damage == "version":
        target.write_text(json.dumps(json.loads(target.read_text()) | {"version": 0}))
    else:
        target.write_bytes(target.read_bytes()[:-1])
    said: list[str] = []
    again = open_store(folder, tmp_path / "cache", progress=False, log=said.append)
    assert not again.cache_hit and content_hash(again) == whole and "compiling it anew" in said[0]
    assert not list((tmp_path / "cache").glob("*tmp*"))


def test_rejects_stop_or_are_listed(world: World, tmp_path: Path) -> None:
    folder = write_jsonl(world, tmp_path / "a")
    lines = (folder / "seq.jsonl").read_bytes().splitlines()
    (folder / "seq.jsonl").write_bytes(b"\n".join([*lines[:3], b"[[1, 2", *lines[3:], lines[0]]) + b"\n")
    with pytest.raises(UserError, match=r"seq.jsonl:4: the line is cut off"):
        opened(folder, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("store-*.tmp*")) and not list((tmp_path / "cache").glob("*/manifest.json"))
    said: list[str] = []
    store = open_store(folder, tmp_path / "cache", max_bad_lines=2, progress=False, log=said.append)
    check_against(store, world)
    assert store.summary["rejected"] == 2 and any("2 lines or rows rejected; listed in" in s for s in said)
    listed = [json.loads(x) for x in Path(store.summary["rejects_file"]).read_text().splitlines()]
    assert [x["line"] for x in listed] == [4, 52] and f"user {world.users[0]['id']} comes twice" in listed[1]["reason"]
    assert any("offsets from 0" in w for w in store.summary["warnings"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda offsets: offsets, None),
        (lambda offsets: dict(enumerate(offsets)), None),
        (lambda offsets: [*offsets[:5], offsets[5] + 3, *offsets[6:]], "offset 6 is "),
        (lambda offsets: [*offsets[:5], offsets[4], *offsets[6:]], "offset 6 is "),  # one line twice, another not at all
        (lambda offsets: [*offsets[:5], offsets[6], offsets[5], *offsets[7:]], "offset 7 is "),
        (lambda offsets: [*offsets[:5], 10**30, *offsets[6:]], "offset 6 is 1000"),
        (lambda offsets: [*offsets[:5], -1, *offsets[6:]], "offset 6 is -1"),
        (lambda offsets: [*offsets[:5], "5", *offsets[6:]], "offset 6 is 5"),
        (lambda offsets: [*offsets[:5], None, *offsets[6:]], "offset 6 is None"),
    ],
)
def test_every_offset_is_looked_at(world: World, tmp_path: Path, change, words) -> None:
    folder = write_jsonl(world, tmp_path / "a")
    begins = [0, *np.cumsum([len(line) for line in (folder / "seq.jsonl").read_bytes().splitlines(keepends=True)])[:-1].tolist()]
    (folder / "seq_offsets.pkl").write_bytes(pickle.dumps(change(begins)))
    warnings = [warning for warning in opened(folder, tmp_path / "cache").summary["warnings"] if "offset" in warning]
    assert len(warnings) == (words is not None) and all(words in warning for warning in warnings)


def test_profiles_of_users_without_a_sequence_are_ignored(world: World, tmp_path: Path) -> None:
    """user_feat may list more users than there are sequences; the row before a user's own is no second row of that user."""
    folder = write_parquet(world, tmp_path / "b")
    for path in sorted((folder / "seq").glob("*.parquet")):
        table = pq.read_table(path)
        pq.write_table(table.take(list(range(0, table.num_rows, 2))), path)
    store = opened(folder, tmp_path / "cache")
    kept = {user["id"]: user for user in world.users}
    assert 20 < store.num_users < 30 and store.summary["rejected"] == 0
    assert store.user_single.tolist() == [row(kept[user]["features"], USER_SINGLE) for user in store.user_ids.tolist()]
    assert store.summary["ignored"]["rows of user_feat whose user has no sequence"] == 50 - store.num_users


def test_users_of_parquet_without_a_profile_or_listed_twice_are_rejected(world: World, tmp_path: Path) -> None:
    folder = write_parquet(world, tmp_path / "b", parts=1)
    path = folder / "user_feat" / "part-00000.parquet"
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table.slice(1), table.slice(5, 1)]), path)  # the first row is the last user's
    with pytest.raises(UserError, match="user_feat/part-00000.parquet:50: user .* comes twice"):
        opened(folder, tmp_path / "cache")
    store = opened(folder, tmp_path / "cache", max_bad_lines=2)
    last = world.users[-1]
    assert (
        store.num_users == 49 and last["id"] not in store.user_ids and store.num_events == sum(len(u["events"]) for u in world.users[:-1])
    )
    assert any("has no row in user_feat" in line for line in Path(store.summary["rejects_file"]).read_text().splitlines())


@pytest.mark.parametrize(
    ("indexer", "message"),
    [
        ([1], "expected a dict with 'u', 'i' and 'f'"),
        ({"u": {}, "i": {}}, "found keys 'u', 'i'"),
        ({"u": {}, "i": {5: "x"}, "f": {}}, r"\['i'\]\['5'\] is 'x'"),
        ({"u": {}, "i": {5: 0}, "f": {}}, r"\['i'\]\['5'\] is '0'"),
        ({"u": {"a": 1, "b": 1}, "i": {}, "f": {}}, "gives number 1 to 2 raw ids"),
        ({"u": {}, "i": {5: 2**31}, "f": {}}, "expected a number in 1.."),
        ({"u": {}, "i": {5: 2_000_000_000}, "f": {}}, "numbers up to 2,000,000,000"),
        ({"u": {}, "i": {}, "f": {"100": 3}}, "'f' of feature '100' is of type int"),
        ({"u": {}, "i": {}, "f": {"100": {"a": -2}}}, "'-2'"),
    ],
)
def test_an_indexer_that_is_none_is_named(world: World, tmp_path: Path, indexer: object, message: str) -> None:
    folder = write_jsonl(world, tmp_path / "a")
    (folder / "indexer.pkl").write_bytes(pickle.dumps(indexer))
    with pytest.raises(UserError, match=message) as found:
        opened(folder, tmp_path / "cache")
    assert "indexer.pkl" in str(found.value) and len(str(found.value).splitlines()) <= 3


def test_an_indexer_of_other_data_is_named(world: World, tmp_path: Path) -> None:
    for write, name in ((write_jsonl, "a"), (write_parquet, "b")):
        folder = write(world, tmp_path / name)
        (folder / "indexer.pkl").write_bytes(pickle.dumps(world.indexer | {"i": {7: 1, 8: 2}}))
        with pytest.raises(UserError, match=r"outside 1..2 \(the items of indexer.pkl\)"):
            opened(folder, tmp_path / "cache")


class Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("touch canary",)


def test_hostile_pickles_are_refused(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("indexer.pkl", "seq_offsets.pkl"):
        folder = write_jsonl(world, tmp_path / name.removesuffix(".pkl"))
        (folder / name).write_bytes(pickle.dumps({"u": Evil()}))
        with pytest.raises(UserError, match=name):
            opened(folder, tmp_path / "cache")
    assert not (tmp_path / "canary").exists()


def test_a_large_indexer_is_read_in_its_own_process(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("indexer.OWN_PROCESS_BYTES", 0)
    folder = write_jsonl(world, tmp_path / "a")
    check_against(opened(folder, tmp_path / "cache"), world)
    (folder / "indexer.pkl").write_bytes(b"junk")
    with pytest.raises(UserError, match="indexer.pkl"):
        opened(folder, tmp_path / "cache")


def converted(folder: Path, *, item: object = "int") -> Path:
    """Public data: no indexer, no times, a multi-valued item feature, an item that no one met."""
    folder.mkdir(parents=True)
    (folder / "schema.json").write_text(
        json.dumps({"has_time": False, "features": [{"id": "genre", "side": "item", "kind": "multi", "cardinality": 9, "name": ""}]})
    )
    kind = pa.list_(pa.struct([("item_id", pa.int64()), ("action_type", pa.int8()), ("timestamp", pa.int64())]))
    seqs = [
        [{"item_id": 2, "action_type": 0, "timestamp": 0}, {"item_id": 1, "action_type": 0, "timestamp": 1}],
        [{"item_id": 3, "action_type": None, "timestamp": None}],
    ]
    pq.write_table(pa.table({"user_id": [5, 2], "seq": pa.array(seqs, kind)}), folder / "seq.parquet")
    pq.write_table(pa.table({"item_id": [4, 1, 3], "genre": [[7], [2, 3], None]}), folder / "item_feat.parquet")
    return folder


def test_converted_data_needs_no_indexer(tmp_path: Path) -> None:
    store = opened(converted(tmp_path / "c"), tmp_path / "cache")
    assert (store.num_users, store.num_items, store.num_events) == (2, 4, 3) and not store.schema.has_time
    assert (
        store.user_ids.tolist() == [2, 5]
        and store.raw_user_ids.take([0, 1]) == ["2", "5"]
        and store.raw_item_ids.tolist() == [0, 1, 2, 3, 4]
    )
    assert store.item_ids.tolist() == [3, 2, 1] and store.timestamps.tolist() == [0, 0, 1] and store.action_types.tolist() == [0, 0, 0]
    assert store.item_multi["genre"].offsets.tolist() == [0, 0, 2, 2, 2, 3] and store.item_multi["genre"].values.tolist() == [2, 3, 7]
    assert store.item_single.shape == (5, 0) and store.user_single.shape == (2, 0) and store.cardinalities == {"genre": 7}
    assert store.summary["coerced"] == {"missing action types, read as exposures": 1}


def test_creative_ids_that_are_no_numbers(world: World, tmp_path: Path) -> None:
    indexer = world.indexer | {"i": {(f"ad{i}" if i % 2 else str(CREATIVE + i)): i for i in range(1, 121)}}
    store = opened(write_jsonl(World(world.users, world.items, indexer), tmp_path / "a"), tmp_path / "cache")
    assert isinstance(store.raw_item_ids, StringColumn) and store.raw_item_ids[1] == "ad1" and store.raw_item_ids[0] == ""
    assert store.item_ids_of(["ad3", CREATIVE + 4, str(CREATIVE + 6), "ad4", -1]).tolist() == [3, 4, 6, 0, 0]


# Predict


@pytest.fixture(scope="module")
def predict_world(world: World) -> World:
    return make_predict_world(world, 40)


def test_predict_stores_are_equal_and_right(predict_world: World, tmp_path: Path) -> None:
    a = opened(write_jsonl(predict_world, tmp_path / "a", predict=True), tmp_path / "cache", kind="predict")
    b = opened(write_parquet(predict_world, tmp_path / "b", predict=True), tmp_path / "cache", kind="predict")
    assert content_hash(a) == content_hash(b)
    users = predict_world.users
    assert a.raw_user_ids.take(range(a.num_users)) == [u["raw"] for u in users]
    assert a.user_ids.tolist() == [u["id"] if u["id"] < 10_000_000 else 0 for u in users]
    assert np.diff(a.user_offsets).tolist() == [len(u["events"]) for u in users] and np.diff(a.user_offsets)[3] == 0
    order = list(
        dict.fromkeys([e[0] for u in users for e in u["events"] if e[0] >= COLD] + [c for c, _ in predict_world.candidates if c >= COLD])
    )
    assert a.num_known_items == 120 and a.num_items == 120 + len(order) and a.raw_item_ids[121:].tolist() == order
    number = {c: 121 + k for k, c in enumerate(order)}
    assert a.item_ids.tolist() == [number.get(e[0], e[0]) for u in users for e in u["events"]]
    assert a.candidate_item_ids.tolist() == [number.get(c, c - CREATIVE) for c, _ in predict_world.candidates]
    assert a.retrieval_ids.tolist() == list(range(1, len(predict_world.candidates) + 1)) and a.retrieval_ids.dtype == np.uint64
    for creative, item in number.items():
        assert a.item_single[item].tolist() == row(predict_world.cold[creative], ITEM_SINGLE)
    assert a.user_single.tolist() == [row(u["features"], USER_SINGLE) for u in users]
    assert a.summary["cold"]["item feature 102"] > 0 and a.item_ids_of([order[0], CREATIVE + 3, 5]).tolist() == [121, 3, 0]


def test_odd_users_to_predict_are_all_answered(predict_world: World, tmp_path: Path) -> None:
    folder = write_jsonl(predict_world, tmp_path / "a", predict=True)
    lines = [
        [
            [9_999_999, 121, None, {"100": 3}, None, 5],
            [9_999_999, CREATIVE + 2, None, {}, 0, 6],
            [9_999_999, "ad-x", None, {"100": 9}, 0, 7],
        ],
        [["new user", None, {}, None, None, 0]],
        [["user_14", None, {"103": "x"}, None, None, 0], ["user_14", 5, None, {}, 0, 1]],
    ]
    (folder / "predict_seq.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    store = opened(folder, tmp_path / "cache", kind="predict")
    assert store.raw_user_ids.take(range(3)) == ["9999999", "new user", "user_14"] and store.user_ids.tolist() == [0, 0, 2]
    assert store.item_ids.tolist()[:2] == [121, 2] and store.item_ids[2] == 122 and store.user_offsets.tolist() == [0, 3, 3, 4]
    assert isinstance(store.raw_item_ids, StringColumn) and store.raw_item_ids.take([121, 122]) == ["121", "ad-x"]
    coerced = store.summary["coerced"]
    assert (
        coerced["creative ids of known items in sequences, read as their numbers"] == 1
        and coerced["users with no profile record, or more than one"] == 1
    )


def test_events_to_predict_out_of_order_give_the_ordered_store(predict_world: World, tmp_path: Path) -> None:
    ordered = opened(write_jsonl(predict_world, tmp_path / "ordered", predict=True), tmp_path / "cache", kind="predict")
    users = [u | {"events": u["events"][::-1]} if k % 3 else u for k, u in enumerate(predict_world.users)]
    mixed = World(users, predict_world.items, predict_world.indexer, predict_world.candidates, predict_world.cold)
    for write, name in ((write_jsonl, "a"), (write_parquet, "b")):
        store = opened(write(mixed, tmp_path / name, predict=True), tmp_path / "cache", kind="predict")
        assert content_hash(store) == content_hash(ordered) and store.summary["rejected"] == 0
        turned = sum(len(u["events"]) > 1 and k % 3 > 0 for k, u in enumerate(users))
        assert store.summary["coerced"]["users whose events were out of order, sorted by time"] == turned > 10


def test_predict_without_a_single_user_or_with_a_cut_line_is_an_error(predict_world: World, tmp_path: Path) -> None:
    folder = write_jsonl(predict_world, tmp_path / "a", predict=True)
    text = (folder / "predict_seq.jsonl").read_text()
    (folder / "predict_seq.jsonl").write_text(text[:-20])
    with pytest.raises(UserError, match=r"predict_seq.jsonl:41: the line is cut off(.|\n)*take it out of the file") as stop:
        opened(folder, tmp_path / "cache", kind="predict")
    assert "max_bad_lines" not in str(stop.value)
    (folder / "predict_seq.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no user"):
        opened(folder, tmp_path / "cache", kind="predict")


# Embeddings


def with_vectors(folder: Path, num: int = 100, width: int = 32, scale: float = 1.0) -> Path:
    vectors = {CREATIVE + i: (np.arange(width) * scale + i).astype(np.float32) for i in range(1, num + 1)}
    (folder / "creative_emb").mkdir(exist_ok=True)
    (folder / "creative_emb" / "emb_81_32.pkl").write_bytes(pickle.dumps(vectors))
    return folder


def test_embeddings_are_added_to_a_store_and_follow_their_source(world: World, tmp_path: Path) -> None:
    folder = write_jsonl(world, tmp_path / "a")
    plain = opened(folder, tmp_path / "cache")
    assert not plain.has_embedding("81") and not plain.has_embedding("nope")
    with pytest.raises(UserError, match=r"a has no vectors of 81 in creative_emb/ or mm_emb/\.\nAdd them"):
        opened(folder, tmp_path / "cache", embeddings=["81"])
    with pytest.raises(UserError, match="'99' is not an embedding of this data's schema; give some of 81, 82"):
        opened(folder, tmp_path / "cache", embeddings=["99"])
    with_vectors(folder)
    store = opened(folder, tmp_path / "cache", embeddings=["81"])
    assert store.cache_hit and has_embedding(folder, store.schema["81"]) and store.path == plain.path
    column = store.embedding("81")
    assert column.matrix.shape == (101, 32) and column.matrix.dtype == np.float16 and not column.matrix[0].any()
    assert column.row_of_item.tolist() == list(range(101)) + [0] * 20 and column.matrix[column.row_of_item[7], 3] == 10
    with pytest.raises(UserError, match="embedding '82' was not opened"):
        store.embedding("82")
    with_vectors(folder, scale=2.0)
    assert opened(folder, tmp_path / "cache", embeddings=["81"]).embedding("81").matrix[7, 3] == 13
    (store.path / "emb_81" / "matrix.npy").unlink()
    assert opened(folder, tmp_path / "cache", embeddings=["81"]).embedding("81").matrix[7, 3] == 13
    assert not list(store.path.glob("*tmp*"))


# The cache


def test_a_cache_that_cannot_be_written_is_named(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cache_path .*cannot be written(.|\n)*USER_CACHE_PATH"):
        opened(write_jsonl(world, tmp_path / "a"), tmp_path / "file" / "cache")


OPEN = (
    "import sys; sys.path.insert(0, sys.argv[1]); from store import *; s = open_store(sys.argv[2], sys.argv[3], progress=False); "
    "print('HASH', content_hash(s), s.cache_hit)"
)


def start(data: Path, cache: Path, code: str = OPEN) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT), str(data), str(cache)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_processes_that_open_at_once_build_once(world: World, tmp_path: Path) -> None:
    folder = write_jsonl(world, tmp_path / "a")
    answers = [p.communicate(timeout=60)[0] for p in [start(folder, tmp_path / "cache") for _ in range(4)]]
    hashes = [a[a.index("HASH") :].split() for a in answers]
    assert len({h[1] for h in hashes}) == 1 and sum(h[2] == "False" for h in hashes) == 1


def test_a_killed_builder_leaves_nothing_that_matters(world: World, tmp_path: Path) -> None:
    folder, cache = write_jsonl(world, tmp_path / "a"), tmp_path / "cache"
    slow = OPEN.replace(
        "from store import *;",
        "from store import *; import store_build, time; store_build.StoreBuilder._finish_users = lambda self: time.sleep(60);",
    )
    process = start(folder, cache, slow)
    deadline = time.monotonic() + 30
    while not list(cache.glob("store-*.tmp-*/unordered.item_ids.bin")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(cache.glob("store-*.tmp-*")) and not list(cache.glob("*/manifest.json"))
    (cache / "store-0123456789abcdef.tmp-1-1").mkdir()  # of a dead builder of another store
    begin = time.monotonic()
    check_against(opened(folder, cache), world)
    assert time.monotonic() - begin < 5 and not list(cache.glob("store-*.tmp-*"))


def test_a_full_disk_while_compiling(world: World, tmp_path: Path) -> None:
    folder, cache = write_jsonl(world, tmp_path / "a"), tmp_path / "cache"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (10, 600, 2000, 5000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(RunError, match=r"store-.*: no space left to write \([\d,]+ bytes needed\)"):
                opened(folder, cache)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not list(cache.glob("store-*.tmp-*")) and not list(cache.glob("*/manifest.json"))
    check_against(opened(folder, cache), world)


def test_a_full_disk_in_a_worker_process(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sources_workers.PARALLEL_BYTES", 0)
    monkeypatch.setattr("indexer.OWN_PROCESS_BYTES", 0)
    folder, cache = write_jsonl(world, tmp_path / "a"), tmp_path / "cache"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (500, 2000, 7000, 20_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(RunError, match="no space left to write"):
                opened(folder, cache)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not list(cache.glob("store-*.tmp-*"))
    check_against(opened(folder, cache), world)


@pytest.mark.parametrize("step", ["write_sealed", "sync_path", "_replace"])
def test_a_crash_at_the_end_leaves_the_old_or_the_new(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    folder, cache = write_jsonl(world, tmp_path / "a"), tmp_path / "cache"

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"store.{step}", crash)
        with pytest.raises(KeyboardInterrupt):
            opened(folder, cache)
    assert not list(cache.glob("store-*.tmp-*"))
    check_against(opened(folder, cache), world)


# Columns


@given(st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1, max_size=8), st.data())
def test_ragged_columns_round_trip(lists: list[list[int]], data: st.DataObject) -> None:
    column = RaggedColumn.from_counts(np.array([len(x) for x in lists]), np.array([v for x in lists for v in x], dtype=np.int32))
    rows = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=10))
    values, counts = column.gather(np.array(rows, dtype=np.int64))
    assert values.tolist() == [v for r in rows for v in lists[r]] and counts.tolist() == [len(lists[r]) for r in rows]
    order = np.random.default_rng(0).permutation(len(lists))
    scattered = RaggedColumn.scatter(len(lists), order, *column.gather(order)[::-1])
    assert scattered.values.tolist() == column.values.tolist() and scattered.offsets.tolist() == column.offsets.tolist()


@given(st.lists(st.text(max_size=5), min_size=1, max_size=8))
def test_string_columns_round_trip(strings: list[str]) -> None:
    column = StringColumn.from_list(strings)
    assert len(column) == len(strings) and column.take(range(len(strings))) == strings and column[-1] == strings[-1]
    assert column.select(np.arange(len(strings))[::-1]).take(range(len(strings))) == strings[::-1]
    with pytest.raises(IndexError):
        column[len(strings)]


def test_items_are_looked_up_by_number_and_by_name() -> None:
    lookup = ItemLookup(np.array([0, 9, 0, 2**64 - 2, 2**64 - 1], dtype=np.uint64))
    assert lookup([9, "9", 0, 2**64 - 2, -1, 2**64, "x", "", "９"]).tolist() == [1, 1, 0, 3, 0, 0, 0, 0, 0]
    assert lookup([2**64 - 1, str(2**64 - 1), str(2**64), "09"]).tolist() == [4, 4, 0, 0]
    assert lookup([]).tolist() == [] and ItemLookup(np.zeros(1, np.uint64))([5]).tolist() == [0]


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)


@st.composite
def worlds(draw) -> World:
    """Users and items with any text or number as their id; features missing, lists empty or with repeats, times equal or far apart."""
    numbers = st.lists(st.integers(1, 2**63), min_size=1, max_size=8, unique=True)
    creatives = draw(st.one_of(numbers, st.lists(NAMES, min_size=1, max_size=8, unique=True)))
    names = draw(st.lists(NAMES, min_size=1, max_size=6, unique=True))
    value = st.integers(1, 60)
    single = lambda ids: st.dictionaries(st.sampled_from(ids), value, max_size=len(ids))
    lists = st.dictionaries(st.sampled_from(USER_MULTI), st.lists(value, max_size=4), max_size=len(USER_MULTI))
    event = st.tuples(st.integers(1, len(creatives)), st.integers(0, 2), st.integers(0, 2_000_000_000) | st.just(1_700_000_000))
    users = []
    for number, raw in enumerate(names, 1):
        if number == 1 or draw(st.booleans()):  # the indexer may name others
            events = sorted(draw(st.lists(event, min_size=1, max_size=6)), key=lambda e: e[2])
            users.append({"id": number, "raw": raw, "features": draw(single(USER_SINGLE)) | draw(lists), "events": events})
    items = {item: draw(single(ITEM_SINGLE)) for item in range(1, len(creatives) + 1)}
    indexer = {"u": {raw: n for n, raw in enumerate(names, 1)}, "i": {c: i for i, c in enumerate(creatives, 1)},
               "f": {i: {str(v): v for v in range(1, 41)} for i in ITEM_SINGLE + USER_SINGLE + USER_MULTI}}  # fmt: skip
    return World(users, items, indexer)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(worlds(), st.randoms(use_true_random=False))
def test_any_world_comes_back_from_either_layout(tmp_path: Path, drawn: World, chance) -> None:
    shutil.rmtree(tmp_path, ignore_errors=True)
    users = list(drawn.users)
    chance.shuffle(users)
    mixed = World(users, drawn.items, drawn.indexer)
    a, b = (opened(write(mixed, tmp_path / name), tmp_path / "cache") for write, name in ((write_jsonl, "a"), (write_parquet, "b")))
    for store in (a, b):
        check_against(store, drawn)
    assert content_hash(a) == content_hash(b)
