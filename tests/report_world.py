"""Tested runs without training: a tiny store, made-up rankings, and the files that a run leaves for its report."""

import json

import numpy as np
import torch
from tiny import tiny_store

from baselines import Baselines
from checkpoint import plain_json
from config import Config, with_values
from dataset import make_splits, training_item_counts
from evaluate import Ranking, baseline_results, split_metrics
from ranks import write_ranks
from report_data import ReportedData, write_report_data
from runs import write_start_files, write_status
from settings import dump_yaml

METRICS = {
    "split": "test",
    "protocol": "leave_one_out",
    "num_candidates": 20,
    "seen_removed": True,
    "checkpoint": "checkpoints/a/global_step40",
}
ENVIRONMENT = {"python": "3.11.7", "torch": "2.13.0", "gpus": [], "commit": "ab12-dirty", "cuda": None}


def made_up_ranking(store, split, seed, skill=0.5):
    """A ranking of all items for each sample: at random, with the target moved to the front half of the time (`skill`)."""
    random = np.random.default_rng(seed)
    order = np.argsort(random.random((split.num_samples, store.num_items)), 1) + 1
    target = store.item_ids[split.target]
    for row in np.flatnonzero(random.random(split.num_samples) < skill):
        rest = order[row][order[row] != target[row]]
        order[row] = np.insert(rest, random.integers(0, 3), target[row])
    ranks = (order == target[:, None]).argmax(1)
    vectors = torch.from_numpy(random.normal(size=(store.num_items, 4)).astype(np.float32))
    scores = np.sort(random.random((split.num_samples, 10)).astype(np.float32), 1)[:, ::-1]
    return Ranking(order[:, :10], scores, 1.0, vectors, np.zeros((0, 4), np.float32), ranks)


def records(steps=40):
    for step in range(10, steps + 1, 10):
        yield {"global_step": step, "loss": 100 / step, "epoch": 0, "time": 1000.0 + step, "lr": 1e-3, "grad_norm": 0.5,
               "users_per_s": 2000.0 + step, "data_wait": 0.02, "rss_gib": 0.7}  # fmt: skip
    yield {"global_step": steps, "epoch": 1, "time": 1041.0, "split": "valid", "ndcg@10": 0.05, "hr@10": 0.09, "valid_loss": 5.0}


def write_run(folder, *, seed=0, skill=0.5, store=None, **settings):
    """A finished run's folder, with all that a run leaves there; returns (store, splits, ranking, metrics)."""
    folder.mkdir(parents=True)
    store = store or tiny_store(num_users=120, num_items=20, seed=5)
    splits = make_splits(store, protocol="leave_one_out", holdout_fraction=0.1, target="last", seed=3)
    ranking = made_up_ranking(store, splits.test, seed, skill)
    write_start_files(folder, dump_yaml(with_values(Config(), log_path=str(folder), **settings)), ["main.py"], ENVIRONMENT)
    (folder / "train.log").write_text("".join(json.dumps(record) + "\n" for record in records()), encoding="utf-8")
    metrics = METRICS | split_metrics(store, splits.test, ranking.topk_ids, (10,), 1) | {"num_users": splits.test.num_samples}
    of_baselines, places = baseline_results(Baselines(store, splits.train, np.arange(1, store.num_items + 1), True), splits.test, (10,), 1)
    metrics |= of_baselines
    (folder / "metrics.json").write_text(json.dumps(plain_json(metrics)), encoding="utf-8")
    write_ranks(folder, splits.test.users, ranking.target_ranks, ranking.topk_ids, places)
    counts = training_item_counts(store, splits.train)
    write_report_data(folder, ReportedData(store, splits, np.arange(1, store.num_items + 1), counts, 1, ("81",)), ranking)
    write_status(folder, "finished", 40, name=folder.name)
    return store, splits, ranking, metrics
