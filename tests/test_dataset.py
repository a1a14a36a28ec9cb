import os
import threading

import numpy as np
import pytest
import torch
from tiny import tiny_store

from dataset import (
    BatchBuilder,
    NegativeSampling,
    TrainingOrder,
    counter_hash,
    make_splits,
    Prefetcher,
    predict_split,
    training_item_counts,
)
from errors import UserError

SPLIT = {"protocol": "leave_one_out", "holdout_fraction": 0.1, "target": "last", "seed": 3}


def test_leave_one_out_by_hand():
    store = tiny_store(sequences=[[1, 2, 3, 4], [5, 6, 7], [8, 9]])
    splits = make_splits(store, **SPLIT)
    assert [splits.train.end[i] - splits.train.begin[i] for i in range(3)] == [2, 1, 2]  # the short user is trained on whole
    assert store.item_ids[splits.valid.target].tolist() == [3, 6]
    assert store.item_ids[splits.test.target].tolist() == [4, 7]
    assert (splits.test.end - splits.test.begin).tolist() == [3, 2]  # the validation event is input of the test
    assert "1 users with fewer than 3 events" in splits.notes[0]


def test_holdout_users_are_disjoint_and_fixed_by_the_seed():
    store = tiny_store(num_users=100)
    make = lambda seed: make_splits(store, **(SPLIT | {"protocol": "holdout", "holdout_fraction": 0.2, "seed": seed}))
    first, again, other = make(3), make(3), make(4)
    groups = [set(split.users.tolist()) for split in first[:3]]
    assert [len(g) for g in groups] == [80, 10, 10] and len(set.union(*groups)) == 100
    assert all((a == b).all() for a, b in zip(first.test, again.test))
    assert set(first.test.users.tolist()) != set(other.test.users.tolist())
    assert (first.valid.target == first.valid.end).all() and (store.user_offsets[first.valid.users + 1] - 1 == first.valid.target).all()


def test_last_click_is_the_target_and_users_without_one_are_said():
    store = tiny_store(sequences=[[1, 2, 3]] * 40)
    store.action_types = np.tile(np.array([0, 1, 0], dtype=np.int8), 40)
    store.action_types[:60] = 0
    splits = make_splits(store, **(SPLIT | {"protocol": "holdout", "holdout_fraction": 0.5, "target": "last_click"}))
    assert (store.action_types[splits.test.target] == 1).all()
    assert (splits.test.end - splits.test.begin == 1).all()
    assert any("have no click" in note for note in splits.notes)


def test_empty_splits_are_an_error():
    with pytest.raises(UserError, match="validation split is empty"):
        make_splits(tiny_store(sequences=[[1, 2], [3]]), **SPLIT)


def test_max_eval_users_is_said():
    splits = make_splits(tiny_store(num_users=30), **SPLIT, max_eval_users=7)
    assert splits.test.num_samples == splits.valid.num_samples == 7
    assert any("7 of 30 test users" in note for note in splits.notes)


@pytest.mark.parametrize("num_items", [50, 70_000])
def test_unique_ids_equal_numpys_and_nothing_is_kept(num_items):
    store = tiny_store(num_items=50)
    store.num_items = num_items  # above 65,536 the sort takes two passes
    builder = BatchBuilder(store, predict_split(store), 3)
    for seed in range(3):
        random = np.random.default_rng(seed)
        ids = random.integers(0, num_items + 1, (4, 5))
        others = random.integers(1, num_items + 1, 30).astype(np.int32)
        unique, (inverse, nothing, inverse_of_others) = builder._deduplicate(ids, np.zeros((4, 0), dtype=np.int64), others)
        assert unique.dtype == np.int64 and unique.tolist() == sorted({0, *ids.flatten().tolist(), *others.tolist()})
        assert inverse.dtype == inverse_of_others.dtype == np.int32 and nothing.shape == (4, 0)
        assert (unique[inverse] == ids).all() and (unique[inverse_of_others] == others).all()


def test_batches_of_a_mapped_store_are_plain_int64_tensors(tmp_path):
    plain, mapped = tiny_store(), tiny_store()
    for name in ("item_ids", "action_types", "timestamps"):
        column = getattr(plain, name)
        column.tofile(tmp_path / name)
        setattr(mapped, name, np.memmap(tmp_path / name, dtype=column.dtype, mode="r"))
    for negatives in (None, NegativeSampling("position", 3), NegativeSampling("shared", 9), NegativeSampling("all", 0)):
        batches = [
            BatchBuilder(store, predict_split(store), 4, negatives=negatives).training(np.arange(6), 0, 1) for store in (plain, mapped)
        ]
        for name, one, other in zip(batches[0]._fields, *batches):
            if name.startswith("max_"):
                assert one == other
            else:
                assert one.dtype == other.dtype == torch.int64 and torch.equal(one, other), name


