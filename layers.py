"""Layers of sequence models on packed tokens: attention, feed-forward, norms, dropout.

Dense parts run on valid tokens only (N, D); attention alone pads on the right, to the batch's longest row. No mask tensor
is ever built: right padding and the causal flag suffice, so the flash kernels run. In training on CPU fused_block.py takes a block's place,
where it can. Must not open files or move tensors between devices.

Legend: B users, T tokens of the longest user, N valid tokens of all users, D width, H heads.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import step_kernels
from blas import Linear, linear
from parallel import Piece, dropout_generator, row_pieces, run, user_pieces

# Whether torch.export traces the model. torch 2.7 brought it: with an older one --export of some models fails, in torch; all else works.
is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def loops_fit(x: Tensor) -> bool:
    """Whether compiled loops may do with x (N, D) what torch's operations would: training on CPU in float32, one thread an operation."""
    return (
        not torch.compiler.is_compiling()  # first: the rest cannot be traced
        and type(x) is Tensor  # no shadow of footprint.py
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and len(x) > 0
        and torch.is_grad_enabled()
        and torch.get_num_threads() == 1
        and not torch.is_autocast_enabled("cpu")
        and not is_exporting()
    )


def hooked(*modules: nn.Module) -> bool:
    """Whether anyone waits for what one of the modules or of their parts gives or is given, as diagnosis.py does."""
    if torch.nn.modules.module._has_any_global_hook():
        return True
    return any(any(getattr(part, name) for name in _HOOKS) for module in modules for part in module.modules())


class Packing(NamedTuple):
    """Where packed tokens lie in a padded (B, T) grid: in a right-padded one, but for `Queries`."""

    num_users: int
    max_length: int
    index: Tensor  # (N,) int64 flat place b * T + t
    positions: Tensor  # (N,) int64 t

    @classmethod
    def from_batch(cls, batch) -> Packing:
        return cls(batch.lengths.shape[0], batch.max_length, batch.owner * batch.max_length + batch.positions, batch.positions)

    def pad(self, packed: Tensor) -> Tensor:
        """(N, D) -> (B, T, D), zeros in the padding."""
        if packed.shape[0] == self.num_users * self.max_length:
            return packed.view(self.num_users, self.max_length, -1)
        grid = packed.new_zeros(self.num_users * self.max_length, packed.shape[1])
        return grid.index_copy(0, self.index, packed).view(self.num_users, self.max_length, -1)

    def pack(self, padded: Tensor) -> Tensor:
        """(B, T, D) -> (N, D)."""
        flat = padded.reshape(self.num_users * self.max_length, -1)
        return flat if flat.shape[0] == self.index.shape[0] else flat.index_select(0, self.index)


class Queries(NamedTuple):
    """Tokens whose result is wanted, the last ones of each user: all that the last block has to give."""

    tokens: Tensor  # (Q,) int64 which of the N
    packing: Packing  # where they lie in a left-padded (B, L) grid; L: query tokens of the user with most

    @classmethod
    def from_batch(cls, batch) -> Queries | None:
        """None where all are."""
        if not batch.query_tokens.numel():
            return None
        owner, positions = batch.owner.index_select(0, batch.query_tokens), batch.positions.index_select(0, batch.query_tokens)
        from_end = batch.lengths.index_select(0, owner) - positions  # 1: the user's last token
        index = (owner + 1) * batch.max_queries - from_end
        return cls(batch.query_tokens, Packing(batch.lengths.shape[0], batch.max_queries, index, positions))

    def places(self) -> Tensor:
        """(B, L) position of each query token; 0 in the padding."""
        return self.packing.pad(self.packing.positions[:, None])[..., 0]

    def rows(self, bias: Tensor | None, length: int) -> Tensor:
        """Their rows of a bias (1 or B, H, T, T): (B, H, L, T); None = of the causal mask, (B, 1, L, T) float32. length: T."""
        places = self.places()
        if bias is None:
            later = torch.arange(length, device=places.device) > places[..., None]
            return torch.zeros(later.shape, device=places.device).masked_fill_(later, -torch.inf)[:, None]
        shape = places.shape[0], bias.shape[1], places.shape[1], length
        return bias.expand(shape[0], -1, -1, -1).gather(2, places[:, None, :, None].expand(shape))


