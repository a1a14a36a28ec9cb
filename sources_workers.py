"""Reads layout A's files on all cores: byte ranges go to worker processes, column chunks come back in order through files.

A worker is this file run as a program: nothing of the parent (torch, its threads) is imported or forked, and it ends by itself
when the parent dies. Must not know what a line means (sources_jsonl.py) or write the store.
"""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import orjson

import sources_loops
from columns import ID_LIMIT
from errors import RunError, UserError
from sources import FeatureRows, Progress, Ragged, Rules, SeqChunk
from sources_jsonl import FeatureReader, KnownItems, LineParser, read_blocks
from store_files import load_array

RANGE_BYTES = 16 << 20  # of a file, one task
PARALLEL_BYTES = 32 << 20  # below, processes cost more than they bring
COMPILED_BYTES = 48 << 20  # below, loading the compiled loops costs more than they bring
LOAD_SECONDS = 2.0  # a worker waits that long for the loops before its first task: enough to read them, not to make them
MAX_ITEM_PIECE_BYTES = 1 << 30
NEXT_ITEM = re.compile(rb'\}\s*,\s*"[^"\\]*"\s*:')  # cannot occur inside a JSON string: its quotes would be escaped


class Task(NamedTuple):
    """A byte range of one file; what: "sequences" or "items"."""

    what: str
    path: str
    start: int
    end: int


class Workers:
    """Processes that serve one file after another, so that they are started, and load the compiled loops, once. Close them in the end."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen] = []

    def start(self, size: int, count: int | None = None) -> list[subprocess.Popen]:
        """`count` processes for a file of `size` bytes (None: one a core, or none for a small file); those that run already serve again."""
        if count is None:
            count = min(len(os.sched_getaffinity(0)), -(-size // RANGE_BYTES)) if size >= PARALLEL_BYTES else 0
        while len(self._processes) < count:
            self._processes.append(_start_worker(compiled=size >= COMPILED_BYTES))
        return self._processes[:count]

    def close(self) -> None:
        """End the processes, whatever they are at."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            try:
                process.stdin.close()
            except BrokenPipeError:
                pass  # a task that never reached the process, which had died; whoever noticed has said so
            process.stdout.close()
        self._processes.clear()


def read_sequences(
    path: Path, rules: Rules, known: Path, scratch: Path, progress: Progress, *, workers: Workers | int | None = None
) -> Iterator[SeqChunk]:
    """The users of seq.jsonl or predict_seq.jsonl, in file order, in chunks of bounded size.

    known: folder of the item features read before (see save_known); scratch: an existing folder for what workers hand back.
    workers: processes, or how many are to be started for this file; None: one a core, or none for a small file.
    """
    return _read("sequences", path, rules, known, scratch, progress, workers)


def read_item_dict(
    path: Path, rules: Rules, scratch: Path, progress: Progress, *, workers: Workers | int | None = None
) -> Iterator[SeqChunk]:
    """The items of item_feat_dict.json, in file order: chunks that hold `items`, rejects (line: number of the entry) and tally alone."""
    return _read("items", path, rules, None, scratch, progress, workers)


def _read(
    what: str, path: Path, rules: Rules, known: Path | None, scratch: Path, progress: Progress, workers: Workers | int | None
) -> Iterator[SeqChunk]:
    size = path.stat().st_size
    tasks = [Task(what, str(path), start, min(start + RANGE_BYTES, size)) for start in range(0, size, RANGE_BYTES)]
    setup = {"rules": rules.to_dict(), "known": None if known is None else str(known)}
    mine = None if isinstance(workers, Workers) else Workers()
    try:
        processes = workers.start(size) if mine is None else mine.start(size, workers)
        for task, chunk in _in_processes(tasks, setup, scratch, processes) if processes else _in_process(tasks, setup):
            progress.update(task.end - task.start)
            yield chunk
    finally:
        if mine is not None:
            mine.close()


def _in_process(tasks: list[Task], setup: dict) -> Iterator[tuple[Task, SeqChunk]]:
    reader = _Reader(setup)
    for task in tasks:
        yield task, reader.read(task)


