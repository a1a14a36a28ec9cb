"""Do ours and the organisers' baseline rank alike at equal training? Trains both on the same users and bootstraps the difference.

python experiments/parity.py --data JSONL_FOLDER --seeds 1 2 3 --epochs 3 --valid_users 1000 --out FILE.json [--threads 2] [--cache DIR]

Ours is configs/baseline.yaml through the Trainer, theirs is reference.py. One split serves all seeds; each validation user's last event is
the target, ranked among all items without those that the user has seen, by the same exact retrieval and metrics for both. FILE.json is
written after every training, and a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import orjson
import torch
from torch import Tensor

from atomic import write_text_atomic
from checkpoint import plain_json
from columns import ragged_places
from config import Config, with_values
from dataset import Split, Splits, make_splits
from errors import ArgumentParser, UserError, run_cli
from evaluate import Ranker
from features import TableLayout
from logger import RunLogger, format_table
from main import embeddings_of
from metrics import hit_rate, ndcg, paired_bootstrap, ranks_from_topk
from reference import Reference, ReferenceSettings
from retrieval import prepare_catalogue, topk_exact
from runs import RunPaths
from settings import load_config
from store import Store, open_store
from trainer import Trainer

SPLIT_SEED = 42  # not the runs' seed: the bootstrap pairs runs over the same users
TOP_K = 10
QUERIES = 512  # ranked at once
METRICS = {"ndcg@10": ndcg, "hr@10": hit_rate}
SIDES = ("ours", "reference")


class Setup(NamedTuple):
    """What both sides share. lines: (U,) int64 line of seq.jsonl of each of the store's users."""

    data: Path
    config: Config
    store: Store
    splits: Splits
    embeddings: tuple[str, ...]
    lines: np.ndarray
    threads: int


class Run(NamedTuple):
    """One training: ranks of the validation targets from 1, 0 = not in the list (S,); seconds of training; the last epoch's loss."""

    ranks: list[int]
    seconds: float
    loss: float


def prepare(args: argparse.Namespace) -> Setup:
    """Open the data for both sides and check that they mean the same users and items."""
    data = Path(args.data)
    if not (data / "seq.jsonl").is_file():
        raise UserError(f"--data {data}: no seq.jsonl there; expected layout A (synthetic.py --layout jsonl).")
    flags = ["--config", str(ROOT / "configs" / "baseline.yaml"), "--data_path", str(data), "--cache_path", str(args.cache)]
    config = load_config(flags, environ={}).config
    # One evaluation, at the end: the reference has none on the way either, and its time must not count as training.
    config = with_values(config, holdout_fraction=getattr(args, "holdout_fraction", 0.1),
                         num_epochs=args.epochs, num_threads=args.threads, device="cpu", eval_every_epochs=args.epochs,
                         tensorboard=False, save_frequency=args.epochs)  # fmt: skip
    embeddings = embeddings_of(config)
    store = open_store(data, Path(args.cache), embeddings=embeddings)
    splits = make_splits(store, protocol="holdout", holdout_fraction=config.eval.holdout_fraction, target="last", seed=SPLIT_SEED,
                         max_eval_users=args.valid_users)  # fmt: skip
    return Setup(data, config, store, splits, embeddings, lines_of_users(data, store), args.threads)


def lines_of_users(data: Path, store: Store) -> np.ndarray:
    """(U,) int64 line of seq.jsonl, from 0, of each of the store's users; they are ordered by number there, by chance here.

    UserError where a line's items are not the store's, one for one and in the same order: the sides would train on other data.
    """
    user_of = {number: user for user, number in enumerate(store.user_ids.tolist())}
    lines = np.full(store.num_users, -1, dtype=np.int64)
    with open(data / "seq.jsonl", "rb") as file:
        for line, text in enumerate(file):
            records = orjson.loads(text)
            user = user_of.get(records[0][0])
            if user is None:
                continue  # the store has rejected it, so neither side sees it
            items = [record[1] for record in records if record[1] is not None]
            if items != store.item_ids[store.user_offsets[user] : store.user_offsets[user + 1]].tolist():
                raise UserError(f"{data / 'seq.jsonl'}, line {line + 1}: its events are not in the store's order, by time.\n"
                                "The reference takes the file's order; give data whose lines are ordered by time.")  # fmt: skip
            lines[user] = line
    if (lines < 0).any():
        raise UserError(f"{data / 'seq.jsonl'}: {(lines < 0).sum():,} users of the store have no line. Compile it anew (another --cache).")
    return lines


