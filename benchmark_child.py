"""The child processes of the benchmark: each holds one side (ours, the reference, faiss) and works when a line on stdin asks it to.

Must not decide what is measured, compare sides or print results: it answers one JSON line a command, and the parent does the rest.
Commands: "steps N", "parts N", "batches N", "save", "load", "quit" (see the classes); the end of stdin is "quit" too.

Legend: C candidates, D width, Q queries, K results.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import trainer as training
from config import KEYS, Config, ModelConfig, with_values
from dataset import Prefetcher, make_splits
from errors import UserError
from features import TableLayout, choose_embeddings
from logger import RunLogger
from reference import FULL_SIZES, Reference, ReferenceSettings
from retrieval import prepare_catalogue, topk_exact
from runs import RunPaths, environment
from settings import load_config
from sources import find_source
from store import has_embedding, open_store

NEVER = 10**9  # steps or epochs: a benchmark neither evaluates nor saves unless it is told to
NUM_EXCLUDED, NUM_RESULTS = 100, 10
LONG = 2 * (NUM_RESULTS + 1)  # a ranking that holds ten and one more when every second item is removed
CLEAR_GAP = 1e-5  # of float64 scores: places of the ranking that are further apart admit one answer only
HNSW = {"links": 64, "construction": 1280, "search": 640}  # the baseline's


class Finished(BaseException):
    """The parent wants no more; it passes through the trainer's loop, so it is no Exception."""


class Child:
    """Reads commands, one a line, and answers each with one JSON line. `do_NAME(number)` handles the command NAME."""

    def __init__(self, order: dict) -> None:
        self.order = order
        # Whatever prints to stdout (a library, a progress bar) must not get between the answers.
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def run(self) -> None:
        """Get ready, say so, and serve."""
        self.answer(self.prepare())
        while True:
            self.serve(self.next_command())

    def prepare(self) -> dict:
        """What takes place before the first command; the first answer."""
        return {}

    def answer(self, result: dict) -> None:
        self._answers.write(json.dumps(result) + "\n")
        self._answers.flush()

    def next_command(self) -> tuple[str, int]:
        """The next line as (name, number, 0 without one); raises Finished at "quit" and at the end of stdin."""
        words = sys.stdin.readline().split()
        if not words or words == ["quit"]:
            raise Finished
        return words[0], int(words[1]) if len(words) > 1 else 0

    def serve(self, command: tuple[str, int]) -> None:
        self.answer(getattr(self, f"do_{command[0]}")(command[1]))

    def close(self) -> None:
        """What is to be ended with the process."""


def run_child(order: dict) -> int:
    """The whole life of a child. order: {"kind": one of KINDS, and what its class reads}. Returns the exit status."""
    child = KINDS[order["kind"]](order)
    try:
        child.run()
    except Finished:
        return 0
    finally:
        child.close()


# ---- our side -----------------------------------------------------------------------------------------------------------


def settings_of(order: dict) -> Config:
    """The settings of a run that is measured: the file's, with what the order changes."""
    config = load_config(["--config", order["config"]], environ={}).config
    quiet = {"device": "cpu", "tensorboard": False, "max_steps": NEVER, "eval_every_epochs": NEVER, "save_frequency": NEVER}
    return with_values(config, **quiet, **order["values"], data_path=order["data"], cache_path=order["cache"])


def full_layout(layout: TableLayout, model: ModelConfig) -> TableLayout:
    """The same features with TencentGR-1M's sizes, where these are larger. The data stay as they are: only the table grows."""
    values = {(f.name, f.side, f.kind): max(f.values, FULL_SIZES.get(f.name, 0)) for f in layout.fields}  # a hashed one has several fields
    return TableLayout.from_sizes([(*key, size) for key, size in values.items()], model)


def embeddings_of(data: str, wanted: object) -> tuple[str, ...]:
    schema = find_source(Path(data), "train").schema
    return choose_embeddings(lambda name: has_embedding(data, schema[name]), schema, wanted)


def make_trainer(order: dict) -> training.Trainer:
    """The real trainer over the order's data, as main.py makes it; its run folder lies in the order's work folder."""
    config = settings_of(order)
    embeddings = embeddings_of(order["data"], config.data.multimodal_features)
    store = open_store(order["data"], order["cache"], embeddings=embeddings, progress=False)
    splits = make_splits(
        store,
        protocol=config.eval.protocol,
        holdout_fraction=config.eval.holdout_fraction,
        target=config.eval.target,
        seed=config.system.seed,
    )
    layout = TableLayout.from_store(store, config.model)
    if order["full"]:
        layout = full_layout(layout, config.model)
    folder = Path(order["work"]) / f"run-{order['name']}"
    folder.mkdir(parents=True, exist_ok=True)
    run = RunPaths(folder, folder, folder, folder.name)
    return training.Trainer(
        config, store, layout, embeddings, splits, run, RunLogger(folder, None, console=False), torch.device(config.system.device)
    )


