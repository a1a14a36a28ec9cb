"""Judges a result.json of infer.py on synthetic users to predict: HR@10 and NDCG@10 beside item-to-item and the planted ceiling.

    python experiments/check_infer.py RESULT.json DATA DATA-eval [--cache_path ./cache]

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


def score(answers: list[list[int]], truth: list[int]) -> str:
    places = [row.index(item) if item in row else -1 for row, item in zip(answers, truth)]
    gain = sum(1 / np.log2(place + 2) for place in places if place >= 0)
    return f"HR@10 {sum(place >= 0 for place in places) / len(truth):.4f}  NDCG@10 {gain / len(truth):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result"), parser.add_argument("data"), parser.add_argument("data_eval")
    parser.add_argument("--cache_path", default="./cache")
    args = parser.parse_args()
    result = json.loads(Path(args.result).read_text())
    truth = json.loads((Path(args.data_eval) / "truth.json").read_text())
    truth = [int(truth[user]) for user in result["user"]]
    answers = [[int(item) for item in row] for row in result["top10s"]]
    train = open_store(args.data, args.cache_path)
    predict = open_store(args.data_eval, args.cache_path, kind="predict")
    pool = set(predict.raw_item_ids[predict.candidate_item_ids].tolist())
    whole = all(len(set(row)) == 10 and set(row) <= pool for row in answers)
    print(f"users {len(truth):,}, candidates {len(pool):,}, ten distinct candidates each: {whole}")
    print(f"model         {score(answers, truth)}")
    print(f"item-to-item  {score(item_to_item(train, predict, 10), truth)}")
    ceiling = planted_ceiling(args.data, only_candidates=True)
    print(f"ceiling       HR@10 {ceiling['hr@10']:.4f}  NDCG@10 {ceiling['ndcg@10']:.4f}  (approximate: synthetic.planted_ceiling)")


if __name__ == "__main__":
    main()
