"""Non-personal and item-to-item rankers that any model has to beat: popularity, most recent, item-to-item.

Fitted on training events only; ranked under the same candidates and the same removal of seen items as the model.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dataset import Split, iterate_events, training_item_counts

RECENT_SHARE = 0.1  # "recent" counts items in this latest share of the training events
MAX_QUANTILE_SAMPLE = 20_000_000  # timestamps looked at to find where the latest share begins


def recent_item_counts(store, split: Split) -> np.ndarray:
    """Item counts (num_items + 1,) in the latest tenth of the training events: by time, or by place from the end without times."""
    if store.schema.has_time:
        stride = -(-int((split.end - split.begin).sum()) // MAX_QUANTILE_SAMPLE)
        sample = np.concatenate([store.timestamps[events[::stride]] for _, events in iterate_events(store, split)])
        rank = int((1.0 - RECENT_SHARE) * len(sample))
        since = np.partition(sample, rank)[rank]
        counts = np.zeros(store.num_items + 1, dtype=np.int64)
        for items, events in iterate_events(store, split):
            counts += np.bincount(items[store.timestamps[events] >= since], minlength=len(counts))
        return counts
    lengths = split.end - split.begin
    # Users that are at least p long have a p-th event from the end: take whole places until they hold a tenth of the events.
    users_with = np.bincount(lengths)[::-1].cumsum()[::-1][1:]
    places = 1 + int(np.searchsorted(users_with.cumsum(), RECENT_SHARE * lengths.sum()))
    return training_item_counts(store, split._replace(begin=np.maximum(split.begin, split.end - places)))


def successors(store, split: Split, items: np.ndarray) -> dict[int, np.ndarray]:
    """For each of `items`: what followed it in the training events, most often first, ties by lowest id."""
    wanted = np.zeros(store.num_items + 1, dtype=bool)
    wanted[items] = True
    pairs = []
    for ids, events in iterate_events(store, split):
        follows = np.flatnonzero(wanted[ids[:-1]])
        # split.begin ascends: an event that begins a sample follows nothing
        place = np.minimum(np.searchsorted(split.begin, events[follows + 1]), split.num_samples - 1)
        follows = follows[split.begin[place] != events[follows + 1]]
        pairs.append(ids[follows].astype(np.int64) * (store.num_items + 1) + ids[follows + 1])
    keys, counts = np.unique(np.concatenate(pairs) if pairs else np.zeros(0, np.int64), return_counts=True)
    before, after = keys // (store.num_items + 1), keys % (store.num_items + 1)
    order = np.lexsort((after, -counts, before))
    before, after = before[order], after[order]
    first = np.flatnonzero(np.diff(before, prepend=-1))
    return dict(zip(before[first].tolist(), np.split(after, first[1:])))


class Baselines:
    """The three rankers for one set of candidates."""

    def __init__(self, store, train: Split, candidate_ids: np.ndarray, remove_seen: bool) -> None:
        self.store, self.train, self.candidate_ids, self.remove_seen = store, train, np.sort(candidate_ids), remove_seen
        self._is_candidate = np.zeros(store.num_items + 1, dtype=bool)
        self._is_candidate[candidate_ids] = True
        self._popular = self._by_count(training_item_counts(store, train))
        self._recent = self._by_count(recent_item_counts(store, train))

    def _by_count(self, counts: np.ndarray) -> np.ndarray:
        """All candidates, most counted first, ties by lowest id."""
        return self.candidate_ids[np.argsort(-counts[self.candidate_ids], kind="stable")]

    def top_k(self, split: Split, k: int) -> dict[str, np.ndarray]:
        """{"popularity" | "recent" | "item2item": (S, k) item ids, 0 where candidates ran out} for the samples of a split."""
        last = np.where(split.end > split.begin, self.store.item_ids[np.maximum(split.end - 1, 0)], 0).astype(np.int64)
        following = successors(self.store, self.train, np.unique(last[last > 0]))
        lists: dict[str, Callable[[int], list[np.ndarray]]] = {
            "popularity": lambda row: [self._popular],
            "recent": lambda row: [self._recent, self._popular],
            "item2item": lambda row: [following.get(int(last[row]), self._popular[:0]), self._popular],
        }
        result = {name: np.zeros((split.num_samples, k), dtype=np.int64) for name in lists}
        for row in range(split.num_samples):
            seen = set(self.store.item_ids[split.begin[row] : split.end[row]].tolist()) if self.remove_seen else set()
            for name, of_row in lists.items():
                chosen = self._first_allowed(of_row(row), seen, k)
                result[name][row, : len(chosen)] = chosen
        return result

    def _first_allowed(self, rankings: list[np.ndarray], seen: set[int], k: int) -> list[int]:
        """The first k items of the rankings, one after the other, that are candidates, not seen and not taken."""
        chosen: list[int] = []
        for ranking in rankings:
            for start in range(0, len(ranking), 64):  # a few dozen places nearly always suffice
                for item in ranking[start : start + 64].tolist():
                    if item not in seen and self._is_candidate[item] and item not in chosen:
                        chosen.append(item)
                        if len(chosen) == k:
                            return chosen
        return chosen
