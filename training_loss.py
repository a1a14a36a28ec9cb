"""The loss that the settings ask for, and the negatives that it wants: from a batch's query and item vectors to one number.

Must not know the model or the optimisers; the losses themselves are losses.py's.

Legend: N tokens, T tokens that predict a target, M unique items, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from config import Config
from dataset import Batch, NegativeSampling, Split, training_item_counts
from losses import Hidden, MoreCandidates, bce_loss, log_expected_count, softmax_loss
from negatives import MemoryBank, StreamingFrequency, popularity_probability


class TrainingLoss:
    """The configured loss of a batch from query and item vectors. It may keep a state from batch to batch: see `state_dict`."""

    def __init__(self, config: Config, store, train: Split, device: torch.device) -> None:
        loss = self.config = config.loss
        self.num_items, self.device = store.num_items, device
        sampled = loss.name == "sampled_softmax"
        counted = sampled and loss.logq and (loss.logq_source == "counts" or loss.popularity_negatives > 0)
        counts = training_item_counts(store, train) if counted else None
        self.item_share = self.popular_share = None  # (num_items + 1,) float32
        if counted and loss.logq_source == "counts":
            self.item_share = torch.from_numpy(counts / max(1, counts.sum())).float().to(device)
        if counted and loss.popularity_negatives:
            self.popular_share = torch.from_numpy(popularity_probability(counts, loss.popularity_power)).float().to(device)
        self.frequency = self.bank = None
        if sampled and loss.logq and loss.logq_source == "streaming":
            self.frequency = StreamingFrequency(store.num_items, loss.logq_rate, device)
        if sampled and loss.memory_bank:
            self.bank = MemoryBank(loss.memory_bank, config.model.hidden_units, store.num_items, device, config.system.seed)
        plain = len(set(loss.action_weights)) == 1
        self.action_weights = None if plain else torch.tensor(loss.action_weights, dtype=torch.float32, device=device)

    def __call__(self, query: Tensor, item_emb: Tensor, batch: Batch, temperature: Tensor | None = None) -> Tensor:
        """query (T, D), item_emb (M, D) of batch.unique_ids; the mean over targets. temperature: the learnt one, a scalar; None = fixed."""
        targets = batch.target_index.unique() if self.frequency is not None or self.bank is not None else None
        if self.frequency is not None:
            self.frequency.update(batch.unique_ids[targets])
        loss = self.of_targets(query, item_emb, batch, None, temperature)
        if self.bank is not None:
            self.bank.update(batch.unique_ids[targets], item_emb[targets])
        return loss

    def of_targets(
        self, query: Tensor, item_emb: Tensor, batch: Batch, targets: Tensor | None, temperature: Tensor | None = None
    ) -> Tensor:
        """The mean over some targets (n,) int64 of the batch alone (None: all), with the candidates of the whole; no state changes."""
        config, num_targets = self.config, query.shape[0]
        part = (lambda column: column) if targets is None else (lambda column: column.index_select(0, targets))
        query, target_index = part(query), part(batch.target_index)
        weights = None if self.action_weights is None else self.action_weights[part(batch.target_actions)]
        if config.name == "bce":
            return bce_loss(query, item_emb, target_index, part(batch.negative_index), weights=weights, chunk_size=config.chunk_size)
        hidden = None
        if config.mask_seen_negatives:
            hidden = _seen_by_user(batch, 1 if config.name == "full_softmax" else 0)
            hidden = hidden._replace(owner=part(hidden.owner))
        options = {
            "temperature": config.temperature if temperature is None else temperature,
            "weights": weights,
            "label_smoothing": config.label_smoothing,
            "hidden": hidden,
            "hard_negatives": config.hard_negatives,
            "chunk_size": config.chunk_size,
        }
        if config.name == "full_softmax":  # unique_ids are 0 (padding), 1 .. num_items
            return softmax_loss(query, item_emb[1:], target_index - 1, **options)
        candidate_index, items, vectors = self._candidates(batch)
        return softmax_loss(
            query,
            item_emb,
            target_index,
            candidate_index=candidate_index,
            log_q=self._log_q(batch.unique_ids, num_targets),
            more=None if items is None else MoreCandidates(vectors, self._log_q(items, num_targets)),
            **options,
        )

    def _candidates(self, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Candidates among unique_ids (C,), and the bank's other items (E,) and vectors (E, D); None for both without such.

        What the bank holds of unique_ids are candidates by the batch's own vectors, drawn or not: log_q counts the bank in for all items,
        and a target or an item of a user's window is then found, and hidden from its own tokens, like any other candidate.
        """
        if self.bank is None:
            return batch.candidate_index, None, None
        chosen = self.bank.holds(batch.unique_ids)
        chosen[batch.candidate_index] = True
        items, vectors = self.bank.others(batch.unique_ids)
        return chosen.nonzero()[:, 0], *((items, vectors) if len(items) else (None, None))

    def _log_q(self, items: Tensor, num_targets: int) -> Tensor | None:
        """Logarithm of how often each item (M,) is to be expected among the candidates of a step; None without logq."""
        config = self.config
        if not config.logq:
            return None
        num_in_batch = min(num_targets, config.max_in_batch or num_targets)
        batches = num_in_batch / num_targets if config.in_batch_negatives else 0.0
        draws = self.item_share[items] if self.frequency is None else self.frequency.expected_draws(items)
        per_batch = num_targets if self.frequency is None else 1
        others = 0.0 if self.popular_share is None else self.popular_share[items] * config.popularity_negatives
        if self.bank is not None:
            others = others + self.bank.expected_draws(draws * per_batch)
        return log_expected_count(draws, batches * per_batch, config.num_negatives, self.num_items, others=others)

    def state_dict(self) -> dict:
        parts = {"frequency": self.frequency, "bank": self.bank}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: dict) -> None:
        for name, part in (("frequency", self.frequency), ("bank", self.bank)):
            if part is not None and name in state:  # else the setting is new: it starts empty
                part.load_state_dict(state[name])


