"""What a token is told of its event's time: gap, hour, weekday, day, and waves of absolute time. Times of past events only.

A query may use the times of the events before its target and no other: when the target comes is not known when a user is answered, and the
profile record's timestamp, which is the target's or the last event's, never reaches the store (tests/test_time_features.py).

Legend: N packed tokens, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from layers import pick

HOUR, DAY = 3600, 86_400  # seconds
# day: rows of its table, used in turn. Counted from 1970, so that no first day of the data has to be kept with a checkpoint and no later
# day is out of range. Days 1,024 apart share a row; what lies between, the event's gap and month, tells them apart where a set is so long.
DAYS = 1024
SIZES = {"gap": 32, "hour": 24, "weekday": 7, "day": DAYS}
PERIODS = (DAY, 7 * DAY, 2_629_746, 31_556_952)  # fourier: day, week, and a twelfth of and the whole of the mean Gregorian year; seconds


class TimeFeatures(nn.Module):
    """The sum of the vectors of some fields of an event's time.

    gap: since the previous event, in log2 buckets of seconds. hour, weekday: of UTC. day: its number since 1970, modulo DAYS; the vectors
    start at zero, so that a day without training events adds nothing. fourier: a linear layer on sines and cosines of PERIODS, which is
    defined for any time and smooth, so that it goes on past the last day of training.
    fields: names in SIZES and "fourier", at least one.
    """

    def __init__(self, width: int, init_std: float, fields: tuple[str, ...]) -> None:
        super().__init__()
        self.tables = tuple(name for name in SIZES if name in fields)
        assert self.tables or fields == ("fourier",), fields
        for name in self.tables:
            setattr(self, name, nn.Embedding(SIZES[name], width))
        for name in self.tables:
            if name == "day":
                nn.init.zeros_(self.day.weight)
            else:
                nn.init.normal_(getattr(self, name).weight, std=init_std)
        num_waves = 2 * len(PERIODS)
        # A cosine and its sine have squares of sum 1: with this the result has the scale of the other vectors.
        std = init_std * (2 / num_waves) ** 0.5
        self.fourier = nn.Parameter(torch.empty(num_waves, width).normal_(0.0, std)) if "fourier" in fields else None

    def forward(self, timestamps: Tensor, positions: Tensor) -> Tensor:
        """timestamps: (N,) seconds since 1970, 0 at user tokens; positions: (N,), 0 = user token. Result (N, D), zeros at user tokens."""
        vectors = [pick(getattr(self, name), bucket(name, timestamps, positions)) for name in self.tables]
        if self.fourier is not None:
            vectors.append(waves(timestamps) @ self.fourier)
        return sum(vectors[1:], vectors[0]) * (positions > 0)[:, None]


def bucket(name: str, timestamps: Tensor, positions: Tensor) -> Tensor:
    """Row of each event (N,) int64 in the table of a field of SIZES. timestamps, positions: as in TimeFeatures.forward."""
    if name != "gap":
        return timestamps // (HOUR if name == "hour" else DAY) % SIZES[name]
    gap = torch.zeros_like(timestamps)
    gap[1:] = timestamps[1:] - timestamps[:-1]
    gap = torch.where(positions > 1, gap.clamp(min=0), 0)  # a window's first event has no gap that is known
    return torch.log2(gap.double() + 1).long().clamp(max=SIZES[name] - 1)


def waves(timestamps: Tensor) -> Tensor:
    """Cosines, then sines of 2 pi t / period for PERIODS: (N,) int64 seconds -> (N, 2 * periods) float32.

    The remainder is taken of whole seconds: as float32, a time of 1.7e9 seconds is off by up to a minute.
    """
    periods = torch.tensor(PERIODS, device=timestamps.device)
    phase = (timestamps[:, None] % periods).double() / periods * (2 * math.pi)
    return torch.cat((phase.cos(), phase.sin()), dim=1).float()
