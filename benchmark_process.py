"""A child process of the benchmark, as its parent sees it: a line to it, its turns, its memory, its end.

Outside its turn a child stands still (SIGSTOP to its process group, so its loader's workers too): only one child works at a time, and
nobody makes batches in another's turn. Must not know what is measured.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from errors import EXIT_USER_MISTAKE, RunError, UserError

SCRIPT = Path(__file__).resolve().parent / "benchmark.py"
SAMPLE_SECONDS = 0.02


class Process:
    """A child process with its own process group, which also holds its loader's workers.

    Starting it waits for its first answer, `ready`, and stops it; it runs inside `turn()` alone. RunError or UserError where it dies.
    peak_anon, peak_tree, peak_rss: MiB, the largest samples so far of RssAnon, of its sum with all descendants', of the sum of VmHWM.
    """

    def __init__(self, order: dict, work: Path, command: Sequence[str] = ()) -> None:
        self.name, self.work, self.doing = order["name"], work, "start"
        self.peak_anon = self.peak_tree = self.peak_rss = 0.0
        command = command or [sys.executable, str(SCRIPT), "--child", json.dumps(order)]
        self._errors = tempfile.TemporaryFile(dir=work)  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, bufsize=1, process_group=0
        )
        try:
            with self.sampling():
                self.ready = self._read()
            self._signal(signal.SIGSTOP)
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.quit()
        self.kill()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The child runs inside and stands still, with all its processes, outside."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def ask(self, command: str) -> dict:
        """Have the running child do a command; its answer."""
        self.doing = command
        with suppress(BrokenPipeError):  # it is dead: reading says why
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        return self._read()

    def do(self, command: str) -> dict:
        """A turn of one command."""
        with self.turn():
            return self.ask(command)

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line.endswith("\n"):
            raise self._death()
        return json.loads(line)

    def _death(self) -> RunError | UserError:
        status = self.process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        if status == EXIT_USER_MISTAKE:  # its message says all
            start = max((n for n, line in enumerate(lines) if line.startswith("error: ")), default=0)
            return UserError("\n".join(lines[start:]).removeprefix("error: "))
        why = f"signal {-status}{', out of memory?' if status == -signal.SIGKILL else ''}" if status < 0 else f"exit status {status}"
        return RunError("\n".join([f"the child process {self.name} died ({why}) at: {self.doing}. The end of its messages:", *lines[-12:]]))

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it is gone already
            os.killpg(self.process.pid, number)

    def quit(self) -> None:
        """Let the child end by itself, so that its loader's workers and shared memory go in order."""
        self._signal(signal.SIGCONT)
        with suppress(OSError, subprocess.TimeoutExpired):  # kill follows
            self.process.stdin.close()
            self.process.wait(timeout=10)

    def kill(self) -> None:
        """End the child and its whole group."""
        self._signal(signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            with suppress(OSError):  # what was not flushed to a dead child
                stream.close()

    @contextmanager
    def sampling(self, seconds: float = SAMPLE_SECONDS) -> Iterator[None]:
        """Sample the child's memory every `seconds` inside."""
        over = threading.Event()

        def watch() -> None:
            while True:
                self._sample()
                if over.wait(seconds):
                    return

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._sample()

    def _sample(self) -> None:
        facts = [memory_of(pid) for pid in (self.process.pid, *descendants(self.process.pid))]
        self.peak_anon = max(self.peak_anon, facts[0][0])
        self.peak_tree = max(self.peak_tree, sum(anon for anon, _ in facts))
        self.peak_rss = max(self.peak_rss, sum(rss for _, rss in facts))


def memory_of(pid: int) -> tuple[float, float]:
    """(RssAnon now, VmHWM) of a process in MiB; zeros where it is gone or the system has no /proc."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0.0, 0.0
    facts = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return tuple(int(facts.get(key, "0 kB").split()[0]) / 1024 for key in ("RssAnon", "VmHWM"))


def descendants(pid: int) -> list[int]:
    """Children of a process, and theirs."""
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text(encoding="ascii").split())
    except OSError:
        return found  # it ended meanwhile
    return found + [child for parent in found for child in descendants(parent)]
