"""main.py as its users start it: exit statuses, the run folder, signals and resume, evaluation of a checkpoint, mistakes, run.sh."""

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import yaml

import main
import trainer
from checkpoint import list_checkpoints
from config import KEYS
from errors import run_cli
from logger import read_train_log
from report_read import read_run
from synthetic import generate

ROOT = Path(__file__).resolve().parents[1]
VARIABLES = {key.env for key in KEYS.values() if key.env}
# 54 training users: 4 steps an epoch, 8 in all.
SMALL = {
    "model": {"hidden_units": 8, "num_blocks": 1, "max_seq_length": 10},
    "training": {"batch_size": 16, "num_epochs": 2, "save_every_steps": 2, "keep_last_k": 0},
    "loss": {"num_negatives": 8},
    "system": {"log_every_steps": 1, "num_threads": 1, "tensorboard": False},
}
STEPS = 8
# Runs main.py and sends itself SIGNAL in the middle of the step after AT ones, as kill would from outside.
DRIVER = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import main, trainer
from errors import run_cli
update = trainer.Trainer._update
def update_and_signal(self, batch, features):
    update(self, batch, features)
    if self.step == int(os.environ["AT"]):
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
trainer.Trainer._update = update_and_signal
sys.exit(run_cli(main.main))
"""


class Result(NamedTuple):
    status: int
    out: str
    err: str


def run_main(*flags: object, cwd: Path, entry=main, environ: dict | None = None) -> Result:
    """`python main.py FLAGS` in this process (2.5 s of imports a process otherwise), in folder cwd, without this shell's variables."""
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES} | (environ or {})
    out, err, threads = io.StringIO(), io.StringIO(), torch.get_num_threads()
    words = [f"{entry.__name__}.py", *map(str, flags)]
    with mock.patch.dict(os.environ, clean, clear=True), mock.patch.object(sys, "argv", words), chdir(cwd):
        with redirect_stdout(out), redirect_stderr(err):
            try:
                status = run_cli(entry.main)
            except SystemExit as leaving:
                status = leaving.code
            finally:
                torch.set_num_threads(threads)
    return Result(status, out.getvalue(), err.getvalue())


def run_process(*command: object, cwd: Path, **environ: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=clean | {"OMP_NUM_THREADS": "1"} | environ,
                          capture_output=True, text=True, check=False, timeout=120)  # fmt: skip


def train_small(folder: Path, settings: dict, data: str = "data") -> None:
    """folder/small.yaml of these settings, and a run of them on folder/`data` in folder/log and folder/ckpt."""
    (folder / "small.yaml").write_text(yaml.safe_dump(settings))
    done = run_main("--config", "small.yaml", "--data_path", data, "--log_path", "log", "--checkpoint_path", "ckpt", cwd=folder)
    assert done.status == 0, done.err


def places(folder: Path) -> list:
    return ["--log_path", folder / "log", "--checkpoint_path", folder / "ckpt", "--tensorboard_path", folder / "tb"]


def status_of(log_dir: Path) -> dict:
    return json.loads((log_dir / "status.json").read_text())


def weights_of(checkpoint: Path) -> dict:
    return torch.load(checkpoint / "model.pt", weights_only=True)


def losses_of(log_dir: Path) -> dict:
    return {r["global_step"]: r["loss"] for r in read_train_log(log_dir / "train.log") if "loss" in r}


def metrics_of(log_dir: Path) -> dict:
    return {key: value for key, value in json.loads((log_dir / "metrics.json").read_text()).items() if key != "checkpoint"}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below, byte by byte, but the locks: these name the last process that held them."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"
    }


# Flags with which no run of SMALL goes on, and a word of what is said.
REFUSED = [
    (("--batch_size", 8), "batch_size"),
    (("--hidden_units", 16), "hidden_units: 8 there, 16 here"),
    (("--data_path", "other_data"), "checkpoint"),
]


def assert_mistake(result: Result, *words: str, lines: int = 3) -> None:
    """Exit status 2 and a short message on stderr with these words, no traceback."""
    assert result.status == 2, result
    assert "Traceback" not in result.err and len(result.err.strip().splitlines()) <= lines, result.err
    for word in words:
        assert word in result.err, result.err