class PartClock:
    """Seconds of one step's pieces, by wrapping what the trainer calls: the table's lookup, the model, the loss, backward."""

    def __init__(self, trainer: training.Trainer) -> None:
        self.trainer = trainer
        self.seconds = dict.fromkeys(("lookup", "model", "loss", "backward"), 0.0)

    def timed(self, name: str, function: Callable) -> Callable:
        def wrapper(*arguments, **options):
            start = time.perf_counter()
            result = function(*arguments, **options)
            self.seconds[name] += time.perf_counter() - start
            return result

        return wrapper

    @contextmanager
    def on(self) -> Iterator[None]:
        model, loss, backward = self.trainer.model, self.trainer.loss, torch.autograd.backward
        model.encode = self.timed("model", model.encode)
        model.table.lookup = self.timed("lookup", model.table.lookup)
        self.trainer.loss = self.timed("loss", loss)
        torch.autograd.backward = self.timed("backward", backward)
        try:
            yield
        finally:
            del model.encode, model.table.lookup
            self.trainer.loss, torch.autograd.backward = loss, backward

    def parts(self, whole: float) -> dict[str, float]:
        """The parts of a step without its data; `whole`: seconds of Trainer._update. Sets the clock back."""
        taken, self.seconds = self.seconds, dict.fromkeys(self.seconds, 0.0)
        return {"lookup": taken["lookup"], "forward": taken["model"] - taken["lookup"] + taken["loss"], "backward": taken["backward"],
                "update": whole - taken["model"] - taken["loss"] - taken["backward"]}  # fmt: skip


class Ours(Child):
    """The real training loop, `Trainer.fit`, that pauses between two steps to take commands.

    steps N: {"steps": seconds of whole steps, "waits": of them for data, "loss"}. parts N: {"parts": [{data, lookup, forward, backward,
    update}]}, with the wrappers' cost. batches N: {"batches": seconds each}. save, load: {"seconds", "bytes"}.
    """

    def prepare(self) -> dict:
        trainer = self.trainer = make_trainer(self.order)
        config = trainer.config
        return {
            "rows": trainer.layout.num_rows,
            "users": trainer.splits.train.num_samples,
            "all_users": trainer.store.num_users,
            "items": trainer.store.num_items,
            "config": config.to_dict(),
            "embeddings": list(trainer.embeddings),
        }

    def run(self) -> None:
        self.answer(self.prepare())
        self._update, self._clock = self.trainer._update, PartClock(self.trainer)
        self._next_turn()
        self.trainer._update = self._measured_update
        self.trainer.fit()

    def _next_turn(self) -> None:
        """Serve what needs no step; come back when steps are asked for."""
        while (command := self.next_command())[0] not in ("steps", "parts"):
            self.serve(command)
        self._in_parts, self._wanted = command[0] == "parts", command[1]
        self._steps, self._waits, self._parts = [], [], []
        self._end = time.perf_counter()  # of the step before

    def _measured_update(self, *arguments) -> None:
        """Stands in for Trainer._update: a whole step is the time from the end of one to the end of the next, data and logs included."""
        begin = time.perf_counter()
        if self._in_parts:
            with self._clock.on():
                self._update(*arguments)
            self._parts.append({"data": begin - self._end} | self._clock.parts(time.perf_counter() - begin))
        else:
            self._update(*arguments)
        end = time.perf_counter()
        self._steps.append(end - self._end)
        self._waits.append(begin - self._end)
        self._end = end
        if len(self._steps) == self._wanted:
            loss = self.trainer.loss_sum / max(1, self.trainer.loss_count)
            self.answer({"parts": self._parts} if self._in_parts else {"steps": self._steps, "waits": self._waits, "loss": loss})
            self._next_turn()

    def do_batches(self, number: int) -> dict:
        """Batches as the trainer makes them, in the background, with nobody training: the loader at its own pace."""
        trainer, data = self.trainer, self.trainer.config.data
        if trainer.order._epoch < 0:
            trainer.order.start_epoch(0)
        time.sleep(self.order["settle"])  # the training loop's own loader fills its queue first
        numbers = (n % trainer.order.num_batches for n in range(number))
        seconds, end = [], time.perf_counter()
        for _ in Prefetcher(data.num_workers, data.prefetch_batches)(trainer._build, numbers):
            seconds.append(time.perf_counter() - end)
            end += seconds[-1]
        return {"batches": seconds}

    def do_save(self, _: int) -> dict:
        shutil.rmtree(getattr(self, "_saved", ""), ignore_errors=True)
        os.sync()  # what others left to be written must not be waited for here
        start = time.perf_counter()
        self._saved = self.trainer.save(None)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "bytes": sum(path.stat().st_size for path in self._saved.iterdir())}

    def do_load(self, _: int) -> dict:
        start = time.perf_counter()
        self.trainer._resume(self._saved)
        return {"seconds": time.perf_counter() - start}


