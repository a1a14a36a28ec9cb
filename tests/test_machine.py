"""machine.py: free memory, the limits of control groups of both versions, disk of a folder that is not there yet."""

from pathlib import Path

import pytest
import torch

import machine
from machine import NEWEST_TORCH, OLDEST_TORCH, nearest_folder, read_machine, scratch_near, torch_warning

CPU = torch.device("cpu")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A system's files; what this process holds counts as 7 bytes."""
    monkeypatch.setattr(machine, "anonymous_bytes", lambda: 7)

    def write(files: dict[str, str]) -> Path:
        for name, text in ({"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    2000 kB\nHugePages_Total: 0\n"} | files).items():
            path = tmp_path / "root" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "root"

    return write


def test_free_memory(root, tmp_path: Path) -> None:
    found = read_machine(tmp_path, CPU, root({}))
    assert (found.memory, found.limit, found.cuda) == (2000 * 1024 + 7, "free memory of the machine", 0)


@pytest.mark.parametrize(("limit", "used", "memory"), [("max\n", "5\n", 2000 * 1024 + 7), ("1000\n", "900\n", 100 + 50 + 7),
                                                     ("900\n", "2000\n", 7), ("99999999999\n", "5\n", 2000 * 1024 + 7)])  # fmt: skip
def test_group_of_version_2(root, tmp_path: Path, limit: str, used: str, memory: int) -> None:
    group = "sys/fs/cgroup/a/b/"
    files = {"proc/self/cgroup": "0::/a/b\n", group + "memory.max": limit, group + "memory.current": used,
             group + "memory.stat": "anon 4\ninactive_file 50\n"}  # fmt: skip
    found = read_machine(tmp_path, CPU, root(files))
    assert found.memory == memory
    assert ("memory.max" in found.limit) == (memory < 2000 * 1024)


def test_a_group_above_may_be_tighter(root, tmp_path: Path) -> None:
    above, below = "sys/fs/cgroup/a/", "sys/fs/cgroup/a/b/"
    files = {"proc/self/cgroup": "0::/a/b\n", below + "memory.max": "5000", below + "memory.current": "0",
             above + "memory.max": "3000", above + "memory.current": "1000"}  # fmt: skip
    found = read_machine(tmp_path, CPU, root(files))
    assert found.memory == 2007 and found.limit.endswith("cgroup/a/memory.max")


def test_group_of_version_1_and_a_path_that_is_the_hosts(root, tmp_path: Path) -> None:
    top = "sys/fs/cgroup/memory/"
    files = {"proc/self/cgroup": "7:blkio:/x\n4:memory:/host/only\n0::/\n", top + "memory.limit_in_bytes": "4000",
             top + "memory.usage_in_bytes": "3000", top + "memory.stat": "total_inactive_file 500\n"}  # fmt: skip
    found = read_machine(tmp_path, CPU, root(files))
    assert found.memory == 1507 and found.limit.endswith("memory.limit_in_bytes")


def test_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    found = read_machine(folder, CPU)
    assert found.disk > 0 and found.folder == folder and not folder.exists()
    assert found.memory > 0


def test_torch_outside_the_requirements_is_warned_of():
    for version in ("2.10.0+cpu", "2.13.1", torch.__version__):
        assert torch_warning(version) == ""
    assert "CVE-2026-24747" in torch_warning("2.9.1+cu128") and "newer" in torch_warning("2.14.0a0+git1")
    bounds = f"torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]},<{NEWEST_TORCH[0]}.{NEWEST_TORCH[1]}"
    assert bounds in (Path(machine.__file__).parent / "requirements.txt").read_text()


def test_scratch_lies_on_the_disk_of_the_path_where_that_can_be_written(tmp_path):
    assert nearest_folder(tmp_path / "a/b") == tmp_path
    with scratch_near(tmp_path / "a/b") as made:
        assert made.parent == tmp_path and made.is_dir() and made.stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").touch()
    with scratch_near(tmp_path / "file/a") as elsewhere:
        assert elsewhere.is_dir() and tmp_path not in elsewhere.parents
    assert not made.exists() and not elsewhere.exists()
