"""diagnosis.py, and docs/RELIABILITY.md, row 9: a step that is not finite stops the run or is skipped; the first bad number is named."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
import yaml
from reliability_world import make_trainer, state_hash
from test_main import SMALL, run_main
from tiny import tiny_store

import checkpoint as checkpoints
import diagnosis
import trainer as trainer_module
import training_loss
from errors import RunError
from logger import read_train_log
from synthetic import generate

pytestmark = pytest.mark.reliability

NAN, INF = float("nan"), float("inf")


class Spoiled:
    """A loss times something."""

    def __init__(self, loss: object, value: float) -> None:
        self.loss, self.value, self.state_dict = loss, value, loss.state_dict

    def __call__(self, *args: object) -> torch.Tensor:
        return self.loss(*args) * self.value

    def of_targets(self, *args: object) -> torch.Tensor:
        return self.loss.of_targets(*args) * self.value


def in_loss(value: float) -> Callable:
    def inject(trainer) -> None:
        trainer.__dict__["loss"] = Spoiled(trainer.loss, value)

    return inject


def in_gradient(name: str, value: float) -> Callable:
    """One element of a dense parameter's gradient."""

    def inject(trainer) -> None:
        parameter = dict(trainer.model.named_parameters())[name]

        def spoil(gradient):
            gradient = gradient.clone()
            gradient.view(-1)[0] = value
            return gradient

        parameter.register_hook(spoil)

    return inject


def in_rows(value: float) -> Callable:
    """One element of the gradient of the table's rows."""

    def inject(trainer) -> None:
        accumulate = trainer._accumulate

        def spoiled(batch, features) -> None:
            accumulate(batch, features)
            trainer._shares[-1].touched[0].leaf.grad.view(-1)[0] = value

        trainer._accumulate = spoiled

    return inject


def in_weight(name: str, value: float) -> Callable:
    def inject(trainer) -> None:
        with torch.no_grad():
            dict(trainer.model.named_parameters())[name].view(-1)[:8] = value

    return inject


def in_table(value: float) -> Callable:
    def inject(trainer) -> None:
        for part in trainer.model.table.parts:
            part.data[1:] = value

    return inject


def in_vectors(value: float) -> Callable:
    """The multimodal vectors of the data, as a broken cache would have them."""

    def inject(trainer) -> None:
        trainer.store.embedding("81").matrix[1:] = value

    return inject


def in_head(value: float) -> Callable:
    def inject(trainer) -> None:
        head = trainer.model.action_head
        loss = head.loss
        head.loss = lambda *args: loss(*args) * value

    return inject


LOSS, HEAD = "loss of {tokens}", "loss of the action head of {tokens}"
ROWS, TABLE, VECTORS = (
    "gradient of the table's rows of item_id ({row})",
    "weights of the table's rows of {rows}",
    "multimodal vectors 81 of {items}",
)
CASES = [
    ("loss NaN", {}, in_loss(NAN), LOSS),
    ("loss inf", {}, in_loss(INF), LOSS),
    ("loss -inf", {}, in_loss(-INF), LOSS),
    ("loss NaN, bce", {"name": "bce"}, in_loss(NAN), LOSS),
    ("loss NaN, bf16", {"precision": "bf16"}, in_loss(NAN), LOSS),
    ("loss NaN, muon", {"optimizer": "muon"}, in_loss(NAN), LOSS),
    ("loss NaN, adam and averaging", {"optimizer": "adam", "ema_decay": 0.9}, in_loss(NAN), LOSS),
    ("loss NaN, row-wise adagrad", {"table_optimizer": "rowwise_adagrad"}, in_loss(NAN), LOSS),
    ("loss NaN, two batches an update", {"accumulate_steps": 2}, in_loss(NAN), LOSS),
    ("loss NaN, samples of two targets", {"targets_per_sample": 2}, in_loss(NAN), LOSS),
    ("loss NaN with clipping", {"gradient_clip": 1.0}, in_loss(NAN), LOSS),
    ("loss of the action head inf", {"action_head_weight": 0.1}, in_head(INF), HEAD),
    ("gradient NaN", {}, in_gradient("user_token", NAN), "gradient of user_token"),
    ("gradient inf", {}, in_gradient("item_bias", INF), "gradient of item_bias"),
    ("gradient inf with clipping", {"gradient_clip": 1.0}, in_gradient("user_token", INF), "gradient of user_token"),
    ("gradient of rows NaN", {}, in_rows(NAN), ROWS),
    ("gradient of rows inf, adagrad", {"table_optimizer": "rowwise_adagrad"}, in_rows(INF), ROWS),
    ("weight NaN", {}, in_weight("user_token", NAN), "weights of user_token"),
    ("weight inf", {}, in_weight("item_bias", INF), "weights of item_bias"),
    ("table NaN", {}, in_table(NAN), TABLE),
    ("vectors inf", {}, in_vectors(np.float16(INF)), VECTORS),
    ("vectors NaN", {}, in_vectors(np.float16(NAN)), VECTORS),
    ("learnt temperature NaN", {"learn_temperature": True}, in_weight("log_temperature", NAN), "weights of log_temperature"),
    ("float16, nothing finite at any scale", {"precision": "fp16", "max_steps": 60}, in_loss(NAN), LOSS),
]


