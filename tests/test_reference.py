"""reference.py: rows and tensors against the files read by hand, causality, dense Adam, queries, workers; experiments/parity.py."""

import argparse
import json
import math
import multiprocessing
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import reference as module
from dataset import make_splits
from errors import UserError
from plain_pickle import load_plain_pickle
from reference import FULL_SIZES, ITEM_SINGLE, USER_MULTI, USER_SINGLE, Reference, ReferenceSettings, StepTimes, table_sizes
from schema import TENCENT_GR
from store import open_store
from synthetic import generate

LENGTH = 12
SMALL = {"hidden_units": 8, "num_heads": 2, "num_blocks": 2, "max_seq_length": LENGTH, "batch_size": 8}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """30 users of 2 to 20 events: some rows are padded, some are cut."""
    folder = tmp_path_factory.mktemp("reference") / "data"
    generate(folder, 30, 400, "jsonl", seed=2, max_length=20, mean_length=10)
    return folder


@pytest.fixture(scope="module")
def lines(data):
    return [json.loads(line) for line in (data / "seq.jsonl").read_text().splitlines()]


@pytest.fixture
def reference(data):
    return Reference(data, ReferenceSettings(**SMALL))


def copy_of(data, folder, records):
    """The data with other sequences."""
    folder.mkdir()
    for name in ("indexer.pkl", "item_feat_dict.json", "creative_emb"):
        (folder / name).symlink_to(data / name)
    texts = [json.dumps(line) + "\n" for line in records]
    (folder / "seq.jsonl").write_text("".join(texts))
    with open(folder / "seq_offsets.pkl", "wb") as file:
        starts = np.concatenate([[0], np.cumsum([len(text) for text in texts])[:-1]])
        pickle.dump(dict(enumerate(starts.tolist())), file)  # a dict by line number is legal too
    return folder


def profile_of(line):
    return next(record for record in line if record[1] is None)


def events_of(line):
    return [record for record in line if record[1] is not None]


def vector_of(data, item):
    """The item's multimodal vector by way of its creative id; zeros where it has none."""
    (creative,) = [c for c, number in load_plain_pickle(data / "indexer.pkl")["i"].items() if number == item]
    return load_plain_pickle(data / "creative_emb" / "emb_81_32.pkl").get(creative, np.zeros(32, np.float32))


def same_features(found, given, vector):
    """Whether a filled dictionary holds the features given, the vector, and defaults elsewhere."""
    assert np.array_equal(found["81"], vector)
    names = {*ITEM_SINGLE, *USER_SINGLE, *USER_MULTI}
    assert names <= found.keys()
    return all(found[name] == given.get(name, [0] if name in USER_MULTI else 0) for name in names)


# ---- rows and batches ---------------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_file(data, lines, reference):
    assert {len(events_of(line)) > LENGTH + 1 for line in lines} == {True, False}  # both padded and cut rows are there
    for number, line in enumerate(lines):
        row, profile, events = reference.dataset[number], profile_of(line), events_of(line)
        shown = events[-(LENGTH + 1) :]  # each is a target
        pad = LENGTH + 1 - len(shown)
        assert row.pos_ids.tolist() == [0] * pad + [event[1] for event in shown]
        assert row.ids.tolist() == [0] * pad + [profile[0]] + [event[1] for event in shown[:-1]]
        assert row.kinds.tolist() == [0] * pad + [2] + [1] * (len(shown) - 1)
        assert ((row.neg_ids > 0) == (row.pos_ids > 0)).all() and row.neg_ids.max() <= 400
        assert not {event[1] for event in events} & set(row.neg_ids.tolist())


