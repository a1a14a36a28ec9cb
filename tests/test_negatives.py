"""negatives.py by hand and against brute force; the log_q of every mixture of draws against how often items really are candidates."""

import math

import numpy as np
import pytest
import torch
from test_trainer import SMALL, final_state, fit_until_signal, make_trainer
from tiny import tiny_store

from config import Config, with_values
from dataset import BatchBuilder, make_splits
from negatives import MemoryBank, StreamingFrequency, popularity_probability
from training_loss import TrainingLoss, _seen_by_user, negative_sampling

CPU = torch.device("cpu")


def test_popularity_by_hand():
    found = popularity_probability(np.array([9, 0, 1, 4]), 0.5)
    assert found.tolist() == pytest.approx([0, 0, 1 / 3, 2 / 3])


def test_streaming_frequency_by_hand():
    found = StreamingFrequency(5, 0.5, CPU)
    for items in ([1, 2], [2], [2, 3], [1]):
        found.update(torch.tensor(items))
    assert found.gap[1:4].tolist() == [3.0, 1.0, 0.0] and found.last[1:4].tolist() == [4, 3, 3]
    found.update(torch.tensor([2]))
    assert found.gap[2] == 1.0 + 0.5 * (2 - 1.0)
    draws = found.expected_draws(torch.tensor([1, 2, 3, 4]))
    assert (1 - torch.exp(-draws)).tolist() == pytest.approx([1 / 3, 1 / 1.5, 1 / 5, 1 / 5], rel=1e-5)


def test_streaming_frequency_finds_the_true_one():
    random = np.random.default_rng(0)
    chance = np.array([0.0, 0.9, 0.5, 0.2, 0.05])
    found = StreamingFrequency(4, 0.01, CPU)
    for _ in range(8000):
        found.update(torch.from_numpy((random.random(5) < chance).nonzero()[0]))
    inclusion = 1 - torch.exp(-found.expected_draws(torch.arange(1, 5)))
    assert inclusion.tolist() == pytest.approx(chance[1:].tolist(), rel=0.25)


def test_bank_against_a_list():
    """The newest 6 vectors of different items, whatever comes."""
    random = np.random.default_rng(1)
    bank, held = MemoryBank(6, 2, 12, CPU), {}  # item -> its vector, oldest first
    for step in range(200):
        items = torch.from_numpy(random.choice(np.arange(1, 13), random.integers(1, 5), replace=False))
        vectors = torch.full((len(items), 2), float(step))
        place = bank.next
        bank.update(items, vectors)
        for item in items.tolist():
            held.pop(item, None)
            held[item] = float(step)
        assert bank.next == (place + len(items)) % 6
        known = set(bank.items[bank.items > 0].tolist())
        assert set(items.tolist()) <= known <= set(held) and len(known) == int((bank.items > 0).sum())
        own = torch.tensor(sorted(known)[:2] + [0])
        others, their = bank.others(own)
        assert set(others.tolist()) == known - set(own.tolist())
        assert their[:, 0].tolist() == [held[item] for item in others.tolist()]
    assert not bank.others(torch.arange(13))[0].numel()


def test_bank_draws_some_of_too_many_and_knows_its_age():
    bank, seen = MemoryBank(3, 1, 9, CPU), torch.zeros(10)
    for _ in range(300):
        bank.update(torch.arange(1, 6), torch.arange(1.0, 6.0)[:, None])
        assert len(set(bank.items.tolist())) == 3 and bank.num_batches == 3 / 5
        assert torch.equal(bank.vectors[:, 0], bank.items.float())
        seen[bank.items] += 1
    assert (seen[1:6] / 300 - 0.6).abs().max() < 0.1
    draws = torch.tensor([0.0, 0.5, 30.0])
    assert (1 - torch.exp(-bank.expected_draws(draws))).tolist() == pytest.approx([0, 0.6 * (1 - math.exp(-0.5)), 0.6], rel=1e-5)
    bank = MemoryBank(4, 1, 9, CPU)
    for items in ([1, 2], [3, 4], [5, 6]):
        bank.update(torch.tensor(items), torch.zeros(2, 1))
    assert bank.num_batches == 2 and bank.expected_draws(draws).tolist() == pytest.approx((2 * draws).tolist())
    assert MemoryBank(4, 1, 9, CPU).expected_draws(draws).tolist() == [0, 0, 0]


