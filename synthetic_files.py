"""The two layouts' files of synthetic data: JSON lines, parquet tables, pickles and vectors, from users and item tables.

Must not decide what the data are (planted.py) or which files a folder has (synthetic.py).
Legend: N users or rows, F single-valued item features.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from planted import USER_MULTI, USER_SINGLE, Users, World
from planted_features import ITEM_SINGLE

ROWS_A_PART = 1 << 20
LINES_AT_ONCE = 512
WRITE_OPTIONS = {"compression": "zstd", "compression_level": 1, "use_dictionary": False, "write_statistics": False}
EVENT_TYPE = pa.struct([("item_id", pa.int64()), ("action_type", pa.int8()), ("timestamp", pa.int64())])
VALUE_TYPE = pa.struct([("feature_value", pa.string()), ("is_str", pa.int8())])


class Fragments:
    """Feature dictionaries as JSON bytes: one for each item, and for each of a chunk's users."""

    def __init__(self, table: np.ndarray) -> None:
        names = (*ITEM_SINGLE, "111")
        empty = ~table.any(axis=1)
        extra = np.where(empty, 0, 1 + np.arange(len(table)) % 7)
        self.items = [to_json({name: feature_value(name, v) for name, v in zip(names, row, strict=True) if v or name == "116"})
                      for row in zip(*table.T.tolist(), extra.tolist(), strict=True)]  # fmt: skip
        for row in np.flatnonzero(empty).tolist():
            self.items[row] = b"{}"

    @staticmethod
    def users(users: Users) -> list[bytes]:
        singles = users.single.tolist()
        lists = [[[v for v in row if v] for row in users.multi[name].tolist()] for name in USER_MULTI]
        return [to_json({name: feature_value(name, v) for name, v in zip(USER_SINGLE, row, strict=True) if v}
                      | {name: values for name, values in zip(USER_MULTI, multi, strict=True) if values})
                for row, *multi in zip(singles, *lists, strict=True)]  # fmt: skip


def to_json(tree: object) -> bytes:
    return bytes(memoryview(orjson.dumps(tree)))  # a copy: orjson's own keeps a buffer of kilobytes, gigabytes over half a million items


def feature_value(name: str, value: int) -> int | str:
    return value if value >= 0 else f"new_{name}_{-value}"


def raw_user(number: int) -> str:
    """The raw id of user `number`."""
    return f"user_{number:08d}"


def json_lines(world: World, users: Users, fragments: Fragments, user_ids: list, counts: np.ndarray) -> Iterator[bytes]:
    """One line a user in the form of seq.jsonl; counts (N): events to write. Items unknown in training carry their creative id."""
    profiles, features = fragments.users(users), fragments.items
    for first in range(0, len(user_ids), LINES_AT_ONCE):
        piece = slice(first, first + LINES_AT_ONCE)
        known = users.items[piece] <= world.num_items
        names = np.where(known, users.items[piece], world.creative_ids[users.items[piece]])
        columns = [a[piece].tolist() for a in (counts, users.profile_at, users.items, users.actions, users.times)]
        for user, profile, name_row, count, place, *rows in zip(user_ids[piece], profiles[piece], names.tolist(), *columns, strict=True):
            head = b"[" + to_json(user) + b","
            records = [b"%s%d,null,%s,%d,%d]" % (head, name, features[item], action, moment)
                       for name, item, action, moment in zip(name_row[:count], *rows, strict=False)]  # fmt: skip
            records.insert(place, b"%snull,%s,null,null,%d]" % (head, profile, rows[-1][count - 1]))
            yield b"[" + b",".join(records) + b"]\n"


def write_lines(lines: Iterator[bytes], path: Path) -> np.ndarray:
    """Append lines to a file; their lengths in bytes (N) int64."""
    with open(path, "ab") as file:
        return np.fromiter(map(file.write, lines), np.int64)


def sequence_table(world: World, users: Users, first: int, counts: np.ndarray) -> pa.Table:
    """Rows of seq/ for the users numbered from `first`; counts (N): events to write."""
    kept = np.arange(users.items.shape[1]) < counts[:, None]
    items = users.items[kept]
    ids = np.where(items > world.num_items, world.creative_ids[items], items)
    fields = [pa.array(ids), pa.array(users.actions[kept]), pa.array(users.times[kept])]
    events = pa.StructArray.from_arrays(fields, fields=list(EVENT_TYPE))
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    return pa.table({"user_id": first + np.arange(len(counts)), "seq": pa.ListArray.from_arrays(offsets, events)})


def user_table(users: Users, first: int) -> pa.Table:
    """Rows of user_feat/; a value unseen in training is null, as a missing one."""
    columns: dict = {"user_id": first + np.arange(len(users.counts))}
    for column, name in enumerate(USER_SINGLE):
        columns[name] = _nullable(users.single[:, column])
    for name in USER_MULTI:
        counts = (users.multi[name] > 0).sum(axis=1)
        offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
        columns[name] = pa.ListArray.from_arrays(offsets, pa.array(users.multi[name][users.multi[name] > 0]), mask=pa.array(counts == 0))
    return pa.table(columns)


