import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from tiny import tiny_store

import checkpoint as checkpoints
from config import Config, with_values
from dataset import make_splits
from errors import RunError, UserError
from features import TableLayout, hashed_rows
from final_test import run_test
from ranks import read_ranks
from report_compare import gains
from logger import RunLogger, read_train_log
from optim import LossScaler
from runs import RunPaths
from trainer import Trainer

SMALL = {
    "hidden_units": 16,
    "num_heads": 2,
    "num_blocks": 1,
    "max_seq_length": 8,
    "batch_size": 8,
    "num_epochs": 2,
    "dropout_rate": 0.3,
    "num_negatives": 8,
    "log_every_steps": 1,
    "protocol": "leave_one_out",
    "tensorboard": False,
    "eval_batch_size": 16,
    "keep_last_k": 0,
}


def make_trainer(folder, resume_from=None, store=None, embeddings=("81",), **settings):
    store = store or tiny_store(num_users=40, num_items=30, max_events=12)
    config = with_values(Config(), **(SMALL | settings))
    folder.mkdir(parents=True, exist_ok=True)
    run = RunPaths(folder, folder / "tb", folder, folder.name, resume_from=resume_from)
    splits = make_splits(store, protocol=config.eval.protocol, holdout_fraction=0.3, target=config.eval.target, seed=config.system.seed)
    logger = RunLogger(folder, None, console=False)
    return Trainer(config, store, TableLayout.from_store(store, config.model), embeddings, splits, run, logger, torch.device("cpu"))


def final_state(trainer):
    """Weights and the table optimiser's moments, one a part of the table."""
    moments = trainer.table_optimizer.state_dict()
    found = {f"{name}.{part}": value for name in ("first", "second") for part, value in enumerate(moments[name])}
    assert len(moments["second"]) == len(trainer.model.table.parts) and all((value != 0).any() for value in found.values())
    return trainer.model.state_dict() | found


def losses_of(folder):
    return {r["global_step"]: r["loss"] for r in read_train_log(folder / "train.log") if "loss" in r}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"name": "bce", "num_negatives": 1},
        {"name": "full_softmax"},
        {"num_workers": 0, "length_buckets": False},
        {"num_workers": 3, "table_optimizer": "adam", "optimizer": "adam", "lr_scheduler": "step"},
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"gradient_checkpointing": True},
        {"feature_width": "auto", "table_optimizer": "adam"},
        {"hash_rows": [7, 5], "user_id": True, "hashed_features": ["item_id", "user_id", "tags"]},
    ],
    ids=str,
)
def test_resume_inside_an_epoch_is_exact(tmp_path, settings):
    whole = make_trainer(tmp_path / "whole", save_every_steps=3, **settings)
    whole.fit()
    assert whole.step == whole.total_steps == 10
    for step in (3, 5, 6):  # inside the first epoch, at its end, inside the second
        (start,) = (tmp_path / "whole").glob(f"global_step{step}.*")
        resumed = make_trainer(tmp_path / f"from{step}", resume_from=start, save_every_steps=3, **settings)
        torch.rand(7)  # generators in another state than in the first run
        resumed.fit()
        for name, value in final_state(whole).items():
            assert torch.equal(value, final_state(resumed)[name]), name
        expected = {s: loss for s, loss in losses_of(tmp_path / "whole").items() if s > step}
        assert losses_of(tmp_path / f"from{step}") == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"num_epochs": 4},
        {"num_epochs": 2},  # half of the run is over before an evaluation was seen
        {"num_epochs": 1},
        {"num_epochs": 6, "eval_every_epochs": 4},
        {"max_steps": 50, "num_epochs": 1},  # ends inside an epoch
        {"num_epochs": 3, "accumulate_steps": 2},
        {"num_epochs": 3, "log_every_steps": 7},
    ],
    ids=str,
)
def test_the_time_left_is_right_within_a_fifth_after_a_tenth_of_the_run(tmp_path, monkeypatch, settings):
    """The trainer's own guesses on a clock of the test: a user's step takes half a second, forward alone a third of that, the first
    update ten seconds more; the test ranks its users twice (their exact ranks)."""
    clock = [1000.0]
    for name in ("perf_counter", "monotonic"):
        monkeypatch.setattr(f"time.{name}", lambda: clock[0])
    trainer = make_trainer(tmp_path, **({"batch_size": 2, "log_every_steps": 1} | settings))
    trainer.logger.total_steps = trainer.total_steps
    accumulate, rank, seconds_left, said = trainer._accumulate, trainer.rank, trainer.logger._seconds_left, []

    def slow_accumulate(batch, features):
        clock[0] += 0.5 * batch.users.shape[0] + (10.0 if trainer.step == 0 else 0.0)
        accumulate(batch, features)

    def slow_rank(split, ranks_of=None):
        clock[0] += 0.5 / 3 * split.num_samples * (1 if ranks_of is None else 2)
        return rank(split, ranks_of)

    def noted(step):
        said.append((step, clock[0], seconds_left(step)))
        return said[-1][2]

    monkeypatch.setattr(trainer, "_accumulate", slow_accumulate)
    monkeypatch.setattr(trainer, "rank", slow_rank)
    monkeypatch.setattr(trainer.logger, "_seconds_left", noted)
    trainer.fit()
    run_test(trainer)
    later = [(step, clock[0] - when, left) for step, when, left in said if step > 0.1 * trainer.total_steps]
    assert len(later) >= 5
    assert [(step, truth, left) for step, truth, left in later if abs(left - truth) > 0.2 * truth] == []


