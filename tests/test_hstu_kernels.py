"""HSTU's Triton kernels: that they give what torch's operations give (hstu_kernels_cases.py), and when they are taken."""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_backbones import model_config

import backbones
from backbones import PointwiseAttention


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (requirements-extra.txt)")
def test_kernels_against_torch():
    """In a process of its own: torch imports triton by itself, and TRITON_INTERPRET is read at that moment."""
    how = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/hstu_kernels_cases.py"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | how, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-6000:] + done.stderr[-1000:]


@pytest.mark.parametrize(("rate", "train", "compiles", "exports", "takes", "fused"), [
    (0.0, True, False, False, True, True), (0.1, False, False, False, True, True), (0.1, True, False, False, True, False),
    (0.0, True, True, False, True, False), (0.0, True, False, True, True, False), (0.0, True, False, False, False, False),
    (0.0, True, False, False, None, False),
])  # fmt: skip
def test_the_way_on_cuda(monkeypatch, rate, train, compiles, exports, takes, fused):
    kernels = None if takes is None else SimpleNamespace(takes=lambda *_: takes)
    monkeypatch.setattr(backbones, "_hstu_kernels", lambda: kernels)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiles)
    monkeypatch.setattr(backbones, "is_exporting", lambda: exports)
    module, on_cuda = PointwiseAttention(model_config(attention_dropout=rate)).train(train), SimpleNamespace(is_cuda=True)
    assert (module._fused(on_cuda, on_cuda, on_cuda) is not None) is fused
    assert module._fused(torch.ones(1), torch.ones(1), torch.ones(1)) is None


def test_without_triton_torch_is_taken(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "hstu_kernels", raising=False)
    assert backbones._hstu_kernels.__wrapped__() is None


def test_a_cpu_needs_no_triton():
    """Where triton is installed, torch imports it; so it is kept out here."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from test_backbones import LENGTHS, model_config, packing_of, times_of
from backbones import hstu
backbone = hstu(model_config(backbone="hstu", position="relative"))
out, _ = backbone(torch.randn(sum(LENGTHS), 8), packing_of(), times_of())
out.sum().backward()
with torch.inference_mode():
    backbone(torch.randn(sum(LENGTHS), 8), packing_of(), times_of())
assert "hstu_kernels" not in sys.modules
"""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths})
