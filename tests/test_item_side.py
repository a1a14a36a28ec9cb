"""The item side: zero ids, id dropout, items without a trained id, hash tables, missing vectors; and cold candidates in rankings."""

import numpy as np
import pytest
import torch
from test_evaluate import SPLIT, ranker
from test_model import feature_blocks, make, run
from test_trainer import make_trainer
from tiny import tiny_store

from config import Config, with_values
from dataset import make_splits, predict_split
from embedding import JointTable
from ensemble import EnsembleRanker
from errors import UserError
from evaluate import trained_items, without_cold
from features import ITEM_ID, USER_ID, FeatureColumns, TableLayout, dropped_ids, hashed_rows


def rows_of(table: JointTable, layout: TableLayout, field):
    part = next(i for i, part in enumerate(layout.parts) if field.offset + 1 < part.end)
    first = field.offset + 1 - layout.parts[part].begin
    return table.parts[part][first : first + field.size]


# ---- initial vectors ----


@pytest.mark.parametrize(("settings", "zeros"), [
    ({}, ["item_id"]),
    ({"feature_width": "auto", "embedding_dim": 32}, ["item_id"]),
    ({"hash_rows": [7, 5]}, ["item_id#1", "item_id#2"]),
    ({"hash_rows": [7, 5], "hashed_features": ["item_id", "tags"], "user_id": True}, ["item_id#1", "item_id#2", "tags#1", "tags#2"]),
], ids=str)  # fmt: skip
def test_zero_ids(settings, zeros):
    store = tiny_store()
    layout = TableLayout.from_store(store, with_values(Config(), **settings).model)
    torch.manual_seed(0)
    normal = JointTable(layout, 0.02)
    torch.manual_seed(0)
    zero = JointTable(layout, 0.02, "zero")
    for field in layout.fields:
        rows = rows_of(zero, layout, field)
        if field.label in zeros:
            assert (rows == 0).all()
        else:
            assert torch.equal(rows, rows_of(normal, layout, field)) and (rows != 0).all()


def test_an_item_of_which_nothing_is_known_does_not_rule_the_gradient():
    """Its vector starts at zero, where a cosine's gradient has no bound."""
    store, model, columns = make(id_init="zero", item_tower="sum")
    with torch.no_grad():
        for part in model.table.parts:
            part.mul_(0.02)
    store.item_multi["tags"].rows[5], store.item_single[5] = [], 0
    inputs = columns.items(np.array([0, 5, 6]), True)
    found = torch.autograd.grad(model.encode_items(inputs).candidate.sum(), list(model.dense.parameters()))
    assert all(gradient.isfinite().all() and float(gradient.abs().max()) < 1e3 for gradient in found)


def test_zero_ids_learn(tmp_path):
    trainer = make_trainer(tmp_path, id_init="zero", max_steps=3)
    trainer.fit()
    (field,) = [field for field in trainer.layout.fields if field.name == ITEM_ID]
    rows = rows_of(trainer.model.table, trainer.layout, field)
    assert (rows[np.flatnonzero(trainer.item_counts[1:])] != 0).any(dim=1).float().mean() > 0.9


# ---- id dropout ----


def test_dropped_ids_are_a_function_of_their_counters():
    ids = np.arange(100_001)
    found = dropped_ids(ids, 0.2, seed=1, epoch=2, step=3)
    assert abs(found.mean() - 0.2) < 0.005 and (found == dropped_ids(ids, 0.2, seed=1, epoch=2, step=3)).all()
    shuffled = np.random.default_rng(0).permutation(ids)
    assert (dropped_ids(shuffled, 0.2, seed=1, epoch=2, step=3) == found[shuffled]).all()  # whatever else the batch holds
    for other in ({"seed": 2, "epoch": 2, "step": 3}, {"seed": 1, "epoch": 3, "step": 3}, {"seed": 1, "epoch": 2, "step": 4}):
        assert 0.3 < (dropped_ids(ids, 0.2, **other) != found).mean() < 0.34  # 2 x .2 x .8
    assert not dropped_ids(ids, 1e-12, seed=1, epoch=2, step=3).any()


