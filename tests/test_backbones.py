"""Blocks against plain computations: biased and pointwise attention, the biases' rows, gradients. Causality and padding: test_model.py."""

import math

import pytest
import torch
from test_trainer import losses_of, make_trainer
from torch import nn

from attention_bias import NUM_GAPS, WITH_USER, AttentionBias, Pairs
from backbones import BACKBONES, HSTUBlock, Sequence
from config import Config, with_values
from layers import CausalSelfAttention, Packing, make_norm

LENGTHS = (5, 1, 3)


def packing_of(lengths=LENGTHS) -> Packing:
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Packing(len(lengths), max(lengths), owner * max(lengths) + positions, positions)


def model_config(**settings):
    return with_values(
        Config(), **{"hidden_units": 8, "num_heads": 2, "num_blocks": 2, "max_seq_length": 9, "dropout_rate": 0.0} | settings
    ).model


def times_of(lengths=LENGTHS, seed=0) -> torch.Tensor:
    """Seconds of each token, 0 at user tokens."""
    generator = torch.Generator().manual_seed(seed)
    users = [torch.randint(0, 100_000, (length,), generator=generator).cumsum(0) for length in lengths]
    for user in users:
        user[0] = 0
    return torch.cat(users)


def random_bias(relative=True, time=True) -> AttentionBias:
    bias = AttentionBias(2, 10, relative, time)
    for table in bias.parameters():
        nn.init.normal_(table)
    return bias


def bias_by_hand(bias: AttentionBias, times: list[int], head: int, query: int, key: int) -> torch.Tensor:
    total = torch.zeros(())
    if bias.distance is not None:
        total = total + bias.distance[query - key, head]
    if bias.gap is not None:
        row = WITH_USER if 0 in (query, key) else min(NUM_GAPS - 1, int(math.log2(max(0, times[query] - times[key]) + 1)))
        total = total + bias.gap[row, head]
    return total


@pytest.mark.parametrize(("relative", "time"), [(True, False), (False, True), (True, True)])
def test_bias_by_hand(relative, time):
    torch.manual_seed(0)
    bias, packing, times = random_bias(relative, time), packing_of(), times_of()
    found = bias(Pairs(packing, times, time))
    assert found.shape == (len(LENGTHS) if time else 1, 2, 5, 5) and found.dtype == torch.float32
    for user, own in enumerate(times.split(LENGTHS)):
        for head in range(2):
            for query in range(LENGTHS[user]):
                for key in range(5):
                    value = found[user if time else 0, head, query, key]
                    expected = bias_by_hand(bias, own.tolist(), head, query, key) if key <= query else torch.tensor(-torch.inf)
                    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("seconds", [0, 1, 2, 3, 7, 8, 2**30 - 2, 2**30 - 1, 2**50])
def test_buckets_change_at_powers_of_two(seconds):
    pairs = Pairs(packing_of((3,)), torch.tensor([0, 10, 10 + seconds]), True)
    assert pairs.gap[0, 2, 1] == min(NUM_GAPS - 1, (seconds + 1).bit_length() - 1)
    assert pairs.gap[0, 1, 2] == 0  # an earlier query: cut off anyway


