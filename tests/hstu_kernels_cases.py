"""HSTU's Triton kernels against its torch operations: on a GPU, or with TRITON_INTERPRET=1. test_hstu_kernels.py runs it."""

from types import SimpleNamespace

import pytest
import torch
from test_backbones import LENGTHS, model_config, packing_of, times_of
from torch import nn

import backbones
import hstu_kernels
from backbones import PointwiseAttention
from footprint import Footprint
from layers import Queries

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's; 1 / (1 + inf) is right

MAX_TOKENS = 50
SHAPES = [(1, 1, 1, 1, 16), (3, 2, 17, 17, 16), (1, 2, 64, 64, 32), (3, 1, 101, 101, 32), (3, 2, 5, 70, 20)]  # B, H, L, T, d
BIASES = [None, (False, False), (False, True), (True, False), (True, True)]  # one a user, one a head
CASES = [(shape, bias) for shape in SHAPES for bias in BIASES if bias is None or (shape[0] > bias[0] and shape[1] > bias[1])]


def attention() -> PointwiseAttention:
    return PointwiseAttention(model_config(max_seq_length=MAX_TOKENS - 1))


def inputs_of(shape, bias=None, dtype=torch.float32, seed=0) -> list[torch.Tensor | None]:
    """query, key, value, bias, and a gradient for the result; all that get gradients want them."""
    users, heads, queries, keys, width = shape
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator)
    query, key, value = (draw(users, heads, length, width) for length in (queries, keys, keys))
    if bias is not None:
        bias = draw(users if bias[0] else 1, heads if bias[1] else 1, queries, keys)
        bias += torch.full((queries, keys), -torch.inf).triu_(keys - queries + 1)
        bias = bias.to(DEVICE).requires_grad_()
    parts = [part.to(DEVICE, dtype).requires_grad_() for part in (query, key, value)]
    return [*parts, bias, draw(users, heads, queries, width).to(DEVICE, dtype)]


def of_torch(query, key, value, bias, grad):
    """Result and gradients in float64."""
    parts = [None if part is None else part.detach().double().requires_grad_() for part in (query, key, value, bias)]
    out = attention()._pointwise(*parts)
    return out, *torch.autograd.grad(out, [part for part in parts if part is not None], grad.double())


def of_kernels(query, key, value, bias, grad):
    out = hstu_kernels.pointwise(query, key, value, bias, MAX_TOKENS)
    return out, *torch.autograd.grad(out, [part for part in (query, key, value, bias) if part is not None], grad)


def assert_near(found, expected, share) -> None:
    """Within a share of the largest entry."""
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=share * b.abs().max().item() + 1e-12)


@pytest.mark.parametrize(("shape", "bias"), CASES)
def test_result_and_gradients(shape, bias):
    if bias is None:
        shape = (*shape[:2], shape[3], *shape[3:])  # L = T
    inputs = inputs_of(shape, bias)
    found = of_kernels(*inputs)
    assert all(part.dtype == torch.float32 for part in found)
    assert_near(found, of_torch(*inputs), 1e-5)


@pytest.mark.parametrize("bias", [None, (False, True)])
@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_halves(dtype, share, bias):
    inputs = inputs_of((1, 2, 70, 70, 32), bias, dtype)
    found = of_kernels(*inputs)
    assert [part.dtype for part in found] == [dtype] * 4 + [torch.float32] * (bias is not None)
    assert_near(found, of_torch(*inputs), share)


@pytest.mark.parametrize("width", [1, 33, 64])
def test_widths(width):
    inputs = inputs_of((1, 1, 33, 33, width))
    assert_near(of_kernels(*inputs), of_torch(*inputs), 1e-5)


def test_more_users_than_groups(monkeypatch):
    monkeypatch.setattr("hstu_kernels.GROUPS", 2)
    inputs = inputs_of((5, 2, 3, 3, 16), (False, True))
    assert_near(of_kernels(*inputs), of_torch(*inputs), 1e-5)


@pytest.mark.parametrize("bias", [None, (True, True)])
def test_the_future_changes_nothing(bias):
    first, second = (inputs_of((1, 1, 40, 40, 16), bias, seed=seed) for seed in (0, 1))
    for t in (1, 32):
        mixed = [torch.cat((a[:, :, :t], b[:, :, t:]), 2) for a, b in zip(first[:3], second[:3], strict=True)]
        found = hstu_kernels.pointwise(*mixed, first[3], MAX_TOKENS)[:, :, :t]
        assert torch.equal(found, hstu_kernels.pointwise(*first[:4], MAX_TOKENS)[:, :, :t])
        for grad in torch.autograd.grad(found.sum(), mixed):
            assert grad[:, :, :t].any() and not grad[:, :, t:].any()


