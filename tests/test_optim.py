import math

import pytest
import torch

from embedding import JointTable
from optim import TableOptimizer, clip_scale, dense_optimizer, gradient_norm, learning_rate_factor


def table(rows=6, width=3):
    torch.manual_seed(0)
    return JointTable(rows, width, 1.0)


def test_full_moments_equal_torch_adam_where_every_row_is_touched():
    ours, reference = table(), torch.nn.Parameter(table().weight.clone())
    optimizer = TableOptimizer(ours, "adam", betas=(0.9, 0.98))
    adam = torch.optim.Adam([reference], lr=0.01, betas=(0.9, 0.98))
    rows = torch.arange(1, 6)
    for step in range(20):
        grad = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        reference.grad = torch.cat((torch.zeros(1, 3), grad))
        optimizer.begin_step()
        optimizer.step(rows, grad, 0.01)
        adam.step()
    torch.testing.assert_close(ours.weight[1:], reference[1:].detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["adam", "rowwise_adam", "rowwise_adagrad"])
def test_only_touched_rows_change_and_padding_never(kind):
    ours = table()
    before = ours.weight.clone()
    optimizer = TableOptimizer(ours, kind, betas=(0.9, 0.98), weight_decay=0.1, l2_emb=0.1)
    optimizer.begin_step()
    optimizer.step(torch.tensor([0, 2, 4]), torch.ones(3, 3), 0.1)
    changed = (ours.weight != before).any(dim=1).tolist()
    assert changed == [False, False, True, False, True, False]
    assert (ours.weight[0] == 0).all()


def test_rowwise_adagrad_by_hand():
    ours = table()
    before = ours.weight[2].clone()
    optimizer = TableOptimizer(ours, "rowwise_adagrad", betas=(0.9, 0.98))
    grad = torch.tensor([[3.0, 0.0, 4.0]])
    for _ in range(2):
        optimizer.begin_step()
        optimizer.step(torch.tensor([2]), grad, 0.1)
    mean = 25 / 3
    expected = before - 0.1 * grad[0] / math.sqrt(mean) - 0.1 * grad[0] / math.sqrt(2 * mean)
    torch.testing.assert_close(ours.weight[2], expected)
    assert optimizer.second.shape == (6,)  # four bytes a row


def test_rowwise_adam_by_hand():
    ours = table()
    before = ours.weight[2].clone()
    optimizer = TableOptimizer(ours, "rowwise_adam", betas=(0.9, 0.98))
    first, second = torch.tensor([[3.0, 0.0, 4.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    optimizer.begin_step()
    optimizer.step(torch.tensor([2]), first, 0.1)
    optimizer.begin_step()
    optimizer.step(torch.tensor([2]), second, 0.1)
    moment = 25 / 3
    expected = before - 0.1 * first[0] / math.sqrt(moment)
    moment = 0.98 * moment + 0.02 / 3
    torch.testing.assert_close(ours.weight[2], expected - 0.1 * second[0] / math.sqrt(moment))


def test_scale_is_applied_before_the_moments():
    a, b = table(), table()
    for ours, grad, scale in ((a, 8.0, 0.25), (b, 2.0, 1.0)):
        optimizer = TableOptimizer(ours, "adam", betas=(0.9, 0.98))
        optimizer.begin_step()
        optimizer.step(torch.tensor([1]), torch.full((1, 3), grad), 0.1, scale)
        assert optimizer.second[1].allclose(torch.tensor(0.02 * 4.0))
    torch.testing.assert_close(a.weight, b.weight)


def test_state_round_trip_and_refusal():
    optimizer = TableOptimizer(table(), "adam", betas=(0.9, 0.98))
    optimizer.begin_step()
    optimizer.step(torch.tensor([1]), torch.ones(1, 3), 0.1)
    other = TableOptimizer(table(), "adam", betas=(0.9, 0.98))
    other.load_state_dict(optimizer.state_dict())
    assert other.step_count == 1 and torch.equal(other.first, optimizer.first)
    with pytest.raises(ValueError, match="rowwise_adagrad"):
        TableOptimizer(table(), "rowwise_adagrad", betas=(0.9, 0.98)).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="shape"):
        TableOptimizer(table(7), "adam", betas=(0.9, 0.98)).load_state_dict(optimizer.state_dict())


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
