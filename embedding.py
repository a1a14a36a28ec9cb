"""The joint sparse table of all categorical features, and the towers' first layer on its rows.

No dense gradient of the table is ever made: a step copies its unique rows into a small leaf tensor, and optim.py updates
just these rows. Must not open files or move data between devices.

Legend: R unique rows of a step, E table width, D model width, M items or users.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from features import Field, Ragged, SideInputs


class JointTable(nn.Module):
    """Vectors of all values of all categorical features, as row ranges of one matrix; row 0 is padding and stays zero."""

    def __init__(self, num_rows: int, width: int, init_std: float) -> None:
        super().__init__()
        # Not a trained parameter for torch's optimisers: its rows are updated by optim.TableOptimizer.
        self.weight = nn.Parameter(torch.empty(num_rows, width).normal_(0.0, init_std), requires_grad=False)
        with torch.no_grad():
            self.weight[0].zero_()
        self._touched: list[tuple[Tensor, Tensor]] = []

    def lookup(self, rows: Tensor) -> Tensor:
        """Copy unique rows (R,) out of the table: (R, E). While gradients are on, remembered as a leaf until `pop_touched`."""
        local = self.weight.index_select(0, rows)
        if torch.is_grad_enabled():
            local.requires_grad_()
            self._touched.append((rows, local))
        return local

    def pop_touched(self) -> list[tuple[Tensor, Tensor]]:
        """(rows, leaf) of every lookup since the last call; the leaf's .grad holds the rows' gradient. Row sets are disjoint."""
        touched, self._touched = self._touched, []
        return touched


class RowProjection(nn.Module):
    """The first linear layer of a tower on the concatenation of its features' vectors, as a sum over features.

    A linear layer on concat(v_1 .. v_k) is the sum of W_f v_f. So each unique row is projected once (R x E x D instead of
    M x k x E x D multiplications), and an item gathers and sums projected rows. With `project` off the vectors are summed as they
    are (E = D).
    """

    def __init__(self, fields: tuple[Field, ...], table_width: int, width: int, project: bool) -> None:
        super().__init__()
        self.num_single = sum(field.kind == "single" for field in fields)
        self.width = width
        self.weight = None
        if project and fields:
            # Fan-in E, not k * E: each feature keeps the scale of its vectors, as it would in a plain sum.
            self.weight = nn.Parameter(torch.empty(len(fields), table_width, width).normal_(0.0, table_width**-0.5))

    def forward(self, local: Tensor, inputs: SideInputs) -> Tensor:
        """local: (R, E) the unique rows. Result (M, D): the sum over the features of each thing."""
        projected = local  # (R, D) from here on
        if self.weight is not None:
            blocks = [local.new_zeros(1, self.width)]
            for field, (begin, end) in enumerate(zip(inputs.segments, inputs.segments[1:])):
                blocks.append(local[begin:end] @ self.weight[field])
            projected = torch.cat(blocks)
        num = inputs.single.shape[0]
        out = projected.new_zeros(num, self.width)
        if self.num_single:
            out = F.embedding_bag(inputs.single, projected, mode="sum", padding_idx=0)
        for ragged in inputs.multi:
            out = out + pooled(projected, ragged)
        return out


def pooled(vectors: Tensor, ragged: Ragged) -> Tensor:
    """Weighted sum of each thing's rows: vectors (R, D) -> (M, D); a thing without values gets zeros."""
    if not ragged.index.numel():
        return vectors.new_zeros(ragged.offsets.shape[0], vectors.shape[1])
    return F.embedding_bag(
        ragged.index, vectors, ragged.offsets, mode="sum", per_sample_weights=ragged.weights.to(vectors.dtype), padding_idx=0
    )
