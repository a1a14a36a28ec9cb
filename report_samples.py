"""Sample users of a tested run: history, the top 10, what came next, and why the answers are near.

Must not draw; gives plain values for report.json. "Near" is the cosine of item vectors, and the feature values that two items share.

Legend: S samples, C candidates, D width, Q items whose neighbours are sought.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dataset import Split, generator
from evaluate import Ranking

SAMPLES_KEY = 7  # first word of a generator's key
NUM_EACH = 4  # users of each kind: found in the top 10, in the top 100, farther off
HISTORY, TOP = 20, 10  # events and answers that are kept
NEIGHBOURS = 5
MAX_HISTORY = 500  # newest events among which the one nearest to an answer is sought
NEIGHBOUR_CHUNK = 1 << 16  # candidates compared at once
MAX_VALUES = 8  # of a multi-valued feature


def sample_users(store, split: Split, ranking: Ranking, candidate_ids: np.ndarray, counts: np.ndarray, seed: int) -> dict:
    """{"users": [...], "items": {item id: raw id, training events, features}} of about 3 x NUM_EACH users of a split.

    ranking: of that split. candidate_ids (C,) ascending: the items of ranking.candidates. counts (num_items + 1,): training events.
    """
    vectors = _Vectors(ranking.candidates, candidate_ids)
    chosen = choose(ranking.target_ranks, seed)
    target = store.item_ids[split.target]
    first, aims = ranking.topk_ids[chosen, 0], target[chosen]
    near = vectors.neighbours(np.unique(np.concatenate([first, aims])))
    users = [_user(store, split, ranking, vectors, near, int(sample)) for sample in chosen]
    shown = sorted({item for user in users for item in _items_of(user)})
    return {"users": users, "items": {str(item): describe_item(store, item, counts) for item in shown}}


def choose(ranks: np.ndarray, seed: int) -> np.ndarray:
    """Sample numbers: NUM_EACH whose target is in the top 10, in the top 100, and farther off, each drawn at random."""
    order = generator(SAMPLES_KEY, seed).permutation(len(ranks))
    kinds = ((0, 10), (10, 100), (100, np.iinfo(np.int64).max))
    kept = [order[(ranks[order] >= low) & (ranks[order] < high)][:NUM_EACH] for low, high in kinds]
    none = order[ranks[order] < 0][:1]  # one whose target is no candidate, where there is one
    return np.concatenate([*kept, none]).astype(np.int64)


class _Vectors:
    """Unit vectors of candidates by item id."""

    def __init__(self, candidates: Tensor, candidate_ids: np.ndarray) -> None:
        self.candidates, self.ids = candidates, candidate_ids

    def of(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(unit vectors (Q, D) float32, which items are candidates (Q,) bool); zeros for the others."""
        place = np.minimum(np.searchsorted(self.ids, items), len(self.ids) - 1)
        known = self.ids[place] == items
        rows = self.candidates[torch.from_numpy(place).to(self.candidates.device)].float().cpu().numpy()
        norms = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        return rows / norms * known[:, None], known

    def neighbours(self, items: np.ndarray) -> dict[int, list[list]]:
        """{item: [[item, cosine] ...]} of the NEIGHBOURS candidates nearest to each, itself left out; no entry without a vector."""
        queries, known = self.of(items)
        queries = torch.from_numpy(queries).to(self.candidates.device)  # (Q, D)
        best = torch.full((len(items), NEIGHBOURS + 1), -2.0, device=queries.device)
        index = torch.zeros_like(best, dtype=torch.int64)
        for start in range(0, len(self.ids), NEIGHBOUR_CHUNK):
            part = torch.nn.functional.normalize(self.candidates[start : start + NEIGHBOUR_CHUNK].float(), dim=1)
            scores = torch.cat((best, queries @ part.T), 1)
            places = torch.arange(start, start + len(part), device=index.device).expand(len(items), -1)
            best, chosen = scores.topk(NEIGHBOURS + 1, dim=1)
            index = torch.cat((index, places), 1).gather(1, chosen)
        rows = zip(items.tolist(), known.tolist(), self.ids[index.cpu().numpy()].tolist(), best.cpu().tolist())
        return {
            item: [[other, round(cosine, 4)] for other, cosine in zip(others, cosines) if other != item and cosine > -2][:NEIGHBOURS]
            for item, has_vector, others, cosines in rows
            if has_vector
        }


