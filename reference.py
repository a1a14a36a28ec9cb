"""The organisers' baseline as its users meet it, built anew from its public description: what benchmarks and parity runs compare with.

Must not use this project's store, batches, model or optimisers: Python dictionaries a position, turned into tensors inside forward, and
one dense Adam over every table are its nature, and what the comparison is about. Nothing in it is slow on purpose. Reads layout A.

python reference.py DATA [--steps 20 --num_workers 0 --features {scaled,full}]     seconds of a step's parts, users/s, memory

Faults of the original that only lower its quality are left out: the last event counts at inference, a user token carries no item's
vector, a record with an empty feature dictionary is kept, the user token leads a sequence of any length.

Legend: B users of a batch, T tokens of a row (max_seq_length + 1, padded on the left), D width, H heads, V values.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, get_worker_info

from errors import ArgumentParser, UserError, run_cli
from logger import peak_rss_gib
from plain_pickle import load_plain_pickle
from schema import TENCENT_GR

ITEM_SINGLE, USER_SINGLE = ([f.id for f in TENCENT_GR.select(side, "single")] for side in ("item", "user"))
USER_MULTI = [f.id for f in TENCENT_GR.select("user", "multi")]
VECTOR, VECTOR_WIDTH = "81", TENCENT_GR["81"].width
PADDING, ITEM, USER = 0, 1, 2  # kinds of tokens
# TencentGR-1M (arXiv 2604.04976); schema.py has the larger of 1M's and 10M's.
FULL_SIZES = {"item_id": 4_783_154, "user_id": 1_001_845, "100": 6, "101": 51, "102": 90_709, "112": 30, "114": 20, "115": 691, "116": 18,
              "117": 497, "118": 1_426, "119": 4_191, "120": 3_392, "121": 2_135_891, "122": 90_919, "103": 86, "104": 2, "105": 7,
              "109": 3, "106": 14, "107": 19, "108": 4, "110": 2}  # fmt: skip
ITEM_CHUNK = 4096  # items encoded at once


@dataclass(frozen=True)
class ReferenceSettings:
    """Settings of the baseline (the competition's version).

    max_seq_length: events a row; the user token is extra. num_workers: processes that make batches; 0 = the training process.
    full_tables: tables of TencentGR-1M's sizes instead of the data's own. lines: numbers of the lines (from 0) to train on; None = all.
    """

    hidden_units: int = 32
    num_blocks: int = 1
    num_heads: int = 1
    max_seq_length: int = 100
    batch_size: int = 128
    dropout_rate: float = 0.2
    learning_rate: float = 1e-3
    num_workers: int = 0
    seed: int = 42
    full_tables: bool = False
    lines: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        least = dict.fromkeys(("hidden_units", "num_blocks", "num_heads", "max_seq_length", "batch_size"), 1) | {"num_workers": 0}
        for name in least:
            if getattr(self, name) < least[name]:
                raise UserError(f"{name}: {getattr(self, name)}; expected {least[name]} or more.")
        if self.hidden_units % self.num_heads:
            raise UserError(f"hidden_units: {self.hidden_units} is no multiple of num_heads, {self.num_heads}.")


class StepTimes(NamedTuple):
    """Seconds of one training step's parts, and its loss. forward includes the making of tensors from features, and the loss."""

    data: float
    forward: float
    backward: float
    update: float
    loss: float


class Token(NamedTuple):
    """One place of a user's sequence: the item's or the user's number, its features, and which of the two it is."""

    number: int
    features: dict
    kind: int


class Batch(NamedTuple):
    """Collated rows. The features of a side: one array (T,) of dictionaries a user."""

    ids: Tensor  # (B, T) int64 item or user numbers; 0 = padding
    kinds: Tensor  # (B, T) int64 PADDING, ITEM or USER
    pos_ids: Tensor  # (B, T) int64 the next item; 0 = none
    neg_ids: Tensor  # (B, T) int64 an item outside the user's history; 0 where pos_ids is
    features: list[np.ndarray]
    pos_features: list[np.ndarray]
    neg_features: list[np.ndarray]


# ---- data ---------------------------------------------------------------------------------------------------------------


def table_sizes(indexer: dict, *, full: bool) -> dict[str, int]:
    """The largest value of each table: {"item_id", "user_id", feature ids}; `full`: at least TencentGR-1M's."""
    sizes = {"item_id": max(indexer["i"].values(), default=0), "user_id": max(indexer["u"].values(), default=0)}
    for name in (*ITEM_SINGLE, *USER_SINGLE, *USER_MULTI):
        sizes[name] = max(indexer["f"].get(name, {}).values(), default=0)
    return {name: max(size, FULL_SIZES[name]) for name, size in sizes.items()} if full else sizes


class SequenceDataset(Dataset):
    """Users of seq.jsonl as rows of dictionaries. data_path: a folder in layout A. lines: which of them; None = all.

    Raises UserError for a folder that lacks a file of layout A, or lines that it does not have.
    """

    def __init__(self, data_path: Path, settings: ReferenceSettings) -> None:
        self.path = Path(data_path) / "seq.jsonl"
        files = [Path(data_path) / name for name in ("seq_offsets.pkl", "indexer.pkl", "item_feat_dict.json", "creative_emb/emb_81_32.pkl")]
        for path in (self.path, *files):
            if not path.is_file():
                raise UserError(f"{path}: no such file. The reference reads layout A; make some with synthetic.py --layout jsonl.")
        self.offsets = load_plain_pickle(files[0])  # a list, or a dict by line number
        indexer = load_plain_pickle(files[1])
        self.sizes = table_sizes(indexer, full=settings.full_tables)
        self.num_items = table_sizes(indexer, full=False)["item_id"]
        self.creative_of_item = {number: creative for creative, number in indexer["i"].items()}
        self.item_features = json.loads(files[2].read_text(encoding="utf-8"))
        # Copies: the reader's arrays are of a class that refuses to travel between processes.
        self.vectors = {creative: np.array(vector, np.float32) for creative, vector in load_plain_pickle(files[3]).items()}
        self.defaults = dict.fromkeys([*ITEM_SINGLE, *USER_SINGLE], 0) | {name: [0] for name in USER_MULTI}
        self.defaults[VECTOR] = np.zeros(VECTOR_WIDTH, np.float32)
        self.lines = range(len(self.offsets)) if settings.lines is None else tuple(settings.lines)
        if not self.lines or not 0 <= min(self.lines) <= max(self.lines) < len(self.offsets):
            raise UserError(f"lines: expected one or more numbers from 0 to {len(self.offsets) - 1}, the lines of {self.path}.")
        self.num_tokens = settings.max_seq_length + 1
        self.random = random.Random(settings.seed)
        self._file = None

    def __len__(self) -> int:
        return len(self.lines)

    def tokens(self, line: int) -> list[Token]:
        """The user's profile, then the events in the file's order."""
        if self._file is None:
            self._file = open(self.path, "rb")  # noqa: SIM115
        self._file.seek(self.offsets[line])
        profile, events = None, []
        for user, item, user_features, item_features, _, _ in json.loads(self._file.readline()):
            if item is None:
                profile = Token(user, user_features or {}, USER)
            else:
                events.append(Token(item, item_features or {}, ITEM))
        if profile is None:
            raise UserError(f"{self.path}, line {line + 1}: no profile record (item_id null); expected exactly one a line.")
        return [profile, *events]

    def filled(self, token: Token) -> dict:
        """A token's features with defaults for those it lacks, and the item's own vector where there is one."""
        features = {**self.defaults, **token.features}
        if token.kind == ITEM:
            vector = self.vectors.get(self.creative_of_item.get(token.number))
            if vector is not None:
                features[VECTOR] = vector
        return features

    def item(self, number: int) -> Token:
        """An item by its number, with the features of item_feat_dict.json."""
        return Token(number, self.item_features.get(str(number), {}), ITEM)

    def negative(self, history: set[int]) -> int:
        """A uniform item outside the history (any item, where the history holds them all)."""
        number = self.random.randint(1, self.num_items)
        while number in history and len(history) < self.num_items:
            number = self.random.randint(1, self.num_items)
        return number

    def empty_features(self) -> np.ndarray:
        return np.full(self.num_tokens, self.defaults, dtype=object)

    def __getitem__(self, index: int) -> Batch:
        """One user's row: each token but the last, with the next item and a negative. Arrays (T,) in place of the batch's tensors."""
        profile, *events = self.tokens(self.lines[index])
        history = {event.number for event in events}
        row = [profile, *events[-self.num_tokens :]]
        ids, kinds, pos_ids, neg_ids = (np.zeros(self.num_tokens, dtype=np.int64) for _ in range(4))
        features, pos_features, neg_features = (self.empty_features() for _ in range(3))
        for place, (token, following) in enumerate(pairwise(row), self.num_tokens - len(row) + 1):
            negative = self.item(self.negative(history))
            ids[place], kinds[place], pos_ids[place], neg_ids[place] = token.number, token.kind, following.number, negative.number
            features[place] = self.filled(token)
            pos_features[place] = self.filled(following)
            neg_features[place] = self.filled(negative)
        return Batch(ids, kinds, pos_ids, neg_ids, features, pos_features, neg_features)

    def query_row(self, line: int, drop_last: int) -> Batch:
        """One user's row for a query: all tokens but the last `drop_last` events; nothing to predict."""
        profile, *events = self.tokens(line)
        events = events[: max(0, len(events) - drop_last)]
        row = [profile, *events[max(0, len(events) - self.num_tokens + 1) :]]
        ids, kinds = (np.zeros(self.num_tokens, dtype=np.int64) for _ in range(2))
        features = self.empty_features()
        for place, token in enumerate(row, self.num_tokens - len(row)):
            ids[place], kinds[place], features[place] = token.number, token.kind, self.filled(token)
        return Batch(ids, kinds, np.zeros_like(ids), np.zeros_like(ids), features, features, features)


def collate(rows: Sequence[Batch]) -> Batch:
    """Rows of users to a batch: ids become tensors, dictionaries stay dictionaries."""
    columns = list(zip(*rows, strict=True))
    return Batch(*(torch.from_numpy(np.stack(column)) for column in columns[:4]), *map(list, columns[4:]))


def start_worker(worker: int) -> None:
    """Give a worker process a file of its own (a forked one shares its place with all) and a stream of negatives of its own."""
    dataset = get_worker_info().dataset
    dataset._file = None
    dataset.random = random.Random(dataset.random.getrandbits(64) + worker)


# ---- model --------------------------------------------------------------------------------------------------------------


def single_values(features: list[np.ndarray], name: str) -> Tensor:
    """Values of a single-valued feature, (B, T) int64."""
    return torch.from_numpy(np.array([[token[name] for token in row] for row in features], dtype=np.int64))


def multi_values(features: list[np.ndarray], name: str) -> Tensor:
    """Values of a multi-valued feature, (B, T, V) int64, padded with 0 to the longest list."""
    longest = max(len(token[name]) for row in features for token in row)
    values = np.zeros((len(features), len(features[0]), longest), dtype=np.int64)
    for user, row in enumerate(features):
        for place, token in enumerate(row):
            values[user, place, : len(token[name])] = token[name]
    return torch.from_numpy(values)


def vectors_of(features: list[np.ndarray], name: str) -> Tensor:
    """Multimodal vectors, (B, T, VECTOR_WIDTH) float32."""
    values = np.zeros((len(features), len(features[0]), VECTOR_WIDTH), dtype=np.float32)
    for user, row in enumerate(features):
        for place, token in enumerate(row):
            values[user, place] = token[name]
    return torch.from_numpy(values)


class Attention(nn.Module):
    """Multi-head attention under an explicit mask."""

    def __init__(self, settings: ReferenceSettings) -> None:
        super().__init__()
        width = settings.hidden_units
        self.num_heads, self.dropout_rate = settings.num_heads, settings.dropout_rate
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, T, D), mask (B, T, T) bool, True = may look -> (B, T, D)."""
        shape = x.shape
        layers = (self.query, self.key, self.value)
        query, key, value = (layer(x).view(*shape[:2], self.num_heads, -1).transpose(1, 2) for layer in layers)  # (B, H, T, D / H)
        dropout = self.dropout_rate if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None], dropout_p=dropout)
        return self.out(mixed.transpose(1, 2).reshape(shape))


class Block(nn.Module):
    """Attention and a pointwise feed-forward, each normalised after its residual."""

    def __init__(self, settings: ReferenceSettings) -> None:
        super().__init__()
        width, rate = settings.hidden_units, settings.dropout_rate
        self.attention, self.attention_norm, self.norm = Attention(settings), nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(rate), nn.Linear(width, width), nn.Dropout(rate))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention_norm(x + self.attention(x, mask))
        return self.norm(x + self.feed_forward(x))


class ReferenceModel(nn.Module):
    """SASRec over the towers' vectors, the user's profile as first token. sizes: largest value of each table."""

    def __init__(self, sizes: dict[str, int], settings: ReferenceSettings) -> None:
        super().__init__()
        width = settings.hidden_units
        self.tables = nn.ModuleDict({name: nn.Embedding(size + 1, width, padding_idx=0) for name, size in sizes.items()})
        self.positions = nn.Embedding(settings.max_seq_length + 2, width, padding_idx=0)
        self.vector_projection = nn.Linear(VECTOR_WIDTH, width)
        self.item_tower = nn.Linear(width * (len(ITEM_SINGLE) + 2), width)
        self.user_tower = nn.Linear(width * (len(USER_SINGLE) + len(USER_MULTI) + 1), width)
        self.dropout = nn.Dropout(settings.dropout_rate)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.num_blocks))
        self.final_norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_normal_(parameter)
        with torch.no_grad():
            for table in (*self.tables.values(), self.positions):
                table.weight[0].zero_()

    def item_vectors(self, item_ids: Tensor, features: list[np.ndarray]) -> Tensor:
        """The item tower: ids (B, T) and their dictionaries -> (B, T, D)."""
        parts = [self.tables["item_id"](item_ids)]
        parts += [self.tables[name](single_values(features, name)) for name in ITEM_SINGLE]
        parts.append(self.vector_projection(vectors_of(features, VECTOR)))
        return F.relu(self.item_tower(torch.cat(parts, dim=-1)))

    def user_vectors(self, user_ids: Tensor, features: list[np.ndarray]) -> Tensor:
        """The user tower: ids (B, T) and their dictionaries -> (B, T, D)."""
        parts = [self.tables["user_id"](user_ids)]
        parts += [self.tables[name](single_values(features, name)) for name in USER_SINGLE]
        parts += [self.tables[name](multi_values(features, name)).sum(2) for name in USER_MULTI]
        return F.relu(self.user_tower(torch.cat(parts, dim=-1)))

    def encode(self, ids: Tensor, kinds: Tensor, features: list[np.ndarray]) -> Tensor:
        """Queries (B, T, D) at all tokens of sequences (B, T)."""
        is_user = kinds == USER
        items = self.item_vectors(torch.where(is_user, 0, ids), features)
        users = self.user_vectors(torch.where(is_user, ids, 0), features)
        x = torch.where(is_user[:, :, None], users, items) * items.shape[-1] ** 0.5
        length = ids.shape[1]
        valid = kinds != PADDING
        x = self.dropout(x + self.positions(torch.arange(1, length + 1) * valid))
        # A place may always look at itself: a row of the mask without any True has no defined answer.
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        mask = causal & valid[:, None, :] | torch.eye(length, dtype=torch.bool)
        for block in self.blocks:
            x = block(x, mask)
        return self.final_norm(x)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (B, T) of each token's next item and of its negative."""
        query = self.encode(batch.ids, batch.kinds, batch.features)
        positive = self.item_vectors(batch.pos_ids, batch.pos_features)
        negative = self.item_vectors(batch.neg_ids, batch.neg_features)
        return (query * positive).sum(-1), (query * negative).sum(-1)


