"""Triton kernels of HSTU's pointwise attention on CUDA, forward and backward, which never hold the scores. Must not know models.

out = (SiLU(Q K^T + bias) / max_tokens) V, zero where the key comes later. Source: Zhai et al., ICML 2024, equation 2. Without a softmax no
row needs its other blocks' scores: each program makes those of a block, uses them, and forgets them; backward makes them again.

Products take the inputs' type and add up in float32 (float32 inputs: no TF32). No atomic additions: two runs give the same bits.

Imports triton, so it is itself imported only where a kernel is about to run. TRITON_INTERPRET=1, set before that, runs it on the CPU.

Legend: B users, H heads, L query tokens, T key tokens, d width of a head.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = {torch.float32: 64, torch.bfloat16: 128, torch.float16: 128}  # of a head: blocks of wider ones do not fit into registers
CAPABILITY = (8, 0)  # of a GPU: the first with bfloat16 products
GROUPS = 16  # of users, whose shares of a shared bias' gradient are kept apart until the end
NEVER = tl.constexpr(-1e4)  # a smaller bias counts as this: SiLU(-inf) is not a number
CHECKED = 2, 2, 70  # B, H, T of the problem that `works` compares


def pointwise(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, max_tokens: int) -> Tensor:
    """What backbones.PointwiseAttention's torch operations give, up to rounding: (B, H, L, d) in query's dtype.

    query: (B, H, L, d); key, value: (B, H, T, d), of one dtype of MAX_WIDTH. bias: (1 or B, 1 or H, L, T), -inf where the query comes
    first; None = causal, L = T. Gradients for all four, once; that of a shared bias is summed up in float32.
    """
    return _attention(query, key, value, bias, 1 / max_tokens)


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `pointwise` can do with these, and (on CUDA) compiles and gives there what torch gives; a warning says once why not."""
    if query.numel() == 0 or key.numel() == 0 or query.shape[-1] > MAX_WIDTH.get(query.dtype, 0):
        return False
    if not query.dtype == key.dtype == value.dtype or (query.is_cuda and torch.cuda.get_device_capability(query.device) < CAPABILITY):
        return False
    if type(query) is not Tensor:  # footprint.py's shadows, which no kernel can run on
        return True
    return works(query.device, query.dtype, query.shape[-1])


