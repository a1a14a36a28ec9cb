"""What attention's scores are told of two events' distance in the sequence and in time. Learnt biases only; no attention of its own.

Legend: B users, T tokens of the longest user, H heads, N packed tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

NUM_GAPS = 40  # log2 buckets of seconds between two events, up to some 17,000 years
WITH_USER = NUM_GAPS  # row of pairs with the user token, which has no time


class AttentionBias(nn.Module):
    """One value a head for each distance in tokens (relative) and for each log2 bucket of the seconds between two events (time).

    Both start at zero, so that a fresh model attends by content alone. A distance has a value of its own up to the longest sequence: they
    are few, and buckets of distances would blur the last events, which count most.
    Source: Shaw et al. 2018 and Raffel et al. 2020 (a bias a head and distance); Zhai et al., HSTU, 2024 (the sum with one of time).
    """

    def __init__(self, num_heads: int, max_tokens: int, relative: bool, time: bool) -> None:
        super().__init__()
        assert relative or time
        self.distance = nn.Parameter(torch.zeros(max_tokens, num_heads)) if relative else None
        self.gap = nn.Parameter(torch.zeros(NUM_GAPS + 1, num_heads)) if time else None

    def forward(self, pairs: Pairs) -> Tensor:
        """(1 or B, H, T, T) float32: query t, key s; -inf where s > t."""
        bias = pairs.causal
        if self.distance is not None:
            bias = bias + _look_up(self.distance, pairs.distance)
        if self.gap is not None:
            bias = bias + _look_up(self.gap, pairs.gap)
        return bias


class Pairs:
    """Rows of AttentionBias for all pairs of tokens of a batch, made once for all blocks.

    timestamps: (N,) int64 seconds; only read where time is true.
    """

    def __init__(self, packing, timestamps: Tensor, time: bool) -> None:
        place = torch.arange(packing.max_length, device=timestamps.device)
        self.distance = (place[:, None] - place).clamp_(min=0)[None]  # (1, T, T)
        self.causal = torch.full(self.distance.shape, -torch.inf, device=timestamps.device).triu_(1)[:, None]  # (1, 1, T, T)
        self.gap = None
        if time:
            times = packing.pad(timestamps[:, None])[..., 0]  # (B, T)
            seconds = (times[:, :, None] - times[:, None]).clamp_(min=0)
            # floor(log2(seconds + 1)) by whole numbers: a logarithm may fall on either side of a bucket's edge.
            edges = 2 ** torch.arange(1, NUM_GAPS, device=timestamps.device) - 1
            self.gap = torch.bucketize(seconds, edges, right=True)
            self.gap[:, 0] = self.gap[:, :, 0] = WITH_USER


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """(rows, H) at (B, T, T) -> (B, H, T, T)."""
    return table.index_select(0, index.reshape(-1)).view(*index.shape, -1).permute(0, 3, 1, 2)
