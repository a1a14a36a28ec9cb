import numpy as np
import pytest
import torch
from tiny import tiny_store
from torch.profiler import ProfilerActivity, profile

import fused_block
from config import Config, with_values
from dataset import BatchBuilder, predict_split
from features import Dense, FeatureColumns, TableLayout, hashed_rows
from model import DenseProjection, Recommender


def make(store=None, action_head=False, **settings):
    store = store or tiny_store()
    settings = {"hidden_units": 16, "num_heads": 2, "num_blocks": 2, "max_seq_length": 10} | settings
    config = with_values(Config(), **settings)
    layout = TableLayout.from_store(store, config.model)
    torch.manual_seed(0)
    model = Recommender(config.model, layout, {"81": 4}, store.schema.has_time, action_head=action_head).eval()
    with torch.no_grad():  # large enough that a wrong value shows
        for part in model.table.parts:
            part.normal_()
        model.table.parts[0][0].zero_()
    columns = FeatureColumns(store, layout, ("81",), np.arange(store.num_items + 1) % 4 > 0 if config.model.id_dropout else None)
    return store, model, columns


def run(store, model, columns, samples, training=False, max_seq_length=10):
    """A batch with the queries of all its tokens."""
    builder = BatchBuilder(store, predict_split(store), max_seq_length)
    batch = builder.training(np.array(samples), 0, 0) if training else builder.evaluation(np.array(samples))
    batch = batch._replace(query_tokens=batch.query_tokens[:0], max_queries=batch.max_length)
    return batch, *model(batch, columns.gather(batch.unique_ids.numpy(), batch.users.numpy(), transposed=training))


def row_vector(model, layout, field, value):
    """The table's vector of a value of a field, found without the code under test."""
    row = field.offset + (int(hashed_rows(np.array([value]), field)[0]) if field.hash else value)
    (vector,) = (table[row - part.begin] for part, table in zip(layout.parts, model.table.parts) if part.begin <= row < part.end)
    return vector


