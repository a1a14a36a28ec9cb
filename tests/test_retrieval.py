"""retrieval.py against a float64 brute force: ties, exclusions, first passes, batch and block sizes, permutations, hard distributions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import retrieval
from errors import RunError
from retrieval import Catalogue, prepare_catalogue, rank_targets, topk_exact

FIRST_PASSES = [False, True]  # float32, bfloat16


def brute_force(query, item_emb, k, exclude=None):
    """(scores, index) by float64 scores rounded to float32, ties by lowest index, -inf and -1 where candidates run out."""
    scores = (query.double() @ item_emb.double().T).float()
    if exclude is not None:
        for row in range(len(query)):
            scores[row, exclude[1][exclude[0][row] : exclude[0][row + 1]]] = -torch.inf
    top, index = torch.sort(scores, dim=1, descending=True, stable=True)
    top, index = top[:, :k], index[:, :k].masked_fill(top[:, :k] == -torch.inf, -1)
    missing = (0, k - top.shape[1])
    return F.pad(top, missing, value=-torch.inf), F.pad(index, missing, value=-1)


def vectors(count, width, seed, *, levels=8):
    """Small multiples of 1/8: every product and sum is exact in float32, so that ties are real and abundant."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-levels, levels + 1, (count, width), generator=generator).float() / 8


def random_exclusions(num_queries, num_items, most, seed):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, most + 1, (num_queries,), generator=generator)
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    return offsets, torch.randint(num_items, (int(offsets[-1]),), generator=generator)


def check(query, item_emb, k, exclude=None, low=None):
    catalogue = item_emb if low is None else prepare_catalogue(item_emb, low_precision=low)
    scores, index = topk_exact(query, catalogue, k, exclude=exclude)
    want_scores, want_index = brute_force(query, item_emb, k, exclude)
    assert scores.dtype == torch.float32 and index.dtype == torch.int64
    assert torch.equal(index, want_index)
    assert torch.equal(scores, want_scores)
    return scores, index


@pytest.mark.parametrize("low", FIRST_PASSES)
@pytest.mark.parametrize(
    "num_items, num_queries, width, k",
    [(20000, 40, 16, 10), (6001, 7, 5, 3), (3000, 5, 8, 100), (300, 30, 3, 10), (7, 4, 2, 10), (1, 1, 1, 1)],
)
def test_brute_force_with_ties_and_exclusions(num_items, num_queries, width, k, low):
    query, item_emb = vectors(num_queries, width, 1), vectors(num_items, width, 2)
    check(query, item_emb, k, None, low)
    check(query, item_emb, k, random_exclusions(num_queries, num_items, 300, 3), low)


@pytest.mark.parametrize("low", FIRST_PASSES)
def test_real_valued_vectors(low):
    generator = torch.Generator().manual_seed(0)
    item_emb = F.normalize(torch.randn(30000, 48, generator=generator), dim=1)
    item_emb[20000:] = item_emb[:10000]  # exact ties at every score
    query = F.normalize(torch.randn(64, 48, generator=generator), dim=1)
    seen = brute_force(query, item_emb, 30)[1].reshape(-1)  # the best ones are seen, twice over
    check(query, item_emb, 10, (torch.arange(65) * 30, seen), low)
    check(query, item_emb, 10, (torch.arange(65) * 60, seen.view(64, 30).repeat(1, 2).view(-1)), low)


def test_collapsed_vectors_fall_back_to_float32(monkeypatch):
    """All scores within bfloat16's rounding of each other, or negative, or zero: still exact."""
    generator = torch.Generator().manual_seed(0)
    item_emb = F.normalize(torch.ones(20000, 16) + 1e-4 * torch.randn(20000, 16, generator=generator), dim=1)
    query = torch.cat((item_emb[:4], -item_emb[:4], torch.zeros(1, 16), F.normalize(torch.randn(3, 16, generator=generator), dim=1)))
    passes = []
    original = retrieval._group_maxima
    monkeypatch.setattr(retrieval, "_group_maxima", lambda q, first, e: passes.append((first.low, len(q))) or original(q, first, e))
    catalogue = prepare_catalogue(item_emb, low_precision=True)
    low, exact = topk_exact(query, catalogue, 10), topk_exact(query, prepare_catalogue(item_emb, low_precision=False), 10)
    assert passes[0] == (True, 12) and passes[1][0] is False and 9 <= passes[1][1] <= 12
    want = brute_force(query, item_emb, 10)
    for result in (low, exact):
        # rounded to float32, scores tie by the thousand; brute force sums in another order, so compare scores, and both passes by index
        torch.testing.assert_close(result[0], want[0], rtol=2e-7, atol=1e-9)
    assert torch.equal(low[1], exact[1]) and torch.equal(low[0], exact[0])
    assert low[1][8].tolist() == list(range(10))


