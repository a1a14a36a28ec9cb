"""Vectors of every form give one and the same matrix; rows that cannot be used are named and counted."""

import errno
import json
import os
import pickle
import random

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import multimodal
from errors import RunError, UserError
from multimodal import compile_embedding, find_embedding
from schema import TENCENT_GR, Feature
from sources import Rejects

WIDTH = 4
FEATURE = Feature("82", "item", "embedding", width=WIDTH)
NUM_ITEMS = 6
# Creative ids: 1000 + item id for items 1..6, above them no item's. In an order that is not the items', without item 2, one twice.
IDS = [1003, 1001, 9999, 1006, 1003, 2**63 + 5, 1004]
VECTORS = np.array([[i + 0.1, -i, 0.25 * i, 0] for i in range(1, 8)], dtype=np.float32)
COUNTS = {"rows": 7, "covered": 4, "unknown": 2, "missing": 0, "duplicate": 1, "rejected": 0}


def lookup(ids: list) -> np.ndarray:
    assert type(ids) is list and all(type(i) in (int, str) for i in ids)
    return np.array([i - 1000 if type(i) is int and 1000 < i <= 1000 + NUM_ITEMS else 0 for i in ids], dtype=np.int64)


def lines(ids=IDS, vectors=VECTORS) -> list[bytes]:
    return [json.dumps({"anonymous_cid": i, "emb": [float(x) for x in v]}).encode() for i, v in zip(ids, vectors, strict=True)]


def write_json(data_path, parts: dict[str, list[bytes]], name=f"creative_emb/emb_82_{WIDTH}"):
    folder = data_path / name
    folder.mkdir(parents=True, exist_ok=True)
    for part, content in parts.items():
        (folder / part).write_bytes(b"".join(line + b"\n" for line in content))
    return folder


def write_parquet(data_path, ids, vectors, name=f"mm_emb/emb_82_{WIDTH}_parquet", **options):
    folder = data_path / name
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"anonymous_cid": ids, "emb": vectors}), folder / "part-00000.parquet", **options)
    return folder / "part-00000.parquet"


def write_pickle(data_path, table: object):
    (data_path / "creative_emb").mkdir(parents=True, exist_ok=True)
    path = data_path / f"creative_emb/emb_82_{WIDTH}.pkl"
    path.write_bytes(pickle.dumps(table, protocol=4))
    return path


def build(data_path, out=None, **options):
    """(counts, matrix, row_of_item) of what lies in data_path."""
    out = out or data_path / "out"
    counts = compile_embedding(find_embedding(data_path, FEATURE), FEATURE, lookup, NUM_ITEMS, out, **options)
    assert sorted(p.name for p in out.iterdir() if p.name != "rejects.jsonl") == ["matrix.npy", "row_of_item.npy"]
    matrix = np.load(out / "matrix.npy", mmap_mode="r", allow_pickle=False)
    row_of_item = np.load(out / "row_of_item.npy", allow_pickle=False)
    assert matrix.dtype == np.float16 and matrix.shape == (counts["covered"] + 1, WIDTH) and not matrix[0].any()
    assert row_of_item.dtype == np.int32 and row_of_item.shape == (NUM_ITEMS + 1,)
    assert sorted(row_of_item[row_of_item > 0].tolist()) == row_of_item[row_of_item > 0].tolist() == list(range(1, counts["covered"] + 1))
    assert counts["rows"] == sum(counts.values()) - counts["rows"]
    return counts, matrix, row_of_item


def check_expected(found):
    counts, matrix, row_of_item = found
    assert counts == COUNTS
    assert row_of_item.tolist() == [0, 1, 0, 2, 3, 0, 4]
    assert np.array_equal(matrix[1:], VECTORS[[1, 0, 6, 3]].astype(np.float16))  # of item 3 the first of its two rows


