"""Candidates of both layouts give one and the same table; what is cold, odd, missing or twice is counted."""

import json
import random

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from candidates import normalise_column, normalise_id, read_candidates
from columns import is_number
from errors import UserError
from schema import TENCENT_GR, Feature, Schema
from sources import Rejects

SCHEMA = Schema((Feature("100", "item", "single"), Feature("tags", "item", "multi"), Feature("103", "user", "single"),
                 Feature("101", "item", "single"), Feature("82", "item", "embedding", width=2)))  # fmt: skip
BIG = 2**64 - 5
ROWS = [
    {"creative_id": 11, "retrieval_id": 1000, "features": {"100": 3, "101": 7, "tags": [1, 2]}},
    {"creative_id": "12", "retrieval_id": 1001, "features": {"100": "new", "101": 2**31 - 1, "tags": ["new", 5]}},
    {"creative_id": BIG, "retrieval_id": BIG, "features": {}},
    {"creative_id": "14", "retrieval_id": "1003", "features": {"101": None, "tags": None, "999": 1, "111": 4}},
    {"creative_id": 15, "retrieval_id": 1004, "features": {"tags": [], "100": 0, "101": 9, "999": [1]}},
]
IDS, RETRIEVAL = [11, 12, BIG, 14, 15], [1000, 1001, BIG, 1003, 1004]
SINGLE, COUNTS, VALUES = [[3, 7], [0, 2**31 - 1], [0, 0], [0, 0], [0, 9]], [2, 1, 0, 0, 0], [1, 2, 5]


def write_json(path, rows):
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def parquet_table(rows=ROWS, value=pa.int64(), **columns) -> pa.Table:
    """Layout B of ROWS: structs {feature_value, is_str}, for the multi-valued feature a list of them."""
    one = pa.struct([("feature_value", value), ("is_str", pa.int32())])
    write = str if pa.types.is_string(value) else int

    def struct(found):
        if found is None:
            return None
        if isinstance(found, str):
            return {"feature_value": found if write is str else 1234, "is_str": 1}
        return {"feature_value": write(found), "is_str": 0}

    made = {"creative_id": pa.array([int(row["creative_id"]) for row in rows], pa.uint64()),
            "reid_creative_id": pa.array(range(len(rows))),
            "retrieval_id": pa.array([int(row["retrieval_id"]) for row in rows], pa.uint64())}  # fmt: skip
    for name in ("100", "101", "999"):
        made[name] = pa.array([struct(row["features"].get(name) if name != "999" else 1) for row in rows], one)
    lists = [row["features"].get("tags") for row in rows]
    made["tags"] = pa.array([None if found is None else [struct(v) for v in found] for found in lists], pa.list_(one))
    return pa.table(made | columns)


def check_expected(table):
    assert table.creative_ids == IDS and all(type(i) is int for i in table.creative_ids)
    assert table.retrieval_ids.dtype == np.uint64 and table.retrieval_ids.tolist() == RETRIEVAL
    assert table.single.dtype == np.int32 and table.single.tolist() == SINGLE
    assert list(table.multi) == ["tags"]
    counts, values = table.multi["tags"]
    assert counts.dtype == np.int64 and counts.tolist() == COUNTS and values.dtype == np.int32 and values.tolist() == VALUES
    assert table.summary["read: candidates"] == 5
    assert table.summary["cold: item feature 100"] == table.summary["cold: item feature tags"] == 1


def test_layout_a(tmp_path):
    table = read_candidates(write_json(tmp_path / "predict_set.jsonl", ROWS), SCHEMA)
    check_expected(table)
    assert table.summary == {"read: candidates": 5, "cold: item feature 100": 1, "cold: item feature tags": 1,
                             "ignored: item feature '999' is not in the schema": 2}  # fmt: skip
    check_expected(read_candidates(tmp_path, SCHEMA))
    check_expected(read_candidates(str(tmp_path), SCHEMA))


@pytest.mark.parametrize("value", (pa.int64(), pa.int32(), pa.float64(), pa.string()))
def test_layout_b(tmp_path, value):
    path = tmp_path / "candidate" / "part-0.parquet"
    path.parent.mkdir()
    pq.write_table(parquet_table(value=value), path)
    table = read_candidates(tmp_path, SCHEMA)
    check_expected(table)
    assert table.summary["ignored: item feature '999' is not in the schema"] == 5 and len(table.summary) == 4
    check_expected(read_candidates(tmp_path / "candidate", SCHEMA))
    check_expected(read_candidates(path, SCHEMA))


