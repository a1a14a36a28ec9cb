"""Turns lines of layout A (JSON) into column chunks.

A block of lines takes the fastest of three ways that can: compiled loops that read the bytes and know plain records alone; orjson, where
every check is one pass in C; line by line, which repairs what may be repaired and names what may not. All give the same columns. Must not
write the store or start processes (sources_workers.py).
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import chain, compress, repeat
from operator import eq
from pathlib import Path

import numpy as np
import orjson

import sources_loops
from columns import ID_LIMIT, is_number, ragged_places
from schema import EXPOSURE, IGNORED_FEATURES
from sources import INT32_MAX, FeatureRows, Ragged, Rules, SeqChunk, check_sequences, drop_rejected, sort_events

BLOCK_BYTES = 512 << 10  # of lines, parsed at once: objects of a larger block leave the CPU's cache
MAX_LINE_BYTES = 64 << 20
ODD_ITEM = np.iinfo(np.uint64).max  # stands in an array for a creative id that is no number; a list beside it says where
NUM_FIELDS = 6
RECORD = "[user_id, item_id, user_feat, item_feat, action_type, timestamp]"
EMPTY: tuple = ()
MISSING_TIMES = "coerced: missing timestamps, read as that of the event ahead, or 0"


class _IrregularError(Exception):
    """A block that the fast way cannot take."""


class _BadLineError(ValueError):
    """A line or value that must be rejected; the text is the reason."""


class FeatureReader:
    """Feature dictionaries of one side to columns. Strings are values unseen in training (cold): 0, counted; so are nulls, uncounted."""

    def __init__(self, rules: Rules, side: str) -> None:
        self.single = tuple(f.id for f in rules.schema.select(side, "single"))
        self.multi = tuple(f.id for f in rules.schema.select(side, "multi"))
        self.lenient, self.side = rules.lenient, side
        self._known = frozenset(self.single) | frozenset(self.multi) | IGNORED_FEATURES
        self.slots = sources_loops.slots_of(self.single, self.multi)

    def columns(self, dicts: list[dict], tally: Counter) -> tuple[np.ndarray, dict[str, Ragged]]:
        """(N) dictionaries -> single (N, F) int32 and {id: Ragged}. _BadLineError where a value cannot be."""
        single = self._plain_columns(dicts)
        if single is None:
            single = np.empty((len(dicts), len(self.single)), dtype=np.int32)
            for column, name in enumerate(self.single):
                values = list(map(dict.get, dicts, repeat(name), repeat(0)))
                if set(map(type, values)) - {int}:
                    values = [self._value(name, v, tally) for v in values]
                single[:, column] = self._array(name, values, tally)
        multi = {name: self._multi(name, [d.get(name, EMPTY) for d in dicts], tally) for name in self.multi}
        for name in set().union(*dicts) - self._known:
            tally[f"ignored: {self.side} feature {name[:40]!r} is not in the schema"] += sum(name in d for d in dicts)
        return single, multi

    def outputs(self, num: int, num_values: int) -> sources_loops.Outputs:
        """Room for the compiled loops to put `num` dictionaries with up to `num_values` values in lists."""
        lists = len(self.multi)
        return sources_loops.Outputs(
            single=np.empty((num, len(self.single)), np.int32),
            counts=np.empty((lists, num), np.int64),
            values=np.empty((lists, num_values), np.int32),
            filled=np.zeros(lists, np.int64),
            cold=np.zeros(len(self.slots.kinds), np.int64),
        )

    def rows(self, ids: np.ndarray, found: sources_loops.Outputs, tally: Counter) -> FeatureRows:
        """What the loops put there for the dictionaries of `ids` (N)."""
        for name, count in zip(self.single + self.multi, found.cold.tolist(), strict=False):
            if count:
                tally[f"cold: {self.side} feature {name}"] += count
        num = len(ids)
        lists = zip(self.multi, found.counts, found.values, found.filled.tolist(), strict=True)
        return FeatureRows(ids, found.single[:num], {name: Ragged(c[:num].copy(), v[:end].copy()) for name, c, v, end in lists})

    def _plain_columns(self, dicts: list[dict]) -> np.ndarray | None:
        """All single columns at once where every value is an int in range (a quarter faster than one by one), else None."""
        values: list = []
        for name in self.single:
            values += map(dict.get, dicts, repeat(name), repeat(0))
        if set(map(type, values)) - {int}:
            return None
        try:
            columns = np.frombuffer(array("i", values), dtype=np.int32) if values else np.zeros(0, dtype=np.int32)
        except OverflowError:
            return None
        if len(columns) and columns.min() < 0:
            return None
        return np.ascontiguousarray(columns.reshape(len(self.single), len(dicts)).T)

    def _multi(self, name: str, lists: list, tally: Counter) -> Ragged:
        if set(map(type, lists)) - {list, tuple}:
            lists = [self._list(name, v, tally) for v in lists]
        counts = np.fromiter(map(len, lists), np.int64, len(lists))
        values = list(chain.from_iterable(lists))
        if set(map(type, values)) - {int}:
            values = [self._value(name, v, tally) for v in values]
        return Ragged(counts, self._array(name, values, tally)).without_zeros()

    def _array(self, name: str, values: list, tally: Counter) -> np.ndarray:
        try:
            array = np.fromiter(values, np.int64, len(values))
        except OverflowError:
            array = np.array([self._value(name, v, tally) for v in values], dtype=np.int64)
        if len(array) and (array.min() < 0 or array.max() > INT32_MAX):
            array = np.array([self._value(name, v, tally) for v in array.tolist()], dtype=np.int64)
        return array.astype(np.int32)

    def _list(self, name: str, value: object, tally: Counter) -> list | tuple:
        if value is None:
            return EMPTY
        if type(value) not in (list, tuple):
            tally[f"coerced: {self.side} feature {name}: one value where the schema says a list"] += 1
            return [value]
        return value

    def _value(self, name: str, value: object, tally: Counter) -> int:
        if type(value) is int and 0 <= value <= INT32_MAX:
            return value
        if value is None:
            return 0
        if type(value) is str:
            tally[f"cold: {self.side} feature {name}"] += 1
            return 0
        if not self.lenient:
            raise _BadLineError(f"{self.side} feature {name} is {str(value)[:40]}; expected a whole number from 0 to {INT32_MAX}")
        tally[f"coerced: {self.side} feature {name}: not a whole number from 0 up, read as missing"] += 1
        return 0


class KnownItems:
    """Item features read before the sequences (item_feat_dict.json), to compare with. A folder of flat files that store_build.py names."""

    def __init__(self, single: np.ndarray, covered: np.ndarray, multi: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        self.single, self.covered, self.multi = single, covered, multi

    def differs(self, rows: FeatureRows) -> np.ndarray:
        """Which rows (N) bool differ from what is known of their items (ids within range)."""
        ids = rows.ids.astype(np.int64)
        different = (self.single[ids] != rows.single).any(axis=1)
        for name, found in rows.multi.items():
            offsets, values = self.multi[name]
            begin, counts = offsets[ids], offsets[ids + 1] - offsets[ids]
            same = counts == found.counts
            unequal = values[ragged_places(begin, counts)][np.repeat(same, counts)] != found.values[np.repeat(same, found.counts)]
            rows_of = np.repeat(np.flatnonzero(same), counts[same])
            different |= ~same
            different[rows_of[unequal]] = True
        return different


class LineParser:
    """Lines of seq.jsonl or predict_seq.jsonl to SeqChunks."""

    def __init__(self, rules: Rules, known: KnownItems) -> None:
        self.rules, self.known = rules, known
        self.users, self.items = FeatureReader(rules, "user"), FeatureReader(rules, "item")

    def parse(self, lines: list[bytes], first_line: int) -> SeqChunk:
        """Columns of the users in `lines`; the line numbers count from `first_line`."""
        return self.parse_block(b"".join(line + b"\n" for line in lines), first_line)

    def parse_block(self, data: bytes, first_line: int) -> SeqChunk:
        """Columns of the users in lines that are one piece of bytes, as read_blocks gives them."""
        chunk = self._plain_lines(data, first_line)
        if chunk is None:
            chunk = self._any_lines(split_lines(data), first_line)
        checked = chunk.user_ids if self.rules.kind == "train" else None
        chunk = drop_rejected(
            chunk, check_sequences(self.rules, checked, chunk.counts, chunk.item_ids, chunk.action_types, chunk.timestamps)
        )
        sort_events(self.rules, chunk, chunk.tally)
        chunk.action_types = chunk.action_types.astype(np.int8)
        chunk.rejects.sort()
        return chunk

    def _plain_lines(self, data: bytes, first_line: int) -> SeqChunk | None:
        """The compiled way; None where it is not there or meets anything but plain records."""
        loops = sources_loops.compiled() if self.rules.kind == "train" and data else None
        if loops is None or self.users.slots is None or self.items.slots is None:
            return None
        padded, end = sources_loops.padded(data.removesuffix(b"\n"))
        num_lines = int(np.count_nonzero(padded == sources_loops.NEWLINE))
        most, values = sources_loops.bounds(padded)
        ids, counts = np.empty((2, num_lines), dtype=np.int64)
        item_ids, action_types, timestamps = np.empty((3, most), dtype=np.int64)
        users, items = self.users.outputs(num_lines, values), self.items.outputs(most, values)
        num = loops.lines(
            padded, end + 1, *self.users.slots, *users, *self.items.slots, *items, ids, counts, item_ids, action_types, timestamps
        )
        if num < 0:
            return None
        tally: Counter = Counter()
        chunk = SeqChunk(
            lines=np.arange(first_line, first_line + num_lines), num_lines=num_lines, user_ids=ids, counts=counts,
            item_ids=item_ids[:num].copy(), action_types=action_types[:num], timestamps=timestamps[:num].copy(), tally=tally)  # fmt: skip
        chunk.users = self.users.rows(ids, users, tally)
        chunk.items = self._item_rows(self.items.rows(chunk.item_ids, items, tally), [], tally)
        return chunk

    def _any_lines(self, lines: list[bytes], first_line: int) -> SeqChunk:
        """By orjson."""
        tally: Counter = Counter()
        rejects, numbers, users = [], [], []
        for number, line in enumerate(lines, first_line):
            try:
                users.append(orjson.loads(line))
                numbers.append(number)
            except orjson.JSONDecodeError as error:
                rejects.append((number, why_not_json(line, error, what="user", end=b"]")))
        try:
            chunk = self._columns(users, tally)
        except (_IrregularError, _BadLineError, TypeError, ValueError, OverflowError, AttributeError):
            tally = Counter()
            users, numbers = self._clean_lines(users, numbers, rejects, tally)
            chunk = self._columns(users, tally)
        chunk.lines, chunk.num_lines = np.array(numbers, dtype=np.int64), len(lines)
        chunk.rejects, chunk.tally = rejects, tally
        return chunk

    def _columns(self, users: list[list], tally: Counter) -> SeqChunk:
        """One profile a line, plain ints where ints belong; anything else raises."""
        lengths = np.fromiter(map(len, users), np.int64, len(users))
        records = list(chain.from_iterable(users))
        if not users:
            return self._empty()
        if set(map(type, users)) != {list} or set(map(type, records)) != {list} or set(map(len, records)) != {NUM_FIELDS}:
            raise _IrregularError
        user, item, user_feat, item_feat, action, moment = zip(*records, strict=True)
        profiles = [k for k, value in enumerate(item) if value is None]
        ends = np.cumsum(lengths)
        if len(profiles) != len(users) or (np.searchsorted(ends, profiles, side="right") != np.arange(len(users))).any():
            raise _IrregularError
        names = [user[k] for k in profiles]
        if not all(map(eq, user, chain.from_iterable(map(repeat, names, lengths.tolist())))):
            raise _IrregularError
        is_event = np.ones(len(records), dtype=bool)
        is_event[profiles] = False
        mask = is_event.tolist()
        num_events = len(records) - len(users)
        item_ids, odd = self._item_ids(list(compress(item, mask)))
        chunk = SeqChunk(
            lines=EMPTY, num_lines=0, user_ids=self._user_ids(names), counts=lengths - 1, item_ids=item_ids, odd_items=odd,
            action_types=_ints(list(compress(action, mask)), num_events),
            timestamps=_ints(list(compress(moment, mask)), num_events),
            user_names=names if self.rules.kind == "predict" else None)  # fmt: skip
        dicts = [user_feat[k] for k in profiles]
        if user_feat.count(None) != num_events or set(map(type, dicts)) != {dict}:
            raise _IrregularError
        chunk.users = FeatureRows(chunk.user_ids, *self.users.columns(dicts, tally))
        dicts = list(compress(item_feat, mask))
        if set(map(type, dicts)) - {dict}:
            raise _IrregularError
        chunk.items = self._item_rows(FeatureRows(item_ids, *self.items.columns(dicts, tally)), odd, tally)
        return chunk

    def _empty(self) -> SeqChunk:
        none = np.zeros(0, dtype=np.int64)
        ids = none.astype(np.uint64 if self.rules.kind == "predict" else np.int64)
        users, items = (FeatureRows(ids, *reader.columns([], Counter())) for reader in (self.users, self.items))
        return SeqChunk(
            none, 0, none, none, ids, none.astype(np.int8), none, [] if self.rules.kind == "predict" else None, [], users, items
        )

    def _user_ids(self, names: list) -> np.ndarray:
        if self.rules.kind == "train":
            return _ints(names, len(names))
        if set(map(type, names)) - {int, str}:
            raise _IrregularError
        return np.zeros(len(names), dtype=np.int64)

    def _item_ids(self, values: list) -> tuple[np.ndarray, list]:
        if self.rules.kind == "train":
            return _ints(values, len(values)), []
        odd = []
        if set(map(type, values)) - {int}:
            for k, value in enumerate(values):
                if type(value) is str:
                    if is_number(value):
                        values[k] = int(value)
                    else:
                        values[k] = ODD_ITEM
                        odd.append((k, value))
                elif type(value) is not int:
                    raise _IrregularError
        return np.fromiter(values, np.uint64, len(values)), odd

    def _item_rows(self, rows: FeatureRows, odd: list, tally: Counter) -> FeatureRows:
        """Of the events' rows those of items that are not covered yet, the first of each; differences to what is known are counted."""
        item_ids = rows.ids
        in_range = (item_ids >= 1) & (item_ids < len(self.known.covered))
        covered = np.zeros(len(item_ids), dtype=bool)
        covered[in_range] = self.known.covered[item_ids[in_range].astype(np.int64)]
        if covered.any():
            tally["differences: events whose item features differ from item_feat_dict.json"] += int(
                self.known.differs(rows.select(covered)).sum()
            )
        fresh = ~covered & (item_ids >= 1)
        if self.rules.kind == "train":
            fresh &= item_ids <= self.rules.item_limit
        fresh[[place for place, _ in odd]] = False
        rows = rows.select(fresh)
        first = np.zeros(len(rows.ids), dtype=bool)
        first[np.unique(rows.ids, return_index=True)[1]] = True
        return rows.select(first)

    def _clean_lines(self, users: list, numbers: list[int], rejects: list, tally: Counter) -> tuple[list, list[int]]:
        """The slow way: each line repaired or rejected with its reason."""
        kept_users, kept_numbers = [], []
        for line, number in zip(users, numbers, strict=True):
            found: Counter = Counter()
            try:
                cleaned = self._clean_line(line, found)
                self._columns([cleaned], Counter())
            except _BadLineError as error:
                rejects.append((number, str(error)))
            except (_IrregularError, TypeError, ValueError, OverflowError, AttributeError):
                rejects.append((number, f"not a list of records {RECORD}"))
            else:
                kept_users.append(cleaned)
                kept_numbers.append(number)
                tally.update(found)
        return kept_users, kept_numbers

    def _clean_line(self, line: object, tally: Counter) -> list[list]:
        if type(line) is not list or not line:
            found = "an empty list" if line == [] else f"{type(line).__name__}"
            raise _BadLineError(f"expected a list of records {RECORD}, found {found}")
        for number, record in enumerate(line, 1):
            if type(record) is not list or len(record) != NUM_FIELDS:
                found = f"{len(record)} fields" if type(record) is list else type(record).__name__
                raise _BadLineError(f"record {number} has {found}; expected the {NUM_FIELDS} fields {RECORD}")
        user = self._clean_user(line)
        events, profiles = [], []
        for number, record in enumerate(line, 1):
            if record[1] is None:
                profiles.append(self._profile(record, user, tally))
            else:
                events.append(self._event(record, user, number, events, tally))
        if len(profiles) != 1:
            if not self.rules.lenient:
                raise _BadLineError(f"{len(profiles)} profile records (item_id null); expected exactly one")
            tally["coerced: users with no profile record, or more than one"] += 1
        return events + (profiles[:1] or [[user, None, {}, None, None, None]])

    def _clean_user(self, line: list[list]) -> object:
        user = line[0][0]
        wanted = (int, str) if self.rules.kind == "predict" else (int,)
        if type(user) not in wanted:
            raise _BadLineError(
                f"user id {str(user)[:40]!r} is of type {type(user).__name__}; expected {' or '.join(t.__name__ for t in wanted)}"
            )
        if type(user) is int and not -(2**63) <= user < 2**63 and self.rules.kind == "train":
            raise _BadLineError(f"user id {user} is outside 1..{self.rules.user_limit}")
        for number, record in enumerate(line, 1):
            if type(record[0]) is not type(user) or record[0] != user:
                raise _BadLineError(f"record {number} belongs to user {str(record[0])[:40]!r}, the first one to {str(user)[:40]!r}")
        return user

    def _profile(self, record: list, user: object, tally: Counter) -> list:
        _, _, features, item_features, action, moment = record
        if features is None:
            features = {}
            tally["coerced: profile records without features (user_feat null)"] += 1
        if type(features) is not dict:
            raise _BadLineError(f"user_feat is of type {type(features).__name__}; expected an object")
        if item_features is not None or action is not None:
            tally["ignored: item_feat or action_type of a profile record"] += 1
        return [user, None, features, None, None, moment]

    def _event(self, record: list, user: object, number: int, ahead: list[list], tally: Counter) -> list:
        _, item, user_features, features, action, moment = record
        predict = self.rules.kind == "predict"
        highest = ID_LIMIT - 1 if predict else 2**63 - 1
        if not (type(item) is int and 0 <= item <= highest) and not (predict and type(item) is str and item):
            expected = "a number or a string" if predict else f"a number in 1..{self.rules.item_limit}"
            raise _BadLineError(f"record {number}: item id {str(item)[:40]} is out of range or of the wrong type; expected {expected}")
        if action is None and (self.rules.public or predict):
            action = EXPOSURE
            tally["coerced: missing action types, read as exposures"] += 1
        if type(action) is not int or not -(2**63) <= action < 2**63:
            raise _BadLineError(f"record {number}: action type is {str(action)[:40]}; expected 0, 1 or 2")
        if moment is None and not self.rules.schema.has_time:
            moment = len(ahead)
        elif moment is None and predict:
            moment = ahead[-1][5] if ahead else 0
            tally[MISSING_TIMES] += 1
        if type(moment) is not int or not -(2**63) <= moment < 2**63:
            raise _BadLineError(
                f"record {number}: timestamp is {'missing' if moment is None else str(moment)[:40]}; expected seconds since 1970"
            )
        if features is None:
            features = {}
            tally["coerced: interactions without item features (item_feat null)"] += 1
        if type(features) is not dict:
            raise _BadLineError(f"record {number}: item_feat is of type {type(features).__name__}; expected an object")
        if user_features is not None:
            tally["ignored: user_feat of an interaction"] += 1
        return [user, item, None, features, action, moment]