def parquet_forms() -> dict[str, tuple]:
    rows, flat = [v.tolist() for v in VECTORS], VECTORS.reshape(-1)
    offsets = np.arange(0, flat.size + 1, WIDTH)
    ids = pa.array(IDS, pa.uint64())
    texts = pa.array([str(i) for i in IDS])
    return {
        "list<float>": (ids, pa.ListArray.from_arrays(offsets.astype(np.int32), flat)),
        "large_list<double>": (texts, pa.LargeListArray.from_arrays(offsets, flat.astype(np.float64))),
        "fixed_size_list": (texts, pa.FixedSizeListArray.from_arrays(flat, WIDTH)),
        "JSON text": (ids, pa.array([json.dumps(row) for row in rows])),
        "large JSON text": (texts.cast(pa.large_string()), pa.array([json.dumps(row) for row in rows]).cast(pa.large_string())),
        "dictionaries": (texts.dictionary_encode(), pa.array([json.dumps(row) for row in rows]).dictionary_encode()),
    }


@pytest.mark.parametrize("form", parquet_forms())
def test_parquet_forms(tmp_path, form):
    write_parquet(tmp_path, *parquet_forms()[form])
    check_expected(build(tmp_path))


def test_parquet_in_row_groups_parts_and_one_file(tmp_path):
    ids, vectors = parquet_forms()["list<float>"]
    write_parquet(tmp_path / "a", ids, vectors, row_group_size=2)
    check_expected(build(tmp_path / "a"))
    for k, rows in enumerate((slice(0, 3), slice(3, 7))):
        path = write_parquet(tmp_path / "b", ids[rows], vectors[rows])
        path.rename(path.with_name(f"part-{k}.snappy.parquet"))
    (path.parent / "_SUCCESS").touch()
    check_expected(build(tmp_path / "b"))
    (tmp_path / "c" / "mm_emb").mkdir(parents=True)
    pq.write_table(pa.table({"anonymous_cid": ids, "emb": vectors}), tmp_path / "c" / "mm_emb" / f"emb_82_{WIDTH}_parquet")
    check_expected(build(tmp_path / "c"))


@pytest.mark.parametrize("ids", (IDS, [str(i) for i in IDS], [str(i) if i % 2 else i for i in IDS]))
def test_json_lines(tmp_path, ids):
    content = lines(ids)
    folder = write_json(tmp_path, {"part-00001": content[3:], "part-00000": content[:3], "_SUCCESS": [], "part-00000.crc": [b"xx"]})
    assert find_embedding(tmp_path, FEATURE).files == [folder / "part-00000", folder / "part-00001"]
    check_expected(build(tmp_path))
    for name in ("part-00000", "part-00001"):
        (folder / name).rename(folder / f"{name}.json")
    check_expected(build(tmp_path, tmp_path / "again"))


def test_json_lines_with_crlf_without_a_last_newline_and_with_text_for_a_vector(tmp_path):
    folder = write_json(tmp_path, {})
    (folder / "part-0").write_bytes(b"\r\n".join(lines()))
    check_expected(build(tmp_path))
    texts = [orjson.dumps({"anonymous_cid": i, "emb": json.dumps(v.tolist())}) for i, v in zip(IDS, VECTORS, strict=True)]
    (folder / "part-0").write_bytes(b"\n".join(texts))
    check_expected(build(tmp_path, tmp_path / "again"))


@pytest.mark.parametrize("value", (lambda v: v, lambda v: v.tolist(), lambda v: tuple(v.tolist()), lambda v: v.astype(np.float64)))
def test_pickles(tmp_path, value):
    table = {(i if k < 4 else str(i)): value(v) for k, (i, v) in enumerate(zip(IDS, VECTORS, strict=True))}  # 1003 and "1003" are one item
    write_pickle(tmp_path, table)
    check_expected(build(tmp_path))


def test_rows_in_item_order_need_no_second_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "preadv", None)
    write_json(tmp_path, {"part-0": lines([1001, 1002, 1005], VECTORS[:3])})
    counts, matrix, row_of_item = build(tmp_path)
    assert row_of_item.tolist() == [0, 1, 2, 0, 0, 3, 0] and np.array_equal(matrix[1:], VECTORS[:3].astype(np.float16))