def test_layout_b_in_parts_one_file_and_renamed(tmp_path):
    rows = parquet_table()
    (tmp_path / "a" / "candidate").mkdir(parents=True)
    for k in range(5):
        pq.write_table(rows.slice(k, 1), tmp_path / "a" / "candidate" / f"part-0000{k}.parquet")
    check_expected(read_candidates(tmp_path / "a", SCHEMA))
    for name in ("candidate.parquet", "candidate"):
        (tmp_path / f"b{name}").mkdir()
        pq.write_table(rows, tmp_path / f"b{name}" / name)
        check_expected(read_candidates(tmp_path / f"b{name}", SCHEMA))
    (tmp_path / "a" / "candidate").rename(tmp_path / "pool")
    check_expected(read_candidates(tmp_path / "pool", SCHEMA))


@pytest.mark.parametrize("form", ("list<int>", "struct of a list", "large list", "one value"))
def test_forms_of_multi_valued_columns(tmp_path, form):
    lists = [[1, 2], [5], None, [], [0]]
    column = {
        "list<int>": pa.array(lists, pa.list_(pa.int64())), "large list": pa.array(lists, pa.large_list(pa.uint8())),
        "struct of a list": pa.array([None if v is None else {"feature_value": v, "is_str": 0} for v in lists]),
        "one value": pa.array([1, 2, None, 0, 3]),
    }[form]  # fmt: skip
    pq.write_table(parquet_table(tags=column), tmp_path / "candidate.parquet")
    table = read_candidates(tmp_path, SCHEMA)
    if form == "one value":
        assert table.multi["tags"].counts.tolist() == [1, 1, 0, 0, 1] and table.multi["tags"].values.tolist() == [1, 2, 3]
        assert table.summary["coerced: item feature tags: one value where the schema says a list"] == 3
    else:
        assert table.multi["tags"].counts.tolist() == [2, 1, 0, 0, 0] and table.multi["tags"].values.tolist() == [1, 2, 5]


def test_a_list_whose_values_are_all_unseen(tmp_path):
    empty = {"feature_value": [], "is_str": None}
    column = pa.array([{"feature_value": [1, 2], "is_str": 1}, {"feature_value": [3], "is_str": 0}] + [empty] * 3)
    pq.write_table(parquet_table(tags=column), tmp_path / "candidate.parquet")
    table = read_candidates(tmp_path, SCHEMA)
    assert table.multi["tags"].counts.tolist() == [0, 1, 0, 0, 0] and table.summary["cold: item feature tags"] == 2


def test_plain_columns_nulls_and_bool_flags(tmp_path):
    flags = pa.array([{"feature_value": k, "is_str": k % 2 == 1} for k in range(4)] + [None])
    pq.write_table(parquet_table(**{"100": pa.array([1, None, 3, 4, 5], pa.int16()), "101": flags}), tmp_path / "candidate.parquet")
    table = read_candidates(tmp_path, SCHEMA)
    assert table.single.tolist() == [[1, 0], [0, 0], [3, 2], [4, 0], [5, 0]] and table.summary["cold: item feature 101"] == 2
    pq.write_table(parquet_table(**{"100": pa.nulls(5)}).drop_columns(["101", "tags"]), tmp_path / "candidate.parquet")
    table = read_candidates(tmp_path, SCHEMA)
    assert not table.single.any() and table.multi["tags"].counts.tolist() == [0] * 5 and not len(table.multi["tags"].values)


def test_odd_values_are_read_as_missing_and_counted(tmp_path):
    odd = [-1, 2**31, 1.5, 2.0, 7]
    rows = [{"creative_id": k, "retrieval_id": k, "features": {"100": v, "tags": [v, 8]}} for k, v in enumerate(odd)]
    rows += [{"creative_id": 8, "retrieval_id": 8, "features": {"100": [1], "101": {"a": 1}, "tags": 6}},
             {"creative_id": 9, "retrieval_id": 9, "features": {"100": 2**70, "101": True}}]  # fmt: skip
    table = read_candidates(write_json(tmp_path / "predict_set.jsonl", rows), SCHEMA)
    assert table.single[:, 0].tolist() == [0, 0, 0, 0, 7, 0, 0] and not table.single[:, 1].any()
    assert table.multi["tags"].counts.tolist() == [1, 1, 1, 1, 2, 1, 0]
    assert table.summary["coerced: item feature 100: not a whole number from 0 up, read as missing"] == 6
    assert table.summary["coerced: item feature 101: not a whole number from 0 up, read as missing"] == 2
    structs = pa.array([{"feature_value": v, "is_str": 0} for v in (-1.0, 2.0**31, 1.5, 2.0, float("nan"))])
    pq.write_table(parquet_table(**{"100": structs}), tmp_path / "candidate.parquet")
    table = read_candidates(tmp_path / "candidate.parquet", SCHEMA)
    assert table.single[:, 0].tolist() == [0, 0, 0, 2, 0]
    assert table.summary["coerced: item feature 100: not a whole number from 0 up, read as missing"] == 4


