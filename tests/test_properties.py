"""Batches and exact retrieval under whatever hypothesis thinks of: lengths, windows, negatives; shapes, ties and exclusions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_retrieval import brute_force, brute_ranks
from tiny import tiny_store

import kernels
from dataset import BatchBuilder, NegativeSampling, Split
from retrieval import prepare_catalogue, rank_targets, topk_exact

KINDS = ("position", "shared", "all", "none")
SLOW = settings(deadline=None, max_examples=80)


# ---- batches --------------------------------------------------------------------------------------------------------------


@st.composite
def worlds(draw, kinds=KINDS):
    """A store whose users have any number of events from one on, samples of it in any order, a window, and negatives."""
    num_items = draw(st.integers(1, 12))
    sequences = draw(st.lists(st.lists(st.integers(1, num_items), min_size=1, max_size=9), min_size=1, max_size=6))
    store = tiny_store(sequences=sequences, num_items=num_items)
    end = np.array([draw(st.integers(1, len(s))) for s in sequences])  # later events are held out, and no history
    begin = store.user_offsets[:-1]
    users = np.arange(len(sequences))
    split = Split(users, begin, begin + end, np.full(len(users), -1))
    popular = np.cumsum(np.concatenate([[0.0], np.full(num_items, 1 / num_items)]))
    kind = draw(st.sampled_from(kinds))
    more = {"in_batch": draw(st.booleans()), "max_in_batch": draw(st.sampled_from([0, 0, 1, 4])), "num_popular": draw(st.integers(0, 3))}
    negatives = None if kind == "none" else NegativeSampling(kind, draw(st.integers(0, 4)), popular=popular, **more)
    samples = np.array(draw(st.lists(st.sampled_from(users.tolist()), min_size=1, max_size=6, unique=True)))
    return store, split, draw(st.integers(1, 5)), negatives, samples, draw(st.integers(0, 3)), draw(st.integers(0, 3))


def built(world, samples=None):
    store, split, window, negatives, all_samples, epoch, step = world
    return BatchBuilder(store, split, window, 7, negatives).training(all_samples if samples is None else samples, epoch, step)


@SLOW
@given(worlds())
def test_tokens_and_targets_of_a_training_batch(world):
    """Each event of the window is the target once, its input the event before it, the first one's the user token."""
    store, split, window, negatives, samples, *_ = world
    batch = built(world)
    ids, place = batch.unique_ids, 0
    assert batch.users.tolist() == split.users[samples].tolist() and batch.max_length == batch.lengths.max()
    assert len(batch.owner) == batch.lengths.sum() == len(batch.target_index) == len(batch.item_index)
    for row, sample in enumerate(samples):
        last = np.arange(split.begin[sample], split.end[sample])[-(window + 1) :]
        num = len(last)
        tokens = slice(place, place + num)
        place += num
        assert batch.lengths[row] == num and (batch.owner[tokens] == row).all() and batch.positions[tokens].tolist() == list(range(num))
        assert ids[batch.target_index[tokens]].tolist() == store.item_ids[last].tolist()
        assert batch.target_actions[tokens].tolist() == store.action_types[last].tolist()
        assert ids[batch.item_index[tokens]].tolist() == [0, *store.item_ids[last[:-1]].tolist()]
        assert batch.action_types[tokens].tolist() == [0, *(store.action_types[last[:-1]] + 1).tolist()]
        assert batch.timestamps[tokens].tolist() == [0, *store.timestamps[last[:-1]].tolist()]
    assert ids[0] == 0 and (ids[1:] > ids[:-1]).all() and ids[-1] <= store.num_items
    used = torch.cat([part.reshape(-1) for part in (batch.item_index, batch.target_index, batch.negative_index, batch.candidate_index)])
    assert set(used.tolist()) | {0} == set(range(len(ids)))  # no id that nothing asks for
    assert all(column.dtype == torch.int64 for column in batch[:-2])


@pytest.mark.parametrize("kind", KINDS)
@SLOW
@given(st.data())
def test_negatives_of_a_training_batch(kind, data):
    """Items of the catalogue, of the number asked for; drawn for a token: none of the user's training events while there is another."""
    world = data.draw(worlds([kind]))
    store, split, _, negatives, samples, *_ = world
    batch = built(world)
    ids = batch.unique_ids
    if negatives is None:
        assert batch.negative_index.numel() == batch.candidate_index.numel() == 0
    elif negatives.kind == "all":
        assert ids[batch.candidate_index].tolist() == list(range(1, store.num_items + 1)) and batch.negative_index.numel() == 0
    elif negatives.kind == "shared":
        candidates, targets = set(ids[batch.candidate_index].tolist()), set(ids[batch.target_index].tolist())
        num_tokens = len(batch.target_index)
        capped = 0 < negatives.max_in_batch < num_tokens
        in_batch = (negatives.max_in_batch if capped else num_tokens) * negatives.in_batch
        assert len(candidates) == len(batch.candidate_index) <= negatives.num_negatives + negatives.num_popular + in_batch
        assert candidates <= set(range(1, store.num_items + 1)) and batch.negative_index.numel() == 0
        assert not negatives.in_batch or capped or targets <= candidates
        assert negatives.in_batch or batch.candidate_index.numel() <= negatives.num_negatives + negatives.num_popular
    else:
        assert batch.negative_index.shape == (len(batch.owner), negatives.num_negatives) and batch.candidate_index.numel() == 0
        drawn = ids[batch.negative_index]
        assert negatives.num_negatives == 0 or (drawn.min() >= 1 and drawn.max() <= store.num_items)
        for row, sample in enumerate(samples):
            history = set(store.item_ids[split.begin[sample] : split.end[sample]].tolist())
            if len(history) < store.num_items / 4:  # 32 draws that all fall into a quarter: one in 2**64
                assert not history & set(drawn[batch.owner == row].reshape(-1).tolist())


