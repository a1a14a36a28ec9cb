"""Products, sums and copies by machine code of our own, in each of its two shapes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kernels
import machine_code

pytestmark = pytest.mark.skipif(not machine_code.available(), reason="no numba")


def compiled_product():
    return kernels.compile_loop(kernels.usable_numba(), _product, "f4[:,:] i8 i8 f4[:,:] i8 i8 i8 b F4[:,:]")


def _product(a, a_row, a_column, b, rows, columns, inner, add, out):
    machine_code.product(
        machine_code.address(a), a_row, a_column, machine_code.address(b), b.shape[1], rows, columns, inner, add,
        machine_code.address(out), out.shape[1],
    )  # fmt: skip


def check() -> None:
    """Every number of rows and columns about a block's, plain and transposed, set and added; nothing beside the result is written."""
    product, random = compiled_product(), np.random.default_rng(0)
    for rows in [*range(1, 20), 33]:
        for columns in [*range(1, 36), 64, 91]:
            inner = int(random.integers(1, 40))
            b = random.standard_normal((inner, columns + 3)).astype(np.float32)
            for turned in (False, True):
                shape = (inner, rows + 2) if turned else (rows, inner + 2)
                a = random.standard_normal(shape).astype(np.float32)
                plain = a.T[:rows] if turned else a[:, :inner]
                for add in (False, True):
                    out = random.standard_normal((rows + 1, columns + 2)).astype(np.float32)
                    expected = out.copy()
                    expected[:rows, :columns] = plain.astype(np.float64) @ b[:, :columns] + (out[:rows, :columns] if add else 0)
                    product(a, *((1, rows + 2) if turned else (inner + 2, 1)), b, rows, columns, inner, add, out)
                    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_products_of_all_shapes() -> None:
    check()


def test_products_by_short_vectors(tmp_path: Path) -> None:
    """As on a processor without AVX-512; and the same bits, as each entry is summed in one order."""
    lines = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import kernels, machine_code
kernels._sources = lambda: "a_test"
if {short}:
    machine_code._block_shape = lambda: (8, 4)
import numpy as np
from test_machine_code import check, compiled_product
check()
assert machine_code._LANES == 8 or not {short}
random = np.random.default_rng(1)
a, b, out = (random.standard_normal(shape).astype(np.float32) for shape in ((50, 70), (70, 90), (50, 90)))
compiled_product()(a, 70, 1, b, 50, 90, 70, False, out)
print(out.tobytes().hex())
"""
    found = []
    for short in (True, False):
        code = lines.format(root=str(Path(machine_code.__file__).parent), tests=str(Path(__file__).parent), short=short)
        environment = {"PATH": "/usr/bin", "NUMBA_CACHE_DIR": str(tmp_path / str(short))}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout)
    assert found[0] == found[1]


def test_copies() -> None:
    source, out = np.arange(40, dtype=np.float32).reshape(5, 8), np.zeros((4, 6), np.float32)
    copy = kernels.compile_loop(kernels.usable_numba(), _copy, "F4[:,:] f4[:,:]")
    copy(out, source)
    expected = np.zeros_like(out)
    expected[:3, :5] = source[:3, :5]
    assert np.array_equal(out, expected)


def _copy(out, source):
    machine_code.copy_rows(machine_code.address(out), out.shape[1], machine_code.address(source), source.shape[1], 3, 5)


def test_other_modules_changes_are_not_missed() -> None:
    """numba keeps compiled code by a loop's own file; the name of what it keeps follows the files of what the loop calls."""
    assert kernels._sources() in compiled_product().__qualname__
