"""ensemble.py and combine.py: rankings against brute force, folders, means of checkpoints, main.py and infer.py on them, mistakes."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from test_infer import call, read_matrix, seen_by
from test_main import assert_mistake, run_main
from test_trainer import make_trainer

import combine
from checkpoint import find_checkpoint, list_checkpoints, load_checkpoint
from ensemble import EnsembleRanker, Member, average_checkpoints, read_ensemble, write_ensemble
from errors import UserError
from synthetic import generate

CPU = torch.device("cpu")
FIRST = {"num_epochs": 2}
SECOND = {"num_epochs": 1, "hidden_units": 8, "name": "bce", "num_negatives": 1, "similarity": "dot", "max_seq_length": 3, "seed": 7}


class Trained(NamedTuple):
    trainers: tuple  # of other settings each, on the same data
    paths: tuple


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp("ensemble")
    trainers = make_trainer(folder / "a", **FIRST), make_trainer(folder / "b", embeddings=(), **SECOND)
    paths = []
    for trainer, name in zip(trainers, "ab"):
        trainer.fit()
        paths.append(list_checkpoints(folder / name)[-1])
        trainer.model.load_state_dict(load_checkpoint(paths[-1], with_trainer=False).model_state)
    return Trained(trainers, tuple(paths))


def scores_of(ranker, split):
    """All scores (S, C) in float64, of vectors that the ranker's own methods give."""
    candidates = ranker.encode_candidates().double()
    scores = torch.zeros(split.num_samples, len(candidates), dtype=torch.float64)
    for samples, query in ranker.encode_users(split):
        scores[torch.from_numpy(samples)] = query.double() @ candidates.T
    return scores


def best(scores, trainer, split, k, remove_seen):
    """Ids of the k best of (S, C) by brute force, seen items removed."""
    ids = trainer._ranker().candidate_ids
    for row, (begin, end) in enumerate(zip(split.begin, split.end)):
        if remove_seen:
            scores[row, np.isin(ids, trainer.store.item_ids[begin:end])] = -torch.inf
    return ids[scores.topk(k, dim=1).indices.numpy()]


@pytest.mark.parametrize("scores", ["softmax", "zscore"])
def test_an_ensemble_of_one_is_the_model(trained, scores):
    for trainer in trained.trainers:
        split, own = trainer.splits.test, trainer._ranker()
        one = EnsembleRanker([trainer._ranker()], [3.0], scores)
        a, b = (r.rank(split, 10, True, keep_queries=True) for r in (own, one))
        assert np.array_equal(a.topk_ids, b.topk_ids) and np.array_equal(a.topk_scores, b.topk_scores)
        assert np.array_equal(a.queries, b.queries) and a.loss == b.loss


@pytest.mark.parametrize("remove_seen", [True, False])
@pytest.mark.parametrize("scores", ["softmax", "zscore"])
def test_two_models_against_brute_force(trained, scores, remove_seen):
    first, second = trained.trainers
    split, weights = first.splits.test, [1.0, 2.0]
    found = EnsembleRanker([first._ranker(), second._ranker()], weights, scores).rank(split, 10, remove_seen)
    temperatures = first.config.loss.temperature, 1.0  # bce has none
    parts = [scores_of(t._ranker(), split) for t in trained.trainers]
    if scores == "softmax":
        combined = sum(w * (s / t).log_softmax(1) for w, s, t in zip(weights, parts, temperatures))
    else:
        combined = sum(w * (s - s.mean(1, keepdim=True)) / s.std(1, correction=0, keepdim=True) for w, s in zip(weights, parts))
    assert np.array_equal(found.topk_ids, best(combined, first, split, 10, remove_seen))
    alone = best(parts[0], first, split, 10, remove_seen)
    assert (found.topk_ids != alone).any()  # the second model does count


def test_of_two_equal_models_the_ranking_and_the_loss_are_the_models(trained):
    trainer = trained.trainers[0]
    one = trainer._ranker().rank(trainer.splits.test, 10, True)
    two = EnsembleRanker([trainer._ranker(), trainer._ranker()], [1.0, 1.0], "softmax").rank(trainer.splits.test, 10, True)
    assert np.array_equal(one.topk_ids, two.topk_ids) and two.loss == pytest.approx(one.loss, rel=1e-5)


