"""time_features.py: its buckets and waves by hand, causality, and the planted leak of the profile record's timestamp."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from raw_worlds import make_predict_world, make_world, write_jsonl
from test_evaluate import SPLIT, ranker
from test_model import make, run
from tiny import tiny_store

from config import Config, with_values
from dataset import make_splits, predict_split
from evaluate import Ranker, wanted_actions
from features import FeatureColumns, TableLayout
from model import Recommender
from store import content_hash, open_store
from time_features import PERIODS, SIZES, TimeFeatures, bucket, waves

ALL = ("gap", "hour", "weekday", "day", "fourier")
MONDAY = 1_700_438_400  # 2023-11-20 00:00 UTC, 19,681 days after 1970-01-01, a Thursday


def tensors(*columns):
    return (torch.tensor(column, dtype=torch.int64) for column in columns)


def test_buckets_by_hand():
    times, positions = tensors([0, MONDAY, MONDAY + 3600, MONDAY + 90_000, 0, MONDAY + 7, MONDAY + 6], [0, 1, 2, 3, 0, 1, 2])
    assert bucket("gap", times, positions).tolist() == [0, 0, 11, 16, 0, 0, 0]  # log2(3601), log2(86401); time never runs backwards
    assert bucket("hour", times, positions).tolist() == [0, 0, 1, 1, 0, 0, 0]
    assert bucket("weekday", times, positions).tolist()[1:4] == [4, 4, 5]
    assert bucket("day", times, positions).tolist()[1:4] == [19_681 % 1024, 19_681 % 1024, 19_682 % 1024]


@pytest.mark.parametrize("moment", [0, 1, MONDAY, 2**31, 2**40, -1, -(2**40)])
def test_no_time_is_out_of_range(moment):
    times, positions = tensors([0, moment, 2 * moment], [0, 1, 2])
    for name, size in SIZES.items():
        found = bucket(name, times, positions)
        assert 0 <= int(found.min()) and int(found.max()) < size
    assert TimeFeatures(4, 0.1, ALL)(times, positions).isfinite().all()


def test_waves_are_exact_where_float32_times_are_not():
    (times,) = tensors([MONDAY, MONDAY + 1, MONDAY + 43_200, 2**40 + 5])
    found = waves(times)
    assert found.shape == (4, 2 * len(PERIODS)) and found.dtype == torch.float32
    for row, time in zip(found.tolist(), times.tolist()):
        angles = [2 * math.pi * (time % period) / period for period in PERIODS]
        assert row == pytest.approx([*map(math.cos, angles), *map(math.sin, angles)], abs=1e-6)
    assert float(found[1, 4]) == pytest.approx(2 * math.pi / 86_400, rel=1e-3)  # a second after midnight


@pytest.mark.parametrize("fields", [("gap",), ("fourier",), ("day", "gap"), ("weekday", "fourier"), ALL], ids="+".join)
def test_the_sum_of_the_chosen_fields(fields):
    module = TimeFeatures(6, 0.5, fields)
    times, positions = tensors([0, MONDAY, MONDAY + 5000, 0, MONDAY + 9], [0, 1, 2, 0, 1])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    expected = torch.zeros(5, 6)
    for row in (1, 2, 4):
        for name in fields:
            if name == "fourier":
                expected[row] += waves(times[row : row + 1])[0] @ module.fourier
            else:
                expected[row] += getattr(module, name).weight[int(bucket(name, times, positions)[row])]
    torch.testing.assert_close(module(times, positions), expected.detach(), atol=1e-5, rtol=1e-5)
    names = {name.split(".")[0] for name, _ in module.named_parameters()}
    assert names == set(fields)


def test_a_day_without_training_events_adds_nothing():
    module = TimeFeatures(6, 0.5, ("day",))
    times, positions = tensors([0, MONDAY, MONDAY + 40 * 86_400], [0, 1, 2])
    assert (module(times, positions) == 0).all()
    (module(times[:2], positions[:2]) - 1).square().sum().backward()
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.1)
    optimizer.step()
    assert (module(times, positions)[1] != 0).all() and (module(times, positions)[2] == 0).all()


def test_initial_scale():
    torch.manual_seed(0)
    times, positions = tensors([MONDAY] * 2, [1, 2])
    for name in ("gap", "fourier"):
        assert float(TimeFeatures(20_000, 0.02, (name,))(times, positions)[0].detach().std()) == pytest.approx(0.02, rel=0.05)


def test_a_model_without_times_or_fields_has_none():
    assert make(time_fields=[])[1].time is None
    assert make(store=tiny_store(has_time=False), time_fields=ALL)[1].time is None
    assert make(time_fields=ALL, time_features=False)[1].time is None


def test_the_default_is_gap_hour_and_weekday():
    model = make()[1]
    assert [name for name, _ in model.time.named_parameters()] == ["gap.weight", "hour.weight", "weekday.weight"]
    assert "time.day.weight" in make(time_fields=["day"])[1].state_dict()


def test_a_time_reaches_no_earlier_query():
    store, model, columns = make(time_fields=ALL)
    with torch.no_grad():
        model.time.day.weight.normal_()
    length = int(store.user_offsets[1])
    _, before, _ = run(store, model, columns, [0])
    store.timestamps[length - 2] += 90_061
    _, after, _ = run(store, model, columns, [0])
    torch.testing.assert_close(before[:-2], after[:-2])
    assert not torch.allclose(before[-2], after[-2]) and not torch.allclose(before[-1], after[-1])


@pytest.mark.parametrize("wanted", ["any", "click"])
def test_time_and_action_of_the_event_to_find_are_not_read(wanted):
    store, model, columns = make(time_fields=ALL, action_conditioning="film")
    with torch.no_grad():
        model.conditioning.scale.normal_()
        model.conditioning.shift.normal_()
        model.time.day.weight.normal_()
    split = make_splits(store, **SPLIT).test

    def answers():
        return ranker(store, model, columns).rank(split, 10, True, wanted=wanted_actions(wanted, store, split))

    before = answers()
    store.timestamps[split.target] += 12_345_678
    store.action_types[split.target] = 2 - store.action_types[split.target]
    after = answers()
    assert (before.topk_ids == after.topk_ids).all() and (before.topk_scores == after.topk_scores).all() and before.loss == after.loss
    store.timestamps[split.target - 1] += 12_345_678  # an input: this one is
    assert (answers().topk_scores != before.topk_scores).any()


# ---- the planted leak: the profile record's timestamp is that of the event to predict ----


def plant(folder: Path, name: str, moment) -> None:
    """Rewrite the timestamp of every line's profile record by moment(line number, its events' times)."""
    lines = []
    for number, text in enumerate((folder / name).read_text().splitlines()):
        records = json.loads(text)
        times = [record[5] for record in records if record[1] is not None]
        for record in records:
            if record[1] is None:
                record[5] = moment(number, times)
        lines.append(json.dumps(records))
    (folder / name).write_text("\n".join(lines) + "\n")
    (folder / name).with_name(name.replace(".jsonl", "_offsets.pkl")).unlink()


def answers_of(folder: Path, cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """Item ids and scores that a random model with all time fields gives the users to predict."""
    store = open_store(folder, cache, kind="predict", progress=False, log=lambda _: None)
    config = with_values(Config(), hidden_units=16, num_heads=2, time_fields=ALL)
    layout = TableLayout.from_store(store, config.model)
    torch.manual_seed(0)
    model = Recommender(config.model, layout, {}, True)
    torch.nn.init.normal_(model.time.day.weight)
    columns = FeatureColumns(store, layout, ())
    found = Ranker(model, columns, np.asarray(store.candidate_item_ids), device=torch.device("cpu"), batch_size=16)
    ranking = found.rank(predict_split(store), 5, True)
    return ranking.topk_ids, ranking.topk_scores


@pytest.mark.parametrize("moment", [lambda k, times: 1_900_000_000 + 86_400 * k, lambda k, times: 0], ids=["future", "none"])
def test_the_profile_records_timestamp_is_not_used(tmp_path, moment):
    train = make_world(30, 40)
    worlds = {"seq.jsonl": (train, "train"), "predict_seq.jsonl": (make_predict_world(train, 20), "predict")}
    for name, (world, kind) in worlds.items():
        plain, planted = (write_jsonl(world, tmp_path / kind / which, predict=kind == "predict") for which in ("plain", "planted"))
        plant(planted, name, moment)
        assert (plain / name).read_text() != (planted / name).read_text()
        hashes = [content_hash(open_store(f, tmp_path / "cache", kind=kind, progress=False, log=lambda _: None)) for f in (plain, planted)]
        assert hashes[0] == hashes[1]
    for before, after in zip(answers_of(plain, tmp_path / "cache"), answers_of(planted, tmp_path / "cache")):
        assert (before == after).all()


def test_an_events_timestamp_is_used(tmp_path):
    """So the test above could fail."""
    world = make_predict_world(make_world(30, 40), 20)
    plain = write_jsonl(world, tmp_path / "plain", predict=True)
    for user in world.users:
        user["events"] = [(item, action, time + 86_400 * 3 + 7200) for item, action, time in user["events"]]
    moved = write_jsonl(world, tmp_path / "moved", predict=True)
    before, after = answers_of(plain, tmp_path / "cache"), answers_of(moved, tmp_path / "cache")
    assert (before[1] != after[1]).any()
