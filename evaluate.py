"""Encodes candidates and users and ranks the one for the other: the single path of training, inference and benchmarks.

Must not choose splits, write files or know of runs.

Legend: S samples (users to rank for), B users of a batch, C candidates, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from baselines import Baselines
from candidates import read_candidates
from columns import ragged_places
from dataset import BatchBuilder, Prefetcher, Split, generator
from errors import UserError
from features import FeatureColumns
from metrics import RankingMetrics, action_weights, ranks_from_topk
from model import Recommender
from retrieval import Catalogue, Exclude, prepare_catalogue, rank_targets, topk_exact
from schema import ACTION_NAMES, ANY_ACTION
from transitions import ScoredAdditions, Transitions, additions, rank_with_additions, roughly_scored, topk_with_additions, without_excluded

ITEM_CHUNK = 16_384  # items encoded at once: keeps the tower's temporaries near 100 MiB at width 64
LOSS_SAMPLE = 10_000  # candidates that stand for all in the validation loss
LOSS_KEY = 4


class Ranking(NamedTuple):
    """What a pass over a split found."""

    topk_ids: np.ndarray  # (S, k) item ids, best first; 0 where candidates ran out
    topk_scores: np.ndarray  # (S, k) float32
    loss: float  # mean cross-entropy of the targets among themselves and LOSS_SAMPLE fixed candidates; nan without targets
    candidates: Tensor  # (C, D) float32, in the order of Ranker.candidate_ids
    queries: np.ndarray  # (S, D) float32; (0, D) unless kept
    target_ranks: np.ndarray  # (S,) int64, candidates before the target; -1 where it is no candidate or was not asked for


class Prepared(NamedTuple):
    """A ranker's candidates, encoded once for many calls of `rank`."""

    encoded: Tensor  # (C, D) float32
    vectors: Tensor  # (C, D), or (C, D + 1) with cold_penalty: what queries meet
    catalogue: Catalogue


