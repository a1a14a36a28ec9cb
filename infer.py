"""The competition's inference: a checkpoint (or an ensemble of several) and EVAL_DATA_PATH in, ten creative ids for every user out.

Needs the checkpoint folder and EVAL_DATA_PATH, nothing else: no config.yaml, no training data, no flags.

python infer.py                                   MODEL_OUTPUT_PATH, EVAL_DATA_PATH -> result.json
python infer.py --export OUT --state_dict_path X  the model for use without this repository
python infer.py --stdin --state_dict_path X       users given as JSON lines -> answers as JSON lines
"""

from __future__ import annotations

import json
import os
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import TextIO

import numpy as np
import torch

from atomic import replacing, write_text_atomic
from dataset import predict_split
from ensemble import ENSEMBLE, Ensemble, read_ensemble
from errors import ArgumentParser, UserError, forget_stdout, run_cli
from evaluate import Ranker, Ranking
from machine import torch_warning
from schema import ACTION_NAMES, NUM_ACTION_TYPES
from serve import Answerer, Served, creative_ids, open_served, serve_lines

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
    ensemble = _read(_checkpoint_in(model_path), sys.stdout)
    cache_path = os.environ.get("USER_CACHE_PATH") or (os.path.join(result_path, "cache") if result_path else "./cache")
    served = open_served(ensemble, data_path, "predict", Path(cache_path), _device())
    store, ranker = served.store, served.ranker
    users = store.raw_user_ids.take(np.arange(store.num_users))
    ranking = ranker.rank(
        predict_split(store),
        ANSWERS,
        remove_seen=True,
        fill=True,
        keep_queries=bool(result_path),
        wanted=_wanted(data_path / ACTION_FILE, users, ensemble),
    )
    if result_path:
        write_baseline_files(Path(result_path), store, ranker, ranking)
    return creative_ids(store, ranking.topk_ids), users


def _wanted(path: Path, users: list[str], ensemble: Ensemble) -> np.ndarray | None:
    """(S,) int64 action that the file names for each user, -1 where it names none: each model's eval.wanted_action counts then."""
    if not path.is_file():
        return None
    own = [member.config.eval.wanted_action for member in ensemble.members if member.config.model.action_conditioning != "none"]
    if not own:
        print(f"{path.name}: not used; the model was trained without action_conditioning")
        return None
    given = read_action_types(path)
    found = np.array([given.get(user, -1) for user in users], dtype=np.int64)
    others = " or ".join(dict.fromkeys("any" if name == "target" else name for name in own))  # there is no target
    print(f"{path.name}: names the wanted action of {int((found >= 0).sum()):,} of {len(users):,} users; {others} for the others")
    return found


def read_action_types(path: Path) -> dict[str, int]:
    """user_action_type.json: {raw user id: action type of the event to predict}. UserError where it is anything else."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
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


def _checkpoint_in(path: Path, given_by: str = "MODEL_OUTPUT_PATH=") -> Path:
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
        f"{given_by}{path}: expected a checkpoint folder (model.pt, meta.json), found {len(inside)} folders global_step*.\n"
        "Name one of them."
    )


def write_baseline_files(folder: Path, store, ranker: Ranker, ranking: Ranking) -> None:
    """The organisers' intermediate files, for tools that read them: vectors (.fbin), retrieval ids (.u64bin), their creative ids (JSON)."""
    folder.mkdir(parents=True, exist_ok=True)
    ranked = np.isin(store.candidate_item_ids, ranker.candidate_ids)  # with cold_candidates drop not all
    items = np.asarray(store.candidate_item_ids)[ranked]
    place = np.searchsorted(ranker.candidate_ids, items)
    vectors = ranker.with_penalties(ranking.candidates).cpu().numpy()
    # A column of ones meets the penalties, so that the files' inner products are the scores that were ranked (transition counts apart).
    queries = np.pad(ranking.queries, ((0, 0), (0, vectors.shape[1] - ranking.queries.shape[1])), constant_values=1.0)
    _write_matrix(folder / "embedding.fbin", vectors[place])
    _write_matrix(folder / "query.fbin", queries)
    retrieval = np.asarray(store.retrieval_ids, dtype=np.uint64)[ranked]
    _write_matrix(folder / "id.u64bin", retrieval[:, None])
    creatives = creative_ids(store, items[:, None])
    write_text_atomic(folder / "retrive_id2creative_id.json", json.dumps({str(r): c[0] for r, c in zip(retrieval.tolist(), creatives)}))


