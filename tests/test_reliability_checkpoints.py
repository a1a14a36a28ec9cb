"""docs/RELIABILITY.md, rows 2, 5 and 6 (whole runs): crashes, damaged files and full disks never cost more than the newest checkpoint."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from reliability_world import Runs, rounds, state_hash

import checkpoint as checkpoints
from errors import UserError

pytestmark = pytest.mark.reliability
# Not in the default run: the world of whole runs takes 13 s to make, and test_checkpoint.py and _crashes.py hold the same of single saves.
STEPS, EVERY = 8, 2


def checkpoint_hashes(root: Path) -> dict[str, tuple]:
    """{folder: hashes of weights and of all else} of every checkpoint under root."""
    return {path.name: tuple(state_hash(torch.load(path / name, weights_only=True)) for name in (checkpoints.MODEL, checkpoints.TRAINER))
            for path in checkpoints.list_checkpoints(root)}  # fmt: skip


class Interrupted:
    """Runs of a few steps with a checkpoint every two; `killed` is one that died inside its last save."""

    def __init__(self, cwd: Path) -> None:
        self.runs, self.cwd = Runs(cwd, STEPS, "--save_every_steps", EVERY, "--keep_last_k", 0), cwd
        self.hashes = checkpoint_hashes(cwd / "whole/ckpt")
        done = self.runs.run("count", crash=0, lose=[], calls="count-calls")
        assert done["status"] == 0
        self.calls = [line for line in (cwd / "count-calls").read_text().splitlines() if not line.startswith("saved")]
        done = self.runs.run("killed", crash=len(self.calls) - self.calls[::-1].index("write"), lose=["killed"], calls="killed-calls")
        assert done["status"] == -9 and len(checkpoint_hashes(cwd / "killed/ckpt")) == STEPS // EVERY - 1
        self.newest = checkpoints.newest_valid(cwd / "killed/ckpt", pytest.fail).name

    def copy(self, name: str) -> Path:
        """The checkpoints of a copy of the killed run."""
        shutil.rmtree(self.cwd / name, ignore_errors=True)
        shutil.copytree(self.cwd / "killed", self.cwd / name)
        return self.cwd / name / "ckpt"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = Interrupted(tmp_path_factory.mktemp("checkpoints"))
    yield made
    made.runs.driver.close()


# ---- row 5: damaged files -----------------------------------------------------------------------------------------------


def damage(path: Path, kind: str, chance: random.Random) -> str:
    """Remove a file, cut it, or flip one bit of it: anywhere, in its first or last 512 bytes (a zip's directory), at a page's edge."""
    data = bytearray(path.read_bytes())
    path.unlink()  # links keep the whole file
    if kind == "removal":
        return f"{kind} of {path.name}"
    size = len(data)
    places = [chance.randrange(size), chance.randrange(min(512, size)), size - 1 - chance.randrange(min(512, size))]
    place = chance.choice([*places, min(size - 1, 4096 * chance.randrange(1 + size // 4096))])
    if kind == "cut":
        data = data[:place]
    else:
        data[place] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    return f"{kind} of {path.name} at {place} of {size}"


@pytest.mark.parametrize("kind", ["cut", "flip", "removal"])
@pytest.mark.parametrize("count", rounds(200, 5)[1:])
def test_a_damaged_checkpoint_is_found_before_it_is_read(world, count, kind, monkeypatch):
    """Row 5: files of a real run."""
    chance, root = random.Random(kind), world.copy("damaged")
    before = sorted(world.hashes, key=lambda name: checkpoints._step(Path(name)))
    previous = before[before.index(world.newest) - 1]
    spare = root.with_name("spare")
    shutil.copytree(root / world.newest, spare)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("read before the hashes were compared"))
    for _ in range(count):
        what = damage(root / world.newest / chance.choice([checkpoints.MODEL, checkpoints.TRAINER, checkpoints.META]), kind, chance)
        said: list[str] = []
        assert checkpoints.newest_valid(root, said.append) == root / previous, what
        assert len(said) == 1 and "damaged checkpoint passed over" in said[0] and world.newest in said[0], what
        with pytest.raises(UserError, match="(?i)damaged|another checkpoint"):
            checkpoints.load_checkpoint(root / world.newest, with_trainer=True)
        shutil.rmtree(root / world.newest)
        shutil.copytree(spare, root / world.newest)


@pytest.mark.parametrize("count", rounds(20, 1)[1:])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(world, count):
    """Row 5: says so, and ends with the undisturbed run's weights."""
    chance, runs = random.Random(5), world.runs
    for number in range(count):
        root = world.copy("resumed")
        what = damage(
            root / world.newest / chance.choice(["model.pt", "trainer.pt", "meta.json"]), ["cut", "flip", "removal"][number % 3], chance
        )
        runs.went_on_exactly("resumed", samples=False)
        said = runs.console("resumed")
        assert (
            f"damaged checkpoint passed over: {'resumed/ckpt'}/{world.newest}/" in said
            and f"resumed at step {STEPS - 2 * EVERY} from" in said
        ), what
        assert (root / ("damaged-" + world.newest)).is_dir()  # nothing is deleted
        assert '"note": "damaged checkpoint passed over: ' in (root.parent / "log/train.log").read_text(), what


# ---- row 2: crashes -----------------------------------------------------------------------------------------------------


def crash_points(calls: list[str], count: int) -> list[int]:
    """Every call but the thousands of writes of tensors, of which a few; numbered from 1. count: about how many of all."""
    points, writes = [], 0
    for number, name in enumerate(calls, 1):
        writes += name == "write"
        if name != "write" or writes % 60 == 1:
            points.append(number)
    return points if count >= len(points) else sorted(random.Random(2).sample(points, count))


@pytest.mark.parametrize("names", [None, "all", "some"])
@pytest.mark.parametrize("count", rounds(10_000, 3)[1:])
def test_a_crash_at_every_call_that_changes_the_disk(world, count, names):
    """Row 2: checkpoints, links, logs and status of a whole run; what was not fsynced is cut in half. Every tenth run is resumed."""
    runs, steps = world.runs, sorted(checkpoints._step(Path(name)) for name in world.hashes)
    points = crash_points(world.calls, count)
    newest: set = set()
    for number, point in enumerate(points):
        name = f"crash{point}-{names}"
        done = runs.run(name, crash=point, lose=[name], calls=f"{name}-calls", names=names)
        assert done["status"] == -9, runs.console(name)[-2000:]
        saved = sum(line.startswith("saved") for line in (world.cwd / f"{name}-calls").read_text().splitlines())
        root = world.cwd / name / "ckpt"
        found = checkpoints.newest_valid(root, pytest.fail)
        step = 0 if found is None else checkpoints._step(found)
        # The old one, or the new one of a save that was cut short after its rename.
        assert step in (([0] + steps)[saved], (steps + steps[-1:])[saved]), (point, world.calls[point - 1])
        assert all(hashes == world.hashes[name] for name, hashes in checkpoint_hashes(root).items()), point
        newest.add(step)
        if number % 10 == 0:
            runs.went_on_exactly(name, samples=False)
        shutil.rmtree(world.cwd / name)
        shutil.rmtree(world.cwd / f"{name}-calls-stash")
    assert count < 100 or newest == {0, *steps}
    print(f"{len(points)} crashes")
