"""Turns users of a store into batches of ids: splits, order of samples, negatives, background loading.

Knows nothing of torch.nn, of feature values or of models. Every random choice is a function of counters
(seed, epoch, sample, position, draw), so that any number of workers gives the same batches.

Legend: B users of a batch, N tokens of all its users (packed, no padding), Q of them query tokens, M unique items, K negatives
a query token, C shared candidates. A user's tokens are: the user token, then the events of the window, oldest first.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from typing import NamedTuple

import numpy as np
import torch

import kernels
from columns import distinct, ragged_places
from errors import UserError
from schema import CLICK

SPLIT_KEY, ORDER_KEY, SHARED_NEGATIVES_KEY = 1, 2, 3  # first word of a generator's key: one stream for each purpose
MAX_DRAWS = 32  # of a negative, before one in the user's history stays


class Split(NamedTuple):
    """Samples of one split: for sample s the events [begin[s], end[s]) of the store, and where its target lies.

    Training: each of the last max_seq_length + 1 events is a target once an epoch; earlier ones count for popularity only. Evaluation:
    the events are the input, `target` the event to find. See ShortSamples for training samples of few targets.
    """

    users: np.ndarray  # (S,) int64 index into the store's users
    begin: np.ndarray  # (S,) int64 first event
    end: np.ndarray  # (S,) int64 one past the last event
    # (S,) int64 event to predict; in training the first one that is, -1 where all of the window are. -1 where it is unknown, too.
    target: np.ndarray

    def take(self, index: np.ndarray) -> Split:
        return Split(*(column[index] for column in self))

    @property
    def num_samples(self) -> int:
        return len(self.users)

    def lengths(self) -> np.ndarray:
        """(S,) events of each sample."""
        return self.end - self.begin


class ShortSamples:
    """A training split whose users are taken apart: a sample has few targets, the last of its events, and the events before them.

    An epoch has the same targets as with a sample a user, each encoded once, but a batch is of more users and a user's targets are of
    several batches, each with its own dropout. With one target a sample this is the augmentation by prefixes of Tan, Xu, Liu, "Improved
    recurrent neural networks for session-based recommendations", DLRS 2016.

    Samples are made when they are asked for: 8 bytes a user are kept.
    """

    def __init__(self, split: Split, max_targets: int, targets_per_sample: int) -> None:
        """max_targets: of a user, the last ones."""
        self._split, self._most, self._size = split, max_targets, targets_per_sample
        self._ends = np.cumsum(-(-self._counts(split) // targets_per_sample))

    def _counts(self, split: Split) -> np.ndarray:
        return np.minimum(split.lengths(), self._most)

    @property
    def num_samples(self) -> int:
        return int(self._ends[-1])

    def take(self, index: np.ndarray) -> Split:
        """The samples of these numbers: those of the first user first, ascending in time; a user's first one may have fewer targets."""
        row = np.searchsorted(self._ends, index, side="right")
        users = self._split.take(row)
        end = users.end - self._size * (self._ends[row] - index - 1)
        return users._replace(end=end, target=np.maximum(end - self._size, users.end - self._counts(users)))

    def lengths(self) -> np.ndarray:
        """(S,) events of each sample, its targets among them."""
        counts = self._counts(self._split)
        samples = -(-counts // self._size)
        later = np.repeat(samples, samples) - ragged_places(np.zeros_like(samples), samples) - 1
        return np.repeat(self._split.lengths(), samples) - self._size * later


def training_samples(targets_per_sample: int, split: Split, max_seq_length: int) -> Split | ShortSamples:
    """What is trained on of a split, by the setting data.targets_per_sample."""
    return ShortSamples(split, max_seq_length + 1, targets_per_sample) if targets_per_sample else split


class Splits(NamedTuple):
    train: Split
    valid: Split
    test: Split
    notes: list[str]  # what was left out of evaluation, and why


class Batch(NamedTuple):
    """Ids of one batch; all tensors int64 and packed over the users' valid tokens (only attention needs a padded grid)."""

    users: torch.Tensor  # (B,) index into the store's users
    lengths: torch.Tensor  # (B,) tokens a user, the user token included
    owner: torch.Tensor  # (N,) row in `users` of each token
    positions: torch.Tensor  # (N,) place in the user's sequence; 0 = the user token
    item_index: torch.Tensor  # (N,) the input item as index into unique_ids; 0 at user tokens
    action_types: torch.Tensor  # (N,) action of the input event + 1; 0 at user tokens
    timestamps: torch.Tensor  # (N,) seconds; 0 at user tokens
    query_tokens: torch.Tensor  # (Q,) tokens whose queries are wanted, the last ones of each user; (0,) = all N
    target_index: torch.Tensor  # (Q,) next item as index into unique_ids; (0,) in evaluation
    target_actions: torch.Tensor  # (Q,) action type of the target event, 0..2; (0,) in evaluation
    negative_index: torch.Tensor  # (Q, K) negatives of each target as index into unique_ids; empty unless drawn for each
    candidate_index: torch.Tensor  # (C,) shared candidates as index into unique_ids; (0,) unless shared
    unique_ids: torch.Tensor  # (M,) item ids ascending; unique_ids[0] = 0, the padding item
    max_length: int  # tokens of the longest user, known on the host so that no device has to be asked
    max_queries: int  # query tokens of the user with most of them, likewise

    def querying(self) -> torch.Tensor:
        """(Q,) int64 tokens whose queries are wanted: in training each predicts a target, in evaluation they are the users' last."""
        return self.query_tokens if self.query_tokens.numel() else torch.arange(len(self.owner), device=self.owner.device)


class NegativeSampling(NamedTuple):
    """Which negatives a training batch carries.

    kind: "position" (K uniform items a token, outside the user's training history), "shared" (the batch's own
    targets, when in_batch, and num_negatives uniform items), or "all" (every item of the catalogue).
    max_in_batch: the targets of so many tokens, drawn without replacement, stand for all of the batch's; 0 = all.
    num_popular: further items of "shared", drawn with the probabilities whose running sum is `popular`.
    """

    kind: str
    num_negatives: int
    in_batch: bool = True
    max_in_batch: int = 0
    num_popular: int = 0
    popular: np.ndarray | None = None  # (num_items + 1,) float64


def make_splits(store, *, protocol: str, holdout_fraction: float, target: str, seed: int, max_eval_users: int = 0) -> Splits:
    """Split a store for training, validation and test.

    protocol: "holdout" (a share of the users, halved into validation and test, never trained on) or "leave_one_out"
    (last event = test, last but one = validation). target: "last" or "last_click" (holdout only).
    Raises UserError where a split would be empty.
    """
    begin, end = np.asarray(store.user_offsets[:-1]), np.asarray(store.user_offsets[1:])
    users = np.arange(store.num_users, dtype=np.int64)
    notes: list[str] = []
    if protocol == "leave_one_out":
        long_enough = end - begin >= 3
        if short := int((~long_enough).sum()):
            notes.append(f"{short:,} users with fewer than 3 events are trained on and not evaluated")
        train = Split(users, begin, np.where(long_enough, end - 2, end), np.full_like(users, -1))
        chosen = users[long_enough]
        valid = Split(chosen, begin[chosen], end[chosen] - 2, end[chosen] - 2)
        test = Split(chosen, begin[chosen], end[chosen] - 1, end[chosen] - 1)
    else:
        order = generator(SPLIT_KEY, seed).permutation(store.num_users)
        num_held = max(2, round(store.num_users * holdout_fraction))
        held, kept = np.sort(order[:num_held]), np.sort(order[num_held:])
        train = Split(kept, begin[kept], end[kept], np.full_like(kept, -1))
        half = np.isin(held, order[: num_held // 2], assume_unique=True)
        valid, test = (
            _held_out(store, held[mask], begin, end, target, name, notes) for mask, name in ((half, "validation"), (~half, "test"))
        )
    train = train.take(np.flatnonzero(train.end > train.begin))
    for name, split in (("training", train), ("validation", valid), ("test", test)):
        if not split.num_samples:
            raise UserError(
                f"the {name} split is empty: {store.num_users:,} users, protocol {protocol}, target {target}.\n"
                "Give more users, a larger eval.holdout_fraction, or another eval.protocol."
            )
    if max_eval_users:
        valid, test = (_subset(split, max_eval_users, seed, notes, name) for split, name in ((valid, "validation"), (test, "test")))
    return Splits(train, valid, test, notes)


def _held_out(store, users: np.ndarray, begin: np.ndarray, end: np.ndarray, target: str, name: str, notes: list[str]) -> Split:
    """Held-out users with their last event (or last click) as target and all that came before as input."""
    position = end[users] - 1
    if target == "last_click":
        position = np.full(len(users), -1, dtype=np.int64)
        for row, user in enumerate(users):  # held-out users only, once a run
            clicks = np.flatnonzero(store.action_types[begin[user] : end[user]] == CLICK)
            if len(clicks):
                position[row] = begin[user] + clicks[-1]
    usable = position >= begin[users]
    if skipped := int((~usable).sum()):
        notes.append(
            f"{skipped:,} of {len(users):,} {name} users have no {'click' if target == 'last_click' else 'event'} and are not evaluated"
        )
    users, position = users[usable], position[usable]
    return Split(users, begin[users], position, position)


def _subset(split: Split, most: int, seed: int, notes: list[str], name: str) -> Split:
    if split.num_samples <= most:
        return split
    notes.append(f"max_eval_users: {most:,} of {split.num_samples:,} {name} users are evaluated")
    return split.take(np.sort(generator(SPLIT_KEY, seed, split.num_samples).permutation(split.num_samples)[:most]))


def predict_split(store) -> Split:
    """Every user of a store with all events as input and no known target (inference)."""
    users = np.arange(store.num_users, dtype=np.int64)
    return Split(users, np.asarray(store.user_offsets[:-1]), np.asarray(store.user_offsets[1:]), np.full_like(users, -1))


def generator(*key: int) -> np.random.Generator:
    """A generator that depends on the integers of `key` alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([int(word) & (2**64 - 1) for word in key])))


def counter_hash(*words: np.ndarray | int) -> np.ndarray:
    """A vectorised counter-based random number: uint64 of broadcast integers (the finaliser of SplitMix64, once a word).

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    state = np.zeros(np.broadcast_shapes(*(np.shape(word) for word in words)), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            state = (state ^ np.asarray(word).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


class _Tokens(NamedTuple):
    """Columns (N,) of a batch's tokens; items as ids first, then as index into the batch's unique ids."""

    owner: np.ndarray
    positions: np.ndarray
    items: np.ndarray
    actions: np.ndarray
    times: np.ndarray


def _at(tokens: _Tokens, index: np.ndarray) -> _Tokens:
    """The tokens of these numbers; without any, all."""
    return _Tokens(*(column[index] for column in tokens)) if len(index) else tokens


def _batch(
    users: np.ndarray, lengths: np.ndarray, unique: np.ndarray, tokens: _Tokens, queries: np.ndarray, **training: np.ndarray
) -> Batch:
    """A batch from numpy columns; what only training has is empty without it. queries: (Q,) the query tokens; (0,) = all."""
    nothing = np.zeros(0, dtype=np.int64)
    columns = {name: nothing for name in ("target_index", "target_actions", "candidate_index")} | {"query_tokens": queries}
    columns |= {"negative_index": nothing.reshape(0, 0)} | training
    columns |= {"users": users, "lengths": lengths, "owner": tokens.owner, "positions": tokens.positions, "unique_ids": unique}
    columns |= {"item_index": tokens.items, "action_types": tokens.actions, "timestamps": tokens.times}
    tensors = {name: torch.from_numpy(column.astype(np.int64, copy=False)) for name, column in columns.items()}
    longest = int(lengths.max())
    most = int((lengths[tokens.owner[queries]] - tokens.positions[queries]).max()) if len(queries) else longest
    return Batch(**tensors, max_length=longest, max_queries=most)


def _owner_and_positions(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For users of `lengths` tokens: each token's user row and its place in the user's sequence, both (N,) int64."""
    return np.repeat(np.arange(len(lengths), dtype=np.int64), lengths), ragged_places(np.zeros(len(lengths), dtype=np.int64), lengths)


def _window(store, split: Split, most: int) -> tuple[np.ndarray, _Tokens, np.ndarray]:
    """Training tokens of each sample's last `most` events: (lengths (B,), tokens, the item that each predicts (N,)), all int64."""
    if fast := kernels.compiled():
        events = (store.item_ids, np.int32), (store.action_types, np.int8), (store.timestamps, np.int64)
        arrays = (kernels.contiguous(array, dtype) for array, dtype in events)
        lengths, owner, positions, items, targets, actions, times = fast.window_tokens(split.begin, split.end, most, *arrays)
        return lengths, _Tokens(owner, positions, items, actions, times), targets
    lengths = np.minimum(split.end - split.begin, most)
    events = ragged_places(split.end - lengths, lengths)  # (N,) event that each token predicts
    owner, positions = _owner_and_positions(lengths)
    first = positions == 0  # the user tokens
    previous = np.maximum(events - 1, 0)
    tokens = _Tokens(
        owner,
        positions,
        items=np.where(first, 0, store.item_ids[previous]).astype(np.int64),
        actions=np.where(first, 0, store.action_types[previous].astype(np.int64) + 1),
        times=np.where(first, 0, store.timestamps[previous]),
    )
    return lengths, tokens, store.item_ids[events].astype(np.int64)


class TrainingOrder:
    """Which samples form which batch of an epoch: a function of (seed, epoch) alone; each sample once an epoch.

    With length buckets, neighbours in length share a batch (less padding in attention), and the batches are shuffled.
    """

    def __init__(self, split: Split | ShortSamples, batch_size: int, seed: int, max_seq_length: int, length_buckets: bool) -> None:
        self.num_samples, self.batch_size, self.seed = split.num_samples, batch_size, seed
        self._lengths = np.minimum(split.lengths(), max_seq_length + 1) if length_buckets else None
        self._epoch, self._order, self._batches = -1, np.zeros(0, np.int64), np.zeros(0, np.int64)

    @property
    def num_batches(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def start_epoch(self, epoch: int) -> None:
        random = generator(ORDER_KEY, self.seed, epoch)
        order = random.permutation(self.num_samples)
        batches = np.arange(self.num_batches)
        if self._lengths is not None:
            pool = 64 * self.batch_size  # samples sorted together; larger pools would make batches alike from epoch to epoch
            pools = np.arange(len(order)) // pool
            order = order[np.lexsort((self._lengths[order], pools))]
            batches = random.permutation(self.num_batches)
        self._epoch, self._order, self._batches = epoch, order, batches

    def samples(self, batch: int) -> np.ndarray:
        """Sample numbers of the epoch's batch number `batch`."""
        first = int(self._batches[batch]) * self.batch_size
        return self._order[first : first + self.batch_size]


class BatchBuilder:
    """Builds batches of ids from a store and a split; safe to call from several threads."""

    def __init__(
        self, store, split: Split | ShortSamples, max_seq_length: int, seed: int = 0, negatives: NegativeSampling | None = None
    ) -> None:
        self.store, self.split, self.max_seq_length, self.seed, self.negatives = store, split, max_seq_length, seed, negatives

    def _deduplicate(self, *arrays: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Unique ids (M,) int64, ascending, 0 always the first, and each array as places in them."""
        flat = np.concatenate([array.reshape(-1).astype(np.int32, copy=False) for array in arrays])
        found = distinct(flat, self.store.num_items + 1)
        ends = np.cumsum([array.size for array in arrays])[:-1]
        unique = np.concatenate([np.zeros(1, dtype=np.int64), found.keys])
        return unique, [part.reshape(array.shape) for part, array in zip(np.split(found.rank, ends), arrays)]

    def training(self, samples: np.ndarray, epoch: int, step: int) -> Batch:
        """A training batch: every event of the window is a target, predicted from the user token and the window's events before it; of a
        sample with a target, that and those after it.

        samples: (B,) sample numbers. `step` numbers the batch within the epoch; shared negatives depend on it.
        """
        split = self.split.take(samples)
        lengths, tokens, targets = _window(self.store, split, self.max_seq_length + 1)
        events, querying = ragged_places(split.end - lengths, lengths), np.zeros(0, dtype=np.int64)
        if split.target[0] >= 0:
            querying = np.flatnonzero(events >= np.repeat(split.target, lengths))
            events, targets = events[querying], targets[querying]
        negatives, shared = self._draw_negatives(split, samples, _at(tokens, querying), targets, epoch, step)
        if self.negatives is not None and self.negatives.kind == "all":
            unique = np.arange(self.store.num_items + 1, dtype=np.int64)
            target_index, candidates = targets, unique[1:]
        else:
            unique, (items, target_index, negatives, shared) = self._deduplicate(tokens.items, targets, negatives, shared)
            tokens, candidates = tokens._replace(items=items), np.unique(shared)
        return _batch(split.users, lengths, unique, tokens, querying, target_index=target_index,
                      target_actions=self.store.action_types[events], negative_index=negatives, candidate_index=candidates)  # fmt: skip

    def evaluation(self, samples: np.ndarray) -> Batch:
        """An evaluation batch: the user token and the last max_seq_length input events; the query is each user's last token."""
        split, store = self.split.take(samples), self.store
        counts = np.minimum(split.end - split.begin, self.max_seq_length)
        lengths = counts + 1
        owner, positions = _owner_and_positions(lengths)
        events = ragged_places(split.end - counts, counts)
        items, actions, times = (np.zeros(len(owner), dtype=np.int64) for _ in range(3))
        items[positions > 0] = store.item_ids[events]
        actions[positions > 0] = store.action_types[events].astype(np.int64) + 1
        times[positions > 0] = store.timestamps[events]
        unique, (item_index,) = self._deduplicate(items)
        return _batch(split.users, lengths, unique, _Tokens(owner, positions, item_index, actions, times), np.cumsum(lengths) - 1)

    def _draw_negatives(
        self, split: Split, samples: np.ndarray, tokens: _Tokens, targets: np.ndarray, epoch: int, step: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(negatives of each target (T, K), items that all share (C,)). tokens: those that predict them (T,)."""
        nothing = np.zeros((len(targets), 0), dtype=np.int64), np.zeros(0, dtype=np.int64)
        if self.negatives is None or self.negatives.kind == "all":
            return nothing
        if self.negatives.kind == "shared":
            random = generator(SHARED_NEGATIVES_KEY, self.seed, epoch, step)
            uniform = random.integers(1, self.store.num_items + 1, self.negatives.num_negatives)
            drawn, most = [uniform], self.negatives.max_in_batch
            if self.negatives.in_batch:
                drawn.append(random.choice(targets, most, replace=False) if 0 < most < len(targets) else targets)
            if self.negatives.num_popular:
                drawn.append(np.searchsorted(self.negatives.popular, random.random(self.negatives.num_popular), side="right"))
            return nothing[0], np.concatenate(drawn)
        if fast := kernels.compiled():
            item_ids, rows = kernels.contiguous(self.store.item_ids, np.int32), kernels.contiguous(samples, np.int64)
            token = split.begin, split.end, tokens.owner, tokens.positions, rows
            state = counter_hash(self.seed, epoch)[()]
            drawn = fast.draw_negatives(item_ids, *token, self.negatives.num_negatives, self.store.num_items, state, MAX_DRAWS)
            return drawn, nothing[1]
        drawn = uniform_negatives(
            sample_of_token=tokens.owner,
            samples=samples,
            position=tokens.positions,
            num_negatives=self.negatives.num_negatives,
            num_items=self.store.num_items,
            history=_history_keys(self.store, split),
            seed=self.seed,
            epoch=epoch,
        )
        return drawn, nothing[1]


def _history_keys(store, split: Split) -> np.ndarray:
    """Sorted keys row * (num_items + 1) + item of every training event of a batch's users (window or not)."""
    counts = split.end - split.begin
    items = store.item_ids[ragged_places(split.begin, counts)].astype(np.int64)
    return np.sort(np.repeat(np.arange(len(counts), dtype=np.int64), counts) * (store.num_items + 1) + items)


def uniform_negatives(
    *,
    sample_of_token: np.ndarray,
    samples: np.ndarray,
    position: np.ndarray,
    num_negatives: int,
    num_items: int,
    history: np.ndarray,
    seed: int,
    epoch: int,
    max_draws: int = MAX_DRAWS,
) -> np.ndarray:
    """Uniform items (N, K) outside each user's history, by rejection; draw d of a token is a hash of (seed, epoch, sample, position, k, d).

    history: sorted keys of `_history_keys`. Where max_draws draws all fall into the history (a user who has seen nearly
    everything), the last draw stays: there is hardly a negative to be had.
    """
    row = np.repeat(sample_of_token, num_negatives)
    words = (
        np.repeat(samples[sample_of_token], num_negatives),
        np.repeat(position, num_negatives),
        np.tile(np.arange(num_negatives), len(position)),
    )
    drawn = np.zeros(len(row), dtype=np.int64)
    todo = np.arange(len(row))
    for draw in range(max_draws):
        drawn[todo] = 1 + (counter_hash(seed, epoch, *(word[todo] for word in words), draw) % np.uint64(num_items)).astype(np.int64)
        keys = row[todo] * (num_items + 1) + drawn[todo]
        place = np.minimum(np.searchsorted(history, keys), len(history) - 1)
        todo = todo[history[place] == keys]
        if not len(todo):
            break
    return drawn.reshape(len(position), num_negatives)


def training_item_counts(store, split: Split) -> np.ndarray:
    """How often each item occurs among the split's events: (num_items + 1,) int64, in bounded memory."""
    counts = np.zeros(store.num_items + 1, dtype=np.int64)
    for items, _ in iterate_events(store, split):
        counts += np.bincount(items, minlength=len(counts))
    return counts


def iterate_events(store, split: Split, chunk_users: int = 50_000) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks of the split's events, sample by sample: (item ids int32, event numbers int64)."""
    for start in range(0, split.num_samples, chunk_users):
        begin, end = split.begin[start : start + chunk_users], split.end[start : start + chunk_users]
        events = ragged_places(begin, end - begin)
        yield store.item_ids[events], events


class Prefetcher:
    """Makes results ahead in background threads.

    num_workers: 0 makes them in the caller. depth: results held ready at most. spare: the threads take only the time that the cores have
    to spare (Linux' SCHED_IDLE); for a caller that works on all cores itself and waits for the slowest. A result that is PATIENCE seconds
    late is then made by the caller, and the MAX_LATE'th puts an end to it: others leave the threads no time.
    At the baseline's setting a step took 20.2 ms beside a thread of the usual priority, 18.5 so (2 cores, medians of nine turns).
    """

    PATIENCE, MAX_LATE = 0.25, 3

    def __init__(self, num_workers: int, depth: int, spare: bool = False) -> None:
        self.num_workers, self.depth, self.spare, self._num_late = num_workers, depth, spare, 0

    def __call__(self, build: Callable[[int], object], numbers: Iterable[int]) -> Iterator[object]:
        """build(number), a function of its number, for each in order. An error in a thread is raised where its result is due."""
        if self.num_workers == 0:
            yield from map(build, numbers)
            return
        kernels.compiled()  # a thread's threads are of its kind: numba's import must not wait for spare time
        waiting: deque[tuple[int, Future]] = deque()
        with ExitStack() as pools:
            spare, pool = self.spare, self._pool(pools)
            for number in numbers:
                waiting.append((number, pool.submit(build, number)))
                if len(waiting) > max(self.depth, self.num_workers):
                    yield self._due(build, *waiting.popleft())
                if spare and not self.spare:
                    cancelled = [future.cancel() for _, future in waiting]
                    spare, pool = False, self._pool(pools)
                    waiting = deque((n, pool.submit(build, n) if again else f) for (n, f), again in zip(waiting, cancelled))
            while waiting:
                yield self._due(build, *waiting.popleft())

    def _due(self, build: Callable[[int], object], number: int, made: Future) -> object:
        if self.spare and not wait([made], self.PATIENCE).done:
            self._num_late += 1
            self.spare = self._num_late < self.MAX_LATE
            return build(number)
        return made.result()

    def _pool(self, pools: ExitStack) -> ThreadPoolExecutor:
        pool = ThreadPoolExecutor(self.num_workers, "batch", initializer=_take_spare_time if self.spare else None)
        pools.callback(pool.shutdown, wait=True, cancel_futures=True)
        return pool


def _take_spare_time() -> None:
    """For this thread, and for good: without privileges there is no way back."""
    with suppress(AttributeError, OSError):  # not Linux; forbidden
        os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))
