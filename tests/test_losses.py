"""losses.py against torch.nn.functional references, gradcheck, chunk and dtype independence, and bounded memory."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from losses import _automatic_chunk, bce_loss, log_expected_count, softmax_loss

N, C, D, K = 37, 23, 8, 3


def softmax_loss_reference(query, item_emb, target_index, temperature, log_q=None, weights=None):
    logits = query @ item_emb.T / temperature
    if log_q is not None:
        logits = logits - log_q
    losses = F.cross_entropy(logits, target_index, reduction="none")
    return losses.mean() if weights is None else (losses * weights).sum() / weights.sum()


def bce_loss_reference(query, item_emb, pos_index, neg_index):
    pos = (query * item_emb[pos_index]).sum(-1)
    neg = (query[:, None] * item_emb[neg_index]).sum(-1)
    criterion = torch.nn.BCEWithLogitsLoss()
    return criterion(pos, torch.ones_like(pos)) + criterion(neg, torch.zeros_like(neg))


def inputs(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    item_emb = torch.randn(C, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    target = torch.randint(C, (N,), generator=generator)
    negatives = torch.randint(C, (N, K), generator=generator)
    log_q = torch.rand(C, generator=generator).log()
    weights = torch.rand(N, generator=generator)
    return query, item_emb, target, negatives, log_q, weights


def value_and_gradients(loss, *leaves, factor=1.0):
    return [loss.detach(), *torch.autograd.grad(loss * factor, leaves)]


@pytest.mark.parametrize("with_log_q", [False, True])
@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("chunk_size", [0, 1, 5, N, 1000])
def test_softmax_equals_cross_entropy(with_log_q, with_weights, chunk_size):
    query, item_emb, target, _, log_q, weights = inputs()
    log_q, weights = log_q.double() if with_log_q else None, weights.double() if with_weights else None
    ours = softmax_loss(query, item_emb, target, temperature=0.3, log_q=log_q, weights=weights, chunk_size=chunk_size)
    reference = softmax_loss_reference(query, item_emb, target, 0.3, log_q, weights)
    for a, b in zip(value_and_gradients(ours, query, item_emb, factor=7.0), value_and_gradients(reference, query, item_emb, factor=7.0)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("with_log_q", [False, True])
@pytest.mark.parametrize("chunk_size", [0, 1, 5, 1000])
def test_shared_candidates_besides_the_own_target(with_log_q, chunk_size):
    query, item_emb, target, _, log_q, _ = inputs()
    log_q = log_q.double() if with_log_q else None
    chosen = torch.tensor([2, 3, 5, 7, 11, 22])  # some targets are among them, most are not
    assert 0 < torch.isin(target, chosen).sum() < N
    ours = softmax_loss(query, item_emb, target, temperature=0.3, candidate_index=chosen, log_q=log_q, chunk_size=chunk_size)
    logits = query @ item_emb.T / 0.3 - (0 if log_q is None else log_q)
    allowed = torch.zeros(N, C, dtype=torch.bool)
    allowed[:, chosen] = True
    allowed[torch.arange(N), target] = True
    reference = F.cross_entropy(logits.masked_fill(~allowed, -torch.inf), target)
    for a, b in zip(value_and_gradients(ours, query, item_emb, factor=7.0), value_and_gradients(reference, query, item_emb, factor=7.0)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_all_items_as_candidates_is_the_full_softmax():
    query, item_emb, target, *_ = inputs()
    full = softmax_loss(query, item_emb, target, temperature=0.3)
    same = softmax_loss(query, item_emb, target, temperature=0.3, candidate_index=torch.arange(C))
    torch.testing.assert_close(value_and_gradients(same, query, item_emb), value_and_gradients(full, query, item_emb))


@pytest.mark.parametrize("num_negatives", [1, K])
@pytest.mark.parametrize("chunk_size", [0, 1, 5, 1000])
def test_bce_equals_the_baselines(num_negatives, chunk_size):
    query, item_emb, target, negatives, *_ = inputs()
    negatives = negatives[:, :num_negatives]
    ours = bce_loss(query, item_emb, target, negatives, chunk_size=chunk_size)
    reference = bce_loss_reference(query, item_emb, target, negatives)
    for a, b in zip(value_and_gradients(ours, query, item_emb, factor=-2.0), value_and_gradients(reference, query, item_emb, factor=-2.0)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_hand_computed():
    query, item_emb = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    zero, one = torch.tensor([0]), torch.tensor([[1]])
    assert softmax_loss(query, item_emb, zero, temperature=2.0).item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)
    # log_q of (1/2, 1/4): weights e 2 against 1 * 4
    log_q = torch.tensor([0.5, 0.25]).log()
    corrected = softmax_loss(query, item_emb, zero, temperature=2.0, log_q=log_q).item()
    assert corrected == pytest.approx(math.log(1 + 4 / (2 * math.e)), abs=1e-6)
    assert bce_loss(query, item_emb, zero, one).item() == pytest.approx(math.log(1 + math.exp(-2)) + math.log(2), abs=1e-6)


def test_gradcheck():
    query, item_emb, target, negatives, log_q, weights = inputs()
    query, item_emb = (t.detach()[:9].clone().requires_grad_() for t in (query, item_emb))
    target, negatives = target[:9] % 9, negatives[:9] % 9
    options = {"temperature": 0.5, "log_q": log_q[:9].double(), "weights": weights[:9].double(), "chunk_size": 4}
    assert torch.autograd.gradcheck(lambda q, x: softmax_loss(q, x, target, **options), (query, item_emb))
    assert torch.autograd.gradcheck(lambda q, x: bce_loss(q, x, target, negatives, chunk_size=4), (query, item_emb))


def test_one_input_alone_gets_its_gradient():
    query, item_emb, target, negatives, *_ = inputs()
    for loss in (softmax_loss(query, item_emb.detach(), target, temperature=1.0), bce_loss(query, item_emb.detach(), target, negatives)):
        (grad,) = torch.autograd.grad(loss, query)
        assert grad.shape == query.shape and grad.abs().sum() > 0
    with torch.no_grad():
        assert not softmax_loss(query, item_emb, target, temperature=1.0).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["softmax", "bce"])
def test_low_precision_inputs_under_autocast(name, dtype):
    query, item_emb, target, negatives, log_q, _ = inputs(dtype)
    exact = [t.detach().double().requires_grad_() for t in (query, item_emb)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        if name == "softmax":
            loss = softmax_loss(query, item_emb, target, temperature=0.5, log_q=log_q)
        else:
            loss = bce_loss(query, item_emb, target, negatives)
    assert loss.dtype == torch.float32
    if name == "softmax":
        reference = softmax_loss_reference(*exact, target, 0.5, log_q.double())
    else:
        reference = bce_loss_reference(*exact, target, negatives)
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-5)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    for leaf, a, b in zip((query, item_emb), torch.autograd.grad(loss, (query, item_emb)), torch.autograd.grad(reference, exact)):
        assert a.dtype == leaf.dtype == dtype
        assert (a.double() - b).norm() < tolerance * b.norm()


def test_float16_loss_scale_rescues_small_gradients():
    # Gradients of about 3e-9 are 0 in float16, unless the scale multiplies them while they are float32.
    query = torch.full((4, 2), 1e-4, dtype=torch.float16, requires_grad=True)
    item_emb = (torch.eye(2) * 1e-4).half().requires_grad_()
    target = torch.tensor([0, 0, 0, 0])
    weights = torch.tensor([1.0, 1e-4, 1e-4, 1e-4])
    loss = softmax_loss(query, item_emb, target, temperature=1.0, weights=weights)
    unscaled, scaled = torch.autograd.grad(loss, query, retain_graph=True)[0], torch.autograd.grad(loss * 2**15, query)[0]
    assert (unscaled[1:] == 0).all() and (scaled[1:] != 0).all()
    assert (scaled[1:].double() / 2**15).abs() == pytest.approx(0.5 * 1e-4 * 1e-4, rel=0.01)


def test_extreme_logits_stay_finite():
    query = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    item_emb = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    target = torch.tensor([1, 1])
    loss = softmax_loss(query, item_emb, target, temperature=0.5)
    torch.testing.assert_close(loss, softmax_loss_reference(query, item_emb, target, 0.5))
    assert loss.item() == pytest.approx(2000.0)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, (query, item_emb)))
    assert torch.isfinite(bce_loss(query, item_emb, target, torch.tensor([[0], [0]])))


def test_no_tokens():
    query, item_emb = torch.zeros(0, D, requires_grad=True), torch.ones(C, D, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    for loss in (softmax_loss(query, item_emb, none, temperature=1.0), bce_loss(query, item_emb, none, none.view(0, 1))):
        assert loss.item() == 0.0
        assert torch.autograd.grad(loss, item_emb)[0].abs().sum() == 0


class LargestTensor(TorchDispatchMode):
    """Notes the largest storage that any operation returns."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_memory_grows_with_the_chunk_only():
    num_tokens, num_items, chunk = 640, 500, 16
    query, item_emb = torch.randn(num_tokens, D, requires_grad=True), torch.randn(num_items, D, requires_grad=True)
    target = torch.randint(num_items, (num_tokens,))
    with LargestTensor() as tracer:
        softmax_loss(query, item_emb, target, temperature=1.0, log_q=torch.zeros(num_items), chunk_size=chunk).backward()
    assert tracer.entries <= max(chunk * num_items, num_tokens * D)
    with LargestTensor() as tracer:
        bce_loss(query, item_emb, target, torch.randint(num_items, (num_tokens, 50)), chunk_size=chunk).backward()
    assert tracer.entries <= max(chunk * 51 * D, num_tokens * 50)  # the indices themselves


