"""muon.py: against singular value decompositions and an independent implementation; which weights it takes; state."""

import copy
import math

import pytest
import torch
from tiny import tiny_store
from torch import nn

import muon
from config import Config, with_values
from features import TableLayout
from muon import Muon, MuonAdamW, find_matrices, orthogonalise
from optim import dense_optimizer
from trainer import build_model
from updates import MATRIX_MODULES


@pytest.mark.parametrize("shape", [(1, 8, 8), (5, 4, 16), (3, 16, 4), (1, 64, 32)])
def test_singular_values_go_to_one_and_the_directions_stay(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    found = orthogonalise(x)
    # In the basis of x's own directions the result is diagonal, each value what five quintics make of s / |x|.
    values = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(u.mT @ found @ vt.mT, torch.diag_embed(values), atol=2e-4, rtol=0)
    large = s > 0.003 * s.square().sum(-1, keepdim=True).sqrt()
    assert bool(((values > 0.68) & (values < 1.21))[large].all())
    assert float((found - u @ vt).norm() / (u @ vt).norm()) < 0.35


def test_scale_does_not_matter_and_zeros_stay():
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(orthogonalise(1000 * x), orthogonalise(x), atol=1e-4, rtol=1e-4)
    assert (orthogonalise(torch.zeros(2, 6, 4)) == 0).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_bfloat16_on_cuda_is_near():
    x = torch.randn(4, 64, 32, generator=torch.Generator().manual_seed(1))
    found = orthogonalise(x.cuda())
    assert found.dtype == torch.float32 and float((found.cpu() - orthogonalise(x)).norm() / orthogonalise(x).norm()) < 0.05


def plain_step(weight, grad, velocity, lr, momentum, decay):
    """One matrix (O, I) in float64, as the authors write it: velocity = momentum * velocity + grad; Nesterov."""
    velocity = momentum * velocity + grad
    x = grad + momentum * velocity
    x = x / (x.square().sum().sqrt() + 1e-7)
    transposed = x.shape[0] > x.shape[1]
    if transposed:
        x = x.T
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    if transposed:
        x = x.T
    scale = math.sqrt(max(1, weight.shape[0] / weight.shape[1]))
    return weight - lr * decay * weight - lr * scale * x, velocity


class Stack(nn.Module):
    matrix_stacks = {"weights": 1, "expert": 1, "pairs": 2}

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(3, 4, 6)), nn.Parameter(torch.randn(2, 1, 6))])
        self.expert = nn.Parameter(torch.randn(5, 8, 2))
        self.pairs = nn.Parameter(torch.randn(3, 4, 10))  # two of (4, 5) side by side