def test_features_are_those_of_the_file(data, lines, reference):
    known = json.loads((data / "item_feat_dict.json").read_text())
    row, line = reference.dataset[3], lines[3]
    shown = events_of(line)[-(LENGTH + 1) :]
    pad = LENGTH + 1 - len(shown)
    zeros = np.zeros(32, np.float32)
    for place in range(pad):
        assert all(same_features(side[place], {}, zeros) for side in row[4:])
    user = profile_of(line)
    assert user[2] and same_features(row.features[pad], user[2], zeros)
    for place, event in enumerate(shown, pad):
        assert event[3] == known[str(event[1])]
        assert same_features(row.pos_features[place], event[3], vector_of(data, event[1]))
        if place + 1 < LENGTH + 1:
            assert same_features(row.features[place + 1], event[3], vector_of(data, event[1]))
        negative = int(row.neg_ids[place])
        assert same_features(row.neg_features[place], known[str(negative)], vector_of(data, negative))


def test_empty_dictionaries_are_kept_and_a_user_takes_no_items_vector(data, tmp_path):
    item = next(i for i in range(1, 400) if vector_of(data, i).any())
    records = [[[item, None, {}, None, None, 9], [item, 1, None, {}, 0, 5], [item, 2, None, {}, 1, 9]]]
    reference = Reference(copy_of(data, tmp_path / "d", records), ReferenceSettings(**SMALL))
    row = reference.dataset[0]
    assert row.ids[-2:].tolist() == [item, 1] and row.kinds[-2:].tolist() == [2, 1] and row.pos_ids[-2:].tolist() == [1, 2]
    assert not row.features[-2]["81"].any()


def test_a_user_who_has_seen_all_items_gets_a_negative_all_the_same(reference):
    assert reference.dataset.negative(set(range(1, 400))) == 400
    assert 1 <= reference.dataset.negative(set(range(1, 401))) <= 400
    drawn = {reference.dataset.negative({1}) for _ in range(6000)}
    assert drawn == set(range(2, 401))


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_an_epoch_holds_each_user_once(data, lines, num_workers):
    with Reference(data, ReferenceSettings(**SMALL, num_workers=num_workers)) as reference:
        reference.encode_users([0])  # opens the file ahead of the workers
        epochs = [[reference.next_batch() for _ in range(4)] for _ in range(2)]
    users = [[batch.ids[batch.kinds == 2].tolist() for batch in epoch] for epoch in epochs]
    for epoch in users:
        assert [len(batch) for batch in epoch] == [8, 8, 8, 6]
        assert sorted(user for batch in epoch for user in batch) == sorted(profile_of(line)[0] for line in lines)
    assert users[0] != users[1]
    rows = {int(batch.ids[row][batch.kinds[row] == 2]): (batch.pos_ids[row], batch.neg_ids[row]) for batch in epochs[0] for row in
            range(len(batch.ids))}  # fmt: skip
    for line in lines:  # workers that shared a file's position would read each other's lines
        seen = [event[1] for event in events_of(line)]
        positive, negative = rows[profile_of(line)[0]]
        assert positive[positive > 0].tolist() == seen[-(LENGTH + 1) :]
        assert not set(seen) & set(negative.tolist())


def test_workers_draw_negatives_of_their_own(data):
    with Reference(data, ReferenceSettings(**SMALL, num_workers=2)) as reference:
        first, second = reference.next_batch(), reference.next_batch()  # one of each worker
    same = {a.item() for a in first.neg_ids.unique()} & {b.item() for b in second.neg_ids.unique()}
    assert len(same) < 0.5 * len(first.neg_ids.unique())


def test_a_worker_opens_the_file_anew(reference, monkeypatch):
    """A forked file shares its place with all other processes; that shows only now and then, so the hook is called by hand."""
    reference.encode_users([0])
    before = reference.dataset._file
    monkeypatch.setattr(module, "get_worker_info", lambda: argparse.Namespace(dataset=reference.dataset))
    module.start_worker(0)
    reference.encode_users([0])
    assert reference.dataset._file is not before


def test_the_same_seed_gives_the_same_batches_and_losses(data):
    found = []
    for seed in (1, 1, 2):
        reference = Reference(data, ReferenceSettings(**SMALL, seed=seed))
        found.append([reference.step().loss for _ in range(3)])
    assert found[0] == found[1] != found[2]


