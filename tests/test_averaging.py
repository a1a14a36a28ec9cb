"""averaging.py: the average over updates against its definition, rows touched at any time; the mean of several states."""

import copy

import pytest
import torch
from test_optim import table, touched
from torch import nn

import averaging
from averaging import WeightAverage, mean_state
from optim import TableOptimizer


class Small(nn.Module):
    """Two parts of a table, a matrix, a vector, a buffer."""

    def __init__(self):
        super().__init__()
        self.table = table(6, 3, (4, 2))
        self.linear = nn.Linear(3, 2)
        self.register_buffer("count", torch.zeros(2))


def trained(average_of, model, steps, begin=0, after=lambda step: None):
    """Updates of some rows and all dense weights; returns the weights after each, by name."""
    optimizer = TableOptimizer(model.table, "rowwise_adagrad", betas=(0.9, 0.98), weight_decay=0.1, l2_emb=0.1)
    history = []
    for step in range(begin, steps):
        random = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for p in model.linear.parameters():
                p.add_(torch.randn(p.shape, generator=random))
        optimizer.begin_step()
        for number, part in enumerate(model.table.parts):
            if (step + number) % 3 == 0:
                continue  # no row of this part
            rows = torch.randperm(len(part) - 1, generator=random)[:2] + 1
            entry = touched(model.table, rows, torch.randn(2, part.shape[1], generator=random), number)
            with average_of.follow(entry):
                optimizer.step(entry, 0.5)
        average_of.finish_update()
        history.append({name: p.detach().clone() for name, p in model.named_parameters()})
        after(step)
    return history


def expected_average(history, decay):
    factors = [decay ** (len(history) - 1 - i) for i in range(len(history))]
    return {k: sum(f * w[k].double() for f, w in zip(factors, history)) / sum(factors) for k in history[0]}


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("smallest", [2.0**-64, 0.3])  # the latter: lags are scaled anew every few updates
def test_it_is_the_weighted_mean_of_all_weights_so_far(decay, smallest, monkeypatch):
    monkeypatch.setattr(averaging, "SMALLEST_SCALE", smallest)
    model = Small()
    average = WeightAverage(model, model.table, decay)
    seen = []

    def check(step):
        with average.applied():
            seen.append({name: p.detach().clone() for name, p in model.named_parameters()})

    history = trained(average, model, 25, after=check)
    for step, found in enumerate(seen):
        wanted = expected_average(history[: step + 1], decay)
        for name, value in found.items():
            torch.testing.assert_close(value.double(), wanted[name], atol=2e-6, rtol=2e-5, msg=lambda m, n=name, s=step: f"{n} {s}: {m}")
    assert all(torch.equal(p, history[-1][name]) for name, p in model.named_parameters())  # the raw weights are back
    assert (seen[-1]["table.parts.0"][0] == 0).all()


def test_a_row_that_is_never_touched_is_its_own_average():
    model = Small()
    average = WeightAverage(model, model.table, 0.9)
    optimizer = TableOptimizer(model.table, "rowwise_adagrad", betas=(0.9, 0.98))
    for _ in range(5):
        entry = touched(model.table, [2], torch.ones(1, 3))
        with average.follow(entry):
            optimizer.step(entry, 0.1)
        average.finish_update()
    raw = model.table.parts[0].detach().clone()
    with average.applied():
        changed = (model.table.parts[0] != raw).any(dim=1).tolist()
    assert changed == [False, False, True, False, False, False]


def test_looking_changes_nothing_and_state_round_trips():
    decay = 0.8
    models = [Small() for _ in range(3)]
    models[1].load_state_dict(models[0].state_dict()), models[2].load_state_dict(models[0].state_dict())
    averages = [WeightAverage(m, m.table, decay) for m in models]

    def look(step):
        with averages[1].applied():
            assert models[1].state_dict()["count"].sum() == 0

    trained(averages[0], models[0], 12)
    trained(averages[1], models[1], 12, after=look)
    states = [a.state_dict() for a in averages[:2]]
    assert states[0]["scale"] == states[1]["scale"]
    for key in ("dense", "lag"):
        assert all(torch.equal(a, b) for a, b in zip(states[0][key], states[1][key], strict=True))
    averages[2].load_state_dict(copy.deepcopy(states[0]))
    models[2].load_state_dict(models[0].state_dict())
    for a, m in ((averages[0], models[0]), (averages[2], models[2])):
        with a.applied():
            m.kept = {n: p.detach().clone() for n, p in m.named_parameters()}
    assert all(torch.equal(value, models[2].kept[name]) for name, value in models[0].kept.items())
    assert averages[2].updates == 12 and averages[2].lag[0] is not averages[0].lag[0]


def test_the_weights_come_back_after_an_error():
    model = Small()
    average = WeightAverage(model, model.table, 0.5)
    history = trained(average, model, 3)
    with pytest.raises(RuntimeError), average.applied():
        raise RuntimeError
    assert all(torch.equal(p, history[-1][name]) for name, p in model.named_parameters())


def test_mean_of_states(monkeypatch):
    monkeypatch.setattr(averaging, "CHUNK_ENTRIES", 5)
    states = [{"w": torch.randn(3, 4), "b": torch.randn(2).bfloat16(), "n": torch.tensor([7, seed])} for seed in range(3)]
    mean = mean_state(states, ["a", "b", "c"])
    torch.testing.assert_close(mean["w"], torch.stack([s["w"] for s in states]).mean(0))
    assert mean["b"].dtype == torch.bfloat16 and mean["n"].tolist() == [7, 0]
    assert torch.equal(mean_state(states[:1], ["a"])["w"], states[0]["w"])
    assert torch.equal(mean_state([states[0]] * 2, ["a", "b"])["w"], states[0]["w"])


def test_what_differs_is_named():
    one = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}
    with pytest.raises(ValueError) as error:
        mean_state([one, one, {"w": torch.zeros(2, 4), "c": torch.zeros(1)}], ["A", "B", "C"])
    text = str(error.value)
    assert "w: (2, 3) float32 in A, (2, 4) float32 in C" in text and "b: (2,) float32 in A, missing in C" in text
    assert "c: missing in A, (1,) float32 in C" in text and " in B" not in text
    with pytest.raises(ValueError, match="float32 in A, .* float16 in B"):
        mean_state([one, one | {"w": torch.zeros(2, 3).half()}], ["A", "B"])