class World(NamedTuple):
    """What the tests share: cwd with data/, small.yaml, and an undisturbed run in whole/ (log, ckpt, tb)."""

    cwd: Path
    flags: tuple

    def run(self, *flags: object, **options) -> Result:
        return run_main(*self.flags, *flags, cwd=self.cwd, **options)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    cwd = tmp_path_factory.mktemp("main")
    generate(cwd / "data", 60, 80, "jsonl", max_length=10, mean_length=7)
    (cwd / "small.yaml").write_text(yaml.safe_dump(SMALL))
    flags = ("--config", "small.yaml", "--data_path", "data")
    done = run_process(ROOT / "main.py", *flags, *places(Path("whole")), "--tensorboard", cwd=cwd)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    (cwd / "console.txt").write_text(done.stdout)
    return World(cwd, flags)


# ---- a run from start to end ----


def test_run_folder_is_complete(world):
    log = world.cwd / "whole/log"
    status = status_of(log)
    assert status["state"] == "finished" and status["step"] == STEPS and status["reason"] == ""
    settings = yaml.safe_load((log / "config.resolved.yaml").read_text())
    assert settings["model"]["hidden_units"] == 8 and settings["paths"]["data_path"] == "data"
    assert {key for group in settings.values() for key in group} == set(KEYS)
    assert "main.py --config small.yaml" in (log / "command.txt").read_text()
    machine = json.loads((log / "environment.json").read_text())
    assert machine["threads"] == 1 and machine["device"].startswith("cuda" if torch.cuda.is_available() else "cpu")
    report = (log / "report.html").read_text()
    assert f"{machine['device']} (asked for: auto)" in report
    assert "<svg" in report and "http://" not in report and "https://" not in report


def test_train_log_has_the_promised_fields(world):
    records = [json.loads(line) for line in (world.cwd / "whole/log/train.log").read_text().splitlines()]
    training = [record for record in records if "loss" in record]
    assert [record["global_step"] for record in training] == list(range(1, STEPS + 1))
    for record in training:
        assert {"global_step", "loss", "epoch", "time", "lr", "grad_norm", "users_per_s"} <= set(record)
    assert [record["epoch"] for record in training] == [0] * 4 + [1] * 4
    valid = [record for record in records if record.get("split") == "valid"]
    assert [record["global_step"] for record in valid] == [4, 8] and "ndcg@10" in valid[0] and "valid_loss" in valid[0]


def test_a_log_line_at_least_every_log_every_steps(world):
    world.run(*places(Path("sparse")), "--log_every_steps", 3, "--no-baselines")
    assert sorted(losses_of(world.cwd / "sparse/log")) == [3, 6, 8]


def test_the_log_is_whole_where_the_best_checkpoint_is_an_early_one(world):
    """The line of the test split names the best checkpoint's step; a reader (report.html's curves) must not lose what came after."""
    assert world.run(*places(Path("early")), "--optimizer", "adamw", "--learning_rate", 1e-12, "--num_epochs", 3).status == 0
    log = world.cwd / "early/log"
    assert json.loads((log / "metrics.json").read_text())["step"] == 4
    assert sorted(losses_of(log)) == list(range(1, 13))
    assert [r["global_step"] for r in read_train_log(log / "train.log") if r.get("split") == "valid"] == [4, 8, 12]


def test_metrics_have_the_keys_of_the_interface(world):
    metrics = json.loads((world.cwd / "whole/log/metrics.json").read_text())
    wanted = {"split", "protocol", "hr@10", "ndcg@10", "score", "num_users", "num_candidates", "seen_removed", "checkpoint"}
    wanted |= {f"{name}.{key}" for name in ("popularity", "recent", "item2item") for key in ("hr@10", "ndcg@10")}
    assert wanted <= set(metrics)
    assert (metrics["split"], metrics["protocol"], metrics["num_users"], metrics["num_candidates"]) == ("test", "holdout", 3, 80)
    assert metrics["seen_removed"] is True and (world.cwd / metrics["checkpoint"] / "model.pt").is_file()
    assert not any(isinstance(value, (dict, list)) for value in metrics.values())


