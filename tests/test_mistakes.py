"""Mistakes that users make, at every entry script: status 2, what was found, where and what to do, in at most three lines, no traceback."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_main import ROOT, SMALL, World, assert_mistake, run_main, run_process, status_of, train_small

import combine
import convert
import infer
import main
import report
import simple_demo
import simple_test
import synthetic
from synthetic import generate

sys.path.insert(0, str(ROOT / "experiments"))
import check_infer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A folder with data, data of another set, and a finished run."""
    folder = tmp_path_factory.mktemp("mistakes")
    generate(folder / "data", 60, 80, "jsonl", predict=10, max_length=10, mean_length=7)
    generate(folder / "other", 60, 90, "jsonl", predict=10, seed=5, max_length=10, mean_length=7)
    train_small(folder, SMALL)
    return World(folder, ("--config", "small.yaml", "--data_path", "data"))


def write(name: str, text: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return make


def config(text: str) -> Callable[[Path], None]:
    return write("mine.yaml", text)


def hostile_indexer(folder: Path) -> None:
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    (folder / "bad").mkdir(exist_ok=True)
    (folder / "bad/seq.jsonl").write_text("[]\n")
    (folder / "bad/indexer.pkl").write_bytes(pickle.dumps(Evil()))


def bad_line(folder: Path) -> None:
    (folder / "bad").mkdir(exist_ok=True)
    (folder / "bad/indexer.pkl").write_bytes(pickle.dumps({"u": {"a": 1}, "i": {7: 1}, "f": {}}))
    (folder / "bad/seq.jsonl").write_text(json.dumps([[1, 5, None, {}, 0, 10], [1, None, {}, None, None, 10]]) + "\n")


def nothing(folder: Path) -> None:
    pass


BAD = ["--data_path", "bad"]
OK = ["--data_path", "WORLD/data", "--config", "WORLD/small.yaml"]
CKPT = ["--state_dict_path", "WORLD/ckpt/best_model.pt"]
NEW = ["--layout", "jsonl", "--items", 30]
# (what is wrong, script, flags, environment, what is made first, words of the message). WORLD: the folder of the fixture.
MISTAKES = [
    ("a flag with a typo", main, ["--bach_size", 64], {}, nothing, "nearest is --batch_size"),
    ("a flag without its value", main, ["--batch_size"], {}, nothing, "its value is missing"),
    ("a word too many", main, ["--batch_size", 64, 65], {}, nothing, "unexpected argument '65'"),
    ("text for a number", main, ["--batch_size", "many"], {}, nothing, "expected a whole number"),
    ("a number out of its limits", main, ["--dropout_rate", 1.5], {}, nothing, "below 1"),
    ("an unknown choice", main, ["--norm", "layer"], {}, nothing, "one of layernorm"),
    ("two names of one key", main, ["--lr", 0.1, "--learning_rate", 0.2], {}, nothing, "are the same key"),
    ("a width that heads do not divide", main, ["--hidden_units", 10, "--num_heads", 4], {}, nothing, "num_heads"),
    ("a variable that is no number", main, [], {"BATCH_SIZE": "big"}, nothing, "environment BATCH_SIZE"),
    ("a missing settings file", main, ["--config", "nowhere.yaml"], {}, nothing, "nowhere.yaml"),
    ("a typo in the settings file", main, ["--config", "mine.yaml"], {}, config("model:\n  hiden_units: 8\n"), "mine.yaml:2"),
    ("a key in another group", main, ["--config", "mine.yaml"], {}, config("loss:\n  batch_size: 8\n"), "training.batch_size"),
    ("a key twice", main, ["--config", "mine.yaml"], {}, config("model:\n  norm: rmsnorm\n  norm: layernorm\n"), "mine.yaml:3"),
    ("broken YAML", main, ["--config", "mine.yaml"], {}, config("model: [1, 2\n"), "not readable as YAML"),
    ("a hostile YAML tag", main, ["--config", "mine.yaml"], {}, config("model: !!python/object/apply:os.system [a]\n"), "mine.yaml"),
    ("a missing data folder", main, ["--data_path", "nowhere"], {}, nothing, "nowhere: no such folder"),
    ("an empty data folder", main, BAD, {}, write("bad/README", "x"), "none of seq.jsonl"),
    ("a data folder without indexer", main, BAD, {}, write("bad/seq.jsonl", "[]\n"), "indexer.pkl: missing"),
    ("a pickle that runs code", main, BAD, {}, hostile_indexer, "refused"),
    ("an item the indexer does not know", main, BAD, {}, bad_line, "seq.jsonl:1"),
    ("an embedding that is not there", main, [*OK, "--mm_emb_id", 82], {}, nothing, "no vectors of 82"),
    ("an embedding of no schema", main, [*OK, "--mm_emb_id", 99], {}, nothing, "'99' is not an embedding"),
    ("a GPU that is not there", main, [*OK, "--device", "cuda:99"], {}, nothing, "no such CUDA device"),
    ("a cache that cannot be written", main, [*OK, "--cache_path", "file/cache"], {}, write("file", ""), "cannot be written"),
    ("a log path that cannot be made", main, [*OK, "--log_path", "file/log"], {}, write("file", ""), "cannot be made"),
    ("another run's folder", main, [*OK, "--log_path", "WORLD/log"], {}, nothing, "--overwrite"),
    ("--overwrite with --resume", main, [*OK, "--overwrite", "--resume"], {}, nothing, "give one of them"),
    ("a checkpoint that is not there", main, [*OK, "--state_dict_path", "nowhere/model.pt"], {}, nothing, "nowhere/model.pt"),
    ("an evaluation of nothing", main, [*OK, "--inference_only"], {}, nothing, "--state_dict_path"),
    ("a checkpoint of other data", main, ["--data_path", "WORLD/other", "--inference_only", *CKPT], {}, nothing, "the data"),
    ("a flag against the checkpoint", main, [*OK, "--inference_only", *CKPT, "--hidden_units", 16], {}, nothing,
     "was trained with 8"),
    ("candidates that are not there", main, [*OK, "--candidates", "nowhere.jsonl"], {}, nothing, "nowhere.jsonl"),
    ("the doctor and a trial at once", main, [*OK, "--doctor", "--dry_run"], {}, nothing, "--doctor and --dry_run"),
    ("the estimate of settings to print", main, [*OK, "--estimate", "--print_config"], {}, nothing, "--print_config and --estimate"),
    ("findings of no doctor", main, [*OK, "--json"], {}, nothing, "--doctor"),
    ("settings to print as findings", main, [*OK, "--json", "--print_config"], {}, nothing, "--doctor"),
    ("a list and a removal at once", report, ["--list", "--prune", "--yes", "WORLD"], {}, nothing, "--list and --prune"),
    ("a report of a run beside itself", report, ["WORLD/log", "WORLD/ckpt/../log"], {}, nothing, "given twice"),
    ("inference without data", infer, [], {"MODEL_OUTPUT_PATH": "WORLD/ckpt"}, nothing, "EVAL_DATA_PATH"),
    ("inference without a model", infer, [], {"EVAL_DATA_PATH": "WORLD/data-eval"}, nothing, "MODEL_OUTPUT_PATH"),
    ("inference on another set", infer, [], {"MODEL_OUTPUT_PATH": "WORLD/ckpt", "EVAL_DATA_PATH": "WORLD/other-eval"},
     nothing, "indexer.pkl"),
    ("a conversion of no format", convert, ["csv", "a", "b"], {}, nothing, "csv"),
    ("a conversion of nothing", convert, ["s3rec", "nowhere.txt", "out"], {}, nothing, "nowhere.txt"),
    ("synthetic data into a full folder", synthetic, ["WORLD/data", "--users", 10, *NEW], {}, nothing, "WORLD/data"),
    ("synthetic data of no users", synthetic, ["new", "--users", 0, *NEW], {}, nothing, "users"),
    ("a report of no run", report, ["nowhere"], {}, nothing, "nowhere"),
    ("answers to judge without their data", check_infer, ["a", "b"], {}, nothing, "a-eval/truth.json"),
    ("answers to judge that are not there", check_infer, ["WORLD/data", "b.json"], {}, nothing, "b.json"),
    ("answers to judge that are none", check_infer, ["WORLD/data", "b.json"], {}, write("b.json", '{"top10s": 5}'), "b.json"),
    ("answers on other data", check_infer, ["WORLD/data", "b.json"], {}, write("b.json", '{"top10s": [[1]], "user": ["x"]}'),
     "not in truth.json"),
    ("an unknown flag of the judge", check_infer, ["WORLD/data", "b.json", "--foo"], {}, nothing, "--foo"),
    ("an unknown flag of the smoke test", simple_test, ["--foo"], {}, nothing, "--foo"),
    ("an unknown flag of the demonstration", simple_demo, ["--foo"], {}, nothing, "--foo"),
    ("an average of one set and nothing", combine, ["average", "out", "nowhere"], {}, nothing, "nowhere"),
]  # fmt: skip


@pytest.mark.parametrize(("script", "flags", "environ", "make", "words"), [row[1:] for row in MISTAKES], ids=[row[0] for row in MISTAKES])
def test_a_mistake_is_one_clear_message(world, tmp_path, script, flags, environ, make, words):
    make(tmp_path)
    here = str(world.cwd)
    flags = [str(flag).replace("WORLD", here) for flag in flags]
    environ = {name: value.replace("WORLD", here) for name, value in environ.items()} | {"PYTHONWARNINGS": "default"}
    result = run_main(*flags, cwd=tmp_path, entry=script, environ=environ)
    assert_mistake(result, words.replace("WORLD", here))
    assert 1 <= max(map(len, result.err.strip().splitlines())) <= 400


def test_several_mistakes_are_said_at_once_a_line_each(tmp_path):
    (tmp_path / "mine.yaml").write_text("model:\n  hiden_units: 8\n  norm: layer\ntraining:\n  batch_size: -1\n")
    result = run_main("--config", "mine.yaml", "--lr", "fast", "--no-such", cwd=tmp_path)
    assert result.status == 2
    lines = result.err.strip().splitlines()
    assert len(lines) == 5
    assert all(any(word in line for line in lines) for word in ("mine.yaml:2", "mine.yaml:3", "mine.yaml:5", "--lr", "--no-such"))


# ---- main.py, closer ----


@pytest.mark.parametrize("flags,words", [
    (("--hiden_units", 8), ("--hiden_units", "--hidden_units")),
    (("--batch_size", "many"), ("--batch_size", "'many'", "whole number")),
    (("--batch_size", 0), ("--batch_size", "at least 1")),
    (("--dropout_rate", 1.5), ("dropout_rate", "below 1")),
    (("--optimizer", "adamv"), ("optimizer", "one of adam, adamw, muon (did you mean adam?)")),
    (("--norm_first", "perhaps"), ("norm_first", "true or false")),
    (("--hidden_units", 9), ("hidden_units", "num_heads")),
    (("--batch_size",), ("--batch_size", "missing")),
    (("64",), ("'64'",)),
    (("--data_path", "nowhere"), ("nowhere", "data_path")),
    (("--data_path", "empty"), ("empty",)),
    (("--data_path", "small.yaml"), ("small.yaml",)),
    (("--config", "nowhere.yaml"), ("nowhere.yaml",)),
    (("--config", "empty"), ("empty", "folder")),
    (("--resume_path", "nowhere"), ("nowhere", "--resume_path")),
    (("--mm_emb_id", 82), ("82",)),
    (("--mm_emb_id", 99), ("99", "81")),
    (("--candidates", "nowhere"), ("nowhere",)),
    (("--cache_path", "small.yaml"), ("small.yaml", "cache_path")),
    (("--log_path", "small.yaml/x"), ("log_path", "small.yaml")),
    (("--holdout_fraction", 0.9999), ("training split is empty",)),
], ids=str)  # fmt: skip
def test_a_mistake_is_a_short_line_and_status_2(world, flags, words):
    (world.cwd / "empty").mkdir(exist_ok=True)
    given = [] if flags[0] == "--config" else ["--config", "small.yaml"]
    given += [] if flags[0] == "--data_path" else ["--data_path", "data"]
    given += [] if flags[0] == "--log_path" else ["--log_path", "mistakes", "--overwrite"] if flags[0] != "--resume_path" else []
    assert_mistake(run_main(*given, *flags, cwd=world.cwd), *words)


@pytest.mark.parametrize("text,words", [
    ("model:\n  hiden_units: 8\n", ("wrong.yaml:2", "hiden_units", "model.hidden_units")),
    ("modle:\n  hidden_units: 8\n", ("wrong.yaml:1", "modle", "model")),
    ("training:\n  batch_size: 1.5\n", ("wrong.yaml:2", "batch_size", "whole number")),
    ("training:\n  lr: 0.1\n  learning_rate: 0.2\n", ("wrong.yaml:3", "twice")),
    ("training:\n  num_epochs: [3\n", ("wrong.yaml", "YAML")),
    ("eval:\n  protocol: hold_out\n", ("wrong.yaml:2", "holdout")),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_a_mistake_in_the_file_names_its_line(world, text, words):
    (world.cwd / "wrong.yaml").write_text(text)
    assert_mistake(run_main("--config", "wrong.yaml", "--data_path", "data", cwd=world.cwd), *words)


def test_several_mistakes_are_a_line_each(world):
    result = world.run("--hiden_units", 8, "--num_epochs", 0, "--lr", -1, "--resume_pth", "x")
    assert_mistake(result, "hidden_units", "num_epochs", "learning_rate", "--resume_path", lines=4)
    assert len(result.err.strip().splitlines()) == 4


def test_a_mistake_of_a_real_process(world):
    done = run_process(ROOT / "main.py", "--hiden_units", "3", cwd=world.cwd)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: unknown flag --hiden_units; the nearest is --hidden_units.\n"


def test_debug_shows_the_traceback(world):
    done = run_process(ROOT / "main.py", "--data_path", "nowhere", "--debug", cwd=world.cwd)
    assert done.returncode == 2 and "Traceback" in done.stderr and done.stderr.splitlines()[-1].startswith("Give TencentGR data")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_without_cuda_names_auto(world, device):
    assert_mistake(world.run("--log_path", "cuda", "--device", device), device, "--device auto")
    assert not (world.cwd / "cuda").exists()


def test_a_bad_line_is_refused_or_tolerated_and_counted(world, tmp_path):
    data = shutil.copytree(world.cwd / "data", tmp_path / "data")
    lines = (data / "seq.jsonl").read_text().splitlines()
    lines[6] = lines[6][: len(lines[6]) // 2]
    (data / "seq.jsonl").write_text("\n".join(lines) + "\n")
    (data / "seq_offsets.pkl").unlink()
    flags = ("--config", world.cwd / "small.yaml", "--data_path", data, "--log_path", "log")
    assert_mistake(run_main(*flags, cwd=tmp_path), "seq.jsonl:7", "max_bad_lines")
    assert status_of(tmp_path / "log")["state"] == "failed"
    result = run_main(*flags, "--max_bad_lines", 1, "--overwrite", cwd=tmp_path)
    assert result.status == 0 and "rejected    1" in result.out
    (listed,) = (tmp_path / "cache").glob("*.rejects.jsonl")
    assert json.loads(listed.read_text())["line"] == 7
