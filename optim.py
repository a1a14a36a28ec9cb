"""Optimisers: row-wise updates of the joint table, Adam and AdamW for the rest, one gradient norm for both, schedules.

Must not know of data or files.

Legend: R rows touched in a step, E table width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from embedding import JointTable


class TableOptimizer:
    """Updates the touched rows of a table in one pass; state has one float a row, or full moments.

    kind:
      "rowwise_adam": Adam without a first moment, with one second moment a row (the mean square of the row's gradient): 4 bytes a row.
      "rowwise_adagrad": one running sum of mean squares a row (as in FBGEMM's exact row-wise Adagrad): 4 bytes a row.
      "adam": both moments of each element, of touched rows only ("lazy" Adam); equal to Adam where every row is touched.
    l2_emb adds l2_emb * row to the gradient; weight_decay shrinks rows by lr * weight_decay (AdamW). Both act on touched rows only.
    """

    def __init__(
        self, table: JointTable, kind: str, *, betas: tuple[float, float], weight_decay: float = 0.0, l2_emb: float = 0.0, eps: float = 1e-8
    ) -> None:
        self.table, self.kind, self.betas, self.weight_decay, self.l2_emb, self.eps = table, kind, betas, weight_decay, l2_emb, eps
        rows, width = table.weight.shape
        device = table.weight.device
        self.step_count = 0
        if kind == "adam":
            self.first = torch.zeros(rows, width, device=device)
            self.second = torch.zeros(rows, width, device=device)
        else:
            self.second = torch.zeros(rows, device=device)

    @torch.no_grad()
    def step(self, rows: Tensor, grad: Tensor, lr: float, scale: Tensor | float = 1.0) -> None:
        """rows: (R,) unique; grad: (R, E), multiplied by `scale` (clipping) first. Row 0, the padding, is never changed.

        Call `begin_step` once before the calls of an update.
        """
        weight = self.table.weight
        values = weight.index_select(0, rows)
        grad = grad.float() * scale
        if self.l2_emb:
            grad = grad.add(values, alpha=self.l2_emb)
        if self.weight_decay:
            values = values * (1.0 - lr * self.weight_decay)
        update = self._direction(rows, grad)
        values = values.sub_(update, alpha=lr)
        if rows.numel():
            values[0].mul_((rows[0] != 0).to(values.dtype))
        weight.index_copy_(0, rows, values)

    def begin_step(self) -> None:
        self.step_count += 1

    def _direction(self, rows: Tensor, grad: Tensor) -> Tensor:
        beta1, beta2 = self.betas
        if self.kind == "adam":
            first = self.first.index_select(0, rows).lerp_(grad, 1 - beta1)
            second = self.second.index_select(0, rows).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            self.first.index_copy_(0, rows, first)
            self.second.index_copy_(0, rows, second)
            correction1, correction2 = 1 - beta1**self.step_count, 1 - beta2**self.step_count
            return (first / correction1).div_((second / correction2).sqrt_().add_(self.eps))
        square = grad.square().mean(dim=1)  # (R,)
        second = self.second.index_select(0, rows)
        if self.kind == "rowwise_adagrad":
            second = second + square
        else:
            # A row's first gradient starts its moment: a correction by the step count would misjudge rows first seen late.
            second = torch.where(second == 0, square, beta2 * second + (1 - beta2) * square)
        self.second.index_copy_(0, rows, second)
        return grad / (second.sqrt() + self.eps)[:, None]

    def state_dict(self) -> dict:
        state = {"kind": self.kind, "step_count": self.step_count, "second": self.second}
        return state | {"first": self.first} if self.kind == "adam" else state

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError where the state is of another kind or shape."""
        if state["kind"] != self.kind or state["second"].shape != self.second.shape:
            raise ValueError(f"table optimiser: the checkpoint holds {state['kind']} of shape {tuple(state['second'].shape)}, "
                             f"the settings ask for {self.kind} of {tuple(self.second.shape)}.")  # fmt: skip
        self.step_count = state["step_count"]
        self.second.copy_(state["second"])
        if self.kind == "adam":
            self.first.copy_(state["first"])


def dense_optimizer(model: nn.Module, kind: str, *, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer:
    """Adam, or AdamW with decay on matrices only (norms, biases and vectors are left alone), for all parameters but the table's."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if kind == "adam":
        return torch.optim.Adam(parameters, lr=lr, betas=betas, fused=True)
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def gradient_norm(tensors: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients taken together, the table's rows included: a 0-d float32 tensor; not finite if any value is."""
    if not tensors:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack([norm.float() for norm in torch._foreach_norm(tensors)]))


def clip_scale(norm: Tensor, gradient_clip: float) -> Tensor | float:
    """The factor that brings `norm` down to gradient_clip; 1 where it is below, or where gradient_clip is 0."""
    return (gradient_clip / (norm + 1e-6)).clamp(max=1.0) if gradient_clip else 1.0


def learning_rate_factor(
    step: int, *, schedule: str, warmup_steps: int, total_steps: int, min_lr_ratio: float = 0.0, steps_per_drop: int = 1, gamma: float = 0.5
) -> float:
    """The factor of the learning rate at update `step` (from 0).

    Warm-up is linear over warmup_steps, then "constant", "cosine" (down to min_lr_ratio at total_steps) or
    "step" (times gamma every steps_per_drop updates).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    if schedule == "step":
        return gamma ** (step // max(1, steps_per_drop))
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


class LossScaler:
    """The factor on a float16 loss: halved after a step that was not finite (which is skipped), doubled after growth_interval good ones.

    torch.amp.GradScaler does not serve: the table's rows are not an optimiser's parameters, and one verdict must rule both.
    """

    def __init__(self, enabled: bool, scale: float = 2.0**15, growth_interval: int = 2000) -> None:
        self.enabled, self.scale, self.growth_interval, self.good_steps, self.skipped = (
            enabled,
            scale if enabled else 1.0,
            growth_interval,
            0,
            0,
        )

    def update(self, finite: bool) -> None:
        if finite:
            self.good_steps += 1
            if self.good_steps == self.growth_interval:
                self.scale, self.good_steps = self.scale * 2, 0
        else:
            self.scale, self.good_steps, self.skipped = self.scale / 2, 0, self.skipped + 1

    def state_dict(self) -> dict:
        return {"scale": self.scale, "good_steps": self.good_steps, "skipped": self.skipped}
