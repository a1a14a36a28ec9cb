"""run_list.py and report.py --list, --prune: what is listed, what stays and why, and that nothing else is ever removed."""

import json
import os
import shutil

import pytest

import report
import runs
from errors import UserError
from run_list import find_runs, plan_removal
from runs import write_status


def make(base, name, ndcg=None, state="finished", ended=0, **status):
    """A run folder under base/logs with a checkpoint and events of its own."""
    folder, checkpoint, events = base / "logs" / name, base / "checkpoints" / name, base / "tb" / name
    for path in (folder, checkpoint / "global_step4.valid_loss=1.0000", events):
        path.mkdir(parents=True)
    for file in ("model.pt", "trainer.pt", "meta.json"):
        (checkpoint / "global_step4.valid_loss=1.0000" / file).write_bytes(b"x" * 1000)
    os.link(checkpoint / "global_step4.valid_loss=1.0000/model.pt", checkpoint / "best_model.pt")
    (events / "events.out.tfevents.1").write_bytes(b"e" * 500)
    (checkpoint / ".lock").write_text(f"7\n{folder}\n")  # as prepare_run marks them
    (events / ".run").write_text(f"{folder}\n")
    where = {"checkpoint_path": str(checkpoint), "tensorboard_path": str(events)}
    write_status(folder, state, 4, name=name, **(where | status))
    # 65 s of work with an hour's pause in it
    lines = ({"global_step": 1, "time": 10.0, "run_seconds": 5.0}, {"global_step": 4, "time": 3670.0, "run_seconds": 65.0})
    (folder / "train.log").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if ndcg is not None:
        (folder / "metrics.json").write_text(json.dumps({"split": "test", "hr@10": 0.2, "ndcg@10": ndcg, "checkpoint": f"{checkpoint}/x"}))
    age(folder, ended)
    return folder


def age(folder, ended):
    for path in folder.iterdir():
        os.utime(path, (1000 + ended, 1000 + ended))


@pytest.fixture
def logs(tmp_path):
    make(tmp_path, "weak", 0.1, ended=1)
    make(tmp_path, "best", 0.3, ended=2)
    make(tmp_path, "broken", state="failed", ended=3)
    make(tmp_path, "stopped", state="interrupted", ended=4)
    make(tmp_path, "last", 0.2, ended=5)
    return tmp_path / "logs"


def everything(base):
    return {str(path.relative_to(base)) for path in base.rglob("*")}


