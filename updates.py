"""One update of all of a model's weights: optimisers of the dense weights and of the table, their learning rates, the average.

Must not run a model, read data or know of epochs and files.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

import torch
from torch import Tensor, nn

from averaging import WeightAverage
from embedding import Touched
from optim import TableOptimizer, dense_optimizer, learning_rate_factor

MATRIX_MODULES = ("backbone", "item_projection", "user_projection", "dense")  # of the model: where muon looks for matrices
# Not "conditioning": its gate is used as x @ weight too, but is no hidden layer and starts at zero, as the identity. By Muon, whose steps
# are as large in every direction, test NDCG@10 was lower in 6 of 6 seeds, by .0040 of .18 (3,000 planted users, 4 epochs, width 32).
GROUPS = ("dense", "table", "muon")  # of weights, each with a learning rate of its own


class Updates:
    """What turns gradients into new weights, step by step.

    model: a Recommender. training: the training group of the settings. total_steps, steps_per_epoch: updates, for the schedules.
    """

    def __init__(self, model: nn.Module, training, total_steps: int, steps_per_epoch: int) -> None:
        self.model, self.training, self.total_steps, self.steps_per_epoch = model, training, total_steps, steps_per_epoch

    # Made when first asked for: an evaluation holds no moments.

    @cached_property
    def optimizer(self):
        """Of all weights but the table: a torch optimiser, or muon.MuonAdamW."""
        training = self.training
        return dense_optimizer(
            self.model,
            training.optimizer,
            lr=training.learning_rate,
            betas=(training.adam_beta1, training.adam_beta2),
            weight_decay=training.weight_decay,
            matrix_modules=[getattr(self.model, name) for name in MATRIX_MODULES],
            muon_lr=training.muon_learning_rate,
            muon_momentum=training.muon_momentum,
        )

    @cached_property
    def table_optimizer(self) -> TableOptimizer:
        training = self.training
        decay = 0.0 if training.optimizer == "adam" else training.weight_decay
        betas = (training.adam_beta1, training.adam_beta2)
        return TableOptimizer(self.model.table, training.table_optimizer, betas=betas, weight_decay=decay, l2_emb=training.l2_emb)

    @cached_property
    def average(self) -> WeightAverage | None:
        decay = self.training.ema_decay
        return WeightAverage(self.model, self.model.table, decay) if decay else None

    def averaged(self) -> AbstractContextManager:
        """Within it the model has the weights that are evaluated and saved: the averaged ones with ema_decay."""
        return nullcontext() if self.average is None else self.average.applied()

    @cached_property
    def _parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def gradients(self) -> list[Tensor]:
        """Of the weights that have one, the table's rows apart."""
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def apply(self, touched: list[Touched], scale: Tensor | float, step: int) -> None:
        """Update number `step` (from 0): all weights by their gradients times `scale`, which are overwritten; and their average."""
        grads = self.gradients()
        if grads and not (isinstance(scale, float) and scale == 1.0):
            torch._foreach_mul_(grads, scale)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step, group.get("schedule", "dense"))
        self.optimizer.step()
        self.model.keep_within_bounds()
        self.table_optimizer.begin_step()
        for entry in touched:
            with nullcontext() if self.average is None else self.average.follow(entry):
                self.table_optimizer.step(entry, self.learning_rate(step, "table"), scale)
        if self.average is not None:
            self.average.finish_update()

    def learning_rate(self, step: int, group: str) -> float:
        """At update `step`, of one of GROUPS."""
        training = self.training
        highest = {"table": training.table_learning_rate or training.learning_rate, "muon": training.muon_learning_rate}
        return highest.get(group, training.learning_rate) * self.learning_rate_factor(step, group)

    def learning_rate_factor(self, step: int, group: str) -> float:
        training = self.training
        schedule, warmup_steps = training.schedule(group)
        return learning_rate_factor(
            step,
            schedule=schedule,
            warmup_steps=warmup_steps,
            total_steps=self.total_steps,
            min_lr_ratio=training.min_lr_ratio,
            gamma=training.lr_gamma,
            steps_per_drop=training.lr_step_epochs * self.steps_per_epoch,
        )

    def too_long_warmups(self) -> list[str]:
        """A line for each warm-up that the run does not outlast."""
        lines = []
        for group in GROUPS if self.training.optimizer == "muon" else GROUPS[:2]:
            warmup = self.training.schedule(group)[1]
            name = "warmup_steps" if warmup == self.training.warmup_steps else f"{group}_warmup_steps"
            if warmup >= self.total_steps:
                lines.append(f"{name} {warmup} is no less than the run's {self.total_steps} steps.")
        return list(dict.fromkeys(lines))

    def state_dict(self) -> dict:
        """Moments, and with ema_decay the average's state and the weights as they are trained on (model.pt holds the averaged ones)."""
        state = {"optimizer": self.optimizer.state_dict(), "table_optimizer": self.table_optimizer.state_dict()}
        if self.average is not None:
            state |= {"average": self.average.state_dict(), "weights": dict(self.model.named_parameters())}
        return state

    def load_state_dict(self, state: dict) -> None:
        """state: `state_dict`'s, among others' keys; the model has been loaded before."""
        # torch would take over the saved run's weight decay and betas too; a resumed run goes on with those given now. The rate is set
        # before each update; where none follows (the last evaluation alone was due) it stays the saved one, as if there had been no stop.
        options = [{key: value for key, value in group.items() if key not in ("params", "lr")} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)
        self.table_optimizer.load_state_dict(state["table_optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
            self.model.load_state_dict(state["weights"], strict=False)  # buffers are the same in both
