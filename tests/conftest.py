"""Puts the repository's root on the path; fixtures of several files: the folder of real public data, one thread."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
pytest.register_assert_rewrite("reliability_world")  # so that its asserts say what differs
PUBLIC_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture
def public_data() -> Path:
    """The folder of real public sets; a test that asks for it is skipped where a clone does not have it."""
    if not PUBLIC_DATA.is_dir():
        pytest.skip(f"no public data at {PUBLIC_DATA}")
    return PUBLIC_DATA


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A path that is free, in a folder of its own."""
    (tmp_path / "result").mkdir()
    return tmp_path / "result" / "out"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch's operations have one thread each, as in a step on few cores: compiled loops take their place there alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
