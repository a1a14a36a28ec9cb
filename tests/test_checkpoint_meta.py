"""checkpoint_meta.py: every key of meta.json, missing or of a wrong type, to the checks themselves and to resume, evaluate and infer."""

import json
import shutil
from pathlib import Path

import pytest
import test_main
from test_main import World, assert_mistake, losses_of, places, run_main, status_of
from tiny import META

import checkpoint as checkpoints
import infer
from checkpoint_meta import SHAPE
from shapes import fault
from synthetic import generate

FILES = {name: {"sha256": "0" * 64, "size": 1} for name in ("model.pt", "trainer.pt")}
WHOLE = META | {"format_version": checkpoints.FORMAT_VERSION, "step": 3, "valid_loss": None, "files": FILES}
# A value of each key that is not what it should be, as an editor, a bug or a stranger might leave it.
WRONG = {
    "format_version": "2", "step": "8", "valid_loss": "low", "files": {"model.pt": {}}, "config": [], "schema": "x", "layout": {"a": 1},
    "embeddings": [1], "num_items": 8.5, "num_users": "60", "num_events": None, "item_ids": 5, "store": None, "epoch": True,
    "metrics": [0.5], "torch": 2.1,
}  # fmt: skip
FAULTS = [*((key, "missing") for key in WRONG), *WRONG.items()]
NEEDED = {key for key in SHAPE if not key.endswith("?")}


def named(key: str, value: object) -> str:
    """How the message of that fault begins."""
    return f"has no {key}" if value == "missing" else key


def broken(meta: dict, key: str, value: object) -> dict:
    return {name: item for name, item in meta.items() if name != key} if value == "missing" else meta | {key: value}


def test_each_key_is_asked_for_and_has_its_type():
    assert fault(WHOLE, SHAPE) == "" and NEEDED == set(WHOLE) == set(WRONG)
    for key, value in FAULTS:
        assert fault(broken(WHOLE, key, value), SHAPE).startswith(named(key, value)), (key, value)
    for key, value in [
        ("step", -1), ("step", True), ("files", {"model.pt": FILES["model.pt"]}), ("files", FILES | {"model.pt": {"sha256": 1, "size": 1}}),
        ("layout", [1]), ("metrics", {"hr@10": "high"}), ("metrics", {"hr@10": [0.5]}), ("num_users", 2**70 + 0.5), ("averaged", "x"),
    ]:  # fmt: skip
        assert fault(WHOLE | {key: value}, SHAPE).startswith(key), (key, value)
    wide, high = fault(WHOLE | {"store": ["x" * 10_000]}, SHAPE), fault(WHOLE | {"step": "\n" * 99}, SHAPE)
    assert max(len(wide), len(high.splitlines())) < 250


def test_what_came_later_may_be_missing_and_is_looked_at_where_it_is_there():
    for key, value in {"averaged": ["a", "b"], "threads": 2, "numba": True}.items():
        assert f"{key}?" in SHAPE and fault(WHOLE | {key: value}, SHAPE) == ""
        assert fault(WHOLE | {key: None}, SHAPE).startswith(f"{key}: expected ")
    assert fault(WHOLE | {"a_key_of_a_later_version": object()}, SHAPE) == ""


def test_what_could_not_be_read_is_not_written(tmp_path):
    with pytest.raises(TypeError, match="meta: has no num_items"):
        meta = broken(META, "num_items", "missing")
        checkpoints.save_checkpoint(tmp_path, step=1, valid_loss=None, model_state={}, trainer_state={}, meta=meta)
    assert list(tmp_path.iterdir()) == []


# ---- whole runs ----


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """A folder with data, data to predict, and a run of them."""
    cwd = tmp_path_factory.mktemp("meta")
    generate(cwd / "data", 60, 80, "jsonl", predict=10, max_length=10, mean_length=7)
    test_main.train_small(cwd, test_main.SMALL)
    return World(cwd, ("--config", "small.yaml", "--data_path", "data"))


def put(folder: Path, key: str, value: object) -> None:
    """The checkpoint's meta.json with that fault, sealed anew."""
    text = (folder / checkpoints.META).read_text()
    (folder / checkpoints.META).write_text(checkpoints._meta_text(broken(json.loads(text), key, value)))


def test_a_run_writes_what_is_asked_for(world):
    meta = checkpoints.read_meta(checkpoints.list_checkpoints(world.cwd / "ckpt")[-1])
    assert NEEDED <= set(meta) <= {*(key.removesuffix("?") for key in SHAPE), "meta_sha256"}


@pytest.mark.parametrize(("key", "value"), FAULTS, ids=str)
def test_a_checkpoint_with_such_a_meta_is_refused_in_a_line(world, tmp_path, key, value):
    newest = checkpoints.list_checkpoints(world.cwd / "ckpt")[-1]
    folder = shutil.copytree(newest, tmp_path / newest.name)
    put(folder, key, value)
    variables = {"MODEL_OUTPUT_PATH": str(folder), "EVAL_DATA_PATH": str(world.cwd / "data-eval"), "EVAL_RESULT_PATH": str(tmp_path)}
    for result in (
        world.run(*places(tmp_path / "resumed"), "--resume_path", folder),
        world.run("--inference_only", "--state_dict_path", folder, "--log_path", tmp_path / "evaluated"),
        run_main(cwd=tmp_path, entry=infer, environ=variables),
    ):
        assert_mistake(result, f"{folder.name}/meta.json: {named(key, value)}", "another checkpoint", lines=1)
    assert not (tmp_path / "resumed").exists()


@pytest.mark.parametrize("key", ["step", "num_users", "item_ids", "metrics", "files"])
def test_resume_passes_it_over(world, key):
    run = world.cwd / f"over-{key}"
    shutil.copytree(world.cwd / "log", run / "log")
    shutil.copytree(world.cwd / "ckpt", run / "ckpt")
    newest, before = checkpoints.list_checkpoints(run / "ckpt")[:-3:-1]
    put(newest, key, "missing")
    result = world.run(*places(run), "--resume")
    assert result.status == 0, result.err
    assert f"damaged checkpoint passed over: {newest}/meta.json: has no {key}" in result.out
    assert f"resumed at step 6 from {before}" in result.out and (run / "ckpt" / f"damaged-{newest.name}").is_dir()
    notes = [row["note"] for row in map(json.loads, (run / "log/train.log").read_text().splitlines()) if "note" in row]
    assert [note[:24] for note in notes] == ["damaged checkpoint passe", "set aside: global_step8."] and all(
        note in result.out for note in notes
    )
    assert losses_of(run / "log") == losses_of(world.cwd / "log") and status_of(run / "log")["state"] == "finished"