def test_tensorboard_tags(world):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    events = accumulator(str(world.cwd / "whole/tb"))
    events.Reload()
    assert {"Loss/train", "Loss/valid", "train/lr", "train/grad_norm", "eval/hr@10", "eval/ndcg@10", "eval/score", "perf/users_per_s",
            "perf/data_wait", "mem/rss_gib", "time"} <= set(events.Tags()["scalars"])  # fmt: skip
    # What board.py adds besides: the layout of the charts, the settings, the report's slices at each evaluation, hparams.
    assert {"custom_scalars__config__", "settings/text_summary", "quality by slice/text_summary"} <= set(events.Tags()["tensors"])
    assert [point.step for point in events.Tensors("quality by slice/text_summary")] == [4, 8]
    assert {"quality by slice", "place of the target"} <= set(events.Tags()["images"])
    assert "_hparams_/session_start_info" in events.PluginTagToContent("hparams")
    assert [point.step for point in events.Scalars("Loss/train")] == list(range(1, STEPS + 1))
    assert [point.step for point in events.Scalars("Loss/valid")] == [4, 8]


def test_checkpoints_and_links(world):
    root = world.cwd / "whole/ckpt"
    folders = list_checkpoints(root)
    assert [int(path.name.split(".")[0].removeprefix("global_step")) for path in folders] == [2, 4, 6, 8]
    for path in folders:
        assert {file.name for file in path.iterdir()} == {"model.pt", "trainer.pt", "meta.json"}
        assert all(isinstance(value, torch.Tensor) for value in weights_of(path).values())
    best = world.cwd / json.loads((world.cwd / "whole/log/metrics.json").read_text())["checkpoint"]
    assert os.path.samefile(root / "best_model.pt", best / "model.pt")
    for epoch, folder in ((1, folders[1]), (2, folders[3])):
        assert os.path.samefile(root / f"checkpoint_epoch_{epoch}.pt", folder / "model.pt")
    valid = [r for r in read_train_log(world.cwd / "whole/log/train.log") if r.get("split") == "valid"]
    assert folders[3].name == f"global_step8.valid_loss={valid[1]['valid_loss']:.4f}"


def test_console_says_what_is_used_and_what_to_do_next(world):
    text = (world.cwd / "console.txt").read_text()
    for words in ("device ", "(flag --data_path)", "samples  ", "compiled now", "evaluation on valid", "report "):
        assert words in text, words
    best = "whole/ckpt/best_model.pt"
    assert f"best checkpoint  {best}" in text and f"--inference_only --state_dict_path {best}" in text


def test_the_same_settings_give_the_same_run(world):
    assert world.run(*places(Path("again"))).status == 0
    assert losses_of(world.cwd / "again/log") == losses_of(world.cwd / "whole/log")
    assert metrics_of(world.cwd / "again/log") == metrics_of(world.cwd / "whole/log")
    assert "found in the cache" in world.run(*places(Path("again2")), "--max_steps", 1).out


def test_without_paths_the_run_gets_folders_of_its_own(world, tmp_path):
    assert run_main("--config", world.cwd / "small.yaml", "--data_path", world.cwd / "data", "--run_name", "my run", "--max_steps", 1,
                    "--cache_path", world.cwd / "cache", "--tensorboard", cwd=tmp_path).status == 0  # fmt: skip
    (name,) = (path.name for path in (tmp_path / "logs").iterdir())
    assert name.endswith("-my_run")
    assert (tmp_path / "checkpoints" / name / "best_model.pt").is_file() and list((tmp_path / "tb_logs" / name).glob("events*"))


def test_platform_variables_set_the_paths(world, tmp_path):
    environ = {"TRAIN_DATA_PATH": str(world.cwd / "data"), "TRAIN_LOG_PATH": str(tmp_path / "l"),
               "TRAIN_TF_EVENTS_PATH": str(tmp_path / "t"), "TRAIN_CKPT_PATH": str(tmp_path / "c"),
               "USER_CACHE_PATH": str(tmp_path / "cache"), "BATCH_SIZE": "27", "DEVICE": ""}  # fmt: skip
    result = run_main("--config", world.cwd / "small.yaml", "--tensorboard", "--num_epochs", 1, cwd=tmp_path, environ=environ)
    assert result.status == 0, result.err
    assert status_of(tmp_path / "l")["step"] == 2  # 54 users, 27 a batch
    assert (
        (tmp_path / "c/best_model.pt").is_file() and list((tmp_path / "t").glob("events*")) and list((tmp_path / "cache").glob("store-*"))
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "cache", "l", "t"]


