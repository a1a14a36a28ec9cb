"""Sequence encoders: stacks of causal blocks on packed tokens, (N, D) -> (N, D). No item, no user, no loss.

Legend: B users, T tokens of the longest user, N packed tokens, D width, H heads.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fused_block
from attention_bias import AttentionBias, Pairs
from blas import Linear
from experts import Experts
from layers import CausalSelfAttention, Dropout, FeedForward, Packing, Queries, is_exporting, linear_rows, make_norm, rotary, rotate
from parallel import replayed

POINTWISE_USERS = 64  # users whose pointwise attention's scores are held at once where no gradient is wanted


class Sequence(NamedTuple):
    """What all blocks need of a batch besides the tokens' vectors."""

    packing: Packing
    cos_sin: tuple[Tensor, Tensor] | None  # rotary positions
    pairs: Pairs | None  # for biases of distance and time
    queries: Queries | None = None  # the tokens whose results are wanted; None = all

    def wanted(self, x: Tensor) -> Tensor:
        """(N, D) -> (Q, D), the wanted rows."""
        return x if self.queries is None else x.index_select(0, self.queries.tokens)


class _Block(nn.Module):
    """What blocks share. A block maps (N, D) and a Sequence to the wanted (Q, D) and its experts' balance, None without experts."""

    def __init__(self, config, mixer: nn.Module, feed_forward: nn.Module | None) -> None:
        super().__init__()
        relative = config.position == "relative"
        biased = relative or config.time_bias
        self.norm_first = config.norm_first
        # The order of modules is that of the optimiser's state in checkpoints, and of the draws of initial weights: new ones at the end.
        self.attention = mixer
        self.feed_forward = Experts(config) if config.num_experts else feed_forward
        self.attention_norm = make_norm(config.norm, config.hidden_units)
        self.feed_forward_norm = make_norm(config.norm, config.hidden_units) if self.feed_forward is not None else None
        self.dropout = Dropout(config.dropout_rate)
        self.bias = AttentionBias(config.num_heads, config.max_seq_length + 1, relative, config.time_bias) if biased else None

    def _scores_bias(self, sequence: Sequence) -> Tensor | None:
        return None if self.bias is None else self.bias(sequence.pairs)

    def _fed_forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x after the feed-forward's residual branch."""
        found = self.feed_forward(self.feed_forward_norm(x) if self.norm_first else x)
        out, balance = found if isinstance(found, tuple) else (found, None)
        x = x + self.dropout(out)
        return (x if self.norm_first else self.feed_forward_norm(x)), balance


class TransformerBlock(_Block):
    """Attention and feed-forward with residual branches, normalised before (pre-norm) or after each (post-norm)."""

    def __init__(self, config) -> None:
        width = config.hidden_units
        attention = CausalSelfAttention(width, config.num_heads, config.attention_dropout)
        super().__init__(config, attention, FeedForward(width, config.ffn_multiplier, config.activation, config.dropout_rate))

    def forward(self, x: Tensor, sequence: Sequence) -> tuple[Tensor, Tensor | None]:
        if fused_block.takes(self, x, sequence):
            return fused_block.run_block(self, x, sequence), None
        mixed = self._mix(self.attention_norm(x) if self.norm_first else x, sequence)
        x = sequence.wanted(x) + self.dropout(mixed)
        return self._fed_forward(x if self.norm_first else self.attention_norm(x))

    def _mix(self, x: Tensor, sequence: Sequence) -> Tensor:
        return self.attention(x, sequence.packing, sequence.cos_sin, self._scores_bias(sequence), sequence.queries)


@cache
def _hstu_kernels() -> ModuleType | None:
    """The module, None without triton; imported at the first batch on CUDA, as triton takes its time and CPUs have no use for it."""
    try:
        import hstu_kernels
    except ImportError:
        return None
    return hstu_kernels