class PackedPiece(NamedTuple):
    """Some of a batch's users."""

    tokens: Piece  # theirs of the N
    results: Piece  # theirs of the Q query tokens; `tokens` where all are
    packing: Packing
    queries: Queries | None


def packed_pieces(batch) -> list[PackedPiece]:
    """A batch's users in pieces of about as many tokens each."""
    found = []
    whole = Queries.from_batch(batch)
    for users, tokens in user_pieces(batch.lengths):
        positions, lengths = batch.positions[tokens.begin : tokens.end], batch.lengths[users.begin : users.end]
        longest = int(lengths.max())
        index = (batch.owner[tokens.begin : tokens.end] - users.begin) * longest + positions
        packing = Packing(len(lengths), longest, index, positions)
        results, queries = tokens, None
        if whole is not None:
            results = Piece(*torch.searchsorted(whole.tokens, torch.tensor(tokens)).tolist())
            part, most = slice(*results), whole.packing.max_length
            of_piece = Packing(len(lengths), most, whole.packing.index[part] - users.begin * most, whole.packing.positions[part])
            queries = Queries(whole.tokens[part] - tokens.begin, of_piece)
        found.append(PackedPiece(tokens, results, packing, queries))
    return found


def rotary(length: int, head_width: int, device: torch.device, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, head_width / 2) of rotary position embedding. Source: Su et al., RoFormer, 2021, equation 34."""
    frequency = base ** (-torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width)
    angle = torch.arange(length, device=device)[:, None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos_sin: tuple[Tensor, Tensor], places: Tensor | None = None) -> Tensor:
    """Rotate pairs (i, i + width / 2) of x (B, H, T, width) by their positions' angles. places: (B, T) positions; None = 0 to T - 1."""
    cos, sin = (part.to(x.dtype) if places is None else part.to(x.dtype)[places][:, None] for part in cos_sin)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Dropout(nn.Module):
    """Dropout whose masks, on CPU, are 16 random bits an entry instead of torch's one draw an entry: a sixth of the time.

    The rate is rounded to a multiple of 2^-16 and the kept entries are scaled by just that. Draws come from torch's default generator.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    @property
    def cut(self) -> int:
        """Of 2^16 draws those that are left out."""
        return min(round(self.rate * 2**16), 2**16 - 1)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        if x.is_cuda:
            return F.dropout(x, self.rate)
        return _cpu_dropout(x, self.cut)


@torch.compiler.disable  # numba's loops and numpy's numbers cannot be traced; with torch.compile the graph is cut here
def _cpu_dropout(x: Tensor, cut: int) -> Tensor:
    fast = step_kernels.compiled()
    return _Dropout.apply(x, cut) if fast is None else _HashDropout.apply(x, cut, fast.dropout)


def draw_mask(cut: int, generator: torch.Generator | None) -> tuple[np.uint64, np.uint64, np.float32]:
    """Arguments of loops with dropout, `Dropout.cut` given: state of the hash, by one draw if anything is left out, cut, and scale."""
    state = torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=generator).item() if cut else 0
    return np.uint64(state & (2**64 - 1)), np.uint64(cut), np.float32(2**16 / (2**16 - cut))


class _HashDropout(torch.autograd.Function):
    """The mask is a hash of (one draw of the generator, place): it is made again for the backward pass, and never stored."""

    @staticmethod
    def forward(ctx, x: Tensor, cut: int, kernel) -> Tensor:
        ctx.arguments = draw_mask(cut, dropout_generator())
        ctx.kernel = kernel
        return _HashDropout._masked(ctx, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return _HashDropout._masked(ctx, grad), None, None

    @staticmethod
    def _masked(ctx, x: Tensor) -> Tensor:
        source = x.detach().contiguous() if x.dtype == torch.float32 else torch.ones(x.shape)
        out = torch.empty(x.shape)
        ctx.kernel(source.view(-1).numpy(), out.view(-1).numpy(), *ctx.arguments)
        return out if x.dtype == torch.float32 else (x * out).to(x.dtype)


class _Dropout(torch.autograd.Function):
    """Without numba."""

    @staticmethod
    def forward(ctx, x: Tensor, cut: int) -> Tensor:
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64)
        bits = bits.random_(-(2**63), None, generator=dropout_generator()).view(torch.int16)
        # 0 or 1 / (1 - rate) as floats: comparing in place and two plain products take a fifth of the time of a bool mask.
        mask = bits[: x.numel()].view(x.shape).float().ge_(cut - 2**15).mul_(2**16 / (2**16 - cut))
        ctx.save_for_backward(mask)
        return (x * mask).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return (grad * ctx.saved_tensors[0]).to(grad.dtype), None


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention over right-padded rows through scaled_dot_product_attention."""

    def __init__(self, width: int, num_heads: int, attention_dropout: float) -> None:
        super().__init__()
        self.num_heads, self.attention_dropout = num_heads, attention_dropout
        self.qkv = Linear(width, 3 * width)
        self.qkv.fused = 3  # matrices in one: muon.py
        self.out = Linear(width, width)

    def forward(
        self,
        x: Tensor,
        packing: Packing,
        cos_sin: tuple[Tensor, Tensor] | None,
        bias: Tensor | None = None,
        queries: Queries | None = None,
    ) -> Tensor:
        """x: (N, D); result: (N, D), of `queries` (Q, D).

        bias: added to the scores, (1 or B, H, T, T) with -inf where the query comes first; None = causal, no bias.
        """
        if queries is None:
            # Three views: the gradients of one (3, B, H, T, D / H) tensor would be filled up with zeros, stacked and copied back.
            query, key, value = (self._heads(part) for part in packing.pad(self.qkv(x)).chunk(3, dim=-1))
            places = None
        else:
            key, value = (self._heads(part) for part in packing.pad(linear_rows(self.qkv, x, 1, 3)).chunk(2, dim=-1))
            query = self._heads(queries.packing.pad(linear_rows(self.qkv, x.index_select(0, queries.tokens), 0, 1)))
            places, bias = queries.places(), queries.rows(bias, packing.max_length)
            packing = queries.packing
        if cos_sin is not None:
            query, key = rotate(query, cos_sin, places), rotate(key, cos_sin)
        dropout = self.attention_dropout if self.training else 0.0
        # On CPU in float32 even under autocast: torch's bfloat16 kernel takes four times as long backward there.
        with torch.autocast("cpu", enabled=False) if x.device.type == "cpu" else nullcontext():
            if x.device.type == "cpu":
                query, key, value = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (query, key, value))
            mixed = attend(query, key, value, bias, dropout)  # (B, H, T or L, D / H)
        return self.out(packing.pack(mixed.transpose(1, 2).flatten(2)))

    def _heads(self, grid: Tensor) -> Tensor:
        """(B, T, D) -> (B, H, T, D / H)."""
        return grid.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def linear_rows(layer: nn.Linear, x: Tensor, begin: int, end: int) -> Tensor:
    """Of a linear layer that is `layer.fused` ones in one, the results of those from begin to end: (N, D) -> (N, (end - begin) W)."""
    width = layer.out_features // layer.fused
    part = slice(begin * width, end * width)
    return linear(x, layer.weight[part], None if layer.bias is None else layer.bias[part])


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """Softmax attention: query (B, H, L, D / H), key and value (B, H, T, D / H). bias: (1 or B, 1 or H, L, T); None = causal, L = T."""
    if bias is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout)
    bias = bias.to(query.dtype)
    if query.is_cuda or dropout or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
    # torch's CPU kernel gives the bias no gradient, and what torch takes instead is slower than these plain products: 22.6 ms forward and
    # backward for 32 users of 101 tokens and 2 heads of 32, these 15.1, the flash kernel without a bias 15.9 (one thread, Zen 3).
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2) + bias
    return scores.softmax(-1) @ value


