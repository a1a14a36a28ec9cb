"""columns.py: sorting of bounded keys, against numpy's own sort. Its ragged columns and look-ups are tested through the store."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies

from columns import distinct, sorted_places

SIZES = [1, 2, 7, 65_535, 65_536, 65_537, 131_072, 3_000_000, 2**31 - 1]


def keys_below(size: int, num: int, seed: int) -> np.ndarray:
    """Keys of which many are equal, some are 0, and the edges of a 16-bit pass are among them."""
    random = np.random.default_rng(seed)
    keys = random.choice(np.append(random.integers(0, size, max(1, num // 3)), [0, size - 1, 65_535, 65_536, 131_071]), num)
    return np.minimum(keys, size - 1).astype(np.int32)


@settings(max_examples=200, deadline=None)
@given(strategies.data())
def test_sorted_places_is_a_stable_argsort(data):
    size = data.draw(strategies.sampled_from(SIZES))
    keys = np.array(data.draw(strategies.lists(strategies.integers(0, size - 1), max_size=60)), dtype=np.int32)
    places = sorted_places(keys, size)
    assert places.dtype == np.int64 and places.tolist() == np.argsort(keys, kind="stable").tolist()


@pytest.mark.parametrize("size", SIZES)
def test_sorted_places_of_many(size):
    keys = keys_below(size, 100_000, seed=size)
    assert np.array_equal(sorted_places(keys, size), np.argsort(keys, kind="stable"))


def assert_distinct(keys: np.ndarray, size: int) -> None:
    found = distinct(keys, size)
    unique, inverse = np.unique(np.append(keys, 0), return_inverse=True)  # with 0, so that ranks begin at 1
    assert np.array_equal(found.keys, unique[1:])
    assert found.rank.dtype == np.int32 and np.array_equal(found.rank, inverse[:-1])
    ends = np.append(found.starts, len(found.places))[1:]
    assert len(found.starts) == len(found.keys) and len(found.places) == int((keys > 0).sum())
    for key, start, end in list(zip(found.keys, found.starts, ends))[:200]:
        assert found.places[start:end].tolist() == np.flatnonzero(keys == key).tolist()  # ascending: the sort is stable


@pytest.mark.parametrize("size", SIZES)
def test_distinct_equals_numpy(size):
    assert_distinct(keys_below(size, 20_000, seed=size), size)


@settings(max_examples=100, deadline=None)
@given(strategies.lists(strategies.integers(0, 70_000), max_size=40))
def test_distinct_of_any_keys(keys):
    assert_distinct(np.array(keys, dtype=np.int32), 70_001)


@pytest.mark.parametrize("keys", [[], [0, 0], [3], [0, 3, 3]])
def test_distinct_of_few(keys):
    assert_distinct(np.array(keys, dtype=np.int32), 4)


def test_mapped_files_serve_as_keys(tmp_path):
    keys = keys_below(70_000, 5000, seed=1)
    keys.tofile(tmp_path / "keys")
    mapped = np.memmap(tmp_path / "keys", dtype=np.int32, mode="r")
    assert_distinct(mapped, 70_000)
    assert np.array_equal(sorted_places(mapped, 70_000), np.argsort(keys, kind="stable"))