def test_list(logs, capsys):
    assert report.main(["--list", str(logs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "kind", "state", "step", "HR@10", "NDCG@10", "time", "size"]
    row = next(line for line in lines if "/best" in line).split()
    # 3 files of 1000 bytes (best_model.pt is a link to one), the events, and the run folder's own small ones.
    marks = (logs.parent / "checkpoints/best/.lock", logs.parent / "tb/best/.run")
    size = 3000 + 500 + sum(path.stat().st_size for path in [*(logs / "best").iterdir(), *marks])
    assert row[1:] == ["train", "finished", "4", "0.2000", "0.3000", "0:01:05", f"{size / 1000:.1f}", "kB", "best"]
    assert [line.split()[0].split("/")[-1] for line in lines[2:]] == ["weak", "best", "broken", "stopped", "last"]


def test_plan(logs):
    kept, removed = plan_removal(find_runs([logs]))
    assert {run.folder.name: why.split(":")[0] for run, why in kept} == {
        "best": "the best of its data",
        "last": "the newest",
        "stopped": "interrupted",
    }
    assert sorted(run.folder.name for run in removed) == ["broken", "weak"]


def test_prune_shows_first_and_removes_only_when_told(logs, capsys):
    base = logs.parent
    before = everything(base)
    assert report.main(["--prune", str(logs)]) == 0
    assert "nothing was removed" in capsys.readouterr().out and everything(base) == before
    assert report.main(["--prune", "--yes", str(logs)]) == 0
    assert "2 of 2 runs removed" in capsys.readouterr().out
    gone = {path for path in before - everything(base)}
    assert gone == {path for path in before if {"weak", "broken"} & set(path.split("/"))}
    assert report.main(["--prune", "--yes", str(logs)]) == 0 and "nothing to remove" in capsys.readouterr().out


def test_what_is_not_the_run_s_stays(logs):
    """Files of others in its folders, folders that another run uses, and whatever a broken status.json points at."""
    base = logs.parent
    (logs / "weak/notes.txt").write_text("mine")
    (base / "checkpoints/weak/thesis.tex").write_text("mine")
    shared = base / "checkpoints/best"
    write_status(logs / "broken", "failed", 0, checkpoint_path=str(shared), tensorboard_path=str(base))
    age(logs / "broken", 3)
    before = everything(base)
    report.main(["--prune", "--yes", str(logs)])
    assert (logs / "weak/notes.txt").is_file() and not (logs / "weak/status.json").exists()
    assert (base / "checkpoints/weak/thesis.tex").is_file() and not (base / "checkpoints/weak/best_model.pt").exists()
    assert not (logs / "broken").exists() and {path for path in before if path.startswith("checkpoints/best")} <= everything(base)


def test_a_run_that_is_going_on_stays(logs, monkeypatch):
    monkeypatch.setattr("run_list.is_alive", lambda folder: folder.name == "broken")
    write_status(logs / "broken", "running", 1)
    age(logs / "broken", 3)
    assert "a run is going on there" in [why for _, why in plan_removal(find_runs([logs]))[0]]
    monkeypatch.setattr(runs, "_take_lock", lambda folder: (None, 4711))  # it began between the look and the removal
    before = everything(logs.parent)
    report.main(["--prune", "--yes", str(logs)])
    assert everything(logs.parent) == before


def test_killed_runs_and_runs_without_a_checkpoint(logs):
    write_status(logs / "weak", "running", 1, **{key: str(logs.parent / "checkpoints/weak") for key in ("checkpoint_path",)})
    age(logs / "weak", 1)
    states = {run.folder.name: run.state for run in find_runs([logs])}
    assert states["weak"] == "killed"
    assert {run.folder.name for run in plan_removal(find_runs([logs]))[1]} == {"broken"}
    shutil.rmtree(logs.parent / "checkpoints/stopped")
    assert "stopped" in {run.folder.name for run in plan_removal(find_runs([logs]))[1]}


def test_evaluations_stay_with_their_run(logs):
    for owner in ("best", "weak"):
        folder = logs / owner / "eval-1"
        folder.mkdir()
        write_status(folder, "finished", 4, kind="eval")
        (folder / "metrics.json").write_text(json.dumps({"ndcg@10": 0.9, "checkpoint": str(logs.parent / "checkpoints" / owner / "x")}))
    kept, removed = plan_removal(find_runs([logs]))
    assert str(logs / "best/eval-1") in {str(run.folder) for run, _ in kept}
    assert str(logs / "weak/eval-1") in {str(run.folder) for run in removed}
    report.main(["--prune", "--yes", str(logs)])
    assert not (logs / "weak").exists() and (logs / "best/eval-1/metrics.json").is_file()


def test_runs_of_other_data_have_a_best_of_their_own(logs):
    (logs / "weak/report.json").write_text('{"fingerprint": "other"}')
    kept, _ = plan_removal(find_runs([logs]))
    assert [run.folder.name for run, why in kept if why == "the best of its data"] == ["weak", "best"]


def test_a_link_to_a_run_is_no_run(logs):
    (logs / "link").symlink_to(logs / "weak")
    assert [run.folder.name for run in find_runs([logs])] == ["weak", "best", "broken", "stopped", "last"]


def test_mistakes(tmp_path, logs, capsys):
    with pytest.raises(UserError, match="no such folder"):
        report.main(["--list", str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="--yes confirms --prune"):
        report.main(["--list", "--yes", str(logs)])
    (tmp_path / "none").mkdir()
    assert report.main(["--list", str(tmp_path / "none")]) == 0 and report.main(["--prune", str(tmp_path / "none")]) == 0
    assert "nothing to remove" in capsys.readouterr().out
