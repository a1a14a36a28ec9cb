"""Owns the feature columns: turns item ids and users into rows of the joint table and dense vectors.

Works on arrays of a store, never on files of its own; holds no parameters.

Legend: M items or users of one gather, F single-valued features, R unique rows of the joint table, Z values of a ragged column.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch

from dataset import Deduplicator
from multimodal import required_embedding
from schema import Schema

ITEM_ID, USER_ID = "item_id", "user_id"


@dataclass(frozen=True)
class Field:
    """A range of rows of the joint table: value v in 1..size of the feature is row offset + v. Row 0 is padding, for all."""

    name: str
    side: str
    kind: str
    offset: int
    size: int


@dataclass(frozen=True)
class TableLayout:
    """The fields of the joint table, in row order: items' first, then users'; saved with a checkpoint."""

    fields: tuple[Field, ...]

    @property
    def num_rows(self) -> int:
        return 1 + sum(field.size for field in self.fields)

    def side(self, side: str) -> tuple[Field, ...]:
        return tuple(field for field in self.fields if field.side == side)

    def to_list(self) -> list[dict]:
        return [asdict(field) for field in self.fields]

    @classmethod
    def from_list(cls, rows: list[dict]) -> TableLayout:
        return cls(tuple(Field(**row) for row in rows))

    @classmethod
    def from_store(cls, store, user_id: bool) -> TableLayout:
        """One field a feature with values, after the item id; with `user_id` one for the user's number too."""
        schema: Schema = store.schema
        sizes = [(ITEM_ID, "item", "single", store.num_items)]
        for side in ("item", "user"):
            if side == "user" and user_id:
                sizes.append((USER_ID, "user", "single", int(store.user_ids.max(initial=0))))
            sizes += [(f.id, side, kind, store.cardinalities[f.id]) for kind in ("single", "multi") for f in schema.select(side, kind)]
        fields, offset = [], 0
        for name, side, kind, size in sizes:
            if size:
                fields.append(Field(name, side, kind, offset, size))
                offset += size
        return cls(tuple(fields))


class Ragged(NamedTuple):
    """A multi-valued feature of M things: the mean of the vectors of each one's values."""

    index: torch.Tensor  # (Z,) int64 into SideInputs.rows
    offsets: torch.Tensor  # (M,) int64 start of each thing's values
    weights: torch.Tensor  # (Z,) float32, 1 / number of values


class Dense(NamedTuple):
    values: torch.Tensor  # (M, width) float16
    present: torch.Tensor  # (M,) bool


class SideInputs(NamedTuple):
    """What a tower needs of M items (or users)."""

    rows: torch.Tensor  # (R,) int64 unique rows of the joint table, ascending; rows[0] = 0
    segments: tuple[int, ...]  # field i of the side owns rows[segments[i]:segments[i + 1]]; segments[0] = 1
    single: torch.Tensor  # (M, F) int64 into rows; 0 = missing
    multi: tuple[Ragged, ...]
    dense: tuple[Dense, ...]


class FeatureInputs(NamedTuple):
    items: SideInputs
    users: SideInputs


