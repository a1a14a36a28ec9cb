"""Owns the feature columns: turns item ids and users into rows of the joint table and dense vectors.

Works on arrays of a store, never on files of its own; holds no parameters.

Legend: M items or users of one gather, F fields of single-valued features, R unique rows of the joint table, Z values of all M things.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch

import kernels
from columns import distinct, offsets_of, ragged_places
from dataset import counter_hash
from errors import UserError
from multimodal import required_embedding
from schema import Schema

ITEM_ID, USER_ID = "item_id", "user_id"


HASH_KEY = 5  # first word of the hash of a value, so that it shares no stream with the samplers
ID_DROPOUT_KEY = 6


@dataclass(frozen=True)
class Field:
    """A range of rows of the joint table: value v in 1..values of the feature is row offset + v. Row 0 is padding, for all.

    hash: 0, or the number of the hash function that maps the feature's values to 1..size instead (several values share a row).
    """

    name: str
    side: str
    kind: str
    offset: int
    size: int  # rows
    width: int
    values: int  # cardinality of the feature; equal to size where it is not hashed
    hash: int = 0

    @property
    def label(self) -> str:
        return f"{self.name}#{self.hash}" if self.hash else self.name


class TablePart(NamedTuple):
    """Neighbouring fields of one width: a matrix of its own, rows [begin, end) of the joint table."""

    begin: int
    end: int
    width: int


@dataclass(frozen=True)
class TableLayout:
    """The fields of the joint table, in row order: items' first, then users', each side's wide ones first; saved with a checkpoint."""

    fields: tuple[Field, ...]

    @property
    def num_rows(self) -> int:
        return 1 + sum(field.size for field in self.fields)

    @property
    def parts(self) -> tuple[TablePart, ...]:
        """In row order; the first holds row 0 too. One part where all fields are as wide."""
        parts: list[TablePart] = []
        for field in self.fields:
            if parts and parts[-1].width == field.width:
                parts[-1] = parts[-1]._replace(end=parts[-1].end + field.size)
            else:
                begin = parts[-1].end if parts else 0
                parts.append(TablePart(begin, field.offset + 1 + field.size, field.width))
        return tuple(parts) or (TablePart(0, 1, 1),)

    def side(self, side: str) -> tuple[Field, ...]:
        return tuple(field for field in self.fields if field.side == side)

    def to_list(self) -> list[dict]:
        return [asdict(field) for field in self.fields]

    @classmethod
    def from_list(cls, rows: list[dict]) -> TableLayout:
        return cls(tuple(Field(**row) for row in rows))

    @classmethod
    def from_sizes(cls, sizes: list[tuple[str, str, str, int]], config) -> TableLayout:
        """sizes: (feature, side, kind, cardinality), items' first. config: the model group of the settings, for widths and hashing."""
        fields: list[Field] = []
        table_width = config.embedding_dim or config.hidden_units
        for side in ("item", "user"):
            ranges = []  # (feature, kind, rows, width, cardinality, hash)
            for name, _, kind, values in (row for row in sizes if row[1] == side and row[3]):
                hashed = config.hash_rows if name in config.hashed_features else ()
                for number, size in enumerate(hashed or (values,), 1 if hashed else 0):
                    ranges.append(
                        (name, kind, size, table_width if config.feature_width == "same" else auto_width(size, table_width), values, number)
                    )
            for name, kind, size, width, values, number in sorted(ranges, key=lambda row: -row[3]):
                fields.append(Field(name, side, kind, fields[-1].offset + fields[-1].size if fields else 0, size, width, values, number))
        return cls(tuple(fields))

    @classmethod
    def from_store(cls, store, config) -> TableLayout:
        """The item id, with config.user_id the user's number, and each feature with values. config: the model group of the settings.

        Raises UserError where config.hashed_features, in use, names something else.
        """
        schema: Schema = store.schema
        sizes = [(ITEM_ID, "item", "single", store.num_items)]
        for side in ("item", "user"):
            if side == "user" and config.user_id:
                sizes.append((USER_ID, "user", "single", int(store.user_ids.max(initial=0))))
            sizes += [(f.id, side, kind, store.cardinalities[f.id]) for kind in ("single", "multi") for f in schema.select(side, kind)]
        layout = cls.from_sizes(sizes, config)
        if config.hash_rows:
            _check_hashed(config.hashed_features, list(dict.fromkeys(field.name for field in layout.fields)), config.user_id)
        return layout


