"""Losses between query vectors and item vectors, in chunks of tokens: BCE, sampled softmax with logQ correction, full softmax.

Must not know models, batches or settings; pure functions of tensors.

Legend: N tokens (positions with a target), D width, C candidates, M unique items, K negatives a token, n tokens a chunk.

A naive softmax over 12,101 items of 2,300 tokens makes several matrices of 111 MB, whose page faults and cache misses cost more than
the arithmetic. Here a chunk's logits live in one reused buffer that fits in cache, the gradients are computed there and then, and
backward only scales them: nothing of N x C exists. The saved gradients are float32 (float64 for float64 inputs) whatever the inputs, so a
float16 loss scale, which arrives as grad_output, multiplies them before they are rounded to float16 and nothing underflows.

Measured, one core of a Xeon (sgemm 170 GFLOP/s), forward and backward, microseconds a token at D = 64 by the size of the buffer:
C = 1,024: 2.7 (0.25 MB), 2.5 (0.5 MB), 2.5 (1 MB), 3.0 (4 MB). C = 12,101: 50 (0.8 MB, 16 tokens), 39 (1.5 MB), 38 (3 MB), 38 (6 MB),
41 (12 MB), 87 (49 MB). The products alone take 2.3 and 27. Hence CHUNK_ENTRIES (the two cores share the rows) and MIN_CHUNK.
One compiled loop a row (step_kernels.py) in place of five operations a chunk: 107 ms of processor time, 89, for 12,070 tokens, 3,072
candidates, D = 64 (one core of a Zen 5).
Rejected: torch.softmax in place (twice the time of subtract, exp, sum; the division goes into the D-wide side of the products);
blocks of candidates with an online logsumexp (a fourth product to save 8 % at 12 MB); a pass that divides the probabilities.
All products run in float32: bfloat16 logits would be off by 0.06 at a logit of 20, and bfloat16 gradient products gained nothing (18 % more
time at C = 12,101, for the casts).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

import step_kernels
from blas import mm, plain_rows
from parallel import Piece, halves, row_pieces, run

CHUNK_ENTRIES = 1 << 19  # logits a chunk on CPU: 2 MB of float32
MIN_CHUNK = 64  # tokens; thinner products are slower than cache misses
CUDA_CHUNK_ENTRIES = 1 << 26
MIN_EXPECTED_COUNT = 1e-12


class Hidden(NamedTuple):
    """Items that are no negatives of some tokens: those of the token's user. A target is never hidden from its own token."""

    owner: Tensor  # (N,) int64 user of each token
    offsets: Tensor  # (B + 1,) int64: user u's are items[offsets[u] : offsets[u + 1]]
    items: Tensor  # (Z,) int64 into item_emb; a user's own may repeat


class MoreCandidates(NamedTuple):
    """Candidates that are not among item_emb, and have no gradient: none of them is a token's target.

    The gradient of item_emb is that of the loss without them. Else a target would be pulled towards its query with all the weight that the
    candidates with a gradient do not push away: what is pushed and what is pulled would no longer cancel, all of item_emb would drift
    towards all queries, away from vectors that stay where they are, and the loss would fall for that alone.
    """

    vectors: Tensor  # (E, D)
    log_q: Tensor | None  # (E,)


class _Terms(NamedTuple):
    """Arguments of `softmax_loss` that have no gradient."""

    target_index: Tensor
    temperature: float
    candidate_index: Tensor | None
    log_q: Tensor | None
    weights: Tensor | None
    label_smoothing: float
    hidden: Hidden | None
    hard_negatives: int
    more: MoreCandidates | None


