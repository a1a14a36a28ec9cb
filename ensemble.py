"""Several checkpoints as one: their mean as a checkpoint, and folders of models whose scores are added up in one exact ranking.

Must not choose splits, parse flags or train.

How scores are combined. Members may differ in settings, width and loss; what they share is the items' numbering. The score of user u and
item i is a sum over members m of f_m(u) q_m(u) . v_m(i), which is one inner product of concatenated vectors, with the factors in the
query: retrieval.py ranks them exactly, seen items removed, as it does one model's. So f may depend on the user, not on the item:
  "softmax": f_m = weight_m / temperature_m, the mean of the log-softmaxes. Their normalisers depend on the user alone and move no rank, so
    no sum over items is needed. A member that separates a user's items more sharply counts more for that user.
  "zscore": f_m(u) = weight_m / (standard deviation of m's scores of u over the candidates). Every member counts the same for every user,
    whatever its temperature: for members of different losses. The means, too, depend on the user alone.
Both are relative to the first member's factor, so an ensemble of one is that model, bit for bit.

Legend: B users, C candidates, D width of a member.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from averaging import mean_state
from atomic import making_folder, write_text_atomic
from checkpoint import META, MODEL, Checkpoint, fits, link, link_or_copy, load_checkpoint, save_checkpoint
from config import Config
from dataset import Split
from errors import UserError
from evaluate import ITEM_CHUNK, Ranker, trained_items
from features import FeatureColumns, TableLayout
from model import TEMPERATURES, Recommender, heads_of
from schema import Schema
from transitions import Transitions, from_state, without

ENSEMBLE = "ensemble.json"
FORMAT_VERSION = 1
SCORES = ("softmax", "zscore")


class Member:
    """One model: its checkpoint, and what meta.json says of it. weight: of its scores in an ensemble."""

    def __init__(self, checkpoint: Checkpoint, weight: float = 1.0) -> None:
        meta, where = checkpoint.meta, f"{checkpoint.path}/{META}"
        self.checkpoint, self.meta, self.path, self.weight = checkpoint, meta, checkpoint.path, weight
        with fits(checkpoint.path / META):
            self.config = Config.from_dict(meta["config"], where)
            self.layout = TableLayout.from_list(meta["layout"])
            self.embeddings = tuple(map(str, meta["embeddings"]))
            self.schema = Schema.from_dict(meta["schema"], where)
            self.data = int(meta["num_items"]), str(meta["item_ids"])  # what infer.py compares with the data to predict

    @property
    def temperature(self) -> float:
        learnt = self.checkpoint.model_state.get("log_temperature")
        if learnt is not None:
            return float(learnt.clamp(*TEMPERATURES).exp())
        return self.config.loss.temperature if self.config.loss.name != "bce" else 1.0

    @property
    def trained(self) -> np.ndarray | None:
        """(items + 1,) bool, what the model was trained on; None where it does not note it (without id_dropout)."""
        return trained_items(self.checkpoint.model_state)

    @cached_property
    def transitions(self) -> Transitions | None:
        """The counts that a model with transition_weight is ranked with; UserError where they are damaged."""
        with fits(self.path):
            return from_state(self.checkpoint.model_state)

    def model(self, device: torch.device) -> Recommender:
        """The model with the checkpoint's weights."""
        with fits(self.path):
            widths = {name: self.schema[name].width for name in self.embeddings}
            model = Recommender(self.config.model, self.layout, widths, self.schema.has_time, **heads_of(self.config.loss))
            model.load_state_dict(without(self.checkpoint.model_state))
        return model.to(device)

    def ranker(self, store, candidate_ids: np.ndarray, device: torch.device, **options) -> Ranker:
        """options: Ranker's batch_size, num_workers, prefetch_batches, cold_penalty."""
        columns = FeatureColumns(store, self.layout, self.embeddings, self.trained)
        counts, own = self.transitions, self.config.eval
        options |= {"temperature": self.temperature, "transitions": counts, "wanted_action": own.wanted_action}
        options["transition_weight"] = 0.0 if counts is None else own.transition_weight
        return Ranker(self.model(device), columns, candidate_ids, device=device, **options)