@pytest.mark.parametrize("settings", [{}, {"hash_rows": [7, 5]}, {"item_tower": "sum"}], ids=str)
def test_a_dropped_id_gives_way_to_the_unknown_vector_on_both_sides(settings):
    store, model, columns = make(id_dropout=0.5, similarity="dot", item_activation="relu", **settings)
    torch.nn.init.normal_(model.unknown_id)
    ids = np.array([0, 3, 6, 7])
    dropped = np.array([True, False, True, False])
    found = model.encode_items(columns.items(ids, True, dropped))
    for row, item in enumerate(ids[1:], start=1):
        values = {"item_id": [] if dropped[row] else [item], "colour": [int(store.item_single[item, 0])],
                  "tags": store.item_multi["tags"].rows[item]}  # fmt: skip
        blocks = [block for _, block in feature_blocks(model, columns.layout, "item", values)]
        if "item_tower" in settings:
            expected = sum(blocks)
        else:
            weights = [matrix for part in model.item_projection.weights for matrix in part]
            expected = sum(block @ weight for block, weight in zip(blocks, weights, strict=True)) + model.item_bias
        column = store.embedding("81")
        dense = torch.from_numpy(column.matrix[column.row_of_item[item]]).float()
        projection = model.dense["81"]
        scaled = dense / (dense.square().mean() + 1e-6).sqrt()
        expected = expected + (projection.projection(scaled) if column.row_of_item[item] else projection.missing)
        expected = expected + (model.unknown_id if dropped[row] else 0)
        torch.testing.assert_close(found.candidate[row], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.history[row], expected.relu(), atol=1e-5, rtol=1e-5)


def test_padding_has_no_unknown_vector():
    _, model, columns = make(id_dropout=0.5)
    torch.nn.init.normal_(model.unknown_id)
    for dropped in (np.ones(2, dtype=bool), None):
        inputs = columns.items(np.array([0, 8]), dropped=dropped)
        assert inputs.no_id.tolist() == [False, True]  # 8 is not trained on


def test_items_without_training_events_have_no_id_in_evaluation():
    store, model, columns = make(id_dropout=0.5)
    assert columns.trained[[3, 5]].all() and not columns.trained[[4, 8]].any()
    ids = np.array([0, 3, 4, 5, 8])
    before = model.encode_items(columns.items(ids)).candidate
    (field,) = [field for field in columns.layout.fields if field.name == ITEM_ID]
    with torch.no_grad():
        rows_of(model.table, columns.layout, field).add_(1.0)
    after = model.encode_items(columns.items(ids)).candidate
    changed = (before != after).any(dim=1)
    assert changed.tolist() == [False, True, False, True, False]
    store.num_known_items = 4  # what the indexer does not know has none either
    assert columns.items(ids).no_id.tolist() == [False, False, True, True, True]
    assert columns.is_trained(ids).tolist() == [False, True, False, False, False]


def test_without_id_dropout_all_known_items_count_as_trained():
    store, _, columns = make()
    store.num_known_items = 10
    assert columns.trained is None and columns.is_trained(np.array([1, 10, 11])).tolist() == [True, True, False]
    assert columns.items(np.array([0, 3])).no_id is None


def test_a_model_of_dropped_ids_refuses_features_that_do_not_say_whose():
    _, model, columns = make(id_dropout=0.5)
    columns.trained = None
    with pytest.raises(AssertionError, match="whose ids are left out"):
        model.encode_items(columns.items(np.array([0, 3])))


@pytest.mark.parametrize("workers", [0, 3])
def test_training_drops_by_counters_and_notes_what_it_trained_on(tmp_path, workers):
    store = tiny_store(num_users=40, num_items=30, max_events=12)
    store.num_items = 33  # three items without any event
    store.num_known_items = 33
    store.item_single = np.concatenate([store.item_single, store.item_single[1:4]])
    store.item_multi["tags"].rows += [[], [1], [2]]
    store.embedding("81").row_of_item = np.concatenate([store.embedding("81").row_of_item, [0, 1, 2]]).astype(np.int32)
    trainer = make_trainer(tmp_path, store=store, id_dropout=0.5, num_workers=workers)
    trainer.order.start_epoch(0)
    batch, features = trainer._build(1)
    ids = batch.unique_ids.numpy()
    assert features.items.no_id.tolist() == (dropped_ids(ids, 0.5, seed=42, epoch=0, step=1) & (ids > 0)).tolist()
    trainer.fit()
    assert (trainer.model.unknown_id != 0).any()
    assert trainer.model.trained_items.tolist() == (trainer.item_counts > 0).tolist()
    assert not trainer.model.trained_items[[0, 31, 32, 33]].any() and trainer.model.trained_items[1:31].float().mean() > 0.8
    assert (trained_items(trainer.model.state_dict()) == trainer.columns.trained).all()


