import numpy as np
import pytest
import torch
from tiny import tiny_store
from torch.profiler import ProfilerActivity, profile

from config import Config, with_values
from dataset import BatchBuilder, predict_split
from features import FeatureColumns, TableLayout
from model import Recommender


def make(store=None, **settings):
    store = store or tiny_store()
    settings = {"hidden_units": 16, "num_heads": 2, "num_blocks": 2, "max_seq_length": 10} | settings
    config = with_values(Config(), **settings)
    layout = TableLayout.from_store(store, config.model.user_id)
    torch.manual_seed(0)
    model = Recommender(config.model, layout, {"81": 4}, store.schema.has_time).eval()
    with torch.no_grad():  # large enough that a wrong value shows
        model.table.weight[1:].normal_()
    columns = FeatureColumns(store, layout, ("81",))
    return store, model, columns


def run(store, model, columns, samples, training=False, max_seq_length=10):
    builder = BatchBuilder(store, predict_split(store), max_seq_length)
    batch = builder.training(np.array(samples), 0, 0) if training else builder.evaluation(np.array(samples))
    return batch, *model(batch, columns.gather(batch.unique_ids.numpy(), batch.users.numpy()))


VARIANTS = [
    {},
    {"norm_first": False},
    {"position": "learned"},
    {"position": "none"},
    {"activation": "relu"},
    {"activation": "swiglu"},
    {"item_tower": "sum"},
    {"similarity": "dot", "item_activation": "relu", "candidate_activation": True},
    {"embedding_dim": 8},
    {"user_id": True},
    {"embedding_norm": False},
    {"time_features": False, "action_embedding": False},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_batch_size_and_padding_change_nothing(settings):
    store, model, columns = make(**settings)
    together, query, _ = run(store, model, columns, range(12))
    for user in (0, 5, 11):
        _, alone, _ = run(store, model, columns, [user])
        torch.testing.assert_close(query[together.owner == user], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_causality(settings):
    store, model, columns = make(**settings)
    length = int(store.user_offsets[1])
    _, before, _ = run(store, model, columns, [0])
    store.item_ids[length - 1] = store.item_ids[length - 1] % 20 + 1
    _, after, _ = run(store, model, columns, [0])
    torch.testing.assert_close(before[:-1], after[:-1])
    assert not torch.allclose(before[-1], after[-1])


def test_training_and_evaluation_agree():
    # the query that training computes at the token before the last target is the one that evaluation ranks with
    store, model, columns = make()
    train, query, _ = run(store, model, columns, [3], training=True)
    store.user_offsets = store.user_offsets.copy()
    split = predict_split(store)
    batch = BatchBuilder(store, split._replace(end=split.end - 1), 10).evaluation(np.array([3]))
    evaluated, _ = model(batch, columns.gather(batch.unique_ids.numpy(), batch.users.numpy()))
    torch.testing.assert_close(query[-1], evaluated[-1])


def test_user_features_reach_every_query_and_users_do_not_mix():
    store, model, columns = make()
    _, before, _ = run(store, model, columns, [0, 1])
    store.user_single[1, 0] = store.user_single[1, 0] % 4 + 1
    batch, after, _ = run(store, model, columns, [0, 1])
    same = ((before - after).abs() < 1e-5).all(dim=1)
    assert same[batch.owner == 0].all() and not same[batch.owner == 1].any()


def test_item_vector_is_a_linear_layer_on_the_concatenated_vectors():
    store, model, columns = make(similarity="dot")
    ids = np.array([0, 4, 7, 9])
    inputs = columns.items(ids)
    vectors = model.encode_items(inputs).history
    weight = model.table.weight
    for row, item in enumerate(ids[1:], start=1):
        fields = {f.name: f for f in columns.layout.fields}
        at = lambda name, value: weight[fields[name].offset + value]
        colour = int(store.item_single[item, 0])
        tags = store.item_multi["tags"].rows[item]
        parts = [
            at("item_id", item),
            at("colour", colour) if colour else torch.zeros(16),
            sum(at("tags", t) for t in tags) / len(tags) if tags else torch.zeros(16),
        ]
        dense = torch.from_numpy(store.embedding("81").matrix[store.embedding("81").row_of_item[item]]).float()
        dense = dense / (dense.square().mean() + 1e-6).sqrt()
        projection = model.dense["81"]
        expected = torch.cat(parts) @ model.item_projection.weight.reshape(-1, 16) + model.item_bias
        expected = expected + (projection.projection(dense) if store.embedding("81").row_of_item[item] else projection.missing)
        torch.testing.assert_close(vectors[row], expected, atol=1e-5, rtol=1e-5)


def test_cosine_candidates_have_length_one():
    store, model, columns = make()
    _, query, items = run(store, model, columns, [0, 1])
    torch.testing.assert_close(query.norm(dim=1), torch.ones(len(query)))
    torch.testing.assert_close(items[1:].norm(dim=1), torch.ones(len(items) - 1))  # the padding item is zero


def test_candidate_side_without_activation():
    store, model, columns = make(item_activation="relu", similarity="dot")
    _, _, items = run(store, model, columns, [0])
    assert (items < 0).any()
    store, model, columns = make(item_activation="relu", candidate_activation=True, similarity="dot")
    _, _, items = run(store, model, columns, [0])
    assert (items >= 0).all()


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        store, model, columns = make(dropout_rate=0.3)
        model.train()
        model.backbone.gradient_checkpointing = checkpointing
        torch.manual_seed(7)
        _, query, items = run(store, model, columns, range(6), training=True)
        (query.sum() + (query[:5] @ items.T).square().sum()).backward()
        touched = model.table.pop_touched()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None] + [leaf.grad for _, leaf in touched])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_no_dense_gradient_of_the_table():
    store, model, columns = make()
    model.train()
    _, query, items = run(store, model, columns, range(6), training=True)
    (query @ items.T).sum().backward()
    assert model.table.weight.grad is None
    touched = model.table.pop_touched()
    rows = torch.cat([rows for rows, _ in touched])
    assert len(rows.unique()) == len(rows[rows > 0]) + 1 and all(leaf.grad.shape == (len(r), 16) for r, leaf in touched)
    assert model.table.pop_touched() == []


def test_the_flash_kernel_runs_in_training_and_no_mask_is_built():
    store, model, columns = make(dropout_rate=0.2)
    model.train()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        _, query, _ = run(store, model, columns, range(6), training=True)
        query.sum().backward()
    names = {event.name for event in trace.events()}
    assert any("flash_attention_for_cpu" in name and "backward" not in name for name in names)
    assert any("flash_attention_for_cpu_backward" in name for name in names)
    assert not any("tril" in name or "attention_math" in name for name in names)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_flash_kernel_runs_on_cuda_under_bf16():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from evaluate import move

    store, model, columns = make(dropout_rate=0.2)
    device = torch.device("cuda")
    model.to(device).train()
    batch = BatchBuilder(store, predict_split(store), 10).training(np.arange(6), 0, 0)
    features = columns.gather(batch.unique_ids.numpy(), batch.users.numpy())
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.autocast("cuda", dtype=torch.bfloat16):
        query, _ = model(*move((batch, features), device))
    query.sum().backward()
    assert query.isfinite().all()


def test_unknown_items_and_values_share_the_padding_row():
    store, model, columns = make()
    store.num_known_items = 10
    inputs = columns.items(np.array([0, 12]))
    assert inputs.single[1, 0] == 0  # its id
    store.item_single[5, 0] = 99  # a value above the layout's range
    assert columns.items(np.array([0, 5])).single[1, 1] == 0