def test_workers_live_on_until_close_ends_them(data):
    reference = Reference(data, ReferenceSettings(**SMALL, num_workers=2))
    reference.step()
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for _ in range(5):
        reference.step()  # into the next epoch
    reference.train_epoch()
    assert {worker.pid for worker in multiprocessing.active_children()} == {worker.pid for worker in workers}
    reference.close()
    deadline = time.monotonic() + 20
    while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(worker.is_alive() for worker in workers)
    assert reference.encode_users([0]).shape == (1, 8)


def test_lines_choose_the_training_users(data, lines):
    chosen = (4, 7, 21)
    reference = Reference(data, ReferenceSettings(**SMALL, lines=chosen))
    batch = reference.next_batch()
    assert sorted(batch.ids[batch.kinds == 2].tolist()) == sorted(profile_of(lines[k])[0] for k in chosen)


# ---- model --------------------------------------------------------------------------------------------------------------


def no_dropout(data, **settings):
    return Reference(data, ReferenceSettings(**SMALL, dropout_rate=0.0, **settings))


def test_item_vectors_by_hand(data, reference):
    known = json.loads((data / "item_feat_dict.json").read_text())
    model, ids = reference.model.eval(), [1, 5, 399]  # item 1 has no features
    tables = {name: table.weight for name, table in model.tables.items()}
    expected = []
    for item in ids:
        parts = [tables["item_id"][item]] + [tables[name][known[str(item)].get(name, 0)] for name in ITEM_SINGLE]
        vector = torch.from_numpy(np.array(vector_of(data, item)))
        parts.append(model.vector_projection.weight @ vector + model.vector_projection.bias)
        expected.append(torch.relu(model.item_tower.weight @ torch.cat(parts) + model.item_tower.bias))
    assert np.allclose(reference.encode_items(ids), torch.stack(expected).detach(), atol=1e-6)


def test_user_vectors_sum_the_values_of_a_list(reference):
    model = reference.model
    features = reference.dataset.defaults | {"103": 3, "106": [2, 5, 7], "110": [1]}
    rows = [np.array([features, reference.dataset.defaults], dtype=object)]
    found = model.user_vectors(torch.tensor([[4, 0]]), rows)
    tables = {name: table.weight for name, table in model.tables.items()}
    parts = [tables["user_id"][4]] + [tables[name][features[name]] for name in USER_SINGLE]
    parts += [sum(tables[name][value] for value in features[name]) for name in USER_MULTI]
    expected = torch.relu(model.user_tower.weight @ torch.cat(parts) + model.user_tower.bias)
    assert torch.allclose(found[0, 0], expected, atol=1e-6)


def test_changing_a_token_changes_nothing_before_it(reference):
    model, batch = reference.model.eval(), reference.next_batch()
    row = int((batch.kinds > 0).sum(1).argmax())
    before = model.encode(batch.ids, batch.kinds, batch.features)
    for place in (0, 5, LENGTH):
        ids, features = batch.ids.clone(), [array.copy() for array in batch.features]
        ids[row, place] = ids[row, place] % 20 + 1
        features[row][place] = features[row][place] | {"100": 1 + features[row][place]["100"] % 5}
        after = model.encode(ids, batch.kinds, features)
        changed = (before != after).any(-1)
        assert changed[row, place] and not changed[row, :place].any()
        assert not changed[[r for r in range(len(ids)) if r != row]].any()


def test_padding_and_neighbours_change_nothing(reference):
    model, batch = reference.model.eval(), reference.next_batch()
    before = model.encode(batch.ids, batch.kinds, batch.features)
    row = int((batch.kinds > 0).sum(1).argmin())
    padding = int((batch.kinds[row] == 0).sum())
    assert padding > 0 and before.isfinite().all()
    features = [array.copy() for array in batch.features]
    for place in range(padding):
        features[row][place] = features[row][place] | {"100": 2, "103": 3, "81": np.ones(32, np.float32)}
    after = model.encode(batch.ids, batch.kinds, features)
    assert torch.equal(before[row, padding:], after[row, padding:])
    alone = model.encode(batch.ids[row : row + 1], batch.kinds[row : row + 1], [batch.features[row]])
    assert torch.allclose(alone[0, padding:], before[row, padding:], atol=1e-6)


