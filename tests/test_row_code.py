"""Attention's rows and transposes by LLVM code, against numpy, at every length about a vector's."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import block_kernels
import kernels
import machine_code
import row_code
from machine_code import address

pytestmark = pytest.mark.skipif(block_kernels.compiled() is None, reason="no numba")
FACTOR = np.float32(0.3)


def softmax(scores, row, seen, end, factor):
    return row_code.softmax_row(address(scores) + 4 * row * scores.shape[1], seen, end, factor)


def softmax_back(scores, of_scores, row, seen, end, normal, along, factor):
    start = 4 * row * scores.shape[1]
    row_code.softmax_row_back(address(scores) + start, address(of_scores) + start, seen, end, normal, along, factor)


def turn(source, num, out):
    row_code.turn_block(address(source), source.shape[1], address(out), out.shape[1], num)


def own_exponential(x):
    return machine_code.exp_of_minus(x)


def compiled(function, text: str):
    return kernels.compile_loop(kernels.usable_numba(), function, text, fast=True)


def weights_of(scores: np.ndarray, normal: float) -> np.ndarray:
    return np.exp(np.minimum(scores.astype(np.float64) * FACTOR - normal, 0))


@pytest.mark.parametrize("seen", [1, 2, 15, 16, 17, 31, 32, 33, 50])
@pytest.mark.parametrize("more", [0, 1, 15, 20])
def test_a_row_of_softmax(seen: int, more: int) -> None:
    """Forward and backward; what stands before and after the row is left alone."""
    random, end = np.random.default_rng(seen), seen + more
    before = random.standard_normal((3, end)).astype(np.float32) * 20
    found = before.copy()
    top, total = compiled(softmax, "F4[:,:] i8 i8 i8 f4")(found, 1, seen, end, FACTOR)
    assert top == before[1, :seen].max()
    expected = np.zeros(end)
    expected[:seen] = np.exp((before[1, :seen].astype(np.float64) - top) * FACTOR)
    assert np.allclose(found[1], expected, rtol=1e-5, atol=1e-30) and np.isclose(total, expected.sum(), rtol=1e-6)
    assert not found[1, seen:].any() and np.array_equal(found[::2], before[::2])

    of_before = random.standard_normal((3, end)).astype(np.float32)
    normal, along = np.float32(top * FACTOR + np.log(total)), np.float32(0.7)
    found, of_found = before.copy(), of_before.copy()
    compiled(softmax_back, "F4[:,:] F4[:,:] i8 i8 i8 f4 f4 f4")(found, of_found, 1, seen, end, normal, along, FACTOR)
    expected[:seen] = weights_of(before[1, :seen], normal)
    assert np.allclose(found[1], expected, rtol=1e-5, atol=1e-30)
    assert np.allclose(of_found[1], expected * (of_before[1] - along) * FACTOR, rtol=1e-5, atol=1e-30)
    assert np.array_equal(found[::2], before[::2]) and np.array_equal(of_found[::2], of_before[::2])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 7, 18])
def test_a_score_that_is_not_finite_shows(value: float, place: int) -> None:
    scores = np.zeros((1, 20), np.float32)
    scores[0, place] = value
    of_scores = np.ones_like(scores)
    normal = np.float32(np.log(20))
    forward = scores.copy()
    _, total = compiled(softmax, "F4[:,:] i8 i8 i8 f4")(forward, 0, 19, 20, FACTOR)
    assert not np.isfinite(total)
    if np.isnan(value):
        compiled(softmax_back, "F4[:,:] F4[:,:] i8 i8 i8 f4 f4 f4")(scores, of_scores, 0, 19, 20, normal, np.float32(0), FACTOR)
        assert np.isnan(of_scores[0, place])
    assert forward[0, 19] == 0  # beyond what is seen


def test_a_row_of_scores_of_minus_infinity_shows() -> None:
    scores = np.full((1, 20), -np.inf, np.float32)
    assert np.isnan(compiled(softmax, "F4[:,:] i8 i8 i8 f4")(scores, 0, 18, 20, FACTOR)[1])


def test_its_exponential_is_the_loops_own() -> None:
    """With two scores, the larger 0, the smaller one's weight is exp of minus the distance."""
    exponential = compiled(own_exponential, "f4")
    for x in np.linspace(0, 95, 400, dtype=np.float32):
        scores = np.array([[0, -x]], np.float32)
        compiled(softmax, "F4[:,:] i8 i8 i8 f4")(scores, 0, 2, 2, np.float32(1))
        assert scores[0, 1] == pytest.approx(exponential(x), rel=1e-6)


def test_on_a_processor_of_shorter_vectors(tmp_path: Path) -> None:
    """LLVM makes two of each vector there; all of the above holds."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "row_of_softmax or turned"]
    environment = os.environ | {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=Path(__file__).parents[1])
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("num", range(1, row_code.LANES + 1))
def test_a_block_is_turned(num: int) -> None:
    random = np.random.default_rng(num)
    source = random.standard_normal((row_code.LANES + 1, row_code.LANES + 3)).astype(np.float32)
    out = np.full((row_code.LANES + 1, row_code.LANES + 2), 5, np.float32)
    compiled(turn, "f4[:,:] i8 F4[:,:]")(source, num, out)
    assert np.array_equal(out[: row_code.LANES, :num], source[:num, : row_code.LANES].T)
    assert (out[:, num:] == 5).all() and (out[row_code.LANES] == 5).all()