@pytest.mark.parametrize("settings", [
    {"in_batch_negatives": False, "num_negatives": 3, "popularity_negatives": 5},
    {"in_batch_negatives": False, "num_negatives": 0, "popularity_negatives": 4, "popularity_power": 1.0},
    {"num_negatives": 2, "popularity_negatives": 3, "max_in_batch": 6},
    {"num_negatives": 4, "max_in_batch": 8, "logq_source": "streaming", "logq_rate": 0.01},
    {"num_negatives": 2, "max_in_batch": 0, "memory_bank": 12},
    {"num_negatives": 2, "max_in_batch": 4, "memory_bank": 12},
    {"num_negatives": 2, "max_in_batch": 4, "memory_bank": 60},
    {"num_negatives": 2, "max_in_batch": 4, "memory_bank": 60, "logq_source": "streaming", "logq_rate": 0.01},
    {"num_negatives": 1, "in_batch_negatives": False, "memory_bank": 40},
], ids=str)  # fmt: skip
def test_log_q_is_how_often_an_item_is_a_candidate(settings):
    store = tiny_store(num_users=60, num_items=60, max_events=12)
    config = with_values(Config(), **SMALL | settings)
    train = make_splits(store, protocol="leave_one_out", holdout_fraction=0.3, target="last", seed=1).train
    loss = TrainingLoss(config, store, train, CPU)
    counts = np.bincount(np.concatenate([store.item_ids[b:e] for b, e in zip(train.begin, train.end)]), minlength=store.num_items + 1)
    builder = BatchBuilder(store, train, 8, 1, negative_sampling(config, lambda: counts))
    random, found, tokens, steps = np.random.default_rng(0), np.zeros(store.num_items + 1), 0, 1500
    for step in range(steps):
        batch = builder.training(random.choice(train.num_samples, 8, replace=False), 0, step)
        candidate_index, items, _ = loss._candidates(batch)
        found[batch.unique_ids[candidate_index]] += 1
        if items is not None:
            found[items] += 1
        tokens += len(batch.target_index)
        targets = batch.unique_ids[batch.target_index.unique()]
        if loss.frequency is not None:
            loss.frequency.update(targets)
        if loss.bank is not None:
            loss.bank.update(targets, torch.zeros(len(targets), config.model.hidden_units))
    expected = loss._log_q(torch.arange(store.num_items + 1), tokens // steps).exp().numpy()
    often = expected[1:] > 0.02
    assert often.sum() > 10
    np.testing.assert_allclose(found[1:][often] / steps, expected[1:][often], rtol=0.3 if "max_in_batch" in settings else 0.15, atol=0.03)


@pytest.mark.parametrize("settings", [{}, {"mask_seen_negatives": True}, {"label_smoothing": 0.2}], ids=str)
def test_loss_with_a_bank_against_a_loop(settings):
    """A token's own target is no negative, wherever the bank has it; nor with mask_seen_negatives what its user's window has."""
    store = tiny_store(num_users=20, num_items=30, max_events=8)
    config = with_values(Config(), **SMALL | {"num_negatives": 3, "max_in_batch": 2, "memory_bank": 25} | settings)
    train = make_splits(store, protocol="leave_one_out", holdout_fraction=0.3, target="last", seed=1).train
    loss = TrainingLoss(config, store, train, CPU)
    batch = BatchBuilder(store, train, 8, 1, negative_sampling(config)).training(np.arange(6), 0, 0)
    held = torch.arange(1, 26)
    loss.bank.update(held, torch.randn(25, 16))
    query, item_emb = torch.randn(len(batch.target_index), 16), torch.randn(len(batch.unique_ids), 16)
    unique, seen = batch.unique_ids.tolist(), _seen_by_user(batch, 0)
    vectors = {item: loss.bank.vectors[loss.bank.place[item]] for item in held.tolist()} | dict(zip(unique, item_emb))
    log_q = loss._log_q(torch.arange(31), len(query))
    candidates = set(held.tolist()) | set(batch.unique_ids[batch.candidate_index].tolist())
    losses = []
    for token, place in enumerate(batch.target_index.tolist()):
        own, user, hidden = unique[place], int(seen.owner[token]), set()
        if config.loss.mask_seen_negatives:
            hidden = {unique[i] for i in seen.items[seen.offsets[user] : seen.offsets[user + 1]]}
        items = [own, *sorted(candidates - hidden - {own})]
        logits = torch.stack([vectors[item] @ query[token] / config.loss.temperature - log_q[item] for item in items])
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(0), label_smoothing=config.loss.label_smoothing))
    targets = set(batch.unique_ids[batch.target_index].tolist())
    assert targets & set(held.tolist()) - set(batch.unique_ids[batch.candidate_index].tolist())  # only the bank has them
    torch.testing.assert_close(loss.of_targets(query, item_emb, batch, None), torch.stack(losses).mean(), rtol=1e-5, atol=1e-5)


