"""footprint.py: shadows take no memory and count as if they did; ids stay real; blocks of arrays; machines without glibc."""

import gc

import numpy as np
import pytest
import torch
from torch import nn

import footprint
from footprint import CUDA_ROUNDING, Footprint, anonymous_bytes, heap_bytes, load_runtime

MIB = 2**20


def test_shadows_count_and_take_nothing() -> None:
    shadows = Footprint()
    before = anonymous_bytes()
    with shadows:
        a = torch.zeros(64, MIB)  # 256 MiB
        b = a + 1
        assert shadows.live["cpu"] == 512 * MIB
        view = b[3:5].T
        assert shadows.live["cpu"] == 512 * MIB and view.shape == (MIB, 2)
        del a
    del b
    assert shadows.live["cpu"] == 256 * MIB  # the view holds its storage
    del view
    gc.collect()
    assert shadows.live["cpu"] == 0 and shadows.live_peak == 512 * MIB
    assert anonymous_bytes() - before < 30 * MIB
    assert 500 * MIB <= shadows.peak < 530 * MIB and shadows.now < 20 * MIB


def test_peaks_count_from_the_mark() -> None:
    shadows = Footprint()
    with shadows:
        torch.zeros(100, MIB)
        shadows.mark()
        small = torch.zeros(64, MIB)  # fits in no hole that another test has left in the heap
        assert shadows.live_peak == 256 * MIB and 240 * MIB <= shadows.peak < 280 * MIB
        del small


def test_a_step_by_hand() -> None:
    """y = relu(x W): x, W given; forward keeps y (and x W only while relu runs); backward makes the gradients of y, x W, W."""
    shadows, rows, width = Footprint(), 1 << 14, 256
    with shadows:
        x, weight = torch.zeros(rows, width), torch.zeros(width, width, requires_grad=True)
        big, small = 4 * rows * width, 4 * width * width
        assert shadows.live["cpu"] == big + small
        shadows.mark()
        y = torch.relu(x @ weight)
        assert shadows.live["cpu"] == 2 * big + small and shadows.live_peak == 3 * big + small
        shadows.mark()
        y.backward(torch.zeros(rows, width))
        # x, y, W; the gradient given, the one behind relu, W's
        assert 4 * big + small <= shadows.live_peak <= 4 * big + 3 * small
        assert weight.grad is not None and shadows.live["cpu"] == 2 * big + 2 * small


def test_ids_stay_real_and_mix_with_shadows() -> None:
    ids = torch.from_numpy(np.array([4, 0, 2]))
    with Footprint():
        assert int(ids[0]) == 4 and (ids + 1).tolist() == [5, 1, 3]
        table = torch.randn(10, 3)
        assert table.index_select(0, ids).shape == (3, 3)
        assert table[ids * 2].shape == (3, 3)
        table.index_copy_(0, ids, torch.zeros(3, 3))
    assert type(ids) is torch.Tensor


def test_values_of_shadows() -> None:
    with Footprint():
        x = torch.randn(5, 2)
        assert float(x.sum()) == 1.0 and torch.stack((x.sum(), x.mean())).tolist() == [1.0, 1.0]
        assert int(torch.zeros(3, dtype=torch.int64).max()) == 1
        assert (x > 0).nonzero().shape == (10, 2)  # at most


def test_a_model_can_be_moved_and_trained() -> None:
    shadows = Footprint()
    with shadows:
        model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 1)).to(torch.device("cpu"))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = [s for s in optimizer.state_dict()["state"].values()]
    assert len(state) == 4 and state[0]["exp_avg"].shape == (8, 8)


def test_more_than_any_machine_has() -> None:
    shadows = Footprint()
    with shadows:
        huge = torch.empty(1 << 50)  # malloc refuses
        assert shadows.live["cpu"] == 4 << 50 and shadows.peak >= 4 << 50
    del huge
    assert shadows.now < MIB << 6


def test_blocks_and_what_is_kept() -> None:
    shadows = Footprint()
    with shadows.blocks(64 * MIB, 0, 1.5 * MIB):
        assert shadows.live["cpu"] == 65 * MIB + MIB // 2 and shadows.now > 55 * MIB
    assert shadows.live["cpu"] == 0 and shadows.peak > 55 * MIB
    with shadows.blocks(1000, device="cuda"):
        assert shadows.live["cuda"] == shadows.cuda_peak == 2 * CUDA_ROUNDING and shadows.live["cpu"] == 0
    for wanted, held in ((40, 40), (30, 40), (50, 50)):
        shadows.keep(wanted * MIB)
        assert shadows.live["cpu"] == held * MIB


def test_without_glibc_the_live_tensors_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "_libc", lambda: None)
    assert heap_bytes() == 0 and not footprint.caching_malloc()
    shadows = Footprint()
    with shadows:
        kept = torch.zeros(10, MIB)
        assert shadows.now == shadows.peak == 40 * MIB
        del kept
    assert shadows.now == 0


def test_bfloat16_products_are_told_apart_by_shape() -> None:
    shadows = Footprint()
    with shadows:
        weight = torch.zeros(4, 6, dtype=torch.bfloat16)
        for rows in (3, 5, 3):
            torch.zeros(rows, 4, dtype=torch.bfloat16) @ weight
        torch.zeros(9, 4) @ torch.zeros(4, 6)
    assert len(shadows.products) == 2


def test_holes_are_seen() -> None:
    """Blocks below malloc's threshold of mapping stay in the heap, freed or not, while a later one holds its top."""
    shadows = Footprint()
    with shadows.blocks(40 * MIB):
        pass  # the threshold rises to 32 MiB when a mapped block is freed
    blocks = [shadows.blocks(2 * MIB) for _ in range(1000)]
    for block in blocks:
        block.__enter__()
    for block in blocks[::2]:
        block.__exit__(None, None, None)
    assert shadows.live["cpu"] == 1000 * MIB and shadows.now > 1600 * MIB
    for block in blocks[1::2]:
        block.__exit__(None, None, None)


@pytest.mark.parametrize(("tunables", "expected"), [("", True), ("glibc.malloc.tcache_count=0", False), ("glibc.malloc.mxfast=0", True),
                                                    ("glibc.malloc.mxfast=0:glibc.malloc.tcache_count=0", False)])  # fmt: skip
def test_malloc_with_a_cache(monkeypatch: pytest.MonkeyPatch, tunables: str, expected: bool) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    assert footprint.caching_malloc() is expected


def test_runtime_is_loaded_for_real() -> None:
    load_runtime(False, torch.bfloat16, torch.device("cpu"))
    assert anonymous_bytes() > 50 * MIB