def _check_hashed(wanted: tuple[str, ...], known: list[str], has_user_id: bool) -> None:
    """UserError for names that have no field."""
    problems = []
    for name in wanted:
        if name in known:
            continue
        remedy = f"the nearest are {', '.join(difflib.get_close_matches(name, known, n=3, cutoff=0.0))}"
        if name == USER_ID and not has_user_id:
            remedy = "users have a vector with model.user_id true only"
        problems.append(f"model.hashed_features: {name!r} is no feature with values in this data; {remedy}.")
    if problems:
        raise UserError("\n".join(problems))


def auto_width(num_rows: int, most: int) -> int:
    """The width of a feature of num_rows values: the power of two at or above 4 * num_rows ** (1/4), at most `most`."""
    return min(most, 1 << math.ceil(math.log2(4 * max(1, num_rows) ** 0.25)))


class Bags(NamedTuple):
    """Which unique rows each of M things sums; and transposed, for the backward pass: into which things each row went."""

    index: torch.Tensor  # (Z,) int32 into SideInputs.rows, thing by thing
    offsets: torch.Tensor  # (M + 1,) int32 start of each thing's part of `index`
    weights: torch.Tensor | None  # (Z,) float32; 1 / number of values where a feature has several. None = all 1
    things: torch.Tensor | None  # (Z',) int32, row by row, without row 0 (padding). None = not asked for
    starts: torch.Tensor | None  # (R + 1,) int32 start of each row's part of `things`
    thing_weights: torch.Tensor | None  # (Z',) float32


class Dense(NamedTuple):
    values: torch.Tensor  # (M, width) float16
    present: torch.Tensor  # (M,) bool


class SideInputs(NamedTuple):
    """What a tower needs of M items (or users)."""

    rows: torch.Tensor  # (R,) int64 unique rows of the joint table, ascending; rows[0] = 0
    segments: tuple[int, ...]  # field i of the side owns rows[segments[i]:segments[i + 1]]; segments[0] = 1
    bags: Bags
    dense: tuple[Dense, ...]
    no_id: torch.Tensor | None = None  # (M,) bool, items whose id is left out for the vector of unknown ids. None = ids count as they are


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


def dropped_ids(item_ids: np.ndarray, rate: float, *, seed: int, epoch: int, step: int) -> np.ndarray:
    """(M,) bool: which items' ids a training batch leaves out, each with probability `rate`; a hash of (seed, epoch, step, item)."""
    return counter_hash(ID_DROPOUT_KEY, seed, epoch, step, item_ids) < np.uint64(rate * 2.0**64)


class FeatureColumns:
    """Gathers features of items and users of a store by id, for a given table layout and set of embeddings.

    The layout may come from another store (the training data of a checkpoint): values above a field's range, unseen in
    training, become missing. Gathers run in the loader's threads.
    trained: (known items + 1,) bool, for a model with a vector of unknown ids (id_dropout), the items it has been trained on: the others'
    ids are left out. None = for a model without one.
    """

    def __init__(self, store, layout: TableLayout, embeddings: tuple[str, ...], trained: np.ndarray | None = None) -> None:
        self.store, self.layout, self.trained = store, layout, trained
        self.embeddings = tuple(store.embedding(i) for i in embeddings)
        self._fields = {side: _SideFields.of(layout.side(side), store.schema, side) for side in ("item", "user")}
        self._all_items: dict[bool, SideInputs] = {}

    def gather(self, item_ids: np.ndarray, users: np.ndarray, transposed: bool = False, dropped: np.ndarray | None = None) -> FeatureInputs:
        """Features of unique items (M,) and of users (B,), the latter as index into the store's users.

        transposed: with what the backward pass needs. dropped: as in `items`.
        """
        return FeatureInputs(self.items(item_ids, transposed, dropped), self.users(users, transposed))

    def items(self, item_ids: np.ndarray, transposed: bool = False, dropped: np.ndarray | None = None) -> SideInputs:
        """Features of items (M,), ids of the store. A repeat of the whole catalogue (full softmax) is gathered once, but for id dropout.

        dropped: (M,) bool, items of a training batch whose ids are left out; None = not training: those that were not trained on.
        """
        if self.trained is not None:
            return self._items_without_ids(item_ids, transposed, ~self.is_trained(item_ids) if dropped is None else dropped)
        whole = len(item_ids) == self.store.num_items + 1
        if whole and transposed in self._all_items:
            return self._all_items[transposed]
        inputs = self._items(item_ids, item_ids <= self.store.num_known_items, transposed)
        if whole:
            self._all_items[transposed] = inputs
        return inputs

    def is_trained(self, item_ids: np.ndarray) -> np.ndarray:
        """(M,) bool: items that the model has been trained on; where that is not noted, those that training knows."""
        known = item_ids <= self.store.num_known_items
        return known if self.trained is None else known & self.trained[np.where(known, item_ids, 0)]

    def _items_without_ids(self, item_ids: np.ndarray, transposed: bool, without: np.ndarray) -> SideInputs:
        without = without & (item_ids > 0)  # padding is no item
        return self._items(item_ids, ~without, transposed)._replace(no_id=torch.from_numpy(without))

    def _items(self, item_ids: np.ndarray, with_id: np.ndarray, transposed: bool) -> SideInputs:
        dense = tuple(self._dense(column, item_ids) for column in self.embeddings)
        ids = np.where(with_id, item_ids, 0)
        return self._inputs("item", ids, self.store.item_single, self.store.item_multi, item_ids, dense, transposed)

    def users(self, users: np.ndarray, transposed: bool = False) -> SideInputs:
        """Features of users (B,), index into the store's users."""
        return self._inputs("user", self.store.user_ids[users], self.store.user_single, self.store.user_multi, users, (), transposed)

    def _inputs(
        self, side: str, ids, single: np.ndarray, multi: dict, places: np.ndarray, dense: tuple[Dense, ...], transposed: bool
    ) -> SideInputs:
        """ids: (M,) what the id field holds. places: (M,) rows of the columns."""
        fields = self._fields[side]
        if fast := kernels.compiled():
            return _compiled_inputs(fast, fields, ids, single, multi, places, dense, transposed)
        rows = np.take(single, places, axis=0)  # indexing with [] takes ten times as long on a memory map
        columns = []  # of each field its rows of the table, 0 where it has none; of a multi-valued one how many each thing has too
        for field, column in zip(fields.all, fields.columns):
            if field.kind == "multi":
                values, counts = multi[field.name].gather(places)
                columns.append((_rows(values, field), counts))
            else:
                columns.append((_rows(ids if column is None else rows[:, column], field), None))
        return _side_inputs(fields.all, columns, len(places), dense, transposed)

    @staticmethod
    def _dense(column, item_ids: np.ndarray) -> Dense:
        rows = np.take(column.row_of_item, item_ids)
        return Dense(torch.from_numpy(np.take(column.matrix, rows, axis=0)), torch.from_numpy(rows > 0))