@pytest.mark.parametrize("low", FIRST_PASSES)
def test_all_candidates_equal(low):
    query, item_emb = vectors(5, 4, 1), vectors(1, 4, 2).expand(5000, 4)
    _, index = check(query, item_emb, 10, None, low)
    assert (index == torch.arange(10)).all()
    offsets = torch.tensor([0, 3, 3, 3, 3, 3])
    _, index = check(query, item_emb, 10, (offsets, torch.tensor([4, 0, 4])), low)
    assert index[0].tolist() == [1, 2, 3, 5, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("low", FIRST_PASSES)
def test_nearly_everything_excluded(low):
    num_items, left = 5000, [17, 4999, 2048, 3]
    query, item_emb = vectors(3, 8, 1), vectors(num_items, 8, 2)
    all_but_four = torch.tensor([i for i in range(num_items) if i not in left])
    count = len(all_but_four)
    exclude = (torch.tensor([0, count, count, count + num_items]), torch.cat((all_but_four, torch.arange(num_items))))
    scores, index = check(query, item_emb, 10, exclude, low)
    assert sorted(index[0, :4].tolist()) == sorted(left) and (index[0, 4:] == -1).all() and (scores[0, 4:] == -torch.inf).all()
    assert (index[1] >= 0).all() and (index[2] == -1).all()
    _, index = check(query[:1], item_emb, 4, (exclude[0][:2], all_but_four), low)  # exactly k are left
    assert (index >= 0).all()


@pytest.mark.parametrize("low", FIRST_PASSES)
def test_batch_and_block_sizes_change_no_bit(low, monkeypatch):
    generator = torch.Generator().manual_seed(4)
    query, item_emb = torch.randn(600, 33, generator=generator), torch.randn(9000, 33, generator=generator)
    exclude = random_exclusions(600, 9000, 50, 5)
    catalogue = prepare_catalogue(item_emb, low_precision=low)
    whole = topk_exact(query, catalogue, 10, exclude=exclude)
    for size in (1, 7, 512):
        for start in (0, 500):
            stop = min(600, start + size)
            part = topk_exact(query[start:stop], catalogue, 10, exclude=(exclude[0][start : stop + 1], exclude[1]))
            assert all(torch.equal(a, b[start:stop]) for a, b in zip(part, whole))
    for name, value in (("CPU_BLOCK", 1), ("QUERY_CHUNK", 100), ("PAIR_CHUNK", 50), ("MAX_PAIRS", 1), ("MAXIMA_BYTES", 1)):
        monkeypatch.setattr(retrieval, name, value)
        assert all(torch.equal(a, b) for a, b in zip(topk_exact(query, catalogue, 10, exclude=exclude), whole)), name


def test_permuted_candidates_give_the_same_items():
    generator = torch.Generator().manual_seed(6)
    query, item_emb = torch.randn(50, 24, generator=generator), torch.randn(8000, 24, generator=generator)
    order = torch.randperm(8000, generator=generator)
    scores, index = topk_exact(query, item_emb, 10)
    permuted_scores, permuted = topk_exact(query, item_emb[order], 10)
    assert torch.equal(order[permuted], index) and torch.equal(permuted_scores, scores)


@pytest.mark.parametrize("low", FIRST_PASSES)
@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e15])
def test_scales_of_vectors(scale, low):
    query, item_emb = vectors(6, 8, 1) * scale, vectors(6000, 8, 2)
    item_emb[:3000] *= 1e-3  # norms far apart
    check(query, item_emb, 10, None, low)


def test_input_dtypes_and_autocast():
    query, item_emb = vectors(6, 8, 1), vectors(5000, 8, 2)
    want = topk_exact(query, item_emb, 10)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):  # multiples of 1/8 up to 1 are exact in all
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = topk_exact(query.to(dtype), item_emb.to(dtype), 10)
        assert all(torch.equal(a, b) for a, b in zip(result, want))
    query.requires_grad_()
    assert not topk_exact(query, item_emb, 10)[0].requires_grad


def test_lowered_matmul_precision_stays_exact():
    generator = torch.Generator().manual_seed(7)
    query, item_emb = torch.randn(20, 32, generator=generator), torch.randn(6000, 32, generator=generator)
    want = topk_exact(query, item_emb, 10)
    torch.set_float32_matmul_precision("medium")
    try:
        assert all(torch.equal(a, b) for a, b in zip(topk_exact(query, item_emb, 10), want))
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="this torch has no fp32_precision")
def test_products_lowered_by_the_newer_interface():
    generator = torch.Generator().manual_seed(7)
    query, item_emb = torch.randn(20, 32, generator=generator), torch.randn(6000, 32, generator=generator)
    want = topk_exact(query, item_emb, 10)
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        assert all(torch.equal(a, b) for a, b in zip(topk_exact(query, item_emb, 10), want))
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"


