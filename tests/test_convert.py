"""convert.py and its recipes: hand-made sets of each format, read back from the parquet; every error; the real sets where present."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import convert
from convert import Options, bucket_floats, number_ids, plain_keys
from converters import text
from converters.raw import RawEvents, to_seconds
from errors import UserError
from plain_pickle import load_plain_pickle
from schema import Schema

QUIET = {"log": lambda line: None}


class Folder:
    """A converted data folder, read back as plain Python."""

    def __init__(self, path: Path) -> None:
        seq = pa.concat_tables([pq.read_table(part) for part in sorted((path / "seq").iterdir())])
        self.types = seq.schema
        self.seq = dict(zip(seq["user_id"].to_pylist(), seq["seq"].to_pylist(), strict=True))
        self.items = self.features(path / "item_feat", "item_id")
        self.users = self.features(path / "user_feat", "user_id")
        self.indexer = load_plain_pickle(path / "indexer.pkl")
        self.schema = Schema.load(path)

    @staticmethod
    def features(path: Path, key: str) -> dict[int, dict]:
        rows = [row for part in sorted(path.iterdir()) for row in pq.read_table(part).to_pylist()]
        return {row.pop(key): row for row in rows}

    def events(self, raw_user: str) -> list[tuple]:
        """(raw item, timestamp) of a user, oldest first."""
        raw = {number: item for item, number in self.indexer["i"].items()}
        return [(raw[e["item_id"]], e["timestamp"]) for e in self.seq[self.indexer["u"][raw_user]]]

    def item(self, raw: object, feature: str) -> object:
        """The raw value (or list of them) of an item's feature."""
        names = {number: value for value, number in self.indexer["f"][feature].items()}
        value = self.items[self.indexer["i"][raw]][feature]
        return [names[v] for v in value] if isinstance(value, list) else names.get(value)

    def user(self, raw: str, feature: str) -> object:
        names = {number: value for value, number in self.indexer["f"][feature].items()}
        return names.get(self.users[self.indexer["u"][raw]][feature])


def run(kind: str, source: Path, out: Path, **options: object) -> Folder:
    convert.convert(kind, source, out, Options(**options), **QUIET)
    return Folder(out)