def _write_matrix(path: Path, matrix: np.ndarray) -> None:
    with replacing(path, 8 + matrix.nbytes) as file:
        file.write(np.array(matrix.shape, dtype=np.uint32).tobytes())
        file.write(np.ascontiguousarray(matrix).tobytes())


def _read(path: Path, console: TextIO) -> Ensemble:
    """The model or models at `path`, after a warning where torch's reader has known holes."""
    if warning := torch_warning():
        print(f"warning: {warning}", file=console)
    return read_ensemble(path)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def opened(options: Namespace) -> Served:
    """What --export and --stdin work on: the checkpoint that is named, with EVAL_DATA_PATH, --data_path or its own training data."""
    path = Path(options.state_dict_path)
    if not path.exists():
        raise UserError(f"--state_dict_path {path}: no such file or folder; it names a checkpoint or an ensemble.")
    ensemble = _read(_checkpoint_in(path, "--state_dict_path "), sys.stderr)
    paths = ensemble.members[0].config.paths
    kind = "predict" if os.environ.get("EVAL_DATA_PATH") and not options.data_path else "train"
    data_path = options.data_path or os.environ.get("EVAL_DATA_PATH") or paths.data_path
    if not Path(data_path).is_dir():
        raise UserError(
            f"{data_path}: no such data folder, from which the items' features come.\n"
            "Name the training data by --data_path, or users to predict and candidates by EVAL_DATA_PATH."
        )
    cache_path = os.environ.get("USER_CACHE_PATH") or "./cache"  # not meta.json's: a stranger's file must not say where things are written

    def log(text: str) -> None:
        print(text, file=sys.stderr, flush=True)  # stdout is for answers alone

    return open_served(ensemble, Path(data_path), kind, Path(cache_path), _device(), log)


def answer_lines(options: Namespace) -> None:
    """--stdin: users as JSON lines in, answers as JSON lines out, until the input ends."""
    answerer = Answerer(opened(options))
    print("ready: a user a line, as JSON", file=sys.stderr, flush=True)
    try:
        lines, errors = serve_lines(answerer, sys.stdin.buffer, sys.stdout, ANSWERS)
    except BrokenPipeError:  # whoever reads the answers has had enough
        return forget_stdout()
    print(f"{lines:,} line{'' if lines == 1 else 's'} answered, {errors:,} of them by an error", file=sys.stderr, flush=True)


def check_flags(options: Namespace) -> None:
    """UserError for flags that do not go together."""
    if not (options.export or options.stdin):
        if given := [flag for flag in ("state_dict_path", "data_path") if getattr(options, flag)]:
            raise UserError(f"--{given[0]} belongs to --export and --stdin; else MODEL_OUTPUT_PATH and EVAL_DATA_PATH name them.")
        return
    if options.export and options.stdin:
        raise UserError("--export and --stdin: one at a time.")
    if options.output:
        raise UserError("--output names the result.json of a folder's users; --stdin answers on standard output, --export writes a folder.")
    options.state_dict_path = options.state_dict_path or os.environ.get("MODEL_OUTPUT_PATH") or ""
    if not options.state_dict_path:
        raise UserError("--export and --stdin work on a checkpoint: name it with --state_dict_path.")


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="", help="result.json to write; default: EVAL_RESULT_PATH/result.json, or ./result.json")
    parser.add_argument(
        "--export", metavar="OUT", default="", help="write the model to the new folder OUT, for use without this repository"
    )
    parser.add_argument("--stdin", action="store_true", help="answer users given as JSON lines, until end of input")
    parser.add_argument("--state_dict_path", default="", help="the checkpoint, for --export and --stdin; default: MODEL_OUTPUT_PATH")
    parser.add_argument("--data_path", default="", help="data for --export and --stdin; default: EVAL_DATA_PATH, or what was trained on")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args()
    check_flags(options)
    if options.export:
        from export import export  # what torch.export imports costs a second

        print(f"exported: {export(opened(options), Path(options.export))}; card.json in it tells how it is used")
        return
    if options.stdin:
        return answer_lines(options)
    started = time.time()
    output = Path(options.output or Path(os.environ.get("EVAL_RESULT_PATH") or ".") / "result.json")
    if output.is_dir():
        raise UserError(f"--output {output}: is a folder; expected the name of a file, as {output}/result.json.")
    top10s, users = infer()
    output.parent.mkdir(parents=True, exist_ok=True)
    seconds = time.time() - started
    write_text_atomic(output, json.dumps({"time": seconds, "top10s": top10s, "user": users}))
    print(f"{len(users):,} users answered in {seconds:.1f} s: {output}")


if __name__ == "__main__":
    sys.exit(run_cli(main, debug="--debug" in sys.argv))
