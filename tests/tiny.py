"""A store in memory for unit tests: the attributes of store.Store that other modules read, without files."""

from types import SimpleNamespace

import numpy as np

from schema import Feature, Schema


class Ragged:
    """RaggedColumn's interface over a list of lists."""

    def __init__(self, rows):
        self.rows = rows

    def gather(self, rows):
        lists = [self.rows[int(r)] for r in rows]
        return np.array([v for values in lists for v in values], dtype=np.int32), np.array([len(v) for v in lists], dtype=np.int64)


class Strings(list):
    def take(self, index):
        return [self[int(i)] for i in index]


SCHEMA = Schema(
    (
        Feature("colour", "item", "single"),
        Feature("tags", "item", "multi"),
        Feature("age", "user", "single"),
        Feature("likes", "user", "multi"),
        Feature("81", "item", "embedding", width=4),
    )
)


def tiny_store(num_users=12, num_items=20, min_events=3, max_events=9, seed=0, has_time=True, sequences=None):
    """Random users with sorted times, two item features, two user features and one embedding."""
    random = np.random.default_rng(seed)
    if sequences is None:
        sequences = [random.integers(1, num_items + 1, random.integers(min_events, max_events + 1)).tolist() for _ in range(num_users)]
    num_users = len(sequences)
    counts = np.array([len(s) for s in sequences])
    num_events = int(counts.sum())
    times = np.concatenate([1_700_000_000 + np.cumsum(random.integers(1, 90_000, n)) if has_time else np.arange(n) for n in counts])
    rows = np.concatenate([[0], np.where(random.random(num_items) < 0.8, np.arange(1, num_items + 1), 0)])
    rows[rows > 0] = np.arange(1, (rows > 0).sum() + 1)
    matrix = random.normal(size=(rows.max() + 1, 4)).astype(np.float16)
    matrix[0] = 0
    colour = random.integers(0, 4, (num_items + 1, 1)).astype(np.int32)
    colour[0] = 0
    column = SimpleNamespace(row_of_item=rows.astype(np.int32), matrix=matrix)
    return SimpleNamespace(
        schema=SCHEMA if has_time else Schema(SCHEMA.features, has_time=False),
        kind="train",
        num_users=num_users,
        num_items=num_items,
        num_known_items=num_items,
        num_events=num_events,
        user_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        item_ids=np.array([i for s in sequences for i in s], dtype=np.int32),
        action_types=random.integers(0, 2, num_events).astype(np.int8),
        timestamps=times.astype(np.int64),
        user_ids=np.arange(1, num_users + 1),
        item_single=colour,
        item_multi={"tags": Ragged([[]] + [sorted(set(random.integers(1, 6, random.integers(0, 4)).tolist())) for _ in range(num_items)])},
        user_single=random.integers(0, 5, (num_users, 1)).astype(np.int32),
        user_multi={"likes": Ragged([random.integers(1, 4, random.integers(0, 3)).tolist() for _ in range(num_users)])},
        cardinalities={"colour": 3, "tags": 5, "age": 4, "likes": 3},
        raw_item_ids=np.arange(num_items + 1, dtype=np.uint64) + 1000,
        raw_user_ids=Strings(f"user_{u}" for u in range(1, num_users + 1)),
        embedding=lambda i: column,
        has_embedding=lambda i: i == "81",
        manifest={"fingerprint": "tiny"},
        summary={},
    )


# meta.json's keys of a checkpoint that no trainer wrote.
META = {
    "config": {}, "schema": {}, "layout": [], "embeddings": [], "num_items": 0, "num_users": 0, "num_events": 0, "item_ids": "",
    "store": "", "epoch": 0, "metrics": {}, "torch": "2.13.0",
}  # fmt: skip
