"""checkpoint.py: round trips, damage, links, pruning, a crash at every call, kill -9, full disks, hostile files."""

import errno
import hashlib
import json
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import META

import checkpoint as ck
from errors import UserError


def state(seed: int, rows: int = 40) -> dict:
    generator = torch.Generator().manual_seed(seed)
    half = torch.ones(2, dtype=torch.bfloat16)
    return {"table.weight": torch.randn(rows, 4, generator=generator), "bias": torch.arange(3) + seed, "half": half}


def trainer(seed: int) -> dict:
    return {
        "optimizer": {"state": {0: {"exp_avg": torch.full((3,), float(seed)), "step": 7}}, "groups": [{"lr": 1e-3, "betas": (0.9, 0.98)}]},
        "rng": torch.get_rng_state(), "position": {"epoch": 2, "next_sample": 64, "best": None, "name": "x", "done": False},
    }  # fmt: skip


def save(root: Path, step: int, loss: float | None = None, seed: int | None = None, **meta: object) -> Path:
    seed = step if seed is None else seed
    meta = META | {"epoch": 1} | meta
    return ck.save_checkpoint(root, step=step, valid_loss=loss, model_state=state(seed), trainer_state=trainer(seed), meta=meta)


def content(path: Path | None) -> str | None:
    """Hash of everything a checkpoint holds."""
    if path is None:
        return None
    digest = hashlib.sha256()
    for name in (ck.MODEL, ck.TRAINER, ck.META):
        digest.update((path / name).read_bytes())
    return digest.hexdigest()


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


# ---- round trip ---------------------------------------------------------------------------------------------------------


def test_round_trip_by_folder_file_and_link(tmp_path):
    path = save(tmp_path, 1200, 0.09591)
    assert path.name == "global_step1200.valid_loss=0.0959"
    assert sorted(os.listdir(path)) == ["meta.json", "model.pt", "trainer.pt"]
    assert os.listdir(tmp_path) == [path.name]
    link = ck.link(tmp_path, "best_model.pt", path)
    for given in (path, path / "model.pt", link):
        loaded = ck.load_checkpoint(given, with_trainer=True)
        assert loaded.path == path and loaded.meta["step"] == 1200 and loaded.meta["epoch"] == 1 and loaded.meta["valid_loss"] == 0.09591
        assert equal(loaded.model_state, state(1200))
        assert equal(loaded.trainer_state["optimizer"], trainer(1200)["optimizer"])
        assert equal(loaded.trainer_state["position"], trainer(1200)["position"])
    assert ck.load_checkpoint(path, with_trainer=False).trainer_state is None


def test_files_load_with_plain_torch_and_hashes_stand_in_meta(tmp_path):
    path = save(tmp_path, 3)
    meta = json.loads((path / "meta.json").read_text())
    for name in ("model.pt", "trainer.pt"):
        data = (path / name).read_bytes()
        assert meta["files"][name] == {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    assert equal(torch.load(path / "model.pt", weights_only=True), state(3))


def test_same_state_gives_the_same_bytes(tmp_path):
    torch.manual_seed(0)
    first = content(save(tmp_path / "a", 5, 0.5))
    torch.manual_seed(0)
    assert first == content(save(tmp_path / "b", 5, 0.5))


def test_names_of_unknown_losses(tmp_path):
    assert save(tmp_path, 1, None).name == "global_step1.valid_loss=nan"
    path = save(tmp_path, 2, float("nan"))
    assert path.name == "global_step2.valid_loss=nan"
    assert json.loads((path / "meta.json").read_text())["valid_loss"] is None


def test_a_view_is_saved_without_the_table_behind_it(tmp_path):
    big = torch.zeros(100_000, 4)
    path = ck.save_checkpoint(tmp_path, step=1, valid_loss=None, model_state={"row": big[:2]}, trainer_state={}, meta=META)
    assert (path / "model.pt").stat().st_size < 5_000
    assert ck.load_checkpoint(path, with_trainer=False).model_state["row"].shape == (2, 4)


def test_saving_makes_no_copy_of_cpu_tensors():
    table = torch.zeros(1000, 8)
    assert ck._storable({"a": [table]}, "x")["a"][0].data_ptr() == table.data_ptr()


def test_loaded_tensors_may_be_changed_without_touching_the_file(tmp_path):
    path = save(tmp_path, 1)
    before = content(path)
    ck.load_checkpoint(path, with_trainer=False).model_state["table.weight"].mul_(0)
    assert content(path) == before


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": np.float64(1)}, "trainer_state['a']"),
        ({"a": [1, {2}]}, "trainer_state['a'][1]"),
        ({"a": {1.5: 1}}, "trainer_state['a']"),
        ({"f": print}, "trainer_state['f']"),
    ],
)
def test_what_weights_only_refuses_is_refused_when_saving(tmp_path, value, where):
    with pytest.raises(TypeError) as error:
        ck.save_checkpoint(tmp_path, step=1, valid_loss=None, model_state={}, trainer_state=value, meta=META)
    assert where in str(error.value)
    assert os.listdir(tmp_path) == []