@cache
def works(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Compiles the kernels and compares them with torch, on a small problem without and with a bias; once a process."""
    limit = 1e-3 if dtype == torch.float32 else 5e-2  # for gross faults: halves are rounded at other places here than there
    try:
        error = max(_error(device, dtype, width, biased) for biased in (False, True))
        reason = None if error < limit else f"results differ from torch's by {error:.1g} of the largest"
    except Exception as failure:  # of many kinds: no C compiler, a compiler's fault, too little shared memory
        reason = f"{type(failure).__name__}: {failure}"
    if reason is not None:
        warnings.warn(f"HSTU runs as plain torch operations on {device} with {dtype}: its fused kernels fail, {reason}", stacklevel=2)
    return reason is None


@torch.no_grad()  # without autograd: inside checkpoint() a first call must save no more tensors than a second
def _error(device: torch.device, dtype: torch.dtype, width: int, biased: bool) -> float:
    """The largest difference from torch in float32 of a small problem's result and gradients, as a share of the largest entry."""
    generator, (users, heads, tokens) = torch.Generator().manual_seed(0), CHECKED
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    query, key, value, grad = ((draw(users, heads, tokens, width) * width**-0.25).to(device, dtype) for _ in range(4))
    causal = torch.full((tokens, tokens), -torch.inf).triu_(1)
    bias = (draw(1, heads, tokens, tokens) + causal).to(device)
    scale, given = 1 / tokens, bias if biased else None
    with torch.autocast(device.type, enabled=False):
        found = [_attention(query, key, value, given, scale), *_gradients(grad, query, key, value, given, scale)]
        found += [_bias_gradient(grad, query, key, value, bias, scale)] if biased else []
        query, key, value, grad = (part.float() for part in (query, key, value, grad))
        scores = (query @ key.mT + (bias if biased else causal.to(device))).clamp(min=NEVER.value)
        sigmoid = scores.sigmoid()
        weights = scores * sigmoid * scale
        of_scores = grad @ value.mT * scale * (sigmoid + weights / scale * (1 - sigmoid))
        expected = [weights @ value, of_scores @ key, of_scores.mT @ query, weights.mT @ grad, of_scores.sum(0, keepdim=True)]
        differences = [(a - b).abs().max() / b.abs().max() for a, b in zip(found, expected)]  # without a bias, the last is not found
        return torch.stack(differences).nan_to_num(torch.inf).max().item()


# ---- operations of torch: so shadows (footprint.py), checkpoint() and autograd know them --------------------------------------


@torch.library.custom_op("hstu::attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    inputs, out = _Inputs(query, key, value, bias, scale), _heads_like(query)
    inputs.launch(_forward, query.shape[2], out)
    return out


@torch.library.custom_op("hstu::attention_gradients", mutates_args=())
def _gradients(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    inputs, grad, found = _Inputs(query, key, value, bias, scale), _rows(grad), tuple(_heads_like(x) for x in (query, key, value))
    inputs.launch(_backward_query, query.shape[2], grad, found[0])
    inputs.launch(_backward_key_value, key.shape[2], grad, *found[1:])
    return found


@torch.library.custom_op("hstu::attention_bias_gradient", mutates_args=())
def _bias_gradient(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """In bias' shape, float32."""
    inputs, grad, (users, heads, num_queries, _) = _Inputs(query, key, value, bias, scale), _rows(grad), query.shape
    groups = users if bias.shape[0] == users else min(users, GROUPS)
    found = grad.new_empty(groups, heads, num_queries, key.shape[2], dtype=torch.float32)
    inputs.launch_bias(grad, found)
    return found.sum_to_size(bias.shape)


_attention.register_fake(lambda query, key, value, bias, scale: _heads_like(query))
_gradients.register_fake(lambda grad, query, key, value, bias, scale: tuple(_heads_like(x) for x in (query, key, value)))
_bias_gradient.register_fake(lambda grad, query, key, value, bias, scale: bias.new_empty(bias.shape, dtype=torch.float32))


def _setup(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor) -> tuple:
    query, key, value, bias = ctx.saved_tensors
    of_bias = None
    if bias is not None and ctx.needs_input_grad[3]:
        of_bias = _bias_gradient(grad, query, key, value, bias, ctx.scale).to(bias.dtype)
    return *_gradients(grad, query, key, value, bias, ctx.scale), of_bias, None


_attention.register_autograd(_backward, setup_context=_setup)


def _heads_like(x: Tensor) -> Tensor:
    """Empty, of the shape (B, H, L, d), stored as (B, L, H, d): its heads are put side by side without a copy."""
    users, heads, length, width = x.shape
    return x.new_empty(users, length, heads, width).transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _Inputs:
    """What all kernels are told of a call."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> None:
        self.users, self.heads, self.num_queries, width = query.shape
        self.num_keys = key.shape[2]
        tensors = [_rows(x) for x in (query, key, value)]
        # Without one the kernels look at no bias, but want a pointer. Shared dimensions get the stride 0.
        table = query if bias is None else bias.expand(self.users, self.heads, self.num_queries, self.num_keys)
        strides = [number for x in tensors for number in x.stride()[:3]] + list(table.stride())
        self.arguments = [*tensors, table, *strides, scale, self.heads, self.num_queries, self.num_keys, width]
        small = query.dtype != torch.float32 and width <= 64 and bias is None
        self.block = 64 if small else 32  # larger ones of the others need more registers than there are
        self.options = dict(
            CAUSAL=bias is None, BIASED=bias is not None, BLOCK=self.block, WIDTH=max(16, triton.next_power_of_2(width)),
            num_warps=4, num_stages=2 if small else 1,
        )  # fmt: skip

    def launch(self, kernel, length: int, *more: Tensor) -> None:
        """A program for each user, head and block of `length`. more: (B, H, ..., d) each."""
        self._run(kernel, self.users * self.heads * triton.cdiv(length, self.block), more)

    def launch_bias(self, grad: Tensor, found: Tensor) -> None:
        """found: (groups, H, L, T) float32, contiguous."""
        blocks = triton.cdiv(self.num_queries, self.block) * triton.cdiv(self.num_keys, self.block)
        self._run(_backward_bias, len(found) * self.heads * blocks, (grad,), found, self.users, len(found))

    def _run(self, kernel, num_programs: int, tensors: tuple[Tensor, ...], *more) -> None:
        strides = [number for x in tensors for number in x.stride()[:3]]
        with torch.cuda.device_of(tensors[0]):  # triton starts kernels on the current device
            kernel[(num_programs,)](*self.arguments, *tensors, *strides, *more, **self.options)


# ---- kernels ----------------------------------------------------------------------------------------------------------------
# The first arguments are _Inputs.arguments: pointers, strides of (B, H, rows) of each and of (B, H, L, T) of the bias, and sizes. Rows
# and columns beyond the end are read as zeros; SiLU(0) = 0, so they add nothing to anything.

_PLAIN = ("num_queries", "num_keys")  # vary from batch to batch: no code of their own for multiples of 16


@triton.jit
def _program(num_heads, num_blocks):
    """User (or group of them), head and block of this program. One axis of programs: CUDA's others end at 65,535."""
    number = tl.program_id(0) // num_blocks
    return (number // num_heads).to(tl.int64), number % num_heads, tl.program_id(0) % num_blocks


@triton.jit
def _tile(start, rows, num_rows, stride, width, WIDTH: tl.constexpr):
    """(BLOCK, WIDTH) of a head's rows."""
    columns = tl.arange(0, WIDTH)
    inside = (rows[:, None] < num_rows) & (columns[None, :] < width)
    return tl.load(start + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store(start, rows, num_rows, stride, width, tile, WIDTH: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    inside = (rows[:, None] < num_rows) & (columns[None, :] < width)
    tl.store(start + rows[:, None] * stride + columns[None, :], tile.to(start.dtype.element_ty), mask=inside)


INTERPRETED = tl.constexpr(not isinstance(_tile, triton.JITFunction))


@triton.jit
def _product(a, b):
    """Added up in float32."""
    if INTERPRETED:  # whose products take bfloat16's bits for whole numbers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _weights(query, key, bias, bias_l, bias_t, rows, places, num_queries, num_keys, CAUSAL: tl.constexpr, BIASED: tl.constexpr):
    """SiLU of a block's scores and its slope, both (BLOCK, BLOCK) float32. rows: of the queries, places: of the keys."""
    scores = _product(query, tl.trans(key))
    if BIASED:
        inside = (rows[:, None] < num_queries) & (places[None, :] < num_keys)
        added = tl.load(bias + rows[:, None] * bias_l + places[None, :] * bias_t, mask=inside, other=0.0).to(tl.float32)
        scores += tl.where(added < NEVER, NEVER, added)  # what is not a number stays so
    sigmoid = 1.0 / (1.0 + tl.exp(-scores))
    weights = scores * sigmoid
    slope = sigmoid + weights * (1.0 - sigmoid)
    if CAUSAL:
        keep = rows[:, None] >= places[None, :]
        weights = tl.where(keep, weights, 0.0)
        slope = tl.where(keep, slope, 0.0)
    return weights, slope


@triton.jit(do_not_specialize=_PLAIN)
def _forward(
    query, key, value, bias, query_b, query_h, query_l, key_b, key_h, key_t, value_b, value_h, value_t, bias_b, bias_h, bias_l, bias_t,
    scale, num_heads, num_queries, num_keys, width, out, out_b, out_h, out_l,
    CAUSAL: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    b, h, block = _program(num_heads, tl.cdiv(num_queries, BLOCK))
    rows = block * BLOCK + tl.arange(0, BLOCK)
    of_query = _tile(query + b * query_b + h * query_h, rows, num_queries, query_l, width, WIDTH)
    key += b * key_b + h * key_h
    value += b * value_b + h * value_h
    bias += b * bias_b + h * bias_h
    total = tl.zeros((BLOCK, WIDTH), tl.float32)
    end = num_keys
    if CAUSAL:
        end = tl.minimum(num_keys, (block + 1) * BLOCK)
    for start in range(0, end, BLOCK):
        places = start + tl.arange(0, BLOCK)
        of_key = _tile(key, places, num_keys, key_t, width, WIDTH)
        of_value = _tile(value, places, num_keys, value_t, width, WIDTH)
        weights, _ = _weights(of_query, of_key, bias, bias_l, bias_t, rows, places, num_queries, num_keys, CAUSAL, BIASED)
        total += _product(weights.to(of_value.dtype), of_value)
    _store(out + b * out_b + h * out_h, rows, num_queries, out_l, width, total * scale, WIDTH)


@triton.jit(do_not_specialize=_PLAIN)
def _backward_query(
    query, key, value, bias, query_b, query_h, query_l, key_b, key_h, key_t, value_b, value_h, value_t, bias_b, bias_h, bias_l, bias_t,
    scale, num_heads, num_queries, num_keys, width, grad, out, grad_b, grad_h, grad_l, out_b, out_h, out_l,
    CAUSAL: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    b, h, block = _program(num_heads, tl.cdiv(num_queries, BLOCK))
    rows = block * BLOCK + tl.arange(0, BLOCK)
    of_query = _tile(query + b * query_b + h * query_h, rows, num_queries, query_l, width, WIDTH)
    of_out = _tile(grad + b * grad_b + h * grad_h, rows, num_queries, grad_l, width, WIDTH)
    key += b * key_b + h * key_h
    value += b * value_b + h * value_h
    bias += b * bias_b + h * bias_h
    total = tl.zeros((BLOCK, WIDTH), tl.float32)
    end = num_keys
    if CAUSAL:
        end = tl.minimum(num_keys, (block + 1) * BLOCK)
    for start in range(0, end, BLOCK):
        places = start + tl.arange(0, BLOCK)
        of_key = _tile(key, places, num_keys, key_t, width, WIDTH)
        of_value = _tile(value, places, num_keys, value_t, width, WIDTH)
        _, slope = _weights(of_query, of_key, bias, bias_l, bias_t, rows, places, num_queries, num_keys, CAUSAL, BIASED)
        of_scores = slope * _product(of_out, tl.trans(of_value))
        total += _product(of_scores.to(of_key.dtype), of_key)
    _store(out + b * out_b + h * out_h, rows, num_queries, out_l, width, total * scale, WIDTH)


@triton.jit(do_not_specialize=_PLAIN)
def _backward_key_value(
    query, key, value, bias, query_b, query_h, query_l, key_b, key_h, key_t, value_b, value_h, value_t, bias_b, bias_h, bias_l, bias_t,
    scale, num_heads, num_queries, num_keys, width,
    grad, key_out, value_out, grad_b, grad_h, grad_l, key_out_b, key_out_h, key_out_t, value_out_b, value_out_h, value_out_t,
    CAUSAL: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    b, h, block = _program(num_heads, tl.cdiv(num_keys, BLOCK))
    places = block * BLOCK + tl.arange(0, BLOCK)
    of_key = _tile(key + b * key_b + h * key_h, places, num_keys, key_t, width, WIDTH)
    of_value = _tile(value + b * value_b + h * value_h, places, num_keys, value_t, width, WIDTH)
    query += b * query_b + h * query_h
    grad += b * grad_b + h * grad_h
    bias += b * bias_b + h * bias_h
    key_total = tl.zeros((BLOCK, WIDTH), tl.float32)
    value_total = tl.zeros((BLOCK, WIDTH), tl.float32)
    begin = 0
    if CAUSAL:  # L = T: earlier queries do not see these keys
        begin = block * BLOCK
    for start in range(begin, num_queries, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        of_query = _tile(query, rows, num_queries, query_l, width, WIDTH)
        of_out = _tile(grad, rows, num_queries, grad_l, width, WIDTH)
        weights, slope = _weights(of_query, of_key, bias, bias_l, bias_t, rows, places, num_queries, num_keys, CAUSAL, BIASED)
        value_total += _product(tl.trans(weights.to(of_out.dtype)), of_out)
        of_scores = slope * _product(of_out, tl.trans(of_value))
        key_total += _product(tl.trans(of_scores.to(of_query.dtype)), of_query)
    _store(key_out + b * key_out_b + h * key_out_h, places, num_keys, key_out_t, width, key_total * scale, WIDTH)
    _store(value_out + b * value_out_b + h * value_out_h, places, num_keys, value_out_t, width, value_total * scale, WIDTH)


@triton.jit(do_not_specialize=_PLAIN)
def _backward_bias(
    query, key, value, bias, query_b, query_h, query_l, key_b, key_h, key_t, value_b, value_h, value_t, bias_b, bias_h, bias_l, bias_t,
    scale, num_heads, num_queries, num_keys, width, grad, grad_b, grad_h, grad_l, out, num_users, num_groups,
    CAUSAL: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of every num_groups-th user the sum; out: (groups, H, L, T) float32."""
    num_blocks = tl.cdiv(num_keys, BLOCK)  # a row
    group, h, block = _program(num_heads, tl.cdiv(num_queries, BLOCK) * num_blocks)
    rows = block // num_blocks * BLOCK + tl.arange(0, BLOCK)
    first = block % num_blocks * BLOCK
    places = first + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for user in range(group, num_users, num_groups):
        b = tl.cast(user, tl.int64)
        of_query = _tile(query + b * query_b + h * query_h, rows, num_queries, query_l, width, WIDTH)
        of_key = _tile(key + b * key_b + h * key_h, places, num_keys, key_t, width, WIDTH)
        of_value = _tile(value + b * value_b + h * value_h, places, num_keys, value_t, width, WIDTH)
        of_out = _tile(grad + b * grad_b + h * grad_h, rows, num_queries, grad_l, width, WIDTH)
        own = bias + b * bias_b + h * bias_h
        _, slope = _weights(of_query, of_key, own, bias_l, bias_t, rows, places, num_queries, num_keys, CAUSAL, BIASED)
        total += slope * _product(of_out, tl.trans(of_value))
    start = out + (group * num_heads + h) * num_queries * num_keys + first
    _store(start, rows, num_queries, num_keys, num_keys - first, total * scale, BLOCK)
