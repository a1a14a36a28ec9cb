"""Answers for users outside a run: a checkpoint with data that fit it, creative ids of rankings, users given as JSON lines.

Must not know the environment, flags or the platform's files: those are infer.py's.

Legend: S users, C candidates, D width, k answers.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import torch

from candidates import normalise_id
from columns import RaggedColumn
from dataset import predict_split
from ensemble import Ensemble, EnsembleRanker
from errors import UserError
from evaluate import Ranker, without_cold
from features import FeatureColumns, known_items_digest
from schema import ACTION_NAMES, NUM_ACTION_TYPES, Schema
from store import Store, open_store

KEYS = ("user", "events", "features", "wanted_action", "k")  # of a request
LARGEST = 2**31 - 1  # of a feature's value
LAST_SECOND = 2**62
MOST_ANSWERS = 1000


class Served(NamedTuple):
    """What is needed to answer: the model or models, the data, and which of its items are ranked."""

    ensemble: Ensemble
    store: Store
    candidates: np.ndarray  # (C,) item ids
    ranker: Ranker


def open_served(
    ensemble: Ensemble, data_path: Path, kind: str, cache_path: Path, device: torch.device, log: Callable[[str], None] = print
) -> Served:
    """Open the data of `kind` ("predict": its candidates are ranked; "train": all its items) for a checkpoint or an ensemble.

    UserError where the data are not those that it was trained on. Cold candidates go by eval.cold_candidates of the first member.
    """
    first = ensemble.members[0]
    config = first.config
    embeddings = tuple(dict.fromkeys(name for member in ensemble.members for name in member.embeddings))
    store = open_store(data_path, cache_path, kind=kind, embeddings=embeddings, max_bad_lines=config.data.max_bad_lines, log=log)
    candidates = np.asarray(store.candidate_item_ids) if kind == "predict" else np.arange(1, store.num_items + 1)
    if not len(candidates):
        raise UserError(f"{data_path}: no candidates (predict_set.jsonl or candidate/) to rank. Add them to EVAL_DATA_PATH.")
    for member in ensemble.members:
        _check_fit(store, member.meta, member.schema, member.path, data_path)
        if member.config.eval.transition_weight and member.transitions is None:
            log(f"warning: {member.path}: transition_weight is set, but the checkpoint holds no counts; it is ranked without them")
    policy = config.eval.cold_candidates
    if policy == "drop":
        candidates = without_cold(candidates, FeatureColumns(store, first.layout, (), first.trained))
    options = {"batch_size": config.eval.eval_batch_size, "num_workers": max(1, config.data.num_workers)}
    options["cold_penalty"] = config.eval.cold_penalty if policy == "penalty" else 0.0
    ranker = ensemble.ranker([member.ranker(store, candidates, device, **options) for member in ensemble.members])
    return Served(ensemble, store, candidates, ranker)


def _check_fit(store: Store, meta: dict, schema: Schema, checkpoint_path: Path, data_path: Path) -> None:
    if store.num_known_items != meta["num_items"]:
        raise UserError(
            f"{data_path}/indexer.pkl knows {store.num_known_items:,} items, "
            f"the checkpoint {checkpoint_path} was trained on {meta['num_items']:,}.\n"
            "Item numbers would mean other items. Give the data of the same data set."
        )
    if known_items_digest(store) != meta["item_ids"]:
        raise UserError(
            f"{data_path}/indexer.pkl numbers other creative ids than those that the checkpoint {checkpoint_path} was trained on.\n"
            "Give the data of the same data set."
        )
    if store.schema.features != schema.features:
        raise UserError(
            f"{data_path}: its schema differs from the one the checkpoint {checkpoint_path} was trained with.\n"
            "Give the schema.json of the training data."
        )


def creative_ids(store: Store, item_ids: np.ndarray) -> list[list[int | str]]:
    """Creative ids of rankings (S, k), without the empty places (id 0) that occur only where the pool has fewer than k candidates.

    Numbers are ints, as in the candidates' file, also where one id that is none made the store keep all of them as text.
    """
    raw = store.raw_item_ids
    if isinstance(raw, np.ndarray):
        rows = raw[item_ids].tolist()
        if (item_ids > 0).all():
            return rows
    else:
        rows = [[normalise_id(creative) if creative else 0 for creative in raw.take(row)] for row in item_ids]
    return [[creative for creative, item in zip(row, ids) if item > 0] for row, ids in zip(rows, item_ids.tolist())]


# ---- users that are in no file ------------------------------------------------------------------------------------------


class OtherUsers:
    """A store's items with other users: what batches and features read of a store. Columns as the store's, see `Store`."""

    def __init__(
        self,
        store: Store,
        *,
        events: tuple[np.ndarray, np.ndarray, np.ndarray],
        offsets: np.ndarray,
        user_ids: np.ndarray,
        single: np.ndarray,
        multi: dict[str, RaggedColumn],
    ) -> None:
        """events: item ids, action types, timestamps (E,) each."""
        self._store = store
        self.item_ids, self.action_types, self.timestamps = (
            array.astype(dtype) for array, dtype in zip(events, (np.int32, np.int8, np.int64))
        )
        self.user_offsets, self.user_ids, self.num_users = offsets, user_ids, len(user_ids)
        self.user_single, self.user_multi = single, multi

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)


def ranker_for(ranker: Ranker, store: OtherUsers) -> Ranker:
    """The ranker for the users of another view of its store; what it has encoded stays good."""
    found = copy.copy(ranker)
    found.store, found.columns, found.num_workers = store, copy.copy(ranker.columns), 0  # a user's batch needs no thread
    found.columns.store = store
    if isinstance(ranker, EnsembleRanker):
        found.rankers = [ranker_for(member, store) for member in ranker.rankers]
    return found


class Request(NamedTuple):
    """A line of the input, read. None: not given; what the data say of the user counts then."""

    user: str | None
    events: list[tuple[int | str, int, int]] | None  # creative id, action type, seconds; in the order of their times
    features: dict[str, list[int]] | None
    wanted: int | None
    k: int


def parse_request(line: bytes | str, schema: Schema, default_k: int) -> Request:
    """A request from a line of JSON. UserError says what is wrong with it."""
    try:
        tree = json.loads(line)
    except (ValueError, RecursionError) as error:  # a wrong encoding is a ValueError too
        raise UserError(f"not a line of JSON: {' '.join(str(error).split())[:120]}") from None
    if not isinstance(tree, dict):
        raise UserError(f'expected an object such as {{"user": "u1"}}, found {_kind_of(tree)}')
    for key in tree:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.0)[0]
            raise UserError(f"unknown key {key[:40]!r}; the nearest is {near}")
    user = tree.get("user")
    if user is not None and type(user) not in (str, int):
        raise UserError(f"user: expected the raw id, a text or a whole number, found {_kind_of(user)}")
    if user is None and tree.get("events") is None:
        raise UserError("needs user (one of the data's) or events (a history)")
    wanted, k = tree.get("wanted_action"), tree.get("k")
    if wanted is not None:
        wanted = ACTION_NAMES.index(wanted) if wanted in ACTION_NAMES else wanted
        wanted = _whole(wanted, "wanted_action", 0, NUM_ACTION_TYPES - 1)
    k = default_k if k is None else _whole(k, "k", 1, MOST_ANSWERS)
    return Request(None if user is None else str(user), _events(tree.get("events")), _features(tree.get("features"), schema), wanted, k)


def _kind_of(value: object) -> str:
    names = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return f"{names[type(value)]} ({json.dumps(value)[:40]})"


def _whole(value: object, where: str, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise UserError(f"{where}: expected a whole number from {least} to {most}, found {_kind_of(value)}")
    return value


def _events(rows: object) -> list[tuple[int | str, int, int]] | None:
    """Events in the order of their times. A missing time is that of the event ahead, or 0, as for infer()'s files."""
    if rows is None:
        return None
    if not isinstance(rows, list):
        raise UserError(f"events: expected a list, oldest first, found {_kind_of(rows)}")
    found, last = [], 0
    for number, row in enumerate(rows, 1):
        where = f"events: number {number}"
        parts = row if isinstance(row, list) else [row]
        if not 1 <= len(parts) <= 3 or type(parts[0]) not in (int, str):
            raise UserError(f"{where}: expected [creative id, action type, seconds] or a creative id, found {_kind_of(row)}")
        creative, action, moment = (*parts, None, None)[:3]
        action = 0 if action is None else _whole(action, f"{where}, action type", 0, NUM_ACTION_TYPES - 1)
        last = last if moment is None else _whole(moment, f"{where}, seconds", 0, LAST_SECOND)
        found.append((creative, action, last))
    return sorted(found, key=lambda event: event[2])