def test_model_state_and_meta_are_checked(tmp_path):
    with pytest.raises(TypeError, match="'a' is a int"):
        ck.save_checkpoint(tmp_path, step=1, valid_loss=None, model_state={"a": 1}, trainer_state={}, meta=META)
    with pytest.raises(TypeError, match="object"):
        ck.save_checkpoint(tmp_path, step=1, valid_loss=None, model_state={}, trainer_state={}, meta=META | {"x": object()})
    assert os.listdir(tmp_path) == []


def test_plain_json():
    given = {"a": np.float32(0.5), "b": torch.tensor(3), "c": float("inf"), "d": (1, Path("/x")), 5: True}
    assert ck.plain_json(given) == {"a": 0.5, "b": 3, "c": None, "d": [1, "/x"], "5": True}


# ---- damage -------------------------------------------------------------------------------------------------------------


def damage(path: Path, kind: str, rng: random.Random) -> None:
    if kind == "remove":
        return path.unlink()
    data = bytearray(path.read_bytes())
    if kind == "truncate":
        data = data[: rng.randrange(len(data))]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize(("kind", "count"), [("truncate", 200), ("flip", 200), ("remove", 20)])
def test_damages_are_detected_before_load_and_the_previous_one_is_taken(tmp_path, kind, count, monkeypatch):
    root, rng = tmp_path / "c", random.Random(kind)
    old, new = save(root, 10), save(root, 20)
    spare = tmp_path / "spare"
    shutil.copytree(new, spare)
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("read before the hashes were compared"))
    for _ in range(count):
        damage(new / rng.choice([ck.MODEL, ck.TRAINER, ck.META]), kind, rng)
        lines = []
        assert ck.newest_valid(root, lines.append) == old
        assert len(lines) == 1 and "global_step20" in lines[0]
        with pytest.raises(UserError, match="global_step20"):
            ck.load_checkpoint(new, with_trainer=True)
        shutil.rmtree(new)
        shutil.copytree(spare, new)
    assert ck.newest_valid(root, pytest.fail) == new


@pytest.mark.parametrize("name", [ck.MODEL, ck.TRAINER, ck.META])
def test_a_missing_file_is_named(tmp_path, name):
    path = save(tmp_path, 1)
    (path / name).unlink()
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        ck.load_checkpoint(path, with_trainer=True)
    assert ck.newest_valid(tmp_path, lambda _: None) is None


def test_messages_name_file_expected_and_found(tmp_path):
    path = save(tmp_path, 1)
    size = (path / ck.MODEL).stat().st_size
    os.truncate(path / ck.MODEL, size - 1)
    with pytest.raises(UserError) as error:
        ck.load_checkpoint(path, with_trainer=False)
    assert str(path / ck.MODEL) in str(error.value) and f"expected {size:,} bytes, found {size - 1:,}" in str(error.value)
    assert str(error.value).count("\n") < 3


def test_a_checkpoint_without_meta_is_damaged_and_not_looked_into(tmp_path, monkeypatch):
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    (new / ck.META).unlink()
    monkeypatch.setattr(zipfile, "ZipFile", lambda *a, **k: pytest.fail("looked into"))
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("unpickled"))
    lines = []
    assert ck.newest_valid(tmp_path, lines.append) == old
    assert lines == [f"damaged checkpoint passed over: {new / ck.META}: missing; a checkpoint folder holds it. Take another checkpoint."]


def test_infer_needs_no_trainer_file(tmp_path):
    path = save(tmp_path, 1)
    (path / ck.TRAINER).unlink()
    assert equal(ck.load_checkpoint(path, with_trainer=False).model_state, state(1))


def test_another_format_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ck, "FORMAT_VERSION", 99)
    path = save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(UserError, match="format_version is 99; expected 2"):
        ck.read_meta(path)