@pytest.mark.parametrize("layout", "AB")
def test_duplicates_and_missing_retrieval_ids(tmp_path, layout):
    ids, retrieval = [5, 6, 5, 7, 6, 8], [50, None, 52, 50, 54, None]
    if layout == "A":
        rows = [{"creative_id": str(i) if k % 2 else i, "retrieval_id": r, "features": {"100": k + 1, "tags": [k + 1] * k}}
                for k, (i, r) in enumerate(zip(ids, retrieval, strict=True))]  # fmt: skip
        path = write_json(tmp_path / "predict_set.jsonl", rows)
    else:
        path = tmp_path / "candidate.parquet"
        features = {"100": list(range(1, 7)), "tags": [[k + 1] * k for k in range(6)]}
        pq.write_table(pa.table({"creative_id": ids, "retrieval_id": retrieval} | features), path)
    table = read_candidates(path, SCHEMA)
    assert table.creative_ids == [5, 6, 7, 8] and table.single[:, 0].tolist() == [1, 2, 4, 6]
    assert table.retrieval_ids.tolist() == [50, 1, 50, 3]  # a missing one is the row's index
    assert table.multi["tags"].counts.tolist() == [0, 1, 3, 5] and table.multi["tags"].values.tolist() == [2] + [4] * 3 + [6] * 5
    assert table.summary == {"read: candidates": 6, "duplicates: candidates with a creative id that came before, left out": 2,
                             "missing: retrieval ids, numbered by row instead": 2,
                             "duplicates: retrieval ids that stand for more than one candidate, kept": 1}  # fmt: skip


def test_no_retrieval_ids_at_all(tmp_path):
    rows = [{"creative_id": name} for name in ("b", "a", 7, "b", "7")]
    table = read_candidates(write_json(tmp_path / "predict_set.jsonl", rows), SCHEMA)
    assert table.creative_ids == ["b", "a", 7] and table.retrieval_ids.tolist() == [0, 1, 2] and not table.single.any()
    pq.write_table(pa.table({"creative_id": ["b", "a", "7", "b", "7"]}), tmp_path / "candidate.parquet")
    other = read_candidates(tmp_path / "candidate.parquet", SCHEMA)
    assert other.creative_ids == ["b", "a", 7] and other.retrieval_ids.tolist() == [0, 1, 2]


BAD_LINES = {
    b'{"creative_id": 1, "retrieval_id": 2, "features": {"100": 1': "cut off or not JSON", b"": "empty line", b"[1]": "found list",
    b'{"retrieval_id": 2}': "creative_id is missing", b'{"creative_id": -1}': "'-1' is no creative id",
    b'{"creative_id": true}': "'True' is no creative id", b'{"creative_id": 1.25}': "'1.25' is no creative id",
    b'{"creative_id": 1180591620717411303424}': "no creative id", b'{"creative_id": ""}': "'' is no creative id",
    b'{"creative_id": [1]}': "no creative id", b'{"creative_id": 1, "retrieval_id": "x"}': "retrieval_id 'x' is not a whole number",
    b'{"creative_id": 1, "retrieval_id": -2}': "retrieval_id '-2'", b'{"creative_id": 1, "features": [1]}': "features is of type list",
    b'{"creative_id": 1, "features": {"100": NaN}}': "NaN", b"\xef\xbb\xbf{}": "byte order mark", b"\xff": "not JSON",
}  # fmt: skip


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_stops_with_its_place_or_is_counted(tmp_path, line):
    path = write_json(tmp_path / "predict_set.jsonl", [*ROWS[:2], line, *ROWS[2:]])
    with pytest.raises(UserError, match=BAD_LINES[line]) as caught:
        read_candidates(path, SCHEMA)
    assert f"{path}:3: " in str(caught.value) and len(str(caught.value).splitlines()) <= 3
    table = read_candidates(path, SCHEMA, rejects=Rejects(1, tmp_path / "rejects.jsonl"))
    assert table.creative_ids == IDS and table.single.tolist() == SINGLE
    assert table.summary["rejected: candidates"] == 1 and table.summary["read: candidates"] == 6
    assert json.loads((tmp_path / "rejects.jsonl").read_text())["line"] == 3


