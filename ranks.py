"""ranks.npz of a run folder: where each test user's target stood, also with the baselines, and the best ten of some.

From it runs are compared user by user, with each other and with the baselines.

Must not rank or judge; a file that is missing or broken is no ranks, never an error.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from atomic import replacing

RANKS = "ranks.npz"
TOP = 10  # places kept of a ranking
BASELINE = "baseline."  # before a baseline's name, the name of its array
MAX_TOP_USERS = 5_000  # users whose best ten are kept: 200 kB at most


class Ranks(NamedTuple):
    """Users in the order of the split."""

    user: np.ndarray  # (U,) int64 index into the store's users
    rank: np.ndarray  # (U,) int64, 0-based among all candidates; -1 where the target is no candidate (or was removed as seen)
    topk_ids: np.ndarray  # (T, 10) int64 item ids of the first T users, 0 where candidates ran out
    # Name -> (U,) int64, the target's 0-based place in that baseline's list, -1 = not in it; {} in files of before they were kept.
    baselines: dict[str, np.ndarray]


def write_ranks(folder: Path, user: np.ndarray, rank: np.ndarray, topk_ids: np.ndarray, baselines: Mapping[str, np.ndarray]) -> Path:
    """Write folder/ranks.npz whole or not at all. user, rank (U,); topk_ids (U, k >= 1); baselines as in Ranks. RunError: disk full."""
    path = Path(folder) / RANKS
    with replacing(path, 16 * len(user)) as file:
        best = topk_ids[:MAX_TOP_USERS, :TOP].astype(np.int32)
        places = {BASELINE + name: place.astype(np.int32) for name, place in baselines.items()}
        np.savez_compressed(file, user=user.astype(np.int32), rank=rank.astype(np.int32), topk_ids=best, **places)
    return path


def read_ranks(folder: Path) -> Ranks | None:
    """The ranks of a run folder; None where there are none, or none that can be read."""
    try:
        with np.load(Path(folder) / RANKS, allow_pickle=False) as data:
            user, rank, topk_ids = (data[name].astype(np.int64) for name in ("user", "rank", "topk_ids"))
            places = {name.removeprefix(BASELINE): data[name].astype(np.int64) for name in data.files if name.startswith(BASELINE)}
    except (OSError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return None
    fits = user.ndim == 1 and topk_ids.ndim == 2 and all(of_users.shape == user.shape for of_users in (rank, *places.values()))
    return Ranks(user, rank, topk_ids, places) if fits else None
