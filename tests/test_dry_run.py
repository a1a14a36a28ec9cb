"""`main.py --dry_run`: what a run would do first, with the figures it would show, and no file left."""

from __future__ import annotations

import re
from pathlib import Path
from unittest import mock

import pytest
from test_main import run_main

import main
from logger import read_train_log
from synthetic import generate

SMALL = ["--hidden_units", 8, "--num_blocks", 1, "--max_seq_length", 10, "--batch_size", 16, "--num_negatives", 8, "--max_steps", 2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dry")
    generate(folder / "data", 60, 80, "jsonl", max_length=10, mean_length=7)
    return folder / "data"


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def dry_loss(text: str) -> float:
    return float(re.search(r"update +loss (\S+),", text)[1])


@pytest.mark.parametrize("more", [[], ["--accumulate_steps", 3], ["--name", "bce", "--num_negatives", 1], ["--ema_decay", 0.9]])
def test_the_update_is_that_of_a_run_and_no_file_stays(data, tmp_path, more):
    before = files(tmp_path)
    result = run_main("--dry_run", "--data_path", data, *SMALL, *more, cwd=tmp_path)
    assert result.status == 0, result.err
    assert files(tmp_path) == before
    assert re.search(r"evaluation +3 users, 80 candidates", result.out)
    run = run_main("--data_path", data, *SMALL, *more, "--log_every_steps", 1, "--log_path", "log", "--no-baselines", cwd=tmp_path)
    assert run.status == 0, run.err
    assert dry_loss(result.out) == pytest.approx(read_train_log(tmp_path / "log/train.log")[0]["loss"], abs=6e-5)


def test_a_store_in_the_cache_serves(data, tmp_path):
    run_main("--estimate", "--data_path", data, *SMALL, cwd=tmp_path)
    before = files(tmp_path)
    assert before
    with mock.patch("store.StoreBuilder", side_effect=AssertionError):
        assert run_main("--dry_run", "--data_path", data, *SMALL, cwd=tmp_path).status == 0
    assert files(tmp_path) == before


def test_demo_data_are_made_and_removed(tmp_path):
    with mock.patch.dict(main.DEMO, users=60, items=80):
        result = run_main("--dry_run", *SMALL, cwd=tmp_path)
    assert result.status == 0, result.err
    assert "making demo data" in result.out and files(tmp_path) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--resume"], "--dry_run tries a new run"),
        (["--data_path", "nowhere"], "no such folder"),
        (["--log_path", "file/log"], "cannot be made|is no folder"),
        (["--data_path", "empty"], "none of seq.jsonl"),
        (["--state_dict_path", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_said_and_leave_nothing(data, tmp_path, flags, words):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    before = files(tmp_path)
    result = run_main("--dry_run", *([] if "--data_path" in flags else ["--data_path", data]), *SMALL, *flags, cwd=tmp_path)
    assert result.status == 2
    assert re.search(words, result.err) and "Traceback" not in result.err
    assert files(tmp_path) == before
