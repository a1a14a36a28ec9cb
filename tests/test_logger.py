"""logger.py: train.log, TensorBoard, the console, full disks, memory."""

import contextlib
import errno
import fcntl
import io
import json
import os
import pty
import re
import resource
import struct
import termios
import threading

import numpy as np
import pytest
import torch

import logger
from logger import RunLogger, format_duration, format_table, read_train_log, run_seconds, train_text

RECORD = {"global_step": 10, "loss": 0.5, "epoch": 1, "lr": 1e-3, "grad_norm": 0.25, "users_per_s": 1234.0, "data_wait": 0.031}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: [(event.step, pytest.approx(event.value, rel=1e-6)) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


# ---- train.log ----------------------------------------------------------------------------------------------------------


def test_train_lines_are_json_with_the_promised_keys(tmp_path):
    log = RunLogger(tmp_path, None, console=False)
    log.train_line(RECORD | {"extra": np.float32(0.5)})
    log.train_line({"global_step": 20, "loss": torch.tensor(float("nan")), "epoch": 2})
    first, second = lines(tmp_path / "train.log")  # readable before close: a killed run loses no line
    assert list(first)[:4] == ["global_step", "loss", "epoch", "time"]
    assert {key: first[key] for key in RECORD} == RECORD and first["extra"] == 0.5 and first["time"] > 1.7e9 and first["rss_gib"] > 0
    assert second["loss"] is None and second["global_step"] == 20
    log.close()
    log.close()


def test_eval_line_names_its_split_and_keeps_loss_for_training(tmp_path):
    log = RunLogger(tmp_path, None, console=False)
    log.eval_line(30, 1, "valid", {"loss": 2.0, "hr@10": 0.125})
    (line,) = lines(tmp_path / "train.log")
    del line["time"], line["run_seconds"]
    assert line == {"global_step": 30, "epoch": 1, "split": "valid", "valid_loss": 2.0, "hr@10": 0.125}


@pytest.mark.parametrize(("tail", "kept"), [('{"global_step": 2, "lo', 1), ('{"global_step": 2, "loss": 1.0}', 2), ("", 1)])
def test_a_cut_last_line_is_mended_and_appended_to(tmp_path, tail, kept):
    path = tmp_path / "train.log"
    path.write_text('{"global_step": 1, "loss": 2.0}\n' + tail)
    out = io.StringIO()
    log = RunLogger(tmp_path, None, stream=out)
    log.train_line({"global_step": 3, "loss": 0.5, "epoch": 1})
    assert [line["global_step"] for line in lines(path)] == [1, 2, 3][:kept] + [3] * (kept < 3)
    assert ("cut an unfinished last line of 22 bytes" in out.getvalue()) == (kept == 1 and bool(tail))


def test_run_seconds_leave_out_the_pause_before_a_resumed_process(tmp_path, monkeypatch):
    """Two processes of 30 s and 20 s with 1,000 s between them; the second one does step 20 again."""
    clock = [5000.0]
    monkeypatch.setattr(logger.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(logger.time, "time", lambda: 1e9 + clock[0])
    for start, steps in ((5000.0, (10, 20)), (6030.0, (20, 30))):
        clock[0] = start
        log = RunLogger(tmp_path, None, console=False)
        for step, later in zip(steps, (10, 20)):
            clock[0] = start + later
            log.train_line({"global_step": step, "loss": 1.0})
        if start == 5000.0:
            clock[0] = start + 30
            log.eval_line(20, 1, "valid", {"hr@10": 0.5})
            assert run_seconds(tmp_path / "train.log") == 30
    assert [line["run_seconds"] for line in lines(tmp_path / "train.log")] == [10, 20, 30, 40, 50]
    assert run_seconds(tmp_path / "train.log") == 50 and lines(tmp_path / "train.log")[-1]["time"] == 1e9 + 6050


def test_run_seconds_of_older_and_of_odd_logs(tmp_path):
    path = tmp_path / "train.log"
    assert run_seconds(path) is None
    for content, expected in (
        ("", None),
        ("{}\n", None),
        ('"time"\n', None),
        ('{"time": 5}\n', 0.0),
        ('{"time": 5}\n[1]\n{"time": 65.5}\n{"time": "x"}\n', 60.5),
        ('{"run_seconds": 0}\n', 0.0),
        ('{"time": 5}\n{"run_seconds": 7, "time": 99}\n{"global_st', 7.0),
        ('{"run_seconds": NaN, "time": 1}\n', 0.0),
    ):
        path.write_text(content)
        assert run_seconds(path) == expected, content
    # An older run that is gone on with: what it took so far is what its lines say.
    path.write_text('{"global_step": 1, "time": 100.0}\n{"global_step": 2, "time": 160.0}\n')
    log = RunLogger(tmp_path, None, console=False)
    log.train_line({"global_step": 3, "loss": 1.0})
    assert 60 <= run_seconds(path) < 70


def test_run_seconds_of_a_long_log_reads_its_ends_only(tmp_path):
    path = tmp_path / "train.log"
    with open(path, "wb") as file:
        file.write(b'{"global_step": 1, "time": 0.0, "run_seconds": 1.0}\n')
        file.truncate(1 << 40)  # a hole of a tebibyte
        file.seek(0, 2)
        file.write(b'\n{"global_step": 9, "time": 9.0, "run_seconds": 8.0}\n')
    assert run_seconds(path) == 8


def test_read_train_log_gives_one_history(tmp_path):
    path = tmp_path / "train.log"
    rows = [{"global_step": 10}, {"global_step": 20}, {"global_step": 20, "split": "valid"}, {"global_step": 30}, {"global_step": 40}]
    rows += [{"global_step": 20, "split": "valid", "again": 1}, {"global_step": 30, "again": 1}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '[1]\nhalf {\n{"no": "step"}\n')
    assert read_train_log(path) == [rows[0], rows[1], rows[5], rows[6]]


def test_notes_stand_in_train_log_and_are_no_records(tmp_path):
    """Whoever reads the history, the time that the run took or a line at a time as JSON is not disturbed by them."""
    out = io.StringIO()
    log = RunLogger(tmp_path, None, stream=out)
    log.note("damaged checkpoint passed over: a/meta.json")
    log.note("said before", console=False)
    for _ in range(2):
        log.warn_once("other bits", keep=True)
        log.warn_once("a fan is loud")
    log.train_line({"global_step": 1, "loss": 0.5})
    log.note("the end")
    log.close()
    rows = lines(tmp_path / "train.log")
    notes = ["damaged checkpoint passed over: a/meta.json", "said before", "warning: other bits", None, "the end"]
    assert [row.get("note") for row in rows] == notes and all(set(row) == {"time", "note", "run_seconds"} for row in rows if "note" in row)
    assert [row["global_step"] for row in read_train_log(tmp_path / "train.log")] == [1]
    assert run_seconds(tmp_path / "train.log") == rows[-1]["run_seconds"]
    said = out.getvalue()
    assert "said before" not in said and said.count("warning: other bits") == 1 and "damaged checkpoint passed over: a/meta.json\n" in said


# ---- TensorBoard --------------------------------------------------------------------------------------------------------


def test_scalars_have_the_promised_tags(tmp_path):
    log = RunLogger(None, tmp_path, console=False)
    log.train_line(RECORD | {"rss_gib": 1.5})
    log.eval_line(10, 1, "valid", {"loss": 2.0, "hr@10": 0.25, "ndcg@10": 0.125, "score": 0.5})
    log.eval_line(10, 1, "test", {"hr@10": 0.75})
    log.close()
    expected = {
        "Loss/train": 0.5, "train/lr": 1e-3, "train/grad_norm": 0.25,
        "perf/users_per_s": 1234.0, "perf/data_wait": 0.031, "mem/rss_gib": 1.5,
        "Loss/valid": 2.0, "eval/hr@10": 0.25, "eval/ndcg@10": 0.125, "eval/score": 0.5, "test/hr@10": 0.75,
    }  # fmt: skip
    found = scalars(tmp_path)
    assert [step for step, _ in found.pop("time")] == [10]
    assert found == {tag: [(10, value)] for tag, value in expected.items()}


def test_a_resumed_run_purges_what_the_killed_one_wrote_after_its_checkpoint(tmp_path):
    first = RunLogger(None, tmp_path, console=False)
    for step in (10, 20, 30, 40):
        first.train_line({"global_step": step, "loss": 1.0})
    first.close()
    second = RunLogger(None, tmp_path, console=False, resume_step=20)
    second.train_line({"global_step": 30, "loss": 0.5})
    second.close()
    assert scalars(tmp_path)["Loss/train"] == [(10, 1.0), (20, 1.0), (30, 0.5)]


def test_tensorboard_is_imported_only_when_used(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)  # as if it were not installed
    RunLogger(None, None, console=False).train_line(RECORD)
    out = io.StringIO()
    log = RunLogger(tmp_path, tmp_path, stream=out)
    log.train_line(RECORD)
    log.train_line(RECORD)
    assert out.getvalue().count("no TensorBoard") == 1 and len(lines(tmp_path / "train.log")) == 2


# ---- a full disk --------------------------------------------------------------------------------------------------------


def test_train_log_on_a_full_disk_ends_with_one_warning_and_whole_lines(tmp_path):
    out = io.StringIO()
    log = RunLogger(tmp_path, None, stream=out)
    log.train_line(RECORD)
    real = log._file

    class Full:
        name, room = real.name, 7

        def write(self, data):
            if not self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.room -= real.write(data[: self.room])
            return 7

        def __getattr__(self, key):
            return getattr(real, key)

    log._file = Full()
    for _ in range(3):
        log.train_line(RECORD)
    assert len(lines(tmp_path / "train.log")) == 1
    assert out.getvalue().count("train.log ends here") == 1
    needed = max(len(json.dumps(line)) for line in lines(tmp_path / "train.log")) + 1
    found = re.search(r"(\S+): no space left to write \((\d+) bytes needed\)", out.getvalue())
    assert found.group(1) == str(tmp_path / "train.log") and abs(int(found.group(2)) - needed) < 20  # the line's, whose time differs
    assert out.getvalue().count("step 10") == 4  # the console goes on


def test_a_file_size_limit_ends_the_logs_and_not_the_run(tmp_path):
    """A real limit of the system, in a child: train.log and TensorBoard both give up, each with one warning."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
            out = io.StringIO()
            log = RunLogger(tmp_path, tmp_path / "tb", stream=out)
            for step in range(200):
                log.train_line(RECORD | {"global_step": step})
                log.flush()
            log.close()
            text = out.getvalue()
            counts = [text.count(part) for part in ("train.log ends here", "TensorBoard ends here", "step ")]
            named = [f"{tmp_path / place}: no space left to write (" in text for place in ("train.log", "tb")]
            code = 0 if counts == [1, 1, 200] and named == [True, True] and text.count(" bytes needed)") == 2 else 3
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert 0 < len(lines(tmp_path / "train.log")) < 200


def test_the_event_threads_full_disk_is_no_traceback(monkeypatch):
    """Its error comes again at the next write; other threads' errors, and other errors of it, are shown as ever."""
    shown = []
    monkeypatch.setattr(threading, "excepthook", lambda failure: shown.append(str(failure.exc_value)))
    for _ in range(2):
        logger._quiet_event_thread()

    class _AsyncWriterThread(threading.Thread):
        pass

    def fail(error):
        raise error

    for kind, error in (
        (_AsyncWriterThread, OSError(28, "full")),
        (threading.Thread, OSError(5, "other")),
        (_AsyncWriterThread, KeyError("k")),
    ):
        thread = kind(target=fail, args=(error,))
        thread.start()
        thread.join()
    assert shown == ["[Errno 5] other", "'k'"]


def test_a_log_that_cannot_be_opened_warns_and_goes_on(tmp_path):
    (tmp_path / "train.log").mkdir()
    out = io.StringIO()
    RunLogger(tmp_path, None, stream=out).train_line(RECORD)
    assert "train.log ends here" in out.getvalue() and "step 10" in out.getvalue()


def test_a_closed_console_does_not_stop_the_run(tmp_path):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "closed")

    log = RunLogger(tmp_path, None, stream=Closed())
    log.train_line(RECORD)
    log.train_line(RECORD)
    assert len(lines(tmp_path / "train.log")) == 2


# ---- console ------------------------------------------------------------------------------------------------------------


def test_train_text():
    text = train_text(RECORD | {"rss_gib": 1.5}, 6000, 3725)
    assert text == "step 10/6,000  epoch 1  loss 0.5000  lr 1.00e-03  grad 0.25  1,234 users/s  wait 3 %  mem 1.50 GiB  left 1:02:05"
    assert train_text({"global_step": 1, "loss": None}) == "step 1"


def test_time_left_comes_from_the_speed_so_far(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(logger.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    log = RunLogger(None, None, stream=out, total_steps=100)
    log.train_line({"global_step": 40, "loss": 1.0})  # a resumed run: its first steps say nothing
    clock[0] = 110.0
    log.train_line({"global_step": 60, "loss": 1.0})
    first, second = out.getvalue().splitlines()
    assert "left" not in first and second.endswith("left 0:00:20")


def test_format_duration():
    given = {0: "0:00:00", 59.9: "0:00:59", 3600: "1:00:00", 360_061: "100:01:01", -5: "0:00:00"}
    assert {seconds: format_duration(seconds) for seconds in given} == given


def test_time_left_counts_evaluations_apart_from_steps(monkeypatch):
    """Steps of a second, evaluations of a minute each 100 steps: right to the second once an evaluation was seen."""
    clock = [100.0]
    monkeypatch.setattr(logger.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    log = RunLogger(None, None, stream=out, total_steps=400)
    said = {}
    for step in range(1, 401):
        clock[0] += 1 if step > 1 else 9  # the first update compiles
        log.note_start(step)
        if step < 100:
            log.expect_pauses(0.9 * 6 * 60)  # what the trainer guesses is about right
        if step % 10 == 0:
            log.train_line({"global_step": step, "loss": 1.0})
            said[step] = out.getvalue().splitlines()[-1]
        if step % 100 == 0:
            clock[0] += 60
            log.note_pause(60.0, (400 - step) // 100 + 2)  # the test is as long as two of them
    truth = {step: 400 - step + 60 * (4 - (step - 1) // 100 + 2) for step in said}
    left = {step: (t := said[step].rsplit(" ", 1)[1].split(":")) and int(t[0]) * 3600 + int(t[1]) * 60 + int(t[2]) for step in said}
    assert all(abs(left[step] - truth[step]) <= 0.2 * truth[step] for step in said)
    assert said[110].endswith(f"left {format_duration(290 + 5 * 60)}")
    assert said[310].endswith(f"left {format_duration(90 + 3 * 60)}")
    assert said[400].endswith(f"left {format_duration(3 * 60)}")


def test_format_table_aligns_numbers_right_and_text_left():
    rows = [("users", 12345, 0.5), ("items of the set", 7, None), ("x", 0, 1e-7)]
    assert format_table(rows, ("name", "count", "share")) == [
        "name               count   share",
        "----------------  ------  ------",
        "users             12,345  0.5000",
        "items of the set       7",
        "x                      0   1e-07",
    ]
    assert format_table([]) == []
    assert format_table([("a", True)]) == ["a  true"]


def test_eval_table_shows_the_change_to_the_best():
    out = io.StringIO()
    log = RunLogger(None, None, stream=out)
    metrics = {"loss": 1.0, "hr@10": 0.11, "num_users": 50, "name": "x"}
    log.eval_line(1200, 2, "valid", metrics, {"loss": 2.0, "hr@10": 0.10, "num_users": 50})
    text = out.getvalue()
    assert "evaluation on valid, step 1,200, epoch 2" in text and "+0.0100 (+10.0 %)" in text and "-1.0000 (-50.0 %)" in text
    assert "name" not in text and text.count("+") == 2 and "\033" not in text


def test_color_only_on_a_terminal_and_not_under_no_color(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for stream, no_color, colored in ((Terminal(), "", True), (Terminal(), "1", False), (io.StringIO(), "", False)):
        monkeypatch.setenv("NO_COLOR", no_color)
        log = RunLogger(None, None, stream=stream)
        log.banner("title", [("device", "cpu"), ("threads", 2)])
        log.eval_line(1, 1, "valid", {"loss": 1.0}, {"loss": 2.0})
        assert ("\033[" in stream.getvalue()) == colored
        assert "  device   cpu\n  threads  2\n" in stream.getvalue()


def test_a_bar_on_a_terminal_and_lines_elsewhere():
    pytest.importorskip("tqdm")
    out = Terminal()
    log = RunLogger(None, None, stream=out, total_steps=100)
    for step in (10, 20):
        log.train_line(RECORD | {"global_step": step})
    log.say("between")
    log.close()
    assert "\r" in out.getvalue() and "step 20/100" in out.getvalue() and " 20 % |" in out.getvalue() and "between\n" in out.getvalue()
    plain = io.StringIO()
    log = RunLogger(None, None, stream=plain, total_steps=100)
    log.train_line(RECORD)
    assert "\r" not in plain.getvalue() and plain.getvalue().startswith("step 10/100") and plain.getvalue().count("\n") == 1


def on_a_terminal(columns: int, show) -> list[str]:
    """What stands on a real pseudo-terminal of this width, as it was drawn: the pieces between line feeds and returns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(theirs, "w") as stream:
        show(stream)
    text = b""
    with contextlib.suppress(OSError):  # the other end is closed and all is read; one read may come before the kernel passed all on
        while piece := os.read(ours, 1 << 16):
            text += piece
    os.close(ours)
    return [piece.rstrip() for piece in re.split(r"[\r\n]+", text.decode()) if piece.strip()]


def train_on(stream, monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(logger.time, "monotonic", lambda: clock[0])
    log = RunLogger(None, None, stream=stream, total_steps=12_000)
    log.note_start(1)
    for step in (1000, 2000):
        clock[0] = step * 1.0
        log.train_line(RECORD | {"global_step": step, "rss_gib": 1.5})
    log.say("between")
    log.end_bar()
    log.say("done")
    log.say("report  here")
    log.close()


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (160, "17 % |===                 | step 2,000/12,000  left 2:46:45  epoch 1  loss 0.5000  lr 1.00e-03  grad 0.25  1,234 users/s"
              "  wait 3 %  mem 1.50 GiB"),
        (80, "17 % |=         | step 2,000/12,000  left 2:46:45  epoch 1  loss 0.5000"),
        (0, "17 % |=         | step 2,000/12,000  left 2:46:45  epoch 1  loss 0.5000"),  # a terminal without a window: 80 serve
        (50, "17 %  step 2,000/12,000  left 2:46:45  epoch 1"),
        (20, "17 %  step 2,000/1"),
    ],
)  # fmt: skip
def test_the_time_left_is_seen_on_a_terminal_of_any_width(monkeypatch, columns, expected):
    pytest.importorskip("tqdm")
    monkeypatch.delenv("COLUMNS", raising=False)
    drawn = on_a_terminal(columns, lambda stream: train_on(stream, monkeypatch))
    bars = [piece.strip() for piece in drawn if "step 2,000" in piece]
    assert bars and set(bars) == {expected}
    assert max(map(len, drawn)) < (columns or 80)
    assert drawn[-2:] == ["done", "report  here"]  # after the training the bar is not drawn again


def test_silence_and_single_warnings():
    out = io.StringIO()
    log = RunLogger(None, None, stream=out)
    for text in ("a", "b", "a"):
        log.warn_once(text)
    assert out.getvalue() == "warning: a\nwarning: b\n"
    quiet = io.StringIO()
    log = RunLogger(None, None, console=False, stream=quiet)
    log.say("x")
    log.warn_once("y")
    log.table([(1, 2)], title="t")
    assert quiet.getvalue() == ""


# ---- memory -------------------------------------------------------------------------------------------------------------


def test_memory_follows_an_allocation():
    before = logger.rss_gib()
    block = np.ones(1 << 25)  # 0.25 GiB
    assert 0.2 < logger.rss_gib() - before < 0.4
    del block
    assert logger.peak_rss_gib() >= before + 0.2
