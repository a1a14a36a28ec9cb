"""The loss that the settings ask for, and the negatives that it wants: from a batch's query and item vectors to one number.

Must not know the model or the optimisers; the losses themselves are losses.py's.

Legend: N tokens, M unique items, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from config import Config
from dataset import Batch, NegativeSampling, Split, training_item_counts
from losses import bce_loss, log_expected_count, softmax_loss


class TrainingLoss:
    """The configured loss of a batch from query and item vectors."""

    def __init__(self, config: Config, store, train: Split, device: torch.device) -> None:
        self.config, self.num_items = config.loss, store.num_items
        self.item_share = None
        if self.config.name == "sampled_softmax" and self.config.logq:
            counts = training_item_counts(store, train)
            self.item_share = torch.from_numpy(counts / max(1, counts.sum())).float().to(device)  # (num_items + 1,)

    def __call__(self, query: Tensor, item_emb: Tensor, batch: Batch) -> Tensor:
        """query (N, D), item_emb (M, D) of batch.unique_ids; the mean over tokens."""
        config = self.config
        if config.name == "bce":
            return bce_loss(query, item_emb, batch.target_index, batch.negative_index, chunk_size=config.chunk_size)
        if config.name == "full_softmax":  # unique_ids are 0 (padding), 1 .. num_items
            return softmax_loss(query, item_emb[1:], batch.target_index - 1, temperature=config.temperature, chunk_size=config.chunk_size)
        log_q = None
        if self.item_share is not None:
            num_in_batch = min(query.shape[0], config.max_in_batch or query.shape[0]) if config.in_batch_negatives else 0
            log_q = log_expected_count(self.item_share[batch.unique_ids], num_in_batch, config.num_negatives, self.num_items)
        return softmax_loss(
            query,
            item_emb,
            batch.target_index,
            candidate_index=batch.candidate_index,
            temperature=config.temperature,
            log_q=log_q,
            chunk_size=config.chunk_size,
        )


def negative_sampling(config: Config) -> NegativeSampling:
    kind = {"bce": "position", "sampled_softmax": "shared", "full_softmax": "all"}[config.loss.name]
    return NegativeSampling(kind, config.loss.num_negatives, config.loss.in_batch_negatives, config.loss.max_in_batch)
