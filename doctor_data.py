"""The doctor's look at a data set: what the compilation noted, times, repeats, features, embeddings, splits, leaks, candidates.

Must not compile a store or write. Reads everything once where that is cheap, else a sample of SAMPLE_USERS users.

Legend: U users, E events, S sampled users.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from candidates import read_candidates
from columns import ragged_places
from config import Config
from dataset import counter_hash, generator, training_item_counts
from doctor_findings import FAIL, PASS, WARN, Finding, finding
from errors import UserError
from estimate import Data
from indexer import read_indexer
from machine import scratch_near
from sources import first_places, parts

SAMPLE_USERS, SAMPLE_VECTORS = 100_000, 20_000
DOCTOR_KEY = 11  # of the generator that draws them
DAY = 86_400
MILLISECONDS = 10**11  # seconds: the year 5138
EARLIEST = 631_152_000  # 1990-01-01: logs of clicks are no older
FEW_USERS = 100  # fewer make a metric that says nothing
NATURAL_LENGTH = 5  # events; shorter histories are alike by chance
# Shares from which a thing is named. They are far from what TencentGR, Amazon and MovieLens show (tests/test_doctor.py).
MUCH_COVERED, MUCH_REPEATED, MUCH_ALIKE, MUCH_ONE, MUCH_COLD, MUCH_SEEN = 0.5, 0.01, 0.01, 0.2, 0.5, 0.3
LEAK_GAIN, LEAK_SHARE = 0.3, 0.6


def check_store(config: Config, data: Data, *, kept: bool) -> Iterator[Finding]:
    """Everything that can be told from an open store. kept: it stays when the doctor is done, and its list of rejects with it."""
    store = data.store
    for what in store.mended:
        yield Finding(WARN, "data.cache", what, "copy cache folders while nothing writes there; where it comes again, try another disk")
    if not store.mended:
        yield Finding(PASS, "data.cache", "the compiled files have the hashes that were noted when they were compiled")
    yield from _noted(store, kept)
    counts = training_item_counts(store, data.splits.train)
    yield from _times(store)
    yield from _repeats(store)
    yield from _popular(counts)
    yield from _features(store)
    yield from _embeddings(store, data.embeddings)
    yield from _splits(config, data, counts > 0)
    yield from _leaks(store)


def _sample(store, least: int, key: int) -> np.ndarray:
    """(S,) users with at least so many events, ascending. key: another one draws others."""
    users = np.flatnonzero(np.diff(store.user_offsets) >= least)
    if len(users) <= SAMPLE_USERS:
        return users
    return np.sort(generator(DOCTOR_KEY, key).choice(users, SAMPLE_USERS, replace=False))


def _noted(store, kept: bool) -> Iterator[Finding]:
    """What the store's compilation said."""
    summary = store.summary
    yield Finding(PASS, "data.read", f"{store.num_users:,} users, {store.num_items:,} items, {store.num_events:,} events ({store.path})")
    rejects = Path(summary["rejects_file"] or "-")
    places = first_places(rejects) if rejects.exists() else {}
    for reason, count in summary["rejected_reasons"].items():
        first = f", first {', '.join(places[reason])}" if reason in places else ""
        listed = f"; listed in {rejects}" if kept and places else ""
        yield Finding(WARN, "data.rejected", f"{count:,} lines or rows: {reason}{first}{listed}", "mend them; else they are left out")
    if not summary["rejected"]:
        yield Finding(PASS, "data.rejected", "none")
    remedies = {
        "coerced": "mend the file, or know that the value is read so",
        "differences": "one item, one set of features: mend the records or item_feat_dict.json",
        "missing": "add what is missing, or know that its stand-in serves",
    }
    for group, remedy in remedies.items():
        for what, count in summary[group].items():
            yield Finding(WARN, f"data.{group}", f"{what}: {count:,}", remedy)
    for what, count in summary["ignored"].items():
        yield Finding(PASS, "data.ignored", f"{what}: {count:,}")
    for warning in summary["warnings"]:
        level = PASS if warning.startswith("no item_feat_dict.json") else WARN
        yield Finding(level, "data.files", warning, "" if level == PASS else "make the file again, or remove it: it is not needed")


