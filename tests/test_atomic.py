"""atomic.py: content that appears whole or not at all, and what dead processes left half-written, by each writer that leaves some."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_checkpoint_crashes import LOSSES, Crash, crash_at

import atomic
import benchmark
import infer
import main
import ranks
from atomic import make_folder, put_folder, replacing, sweep, temporary_folder, unused, write_text_atomic
from config import Config
from errors import RunError
from machine import scratch_near

pytestmark = [pytest.mark.reliability, pytest.mark.fast]


@pytest.fixture
def dead() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert not os.path.exists(f"/proc/{process.pid}")
    return process.pid


def test_the_new_content_stands_when_the_block_ends(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with replacing(path, 3) as file:
        file.write(b"ne")
        assert path.read_text() == "old"
        file.write(b"w")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["result.json"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.EIO, "broken disk")])
def test_an_error_leaves_the_old_content_alone(tmp_path, error):
    write_text_atomic(tmp_path / "a", "old")
    with pytest.raises(type(error)) as raised, replacing(tmp_path / "a", 3) as file:
        file.write(b"half")
        raise error
    assert raised.value is error and (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_names_path_and_bytes(tmp_path, number):
    with pytest.raises(RunError) as raised, replacing(tmp_path / "a", 12_345):
        raise OSError(number, os.strerror(number))
    assert f"{tmp_path / 'a'}: no space left to write (12,345 bytes needed)" in str(raised.value) and not os.listdir(tmp_path)


@pytest.mark.parametrize("mine", [False, True])
def test_only_what_nobody_holds_of_a_name_is_swept(tmp_path, dead, mine):
    """A number says nothing: in a container each start may have the one of the process that was killed."""
    number = os.getpid() if mine else dead
    kept = [f".tmp-b.json-{dead}", f"a.json-{dead}", ".tmp-a.json", ".tmp-a.json-mine", f".tmp-axjson-{dead}"]
    for name in [*kept, f".tmp-a.json-{number}", f".tmp-.tmp-a.json-{number}-{number}"]:
        (tmp_path / name).write_text("x")
    for folder in (f".tmp-a.json-7-{number}", f".tmp-a.json-{number}-0"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "part").write_text("x")
    (tmp_path / "away").mkdir()
    (tmp_path / f".tmp-a.json-8-{number}").symlink_to(tmp_path / "away")
    with temporary_folder(tmp_path / "a.json") as made:
        assert made == tmp_path / f".tmp-a.json-{os.getpid()}-0"
        assert sorted(os.listdir(tmp_path)) == sorted([*kept, "away", made.name])
        assert sweep(tmp_path, re.escape("a.json")) == 0 and made.is_dir()
        with temporary_folder(tmp_path / "a.json") as other:
            assert other == tmp_path / f".tmp-a.json-{os.getpid()}-1"
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "away"])
    assert sweep(tmp_path / "missing", "a") == 0


HOLD = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
import atomic
held = atomic.temporary_folder(Path({path!r})) if {folder} else atomic.replacing(Path({path!r}), 1)
with held:
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("folder", [True, False])
def test_a_living_process_s_temporary_is_not_swept(tmp_path, dead, folder):
    """Under whatever number: two containers that share a disk see each other's as dead. It goes once its maker is killed."""
    code = HOLD.format(root=str(ROOT), path=str(tmp_path / "a"), folder=folder)
    maker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert maker.stdout.readline() == "ready\n"
        (made,) = tmp_path.iterdir()
        seen = made.rename(tmp_path / f".tmp-a-{dead}-0")
        assert sweep(tmp_path, "a") == 0 and seen.exists()
        write_text_atomic(tmp_path / "a", "x") if not folder else None
        assert seen.exists()
    finally:
        maker.kill()
        maker.wait()
    assert sweep(tmp_path, "a") == 1 and not seen.exists()