def test_many_rows_in_random_order(tmp_path, monkeypatch):
    monkeypatch.setattr(multimodal, "GATHER_ROWS", 7)
    monkeypatch.setattr(multimodal, "PIECE_BYTES", 1000)
    rng = np.random.default_rng(0)
    vectors, order = rng.standard_normal((500, WIDTH)).astype(np.float32), rng.permutation(500)
    write_parquet(tmp_path, pa.array(order), pa.FixedSizeListArray.from_arrays(vectors[order].reshape(-1), WIDTH), row_group_size=33)
    out = tmp_path / "out"
    counts = compile_embedding(find_embedding(tmp_path, FEATURE), FEATURE, lambda ids: np.array(ids) + 1, 500, out)
    assert counts["covered"] == 500
    assert np.array_equal(np.load(out / "matrix.npy")[1:], vectors.astype(np.float16))
    assert np.array_equal(np.load(out / "row_of_item.npy"), np.arange(501))


def test_lines_without_a_vector_are_missing(tmp_path):
    absent = [b'{"anonymous_cid": 1002}', b'{"anonymous_cid": "1005", "emb": null}', b'{"anonymous_cid": 1002, "emb": []}']
    write_json(tmp_path / "a", {"part-0": absent[:1] + lines() + absent[1:]})
    counts, _, row_of_item = build(tmp_path / "a")
    assert counts == COUNTS | {"rows": 10, "missing": 3} and row_of_item[2] == row_of_item[5] == 0
    write_parquet(tmp_path / "b", pa.array([1002, 1001, 1005]), pa.array([None, VECTORS[0].tolist(), []], pa.list_(pa.float32())))
    assert build(tmp_path / "b")[0] == {"rows": 3, "covered": 1, "unknown": 0, "missing": 2, "duplicate": 0, "rejected": 0}
    write_pickle(tmp_path / "c", {1001: VECTORS[0], 1002: None, 1003: np.zeros(0, np.float32), 1004: []})
    assert build(tmp_path / "c")[0]["missing"] == 3


def test_nothing_is_covered(tmp_path):
    write_json(tmp_path / "a", {"part-0": lines([5, 6], VECTORS[:2])})
    assert build(tmp_path / "a")[0] == {"rows": 2, "covered": 0, "unknown": 2, "missing": 0, "duplicate": 0, "rejected": 0}
    write_json(tmp_path / "b", {"part-0": []})
    assert build(tmp_path / "b")[1].shape == (1, WIDTH)


BAD_LINES = {
    b'{"anonymous_cid": 1002, "emb": [1, 2, 3, NaN]}': "NaN",
    b'{"anonymous_cid": 1002, "emb": [1, 2, 3, 1e6]}': r"emb\[3\] is 1e\+06, too large for float16",
    b'{"anonymous_cid": 1002, "emb": [1, -65520, 3, 4]}': r"emb\[1\] is -65520, too large",
    b'{"anonymous_cid": 1002, "emb": [65504, 3, 7e4, 4]}': r"emb\[2\] is 70000, too large",
    b'{"anonymous_cid": 1002, "emb": [1, 1e300, 3, 4]}': r"emb\[1\] is 1e\+300, too large",
    b'{"anonymous_cid": 1002, "emb": [1, 2, 3]}': "emb has 3 values; expected 4",
    b'{"anonymous_cid": 1002, "emb": [1, 2, 3, 4, 5]}': "emb has 5 values",
    b'{"anonymous_cid": 1002, "emb": [1, 2, "3", 4]}': "no number",
    b'{"anonymous_cid": 1002, "emb": [1, null, 3, 4]}': "no number",
    b'{"anonymous_cid": 1002, "emb": [[1], [2], [3], [4]]}': "no number",
    b'{"anonymous_cid": 1002, "emb": [1, [2, 3], 3, 4]}': "no number",
    b'{"anonymous_cid": 1002, "emb": "[1, 2"}': "no JSON",
    b'{"anonymous_cid": 1002, "emb": {"0": 1}}': "of type dict",
    b'{"anonymous_cid": 1002, "emb": 7}': "of type int",
    b'{"anonymous_cid": 1002, "emb": [1, 2, 3, 4}': "not JSON",
    b'{"anonymous_cid": 1002, "emb": [1, 2': "cut off or not JSON",
    b'{"emb": [1, 2, 3, 4]}': "'None' is no creative id",
    b'{"anonymous_cid": -5, "emb": [1, 2, 3, 4]}': "'-5' is no creative id",
    b'{"anonymous_cid": 1.5, "emb": [1, 2, 3, 4]}': "'1.5' is no creative id",
    b'{"anonymous_cid": "", "emb": [1, 2, 3, 4]}': "no creative id",
    b'{"anonymous_cid": true, "emb": [1, 2, 3, 4]}': "'True' is no creative id",
    b"[1, 2]": "expected {.*found list", b"": "empty line", b"\xef\xbb\xbf{}": "byte order mark", b"\xff\xfe": "not JSON",
    b"[" * 100_000: "not JSON",
}  # fmt: skip


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_stops_with_its_place_or_is_counted(tmp_path, line):
    content = lines()
    folder = write_json(tmp_path, {"part-00000": content[:3], "part-00001": [content[3], line, *content[4:]]})
    with pytest.raises(UserError, match=BAD_LINES[line]) as caught:
        build(tmp_path)
    assert f"{folder / 'part-00001'}:2: " in str(caught.value) and len(str(caught.value).splitlines()) <= 3
    assert not list((tmp_path / "out").glob("*.tmp"))
    counts, _, row_of_item = build(tmp_path, max_bad_lines=1)
    assert counts == COUNTS | {"rows": 8, "rejected": 1} and row_of_item.tolist() == [0, 1, 0, 2, 3, 0, 4]
    entry = json.loads((tmp_path / "out" / "rejects.jsonl").read_text())
    assert entry["line"] == 2 and entry["file"].endswith("part-00001")


