"""Exact top-k retrieval by inner product: a fast first pass that cannot lose a winner, then exact re-ranking of the few left.

Must not know users, item ids, models or metrics; it ranks the rows of one matrix for each row of another.

Legend: B queries, C candidates, D width, K results, S candidates a block, G groups of candidates, F folds (16 groups), P pairs.

The ranking is defined by one number a pair, whatever the batch size, block size, first pass or device: the inner product summed in
float64 in a fixed order and rounded to float32; ties go to the lowest index. (Scores 1e-5 apart keep their order below 128, where float32's
places are that far apart; further up, closer ones are ties.) So a query's answer is the same bit for bit in a batch
of 1, 7 or 512 (tested), and by construction on CUDA (not yet run there). How it is found:
1. Scores of a block of candidates x queries stay in cache, in float32, or in bfloat16 on CPUs that multiply it in hardware; only the
   maximum of each group of candidates is kept.
2. The k-th largest maximum of a query is a lower bound on its k-th best score. With a bound on the first pass's rounding errors
   (Cauchy-Schwarz on measured norms and rounding residuals) every group that may hold a winner is known: about 1.5 k of them.
3. Their candidates are scored in float32, bounded again, and the last k plus a few in float64.

Why so (2 cores, AMX, blocks of 2048 x 512 scores at width 64): product 389 us in float32, 101 us in bfloat16; maxima of groups 62 us
in float32, 113 us in bfloat16, 16 us over the same bits as int16, whose order is bfloat16's among positive numbers (a query whose
threshold is not positive is ranked in float32). Rejected: matmul + torch.topk, which promises no order among ties; one comparison of
all maxima with the threshold (17 ms a chunk of 512, against 2 ms by folds). Whole, 660,000 x 64, k = 10, 100 excluded a query, one core
of a loaded machine, best of 6: 3,400 queries/s in bfloat16, 1,350 in float32; the same ids and scores.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from errors import RunError

FOLD = 16  # groups a fold
MAX_GROUP = 64  # candidates a group
QUERY_CHUNK = 512  # queries a pass; bfloat16 products of 256 are 15 to 30 % slower
MAXIMA_BYTES = 31 << 20  # malloc maps and unmaps 32 MiB or more anew each time: 8 ms of page faults a chunk at 42 MiB
CPU_BLOCK = 1 << 20  # scores a block: 2 MB of bfloat16, 4 MB of float32, about the two cores' L2 together
CUDA_BLOCK = 1 << 27
PAIR_CHUNK = 8192  # pairs scored at a time: 2 MB of vectors at width 64
MAX_PAIRS = 1 << 22  # pairs shortlisted at a time (one query may have more)
TOO_COARSE = 16  # shortlisted folds a query, as a multiple of k, above which float32 takes over from bfloat16 (or a quarter of all)
SUSPECTS = 1 << 22  # entries of the table that clears most pairs of being excluded without a binary search
FLOAT32_ROUNDOFF, BFLOAT16_ROUNDOFF = 2.0**-24, 2.0**-8
TINY = 2.0**-120  # covers products that underflow
MAX_SCORE = 1e37
LOWEST_BITS = -(2**15)  # int16: below the bits of every bfloat16

Exclude = tuple[Tensor, Tensor]


class Catalogue(NamedTuple):
    """Candidates prepared for many calls of `topk_exact`.

    item_emb: (C, D) float32, contiguous. low: (C, D) bfloat16 copy; None where the first pass is float32.
    max_norm, max_low_norm, max_residual: the largest norm of a row of item_emb, of low, and of their difference.
    """

    item_emb: Tensor
    low: Tensor | None
    max_norm: float
    max_low_norm: float
    max_residual: float


class _Pass(NamedTuple):
    """One first pass: its matrix of candidates, and how maxima are compared. See `_group_maxima`."""

    items: Tensor  # (C, D) float32 or bfloat16
    low: bool
    block: int
    group: int
    per_block: int  # groups a block


def prepare_catalogue(item_emb: Tensor, *, low_precision: bool | None = None) -> Catalogue:
    """Norms and, where it pays, a bfloat16 copy of item_emb (C, D), any float dtype: once for many calls of `topk_exact`.

    low_precision: first pass in bfloat16; None = where this CPU has instructions for it and C is large. Results do not depend on it.
    Takes 160 ms for 660,000 x 64 on one core. Raises RunError for a vector that is not finite.
    """
    item_emb = item_emb.detach().to(torch.float32).contiguous()
    num_items, width = item_emb.shape
    if low_precision is None:
        low_precision = num_items >= 4096 and item_emb.device.type == "cpu" and bfloat16_is_faster()
    low = torch.empty_like(item_emb, dtype=torch.bfloat16) if low_precision else None
    step = (1 << 18) // max(1, width) + 1 if item_emb.device.type == "cpu" else 1 << 20  # 1 MB of float32 stays in cache
    largest = torch.zeros(3, dtype=torch.float64, device=item_emb.device)
    for start in range(0, num_items, step):
        block = item_emb[start : start + step]
        parts = [block]
        if low is not None:
            rounded = low[start : start + step].copy_(block).float()
            parts += [rounded, block - rounded]
        largest[: len(parts)] = largest[: len(parts)].maximum(torch.stack([_row_norms(part).amax() for part in parts]))
    norms = largest.tolist()
    if not norms[0] < float("inf"):
        raise RunError("A candidate's vector is not finite (NaN or infinity): the model has diverged. Use an earlier checkpoint.")
    return Catalogue(item_emb, low, *norms)


def topk_exact(query: Tensor, item_emb: Tensor | Catalogue, k: int, *, exclude: Exclude | None = None) -> tuple[Tensor, Tensor]:
    """The k candidates with the largest inner product for each query, exactly; ties go to the lowest index.

    query: (B, D), any float dtype. item_emb: (C, D), or a Catalogue of it (`prepare_catalogue`) when several batches are ranked.
    exclude: (offsets (B + 1,) int64, index (E,) int64 into the candidates, any order, repeats allowed): what query b must not get.
    Returns (scores (B, k) float32, index (B, k) int64), best first. Where fewer than k candidates are left: score -inf, index -1.
    Raises RunError for a vector that is not finite.
    """
    if k < 1 or query.ndim != 2:
        raise ValueError(f"topk_exact: expected query (B, D) and k >= 1, found {tuple(query.shape)} and k = {k}.")
    query = query.detach().to(torch.float32).contiguous()
    if not isinstance(item_emb, Catalogue):
        # Preparing bfloat16 takes as long as ranking some 500 queries by it: a single small batch does without.
        item_emb = prepare_catalogue(item_emb, low_precision=None if len(query) > QUERY_CHUNK else False)
    num_items, width = item_emb.item_emb.shape
    if query.shape[1] != width:
        raise ValueError(f"topk_exact: queries of width {query.shape[1]} against candidates of width {width}.")
    scores = torch.full((len(query), k), -torch.inf, device=query.device)
    index = torch.full((len(query), k), -1, dtype=torch.int64, device=query.device)
    if num_items == 0:
        return scores, index
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        for start in range(0, len(query), QUERY_CHUNK):
            part = slice(start, min(start + QUERY_CHUNK, len(query)))
            excluded = None if exclude is None else _excluded_keys(exclude, part.start, part.stop, num_items)
            _rank(query[part], item_emb, k, excluded, item_emb.low is not None, scores[part], index[part])
    return scores, index


def pair_scores(query: Tensor, catalogue: Catalogue, rows: Tensor, candidates: Tensor) -> Tensor:
    """Scores (P,) float32 of pairs of query rows (P,) and candidates (P,), both int64: those by which `topk_exact` ranks."""
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        return _final_scores(query.detach().to(torch.float32), catalogue.item_emb, rows, candidates)


def rough_pair_scores(query: Tensor, catalogue: Catalogue, rows: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Inner products (P,) of such pairs summed in float32, and how far each query's (B,) float64 may be from `pair_scores`: a thirtieth
    of its time, for callers that need few pairs exactly."""
    query = query.detach().to(torch.float32).contiguous()
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        return _rough_scores(query, catalogue.item_emb, rows, candidates), _first_pass_error(query, catalogue, False)