def _features(tree: object, schema: Schema) -> dict[str, list[int]] | None:
    """{feature: values}; a single value as a list of one."""
    if tree is None:
        return None
    if not isinstance(tree, dict):
        raise UserError(f"features: expected {{feature: value or list of values}}, found {_kind_of(tree)}")
    known = {f.id: f.kind for kind in ("single", "multi") for f in schema.select("user", kind)}
    found = {}
    for name, value in tree.items():
        if name not in known:
            raise UserError(f"features: {name[:40]!r} is no feature of users here; expected some of {', '.join(known) or 'none'}")
        values = value if isinstance(value, list) else [value]
        if known[name] == "single" and len(values) != 1:
            raise UserError(f"features: {name}: expected one value, found {_kind_of(value)}")
        found[name] = [_whole(each, f"features: {name}", 0, LARGEST) for each in values]
    return found


class Answerer:
    """Answers requests one by one; the candidates are encoded once.

    A user of the data is known by the raw id: what a request leaves out, events or features, is what the data say.
    """

    def __init__(self, served: Served) -> None:
        self.served, self.store = served, served.store
        self.prepared = served.ranker.prepare()
        self._users: dict[str, int] | None = None

    def answer(self, request: Request) -> dict:
        """{"user", "items": creative ids, best first, "scores"}, and "unknown_items": how many events were of items that nobody knows.

        UserError where the request names a user that the data do not have, and no events.
        """
        known = self._place_of(request.user)
        if request.events is None and known is None:
            raise UserError(f"user {request.user[:40]!r} is not in the data; give events (a history) too")
        view, unknown = self._view(request, known)
        split = predict_split(view)
        wanted = None if request.wanted is None else np.array([request.wanted])
        ranker = ranker_for(self.served.ranker, view)
        ranking = ranker.rank(split, request.k, remove_seen=True, fill=True, wanted=wanted, prepared=self.prepared)
        (items,) = creative_ids(self.store, ranking.topk_ids)
        scores = [round(score, 6) for score in ranking.topk_scores[0].tolist()]
        answer = {"user": request.user, "items": items, "scores": scores[: len(items)]}
        return answer | {"unknown_items": unknown} if unknown else answer

    def _place_of(self, user: str | None) -> int | None:
        if user is None:
            return None
        if self._users is None:
            names = self.store.raw_user_ids.take(range(self.store.num_users))
            self._users = {name: place for place, name in enumerate(names)}
        return self._users.get(user)

    def _view(self, request: Request, known: int | None) -> tuple[OtherUsers, int]:
        """A store of the one user, and how many of the events were left out, as their item is unknown."""
        store, schema, unknown = self.store, self.store.schema, 0
        if request.events is None:
            part = slice(int(store.user_offsets[known]), int(store.user_offsets[known + 1]))
            events = tuple(np.asarray(array[part]) for array in (store.item_ids, store.action_types, store.timestamps))
        else:
            creatives, actions, times = (list(column) for column in zip(*request.events)) if request.events else ([], [], [])
            items = store.item_ids_of(creatives)
            if not schema.has_time:
                times = list(range(len(items)))
            unknown = int((items == 0).sum())
            events = tuple(np.array(column, dtype=np.int64)[items > 0] for column in (items, actions, times))
        single_names = [f.id for f in schema.select("user", "single")]
        multi_names = [f.id for f in schema.select("user", "multi")]
        if request.features is None and known is not None:
            single = np.asarray(store.user_single[known : known + 1])
            lists = {name: store.user_multi[name].gather(np.array([known]))[0] for name in multi_names}
        else:
            given = request.features or {}
            single = np.array([[given.get(name, [0])[0] for name in single_names]], dtype=np.int32).reshape(1, -1)
            lists = {name: np.array([v for v in given.get(name, []) if v], dtype=np.int32) for name in multi_names}
        multi = {name: RaggedColumn.from_counts(np.array([len(values)]), values) for name, values in lists.items()}
        user_ids = np.zeros(1, np.int64) if known is None else np.asarray(store.user_ids[known : known + 1])
        offsets = np.array([0, len(events[0])], dtype=np.int64)
        return OtherUsers(store, events=events, offsets=offsets, user_ids=user_ids, single=single, multi=multi), unknown


def serve_lines(answerer: Answerer, lines: Iterable[bytes], out: TextIO, default_k: int) -> tuple[int, int]:
    """Answer each line by a line, at once and in order: what `Answerer.answer` gives, or {"error", "line"}; (lines, errors)."""
    count = errors = 0
    for count, line in enumerate(lines, 1):
        try:
            answer = answerer.answer(parse_request(line, answerer.store.schema, default_k))
        except UserError as error:
            errors += 1
            answer = {"error": str(error), "line": count}
        out.write(json.dumps(answer) + "\n")
        out.flush()
    return count, errors
