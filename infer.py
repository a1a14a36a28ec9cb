"""The competition's inference: a checkpoint (or an ensemble of several) and EVAL_DATA_PATH in, ten creative ids for every user out.

Needs the checkpoint folder and EVAL_DATA_PATH, nothing else: no config.yaml, no training data, no flags.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from candidates import normalise_id
from dataset import predict_split
from ensemble import ENSEMBLE, Ensemble, read_ensemble
from errors import ArgumentParser, UserError, run_cli
from evaluate import Ranker, Ranking, wanted_actions, without_cold
from features import FeatureColumns, known_items_digest
from schema import ACTION_NAMES, NUM_ACTION_TYPES, Schema
from store import open_store

ANSWERS = 10  # creative ids a user
ACTION_FILE = "user_action_type.json"


def infer() -> tuple[list[list[int | str]], list[str]]:
    """Rank EVAL_DATA_PATH's candidates for its users with the checkpoint in MODEL_OUTPUT_PATH.

    Returns (top10s, user_list): one list of 10 creative ids a user, and the raw user ids in the same order. Writes the organisers' files
    (embedding.fbin, query.fbin, id.u64bin, retrive_id2creative_id.json) to EVAL_RESULT_PATH where that is set.
    Raises UserError where a variable, a file or a fit between checkpoint and data is missing.
    """
    model_path, data_path = _folder("MODEL_OUTPUT_PATH", "the checkpoint's folder"), _folder("EVAL_DATA_PATH", "the data to predict")
    result_path = os.environ.get("EVAL_RESULT_PATH") or ""
    ensemble = read_ensemble(_checkpoint_in(model_path))
    config = ensemble.members[0].config
    embeddings = tuple(dict.fromkeys(name for member in ensemble.members for name in member.embeddings))
    cache_path = os.environ.get("USER_CACHE_PATH") or (os.path.join(result_path, "cache") if result_path else "./cache")
    store = open_store(data_path, Path(cache_path), kind="predict", embeddings=embeddings, max_bad_lines=config.data.max_bad_lines)
    for member in ensemble.members:
        _check_fit(store, member.meta, member.schema, member.path, data_path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = config.eval.cold_candidates
    options = {"batch_size": config.eval.eval_batch_size, "num_workers": max(1, config.data.num_workers)}
    options["cold_penalty"] = config.eval.cold_penalty if policy == "penalty" else 0.0
    candidates = np.asarray(store.candidate_item_ids)
    if policy == "drop":
        first = ensemble.members[0]
        candidates = without_cold(candidates, FeatureColumns(store, first.layout, (), first.trained))
    ranker = ensemble.ranker([member.ranker(store, candidates, device, **options) for member in ensemble.members])
    users = store.raw_user_ids.take(np.arange(store.num_users))
    ranking = ranker.rank(
        predict_split(store),
        ANSWERS,
        remove_seen=True,
        fill=True,
        keep_queries=bool(result_path),
        wanted=_wanted(data_path / ACTION_FILE, store, users, ensemble),
    )
    if result_path:
        write_baseline_files(Path(result_path), store, ranker, ranking)
    return creative_ids(store, ranking.topk_ids), users


def _wanted(path: Path, store, users: list[str], ensemble: Ensemble) -> np.ndarray:
    """(S,) int64 action that each user's query asks for: the file's, where there is one that names the user, else eval.wanted_action."""
    default = ensemble.members[0].config.eval.wanted_action
    wanted = wanted_actions(default, store, predict_split(store))  # there is no target: "target" is any
    if not path.is_file():
        return wanted
    if all(member.config.model.action_conditioning == "none" for member in ensemble.members):
        print(f"{path.name}: not used; the model was trained without action_conditioning")
        return wanted
    given = read_action_types(path)
    found = np.array([given.get(user, -1) for user in users], dtype=np.int64)
    others = "any" if default == "target" else default
    print(f"{path.name}: names the wanted action of {int((found >= 0).sum()):,} of {len(users):,} users; {others} for the others")
    return np.where(found >= 0, found, wanted)


def read_action_types(path: Path) -> dict[str, int]:
    """user_action_type.json: {raw user id: action type of the event to predict}. UserError where it is anything else."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}. Mend it or remove it.") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected {{user id: action type}}, found {type(tree).__name__}. Mend it or remove it.")
    for user, action in tree.items():
        if type(action) is not int or not 0 <= action < NUM_ACTION_TYPES:
            expected = ", ".join(f"{code} ({name})" for code, name in enumerate(ACTION_NAMES))
            raise UserError(f"{path}: the action type of user {user[:40]!r} is {str(action)[:40]!r}; expected {expected}.")
    return tree


