"""Entry script: writes TencentGR-shaped data of any size in either layout, drawn from the planted world.

`python synthetic.py OUT --users N --items M --layout {jsonl,parquet} [--predict K] [--seed S]`. The same arguments give the same data in
both layouts. Must not decide what the data are (planted.py does).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from atomic import put_folder, temporary_folder
from errors import ArgumentParser, RunError, UserError, disk_full, run_cli
from planted import CHUNK, MIN_WINDOW, USER_MULTI, USER_SINGLE, build_world, ceiling, choose_candidates, chunks, make_cold, sample_users
from planted_features import VECTOR_INNER, cardinalities, embedding_pieces, item_features
from schema import TENCENT_GR, Feature
from synthetic_files import (
    ROWS_A_PART,
    Fragments,
    JsonVectors,
    ParquetVectors,
    PickledVectors,
    candidate_lines,
    candidate_table,
    item_table,
    json_lines,
    line_offsets,
    raw_user,
    sequence_table,
    to_json,
    user_table,
    write_lines,
    write_parquet,
    write_pickle,
)  # fmt: skip

LAYOUTS = ("jsonl", "parquet")
SPEC_FILE = "synthetic.json"
CHUNKS_A_PART = 8  # of users, in parquet
PARALLEL_USERS = 2 * CHUNK  # below, processes cost more than they bring
MAX_WORKERS = 2


@dataclass(frozen=True)
class Spec:
    """What to write; see `generate`."""

    users: int
    items: int
    layout: str
    predict: int = 0
    seed: int = 0
    embeddings: tuple[str, ...] = ("81",)
    parts: int = 0
    max_length: int = 100
    mean_length: float = 91.06
    conversions: bool = False

    def __post_init__(self) -> None:
        smallest = 4 * MIN_WINDOW
        for name, least in (("users", 1), ("items", smallest), ("predict", 0), ("seed", 0), ("parts", 0), ("max_length", 2)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"--{name}: {value!r}; expected a whole number from {least} up.")
        if self.layout not in LAYOUTS:
            raise UserError(f"--layout: {self.layout!r}; expected {' or '.join(LAYOUTS)}.")
        if not 1 <= self.mean_length <= self.max_length:
            if self.mean_length != Spec.mean_length:
                raise UserError(f"--mean_length: {self.mean_length}; expected a number from 1 to max_length, {self.max_length}.")
            object.__setattr__(self, "mean_length", float(self.max_length))
        known = [f.id for f in TENCENT_GR.embeddings]
        for name in self.embeddings:
            if name not in known:
                raise UserError(f"--embeddings: {name!r}; expected some of {', '.join(known)}.")

    @property
    def lengths(self) -> dict:
        return {"max_length": self.max_length, "mean_length": self.mean_length, "conversions": self.conversions}

    @property
    def tasks(self) -> list[list[tuple[int, int]]]:
        """The chunks of the training users, grouped as they are written: one a task (jsonl), a part of several (parquet)."""
        all_chunks = chunks(self.users)
        size = 1 if self.layout == "jsonl" else -(-len(all_chunks) // self.parts) if self.parts else CHUNKS_A_PART
        return [all_chunks[k : k + size] for k in range(0, len(all_chunks), size)]


def generate(out: str | Path, users: int, items: int, layout: str, predict: int = 0, seed: int = 0, *,
             embeddings: Sequence[str | int] = ("81",), parts: int = 0, max_length: int = 100, mean_length: float = 91.06,
             conversions: bool = False, overwrite: bool = False, log: Callable[[str], None] | None = None) -> None:  # fmt: skip
    """Write synthetic data to the folder `out`, and with `predict` what EVAL_DATA_PATH holds to `out`-eval.

    users, items, predict: how many; users to predict are numbered after the others. layout: "jsonl" (A) or "parquet" (B). embeddings:
    which multimodal features to write. parts: at most so many files of sequences (parquet; 0: one each 65,536 users). max_length,
    mean_length: events a user. conversions: the second round's actions. overwrite: replace what an earlier call made. log: takes lines.
    `out`-eval has truth.json {raw user id: creative id of the true next item} and user_action_type.json {raw user id: its action}
    besides. Both folders appear when complete. Errors: UserError for wrong arguments or a folder with something in it, RunError for a full
    disk or a worker that failed.
    """
    spec = Spec(users, items, layout, predict, seed, tuple(str(e) for e in embeddings), parts, max_length, mean_length, conversions)
    out = Path(out).absolute()
    targets = [out] + ([out.with_name(out.name + "-eval")] if predict else [])
    for path in targets:
        _check_free(path, overwrite)
    try:
        with ExitStack() as stack:
            out.parent.mkdir(parents=True, exist_ok=True)
            drafts = [stack.enter_context(temporary_folder(path)) for path in targets]
            _Writer(spec, drafts[0], drafts[1] if predict else None, log or (lambda line: None)).write()
            for draft, path in zip(drafts, targets, strict=True):
                if path.exists():
                    shutil.rmtree(path)
                put_folder(draft, path)
    except OSError as error:
        raise disk_full(error, out) or error from None


def _check_free(path: Path, overwrite: bool) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if overwrite and (path / SPEC_FILE).is_file():
        return
    todo = "no earlier call made it, so it is left alone" if overwrite else "remove it, name another, or give --overwrite"
    raise UserError(f"{path}: there is something already; expected a new or empty folder; {todo}.")


def load_spec(out: str | Path) -> Spec:
    """The arguments that made a folder (its synthetic.json); UserError where there is none."""
    path = Path(out) / SPEC_FILE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return Spec(**(tree | {"embeddings": tuple(tree["embeddings"])}))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not the arguments of a synthetic data set ({error}). Give a folder that synthetic.py made.") from None


def planted_ceiling(out: str | Path, **options: bool) -> dict[str, float]:
    """`planted.ceiling` for a folder made with `predict`; options: only_candidates, know_time."""
    spec = load_spec(out)
    if not spec.predict:
        raise UserError(f"{out}: made without --predict; the ceiling is that of the users to predict. Make it again with --predict K.")
    return ceiling(build_world(spec.items, spec.predict, spec.seed), spec.predict, **options, **spec.lengths)


class _Writer:
    """One data set on its way to disk. out: folder of the training data; out_eval: of the users to predict, or None."""

    def __init__(self, spec: Spec, out: Path, out_eval: Path | None, log: Callable[[str], None]) -> None:
        self.spec, self.out, self.out_eval, self.log = spec, out, out_eval, log
        self.world = build_world(spec.items, spec.predict, spec.seed)
        self.is_jsonl = spec.layout == "jsonl"
        self._start = time.monotonic()

    @cached_property
    def table(self) -> np.ndarray:
        return item_features(self.world)

    @cached_property
    def fragments(self) -> Fragments:
        return Fragments(self.table)

    def write(self) -> None:
        spec = self.spec
        scratch = self.out / ".scratch"
        scratch.mkdir()
        workers = self._start_workers(scratch)
        try:
            self._indexer()
            self._items()
            for name in spec.embeddings:
                self._embedding(TENCENT_GR[name])
                self._say(f"vectors of {name}")
            if not workers:
                for task in range(len(spec.tasks)):
                    self.write_task(task, scratch)
            self._collect(scratch, workers)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        shutil.rmtree(scratch)
        self._say("sequences")
        if self.out_eval:
            self._predict()
            self._say("users to predict")
        for folder in filter(None, (self.out, self.out_eval)):
            (folder / SPEC_FILE).write_text(json.dumps(asdict(spec)) + "\n", encoding="utf-8")

    def _say(self, what: str) -> None:
        self.log(f"{time.monotonic() - self._start:7.1f} s  {what} written")

    # Sequences of the training users

    def _start_workers(self, scratch: Path) -> list[subprocess.Popen]:
        """Processes that share the tasks; none for few users. Programs of their own: nothing of the caller is forked or imported."""
        num = min(MAX_WORKERS, os.cpu_count() or 1, len(self.spec.tasks))
        if self.spec.users <= PARALLEL_USERS or num < 2:
            return []
        order = {"spec": asdict(self.spec), "out": str(self.out), "scratch": str(scratch), "step": num, "parent": os.getpid()}
        return [subprocess.Popen([sys.executable, __file__, "--worker", json.dumps(order | {"first": k})]) for k in range(num)]

    def write_task(self, task: int, scratch: Path) -> None:
        """One task of the training users: a piece of seq.jsonl in `scratch`, or a part of seq/ and user_feat/."""
        group = self.spec.tasks[task]
        drawn = [sample_users(self.world, "users", k, n, **self.spec.lengths) for k, n in group]
        first = [1 + k * CHUNK for k, _ in group]
        done = scratch / f"task-{task:05d}"
        if self.is_jsonl:
            lines = json_lines(self.world, drawn[0], self.fragments, list(range(first[0], first[0] + group[0][1])), drawn[0].counts)
            np.save(done.with_suffix(".npy"), write_lines(lines, done.with_suffix(".tmp")))
        else:
            pairs = list(zip(drawn, first, strict=True))
            tables = [sequence_table(self.world, users, number, users.counts) for users, number in pairs]
            write_parquet(pa.concat_tables(tables), self.out / "seq", task)
            write_parquet(pa.concat_tables(user_table(users, number) for users, number in pairs), self.out / "user_feat", task)
            done.with_suffix(".tmp").touch()
        done.with_suffix(".tmp").rename(done)

    def _collect(self, scratch: Path, workers: list[subprocess.Popen]) -> None:
        """Wait for the tasks in order; append the pieces of seq.jsonl as they come."""
        lengths = []
        for task in range(len(self.spec.tasks)):
            done = scratch / f"task-{task:05d}"
            while not done.exists():
                ended = [worker.poll() for worker in workers]
                if (any(ended) or None not in ended) and not done.exists():
                    raise RunError(f"{self.out}: a process that writes sequences failed; its message stands above.")
                time.sleep(0.02)
            if self.is_jsonl:
                with open(self.out / "seq.jsonl", "ab") as whole, open(done, "rb") as piece:
                    shutil.copyfileobj(piece, whole, 1 << 22)
                lengths.append(np.load(done.with_suffix(".npy"), allow_pickle=False))
                done.unlink()
        if self.is_jsonl:
            write_pickle(line_offsets(np.concatenate(lengths)), self.out / "seq_offsets.pkl")

    # What describes items: known ones alike in both folders, cold ones in the other

    def _share(self, path: Path) -> None:
        """Copy a file or folder of the training data to the other folder. No hard link: an edit of one must leave the other alone."""
        if self.out_eval:
            copy = self.out_eval / path.relative_to(self.out)
            copy.parent.mkdir(exist_ok=True)
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, copy)

    def _indexer(self) -> None:
        spec = self.spec
        known = self.world.creative_ids[1 : spec.items + 1].tolist()
        values = cardinalities(self.world) | {f: TENCENT_GR[f].cardinality for f in (*USER_SINGLE, *USER_MULTI)}
        tree = {"u": {raw_user(k): k for k in range(1, spec.users + spec.predict + 1)},
                "i": dict(zip(known, range(1, spec.items + 1), strict=True)),
                "f": {name: {f"value_{name}_{k}": k for k in range(1, size + 1)} for name, size in values.items()}}  # fmt: skip
        write_pickle(tree, self.out / "indexer.pkl")
        self._share(self.out / "indexer.pkl")
        self._say("indexer")

    def _items(self) -> None:
        num = self.spec.items
        if self.is_jsonl:
            path = self.out / "item_feat_dict.json"
            with open(path, "wb") as file:
                file.write(b"{")
                file.writelines(b'%s"%d":%s' % (b"," if k > 1 else b"", k, self.fragments.items[k]) for k in range(1, num + 1))
                file.write(b"}")
        else:
            path = self.out / "item_feat"
            for part, first in enumerate(range(1, num + 1, ROWS_A_PART)):
                ids = np.arange(first, min(first + ROWS_A_PART, num + 1))
                write_parquet(item_table(ids, self.table[ids]), path, part)
        self._share(path)
        self._say("item features")

    def _embedding(self, feature: Feature) -> None:
        name = f"emb_{feature.id}_{feature.width}"
        is_pickle = self.is_jsonl and feature.width == VECTOR_INNER
        kind = "creative_emb" if self.is_jsonl else "mm_emb"
        path = self.out / kind / (name + (".pkl" if is_pickle else "" if self.is_jsonl else "_parquet"))
        make = PickledVectors if is_pickle else JsonVectors if self.is_jsonl else lambda p: ParquetVectors(p, feature.width)
        sink = make(path)
        self._add_vectors(sink, feature, cold=False)
        if not self.out_eval:
            return
        copy = self.out_eval / path.relative_to(self.out)
        if is_pickle:
            copy.parent.mkdir(exist_ok=True)
            more = PickledVectors(copy, sink.tree)
        else:
            self._share(path)
            more = make(copy)
        self._add_vectors(more, feature, cold=True)

    def _add_vectors(self, sink: PickledVectors | JsonVectors | ParquetVectors, feature: Feature, *, cold: bool) -> None:
        creative_ids = self.world.creative_ids
        for ids, vectors, without in embedding_pieces(self.world, feature, cold=cold):
            sink.add(creative_ids[ids], vectors, creative_ids[without])
        sink.close()

    # Users to predict

    def _predict(self) -> None:
        spec, world, out = self.spec, self.world, self.out_eval
        first, lengths, truth, actions, targets, unknown = spec.users + 1, [], {}, {}, [], []
        for chunk, num in chunks(spec.predict):
            users = sample_users(world, "predict", chunk, num, **spec.lengths)
            make_cold(world, users, chunk)
            counts = users.counts - 1
            rows, names = np.arange(num), [raw_user(k) for k in range(first, first + num)]
            target = users.items[rows, counts]
            truth |= dict(zip(names, world.creative_ids[target].tolist(), strict=True))
            actions |= dict(zip(names, users.actions[rows, counts].tolist(), strict=True))
            targets.append(target)
            if self.is_jsonl:
                lines = json_lines(world, users, self.fragments, names, counts)
                lengths.append(write_lines(lines, out / "predict_seq.jsonl"))
            else:
                seen = users.items[np.arange(users.items.shape[1]) < counts[:, None]]
                unknown.append(np.unique(seen[seen > spec.items]))
                write_parquet(sequence_table(world, users, first, counts), out / "seq", chunk)
                write_parquet(user_table(users, first), out / "user_feat", chunk)
            first += num
        (out / "truth.json").write_bytes(to_json(truth))
        (out / "user_action_type.json").write_bytes(to_json(actions))
        candidates = choose_candidates(world, np.concatenate(targets))
        if self.is_jsonl:
            write_pickle(line_offsets(np.concatenate(lengths)), out / "predict_seq_offsets.pkl")
            write_lines(candidate_lines(world, candidates, self.fragments), out / "predict_set.jsonl")
        else:
            strange = np.unique(np.concatenate(unknown))
            if len(strange):  # a row of seq/ has no room for the features of items that training does not know
                part = -(-spec.items // ROWS_A_PART)
                write_parquet(item_table(world.creative_ids[strange], self.table[strange]), out / "item_feat", part)
            write_parquet(candidate_table(world, candidates, self.table), out / "candidate", 0)


def _work(order: str) -> None:
    """A worker process: every `step`-th task from `first`, as long as its parent lives."""
    tree = json.loads(order)
    spec = Spec(**(tree["spec"] | {"embeddings": tuple(tree["spec"]["embeddings"])}))
    writer = _Writer(spec, Path(tree["out"]), None, print)
    for task in range(tree["first"], len(spec.tasks), tree["step"]):
        if os.getppid() != tree["parent"]:
            return
        writer.write_task(task, Path(tree["scratch"]))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags of `arguments`, or of the command line."""
    parser = ArgumentParser(description="Write TencentGR-shaped data with a planted structure.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    parser.add_argument("out", metavar="OUT", help="folder to write; with --predict also OUT-eval")
    parser.add_argument("--users", type=int, required=True, help="training users")
    parser.add_argument("--items", type=int, required=True, help="items known in training")
    parser.add_argument("--layout", choices=LAYOUTS, required=True, help="the competition's files, or the public release's")
    parser.add_argument("--predict", type=int, default=0, metavar="K", help="users to predict, in OUT-eval")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--embeddings", nargs="*", default=["81"], metavar="ID", help="multimodal features to write, of 81 to 86")
    parser.add_argument("--parts", type=int, default=0, help="files of sequences, parquet only; 0: one each 65,536 users")
    parser.add_argument("--max_length", type=int, default=100, help="events of the longest user")
    parser.add_argument("--mean_length", type=float, default=Spec.mean_length, help="events a user, on average")
    parser.add_argument("--conversions", action="store_true", help="the second round's actions: 2.9 %% clicks, 2.5 %% conversions")
    parser.add_argument("--ceiling", action="store_true", help="also say what the planted odds allow at best (needs --predict)")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier call wrote to OUT")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the data that the flags (default: the command line) ask for."""
    args = parse(arguments)
    if args.ceiling and not args.predict:
        raise UserError("--ceiling: it is that of the users to predict; give --predict K too.")
    options = {key: value for key, value in vars(args).items() if key not in ("ceiling", "debug")}
    generate(**options, log=lambda line: print(line, flush=True))
    if args.ceiling:
        for name, only in (("all known items", False), ("candidates", True)):
            found = planted_ceiling(args.out, only_candidates=only)
            print(f"ceiling over {name}: hr@10 {found['hr@10']:.4f}, ndcg@10 {found['ndcg@10']:.4f} ({found['num_users']:,} users)")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(run_cli(lambda: _work(sys.argv[2])))
    sys.exit(run_cli(main, debug="--debug" in sys.argv))