def move(tree, device: torch.device, pin: bool = False):
    """Copy the tensors of nested tuples to a device; with `pin`, into page-locked memory instead."""
    if isinstance(tree, Tensor):
        return tree.pin_memory() if pin else tree.to(device, non_blocking=True)
    if isinstance(tree, tuple):
        parts = [move(part, device, pin) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree


def trained_items(state: Mapping[str, Tensor]) -> np.ndarray | None:
    """(items + 1,) bool, those whose ids a model of this state was trained on; None where it does not note it (without id_dropout)."""
    return state["trained_items"].cpu().numpy() if "trained_items" in state else None


def without_cold(candidate_ids: np.ndarray, columns: FeatureColumns) -> np.ndarray:
    """The candidates that were in training; UserError where none was."""
    kept = candidate_ids[columns.is_trained(candidate_ids)]
    if not len(kept):
        raise UserError(f"eval.cold_candidates drop: none of the {len(candidate_ids):,} candidates was in training. Use rank or penalty.")
    return kept


def candidate_ids(given: str, store) -> tuple[np.ndarray, int]:
    """(Items to rank, how many of a file's the store does not know). given: eval.candidates, all or a path."""
    if given == "all":
        return np.arange(1, store.num_items + 1), 0
    table = read_candidates(Path(given), store.schema)
    ids = store.item_ids_of(table.creative_ids)
    if not (ids > 0).any():
        raise UserError(
            f"eval.candidates {given}: none of its {len(ids):,} creative ids is in the data's indexer.\n"
            "Give the candidates of this data set, or all."
        )
    return np.unique(ids[ids > 0]), int((ids == 0).sum())


def wanted_actions(name: str, store, split: Split) -> np.ndarray:
    """(S,) int64 action that each sample's query asks for, by the name of eval.wanted_action.

    "target" alone reads what is to be predicted; ANY_ACTION where there is no target.
    """
    found = np.full(split.num_samples, ANY_ACTION if name in ("any", "target") else ACTION_NAMES.index(name), dtype=np.int64)
    if name == "target":
        given = split.target >= 0
        found[given] = store.action_types[split.target[given]]
    return found


class Ranker:
    """Ranks a fixed set of candidates for users of a store.

    candidate_ids: (C,) ids of the store's items, any order; the result is independent of the order. Answers tie-break by lowest id.
    cold_penalty: taken off the scores of candidates that were not in training. transitions: counts whose addition to the scores, times
    transition_weight, joins in the ranking; the loss is that of the vectors alone. wanted_action: a name for `wanted_actions`, of the
    queries that are not told what to ask for.
    """

    def __init__(
        self,
        model: Recommender,
        columns: FeatureColumns,
        candidate_ids: np.ndarray,
        *,
        device: torch.device,
        batch_size: int,
        num_workers: int = 1,
        prefetch_batches: int = 4,
        temperature: float = 1.0,
        cold_penalty: float = 0.0,
        transitions: Transitions | None = None,
        transition_weight: float = 0.0,
        wanted_action: str = "any",
    ) -> None:
        self.model, self.columns, self.store, self.device = model, columns, columns.store, device
        self.wanted_action = wanted_action
        self.candidate_ids = np.unique(candidate_ids)
        self.batch_size, self.temperature = batch_size, temperature
        self.prefetch = Prefetcher(num_workers, prefetch_batches)
        self.cold_penalty = cold_penalty
        self.transitions, self.transition_weight = transitions if transition_weight else None, transition_weight
        self._place = np.full(self.store.num_items + 1, -1, dtype=np.int64)
        self._place[self.candidate_ids] = np.arange(len(self.candidate_ids))

    @torch.inference_mode()
    def encode_candidates(self) -> Tensor:
        """(C, D) float32 on the device, in the order of `candidate_ids`."""
        self.model.eval()
        parts = [self.candidate_ids[i : i + ITEM_CHUNK] for i in range(0, len(self.candidate_ids), ITEM_CHUNK)]
        encoded = torch.empty(len(self.candidate_ids), self.model.config.hidden_units, device=self.device)
        gathered = self.prefetch(lambda i: self.columns.items(parts[i]), range(len(parts)))
        for i, inputs in enumerate(gathered):
            encoded[i * ITEM_CHUNK : i * ITEM_CHUNK + len(parts[i])] = self.model.encode_items(move(inputs, self.device)).candidate
        return encoded

    @torch.inference_mode()
    def encode_users(self, split: Split, wanted: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, Tensor]]:
        """(sample numbers (B,), query vectors (B, D)) of a split's samples, batch by batch, similar lengths together.

        wanted: (S,) int64 action that each query asks for, for a model with action_conditioning; below 0, and None: the ranker's own.
        """
        own = wanted_actions(self.wanted_action, self.store, split)
        wanted = own if wanted is None else np.where(wanted >= 0, wanted, own)
        self.model.eval()
        builder = BatchBuilder(self.store, split, self.model.config.max_seq_length)
        order = np.argsort(split.begin - split.end, kind="stable")  # the longest first: what later batches allocate fits where it lay
        chunks = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

        def build(number: int):
            batch = builder.evaluation(chunks[number])
            return batch, self.columns.gather(batch.unique_ids.numpy(), batch.users.numpy())

        for samples, built in zip(chunks, self.prefetch(build, range(len(chunks)))):
            batch, features = move(built, self.device)
            query, _ = self.model(batch, features, torch.from_numpy(wanted[samples]).to(self.device))
            yield samples, query

    @torch.inference_mode()
    def prepare(self) -> Prepared:
        """The candidates' vectors, ready for `rank`."""
        encoded = self.encode_candidates()
        vectors = self.with_penalties(encoded)
        return Prepared(encoded, vectors, prepare_catalogue(vectors))

    @torch.inference_mode()
    def rank(
        self,
        split: Split,
        k: int,
        remove_seen: bool,
        *,
        fill: bool = False,
        keep_queries: bool = False,
        ranks_of: np.ndarray | None = None,
        wanted: np.ndarray | None = None,
        prepared: Prepared | None = None,
    ) -> Ranking:
        """Exact top k for each sample; seen items (all input events, not only the window) removed where asked.

        fill: a user who has seen so much that fewer than k candidates are left gets the best of the seen ones after them.
        ranks_of: (S,) bool, the samples whose target's exact rank is counted over all candidates too; that takes as long again.
        wanted: as in `encode_users`. prepared: what `prepare` gave for these candidates; None = they are encoded now.
        """
        encoded, candidates, catalogue = prepared or self.prepare()
        k_found = min(k, len(self.candidate_ids))
        ids = np.zeros((split.num_samples, k), dtype=np.int64)
        scores = np.full((split.num_samples, k), -np.inf, dtype=np.float32)
        queries = np.zeros((split.num_samples if keep_queries else 0, encoded.shape[1]), dtype=np.float32)
        losses = []
        target_ranks = np.full(split.num_samples, -1, dtype=np.int64)
        for samples, query in self.encode_users(split, wanted):
            part = split.take(samples)
            if keep_queries:
                queries[samples] = query.cpu().numpy()
            if self.cold_penalty:
                query = torch.cat((query, query.new_ones(len(query), 1)), dim=1)
            seen = self._seen(part) if remove_seen else None
            asked = None
            if ranks_of is not None and ranks_of[samples].any():
                asked = np.where(ranks_of[samples], self._target_places(part), -1)
            found_scores, found, ranks = self._ranked(query, catalogue, k_found, seen, part, asked, fill)
            if ranks is not None:
                target_ranks[samples] = ranks
            ids[samples, :k_found] = np.where(found >= 0, self.candidate_ids[found], 0)
            scores[samples, :k_found] = found_scores
            losses.append(self._target_losses(query, candidates, part))
        flat = torch.cat(losses) if losses else torch.zeros(0)
        return Ranking(ids, scores, float(flat.double().mean()), encoded, queries, target_ranks)

    def _ranked(
        self, query: Tensor, catalogue: Catalogue, k: int, seen: Exclude | None, part: Split, asked: np.ndarray | None, fill: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """(scores (B, k), places (B, k), ranks (B,) of the places asked for (B,)) of a batch of the split."""
        added = allowed = None
        if self.transitions is not None:
            added = additions(self.transitions, self.store, part, self._place, self.temperature * self.transition_weight)
            allowed = roughly_scored(query, catalogue, without_excluded(added, seen, len(self.candidate_ids)))
        scores, found = _top(query, catalogue, k, allowed, seen)
        if fill and (found < 0).any():
            rows = np.flatnonzero((found < 0).any(axis=1))
            some = query[torch.from_numpy(rows).to(query.device)]
            all_of_them = None if added is None else roughly_scored(some, catalogue, added.of(rows))
            _fill(found, scores, rows, *_top(some, catalogue, k, all_of_them, None))
        if asked is None:
            return scores, found, None
        if allowed is not None:
            return scores, found, rank_with_additions(query, catalogue, asked, allowed, seen)
        return scores, found, rank_targets(query, catalogue, torch.from_numpy(asked).to(self.device), exclude=seen).cpu().numpy()

    def with_penalties(self, candidates: Tensor) -> Tensor:
        """Vectors (C, D) of the candidates; with cold_penalty (C, D + 1), for queries that end in a one."""
        if not self.cold_penalty:
            return candidates
        cold = torch.from_numpy(~self.columns.is_trained(self.candidate_ids)).to(candidates.device)
        return torch.cat((candidates, -self.cold_penalty * cold[:, None].to(candidates.dtype)), dim=1)

    @cached_property
    def _loss_sample(self) -> Tensor:
        """Places of the candidates that stand for all in the loss, drawn once: a permutation of millions has no place in a batch."""
        size = len(self.candidate_ids)
        chosen = generator(LOSS_KEY).permutation(size)[:LOSS_SAMPLE] if size > LOSS_SAMPLE else np.arange(size)
        return torch.from_numpy(chosen).to(self.device)

    def _seen(self, split: Split) -> tuple[Tensor, Tensor]:
        """Places among the candidates of each sample's input events: (offsets (B + 1,), index)."""
        counts = split.end - split.begin
        place = self._place[self.store.item_ids[ragged_places(split.begin, counts)]]
        owner = np.repeat(np.arange(len(counts)), counts)[place >= 0]
        offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(counts)))])
        return torch.from_numpy(offsets).to(self.device), torch.from_numpy(place[place >= 0]).to(self.device)

    def _target_places(self, split: Split) -> np.ndarray:
        """(B,) place of each target among the candidates, -1 where it is unknown or no candidate."""
        return np.where(split.target >= 0, self._place[self.store.item_ids[np.maximum(split.target, 0)]], -1)

    def _target_losses(self, query: Tensor, candidates: Tensor, split: Split) -> Tensor:
        """Cross-entropy of each target that is a candidate, among itself and a fixed uniform sample of the candidates."""
        if (split.target < 0).all():  # inference: nothing to find
            return query.new_zeros(0)
        place = self._target_places(split)
        rows = torch.from_numpy(np.flatnonzero(place >= 0)).to(self.device)
        target = torch.from_numpy(place[place >= 0]).to(self.device)
        sample = self._loss_sample
        logits = query[rows] @ candidates[sample].T / self.temperature
        logits.masked_fill_(sample == target[:, None], -torch.inf)
        own = (query[rows] * candidates[target]).sum(1, keepdim=True) / self.temperature
        return F.cross_entropy(torch.cat((own, logits), dim=1), torch.zeros_like(target), reduction="none")