def test_lines_are_counted_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("sources_jsonl.BLOCK_BYTES", 50)
    check_expected(read_candidates(write_json(tmp_path / "predict_set.jsonl", ROWS), SCHEMA))
    with pytest.raises(UserError, match="predict_set.jsonl:6: "):
        read_candidates(write_json(tmp_path / "predict_set.jsonl", [*ROWS, b"{"]), SCHEMA)


def test_bad_rows_of_parquet(tmp_path, monkeypatch):
    table = pa.table({"creative_id": ["1", None, "", "4", "5"], "retrieval_id": ["10", "11", "12", "x", "14"], "100": [1, 2, 3, 4, 5]})
    path = tmp_path / "candidate.parquet"
    pq.write_table(table, path)
    with pytest.raises(UserError, match="creative_id is missing") as caught:
        read_candidates(path, SCHEMA)
    assert f"{path}:2: " in str(caught.value)
    found = read_candidates(path, SCHEMA, rejects=Rejects(3, tmp_path / "rejects.jsonl"))
    assert found.creative_ids == [1, 5] and found.retrieval_ids.tolist() == [10, 14] and found.single[:, 0].tolist() == [1, 5]
    entries = [json.loads(text) for text in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in entries] == [2, 3, 4]
    monkeypatch.setattr("candidates.BATCH_ROWS", 2)
    read_candidates(path, SCHEMA, rejects=(again := Rejects(3, tmp_path / "again.jsonl")))
    assert again.count == 3 and (tmp_path / "again.jsonl").read_text() == (tmp_path / "rejects.jsonl").read_text()


@pytest.mark.parametrize("column, kind", ((pa.array(["a"] * 5), "string"), (pa.array([True] * 5), "bool"), (pa.array([[1]] * 5), "list"),
                                          (pa.array([{"value": 1}] * 5), "struct"), (pa.array([{"feature_value": 1}] * 5), "struct"),
                                          (pa.array([{"feature_value": 1, "is_str": "1"}] * 5), "struct")))  # fmt: skip
def test_columns_of_a_wrong_type(tmp_path, column, kind):
    pq.write_table(parquet_table(**{"100": column}), tmp_path / "candidate.parquet")
    with pytest.raises(UserError, match=f"column '100' is {kind}.*expected struct<feature_value, is_str>") as caught:
        read_candidates(tmp_path, SCHEMA)
    assert "candidate.parquet" in str(caught.value)


