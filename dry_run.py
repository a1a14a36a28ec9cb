"""One update and one batch of the evaluation with a run's own trainer: `python main.py --dry_run`. Must not save or log anything."""

from __future__ import annotations

import time

import numpy as np

from evaluate import move
from logger import peak_rss_gib
from parallel import training_cores
from trainer import Trainer


def try_out(trainer: Trainer) -> list[tuple[str, str]]:
    """(what, how it went) of the first update of the first epoch, and of the first validation users. The weights change."""
    begin = time.perf_counter()
    trainer.order.start_epoch(0)
    trainer.model.train()
    group = min(trainer.config.training.accumulate_steps, trainer.order.num_batches)
    users = 0
    with training_cores(trainer.device):
        for number in range(group):
            batch, features = move(trainer._build(number), trainer.device)
            users += batch.users.shape[0]
            trainer.batch = number + 1  # named where the update is not finite
            (trainer._accumulate if number < group - 1 else trainer._update)(batch, features)
    trained = time.perf_counter()
    split = trainer.splits.valid.take(np.arange(min(trainer.splits.valid.num_samples, trainer.config.eval.eval_batch_size)))
    metrics = trainer.evaluate(split)
    evaluated = time.perf_counter()
    loss = trainer.loss_sum / max(1, trainer.loss_count)
    return [
        (
            "update",
            f"loss {loss:.4f}, gradient norm {trainer._last_norm:.4f}, {users:,} users, {trained - begin:.2f} s (the first is slow)",
        ),
        (
            "evaluation",
            f"{split.num_samples:,} users, {len(trainer.candidates):,} candidates, loss {metrics['loss']:.4f}, {evaluated - trained:.2f} s",
        ),
        ("a whole run", f"{trainer.total_steps:,} updates, {trainer.steps_per_epoch:,} an epoch"),
        ("peak memory", f"{peak_rss_gib():.2f} GiB resident"),
    ]
