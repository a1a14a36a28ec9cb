"""export.py and infer.py --export: the exported files give infer()'s rankings in a process that knows nothing of this repository."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_docs import blocks_of
from test_infer import ROOT, answer, run_infer, variables, world
from test_main import assert_mistake, run_main
from test_model import make
from test_serve import requests_of, served_by
from tiny import tiny_store

from dataset import predict_split
from ensemble import write_ensemble
from errors import RunError, UserError
from evaluate import Ranker
from export import UserEncoder, export, program, user_table
from schema import ANY_ACTION

__all__ = ["world"]  # a fixture
# The package itself, no stand-in of ours: that others can read these files is what is promised.
load_file = pytest.importorskip("safetensors.torch", reason="safetensors is not installed: pip install -r requirements.txt").load_file

FOREIGN = """
import json, sys
requests = json.load(open(sys.argv[1]))
print(json.dumps([top10(request["events"], request["features"]) for request in requests]))
assert not {"model", "serve", "export", "store", "infer"} & sys.modules.keys()
"""


@pytest.fixture(scope="module")
def exported(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    done = run_infer("--export", "deep/out", "--state_dict_path", world.model, cwd=folder, **variables(world, world.A))
    assert done.status == 0, done.err
    return folder / "deep/out"


def foreign_answers(out: Path, requests: list[dict], cwd: Path) -> list[list]:
    """What USAGE.md's own code makes of the exported files, in a fresh process in another folder."""
    (code,) = [b.content for b in blocks_of("USAGE.md", (ROOT / "USAGE.md").read_text(encoding="utf-8")) if "def top10" in b.content]
    assert 'folder = "exports/first"' in code
    script, asked = cwd / "foreign.py", cwd / "requests.json"
    script.write_text(code.replace('"exports/first"', repr(str(out))) + FOREIGN)
    asked.write_text(json.dumps(requests))
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script, asked], cwd=cwd, env=environ, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_fresh_process_gets_the_same_top_10(world, exported, tmp_path):
    """All users to predict: histories longer than the model's, cold candidates and items, unseen values, users without events."""
    requests = requests_of(served_by(world).store)
    expected = answer(world, world.A)
    assert max(len(r["events"]) for r in requests) >= 20 and len(requests) == 40
    assert foreign_answers(exported, requests, tmp_path) == [expected[request["user"]] for request in requests]


def test_strange_users(world, exported, tmp_path):
    creatives = [c for c in json.loads((exported / "creative_ids.json").read_text()) if c]
    requests = [
        {"events": [], "features": {}},
        {"events": [[creatives[3], 1, 1_718_000_000]], "features": {}},
        {"events": [["no such item", 1, 1_718_000_000], [creatives[4], 1, 1_718_000_100]], "features": {"103": [10**6]}},
    ]
    from serve import Answerer, parse_request

    answerer = Answerer(served_by(world))
    schema = answerer.store.schema
    expected = [answerer.answer(parse_request(json.dumps(request), schema, 10))["items"] for request in requests]
    assert foreign_answers(exported, requests, tmp_path) == expected


def test_the_card_tells_what_the_files_are(world, exported):
    card = json.loads((exported / "card.json").read_text())
    assert (
        card["checkpoint"]["metrics"]["hr@10"] >= 0 and card["checkpoint"]["step"] > 0 and card["settings"]["model"]["hidden_units"] == 16
    )
    data = card["data"]
    assert data["kind"] == "predict" and data["num_known_items"] == 150 < data["num_items"] and data["fingerprint"] != data["trained_on"]
    assert sorted(path.name for path in exported.iterdir()) == sorted([*card["files"], "card.json"])
    for name, row in card["files"].items():
        content = (exported / name).read_bytes()
        assert len(content) == row["size"] and hashlib.sha256(content).hexdigest() == row["sha256"]
        if "tensors" in row:
            found = load_file(exported / name)
            assert {key: [str(t.dtype), list(t.shape)] for key, t in found.items()} == row["tensors"]
    items = load_file(exported / "item_vectors.safetensors")
    assert len(items["history"]) == data["num_items"] + 1 and len(items["candidate"]) == data["num_candidates"] == len(items["score_bias"])
    names = json.loads((exported / "creative_ids.json").read_text())
    assert len(names) == data["num_items"] + 1 and names[0] is None and len(set(names)) == len(names)
    assert len(card["encoder"]["inputs"]) == 7 and card["encoder"]["wanted_action"] == ANY_ACTION
    assert (exported / "user_encoder.pt2").stat().st_size < 2**20


def test_cold_candidates_keep_their_penalty(world, tmp_path):
    from synthetic import generate

    generate(tmp_path / "A", 120, 150, "jsonl", predict=40, seed=3, max_length=20, mean_length=12)
    flags = ("--cold_candidates", "penalty", "--cold_penalty", 0.3, "--id_dropout", 0.2, "--max_steps", 4, "--user_id")
    paths = ("--data_path", "A", "--log_path", "log", "--checkpoint_path", "ckpt")
    done = run_main("--config", world.folder / "small.yaml", *paths, *flags, cwd=tmp_path)
    assert done.status == 0, done.err
    model = tmp_path / "ckpt/best_model.pt"
    environ = variables(world, world.A) | {"MODEL_OUTPUT_PATH": str(model)}
    assert run_infer("--export", "out", cwd=tmp_path, **environ).status == 0
    assert set(np.unique(load_file(tmp_path / "out/item_vectors.safetensors")["score_bias"])) == {np.float32(-0.3), 0}
    expected, requests = answer(world, world.A, model=model), requests_of(served_by(world, model).store)
    assert foreign_answers(tmp_path / "out", requests, tmp_path) == [expected[request["user"]] for request in requests]


