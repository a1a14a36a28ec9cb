"""docs/RELIABILITY.md, rows 3, 13 and 14: the order of samples, the golden curves, a long run."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from reliability_world import RUN_SETTINGS, Driver, make_trainer, rounds, state_hash
from tiny import tiny_store

import blas
import checkpoint as checkpoints
from dataset import BatchBuilder, NegativeSampling, Prefetcher, TrainingOrder, make_splits
from logger import read_train_log
from runs import LOCK
from synthetic import generate

pytestmark = pytest.mark.reliability
ROOT = Path(__file__).resolve().parents[1]


# ---- row 3: the order of samples ----------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["position", "shared"])
@pytest.mark.parametrize("length_buckets", [False, True])
def test_one_order_for_any_number_of_processes_and_workers(kind, length_buckets):
    """Row 3: batch k of an epoch goes to process k mod world size, each with workers of its own; together they are one sequence.

    The project itself trains in one process; this is what a second one would have to keep.
    """
    store = tiny_store(num_users=101, num_items=40, max_events=14)
    split = make_splits(store, protocol="leave_one_out", holdout_fraction=0.1, target="last", seed=3).train
    found = set()
    for world_size in (1, 2, 4):
        for workers in (0, 1, 3):
            batches: dict[tuple, object] = {}
            for rank in range(world_size):
                order = TrainingOrder(split, 7, 3, 10, length_buckets)
                builder = BatchBuilder(store, split, 10, 3, NegativeSampling(kind, 5))
                for epoch in range(3):
                    order.start_epoch(epoch)
                    build = lambda k, epoch=epoch, order=order, builder=builder: builder.training(order.samples(k), epoch, k)
                    mine = range(rank, order.num_batches, world_size)
                    batches |= {(epoch, k): batch for k, batch in zip(mine, Prefetcher(workers, 2)(build, mine), strict=True)}
            assert list(sorted(batches)) == [(epoch, k) for epoch in range(3) for k in range(15)]
            for epoch in range(3):
                users = [user for k in range(15) for user in batches[epoch, k].users.tolist()]
                assert sorted(users) == list(range(101))  # each user once an epoch
            assert batches[0, 0].users.tolist() != batches[1, 0].users.tolist()
            total = hashlib.sha256()
            for key in sorted(batches):
                total.update(state_hash(tuple(batches[key])).encode())
            found.add(total.hexdigest())
    assert len(found) == 1


# ---- row 13: golden curves ----------------------------------------------------------------------------------------------

GOLDEN = ROOT / "tests/golden/losses.json"
STEPS = 200
# Rates low enough that a last bit does not grow to another curve: at temperature 0.05 and a rate of 0.002 other instructions gave other
# losses by up to 0.07 after 200 steps.
CURVES = {
    "sampled softmax": {"optimizer": "adamw", "learning_rate": 5e-4, "temperature": 0.2},
    "bce": {"optimizer": "adamw", "name": "bce", "num_negatives": 2, "learning_rate": 1e-3},
    "muon and hstu, two batches an update": {
        "optimizer": "muon",
        "backbone": "hstu",
        "accumulate_steps": 2,
        "learning_rate": 1e-4,
        "muon_learning_rate": 1e-4,
        "temperature": 0.2,
    },
}
RENEW = "RENEW_GOLDEN=1 python -m pytest -q tests/test_reliability_training.py -k golden"


def curve(folder: Path, settings: dict) -> list[float]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        make_trainer(folder, num_workers=0, max_steps=STEPS, eval_every_epochs=1000, **settings).fit()
    finally:
        torch.set_num_threads(threads)
    return [record["loss"] for record in read_train_log(folder / "train.log") if "loss" in record]


def machine() -> dict:
    """What the last bits depend on."""
    return {"torch": torch.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability(), "products": blas.library()}


def compare(found: list[float], golden: list[float], exact: bool) -> None:
    assert len(found) == len(golden) == STEPS
    if exact:
        assert found == golden
    worst = max(abs(a - b) for a, b in zip(found, golden, strict=True))
    assert worst <= 1e-5, f"{worst}; where the change of losses is meant: {RENEW}"


@pytest.mark.parametrize("name", CURVES)
def test_golden_curves(tmp_path, name):
    """Row 13: 200 steps give the stored losses. Renewed by the command of RENEW alone, which a commit has to explain."""
    tree = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    found = curve(tmp_path, CURVES[name])
    if os.environ.get("RENEW_GOLDEN") == "1":
        tree[name] = machine() | {"losses": found}
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(tree).replace("}, ", "},\n") + "\n")
        pytest.skip(f"renewed {GOLDEN}")
    golden = tree[name]
    compare(found, golden["losses"], exact=all(golden[key] == value for key, value in machine().items()))


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_golden_curves_hold_on_a_lesser_cpu(tmp_path, capability):
    """Row 13: the same torch told to use other instructions."""
    code = (
        "import sys, json; sys.path[:0] = sys.argv[1:3]; from pathlib import Path; import test_reliability_training as t; "
        "print(json.dumps([t.machine(), {n: t.curve(Path(sys.argv[3]) / str(k), s) for k, (n, s) in enumerate(t.CURVES.items())}]))"
    )
    environ = os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), str(ROOT / "tests"), str(tmp_path)], env=environ, capture_output=True, text=True, check=True
    )
    there, curves = json.loads(done.stdout.splitlines()[-1])
    if there["cpu_capability"].lower() != capability:
        pytest.skip(f"this CPU has no {capability}: {there}")
    golden = json.loads(GOLDEN.read_text())
    for name, losses in curves.items():
        compare(losses, golden[name]["losses"], exact=False)


# ---- row 14: a long run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", rounds(5000, 0)[1:])
def test_a_long_run_leaks_nothing(tmp_path, steps):
    """Row 14: memory, descriptors and disk of a run of 5,000 steps, 50 saves and 20 evaluations. RELIABILITY_ROUNDS gives other steps."""
    settings = {group: dict(values) for group, values in RUN_SETTINGS.items()}
    settings["training"] |= {"save_every_steps": steps // 50, "keep_last_k": 3}
    settings["eval"] |= {"eval_every_epochs": max(1, round(steps / 14 / 20))}
    settings["system"] |= {"tensorboard": True, "save_frequency": 10_000}
    generate(tmp_path / "data", 60, 80, "jsonl", max_length=10, mean_length=7)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    driver = Driver(tmp_path)
    flags = ["--config", "small.yaml", "--data_path", "data", "--log_path", "log", "--checkpoint_path", "ckpt", "--tensorboard_path", "tb"]
    done = driver.run([*flags, "--max_steps", steps], console="console", descriptors="descriptors")
    driver.close()
    assert done["status"] == 0, (tmp_path / "console").read_text()[-2000:]
    log = read_train_log(tmp_path / "log/train.log")
    lines = [(record["global_step"], record["rss_gib"] * 1024) for record in log if "loss" in record and record["global_step"] > steps // 5]
    slope = np.polyfit(*np.array(lines).T, 1)[0] * 1000
    samples = [tuple(map(int, line.split())) for line in (tmp_path / "descriptors").read_text().splitlines()]
    counts, of_events = (np.array([sample[k] for sample in samples if sample[0] > steps // 5]) for k in (1, 2))
    evaluations = sum(record.get("split") == "valid" for record in log)
    kept = [path.name for path in checkpoints.list_checkpoints(tmp_path / "ckpt")]
    best = checkpoints.find_checkpoint(tmp_path / "ckpt/best_model.pt")
    print(f"\n{slope:.3f} MB per 1,000 steps, {min(counts)} to {max(counts)} descriptors in {len(counts)} samples,", evaluations, kept)
    assert slope < 1.0 or steps < 1000
    # TensorBoard's thread opens its events file for each write and closes it, so a sample may see it open: one at a time.
    assert min(counts) == max(counts) and max(of_events) <= 1
    assert abs(evaluations - 20) <= 2 or steps < 1000
    values = [(record["ndcg@10"], record["global_step"]) for record in log if record.get("split") == "valid"]
    best_steps = [step for n, (value, step) in enumerate(values) if all(value > earlier for earlier, _ in values[:n])]
    saved = sorted({*range(steps // 50, steps + 1, steps // 50), steps, *best_steps})
    assert [checkpoints._step(Path(name)) for name in kept] == sorted({*saved[-3:], best_steps[-1]})
    assert checkpoints._step(best) == best_steps[-1]
    links = [path for path in (tmp_path / "ckpt").iterdir() if path.is_file() and path.name != LOCK]
    assert links and all(checkpoints.find_checkpoint(path).name in kept for path in links)  # no link to a removed one
    inodes = {path.stat().st_ino: path.stat().st_size for path in (tmp_path / "ckpt").rglob("*") if path.is_file()}
    one = sum(path.stat().st_size for path in best.iterdir())
    assert sum(inodes.values()) <= 1.05 * len(kept) * one