def choose_embeddings(store_or_schema_has, schema: Schema, wanted: str | list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """The multimodal features to use: "auto" = 81 where present; a name given by hand must be in the data.

    store_or_schema_has: callable feature id -> bool, whether the data has its vectors.
    """
    known = [feature.id for feature in schema.embeddings]
    if wanted == "auto" or list(wanted) == ["auto"]:
        return tuple(i for i in ("81",) if i in known and store_or_schema_has(i))
    chosen = tuple(dict.fromkeys(str(i) for i in wanted))
    for feature_id in chosen:
        required_embedding(schema, feature_id, store_or_schema_has)
    return chosen


def known_items_digest(store) -> str:
    """A hash of the creative ids behind the item numbers that a model knows: equal numbers must mean equal items."""
    digest = hashlib.blake2b(digest_size=16)
    for start in range(1, store.num_known_items + 1, 1 << 20):
        stop = min(start + (1 << 20), store.num_known_items + 1)
        if isinstance(store.raw_item_ids, np.ndarray):
            digest.update(",".join(map(str, store.raw_item_ids[start:stop].tolist())).encode())
        else:
            digest.update(",".join(store.raw_item_ids.take(range(start, stop))).encode())
        digest.update(b",")
    return digest.hexdigest()


class FeatureColumns:
    """Gathers features of items and users of a store by id, for a given table layout and set of embeddings.

    The layout may come from another store (the training data of a checkpoint): values above a field's size, unseen in
    training, become missing. Gathers run in the loader's threads; scratch memory is per thread.
    """

    def __init__(self, store, layout: TableLayout, embeddings: tuple[str, ...]) -> None:
        self.store, self.layout = store, layout
        self.embeddings = tuple(store.embedding(i) for i in embeddings)
        self._items, self._users = layout.side("item"), layout.side("user")
        order = {f.id: i for i, f in enumerate(store.schema.select("item", "single"))}
        self._item_columns = [order[f.name] for f in self._items if f.kind == "single" and f.name != ITEM_ID]
        order = {f.id: i for i, f in enumerate(store.schema.select("user", "single"))}
        self._user_columns = [order[f.name] for f in self._users if f.kind == "single" and f.name != USER_ID]
        self._local = threading.local()
        self._all_items: SideInputs | None = None

    def gather(self, item_ids: np.ndarray, users: np.ndarray) -> FeatureInputs:
        """Features of unique items (M,) and of users (B,), the latter as index into the store's users."""
        return FeatureInputs(self.items(item_ids), self.users(users))

    def items(self, item_ids: np.ndarray) -> SideInputs:
        """Features of items (M,), ids of the store. A repeat of the whole catalogue (full softmax) is gathered once."""
        whole = len(item_ids) == self.store.num_items + 1
        if whole and self._all_items is not None:
            return self._all_items
        columns = self.store.item_single[item_ids][:, self._item_columns]
        known = np.where(item_ids <= self.store.num_known_items, item_ids, 0)
        multi = [self.store.item_multi[f.name].gather(item_ids) for f in self._items if f.kind == "multi"]
        dense = tuple(self._dense(column, item_ids) for column in self.embeddings)
        inputs = self._inputs(self._items, np.concatenate([known[:, None], columns], axis=1), multi, dense)
        if whole:
            self._all_items = inputs
        return inputs

    def users(self, users: np.ndarray) -> SideInputs:
        """Features of users (B,), index into the store's users."""
        columns = self.store.user_single[users][:, self._user_columns]
        if self._users and self._users[0].name == USER_ID:
            columns = np.concatenate([self.store.user_ids[users][:, None], columns], axis=1)
        multi = [self.store.user_multi[f.name].gather(users) for f in self._users if f.kind == "multi"]
        return self._inputs(self._users, columns, multi, ())

    def _inputs(
        self, fields: tuple[Field, ...], single: np.ndarray, multi: list[tuple[np.ndarray, np.ndarray]], dense: tuple[Dense, ...]
    ) -> SideInputs:
        singles, multis = ([f for f in fields if f.kind == kind] for kind in ("single", "multi"))
        rows = _to_rows(single, singles)
        ragged_rows = [_to_rows(values[:, None], [f])[:, 0] for (values, _), f in zip(multi, multis)]
        if not hasattr(self._local, "deduplicator"):
            self._local.deduplicator = Deduplicator(self.layout.num_rows)
        unique, (rows, *ragged_index) = self._local.deduplicator(rows, *ragged_rows)
        # Row ranges ascend in the layout's order, so the sorted unique rows fall into one segment a field.
        bounds = np.searchsorted(unique, [f.offset + 1 for f in fields] + [fields[-1].offset + fields[-1].size + 1] if fields else [1])
        ragged = tuple(_ragged(index, counts) for index, (_, counts) in zip(ragged_index, multi))
        return SideInputs(torch.from_numpy(unique), tuple(int(b) for b in bounds), torch.from_numpy(rows), ragged, dense)

    @staticmethod
    def _dense(column, item_ids: np.ndarray) -> Dense:
        rows = column.row_of_item[item_ids]
        return Dense(torch.from_numpy(column.matrix[rows]), torch.from_numpy(rows > 0))


def _to_rows(values: np.ndarray, fields: list[Field]) -> np.ndarray:
    """Values (M, F) to rows of the joint table (M, F) int64; missing and unseen values to row 0."""
    offsets = np.array([f.offset for f in fields], dtype=np.int64)
    sizes = np.array([f.size for f in fields], dtype=np.int64)
    return np.where((values > 0) & (values <= sizes), values + offsets, 0)


def _ragged(index: np.ndarray, counts: np.ndarray) -> Ragged:
    weights = np.repeat((1.0 / np.maximum(counts, 1)).astype(np.float32), counts)
    return Ragged(torch.from_numpy(index), torch.from_numpy(np.cumsum(counts) - counts), torch.from_numpy(weights))