def check_indexer(store) -> Iterator[Finding]:
    """Values of features that indexer.pkl does not know."""
    path = store.data_path / "indexer.pkl"
    if not path.exists():
        yield Finding(PASS, "data.indexer", "none; numbers serve as raw ids")
        return
    with scratch_near(store.path.parent) as scratch:
        indexer = read_indexer(path, scratch)
    beyond = []
    for _, name, values in _feature_values(store):
        most = int(values.max(initial=0))
        known = indexer.feature_max.get(name, most)
        beyond += [f"{name}: {most:,} ({known:,})"] if most > known else []
    yield finding(
        not beyond,
        WARN,
        "data.indexer",
        f"{indexer.num_items:,} items, {len(indexer.user_numbers):,} users",
        f"feature values beyond those of indexer.pkl (largest, known): {', '.join(beyond)}",
        "take the indexer.pkl of this data",
    )


def _feature_values(store) -> Iterator[tuple[str, str, np.ndarray]]:
    """(side, feature id, all its values): single-valued ones of all items or users, lists one after another; 0 = missing."""
    for side, columns, lists in (("item", store.item_single[1:], store.item_multi), ("user", store.user_single, store.user_multi)):
        for k, feature in enumerate(store.schema.select(side, "single")):
            yield side, feature.id, np.asarray(columns[:, k])
        for name, column in lists.items():
            yield side, name, column.values


def _times(store) -> Iterator[Finding]:
    check = "data.times"
    if not store.schema.has_time:
        yield Finding(PASS, check, "the schema says there are none (has_time false); time features are off")
        return
    first, last = int(store.timestamps.min()), int(store.timestamps.max())
    shown = f"{_date(first)} to {_date(last)}"
    if last >= MILLISECONDS:
        yield Finding(FAIL, check, f"up to {last}: these look like milliseconds; seconds are expected", "divide the timestamps by 1,000")
    elif last < EARLIEST:
        text = f"{first} to {last}: these look like positions, not like seconds since 1970"
        yield Finding(FAIL, check, text, 'write a schema.json with "has_time": false')
    elif last > time.time() + DAY:
        late = int((store.timestamps > time.time() + DAY).sum())
        yield Finding(WARN, check, f"{shown}; {late:,} events lie in the future", "mend the timestamps; time features are told nonsense")
    elif first < EARLIEST:
        early = int((store.timestamps < EARLIEST).sum())
        yield Finding(WARN, check, f"{shown}; {early:,} events lie before 1990", "mend the timestamps; time features are told nonsense")
    elif first == last:
        yield Finding(WARN, check, f"all events at {shown.split(' to ')[0]}", 'write a schema.json with "has_time": false')
    else:
        yield Finding(PASS, check, shown + ", in order for each user")


def _date(seconds: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds)) if 0 <= seconds < MILLISECONDS else str(seconds)


