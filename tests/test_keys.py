"""Every key does something: for each leaf of the settings tree, a run with another value shows another observable.

Runs are whole ones, of main.py in this process on 60 users, with the keys given as flags.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import yaml
from test_main import run_main

import evaluate
import backbones
import parallel
import trainer
import training_loss
from checkpoint import list_checkpoints
from config import KEYS, Config
from dataset import Prefetcher
from settings import load_config
from synthetic import generate

USERS, ITEMS = 60, 80
# 54 training users, 4 steps an epoch, 8 in all; 3 users for validation and 3 for test.
SMALL = {
    "hidden_units": 8, "num_blocks": 1, "max_seq_length": 10, "batch_size": 16, "num_epochs": 2, "num_negatives": 8, "log_every_steps": 1,
    "keep_last_k": 0, "tensorboard": False, "data_path": "data", "cache_path": "cache", "log_path": "log", "checkpoint_path": "ckpt",
    "tensorboard_path": "tb", "num_threads": 1,
}  # fmt: skip


class Seen(NamedTuple):
    """What a run leaves and does. calls: {name: values with which something was called}."""

    status: int
    text: str
    cwd: Path
    metrics: dict
    records: list
    checkpoints: list
    calls: dict


def losses(seen: Seen) -> list:
    return [round(r["loss"], 3) for r in seen.records if "loss" in r]


def valid_losses(seen: Seen) -> list:
    return [round(r["valid_loss"], 6) for r in seen.records if "valid_loss" in r]


def rates(seen: Seen) -> list:
    return [round(r["lr"], 9) for r in seen.records if "loss" in r]


def evaluations(seen: Seen) -> int:
    return sum(r.get("split") == "valid" for r in seen.records)


def num_checkpoints(seen: Seen) -> int:
    return len(seen.checkpoints)


def steps_of_checkpoints(seen: Seen) -> list:
    return [int(path.name.split(".")[0].removeprefix("global_step")) for path in seen.checkpoints]


def has_histograms(seen: Seen) -> bool:
    return any(b"weights/backbone" in path.read_bytes() for path in (seen.cwd / "tb").glob("events.out.tfevents.*"))


def has_figures(seen: Seen) -> bool:
    return any(b"place of the target" in path.read_bytes() for path in (seen.cwd / "tb").glob("events.out.tfevents.*"))


def logged_steps(seen: Seen) -> list:
    return [r["global_step"] for r in seen.records if "loss" in r]


def metric(key: str) -> Callable:
    return lambda seen: seen.metrics.get(key)


def called(name: str) -> Callable:
    return lambda seen: seen.calls[name]


def status(seen: Seen) -> int:
    return seen.status


def last_state(seen: Seen, file: str) -> dict:
    return torch.load(seen.checkpoints[-1] / file, weights_only=True)


def table_widths(seen: Seen) -> list:
    """The widths of the joint table's parts, each once."""
    return sorted({value.shape[1] for name, value in last_state(seen, "model.pt").items() if name.startswith("table.parts.")})


def item_id_rows(seen: Seen) -> int:
    layout = json.loads((seen.checkpoints[-1] / "meta.json").read_text())["layout"]
    return sum(field["size"] for field in layout if field["name"] == "item_id")


def exists(path: str) -> Callable:
    return lambda seen: any(seen.cwd.glob(path))


def chosen_by_loss(seen: Seen) -> bool:
    return last_state(seen, "trainer.pt")["best_value"] == min(r["valid_loss"] for r in seen.records if "valid_loss" in r)


class Case(NamedTuple):
    """Another value of a key, and what it changes. base: settings under which both runs are made; expected: (before, after) where known."""

    value: object
    observe: Callable
    expected: tuple = ()
    base: Mapping = MappingProxyType({})


