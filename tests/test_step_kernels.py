"""The compiled loops of a step give what torch's operations give, up to rounding."""

import math

import pytest
import torch

import losses
import kernels
import step_kernels
from embedding import Touched
from layers import Dropout, gather_tokens
from losses import bce_loss
from optim import TableOptimizer

pytestmark = pytest.mark.skipif(step_kernels.compiled() is None, reason="numba is not installed")


class OneTable:
    def __init__(self, weight: torch.Tensor) -> None:
        self.parts = [weight]


def both(monkeypatch: pytest.MonkeyPatch, function) -> tuple:
    """What `function` gives with the loops, and by torch."""
    fast = function()
    monkeypatch.setattr(kernels, "ENABLED", False)
    assert step_kernels.compiled() is None
    return fast, function()


@pytest.mark.parametrize("num_negatives", [1, 3, 300])  # the last: more than a tile's logits a token
def test_bce(monkeypatch: pytest.MonkeyPatch, num_negatives: int) -> None:
    def losses():
        torch.manual_seed(0)
        query, items = 3 * torch.randn(1500, 7), 3 * torch.randn(40, 7)  # logits to about 60: softplus must not overflow
        query.requires_grad_(), items.requires_grad_()
        pos, neg = torch.randint(40, (1500,)), torch.randint(40, (1500, num_negatives))
        loss = bce_loss(query, items, pos, neg)
        (2 * loss).backward()
        return loss.detach(), query.grad, items.grad, bce_loss(query.detach(), items.detach(), pos, neg)

    for fast, slow in zip(*both(monkeypatch, losses), strict=True):
        torch.testing.assert_close(fast, slow)


def test_bce_by_hand() -> None:
    query, items = torch.tensor([[2.0]], requires_grad=True), torch.tensor([[1.0], [-1.5]], requires_grad=True)
    bce_loss(query, items, torch.tensor([0]), torch.tensor([[1]])).backward()
    positive, negative = 1 / (1 + math.exp(-2)) - 1, 1 / (1 + math.exp(3))  # sigmoid(2) - 1 and sigmoid(-3)
    assert query.grad.item() == pytest.approx(positive - 1.5 * negative)
    assert items.grad.flatten().tolist() == pytest.approx([2 * positive, 2 * negative])


@pytest.mark.parametrize("logit", [0.0, 1e-30, 0.3, 20.0, 86.9, 87.1, 90.0, 1e30, math.inf])
def test_bce_of_any_logit(logit: float) -> None:
    """The positive's and the negative's logits are +-logit: both losses and gradients against torch's softplus and sigmoid."""
    for sign in (1.0, -1.0):
        query, items = torch.tensor([[sign]], requires_grad=True), torch.tensor([[logit], [-logit]])
        loss = bce_loss(query, items, torch.tensor([0]), torch.tensor([[1]]))
        wrong = torch.tensor(-sign * logit)
        torch.testing.assert_close(loss, 2 * torch.nn.functional.softplus(wrong), atol=1e-30, rtol=1e-6)
        if math.isfinite(logit):
            loss.backward()
            torch.testing.assert_close(query.grad[0, 0], -2 * logit * wrong.sigmoid(), atol=1e-7, rtol=3e-6)


def test_bce_keeps_what_is_not_a_number() -> None:
    """The search for a step's fault relies on it."""
    for bad in range(2):
        query, items = torch.ones(3, 2, requires_grad=True), torch.ones(2, 2, requires_grad=True)
        with torch.no_grad():
            items[bad, 0] = math.nan
        loss = bce_loss(query, items, torch.tensor([0, 0, 0]), torch.tensor([[1], [1], [1]]))
        loss.backward()
        assert loss.isnan() and query.grad.isnan().any() and items.grad[bad].isnan().all() and not items.grad[1 - bad].isnan().any()