def test_a_folder_holds_what_it_needs(trained, tmp_path):
    (tmp_path / "x" / ".tmp-out-99999999").mkdir(parents=True)  # of a process that was killed
    out = write_ensemble(tmp_path / "x" / "out", trained.paths, [1.0, 2.0], "zscore")
    assert os.listdir(tmp_path / "x") == ["out"]
    assert sorted(path.name for path in out.iterdir()) == ["ensemble.json", "member0", "member1"]
    assert os.path.samefile(out / "member0/model.pt", trained.paths[0] / "model.pt") and os.listdir(out.parent) == ["out"]
    for path in (out, out / "ensemble.json"):
        found = read_ensemble(path)
        assert found.path == out and found.scores == "zscore" and [member.weight for member in found.members] == [1.0, 2.0]
        assert [member.config.model.hidden_units for member in found.members] == [16, 8]
    one = read_ensemble(trained.paths[0] / "model.pt")
    assert len(one.members) == 1 and one.path == trained.paths[0]
    moved = tmp_path / "moved"
    shutil.copytree(out, moved)
    shutil.rmtree(out)
    first, second = trained.trainers
    ensemble = read_ensemble(moved)
    options = {"batch_size": 16, "num_workers": 1}
    ranker = ensemble.ranker([member.ranker(first.store, first.candidates, CPU, **options) for member in ensemble.members])
    wanted = EnsembleRanker([first._ranker(), second._ranker()], [1.0, 2.0], "zscore").rank(first.splits.test, 10, True)
    assert np.array_equal(ranker.rank(first.splits.test, 10, True).topk_ids, wanted.topk_ids)


def test_the_mean_of_checkpoints(trained, tmp_path):
    folder = trained.paths[0].parent
    paths = list_checkpoints(folder)
    assert len(paths) == 2
    path = average_checkpoints(tmp_path / "mean", paths)
    mean, states = load_checkpoint(path, with_trainer=False), [load_checkpoint(p, with_trainer=False).model_state for p in paths]
    for name, value in mean.model_state.items():
        torch.testing.assert_close(value, torch.stack([state[name] for state in states]).mean(0))
    assert mean.meta["step"] == 10 and mean.meta["averaged"] == [str(p) for p in paths] and mean.meta["metrics"] == {}
    assert find_checkpoint(tmp_path / "mean/best_model.pt") == path
    trainer = trained.trainers[0]
    ranker = Member(mean).ranker(trainer.store, trainer.candidates, CPU, batch_size=16)
    assert len(ranker.rank(trainer.splits.test, 10, True).topk_ids) == 40
    with pytest.raises(UserError, match="mean of checkpoints, without an optimiser's state"):
        make_trainer(tmp_path / "resumed", resume_from=path, **FIRST).fit()


def test_models_that_differ_have_no_mean(trained, tmp_path):
    with pytest.raises(UserError) as error:
        average_checkpoints(tmp_path / "mean", trained.paths)
    for words in ("hidden_units: 16 in", "8 in", "similarity: cosine in", "max_seq_length", "layout: not the same", "embeddings"):
        assert words in str(error.value)
    assert not (tmp_path / "mean").exists()


def changed_member(path: Path, **changes) -> SimpleNamespace:
    checkpoint = load_checkpoint(path, with_trainer=False)
    return checkpoint._replace(meta=checkpoint.meta | changes.pop("meta", {}), **changes)


def test_shapes_that_differ_are_named(trained, tmp_path, monkeypatch):
    import ensemble

    other = changed_member(trained.paths[0])
    other = other._replace(model_state=other.model_state | {"user_token": torch.zeros(5)})
    found = iter([load_checkpoint(trained.paths[0], with_trainer=False), other])
    monkeypatch.setattr(ensemble, "load_checkpoint", lambda *_, **__: next(found))
    with pytest.raises(UserError, match=r"user_token: \(16,\) float32 in .*, \(5,\) float32 in"):
        average_checkpoints(tmp_path / "mean", [trained.paths[0]] * 2)


