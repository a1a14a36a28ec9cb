"""compatibility.py: what differs is named, and --allow_other_data is refused without and taken with."""

import pickle
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import pytest
import test_main
import torch
from test_main import World, assert_mistake, contents, interrupt_at, places
from test_trainer import make_trainer
from tiny import tiny_store

import checkpoint as checkpoints
import compatibility
import parallel
import trainer
from checkpoint_meta import SHAPE
from compatibility import layout_differences
from features import Field
from synthetic import generate

ITEM = Field("item_id", "item", "single", 0, 80, 8, 80)
COLOUR = Field("colour", "item", "single", 80, 3, 8, 3)


def rows(*fields: Field) -> list[dict]:
    return [asdict(field) for field in fields]


def test_each_feature_that_differs_is_named_with_its_values():
    there = rows(ITEM, COLOUR)
    assert layout_differences(there, there) == []
    larger = replace(ITEM, size=90, values=90), replace(COLOUR, offset=90)  # what lies behind it moves, and is the same
    assert layout_differences(there, rows(*larger)) == ["item_id: 80 values in the checkpoint, 90 in the data"]
    assert layout_differences(there, rows(ITEM)) == ["colour: in the checkpoint, not in the data"]
    assert layout_differences(rows(ITEM), there) == ["colour: in the data, not in the checkpoint"]
    assert layout_differences(there, rows(ITEM, replace(COLOUR, kind="multi"))) == ["colour: single in the checkpoint, multi in the data"]
    assert layout_differences(there, rows(ITEM, replace(COLOUR, side="user"))) == ["colour: item in the checkpoint, user in the data"]
    assert layout_differences(there, rows(COLOUR, ITEM)) == ["the same features in another order or other widths"]
    many = rows(ITEM, *(replace(COLOUR, name=f"f{n}") for n in range(1234)))
    found = layout_differences(rows(ITEM), many)
    assert found[:3] == [f"f{n}: in the data, not in the checkpoint" for n in range(3)] and found[3:] == ["and 1,231 more"]
    hashed = rows(replace(ITEM, size=7, hash=1), replace(ITEM, size=5, hash=2))
    assert layout_differences(hashed, rows(*(replace(ITEM, size=size, values=90, hash=n) for n, size in ((1, 7), (2, 5))))) == [
        "item_id: 80 values in the checkpoint, 90 in the data"
    ]


def test_a_refusal_says_whether_settings_or_data_differ(tmp_path):
    make_trainer(tmp_path / "a").fit()
    start = checkpoints.newest_valid(tmp_path / "a")
    data = "item_id: 30 values in the checkpoint, 31 in the data"
    store = tiny_store(num_users=40, num_items=31, max_events=12)
    for settings, words in (
        ({"store": store}, f"a checkpoint of other data ({data}).\nGive its data, or another checkpoint."),
        ({"hidden_units": 32},
         "a checkpoint of another model (hidden_units: 16 there, 32 here).\nGive its settings, or another checkpoint."),
        ({"store": store, "hidden_units": 32},
         f"a checkpoint of another model (hidden_units: 16 there, 32 here; {data}).\nGive its settings and data, or another checkpoint."),
    ):  # fmt: skip
        with pytest.raises(ValueError) as error:
            make_trainer(tmp_path / "b", resume_from=start, **settings).take_up()
        assert str(error.value) == f"{start}: {words}"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """A folder with data, the same data with other creative ids (renumbered/), and an interrupted run of the first (log, ckpt)."""
    cwd = tmp_path_factory.mktemp("other")
    generate(cwd / "data", 60, 80, "jsonl", max_length=10, mean_length=7)
    shutil.copytree(cwd / "data", cwd / "renumbered")
    index = pickle.loads((cwd / "data/indexer.pkl").read_bytes())
    index["i"] = {creative + 10**6: number for creative, number in index["i"].items()}
    (cwd / "renumbered/indexer.pkl").write_bytes(pickle.dumps(index))
    test_main.train_small(cwd, test_main.SMALL)
    made = World(cwd, ("--config", "small.yaml", "--data_path", "data"))
    with mock.patch.object(trainer.Trainer, "_update", interrupt_at(2)):
        assert made.run(*places(Path("stopped"))).status == 130
    return made


OTHER = ("--data_path", "renumbered")