@pytest.mark.parametrize("buckets", [True, False])
def test_each_sample_once_an_epoch_and_another_order_the_next(buckets):
    split = predict_split(tiny_store(num_users=53))
    order = TrainingOrder(split, 8, seed=1, max_seq_length=5, length_buckets=buckets)
    epochs = []
    for epoch in (0, 1, 0):
        order.start_epoch(epoch)
        epochs.append(np.concatenate([order.samples(b) for b in range(order.num_batches)]))
        assert sorted(epochs[-1].tolist()) == list(range(53))
    assert (epochs[0] == epochs[2]).all() and (epochs[0] != epochs[1]).any()


def test_training_batch_by_hand():
    store = tiny_store(sequences=[[7, 8, 9], [4, 4, 5, 6, 7, 1]])
    batch = BatchBuilder(store, predict_split(store), max_seq_length=3).training(np.array([1, 0]), epoch=0, step=0)
    inputs, targets = batch.unique_ids[batch.item_index], batch.unique_ids[batch.target_index]
    # user 1 has 6 events: a window of 3 inputs and 4 targets; user 0 fits
    assert batch.lengths.tolist() == [4, 3] and batch.max_length == 4
    assert inputs.tolist() == [0, 5, 6, 7, 0, 7, 8]
    assert targets.tolist() == [5, 6, 7, 1, 7, 8, 9]
    assert batch.owner.tolist() == [0] * 4 + [1] * 3 and batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.unique_ids.tolist() == [0, 1, 5, 6, 7, 8, 9]
    assert batch.timestamps.tolist() == [0, *store.timestamps[5:8], 0, *store.timestamps[0:2]]
    assert batch.action_types.tolist() == [0, *(store.action_types[5:8] + 1), 0, *(store.action_types[0:2] + 1)]


def test_evaluation_batch_uses_the_last_event():
    store = tiny_store(sequences=[[7, 8, 9], [1, 2, 3, 4]])
    batch = BatchBuilder(store, predict_split(store), max_seq_length=3).evaluation(np.array([0, 1]))
    assert batch.unique_ids[batch.item_index].tolist() == [0, 7, 8, 9, 0, 2, 3, 4]
    assert batch.target_index.numel() == 0


def test_a_user_without_events_has_a_user_token():
    store = tiny_store(sequences=[[], [1]])
    batch = BatchBuilder(store, predict_split(store), max_seq_length=3).evaluation(np.array([0, 1]))
    assert batch.lengths.tolist() == [1, 2] and batch.unique_ids[batch.item_index].tolist() == [0, 0, 1]


def _negatives(store, samples, **more):
    split = predict_split(store)
    builder = BatchBuilder(store, split, 50, seed=5, negatives=NegativeSampling("position", more.pop("num_negatives", 3)))
    batch = builder.training(np.array(samples), **({"epoch": 2, "step": 0} | more))
    return batch, batch.unique_ids[batch.negative_index]


def test_negatives_lie_outside_the_users_history_and_cover_the_rest():
    store = tiny_store(num_users=400, num_items=15, min_events=5, max_events=9)
    batch, negatives = _negatives(store, range(400))
    counts = np.zeros(16)
    for row in range(400):
        history = set(store.item_ids[store.user_offsets[row] : store.user_offsets[row + 1]].tolist())
        drawn = negatives[batch.owner == row].flatten().tolist()
        assert not history & set(drawn)
        counts += np.bincount(drawn, minlength=16)
    assert counts[0] == 0 and counts[1:].min() > 0.6 * counts[1:].mean()


def test_negatives_depend_on_the_sample_not_on_the_batch():
    store = tiny_store(num_users=30)
    together, drawn = _negatives(store, range(30))
    _, drawn_alone = _negatives(store, [17], step=9)
    assert torch.equal(drawn[together.owner == 17], drawn_alone)
    assert not torch.equal(_negatives(store, [17], epoch=3)[1], drawn_alone)


def test_a_user_who_saw_everything_still_gets_a_negative():
    store = tiny_store(sequences=[[1, 2, 3]], num_items=3)
    _, negatives = _negatives(store, [0])
    assert ((negatives >= 1) & (negatives <= 3)).all()


