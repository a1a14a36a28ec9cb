"""The training loop: batches in, updates, logs, checkpoints, evaluation.

Must not parse settings, choose folders or read data files; it gets a store, splits and a run.

Legend: B users, N packed tokens, M unique items, C candidates, D width, R touched rows.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import board
import checkpoint as checkpoints
from compatibility import changed_since, check_compatible, computed_on
from config import Config
from dataset import Batch, BatchBuilder, Prefetcher, Split, Splits, TrainingOrder, training_item_counts, training_samples
from diagnosis import Generators, Suspect, Update, bad_weights, find_cause
from embedding import Touched
from errors import ForeignFormatError, RunError, Terminated, UserError
from evaluate import Ranker, Ranking, candidate_ids, move, places_found, split_metrics, trained_items, wanted_actions, without_cold
from experts import take_usage
from features import FeatureColumns, FeatureInputs, TableLayout, dropped_ids, known_items_digest
from logger import RunLogger
from model import Recommender, heads_of
from optim import LossScaler, TableOptimizer, clip_scale, gradient_norm, merge_touched
from parallel import training_cores
from runs import RunPaths, write_status
from slices import groups_of, quality, user_values
from training_loss import TrainingLoss, negative_sampling, total_weight
from transitions import Transitions, count_transitions, without
from updates import Updates

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
LOWER_IS_BETTER = ("loss",)
PROGRESS = ("epoch", "batch", "step", "best_value", "best_name", "evaluations_since_best", "evaluated_step", "loss_sum", "loss_count",
            "action_loss_sum", "skipped_steps")  # fmt: skip


class _StoppedError(KeyboardInterrupt):
    """A signal came during an evaluation, which is left there and then."""


def build_model(config: Config, layout: TableLayout, schema, embeddings: tuple[str, ...]) -> Recommender:
    """A freshly initialised model; its weights depend on config.system.seed alone."""
    torch.manual_seed(config.system.seed)
    widths = {i: schema[i].width for i in embeddings}
    model = Recommender(config.model, layout, widths, schema.has_time, **heads_of(config.loss))
    model.backbone.gradient_checkpointing = config.training.gradient_checkpointing
    if config.training.compile:
        model.backbone.compile(dynamic=True)  # in place: the names of the weights stay
    return model


class _Share(NamedTuple):
    """What one batch gives to an update, besides the dense gradients, which add up in place."""

    num_targets: int
    weight: float  # of its means among those of the update's batches
    losses: Tensor  # (2,) means over the targets: the loss, and that of the action head
    touched: list[Touched]
    suspect: Suspect  # what it takes to compute the batch again


class Trainer:
    """One run of training over a store; `fit` trains, `test` writes metrics.json."""

    def __init__(
        self,
        config: Config,
        store,
        layout: TableLayout,
        embeddings: tuple[str, ...],
        splits: Splits,
        run: RunPaths,
        logger: RunLogger,
        device: torch.device,
    ) -> None:
        self.config, self.store, self.layout, self.embeddings, self.splits = config, store, layout, embeddings, splits
        self.run, self.logger, self.device, self._taken_up = run, logger, device, False
        training = config.training
        self.model = build_model(config, layout, store.schema, embeddings).to(device)
        self.columns = FeatureColumns(store, layout, embeddings)
        self._note_trained_items()
        sampling = negative_sampling(config, lambda: self.item_counts)
        length, seed = config.model.max_seq_length, config.system.seed
        self.samples = training_samples(config.data.targets_per_sample, splits.train, length)
        self.builder = BatchBuilder(store, self.samples, length, seed, sampling)
        self.order = TrainingOrder(self.samples, training.batch_size, seed, length, config.data.length_buckets)
        self.prefetch = Prefetcher(config.data.num_workers, config.data.prefetch_batches, spare=device.type == "cpu")
        self.scaler = LossScaler(training.precision == "fp16")
        self.candidates, self.num_cold_candidates = candidate_ids(config.eval.candidates, store)
        if self.num_cold_candidates:
            logger.say(
                f"candidates: {len(self.candidates):,} are ranked; {self.num_cold_candidates:,} are unknown in training and left out"
            )
        if config.eval.cold_candidates == "drop":
            before, self.candidates = len(self.candidates), without_cold(self.candidates, self.columns)
            logger.say(f"candidates: {before - len(self.candidates):,} of {before:,} were not in training and are dropped")
        self.steps_per_epoch = -(-self.order.num_batches // training.accumulate_steps)  # the last one of an epoch may have fewer batches
        self.total_steps = training.max_steps or self.steps_per_epoch * training.num_epochs
        self.epoch, self.batch, self.step = 0, 0, 0  # the next batch to train on, and updates done
        self.best_value, self.best_name, self.evaluations_since_best, self.evaluated_step = math.nan, "", 0, -1
        self._valid_metrics: dict = {}
        self.loss_sum, self.action_loss_sum, self.loss_count = 0.0, 0.0, 0  # since the last log line
        self.skipped_steps = 0  # of those that max_skipped_steps allows
        self.stop_signal = 0
        self._may_stop_now = False  # a signal ends what is done now; else it waits for the end of the step
        self.ranker_of: Callable[[Ranker], Ranker] | None = None  # of the model's ranker makes the one that evaluates: an ensemble's
        self._shares: list[_Share] = []  # of the update that is being made, a batch each

    # What only training needs is made when it is first asked for: an evaluation holds no moments.

    @cached_property
    def loss(self) -> TrainingLoss:
        return TrainingLoss(self.config, self.store, self.splits.train, self.device)

    @cached_property
    def updates(self) -> Updates:
        return Updates(self.model, self.config.training, self.total_steps, self.steps_per_epoch)

    @property
    def optimizer(self):
        return self.updates.optimizer

    @property
    def table_optimizer(self) -> TableOptimizer:
        return self.updates.table_optimizer

    @cached_property
    def _item_ids_digest(self) -> str:
        return known_items_digest(self.store)

    @cached_property
    def transitions(self) -> Transitions | None:
        """With transition_weight: the counts of the training split, which a checkpoint holds for inference."""
        if not self.config.eval.transition_weight:
            return None
        self.logger.say("counting item-to-item transitions of the training events")
        return count_transitions(self.store, self.splits.train)

    def _note_trained_items(self) -> None:
        """With id_dropout: items with training events join those that the model has been trained on."""
        if self.config.model.id_dropout:
            self.model.trained_items |= torch.from_numpy(self.item_counts > 0).to(self.device)
            self.columns.trained = trained_items(dict(self.model.named_buffers()))

    def load_weights(self, state: dict[str, Tensor]) -> None:
        """state: of model.pt."""
        self.model.load_state_dict(without(state))
        self.columns.trained = trained_items(dict(self.model.named_buffers()))

    # ---- training ----

    def fit(self) -> None:
        """Train to the end, or until a signal or the patience stops it; evaluates and saves on the way."""
        for line in self.updates.too_long_warmups():
            self.logger.warn_once(line)
        self.take_up()
        self._note_trained_items()  # a run that starts from other weights adds its own
        users_a_step = self.order.num_samples / self.steps_per_epoch
        self.logger.expect_pauses(self._evaluations_ahead() * self.splits.valid.num_samples / users_a_step / 3)  # forward alone: a third
        with self._signals_noted():
            # Where a signal or a kill came between the last step and its evaluation, that evaluation is still due.
            while (self.step < self.total_steps or self.evaluated_step != self.step) and not self.out_of_patience():
                self._train_epoch()
                if self.stop_signal:
                    self.save(None)
                    return

    def take_up(self, allow_other_data: bool = False) -> None:
        """Go on from the run's checkpoint, where it has one, once: at the latest in `fit`. UserError where it does not fit."""
        if self.run.resume_from is not None and not self._taken_up:
            self._taken_up = True
            self._resume(self.run.resume_from, allow_other_data)

    def has_ended(self) -> bool:
        """Whether there is no step left to train, or no patience; an evaluation may still be due."""
        return self.step >= self.total_steps or self.out_of_patience()

    def _train_epoch(self) -> None:
        """The rest of the present epoch, from self.batch on; then evaluation and a checkpoint."""
        self.order.start_epoch(self.epoch)
        group = self.config.training.accumulate_steps
        last = min(self.order.num_batches, self.batch + (self.total_steps - self.step) * group)
        built = self.prefetch(self._build, range(self.batch, last))
        self._start_clock()
        self.model.train()
        with training_cores(self.device):
            for _ in range(self.batch, last):
                before = time.perf_counter()
                batch, features = move(next(built), self.device)
                self._waited += time.perf_counter() - before
                self.batch += 1
                self._users += batch.users.shape[0]
                if self.batch % group and self.batch < last:
                    self._accumulate(batch, features)
                    continue
                self._update(batch, features)
                self.step += 1
                self.logger.note_start(self.step)
                if self.step % self.config.system.log_every_steps == 0 or self.step == self.total_steps:
                    self._log_line()
                if self.stop_signal:
                    built.close()
                    return
                every = self.config.training.save_every_steps
                if every and self.step % every == 0 and self.batch < last:
                    self.save(None)
        self._finish_epoch(whole=self.batch == self.order.num_batches)

    def _finish_epoch(self, whole: bool) -> None:
        trained = self.epoch, self.batch
        if whole:
            self.epoch, self.batch = self.epoch + 1, 0
        ends = self.step >= self.total_steps
        valid_loss, is_best = None, False
        if ends or self.epoch % self.config.eval.eval_every_epochs == 0:
            try:
                valid_loss, is_best = self._validate()
            except _StoppedError:
                self.epoch, self.batch = trained  # the evaluation is due when the run goes on
                return
        every = self.config.training.save_every_steps
        due = self.epoch % self.config.system.save_frequency == 0 or (every and self.step % every == 0)
        if is_best or due or self.has_ended():
            path = self.save(valid_loss)
            if whole:
                checkpoints.link(self.run.checkpoint_dir, f"checkpoint_epoch_{self.epoch}.pt", path)

    def _build(self, number: int) -> tuple[Batch, FeatureInputs]:
        batch = self.builder.training(self.order.samples(number), self.epoch, number)
        ids, dropped = batch.unique_ids.numpy(), None
        if rate := self.config.model.id_dropout:
            dropped = dropped_ids(ids, rate, seed=self.config.system.seed, epoch=self.epoch, step=number)
        built = batch, self.columns.gather(ids, batch.users.numpy(), self.device.type == "cpu", dropped)
        return move(built, self.device, pin=True) if self.device.type == "cuda" else built

    def _accumulate(self, batch: Batch, features: FeatureInputs) -> None:
        """Forward and backward of one of the update's batches.

        A batch weighs as much as its targets together, so that each target of an update counts as it would in one large batch. With
        length_buckets batches differ several times in length: the mean of their means would favour the targets of users with few events.
        """
        suspect = Suspect(self.batch - 1, Generators.now(self.device))
        with self._autocast():
            encoded = self.model.encode(batch, features)
        loss = self.loss(encoded.query, encoded.item_emb, batch, self.model.temperature())
        action_loss = torch.zeros((), device=self.device)
        if self.model.action_head is not None:
            action_loss = self.model.action_head.loss(encoded.state, encoded.item_emb, batch.target_index, batch.target_actions)
        num_targets = batch.target_index.shape[0]
        first = self._shares[0].num_targets if self._shares else num_targets  # weights of about 1, for float16's sake
        weight = total_weight(batch, self.config.loss.action_weights) / first if self.config.training.accumulate_steps > 1 else 1.0
        total = loss + self.config.loss.action_head_weight * action_loss if self.model.action_head is not None else loss
        if encoded.balance is not None:
            total = total + self.config.loss.expert_balance_weight * encoded.balance
        (total * (self.scaler.scale * weight)).backward()
        touched = [entry for entry in self.model.table.pop_touched() if entry.leaf.grad is not None]
        values = torch.stack((loss.detach().float(), action_loss.detach().float()))
        self._shares.append(_Share(num_targets, weight, values, touched, suspect))

    def _update(self, batch: Batch, features: FeatureInputs) -> None:
        """The update's last (or only) batch: forward, backward, one norm over dense and sparse gradients, then all updates."""
        self._accumulate(batch, features)
        shares, self._shares = self._shares, []
        touched = merge_touched(self.model.table, [share.touched for share in shares])
        grads = self.updates.gradients() + [entry.leaf.grad for entry in touched]
        weights = [share.weight for share in shares]
        whole = sum(weights) or 1.0  # 0: targets of weight 0 alone, without gradients
        loss_scale = self.scaler.scale * whole
        norm = gradient_norm(grads) / loss_scale
        # The one sync point of a step: no update may follow a gradient that is not finite.
        *losses, self._last_norm = torch.cat((*(share.losses for share in shares), norm[None])).tolist()
        losses, action_losses = losses[::2], losses[1::2]
        loss_value, action_loss = (sum(loss * weight for loss, weight in zip(part, weights)) / whole for part in (losses, action_losses))
        finite = math.isfinite(self._last_norm) and math.isfinite(loss_value) and math.isfinite(action_loss)
        if self.scaler.enabled:
            self.scaler.update(finite)
        if not finite and not (self.scaler.enabled and self.scaler.scale >= 1.0):
            was_finite = [math.isfinite(loss + action_loss) for loss, action_loss in zip(losses, action_losses)]
            suspects = [share.suspect._replace(finite=finite) for share, finite in zip(shares, was_finite)]
            self._skip_or_stop(suspects, touched, loss_value)
        if finite:
            self.updates.apply(touched, clip_scale(norm, self.config.training.gradient_clip) / loss_scale, self.step)
            self.loss_sum, self.loss_count = self.loss_sum + loss_value, self.loss_count + 1
            self.action_loss_sum += action_loss
        self.optimizer.zero_grad(set_to_none=True)

    def _autocast(self):
        dtype = AUTOCAST.get(self.config.training.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def _skip_or_stop(self, suspects: list[Suspect], touched: list[Touched], loss: float) -> None:
        """A step that is not finite: nothing is updated; warn up to max_skipped_steps times, else RunError. Both say what it was.

        Weights that are not finite stop the run: no later batch would mend them.
        """
        build = lambda number: move(self._build(number), self.device)
        made_with = (self.config, self.store, self.layout, self.embeddings, self.model, self.loss, self.device, build, self._autocast)
        found = find_cause(Update(*made_with, self.scaler.scale), suspects, touched)
        what = f"step {self.step + 1}, epoch {self.epoch}: loss {loss}, gradient norm {self._last_norm}"
        where = f"the first that is not finite: {found.where(self.order.num_batches)}."
        most = self.config.training.max_skipped_steps
        if self.skipped_steps < most and not bad_weights(self.model):
            self.skipped_steps += 1
            self.logger.warn_once(f"{what}; skipped, {self.skipped_steps} of at most {most}; {where}")
            return
        raise RunError(f"{what}; stopped before the update.\n{where[0].upper()}{where[1:]}\n{found.remedy}")

    # ---- logs ----

    def _start_clock(self) -> None:
        self._waited, self._users, self._clock = 0.0, 0, time.perf_counter()

    def _log_line(self) -> None:
        seconds = max(time.perf_counter() - self._clock, 1e-9)
        self.logger.train_line(
            {
                "global_step": self.step,
                "epoch": self.epoch,
                "loss": self.loss_sum / max(1, self.loss_count),
                "lr": self.optimizer.param_groups[0]["lr"],
                "grad_norm": self._last_norm,
                "users_per_s": self._users / seconds,
                "data_wait": self._waited / seconds,
                "total_steps": self.total_steps,
            }
            | ({"action_loss": self.action_loss_sum / max(1, self.loss_count)} if self.model.action_head is not None else {})
            | self._expert_shares()
            | ({"loss_scale": self.scaler.scale} if self.scaler.enabled else {})
            | ({"skipped_steps": skipped} if (skipped := self.scaler.skipped + self.skipped_steps) or self.scaler.enabled else {})
            | ({"temperature": self._temperature()} if self.config.loss.learn_temperature else {})
        )
        self.loss_sum, self.action_loss_sum, self.loss_count = 0.0, 0.0, 0
        self._start_clock()

    def _expert_shares(self) -> dict[str, float]:
        """The tokens' largest and smallest share of an expert since the last log line, over all blocks; {} without experts."""
        if not (shares := [share for one in take_usage(self.model.backbone).values() for share in one.tolist()]):
            return {}
        return {"expert_share_max": max(shares), "expert_share_min": min(shares)}

    # ---- evaluation ----

    def _temperature(self) -> float:
        learnt = self.model.temperature()
        return learnt.item() if learnt is not None else self.config.loss.temperature if self.config.loss.name != "bce" else 1.0

    def _ranker(self) -> Ranker:
        config = self.config
        ranker = Ranker(
            self.model,
            self.columns,
            self.candidates,
            device=self.device,
            batch_size=config.eval.eval_batch_size,
            num_workers=config.data.num_workers,
            prefetch_batches=config.data.prefetch_batches,
            temperature=self._temperature(),
            cold_penalty=config.eval.cold_penalty if config.eval.cold_candidates == "penalty" else 0.0,
            transitions=self.transitions,
            transition_weight=config.eval.transition_weight,
        )
        return self.ranker_of(ranker) if self.ranker_of else ranker

    def evaluate(self, split: Split) -> dict[str, float]:
        """Metrics of the model as it is: hr@k, ndcg@k, score and loss."""
        return self.metrics_of(split, self.rank(split))

    def rank(self, split: Split, ranks_of: np.ndarray | None = None) -> Ranking:
        """A split ranked by the model as it is; ranks_of as in Ranker.rank."""
        config = self.config.eval
        wanted = wanted_actions(config.wanted_action, self.store, split)
        return self._ranker().rank(split, max(config.top_k), config.remove_seen, ranks_of=ranks_of, wanted=wanted)

    def metrics_of(self, split: Split, ranking: Ranking) -> dict[str, float]:
        config = self.config.eval
        return split_metrics(self.store, split, ranking.topk_ids, config.top_k, config.score_round) | {"loss": ranking.loss}

    def _validate(self) -> tuple[float, bool]:
        """Evaluate on the validation split; returns (loss, whether it is the best so far)."""
        begin = time.perf_counter()
        with self.updates.averaged(), self._stoppable():
            ranking = self.rank(self.splits.valid)
        metrics = self.metrics_of(self.splits.valid, ranking)
        self.logger.note_pause(time.perf_counter() - begin, self._evaluations_ahead())
        name = self.config.eval.best_metric
        value = metrics[name]
        better = value < self.best_value if name in LOWER_IS_BETTER else value > self.best_value
        # A value that is not a number (a score without weighted targets) is the best only until there is another.
        is_best = better or not self.best_name or (math.isnan(self.best_value) and not math.isnan(value))
        self.logger.eval_line(self.step, self.epoch, "valid", metrics, None if math.isnan(self.best_value) else {name: self.best_value})
        self.logger.draw(lambda writer: self._draw_evaluation(writer, ranking, metrics))
        self.evaluations_since_best = 0 if is_best else self.evaluations_since_best + 1
        if is_best:
            self.best_value, self.best_name = float(value), checkpoints.checkpoint_name(self.step, metrics["loss"])
        self._valid_metrics, self.evaluated_step = metrics, self.step
        return metrics["loss"], is_best

    def _evaluations_ahead(self) -> float:
        """Evaluations to come, in validations: the test at the end ranks its users once more for their exact ranks."""
        epochs_left = -(-(self.total_steps - self.step) // self.steps_per_epoch)
        return -(-epochs_left // self.config.eval.eval_every_epochs) + 2 * self.splits.test.num_samples / self.splits.valid.num_samples

    def _draw_evaluation(self, writer, ranking: Ranking, metrics: dict[str, float]) -> None:
        """TensorBoard's table, histograms and pictures of a ranking of the validation split."""
        system, valid = self.config.system, self.splits.valid
        rows = self.quality_of(valid, ranking)
        board.write_evaluation(writer, self.step, rows, self.model if system.tensorboard_histograms else None)
        if system.tensorboard_figures:
            places = places_found(self.store, valid, ranking.topk_ids)
            board.write_figures(writer, self.step, rows, metrics, places, ranking.topk_ids.shape[1])

    @cached_property
    def item_counts(self) -> np.ndarray:
        """Training events of each item, (num_items + 1,) int64."""
        return training_item_counts(self.store, self.splits.train)

    def quality_of(self, split: Split, ranking: Ranking) -> list[dict]:
        """The rows of slices.quality of a ranked split."""
        is_candidate = np.zeros(self.store.num_items + 1, dtype=bool)
        is_candidate[self.candidates] = True
        values = user_values(ranking.topk_ids, self.store.item_ids[split.target])
        return quality(groups_of(self.store, split, self.item_counts, is_candidate), *values)

    def out_of_patience(self) -> bool:
        training = self.config.training
        return bool(training.patience and not training.max_steps and self.evaluations_since_best >= training.patience)

    # ---- checkpoints ----

    def save(self, valid_loss: float | None) -> Path:
        """Write a checkpoint of this very moment, update the links, remove what is not to be kept."""
        root = self.run.checkpoint_dir
        self.logger.sync()
        with self.updates.averaged():
            model_state = self.model.state_dict()
        if ("transitions" in self.__dict__ or not self.stop_signal) and self.transitions is not None:  # no time to count after a signal
            model_state |= self.transitions.to_state()
        path = checkpoints.save_checkpoint(
            root,
            step=self.step,
            valid_loss=valid_loss,
            model_state=model_state,
            trainer_state=self._trainer_state(),
            meta=self._meta(),
        )
        best = root / self.best_name
        if self.best_name == path.name:
            checkpoints.link(root, "best_model.pt", path)
        checkpoints.prune(root, self.config.training.keep_last_k, keep=[best] if self.best_name else [])
        write_status(self.run.log_dir, "running", self.step)
        return path

    def _trainer_state(self) -> dict:
        return {name: getattr(self, name) for name in PROGRESS} | {
            **self.updates.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loss": self.loss.state_dict(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def _meta(self) -> dict:
        """What infer() and a resumed run need to know of the run: settings, schema, the table's fields, the data's shape."""
        return {
            "config": self.config.to_dict(),
            "schema": self.store.schema.to_dict(),
            "layout": self.layout.to_list(),
            "embeddings": list(self.embeddings),
            "num_items": self.store.num_items,
            "num_users": self.store.num_users,
            "num_events": self.store.num_events,
            "item_ids": self._item_ids_digest,
            "store": self.store.manifest["fingerprint"],
            "epoch": self.epoch,
            "metrics": self._valid_metrics,
            **computed_on(self.device),
        }

    def _resume(self, path: Path, allow_other_data: bool = False) -> None:
        loaded = checkpoints.load_checkpoint(path, with_trainer=True)
        with checkpoints.fits(path / checkpoints.META):
            check_compatible(loaded.meta, self.config, self.layout, self.embeddings, path)
        if "averaged" in loaded.meta:
            raise UserError(f"--resume: {path} is a mean of checkpoints, without an optimiser's state. Start anew with --state_dict_path.")
        for line in [*changed_since(loaded.meta, self.config, self.store, path, self.device, allow_other_data)]:  # a refusal notes none
            self.logger.warn_once(line, keep=True)
        with checkpoints.fits(path):
            self._restore(loaded.model_state, loaded.trainer_state)
        self._valid_metrics = loaded.meta["metrics"]
        self.logger.say(f"resumed at step {self.step} from {path}")
        root = self.run.checkpoint_dir
        if not self.best_name or path.resolve().parent != root.resolve():  # going on in another run's folder
            self._forget_best()
            return
        try:
            if self.best_name != path.name:  # else it has just been read
                checkpoints.verify(root / self.best_name, (checkpoints.MODEL,))
            checkpoints.link(root, "best_model.pt", root / self.best_name)  # a kill between a save and its link left the old one
        except UserError as error:
            self.replace_best(error)

    def _forget_best(self) -> None:
        """The next evaluation, which is due now, is the best so far."""
        self.best_value, self.best_name, self.evaluations_since_best, self.evaluated_step = math.nan, "", 0, -1

    def replace_best(self, reason: UserError) -> None:
        """The best checkpoint is damaged or gone: warn, and take the best of those left that are whole and were evaluated.

        It is set aside, not deleted; the patience counts on. Without another the next evaluation is the best so far.
        """
        if isinstance(reason, ForeignFormatError):
            raise reason
        root, metric, lost = self.run.checkpoint_dir, self.config.eval.best_metric, self.best_name
        if lost and (root / lost).is_dir():
            checkpoints.set_aside(root / lost, self.logger.note)
        left = {path.name: meta["metrics"].get(metric) for path, meta in checkpoints.evaluated(root, self.logger.note)}
        values = {name: value if metric not in LOWER_IS_BETTER else -value for name, value in left.items() if value is not None}
        what = "none that was evaluated is left: the next evaluation is the best so far"
        if values:
            self.best_name = max(values, key=values.__getitem__)  # of equals the earliest, as in a run
            self.best_value = left[self.best_name]
            checkpoints.link(root, "best_model.pt", root / self.best_name)
            what = f"the best that is left is {self.best_name}, {metric} {self.best_value:.4f}"
        else:
            self._forget_best()
        self.logger.warn_once(f"the best checkpoint, {lost}, is lost: {' '.join(str(reason).split())}\n{what}.", keep=True)

    def _restore(self, model_state: dict[str, Tensor], state: dict) -> None:
        """What a checkpoint holds; whatever a damaged or strange one raises is fits's to explain."""
        for name in PROGRESS:
            value, present = state.get(name, getattr(self, name)), getattr(self, name)  # an older checkpoint lacks what came later
            if type(value) is not type(present) and not (isinstance(present, float) and type(value) is int):
                raise TypeError(f"{name} is {value!r:.40}")
            setattr(self, name, value)
        if self.best_name and not checkpoints.is_checkpoint_name(self.best_name):
            raise ValueError(f"best_name is {self.best_name[:80]!r}")
        self.load_weights(model_state)
        self.updates.load_state_dict(state)
        self.scaler.__dict__.update({name: state["scaler"][name] for name in self.scaler.state_dict()})
        self.loss.load_state_dict(state.get("loss", {}))
        torch.set_rng_state(state["torch_rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Within it a signal raises _StoppedError: an evaluation may last minutes, and who sends one waits seconds."""
        if self.stop_signal:
            raise _StoppedError
        self._may_stop_now = True
        try:
            yield
        finally:
            self._may_stop_now = False

    @contextmanager
    def _signals_noted(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the present step, or in an evaluation at once, with a checkpoint; a second one without."""

        def note(number: int, _frame: object) -> None:
            if self.stop_signal:
                raise Terminated(f"signal {number}") if number == signal.SIGTERM else KeyboardInterrupt
            self.stop_signal = number
            if self._may_stop_now:
                raise _StoppedError

        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, note) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before):
                signal.signal(number, handler)