# ---- training -----------------------------------------------------------------------------------------------------------


class Reference:
    """Data, model and optimiser of the baseline. Making one is its start; `close` (or a with statement) ends its worker processes.

    data_path: a folder in layout A. Raises UserError as SequenceDataset does.
    """

    def __init__(self, data_path: Path, settings: ReferenceSettings) -> None:
        self.settings, self._batches = settings, None
        self.dataset = SequenceDataset(Path(data_path), settings)
        torch.manual_seed(settings.seed)
        self.model = ReferenceModel(self.dataset.sizes, settings)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98))
        workers = {"num_workers": settings.num_workers, "worker_init_fn": start_worker}
        if settings.num_workers:  # forked, so that they share the dictionaries as long as nobody writes to them
            workers |= {"multiprocessing_context": "fork", "persistent_workers": True}
        order = torch.Generator().manual_seed(settings.seed)
        self._loader = DataLoader(self.dataset, settings.batch_size, shuffle=True, collate_fn=collate, generator=order, **workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes; encoding still works afterwards, training does not."""
        self._batches = self._loader = None  # the loader's iterator ends them when nothing holds it, so also when this object goes

    @property
    def num_rows(self) -> int:
        """Rows of all tables of ids and features, the padding rows included."""
        return sum(table.num_embeddings for table in self.model.tables.values())

    def next_batch(self) -> Batch:
        """The next batch of the training lines; an epoch follows the other for ever."""
        batch = None if self._batches is None else next(self._batches, None)
        if batch is None:
            self._batches = iter(self._loader)
            batch = next(self._batches)
        return batch

    def step(self) -> StepTimes:
        """One whole training step on the next batch."""
        start = time.perf_counter()
        return self._update(self.next_batch(), start)

    def train_epoch(self) -> float:
        """One whole epoch over the training lines, from its beginning; the mean loss of its targets."""
        self._batches = None
        total = count = 0.0
        for batch in self._loader:
            targets = int((batch.pos_ids > 0).sum())
            total += self._update(batch, time.perf_counter()).loss * targets
            count += targets
        return total / max(1.0, count)

    def _update(self, batch: Batch, start: float) -> StepTimes:
        self.model.train()
        got = time.perf_counter()
        positive, negative = self.model(batch)
        mask = batch.pos_ids > 0
        count = mask.sum().clamp(min=1)
        loss = F.binary_cross_entropy_with_logits(positive[mask], torch.ones_like(positive[mask]), reduction="sum") / count
        loss = loss + F.binary_cross_entropy_with_logits(negative[mask], torch.zeros_like(negative[mask]), reduction="sum") / count
        value = loss.item()
        computed = time.perf_counter()
        loss.backward()
        differentiated = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepTimes(got - start, computed - got, differentiated - computed, time.perf_counter() - differentiated, value)

    # ---- what the model knows ----

    @torch.no_grad()
    def encode_users(self, lines: Iterable[int], drop_last: int = 1) -> np.ndarray:
        """Queries (len(lines), D) float32 at the last token, after each user's events without the last `drop_last`."""
        if drop_last < 0:
            raise ValueError(f"encode_users: drop_last is {drop_last}; expected 0 or more.")
        self.model.eval()
        parts = [np.zeros((0, self.settings.hidden_units), np.float32)]
        for chunk in _chunks(list(lines), self.settings.batch_size):
            batch = collate([self.dataset.query_row(line, drop_last) for line in chunk])
            parts.append(self.model.encode(batch.ids, batch.kinds, batch.features)[:, -1].contiguous().numpy())
        return np.concatenate(parts)

    @torch.no_grad()
    def encode_items(self, item_ids: Iterable[int]) -> np.ndarray:
        """Vectors (len(item_ids), D) float32 of items, through the item tower."""
        self.model.eval()
        parts = [np.zeros((0, self.settings.hidden_units), np.float32)]
        for chunk in _chunks([int(number) for number in item_ids], ITEM_CHUNK):
            features = np.array([self.dataset.filled(self.dataset.item(number)) for number in chunk], dtype=object)
            parts.append(self.model.item_vectors(torch.tensor([chunk]), [features])[0].numpy())
        return np.concatenate(parts)

    def save(self, path: str | Path) -> None:
        """Write {"model", "optimizer"}."""
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, path)

    def load(self, path: str | Path) -> None:
        """Read what `save` wrote; the settings must be the same."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def _chunks(values: list, size: int) -> Iterator[list]:
    return (values[start : start + size] for start in range(0, len(values), size))


# ---- command line -------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags of `arguments`, or of the command line."""
    parser = ArgumentParser(description="Time the organisers' baseline, built anew.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    parser.add_argument("data", metavar="DATA", help="a folder in layout A (synthetic.py --layout jsonl)")
    parser.add_argument("--steps", type=int, default=20, help="training steps that are timed, after two that are not")
    parser.add_argument("--features", choices=("scaled", "full"), default="scaled", help="tables of the data's size, or TencentGR-1M's")
    for field in fields(ReferenceSettings):
        if field.name not in ("full_tables", "lines"):
            parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Start, train some steps, and print where the time goes."""
    if args.steps < 1:
        raise UserError(f"--steps: {args.steps}; expected 1 or more.")
    names = {field.name for field in fields(ReferenceSettings)}
    settings = ReferenceSettings(**{k: v for k, v in vars(args).items() if k in names}, full_tables=args.features == "full")
    begin = time.perf_counter()
    with Reference(Path(args.data), settings) as reference:
        start = time.perf_counter() - begin
        print(f"start {start:.1f} s: {len(reference.dataset):,} users, {reference.dataset.num_items:,} items, "
              f"{reference.num_rows:,} rows x {settings.hidden_units}, {torch.get_num_threads()} threads", flush=True)  # fmt: skip
        times = [reference.step() for _ in range(2 + args.steps)][2:]
    whole = statistics.median(sum(t[:4]) for t in times)
    parts = ", ".join(f"{name} {statistics.median(getattr(t, name) for t in times):.3f}" for name in StepTimes._fields[:4])
    users = min(settings.batch_size, len(reference.dataset))
    print(f"step {whole:.3f} s ({parts}), {users / whole:.0f} users/s, loss {times[-1].loss:.4f}")
    print(f"peak memory {peak_rss_gib():.2f} GiB (this process; workers not counted)")


if __name__ == "__main__":
    sys.exit(run_cli(lambda: main(parse(None))))
