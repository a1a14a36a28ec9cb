"""features.py: the joint table's layout, hashing, and which rows each thing gathers, against loops over the store's values."""

import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import chdir
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies
from test_trainer import make_trainer
from tiny import tiny_store

import checkpoint as checkpoints
import infer
from config import Config, ModelConfig, with_values
from dataset import make_splits, predict_split
from errors import UserError
from evaluate import Ranker
from features import FeatureColumns, Field, TableLayout, TablePart, auto_width, hashed_rows
from logger import RunLogger
from runs import RunPaths
from store import open_store
from synthetic import generate
from trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"hidden_units": 16, "num_heads": 2}


def layout_of(store, **values) -> TableLayout:
    return TableLayout.from_store(store, with_values(Config(), **(SMALL | values)).model)


def field(name="item_id", size=5, width=3, values=0, hash_number=0, kind="single", offset=0) -> Field:
    return Field(name, "item", kind, offset, size, width, values or size, hash_number)


# ---- the layout ----


def test_a_layout_by_hand():
    layout = TableLayout((Field("item_id", "item", "single", 0, 5, 3, 5),))
    assert layout.num_rows == 6 and layout.parts == (TablePart(0, 6, 3),)
    layout = TableLayout((Field("item_id", "item", "single", 0, 5, 4, 5), Field("tags", "item", "multi", 5, 3, 2, 3),
                          Field("age", "user", "single", 8, 2, 2, 2), Field("likes", "user", "multi", 10, 1, 1, 1)))  # fmt: skip
    assert layout.num_rows == 12
    assert layout.parts == (TablePart(0, 6, 4), TablePart(6, 11, 2), TablePart(11, 12, 1))  # tags and age are as wide: one part
    assert [f.name for f in layout.side("user")] == ["age", "likes"]
    assert TableLayout(()).parts == (TablePart(0, 1, 1),) and TableLayout(()).num_rows == 1


def test_the_default_layout_is_one_part_of_all_features_in_order():
    layout = layout_of(tiny_store())
    assert [(f.name, f.side, f.kind, f.offset, f.size) for f in layout.fields] == [
        ("item_id", "item", "single", 0, 20), ("colour", "item", "single", 20, 3), ("tags", "item", "multi", 23, 5),
        ("age", "user", "single", 28, 4), ("likes", "user", "multi", 32, 3),
    ]  # fmt: skip
    assert all((f.width, f.values, f.hash, f.label) == (16, f.size, 0, f.name) for f in layout.fields)
    assert layout.parts == (TablePart(0, 36, 16),)
    assert {f.width for f in layout_of(tiny_store(), embedding_dim=8).fields} == {8}


def test_user_id_and_features_without_values():
    store = tiny_store(num_users=12)
    store.cardinalities = store.cardinalities | {"age": 0}
    layout = layout_of(store, user_id=True)
    assert [(f.name, f.size) for f in layout.side("user")] == [("user_id", 12), ("likes", 3)]
    assert layout.fields[-1].offset + layout.fields[-1].size + 1 == layout.num_rows


@pytest.mark.parametrize(("rows", "most", "width"), [
    (1, 64, 4), (2, 64, 8), (6, 64, 8), (16, 64, 8), (17, 64, 16), (256, 64, 16), (257, 64, 32), (4096, 64, 32), (90709, 256, 128),
    (90709, 64, 64), (6, 5, 5), (1 << 20, 256, 128), ((1 << 20) + 1, 256, 256), (0, 64, 4),
])  # fmt: skip
def test_auto_width_by_hand(rows, most, width):
    """4 * 6 ** (1/4) = 6.26, 4 * 90709 ** (1/4) = 69.4: the power of two above; exact powers stay."""
    assert auto_width(rows, most) == width


def test_auto_widths_order_each_side_wide_ones_first():
    store = tiny_store()
    store.cardinalities = {"colour": 300, "tags": 5, "age": 200, "likes": 1}
    layout = layout_of(store, feature_width="auto", embedding_dim=32)
    assert [(f.name, f.width, f.offset) for f in layout.fields] == [
        ("colour", 32, 0), ("item_id", 16, 300), ("tags", 8, 320), ("age", 16, 325), ("likes", 4, 525)]  # fmt: skip
    parts = ((0, 301, 32), (301, 321, 16), (321, 326, 8), (326, 526, 16), (526, 527, 4))  # equal widths apart are parts of their own
    assert layout.parts == tuple(TablePart(*part) for part in parts)


