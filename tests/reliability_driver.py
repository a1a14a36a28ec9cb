"""Runs main.py in forks of itself and signals them: a line of JSON in, one out. Started by reliability_world.Driver.

In: flags; console (file); samples (file, takes a line [step, users] a batch trained on); descriptors (file, takes a line
`step, how many are open, how many of TensorBoard's events` every ten steps);
signal, with after (seconds from the first step), at_start (seconds from the fork) or in_save (see kill_in_save); crash (the run's n-th
call that changes the disk, store and logs included; 0 = none) with lose (folders where what was not fsynced by then is cut in half, as a
power cut may leave it), names ("all" or "some" of the names that were not fsynced are forgotten too, see power_cut.py) and calls (file,
takes the name of each such call and each finished save); limit (bytes that a file may have), from_save (only from the n-th save on). Out:
status (of waitpid, negative for a signal), seconds from the first step to the end, exit_seconds from the signal to it.
"""

import builtins
import itertools
import json
import os
import random
import resource
import select
import signal
import sys
import time
from pathlib import Path

import checkpoint
import main
import store
import store_files
import trainer
from power_cut import PowerCut
from errors import run_cli


def open_files() -> list[str]:
    """What each descriptor of this process is open on; without os.listdir's own, which is closed by then."""
    names = []
    for number in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            continue  # closed since
    return names


