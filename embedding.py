"""The joint sparse table of all categorical features, and the towers' first layer on its rows.

No dense gradient of the table is ever made: a step copies its unique rows into small leaf tensors, and optim.py updates
just these rows. Must not open files or move data between devices.

Legend: R unique rows of a step, Q those of one part of the table, E width of that part, D model width, M items or users.

Measured, 24,677 items of 14 features, 69,594 unique rows of width 32, one core: embedding_bag with a padding_idx 25 ms and as much
again backward; without padding_idx (then torch takes fbgemm's kernel) 0.8 ms, and the backward pass as another embedding_bag over the
transposed lists, which the loader's thread makes, 1.1 ms. Rejected for the backward pass: index_add_ (38 ms), a sparse CSR product
(3.3 ms).
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from blas import mm
from features import ITEM_ID, Bags, Field, SideInputs, TableLayout
from parallel import row_pieces, run

BLOCK_ROWS = 8192  # rows of a field that are projected by one product


class Touched(NamedTuple):
    """Rows of a part of the table that a step has looked up; the leaf's .grad is their gradient."""

    part: int
    rows: Tensor  # (Q,) int64 rows of the part, unique, without the padding row
    leaf: Tensor  # (Q, E)


class JointTable(nn.Module):
    """Vectors of all values of all categorical features, as row ranges of one matrix a width; row 0 is padding and stays zero."""

    def __init__(self, layout: TableLayout, init_std: float, id_init: str = "normal") -> None:
        """id_init: of the item ids' rows and all hash tables, "normal" as the other rows, or "zero"."""
        super().__init__()
        # Not trained parameters for torch's optimisers: their rows are updated by optim.TableOptimizer.
        self.parts = nn.ParameterList(
            nn.Parameter(torch.empty(part.end - part.begin, part.width).normal_(0.0, init_std), requires_grad=False)
            for part in layout.parts
        )
        self._begins = [part.begin for part in layout.parts]
        with torch.no_grad():
            self.parts[0][0].zero_()
            for field in layout.fields if id_init == "zero" else ():
                if field.name == ITEM_ID or field.hash:
                    part = next(i for i, part in enumerate(layout.parts) if field.offset + 1 < part.end)
                    first = field.offset + 1 - self._begins[part]
                    self.parts[part][first : first + field.size].zero_()
        self._runs = {side: _runs(layout, side) for side in ("item", "user")}
        self._touched: list[Touched] = []

    def lookup(self, side: str, inputs: SideInputs) -> tuple[Tensor, ...]:
        """Copies of the unique rows, one (Q, E) a part that the side has fields in. While gradients are on, leaves: see `pop_touched`."""
        found = []
        for part, first, last in self._runs[side]:
            rows = inputs.rows[inputs.segments[first] : inputs.segments[last]]
            if self._begins[part]:
                rows = rows - self._begins[part]
            local = _rows_of(self.parts[part], rows)
            if torch.is_grad_enabled():
                self._touched.append(Touched(part, rows, local.requires_grad_()))
            found.append(local)
        return tuple(found)

    def pop_touched(self) -> list[Touched]:
        """Every lookup since the last call. Row sets are disjoint."""
        touched, self._touched = self._touched, []
        return touched


@torch.no_grad()
def _rows_of(matrix: Tensor, rows: Tensor) -> Tensor:
    """matrix[rows] (Q, E), by several cores."""
    if matrix.is_cuda:
        return matrix.index_select(0, rows)
    out = matrix.new_empty(len(rows), matrix.shape[1])
    run([partial(torch.index_select, matrix, 0, rows[begin:end], out=out[begin:end]) for begin, end in row_pieces(len(rows))])
    return out


def _runs(layout: TableLayout, side: str) -> list[tuple[int, int, int]]:
    """(part, first field, one past the last field) of a side's neighbouring fields in the same part."""
    runs: list[tuple[int, int, int]] = []
    for number, field in enumerate(layout.side(side)):
        part = next(i for i, part in enumerate(layout.parts) if field.offset + 1 < part.end)
        if runs and runs[-1][0] == part:
            runs[-1] = (part, runs[-1][1], number + 1)
        else:
            runs.append((part, number, number + 1))
    return runs


class RowProjection(nn.Module):
    """The first linear layer of a tower on the concatenation of its features' vectors, as a sum over features.

    A linear layer on concat(v_1 .. v_k) is the sum of W_f v_f. So each unique row is projected once (R x E x D instead of
    M x k x E x D multiplications), and an item gathers and sums projected rows. With `project` off the vectors are summed as they
    are (E = D).
    """

    matrix_stacks = {"weights": 1}  # muon.py

    def __init__(self, layout: TableLayout, side: str, width: int, project: bool) -> None:
        super().__init__()
        fields = layout.side(side)
        self.width, self.num_fields = width, len(fields)
        self.runs = [(first, last) for _, first, last in _runs(layout, side)]
        self.weights = nn.ParameterList(_projection(fields[first:last], width) for first, last in self.runs if project)

    def forward(self, local: tuple[Tensor, ...], inputs: SideInputs) -> Tensor:
        """local: the unique rows, one (Q, E) a part. Result (M, D): the sum over the features of each thing; float32."""
        with torch.autocast(inputs.rows.device.type, enabled=False):
            if inputs.rows.device.type == "cpu" and inputs.bags.things is not None and self.num_fields:
                return _ProjectAndSum.apply(inputs, self.runs, len(local), *local, *self.weights)
            return self._by_autograd(local, inputs)

    def _by_autograd(self, local: tuple[Tensor, ...], inputs: SideInputs) -> Tensor:
        """The same, from torch's own differentiable parts: for CUDA, whose kernel spreads a row of many uses, and for evaluation."""
        blocks = [inputs.rows.new_zeros(1, self.width, dtype=torch.float32)]
        for number, (begin, end, place) in _field_ranges(self.runs, inputs.segments):
            rows = local[number][begin:end]
            blocks.append(rows @ self.weights[number][place] if self.weights else rows)
        bags = inputs.bags
        if not bags.index.numel():
            return blocks[0].expand(bags.offsets.shape[0] - 1, -1)
        return _sum_bags(torch.cat(blocks), bags.index, bags.offsets, bags.weights)