def _ints(values: list, count: int) -> np.ndarray:
    """(N) int64 of plain ints; raises where one is anything else."""
    if set(map(type, values)) - {int}:
        raise _IrregularError
    return np.fromiter(values, np.int64, count)


def why_not_json(line: bytes, error: Exception, *, what: str = "JSON object", end: bytes = b"}") -> str:
    """Why a line that should hold one `what`, which ends in `end`, is not JSON, in words."""
    if not line.strip():
        return f"an empty line; expected one {what} a line"
    if line.startswith(b"\xef\xbb\xbf"):
        return "the line starts with a byte order mark; save the file as UTF-8 without one"
    if b"NaN" in line or b"Infinity" in line:
        return "NaN or Infinity is no JSON; expected finite numbers"
    return f"{'' if line.rstrip().endswith(end) else 'the line is cut off or '}not JSON: {error}"


def read_range(path: Path, start: int, end: int) -> Iterator[tuple[int, list[bytes]]]:
    """Lines of a file that begin in bytes start..end, in blocks: (offset of the first line, lines). A line over 64 MiB comes as b''."""
    for offset, data in read_blocks(path, start, end):
        yield offset, split_lines(data)


def split_lines(data: bytes) -> list[bytes]:
    """The lines of a block, without their ends."""
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return lines


def read_blocks(path: Path, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """As read_range, the lines of a block in one piece."""
    with open(path, "rb") as file:
        if start:
            file.seek(start - 1)
            if file.read(1) != b"\n":
                _skip_line(file, end)
        while (offset := file.tell()) < end:
            data = file.read(min(BLOCK_BYTES, end - offset))
            if not data:
                return
            if not data.endswith(b"\n"):
                data += file.readline(MAX_LINE_BYTES)
                if not data.endswith(b"\n") and len(data) >= MAX_LINE_BYTES:
                    data = data[: data.rfind(b"\n") + 1] + b"\n"
                    _skip_line(file, None)
            yield offset, data


def _skip_line(file: object, end: int | None) -> None:
    """Go to the next line's start, or past `end`."""
    while (end is None or file.tell() < end) and (piece := file.readline(1 << 20)):
        if piece.endswith(b"\n"):
            return
