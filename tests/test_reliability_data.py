"""docs/RELIABILITY.md, rows 7 and 8: ten thousand mutated lines and thirty schema drifts, read as a user's data is, through open_store."""

from __future__ import annotations

import json
import pickle
import random
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_worlds import CREATIVE, World, make_predict_world, make_world, write_jsonl, write_parquet
from reliability_world import rounds

import sources_loops
from errors import UserError
from store import Store, content_hash, open_store

pytestmark = pytest.mark.reliability
MUTATIONS = (
    "flip",
    "flips",
    "cut",
    "nested",
    "deep",
    "NaN",
    "2^70",
    "duplicate key",
    "not UTF-8",
    "BOM",
    "CRLF",
    "empty",
    "insert",
    "retype",
    "shuffle",
    "join",
)
LITERALS = [
    b"NaN",
    b"-Infinity",
    b"1e400",
    str(2**70).encode(),
    b"-1",
    b"\xff",
    b"true",
    b"null",
    b"{}",
    b'"s"',
    b"\x00",
    b"1.5",
    b"\\ud800",
]
VALUES = [None, -1, 2**63, 2**64 - 1, 1.5, "s", "", [], {}, [[]], True, {"103": {"a": []}}, {"106": [None, "x", -2]}, {"106": [[1]]}]