def test_hash_tables_stand_for_a_feature():
    store = tiny_store()
    layout = layout_of(store, hash_rows=[7, 5], hashed_features=["item_id", "tags"], user_id=True)
    assert [(f.label, f.offset, f.size, f.values, f.hash) for f in layout.side("item")] == [
        ("item_id#1", 0, 7, 20, 1), ("item_id#2", 7, 5, 20, 2), ("colour", 12, 3, 3, 0), ("tags#1", 15, 7, 5, 1),
        ("tags#2", 22, 5, 5, 2)]  # fmt: skip
    assert layout.num_rows == 1 + 7 + 5 + 3 + 7 + 5 + 12 + 4 + 3
    layout = layout_of(store, hash_rows=[5], hashed_features=["user_id"], user_id=True)
    assert next((f.label, f.size, f.values) for f in layout.side("user")) == ("user_id#1", 5, 12)
    assert layout_of(store, hash_rows=[], hashed_features=["tags"]) == layout_of(store)
    assert layout_of(store, hash_rows=[7], hashed_features=[]) == layout_of(store)
    narrow = layout_of(store, hash_rows=[300, 2], feature_width="auto")
    assert [(f.label, f.width) for f in narrow.side("item")] == [("item_id#1", 16), ("item_id#2", 8), ("colour", 8), ("tags", 8)]


def lines_of(make) -> list[str]:
    with pytest.raises(UserError) as caught:
        make()
    return str(caught.value).splitlines()


def test_a_hashed_feature_that_is_none_is_an_error():
    store = tiny_store()
    found = lines_of(lambda: layout_of(store, hash_rows=[7], hashed_features=["item_id", "item", "tag"]))
    assert found == [
        "model.hashed_features: 'item' is no feature with values in this data; the nearest are item_id, likes, age.",
        "model.hashed_features: 'tag' is no feature with values in this data; the nearest are tags, age, item_id.",
    ]
    assert lines_of(lambda: layout_of(store, hash_rows=[7], hashed_features=["user_id"])) == [
        "model.hashed_features: 'user_id' is no feature with values in this data; users have a vector with model.user_id true only."
    ]
    store.cardinalities = store.cardinalities | {"tags": 0}
    (line,) = lines_of(lambda: layout_of(store, hash_rows=[7], hashed_features=["tags"]))
    assert line.startswith("model.hashed_features: 'tags' is no feature with values in this data; the nearest are ")
    (line,) = lines_of(lambda: layout_of(store, hash_rows=[7], hashed_features=["81"]))  # a dense vector has no rows
    assert "'81' is no feature with values" in line
    layout_of(store, hashed_features=["nonsense"])  # hash_rows is empty: said in a warning, and without effect


@pytest.mark.parametrize("values", [{}, {"feature_width": "auto", "embedding_dim": 32, "hash_rows": [7, 5], "hashed_features": ["tags"]}])
def test_checkpoint_round_trip(values):
    layout = layout_of(tiny_store(), **values)
    again = TableLayout.from_list(json.loads(json.dumps(layout.to_list())))
    assert again == layout and again.parts == layout.parts


def test_from_sizes_is_from_store():
    config = ModelConfig(hidden_units=16, hash_rows=[7], hashed_features=["tags"])
    sizes = [("item_id", "item", "single", 20), ("colour", "item", "single", 3), ("tags", "item", "multi", 5), ("age", "user", "single", 4),
             ("likes", "user", "multi", 3), ("none", "user", "single", 0)]  # fmt: skip
    assert TableLayout.from_sizes(sizes, config) == TableLayout.from_store(tiny_store(), config)


# ---- hashing ----

# Written down: a checkpoint's rows must mean the same values in each process and each version.
STABLE = [
    (1000, 1, [252, 365, 855, 221, 137]),
    (1000, 2, [965, 926, 545, 22, 427]),
    (1 << 20, 1, [1024620, 821965, 175671, 398181, 123465]),
    (7, 3, [7, 4, 4, 1, 6]),
]
VALUES = np.array([1, 2, 3, 1000, 2**31 - 1])


@pytest.mark.parametrize(("size", "number", "rows"), STABLE)
def test_hashes_are_stable(size, number, rows):
    assert hashed_rows(VALUES, field(size=size, hash_number=number)).tolist() == rows