def test_a_report_that_cannot_be_drawn_is_said_and_leaves_the_run_finished(world):
    with mock.patch.object(main, "write_report", side_effect=KeyError("a fault of ours")), pytest.raises(KeyError, match="a fault of ours"):
        world.run(*places(Path("undrawn")), "--max_steps", 1)
    assert status_of(world.cwd / "undrawn/log")["state"] == "finished" and metrics_of(world.cwd / "undrawn/log")["num_users"]


# ---- signals, failures, resume ----


def start_and_stop(world: World, name: str, number: signal.Signals) -> int:
    (world.cwd / "driver.py").write_text(DRIVER)
    done = run_process("driver.py", *world.flags, *places(Path(name)), cwd=world.cwd, AT="5", SIGNAL=str(int(number)))
    assert "Traceback" not in done.stderr
    return done.returncode


def assert_went_on_exactly(world: World, name: str, result: Result, step: int) -> None:
    """The run in folder `name` was resumed at `step` and is the undisturbed one now."""
    assert result.status == 0, result.err
    assert f"resumed at step {step} from {name}/ckpt/global_step{step}." in result.out
    ours, whole = world.cwd / name, world.cwd / "whole"
    assert status_of(ours / "log")["state"] == "finished"
    assert losses_of(ours / "log") == losses_of(whole / "log") and metrics_of(ours / "log") == metrics_of(whole / "log")
    last, expected = (list_checkpoints(folder / "ckpt")[-1] for folder in (ours, whole))
    assert last.name == expected.name
    for key, value in weights_of(expected).items():
        assert torch.equal(value, weights_of(last)[key]), key


def test_kill_9_inside_an_epoch_then_resume_is_exact(world):
    assert start_and_stop(world, "killed", signal.SIGKILL) == -signal.SIGKILL
    log = world.cwd / "killed/log"
    assert status_of(log)["state"] == "running" and sorted(losses_of(log)) == [1, 2, 3, 4, 5]
    before = (log / "train.log").read_bytes()
    result = world.run(*places(Path("killed")), "--resume")
    assert_went_on_exactly(world, "killed", result, step=4)
    after = (log / "train.log").read_bytes()
    assert after.startswith(before)  # appended to, nothing rewritten; step 5 stands there twice
    assert [json.loads(line)["global_step"] for line in after.splitlines() if b'"loss"' in line] == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert len((log / "command.txt").read_text().splitlines()) == 2
    # Two processes, and what lies between them does not count: the second one's first line goes on from the first one's last.
    ran, when = ([json.loads(line)[key] for line in after.splitlines()] for key in ("run_seconds", "time"))
    begin = before.count(b"\n")
    assert ran == sorted(ran) and ran[begin] - ran[begin - 1] < when[begin] - when[begin - 1] and read_run(log).seconds == ran[-1]


def test_sigterm_saves_and_the_rest_is_exact(world):
    assert start_and_stop(world, "stopped", signal.SIGTERM) == 143
    status = status_of(world.cwd / "stopped/log")
    assert (status["state"], status["step"], status["reason"]) == ("interrupted", 6, "signal 15")
    assert_went_on_exactly(world, "stopped", world.run(*places(Path("stopped")), "--resume"), step=6)


def interrupt_at(step: int) -> Callable:
    """A Trainer._update that sends this process SIGINT in the middle of a step."""
    update = trainer.Trainer._update

    def update_and_interrupt(self, batch, features):
        update(self, batch, features)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return update_and_interrupt


