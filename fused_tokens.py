"""A sequence's first vectors in training on CPU as one differentiable function of compiled loops: one pass over the tokens each way.

The vectors of items and users, of actions, positions and times are gathered and summed, normalised and thinned by dropout, with the masks
that layers.Dropout would draw. What the loops cannot do is left to torch: see `takes`.

Measured, one thread of a Zen 5 beside two other processes, torch's operations and this in turn, median difference of a training step's
processor time: .9 ms of the baseline's 36, 5.0 of the default settings' 380 (12,800 tokens).

Legend: N packed tokens, D width, M unique items, B users, F fields of small tables, R rows of all these tables and one of zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import token_kernels
from dataset import Batch
from layers import Dropout, draw_mask, hooked, loops_fit
from parallel import Piece, row_pieces, run
from time_features import DAY, HOUR, TimeFeatures

_UNITS = {"hour": HOUR, "weekday": DAY, "day": DAY}  # seconds


class Parts(NamedTuple):
    """The modules whose work it is; None where the model has no such thing."""

    actions: nn.Embedding | None
    positions: nn.Embedding | None
    time: TimeFeatures | None
    norm: nn.Module  # LayerNorm or Identity
    dropout: Dropout


class _Task(NamedTuple):
    """What `_Embed` needs besides tensors with gradients."""

    columns: tuple[np.ndarray, ...]  # (N,) int64 each: items, owner, positions
    rows: np.ndarray  # (N, F) int32 of the joint small table
    eps: float  # of the norm
    pieces: list[Piece]
    masks: list[tuple[np.uint64, np.uint64, np.float32]]  # a piece: arguments of the loops


def takes(parts: Parts, history: Tensor, users: Tensor) -> bool:
    """Whether `embed` does what parts ask of vectors of items (M, D) and users (B, D)."""
    watched = [module for module in (parts.time, parts.norm, parts.dropout) if module is not None]
    thinned = parts.dropout.training and parts.dropout.cut
    return (
        loops_fit(history)
        and users.dtype == history.dtype
        and (parts.time is None or parts.time.fourier is None)
        and not (thinned and history.shape[1] % 4)  # a row of whole draws
        and not hooked(*watched)
        and token_kernels.compiled() is not None
    )


def embed(
    parts: Parts, history: Tensor, users: Tensor, batch: Batch, pieces: Sequence[Piece], generators: Sequence[torch.Generator]
) -> Tensor:
    """What the sequence encoder is given (N, D) of vectors of items (M, D) and users (B, D).

    pieces: tokens of whole users each. generators: of their masks; one draw each where there is dropout.
    """
    fields = [(token_kernels.ACTION, 1, parts.actions), (token_kernels.POSITION, 1, parts.positions)]
    for name in parts.time.tables if parts.time is not None else ():
        kind = token_kernels.GAP if name == "gap" else token_kernels.PERIOD
        fields.append((kind, _UNITS.get(name, 1), getattr(parts.time, name)))
    fields = [(kind, unit, table.weight) for kind, unit, table in fields if table is not None]
    rows = _table_rows(batch, fields, pieces)
    cut = parts.dropout.cut if parts.dropout.training else 0
    masks = [draw_mask(cut, generator) for generator in generators]
    norm = (parts.norm.weight, parts.norm.bias) if isinstance(parts.norm, nn.LayerNorm) else (history.new_empty(0), history.new_empty(0))
    columns = tuple(column.numpy() for column in (batch.item_index, batch.owner, batch.positions))
    task = _Task(columns, rows, getattr(parts.norm, "eps", 0.0), list(pieces), masks)
    return _Embed.apply(task, history.contiguous(), users.contiguous(), *norm, *(table for _, _, table in fields))


def _table_rows(batch: Batch, fields: list[tuple[int, int, Tensor]], pieces: Sequence[Piece]) -> np.ndarray:
    """(N, F) int32 rows of the joint table, whose first is zeros. fields: kind, unit in seconds, table. IndexError beyond a table."""
    rows, ends = np.empty((len(batch.owner), len(fields)), np.int32), np.cumsum([1, *(len(table) for *_, table in fields)])
    numbers = [(kind, unit, len(table), first) for (kind, unit, table), first in zip(fields, ends)]
    find = partial(
        token_kernels.compiled().table_rows,
        *(column.numpy() for column in (batch.positions, batch.action_types, batch.timestamps)),
        np.array(numbers, np.int64).reshape(-1, 4),
    )
    if not all(run([partial(find, *piece, rows) for piece in pieces])):
        raise IndexError(
            f"a batch's positions or action types are beyond the model's tables of {[len(table) for *_, table in fields]} rows"
        )
    return rows


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, task: _Task, history: Tensor, users: Tensor, gain: Tensor, shift: Tensor, *tables: Tensor) -> Tensor:
        loops, (num, width) = token_kernels.compiled(), (len(task.rows), history.shape[1])
        with_norm = len(gain) > 0
        out, normed, scales = torch.empty(num, width), torch.empty(num if with_norm else 0, width), torch.empty(num if with_norm else 0)
        joint = torch.cat((history.new_zeros(1, width), *(table.detach() for table in tables)))
        inputs = *_arrays(history, users), *task.columns, joint.numpy(), task.rows, *_arrays(gain, shift), task.eps
        outs = _arrays(normed, scales, out)
        run([partial(loops.embed, *inputs, *mask, *piece, *outs) for mask, piece in zip(task.masks, task.pieces)])
        ctx.save_for_backward(gain, normed, scales)
        ctx.task, ctx.lengths = task, [len(t) for t in (history, users, *tables)]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        loops, task, (num_items, num_users, *sizes) = token_kernels.compiled(), ctx.task, ctx.lengths
        gain, normed, scales = _arrays(*ctx.saved_tensors)
        num, width = grad.shape
        inputs = grad.contiguous().numpy(), task.rows, gain, normed, scales
        of_tokens = np.empty((num, width), np.float32)
        starts, tokens = np.zeros(num_items + num_users + 2, np.int64), np.empty(num, np.int32)

        def job(mask: tuple, piece: Piece) -> list[Tensor]:
            sums = [torch.empty(1 + sum(sizes), width), torch.empty(len(gain)), torch.empty(len(gain))]
            loops.embed_back(*inputs, *mask, *piece, of_tokens, *_arrays(*sums))
            return sums

        sort = partial(loops.by_source, *task.columns, num_items, starts, tokens)  # beside the others
        _, *sums = run([sort, *(partial(job, *both) for both in zip(task.masks, task.pieces))])
        of_tables, of_gain, of_shift = (sum(parts) for parts in zip(*sums))
        of_sources, jobs, before = [], [], 0
        for size in (num_items, num_users):
            of_sources.append(torch.empty(size, width))
            to = of_sources[-1].numpy()
            jobs += [partial(loops.sum_tokens, of_tokens, tokens, starts, before, *piece, to) for piece in row_pieces(size)]
            before += size
        run(jobs)
        return None, *of_sources, *((of_gain, of_shift) if len(gain) else (None, None)), *of_tables[1:].split(sizes)


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [t.detach().numpy() for t in tensors]
