"""Ranking metrics: ranks, hit rate, NDCG, the competition's score, and a bootstrap for comparing two rankers.

Must not rank, load or log anything. The score's and the rounds' weights live here and nowhere else. Sums and counts are kept in float64;
nothing is a mean of means, that of several runs apart.

Legend: B users (samples), K places of a ranking, R runs (seeds).

Definitions: one target a user; rank 1 is best; a target that is not in the list (not a candidate, removed as seen, below place K) is a
miss, counted like any other user. Equal scores are ordered by the ranker, lowest id first (retrieval.py), so no rank is an average over
ties.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from schema import CLICK, CONVERSION, EXPOSURE, NUM_ACTION_TYPES

SCORE_K = 10
SCORE_HR_WEIGHT, SCORE_NDCG_WEIGHT = 0.31, 0.69  # TAAC2025: score = 0.31 HR@10 + 0.69 NDCG@10
ROUND_2_WEIGHTS = {EXPOSURE: 0.0, CLICK: 1.0, CONVERSION: 2.5}


def ranks_from_topk(topk_ids: Tensor, target_ids: Tensor) -> Tensor:
    """Place of each target in its list, counted from 1; 0 where it is absent.

    topk_ids: (B, K) int, best first; 0 and below = empty place. target_ids: (B,) int; 0 and below = no item, always absent.
    Returns (B,) int64.
    """
    if topk_ids.ndim != 2 or target_ids.shape != topk_ids.shape[:1]:
        raise ValueError(f"ranks_from_topk: expected (B, K) and (B,), found {tuple(topk_ids.shape)} and {tuple(target_ids.shape)}.")
    if topk_ids.shape[1] == 0:
        return torch.zeros(len(topk_ids), dtype=torch.int64, device=topk_ids.device)
    hits = (topk_ids == target_ids[:, None]) & (target_ids > 0)[:, None]
    return torch.where(hits.any(1), hits.int().argmax(1) + 1, 0)  # argmax: the first of equals


def hit_rate(ranks: Tensor, k: int) -> Tensor:
    """Each user's hit at k: ranks (B,) from 1, 0 = absent -> (B,) float64, 1 or 0."""
    return ((ranks > 0) & (ranks <= k)).double()


def ndcg(ranks: Tensor, k: int) -> Tensor:
    """Each user's NDCG at k with one relevant item, 1 / log2(1 + rank): ranks (B,) from 1, 0 = absent -> (B,) float64."""
    return hit_rate(ranks, k) / torch.log2(1.0 + ranks.clamp_min(1).double())


def competition_score(hit_rate_10: float, ndcg_10: float) -> float:
    """TAAC2025's score from HR@10 and NDCG@10."""
    return SCORE_HR_WEIGHT * hit_rate_10 + SCORE_NDCG_WEIGHT * ndcg_10


def action_weights(action_types: Tensor, score_round: int) -> Tensor:
    """Weight of each target in the means: round 1 counts all alike, round 2 conversion 2.5, click 1, exposure 0.

    action_types: (B,) int, schema.py's codes, of the target events. Returns (B,) float64. ValueError for another round or code.
    """
    if score_round not in (1, 2):
        raise ValueError(f"action_weights: score_round is {score_round}; expected 1 or 2.")
    if score_round == 1:
        return torch.ones(len(action_types), dtype=torch.float64, device=action_types.device)
    codes = action_types.long()
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < NUM_ACTION_TYPES:
        raise ValueError(f"action_weights: action types {int(codes.min())} to {int(codes.max())}; expected 0 to {NUM_ACTION_TYPES - 1}.")
    table = torch.tensor([ROUND_2_WEIGHTS[code] for code in range(NUM_ACTION_TYPES)], dtype=torch.float64, device=codes.device)
    return table[codes]


