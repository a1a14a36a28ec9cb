"""Says how much memory and disk a run will take, and whether it fits, before it takes any: `python main.py --estimate`.

Runs the trainer's own code on shadows (footprint.py); what numpy takes is worked out (sizes.py). Must not train, evaluate or write.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map_only

import kernels
import block_kernels
import step_kernels
import token_kernels
import tower_kernels
from config import Config, with_values
from dataset import BatchBuilder, Split, Splits
from evaluate import ITEM_CHUNK, Ranker, move
from features import TableLayout, known_items_digest
from footprint import Footprint, anonymous_bytes, caching_malloc, load_runtime
from logger import format_table
from machine import Machine, read_machine
from parallel import give_freed_memory_back, keep_freed_memory
from retrieval import prepare_catalogue
from sizes import counting_bytes, map_bytes, ranking_bytes, recent_bytes, successor_bytes, table_bytes, transition_bytes
from trainer import AUTOCAST, Trainer
from training_loss import TrainingLoss

STEPS = 6  # updates that are followed: most of the holes in the heap are there by then
WHOLE_CATALOGUE = 200_000  # items whose features are gathered for real; of more (full softmax) so many stand for all
LOOKED_AT = 256  # batches among which the largest are sought
ARENA_BYTES = 64 << 20  # of a thread; larger blocks glibc maps, and gives back
DIGEST_ITEMS = 1 << 20  # items whose ids are text at once in known_items_digest
# oneDNN (in torch 2.13, CPU) keeps a kernel of each shape of bfloat16 product: measured, whatever the shape, 610 KiB, 1,024 of them.
KERNEL_BYTES, MOST_KERNELS = 610 << 10, 1024
TABLE, TABLE_STATE, DENSE, DENSE_STATE = "table", "state of the table", "dense weights", "state of the dense weights"
AVERAGE = "average of the weights"
ACTIVATIONS, BATCHES, KERNELS = "activations, gradients", "batches built ahead", "kernels of bfloat16 products"
HOLES = "holes of the heap, arrays of the data"


class Data(NamedTuple):
    """What a run reads, opened."""

    store: object  # store.Store
    splits: Splits
    layout: TableLayout
    embeddings: tuple[str, ...]


class Phase(NamedTuple):
    """A part of the run and the most memory in it, what came before included: anonymous memory of the host, and of the GPU; bytes."""

    name: str
    memory: int
    cuda: int = 0


class Remedy(NamedTuple):
    """A setting that lowers the peak, and by how much about; bytes."""

    setting: str
    saving: int


@dataclass(frozen=True)
class Estimate:
    """What a run will take; bytes.

    runtime: Python, torch and all they load. parts: {part: bytes} at the peak of a training step. maps: {file: bytes} of the store.
    checkpoint: one of them; num_checkpoints: on the disk at once, at most. remedies: largest saving first. notes: what it leaves out.
    """

    title: str
    layout: TableLayout
    runtime: int
    parts: dict[str, int]
    phases: tuple[Phase, ...]
    maps: dict[str, int]
    checkpoint: int
    num_checkpoints: int
    machine: Machine
    remedies: tuple[Remedy, ...]
    notes: tuple[str, ...]

    @property
    def memory(self) -> int:
        """Peak of anonymous memory (RssAnon)."""
        return max(phase.memory for phase in self.phases)

    @property
    def cuda(self) -> int:
        """Peak of torch's memory on the GPU."""
        return max(phase.cuda for phase in self.phases)

    @property
    def disk(self) -> int:
        """Of all checkpoints."""
        return self.checkpoint * self.num_checkpoints

    def needs(self) -> list[tuple[str, int, int, str]]:
        """(what, bytes needed, bytes there are, where) of memory, GPU memory where one is used, and disk."""
        has = self.machine
        rows = [("anonymous memory (RssAnon)", self.memory, has.memory, has.limit)]
        rows += [("GPU memory", self.cuda, has.cuda, "free on the device")] if self.cuda else []
        what = f"disk, {self.num_checkpoints} checkpoints of {size(self.checkpoint)}"
        return [*rows, (what, self.disk, has.disk, str(has.folder))]

    def lacking(self) -> list[str]:
        """What does not fit and what to do, one line each; [] where the run fits."""
        worth = [remedy for remedy in self.remedies[:3] if remedy.saving > self.remedies[0].saving / 20]
        settings = [f"{remedy.setting} (saves about {size(remedy.saving)})" for remedy in worth]
        advice = "lower " + ", or ".join(settings or ["batch_size and embedding_dim"])
        return [
            f"does not fit: {what}: needs {size(needs)}, has {size(has)}; "
            f"{'lower keep_last_k, or give a checkpoint_path on another disk' if what.startswith('disk') else advice}."
            for what, needs, has, _ in self.needs()
            if needs > has
        ]

    def text(self) -> str:
        """All of it, as tables, and the verdict."""
        fields = [(f.label, f.side, f.size, f.width, size(4 * f.size * f.width)) for f in self.layout.fields]
        fields.append(("all", "", self.layout.num_rows, "", size(self.parts[TABLE])))
        parts = [("Python, torch", size(self.runtime)), *((name, size(num)) for name, num in self.parts.items())]
        phases = [(phase.name, size(phase.memory), *([size(phase.cuda)] if self.cuda else [])) for phase in self.phases]
        maps = [(name, size(num)) for name, num in sorted(self.maps.items(), key=lambda row: -row[1])[:6]]
        maps.append(("all", size(sum(self.maps.values()))))
        needs = [(what, size(needs), size(has), where) for what, needs, has, where in self.needs()]
        tables = (
            ("joint table", fields, ("field", "side", "rows", "width", "size")),
            ("training step, at its peak", parts, ("part", "size")),
            ("peak of each phase, what the ones before it leave included", phases, ("phase", "memory", "GPU")[: 2 + bool(self.cuda)]),
            ("maps of the store: pages of files, which the kernel drops when it needs memory", maps, ("file", "size")),
            ("in all", needs, ("what", "needs", "has", "where")),
        )
        lines = [f"memory of a run: {self.title}"]
        for title, rows, header in tables:
            lines += ["", title, *format_table(rows, header)]
        return "\n".join([*lines, "", *(f"note: {note}" for note in self.notes), *(self.lacking() or ["fits"])])