class Start(Child):
    """A warm store opened, split, and the first batch delivered; no model is made. Imports are done before the clock starts."""

    def prepare(self) -> dict:
        training.build_model = lambda *_: torch.nn.Module()
        return {}

    def do_start(self, _: int) -> dict:
        start = time.perf_counter()
        trainer = make_trainer(self.order)
        trainer.order.start_epoch(0)
        batch, _ = trainer._build(0)
        return {"seconds": time.perf_counter() - start, "hit": trainer.store.cache_hit, "tokens": len(batch.owner)}


class Compile(Child):
    """The raw files to a store. compile: {"seconds", "bytes" read, "events", "store_bytes"}; embeddings: {"seconds"}."""

    def do_compile(self, _: int) -> dict:
        source = find_source(Path(self.order["data"]), "train")
        start = time.perf_counter()
        store = open_store(self.order["data"], self.order["cache"], progress=False)
        if store.cache_hit:
            raise UserError(f"{store.path}: compiled before; expected an empty cache.")
        seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in source.files)
        return {"seconds": seconds, "bytes": size, "events": store.num_events, "store_bytes": store.summary["store_bytes"]}

    def do_embeddings(self, _: int) -> dict:
        names = embeddings_of(self.order["data"], "auto")
        start = time.perf_counter()
        open_store(self.order["data"], self.order["cache"], embeddings=names, progress=False)
        return {"seconds": time.perf_counter() - start}


# ---- the other sides ----------------------------------------------------------------------------------------------------


class TheReference(Child):
    """reference.py. steps N: {"steps": seconds of whole steps, "parts", "loss"}; batches N, save, load as on our side."""

    reference: Reference | None = None

    def prepare(self) -> dict:
        start = time.perf_counter()
        self.reference = Reference(Path(self.order["data"]), ReferenceSettings(**self.order["settings"]))
        return {"seconds": time.perf_counter() - start, "rows": self.reference.num_rows}

    def do_steps(self, number: int) -> dict:
        steps, parts, times = [], [], None
        for _ in range(number):
            start = time.perf_counter()
            times = self.reference.step()
            steps.append(time.perf_counter() - start)
            parts.append({name: getattr(times, name) for name in ("data", "forward", "backward", "update")})
        return {"steps": steps, "parts": parts, "loss": float(times.loss)}

    def do_batches(self, number: int) -> dict:
        seconds, end = [], time.perf_counter()
        for _ in range(number):
            self.reference.next_batch()
            seconds.append(time.perf_counter() - end)
            end += seconds[-1]
        return {"batches": seconds}

    def do_save(self, _: int) -> dict:
        path = Path(self.order["work"]) / "reference.pt"
        path.unlink(missing_ok=True)
        os.sync()
        start = time.perf_counter()
        self.reference.save(path)
        return {"seconds": time.perf_counter() - start, "bytes": path.stat().st_size}

    def do_load(self, _: int) -> dict:
        start = time.perf_counter()
        self.reference.load(Path(self.order["work"]) / "reference.pt")
        return {"seconds": time.perf_counter() - start}

    def close(self) -> None:
        if self.reference is not None:
            self.reference.close()


class Retrieval(Child):
    """What both retrieving sides share: the vectors. width D: makes them and the index, {"seconds"}; search Q: {"seconds"}."""

    def do_width(self, width: int) -> dict:
        random = torch.Generator().manual_seed(width)
        self.items = torch.randn(self.order["candidates"], width, generator=random)  # (C, D)
        self.queries = torch.randn(self.order["queries"], width, generator=random)  # (Q, D)
        start = time.perf_counter()
        self.make_index()
        return {"seconds": time.perf_counter() - start}

    def make_index(self) -> None:
        raise NotImplementedError

    def do_search(self, number: int) -> dict:
        start = time.perf_counter()
        self.search(number)
        return {"seconds": time.perf_counter() - start}

    def search(self, number: int) -> None:
        raise NotImplementedError

    def file(self, num_columns: int) -> Path:
        return Path(self.order["work"]) / f"faiss-{self.items.shape[1]}-{num_columns}.npy"