# ---- strangers' files ---------------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def reseal(path: Path) -> None:
    """What an attacker can do: hashes that fit."""
    meta = json.loads((path / ck.META).read_text())
    for name in (ck.MODEL, ck.TRAINER):
        data = (path / name).read_bytes()
        meta["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (path / ck.META).write_text(ck._meta_text(meta))


def test_hostile_content_with_fitting_hashes_runs_nothing(tmp_path):
    path, canary = save(tmp_path, 1), tmp_path / "canary"
    good = (path / ck.MODEL).read_bytes()
    with open(tmp_path / "evil.pt", "wb") as file:
        torch.save({"a": Evil(canary)}, file)
    cases = [(tmp_path / "evil.pt").read_bytes(), pickle.dumps(Evil(canary), protocol=2), b"", b"PK\x03\x04garbage", good[:200]]
    for name in (ck.MODEL, ck.TRAINER):
        for data in cases:
            (path / name).write_bytes(data)
            reseal(path)
            with pytest.raises(UserError, match="torch refuses"):
                ck.load_checkpoint(path, with_trainer=True)
        (path / name).write_bytes(good)
    assert not canary.exists()


def test_a_list_or_a_non_tensor_in_model_pt_is_refused(tmp_path):
    path = save(tmp_path, 1)
    for value, text in (([1], "expected a dict, found a list"), ({"a": 3}, "'a' is a int; expected tensors only")):
        torch.save(value, path / ck.MODEL)
        reseal(path)
        with pytest.raises(UserError, match=text):
            ck.load_checkpoint(path, with_trainer=False)


ODD_META = [
    "[1]", "{}", '{"format_version": 1, "files": {}}', "[" * 100_000, '{"format_version": 1, "files": {"model.pt": 3, "trainer.pt": 4}}',
]  # fmt: skip


@pytest.mark.parametrize("text", ODD_META)
def test_meta_of_another_shape_is_refused(tmp_path, text):
    path = save(tmp_path, 1)
    body = text + '"meta_sha256": "' + "0" * 64 + '"\n}\n'
    (path / ck.META).write_text(body.replace("0" * 64, hashlib.sha256(body.encode()).hexdigest()))
    with pytest.raises(UserError, match="not a checkpoint's meta.json"):
        ck.read_meta(path)


def test_the_organisers_layout_is_refused_with_the_reason(tmp_path, monkeypatch):
    """Told by the file's zip directory: nothing of a stranger's is unpickled only to word a refusal."""
    folder = tmp_path / "global_step1200.valid_loss=0.0959"
    folder.mkdir()
    torch.save(state(1), folder / "model.pt")
    torch.save(state(1), tmp_path / "weights.pt")
    torch.save({"step": 3}, tmp_path / "numbers.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("a/b.txt", "hello")
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("a stranger's file was unpickled"))
    for given in (folder, folder / "model.pt", tmp_path / "weights.pt"):
        with pytest.raises(UserError) as error:
            ck.load_checkpoint(given, with_trainer=False)
        assert "bare state_dict (3 tensors" in str(error.value) and "meta.json" in str(error.value) and "Expected" in str(error.value)
    (tmp_path / "text.pt").write_text("hello")
    for name, words in (
        ("text.pt", "no zip file of torch.save"), ("other.pt", "a zip file that torch.save did not write"),
        ("numbers.pt", "a file of torch.save without tensors"), ("script.pt", "a TorchScript archive"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            ck.find_checkpoint(tmp_path / name)


def test_wrong_paths(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        ck.find_checkpoint(tmp_path / "nothing")
    with pytest.raises(UserError, match="neither meta.json nor model.pt"):
        ck.find_checkpoint(tmp_path)
    save(tmp_path, 1)
    path = save(tmp_path, 20)
    with pytest.raises(UserError, match=f"holds 2 checkpoints; name one, such as {path}"):
        ck.find_checkpoint(tmp_path)


# ---- links, pruning -----------------------------------------------------------------------------------------------------


def test_links_are_hard_links_and_move_atomically(tmp_path):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    link = ck.link(tmp_path, "best_model.pt", first)
    assert os.path.samefile(link, first / ck.MODEL)
    ck.link(tmp_path, "best_model.pt", first)  # again: rename of one file to itself does nothing
    assert sorted(os.listdir(tmp_path)) == ["best_model.pt", first.name, second.name]
    ck.link(tmp_path, "best_model.pt", second)
    assert os.path.samefile(link, second / ck.MODEL) and ck.find_checkpoint(link) == second
    assert sorted(os.listdir(tmp_path)) == ["best_model.pt", first.name, second.name]
    for name in ("x/y.pt", "best", "../a.pt", "mine.pt"):
        with pytest.raises(ValueError, match="a link is named"):
            ck.link(tmp_path, name, first)


def test_a_users_own_copy_or_link_survives_pruning(tmp_path):
    first, _ = save(tmp_path, 1), save(tmp_path, 2)
    shutil.copy(first / ck.MODEL, tmp_path / "copy.pt")
    os.link(first / ck.MODEL, tmp_path / "link.pt")
    assert ck.find_checkpoint(tmp_path / "copy.pt") == ck.find_checkpoint(tmp_path / "link.pt") == first
    assert ck.prune(tmp_path, 1) == [first]
    assert (tmp_path / "copy.pt").exists() and (tmp_path / "link.pt").exists()


@pytest.mark.parametrize("links", [True, False])
def test_prune_removes_folders_with_their_links(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *a, **k: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here")))
    paths = [save(tmp_path, step) for step in (10, 20, 100, 3)]
    for n, path in enumerate(paths):
        assert os.path.samefile(ck.link(tmp_path, f"checkpoint_epoch_{n}.pt", path), path / ck.MODEL) == links
    best = ck.link(tmp_path, "best_model.pt", paths[3])
    assert ck.find_checkpoint(best) == paths[3]
    assert ck.prune(tmp_path, 2, keep={best, tmp_path / "gone.pt"}) == [paths[0]]
    kept = [paths[n].name for n in (1, 2, 3)] + [f"checkpoint_epoch_{n}.pt" for n in (1, 2, 3)]
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "best_model.pt"])
    assert ck.prune(tmp_path, 0) == []
    assert ck.prune(tmp_path, 1, keep=[paths[2]]) == [paths[3], paths[1]]
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_epoch_2.pt", paths[2].name]
    with pytest.raises(ValueError, match="keep_last_k"):
        ck.prune(tmp_path, -1)


def test_a_damaged_folder_that_is_kept_does_not_stop_pruning(tmp_path):
    paths = [save(tmp_path, step) for step in (1, 2, 3)]
    for path in paths[0].iterdir():
        path.unlink()
    assert ck.prune(tmp_path, 1, keep=[paths[0]]) == [paths[1]]
    assert ck.list_checkpoints(tmp_path) == [paths[0], paths[2]]


def test_evaluated_checkpoints_are_those_with_a_loss_and_whole_weights(tmp_path):
    paths = [save(tmp_path, 1, 0.5), save(tmp_path, 2), save(tmp_path, 3, 0.25), save(tmp_path, 4, 0.125)]
    os.truncate(paths[2] / ck.MODEL, 10)
    os.truncate(paths[3] / ck.TRAINER, 10)  # not asked for
    said: list[str] = []
    assert [(path, meta["valid_loss"]) for path, meta in ck.evaluated(tmp_path, said.append)] == [(paths[0], 0.5), (paths[3], 0.125)]
    assert len(said) == 1 and "damaged checkpoint passed over" in said[0] and paths[2].name in said[0]


def test_a_step_saved_again_replaces_the_old_one_and_its_links(tmp_path):
    old = save(tmp_path, 5, None, seed=1)
    ck.link(tmp_path, "checkpoint_epoch_1.pt", old)
    new = save(tmp_path, 5, 0.25, seed=2)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_epoch_1.pt", new.name]
    assert ck.find_checkpoint(tmp_path / "checkpoint_epoch_1.pt") == new
    again = save(tmp_path, 5, 0.25, seed=3)
    linked = ck.load_checkpoint(tmp_path / "checkpoint_epoch_1.pt", with_trainer=False)
    assert again == new and equal(linked.model_state, state(3))


def test_saving_the_same_weights_again_keeps_the_known_loss(tmp_path):
    """A signal right after an evaluation saves once more without a loss: the best checkpoint must keep its name."""
    path = save(tmp_path, 5, 0.25, seed=1)
    ck.link(tmp_path, "best_model.pt", path)
    assert save(tmp_path, 5, None, seed=1, again=True) == path
    meta = ck.load_checkpoint(tmp_path / "best_model.pt", with_trainer=True).meta
    assert meta["valid_loss"] == 0.25 and meta["again"] is True
    assert save(tmp_path, 5, None, seed=2).name == "global_step5.valid_loss=nan"  # other weights: their loss is unknown


def test_later_checkpoints_are_set_aside_not_deleted(tmp_path):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    ck.link(tmp_path, "best_model.pt", second)
    os.truncate(second / ck.MODEL, 10)
    lines = []
    moved = ck.set_aside_newer(tmp_path, 1, lines.append)
    assert [path.name for path in moved] == ["damaged-" + second.name] and len(lines) == 1
    assert ck.list_checkpoints(tmp_path) == [first] and not (tmp_path / "best_model.pt").exists()
    assert ck.prune(tmp_path, 1) == []
