"""Pieces of a step: results do not depend on the number of threads, gradients are those of the whole, errors come through."""

import pytest
import torch
from torch import nn

import parallel
from layers import Dropout


def two_layers(num_threads: int, rows: int = 5000, dropout: float = 0.3) -> list[torch.Tensor]:
    """Output and gradients of a small network in pieces."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), Dropout(dropout), nn.Linear(16, 4))
    x, y = torch.randn(rows, 8, requires_grad=True), torch.randn(rows, 8)
    pieces = parallel.row_pieces(rows)
    with parallel.cores(num_threads):
        out, none, twice = parallel.in_pieces(lambda _, x, y: (net(x * y), None, 2 * x), pieces, (x, y), list(net.parameters()))
        assert none is None
        ((out * out).sum() + twice.sum()).backward()
    return [out, twice, x.grad, *(parameter.grad for parameter in net.parameters())]


def test_any_number_of_threads_gives_the_same_bits() -> None:
    one = two_layers(1)
    for num_threads in (2, 3, 7):
        for a, b in zip(one, two_layers(num_threads), strict=True):
            assert torch.equal(a, b)


def test_gradients_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = two_layers(2, dropout=0.0)
    monkeypatch.setattr(parallel, "NUM_PIECES", 1)
    for a, b in zip(pieces, two_layers(1, dropout=0.0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_pieces_do_not_share_their_dropout() -> None:
    out = two_layers(2)[0].detach()
    assert len(parallel.row_pieces(5000)) == parallel.NUM_PIECES
    x = torch.ones(4096, 8)
    torch.manual_seed(1)
    (masks,) = parallel.in_pieces(lambda _, x: (Dropout(0.5).train()(x),), parallel.row_pieces(4096), (x,), [])
    quarters = masks.chunk(parallel.NUM_PIECES)
    assert out.shape == (5000, 4) and not any(torch.equal(quarters[0], other) for other in quarters[1:])


@pytest.mark.parametrize("num_rows", [0, 1, 511, 512, 1023, 1024, 2048, 99_999])
def test_row_pieces_cover_all_rows_once(num_rows: int) -> None:
    pieces = parallel.row_pieces(num_rows)
    assert pieces[0].begin == 0 and pieces[-1].end == num_rows and 1 <= len(pieces) <= parallel.NUM_PIECES
    assert all(a.end == b.begin and a.end > a.begin for a, b in zip(pieces, pieces[1:]))
    assert [row for piece in parallel.halves(pieces) for row in range(*piece)] == list(range(num_rows))


@pytest.mark.parametrize("lengths", [[1], [5000], [101] * 128, [3000, 1, 1, 1], [1, 1, 1, 3000], list(range(1, 90))])
def test_user_pieces_keep_users_whole(lengths: list[int]) -> None:
    pieces = parallel.user_pieces(torch.tensor(lengths))
    users = [user for piece, _ in pieces for user in range(*piece)]
    assert users == list(range(len(lengths))) and pieces[-1][1].end == sum(lengths)
    for piece, tokens in pieces:
        assert tokens.end - tokens.begin == sum(lengths[piece.begin : piece.end]) > 0


def test_the_first_error_is_raised_after_all_jobs() -> None:
    done = []

    def bad() -> None:
        raise ValueError("piece 1")

    with parallel.cores(2), pytest.raises(ValueError, match="piece 1"):
        parallel.run([lambda: done.append(0), bad, lambda: done.append(2)])
    assert done[0] == 0


def test_cores_gives_torch_its_threads_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), parallel.cores(2):
        assert torch.get_num_threads() == 1 and parallel.run([lambda: 1, lambda: 2]) == [1, 2]
        raise KeyError
    assert torch.get_num_threads() == before and parallel._work is None


def test_jobs_see_whether_gradients_are_on() -> None:
    with parallel.cores(2), torch.no_grad():
        assert parallel.run([torch.is_grad_enabled] * 8) == [False] * 8


def test_a_checkpoint_replays_the_dropout_of_a_piece() -> None:
    generator = torch.Generator().manual_seed(5)
    with parallel._with_generator(generator):
        first, second = parallel.replayed()
        with first:
            one = torch.rand(4, generator=parallel.dropout_generator())
        torch.rand(4, generator=parallel.dropout_generator())
    with second:
        assert torch.equal(one, torch.rand(4, generator=parallel.dropout_generator()))
    assert parallel.dropout_generator() is None


def test_small_freed_blocks_are_merged_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the heap of a training run grows without end: see keep_freed_memory."""
    calls = {}
    library = type("Library", (), {"mallopt": staticmethod(lambda option, value: calls.__setitem__(option, value))})
    monkeypatch.setattr(parallel.ctypes, "CDLL", lambda name: library)
    parallel.keep_freed_memory(2)
    assert calls == {1: 0, -1: parallel.KEPT_BYTES, -3: 32 << 20, -8: 4}