def refused(kind: str, source: Path, out: Path, *parts: str, **options: object) -> str:
    """The message of the UserError; it holds all `parts`, has at most three lines, and nothing was written."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as caught:
        convert.convert(kind, source, out, Options(**options), **QUIET)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert message.count("\n") <= 2
    assert sorted(out.parent.iterdir()) == before
    return message


def put(path: Path, content: str | bytes, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def test_s3rec_keeps_numbers_order_and_attributes(tmp_path: Path, out: Path) -> None:
    source = put(tmp_path / "Toy.txt", "1 3 1 2\n2 2 3 3\n")
    put(tmp_path / "Toy_item2attributes.json", json.dumps({"1": [2, 1], "3": [3], "9": [7]}))
    lines: list[str] = []
    convert.convert("s3rec", source, out, log=lines.append)
    data = Folder(out)
    assert data.indexer == {"u": {"1": 1, "2": 2}, "i": {1: 1, 2: 2, 3: 3}, "f": {"attributes": {1: 1, 2: 2, 3: 3}}}
    assert [e["item_id"] for e in data.seq[1]] == [3, 1, 2]
    assert [e["timestamp"] for e in data.seq[2]] == [0, 1, 2]
    assert {e["action_type"] for user in data.seq.values() for e in user} == {0}
    assert data.items == {1: {"attributes": [2, 1]}, 2: {"attributes": None}, 3: {"attributes": [3]}}
    assert data.users == {1: {}, 2: {}}
    assert data.schema.has_time is False
    assert [(f.id, f.side, f.kind, f.cardinality) for f in data.schema.features] == [("attributes", "item", "multi", 3)]
    struct = data.types.field("seq").type.value_type
    assert data.types.field("user_id").type == pa.int64()
    assert {struct.field(i).name: struct.field(i).type for i in range(3)} == {
        "item_id": pa.int64(), "action_type": pa.int32(), "timestamp": pa.int64()}  # fmt: skip
    shown = "\n".join(lines)
    assert "users 2, items 3, events 6, density 100.0000%" in shown
    assert "1 items of Toy_item2attributes.json have no event and are ignored" in shown
    assert "1 items with events are not in Toy_item2attributes.json" in shown


def test_s3rec_numbers_with_gaps_are_renumbered_by_first_appearance(tmp_path: Path, out: Path) -> None:
    data = run("s3rec", put(tmp_path / "x.txt", "7 50 20\n5 20 10\n"), out)
    assert data.indexer["u"] == {"7": 1, "5": 2}
    assert data.indexer["i"] == {50: 1, 20: 2, 10: 3}
    assert data.schema.features == ()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("1 1 2\n2 x 3\n", (":2", "'x'", "whole numbers")),
        ("1 1 2\n\n2\n", (":3", "user 2 has no items")),
        ("1 1 2\n1 2\n", (":2", "already in line 1")),
        ("1 1 0\n", (":1", "0 is padding")),
        ("1 1 -2\n", (":1", "'-2'")),
        ("1 99999999999\n", (":1", "expected 1 to")),
        ("", ("empty",)),
        ("\n\n", ("no records",)),
    ],
)
def test_s3rec_bad_sequences(tmp_path: Path, out: Path, content: str, parts: tuple[str, ...]) -> None:
    refused("s3rec", put(tmp_path / "x.txt", content), out, "x.txt", *parts)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('{"1": [1],\n "2": [2', (":2", "not JSON")),
        ("[1]", ("list", "expected an object")),
        ('{"1": 3}', ("item 1", "expected a list")),
        ('{"1": [1.5]}', ("item 1", "expected a list")),
        ('{"a": [1]}', ("'a'", "number")),
        ('{"1": [1], "1": [2]}', ("'1'", "twice")),
        (b'{"1": ["\xff"]}', ("UTF-8",)),
        ("", ("empty",)),
    ],
)
def test_s3rec_bad_attributes(tmp_path: Path, out: Path, content: str | bytes, parts: tuple[str, ...]) -> None:
    source = put(tmp_path / "x.txt", "1 1 2\n")
    put(tmp_path / "x_item2attributes.json", content)
    refused("s3rec", source, out, "x_item2attributes.json", *parts)


FLAGS = {"Comedy": 5, "Drama": 8}


def film_100k(number: int, title: str, date: str, *genres: str) -> str:
    flags = ["0"] * 19
    for genre in genres:
        flags[FLAGS[genre]] = "1"
    return "|".join([str(number), title, date, "", "http://x", *flags])


def make_100k(folder: Path) -> Path:
    put(folder / "u.data", "5\t20\t3\t200\n5\t10\t1\t100\n9\t20\t5\t50\n5\t30\t4\t200\n9\t10\t2\t50\n")
    films = [film_100k(10, "Am\xe9lie (1990)", "01-Jan-1995", "Comedy", "Drama"), film_100k(20, "B (1990)", "", "Drama")]
    films += [film_100k(30, "C", ""), film_100k(40, "unseen", "")]
    put(folder / "u.item", "\n".join(films) + "\n", "latin-1")
    put(folder / "u.user", "5|24|M|technician|85711\n9|57|F|other|94043\n")
    return folder


def test_movielens_100k(tmp_path: Path, out: Path) -> None:
    data = run("movielens", make_100k(tmp_path / "ml"), out)
    assert data.indexer["u"] == {"5": 1, "9": 2}
    assert data.indexer["i"] == {20: 1, 10: 2, 30: 3}
    assert data.events("5") == [(10, 100), (20, 200), (30, 200)]  # equal times stay in the file's order
    assert data.events("9") == [(20, 50), (10, 50)]
    assert data.schema.has_time is True
    assert (data.item(10, "genre"), data.item(20, "genre"), data.items[3]["genre"]) == (["Comedy", "Drama"], ["Drama"], None)
    assert (data.item(10, "year"), data.item(20, "year"), data.item(30, "year")) == ("1995", "1990", None)
    assert [data.user("5", f) for f in ("age", "gender", "occupation")] == ["18", "M", "technician"]
    assert data.user("9", "age") == "56"
    assert [f.id for f in data.schema.features] == ["genre", "year", "age", "gender", "occupation"]


def test_movielens_1m(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "ml-1m"
    put(folder / "ratings.dat", "1::1193::5::978300760\r\n1::661::3::978300750\r\n2::1193::4::978300760\r\n")
    put(folder / "movies.dat", "661::James: the P\xeache (1996)::Animation|Children's\n1193::Cuckoo (1975)::Drama\n", "latin-1")
    put(folder / "users.dat", "1::F::1::10::48067\n2::M::56::16::70072\n")
    data = run("movielens", folder, out)
    assert data.events("1") == [(661, 978300750), (1193, 978300760)]
    assert data.item(661, "genre") == ["Animation", "Children's"]
    assert data.item(661, "year") == "1996"
    assert [data.user("2", f) for f in ("age", "gender", "occupation")] == ["56", "M", "16"]


def make_csv(folder: Path) -> Path:
    put(folder / "ratings.csv", "userId,movieId,rating,timestamp\n1,2,3.5,1112486027\n1,29,0.5,1112484676\n3,2,5.0,1094785709\n")
    films = ['2,"Jumanji, ""the"" film (1995)",Adventure|Fantasy', "29,City (1995) ,(no genres listed)"]
    put(folder / "movies.csv", "\n".join(["movieId,title,genres", *films]) + "\n")
    return folder


def test_movielens_csv(tmp_path: Path, out: Path) -> None:
    data = run("movielens", make_csv(tmp_path / "ml-20m"), out)
    assert data.events("1") == [(29, 1112484676), (2, 1112486027)]
    assert data.item(2, "genre") == ["Adventure", "Fantasy"]
    assert data.items[data.indexer["i"][29]]["genre"] is None
    assert (data.item(2, "year"), data.item(29, "year")) == ("1995", "1995")
    assert data.schema.select("user", "single") == ()


def test_movielens_10m_has_no_users(tmp_path: Path, out: Path) -> None:
    put(tmp_path / "ml/ratings.dat", "1::122::4.5::838985046\n")
    put(tmp_path / "ml/movies.dat", "122::Boomerang (1992)::Comedy\n")
    assert run("movielens", tmp_path / "ml", out).users == {1: {}}


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("u.data", "5\t20\t3\t200\n5\t10\t1\n", (":2", "found 3 fields, expected 4")),
        ("u.data", "5\t20\t3\t200\n\n5\tx\t1\t100\n", (":3", "movieId is 'x'", "whole number")),
        ("u.data", "5\t20\t3\t200\n5\t\t1\t100\n", (":2", "movieId is ''")),
        ("u.data", "5\t20\tnan\t200\n", (":1", "rating is 'nan'", "finite")),
        ("u.data", "5\t20\t3\t-1\n", (":1", "timestamp is -1", "0 or more")),
        ("u.data", "5\t20\t3\t9\n5\t0\t3\t9\n", (":2", "movieId is 0", "1 or more")),
        ("u.data", "5\t20\t3\t9\n5\t21\t3\t9\n5\t20\t1\t9\n", (":3", "repeat", "--repeats")),
        ("u.data", b"5\t20\t3\t9\n\x80\t20\t3\t9\n", (":2", "utf-8")),
        ("u.data", "", ("empty",)),
        ("u.item", "10|x\n", (":1", "found 2 fields, expected 24")),
        ("u.item", film_100k(10, "A", "") + "\n" + film_100k(10, "A", ""), (":2", "film 10 is already in line 1")),
        ("u.item", film_100k(10, "A", "")[:-1] + "2", (":1", "genre flag '2'")),
        ("u.item", film_100k(10, "A", "").replace("10", "ten", 1), (":1", "'ten'", "whole number")),
        ("u.user", "5|x|M|other|1\n", (":1", "age is 'x'")),
        ("u.user", "5|20|M|other|1\n5|20|M|other|1\n", (":2", "user 5 is already in line 1")),
    ],
)
def test_movielens_100k_bad_files(tmp_path: Path, out: Path, name: str, content: str | bytes, parts: tuple[str, ...]) -> None:
    folder = make_100k(tmp_path / "ml")
    put(folder / name, content)
    refused("movielens", folder, out, name, *parts)


@pytest.mark.parametrize("name", ["u.item", "u.user"])
def test_movielens_missing_file(tmp_path: Path, out: Path, name: str) -> None:
    folder = make_100k(tmp_path / "ml")
    (folder / name).unlink()
    refused("movielens", folder, out, name, "no such file")


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("ratings.csv", "user,movieId,rating,timestamp\n1,2,3,4\n", (":1", "header", "userId,movieId,rating,timestamp")),
        ("ratings.csv", "userId,movieId,rating,timestamp\n", ("no records",)),
        ("ratings.csv", "userId,movieId,rating,timestamp\n1,2,3.5\n", (":2", "found 3 fields")),
        ("movies.csv", "movieId,title\n2,x\n", (":1", "header")),
        ("movies.csv", "movieId,title,genres\n2,a,b,c\n", (":2", "found 4 fields, expected 3")),
    ],
)
def test_movielens_csv_bad_files(tmp_path: Path, out: Path, name: str, content: str, parts: tuple[str, ...]) -> None:
    folder = make_csv(tmp_path / "ml")
    put(folder / name, content)
    refused("movielens", folder, out, name, *parts)


def test_movielens_folder_is_told_by_its_files(tmp_path: Path, out: Path) -> None:
    refused("movielens", tmp_path / "nowhere", out, "no such folder")
    refused("movielens", put(tmp_path / "ml.zip", "x"), out, "Unpack")
    (tmp_path / "none").mkdir()
    refused("movielens", tmp_path / "none", out, "none of them", "ratings.csv")
    refused("movielens", make_csv(make_100k(tmp_path / "both")), out, "u.data and ratings.csv side by side")


def test_double_colon_needs_both_colons(tmp_path: Path, out: Path) -> None:
    put(tmp_path / "ml/ratings.dat", "1::2::3::4\n1::5:9:3::4\n")
    put(tmp_path / "ml/movies.dat", "2::A (1999)::Drama\n")
    refused("movielens", tmp_path / "ml", out, "ratings.dat:2")


def review(user: str, item: str, time: object = 100, **more: object) -> str:
    return json.dumps({"reviewerID": user, "asin": item, "reviewText": "long", "overall": 5.0, "unixReviewTime": time} | more)


REVIEWS = "\n".join([review("A", "B00X", 300), review("C", "0007", 100, overall=1.0), review("A", "0007", 200), review("A", "B00Z", 200)])


@pytest.mark.parametrize("packed", [False, True])
def test_amazon(tmp_path: Path, out: Path, packed: bool) -> None:
    name = "reviews_Toys_5.json" + (".gz" if packed else "")
    source = put(tmp_path / name, gzip.compress(REVIEWS.encode()) if packed else REVIEWS)
    products = [
        "{'asin': 'B00X', 'categories': [['Toys', 'Games'], ['Toys', 'Dice']], 'brand': \"Bob's\", 'price': 3.5}",  # 2014: Python literals
        json.dumps({"asin": "0007", "category": ["Games"], "brand": "", "price": "$1,200.00"}),  # 2018: JSON
        json.dumps({"asin": "unseen", "price": 1}),
    ]
    put(tmp_path / "meta_Toys.json.gz", gzip.compress("\n".join(products).encode()))
    data = run("amazon", source, out)
    assert data.indexer["u"] == {"A": 1, "C": 2}
    assert data.indexer["i"] == {"B00X": 1, "0007": 2, "B00Z": 3}
    assert data.events("A") == [("0007", 200), ("B00Z", 200), ("B00X", 300)]
    assert data.item("B00X", "category") == ["Toys", "Games", "Dice"]
    assert (data.item("B00X", "brand"), data.item("0007", "brand"), data.item("B00Z", "brand")) == ("Bob's", None, None)
    assert [data.item(i, "price") for i in ("B00X", "0007", "B00Z")] == ["<=3.5", "<=1200", None]


def test_amazon_without_products_and_with_repeats(tmp_path: Path, out: Path) -> None:
    source = put(tmp_path / "x.json", "\n".join([review("A", "1"), review("A", "2"), review("A", "1"), review("A", "1", 101)]))
    lines: list[str] = []
    convert.convert("amazon", source, out, log=lines.append)
    assert Folder(out).events("A") == [(1, 100), (2, 100), (1, 100), (1, 101)]
    assert any("1 events repeat an earlier one in user, item and time: kept" in line for line in lines)
    assert any("no meta_x.json.gz or meta_x.json" in line for line in lines)
    assert run("amazon", source, out, repeats="drop", overwrite=True).events("A") == [(1, 100), (2, 100), (1, 101)]
    refused("amazon", source, out, "x.json:3", "repeat", repeats="error", overwrite=True)


def test_amazon_milliseconds(tmp_path: Path, out: Path) -> None:
    data = run("amazon", put(tmp_path / "x.json", review("A", "1", 1_400_000_000_123)), out)
    assert data.events("A") == [(1, 1_400_000_000)]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("{'reviewerID': 'A'}", ("not a JSON line", "reviewerID, asin")),
        ('{"reviewerID": "A", "asin": "B", "unixRev', ("not a JSON line",)),
        ("[1, 2]", ("found a JSON list",)),
        ('{"reviewerID": "A", "overall": 3}', ("asin, unixReviewTime missing", "found reviewerID, overall")),
        (review("", "B"), ("reviewerID is ''", "text")),
        (review("A", "B", "10"), ("unixReviewTime is '10'", "seconds")),
        (review("A", "B", -5), ("unixReviewTime is -5",)),
        (review("A", "B", True), ("unixReviewTime is True",)),
        (review("A", "B", overall="good"), ("overall is 'good'",)),
    ],
)
def test_amazon_bad_lines(tmp_path: Path, out: Path, line: str, parts: tuple[str, ...]) -> None:
    refused("amazon", put(tmp_path / "x.json", f"{REVIEWS}\n\n{line}\n"), out, "x.json:6", *parts)


def test_amazon_bad_files(tmp_path: Path, out: Path) -> None:
    refused("amazon", tmp_path / "none.json", out, "none.json", "no such file", "asin")
    refused("amazon", tmp_path, out, "a folder")
    refused("amazon", put(tmp_path / "e.json", ""), out, "empty")
    refused("amazon", put(tmp_path / "e.json.gz", gzip.compress(b"")), out, "no records")
    whole = gzip.compress("\n".join(review(str(i), str(i * 7919 % 1000)) for i in range(2000)).encode())
    refused("amazon", put(tmp_path / "cut.json.gz", whole[: len(whole) // 2]), out, "cut.json.gz:", "cut off")
    source = put(tmp_path / "y.json", REVIEWS)
    put(tmp_path / "meta_y.json", "{'asin': 'B00X'}\n{'asin': __import__('os')}\n")
    refused("amazon", source, out, "meta_y.json:2", "neither JSON nor")
    put(tmp_path / "meta_y.json", "{'asin': 'B00X'}\n{'asin': 'B00X'}\n")
    refused("amazon", source, out, "meta_y.json:2", "already in line 1")
    put(tmp_path / "meta_y.json", "{'title': 'B00X'}\n")
    refused("amazon", source, out, "meta_y.json:1", "asin")


def make_recbole(folder: Path, name: str = "toy") -> Path:
    head = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    put(folder / f"{name}.inter", head + "u1\ta\t4\t20.5\nu2\tb\t2\t7\nu1\tb\t1\t10\n")
    head = "item_id:token\tclass:token_seq\tmaker/x:token\tage:float\tvec:float_seq\n"
    put(folder / f"{name}.item", head + "b\tWar Drama\tX\t2\t1 2\na\t\t\t\t3 4\nc\tNew\tY\t9\t\n")
    put(folder / f"{name}.user", "user_id:token\tage:token\nu2\t30\nu1\t40\n")
    return folder


def test_recbole(tmp_path: Path, out: Path) -> None:
    lines: list[str] = []
    convert.convert("recbole", make_recbole(tmp_path / "toy"), out, log=lines.append)
    data = Folder(out)
    assert data.events("u1") == [("b", 10), ("a", 20)]
    assert data.indexer["i"] == {"a": 1, "b": 2}
    assert data.item("b", "class") == ["War", "Drama"]
    assert (data.item("b", "maker_x"), data.item("a", "maker_x")) == ("X", None)
    assert data.item("b", "age") == "<=2"
    assert [data.user(u, "user_age") for u in ("u1", "u2")] == ["40", "30"]  # the name was taken by the items
    assert "New" not in data.indexer["f"]["class"]
    assert any("lists of numbers of toy.item are skipped: vec" in line for line in lines)
    assert any("1 items of toy.item have no event" in line for line in lines)


def test_recbole_without_time_and_tables(tmp_path: Path, out: Path) -> None:
    put(tmp_path / "s/s.inter", "session_id:token\tweight:float\titem_id:token\n2\t0\t30\n1\t0\t20\n2\t0\t20\n2\t0\t20\n")
    data = run("recbole", tmp_path / "s", out)
    assert data.events("2") == [(30, 0), (20, 1), (20, 2)]
    assert data.indexer == {"u": {"2": 1, "1": 2}, "i": {30: 1, 20: 2}, "f": {}}
    assert data.schema.has_time is False


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("toy.inter", "user_id\titem_id:token\n1\t2\n", (":1", "'user_id'", "field:type")),
        ("toy.inter", "user_id:int\titem_id:token\n1\t2\n", (":1", "'user_id:int'", "token_seq")),
        ("toy.inter", "user_id:token\tuser_id:token\n1\t2\n", (":1", "named twice")),
        ("toy.inter", "uid:token\titem_id:token\n1\t2\n", (":1", "found the fields uid, item_id")),
        ("toy.inter", "user_id:token\titem_id:token\n1\t2\n1\t2\t3\n", (":3", "found 3 fields, expected 2")),
        ("toy.inter", "user_id:token\titem_id:token\n1\t2\n1\t\n", (":3", "item_id is ''")),
        ("toy.inter", "user_id:token\titem_id:token\ttimestamp:float\n1\t2\tx\n", (":2", "timestamp is 'x'")),
        ("toy.inter", "user_id:token\titem_id:token\ttimestamp:float\n1\t2\t1\n1\t2\tinf\n", (":3", "timestamp is 'inf'")),
        ("toy.inter", "user_id:token\titem_id:token\ttimestamp:float\n1\t2\t1\n1\t2\t-4\n", (":3", "timestamp is -4")),
        ("toy.inter", "user_id:token\titem_id:token\n", ("no records",)),
        ("toy.inter", "", ("empty",)),
        ("toy.item", "id:token\n1\n", (":1", "item_id")),
        ("toy.item", "item_id:token\tx:float\na\t1\nb\tlow\n", (":3", "x is 'low'")),
        ("toy.item", "item_id:token\tx:float\na\n", (":2", "found 1 fields, expected 2")),
        ("toy.item", "item_id:token\tx:float\na\t1\na\t2\n", (":3", "'a' is already in line 2")),
        ("toy.user", "user_id:token\tage:token\n\t3\n", (":2", "'' is empty")),
    ],
)
def test_recbole_bad_files(tmp_path: Path, out: Path, name: str, content: str, parts: tuple[str, ...]) -> None:
    folder = make_recbole(tmp_path / "toy")
    put(folder / name, content)
    refused("recbole", folder, out, name, *parts)


def test_recbole_finds_its_set(tmp_path: Path, out: Path) -> None:
    (tmp_path / "none").mkdir()
    refused("recbole", tmp_path / "none", out, "NAME.inter", "found none")
    folder = make_recbole(make_recbole(tmp_path / "two", "a"), "b")
    refused("recbole", folder, out, "a.inter, b.inter")
    make_recbole(folder, "two")
    assert run("recbole", folder, out).events("u2") == [("b", 7)]


def test_min_rating_and_numbers_after_it(tmp_path: Path, out: Path) -> None:
    data = run("movielens", make_100k(tmp_path / "ml"), out, min_rating=3)
    assert data.indexer["i"] == {20: 1, 30: 2}
    assert data.events("5") == [(20, 200), (30, 200)]
    assert data.events("9") == [(20, 50)]
    refused("movielens", tmp_path / "ml", out, "no event is left", min_rating=6, overwrite=True)
    refused("s3rec", put(tmp_path / "x.txt", "1 1\n"), out, "--min_rating", "no ratings", min_rating=1, overwrite=True)
    source = put(tmp_path / "x.json", review("A", "1") + "\n" + review("A", "2", overall=None))
    refused("amazon", source, out, "x.json:2", "no rating", min_rating=1, overwrite=True)


def test_k_core_is_repeated_until_stable(tmp_path: Path, out: Path) -> None:
    # item 3 has one event; without it user 3 has one, then item 4 has one: only users 1, 2 and items 1, 2 remain
    source = put(tmp_path / "x.txt", "1 1 2 4\n2 2 1\n3 3 4\n")
    data = run("s3rec", source, out, k_core=2)
    assert data.indexer["i"] == {1: 1, 2: 2}
    assert [[e["item_id"] for e in data.seq[u]] for u in (1, 2)] == [[1, 2], [2, 1]]
    refused("s3rec", source, out, "no event is left", k_core=5, overwrite=True)


def test_against_brute_force(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random events with many equal times, read in small blocks and written in small parts, against sorted()."""
    rng = np.random.default_rng(0)
    rows = [tuple(row) for row in rng.integers((1, 1, 0), (40, 90, 9), (3000, 3)).tolist()]
    lines = [f"u{u}\t{i}\t{t}" for u, i, t in rows]
    put(tmp_path / "r/r.inter", "user_id:token\titem_id:token\ttimestamp:float\n" + "\n".join(lines))
    monkeypatch.setattr(text, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(convert, "EVENTS_PER_PART", 200)
    monkeypatch.setattr(convert, "ROWS_PER_PART", 16)
    expected: dict[str, list] = {}
    for u, i, t in rows:
        expected.setdefault(f"u{u}", []).append((i, t))
    data = run("recbole", tmp_path / "r", out)
    assert len(list((out / "seq").iterdir())) > 10
    assert list(data.indexer["u"]) == list(expected)
    assert list(data.indexer["i"]) == list(dict.fromkeys(i for _, i, _ in rows))
    assert list(data.seq) == list(data.users) == list(range(1, len(expected) + 1))
    for user, events in expected.items():
        assert data.events(user) == sorted(events, key=lambda e: e[1])
    seen: set[tuple] = set()
    first = [row for row in rows if not (row in seen or seen.add(row))]
    dropped = run("recbole", tmp_path / "r", out, repeats="drop", overwrite=True)
    assert sum(map(len, dropped.seq.values())) == len(first)
    assert all(dropped.events(u) == sorted([(i, t) for v, i, t in first if f"u{v}" == u], key=lambda e: e[1]) for u in expected)


def test_indexer_is_plain(tmp_path: Path, out: Path) -> None:
    data = run("movielens", make_100k(tmp_path / "ml"), out)
    for table in (data.indexer["u"], data.indexer["i"], *data.indexer["f"].values()):
        assert type(table) is dict
        assert all(type(key) in (str, int) and type(value) is int for key, value in table.items())
        assert sorted(table.values()) == list(range(1, len(table) + 1))


def test_number_ids() -> None:
    numbers, order = number_ids(np.array([2, 0, 2]), ["a", "b", "c"], False)
    assert (numbers.tolist(), order) == ([2, 0, 1], ["c", "a"])
    assert number_ids(np.array([1, 0]), [1, 2], True)[1] == [1, 2]
    assert number_ids(np.array([1, 0]), [1, 2], False)[1] == [2, 1]
    assert number_ids(np.array([1, 0]), [1, 3], True)[1] == [3, 1]


def test_plain_keys() -> None:
    assert plain_keys(["12", "3"]) == [12, 3]
    assert plain_keys(["12", "03"]) == ["12", "03"]
    assert plain_keys([1, 2]) == [1, 2]
    assert plain_keys([str(2**64 - 1)]) == [2**64 - 1]
    assert plain_keys([str(2**64)]) == [str(2**64)]
    assert plain_keys(["\u0663"]) == ["\u0663"]


def test_bucket_floats() -> None:
    labels, count = bucket_floats(np.array([3.0, np.nan, 1.0, 3.0]), 10)
    assert (labels, count) == (["<=3", None, "<=1", "<=3"], 2)
    labels, count = bucket_floats(np.arange(1.0, 101.0), 4)
    assert count == 4
    assert [labels.count(name) for name in ("<=25", "<=50", "<=75", "<=100")] == [25] * 4
    assert bucket_floats(np.array([np.nan]), 4) == ([None], 0)


@pytest.mark.parametrize(("factor", "unit"), [(1, None), (10**3, "milli"), (10**6, "micro"), (10**9, "nano")])
def test_to_seconds(factor: int, unit: str | None) -> None:
    for dtype in (np.int64, np.float64):
        seconds, note = to_seconds(np.array([10**9 * factor, 1_500_000_000 * factor], dtype=dtype))
        assert seconds.dtype == np.int64
        assert seconds.tolist() == [10**9, 1_500_000_000]
        assert (note is None) if unit is None else (unit in note)


def test_find_repeats() -> None:
    def events(rows: list[tuple[int, int, int]]) -> RawEvents:
        users, items, times = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
        return RawEvents(users.astype(np.int32), items.astype(np.int32), [0, 1, 2], [0, 1, 2], times, None, str)

    made = events([(1, 1, 5), (1, 2, 5), (1, 1, 5), (0, 1, 5), (1, 1, 5), (1, 2, 6)])
    order = np.lexsort((made.timestamps, made.user_codes))
    assert convert.find_repeats(order, made).tolist() == [2, 4]
    assert convert.find_repeats(np.array([0]), events([(1, 1, 5)])).tolist() == []


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    source = put(tmp_path / "x.txt", "1 1 2 3\n2 3\n")
    script = [sys.executable, str(Path(convert.__file__))]
    done = subprocess.run([*script, "s3rec", str(source), str(tmp_path / "out")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "users 2, items 3, events 4" in done.stdout
    assert "1 users have fewer than 3 events" in done.stdout
    again = subprocess.run([*script, "s3rec", str(source), str(tmp_path / "out")], capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")
    assert "Traceback" not in again.stderr
    for bad in (["nope", "a", "b"], ["s3rec", "a"], ["s3rec", "a", "b", "--k_core", "-1"], ["s3rec", "a", "b", "--float_buckets", "0"]):
        assert convert.main(bad) == 2
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert convert.main(["s3rec", str(source), "."]) == 0
    assert sorted(os.listdir()) == sorted(convert.WRITTEN)


def test_beauty(public_data: Path, out: Path) -> None:
    source = public_data / "s3rec-beauty" / "Beauty.txt"
    data = run("s3rec", source, out)
    assert (len(data.seq), len(data.items)) == (22_363, 12_101)
    expected = {int(line.split()[0]): [int(i) for i in line.split()[1:]] for line in source.read_text().splitlines()}
    assert {user: [e["item_id"] for e in events] for user, events in data.seq.items()} == expected
    assert sum(map(len, data.seq.values())) == 198_502
    attributes = json.loads((public_data / "s3rec-beauty" / "Beauty_item2attributes.json").read_text())
    assert all(data.item(int(item), "attributes") == values for item, values in list(attributes.items())[:500])


def test_ml_100k(public_data: Path, out: Path) -> None:
    data = run("movielens", public_data / "ml-100k", out)
    assert (len(data.seq), len(data.items), sum(map(len, data.seq.values()))) == (943, 1_682, 100_000)
    rows = [tuple(map(int, line.split())) for line in (public_data / "ml-100k" / "u.data").read_text().splitlines()]
    for user in (1, 405, 943):
        mine = sorted(((item, time) for u, item, _, time in rows if u == user), key=lambda e: e[1])
        assert data.events(str(user)) == mine
    assert data.item(1, "genre") == ["Animation", "Children's", "Comedy"]
    assert [data.user("1", f) for f in ("age", "gender", "occupation")] == ["18", "M", "technician"]
    assert {f.id: f.cardinality for f in data.schema.features} == {"genre": 19, "year": 71, "age": 7, "gender": 2, "occupation": 21}
