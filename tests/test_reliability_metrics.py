"""docs/RELIABILITY.md, row 15: metrics against an independent library, invariance of rankings, and planted leaks that must be seen."""

from __future__ import annotations

import importlib.util
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from reliability_world import make_trainer, rounds
from tiny import tiny_store

from dataset import Split, make_splits
from metrics import RankingMetrics
from retrieval import prepare_catalogue, topk_exact

pytestmark = pytest.mark.reliability
K = (1, 5, 10, 20)


def rankings(count: int) -> tuple[list[dict[int, float]], list[int], np.ndarray]:
    """Scores of 60 items with many ties for `count` users, their targets (some no candidate), and our top 20 of them."""
    chance = np.random.default_rng(15)
    # Vectors of small whole numbers: inner products are exact, and equal ones really are ties.
    query, items = chance.integers(-2, 3, (count, 3)).astype(np.float32), chance.integers(-2, 3, (60, 3)).astype(np.float32)
    scores = query @ items.T
    _, found = topk_exact(torch.from_numpy(query), prepare_catalogue(torch.from_numpy(items)), 20)
    targets = chance.integers(1, 66, count).tolist()
    return [dict(enumerate(row.tolist(), 1)) for row in scores], targets, found.numpy() + 1


def by_the_definition(scores: dict[int, float], target: int) -> dict[str, float]:
    """Hit rate and NDCG of one ranking from sorted scores, ties lowest id first, with math.fsum: nothing of ours."""
    order = sorted(scores, key=lambda item: (-scores[item], item))
    found = {f"hr@{k}": float(target in order[:k]) for k in K}
    # The ideal ranking's gain is 1.
    return found | {f"ndcg@{k}": math.fsum(1 / math.log2(2 + n) for n, item in enumerate(order[:k]) if item == target) for k in K}


def ours(topk: np.ndarray, targets: list[int]) -> dict[str, float]:
    metrics = RankingMetrics(list(K))
    for begin in range(0, len(targets), 37):
        metrics.update(torch.from_numpy(topk[begin : begin + 37].copy()), torch.tensor(targets[begin : begin + 37]))
    return metrics.compute()


@pytest.mark.parametrize("count", rounds(1000, 200))
def test_metrics_are_those_of_the_definition(count):
    """Row 15, without a library, each ranking by itself and the means: also that the ranker breaks ties as the metrics say."""
    scores, targets, topk = rankings(count)
    assert sum(len(set(row.values())) < 40 for row in scores) == count  # ties everywhere
    theirs = [by_the_definition(row, target) for row, target in zip(scores, targets, strict=True)]
    mine = [ours(topk[user : user + 1], [target]) for user, target in enumerate(targets)]
    worst = max(abs(mine[user][name] - value) for user, found in enumerate(theirs) for name, value in found.items())
    means = ours(topk, targets)
    worst_mean = max(abs(means[name] - math.fsum(found[name] for found in theirs) / count) for name in theirs[0])
    print(f"\nlargest difference to the definition in {count} rankings: {worst:.1e}; of the means: {worst_mean:.1e}")
    assert worst < 1e-12 and worst_mean < 1e-12


@pytest.mark.parametrize("count", rounds(1000, 200))
@pytest.mark.skipif(importlib.util.find_spec("ir_measures") is None, reason="ir-measures is not installed (requirements-extra.txt)")
def test_metrics_are_those_of_ir_measures(count):
    """Row 15: each ranking by itself, as differences of opposite signs would cancel in a mean over users.

    The library gets our order as distinct scores, as each library breaks ties in its own way; ties are the test's above.
    """
    import ir_measures

    _, targets, topk = rankings(count)
    run = [
        ir_measures.ScoredDoc(str(user), str(item), float(-place))
        for user, row in enumerate(topk.tolist())
        for place, item in enumerate(row)
    ]
    qrels = [ir_measures.Qrel(str(user), str(target), 1) for user, target in enumerate(targets)]
    names = {
        ir_measures.parse_measure(f"{measure}@{k}"): f"{name}@{k}" for name, measure in (("hr", "Success"), ("ndcg", "nDCG")) for k in K
    }
    theirs: dict[int, dict[str, float]] = {user: {} for user in range(count)}
    for found in ir_measures.iter_calc(list(names), qrels, run):
        theirs[int(found.query_id)][names[found.measure]] = found.value
    mine = {user: ours(topk[user : user + 1], [target]) for user, target in enumerate(targets)}
    worst = max(abs(mine[user][name] - theirs[user][name]) for user in range(count) for name in names.values())
    hits = sum(mine[user]["hr@20"] for user in range(count))
    print(f"\nlargest difference to ir-measures {ir_measures.__version__} in {count} rankings, {hits:.0f} of them with a hit: {worst:.1e}")
    assert all(found.keys() == set(names.values()) for found in theirs.values()) and 0.2 * count < hits < 0.5 * count
    assert worst < 1e-12


