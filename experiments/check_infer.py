"""Judges results of infer.py on synthetic users to predict: HR@10, NDCG@10 and score beside item-to-item and the planted ceiling.

    python experiments/check_infer.py DATA RESULT.json [RESULT.json ...] [--cache_path ./cache]     the users to predict lie in DATA-eval

All rank the same candidates for the same users, with the items that the user has seen removed. Source of the ceiling: planted.ceiling.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from baselines import successors  # noqa: E402
from dataset import predict_split, training_item_counts  # noqa: E402
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("results", nargs="+", metavar="RESULT.json")
    parser.add_argument("--cache_path", default="./cache")
    args = parser.parse_args()
    data_eval = Path(f"{args.data.rstrip('/')}-eval")
    true_item = json.loads((data_eval / "truth.json").read_text())
    train = open_store(args.data, args.cache_path)
    predict = open_store(data_eval, args.cache_path, kind="predict")
    pool = set(predict.raw_item_ids[predict.candidate_item_ids].tolist())
    truth = [int(true_item[user]) for user in predict.raw_user_ids.take(range(predict.num_users))]
    print(f"{len(truth):,} users, {len(pool):,} candidates")
    for path in args.results:
        result = json.loads(Path(path).read_text())
        answers = [[int(item) for item in row] for row in result["top10s"]]
        if not all(len(set(row)) == 10 and set(row) <= pool for row in answers):
            print(f"{path}: not ten distinct candidates for each user")
        print(judged(path, answers, [int(true_item[user]) for user in result["user"]]))
    print(judged("item-to-item", item_to_item(train, predict, 10), truth))
    ceiling = planted_ceiling(args.data, only_candidates=True)
    print(line("ceiling (synthetic.planted_ceiling)", ceiling["hr@10"], ceiling["ndcg@10"]))


if __name__ == "__main__":
    main()
