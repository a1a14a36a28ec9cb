"""embedding.py: the towers' first layer, forward and backward, against torch's autograd, a loop by hand and finite differences."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from tiny import tiny_store

import embedding
import machine_code
import kernels
from config import Config, with_values
from embedding import JointTable, RowProjection, _ProjectAndSum
from features import Bags, FeatureColumns, Field, SideInputs, TableLayout
from optim import TableOptimizer
from parallel import cores

WIDTH = 12
SETTINGS = [
    {},
    {"embedding_dim": 5, "user_id": True},
    {"feature_width": "auto", "embedding_dim": 32},
    {"feature_width": "auto", "embedding_dim": 32, "hash_rows": [300, 5], "hashed_features": ["item_id", "tags", "age"], "user_id": True},
    {"item_tower": "sum"},
    {"item_tower": "sum", "hash_rows": [7, 4], "hashed_features": ["item_id", "likes"]},
]
PLACES = {"item": np.array([0, 2, 9, 13, 2, 18, 20, 4, 6]), "user": np.array([4, 1, 11, 5, 1, 2])}


def make(side, settings, store=None):
    """(layout, table, projection, gathered inputs) of a side, with items that lack features, repeat, and have lists of several values."""
    store = store or tiny_store()
    config = with_values(Config(), hidden_units=WIDTH, num_heads=2, **settings).model
    layout = TableLayout.from_store(store, config)
    torch.manual_seed(1)
    table = JointTable(layout, 1.0)
    projection = RowProjection(layout, side, WIDTH, config.item_tower == "linear")
    columns = FeatureColumns(store, layout, ())
    return layout, table, projection, getattr(columns, f"{side}s")(PLACES[side], transposed=True)


def without_transposed(inputs):
    """What evaluation gathers: then the projection is made of torch's own parts."""
    return inputs._replace(bags=inputs.bags._replace(things=None, starts=None, thing_weights=None))


def forward_and_backward(table, projection, side, inputs, forward_in=nullcontext):
    """(output, gradient of the rows a part, gradient of the weights) for a fixed gradient of the output."""
    projection.zero_grad()
    table.pop_touched()
    with forward_in():
        out = projection(table.lookup(side, inputs), inputs)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(3)))
    rows = [entry.leaf.grad for entry in table.pop_touched()]
    return out.detach(), rows, [weight.grad.clone() for weight in projection.weights]