def test_lines_are_counted_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("sources_jsonl.BLOCK_BYTES", 60)
    wide = b'{"anonymous_cid": 1002, "emb": [1, 2, 3, 4, 5]}'  # in a block of its own, but not the whole file's width
    write_json(tmp_path, {"part-0": [*lines(), wide]})
    with pytest.raises(UserError, match="part-0:8: emb has 5 values"):
        build(tmp_path)
    assert build(tmp_path, max_bad_lines=1)[0] == COUNTS | {"rows": 8, "rejected": 1}


def test_values_are_rounded_to_float32_first_in_every_form(tmp_path):
    value = 1 + 2.0**-11 + 2.0**-26  # a float32 is 1 + 2**-11, half way between two float16; a float64 would round up
    write_json(tmp_path / "json", {"part-0": [orjson.dumps({"anonymous_cid": 1001, "emb": [value] * 4})]})
    write_parquet(tmp_path / "double", pa.array([1001]), pa.array([[value] * 4], pa.list_(pa.float64())))
    write_parquet(tmp_path / "float", pa.array([1001]), pa.array([[value] * 4], pa.list_(pa.float32())))
    write_pickle(tmp_path / "pickle", {1001: np.full(4, value)})
    for form in ("json", "double", "float", "pickle"):
        assert build(tmp_path / form)[1][1].tolist() == [1.0] * 4, form


def test_a_rejected_row_leaves_its_item_to_the_next(tmp_path):
    write_json(tmp_path, {"part-0": [b'{"anonymous_cid": 1003, "emb": [1, 2, 3, 7e4]}', *lines()]})
    rejects = Rejects(3, tmp_path / "all.jsonl")
    counts, matrix, row_of_item = build(tmp_path, rejects=rejects)
    assert counts == COUNTS | {"rows": 8, "rejected": 1} and rejects.count == 1
    assert np.array_equal(matrix[row_of_item[3]], VECTORS[0].astype(np.float16))


def test_the_largest_values_of_float16_fit(tmp_path):
    write_json(tmp_path, {"part-0": [b'{"anonymous_cid": 1001, "emb": [65504, -65519.9, 1e-9, 0]}']})
    assert build(tmp_path)[1][1].tolist() == [65504, -65504, 0, 0]