def test_logits_are_products_with_the_towers_vectors(reference):
    model, batch = reference.model.eval(), reference.next_batch()
    query = model.encode(batch.ids, batch.kinds, batch.features).detach()
    logits = model(batch)
    for found, ids in zip(logits, (batch.pos_ids, batch.neg_ids), strict=True):
        vectors = torch.from_numpy(reference.encode_items(ids.flatten().clamp(min=1).tolist())).view(*ids.shape, -1)
        mask = ids > 0
        assert torch.allclose(found[mask], (query * vectors).sum(-1)[mask], atol=1e-5)


def test_initial_weights(reference):
    for name, table in [*reference.model.tables.items(), ("positions", reference.model.positions)]:
        assert not table.weight[0].any(), name
    weight = reference.model.tables["item_id"].weight[1:].detach()
    assert float(weight.std()) == pytest.approx(math.sqrt(2 / (401 + 8)), rel=0.1)  # xavier normal


def by_hand(reference, batch):
    """Loss and gradients of a batch, from its logits."""
    model = reference.model.train()
    model.zero_grad()
    positive, negative = model(batch)
    mask = batch.pos_ids > 0
    loss = torch.log1p(torch.exp(-positive[mask])).mean() + torch.log1p(torch.exp(negative[mask])).mean()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return loss.item(), gradients


