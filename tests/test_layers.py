"""layers.Dropout: its rate, scale, bits and gradient; gelu. The blocks themselves are tested through the model (tests/test_model.py)."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import footprint
import layers
from layers import Dropout, gelu


def dropped(x, rate, seed=0):
    torch.manual_seed(seed)
    return Dropout(rate)(x)


def scale_of(rate: float) -> float:
    """1 / (1 - rate), for the rate as a multiple of 2^-16, in float32."""
    return float(torch.tensor(65536 / (65536 - round(rate * 65536))))


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.5, 0.9, 0.01, 3 / 65536])
def test_rate_and_scale(rate):
    num = 1_000_000
    out = dropped(torch.ones(num), rate)
    zeros = int((out == 0).sum())
    assert abs(zeros - num * rate) < 4 * math.sqrt(num * rate * (1 - rate))
    assert out[out != 0].unique().tolist() == [scale_of(rate)]
    assert abs(round(rate * 65536) / 65536 - rate) <= 2**-17


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_expectation_is_kept(rate):
    x = torch.randn(50, generator=torch.Generator().manual_seed(1))
    mean = dropped(x.expand(20_000, 50), rate).mean(dim=0)
    sigma = x.abs() * math.sqrt(rate / (1 - rate) / 20_000)
    assert ((mean - x).abs() < 4.5 * sigma).all()


def test_all_four_lanes_of_a_draw_have_the_rate_and_are_independent():
    """A draw of 64 bits serves four neighbours."""
    rate, num = 0.2, 400_000
    lanes = (dropped(torch.ones(4 * num), rate) == 0).view(num, 4).double()
    sigma = math.sqrt(rate * (1 - rate) / num)
    assert ((lanes.mean(dim=0) - rate).abs() < 4 * sigma).all()
    both = lanes.T @ lanes / num
    for a in range(4):
        for b in range(a):
            assert abs(float(both[a, b]) - rate**2) < 4 * math.sqrt(rate**2 * (1 - rate**2) / num)
    neighbours = float((lanes[1:] * lanes[:-1]).mean())  # the same lane of the next draw
    assert abs(neighbours - rate**2) < 4 * math.sqrt(rate**2 * (1 - rate**2) / (4 * num))


@pytest.mark.parametrize("training", [True, False])
def test_identity(training):
    x = torch.randn(5, 3)
    assert Dropout(0.0).train(training)(x) is x
    assert Dropout(0.5).eval()(x) is x


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 3), (0,), (0, 4), ()])
def test_any_number_of_entries(shape):
    x = torch.randn(shape) + 10
    out = dropped(x, 0.5)
    assert out.shape == x.shape and torch.equal(out, torch.where(out == 0, 0, x * 2))


def test_a_transposed_input_keeps_its_places():
    x = torch.randn(30, 40).T
    out = dropped(x, 0.3)
    kept = out != 0
    torch.testing.assert_close(out, torch.where(kept, x * scale_of(0.3), 0))
    assert torch.equal(kept, dropped(torch.ones(40, 30), 0.3) != 0)  # the mask is of the entries' order, not of memory's


def test_the_gradient_uses_the_same_mask_and_scale():
    x = torch.randn(1001, 7, requires_grad=True)
    out = dropped(x, 0.3)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    kept = out.detach() != 0
    torch.testing.assert_close(x.grad, torch.where(kept, upstream * scale_of(0.3), 0), rtol=1e-6, atol=0)
    assert 0.6 < float(kept.float().mean()) < 0.8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_keep_theirs(dtype):
    x = (torch.randn(999) + 10).to(dtype).requires_grad_()
    out = dropped(x, 0.2)
    out.sum().backward()
    kept = out != 0
    assert out.dtype == x.grad.dtype == dtype and torch.equal(kept, dropped(torch.ones(999), 0.2) != 0)
    torch.testing.assert_close(out.detach()[kept], x.detach()[kept] * scale_of(0.2), rtol=0.01, atol=0)
    assert torch.equal(x.grad != 0, kept)


def test_masks_come_from_the_default_generator():
    x = torch.ones(1000)
    first, again, other = dropped(x, 0.5, seed=1), dropped(x, 0.5, seed=1), dropped(x, 0.5, seed=2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(1)
    module = Dropout(0.5)
    assert not torch.equal(module(x), module(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_mask_twice(use_reentrant):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(7, 7), Dropout(0.5), nn.Tanh(), nn.Linear(7, 7), Dropout(0.3))
    start = torch.randn(9, 7)
    found = []
    for by_checkpoint in (False, True):
        layers.zero_grad()
        x = start.clone().requires_grad_()
        torch.manual_seed(5)
        out = checkpoint(layers, x, use_reentrant=use_reentrant) if by_checkpoint else layers(x)
        out.square().sum().backward()
        found.append([out.detach(), x.grad, *(p.grad.clone() for p in layers.parameters())])
    assert all(map(torch.equal, *found)) and (found[0][0] == 0).any()


def test_repr_says_the_rate():
    assert repr(Dropout(0.25)) == "Dropout(rate=0.25)"


def test_a_torch_without_is_exporting_is_one_that_does_not_export(monkeypatch):
    """Before 2.7, as a platform may have that installs nothing: experts and HSTU ask on each forward pass."""
    assert layers.is_exporting is torch.compiler.is_exporting
    monkeypatch.delattr(torch.compiler, "is_exporting")
    spec = importlib.util.spec_from_file_location("layers_of_an_old_torch", layers.__file__)
    old = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(old)
    assert old.is_exporting() is False
    sources = [path for path in Path(layers.__file__).parent.glob("*.py") if path.stem != "layers"]
    assert not [path.name for path in sources if "compiler.is_exporting" in path.read_text(encoding="utf-8")]


def test_gelu_makes_no_kernel_for_each_number_of_rows():
    """What is left in use after 300 numbers of rows; F.gelu itself leaves some 17 MiB of this size."""
    libc = footprint._libc()
    if libc is None:
        pytest.skip("this C library does not tell of its heap")

    def shapes(function, first: int) -> int:
        before = libc.mallinfo2().uordblks
        for rows in range(first, first + 300):
            x = torch.full((rows, 64), 0.5, requires_grad=True)
            function(x).sum().backward()
        return libc.mallinfo2().uordblks - before

    shapes(gelu, 900)
    assert shapes(gelu, 1000) < 1 << 20
    x = torch.randn(7, 5, requires_grad=True)
    found, wanted = gelu(x), F.gelu(x)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*[torch.autograd.grad(out.square().sum(), x)[0] for out in (found, wanted)])
    assert found.is_contiguous()
