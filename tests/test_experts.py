"""experts.Experts against a loop over tokens; its balance by hand; what it counts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from config import Config, with_values
from experts import Experts, take_usage
from layers import FeedForward
from muon import Muon, find_matrices


def make(**settings) -> Experts:
    torch.manual_seed(0)
    defaults = {"hidden_units": 6, "num_heads": 1, "num_blocks": 1, "num_experts": 4, "dropout_rate": 0.0}
    return Experts(with_values(Config(), **defaults | settings).model)


def by_loop(experts: Experts, x: torch.Tensor) -> torch.Tensor:
    rows = []
    for token in x:
        probability = experts.router(token).softmax(0)
        best = probability.topk(experts.active).indices.tolist()
        total = sum(probability[e] for e in best)
        out = torch.zeros(6, dtype=x.dtype) if experts.shared is None else experts.shared(token)
        for e in best:
            hidden = token @ experts.inner[e]
            if experts.activation == "swiglu":
                hidden = hidden[: len(hidden) // 2] * F.silu(hidden[len(hidden) // 2 :])
            else:
                hidden = F.gelu(hidden) if experts.activation == "gelu" else F.relu(hidden)
            out = out + probability[e] / total * (hidden @ experts.outer[e])
        rows.append(out)
    return torch.stack(rows)


@pytest.mark.parametrize("settings", [{}, {"active_experts": 1}, {"active_experts": 4, "shared_experts": 0}, {"activation": "swiglu"},
                                      {"activation": "relu", "shared_experts": 2, "expert_multiplier": 0.5}], ids=str)  # fmt: skip
def test_against_a_loop_over_tokens(settings):
    experts = make(**settings).double()
    x = torch.randn(23, 6, dtype=torch.float64, requires_grad=True)
    found, expected = experts(x)[0], by_loop(experts, x)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)  # the router's softmax is float32
    weights, upstream = [x, *experts.parameters()], torch.randn_like(found)
    for a, b in zip(torch.autograd.grad(found, weights, upstream, allow_unused=True),
                    torch.autograd.grad(expected, weights, upstream, allow_unused=True), strict=True):  # fmt: skip
        torch.testing.assert_close(torch.zeros(1) if a is None else a, torch.zeros(1) if b is None else b, atol=1e-5, rtol=1e-4)


def test_balance_counts_and_experts_without_tokens():
    experts = make(active_experts=1).train()
    with torch.no_grad():
        experts.router.weight.zero_()
        experts.router.weight[2, 0] = 100.0
    x = torch.randn(10, 6)
    x[:, 0] = 1.0  # all go to expert 2
    out, balance = experts(x)
    assert balance.item() == pytest.approx(4.0) and out.isfinite().all()
    x[:, 0] = torch.tensor([1.0, -1.0] * 5)
    with torch.no_grad():
        experts.router.weight[3, 0] = -100.0  # every second token to expert 3
    _, balance = experts(x)
    assert balance.item() == pytest.approx(4 * (0.5 * 0.5 + 0.5 * 0.5))
    assert [row.tolist() for row in experts.counts] == [[0, 0, 10, 0], [0, 0, 5, 5]]
    with torch.no_grad():
        experts(x)
    model = nn.ModuleDict({"block": experts})
    assert take_usage(model)["block"].tolist() == [0.0, 0.0, 0.75, 0.25]  # what is evaluated does not count
    assert take_usage(model) == {}


def test_the_balance_pulls_the_router_towards_even_use():
    experts = make(active_experts=1)
    with torch.no_grad():
        experts.router.weight[1] += 1.0
    x = torch.rand(200, 6)
    optimizer = torch.optim.SGD([experts.router.weight], lr=0.5)
    first = experts(x)[1].item()
    for _ in range(100):
        optimizer.zero_grad()
        experts(x)[1].backward()
        optimizer.step()
    assert first > 3 and experts(x)[1].item() < 1.5


@pytest.mark.parametrize(("activation", "fused"), [("gelu", 1), ("swiglu", 2)])
def test_muon_takes_each_matrix_of_an_expert(activation, fused):
    experts = make(shared_experts=0, activation=activation)
    names = {id(p): name for name, p in experts.named_parameters()}
    assert {(names[id(m.weight)], *m[1:]) for m in find_matrices([experts])} == {
        ("router.weight", 1, False, 1), ("inner", 4 * fused, True, fused), ("outer", 4, True, 1)}  # fmt: skip


def test_muon_moves_a_swiglu_expert_as_the_feed_forward_of_its_weights():
    experts = make(num_experts=1, active_experts=1, shared_experts=0, activation="swiglu", expert_multiplier=2.0)
    alone = FeedForward(6, 2.0, "swiglu", 0.0)
    with torch.no_grad():
        alone.inner.weight.copy_(experts.inner[0].T)
        alone.out.weight.copy_(experts.outer[0].T)
        alone.inner.bias.zero_()
        alone.out.bias.zero_()
    x, upstream = torch.randn(23, 6), torch.randn(23, 6)
    for module in (experts, alone):
        out = module(x)
        out = out[0] if module is experts else out
        out.backward(upstream)
        Muon(find_matrices([module]), lr=0.1, momentum=0.9).step()
    torch.testing.assert_close(experts.inner[0].T, alone.inner.weight, atol=1e-4, rtol=0)
    torch.testing.assert_close(experts.outer[0].T, alone.out.weight, atol=1e-4, rtol=0)
