import math

import pytest
import torch

import optim
from embedding import JointTable, Touched
from features import Field, TableLayout
from optim import TableOptimizer, clip_scale, dense_optimizer, gradient_norm, learning_rate_factor

KINDS = ["adam", "rowwise_adam", "rowwise_adagrad"]


def table(rows=6, width=3, *more):
    """A table of one field of rows - 1 values; more: (values, width) of further fields, each a part of its own."""
    fields, offset = [], 0
    for number, (size, field_width) in enumerate([(rows - 1, width), *more]):
        fields.append(Field(f"f{number}", "item", "single", offset, size, field_width, size))
        offset += size
    torch.manual_seed(0)
    return JointTable(TableLayout(tuple(fields)), 1.0)


def touched(table, rows, grad, part=0):
    """Rows as `lookup` hands them out, with their gradient."""
    rows = torch.as_tensor(rows)
    leaf = table.parts[part].index_select(0, rows).requires_grad_()
    leaf.grad = grad.clone()  # it is overwritten
    return Touched(part, rows, leaf)


@pytest.mark.parametrize("width", [3, 4])  # rows of an even width are written two numbers at a time
def test_full_moments_equal_torch_adam_where_every_row_is_touched(width):
    ours, reference = table(6, width), torch.nn.Parameter(table(6, width).parts[0].detach().clone())
    optimizer = TableOptimizer(ours, "adam", betas=(0.9, 0.98))
    adam = torch.optim.Adam([reference], lr=0.01, betas=(0.9, 0.98))
    rows = torch.arange(1, 6)
    for step in range(20):
        grad = torch.randn(5, width, generator=torch.Generator().manual_seed(step))
        reference.grad = torch.cat((torch.zeros(1, width), grad))
        optimizer.begin_step()
        optimizer.step(touched(ours, rows, grad), 0.01)
        adam.step()
    torch.testing.assert_close(ours.parts[0][1:], reference[1:].detach(), atol=1e-6, rtol=1e-5)
    assert (ours.parts[0][0] == 0).all()