def test_a_step_is_adam_on_every_row_of_every_table(data, monkeypatch):
    reference = no_dropout(data)
    model = reference.model
    expected = {name: p.detach().clone().double() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    touched = []
    for step in (1, 2):
        batch = reference.next_batch()
        monkeypatch.setattr(reference, "next_batch", lambda batch=batch: batch)
        loss, gradients = by_hand(reference, batch)
        before = model.tables["item_id"].weight.detach().clone()
        times = reference.step()
        monkeypatch.undo()
        assert isinstance(times, StepTimes) and times.loss == pytest.approx(loss, rel=1e-5)
        for name, gradient in gradients.items():
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.98 * second[name] + 0.02 * gradient.double() ** 2
            corrected = (second[name] / (1 - 0.98**step)).sqrt() + 1e-8
            expected[name] -= 1e-3 * first[name] / (1 - 0.9**step) / corrected
        moved = (model.tables["item_id"].weight != before).any(1)
        touched.append((moved, gradients["tables.item_id.weight"].any(1)))
    for name, parameter in model.named_parameters():
        if not name.endswith("key.bias"):  # its gradient is zero but for rounding (softmax), which Adam blows up to a whole step
            assert torch.allclose(parameter.double(), expected[name], atol=2e-6), name
    assert torch.equal(*touched[0]) and not touched[0][0].all()
    moved, with_gradient = touched[1]  # rows of the first step move on without a gradient: Adam is dense
    assert (moved & ~with_gradient).any()
    assert not any(table.weight[0].any() for table in (*model.tables.values(), model.positions))


def test_training_lowers_the_loss(data):
    reference = Reference(data, ReferenceSettings(**SMALL, learning_rate=1e-2))
    losses = [reference.train_epoch() for _ in range(15)]
    assert losses[-1] < losses[0] - 0.4


def test_train_epoch_means_over_targets_and_starts_anew(data, lines, monkeypatch):
    settings = SMALL | {"batch_size": 2}  # so that targets a batch differ much
    reference = Reference(data, ReferenceSettings(**settings, learning_rate=1e-30, dropout_rate=0.0))
    reference.next_batch()  # an epoch that is broken off
    seen, update = [], reference._update
    monkeypatch.setattr(reference, "_update", lambda batch, start: (seen.append(batch), update(batch, start))[1])
    mean = reference.train_epoch()
    assert sum(len(batch.ids) for batch in seen) == len(lines)
    total = sum(by_hand(reference, batch)[0] * int((batch.pos_ids > 0).sum()) for batch in seen)
    assert mean == pytest.approx(total / sum(int((batch.pos_ids > 0).sum()) for batch in seen), rel=1e-5)
    after = [reference.next_batch() for _ in range(15)]
    assert len({user for batch in after for user in batch.ids[batch.kinds == 2].tolist()}) == len(lines)


# ---- queries, files, sizes ----------------------------------------------------------------------------------------------


def test_queries_leave_out_the_last_events(data, lines, tmp_path, reference):
    for drop in (1, 3):
        shorter = []
        for line in lines:
            gone = [id(event) for event in events_of(line)[-drop:]]
            shorter.append([record for record in line if id(record) not in gone])
        other = Reference(copy_of(data, tmp_path / f"drop{drop}", shorter), ReferenceSettings(**SMALL))
        other.model.load_state_dict(reference.model.state_dict())
        numbers = [7, 0, 29, 12, 3, 4, 5, 6, 8, 9]  # more than a batch, in no order
        expected = other.encode_users(numbers, drop_last=0)
        found = reference.encode_users(numbers, drop_last=drop)
        assert found.shape == (10, 8) and found.dtype == np.float32
        assert np.allclose(found, expected, atol=1e-6)
        assert not np.allclose(found, reference.encode_users(numbers, drop_last=0), atol=1e-3)


def test_a_query_is_the_last_token_of_training(data, lines, reference):
    """A user's training row and the query without the last event see the same tokens, where nothing is cut."""
    number = next(k for k, line in enumerate(lines) if 3 < len(events_of(line)) <= LENGTH)
    batch = module.collate([reference.dataset[number]])
    expected = reference.model.eval().encode(batch.ids, batch.kinds, batch.features)[0, -1]
    assert np.allclose(reference.encode_users([number]), expected.detach(), atol=1e-6)


def test_query_rows_of_long_and_empty_histories(lines, reference):
    number = next(k for k, line in enumerate(lines) if len(events_of(line)) > LENGTH + 1)
    row, events = reference.dataset.query_row(number, 1), events_of(lines[number])
    assert row.ids.tolist() == [profile_of(lines[number])[0], *[event[1] for event in events[:-1][-LENGTH:]]]
    empty = reference.dataset.query_row(number, 1000)
    assert empty.kinds.tolist() == [0] * LENGTH + [2]
    assert np.isfinite(reference.encode_users([number], drop_last=1000)).all()
    assert reference.encode_users([]).shape == (0, 8) and reference.encode_items([]).shape == (0, 8)


def test_save_and_load(data, tmp_path):
    first = no_dropout(data)
    first.step()
    first.save(tmp_path / "state.pt")
    assert set(torch.load(tmp_path / "state.pt", weights_only=True)) == {"model", "optimizer"}
    second = no_dropout(data, seed=7)
    second.load(tmp_path / "state.pt")
    batch = first.next_batch()
    losses = [r._update(batch, 0.0).loss for r in (first, second) for _ in range(2)]
    assert losses[:2] == losses[2:]  # the second of each needs the moments too


def test_sizes_of_the_tables(data, reference):
    indexer = load_plain_pickle(data / "indexer.pkl")
    own = table_sizes(indexer, full=False)
    assert (own["item_id"], own["user_id"], own["104"]) == (400, 30, 2)
    assert {name: own[name] for name in ITEM_SINGLE} == {name: max(indexer["f"][name].values()) for name in ITEM_SINGLE}
    assert reference.num_rows == sum(size + 1 for size in own.values())
    full = table_sizes(indexer, full=True)
    assert full.keys() == own.keys() == FULL_SIZES.keys()
    assert all(full[name] == max(own[name], FULL_SIZES[name]) for name in own)
    assert 8.05e6 < sum(full.values()) < 8.2e6 and (full["item_id"], full["121"]) == (4_783_154, 2_135_891)
    assert all(FULL_SIZES[f.id] <= f.cardinality for f in TENCENT_GR.features if f.kind != "embedding")
    assert table_sizes({"u": {"a": 2}, "i": {9: 3}, "f": {"100": {"x": 4}}}, full=False)["100"] == 4


def test_full_tables_are_built_with_the_datas_own_items(data, monkeypatch):
    monkeypatch.setattr(module, "FULL_SIZES", dict.fromkeys(FULL_SIZES, 0) | {"item_id": 1000, "104": 1})
    reference = Reference(data, ReferenceSettings(**SMALL, full_tables=True))
    assert reference.model.tables["item_id"].weight.shape == (1001, 8) and reference.model.tables["104"].num_embeddings == 3
    assert reference.dataset.num_items == 400  # what negatives are drawn from
    assert math.isfinite(reference.step().loss)


# ---- mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_units": 10, "num_heads": 4}, "no multiple of num_heads"),
        ({"batch_size": 0}, "batch_size: 0; expected 1"),
        ({"num_workers": -1}, "num_workers: -1; expected 0"),
        ({"lines": ()}, "one or more numbers from 0 to 29"),
        ({"lines": (3, 30)}, "numbers from 0 to 29"),
        ({"lines": (-1,)}, "numbers from 0 to 29"),
    ],
)
def test_wrong_settings(data, settings, message):
    with pytest.raises(UserError, match=message):
        Reference(data, ReferenceSettings(**(SMALL | settings)))


