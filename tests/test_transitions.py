"""transitions.py: counts against a plain loop, rankings with them against brute force, and their way through checkpoints to inference."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from test_evaluate import SPLIT, ranker
from test_export import foreign_answers
from test_infer import run_infer
from test_main import run_main
from test_model import make
from test_serve import requests_of
from tiny import tiny_store

import ensemble
import transitions
from checkpoint import list_checkpoints, load_checkpoint
from config import Config
from dataset import iterate_events, make_splits, predict_split
from ensemble import average_checkpoints, read_ensemble, write_ensemble
from errors import UserError
from retrieval import pair_scores, prepare_catalogue
from serve import Answerer, open_served, parse_request
from store import open_store
from transitions import (
    DECAY,
    RECENT,
    SHARPNESS,
    WINDOW,
    Additions,
    Transitions,
    count_transitions,
    from_state,
    rank_with_additions,
    roughly_scored,
    topk_with_additions,
    without,
)


def counted(store, split) -> dict[int, dict[int, float]]:
    """{item: {successor: A}} by the definition."""
    pairs: dict[int, Counter] = {}
    for begin, end in zip(split.begin, split.end):
        items = store.item_ids[begin:end].tolist()
        for first, item in enumerate(items):
            for gap in range(1, WINDOW + 1):
                if first + gap < len(items):
                    pairs.setdefault(item, Counter())[items[first + gap]] += DECAY ** (gap - 1)
    return {item: {j: c / math.sqrt(sum(of.values())) for j, c in of.items()} for item, of in pairs.items()}


def as_dict(counts: Transitions) -> dict[int, dict[int, float]]:
    rows = zip(counts.offsets, counts.offsets[1:])
    found = [dict(zip(counts.items[a:b].tolist(), counts.affinity[a:b].tolist())) for a, b in rows]
    return {item: of for item, of in enumerate(found) if of}


def affinities(counted_: dict, history: list[int], num_items: int) -> np.ndarray:
    found = np.zeros(num_items + 1)
    for place, item in enumerate(reversed(history[-RECENT:])):
        for successor, share in counted_.get(item, {}).items():
            found[successor] += DECAY**place * share
    return found


@pytest.mark.parametrize("at_once", [1 << 24, 8])  # 8: a pass an item or two
def test_counts_are_those_of_a_plain_loop(monkeypatch, at_once):
    monkeypatch.setattr(transitions, "COUNTED_AT_ONCE", at_once)
    store = tiny_store(num_users=60, num_items=15, min_events=1, max_events=25)
    split = make_splits(store, **SPLIT).train
    found, expected = as_dict(count_transitions(store, split)), counted(store, split)
    assert found.keys() == expected.keys()
    for item, of in expected.items():
        assert found[item] == pytest.approx(of, rel=1e-6)


def test_only_the_largest_successors_are_kept(monkeypatch):
    monkeypatch.setattr(transitions, "MOST", 4)
    store = tiny_store(num_users=60, num_items=15, min_events=5, max_events=25)
    split = make_splits(store, **SPLIT).train
    found, expected = count_transitions(store, split), counted(store, split)
    assert (np.diff(found.offsets) <= 4).all() and (np.diff(found.offsets) == 4).any()
    for item, of in as_dict(found).items():
        assert sorted(of.values(), reverse=True) == pytest.approx(sorted(expected[item].values(), reverse=True)[:4], rel=1e-6)
        assert list(of.values()) == sorted(of.values(), reverse=True)


def test_a_set_without_pairs():
    store = tiny_store(sequences=[[1], [2], []], num_items=5)
    counts = count_transitions(store, predict_split(store))
    assert counts.offsets.tolist() == [0] * 7 and len(counts.items) == 0
    _, model, columns = make(store)
    with_counts = ranker(store, model, columns, transitions=counts, transition_weight=1.0).rank(predict_split(store), 3, True)
    assert (with_counts.topk_ids == ranker(store, model, columns).rank(predict_split(store), 3, True).topk_ids).all()


@pytest.mark.parametrize("remove_seen", [True, False])
@pytest.mark.parametrize("candidates", [np.arange(1, 21), np.array([19, 2, 3, 5, 7, 11, 13, 17])])
def test_ranking_and_ranks_equal_brute_force(remove_seen, candidates):
    store, model, columns = make(tiny_store(num_users=40, num_items=20, max_events=14, seed=4))
    splits = make_splits(store, **SPLIT)
    split, counts = splits.test, count_transitions(store, splits.train)
    plain = ranker(store, model, columns, candidates).rank(split, 5, remove_seen, keep_queries=True)
    asked = np.ones(split.num_samples, dtype=bool)
    asked[1] = False
    options = {"transitions": counts, "transition_weight": 0.7, "temperature": 0.5}
    found = ranker(store, model, columns, candidates, **options).rank(split, 5, remove_seen, ranks_of=asked)
    places, changed = np.sort(candidates), 0
    for row in range(split.num_samples):
        history = store.item_ids[split.begin[row] : split.end[row]].tolist()
        extra = 0.5 * 0.7 * np.log1p(SHARPNESS * affinities(counted(store, splits.train), history, store.num_items))[places]
        scores = plain.candidates.double().numpy() @ plain.queries[row].astype(np.float64) + extra
        left = [(-score, item) for score, item in zip(scores, places.tolist()) if not (remove_seen and item in history)]
        whole = [item for _, item in sorted(left)]
        assert found.topk_ids[row][found.topk_ids[row] > 0].tolist() == whole[:5]
        changed += whole[:5] != plain.topk_ids[row].tolist()
        target = int(store.item_ids[split.target[row]])
        assert found.target_ranks[row] == (whole.index(target) if target in whole and row != 1 else -1)
    assert changed > 10  # the counts do something here


@pytest.mark.parametrize("num_pairs", [0, 3_000])
def test_bounds_on_scores_decide_as_exact_ones_do(num_pairs):
    """Hundreds of candidates whose scores lie as close as float32's rounding, ties and targets among them."""
    rng = np.random.default_rng(num_pairs)
    query = torch.from_numpy(rng.normal(size=(20, 48)).astype(np.float32))
    items = torch.from_numpy((rng.normal(size=48) + 1e-7 * rng.normal(size=(300, 48))).astype(np.float32))
    items[150:200] = items[:50]
    catalogue = prepare_catalogue(items)
    pairs = np.sort(rng.choice(20 * 300, num_pairs, replace=False))
    values = rng.choice(np.array([1e-7, 1e-6, 2e-6, 0.5], dtype=np.float32), num_pairs)
    scored = roughly_scored(query, catalogue, Additions(pairs // 300, pairs % 300, values))
    rows, places = np.divmod(np.arange(20 * 300), 300)
    scores = pair_scores(query, catalogue, torch.from_numpy(rows), torch.from_numpy(places)).numpy().astype(np.float32)
    scores[pairs] += values
    scores = scores.reshape(20, 300)
    order = np.argsort(-scores, axis=1, kind="stable")
    top, found = topk_with_additions(query, catalogue, 10, scored)
    assert (found == order[:, :10]).all() and (top == np.take_along_axis(scores, found, axis=1)).all()
    for target in rng.integers(0, 300, (20, 20)):
        target[0] = -1
        ranks = rank_with_additions(query, catalogue, target, scored)
        assert ranks.tolist() == [-1] + [order[row].tolist().index(place) for row, place in enumerate(target) if place >= 0]


def test_batch_size_and_order_of_candidates_change_nothing():
    store, model, columns = make()
    splits = make_splits(store, **SPLIT)
    options = {"transitions": count_transitions(store, splits.train), "transition_weight": 1.0}
    asked = np.ones(splits.test.num_samples, dtype=bool)
    one = ranker(store, model, columns, **options).rank(splits.test, 10, True, ranks_of=asked)
    shuffled = np.random.default_rng(0).permutation(np.arange(1, store.num_items + 1))
    for batch_size, candidates in ((1, None), (7, shuffled), (512, None)):
        other = ranker(store, model, columns, candidates, batch_size=batch_size, **options)
        other = other.rank(splits.test, 10, True, ranks_of=asked)
        assert (other.topk_ids == one.topk_ids).all() and np.allclose(other.topk_scores, one.topk_scores, atol=1e-6)
        assert (other.target_ranks == one.target_ranks).all()


@pytest.mark.parametrize("protocol", ["leave_one_out", "holdout"])
def test_what_is_to_be_found_is_not_counted(protocol):
    """Each user's items are their own, so a pair tells which events were counted."""
    store = tiny_store(sequences=[list(range(6 * user + 1, 6 * user + 7)) for user in range(20)], num_items=120)
    splits = make_splits(store, **SPLIT | {"protocol": protocol, "holdout_fraction": 0.4})
    counts = as_dict(count_transitions(store, splits.train))
    for split in (splits.valid, splits.test):
        targets = set(store.item_ids[split.target].tolist())
        assert targets and not targets & counts.keys() and not targets & {j for of in counts.values() for j in of}
    assert counts


def test_an_item_with_more_pairs_than_are_counted_at_once(monkeypatch):
    store = tiny_store(num_users=60, num_items=3, min_events=5, max_events=25)
    whole = count_transitions(store, predict_split(store))
    monkeypatch.setattr(transitions, "COUNTED_AT_ONCE", 50)
    monkeypatch.setattr(transitions, "iterate_events", lambda s, p: (chunk for chunk in iterate_events(s, p, chunk_users=5)))
    few = count_transitions(store, predict_split(store))
    assert as_dict(few) == {item: pytest.approx(of, rel=1e-6) for item, of in as_dict(whole).items()}


@pytest.mark.parametrize("cold_penalty", [0.0, 0.3])
def test_seen_items_that_fill_a_row_are_in_the_order_of_the_ranking(cold_penalty):
    store, model, columns = make(tiny_store(num_users=30, num_items=12, min_events=8, max_events=14))
    columns.trained = np.arange(13) < 8
    split = predict_split(store)
    options = {"transitions": count_transitions(store, split), "transition_weight": 5.0, "cold_penalty": cold_penalty}
    one = ranker(store, model, columns, **options)
    filled, whole = one.rank(split, 10, True, fill=True).topk_ids, one.rank(split, 12, False).topk_ids
    plain = ranker(store, model, columns, cold_penalty=cold_penalty).rank(split, 12, False).topk_ids
    assert (whole != plain).any()
    for row in range(split.num_samples):
        seen = set(store.item_ids[split.begin[row] : split.end[row]].tolist())
        expected = sorted(whole[row].tolist(), key=lambda item: item in seen)  # stable: the unseen first
        assert filled[row].tolist() == expected[:10]


def test_items_that_came_after_training_are_no_error():
    store, model, columns = make()
    counts = count_transitions(store, predict_split(store))
    few = Transitions(counts.offsets[:6], counts.items[: counts.offsets[5]].clip(max=4), counts.affinity[: counts.offsets[5]])
    ranker(store, model, columns, transitions=few, transition_weight=1.0).rank(predict_split(store), 5, True)


def test_state_of_a_checkpoint_and_what_is_no_such_thing():
    store, *_ = make()
    counts = count_transitions(store, predict_split(store))
    state = {"w": torch.zeros(2)} | counts.to_state()
    back = from_state(state)
    assert all((a == b).all() and a.dtype == b.dtype for a, b in zip(back, counts)) and list(without(state)) == ["w"]
    assert from_state({"w": torch.zeros(2)}) is None
    broken = {
        "offsets": [state["transitions.offsets"].flip(0)],
        "items": [-state["transitions.items"]],
        "affinity": [state["transitions.affinity"][1:], state["transitions.affinity"] * torch.nan],
    }
    broken["items"] += [state["transitions.items"].float(), state["transitions.items"][:, None]]
    for name, value in ((name, value) for name, values in broken.items() for value in values):
        with pytest.raises(ValueError, match="transitions"):
            from_state(state | {f"transitions.{name}": value})


SETTINGS = ("--transition_weight", 1, "--hidden_units", 8, "--num_blocks", 1, "--num_heads", 1, "--num_epochs", 2, "--batch_size", 16)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    from synthetic import generate

    folder = tmp_path_factory.mktemp("transitions")
    generate(folder / "data", 120, 200, "jsonl", predict=15, seed=3, max_length=20, mean_length=12)
    paths = ("--data_path", "data", "--cache_path", "cache", "--log_path", "log", "--checkpoint_path", "ck", "--no-tensorboard")
    done = run_main(*paths, *SETTINGS, cwd=folder)
    assert done.status == 0, done.err
    return folder, paths


def test_a_run_keeps_them_for_inference(trained):
    folder, paths = trained
    test = json.loads((folder / "log/metrics.json").read_text())
    again = ("--inference_only", "--state_dict_path", "ck/best_model.pt", "--log_path")
    for weight, same in ((1, True), (0, False)):
        done = run_main(*paths, *again, f"log{weight}", "--transition_weight", weight, cwd=folder)
        assert done.status == 0, done.err
        (found,) = (folder / f"log{weight}").glob("**/metrics.json")
        assert (json.loads(found.read_text())["ndcg@10"] == test["ndcg@10"]) == same
    best = load_checkpoint(folder / "ck/best_model.pt", with_trainer=False)
    config = Config.from_dict(best.meta["config"], "a test")
    store = open_store(folder / "data", folder / "cache")
    split = make_splits(store, protocol="holdout", holdout_fraction=config.eval.holdout_fraction, target="last", seed=config.system.seed)
    found, expected = as_dict(from_state(best.model_state)), counted(store, split.train)
    assert found == {item: pytest.approx(of, rel=1e-6) for item, of in expected.items()}  # of training users alone
    member = read_ensemble(folder / "ck/best_model.pt").members[0]
    assert member.config.eval.transition_weight == 1


def test_export_and_stdin_give_the_same_answers(trained):
    pytest.importorskip("safetensors")
    folder, _ = trained
    data = {"EVAL_DATA_PATH": str(folder / "data-eval"), "USER_CACHE_PATH": str(folder / "cache")}
    done = run_infer("--export", "out", "--state_dict_path", "ck/best_model.pt", cwd=folder, **data)
    assert done.status == 0, done.err
    done = run_infer("--output", "result.json", cwd=folder, **data | {"MODEL_OUTPUT_PATH": str(folder / "ck/best_model.pt")})
    assert done.status == 0, done.err
    result = json.loads((folder / "result.json").read_text())
    model = read_ensemble(folder / "ck/best_model.pt")
    served = open_served(model, folder / "data-eval", "predict", folder / "cache", torch.device("cpu"))
    assert served.ranker.transition_weight == 1
    requests = requests_of(served.store)
    assert foreign_answers(folder / "out", requests, folder) == result["top10s"]
    answerer = Answerer(served)
    answers = [answerer.answer(parse_request(json.dumps(request), served.store.schema, 10))["items"] for request in requests]
    assert answers == result["top10s"]


def test_resumed_means_and_ensembles(trained):
    folder, paths = trained
    first, second = list_checkpoints(folder / "ck")
    counts = from_state(load_checkpoint(second, with_trainer=False).model_state)
    mean = load_checkpoint(average_checkpoints(folder / "mean", [first, second]), with_trainer=False)
    assert all((a == b).all() for a, b in zip(from_state(mean.model_state), counts))
    other = read_ensemble(second).members[0]
    other.config = Config.from_dict({**other.meta["config"], "eval": other.meta["config"]["eval"] | {"transition_weight": 0.5}}, "a test")
    with pytest.raises(UserError, match="ranked alike"):
        ensemble._check_one_index([read_ensemble(first).members[0], other])
    both = read_ensemble(write_ensemble(folder / "both", [first, second]))
    assert all(member.config.eval.transition_weight == 1 for member in both.members)
    done = run_main(*paths, *SETTINGS, "--resume", "--num_epochs", 3, cwd=folder)
    assert done.status == 0, done.err
    broken = dict(load_checkpoint(second, with_trainer=False).model_state)
    broken["transitions.items"] = broken["transitions.items"] * 1000
    member = read_ensemble(second).members[0]
    member.checkpoint = member.checkpoint._replace(model_state=broken)
    with pytest.raises(UserError):
        _ = member.transitions


def test_an_ensemble_of_one_model_twice_ranks_as_the_model():
    from ensemble import EnsembleRanker

    store, model, columns = make()
    splits = make_splits(store, **SPLIT)
    options = {"transitions": count_transitions(store, splits.train), "transition_weight": 1.0, "temperature": 0.3}
    one = ranker(store, model, columns, **options)
    expected = one.rank(splits.test, 10, True).topk_ids
    for weights in ([1.0, 1.0], [1.0, 3.0]):
        for scores in ("softmax", "zscore"):
            found = EnsembleRanker([one, one], weights, scores).rank(splits.test, 10, True).topk_ids
            assert (found == expected).all()