def test_interrupt_is_130_and_the_command_it_names_goes_on(world):
    with mock.patch.object(trainer.Trainer, "_update", interrupt_at(2)):
        result = world.run(*places(Path("interrupted")))
    assert result.status == 130 and "interrupted at step 3; checkpoint written." in result.out
    assert status_of(world.cwd / "interrupted/log")["state"] == "interrupted"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with mock.patch.object(trainer.Trainer, "_update", interrupt_at(5)):
        result = world.run(*places(Path("interrupted")), "--resume_path", "interrupted/ckpt")
    assert result.status == 130 and "resumed at step 3 from interrupted/ckpt" in result.out
    command = shlex.split(result.out.strip().splitlines()[-1].split("Go on with: ")[1])
    assert command[:2] == ["python", "main.py"] and "--resume" in command
    assert_went_on_exactly(world, "interrupted", run_main(*command[2:], cwd=world.cwd), step=6)


def test_resume_path_goes_on_from_another_runs_checkpoint(world):
    for place, step in ((1, 4), (3, 8)):  # from the middle, and with nothing left to train
        start = list_checkpoints(world.cwd / "whole/ckpt")[place].relative_to(world.cwd)
        before = status_of(world.cwd / "whole/log")
        result = world.run(*places(Path(f"from{step}")), "--resume_path", start)
        assert result.status == 0 and f"resumed at step {step} from {start}" in result.out, result.err
        last = list_checkpoints(world.cwd / f"from{step}/ckpt")[-1]
        for key, value in weights_of(list_checkpoints(world.cwd / "whole/ckpt")[-1]).items():
            assert torch.equal(value, weights_of(last)[key]), key
        assert (world.cwd / f"from{step}/log/metrics.json").is_file() and status_of(world.cwd / "whole/log") == before


def test_a_finished_run_goes_on_for_more_epochs(world):
    result = world.run(*places(Path("more")))
    (line,) = [line for line in result.out.splitlines() if line.strip().startswith("train longer")]
    command = shlex.split(line.split("train longer")[1])
    assert command[-2:] == ["--num_epochs", "4"]
    result = run_main(*command[2:], cwd=world.cwd)
    assert result.status == 0 and "resumed at step 8 from more/ckpt/global_step8." in result.out, result.err
    assert status_of(world.cwd / "more/log")["step"] == 16 and (world.cwd / "more/ckpt/checkpoint_epoch_4.pt").is_file()
    result = world.run(*places(Path("more")), "--resume", "--num_epochs", 5)
    assert result.status == 0 and "is finished; going on from its last checkpoint" in result.out and "resumed at step 16" in result.out


def test_a_second_interrupt_ends_it_at_once(world, monkeypatch):
    def interrupt_twice(self, batch, features):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trainer.Trainer, "_update", interrupt_twice)
    result = world.run(*places(Path("twice")))
    assert result.status == 130 and "Traceback" not in result.err
    assert status_of(world.cwd / "twice/log")["state"] == "interrupted" and not list_checkpoints(world.cwd / "twice/ckpt")


def test_resume_finds_the_newest_unfinished_run(world, monkeypatch, tmp_path):
    flags = ("--config", world.cwd / "small.yaml", "--data_path", world.cwd / "data", "--cache_path", world.cwd / "cache")
    assert "starting anew" in run_main(*flags, "--resume", "--max_steps", 1, cwd=tmp_path).out

    def fail(self, batch, features):
        raise OSError("broken on purpose")

    update = trainer.Trainer._update
    monkeypatch.setattr(trainer.Trainer, "_update", lambda self, *args: (fail if self.step == 3 else update)(self, *args))
    assert run_main(*flags, "--run_name", "second", cwd=tmp_path).status == 1
    monkeypatch.undo()
    (log,) = (tmp_path / "logs").glob("*-second")
    assert status_of(log)["state"] == "failed" and "broken on purpose" in status_of(log)["reason"]
    result = run_main(*flags, "--resume", cwd=tmp_path)
    assert result.status == 0 and "resumed at step 2 from checkpoints/" in result.out
    assert status_of(log)["state"] == "finished" and len(list((tmp_path / "logs").iterdir())) == 2
    assert losses_of(log) == losses_of(world.cwd / "whole/log")