# ---- the two sides ------------------------------------------------------------------------------------------------------


def run_ours(setup: Setup, seed: int) -> Run:
    """Train configs/baseline.yaml with `seed`, and rank the validation targets with the weights of the last step."""
    config = with_values(setup.config, seed=seed)
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        path = Path(folder)
        logger = RunLogger(path, None, console=False)
        layout = TableLayout.from_store(setup.store, config.model)
        run = RunPaths(path, path / "tb", path, path.name)
        trainer = Trainer(config, setup.store, layout, setup.embeddings, setup.splits, run, logger, torch.device("cpu"))
        begin = time.perf_counter()
        trainer.fit()
        seconds = time.perf_counter() - begin
        logger.close()
        records = [json.loads(line) for line in (path / "train.log").read_text(encoding="utf-8").splitlines()]
    if trainer.stop_signal:
        raise KeyboardInterrupt
    losses = [record["loss"] for record in records if "lr" in record and record["epoch"] >= config.training.num_epochs - 1]
    ranker = Ranker(trainer.model, trainer.columns, trainer.candidates, device=torch.device("cpu"), batch_size=config.eval.eval_batch_size)
    ranking = ranker.rank(setup.splits.valid, TOP_K, remove_seen=True)
    return Run(_ranks(setup, torch.from_numpy(ranking.topk_ids)), seconds, float(np.mean(losses)) if losses else float("nan"))


def run_reference(setup: Setup, seed: int) -> Run:
    """Train reference.py with `seed` on the same users for as many epochs, and rank the same targets."""
    train, valid = setup.splits.train, setup.splits.valid
    settings = ReferenceSettings(seed=seed, lines=tuple(setup.lines[train.users].tolist()))
    with Reference(setup.data, settings) as reference:
        if reference.dataset.num_items != setup.store.num_items:
            raise UserError(f"{setup.data}: {reference.dataset.num_items:,} items in indexer.pkl, {setup.store.num_items:,} in the store.")
        begin = time.perf_counter()
        losses = [reference.train_epoch() for _ in range(setup.config.training.num_epochs)]
        seconds = time.perf_counter() - begin
        lines = setup.lines[valid.users].tolist()
        for line, user in zip(lines, valid.users, strict=True):
            assert reference.dataset.tokens(line)[0].number == setup.store.user_ids[user], f"line {line} is another user's"
        queries = torch.from_numpy(reference.encode_users(lines, drop_last=1))
        catalogue = prepare_catalogue(torch.from_numpy(reference.encode_items(range(1, setup.store.num_items + 1))))
    found = [
        topk_exact(queries[part], catalogue, TOP_K, exclude=_seen(setup.store, valid.take(part.numpy())))[1]
        for part in _parts(len(queries))
    ]
    return Run(_ranks(setup, torch.cat(found) + 1), seconds, losses[-1])


def _parts(num: int) -> Iterator[Tensor]:
    return iter(torch.arange(num).split(QUERIES))


def _seen(store: Store, split: Split) -> tuple[Tensor, Tensor]:
    """What each user has seen, as places among all items (offsets, index)."""
    counts = split.end - split.begin
    items = store.item_ids[ragged_places(split.begin, counts)].astype(np.int64)
    return torch.from_numpy(np.concatenate([[0], np.cumsum(counts)])), torch.from_numpy(items - 1)


def _ranks(setup: Setup, topk_ids: Tensor) -> list[int]:
    targets = setup.store.item_ids[setup.splits.valid.target].astype(np.int64)
    return ranks_from_topk(topk_ids, torch.from_numpy(targets)).tolist()


# ---- the record ---------------------------------------------------------------------------------------------------------


def load_record(path: Path, asked: dict) -> dict:
    """What FILE.json holds; a new record where there is none. UserError where it answers another question."""
    if not path.exists():
        return {"settings": asked, "runs": {}}
    record = json.loads(path.read_text(encoding="utf-8"))
    changed = [key for key in asked if record.get("settings", {}).get(key) != asked[key]]
    if changed:
        raise UserError(f"{path}: made with other settings ({', '.join(changed)}). Name another --out, or remove it.")
    return record