def test_what_is_swept_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    lock, swept = atomic._lock, []

    def late(descriptor: int) -> bool | None:
        if not swept:
            swept.append(monkeypatch.setattr(atomic, "_lock", lock))
            assert sweep(tmp_path, "a") == 1
        return lock(descriptor)

    monkeypatch.setattr(atomic, "_lock", late)
    with temporary_folder(tmp_path / "a") as made:
        assert made.is_dir() and swept
    swept.clear()
    monkeypatch.setattr(atomic, "_lock", late)
    write_text_atomic(tmp_path / "a", "whole")
    assert swept and (tmp_path / "a").read_text() == "whole" and os.listdir(tmp_path) == ["a"]


def test_where_a_disk_has_no_locks_nothing_is_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
    (tmp_path / ".tmp-a-1").mkdir()
    write_text_atomic(tmp_path / "a", "x")
    assert sweep(tmp_path, "a") == 0 and sorted(os.listdir(tmp_path)) == [".tmp-a-1", "a"]


def test_unused_counts_from_two(tmp_path):
    assert unused(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a").mkdir()
    (tmp_path / "a-2").touch()
    assert unused(tmp_path / "a") == tmp_path / "a-3"


def test_the_next_start_removes_unfinished_demo_data(tmp_path, dead, monkeypatch):
    """Both what the killed process made and what synthetic.py in it did; demo data that is there stays."""
    monkeypatch.chdir(tmp_path)
    for name in ("demo_data", f".tmp-demo_data-{dead}", f".tmp-.tmp-demo_data-{dead}-{dead}"):
        Path(name).mkdir()
        Path(name, "seq.jsonl").touch()
    assert main.with_demo_data(Config()).paths.data_path == "demo_data"
    assert os.listdir() == ["demo_data"] and os.listdir("demo_data") == ["seq.jsonl"]


@pytest.mark.parametrize("left", [".tmp-demo_data-{n}", ".tmp-.tmp-demo_data-{n}-{n}"])
def test_what_an_earlier_version_left_of_demo_data_blocks_no_start(tmp_path, monkeypatch, left):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main, "DEMO", {"users": 20, "items": 30})
    folder = Path(left.format(n=os.getpid()))
    folder.mkdir()
    (folder / "seq.jsonl").touch()
    main.with_demo_data(Config())
    assert os.listdir() == ["demo_data"]


# Where the first start is killed: inside synthetic.generate; between its end and the folder's last name; in a dry run; in a benchmark.
KILLS = {
    "making": ("import main, synthetic", "synthetic._Writer._collect = die", "main.with_demo_data(main.Config())"),
    "made": ("import main", "main.put_folder = die", "main.with_demo_data(main.Config())"),
    "scratch": ("from machine import scratch_near", "pass", "with scratch_near(Path('x')) as folder: (folder / 'part').touch(), die()"),
    "work": ("import benchmark", "benchmark.Benchmark.run = die", "benchmark.main(benchmark.parse(['--quick', '--cache', '.']))"),
}


@pytest.mark.parametrize("same", [False, True], ids=["another number", "the same number"])
@pytest.mark.parametrize("where", KILLS)
def test_what_a_killed_start_leaves_is_gone_after_the_next(tmp_path, monkeypatch, where, same):
    """A real kill. same: what it left gets the number of this very process, as a container's next start may have."""
    imports, patch, act = KILLS[where]
    small = "main.DEMO |= {'users': 20, 'items': 30}" if "main" in imports else "pass"
    code = (
        f"import sys, os; sys.path.insert(0, {str(ROOT)!r})\n{imports}\nfrom pathlib import Path\n"
        f"die = lambda *_, **__: os.kill(os.getpid(), 9)\n{small}\n{patch}\n{act}\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    assert process.wait() == -9
    left = [path for path in tmp_path.rglob(".tmp-*") if str(process.pid) in path.name]
    assert left and not (tmp_path / "demo_data").exists()
    for path in sorted(left, reverse=True) if same else ():
        path.rename(path.with_name(path.name.replace(str(process.pid), str(os.getpid()))))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main, "DEMO", {"users": 20, "items": 30})
    if where in ("making", "made"):
        main.with_demo_data(Config())
    elif where == "scratch":
        with scratch_near(Path("x")):
            pass
    else:
        monkeypatch.setattr(benchmark.Benchmark, "run", lambda self: None)
        benchmark.main(benchmark.parse(["--quick", "--cache", "."]))
    assert os.listdir() == (["demo_data"] if where in ("making", "made") else [])


