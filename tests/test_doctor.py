"""`main.py --doctor`: each of the planted faults is found, with its remedy; healthy data of both layouts and public sets have none."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_main import run_main

import convert
import main
from doctor import as_json, lines, verdict
from doctor_findings import FAIL, PASS, WARN, Finding
from synthetic import generate

SETTINGS = ["--holdout_fraction", 0.5, "--batch_size", 32, "--max_seq_length", 30, "--hidden_units", 8, "--num_heads", 1]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    generate(folder / "A", 420, 500, "jsonl", predict=30, seed=3, max_length=30, mean_length=20)
    generate(folder / "B", 420, 500, "parquet", seed=3, max_length=30, mean_length=20)
    return folder


def examined(cwd: Path, data: Path, *flags: object, environ: dict | None = None) -> tuple[int, list[Finding]]:
    result = run_main("--doctor", "--json", "--data_path", data, *SETTINGS, *flags, cwd=cwd, environ=environ)
    tree = json.loads(result.out)
    assert tree["status"] == next(level for level in (FAIL, WARN, PASS) if tree["counts"][level])
    return result.status, [Finding(**row) for row in tree["findings"]]


@pytest.mark.parametrize("layout", ["A", "B"])
def test_healthy_data_pass(healthy, tmp_path, layout):
    status, found = examined(tmp_path, healthy / layout, "--max_bad_lines", 5)
    assert status == 0
    assert [f for f in found if f.level != PASS] == []
    checks = {f.check for f in found}
    assert {"env.torch", "paths.data_path", "settings.memory", "data.times", "data.leaks", "data.candidates", "data.embedding 81"} <= checks


def test_a_converted_public_set_passes(tmp_path):
    rng = np.random.default_rng(1)
    rows = [f"{user} " + " ".join(map(str, rng.choice(60, 8, replace=False) + 1)) for user in range(1, 301)]
    (tmp_path / "set.txt").write_text("\n".join(rows) + "\n")
    assert run_main("s3rec", "set.txt", "data", cwd=tmp_path, entry=convert).status == 0
    result = run_main("--doctor", "--data_path", "data", "--protocol", "leave_one_out", cwd=tmp_path)
    assert result.status == 0
    assert [line for line in result.out.splitlines() if line.startswith((WARN, FAIL)) and "data." in line] == []


# ---- planted faults: (name, what is done to the folder, flags, level, check, words of the text) ---------------------------


def sequences(change: Callable[[list], None]) -> Callable[[Path], None]:
    """Edit all lines of seq.jsonl, parsed; the file of offsets goes."""

    def edit(data: Path) -> None:
        users = [json.loads(line) for line in (data / "seq.jsonl").read_text().splitlines()]
        change(users)
        (data / "seq.jsonl").write_text("".join(json.dumps(user) + "\n" for user in users))
        (data / "seq_offsets.pkl").unlink(missing_ok=True)

    return edit


def events_of(user: list) -> list:
    return [record for record in user if record[1] is not None]


def profile_of(user: list) -> dict:
    return next(record for record in user if record[1] is None)[2]


def every_event(change: Callable[[list], None]) -> Callable[[Path], None]:
    return sequences(lambda users: [change(record) for user in users for record in events_of(user)])


def set_times(new: Callable[[int, int], int]) -> Callable[[Path], None]:
    """new(place in the user's sequence, time) -> time."""

    def change(users: list) -> None:
        for user in users:
            for place, record in enumerate(events_of(user)):
                record[5] = new(place, record[5])

    return sequences(change)


def profiles(value: Callable[[int, list], dict]) -> Callable[[Path], None]:
    """value(number of the user, its events) -> features put into its profile."""

    def change(users: list) -> None:
        for number, user in enumerate(users, 1):
            profile_of(user).update(value(number, events_of(user)))

    return sequences(change)


def pickled(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(data: Path) -> None:
        tree = pickle.loads((data / name).read_bytes())
        tree = change(tree) or tree
        (data / name).write_bytes(pickle.dumps(tree))

    return edit


def twice(users: list) -> None:
    for user in users:
        event = events_of(user)[0]
        user.insert(user.index(event), list(event))


def copies(users: list) -> None:
    """Users 1 to 40 have the history of users 101 to 140."""
    for number in range(40):
        own, profile = users[number][0][0], profile_of(users[number])
        users[number] = [[own, *record[1:]] for record in users[number + 100] if record[1] is not None]
        users[number].append([own, None, profile, None, None, users[number][-1][5]])


def swapped(users: list) -> None:
    events = events_of(users[5])
    events[0][5], events[-1][5] = events[-1][5], events[0][5]


def foreign_candidates(data: Path) -> None:
    rows = [json.dumps({"creative_id": 5_000 + k, "retrieval_id": k, "features": {}}) for k in range(50)]
    (data / "predict_set.jsonl").write_text("\n".join(rows) + "\n")


def cold_candidates(data: Path) -> None:
    known = next(iter(pickle.loads((data / "indexer.pkl").read_bytes())["i"]))
    rows = [
        json.dumps({"creative_id": creative, "retrieval_id": k, "features": {}}) for k, creative in enumerate([known, *range(5000, 5050)])
    ]
    (data / "predict_set.jsonl").write_text("\n".join(rows) + "\n")


def cut_line(data: Path) -> None:
    text = (data / "seq.jsonl").read_text().splitlines()
    text[7] = text[7][: len(text[7]) // 2]
    (data / "seq.jsonl").write_text("\n".join(text) + "\n")


def cut_part(folder: Path) -> None:
    (part,) = folder.glob("*.parquet")
    part.write_bytes(part.read_bytes()[:-100])


def both_layouts(data: Path) -> None:
    (data / "seq").mkdir()
    (data / "seq/part-00000.parquet").write_bytes(b"PAR1")


def placeholder(users: list) -> None:
    for user in users:
        for record in events_of(user)[::3]:
            record[1], record[3] = 1, {}


def far_item(users: list) -> None:
    events_of(users[3])[0][1] = 99_999


def foreign(rows: dict) -> dict:
    return {f"x{creative}": vector for creative, vector in rows.items()}


def nothing(data: Path) -> None:
    pass


def shifted(offsets: list) -> None:
    """Number, first and last are right."""
    offsets[5] += 3


def fewer_items(data: Path) -> None:
    """Ten items have no features of their own any more, whatever the layout."""
    if (path := data / "item_feat_dict.json").exists():
        path.write_text(json.dumps(dict(list(json.loads(path.read_text()).items())[10:])))
        return
    (part,) = (data / "item_feat").glob("*.parquet")
    pq.write_table(pq.read_table(part).slice(10), part)


def candidates_twice(data: Path) -> None:
    known = list(pickle.loads((data / "indexer.pkl").read_bytes())["i"])[:30]
    pairs = list(enumerate([*known, *known[:3]]))
    if (data / "seq.jsonl").exists():
        rows = [json.dumps({"creative_id": creative, "retrieval_id": k, "features": {}}) for k, creative in pairs]
        (data / "predict_set.jsonl").write_text("\n".join(rows) + "\n")
        return
    (data / "candidate").mkdir()
    table = pa.table({"creative_id": [int(creative) for _, creative in pairs], "retrieval_id": [k for k, _ in pairs]})
    pq.write_table(table, data / "candidate/part-00000.parquet")


def parquet(folder: str, change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    """Edit the one part of a folder of layout B."""

    def edit(data: Path) -> None:
        (part,) = (data / folder).glob("*.parquet")
        pq.write_table(change(pq.read_table(part)), part)

    return edit


def events_of_user(change: Callable[[int, list], object]) -> Callable[[pa.Table], pa.Table]:
    """change(row, events as dictionaries) edits the events of each user of seq/."""

    def edit(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        for number, row in enumerate(rows):
            change(number, row["seq"])
        return pa.Table.from_pylist(rows, schema=table.schema)

    return edit


EMBEDDING = "creative_emb/emb_81_32.pkl"
LATE = int(time.time()) + 400 * 86_400
FAULTS = [
    ("a cut line", cut_line, [], FAIL, "data.read", "cut off"),
    ("the cut line, counted", cut_line, [], WARN, "data.rejected", "1 lines or rows"),
    ("no sequences", lambda data: (data / "seq.jsonl").unlink(), [], FAIL, "data.read", "seq.jsonl"),
    ("both layouts", both_layouts, [], FAIL, "data.read", "both"),
    ("no indexer", lambda data: (data / "indexer.pkl").unlink(), [], FAIL, "data.read", "indexer.pkl"),
    ("an item out of range", sequences(far_item), [], FAIL, "data.read", "outside 1..500"),
    ("events out of order", sequences(swapped), [], FAIL, "data.read", "comes before"),
    ("a user twice", sequences(lambda users: users.append(users[0])), [], FAIL, "data.read", "comes twice"),
    ("no profile", sequences(lambda users: users[2].remove(next(r for r in users[2] if r[1] is None))), [], FAIL, "data.read", "profile"),
    ("milliseconds", set_times(lambda place, t: 1000 * t), [], FAIL, "data.times", "milliseconds"),
    ("positions for times", set_times(lambda place, t: place), [], FAIL, "data.times", "positions"),
    ("the future", set_times(lambda place, t: LATE + place), [], WARN, "data.times", "future"),
    ("events twice", sequences(twice), [], WARN, "data.repeated events", "stand twice"),
    ("copied users", sequences(copies), [], WARN, "data.users alike", "another one's history"),
    ("a placeholder item", sequences(placeholder), [], WARN, "data.most popular item", "item 1 has"),
    ("a feature without values", profiles(lambda number, events: {"104": 0}), [], WARN, "data.coverage", "104"),
    ("an id in disguise", profiles(lambda number, events: {"109": number}), [], WARN, "data.user ids", "109"),
    ("a leak", profiles(lambda number, events: {"109": events[-1][1]}), [], WARN, "data.leaks", "109 tells the item"),
    ("values past the indexer", pickled("indexer.pkl", lambda tree: tree["f"].update({"103": {"x": 1}})), [], WARN, "data.indexer", "103"),
    ("offsets of another file", pickled("seq_offsets.pkl", lambda offsets: [0, 5, 10]), [], WARN, "data.files", "3 offsets"),
    ("items without features", fewer_items, [], WARN, "data.missing", "items without a row in item_feat_dict.json: 10"),
    ("candidates twice", candidates_twice, [], WARN, "data.candidates", "came before, left out: 3"),
    ("one offset beside a line", pickled("seq_offsets.pkl", shifted), [], WARN, "data.files", "offset 6 is "),
    ("foreign vectors", pickled(EMBEDDING, foreign), [], FAIL, "data.embedding 81", "no item has"),
    ("few vectors", pickled(EMBEDDING, lambda rows: dict(list(rows.items())[:50])), [], WARN, "data.embedding 81", "only"),
    ("vectors alike", pickled(EMBEDDING, lambda rows: {k: np.ones(32, np.float32) for k in rows}), [], FAIL, "data.embedding 81", "alike"),
    ("narrow vectors", pickled(EMBEDDING, lambda rows: {k: v[:16] for k, v in rows.items()}), [], FAIL, "data.read", "16 values"),
    ("vectors with NaN", pickled(EMBEDDING, lambda rows: {k: np.nan * v for k, v in rows.items()}), [], FAIL, "data.read", "nan"),
    ("foreign candidates", foreign_candidates, [], FAIL, "data.candidates", "knows 0%"),
    ("cold candidates", cold_candidates, [], WARN, "data.candidates", "knows 2%"),
    ("few users to test on", nothing, ["--holdout_fraction", 0.1], WARN, "data.test", "21 users"),
    ("short windows", nothing, ["--max_seq_length", 3], WARN, "settings.max_seq_length", "newest"),
    ("an idle option", nothing, ["--lr_gamma", 0.3], WARN, "settings.effect", "no effect"),
    ("a long warm-up", nothing, ["--warmup_steps", 10_000], WARN, "settings.warmup_steps", "never gets"),
    ("a batch of everybody", nothing, ["--batch_size", 4096], WARN, "settings.batch_size", "one small step"),
    ("a table too large", nothing, ["--hidden_units", 2**24], FAIL, "settings.memory", "take"),
    ("no such device", nothing, ["--device", "cuda:99"], FAIL, "settings.device", "no such CUDA device"),
    ("half precision on a CPU", nothing, ["--precision", "fp16", "--device", "cpu"], WARN, "settings.precision", "fp16"),
    ("a log path that is a file", nothing, ["--log_path", "file/log"], FAIL, "paths.log_path", "no folder"),
    ("a run in the log path", nothing, ["--log_path", "old"], FAIL, "paths.log_path", "holds a run (finished)"),
    ("too many threads", nothing, ["--num_threads", 500], WARN, "env.threads", "500 threads"),
]  # fmt: skip


def finds_it(tmp_path, flags, level, check, words):
    """The doctor finds the fault in tmp_path/data, each finding with a remedy and in a line, suspects nothing else, and leaves nothing."""
    before = sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts)
    status, found = examined(tmp_path, tmp_path / "data", *flags)
    matching = [f for f in found if f.level == level and f.check == check and words in f.text]
    assert matching, "\n".join(line for line in lines(found) if not line.startswith(PASS))
    assert all(f.remedy for f in found if f.level != PASS), "\n".join(lines(found))
    assert all("\n" not in f.text + f.remedy for f in found)
    assert status == (1 if any(f.level == FAIL for f in found) else 0)
    # A planted fault is no reason to suspect the machine or anything of another section, but for what follows from it.
    assert {f.check.split(".")[0] for f in found if f.level != PASS} <= {check.split(".")[0], "data", "settings"}
    assert sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts) == before
    assert not list((tmp_path / "cache").glob(".tmp-*"))


@pytest.mark.parametrize(
    ("change", "flags", "level", "check", "words"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS]
)
def test_planted_faults_are_found(healthy, tmp_path, change, flags, level, check, words):
    shutil.copytree(healthy / "A", tmp_path / "data", ignore=shutil.ignore_patterns("synthetic.json"))
    change(tmp_path / "data")
    (tmp_path / "file").touch()
    (tmp_path / "old").mkdir()
    (tmp_path / "old/status.json").write_text('{"state": "finished", "step": 3}')
    finds_it(tmp_path, flags, level, check, words)


# The same in layout B, and what only parquet can have.
FAULTS_B = [
    ("a part that is cut off", lambda data: cut_part(data / "seq"), [], FAIL, "data.read", "seq"),
    ("no user features", lambda data: shutil.rmtree(data / "user_feat"), [], FAIL, "data.read", "user_feat"),
    ("a user twice", parquet("seq", lambda table: pa.concat_tables([table, table.slice(0, 1)])), [], FAIL, "data.read", "comes twice"),
    ("no profile", parquet("user_feat", lambda table: table.slice(1)), [], FAIL, "data.read", "has no row in user_feat"),
    ("a column that is gone", parquet("seq", lambda table: table.drop_columns("seq")), [], FAIL, "data.read", "column 'seq' is missing"),
    ("an item out of range", parquet("seq", events_of_user(lambda n, seq: n == 3 and seq[0].update(item_id=99_999))), [], FAIL, "data.read",
     "outside 1..500"),
    ("milliseconds", parquet("seq", events_of_user(lambda n, seq: [e.update(timestamp=1000 * e["timestamp"]) for e in seq])), [], FAIL,
     "data.times", "milliseconds"),
    ("events twice", parquet("seq", events_of_user(lambda n, seq: seq.insert(0, dict(seq[0])))), [], WARN, "data.repeated events",
     "stand twice"),
    ("items without features", fewer_items, [], WARN, "data.missing", "items without a row in item_feat: 10"),
    ("candidates twice", candidates_twice, [], WARN, "data.candidates", "came before, left out: 3"),
    ("both layouts", lambda data: (data / "seq.jsonl").write_text("[]\n"), [], FAIL, "data.read", "both"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "flags", "level", "check", "words"), [fault[1:] for fault in FAULTS_B], ids=[fault[0] for fault in FAULTS_B]
)
def test_planted_faults_of_the_parquet_layout_are_found(healthy, tmp_path, change, flags, level, check, words):
    shutil.copytree(healthy / "B", tmp_path / "data", ignore=shutil.ignore_patterns("synthetic.json"))
    change(tmp_path / "data")
    finds_it(tmp_path, flags, level, check, words)


# ---- schema.json and indexer.pkl that are not what they should be ---------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted public set with a multi-valued feature: the parquet layout with a schema.json of its own."""
    folder = tmp_path_factory.mktemp("converted")
    rng = np.random.default_rng(1)
    rows = [f"{user} " + " ".join(map(str, rng.choice(60, 8, replace=False) + 1)) for user in range(1, 301)]
    (folder / "set.txt").write_text("\n".join(rows) + "\n")
    (folder / "set_item2attributes.json").write_text(json.dumps({item: [item % 9 + 1, item % 4 + 1] for item in range(1, 61)}))
    assert run_main("s3rec", "set.txt", "data", cwd=folder, entry=convert).status == 0
    return folder / "data"


def with_feature(**keys: object) -> str:
    """A schema.json of one feature: the converted one's, with other values."""
    return json.dumps({"has_time": False, "features": [{"id": "attributes", "side": "item", "kind": "multi"} | keys]})


SCHEMAS = [
    ("null", "null", "found null"),
    ("broken", '{"features": [', "not readable as JSON"),
    ("empty", "", "not readable as JSON"),
    ("no text", b"\xff\xfe{\x00", "not readable as JSON"),
    ("nested", "[" * 100_000, "not readable as JSON"),
    ("a list", "[]", "found list"),
    ("a number", "3", "found int"),
    ("no features", "{}", "an object without a list of features"),
    ("features null", '{"features": null}', "an object without a list of features"),
    ("features an object", '{"features": {}}', "an object without a list of features"),
    ("a feature null", '{"features": [null]}', "found None"),
    ("no id", with_feature(id=None), "an id is"),
    ("a path for an id", with_feature(id="../x"), "an id is"),
    ("an unknown kind", with_feature(kind="many"), "kind is 'many'"),
    ("a list for a kind", with_feature(kind=["multi"]), "kind is ['multi']"),
    ("no side", with_feature(side=None), "side is None"),
    ("an unknown key", with_feature(colour=1), "found {"),
    ("a text for a number", with_feature(cardinality="9"), "cardinality is '9'; expected a whole number"),
    ("a broken number", with_feature(cardinality=1.5), "cardinality is 1.5"),
    ("a number too large", with_feature(cardinality=10**30), "expected a whole number"),
    ("no width", with_feature(kind="embedding", width=None), "width is None"),
    ("a number for a name", with_feature(name=3), "name is 3; expected a text"),
    ("twice", json.dumps({"features": json.loads(with_feature())["features"] * 2}), "listed twice"),
    ("a text for has_time", json.dumps(json.loads(with_feature()) | {"has_time": "yes"}), "has_time is 'yes'"),
    ("another kind than the file's", with_feature(kind="single"), "expected whole numbers"),
]


def one_failure(result, words: str, path: Path) -> None:
    """The doctor found one fault, told where it lies and what to do, and ended with status 1."""
    assert result.status == 1 and "Traceback" not in result.err
    failures = [line for line in result.out.splitlines() if line.startswith(FAIL)]
    assert len(failures) == 1 and "data.read" in failures[0] and words in failures[0] and " -> " in failures[0], result.out
    assert str(path) in failures[0]


@pytest.mark.parametrize(("content", "words"), [case[1:] for case in SCHEMAS], ids=[case[0] for case in SCHEMAS])
def test_a_schema_that_is_none(converted, tmp_path, content, words):
    shutil.copytree(converted, tmp_path / "data")
    path = tmp_path / "data/schema.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = run_main("--doctor", "--data_path", tmp_path / "data", "--protocol", "leave_one_out", cwd=tmp_path)
    one_failure(result, words, path if words != "expected whole numbers" else tmp_path / "data/item_feat")


def test_a_folder_in_the_place_of_the_schema(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "data")
    (tmp_path / "data/schema.json").unlink()
    (tmp_path / "data/schema.json").mkdir()
    one_failure(run_main("--doctor", "--data_path", "data", cwd=tmp_path), "Is a directory", Path("data/schema.json"))


def test_a_schema_with_a_mark_of_windows_is_read(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "data")
    path = tmp_path / "data/schema.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert run_main("--doctor", "--data_path", "data", "--protocol", "leave_one_out", cwd=tmp_path).status == 0


INDEXERS = [
    ("null", lambda tree: None, "found NoneType"),
    ("a list", lambda tree: [], "found list"),
    ("no users", lambda tree: tree | {"u": None}, "found keys"),
    ("items in a list", lambda tree: tree | {"i": [1]}, "found keys"),
    ("no items", lambda tree: tree | {"i": {}}, "'i' holds no item"),
    ("nothing at all", lambda tree: {"u": {}, "i": {}, "f": {}}, "'i' holds no item"),
    ("texts for numbers", lambda tree: tree | {"i": {raw: str(n) for raw, n in tree["i"].items()}}, "expected a number"),
    ("a feature null", lambda tree: tree | {"f": {"100": None}}, "of type NoneType"),
]


@pytest.mark.parametrize(("change", "words"), [case[1:] for case in INDEXERS], ids=[case[0] for case in INDEXERS])
def test_an_indexer_that_is_none(healthy, tmp_path, change, words):
    shutil.copytree(healthy / "A", tmp_path / "data")
    path = tmp_path / "data/indexer.pkl"
    path.write_bytes(pickle.dumps(change(pickle.loads(path.read_bytes()))))
    one_failure(run_main("--doctor", "--data_path", tmp_path / "data", *SETTINGS, cwd=tmp_path), words, path)


def test_the_demo_data_with_a_fault(tmp_path, monkeypatch):
    """Without a data path: the demo data are made and pass; what is broken in them afterwards is found, and they are not made again."""
    monkeypatch.setattr(main, "DEMO", main.DEMO | {"users": 420, "items": 500})
    assert run_main("--doctor", *SETTINGS, cwd=tmp_path).status == 0
    good = (tmp_path / "demo_data/seq.jsonl").read_text()
    (tmp_path / "demo_data/schema.json").write_text("null")
    one_failure(run_main("--doctor", *SETTINGS, cwd=tmp_path), "found null", Path("demo_data/schema.json"))
    (tmp_path / "demo_data/schema.json").unlink()
    (tmp_path / "demo_data/seq.jsonl").write_text(good[:-100])
    result = run_main("--doctor", *SETTINGS, cwd=tmp_path)
    assert result.status == 1 and "Traceback" not in result.err and "demo_data/seq.jsonl:420" in result.out
    assert (tmp_path / "demo_data/seq.jsonl").read_text() == good[:-100]


def test_the_places_of_bad_lines_are_named_and_no_file_that_is_gone(healthy, tmp_path):
    shutil.copytree(healthy / "A", tmp_path / "data")
    cut_line(tmp_path / "data")
    _, found = examined(tmp_path, tmp_path / "data")
    (finding,) = [f for f in found if f.check == "data.rejected"]
    assert f"first {tmp_path}/data/seq.jsonl:8" in finding.text and "listed in" not in finding.text and ".tmp-" not in finding.text
    # Where the run would keep the list, it is named, and there.
    _, found = examined(tmp_path, tmp_path / "data", "--max_bad_lines", 3)
    (finding,) = [f for f in found if f.check == "data.rejected"]
    assert "seq.jsonl:8; listed in " in finding.text and Path(tmp_path, finding.text.split("listed in ")[1]).is_file()


def test_a_bit_that_the_disk_lost_in_the_cache_is_found(healthy, tmp_path):
    """Size, time and inode are as they were when it was verified: the doctor hashes all the same, and the store is made anew."""
    _, found = examined(tmp_path, healthy / "A")
    assert [f.level for f in found if f.check == "data.cache"] == [PASS]
    (file,) = tmp_path.glob("cache/store-*/item_ids.bin")
    facts, data = file.stat(), bytearray(file.read_bytes())
    data[100] ^= 4
    with open(file, "r+b") as out:
        out.write(data)
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    status, found = examined(tmp_path, healthy / "A")
    (finding,) = [f for f in found if f.level != PASS]
    assert status == 0 and finding.check == "data.cache" and "item_ids.bin is not what was written; compiling it anew" in finding.text
    assert [f.level for f in examined(tmp_path, healthy / "A")[1] if f.check == "data.cache"] == [PASS]


def test_a_missing_data_folder_is_said_with_who_set_it(tmp_path):
    result = run_main("--doctor", cwd=tmp_path, environ={"TRAIN_DATA_PATH": "nowhere"})
    assert result.status == 1
    assert "FAIL  paths.data_path" in result.out and "environment TRAIN_DATA_PATH" in result.out


def test_mistakes_in_settings_are_findings(tmp_path):
    result = run_main("--doctor", "--json", "--hidden_units", 10, "--num_heads", 4, "--lr", "fast", cwd=tmp_path)
    assert result.status == 1
    found = json.loads(result.out)["findings"]
    assert [row["check"] for row in found] == ["settings.value"] * len(found) and len(found) >= 1 and "fast" in found[0]["text"]


def test_json_needs_the_doctor(tmp_path):
    result = run_main("--json", cwd=tmp_path)
    assert result.status == 2 and "--doctor" in result.err


def test_a_line_a_finding_and_a_verdict():
    found = [Finding(PASS, "env.a", "good"), Finding(FAIL, "data.bb", "bad", "mend it")]
    assert list(lines(found)) == ["PASS  env.a    good", "FAIL  data.bb  bad -> mend it", "doctor: 1 PASS, 0 WARN, 1 FAIL"]
    assert verdict(found).endswith("1 FAIL")
    assert json.loads(as_json(found))["status"] == FAIL