STILL = {"optimizer": "adamw", "learning_rate": 1e-12}  # nothing is learnt: no evaluation is better than the first
WIDE = {"holdout_fraction": 0.5, "num_epochs": 1}
CASES = {
    "backbone": Case("hstu", losses),
    "norm": Case("rmsnorm", losses),
    "time_bias": Case(True, losses, base={"learning_rate": 0.01}),
    "num_experts": Case(3, lambda seen: any("expert_share_max" in r for r in seen.records), (False, True)),
    "active_experts": Case(1, losses, base={"num_experts": 3}),
    "shared_experts": Case(0, losses, base={"num_experts": 3}),
    "expert_multiplier": Case(2.0, losses, base={"num_experts": 3}),
    "expert_balance_weight": Case(5.0, losses, base={"num_experts": 3, "learning_rate": 0.01}),
    "hidden_units": Case(12, losses),
    "num_blocks": Case(2, losses),
    "num_heads": Case(4, losses),
    "max_seq_length": Case(3, losses),
    "embedding_dim": Case(4, table_widths, ([8], [4])),
    "feature_width": Case("auto", table_widths, ([32], [8, 16]), {"embedding_dim": 32}),
    "hash_rows": Case([20, 13], item_id_rows, (ITEMS, 33)),
    "hashed_features": Case(["121"], item_id_rows, (20, ITEMS), {"hash_rows": [20]}),
    "dropout_rate": Case(0.3, losses),
    "attention_dropout": Case(0.5, losses),
    "norm_first": Case(False, losses),
    "activation": Case("relu", losses),
    "ffn_multiplier": Case(2.0, losses),
    "position": Case("learned", losses),
    "embedding_norm": Case(False, losses),
    "item_tower": Case("sum", losses),
    "item_activation": Case("relu", losses),
    "candidate_activation": Case(True, losses, base={"item_activation": "relu"}),
    "user_id": Case(True, losses),
    "action_embedding": Case(False, losses),
    "action_conditioning": Case("film", losses),
    "action_dropout": Case(0.9, losses, base={"action_conditioning": "film", "learning_rate": 0.01}),
    "time_features": Case(False, losses),
    "time_fields": Case(["day", "fourier"], losses),
    "similarity": Case("dot", losses),
    "init_std": Case(0.5, losses),
    "id_init": Case("zero", losses),
    "event_dropout": Case(0.5, losses),
    "id_dropout": Case(0.5, losses),
    "batch_size": Case(27, lambda seen: len(losses(seen)), (8, 4)),
    "num_epochs": Case(3, lambda seen: (len(losses(seen)), evaluations(seen)), ((8, 2), (12, 3))),
    "learning_rate": Case(0.01, rates),
    "optimizer": Case("adam", losses, base={"weight_decay": 50.0}),
    "muon_learning_rate": Case(0.1, losses, base={"optimizer": "muon"}),
    "muon_momentum": Case(0.1, losses, base={"optimizer": "muon"}),
    "muon_lr_scheduler": Case("constant", losses, base={"optimizer": "muon"}),
    "muon_warmup_steps": Case(4, losses, base={"optimizer": "muon"}),
    "table_lr_scheduler": Case("constant", losses, base={"table_learning_rate": 0.1}),
    "table_warmup_steps": Case(4, losses, base={"table_learning_rate": 0.1}),
    "accumulate_steps": Case(3, lambda seen: len(losses(seen)), (8, 4)),
    "ema_decay": Case(0.9, lambda seen: [r["valid_loss"] for r in seen.records if "valid_loss" in r], base={"learning_rate": 0.01}),
    "weight_decay": Case(50.0, losses),
    "l2_emb": Case(1.0, losses, base={"table_learning_rate": 0.1}),
    "adam_beta1": Case(0.1, losses, base={"learning_rate": 0.01}),
    "adam_beta2": Case(0.1, losses, base={"learning_rate": 0.01}),
    "table_optimizer": Case("adam", losses, base={"table_learning_rate": 0.1}),
    "table_learning_rate": Case(0.1, losses),
    "lr_scheduler": Case("constant", lambda seen: rates(seen)[-1] < rates(seen)[0], (True, False)),
    "warmup_steps": Case(4, lambda seen: rates(seen)[:4], ([3e-3] * 4, [7.5e-4, 1.5e-3, 2.25e-3, 3e-3]), {"lr_scheduler": "constant"}),
    "min_lr_ratio": Case(0.9, lambda seen: min(rates(seen)) < 9e-4, (True, False)),
    "lr_step_epochs": Case(2, rates, ([1e-3] * 4 + [5e-4] * 4, [1e-3] * 8), {"lr_scheduler": "step", "learning_rate": 1e-3}),
    "lr_gamma": Case(0.1, rates, ([1e-3] * 4 + [5e-4] * 4, [1e-3] * 4 + [1e-4] * 4), {"lr_scheduler": "step", "learning_rate": 1e-3}),
    "max_skipped_steps": Case(100, status, (1, 0), base={"temperature": 1e-39}),  # every loss overflows
    "gradient_clip": Case(0.0, losses, base={"learning_rate": 0.01}),
    "precision": Case("bf16", losses),
    "compile": Case(True, called("compiled encoders"), (0, 1)),  # noted, not done: it takes a minute
    "gradient_checkpointing": Case(True, called("checkpointed blocks"), (0, 8)),
    "patience": Case(1, evaluations, (4, 2), STILL | {"num_epochs": 4}),
    "max_steps": Case(5, lambda seen: len(losses(seen)), (8, 5)),
    "save_every_steps": Case(3, steps_of_checkpoints, ([4, 8], [3, 4, 6, 8])),
    "keep_last_k": Case(1, num_checkpoints, (4, 2), STILL | {"num_epochs": 4}),  # the best, of the first epoch, and the newest
    "name": Case("full_softmax", losses),
    "num_negatives": Case(64, losses),
    "in_batch_negatives": Case(False, losses),
    "max_in_batch": Case(4, losses),
    "temperature": Case(0.5, losses),
    "logq": Case(False, losses),
    "learn_temperature": Case(True, lambda seen: any("temperature" in r for r in seen.records), (False, True)),
    "logq_source": Case("streaming", losses),
    "logq_rate": Case(0.5, losses, base={"logq_source": "streaming", "learning_rate": 0.01}),
    "popularity_negatives": Case(7, losses),
    "popularity_power": Case(3.0, losses, base={"popularity_negatives": 7}),
    "memory_bank": Case(30, losses),
    "mask_seen_negatives": Case(True, losses),
    "hard_negatives": Case(2, losses),
    "label_smoothing": Case(0.2, losses),
    "action_weights": Case([0.1, 1, 2], losses),
    "action_head_weight": Case(0.5, lambda seen: any("action_loss" in r for r in seen.records), (False, True)),
    "chunk_size": Case(7, called("chunk_size"), ({0}, {7})),
    "test": Case(False, lambda seen: seen.metrics["split"], ("test", "valid")),
    "num_workers": Case(3, called("num_workers"), ({1}, {3})),
    "prefetch_batches": Case(9, called("prefetch_batches"), ({4}, {9})),
    "multimodal_features": Case(["81", "82"], lambda seen: "embeddings  81, 82" in seen.text, (False, True)),
    "max_bad_lines": Case(1, status, (2, 0), {"data_path": "broken"}),
    "length_buckets": Case(False, losses),
    "targets_per_sample": Case(1, losses),
    "protocol": Case("leave_one_out", metric("num_users"), (3, USERS)),
    "holdout_fraction": Case(0.5, metric("num_users"), (3, 15)),
    "target": Case("last_click", metric("num_users"), base=WIDE),
    "candidates": Case("data-eval", metric("num_candidates")),
    "top_k": Case([3], lambda seen: sorted(k for k in seen.metrics if k.startswith("hr@")), (["hr@10"], ["hr@10", "hr@3"])),
    "wanted_action": Case("click", valid_losses, base={"action_conditioning": "film", "learning_rate": 0.01}),
    "cold_candidates": Case("drop", metric("num_candidates"), base={"id_dropout": 0.1}),
    "cold_penalty": Case(0.5, valid_losses, base={"id_dropout": 0.1, "cold_candidates": "penalty"}),
    "transition_weight": Case(100.0, metric("ndcg@10"), base={"protocol": "leave_one_out"}),
    "remove_seen": Case(False, called("seen items removed"), ({True}, {False})),
    "max_eval_users": Case(2, metric("num_users"), (3, 2)),
    "eval_batch_size": Case(4, lambda seen: max(seen.calls["users ranked at once"]), (15, 4), WIDE),
    "eval_every_epochs": Case(2, evaluations, (2, 1)),
    "baselines": Case(False, lambda seen: "popularity.hr@10" in seen.metrics, (True, False)),
    "score_round": Case(2, lambda seen: [seen.metrics[k] for k in ("score", "popularity.score", "item2item.score")], base=WIDE),
    "best_metric": Case("loss", chosen_by_loss, (False, True)),
    "device": Case("cpu", lambda seen: "(asked for)" in seen.text, (False, True)),
    "seed": Case(7, losses),
    "num_threads": Case(2, called("threads"), ({1}, {2})),
    "save_frequency": Case(3, steps_of_checkpoints, ([4, 8, 12, 16], [4, 12, 16]), STILL | {"num_epochs": 4}),
    "log_every_steps": Case(3, logged_steps, ([1, 2, 3, 4, 5, 6, 7, 8], [3, 6, 8])),
    "tensorboard": Case(True, exists("tb/events.out.tfevents.*"), (False, True)),
    "tensorboard_histograms": Case(True, has_histograms, (False, True), {"tensorboard": True}),
    "tensorboard_figures": Case(False, has_figures, (True, False), {"tensorboard": True}),
    "projector_items": Case(0, exists("tb/projector_config.pbtxt"), (True, False), {"tensorboard": True}),
    "run_name": Case("mine", exists("logs/*-mine"), (False, True), {"log_path": ""}),
    "data_path": Case("other", metric("num_candidates"), (ITEMS, ITEMS + 10)),
    "log_path": Case("log2", exists("log2/train.log"), (False, True)),
    "tensorboard_path": Case("tb2", exists("tb2/events.out.tfevents.*"), (False, True), {"tensorboard": True}),
    "checkpoint_path": Case("ckpt2", exists("ckpt2/best_model.pt"), (False, True)),
    "cache_path": Case("cache2", exists("cache2/store-*"), (False, True)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """data, data-eval, other (10 items more) and broken (its third line cut); and a cache for all."""
    folder = tmp_path_factory.mktemp("keys")
    generate(folder / "data", USERS, ITEMS, "jsonl", predict=5, embeddings=("81", "82"), max_length=10, mean_length=7)
    generate(folder / "other", USERS, ITEMS + 10, "jsonl", max_length=10, mean_length=7)
    shutil.copytree(folder / "data", folder / "broken")
    lines = (folder / "data/seq.jsonl").read_text().splitlines()
    (folder / "broken/seq.jsonl").write_text("\n".join([*lines[:2], lines[2][:50], *lines[3:]]) + "\n")
    (folder / "broken/seq_offsets.pkl").unlink()
    (folder / "cache").mkdir()
    (folder / "empty.yaml").write_text("")
    return folder


@pytest.fixture(scope="module")
def run(folder) -> Callable[..., Seen]:
    """run(batch_size=4, ...): a run with these settings over SMALL; the same settings run once."""
    known: dict[str, Seen] = {}

    def cached(**settings) -> Seen:
        name = json.dumps(settings, sort_keys=True)
        if name not in known:
            known[name] = observed_run(folder, len(known), SMALL | settings)
        return known[name]

    return cached


def observed_run(folder: Path, number: int, settings: dict) -> Seen:
    cwd = folder / f"run{number}"
    cwd.mkdir()
    for name in ("data", "data-eval", "other", "broken", "cache", "empty.yaml"):
        (cwd / name).symlink_to(folder / name)
    calls: dict = {"checkpointed blocks": 0, "compiled encoders": 0, "users ranked at once": set()}
    calls |= {name: set() for name in ("chunk_size", "num_workers", "prefetch_batches", "seen items removed", "threads")}
    with watched(calls):
        done = run_main("--config", "empty.yaml", *flags_of(settings), cwd=cwd)
    assert "Traceback" not in done.err, done.err
    log = next((path.parent for path in sorted(cwd.rglob("train.log"))), None)
    metrics = json.loads((log / "metrics.json").read_text()) if log and (log / "metrics.json").is_file() else {}
    records = [json.loads(line) for line in (log / "train.log").read_text().splitlines()] if log else []
    checkpoints = list_checkpoints(cwd / settings["checkpoint_path"])
    return Seen(done.status, done.out + done.err, cwd, metrics, records, checkpoints, calls)


def flags_of(settings: dict) -> list:
    words = []
    for key, value in settings.items():
        words += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


@contextmanager
def watched(calls: dict) -> Iterator[None]:
    """Note with what the parts of a run are called that only speed depends on; and spare the disk."""
    softmax_loss, checkpoint, topk, update = training_loss.softmax_loss, backbones.checkpoint, evaluate.topk_exact, trainer.Trainer._update
    prefetch = Prefetcher.__call__

    def noted_loss(*args, **options):
        calls["chunk_size"].add(options["chunk_size"])
        return softmax_loss(*args, **options)

    def noted_checkpoint(*args, **options):
        calls["checkpointed blocks"] += 1
        return checkpoint(*args, **options)

    def noted_compile(self, **options):
        calls["compiled encoders"] += 1

    def noted_topk(query, *args, exclude):
        calls["users ranked at once"].add(len(query))
        calls["seen items removed"].add(exclude is not None)
        return topk(query, *args, exclude=exclude)

    def noted_prefetch(self, build, numbers):
        calls["num_workers"].add(self.num_workers)
        calls["prefetch_batches"].add(self.depth)
        return prefetch(self, build, numbers)

    def noted_update(self, *args):
        calls["threads"].add(parallel.num_threads())
        return update(self, *args)

    patches = [(training_loss, "softmax_loss", noted_loss), (backbones, "checkpoint", noted_checkpoint),
               (evaluate, "topk_exact", noted_topk),
               (Prefetcher, "__call__", noted_prefetch), (trainer.Trainer, "_update", noted_update),
               (backbones.Backbone, "compile", noted_compile), (os, "fsync", lambda _: None)]  # fmt: skip
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        yield


def test_the_table_covers_every_key():
    assert set(CASES) == set(KEYS)


def test_each_value_is_another_one():
    for key, case in CASES.items():
        assert case.value != (SMALL | case.base).get(key, Config().get(key)), key


def test_each_backbone_that_may_be_chosen_exists():
    assert set(backbones.BACKBONES) == set(KEYS["backbone"].choices)


def test_the_same_settings_give_the_same_losses(run):
    """Without this a difference of losses would show nothing."""
    again = run(run_name="x")  # a key that no loss depends on, so that it is run again
    assert losses(again) == losses(run()) and len(losses(again)) == 8 and again.metrics["hr@10"] == run().metrics["hr@10"]


@pytest.mark.parametrize("key", CASES)
def test_key_does_something(run, key):
    case = CASES[key]
    before, after = run(**case.base), run(**case.base | {key: case.value})
    if case.observe is not status:
        assert before.status == after.status == 0, after.text
    found = case.observe(before), case.observe(after)
    assert found[0] != found[1]
    if case.expected:
        assert found == case.expected


@pytest.mark.parametrize("key", CASES)
def test_key_in_a_file_is_the_key_as_a_flag(tmp_path, key):
    value = CASES[key].value
    tree = {KEYS[key].group: {key: value}}
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(tree))
    by_file = load_config(["--config", str(tmp_path / "file.yaml")], {})
    by_flag = load_config(flags_of({key: value}), {}, default_file=tmp_path / "nowhere.yaml")
    assert by_file.config.get(key) == by_flag.config.get(key)
    assert by_file.origins[key].endswith("file.yaml:2") and by_flag.origins[key] == f"flag --{key}"