def test_resume_with_other_settings_is_refused_and_changes_nothing(world):
    assert start_and_stop(world, "other", signal.SIGTERM) == 143
    log = world.cwd / "other/log"
    generate(world.cwd / "other_data", 60, 90, "jsonl", max_length=10, mean_length=7)
    before = contents(world.cwd / "other")
    assert status_of(log)["state"] == "interrupted"
    for flags, words in REFUSED:
        assert_mistake(world.run(*places(Path("other")), "--resume", *flags), words)
        assert contents(world.cwd / "other") == before, words
    assert_went_on_exactly(world, "other", world.run(*places(Path("other")), "--resume"), step=6)
    # A finished run is refused in the same way, asked for by its checkpoints.
    before = contents(world.cwd / "other")
    for flags, words in REFUSED:
        assert_mistake(world.run(*places(Path("other")), "--resume_path", "other/ckpt", "--num_epochs", 4, *flags), words)
        assert contents(world.cwd / "other") == before, words


def test_a_loss_that_is_not_finite_is_status_1(world):
    result = world.run(*places(Path("nan")), "--learning_rate", 1e38, "--gradient_clip", 0)
    assert result.status == 1 and "stopped before the update" in result.err and "Traceback" not in result.err
    status = status_of(world.cwd / "nan/log")
    assert status["state"] == "failed" and "stopped before the update" in status["reason"]


# ---- folders that are taken ----


def test_a_taken_folder_is_refused_and_overwrite_takes_it(world):
    assert world.run(*places(Path("taken"))).status == 0
    before = (world.cwd / "taken/log/train.log").read_bytes()
    assert_mistake(world.run(*places(Path("taken"))), "--resume", "--overwrite")
    assert (world.cwd / "taken/log/train.log").read_bytes() == before and status_of(world.cwd / "taken/log")["state"] == "finished"
    # Its checkpoints alone are taken too.
    assert_mistake(world.run("--log_path", "elsewhere", "--checkpoint_path", "taken/ckpt"), "--overwrite")
    assert_mistake(world.run(*places(Path("taken")), "--overwrite", "--resume"), "--overwrite", "--resume")
    assert world.run(*places(Path("taken")), "--overwrite", "--max_steps", 3).status == 0
    assert sorted(losses_of(world.cwd / "taken/log")) == [1, 2, 3] and status_of(world.cwd / "taken/log")["step"] == 3
    assert [path.name.split(".")[0] for path in list_checkpoints(world.cwd / "taken/ckpt")] == ["global_step2", "global_step3"]


@pytest.mark.parametrize("flags", [("--mm_emb_id", 82), ("--data_path", "void"), ("--state_dict_path", "nowhere")], ids=str)
def test_a_mistake_leaves_no_folder_and_overwrites_nothing(world, flags):
    (world.cwd / "void").mkdir(exist_ok=True)
    before = sorted((path, path.stat().st_mtime_ns) for path in (world.cwd / "whole").rglob("*"))
    assert_mistake(world.run(*places(Path("mistaken")), *flags), str(flags[1]))
    assert not (world.cwd / "mistaken").exists()
    assert_mistake(world.run(*places(Path("whole")), "--overwrite", *flags), str(flags[1]))
    assert sorted((path, path.stat().st_mtime_ns) for path in (world.cwd / "whole").rglob("*")) == before


# ---- a checkpoint's weights ----


def test_inference_only_repeats_the_metrics_in_a_folder_of_its_own(world):
    log = world.cwd / "whole/log"
    before = {path.name: path.read_bytes() for path in log.iterdir() if path.is_file()}
    # The model's settings and the split come from the checkpoint, whatever the file says.
    (world.cwd / "bare.yaml").write_text("training: {batch_size: 3}\nsystem: {num_threads: 1, seed: 7}\neval: {protocol: leave_one_out}\n")
    for start in ("whole/ckpt/best_model.pt", json.loads((log / "metrics.json").read_text())["checkpoint"]):
        flags = ("--config", "bare.yaml", "--data_path", "data", "--log_path", "whole/log", "--inference_only", "--state_dict_path", start)
        result = run_main(*flags, cwd=world.cwd)
        assert result.status == 0, result.err
    assert {path.name: path.read_bytes() for path in log.iterdir() if path.is_file()} == before
    folders = sorted(log.glob("eval-*"))
    assert len(folders) == 2
    for folder in folders:
        assert metrics_of(folder) == metrics_of(log) and (folder / "report.html").is_file()
        assert status_of(folder)["state"] == "finished"
        assert yaml.safe_load((folder / "config.resolved.yaml").read_text())["model"]["hidden_units"] == 8


