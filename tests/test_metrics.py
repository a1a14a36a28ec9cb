"""metrics.py: hand-computed ranks and means, weights, ties with a brute-force ranker, and every raise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import metrics
from metrics import RankingMetrics, action_weights, competition_score, hit_rate, ndcg, paired_bootstrap, ranks_from_topk
from schema import CLICK, CONVERSION, EXPOSURE

TOPK = torch.tensor([[5, 7, 9], [7, 5, 9], [9, 7, 5], [1, 2, 3], [0, 0, 0]])
TARGET = torch.tensor([5, 5, 5, 5, 0])


def test_ranks():
    assert ranks_from_topk(TOPK, TARGET).tolist() == [1, 2, 3, 0, 0]
    assert ranks_from_topk(torch.tensor([[4, 4, -1]]), torch.tensor([4])).tolist() == [1]
    assert ranks_from_topk(torch.tensor([[-1, 4]]), torch.tensor([-1])).tolist() == [0]  # an empty place is no hit
    assert ranks_from_topk(torch.zeros(2, 0), torch.tensor([1, 2])).tolist() == [0, 0]
    assert ranks_from_topk(TOPK, TARGET).dtype == torch.int64


def test_gains():
    ranks = torch.tensor([1, 2, 3, 0])
    assert hit_rate(ranks, 2).tolist() == [1, 1, 0, 0]
    assert ndcg(ranks, 10).tolist() == pytest.approx([1.0, 1 / math.log2(3), 0.5, 0.0])
    assert ndcg(ranks, 2).tolist() == pytest.approx([1.0, 1 / math.log2(3), 0.0, 0.0])
    assert ndcg(ranks, 2).dtype == torch.float64


def test_metrics_by_hand():
    metrics = RankingMetrics([1, 2])
    metrics.update(TOPK[:2], TARGET[:2])
    metrics.update(TOPK[2:], TARGET[2:])
    result = metrics.compute()
    assert set(result) == {"hr@1", "ndcg@1", "hr@2", "ndcg@2", "hr@10", "ndcg@10", "score"}
    assert result["hr@1"] == pytest.approx(1 / 5) and result["hr@2"] == pytest.approx(2 / 5) and result["hr@10"] == pytest.approx(3 / 5)
    assert result["ndcg@10"] == pytest.approx((1 + 1 / math.log2(3) + 0.5) / 5)
    assert result["score"] == pytest.approx(0.31 * result["hr@10"] + 0.69 * result["ndcg@10"])
    assert competition_score(1.0, 1.0) == pytest.approx(1.0)
    assert metrics.ranks.tolist() == [1, 2, 3, 0, 0] and metrics.weights.tolist() == [1.0] * 5


def test_weights_of_round_2():
    weights = action_weights(torch.tensor([EXPOSURE, CLICK, CONVERSION, CLICK], dtype=torch.int8), 2)
    assert weights.tolist() == [0.0, 1.0, 2.5, 1.0]
    assert action_weights(torch.tensor([EXPOSURE, CLICK]), 1).tolist() == [1.0, 1.0]
    metrics = RankingMetrics([10])
    metrics.update(TOPK[:4], TARGET[:4], weights)
    result = metrics.compute()
    hit, gain = (1.0 + 2.5) / 4.5, (1 / math.log2(3) + 2.5 * 0.5) / 4.5
    assert result["score"] == pytest.approx(0.31 * hit + 0.69 * gain)
    assert result["hr@10"] == 0.75  # the weights are the score's alone


def test_nothing_to_average():
    assert math.isnan(RankingMetrics([10]).compute()["score"])
    metrics = RankingMetrics([10])
    metrics.update(TOPK, TARGET, torch.zeros(5))
    assert math.isnan(metrics.compute()["score"]) and not math.isnan(metrics.compute()["hr@10"])
    assert metrics.ranks.shape == (5,) and RankingMetrics([10]).weights.shape == (0,)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 12))
def test_the_split_into_batches_changes_nothing(sizes, num_places):
    generator = torch.Generator().manual_seed(sum(sizes))
    count = len(sizes)
    topk = torch.stack([torch.randperm(30, generator=generator)[:num_places] + 1 for _ in range(count)])
    target, weights = torch.randint(1, 31, (count,), generator=generator), torch.rand(count, generator=generator)
    whole, parts = RankingMetrics([1, 5]), RankingMetrics([1, 5])
    whole.update(topk, target, weights)
    for i in range(0, count, 7):
        parts.update(topk[i : i + 7], target[i : i + 7], weights[i : i + 7])
    assert whole.compute() == parts.compute()
    hits = sum(t in row[:5] for row, t in zip(topk.tolist(), target.tolist()))
    assert whole.compute()["hr@5"] == pytest.approx(hits / count)


def test_paired_bootstrap():
    generator = torch.Generator().manual_seed(1)
    b = torch.rand(3, 400, generator=generator)
    a = b + 0.1 + 0.2 * torch.randn(3, 400, generator=generator)
    mean, low, high = paired_bootstrap(a, b, 500, seed=3)
    assert mean == pytest.approx((a.double() - b.double()).mean().item())
    assert low < mean < high and 0.0 < low and high - low < 0.06
    assert (mean, low, high) == paired_bootstrap(a, b, 500, seed=3) != paired_bootstrap(a, b, 500, seed=4)
    # one run: the width is that of the normal approximation
    _, low, high = paired_bootstrap(a[0], b[0], 1000)
    assert high - low == pytest.approx(2 * 1.96 * 0.2 / 20, rel=0.15)
    assert paired_bootstrap(b, b, 10)[1:] == (0.0, 0.0)


def test_raises():
    with pytest.raises(ValueError, match="expected \\(B, K\\)"):
        ranks_from_topk(TOPK, TARGET[:2])
    with pytest.raises(ValueError, match="score_round is 3"):
        action_weights(torch.tensor([0]), 3)
    with pytest.raises(ValueError, match="action types 0 to 3"):
        action_weights(torch.tensor([0, 3]), 2)
    with pytest.raises(ValueError, match="top_k"):
        RankingMetrics([0])
    with pytest.raises(ValueError, match="weights"):
        RankingMetrics([1]).update(TOPK, TARGET, torch.tensor([1.0, 1, 1, 1, -1]))
    with pytest.raises(ValueError, match="equal shapes"):
        paired_bootstrap(torch.zeros(3), torch.zeros(4))


def test_paired_interval_is_the_paired_bootstrap():
    random = np.random.default_rng(0)
    gains = np.array([0.0, 1.0, 0.63, 0.5, 0.43])
    a, b = gains[random.integers(0, 5, 400)], gains[random.integers(0, 3, 400)]
    slow = metrics.paired_bootstrap(torch.from_numpy(a), torch.from_numpy(b), 4000)
    fast = metrics.paired_interval(a - b, 4000)
    assert fast[0] == pytest.approx(slow[0]) and fast[1:] == pytest.approx(slow[1:], abs=0.006)
    assert metrics.paired_interval(np.zeros(3)) == (0.0, 0.0, 0.0)
    for wrong in (np.zeros(0), np.zeros((2, 2))):
        with pytest.raises(ValueError, match="paired_interval"):
            metrics.paired_interval(wrong)


def test_nested_interval_draws_runs_and_users_within_each():
    random = np.random.default_rng(0)
    # One run: paired_interval. Runs without spread within: what is left is the draw of two runs, (1, 1), (1, 3), (3, 1), (3, 3).
    one = random.normal(0.1, 1.0, 500)
    assert metrics.nested_interval([one], 4000)[1:] == pytest.approx(metrics.paired_interval(one, 4000)[1:], abs=0.01)
    assert metrics.nested_interval([np.full(3, 1.0), np.full(7, 3.0)]) == (2.0, 1.0, 3.0)
    assert metrics.nested_interval([np.full(2, 0.5)] * 40) == pytest.approx((0.5, 0.5, 0.5))
    # Runs that differ by their users alone: each draw of 4 runs is of 4 * 300 users, besides the spread of the runs' own means.
    runs = [random.normal(0.2, 1.0, 300) for _ in range(4)]
    mean, low, high = metrics.nested_interval(runs, 4000)
    width = 2 * 1.96 * np.sqrt(np.mean([run.var() for run in runs]) / 1200 + np.var([run.mean() for run in runs]) / 4)
    assert mean == pytest.approx(np.mean([run.mean() for run in runs])) and high - low == pytest.approx(width, rel=0.1)
    assert metrics.nested_interval(runs, seed=1) == metrics.nested_interval(runs, seed=1) != metrics.nested_interval(runs, seed=2)
    for wrong in ([], [np.zeros(2), np.zeros(0)], [np.zeros((2, 2))]):
        with pytest.raises(ValueError, match="nested_interval"):
            metrics.nested_interval(wrong)
