"""docs/RELIABILITY.md, rows 2 and 11: a store whose builder crashes anywhere, and one that eight processes want at once."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from raw_worlds import CREATIVE, make_world, write_jsonl
from reliability_world import Driver, rounds

from store import content_hash, open_store

pytestmark = pytest.mark.reliability


class World:
    """Data with vectors in layout A, its store's hash, and a process that opens it in forks."""

    def __init__(self, folder: Path, users: int) -> None:
        self.folder, self.data = folder, write_jsonl(make_world(users, 200, mean_length=10), folder / "data")
        self.write_vectors(1.0)
        self.driver = Driver(folder)
        self.hash = content_hash(self.open(folder / "reference"))

    def write_vectors(self, value: float) -> None:
        (self.data / "creative_emb/emb_81_32").mkdir(parents=True, exist_ok=True)
        rows = [{"anonymous_cid": str(CREATIVE + 1 + k * 7 % 200), "emb": [value + k] * 32} for k in range(200)]  # not in the items' order
        (self.data / "creative_emb/emb_81_32/part-0").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def open(self, cache: Path):
        return open_store(self.data, cache, embeddings=("81",), progress=False, log=lambda _: None)

    def build(self, cache: Path, builders: int, **how: object) -> list:
        order = {"builders": builders, "data": str(self.data), "cache": str(cache), "embeddings": ["81"]}
        return self.driver.ask(order | how)["events"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = World(tmp_path_factory.mktemp("store"), 600)
    yield made
    made.driver.close()


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.rglob("*") if ".tmp-" in path.name or path.name.startswith((".probe", ".tmp"))]


def of(events: list, word: str) -> list:
    return [event for event in events if event[1] == word]


@pytest.mark.parametrize("count", rounds(20, 0)[1:])
def test_eight_processes_build_one_store(world, tmp_path, count):
    """Row 11: in half of the rounds the builder is killed at a random moment of its build, which an undisturbed one ahead has timed."""
    chance, waits, late, number = random.Random(11), [], 0, 0
    first = world.build(tmp_path / "timed", 8)
    length = of(first, "ends")[0][0] - of(first, "begins")[0][0]
    while number - late < count and number < 4 * count:
        cache, number = tmp_path / f"cache{number}", number + 1
        how = {"kill": chance.uniform(0.0, length)} if number % 2 or len(waits) < number // 2 else {}
        events = world.build(cache, 8, **how)
        opened, killed = of(events, "opened"), of(events, "killed")
        assert not of(events, "failed"), events
        assert {event[3].split()[0] for event in opened} == {world.hash} and len({event[3] for event in opened}) == 1
        dead = killed[0][2] if killed else None
        begun, ended = of(events, "begins"), of(events, "ends")
        # Killed after its store stood in its place, with or without its last line: that build counts. What all others then opened is
        # compared above; a store that was not whole would have another hash.
        done = dead is None or (dead == begun[0][2] and len(begun) == 1)
        late += dead is not None and done
        assert len(begun) == (1 if done else 2) and (len(ended) == 1 or (done and dead is not None)), events
        assert len(opened) >= (8 if dead is None else 7)
        if not done:
            waits.append(begun[1][0] - killed[0][0])
        assert not leftovers(cache) and len(list(cache.glob("store-*/manifest.json"))) == 1
        shutil.rmtree(cache)
    print(f"\n{number} rounds, {len(waits)} killed in a build, {late} after it; the next began {max(waits, default=0):.3f} s later at most")
    assert max(waits, default=0) < 5 and len(waits) >= count // 2


def crash_everywhere(world: World, cache: Path, prepare, check, stride: int, names: str | None) -> int:
    """A crash at every `stride`-th call that changes the disk while the store is opened; `check` after each. Returns how many."""
    calls = world.folder / "calls"
    stash = calls.with_name("calls-stash")
    prepare()
    world.build(cache, 1, crash=0, lose=[], calls=str(calls))
    total = len(calls.read_text().splitlines())
    calls.unlink()
    shutil.rmtree(stash)
    points = range(1, total + 1, stride)
    for point in points:
        prepare()
        events = world.build(cache, 1, crash=point, lose=[str(cache)], calls=str(calls), names=names)
        name = calls.read_text().splitlines()[-1]
        calls.unlink()
        shutil.rmtree(stash)
        assert not of(events, "opened"), (point, name)
        check((point, name))
    return len(points)


NAMES = [None, "all", "some"]  # what a power cut forgets of names in folders that were not fsynced


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("stride", [1])
def test_a_crash_at_every_call_of_a_build(world, tmp_path, stride, names):
    """Row 2: what was not fsynced is cut in half; afterwards the store is whole, or not there and made anew by the next start."""
    cache = tmp_path / "cache"
    seen = set()

    def check(where: tuple) -> None:
        whole = [path for path in cache.glob("store-*/manifest.json") if ".tmp-" not in path.parent.name]
        seen.add(bool(whole))
        store = world.open(cache)
        # A store under its own name is taken as it is, so it must be the right one: nothing of it is built again.
        assert store.cache_hit == bool(whole), where
        assert content_hash(store) == world.hash and store.embedding("81").matrix.shape == (201, 32), where
        assert not leftovers(cache), where

    count = crash_everywhere(world, cache, lambda: shutil.rmtree(cache, ignore_errors=True), check, stride, names)
    print(f"\n{count} crashes")
    assert count > 80 and seen == {True, False}


@pytest.mark.parametrize("names", NAMES)
def test_a_crash_at_every_call_that_replaces_vectors(world, tmp_path, names):
    """Row 2: vectors that changed are compiled in place of the old ones; whatever a crash leaves, the new ones are read after it."""
    cache, old, new = tmp_path / "cache", tmp_path / "old", 5.0
    world.write_vectors(1.0)
    world.open(old)
    world.write_vectors(new)

    def prepare() -> None:
        shutil.rmtree(cache, ignore_errors=True)
        shutil.copytree(old, cache)

    def check(where: tuple) -> None:
        store = world.open(cache)
        assert store.cache_hit and content_hash(store) == world.hash, where
        matrix = store.embedding("81").matrix
        assert sorted(matrix[1:, 0].tolist()) == [new + k for k in range(200)], where
        assert not leftovers(cache), where

    count = crash_everywhere(world, cache, prepare, check, 1, names)
    world.write_vectors(1.0)
    print(f"\n{count} crashes")
    assert count > 15
