"""actions.py: conditioning of queries and the action head, by hand, in the model, and through training and evaluation."""

import math

import numpy as np
import pytest
import torch
from test_evaluate import SPLIT, ranker
from test_model import make, run
from test_trainer import final_state, losses_of, make_trainer
from tiny import tiny_store

import checkpoint as checkpoints
import parallel
from actions import ActionConditioning, ActionHead, wanted_in_training
from compatibility import check_compatible
from dataset import BatchBuilder, make_splits, predict_split
from ensemble import EnsembleRanker
from errors import UserError
from evaluate import wanted_actions
from logger import read_train_log
from schema import ANY_ACTION, CLICK

KINDS = ["film", "gate"]


def randomise(module, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()


def wake(model):
    """Conditioning that does something."""
    randomise(model.conditioning)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_formulas(kind):
    module = ActionConditioning(kind, 5)
    query, actions = torch.randn(6, 5), torch.tensor([0, 1, 2, ANY_ACTION, 1, 0])
    assert torch.equal(module(query, actions), query)  # it starts as the identity
    randomise(module)
    found = module(query, actions)
    for row, action in enumerate(actions.tolist()):
        if kind == "film":
            expected = query[row] * (1 + module.scale[action]) + module.shift[action]
        else:
            expected = query[row] * 2 / (1 + torch.exp(-(query[row] @ module.weight + module.shift[action])))
        torch.testing.assert_close(found[row], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_starts_as_the_one_without_conditioning(kind):
    plain, conditioned = make(), make(action_conditioning=kind)
    conditioned[1].load_state_dict(plain[1].state_dict(), strict=False)
    _, expected, items = run(*plain, range(6), training=True)
    _, found, same = run(*conditioned, range(6), training=True)
    torch.testing.assert_close(found, expected)
    assert torch.equal(items, same)


@pytest.mark.parametrize("kind", KINDS)
def test_every_conditioning_weight_gets_a_gradient(kind):
    _, model, _ = found = make(action_conditioning=kind)
    _, query, items = run(*found, range(6), training=True)
    (query @ items.T).square().sum().backward()
    assert all((p.grad != 0).any() for p in model.conditioning.parameters())


def test_target_actions_of_a_batch():
    store = tiny_store(sequences=[[1, 2, 3], [4, 5]])
    store.action_types[:] = [2, 0, 1, 1, 2]
    builder = BatchBuilder(store, predict_split(store), 10)
    batch = builder.training(np.array([1, 0]), 0, 0)
    assert batch.target_actions.tolist() == [1, 2, 2, 0, 1] and batch.target_actions.dtype == torch.int64
    assert BatchBuilder(store, predict_split(store), 1).training(np.array([0]), 0, 0).target_actions.tolist() == [0, 1]  # a window
    assert builder.evaluation(np.array([0])).target_actions.shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wanted_action_changes_its_own_query_alone(kind):
    store, model, columns = make(action_conditioning=kind)
    wake(model)
    last = int(store.user_offsets[1]) - 1
    _, before, _ = run(store, model, columns, [0], training=True)
    store.action_types[last] = 1 - store.action_types[last]  # the last target's: input of no query
    _, after, _ = run(store, model, columns, [0], training=True)
    torch.testing.assert_close(before[:-1], after[:-1])
    assert not torch.allclose(before[-1], after[-1])
    store.action_types[last - 1] = 1 - store.action_types[last - 1]  # target of the last but one, input of the last
    _, third, _ = run(store, model, columns, [0], training=True)
    torch.testing.assert_close(third[:-2], after[:-2])


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_evaluation_agree(kind):
    store, model, columns = make(action_conditioning=kind)
    wake(model)
    _, query, _ = run(store, model, columns, [3], training=True)
    split = predict_split(store)
    split = split._replace(end=split.end - 1, target=split.end - 1)
    for name, same in (("target", True), ("any", False)):
        wanted = wanted_actions(name, store, split)
        ((_, found),) = list(ranker(store, model, columns, batch_size=1).encode_users(split.take(np.array([3])), wanted[3:4]))
        assert torch.allclose(found[0], query[-1], atol=1e-5) == same


def test_evaluation_asks_for_any_action_unless_told():
    store, model, columns = make(action_conditioning="film")
    wake(model)
    split = make_splits(store, **SPLIT).test
    scores = {name: ranker(store, model, columns).rank(split, 5, True, wanted=wanted_actions(name, store, split)).topk_scores
              for name in ("any", "exposure", "click", "conversion")}  # fmt: skip
    assert (ranker(store, model, columns).rank(split, 5, True).topk_scores == scores["any"]).all()
    assert all((scores["any"] != scores[name]).any() for name in ("exposure", "click", "conversion"))
    store.action_types[split.target] = CLICK
    target = ranker(store, model, columns).rank(split, 5, True, wanted=wanted_actions("target", store, split)).topk_scores
    assert (target == scores["click"]).all()


def test_wanted_actions_by_name():
    store = tiny_store(sequences=[[1, 2, 3], [4, 5, 6]])
    store.action_types[:] = [0, 0, 2, 0, 0, 1]
    split = make_splits(store, **SPLIT).test
    assert wanted_actions("any", store, split).tolist() == [3, 3] and wanted_actions("conversion", store, split).tolist() == [2, 2]
    assert wanted_actions("target", store, split).tolist() == [2, 1]
    assert wanted_actions("target", store, predict_split(store)).tolist() == [3, 3]  # there is none


def test_an_ensemble_asks_each_member():
    store, model, columns = make(action_conditioning="film")
    wake(model)
    split = make_splits(store, **SPLIT).test
    one = ranker(store, model, columns)
    both = EnsembleRanker([one, one], [1.0, 1.0], "softmax")
    wanted = wanted_actions("click", store, split)
    assert (both.rank(split, 5, True, wanted=wanted).topk_ids == one.rank(split, 5, True, wanted=wanted).topk_ids).all()
    assert (both.rank(split, 20, True, wanted=wanted).topk_ids != both.rank(split, 20, True).topk_ids).any()


def test_hidden_actions():
    actions = torch.randint(0, 3, (200_000,), generator=torch.Generator().manual_seed(0))
    assert wanted_in_training(actions, 0.0) is actions
    torch.manual_seed(3)
    found = wanted_in_training(actions, 0.1)
    hidden = found == ANY_ACTION
    assert abs(float(hidden.float().mean()) - 0.1) < 0.004 and torch.equal(found[~hidden], actions[~hidden])
    torch.manual_seed(3)
    assert torch.equal(wanted_in_training(actions, 0.1), found)


# ---- the head ----


def test_the_heads_formula_and_loss():
    head = ActionHead(4)
    query, items = torch.randn(5, 4), torch.randn(7, 4)
    index, actions = torch.tensor([6, 0, 2, 2, 5]), torch.tensor([0, 2, 1, 0, 0])
    assert float(head.loss(query, items, index, actions).detach()) == pytest.approx(math.log(3))
    randomise(head)
    logits = [torch.cat((q, items[i], q * items[i])) @ head.weight + head.bias for q, i in zip(query, index)]
    expected = sum(-torch.log_softmax(row, 0)[action] for row, action in zip(logits, actions)) / 5
    torch.testing.assert_close(head.loss(query, items, index, actions), expected)


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_the_head_sees_the_query_before_it_is_told_the_action(kind):
    store, _, columns = make()
    model = make(store, action_conditioning=kind, action_head=True)[1]
    if kind != "none":
        wake(model)
    batches = []
    for action in (0, 1):
        store.action_types[int(store.user_offsets[1]) - 1] = action  # the last target's
        batch = BatchBuilder(store, predict_split(store), 10).training(np.array([0]), 0, 0)
        batches.append(model.encode(batch, columns.gather(batch.unique_ids.numpy(), batch.users.numpy(), transposed=True)))
    torch.testing.assert_close(batches[0].state, batches[1].state)
    assert torch.equal(batches[0].query, batches[1].query) == (kind == "none")
    if kind == "none":
        assert batches[0].state is batches[0].query


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", [False, True])
def test_pieces_give_what_the_whole_gives(monkeypatch, kind, head):
    results = []
    for rows in (4, 10**6):
        monkeypatch.setattr(parallel, "MIN_ROWS", rows)
        store, model, columns = make(action_conditioning=kind, action_head=head, id_dropout=0.5, time_fields=["gap", "day", "fourier"])
        wake(model)
        columns.trained = np.arange(21) % 3 > 0
        batch = BatchBuilder(store, predict_split(store), 10).training(np.arange(12), 0, 0)
        found = model.encode(batch, columns.gather(batch.unique_ids.numpy(), batch.users.numpy(), transposed=True))
        loss = (found.query @ found.item_emb.T).square().mean()
        if head:
            randomise(model.action_head)
            loss = loss + model.action_head.loss(found.state, found.item_emb, batch.target_index, batch.target_actions)
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((found, gradients))
        assert {"unknown_id", "time.day.weight", "time.fourier", "conditioning.shift"} <= set(gradients)
    for a, b in zip(*(result[0] for result in results)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], atol=1e-4, rtol=1e-3, msg=name)


def test_the_head_changes_nothing_else_at_first_and_is_logged(tmp_path):
    for name, weight in (("a", 0.0), ("b", 0.5)):
        make_trainer(tmp_path / name, max_steps=2, action_head_weight=weight).fit()
    records = [r for r in read_train_log(tmp_path / "b" / "train.log") if "loss" in r]
    assert records[0]["action_loss"] == pytest.approx(math.log(3), rel=1e-5)
    assert records[0]["loss"] == losses_of(tmp_path / "a")[1]  # the loss is told without the head's
    assert all("action_loss" not in r for r in read_train_log(tmp_path / "a" / "train.log"))


def test_the_head_learns_what_the_items_decide(tmp_path):
    store = tiny_store(num_users=60, num_items=30, max_events=12)
    store.action_types[:] = store.item_ids % 2
    trainer = make_trainer(tmp_path, store=store, action_head_weight=1.0, learning_rate=0.02, max_steps=120, eval_every_epochs=99,
                           save_frequency=99, log_every_steps=5)  # fmt: skip
    trainer.fit()
    found = [r["action_loss"] for r in read_train_log(tmp_path / "train.log") if "loss" in r]
    assert found[-1] < 0.3 < found[0]


def test_conditioning_learns_that_clicks_are_of_other_items(tmp_path):
    """Clicked items are odd, exposed ones even: a query for clicks must answer with odd ones."""
    store = tiny_store(num_users=80, num_items=30, max_events=12)
    store.action_types[:] = store.item_ids % 2
    trainer = make_trainer(tmp_path, store=store, action_conditioning="film", learning_rate=0.03, max_steps=80, dropout_rate=0.0,
                           eval_every_epochs=99, save_frequency=99, log_every_steps=40)  # fmt: skip
    trainer.fit()
    split = trainer.splits.test
    share = {}
    for name in ("click", "exposure", "any"):
        found = trainer._ranker().rank(split, 5, False, wanted=wanted_actions(name, store, split)).topk_ids
        share[name] = float((found % 2).mean())
    assert share["click"] > 0.9 and share["exposure"] < 0.1 and 0.1 < share["any"] < 0.9


@pytest.mark.parametrize("settings", [
    {"action_conditioning": "film", "action_dropout": 0.3},
    {"action_conditioning": "gate", "action_head_weight": 0.3, "accumulate_steps": 2},
    {"time_fields": ["day", "fourier"], "action_head_weight": 0.1, "precision": "bf16"},
    {"id_init": "zero", "id_dropout": 0.3, "num_workers": 3},
    {"id_dropout": 0.3, "hash_rows": [7, 5], "name": "full_softmax", "ema_decay": 0.9},
], ids=str)  # fmt: skip
def test_resume_inside_an_epoch_is_exact(tmp_path, settings):
    whole = make_trainer(tmp_path / "whole", save_every_steps=2, log_every_steps=4, **settings)
    whole.fit()
    (start,) = (tmp_path / "whole").glob("global_step2.*")
    resumed = make_trainer(tmp_path / "from", resume_from=start, save_every_steps=2, log_every_steps=4, **settings)
    torch.rand(7)
    resumed.fit()
    for name, value in final_state(whole).items():
        assert torch.equal(value, final_state(resumed)[name]), name
    lines = [[r for r in read_train_log(tmp_path / name / "train.log") if "loss" in r] for name in ("whole", "from")]
    for a, b in zip(lines[0], lines[1], strict=True):  # step 4's line counts steps 1 and 2 too
        assert a["loss"] == b["loss"] and a.get("action_loss") == b.get("action_loss")


# ---- checkpoints written before these settings ----

NEW = ("time_fields", "action_conditioning", "action_dropout", "id_init", "id_dropout", "action_head_weight", "wanted_action",
       "cold_candidates", "cold_penalty")  # fmt: skip


def test_an_older_checkpoint_is_resumed(tmp_path, monkeypatch):
    whole = make_trainer(tmp_path / "whole", save_every_steps=3)
    whole.fit()
    load = checkpoints.load_checkpoint

    def older(path, with_trainer):
        loaded = load(path, with_trainer=with_trainer)
        for group in loaded.meta["config"].values():
            for name in NEW:
                group.pop(name, None)
        if with_trainer:
            loaded.trainer_state.pop("action_loss_sum")
        return loaded

    monkeypatch.setattr(checkpoints, "load_checkpoint", older)
    (start,) = (tmp_path / "whole").glob("global_step3.*")
    resumed = make_trainer(tmp_path / "from", resume_from=start)
    resumed.fit()
    assert losses_of(tmp_path / "from") == {s: loss for s, loss in losses_of(tmp_path / "whole").items() if s > 3}
    assert "settings changed" not in (tmp_path / "from" / "train.log").read_text()


def test_a_head_belongs_to_the_model(tmp_path):
    trainer = make_trainer(tmp_path, action_head_weight=0.3)
    meta = trainer._meta()
    other = make_trainer(tmp_path / "other")
    with pytest.raises(UserError, match="action_head_weight: 0.3 there, 0.0 here"):
        check_compatible(meta, other.config, other.layout, other.embeddings, tmp_path)
    weaker = make_trainer(tmp_path / "weaker", action_head_weight=0.1)
    check_compatible(meta, weaker.config, weaker.layout, weaker.embeddings, tmp_path)