@pytest.mark.parametrize("width", [1, 7, 8, 32, 45, 128])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_of_rows(width: int, weighted: bool) -> None:
    torch.manual_seed(0)
    vectors, index = torch.randn(500, width), torch.randint(500, (4000,)).int()
    starts = torch.cat((torch.zeros(1), torch.randint(4001, (600,)).sort().values, torch.tensor([4000]))).int()
    weights = torch.rand(4000) if weighted else None
    out = torch.full((601, width), math.nan)
    arrays = (t.numpy() for t in (vectors, index, starts, torch.empty(0) if weights is None else weights, out))
    step_kernels.compiled().sum_bags(*arrays, 1, 601)
    expected = torch.nn.functional.embedding_bag(index, vectors, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)
    assert out[0].isnan().all()
    torch.testing.assert_close(out[1:], expected[1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num", [0, 1, 100])
def test_rows_of_a_table(num: int) -> None:
    table, rows, out = torch.randn(300, 9), torch.randperm(300)[:num].sort().values, torch.zeros(num, 9)
    step_kernels.compiled().take_rows(*(t.numpy() for t in (table, rows, out)), 0, num)
    assert torch.equal(out, table[rows])


@pytest.mark.parametrize("kind", ["rowwise_adam", "rowwise_adagrad"])
@pytest.mark.parametrize("options", [{}, {"l2_emb": 0.1, "weight_decay": 0.2}])
def test_row_wise_updates(monkeypatch: pytest.MonkeyPatch, kind: str, options: dict) -> None:
    def updated():
        torch.manual_seed(1)
        optimizer = TableOptimizer(OneTable(torch.randn(3000, 6)), kind, betas=(0.9, 0.98), **options)
        for _ in range(3):
            rows = torch.randperm(3000)[:2200].sort().values
            leaf = optimizer.table.parts[0][rows].requires_grad_()
            leaf.grad = torch.randn_like(leaf)
            optimizer.begin_step()
            optimizer.step(Touched(0, rows, leaf), 0.05, torch.tensor(0.7))
        return optimizer.table.parts[0], optimizer.second[0]

    for fast, slow in zip(*both(monkeypatch, updated), strict=True):
        torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize("size", [1, 3, 4, 5, 4097])
def test_dropout_masks_forward_and_backward_alike_at_any_size(size: int) -> None:
    x = torch.ones(size, requires_grad=True)
    out = Dropout(0.25).train()(x)
    out.sum().backward()
    assert torch.equal(out, x.grad) and set(out.unique().tolist()) <= {0.0, float(torch.tensor(1 / 0.75))}


def test_dropout_keeps_its_share_and_repeats_no_mask() -> None:
    torch.manual_seed(0)
    dropout, x = Dropout(0.2).train(), torch.ones(1 << 18)
    kept, again = dropout(x) > 0, dropout(x) > 0
    share = kept.float().mean().item()
    assert abs(share - 0.8) < 0.004 and not torch.equal(kept, again)  # 5 standard deviations
    lanes = kept.view(-1, 4).float()
    assert (lanes.T.corrcoef() - torch.eye(4)).abs().max() < 0.02 and abs((kept & again).float().mean().item() - 0.64) < 0.005


@pytest.mark.parametrize("num", [0, 3, 5000])
def test_gathered_tokens_and_their_gradients(num: int) -> None:
    first, second = torch.randn(700, 6, requires_grad=True), torch.randn(40, 6, requires_grad=True)
    index, grad = torch.randint(0, 740, (num,)), torch.randn(num, 6)
    found = gather_tokens(first, second, index)
    expected = torch.cat((first, second)).index_select(0, index)
    assert torch.equal(found, expected)
    for mine, true in zip(torch.autograd.grad(found, (first, second), grad), torch.autograd.grad(expected, (first, second), grad)):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("columns", [0, 1, 63, 64, 200])
@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("with_log_q", [True, False])
def test_exponentials_of_logits(columns: int, beside: bool, with_log_q: bool) -> None:
    if not beside and not columns:
        pytest.skip("the target is one of the candidates")
    torch.manual_seed(0)
    logits, own = 30 * torch.randn(40, columns), 30 * torch.randn(40)
    log_q = torch.randn(columns) if with_log_q else None
    place = torch.randint(-1, max(1, columns), (40,)) if beside else None
    if beside and not columns:
        place.fill_(-1)
    slow, fast = logits.clone(), logits.clone()
    expected = losses._exponentials(slow, log_q, own, place, hard=0)
    found = losses._fast_exponentials(step_kernels.compiled(), fast, log_q, own, place)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-30)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [3, 150])
def test_exponentials_of_what_is_not_finite(value: float, place: int) -> None:
    logits = torch.randn(2, 170)
    logits[1, place] = value
    _, total, _ = losses._fast_exponentials(step_kernels.compiled(), logits, None, torch.zeros(2), torch.full((2,), -1))
    assert total[0].isfinite() and not total[1].isfinite()
