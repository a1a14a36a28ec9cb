"""Runs pieces of a training step side by side on CPU cores, one torch thread each. Knows no model and no data.

torch's own threads split each operation and wait for one another after it: with operations of a millisecond, and the loader's thread
beside them, two cores do the work of 1.1. Here a piece is a share of the batch's users or rows that goes through many operations, stays
in its core's cache, and waits once. The pieces depend on the batch alone, never on the number of threads: results are the same for any up
to 7; from 8 on torch's operations have several threads each, and may take another library of products (blas.py).

Legend: N tokens or rows, D width.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from queue import SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NUM_PIECES = 4
M_MXFAST, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = 1, -1, -3, -8  # malloc.h of glibc
KEPT_BYTES = 512 << 20  # free memory at the end of the heap from which malloc gives it back
MIN_ROWS = 512  # a piece of fewer costs more in calls than its arithmetic takes


class Piece(NamedTuple):
    """Rows [begin, end)."""

    begin: int
    end: int


_state = threading.local()
_work: SimpleQueue | None = None  # what the helping threads are asked to do; None ends one
_num_threads = 1


def keep_freed_memory(num_threads: int) -> None:
    """Have malloc keep what a step frees for the next one, instead of giving it back to the system.

    Measured at the baseline's setting: 5,300 page faults a step, of 4 KB each, became 70, and its processor time 140 ms became 102.
    Blocks above 32 MB (tables, moments) still go back at once. Nothing happens where the C library has no mallopt.

    Small freed blocks are merged with their neighbours at once, not kept in "fast bins": torch's aligned blocks are cut out of larger ones,
    and what is cut off lay in these bins, so that a hole rarely fitted the same block again and the heap grew without end. The default
    settings on 100,000 users, 128 a step, RssAnon: 770 MiB at first, 945 after 470 steps; so, 835 after 500, and little more from 300 on.
    malloc's cache a thread does the same harm; it can be switched off at the start of a process only (run.sh).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_MXFAST, 0)
        mallopt(M_ARENA_MAX, num_threads + 2)  # run.sh's 2 are for the many threads of imports; sharing one here costs a sixth of a step


