"""What a sampled softmax keeps from step to step: estimates of how often items are drawn, and past item vectors as more negatives.

Must not know models, batches or settings.

Legend: M items of a batch, D width, S places of the bank.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MEMORY_BANK_KEY = 8  # first word of a generator's key
LARGEST_PROBABILITY = 1 - 1e-6  # of being in a batch; an item of every batch would have infinitely many draws


def popularity_probability(counts: np.ndarray, power: float) -> np.ndarray:
    """counts: (num_items + 1,) training events. counts^power over their sum, (num_items + 1,) float64; an item without events has 0."""
    weights = np.where(counts > 0, np.maximum(counts, 1) ** power, 0.0)
    weights[0] = 0.0
    return weights / weights.sum()


class StreamingFrequency:
    """How often each item is among the targets of a batch, from the steps between its last times; no count of the data is needed.

    Source: Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations", RecSys 2019, algorithm 2: the mean
    gap moves by `rate` of the difference to the newest one. An item's first gap is taken as it is.
    """

    def __init__(self, num_items: int, rate: float, device: torch.device) -> None:
        self.rate, self.step = rate, 0
        self.last = torch.zeros(num_items + 1, dtype=torch.int32, device=device)  # step that had it last; 0 = none yet
        self.gap = torch.zeros(num_items + 1, device=device)  # steps; 0 = seen once at most

    def update(self, items: Tensor) -> None:
        """items: (M,) int64, a batch's targets, each once."""
        self.step += 1
        last, gap = self.last[items], self.gap[items]
        newest = (self.step - last).float()
        moved = torch.where(gap > 0, gap + self.rate * (newest - gap), newest)
        self.gap[items] = torch.where(last > 0, moved, 0.0)
        self.last[items] = self.step

    def expected_draws(self, items: Tensor) -> Tensor:
        """(M,) draws a step that would put an item among a batch's targets as often as it is found there: -log(1 - 1 / gap).

        An item seen once or never counts as if its gap were all the steps so far.
        """
        gap = self.gap[items]
        gap = torch.where(gap > 0, gap, float(max(1, self.step)))
        return -torch.log1p(-(1 / gap.clamp_min(1.0)).clamp_max(LARGEST_PROBABILITY))

    def state_dict(self) -> dict:
        return {"step": self.step, "last": self.last, "gap": self.gap}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]
        self.last.copy_(state["last"])
        self.gap.copy_(state["gap"])


class MemoryBank:
    """The candidate vectors of targets of past batches, each item once, the newest S; without gradients.

    Source: Wang et al., "Cross-Batch Memory for Embedding Learning", CVPR 2020.
    """

    def __init__(self, size: int, width: int, num_items: int, device: torch.device, seed: int = 0) -> None:
        self.items = torch.zeros(size, dtype=torch.int64, device=device)  # 0 = empty
        self.vectors = torch.zeros(size, width, device=device)
        self.place = torch.full((num_items + 1,), -1, dtype=torch.int32, device=device)  # of each item
        self.next, self.added = 0, []  # where the next one goes; how many the last updates brought
        self.seed, self.step = seed, 0

    def update(self, items: Tensor, vectors: Tensor) -> None:
        """items: (M,) int64, each once; vectors: (M, D). The oldest make room; which of an update's go first is drawn.

        Vectors that are not finite are left out: the step that made them may be skipped, and the bank would spoil all later ones.
        """
        finite = vectors.isfinite().all(1)
        if not finite.all():
            items, vectors = items[finite], vectors[finite]
        size, num_added = len(self.items), len(items)
        # A batch's targets come by their numbers: without the draw, a small bank would hold the highest alone.
        order = np.random.default_rng((MEMORY_BANK_KEY, self.seed, self.step)).permutation(num_added)
        order = torch.from_numpy(order[:size]).to(items.device)
        items, vectors, self.step = items[order], vectors[order].detach().float(), self.step + 1
        old = self.place[items]
        self.items[old[old >= 0].long()] = 0  # the item moves
        places = (self.next + torch.arange(len(items), device=items.device)) % size
        gone = self.items[places]
        self.place[gone[gone > 0]] = -1
        self.items[places], self.vectors[places] = items, vectors
        self.place[items] = places.int()
        self.next = (self.next + len(items)) % size
        self.added.append(num_added)
        while sum(self.added[1:]) >= size:
            self.added.pop(0)

    @property
    def num_batches(self) -> float:
        """How many updates' items are held, the oldest's in part."""
        newer = sum(self.added[1:])
        return len(self.added[1:]) + min(1.0, (len(self.items) - newer) / max(1, self.added[0])) if self.added else 0.0

    def expected_draws(self, draws: Tensor) -> Tensor:
        """(M,) draws that would put an item into the bank as often as it is found there. draws: (M,) the same of one update's items."""
        whole, part = divmod(self.num_batches, 1)
        return whole * draws - torch.log1p(part * torch.expm1(-draws))

    def holds(self, items: Tensor) -> Tensor:
        """(M,) bool: which of the items are held."""
        return self.place[items] >= 0

    def others(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Items (S',) that are held and not among `items`, and their vectors (S', D)."""
        places = self.place[items]
        keep = self.items > 0
        keep[places[places >= 0].long()] = False
        return self.items[keep], self.vectors[keep]

    def state_dict(self) -> dict:
        return {"items": self.items, "vectors": self.vectors, "next": self.next, "added": list(self.added), "step": self.step}

    def load_state_dict(self, state: dict) -> None:
        self.items.copy_(state["items"])
        self.vectors.copy_(state["vectors"])
        self.next, self.added, self.step = state["next"], list(state["added"]), state.get("step", 0)
        self.place.fill_(-1)
        held = (self.items > 0).nonzero()[:, 0]
        self.place[self.items[held]] = held.int()
