"""runs.py: names, whose folder it is, resuming, status, start files, the environment."""

import errno
import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import META

import checkpoint as ck
import runs
from errors import RunError, UserError
from run_list import find_runs

NOW = datetime(2026, 5, 4, 3, 2, 1)
LATER = datetime(2026, 5, 4, 4, 0, 0)


def paths(log: object = "", tensorboard: object = "", checkpoint: object = "") -> SimpleNamespace:
    return SimpleNamespace(log_path=str(log), tensorboard_path=str(tensorboard), checkpoint_path=str(checkpoint))


def save(root: Path, step: int, loss: float | None = None) -> Path:
    state = {"a": torch.full((4,), float(step))}
    return ck.save_checkpoint(root, step=step, valid_loss=loss, model_state=state, trainer_state={}, meta=META)


def folders(run: runs.RunPaths) -> list[Path]:
    return [run.log_dir, run.tensorboard_dir, run.checkpoint_dir]


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """prepare_run inside tmp_path; its messages are in `prepare.lines`. Every lock is freed, as if the process had ended."""
    monkeypatch.chdir(tmp_path)

    def call(given=None, **options):
        call.lines.clear()
        run = runs.prepare_run(given or paths(), now=options.pop("now", NOW), log=call.lines.append, **options)
        for lock in run.locks:
            lock.close()
        return run

    call.lines = []
    return call


# ---- names --------------------------------------------------------------------------------------------------------------


def test_default_names_are_one_name_under_three_folders(prepare):
    run = prepare(run_name="big model!")
    name = "20260504-030201-big_model"
    assert run.name == name and run.resume_from is None and not run.continued
    assert folders(run) == [Path("logs") / name, Path("tb_logs") / name, Path("checkpoints") / name]
    assert all(folder.is_dir() for folder in folders(run))
    assert prepare().name == "20260504-030201-run"
    assert prepare().name == "20260504-030201-run-2"  # two runs in one second


def test_given_paths_are_used_exactly_and_may_exist_empty(prepare, tmp_path):
    """As on the platform: every folder is there and empty."""
    given = [tmp_path / "a", tmp_path / "b" / "c", tmp_path / "d"]
    given[0].mkdir()
    given[2].mkdir()
    run = prepare(paths(*given))
    assert folders(run) == given and run.name == "a"
    assert prepare.lines == [] and sorted(os.listdir(tmp_path)) == ["a", "b", "d"]
    status = json.loads((given[0] / "status.json").read_text())
    assert status["state"] == "running" and status["step"] == 0 and status["checkpoint_path"] == str(given[2])


def test_log_path_alone_gives_its_name_to_the_rest(prepare, tmp_path):
    first, second = prepare(paths(tmp_path / "x" / "log")), prepare(paths(tmp_path / "y" / "log"))
    assert first.checkpoint_dir == Path("checkpoints/log") and second.checkpoint_dir == Path("checkpoints/log-2")
    assert second.tensorboard_dir == Path("tb_logs/log-2") and second.log_dir == tmp_path / "y" / "log"


def test_folders_that_cannot_be_made(prepare, tmp_path):
    (tmp_path / "file").write_text("x")
    for key, given in (("log_path", paths(tmp_path / "file")), ("checkpoint_path", paths(checkpoint=tmp_path / "file" / "x"))):
        with pytest.raises(UserError, match=f"{key}: .*file"):
            prepare(given)


