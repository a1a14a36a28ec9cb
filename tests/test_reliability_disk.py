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
        self.needed = sum(path.stat().st_size for path in self.disk.rglob("*") if path.is_file())
        self.final = final_files(self.disk / "ckpt")
        shutil.rmtree(self.disk)
        self.disk.mkdir()

    def run(self, name: str, *flags: object, **how: object) -> dict:
        places = ["--log_path", "disk/log", "--checkpoint_path", "disk/ckpt", "--tensorboard_path", "disk/tb", "--cache_path", "disk/cache"]
        command = ["--config", "small.yaml", "--data_path", "data", "--max_steps", STEPS, *places, *flags]
        return self.driver.run(command, console=f"{name}.console", **how)

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.console").read_text()

    @contextlib.contextmanager
    def of_size(self, num_bytes: int):
        """A tmpfs over the folder; skipped where this user may not mount one."""
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(self.disk)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        try:
            yield lambda more: subprocess.run(["mount", "-o", f"remount,size={more}", str(self.disk)], check=True)
        finally:
            subprocess.run(["umount", "-l", str(self.disk)], check=True)

    def check(self, name: str, status: int) -> str:
        """A run on a disk that was full: what it said, what it left. Returns the outcome in words."""
        text = self.said(name)
        assert "Traceback" not in text, text[-3000:]
        messages = re.findall(r".*no space left to write.*", text)
        assert messages or status == 0, text[-3000:]
        assert all("disk/" in message for message in messages), messages
        assert status in (0, 1), text[-3000:]
        if status:
            assert re.search(r"error: \S*disk/\S+: no space left to write \([\d,]+ bytes needed\)", text), messages
        checkpoints.newest_valid(self.disk / "ckpt", pytest.fail)  # what is there is whole
        assert not [path for path in (self.disk / "ckpt").glob(".tmp-*")]
        return "stopped" if status else "without logs" if messages else "fitted"


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
            newest = checkpoints.newest_valid(disk.disk / "ckpt", pytest.fail)
            resize(disk.needed * 20)
            again = disk.run(name, "--resume")
            assert again["status"] == 0 and "Traceback" not in disk.said(name), disk.said(name)[-3000:]
            assert newest is None or f"resumed at step {checkpoints._step(newest)} from" in disk.said(name)
            assert final_files(disk.disk / "ckpt") == disk.final
    print(f"\n{disk.needed:,} bytes; {', '.join(outcomes)}")
    assert count < 20 or {"stopped", "fitted"} <= set(outcomes)


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
