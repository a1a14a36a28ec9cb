"""checkpoint.py where a process dies, a call fails or the disk fills up in a save: afterwards the old state or the new one counts."""

import builtins
import contextlib
import errno
import hashlib
import os
import random
import resource
import shutil
import signal
import time
import zipfile
from pathlib import Path

import pytest
import torch
from power_cut import PowerCut
from test_checkpoint import content, save

import checkpoint as ck
from atomic import write_text_atomic
from errors import RunError

pytestmark = [pytest.mark.reliability, pytest.mark.fast]


# ---- crashes ------------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The machine stops: every later call fails too, so that no clean-up runs."""


LOSSES = ("half files", "all names", "some names")  # what a power cut forgets besides: names in folders that were not fsynced


@contextlib.contextmanager
def crash_at(monkeypatch, call: int, root: Path, loses: str = LOSSES[0]):
    """Stop at the `call`-th write, fsync, rename, link, unlink, mkdir or rmdir; what was not fsynced by then is lost (power_cut.py)."""
    count, cut = [0], PowerCut([root], root.with_name(f"{root.name}-stash"))

    def guard(name, function):
        function = cut.wrap(name, function)

        def wrapped(*args, **kwargs):
            count[0] += 1
            if count[0] >= call:
                raise Crash
            return function(*args, **kwargs)

        return wrapped

    crashed = False
    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "link", "unlink", "mkdir", "rmdir", "fsync"):
            patch.setattr(os, name, guard(name, getattr(os, name)))
        patch.setattr(ck._HashingFile, "write", guard("write", ck._HashingFile.write))
        patch.setattr(builtins, "open", cut.wrap("open", open))
        try:
            yield count
        except Crash:
            crashed = True
    if loses == LOSSES[0] or not crashed:
        cut.done = []
    cut.lose(None if loses == "all names" else random.Random(call)) if crashed else None
    shutil.rmtree(cut.stash)


def run_with_crashes(tmp_path, monkeypatch, prepare, act, check, loses=LOSSES[0]) -> int:
    """`act` on a fresh `prepare`d folder, stopped at call 1, 2, ...; `check` after each, and again after cleaning.

    Returns the number of calls.
    """
    call = 0
    while True:
        call += 1
        root = tmp_path / f"r{call}"
        root.mkdir()
        prepare(root)
        old = content(ck.newest_valid(root))
        finished = False
        with crash_at(monkeypatch, call, root, loses):
            act(root)
            finished = True
        found = content(ck.newest_valid(root, pytest.fail))
        check(root, old, found)
        ck.clean_temporary(root)
        assert content(ck.newest_valid(root, pytest.fail)) == found
        check(root, old, found)
        assert not [name for name in os.listdir(root) if name.startswith(".")]
        for path in root.glob("*.pt"):
            assert ck.find_checkpoint(path) in ck.list_checkpoints(root)
        if finished:
            return call - 1


def expected_content(tmp_path, *args) -> str:
    return content(save(tmp_path / "reference", *args))


@pytest.mark.parametrize("loses", LOSSES)
def test_crash_at_every_call_of_a_save(tmp_path, monkeypatch, loses):
    torch.manual_seed(1)
    new = expected_content(tmp_path, 20, 0.5)
    seen = set()

    def check(root, old, found):
        assert found in (old, new)
        seen.add(found == new)

    assert run_with_crashes(tmp_path, monkeypatch, lambda root: save(root, 10, 0.9), lambda root: save(root, 20, 0.5), check, loses) > 20
    assert seen == {True, False}


@pytest.mark.parametrize("loses", LOSSES)
@pytest.mark.parametrize("loss", [0.5, 0.7])
def test_crash_at_every_call_of_a_replacement(tmp_path, monkeypatch, loss, loses):
    torch.manual_seed(1)
    new = expected_content(tmp_path, 20, loss, 2)

    def prepare(root):
        ck.link(root, "best_model.pt", save(root, 20, 0.5, 1))

    def check(root, old, found):
        assert found in (old, new)
        assert len(ck.list_checkpoints(root)) == 1
        assert len(list(root.glob("global_step20*"))) <= 1

    run_with_crashes(tmp_path, monkeypatch, prepare, lambda root: save(root, 20, loss, 2), check, loses)


@pytest.mark.parametrize("loses", LOSSES)
def test_crash_at_every_call_of_prune_and_link(tmp_path, monkeypatch, loses):
    def prepare(root):
        for step in (1, 2, 3):
            ck.link(root, f"checkpoint_epoch_{step}.pt", save(root, step))
        ck.link(root, "best_model.pt", root / ck.checkpoint_name(2, None))

    def check(root, old, found):
        assert found == old
        for path in ck.list_checkpoints(root):  # none is half removed
            ck.load_checkpoint(path, with_trainer=True)
        assert ck.find_checkpoint(root / "best_model.pt").name in (ck.checkpoint_name(2, None), ck.checkpoint_name(3, None))

    def act(root):
        ck.link(root, "best_model.pt", root / ck.checkpoint_name(3, None))
        ck.prune(root, 1, keep=[root / "best_model.pt"])
        assert sorted(os.listdir(root)) == ["best_model.pt", "checkpoint_epoch_3.pt", ck.checkpoint_name(3, None)]

    run_with_crashes(tmp_path, monkeypatch, prepare, act, check, loses)


@pytest.mark.parametrize("loses", LOSSES)
def test_crash_at_every_call_of_write_text_atomic(tmp_path, monkeypatch, loses):
    path = tmp_path / "status.json"
    for call in range(1, 10):
        path.write_text("old")
        with crash_at(monkeypatch, call, tmp_path, loses) as count:
            write_text_atomic(path, "new text")
        assert path.read_text() in ("old", "new text")
        if count[0] < call:
            break
    assert call > 3 and path.read_text() == "new text"
    ck.clean_temporary(tmp_path)
    assert os.listdir(tmp_path) == ["status.json"]