@pytest.mark.parametrize("width", [3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_only_touched_rows_change_and_padding_never(kind, width):
    ours = table(6, width)
    before = ours.parts[0].clone()
    optimizer = TableOptimizer(ours, kind, betas=(0.9, 0.98), weight_decay=0.1, l2_emb=0.1)
    optimizer.begin_step()
    optimizer.step(touched(ours, [2, 4], torch.ones(2, width)), 0.1)
    changed = (ours.parts[0] != before).any(dim=1).tolist()
    assert changed == [False, False, True, False, True, False]
    assert (ours.parts[0][0] == 0).all()
    state = [*optimizer.first, *optimizer.second]
    assert all((moments.reshape(6, -1) != 0).any(dim=1).tolist() == changed for moments in state) and len(state) == 1 + (kind == "adam")


def test_rowwise_adagrad_by_hand():
    ours = table()
    before = ours.parts[0][2].clone()
    optimizer = TableOptimizer(ours, "rowwise_adagrad", betas=(0.9, 0.98))
    grad = torch.tensor([[3.0, 0.0, 4.0]])
    for _ in range(2):
        optimizer.begin_step()
        optimizer.step(touched(ours, [2], grad), 0.1)
    mean = 25 / 3
    expected = before - 0.1 * grad[0] / math.sqrt(mean) - 0.1 * grad[0] / math.sqrt(2 * mean)
    torch.testing.assert_close(ours.parts[0][2], expected)
    assert [m.shape for m in optimizer.second] == [(6,)] and optimizer.first == []  # four bytes a row


def test_rowwise_adam_by_hand():
    ours = table()
    before = ours.parts[0][2].clone()
    optimizer = TableOptimizer(ours, "rowwise_adam", betas=(0.9, 0.98))
    first, second = torch.tensor([[3.0, 0.0, 4.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    optimizer.begin_step()
    optimizer.step(touched(ours, [2], first), 0.1)
    optimizer.begin_step()
    optimizer.step(touched(ours, [2], second), 0.1)
    moment = 25 / 3
    expected = before - 0.1 * first[0] / math.sqrt(moment)
    moment = 0.98 * moment + 0.02 / 3
    torch.testing.assert_close(ours.parts[0][2], expected - 0.1 * second[0] / math.sqrt(moment))


def test_scale_is_applied_before_the_moments():
    a, b = table(), table()
    for ours, grad, scale in ((a, 8.0, 0.25), (b, 2.0, 1.0)):
        optimizer = TableOptimizer(ours, "adam", betas=(0.9, 0.98))
        optimizer.begin_step()
        optimizer.step(touched(ours, [1], torch.full((1, 3), grad)), 0.1, scale)
        assert optimizer.second[0][1].allclose(torch.tensor(0.02 * 4.0))
    torch.testing.assert_close(a.parts[0], b.parts[0])


def test_state_round_trip_and_refusal():
    ours = table()
    optimizer = TableOptimizer(ours, "adam", betas=(0.9, 0.98))
    optimizer.begin_step()
    optimizer.step(touched(ours, [1], torch.ones(1, 3)), 0.1)
    other = TableOptimizer(table(), "adam", betas=(0.9, 0.98))
    other.load_state_dict(optimizer.state_dict())
    assert other.step_count == 1 and torch.equal(other.first[0], optimizer.first[0]) and torch.equal(other.second[0], optimizer.second[0])
    assert (other.first[0][1] != 0).all() and other.first[0] is not optimizer.first[0]
    with pytest.raises(ValueError, match="rowwise_adagrad"):
        TableOptimizer(table(), "rowwise_adagrad", betas=(0.9, 0.98)).load_state_dict(optimizer.state_dict())
    for another in (table(7), table(6, 3, (4, 2))):
        with pytest.raises(ValueError, match="shape"):
            TableOptimizer(another, "adam", betas=(0.9, 0.98)).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_updated_as_if_each_were_a_table_alone(kind):
    settings = {"betas": (0.9, 0.98), "weight_decay": 0.1, "l2_emb": 0.2}
    together = table(6, 3, (7, 2), (3, 5))
    alone = [table(6, 3), table(8, 2), table(4, 5)]
    assert [tuple(p.shape) for p in together.parts] == [(6, 3), (7, 2), (3, 5)]
    for part, one in zip(together.parts, alone):  # later parts have no padding row
        one.parts[0][-len(part) :] = part.detach()
    all_of_it, ones = TableOptimizer(together, kind, **settings), [TableOptimizer(t, kind, **settings) for t in alone]
    for step, chosen in enumerate([(0, 1, 2), (1, 2), (2, 0)]):
        for optimizer in (all_of_it, *ones):
            optimizer.begin_step()
        for part in chosen:
            size, width = together.parts[part].shape
            generator = torch.Generator().manual_seed(10 * step + part)
            rows = torch.randperm(size - 1, generator=generator)[:2].sort().values + 1
            grad = torch.randn(2, width, generator=generator)
            all_of_it.step(touched(together, rows, grad, part), 0.1, 0.5)
            ones[part].step(touched(alone[part], rows + (part > 0), grad), 0.1, 0.5)
    for part, one, optimizer, first_row in zip(together.parts, alone, ones, (0, 1, 1)):
        assert torch.equal(part, one.parts[0][first_row:])
    for name in ("first", "second"):
        for mine, optimizer, first_row in zip(getattr(all_of_it, name), ones, (0, 1, 1)):
            assert torch.equal(mine, getattr(optimizer, name)[0][first_row:])
    state = all_of_it.state_dict()
    other = TableOptimizer(table(6, 3, (7, 2), (3, 5)), kind, **settings)
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for name in ("first", "second") for a, b in zip(getattr(other, name), state[name], strict=True))


@pytest.mark.parametrize("l2_emb", [0.0, 0.2])
@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_nothing(kind, scale, l2_emb, monkeypatch):
    results = []
    for entries in (1 << 18, 9, 1):  # 9 entries of width 4: chunks of 2 rows, the last of 1; and rows one by one
        monkeypatch.setattr(optim, "CHUNK_ENTRIES", entries)
        ours = table(12, 4)
        optimizer = TableOptimizer(ours, kind, betas=(0.9, 0.98), weight_decay=0.1, l2_emb=l2_emb)
        for step in range(3):
            optimizer.begin_step()
            grad = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
            optimizer.step(touched(ours, [1, 3, 4, 8 + step, 11], grad), 0.1, scale)
        results.append([ours.parts[0].detach().clone(), *optimizer.first, *optimizer.second])
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_a_step_without_rows_is_legal():
    ours = table()
    before = ours.parts[0].clone()
    optimizer = TableOptimizer(ours, "rowwise_adam", betas=(0.9, 0.98))
    optimizer.begin_step()
    optimizer.step(touched(ours, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3)), 0.1)
    assert torch.equal(ours.parts[0], before)


def test_decay_and_l2_by_hand():
    ours = table()
    before = ours.parts[0][3].clone()
    optimizer = TableOptimizer(ours, "rowwise_adagrad", betas=(0.9, 0.98), weight_decay=0.5, l2_emb=0.2)
    optimizer.begin_step()
    optimizer.step(touched(ours, [3], torch.tensor([[3.0, 0.0, 4.0]])), 0.1, 2.0)
    grad = 2.0 * torch.tensor([3.0, 0.0, 4.0]) + 0.2 * before  # the penalty is not clipped
    expected = before * (1 - 0.1 * 0.5) - 0.1 * grad / grad.square().mean().sqrt()
    torch.testing.assert_close(ours.parts[0][3], expected)


def test_decay_leaves_vectors_alone_and_the_table_out():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2), table())
    optimizer = dense_optimizer(model, "adamw", lr=0.1, betas=(0.9, 0.98), weight_decay=0.5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 3]


def test_norm_and_clip():
    norm = gradient_norm([torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])])
    assert float(norm) == 5.0
    assert float(clip_scale(norm, 1.0)) == pytest.approx(0.2, rel=1e-5)
    assert float(clip_scale(norm, 10.0)) == 1.0 and clip_scale(norm, 0.0) == 1.0
    assert not gradient_norm([torch.tensor([float("nan")]), torch.ones(2)]).isfinite()


def test_schedules_by_hand():
    rate = lambda step, **more: learning_rate_factor(step, **({"schedule": "constant", "warmup_steps": 4, "total_steps": 14} | more))
    assert [rate(s) for s in (0, 1, 3, 4, 13)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    cosine = [rate(s, schedule="cosine", min_lr_ratio=0.1) for s in (4, 9, 14, 99)]
    assert cosine == pytest.approx([1.0, 0.55, 0.1, 0.1])
    assert [rate(s, schedule="step", warmup_steps=0, steps_per_drop=3, gamma=0.5) for s in (0, 2, 3, 6)] == [1, 1, 0.5, 0.25]