def test_resume_in_the_middle_of_a_log_interval_keeps_the_mean(tmp_path):
    make_trainer(tmp_path / "whole", save_every_steps=3, log_every_steps=4).fit()
    (start,) = (tmp_path / "whole").glob("global_step3.*")
    make_trainer(tmp_path / "rest", resume_from=start, save_every_steps=3, log_every_steps=4).fit()
    assert losses_of(tmp_path / "rest") == losses_of(tmp_path / "whole")


def test_training_lowers_the_loss_and_beats_chance(tmp_path):
    sequences = [[(start + i) % 30 + 1 for i in range(12)] for start in range(30)] * 4
    trainer = make_trainer(
        tmp_path, store=tiny_store(sequences=sequences, num_items=30), num_epochs=30, learning_rate=3e-3, dropout_rate=0.1
    )
    trainer.fit()
    losses = list(losses_of(tmp_path).values())
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    assert trainer.evaluate(trainer.splits.test)["hr@10"] > 0.95


@pytest.mark.parametrize(
    "settings", [{"name": "bce", "num_negatives": 2}, {"in_batch_negatives": False}, {"logq": False}, {"name": "full_softmax"}], ids=str
)
def test_every_loss_learns(tmp_path, settings):
    settings = {"temperature": 0.1} | settings | {"similarity": "dot" if settings.get("name") == "bce" else "cosine"}
    sequences = [[(start + i) % 30 + 1 for i in range(12)] for start in range(30)] * 2
    store = tiny_store(sequences=sequences, num_items=30)
    trainer = make_trainer(tmp_path, store=store, num_epochs=30, learning_rate=1e-2, dropout_rate=0.0, remove_seen=False, **settings)
    before = trainer.evaluate(trainer.splits.valid)["ndcg@10"]
    trainer.fit()
    assert trainer.evaluate(trainer.splits.valid)["ndcg@10"] > before + 0.3


def test_checkpoints_links_and_what_is_kept(tmp_path):
    trainer = make_trainer(tmp_path, num_epochs=5, keep_last_k=2, save_every_steps=2)
    trainer.fit()
    folders = checkpoints.list_checkpoints(tmp_path)
    best = tmp_path / trainer.best_name
    assert set(folders) == {*folders[-2:], best}
    assert os.path.samefile(tmp_path / "best_model.pt", best / "model.pt")
    assert (tmp_path / "checkpoint_epoch_5.pt").exists()
    for link in tmp_path.glob("*.pt"):
        assert checkpoints.find_checkpoint(link) in folders


def test_save_every_steps_holds_at_the_end_of_an_epoch_too(tmp_path):
    trainer = make_trainer(tmp_path, save_every_steps=5, save_frequency=1000, eval_every_epochs=1000, keep_last_k=0, max_steps=18)
    trainer.fit()
    assert trainer.steps_per_epoch == 5
    assert [checkpoints._step(path) for path in checkpoints.list_checkpoints(tmp_path)] == [5, 10, 15, 18]


def test_max_steps_rules_over_epochs_and_patience(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=13, num_epochs=1, patience=1, learning_rate=1e-9)
    trainer.fit()
    assert trainer.step == 13 and len(losses_of(tmp_path)) == 13
    assert trainer.updates.learning_rate_factor(13, "dense") == pytest.approx(0.1)  # the schedule ends there


