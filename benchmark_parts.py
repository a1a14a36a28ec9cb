"""The parts of the benchmark: which children take which turns, and the figures made of their answers.

Each part's ratio is the median over rounds of turns. Must not measure by itself (benchmark_child.py does), read flags or print a table.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from atomic import write_text_atomic
from benchmark_process import SAMPLE_SECONDS, Process, memory_of
from errors import EXIT_USER_MISTAKE, RunError, UserError

HERE = Path(__file__).resolve().parent
PARTS = ("compile", "start", "batches", "step", "memory", "retrieval", "checkpoint", "loss")
# Keys that the JSON always has (interface.md); null where a part was not asked for or could not run.
REQUIRED_KEYS = (
    "train.users_per_s", "train.reference_users_per_s", "train.ratio", "train.ratio_min", "train.ratio_max", "reference.step_s",
    "compile.mb_per_s", "start.seconds", "batches.ratio", "retrieval.users_per_s", "retrieval.faiss_users_per_s", "memory.peak_mib",
    "memory.reference_peak_mib",
)  # fmt: skip
MIN_WARM_UP = 3
TRIAL_WARM_UP, TRIAL_STEPS = 7, 9  # of the reference's loader workers: the first steps live on batches made while it started
OUR_DROPPED, REFERENCE_DROPPED = 2, 1  # first steps of a turn: the other side's turn left cold caches
BEAUTY = {"users": 22_363, "items": 12_101, "shortest": 5, "mean": 8.9, "attributes": 1_221, "attributes_an_item": 5}  # Amazon, 5-core


class Sizes(NamedTuple):
    """How much a run measures; --quick takes small ones."""

    users: int = 100_000
    items: int = 478_000
    batch_size: int = 128
    rounds: int = 7
    steps: int = 30  # of ours a turn; the reference makes a sixth of them, at least 3
    start_repeats: int = 3
    candidates: int = 660_000
    queries: int = 2048
    checked: int = 512
    widths: tuple[int, ...] = (32, 64, 128, 256)
    beauty_users: int = BEAUTY["users"]
    beauty_items: int = BEAUTY["items"]
    beauty_batch: int = 256
    settle: float = 0.5  # seconds


QUICK = Sizes(400, 500, 32, 2, 10, 1, 3000, 64, 32, (32, 64), 300, 200, 64, 0.05)


# ---- figures ------------------------------------------------------------------------------------------------------------


class Ratio(NamedTuple):
    """Median, smallest and largest over rounds."""

    median: float
    smallest: float
    largest: float


def ratio_of(slow: Sequence[Sequence[float]], fast: Sequence[Sequence[float]]) -> Ratio:
    """How many times longer `slow` takes than `fast`: seconds of each round; a round's ratio is that of its medians."""
    each = [statistics.median(a) / statistics.median(b) for a, b in zip(slow, fast, strict=True)]
    return Ratio(statistics.median(each), min(each), max(each))


def median_of(rounds: Sequence[Sequence[float]]) -> float:
    """The median over all of all rounds."""
    return statistics.median([seconds for turn in rounds for seconds in turn])


def ratio_keys(part: str, ratio: Ratio) -> dict[str, float]:
    return dict(zip((f"{part}.ratio", f"{part}.ratio_min", f"{part}.ratio_max"), ratio))


