"""Our products give what torch's give, up to rounding, and are taken where they may be."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from reliability_world import make_trainer

import blas
import machine_code
from blas import Linear, linear, mm
from footprint import Footprint
from losses import softmax_loss
from parallel import cores, in_pieces, row_pieces


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> list:
    """Our product wherever numba is, in a process of one thread; counts the calls."""
    monkeypatch.setattr(blas, "_torch_lacks_avx512", lambda: True)
    found, calls = blas._multiply(), []
    if found is None:
        pytest.skip("no numba")
    monkeypatch.setattr(blas, "_multiply", lambda: lambda *arguments: (calls.append(1), found(*arguments)))
    return calls


SIZES = [(5, 7, 3), (1, 7, 3), (5, 1, 3), (5, 7, 1), (1, 1, 1), (1, 6, 1), (300, 33, 65), (47, 20, 1001)]  # the last is wide


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("add", [False, True])
def test_products_in_every_layout(own: list, size: tuple[int, int, int], add: bool) -> None:
    rows, inner, columns = size
    torch.manual_seed(0)

    def layouts(rows: int, columns: int):
        yield torch.randn(rows, columns)
        yield torch.randn(columns, rows).T
        yield torch.randn(rows, 2 * columns + 1)[:, 1 : columns + 1]  # rows apart
        yield torch.randn(columns, rows + 3)[:, 3:].T
        yield torch.randn(rows, 2 * columns)[:, ::2]  # entries apart
        yield torch.randn(1, columns).expand(rows, -1)
        yield torch.nn.Parameter(torch.randn(rows, columns)).detach()

    for a, b in itertools.product(layouts(rows, inner), layouts(inner, columns)):
        whole = torch.randn(rows + 2, columns + 3)
        out, kept = whole[1:-1, 1 : columns + 1], whole.clone()
        kept[1:-1, 1 : columns + 1] = a.double() @ b.double() + (out if add else 0)
        assert mm(a, b, out=out, add=add) is out
        torch.testing.assert_close(whole, kept)  # around out too
        torch.testing.assert_close(mm(a, b), (a.double() @ b.double()).float())
    assert own


def test_products_of_nothing(own: list) -> None:
    assert mm(torch.ones(0, 3), torch.ones(3, 4)).shape == (0, 4) and mm(torch.ones(2, 3), torch.ones(3, 0)).shape == (2, 0)
    assert torch.equal(mm(torch.ones(2, 0), torch.ones(0, 3)), torch.zeros(2, 3))
    assert torch.equal(mm(torch.ones(2, 0), torch.ones(0, 3), out=torch.ones(2, 3), add=True), torch.ones(2, 3))


@pytest.mark.parametrize("out", [None, torch.empty(3, 3), torch.empty(2, 4)])
def test_sizes_that_do_not_fit_are_torchs_to_refuse(own: list, out: torch.Tensor | None) -> None:
    for add in (False, True) if out is not None else (False,):
        with pytest.raises(RuntimeError):
            mm(torch.ones(2, 3), torch.ones(3 if out is not None and out.shape == (3, 3) and add else 4, 3), out=out, add=add)
    assert not own


def test_where_rows_lie_otherwise_torch_writes(own: list) -> None:
    a, b, out = torch.randn(4, 5), torch.randn(5, 3), torch.ones(3, 4).T
    torch.testing.assert_close(mm(a, b, out=out, add=True), 1 + a @ b)
    with pytest.raises(RuntimeError):  # rows on top of one another
        mm(a, b, out=torch.zeros(3).expand(4, 3))
    assert not own


def test_gradients_are_not_lost(own: list) -> None:
    x, weight = torch.randn(4, 5), torch.randn(5, 3, requires_grad=True)
    assert mm(x, weight).requires_grad and not own
    with torch.no_grad():
        assert not mm(x, weight).requires_grad and own


def test_values_that_are_no_numbers_come_through(own: list) -> None:
    a = torch.tensor([[np.nan, 0.0], [np.inf, 1.0], [0.0, 1.0]])
    found = mm(a, torch.eye(2))
    assert found[0].isnan().any() and not found[1].isfinite().all() and torch.equal(found[2], a[2])


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_and_its_gradients(own: list, monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    torch.manual_seed(1)
    layer, x, upstream = Linear(9, 12, bias=bias), torch.randn(600, 9, requires_grad=True), torch.randn(12, 600).T

    def found():
        out = layer(x)
        return out, *torch.autograd.grad(out, [x, *layer.parameters()], upstream)

    fast, num_calls = found(), len(own)
    monkeypatch.setattr(blas, "ENABLED", False)
    torch.testing.assert_close(fast, found(), atol=1e-4, rtol=1e-5)
    assert num_calls == 3 == len(own)


def test_a_layer_without_a_gradient_for_its_input(own: list) -> None:
    layer, x = Linear(4, 3), torch.randn(5, 4)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(3, -1))
    assert len(own) == 2


@pytest.mark.parametrize("logq", [False, True])
def test_a_softmax(own: list, monkeypatch: pytest.MonkeyPatch, logq: bool) -> None:
    torch.manual_seed(2)
    query, items = torch.randn(300, 16, requires_grad=True), torch.randn(90, 16, requires_grad=True)
    options = {"candidate_index": torch.arange(0, 90, 2), "log_q": torch.randn(90)} if logq else {}

    def found():
        loss = softmax_loss(query, items, torch.arange(300) % 90, temperature=0.3, **options)
        return loss, *torch.autograd.grad(loss, [query, items])

    fast = found()
    assert own
    monkeypatch.setattr(blas, "ENABLED", False)
    torch.testing.assert_close(fast, found())


@pytest.mark.parametrize("settings", [{}, {"name": "bce", "item_tower": "linear"}, {"backbone": "hstu"}, {"activation": "swiglu"}])
def test_training_is_the_same_up_to_rounding(own: list, monkeypatch: pytest.MonkeyPatch, tmp_path, settings: dict) -> None:
    def losses(name: str) -> list[float]:
        options = {"num_workers": 0, "max_steps": 12, "learning_rate": 1e-3, "optimizer": "adamw", "temperature": 0.2, "dropout_rate": 0.0}
        trainer = make_trainer(tmp_path / name, eval_every_epochs=1000, **options | settings)
        update, found = trainer._update, []
        trainer._update = lambda *batch: (update(*batch), found.append(trainer.loss_sum))
        trainer.fit()
        return found

    fast = losses("fast")
    assert own or settings.get("name") == "bce"  # whose products are all in compiled loops
    monkeypatch.setattr(blas, "ENABLED", False)
    monkeypatch.setattr(machine_code, "available", lambda: False)  # nor in blocks
    assert fast == pytest.approx(losses("slow"), rel=1e-5)


def test_where_torchs_products_are_taken(own: list) -> None:
    x, weight = torch.randn(6, 4), torch.randn(5, 4, requires_grad=True)
    with torch.no_grad():
        linear(x, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    linear(x.double(), weight.double())
    torch.testing.assert_close(linear(x.view(2, 3, 4), weight), F.linear(x, weight).view(2, 3, 5))
    mm(x.double(), weight.T.detach().double())
    with Footprint():
        mm(torch.empty(6, 4), torch.empty(4, 5))
    torch.set_num_threads(2)
    mm(x, weight.T.detach())
    linear(x, weight)
    torch.set_num_threads(1)
    assert not own
    with cores(2):  # the pieces of a step have a core each
        mm(x, weight.T.detach())
    assert len(own) == 1


def test_side_by_side(own: list) -> None:
    """Threads of a step's pieces call at once, through layers with gradients."""
    torch.manual_seed(3)
    layer, x = Linear(48, 40), torch.randn(4000, 48)

    def body(number: int, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (layer(x),)

    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    wanted = torch.autograd.grad(expected.square().sum(), layer.weight)[0]
    with cores(2):
        for _ in range(20):
            (out,) = in_pieces(body, row_pieces(len(x)), (x,), [*layer.parameters()])
            torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(torch.autograd.grad(out.square().sum(), layer.weight)[0], wanted, atol=1e-2, rtol=1e-5)
    assert len(own) == 20 * 4 * 2


def test_recomputed_gradients(own: list) -> None:
    layer, x = Linear(6, 6), torch.randn(9, 6, requires_grad=True)
    plain = torch.autograd.grad(layer(layer(x)).square().sum(), [x, layer.weight])
    again = torch.autograd.grad(checkpoint(lambda x: layer(layer(x)), x, use_reentrant=False).square().sum(), [x, layer.weight])
    assert all(map(torch.equal, plain, again)) and own


def test_a_compiler_sees_one_graph() -> None:
    layer, x = torch.nn.Sequential(Linear(4, 8), torch.nn.ReLU(), Linear(8, 4)), torch.randn(3, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_only_where_torch_leaves_half_of_the_processor_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what a checkpoint notes of it."""
    numba = pytest.importorskip("numba")
    assert numba.__version__ in blas.library()
    for lacks, available, name in (
        (True, True, "own"),
        (False, True, "torch, own in blocks"),
        (True, False, "torch"),
        (False, False, "torch"),
    ):
        monkeypatch.setattr(blas, "_torch_lacks_avx512", lambda lacks=lacks: lacks)
        monkeypatch.setattr(machine_code, "available", lambda available=available: available)
        assert blas.library().partition(", numba")[0] == name and (blas._multiply() is not None) == (name == "own")
