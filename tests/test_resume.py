"""main.py's runs that do not take the usual way: refused, with nothing left to train, gone on with, interrupted, failed."""

import errno
import json
import os
import shlex
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
import test_main
from test_main import assert_mistake, contents, interrupt_at, places, run_main, start_and_stop, status_of
from test_report import Page

import main
import trainer
from atomic import write_text_atomic
from checkpoint import list_checkpoints
from errors import OutOfTimeError, at_most

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
    flags = (*places(Path("patient")), "--num_epochs", 9, "--patience", 1, "--optimizer", "adamw", "--learning_rate", 1e-12)
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


# ---- a run that ends before its test has a report, too ----


def page_of(log: Path) -> Page:
    return Page((log / "report.html").read_text(encoding="utf-8"))


def test_an_interrupted_run_has_a_report_with_its_data(world):
    with mock.patch.object(trainer.Trainer, "_update", interrupt_at(2)):
        result = world.run(*places(Path("early")))
    log = world.cwd / "early/log"
    assert result.status == 130 and "report: early/log/report.html" in result.out and "Go on with: " in result.out.splitlines()[-1]
    text = page_of(log).text
    assert "State: interrupted at step 3: signal 2" in text and "events of a user" in text and "No figures of the data" not in text
    assert "No slices: the run was interrupted at step 3, before its test. The first of the commands below goes on with it." in text
    assert "No sample users: the run was interrupted at step 3" in text and "tested before the report kept them" not in text
    assert set(json.loads((log / "report.json").read_text())) == {"version", "fingerprint", "data_key", "data"}
    # Gone on with and interrupted in its test: what is known of an earlier test stays.
    assert world.run(*places(Path("early")), "--resume").status == 0
    before = (log / "report.json").read_bytes()
    with mock.patch.object(trainer.Trainer, "_update", interrupt_at(10)):
        assert world.run(*places(Path("early")), "--resume", "--num_epochs", 4).status == 130
    assert (log / "report.json").read_bytes() == before
    assert "State: interrupted at step 11" in page_of(log).text and "No slices" not in page_of(log).text
    # Tested on the validation split, its figures are of that.
    with mock.patch.object(trainer.Trainer, "_update", interrupt_at(11)):
        assert world.run(*places(Path("early")), "--resume", "--num_epochs", 4, "--test", "false").status == 130
    assert "quality" not in json.loads((log / "report.json").read_text()) and "quality" in json.loads(before)


def test_a_diverged_run_has_a_report(world):
    result = world.run(*places(Path("nan")), "--learning_rate", 1e38, "--gradient_clip", 0)
    assert result.status == 1 and "report: nan/log/report.html" in result.out and "stopped before the update" in result.err
    text = page_of(world.cwd / "nan/log").text
    assert "State: failed at step" in text and "No slices: the run failed at step" in text and "events of a user" in text


def test_a_signal_that_ends_a_run_at_once_leaves_a_report(world):
    """Two signals in one step: no checkpoint; SIGTERM before the training: the data were being read."""
    with mock.patch.object(trainer.Trainer, "_update", lambda *_: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]):
        assert world.run(*places(Path("twice"))).status == 130
    assert "State: interrupted at step 0: KeyboardInterrupt" in page_of(world.cwd / "twice/log").text
    with mock.patch.object(main, "open_data", lambda *_: os.kill(os.getpid(), signal.SIGTERM)):
        assert world.run(*places(Path("sooner"))).status == 143
    assert "No figures of the data: the run was interrupted at step 0" in page_of(world.cwd / "sooner/log").text


def test_the_report_of_a_stopped_run_takes_seconds_at_most_and_hides_no_error(world, monkeypatch):
    monkeypatch.setattr(main, "REPORT_SECONDS", 0.2)
    begin = time.monotonic()
    with mock.patch.object(main, "write_report", lambda _: time.sleep(60)):
        with mock.patch.object(trainer.Trainer, "_update", interrupt_at(2)):
            result = world.run(*places(Path("slow")))
    assert result.status == 130 and time.monotonic() - begin < 30 and status_of(world.cwd / "slow/log")["state"] == "interrupted"
    assert "no report was written (OutOfTimeError: more than 0.2 s). Try: python report.py slow/log" in result.out
    for number, failure in enumerate((KeyError("a fault of ours"), KeyboardInterrupt())):
        with mock.patch.object(main, "write_report", side_effect=failure):
            result = world.run(*places(Path(f"faulty{number}")), "--learning_rate", 1e38, "--gradient_clip", 0)
        assert result.status == 1 and "stopped before the update" in result.err and "fault" not in result.err
        assert status_of(world.cwd / f"faulty{number}/log")["state"] == "failed"


def test_a_full_disk_leaves_no_report_and_its_own_error(world):
    def full(path, text):
        if Path(path).name in ("report.html", "report.json"):
            raise main.RunError(f"{path}: no space left to write")
        write_text_atomic(path, text)

    def update(self, batch, features):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the disk")

    with mock.patch("report.write_text_atomic", full), mock.patch("report_data.write_text_atomic", full):
        with mock.patch.object(trainer.Trainer, "_update", update):
            result = world.run(*places(Path("full")))
    assert result.status == 1 and result.err.startswith("error: the disk: no space left to write")
    assert "warning: full/log/report.json: no space left" in result.out and "no report was written" not in result.out
    assert not (world.cwd / "full/log/report.html").exists()


def test_an_evaluation_that_is_stopped_has_a_report(world):
    flags = ("--log_path", "stopped", "--inference_only", "--state_dict_path", "whole/ckpt/best_model.pt")
    with mock.patch.object(trainer.Trainer, "rank", side_effect=KeyboardInterrupt):
        assert run_main("--data_path", "data", *flags, cwd=world.cwd).status == 130
    (log,) = (world.cwd / "stopped").glob("eval-*")
    assert "No slices: the run was interrupted at step 0, before its test." in page_of(log).text


def test_a_killed_run_is_reported_as_one_that_did_not_come_to_its_test(world):
    assert start_and_stop(world, "killed", signal.SIGKILL) == -signal.SIGKILL
    main.write_report(world.cwd / "killed/log")
    assert "No slices: the run has not come to its test yet, or was killed before it." in page_of(world.cwd / "killed/log").text


def test_a_time_limit_ends_what_takes_longer_and_nothing_else():
    with at_most(5):
        pass
    with pytest.raises(OutOfTimeError), at_most(0.05):
        time.sleep(5)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0) and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