@pytest.mark.parametrize("meta,words", [({"num_items": 31}, "31 items"), ({"item_ids": "x"}, "or on others"),
                                        ({"schema": {"has_time": False, "features": []}}, "other features")])  # fmt: skip
def test_members_of_other_data_are_refused(trained, tmp_path, monkeypatch, meta, words):
    import ensemble

    found = iter([load_checkpoint(trained.paths[0], with_trainer=False), changed_member(trained.paths[1], meta=meta)])
    monkeypatch.setattr(ensemble, "load_checkpoint", lambda *_, **__: next(found))
    with pytest.raises(UserError, match=words):
        write_ensemble(tmp_path / "out", trained.paths)


def test_wrong_weights_folders_and_files(trained, tmp_path):
    for weights in ([1.0], [1.0, 0.0]):
        with pytest.raises(UserError, match="expected 2 numbers above 0"):
            write_ensemble(tmp_path / "out", trained.paths, weights)
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").touch()
    for make in (write_ensemble, average_checkpoints):
        with pytest.raises(UserError, match="not an empty folder"):
            make(tmp_path / "used", trained.paths[:1])
    out = write_ensemble(tmp_path / "out", trained.paths)
    text = json.loads((out / "ensemble.json").read_text())
    for broken in ("{", "[]", json.dumps(text | {"scores": "mean"}), json.dumps(text | {"members": []}),
                   json.dumps(text | {"members": [{"member": "../x", "weight": 1}]})):  # fmt: skip
        (out / "ensemble.json").write_text(broken)
        with pytest.raises(UserError, match="not what combine.py writes"):
            read_ensemble(out)
    (out / "ensemble.json").write_text(json.dumps(text))
    (out / "member1/model.pt").unlink()
    with pytest.raises(UserError, match="member1/model.pt: missing"):
        read_ensemble(out)


# ---- the commands ----


class World(NamedTuple):
    """Two models of one split, one of another, on data with and without vectors; all in `folder`."""

    folder: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("combine")
    generate(folder / "data", 120, 150, "jsonl", predict=20, seed=3, max_length=20, mean_length=12)
    base = {"model": {"hidden_units": 16, "num_blocks": 1, "max_seq_length": 20}, "eval": {"baselines": False},
            "training": {"num_epochs": 2, "batch_size": 32}, "system": {"tensorboard": False}, "loss": {"num_negatives": 32}}  # fmt: skip
    (folder / "small.yaml").write_text(yaml.safe_dump(base))
    for name, flags in {"one": (), "two": ("--hidden_units", 8, "--multimodal_features", "none"), "three": ("--seed", 9)}.items():
        places = ("--log_path", f"logs/{name}", "--checkpoint_path", f"ckpt/{name}")
        done = run_main("--config", "small.yaml", "--data_path", "data", *places, *flags, cwd=folder)
        assert done.status == 0, done.err
    done = run_combine("ensemble", "both", "ckpt/one/best_model.pt", "ckpt/two/best_model.pt", "--weights", 1, 2, cwd=folder)
    assert done.status == 0, done.err
    return World(folder)


def run_combine(*flags, cwd):
    return run_main(*flags, cwd=cwd, entry=combine)


def evaluated(world, path, *flags):
    """metrics.json of main.py --inference_only; logs/of-<number>/eval-<time>."""
    log = f"evals/{len(list((world.folder / 'evals').glob('*')))}"
    places = ("--data_path", "data", "--log_path", log)
    done = run_main("--config", "small.yaml", *places, "--inference_only", "--state_dict_path", path, *flags, cwd=world.folder)
    assert done.status == 0, done.err
    (file,) = (world.folder / log).glob("eval-*/metrics.json")
    return json.loads(file.read_text()), done.out


