"""Averages of weights: of one model over its updates, and of several models' states.

Must not know of optimisers, files or settings.

Legend: R rows touched in an update, E table width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from embedding import JointTable, Touched
from parallel import row_pieces, run

SMALLEST_SCALE = 2.0**-64  # of the lag: below it the table's lags are scaled anew, so that 1 / scale stays far from float32's end
CHUNK_ENTRIES = 1 << 20  # of a mean: its float64 sum is 8 MiB


class WeightAverage:
    """The exponential average of a model's trained weights over its updates.

    After update t, of weights w_1 .. w_t (those after each update): sum over i of decay^(t - i) w_i, divided by the sum of the factors. So
    it does not lean towards the initial weights (Adam's correction of its moments: Kingma and Ba 2015, section 3). Buffers have none.

    The table's average is kept as its lag, average - row, in units of `scale`. A row that an update leaves alone has the same weights
    again, and its lag shrinks by a factor that all such rows share: that is one number. So an update costs its touched rows only, and the
    average of every row is exact at any step, whenever it was last touched. A table of the same size holds the lags.
    """

    def __init__(self, model: nn.Module, table: JointTable, decay: float) -> None:
        own = {id(part) for part in table.parts}
        self.dense = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        self.table, self.decay, self.updates, self.scale = table, decay, 0, 1.0
        self.dense_average = [p.detach().clone() for p in self.dense]
        self.lag = [torch.zeros_like(part) for part in table.parts]

    @contextmanager
    def follow(self, touched: Touched) -> Iterator[None]:
        """Around an update of the touched rows (R, E). The leaf holds them as they were; it may be overwritten."""
        before = touched.leaf.detach().clone()
        yield
        if not self.updates:
            return  # the first update's weights are their own average: no lag
        lag, weight = self.lag[touched.part], self.table.parts[touched.part]

        def job(begin: int, end: int) -> None:
            rows = touched.rows[begin:end]
            change = before[begin:end].sub_(weight.detach().index_select(0, rows))
            lag.index_copy_(0, rows, lag.index_select(0, rows).add_(change, alpha=1.0 / self.scale))

        run([partial(job, *piece) for piece in row_pieces(len(touched.rows))])

    @torch.no_grad()
    def finish_update(self) -> None:
        """After an update of all weights, the rows' within `follow`."""
        self.updates += 1
        share = (1.0 - self.decay) / (1.0 - self.decay**self.updates)  # of the newest weights in the average
        torch._foreach_lerp_(self.dense_average, self.dense, share)
        if self.updates > 1:
            self.scale *= 1.0 - share
        if self.scale < SMALLEST_SCALE:  # by the number of updates alone, never by when something is saved
            torch._foreach_mul_(self.lag, self.scale)
            self.scale = 1.0

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the model has the averaged weights; a table's copy is made for it."""
        weights = [*self.dense, *self.table.parts]
        with torch.no_grad():
            averaged = [*self.dense_average, *(part.add(lag, alpha=self.scale) for part, lag in zip(self.table.parts, self.lag))]
        raw = [weight.data for weight in weights]
        for weight, value in zip(weights, averaged):
            weight.data = value
        try:
            yield
        finally:
            for weight, value in zip(weights, raw):
                weight.data = value

    def state_dict(self) -> dict:
        return {"updates": self.updates, "scale": self.scale, "dense": self.dense_average, "lag": self.lag}

    def load_state_dict(self, state: dict) -> None:
        self.updates, self.scale = state["updates"], state["scale"]
        for mine, saved in zip((*self.dense_average, *self.lag), (*state["dense"], *state["lag"]), strict=True):
            mine.copy_(saved)


def mean_state(states: list[dict[str, Tensor]], names: list[str]) -> dict[str, Tensor]:
    """The mean of several models' states, tensor by tensor, summed in float64; what is not a float is the first model's.

    names: of the states, for messages. Raises ValueError that names every tensor that not all have in the same shape and dtype.
    """
    different = []
    for name, state in zip(names[1:], states[1:]):
        for key in dict.fromkeys((*states[0], *state)):
            there, here = ([tuple(s[key].shape), str(s[key].dtype)] if key in s else "missing" for s in (states[0], state))
            if there != here:
                different.append(f"{key}: {_shape(there)} in {names[0]}, {_shape(here)} in {name}")
    if different:
        raise ValueError("; ".join(different))
    return {key: _mean([state[key] for state in states]) for key in states[0]}


def _shape(found: list | str) -> str:
    return found if isinstance(found, str) else f"{found[0]} {found[1].removeprefix('torch.')}"


def _mean(tensors: list[Tensor]) -> Tensor:
    first = tensors[0]
    if not first.is_floating_point():
        return first.clone()
    mean = torch.empty(first.numel(), dtype=first.dtype)
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, len(mean), CHUNK_ENTRIES):
        part = slice(start, start + CHUNK_ENTRIES)
        mean[part] = sum(tensor[part].double() for tensor in flat) / len(flat)
    return mean.view(first.shape)