@pytest.mark.parametrize("bias", BIASES)
def test_padding_adds_nothing(bias):
    """A user of padding alone, whose vectors are zeros, and the end of another's row; and a query that sees no key."""
    inputs = inputs_of((3, 2, 37, 37, 16), bias)
    for part in (*inputs[:3], inputs[4]):
        part.data[1], part.data[2, :, 20:] = 0, 0
    if bias is not None:
        inputs[3].data[:, :, 9] = -torch.inf
    found = of_kernels(*inputs)
    assert not found[0][1].any() and not any(part[1].any() or part[2, :, 20:].any() for part in found[1:4])
    assert bias is None or not (found[0][:, :, 9].any() or found[4][:, :, 9].any())
    assert_near(found, of_torch(*inputs), 1e-5)
    short = [part[2:, :, :20].detach().requires_grad_() for part in inputs[:3]]
    own = None if bias is None else inputs[3][2 * bias[0] :][:1, :, :20, :20]
    assert_near([found[0][2:, :, :20]], [hstu_kernels.pointwise(*short, own, MAX_TOKENS)], 1e-5)


def test_what_is_not_a_number_shows():
    query, key, value, bias, _ = inputs_of((1, 1, 3, 3, 16), (False, False))
    bias.data[0, 0, 2, 1] = torch.nan
    assert hstu_kernels.pointwise(query, key, value, bias, MAX_TOKENS).isnan().any(-1).tolist() == [[[False, False, True]]]


def test_strides_and_repetition():
    """Heads side by side in one tensor, as the model has them; a result whose gradient is one number; twice the same bits."""
    rows, found = torch.randn(2, 40, 3, 2, 16, device=DEVICE, requires_grad=True), []
    bias = torch.randn(1, 40, 40, 2, device=DEVICE).permute(0, 3, 1, 2)
    for _ in range(2):
        out = hstu_kernels.pointwise(*rows.transpose(1, 3).unbind(2), bias, MAX_TOKENS)
        found.append([out, *torch.autograd.grad(out.sum(), rows)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    out = attention()._pointwise(*rows.transpose(1, 3).unbind(2), bias)
    assert_near(found[0], [out, *torch.autograd.grad(out.sum(), rows)], 1e-5)


# ---- in the model -------------------------------------------------------------------------------------------------------


def queries_of(last: int) -> Queries:
    """The last tokens of each user of LENGTHS, `last` at most."""
    owner = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    positions, lengths = packing_of().positions, torch.tensor(LENGTHS)
    tokens = (lengths[owner] - positions <= last).nonzero()[:, 0]
    batch = SimpleNamespace(query_tokens=tokens, owner=owner, positions=positions, lengths=lengths, max_queries=last)
    found = Queries.from_batch(batch)
    return Queries(found.tokens.to(DEVICE), moved(found.packing))


def moved(packing):
    return packing._replace(index=packing.index.to(DEVICE), positions=packing.positions.to(DEVICE))


ROPE, RELATIVE, TIME, BOTH = {}, {"position": "relative"}, {"time_bias": True}, {"position": "relative", "time_bias": True}


@pytest.mark.parametrize(("settings", "last", "precision"), [
    (ROPE, None, None), (ROPE, 2, None), (ROPE, None, torch.bfloat16), (RELATIVE, None, None), (TIME, 2, None), (BOTH, None, None),
    (BOTH, 2, None), (BOTH, 2, torch.bfloat16),
], ids=str)  # fmt: skip
def test_the_model_gives_the_same(monkeypatch, settings, last, precision):
    """Result and the gradients of all weights: torch's operations, the kernels, the kernels with checkpoints."""
    torch.manual_seed(0)
    backbone = backbones.hstu(model_config(backbone="hstu", num_experts=2, **settings)).to(DEVICE)
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.3)
    packing, times, x = moved(packing_of()), times_of().to(DEVICE), torch.randn(sum(LENGTHS), 8, device=DEVICE)
    queries, found, calls = None if last is None else queries_of(last), [], []
    for kernels, backbone.gradient_checkpointing in ((None, False), (hstu_kernels, False), (hstu_kernels, True)):
        monkeypatch.setattr(PointwiseAttention, "_fused", lambda *_, kernels=kernels: calls.append(1) or kernels)
        with torch.autocast(DEVICE.type, dtype=precision, enabled=precision is not None):
            out, balance = backbone(x, packing, times, queries)
        found.append([out, *torch.autograd.grad(out.float().square().sum() + balance, list(backbone.parameters()))])
    assert len(calls) == 2 + 2 + 4
    assert_near(found[1], found[0], 1e-5 if precision is None else 5e-2)
    assert_near(found[2], found[1], 1e-5)  # on a GPU, torch adds up the tables' gradients in any order
    with torch.inference_mode(), torch.autocast(DEVICE.type, dtype=precision, enabled=precision is not None):
        assert_near([backbone(x, packing, times, queries)[0]], found[1][:1], 1e-5 if precision is None else 5e-2)


def test_operations_of_torch():
    """Schema, shadows' shapes and strides, and registered gradients."""
    query, key, value, bias, grad = inputs_of((2, 2, 3, 5, 16), (False, True))
    tests = "test_schema", "test_faketensor", "test_autograd_registration"
    for given in (bias, None):
        torch.library.opcheck(hstu_kernels._attention, (query, key, value, given, 0.1), test_utils=tests)
    bias = bias.transpose(2, 3).contiguous().transpose(2, 3)  # not in the order of its dimensions, as AttentionBias makes it
    plain = [part.detach() for part in (grad, query, key, value, bias)]
    for operation in (hstu_kernels._gradients, hstu_kernels._bias_gradient):
        torch.library.opcheck(operation, (*plain, 0.1), test_utils=tests[:2])


def test_shadows_hold_no_scores():
    """--estimate follows the kernels without running them."""
    with Footprint() as shadows:
        query = torch.randn(4, 2, 400, 16, requires_grad=True)
        assert hstu_kernels.takes(query, query, query)
        before = shadows.live["cpu"]
        out = hstu_kernels.pointwise(query, query, query, None, MAX_TOKENS)
        out.sum().backward()
    assert query.grad.shape == query.shape
    assert shadows.live_peak - before < 10 * query.numel() * 4 < 4 * 2 * 400 * 400 * 4


# ---- when they are taken -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "taken"), [
    (lambda q, k, v: (q, k, v), True),
    (lambda q, k, v: (q.bfloat16(), k.bfloat16(), v.bfloat16()), True),
    (lambda q, k, v: (q.double(), k.double(), v.double()), False),
    (lambda q, k, v: (q, k.bfloat16(), v), False),
    (lambda q, k, v: (q[:0], k[:0], v[:0]), False),
    (lambda q, k, v: [part.repeat(1, 1, 1, 5) for part in (q, k, v)], False),
])  # fmt: skip
def test_what_they_take(monkeypatch, change, taken):
    monkeypatch.setattr("hstu_kernels.works", lambda *_: True)
    assert hstu_kernels.takes(*change(*(torch.randn(1, 1, 3, 16) for _ in range(3)))) is taken