def test_bad_rows_of_parquet(tmp_path):
    nan, inf = float("nan"), float("inf")
    rows = [[1, 2, 3, 4], [1, 2, nan, 4], [1, -inf, 3, 4], [1, 2, 3], [1, 2, None, 4], [1, 2, 3, 4], [7, 7, 7, 7], [1, 2, 3, 1e9]]
    path = write_parquet(tmp_path, pa.array([1001, 1002, 1003, 1004, 1005, None, 1006, 1004]), pa.array(rows, pa.list_(pa.float32())))
    rejects = Rejects(6, tmp_path / "rejects.jsonl")
    counts, matrix, row_of_item = build(tmp_path, rejects=rejects)
    assert counts == {"rows": 8, "covered": 2, "unknown": 0, "missing": 0, "duplicate": 0, "rejected": 6}
    assert row_of_item.tolist() == [0, 1, 0, 0, 0, 0, 2] and matrix[1:].tolist() == [[1, 2, 3, 4], [7, 7, 7, 7]]
    found = [json.loads(text) for text in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in found] == [2, 3, 4, 5, 6, 8] and {entry["file"] for entry in found} == {str(path)}
    for entry, reason in zip(found, ("nan", "-inf", "3 values", "a null", "missing", "too large"), strict=True):
        assert reason in entry["reason"]
    with pytest.raises(UserError, match=r"part-00000.parquet:2: emb\[2\] is nan; expected finite"):
        build(tmp_path)


@pytest.mark.parametrize("ids, reason", (([1001, -2], "'-2' is no creative id"), ([1001.0, 2.5], "'2.5' is no creative id"),
                                         (["1001", ""], "'' is no creative id"), ([True, False], "'True' is no")))  # fmt: skip
def test_bad_ids_of_parquet(tmp_path, ids, reason):
    write_parquet(tmp_path, pa.array(ids), pa.array([[1, 2, 3, 4]] * 2, pa.list_(pa.float32())))
    with pytest.raises(UserError, match=reason):
        build(tmp_path)
    write_parquet(tmp_path, pa.array(ids), pa.array(["[1, 2, 3, 4]"] * 2))
    with pytest.raises(UserError, match=reason):
        build(tmp_path)


def test_bad_rows_of_a_pickle(tmp_path):
    table = {1001: VECTORS[0], 1002: VECTORS[1, :3], 1003: [1, 2, np.nan, 4], 1004: "text", 1005: np.array(["a"] * 4), -1: VECTORS[2],
             1006: [1, 2, 3, 10**6], (1, 2): VECTORS[0], 1007: np.zeros((4, 4), np.float32), 2.0: VECTORS[1]}  # fmt: skip
    path = write_pickle(tmp_path, table)
    counts, matrix, _ = build(tmp_path, max_bad_lines=8)
    assert counts == {"rows": 10, "covered": 1, "unknown": 1, "missing": 0, "duplicate": 0, "rejected": 8}
    with pytest.raises(UserError, match="emb has 3 values; expected 4") as caught:
        build(tmp_path)
    assert f"{path}:2: " in str(caught.value)


@pytest.mark.parametrize("table", ([1, 2], "text", None, np.zeros(3), {1, 2}))
def test_a_pickle_of_something_else(tmp_path, table):
    write_pickle(tmp_path, table)
    with pytest.raises(UserError, match="expected a dict of creative id -> vector"):
        build(tmp_path)


def test_a_hostile_pickle(tmp_path):
    (tmp_path / "creative_emb").mkdir()
    (tmp_path / f"creative_emb/emb_82_{WIDTH}.pkl").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "canary").encode() + b"'\ntR.")
    with pytest.raises(UserError, match="os.system"):
        build(tmp_path)
    assert not (tmp_path / "canary").exists()


def test_a_whole_file_of_another_width(tmp_path):
    wide = np.ones((3, 6), np.float32)
    where = {"json": write_json(tmp_path / "json", {"part-0": [b'{"anonymous_cid": 1}', *lines([1001, 1002, 7], wide)]}) / "part-0",
             "parquet": write_parquet(tmp_path / "parquet", pa.array([1, 2, 3]), pa.array(wide.tolist())),
             "pickle": write_pickle(tmp_path / "pickle", {1001: wide[0], 1002: wide[1]})}  # fmt: skip
    for form, path in where.items():
        line = 2 if form == "json" else 1
        with pytest.raises(UserError, match=f":{line}: the vectors of feature 82 have 6 values; the schema says 4") as caught:
            build(tmp_path / form, max_bad_lines=100)  # no number of allowed rejects hides it
        assert str(path) in str(caught.value) and "schema.json" in str(caught.value)


