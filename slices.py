"""Quality by slice: HR and NDCG of groups of users, by history, popularity of the target, action, hour, warm and cold.

Must not rank, write or draw; it groups what a ranking and a split say.

Legend: S samples of a split.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from dataset import Split
from metrics import SCORE_K, hit_rate, ndcg, ranks_from_topk
from schema import ACTION_NAMES

MIN_USERS = 30  # a group with fewer users is shown, but its figure says too little to be called the worst
LENGTHS = (1, 2, 6, 11, 21, 51, 101, 201)  # where groups of history lengths begin, events
POPULARITY = (1, 10, 100, 1_000, 10_000, 100_000)  # where groups of targets begin, training events of the item
HOURS = 4  # hours a group


def bin_names(begins: tuple[int, ...]) -> list[str]:
    """ "1", "2–5" ... of bins that begin at these whole numbers; the last one is open."""
    pairs = pairwise(begins)
    return [str(low) if low == high - 1 else f"{low:,}–{high - 1:,}" for low, high in pairs] + [f"{begins[-1]:,}+"]


def user_values(topk_ids: np.ndarray, target_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(HR@10, NDCG@10) of each user, float64 (S,), from rankings (S, k >= 10) and targets (S,); as metrics.py defines them."""
    ranks = ranks_from_topk(
        torch.from_numpy(np.asarray(topk_ids, dtype=np.int64)), torch.from_numpy(np.asarray(target_ids, dtype=np.int64))
    )
    return hit_rate(ranks, SCORE_K).numpy(), ndcg(ranks, SCORE_K).numpy()


def groups_of(store, split: Split, item_counts: np.ndarray, is_candidate: np.ndarray) -> dict[str, tuple[list[str], np.ndarray]]:
    """{slice: (names of its groups, group number of each sample (S,), -1 = none)} of a split with targets.

    item_counts (num_items + 1,): each item's training events. is_candidate (num_items + 1,) bool.
    """
    target = np.asarray(store.item_ids[split.target], dtype=np.int64)
    counts = item_counts[target]
    result = {"history length": (["0", *bin_names(LENGTHS)], np.searchsorted(LENGTHS, split.end - split.begin, side="right"))}
    warm = np.where(counts > 0, 0, 1)
    result["target"] = (["warm", "cold", "no candidate"], np.where(is_candidate[target], warm, 2))
    result["target popularity"] = (bin_names(POPULARITY), np.searchsorted(POPULARITY, counts, side="right") - 1)
    result["action"] = (list(ACTION_NAMES), np.asarray(store.action_types[split.target], dtype=np.int64))
    if store.schema.has_time:
        names = [f"{hour:02d}–{hour + HOURS - 1:02d} h UTC" for hour in range(0, 24, HOURS)]
        result["hour of the target"] = (names, np.asarray(store.timestamps[split.target]) // 3600 % 24 // HOURS)
    return result


def quality(groups: dict[str, tuple[list[str], np.ndarray]], hits: np.ndarray, gains: np.ndarray) -> list[dict]:
    """[{slice, group, num_users, hr@10, ndcg@10, ndcg_error}] of the groups that have users, in order.

    hits, gains: HR@10 and NDCG@10 of each user (S,). ndcg_error: standard error of the mean, null for a single user.
    """
    rows = []
    for slice_name, (names, number) in groups.items():
        for n, group in enumerate(names):
            mine = number == n
            users = int(mine.sum())
            if users:
                error = float(gains[mine].std(ddof=1) / np.sqrt(users)) if users > 1 else None
                rows.append({"slice": slice_name, "group": group, "num_users": users, "hr@10": float(hits[mine].mean()),
                             "ndcg@10": float(gains[mine].mean()), "ndcg_error": error})  # fmt: skip
    return rows


def worst(rows: list[dict], most: int = 3, min_users: int = MIN_USERS) -> list[dict]:
    """The groups with the lowest NDCG@10 among those with enough users, where their slice has several such groups."""
    enough = [row for row in rows if row["num_users"] >= min_users]
    slices = [row["slice"] for row in enough]
    return sorted((row for row in enough if slices.count(row["slice"]) > 1), key=lambda row: row["ndcg@10"])[:most]