def test_first_pass_errors_stay_below_their_bound():
    generator = torch.Generator().manual_seed(8)
    query, item_emb = torch.randn(64, 40, generator=generator), torch.randn(2000, 40, generator=generator)
    item_emb *= torch.rand(2000, 1, generator=generator)
    exact = query.double() @ item_emb.double().T
    catalogue = prepare_catalogue(item_emb, low_precision=True)
    norm = retrieval._first_pass_error(query, catalogue, False)[:, None]
    assert ((query @ item_emb.T).double() - exact).abs().max() < norm.max() < 1e-3
    rough = (query.bfloat16() @ catalogue.low.T).double()
    bound = retrieval._first_pass_error(query, catalogue, True)[:, None]
    assert ((rough - exact).abs() <= bound + exact.abs() * 2**-8 * 1.01 + bound * 2**-8).all()
    assert catalogue.max_norm == pytest.approx(item_emb.double().norm(dim=1).max().item(), rel=1e-5)


def test_automatic_first_pass_and_raw_matrix():
    small = prepare_catalogue(torch.ones(10, 4))
    assert small.low is None and isinstance(small, Catalogue)
    assert (prepare_catalogue(torch.ones(5000, 4)).low is not None) == retrieval.bfloat16_is_faster()
    query, item_emb = vectors(700, 8, 1), vectors(5000, 8, 2)
    check(query, item_emb, 5)


def test_monotone_bits():
    values = torch.tensor([-torch.inf, -3.0, -1e-40, 0.0, 1e-40, 2.0, torch.inf])
    keys = retrieval._monotone(values.view(torch.int32))
    assert keys.tolist() == sorted(keys.tolist())
    assert torch.equal(retrieval._monotone(keys).view(torch.float32), values)


def test_empty_sides():
    scores, index = topk_exact(torch.ones(2, 4), torch.ones(0, 4), 3)
    assert (scores == -torch.inf).all() and (index == -1).all()
    assert topk_exact(torch.ones(0, 4), torch.ones(5, 4), 3)[1].shape == (0, 3)
    exclude = (torch.zeros(3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    check(torch.ones(2, 4), torch.ones(5, 4), 3, exclude)


def test_raises():
    good = torch.ones(3, 4)
    with pytest.raises(ValueError, match="k >= 1"):
        topk_exact(good, good, 0)
    with pytest.raises(ValueError, match="width 4 against candidates of width 5"):
        topk_exact(good, torch.ones(3, 5), 1)
    with pytest.raises(ValueError, match="indices 1 to 3 of 3"):
        topk_exact(good, good, 1, exclude=(torch.tensor([0, 1, 2, 2]), torch.tensor([1, 3])))
    for value in (np.nan, np.inf):
        bad = good.clone()
        bad[1, 2] = value
        with pytest.raises(RunError, match="candidate's vector is not finite"):
            topk_exact(good, bad, 1)
        with pytest.raises(RunError, match="query's vector is not finite"):
            topk_exact(bad, good, 1)
    with pytest.raises(RunError, match="overflows"):
        topk_exact(good * 1e20, good * 1e20, 1)


# ---- ranks of targets ---------------------------------------------------------------------------------------------------


def brute_ranks(query, item_emb, target, exclude):
    """Places in the full sorted ranking; -1 without a target or where it is excluded."""
    order = brute_force(query, item_emb, len(item_emb), exclude)[1]
    found = (order == target[:, None]) & (target >= 0)[:, None]
    return torch.where(found.any(1), found.int().argmax(1), -1)


@pytest.mark.parametrize("excluded", [False, True])
@pytest.mark.parametrize("num_items, num_queries, width", [(3000, 40, 16), (700, 600, 5), (7, 4, 2), (1, 1, 1)])
def test_ranks_equal_brute_force_with_ties(num_items, num_queries, width, excluded, monkeypatch):
    monkeypatch.setattr(retrieval, "CPU_BLOCK", 20_000)  # several blocks
    query, item_emb = vectors(num_queries, width, 1), vectors(num_items, width, 2)
    exclude = random_exclusions(num_queries, num_items, 5, 3) if excluded else None
    target = torch.randint(-1, num_items, (num_queries,), generator=torch.Generator().manual_seed(4))
    if excluded and len(exclude[1]):
        target[0] = exclude[1][0]
        exclude[0][1:] = exclude[0][1:].clamp(min=1)  # the first query's own target is excluded
    found = rank_targets(query, prepare_catalogue(item_emb), target, exclude=exclude)
    assert found.dtype == torch.int64 and torch.equal(found, brute_ranks(query, item_emb, target, exclude))


def test_ranks_agree_with_the_top_k_on_real_vectors():
    generator = torch.Generator().manual_seed(0)
    item_emb = F.normalize(torch.randn(5000, 48, generator=generator), dim=1)
    item_emb[4000:] = item_emb[:1000]  # exact ties
    query = F.normalize(torch.randn(50, 48, generator=generator), dim=1)
    catalogue = prepare_catalogue(item_emb)
    top = topk_exact(query, catalogue, 20)[1]
    for place in (0, 7, 19):
        assert rank_targets(query, catalogue, top[:, place]).tolist() == [place] * 50