def assert_close(found, expected):
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    for a, b in zip((*found[1], *found[2]), (*expected[1], *expected[2]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["item", "user"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_project_and_sum_equals_autograd(settings, side):
    _, table, projection, inputs = make(side, settings)
    found = forward_and_backward(table, projection, side, inputs)
    assert_close(found, forward_and_backward(table, projection, side, without_transposed(inputs)))
    assert all((grad != 0).any(dim=1).all() for grad in found[1])  # every row that was looked up is used


def test_which_of_the_two_runs(monkeypatch):
    _, table, projection, inputs = make("item", {})
    monkeypatch.setattr(RowProjection, "_by_autograd", lambda *_: "torch's own")
    local = table.lookup("item", inputs)
    assert projection(local, without_transposed(inputs)) == "torch's own"
    assert type(projection(local, inputs).grad_fn).__name__ == "_ProjectAndSumBackward"


def many_rows(widths, project, weighted):
    """As `make`, with random bags of 9,000 rows: several tiles and blocks a field, one field without rows, things without rows."""
    generator = torch.Generator().manual_seed(2)
    sizes = (5000, 1, 0, 3999)
    fields = [
        Field(f"f{i}", "item", "single", sum(sizes[:i]), max(1, size), width, size) for i, (size, width) in enumerate(zip(sizes, widths))
    ]
    layout, num, out_width = TableLayout(tuple(fields)), 700, widths[0] if not project else 40
    rows = torch.tensor([0, *range(1, 5001), 5001, *range(5002, 9001)])  # the field without rows has one in the table, which nothing uses
    uses = torch.randint(0, len(rows), (6000,), generator=generator).int()
    things = torch.randint(0, num, (6000,), generator=generator).int().sort().values
    shares = torch.rand(6000, generator=generator) if weighted else None
    order = uses.long().sort(stable=True).indices
    order = order[uses[order] > 0]
    starts = torch.searchsorted(uses[order], torch.arange(len(rows) + 1).int()).int()
    offsets = torch.searchsorted(things, torch.arange(num + 1).int()).int()
    bags = Bags(uses, offsets, shares, things[order], starts, shares[order] if weighted else None)
    torch.manual_seed(3)
    inputs = SideInputs(rows, (1, 5001, 5002, 5002, 9001), bags, ())
    return JointTable(layout, 1.0), RowProjection(layout, "item", out_width, project), inputs


def assert_near(found, expected):
    """Within 1e-5 of each tensor's norm: a weight's gradient sums thousands of rows, in another order."""
    tensors = lambda result: (result[0], *result[1], *result[2])
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        assert a.shape == b.shape and (a - b).norm() <= 1e-5 * b.norm() and (a == 0).sum() == (b == 0).sum()


TILED = pytest.mark.skipif(not machine_code.available(), reason="numba is not installed")


@TILED
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("widths", [(32, 32, 32, 32), (64, 64, 7, 7), (5, 5, 5, 5), "no projection"], ids=str)
def test_tiles_give_what_torch_gives(monkeypatch, widths, weighted):
    monkeypatch.setattr(embedding, "BLOCK_ROWS", 1300)
    table, projection, inputs = many_rows((12,) * 4 if widths == "no projection" else widths, widths != "no projection", weighted)
    by_tiles = forward_and_backward(table, projection, "item", inputs)
    assert_near(by_tiles, forward_and_backward(table, projection, "item", without_transposed(inputs)))
    monkeypatch.setattr(machine_code, "available", lambda: False)
    assert_near(by_tiles, forward_and_backward(table, projection, "item", inputs))
    monkeypatch.setattr(kernels, "ENABLED", False)
    assert_near(by_tiles, forward_and_backward(table, projection, "item", inputs))


@TILED
def test_which_products_run(monkeypatch):
    table, projection, inputs = many_rows((32,) * 4, True, False)
    calls = []
    monkeypatch.setattr(embedding, "mm", lambda a, b, out=None: calls.append(len(a)) or torch.mm(a, b, out=out))
    forward_and_backward(table, projection, "item", inputs)
    assert not calls
    monkeypatch.setattr(machine_code, "available", lambda: False)
    forward_and_backward(table, projection, "item", inputs)
    assert calls == [5000, 1, 3999, 5000, 32, 1, 32, 3999, 32]  # two a field in the backward pass


@TILED
def test_tiles_do_not_depend_on_the_number_of_threads():
    table, projection, inputs = many_rows((32,) * 4, True, True)
    results = []
    for num_threads in (1, 3):
        with cores(num_threads):
            results.append(forward_and_backward(table, projection, "item", inputs))
    (out, rows, weights), (out3, rows3, weights3) = results
    assert all(torch.equal(a, b) for a, b in zip((out, *rows, *weights), (out3, *rows3, *weights3), strict=True))


def fields_of(layout, side, runs):
    """(field, its run, its place in the run): the towers' weights in the layout's order."""
    return [(layout.side(side)[n], run, n - first) for run, (first, last) in enumerate(runs) for n in range(first, last)]


@pytest.mark.parametrize("side", ["item", "user"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_against_a_loop_over_things_and_rows(settings, side):
    """Every multiplication by hand: output m is the sum over its rows r of weight * (vector of r) @ (matrix of r's field)."""
    layout, table, projection, inputs = make(side, settings)
    found = forward_and_backward(table, projection, side, inputs)
    bags, num = inputs.bags, len(PLACES[side])
    upstream = torch.randn(num, WIDTH, generator=torch.Generator().manual_seed(3)).double()
    weights = [w.detach().double() for w in projection.weights]
    out, grad_rows = torch.zeros(num, WIDTH, dtype=torch.float64), {}
    grad_weights = [torch.zeros_like(w) for w in weights]
    for thing in range(num):
        for place in range(int(bags.offsets[thing]), int(bags.offsets[thing + 1])):
            row = int(inputs.rows[bags.index[place]])
            if row == 0:
                continue
            share = 1.0 if bags.weights is None else float(bags.weights[place])
            ((field, run, number),) = [f for f in fields_of(layout, side, projection.runs) if f[0].offset < row <= f[0].offset + f[0].size]
            ((part, matrix),) = [(p, t) for p, t in zip(layout.parts, table.parts) if p.begin <= row < p.end]
            vector = matrix[row - part.begin].detach().double()
            assert len(vector) == field.width
            weight = weights[run][number] if weights else torch.eye(WIDTH, dtype=torch.float64)
            out[thing] += share * (vector @ weight)
            grad_rows[row] = grad_rows.get(row, 0) + share * (weight @ upstream[thing])
            if weights:
                grad_weights[run][number] += share * torch.outer(vector, upstream[thing])
    torch.testing.assert_close(found[0].double(), out, atol=1e-5, rtol=1e-5)
    for mine, expected in zip(found[2], grad_weights, strict=True):
        torch.testing.assert_close(mine.double(), expected, atol=1e-5, rtol=1e-5)
    table.lookup(side, inputs)
    entries = table.pop_touched()
    looked_up = [int(row) + layout.parts[entry.part].begin for entry in entries for row in entry.rows]
    assert sorted(looked_up) == sorted(grad_rows) == looked_up
    mine = [grad.double() for grads in found[1] for grad in grads]
    for row, grad in zip(looked_up, mine, strict=True):
        torch.testing.assert_close(grad, grad_rows[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [SETTINGS[3], SETTINGS[4]], ids=["linear", "sum"])
@pytest.mark.parametrize("side", ["item", "user"])
def test_finite_differences(settings, side):
    _, table, projection, inputs = make(side, settings)
    double = {name: getattr(inputs.bags, name).double() for name in ("weights", "thing_weights")}
    inputs = inputs._replace(bags=inputs.bags._replace(**double))
    local = [leaf.detach().double().requires_grad_() for leaf in table.lookup(side, inputs)]
    weights = [weight.detach().double().requires_grad_() for weight in projection.weights]
    apply = lambda *tensors: _ProjectAndSum.apply(inputs, projection.runs, len(local), *tensors)
    assert torch.autograd.gradcheck(apply, (*local, *weights))


def test_single_valued_features_alone():
    store = tiny_store()
    store.cardinalities = store.cardinalities | {"tags": 0}
    _, table, projection, inputs = make("item", {}, store)
    assert inputs.bags.weights is None and inputs.bags.thing_weights is None
    found = forward_and_backward(table, projection, "item", inputs)
    assert_close(found, forward_and_backward(table, projection, "item", without_transposed(inputs)))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_side_without_values(transposed):
    store = tiny_store()
    store.cardinalities = store.cardinalities | {"age": 0}
    store.user_multi["likes"].rows = [[] for _ in store.user_multi["likes"].rows]
    _, table, projection, inputs = make("user", {}, store)
    inputs = inputs if transposed else without_transposed(inputs)
    out = projection(table.lookup("user", inputs), inputs)
    assert out.shape == (6, WIDTH) and (out == 0).all() and out.dtype == torch.float32
    if transposed:
        out.sum().backward()
        assert (projection.weights[0].grad == 0).all() and [e.leaf.grad.shape for e in table.pop_touched()] == [(0, WIDTH)]


def test_a_side_without_features():
    store = tiny_store()
    store.cardinalities = store.cardinalities | {"age": 0, "likes": 0}
    _, table, projection, inputs = make("user", {}, store)
    assert projection.num_fields == 0 and len(projection.weights) == 0 and table.lookup("user", inputs) == ()
    assert (projection((), inputs) == torch.zeros(6, WIDTH)).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_autocast_leaves_the_sum_in_float32(transposed):
    _, table, projection, inputs = make("item", SETTINGS[2])
    inputs = inputs if transposed else without_transposed(inputs)
    plain = forward_and_backward(table, projection, "item", inputs)
    found = forward_and_backward(table, projection, "item", inputs, lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert found[0].dtype == torch.float32 and torch.equal(found[0], plain[0])
    assert all(torch.equal(a, b) for a, b in zip((*found[1], *found[2]), (*plain[1], *plain[2]), strict=True))


def test_parts_of_the_table():
    _, table, _, _ = make("item", SETTINGS[2])
    assert [tuple(p.shape) for p in table.parts] == [(21, 16), (15, 8)]  # row 0 and the item ids; colour, tags, age, likes
    assert not any(p.requires_grad for p in table.parts) and (table.parts[0][0] == 0).all() and (table.parts[1] != 0).all()
    assert list(table.state_dict()) == ["parts.0", "parts.1"]
    one = JointTable(make("item", {})[0], 0.5)
    assert [tuple(p.shape) for p in one.parts] == [(36, WIDTH)] and abs(float(one.parts[0][1:].std()) - 0.5) < 0.06


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_lookups_of_both_sides_are_disjoint_copies(settings):
    layout, table, _, items = make("item", settings)
    _, _, _, users = make("user", settings)
    local = table.lookup("item", items) + table.lookup("user", users)
    touched = table.pop_touched()
    assert all(entry.leaf is leaf for entry, leaf in zip(touched, local, strict=True)) and table.pop_touched() == []
    seen = [layout.parts[entry.part].begin + int(row) for entry in touched for row in entry.rows]
    assert len(set(seen)) == len(seen) and sorted(seen) == sorted([*items.rows[1:].tolist(), *users.rows[1:].tolist()])
    for entry in touched:
        assert torch.equal(table.parts[entry.part][entry.rows], entry.leaf) and entry.leaf.requires_grad
        entry.leaf.detach().zero_()
        assert (table.parts[entry.part][entry.rows] != 0).any()


def test_a_step_moves_the_output_against_the_gradient():
    """Table, look-up, backward pass and optimiser together: the sum of squares falls."""
    _, table, projection, inputs = make("item", SETTINGS[3])
    optimizer = TableOptimizer(table, "rowwise_adagrad", betas=(0.9, 0.98))
    losses = []
    for _ in range(30):
        loss = projection(table.lookup("item", inputs), inputs).square().mean()
        loss.backward()
        optimizer.begin_step()
        for entry in table.pop_touched():
            optimizer.step(entry, 0.1)
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