def feature_blocks(model, layout, side, values):
    """For each field of a side (its index in the layout, the mean of the vectors of its values). values: {feature: list}."""
    for number, field in enumerate(layout.side(side)):
        found = [row_vector(model, layout, field, value) for value in values[field.name] if value]
        yield number, torch.stack(found).sum(0) / max(1, len(values[field.name])) if found else torch.zeros(field.width)


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
    {"feature_width": "auto", "embedding_dim": 32},
    {"hash_rows": [7, 5], "hashed_features": ["item_id", "tags", "likes"], "user_id": True},
    {"item_tower": "sum", "hash_rows": [7], "hashed_features": ["item_id", "user_id"], "user_id": True},
    {"time_fields": ["gap", "day", "fourier"], "action_conditioning": "film"},
    {"action_conditioning": "gate", "id_init": "zero"},
    {"id_dropout": 0.2, "hash_rows": [7, 5]},
    {"norm": "rmsnorm"},
    {"norm": "rmsnorm", "norm_first": False, "position": "relative"},
    {"position": "relative", "time_bias": True},
    {"time_bias": True},
    {"backbone": "hstu"},
    {"backbone": "hstu", "position": "relative", "time_bias": True, "norm": "rmsnorm"},
    {"backbone": "hstu", "num_experts": 3, "activation": "swiglu"},
    {"num_experts": 4, "active_experts": 1},
    {"num_experts": 4, "active_experts": 3, "shared_experts": 0, "norm_first": False},
]
TABLES = [
    {},
    {"embedding_dim": 8},
    {"feature_width": "auto", "embedding_dim": 32},
    {"feature_width": "auto", "hash_rows": [7, 400], "hashed_features": ["item_id", "tags"]},
    {"item_tower": "sum"},
    {"item_tower": "sum", "hash_rows": [7], "hashed_features": ["colour", "item_id"]},
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


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_queries_of_the_last_tokens_are_those_of_all(settings, most):
    # What the last block leaves out changes nothing; users have fewer query tokens than the grid has places, and one has a single token.
    store, model, columns = make(**settings)
    split = predict_split(store)
    split = split._replace(begin=np.where(np.arange(12) == 4, split.end, split.begin))
    batch = BatchBuilder(store, split, 10).evaluation(np.arange(12))
    features = columns.gather(batch.unique_ids.numpy(), batch.users.numpy(), transposed=True)
    from_end = batch.lengths[batch.owner] - batch.positions
    tokens = (from_end <= 1 + batch.owner % most).nonzero()[:, 0]
    assert most > 1 or torch.equal(tokens, batch.query_tokens)
    some = batch._replace(query_tokens=tokens, max_queries=most)
    every = batch._replace(query_tokens=tokens[:0], max_queries=batch.max_length)
    expected = model(every, features)[0].index_select(0, tokens)
    with torch.no_grad():
        torch.testing.assert_close(model(some, features)[0], expected, atol=1e-5, rtol=1e-4)
    found = model(some, features)[0]  # in pieces
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    weights = torch.randn(found.shape)
    parameters = [parameter for name, parameter in model.named_parameters() if not name.startswith(("table", "action_head"))]
    grads = [torch.autograd.grad((query * weights).sum(), parameters, allow_unused=True) for query in (found, expected)]
    assert sum(grad is not None for grad in grads[0]) > 10
    for parameter, one, other in zip(parameters, *grads):
        one, other = (torch.zeros_like(parameter) if grad is None else grad for grad in (one, other))
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_training_and_evaluation_agree():
    # the query that training computes at the token before the last target is the one that evaluation ranks with
    store, model, columns = make()
    _, query, _ = run(store, model, columns, [3], training=True)
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


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("settings", TABLES, ids=str)
def test_item_vector_is_a_linear_layer_on_the_concatenated_vectors(settings, transposed):
    store, model, columns = make(similarity="dot", **settings)
    ids = np.array([0, 2, 4, 9, 13])
    inputs = columns.items(ids, transposed)
    vectors = model.encode_items(inputs).history
    column = store.embedding("81")
    for row, item in enumerate(ids[1:], start=1):
        values = {"item_id": [item], "colour": [int(store.item_single[item, 0])], "tags": store.item_multi["tags"].rows[item]}
        blocks = [vector for _, vector in feature_blocks(model, columns.layout, "item", values)]
        if settings.get("item_tower") == "sum":
            expected = sum(blocks)
        else:
            weight = torch.cat([w.reshape(-1, 16) for w in model.item_projection.weights])  # rows in the order of the fields
            expected = torch.cat(blocks) @ weight + model.item_bias
        dense = torch.from_numpy(column.matrix[column.row_of_item[item]]).float()
        dense = dense / (dense.square().mean() + 1e-6).sqrt()
        projection = model.dense["81"]
        expected = expected + (projection.projection(dense) if column.row_of_item[item] else projection.missing)
        torch.testing.assert_close(vectors[row], expected, atol=1e-5, rtol=1e-5)


def test_the_items_of_the_test_above_differ_in_all_ways():
    store = tiny_store()
    lists = [len(store.item_multi["tags"].rows[item]) for item in (2, 4, 9, 13)]
    assert 0 in lists and max(lists) > 1  # a missing list, and a mean of several
    assert 0 in store.item_single[[2, 4, 9, 13], 0] and 0 in store.embedding("81").row_of_item[[2, 4, 9, 13]]


@pytest.mark.parametrize("settings", TABLES, ids=str)
def test_user_vector_is_the_same_sum(settings):
    store, model, columns = make(user_id=True, **settings)
    users = np.array([0, 1, 4])
    inputs = columns.users(users, transposed=True)
    vectors = model.user_projection(model.table.lookup("user", inputs), inputs)
    for row, user in enumerate(users):
        values = {"user_id": [user + 1], "age": [int(store.user_single[user, 0])], "likes": store.user_multi["likes"].rows[user]}
        blocks = [vector for _, vector in feature_blocks(model, columns.layout, "user", values)]
        weights = [matrix for part in model.user_projection.weights for matrix in part]
        expected = sum(block @ weight for block, weight in zip(blocks, weights, strict=True)) if weights else sum(blocks)
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
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None] + [entry.leaf.grad for entry in touched])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("settings", [{}, {"feature_width": "auto"}, {"hash_rows": [7, 5]}], ids=str)
def test_no_dense_gradient_of_the_table(settings):
    store, model, columns = make(**settings)
    model.train()
    _, query, items = run(store, model, columns, range(6), training=True)
    (query @ items.T).sum().backward()
    assert all(part.grad is None for part in model.table.parts)
    touched = model.table.pop_touched()
    assert {entry.part for entry in touched} == set(range(len(model.table.parts))) and len(model.table.parts) == 1 + (
        "feature_width" in settings
    )
    for number, part in enumerate(model.table.parts):
        rows = torch.cat([entry.rows for entry in touched if entry.part == number])
        assert len(rows.unique()) == len(rows) and int(rows.min()) >= (number == 0) and int(rows.max()) < len(part)  # row 0 is padding
    assert all(entry.leaf.grad.shape == (len(entry.rows), model.table.parts[entry.part].shape[1]) for entry in touched)
    assert model.table.pop_touched() == []