def test_popular_draws_depend_on_the_step_alone_and_come_by_share():
    store = tiny_store(num_users=30, num_items=20)
    counts = np.arange(21)
    config = with_values(
        Config(), **SMALL | {"in_batch_negatives": False, "num_negatives": 0, "popularity_negatives": 500, "popularity_power": 1.0}
    )
    train = make_splits(store, protocol="leave_one_out", holdout_fraction=0.3, target="last", seed=1).train
    builder = BatchBuilder(store, train, 8, 1, negative_sampling(config, lambda: counts))
    a, b, c = (builder.training(np.arange(4), 0, step) for step in (3, 3, 4))
    assert torch.equal(a.candidate_index, b.candidate_index)
    ids = a.unique_ids[a.candidate_index].tolist()
    assert 0 not in ids and set(range(5, 21)) <= set(ids) and c is not None


def test_the_bank_takes_no_vectors_that_are_not_finite():
    bank = MemoryBank(4, 2, 9, CPU)
    bank.update(torch.tensor([3, 4, 5]), torch.tensor([[1.0, 2.0], [float("nan"), 0.0], [0.0, float("inf")]]))
    items, vectors = bank.others(torch.tensor([0]))
    assert items.tolist() == [3] and vectors.tolist() == [[1.0, 2.0]]


def test_seen_by_user_against_a_loop():
    store = tiny_store(num_users=12, num_items=20)
    train = make_splits(store, protocol="leave_one_out", holdout_fraction=0.3, target="last", seed=1).train
    batch = BatchBuilder(store, train, 5, 1).training(np.arange(7), 0, 0)
    found = _seen_by_user(batch, 1)
    for user in range(7):
        mine = batch.owner == user
        items = set(batch.target_index[mine].tolist()) | set(batch.item_index[mine & (batch.positions > 0)].tolist())
        assert {item + 1 for item in found.items[found.offsets[user] : found.offsets[user + 1]].tolist()} == items
    assert torch.equal(found.owner, batch.owner) and (found.items >= 0).all()


@pytest.mark.parametrize("settings", [
    {"memory_bank": 40}, {"logq_source": "streaming"}, {"memory_bank": 25, "logq_source": "streaming", "popularity_negatives": 5},
    {"learn_temperature": True, "mask_seen_negatives": True, "hard_negatives": 4},
    {"num_negatives": 0, "in_batch_negatives": False, "popularity_negatives": 20},
], ids=str)  # fmt: skip
def test_a_resumed_run_is_exact_and_learns(tmp_path, settings):
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.fit()
    first = make_trainer(tmp_path / "first", **settings)
    fit_until_signal(first, 4)
    last = max((tmp_path / "first").glob("global_step*"), key=lambda path: int(path.name.split(".")[0].removeprefix("global_step")))
    again = make_trainer(tmp_path / "first", resume_from=last, **settings)
    again.fit()
    a, b = final_state(whole), final_state(again)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    for name, part in whole.loss.state_dict().items():
        other = again.loss.state_dict()[name]
        assert all(torch.equal(part[key], other[key]) if torch.is_tensor(part[key]) else part[key] == other[key] for key in part)
    if settings.get("learn_temperature"):
        assert (
            whole.model.temperature().item() != pytest.approx(0.05, abs=1e-6) and whole._temperature() == whole.model.temperature().item()
        )
