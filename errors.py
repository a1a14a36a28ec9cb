"""The two kinds of failure a user meets, and how an entry script turns them into an exit status.

Must not know anything of data, models or settings.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_MISTAKE = 2
SMALL_FILE_BYTES = 4096  # what a file of a few bytes takes of a disk
EXIT_INTERRUPTED, EXIT_PIPE, EXIT_TERMINATED = 130, 141, 143  # 128 + the signal, as a shell has it
_PATH_MISTAKES = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EROFS)


class UserError(ValueError):
    """A mistake that the user can mend: a bad flag, key, value, file or record. Exit status 2.

    The message says what was found, where (file, line or row, key), what was expected and what to do,
    in at most three lines. Several mistakes at once are given as one line each.
    """


class ForeignFormatError(UserError):
    """A file that another version of this project wrote: whole, and not to be read here."""


class RunError(RuntimeError):
    """A run that cannot go on: a loss that is not finite, a full disk. Exit status 1."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, for scripts with flags of their own: a mistake is a UserError, and no flag is guessed from its beginning."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}.\n`python {self.prog} --help` lists all arguments.")


class Terminated(KeyboardInterrupt):
    """SIGTERM, where `terminable` holds: whoever cleans up after Ctrl-C cleans up after it too. Exit status 143."""


@contextmanager
def terminable() -> Iterator[None]:
    """Within it SIGTERM raises Terminated: Python's default ends the process there and then, and files say it still runs.

    Does nothing outside the main thread, which alone may ask for signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: object) -> None:
        raise Terminated("signal 15")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class OutOfTimeError(Exception):
    """The time of `at_most` is over."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Within it OutOfTimeError after so many seconds: for work that may be left undone. No limit outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: object) -> None:
        raise OutOfTimeError(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def disk_full(error: OSError, path: object, bytes_needed: int | None = None) -> RunError | None:
    """The RunError for a full disk (or quota, or file size limit); None when `error` is something else."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return None
    needed = "" if bytes_needed is None else f" ({bytes_needed:,} bytes needed)"
    return RunError(f"{path}: no space left to write{needed}: {error.strerror}.\nFree some space, or point the path elsewhere.")


def forget_stdout() -> None:
    """Whoever read standard output is gone: nothing more is written there, so that the end of Python does not fail on it either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_cli(main: Callable[[], int | None], *, debug: bool = False) -> int:
    """Run an entry script's `main`; print a user's mistake without traceback; return the exit status.

    `debug` prints the traceback of every failure. KeyboardInterrupt is 130 and Terminated 143, as a shell expects.
    """
    try:
        return main() or EXIT_DONE
    except UserError as error:
        failure, status, message = error, EXIT_USER_MISTAKE, str(error)
    except (RunError, MemoryError) as error:
        failure, status, message = error, EXIT_FAILED, str(error) or type(error).__name__
    except KeyboardInterrupt as error:
        failure, message = error, "interrupted"
        status = EXIT_TERMINATED if isinstance(error, Terminated) else EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read the output has seen enough: `python main.py --help | head`
        forget_stdout()
        return EXIT_PIPE
    except OSError as error:
        failure, status, message = error, EXIT_FAILED, str(error)
        if known := disk_full(error, error.filename or "the disk"):
            message = str(known)
        elif error.errno in _PATH_MISTAKES and error.filename:
            status = EXIT_USER_MISTAKE
            message = f"{error.filename}: {error.strerror}.\nGive another path, or change the permissions of this one."
        elif not debug:
            traceback.print_exc()
    if debug:
        traceback.print_exception(failure)  # print_exc would find nothing: the exception is handled by now
    print(f"error: {message}", file=sys.stderr, flush=True)
    return status
