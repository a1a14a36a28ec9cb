"""Options of losses.softmax_loss and bce_loss against plain torch on explicit logits, values and all gradients."""

import pytest
import torch
import torch.nn.functional as F
from test_losses import D, N, inputs, value_and_gradients

from losses import Hidden, MoreCandidates, bce_loss, softmax_loss

M = 23  # items of inputs()
OWNERS = torch.arange(N) // 5  # users of five tokens


def hidden_items(seed=0) -> Hidden:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 7, (int(OWNERS.max()) + 1,), generator=generator)
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    return Hidden(OWNERS, offsets, torch.randint(M, (int(offsets[-1]),), generator=generator))


def reference(
    query, item_emb, target, temperature, candidates=None, log_q=None, weights=None, smoothing=0.0, hidden=None, hard=0, more=None
):
    """A row of logits a token, made one by one: the own target first, then its negatives."""
    losses = []
    for n in range(N):
        keep = [c for c in (range(M) if candidates is None else candidates.tolist()) if c != target[n]]
        if hidden is not None:
            own = hidden.items[hidden.offsets[OWNERS[n]] : hidden.offsets[OWNERS[n] + 1]].tolist()
            keep = [c for c in keep if c not in own]
        index = torch.tensor([int(target[n]), *keep])
        logits = item_emb[index] @ query[n] / temperature
        if log_q is not None:
            logits = logits - log_q[index]
        if more is not None:
            extra = more.vectors @ query[n] / temperature
            logits = torch.cat((logits, extra if log_q is None else extra - more.log_q))
        if hard and len(logits) - 1 > hard:
            logits = torch.cat((logits[:1], logits[1:].topk(hard).values))
        losses.append(F.cross_entropy(logits[None], torch.zeros(1, dtype=torch.int64), label_smoothing=smoothing))
    losses = torch.stack(losses)
    return losses.mean() if weights is None else (losses * weights).sum() / weights.sum()


