"""data.targets_per_sample: samples of few targets, each encoded for itself; the same targets as a sample a user has."""

import numpy as np
import pytest
import torch
from reliability_world import make_trainer, state_hash
from test_trainer import final_state, losses_of
from tiny import tiny_store

from dataset import BatchBuilder, NegativeSampling, ShortSamples, Split, TrainingOrder, make_splits, predict_split, training_samples
from training_loss import _seen_by_user

SEQUENCES = [[7, 8, 9], [3], [4, 4, 5, 6, 7, 1]]


def samples_of(sequences, most, targets_per_sample=1):
    store = tiny_store(sequences=sequences)
    return store, ShortSamples(predict_split(store), most, targets_per_sample)


def test_samples_by_hand():
    store, short = samples_of(SEQUENCES, 4)
    samples = short.take(np.arange(short.num_samples))
    assert samples.users.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert (samples.end - samples.begin).tolist() == short.lengths().tolist() == [1, 2, 3, 1, 3, 4, 5, 6]  # user 2's last four events
    assert store.item_ids[samples.target].tolist() == [7, 8, 9, 3, 5, 6, 7, 1]
    assert [part.tolist() for part in short.take(np.array([6, 0]))] == [[2, 0], [4, 0], [9, 1], [8, 0]]
    assert [training_samples(size, predict_split(store), 3).num_samples for size in (0, 1, 2, 3, 4, 9)] == [3, 8, 5, 4, 3, 3]


def test_samples_of_two_targets_by_hand():
    store, short = samples_of(SEQUENCES, 5, 2)
    samples = short.take(np.arange(short.num_samples))
    assert samples.users.tolist() == [0, 0, 1, 2, 2, 2]
    assert (samples.end - samples.begin).tolist() == short.lengths().tolist() == [1, 3, 1, 2, 4, 6]
    assert store.item_ids[samples.target].tolist() == [7, 8, 3, 4, 5, 7]  # the first target of each; user 2's first event is none
    batch = BatchBuilder(store, short, 4, negatives=NegativeSampling("position", 2)).training(np.array([3, 5, 0]), 0, 0)
    assert batch.unique_ids[batch.target_index].tolist() == [4, 7, 1, 7] and batch.query_tokens.tolist() == [1, 5, 6, 7]
    assert batch.lengths.tolist() == [2, 5, 1] and batch.negative_index.shape == (4, 2)


def test_a_batch_by_hand():
    store, short = samples_of(SEQUENCES, 4)
    for kind, negatives in (("position", 3), ("shared", 5), ("all", 0)):
        batch = BatchBuilder(store, short, 3, negatives=NegativeSampling(kind, negatives)).training(np.array([7, 1, 3]), 0, 0)
        inputs, targets = batch.unique_ids[batch.item_index], batch.unique_ids[batch.target_index]
        assert batch.lengths.tolist() == [4, 2, 1] and inputs.tolist() == [0, 5, 6, 7, 0, 7, 0]
        assert batch.query_tokens.tolist() == [3, 5, 6] and targets.tolist() == [1, 8, 3]
        assert batch.target_actions.tolist() == store.action_types[[9, 1, 3]].tolist()
        assert batch.negative_index.shape == ((3, 3) if kind == "position" else (3, 0))
    taken = batch.unique_ids[batch.candidate_index].tolist()
    assert taken == list(range(1, store.num_items + 1))


def test_in_batch_negatives_are_the_targets_alone():
    store, short = samples_of([[1, 2, 3, 4], [5, 6]], 9)
    batch = BatchBuilder(store, short, 8, negatives=NegativeSampling("shared", 0)).training(np.array([3, 4]), 0, 0)
    assert batch.unique_ids[batch.candidate_index].tolist() == [4, 5]


@pytest.mark.parametrize("size", [1, 2, 5, 50])
@pytest.mark.parametrize("buckets", [False, True])
def test_an_epoch_has_each_target_once(buckets, size):
    store = tiny_store(num_users=40, num_items=30, min_events=1, max_events=20)
    train = make_splits(store, protocol="leave_one_out", holdout_fraction=0.1, target="last", seed=1).train
    short = ShortSamples(train, 9, size)
    order = TrainingOrder(short, 16, 1, 8, buckets)
    order.start_epoch(1)
    samples = [short.take(order.samples(number)) for number in range(order.num_batches)]
    found = np.concatenate([np.arange(*part) for sample in samples for part in zip(sample.target, sample.end)])
    wanted = [event for begin, end in zip(train.begin, train.end) for event in range(max(begin, end - 9), end)]
    assert sorted(found.tolist()) == sorted(wanted) and short.num_samples <= len(found) <= size * short.num_samples