def softmax_loss(
    query: Tensor,
    item_emb: Tensor,
    target_index: Tensor,
    *,
    temperature: float | Tensor,
    candidate_index: Tensor | None = None,
    log_q: Tensor | None = None,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    hidden: Hidden | None = None,
    hard_negatives: int = 0,
    more: MoreCandidates | None = None,
    chunk_size: int = 0,
) -> Tensor:
    """Softmax cross-entropy of each token's target among itself and C shared candidates (sampled softmax) or all items (full softmax).

    Logits are query . item / temperature - log_q, the target's too (Yi et al. 2019, Sampling-bias-corrected neural modeling, eq. 3).
    query: (N, D). item_emb: (M, D), each item once; cosine similarity is the caller's: normalised vectors. target_index: (N,) int64 into
    item_emb. temperature: above 0; a scalar tensor gets its gradient. candidate_index: (C,) int64 into item_emb, each once; a token's own
    target among them counts as its target only, never as a negative;
    None = all M. log_q: (M,) or None, see `log_expected_count`; no gradient flows into it.
    weights: (N,) or None. label_smoothing: as torch's cross_entropy: this share of the wanted probability is spread evenly over a token's
    candidates and its target; not together with the next two. hidden: candidates that are no negatives of some tokens. hard_negatives:
    only so many of a token's negatives count, those of the highest logits (ties with the last of them too); 0 = all. more: candidates
    besides, without a gradient.
    chunk_size: tokens a chunk; 0 = automatic; it changes rounding only.
    Returns the mean over tokens, weighted by weights: scalar float32 (float64 for float64 inputs); 0 where there is no token.
    """
    learnt = isinstance(temperature, Tensor)
    divisor = temperature.item() if learnt else float(temperature)
    if not learnt and not temperature > 0:
        raise ValueError(f"softmax_loss: temperature is {temperature}; expected a number above 0.")
    if label_smoothing and (hidden is not None or hard_negatives):
        raise ValueError("softmax_loss: label_smoothing spreads over all candidates; expected it without hidden and hard_negatives.")
    num_candidates = (len(item_emb) if candidate_index is None else len(candidate_index)) + (0 if more is None else len(more.vectors))
    chunk = chunk_size or _automatic_chunk(query, num_candidates)
    terms = _Terms(
        target_index,
        divisor,
        candidate_index,
        log_q,
        weights,
        label_smoothing,
        hidden,
        min(hard_negatives, num_candidates),
        more,
    )
    return _SoftmaxLoss.apply(query, item_emb, temperature if learnt else None, terms, chunk)


def bce_loss(
    query: Tensor, item_emb: Tensor, pos_index: Tensor, neg_index: Tensor, *, weights: Tensor | None = None, chunk_size: int = 0
) -> Tensor:
    """The organisers' baseline's loss: BCE with logits of the positive against 1, plus that of the negatives against 0.

    query: (N, D). item_emb: (M, D), the batch's unique items. pos_index: (N,) int64, neg_index: (N, K) int64, both into item_emb.
    weights: (N,) of the tokens in both means, or None. chunk_size: tokens a chunk; 0 = automatic.
    Returns mean over tokens + mean over tokens and negatives: scalar float32 (float64 for
    float64 inputs); 0 where there is no token.
    """
    if neg_index.ndim != 2:
        raise ValueError(f"bce_loss: expected neg_index (N, K), found shape {tuple(neg_index.shape)}.")
    chunk = chunk_size or _automatic_chunk(query, query.shape[1] * (1 + neg_index.shape[1]))
    return _BCELoss.apply(query, item_emb, pos_index, neg_index, weights, chunk)


def log_expected_count(
    item_prob: Tensor, num_in_batch: float, num_uniform: int, num_items: int, *, others: Tensor | float = 0.0, unique: bool = True
) -> Tensor:
    """log_q of candidates drawn by the batch's targets and uniform negatives together, for the correction of sampled softmax.

    item_prob: (C,) share of the training events that are this candidate. num_in_batch, num_uniform: draws of each kind; 0 = that kind
    is off. num_items: items the uniform draws are from. others: (C,) expected draws of further kinds.
    unique: a candidate drawn several times stands in the list once, so its expected
    count there is the probability 1 - exp(-draws) of being in it; only with that does the corrected sum estimate the full softmax's
    without bias (with draws, an item that is drawn 50 times for every batch would count for a fiftieth). False: the expected number of
    draws (Yi et al. 2019), for lists with repeats. Returns (C,) float32, finite.
    """
    draws = item_prob.float() * num_in_batch + (num_uniform / max(1, num_items) + others)
    return (-torch.expm1(-draws) if unique else draws).clamp_min(MIN_EXPECTED_COUNT).log()


