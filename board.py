"""What TensorBoard shows besides scalars: a layout of the charts that matter first, settings, hparams, histograms, slices, item vectors.

Must not rank or decide; gets a writer and values. The logger calls it and bears its errors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from atomic import write_text_atomic
from report_samples import describe_item
from runs import PROJECTOR_FILES

MAX_HISTOGRAM = 1_000_000  # values of a tensor that go into its histogram, evenly spaced
# Custom scalars: the four charts to look at first.
LAYOUT = {
    "first": {
        "loss": ["Multiline", ["Loss/train"]],
        "quality on validation": ["Multiline", ["eval/ndcg@10", "eval/hr@10"]],
        "gradient norm and loss on validation": ["Multiline", ["train/grad_norm", "Loss/valid"]],
        "speed": ["Multiline", ["perf/users_per_s"]],
    }
}


def write_start(writer, settings_text: str) -> None:
    """The layout and the settings as text. writer: a SummaryWriter. settings_text: YAML."""
    writer.add_custom_scalars(LAYOUT)
    writer.add_text("settings", "\n".join("    " + line for line in settings_text.splitlines()))  # indented: markdown's plain text


def write_evaluation(writer, step: int, rows: Sequence[dict], model: torch.nn.Module | None) -> None:
    """Quality by slice as a table (rows of slices.quality), and with a model the histograms of its weights."""
    lines = ["| slice | group | users | HR@10 | NDCG@10 |", "|---|---|---:|---:|---:|"]
    lines += [f"| {r['slice']} | {r['group']} | {r['num_users']:,} | {r['hr@10']:.4f} | {r['ndcg@10']:.4f} |" for r in rows]
    writer.add_text("quality by slice", "\n".join(lines), step)
    for name, weights in model.named_parameters() if model is not None else ():
        flat = weights.detach().reshape(-1)
        writer.add_histogram(f"weights/{name}", flat[:: -(-flat.numel() // MAX_HISTOGRAM) or 1].float().cpu(), step)


def write_hparams(writer, settings: dict, metrics: dict) -> None:
    """The settings (config.to_dict()) and the test metrics for the HParams tab, in the run's own events, not a run of their own."""
    from torch.utils.tensorboard.summary import hparams

    flat = {f"{group}.{key}": value for group, values in settings.items() if group != "paths" for key, value in values.items()}
    plain = {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in flat.items()}
    numbers = {f"test/{key}": metrics[key] for key in ("hr@10", "ndcg@10", "score") if isinstance(metrics.get(key), float)}
    for summary in hparams(plain, numbers):
        writer.file_writer.add_summary(summary)


def write_projector(folder: Path, store, item_ids: np.ndarray, vectors: torch.Tensor, counts: np.ndarray, most: int) -> int:
    """Vectors of the `most` most popular of item_ids (C,) for the projector, with creative id, popularity and features; returns how many.

    vectors (C, D). counts (num_items + 1,): training events. Written beside the events; RunError when the disk is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = np.argsort(-counts[item_ids], kind="stable")[:most]
    items = [describe_item(store, int(item), counts) for item in item_ids[chosen]]
    features = [feature for kind in ("single", "multi") for feature in store.schema.select("item", kind)]
    header = ["item", "popularity", *(f"{feature.id} {feature.name}".strip() for feature in features)]
    rows = [[item["raw"], str(item["count"]), *("/".join(map(str, item["features"].get(f.id, []))) for f in features)] for item in items]
    metadata = "".join("\t".join(re.sub(r"[\t\r\n]", " ", cell) for cell in row) + "\n" for row in [header, *rows])
    values = vectors[torch.from_numpy(chosen).to(vectors.device)].float().cpu().numpy()
    config, tensors, labels = PROJECTOR_FILES
    write_text_atomic(folder / tensors, "".join("\t".join(f"{x:.6g}" for x in row) + "\n" for row in values.tolist()))
    write_text_atomic(folder / labels, metadata)
    entry = f'tensor_name: "items" tensor_path: "{tensors}" metadata_path: "{labels}"'
    write_text_atomic(folder / config, f"embeddings {{ {entry} }}\n")
    return len(chosen)
