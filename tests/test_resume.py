"""main.py --resume where there is little to go on with: what is refused, what has nothing left to train, and how to train longer."""

import json
import shlex
from pathlib import Path

import test_main
from test_main import assert_mistake, contents, places, run_main, status_of

from checkpoint import list_checkpoints

world = test_main.world  # the fixture

def test_a_refused_start_from_anothers_checkpoint_is_a_failed_run(world):
    start = list_checkpoints(world.cwd / "whole/ckpt")[-1]
    assert_mistake(world.run(*places(Path("refused")), "--resume_path", start, "--hidden_units", 16), "hidden_units")
    status = status_of(world.cwd / "refused/log")
    assert status["state"] == "failed" and "hidden_units" in status["reason"] and not (world.cwd / "refused/log/command.txt").exists()


def test_a_resume_with_nothing_left_to_train_says_so_and_keeps_the_settings(world):
    assert world.run(*places(Path("ended"))).status == 0
    log = world.cwd / "ended/log"
    before = contents(log)
    result = world.run(*places(Path("ended")), "--resume_path", "ended/log", "--learning_rate", 0.7)
    assert result.status == 0 and "resumed at step 8" in result.out
    assert "nothing left to train: 8 steps are done and the settings ask for 8. To go on raise num_epochs (now 2)." in result.out
    after = contents(log)
    assert {name for name in after if after[name] != before.get(name)} <= {"train.log", "status.json", "metrics.json", "report.html"}
    assert "learning_rate: 0.7" not in (log / "config.resolved.yaml").read_text() and "0.7" not in (log / "command.txt").read_text()
    assert json.loads(after["metrics.json"]) == json.loads(before["metrics.json"]) and status_of(log)["state"] == "finished"
    # A run whose patience is at its end: more epochs alone would change nothing.
    flags = (*places(Path("patient")), "--num_epochs", 9, "--patience", 1, "--learning_rate", 1e-12)
    result = world.run(*flags)
    assert result.status == 0 and status_of(world.cwd / "patient/log")["step"] == 8
    result = world.run(*flags, "--resume")
    assert "nothing left to train: the last 1 evaluations were no better. To go on raise patience (now 1)." in result.out
    (line,) = [line for line in result.out.splitlines() if line.strip().startswith("train longer")]
    assert line.endswith("--num_epochs 18 --patience 2")


def test_train_longer_counts_the_steps_done(world):
    assert world.run(*places(Path("steps")), "--max_steps", 6).status == 0
    result = world.run(*places(Path("steps")), "--resume", "--max_steps", 5)
    assert "6 steps are done and the settings ask for 5. To go on raise max_steps (now 5)." in result.out
    (line,) = [line for line in result.out.splitlines() if line.strip().startswith("train longer")]
    assert line.endswith("--max_steps 12")
    command = shlex.split(line.split("train longer")[1])
    assert run_main(*command[2:], cwd=world.cwd).status == 0 and status_of(world.cwd / "steps/log")["step"] == 12
