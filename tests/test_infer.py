"""infer.py: the competition's contract in both layouts, from a checkpoint's folder and EVAL_DATA_PATH alone."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
from test_main import Result, assert_mistake, run_main, train_small

import infer
from checkpoint import list_checkpoints
from errors import UserError
from multimodal import find_embedding
from schema import TENCENT_GR
from synthetic import generate

ROOT = Path(__file__).resolve().parents[1]
USERS, ITEMS, PREDICT = 120, 150, 40
SETTINGS = {"model": {"hidden_units": 16, "num_blocks": 1, "max_seq_length": 20, "dropout_rate": 0.0},
            "training": {"num_epochs": 4, "batch_size": 32, "learning_rate": 0.01},
            "loss": {"num_negatives": 64}, "system": {"tensorboard": False}, "eval": {"baselines": False}}  # fmt: skip


class World(NamedTuple):
    """checkpoints: a run's; model: its newest checkpoint; A, B: EVAL_DATA_PATH in either layout. The training data is gone."""

    folder: Path
    checkpoints: Path
    model: Path
    A: Path
    B: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("infer")
    for name, layout in (("A", "jsonl"), ("B", "parquet")):
        generate(folder / name, USERS, ITEMS, layout, predict=PREDICT, seed=3, max_length=20, mean_length=12)
    train_small(folder, SETTINGS, "A")
    shutil.rmtree(folder / "A")
    shutil.rmtree(folder / "B")
    (model,) = list_checkpoints(folder / "ckpt")[-1:]
    return World(folder, folder / "ckpt", model, folder / "A-eval", folder / "B-eval")


def variables(world: World, data: Path, result: Path | None = None, model: Path | None = None) -> dict:
    names = {"MODEL_OUTPUT_PATH": model or world.model, "EVAL_DATA_PATH": data, "USER_CACHE_PATH": world.folder / "cache"}
    return {name: str(path) for name, path in (names | ({"EVAL_RESULT_PATH": result} if result else {})).items()}


def answer(world: World, data: Path, result: Path | None = None, model: Path | None = None) -> dict:
    """{raw user id: the answers of that user, in order} of infer(); the users' order is checked by a test of its own."""
    top10s, users = call(world, data, result, model)
    answers: dict = {}
    for user, top10 in zip(users, top10s, strict=True):
        assert answers.setdefault(user, top10) == top10  # a repeated user gets the same answer
    return answers


def call(world: World, data: Path, result: Path | None = None, model: Path | None = None) -> tuple[list, list]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("EVAL_", "MODEL_", "USER_CACHE"))}
    with mock.patch.dict(os.environ, clean | variables(world, data, result, model), clear=True):
        return infer.infer()


def run_infer(*flags: object, cwd: Path, **environ: str) -> Result:
    return run_main(*flags, cwd=cwd, entry=infer, environ={"MODEL_OUTPUT_PATH": "", "EVAL_DATA_PATH": "", "EVAL_RESULT_PATH": ""} | environ)


# ---- what the files say, read without the code under test ----


def lines_of(path: Path) -> Iterator[dict]:
    return map(json.loads, path.read_text().splitlines())


def known_items(data: Path) -> dict:
    """{creative id: item number} of the items known in training."""
    return pickle.loads((data / "indexer.pkl").read_bytes())["i"]


def pool_of(data: Path) -> dict:
    """{creative id: retrieval id} of the candidates."""
    return {row["creative_id"]: row["retrieval_id"] for row in lines_of(data / "predict_set.jsonl")}


def seen_by(data: Path) -> dict:
    """{raw user id: creative ids of all events, oldest first}; unknown items carry their creative id."""
    known = {number: creative for creative, number in known_items(data).items()}
    return {str(line[0][0]): [known.get(r[1], r[1]) for r in line if r[1] is not None] for line in lines_of(data / "predict_seq.jsonl")}


def read_matrix(path: Path, dtype: type) -> np.ndarray:
    data = path.read_bytes()
    count, width = np.frombuffer(data[:8], dtype=np.uint32)
    return np.frombuffer(data[8:], dtype=dtype).reshape(count, width)