def _automatic_chunk(query: Tensor, entries_per_token: int) -> int:
    entries = CUDA_CHUNK_ENTRIES if query.is_cuda else CHUNK_ENTRIES
    return max(MIN_CHUNK, entries // max(1, entries_per_token))


def _work_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where an input is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


class _SavedGradients(torch.autograd.Function):
    """Backward of the losses: scale the saved gradients of query and item_emb by grad_output, then round to the inputs' dtype."""

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        saved = ctx.saved_tensors
        # On CPU it is nearly always 1, and 4 MB need not be multiplied; CUDA would have to wait for the answer.
        if grad_output.device.type != "cpu" or grad_output != 1:
            saved = [None if grad is None else grad * grad_output for grad in saved]
        scaled = [None if grad is None else grad.to(dtype) for grad, dtype in zip(saved, ctx.dtypes)]
        return *scaled, *[None] * ctx.num_others


def _save(ctx, inputs: tuple[Tensor | None, ...], grads: tuple[Tensor | None, ...], num_others: int) -> None:
    ctx.save_for_backward(*grads)
    ctx.dtypes, ctx.num_others = [None if x is None else x.dtype for x in inputs], num_others


class _SoftmaxLoss(_SavedGradients):
    @staticmethod
    def forward(ctx, query, item_emb, temperature, terms, chunk):
        with torch.autocast(query.device.type, enabled=False):
            with_grad = any(ctx.needs_input_grad[:3])
            loss, grad_query, grad_item = _softmax_forward(query, item_emb, terms, chunk, with_grad)
            grad_temperature = None
            if ctx.needs_input_grad[2]:  # logits depend on it as on the queries' scale: d / d(1 / temperature) over all queries
                grad_temperature = -(grad_query * query.detach().to(grad_query.dtype)).sum() / terms.temperature
        _save(ctx, (query, item_emb, temperature), (grad_query, grad_item, grad_temperature), 2)
        return loss


def _softmax_forward(query, item_emb, terms: _Terms, chunk, with_grad):
    """(loss, gradient of query (N, D), gradient of item_emb (M, D)); the gradients are None without `with_grad`."""
    target_index, temperature, candidate_index, log_q, weights, smoothing, hidden, hard, more = terms
    dtype, num_tokens, device = _work_dtype(query, item_emb), len(query), query.device
    items = item_emb.detach().to(dtype)  # (M, D)
    candidates = items if candidate_index is None else items.index_select(0, candidate_index)  # (C, D)
    places = None if candidate_index is None else _places(candidate_index, len(items))
    # (N,) where among the candidates each target stands, -1 where it does not; None: it stands at target_index, and may stay there
    own_place = places.index_select(0, target_index) if places is not None else target_index if hard else None
    hidden = None if hidden is None else _hidden_places(hidden, places)
    log_q = None if log_q is None else log_q.detach().to(dtype)
    candidate_log_q = log_q if log_q is None or candidate_index is None else log_q.index_select(0, candidate_index)
    num_with_grad = len(candidates)
    if more is not None:
        candidates = torch.cat((candidates, more.vectors.detach().to(dtype)))
        candidate_log_q = None if log_q is None else torch.cat((candidate_log_q, more.log_q.to(dtype)))
    turned = plain_rows(candidates.T)  # (D, C), once for all chunks
    plain = more is None and not hard and hidden is None and not query.is_cuda and dtype == torch.float32 and type(query) is Tensor
    fast = step_kernels.compiled() if plain else None
    exponentials = partial(_exponentials, hard=hard) if fast is None else partial(_fast_exponentials, fast)
    spread = item_spread = _Spread(candidates, candidate_log_q, smoothing) if smoothing else None
    if smoothing and more is not None:
        item_spread = _Spread(candidates[:num_with_grad], None if log_q is None else candidate_log_q[:num_with_grad], smoothing)
    # The weight of each token in the mean: (N,)
    share = torch.full((num_tokens,), 1.0, dtype=dtype, device=device) if weights is None else weights.detach().to(dtype)
    share = share / share.sum().clamp_min(torch.finfo(dtype).tiny)
    grad_query = torch.empty(num_tokens, query.shape[1], dtype=dtype, device=device) if with_grad else None
    pieces = [Piece(0, num_tokens)] if query.is_cuda else halves(row_pieces(num_tokens, MIN_CHUNK))

    def job(piece: Piece) -> tuple[Tensor, Tensor | None]:
        """The share of one piece of the tokens: (loss, gradient of item_emb); rows of grad_query are filled in."""
        grad_item = torch.zeros_like(items) if with_grad else None
        grad_candidates = grad_item if candidates is items or not with_grad else torch.zeros_like(candidates[:num_with_grad])
        buffer = torch.empty(min(chunk, piece.end - piece.begin), len(candidates), dtype=dtype, device=device)
        loss = torch.zeros((), dtype=dtype, device=device)
        for start in range(piece.begin, piece.end, chunk):
            part = slice(start, min(start + chunk, piece.end))
            scaled = query[part].detach().to(dtype) / temperature  # (n, D)
            target, weight = target_index[part], share[part]
            targets = items.index_select(0, target)  # (n, D)
            exp = mm(scaled, turned, out=buffer[: len(scaled)])  # (n, C): logits, of which `exponentials` leaves what they become
            own = (scaled * targets).sum(1)  # (n,)
            if log_q is not None:
                own -= log_q.index_select(0, target)
            if hidden is not None:
                exp = exp if log_q is None else exp.sub_(candidate_log_q)
                _hide_items(exp, hidden, part)
                if own_place is None:
                    exp.scatter_(1, target[:, None], own[:, None])
            place = None if own_place is None else own_place[part]
            left_log_q = None if hidden is not None else candidate_log_q
            if more is None:
                top, total, own_exp = exponentials(exp, left_log_q, own, place)
            else:
                top, total, own_exp, of_items = _with_more(exp, num_with_grad, left_log_q, own, place, hard)
            loss += torch.dot(total.log() + (top - own), weight)
            own_is_extra = None if own_place is None else own_place[part] < 0
            own_share = None if spread is None else spread.of(scaled, own, own_is_extra)
            if spread is not None:
                loss += torch.dot(own_share.added, weight)
            if not with_grad:
                continue
            # d loss / d logits = weight (exp / total - onehot); the factors of a row are applied on the D-wide side.
            factor, own_factor = _factors(weight, total, own_exp, own_share)
            item_exp, item_factor, own_item_factor, item_share = exp, factor, own_factor, own_share
            if more is not None:  # the items' gradients know nothing of them: see MoreCandidates
                item_exp = exp[:, :num_with_grad]
                item_share = None if spread is None else item_spread.of(scaled, own, own_is_extra)
                item_factor, own_item_factor = _factors(weight, of_items.total, of_items.own_exp, item_share)
            mm(item_exp.T, scaled * item_factor, out=grad_candidates, add=True)
            if spread is not None:
                grad_candidates.add_(((item_share.of_each * weight)[:, None] * scaled).sum(0))
            grad_item.index_add_(0, target, scaled.mul_(own_item_factor))
            if more is not None:
                item_exp.mul_(of_items.among_all[:, None])
            grad = mm(exp, candidates).mul_(factor).add_(targets.mul_(own_factor))  # (n, D)
            if spread is not None:
                grad.add_((own_share.of_each * weight)[:, None] * spread.sum)
            torch.div(grad, temperature, out=grad_query[part])
        if grad_candidates is not grad_item:
            grad_item.add_(grad_candidates) if candidate_index is None else grad_item.index_add_(0, candidate_index, grad_candidates)
        return loss, grad_item

    losses, grads = zip(*run([partial(job, piece) for piece in pieces]))
    return sum(losses), grad_query, _total(grads)


class _OfItems(NamedTuple):
    """What `_with_more` finds of the candidates with a gradient alone, relative to their own largest logit: (n,) each."""

    total: Tensor
    own_exp: Tensor | float
    among_all: Tensor  # the factor that makes their exponentials relative to the largest logit of all


def _with_more(logits: Tensor, num: int, log_q: Tensor | None, own: Tensor, own_place: Tensor | None, hard: int):
    """`_exponentials` where all but the first num candidates have no gradient: the same of all, and _OfItems.

    Left in logits: exponentials relative to the first candidates' largest logit, and of the others relative to that of all. One for both
    would leave nothing of the first ones where some of the others score much higher.
    """
    if log_q is not None:
        logits.sub_(log_q)
    if hard:
        _hide(logits, own_place)
        _keep_highest(logits, hard)
    first, others = logits[:, :num], logits[:, num:]
    top, total, own_exp = _exponentials(first, None, own, own_place, 0)
    highest = torch.maximum(top, others.amax(1))
    among_all = (top - highest).exp_()
    return (
        highest,
        total * among_all + others.sub_(highest[:, None]).exp_().sum(1),
        own_exp * among_all,
        _OfItems(total, own_exp, among_all),
    )


def _exponentials(logits: Tensor, log_q: Tensor | None, own: Tensor, own_place: Tensor | None, hard: int):
    """logits (n, C), less log_q (C,), become exp(logit - top) in place; their target's, at own_place, and those that do not count become 0.

    own: (n,) the targets' logits. own_place: (n,), -1 where the target is none of the candidates; None = it is one, and stays.
    Returns top (n,), the largest logit; the sum of all exponentials (n,); the target's among them (n,), 0 where it stays.
    """
    if log_q is not None:
        logits.sub_(log_q)
    if own_place is None:
        top, own_exp = logits.amax(1), 0.0
    else:
        _hide(logits, own_place)
        if hard:
            _keep_highest(logits, hard)
        top = torch.maximum(logits.amax(1), own) if logits.shape[1] else own
        own_exp = (own - top).exp_()
    return top, logits.sub_(top[:, None]).exp_().sum(1) + own_exp, own_exp


def _fast_exponentials(fast, logits: Tensor, log_q: Tensor | None, own: Tensor, own_place: Tensor | None):
    """`_exponentials` by a compiled loop, a row at a time: it is read and written once, not five times."""
    top, total = torch.empty_like(own), torch.empty_like(own)
    nothing = own.new_empty(0)
    places = torch.empty(0, dtype=torch.int64) if own_place is None else own_place
    fast.softmax(*(t.numpy() for t in (logits, nothing if log_q is None else log_q, own, places, top, total)))
    return top, total, 0.0 if own_place is None else (own - top).exp_()


def _factors(weight: Tensor, total: Tensor, own_exp, own_share: _SpreadRow | None) -> tuple[Tensor, Tensor]:
    """Of d loss / d logits: a row's factor of exp, and what the target's has besides, (n, 1) each. total: (n,) sums of exp."""
    factor = (weight / total)[:, None]
    own_factor = (own_exp * factor[:, 0] - weight)[:, None]
    return factor, own_factor if own_share is None else own_factor + (own_share.of_target * weight)[:, None]


class _SpreadRow(NamedTuple):
    """What label smoothing changes for n tokens: the loss, and the weight of its gradient."""

    added: Tensor  # (n,)
    of_target: Tensor  # (n,)
    of_each: Tensor  # (n,) each candidate's


class _Spread:
    """Label smoothing of e over K classes, (1 - e) onehot + e / K, needs the sum of the logits only: no pass over them.

    loss = logsumexp - (1 - e) own - e / K sum(logits): what is added to the plain loss is e (own - sum / K).
    """

    def __init__(self, candidates: Tensor, log_q: Tensor | None, smoothing: float) -> None:
        self.smoothing, self.num, self.sum = smoothing, len(candidates), candidates.sum(0)
        self.sum_log_q = 0.0 if log_q is None else log_q.sum()

    def of(self, scaled: Tensor, own: Tensor, own_is_extra: Tensor | None) -> _SpreadRow:
        """own_is_extra: (n,) the target is not among the candidates, so a class more; None = it is."""
        extra = torch.zeros_like(own) if own_is_extra is None else own_is_extra.to(own.dtype)
        num = self.num + extra
        total = scaled @ self.sum - self.sum_log_q + extra * own
        return _SpreadRow(self.smoothing * (own - total / num), self.smoothing * (1 - extra / num), -self.smoothing / num)


def _hidden_places(hidden: Hidden, places: Tensor | None) -> Hidden:
    """The same with places among the candidates; items that are none of them are left out."""
    if places is None:
        return hidden
    found = places.index_select(0, hidden.items)
    kept = torch.zeros(len(found) + 1, dtype=torch.int64, device=found.device)
    torch.cumsum(found >= 0, 0, out=kept[1:])
    return Hidden(hidden.owner, kept.index_select(0, hidden.offsets), found[found >= 0])


def _hide_items(logits: Tensor, hidden: Hidden, part: slice) -> None:
    """Put -inf where a token's user hides a candidate. hidden: items are places."""
    begin = hidden.offsets.index_select(0, hidden.owner[part])
    counts = hidden.offsets.index_select(0, hidden.owner[part] + 1) - begin  # (n,)
    ends = counts.cumsum(0)
    rows = torch.repeat_interleave(counts)
    columns = torch.arange(len(rows), device=rows.device) + (begin - ends + counts).index_select(0, rows)
    logits[rows, hidden.items.index_select(0, columns)] = -torch.inf


def _keep_highest(logits: Tensor, num: int) -> None:
    """Put -inf at all but the num highest of each row, and ties with the last of them."""
    logits.masked_fill_(logits < logits.topk(num, sorted=False).values.amin(1, keepdim=True), -torch.inf)


def _total(grads: tuple[Tensor | None, ...]) -> Tensor | None:
    """The sum, in order, into the first."""
    for grad in grads[1:]:
        if grad is not None:
            grads[0].add_(grad)
    return grads[0]


def _places(index: Tensor, size: int) -> Tensor:
    """(size,) int64: where each number stands in `index`, -1 where it does not."""
    places = torch.full((size,), -1, dtype=torch.int64, device=index.device)
    places[index] = torch.arange(len(index), device=index.device)
    return places


def _hide(logits: Tensor, place: Tensor) -> None:
    """Put -inf at (row, place[row]) where place is not -1."""
    rows = (place >= 0).nonzero()[:, 0]
    logits[rows, place[rows]] = -torch.inf


class _BCELoss(_SavedGradients):
    @staticmethod
    def forward(ctx, query, item_emb, pos_index, neg_index, weights, chunk):
        with torch.autocast(query.device.type, enabled=False):
            loss, *grads = _bce_forward(query, item_emb, pos_index, neg_index, weights, chunk, any(ctx.needs_input_grad[:2]))
        _save(ctx, (query, item_emb), tuple(grads), 4)
        return loss


def _bce_forward(query, item_emb, pos_index, neg_index, weights, chunk, with_grad):
    """(loss, gradient of query (N, D), gradient of item_emb (M, D)); the gradients are None without `with_grad`."""
    dtype, (num_tokens, num_negatives) = _work_dtype(query, item_emb), neg_index.shape
    items = item_emb.detach()
    # Column 0 is the positive, the others negatives: label and weight of each logit, (1 + K,)
    label = torch.zeros(1 + num_negatives, dtype=dtype, device=query.device)
    label[0] = 1
    weight = torch.full_like(label, 1 / max(1, num_negatives))
    weight[0] = 1
    # Of each token: (N,)
    share = torch.ones(num_tokens, dtype=dtype, device=query.device) if weights is None else weights.detach().to(dtype)
    share = share / share.sum().clamp_min(torch.finfo(dtype).tiny)
    grad_query = torch.empty(num_tokens, query.shape[1], dtype=dtype, device=query.device) if with_grad else None

    tensors = query.detach(), items, pos_index, neg_index
    plain = weights is None and all(t.device.type == "cpu" for t in tensors) and query.dtype == items.dtype == torch.float32
    if fast := step_kernels.compiled() if plain else None:
        return _fast_bce(fast, *(t.contiguous().numpy() for t in tensors), with_grad)

    def job(piece: Piece) -> tuple[Tensor, Tensor | None]:
        grad_item = torch.zeros(items.shape, dtype=dtype, device=query.device) if with_grad else None
        loss = torch.zeros((), dtype=dtype, device=query.device)
        for start in range(piece.begin, piece.end, chunk):
            part = slice(start, min(start + chunk, piece.end))
            tokens = query[part].detach().to(dtype)  # (n, D)
            grad = torch.zeros_like(tokens)
            for column, index in enumerate((pos_index[part], *neg_index[part].unbind(1))):  # a (n, 1 + K, D) tensor costs more in passes
                vectors = items.index_select(0, index).to(dtype)  # (n, D)
                logits = (vectors * tokens).sum(1)  # (n,)
                loss += torch.dot(F.softplus(logits) - label[column] * logits, share[part]) * weight[column]
                if with_grad:
                    grad_logits = ((logits.sigmoid() - label[column]) * share[part] * weight[column])[:, None]  # (n, 1)
                    grad.addcmul_(grad_logits, vectors)
                    grad_item.index_add_(0, index, vectors.copy_(tokens).mul_(grad_logits))
            if with_grad:
                grad_query[part] = grad
        return loss, grad_item

    pieces = [Piece(0, num_tokens)] if query.is_cuda else halves(row_pieces(num_tokens))
    losses, grads = zip(*run([partial(job, piece) for piece in pieces]))
    return sum(losses), grad_query, _total(grads)


def _fast_bce(fast, query, items, pos_index, neg_index, with_grad):
    """`_bce_forward` by compiled loops over numpy arrays: pieces of tokens first, then pieces of the items' gradients."""
    num_tokens, num_negatives = neg_index.shape
    grad_query, grad_items = (torch.empty(array.shape if with_grad else (0, 0)) for array in (query, items))
    columns = 1 + num_negatives
    factors = np.empty(num_tokens * columns if with_grad else 0, np.float32)  # gradients of the logits
    starts, entries = np.zeros(len(items) + 2, np.int64), np.empty(len(factors), np.int32)
    shares = 1 / max(1, num_tokens), 1 / max(1, num_tokens * num_negatives)
    arrays, outs = (query, items, pos_index, neg_index), (grad_query.numpy(), factors)
    jobs = [partial(fast.bce, *arrays, *piece, *shares, with_grad, *outs) for piece in row_pieces(num_tokens)]
    sort = [partial(fast.logits_by_item, pos_index, neg_index, starts, entries)] if with_grad else []  # beside the others
    losses = run(sort + jobs)[len(sort) :]
    loss = torch.tensor(sum(losses), dtype=torch.float32)
    if not with_grad:
        return loss, None, None
    arrays = query, columns, factors, starts, entries
    run([partial(fast.bce_items, *arrays, *piece, grad_items.numpy()) for piece in row_pieces(len(items))])
    return loss, grad_query, grad_items