# ---- whose folder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trace", ["status.json", "train.log", "checkpoint"])
def test_another_runs_folder_is_refused_with_both_remedies(prepare, tmp_path, trace):
    given = paths(tmp_path / "log", tmp_path / "tb", tmp_path / "ck")
    if trace == "checkpoint":
        save(tmp_path / "ck", 3)
    else:
        (tmp_path / "log").mkdir()
        (tmp_path / "log" / trace).write_text('{"state": "finished"}')
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    with pytest.raises(UserError) as error:
        prepare(given)
    assert "--resume" in str(error.value) and "--overwrite" in str(error.value) and str(tmp_path) in str(error.value)
    assert before == sorted(path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock")
    assert prepare(given, overwrite=True).resume_from is None
    assert json.loads((tmp_path / "log" / "status.json").read_text())["state"] == "running"


def test_overwrite_removes_the_runs_files_and_no_others(prepare, tmp_path):
    run = prepare(paths(tmp_path / "log"))
    ck.link(run.checkpoint_dir, "best_model.pt", save(run.checkpoint_dir, 5))
    ck.link(run.checkpoint_dir, "checkpoint_epoch_1.pt", save(run.checkpoint_dir, 6))
    for name in ("train.log", "notes.md"):
        (run.log_dir / name).write_text("x")
    (run.checkpoint_dir / "mine.pt").write_text("x")
    (run.tensorboard_dir / "events.out.tfevents.1.x.0").write_text("x")
    again = prepare(paths(tmp_path / "log"), overwrite=True)
    assert again.checkpoint_dir == run.checkpoint_dir  # found through status.json, not a second folder beside it
    assert sorted(os.listdir(run.log_dir)) == [".lock", "notes.md", "status.json"]
    assert sorted(os.listdir(run.checkpoint_dir)) == [".lock", "mine.pt"] and os.listdir(run.tensorboard_dir) == [".run"]
    with pytest.raises(UserError, match="--overwrite starts anew and --resume goes on"):
        prepare(overwrite=True, resume=True)


# ---- resume -------------------------------------------------------------------------------------------------------------


def test_resume_without_a_run_starts_anew_and_says_so(prepare, tmp_path):
    run = prepare(resume=True)
    assert run.resume_from is None and run.log_dir == Path("logs/20260504-030201-run")
    assert "starting anew" in " ".join(prepare.lines)
    assert prepare(paths(tmp_path / "l", tmp_path / "t", tmp_path / "c"), resume=True).resume_from is None


@pytest.mark.parametrize("state", ["running", "failed", "interrupted"])
def test_resume_takes_the_newest_unfinished_run(prepare, state):
    first, second, third = prepare(run_name="a"), prepare(run_name="b"), prepare(run_name="c")
    for time, (run, its_state) in enumerate(((first, "failed"), (second, state), (third, "finished"))):
        save(run.checkpoint_dir, 10)
        save(run.checkpoint_dir, 20)
        runs.write_status(run.log_dir, its_state, 20, "because")
        os.utime(run.log_dir / "status.json", (time, time))
    resumed = prepare(resume=True, now=LATER)
    assert folders(resumed) == folders(second)
    assert resumed.resume_from == second.checkpoint_dir / "global_step20.valid_loss=nan" and resumed.continued
    assert runs.read_status(second.log_dir)["state"] == "running" and runs.read_status(second.log_dir)["step"] == 20
    assert sorted(os.listdir("logs")) == sorted(run.name for run in (first, second, third))


def test_resume_passes_over_a_damaged_checkpoint_and_sets_it_aside(prepare):
    run = prepare()
    old, new = save(run.checkpoint_dir, 10), save(run.checkpoint_dir, 20)
    os.truncate(new / "model.pt", 5)
    (run.checkpoint_dir / ".tmp-global_step30.valid_loss=nan-1").mkdir()
    resumed = prepare(resume=True)
    assert resumed.resume_from == old
    text = "\n".join(prepare.lines)
    assert "damaged checkpoint passed over" in text and "global_step20" in text and "set aside" in text
    assert sorted(os.listdir(run.checkpoint_dir)) == [".lock", "damaged-" + new.name, old.name]


def test_resume_without_a_valid_checkpoint_starts_in_a_new_folder(prepare):
    run = prepare()
    (run.log_dir / "train.log").write_text("{}\n")
    resumed = prepare(resume=True, now=LATER)
    assert resumed.resume_from is None and resumed.log_dir != run.log_dir and not resumed.continued
    assert "no valid checkpoint" in prepare.lines[0]


def test_resume_with_given_paths(prepare, tmp_path):
    given = paths(tmp_path / "l", tmp_path / "t", tmp_path / "c")
    prepare(given)
    assert prepare(given, resume=True).resume_from is None  # killed before the first checkpoint: the same folder, from the start
    path = save(tmp_path / "c", 7)
    assert prepare(given, resume=True).resume_from == path
    shutil.rmtree(tmp_path / "l")  # the logs were lost, the checkpoints not
    assert prepare(given, resume=True).resume_from == path


def test_resume_with_log_path_alone_finds_the_checkpoints_it_noted(prepare, tmp_path):
    run = prepare(paths(tmp_path / "log", checkpoint=tmp_path / "elsewhere"))
    path = save(run.checkpoint_dir, 4)
    assert prepare(paths(tmp_path / "log"), resume=True).resume_from == path


def test_resume_of_a_finished_run_at_log_path_goes_on_from_its_end(prepare, tmp_path):
    given = paths(tmp_path / "log", tmp_path / "tb", tmp_path / "ck")
    run = prepare(given)
    runs.write_status(run.log_dir, "finished", 9)
    with pytest.raises(UserError, match="finished and has no valid checkpoint"):
        prepare(given, resume=True)
    path = save(tmp_path / "ck", 9)
    assert prepare(given, resume=True).resume_from == path
    assert "is finished" in " ".join(prepare.lines)


def test_resume_with_checkpoint_path_takes_the_run_that_noted_it(prepare, tmp_path):
    mine = prepare(paths(checkpoint=tmp_path / "c"), run_name="mine")
    other = prepare(run_name="other")
    path = save(tmp_path / "c", 2)
    save(other.checkpoint_dir, 3)
    resumed = prepare(paths(checkpoint=tmp_path / "c"), resume=True)
    assert resumed.log_dir == mine.log_dir and resumed.resume_from == path


def test_a_run_that_was_moved_is_resumed(prepare, tmp_path, monkeypatch):
    run = prepare()
    save(run.checkpoint_dir, 6)
    (tmp_path / "new").mkdir()
    for name in ("logs", "tb_logs", "checkpoints"):
        shutil.move(name, tmp_path / "new" / name)
    monkeypatch.chdir(tmp_path / "new")
    assert prepare(resume=True).resume_from == run.checkpoint_dir / "global_step6.valid_loss=nan"


def test_a_damaged_status_counts_as_unfinished(prepare):
    run = prepare()
    path = save(run.checkpoint_dir, 6)
    for text in ("{half", "[]", '{"state": "odd"}', ""):
        (run.log_dir / "status.json").write_text(text)
        assert prepare(resume=True).resume_from == path


# ---- resume_path --------------------------------------------------------------------------------------------------------


def test_resume_path_forms(prepare, tmp_path):
    run = prepare()
    save(run.checkpoint_dir, 6)
    path = save(run.checkpoint_dir, 8)
    link = ck.link(run.checkpoint_dir, "best_model.pt", path)
    runs.write_status(run.log_dir, "finished", 8)
    for given in (run.log_dir, run.checkpoint_dir, path, path / "model.pt", link):
        resumed = prepare(resume_path=given, now=LATER)
        assert folders(resumed) == folders(run) and resumed.resume_from == path and resumed.continued


def test_resume_path_of_an_older_checkpoint_makes_a_new_run(prepare, tmp_path):
    run = prepare()
    old, new = save(run.checkpoint_dir, 6), save(run.checkpoint_dir, 8)
    branch = prepare(resume_path=old, now=LATER)
    assert branch.resume_from == old and branch.log_dir != run.log_dir and branch.checkpoint_dir != run.checkpoint_dir
    assert ck.list_checkpoints(run.checkpoint_dir) == [old, new] and "a new run" in prepare.lines[0]
    with pytest.raises(UserError, match="not the newest checkpoint"):
        prepare(paths(run.log_dir, "", run.checkpoint_dir), resume_path=old)
    os.truncate(new / "model.pt", 5)  # now the older one is the newest valid one
    assert prepare(resume_path=old, now=LATER).log_dir == run.log_dir


def test_resume_path_of_a_run_into_other_folders(prepare, tmp_path):
    run = prepare()
    path = save(run.checkpoint_dir, 6)
    moved = prepare(paths(tmp_path / "l", tmp_path / "t", tmp_path / "c"), resume_path=path)
    assert moved.log_dir == tmp_path / "l" and moved.resume_from == path and not moved.continued


def test_resume_path_mistakes(prepare, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        prepare(resume_path=tmp_path / "nothing")
    run = prepare()
    with pytest.raises(UserError, match="no valid checkpoint"):
        prepare(resume_path=run.log_dir)
    with pytest.raises(UserError, match="not a checkpoint"):
        prepare(resume_path=tmp_path)


# ---- a living run -------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
sys.path.insert(0, {root!r})
from types import SimpleNamespace
import runs
run = runs.prepare_run(SimpleNamespace(log_path={log!r}, tensorboard_path="", checkpoint_path=""))
print("ready", flush=True)
time.sleep(60)
"""


def test_a_living_run_is_neither_resumed_nor_overwritten_and_a_killed_one_is(prepare, tmp_path):
    code = HOLD.format(root=str(Path(runs.__file__).parent), log=str(tmp_path / "logs" / "alive"))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline().strip() == "ready"
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(UserError, match=rf"a run is going on there \(process {child.pid}\)"):
                prepare(paths(tmp_path / "logs" / "alive"), **options)
        assert runs.unfinished_runs() == []
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert runs.unfinished_runs() == [Path("logs/alive")]
    path = save(tmp_path / "checkpoints" / "alive", 3)
    assert prepare(resume=True).resume_from.resolve() == path


@pytest.mark.parametrize("number", ["another", "ours"])
def test_a_lock_is_ours_because_we_hold_it_not_by_its_number(prepare, tmp_path, number):
    """Two containers that share a disk may both have the same number."""
    code = HOLD.format(root=str(Path(runs.__file__).parent), log=str(tmp_path / "logs" / "alive"))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline().strip() == "ready"
        lock = tmp_path / "logs/alive/.lock"
        lock.write_text(lock.read_text().replace(str(child.pid), str(os.getpid() if number == "ours" else child.pid)))
        with pytest.raises(UserError, match="a run is going on there"):
            prepare(paths(tmp_path / "logs" / "alive"), resume=True)
        assert runs.is_alive(tmp_path / "logs/alive")
    finally:
        child.kill()
        child.wait()
    first = runs.prepare_run(paths(tmp_path / "mine"), log=lambda _: None)
    assert first.locks and runs.prepare_run(paths(tmp_path / "mine"), resume=True, log=lambda _: None).log_dir == first.log_dir


# ---- evaluation folders -------------------------------------------------------------------------------------------------


def test_evaluations_have_folders_of_their_own_and_are_never_resumed(prepare, tmp_path):
    run = prepare(paths(tmp_path / "log"))
    runs.write_status(run.log_dir, "finished", 4)
    first = runs.prepare_eval(paths(tmp_path / "log"), now=NOW)
    assert first.log_dir == tmp_path / "log" / "eval-20260504-030201"
    assert runs.prepare_eval(paths(tmp_path / "log"), now=NOW).log_dir.name == "eval-20260504-030201-2"
    free = runs.prepare_eval(paths(), now=NOW)
    assert free.log_dir == Path("logs/20260504-030201-eval")
    runs.write_status(free.log_dir, "failed", 0, "x")
    assert runs.read_status(free.log_dir)["kind"] == "eval" and runs.unfinished_runs() == []


EVALUATE = """
import sys, time
sys.path.insert(0, {root!r})
from types import SimpleNamespace
from pathlib import Path
import atomic, runs
run = runs.prepare_eval(SimpleNamespace(log_path={log!r}, tensorboard_path="", checkpoint_path=""))
with atomic.replacing(run.log_dir / "metrics.json", 9) as file:
    print(run.log_dir, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("next_start", ["evaluation", "training"])
def test_a_killed_evaluation_is_settled_by_the_next_start_and_a_living_one_is_left(prepare, tmp_path, next_start):
    run = prepare(paths(tmp_path / "log"))
    code = EVALUATE.format(root=str(Path(runs.__file__).parent), log=str(run.log_dir))
    start = lambda: runs.prepare_eval(paths(run.log_dir)) if next_start == "evaluation" else prepare(paths(run.log_dir), resume=True)
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        folder = Path(child.stdout.readline().strip())
        start()
        assert runs.read_status(folder)["state"] == "running" and list(folder.glob(".tmp-*"))
        assert {one.folder: one.state for one in find_runs([run.log_dir])}[folder] == "running"
    finally:
        child.kill()
        child.wait()
    assert {one.folder: one.state for one in find_runs([run.log_dir])}[folder] == "killed"
    start()
    status = runs.read_status(folder)
    assert (status["state"], status["reason"], status["kind"]) == ("interrupted", "its process was killed", "eval")
    assert not list(folder.glob(".tmp-*"))


# ---- status and start files ---------------------------------------------------------------------------------------------


def test_write_status(tmp_path, monkeypatch):
    assert runs.read_status(tmp_path) == {}
    assert runs.write_status(tmp_path, "running", 0, checkpoint_path="/x")
    assert runs.write_status(tmp_path, "interrupted", 12, "SIGTERM")
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["reason"], status["checkpoint_path"]) == ("interrupted", 12, "SIGTERM", "/x")
    with pytest.raises(ValueError, match="state is 'done'"):
        runs.write_status(tmp_path, "done", 1)


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_status_that_cannot_be_written_is_said_once(tmp_path, monkeypatch, capfd):
    """The last word of a run that is over: without it the folder says "running", which only the console can tell."""
    runs.write_status(tmp_path, "running", 12)
    monkeypatch.setattr(os, "fsync", full)
    for _ in range(3):
        assert not runs.write_status(tmp_path, "finished", 13)
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and re.match(rf"warning: {tmp_path}/status.json: no space left to write \(\d+ bytes needed\): .*", said[0])
    assert said[0].endswith("It says running in place of finished.")
    assert not runs.write_status(tmp_path, "failed", 13) and "in place of failed" in capfd.readouterr().err
    assert runs.read_status(tmp_path)["state"] == "running"


def test_a_full_disk_at_the_start_is_an_error(prepare, tmp_path, monkeypatch, capfd):
    prepare(paths(tmp_path / "l", tmp_path / "t", tmp_path / "c"))
    monkeypatch.setattr(runs, "make_folder", lambda path: None)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"status.json: no space left to write \(\d+ bytes needed\)"):
        prepare(paths(tmp_path / "l", tmp_path / "t", tmp_path / "c"), overwrite=True)
    assert not capfd.readouterr().err


def test_start_files_and_environment(tmp_path):
    environment = runs.environment()
    runs.write_start_files(tmp_path, "model: {}\n", ["main.py", "--run_name", "a b"], environment)
    runs.write_start_files(tmp_path, "model: {x: 1}\n", ["main.py", "--resume"], environment)
    assert (tmp_path / "config.resolved.yaml").read_text() == "model: {x: 1}\n"
    assert (tmp_path / "command.txt").read_text() == "main.py --run_name 'a b'\nmain.py --resume\n"
    read = json.loads((tmp_path / "environment.json").read_text())
    assert read["torch"] == torch.__version__ and read["cpus"] >= 1 and read["threads"] >= 1 and read["memory_gib"] > 0
    text = json.dumps(read)
    assert socket.gethostname() not in text and getpass.getuser() not in text.replace("root", "") and str(Path.home()) + "/" not in text
    assert sorted(os.listdir(tmp_path)) == ["command.txt", "config.resolved.yaml", "environment.json"]


def test_overwriting_a_copied_run_leaves_the_files_of_the_one_it_was_copied_from(prepare, tmp_path):
    """A copy's status.json still names the original's checkpoints and events."""
    original = prepare()
    save(original.checkpoint_dir, 3)
    (original.tensorboard_dir / "events.out.tfevents.1").touch()
    copy = tmp_path / "logs/copy"
    shutil.copytree(original.log_dir, copy)
    with pytest.raises(UserError, match="belongs to another run"):
        prepare(paths(copy))
    with pytest.raises(UserError, match="holds the checkpoints of the run in"):
        prepare(paths(copy, checkpoint=original.checkpoint_dir), overwrite=True)
    again = prepare(paths(copy), overwrite=True)
    assert again.log_dir == copy and not {again.checkpoint_dir.resolve(), again.tensorboard_dir.resolve()} & {
        original.checkpoint_dir.resolve(), original.tensorboard_dir.resolve()}  # fmt: skip
    assert len(prepare.lines) == 2 and all("stays as it is" in line for line in prepare.lines)
    shutil.copyfile(original.log_dir / "status.json", copy / "status.json")
    lines: list[str] = []
    assert runs.clear_folders(copy, original.checkpoint_dir, original.tensorboard_dir, lines.append) and len(lines) == 2
    assert len(ck.list_checkpoints(original.checkpoint_dir)) == 1 and len(list(original.tensorboard_dir.glob("events*"))) == 1
    mine = prepare(paths(original.log_dir), overwrite=True)
    assert [path.resolve() for path in folders(mine)] == [path.resolve() for path in folders(original)] and not prepare.lines
    assert len(ck.list_checkpoints(mine.checkpoint_dir)) == 0 and not list(mine.tensorboard_dir.glob("events*"))


HOSTILE = {
    "another's folders": lambda victim: {"checkpoint_path": str(victim), "tensorboard_path": str(victim)},
    "a name that leads there": lambda victim: {"name": str(victim)},
    "a name of dots": lambda victim: {"name": "../victim"},
}


@pytest.mark.parametrize("how", HOSTILE)
@pytest.mark.parametrize("marked", [False, True])
def test_a_strange_status_removes_nothing_elsewhere(prepare, tmp_path, how, marked):
    """A run folder from a stranger: what its status.json names is neither cleared nor written to by --overwrite, nor by --prune."""
    victim = tmp_path / "victim"
    path = save(victim, 3)
    ck.link(victim, "best_model.pt", path)
    (victim / "events.out.tfevents.1").touch()
    (victim / "projector_config.pbtxt").touch()
    if marked:  # by a run that is gone
        (victim / ".lock").write_text(f"7\n{tmp_path}/gone\n")
        (victim / ".run").write_text(f"{tmp_path}/gone\n")
    strange = tmp_path / "strange"
    strange.mkdir()
    before = {found: found.read_bytes() for found in victim.rglob("*") if found.is_file()}
    for act in ("overwrite", "prune"):
        runs.write_status(strange, "finished", 3, **HOSTILE[how](victim))
        if act == "overwrite":
            run = prepare(paths(strange), overwrite=True)
            assert victim.resolve() not in (run.checkpoint_dir.resolve(), run.tensorboard_dir.resolve())
            assert len(prepare.lines) == (2 if how == "another's folders" else 0)
        else:
            lines: list[str] = []
            assert runs.clear_folders(strange, victim, victim, lines.append) and len(lines) == 2 and str(victim) in lines[0]
        assert {found: found.read_bytes() for found in victim.rglob("*") if found.is_file()} == before


def test_a_run_folder_that_was_moved_with_all_in_it_is_overwritten_and_removed(prepare, tmp_path):
    for act in ("overwrite", "prune"):
        old, new = tmp_path / f"{act}-old", tmp_path / f"{act}-new"
        run = prepare(paths(old, old / "tb", old / "ckpt"))
        save(run.checkpoint_dir, 3)
        (run.tensorboard_dir / "events.out.tfevents.1").touch()
        shutil.move(old, new)
        lines: list[str] = []
        if act == "overwrite":
            prepare(paths(new, new / "tb", new / "ckpt"), overwrite=True)
            lines = prepare.lines
        else:
            assert runs.clear_folders(new, new / "ckpt", new / "tb", lines.append) and not new.exists()
        assert not lines and not ck.list_checkpoints(new / "ckpt") and not list(new.glob("tb/events*"))


def test_events_are_a_run_s_own_only_where_no_other_lie(prepare, tmp_path):
    """Of a run from before there was a mark, and of two runs that share a folder, none are removed."""
    old, shared = tmp_path / "old", tmp_path / "shared"
    for folder in (old, shared):
        folder.mkdir()
    (old / "events.out.tfevents.1").touch()
    prepare(paths(tmp_path / "a", old, tmp_path / "ca"))
    prepare(paths(tmp_path / "a", old, tmp_path / "ca"), overwrite=True)
    assert len(list(old.glob("events*"))) == 1 and len(prepare.lines) == 1 and "old stays as it is" in prepare.lines[0]
    for name in "bc":
        prepare(paths(tmp_path / name, shared, tmp_path / f"c{name}"))
        (shared / f"events.out.tfevents.{name}").touch()
    for name in "bc":
        prepare(paths(tmp_path / name, shared, tmp_path / f"c{name}"), overwrite=True)
    assert len(list(shared.glob("events*"))) == 2


def test_two_runs_do_not_share_a_checkpoint_folder(prepare, tmp_path):
    """While another process's run lives there, nothing in it is cleaned or renamed."""
    (tmp_path / "ckpt/.tmp-x-1").mkdir(parents=True)
    hold = "import fcntl, sys, os, time; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX)\n"
    hold += "f.write(str(os.getpid())); f.flush(); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / "ckpt/.lock")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"ckpt: a run is going on there \(process {holder.pid}\)"):
            prepare(paths(tmp_path / "other", checkpoint=tmp_path / "ckpt"))
        assert (tmp_path / "ckpt/.tmp-x-1").is_dir()
    finally:
        holder.kill()
        holder.wait()


def test_resuming_does_not_take_what_cannot_be_read_for_damaged(prepare, monkeypatch):
    """A disk that fails for the moment, or another version's checkpoint, must not throw a run back to its start."""
    run = prepare()
    save(run.checkpoint_dir, 3)
    name = save(run.checkpoint_dir, 6).name

    def failing(path, expected):
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(ck, "_verify", failing)
        with pytest.raises(UserError, match="Input/output error.*may be whole"):
            prepare(resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(ck, "FORMAT_VERSION", 3)
        with pytest.raises(UserError, match="format_version is 2; expected 3"):
            prepare(resume=True)
    assert len(ck.list_checkpoints(run.checkpoint_dir)) == 2
    assert prepare(resume=True).resume_from.name == name


def test_what_was_set_aside_before_stays(tmp_path):
    lines = []
    for _ in range(2):
        save(tmp_path, 6, 1.0)
        ck.set_aside_newer(tmp_path, 3, lines.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"damaged-global_step6.valid_loss=1.0000{end}" for end in ("", "-2")]