def some(names: list) -> str:
    """The first five, and how many more."""
    return ", ".join(map(str, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def creatives(trainer, ids: list[int]) -> str:
    return f"item{'s' if len(ids) > 1 else ''} {some([trainer.store.raw_item_ids[i] for i in ids])}"


def whole_message(trainer, batch, number: int, named: str) -> str:
    """The second line of a message of CASES: what is named, of which batch (from 0), and whose it is."""
    ids, store, place = batch.unique_ids.tolist(), trainer.store, int(batch.positions[batch.querying()[0]])
    of = batch.owner[batch.querying()]
    events = [{i for i in (ids[k] for k in (*batch.item_index[batch.owner == u], *batch.target_index[of == u])) if i}
              for u in range(len(batch.users))]  # fmt: skip
    row = next(i for i in ids if i)
    with_vector = [i for i in ids if store.embedding("81").row_of_item[i]]
    fields = trainer.layout.side("item")
    features = trainer.columns.gather(np.array(ids), batch.users.numpy())
    rows = some([f"{f.label} ({some(sorted(v for v in (features.items.rows - f.offset).tolist() if 0 < v <= f.size))})" for f in fields])
    first = creatives(trainer, [ids[batch.target_index[0]]])
    what = named.format(
        tokens=f"tokens {place} (target {first}) and {len(of) - 1} more", row=row, rows=rows, items=creatives(trainer, with_vector)
    )
    concerned = {ROWS: {row}, VECTORS: set(with_vector)}.get(named)
    users = [u for u, mine in enumerate(events) if concerned is None or mine & concerned]
    raw = store.raw_user_ids.take(batch.users[users].tolist())
    whose = f"user{'s' if len(raw) > 1 else ''} {some(raw)}" if raw else "in no event of the batch's users"
    return f"The first that is not finite: {what}; batch {number + 1} of {trainer.order.num_batches}, {whose}."


def learnt(trainer) -> str:
    """A hash of all that an update changes: weights, moments, average, position."""
    position = {name: getattr(trainer, name) for name in ("step", "loss_sum", "loss_count")}
    return state_hash([dict(trainer.model.named_parameters()), trainer.updates.state_dict(), position])


@pytest.mark.fast
@pytest.mark.parametrize(("what", "settings", "inject", "named"), CASES, ids=[what for what, *_ in CASES])
def test_what_is_not_finite_stops_the_run_before_the_update(tmp_path, what, settings, inject, named):
    """Row 9: at step 4, all is as after step 3; the first bad thing, its batch and the users concerned are named, and nobody else."""
    trainer = make_trainer(tmp_path, num_workers=0, **settings)
    update, accumulate = trainer._update, trainer._accumulate
    before: list[str] = []

    def noted(batch, features) -> None:
        ahead = "vectors" in what  # the batch of this step is built
        if trainer.step == 3 - ahead:
            inject(trainer)
        if trainer.step == 3 and not before:
            if "weight" in what or "table" in what or "temperature" in what:  # they are what was spoiled
                accumulate(batch, features)
                trainer._shares.clear()
                trainer.optimizer.zero_grad(set_to_none=True)
            before.append(learnt(trainer))
        update(batch, features)

    trainer._update = noted
    with pytest.raises(RunError) as stop:
        trainer.fit()
    first, second, *rest = str(stop.value).splitlines()
    half = what.startswith("float16")
    assert first.startswith(f"step {trainer.step + 1}, epoch {trainer.epoch}: loss ") and first.endswith("; stopped before the update.")
    assert len(rest) == 1 and (trainer.step == 3 or half)
    number = trainer.batch - settings.get("accumulate_steps", 1)  # the first of the update's
    assert second == whole_message(trainer, trainer._build(number)[0], number, named)
    assert learnt(trainer) == before[0] or half
    if half:
        assert trainer.scaler.skipped == 16 and trainer.scaler.scale == 0.5  # from 2 ** 15 on: counted, and not for ever


class Victim:
    """A user beyond the fifth of batch 4 of an epoch, with an item that no other user has and no earlier batch draws."""

    def __init__(self, trainer) -> None:
        self.trainer, store = trainer, trainer.store
        trainer.order.start_epoch(0)
        batches = [trainer._build(number)[0] for number in range(4)]
        self.batch, earlier = batches[3], {i for batch in batches[:3] for i in batch.unique_ids.tolist()}
        self.number, ids = 3, self.batch.unique_ids
        items = {user: {int(ids[k]) for k in self.batch.target_index[self.batch.owner == user]} for user in range(8)}
        for self.user in range(5, 8):
            others = set.union(*(mine for user, mine in items.items() if user != self.user))
            alone = sorted(i for i in items[self.user] - others - earlier if store.embedding("81").row_of_item[i])
            if alone:
                break
        self.item, self.place = alone[0], ids.tolist().index(alone[0])
        targets = self.batch.target_index[self.batch.owner == self.user].tolist()
        self.position, self.num_tokens = targets.index(self.place), len(targets)
        self.name, self.raw_item = store.raw_user_ids[int(self.batch.users[self.user])], store.raw_item_ids[self.item]
        self.row = int(store.user_ids[self.batch.users[self.user]])
        self.now = None  # the batch whose sequences were encoded last
        encode = trainer.model.encode_sequence

        def noting(history, batch, *more):
            self.now = batch
            return encode(history, batch, *more)

        trainer.model.encode_sequence = noting

    def tokens(self, num_rows: int, position: int | None = None) -> torch.Tensor:
        """(N, 1) bool: the user's tokens, or one of them, in the batch that is computed now."""
        mask = (self.batch.users[self.user] == self.now.users)[self.now.owner]
        assert num_rows == len(mask)
        return (mask if position is None else mask & (self.now.positions == position))[:, None]

    def table_row(self, feature: str, value: int) -> torch.Tensor:
        field = next(f for f in self.trainer.layout.fields if f.name == feature)
        (part,) = self.trainer.model.table.parts
        return part.data[field.offset + value]


def spoil_vector(victim: Victim, value: float, patch) -> str:
    column = victim.trainer.store.embedding("81")
    column.matrix[column.row_of_item[victim.item], 1] = value
    return f"multimodal vectors 81 of item {victim.raw_item}"


def spoil_item_row(victim: Victim, value: float, patch) -> str:
    victim.table_row("item_id", victim.item)[2] = value
    return f"weights of the table's rows of item_id ({victim.item})"


def spoil_user_row(victim: Victim, value: float, patch) -> str:
    victim.table_row("user_id", victim.row)[2] = value
    return f"weights of the table's rows of user_id ({victim.row})"


def spoil_item_output(victim: Victim, value: float, patch) -> str:
    """A module's output for one item."""

    def hook(module, inputs, output):
        values = victim.trainer.store.embedding("81").matrix
        mine = torch.from_numpy(values[victim.trainer.store.embedding("81").row_of_item[victim.item]])
        return output.masked_fill((inputs[0].values == mine).all(1)[:, None], value)

    victim.trainer.model.dense["81"].register_forward_hook(hook)
    return f"history vectors of item {victim.raw_item}, from the output of dense.81 on"


def spoil_output(victim: Victim, value: float, patch) -> str:
    """A module's output for one token: that of the item's event, so this query and the user's later ones."""
    hook = lambda module, inputs, output: output.masked_fill(victim.tokens(len(output), victim.position), value)
    name = "backbone.blocks.0.feed_forward"
    victim.trainer.model.get_submodule(name).register_forward_hook(hook)
    return f"query of token, from the output of {name} on"


def spoil_token_loss(victim: Victim, value: float, patch) -> str:
    softmax = training_loss.softmax_loss

    def spoiled(query, item_emb, target_index, **options):
        ids = victim.now.unique_ids
        mine = ids.tolist().index(victim.item) if victim.item in ids and victim.tokens(len(victim.now.owner)).any() else -1
        found = softmax(query, item_emb, target_index, **options)
        return found * value if (target_index == mine).any() else found

    patch.setattr(training_loss, "softmax_loss", spoiled)
    return f"loss of token {victim.position} (target item {victim.raw_item})"


def spoil_gradient(victim: Victim, value: float, patch) -> str:
    """The gradient of one user's tokens, on its way back into the blocks: all weights before it have a bad one."""
    spoiled = lambda grad: grad.masked_fill((grad != 0) & victim.tokens(len(grad)), value)
    name = "backbone.blocks.0.feed_forward"
    victim.trainer.model.get_submodule(name).register_forward_hook(
        lambda module, inputs, output: output.register_hook(spoiled) and None if output.requires_grad else None
    )
    return "gradient of backbone.blocks.0.feed_forward"


def spoil_row_gradient(victim: Victim, value: float, patch) -> str:
    table = victim.trainer.model.table
    lookup = table.lookup
    row = next(f for f in victim.trainer.layout.fields if f.name == "user_id").offset + victim.row

    def spoiled(side, inputs):
        found = lookup(side, inputs)
        if side == "user" and found[0].requires_grad:
            mine = (inputs.rows[inputs.segments[0] :] == row)[:, None]
            found[0].register_hook(lambda grad: grad.masked_fill(mine, value))
        return found

    table.lookup = spoiled
    return f"gradient of the table's rows of user_id ({victim.row})"


ONE = [spoil_vector, spoil_item_row, spoil_user_row, spoil_item_output, spoil_output, spoil_token_loss, spoil_gradient, spoil_row_gradient]
MODES = {"plain": {}, "accumulation": {"accumulate_steps": 2}, "float16": {"precision": "fp16"}}


@pytest.mark.fast
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spoil", ONE, ids=[spoil.__name__[6:] for spoil in ONE])
def test_of_one_bad_number_the_user_and_the_place_are_named(tmp_path, monkeypatch, mode, spoil):
    """Row 9: one user's, the sixth or a later one of its batch, the second of the update with accumulation; nobody else is named."""
    store = tiny_store(num_users=40, num_items=400, max_events=12)
    trainer = make_trainer(tmp_path, store=store, num_workers=0, user_id=True, dropout_rate=0.1, **MODES[mode])
    trainer.scaler.scale = 1.0  # float16: the first one stops
    victim = Victim(trainer)
    what = spoil(victim, NAN if mode == "plain" else INF, monkeypatch)
    with pytest.raises(RunError) as stop:
        trainer.fit()
    lines = str(stop.value).splitlines()
    expected = f"The first that is not finite: {what}; batch 4 of 5, user {victim.name}."
    if spoil in (spoil_gradient, spoil_output):  # other tensors, other tokens of the user follow
        begin, end = expected.split("; batch")
        assert lines[1].startswith(begin.split(",")[0]) and lines[1].endswith(f"; batch{end}") and begin.split(",")[-1] in lines[1]
    else:
        assert lines[1] == expected
    assert lines[0].startswith(f"step {2 if mode == 'accumulation' else 4}, epoch 0: loss ") and len(lines) == 3


@pytest.mark.fast
@pytest.mark.parametrize("settings", [{}, {"num_experts": 3, "active_experts": 2}, {"memory_bank": 30, "logq_source": "streaming"},
                                      {"precision": "fp16", "accumulate_steps": 2}, {"action_head_weight": 0.1}], ids=str)  # fmt: skip
def test_the_search_changes_nothing(tmp_path, monkeypatch, settings):
    """Row 9: through all its stages; a step that is skipped leaves generators, gradients and what the loss keeps as they were."""
    trainer = make_trainer(tmp_path, num_workers=0, max_skipped_steps=1, **settings)
    trainer.scaler.scale = 1.0
    in_rows(NAN)(trainer)  # found in the last stage
    search, seen = trainer_module.find_cause, []

    def state() -> str:
        experts = [module.counts for module in trainer.model.modules() if hasattr(module, "counts")]
        gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
        kept = [torch.get_rng_state(), gradients, experts, trainer.loss.state_dict(), trainer.scaler.state_dict(), trainer.model.training]
        return state_hash(kept) + learnt(trainer) + str(len(trainer.model.table._touched))

    def watched(update, suspects, touched):
        before, rows = state(), state_hash([(e.rows, e.leaf, e.leaf.grad) for e in touched])
        found = search(update, suspects, touched)
        seen.append((before, rows) == (state(), state_hash([(e.rows, e.leaf, e.leaf.grad) for e in touched])))
        return found

    monkeypatch.setattr(trainer_module, "find_cause", watched)
    with pytest.raises(
        RunError, match="step 2, .*stopped before the update\\.\nThe first that is not finite: gradient of the table's rows"
    ):
        trainer.fit()
    assert seen == [True, True]  # skipped, stopped


@pytest.mark.fast
def test_a_search_that_fails_hides_nothing(tmp_path, monkeypatch):
    """Row 9: no memory left for a further forward pass."""

    def full(*_: object) -> None:
        raise RuntimeError("out of\n memory")

    trainer = make_trainer(tmp_path, num_workers=0)
    in_loss(NAN)(trainer)
    monkeypatch.setattr(diagnosis._Search, "in_forward", full)
    with pytest.raises(
        RunError, match=r"not known, the search for it failed \(out of memory\); batch 1 of 5, users user_\d+, .* and 3 more\."
    ):
        trainer.fit()


@pytest.mark.fast
def test_steps_that_are_not_finite_are_skipped_up_to_a_number(tmp_path):
    """Row 9: with max_skipped_steps 2 the third one stops; skipped ones leave all weights as they were, are warned of, logged and saved."""
    trainer = make_trainer(tmp_path, num_workers=0, max_skipped_steps=2)
    update, same, good = trainer._update, [], trainer.loss

    def spoiled(batch, features) -> None:
        trainer.__dict__["loss"] = Spoiled(good, NAN) if trainer.step in (2, 5, 9) else good
        before = learnt(trainer)
        update(batch, features)
        same.append(before == learnt(trainer))

    trainer._update = spoiled
    with pytest.raises(RunError, match="step 10, .*stopped before the update"):
        trainer.fit()
    assert [step for step, unchanged in enumerate(same) if unchanged] == [2, 5]
    log = [record for record in read_train_log(tmp_path / "train.log") if "loss" in record]
    assert [record.get("skipped_steps", 0) for record in log] == [0, 0, 1, 1, 1, *[2] * (len(log) - 5)]


@pytest.mark.fast
def test_weights_that_are_not_finite_are_not_skipped(tmp_path):
    trainer = make_trainer(tmp_path, num_workers=0, max_skipped_steps=5)
    in_weight("user_token", NAN)(trainer)
    with pytest.raises(RunError, match="weights of user_token"):
        trainer.fit()


@pytest.mark.fast
def test_float16_skips_are_counted_in_the_log_and_the_checkpoint(tmp_path):
    """Row 9: an overflow of float16 is skipped, the weights are as before, and train.log tells how often that was."""
    trainer = make_trainer(tmp_path, precision="fp16", num_workers=0)
    trainer.scaler.scale = 4.0
    update, hashes = trainer._update, []

    def overflowing(batch, features) -> None:
        overflows = trainer.step in (2, 5)
        scale, trainer.scaler.scale = trainer.scaler.scale, 2.0**127 if overflows else trainer.scaler.scale
        before = state_hash(dict(trainer.model.named_parameters()))
        update(batch, features)
        hashes.append(before == state_hash(dict(trainer.model.named_parameters())))
        if overflows:
            trainer.scaler.scale = scale

    trainer._update = overflowing
    trainer.fit()
    assert [step for step, same in enumerate(hashes) if same] == [2, 5]
    log = [record for record in read_train_log(tmp_path / "train.log") if "loss" in record]
    assert [record["skipped_steps"] for record in log] == [0, 0, 1, 1, 1, *[2] * (len(log) - 5)]
    assert checkpoints.load_checkpoint(checkpoints.newest_valid(tmp_path), with_trainer=True).trainer_state["scaler"]["skipped"] == 2


def test_a_run_that_diverges_keeps_its_last_checkpoint(tmp_path, monkeypatch):
    """Row 9, main.py: status 1, state failed, the checkpoint before it whole; with the fault mended, it goes on."""
    generate(tmp_path / "data", 60, 80, "jsonl", max_length=10, mean_length=7)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    flags = ["--config", "small.yaml", "--data_path", "data", "--log_path", "log", "--checkpoint_path", "ckpt"]
    update = trainer_module.Trainer._update

    def diverging(self, batch, features) -> None:
        if self.step == 5:
            in_weight("user_token", NAN)(self)
        update(self, batch, features)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "_update", diverging)
        done = run_main(*flags, cwd=tmp_path)
    assert done.status == 1 and "weights of user_token" in done.err and "Traceback" not in done.err, done.err
    assert json.loads((tmp_path / "log/status.json").read_text())["state"] == "failed"
    assert checkpoints.newest_valid(tmp_path / "ckpt", pytest.fail).name.startswith("global_step4")
    assert run_main(*flags, "--resume", cwd=tmp_path).status == 0