OPTIONS = [
    {"smoothing": 0.2},
    {"hidden": hidden_items()},
    {"hard": 1},
    {"hard": 6},
    {"hard": 500},
    {"hidden": hidden_items(1), "hard": 4},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("with_log_q", [False, True])
@pytest.mark.parametrize("chunk_size", [0, 7])
def test_options_against_rows_made_one_by_one(options, sampled, with_log_q, chunk_size):
    query, item_emb, target, _, log_q, weights = inputs()
    log_q, weights = log_q.double() if with_log_q else None, weights.double()
    candidates = torch.tensor([0, 2, 3, 5, 8, 11, 12, 20]) if sampled else None
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    ours = softmax_loss(query, item_emb, target, temperature=temperature, candidate_index=candidates, log_q=log_q, weights=weights,
                        label_smoothing=options.get("smoothing", 0.0), hidden=options.get("hidden"), hard_negatives=options.get("hard", 0),
                        chunk_size=chunk_size)  # fmt: skip
    leaves = query, item_emb, temperature
    other = reference(query, item_emb, target, temperature, candidates, log_q, weights, **options)
    for a, b in zip(value_and_gradients(ours, *leaves, factor=7.0), value_and_gradients(other, *leaves, factor=7.0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("options", [{}, {"smoothing": 0.1}, {"hard": 5}], ids=str)
def test_more_candidates(sampled, options):
    query, item_emb, target, _, log_q, _ = inputs()
    more = MoreCandidates(torch.randn(9, D, dtype=torch.float64), torch.rand(9, dtype=torch.float64))
    candidates = torch.tensor([1, 4, 9, 16]) if sampled else None
    ours = softmax_loss(query, item_emb, target, temperature=0.3, candidate_index=candidates, log_q=log_q.double(), more=more,
                        label_smoothing=options.get("smoothing", 0.0), hard_negatives=options.get("hard", 0))  # fmt: skip
    loss, of_query, of_items = value_and_gradients(ours, query, item_emb)
    whole = reference(query, item_emb, target, 0.3, candidates, log_q.double(), more=more, **options)
    expected = value_and_gradients(whole, query, item_emb)
    torch.testing.assert_close((loss, of_query), expected[:2], rtol=1e-9, atol=1e-10)
    if options.get("hard"):  # which count is said by all
        candidates = torch.arange(M) if candidates is None else candidates
        logits = (
            torch.cat((item_emb[candidates], more.vectors)) @ query.T / 0.3 - torch.cat((log_q.double()[candidates], more.log_q))[:, None]
        )
        logits[: -len(more.vectors)].masked_fill_(candidates[:, None] == target, -torch.inf)
        least = logits.topk(options["hard"], dim=0).values.amin(0)
        kept = logits[: len(candidates)] >= least
        own = (item_emb[target] * query).sum(1) / 0.3 - log_q.double()[target]
        table = torch.cat((own[None], logits[: len(candidates)].masked_fill(~kept, -torch.inf)))
        without = F.cross_entropy(table.T, torch.zeros(N, dtype=torch.int64))
    else:
        without = reference(query, item_emb, target, 0.3, candidates, log_q.double(), **options)
    torch.testing.assert_close(of_items, value_and_gradients(without, query, item_emb)[2], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("hard", [0, 40])
def test_more_candidates_that_score_far_higher_leave_the_items_their_gradient(hard):
    """By hundreds: exponentials relative to the highest of all would all be 0."""
    query, item_emb, target, _, log_q, _ = inputs()
    query, item_emb = (t.detach().float().requires_grad_() for t in (query, item_emb))
    more = MoreCandidates(300 * query.detach()[:9], torch.zeros(9))
    options = {"temperature": 0.5, "log_q": log_q, "hard_negatives": hard}
    loss = softmax_loss(query, item_emb, target, more=more, **options)
    grads = torch.autograd.grad(loss, [query, item_emb])
    assert loss.isfinite() and loss > 100 and grads[0].isfinite().all()
    (without,) = torch.autograd.grad(softmax_loss(query, item_emb, target, temperature=0.5, log_q=log_q), item_emb)
    torch.testing.assert_close(grads[1], without, rtol=1e-4, atol=1e-6)


def test_more_candidates_do_not_make_the_items_drift():
    """What a token pushes away of item_emb is as much as what it pulls, however many candidates have no gradient."""
    query, item_emb, target, *_ = inputs()
    more = MoreCandidates(torch.randn(500, D, dtype=torch.float64), None)
    loss = softmax_loss(query, item_emb, target, temperature=0.3, more=more)
    (grad,) = torch.autograd.grad(loss, item_emb)
    assert grad.sum(0).abs().max() < 1e-12 < grad.abs().max()


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"hard_negatives": 5}, {"hidden": hidden_items()}], ids=str)
def test_no_candidates_leave_the_target_alone(options):
    query, item_emb, target, _, log_q, _ = inputs()
    nothing = torch.zeros(0, dtype=torch.int64)
    loss = softmax_loss(query, item_emb, target, temperature=0.3, candidate_index=nothing, log_q=log_q.double(), **options)
    assert loss == 0 and all(float(g.abs().max()) < 1e-12 for g in torch.autograd.grad(loss, (query, item_emb)))


def test_all_negatives_hidden_leaves_the_target_alone():
    query, item_emb, target, *_ = inputs()
    everything = Hidden(torch.zeros(N, dtype=torch.int64), torch.tensor([0, M]), torch.arange(M))
    for candidates in (None, torch.arange(0, M, 2)):
        loss = softmax_loss(query, item_emb, target, temperature=0.3, candidate_index=candidates, hidden=everything)
        assert loss == 0 and all(float(g.abs().max()) < 1e-12 for g in torch.autograd.grad(loss, (query, item_emb)))


@pytest.mark.parametrize("chunk_size", [0, 4])
def test_weights_of_bce(chunk_size):
    query, item_emb, target, negatives, _, weights = inputs()
    weights = weights.double()
    pos = F.binary_cross_entropy_with_logits((query * item_emb[target]).sum(-1), torch.ones(N, dtype=torch.float64), reduction="none")
    logits = (query[:, None] * item_emb[negatives]).sum(-1)
    neg = F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits), reduction="none").mean(1)
    expected = ((pos + neg) * weights).sum() / weights.sum()
    ours = bce_loss(query, item_emb, target, negatives, weights=weights, chunk_size=chunk_size)
    for a, b in zip(value_and_gradients(ours, query, item_emb), value_and_gradients(expected, query, item_emb), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_smoothing_does_not_go_with_hidden_candidates():
    query, item_emb, target, *_ = inputs()
    for options in ({"hidden": hidden_items()}, {"hard_negatives": 3}):
        with pytest.raises(ValueError, match="label_smoothing"):
            softmax_loss(query, item_emb, target, temperature=0.3, label_smoothing=0.1, **options)