def _top(
    query: Tensor, catalogue: Catalogue, k: int, added: ScoredAdditions | None, exclude: Exclude | None
) -> tuple[np.ndarray, np.ndarray]:
    """(scores (B, k), places (B, k)), -1 where candidates ran out."""
    if added is not None:
        return topk_with_additions(query, catalogue, k, added, exclude)
    scores, found = topk_exact(query, catalogue, k, exclude=exclude)
    return scores.cpu().numpy(), found.cpu().numpy()


def _fill(found: np.ndarray, scores: np.ndarray, rows: np.ndarray, more_scores: np.ndarray, more: np.ndarray) -> None:
    """Replace the empty places of some rows of rankings (B, k) by the best of others (rows, k) that are not in the row yet."""
    for row, extra, extra_scores in zip(rows, more, more_scores):
        empty = np.flatnonzero(found[row] < 0)
        new = np.flatnonzero((extra >= 0) & ~np.isin(extra, found[row]))[: len(empty)]
        found[row, empty[: len(new)]] = extra[new]
        scores[row, empty[: len(new)]] = extra_scores[new]


def places_found(store, split: Split, topk_ids: np.ndarray) -> Tensor:
    """(S,) int64 place of each target in rankings (S, k) of a split, counted from 1; 0 = not in it."""
    return ranks_from_topk(torch.from_numpy(topk_ids), torch.from_numpy(store.item_ids[split.target].astype(np.int64)))


def split_metrics(store, split: Split, topk_ids: np.ndarray, top_k: tuple[int, ...], score_round: int) -> dict[str, float]:
    """HR@k, NDCG@k and the competition's score of rankings (S, k) of a split."""
    metrics = RankingMetrics(list(top_k))
    weights = action_weights(torch.from_numpy(np.asarray(store.action_types[split.target])), score_round)
    metrics.update(torch.from_numpy(topk_ids), torch.from_numpy(store.item_ids[split.target].astype(np.int64)), weights)
    return metrics.compute()


def baseline_results(
    baselines: Baselines, split: Split, top_k: tuple[int, ...], score_round: int
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """({"popularity.hr@10": ...}, {"popularity": (S,) int64 ...}) of the baselines: metrics, and each target's place in its list.

    Places count from 0; -1 = not in it.
    """
    metrics, places = {}, {}
    for name, topk_ids in baselines.top_k(split, max(top_k)).items():
        for key, value in split_metrics(baselines.store, split, topk_ids, top_k, score_round).items():
            metrics[f"{name}.{key}"] = value
        places[name] = places_found(baselines.store, split, topk_ids).numpy() - 1
    return metrics, places