def make_norm(kind: str, width: int) -> nn.Module:
    """The setting model.norm. RMSNorm: Zhang and Sennrich 2019."""
    return nn.LayerNorm(width) if kind == "layernorm" else nn.RMSNorm(width, eps=1e-5)


class FeedForward(nn.Module):
    """Two linear layers with GELU or ReLU between them, or SwiGLU (Shazeer 2020) at the same number of parameters."""

    def __init__(self, width: int, multiplier: float, activation: str, dropout_rate: float) -> None:
        super().__init__()
        self.activation = activation
        inner, fused = inner_size(width * multiplier, activation)
        self.inner = Linear(width, fused * inner)
        self.inner.fused = fused  # matrices in one: muon.py
        self.out = Linear(inner, width)
        self.dropout = Dropout(dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.dropout(activate(self.inner(x), self.activation)))


def inner_size(width: float, activation: str) -> tuple[int, int]:
    """Of a feed-forward that is `width` wide inside: its width, and how many matrices the first layer is, side by side (`activate`)."""
    return (max(1, round(width * (2 / 3))), 2) if activation == "swiglu" else (max(1, round(width)), 1)


def activate(hidden: Tensor, activation: str) -> Tensor:
    """Between a feed-forward's layers: (N, fused * I) -> (N, I), fused as `inner_size` says; swiglu's are value and gate."""
    if activation == "swiglu":
        value, gate = hidden.chunk(2, dim=-1)
        return value * F.silu(gate)
    return gelu(hidden) if activation == "gelu" else F.relu(hidden)


