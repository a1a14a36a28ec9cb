"""A Transformer block by compiled loops gives what torch's operations give, with the same dropout masks; else it is left to torch."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import blas
import block_kernels
import fused_block
import machine_code
from backbones import Sequence, TransformerBlock, transformer
from config import Config
from layers import Packing, Queries, rotary

LENGTHS = (5, 17, 1, 33, 70, 32)
CPU = torch.device("cpu")

pytestmark = [pytest.mark.skipif(not machine_code.available(), reason="no numba"), pytest.mark.usefixtures("one_thread")]


def packed(lengths=LENGTHS) -> Packing:
    lengths = torch.tensor(lengths)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()])
    return Packing(len(lengths), int(lengths.max()), owner * int(lengths.max()) + positions, positions)


def make_block(**settings) -> TransformerBlock:
    torch.manual_seed(0)
    block = TransformerBlock(replace(Config().model, **{"position": "none", "dropout_rate": 0.2} | settings))
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block.train()


def results(block: TransformerBlock, sequence: Sequence, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Of one pass forward and backward."""
    x = x.clone().requires_grad_()
    block.zero_grad()
    torch.manual_seed(3)
    out, balance = block(x, sequence)
    out.backward(grad)
    assert balance is None
    return {"result": out.detach(), "x": x.grad} | {name: p.grad.clone() for name, p in block.named_parameters()}


def by_torch(monkeypatch: pytest.MonkeyPatch, *arguments) -> dict[str, Tensor]:
    with monkeypatch.context() as changed:
        changed.setattr(fused_block, "takes", lambda *_: False)
        return results(*arguments)


SHAPES = {
    "32": {"hidden_units": 32, "num_heads": 2, "ffn_multiplier": 1.0},
    "odd": {"hidden_units": 18, "num_heads": 3, "ffn_multiplier": 4.0},
}


