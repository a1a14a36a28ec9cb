"""estimate.py and `main.py --estimate`: within 15 % of a run that is measured; parts by hand; what does not fit; nothing is written."""

import os
import re
import subprocess
import sys
import time
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from tiny import tiny_store

import estimate
import main
from config import KEYS, Config, with_values
from dataset import make_splits
from errors import UserError
from estimate import Data, Estimate, Phase, Remedy, estimate_run, num_checkpoints, size, tensor_bytes
from features import TableLayout
from machine import Machine
from settings import load_config
from synthetic import generate

MIB, GIB = 2**20, 2**30
CPU = torch.device("cpu")
SMALL = {
    "hidden_units": 8,
    "num_blocks": 1,
    "max_seq_length": 8,
    "batch_size": 4,
    "num_negatives": 4,
    "eval_batch_size": 4,
    "tensorboard": False,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("estimate")
    generate(folder / "data", users=2000, items=40_000, layout="parquet", seed=3, embeddings=["81"])
    return folder


def of_tiny(store=None, **values) -> Estimate:
    """The estimate of a tiny store in memory."""
    config = with_values(Config(), **SMALL | values)
    store = store or tiny_store(num_users=60)
    store.manifest = {"arrays": {"item_ids": {"dtype": "<i4", "shape": [len(store.item_ids)]}}}
    splits = make_splits(store, protocol="holdout", holdout_fraction=0.2, target="last", seed=1)
    opened = Data(store, splits, TableLayout.from_store(store, config.model), ("81",))
    return estimate_run(config, lambda: opened, CPU)


# ---- beside a run that is measured ----

WIDE = [
    "--embedding_dim",
    "1024",
    "--hidden_units",
    "16",
    "--num_blocks",
    "1",
    "--max_steps",
    "10",
    "--max_eval_users",
    "100",
    "--num_threads",
    "1",
]


def start(folder: Path, *flags: object) -> subprocess.Popen:
    environ = {name: value for name, value in os.environ.items() if name not in {key.env for key in KEYS.values()}}
    places = ("--cache_path", "cache", "--log_path", "log", "--checkpoint_path", "ckpt", "--tensorboard_path", "tb")
    command = [sys.executable, ROOT / "main.py", "--data_path", "data", *places, *WIDE, *flags]
    return subprocess.Popen([*map(str, command)], cwd=folder, env=environ | {"OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


def measured(process: subprocess.Popen) -> dict[str, int]:
    """Peaks of a process's RssAnon and RssFile, looked at every 10 ms, and its VmHWM; bytes."""
    peaks = dict.fromkeys(("RssAnon", "RssFile", "VmHWM"), 0)
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], int(value.split()[0]) << 10)
        time.sleep(0.01)
    assert process.returncode == 0, process.stdout.read()
    return peaks


def in_bytes(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"MiB": MIB, "GiB": GIB}[unit]


@pytest.mark.parametrize("flags", [("--table_optimizer", "adam"), ("--loss", "bce", "--num_negatives", "1")])
def test_within_15_percent_of_what_is_measured(data: Path, flags: tuple) -> None:
    process = start(data, "--estimate", *flags)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and text.rstrip().endswith("fits"), text
    expected = in_bytes(re.search(r"RssAnon\) +([\d.]+ \w+)", text)[1])
    peaks = measured(start(data, "--overwrite", *flags))
    table = in_bytes(re.search(r"^table +([\d.]+ \w+)", text, re.MULTILINE)[1])
    assert (table > 0.25 * expected) == (flags[0] == "--loss")  # what is large: the table here, its optimiser's state there
    assert abs(expected / peaks["RssAnon"] - 1) < 0.15, (expected, peaks, text)
    # A lower bound of what was not files, should a peak fall between two looks: files are at their peak at another moment.
    assert expected > 0.85 * (peaks["VmHWM"] - peaks["RssFile"]), (expected, peaks)
    folders = list((data / "ckpt").glob("global_step*"))
    disk = in_bytes(re.search(r"checkpoints of ([\d.]+ \w+)", text)[1])
    written = sum(file.stat().st_size for file in folders[0].iterdir())
    assert disk == pytest.approx(written, rel=0.02)


# ---- the command ----


def run(folder: Path, *flags: object, monkeypatch: pytest.MonkeyPatch) -> int:
    words = ["main.py", "--data_path", "data", "--cache_path", "cache", "--device", "cpu", *map(str, flags), "--estimate"]
    monkeypatch.setattr(sys, "argv", words)
    for key in KEYS.values():
        monkeypatch.delenv(key.env or "X", raising=False)
    with chdir(folder):
        return main.main()


def test_it_writes_nothing_but_the_store(tmp_path: Path, monkeypatch, capsys) -> None:
    generate(tmp_path / "data", users=100, items=200, layout="jsonl", seed=3)
    assert run(tmp_path, "--hidden_units", 8, "--batch_size", 16, monkeypatch=monkeypatch) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data"]
    out = capsys.readouterr().out
    for words in (
        "joint table",
        "item_id",
        "training step",
        "state of the table",
        "maps of the store",
        "timestamps",
        "checkpoints of",
        "\nfits\n",
    ):
        assert words in out
    assert max(map(len, out.splitlines())) <= 140


def test_it_says_what_does_not_fit_and_ends_with_status_1(data: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(estimate, "read_machine", lambda folder, device: Machine(300 * MIB, "a small machine", 0, 10 * MIB, folder))
    flags = ("--embedding_dim", 2048, "--table_optimizer", "adam", "--hidden_units", 8, "--max_steps", 2)
    assert run(data, *flags, monkeypatch=monkeypatch) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("does not fit")]
    assert len(lines) == 2
    assert re.match(r"does not fit: anonymous memory \(RssAnon\): needs [\d.]+ GiB, has 300.0 MiB; lower ", lines[0])
    assert "table_optimizer to rowwise_adam (saves about" in lines[0] and "embedding_dim to 1024" in lines[0]
    assert lines[1].startswith("does not fit: disk, 2 checkpoints of") and "keep_last_k" in lines[1]


def test_a_table_that_no_machine_holds(data: Path, monkeypatch, capsys) -> None:
    flags = ("--hash_rows", 400_000_000, "--embedding_dim", 1024, "--hidden_units", 8, "--max_steps", 2, "--batch_size", 16)
    assert run(data, *flags, monkeypatch=monkeypatch) == 1
    out = capsys.readouterr().out
    assert "embedding_dim to 512 (saves about 76" in out and re.search(r"^table +1525\.\d+ GiB", out, re.MULTILINE)


def test_mistakes_are_said_as_in_a_run(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UserError, match="no such folder"):
        run(tmp_path, monkeypatch=monkeypatch)


def test_the_flag() -> None:
    assert load_config(["--estimate"], {}, Path("/nowhere")).options.estimate and not load_config([], {}, Path("/nowhere")).options.estimate


# ---- parts by hand ----


@pytest.mark.parametrize("values", [{"loss.name": name} for name in ("bce", "sampled_softmax", "full_softmax")] + [
    {"table_optimizer": "adam", "optimizer": "adam"}, {"table_optimizer": "rowwise_adagrad", "precision": "bf16"},
    {"gradient_checkpointing": True, "num_workers": 0}, {"position": "learned", "norm_first": False, "similarity": "dot", "user_id": True},
    {"optimizer": "muon", "ema_decay": 0.9, "accumulate_steps": 3}, {"position": "relative", "time_bias": True},
    {"backbone": "hstu", "num_experts": 4, "norm": "rmsnorm"}, {"item_tower": "sum", "logq": False, "baselines": False},
    {"hash_rows": (7, 5), "feature_width": "auto"},
])  # fmt: skip
def test_every_setting_can_be_followed(values: dict) -> None:
    values = {key.removeprefix("loss."): value for key, value in values.items()}
    found = of_tiny(**values)
    names = ["training", "validation", "checkpoint", "test", "baselines"]
    assert [phase.name for phase in found.phases] == names[: 4 + values.get("baselines", True)]
    assert all(phase.memory >= found.runtime for phase in found.phases) and not found.cuda
    assert found.parts[estimate.TABLE] == sum(4 * (part.end - part.begin) * part.width for part in found.layout.parts)
    assert all(num >= 0 for num in found.parts.values()), found.parts


def test_an_average_takes_a_second_table_and_a_third_while_it_is_used() -> None:
    wide = {"embedding_dim": 64, "hash_rows": (1_000_000,)}
    plain, averaged = of_tiny(**wide), of_tiny(**wide, ema_decay=0.9)
    table, dense = plain.parts[estimate.TABLE], plain.parts[estimate.DENSE]
    assert averaged.parts[estimate.AVERAGE] == table + dense and estimate.AVERAGE not in plain.parts
    assert averaged.checkpoint == plain.checkpoint + 2 * (table + dense)
    runtimes = averaged.runtime - plain.runtime
    more = {a.name: (b.memory - a.memory - runtimes) / table for a, b in zip(plain.phases, averaged.phases)}
    assert {name: round(tables, 1) for name, tables in more.items()} == {
        "training": 1.0, "validation": 2.0, "checkpoint": 2.0, "test": 1.0, "baselines": 1.0}  # fmt: skip
    assert any(remedy.setting == "ema_decay to 0" for remedy in averaged.remedies)


def test_parts() -> None:
    rowwise, full = of_tiny(optimizer="adamw"), of_tiny(table_optimizer="adam")
    rows = rowwise.layout.num_rows
    assert rowwise.parts[estimate.TABLE] == 4 * 8 * rows and rowwise.parts[estimate.TABLE_STATE] == 4 * rows
    assert full.parts[estimate.TABLE_STATE] == 2 * 4 * 8 * rows
    dense = rowwise.parts[estimate.DENSE]
    # two moments, and a step number a tensor
    assert 2 * dense < rowwise.parts[estimate.DENSE_STATE] < 2.1 * dense
    assert dense < full.parts[estimate.DENSE_STATE] < 1.9 * dense  # muon: one moment of the matrices
    assert rowwise.checkpoint == sum(
        rowwise.parts[name] for name in (estimate.TABLE, estimate.TABLE_STATE, estimate.DENSE, estimate.DENSE_STATE)
    )
    assert rowwise.maps["item_ids"] == 4 * len(tiny_store(num_users=60).item_ids) and set(rowwise.maps) > {"emb_81/matrix"}


def test_lengths_for_a_larger_catalogue() -> None:
    with estimate.Footprint():
        tree = (
            torch.from_numpy(np.zeros(7, np.int32)),
            torch.zeros(10, 3),
            (torch.zeros(11), None, (1, 4, 7)),
            torch.zeros(8),
            torch.zeros(1),
        )
        (rows, matrix, (ends, nothing, places), starts, one) = estimate._enlarged(tree, 10, 1000)
    assert [len(t) for t in (rows, ends, starts, one)] == [700, 1001, 701, 1] and matrix.shape == (1000, 3)
    assert rows.dtype == torch.int32 and nothing is None and places == (1, 400, 700)


def test_activations_grow_with_the_batch() -> None:
    store = tiny_store(num_users=400, num_items=3000, min_events=8, max_events=8)
    small, large = (of_tiny(store, batch_size=size, hidden_units=64).parts[estimate.ACTIVATIONS] for size in (50, 200))
    assert 3 < large / small < 4.5


def test_a_part_of_a_large_catalogue_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    store = tiny_store(num_users=200, num_items=6000, min_events=6, max_events=8)
    values = {"name": "full_softmax", "hidden_units": 32}
    whole = of_tiny(store, **values)
    monkeypatch.setattr(estimate, "WHOLE_CATALOGUE", 1500)
    part = of_tiny(store, **values)
    assert part.parts[estimate.ACTIVATIONS] == pytest.approx(whole.parts[estimate.ACTIVATIONS], rel=0.1)


@pytest.mark.parametrize(("values", "expected"), [
    ({"keep_last_k": 3, "num_epochs": 10}, 5),  # 3, the best, the one being written
    ({"keep_last_k": 3, "num_epochs": 2}, 3), ({"keep_last_k": 1, "num_epochs": 1}, 2), ({"keep_last_k": 0, "num_epochs": 7}, 7),
    ({"keep_last_k": 0, "num_epochs": 2, "save_every_steps": 30}, 8), ({"keep_last_k": 2, "max_steps": 10, "num_epochs": 9}, 2),
])  # fmt: skip
def test_checkpoints_on_the_disk(values: dict, expected: int) -> None:
    assert num_checkpoints(with_values(Config(), **values), num_batches=100) == expected


def made(**values) -> Estimate:
    plain = {"title": "t", "layout": TableLayout(()), "runtime": 0, "parts": {estimate.TABLE: 0}, "maps": {}, "remedies": (), "notes": (),
             "phases": (Phase("training", 100 * MIB),), "checkpoint": 10, "num_checkpoints": 2,
             "machine": Machine(200 * MIB, "here", 0, 30, Path("x"))}  # fmt: skip
    return Estimate(**plain | values)


def test_verdict() -> None:
    assert made().lacking() == [] and made().text().endswith("\nfits") and "GPU" not in made().text()
    tight = made(machine=Machine(99 * MIB, "here", 0, 19, Path("x")))
    assert len(tight.lacking()) == 2 and "lower batch_size and embedding_dim." in tight.lacking()[0]
    gpu = made(phases=(Phase("training", MIB, 90 * MIB),), machine=Machine(2 * MIB, "here", 80 * MIB, 30, Path("x")),
               remedies=(Remedy("batch_size to 64", 20 * MIB),))  # fmt: skip
    assert gpu.lacking() == ["does not fit: GPU memory: needs 90.0 MiB, has 80.0 MiB; lower batch_size to 64 (saves about 20.0 MiB)."]
    assert "GPU memory" in gpu.text()
    assert (size(1024), size(1536 * MIB)) == ("0.0 MiB", "1.50 GiB")


def test_remedies_lower_the_phase_that_is_the_peak() -> None:
    store = tiny_store(num_users=20)
    config = with_values(Config(), **SMALL, table_optimizer="adam", user_id=True)
    layout = TableLayout.from_store(store, config.model)
    whole = estimate.table_bytes(layout)
    parts = {estimate.TABLE: whole, estimate.TABLE_STATE: 2 * whole, estimate.ACTIVATIONS: 4000 * MIB, estimate.BATCHES: 0}
    phases = [Phase("training", 5000 * MIB), Phase("validation", 1000 * MIB), Phase("checkpoint", 900 * MIB), Phase("test", 1000 * MIB)]
    opened = SimpleNamespace(store=store, layout=layout)
    assert estimate._remedies(config, opened, parts, phases)[0] == Remedy("batch_size to 2", 2000 * MIB)
    phases[1], phases[3] = Phase("validation", 6000 * MIB), Phase("test", 6000 * MIB)  # then a smaller training batch is of no use
    found = estimate._remedies(config, opened, parts, phases)
    assert found[0] == Remedy("eval_batch_size to 2", 1000 * MIB)  # down to training's 5,000
    assert not any(remedy.setting.startswith("batch_size") for remedy in found)
    names = {remedy.setting.split()[0]: remedy.saving for remedy in found}
    assert names["table_optimizer"] == 2 * whole - 4 * layout.num_rows
    assert names["user_id"] == 3 * 4 * 8 * 20 and names["embedding_dim"] == 3 * whole // 2


def test_tensor_bytes_counts_a_storage_once() -> None:
    x = torch.zeros(10, 4)
    assert tensor_bytes({"a": [x, x[2:]], "b": (x.T, torch.zeros(3)), "c": 5}) == 160 + 12


def test_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "caching_malloc", lambda: True)
    notes = " ".join(estimate._notes(with_values(Config(), compile=True)))
    assert "tcache_count=0" in notes and "without compile" in notes and "pyarrow" in notes
    monkeypatch.setattr(estimate, "caching_malloc", lambda: False)
    assert "tcache" not in " ".join(estimate._notes(Config()))
