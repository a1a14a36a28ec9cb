"""Readers of both layouts: what is taken, what is rejected and why, and that pieces and processes change nothing."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_worlds import ITEM_SINGLE, make_world, write_jsonl, write_parquet

import sources_jsonl
import sources_parquet
import sources_workers
from errors import UserError
from item_table import ItemTable
from schema import TENCENT_GR, Feature, Schema
from sources import Progress, Ragged, Rejects, Rules, find_source, parts
from sources_jsonl import FeatureReader, KnownItems, LineParser, read_range
from store_files import ArrayFiles

RULES = Rules("train", TENCENT_GR, num_items=50, max_user=100)
PREDICT = Rules("predict", TENCENT_GR, num_items=50, max_user=100)
SILENT = Progress("", 1, "B", enabled=False)


def parser(rules: Rules = RULES) -> LineParser:
    known = KnownItems(np.zeros((51, 13), np.int32), np.zeros(51, bool), {})
    return LineParser(rules, known)


def profile(user: object = 7, features: object = None, moment: object = 30) -> list:
    return [user, None, {"103": 5} if features is None else features, None, None, moment]


def event(item: object = 1, moment: object = 10, action: object = 0, features: object = None, user: object = 7) -> list:
    return [user, item, None, {"100": 1} if features is None else features, action, moment]


def parse(*lines: object, rules: Rules = RULES):
    return parser(rules).parse([x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines], 1)


def test_rejects_stop_past_the_limit_and_are_listed(tmp_path: Path) -> None:
    rejects = Rejects(1, tmp_path / "r.jsonl")
    rejects.add("seq.jsonl", 3, "item id 9 is outside 1..5")
    with pytest.raises(UserError, match=r"seq.jsonl:8: record 2 has 5 fields(.|\n)*--max_bad_lines") as stop:
        rejects.add("seq.jsonl", 8, "record 2 has 5 fields")
    assert len(str(stop.value).splitlines()) <= 3
    assert [json.loads(x) for x in rejects.path.read_text().splitlines()] == [
        {"file": "seq.jsonl", "line": 3, "reason": "item id 9 is outside 1..5"}
    ]
    assert rejects.count == 2 and rejects.by_reason["item id is outside"] == 1
    with pytest.raises(UserError, match="f:1: x"):
        Rejects(0, tmp_path / "none.jsonl").add("f", 1, "x")
    assert not (tmp_path / "none.jsonl").exists()
    with pytest.raises(UserError, match=r"f:1: x\.\nMend it, or take it out of the file; as many as the checkpoint was .*\(0\)") as stop:
        Rejects(0, tmp_path / "none.jsonl", kind="predict").add("f", 1, "x")
    assert "max_bad_lines" not in str(stop.value)


def test_a_plain_line_becomes_columns() -> None:
    chunk = parse(
        [event(3, 10), profile(features={"103": 5, "106": [1, 2], "110": []}), event(4, 11, 1)], [profile(8), event(5, 1, user=8)]
    )
    assert chunk.user_ids.tolist() == [7, 8] and chunk.counts.tolist() == [2, 1] and chunk.lines.tolist() == [1, 2]
    assert chunk.item_ids.tolist() == [3, 4, 5] and chunk.action_types.tolist() == [0, 1, 0] and chunk.timestamps.tolist() == [10, 11, 1]
    assert chunk.action_types.dtype == np.int8
    assert chunk.users.single.tolist() == [[5, 0, 0, 0], [5, 0, 0, 0]]
    assert chunk.users.multi["106"].counts.tolist() == [2, 0] and chunk.users.multi["106"].values.tolist() == [1, 2]
    assert chunk.items.ids.tolist() == [3, 4, 5] and chunk.items.single[:, 0].tolist() == [1, 1, 1]
    assert not chunk.rejects and not +chunk.tally


BAD_LINES = [
    (b"", "empty line"),
    (b"  ", "empty line"),
    (b'[[7,null,{"103":5},null', "cut off"),
    (b"nonsense]", "not JSON"),
    (b"\xef\xbb\xbf[]", "byte order mark"),
    (b"\xff\xfe[]", "not JSON"),
    (b"[" * 2000, "not JSON"),
    ([], "an empty list"),
    ({"a": 1}, "expected a list of records"),
    (3, "expected a list of records"),
    (None, "expected a list of records"),
    ([profile(), [7, 1, None, {}, 0]], "record 2 has 5 fields"),
    ([profile(), event() + [1]], "record 2 has 7 fields"),
    ([profile(), 5], "record 2 has int"),
    ([event()], "0 profile records"),
    ([profile(), profile(), event()], "2 profile records"),
    ([profile()], "no event"),
    ([profile(), event(0)], "item id 0 is outside 1..50"),
    ([profile(), event(51)], "item id 51 is outside 1..50"),
    ([profile(), event(-3)], "item id -3"),
    ([profile(), event(2**70)], "item id"),
    ([profile(), event(2**63)], "item id"),
    ([profile(), event("5")], "item id 5 is out of range or of the wrong type"),
    ([profile(), event(1.0)], "item id 1.0"),
    ([profile(), event(True)], "item id True"),
    ([profile(), event(action=3)], "action type 3 is outside 0..2"),
    ([profile(), event(action=-1)], "action type -1 is outside"),
    ([profile(), event(action=None)], "action type is None"),
    ([profile(), event(action=2**40)], "action type 1099511627776"),
    ([profile(), event(moment=None)], "timestamp is missing"),
    ([profile(), event(moment=1.5)], "timestamp is 1.5"),
    ([profile(), event(moment=2**70)], "timestamp is 1.18"),
    ([profile(), event(1, 20), event(2, 10)], "timestamp 10 comes before the one ahead of it, 20"),
    ([profile(0), event(user=0)], "user id 0 is outside 1..100"),
    ([profile(101), event(user=101)], "user id 101 is outside"),
    ([profile(-4), event(user=-4)], "user id -4"),
    ([profile("x"), event(user="x")], "user id 'x' is of type str"),
    ([profile(2**64 - 1), event(user=2**64 - 1)], "user id"),
    ([profile(), event(user=8)], "belongs to user '8'"),
    ([profile(features={"103": -1}), event()], "user feature 103 is -1"),
    ([profile(features={"103": 1.5}), event()], "user feature 103 is 1.5"),
    ([profile(features={"103": [1]}), event()], "user feature 103"),
    ([profile(features={"106": [1, -1]}), event()], "user feature 106 is -1"),
    ([profile(features=[1]), event()], "user_feat is of type list"),
    ([profile(), event(features={"100": 2**31})], "item feature 100 is 2147483648"),
    ([profile(), event(features={"100": True})], "item feature 100 is True"),
    ([profile(), event(features={"100": {}})], "item feature 100"),
    ([profile(), event(features=[1])], "item_feat is of type list"),
    ([profile(), event(features={"100": 2**64 - 1})], "item feature 100"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_line_is_rejected_with_its_reason_and_leaves_its_neighbours(line: object, reason: str) -> None:
    good = [profile(8), event(5, 1, user=8)]
    chunk = parse(good, line, [profile(9), event(6, 1, user=9)])
    assert [number for number, _ in chunk.rejects] == [2]
    assert reason in chunk.rejects[0][1]
    assert (
        chunk.user_ids.tolist() == [8, 9] and chunk.item_ids.tolist() == [5, 6] and chunk.lines.tolist() == [1, 3] and chunk.num_lines == 3
    )
    assert chunk.users.single[:, 0].tolist() == [5, 5]


def test_cold_null_and_unknown_feature_values_are_counted() -> None:
    chunk = parse(
        [profile(features={"103": None, "106": ["new", 3, None, 0], "105": "cold"}), event(features={"100": "x", "111": 4, "999": 1})]
    )
    assert (
        chunk.users.single.tolist() == [[0, 0, 0, 0]]
        and chunk.users.multi["106"].values.tolist() == [3]
        and chunk.users.multi["106"].counts.tolist() == [1]
    )
    assert chunk.tally == Counter({"cold: user feature 106": 1, "cold: user feature 105": 1, "cold: item feature 100": 1,
                                   "ignored: item feature '999' is not in the schema": 1})  # fmt: skip


def test_repairs_are_counted() -> None:
    rules = Rules("train", TENCENT_GR, 50, 100, public=True)
    chunk = parse([[7, None, None, None, None, None], [7, 1, {"103": 2}, None, None, 5]], rules=rules)
    assert chunk.action_types.tolist() == [0] and not chunk.rejects
    assert sum(chunk.tally.values()) == 4 and any("read as exposures" in k for k in chunk.tally)
    timeless = Rules("train", Schema(TENCENT_GR.features, has_time=False), 50, 100)
    assert parse([profile(), event(1, None), event(2, None)], rules=timeless).timestamps.tolist() == [0, 1]
    one = parse([profile(features={"106": 4}), event()])
    assert one.users.multi["106"].values.tolist() == [4] and one.tally == Counter(
        {"coerced: user feature 106: one value where the schema says a list": 1}
    )


def test_predict_takes_raw_users_unknown_items_and_odd_values() -> None:
    big = 2**64 - 5
    lines = [[event(big, 1, user="ab"), event("77", 2, user="ab"), event("ad-x", 3, user="ab")], [profile(5, {"103": -1, "104": 2.5})],
             [profile("u"), profile("u"), event(user="u")]]  # fmt: skip
    chunk = parse(*lines, rules=PREDICT)
    assert chunk.user_names == ["ab", 5, "u"] and chunk.counts.tolist() == [3, 0, 1] and not chunk.rejects
    assert chunk.item_ids[:2].tolist() == [big, 77] and chunk.odd_items == [(2, "ad-x")]
    assert chunk.users.single[1].tolist() == [0, 0, 0, 0]
    assert chunk.tally["coerced: users with no profile record, or more than one"] == 2
    assert parse([profile(5), event(-1, user=5)], rules=PREDICT).rejects[0][1].startswith("record 2: item id -1")


SORTED = "coerced: users whose events were out of order, sorted by time"
# Users to predict as (item, time); what is expected of them: items, times.
UNORDERED = [[(1, 5), (2, 5), (3, 6)], [(4, 9), (5, 7), (6, 9), (7, 7)], [(8, None), (9, 3), (10, None), (11, 4)],
             [(12, 8), (13, None), (14, 2)], [], [(15, None)]]  # fmt: skip
MENDED = [1, 2, 3, 5, 7, 4, 6, 8, 9, 10, 11, 14, 12, 13, 15], [5, 5, 6, 7, 7, 9, 9, 0, 3, 3, 4, 2, 8, 8, 0]


def test_users_to_predict_are_answered_whatever_their_times(tmp_path: Path) -> None:
    lines = [[profile(k), *(event(i, t, action=i % 2, user=k) for i, t in events)] for k, events in enumerate(UNORDERED, 1)]
    column = seq(*([(i, i % 2, t) for i, t in events] for events in UNORDERED))
    path = sequences(tmp_path, user_id=list(range(1, 7)), seq=column)
    (chunk,) = sources_parquet.read_sequences(path, PREDICT, SILENT)
    for found in (parse(*lines, rules=PREDICT), chunk):
        assert (found.item_ids.tolist(), found.timestamps.tolist()) == MENDED and not found.rejects
        assert found.counts.tolist() == [3, 4, 4, 3, 0, 1] and found.action_types.tolist() == [i % 2 for i in MENDED[0]]
        assert found.tally[SORTED] == 2 and found.tally[sources_jsonl.MISSING_TIMES] == 4
    (chunk,) = sources_parquet.read_sequences(path, RULES, SILENT)
    assert [row for row, _ in parse(*lines).rejects] == [row for row, _ in chunk.rejects] == [2, 3, 4, 5, 6]
    timeless = Rules("predict", Schema(TENCENT_GR.features, has_time=False), 50, 100)
    assert parse(*lines[:2], rules=timeless).timestamps.tolist() == [5, 5, 6, 9, 7, 9, 7]


def test_names_of_items_move_with_their_events() -> None:
    largest = str(2**64 - 1)  # a number, though an array holds the same for a name
    chunk = parse([profile(5), event("b", 9, user=5), event(largest, 8, user=5), event(3, 7, user=5), event("a", 9, user=5)], rules=PREDICT)
    assert chunk.odd_items == [(2, "b"), (3, "a")] and chunk.item_ids.tolist() == [3] + [2**64 - 1] * 3
    assert sorted(chunk.items.ids.tolist()) == [3, 2**64 - 1]


def test_differences_to_the_item_dictionary_are_counted_with_lists_too() -> None:
    schema = Schema((Feature("a", "item", "single"), Feature("b", "item", "multi")))
    known = KnownItems(
        np.array([[0], [1], [2], [0]], np.int32),
        np.array([False, True, True, False]),
        {"b": (np.array([0, 0, 2, 3, 3]), np.array([5, 6, 7], np.int32))},
    )
    line = [
        [1, None, {}, None, None, 0],
        [1, 1, None, {"a": 1, "b": [5, 6]}, 0, 1],
        [1, 1, None, {"a": 1, "b": [5, 8]}, 0, 1],
        [1, 2, None, {"a": 2}, 0, 1],
        [1, 2, None, {"a": 9, "b": [7]}, 0, 2],
        [1, 3, None, {"a": 4, "b": [9]}, 0, 3],
        [1, 3, None, {"a": 5}, 0, 3],
    ]
    chunk = LineParser(Rules("train", schema, 3, 5), known).parse([orjson.dumps(line)], 1)
    assert chunk.tally["differences: events whose item features differ from item_feat_dict.json"] == 3
    assert chunk.items.ids.tolist() == [3] and chunk.items.single.tolist() == [[4]] and chunk.items.multi["b"].values.tolist() == [9]


def test_every_byte_range_sees_its_lines_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [b"x" * n for n in (0, 3, 17, 1, 0, 40, 2)]
    for tail in (b"", b"\n"):
        path = tmp_path / "f"
        path.write_bytes(b"\n".join(lines) + tail)
        size = path.stat().st_size
        for block in (1, 5, 64):
            monkeypatch.setattr(sources_jsonl, "BLOCK_BYTES", block)
            for step in (1, 7, 16, 100):
                pieces = [(o, x) for s in range(0, size, step) for o, x in read_range(path, s, min(s + step, size))]
                assert [line for _, x in pieces for line in x] == lines
                assert all(path.read_bytes()[o:].startswith(b"\n".join(x)) for o, x in pieces)
    monkeypatch.setattr(sources_jsonl, "MAX_LINE_BYTES", 8)
    monkeypatch.setattr(sources_jsonl, "BLOCK_BYTES", 4)
    path.write_bytes(b"ab\n" + b"y" * 1000 + b"\ncd\n")
    assert [x for _, block in read_range(path, 0, 1008) for x in block] == [b"ab", b"", b"cd"]


def test_the_item_dictionary_is_read_in_pieces_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = {str(k): {"100": k, "x": 'tricky "}, \\"9\\": {" }' if k % 3 == 0 else "y"} for k in range(1, 40)}
    path = tmp_path / "item_feat_dict.json"
    for text in (json.dumps(items), json.dumps(items, indent=2), json.dumps(items, separators=(",", ":"))):
        path.write_text(text)
        for size in (40, 111, 1 << 20):
            monkeypatch.setattr(sources_workers, "RANGE_BYTES", size)
            chunks = list(sources_workers.read_item_dict(path, RULES, tmp_path, SILENT))
            assert np.concatenate([c.items.ids for c in chunks]).tolist() == list(range(1, 40))
            assert np.concatenate([c.items.single[:, 0] for c in chunks]).tolist() == list(range(1, 40))
    for text, message in (("[1, 2]", "expected an object"), (json.dumps(items)[:-30], "not JSON between bytes"), ("", "not JSON")):
        path.write_text(text)
        if text:
            with pytest.raises(UserError, match=message):
                list(sources_workers.read_item_dict(path, RULES, tmp_path, SILENT))
    path.write_text(json.dumps({"1": {"100": 3}, "51": {}, "x": {}, "2": [1], "3": {"100": -4}, "4": {"100": None}}))
    (chunk,) = sources_workers.read_item_dict(path, RULES, tmp_path, SILENT)
    assert chunk.items.ids.tolist() == [1, 4] and len(chunk.rejects) == 4


def known_folder(folder: Path, num_items: int) -> Path:
    """What ItemTable.share leaves where no item was read yet."""
    (folder / "items").mkdir(parents=True)
    ItemTable(ArrayFiles(folder / "items"), TENCENT_GR, np.arange(num_items + 1, dtype=np.uint64)).share(folder / "known")
    return folder / "known"


def test_processes_give_what_one_process_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(60, 200)
    write_jsonl(world, tmp_path)
    path, known = tmp_path / "seq.jsonl", known_folder(tmp_path / "first", 200)
    path.write_bytes(path.read_bytes() + b"broken\n")
    rules = Rules("train", TENCENT_GR, 200, 1000)
    monkeypatch.setattr(sources_workers, "RANGE_BYTES", path.stat().st_size // 3)
    alone, together = (list(sources_workers.read_sequences(path, rules, known, tmp_path, SILENT, workers=w)) for w in (0, 2))
    assert len(alone) == len(together) >= 3
    for a, b in zip(alone, together, strict=True):
        for name in sources_workers.COLUMNS:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert a.rejects == b.rejects and a.tally == b.tally and a.last_offset == b.last_offset and a.num_lines == b.num_lines
        np.testing.assert_array_equal(a.items.single, b.items.single)
        np.testing.assert_array_equal(a.users.multi["106"].values, b.users.multi["106"].values)
    assert sum(len(c.rejects) for c in alone) == 1 and alone[-1].last_offset == path.stat().st_size - 7
    assert not list(tmp_path.glob("*.npz"))
    (tmp_path / "bad.json").write_text("{" + '"1": {"100": 1}, ' * 40 + "}")
    with pytest.raises(UserError, match="not JSON between bytes"):
        list(sources_workers.read_item_dict(tmp_path / "bad.json", rules, tmp_path, SILENT, workers=1))


def mutate(line: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(10)
    place = rng.randrange(len(line))
    if kind == 0:
        return line[:place]
    if kind == 1:
        return b"\xef\xbb\xbf" + line
    if kind == 2:
        return line + b"\r"
    if kind == 3:
        return b"[" * rng.randrange(1, 3000) + line
    if kind == 4:
        return line.replace(b'"10', b'"10"10', 1) if rng.random() < 0.5 else b""
    if kind == 5:
        return (
            line[:place]
            + rng.choice([b"NaN", b"1e400", str(2**70).encode(), b"null", b"-1", b"\xff", b"true", b"{}", b'"s"'])
            + line[place + 1 :]
        )
    if kind == 6:
        tree = orjson.loads(line)
        record = rng.choice(tree)
        record[rng.randrange(6)] = rng.choice(
            [None, -1, 2**63, 2**64 - 1, 1.5, "s", [], {}, [[]], True, {"103": {"a": []}}, {"106": [None, "x", -2]}]
        )
        return orjson.dumps(tree)
    out = bytearray(line)
    for _ in range(rng.randrange(1, 4)):
        out[rng.randrange(len(out))] = rng.randrange(256) if kind < 9 else out[rng.randrange(len(out))]
    return bytes(out).replace(b"\n", b" ")


@pytest.mark.parametrize("rules", [RULES, PREDICT])
def test_mutated_lines_are_accepted_or_rejected_never_lost(rules: Rules) -> None:
    rng = random.Random(5)
    world = make_world(40, 50, mean_length=4)
    clean = [
        orjson.dumps([[7, None, u["features"], None, None, 0]] + [[7, i, None, world.items[i], a, t] for i, a, t in u["events"]])
        for u in world.users
    ]
    lines = [mutate(rng.choice(clean), rng) for _ in range(10_000)]
    accepted, rejected = 0, []
    for k in range(0, len(lines), 25):
        chunk = parser(rules).parse(lines[k : k + 25], k + 1)
        assert chunk.counts.sum() == len(chunk.item_ids) == len(chunk.timestamps) and len(chunk.users.single) == len(chunk.counts)
        accepted += len(chunk.counts)
        rejected += chunk.rejects
    assert accepted + len(rejected) == len(lines) and accepted > 100 and len(rejected) > 1000
    assert len({n for n, _ in rejected}) == len(rejected) and all(reason for _, reason in rejected)


# Parquet


def sequences(folder: Path, **columns: object) -> Path:
    kind = pa.list_(pa.struct([("item_id", pa.int64()), ("action_type", pa.int8()), ("timestamp", pa.int64())]))
    table = {
        "user_id": [1, 2],
        "seq": pa.array([[{"item_id": 3, "action_type": 0, "timestamp": 5}], [{"item_id": 4, "action_type": 1, "timestamp": 6}]], kind),
    }
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({k: v for k, v in (table | columns).items() if v is not None}), folder / "part-0.parquet")
    return folder / "part-0.parquet"


def seq(*users: object, item: pa.DataType = pa.int64(), moment: pa.DataType = pa.int64()) -> pa.Array:  # noqa: B008
    kind = pa.list_(pa.struct([("item_id", item), ("action_type", pa.int8()), ("timestamp", moment)]))
    return pa.array(
        [
            None if u is None else [None if e is None else dict(zip(("item_id", "action_type", "timestamp"), e, strict=True)) for e in u]
            for u in users
        ],
        kind,
    )


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (seq([(3, 0, 5)], [(99, 0, 5)]), "event 1: item id 99 is outside 1..50"),
        (seq([(3, 0, 5)], [(4, 0, 5), (0, 0, 5)]), "event 2: item id 0"),
        (seq([(3, 0, 5)], []), "no event"),
        (seq([(3, 0, 5)], None), "no event"),
        (seq([(3, 0, 5)], [None]), "item_id is null"),
        (seq([(3, 0, 5)], [(3, None, 5)]), "action_type is null"),
        (seq([(3, 0, 5)], [(3, 0, None)]), "timestamp is null"),
        (seq([(3, 0, 9)], [(3, 0, 5), (3, 0, 4)]), "event 2: timestamp 4 comes before"),
        (seq([(3, 0, 5)], [(3, 7, 5)]), "action type 7"),
        (seq([(3, 0, 5)], [(None, 0, 5)]), "item_id is null"),
    ],
)
def test_bad_parquet_rows_are_rejected(tmp_path: Path, column: pa.Array, reason: str) -> None:
    (chunk,) = sources_parquet.read_sequences(sequences(tmp_path, seq=column), RULES, SILENT)
    assert [row for row, _ in chunk.rejects] == [2] and reason in chunk.rejects[0][1]
    assert chunk.user_ids.tolist() == [1] and chunk.item_ids.tolist() == [3]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user_id": None}, "column 'user_id' is missing; it has seq"),
        ({"seq": None, "sequence": [1, 2]}, "column 'seq' is missing"),
        ({"seq": [1, 2]}, "column 'seq' is of type int64; expected list<struct"),
        ({"user_id": ["a", "b"]}, "column 'user_id' is of type string; expected whole numbers"),
        ({"user_id": [1.5, 2.0]}, "'user_id' is of type double"),
        ({"user_id": [True, False]}, "of type bool"),
        ({"seq": pa.array([[{"item_id": 3, "action_type": 1}]] * 2)}, "lack timestamp; found action_type, item_id"),
        ({"seq": seq([("x", 0, 1)], [], item=pa.string())}, "field 'item_id' is of type string"),
    ],
)
def test_parquet_schema_drifts_are_named(tmp_path: Path, columns: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as found:
        list(sources_parquet.read_sequences(sequences(tmp_path, **columns), RULES, SILENT))
    assert len(str(found.value).splitlines()) == 1


@pytest.mark.parametrize(
    "columns",
    [
        {"user_id": pa.array([1, 2], pa.uint8())},
        {"user_id": ["1", "2"]},
        {"user_id": [1.0, 2.0]},
        {"seq": seq([("3", 0, 5)], [("4", 1, 6)], item=pa.string())},
        {"seq": seq([(3, 0, 5)], [(4, 1, 6)], item=pa.int32(), moment=pa.float64())},
        {"seq": seq([(3, 0, 5)], [(4, 1, 6)]).cast(pa.large_list(seq().type.value_type))},
    ],
)
def test_retyped_parquet_columns_are_read_where_every_value_fits(tmp_path: Path, columns: dict) -> None:
    (chunk,) = sources_parquet.read_sequences(sequences(tmp_path, **columns), RULES, SILENT)
    assert chunk.user_ids.tolist() == [1, 2] and chunk.item_ids.tolist() == [3, 4] and chunk.timestamps.tolist() == [5, 6]
    retyped = any(isinstance(v, list) or "string" in str(v.type) or "double" in str(v.type) for v in columns.values())
    assert bool(+chunk.tally) == retyped


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    path = sequences(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"part-0.parquet: not readable as parquet"):
        list(sources_parquet.read_sequences(path, RULES, SILENT))


def read_rows(folder: Path, columns: dict, side: str = "user", rules: Rules = RULES) -> tuple:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / "part-0.parquet")
    tally: Counter = Counter()
    ((_, _, rows, rejects),) = sources_parquet.read_features([folder / "part-0.parquet"], side, rules, SILENT, tally)
    return rows, rejects, tally


def test_parquet_features(tmp_path: Path) -> None:
    rows, rejects, tally = read_rows(
        tmp_path,
        {
            "user_id": [1, 2, 3],
            "103": [4, None, 5],
            "106": [[1, 0, None, 2], None, []],
            "107": [3, None, 4],
            "zz": [1, 1, 1],
            "111": [1, 1, 1],
        },
    )
    assert rows.single.tolist() == [[4, 0, 0, 0], [0, 0, 0, 0], [5, 0, 0, 0]] and not rejects
    assert (
        rows.multi["106"].counts.tolist() == [2, 0, 0]
        and rows.multi["106"].values.tolist() == [1, 2]
        and rows.multi["107"].counts.tolist() == [1, 0, 1]
    )
    assert tally["ignored: user feature 'zz' is not in the schema"] == 1 and any("one value where" in k for k in tally)
    assert sum(k.startswith("missing: user feature") for k in tally) == 5  # 104, 105, 109, 108, 110
    rows, rejects, _ = read_rows(tmp_path, {"user_id": [1, 2, None, 0], "103": [4, -1, 2, 2]})
    assert rows.ids.tolist() == [1] and [r for r, _ in rejects] == [2, 3, 4] and "user feature 103 is -1" in rejects[0][1]
    rows, rejects, _ = read_rows(tmp_path, {"item_id": [50, 51], "100": [2**31, 1]}, "item")
    assert not len(rows.ids) and "2147483648" in rejects[0][1] and "outside 1..50" in rejects[1][1]
    rows, rejects, tally = read_rows(tmp_path, {"item_id": pa.array([2**64 - 3, 4], pa.uint64()), "100": [-1, 1]}, "item", PREDICT)
    assert rows.ids.tolist() == [2**64 - 3, 4] and rows.single[:, 0].tolist() == [0, 1] and not rejects
    with pytest.raises(UserError, match="column '100' is of type list"):
        read_rows(tmp_path, {"item_id": [1], "100": [[1]]}, "item")


def test_creative_ids_in_parquet_may_be_numbers_or_strings() -> None:
    tally: Counter = Counter()
    ids, null, odd = sources_parquet.creative_ids(pa.array(["12", None, "x1", str(2**64 - 9)]), "f", tally)
    assert ids.tolist() == [12, 0, 2**64 - 1, 2**64 - 9] and null.tolist() == [False, True, False, False] and odd == [(2, "x1")]
    with pytest.raises(UserError, match="holds -5"):
        sources_parquet.creative_ids(pa.array([-5, 3]), "f: column 'c'", tally)


# Layouts


def test_layouts_are_told_apart(tmp_path: Path) -> None:
    world = make_world(4, 5)
    a, b = write_jsonl(world, tmp_path / "a"), write_parquet(world, tmp_path / "b")
    assert find_source(a, "train").layout == "A" and find_source(b, "train").layout == "B"
    assert {p.name for p in find_source(a, "train").files} == {"seq.jsonl", "indexer.pkl", "item_feat_dict.json", "seq_offsets.pkl"}
    assert len(parts(b, "seq")) == 3
    (b / "seq" / "part-00000.parquet").rename(tmp_path / "one")
    for p in (b / "seq").iterdir():
        p.unlink()
    (b / "seq").rmdir()
    (tmp_path / "one").rename(b / "seq.parquet")
    assert parts(b, "seq") == [b / "seq.parquet"] and find_source(b, "train").layout == "B"


def test_missing_pieces_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such data folder"):
        find_source(tmp_path / "none", "train")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"none of seq.jsonl \(layout A\) and seq/"):
        find_source(empty, "train")
    world = make_world(4, 5)
    both = write_parquet(world, write_jsonl(world, tmp_path / "both"))
    with pytest.raises(UserError, match="both of seq.jsonl"):
        find_source(both, "train")
    a, b = write_jsonl(world, tmp_path / "a"), write_parquet(world, tmp_path / "b")
    (a / "indexer.pkl").unlink()
    with pytest.raises(UserError, match=r"indexer.pkl: missing"):
        find_source(a, "train")
    with pytest.raises(UserError, match="none of predict_seq.jsonl"):
        find_source(a, "predict")
    with pytest.raises(UserError, match="no candidates: neither predict_set.jsonl nor candidate/"):
        find_source(b, "predict")
    for p in (b / "item_feat").iterdir():
        p.unlink()
    with pytest.raises(UserError, match=r"item_feat/ \(or item_feat.parquet\) is missing"):
        find_source(b, "train")


def test_progress_counts_without_a_terminal() -> None:
    said: list[str] = []
    with Progress("reading", 10, "B", enabled=True, log=said.append) as progress:
        progress._last -= 60
        progress.update(5)
        progress.update(5)
    assert progress.done == 10 and said == ["reading: 5 of 10 B (50 %)"]


def test_feature_reader_order_is_the_schema_order() -> None:
    single, multi = FeatureReader(RULES, "item").columns([dict.fromkeys(reversed(ITEM_SINGLE), 3), {}], Counter())
    assert single.tolist() == [[3] * 13, [0] * 13] and multi == {}
    assert Ragged(np.array([1, 2]), np.array([5, 6, 7])).select(np.array([False, True])).values.tolist() == [6, 7]
