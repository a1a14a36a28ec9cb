"""The compiled loops give the arrays of the numpy way, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_store

import kernels
from columns import distinct
from config import Config, with_values
from dataset import BatchBuilder, NegativeSampling, predict_split
from features import FeatureColumns, TableLayout

pytestmark = pytest.mark.skipif(kernels.compiled(wait=True) is None, reason="numba is not installed")


def both(monkeypatch, function):
    """What `function` gives with the kernels, and without them."""
    monkeypatch.setattr(kernels, "ENABLED", True)
    fast = function()
    monkeypatch.setattr(kernels, "ENABLED", False)
    assert kernels.compiled() is None
    return fast, function()


def assert_same(fast, slow):
    if isinstance(fast, torch.Tensor | np.ndarray):
        assert fast.dtype == slow.dtype and fast.shape == slow.shape
        np.testing.assert_array_equal(np.asarray(fast), np.asarray(slow))
    elif isinstance(fast, tuple):
        assert len(fast) == len(slow)
        for one, other in zip(fast, slow):
            assert_same(one, other)
    else:
        assert fast == slow


@given(st.lists(st.integers(0, 300), max_size=200), st.sampled_from([301, 70_000, 5_000_000]))
@settings(max_examples=50, deadline=None)
def test_distinct(keys, size):
    keys = np.array(keys, dtype=np.int32) * (size // 301)
    kernels.ENABLED = True
    fast = distinct(keys, size)
    try:
        kernels.ENABLED = False
        slow = distinct(keys, size)
    finally:
        kernels.ENABLED = True
    assert_same(tuple(fast), tuple(slow))


@pytest.mark.parametrize("negatives", [None, NegativeSampling("position", 2), NegativeSampling("shared", 5), NegativeSampling("all", 0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_training_batches(monkeypatch, negatives, seed):
    store = tiny_store(num_users=30, num_items=40, max_events=15, seed=seed)
    builder = BatchBuilder(store, predict_split(store), 8, seed, negatives)
    assert_same(*both(monkeypatch, lambda: tuple(builder.training(np.arange(3, 27), 2, 1))))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "more", [{}, {"user_id": True}, {"hash_rows": (7, 11), "hashed_features": ("item_id", "tags")}, {"feature_width": "auto"}]
)
def test_features(monkeypatch, more, transposed):
    store = tiny_store(num_users=30, num_items=40, seed=3)
    store.item_single[5, 0] = 99  # unseen in training
    columns = FeatureColumns(store, TableLayout.from_store(store, with_values(Config(), **more).model), ("81",))
    items, users = np.array([0, 3, 5, 8, 21, 40]), np.array([4, 0, 17])
    assert_same(*both(monkeypatch, lambda: columns.gather(items, users, transposed)))
