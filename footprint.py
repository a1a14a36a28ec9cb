"""Follows the memory that torch code takes, without taking it: ids are real, vectors are shadows that nobody writes to.

Knows nothing of this project's data, models or settings.

How: under a `Footprint` every new tensor is a shadow (torch's FakeTensor: shape, dtype and autograd graph, no values). Behind each shadow
on the CPU stands a block of the same size from the C library's malloc, whose pages are never touched, so the kernel gives it no memory.
The heap then grows as it would in earnest, holes included. Tensors made of ids (from numpy) stay real: code that looks at their values
finds them.

Why the holes: glibc's aligned blocks, which torch asks for, leave remnants that small objects fill, and what is so pinned is not used
again. Measured (glibc 2.36, default settings, 128 users x 100 events, live tensors 175 MiB at their peak): heap in use 273 MiB, taken
after 30 steps 516 MiB, RssAnon after 250 steps 1,050 MiB and growing. Without malloc's cache of small blocks (GLIBC_TUNABLES=
glibc.malloc.tcache_count=0): heap 349 MiB after 100 steps and no more, no slower.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

ALIGNMENT = 64  # torch's, on the CPU
CUDA_ROUNDING = 512  # torch's allocator on CUDA hands out multiples of this
MEASURED = 1 << 16  # bytes; smaller blocks move no peak worth a look at the heap
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


def anonymous_bytes() -> int:
    """RssAnon of this process: memory that no file stands behind, so that the kernel cannot drop it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) << 10


class _MallInfo(ctypes.Structure):
    """struct mallinfo2 of malloc.h."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


@cache
def _libc() -> ctypes.CDLL | None:
    """The C library, where it is a glibc that tells of its heap (2.33 or later)."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return None
    libc.mallinfo2.restype = _MallInfo
    libc.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    return libc


def caching_malloc() -> bool:
    """Whether malloc is glibc's with its cache of small blocks a thread (tcache) on: these pin the holes between large ones."""
    return _libc() is not None and "glibc.malloc.tcache_count=0" not in os.environ.get("GLIBC_TUNABLES", "").split(":")


def heap_bytes() -> int:
    """What malloc has taken from the kernel and not given back, free holes included; 0 where the C library does not say."""
    libc = _libc()
    if libc is None:
        return 0
    info = libc.mallinfo2()
    return info.arena + info.hblkhd


def _stand_in(shadow: Tensor) -> np.ndarray:
    """`Tensor.numpy` of a shadow: an array of its shape that has no memory, for compiled loops whose stand-ins do not look into it."""
    return np.broadcast_to(np.zeros((), str(shadow.dtype).removeprefix("torch.").replace("bfloat16", "float32")), shadow.shape)


