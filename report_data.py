"""What the report needs of data and rankings, gathered when a run is tested and kept in report.json of its folder (some 100 kB).

Must not draw or judge. Whatever the size of the data, passes over events look at DATA_USERS users at most, and say so.

Legend: U users, S samples of the test split, C candidates, D width.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from atomic import write_text_atomic
from checkpoint import plain_json
from columns import ragged_places
from dataset import Splits, generator
from evaluate import Ranking
from report_samples import sample_users
from schema import ACTION_NAMES, NUM_ACTION_TYPES
from slices import bin_names, groups_of, quality, user_values

REPORT_DATA = "report.json"
VERSION = 1
DATA_USERS, DATA_ITEMS = 200_000, 500_000  # looked at for histograms and coverage, drawn at random where there are more
DATA_KEY = 6  # first word of a generator's key
CURVE_POINTS = 60
LENGTHS = (1, 2, 3, 6, 11, 21, 51, 101, 201, 501)  # where bins of users' lengths begin, events
GAPS = (0, 1, 60, 600, 3_600, 21_600, 86_400, 7 * 86_400, 30 * 86_400)  # seconds
GAP_NAMES = ("0 s", "<1 min", "<10 min", "<1 h", "<6 h", "<1 d", "<7 d", "<30 d", "longer")
RANKS = (0, 1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 100_000)  # where bins of 0-based ranks begin
RANK_NAMES = ("1", "≤3", "≤10", "≤30", "≤100", "≤300", "≤1k", "≤3k", "≤10k", "≤100k", ">100k")


class ReportedData(NamedTuple):
    """The data of a run, as its report sees them."""

    store: object  # store.EventStore or what is like it
    splits: Splits
    candidate_ids: np.ndarray  # (C,) ascending item ids
    counts: np.ndarray  # (num_items + 1,) training events of each item
    seed: int
    embeddings: tuple[str, ...]  # feature ids in use

    def key(self) -> str:
        """Hash of all that data_facts depends on; the store counts by its fingerprint."""
        splits = [split.num_samples for split in self.splits[:3]]
        told = [VERSION, self.store.manifest["fingerprint"], splits, self.splits.notes, self.seed, self.embeddings]
        digest = hashlib.sha256(json.dumps(told).encode())
        for numbers in (self.splits.test.target, self.candidate_ids, self.counts):
            digest.update(np.ascontiguousarray(numbers))
        return digest.hexdigest()


def write_report_data(folder: Path, data: ReportedData, ranking: Ranking) -> Path:
    """Gather and write folder/report.json. RunError when the disk is full.

    ranking: of splits.test, with target_ranks, the rows of its candidates as data.candidate_ids.
    The data's figures are taken over from the file where it has them of the same data.
    """
    store, test = data.store, data.splits.test
    is_candidate = np.zeros(store.num_items + 1, dtype=bool)
    is_candidate[data.candidate_ids] = True
    groups = groups_of(store, test, data.counts, is_candidate)
    hits, gains = user_values(ranking.topk_ids, store.item_ids[test.target])
    path = Path(folder) / REPORT_DATA
    tree = _data_part(read_json(path), data) | {
        "quality": {"slices": quality(groups, hits, gains), "ranks": rank_histogram(ranking.target_ranks)},
        "samples": sample_users(store, test, ranking, data.candidate_ids, data.counts, data.seed),
    }
    _write(path, tree)
    return path


def write_data_facts(folder: Path, data: ReportedData) -> Path:
    """folder/report.json of a run that is not tested yet: the data's figures alone. RunError when the disk is full.

    A file that has them of the same data stays as it is, with what it knows of an earlier test.
    """
    path = Path(folder) / REPORT_DATA
    there = read_json(path)
    part = _data_part(there, data)
    if not part.items() <= there.items():
        _write(path, part)
    return path


def _data_part(there: dict, data: ReportedData) -> dict:
    """What report.json says of the data: what stands `there` where that is of the same ones, else gathered."""
    head = {"version": VERSION, "fingerprint": data.store.manifest["fingerprint"], "data_key": data.key()}
    known = "data" in there and head.items() <= there.items()
    return head | {"data": there["data"] if known else plain_json(data_facts(data))}


def read_json(path: Path) -> dict:
    """The object of a JSON file; {} where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _write(path: Path, tree: dict) -> None:
    write_text_atomic(path, json.dumps(plain_json(tree), ensure_ascii=False, separators=(",", ":")) + "\n")


def rank_histogram(ranks: np.ndarray) -> dict:
    """{names, counts} of exact 0-based ranks (S,) in bins; those without a rank (-1) are counted apart."""
    known = ranks[ranks >= 0]
    counts = _histogram(known, RANKS)
    filled = max((n + 1 for n, count in enumerate(counts) if count), default=0)
    return {"names": list(RANK_NAMES[:filled]), "counts": counts[:filled], "without": int((ranks < 0).sum())}


def _histogram(values: np.ndarray, begins: tuple[int, ...]) -> list[int]:
    """How many values lie in each bin [begins[i], begins[i + 1]); the last one is open, values below the first are left out."""
    number = np.searchsorted(begins, values, side="right") - 1
    return np.bincount(number[number >= 0], minlength=len(begins)).tolist()


