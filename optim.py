"""Optimisers: row-wise updates of the joint table, Adam, AdamW or Muon for the rest, one gradient norm for both, schedules.

Must not know of data or files.

Legend: R rows touched in a step, E table width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

import step_kernels
from embedding import JointTable, Touched
from muon import Muon, MuonAdamW, find_matrices
from parallel import MIN_ROWS, NUM_PIECES, row_pieces, run

CHUNK_ENTRIES = 1 << 21  # entries updated at a time on CPU: bounds the temporaries at 8 MiB each; smaller is no faster


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
        self.step_count = 0
        if kind == "adam":
            self.first = [torch.zeros_like(part) for part in table.parts]
            self.second = [torch.zeros_like(part) for part in table.parts]
        else:
            self.first = []
            self.second = [torch.zeros(len(part), device=part.device) for part in table.parts]

    @torch.no_grad()
    def step(self, touched: Touched, lr: float, scale: Tensor | float = 1.0) -> None:
        """Update the rows by their gradient times `scale` (clipping). The leaf and its gradient are overwritten.

        Call `begin_step` once before the calls of an update.
        """
        weight = self.table.parts[touched.part]
        chunk = (
            len(touched.rows)
            if weight.is_cuda
            else max(MIN_ROWS, min(CHUNK_ENTRIES // weight.shape[1], -(-len(touched.rows) // NUM_PIECES)))
        )
        parts = (t.split(max(1, chunk)) for t in (touched.rows, touched.leaf.grad, touched.leaf.detach()))

        fast = None if weight.is_cuda or self.kind == "adam" else step_kernels.compiled()
        if fast:
            arrays = (t.detach().contiguous().numpy() for t in (weight, self.second[touched.part], touched.rows, touched.leaf.grad))
            numbers = (np.float32(n) for n in (lr, scale, self.betas[1], self.eps, self.l2_emb, 1.0 - lr * self.weight_decay))
            step = partial(fast.rowwise, *arrays)
            options = (*numbers, self.kind == "rowwise_adagrad")
            run([partial(step, *piece, *options) for piece in row_pieces(len(touched.rows))])
            return

        def job(rows: Tensor, grad: Tensor, values: Tensor) -> None:
            factor = scale
            if self.l2_emb:
                grad, factor = grad.mul_(scale).add_(values, alpha=self.l2_emb), 1.0
            if self.weight_decay:
                values.mul_(1.0 - lr * self.weight_decay)
            update = self._full_moments if self.kind == "adam" else self._rowwise
            # The leaf is a copy of the rows as they were looked up: no second gather.
            _put_rows(weight, rows, update(touched.part, rows, values, grad, lr, factor))

        run([partial(job, *piece) for piece in zip(*parts)])

    def begin_step(self) -> None:
        self.step_count += 1

    def _full_moments(self, part: int, rows: Tensor, values: Tensor, grad: Tensor, lr: float, scale: Tensor | float) -> Tensor:
        """values (R, E) after Adam's update, in place."""
        beta1, beta2 = self.betas
        grad = grad if isinstance(scale, float) and scale == 1.0 else grad.mul_(scale)
        first = self.first[part].index_select(0, rows).lerp_(grad, 1 - beta1)
        second = self.second[part].index_select(0, rows).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        _put_rows(self.first[part], rows, first)
        _put_rows(self.second[part], rows, second)
        correction1, correction2 = 1 - beta1**self.step_count, 1 - beta2**self.step_count
        return values.addcdiv_(first, second.div_(correction2).sqrt_().add_(self.eps), value=-lr / correction1)

    def _rowwise(self, part: int, rows: Tensor, values: Tensor, grad: Tensor, lr: float, scale: Tensor | float) -> Tensor:
        """values (R, E) after the update, in place. What is one number a row is worked out a row: two passes over the gradient in all."""
        square = torch.linalg.vector_norm(grad, dim=1).mul_(scale).square_().div_(grad.shape[1])  # (R,) mean squares
        second = self.second[part].index_select(0, rows)
        if self.kind == "rowwise_adagrad":
            second = second + square
        else:
            # A row's first gradient starts its moment: a correction by the step count would misjudge rows first seen late.
            beta2 = self.betas[1]
            second = torch.where(second == 0, square, second.mul(beta2).add_(square, alpha=1 - beta2))
        self.second[part].index_copy_(0, rows, second)
        return values.addcmul_(grad, second.sqrt_().add_(self.eps).reciprocal_().mul_(scale)[:, None], value=-lr)

    def state_dict(self) -> dict:
        return {"kind": self.kind, "step_count": self.step_count, "first": self.first, "second": self.second}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError where the state is of another kind or shape."""
        there, here = ([tuple(t.shape) for t in moments] for moments in (state["second"], self.second))
        if state["kind"] != self.kind or there != here:
            raise ValueError(
                f"table optimiser: the checkpoint holds {state['kind']} of shapes {there}, the settings ask for {self.kind} of {here}."
            )
        self.step_count = state["step_count"]
        for mine, saved in zip((*self.first, *self.second), (*state["first"], *state["second"])):
            mine.copy_(saved)


def merge_touched(table: JointTable, batches: list[list[Touched]]) -> list[Touched]:
    """The touched rows of an update's batches, each row once with the sum of its gradients: one batch's as they are, else one a part.

    The table must not have changed between the batches' lookups.
    """
    if len(batches) == 1:
        return batches[0]
    merged = []
    for number, part in enumerate(table.parts):
        entries = [entry for batch in batches for entry in batch if entry.part == number]
        if entries:
            rows, place = torch.unique(torch.cat([entry.rows for entry in entries]), return_inverse=True)
            leaf = part.detach().index_select(0, rows)
            leaf.grad = torch.zeros_like(leaf).index_add_(0, place, torch.cat([entry.leaf.grad for entry in entries]))
            merged.append(Touched(number, rows, leaf))
    return merged


def _put_rows(matrix: Tensor, rows: Tensor, values: Tensor) -> None:
    """matrix[rows] = values, for (R,) distinct rows; on CPU two float32 at a time: two thirds of the time."""
    if not matrix.is_cuda and matrix.dtype == torch.float32 and matrix.shape[1] % 2 == 0:
        matrix, values = matrix.view(torch.float64), values.view(torch.float64)
    matrix.index_copy_(0, rows, values)


def dense_optimizer(
    model: nn.Module,
    kind: str,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    matrix_modules: Iterable[nn.Module] = (),
    muon_lr: float = 0.02,
    muon_momentum: float = 0.95,
) -> torch.optim.Optimizer | MuonAdamW:
    """Adam, or AdamW with decay on matrices only (norms, biases and vectors are left alone), for all parameters but the table's.

    "muon": the matrices within matrix_modules (muon.find_matrices) by Muon, the rest by AdamW.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if kind == "adam":
        return torch.optim.Adam(parameters, lr=lr, betas=betas, fused=True)
    matrices = find_matrices(matrix_modules) if kind == "muon" else []
    taken = {id(entry.weight) for entry in matrices}
    parameters = [p for p in parameters if id(p) not in taken]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
    return MuonAdamW(adamw, Muon(matrices, lr=muon_lr, momentum=muon_momentum, weight_decay=weight_decay)) if kind == "muon" else adamw


def gradient_norm(tensors: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients taken together, the table's rows included: a 0-d float32 tensor; not finite if any value is."""
    if not tensors:
        return torch.zeros(())
    parts = [part for tensor in tensors for part in _row_parts(tensor)]
    groups = [parts[start::NUM_PIECES] for start in range(min(NUM_PIECES, len(parts)))]
    norms = [norm.float() for group in run([partial(torch._foreach_norm, group) for group in groups]) for norm in group]
    return torch.linalg.vector_norm(torch.stack(norms))


def _row_parts(tensor: Tensor) -> list[Tensor]:
    """The tensor in pieces of rows, for several cores, where it is large."""
    if tensor.is_cuda or tensor.dim() < 2:
        return [tensor]
    return [tensor[begin:end] for begin, end in row_pieces(len(tensor))]


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
