"""Judges results of infer.py on synthetic users to predict: HR@10, NDCG@10 and score beside item-to-item and the planted ceiling.

    python experiments/check_infer.py DATA RESULT.json [RESULT.json ...] [--cache_path ./cache]     the users to predict lie in DATA-eval

All rank the same candidates for the same users, with the items that the user has seen removed. Source of the ceiling: planted.ceiling.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from baselines import successors  # noqa: E402
from dataset import predict_split, training_item_counts  # noqa: E402
from errors import ArgumentParser, UserError, run_cli  # noqa: E402
from metrics import competition_score  # noqa: E402
from store import open_store  # noqa: E402
from synthetic import planted_ceiling  # noqa: E402


def item_to_item(train, predict, k: int) -> list[list[int]]:
    """Creative ids of what followed each user's last item most often in training, then the popular; candidates only, seen removed."""
    popularity = training_item_counts(train, predict_split(train))
    candidates = np.unique(predict.candidate_item_ids)
    known = candidates[candidates <= train.num_items]
    popular = known[np.argsort(-popularity[known], kind="stable")].tolist()
    allowed = set(known.tolist())
    histories = [predict.item_ids[a:b].tolist() for a, b in zip(predict.user_offsets[:-1], predict.user_offsets[1:])]
    last = np.array([history[-1] if history else 0 for history in histories])
    following = successors(train, predict_split(train), np.unique(last[(last > 0) & (last <= train.num_items)]))
    answers = []
    for history, item in zip(histories, last.tolist()):
        ranked = dict.fromkeys([*following.get(item, np.zeros(0, int)).tolist(), *popular])
        seen = set(history)
        answers.append([int(predict.raw_item_ids[i]) for i in ranked if i in allowed and i not in seen][:k])
    return answers


def line(name: str, hit_rate: float, ndcg: float) -> str:
    return f"{name:<40}  HR@10 {hit_rate:.4f}  NDCG@10 {ndcg:.4f}  score {competition_score(hit_rate, ndcg):.4f}"


def judged(name: str, answers: list[list[int]], truth: list[int]) -> str:
    places = [row.index(item) if item in row else -1 for row, item in zip(answers, truth)]
    gain = sum(1 / np.log2(place + 2) for place in places if place >= 0)
    return line(name, sum(place >= 0 for place in places) / len(truth), gain / len(truth))


def read_truth(path: Path) -> dict[str, int]:
    """{raw user id: creative id} of a truth.json."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(user): int(item) for user, item in found.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{path}: {what}; expected a JSON object of user and creative id.\n"
            "DATA is a folder that `python synthetic.py DATA --predict K ...` made, with DATA-eval beside it."
        ) from None


def read_result(path: Path, truth: dict[str, int]) -> tuple[list[list[int]], list[int]]:
    """(answers, targets) of a result of infer.py, a row a user."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        answers, users = [[int(item) for item in row] for row in result["top10s"]], [str(user) for user in result["user"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        what = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: {what}; expected the result.json that `python infer.py --output {path}` writes.") from None
    if foreign := [user for user in users if user not in truth]:
        raise UserError(f"{path}: {len(foreign):,} users are not in truth.json, first {foreign[0]}: a result on other data. Give DATA's.")
    if not users or len(users) != len(answers):
        raise UserError(f"{path}: {len(users):,} users and {len(answers):,} answers; expected as many, one or more. Run infer.py again.")
    return answers, [truth[user] for user in users]


def main(arguments: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="experiments/check_infer.py", description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("results", nargs="+", metavar="RESULT.json", type=Path)
    parser.add_argument("--cache_path", default="./cache")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(arguments)
    data_eval = Path(f"{args.data.rstrip('/')}-eval")
    true_item = read_truth(data_eval / "truth.json")
    results = {path: read_result(path, true_item) for path in args.results}
    train = open_store(args.data, args.cache_path)
    predict = open_store(data_eval, args.cache_path, kind="predict")
    pool = set(predict.raw_item_ids[predict.candidate_item_ids].tolist())
    users = predict.raw_user_ids.take(range(predict.num_users))
    if unknown := [user for user in users if user not in true_item]:
        raise UserError(f"{data_eval}/truth.json lacks {len(unknown):,} users of the folder, first {unknown[0]}. Make the folder again.")
    truth = [true_item[user] for user in users]
    print(f"{len(truth):,} users, {len(pool):,} candidates")
    for path, (answers, targets) in results.items():
        if not all(len(set(row)) == 10 and set(row) <= pool for row in answers):
            print(f"{path}: not ten distinct candidates for each user")
        print(judged(str(path), answers, targets))
    print(judged("item-to-item", item_to_item(train, predict, 10), truth))
    ceiling = planted_ceiling(args.data, only_candidates=True)
    print(line("ceiling (synthetic.planted_ceiling)", ceiling["hr@10"], ceiling["ndcg@10"]))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, debug="--debug" in sys.argv))