class Ensemble(NamedTuple):
    """Models whose scores are added up; a plain checkpoint is one of one member. path: its folder."""

    path: Path
    members: tuple[Member, ...]
    scores: str = SCORES[0]

    def ranker(self, rankers: list[Ranker]) -> Ranker:
        """One for all, of the members' own."""
        return rankers[0] if len(rankers) == 1 else EnsembleRanker(rankers, [member.weight for member in self.members], self.scores)


class EnsembleRanker(Ranker):
    """Ranks by the members' combined scores; queries and candidates are their vectors side by side, (B, sum D) and (C, sum D).

    rankers: of the same candidates, samples and batch size. weights: above 0, a member each. The loss is that of the combined logits.
    """

    def __init__(self, rankers: Sequence[Ranker], weights: Sequence[float], scores: str) -> None:
        first = rankers[0]
        shares = [weight / sum(weights) for weight in weights]
        super().__init__(
            first.model,
            first.columns,
            first.candidate_ids,
            device=first.device,
            batch_size=first.batch_size,
            num_workers=first.prefetch.num_workers,
            prefetch_batches=first.prefetch.depth,
            temperature=first.temperature / shares[0],
            cold_penalty=first.cold_penalty / shares[0],
            transitions=first.transitions,
            transition_weight=first.transition_weight,
        )
        self.rankers, self.scores = rankers, scores
        self._factors = [share / shares[0] for share in shares]
        if scores == "softmax":
            self._factors = [factor * first.temperature / ranker.temperature for factor, ranker in zip(self._factors, rankers)]
        self._covariances: list[Tensor] = []

    @torch.inference_mode()
    def encode_candidates(self) -> Tensor:
        parts = [ranker.encode_candidates() for ranker in self.rankers]
        self._covariances = [_covariance(part) for part in parts] if self.scores == "zscore" else []
        return torch.cat(parts, dim=1)

    @torch.inference_mode()
    def encode_users(self, split: Split, wanted: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, Tensor]]:
        """As Ranker's, after `encode_candidates`. What `wanted` leaves open each member decides by its own wanted_action."""
        for found in zip(*(ranker.encode_users(split, wanted) for ranker in self.rankers), strict=True):
            queries = [query for _, query in found]
            factors: list = list(self._factors)
            if self.scores == "zscore":
                spreads = [_spread(query, covariance) for query, covariance in zip(queries, self._covariances)]  # (B, 1) each
                factors = [factor * spreads[0] / spread for factor, spread in zip(factors, spreads)]
            yield found[0][0], torch.cat([query * factor for query, factor in zip(queries, factors)], dim=1)


def _covariance(candidates: Tensor) -> Tensor:
    """(D, D) float64 of candidates (C, D): with it a user's standard deviation over all candidates costs D^2, not C D."""
    chunks = candidates.split(ITEM_CHUNK)
    mean = sum(chunk.double().sum(0) for chunk in chunks) / len(candidates)
    return sum((chunk.double() - mean).T @ (chunk.double() - mean) for chunk in chunks) / len(candidates)


def _spread(query: Tensor, covariance: Tensor) -> Tensor:
    """(B, 1): standard deviation of the scores of queries (B, D) over the candidates."""
    variance = ((query.double() @ covariance) * query.double()).sum(1, keepdim=True)
    return variance.clamp_min(torch.finfo(torch.float32).tiny).sqrt().float()


# ---- folders ------------------------------------------------------------------------------------------------------------


def read_ensemble(path: Path) -> Ensemble:
    """What `path` names: the folder of an ensemble (or its ensemble.json), or a checkpoint, its model.pt or a link to it.

    UserError where something is missing, damaged, or does not fit together.
    """
    folder = path.parent if path.name == ENSEMBLE else path
    if not (folder / ENSEMBLE).is_file():
        member = Member(load_checkpoint(path, with_trainer=False))
        return Ensemble(member.path, (member,))
    try:
        tree = json.loads((folder / ENSEMBLE).read_text(encoding="utf-8"))
        rows = [(f"member{int(row['member'])}", float(row["weight"])) for row in tree["members"]]
        if tree["format_version"] != FORMAT_VERSION or tree["scores"] not in SCORES or not rows or min(weight for _, weight in rows) <= 0:
            raise ValueError("unknown version or scores, no members, or a weight that is not above 0")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{folder / ENSEMBLE}: not what combine.py writes ({type(error).__name__}: {error}). Make the folder again."
        ) from None
    members = tuple(Member(load_checkpoint(folder / name, with_trainer=False), weight) for name, weight in rows)
    _check_one_index(members)
    return Ensemble(folder, members, tree["scores"])


