"""Sizes worked out from counts: what numpy takes in counting, baselines and ranking, and how large tables and stores of a shape get.

Each formula is held to the real function by a test. Must not allocate what it speaks of.

Legend: U users, I items, E events, C candidates, B queries.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from baselines import MAX_QUANTILE_SAMPLE
from dataset import Split, iterate_events
from features import ITEM_ID, USER_ID, TableLayout
from retrieval import CPU_BLOCK, CUDA_BLOCK, MAX_GROUP, MAXIMA_BYTES, SUSPECTS
from schema import Schema
from store_files import array_bytes
from transitions import COUNTED_AT_ONCE, WINDOW, most_successors

TRANSITION_BYTES = 88  # measured: of a pair while transitions.count_transitions sorts them, where no two are alike
SAMPLED_USERS = 20_000  # whose events tell how often the baselines' items occur
PAIR_BYTES, LIST_BYTES = 66, 520  # measured: of a pair while baselines.successors sorts them; of an item's list, an object of its own


def ranking_bytes(num_candidates: int, num_queries: int, low: bool, device: str) -> tuple[float, ...]:
    """retrieval.topk_exact's temporaries: maxima of groups, a block of scores, the table of suspects, the shortlist."""
    scores = num_queries * (2 if low else 4)
    maxima = num_candidates / 16 * scores
    maxima = max(min(maxima, MAXIMA_BYTES), maxima * 16 / MAX_GROUP)
    block = min((CPU_BLOCK if device == "cpu" else CUDA_BLOCK) / num_queries, num_candidates + 256) * scores
    return maxima, maxima / 4, block, SUSPECTS, 16_000 * num_queries


def counting_bytes(store, split: Split) -> int:
    """dataset.training_item_counts: counts of the items, and the events of some users at a time with their places and items."""
    chunk, lengths = iterate_events.__defaults__[0], split.end - split.begin
    events = [int(lengths[start : start + chunk].sum()) for start in range(0, split.num_samples, chunk)]
    counts = 8 * (store.num_items + 1)
    # A chunk's places are made in two arrays while the chunk before is held (places and items); bincount copies its items.
    return counts + max(max(16 * now + 12 * before, 20 * now + counts) for before, now in pairwise([0, *events]))


def recent_bytes(store, split: Split) -> int:
    """baselines.recent_item_counts: a sample of times, sorted in a copy; then the counts."""
    if not store.schema.has_time:
        return counting_bytes(store, split)  # at most: it counts a tenth of the events
    events = int((split.end - split.begin).sum())
    sample = 8 * (events // max(1, -(-events // MAX_QUANTILE_SAMPLE)))
    return sample + max(sample, counting_bytes(store, split))


def successor_bytes(store, train: Split, test: Split) -> int:
    """baselines.successors: pairs of an event and the next one, where the former is a test user's last item; sorted and counted.

    How many there are is told by a sample of the users; that no two pairs are alike is the worst case.
    """
    wanted = np.zeros(store.num_items + 1, dtype=bool)
    wanted[store.item_ids[np.maximum(test.end[test.end > test.begin] - 1, 0)]] = True
    sample = train.take(np.arange(0, train.num_samples, -(-train.num_samples // SAMPLED_USERS)))
    seen = np.concatenate([wanted[items] for items, _ in iterate_events(store, sample)])
    pairs = int(seen.mean() * (train.end - train.begin).sum())
    return len(wanted) + max(counting_bytes(store, train) + 8 * pairs, PAIR_BYTES * pairs, 24 * pairs + LIST_BYTES * int(wanted.sum()))


def transition_bytes(store, split: Split) -> tuple[int, int]:
    """transitions.count_transitions: (what is kept and saved, what counting takes) where no two pairs are alike, the worst case."""
    pairs = int((split.end - split.begin).sum()) * WINDOW
    kept = 8 * (store.num_items + 2) + 8 * min(pairs, most_successors(store.num_items) * store.num_items)
    return kept, max(counting_bytes(store, split), TRANSITION_BYTES * min(pairs, COUNTED_AT_ONCE))


def map_bytes(store, embeddings: tuple[str, ...]) -> dict[str, int]:
    """{file: bytes} of the store's maps."""
    found = {name: array_bytes(spec) for name, spec in store.manifest["arrays"].items()}
    for name in embeddings:
        column = store.embedding(name)
        found |= {f"emb_{name}/matrix": column.matrix.nbytes, f"emb_{name}/row_of_item": column.row_of_item.nbytes}
    return found


def table_bytes(layout: TableLayout) -> int:
    """Of the joint table, float32."""
    return sum(4 * (part.end - part.begin) * part.width for part in layout.parts)


def layout_of(schema: Schema, config, *, users: int, items: int, cardinalities: dict[str, int] | None = None) -> TableLayout:
    """The joint table of a data set of this shape. config: the model group of the settings.

    cardinalities: {feature id: values} where they are not the schema's.
    """
    known = {feature.id: feature.cardinality for feature in schema.features} | (cardinalities or {})
    sizes = [(ITEM_ID, "item", "single", items)]
    for side in ("item", "user"):
        sizes += [(USER_ID, "user", "single", users)] if side == "user" and config.user_id else []
        sizes += [(f.id, side, kind, known[f.id]) for kind in ("single", "multi") for f in schema.select(side, kind)]
    return TableLayout.from_sizes(sizes, config)


def store_bytes(
    schema: Schema,
    *,
    users: int,
    items: int,
    events: int,
    values: float = 2.0,
    name: float = 20.0,
    embeddings: dict[str, float] | None = None,
) -> dict[str, int]:
    """{part: bytes} of the store of a data set of this shape.

    values: of a multi-valued feature, mean. name: bytes of a raw user id, mean. embeddings: {feature id: share of the items that have one}.
    Creative ids are taken to be numbers.
    """
    num = {(side, kind): len(schema.select(side, kind)) for side in ("user", "item") for kind in ("single", "multi")}
    parts = {
        "events": (4 + 1 + 8) * events,
        "users": (8 + 8) * users + 4 * num["user", "single"] * users + num["user", "multi"] * (8 + 4 * values) * users,
        "raw user ids": (8 + name) * users,
        "items": 4 * num["item", "single"] * items + num["item", "multi"] * (8 + 4 * values) * items,
        "creative ids": 8 * items,
    }
    for feature, share in (embeddings or {}).items():
        parts[f"embedding {feature}"] = (4 + 2 * schema[feature].width * share) * items
    return {part: int(num_bytes) for part, num_bytes in parts.items()}
