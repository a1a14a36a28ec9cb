"""infer.py with what the model is told: user_action_type.json, cold candidates, older checkpoints."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from test_infer import SETTINGS, World, answer, call, known_items, lines_of, pool_of, read_matrix
from test_main import run_main

import infer
from checkpoint import list_checkpoints, load_checkpoint, read_meta, save_checkpoint
from ensemble import read_ensemble, write_ensemble
from errors import UserError
from serve import Answerer, open_served, parse_request
from synthetic import generate

NEW = ("time_fields", "action_conditioning", "action_dropout", "id_init", "id_dropout", "action_head_weight", "wanted_action",
       "cold_candidates", "cold_penalty")  # fmt: skip
USERS, ITEMS, PREDICT = 120, 150, 30


def train(folder, name: str, **groups) -> World:
    settings = {group: keys | groups.get(group, {}) for group, keys in SETTINGS.items()}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    done = run_main("--config", f"{name}.yaml", "--data_path", "A", "--log_path", f"log-{name}", "--checkpoint_path", name, cwd=folder)
    assert done.status == 0, done.err
    return World(folder, folder / name, list_checkpoints(folder / name)[-1], folder / "A-eval", folder / "B-eval")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[str, World]:
    folder = tmp_path_factory.mktemp("signals")
    for name, layout in (("A", "jsonl"), ("B", "parquet")):
        generate(folder / name, USERS, ITEMS, layout, predict=PREDICT, seed=3, max_length=20, mean_length=12)
        (folder / f"{name}-eval" / "user_action_type.json").rename(folder / f"actions-{name}.json")
    told = {"model": {"action_conditioning": "film", "id_dropout": 0.2, "time_fields": ["gap", "day", "fourier"], "id_init": "zero"},
            "loss": {"action_head_weight": 0.1}}  # fmt: skip
    return {"plain": train(folder, "plain"), "told": train(folder, "told", **told)}


def changed(world: World, folder, **values) -> World:
    """The world with a copy of its checkpoint whose settings (by leaf name; None = missing, as before there was that setting) differ."""
    loaded = load_checkpoint(world.model, with_trainer=False)
    meta = {key: value for key, value in loaded.meta.items() if not key.startswith("meta_")}
    for group in meta["config"].values():
        for name in values.keys() & group.keys():
            group[name] = values[name]
            if values[name] is None:
                del group[name]
    state = {"model_state": loaded.model_state, "trainer_state": {}}
    return world._replace(model=save_checkpoint(folder, step=meta["step"], valid_loss=None, meta=meta, **state))


def with_actions(world: World, folder, actions, layout: str = "A") -> World:
    data = folder / "data"
    shutil.copytree(getattr(world, layout), data)
    (data / "user_action_type.json").write_text(actions if isinstance(actions, str) else json.dumps(actions))
    return world._replace(**{layout: data})


def users_of(world: World) -> list[str]:
    return [str(line[0][0]) for line in lines_of(world.A / "predict_seq.jsonl")]


@pytest.mark.parametrize("layout", ["A", "B"])
def test_the_file_of_action_types_is_honoured_user_by_user(worlds, tmp_path, capsys, layout):
    world = worlds["told"]
    users = list(dict.fromkeys(users_of(world)))
    data = getattr(world, layout)
    by_default = {name: answer(world, data, model=changed(world, tmp_path / name, wanted_action=name).model)
                  for name in ("any", "click", "exposure")}  # fmt: skip
    assert by_default["any"] == answer(world, data)
    assert any(by_default["click"][user] != by_default["exposure"][user] for user in users)
    given = {user: (1 if k % 3 == 0 else 0) for k, user in enumerate(users) if k % 3 < 2} | {"a stranger": 2}
    told = with_actions(world, tmp_path, given, layout)
    found = answer(told, getattr(told, layout))
    for k, user in enumerate(users):
        assert found[user] == by_default[("click", "exposure", "any")[k % 3]][user]
    # what is configured serves those whom the file does not name
    found = answer(told, getattr(told, layout), model=changed(told, tmp_path / "again", wanted_action="click").model)
    assert all(found[user] == by_default[("click", "exposure", "click")[k % 3]][user] for k, user in enumerate(users))
    named = sum(user in given for user in users_of(world))
    assert f"names the wanted action of {named} of {len(users_of(world))} users" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["A", "B"])
def test_the_generators_file_is_taken(worlds, capsys, tmp_path, layout):
    world = worlds["told"]
    told = with_actions(world, tmp_path, (world.folder / f"actions-{layout}.json").read_text(), layout)
    assert answer(told, getattr(told, layout)) != answer(world, getattr(world, layout))
    assert f"of {PREDICT} of {PREDICT} users" in capsys.readouterr().out


def test_the_file_is_not_used_by_a_model_that_takes_no_action(worlds, tmp_path, capsys):
    world = worlds["plain"]
    told = with_actions(world, tmp_path, dict.fromkeys(users_of(world), 1))
    assert answer(told, told.A) == answer(world, world.A)
    assert "user_action_type.json: not used" in capsys.readouterr().out


@pytest.mark.parametrize(("content", "message"), [
    ("{", "not readable as JSON"),
    ([1, 0], "expected {user id: action type}, found list"),
    ({"u": 3}, "the action type of user 'u' is '3'; expected 0 .exposure., 1 .click., 2 .conversion."),
    ({"u": True}, "the action type of user 'u' is 'True'"),
    ({"u": "click"}, "the action type of user 'u' is 'click'"),
])  # fmt: skip
def test_a_file_of_something_else_is_refused(tmp_path, content, message):
    (tmp_path / "user_action_type.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=message):
        infer.read_action_types(tmp_path / "user_action_type.json")


def test_the_wanted_action_target_is_any_at_inference(worlds, tmp_path):
    world = changed(worlds["told"], tmp_path, wanted_action="target")
    assert answer(world, world.A, model=world.model) == answer(worlds["told"], world.A)


@pytest.mark.parametrize("names", [("plain", "click"), ("click", "exposure"), ("any", "click")], ids="-".join)
def test_in_an_ensemble_each_model_asks_for_its_own_wanted_action(worlds, tmp_path, capsys, names):
    told = worlds["told"]
    models = {name: changed(told, tmp_path / name, wanted_action=name).model for name in ("any", "click", "exposure")}
    models["plain"] = worlds["plain"].model
    both = write_ensemble(tmp_path / "both", [models[name] for name in names])

    def products(model, world=told):
        """(S, C) scores, from the organisers' files; an ensemble of equal temperatures has the sum of its models'."""
        call(world, world.A, tmp_path / "result", model)
        query, items = (read_matrix(tmp_path / "result" / f"{file}.fbin", np.float32) for file in ("query", "embedding"))
        return query @ items.T

    parts = {name: products(model) for name, model in models.items()}
    assert np.abs(parts["click"] - parts["exposure"]).max() > 0.01
    np.testing.assert_allclose(products(both), parts[names[0]] + parts[names[1]], atol=1e-5)
    # a user whom the file names is asked for that action in all of them
    users = users_of(told)
    named = with_actions(told, tmp_path, {users[0]: 1})
    found = products(both, named)
    expected = sum(parts["plain" if name == "plain" else "click"][0] for name in names)
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    np.testing.assert_allclose(found[1:], (parts[names[0]] + parts[names[1]])[1:], atol=1e-5)
    others = " or ".join(name for name in names if name != "plain")
    assert f"of 1 of {len(users)} users; {others} for the others" in capsys.readouterr().out
    # and --stdin's answers are those
    answerer = Answerer(open_served(read_ensemble(both), told.A, "predict", told.folder / "cache", torch.device("cpu"), lambda _: None))
    expected = answer(told, told.A, model=both)
    for user in users[:5]:
        assert answerer.answer(parse_request(json.dumps({"user": user}), answerer.store.schema, 10))["items"] == expected[user]


@pytest.mark.parametrize("name", ["any", "target", "click"])
def test_a_user_without_events_is_answered(worlds, tmp_path, name):
    world = changed(worlds["told"], tmp_path, wanted_action=name)
    served = open_served(read_ensemble(world.model), world.A, "predict", world.folder / "cache", torch.device("cpu"), lambda _: None)
    assert len(Answerer(served).answer(parse_request('{"events": []}', served.store.schema, 10))["items"]) == 10


@pytest.mark.parametrize("name", ["plain", "told"])
def test_cold_candidates(worlds, tmp_path, name):
    world = worlds[name]
    known, pool = known_items(world.A), pool_of(world.A)
    cold = set(pool) - set(known)
    ranked = answer(world, world.A)
    assert any(set(top10) & cold for top10 in ranked.values())  # there is something to leave out
    drop = changed(world, tmp_path / "drop", cold_candidates="drop")
    dropped = answer(drop, drop.A, tmp_path / "result", model=drop.model)
    assert all(len(top10) == 10 and not set(top10) & cold for top10 in dropped.values())
    penalty = changed(world, tmp_path / "penalty", cold_candidates="penalty", cold_penalty=5.0)  # above any difference of cosines
    assert answer(penalty, penalty.A, model=penalty.model) == dropped
    nothing = changed(world, tmp_path / "nothing", cold_candidates="penalty", cold_penalty=0.0)
    assert answer(nothing, nothing.A, model=nothing.model) == ranked
    # the organisers' files hold what was ranked
    count, width = np.fromfile(tmp_path / "result" / "embedding.fbin", np.uint32, 2)
    num_queries, query_width = np.fromfile(tmp_path / "result" / "query.fbin", np.uint32, 2)
    ids = json.loads((tmp_path / "result" / "retrive_id2creative_id.json").read_text())
    assert len(ids) == count <= len(pool) - len(cold) and not set(ids.values()) & cold
    assert width == query_width and num_queries == len(users_of(world))


def test_the_organisers_files_rank_with_the_penalty(worlds, tmp_path):
    world = changed(worlds["told"], tmp_path, cold_candidates="penalty", cold_penalty=0.2)
    top10s, _ = call(world, world.A, tmp_path / "result", model=world.model)
    vectors, queries = (np.fromfile(tmp_path / "result" / f"{name}.fbin", np.float32, offset=8) for name in ("embedding", "query"))
    width = int(np.fromfile(tmp_path / "result" / "query.fbin", np.uint32, 2)[1])
    scores = queries.reshape(-1, width) @ vectors.reshape(-1, width).T
    retrieval = np.fromfile(tmp_path / "result" / "id.u64bin", np.uint64, offset=8)
    creative = json.loads((tmp_path / "result" / "retrive_id2creative_id.json").read_text())
    place = {creative[str(r)]: k for k, r in enumerate(retrieval.tolist())}
    for row, top10 in zip(scores, top10s):
        found = row[[place[c] for c in top10]]
        assert (np.diff(found) <= 1e-5).all()


def test_known_items_without_training_events_are_cold_with_id_dropout(worlds):
    trained = torch.load(worlds["told"].model / "model.pt", weights_only=True)["trained_items"]
    assert 0 < int(trained.sum()) < len(trained) - 1
    assert "trained_items" not in torch.load(worlds["plain"].model / "model.pt", weights_only=True)


def test_a_checkpoint_from_before_these_settings(worlds, tmp_path):
    world = worlds["plain"]
    older = changed(world, tmp_path, **dict.fromkeys(NEW))
    there = [name for group in read_meta(older.model)["config"].values() for name in group]
    assert len(there) > 50 and not set(there) & set(NEW)
    assert answer(older, older.A, model=older.model) == answer(world, world.A)


@pytest.mark.parametrize(("flags", "key"), [((), "any"), (("--wanted_action", "target"), "target")])
def test_evaluation_of_a_checkpoint_with_head_and_conditioning(worlds, flags, key):
    """model and head come from the checkpoint; what is asked for is the caller's."""
    world = worlds["told"]
    base = ("--inference_only", "--state_dict_path", world.model, "--data_path", "A", "--cache_path", world.folder / "cache")
    folder = world.folder / f"eval-{key}"
    done = run_main(*base, "--log_path", folder, *flags, cwd=world.folder)
    assert done.status == 0, done.err
    (metrics,) = [json.loads(path.read_text()) for path in folder.rglob("metrics.json")]
    assert metrics["wanted_action"] == key and 0 <= metrics["hr@10"] <= 1


def test_a_contradicting_head_is_refused(worlds):
    world = worlds["told"]
    done = run_main("--inference_only", "--state_dict_path", world.model, "--data_path", "A", "--action_head_weight", 0, cwd=world.folder)
    assert done.status == 2 and "action_head_weight is 0.0 (flag" in done.err


def test_a_new_run_starts_from_the_weights(worlds):
    world = worlds["told"]
    places = ("--data_path", "A", "--log_path", "again", "--checkpoint_path", "again-ckpt")
    done = run_main("--config", "told.yaml", "--state_dict_path", world.model, *places, "--max_steps", 1, cwd=world.folder)
    assert done.status == 0, done.err