@pytest.mark.parametrize("train", [True, False])
def test_biased_attention_against_a_loop(train):
    """Values, and all gradients, of both ways that attend() takes."""
    torch.manual_seed(1)
    attention, bias, packing, times = CausalSelfAttention(8, 2, 0.0).double(), random_bias().double(), packing_of(), times_of()
    x = torch.randn(sum(LENGTHS), 8, dtype=torch.float64, requires_grad=True)
    expected = []
    for rows, own in zip(x.split(LENGTHS), times.split(LENGTHS)):
        query, key, value = attention.qkv(rows).view(len(rows), 3, 2, 4).unbind(1)
        for t in range(len(rows)):
            heads = []
            for head in range(2):
                scores = torch.stack(
                    [query[t, head] @ key[s, head] / 2 + bias_by_hand(bias, own.tolist(), head, t, s) for s in range(t + 1)]
                )
                heads.append(scores.softmax(0) @ value[: t + 1, head])
            expected.append(torch.cat(heads))
    expected = attention.out(torch.stack(expected))
    with torch.set_grad_enabled(train):
        found = attention(x, packing, None, bias(Pairs(packing, times, True)))
    torch.testing.assert_close(found, expected)
    if train:
        weights = [x, *attention.parameters(), *bias.parameters()]
        upstream = torch.randn_like(found)
        for a, b in zip(torch.autograd.grad(found, weights, upstream), torch.autograd.grad(expected, weights, upstream), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("grad", [True, False])
def test_hstu_block_against_a_loop(grad, monkeypatch):
    monkeypatch.setattr("backbones.POINTWISE_USERS", 2)  # so that the last part is a smaller one
    torch.manual_seed(2)
    block = HSTUBlock(model_config(backbone="hstu", position="relative", time_bias=True)).double()
    block.bias = random_bias().double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    packing, times, x = packing_of(), times_of(), torch.randn(sum(LENGTHS), 8, dtype=torch.float64)

    with torch.set_grad_enabled(grad):
        found, balance = block(x, Sequence(packing, None, Pairs(packing, times, True)))
    expected = []
    silu = nn.functional.silu
    for rows, own in zip(x.split(LENGTHS), times.split(LENGTHS)):
        gate, value, query, key = silu(block.attention.uvqk(block.attention_norm(rows))).view(len(rows), 4, 2, 4).unbind(1)
        for t in range(len(rows)):
            mixed = torch.zeros(2, 4, dtype=torch.float64)
            for s in range(t + 1):
                for head in range(2):
                    mixed[head] += (
                        silu(query[t, head] @ key[s, head] + bias_by_hand(block.bias, own.tolist(), head, t, s)) / 10 * value[s, head]
                    )
            expected.append(rows[t] + block.attention.out(block.attention.norm(mixed.flatten()) * gate[t].flatten()))
    torch.testing.assert_close(found, torch.stack(expected))
    assert balance is None


def test_rmsnorm_by_hand():
    norm, x = make_norm("rmsnorm", 4), torch.tensor([[1.0, -2.0, 3.0, 0.5]])
    torch.testing.assert_close(norm(x), x / (x.square().mean() + 1e-5).sqrt())
    assert isinstance(make_norm("layernorm", 4), nn.LayerNorm)


@pytest.mark.long
@pytest.mark.parametrize("settings", [
    {}, {"gradient_checkpointing": True}, {"backbone": "hstu", "position": "relative", "time_bias": True, "num_experts": 3},
], ids=str)  # fmt: skip
def test_a_run_with_compiled_blocks_has_the_same_losses(tmp_path, settings):
    """In a run, with dropout and pieces in threads."""
    found = []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        trainer = make_trainer(folder, compile=compiled, batch_size=40, max_steps=3, **settings)
        trainer.fit()
        found.append(losses_of(folder))
    assert found[0].keys() == found[1].keys() and len(found[0]) == 3
    for step, loss in found[0].items():
        assert found[1][step] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("num_experts", [0, 3])
def test_checkpointing_changes_no_gradient(name, num_experts):
    torch.manual_seed(3)
    backbone = BACKBONES[name](model_config(position="relative", num_experts=num_experts, dropout_rate=0.5)).train()
    packing, times, x = packing_of(), times_of(), torch.randn(sum(LENGTHS), 8)
    found = []
    for backbone.gradient_checkpointing in (False, True):
        torch.manual_seed(4)
        out, balance = backbone(x, packing, times)
        total = out.square().sum() + (0 if balance is None else balance)
        found.append([out, *torch.autograd.grad(total, list(backbone.parameters()), allow_unused=True)])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*found, strict=True))