def test_scratch_folders_of_dead_processes_are_swept(tmp_path, dead):
    for number in (dead, os.getpid()):
        (tmp_path / f".tmp-scratch-x_8a0000-{number}").mkdir()
    with scratch_near(tmp_path) as first, scratch_near(tmp_path) as second:
        assert first != second and sorted(tmp_path.iterdir()) == sorted([first, second])
    assert not os.listdir(tmp_path)


def test_matrices_and_ranks_are_written_atomically(tmp_path, dead, monkeypatch):
    """infer.py's files and ranks.npz: a write that fails on the way leaves the old file, and says what was needed."""
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    (tmp_path / f".tmp-query.fbin-{dead}").touch()
    infer._write_matrix(tmp_path / "query.fbin", matrix)
    ranks.write_ranks(tmp_path, np.arange(2), np.arange(2), np.arange(20).reshape(2, 10), {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"query.fbin", ranks.RANKS} and len(before["query.fbin"]) == 8 + 24

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"query.fbin: no space left to write \(32 bytes needed\)"):
        infer._write_matrix(tmp_path / "query.fbin", matrix + 1)
    with pytest.raises(RunError, match=r"ranks.npz: no space left to write \(48 bytes needed\)"):
        ranks.write_ranks(tmp_path, np.arange(3), np.arange(3), np.arange(30).reshape(3, 10), {})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_result_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch, capsys):
    """infer.py --output: a full disk is one message, status 1, and the result of before is whole."""
    output = tmp_path / "result.json"
    output.write_text(json.dumps({"time": 0, "top10s": [], "user": []}))
    before = output.read_text()
    monkeypatch.setattr(infer, "infer", lambda: ([list(range(10))], ["user_1"]))
    monkeypatch.setattr(sys, "argv", ["infer.py", "--output", str(output)])
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(RunError, match=r"result.json: no space left to write \(\d+ bytes needed\)"):
        infer.main()
    assert output.read_text() == before and os.listdir(tmp_path) == ["result.json"]
    monkeypatch.undo()
    monkeypatch.setattr(infer, "infer", lambda: ([list(range(10))], ["user_1"]))
    monkeypatch.setattr(sys, "argv", ["infer.py", "--output", str(output)])
    infer.main()
    assert json.loads(output.read_text())["user"] == ["user_1"] and "1 users answered" in capsys.readouterr().out


@pytest.mark.parametrize("loses", LOSSES)
def test_a_power_cut_leaves_a_finished_folder_or_none(tmp_path, monkeypatch, loses):
    """At every call: exports, ensembles and synthetic data are put in place by this."""
    call, seen = 0, set()
    while True:
        call, finished = call + 1, False
        root = tmp_path / f"r{call}"
        root.mkdir()
        with crash_at(monkeypatch, call, root, loses):
            made = root / ".tmp-out-1"
            os.mkdir(made)
            os.mkdir(made / "part")
            for name in ("card.json", "part/data"):
                with open(made / name, "w") as file:
                    file.write("content of some length")
            put_folder(made, root / "out")
            finished = True
        found = {str(p.relative_to(root / "out")): p.read_text() for p in (root / "out").rglob("*") if p.is_file()}
        assert found == {name: "content of some length" for name in ("card.json", "part/data")} if (root / "out").exists() else not found
        seen.add((root / "out").exists())
        if finished:
            break
    assert seen == {True, False} and call > 7


def test_a_power_cut_does_not_forget_the_folder_that_a_checkpoint_lies_in(tmp_path, monkeypatch):
    """make_folder: what lies in a new folder, written and fsynced, stays when all names that were not fsynced are forgotten."""
    root = tmp_path / "root"
    root.mkdir()
    with crash_at(monkeypatch, 10_000, root, "all names") as _:
        make_folder(root / "a/b/c")
        write_text_atomic(root / "a/b/c/status.json", "kept")
        raise Crash
    assert (root / "a/b/c/status.json").read_text() == "kept"