def write_ensemble(out: Path, paths: Sequence[Path], weights: Sequence[float] = (), scores: str = SCORES[0]) -> Path:
    """Make the folder `out` of an ensemble of checkpoints: their model.pt (hard links where possible), meta.json, and ensemble.json.

    weights: above 0, a checkpoint each; none = all the same. Returns out. UserError where they do not fit together, or out is in use.
    """
    weights = list(weights) or [1.0] * len(paths)
    if len(weights) != len(paths) or min(weights) <= 0:
        raise UserError(f"weights {weights}: expected {len(paths)} numbers above 0, one a checkpoint.")
    members = [Member(load_checkpoint(path, with_trainer=False), weight) for path, weight in zip(paths, weights)]
    _check_one_index(members)
    _refuse_used(out)
    with making_folder(out) as unfinished:
        for number, member in enumerate(members):
            folder = unfinished / f"member{number}"
            folder.mkdir()
            link_or_copy(member.path / MODEL, folder / MODEL)
            shutil.copyfile(member.path / META, folder / META)
        rows = [{"member": number, "weight": member.weight, "from": str(member.path)} for number, member in enumerate(members)]
        tree = {"format_version": FORMAT_VERSION, "scores": scores, "members": rows}
        write_text_atomic(unfinished / ENSEMBLE, json.dumps(tree, indent=1) + "\n")
    return out


def average_checkpoints(out: Path, paths: Sequence[Path]) -> Path:
    """Write the mean of the weights of several checkpoints of one model as a checkpoint in the folder `out`; returns the checkpoint's path.

    It can be evaluated, used for inference and started from, not resumed: it has no optimiser's state. Its step is the latest one's.
    UserError names what differs: settings of the model, data, names or shapes of tensors.
    """
    members = [Member(load_checkpoint(path, with_trainer=False)) for path in paths]
    _check_one_index(members)
    first, names = members[0], [str(member.path) for member in members]
    different = []
    for member in members[1:]:
        there, here = (m.config.to_dict()["model"] for m in (first, member))
        different += [f"{key}: {there[key]} in {first.path}, {here[key]} in {member.path}" for key in there if there[key] != here[key]]
        for what in ("embeddings", "layout"):
            if getattr(first, what) != getattr(member, what):
                different.append(f"{what}: not the same in {first.path} and {member.path}")
    try:
        counts = first.transitions  # of one split, so the same in all
        state = {} if different else mean_state([without(member.checkpoint.model_state) for member in members], names)
        state |= counts.to_state() if counts is not None else {}
    except ValueError as error:
        different.append(str(error))
    if different:
        raise UserError(f"checkpoints of different models have no mean: {'; '.join(different)}. Combine them as an ensemble.")
    _refuse_used(out)
    latest = max((member.meta for member in members), key=lambda meta: meta["step"])
    meta = latest | {"metrics": {}, "averaged": names}
    path = save_checkpoint(out, step=latest["step"], valid_loss=None, model_state=state, trainer_state={}, meta=meta)
    link(out, "best_model.pt", path)
    return path


def _refuse_used(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty folder. Name a new one.")
    out.parent.mkdir(parents=True, exist_ok=True)


def _check_one_index(members: Sequence[Member]) -> None:
    """UserError unless all members number the same items, and know the same features."""
    first = members[0]
    for member in members[1:]:
        if (member.meta["num_items"], member.meta["item_ids"]) != (first.meta["num_items"], first.meta["item_ids"]):
            raise UserError(
                f"{member.path}: trained on {member.meta['num_items']:,} items, {first.path} on {first.meta['num_items']:,}, "
                "or on others: the same number would mean other items. Give checkpoints of one data set."
            )
        weights = [one.config.eval.transition_weight for one in (member, first)]
        if weights[0] != weights[1] or (member.transitions is None) != (first.transitions is None):
            raise UserError(
                f"{member.path}: ranked with transition_weight {weights[0]}, {first.path} with {weights[1]}, or one has no counts. "
                "Give checkpoints that are ranked alike."
            )
        if member.schema != first.schema:
            raise UserError(f"{member.path}: its data had other features than those of {first.path}. Give checkpoints of one data set.")