def item_table(ids: np.ndarray, table: np.ndarray) -> pa.Table:
    """Rows of item_feat/: ids (n) int64, table (n, F)."""
    return pa.table({"item_id": ids.astype(np.int64)} | {name: _nullable(table[:, k]) for k, name in enumerate(ITEM_SINGLE)})


def _nullable(values: np.ndarray) -> pa.Array:
    return pa.array(values, mask=values <= 0)


def candidate_lines(world: World, candidates: np.ndarray, fragments: Fragments) -> Iterator[bytes]:
    """Lines of predict_set.jsonl for these item ids (C)."""
    for number, (item, creative) in enumerate(zip(candidates.tolist(), world.creative_ids[candidates].tolist(), strict=True), 1):
        yield b'{"creative_id":%d,"retrieval_id":%d,"features":%s}\n' % (creative, number, fragments.items[item])


def candidate_table(world: World, candidates: np.ndarray, table: np.ndarray) -> pa.Table:
    """Rows of candidate/ for these item ids (C); table: features of all items, as planted_features.item_features gives them."""
    known = np.where(candidates <= world.num_items, candidates, 0)
    columns: dict = {"creative_id": world.creative_ids[candidates], "reid_creative_id": known}
    columns["retrieval_id"] = np.arange(1, len(candidates) + 1)
    for column, name in enumerate(ITEM_SINGLE):
        values = table[candidates, column]
        texts = pa.array([str(feature_value(name, v)) for v in values.tolist()], mask=values == 0)
        flags = pa.array((values < 0).astype(np.int8))
        columns[name] = pa.StructArray.from_arrays([texts, flags], fields=list(VALUE_TYPE), mask=pa.array(values == 0))
    return pa.table(columns)


def write_parquet(table: pa.Table, folder: Path, part: int) -> None:
    """Write FOLDER/part-NNNNN.parquet."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / f"part-{part:05d}.parquet", **WRITE_OPTIONS)


def write_pickle(tree: object, path: Path) -> None:
    """Write plain data."""
    with open(path, "wb") as file:
        pickle.dump(tree, file, protocol=4)


def line_offsets(lengths: np.ndarray) -> list[int]:
    """Where each line starts, from the lines' lengths in bytes."""
    return np.concatenate([[0], np.cumsum(lengths)[:-1]]).tolist()


def _num_parts(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    return sum(1 for _ in folder.iterdir())


class ParquetVectors:
    """mm_emb/emb_ID_WIDTH_parquet/: creative ids as text; null for items listed without. Goes on after the parts that are there."""

    def __init__(self, folder: Path, width: int) -> None:
        self.folder, self.width, self.part, self.rows = folder, width, _num_parts(folder), 0
        self.schema = pa.schema([("anonymous_cid", pa.string()), ("emb", pa.list_(pa.float32()))])
        self.file: pq.ParquetWriter | None = None

    def add(self, creative_ids: np.ndarray, vectors: np.ndarray, without: np.ndarray) -> None:
        if self.file is None or self.rows + len(creative_ids) > ROWS_A_PART:
            self.close()
            self.file = pq.ParquetWriter(self.folder / f"part-{self.part:05d}.parquet", self.schema, **WRITE_OPTIONS)
            self.part, self.rows = self.part + 1, 0
        self.rows += len(creative_ids)
        offsets = np.minimum(np.arange(len(creative_ids) + len(without) + 1), len(creative_ids)) * self.width
        missing = np.arange(len(creative_ids) + len(without)) >= len(creative_ids)
        lists = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(vectors.ravel()), mask=pa.array(missing))
        self.file.write_table(pa.table([pa.array(np.concatenate([creative_ids, without])).cast(pa.string()), lists], schema=self.schema))

    def close(self) -> None:
        if self.file:
            self.file.close()


class PickledVectors:
    """creative_emb/emb_81_32.pkl: {creative id: float32 vector}. `tree`: vectors to begin with."""

    def __init__(self, path: Path, tree: dict | None = None) -> None:
        self.path, self.tree = path, tree or {}
        path.parent.mkdir(exist_ok=True)

    def add(self, creative_ids: np.ndarray, vectors: np.ndarray, without: np.ndarray) -> None:  # noqa: ARG002: here is no way to list one
        self.tree |= dict(zip(creative_ids.tolist(), vectors, strict=True))

    def close(self) -> None:
        write_pickle(self.tree, self.path)


class JsonVectors:
    """creative_emb/emb_ID_WIDTH/part-*: JSON lines, ids as text; no emb where listed without. Goes on after the parts there are."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.part = folder, _num_parts(folder)

    def add(self, creative_ids: np.ndarray, vectors: np.ndarray, without: np.ndarray) -> None:
        with open(self.folder / f"part-{self.part:05d}", "wb") as file:
            for creative, vector in zip(creative_ids.tolist(), vectors, strict=True):
                file.write(orjson.dumps({"anonymous_cid": str(creative), "emb": vector}, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")
            file.writelines(b'{"anonymous_cid":"%d"}\n' % creative for creative in without.tolist())
        self.part += 1

    def close(self) -> None:
        """Nothing to finish: each piece is a file."""
