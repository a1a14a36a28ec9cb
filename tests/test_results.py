"""What README.md claims, in full: run by `python test.py --suite long` (about half an hour on two cores)."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

pytestmark = pytest.mark.long


def run(*words, **environment):
    command = [sys.executable, *map(str, words)]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


def core_seconds():
    """Processor time of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def train(folder, *words):
    run("main.py", "--log_path", folder, "--checkpoint_path", folder, "--cache_path", folder.parent / "cache", "--no-tensorboard", *words)
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize(("name", "source", "convert", "hr", "ndcg"), [
    ("beauty", "s3rec-beauty/Beauty.txt", "s3rec", 0.1, 0.0605),
    ("ml-100k", "ml-100k", "movielens", 0.2, 0.1),
])  # fmt: skip
def test_public_sets_with_one_file(public_data, tmp_path, name, source, convert, hr, ndcg):
    run("convert.py", convert, public_data / source, tmp_path / name)
    before = core_seconds()
    metrics = train(tmp_path / "run", "--config", "configs/public.yaml", "--data_path", tmp_path / name)
    assert metrics["hr@10"] > hr and metrics["ndcg@10"] > ndcg and metrics["seen_removed"]
    for baseline in ("popularity", "recent", "item2item"):
        assert metrics["ndcg@10"] > metrics[f"{baseline}.ndcg@10"] and metrics["hr@10"] > metrics[f"{baseline}.hr@10"]
    assert core_seconds() - before < 2 * 20 * 60  # 20 minutes of two cores, which this suite's processes share


def test_synthetic_in_both_layouts_with_a_kill(tmp_path):
    """The parquet run is killed inside its second epoch and resumed: its last model equals that of the whole JSONL run bit for bit."""
    size = ("--users", 20_000, "--items", 95_000, "--predict", 2000, "--seed", 1)
    for layout in ("jsonl", "parquet"):
        run("synthetic.py", tmp_path / layout, *size, "--layout", layout)
    metrics = train(tmp_path / "whole", "--data_path", tmp_path / "jsonl")
    assert all(metrics["hr@10"] > 2 * metrics[f"{name}.hr@10"] for name in ("popularity", "recent", "item2item"))
    folder = tmp_path / "killed"
    words = [
        "--log_path",
        folder,
        "--checkpoint_path",
        folder,
        "--cache_path",
        tmp_path / "cache",
        "--no-tensorboard",
        "--save_every_steps",
        50,
    ]
    command = [sys.executable, "main.py", *words, "--data_path", tmp_path / "parquet"]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL)
    while not list(folder.glob("global_step200.*")):
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(*command[1:], "--resume")
    (first,), (second,) = (
        [torch.load(p / "model.pt", weights_only=True) for p in tmp_path.glob(f"{n}/global_step423.*")] for n in ("whole", "killed")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    for layout in ("jsonl", "parquet"):
        result, data = tmp_path / f"result-{layout}", tmp_path / f"{layout}-eval"
        run("infer.py", MODEL_OUTPUT_PATH=str(folder / "best_model.pt"), EVAL_DATA_PATH=str(data), EVAL_RESULT_PATH=str(result))
        said = run("experiments/check_infer.py", tmp_path / layout, result / "result.json", "--cache_path", tmp_path / "cache")
        rates = {name: float(rate) for name, rate in re.findall(r"^(\S+).*  HR@10 (\S+)", said, re.M)}
        assert re.search("^2,000 users", said, re.M) and "not ten" not in said
        assert rates[str(result / "result.json")] > 2 * rates["item-to-item"]