class RankingMetrics:
    """Gathers ranks batch by batch; `compute` gives the metrics over all of them, `ranks` and `weights` each user's for a bootstrap."""

    def __init__(self, top_k: list[int]) -> None:
        """top_k: the k to report, each at least 1; 10 is always reported, since the score needs it."""
        if any(k < 1 for k in top_k):
            raise ValueError(f"RankingMetrics: top_k is {top_k}; expected numbers of 1 or more.")
        self.top_k = sorted({*top_k, SCORE_K})
        self._ranks: list[Tensor] = []
        self._weights: list[Tensor] = []

    def update(self, topk_ids: Tensor, target_ids: Tensor, weights: Tensor | None = None) -> None:
        """Add users: topk_ids (B, K), target_ids (B,), as in `ranks_from_topk`; weights (B,) of 0 or more, None = 1 each."""
        ranks = ranks_from_topk(topk_ids, target_ids)
        weights = torch.ones(len(ranks), dtype=torch.float64) if weights is None else weights.double()
        if weights.shape != ranks.shape or bool((weights < 0).any()):
            raise ValueError(f"RankingMetrics.update: expected {len(ranks)} weights of 0 or more, found shape {tuple(weights.shape)}.")
        self._ranks.append(ranks.cpu())
        self._weights.append(weights.cpu())

    @property
    def ranks(self) -> Tensor:
        """(users,) int64 in the order of the updates; 0 = absent."""
        return torch.cat(self._ranks) if self._ranks else torch.zeros(0, dtype=torch.int64)

    @property
    def weights(self) -> Tensor:
        """(users,) float64."""
        return torch.cat(self._weights) if self._weights else torch.zeros(0, dtype=torch.float64)

    def compute(self) -> dict[str, float]:
        """{"hr@k", "ndcg@k" for each k, "score"}: sums over users divided by their number, the score's weighted by `weights`.

        NaN where there is nothing to divide by: no user, or for the score no weight.
        """
        ranks, weights = self.ranks, self.weights
        result = {}
        for k in self.top_k:
            result[f"hr@{k}"] = _mean(hit_rate(ranks, k), torch.ones_like(weights))
            result[f"ndcg@{k}"] = _mean(ndcg(ranks, k), torch.ones_like(weights))
        result["score"] = competition_score(_mean(hit_rate(ranks, SCORE_K), weights), _mean(ndcg(ranks, SCORE_K), weights))
        return result


def _mean(values: Tensor, weights: Tensor) -> float:
    total = float(weights.sum())
    return float((values * weights).sum()) / total if total > 0 else float("nan")


def paired_bootstrap(
    a: Tensor, b: Tensor, num_samples: int = 2000, seed: int = 0, *, confidence: float = 0.95
) -> tuple[float, float, float]:
    """(mean of a - b, lower, upper end of its percentile interval) over users, and over runs where there are several.

    a, b: (B,), or (R, B) for R runs over the same users, any float dtype: two rankers' values user by user. confidence: probability.
    Users, and independently runs, are drawn with replacement, the same ones for a and b.
    """
    if a.shape != b.shape or a.ndim not in (1, 2) or a.numel() == 0:
        raise ValueError(f"paired_bootstrap: expected two equal shapes (B,) or (R, B), found {tuple(a.shape)} and {tuple(b.shape)}.")
    difference = torch.atleast_2d(a.double() - b.double()).cpu()  # (R, B)
    num_runs, num_users = difference.shape
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(num_samples, dtype=torch.float64)
    for sample in range(num_samples):
        users = torch.randint(num_users, (num_users,), generator=generator)
        runs = torch.randint(num_runs, (num_runs,), generator=generator)
        means[sample] = difference[runs].mean(0)[users].mean()
    tail = (1 - confidence) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return float(difference.mean()), low, high


def paired_interval(
    difference: np.ndarray, num_samples: int = 2000, seed: int = 0, *, confidence: float = 0.95
) -> tuple[float, float, float]:
    """`paired_bootstrap` of one run, for many users: (mean, lower, upper end) of the differences (B,) of two rankers user by user.

    Ranks give few distinct differences, and how often each is drawn is multinomial: the same distribution, without B draws a sample.
    """
    if difference.ndim != 1 or not len(difference):
        raise ValueError(f"paired_interval: expected differences (B,) of at least one user, found shape {difference.shape}.")
    means = _drawn_means(difference, num_samples, np.random.default_rng(seed))
    return float(difference.mean()), *_ends(means, confidence)


def nested_interval(
    differences: Sequence[np.ndarray], num_samples: int = 2000, seed: int = 0, *, confidence: float = 0.95
) -> tuple[float, float, float]:
    """`paired_bootstrap` of runs over users of their own: (mean, lower, upper end) of the mean of the runs' mean differences.

    differences: a run each, (B_r,) of two rankers user by user. Runs are drawn with replacement, and within each drawn run its users.
    A user of several runs counts as another one in each: where all runs have the same users, `paired_bootstrap` is right.
    """
    if not len(differences) or any(difference.ndim != 1 or not len(difference) for difference in differences):
        raise ValueError(f"nested_interval: expected (B,) of at least one user a run, found {[d.shape for d in differences]}.")
    num_runs, rng = len(differences), np.random.default_rng(seed)
    drawn = rng.integers(num_runs, size=(num_runs, num_samples))
    means = np.zeros(num_samples)
    for chosen in drawn:  # a run that is drawn twice gets other users each time
        of_runs = np.stack([_drawn_means(difference, num_samples, rng) for difference in differences])  # (R, num_samples)
        means += of_runs[chosen, np.arange(num_samples)] / num_runs
    return float(np.mean([difference.mean() for difference in differences])), *_ends(means, confidence)


def _drawn_means(difference: np.ndarray, num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """(num_samples,) means of users drawn with replacement from difference (B,)."""
    values, counts = np.unique(difference, return_counts=True)
    return rng.multinomial(len(difference), counts / len(difference), size=num_samples) @ values / len(difference)


def _ends(means: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