def mutate(line: bytes, kind: str, chance: random.Random) -> bytes:
    """A line made wrong, or odd; never with a line end inside."""
    place, out = chance.randrange(len(line)), bytearray(line)
    if kind in ("flip", "flips"):
        for _ in range(1 if kind == "flip" else chance.randrange(2, 9)):
            out[chance.randrange(len(out))] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        out = out[:place]
    elif kind in ("nested", "deep"):
        depth = chance.randrange(1, 1500) if kind == "nested" else chance.choice([1023, 1025, 100_000])
        opening, closing = chance.choice([(b"[", b"]"), (b'{"a":', b"}")])
        out = opening * depth + (line if chance.random() < 0.5 else b"1") + (closing * depth if chance.random() < 0.5 else b"")
    elif kind in ("NaN", "2^70", "insert"):
        literal = {"NaN": b"NaN", "2^70": str(2**70).encode()}.get(kind) or chance.choice(LITERALS)
        numbers = [k for k in range(len(line)) if line[k : k + 1].isdigit()]
        place = chance.choice(numbers) if kind != "insert" else place
        out = line[:place] + literal + line[place + 1 :]
    elif kind == "duplicate key":
        out = line.replace(b'{"', b'{"103": 7, "103": 8, "', 1)
    elif kind == "not UTF-8":
        out = line[:place] + chance.choice([b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf0\x9f"]) + line[place:]
    elif kind == "BOM":
        out = b"\xef\xbb\xbf" + line
    elif kind == "CRLF":
        out = line + b"\r"
    elif kind == "empty":
        out = chance.choice([b"", b" ", b"\t", b"[]", b"[[]]", b"{}", b"null", b"0", b'""'])
    elif kind == "join":
        out = line + chance.choice([b"", b",", b" "]) + line
    else:
        tree = orjson.loads(line)
        if kind == "shuffle":
            chance.shuffle(tree)
        else:
            record = chance.choice(tree)
            record[chance.randrange(6)] = chance.choice(VALUES)
            if chance.random() < 0.1:
                record.append(None)
        out = orjson.dumps(tree)
    return bytes(out).replace(b"\n", b" ")


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail rather than hang."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def mixed_lines(world: World, folder: Path, name: str, count: int) -> tuple[list[bytes], list[bool]]:
    """count mutated lines of the world's and every line as it is, in random order, written to folder/name; and which are as they are."""
    chance = random.Random(7)
    clean = (folder / f"{name}.jsonl").read_bytes().splitlines()
    wrong = [mutate(chance.choice(clean), MUTATIONS[k % len(MUTATIONS)], chance) for k in range(count)]
    both = [(line, False) for line in wrong] + [(line, True) for line in clean]
    chance.shuffle(both)
    # A mutation may leave a user's line right; the first of a user counts, so the clean ones come first where that matters (train).
    if name == "seq":
        both = sorted(both, key=lambda pair: not pair[1])
        kept, rest = both[: len(clean) // 2], both[len(clean) // 2 :]
        chance.shuffle(rest)
        both = kept + rest
    (folder / f"{name}.jsonl").write_bytes(b"".join(line + b"\n" for line, _ in both))
    (folder / f"{name}_offsets.pkl").unlink()
    return [line for line, _ in both], [is_clean for _, is_clean in both]


def listed(store: Store) -> list[dict]:
    return [json.loads(line) for line in Path(store.summary["rejects_file"]).read_text().splitlines()]


@pytest.mark.parametrize(
    ("count", "way"),
    [
        pytest.param(400, "orjson", marks=pytest.mark.fast),
        *[(rounds(10_000, 0)[1], way) for way in ("loops", "orjson", "processes")],
    ],
)
def test_mutated_lines_are_accepted_or_rejected_with_line_and_reason(tmp_path, count, way, monkeypatch):
    """Row 7, training data: accepted + rejected = lines, and what stands between mutated lines is taken as it is."""
    sources_loops.start()
    if sources_loops.compiled(wait=None) is None and way == "loops":
        pytest.skip("numba is not installed")
    if way == "processes":
        monkeypatch.setattr("sources_workers.PARALLEL_BYTES", 0)
        monkeypatch.setattr("sources_workers.RANGE_BYTES", 1 << 19)
    if way != "loops":
        monkeypatch.setattr(sources_loops, "compiled", lambda **_: None)
    world = make_world(400, 60, mean_length=4)
    folder = write_jsonl(world, tmp_path / "a")
    lines, clean = mixed_lines(world, folder, "seq", count)
    with within(300):
        store = open_store(folder, tmp_path / "cache", max_bad_lines=len(lines), progress=False, log=lambda _: None)
    rejects = listed(store)
    assert store.num_users + len(rejects) == len(lines) and store.summary["rejected"] == len(rejects)
    assert len({reject["line"] for reject in rejects}) == len(rejects) and all(
        1 <= r["line"] <= len(lines) and r["reason"] for r in rejects
    )
    assert not [reject for reject in rejects if clean[reject["line"] - 1] and "comes twice" not in reject["reason"]]
    first_half = {json.loads(line)[0][0] for line, is_clean in zip(lines[:200], clean[:200], strict=True) if is_clean}
    users = {user["id"]: user for user in world.users}
    for row, user in enumerate(store.user_ids.tolist()):
        if user in first_half:
            begin, end = store.user_offsets[row : row + 2]
            assert store.item_ids[begin:end].tolist() == [event[0] for event in users[user]["events"]]
            assert store.timestamps[begin:end].tolist() == [event[2] for event in users[user]["events"]]
    assert first_half <= set(store.user_ids.tolist()) and len(first_half) == 200
    assert int(store.user_offsets[-1]) == store.num_events == len(store.item_ids)
    assert store.item_ids.min() >= 1 and store.item_ids.max() <= 60


def test_the_three_ways_agree_on_mutated_lines(tmp_path, monkeypatch):
    """Row 7: which of the readers takes a block changes neither a value nor a reject."""
    world, found = make_world(400, 60, mean_length=4), {}
    folder = write_jsonl(world, tmp_path / "a")
    lines, _ = mixed_lines(world, folder, "seq", 1600)
    sources_loops.start()
    if sources_loops.compiled(wait=None) is None:
        pytest.skip("numba is not installed")
    for way in ("loops", "orjson", "processes"):
        with monkeypatch.context() as patch:
            if way == "processes":
                patch.setattr("sources_workers.PARALLEL_BYTES", 0)
                patch.setattr("sources_workers.RANGE_BYTES", 1 << 16)
            if way != "loops":
                patch.setattr(sources_loops, "compiled", lambda **_: None)
            store = open_store(folder, tmp_path / way, max_bad_lines=len(lines), progress=False, log=lambda _: None)
        found[way] = content_hash(store), listed(store), store.summary["coerced"], store.summary["cold"]
    assert found["loops"] == found["orjson"] == found["processes"]


@pytest.mark.parametrize("count", rounds(10_000, 400))
def test_mutated_users_to_predict_are_accepted_or_rejected(tmp_path, count):
    """Row 7, EVAL_DATA_PATH: the same, with ids and values that training would refuse."""
    world = make_predict_world(make_world(100, 60, mean_length=4), 300)
    folder = write_jsonl(world, tmp_path / "a", predict=True)
    lines, clean = mixed_lines(world, folder, "predict_seq", count)
    with within(300):
        store = open_store(folder, tmp_path / "cache", kind="predict", max_bad_lines=len(lines), progress=False, log=lambda _: None)
    rejects = listed(store)
    assert store.num_users + len(rejects) == len(lines)
    assert len({reject["line"] for reject in rejects}) == len(rejects) and all(reject["reason"] for reject in rejects)
    assert not [reject for reject in rejects if clean[reject["line"] - 1]]
    assert len(store.raw_user_ids) == store.num_users and store.item_ids.min() >= 1


@pytest.mark.parametrize("kind", ["BOM", "CRLF", "no last line end", "one line of 70 MB", "UTF-16", "NUL bytes", "empty", "one line end"])
def test_a_whole_file_that_is_odd(tmp_path, kind):
    """Row 7: what an editor, a copy or a crash makes of a file."""
    world = make_world(40, 60, mean_length=4)
    folder = write_jsonl(world, tmp_path / "a")
    path = folder / "seq.jsonl"
    data = path.read_bytes()
    odd = {
        "BOM": b"\xef\xbb\xbf" + data,
        "CRLF": data.replace(b"\n", b"\r\n"),
        "no last line end": data.rstrip(b"\n"),
        "UTF-16": data.decode().encode("utf-16"),
        "one line of 70 MB": b"[" * 70_000_000 + b"\n" + data,
        "NUL bytes": data + b"\0" * 5000,
        "empty": b"",
        "one line end": b"\n",
    }
    path.write_bytes(odd[kind])
    said: list[str] = []

    def opened(limit: int) -> Store:
        with within(60):
            return open_store(folder, tmp_path / "cache", max_bad_lines=limit, progress=False, log=said.append)

    if kind in ("CRLF", "no last line end"):
        assert opened(0).num_users == 40
        return
    with pytest.raises(UserError) as stop:
        opened(0)
    assert str(path) in str(stop.value) and len(str(stop.value).splitlines()) <= 3
    if kind in ("BOM", "one line of 70 MB", "NUL bytes"):
        assert opened(1).num_users == (40 if kind != "BOM" else 39)


# ---- row 8: drifts of the schema ----------------------------------------------------------------------------------------


class Drift:
    """Data in parquet, with embedding 81 and candidates, and the ways to change it."""

    def __init__(self, folder: Path) -> None:
        train = make_world(40, 60, mean_length=6)
        self.train, self.predict = (
            write_parquet(train, folder / "train"),
            write_parquet(make_predict_world(train, 20), folder / "eval", predict=True),
        )
        rng = np.random.default_rng(0)
        vectors = rng.normal(size=(60, 32)).astype(np.float32)
        for data in (self.train, self.predict):
            (data / "mm_emb/emb_81_32_parquet").mkdir(parents=True)
            table = pa.table(
                {"anonymous_cid": [CREATIVE + k for k in range(1, 61)], "emb": pa.array(vectors.tolist(), pa.list_(pa.float32()))}
            )
            pq.write_table(table, data / "mm_emb/emb_81_32_parquet/part-0.parquet")

    def open(self, folder: Path, cache: Path, said: list[str]) -> Store:
        kind = "predict" if folder == self.predict else "train"
        return open_store(folder, cache, kind=kind, embeddings=("81",), max_bad_lines=0, progress=False, log=said.append)


def table(folder: Path, name: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change every part of one of the data's tables."""
    for path in sorted((folder / name).rglob("*.parquet")):
        pq.write_table(change(pq.read_table(path)), path)


def column(name: str, make: Callable[[pa.ChunkedArray], object]) -> Callable[[pa.Table], pa.Table]:
    """Another content of one column."""
    return lambda t: t.set_column(t.column_names.index(name), name, make(t[name].combine_chunks()))


def drop(name: str) -> Callable[[pa.Table], pa.Table]:
    return lambda t: t.drop_columns([name])


def rename(name: str, new: str) -> Callable[[pa.Table], pa.Table]:
    return lambda t: t.rename_columns([new if n == name else n for n in t.column_names])


def first(value: object, kind: pa.DataType | None = None) -> Callable[[pa.Array], pa.Array]:
    """The column with another first value."""
    return lambda c: pa.array([value, *c.to_pylist()[1:]], kind or c.type)


def text(c: pa.Array) -> pa.Array:
    return pa.array([None if v is None else str(v) for v in c.to_pylist()])


def mixed(c: pa.Array) -> pa.Array:
    """Ids as text, one of which is no number."""
    return pa.array(["creative-x", *[str(v) for v in c.to_pylist()[1:]]])


def events(**changes: Callable) -> Callable[[pa.Table], pa.Table]:
    """Other events: {field: function of its value}; None leaves the field out."""

    def change(c: pa.Array) -> pa.Array:
        rows = [
            [{k: changes.get(k, lambda v: v)(v) for k, v in e.items() if changes.get(k, 0) is not None} for e in u] for u in c.to_pylist()
        ]
        kind = next((f.type for f in c.type.value_type if f.name == "item_id"), None)
        if "item_id" not in changes:  # 64-bit ids need their own type
            types = pa.array([[{k: v for k, v in e.items() if k != "item_id"} for e in u] for u in rows]).type.value_type
            return pa.array(rows, pa.list_(pa.struct([("item_id", kind), *[(f.name, f.type) for f in types]])))
        return pa.array(rows)

    return column("seq", change)


def indexer(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "indexer.pkl"
    path.write_bytes(pickle.dumps(change(pickle.loads(path.read_bytes()))))


EMB = "mm_emb/emb_81_32_parquet"
# what, train or eval, which table, change
DRIFTS = [
    ("seq without user_id", "train", "seq", drop("user_id"), "error: column 'user_id' is missing"),
    ("seq renamed", "train", "seq", rename("seq", "sequence"), "error: column 'seq' is missing"),
    ("seq as text", "train", "seq", column("seq", text), "error: is of type string; expected list<struct"),
    ("seq without action_type", "train", "seq", events(action_type=None), "error: lack action_type"),
    ("seq without timestamp", "train", "seq", events(timestamp=None), "error: lack timestamp"),
    ("item ids as text in seq", "train", "seq", events(item_id=str), "coerced: .*'item_id' is of type string, read as whole numbers"),
    (
        "item ids half text in seq",
        "train",
        "seq",
        events(item_id=lambda v: f"x{v}" if v % 2 else str(v)),
        "error: 'item_id' is of type string",
    ),
    ("item ids as floats in seq", "train", "seq", events(item_id=float), "coerced: .*'item_id' is of type double"),
    ("item ids with a fraction", "train", "seq", events(item_id=lambda v: v + 0.5), "error: 'item_id' is of type double"),
    ("item ids out of range", "train", "seq", events(item_id=lambda v: v + 55), r"error: :1: event 1: item id \d+ is outside 1..60"),
    ("item ids null", "train", "seq", events(item_id=lambda v: None if v == 7 else v), r"error: :\d+: item_id is null in an event"),
    ("actions as text", "train", "seq", events(action_type=lambda v: ["view", "click"][v]), "error: 'action_type' is of type string"),
    ("actions out of range", "train", "seq", events(action_type=lambda v: v + 5), "error: action type 6 is outside"),
    (
        "timestamps as dates",
        "train",
        "seq",
        events(timestamp=lambda v: datetime.fromtimestamp(v, UTC)),
        r"coerced: .*is of type timestamp\[us.*\], read as seconds since 1970",
    ),
    ("timestamps as text", "train", "seq", events(timestamp=str), "coerced: .*'timestamp' is of type string"),
    ("timestamps null", "train", "seq", events(timestamp=lambda v: None if v % 3 else v), "error: timestamp is null"),
    ("user ids out of range", "train", "seq", column("user_id", first(10_000)), "error: user id 10000 is outside 1..80"),
    ("user ids twice", "train", "seq", column("user_id", lambda c: pa.array([c[0].as_py()] * len(c))), r"error: user \d+ comes twice"),
    ("user_feat without user_id", "train", "user_feat", drop("user_id"), "error: column 'user_id' is missing"),
    ("user_feat without a feature", "train", "user_feat", drop("103"), "missing: user feature 103 has no column"),
    ("user_feat with another feature", "train", "user_feat", rename("103", "999"), "ignored: user feature '999' is not in the schema"),
    ("user feature as text", "train", "user_feat", column("103", text), "coerced: .*'103' is of type string"),
    ("user feature negative", "train", "user_feat", column("103", first(-5)), "error: user feature 103 is -5"),
    ("user feature null", "train", "user_feat", column("103", lambda c: pa.nulls(len(c))), "missing: user feature 103 is null in all"),
    (
        "user feature a list",
        "train",
        "user_feat",
        column("103", lambda c: pa.array([[v] for v in c.to_pylist()])),
        "error: '103' is of type list",
    ),
    (
        "user list a number",
        "train",
        "user_feat",
        column("106", lambda c: pa.array([v[0] if v else None for v in c.to_pylist()])),
        "coerced: .*'106': one value where",
    ),
    ("user list of text", "train", "user_feat", column("106", lambda c: pa.array([["a"] for _ in c])), "error: '106' is of type string"),
    ("item_feat without item_id", "train", "item_feat", drop("item_id"), "error: 'item_id' is missing"),
    (
        "item_feat ids out of range",
        "train",
        "item_feat",
        column("item_id", lambda c: pa.array([v + 5 for v in c.to_pylist()])),
        "error: item id 61 is outside 1..60",
    ),
    ("item feature bool", "train", "item_feat", column("100", lambda c: pa.array([True] * len(c))), "error: '100' is of type bool"),
    (
        "item feature float",
        "train",
        "item_feat",
        column("100", lambda c: pa.array([float(v or 0) for v in c.to_pylist()])),
        "coerced: .*'100' is of type double",
    ),
    ("item feature too large", "train", "item_feat", column("100", first(2**40, pa.int64())), "error: item feature 100 is 1099511627776"),
    ("indexer a list", "train", "indexer", lambda tree: [tree], "error: found list"),
    ("indexer without items", "train", "indexer", lambda tree: {"u": tree["u"], "f": tree["f"]}, "error: found keys 'u', 'f'"),
    (
        "indexer with text numbers",
        "train",
        "indexer",
        lambda tree: tree | {"i": {k: str(v) for k, v in tree["i"].items()}},
        "error: is '1'; expected a number",
    ),
    (
        "indexer with a number twice",
        "train",
        "indexer",
        lambda tree: tree | {"i": dict.fromkeys(tree["i"], 1)},
        "error: number 1 to 60 raw ids",
    ),
    ("indexer of text ids", "train", "indexer", lambda tree: tree | {"i": {str(k): v for k, v in tree["i"].items()}}, "same"),
    ("indexer with null", "train", "indexer", lambda tree: tree | {"u": tree["u"] | {"x": None}}, "error: is 'None'"),
    (
        "embedding of another width",
        "train",
        EMB,
        column("emb", lambda c: pa.array([v[:31] for v in c.to_pylist()])),
        "error: have 31 values; the schema says 32",
    ),
    (
        "one vector of another width",
        "train",
        EMB,
        column("emb", lambda c: pa.array([v[: 31 + (k != 3)] for k, v in enumerate(c.to_pylist())])),
        "error: :4: emb has 31 values",
    ),
    ("embedding column renamed", "train", EMB, rename("emb", "embedding"), "error: column 'emb' is missing"),
    ("embedding of text ids", "train", EMB, column("anonymous_cid", text), "same"),
    ("embedding of mixed ids", "train", EMB, column("anonymous_cid", mixed), "embedding 81: .*59 covered, 1 unknown"),
    (
        "embedding with NaN",
        "train",
        EMB,
        column("emb", lambda c: pa.array([[float("nan")] * 32, *c.to_pylist()[1:]])),
        r"error: :1: emb\[0\] is nan",
    ),
    ("embedding as JSON text", "train", EMB, column("emb", lambda c: pa.array([json.dumps(v) for v in c.to_pylist()])), "same"),
    ("embedding of bool", "train", EMB, column("emb", lambda c: pa.array([[True] * 32 for _ in c])), "error: of type list<element: bool>"),
    ("embedding null", "train", EMB, column("emb", lambda c: pa.array([None, *c.to_pylist()[1:]])), "embedding 81: .*1 missing"),
    ("candidates without creative_id", "eval", "candidate", drop("creative_id"), "error: 'creative_id' is missing"),
    ("candidates of mixed ids", "eval", "candidate", column("creative_id", mixed), "candidates: unknown in training: 20"),
    ("candidate features plain text", "eval", "candidate", column("100", lambda c: pa.array(["a"] * len(c))), "error: '100' is string"),
    (
        "candidate features plain numbers",
        "eval",
        "candidate",
        column("100", lambda c: pa.array([1] * len(c))),
        "differences: candidates whose features differ from the item's: 50",
    ),
    (
        "candidates without retrieval_id",
        "eval",
        "candidate",
        drop("retrieval_id"),
        "candidates: missing: retrieval ids, numbered by row instead: 50",
    ),
    ("item ids as text to predict", "eval", "seq", events(item_id=str), "same"),
    ("actions null to predict", "eval", "seq", events(action_type=lambda v: None), "coerced: missing action types"),
]


# These passed in silence, or meant something else, until this check was written.
ONCE_SILENT = ("timestamps as dates", "user feature null", "candidates without retrieval_id")
assert len({what for what, *_ in DRIFTS}) == len(DRIFTS) >= 30


@pytest.fixture(scope="module")
def undrifted(tmp_path_factory) -> dict[str, str]:
    """Content hashes of the data as it should be."""
    folder = tmp_path_factory.mktemp("undrifted")
    drift = Drift(folder)
    return {
        which: content_hash(drift.open(data, folder / "cache", [])) for which, data in (("train", drift.train), ("eval", drift.predict))
    }


@pytest.mark.parametrize(
    ("what", "which", "name", "change", "expected"),
    [pytest.param(*row, id=row[0], marks=[pytest.mark.fast] if row[0] in ONCE_SILENT else []) for row in DRIFTS],
)
def test_a_drift_is_an_error_or_a_listed_coercion(tmp_path, undrifted, what, which, name, change, expected):
    """Row 8. "same": a form that the formats allow, which gives the very same store."""
    drift, said = Drift(tmp_path), []
    folder = drift.train if which == "train" else drift.predict
    if name == "indexer":
        indexer(folder, change)
    else:
        table(folder, name, change)
    if expected.startswith("error: "):
        with pytest.raises(UserError) as stop:
            drift.open(folder, tmp_path / "cache", said)
        line, *remedy = str(stop.value).splitlines()
        assert str(folder) in line and re.search(expected.removeprefix("error: "), line) and len(remedy) <= 1, str(stop.value)
        return
    store = drift.open(folder, tmp_path / "cache", said)
    if expected == "same":
        assert content_hash(store) == undrifted[which] and store.embedding("81").matrix.shape == (61, 32)
    else:
        assert re.search(expected, "\n".join(said)), said
    if what == "timestamps as dates":
        assert content_hash(store) == undrifted[which]