def _folder(variable: str, what: str) -> Path:
    value = os.environ.get(variable) or ""
    if not value:
        raise UserError(
            f"{variable} is not set: it names {what}.\n"
            "For example: MODEL_OUTPUT_PATH=checkpoints/RUN/best_model.pt EVAL_DATA_PATH=data-eval python infer.py"
        )
    if not Path(value).exists():
        raise UserError(f"{variable}={value}: no such file or folder; it names {what}.")
    return Path(value)


def _checkpoint_in(path: Path) -> Path:
    """The platform may name the folder of a checkpoint or an ensemble, a file in it, or a folder that holds one checkpoint."""
    if path.is_file() or (path / "meta.json").exists() or (path / ENSEMBLE).exists():
        return path
    inside = sorted(folder for folder in path.glob("global_step*") if folder.is_dir())
    if len(inside) == 1:
        return inside[0]
    best = path / "best_model.pt"
    if best.exists():
        return best
    raise UserError(
        f"MODEL_OUTPUT_PATH={path}: expected a checkpoint folder (model.pt, meta.json), found {len(inside)} folders global_step*.\n"
        "Name one of them."
    )


def _check_fit(store, meta: dict, schema: Schema, checkpoint_path: Path, data_path: Path) -> None:
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
    if not len(store.candidate_item_ids):
        raise UserError(f"{data_path}: no candidates (predict_set.jsonl or candidate/) to rank. Add them to EVAL_DATA_PATH.")
    if store.schema.features != schema.features:
        raise UserError(
            f"{data_path}: its schema differs from the one the checkpoint {checkpoint_path} was trained with.\n"
            "Give the schema.json of the training data."
        )


def creative_ids(store, item_ids: np.ndarray) -> list[list[int | str]]:
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


def write_baseline_files(folder: Path, store, ranker: Ranker, ranking: Ranking) -> None:
    """The organisers' intermediate files, for tools that read them: vectors (.fbin), retrieval ids (.u64bin), their creative ids (JSON)."""
    folder.mkdir(parents=True, exist_ok=True)
    ranked = np.isin(store.candidate_item_ids, ranker.candidate_ids)  # with cold_candidates drop not all
    items = np.asarray(store.candidate_item_ids)[ranked]
    place = np.searchsorted(ranker.candidate_ids, items)
    vectors = ranker.with_penalties(ranking.candidates).cpu().numpy()
    # A column of ones meets the penalties, so that the files' inner products are the scores that were ranked.
    queries = np.pad(ranking.queries, ((0, 0), (0, vectors.shape[1] - ranking.queries.shape[1])), constant_values=1.0)
    _write_matrix(folder / "embedding.fbin", vectors[place])
    _write_matrix(folder / "query.fbin", queries)
    retrieval = np.asarray(store.retrieval_ids, dtype=np.uint64)[ranked]
    _write_matrix(folder / "id.u64bin", retrieval[:, None])
    creatives = creative_ids(store, items[:, None])
    text = json.dumps({str(r): c[0] for r, c in zip(retrieval.tolist(), creatives)})
    (folder / "retrive_id2creative_id.json").write_text(text, encoding="utf-8")


def _write_matrix(path: Path, matrix: np.ndarray) -> None:
    with open(path, "wb") as file:
        file.write(np.array(matrix.shape, dtype=np.uint32).tobytes())
        file.write(np.ascontiguousarray(matrix).tobytes())


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="", help="result.json to write; default: EVAL_RESULT_PATH/result.json, or ./result.json")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args()
    started = time.time()
    top10s, users = infer()
    output = Path(options.output or Path(os.environ.get("EVAL_RESULT_PATH") or ".") / "result.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    seconds = time.time() - started
    output.write_text(json.dumps({"time": seconds, "top10s": top10s, "user": users}), encoding="utf-8")
    print(f"{len(users):,} users answered in {seconds:.1f} s: {output}")


if __name__ == "__main__":
    sys.exit(run_cli(main, debug="--debug" in sys.argv))
