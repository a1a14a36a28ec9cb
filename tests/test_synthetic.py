"""synthetic.py: the files are those of formats.md, both layouts hold the same data, and each planted effect is there to be counted."""

import errno
import json
import sys

import numpy as np
import orjson
import pyarrow.parquet as pq
import pytest

import planted
import synthetic
from errors import RunError, UserError
from plain_pickle import load_plain_pickle
from planted import CHUNK, DAY, START, build_world, ceiling, sample_users, successor
from planted_features import ITEM_SINGLE, embedding_pieces, item_features
from schema import CLICK, CONVERSION, EXPOSURE, TENCENT_GR
from store import open_store
from synthetic import generate

ARGUMENTS = {"users": 60, "items": 400, "predict": 40, "seed": 3, "max_length": 20, "embeddings": ("81", "82"), "mean_length": 15}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("synthetic")
    for layout in synthetic.LAYOUTS:
        generate(root / layout, layout=layout, **ARGUMENTS)
    return root


@pytest.fixture(scope="module")
def drawn():
    """A world of 20,000 items and 4,096 of its users, as flat arrays of consecutive events."""
    world = build_world(20_000, seed=5)
    return world, sample_users(world, "users", 0, 4096)


def pairs(users):
    """Mask (N, L - 1): position k and k + 1 are both events."""
    return np.arange(1, users.items.shape[1]) < users.counts[:, None]


def sub_at(world, users):
    return world.sub_of[users.items]


def read_lines(path):
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def parquet_rows(folder):
    return [row for part in sorted(folder.glob("*.parquet")) for row in pq.read_table(part).to_pylist()]


def plain(features):
    """A feature dictionary without what counts as missing: zeros, nulls, unseen values, feature 111."""
    return {k: v for k, v in features.items() if v not in (0, None) and not isinstance(v, str) and k != "111"}


# Files


def test_folders_hold_the_files_of_formats_md(folders):
    def names(path):
        return {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} - {"synthetic.json"}

    vectors = {"creative_emb/emb_81_32.pkl", "creative_emb/emb_82_1024/part-00000"}
    shared = {"indexer.pkl", "item_feat_dict.json"} | vectors
    assert names(folders / "jsonl") == shared | {"seq.jsonl", "seq_offsets.pkl"}
    answers = {"truth.json", "user_action_type.json"}
    extra = {"creative_emb/emb_82_1024/part-00001", "predict_seq.jsonl", "predict_seq_offsets.pkl", "predict_set.jsonl"}
    assert names(folders / "jsonl-eval") == shared | extra | answers
    vectors = {"mm_emb/emb_81_32_parquet", "mm_emb/emb_82_1024_parquet"}
    shared = {f"{n}/part-00000.parquet" for n in {"seq", "user_feat", "item_feat"} | vectors} | {"indexer.pkl"}
    assert names(folders / "parquet") == shared
    extra = {f"{n}/part-00001.parquet" for n in {"item_feat"} | vectors}
    assert names(folders / "parquet-eval") == shared | extra | answers | {"candidate/part-00000.parquet"}


def test_lines_have_one_profile_at_a_random_place_with_the_last_time(folders):
    lines = read_lines(folders / "jsonl" / "seq.jsonl")
    places = []
    for number, line in enumerate(lines, 1):
        assert {record[0] for record in line} == {number} and {len(record) for record in line} == {6}
        profiles = [k for k, record in enumerate(line) if record[1] is None]
        events = [record for record in line if record[1] is not None]
        assert len(profiles) == 1
        profile = line[profiles[0]]
        assert profile[3] is None and profile[4] is None and profile[5] == events[-1][5]
        assert all(r[2] is None and isinstance(r[3], dict) and r[4] in (EXPOSURE, CLICK) and 1 <= r[1] <= 400 for r in events)
        times = [r[5] for r in events]
        assert times == sorted(times) and START <= times[0] and times[-1] < START + 30 * DAY
        places.append((profiles[0], len(events)))
    assert len({place for place, _ in places}) > 5 and any(place == count for place, count in places)


