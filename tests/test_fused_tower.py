"""The end of the item tower by compiled loops gives what torch's operations give; else it is left to torch."""

import numpy as np
import pytest
import torch
from test_model import make
from tiny import tiny_store

import fused_tower
import machine_code
from parallel import MIN_ROWS, cores

SETTINGS = {
    "cosine": {},
    "dot": {"similarity": "dot"},
    "relu": {"similarity": "dot", "item_activation": "relu", "candidate_activation": True},
    "relu, cosine": {"item_activation": "relu", "candidate_activation": True},
    "sum": {"item_tower": "sum"},
    "zero ids": {"id_init": "zero"},
}

pytestmark = [pytest.mark.skipif(not machine_code.available(), reason="no numba"), pytest.mark.usefixtures("one_thread")]


def vectors_and_gradients(model, columns, ids, users, of_history=1.0) -> dict[str, torch.Tensor]:
    model.zero_grad()
    inputs = columns.gather(ids, users, transposed=True).items
    items = model.encode_items(inputs)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (v * torch.randn(v.shape, generator=generator)).sum() * w for v, w in ((items.candidate, 1.0), (items.history, of_history)) if w
    )
    loss.backward()
    touched = {f"rows {i}": entry.leaf.grad for i, entry in enumerate(model.table.pop_touched())}
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"history": items.history.detach(), "candidate": items.candidate.detach()} | grads | touched


@pytest.fixture(scope="module")
def store():
    return tiny_store(num_users=20, num_items=3 * MIN_ROWS)


@pytest.mark.parametrize("of_history", [0.5, 0.0])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_equals_torch(store, monkeypatch, settings, of_history) -> None:
    store, model, columns = make(store, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "missing" in name or "bias" in name:
                parameter.normal_()
    ids, users = np.arange(store.num_items + 1), np.array([1, 2])
    missing = columns.gather(ids, users, transposed=True).items.dense[0].present.logical_not()
    assert missing.any() and not missing.all()
    taken = []
    finish = fused_tower.finish
    monkeypatch.setattr(fused_tower, "finish", lambda *arguments: taken.append(1) or finish(*arguments))
    ours = vectors_and_gradients(model, columns, ids, users, of_history)
    assert taken
    with cores(2):
        again = vectors_and_gradients(model, columns, ids, users, of_history)
    monkeypatch.setattr(fused_tower, "takes", lambda *_: False)
    theirs = vectors_and_gradients(model, columns, ids, users, of_history)
    assert ours.keys() == theirs.keys() == again.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() <= 2e-5 * value.abs().max().clamp_min(1e-3), name
        assert torch.equal(ours[name], again[name]), name  # the number of cores changes nothing


def test_a_zero_vector_has_a_finite_gradient(store, monkeypatch) -> None:
    store, model, columns = make(store)
    with torch.no_grad():
        for parameter in (*model.table.parts, *model.dense.parameters(), model.item_bias):
            parameter.zero_()
    ids, users = np.arange(store.num_items + 1), np.array([1])
    ours = vectors_and_gradients(model, columns, ids, users)
    monkeypatch.setattr(fused_tower, "takes", lambda *_: False)
    theirs = vectors_and_gradients(model, columns, ids, users)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=0)


def test_not_a_number_stays_one(store) -> None:
    store, model, columns = make(store, **SETTINGS["relu"])
    with torch.no_grad():
        model.item_bias[3] = torch.nan
    ids, users = np.arange(store.num_items + 1), np.array([1])
    assert vectors_and_gradients(model, columns, ids, users)["candidate"][:, 3].isnan().all()


def test_left_to_torch_where_the_loops_cannot(store) -> None:
    vectors = torch.randn(5, 16)
    takes = lambda **settings: fused_tower.takes((model := make(store, **settings)[1]).config, model.dense, vectors)
    assert takes() and takes(**SETTINGS["relu"])
    assert not takes(item_activation="relu")  # history and candidates differ by more than a norm
    assert not takes(item_activation="gelu", candidate_activation=True)
    _, model, _ = make(store)
    assert not fused_tower.takes(model.config, model.dense, vectors.T)
    model.dense["81"].register_forward_hook(lambda *_: None)
    assert not fused_tower.takes(model.config, model.dense, vectors)


def test_masks_do_not_depend_on_which_way_items_go(store, monkeypatch) -> None:
    """A step that is repeated with hooks, to find what went wrong in it, has the masks that it had."""
    store, model, columns = make(store, dropout_rate=0.3)
    model.train()
    ids, users = np.arange(store.num_items + 1), np.array([1, 2])
    drawn = []
    for _ in range(2):
        torch.manual_seed(4)
        model.encode_items(columns.gather(ids, users, transposed=True).items)
        drawn.append(torch.rand(1))
        monkeypatch.setattr(fused_tower, "takes", lambda *_: False)
    assert torch.equal(*drawn)
