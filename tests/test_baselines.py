import numpy as np
import pytest
from tiny import tiny_store

from baselines import Baselines, recent_item_counts, successors
from dataset import make_splits

LEAVE_ONE_OUT = {"protocol": "leave_one_out", "holdout_fraction": 0.1, "target": "last", "seed": 3}


def test_popularity_recent_and_item_to_item_by_hand():
    store = tiny_store(sequences=[[1, 2, 3, 9, 9], [1, 2, 4, 9, 9], [1, 2, 3, 9, 9], [5, 1, 9, 9]], num_items=9, has_time=False)
    splits = make_splits(store, **LEAVE_ONE_OUT)
    # training events: 1 2 3 | 1 2 4 | 1 2 3 | 5 1 -> counts 1:4, 2:3, 3:2, 4:1, 5:1, the rest never
    rankings = Baselines(store, splits.train, np.arange(1, 10), remove_seen=False).top_k(splits.valid, 5)
    assert rankings["popularity"].tolist() == [[1, 2, 3, 4, 5]] * 4
    # the last inputs are 3, 4, 3, 1: only 1 has successors in training (2, thrice)
    assert rankings["item2item"][3].tolist() == [2, 1, 3, 4, 5]
    assert rankings["item2item"][0].tolist() == [1, 2, 3, 4, 5]


def test_recent_without_times_counts_places_from_the_end():
    # 8 users of 5 events: one place holds a fifth of the events, more than a tenth
    store = tiny_store(sequences=[[1, 1, 1, 1, user % 2 + 2] for user in range(8)], has_time=False)
    train = make_splits(store, **LEAVE_ONE_OUT).train._replace(end=np.asarray(store.user_offsets[1:]))
    counts = recent_item_counts(store, train)
    assert counts[:4].tolist() == [0, 0, 4, 4]


def test_recent_with_times_counts_the_latest_tenth():
    store = tiny_store(sequences=[[user + 1] * 5 for user in range(20)])
    store.timestamps = np.arange(100)
    train = make_splits(store, **LEAVE_ONE_OUT).train._replace(end=np.asarray(store.user_offsets[1:]))
    assert np.flatnonzero(recent_item_counts(store, train)).tolist() == [19, 20]
    assert recent_item_counts(store, train).sum() == 10


@pytest.mark.parametrize("chunk", [1, 2, 50_000])
def test_successors_do_not_cross_users(monkeypatch, chunk):
    import baselines

    store = tiny_store(sequences=[[1, 2], [2, 3], [2, 3], [2, 1], [3, 2]])
    split = make_splits(store, **LEAVE_ONE_OUT | {"protocol": "holdout", "holdout_fraction": 0.4}).train
    full = split._replace(
        users=np.arange(5), begin=np.asarray(store.user_offsets[:-1]), end=np.asarray(store.user_offsets[1:]), target=np.full(5, -1)
    )
    original = baselines.iterate_events
    monkeypatch.setattr(baselines, "iterate_events", lambda s, p: original(s, p, chunk))
    found = successors(store, full, np.array([1, 2]))
    assert {item: list(after) for item, after in found.items()} == {1: [2], 2: [3, 1]}


def test_seen_items_and_non_candidates_are_left_out():
    store = tiny_store(num_users=40, num_items=12, min_events=5)
    splits = make_splits(store, **LEAVE_ONE_OUT)
    candidates = np.array([2, 3, 5, 7, 11])
    for name, top in Baselines(store, splits.train, candidates, remove_seen=True).top_k(splits.test, 5).items():
        for row in range(splits.test.num_samples):
            seen = set(store.item_ids[splits.test.begin[row] : splits.test.end[row]].tolist())
            found = [i for i in top[row].tolist() if i]
            assert sorted(found) == sorted(set(candidates.tolist()) - seen), name  # all that is left, each once


def test_only_training_events_count():
    store = tiny_store(sequences=[[1, 1, 7, 8], [1, 1, 7, 8], [1, 1, 7, 8]], num_items=9)
    splits = make_splits(store, **LEAVE_ONE_OUT)
    top = Baselines(store, splits.train, np.arange(1, 10), remove_seen=False).top_k(splits.test, 3)
    assert all(row.tolist() == [1, 2, 3] for ranking in top.values() for row in ranking)  # 7 and 8 are no more popular than 2 and 3