def test_six_steps_equal_a_plain_implementation():
    torch.manual_seed(0)
    fused, narrow, stack = nn.Linear(6, 18), nn.Linear(8, 4), Stack()
    fused.fused = 3
    model = nn.ModuleList([fused, narrow, stack])
    matrices = find_matrices([model])
    assert [m[1:] for m in matrices] == [(3, False, 1), (1, False, 1), (3, True, 1), (5, True, 1), (6, True, 2)]
    optimizer = Muon(matrices, lr=0.02, momentum=0.9, weight_decay=0.1)

    def plain(weight, parts, inputs_first, fused):
        if inputs_first:
            return [part.T for stacked in weight for part in stacked.chunk(fused, dim=1)]
        return list(weight.split(len(weight) // parts))

    expected = [[p.detach().double() for p in plain(*m)] for m in matrices]
    velocities = [[torch.zeros_like(p) for p in parts] for parts in expected]
    for step in range(6):
        for m in matrices:
            m.weight.grad = torch.randn(m.weight.shape, generator=torch.Generator().manual_seed(step))
        kept = [m.weight.grad.clone() for m in matrices]
        for group in optimizer.param_groups:
            group["lr"] = 0.02 / (1 + step)
        optimizer.step()
        assert all(torch.equal(m.weight.grad, grad) for m, grad in zip(matrices, kept))
        for n, m in enumerate(matrices):
            grads = plain(m.weight.grad, *m[1:])
            for p, grad in enumerate(grads):
                expected[n][p], velocities[n][p] = plain_step(expected[n][p], grad.double(), velocities[n][p], 0.02 / (1 + step), 0.9, 0.1)
    for m, parts in zip(matrices, expected):
        for found, wanted in zip(plain(*m), parts, strict=True):
            torch.testing.assert_close(found.detach().double(), wanted, atol=3e-5, rtol=0)
    assert len(optimizer.state[fused.weight]) == 1


def test_torchs_own_muon_goes_the_same_way():
    """It orthogonalises in bfloat16, so only nearly."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(16, 32, bias=False), nn.Linear(16, 32, bias=False)
    start = ours.weight.detach().clone()
    theirs.load_state_dict(ours.state_dict())
    a = Muon(find_matrices([ours]), lr=0.02, momentum=0.95)
    b = torch.optim.Muon(theirs.parameters(), lr=0.02, momentum=0.95, weight_decay=0.0)
    for step in range(5):
        grad = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
        ours.weight.grad, theirs.weight.grad = grad.clone(), grad.clone()
        a.step(), b.step()
    there, here = theirs.weight.detach(), ours.weight.detach()
    assert float((here - there).norm() / (here - start).norm()) < 0.03


def test_a_fused_weight_must_divide():
    layer = nn.Linear(4, 10)
    layer.fused = 3
    with pytest.raises(ValueError, match="10 outputs are not 3 matrices"):
        find_matrices([layer])


@pytest.mark.parametrize(("activation", "conditioning"), [("gelu", "none"), ("swiglu", "none"), ("gelu", "film"), ("gelu", "gate")])
def test_of_the_recommender_the_matrices_of_blocks_and_towers_are_taken(activation, conditioning):
    store = tiny_store()
    settings = {"activation": activation, "action_conditioning": conditioning, "position": "learned", "user_id": True}
    config = with_values(Config(), hidden_units=8, num_blocks=2, **settings)
    model = build_model(config, TableLayout.from_store(store, config.model), store.schema, ("81",))
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(m.weight)]: (m.parts, m.inputs_first) for m in find_matrices([getattr(model, name) for name in MATRIX_MODULES])}
    expected = {"dense.81.projection.weight": (1, False), "item_projection.weights.0": (3, True), "user_projection.weights.0": (3, True)}
    for block in range(2):
        expected[f"backbone.blocks.{block}.attention.qkv.weight"] = (3, False)
        expected[f"backbone.blocks.{block}.feed_forward.inner.weight"] = (2 if activation == "swiglu" else 1, False)
        for layer in ("attention", "feed_forward"):
            expected[f"backbone.blocks.{block}.{layer}.out.weight"] = (1, False)
    assert found == expected
    optimizer = dense_optimizer(
        model, "muon", lr=1e-3, betas=(0.9, 0.98), weight_decay=0.5, matrix_modules=[getattr(model, name) for name in MATRIX_MODULES]
    )
    taken = [p for group in optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in taken}) == len(taken) and {id(p) for p in taken} == {id(p) for p in model.parameters() if p.requires_grad}
    assert [group.get("schedule") for group in optimizer.param_groups][:2] == [None, None]
    assert {group["schedule"] for group in optimizer.param_groups[2:]} == {"muon"}
    decays = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays["positions.weight"] == decays["backbone.blocks.0.attention.qkv.weight"] == 0.5 and decays["user_token"] == 0


def test_state_round_trip():
    def make():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))
        return model, dense_optimizer(model, "muon", lr=0.01, betas=(0.9, 0.98), weight_decay=0.1, matrix_modules=[model])

    def step(model, optimizer, seed):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())

    a, b = make(), make()
    assert isinstance(a[1], MuonAdamW)
    for seed in range(4):
        step(*a, seed)
        if seed == 1:
            b[0].load_state_dict(a[0].state_dict())
            b[1].load_state_dict(copy.deepcopy(a[1].state_dict()))  # torch takes tensors over, as from a file
    for seed in (2, 3):
        step(*b, seed)
    assert all(torch.equal(p, q) for p, q in zip(a[0].parameters(), b[0].parameters()))


def test_a_weight_without_gradient_is_left_alone():
    layer = nn.Linear(3, 3, bias=False)
    before = layer.weight.detach().clone()
    muon.Muon(find_matrices([layer]), lr=1.0, momentum=0.9, weight_decay=0.5).step()
    assert torch.equal(layer.weight, before)
