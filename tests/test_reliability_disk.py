"""docs/RELIABILITY.md, row 6: whole runs on a disk that fills up, at twenty points from the store's first byte to the report's last."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from reliability_world import RUN_SETTINGS, Driver, final_files, rounds

import checkpoint as checkpoints
from synthetic import generate

pytestmark = pytest.mark.reliability
STEPS = 40
PLACES = ("cache", "log", "tb", "ckpt")  # what compiles, logs, draws and saves


class Disk:
    """Runs whose cache, logs, events and checkpoints lie on a small file system of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.disk, self.driver = folder, folder / "disk", Driver(folder)
        generate(folder / "data", 60, 80, "jsonl", max_length=10, mean_length=7)
        settings = {group: dict(values) for group, values in RUN_SETTINGS.items()}
        settings["training"] |= {"save_every_steps": 10, "keep_last_k": 2}
        settings["system"] |= {"tensorboard": True}
        settings["eval"] |= {"eval_every_epochs": 1}
        (folder / "small.yaml").write_text(yaml.safe_dump(settings))
        self.disk.mkdir()
        assert self.run("whole")["status"] == 0, self.said("whole")
        self.needed = self.bytes_of(self.disk)
        self.needed_by = {name: self.bytes_of(self.disk / name) for name in PLACES}
        at_start = (".lock", "status.json", "config.resolved.yaml", "command.txt", "environment.json")
        self.start_pages = sum(-(-(self.disk / "log" / name).stat().st_size // 4096) for name in at_start)
        self.final = final_files(self.disk / "ckpt")
        shutil.rmtree(self.disk)
        self.disk.mkdir()

    @staticmethod
    def bytes_of(folder: Path) -> int:
        """What the files take of a file system of pages; a link is its file."""
        files = {path.stat().st_ino: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        return sum(-(-size // 4096) * 4096 for size in files.values())

    def run(self, name: str, *flags: object, **how: object) -> dict:
        places = ["--log_path", "disk/log", "--checkpoint_path", "disk/ckpt", "--tensorboard_path", "disk/tb", "--cache_path", "disk/cache"]
        command = ["--config", "small.yaml", "--data_path", "data", "--max_steps", STEPS, *places, *flags]
        return self.driver.run(command, console=f"{name}.console", **how)

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.console").read_text()

    @contextlib.contextmanager
    def of_size(self, num_bytes: int, place: str = "."):
        """A tmpfs over the folder, or one in it; skipped where this user may not mount one."""
        folder = str(self.disk / place)
        Path(folder).mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        try:
            yield lambda more: subprocess.run(["mount", "-o", f"remount,size={more}", folder], check=True)
        finally:
            subprocess.run(["umount", "-l", folder], check=True)

    def check(self, name: str, status: int) -> str:
        """A run on a disk that was full: what it said, what it left. Returns the outcome in words."""
        text = self.said(name)
        assert "Traceback" not in text, text[-3000:]
        messages = re.findall(r".*no space left to write.*", text)
        assert messages or status == 0, text[-3000:]
        assert all(re.search(r"\S*disk/\S+: no space left to write \([\d,]+ bytes needed\)", message) for message in messages), messages
        assert status in (0, 1), text[-3000:]
        if status:
            assert re.search(r"error: \S*disk/\S+: no space left to write \([\d,]+ bytes needed\)", text), messages
        checkpoints.newest_valid(self.disk / "ckpt", pytest.fail)  # what is there is whole
        assert not [path for path in (self.disk / "ckpt").glob(".tmp-*")]
        return "stopped" if status else "without logs" if messages else "fitted"

    def goes_on(self, name: str) -> None:
        """--resume, with room made, ends with the undisturbed weights."""
        newest = checkpoints.newest_valid(self.disk / "ckpt", pytest.fail)
        again = self.run(name, "--resume")
        assert again["status"] == 0 and "Traceback" not in self.said(name), self.said(name)[-3000:]
        assert newest is None or f"resumed at step {checkpoints._step(newest)} from" in self.said(name)
        assert final_files(self.disk / "ckpt") == self.final


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    made = Disk(tmp_path_factory.mktemp("disk"))
    yield made
    made.driver.close()


@pytest.mark.parametrize("count", rounds(20, 0)[1:])
def test_a_disk_that_fills_up(disk, count):
    """Row 6: a file system of n twentieths of what the run needs; with room made, --resume ends with the undisturbed weights."""
    outcomes = []
    for number in range(count):
        name, size = f"full{number}", 4096 * max(2, disk.needed * 22 * (number + 1) // (10 * count) // 4096)
        with disk.of_size(size) as resize:
            done = disk.run(name)
            outcomes.append(disk.check(name, done["status"]))
            resize(disk.needed * 20)
            disk.goes_on(name)
    print(f"\n{disk.needed:,} bytes; {', '.join(outcomes)}")
    assert count < 20 or {"stopped", "fitted"} <= set(outcomes)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("count", rounds(5, 0)[1:])
def test_a_full_disk_under_one_place(disk, place, count):
    """Row 6: the store, the run folder, TensorBoard's events or the checkpoints lie on a disk of n fifths of what they need, the rest not.

    Each message names a path on that disk and bytes. What is not needed to train ends with a warning, the rest with status 1.
    """
    outcomes, ended, needed = [], set(), disk.needed_by[place]
    for number in range(count):
        shutil.rmtree(disk.disk)
        disk.disk.mkdir()
        name, pages = f"{place}{number}", needed * number // count // 4096
        if place == "log" and number < 3:  # what a start writes fits; train.log, which is short, is what does not
            pages = disk.start_pages + number
        with disk.of_size(4096 * max(1, pages), place) as resize:
            done = disk.run(name)
            outcomes.append(disk.check(name, done["status"]))
            said = disk.said(name)
            for path in re.findall(r"(\S+): no space left to write", said):
                assert f"disk/{place}" in path, said
            ended |= set(re.findall(r"(train.log|TensorBoard) ends here and the run goes on without it: .*bytes needed", said))
            resize(disk.needed * 20)
            disk.goes_on(name)
    print(f"\n{place}: {needed:,} bytes; {', '.join(outcomes)}")
    if place == "tb":
        assert "stopped" not in outcomes and "without logs" in outcomes
    else:
        assert "stopped" in outcomes
    assert ended == {"log": {"train.log"}, "tb": {"TensorBoard"}}.get(place, set())


@pytest.mark.parametrize("count", rounds(20, 0)[1:])
def test_files_that_may_not_grow(disk, count):
    """Row 6, where nothing can be mounted: a limit on the size of each file, from the start or from the second save on."""
    largest, outcomes = disk.needed // 3, []
    for number in range(count):
        name, size = f"limit{number}", int(largest * (number + 1) ** 2 / count**2)
        shutil.rmtree(disk.disk, ignore_errors=True)
        disk.disk.mkdir()
        done = disk.run(name, limit=size, from_save=2 * (number % 2))
        # The console is a file too: cut at the limit.
        outcomes.append(done["status"])
        text = disk.said(name)
        assert done["status"] in (0, 1) and "Traceback" not in text, text[-3000:]
        newest = checkpoints.newest_valid(disk.disk / "ckpt", pytest.fail)
        assert newest is not None or number % 2 == 0 or done["status"] == 1
        assert disk.run(name, "--resume")["status"] == 0, disk.said(name)[-3000:]
        assert final_files(disk.disk / "ckpt") == disk.final
    print(f"\nstatus {outcomes}")
    assert 1 in outcomes and 0 in outcomes
