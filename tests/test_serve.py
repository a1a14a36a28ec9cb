"""serve.py and infer.py --stdin: a line an answer, in order, the same rankings as infer(); bad lines; the end of the input."""

import io
import json
import os
import subprocess
import sys
from contextlib import chdir
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from test_infer import ROOT, World, answer, call, run_infer, variables, world
from test_main import assert_mistake

import infer
from candidates import normalise_id
from checkpoint import list_checkpoints
from ensemble import read_ensemble, write_ensemble
from errors import UserError
from schema import TENCENT_GR
from serve import Answerer, open_served, parse_request, serve_lines
from store import open_store

__all__ = ["world"]  # a fixture
CPU = torch.device("cpu")


def served_by(world: World, path=None, kind="predict", log=lambda _: None):
    return open_served(read_ensemble(path or world.model), world.A, kind, world.folder / "cache", CPU, log)


@pytest.fixture(scope="module")
def answerer(world) -> Answerer:
    return Answerer(served_by(world))


def requests_of(store) -> list[dict]:
    """A request with everything in it for each user of a store."""
    single = [f.id for f in store.schema.select("user", "single")]
    found = []
    for user in range(store.num_users):
        part = slice(*store.user_offsets[user : user + 2])
        creatives = [int(c) for c in store.raw_item_ids[store.item_ids[part]]]
        rows = zip(creatives, store.action_types[part].tolist(), store.timestamps[part].tolist())
        features = {name: [value] for name, value in zip(single, store.user_single[user].tolist()) if value}
        features |= {name: column.gather(np.array([user]))[0].tolist() for name, column in store.user_multi.items()}
        found.append({"user": store.raw_user_ids[user], "events": [list(row) for row in rows], "features": features})
    return found


def ask(answerer: Answerer, *requests: object, k: int = 10) -> list[dict]:
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in requests]
    out = io.StringIO()
    count, errors = serve_lines(answerer, lines, out, k)
    answers = [json.loads(line) for line in out.getvalue().splitlines()]
    assert count == len(answers) == len(lines) and errors == sum("error" in a for a in answers)
    return answers


def test_answers_are_those_of_infer(world, answerer):
    expected = answer(world, world.A)
    requests = requests_of(answerer.store)
    assert [a["items"] for a in ask(answerer, *requests)] == [expected[request["user"]] for request in requests]
    by_name = ask(answerer, *({"user": request["user"]} for request in requests))
    assert [a["items"] for a in by_name] == [expected[request["user"]] for request in requests]
    for found in by_name:
        assert found["scores"] == sorted(found["scores"], reverse=True) and len(found["scores"]) == 10


def test_an_ensemble_answers_as_infer_does(world, tmp_path):
    both = write_ensemble(tmp_path / "both", [world.model, list_checkpoints(world.checkpoints)[0]], [2, 1], "zscore")
    expected = answer(world, world.A, model=both)
    answers = ask(Answerer(served_by(world, both)), *({"user": user} for user in expected))
    assert {a["user"]: a["items"] for a in answers} == expected


def test_part_of_a_request_takes_the_place_of_the_datas(answerer):
    requests = requests_of(answerer.store)
    (first,) = ask(answerer, {"user": requests[0]["user"], "events": requests[1]["events"]})
    (same,) = ask(answerer, requests[0] | {"events": requests[1]["events"]})
    (other,) = ask(answerer, {"user": requests[0]["user"], "features": {}})
    assert first == same and other["items"] != [] and other["scores"] != ask(answerer, {"user": requests[0]["user"]})[0]["scores"]


def test_a_stranger_a_short_history_and_k(answerer):
    creatives = [int(c) for c in answerer.store.raw_item_ids[1:4]]
    nothing, one, many, short = ask(
        answerer, {"user": "?", "events": []}, {"events": [creatives[0]]}, {"events": creatives, "k": 1000}, {"events": creatives, "k": 3}
    )
    assert len(nothing["items"]) == len(one["items"]) == 10 and one["user"] is None and nothing["user"] == "?"
    assert len(many["items"]) == len(set(many["items"])) == len(answerer.served.candidates) and many["items"][:3] == short["items"]
    assert not set(creatives) & set(short["items"])


def test_events_go_by_time_and_unknown_items_are_counted(answerer):
    a, b, c = (int(c) for c in answerer.store.raw_item_ids[1:4])
    ordered, mixed = ask(answerer, {"events": [[a, 1, 10], [b, 0, 20], [c, 0, 30]]}, {"events": [[c, 0, 30], [a, 1, 10], [b, 0, 20]]})
    assert ordered == mixed
    (unknown,) = ask(answerer, {"events": [[a, 1, 10], ["no such item", 0, 15], [b, 0, 20], [c, 0, 30], 10**30]})
    assert unknown == ordered | {"unknown_items": 2}
    as_text, bare = ask(answerer, {"events": [[str(a)], [b], [c]]}, {"events": [a, b, c]})
    assert as_text == bare