def _in_processes(tasks: list[Task], setup: dict, scratch: Path, processes: list[subprocess.Popen]) -> Iterator[tuple[Task, SeqChunk]]:
    """Chunks in the order of tasks; at most two more than processes are under way, so that what waits on disk stays bounded."""
    free: SimpleQueue = SimpleQueue()
    for process in processes:
        free.put((process, setup))

    def run(number: int, task: Task) -> SeqChunk:
        process, message = free.get()
        try:
            return _ask(process, message, task, scratch / f"range{number}.npz")
        finally:
            free.put((process, None))

    pool = ThreadPoolExecutor(len(processes))
    waiting: deque = deque()
    whole = False
    try:
        for number, task in enumerate(tasks):
            waiting.append((task, pool.submit(run, number, task)))
            if len(waiting) > len(processes) + 2:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
        whole = True
    finally:
        if not whole:  # threads wait for answers that nobody wants any more
            for process in processes:
                process.kill()
        pool.shutdown(cancel_futures=True)


def _start_worker(*, compiled: bool) -> subprocess.Popen:
    environment = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    command = [sys.executable, __file__, *(["compiled"] if compiled else [])]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def _ask(process: subprocess.Popen, setup: dict | None, task: Task, out: Path) -> SeqChunk:
    try:
        if setup is not None:
            process.stdin.write(json.dumps(setup).encode() + b"\n")
        process.stdin.write(json.dumps([*task, str(out)]).encode() + b"\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        line = b""
    if not line:
        raise RunError(f"{task.path}: the process that read bytes {task.start:,} to {task.end:,} died (status {process.poll()}).\n"
                       "It may have been killed for lack of memory; start again, the store is built anew.")  # fmt: skip
    answer = orjson.loads(line)
    if error := answer.get("error"):
        if error["kind"] == "UserError":
            raise UserError(error["text"])
        if error["kind"] == "OSError":
            raise OSError(error["errno"], error["text"], str(out))
        raise RunError(f"{task.path}, bytes {task.start:,} to {task.end:,}: {error['text']}")
    chunk = load_chunk(out, answer)
    out.unlink()
    return chunk


class _Reader:
    """Reads tasks, in this process or in a worker."""

    def __init__(self, setup: dict) -> None:
        self.rules = Rules.from_dict(setup["rules"])
        self.parser = LineParser(self.rules, load_known(Path(setup["known"]))) if setup["known"] else None
        self.items = FeatureReader(self.rules, "item")

    def read(self, task: Task) -> SeqChunk:
        enabled = gc.isenabled()
        gc.disable()  # parsed JSON has no cycles, and collections over its millions of objects cost a third of the time
        try:
            return self._sequences(task) if task.what == "sequences" else self._items(task)
        finally:
            if enabled:
                gc.enable()

    def _sequences(self, task: Task) -> SeqChunk:
        chunks, line, last = [], 0, -1
        for offset, data in read_blocks(Path(task.path), task.start, task.end):
            chunks.append(self.parser.parse_block(data, line + 1))
            line += chunks[-1].num_lines
            last = offset + data.rfind(b"\n", 0, -1) + 1
        chunk = join_chunks(chunks) if chunks else self.parser.parse([], 1)
        chunk.last_offset = last
        return chunk

    def _items(self, task: Task) -> SeqChunk:
        data, ahead = _item_piece(task)
        if (chunk := self._plain_items(data)) is not None:
            return chunk
        try:
            entries = orjson.loads(data) if data else {}
            if not isinstance(entries, dict):
                raise ValueError(f"expected an object, found {type(entries).__name__}")
        except ValueError as error:
            raise UserError(f"{task.path}: not JSON between bytes {ahead:,} and {ahead + len(data):,}: {error}.\n"
                            "Expected one object {item id: {feature id: value}}; copy the file anew.") from None  # fmt: skip
        return self._item_columns(entries)

    def _plain_items(self, data: bytes) -> SeqChunk | None:
        """By the compiled loops; None where they are not there or meet anything but plain items, each once."""
        loops = sources_loops.compiled()
        if loops is None or self.items.slots is None or not data:
            return None
        padded, end = sources_loops.padded(data.rstrip(b" \t\r\n"))
        most, values = sources_loops.bounds(padded)
        ids, found = np.empty(most, np.int64), self.items.outputs(most, values)
        count = loops.items(padded, end, min(self._highest(), 2**63 - 1), *self.items.slots, *found, ids)
        if count < 0 or len(np.unique(ids[:count])) < count:
            return None
        chunk = empty_chunk(self.rules)
        ids = ids[:count].astype(np.uint64 if self.rules.kind == "predict" else np.int64)
        chunk.items, chunk.num_lines = self.items.rows(ids, found, chunk.tally), count
        return chunk

    def _highest(self) -> int:
        return ID_LIMIT - 1 if self.rules.kind == "predict" else self.rules.item_limit

    def _item_columns(self, entries: dict) -> SeqChunk:
        tally: Counter = Counter()
        rejects, ids, dicts = [], [], []
        highest = self._highest()
        for number, (key, features) in enumerate(entries.items(), 1):
            if not (key.isascii() and key.isdigit() and len(key) <= 20 and 1 <= int(key) <= highest):
                rejects.append((number, f"item id {key[:40]} is outside 1..{highest} (the items of indexer.pkl)"))
            elif type(features) is not dict:
                rejects.append((number, f"the features of item {key} are of type {type(features).__name__}; expected an object"))
            else:
                ids.append(int(key))
                dicts.append(features)
        try:
            columns = self.items.columns(dicts, found := Counter())
        except ValueError:
            good, found = [], Counter()
            for k, features in enumerate(dicts):
                try:
                    self.items.columns([features], Counter())
                    good.append(k)
                except ValueError as error:
                    rejects.append((k + 1, f"item {ids[k]}: {error}"))
            ids, dicts = [ids[k] for k in good], [dicts[k] for k in good]
            columns = self.items.columns(dicts, found)
        rows = FeatureRows(np.array(ids, dtype=np.uint64 if self.rules.kind == "predict" else np.int64), *columns)
        chunk = empty_chunk(self.rules)
        chunk.items, chunk.rejects, chunk.tally, chunk.num_lines = rows, rejects, tally + found, len(entries)
        return chunk


def _item_piece(task: Task) -> tuple[bytes, int]:
    """The entries of item_feat_dict.json whose separator from the one before lies in the task's range: (one JSON object, its offset)."""
    length = task.end - task.start
    with open(task.path, "rb") as file:
        file.seek(task.start)
        data = file.read(length)
        begin, end = 0, None
        if task.start:
            data, match = _find_separator(file, data, 0, task)
            if match is None or match.start() >= length:
                return b"", task.start
            begin = data.index(b",", match.start()) + 1
        if task.end < os.path.getsize(task.path):
            data, match = _find_separator(file, data, length, task)
            end = None if match is None else match.start() + 1
    body = data[begin:] if end is None else data[begin:end] + b"}"
    return (b"{" + body if begin else body), task.start + begin


def _find_separator(file: object, data: bytes, place: int, task: Task) -> tuple[bytes, re.Match | None]:
    """The first separator of two entries that begins at `place` or later, reading on as needed; None where the file ends first."""
    while not (match := NEXT_ITEM.search(data, place)):
        if len(data) > MAX_ITEM_PIECE_BYTES:
            raise UserError(f"{task.path}: no entry of an item ends within {len(data):,} bytes after byte {task.start:,}.\n"
                            "Expected one object {item id: {feature id: value}} with flat inner objects.")  # fmt: skip
        more = file.read(1 << 20)
        if not more:
            return data, None
        data += more
    return data, match


def empty_chunk(rules: Rules) -> SeqChunk:
    """A chunk without users or items."""
    ids = np.zeros(0, dtype=np.int64)
    items = ids.astype(np.uint64) if rules.kind == "predict" else ids
    rows = [FeatureRows(i, *FeatureReader(rules, side).columns([], Counter())) for i, side in ((ids, "user"), (items, "item"))]
    names = [] if rules.kind == "predict" else None
    return SeqChunk(ids, 0, ids, ids, items, ids.astype(np.int8), ids, names, [], *rows)


def join_chunks(chunks: list[SeqChunk]) -> SeqChunk:
    """One chunk of several in order; their line numbers already count on."""
    if len(chunks) == 1:
        return chunks[0]
    ahead = np.cumsum([0] + [len(c.item_ids) for c in chunks]).tolist()
    arrays = {name: np.concatenate([getattr(c, name) for c in chunks]) for name in COLUMNS}
    names = None if chunks[0].user_names is None else [name for c in chunks for name in c.user_names]
    odd = [(event + ahead[n], name) for n, c in enumerate(chunks) for event, name in c.odd_items]
    return SeqChunk(**arrays, num_lines=sum(c.num_lines for c in chunks), user_names=names, odd_items=odd,
                    users=join_rows([c.users for c in chunks]), items=join_rows([c.items for c in chunks]),
                    rejects=[r for c in chunks for r in c.rejects], tally=sum((c.tally for c in chunks), Counter()))  # fmt: skip


def join_rows(rows: list[FeatureRows]) -> FeatureRows:
    """Feature rows one after another."""
    multi = {k: Ragged(*(np.concatenate([r.multi[k][part] for r in rows]) for part in (0, 1))) for k in rows[0].multi}
    return FeatureRows(np.concatenate([r.ids for r in rows]), np.concatenate([r.single for r in rows]), multi)


COLUMNS = ("lines", "user_ids", "counts", "item_ids", "action_types", "timestamps")


def save_chunk(chunk: SeqChunk, path: Path) -> dict:
    """Write the arrays of a chunk to `path` (npz); the rest comes back as plain JSON values."""
    arrays = {name: getattr(chunk, name) for name in COLUMNS}
    for side in ("users", "items"):
        rows = getattr(chunk, side)
        arrays |= {f"{side}.ids": rows.ids, f"{side}.single": rows.single}
        for name, ragged in rows.multi.items():
            arrays |= {f"{side}.counts.{name}": ragged.counts, f"{side}.values.{name}": ragged.values}
    np.savez(path, **arrays)
    return {"num_lines": chunk.num_lines, "user_names": chunk.user_names, "odd_items": chunk.odd_items, "rejects": chunk.rejects,
            "tally": dict(chunk.tally), "last_offset": chunk.last_offset}  # fmt: skip


def load_chunk(path: Path, plain: dict) -> SeqChunk:
    """What save_chunk wrote and gave."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    sides = {}
    for side in ("users", "items"):
        begin = f"{side}.counts."
        names = [name[len(begin) :] for name in arrays if name.startswith(begin)]
        multi = {name: Ragged(arrays[f"{side}.counts.{name}"], arrays[f"{side}.values.{name}"]) for name in names}
        sides[side] = FeatureRows(arrays[f"{side}.ids"], arrays[f"{side}.single"], multi)
    rest = plain | {"tally": Counter(plain["tally"])} | {k: [tuple(pair) for pair in plain[k]] for k in ("rejects", "odd_items")}
    return SeqChunk(**{name: arrays[name] for name in COLUMNS}, **sides, **rest)


def load_known(folder: Path) -> KnownItems:
    """The item features that were read before the sequences, as item_table.ItemTable.share left them."""
    known = json.loads((folder / "known.json").read_text(encoding="utf-8"))
    arrays = {name: load_array(folder, name, spec) for name, spec in known["arrays"].items()}
    single = load_array(Path(known["single"]["folder"]), known["single"]["name"], known["single"]["spec"])
    return KnownItems(single, arrays["covered"], {name: (arrays[f"{name}.offsets"], arrays[f"{name}.values"]) for name in known["multi"]})


def _work() -> None:
    """A worker: for each file a line of setup, then a task a line; an answer a task. Ends when its input does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops it
    gc.disable()
    if sys.argv[1:] == ["compiled"]:
        sources_loops.start()
    reader, wait = None, LOAD_SECONDS
    for line in sys.stdin.buffer:
        message = orjson.loads(line)
        if isinstance(message, dict):
            reader = _Reader(message)
            continue
        *task, out = message
        sources_loops.compiled(wait=wait)
        wait = 0.0
        try:
            answer = save_chunk(reader.read(Task(*task)), Path(out))
        except UserError as error:
            answer = {"error": {"kind": "UserError", "text": str(error)}}
        except OSError as error:
            answer = {"error": {"kind": "OSError", "errno": error.errno, "text": str(error.strerror)}}
        except Exception as error:
            answer = {"error": {"kind": type(error).__name__, "text": f"{type(error).__name__}: {error}"}}
        sys.stdout.buffer.write(orjson.dumps(answer) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _work()
