"""What the items of the planted world look like: features and multimodal vectors as functions of their hidden place.

Must not write files or know of layouts.
Legend: M items, F single-valued item features.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planted import EMPTY_FEATURES, SUBS_A_CLUSTER, World, mix, stream
from schema import TENCENT_GR, Feature

ITEM_SINGLE = tuple(f.id for f in TENCENT_GR.select("item", "single"))
PAIR, CAMPAIGN = 2, 52  # neighbours in birth order that share a value of 121 and 122, as in TencentGR's cardinalities
VECTOR_INNER = 32
COLD_FEATURES = 1 << 30  # a chunk of the stream "cold" that no users have
PIECE_NUMBERS = 1 << 21  # of a piece of vectors


def cardinalities(world: World) -> dict[str, int]:
    """The largest value of each item feature, in ITEM_SINGLE's order: few-valued ones as in TencentGR, others scaled to the items."""
    found = {}
    for name in ITEM_SINGLE:
        full = TENCENT_GR[name].cardinality
        found[name] = full if full < 100 else min(full, max(20, world.num_items // 40))
    sizes = np.diff(world.sub_start)
    found["121"], found["122"] = (int((sizes // step + 1).sum()) for step in (PAIR, CAMPAIGN))
    found["102"] = max(20, round(0.019 * world.num_items))
    return found


def item_features(world: World) -> np.ndarray:
    """(M + cold + 1, F) int32 in ITEM_SINGLE's order, row 0 zeros; 0 = missing; negative = a value unseen in training (cold items only).

    115, 117, 118, 102: the sub-cluster (118 one of 4 of it, 102 one of 16); 100, 101, 112: the cluster; 119, 120: sub-cluster or
    cluster with the day of birth; 121, 122: 2 and 52 neighbours in birth order; 114, 116: noise.
    """
    random = stream(world.seed, "features")
    sub, offset = world.sub_of.astype(np.int64), world.offset_of.astype(np.int64)
    sizes, cluster, rows = np.diff(world.sub_start), sub // SUBS_A_CLUSTER, np.arange(len(sub))
    day = offset * 30 // np.maximum(1, sizes[sub])
    sources = {"100": cluster, "101": cluster, "112": cluster, "115": sub, "117": sub, "118": sub * 4 + mix(rows, 3).astype(np.int64) % 4,
               "102": sub * 16 + (mix(rows, 2) % np.uint64(16)).astype(np.int64), "119": sub * 31 + day, "120": cluster * 31 + day,
               "114": rows, "116": rows}  # fmt: skip
    noise = {"100": 0.1, "101": 0.1, "112": 0.2, "115": 0.05, "117": 0.1}
    missing = {"112": 0.05, "114": 0.08, "116": 0.08, "118": 0.05, "119": 0.05}
    unseen = {"121": 0.7, "122": 0.3, "102": 0.3}
    table = np.zeros((len(sub), len(ITEM_SINGLE)), dtype=np.int32)
    num_cold = world.num_cold
    cold = stream(world.seed, "cold", COLD_FEATURES)
    for column, (name, size) in enumerate(cardinalities(world).items()):
        if name in ("121", "122"):
            step = PAIR if name == "121" else CAMPAIGN
            first = np.concatenate([[0], np.cumsum(sizes // step + 1)])
            table[:, column] = 1 + first[sub] + offset // step
        else:
            table[:, column] = 1 + (mix(sources[name], int(name)) % np.uint64(size)).astype(np.int64)
        for generator, part in ((random, table[: world.num_items + 1, column]), (cold, table[world.num_items + 1 :, column])):
            if name in noise:
                wrong = np.flatnonzero(generator.random(len(part), dtype=np.float32) < noise[name])
                part[wrong] = generator.integers(1, size + 1, len(wrong))
            if name in missing:
                part[generator.random(len(part), dtype=np.float32) < missing[name]] = 0
        strange = world.num_items + 1 + np.flatnonzero(cold.random(num_cold) < unseen.get(name, 0.01))
        table[strange, column] = -strange
    empty = np.concatenate([random.random(world.num_items + 1), cold.random(num_cold)]) < EMPTY_FEATURES
    empty[:2] = True  # item 1 has no features: the case exists at any size
    table[empty] = 0
    return table


def embedding_pieces(world: World, feature: Feature, *, cold: bool = False) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Vectors of one multimodal feature, of the known or of the cold items, in item order.

    Yields (item ids (n), vectors (n, width) float32 that float16 holds exactly, item ids that are listed without a vector). A vector is the
    centre of its cluster, of its sub-cluster, a path that the sub-cluster takes over time, and noise; wider ones are a fixed projection
    of VECTOR_INNER numbers.
    """
    number, inner = int(feature.id), VECTOR_INNER
    random = stream(world.seed, "embedding", number)
    centres = random.normal(0, 1.0, (world.num_subs // SUBS_A_CLUSTER + 1, inner)).astype(np.float32)
    sub_centres, cosine, sine = (random.normal(0, s, (world.num_subs, inner)).astype(np.float32) for s in (0.8, 0.5, 0.5))
    project = None if feature.width == inner else random.normal(0, inner**-0.5, (inner, feature.width)).astype(np.float32)
    coverage = 0.38 if feature.id in ("85", "86") else 0.87
    size = max(1024, PIECE_NUMBERS // feature.width)
    sizes = np.diff(world.sub_start)
    begin, end = (world.num_items + 1, len(world.sub_of)) if cold else (1, world.num_items + 1)
    for first in range(begin, end, size):
        random = stream(world.seed, "embedding", 1000 * first + number)
        ids = np.arange(first, min(first + size, end))
        chance = random.random(len(ids))
        noise = random.standard_normal((len(ids), inner), dtype=np.float32)
        kept = chance < coverage
        sub = world.sub_of[ids[kept]]
        angle = (np.pi * world.offset_of[ids[kept]] / np.maximum(1, sizes[sub])).astype(np.float32)[:, None]
        path = cosine[sub] * np.cos(angle) + sine[sub] * np.sin(angle)
        vectors = centres[sub // SUBS_A_CLUSTER] + sub_centres[sub] + path + 0.35 * noise[kept]
        if project is not None:
            vectors = vectors @ project
        yield ids[kept], vectors.astype(np.float16).astype(np.float32), ids[chance > 0.99]