def _projection(fields: tuple[Field, ...], width: int) -> nn.Parameter:
    """(fields, E, D). Fan-in E, not fields * E: each feature keeps the scale of its vectors, as it would in a plain sum."""
    table_width = fields[0].width
    return nn.Parameter(torch.empty(len(fields), table_width, width).normal_(0.0, table_width**-0.5))


def _field_ranges(runs: list[tuple[int, int]], segments: tuple[int, ...]):
    """(number of the run, (begin, end in the run's rows, place of the field in the run)) field by field, in blocks of BLOCK_ROWS."""
    for number, (first, last) in enumerate(runs):
        base = segments[first]
        for place, (begin, end) in enumerate(pairwise(segments[first : last + 1])):
            for first_row in range(begin, end, BLOCK_ROWS):  # a large field's rows go to several cores
                yield number, (first_row - base, min(end, first_row + BLOCK_ROWS) - base, place)


def _sum_bags(vectors: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
    """Sum of vectors (R, D) at index[offsets[m]:offsets[m + 1]], times weights: (M, D)."""
    return F.embedding_bag(index, vectors, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


class _ProjectAndSum(torch.autograd.Function):
    """RowProjection on CPU, with a backward pass by the transposed lists."""

    @staticmethod
    def forward(ctx, inputs: SideInputs, runs: list[tuple[int, int]], num_parts: int, *tensors: Tensor) -> Tensor:
        local, weights = tensors[:num_parts], tensors[num_parts:]
        bags: Bags = inputs.bags
        width = weights[0].shape[2] if weights else local[0].shape[1]
        projected = local[0].new_empty(inputs.rows.shape[0], width)  # (R, D)
        projected[0] = 0
        jobs, start = [], 1
        for run_number, (begin, end, place) in _field_ranges(runs, inputs.segments):
            out, rows = projected[start : start + end - begin], local[run_number][begin:end]
            jobs.append(partial(mm, rows, weights[run_number][place], out=out) if weights else partial(out.copy_, rows))
            start += end - begin
        run(jobs)
        ctx.inputs, ctx.runs, ctx.num_parts = inputs, runs, num_parts
        ctx.save_for_backward(*tensors)
        return _sum_bags_in_pieces(projected, bags.index, bags.offsets, bags.weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        inputs, bags = ctx.inputs, ctx.inputs.bags
        local, weights = ctx.saved_tensors[: ctx.num_parts], ctx.saved_tensors[ctx.num_parts :]
        grad_projected = _sum_bags_in_pieces(grad.contiguous(), bags.things, bags.starts, bags.thing_weights)[1:]  # (R - 1, D)
        if not weights:
            return None, None, None, *grad_projected.split([len(rows) for rows in local])
        grad_local, grad_weights = [torch.empty_like(t) for t in local], [torch.zeros_like(t) for t in weights]
        jobs, targets, start = [], [], 0
        for run_number, (begin, end, place) in _field_ranges(ctx.runs, inputs.segments):
            rows, part = local[run_number][begin:end], grad_projected[start : start + end - begin]
            jobs.append(partial(_project_back, rows, part, weights[run_number][place], grad_local[run_number][begin:end]))
            targets.append(grad_weights[run_number][place])
            start += end - begin
        for target, grad_weight in zip(targets, run(jobs)):
            target.add_(grad_weight)
        return None, None, None, *grad_local, *grad_weights


def _project_back(rows: Tensor, grad: Tensor, weight: Tensor, grad_rows: Tensor) -> Tensor:
    """For rows (n, E) @ weight (E, D) and its gradient (n, D): that of the rows into grad_rows; the weight's is returned."""
    mm(grad, weight.T, out=grad_rows)
    return mm(rows.T, grad)


def _sum_bags_in_pieces(vectors: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
    """`_sum_bags` by several cores."""
    pieces = row_pieces(len(offsets) - 1)
    if len(pieces) == 1:
        return _sum_bags(vectors, index, offsets, weights)
    out = vectors.new_empty(len(offsets) - 1, vectors.shape[1])

    def job(begin: int, end: int, first: int, last: int) -> None:
        of_piece = None if weights is None else weights[first:last]
        out[begin:end] = _sum_bags(vectors, index[first:last], offsets[begin : end + 1] - first, of_piece)

    uses = [(int(offsets[begin]), int(offsets[end])) for begin, end in pieces]
    run([partial(job, *piece, *use) for piece, use in zip(pieces, uses)])
    return out