def test_an_error_in_each_call_leaves_nothing_temporary(tmp_path, monkeypatch):
    """Not a crash but an error that the process survives: it cleans up by itself."""
    save(tmp_path, 10)
    for name in ("rename", "fsync"):
        for call in (1, 2, 3, 4):
            real, count = getattr(os, name), [0]

            def fail(*args, real=real, count=count, call=call):
                count[0] += 1
                if count[0] == call:
                    raise OSError(errno.EIO, "broken disk")
                return real(*args)

            with monkeypatch.context() as patch:
                patch.setattr(os, name, fail)
                try:
                    save(tmp_path, 20, 0.5, 7)
                except OSError as error:
                    assert error.errno == errno.EIO
            assert not [found for found in os.listdir(tmp_path) if not found.startswith("global_step")]
            assert ck.newest_valid(tmp_path, pytest.fail) is not None
            ck.set_aside_newer(tmp_path, 10, lambda _: None)
            for path in tmp_path.glob("damaged-*"):
                shutil.rmtree(path)


def test_kill_9_at_random_moments(tmp_path):
    """A child saves and prunes without end; wherever it dies, the newest valid checkpoint is at least the last one it reported."""
    rng = random.Random(0)
    for _ in range(12):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                step = 0
                while True:
                    step += 1
                    path = save(tmp_path, step // 2, None if step % 2 else 0.5)
                    ck.link(tmp_path, "best_model.pt", path)
                    ck.prune(tmp_path, 2, keep=[path])
                    os.write(writer, f"{step // 2}\n".encode())
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.02, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            reported = pipe.read().split()
        newest = ck.newest_valid(tmp_path, pytest.fail)
        if reported:
            assert ck._step(newest) in (int(reported[-1]), int(reported[-1]) + 1)
        ck.clean_temporary(tmp_path)
        assert ck.newest_valid(tmp_path, pytest.fail) is not None or not reported
        assert len(ck.list_checkpoints(tmp_path)) <= 3
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()


def test_clean_temporary_removes_files_and_folders_only_of_ours(tmp_path):
    (tmp_path / ".tmp-global_step3.valid_loss=nan-1").mkdir()
    (tmp_path / ".tmp-best_model.pt-9").write_text("x")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".tmp-mine").write_text("mine")
    path = save(tmp_path, 1)
    assert ck.clean_temporary(tmp_path) == 2
    assert sorted(os.listdir(tmp_path)) == [".tmp-mine", path.name, "notes.txt"]
    assert ck.clean_temporary(tmp_path / "missing") == 0


# ---- a full disk --------------------------------------------------------------------------------------------------------


def test_disk_full_at_each_write(tmp_path, monkeypatch):
    old = content(save(tmp_path, 10))
    real, call, failed = ck._HashingFile.write, 0, 0
    while True:
        call += 1
        count = [0]

        class Full:
            def __init__(self, file, count=count, call=call):
                self.file, self.count, self.call = file, count, call

            def __getattr__(self, name):
                return getattr(self.file, name)

            def write(self, data):
                self.count[0] += 1
                if self.count[0] >= self.call:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return self.file.write(data)

        def write(self, data, full=Full):
            if not hasattr(self, "wrapped"):
                self._file, self.wrapped = full(self._file), True
            return real(self, data)

        with monkeypatch.context() as patch:
            patch.setattr(ck._HashingFile, "write", write)
            try:
                save(tmp_path, 20)
                break
            except RunError as error:
                failed += 1
                assert "global_step20" in str(error) and "bytes needed" in str(error)
        assert os.listdir(tmp_path) == [ck.checkpoint_name(10, None)]
        assert content(ck.newest_valid(tmp_path)) == old
    assert failed > 20


def test_file_size_limit_in_a_child(tmp_path):
    """A real limit of the system (EFBIG) at 20 sizes: saves, links and texts end with RunError and leave the old state."""
    save(tmp_path, 10)
    write_text_atomic(tmp_path / "status.json", "old")
    old = content(ck.newest_valid(tmp_path))
    size = (tmp_path / ck.checkpoint_name(10, None) / ck.MODEL).stat().st_size
    for limit in [size * n // 20 for n in range(20)]:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                try:
                    save(tmp_path, 20)
                except RunError:
                    code = 0
                try:
                    write_text_atomic(tmp_path / "status.json", "n" * (limit + 1))
                    code = 2
                except RunError as error:
                    code += 0 if f"{limit + 1:,} bytes needed" in str(error) else 4
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert sorted(os.listdir(tmp_path)) == [ck.checkpoint_name(10, None), "status.json"]
        assert content(ck.newest_valid(tmp_path)) == old and (tmp_path / "status.json").read_text() == "old"


def test_an_interrupt_inside_a_write_is_raised_and_leaves_the_old_state(tmp_path, monkeypatch):
    save(tmp_path, 10)
    real = hashlib.sha256().__class__

    class Interrupting:
        def update(self, data):
            raise KeyboardInterrupt

        hexdigest = real.hexdigest

    with monkeypatch.context() as patch:
        patch.setattr(ck.hashlib, "sha256", Interrupting)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 20)
    assert os.listdir(tmp_path) == [ck.checkpoint_name(10, None)]


def test_model_pt_is_an_uncompressed_zip_of_data_records(tmp_path):
    path = save(tmp_path, 1)
    with zipfile.ZipFile(path / ck.MODEL) as archive:
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
