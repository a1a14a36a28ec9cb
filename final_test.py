"""The test at the end of a run: the best checkpoint on the test split beside the baselines, and what it leaves in the run folder.

Must not train, and must not choose anything: the checkpoint was chosen on validation.
"""

from __future__ import annotations

import json

import numpy as np

import board
import checkpoint as checkpoints
from atomic import write_text_atomic
from baselines import Baselines
from dataset import Split, generator
from errors import RunError, UserError
from evaluate import Ranking, baseline_results
from ranks import write_ranks
from report_data import ReportedData, write_data_facts, write_report_data
from trainer import Trainer

# Pairs of user and candidate over which the exact ranks of test targets are counted: a minute or so on two cores.
MAX_RANKED_PAIRS = 20_000_000_000
RANKED_KEY = 5  # first word of a generator's key


def run_test(trainer: Trainer) -> dict:
    """Load the run's best checkpoint, evaluate it on the test split beside the baselines, and write metrics.json; returns its content.

    Where that checkpoint is damaged or gone, the best that is left takes its place, with a warning.
    """
    root = trainer.run.checkpoint_dir
    try:
        best = checkpoints.load_checkpoint(root / trainer.best_name, with_trainer=False)
    except UserError as error:
        trainer.replace_best(error)
        if not trainer.best_name:
            raise RunError(f"{root}: no evaluated checkpoint is whole: nothing to test. --resume evaluates anew.") from error
        best = checkpoints.load_checkpoint(root / trainer.best_name, with_trainer=False)
    trainer.load_weights(best.model_state)
    return write_test_metrics(trainer, best)


def tested_split(trainer: Trainer) -> tuple[str, Split]:
    """(name, users) of what the run ends with: the test split, with eval.test false the validation split."""
    return ("test", trainer.splits.test) if trainer.config.eval.test else ("valid", trainer.splits.valid)


def reported_data(trainer: Trainer) -> ReportedData:
    """What the report says of the data: of the split that the run ends with."""
    splits, candidates = trainer.splits._replace(test=tested_split(trainer)[1]), np.unique(trainer.candidates)
    return ReportedData(trainer.store, splits, candidates, trainer.item_counts, trainer.config.system.seed, trainer.embeddings)


def note_data(trainer: Trainer) -> None:
    """The data's figures into the run folder, where they are not there yet: a run that ends before its test is reported with them."""
    try:
        write_data_facts(trainer.run.log_dir, reported_data(trainer))
    except RunError as error:  # a full disk: the report will lack them, and the run may yet find room
        trainer.logger.warn_once(str(error).splitlines()[0])


def users_to_rank(num_users: int, num_candidates: int, seed: int) -> np.ndarray:
    """(num_users,) bool: whose targets' exact ranks are counted; all, or as many as MAX_RANKED_PAIRS allows, drawn at random."""
    most = max(1000, MAX_RANKED_PAIRS // max(1, num_candidates))
    chosen = np.zeros(num_users, dtype=bool)
    chosen[generator(RANKED_KEY, seed).permutation(num_users)[:most]] = True
    return chosen


def write_test_metrics(trainer: Trainer, checkpoint: checkpoints.Checkpoint) -> dict:
    """Evaluate the trainer's weights (the checkpoint's) on the test split, add the baselines, write metrics.json (flat), return it.

    With eval.test false all of it is the validation split's, and the test split is not looked at.
    """
    config = trainer.config.eval
    name, test = tested_split(trainer)
    asked = users_to_rank(test.num_samples, len(trainer.candidates), trainer.config.system.seed)
    ranking = trainer.rank(test, asked)
    metrics = trainer.metrics_of(test, ranking)
    result = {
        "split": name,
        "protocol": config.protocol,
        **metrics,
        "num_users": test.num_samples,
        "num_candidates": len(trainer.candidates),
        "num_cold_candidates": trainer.num_cold_candidates,
        "seen_removed": config.remove_seen,
        **({"wanted_action": config.wanted_action} if trainer.config.model.action_conditioning != "none" else {}),
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.meta["step"],
        "epoch": checkpoint.meta["epoch"],
    }
    places = {}
    if config.baselines:
        baselines = Baselines(trainer.store, trainer.splits.train, trainer.candidates, config.remove_seen)
        found, places = baseline_results(baselines, test, config.top_k, config.score_round)
        result |= found
    of_baselines = {name: place[asked] for name, place in places.items()}
    write_ranks(trainer.run.log_dir, test.users[asked], ranking.target_ranks[asked], ranking.topk_ids[asked], of_baselines)
    # At the run's last step, not the checkpoint's: a reader of train.log takes an earlier step for a resumed run's.
    trainer.logger.eval_line(max(trainer.step, result["step"]), max(trainer.epoch, result["epoch"]), name, result, None)
    write_text_atomic(trainer.run.log_dir / "metrics.json", json.dumps(checkpoints.plain_json(result), indent=1) + "\n")  # nan is null
    write_report_data(trainer.run.log_dir, reported_data(trainer), ranking)
    trainer.logger.draw(lambda writer: draw_result(writer, trainer, ranking, result))
    return result


def draw_result(writer, trainer: Trainer, ranking: Ranking, metrics: dict) -> None:
    """TensorBoard at the end of a run: hparams with the test metrics, and the item vectors for the projector."""
    board.write_hparams(writer, trainer.config.to_dict(), metrics)
    most, folder = trainer.config.system.projector_items, trainer.run.tensorboard_dir
    if most:
        board.write_projector(folder, trainer.store, np.unique(trainer.candidates), ranking.candidates, trainer.item_counts, most)