def test_main_evaluates_an_ensemble(world):
    alone, _ = evaluated(world, "ckpt/one/best_model.pt")
    assert run_combine("ensemble", "alone", "ckpt/one/best_model.pt", cwd=world.folder).status == 0
    one, _ = evaluated(world, "alone")
    assert {k: v for k, v in one.items() if k != "checkpoint"} == {k: v for k, v in alone.items() if k != "checkpoint"}
    both, out = evaluated(world, "both", "--top_k", 5)
    assert "ensemble of 2 models, scores combined by softmax" in out and both["checkpoint"].endswith("both")
    assert both["loss"] != alone["loss"] and both["num_users"] == alone["num_users"] and "hr@5" in both


def test_infer_answers_by_an_ensemble(world):
    data, users = world.folder / "data-eval", SimpleNamespace(folder=world.folder, model=None)
    answers = {}
    for name, model in {"one": "ckpt/one/best_model.pt", "two": "ckpt/two/best_model.pt", "both": "both"}.items():
        answers[name] = call(users, data, world.folder / f"result-{name}", world.folder / model)
    seen = seen_by(data)
    for user, top10 in zip(answers["both"][1], answers["both"][0], strict=True):
        assert len(set(top10)) == 10 and not set(top10) & set(seen[user])
    assert answers["both"][1] == answers["one"][1] and answers["both"][0] not in (answers["one"][0], answers["two"][0])
    # The organisers' files hold the vectors side by side: their products are the combined scores, (q1 . v1 + 2 q2 . v2) at one temperature.
    vectors = {name: [read_matrix(world.folder / f"result-{name}/{file}.fbin", np.float32) for file in ("query", "embedding")]
               for name in answers}  # fmt: skip
    products = {name: query.astype(np.float64) @ items.astype(np.float64).T for name, (query, items) in vectors.items()}
    np.testing.assert_allclose(products["both"], products["one"] + 2 * products["two"], atol=1e-5)


def test_models_of_another_split_are_for_inference_only(world):
    folder = world.folder
    assert run_combine("ensemble", "mixed", "ckpt/one/best_model.pt", "ckpt/three/best_model.pt", cwd=folder).status == 0
    flags = ("--config", "small.yaml", "--data_path", "data", "--log_path", "evals-mixed", "--inference_only", "--state_dict_path", "mixed")
    assert_mistake(run_main(*flags, cwd=folder), "other users were held out", "seed: 42 there, 9 here")
    assert_mistake(run_main(*flags, "--hidden_units", 4, cwd=folder), "hidden_units is 4")
    top10s, _ = call(SimpleNamespace(folder=folder), folder / "data-eval", folder / "result-mixed", folder / "mixed")
    assert all(len(set(top10)) == 10 for top10 in top10s)


def test_an_average_serves_as_a_checkpoint(world):
    folder = world.folder
    steps = list_checkpoints(folder / "ckpt/one")
    done = run_combine("average", "mean", *steps, cwd=folder)
    assert done.status == 0 and "mean of 2 checkpoints: mean/global_step" in done.out
    metrics, _ = evaluated(world, "mean/best_model.pt")
    assert metrics["num_users"] == 6
    top10s, _ = call(SimpleNamespace(folder=folder), folder / "data-eval", folder / "result-mean", folder / "mean")
    assert len(top10s) == 20
    places = ("--log_path", "logs/on", "--checkpoint_path", "ckpt/on")
    flags = ("--config", "small.yaml", "--data_path", "data", "--state_dict_path", "mean/best_model.pt", "--max_steps", 1)
    assert run_main(*flags, *places, cwd=folder).status == 0  # a new run from its weights


def test_mistakes_of_the_command(world):
    folder = world.folder
    assert_mistake(run_combine("average", "m2", "ckpt/one/best_model.pt", "ckpt/two/best_model.pt", cwd=folder), "hidden_units: 16 in")
    assert_mistake(run_combine("average", "m3", "ckpt/one/best_model.pt", "--weights", 1, cwd=folder), "for an ensemble")
    assert_mistake(run_combine("ensemble", "both", "ckpt/one/best_model.pt", cwd=folder), "not an empty folder")
    assert_mistake(run_combine("ensemble", "m4", "nowhere.pt", cwd=folder), "nowhere.pt")
    assert run_combine("mix", "m5", "ckpt/one/best_model.pt", cwd=folder).status == 2
