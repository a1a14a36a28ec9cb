"""ranks.npz of a run folder: where each test user's target stood, and the best ten of some, so that runs can be compared user by user.

Must not rank or judge; a file that is missing or broken is no ranks, never an error.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from atomic import replacing

RANKS = "ranks.npz"
TOP = 10  # places kept of a ranking
MAX_TOP_USERS = 5_000  # users whose best ten are kept: 200 kB at most


class Ranks(NamedTuple):
    """Users in the order of the split."""

    user: np.ndarray  # (U,) int64 index into the store's users
    rank: np.ndarray  # (U,) int64, 0-based among all candidates; -1 where the target is no candidate (or was removed as seen)
    topk_ids: np.ndarray  # (T, 10) int64 item ids of the first T users, 0 where candidates ran out


def write_ranks(folder: Path, user: np.ndarray, rank: np.ndarray, topk_ids: np.ndarray) -> Path:
    """Write folder/ranks.npz whole or not at all. user, rank (U,); topk_ids (U, k >= 1). RunError when the disk is full."""
    path = Path(folder) / RANKS
    with replacing(path, 16 * len(user)) as file:
        best = topk_ids[:MAX_TOP_USERS, :TOP].astype(np.int32)
        np.savez_compressed(file, user=user.astype(np.int32), rank=rank.astype(np.int32), topk_ids=best)
    return path


def read_ranks(folder: Path) -> Ranks | None:
    """The ranks of a run folder; None where there are none, or none that can be read."""
    try:
        with np.load(Path(folder) / RANKS, allow_pickle=False) as data:
            ranks = Ranks(*(data[name].astype(np.int64) for name in Ranks._fields))
    except (OSError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return None
    shapes = ranks.user.ndim == ranks.rank.ndim == 1 and len(ranks.user) == len(ranks.rank) and ranks.topk_ids.ndim == 2
    return ranks if shapes else None