def total_weight(batch: Batch, action_weights: tuple[float, ...]) -> float:
    """What the mean over a batch's targets divides their sum by: their number, or their weights as parts of the largest action's."""
    if len(set(action_weights)) == 1:
        return batch.target_index.shape[0]
    counts = torch.bincount(batch.target_actions, minlength=len(action_weights)).tolist()
    return sum(count * weight for count, weight in zip(counts, action_weights)) / max(action_weights)


def _seen_by_user(batch: Batch, first: int) -> Hidden:
    """Each user's inputs and targets of this batch; `first`: the place in unique_ids of the first row that the loss is given."""
    inputs = batch.positions > 0  # the user token is no item
    tokens = batch.querying()
    owner = batch.owner[tokens]
    ends = (batch.lengths - 1 + torch.bincount(owner, minlength=len(batch.lengths))).cumsum(0)
    offsets = torch.cat((ends.new_zeros(1), ends))
    items = batch.target_index.new_empty(int(offsets[-1]))
    items[(offsets[batch.owner] + batch.positions - 1)[inputs]] = batch.item_index[inputs]
    # A user's targets belong to the last of its tokens, so they fill up what the inputs leave.
    items[ends[owner] - batch.lengths[owner] + batch.positions[tokens]] = batch.target_index
    return Hidden(owner, offsets, items - first)


def negative_sampling(config: Config, counts=None) -> NegativeSampling:
    """counts: (num_items + 1,) training events of each item; only read with popularity_negatives."""
    loss = config.loss
    kind = {"bce": "position", "sampled_softmax": "shared", "full_softmax": "all"}[loss.name]
    popular = None
    if kind == "shared" and loss.popularity_negatives:
        popular = popularity_probability(counts(), loss.popularity_power).cumsum()
    return NegativeSampling(kind, loss.num_negatives, loss.in_batch_negatives, loss.max_in_batch, loss.popularity_negatives, popular)