def part_medians(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """{"data_s": median, ...} of steps' parts."""
    return {f"{name}_s": statistics.median(step[name] for step in parts) for name in parts[0]} if parts else {}


# ---- the run ------------------------------------------------------------------------------------------------------------


class Benchmark:
    """One run: which parts, which sizes, and `results`, the flat JSON as far as it has come."""

    def __init__(self, flags: argparse.Namespace, sizes: Sizes, work: Path) -> None:
        self.flags, self.sizes, self.work = flags, sizes, work
        self.cache = Path(flags.cache).resolve()
        self.results: dict = dict.fromkeys(REQUIRED_KEYS)
        self.notes: list[str] = []
        self.done: list[str] = []
        self.settings: dict = {}  # of our training child, where there was one
        self.values = {"batch_size": sizes.batch_size}
        names = ("hidden_units", "num_blocks", "num_heads")
        self.values |= {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}

    def run(self) -> None:
        """All parts asked for; the JSON is written after each, so that an interrupted run keeps what it had."""
        parts = self.flags.parts
        self.machine()
        training = [part for part in ("step", "memory", "batches", "checkpoint") if part in parts]
        if training or {"compile", "start"} & set(parts):
            self.prepare_data()
            if "compile" not in parts:
                self.warm_store()
        steps = [("compile", self.compile), ("start", self.start), ("retrieval", self.retrieval), ("loss", self.loss)]
        jobs = [(name, job) for name, job in steps if name in parts]
        if training:
            jobs.insert(sum(name in ("compile", "start") for name, _ in jobs), (", ".join(training), lambda: self.training(training)))
        for name, job in jobs:
            began = time.monotonic()
            job()
            self.done.append(name)
            say(f"{name}: done in {time.monotonic() - began:.0f} s")
            self.write_json()

    def write_json(self) -> None:
        if self.flags.json:
            write_text_atomic(Path(self.flags.json), json.dumps(self.results | {"notes": self.notes}, indent=1) + "\n")

    def order(self, kind: str, name: str = "", **more: object) -> dict:
        """What a child is told at its start."""
        base = {"kind": kind, "name": name or kind, "work": str(self.work), "config": str(Path(self.flags.config).resolve())}
        base |= {"values": self.values, "full": self.flags.features == "full", "settle": self.sizes.settle}
        return base | {"data": str(getattr(self, "data", "")), "cache": str(getattr(self, "stores", ""))} | more

    def child(self, *arguments: str, **more: object) -> Process:
        return Process(self.order(*arguments, **more), self.work)

    def machine(self) -> None:
        with self.child("machine") as child:
            facts = child.ready
        if self.flags.compile:
            if facts["compile_key"]:
                self.values["compile"] = True
            else:
                self.notes.append("--compile: the settings have no key training.compile; left out.")
        load = os.getloadavg()[0]
        self.results |= {f"machine.{key}": facts[key] for key in ("cpu", "cpus", "threads", "torch", "python", "commit", "memory_gib")}
        self.results |= {"machine.load": load, "command": " ".join(sys.argv), "features": self.flags.features, "config": self.flags.config}
        self.results |= {"data": self.flags.data, "users": self.sizes.users, "items": self.sizes.items}
        if load > 0.5:
            self.notes.append(f"the machine had other work when this began (load {load:.1f}): the figures are lower than they could be.")

    # -- data

    def prepare_data(self) -> None:
        """The JSONL folder of both sides: --data, or synthetic data that is made once and kept."""
        sizes = self.sizes
        self.data = Path(self.flags.data or self.cache / f"jsonl-{sizes.users}x{sizes.items}").resolve()
        self.stores = self.cache / "stores" / self.data.name
        if self.flags.data is None and not self.data.exists():
            arguments = ["--users", sizes.users, "--items", sizes.items, "--layout", "jsonl"]
            self.make(self.data, lambda out: ["synthetic.py", out, *arguments])

    def make(self, folder: Path, command: Callable[[Path], list]) -> None:
        """Run one of the repository's scripts, `command` of the folder to write; that becomes `folder` when it is whole."""
        say(f"making {folder} (kept for later runs)")
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = self.work / folder.name
        script, *arguments = map(str, command(draft))
        status = subprocess.run([sys.executable, str(HERE / script), *arguments], stdout=subprocess.DEVNULL, check=False).returncode
        if status:
            raise (UserError if status == EXIT_USER_MISTAKE else RunError)(f"{folder}: {script} ended with status {status}; see above.")
        draft.rename(folder)

    # -- compile and start

    def compile(self) -> None:
        self.compile_one("compile", self.data, self.stores)
        if self.flags.parquet:
            source = Path(self.flags.parquet).resolve()
            self.compile_one("compile_parquet", source, self.cache / "stores" / f"parquet-{source.name}")

    def compile_one(self, part: str, data: Path, stores: Path) -> None:
        """Compile `data` anew into `stores`, which is kept for the other parts."""
        shutil.rmtree(stores, ignore_errors=True)
        with self.child("compile", part, data=str(data), cache=str(stores)) as child:
            with child.sampling():
                facts = child.do("compile")
                peaks = {"peak_anon_mib": child.peak_tree, "peak_hwm_mib": child.peak_rss}
            facts["embedding_seconds"] = child.do("embeddings")["seconds"]
        seconds = facts["seconds"]
        facts |= peaks | {"mb_per_s": facts["bytes"] / 1e6 / seconds, "rows_per_s": facts["events"] / seconds}
        self.results |= {f"{part}.{key}": value for key, value in facts.items()}

    def warm_store(self, **more: object) -> None:
        """Compile in a process of its own where the cache has no store: a side's memory must not be that of compiling."""
        with self.child("compile", **more) as child:
            child.do("embeddings")

    def start(self) -> None:
        times, anon = [], []
        for _ in range(self.sizes.start_repeats):
            with self.child("start") as child, child.sampling():
                answer = child.do("start")
            if not answer["hit"]:
                raise RunError(f"{self.stores}: the store was compiled by the start itself, though it had been opened before.")
            times.append(answer["seconds"])
            anon.append(child.peak_anon)
        self.results |= {"start.seconds": statistics.median(times), "start.raw_s": times, "start.peak_anon_mib": max(anon)}

    # -- training

    def training(self, parts: list[str]) -> None:
        """The parts that need both training sides, in one pair of children."""
        with self.child("ours") as ours:
            self.settings = ours.ready["config"]
            names = ("hidden_units", "num_blocks", "num_heads")
            self.results |= {name: self.settings["model"][name] for name in names} | {"batch_size": self.sizes.batch_size}
            self.results |= {"users": ours.ready["all_users"], "items": ours.ready["items"]}  # --data has its own
            self.results |= {"table.rows": ours.ready["rows"], "train.samples": ours.ready["users"]}
            workers = self.best_workers()
            with self.reference(workers) as reference:
                self.results |= {"reference.rows": reference.ready["rows"], "reference.start_s": reference.ready["seconds"]}
                self.results["reference.num_workers"] = workers
                ours.do(f"steps {max(MIN_WARM_UP, self.sizes.steps)}")
                reference.do(f"steps {MIN_WARM_UP}")
                for part in parts:
                    getattr(self, f"pair_{part}")(ours, reference)

    def reference(self, workers: int) -> Process:
        names = ("hidden_units", "num_blocks", "num_heads", "max_seq_length", "dropout_rate")
        settings = {name: self.settings["model"][name] for name in names} | {"num_workers": workers}
        settings |= {name: self.settings["training"][name] for name in ("batch_size", "learning_rate")}
        settings |= {"seed": self.settings["system"]["seed"], "full_tables": self.flags.features == "full"}
        return self.child("reference", settings=settings)

    def best_workers(self) -> int:
        """The number of loader workers with which the reference is fastest, by a short trial of each."""
        if len(self.flags.workers) == 1:
            return self.flags.workers[0]
        medians = {}
        for workers in self.flags.workers:
            with self.reference(workers) as child:
                child.do(f"steps {TRIAL_WARM_UP}")
                medians[workers] = statistics.median(child.do(f"steps {TRIAL_STEPS}")["steps"])
                self.results[f"reference.trial_{workers}_workers_s"] = medians[workers]
        say("reference, step with " + ", ".join(f"{n} loader workers {seconds:.2f} s" for n, seconds in medians.items()))
        return min(medians, key=medians.get)

    def pair_step(self, ours: Process, reference: Process) -> None:
        sizes = self.sizes
        their_steps = max(MIN_WARM_UP, sizes.steps // 6)
        our_steps, their_times, waits, their_parts = [], [], [], []
        for _ in range(sizes.rounds):
            mine = ours.do(f"steps {sizes.steps + OUR_DROPPED}")
            theirs = reference.do(f"steps {their_steps + REFERENCE_DROPPED}")
            our_steps.append(mine["steps"][OUR_DROPPED:])
            waits += mine["waits"][OUR_DROPPED:]
            their_times.append(theirs["steps"][REFERENCE_DROPPED:])
            their_parts += theirs["parts"][REFERENCE_DROPPED:]
        our_parts = ours.do(f"parts {sizes.steps + OUR_DROPPED}")["parts"][OUR_DROPPED:]
        whole = sum(map(sum, our_steps))
        step, their_step = median_of(our_steps), median_of(their_times)
        self.results |= ratio_keys("train", ratio_of(their_times, our_steps))
        self.results |= {
            "train.users_per_s": sizes.batch_size / step, "train.reference_users_per_s": sizes.batch_size / their_step,
            "train.step_s": step, "train.mean_step_s": whole / len(waits), "train.data_wait": sum(waits) / whole,
            "train.loss": mine["loss"], "reference.step_s": their_step, "reference.loss": theirs["loss"],
            "train.raw_s": our_steps, "reference.raw_s": their_times,
        }  # fmt: skip
        self.results |= {f"train.{key}": value for key, value in part_medians(our_parts).items()}
        self.results |= {f"reference.{key}": value for key, value in part_medians(their_parts).items()}

    def pair_memory(self, ours: Process, reference: Process) -> None:
        """Peaks from the start on, while training and while saving. The reference's is that of its training process alone: its loader's
        workers share pages with it, so a sum would count them twice."""
        for child, steps in ((ours, self.sizes.steps), (reference, MIN_WARM_UP)):
            with child.turn(), child.sampling():
                child.ask(f"steps {steps}")
                child.ask("save")
        self.results |= {"memory.peak_mib": ours.peak_anon or None, "memory.reference_peak_mib": reference.peak_anon or None}
        self.results |= {"memory.hwm_mib": memory_of(ours.process.pid)[1], "memory.reference_hwm_mib": memory_of(reference.process.pid)[1]}
        self.results["memory.ratio"] = reference.peak_anon / max(ours.peak_anon, 1e-9)

    def pair_batches(self, ours: Process, reference: Process) -> None:
        """Batches a second without training. What the loaders had ready at the turn's begin is not counted."""
        ahead = 2 * self.results["reference.num_workers"] + 1
        number = max(MIN_WARM_UP, self.sizes.steps // 6)
        mine, theirs = [], []
        for _ in range(self.sizes.rounds):
            seconds = ours.do(f"batches {self.sizes.steps + OUR_DROPPED}")["batches"][OUR_DROPPED:]
            mine.append([statistics.mean(seconds)])  # means: batches come in bursts
            theirs.append([statistics.mean(reference.do(f"batches {number + ahead}")["batches"][ahead:])])
        self.results |= ratio_keys("batches", ratio_of(theirs, mine))
        self.results |= {"batches.per_s": 1 / median_of(mine), "batches.reference_per_s": 1 / median_of(theirs)}

    def pair_checkpoint(self, ours: Process, reference: Process) -> None:
        rounds = [{(side, what): child.do(what) for what in ("save", "load") for side, child in (("", ours), ("reference_", reference))}
                  for _ in range(min(3, self.sizes.rounds))]  # fmt: skip
        for what in ("save", "load"):
            mine, theirs = ([[answers[side, what]["seconds"]] for answers in rounds] for side in ("", "reference_"))
            self.results |= ratio_keys(f"checkpoint.{what}", ratio_of(theirs, mine))
            self.results |= {f"checkpoint.{what}_s": median_of(mine), f"checkpoint.reference_{what}_s": median_of(theirs)}
        for side in ("", "reference_"):
            self.results[f"checkpoint.{side}mb"] = rounds[0][side, "save"]["bytes"] / 1e6

    # -- retrieval and loss

    def retrieval(self) -> None:
        sizes = {"candidates": self.sizes.candidates, "queries": self.sizes.queries}
        with_faiss = importlib.util.find_spec("faiss") is not None
        if not with_faiss:
            self.notes.append("faiss is not installed (pip install faiss-cpu): its figures are missing.")
        main = 64 if 64 in self.sizes.widths else self.sizes.widths[0]
        self.results |= {"retrieval.candidates": self.sizes.candidates, "retrieval.width": main}
        with ExitStack() as children:
            ours = children.enter_context(self.child("retrieval", **sizes))
            other = children.enter_context(self.child("faiss", **sizes)) if with_faiss else None
            for width in self.sizes.widths:
                found = self.retrieval_width(width, ours, other)
                self.results |= {f"retrieval.{width}.{key}": value for key, value in found.items()}
                if width == main:
                    self.results |= {f"retrieval.{key}": value for key, value in found.items()}
                if width == main and self.flags.hnsw and other is not None:
                    self.hnsw(other)

    def retrieval_width(self, width: int, ours: Process, other: Process | None) -> dict:
        """Figures of one width; without faiss, ours alone."""
        queries = self.sizes.queries
        found = {"prepare_s": ours.do(f"width {width}")["seconds"]}
        names = ["search", "plain"] + (["faiss"] if other else [])
        times: dict[str, list] = {name: [] for name in names}
        if other:
            other.do(f"width {width}")
        for number in range(1 + min(3, self.sizes.rounds)):  # the first is a warm-up
            for name in names:
                answer = other.do(f"search {queries}") if name == "faiss" else ours.do(f"{name} {queries}")
                if number:
                    times[name].append([answer["seconds"]])
        found |= {"users_per_s": queries / median_of(times["search"]), "plain_users_per_s": queries / median_of(times["plain"])}
        found["faiss_users_per_s"] = None
        if other:
            other.do(f"write {self.sizes.checked}")
            checked = ours.do(f"compare {self.sizes.checked}")
            found |= {"faiss_users_per_s": queries / median_of(times["faiss"]), "checked": checked["checked"], "wrong": checked["wrong"]}
            found |= dict(zip(("ratio", "ratio_min", "ratio_max"), ratio_of(times["faiss"], times["search"])))
        return found

    def hnsw(self, other: Process) -> None:
        say("building faiss's HNSW at the baseline's settings: this takes a quarter of an hour to an hour")
        answer = other.do(f"hnsw {self.sizes.queries}")
        self.results |= {"hnsw.build_s": answer["build"], "hnsw.users_per_s": self.sizes.queries / answer["seconds"]}
        self.results |= {"hnsw.recall@10": answer["recall"]}

    def loss(self) -> None:
        """A whole step at Beauty's shape: full softmax over all items against 1,024 sampled negatives."""
        sizes = self.sizes
        folder = self.cache / f"beauty-{sizes.beauty_users}x{sizes.beauty_items}"
        if not folder.exists():
            source = write_beauty(self.work / "beauty.txt", sizes.beauty_users, sizes.beauty_items)
            self.make(folder, lambda out: ["convert.py", "s3rec", source, out])
        same = {"hidden_units": 64, "num_blocks": 2, "num_heads": 2, "batch_size": sizes.beauty_batch}
        kinds = {
            "full": {"name": "full_softmax"},
            "sampled": {"name": "sampled_softmax", "num_negatives": 1024, "in_batch_negatives": False},
        }
        more = {"data": str(folder), "cache": str(self.cache / "stores" / folder.name), "full": False}
        more["config"] = str(HERE / "configs" / "public.yaml")
        self.warm_store(**more)
        with ExitStack() as children:
            full, sampled = (
                children.enter_context(self.child("ours", f"loss-{kind}", values=same | values, **more)) for kind, values in kinds.items()
            )
            times: dict[str, list] = {"full": [], "sampled": []}
            pairs = (("full", full), ("sampled", sampled))
            for number in range(sizes.rounds + 1):  # the first is a warm-up
                for kind, child in pairs:
                    steps = child.do(f"steps {sizes.steps + OUR_DROPPED}")["steps"][OUR_DROPPED:]
                    if number:
                        times[kind].append(steps)
            for _, child in pairs:
                with child.sampling(SAMPLE_SECONDS / 4):
                    child.do(f"steps {sizes.steps}")
            hwm = [memory_of(child.process.pid)[1] for _, child in pairs]
            self.results["loss.items"] = full.ready["items"]
        self.results |= ratio_keys("loss", ratio_of(times["full"], times["sampled"]))
        self.results |= {"loss.full_step_s": median_of(times["full"]), "loss.sampled_step_s": median_of(times["sampled"])}
        self.results |= {"loss.full_raw_s": times["full"], "loss.sampled_raw_s": times["sampled"]}
        self.results |= {"loss.more_mib": full.peak_anon - sampled.peak_anon, "loss.more_hwm_mib": hwm[0] - hwm[1]}
        self.results |= {"loss.full_peak_mib": full.peak_anon, "loss.sampled_peak_mib": sampled.peak_anon}


def write_beauty(path: Path, num_users: int, num_items: int) -> Path:
    """Random sequences of Beauty's lengths in S3-Rec's form (and its attributes beside), for convert.py; returns `path`."""
    draw = random.Random(0)
    stop = 1 / (BEAUTY["mean"] - BEAUTY["shortest"] + 1)
    lengths = []
    for _ in range(num_users):
        length = BEAUTY["shortest"]
        while draw.random() > stop:
            length += 1
        lengths.append(min(length, num_items))
    # Every item once, so that the catalogue has its size; the others by a long-tailed popularity.
    events = [*range(1, num_items + 1), *(1 + int(num_items * draw.random() ** 3) for _ in range(sum(lengths) - num_items))]
    draw.shuffle(events)
    place = iter(events)
    path.write_text("".join(f"{user} {' '.join(str(next(place)) for _ in range(length))}\n" for user, length in enumerate(lengths, 1)))
    tags = {
        str(item): sorted(draw.sample(range(1, BEAUTY["attributes"] + 1), BEAUTY["attributes_an_item"])) for item in range(1, num_items + 1)
    }
    path.with_name(f"{path.stem}_item2attributes.json").write_text(json.dumps(tags))
    return path


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)