def rank_targets(
    query: Tensor, catalogue: Catalogue, target: Tensor, *, exclude: Exclude | None = None, own: Tensor | None = None
) -> Tensor:
    """How many candidates come before each query's target in the ranking of `topk_exact`: (B,) int64, 0 = it is the first.

    query: (B, D). target: (B,) int64 index into the candidates, -1 = none. exclude: as in `topk_exact`; what is excluded stands before
    nobody. own: (B,) float32 scores of the targets, at least their inner products; None = these. -1 where there is no target, or where it
    is excluded itself. Raises RunError for a vector that is not finite.
    """
    query = query.detach().to(torch.float32).contiguous()
    ranks = torch.full((len(query),), -1, dtype=torch.int64, device=query.device)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        for start in range(0, len(query), QUERY_CHUNK):
            part = slice(start, min(start + QUERY_CHUNK, len(query)))
            excluded = None if exclude is None else _excluded_keys(exclude, part.start, part.stop, len(catalogue.item_emb))
            ranks[part] = _count_before(query[part], catalogue, target[part], excluded, None if own is None else own[part])
    return ranks


def _count_before(query: Tensor, catalogue: Catalogue, target: Tensor, excluded: Tensor | None, own: Tensor | None) -> Tensor:
    """Ranks (B,) of targets (B,): float32 products settle all pairs but those within rounding of the target's score; these are exact."""
    items, num_queries = catalogue.item_emb, len(query)
    rows = torch.arange(num_queries, device=query.device)
    known = target >= 0
    if excluded is not None and len(excluded):
        keys = target * num_queries + rows
        known = known & (excluded[torch.searchsorted(excluded, keys).clamp_(max=len(excluded) - 1)] != keys)
    target = target.clamp_min(0)
    own = _final_scores(query, items, rows, target) if own is None else own
    error = _first_pass_error(query, catalogue, False)
    low, high = _round_down(own - error), -_round_down(-(own + error))
    before = torch.zeros(num_queries, dtype=torch.int64, device=query.device)
    block = max(1, (CPU_BLOCK if query.device.type == "cpu" else CUDA_BLOCK) // num_queries)
    for start in range(0, len(items), block):
        scores = items[start : start + block] @ query.T  # (n, B)
        if excluded is not None:
            ends = torch.tensor([start * num_queries, (start + len(scores)) * num_queries], device=query.device)
            first, last = torch.searchsorted(excluded, ends).tolist()
            scores.view(-1).index_fill_(0, excluded[first:last] - start * num_queries, -torch.inf)
        above = scores > high
        before += above.sum(0)
        candidates, owner = ((scores >= low) & ~above).nonzero(as_tuple=True)
        candidates = candidates + start
        exact = _final_scores(query, items, owner, candidates)
        wins = (exact > own[owner]) | ((exact == own[owner]) & (candidates < target[owner]))
        before += torch.bincount(owner[wins], minlength=num_queries)
    return torch.where(known, before, -1)


def _rank(query: Tensor, catalogue: Catalogue, k: int, excluded: Tensor | None, low: bool, scores: Tensor, index: Tensor) -> None:
    """Fill scores and index (B, k) for query (B, D). excluded: sorted keys candidate * B + query, or None."""
    num_queries = len(query)
    first = _plan(num_queries, catalogue, k, low)
    maxima = _group_maxima(query, first, excluded)  # (G, B)
    folds = _folds(maxima, low, k)  # (B, F) float32
    threshold = _threshold(folds, query, catalogue, k, low)
    reached = (folds >= threshold[:, None]) & (folds > -torch.inf)
    counts = reached.sum(1)
    failed = torch.zeros_like(counts, dtype=torch.bool)
    if low:
        failed = (counts > min(TOO_COARSE * k, max(3 * k, folds.shape[1] // 4))) | ~(threshold > 0)
    reached &= ~failed[:, None]
    suspects = _suspect_table(excluded, query.device)
    pairs_per_fold = len(maxima) // folds.shape[1] * first.group
    for begin, end in _query_ranges(counts.masked_fill(failed, 0).tolist(), pairs_per_fold):
        rows, candidates = _shortlist(reached[begin:end], begin, maxima, threshold, first)
        rows, candidates = _without_excluded(rows, candidates, excluded, suspects, num_queries)
        part = slice(begin, end)
        _rerank(query[part], catalogue, k, rows - begin, candidates, scores[part], index[part])
    again = failed.nonzero()[:, 0]
    if len(again):
        part_scores, part_index = scores[again], index[again]
        _rank(query[again], catalogue, k, _keys_of(excluded, again, num_queries), False, part_scores, part_index)
        scores[again], index[again] = part_scores, part_index


def _plan(num_queries: int, catalogue: Catalogue, k: int, low: bool) -> _Pass:
    items = catalogue.low if low else catalogue.item_emb
    num_items, num_bytes = len(items), num_queries * items.element_size()
    group = 1
    if num_items >= 256 * k:
        group = 16
        while group < MAX_GROUP and num_items // group * num_bytes > MAXIMA_BYTES and num_items // group >= 32 * k:
            group *= 2
    scores = CPU_BLOCK if items.device.type == "cpu" else CUDA_BLOCK
    block = min(max(scores // num_queries, 1024), 1 << 17, num_items + 255) // 256 * 256
    return _Pass(items, low, block, group, block // group)


def _group_maxima(query: Tensor, first: _Pass, excluded: Tensor | None) -> Tensor:
    """First-pass maxima of all groups, the excluded left out: (G, B) float32, or int16 holding the bits of bfloat16.

    A group is consecutive candidates, whose vectors the re-ranking reads in one piece (strided groups: 25 % slower there).
    What is padded (to whole blocks, to whole folds) has the lowest value.
    """
    items, low, block, group, per_block = first
    num_items, num_queries = len(items), len(query)
    lowest = LOWEST_BITS if low else -torch.inf
    scores = torch.empty(block, num_queries, dtype=items.dtype, device=query.device)
    ordered = scores.view(torch.int16) if low else scores
    transposed = query.to(items.dtype).T  # (D, B)
    starts = range(0, num_items, block)
    num_groups = len(starts) * per_block
    maxima = torch.empty(num_groups + -num_groups % FOLD, num_queries, dtype=ordered.dtype, device=query.device)
    maxima[num_groups:] = lowest
    cuts = [0] * (len(starts) + 1)
    if excluded is not None:
        cuts = torch.searchsorted(excluded, torch.tensor([*starts, num_items], device=query.device) * num_queries).tolist()
    for number, start in enumerate(starts):
        rows = min(block, num_items - start)
        torch.mm(items[start : start + rows], transposed, out=scores[:rows])
        if rows < block:
            ordered[rows:] = lowest
        if cuts[number] < cuts[number + 1]:  # a key is the place in the whole (C, B) matrix
            ordered.view(-1).index_fill_(0, excluded[cuts[number] : cuts[number + 1]] - start * num_queries, lowest)
        torch.amax(ordered.view(per_block, group, num_queries), 1, out=maxima[number * per_block : (number + 1) * per_block])
    return maxima


def _folds(maxima: Tensor, low: bool, k: int) -> Tensor:
    """Maxima of folds, query by query: (G, B) -> (B, F) float32; a fold is one group where there are few."""
    if len(maxima) >= 4 * FOLD * k:
        maxima = maxima.view(FOLD, -1, maxima.shape[1]).amax(0)
    if not low:
        return maxima.T.contiguous()
    return maxima.view(torch.bfloat16).float().masked_fill_(maxima < 0, -torch.inf).T.contiguous()


def _threshold(folds: Tensor, query: Tensor, catalogue: Catalogue, k: int, low: bool) -> Tensor:
    """(B,) float32: a fold or group with a smaller first-pass maximum holds no winner. For bfloat16 it is valid where positive."""
    if folds.shape[1] < k:
        return torch.full((len(query),), -torch.inf, device=query.device)
    kth = folds.topk(k, dim=1).values[:, -1].double()
    error = _first_pass_error(query, catalogue, low)
    if not low:
        return _round_down(kth - 2 * error)
    # k candidates score exactly kth (1 - u) - error or more; whoever scores that shows (that - error) (1 - u) or more.
    return _round_down((kth * (1 - BFLOAT16_ROUNDOFF) - 2 * error) * (1 - BFLOAT16_ROUNDOFF))


def _first_pass_error(query: Tensor, catalogue: Catalogue, low: bool) -> Tensor:
    """(B,) float64: bound on |first-pass score - final float32 score| of any candidate, before a bfloat16 score's own rounding."""
    norm, max_norm, width = _row_norms(query), catalogue.max_norm, query.shape[1]
    highest = float(norm.max())
    if not highest < float("inf"):
        raise RunError("A query's vector is not finite (NaN or infinity): the model has diverged. Use an earlier checkpoint.")
    if highest * max_norm > MAX_SCORE:
        raise RunError(f"Vectors of norm {highest:.1e} and {max_norm:.1e}: their product overflows float32. The model has diverged.")
    tiny = width * TINY * (1 + norm + max_norm)
    roundoff = (width + 4) * FLOAT32_ROUNDOFF * norm * max_norm  # products, sums, the final score's rounding
    if low:
        rounded = query.bfloat16().float()
        return 1.01 * (_row_norms(query - rounded) * max_norm + _row_norms(rounded) * catalogue.max_residual + roundoff) + tiny
    # Where a caller lowered the precision, TF32 (CUDA) or bfloat16 (CPU) products may stand in for float32 ones.
    if not _products_are_float32(query.is_cuda):
        roundoff = roundoff + 2.1 * BFLOAT16_ROUNDOFF * norm * max_norm
    return 1.01 * roundoff + tiny


def _products_are_float32(on_cuda: bool) -> bool:
    try:
        return torch.get_float32_matmul_precision() == "highest" and not (on_cuda and torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:  # set by torch's newer fp32_precision: the older interface does not say to what
        return False


def _query_ranges(counts: list[int], pairs_per_fold: int) -> list[tuple[int, int]]:
    """Consecutive ranges of queries whose shortlists, padded to the longest, hold at most MAX_PAIRS pairs."""
    ranges, begin, longest = [], 0, 0
    for row, count in enumerate(counts):
        longest = max(longest, count)
        if row > begin and (row - begin + 1) * longest * pairs_per_fold > MAX_PAIRS:
            ranges.append((begin, row))
            begin, longest = row, count
    return [*ranges, (begin, len(counts))]


def _shortlist(reached: Tensor, begin: int, maxima: Tensor, threshold: Tensor, first: _Pass) -> tuple[Tensor, Tensor]:
    """Pairs that may win, from the folds that reached the threshold (B', F): (queries (P,) ascending, candidates (P,))."""
    num_folds = reached.shape[1]
    rows, folds = reached.nonzero(as_tuple=True)
    rows = rows + begin
    groups = folds[:, None] + num_folds * torch.arange(len(maxima) // num_folds, device=rows.device)  # (P', groups a fold)
    limit = threshold[rows]
    if first.low:
        limit = (limit.view(torch.int32) >> 16).to(torch.int16)  # the bits of the next bfloat16 below
    keep = maxima[groups, rows[:, None]] >= limit[:, None]
    rows, groups = rows[:, None].expand_as(groups)[keep], groups[keep]
    candidates = groups[:, None] * first.group + torch.arange(first.group, device=rows.device)  # (P'', group)
    rows, candidates = rows[:, None].expand_as(candidates).reshape(-1), candidates.view(-1)
    if int(candidates.numel()) and int(candidates.max()) >= len(first.items):
        keep = candidates < len(first.items)
        rows, candidates = rows[keep], candidates[keep]
    return rows, candidates


def _rerank(query: Tensor, catalogue: Catalogue, k: int, rows: Tensor, candidates: Tensor, scores: Tensor, index: Tensor) -> None:
    """Exact top k among pairs (rows (P,) ascending, candidates (P,)), written to scores, index (B', k)."""
    if not len(rows):
        return
    rough = _rough_scores(query, catalogue.item_emb, rows, candidates)
    table = _padded(rows, rough, len(query), -torch.inf)  # (B', longest shortlist)
    if table.shape[1] > k:
        kth = table.topk(k, dim=1).values[:, -1].double()
        keep = rough >= _round_down(kth - 2 * _first_pass_error(query, catalogue, False))[rows]
        rows, candidates = rows[keep], candidates[keep]
    exact = _final_scores(query, catalogue.item_emb, rows, candidates)
    # One integer orders by (score descending, index ascending), so topk meets no ties: monotone bits of the score, then the index.
    bits = (exact + 0.0).view(torch.int32)  # + 0.0: no negative zero
    key = (_monotone(bits).long() << 32) + (2**32 - 1 - candidates)
    table = _padded(rows, key, len(query), -(2**63))
    best = table.topk(min(k, table.shape[1]), dim=1).values
    found = best > -(2**63)
    place = slice(0, best.shape[1])
    index[:, place] = torch.where(found, 2**32 - 1 - (best & (2**32 - 1)), -1)
    scores[:, place] = torch.where(found, _monotone((best >> 32).int()).view(torch.float32), -torch.inf)


def _monotone(bits: Tensor) -> Tensor:
    """int32 bits of float32 <-> int32 in the floats' order; its own inverse."""
    return bits ^ ((bits >> 31) & (2**31 - 1))


def _rough_scores(query: Tensor, item_emb: Tensor, rows: Tensor, candidates: Tensor) -> Tensor:
    """float32 inner products of pairs, for the shortlist: (P,). Two reused buffers: fresh ones take four times as long in page faults."""
    step = max(1, min(PAIR_CHUNK if query.device.type == "cpu" else 64 * PAIR_CHUNK, len(rows)))
    scores = torch.empty(len(rows), device=query.device)
    products, tokens = torch.empty(2, step, query.shape[1], device=query.device)
    for start in range(0, len(rows), step):
        part = slice(start, min(start + step, len(rows)))
        vectors = torch.index_select(item_emb, 0, candidates[part], out=products[: part.stop - start])
        vectors.mul_(torch.index_select(query, 0, rows[part], out=tokens[: part.stop - start]))
        torch.sum(vectors, 1, out=scores[part])
    return scores


def _final_scores(query: Tensor, item_emb: Tensor, rows: Tensor, candidates: Tensor) -> Tensor:
    """The numbers that define the ranking: (P,) float32. The products are exact in float64; the tree of sums is the same everywhere."""
    scores = torch.empty(len(rows), device=query.device)
    for start in range(0, len(rows), PAIR_CHUNK):
        part = slice(start, start + PAIR_CHUNK)
        sums = item_emb.index_select(0, candidates[part]).double() * query.index_select(0, rows[part]).double()  # (p, D)
        while sums.shape[1] > 1:
            half = sums.shape[1] // 2
            odd = sums[:, 2 * half :]
            sums = sums[:, :half] + sums[:, half : 2 * half]
            if odd.shape[1]:
                sums[:, :1] += odd
        scores[part] = sums[:, 0]
    return scores


def _padded(rows: Tensor, values: Tensor, num_rows: int, fill: float) -> Tensor:
    """Ragged values (P,) of ascending rows (P,) as a matrix (num_rows, longest row) filled up with `fill`."""
    counts = torch.bincount(rows, minlength=num_rows)
    starts = counts.cumsum(0) - counts
    table = torch.full((num_rows, int(counts.max())), fill, dtype=values.dtype, device=values.device)
    table[rows, torch.arange(len(rows), device=rows.device) - starts[rows]] = values
    return table


def _excluded_keys(exclude: Exclude, begin: int, end: int, num_items: int) -> Tensor:
    """Sorted keys candidate * B + query of the excluded pairs of queries begin .. end - 1."""
    offsets, index = exclude
    counts = (offsets[begin + 1 : end + 1] - offsets[begin:end]).to(index.device)
    index = index[int(offsets[begin]) : int(offsets[end])].long()
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < num_items:
        raise ValueError(f"topk_exact: exclude holds indices {int(index.min())} to {int(index.max())} of {num_items} candidates.")
    owner = torch.repeat_interleave(torch.arange(end - begin, device=index.device), counts, output_size=len(index))
    return torch.sort(index * (end - begin) + owner).values


def _keys_of(excluded: Tensor | None, rows: Tensor, num_queries: int) -> Tensor | None:
    """The excluded keys of some queries (ascending row numbers), numbered among those."""
    if excluded is None:
        return None
    place = torch.full((num_queries,), -1, dtype=torch.int64, device=rows.device)
    place[rows] = torch.arange(len(rows), device=rows.device)
    owner = place[excluded % num_queries]
    return (excluded // num_queries * len(rows) + owner)[owner >= 0]


def _suspect_table(excluded: Tensor | None, device: torch.device) -> Tensor | None:
    if excluded is None or not len(excluded):
        return None
    return torch.zeros(SUSPECTS, dtype=torch.bool, device=device).index_fill_(0, excluded & (SUSPECTS - 1), True)


def _without_excluded(
    rows: Tensor, candidates: Tensor, excluded: Tensor | None, suspects: Tensor | None, num_queries: int
) -> tuple[Tensor, Tensor]:
    """Pairs without the excluded ones. A binary search for every pair would take 5 ms a chunk; the table leaves it a few."""
    if excluded is None or suspects is None:
        return rows, candidates
    keys = candidates * num_queries + rows
    doubtful = suspects[keys & (SUSPECTS - 1)].nonzero()[:, 0]
    found = torch.searchsorted(excluded, keys[doubtful]).clamp_(max=len(excluded) - 1)
    keep = torch.ones_like(keys, dtype=torch.bool)
    keep[doubtful] = excluded[found] != keys[doubtful]
    return rows[keep], candidates[keep]


def _round_down(x: Tensor) -> Tensor:
    """float64 -> float32 that is not above it."""
    return torch.nextafter(x.float(), torch.full_like(x, -torch.inf, dtype=torch.float32))


def _row_norms(x: Tensor) -> Tensor:
    """Norms (rows,) float64, rounded up: squares are summed in float32 where that is safe, else in float64."""
    squares = x.square().sum(1)
    if not bool(((squares < 1e37) & (squares > 1e-25)).all()):
        squares = x.double().square().sum(1)
    return squares.double().sqrt() * (1 + x.shape[1] * FLOAT32_ROUNDOFF)


@cache
def bfloat16_is_faster() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware. Asked, not timed: a timing on a busy machine chose wrongly."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # missing in older torch: float32 then
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