class PointwiseAttention(nn.Module):
    """HSTU's: no softmax, so that how much of a thing was seen is not divided away, and a gate of the token's own.

    U, V, Q, K = SiLU(linear(x));  linear(norm(SiLU(Q K^T + bias) / max_tokens V) * U).  On CUDA by hstu_kernels.py.
    Source: Zhai et al., "Actions Speak Louder than Words", ICML 2024, equations 1 to 3.
    """

    def __init__(self, config) -> None:
        super().__init__()
        width = config.hidden_units
        self.num_heads, self.max_tokens = config.num_heads, config.max_seq_length + 1
        self.uvqk = Linear(width, 4 * width)
        self.uvqk.fused = 4  # matrices in one: muon.py
        self.norm = make_norm(config.norm, width)
        self.out = Linear(width, width)
        self.dropout, self.attention_dropout = Dropout(config.dropout_rate), Dropout(config.attention_dropout)

    def forward(self, x: Tensor, sequence: Sequence, bias: Tensor | None) -> Tensor:
        """x: (N, D). bias: as in CausalSelfAttention."""
        if sequence.queries is None:
            gate, *parts = F.silu(self.uvqk(x)).chunk(4, dim=-1)
        else:
            rows = sequence.wanted(x)
            gate, value, query, key = (F.silu(linear_rows(self.uvqk, rows if i in (0, 2) else x, i, i + 1)) for i in range(4))
            parts = value, query, key
        return self.out(self.dropout(self.norm(self._attend(*parts, sequence, bias)) * gate))

    def _attend(self, value: Tensor, query: Tensor, key: Tensor, sequence: Sequence, bias: Tensor | None) -> Tensor:
        """value, key: (N, D); query: (Q, D) -> (Q, D)."""
        packing, places = sequence.packing, None
        if sequence.queries is None:
            grid = packing.pad(torch.cat((value, query, key), dim=1)).chunk(3, dim=-1)  # (B, T, D) each
        else:
            value, key = packing.pad(torch.cat((value, key), dim=1)).chunk(2, dim=-1)
            places, bias = sequence.queries.places(), sequence.queries.rows(bias, packing.max_length)
            packing = sequence.queries.packing
            grid = value, packing.pad(query), key
        value, query, key = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in grid)
        if sequence.cos_sin is not None:
            query, key = rotate(query, sequence.cos_sin, places), rotate(key, sequence.cos_sin)
        fused = self._fused(query, key, value)
        if fused is not None:
            mixed = fused.pointwise(query, key, value, bias, self.max_tokens)
        elif torch.is_grad_enabled() or is_exporting():  # torch.export knows no number of users to loop over
            mixed = self._pointwise(query, key, value, bias)
        else:
            mixed = self._pointwise_in_parts(query, key, value, bias)
        return packing.pack(mixed.transpose(1, 2).flatten(2))

    def _fused(self, query: Tensor, key: Tensor, value: Tensor) -> ModuleType | None:
        """hstu_kernels where they do what _pointwise does, else None."""
        if not query.is_cuda or torch.compiler.is_compiling() or is_exporting() or (self.training and self.attention_dropout.rate):
            return None
        kernels = _hstu_kernels()
        return kernels if kernels is not None and kernels.takes(query, key, value) else None

    def _pointwise_in_parts(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        parts = []
        for begin in range(0, len(query), POINTWISE_USERS):
            part = slice(begin, begin + POINTWISE_USERS)
            of_part = bias[part] if bias is not None and len(bias) > 1 else bias
            parts.append(self._pointwise(query[part], key[part], value[part], of_part))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _pointwise(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """query: (B, H, L, D / H); key, value: (B, H, T, D / H). bias: (1 or B, 1 or H, L, T); None = causal, L = T."""
        scores = query @ key.transpose(-1, -2)
        if bias is not None:  # -inf where the query comes first, whose SiLU is not a number
            scores = scores + bias.clamp(min=-1e4).to(scores.dtype)
        weights = F.silu(scores)
        if bias is None:
            weights = weights.tril()
        return self.attention_dropout(weights / self.max_tokens) @ value


class HSTUBlock(_Block):
    """Pointwise attention in a residual branch; a feed-forward follows with experts only."""

    def __init__(self, config) -> None:
        super().__init__(config, PointwiseAttention(config), None)

    def forward(self, x: Tensor, sequence: Sequence) -> tuple[Tensor, Tensor | None]:
        x = sequence.wanted(x) + self.attention(self.attention_norm(x), sequence, self._scores_bias(sequence))
        return (x, None) if self.feed_forward is None else self._fed_forward(x)


class Backbone(nn.Module):
    """Blocks of one kind, one after the other. config: the model group of the settings."""

    def __init__(self, config, block: type[_Block], final_norm: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(config) for _ in range(config.num_blocks))
        self.final_norm = make_norm(config.norm, config.hidden_units) if final_norm else nn.Identity()
        self.rotary_width = config.hidden_units // config.num_heads if config.position == "rope" else 0
        self.time_bias, self.biased = config.time_bias, config.position == "relative" or config.time_bias
        self.has_experts = config.num_experts > 0
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, packing: Packing, timestamps: Tensor, queries: Queries | None = None) -> tuple[Tensor, Tensor | None]:
        """x: (N, D); timestamps: (N,) seconds. Result: (Q, D) of `queries` (None = all N), and the mean balance of the blocks' experts (a
        scalar; None without).

        The last block computes keys and values for every token, and the rest for the queries alone.
        """
        cos_sin = rotary(packing.max_length, self.rotary_width, x.device) if self.rotary_width else None
        sequence = Sequence(packing, cos_sin, Pairs(packing, timestamps, self.time_bias) if self.biased else None)
        balances = []
        for number, block in enumerate(self.blocks, 1):
            if number == len(self.blocks):
                sequence = sequence._replace(queries=queries)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # The second forward repeats the dropout: checkpoint keeps torch's default generator, `replayed` a piece's own.
                x, balance = checkpoint(block, x, sequence, use_reentrant=False, context_fn=replayed)
            else:
                x, balance = block(x, sequence)
            balances.append(balance)
        return self.final_norm(x), torch.stack(balances).mean() if self.has_experts else None


def transformer(config) -> Backbone:
    return Backbone(config, TransformerBlock, final_norm=config.norm_first)


def hstu(config) -> Backbone:
    return Backbone(config, HSTUBlock, final_norm=True)


BACKBONES = {"transformer": transformer, "hstu": hstu}  # by the setting model.backbone
