"""What a checkpoint's meta.json must hold: each key with its shape. Must not open files, nor judge whether values fit anything."""

from __future__ import annotations

from shapes import COUNT, FLAG, NUMBER, OBJECT, TEXT, Maybe

_SEAL = {"sha256": TEXT, "size": COUNT}
# Those without ? have been written since format 2; the others came later, or not every checkpoint has them: `averaged?` is a mean's, the
# last three are of runs on CPU.
SHAPE = {
    "format_version": COUNT,
    "step": COUNT,
    "valid_loss": Maybe(NUMBER),
    "files": {"model.pt": _SEAL, "trainer.pt": _SEAL},
    "config": OBJECT,
    "schema": OBJECT,
    "layout": [OBJECT],
    "embeddings": [TEXT],
    "num_items": COUNT,
    "num_users": COUNT,
    "num_events": COUNT,
    "item_ids": TEXT,
    "store": TEXT,
    "epoch": COUNT,
    "metrics": {str: Maybe(NUMBER)},
    "torch": TEXT,
    "averaged?": [TEXT],
    "device?": TEXT,
    "cpu_capability?": TEXT,
    "threads?": COUNT,
    "numba?": FLAG,
    "products?": TEXT,
}