def gradients(trainer, samples, builder):
    trainer.builder, trainer.samples = builder, builder.split
    batch = builder.training(samples, 0, 0)
    features = trainer.columns.gather(batch.unique_ids.numpy(), batch.users.numpy(), True, None)
    trainer.model.train()
    trainer._accumulate(batch, features)
    (share,) = trainer._shares
    trainer._shares = []
    dense = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    rows = [(entry.leaf.grad.clone()) for entry in share.touched]
    trainer.optimizer.zero_grad(set_to_none=True)
    return share, dense, rows


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"backbone": "hstu"},
        {"position": "relative", "time_bias": True},
        {"action_conditioning": "film", "action_dropout": 0.0, "action_head_weight": 0.5},
        {"mask_seen_negatives": False, "action_weights": [0.1, 1, 2]},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [1, 3])
def test_loss_and_gradients_are_those_of_whole_users(tmp_path, settings, size):
    """Without dropout a causal encoder gives each prefix the state that it has within the user's sequence."""
    more = {"name": "full_softmax", "dropout_rate": 0.0, "position": "learned", "max_seq_length": 20} | settings
    trainer = make_trainer(tmp_path, **more)
    train, length = trainer.splits.train, 20
    users = np.arange(6)
    short = ShortSamples(train.take(users), length + 1, size)
    sampling = NegativeSampling("all", 0)
    whole = gradients(trainer, users, BatchBuilder(trainer.store, train, length, negatives=sampling))
    apart = gradients(trainer, np.arange(short.num_samples), BatchBuilder(trainer.store, short, length, negatives=sampling))
    assert apart[0].num_targets == whole[0].num_targets <= size * short.num_samples
    assert torch.allclose(apart[0].losses, whole[0].losses, rtol=1e-5)
    assert apart[1].keys() == whole[1].keys() and len(apart[2]) == len(whole[2]) > 0
    for one, other in [(apart[1][name], whole[1][name]) for name in whole[1]] + list(zip(apart[2], whole[2])):
        if one.shape == other.shape:  # the user token's features: one row for each sample, not each user
            assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2])
def test_seen_by_user_against_a_loop(size):
    store = tiny_store(num_users=12, num_items=20)
    train = make_splits(store, protocol="leave_one_out", holdout_fraction=0.3, target="last", seed=1).train
    batch = BatchBuilder(store, ShortSamples(train, 6, size), 5, 1).training(np.arange(9), 0, 0)
    found, owner = _seen_by_user(batch, 1), batch.owner[batch.query_tokens]
    for user in range(9):
        mine = (batch.owner == user) & (batch.positions > 0)
        items = {*batch.item_index[mine].tolist(), *batch.target_index[owner == user].tolist()}
        assert {item + 1 for item in found.items[found.offsets[user] : found.offsets[user + 1]].tolist()} == items
    assert torch.equal(found.owner, owner)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"name": "full_softmax", "precision": "bf16"},
        {"name": "bce", "num_negatives": 2, "gradient_checkpointing": True},
        {"mask_seen_negatives": True, "memory_bank": 20, "logq_source": "streaming", "accumulate_steps": 2},
        {"action_conditioning": "gate", "action_head_weight": 0.5, "num_experts": 3},
    ],
    ids=str,
)
def test_it_learns_and_a_resumed_run_is_exact(tmp_path, settings):
    settings = {"targets_per_sample": 1, "batch_size": 32, "num_epochs": 2, "save_every_steps": 3, "learning_rate": 0.01} | settings
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.fit()
    losses = list(losses_of(tmp_path / "whole").values())
    assert whole.order.num_samples > 2 * whole.splits.train.num_samples and np.mean(losses[-3:]) < np.mean(losses[:3])
    (start,) = (tmp_path / "whole").glob("global_step3.*")
    resumed = make_trainer(tmp_path / "again", resume_from=start, **settings)
    torch.rand(7)
    resumed.fit()
    assert state_hash(final_state(resumed)) == state_hash(final_state(whole))


def test_samples_are_made_when_asked_for():
    """A hundred million targets of a million users: nothing of the samples' size is kept."""
    users = np.arange(1_000_000)
    split = Split(users, 100 * users, 100 * users + 100, np.full_like(users, -1))
    short = ShortSamples(split, 101, 1)
    assert short.num_samples == 100_000_000
    assert [part.tolist() for part in short.take(np.array([99_999_999]))] == [[999_999], [99_999_900], [100_000_000], [99_999_999]]
    assert sum(part.nbytes for part in vars(short).values() if isinstance(part, np.ndarray)) == 8_000_000