@SLOW
@given(worlds(), st.randoms(use_true_random=False))
def test_a_users_tokens_and_negatives_do_not_depend_on_the_rest_of_the_batch(world, chance):
    """What is drawn for a token is a function of the sample, not of its neighbours or their order; what is shared, of the step alone."""
    store, _, _, negatives, samples, *_ = world
    order = list(range(len(samples)))
    chance.shuffle(order)
    whole, shuffled = built(world), built(world, samples[order])

    def of(batch, row):
        mine = batch.owner == row
        drawn = batch.unique_ids[batch.negative_index[mine]] if batch.negative_index.numel() else None
        columns = batch.positions[mine], batch.unique_ids[batch.item_index[mine]], batch.unique_ids[batch.target_index[mine]]
        return [*(column.tolist() for column in columns), batch.timestamps[mine].tolist(), None if drawn is None else drawn.tolist()]

    for row, before in enumerate(order):
        assert of(shuffled, row) == of(whole, before)
        assert of(built(world, samples[before : before + 1]), 0) == of(whole, before)
    if negatives is not None and negatives.kind == "shared" and not negatives.in_batch:
        alone = built(world, samples[:1])
        assert alone.unique_ids[alone.candidate_index].tolist() == whole.unique_ids[whole.candidate_index].tolist()


@SLOW
@given(worlds())
def test_compiled_loops_and_numpy_build_the_same_batch(world):
    kernels.compiled(wait=True)
    fast = built(world)
    kernels.ENABLED = False
    try:
        slow = built(world)
    finally:
        kernels.ENABLED = True
    assert fast[-2:] == slow[-2:] and all(torch.equal(a, b) for a, b in zip(fast[:-2], slow[:-2]))


@SLOW
@given(worlds())
def test_evaluation_batches(world):
    """The user token and the last events of the window; nothing to predict, no negatives."""
    store, split, window, _, samples, *_ = world
    batch = BatchBuilder(store, split, window).evaluation(samples)
    for row, sample in enumerate(samples):
        last = np.arange(split.begin[sample], split.end[sample])[-window:]
        mine = batch.owner == row
        assert batch.unique_ids[batch.item_index[mine]].tolist() == [0, *store.item_ids[last].tolist()]
        assert batch.action_types[mine].tolist() == [0, *(store.action_types[last] + 1).tolist()]
        assert batch.positions[mine].tolist() == list(range(len(last) + 1)) and batch.lengths[row] == len(last) + 1
    assert batch.target_index.numel() == batch.negative_index.numel() == batch.candidate_index.numel() == 0


# ---- retrieval ------------------------------------------------------------------------------------------------------------


@st.composite
def rankings(draw):
    """Queries, candidates and exclusions of any shape. Multiples of 1/8: float32 sums are exact, and ties are many."""
    num_queries, num_items, width = draw(st.integers(0, 9)), draw(st.integers(0, 300)), draw(st.integers(1, 9))
    generator, levels = torch.Generator().manual_seed(draw(st.integers(0, 1000))), draw(st.integers(0, 8))
    query, items = (torch.randint(-levels, levels + 1, (n, width), generator=generator).float() / 8 for n in (num_queries, num_items))
    most = draw(st.sampled_from([0, 3, num_items, 2 * num_items]))  # up to all of them, with repeats
    counts = torch.randint(0, most + 1, (num_queries,), generator=generator) * (num_items > 0)
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    excluded = torch.randint(max(1, num_items), (int(offsets[-1]),), generator=generator)
    exclude = (offsets, excluded) if draw(st.booleans()) else None
    return query, items, draw(st.integers(1, 12)), exclude, draw(st.sampled_from([False, True, None]))


@settings(deadline=None, max_examples=200)
@given(rankings())
def test_the_top_k_is_that_of_float64(ranking):
    query, items, k, exclude, low = ranking
    scores, index = topk_exact(query, prepare_catalogue(items, low_precision=low) if len(items) else items, k, exclude=exclude)
    want_scores, want_index = brute_force(query, items, k, exclude)
    assert scores.shape == index.shape == (len(query), k)
    assert torch.equal(index, want_index) and torch.equal(scores, want_scores)


@settings(deadline=None, max_examples=100)
@given(rankings(), st.data())
def test_a_targets_rank_is_its_place_in_the_whole_ranking(ranking, data):
    query, items, _, exclude, low = ranking
    if not len(items) or not len(query):
        return
    target = torch.tensor([data.draw(st.integers(-1, len(items) - 1)) for _ in query])
    found = rank_targets(query, prepare_catalogue(items, low_precision=low), target, exclude=exclude)
    assert torch.equal(found, brute_ranks(query, items, target, exclude))
    _, whole = brute_force(query, items, len(items), exclude)
    for row, place in enumerate(found.tolist()):
        assert place < 0 or whole[row, place] == target[row]