VARIANTS = [
    {}, {"position": "learned", "norm_first": False, "activation": "swiglu"}, {"position": "relative", "time_bias": True},
    {"backbone": "hstu", "time_bias": True, "norm": "rmsnorm"}, {"num_experts": 4, "active_experts": 2},
    {"backbone": "hstu", "num_experts": 3, "activation": "swiglu", "position": "none"},
    {"action_conditioning": "film", "time_fields": ["gap", "hour", "weekday", "day", "fourier"]},
    {"action_conditioning": "gate", "similarity": "dot", "item_activation": "relu", "action_embedding": False, "time_features": False},
    {"user_id": True, "hash_rows": [7, 5], "hashed_features": ["user_id", "likes"], "feature_width": "auto", "embedding_dim": 32},
    {"item_tower": "sum", "embedding_norm": False, "id_dropout": 0.2},
]  # fmt: skip


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_the_exported_encoder_is_the_models(settings):
    sequences = [[1, 5, 3], [2], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18], [4, 4, 4, 4]]
    store, model, columns = make(tiny_store(sequences=sequences), action_head="action_conditioning" in settings, **settings)
    model.requires_grad_(False)
    ranker = Ranker(model, columns, np.arange(1, 21), device=torch.device("cpu"), batch_size=3)
    wanted = np.array([0, 1, 2, 3])
    expected = torch.zeros(4, 16)
    for samples, query in ranker.encode_users(predict_split(store), wanted):
        expected[torch.from_numpy(samples)] = query
    table, fields = user_table(model, columns, torch.device("cpu"))
    offset = {field["feature"]: field["offset"] for field in fields}
    history = model.encode_items(columns.items(np.arange(21))).history
    encoder = program(UserEncoder(model, table)).module()
    rows, weights = torch.zeros(4, 9, dtype=torch.int64), torch.zeros(4, 9)
    events = torch.zeros(3, 4, 10, dtype=torch.int64)
    for user in range(4):
        likes = store.user_multi["likes"].gather([user])[0].tolist()
        values = [("age", int(store.user_single[user, 0]), 1.0), *(("likes", value, 1 / len(likes)) for value in likes)]
        if settings.get("user_id"):
            values.append(("user_id", int(store.user_ids[user]), 1.0))
        for place, (name, value, weight) in enumerate(values):
            rows[user, place], weights[user, place] = offset[name] + value if value else 0, weight
        part = slice(max(store.user_offsets[user], store.user_offsets[user + 1] - 10), store.user_offsets[user + 1])
        for column, array in zip(events, (store.item_ids, store.action_types, store.timestamps)):
            column[user, : part.stop - part.start] = torch.from_numpy(array[part].astype(np.int64))
    lengths = torch.tensor([3, 1, 10, 4])
    ids, actions, times = events
    found = encoder(rows, weights, history[ids], actions, times, lengths, torch.from_numpy(wanted))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    for user in range(4):  # alone, at other lengths, with other padding
        part, length = slice(user, user + 1), int(lengths[user])
        alone = encoder(rows[part, :8], weights[part, :8], history[ids[part, :length]], actions[part, :length], times[part, :length],
                        lengths[part], torch.from_numpy(wanted[part]))  # fmt: skip
        torch.testing.assert_close(alone[0], found[user], atol=2e-5, rtol=1e-4)


def test_an_encoder_that_torch_cannot_export_is_said(monkeypatch):
    """A loop over the events, as in nn.GRU, would hold for one number of them only."""
    _, model, columns = make()
    monkeypatch.setattr(model.embedding_norm, "forward", lambda x: torch.stack([row for row in x]))
    with pytest.raises(RunError, match="model.backbone transformer: torch.export cannot make a graph"):
        program(UserEncoder(model.requires_grad_(False), user_table(model, columns, torch.device("cpu"))[0]))


# ---- mistakes ----


def test_a_used_folder_an_ensemble_and_a_missing_package(world, exported, tmp_path, monkeypatch):
    served = served_by(world)
    with pytest.raises(UserError, match="not an empty folder"):
        export(served, exported)
    (tmp_path / "empty").mkdir()
    (tmp_path / ".tmp-empty-99999999").mkdir()  # of a process that was killed
    assert export(served, tmp_path / "empty") == tmp_path / "empty" and len(list((tmp_path / "empty").iterdir())) == 5
    assert not list(tmp_path.glob(".tmp-*"))
    both = write_ensemble(tmp_path / "both", [world.model, world.model])
    with pytest.raises(UserError, match="one by one"):
        export(served_by(world, both), tmp_path / "out")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    done = run_infer("--export", "out", "--state_dict_path", world.model, cwd=tmp_path, **variables(world, world.A))
    assert_mistake(done, "--export writes safetensors files", "pip install safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both", "empty"]
