"""Writes a model for use without this repository: item vectors and the user encoder as safetensors, the encoder by torch.export, a card.

Must not rank, nor answer anybody: serve.py does. safetensors is needed here alone.

Legend: B users, T events of the longest user, S values of the user with the most, M items, C candidates, D width.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import kernels
from atomic import making_folder, write_text_atomic
from checkpoint import plain_json
from columns import RaggedColumn
from ensemble import Member
from errors import RunError, UserError
from dataset import Split
from evaluate import ITEM_CHUNK, Ranker, move, wanted_actions
from features import USER_ID, FeatureColumns
from layers import Packing, Queries
from model import Recommender
from schema import ACTION_NAMES, ANY_ACTION
from serve import OtherUsers, Served, creative_ids
from transitions import DECAY, RECENT, SHARPNESS

CARD, ITEMS, ENCODER, PROGRAM, CREATIVES = (
    "card.json", "item_vectors.safetensors", "user_encoder.safetensors", "user_encoder.pt2", "creative_ids.json")  # fmt: skip
FORMAT_VERSION = 1  # of card.json and what it names
NOBODY = Split(*np.array([[0], [0], [0], [-1]]))  # one sample without a target


class UserEncoder(nn.Module):
    """A user's features and events to the query vector: the sequence side of a Recommender, with padded rows in place of packed tokens.

    user_table: (rows, D) what each value of a user's features adds to the user token; row 0 is zeros.
    """

    # The model's own code on the same parts, so that the two cannot drift apart.
    _encode_tokens, _encode_vectors, _normalised = Recommender._encode_tokens, Recommender._encode_vectors, Recommender._normalised

    def __init__(self, model: Recommender, user_table: Tensor) -> None:
        super().__init__()
        self.config, self.action_head = model.config, None  # the head serves the loss alone
        self.user_token = model.user_token
        self.register_buffer("user_table", user_table)
        self.actions, self.positions, self.time = model.actions, model.positions, model.time
        self.embedding_norm, self.dropout = model.embedding_norm, model.dropout
        self.backbone, self.conditioning = model.backbone, model.conditioning

    def forward(
        self,
        user_rows: Tensor,
        user_weights: Tensor,
        history: Tensor,
        action_types: Tensor,
        timestamps: Tensor,
        lengths: Tensor,
        wanted: Tensor,
    ) -> Tensor:
        """Query vectors (B, D), float32.

        user_rows: (B, S) int64 rows of user_table; user_weights: (B, S) float32, 0 in the padding. history: (B, T, D) float32 vectors of
        the events' items, oldest first; action_types, timestamps: (B, T) int64, anything in the padding. lengths: (B,) int64 events.
        wanted: (B,) int64 action, ANY_ACTION = none in particular; without effect in a model without action_conditioning.
        """
        batch, tokens = history.shape[0], history.shape[1] + 1
        user = self.user_token + (self.user_table[user_rows] * user_weights[..., None]).sum(1)  # (B, D)
        x = torch.cat((user[:, None], history), dim=1)  # (B, T + 1, D)
        place = torch.arange(tokens, device=x.device).expand(batch, tokens)
        valid = place[:, 1:] <= lengths[:, None]
        front = (0, 0, 1, 0)  # the user token, which has neither action nor time
        actions = nn.functional.pad(torch.where(valid, action_types + 1, 0)[..., None], front)[..., 0]
        times = nn.functional.pad(torch.where(valid, timestamps, 0)[..., None], front)[..., 0]
        # Padding counts as tokens: it comes after the others, so no causal layer lets it act on them.
        packing = Packing(batch, tokens, torch.arange(batch * tokens, device=x.device), place.reshape(-1))
        user = torch.arange(batch, device=x.device)
        queries = Queries(user * tokens + lengths, Packing(batch, 1, user, lengths))
        return self._encode_tokens(x.reshape(batch * tokens, -1), actions.reshape(-1), times.reshape(-1), packing, wanted, queries).query


def export(served: Served, out: Path) -> Path:
    """Write the model of `served` to the new folder `out`; returns it.

    UserError for an ensemble, a folder in use, or without safetensors.
    """
    save_file = _safetensors()
    if len(served.ensemble.members) > 1:
        raise UserError(f"{served.ensemble.path}: an ensemble; export its models one by one (member0, member1 ... in it).")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty folder. Name a new one.")
    member, ranker = served.ensemble.members[0], served.ranker
    model = ranker.model.eval().requires_grad_(False)
    items = item_tensors(served)
    table, fields = user_table(model, ranker.columns, ranker.device)
    kernels.compiled(wait=True)  # its thread imports numba, which must not meet torch.export's stand-ins for the math module
    encoder = UserEncoder(model.cpu(), table.cpu()).eval()  # a graph made on a GPU would ask for one
    out.parent.mkdir(parents=True, exist_ok=True)
    with making_folder(out) as unfinished:
        tensors = {ITEMS: items, ENCODER: dict(encoder.state_dict())}
        for name, content in tensors.items():
            save_file({key: value.cpu().contiguous() for key, value in content.items()}, os.fspath(unfinished / name))
            (unfinished / name).chmod(unfinished.stat().st_mode & 0o666)  # safetensors makes files for the owner alone
        torch.export.save(program(encoder), os.fspath(unfinished / PROGRAM))
        names = [None] + [row[0] if row else None for row in creative_ids(served.store, np.arange(1, served.store.num_items + 1)[:, None])]
        (unfinished / CREATIVES).write_text(json.dumps(names), encoding="utf-8")
        write_text_atomic(unfinished / CARD, json.dumps(card(served, member, fields, tensors, unfinished), indent=1) + "\n")
    return out


def _safetensors():
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("--export writes safetensors files, and that package is not installed.\npip install safetensors") from None
    return save_file


@torch.inference_mode()
def item_tensors(served: Served) -> dict[str, Tensor]:
    """history (M + 1, D): what each item is in a sequence; candidate (C, D), candidate_ids (C,), score_bias (C,): what is ranked.

    With transition_weight also the counts, transitions.*.
    """
    ranker, store = served.ranker, served.store
    history = torch.empty(store.num_items + 1, ranker.model.config.hidden_units)
    for begin in range(0, len(history), ITEM_CHUNK):
        ids = np.arange(begin, min(begin + ITEM_CHUNK, len(history)))
        history[begin : begin + len(ids)] = ranker.model.encode_items(move(ranker.columns.items(ids), ranker.device)).history
    candidate = ranker.encode_candidates()
    vectors = ranker.with_penalties(candidate)
    bias = vectors[:, -1] if ranker.cold_penalty else torch.zeros(len(vectors))
    ids = torch.from_numpy(ranker.candidate_ids.astype(np.int64))
    tensors = {"history": history, "candidate": candidate, "candidate_ids": ids, "score_bias": bias}
    return tensors | (ranker.transitions.to_state() if ranker.transitions is not None else {})


@torch.inference_mode()
def user_table(model: Recommender, columns: FeatureColumns, device: torch.device) -> tuple[Tensor, list[dict]]:
    """What each value of a user's features adds to the user token (rows, D), and the rows of each feature.

    Made by the model's own code, from users who have one value each: so widths, projections and hashing are no matter here.
    """
    schema = columns.store.schema
    singles, multis = ([f.id for f in schema.select("user", kind)] for kind in ("single", "multi"))
    parts, fields, offset = [torch.zeros(1, model.config.hidden_units, device=device)], [], 0
    for name, kind, values in dict.fromkeys((f.name, f.kind, f.values) for f in columns.layout.side("user")):
        for begin in range(1, values + 1, ITEM_CHUNK):
            numbers = np.arange(begin, min(begin + ITEM_CHUNK, values + 1))
            one_each, none = np.ones(len(numbers), np.int64), np.zeros(len(numbers), np.int64)
            single = np.zeros((len(numbers), len(singles)), dtype=np.int32)
            if name in singles:
                single[:, singles.index(name)] = numbers
            multi = {other: RaggedColumn.from_counts(none, np.zeros(0, np.int32)) for other in multis}
            if name in multis:
                multi[name] = RaggedColumn.from_counts(one_each, numbers.astype(np.int32))
            user_ids = numbers if name == USER_ID else none
            nothing = (np.zeros(0, np.int64),) * 3
            offsets = np.zeros(len(numbers) + 1, np.int64)
            view = OtherUsers(columns.store, events=nothing, offsets=offsets, user_ids=user_ids, single=single, multi=multi)
            inputs = move(FeatureColumns(view, columns.layout, ()).users(np.arange(len(numbers))), device)
            parts.append(model.user_projection(model.table.lookup("user", inputs), inputs))
        fields.append({"feature": name, "kind": kind, "offset": offset, "values": values})
        offset += values
    return torch.cat(parts), fields


def program(encoder: UserEncoder) -> torch.export.ExportedProgram:
    """The encoder as a graph for any number of users, and any number of events up to the model's. RunError where torch has none."""
    users, events, values, width = 3, 2, 2, encoder.config.hidden_units  # sizes of 0 and 1 would be taken for constants
    whole = torch.zeros(users, events, dtype=torch.int64)
    features = torch.zeros(users, values, dtype=torch.int64), torch.zeros(users, values)
    one_each = torch.full((users,), events), torch.full((users,), ANY_ACTION)
    arguments = (*features, torch.zeros(users, events, width), whole, whole.clone(), *one_each)
    b, s = torch.export.Dim("users", min=1), torch.export.Dim("values", min=1)
    t = torch.export.Dim("events", min=1, max=encoder.config.max_seq_length)
    shapes = ({0: b, 1: s}, {0: b, 1: s}, {0: b, 1: t}, {0: b, 1: t}, {0: b, 1: t}, {0: b}, {0: b})
    try:
        return torch.export.export(encoder, arguments, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # whatever a backbone of one's own makes torch raise
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"model.backbone {encoder.config.backbone}: torch.export cannot make a graph of it for any number of events.\n"
            f"({type(error).__name__}: {reason})\nServe this model by --stdin or infer()."
        ) from error