@pytest.mark.parametrize(
    "flags",
    [("--resume",), ("--state_dict_path", "ckpt/best_model.pt"), ("--inference_only", "--state_dict_path", "ckpt/best_model.pt")],
    ids=lambda flags: flags[0],
)
def test_other_items_are_refused_and_then_allowed(world, flags):
    folder = world.cwd / ("stopped" if "--resume" in flags else flags[0].strip("-"))
    before = contents(folder) if folder.exists() else {}
    words = "trained on 80 items of other creative ids"
    assert_mistake(world.run(*places(folder), *OTHER, *flags), words, "--allow_other_data to take it all the same")
    if "--resume" in flags:
        assert contents(folder) == before
    more = () if "--resume" in flags else ("--overwrite",) if "--inference_only" not in flags else ()
    result = world.run(*places(folder), *OTHER, *flags, *more, "--allow_other_data")
    assert result.status == 0, result.err
    said = f"warning: --allow_other_data: global_step3.valid_loss=nan was {words}; going on."
    assert (said in result.out) == ("--resume" in flags)


def test_other_users_are_refused_on_resume_all_the_same(world):
    """Their order decides what is trained on next: there is nothing to go on with."""
    generate(world.cwd / "more", 61, 80, "jsonl", max_length=10, mean_length=7)
    result = world.run(*places(world.cwd / "stopped"), "--data_path", "more", "--resume", "--allow_other_data")
    assert result.status == 2 and "Traceback" not in result.err


# ---- what the bits depend on ----


def started_as(meta: dict, now: dict, monkeypatch) -> str | None:
    monkeypatch.setattr(compatibility, "computed_on", lambda device: now)
    return compatibility.other_bits(meta, torch.device("cpu"))


def test_what_changes_the_bits_is_said_in_one_line_and_nothing_where_all_is_equal(monkeypatch):
    then = {"torch": "2.10.0", "device": "cpu", "cpu_capability": "AVX2", "threads": 2, "numba": True, "products": "torch"}
    assert started_as(then, then, monkeypatch) == ""
    assert started_as({"torch": "2.10.0"}, then, monkeypatch) == ""  # of before the other keys
    line = "goes on, bit for bit no longer promised: torch 2.10.0 then, 2.13.0 now"
    for meta in (then, {"torch": "2.10.0"}):
        assert started_as(meta, then | {"torch": "2.13.0"}, monkeypatch) == line
    now = {"torch": "2.13.0", "device": "cpu", "cpu_capability": "AVX512", "threads": 1, "numba": False, "products": "own"}
    rest = "CPU capability AVX2 then, AVX512 now; threads 2 then, 1 now; numba there then, not there now; products torch then, own now"
    assert started_as(then, now, monkeypatch) == f"{line}; {rest}"
    now_cuda = {"torch": "2.10.0", "device": "NVIDIA H100"}
    assert started_as(then, now_cuda, monkeypatch) == "goes on, bit for bit no longer promised: device cpu then, NVIDIA H100 now"
    assert started_as(now, now | {"numba": True}, monkeypatch).endswith("numba not there then, there now")


def test_what_the_present_process_computes_on(monkeypatch):
    """Asked for inside and outside the training loop, which is where checkpoints are written and read."""
    device = torch.device("cpu")
    found = compatibility.computed_on(device)
    assert set(found) == {"torch", "device", "cpu_capability", "threads", "numba", "products"} and all(
        f"{key}?" in SHAPE for key in set(found) - {"torch"}
    )
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads() and found["device"] == "cpu"
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with parallel.cores(4):  # torch's own threads are fewer there
            assert compatibility.computed_on(device)["threads"] == 4
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(compatibility, "usable_numba", lambda: None)
    assert compatibility.computed_on(device)["numba"] is False


def test_a_resumed_run_says_what_changes_its_bits(tmp_path, monkeypatch):
    pytest.importorskip("numba")
    make_trainer(tmp_path / "a", max_steps=2).fit()
    start = checkpoints.newest_valid(tmp_path / "a")
    found, capability = [], torch.backends.cpu.get_cpu_capability()
    for name in ("same", "other", "older"):
        resumed = make_trainer(tmp_path / name, resume_from=start, max_steps=4)
        monkeypatch.setattr(resumed.logger, "warn_once", lambda text, **_: found.append(text))
        if name == "other":
            monkeypatch.setattr(compatibility, "usable_numba", lambda: None)
            monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "NONE")
        if name == "older":
            monkeypatch.setattr(checkpoints, "read_meta", older(checkpoints.read_meta))
        resumed.take_up()
    assert [text for text in found if "bit for bit" in text] == [
        f"goes on, bit for bit no longer promised: CPU capability {capability} then, NONE now; numba there then, not there now"
    ]


def older(read):
    """read_meta of a checkpoint of before these keys."""
    return lambda path: {key: value for key, value in read(path).items() if key not in ("cpu_capability", "threads", "device", "numba")}