BAD = {
    b"": "not a line of JSON", b"{": "not a line of JSON", b"\xff\xfe{}": "not a line of JSON", b"[" * 100_000: "not a line of JSON",
    b"7": "expected an object", b"null": "expected an object", b"{}": "needs user", b'{"users": 1}': "the nearest is user",
    b'{"user": true}': "user: expected the raw id", b'{"user": "nobody"}': "is not in the data", b'{"events": {}}': "expected a list",
    b'{"events": [[]]}': "number 1: expected [creative id", b'{"events": [1, 2.5]}': "number 2: expected [creative id",
    b'{"events": [[1, 3]]}': "number 1, action type: expected a whole number from 0 to 2",
    b'{"events": [[1, 0, -5]]}': "number 1, seconds: expected", b'{"events": [[1, 0, 1e9]]}': "seconds: expected a whole number",
    b'{"events": [], "k": 0}': "k: expected a whole number from 1", b'{"events": [], "k": NaN}': "k: expected",
    b'{"events": [], "wanted_action": "buy"}': "wanted_action: expected", b'{"events": [], "features": []}': "features: expected",
    b'{"events": [], "features": {"81": 1}}': "'81' is no feature of users", b'{"events": [], "features": {"103": [1, 2]}}': "one value",
    b'{"events": [], "features": {"103": "x"}}': "features: 103: expected a whole number", b'{"events": [], "k": true}': "true or false",
}  # fmt: skip


def test_each_bad_line_is_answered_in_its_place(answerer):
    good = {"events": [int(answerer.store.raw_item_ids[1])]}
    (expected,) = ask(answerer, good)
    answers = ask(answerer, *(line for bad in BAD for line in (bad, good)))
    for number, (bad, words) in enumerate(BAD.items()):
        assert answers[2 * number].keys() == {"error", "line"} and answers[2 * number]["line"] == 2 * number + 1
        assert words in answers[2 * number]["error"], bad[:40]
        assert answers[2 * number + 1] == expected
        with pytest.raises(UserError):
            answerer.answer(parse_request(bad, TENCENT_GR, 10))


def test_wanted_action_is_told_to_the_model(world, answerer):
    request = parse_request(b'{"events": [], "wanted_action": "click"}', TENCENT_GR, 10)
    assert request.wanted == 1 and parse_request(b'{"events": [], "wanted_action": 2}', TENCENT_GR, 7)[-2:] == (2, 7)


# ---- the command ----


def test_the_command_answers_and_ends_with_its_input(world, tmp_path):
    expected = answer(world, world.A)
    users = list(expected)[:3]
    lines = "".join(json.dumps({"user": user}) + "\n" for user in users) + "not JSON\n" + json.dumps({"user": users[0]})  # no line end
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("EVAL_", "MODEL_", "USER_CACHE"))}
    environ |= {"EVAL_DATA_PATH": str(world.A), "USER_CACHE_PATH": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "infer.py", "--stdin", "--state_dict_path", world.model]
    done = subprocess.run(command, input=lines, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0 and "5 lines answered, 1 of them by an error" in done.stderr and "Traceback" not in done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]  # what compiling the data says is not among them
    assert [a.get("items") for a in answers] == [*(expected[user] for user in users), None, expected[users[0]]]
    assert answers[3]["line"] == 4


def test_each_answer_comes_before_the_next_request(world, tmp_path):
    environ = os.environ | variables(world, world.A) | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "infer.py", "--stdin"]  # the checkpoint by MODEL_OUTPUT_PATH
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=tmp_path, env=environ, text=True, bufsize=1, **pipes) as process:
        for line in ('{"user": "?"}', '{"events": []}'):
            process.stdin.write(line + "\n")
            assert json.loads(process.stdout.readline()).keys() & {"error", "items"}
        process.stdout.close()  # whoever reads has had enough
        process.stdin.write('{"events": []}\n')
        process.stdin.close()
        assert process.wait(60) == 0


def test_the_training_data_serve_too(world, tmp_path):
    """Without EVAL_DATA_PATH: --data_path, all items ranked, users with the histories that they have there."""
    from synthetic import generate

    generate(tmp_path / "A", 120, 150, "jsonl", predict=40, seed=3, max_length=20, mean_length=12)
    store = open_store(tmp_path / "A", tmp_path / "cache", embeddings=("81",), log=lambda _: None)
    user = store.raw_user_ids[5]
    with mock.patch.object(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(json.dumps({"user": user, "k": 150}).encode()))):
        done = run_infer("--stdin", "--state_dict_path", world.model, "--data_path", "A", cwd=tmp_path)
    assert done.status == 0, done.err
    seen = store.item_ids[store.user_offsets[5] : store.user_offsets[6]]
    items = json.loads(done.out)["items"]
    assert len(items) == 150 and set(items[-len(set(seen)) :]) == {
        int(c) for c in store.raw_item_ids[np.unique(seen)]
    }  # filled up at the end
    assert all(normalise_id(str(c)) == c for c in items)


@pytest.mark.parametrize(("flags", "words"), [
    (("--stdin",), ("name it with --state_dict_path",)), (("--stdin", "--export", "x"), ("one at a time",)),
    (("--stdin", "--state_dict_path", "nowhere"), ("nowhere", "no such file or folder")),
    (("--stdin", "--state_dict_path", "."), ("--state_dict_path .", "found 0 folders")),
    (("--stdin", "--state_dict_path", "MODEL", "--data_path", "nowhere"), ("nowhere: no such data folder", "--data_path")),
    (("--stdin", "--state_dict_path", "MODEL"), ("A: no such data folder", "EVAL_DATA_PATH")),
    (("--state_dict_path", "MODEL"), ("--state_dict_path belongs to --export and --stdin",)),
    (("--stdin", "--output", "x", "--state_dict_path", "MODEL"), ("--output",)),
])  # fmt: skip
def test_mistakes(world, tmp_path, flags, words):
    flags = [world.model if word == "MODEL" else word for word in flags]
    assert_mistake(run_infer(*flags, cwd=tmp_path), *words)


def test_infer_is_as_it_was(world):
    with chdir(world.folder):
        assert call(world, world.A)[0] and infer.creative_ids
