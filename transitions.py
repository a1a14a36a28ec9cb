"""Item-to-item transition counts: what followed what in training, a second voice beside the model's vectors when candidates are ranked.

Where most items have a handful of events, two that met in a few histories are told apart from chance by counting better than by vectors
that were trained on the same few events; a model that also knows the sequence is right elsewhere, so the two add up. (Interpolating a
neural model with a memory of its training data: Grave, Joulin and Usunier 2017; Khandelwal et al. 2020.)

Counts: C[i, j] = sum over pairs of events (i, then j, g places later, 1 <= g <= WINDOW, in one user's training events) of DECAY^(g - 1),
and A[i, j] = C[i, j] / sqrt(sum over j of C[i, j]): between plain counts, which follow popular items, and shares, which believe one event.
A user's affinity to j: a(u, j) = sum over the last RECENT events h, p places from the end (p = 0, 1, ...), of DECAY^p A[h, j].
The score that is ranked: vectors' inner product + temperature * weight * log(1 + SHARPNESS a(u, j)).
WINDOW, DECAY, RECENT and SHARPNESS were chosen on Beauty's validation (experiments/2026-11-28-transitions.md).

Exact: the addition is never negative, so whatever is in a user's top k and has no addition is in the vectors' top k too; those k and the
items with an addition are all that need ranking.

Must not know splits, metrics or models.

Legend: I items, N pairs kept, B queries, C candidates, D width, P pairs of query and candidate with an addition.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from columns import ragged_places
from dataset import Split, iterate_events, training_item_counts
from retrieval import Catalogue, Exclude, pair_scores, rank_targets, rough_pair_scores, topk_exact

WINDOW = 8  # places between two events that are counted as a pair
RECENT = 8  # events at the end of a history that are asked what follows them
DECAY = 0.5  # a pair one place farther apart, or an event one place farther back, counts half
SHARPNESS = 10.0
MOST = 128  # successors kept of an item, those with the largest counts; fewer where there are many items:
MAX_PAIRS = 20_000_000  # kept of all items (one an item at least): 160 MB in memory and in each checkpoint, and 8 bytes an item
COUNTED_AT_ONCE = 1 << 24  # pairs: about 1.5 GB while they are sorted, where no two are alike
PREFIX = "transitions."  # of the names in a checkpoint's state


class Transitions(NamedTuple):
    """The successors of item i and A[i, .] of them are items, affinity [offsets[i] : offsets[i + 1]], the largest first."""

    offsets: np.ndarray  # (I + 2,) int64
    items: np.ndarray  # (N,) int32
    affinity: np.ndarray  # (N,) float32

    def to_state(self) -> dict[str, Tensor]:
        """As tensors to stand beside a model's weights in a checkpoint."""
        return {f"{PREFIX}{name}": torch.from_numpy(array) for name, array in self._asdict().items()}


class Additions(NamedTuple):
    """What is added to some candidates' scores, all above 0; no pair of query and candidate twice, in order of query, then candidate."""

    rows: np.ndarray  # (P,) int64 query
    places: np.ndarray  # (P,) int64 candidate
    values: np.ndarray  # (P,) float32

    def at(self, index: np.ndarray) -> Additions:
        return Additions(*(array[index] for array in self))

    def of(self, rows: np.ndarray) -> Additions:
        """Those of some queries (ascending), which are numbered anew."""
        keep = np.isin(self.rows, rows)
        return Additions(np.searchsorted(rows, self.rows[keep]), self.places[keep], self.values[keep])


class ScoredAdditions(NamedTuple):
    """Additions with bounds on the scores of their pairs."""

    added: Additions
    rough: np.ndarray  # (P,) float32 inner products
    error: np.ndarray  # (P,) float64: so far, at most, may the exact score be from `rough`, and exact score + addition from their sum


def from_state(state: Mapping[str, Tensor]) -> Transitions | None:
    """The counts of a checkpoint's state; None where it holds none. ValueError where they do not fit together."""
    if f"{PREFIX}offsets" not in state:
        return None
    found = Transitions(*(state[f"{PREFIX}{name}"].cpu().numpy() for name in Transitions._fields))
    offsets, items, affinity = found
    if [(array.ndim, array.dtype) for array in found] != [(1, np.int64), (1, np.int32), (1, np.float32)]:
        raise ValueError("transitions.offsets, .items and .affinity are not int64, int32 and float32 of one dimension")
    whole = len(offsets) >= 2 and offsets[0] == 0 and offsets[-1] == len(items) == len(affinity)
    if not whole or (np.diff(offsets) < 0).any() or (len(items) and not 0 < items.min() <= items.max() < len(offsets) - 1):
        raise ValueError("transitions.offsets, .items and .affinity do not fit together")
    if not (np.isfinite(affinity) & (affinity > 0)).all():
        raise ValueError("transitions.affinity holds numbers that are not above 0")
    return found