@pytest.mark.parametrize(("capability", "taken"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_gpus(monkeypatch, capability, taken):
    monkeypatch.setattr("hstu_kernels.works", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    part = torch.randn(1, 1, 3, 16)
    on_cuda = SimpleNamespace(is_cuda=True, device="cuda:0", dtype=part.dtype, shape=part.shape, numel=part.numel)
    assert hstu_kernels.takes(on_cuda, on_cuda, on_cuda) is taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_first_use_compares_them_with_torch(dtype, recwarn):
    hstu_kernels.works.cache_clear()
    state = torch.get_rng_state()
    assert hstu_kernels.works(DEVICE, dtype, 16) and not [w for w in recwarn if "HSTU" in str(w.message)]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("error", "message"), [
    (0.5, "differ from torch's by 0.5"), (float("inf"), "by inf"), (RuntimeError("no C compiler"), "RuntimeError: no C compiler"),
])  # fmt: skip
def test_faulty_kernels_are_not_taken(monkeypatch, error, message):
    def measured(*_):
        if isinstance(error, Exception):
            raise error
        return error

    monkeypatch.setattr("hstu_kernels._error", measured)
    hstu_kernels.works.cache_clear()
    with pytest.warns(UserWarning, match=message):
        assert not hstu_kernels.works(DEVICE, torch.float32, 16)
    hstu_kernels.works.cache_clear()


@pytest.mark.parametrize("name", ["_forward", "_backward_query", "_backward_key_value", "_backward_bias"])
def test_a_kernel_that_writes_nothing_is_found_out(monkeypatch, name):
    monkeypatch.setattr("hstu_kernels.CHECKED", (2, 1, 33))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size, **how: self.new_full(size, torch.nan, **how))
    assert hstu_kernels._error(DEVICE, torch.float32, 16, True) < 1e-5
    run = hstu_kernels._Inputs._run
    others = lambda self, kernel, *rest: None if kernel is getattr(hstu_kernels, name) else run(self, kernel, *rest)
    monkeypatch.setattr(hstu_kernels._Inputs, "_run", others)
    assert hstu_kernels._error(DEVICE, torch.float32, 16, True) == float("inf")