def test_without_gradients_nothing_is_remembered():
    store, model, columns = make()
    with torch.no_grad():
        run(store, model, columns, range(6))
    assert model.table.pop_touched() == []


def test_the_flash_kernel_runs_in_training_and_no_mask_is_built(monkeypatch: pytest.MonkeyPatch):
    """Where compiled loops do not take a block: on CPU with many threads, without numba, with options they lack."""
    monkeypatch.setattr(fused_block, "takes", lambda *_: False)
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
    store, _, columns = make()
    store.num_known_items = 10
    inputs = columns.items(np.array([0, 12]))
    at = lambda inputs, thing, place: int(inputs.bags.index[inputs.bags.offsets[thing] + place])  # 0 = row 0, padding
    assert at(inputs, 1, 0) == 0  # its id
    assert at(columns.items(np.array([0, 7])), 1, 0) > 0
    store.item_single[5, 0] = 99  # a value above the layout's range
    assert at(columns.items(np.array([0, 5])), 1, 1) == 0
    store.item_single[5, 0] = 3
    assert at(columns.items(np.array([0, 5])), 1, 1) > 0


def test_dense_projection_equals_the_plain_formula():
    torch.manual_seed(0)
    ours = DenseProjection(5, 3)
    with torch.no_grad():
        ours.missing.normal_()
        ours.projection.bias.normal_()
    present = torch.tensor([True, False, True, True, False, True])
    values = (torch.randn(6, 5) * torch.tensor([1.0, 1, 100, 0.01, 1, 1])[:, None]).half() * present[:, None]
    values[5] = 0  # present, and zero: the bias alone
    plain = [parameter.detach().clone().requires_grad_() for parameter in (ours.projection.weight, ours.projection.bias, ours.missing)]
    scaled = values.float() / (values.float().square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    expected = torch.where(present[:, None], scaled @ plain[0].T + plain[1], plain[2])
    found = ours(Dense(values, present))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[5], ours.projection.bias)
    torch.testing.assert_close(found[1], ours.missing)
    upstream = torch.randn(6, 3)
    found.backward(upstream)
    expected.backward(upstream)
    for mine, theirs in zip((ours.projection.weight, ours.projection.bias, ours.missing), plain):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_event_dropout_hides_whole_events_in_training_alone(monkeypatch):
    """With the other dropout off, a query changes where an event at or before it is hidden, and nowhere else; never in evaluation."""
    settings = {"dropout_rate": 0.0, "user_id": True}
    store, model, columns = make(**settings)
    _, hiding, _ = make(event_dropout=0.4, **settings)
    samples = range(store.num_users)
    batch, whole, _ = run(store, model, columns, samples, training=True)
    assert torch.equal(run(store, hiding, columns, samples, training=True)[1], whole)
    hiding.train()
    drawn = torch.rand(len(whole))
    monkeypatch.setattr(torch, "rand", lambda size, device: drawn.to(device))
    query = run(store, hiding, columns, samples, training=True)[1]
    hidden = (drawn < 0.4) & (batch.positions > 0)
    assert 0.2 < hidden.float().mean() < 0.5
    reached = torch.tensor([bool(hidden[n - int(batch.positions[n]) : n + 1].any()) for n in range(len(whole))])
    same = (query - whole).abs().amax(1) < 1e-6
    assert torch.equal(same, ~reached) and reached.any() and not reached.all()