def test_wrong_data_and_arguments(data, tmp_path, reference):
    with pytest.raises(UserError, match=r"seq.jsonl: no such file.*--layout jsonl"):
        Reference(tmp_path, ReferenceSettings())
    folder = copy_of(data, tmp_path / "d", [[[1, 2, None, {}, 0, 5]]])
    (folder / "creative_emb").unlink()
    with pytest.raises(UserError, match=r"emb_81_32.pkl: no such file"):
        Reference(folder, ReferenceSettings())
    (folder / "creative_emb").symlink_to(data / "creative_emb")
    with pytest.raises(UserError, match=r"line 1: no profile record"):
        Reference(folder, ReferenceSettings(**SMALL)).step()
    with pytest.raises(ValueError, match="drop_last is -1"):
        reference.encode_users([0], drop_last=-1)


def run(script, *arguments):
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_command_line(data, tmp_path):
    small = ["--hidden_units", 8, "--batch_size", 8, "--max_seq_length", LENGTH]
    done = run("reference.py", data, "--steps", 2, *small, "--num_workers", 1)
    assert done.returncode == 0, done.stderr
    for word in ("start", "data", "forward", "backward", "update", "users/s", "peak memory", "30 users, 400 items"):
        assert word in done.stdout
    for arguments, message in (([data, "--steps", 0], "--steps: 0"), ([tmp_path / "none"], "no such file")):
        done = run("reference.py", *arguments)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


# ---- experiments/parity.py ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parity():
    sys.path.insert(0, str(ROOT / "experiments"))
    import parity

    return parity


def shuffled(data, folder, lines):
    """The data with its lines in another order: a user's line is no longer its number."""
    order = np.random.default_rng(5).permutation(len(lines))
    return copy_of(data, folder, [lines[k] for k in order]), order


def test_lines_of_users(data, lines, tmp_path, parity):
    folder, order = shuffled(data, tmp_path / "d", lines)
    store = open_store(folder, tmp_path / "cache", progress=False, log=lambda line: None)
    found = parity.lines_of_users(folder, store)
    assert sorted(found) == list(range(30)) and found[order].tolist() == list(range(30))
    records = json.loads(json.dumps(lines))
    events = [k for k, record in enumerate(records[4]) if record[1] is not None]
    records[4][events[0]][1], records[4][events[-1]][1] = records[4][events[-1]][1], records[4][events[0]][1]
    with pytest.raises(UserError, match="line 5: its events are not in the store's order"):
        parity.lines_of_users(copy_of(data, tmp_path / "other", records), store)
    with pytest.raises(UserError, match="2 users of the store have no line"):
        parity.lines_of_users(copy_of(data, tmp_path / "fewer", lines[:-2]), store)


