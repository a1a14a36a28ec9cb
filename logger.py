"""What a person and a program see of a run: the console, train.log (JSON lines) and TensorBoard.

Must not compute metrics or decide anything; a full disk ends the logs, never the run.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, TextIO

from checkpoint import plain_json
from errors import SMALL_FILE_BYTES, RunError, disk_full

_TRAIN_TAGS = {
    "loss": "Loss/train", "lr": "train/lr", "grad_norm": "train/grad_norm", "users_per_s": "perf/users_per_s",
    "data_wait": "perf/data_wait", "rss_gib": "mem/rss_gib", "action_loss": "Loss/action",
    "expert_share_max": "experts/share_max", "expert_share_min": "experts/share_min",
}  # fmt: skip
_BOLD, _GREEN, _RED, _YELLOW, _PLAIN = "\033[1m", "\033[32m", "\033[31m", "\033[33m", "\033[0m"
_BAR_WIDTHS = ((110, 20), (60, 10))  # (columns from which on, width of the bar); a narrower terminal has text alone
_TAIL_BYTES = 1 << 16  # of train.log, in which its last line is sought
_FLUSH_SECONDS = 10  # what a killed run loses of TensorBoard's curves at most


# ---- memory -------------------------------------------------------------------------------------------------------------


def _status_gib(key: str) -> float:
    """A value of /proc/self/status in GiB; 0.0 on systems without it."""
    if not os.path.exists("/proc/self/status"):
        return 0.0
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        line = next((line for line in file if line.startswith(key + ":")), f"{key}: 0 kB")
    return int(line.split()[1]) / 2**20


def rss_gib() -> float:
    """This process's resident memory now, GiB; mapped pages of the store that are in memory count."""
    return _status_gib("VmRSS")


def peak_rss_gib() -> float:
    """The largest resident memory of this process so far, GiB."""
    return _status_gib("VmHWM")


# ---- text ---------------------------------------------------------------------------------------------------------------


def format_duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = max(int(seconds), 0)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def format_table(rows: Sequence[Sequence[object]], header: Sequence[str] | None = None) -> list[str]:
    """Rows as aligned lines: numbers to the right, text to the left, two blanks between columns."""
    cells = [[_cell(value) for value in row] for row in rows]
    width = max((len(row) for row in cells), default=0)
    if header is not None:
        cells.insert(0, list(header))
        width = max(width, len(header))
    cells = [row + [""] * (width - len(row)) for row in cells]
    widths = [max((len(row[n]) for row in cells), default=0) for n in range(width)]
    body = cells[1:] if header is not None else cells
    right = [all(_is_number(row[n]) for row in body) and any(row[n] for row in body) for n in range(width)]
    lines = ["  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)).rstrip() for row in cells]
    if header is not None:
        lines.insert(1, "  ".join("-" * w for w in widths))
    return lines


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e6 or value == 0 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _is_number(text: str) -> bool:
    body = text.strip().rstrip("%").strip().replace(",", "")
    if not body or body == "-":
        return True
    try:
        float(body)
    except ValueError:
        return False
    return True


def train_text(record: dict, total_steps: int = 0, seconds_left: float | None = None, width: int | None = None) -> str:
    """The console's line of a training record; what the record lacks is left out.

    width: of the terminal, columns. The time left stands next to the step then, and the last fields are left out where they do not fit.
    """
    of = f"/{total_steps:,}" if total_steps else ""
    parts = [f"step {record['global_step']:,}{of}"]
    left = [] if seconds_left is None else [f"left {format_duration(seconds_left)}"]
    formats: tuple[tuple[str, Callable[[float], str]], ...] = (
        ("epoch", lambda value: f"epoch {value:g}"),
        ("loss", lambda value: f"loss {value:.4f}"),
        ("lr", lambda value: f"lr {value:.2e}"),
        ("grad_norm", lambda value: f"grad {value:.3g}"),
        ("users_per_s", lambda value: f"{value:,.0f} users/s"),
        ("data_wait", lambda value: f"wait {100 * value:.0f} %"),
        ("rss_gib", lambda value: f"mem {value:.2f} GiB"),
    )
    fields = [text(record[key]) for key, text in formats if record.get(key) is not None]
    if width is None:
        return "  ".join([*parts, *fields, *left])
    parts += [*left, *fields]
    while len(parts) > 1 and len("  ".join(parts)) > width:
        parts.pop()
    return "  ".join(parts)


# ---- train.log ----------------------------------------------------------------------------------------------------------


def read_train_log(path: Path) -> list[dict]:
    """The records of a train.log as one history: what a resumed run did again takes the place of the killed run's lines.

    Lines that are no JSON object (cut by a full disk) are left out.
    """
    history: list[dict] = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if not isinstance(record, dict) or not isinstance(record.get("global_step"), int):
                continue
            while history and _supersedes(record, history[-1]):
                history.pop()
            history.append(record)
    return history


def _supersedes(new: dict, old: dict) -> bool:
    """Whether `old` is of a step that a resumed run did again, or an evaluation that it repeated."""
    if "split" in new:
        return old["global_step"] > new["global_step"] or (old["global_step"] == new["global_step"] and old.get("split") == new["split"])
    return old["global_step"] >= new["global_step"]


def run_seconds(path: Path) -> float | None:
    """How long the processes of a run ran, in seconds, as its train.log tells; None where it does not.

    Read at its two ends alone: it may be long.
    Each line notes it, so pauses between an interrupted or killed process and the one that resumed it do not count, nor does what a
    killed process did after its last line. Logs of before that key give the time from the first line to the last, pauses included.
    """
    try:
        with open(path, "rb") as file:
            first = file.readline(_TAIL_BYTES)
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            last = file.read().splitlines()
    except OSError:
        return None
    if (ran := _last_number(last, "run_seconds")) is not None:
        return ran
    start, end = _last_number([first], "time"), _last_number(last, "time")
    return None if start is None or end is None else end - start


def _last_number(lines: Sequence[bytes], key: str) -> float | None:
    """The number under `key` in the last of these lines that has one; None where none has."""
    for line in reversed(lines):
        try:
            value = float(json.loads(line)[key])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
        if math.isfinite(value):
            return value
    return None


def _mend_last_line(path: Path) -> int:
    """Give an unfinished last line its newline, or cut it where it is no JSON; returns how many bytes were cut."""
    if not path.is_file() or path.stat().st_size == 0:
        return 0
    with open(path, "rb+") as file:
        data = file.read()
        if data.endswith(b"\n"):
            return 0
        start = data.rfind(b"\n") + 1
        try:
            json.loads(data[start:])
        except (ValueError, RecursionError):
            file.truncate(start)
            return len(data) - start
        file.write(b"\n")
    return 0


def _quiet_event_thread() -> None:
    """TensorBoard's thread hands an error of the disk on to the next write, which says it in a line; Python would print a traceback too."""
    before = threading.excepthook
    if getattr(before, "is_quiet", False):
        return

    def hook(failure: threading.ExceptHookArgs) -> None:
        if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__name__ == "_AsyncWriterThread"):
            before(failure)

    hook.is_quiet = True
    threading.excepthook = hook