def test_the_folder_named_with_another_width(tmp_path):
    write_json(tmp_path, {"part-0": lines()}, name="creative_emb/emb_82_4096")
    source = find_embedding(tmp_path, FEATURE)
    assert (source.form, source.width, source.feature_id) == ("json", 4096, "82")
    check_expected(build(tmp_path))
    write_parquet(tmp_path, *parquet_forms()["list<float>"], name="mm_emb/emb_82_1024_parquet")
    write_json(tmp_path, {"part-0": []})
    assert find_embedding(tmp_path, FEATURE).width == WIDTH  # the right width comes first, whatever the form


def test_which_form_is_found(tmp_path):
    assert find_embedding(tmp_path, FEATURE) is None
    write_json(tmp_path, {"part-0": lines()}, name=f"creative_emb/emb_82_{WIDTH}")
    write_json(tmp_path, {"part-0": lines()}, name="creative_emb/emb_821_4")
    (tmp_path / "creative_emb" / f"emb_82_{WIDTH}.txt").touch()
    assert find_embedding(tmp_path, FEATURE).form == "json"
    write_pickle(tmp_path, {})
    assert find_embedding(tmp_path, FEATURE).form == "pickle"
    write_parquet(tmp_path, *parquet_forms()["list<float>"])
    assert find_embedding(tmp_path, FEATURE).form == "parquet"
    assert [find_embedding(tmp_path, f) for f in TENCENT_GR.embeddings if f.id != "82"] == [None] * 5


def test_an_empty_folder(tmp_path):
    folder = write_json(tmp_path, {"README": [b"x"], "_SUCCESS": []})
    with pytest.raises(UserError, match="without any") as caught:
        find_embedding(tmp_path, FEATURE)
    assert str(folder) in str(caught.value)
    write_pickle(tmp_path, {})
    assert find_embedding(tmp_path, FEATURE).form == "pickle"


def test_parquet_files_of_another_shape(tmp_path):
    path = write_parquet(tmp_path, pa.array([1]), pa.array([[1.0] * 4]))
    for table, match in ((pa.table({"cid": [1], "emb": [[1.0]]}), "column 'anonymous_cid' is missing; it has cid, emb"),
                         (pa.table({"anonymous_cid": [1], "emb": [1.0]}), "column 'emb' is of type double; expected a list of float"),
                         (pa.table({"anonymous_cid": [1], "emb": [["a"]]}), "column 'emb' is of type list<")):  # fmt: skip
        pq.write_table(table, path)
        with pytest.raises(UserError, match=match):
            build(tmp_path)
    whole = path.read_bytes()
    for junk in (whole[: len(whole) // 2], b"", b"PAR1 and nothing"):
        path.write_bytes(junk)
        with pytest.raises(UserError, match="not readable as parquet"):
            build(tmp_path)


def test_damaged_pages_of_parquet(tmp_path):
    ids, vectors = pa.array(range(2000)), pa.FixedSizeListArray.from_arrays(np.random.default_rng(0).random(8000, np.float32), WIDTH)
    path = write_parquet(tmp_path, ids, vectors, compression="snappy")
    data = bytearray(path.read_bytes())
    data[40:200] = bytes(160)
    path.write_bytes(data)
    with pytest.raises(UserError, match="parquet"):
        build(tmp_path)


def test_lines_changed_at_random_are_all_accounted_for(tmp_path):
    chance = random.Random(1)
    content = []
    for k in range(2000):
        line = bytearray(lines([1000 + k % 9], [VECTORS[k % 7]])[0])
        for _ in range(chance.randrange(3)):
            line[chance.randrange(len(line))] = chance.choice(b'0"[]{},:.-e9\xff ')
        content.append(bytes(line[: chance.randrange(len(line))] if chance.random() < 0.1 else line))
    write_json(tmp_path, {"part-0": content})
    counts, _, _ = build(tmp_path, max_bad_lines=2000)
    assert counts["rows"] == 2000 and counts["rejected"] > 300 and counts["covered"] == NUM_ITEMS


@pytest.mark.parametrize("call", range(1, 4))
def test_a_full_disk(tmp_path, monkeypatch, call):
    write_json(tmp_path, {"part-0": lines()})
    left = [call]

    def full(_):
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="no space left to write.*bytes needed"):
        build(tmp_path)
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_progress_is_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sources.PLAIN_PROGRESS_SECONDS", 0.0)
    write_json(tmp_path, {"part-0": lines()})
    build(tmp_path, progress=True)
    assert "vectors 82: " in capsys.readouterr().out
