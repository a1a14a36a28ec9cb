import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_model import make
from tiny import tiny_store

from dataset import make_splits, predict_split
from evaluate import Ranker, split_metrics

SPLIT = {"protocol": "leave_one_out", "holdout_fraction": 0.1, "target": "last", "seed": 3}


def ranker(store, model, columns, candidates=None, **more):
    candidates = np.arange(1, store.num_items + 1) if candidates is None else candidates
    return Ranker(model, columns, candidates, device=torch.device("cpu"), **({"batch_size": 5, "num_workers": 1} | more))


def brute_force(store, model, columns, split, candidates, k, remove_seen):
    vectors = model.encode_items(columns.items(candidates)).candidate.detach().double()
    rows = []
    for row in range(split.num_samples):
        one = Ranker(model, columns, candidates, device=torch.device("cpu"), batch_size=1, num_workers=0)
        ((_, query),) = list(one.encode_users(split.take(np.array([row]))))
        scores = vectors @ query[0].double()
        seen = set(store.item_ids[split.begin[row] : split.end[row]].tolist()) if remove_seen else set()
        order = sorted((-float(s), int(c)) for s, c in zip(scores, candidates) if int(c) not in seen)
        rows.append([c for _, c in order[:k]] + [0] * (k - len(order)))
    return np.array(rows)


@pytest.mark.parametrize("remove_seen", [True, False])
def test_ranking_equals_brute_force(remove_seen):
    store, model, columns = make()
    split = make_splits(store, **SPLIT).test
    candidates = np.array([19, 2, 3, 5, 7, 11, 13, 17])
    found = ranker(store, model, columns, candidates).rank(split, 6, remove_seen)
    assert found.topk_ids.tolist() == brute_force(store, model, columns, split, np.sort(candidates), 6, remove_seen).tolist()


def test_batch_size_and_order_of_candidates_change_nothing():
    store, model, columns = make()
    split = make_splits(store, **SPLIT).test
    reference = ranker(store, model, columns).rank(split, 10, True).topk_ids
    for batch_size in (1, 7, 512):
        assert (ranker(store, model, columns, batch_size=batch_size).rank(split, 10, True).topk_ids == reference).all()
    shuffled = np.random.default_rng(0).permutation(np.arange(1, store.num_items + 1))
    assert (ranker(store, model, columns, shuffled).rank(split, 10, True).topk_ids == reference).all()


def test_seen_items_beyond_the_window_are_removed_too():
    store, model, columns = make(tiny_store(sequences=[list(range(1, 19)) + [1, 2]], num_items=20))
    found = ranker(store, model, columns).rank(predict_split(store), 10, True).topk_ids[0]
    assert set(found[found > 0].tolist()) == {19, 20}


def test_fill_gives_ten_distinct_answers_with_the_unseen_first():
    store, model, columns = make(tiny_store(sequences=[list(range(1, 19)), []], num_items=20))
    found = ranker(store, model, columns).rank(predict_split(store), 10, True, fill=True)
    assert set(found.topk_ids[0, :2].tolist()) == {19, 20} and len(set(found.topk_ids[0].tolist())) == 10
    assert (found.topk_ids > 0).all() and len(set(found.topk_ids[1].tolist())) == 10


def test_fewer_candidates_than_places():
    store, model, columns = make()
    found = ranker(store, model, columns, np.array([4, 9])).rank(predict_split(store), 10, False)
    assert (np.sort(found.topk_ids, axis=1)[:, -2:] == [4, 9]).all() and (found.topk_ids[:, 2:] == 0).all()


def test_loss_is_the_cross_entropy_of_the_targets():
    store, model, columns = make()
    split = make_splits(store, **SPLIT).valid
    found = ranker(store, model, columns, temperature=0.5).rank(split, 10, False, keep_queries=True)
    logits = torch.from_numpy(found.queries) @ found.candidates.T / 0.5
    expected = F.cross_entropy(logits, torch.from_numpy(store.item_ids[split.target].astype(np.int64)) - 1)
    assert found.loss == pytest.approx(float(expected), rel=1e-5)


def test_metrics_by_hand():
    store = tiny_store(sequences=[[1, 2, 3], [1, 2, 4], [1, 2, 5]])
    store.action_types[:] = [0, 0, 1, 0, 0, 0, 0, 0, 2]
    split = make_splits(store, **SPLIT).test
    top = np.array([[3, 9, 8], [9, 4, 8], [9, 8, 7]])
    found = split_metrics(store, split, top, (1, 10), 1)
    ndcg = (1 + 1 / np.log2(3)) / 3
    assert found["hr@1"] == pytest.approx(1 / 3) and found["hr@10"] == pytest.approx(2 / 3) and found["ndcg@10"] == pytest.approx(ndcg)
    assert found["score"] == pytest.approx(0.31 * 2 / 3 + 0.69 * ndcg)
    # second round: weights 1 (click), 0 (exposure), 2.5 (conversion, missed)
    assert split_metrics(store, split, top, (10,), 2)["score"] == pytest.approx(1.0 / 3.5)


def test_evaluation_leaves_the_generators_alone():
    store, model, columns = make(dropout_rate=0.5)
    before = torch.get_rng_state()
    ranker(store, model, columns).rank(predict_split(store), 5, True)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("remove_seen", [True, False])
def test_target_ranks_are_places_in_the_whole_ranking(remove_seen):
    store, model, columns = make()
    split = make_splits(store, **SPLIT).test
    candidates = np.arange(1, store.num_items)  # one item is no candidate
    asked = np.ones(split.num_samples, dtype=bool)
    asked[1] = False
    found = ranker(store, model, columns, candidates).rank(split, 3, remove_seen, ranks_of=asked).target_ranks
    whole = brute_force(store, model, columns, split, candidates, len(candidates), remove_seen).tolist()
    targets = store.item_ids[split.target].tolist()
    assert found.tolist() == [row.index(t) if t in row and a else -1 for row, t, a in zip(whole, targets, asked)]
    assert (ranker(store, model, columns).rank(split, 3, remove_seen).target_ranks == -1).all()