def test_parity_ranks_the_references_targets_as_by_hand(data, lines, tmp_path, parity, monkeypatch):
    folder, order = shuffled(data, tmp_path / "d", lines)
    args = argparse.Namespace(data=folder, cache=tmp_path / "cache", epochs=1, threads=1, valid_users=0)
    setup = parity.prepare(args)
    splits = make_splits(setup.store, protocol="holdout", holdout_fraction=0.6, target="last", seed=1)
    setup, most, kept = setup._replace(splits=splits), 250, []
    monkeypatch.setattr(parity, "TOP_K", most)
    monkeypatch.setattr(parity, "Reference", lambda *a: kept.append(Reference(*a)) or kept[-1])
    found = parity.run_reference(setup, seed=3)
    (reference,) = kept
    train = {profile_of(lines[order[line]])[0] for line in reference.dataset.lines}
    assert train == set(setup.store.user_ids[setup.splits.train.users].tolist())
    items = reference.encode_items(range(1, 401))
    expected = []
    for user in setup.splits.valid.users:
        number = setup.store.user_ids[user]
        assert number not in train
        (place,) = [k for k, at in enumerate(order) if profile_of(lines[at])[0] == number]
        *history, target = [event[1] for event in events_of(lines[order[place]])]
        scores = items @ reference.encode_users([place])[0]
        scores[np.array(history, dtype=int) - 1] = -np.inf
        rank = 1 + int((scores > scores[target - 1]).sum())
        expected.append(rank if rank <= most and target not in history else 0)
    assert found.ranks == expected and sum(rank > 0 for rank in expected) > 4
    assert found.seconds > 0 and math.isfinite(found.loss)


def test_comparison_by_hand(parity):
    runs = {"ours-1": {"ranks": [1, 0, 2, 0]}, "ours-2": {"ranks": [1, 0, 0, 0]},
            "reference-1": {"ranks": [0, 0, 2, 0]}, "reference-2": {"ranks": [1, 0, 0, 0]}}  # fmt: skip
    found = parity.compare(runs, [1, 2])["ndcg@10"]
    second = 1 / math.log2(3)
    assert found["ours"] == pytest.approx((2 + second) / 8) and found["reference"] == pytest.approx((1 + second) / 8)
    assert found["difference"] == pytest.approx(1 / 8)
    assert found["low"] <= 1 / 8 <= found["high"] <= 1
    assert found["width_share"] == pytest.approx((found["high"] - found["low"]) / found["reference"])
    assert math.isnan(parity.compare({k: {"ranks": [0]} for k in runs}, [1, 2])["hr@10"]["width_share"])


def test_parity_command_goes_on_where_it_stopped(data, tmp_path):
    out = tmp_path / "parity.json"
    options = ["--data", data, "--epochs", 1, "--out", out, "--threads", 1, "--cache", tmp_path / "cache"]
    done = run("experiments/parity.py", *options, "--seeds", 1)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert set(record["runs"]) == {"ours-1", "reference-1"} and record["settings"]["valid_users"] > 0
    assert "95 % interval" in done.stdout and "seed 1" in done.stdout
    record["runs"]["ours-1"]["seconds"] = -5.0  # a mark that a new run would not have
    del record["runs"]["reference-1"]
    out.write_text(json.dumps(record))
    done = run("experiments/parity.py", *options, "--seeds", 1, 2)
    assert done.returncode == 0, done.stderr
    again = json.loads(out.read_text())
    assert set(again["runs"]) == {f"{side}-{seed}" for side in ("ours", "reference") for seed in (1, 2)}
    assert again["runs"]["ours-1"]["seconds"] == -5.0
    assert len(again["runs"]["ours-2"]["ranks"]) == again["settings"]["valid_users"]
    assert again["seeds"] == [1, 2] and set(again["comparison"]) == {"ndcg@10", "hr@10"}
    done = run("experiments/parity.py", *options[:3], 2, *options[4:])
    assert done.returncode == 2 and "made with other settings (epochs" in done.stderr
    done = run("experiments/parity.py", "--data", tmp_path, "--out", out)
    assert done.returncode == 2 and "no seq.jsonl" in done.stderr


def test_the_reference_uses_none_of_our_own_machinery():
    text = Path(module.__file__).read_text()
    for name in ("store", "dataset", "features", "embedding", "layers", "losses", "model", "optim", "retrieval", "trainer"):
        assert f"from {name} import" not in text and f"\nimport {name}" not in text