def test_patience_stops(tmp_path):
    trainer = make_trainer(tmp_path, num_epochs=50, patience=2, learning_rate=1e-9)
    trainer.fit()
    assert trainer.step < trainer.total_steps and trainer.evaluations_since_best == 2


def lose(folder, how):
    """Damage a checkpoint, or take it away."""
    if how == "gone":
        shutil.rmtree(folder)
    elif how == "empty":
        for path in folder.iterdir():
            path.unlink()
    else:
        path = folder / {"flip": "model.pt", "cut": "meta.json"}[how]
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.unlink()  # the links keep the whole file
        path.write_bytes(data if how == "flip" else data[: len(data) // 2])


def evaluations_of(folder):
    """{name: hr@10} of the checkpoints that were evaluated."""
    metas = [(path.name, checkpoints.read_meta(path)) for path in checkpoints.list_checkpoints(folder)]
    return {name: meta["metrics"]["hr@10"] for name, meta in metas if meta["valid_loss"] is not None}


BEST_OF_ALL = {"save_frequency": 1, "save_every_steps": 3, "keep_last_k": 0, "best_metric": "hr@10"}


@pytest.mark.parametrize("how", ["flip", "cut", "gone", "empty"])
def test_a_resumed_run_says_that_the_best_checkpoint_is_lost_and_takes_the_best_left(tmp_path, how):
    make_trainer(tmp_path, num_epochs=4, **BEST_OF_ALL).fit()
    values = evaluations_of(tmp_path)
    best = max(values, key=values.get)  # of equals the earliest
    newest = checkpoints.list_checkpoints(tmp_path)[-1]
    assert best == checkpoints.find_checkpoint(tmp_path / "best_model.pt").name != newest.name
    lose(tmp_path / best, how)
    del values[best]
    second = max(values, key=values.get)
    trainer = make_trainer(tmp_path, resume_from=newest, num_epochs=4, **BEST_OF_ALL)
    trainer.fit()
    said = [text for text in trainer.logger._warned if "is lost" in text]
    assert len(said) == 1 and best in said[0] and f"the best that is left is {second}, hr@10 {values[second]:.4f}" in said[0]
    assert f'"note": "warning: the best checkpoint, {best}, is lost: ' in (tmp_path / "train.log").read_text()
    assert (trainer.best_name, trainer.best_value) == (second, values[second])
    assert os.path.samefile(tmp_path / "best_model.pt", tmp_path / second / "model.pt")
    assert (tmp_path / f"damaged-{best}").is_dir() == (how != "gone")  # nothing is deleted
    assert run_test(trainer)["checkpoint"].endswith(second)


@pytest.mark.parametrize("how", ["flip", "gone"])
def test_the_last_test_takes_the_best_left_where_the_best_is_lost_meanwhile(tmp_path, how):
    trainer = make_trainer(tmp_path, num_epochs=4, **BEST_OF_ALL)
    trainer.fit()
    values = evaluations_of(tmp_path)
    lost = trainer.best_name
    lose(tmp_path / lost, how)
    del values[lost]
    metrics = run_test(trainer)
    assert metrics["checkpoint"].endswith(max(values, key=values.get))
    assert [text for text in trainer.logger._warned if lost in text and "is lost" in text]
    for name in values:
        lose(tmp_path / name, "flip")
    with pytest.raises(RunError, match="no evaluated checkpoint is whole"):
        run_test(trainer)


def test_without_another_evaluated_checkpoint_the_next_evaluation_is_the_best(tmp_path):
    """The run that goes on evaluates at once where it stands at its end."""
    settings = {"num_epochs": 2, "eval_every_epochs": 1, "keep_last_k": 0, "save_every_steps": 3, "best_metric": "loss"}
    make_trainer(tmp_path, **settings).fit()
    for name in evaluations_of(tmp_path):
        lose(tmp_path / name, "gone")
    newest = checkpoints.newest_valid(tmp_path)
    trainer = make_trainer(tmp_path, resume_from=newest, **settings)
    trainer.fit()
    assert [text for text in trainer.logger._warned if "none that was evaluated is left" in text]
    assert run_test(trainer)["checkpoint"].endswith(trainer.best_name) and checkpoints._step(tmp_path / trainer.best_name) == 10


def test_test_metrics_have_the_promised_keys(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.fit()
    run_test(trainer)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    wanted = {"split", "protocol", "hr@10", "ndcg@10", "score", "num_users", "num_candidates", "seen_removed", "checkpoint"}
    wanted |= {f"{name}.{metric}" for name in ("popularity", "recent", "item2item") for metric in ("hr@10", "ndcg@10")}
    assert wanted <= set(metrics) and not any(isinstance(value, (dict, list)) for value in metrics.values())
    assert metrics["num_users"] == 40 and metrics["num_candidates"] == 30 and metrics["split"] == "test"
    assert metrics["checkpoint"].endswith(trainer.best_name)
    # Every user's place in ranks.npz gives the same means, the model's and the baselines'.
    ranks = read_ranks(tmp_path)
    assert set(ranks.baselines) == {"popularity", "recent", "item2item"}
    for prefix, places in {"": ranks.rank, **{f"{name}.": places for name, places in ranks.baselines.items()}}.items():
        for key in ("hr@10", "ndcg@10"):
            assert gains(places, key).mean() == pytest.approx(metrics[prefix + key]), (prefix, key)


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.order.start_epoch(0)
    batch, features = trainer._build(0)
    with torch.no_grad():
        trainer.model.item_bias[0] = float("nan")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(RunError, match="stopped before the update") as error:
        trainer._update(batch, features)
    assert "item_bias" in str(error.value) and "user_" in str(error.value)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name


def test_float16_overflow_skips_the_update_and_halves_the_scale(tmp_path):
    trainer = make_trainer(tmp_path, precision="fp16")
    trainer.order.start_epoch(0)
    batch, features = trainer._build(0)
    trainer.scaler.scale = 2.0**127
    before = trainer.model.user_token.detach().clone()
    trainer._update(batch, features)
    assert trainer.scaler.scale == 2.0**126 and trainer.scaler.skipped == 1
    assert torch.equal(trainer.model.user_token, before)


def test_loss_scaler_grows():
    scaler = LossScaler(True, scale=4.0, growth_interval=2)
    for finite in (True, True, False):
        scaler.update(finite)
    assert scaler.scale == 4.0 and scaler.skipped == 1
    assert LossScaler(False).scale == 1.0


def fit_until_signal(trainer, after):
    """Train, and send this process SIGTERM in the middle of the `after`-th step."""
    update = trainer._update

    def update_and_signal(batch, features):
        update(batch, features)
        if trainer.step == after - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer._update = update_and_signal
    trainer.fit()


def test_a_signal_saves_and_stops_and_the_rest_is_exact(tmp_path):
    whole = make_trainer(tmp_path / "whole")
    whole.fit()
    stopped = make_trainer(tmp_path / "stopped")
    fit_until_signal(stopped, after=7)
    assert stopped.stop_signal == signal.SIGTERM and stopped.step == 7
    resumed = make_trainer(tmp_path / "resumed", resume_from=checkpoints.newest_valid(tmp_path / "stopped"))
    resumed.fit()
    for name, value in final_state(whole).items():
        assert torch.equal(value, final_state(resumed)[name]), name


def test_a_checkpoint_of_another_model_or_order_is_refused(tmp_path):
    make_trainer(tmp_path / "a").fit()
    start = checkpoints.newest_valid(tmp_path / "a")
    with pytest.raises(UserError, match="hidden_units: 16 there, 32 here"):
        make_trainer(tmp_path / "b", resume_from=start, hidden_units=32).fit()
    with pytest.raises(UserError, match="batch_size differ"):
        make_trainer(tmp_path / "c", resume_from=start, batch_size=4).fit()
    with pytest.raises(UserError, match="of other data .item_id: 30 values in the checkpoint, 31 in the data"):
        make_trainer(tmp_path / "d", resume_from=start, store=tiny_store(num_users=40, num_items=31)).fit()


def test_resume_refuses_other_users_and_optimisers(tmp_path):
    make_trainer(tmp_path / "a").fit()
    start = checkpoints.newest_valid(tmp_path / "a")
    with pytest.raises(UserError, match="40 users, the data now holds 41"):  # the split would be drawn anew
        make_trainer(tmp_path / "b", resume_from=start, store=tiny_store(num_users=41, num_items=30, max_events=12)).fit()
    for settings in ({"optimizer": "adam"}, {"table_optimizer": "rowwise_adagrad"}):
        with pytest.raises(UserError, match=f"{next(iter(settings))} differ"):
            make_trainer(tmp_path / "c", resume_from=start, **settings).fit()


def test_a_signal_at_the_last_step_leaves_the_evaluation_to_the_resumed_run(tmp_path):
    whole = make_trainer(tmp_path / "whole")
    whole.fit()
    stopped = make_trainer(tmp_path / "stopped")
    fit_until_signal(stopped, after=stopped.total_steps)
    assert stopped.step == stopped.total_steps and stopped.evaluated_step != stopped.step
    resumed = make_trainer(tmp_path / "resumed", resume_from=checkpoints.newest_valid(tmp_path / "stopped"))
    resumed.fit()
    assert (resumed.epoch, resumed.batch, resumed.evaluated_step) == (whole.epoch, whole.batch, whole.evaluated_step)
    assert resumed._valid_metrics == whole._valid_metrics


def test_l2_and_decay_act_on_touched_rows_only(tmp_path):
    store = tiny_store(sequences=[[1, 2, 3, 4, 5]] * 10, num_items=30)
    trainer = make_trainer(tmp_path, store=store, l2_emb=0.1, weight_decay=0.1, num_epochs=1, name="bce", num_negatives=1, embeddings=())
    (table,) = trainer.model.table.parts
    before = table.clone()
    trainer._train_epoch()
    changed = (table != before).any(dim=1)
    (second,) = trainer.table_optimizer.second
    touched = second > 0
    assert torch.equal(changed, touched) and 0 < int(touched.sum()) < len(touched)


@pytest.mark.parametrize("settings", [{}, {"feature_width": "auto"}, {"hash_rows": [7, 5]}], ids=str)
def test_the_padding_row_stays_zero(tmp_path, settings):
    trainer = make_trainer(tmp_path, l2_emb=0.1, learning_rate=0.1, **settings)
    trainer.fit()
    assert (trainer.store.item_single == 0).any()  # rows that it stands for were in the batches
    first = trainer.model.table.parts[0]
    assert (first[0] == 0).all() and (first[1:] != 0).any(dim=1).all() and float(trainer.table_optimizer.second[0][0]) == 0


@pytest.mark.parametrize("settings", [{"hash_rows": [17, 13]}, {"feature_width": "auto"}], ids=str)
def test_hashed_and_narrow_tables_learn(tmp_path, settings):
    """30 items in 17 + 13 rows, of which no two share both."""
    store = tiny_store(sequences=[[(start + i) % 30 + 1 for i in range(12)] for start in range(30)] * 2, num_items=30)
    trainer = make_trainer(tmp_path, store=store, num_epochs=30, learning_rate=1e-2, dropout_rate=0.0, remove_seen=False, **settings)
    assert len(trainer.layout.fields) == 5 + ("hash_rows" in settings)
    fields = [f for f in trainer.layout.fields if f.hash]
    assert not fields or len(set(zip(*(hashed_rows(np.arange(1, 31), f).tolist() for f in fields)))) == 30
    before = trainer.evaluate(trainer.splits.valid)["ndcg@10"]
    trainer.fit()
    losses = list(losses_of(tmp_path).values())
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    assert trainer.evaluate(trainer.splits.valid)["ndcg@10"] > before + 0.3


def test_a_checkpoint_of_another_table_is_refused(tmp_path):
    make_trainer(tmp_path / "a", hash_rows=[7, 5]).fit()
    start = checkpoints.newest_valid(tmp_path / "a")
    others = [
        ({}, r"hash_rows: \[7, 5\] there, \[\] here"),
        ({"hash_rows": [7, 6]}, r"hash_rows: \[7, 5\] there, \[7, 6\] here"),
        ({"hash_rows": [7, 5], "feature_width": "auto"}, "feature_width: same there, auto here"),
    ]
    for settings, words in others:
        with pytest.raises(UserError, match=words):
            make_trainer(tmp_path / "b", resume_from=start, **settings).fit()


def test_loss_of_a_fresh_model_is_log_of_candidates(tmp_path):
    trainer = make_trainer(tmp_path, name="full_softmax", similarity="dot", temperature=1.0, init_std=1e-4, dropout_rate=0.0)
    trainer.order.start_epoch(0)
    batch, features = trainer._build(0)
    query, items = trainer.model(batch, features)
    assert float(trainer.loss(query.detach() * 0, items.detach(), batch)) == pytest.approx(math.log(30), rel=1e-5)