def without(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's state without the counts: the model's own weights."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(PREFIX)}


# ---- counting -----------------------------------------------------------------------------------------------------------


def count_transitions(store, split: Split) -> Transitions:
    """Transitions between the split's events, in bounded memory: as many passes over the events as the pairs need."""
    pairs = training_item_counts(store, split).cumsum() * WINDOW
    ends = np.flatnonzero(np.diff(pairs // COUNTED_AT_ONCE, append=-1)) + 1  # ranges of items, a pass each
    most = most_successors(store.num_items)
    parts = [_count(store, split, begin, end, most) for begin, end in zip([0, *ends[:-1].tolist()], ends.tolist())]
    counts, items, affinity = map(np.concatenate, zip(*parts))
    return Transitions(np.concatenate([[0], counts.cumsum()]), items, affinity)


def most_successors(num_items: int) -> int:
    """How many are kept of an item."""
    return int(np.clip(MAX_PAIRS // max(1, num_items), 1, MOST))


def _count(store, split: Split, begin: int, end: int, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the items begin .. end - 1: (how many successors of each are kept, the successors, A of them)."""
    base = store.num_items + 1
    keys, weights, held = [], [], 0
    for items, events in iterate_events(store, split):
        firsts = np.flatnonzero((items >= begin) & (items < end))
        sample = np.searchsorted(split.begin, events[firsts], side="right") - 1  # split.begin ascends
        left = split.end[sample] - events[firsts]  # events of the sample from there on
        for gap in range(1, WINDOW + 1):
            firsts, left = firsts[left > gap], left[left > gap]
            keys.append((items[firsts].astype(np.int64) - begin) * base + items[firsts + gap])
            weights.append(np.full(len(firsts), DECAY ** (gap - 1), dtype=np.float32))
            held += len(firsts)
        if held > COUNTED_AT_ONCE:  # an item with more pairs than that
            keys, weights = ([part] for part in _summed(keys, weights))
            held = len(keys[0])
    key, total = _summed(keys, weights)
    before, after = key // base, key % base
    of_item = np.bincount(before, weights=total, minlength=end - begin)
    best = np.lexsort((after, -total, before))
    before, after, total = before[best], after[best], total[best]
    first = np.flatnonzero(np.diff(before, prepend=-1))
    place = np.arange(len(before)) - np.repeat(first, np.diff(first, append=len(before)))
    before, after, total = before[place < most], after[place < most], total[place < most]
    counts = np.bincount(before, minlength=end - begin)
    return counts, after.astype(np.int32), (total / np.sqrt(of_item[before])).astype(np.float32)


def _summed(keys: list[np.ndarray], weights: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(keys, each once and ascending, float64 sums of their weights)."""
    key, weight = np.concatenate(keys), np.concatenate(weights)
    order = np.argsort(key, kind="stable")
    key, weight = key[order], weight[order]
    starts = np.flatnonzero(np.diff(key, prepend=-1))
    if not len(starts):
        return key, weight.astype(np.float64)
    return key[starts], np.add.reduceat(weight.astype(np.float64), starts)


# ---- ranking ------------------------------------------------------------------------------------------------------------


def additions(counts: Transitions, store, split: Split, place: np.ndarray, scale: float) -> Additions:
    """scale * log(1 + SHARPNESS a(u, j)) of the split's samples (B,) and the candidates that their last events were followed by.

    place: (items + 1,) int64 of each item among the candidates, -1 = it is none; items that the counts do not know have no successors.
    """
    lengths = np.minimum(split.end - split.begin, RECENT)
    recent = store.item_ids[ragged_places(split.end - lengths, lengths)].astype(np.int64)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    back = np.repeat(lengths.cumsum(), lengths) - 1 - np.arange(len(owner))  # places from the end
    known = recent < len(counts.offsets) - 1
    recent, owner, back = recent[known], owner[known], back[known]
    begin = counts.offsets[recent]
    successors = counts.offsets[recent + 1] - begin
    entries = ragged_places(begin, successors)
    items = counts.items[entries]
    candidate = np.where(items < len(place), place[np.minimum(items, len(place) - 1)], -1)
    share = counts.affinity[entries] * np.repeat(DECAY**back, successors)  # float64
    rows = np.repeat(owner, successors)
    rows, candidate, share = rows[candidate >= 0], candidate[candidate >= 0], share[candidate >= 0]
    width = max(1, len(place))
    pairs, which = np.unique(rows * width + candidate, return_inverse=True)
    affinity = np.bincount(which, weights=share, minlength=len(pairs))
    values = (scale * np.log1p(SHARPNESS * affinity)).astype(np.float32)
    keep = values > 0
    return Additions(pairs[keep] // width, pairs[keep] % width, values[keep])


def without_excluded(added: Additions, exclude: Exclude | None, num_candidates: int) -> Additions:
    """The additions to pairs that may be ranked. exclude: as in `topk_exact`."""
    if exclude is None:
        return added
    offsets, index = (tensor.cpu().numpy() for tensor in exclude)
    excluded = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)) * num_candidates + index
    return added.at(~np.isin(added.rows * num_candidates + added.places, excluded))


def roughly_scored(query: Tensor, catalogue: Catalogue, added: Additions) -> ScoredAdditions:
    """The additions with what the rankings below ask of all pairs: exact scores (float64, hundreds of pairs a query) are for the few."""
    pairs = (torch.from_numpy(array).to(query.device) for array in (added.rows, added.places))
    rough, error = (tensor.cpu().numpy() for tensor in rough_pair_scores(query, catalogue, *pairs))
    error = error[added.rows]
    # And the rounding of their sum, to which the scores' own error belongs.
    return ScoredAdditions(added, rough, error + 2.0**-23 * (np.abs(rough) + added.values + error))


def topk_with_additions(
    query: Tensor, catalogue: Catalogue, k: int, scored: ScoredAdditions, exclude: Exclude | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """As `topk_exact`, of inner product + addition, summed in float32: (scores (B, k) float32, index (B, k) int64); ties: lowest index.

    scored: additions to none of the excluded pairs (`without_excluded`).
    """
    num_candidates = len(catalogue.item_emb)
    plain, found = (tensor.cpu().numpy() for tensor in topk_exact(query, catalogue, k, exclude=exclude))
    added = scored.added
    # An addition is above 0: with or without it, the k-th of the plain scores is a bound on the k-th best.
    added = added.at(scored.rough + added.values + scored.error >= plain[added.rows, k - 1])
    rows = np.concatenate([np.repeat(np.arange(len(plain)), k)[found.reshape(-1) >= 0], added.rows])
    places = np.concatenate([found[found >= 0], added.places])
    scores = np.concatenate([plain[found >= 0], _scores(query, catalogue, added.rows, added.places) + added.values])
    order = np.lexsort((-scores, places, rows))  # of a pair that came twice the one with its addition stays
    rows, places, scores = rows[order], places[order], scores[order]
    once = np.diff(rows * num_candidates + places, prepend=-1) != 0
    rows, places, scores = rows[once], places[once], scores[once]
    order = np.lexsort((places, -scores, rows))
    rows, places, scores = rows[order], places[order], scores[order]
    counts = np.bincount(rows, minlength=len(plain))
    rank = np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)
    best = rank < k
    plain[:], found[:] = -np.inf, -1
    plain[rows[best], rank[best]], found[rows[best], rank[best]] = scores[best], places[best]
    return plain, found


def rank_with_additions(
    query: Tensor, catalogue: Catalogue, target: np.ndarray, scored: ScoredAdditions, exclude: Exclude | None = None
) -> np.ndarray:
    """As `rank_targets`, in the ranking of `topk_with_additions`: (B,) int64. target: (B,) int64 place, -1 = none."""
    added, rows = scored.added, np.flatnonzero(target >= 0)
    own = np.zeros(len(target), dtype=np.float32)
    own[rows] = _scores(query, catalogue, rows, target[rows])
    mine = added.places == target[added.rows]
    own[added.rows[mine]] += added.values[mine]
    device = query.device
    ranks = rank_targets(
        query, catalogue, torch.from_numpy(target).to(device), exclude=exclude, own=torch.from_numpy(own).to(device)
    ).cpu().numpy()  # fmt: skip
    others, plain, error = added.at(~mine), scored.rough[~mine], scored.error[~mine]
    limit = own[others.rows]
    close = (np.abs(plain - limit) <= error) | (np.abs(plain + others.values - limit) <= error)
    plain[close] = _scores(query, catalogue, others.rows[close], others.places[close])
    lower = others.places < target[others.rows]
    before, after = ((score > limit) | ((score == limit) & lower) for score in (plain, plain + others.values))
    moved = np.bincount(others.rows, weights=after.astype(np.int64) - before, minlength=len(target)).astype(np.int64)
    return np.where(ranks >= 0, ranks + moved, ranks)


def _scores(query: Tensor, catalogue: Catalogue, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(P,) float32 inner products of pairs, those of `topk_exact`."""
    pairs = (torch.from_numpy(array).to(query.device) for array in (rows, places))
    return pair_scores(query, catalogue, *pairs).cpu().numpy()
