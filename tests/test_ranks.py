"""ranks.py: the round trip, the limits, and what is no ranks."""

import os

import numpy as np
import pytest

import ranks
from final_test import MAX_RANKED_PAIRS, users_to_rank
from ranks import RANKS, read_ranks, write_ranks


def test_round_trip(tmp_path):
    user, rank, top = np.array([7, 3, 9]), np.array([0, -1, 12]), np.arange(60).reshape(3, 20)
    places = {"popularity": np.array([2, -1, -1]), "item2item": np.array([-1, 0, 9])}
    assert write_ranks(tmp_path, user, rank, top, places) == tmp_path / RANKS
    found = read_ranks(tmp_path)
    assert found.user.tolist() == [7, 3, 9] and found.rank.tolist() == [0, -1, 12] and (found.topk_ids == top[:, :10]).all()
    assert {name: place.tolist() for name, place in found.baselines.items()} == {"popularity": [2, -1, -1], "item2item": [-1, 0, 9]}
    assert os.listdir(tmp_path) == [RANKS]


def test_a_file_of_before_the_baselines_were_kept(tmp_path):
    np.savez_compressed(tmp_path / RANKS, user=[7, 3], rank=[0, -1], topk_ids=[[1], [2]])
    found = read_ranks(tmp_path)
    assert found.rank.tolist() == [0, -1] and found.baselines == {}


def test_the_best_ten_of_some_users_and_a_small_file(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "MAX_TOP_USERS", 2)
    write_ranks(tmp_path, np.arange(5), np.arange(5), np.ones((5, 10), dtype=np.int64), {})
    assert read_ranks(tmp_path).topk_ids.shape == (2, 10) and len(read_ranks(tmp_path).rank) == 5
    monkeypatch.undo()
    random = np.random.default_rng(0)
    # Baselines find a target among their ten for one user in ten.
    places = {name: np.where(random.random(100_000) < 0.1, random.integers(0, 10, 100_000), -1) for name in ("a", "b", "c")}
    write_ranks(tmp_path, np.arange(100_000), random.integers(0, 660_000, 100_000), random.integers(1, 660_000, (100_000, 10)), places)
    assert (tmp_path / RANKS).stat().st_size < 1_000_000


@pytest.mark.parametrize("content", [None, b"", b"PK", b"not a zip", b"\x93NUMPY"])
def test_what_is_no_ranks(tmp_path, content):
    if content is not None:
        (tmp_path / RANKS).write_bytes(content)
    assert read_ranks(tmp_path) is None


def test_arrays_that_do_not_fit(tmp_path):
    for arrays in ({"user": [1]}, {"user": [1, 2], "rank": [1], "topk_ids": [[1]]}, {"user": [1], "rank": [1], "topk_ids": [1]},
                   {"user": [1], "rank": [1], "topk_ids": [[1]], "baseline.recent": [1, 2]}):  # fmt: skip
        np.savez(tmp_path / RANKS, **{name: np.array(value) for name, value in arrays.items()})
        assert read_ranks(tmp_path) is None


def test_users_to_rank():
    assert users_to_rank(50, 10, 0).all()
    few = users_to_rank(100_000, MAX_RANKED_PAIRS // 2000, 1)
    assert few.sum() == 2000 and (few == users_to_rank(100_000, MAX_RANKED_PAIRS // 2000, 1)).all()
    assert users_to_rank(5000, 10**12, 0).sum() == 1000