class _SideFields(NamedTuple):
    """A side's fields, and where in the store's columns their values stand."""

    all: tuple[Field, ...]
    columns: list[int | None]  # of single-valued features; None for the id, which is no column, and for lists
    constants: tuple[np.ndarray, ...]  # (F,) each, of kernels.field_rows: columns, limits, sizes (int64), hashes (uint64)
    offsets: np.ndarray  # (F,) int64

    @classmethod
    def of(cls, fields: tuple[Field, ...], schema: Schema, side: str) -> _SideFields:
        order = {f.id: i for i, f in enumerate(schema.select(side, "single"))}
        columns = [order.get(f.name) for f in fields]
        numbers = [
            kernels.LIST if field.kind == "multi" else kernels.ID if column is None else column for field, column in zip(fields, columns)
        ]
        words = [(number, field.values, field.size, field.offset) for number, field in zip(numbers, fields)]
        *constants, offsets = np.array(words, dtype=np.int64).reshape(-1, 4).T.copy()
        hashes = np.array([counter_hash(HASH_KEY, field.hash) if field.hash else 0 for field in fields], dtype=np.uint64)
        return cls(fields, columns, (*constants, hashes), offsets)


def _compiled_inputs(
    fast: kernels.Kernels,
    fields: _SideFields,
    ids: np.ndarray,
    single: np.ndarray,
    multi: dict,
    places: np.ndarray,
    dense: tuple[Dense, ...],
    transposed: bool,
) -> SideInputs:
    """FeatureColumns._inputs by kernels; bit for bit what `_side_inputs` makes."""
    num = len(places)
    lists = {number: multi[field.name].gather(places) for number, field in enumerate(fields.all) if field.kind == "multi"}
    begin = offsets_of(np.array([len(lists[number][0]) if number in lists else num for number in range(len(fields.all))], dtype=np.int64))
    keys = kernels.scratch("keys", int(begin[-1]), np.int32)
    if num and not 0 <= places.min() <= places.max() < len(single):
        raise IndexError(f"rows {places.min()} to {places.max()} of {len(single)}")
    # Gathered by np.take: a loop over the store's own rows, field by field, takes twice as long as both together.
    values = kernels.scratch("values", num * single.shape[1], np.int32).reshape(num, single.shape[1])
    np.take(kernels.contiguous(single, np.int32), places, axis=0, out=values, mode="clip")
    fast.field_rows(values, kernels.contiguous(ids, np.int64), *fields.constants, begin, keys)
    counts = np.ones((len(fields.all) if lists else 0, num), dtype=np.int32)
    for number, (of_field, lengths) in lists.items():
        keys[begin[number] : begin[number + 1]] = _rows(of_field, fields.all[number])
        counts[number] = lengths
    work = kernels.scratch("rows", 4 * len(keys) + 4, np.int64)
    sides = fast.side_inputs(keys, begin, fields.constants[2], fields.offsets, counts, num, transposed, work)
    rows, bounds, index, bags, weights, *back = sides
    things, starts, thing_weights = back if transposed else (None, None, None)
    arrays = (index, bags, weights if lists else None, things, starts, thing_weights if lists else None)
    tensors = (None if array is None else torch.from_numpy(array) for array in arrays)
    return SideInputs(torch.from_numpy(rows), tuple(bounds.tolist()), Bags(*tensors), dense)


