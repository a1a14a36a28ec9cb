"""board.py: what TensorBoard reads back of layout, settings, hparams, histograms and slices, and the projector's files."""

import io
import sys

import numpy as np
import pytest
import torch
from tiny import tiny_store

import board
from config import Config
from errors import RunError
from logger import RunLogger
from runs import PROJECTOR_FILES

ROWS = [{"slice": "target", "group": "warm", "num_users": 1200, "hr@10": 0.25, "ndcg@10": 0.125}]


def events_of(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder), size_guidance={"tensors": 0, "histograms": 0})
    return found.Reload()


def drawn(folder, show):
    pytest.importorskip("tensorboard")
    log = RunLogger(None, folder, console=False)
    log.draw(show)
    log.close()
    return events_of(folder)


def test_layout_has_four_charts_of_scalars_that_are_written():
    (charts,) = board.LAYOUT.values()
    assert len(charts) == 4
    from logger import _TRAIN_TAGS

    evaluated = {"Loss/valid", "eval/hr@10", "eval/ndcg@10", "eval/score"}
    assert {tag for _, tags in charts.values() for tag in tags} <= set(_TRAIN_TAGS.values()) | evaluated


def test_start_evaluation_and_hparams(tmp_path):
    model = torch.nn.Linear(3, 2)
    config = Config()

    def show(writer):
        board.write_start(writer, "model:\n  hidden_units: 64\n")
        board.write_evaluation(writer, 7, ROWS, model)
        board.write_hparams(writer, config.to_dict(), {"hr@10": 0.5, "ndcg@10": 0.25, "score": float("nan"), "split": "test"})

    found = drawn(tmp_path, show)
    tags = found.Tags()
    assert "custom_scalars__config__" in tags["tensors"]
    text = {tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in tags["tensors"] if "text_summary" in tag}
    assert text["settings/text_summary"].splitlines()[1].strip() == "hidden_units: 64"
    assert "| target | warm | 1,200 | 0.2500 | 0.1250 |" in text["quality by slice/text_summary"]
    assert sorted(tags["histograms"]) == ["weights/bias", "weights/weight"] and found.Histograms("weights/weight")[0].step == 7
    session = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content.decode("latin-1")
    assert "model.hidden_units" in session and "paths.data_path" not in session


def test_figures_are_pictures_of_the_evaluation(tmp_path):
    image = pytest.importorskip("PIL.Image")
    rows = [ROWS[0] | {"ndcg_error": 0.01}, ROWS[0] | {"group": "cold", "num_users": 3, "ndcg@10": 0.0, "ndcg_error": None}]
    ranks = torch.tensor([1, 1, 3, 0, 0, 0, 0, 0])

    def show(writer):
        for step in (5, 9):
            board.write_figures(writer, step, rows, {"ndcg@10": 0.12}, ranks, 10)

    found = drawn(tmp_path, show)
    assert sorted(found.Tags()["images"]) == ["place of the target", "quality by slice"]
    for tag in found.Tags()["images"]:
        assert [event.step for event in found.Images(tag)] == [5, 9]
        picture = image.open(io.BytesIO(found.Images(tag)[-1].encoded_image_string))
        assert picture.size[0] == 640 and len(found.Images(tag)[-1].encoded_image_string) < 40_000


def test_no_pillow_costs_the_pictures_alone(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    monkeypatch.setitem(sys.modules, "PIL", None)
    log = RunLogger(None, tmp_path)
    for step in (1, 2):
        log.draw(lambda writer: board.write_evaluation(writer, step, ROWS, None))
        log.draw(lambda writer: board.write_figures(writer, step, [], {"ndcg@10": 0.1}, torch.tensor([1]), 10))
    log.close()
    out = capsys.readouterr().out
    assert out.count("warning: no pictures in TensorBoard") == 1 and "pip install pillow, or --no-tensorboard_figures" in out
    assert len(events_of(tmp_path).Tensors("quality by slice/text_summary")) == 2


def test_histograms_only_on_demand(tmp_path):
    assert drawn(tmp_path, lambda writer: board.write_evaluation(writer, 1, ROWS, None)).Tags()["histograms"] == []


def test_projector(tmp_path):
    store = tiny_store(num_items=6)
    counts, items = np.array([0, 5, 9, 0, 7, 1, 3]), np.array([1, 2, 4, 5, 6])
    vectors = torch.arange(10.0).view(5, 2)
    assert board.write_projector(tmp_path / "tb", store, items, vectors, counts, 3) == 3
    config, tensors, metadata = ((tmp_path / "tb" / name).read_text() for name in PROJECTOR_FILES)
    assert [[float(x) for x in line.split("\t")] for line in tensors.splitlines()] == [[2, 3], [4, 5], [0, 1]]  # items 2, 4, 1
    lines = [line.split("\t") for line in metadata.splitlines()]
    assert lines[0] == ["item", "popularity", "colour", "tags"] and [line[:2] for line in lines[1:]] == [
        ["1002", "9"],
        ["1004", "7"],
        ["1001", "5"],
    ]
    assert all(len(line) == 4 for line in lines) and str(store.item_single[4, 0] or "") == lines[2][2]
    assert f'tensor_path: "{PROJECTOR_FILES[1]}"' in config and f'metadata_path: "{PROJECTOR_FILES[2]}"' in config
    assert board.write_projector(tmp_path / "tb", store, items, vectors, counts, 100) == 5


def test_names_cannot_break_the_table(tmp_path):
    store = tiny_store(num_items=2)
    store.raw_item_ids = ["", "a\tb\nc", "d"]
    board.write_projector(tmp_path, store, np.array([1, 2]), torch.zeros(2, 2), np.array([0, 2, 1]), 5)
    lines = (tmp_path / PROJECTOR_FILES[2]).read_text().splitlines()
    assert len(lines) == 3 and lines[1].startswith("a b c\t2\t")


def test_a_full_disk_ends_no_run(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    log = RunLogger(None, tmp_path)

    def fail(writer):
        raise RunError("x: no space left to write.\nFree some space.")

    log.draw(fail)
    log.close()
    assert "warning: x: no space left to write." in capsys.readouterr().out
    RunLogger(None, None).draw(fail)  # without TensorBoard nothing is called