def test_offsets_point_at_lines(folders):
    for folder, name in (("jsonl", "seq"), ("jsonl-eval", "predict_seq")):
        data = (folders / folder / f"{name}.jsonl").read_bytes()
        offsets = load_plain_pickle(folders / folder / f"{name}_offsets.pkl")
        assert offsets == [0] + [k + 1 for k, byte in enumerate(data[:-1]) if byte == 10]


def test_indexer_numbers_from_one_and_has_all_users(folders):
    for folder in ("jsonl", "parquet-eval"):
        indexer = load_plain_pickle(folders / folder / "indexer.pkl")
        assert list(indexer["u"].values()) == list(range(1, 101)) and indexer["u"]["user_00000061"] == 61
        assert sorted(indexer["i"].values()) == list(range(1, 401))
        assert all(isinstance(c, int) and 2**61 <= c < 2**62 for c in indexer["i"])
        assert set(indexer["f"]) == {f.id for f in TENCENT_GR.features if f.kind != "embedding"}
        assert all(sorted(v.values()) == list(range(1, len(v) + 1)) for v in indexer["f"].values())


def test_both_layouts_hold_the_same_sequences_and_features(folders):
    for suffix, name in (("", "seq"), ("-eval", "predict_seq")):
        lines = read_lines(folders / f"jsonl{suffix}" / f"{name}.jsonl")
        rows = parquet_rows(folders / f"parquet{suffix}" / "seq")
        profiles = parquet_rows(folders / f"parquet{suffix}" / "user_feat")
        assert len(lines) == len(rows) == len(profiles) == (40 if suffix else 60)
        for number, (line, row, features) in enumerate(zip(lines, rows, profiles, strict=True), 61 if suffix else 1):
            assert row["user_id"] == features.pop("user_id") == number
            assert line[0][0] == (f"user_{number:08d}" if suffix else number)
            assert [[r[1], r[4], r[5]] for r in line if r[1] is not None] == [list(event.values()) for event in row["seq"]]
            profile = next(r[2] for r in line if r[1] is None)
            assert plain(profile) == plain(features)
    items = json.loads((folders / "jsonl" / "item_feat_dict.json").read_text())
    rows = parquet_rows(folders / "parquet" / "item_feat")
    assert [int(k) for k in items] == [row.pop("item_id") for row in rows] == list(range(1, 401))
    assert [plain(v) for v in items.values()] == [plain(row) for row in rows]


def test_both_layouts_hold_the_same_candidates(folders):
    lines = read_lines(folders / "jsonl-eval" / "predict_set.jsonl")
    rows = parquet_rows(folders / "parquet-eval" / "candidate")
    indexer = load_plain_pickle(folders / "jsonl" / "indexer.pkl")["i"]
    assert len(lines) == len(rows) == 55
    unseen = 0
    for line, row in zip(lines, rows, strict=True):
        assert line["creative_id"] == row["creative_id"] and line["retrieval_id"] == row["retrieval_id"]
        assert row["reid_creative_id"] == indexer.get(line["creative_id"], 0)
        for name in ITEM_SINGLE:
            value = line["features"].get(name, 0)
            expected = None if value == 0 else {"feature_value": str(value), "is_str": int(isinstance(value, str))}
            assert row[name] == expected
            unseen += isinstance(value, str)
    assert unseen >= 5
    assert len({line["creative_id"] for line in lines}) == 55
    assert sum(line["creative_id"] not in indexer for line in lines) == 12  # 22 %