def child(order: dict, ready: int) -> None:
    log = os.open(order["console"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["main.py", *order["flags"]]
    update, samples, descriptors = trainer.Trainer._accumulate, order.get("samples"), order.get("descriptors")
    started = []

    def log_samples(self, batch, features):
        if not started:
            os.write(ready, b"x")
            started.append(True)
        if samples:
            line = json.dumps([self.step, batch.users.tolist()]) + "\n"
            descriptor = os.open(samples, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(descriptor, line.encode())
            os.close(descriptor)
        if descriptors and self.step % 10 == 0:
            names = open_files()
            of_events = sum("events.out.tfevents" in name for name in names)
            with open(descriptors, "a") as file:
                file.write(f"{self.step} {len(names) - of_events} {of_events}\n")
        update(self, batch, features)

    trainer.Trainer._accumulate = log_samples
    if "in_save" in order:
        kill_in_save(order)
    if "crash" in order:
        crash(order)
    if "limit" in order:
        limit_files(order["limit"], order.get("from_save", 0))
    status = 1
    try:
        status = run_cli(main.main)
    except BaseException as error:
        print(repr(error), flush=True)
    finally:
        sys.stdout.flush()
        os._exit(status)


def kill_in_save(order: dict) -> None:
    """order["in_save"]: [save, kind, n]: the signal comes at the n-th call of a kind within that save, links and pruning included."""
    wanted, kind, place = order["in_save"]
    saves, calls = [0], [0]

    def killing(name, function):
        def wrapped(*args, **kwargs):
            if name == kind and saves[0] == wanted:
                calls[0] += 1
                if calls[0] == place:
                    os.kill(os.getpid(), order["signal"])
            return function(*args, **kwargs)

        return wrapped

    save = checkpoint.save_checkpoint

    def counted(*args, **kwargs):
        saves[0] += 1
        return save(*args, **kwargs)

    checkpoint.save_checkpoint = counted
    checkpoint._HashingFile.write = killing("write", checkpoint._HashingFile.write)
    os.fsync, os.rename = killing("fsync", os.fsync), killing("rename", os.rename)


def crash(order: dict) -> None:
    """Count the calls that change the disk, and die in one of them as a machine does that loses its power."""
    calls = os.open(order["calls"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    cut = PowerCut([Path(folder) for folder in order["lose"]], Path(f"{order['calls']}-stash"))
    numbers, die = itertools.count(1), os.kill

    def die_here() -> None:
        try:
            if order.get("names") is None:
                cut.done = []
            cut.lose(None if order.get("names") == "all" else random.Random(order["crash"]))
        finally:  # an error here would come up in the code under test, which may pass over it and live on
            die(os.getpid(), signal.SIGKILL)

    def counted(name, function, counts=lambda *args, **kwargs: True):
        function = cut.wrap(name, function)

        def wrapped(*args, **kwargs):
            compiled = any("__pycache__" in str(word) for word in args)  # numba's cache: other threads', and more or fewer by the clock
            if not compiled and counts(*args, **kwargs):
                number = next(numbers)  # in one step: of two threads' calls at once each has its own
                os.write(calls, f"{name}\n".encode())
                if number == order["crash"]:
                    die_here()
            return function(*args, **kwargs)

        return wrapped

    for name in ("fsync", "rename", "replace", "link", "unlink", "mkdir", "rmdir", "posix_fallocate"):
        setattr(os, name, counted(name, getattr(os, name)))
    builtins.open = counted("open", open, lambda path, mode="r", *args, **kwargs: set(mode) & set("wxa+"))
    checkpoint._HashingFile.write = counted("write", checkpoint._HashingFile.write)
    store_files.AppendFile.add = counted("append", store_files.AppendFile.add)
    save = checkpoint.save_checkpoint

    def noting_save(*args, **kwargs):
        path = save(*args, **kwargs)
        os.write(calls, f"saved {path.name}\n".encode())
        return path

    checkpoint.save_checkpoint = noting_save


def limit_files(num_bytes: int, from_save: int) -> None:
    """No file may grow past a size: what a full disk or a quota does, in one process."""
    save, count = checkpoint.save_checkpoint, [0]

    def limited(*args, **kwargs):
        count[0] += 1
        if count[0] == from_save:
            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))
        return save(*args, **kwargs)

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does by itself: the write fails with EFBIG
    if from_save:
        checkpoint.save_checkpoint = limited
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def serve(order: dict) -> dict:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        child(order, writer)
    os.close(writer)
    if order.get("at_start"):
        time.sleep(order["at_start"])
    else:
        select.select([reader], [], [], 120)
    begin, signalled = time.monotonic(), None
    if "signal" in order and "in_save" not in order:
        deadline = begin + order.get("after", 0.0)
        while time.monotonic() < deadline:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.001)
        else:
            signalled = time.monotonic()
            os.kill(pid, order["signal"])
    _, status = os.waitpid(pid, 0)
    os.close(reader)
    end = time.monotonic()
    answer = {"status": os.waitstatus_to_exitcode(status), "seconds": end - begin}
    return answer | {"exit_seconds": None if signalled is None else end - signalled}


def open_one(order: dict, out: int) -> None:
    """Open the store in this fork; tell when a build begins and ends, and what came of it."""
    say = lambda *words: os.write(out, (" ".join(map(str, words)) + "\n").encode())
    build = store._build

    def noting(*args, **kwargs):
        say("begins", os.getpid())
        result = build(*args, **kwargs)
        say("ends", os.getpid())
        return result

    store._build = noting
    if "crash" in order:
        crash(order)
    try:
        opened = store.open_store(order["data"], order["cache"], embeddings=order["embeddings"], progress=False, log=lambda _: None)
        vectors = hash(tuple(opened.embedding(name).matrix.tobytes() for name in order["embeddings"]))
        say("opened", os.getpid(), store.content_hash(opened), vectors)
    except BaseException as error:
        say("failed", os.getpid(), repr(error))
    finally:
        os._exit(0)


def serve_builders(order: dict) -> dict:
    """In: builders (how many open the store at once), data, cache, embeddings; kill (the first that builds dies so many seconds later);
    crash, lose, calls as above. Out: events, each [seconds, word, process, ...], also "killed".
    """
    reader, writer = os.pipe()
    begin, events, pids = time.monotonic(), [], []
    for _ in range(order["builders"]):
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            open_one(order, writer)
        pids.append(pid)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        for line in pipe:
            word, pid, *more = line.split(maxsplit=2)
            events.append([time.monotonic() - begin, word, int(pid), *more])
            if word == "begins" and order.get("kill") is not None and not any(event[1] == "killed" for event in events):
                time.sleep(order["kill"])
                os.kill(int(pid), signal.SIGKILL)
                events.append([time.monotonic() - begin, "killed", int(pid)])
    for pid in pids:
        os.waitpid(pid, 0)
    return {"events": events}


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(serve_builders(order) if "builders" in order else serve(order)), flush=True)
