"""sizes.py: each formula beside what the real function takes, or what the real files hold."""

import tracemalloc
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_store
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from baselines import recent_item_counts, successors
from config import ModelConfig
from dataset import Split, training_item_counts
from embedding import JointTable
from features import TableLayout
from retrieval import prepare_catalogue, topk_exact
from schema import TENCENT_GR
from sizes import (
    counting_bytes,
    layout_of,
    map_bytes,
    ranking_bytes,
    recent_bytes,
    store_bytes,
    successor_bytes,
    table_bytes,
    transition_bytes,
)
from store import open_store
from synthetic import generate
from transitions import count_transitions

MIB = 2**20


def arrays(num_users: int, num_items: int, length: int, has_time: bool = True) -> tuple[SimpleNamespace, Split]:
    """What the counting functions read of a store, and a split of all its events."""
    random, events = np.random.default_rng(5), num_users * length
    store = SimpleNamespace(
        num_items=num_items,
        item_ids=random.integers(1, num_items + 1, events).astype(np.int32),
        timestamps=random.integers(0, 10**9, events),
        schema=SimpleNamespace(has_time=has_time),
    )
    begin = np.arange(num_users, dtype=np.int64) * length
    return store, Split(np.arange(num_users), begin, begin + length, np.full(num_users, -1))


def traced(function) -> int:
    """The peak of what numpy and Python hold while a function runs."""
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize(("num_users", "num_items"), [(30_000, 1000), (30_000, 2_000_000), (120_000, 1000), (120_000, 900_000)])
def test_counting(num_users: int, num_items: int) -> None:
    store, split = arrays(num_users, num_items, 20)
    assert counting_bytes(store, split) == pytest.approx(traced(lambda: training_item_counts(store, split)), rel=0.1)


def test_recent() -> None:
    store, split = arrays(110_000, 50_000, 20)
    assert recent_bytes(store, split) == pytest.approx(traced(lambda: recent_item_counts(store, split)), rel=0.1)
    store, split = arrays(110_000, 50_000, 20, has_time=False)
    assert recent_bytes(store, split) == counting_bytes(store, split) > traced(lambda: recent_item_counts(store, split))


@pytest.mark.parametrize(("num_users", "num_items", "num_test"), [(60_000, 3000, 20_000), (60_000, 400_000, 60_000), (60_000, 5000, 10)])
def test_successors(num_users: int, num_items: int, num_test: int) -> None:
    store, split = arrays(num_users, num_items, 20)
    test = split.take(np.arange(num_test))
    wanted = np.unique(store.item_ids[test.end - 1])
    real = traced(lambda: successors(store, split, wanted))
    assert real * 0.85 < successor_bytes(store, split, test) < real * 1.6  # the worst case is that no pair comes twice


@pytest.mark.parametrize(("num_users", "num_items"), [(5_000, 400_000), (5_000, 300)])
def test_transitions(num_users: int, num_items: int) -> None:
    store, split = arrays(num_users, num_items, 20)
    kept, counting = transition_bytes(store, split)
    found = []
    real = traced(lambda: found.append(count_transitions(store, split)))
    assert real * 0.9 < counting + kept < real * 2.4  # the worst case, that no pair comes twice, is the first one here
    assert sum(array.nbytes for array in found[0]) <= kept


class Live(TorchDispatchMode):
    """The peak of tensors that exist."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_iter((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_iter(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = id(storage), storage.nbytes()
        if key not in self.seen:
            self.live += num_bytes
            self.peak = max(self.peak, self.live)
            self.seen[key] = weakref.ref(storage, lambda _: (self.seen.pop(key), setattr(self, "live", self.live - num_bytes)))


@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize(("num", "queries"), [(30_000, 512), (200_000, 512), (200_000, 64)])
def test_ranking(num: int, queries: int, low: bool) -> None:
    torch.manual_seed(0)
    items, query = torch.randn(num, 16), torch.randn(queries, 16)
    catalogue = prepare_catalogue(items, low_precision=low)
    excluded = torch.arange(queries + 1) * 20, torch.randint(0, num, (queries * 20,))
    with Live() as live:
        topk_exact(query, catalogue, 10, exclude=excluded)
    assert live.peak * 0.7 < sum(ranking_bytes(num, queries, low, "cpu")) < live.peak * 1.5 + 8 * MIB


def test_ranking_on_a_gpu_takes_larger_blocks() -> None:
    assert max(ranking_bytes(10**7, 512, False, "cuda")) >= 4 << 27


@pytest.mark.parametrize("settings", [{}, {"embedding_dim": 24}, {"hash_rows": (7, 5)}, {"feature_width": "auto"}, {"user_id": True}])
def test_table(settings: dict) -> None:
    layout = TableLayout.from_store(tiny_store(), ModelConfig(**settings))
    table = JointTable(layout, 0.02)
    assert table_bytes(layout) == sum(parameter.nbytes for parameter in table.parameters())


@pytest.mark.parametrize("settings", [{}, {"hash_rows": (7, 5), "user_id": True}, {"feature_width": "auto"}])
def test_layout_of_a_shape(settings: dict) -> None:
    store, config = tiny_store(), ModelConfig(**settings)
    expected = TableLayout.from_store(store, config)
    shape = {"users": store.num_users, "items": store.num_items}
    assert layout_of(store.schema, config, **shape, cardinalities=store.cardinalities) == expected
    assert layout_of(TENCENT_GR, ModelConfig(), users=5, items=7).num_rows == 1 + 7 + sum(f.cardinality for f in TENCENT_GR.features)


def test_store_of_a_shape(tmp_path: Path) -> None:
    generate(tmp_path / "data", users=3000, items=7000, layout="parquet", seed=3, embeddings=["81"])
    store = open_store(tmp_path / "data", tmp_path / "cache", embeddings=("81",), progress=False, log=lambda text: None)
    real = map_bytes(store, ("81",))
    assert sum(real.values()) == sum(p.stat().st_size for p in store.path.rglob("*.*") if p.suffix in (".bin", ".npy")) - 2 * 128
    column = store.embedding("81")
    counts = {"users": store.num_users, "items": store.num_items, "events": store.num_events}
    lists = [store.user_multi[f.id] for f in store.schema.select("user", "multi")]
    values = np.mean([len(column.values) / store.num_users for column in lists])
    name = len(store.raw_user_ids.data) / store.num_users
    share = (len(column.matrix) - 1) / store.num_items
    parts = store_bytes(TENCENT_GR, **counts, values=values, name=name, embeddings={"81": share})
    assert sum(parts.values()) == pytest.approx(sum(real.values()), rel=0.005)
    events = sum(real[key] for key in ("item_ids", "action_types", "timestamps"))
    assert parts["events"] == events and parts["items"] == pytest.approx(real["item_single"], rel=0.001)
    default = store_bytes(TENCENT_GR, **counts, embeddings={"81": 0.87})
    assert sum(default.values()) == pytest.approx(sum(real.values()), rel=0.05)
