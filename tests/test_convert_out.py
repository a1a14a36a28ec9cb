"""The folder that convert.py writes: what it does not overwrite, and what a failure leaves."""

import os
from pathlib import Path

import pytest
from test_convert import Folder, put, refused, run

import convert


def test_out_is_protected(tmp_path: Path, out: Path) -> None:
    source = put(tmp_path / "x.txt", "1 1 2\n")
    run("s3rec", source, out)
    refused("s3rec", source, out, "not empty", "--overwrite")
    put(out / "seq/part-00099.parquet", "stale")
    longer = put(tmp_path / "y.txt", "1 1 2 3\n")
    assert len(run("s3rec", longer, out, overwrite=True).indexer["i"]) == 3
    assert [path.name for path in (out / "seq").iterdir()] == ["part-00000.parquet"]
    put(out / "thesis.txt", "mine")
    refused("s3rec", source, out, "thesis.txt", "did not write", overwrite=True)
    assert (out / "thesis.txt").read_text() == "mine"
    refused("s3rec", source, put(out.parent / "file", "x"), "a file", overwrite=True)


def test_a_failed_overwrite_leaves_the_old_result(tmp_path: Path, out: Path) -> None:
    run("s3rec", put(tmp_path / "x.txt", "1 1 2\n"), out)
    refused("s3rec", put(tmp_path / "bad.txt", "1 1 x\n"), out, "bad.txt:1", overwrite=True)
    assert len(Folder(out).indexer["i"]) == 2


@pytest.mark.parametrize("moved", range(len(convert.WRITTEN)))
def test_an_overwrite_that_is_cut_short_is_no_mixture(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, moved: int) -> None:
    run("s3rec", put(tmp_path / "x.txt", "1 1 2\n"), out)
    longer, replace, done = put(tmp_path / "longer.txt", "1 1 2 3\n"), os.replace, []

    def cut(source: Path, target: Path) -> None:
        if len(done) == moved:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(convert.os, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            run("s3rec", longer, out, overwrite=True)
    assert not (out / "seq").exists()  # so that nothing reads old files beside new ones
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".tmp-")] == []
    assert len(run("s3rec", longer, out, overwrite=True).indexer["i"]) == 3


def test_full_disk_is_a_run_error(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert.pq, "write_table", full)
    assert convert.main(["s3rec", str(put(tmp_path / "x.txt", "1 1 2\n")), str(out)]) == 1
    assert "no space left" in capsys.readouterr().err
    assert list(out.parent.iterdir()) == []  # no temporary folder stays behind
