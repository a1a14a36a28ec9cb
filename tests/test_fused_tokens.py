"""A sequence's first vectors by compiled loops are what torch's operations give; else they are left to torch."""

import numpy as np
import pytest
import torch
from test_model import make
from tiny import tiny_store

import fused_tokens
import machine_code
import parallel
from dataset import BatchBuilder, predict_split
from time_features import SIZES, bucket

SETTINGS = {
    "default": {},
    "baseline": {"position": "learned", "embedding_norm": False, "action_embedding": False, "time_features": False, "user_id": True},
    "nothing besides": {"embedding_norm": False, "action_embedding": False, "time_features": False},
    "norm alone": {"action_embedding": False, "time_features": False},
    "day": {"position": "learned", "time_fields": ["day", "hour"], "embedding_norm": False},
    "all tables": {"position": "learned", "time_fields": ["gap", "hour", "weekday", "day"], "action_conditioning": "film"},
    "no dropout": {"dropout_rate": 0.0},
    "no dropout, narrow": {"dropout_rate": 0.0, "hidden_units": 6, "embedding_norm": False},
    "hstu": {"backbone": "hstu", "position": "relative"},
}

pytestmark = [pytest.mark.skipif(not machine_code.prepare(), reason="no numba"), pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def store():
    return tiny_store(num_users=250, num_items=3 * parallel.MIN_ROWS)


def batch_of(store):
    batch = BatchBuilder(store, predict_split(store), 10).training(np.arange(250), 0, 0)
    assert len(parallel.user_pieces(batch.lengths)) > 1
    return batch


def query_and_gradients(model, batch, columns) -> dict[str, torch.Tensor]:
    model.zero_grad()
    users = columns.gather(batch.unique_ids.numpy(), batch.users.numpy(), transposed=True).users
    generator = torch.Generator().manual_seed(1)
    history = torch.randn(len(batch.unique_ids), model.config.hidden_units, generator=generator).requires_grad_()
    torch.manual_seed(5)
    query, _, _ = model.encode_sequence(history, batch, users)
    (query * torch.randn(query.shape, generator=generator)).sum().backward()
    touched = {f"rows {i}": entry.leaf.grad for i, entry in enumerate(model.table.pop_touched())}
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    drawn = torch.rand(1)  # the generator goes on as it would have
    return {"query": query.detach(), "history": history.grad, "drawn": drawn} | grads | touched


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_equals_torch(store, monkeypatch, settings, training) -> None:
    store, model, columns = make(store, **({"num_heads": 1, "num_blocks": 1, "dropout_rate": 0.2} | settings))
    model.train(training)
    with torch.no_grad():
        for parameter in model._sequence_parameters(False):
            parameter.normal_(std=0.5)
    batch, taken, embed = batch_of(store), [], fused_tokens.embed
    monkeypatch.setattr(fused_tokens, "embed", lambda *arguments: taken.append(1) or embed(*arguments))
    ours = query_and_gradients(model, batch, columns)
    assert taken
    with parallel.cores(2):
        again = query_and_gradients(model, batch, columns)
    monkeypatch.setattr(fused_tokens, "takes", lambda *_: False)
    theirs = query_and_gradients(model, batch, columns)
    assert ours.keys() == theirs.keys() == again.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() <= 2e-5 * value.abs().max().clamp_min(1e-3), name
        assert torch.equal(ours[name], again[name]), name  # the number of cores changes nothing


def test_times_fall_into_the_rows_that_torch_finds(store) -> None:
    powers = 2 ** torch.arange(62)
    gaps = torch.cat((powers - 1, powers, powers + 1, torch.tensor([0, 3599, 3600, 86_399, 86_400])))
    times = torch.stack((torch.zeros_like(gaps), gaps.flip(0) % 2**40 - 2**39, gaps.flip(0) % 2**40 - 2**39 + gaps), dim=1).reshape(-1)
    positions = torch.arange(3).repeat(len(gaps))
    fields = list(SIZES)
    model = make(store, time_fields=fields, action_embedding=False)[1]
    batch = batch_of(store)._replace(owner=positions, positions=positions, action_types=positions, timestamps=times)
    tables = [(fused_tokens.token_kernels.GAP, 1, model.time.gap.weight)]
    tables += [(fused_tokens.token_kernels.PERIOD, fused_tokens._UNITS[name], getattr(model.time, name).weight) for name in fields[1:]]
    rows = fused_tokens._table_rows(batch, tables, [parallel.Piece(0, 3), parallel.Piece(3, len(times))])
    first = 1
    for number, name in enumerate(fields):
        wanted = torch.where(positions > 0, first + bucket(name, times, positions), 0)
        assert rows[:, number].tolist() == wanted.tolist(), name
        first += SIZES[name]


def test_a_position_beyond_the_table_is_an_error(store) -> None:
    store, model, columns = make(store, position="learned")
    batch = batch_of(store)
    users = columns.gather(batch.unique_ids.numpy(), batch.users.numpy(), transposed=True).users
    history = torch.randn(len(batch.unique_ids), 16)
    with pytest.raises(IndexError, match="beyond the model's tables"):
        model.encode_sequence(history, batch._replace(positions=batch.positions + 5), users)


@pytest.mark.parametrize("settings", [SETTINGS["default"], SETTINGS["baseline"]], ids=["default", "baseline"])
def test_not_a_number_stays_one(store, settings) -> None:
    store, model, columns = make(store, dropout_rate=0.5, **settings)
    model.train()
    batch = batch_of(store)
    history, users = torch.randn(len(batch.unique_ids), 16), torch.randn(250, 16)
    history[int(batch.item_index[1]), 3] = torch.nan
    pieces = [tokens for _, tokens in parallel.user_pieces(batch.lengths)]
    found = fused_tokens.embed(parts_of(model), history, users, batch, pieces, parallel.piece_generators(len(pieces)))
    spoilt = (batch.item_index == batch.item_index[1]) & (batch.positions > 0)
    assert found[spoilt, 3].isnan().all() and found[~spoilt].isfinite().all()


def parts_of(model) -> fused_tokens.Parts:
    return fused_tokens.Parts(model.actions, model.positions, model.time, model.embedding_norm, model.dropout)


def test_left_to_torch_where_the_loops_cannot(store) -> None:
    history, users = torch.randn(5, 16), torch.randn(2, 16)

    def takes(training=True, history=history, **settings):
        return fused_tokens.takes(parts_of(make(store, **{"dropout_rate": 0.2} | settings)[1].train(training)), history, users)

    assert takes() and takes(time_fields=["day"])
    assert not takes(time_fields=["gap", "fourier"])
    assert not takes(history=torch.randn(5, 6)) and takes(False, history=torch.randn(5, 6))  # a row is no whole number of draws
    assert not takes(history=history.double())
    with torch.no_grad():
        assert not takes()
    for name in ("time", "embedding_norm", "dropout"):
        model = make(store)[1]
        getattr(model, name).register_forward_hook(lambda *_: None)
        assert not fused_tokens.takes(parts_of(model), history, users)


def test_hidden_events_are_left_to_torch(store, monkeypatch) -> None:
    store, model, columns = make(store, event_dropout=0.3)
    monkeypatch.setattr(fused_tokens, "embed", None)
    query_and_gradients(model.train(), batch_of(store), columns)
    with pytest.raises(TypeError):
        query_and_gradients(model.eval(), batch_of(store), columns)