def test_missing_files_and_columns(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        read_candidates(tmp_path / "absent.jsonl", SCHEMA)
    with pytest.raises(UserError, match="no candidates here; expected predict_set.jsonl"):
        read_candidates(tmp_path, SCHEMA)
    (tmp_path / "candidate").mkdir()
    with pytest.raises(UserError, match="no candidates here"):
        read_candidates(tmp_path, SCHEMA)
    pq.write_table(pa.table({"id": [1]}), tmp_path / "candidate" / "a.parquet")
    with pytest.raises(UserError, match="column 'creative_id' is missing; it has id"):
        read_candidates(tmp_path, SCHEMA)
    (tmp_path / "candidate" / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="not readable as parquet"):
        read_candidates(tmp_path, SCHEMA)
    pq.write_table(parquet_table().slice(0, 0), tmp_path / "candidate" / "a.parquet")
    with pytest.raises(UserError, match="holds no candidate"):
        read_candidates(tmp_path, SCHEMA)
    with pytest.raises(UserError, match="holds no candidate"):
        read_candidates(write_json(tmp_path / "predict_set.jsonl", []), SCHEMA)


def test_both_layouts_agree_at_random(tmp_path):
    chance = random.Random(0)
    features = [f.id for f in TENCENT_GR.select("item", "single")]
    rows = []
    for k in range(3000):
        values = {name: chance.choice([chance.randrange(10**6), "unseen", 0]) for name in features if chance.random() < 0.8}
        rows.append({"creative_id": chance.choice([k * 10**12, str(k * 10**12)]), "retrieval_id": 10**6 + k, "features": values})
    write_json(tmp_path / "predict_set.jsonl", rows)
    one = pa.struct([("feature_value", pa.string()), ("is_str", pa.int8())])

    def struct(value):
        return None if value is None else {"feature_value": str(value), "is_str": int(type(value) is str)}

    columns = {name: pa.array([struct(row["features"].get(name)) for row in rows], one) for name in features}
    columns |= {"creative_id": [str(row["creative_id"]) for row in rows], "retrieval_id": range(10**6, 10**6 + 3000)}
    pq.write_table(pa.table(columns), tmp_path / "candidate.parquet", row_group_size=1000)
    a, b = read_candidates(tmp_path / "predict_set.jsonl", TENCENT_GR), read_candidates(tmp_path / "candidate.parquet", TENCENT_GR)
    assert a.creative_ids == b.creative_ids and np.array_equal(a.retrieval_ids, b.retrieval_ids) and np.array_equal(a.single, b.single)
    assert a.summary == b.summary and a.multi == b.multi == {}
    assert a.summary["cold: item feature 121"] == sum(row["features"].get("121") == "unseen" for row in rows)


def test_lines_changed_at_random_are_all_accounted_for(tmp_path):
    chance = random.Random(2)
    content = []
    for k in range(2000):
        line = bytearray(orjson.dumps({"creative_id": 10**6 + k, "retrieval_id": k, "features": {"100": k, "tags": [1, 2], "x": "y"}}))
        for _ in range(chance.randrange(3)):
            line[chance.randrange(len(line))] = chance.choice(b'0"[]{},:.-e9\xff ')
        content.append(bytes(line[: chance.randrange(len(line))] if chance.random() < 0.1 else line))
    rejects = Rejects(2000, tmp_path / "rejects.jsonl")
    table = read_candidates(write_json(tmp_path / "predict_set.jsonl", content), SCHEMA, rejects=rejects)
    duplicates = table.summary.get("duplicates: candidates with a creative id that came before, left out", 0)
    assert len(table.creative_ids) + rejects.count + duplicates == table.summary["read: candidates"] == 2000 and rejects.count > 300


@pytest.mark.parametrize("value, expected", ((5, 5), ("5", 5), ("007", "007"), (0, 0), (2**64 - 1, 2**64 - 1), (5.0, 5),
                                             (str(2**64 - 1), 2**64 - 1), (np.int64(5), 5), (np.uint64(2**64 - 1), 2**64 - 1),
                                             (np.float32(5), 5), ("B001", "B001"), (str(2**64), str(2**64)), ("-5", "-5"),
                                             ("5.0", "5.0"), ("²", "²"), (np.str_("a"), "a"), ("9" * 5000, "9" * 5000)))  # fmt: skip
def test_normalise_id(value, expected):
    found = normalise_id(value)
    assert found == expected and type(found) is type(expected)
    assert type(value) is not str or is_number(value) is (type(found) is int)


@pytest.mark.parametrize("value", (-1, 2**64, 1.5, float("nan"), float("inf"), 1e19, -1.0, 2.0**54, True, np.bool_(True), None, "",
                                   b"5", [5], {}))  # fmt: skip
def test_what_is_no_id(value):
    with pytest.raises(UserError, match="no creative id; expected a whole number"):
        normalise_id(value)


@pytest.mark.parametrize("values, kind", (
    ([1, 2**63 - 1, None], pa.int64()), ([2**64 - 1, 0], pa.uint64()), ([3, 4], pa.int8()), ([1.0, None], pa.float64()),
    (["1", "x", None, "007"], pa.string()), (["12", "9" * 19], pa.string()), ([], pa.string()), ([None, None], pa.null()),
    (["18446744073709551615", "18446744073709551616"], pa.large_string())))  # fmt: skip
def test_normalise_column_equals_normalise_id(values, kind):
    ids, bad = normalise_column(pa.array(values, kind))
    assert ids == [None if v is None else normalise_id(v) for v in values] and not bad
    assert {type(i) for i in ids} <= {int, str, type(None)}
    if kind == pa.string():
        assert normalise_column(pa.array(values, kind).dictionary_encode()) == (ids, [])


def test_normalise_column_names_bad_rows():
    ids, bad = normalise_column(pa.array([4, -1, None, -7]))
    assert ids == [4, None, None, None] and [row for row, _ in bad] == [1, 3] and "'-7'" in bad[1][1]