def data_facts(data: ReportedData) -> dict:
    """The data section's figures."""
    store, splits, candidate_ids, counts, seed, embeddings = data
    users = _some(store.num_users, DATA_USERS, seed)
    lengths = np.diff(store.user_offsets)
    target = np.asarray(store.item_ids[splits.test.target])
    is_candidate = np.isin(target, candidate_ids)
    facts = {
        "num_users": store.num_users,
        "num_items": store.num_items,
        "num_events": store.num_events,
        "rejected": store.summary.get("rejected"),
        "has_time": store.schema.has_time,
        "splits": {name: getattr(splits, name).num_samples for name in ("train", "valid", "test")},
        "notes": list(splits.notes),
        "lengths": {"names": bin_names(LENGTHS), "counts": _histogram(lengths, LENGTHS)} | _summary(lengths),
        "popularity": popularity(counts[1:]),
        "coverage": coverage(store, embeddings, seed),
        "cold": {
            "candidates": float((counts[candidate_ids] == 0).mean()) if len(candidate_ids) else None,
            "targets": float((counts[target] == 0).mean()),
            "targets_no_candidate": float((~is_candidate).mean()),
        },
        "users_looked_at": len(users),
    }
    return facts | _event_facts(store, users)


def _some(size: int, most: int, seed: int) -> np.ndarray:
    """Ascending numbers below size: all, or `most` of them drawn without replacement."""
    if size <= most:
        return np.arange(size, dtype=np.int64)
    return np.sort(generator(DATA_KEY, seed, size).choice(size, most, replace=False)).astype(np.int64)


def _summary(values: np.ndarray) -> dict:
    if not len(values):
        return {}
    low, median, high = np.quantile(values, (0.1, 0.5, 0.9))
    return {"min": int(values.min()), "p10": float(low), "median": float(median), "mean": float(values.mean()), "p90": float(high),
            "max": int(values.max())}  # fmt: skip


def _event_facts(store, users: np.ndarray) -> dict:
    """Actions, and where there are times gaps, hours and weekdays, of the events of some users, in bounded memory."""
    actions, gaps = np.zeros(NUM_ACTION_TYPES, np.int64), np.zeros(len(GAPS), np.int64)
    hours, weekdays = np.zeros(24, np.int64), np.zeros(7, np.int64)
    first, last = None, None
    for start in range(0, len(users), 20_000):
        part = users[start : start + 20_000]
        begin = np.asarray(store.user_offsets)[part]
        lengths = np.asarray(store.user_offsets)[part + 1] - begin
        events = ragged_places(begin, lengths)
        actions += np.bincount(store.action_types[events], minlength=NUM_ACTION_TYPES)
        if not store.schema.has_time or not len(events):
            continue
        times = np.asarray(store.timestamps[events])
        inner = np.ones(len(events), dtype=bool)
        inner[(np.cumsum(lengths) - lengths)[lengths > 0]] = False  # a user's first event follows none
        gaps += _histogram(np.diff(times, prepend=times[0])[inner], GAPS)
        hours += np.bincount(times // 3600 % 24, minlength=24)
        weekdays += np.bincount((times // 86_400 + 3) % 7, minlength=7)  # 1970-01-01 was a Thursday
        first, last = min(first or int(times.min()), int(times.min())), max(last or 0, int(times.max()))
    found = {"actions": dict(zip(ACTION_NAMES, actions.tolist()))}
    if store.schema.has_time:
        found |= {"gaps": {"names": list(GAP_NAMES), "counts": gaps.tolist()}, "hours": hours.tolist(), "weekdays": weekdays.tolist(),
                  "first_time": first, "last_time": last}  # fmt: skip
    return found


def popularity(counts: np.ndarray) -> dict:
    """Training events of items by rank: a curve of CURVE_POINTS (rank from 1, events), and what the most popular have of all events."""
    ordered = np.sort(counts)[::-1]
    total = max(1, int(ordered.sum()))
    ranks = np.unique(np.geomspace(1, max(1, len(ordered)), CURVE_POINTS).round().astype(np.int64))
    share = {f"top_{percent}": float(ordered[: max(1, len(ordered) * percent // 100)].sum() / total) for percent in (1, 10)}
    return {"curve": [[int(rank), int(ordered[rank - 1])] for rank in ranks], "never": int((counts == 0).sum())} | share


def coverage(store, embeddings, seed: int) -> list[dict]:
    """For each feature: the share of users or items that have a value, and its largest value; of embeddings those in use."""
    rows = []
    for side, size in (("item", store.num_items), ("user", store.num_users)):
        chosen = _some(size, DATA_ITEMS, seed) + (1 if side == "item" else 0)  # item 0 is padding
        single = store.item_single if side == "item" else store.user_single
        multi = store.item_multi if side == "item" else store.user_multi
        for column, feature in enumerate(store.schema.select(side, "single")):
            rows.append(_covered(feature, float((single[chosen, column] > 0).mean()), store.cardinalities.get(feature.id)))
        for feature in store.schema.select(side, "multi"):
            lengths = multi[feature.id].gather(chosen)[1]
            rows.append(_covered(feature, float((lengths > 0).mean()), store.cardinalities.get(feature.id)))
            rows[-1]["mean_values"] = float(lengths.mean())
    for name in embeddings:
        feature = store.schema[name]
        rows.append(
            _covered(feature, float((np.asarray(store.embedding(name).row_of_item)[1:] > 0).mean()), None) | {"width": feature.width}
        )
    return rows


def _covered(feature, share: float, largest: int | None) -> dict:
    return {"id": feature.id, "name": feature.name, "side": feature.side, "kind": feature.kind, "covered": share, "largest": largest}