class OurRetrieval(Retrieval):
    """topk_exact. plain Q: a search without removal; compare Q: {"checked" places, "wrong"} against what faiss wrote."""

    def make_index(self) -> None:
        self.catalogue = prepare_catalogue(self.items)
        random = torch.Generator().manual_seed(1)
        num_queries = len(self.queries)
        self.seen = torch.randint(len(self.items), (num_queries, NUM_EXCLUDED), generator=random)

    def search(self, number: int) -> None:
        offsets = torch.arange(number + 1) * NUM_EXCLUDED
        topk_exact(self.queries[:number], self.catalogue, NUM_RESULTS, exclude=(offsets, self.seen[:number].reshape(-1)))

    def do_plain(self, number: int) -> dict:
        start = time.perf_counter()
        topk_exact(self.queries[:number], self.catalogue, NUM_RESULTS)
        return {"seconds": time.perf_counter() - start}

    def do_compare(self, number: int) -> dict:
        """Two rankings: of all candidates, and with every second one of faiss's longer ranking removed, of which what is left is true."""
        theirs = torch.from_numpy(np.load(self.file(LONG), allow_pickle=False))[:number]
        queries, removed = self.queries[:number], theirs[:, ::2]
        exclude = (torch.arange(number + 1) * removed.shape[1], removed.reshape(-1))
        counts = []
        for other, excluded in ((theirs, None), (theirs[:, 1::2], exclude)):
            ours = topk_exact(queries, self.catalogue, NUM_RESULTS + 1, exclude=excluded)[1]
            counts.append(clear_places(queries, self.items, ours, other[:, : NUM_RESULTS + 1]))
        return dict(zip(("checked", "wrong"), map(sum, zip(*counts))))


def clear_places(queries: torch.Tensor, items: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> tuple[int, int]:
    """Compare two rankings (Q, K + 1) of items (C, D) for queries (Q, D) at their first K places: (places that are clear, wrong there).

    The true order is that of float64 scores over what both found. A place is clear where its score is further than CLEAR_GAP from both
    neighbours'; there both sides must name the true id.
    """
    checked = wrong = 0
    for query, one, other in zip(queries.double(), ours.tolist(), theirs.tolist()):
        both = torch.tensor(sorted({*one, *other}))
        order = (items[both].double() @ query).sort(descending=True)
        gaps = order.values.diff().neg()
        ranked = both[order.indices].tolist()
        for place in range(len(one) - 1):
            if gaps[place] > CLEAR_GAP and (place == 0 or gaps[place - 1] > CLEAR_GAP):
                checked += 1
                wrong += not one[place] == other[place] == ranked[place]
    return checked, wrong


class Faiss(Retrieval):
    """IndexFlatIP. write Q: ids for `compare`; hnsw Q: build and search of the baseline's HNSW, {"build", "seconds", "recall"}."""

    def prepare(self) -> dict:
        import faiss  # optional; the parent asks for this child only where it is there

        self.faiss = faiss
        faiss.omp_set_num_threads(torch.get_num_threads())
        return {"version": faiss.__version__}

    def make_index(self) -> None:
        self.index = self.faiss.IndexFlatIP(self.items.shape[1])
        self.index.add(self.items.numpy())

    def search(self, number: int) -> None:
        self.index.search(self.queries[:number].numpy(), NUM_RESULTS)

    def do_write(self, number: int) -> dict:
        np.save(self.file(LONG), self.index.search(self.queries[:number].numpy(), LONG)[1])
        return {}

    def do_hnsw(self, number: int) -> dict:
        exact = self.index.search(self.queries[:number].numpy(), NUM_RESULTS)[1]
        index = self.faiss.IndexHNSWFlat(self.items.shape[1], HNSW["links"], self.faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = HNSW["construction"], HNSW["search"]
        start = time.perf_counter()
        index.add(self.items.numpy())
        built = time.perf_counter()
        found = index.search(self.queries[:number].numpy(), NUM_RESULTS)[1]
        end = time.perf_counter()
        recall = np.mean([len(set(a) & set(b)) / NUM_RESULTS for a, b in zip(exact.tolist(), found.tolist())])
        return {"build": built - start, "seconds": end - built, "recall": float(recall)}


class Machine(Child):
    """What the figures depend on: processor, threads, versions, commit."""

    def prepare(self) -> dict:
        return environment() | {"compile_key": "compile" in KEYS}


KINDS: dict[str, type[Child]] = {"ours": Ours, "reference": TheReference, "start": Start, "compile": Compile, "retrieval": OurRetrieval,
                                 "faiss": Faiss, "machine": Machine}  # fmt: skip
