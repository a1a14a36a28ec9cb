"""The joint sparse table of all categorical features, and the towers' first layer on its rows.

No dense gradient of the table is ever made: a step copies its unique rows into small leaf tensors, and optim.py updates
just these rows. Must not open files or move data between devices.

Legend: R unique rows of a step, Q those of one part of the table, E width of that part, D model width, M items or users.

Measured, 24,677 items of 14 features, 69,594 unique rows of width 32, one core: embedding_bag with a padding_idx 25 ms and as much
again backward; without padding_idx (then torch takes fbgemm's kernel) 0.8 ms, and the backward pass as another embedding_bag over the
transposed lists, which the loader's thread makes, 1.1 ms. Rejected for the backward pass: index_add_ (38 ms), a sparse CSR product
(3.3 ms). Compiled loops (step_kernels.py) do both, and the products, where numba is at hand; else torch's operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import machine_code
import step_kernels
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
            local = _rows_of(self.parts[part], rows, torch.is_grad_enabled())
            if torch.is_grad_enabled():
                self._touched.append(Touched(part, rows, local.requires_grad_()))
            found.append(local)
        return tuple(found)

    def pop_touched(self) -> list[Touched]:
        """Every lookup since the last call. Row sets are disjoint."""
        touched, self._touched = self._touched, []
        return touched


@torch.no_grad()
def _rows_of(matrix: Tensor, rows: Tensor, training: bool) -> Tensor:
    """matrix[rows] (Q, E), by several cores. training: compiled loops may be waited for."""
    if matrix.is_cuda:
        return matrix.index_select(0, rows)
    out = matrix.new_empty(len(rows), matrix.shape[1])
    if fast := step_kernels.compiled() if training and matrix.dtype == torch.float32 else None:
        arrays = [t.detach().numpy() for t in (matrix, rows, out)]
        run([partial(fast.take_rows, *arrays, *piece) for piece in row_pieces(len(rows))])
    else:
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
        ranges = [(number, inputs.segments[runs[number][0]], *of_field) for number, of_field in _field_ranges(runs, inputs.segments)]
        if weights and (fast := _kernels(tensors)):
            out = projected.numpy()
            arrays = [(rows.detach().numpy(), weight.detach().numpy()) for rows, weight in zip(local, weights)]
            run([partial(fast.project, *arrays[number], place, first, out, begin, end) for number, first, begin, end, place in ranges])
        else:
            jobs = []
            for number, first, begin, end, place in ranges:
                out, rows = projected[first + begin : first + end], local[number][begin:end]
                jobs.append(partial(mm, rows, weights[number][place], out=out) if weights else partial(out.copy_, rows))
            run(jobs)
        ctx.inputs, ctx.ranges, ctx.num_parts = inputs, ranges, num_parts
        ctx.save_for_backward(*tensors)
        return _sum_bags_in_pieces(projected, bags.index, bags.offsets, bags.weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        local, weights = ctx.saved_tensors[: ctx.num_parts], ctx.saved_tensors[ctx.num_parts :]
        back = _back_in_tiles if weights and _kernels(ctx.saved_tensors) else _back_by_torch
        grad_local, grad_weights = back(ctx.inputs.bags, ctx.ranges, local, weights, grad.contiguous())
        return None, None, None, *grad_local, *grad_weights


def _kernels(tensors: tuple[Tensor, ...]) -> step_kernels.StepKernels | None:
    """The compiled loops, where they can project these: float32, all of them."""
    return step_kernels.compiled() if machine_code.available() and all(t.dtype == torch.float32 for t in tensors) else None


def _back_in_tiles(bags: Bags, ranges: list[tuple], local: Sequence[Tensor], weights: Sequence[Tensor], grad: Tensor):
    """Gradients of the rows, (Q, E) a part, and of the weights, by compiled loops; of `forward`'s ranges, and grad (M, D)."""
    shares = grad.new_empty(0) if bags.thing_weights is None else bags.thing_weights
    project = partial(step_kernels.compiled().project_back, *(t.numpy() for t in (grad, bags.things, bags.starts, shares)))
    grad_local, grad_weights = [torch.empty_like(t) for t in local], [torch.zeros_like(t) for t in weights]
    arrays = [
        (t.detach().numpy(), w.detach().transpose(1, 2).contiguous().numpy(), g.numpy()) for t, w, g in zip(local, weights, grad_local)
    ]
    jobs, sums = [], []
    for number, first, begin, end, place in ranges:
        rows, turned, grad_rows = arrays[number]
        of_range = torch.empty_like(grad_weights[number][place])  # a sum of its own: which range comes first must not matter
        jobs.append(partial(project, rows, turned, place, first, grad_rows, of_range.numpy(), begin, end))
        sums.append((grad_weights[number][place], of_range))
    run(jobs)
    for target, of_range in sums:
        target.add_(of_range)
    return grad_local, grad_weights


def _back_by_torch(bags: Bags, ranges: list[tuple], local: Sequence[Tensor], weights: Sequence[Tensor], grad: Tensor):
    """The same by torch's operations; without weights the vectors were summed as they are."""
    grad_projected = _sum_bags_in_pieces(grad, bags.things, bags.starts, bags.thing_weights)  # (R, D)
    if not weights:
        return grad_projected[1:].split([len(rows) for rows in local]), ()
    grad_local, grad_weights = [torch.empty_like(t) for t in local], [torch.zeros_like(t) for t in weights]
    jobs, targets = [], []
    for number, first, begin, end, place in ranges:
        rows, of_rows = local[number][begin:end], grad_projected[first + begin : first + end]
        jobs.append(partial(_project_back, rows, of_rows, weights[number][place], grad_local[number][begin:end]))
        targets.append(grad_weights[number][place])
    for target, grad_weight in zip(targets, run(jobs)):
        target.add_(grad_weight)
    return grad_local, grad_weights


def _project_back(rows: Tensor, grad: Tensor, weight: Tensor, grad_rows: Tensor) -> Tensor:
    """For rows (n, E) @ weight (E, D) and its gradient (n, D): that of the rows into grad_rows; the weight's is returned."""
    mm(grad, weight.T, out=grad_rows)
    return mm(rows.T, grad)


def _sum_bags_in_pieces(vectors: Tensor, index: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
    """`_sum_bags` by several cores."""
    num = len(offsets) - 1
    pieces = row_pieces(num)
    if fast := step_kernels.compiled() if vectors.dtype == torch.float32 else None:
        out, shares = vectors.new_empty(num, vectors.shape[1]), vectors.new_empty(0) if weights is None else weights
        arrays = [t.numpy() for t in (vectors, index, offsets, shares, out)]
        run([partial(fast.sum_bags, *arrays, *piece) for piece in pieces])
        return out
    if len(pieces) == 1:
        return _sum_bags(vectors, index, offsets, weights)
    out = vectors.new_empty(num, vectors.shape[1])

    def job(begin: int, end: int, first: int, last: int) -> None:
        of_piece = None if weights is None else weights[first:last]
        out[begin:end] = _sum_bags(vectors, index[first:last], offsets[begin : end + 1] - first, of_piece)

    uses = [(int(offsets[begin]), int(offsets[end])) for begin, end in pieces]
    run([partial(job, *piece, *use) for piece, use in zip(pieces, uses)])
    return out
