"""A Transformer block in training on CPU as one differentiable function of compiled loops.

As torch's operations a block makes some 40 passes over memory forward and 80 backward, and as many calls. Here tiles of tokens go
through all operations while they are in a core's cache; attention works on the packed tokens, without padding, and makes the scores of
the past only. The same numbers up to rounding, with the same dropout masks. What the loops cannot do is left to torch: see `takes`.

Measured, one thread of a Zen 5 beside another process, forward and backward, 33 users of 91 tokens with dropout, torch's operations and
this, ms: width 32, 1 head, ReLU, inner 32: 5.2 and 2.8; width 64, 2 heads, GELU, inner 256: 16.7 and 10.3. Attention alone at width 32:
torch's flash kernel .80 + 1.31, these loops .41 + .55.
Rejected: torch's flash kernel between the loops (4.8 in place of 3.5), rows of scores filled up to whole vectors, the largest score by
sixteenths (no faster).

Legend: N packed tokens, W width, H heads, I inner width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import block_kernels
from layers import FeedForward, draw_mask, hooked, loops_fit
from parallel import dropout_generator

_KINDS = {"relu": block_kernels.RELU, "gelu": block_kernels.GELU, "swiglu": block_kernels.SWIGLU}
_EPS = 1e-5  # of the norms
_SMALLEST_TILE = 64  # tokens


def takes(block: nn.Module, x: Tensor, sequence) -> bool:
    """Whether `run_block` does what block, a TransformerBlock, does with x (N, W) and a backbones.Sequence."""
    return (
        loops_fit(x)
        and block.attention.qkv.weight.dtype == torch.float32
        and sequence.queries is None
        and block.bias is None
        and type(block.feed_forward) is FeedForward
        and not (block.attention.attention_dropout and block.training)
        and not hooked(*block.children())
        and block_kernels.compiled() is not None
    )


def run_block(block: nn.Module, x: Tensor, sequence) -> Tensor:
    """block(x, sequence) (N, W), where `takes` says so."""
    attention, feed_forward = block.attention, block.feed_forward
    norms = [block.attention_norm, block.feed_forward_norm]
    weights = [
        *(p for layer in (attention.qkv, attention.out, feed_forward.inner, feed_forward.out) for p in (layer.weight, layer.bias)),
        *(norm.weight for norm in norms),
        *(norm.bias for norm in norms if isinstance(norm, nn.LayerNorm)),
    ]
    return _Block.apply(block, sequence, x.contiguous(), *weights)


def _masks(block: nn.Module) -> tuple:
    """Arguments of the loops for a block's dropouts, drawn in the order in which the modules make theirs."""
    outer, inner = (layer.cut if layer.training else 0 for layer in (block.dropout, block.feed_forward.dropout))
    drawn = [draw_mask(cut, dropout_generator()) for cut in (outer, inner, outer)]
    return np.array([state for state, *_ in drawn], np.uint64), *drawn[0][1:], *drawn[1][1:]


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, block, sequence, x: Tensor, *weights: Tensor) -> Tensor:
        kernels = block_kernels.compiled()
        num, width = x.shape
        qkv_weight, qkv_bias, out_weight, out_bias, inner_weight, inner_bias, last_weight, last_bias, *norms = _arrays(weights)
        gains, shifts = norms[:2], norms[2:] or [np.zeros(width, np.float32)] * 2
        tile = max(_SMALLEST_TILE, block_kernels.TILE_ENTRIES // width // 4 * 4)  # `_drop` wants whole fours
        options, heads = (block.norm_first, isinstance(block.attention_norm, nn.RMSNorm)), block.attention.num_heads
        places = _arrays((*(sequence.cos_sin or (torch.empty(0, 0), torch.empty(0, 0))), sequence.packing.positions))
        starts = np.append(np.flatnonzero(places[2] == 0), num)
        qkv, mixed, log_sum = torch.empty(num, 3 * width), torch.empty(num, width), torch.empty(num, heads)
        first, second = ((torch.empty(num, width), torch.empty(num)) for _ in range(2))  # normed, scale of each norm
        hidden, result = torch.empty(num, len(inner_weight)), torch.empty(num, width)
        of_first = _arrays(first)
        to_attention = (gains[0], shifts[0], qkv_weight, qkv_bias, heads, *places, *of_first, qkv.numpy())
        kernels.to_attention(tile, x.numpy(), *options, _EPS, *to_attention)
        kernels.attention(qkv.numpy(), starts, heads, mixed.numpy(), log_sum.numpy())
        masks, kind = _masks(block), _KINDS[block.feed_forward.activation]
        kernels.from_attention(
            tile, x.numpy(), mixed.numpy(), *options, _EPS, kind, *masks, out_weight, out_bias, gains[0], shifts[0],
            inner_weight, inner_bias, last_weight, last_bias, gains[1], shifts[1], *of_first, *_arrays(second),
            hidden.numpy(), result.numpy(),
        )  # fmt: skip
        ctx.save_for_backward(x, qkv, mixed, log_sum, hidden, *first, *second, *weights)
        ctx.arguments = tile, options, heads, places, starts, masks, kind
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        kernels = block_kernels.compiled()
        tile, options, heads, places, starts, masks, kind = ctx.arguments
        saved = ctx.saved_tensors  # once: under torch's checkpoint they are made again when asked for
        x, qkv, mixed, log_sum, hidden, *states = _arrays(saved[:9])
        weights = saved[9:]
        num, width = x.shape
        qkv_weight, _, out_weight, _, inner_weight, inner_bias, last_weight, _, *norms = _arrays(weights)
        gains, shifts = norms[:2], norms[2:] or [np.zeros(width, np.float32)] * 2
        grad_x, grads = torch.empty(num, width), [torch.empty_like(weight) for weight in weights]
        of_qkv, of_qkv_bias, of_out, of_out_bias, of_inner, of_inner_bias, of_last, of_last_bias, *of_norms = _arrays(grads)
        unused = np.empty(width, np.float32), np.empty(width, np.float32)
        of_gains, of_shifts = of_norms[:2], of_norms[2:] or unused
        grad_mixed, grad_qkv = np.empty((num, width), np.float32), np.empty((num, 3 * width), np.float32)
        kernels.from_attention_back(
            tile, grad.contiguous().numpy(), mixed, *options, kind, *masks, out_weight, gains[0], shifts[0],
            inner_weight, inner_bias, last_weight, gains[1], shifts[1], *states, hidden, grad_x.numpy(), grad_mixed,
            of_out, of_out_bias, of_gains[0], of_shifts[0], of_inner, of_inner_bias, of_last, of_last_bias, of_gains[1], of_shifts[1],
        )  # fmt: skip
        kernels.attention_back(grad_mixed, qkv, starts, heads, mixed, log_sum, grad_qkv)
        of_first = (of_gains[0], of_shifts[0]) if options[0] else unused
        kernels.to_attention_back(
            tile, grad_qkv, x, *options, gains[0], shifts[0], qkv_weight, heads, *places, *states[:2], grad_x.numpy(),
            of_qkv, of_qkv_bias, *of_first,
        )  # fmt: skip
        return None, None, grad_x, *grads


def _arrays(tensors) -> list[np.ndarray]:
    return [t.detach().contiguous().numpy() for t in tensors]