def _user(store, split: Split, ranking: Ranking, vectors: _Vectors, near: dict, sample: int) -> dict:
    begin, end, target = (int(getattr(split, name)[sample]) for name in ("begin", "end", "target"))
    events = range(max(begin, end - HISTORY), end)
    past = np.unique(store.item_ids[max(begin, end - MAX_HISTORY) : end]).astype(np.int64)
    top = ranking.topk_ids[sample, :TOP]
    top, scores = top[top > 0], ranking.topk_scores[sample, :TOP][top > 0]
    goal = int(store.item_ids[target])
    return {
        "user": store.raw_user_ids.take(np.array([split.users[sample]]))[0],
        "features": _user_features(store, int(split.users[sample])),
        "num_events": end - begin,
        "history": [_event(store, event) for event in events],
        "next": _event(store, target),
        "rank": int(ranking.target_ranks[sample]),
        "top": [{"item": int(i), "score": float(s)} | because for i, s, because in zip(top, scores, _because(store, vectors, top, past))],
        "near_next": near.get(goal, []),
        "near_first": near.get(int(top[0]), []) if len(top) else [],
    }


def _event(store, event: int) -> dict:
    time = int(store.timestamps[event]) if store.schema.has_time else None
    return {"item": int(store.item_ids[event]), "action": int(store.action_types[event]), "time": time}


def _because(store, vectors: _Vectors, answers: np.ndarray, past: np.ndarray) -> list[dict]:
    """For each answer: the item of the history that is nearest to it, the cosine, and the feature values that both have."""
    (ours, _), (theirs, known) = vectors.of(answers), vectors.of(past)
    if not known.any():
        return [{"nearest": None, "cosine": None, "shared": []} for _ in answers]
    cosines = np.where(known[None], ours @ theirs.T, -2.0)  # (answers, past)
    nearest = cosines.argmax(1)
    return [
        {"nearest": int(past[n]), "cosine": round(float(cosines[row, n]), 4), "shared": shared(store, int(answer), int(past[n]))}
        for row, (answer, n) in enumerate(zip(answers, nearest))
    ]


def item_features(store, item: int) -> dict[str, list[int]]:
    """{feature id: its values} of an item; features without a value are left out."""
    found = {f.id: [int(store.item_single[item, n])] for n, f in enumerate(store.schema.select("item", "single"))}
    found |= {f.id: store.item_multi[f.id].gather(np.array([item]))[0].tolist() for f in store.schema.select("item", "multi")}
    return {name: values for name, values in found.items() if any(values)}


def _user_features(store, user: int) -> dict[str, list[int]]:
    found = {f.id: [int(store.user_single[user, n])] for n, f in enumerate(store.schema.select("user", "single"))}
    found |= {f.id: store.user_multi[f.id].gather(np.array([user]))[0].tolist() for f in store.schema.select("user", "multi")}
    return {name: values[:MAX_VALUES] for name, values in found.items() if any(values)}


def shared(store, one: int, other: int) -> list[list]:
    """[[feature id, value] ...] that two items have in common."""
    if one == other:
        return []
    ours, theirs = item_features(store, one), item_features(store, other)
    return [[name, value] for name, values in ours.items() for value in values[:MAX_VALUES] if value in theirs.get(name, ())]


def describe_item(store, item: int, counts: np.ndarray) -> dict:
    """raw id, training events and features of an item, as JSON holds them."""
    raw = store.raw_item_ids[item]
    features = {name: values[:MAX_VALUES] for name, values in item_features(store, item).items()}
    return {"raw": str(raw), "count": int(counts[item]), "features": features}


def _items_of(user: dict) -> list[int]:
    rows = [event["item"] for event in [*user["history"], user["next"]]] + [answer["item"] for answer in user["top"]]
    rows += [answer["nearest"] for answer in user["top"] if answer["nearest"] is not None]
    return rows + [item for name in ("near_next", "near_first") for item, _ in user[name]]