def _events_of(store, users: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(places of the events of some users, which of them begin a user (bool), events a user)."""
    begin, end = np.asarray(store.user_offsets)[users], np.asarray(store.user_offsets)[users + 1]
    lengths = end - begin
    places = ragged_places(begin, lengths)
    starts = np.zeros(len(places), dtype=bool)
    starts[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
    return places, starts, lengths


def _repeats(store) -> Iterator[Finding]:
    """Events that stand twice in a row, and histories that several users share."""
    places, starts, lengths = _events_of(store, _sample(store, 1, 0))
    items, times = store.item_ids[places], store.timestamps[places]
    if store.schema.has_time:
        again = ~starts
        again[1:] &= (
            (items[1:] == items[:-1]) & (times[1:] == times[:-1]) & (store.action_types[places][1:] == store.action_types[places][:-1])
        )
        share = float(again[1:].mean()) if len(again) > 1 else 0.0
        yield finding(
            share < MUCH_REPEATED,
            WARN,
            "data.repeated events",
            f"{share:.2%} stand twice: same user, item, time and action",
            f"{share:.1%} of the events stand twice: same user, item, time and action",
            "write each event once",
        )
    position = np.arange(len(places)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    long_enough = lengths >= NATURAL_LENGTH
    if long_enough.any():
        prints = np.add.reduceat(counter_hash(DOCTOR_KEY, items, position), np.cumsum(lengths) - lengths)[long_enough]
        alike = 1 - len(np.unique(prints)) / len(prints)
        yield finding(
            alike < MUCH_ALIKE,
            WARN,
            "data.users alike",
            f"{alike:.2%} of the users have another one's history",
            f"{alike:.1%} of the users have another one's history: a test user may be in training under another id",
            "one sequence a person; remove copies",
        )
    most = int(np.diff(store.user_offsets).max())
    share = most / store.num_events
    yield finding(
        share < MUCH_ONE or store.num_users < FEW_USERS,
        WARN,
        "data.longest user",
        f"{most:,} events",
        f"one user has {most:,} events, {share:.0%} of all",
        "is it a robot, or many people under one id?",
    )


def _popular(counts: np.ndarray) -> Iterator[Finding]:
    """counts: (items + 1,) training events of each item."""
    top = int(counts.argmax())
    share = counts[top] / max(1, counts.sum())
    yield finding(
        share < MUCH_ONE,
        WARN,
        "data.most popular item",
        f"{share:.1%} of the training events",
        f"item {top} has {share:.0%} of the training events",
        "is it a placeholder for unknown items?",
    )


def _features(store) -> Iterator[Finding]:
    """Features without values, and such as name a user or an item."""
    bare, names = [], []
    user_single = {feature.id for feature in store.schema.select("user", "single")}
    for side, name, values in _feature_values(store):
        present = values[values > 0]
        bare += [] if len(present) else [f"{side} feature {name}"]
        if side == "user" and name in user_single and len(present) > FEW_USERS and len(np.unique(present)) > 0.95 * len(present):
            names.append(f"{side} feature {name}")
    for name in bare:
        yield Finding(WARN, "data.coverage", f"{name} has no value at all", "add its values, or take it out of the schema")
    if not bare:
        yield Finding(PASS, "data.coverage", "each feature has values")
    for name in names:
        yield Finding(
            WARN,
            "data.user ids",
            f"{name} has a value of its own for nearly each user: an id in disguise",
            "take it out of the schema: it says nothing of new users",
        )


def _embeddings(store, embeddings: tuple[str, ...]) -> Iterator[Finding]:
    for name in embeddings:
        column, check = store.embedding(name), f"data.embedding {name}"
        share = float((np.asarray(column.row_of_item)[1:] > 0).mean())
        rows = generator(DOCTOR_KEY, len(column.matrix)).integers(1, max(2, len(column.matrix)), min(SAMPLE_VECTORS, len(column.matrix)))
        vectors = np.asarray(column.matrix[np.unique(rows[rows < len(column.matrix)])], dtype=np.float32)
        shown = f"{share:.0%} of the items have one, width {column.matrix.shape[1]}"
        if not share:
            yield Finding(FAIL, check, "no item has a vector: the creative ids do not match", "take the vectors of this data set")
        elif len(vectors) > 1 and float(vectors.std(axis=0).max()) < 1e-6:
            yield Finding(FAIL, check, f"{shown}; all vectors are alike", "make the vectors again; these tell items not apart")
        elif share < MUCH_COVERED:
            yield Finding(WARN, check, f"only {shown}", "add vectors, or know that a learnt one serves the other items")
        else:
            yield Finding(PASS, check, shown)


def _splits(config: Config, data: Data, trained: np.ndarray) -> Iterator[Finding]:
    """trained: (items + 1,) bool, those with training events."""
    store, splits = data.store, data.splits
    for name, split in (("validation", splits.valid), ("test", splits.test)):
        yield finding(
            split.num_samples >= FEW_USERS,
            WARN,
            f"data.{name}",
            f"{split.num_samples:,} users",
            f"{split.num_samples:,} users: the figures mean little",
            "more users, or a larger holdout_fraction",
        )
    targets = store.item_ids[splits.test.target]
    cold = float((~trained[targets]).mean())
    yield finding(
        cold < MUCH_COLD,
        WARN,
        "data.cold targets",
        f"{cold:.1%} of the test targets were never in training",
        f"{cold:.0%} of the test targets were never in training",
        "features and embeddings must find these: do the items have any?",
    )
    if config.eval.remove_seen:
        seen = _targets_seen(store, splits.test)
        yield finding(
            seen < MUCH_SEEN,
            WARN,
            "data.seen targets",
            f"{seen:.1%} of the test targets stand in the user's history",
            f"{seen:.0%} of the test targets stand in the user's history, and remove_seen takes them away",
            "remove_seen false",
        )


def _targets_seen(store, split) -> float:
    places = ragged_places(split.begin, split.end - split.begin)
    owner = np.repeat(np.arange(split.num_samples), split.end - split.begin)
    hit = store.item_ids[places] == store.item_ids[split.target][owner]
    return float((np.bincount(owner, weights=hit, minlength=split.num_samples) > 0).mean())


def _leaks(store) -> Iterator[Finding]:
    """User features that tell the last event better than the one before it: filled in after the fact."""
    users = _sample(store, 2, 1)
    if len(users) < FEW_USERS:
        yield Finding(PASS, "data.leaks", f"not looked for: {len(users):,} users with two events are too few")
        return
    last, before = (store.item_ids[np.asarray(store.user_offsets)[users + 1] - k] for k in (1, 2))
    told = [("the item", last, before)]
    for k, feature in enumerate(store.schema.select("item", "single")):
        told.append((f"item feature {feature.id}", store.item_single[last, k], store.item_single[before, k]))
    suspects = []
    for name, values in _user_values(store, users):
        for what, of_last, of_before in told:
            now, then = _told(values, of_last), _told(values, of_before)
            if now > LEAK_SHARE and now > then + LEAK_GAIN:
                suspects.append((name, what, now, then))
    for name, what, now, then in suspects:
        text = f"user feature {name} tells {what} of the last event for {now:.0%} of the users, of the event before for {then:.0%}"
        yield Finding(WARN, "data.leaks", text, f"was {name} filled in after the event? take it out of the schema")
    if not suspects:
        yield Finding(PASS, "data.leaks", f"no user feature knows the last event ({len(users):,} users looked at)")


def _user_values(store, users: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(feature id, a value for each of the users): single-valued ones, and the last value of lists."""
    for k, feature in enumerate(store.schema.select("user", "single")):
        yield feature.id, np.asarray(store.user_single[users, k])
    for name, column in store.user_multi.items():
        values, lengths = column.gather(users)
        ends = np.cumsum(lengths)
        yield name, np.where(lengths > 0, values[np.maximum(ends - 1, 0)] if len(values) else 0, 0)


def _told(values: np.ndarray, of_item: np.ndarray) -> float:
    """How often a user's value tells the item's: by being equal, or by what goes with it most often in the other half of users."""
    known = (values > 0) & (of_item > 0)
    if known.sum() < FEW_USERS:
        return 0.0
    values, of_item = values[known].astype(np.int64), of_item[known].astype(np.int64)
    same = float((values == of_item).mean()) if len(np.unique(of_item)) > 2 else 0.0
    half = np.arange(len(values)) % 2 == 0
    pairs, counts = np.unique(np.stack([values[half], of_item[half]]), axis=1, return_counts=True)
    order = np.argsort(counts, kind="stable")  # the most frequent of each value is written last
    best = np.zeros(values.max() + 1, dtype=np.int64)
    best[pairs[0, order]] = pairs[1, order]
    learnt = float((best[values[~half]] == of_item[~half]).mean())
    return max(same, learnt)


def check_candidates(config: Config, store) -> Iterator[Finding]:
    """eval.candidates, or the candidates beside the data: how many the index knows."""
    path = Path(config.eval.candidates) if config.eval.candidates != "all" else store.data_path
    beside = [store.data_path / "predict_set.jsonl", *parts(store.data_path, "candidate")]
    if config.eval.candidates == "all" and not any(file.exists() for file in beside):
        yield Finding(PASS, "data.candidates", f"all {store.num_items:,} items")
        return
    try:
        table = read_candidates(path, store.schema)
    except UserError as error:
        yield Finding(FAIL, "data.candidates", " ".join(str(error).split()))
        return
    for what, count in table.summary.items():
        if what.startswith("duplicates: "):
            yield Finding(WARN, "data.candidates", f"{what.removeprefix('duplicates: ')}: {count:,} ({path})", "list each candidate once")
    known = float((store.item_ids_of(table.creative_ids) > 0).mean())
    shown = f"{len(table.creative_ids):,} in {path}; indexer.pkl knows {known:.0%}"
    if not known:
        yield Finding(FAIL, "data.candidates", f"{shown} of them", "they belong to another data set")
    else:
        yield finding(
            known > 1 - MUCH_COLD, WARN, "data.candidates", shown, shown, "the others are cold: only features and vectors can find them"
        )