def size(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


# ---- the run, on shadows ----


def estimate_run(config: Config, open_data: Callable[[], Data], device: torch.device) -> Estimate:
    """Follow a run of these settings through some updates, a save, an evaluation and the baselines.

    open_data: opens the store (compiling it where it is missing) and draws the splits, as the run does; that is done for real.
    """
    notes = _notes(config)
    config = with_values(config, compile=False)  # shadows cannot be compiled
    load_runtime(config.system.tensorboard, AUTOCAST.get(config.training.precision), device)
    kernels.compiled(wait=True)  # numba and its code are part of a run too
    for loops in (step_kernels, block_kernels, tower_kernels, token_kernels):
        loops.compiled()
    runtime = anonymous_bytes()
    shadows = Footprint()
    data = open_data()
    counts, counting = transition_bytes(data.store, data.splits.train) if config.eval.transition_weight else (0, 0)
    with _idle_loops(), shadows, _Loader(config) as training_loader, _Loader(config) as ranking_loader, shadows.blocks(counts):
        trainer = Trainer(config, data.store, data.layout, data.embeddings, data.splits, None, _Silent(), device)
        trainer.transitions = None  # not counted for this
        _lighten(trainer, shadows)
        training, parts = _follow_training(trainer, shadows, training_loader)
        with shadows.blocks(parts.get(KERNELS, 0)):
            with trainer.updates.averaged():
                validation = _follow_evaluation(trainer, shadows, ranking_loader, data.splits.valid, "validation")
                shadows.mark()
                with shadows.blocks(counting):
                    phases = [training, validation._replace(memory=max(validation.memory, shadows.peak))]
                phases += [_follow_save(trainer, shadows, parts)]
            phases += [_follow_evaluation(trainer, shadows, ranking_loader, data.splits.test, "test")]
            phases += [_follow_baselines(trainer, shadows)] if config.eval.baselines else []
    # Below 0 where the heap of a process that did other things before, as a test's, gave back more than a small run takes.
    phases = [phase._replace(memory=max(0, phase.memory) + runtime) for phase in phases]
    return Estimate(
        title=f"{config.paths.data_path}, {device}, {data.store.num_users:,} users, {data.store.num_items:,} items",
        layout=data.layout,
        runtime=runtime,
        parts=parts,
        phases=tuple(phases),
        maps=map_bytes(data.store, data.embeddings),
        checkpoint=sum(saved_bytes(parts)) + counts,
        num_checkpoints=num_checkpoints(config, trainer.order.num_batches),
        machine=read_machine(Path(config.paths.checkpoint_path or "checkpoints"), device),
        remedies=_remedies(config, data, parts, phases),
        notes=notes,
    )


def _notes(config: Config) -> tuple[str, ...]:
    """What the estimate leaves out."""
    notes = ["the store is taken to be in the cache; compiling it in the same process adds about 120 MiB (pyarrow's pools)"]
    if config.training.compile:
        notes.append("estimated without compile; the compiler takes memory of its own, above all in its own processes")
    if caching_malloc():
        notes.append(
            "this C library's malloc leaves ever more holes between torch's blocks, which is not in these figures: measured, four times\n"
            "  the activations after 250 steps. With GLIBC_TUNABLES=glibc.malloc.tcache_count=0 in the environment it does not"
        )
    return tuple(notes)


@contextmanager
def _idle_loops() -> Iterator[None]:
    """The compiled loops of a step do nothing: shadows have no values. What they are given, and what they spare torch, stays."""
    real = step_kernels.compiled
    idle = None if real() is None else step_kernels.StepKernels(*[lambda *_: 0.0] * len(step_kernels.StepKernels._fields))
    step_kernels.compiled = lambda: idle
    try:
        yield
    finally:
        step_kernels.compiled = real


class _Silent:
    """A logger that says nothing: what the trainer says belongs to the run."""

    def say(self, text: str = "") -> None:
        """Nothing."""

    def warn_once(self, text: str) -> None:
        """Nothing."""


class _Loader:
    """A thread that makes batches, as the run has them: its arena of malloc keeps what making them once took."""

    def __init__(self, config: Config) -> None:
        self._pool = ThreadPoolExecutor(1) if config.data.num_workers else None
        self._ready = config.data.prefetch_batches if config.data.num_workers else 0

    def __enter__(self) -> _Loader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def make(self, build: Callable[[], tuple]) -> tuple:
        """What `build` returns."""
        return build() if self._pool is None else self._pool.submit(build).result()

    @contextmanager
    def hold(self, shadows: Footprint, num_bytes: int, how_many: int) -> Iterator[int]:
        """What is made ahead waits: as many as the settings say of `how_many` pieces of num_bytes. Gives the bytes.

        Most of it stays in the thread's arena of malloc for good.
        """
        ahead = num_bytes * min(self._ready, how_many - 1)
        shadows.keep(min(ahead, ARENA_BYTES))
        with shadows.blocks(max(0, ahead - ARENA_BYTES)):
            yield ahead


def _lighten(trainer: Trainer, shadows: Footprint) -> None:
    """Spare the trainer what takes long, or much memory, and can be had from less."""
    # The loss counts all training events; those of one user give an array of the same length.
    loss = TrainingLoss(trainer.config, trainer.store, trainer.splits.train.take(np.arange(1)), trainer.device)
    counted = loss.item_share is not None

    def first_loss(*arguments):
        with shadows.blocks(counting_bytes(trainer.store, trainer.splits.train) if counted else 0):
            trainer.loss = loss  # the counts are made in the first step, while its activations wait
        return loss(*arguments)

    trainer.loss = first_loss
    gather, found = trainer.columns.items, {}

    def items(item_ids: np.ndarray, *more):
        if len(item_ids) <= WHOLE_CATALOGUE:
            return gather(item_ids, *more)
        if len(item_ids) not in found:
            found[len(item_ids)] = _enlarged(gather(item_ids[:WHOLE_CATALOGUE], *more), WHOLE_CATALOGUE, len(item_ids))
        return found[len(item_ids)]

    trainer.columns.items = items


def _enlarged(tree, many: int, wanted: int):
    """Nested tuples of tensors, and places in them, as long as they would be for `wanted` things in place of `many`; shadows."""
    lengths = {len(leaf) for leaf in tree_iter(tree) if isinstance(leaf, Tensor)}

    def scaled(length: int) -> int:
        if length - 1 in lengths and length > 1:  # ends of as many pieces as something else is long
            return scaled(length - 1) + 1
        return length * wanted // many if length > 1 else length

    tree = tree_map_only(int, scaled, tree)
    return tree_map_only(Tensor, lambda t: torch.empty(scaled(len(t)), *t.shape[1:], dtype=t.dtype), tree)


def _follow_training(trainer: Trainer, shadows: Footprint, loader: _Loader) -> tuple[Phase, dict[str, int]]:
    """The peak over some batches, the largest among them, and what it consists of."""
    batch_bytes, before, config = 0, None, trainer.config.training
    trainer.order.start_epoch(0)
    trainer.model.train()
    if trainer.device.type == "cpu":
        keep_freed_memory(torch.get_num_threads())
    shadows.mark()
    for number in _some_batches(trainer):
        built = _built(trainer, loader, number)
        if before is not None:  # what batches share, such as the features of the whole catalogue, is there once
            batch_bytes = max(batch_bytes, tensor_bytes((built, before)) - tensor_bytes(before))
        with loader.hold(shadows, batch_bytes, trainer.order.num_batches) as ahead:
            for _ in range(config.accumulate_steps - 1):  # of batches like this one
                trainer._accumulate(*move(built, trainer.device))
            trainer._update(*move(built, trainer.device))
        before = built
    if trainer.device.type == "cpu":
        give_freed_memory_back()
    model, parts = trainer.model, {}
    parts[TABLE] = tensor_bytes(list(model.table.parameters()))
    parts[TABLE_STATE] = tensor_bytes(trainer.table_optimizer.state_dict())
    parts[DENSE] = tensor_bytes(list(model.parameters())) - parts[TABLE]
    parts[DENSE_STATE] = tensor_bytes(trainer.optimizer.state_dict())
    if trainer.updates.average is not None:
        parts[AVERAGE] = tensor_bytes(trainer.updates.average.state_dict())
    cuda = trainer.device.type == "cuda"
    parts[ACTIVATIONS] = (shadows.cuda_peak if cuda else shadows.live_peak - ahead) - sum(parts.values())
    parts[BATCHES] = ahead + tensor_bytes(before)
    if shadows.products and not cuda:
        shapes = len(shadows.products) * trainer.total_steps / min(STEPS, trainer.total_steps)
        parts[KERNELS] = int(min(shapes, MOST_KERNELS)) * KERNEL_BYTES
    host = parts[BATCHES] if cuda else sum(parts.values())
    peak = shadows.peak + parts.get(KERNELS, 0)
    parts[HOLES] = max(0, peak - host)
    return Phase("training", peak, shadows.cuda_peak), parts


def _some_batches(trainer: Trainer) -> list[int]:
    """Numbers of STEPS batches of the epoch: the first ones, as they come, and those with the most tokens."""
    lengths = np.minimum(trainer.samples.lengths(), trainer.config.model.max_seq_length + 1)
    numbers = range(min(trainer.order.num_batches, trainer.total_steps, LOOKED_AT))
    largest = sorted(numbers, key=lambda number: -int(lengths[trainer.order.samples(number)].sum()))
    return list(dict.fromkeys([*numbers[: STEPS // 2], *largest]))[:STEPS]


def _built(trainer: Trainer, loader: _Loader, number: int) -> tuple:
    """A batch of the epoch, on the CPU."""
    device, trainer.device = trainer.device, torch.device("cpu")  # nothing is pinned here
    whole = trainer.config.loss.name == "full_softmax" and trainer.store.num_items >= WHOLE_CATALOGUE
    try:  # shadows, which a part of the catalogue is enlarged to, can be made in this thread alone
        return trainer._build(number) if whole else loader.make(lambda: trainer._build(number))
    finally:
        trainer.device = device


def tensor_bytes(tree) -> int:
    """Of all tensors in nested containers, each storage once."""
    storages = {id(t.untyped_storage()): t.untyped_storage() for t in tree_iter(tree) if isinstance(t, Tensor)}
    return sum(storage.nbytes() for storage in storages.values())


def saved_bytes(parts: dict[str, int]) -> list[int]:
    """Of what a checkpoint holds: with an average, the weights twice, as they are averaged and as they are trained on."""
    more = [parts[AVERAGE], parts[TABLE], parts[DENSE]] if AVERAGE in parts else []
    return [parts[name] for name in (TABLE, TABLE_STATE, DENSE, DENSE_STATE)] + more


def _follow_save(trainer: Trainer, shadows: Footprint, parts: dict[str, int]) -> Phase:
    """A checkpoint: tensors on the CPU are written from where they lie; from a GPU they are copied first. The ids' digest makes text."""
    sample = SimpleNamespace(raw_item_ids=trainer.store.raw_item_ids, num_known_items=min(10_000, trainer.store.num_known_items))
    tracemalloc.start()
    known_items_digest(sample)
    text = tracemalloc.get_traced_memory()[1] / max(1, sample.num_known_items)
    tracemalloc.stop()
    copies = saved_bytes(parts) if trainer.device.type == "cuda" else []
    shadows.mark()
    with shadows.blocks(text * min(DIGEST_ITEMS, trainer.store.num_known_items)):
        pass
    with shadows.blocks(*copies):
        return Phase("checkpoint", shadows.peak, shadows.cuda_peak)


@torch.no_grad()
def _follow_evaluation(trainer: Trainer, shadows: Footprint, loader: _Loader, split: Split, name: str) -> Phase:
    """All candidates encoded, then the batch with the longest users ranked."""
    config, device = trainer.config, trainer.device
    shadows.mark()
    ranker: Ranker = trainer._ranker()
    trainer.model.eval()
    ids = ranker.candidate_ids
    encoded = torch.empty(len(ids), config.model.hidden_units, device=device)
    chunk = loader.make(lambda: trainer.columns.items(ids[:ITEM_CHUNK]))
    with loader.hold(shadows, tensor_bytes(chunk), -(-len(ids) // ITEM_CHUNK)):
        trainer.model.encode_items(move(chunk, device))
    catalogue = prepare_catalogue(encoded)
    longest = np.argsort(split.end - split.begin, kind="stable")[-config.eval.eval_batch_size :]
    built = loader.make(lambda: _evaluation_batch(trainer, split, longest))
    with loader.hold(shadows, tensor_bytes(built), -(-split.num_samples // config.eval.eval_batch_size)):
        batch, features = move(built, device)
        query, _ = trainer.model(batch, features)
        with shadows.blocks(*ranking_bytes(len(ids), len(longest), catalogue.low is not None, device.type), device=device.type):
            pass
        ranker._target_losses(query, encoded, split.take(longest))
    return Phase(name, shadows.peak, shadows.cuda_peak)


def _evaluation_batch(trainer: Trainer, split: Split, samples: np.ndarray) -> tuple:
    batch = BatchBuilder(trainer.store, split, trainer.config.model.max_seq_length).evaluation(samples)
    return batch, trainer.columns.gather(batch.unique_ids.numpy(), batch.users.numpy())


def _follow_baselines(trainer: Trainer, shadows: Footprint) -> Phase:
    store, splits, num = trainer.store, trainer.splits, len(trainer.candidates)
    shadows.mark()
    rankings = 3 * 8 * num  # the candidates as they are, by popularity, by recency
    order = 3 * 8 * num  # counts of the candidates, negated, and the order of these
    with shadows.blocks(rankings):
        for num_bytes in (
            counting_bytes(store, splits.train),
            recent_bytes(store, splits.train),
            order,
            successor_bytes(store, splits.train, splits.test),
        ):
            with shadows.blocks(num_bytes):
                pass
    return Phase("baselines", shadows.peak, shadows.cuda_peak)


# ---- what it is compared with ----


def num_checkpoints(config: Config, num_batches: int) -> int:
    """On the disk at once: those kept, the best, and the one that is being written."""
    training = config.training
    steps = training.max_steps or training.num_epochs * num_batches
    written = -(-steps // num_batches) + (steps // training.save_every_steps if training.save_every_steps else 0)
    return min(training.keep_last_k + 1, written) + 1 if training.keep_last_k else written


def _remedies(config: Config, data: Data, parts: dict[str, int], phases: list[Phase]) -> tuple[Remedy, ...]:
    """Settings that lower the peak, largest saving first."""
    peaks = {phase.name: phase.cuda or phase.memory for phase in phases}
    peak, found = max(peaks.values()), []

    def add(setting: str, saving: float, *only: str) -> None:
        """saving: in the phases `only`; in all where none is named."""
        left = max(at - (saving if name in only or not only else 0) for name, at in peaks.items())
        if peak > left:
            found.append(Remedy(setting, int(peak - left)))

    for setting, saving in _table_remedies(config, data, parts):
        add(setting, saving)
    batch, ranked = config.training.batch_size // 2, config.eval.eval_batch_size // 2
    if config.loss.name == "full_softmax":
        add("loss to sampled_softmax", 0.8 * parts[ACTIVATIONS], "training")
    if batch:
        add(f"batch_size to {batch}", (parts[ACTIVATIONS] + parts[BATCHES]) / 2, "training")
    add("prefetch_batches to 1", parts[BATCHES] / 2, "training")
    if ranked:
        add(f"eval_batch_size to {ranked}", (peaks["test"] - peaks["checkpoint"]) / 2, "validation", "test")
    add("baselines to false", peak, "baselines")
    return tuple(sorted(found, key=lambda remedy: -remedy.saving))


def _table_remedies(config: Config, data: Data, parts: dict[str, int]) -> Iterator[tuple[str, float]]:
    """(setting, bytes it saves) of the table and its state."""
    model, whole = config.model, table_bytes(data.layout)
    held = (parts[TABLE] + parts[TABLE_STATE]) / whole  # bytes for each byte of the table
    if AVERAGE in parts:
        yield "ema_decay to 0", parts[AVERAGE]
    if config.training.table_optimizer == "adam":
        yield "table_optimizer to rowwise_adam", parts[TABLE_STATE] - 4 * data.layout.num_rows
    others = [{"user_id": False}] if model.user_id else []
    width = (model.embedding_dim or model.hidden_units) // 2
    others += [{"embedding_dim": width}] if width and model.item_tower != "sum" else []
    others += [{"feature_width": "auto"}] if model.item_tower != "sum" else []
    smaller: tuple[int, ...] = ()
    for rows in model.hash_rows:
        smaller += (next(n for n in count(max(2, rows // 2)) if n not in smaller),)  # different numbers, as they must be
    others += [{"hash_rows": smaller or (max(2, data.store.num_items // 4),)}]
    for values in others:
        layout = TableLayout.from_store(data.store, with_values(config, **values).model)
        name, value = next(iter(values.items()))
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()
        yield f"{name} to {shown}", (whole - table_bytes(layout)) * held