def give_freed_memory_back() -> None:
    """After `keep_freed_memory`: what is free goes back to the system now, and later blocks of 4 MB and more when they are freed.

    For what comes between training steps: ranking 10,000 users of 478,000 items on top of what training had kept took 1,156 MiB in all;
    so, 818, in the same time.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim"):
        libc.mallopt(M_MMAP_THRESHOLD, 4 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 32 << 20)
        libc.malloc_trim(0)


@contextmanager
def cores(num_threads: int) -> Iterator[None]:
    """Within it, `run` uses num_threads cores; torch's operations take one each, more where there are more cores than pieces."""
    global _work, _num_threads
    before = torch.get_num_threads()
    work: SimpleQueue = SimpleQueue()
    helpers: list[threading.Thread] = []
    try:
        torch.set_num_threads(max(1, num_threads // NUM_PIECES))
        for number in range(num_threads - 1):
            helper = threading.Thread(target=_help, args=(work,), name=f"piece_{number}", daemon=True)
            helper.start()
            helpers.append(helper)
        _work, _num_threads = work if helpers else None, num_threads
        yield
    finally:
        _work, _num_threads = None, 1
        for _ in helpers:
            work.put(None)
        for helper in helpers:
            helper.join()
        torch.set_num_threads(before)


@contextmanager
def training_cores(device: torch.device) -> Iterator[None]:
    """For training steps on a CPU: `cores`, as many as torch has threads, and no page faults for what each step allocates anew."""
    if device.type != "cpu":
        yield
        return
    num_threads = torch.get_num_threads()
    keep_freed_memory(num_threads)
    try:
        with cores(num_threads):
            yield
    finally:
        give_freed_memory_back()


def _help(work: SimpleQueue) -> None:
    while (asked := work.get()) is not None:
        asked()
        del asked  # it holds a step's tensors


def num_threads() -> int:
    """Cores that `run` uses now."""
    return _num_threads


def run(jobs: Sequence[Callable[[], object]]) -> list:
    """Results of all jobs, in their order; the caller's thread works too. The first error is raised when all are done.

    Some twenty times a step, so by the interpreter's own queues and not an executor's futures. A helper that comes too late finds no job
    left and is not waited for.
    """
    if _work is None or len(jobs) < 2:
        return [job() for job in jobs]
    results: list = [None] * len(jobs)
    errors: list[BaseException] = []
    todo, done = iter(range(len(jobs))), SimpleQueue()
    grad = torch.is_grad_enabled()

    def work() -> None:
        with torch.set_grad_enabled(grad):
            for number in todo:  # next() of a range's iterator is one step of the interpreter: no two threads get the same
                try:
                    results[number] = jobs[number]()
                except BaseException as error:  # noqa: BLE001 raised below
                    errors.append(error)
                done.put(None)

    for _ in range(min(_num_threads, len(jobs)) - 1):
        _work.put(work)
    work()
    for _ in jobs:
        done.get()
    found, failed = results, errors
    results, errors, jobs = [], [], ()  # a helper that comes late still holds `work`: not the step's tensors with it
    if failed:
        raise failed[0]
    return found


def row_pieces(num_rows: int, min_rows: int = MIN_ROWS) -> list[Piece]:
    """Up to NUM_PIECES pieces of nearly equal size, of min_rows or more; fewer are right where a row is much work."""
    num = max(1, min(NUM_PIECES, num_rows // min_rows))
    ends = [num_rows * (i + 1) // num for i in range(num)]
    return [Piece(begin, end) for begin, end in zip([0, *ends], ends)]


def halves(pieces: list[Piece]) -> list[Piece]:
    """The pieces merged to two at most: for work that holds large sums of its own a piece."""
    middle = len(pieces) // 2
    return pieces if not middle else [Piece(0, pieces[middle].begin), Piece(pieces[middle].begin, pieces[-1].end)]


def user_pieces(lengths: Tensor) -> list[tuple[Piece, Piece]]:
    """lengths: (B,) tokens a user. Pieces of whole users, of about as many tokens each: (users, their tokens)."""
    ends = lengths.cumsum(0)
    num_tokens = int(ends[-1])
    wanted = torch.tensor([piece.end for piece in row_pieces(num_tokens)])
    users = torch.unique(torch.searchsorted(ends, wanted) + 1).clamp_(max=len(lengths)).tolist()
    tokens = [int(ends[user - 1]) for user in users]
    return [(Piece(*user), Piece(*token)) for user, token in zip(zip([0, *users], users), zip([0, *tokens], tokens))]


def dropout_generator() -> torch.Generator | None:
    """The generator of the piece that runs in this thread; None = torch's default."""
    return getattr(_state, "generator", None)


def piece_generators(num_pieces: int) -> list[torch.Generator]:
    """One for each piece, by one draw of torch's default generator."""
    seed = int(torch.empty((), dtype=torch.int64).random_())
    return [torch.Generator().manual_seed((seed + number) % 2**63) for number in range(num_pieces)]


def replayed() -> tuple[AbstractContextManager, AbstractContextManager]:
    """For torch's checkpoint: the second context gives `dropout_generator` the state that it has now."""
    generator = dropout_generator()
    return nullcontext(), nullcontext() if generator is None else _with_generator(generator.clone_state())


@contextmanager
def _with_generator(generator: torch.Generator) -> Iterator[None]:
    before = dropout_generator()
    _state.generator = generator
    try:
        yield
    finally:
        _state.generator = before


class _Rows:
    """Tensors of num_rows rows that the pieces fill, each in its own thread: half of the time of a torch.cat at the end."""

    def __init__(self, num_rows: int) -> None:
        self.columns: list[Tensor | None] = []
        self._num_rows, self._lock = num_rows, threading.Lock()

    def put(self, piece: Piece, tensors: Sequence[Tensor | None]) -> None:
        """tensors: one a column, of the piece's rows; None in all pieces = no such column, None in `columns`."""
        with self._lock:
            if not self.columns:
                self.columns = [None if part is None else part.new_empty(self._num_rows, *part.shape[1:]) for part in tensors]
        for column, part in zip(self.columns, tensors):
            if part is not None:
                column[piece.begin : piece.end] = part


class _Pieces(torch.autograd.Function):
    """body(piece number, x[piece], *more) for each piece, with a graph of its own each."""

    @staticmethod
    def forward(ctx, body, pieces, out_pieces, generators, num_inputs, *tensors):
        inputs, parameters = tensors[:num_inputs], tensors[num_inputs:]
        results = _Rows(out_pieces[-1].end)

        def job(number: int, piece: Piece, out_piece: Piece):
            def work():
                with _with_generator(generators[number]), torch.enable_grad():
                    leaves = [x[piece.begin : piece.end].detach().requires_grad_(x.requires_grad) for x in inputs]
                    outs = body(number, *leaves)
                results.put(out_piece, [None if out is None else out.detach() for out in outs])
                return leaves, outs

            return work

        ctx.graphs = run([job(number, *both) for number, both in enumerate(zip(pieces, out_pieces))])
        ctx.pieces, ctx.out_pieces, ctx.parameters = pieces, out_pieces, parameters
        ctx.need = [x.requires_grad for x in inputs]
        return tuple(results.columns)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        graphs, ctx.graphs = ctx.graphs, None
        parameters = [p for p in ctx.parameters if p.requires_grad]
        results = _Rows(ctx.pieces[-1].end)

        def job(piece: Piece, out_piece: Piece, leaves: list[Tensor], outs: tuple[Tensor, ...]):
            wanted = [x for x in leaves if x.requires_grad]

            def work():
                of_piece = [grad[out_piece.begin : out_piece.end] for grad in grads if grad is not None]
                found = torch.autograd.grad([out for out in outs if out is not None], wanted + parameters, of_piece, allow_unused=True)
                results.put(piece, found[: len(wanted)])
                return found[len(wanted) :]

            return work

        columns = zip(*run([job(*both, *graph) for *both, graph in zip(ctx.pieces, ctx.out_pieces, graphs)]))
        inputs, sums = iter(results.columns), map(_sum, columns)
        return (None, None, None, None, None, *(next(inputs) if need else None for need in ctx.need),
                *(next(sums) if p.requires_grad else None for p in ctx.parameters))  # fmt: skip


def _sum(parts: Sequence[Tensor | None]) -> Tensor | None:
    total = None
    for part in parts:
        if part is not None:
            total = part if total is None else total + part  # not in place: autograd may give one tensor to two parameters
    return total


def in_pieces(
    body: Callable[..., tuple[Tensor | None, ...]],
    pieces: Sequence[Piece],
    inputs: Sequence[Tensor],
    parameters: Sequence[nn.Parameter],
    out_pieces: Sequence[Piece] | None = None,
    generators: Sequence[torch.Generator] | None = None,
) -> tuple[Tensor | None, ...]:
    """torch.cat of body(number, *(x[piece] for x in inputs)), result by result, over the pieces, side by side within `cores`.

    A result that is None in all pieces stays None.

    inputs: (N, ...) each. parameters: all that body uses and that wants a gradient. out_pieces: the rows of the results that each piece
    gives; None = as many as it is given. generators: of the pieces' dropout; None = `piece_generators`.
    """
    generators = piece_generators(len(pieces)) if generators is None else generators
    return _Pieces.apply(body, tuple(pieces), tuple(out_pieces or pieces), generators, len(inputs), *inputs, *parameters)
