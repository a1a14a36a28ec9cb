"""The compiled readers of plain JSON: they give what orjson gives, and leave all else to it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from raw_worlds import make_world, write_jsonl
from test_sources import BAD_LINES, RULES, SILENT, event, known_folder, mutate, parser, profile

import sources_loops
import sources_workers
from schema import TENCENT_GR, Feature, Schema
from sources import FeatureRows, Rules, SeqChunk

sources_loops.start()
pytestmark = pytest.mark.skipif(sources_loops.compiled(wait=None) is None, reason="numba is not installed")


def as_bytes(*lines: object, **options: object) -> bytes:
    return b"".join((x if isinstance(x, bytes) else json.dumps(x, **options).encode()) + b"\n" for x in lines)


def same_rows(a: FeatureRows, b: FeatureRows) -> None:
    pairs = [(a.ids, b.ids), (a.single, b.single), *((a.multi[k][part], b.multi[k][part]) for k in b.multi for part in (0, 1))]
    for x, y in pairs:
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype
    assert list(a.multi) == list(b.multi)


def same(a: SeqChunk, b: SeqChunk) -> None:
    for name in sources_workers.COLUMNS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert getattr(a, name).dtype == getattr(b, name).dtype, name
    same_rows(a.users, b.users)
    same_rows(a.items, b.items)
    assert a.rejects == b.rejects and a.tally == b.tally and (a.num_lines, a.last_offset) == (b.num_lines, b.last_offset)
    assert a.odd_items == b.odd_items and a.user_names == b.user_names
    json.dumps([a.num_lines, dict(a.tally), a.rejects])  # plain values, as workers hand them over


def both(data: bytes, monkeypatch: pytest.MonkeyPatch, rules: Rules = RULES) -> tuple[SeqChunk, bool]:
    """The chunk, the same either way, and whether the loops took the bytes."""
    reader = parser(rules)
    reader.known.covered[[2, 5]], reader.known.single[2, 0] = True, 4
    taken, fast = reader._plain_lines(data, 3) is not None, reader.parse_block(data, 3)
    with monkeypatch.context() as patch:
        patch.setattr(sources_loops, "_loops", None)
        assert reader._plain_lines(data, 3) is None
        same(fast, reader.parse_block(data, 3))
    return fast, taken


FULL = {"103": 5, "104": 0, "106": [1, 0, 2], "107": [], "108": None, "110": ["new", None, 3]}
PLAIN = [
    [profile(), event()],
    [event(3, 10), profile(features=FULL), event(4, 11, 1, {"122": 2**31 - 1, "100": None, "102": "unseen", "111": 4, "121": 7})],
    [profile(features={}), event(2, 0, 2, {}), event(5, 0, 2, {"100": 4}), event(5, 0, 2, {"100": 3}), event(9, 5, 0, {"111": ["x", 3]})],
    [profile(moment=None), event()],
    [profile(8), event(user=8)],
    [profile()],  # those from here on are rejected, by rules that both ways share
    [profile(), event(0)],
    [profile(), event(51)],
    [profile(), event(action=3)],
    [profile(), event(1, 20), event(2, 10)],
    [profile(101), event(user=101)],
]


@pytest.mark.parametrize("options", [{}, {"separators": (",", ":")}])
def test_plain_lines_give_the_same_columns(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    for lines in ([line] for line in PLAIN):
        assert both(as_bytes(*lines, **options), monkeypatch)[1]
    data = as_bytes(*PLAIN, **options)
    chunk, taken = both(data, monkeypatch)
    assert taken and chunk.counts.tolist() == [1, 2, 4, 1, 1] and len(chunk.rejects) == 6 and chunk.rejects[0][0] == 8
    assert chunk.users.multi["106"].values.tolist() == [1, 2] and chunk.users.multi["110"].values.tolist() == [3]
    assert chunk.tally["cold: user feature 110"] == chunk.tally["cold: item feature 102"] == 1
    assert both(data[:-1], monkeypatch)[1]  # a last line without its end
    assert both(data.replace(b"\n", b" \t\r\n").replace(b"[", b"[ \t").replace(b"}", b" }"), monkeypatch)[1]


ODD = [
    [profile(), event(features={"100": 1, "999": 2})],  # not in the schema: counted by name
    [profile(features={"106": 4}), event()],
    [profile(), event(), event(features={"123456789": 1})],
    [event(features={"é": 1}), profile()],
    [event(), profile(features={"103": "é"})],
    [event(), profile(features={"103": "a\\b"})],
    [event(moment=10**18), profile()],
    [event(moment=-5), event(moment=0), profile()],
    b'[[7,null,{"103":1,"103":2},null,null,3],[7,1,null,{"100":1},0,3]]',
    b'[[7,null,{"106":[1],"106":[2,3]},null,null,3],[7,1,null,{"100":"a","100":2},0,3]]',
    b'[[7,null,{"103":1},{},0,3],[7,1,null,{"100":1},0,3]]',
    b'[[7,null,{"103":-0},null,null,3],[7,1,null,{"100":1},0,3]]',
    b'[[7,null,{"\\u0031":1},null,null,3],[7,1,null,{"100":1},0,3]]',
]
BROKEN = [
    b'[[07,null,{"103":1},null,null,3],[7,1,null,{"100":1},0,3]]',
    b'[[7,null,{"103":1},null,null,3],[7,1,null,{"100":1},0,3],]',
    b'[[7,null,{"103":1},null,null,3] [7,1,null,{"100":1},0,3]]',
    b'[[7,null,{"103":1,},null,null,3],[7,1,null,{"100":1},0,3]]',
    b'[[7,null,{"103" 1},null,null,3],[7,1,null,{"100":1},0,3]]',
    b'[[7,null,{"106":[1,]},null,null,3],[7,1,null,{"100":1},0,3]]',
    b'[[7,nul,{"103":1},null,null,3],[7,1,null,{"100":1},0,3]]',
    b'[[7,null,{"103":1},null,null,3],[7,1,null,{"100":1},0,3.0]]',
    b'[[7,null,{"103":1},null,null,3],[7,1,null,{"100":01},0,3]]',
    b'[[7,null,{"103":"a\x01"},null,null,3],[7,1,null,{"100":1},0,3]]',
    b'[[7,null,{"103":"\xff"},null,null,3],[7,1,null,{"100":1},0,3]]',
    b'[[7,null,{"103":1},null,null,3],[7,1,null,{"100":1},0,3]]]',
    b'[[7,null,{"103":1},null,null,3],[7,1,null,{"100":1},0,3]]\x00',
]


@pytest.mark.parametrize("line", [*ODD, *BROKEN, *(line for line, _ in BAD_LINES)], ids=lambda line: str(line)[:60])
def test_all_else_is_left_to_orjson(line: object, monkeypatch: pytest.MonkeyPatch) -> None:
    data = as_bytes(*PLAIN[:2], line, PLAIN[2])
    chunk, taken = both(data, monkeypatch)
    assert not taken or line in PLAIN or any("outside" in r or "before" in r or "no event" in r for _, r in chunk.rejects)
    if line in BROKEN:
        assert [number for number, _ in chunk.rejects] == [5]
    both(as_bytes(line), monkeypatch)


def test_a_line_cut_anywhere_or_changed_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    line, rng = as_bytes(PLAIN[1], separators=(",", ":"))[:-1], random.Random(0)
    for end in range(len(line)):
        assert not both(line[:end] + b"\n", monkeypatch)[1]
    for trial in range(1500):
        changed = bytearray(line)
        for _ in range(rng.randint(1, 2)):
            place, how = rng.randrange(len(changed)), rng.randrange(3)
            changed[place : place + (how != 1)] = b"" if how == 0 else bytes([rng.choice(b'0179-.e,:[]{}"\\ nul\t\x00\x7f\x80')])
        both(as_bytes(PLAIN[0], bytes(changed).replace(b"\n", b" "), PLAIN[2]), monkeypatch)
        both(as_bytes(mutate(line, rng).replace(b"\n", b" "), PLAIN[trial % len(PLAIN)]), monkeypatch)


def test_schemas_of_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    user = event(1, 1, 0, {"colour": 3, "tags": [4, 5]}, 7)
    features = (Feature("colour", "item", "single"), Feature("tags", "item", "multi"))
    chunk, taken = both(as_bytes([profile(features={}), user]), monkeypatch, Rules("train", Schema(features), 50, 100))
    assert taken and chunk.items.multi["tags"].values.tolist() == [4, 5] and chunk.users.single.shape == (1, 0)
    for name in ("a name that is long", "é", 'a"b', "a\\b"):
        schema = Schema((*features, Feature(name, "user", "single")))
        assert not both(as_bytes([profile(features={name: 3}), user]), monkeypatch, Rules("train", schema, 50, 100))[1]
    assert not both(as_bytes(PLAIN[0]), monkeypatch, Rules("predict", TENCENT_GR, 50, 100))[1]


@pytest.mark.parametrize("kind", ["train", "predict"])
@pytest.mark.parametrize(("text", "taken"), [
    ('{"1":{"100":3},"50":{},"3":{"111":1,"100":"x","122":null}}', True), ('{"1" : {"100" : 3} , "2" : { } }\n', True),
    (' {"1":{}}', True), ("{}", False), ('\n{"1":{}}', False), ('{"1":{},\n"2":{}}', False), ('{"1":{}}{}', False), ('{"1":{}} x', False),
    ('{"1":{"100":1},"2":{},"1":{"100":2}}', False), ('{"01":{},"1":{"100":1}}', False), ('{"0":{},"51":{},"2":{"100":1}}', False),
    ('{"x":{},"1":[1],"3":{"100":-4},"4":{"100":2}}', False), ('{"1":{"5":1}}', False), ('{"1":{},}', False), ("[1]", False), ("", False),
])  # fmt: skip
def test_items_give_the_same(text: str, taken: bool, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = Rules(kind, TENCENT_GR, 50, 100)
    path = tmp_path / "item_feat_dict.json"
    path.write_text(text)
    reader = sources_workers._Reader({"rules": rules.to_dict(), "known": None})
    if not (kind == "predict" and '"51"' in text):  # a creative id there
        assert (reader._plain_items(text.encode()) is not None) == taken
    results = []
    for loops in (sources_loops.compiled(), None):
        monkeypatch.setattr(sources_loops, "_loops", loops)
        try:
            results.append(list(sources_workers.read_item_dict(path, rules, tmp_path, SILENT)))
        except ValueError as error:
            results.append(str(error))
    fast, slow = results
    if isinstance(slow, str):
        assert fast == slow
    else:
        for a, b in zip(fast, slow, strict=True):
            same(a, b)


def test_processes_serve_one_file_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(make_world(60, 200), tmp_path)
    rules, items, path = Rules("train", TENCENT_GR, 200, 1000), tmp_path / "item_feat_dict.json", tmp_path / "seq.jsonl"
    known = known_folder(tmp_path / "first", 200)
    for name, value in (("PARALLEL_BYTES", 0), ("COMPILED_BYTES", 0), ("RANGE_BYTES", path.stat().st_size // 3)):
        monkeypatch.setattr(sources_workers, name, value)
    workers = sources_workers.Workers()
    try:
        processes = workers.start(path.stat().st_size)
        found = [list(sources_workers.read_item_dict(items, rules, tmp_path, SILENT, workers=workers))]
        found.append(list(sources_workers.read_sequences(path, rules, known, tmp_path, SILENT, workers=workers)))
        assert all(process.poll() is None for process in processes)
    finally:
        workers.close()
    assert all(process.poll() is not None for process in processes)
    alone = [list(sources_workers.read_item_dict(items, rules, tmp_path, SILENT, workers=0))]
    alone.append(list(sources_workers.read_sequences(path, rules, known, tmp_path, SILENT, workers=0)))
    for a, b in zip(found, alone, strict=True):
        for x, y in zip(a, b, strict=True):
            same(x, y)


def test_processes_end_when_a_file_is_bad_or_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(make_world(60, 200), tmp_path)
    rules, path = Rules("train", TENCENT_GR, 200, 1000), tmp_path / "seq.jsonl"
    monkeypatch.setattr(sources_workers, "RANGE_BYTES", path.stat().st_size // 8)
    monkeypatch.setattr(sources_workers, "PARALLEL_BYTES", 0)
    workers = sources_workers.Workers()
    processes = workers.start(path.stat().st_size)
    next(chunks := sources_workers.read_sequences(path, rules, known_folder(tmp_path / "f", 200), tmp_path, SILENT, workers=workers))
    chunks.close()
    workers.close()
    assert processes == [] or all(process.poll() is not None for process in processes)
    processes = workers.start(path.stat().st_size)
    processes[0].kill()
    processes[0].wait()
    with pytest.raises(RuntimeError, match="died"):
        list(sources_workers.read_sequences(path, rules, tmp_path / "f" / "known", tmp_path, SILENT, workers=workers))
    workers.close()
    assert all(process.poll() is not None for process in processes)