def _rows(values: np.ndarray, field: Field) -> np.ndarray:
    """Values (Z,) of a field to its rows 1 .. size (Z,) int32; missing and unseen values to 0."""
    rows = hashed_rows(values, field) if field.hash else values.astype(np.int32)
    bad = (values < 1) | (values > field.values)
    rows[bad] = 0
    return rows


def hashed_rows(values: np.ndarray, field: Field) -> np.ndarray:
    """Values (Z,) of a hashed field to 1 .. size (Z,) int32, by the field's own hash function."""
    return (counter_hash(HASH_KEY, field.hash, values) % np.uint64(field.size)).astype(np.int32) + np.int32(1)


def _side_inputs(
    fields: tuple[Field, ...],
    columns: list[tuple[np.ndarray, np.ndarray | None]],
    num: int,
    dense: tuple[Dense, ...],
    transposed: bool,
) -> SideInputs:
    """Unique rows and bags of M = num things. columns: each field's rows, one a thing; of lists, the rows of all and the counts (M,)."""
    unique, bounds = [np.zeros(1, dtype=np.int64)], [1]
    index, things, starts, weights = [], [np.zeros(0, dtype=np.int32)], [], [np.zeros(0, dtype=np.float32)]
    num_uses = 0
    for field, (rows, counts) in zip(fields, columns):
        found = distinct(rows, field.size + 1)
        unique.append(found.keys.astype(np.int64) + field.offset)
        index.append(np.where(found.rank > 0, found.rank + np.int32(bounds[-1] - 1), 0))
        bounds.append(bounds[-1] + len(found.keys))
        if transposed:
            owner = None if counts is None else np.repeat(np.arange(num, dtype=np.int32), counts)
            things.append((found.places if owner is None else owner[found.places]).astype(np.int32))
            weights.append(np.ones(len(found.places), np.float32) if counts is None else _mean_weights(counts)[things[-1]])
            starts.append(found.starts + num_uses)
            num_uses += len(found.places)
    lists = [counts for _, counts in columns]
    bag_index, offsets, bag_weights = _bags(index, lists, num)
    back: tuple[np.ndarray | None, ...] = (None, None, None)
    if transposed:  # row 0, the padding, has no uses
        all_starts = np.concatenate([np.zeros(1, dtype=np.int64), *starts, np.full(1, num_uses)]).astype(np.int32)
        back = np.concatenate(things), all_starts, None if bag_weights is None else np.concatenate(weights)
    tensors = (None if array is None else torch.from_numpy(array) for array in (bag_index, offsets, bag_weights, *back))
    return SideInputs(torch.from_numpy(np.concatenate(unique)), tuple(bounds), Bags(*tensors), dense)


def _mean_weights(counts: np.ndarray) -> np.ndarray:
    return (1.0 / np.maximum(counts, 1)).astype(np.float32)


def _bags(index: list[np.ndarray], lists: list[np.ndarray | None], num: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """All fields' places thing by thing: (index (Z,) int32, offsets (M + 1,) int32, weights (Z,) float32 or None without lists)."""
    ones = np.ones(num, dtype=np.int64)
    total = sum((ones if counts is None else counts for counts in lists), np.zeros(num, dtype=np.int64))  # (M,)
    offsets = offsets_of(total)
    if all(counts is None for counts in lists):
        merged = np.stack(index, axis=1).reshape(-1) if index else np.zeros(0, dtype=np.int32)
        return merged, offsets.astype(np.int32), None
    merged, weights = np.empty(int(offsets[-1]), dtype=np.int32), np.ones(int(offsets[-1]), dtype=np.float32)
    begin = offsets[:-1].copy()
    for column, counts in zip(index, lists):
        if counts is None:
            merged[begin] = column
            begin += 1
        else:
            places = ragged_places(begin, counts)
            merged[places] = column
            weights[places] = np.repeat(_mean_weights(counts), counts)
            begin += counts
    return merged, offsets.astype(np.int32), weights
