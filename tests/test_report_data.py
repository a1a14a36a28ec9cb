"""report_data.py, report_samples.py and slices.py: hand-computed figures, brute force, limits, and data without times."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from report_world import made_up_ranking, write_run
from tiny import tiny_store

import report_data
import report_samples
import slices
from dataset import make_splits, training_item_counts
from metrics import RankingMetrics
from schema import ACTION_NAMES

SPLIT = {"protocol": "leave_one_out", "holdout_fraction": 0.1, "target": "last", "seed": 3}


def world(**more):
    store = tiny_store(**({"num_users": 80} | more))
    splits = make_splits(store, **SPLIT)
    return store, splits, made_up_ranking(store, splits.test, 0), training_item_counts(store, splits.train)


def test_report_json_has_what_the_report_needs(tmp_path):
    _, splits, _, metrics = write_run(tmp_path / "run")
    tree = json.loads((tmp_path / "run/report.json").read_text())
    assert tree["fingerprint"] == "tiny" and tree["data"]["splits"]["test"] == splits.test.num_samples
    assert (tmp_path / "run/report.json").stat().st_size < 200_000
    rows = tree["quality"]["slices"]
    for name in {row["slice"] for row in rows}:  # each slice's groups together are all users
        mine = [row for row in rows if row["slice"] == name]
        users = sum(row["num_users"] for row in mine)
        if name != "target popularity" or users == metrics["num_users"]:
            assert users == metrics["num_users"]
            assert sum(row["ndcg@10"] * row["num_users"] for row in mine) / users == pytest.approx(metrics["ndcg@10"])
    assert sum(tree["quality"]["ranks"]["counts"]) == metrics["num_users"]


def test_facts_by_hand():
    sequences = [[1, 2, 3], [1, 2, 3, 4], [1, 1, 1]]
    store, splits, _, counts = world(sequences=sequences, num_items=5)
    start = 1_700_006_400  # 2023-11-15 00:00 UTC, a Wednesday
    store.timestamps = np.array([0, 30, 3630] + [0, 0, 5, 200_000] + [0, 1, 2]) + start
    store.action_types = np.array([0, 1, 0, 0, 0, 0, 2, 0, 0, 0], dtype=np.int8)
    facts = report_data.data_facts(report_data.ReportedData(store, splits, np.array([1, 2, 3]), counts, 0, ("81",)))
    assert facts["lengths"]["names"][2] == "3–5" and facts["lengths"]["counts"][2] == 3
    assert (facts["lengths"]["min"], facts["lengths"]["median"], facts["lengths"]["max"]) == (3, 3, 4)
    gaps = dict(zip(facts["gaps"]["names"], facts["gaps"]["counts"]))
    assert {name: n for name, n in gaps.items() if n} == {"0 s": 1, "<1 min": 4, "<6 h": 1, "<7 d": 1}
    assert facts["hours"][0] == 8 and facts["hours"][1] == 1 and facts["hours"][7] == 1
    assert facts["weekdays"] == [0, 0, 9, 0, 1, 0, 0]  # 200,000 s later is the Friday
    assert facts["actions"] == {"exposure": 8, "click": 1, "conversion": 1}
    assert facts["first_time"] == start and facts["last_time"] == start + 200_000
    # Trained on: [1], [1, 2], [1]; tested on: 3, 4, 1. Candidates: 1, 2, 3.
    assert facts["popularity"]["curve"] == [[1, 3], [2, 1], [3, 0], [4, 0], [5, 0]] and facts["popularity"]["never"] == 3
    assert facts["cold"] == {
        "candidates": pytest.approx(1 / 3),
        "targets": pytest.approx(2 / 3),
        "targets_no_candidate": pytest.approx(1 / 3),
    }
    covered = {row["id"]: row["covered"] for row in facts["coverage"]}
    assert covered["colour"] == (store.item_single[1:, 0] > 0).mean() and covered["age"] == (store.user_single[:, 0] > 0).mean()
    assert covered["81"] == (store.embedding("81").row_of_item[1:] > 0).mean()


def test_large_data_are_looked_at_in_part(monkeypatch):
    monkeypatch.setattr(report_data, "DATA_USERS", 10)
    monkeypatch.setattr(report_data, "DATA_ITEMS", 7)
    store, splits, _, counts = world()
    data = report_data.ReportedData(store, splits, np.arange(1, 21), counts, 0, ())
    facts = report_data.data_facts(data)
    assert facts["users_looked_at"] == 10 and sum(facts["lengths"]["counts"]) == 80
    assert sum(facts["actions"].values()) == sum(facts["hours"]) < store.num_events
    assert facts == report_data.data_facts(data)  # the same users each time


def test_data_without_times():
    store, splits, ranking, counts = world(has_time=False)
    facts = report_data.data_facts(report_data.ReportedData(store, splits, np.arange(1, 21), counts, 0, ()))
    assert not facts["has_time"] and "hours" not in facts and "gaps" not in facts
    assert "hour of the target" not in slices.groups_of(store, splits.test, counts, np.ones(21, bool))
    user = report_samples.sample_users(store, splits.test, ranking, np.arange(1, 21), counts, 0)["users"][0]
    assert user["next"]["time"] is None


def test_the_figures_are_gathered_once_and_again_where_the_data_are_others(tmp_path, monkeypatch):
    store, splits, ranking, counts = world()
    data, gathered = report_data.ReportedData(store, splits, np.arange(1, 21), counts, 0, ()), []
    real = report_data.data_facts
    monkeypatch.setattr(report_data, "data_facts", lambda of: gathered.append(of) or real(of))

    def written():
        return json.loads((tmp_path / "report.json").read_text())

    report_data.write_data_facts(tmp_path, data)
    first = written()
    report_data.write_report_data(tmp_path, data, ranking)
    tested = written()
    assert len(gathered) == 1 and tested["data"] == first["data"] and "quality" in tested and "quality" not in first
    report_data.write_data_facts(tmp_path, data)  # a resumed run: what is known of the earlier test stays
    assert len(gathered) == 1 and written() == tested
    others = make_splits(store, **(SPLIT | {"protocol": "holdout", "holdout_fraction": 0.5}))
    item = np.flatnonzero(counts)[0]
    changed = (
        {"splits": others, "counts": training_item_counts(store, others.train)},
        {"splits": splits._replace(valid=splits.valid.take(np.arange(3)))},
        {"splits": splits._replace(test=splits.test._replace(target=splits.test.target - 1))},
        {"splits": splits._replace(notes=["a note"])},
        {"candidate_ids": np.arange(1, 20)},
        {"counts": np.where(np.arange(len(counts)) == item, counts + 1, counts)},
        {"seed": 1},
        {"embeddings": ("81",)},
    )
    for number, change in enumerate(changed, 2):
        report_data.write_data_facts(tmp_path, data._replace(**change))
        assert len(gathered) == number and "quality" not in written() and written()["data"] == json.loads(json.dumps(real(gathered[-1])))
    (tmp_path / "report.json").write_text("{")
    report_data.write_data_facts(tmp_path, data)
    assert written() == first


def test_rank_histogram():
    found = report_data.rank_histogram(np.array([0, 1, 2, 9, 10, -1, 150]))
    counts = dict(zip(found["names"], found["counts"]))
    assert counts == {"1": 1, "≤3": 2, "≤10": 1, "≤30": 1, "≤100": 0, "≤300": 1} and found["without"] == 1
    assert report_data.rank_histogram(np.array([-1]))["counts"] == []
    assert len(report_data.RANKS) == len(report_data.RANK_NAMES) and len(report_data.GAPS) == len(report_data.GAP_NAMES)


# ---- slices -------------------------------------------------------------------------------------------------------------


def test_user_values_are_those_of_metrics():
    store, splits, ranking, _ = world()
    target = store.item_ids[splits.test.target].astype(np.int64)
    metrics = RankingMetrics([10])
    metrics.update(torch.from_numpy(ranking.topk_ids), torch.from_numpy(target))
    hits, gains = slices.user_values(ranking.topk_ids, target)
    assert hits.mean() == pytest.approx(metrics.compute()["hr@10"]) and gains.mean() == pytest.approx(metrics.compute()["ndcg@10"])


def test_groups_by_hand():
    store, splits, _, _ = world(sequences=[[1, 2, 3], [1] * 7 + [4], [5, 5, 2]], num_items=5)
    counts, candidate = np.array([0, 50, 3, 0, 200, 1]), np.array([0, 1, 1, 1, 0, 1], dtype=bool)
    found = {
        name: [names[n] if n >= 0 else None for n in number]
        for name, (names, number) in slices.groups_of(store, splits.test, counts, candidate).items()
    }
    assert found["history length"] == ["2–5", "6–10", "2–5"]
    assert found["target"] == ["cold", "no candidate", "warm"]
    assert found["target popularity"] == [None, "100–999", "1–9"]
    assert found["action"] == [ACTION_NAMES[a] for a in store.action_types[splits.test.target]]
    hours = store.timestamps[splits.test.target] // 3600 % 24
    assert [name[:2] for name in found["hour of the target"]] == [f"{hour // 4 * 4:02d}" for hour in hours]


def test_quality_and_the_worst():
    groups = {
        "a": (["x", "y", "none"], np.array([0] * 40 + [1] * 40)),
        "b": (["only"], np.zeros(80, int)),
        "c": (["few", "many"], np.array([0] * 5 + [1] * 75)),
    }
    gains = np.array([0.0] * 40 + [1.0] * 40)
    rows = slices.quality(groups, gains, gains)
    assert [(row["group"], row["num_users"], row["ndcg@10"]) for row in rows] == [
        ("x", 40, 0.0), ("y", 40, 1.0), ("only", 80, 0.5), ("few", 5, 0.0), ("many", 75, pytest.approx(40 / 75))]  # fmt: skip
    assert rows[2]["ndcg_error"] == pytest.approx(gains.std(ddof=1) / np.sqrt(80))
    # "only" has no sibling, "few" is too few and leaves "many" without one.
    assert [row["group"] for row in slices.worst(rows)] == ["x", "y"]
    assert slices.quality({"a": (["x"], np.zeros(1, int))}, np.ones(1), np.ones(1))[0]["ndcg_error"] is None


# ---- sample users -------------------------------------------------------------------------------------------------------


def test_chosen_users_are_near_and_far():
    ranks = np.array([-1] * 3 + [5] * 20 + [50] * 20 + [500] * 20)
    chosen = report_samples.choose(ranks, 1)
    assert ranks[chosen].tolist() == [5] * 4 + [50] * 4 + [500] * 4 + [-1] and len(set(chosen.tolist())) == 13
    assert (report_samples.choose(ranks, 1) == chosen).all() and (report_samples.choose(ranks, 2) != chosen).any()
    assert len(report_samples.choose(np.zeros(0, int), 1)) == 0


def test_sample_users_against_brute_force(monkeypatch):
    monkeypatch.setattr(report_samples, "NEIGHBOUR_CHUNK", 7)
    store, splits, ranking, counts = world()
    candidates = np.arange(1, 20)  # item 20 has no vector
    ranking = ranking._replace(candidates=ranking.candidates[:19])
    found = report_samples.sample_users(store, splits.test, ranking, candidates, counts, 0)
    unit = torch.nn.functional.normalize(ranking.candidates, dim=1).numpy()
    cosines = unit @ unit.T
    names = {name: row for row, name in enumerate(store.raw_user_ids)}
    row_of_user = {user: row for row, user in enumerate(splits.test.users.tolist())}
    assert 4 <= len(found["users"]) <= 13
    for user in found["users"]:
        sample = row_of_user[names[user["user"]]]
        begin, end = splits.test.begin[sample], splits.test.end[sample]
        assert [event["item"] for event in user["history"]] == store.item_ids[begin:end][-20:].tolist()
        assert user["next"]["item"] == store.item_ids[splits.test.target[sample]] and user["rank"] == ranking.target_ranks[sample]
        assert [answer["item"] for answer in user["top"]] == ranking.topk_ids[sample].tolist()
        past = np.unique(store.item_ids[begin:end])
        past = past[past < 20]
        for answer in user["top"]:
            if answer["item"] < 20 and len(past):
                row = cosines[answer["item"] - 1, past - 1]
                assert answer["nearest"] == past[row.argmax()] and answer["cosine"] == pytest.approx(row.max(), abs=1e-3)
        first = user["top"][0]["item"]
        order = [i for i in np.argsort(-cosines[first - 1]) + 1 if i != first][:5] if first < 20 else []
        assert [item for item, _ in user["near_first"]] == order
    shown = {int(item) for item in found["items"]}
    assert {event["item"] for user in found["users"] for event in user["history"]} <= shown
    some = next(iter(found["items"]))
    assert found["items"][some]["raw"] == str(store.raw_item_ids[int(some)]) and found["items"][some]["count"] == counts[int(some)]


def test_shared_features():
    store = tiny_store()
    store.item_single[1:4, 0] = (2, 2, 3)
    store.item_multi = {"tags": SimpleNamespace(gather=lambda rows: (np.array({1: [4, 5], 2: [5], 3: [4, 5]}[int(rows[0])]), None))}
    assert report_samples.shared(store, 1, 2) == [["colour", 2], ["tags", 5]]
    assert report_samples.shared(store, 1, 3) == [["tags", 4], ["tags", 5]] and report_samples.shared(store, 1, 1) == []