def test_both_layouts_hold_the_same_vectors(folders):
    for suffix in ("", "-eval"):
        pickled = load_plain_pickle(folders / f"jsonl{suffix}" / "creative_emb" / "emb_81_32.pkl")
        rows = {r["anonymous_cid"]: r["emb"] for r in parquet_rows(folders / f"parquet{suffix}" / "mm_emb" / "emb_81_32_parquet")}
        assert {str(k): v.tolist() for k, v in pickled.items()} == {k: v for k, v in rows.items() if v is not None}
        assert any(v is None for v in rows.values())
        paths = sorted((folders / f"jsonl{suffix}" / "creative_emb" / "emb_82_1024").iterdir())
        lines = [line for path in paths for line in read_lines(path)]
        rows = {r["anonymous_cid"]: r["emb"] for r in parquet_rows(folders / f"parquet{suffix}" / "mm_emb" / "emb_82_1024_parquet")}
        assert [r["anonymous_cid"] for r in lines] == list(rows)
        for line in lines:
            found, expected = line.get("emb"), rows[line["anonymous_cid"]]
            assert found is expected is None or np.array_equal(np.float32(found), np.float32(expected))
        assert {len(v) for v in rows.values() if v is not None} == {1024}
        assert all(np.float16(x) == x for x in next(v for v in rows.values() if v)[:50])
    assert 0.80 < len(load_plain_pickle(folders / "jsonl" / "creative_emb" / "emb_81_32.pkl")) / 400 < 0.93


def test_truth_is_in_the_world_and_mostly_among_the_candidates(folders):
    for layout in synthetic.LAYOUTS:
        truth = json.loads((folders / f"{layout}-eval" / "truth.json").read_text())
        actions = json.loads((folders / f"{layout}-eval" / "user_action_type.json").read_text())
        assert list(truth) == list(actions) == [f"user_{n:08d}" for n in range(61, 101)]
        assert set(actions.values()) <= {EXPOSURE, CLICK}
    candidates = {line["creative_id"] for line in read_lines(folders / "jsonl-eval" / "predict_set.jsonl")}
    assert 0.8 <= np.mean([creative in candidates for creative in truth.values()]) < 1
    lines = read_lines(folders / "jsonl-eval" / "predict_seq.jsonl")
    users = sample_users(build_world(400, 40, 3), "predict", 0, 40, max_length=20, mean_length=15)
    assert [len(line) - 1 for line in lines] == (users.counts - 1).tolist()  # the target is in truth.json only


def test_users_to_predict_meet_unknown_items_and_values(tmp_path):
    arguments = {"users": 10, "items": 600, "predict": 300, "seed": 1, "max_length": 30}
    for layout in synthetic.LAYOUTS:
        generate(tmp_path / layout, layout=layout, **arguments)
    indexer = load_plain_pickle(tmp_path / "jsonl" / "indexer.pkl")["i"]
    lines = read_lines(tmp_path / "jsonl-eval" / "predict_seq.jsonl")
    unknown = {r[1]: r[3] for line in lines for r in line if r[1] is not None and r[1] > 600}
    assert unknown and not set(unknown) & set(indexer) and min(unknown) >= 2**61
    assert any(isinstance(v, str) for features in unknown.values() for v in features.values())
    rows = {row.pop("item_id"): row for row in parquet_rows(tmp_path / "parquet-eval" / "item_feat")}
    assert {k: plain(v) for k, v in unknown.items()} == {k: plain(row) for k, row in rows.items() if k > 600}
    assert sum(isinstance(v, str) for line in lines for r in line if r[1] is None for v in r[2].values()) >= 2
    truth = json.loads((tmp_path / "jsonl-eval" / "truth.json").read_text())
    cold = sum(creative not in indexer for creative in truth.values())
    assert 1 <= cold <= 30


def test_some_items_and_users_have_no_features(tmp_path):
    generate(tmp_path / "d", users=2000, items=1000, layout="jsonl", max_length=3)
    items = json.loads((tmp_path / "d" / "item_feat_dict.json").read_text())
    assert items["1"] == {} and 1 <= sum(v == {} for v in items.values()) < 20
    profiles = [next(r[2] for r in line if r[1] is None) for line in read_lines(tmp_path / "d" / "seq.jsonl")]
    assert 1 <= profiles.count({}) < 30
    full = [v for v in items.values() if v]
    assert all("111" in v for v in full) and any(v["116"] == 0 for v in full) and any("114" not in v for v in full)


