"""What TensorBoard shows besides scalars: a layout of the charts to look at first, settings, hparams, histograms, slices, item vectors.

Must not rank or decide; gets a writer and values. The logger calls it and bears its errors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from atomic import write_text_atomic
from charts import Value
from pictures import level_bars, upright_bars
from report_samples import describe_item
from runs import PROJECTOR_FILES
from slices import MIN_USERS

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


def write_figures(writer, step: int, rows: Sequence[dict], metrics: dict, ranks: torch.Tensor, k: int) -> None:
    """Pictures: NDCG@10 by slice with its 95 % interval, and at which place of the first k the targets stand.

    rows: of slices.quality. metrics: of the same users. ranks (S,): places from 1, 0 = not among the k. RunError without Pillow.
    Measured with 21 rows: 30 ms on one core and 51 kB of events, whatever the number of users.
    """
    values: list[Value] = []
    for before, row in zip([{}, *rows], rows):
        if row["slice"] != before.get("slice"):
            values.append(Value(row["slice"]))
        few = row["num_users"] < MIN_USERS
        margin = math.nan if few or row["ndcg_error"] is None else 1.96 * row["ndcg_error"]
        figure = f"{row['ndcg@10']:.3f} · {row['num_users']:,}"
        values.append(Value(row["group"], row["ndcg@10"], max(row["ndcg@10"] - margin, 0.0), row["ndcg@10"] + margin, figure, few))
    words = f"step {step:,}; NDCG@10 · users; 95 % interval, none and another colour below {MIN_USERS} users"
    picture = level_bars("Quality by slice", words, values, reference=metrics["ndcg@10"], name=f"all: {metrics['ndcg@10']:.4f}")
    writer.add_image("quality by slice", picture, step, dataformats="HWC")
    shares = (100.0 * torch.bincount(ranks, minlength=k + 1)[1:].double() / max(1, len(ranks))).tolist()
    words = f"step {step:,}; % of {len(ranks):,} users; among the {k}: {sum(shares):.2f} %"
    picture = upright_bars("Place of what came next", words, list(map(str, range(1, k + 1))), shares)
    writer.add_image("place of the target", picture, step, dataformats="HWC")


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