def test_inference_only_follows_the_evaluation_settings(world):
    flags = ("--no-remove_seen", "--top_k", 5, 20, "--max_eval_users", 2, "--no-baselines", "--log_path", "other_eval")
    assert world.run("--inference_only", "--state_dict_path", "whole/ckpt/best_model.pt", *flags).status == 0
    (folder,) = (world.cwd / "other_eval").glob("eval-*")
    metrics = metrics_of(folder)
    assert metrics["num_users"] == 2 and metrics["seen_removed"] is False and {"hr@5", "hr@10", "ndcg@20"} <= set(metrics)
    assert "popularity.hr@10" not in metrics


@pytest.mark.parametrize("flags,words", [
    (("--hidden_units", 16), ("hidden_units is 16 (flag --hidden_units)", "trained with 8")),
    (("--maxlen", 7, "--position", "learned"), ("max_seq_length is 7 (flag --maxlen)", "position is learned")),
    (("--mm_emb_id", "none"), ("multimodal_features",)),
    (("--protocol", "leave_one_out", "--seed", 7), ("protocol is leave_one_out", "trained with holdout", "seed is 7", "trained with 42")),
    (("--state_dict_path", "nowhere.pt"), ("nowhere.pt",)),
    (("--state_dict_path", "small.yaml"), ("small.yaml",)),
], ids=str)  # fmt: skip
def test_inference_only_refuses_what_contradicts(world, flags, words):
    before = sorted((world.cwd / "whole/log").iterdir())
    start = [] if flags[0] == "--state_dict_path" else ["--state_dict_path", "whole/ckpt/best_model.pt"]
    assert_mistake(run_main("--data_path", "data", "--log_path", "contradicted", "--inference_only", *start, *flags, cwd=world.cwd), *words)
    assert sorted((world.cwd / "whole/log").iterdir()) == before


def test_inference_only_takes_a_flag_that_agrees_and_needs_a_checkpoint(world):
    flags = ("--data_path", "data", "--log_path", "agrees", "--inference_only")
    assert run_main(*flags, "--hidden_units", 8, "--state_dict_path", "whole/ckpt/best_model.pt", cwd=world.cwd).status == 0
    assert_mistake(run_main(*flags, cwd=world.cwd), "--state_dict_path")


def test_state_dict_path_starts_from_the_weights(world):
    start = list_checkpoints(world.cwd / "whole/ckpt")[-1]
    result = world.run(*places(Path("warm")), "--state_dict_path", start, "--max_steps", 1, "--optimizer", "adamw", "--learning_rate", 1e-9)
    assert result.status == 0 and f"weights from {start} (step 8)" in result.out
    (warm,) = list_checkpoints(world.cwd / "warm/ckpt")
    for key, value in weights_of(start).items():
        assert torch.allclose(value, weights_of(warm)[key], atol=1e-6), key
    assert status_of(world.cwd / "warm/log")["step"] == 1  # a new run, counted from its own start


@pytest.mark.parametrize("flags,words", [
    (("--state_dict_path", "nowhere"), ("nowhere",)), (("--state_dict_path", "whole/ckpt"), ("holds 4 checkpoints",)),
    (("--state_dict_path", "whole/ckpt/best_model.pt", "--hidden_units", 16), ("hidden_units: 8 there, 16 here",)),
], ids=str)  # fmt: skip
def test_weights_that_do_not_fit_are_refused(world, flags, words, tmp_path):
    assert_mistake(world.run(*places(tmp_path), *flags), *words)


def test_a_warning_for_a_setting_without_effect(world):
    result = world.run("--log_path", "idle", "--max_steps", 1, "--num_epochs", 7, "--lr_gamma", 0.3)
    assert result.status == 0
    assert result.out.count("training.num_epochs 7 has no effect") == result.out.count("training.lr_gamma 0.3 has no effect") == 1