class RunLogger:
    """Console, train.log and TensorBoard of one run.

    log_dir: the run folder; None writes no train.log. tensorboard_dir: None writes no events.
    resume_step: the step that a resumed run goes on from (None: from the start): later events of the killed run are purged.
    total_steps: for "left" and the progress bar; 0 = unknown, may be set later. console: False keeps silent.
    """

    def __init__(
        self,
        log_dir: Path | None,
        tensorboard_dir: Path | None,
        *,
        console: bool = True,
        resume_step: int | None = None,
        total_steps: int = 0,
        stream: TextIO | None = None,
    ) -> None:
        self.total_steps = total_steps
        self._stream = stream or sys.stdout
        self._console = console
        self._terminal = console and self._stream.isatty()
        self._color = self._terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._warned: set[str] = set()
        self._bar = None
        self._started = time.monotonic()
        self._first: tuple[int, float] | None = None  # (step, seconds) of the first line, for the time left
        self._paused = self._pauses_ahead = 0.0  # seconds of evaluations, since then and still to come
        self._steps_ahead = 0.0  # instead of these before the first evaluation: as long as so many steps
        self._tensorboard_dir, self._resume_step = tensorboard_dir, resume_step
        self._writer = None
        self._file = None
        self._ran_before = 0.0  # seconds of this run's earlier processes
        if log_dir is not None:
            self._open(Path(log_dir) / "train.log")

    # -- console

    def say(self, text: str = "") -> None:
        """One line (or several) on the console, kept nowhere else."""
        if not self._console:
            return
        try:
            if self._bar is not None:
                self._bar.clear()
            print(text, file=self._stream, flush=True)
            if self._bar is not None:
                self._bar.refresh()
        except OSError:  # a closed pipe, a hung-up terminal, a full disk behind a redirection: the run goes on without a console
            self._console, self._bar = False, None

    def _paint(self, text: str, code: str) -> str:
        return f"{code}{text}{_PLAIN}" if self._color else text

    def banner(self, title: str, rows: Iterable[tuple[str, object]] = ()) -> None:
        """A title and aligned `name  value` lines under it."""
        self.say(self._paint(title, _BOLD))
        for line in format_table([(f"  {name}", _cell(value)) for name, value in rows]):
            self.say(line)

    def table(self, rows: Sequence[Sequence[object]], header: Sequence[str] | None = None, title: str = "") -> None:
        """An aligned table."""
        if title:
            self.say(self._paint(title, _BOLD))
        for line in format_table(rows, header):
            self.say("  " + line)

    def warn_once(self, text: str, *, keep: bool = False) -> None:
        """A warning on the console, the first time that this text comes; keep: as a note in train.log too."""
        if text not in self._warned:
            self._warned.add(text)
            self.say(self._paint("warning:", _YELLOW) + f" {text}")
            if keep:
                self.note(f"warning: {text}", console=False)

    # -- records

    def note(self, text: str, *, console: bool = True) -> None:
        """What befell the run beside its steps: a line on the console (console: not where it was said before) and in train.log.

        There it is {"time", "note", "run_seconds"}: without global_step it is no record, and read_train_log leaves it out.
        """
        if console:
            self.say(text)
        self._append({"time": time.time(), "note": text})

    def train_line(self, record: dict) -> None:
        """A log step: one line in train.log, the console's line (or the bar on a terminal) and TensorBoard's scalars
        (time there: seconds since this process began).

        record: global_step, loss, epoch (counted as the trainer does), lr, grad_norm, users_per_s, data_wait (share of time, 0..1), and
        anything else that JSON holds. time (seconds since 1970), rss_gib and run_seconds (how long the processes of this run have run)
        are added. Losses that are not finite are null in the file.
        """
        record = {"time": time.time(), "rss_gib": round(rss_gib(), 4)} | record
        keys = ["global_step", "loss", "epoch", "time"]
        record = plain_json({key: record[key] for key in keys if key in record} | record)
        self._append(record)
        step = record["global_step"]
        for key, tag in _TRAIN_TAGS.items():
            if record.get(key) is not None:
                self._scalar(tag, record[key], step)
        self._scalar("time", time.monotonic() - self._started, step)
        left = self._seconds_left(step)
        if not (self._terminal and self._console and self.total_steps and self._show_bar(record, left)):
            self.say(train_text(record, self.total_steps, left))

    def eval_line(self, step: int, epoch: float, split: str, metrics: dict, best_so_far: dict | None = None) -> None:
        """An evaluation: a line with "split" in train.log, TensorBoard's scalars, and a table with the change to the best so far.

        metrics: name -> number; "loss" is written as `<split>_loss`, so that lines with "loss" are the training ones.
        best_so_far: the metrics of the best evaluation before this one; None or {} at the first.
        """
        metrics = plain_json(metrics)
        line = {"global_step": step, "epoch": epoch, "time": time.time(), "split": split}
        self._append(plain_json(line) | {f"{split}_loss" if key == "loss" else key: value for key, value in metrics.items()})
        numbers = {key: value for key, value in metrics.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
        for key, value in numbers.items():
            folder = "eval" if split == "valid" else split
            self._scalar(f"Loss/{split}" if key == "loss" else f"{folder}/{key}", value, step)
        best = plain_json(best_so_far or {})
        rows = [(key, value, best.get(key), self._change(key, value, best.get(key))) for key, value in numbers.items()]
        self.table(rows, ("metric", split, "best", "change"), title=f"evaluation on {split}, step {step:,}, epoch {epoch:g}")

    def _change(self, key: str, value: float, best: float | None) -> str:
        if not isinstance(best, (int, float)) or key.startswith("num_"):
            return ""
        better = value < best if key.endswith("loss") else value > best
        relative = f" ({100 * (value - best) / abs(best):+.1f} %)" if best else ""
        text = f"{value - best:+.4f}{relative}"
        return text if value == best else self._paint(text, _GREEN if better else _RED)

    def note_start(self, step: int) -> None:
        """The first update of this process is done: it was slower than the others, so the time left counts from here."""
        self._first = self._first or (step, time.monotonic())

    def expect_pauses(self, steps: float) -> None:
        """A guess of all evaluations' time, before there was one: that of so many steps."""
        self._steps_ahead = steps

    def note_pause(self, seconds: float, ahead: float) -> None:
        """Training stood still for an evaluation, and `ahead` as long ones are to come: the time left counts them apart from the steps."""
        self._paused, self._pauses_ahead, self._steps_ahead = self._paused + (seconds if self._first else 0.0), seconds * ahead, 0.0

    def _seconds_left(self, step: int) -> float | None:
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        steps = step - self._first[0]
        if not self.total_steps or steps <= 0:
            return None
        a_step = (now - self._first[1] - self._paused) / steps
        return (max(self.total_steps - step, 0) + self._steps_ahead) * a_step + self._pauses_ahead

    def _show_bar(self, record: dict, left: float | None) -> bool:
        """Bar and text on the terminal's last line; False where tqdm is missing."""
        step, columns = record["global_step"], self._columns() - 1  # some terminals wrap when the last column is written
        bar = next((width for least, width in _BAR_WIDTHS if columns >= least), 0)
        head = f"{{percentage:3.0f}} % |{{bar:{bar}}}| " if bar else "{percentage:3.0f} %  "
        text = train_text(record, self.total_steps, left, columns - (bar + 8 if bar else 7))
        if self._bar is None:
            try:
                from tqdm import tqdm
            except ImportError:
                return False
            self._bar = tqdm(total=self.total_steps, initial=step, file=self._stream, ncols=columns, bar_format="{desc}", ascii=" =")
        self._bar.ncols, self._bar.bar_format, self._bar.n = columns, head + "{desc}", min(step, self.total_steps)
        self._bar.set_description_str(text)
        return True

    def _columns(self) -> int:
        """Columns of the terminal; 80 where nobody knows: a terminal without a window says 0."""
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns
        except (OSError, ValueError):
            columns = 0
        return columns or shutil.get_terminal_size().columns

    def end_bar(self) -> None:
        """The training is over: the bar stays as it stands, and what is said from now on comes below it."""
        if self._bar is not None:
            try:
                self._bar.close()
            except OSError:  # a hung-up terminal
                self._console = False
            self._bar = None

    # -- files

    def _open(self, path: Path) -> None:
        try:
            cut = _mend_last_line(path)
            self._ran_before = run_seconds(path) or 0.0
            self._file = open(path, "ab", buffering=0)  # one write a line: a killed run leaves whole lines
        except OSError as error:
            self._give_up("train.log", error, path, SMALL_FILE_BYTES)
            return
        if cut:
            self.say(f"{path}: cut an unfinished last line of {cut} bytes")

    def _append(self, record: dict) -> None:
        if self._file is None:
            return
        record = record | {"run_seconds": round(self._ran_before + time.monotonic() - self._started, 3)}
        data = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        written = 0
        try:
            while written < len(data):  # a disk that fills up takes a part of the line; the next write says why
                written += self._file.write(data[written:])
        except OSError as error:
            path, self._file = self._file.name, self._close_cut(self._file, written)
            self._give_up("train.log", error, path, len(data))

    @staticmethod
    def _close_cut(file: BinaryIO, num_bytes: int) -> None:
        """Take back a line's first `num_bytes` and close; what a sick disk refuses here is mended by the next start."""
        with contextlib.suppress(OSError):
            os.ftruncate(file.fileno(), os.fstat(file.fileno()).st_size - num_bytes)
        with contextlib.suppress(OSError):
            file.close()

    def _scalar(self, tag: str, value: float, step: int) -> None:
        self.draw(lambda writer: writer.add_scalar(tag, value, step))

    def draw(self, show: Callable) -> None:
        """Call show(SummaryWriter); nothing without TensorBoard, and no error of the disk ends the run."""
        if self._tensorboard_dir is None:
            return
        try:
            if self._writer is None:
                self._writer = self._new_writer()
            show(self._writer)
        except RunError as error:  # a full disk, said by a writer of files of our own
            self.warn_once(str(error).splitlines()[0])
        except ImportError as error:
            self._tensorboard_dir = None
            self.warn_once(f"no TensorBoard ({error}): pip install tensorboard, or --no-tensorboard")
        except OSError as error:
            self._stop_tensorboard(error)

    def _new_writer(self) -> object:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only needed here

        # Events at the resumed step itself were written before its checkpoint and are not written again: purge what follows.
        _quiet_event_thread()
        purge = None if self._resume_step is None else self._resume_step + 1
        return SummaryWriter(str(self._tensorboard_dir), purge_step=purge, flush_secs=_FLUSH_SECONDS)

    def _stop_tensorboard(self, error: OSError) -> None:
        path, self._tensorboard_dir, self._writer = self._tensorboard_dir, None, None
        self._give_up("TensorBoard", error, path, SMALL_FILE_BYTES)  # at least: how much its thread still holds is not to be known

    def _give_up(self, what: str, error: OSError, path: object, bytes_needed: int) -> None:
        reason = str(disk_full(error, path, bytes_needed) or f"{path}: {error.strerror or error}").splitlines()[0]
        self.warn_once(f"{what} ends here and the run goes on without it: {reason}")

    def sync(self) -> None:
        """Have the disk hold train.log: after a power cut it tells of every step that a checkpoint written later holds."""
        if self._file is not None:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                path, self._file = self._file.name, self._close_cut(self._file, 0)
                self._give_up("train.log", error, path, SMALL_FILE_BYTES)

    def flush(self) -> None:
        """Bring TensorBoard's events to the disk (train.log is written line by line)."""
        if self._writer is not None:
            try:
                self._writer.flush()
            except OSError as error:
                self._stop_tensorboard(error)

    def close(self) -> None:
        """End the bar and close the files; a second call does nothing."""
        self.end_bar()
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                self._stop_tensorboard(error)
        self._writer, self._tensorboard_dir = None, None