# Determinism


def same_files(one, other):
    files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file() and p.name != "synthetic.json")
    return files and all((one / f).read_bytes() == (other / f).read_bytes() for f in files)


def test_same_seed_same_bytes_and_another_seed_others(folders, tmp_path):
    generate(tmp_path / "again", layout="jsonl", **ARGUMENTS)
    assert same_files(folders / "jsonl", tmp_path / "again") and same_files(folders / "jsonl-eval", tmp_path / "again-eval")
    generate(tmp_path / "other", layout="jsonl", **(ARGUMENTS | {"seed": 4}))
    assert (folders / "jsonl" / "seq.jsonl").read_bytes() != (tmp_path / "other" / "seq.jsonl").read_bytes()


def test_training_data_do_not_depend_on_users_to_predict(folders, tmp_path):
    generate(tmp_path / "d", layout="jsonl", **(ARGUMENTS | {"predict": 0}))
    assert not (tmp_path / "d-eval").exists()
    for name in ("seq.jsonl", "item_feat_dict.json", "creative_emb/emb_81_32.pkl", "creative_emb/emb_82_1024/part-00000"):
        assert (folders / "jsonl" / name).read_bytes() == (tmp_path / "d" / name).read_bytes()


@pytest.mark.parametrize("layout", synthetic.LAYOUTS)
def test_worker_processes_change_nothing(tmp_path, monkeypatch, layout):
    arguments = {"users": CHUNK + 300, "items": 300, "layout": layout, "max_length": 3, "embeddings": (), "parts": 2}
    generate(tmp_path / "alone", **arguments)
    monkeypatch.setattr(synthetic, "PARALLEL_USERS", 1)
    generate(tmp_path / "together", **arguments)
    assert same_files(tmp_path / "alone", tmp_path / "together")
    if layout == "parquet":
        assert [row["user_id"] for row in parquet_rows(tmp_path / "together" / "seq")] == list(range(1, CHUNK + 301))
        assert len(list((tmp_path / "together" / "seq").iterdir())) == 2


# The planted structure


def test_shape_of_the_sequences(drawn):
    world, users = drawn
    kept = np.arange(100) < users.counts[:, None]
    assert users.counts.min() >= 5 and users.counts.max() == 100 and users.counts.mean() == pytest.approx(91.06, abs=1)
    assert (users.actions[kept] == CLICK).mean() == pytest.approx(0.0981, abs=0.004)
    rows = np.where(kept, users.items, -1 - np.arange(100))
    rows.sort(axis=1)
    assert (rows[:, 1:] == rows[:, :-1]).sum() / kept.sum() < 0.03
    assert (np.diff(users.times, axis=1)[pairs(users)] > 0).all()


def test_conversions_follow_the_second_round():
    users = sample_users(build_world(5000, seed=1), "users", 0, 2000, conversions=True)
    actions = users.actions[np.arange(100) < users.counts[:, None]]
    assert (actions == CLICK).mean() == pytest.approx(0.0285, abs=0.003)
    assert (actions == CONVERSION).mean() == pytest.approx(0.0252, abs=0.003)


def test_order_a_user_goes_round_his_cycle(drawn):
    world, users = drawn
    subs, both = sub_at(world, users), pairs(users)
    short = both & (np.diff(users.times, axis=1) < 600) & (users.actions[:, :-1] == EXPOSURE)
    short[:, 1:] &= np.diff(users.times, axis=1)[:, :-1] < 600
    interests = world.interests[users.types]
    rows, columns = np.nonzero(short)
    place = users.cycle[rows, columns].astype(int)
    way = planted.direction(users.times[rows, columns])
    expected = interests[rows, (place + way) % interests.shape[1]]
    against = interests[rows, (place - way) % interests.shape[1]]
    following = subs[rows, columns + 1]
    assert (following == expected).mean() > 0.65 and (following == against).mean() < 0.1  # the hour decides the way