def test_a_run_from_other_weights_adds_its_items(tmp_path):
    trainer = make_trainer(tmp_path, id_dropout=0.5)
    state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    state["trained_items"][:] = False
    state["trained_items"][0] = True  # a mark: no item has this number
    trainer.load_weights(state)
    assert trainer.columns.trained.tolist() == [True] + 30 * [False]
    trainer._note_trained_items()
    assert trainer.columns.trained[0] and (trainer.columns.trained[1:] == (trainer.item_counts[1:] > 0)).all()


def test_cold_items_gain_from_dropped_ids(tmp_path):
    """Users stay within a colour; an item without events can be told by its colour alone, where the model has learnt to read that."""
    random = np.random.default_rng(0)
    sequences = [(3 * random.integers(0, 12, 9) + 1 + user % 3).tolist() for user in range(240)]  # items 1..36, the last three unseen
    sequences = [[item if item < 34 else item - 3 for item in sequence] for sequence in sequences]
    gap = {}
    for rate in (0.0, 0.3):
        store = tiny_store(sequences=sequences, num_items=36)
        store.item_single[1:, 0] = np.arange(36) % 3 + 1
        store.item_multi["tags"].rows = [[] for _ in range(37)]
        more = {"embeddings": (), "init_std": 0.3, "num_epochs": 5, "batch_size": 32, "learning_rate": 0.02, "log_every_steps": 50}
        trainer = make_trainer(tmp_path / str(rate), store=store, id_dropout=rate, eval_every_epochs=5, save_frequency=5, **more)
        trainer.fit()
        vectors = trainer._ranker().encode_candidates()
        batches = list(trainer._ranker().encode_users(trainer.splits.test))
        users, queries = trainer.splits.test.users[np.concatenate([s for s, _ in batches])], torch.cat([query for _, query in batches])
        own = torch.from_numpy(users % 3)
        scores = (queries @ vectors.T).reshape(len(users), 12, 3)  # items 1, 2, 3, 1, ... by colour
        mine = scores[torch.arange(len(users)), :, own]  # (users, 12), the last one unseen
        gap[rate] = float((mine[:, :11].mean(1) - mine[:, 11]).mean() / (mine[:, :11].mean() - scores.mean()))
    assert gap[0.3] < 0.5 * gap[0.0]  # how far it falls behind those of its colour that are known, relative to their lead over all


# ---- several hash tables; vectors that are missing; users ----


def test_two_hash_tables_of_the_issues_sizes_are_summed():
    store, model, columns = make(hash_rows=[20_003, 30_011], similarity="dot", item_tower="sum")
    fields = [field for field in columns.layout.fields if field.name == ITEM_ID]
    assert [(field.size, field.hash) for field in sorted(fields, key=lambda f: f.hash)] == [(20_003, 1), (30_011, 2)]
    bare = np.array([0, *[i for i in range(1, 21) if not store.item_multi["tags"].rows[i] and not store.item_single[i, 0]]])
    store.item_multi["tags"].rows[9], store.item_single[9, 0] = [], 0
    bare = np.union1d(bare, [9])
    found = model.encode_items(columns.items(bare)).history
    column = store.embedding("81")
    for row, item in enumerate(bare[1:], start=1):
        blocks = [block for _, block in feature_blocks(model, columns.layout, "item", {"item_id": [item], "colour": [], "tags": []})]
        dense = torch.from_numpy(column.matrix[column.row_of_item[item]]).float()
        own = model.dense["81"]
        vector = own.projection(dense / (dense.square().mean() + 1e-6).sqrt()) if column.row_of_item[item] else own.missing
        torch.testing.assert_close(found[row], sum(blocks) + vector)


def test_hash_functions_differ_and_spread():
    layout = TableLayout.from_sizes([(ITEM_ID, "item", "single", 100_000)], with_values(Config(), hash_rows=[20_003, 30_011]).model)
    ids = np.arange(1, 100_001)
    first, second = (hashed_rows(ids, field) for field in sorted(layout.fields, key=lambda f: f.hash))
    assert first.min() >= 1 and first.max() <= 20_003 and second.max() <= 30_011
    pairs = len(np.unique(first.astype(np.int64) * 30_012 + second))
    assert 100_000 - pairs < 30  # n^2 / 2ab = 8.3 pairs share both


