"""A demonstration of the core functions on small data, in under two minutes: data, store, batch, model, training, recommendations.

    python simple_demo.py

Must not hold logic of its own: it calls what the main job calls, and prints what comes out.
"""

from __future__ import annotations

import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

from atomic import temporary_folder
from config import Config, with_values
from dataset import make_splits
from errors import ArgumentParser, run_cli
from features import TableLayout
from final_test import run_test
from logger import RunLogger, format_table
from runs import prepare_run
from schema import ACTION_NAMES
from store import open_store
from trainer import Trainer

USERS, ITEMS, SHOWN_USERS, SHOWN_EVENTS = 2000, 3000, 3, 8


def headline(number: int, text: str) -> None:
    print(f"\n[{number}] {text}", flush=True)


def demonstrate(folder: Path) -> None:
    from synthetic import generate  # an entry script of its own, so not imported with this module

    headline(1, f"synthetic TencentGR-shaped data: {USERS:,} users, {ITEMS:,} items, in the competition's layout (synthetic.generate)")
    data = folder / "data"
    generate(data, users=USERS, items=ITEMS, layout="jsonl", seed=3)
    for path in sorted(data.iterdir()):
        print(f"    {path.name}")

    headline(2, "compiled once into a memory-mapped store (store.open_store)")
    store = open_store(data, folder / "cache", embeddings=("81",), progress=False, log=lambda text: print("    " + text))
    print(f"    user 1: items {store.item_ids[:6].tolist()} ..., actions {store.action_types[:6].tolist()} ...")

    headline(3, "splits, model and trainer (dataset.make_splits, trainer.Trainer)")
    paths = {"log_path": str(folder / "run"), "checkpoint_path": str(folder / "checkpoints"), "tensorboard_path": str(folder / "tb")}
    config = with_values(Config(), num_epochs=6, log_every_steps=20, batch_size=64, tensorboard=False, **paths)
    splits = make_splits(store, protocol="holdout", holdout_fraction=0.2, target="last", seed=config.system.seed)
    run = prepare_run(config.paths)
    logger = RunLogger(run.log_dir, None)
    trainer = Trainer(config, store, TableLayout.from_store(store, config.model), ("81",), splits, run, logger, torch.device("cpu"))
    logger.total_steps = trainer.total_steps
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"    {splits.train.num_samples:,} users to train on, {splits.test.num_samples:,} to test on; {parameters:,} parameters")

    headline(4, "one batch of ids (dataset.BatchBuilder)")
    trainer.order.start_epoch(0)
    batch, _ = trainer._build(0)
    print(
        f"    {len(batch.users)} users, {len(batch.item_index):,} tokens, {len(batch.unique_ids):,} unique items, "
        f"{len(batch.candidate_index):,} shared candidates"
    )

    headline(5, "training (Trainer.fit)")
    trainer.fit()

    headline(6, "test split beside the baselines (Trainer.test)")
    trainer.logger = RunLogger(None, None, console=False)
    metrics = run_test(trainer)
    rows = [("model", metrics["hr@10"], metrics["ndcg@10"])]
    rows += [(name, metrics[f"{name}.hr@10"], metrics[f"{name}.ndcg@10"]) for name in ("popularity", "recent", "item2item")]
    print("\n".join("    " + line for line in format_table(rows, ("ranker", "hr@10", "ndcg@10"))))

    headline(7, f"recommendations for {SHOWN_USERS} users (evaluate.Ranker)")
    show_users(trainer)


def show_users(trainer: Trainer) -> None:
    """What a few users saw, the ten items recommended to them, and what came next."""
    store, split = trainer.store, trainer.splits.test
    ranking = trainer._ranker().rank(split, 10, remove_seen=True)
    hits = (ranking.topk_ids == store.item_ids[split.target][:, None]).any(axis=1)
    shown = np.concatenate([np.flatnonzero(hits)[: SHOWN_USERS - 1], np.flatnonzero(~hits)[:1]])  # some hits and a miss
    for row in shown:
        print(f"\n    {store.raw_user_ids[int(split.users[row])]}, the last of {split.end[row] - split.begin[row]} events:")
        for event in range(max(split.begin[row], split.end[row] - SHOWN_EVENTS), split.end[row]):
            print("      " + describe(store, event))
        top = ranking.topk_ids[row].tolist()
        target = int(store.item_ids[split.target[row]])
        place = f"place {top.index(target) + 1} of the ten" if target in top else "not among the ten"
        print(f"      recommended  {', '.join(map(str, top))}")
        print(f"      came next    {describe(store, int(split.target[row]))}: {place}")


def describe(store, event: int) -> str:
    moment = datetime.fromtimestamp(int(store.timestamps[event]), tz=timezone.utc)
    return f"{moment:%Y-%m-%d %H:%M}  {ACTION_NAMES[store.action_types[event]]:10s}  item {store.item_ids[event]}"


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.parse_args()
    started = time.time()
    with temporary_folder(Path(tempfile.gettempdir()) / "simple_demo", mode=0o700) as folder:
        demonstrate(folder)
    print(f"\ndone in {time.time() - started:.0f} s. Next: bash run.sh, or USAGE.md for your own data.")


if __name__ == "__main__":
    sys.exit(run_cli(main, debug="--debug" in sys.argv))