# ---- demo data, help, config.yaml, run.sh ----


def test_demo_data_only_where_no_path_was_given(world, tmp_path, monkeypatch):
    monkeypatch.setattr(main, "DEMO", {"users": 50, "items": 60, "seed": 1, "max_length": 10})
    flags = ("--config", world.cwd / "small.yaml", "--max_steps", 1)
    assert_mistake(run_main(*flags, "--data_path", "demo_data", cwd=tmp_path), "demo_data")
    assert_mistake(run_main(*flags, cwd=tmp_path, environ={"TRAIN_DATA_PATH": "/nowhere/data"}), "/nowhere/data")
    assert list(tmp_path.iterdir()) == []
    result = run_main(*flags, cwd=tmp_path)
    assert result.status == 0 and "making demo data" in result.out and "demo data, no path was given" in result.out
    made = (tmp_path / "demo_data/seq.jsonl").stat().st_mtime_ns
    again = run_main(*flags, "--run_name", "again", cwd=tmp_path)
    assert again.status == 0 and "making demo data" not in again.out and (tmp_path / "demo_data/seq.jsonl").stat().st_mtime_ns == made


def test_help_and_print_config_end_well(world):
    shown = run_main("--help", cwd=world.cwd)
    assert shown.status == 0 and all(f"--{key} " in shown.out for key in KEYS)
    printed = world.run("--print_config", "--lr", 0.5)
    assert printed.status == 0 and "learning_rate: 0.5" in printed.out and "# flag --lr" in printed.out


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The scripts in another folder, with config.yaml as config.py writes it."""
    folder = tmp_path_factory.mktemp("clone")
    for path in [*ROOT.glob("*.py"), ROOT / "run.sh"]:
        shutil.copy(path, folder)
    return folder


def run_sh(clone: Path, *flags: str) -> subprocess.CompletedProcess:
    environ = {name: value for name, value in os.environ.items() if name not in VARIABLES} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "run.sh", *flags], cwd=clone, env=environ | {"PYTHON": sys.executable}, capture_output=True, text=True,
                          check=False, timeout=120)  # fmt: skip


def test_an_edit_of_config_yaml_takes_effect_through_run_sh(world, clone):
    edited = {group: dict(keys) for group, keys in SMALL.items()}
    edited["paths"] = {"data_path": str(world.cwd / "data"), "cache_path": str(world.cwd / "cache"), "log_path": "mine"}
    edited["training"] |= {"num_epochs": 1}
    edited["model"] |= {"hidden_units": 12, "position": "learned"}
    (clone / "config.yaml").write_text(yaml.safe_dump(edited))
    done = run_sh(clone, "--batch_size", "54")
    assert done.returncode == 0, done.stderr
    settings = yaml.safe_load((clone / "mine/config.resolved.yaml").read_text())
    assert (
        settings["model"]["hidden_units"] == 12 and settings["model"]["position"] == "learned" and settings["training"]["num_epochs"] == 1
    )
    assert status_of(clone / "mine")["step"] == 1  # the flag's batch holds all 54 users
    assert (clone / "mine/report.html").is_file()


def test_run_sh_hands_on_a_mistake_in_config_yaml(clone):
    (clone / "config.yaml").write_text("model:\n  num_hedas: 2\n")
    done = run_sh(clone)
    assert done.returncode == 2 and "config.yaml:2" in done.stderr and "model.num_heads" in done.stderr and "Traceback" not in done.stderr


def test_the_command_to_go_on_drops_what_it_replaces(monkeypatch):
    words = ["--config", "a.yaml", "--resume_path", "x", "--top_k", "5", "10", "--num_epochs=3", "--overwrite", "--lr", "0.1"]
    monkeypatch.setattr(sys, "argv", ["main.py", *words])
    kept = "python main.py --config a.yaml --top_k 5 10"
    assert main.same_command("--num_epochs", "6") == f"{kept} --lr 0.1 --num_epochs 6"
    assert main.same_command("--resume") == f"{kept} --num_epochs=3 --lr 0.1 --resume"