def test_the_missing_vector_learns_where_a_vector_is_missing(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3)
    assert (trainer.model.dense["81"].missing == 0).all()
    trainer.fit()
    assert (trainer.store.embedding("81").row_of_item[1:] == 0).any() and (trainer.model.dense["81"].missing != 0).all()


def test_users_have_no_id_by_default():
    store, model, columns = make()
    assert USER_ID not in {field.name for field in columns.layout.fields}
    _, before, _ = run(store, model, columns, [0, 1])
    store.user_ids = store.user_ids[::-1].copy()
    _, after, _ = run(store, model, columns, [0, 1])
    assert torch.equal(before, after)


# ---- cold candidates ----


@pytest.fixture
def cold():
    """A store that knows items 1..14 of 20, and a model."""
    store, model, columns = make()
    store.num_known_items = 14
    return store, model, columns


def test_a_penalty_comes_off_the_scores_of_cold_candidates(cold):
    store, model, columns = cold
    split = predict_split(store)
    plain = ranker(store, model, columns).rank(split, 20, False, keep_queries=True)
    for penalty in (0.05, 0.3, 3.0):
        found = ranker(store, model, columns, cold_penalty=penalty).rank(split, 20, False, keep_queries=True)
        scores = torch.from_numpy(plain.queries) @ plain.candidates.T - penalty * (torch.arange(1, 21) > 14)
        np.testing.assert_allclose(found.topk_scores, scores.sort(dim=1, descending=True).values.numpy(), atol=1e-5)
        np.testing.assert_allclose(found.topk_scores, scores.gather(1, torch.from_numpy(found.topk_ids) - 1).numpy(), atol=1e-5)
        assert torch.equal(found.candidates, plain.candidates) and (found.queries == plain.queries).all()
    assert (np.sort(found.topk_ids[:, :14], axis=1) == np.arange(1, 15)).all()  # 3 is more than any difference of cosines


def test_a_penalty_fills_and_counts_ranks_too(cold):
    store, model, columns = cold
    split = make_splits(store, **SPLIT).test
    asked = np.ones(split.num_samples, dtype=bool)
    found = ranker(store, model, columns, cold_penalty=3.0).rank(split, 20, False, fill=True, ranks_of=asked)
    places = (found.topk_ids == store.item_ids[split.target][:, None]).argmax(axis=1)
    assert (found.target_ranks == places).all() and np.isfinite(found.loss)


def test_a_penalty_keeps_its_weight_in_an_ensemble(cold):
    store, model, columns = cold
    split = predict_split(store)
    one = ranker(store, model, columns, cold_penalty=0.2)
    both = EnsembleRanker([one, one], [1.0, 3.0], "softmax")
    assert (both.rank(split, 20, False).topk_ids == one.rank(split, 20, False).topk_ids).all()


def test_dropping_cold_candidates(cold):
    _, _, columns = cold
    assert without_cold(np.array([20, 3, 15, 14]), columns).tolist() == [3, 14]
    with pytest.raises(UserError, match="none of the 2 candidates was in training"):
        without_cold(np.array([20, 15]), columns)


def test_a_run_drops_what_it_was_not_trained_on(tmp_path):
    store = tiny_store(sequences=[[1, 2, 3, 4, 5], [2, 3, 1, 6, 1], [3, 1, 2, 2, 7]] * 4, num_items=9)
    kept = make_trainer(tmp_path / "a", store=store, id_dropout=0.1, cold_candidates="drop").candidates
    assert kept.tolist() == [1, 2, 3]  # 4 and 5, 6, 7 are held out by leave-one-out, 8 and 9 have no event
    assert len(make_trainer(tmp_path / "b", store=store, id_dropout=0.1).candidates) == 9
    assert len(make_trainer(tmp_path / "c", store=store, cold_candidates="drop").candidates) == 9  # without id_dropout nothing is noted
    penalty = make_trainer(tmp_path / "d", store=store, cold_candidates="penalty", cold_penalty=0.7, id_dropout=0.1)
    assert penalty._ranker().cold_penalty == 0.7 and make_trainer(tmp_path / "e", store=store)._ranker().cold_penalty == 0.0


def test_unknown_items_of_predict_data_take_the_unknown_vector():
    store, model, _ = make(id_dropout=0.5)
    store.num_known_items = 15
    columns = FeatureColumns(store, TableLayout.from_store(store, model.config), ("81",), np.ones(16, dtype=bool))
    assert columns.items(np.array([0, 15, 16, 20])).no_id.tolist() == [False, False, True, True]