class Footprint(TorchDispatchMode):
    """A `with` block in which tensors are shadows; tells how much memory they would take.

    live: {"cpu" | "cuda": bytes of the shadows that exist}. products: the different shapes of bfloat16 matrix products that were seen.
    Since the last `mark`: peak, of the heap's growth; live_peak and cuda_peak, of the shadows.
    """

    def __init__(self) -> None:
        super().__init__()
        from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # slow to import

        self._fake, self._type = FakeTensorMode(), FakeTensor
        self._known: dict[int, weakref.ref] = {}
        self.live = {"cpu": 0, "cuda": 0}
        self.peak = self.live_peak = self.cuda_peak = 0
        self.products: set[tuple] = set()
        self._kept = 0
        self._unbacked = 0  # bytes that malloc refused, or cannot be asked about
        self._start = 0
        with self:  # what a first use loads is not the followed code's memory
            torch.empty(8, 8) @ torch.empty(8, 8)
        self._start = heap_bytes()
        self.mark()

    def __enter__(self) -> Footprint:
        self._type.numpy = _stand_in
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        del self._type.numpy  # Tensor's own again

    # ---- what it tells ----

    @property
    def now(self) -> int:
        """Bytes of the CPU by which malloc's heap has grown since this object was made."""
        return heap_bytes() - self._start + self._unbacked

    def mark(self) -> None:
        """Peaks count from here."""
        self.peak, self.cuda_peak, self.live_peak = self.now, self.live["cuda"], self.live["cpu"]

    @contextmanager
    def blocks(self, *sizes: float, device: str = "cpu") -> Iterator[None]:
        """Hold blocks of so many bytes: for arrays of code that cannot run on shadows, such as numpy's."""
        release = [self._take(int(size), device) for size in sizes]
        try:
            yield
        finally:
            for give_back in release:
                give_back()

    def keep(self, num_bytes: int) -> None:
        """Hold so many bytes, once and for all; a second call adds what it asks for more than the first: for arenas of threads."""
        if num_bytes > self._kept:
            self._take(num_bytes - self._kept, "cpu")
            self._kept = num_bytes

    # ---- shadows ----

    def _shadow(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, self._type):
            return tensor
        return self._fake.from_tensor(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        shadows = [tensor for tensor in tensors if isinstance(tensor, self._type)]
        if tensors and not shadows:
            return func(*args, **kwargs)  # ids alone: for real
        if func is torch.ops.aten._local_scalar_dense.default:  # a shadow's value; losses and norms are finite
            return 1.0 if tensors[0].is_floating_point() else 1
        if func in PRODUCTS and shadows[0].dtype == torch.bfloat16:
            self.products.add(tuple(tensor.shape for tensor in tensors))
        args, kwargs = (tree_map_only(Tensor, self._shadow, tree) for tree in (args, kwargs))
        with self._fake:
            if func is torch.ops.aten.nonzero.default:  # at most all of them
                out = torch.empty(tensors[0].numel(), tensors[0].dim(), dtype=torch.int64, device=tensors[0].device)
            else:
                out = func(*args, **kwargs)
        # torch remembers shadows by weak references, and Module.to refuses to move what is so referred to.
        self._fake.fake_tensor_converter.meta_converter.tensor_memo.clear()
        for leaf in tree_iter(out):
            if isinstance(leaf, self._type):
                self._follow(leaf)
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known or not storage.nbytes():
            return
        release = self._take(storage.nbytes(), tensor.device.type)

        def gone(_: object) -> None:
            self._known.pop(key, None)
            release()

        self._known[key] = weakref.ref(storage, gone)

    def _take(self, num_bytes: int, device: str) -> Callable[[], None]:
        """Note a block; the result gives it back."""
        libc, pointer = _libc(), ctypes.c_void_p()
        if device != "cpu":
            num_bytes = -(-num_bytes // CUDA_ROUNDING) * CUDA_ROUNDING
        backed = device == "cpu" and libc is not None and libc.posix_memalign(ctypes.byref(pointer), ALIGNMENT, num_bytes) == 0
        self._unbacked += num_bytes if device == "cpu" and not backed else 0
        self.live[device] += num_bytes
        self.live_peak, self.cuda_peak = max(self.live_peak, self.live["cpu"]), max(self.cuda_peak, self.live["cuda"])
        if num_bytes >= MEASURED and device == "cpu":
            self.peak = max(self.peak, self.now)

        def give_back() -> None:
            self.live[device] -= num_bytes
            if backed:
                libc.free(pointer)
            elif device == "cpu":
                self._unbacked -= num_bytes

        return give_back


def load_runtime(tensorboard: bool, precision: torch.dtype | None, device: torch.device) -> None:
    """A training step of a toy model, for real: what torch loads and keeps on first use is there afterwards (about 70 MiB on a CPU)."""
    tower = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 64)).to(device)
    optimizer = torch.optim.AdamW(tower.parameters(), fused=True)
    with nullcontext() if precision is None else torch.autocast(device.type, dtype=precision):
        heads = tower(torch.randn(256, 64, device=device)).view(8, 32, 2, 32).transpose(1, 2)
        F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).sum().backward()
    optimizer.step()
    if tensorboard:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401  (the logger's import, at its first line)