def test_chunk_rule():
    query = torch.zeros(1, 64)
    assert _automatic_chunk(query, 1024) == 512  # 2 MB of float32
    assert _automatic_chunk(query, 12101) == 64
    assert _automatic_chunk(query, 10**7) == 64


def test_sampled_softmax_with_log_q_estimates_the_full_one():
    """Candidates drawn by popularity: with log_q the expected log-sum is near the full softmax's, without it far below."""
    generator = torch.Generator().manual_seed(0)
    num_items, num_in_batch, num_uniform = 400, 300, 60
    prob = torch.arange(1, num_items + 1).float().pow(-1.0)
    prob /= prob.sum()
    query, item_emb = torch.randn(1, D, generator=generator) * 0.3, torch.randn(num_items, D, generator=generator)
    full = torch.logsumexp(query @ item_emb.T, dim=1).item()
    estimates = {True: [], False: []}
    for _ in range(200):
        in_batch = torch.multinomial(prob, num_in_batch, True, generator=generator)
        drawn = torch.cat((in_batch, torch.randint(num_items, (num_uniform,), generator=generator))).unique()
        for unique, values in estimates.items():
            log_q = log_expected_count(prob[drawn], num_in_batch, num_uniform, num_items, unique=unique)
            values.append(torch.logsumexp(query @ item_emb[drawn].T - log_q, dim=1).exp().item())
    corrected = math.log(sum(estimates[True]) / 200)
    assert corrected == pytest.approx(full, abs=0.03)
    assert abs(math.log(sum(estimates[False]) / 200) - full) > 0.1  # the count of draws does not fit unique candidates


def test_log_expected_count():
    prob = torch.tensor([0.0, 0.01, 1.0])
    draws = torch.tensor([0.0 + 0.5, 1.0 + 0.5, 100.5])
    torch.testing.assert_close(log_expected_count(prob, 100, 50, 100, unique=False), draws.log())
    torch.testing.assert_close(log_expected_count(prob, 100, 50, 100), (1 - (-draws.double()).exp()).log().float())
    assert torch.isfinite(log_expected_count(prob, 0, 0, 100)).all()
    assert log_expected_count(prob, 10, 0, 5).dtype == torch.float32


def test_raises():
    query, item_emb, target, negatives, *_ = inputs()
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            softmax_loss(query, item_emb, target, temperature=temperature)
    with pytest.raises(ValueError, match="neg_index"):
        bce_loss(query, item_emb, target, negatives[:, 0])