INPUTS = (
    ("user_rows", "(users, values) int64", "rows of user_table: offset + value for each value of a user's features; 0 in the padding"),
    ("user_weights", "(users, values) float32", "1; for a multi-valued feature 1 / number of its values; 0 in the padding"),
    ("history", "(users, events, width) float32", "rows of history, oldest event first, the newest max_seq_length; any in the padding"),
    ("action_types", "(users, events) int64", "of the events"),
    ("timestamps", "(users, events) int64", "of the events, seconds since 1970; without has_time 0, 1, 2 ..."),
    ("lengths", "(users,) int64", "events of each user; 0 is allowed (give one event of padding then)"),
    ("wanted", "(users,) int64", f"action type that is asked for; {ANY_ACTION} = none in particular"),
)


def card(served: Served, member: Member, fields: list[dict], tensors: dict[str, dict[str, Tensor]], folder: Path) -> dict:
    """card.json: where the model comes from, what it was trained on, how well it did, and how the files are used."""
    meta, store, ranker = member.meta, served.store, served.ranker
    config = member.config
    tree = {
        "format_version": FORMAT_VERSION,
        "checkpoint": {
            "path": member.path, "step": meta["step"], "epoch": meta["epoch"], "metrics": meta["metrics"],
            "sha256": meta["files"]["model.pt"]["sha256"],
        },
        "data": {
            "path": store.data_path, "kind": store.kind, "fingerprint": store.manifest["fingerprint"], "trained_on": meta["store"],
            "known_items": meta["item_ids"], "num_items": store.num_items, "num_known_items": store.num_known_items,
            "num_candidates": len(ranker.candidate_ids), "training_users": meta["num_users"], "training_events": meta["num_events"],
            "has_time": store.schema.has_time,
        },
        "encoder": {
            "inputs": [{"name": name, "shape": shape, "what": what} for name, shape, what in INPUTS],
            "output": "(users, width) float32: the query vectors",
            "width": config.model.hidden_units,
            "max_seq_length": config.model.max_seq_length,
            "user_features": fields,
            "action_types": dict(enumerate(ACTION_NAMES)),
            "wanted_action": int(wanted_actions(config.eval.wanted_action, store, NOBODY)[0]),
        },
        "ranking": {
            "score": f"query . candidate + score_bias{' + addition' if ranker.transitions is not None else ''}; "
                     "the items of a user's events left out; ties go to the lower id",
            "temperature": member.temperature,
            "similarity": config.model.similarity,
            **({"transitions": transitions_card(ranker)} if ranker.transitions is not None else {}),
        },
        "settings": config.to_dict(),
        "files": {
            path.name: {"sha256": _sha256(path), "size": path.stat().st_size}
            | ({"tensors": {key: [str(v.dtype), list(v.shape)] for key, v in tensors[path.name].items()}} if path.name in tensors else {})
            for path in sorted(folder.iterdir())
        },
        "torch": torch.__version__,
    }  # fmt: skip
    return plain_json(tree)


def transitions_card(ranker: Ranker) -> dict:
    """How the addition to a user's scores follows from the tensors transitions.*."""
    return {
        "addition": "scale * log(1 + sharpness * a[j]); a[j]: sum over the user's last `recent` events h, p = 0 the newest, of decay^p "
                    "affinity[n] for n from offsets[h] to offsets[h + 1] - 1 with items[n] = j",
        "scale": ranker.temperature * ranker.transition_weight, "sharpness": SHARPNESS, "recent": RECENT, "decay": DECAY,
    }  # fmt: skip


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