def test_hashes_are_the_same_in_another_process():
    code = f"""if True:
        import numpy as np
        from features import Field, hashed_rows
        for size, number, rows in {STABLE}:
            assert hashed_rows(np.array({VALUES.tolist()}), Field("x", "item", "multi", 9, size, 4, 10**9, number)).tolist() == rows"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "7"}, check=True)


def splitmix(*words: int) -> int:
    """counter_hash in Python's whole numbers."""
    state = 0
    for word in words:
        state = ((state ^ word) + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state


@settings(max_examples=100, deadline=None)
@given(strategies.lists(strategies.integers(1, 2**31 - 1), min_size=1), strategies.integers(1, 2**31 - 1), strategies.integers(1, 4))
def test_hashes_are_splitmix_in_the_fields_rows(values, size, number):
    rows = hashed_rows(np.array(values, dtype=np.int32), field(size=size, hash_number=number))
    assert rows.dtype == np.int32 and rows.tolist() == [1 + splitmix(5, number, value) % size for value in values]
    assert rows.min() >= 1 and rows.max() <= size


def test_hashes_fill_their_rows_evenly_and_two_functions_are_independent():
    values, size = np.arange(1, 50_001), 100
    first, second = (hashed_rows(values, field(size=size, hash_number=number)) for number in (1, 2))
    for rows in (first, second):
        counts = np.bincount(rows - 1, minlength=size)  # 500 a row: chi-squared of 99 degrees is below 160 but once in 10,000 keys
        assert ((counts - 500) ** 2 / 500).sum() < 160
    pairs = np.bincount((first - 1) * size + second - 1, minlength=size * size)  # 5 a cell; 9,999 degrees: 10,527 is 3.7 sigma
    assert ((pairs - 5) ** 2 / 5).sum() < 10_527
    assert 350 < (first == second).sum() < 650


# ---- what is gathered ----

LAYOUTS = [
    {},
    {"user_id": True},
    {"feature_width": "auto", "embedding_dim": 32},
    {"user_id": True, "hash_rows": [7, 5], "hashed_features": ["item_id", "tags", "user_id", "likes"]},
    {"hash_rows": [300, 3], "hashed_features": ["item_id", "colour"], "feature_width": "auto"},
]


def rows_of(layout, side, values) -> Counter:
    """{row of the joint table: weight} that the values {feature: list} of one thing ask for, without row 0."""
    found: Counter = Counter()
    for f in layout.side(side):
        for value in values[f.name]:
            if 1 <= value <= f.values:
                row = 1 + splitmix(5, f.hash, value) % f.size if f.hash else value
                found[f.offset + row] += 1 / len(values[f.name])
    return found


def values_of(store, side, place) -> dict:
    if side == "item":
        item_id = place if place <= store.num_known_items else 0
        return {"item_id": [item_id], "colour": [int(store.item_single[place, 0])], "tags": store.item_multi["tags"].rows[place]}
    user = int(store.user_ids[place])
    return {"user_id": [user], "age": [int(store.user_single[place, 0])], "likes": store.user_multi["likes"].rows[place]}


def bag_of(inputs, thing) -> Counter:
    bags, found = inputs.bags, Counter()
    for place in range(int(bags.offsets[thing]), int(bags.offsets[thing + 1])):
        row = int(inputs.rows[bags.index[place]])
        if row:
            found[row] += 1.0 if bags.weights is None else float(bags.weights[place])
    return found


def assert_equal_bags(found: Counter, expected: Counter) -> None:
    assert set(found) == set(expected) and all(found[row] == pytest.approx(expected[row], rel=1e-6) for row in found)


def gathered(store, side, **values):
    columns = FeatureColumns(store, layout_of(store, **values), ())
    places = np.array([0, 9, 3, 13, 3, 18, 20, 2]) if side == "item" else np.array([4, 1, 11, 5, 1])
    return columns, places, getattr(columns, f"{side}s")(places, transposed=True)


@pytest.mark.parametrize("side", ["item", "user"])
@pytest.mark.parametrize("values", LAYOUTS, ids=str)
def test_each_thing_gathers_the_rows_of_its_values(values, side):
    store = tiny_store()
    store.num_known_items = 17  # 18 and 20 are unseen in training
    store.item_single[13, 0] = 9  # and so is this value
    columns, places, inputs = gathered(store, side, **values)
    assert inputs.bags.index.dtype == inputs.bags.offsets.dtype == torch.int32 and len(inputs.bags.offsets) == len(places) + 1
    for thing, place in enumerate(places.tolist()):
        assert_equal_bags(bag_of(inputs, thing), rows_of(columns.layout, side, values_of(store, side, place)))


@pytest.mark.parametrize("side", ["item", "user"])
@pytest.mark.parametrize("values", LAYOUTS, ids=str)
def test_unique_rows_ascend_in_a_segment_a_field(values, side):
    columns, places, inputs = gathered(tiny_store(), side, **values)
    rows, fields = inputs.rows.tolist(), columns.layout.side(side)
    assert rows == sorted(set(rows)) and rows[0] == 0 and inputs.segments[0] == 1 and inputs.segments[-1] == len(rows)
    assert len(inputs.segments) == len(fields) + 1
    for number, f in enumerate(fields):
        segment = rows[inputs.segments[number] : inputs.segments[number + 1]]
        assert all(f.offset < row <= f.offset + f.size for row in segment)
    used = set().union(*(bag_of(inputs, thing) for thing in range(len(places))))
    assert set(rows) == used | {0}


def assert_transposed(inputs) -> None:
    """things, starts and weights rebuilt from index, offsets and weights: the uses of each row in the things' order."""
    bags = inputs.bags
    index, num_rows = bags.index.numpy(), len(inputs.rows)
    things = np.repeat(np.arange(len(bags.offsets) - 1), np.diff(bags.offsets.numpy()))
    order = np.lexsort((things, index))
    order = order[index[order] > 0]
    assert bags.things.dtype == bags.starts.dtype == torch.int32
    assert bags.starts.tolist() == [0, *np.cumsum(np.bincount(index[order], minlength=num_rows)).tolist()]
    assert bags.things.tolist() == things[order].tolist()
    assert (bags.thing_weights is None) == (bags.weights is None)
    if bags.weights is not None:
        assert bags.thing_weights.tolist() == bags.weights.numpy()[order].tolist()


@pytest.mark.parametrize("side", ["item", "user"])
@pytest.mark.parametrize("values", LAYOUTS, ids=str)
def test_transposed_lists_are_the_bags_read_the_other_way(values, side):
    store = tiny_store()
    store.num_known_items = 17
    columns, places, inputs = gathered(store, side, **values)
    assert_transposed(inputs)
    plain = getattr(columns, f"{side}s")(places)
    assert plain.bags.things is plain.bags.starts is plain.bags.thing_weights is None
    assert torch.equal(plain.bags.index, inputs.bags.index) and torch.equal(plain.rows, inputs.rows) and plain.segments == inputs.segments


@pytest.mark.parametrize("transposed", [False, True])
def test_transposed_lists_of_a_field_of_more_than_65536_rows(transposed):
    store = tiny_store(num_items=66_000, num_users=3)
    columns = FeatureColumns(store, layout_of(store), ())
    ids = np.random.default_rng(0).permutation(66_001)  # not the catalogue's order: the radix passes have something to sort
    ids = np.concatenate([ids, ids[:5000]])
    inputs = columns.items(ids, transposed=transposed)
    assert inputs.segments[1] - inputs.segments[0] == 66_000 > 1 << 16
    assert (inputs.rows.diff() > 0).all()
    item_rows = inputs.rows[inputs.bags.index[inputs.bags.offsets[:-1].long()].long()]
    assert torch.equal(item_rows, torch.from_numpy(ids))
    if transposed:
        assert_transposed(inputs)


def test_single_valued_features_have_no_weights():
    store = tiny_store()
    store.cardinalities = store.cardinalities | {"tags": 0}
    columns = FeatureColumns(store, layout_of(store), ())
    inputs = columns.items(np.array([0, 3, 3, 7]), transposed=True)
    assert inputs.bags.weights is None and inputs.bags.offsets.tolist() == [0, 2, 4, 6, 8]
    assert_transposed(inputs)


def test_a_side_without_features_and_one_of_empty_lists():
    store = tiny_store()
    store.cardinalities = store.cardinalities | {"age": 0, "likes": 0}
    inputs = FeatureColumns(store, layout_of(store), ()).users(np.array([1, 2]), transposed=True)
    assert inputs.rows.tolist() == [0] and inputs.segments == (1,) and inputs.bags.offsets.tolist() == [0, 0, 0]
    store.cardinalities = store.cardinalities | {"likes": 3}
    inputs = FeatureColumns(store, layout_of(store), ()).users(np.array([2, 4]), transposed=True)  # neither likes anything
    assert inputs.rows.tolist() == [0] and inputs.segments == (1, 1) and inputs.bags.index.numel() == 0
    assert inputs.bags.starts.tolist() == [0, 0]


def test_the_whole_catalogue_is_gathered_once_in_each_form():
    store = tiny_store()
    columns = FeatureColumns(store, layout_of(store), ("81",))
    ids = np.arange(21)
    plain, transposed = columns.items(ids), columns.items(ids, transposed=True)
    assert columns.items(ids) is plain and columns.items(ids, transposed=True) is transposed
    assert plain.bags.things is None and transposed.bags.things is not None
    assert columns.items(ids[:-1]) is not plain
    column = store.embedding("81")
    assert torch.equal(plain.dense[0].present, torch.from_numpy(column.row_of_item > 0))
    assert torch.equal(plain.dense[0].values, torch.from_numpy(column.matrix[column.row_of_item]))


def test_gather_is_both_sides():
    store = tiny_store()
    columns = FeatureColumns(store, layout_of(store), ())
    both = columns.gather(np.array([0, 3, 5]), np.array([2, 1]), transposed=True)
    assert torch.equal(both.items.rows, columns.items(np.array([0, 3, 5])).rows) and both.items.bags.things is not None
    assert torch.equal(both.users.rows, columns.users(np.array([2, 1])).rows) and both.users.bags.things is not None
    assert columns.gather(np.array([0]), np.array([0])).users.bags.things is None


# ---- a trained model with hash tables ----

HASHED = {"hash_rows": [23, 17], "hashed_features": ["item_id", "user_id", "121", "106"], "user_id": True, "feature_width": "auto"}


def test_a_hashed_model_answers_the_same_after_checkpoint_and_infer(tmp_path):
    """Ranked by the trainer's own model and layout, and by infer(), which has the layout from meta.json."""
    generate(tmp_path / "data", 80, 120, "jsonl", predict=30, seed=3, max_length=12, mean_length=8)
    values = {"hidden_units": 16, "num_blocks": 1, "max_seq_length": 12, "batch_size": 16, "num_epochs": 2, "num_negatives": 32,
              "learning_rate": 0.01, "baselines": False, "tensorboard": False, "num_workers": 0}  # fmt: skip
    config = with_values(Config(), **values, **HASHED)
    store = open_store(tmp_path / "data", tmp_path / "cache", kind="train", embeddings=("81",))
    run = RunPaths(tmp_path / "run", tmp_path / "tb", tmp_path / "run", "run", resume_from=None)
    (tmp_path / "run").mkdir()
    splits = make_splits(store, protocol="holdout", holdout_fraction=0.2, target="last", seed=1)
    layout = TableLayout.from_store(store, config.model)
    assert [f.label for f in layout.fields if f.hash] and {f.name for f in layout.fields if f.hash} == set(HASHED["hashed_features"])
    trainer = Trainer(config, store, layout, ("81",), splits, run, RunLogger(tmp_path / "run", None, console=False), torch.device("cpu"))
    trainer.fit()
    saved = checkpoints.newest_valid(tmp_path / "run")
    predict = open_store(tmp_path / "data-eval", tmp_path / "cache", kind="predict", embeddings=("81",))
    columns, candidates = FeatureColumns(predict, layout, ("81",)), np.asarray(predict.candidate_item_ids)
    ranker = Ranker(trainer.model, columns, candidates, device=torch.device("cpu"), batch_size=64)
    expected = infer.creative_ids(predict, ranker.rank(predict_split(predict), 10, remove_seen=True, fill=True).topk_ids)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("EVAL_", "MODEL_", "USER_CACHE"))}
    given_paths = {
        "MODEL_OUTPUT_PATH": str(saved),
        "EVAL_DATA_PATH": str(tmp_path / "data-eval"),
        "USER_CACHE_PATH": str(tmp_path / "cache"),
    }
    with chdir(tmp_path), mock.patch.dict(os.environ, clean | given_paths, clear=True):
        answers, users = infer.infer()
    assert len(users) == 30 and answers == expected and len({tuple(answer) for answer in answers}) > 10


def test_a_hashed_users_rows_are_trained(tmp_path):
    trainer = make_trainer(tmp_path, user_id=True, hash_rows=[7], hashed_features=["user_id"], num_epochs=1)
    (users,) = (f for f in trainer.layout.fields if f.name == "user_id")
    (table,) = trainer.model.table.parts
    before = table.clone()
    trainer.fit()
    changed = (table != before).any(dim=1)[users.offset + 1 : users.offset + 1 + users.size]
    assert users.size == 7 and users.values == 40 and changed.all()  # 40 users fall on all of 7 rows