def test_validation_and_test_events_are_no_history():
    # the negative of leave-one-out training must not avoid the held-out items: that would tell which they are
    store = tiny_store(sequences=[[1, 1, 2, 3]], num_items=3)
    splits = make_splits(store, **SPLIT)
    builder = BatchBuilder(store, splits.train, 50, negatives=NegativeSampling("position", 40))
    batch = builder.training(np.array([0]), 0, 0)
    assert set(batch.unique_ids[batch.negative_index].flatten().tolist()) == {2, 3}


def test_shared_candidates_hold_targets_and_uniform_items():
    store = tiny_store(num_users=30, num_items=500)
    make = lambda in_batch: BatchBuilder(store, predict_split(store), 50, negatives=NegativeSampling("shared", 20, in_batch)).training(
        np.arange(4), 0, 3
    )
    batch = make(True)
    candidates = set(batch.unique_ids[batch.candidate_index].tolist())
    targets = set(batch.unique_ids[batch.target_index].tolist())
    assert targets < candidates and 0 not in candidates and len(candidates - targets) <= 20
    assert len(batch.candidate_index) == len(candidates)
    uniform = make(False)
    assert set(uniform.unique_ids[uniform.candidate_index].tolist()) >= candidates - targets
    capped = BatchBuilder(store, predict_split(store), 50, negatives=NegativeSampling("shared", 0, True, 5)).training(np.arange(4), 0, 3)
    assert 0 < len(capped.candidate_index) <= 5 and set(capped.unique_ids[capped.candidate_index].tolist()) <= targets
    again = make(True)
    assert torch.equal(again.unique_ids, batch.unique_ids)


def test_all_items_are_candidates_of_full_softmax():
    store = tiny_store()
    batch = BatchBuilder(store, predict_split(store), 50, negatives=NegativeSampling("all", 0)).training(np.array([0, 1]), 0, 0)
    assert batch.unique_ids.tolist() == list(range(store.num_items + 1))
    assert torch.equal(batch.unique_ids[batch.target_index], batch.target_index)


def test_counter_hash_is_uniform_and_differs_by_word():
    values = counter_hash(1, 2, np.arange(100_000))
    assert values.dtype == np.uint64 and len(np.unique(values)) == 100_000
    assert abs((values % np.uint64(10)).mean() - 4.5) < 0.05
    assert (counter_hash(1, 3, np.arange(10)) != values[:10]).all()


def test_item_counts_of_training_events_only():
    store = tiny_store(sequences=[[1, 1, 2, 3]])
    counts = training_item_counts(store, make_splits(store, **SPLIT).train)
    assert counts[:4].tolist() == [0, 2, 0, 0]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_prefetch_keeps_order_and_passes_errors_on(workers):
    assert list(Prefetcher(workers, 4)(lambda n: n * n, range(20))) == [n * n for n in range(20)]

    def fail(number):
        if number == 3:
            raise ValueError("three")
        return number

    results = Prefetcher(workers, 2)(fail, range(10))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        list(results)


def policy() -> int:
    return os.sched_getscheduler(threading.get_native_id())


def test_prefetch_in_spare_time_until_results_are_late(monkeypatch):
    """The caller makes what is late; after the third the threads are of the usual priority, for good."""
    monkeypatch.setattr(Prefetcher, "PATIENCE", 1.0)
    prefetch, caller, usual = Prefetcher(1, 2, spare=True), threading.get_ident(), policy()
    made_by_caller = {number: threading.Event() for number in (4, 6, 8)}

    def build(number):
        if number in made_by_caller:
            if threading.get_ident() == caller:
                made_by_caller[number].set()
            else:
                assert made_by_caller[number].wait(60)
        return number, threading.get_ident() == caller, policy()

    found = list(prefetch(build, range(14)))
    assert [number for number, *_ in found] == list(range(14))
    assert [number for number, by_caller, _ in found if by_caller] == [4, 6, 8]
    if found[0][2] == usual:
        pytest.skip("no class of threads here that take spare time only")
    assert {kind for number, by_caller, kind in found[:8] if not by_caller} == {os.SCHED_IDLE}
    assert {kind for *_, kind in found[-3:]} == {usual}
    assert {kind for *_, kind in prefetch(build, range(3))} == {usual}


def test_prefetch_of_fewer_than_it_makes_ahead_is_not_kept_waiting(monkeypatch):
    monkeypatch.setattr(Prefetcher, "PATIENCE", 0.05)
    caller, made = threading.get_ident(), threading.Event()

    def build(number):
        if threading.get_ident() == caller:
            made.set()
        else:
            assert made.wait(60)
        return number

    assert list(Prefetcher(1, 4, spare=True)(build, range(2))) == [0, 1]
