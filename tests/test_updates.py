"""updates.py and what the trainer does by it: Muon, average of weights, accumulated batches, schedules of groups; exact resume."""

import re

import pytest
import torch
from test_trainer import final_state, fit_until_signal, losses_of, make_trainer

import checkpoint as checkpoints
from checkpoint import load_checkpoint
from embedding import Touched
from errors import RunError, UserError
from logger import read_train_log
from optim import merge_touched

SETTINGS = [
    {"optimizer": "muon"},
    {"ema_decay": 0.7},
    {"accumulate_steps": 2},
    {"accumulate_steps": 3, "ema_decay": 0.9, "optimizer": "muon", "feature_width": "auto", "table_optimizer": "adam",
     "activation": "swiglu"},
    {"optimizer": "muon", "table_lr_scheduler": "constant", "table_warmup_steps": 3, "muon_lr_scheduler": "step", "muon_warmup_steps": 0,
     "warmup_steps": 2, "precision": "fp16", "accumulate_steps": 2},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_resume_inside_an_epoch_is_exact(tmp_path, settings):
    settings = {"batch_size": 4, "save_every_steps": 2, "num_epochs": 2} | settings
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.fit()
    per_epoch = -(-10 // settings.get("accumulate_steps", 1))
    assert whole.step == whole.total_steps == 2 * per_epoch
    for step in (2, per_epoch, per_epoch + 2 - per_epoch % 2):
        (start,) = (tmp_path / "whole").glob(f"global_step{step}.*")
        resumed = make_trainer(tmp_path / f"from{step}", resume_from=start, **settings)
        torch.rand(7)
        resumed.fit()
        for name, value in final_state(whole).items():
            assert torch.equal(value, final_state(resumed)[name]), name
        expected = {s: loss for s, loss in losses_of(tmp_path / "whole").items() if s > step}
        assert losses_of(tmp_path / f"from{step}") == expected
        ends = [checkpoints.newest_valid(tmp_path / name) for name in ("whole", f"from{step}")]
        states = [load_checkpoint(end, with_trainer=True) for end in ends]
        assert ends[0].name == ends[1].name  # the same validation loss, of the averaged weights
        for key, value in states[0].model_state.items():
            assert torch.equal(value, states[1].model_state[key]), key


@pytest.mark.parametrize("settings", SETTINGS[1:4], ids=str)
def test_a_save_that_no_other_run_makes_leaves_the_rest_exact(tmp_path, settings):
    """The average is lazy: to look at it must not move it."""
    settings = {"batch_size": 4} | settings
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.fit()
    stopped = make_trainer(tmp_path / "stopped", **settings)
    fit_until_signal(stopped, after=3)
    assert stopped.step == 3 and stopped.batch == 3 * settings.get("accumulate_steps", 1)
    resumed = make_trainer(tmp_path / "resumed", resume_from=checkpoints.newest_valid(tmp_path / "stopped"), **settings)
    resumed.fit()
    ends = [load_checkpoint(checkpoints.newest_valid(tmp_path / name), with_trainer=False) for name in ("whole", "resumed")]
    assert all(torch.equal(value, ends[1].model_state[key]) for key, value in ends[0].model_state.items())


def test_the_average_is_what_is_saved_and_evaluated(tmp_path):
    decay, kept = 0.6, []
    trainer = make_trainer(tmp_path / "a", ema_decay=decay, num_epochs=2)
    finish = trainer.updates.average.finish_update

    def noted():
        finish()
        kept.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})

    trainer.updates.average.finish_update = noted
    trainer.fit()
    assert len(kept) == 10
    end = load_checkpoint(checkpoints.newest_valid(tmp_path / "a"), with_trainer=True)
    factors = [decay ** (9 - i) for i in range(10)]
    for name, raw in trainer.model.named_parameters():
        wanted = sum(f * w[name] for f, w in zip(factors, kept)) / sum(factors)
        torch.testing.assert_close(end.model_state[name], wanted, atol=1e-6, rtol=1e-5)
        assert torch.equal(end.trainer_state["weights"][name], raw) and torch.equal(raw, kept[-1][name])
    plain = make_trainer(tmp_path / "b", num_epochs=2)
    plain.fit()
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b")  # training does not see the average
    for name, raw in plain.model.named_parameters():
        assert torch.equal(raw, kept[-1][name])
    valid = {f: [r for r in read_train_log(tmp_path / f / "train.log") if "valid_loss" in r][-1]["valid_loss"] for f in "ab"}
    assert valid["a"] != valid["b"]
    trainer.model.load_state_dict(end.model_state)
    assert trainer.evaluate(trainer.splits.valid)["loss"] == pytest.approx(valid["a"], abs=1e-9)