def compare(runs: dict[str, dict], seeds: list[int]) -> dict[str, dict]:
    """{metric: means of both, their difference ours - reference, its 95 % interval over users and seeds, and the width}."""
    ranks = {side: torch.tensor([runs[f"{side}-{seed}"]["ranks"] for seed in seeds]) for side in SIDES}  # each (R, S)
    result = {}
    for name, metric in METRICS.items():
        values = {side: metric(ranks[side].flatten(), TOP_K).view_as(ranks[side]) for side in SIDES}
        difference, low, high = paired_bootstrap(values["ours"], values["reference"])
        means = {side: float(values[side].mean()) for side in SIDES}
        share = (high - low) / means["reference"] if means["reference"] else float("nan")
        result[name] = means | {"difference": difference, "low": low, "high": high, "width_share": share}
    return result


def table(runs: dict[str, dict], seeds: list[int], comparison: dict[str, dict]) -> list[str]:
    """The figures of every seed and the comparison, as lines of text."""
    rows = []
    for seed in seeds:
        pair = [runs[f"{side}-{seed}"] for side in SIDES]
        figures = [f"{run[name]:.4f}" for name in METRICS for run in pair]
        rows.append([f"seed {seed}", *figures, *(f"{run['loss']:.4f}" for run in pair), *(f"{run['seconds']:.0f}" for run in pair)])
    header = ["", *(f"{side} {name}" for name in (*METRICS, "loss", "s") for side in SIDES)]
    lines = format_table(rows, header)
    for name, c in comparison.items():
        lines.append(
            f"{name}: ours {c['ours']:.4f}, reference {c['reference']:.4f}, difference {c['difference']:+.4f}, 95 % interval "
            f"{c['low']:+.4f} to {c['high']:+.4f} (width {100 * c['width_share']:.1f} % of the reference's)"
        )
    return lines


def main(args: argparse.Namespace) -> None:
    """Make the trainings that FILE.json lacks, compare, print."""
    torch.set_num_threads(args.threads)
    setup = prepare(args)
    groups = {group: setup.config.to_dict()[group] for group in ("model", "training", "loss")}
    num_train, num_valid = setup.splits.train.num_samples, setup.splits.valid.num_samples
    asked = {"data": str(setup.data.resolve()), "store": setup.store.manifest["fingerprint"], "epochs": args.epochs,
             "train_users": num_train, "valid_users": num_valid, "config": groups}  # fmt: skip
    out = Path(args.out)
    record = load_record(out, json.loads(json.dumps(plain_json(asked))))
    print(
        f"{num_train:,} training users, {num_valid:,} validation users, {setup.store.num_items:,} items, {args.epochs} epochs", flush=True
    )
    for seed in args.seeds:
        for side, train in zip(SIDES, (run_ours, run_reference), strict=True):
            if f"{side}-{seed}" not in record["runs"]:
                run = train(setup, seed)
                means = {name: float(metric(torch.tensor(run.ranks), TOP_K).mean()) for name, metric in METRICS.items()}
                record["runs"][f"{side}-{seed}"] = run._asdict() | means | {"threads": args.threads}
                write_text_atomic(out, json.dumps(plain_json(record)) + "\n")
                print(f"{side}, seed {seed}: ndcg@10 {means['ndcg@10']:.4f}, {run.seconds:.0f} s of training", flush=True)
    record["seeds"], record["comparison"] = args.seeds, compare(record["runs"], args.seeds)
    write_text_atomic(out, json.dumps(plain_json(record)) + "\n")
    print("\n".join(table(record["runs"], args.seeds, record["comparison"])))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The flags of `arguments`, or of the command line."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder in layout A")
    parser.add_argument("--out", required=True, help="the record; what it holds already is not made again")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--valid_users", type=int, default=0, help="validation users at most; 0 = all")
    parser.add_argument("--holdout_fraction", type=float, default=0.1, help="share of the users held out; half of them validate")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--cache", default="./cache", help="where the compiled store lies")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(run_cli(lambda: main(parse(None))))