def with_users(world: World, folder: Path, lines: list[list]) -> Path:
    """A copy of layout A's data with other users: folder/data."""
    data = folder / "data"
    shutil.copytree(world.A, data)
    (data / "predict_seq_offsets.pkl").unlink()
    (data / "predict_seq.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return data


def user_line(name: object, items: list, user_features: dict | None = None, item_features: dict | None = None) -> list[list]:
    events = [[name, item, None, item_features or {}, k % 2, 1_718_000_000 + 60 * k] for k, item in enumerate(items)]
    return [*events, [name, None, user_features or {}, None, None, 1_718_000_000]]


# ---- the contract ----


def test_every_user_gets_ten_unseen_candidates_in_the_files_order(world):
    seen, pool = seen_by(world.A), pool_of(world.A)
    top10s, users = call(world, world.A)
    assert users == list(seen) and len(top10s) == len(users) == PREDICT
    known = known_items(world.A)
    assert any(creative not in known for items in seen.values() for creative in items)  # unknown items do occur
    for user, top10 in zip(users, top10s, strict=True):
        assert len(top10) == len(set(top10)) == 10 and set(top10) <= set(pool) and not set(top10) & set(seen[user])
        assert all(type(creative) is int for creative in top10)
    assert len({tuple(top10) for top10 in top10s}) > PREDICT // 2  # it is the users that are answered
    assert json.dumps(top10s) and all(type(user) is str for user in users)


def test_unknown_items_of_the_user_are_not_answered(world):
    seen, pool = seen_by(world.A), pool_of(world.A)
    known = known_items(world.A)
    cold = [creative for creative in pool if creative not in known]
    both = [(user, c) for user, items in seen.items() for c in items if c in cold]
    assert len(cold) > 3
    answers = answer(world, world.A)
    assert not any(creative in answers[user] for user, creative in both)


def test_a_cold_candidate_is_answered_unless_it_was_seen(world, tmp_path):
    known = known_items(world.A)
    cold = [creative for creative in pool_of(world.A) if creative not in known]
    data = with_users(world, tmp_path, [user_line("all", cold), user_line("none", [1, 2])])
    # Ten candidates, all cold: who saw them gets them still, as there are no others; who did not gets them too.
    rows = [row for row in lines_of(data / "predict_set.jsonl") if row["creative_id"] in cold[:10]]
    extra = [row for row in lines_of(data / "predict_set.jsonl") if row["creative_id"] in known][:2]
    (data / "predict_set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + extra))
    answers = answer(world, data)
    assert set(answers["all"][:2]) == {row["creative_id"] for row in extra} and set(answers["all"][2:]) <= set(cold)
    assert len(answers["none"]) == 10 and set(answers["none"]) & set(cold)


def test_both_layouts_give_equal_answers(world):
    top10s, users = call(world, world.A)
    assert call(world, world.B) == (top10s, users)


def test_the_answers_are_those_of_the_baselines_files(world, tmp_path):
    top10s, users = call(world, world.A, tmp_path / "new/result")
    folder = tmp_path / "new/result"
    pool, seen = pool_of(world.A), seen_by(world.A)
    embedding, query = read_matrix(folder / "embedding.fbin", np.float32), read_matrix(folder / "query.fbin", np.float32)
    ids = read_matrix(folder / "id.u64bin", np.uint64)
    assert embedding.shape == (len(pool), 16) and query.shape == (PREDICT, 16) and ids.shape == (len(pool), 1)
    assert np.allclose(np.linalg.norm(embedding, axis=1), 1, atol=1e-5) and np.isfinite(query).all()
    assert sorted(ids[:, 0].tolist()) == sorted(pool.values())
    creative_of = {
        int(retrieval): creative for retrieval, creative in json.loads((folder / "retrive_id2creative_id.json").read_text()).items()
    }
    assert creative_of == {retrieval: creative for creative, retrieval in pool.items()}
    creatives = [creative_of[i] for i in ids[:, 0].tolist()]
    scores = query @ embedding.T
    for user, row, top10 in zip(users, scores, top10s, strict=True):
        unseen = sorted((s for s, creative in zip(row.tolist(), creatives, strict=True) if creative not in seen[user]), reverse=True)
        own = [float(row[creatives.index(creative)]) for creative in top10]
        assert own == pytest.approx(unseen[:10], abs=1e-5)


def test_result_json_from_the_checkpoint_alone(world, tmp_path):
    """A folder of scripts without config.yaml, an empty working folder, a checkpoint that was moved away."""
    scripts, cwd = tmp_path / "scripts", tmp_path / "empty"
    scripts.mkdir()
    cwd.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, scripts)
    model = shutil.copytree(world.model, tmp_path / "picked" / world.model.name)
    environ = {name: value for name, value in os.environ.items() if name != "USER_CACHE_PATH"} | {"OMP_NUM_THREADS": "1"}
    environ |= {"MODEL_OUTPUT_PATH": str(model), "EVAL_DATA_PATH": str(world.A), "EVAL_RESULT_PATH": str(tmp_path / "result")}
    done = subprocess.run([sys.executable, scripts / "infer.py", "--output", "out/result.json"], cwd=cwd, env=environ, capture_output=True,
                          text=True, check=False, timeout=120)  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    result = json.loads((cwd / "out/result.json").read_text())
    top10s, users = call(world, world.A)
    assert set(result) == {"time", "top10s", "user"} and result["time"] > 0
    assert result["top10s"] == top10s and result["user"] == users
    assert [path.name for path in cwd.iterdir()] == ["out"]  # nothing else beside it: the cache is with the results


def test_result_json_lies_with_the_results(world, tmp_path):
    done = run_infer(cwd=tmp_path, **variables(world, world.A, tmp_path / "result"))
    assert done.status == 0 and f"{PREDICT} users answered" in done.out
    assert len(json.loads((tmp_path / "result/result.json").read_text())["top10s"]) == PREDICT


@pytest.mark.parametrize("name", ["best_model.pt", "checkpoint_epoch_4.pt", "."])
def test_links_and_the_folder_of_checkpoints_are_accepted(world, name):
    path = world.checkpoints / name
    if name == ".":  # several checkpoints: the best
        path, name = world.checkpoints, "best_model.pt"
    target = next(f for f in list_checkpoints(world.checkpoints) if os.path.samefile(f / "model.pt", world.checkpoints / name))
    assert call(world, world.A, model=path) == call(world, world.A, model=target)
    assert call(world, world.A, model=target / "model.pt") == call(world, world.A, model=target)


def test_a_folder_that_holds_one_checkpoint_is_accepted(world, tmp_path):
    shutil.copytree(world.model, tmp_path / "picked" / world.model.name)
    assert call(world, world.A, model=tmp_path / "picked") == call(world, world.A)


# ---- users of every sort ----


def test_the_last_event_counts(world, tmp_path):
    pool = pool_of(world.A)
    known = known_items(world.A)
    outside = [number for creative, number in known.items() if creative not in pool]  # their removal changes no answer
    history = outside[:6]
    data = with_users(world, tmp_path, [user_line("short", history), *(user_line(f"u{k}", [*history, k]) for k in outside[6:16])])
    result = tmp_path / "result"
    answers = answer(world, data, result)
    queries = read_matrix(result / "query.fbin", np.float32)
    distances = np.linalg.norm(queries[:, None] - queries[None], axis=2)[np.triu_indices(len(queries), 1)]
    assert distances.min() > 1e-3
    assert len(set(map(tuple, answers.values()))) > 5


def test_odd_users_are_answered(world, tmp_path):
    known = pickle.loads((world.A / "indexer.pkl").read_bytes())
    pool = pool_of(world.A)
    strings = {f.id: f"unseen_{f.id}" for f in TENCENT_GR.select("user", "single")}
    lists = {f.id: ["unseen", 1] for f in TENCENT_GR.select("user", "multi")}
    item_strings = {f.id: f"unseen_{f.id}" for f in TENCENT_GR.select("item", "single")}
    name = next(iter(known["u"]))
    lines = [
        user_line("nothing", []),
        user_line("one", [5]),
        user_line("unknown", [10**17 + k for k in range(5)], item_features=item_strings),
        user_line("text", ["abc", "def", str(10**17)]),
        user_line(name, [1, 2, 3]),
        user_line("strings", [1, 2, 3], strings | lists),
        user_line("long", [1 + k % ITEMS for k in range(300)]),
        user_line(name, [1, 2, 3]),
        user_line(17, [4, 5]),
    ]
    data = with_users(world, tmp_path, lines)
    top10s, users = call(world, data)
    assert users == [*(line[0][0] for line in lines[:-1]), "user_00000017"]  # a number known in training: the raw id behind it
    for top10 in top10s:
        assert len(set(top10)) == 10 and set(top10) <= set(pool)
    assert top10s[4] == top10s[7]
    assert top10s[0] != top10s[1]


def test_a_users_answer_does_not_depend_on_the_others(world, tmp_path):
    lines = [json.loads(line) for line in (world.A / "predict_seq.jsonl").read_text().splitlines()]
    alone = with_users(world, tmp_path, lines[7:8])
    assert answer(world, alone) == {lines[7][0][0]: answer(world, world.A)[lines[7][0][0]]}


@pytest.mark.parametrize("left", [0, 3, 9, 10])
def test_who_saw_nearly_all_candidates_still_gets_ten(world, tmp_path, left):
    known = known_items(world.A)
    creatives = list(pool_of(world.A))
    unseen = creatives[:left]
    data = with_users(world, tmp_path, [user_line("all", [known.get(c, c) for c in creatives[left:]])])
    (top10,) = answer(world, data).values()
    assert len(set(top10)) == 10 and set(top10) <= set(creatives)
    assert set(top10[:left]) == set(unseen)  # what was not seen comes first


def test_fewer_than_ten_candidates(world, tmp_path):
    data = with_users(world, tmp_path, [user_line("one", [5]), user_line("nothing", [])])
    rows = (data / "predict_set.jsonl").read_text().splitlines(keepends=True)[:4]
    (data / "predict_set.jsonl").write_text("".join(rows))
    for top10 in answer(world, data, tmp_path / "result").values():
        assert set(top10) == {json.loads(row)["creative_id"] for row in rows} and len(top10) == 4


def test_creative_ids_may_be_text(world, tmp_path):
    data = with_users(world, tmp_path, [user_line("one", [5])])
    rows = [row | {"creative_id": f"ad-{k}" if k % 2 else row["creative_id"]} for k, row in enumerate(lines_of(data / "predict_set.jsonl"))]
    (data / "predict_set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (top10,) = answer(world, data, tmp_path / "result").values()
    assert len(set(top10)) == 10 and set(top10) <= {row["creative_id"] for row in rows} and {type(c) for c in top10} == {int, str}
    names = json.loads((tmp_path / "result/retrive_id2creative_id.json").read_text())
    assert names == {str(row["retrieval_id"]): row["creative_id"] for row in rows}


def test_one_creative_id_of_text_leaves_the_others_numbers(world, tmp_path):
    lines = [json.loads(line) for line in (world.A / "predict_seq.jsonl").read_text().splitlines()]
    answers = answer(world, with_users(world, tmp_path, [*lines, user_line("text", ["not-a-number"])]))
    assert all(type(creative) is int for creative in answers.pop("text"))
    assert answers == answer(world, world.A)


def test_no_users_at_all_is_a_mistake(world, tmp_path):
    data = with_users(world, tmp_path, [])
    assert_mistake(run_infer(cwd=tmp_path, **variables(world, data)), "predict_seq.jsonl", "holds no user")


@pytest.mark.parametrize("settings", [
    {"user_id": True, "position": "learned", "activation": "swiglu", "norm_first": False, "name": "bce", "num_negatives": 1,
     "similarity": "dot"},
    {"item_tower": "sum", "time_features": False, "action_embedding": False, "multimodal_features": "none", "remove_seen": False},
    {"embedding_dim": 8, "item_activation": "relu", "candidate_activation": True, "max_seq_length": 3, "num_workers": 0},
], ids=lambda settings: next(iter(settings)))  # fmt: skip
def test_models_of_other_settings(world, tmp_path, settings):
    generate(tmp_path / "A", USERS, ITEMS, "jsonl", seed=3, max_length=20, mean_length=12)
    flags = [word for key, value in settings.items() for word in (f"--{key}", value)]
    done = run_main(
        "--config", world.folder / "small.yaml", "--data_path", "A", "--checkpoint_path", "ckpt", "--max_steps", 4, *flags, cwd=tmp_path
    )
    assert done.status == 0, done.err
    seen, pool = seen_by(world.A), pool_of(world.A)
    answers = answer(world, world.A, model=tmp_path / "ckpt/best_model.pt")
    assert list(answers) == list(seen)
    for user, top10 in answers.items():
        assert len(set(top10)) == 10 and set(top10) <= set(pool)
        assert not set(top10) & set(seen[user])  # also where training's evaluation kept what was seen


# ---- mistakes ----


@pytest.mark.parametrize("name,value,words", [
    ("MODEL_OUTPUT_PATH", "", ("MODEL_OUTPUT_PATH is not set",)),
    ("EVAL_DATA_PATH", "", ("EVAL_DATA_PATH is not set",)),
    ("MODEL_OUTPUT_PATH", "/nowhere/model", ("MODEL_OUTPUT_PATH", "/nowhere/model")),
    ("EVAL_DATA_PATH", "/nowhere/data", ("EVAL_DATA_PATH", "/nowhere/data")),
    ("MODEL_OUTPUT_PATH", "EMPTY", ("MODEL_OUTPUT_PATH", "found 0 folders")),
    ("EVAL_DATA_PATH", "EMPTY", ("predict_seq.jsonl", "an empty folder")),
], ids=str)  # fmt: skip
def test_a_missing_variable_or_folder(world, tmp_path, name, value, words):
    (tmp_path / "empty").mkdir()
    value = str(tmp_path / "empty") if value == "EMPTY" else value
    assert_mistake(run_infer(cwd=tmp_path, **variables(world, world.A) | {name: value}), *words)


@pytest.mark.parametrize("missing,words", [
    ("predict_seq.jsonl", ("predict_seq.jsonl",)), ("predict_set.jsonl", ("no candidates", "predict_set.jsonl")),
    ("indexer.pkl", ("indexer.pkl", "missing")), ("creative_emb", ("81", "creative_emb/")),
])  # fmt: skip
def test_a_missing_file(world, tmp_path, missing, words):
    data = shutil.copytree(world.A, tmp_path / "data")
    shutil.rmtree(data / missing) if (data / missing).is_dir() else (data / missing).unlink()
    assert_mistake(run_infer(cwd=tmp_path, **variables(world, data)), *words)


def test_no_candidate_in_the_file(world, tmp_path):
    data = shutil.copytree(world.A, tmp_path / "data")
    (data / "predict_set.jsonl").write_text("")
    assert_mistake(run_infer(cwd=tmp_path, **variables(world, data)), "holds no candidate")


def test_the_indexer_of_another_data_set(world, tmp_path):
    generate(tmp_path / "data", USERS, ITEMS + 1, "jsonl", predict=5, max_length=20, mean_length=12)
    assert_mistake(run_infer(cwd=tmp_path, **variables(world, tmp_path / "data-eval")), "151 items", "trained on 150")


def test_a_schema_of_another_data_set(world, tmp_path):
    data = shutil.copytree(world.A, tmp_path / "data")
    tree = TENCENT_GR.to_dict()
    tree["features"] = [row for row in tree["features"] if row["id"] != "100"]
    (data / "schema.json").write_text(json.dumps(tree))
    assert_mistake(run_infer(cwd=tmp_path, **variables(world, data)), "schema")


def test_a_damaged_checkpoint_and_bare_weights(world, tmp_path):
    model = shutil.copytree(world.model, tmp_path / world.model.name)
    data = bytearray((model / "model.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (model / "model.pt").write_bytes(data)
    assert_mistake(run_infer(cwd=tmp_path, **variables(world, world.A, model=model)), "model.pt", "damaged")
    (tmp_path / "bare").mkdir()
    weights = shutil.copy(world.model / "model.pt", tmp_path / "bare/weights.pt")
    assert_mistake(run_infer(cwd=tmp_path, **variables(world, world.A, model=weights)), "weights.pt", "bare state_dict", "meta.json")


def test_a_bad_line_names_its_place(world, tmp_path):
    data = with_users(world, tmp_path, [user_line("one", [5])])
    with open(data / "predict_seq.jsonl", "a") as file:
        file.write('[["two", 5, null, {}')
    assert_mistake(run_infer(cwd=tmp_path, **variables(world, data)), "predict_seq.jsonl:2")


def test_an_unknown_flag_is_status_2(world, tmp_path):
    assert run_infer("--outptu", "x", cwd=tmp_path, **variables(world, world.A)).status == 2


def test_infer_raises_for_its_caller(world, tmp_path):
    with chdir(tmp_path), pytest.raises(UserError, match="no such file or folder"):
        call(world, tmp_path / "nowhere")


def test_the_data_have_what_these_tests_need(world):
    assert find_embedding(world.A, TENCENT_GR["81"]) and find_embedding(world.B, TENCENT_GR["81"])
    assert len(list_checkpoints(world.checkpoints)) > 1