# ---- rankings -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    store = tiny_store(num_users=150, num_items=300, max_events=14)
    trained = make_trainer(tmp_path_factory.mktemp("metrics"), store=store, num_workers=0, max_steps=30)
    trained.fit()
    return trained


def test_permuted_candidates_change_nothing(trainer):
    """Row 15."""
    before, whole = trainer.candidates, trainer.rank(trainer.splits.test)
    metrics = trainer.metrics_of(trainer.splits.test, whole)
    try:
        for seed in range(5):
            trainer.candidates = np.random.default_rng(seed).permutation(before)
            again = trainer.rank(trainer.splits.test)
            assert (again.topk_ids == whole.topk_ids).all() and (again.topk_scores == whole.topk_scores).all()
            assert trainer.metrics_of(trainer.splits.test, again) == metrics
    finally:
        trainer.candidates = before


def test_the_size_of_evaluation_batches_changes_nothing(trainer):
    """Row 15: rankings and metrics are equal; scores and loss to float32's rounding, as sums of other lengths are taken."""
    config, found = trainer.config, {}
    try:
        for size in (1, 7, 512):
            for workers in (0, 2):
                trainer.config = replace(
                    config, eval=replace(config.eval, eval_batch_size=size), data=replace(config.data, num_workers=workers)
                )
                found[size, workers] = trainer.rank(trainer.splits.test)
    finally:
        trainer.config = config
    first = found[1, 0]
    for ranking in found.values():
        assert (ranking.topk_ids == first.topk_ids).all()
        np.testing.assert_allclose(ranking.topk_scores, first.topk_scores, rtol=1e-5, atol=1e-6)
        mine, theirs = (trainer.metrics_of(trainer.splits.test, r) for r in (ranking, first))
        assert mine.pop("loss") == pytest.approx(theirs.pop("loss"), rel=1e-5)
        assert mine == theirs


# ---- leaks --------------------------------------------------------------------------------------------------------------


def sees_the_target(trainer, split: Split) -> bool:
    """Whether a ranking changes with the events that are to be predicted, and with all after them."""
    before = trainer.rank(split)
    items, times, actions = (column.copy() for column in (trainer.store.item_ids, trainer.store.timestamps, trainer.store.action_types))
    chance = random.Random(1)
    try:
        for target, user in zip(split.target.tolist(), split.users.tolist(), strict=True):
            for event in range(target, int(trainer.store.user_offsets[user + 1])):
                trainer.store.item_ids[event] = chance.randrange(1, trainer.store.num_items + 1)
                trainer.store.timestamps[event] += chance.randrange(1, 10**6)
                trainer.store.action_types[event] = 1 - trainer.store.action_types[event]
        after = trainer.rank(split)
    finally:
        trainer.store.item_ids[:], trainer.store.timestamps[:], trainer.store.action_types[:] = items, times, actions
    return bool((after.topk_ids != before.topk_ids).any())


def trained_on_targets(splits) -> int:
    """How many events to predict are among those that are trained on."""
    trained = {
        event for begin, end in zip(splits.train.begin.tolist(), splits.train.end.tolist(), strict=True) for event in range(begin, end)
    }
    return sum(target in trained for split in (splits.valid, splits.test) for target in split.target.tolist())


def test_a_ranking_does_not_see_its_target_and_a_planted_leak_is_found(trainer):
    """Row 15."""
    for split in (trainer.splits.valid, trainer.splits.test):
        assert not sees_the_target(trainer, split)
        assert sees_the_target(trainer, split._replace(end=split.end + 1))  # planted: the target is the last input
    good = trainer.metrics_of(trainer.splits.test, trainer.rank(trainer.splits.test))
    assert good["hr@10"] < 0.9


@pytest.mark.fast
@pytest.mark.parametrize("protocol", ["leave_one_out", "holdout"])
def test_no_target_is_trained_on_and_a_planted_one_is_found(protocol):
    """Row 15."""
    store = tiny_store(num_users=200, num_items=30, max_events=12)
    splits = make_splits(store, protocol=protocol, holdout_fraction=0.2, target="last", seed=1)
    assert trained_on_targets(splits) == 0
    leaking = splits._replace(train=splits.train._replace(end=splits.train.end + 1))  # planted: one event too many a user
    if protocol == "holdout":
        leaking = splits._replace(train=Split(*(np.concatenate([a, b[:1]]) for a, b in zip(splits.train, splits.test))))
        leaking.train.end[-1] += 1  # planted: a held-out user, whole
    assert trained_on_targets(leaking) > 0