@pytest.mark.parametrize(
    ("norm_first", "norm", "activation", "rope", "dropout", "shape"),
    list(itertools.product((True, False), ("layernorm", "rmsnorm"), ("relu", "gelu", "swiglu"), (True, False), (0.0, 0.2), SHAPES)),
)
def test_equals_torch(monkeypatch, norm_first, norm, activation, rope, dropout, shape) -> None:
    block = make_block(norm_first=norm_first, norm=norm, activation=activation, dropout_rate=dropout, **SHAPES[shape])
    packing, width = packed(), block.attention.out.in_features
    cos_sin = rotary(packing.max_length, width // block.attention.num_heads, CPU) if rope else None
    x, grad = torch.randn(len(packing.positions), width), torch.randn(len(packing.positions), width)
    arguments = block, Sequence(packing, cos_sin, None), x, grad
    assert fused_block.takes(*arguments[:1], x, arguments[1])
    ours, theirs = results(*arguments), by_torch(monkeypatch, *arguments)
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() <= 2e-5 * value.abs().max().clamp_min(1e-3), name


@pytest.mark.parametrize("width", [32, 18])
def test_more_tokens_than_a_tile_and_a_long_user(monkeypatch, width: int) -> None:
    block = make_block(hidden_units=width, num_heads=1)
    packing = packed((700, 3, 1300))
    x, grad = torch.randn(2003, width), torch.randn(2003, width)
    assert 2003 > 2 * block_kernels.TILE_ENTRIES // width
    ours, theirs = (
        results(block, Sequence(packing, None, None), x, grad),
        by_torch(monkeypatch, block, Sequence(packing, None, None), x, grad),
    )
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() <= 5e-5 * value.abs().max(), name


def test_large_scores_neither_overflow_nor_lose_their_order(monkeypatch) -> None:
    block = make_block(hidden_units=32, num_heads=1, dropout_rate=0.0)
    packing = packed((40,))
    x, grad = 30 * torch.randn(40, 32), torch.randn(40, 32)
    block.norm_first = False  # so that x reaches the products as it is
    ours, theirs = (
        results(block, Sequence(packing, None, None), x, grad),
        by_torch(monkeypatch, block, Sequence(packing, None, None), x, grad),
    )
    assert all(value.isfinite().all() for value in ours.values())
    torch.testing.assert_close(ours["result"], theirs["result"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
def test_what_is_not_finite_stays_so(value: float, norm_first: bool, activation: str) -> None:
    """That token's and those of its user after it, but no other user's: a step's check must see it."""
    block = make_block(hidden_units=32, num_heads=2, norm_first=norm_first, activation=activation)
    x = torch.randn(20, 32)
    x[8, 5] = value
    out, _ = block(x.requires_grad_(), Sequence(packed((4, 9, 7)), None, None))
    finite = out.isfinite().all(1)
    assert not finite[8:13].any() and finite[:4].all() and finite[13:].all()
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert not grad[8].isfinite().all() and grad[:4].isfinite().all() and grad[13:].isfinite().all()


def test_gradient_checkpointing_repeats_the_masks() -> None:
    block, packing = make_block(hidden_units=32, num_heads=1), packed()
    sequence, x = Sequence(packing, None, None), torch.randn(len(packing.positions), 32, requires_grad=True)
    found = []
    for run in (block, lambda x, sequence: checkpoint(block, x, sequence, use_reentrant=False)):
        torch.manual_seed(5)
        found.append(torch.autograd.grad(run(x, sequence)[0].square().sum(), [x, *block.parameters()]))
    assert all(map(torch.equal, *found))


def test_left_to_torch_where_the_loops_cannot() -> None:
    packing = packed()
    x = torch.randn(len(packing.positions), 64)
    sequence = Sequence(packing, None, None)
    assert fused_block.takes(make_block(), x, sequence)
    assert not fused_block.takes(make_block(num_experts=2), x, sequence)
    assert not fused_block.takes(make_block(attention_dropout=0.1), x, sequence)
    assert fused_block.takes(make_block(attention_dropout=0.1).eval(), x, sequence)
    assert not fused_block.takes(make_block(time_bias=True), x, sequence)
    assert not fused_block.takes(make_block(), x.double(), sequence)
    assert not fused_block.takes(make_block(), x, sequence._replace(queries=Queries(torch.tensor([0]), packing)))
    for part in ("feed_forward.inner", "attention", "dropout"):
        hooked = make_block()
        handle = hooked.get_submodule(part).register_forward_hook(lambda *_: None)
        assert not fused_block.takes(hooked, x, sequence)
        handle.remove()
        assert fused_block.takes(hooked, x, sequence)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not fused_block.takes(make_block(), x, sequence)
    handle.remove()
    with torch.no_grad():
        assert not fused_block.takes(make_block(), x, sequence)
    with torch.autocast("cpu", torch.bfloat16):
        assert not fused_block.takes(make_block(), x, sequence)
    torch.set_num_threads(2)
    assert not fused_block.takes(make_block(), x, sequence)


def test_without_the_library_torch_does_it(monkeypatch) -> None:
    monkeypatch.setattr(machine_code, "available", lambda: False)
    packing = packed()
    assert not fused_block.takes(make_block(), torch.randn(len(packing.positions), 64), Sequence(packing, None, None))
    assert blas.library() == "torch"


def test_a_training_step_takes_it(monkeypatch) -> None:
    """Of the default settings: every block, in a piece of users as in the whole batch."""
    taken = []
    monkeypatch.setattr(fused_block, "run_block", lambda block, x, sequence: taken.append(len(x)) or x)
    encoder = transformer(Config().model).train()
    packing = packed()
    encoder(torch.randn(len(packing.positions), 64), packing, torch.zeros(len(packing.positions), dtype=torch.int64))
    assert taken == [len(packing.positions)] * Config().model.num_blocks


def test_exponential_and_normal_distribution() -> None:
    """To within what float32 resolves: of an exponential, of its argument."""
    numba = pytest.importorskip("numba")
    block_kernels.compiled()
    exp, normal = machine_code.exp_of_minus, block_kernels._normal

    @numba.njit(fastmath=set(block_kernels.kernels.FAST))
    def both(x, exps, below, density):
        for i in range(len(x)):
            exps[i] = exp(abs(x[i]))
            below[i], density[i] = normal(x[i])

    x = np.concatenate([np.linspace(-14, 14, 200_001), [0.0, 86.9, -86.9, 1e20, -1e20]]).astype(np.float32)
    exps, below, density = (np.empty_like(x) for _ in range(3))
    both(x, exps, below, density)
    wide = np.minimum(np.abs(x.astype(np.float64)), 87)
    assert (np.abs(exps / np.exp(-wide) - 1) < 1e-7 * (2 + wide)).all()
    assert np.abs(below - np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x.astype(np.float64)])).max() < 3e-7
    assert np.abs(density - np.exp(-0.5 * x.astype(np.float64) ** 2) / math.sqrt(2 * math.pi)).max() < 3e-7
