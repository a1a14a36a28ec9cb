"""Runs main.py in forks of itself and signals them: a line of JSON in, one out. Started by reliability_world.Driver.

In: flags; console (file); samples (file, takes a line [step, users] a batch trained on); signal, with after (seconds from the first step)
or in_save (the run's n-th write or fsync of a checkpoint). Out: status (of waitpid, negative for a signal), seconds from the first step
to the end, exit_seconds from the signal to the end.
"""

import json
import os
import select
import signal
import sys
import time

import checkpoint
import main
import trainer
from errors import run_cli


def child(order: dict, ready: int) -> None:
    log = os.open(order["console"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["main.py", *order["flags"]]
    update, samples = trainer.Trainer._accumulate, order.get("samples")
    started = []

    def log_samples(self, batch, features):
        if not started:
            os.write(ready, b"x")
            started.append(True)
        if samples:
            line = json.dumps([self.epoch * 100_000 + self.batch, batch.users.tolist()]) + "\n"
            descriptor = os.open(samples, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(descriptor, line.encode())
            os.close(descriptor)
        update(self, batch, features)

    trainer.Trainer._accumulate = log_samples
    if "in_save" in order:
        count = [0]

        def killing(function):
            def wrapped(*args):
                count[0] += 1
                if count[0] == order["in_save"]:
                    os.kill(os.getpid(), order["signal"])
                return function(*args)

            return wrapped

        checkpoint._HashingFile.write = killing(checkpoint._HashingFile.write)
        os.fsync, os.rename = killing(os.fsync), killing(os.rename)
    status = 1
    try:
        status = run_cli(main.main)
    except BaseException as error:
        print(repr(error), flush=True)
    finally:
        sys.stdout.flush()
        os._exit(status)


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


signal.signal(signal.SIGINT, signal.default_int_handler)
for line in sys.stdin:
    print(json.dumps(serve(json.loads(line))), flush=True)