@pytest.mark.parametrize("more", [{"optimizer": "adamw"}, {"optimizer": "muon"}, {"action_weights": [0.1, 5, 1]}], ids=str)
def test_accumulated_batches_equal_one_large_batch(tmp_path, more):
    """Full softmax, no dropout: a target's loss depends on no other user."""
    settings = {"name": "full_softmax", "dropout_rate": 0.0, "length_buckets": False, "table_optimizer": "adam"} | more
    large = make_trainer(tmp_path / "large", batch_size=12, **settings)
    small = make_trainer(tmp_path / "small", batch_size=4, accumulate_steps=3, **settings)
    small.order.start_epoch(0)
    lengths = [small.builder.training(small.order.samples(n), 0, n).target_index.shape[0] for n in range(3)]
    assert len(set(lengths)) > 1  # batches weigh differently
    large.fit(), small.fit()
    assert large.step == small.step == 8
    for step, loss in losses_of(tmp_path / "large").items():
        assert losses_of(tmp_path / "small")[step] == pytest.approx(loss, rel=1e-4)
    for (name, p), q in zip(large.model.named_parameters(), small.model.parameters()):
        torch.testing.assert_close(p, q, atol=5e-4, rtol=5e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("group", [1, 2])
def test_updates_of_targets_of_weight_0_alone(tmp_path, group):
    trainer = make_trainer(tmp_path, batch_size=1, max_seq_length=1, accumulate_steps=group, action_weights=[0, 1, 1])
    trainer.fit()
    found = losses_of(tmp_path)
    assert len(found) == trainer.total_steps and min(found.values()) == 0 < max(found.values())


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize(("start", "wrong"), [(0.02, 1.0), (0.9, -1.0)])
def test_a_learnt_temperature_comes_back_from_its_bounds(tmp_path, optimizer, start, wrong):
    """Two steps too far, then gradients the other way, as long as there are any."""
    trainer = make_trainer(
        tmp_path, learn_temperature=True, temperature=start, optimizer=optimizer, learning_rate=5.0, lr_scheduler="constant"
    )
    found = []
    for step in range(8):
        trainer.optimizer.zero_grad()
        (trainer.model.temperature() * (wrong if step < 2 else -wrong)).backward()
        trainer.updates.apply([], 1.0, step)
        found.append(trainer.model.temperature().item())
    bound, other = (0.01, 1.0) if wrong > 0 else (1.0, 0.01)
    assert found[0] == pytest.approx(bound) and found[-1] == pytest.approx(other)
    assert trainer.model.log_temperature.exp().item() == pytest.approx(other)


def test_steps_count_updates(tmp_path):
    trainer = make_trainer(tmp_path / "a", accumulate_steps=2, num_epochs=2)  # 5 batches an epoch: updates of 2, 2 and 1
    built = []
    build = trainer._build
    trainer._build = lambda number: built.append((trainer.epoch, number)) or build(number)
    trainer.fit()
    assert trainer.step == trainer.total_steps == 6 and list(losses_of(tmp_path / "a")) == [1, 2, 3, 4, 5, 6]
    assert built == [(epoch, number) for epoch in range(2) for number in range(5)]  # in the usual order
    assert trainer.updates.learning_rate_factor(6, "dense") == pytest.approx(0.1)
    assert {path.name.split(".")[0] for path in checkpoints.list_checkpoints(tmp_path / "a")} == {"global_step3", "global_step6"}
    stops = make_trainer(tmp_path / "b", accumulate_steps=2, max_steps=4)
    stops.fit()
    assert (stops.step, stops.epoch, stops.batch) == (4, 1, 2)
    halved = make_trainer(tmp_path / "c", accumulate_steps=2, lr_scheduler="step")
    assert halved.updates.learning_rate_factor(3, "dense") == 0.5  # an epoch is 3 steps


def test_a_batch_that_is_not_finite_stops_the_update_of_all(tmp_path):
    trainer = make_trainer(tmp_path, accumulate_steps=2)
    trainer.order.start_epoch(0)
    first, second = trainer._build(0), trainer._build(1)
    before = trainer.model.user_token.detach().clone()
    loss = trainer.loss
    trainer.__dict__["loss"] = lambda *a: loss(*a) * float("inf")
    trainer.batch = 1
    trainer._accumulate(*first)
    trainer.__dict__["loss"], trainer.batch = loss, 2
    with pytest.raises(RunError, match="stopped before the update") as error:
        trainer._update(*second)
    users = trainer.store.raw_user_ids.take(first[0].users[:5].numpy())
    whose = f"The first that is not finite: the loss, though not when .*; batch 1 of 5, users {', '.join(users)} and 3 more\\."
    assert re.fullmatch(whose, str(error.value).splitlines()[1]) and torch.equal(trainer.model.user_token, before)


def test_merged_rows_have_the_sum_of_their_gradients(tmp_path):
    table = make_trainer(tmp_path, feature_width="auto", embedding_dim=32, hidden_units=32).model.table
    assert len(table.parts) > 1

    def entry(part, rows, grad):
        leaf = table.parts[part].detach()[rows].requires_grad_()
        leaf.grad = torch.full_like(leaf, grad)
        return Touched(part, torch.tensor(rows), leaf)

    batches = [[entry(0, [1, 4], 1.0), entry(1, [0], 5.0)], [entry(0, [2, 4], 2.0), entry(0, [7], 3.0)], [entry(0, [4], 4.0)]]
    assert merge_touched(table, batches[:1]) is batches[0]
    first, second = merge_touched(table, batches)
    assert first.rows.tolist() == [1, 2, 4, 7] and first.leaf.grad[:, 0].tolist() == [1, 2, 7, 3]
    assert torch.equal(first.leaf, table.parts[0][first.rows]) and (first.part, second.part) == (0, 1)
    assert second.rows.tolist() == [0] and second.leaf.grad[0, 0] == 5


def test_each_group_follows_its_own_schedule(tmp_path):
    more = {"learning_rate": 0.1, "table_learning_rate": 0.2, "muon_learning_rate": 0.3, "optimizer": "muon", "warmup_steps": 2}
    updates = make_trainer(tmp_path / "a", lr_scheduler="constant", table_lr_scheduler="step", table_warmup_steps=0,
                           muon_lr_scheduler="cosine", muon_warmup_steps=4, min_lr_ratio=0.0, **more).updates  # fmt: skip
    rates = {group: [updates.learning_rate(step, group) for step in (0, 1, 3, 5, 10)] for group in ("dense", "table", "muon")}
    assert rates["dense"] == pytest.approx([0.05, 0.1, 0.1, 0.1, 0.1])
    assert rates["table"] == pytest.approx([0.2, 0.2, 0.2, 0.1, 0.05])  # an epoch is 5 steps
    assert rates["muon"] == pytest.approx([0.075, 0.15, 0.3, 0.3 * 0.5 * (1 + 0.8660254), 0.0])
    same = make_trainer(tmp_path / "b", **more).updates
    for step in (0, 3, 7):
        factors = {same.learning_rate_factor(step, group) for group in ("dense", "table", "muon")}
        assert len(factors) == 1
    assert same.learning_rate(5, "table") == pytest.approx(2 * same.learning_rate(5, "dense"))


def test_the_groups_get_their_rates(tmp_path):
    trainer = make_trainer(tmp_path, optimizer="muon", learning_rate=0.01, muon_learning_rate=0.05, muon_warmup_steps=10, num_epochs=1,
                           lr_scheduler="constant")  # fmt: skip
    trainer.fit()
    rates = {group.get("schedule", "dense"): group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {"dense": 0.01, "muon": pytest.approx(0.05 * 5 / 10)}
    lines = [r for r in read_train_log(tmp_path / "train.log") if "loss" in r]
    assert lines[-1]["lr"] == 0.01
    assert trainer.updates.too_long_warmups() == ["muon_warmup_steps 10 is no less than the run's 5 steps."]


def test_resume_refuses_another_average_or_grouping_and_takes_older_checkpoints(tmp_path, monkeypatch):
    make_trainer(tmp_path / "a").fit()
    start = checkpoints.newest_valid(tmp_path / "a")
    for settings in ({"ema_decay": 0.5}, {"accumulate_steps": 2}, {"optimizer": "adamw"}):
        with pytest.raises(UserError, match=f"{next(iter(settings))} differ"):
            make_trainer(tmp_path / "b", resume_from=start, **settings).fit()
    read = checkpoints.read_meta

    def older(folder):
        meta = read(folder)
        for key in ("ema_decay", "accumulate_steps", "muon_momentum"):
            del meta["config"]["training"][key]
        return meta

    monkeypatch.setattr(checkpoints, "read_meta", older)
    make_trainer(tmp_path / "c", resume_from=start, num_epochs=3).fit()


def test_a_resumed_run_takes_the_options_given_now(tmp_path):
    more = {"optimizer": "muon", "num_epochs": 3}
    make_trainer(tmp_path / "a", **more).fit()
    start = checkpoints.list_checkpoints(tmp_path / "a")[0]
    trainer = make_trainer(tmp_path / "b", resume_from=start, weight_decay=0.5, adam_beta1=0.5, muon_momentum=0.6, **more)
    trainer.fit()
    groups = trainer.optimizer.param_groups
    assert [group["weight_decay"] for group in groups if group["params"]][:2] == [0.5, 0.0]
    assert groups[0]["betas"] == (0.5, 0.98) and {group["momentum"] for group in groups[2:]} == {0.6}
    assert trainer.table_optimizer.weight_decay == 0.5


def test_muon_learns(tmp_path):
    from tiny import tiny_store

    store = tiny_store(sequences=[[(start + i) % 30 + 1 for i in range(12)] for start in range(30)] * 2, num_items=30)
    trainer = make_trainer(tmp_path, store=store, num_epochs=20, dropout_rate=0.0, remove_seen=False, optimizer="muon", ema_decay=0.9)
    before = trainer.evaluate(trainer.splits.valid)["ndcg@10"]
    trainer.fit()
    assert trainer.evaluate(trainer.splits.valid)["ndcg@10"] > before + 0.3
