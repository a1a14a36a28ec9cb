"""docs/RELIABILITY.md, row 16: infer() answers a thousand odd users, each with ten different candidates, in the order of the file."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reliability_world import rounds
from test_infer import ITEMS, World, call, known_items, pool_of, seen_by, user_line, with_users, world  # noqa: F401  (a fixture)

from schema import TENCENT_GR

pytestmark = pytest.mark.reliability
KINDS = (
    "no events",
    "all unknown items",
    "unknown items of text",
    "all candidates seen",
    "nearly all seen",
    "one event",
    "1,000 events",
    "repeated",
    "cold features",
    "no profile",
    "two profiles",
    "times out of order",
    "no times",
    "one item again and again",
    "odd values",
)


def odd_line(kind: str, name: object, creatives: list[int], known: dict[int, int], chance: random.Random) -> list[list]:
    """A user's line of predict_seq.jsonl. creatives: the candidates; known: {creative id: item number}."""
    number = lambda creative: known.get(creative, creative)
    few = [chance.randrange(1, ITEMS + 1) for _ in range(chance.randrange(2, 12))]
    items = {
        "no events": [],
        "all unknown items": [10**17 + chance.randrange(10**6) for _ in range(9)],
        "unknown items of text": [f"creative {k}" for k in range(5)],
        "all candidates seen": list(map(number, creatives)),
        "nearly all seen": list(map(number, chance.sample(creatives, len(creatives) - chance.randrange(1, 10)))),
        "one event": few[:1],
        "1,000 events": [chance.randrange(1, ITEMS + 1) for _ in range(1000)],
        "one item again and again": few[:1] * 40,
    }.get(kind, few)
    line = user_line(name, items)
    if kind == "cold features":
        strings = {f.id: f"unseen_{f.id}" for f in TENCENT_GR.select("user", "single")}
        lists = {f.id: ["unseen", 1, None] for f in TENCENT_GR.select("user", "multi")}
        line = user_line(name, items, strings | lists, {f.id: "unseen" for f in TENCENT_GR.select("item", "single")})
    elif kind == "no profile":
        line = line[:-1]
    elif kind == "two profiles":
        line = [line[-1], *line]
    elif kind == "times out of order":
        chance.shuffle(line)
    elif kind == "no times":
        line = [[*record[:5], None] for record in line]
    elif kind == "odd values":
        for record in line[:-1]:
            record[3], record[4] = {"100": -3, "101": 1.5, "102": None, "999": [1]}, None
        line[-1][2] = {"103": -1, "106": 4, "107": [None, -2, 2**40], "104": [1]}
    return line


def odd_users(count: int, kinds: Sequence[str], chance: random.Random, make: Callable[[int, str], object]) -> list:
    """What make(number, kind) gives for so many users, the kinds in turn; a repeated one is a user that came before."""
    made: list = []
    for k in range(count):
        kind = kinds[k % len(kinds)]
        made.append(chance.choice(made) if kind == "repeated" and made else make(k, kind))
    return made


@pytest.mark.parametrize("count", rounds(1000, 45)[1:])
def test_odd_users_are_all_answered(world: World, tmp_path, count):  # noqa: F811
    chance, known, pool = random.Random(16), known_items(world.A), list(pool_of(world.A))
    names = list(json.loads((world.A / "predict_seq.jsonl").read_text().splitlines()[0])[0][:1])

    def line_of(k: int, kind: str) -> list[list]:
        name = chance.choice([f"odd user {k}", names[0], f"nutzer_{k}_\u00e9\u4e2d", 10_000_000 + k])
        return odd_line(kind, name, pool, known, chance)

    lines = odd_users(count, KINDS, chance, line_of)
    data = with_users(world, tmp_path, lines)
    top10s, users = call(world, data)
    assert users == [str(line[0][0]) for line in lines] and len(top10s) == count
    for k, (top10, line) in enumerate(zip(top10s, lines, strict=True)):
        assert len(top10) == len(set(top10)) == 10 and set(top10) <= set(pool), (KINDS[k % len(KINDS)], top10)
        seen = {record[1] for record in line if record[1] is not None}
        unseen = [creative for creative in pool if known.get(creative, creative) not in seen]
        assert set(top10[: len(unseen)]) <= set(unseen), KINDS[k % len(KINDS)]  # what was not seen comes first
    first: dict = {}
    for line, top10 in zip(lines, top10s, strict=True):
        assert first.setdefault(json.dumps(line), top10) == top10  # a repeated line gets the same answer


@pytest.mark.parametrize("count", rounds(1000, 45)[1:])
def test_odd_users_in_parquet_are_all_answered(world: World, tmp_path, count):  # noqa: F811
    """The same in layout B, where users are numbers."""
    chance, known, pool = random.Random(17), known_items(world.A), list(pool_of(world.A))
    data = tmp_path / "data"
    shutil.copytree(world.B, data)
    shutil.rmtree(data / "seq")
    kinds = [kind for kind in KINDS if kind not in ("unknown items of text", "cold features", "no profile", "two profiles", "odd values")]

    def row_of(k: int, kind: str) -> tuple[int, list[dict]]:
        events = [record for record in odd_line(kind, 0, pool, known, chance) if record[1] is not None]
        number = chance.choice([k + 1, 10_000_000 + k])
        return number, [{"item_id": e[1], "action_type": e[4], "timestamp": e[5]} for e in events]

    rows = odd_users(count, kinds, chance, row_of)
    event = pa.struct([("item_id", pa.uint64()), ("action_type", pa.int8()), ("timestamp", pa.int64())])
    table = pa.table({"user_id": [number for number, _ in rows], "seq": pa.array([events for _, events in rows], pa.list_(event))})
    (data / "seq").mkdir()
    pq.write_table(table.slice(0, count // 2), data / "seq/part-0.parquet")
    pq.write_table(table.slice(count // 2), data / "seq/part-1.parquet")
    top10s, users = call(world, data)
    assert len(users) == len(top10s) == count
    assert [int(name.removeprefix("user_")) for name in users] == [number for number, _ in rows]
    for top10, (_, events) in zip(top10s, rows, strict=True):
        assert len(top10) == len(set(top10)) == 10 and set(top10) <= set(pool)
        unseen = [creative for creative in pool if known.get(creative, creative) not in {e["item_id"] for e in events}]
        assert set(top10[: len(unseen)]) <= set(unseen)


def test_the_worlds_users_are_in_the_files_order(world: World):  # noqa: F811
    _, users = call(world, world.A)
    assert users == list(seen_by(world.A)) and Path(world.A).name == "A-eval"