def gelu(x: Tensor) -> Tensor:
    """F.gelu of a matrix (N, D). On CPU by torch's own kernel: oneDNN, which takes what is contiguous, makes one for each N it has not met.

    Forward and backward of 2,000 to 4,000 x 256, one thread: 1.8 ms and 58 KiB that stay where N is new, 1.0 where it is not; so, 1.0.
    """
    plain = x.device.type != "cpu" or x.dtype != torch.float32 or is_exporting() or torch.compiler.is_compiling()
    return F.gelu(x) if plain else F.gelu(x.T).T


def pick(table: nn.Embedding, index: Tensor) -> Tensor:
    """table(index) for a small table; index_select's backward pass takes a fifth of nn.Embedding's on CPU: 0.13 ms, not 0.65."""
    return table.weight.index_select(0, index)


def gather_tokens(first: Tensor, second: Tensor, index: Tensor) -> Tensor:
    """Rows index (N,) of first (M, D) and second (B, D), one below the other: (N, D) in first's dtype."""
    fast = step_kernels.compiled() if first.device.type == "cpu" and first.dtype == second.dtype == torch.float32 else None
    if fast is None:
        return torch.cat((first, second.to(first.dtype))).index_select(0, index)
    return _GatherTokens.apply(first.contiguous(), second.contiguous(), index, fast)


class _GatherTokens(torch.autograd.Function):
    """By several cores, without the concatenation; backward, each core sums up a range of the rows."""

    @staticmethod
    def forward(ctx, first: Tensor, second: Tensor, index: Tensor, fast) -> Tensor:
        ctx.index, ctx.lengths, ctx.fast = index, (len(first), len(second)), fast
        out = torch.empty(len(index), first.shape[1])
        arrays = [t.detach().numpy() for t in (first, second, index)]
        run([partial(fast.gather, *arrays, *piece, out.numpy()) for piece in row_pieces(len(index))])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        arrays, start, jobs, grads = (grad.contiguous().numpy(), ctx.index.numpy()), 0, [], []
        for num in ctx.lengths:
            grads.append(torch.empty(num, grad.shape[1]))
            jobs += [partial(ctx.fast.scatter, *arrays, *piece, start, grads[-1].numpy()) for piece in row_pieces(num)]
            start += num
        run(jobs)
        return *grads, None, None