def test_order_items_have_successors(drawn):
    world, users = drawn
    places = world.sub_start[sub_at(world, users)] + world.offset_of[users.items]
    both = pairs(users)
    follows = (places[:, 1:] == successor(places[:, :-1]))[both].mean()
    other = (places[:, 1:] == successor(places[:, :-1]) + 3)[both].mean()
    assert follows > 0.03 and follows > 4 * other


def test_action_a_click_keeps_the_sub_cluster(drawn):
    world, users = drawn
    subs, both = sub_at(world, users), pairs(users) & (np.diff(users.times, axis=1) < 600)
    stays = subs[:, 1:] == subs[:, :-1]
    clicked = users.actions[:, :-1] == CLICK
    assert stays[both & clicked].mean() > 0.8 and stays[both & ~clicked].mean() < 0.25


def test_time_a_long_gap_leads_home(drawn):
    world, users = drawn
    subs, gaps, both = sub_at(world, users), np.diff(users.times, axis=1), pairs(users)
    is_home = subs[:, 1:] == world.interests[users.types][:, :1]
    assert is_home[both & (gaps > planted.LONG_GAP)].mean() > 0.7
    assert is_home[both & (gaps < 600)].mean() < 0.4


def test_time_items_are_short_lived():
    world = build_world(95_000, seed=2)
    users = sample_users(world, "users", 0, 8192)
    kept = np.arange(100) < users.counts[:, None]
    day, items = ((users.times - START) // DAY)[kept], users.items[kept]
    active = [np.unique(items[day == d]) for d in range(30)]

    def overlap(apart):
        return [len(np.intersect1d(a, b)) / len(np.union1d(a, b)) for a, b in zip(active, active[apart:], strict=False)]

    assert max(overlap(1)[5:]) < 0.3 and max(overlap(3)[5:]) < 0.1


def test_features_tell_the_sub_cluster_and_the_user_type(drawn):
    world, users = drawn
    table = item_features(world)
    assert (table[0] == 0).all() and table.min() >= 0

    def purity(values, groups):
        """How often a value is the commonest one of its group; missing ones apart."""
        there = values > 0
        pairs_found, counts = np.unique(np.stack([groups[there], values[there]]), axis=1, return_counts=True)
        best = np.zeros(groups.max() + 1)
        np.maximum.at(best, pairs_found[0], counts)
        return best.sum() / there.sum()

    for name, least in (("115", 0.9), ("117", 0.85)):
        values = table[1:, ITEM_SINGLE.index(name)]
        assert purity(values, world.sub_of[1:]) > least
        assert purity(values, np.random.default_rng(0).permutation(world.sub_of[1:])) < 0.3
    assert purity(table[1:, ITEM_SINGLE.index("114")], world.sub_of[1:]) < 0.1  # noise
    pair = table[1:, ITEM_SINGLE.index("121")]
    assert 0.4 < len(np.unique(pair)) / 20_000 < 0.55
    assert purity(users.single[:, 0], users.types) > 0.7
    likes = users.multi["107"]
    assert likes.min() == 0 and likes.max() <= 19
    assert all(len(set(row) - {0}) == sum(v > 0 for v in row) for row in likes.tolist())


def test_vectors_are_nearest_to_their_own_sub_cluster(drawn):
    world, _ = drawn
    ids, vectors = zip(*[(i, v) for i, v, _ in embedding_pieces(world, TENCENT_GR["81"])], strict=True)
    ids, vectors = np.concatenate(ids), np.concatenate(vectors)
    assert (np.diff(ids) > 0).all() and 0.86 < len(ids) / 20_000 < 0.88
    sub = world.sub_of[ids]
    centres = np.stack([vectors[sub == s].mean(axis=0) for s in range(world.num_subs)])
    nearest = ((vectors[:2000, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == sub[:2000]).mean() > 0.95


@pytest.mark.parametrize(("name", "low", "high"), [("83", 0.82, 0.92), ("85", 0.3, 0.399)])
def test_coverage_of_the_wide_vectors(name, low, high):
    world = build_world(600, seed=1)
    covered = [len(i) for i, v, _ in embedding_pieces(world, TENCENT_GR[name]) if v.shape[1] == TENCENT_GR[name].width]
    assert low < sum(covered) / 600 < high


def test_world_scales_with_the_items():
    small, large = build_world(95_000), build_world(950_000)
    assert large.num_subs == pytest.approx(10 * small.num_subs, rel=0.02)
    for world in (small, large):
        assert 10 <= np.percentile(world.window, 5) and np.percentile(world.window, 95) <= 40
    for world in (small, large, build_world(24)):
        assert all(len(set(row)) == len(row) for row in world.interests.tolist())
        assert sorted(world.item_at.tolist()) == list(range(1, world.num_items + 1)) if world.num_items < 1e5 else True
        assert len(np.unique(world.creative_ids)) == len(world.creative_ids)


# The ceiling


def test_ceiling_lies_well_above_what_followed_most_often(drawn):
    world, users = drawn
    world = build_world(20_000, 600, 5)
    found = ceiling(world, 600)
    known_time = ceiling(world, 600, know_time=True)
    assert found["num_users"] == 600 and 0.4 < found["hr@10"] < 0.8 and found["ndcg@10"] < found["hr@10"]
    assert known_time["hr@10"] >= found["hr@10"]
    pool = ceiling(world, 600, only_candidates=True)
    assert pool["hr@10"] > found["hr@10"]
    last = users.counts - 1
    rows = np.arange(len(last))
    places = users.items[rows, last]
    popular = np.bincount(users.items[:, 0]).argsort()[-10:]
    assert found["hr@10"] > 5 * np.isin(places, popular).mean()


def test_next_places_are_calibrated():
    """For honest chances p, the mean chance of what came is the mean of sum(p ** 2); and nothing outside the windows has any."""
    world = build_world(20_000, seed=5)
    users = sample_users(world, "predict", 0, 1500, max_length=8)  # short: redrawing seen items, left out, hardly matters
    places = world.sub_start[world.sub_of[users.items]] + world.offset_of[users.items]
    came, expected = [], []
    for row in range(1500):
        found, chances = planted.next_places(world, users, places, row, know_time=True)
        end = int(users.counts[row]) - 1
        assert (np.diff(found) > 0).all() and chances.min() >= 0 and 0.85 < chances.sum() < 1 + 1e-9
        sub = np.searchsorted(world.sub_start, found, side="right") - 1
        low = planted.window_start(world, sub, np.full(len(sub), users.times[row, end]))
        assert chances[(found < low) | (found >= low + world.window[sub])].sum() == 0
        came.append(chances[found == places[row, end]].sum())
        expected.append((chances**2).sum())
    assert np.mean(came) == pytest.approx(np.mean(expected), rel=0.15)


def test_planted_ceiling_reads_the_folder(folders):
    expected = ceiling(build_world(400, 40, 3), 40, max_length=20, mean_length=15)
    assert synthetic.planted_ceiling(folders / "parquet-eval") == synthetic.planted_ceiling(folders / "jsonl") == expected


# Mistakes


@pytest.mark.parametrize(("change", "part"), [
    ({"users": 0}, "--users: 0; expected a whole number from 1"), ({"items": 23}, "--items: 23"), ({"users": True}, "--users: True"),
    ({"predict": -1}, "--predict: -1"), ({"seed": -1}, "--seed: -1"), ({"max_length": 1}, "--max_length: 1"),
    ({"parts": -2}, "--parts: -2"),
    ({"layout": "csv"}, "--layout: 'csv'; expected jsonl or parquet"), ({"embeddings": ["80"]}, "--embeddings: '80'"),
    ({"mean_length": 101}, "--mean_length: 101"), ({"mean_length": 0}, "--mean_length: 0"),
])  # fmt: skip
def test_wrong_arguments(tmp_path, change, part):
    with pytest.raises(UserError) as error:
        generate(tmp_path / "d", **({"users": 5, "items": 100, "layout": "jsonl"} | change))
    assert part in str(error.value) and list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    arguments = {"users": 5, "items": 100, "layout": "jsonl", "max_length": 3, "embeddings": ()}
    mine = tmp_path / "mine"
    mine.mkdir()
    generate(mine, **arguments)  # empty: fine
    with pytest.raises(UserError, match="--overwrite"):
        generate(mine, **arguments)
    before = (mine / "seq.jsonl").read_bytes()
    generate(mine, overwrite=True, **(arguments | {"seed": 9}))
    assert (mine / "seq.jsonl").read_bytes() != before
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="left alone"):
        generate(tmp_path / "theirs", overwrite=True, **arguments)
    (tmp_path / "new-eval").mkdir()
    (tmp_path / "new-eval" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="new-eval: there is something"):
        generate(tmp_path / "new", predict=3, **arguments)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "new-eval", "theirs"]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(synthetic, "write_pickle", full)
    with pytest.raises(RunError, match="no space left"):
        generate(tmp_path / "d", 5, 100, "jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_fails_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "PARALLEL_USERS", 1)
    for program in ("/bin/false", "/bin/true"):  # one that fails, one that ends without its tasks done
        monkeypatch.setattr(sys, "executable", program)
        with pytest.raises(RunError, match="a process that writes sequences failed"):
            generate(tmp_path / "d", CHUNK + 1, 100, "jsonl", max_length=2, embeddings=())
        assert list(tmp_path.iterdir()) == []


def test_load_spec_and_ceiling_name_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="not the arguments of a synthetic data set"):
        synthetic.load_spec(tmp_path)
    generate(tmp_path / "d", 5, 100, "jsonl", max_length=3, embeddings=())
    assert synthetic.load_spec(tmp_path / "d") == synthetic.Spec(5, 100, "jsonl", embeddings=(), max_length=3, mean_length=3.0)
    with pytest.raises(UserError, match="made without --predict"):
        synthetic.planted_ceiling(tmp_path / "d")


def test_command_line(tmp_path, capsys):
    flags = ["--users", "5", "--items", "100", "--layout", "parquet", "--predict", "4", "--max_length", "4"]
    synthetic.main([str(tmp_path / "d"), *flags, "--ceiling"])
    printed = capsys.readouterr().out
    assert "users to predict written" in printed and "ceiling over candidates: hr@10" in printed
    with pytest.raises(UserError, match="--ceiling"):
        synthetic.main([str(tmp_path / "e"), *flags[:6], "--ceiling"])


def test_pickles_are_plain(folders):
    for path in folders.rglob("*.pkl"):
        assert isinstance(load_plain_pickle(path), dict | list)


def test_the_store_compiles_both_layouts_to_equal_arrays(folders, tmp_path):
    store = pytest.importorskip("store", reason="store.py is not there yet")
    for suffix, kind in (("", "train"), ("-eval", "predict")):
        options = {"kind": kind, "embeddings": ("81",), "progress": False, "log": lambda _: None}
        opened = [store.open_store(folders / f"{layout}{suffix}", tmp_path / layout, **options) for layout in synthetic.LAYOUTS]
        assert store.content_hash(opened[0]) == store.content_hash(opened[1])
        one, other = (s.embedding("81") for s in opened)
        assert np.array_equal(one.matrix, other.matrix) and np.array_equal(one.row_of_item, other.row_of_item)
        assert opened[0].summary["rejected"] == 0 and not opened[0].summary["differences"]


def test_more_users_to_predict_than_items(tmp_path):
    generate(tmp_path / "data", users=60, items=300, layout="parquet", predict=400, seed=2)
    store = open_store(tmp_path / "data-eval", tmp_path / "cache", kind="predict", progress=False, log=lambda text: None)
    assert store.num_users == 400 and len(np.unique(store.candidate_item_ids)) == len(store.candidate_item_ids) > 300
