"""Runs side by side: metrics, paired differences with bootstrap intervals, curves, slices, and the settings that differ.

Must not read files; gets what report_read.py found.

Legend: U users that two runs were tested on alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from charts import COLOURS, Value, intervals, lines
from config import Config
from logger import format_duration
from metrics import SCORE_K, paired_interval
from ranks import Ranks
from report_html import NONE, Html, details, heading, metric, note, number, section, table
from report_read import Run, curve, data_of, incomparable

METRICS = {"hr@10": "HR@10", "ndcg@10": "NDCG@10", "score": "score"}
FEW = 30  # users below which an interval is not given


class Difference(NamedTuple):
    """One run's metric less another's over the users that both were tested on, with its 95 % interval."""

    mean: float
    low: float
    high: float
    num_users: int

    @property
    def clear(self) -> bool:
        return self.low > 0 or self.high < 0

    def words(self) -> str:
        return f"{signed(self.mean)}, 95 % interval {signed(self.low)} to {signed(self.high)}, over the same {self.num_users:,} users"


def signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def gains(ranks: np.ndarray, key: str) -> np.ndarray:
    """Each user's HR@10 or NDCG@10 (U,) float64 of exact 0-based ranks (U,), -1 = a miss; as metrics.py defines them."""
    hit = (ranks >= 0) & (ranks < SCORE_K)
    return hit.astype(np.float64) if key == "hr@10" else hit / np.log2(np.maximum(ranks, 0) + 2.0)


def difference(run: Run, other: Run, key: str) -> Difference | None:
    """Paired by user; None where a run has no ranks, the data or what was ranked is not the same, or they share too few users."""
    if run.ranks is None or other.ranks is None or incomparable(run, other):
        return None
    _, ours, theirs = np.intersect1d(run.ranks.user, other.ranks.user, return_indices=True)
    if len(ours) < FEW:
        return None
    return Difference(*paired_interval(gains(run.ranks.rank[ours], key) - gains(other.ranks.rank[theirs], key)), len(ours))


def less_baseline(ranks: Ranks | None, name: str, key: str) -> Difference | None:
    """The model less a baseline, paired by user; None where the ranks say nothing of that baseline, or are of too few users."""
    if ranks is None or name not in ranks.baselines or len(ranks.user) < FEW:
        return None
    return Difference(*paired_interval(gains(ranks.rank, key) - gains(ranks.baselines[name], key)), len(ranks.user))


def names_of(runs: Sequence[Run]) -> list[str]:
    """A name for each run, all different: its own, else its folder, else a number."""
    for names in ([run.name for run in runs], [run.folder.resolve().name for run in runs]):
        if len(set(names)) == len(runs):
            return names
    return [f"{n + 1}: {run.name}" for n, run in enumerate(runs)]


def compare_section(run: Run, others: Sequence[Run]) -> Html:
    """`run` beside the others. Differences are run less other."""
    runs = [run, *others]
    names = names_of(runs)
    rows = []
    for name, one in zip(names, runs):
        state = one.status.get("state", "unknown")
        users = number(one.metrics.get("num_users"))
        rows.append([name, *(metric(one.metrics.get(key)) for key in METRICS), NONE if users is None else f"{users:,.0f}",
                     one.status.get("step", NONE), NONE if one.seconds is None else format_duration(one.seconds), state])  # fmt: skip
    parts = [table(["run", *METRICS.values(), "users", "steps", "time", "state"], rows, "wide", range(1, 7))]
    parts.append(f'<div class="charts">{"".join(_differences(run, others, names, key) for key in ("ndcg@10", "hr@10"))}')
    for title, key, split in (("Validation NDCG@10", "ndcg@10", "valid"), ("Training loss", "loss", None)):
        drawn = {name: curve(one, key, split) for name, one in list(zip(names, runs))[:COLOURS]}
        parts.append(lines(title, drawn, marks=split is not None))
    parts.append("</div>")
    if len(runs) > COLOURS:
        parts.append(note(f"Curves of the first {COLOURS} runs."))
    return section("Runs side by side", *parts, _slices(runs, names), _settings(runs, names))


def _differences(run: Run, others: Sequence[Run], names: Sequence[str], key: str) -> Html:
    rows, missing = [], []
    for name, other in zip(names[1:], others):
        found = difference(run, other, key)
        if found is None:
            missing.append(f"{name}: {incomparable(run, other) or 'too few common users with ranks'}")
        else:
            rows.append(Value(name, found.mean, found.low, found.high, signed(found.mean), found.low <= 0 <= found.high))
    chart = intervals(f"Difference in {METRICS[key]}", rows, reference=0.0, name="no difference",
                      unit="this run less the other; 95 % paired bootstrap interval") if rows else ""  # fmt: skip
    lacking = note(f"No interval for {METRICS[key]}: {'; '.join(missing)}.") if missing else ""
    return Html(f"<div>{chart}{lacking}</div>")


def _slices(runs: Sequence[Run], names: Sequence[str]) -> str:
    """NDCG@10 by slice, a column a run, where several runs have slices of the same data."""
    found = []
    for run in runs:
        rows = run.report.get("quality", {}).get("slices", []) if data_of(run) == data_of(runs[0]) else []
        found.append({(row["slice"], row["group"]): row["ndcg@10"] for row in rows})
    if sum(map(bool, found)) < 2:
        return ""
    keys = dict.fromkeys(key for of_run in found for key in of_run)
    rows = [[f"{slice_name}: {group}", *(metric(of_run.get((slice_name, group))) for of_run in found)] for slice_name, group in keys]
    return details("NDCG@10 by slice", table(["slice", *names], rows, "", range(1, len(runs) + 1)))


def _settings(runs: Sequence[Run], names: Sequence[str]) -> str:
    rows = [[name, *map(shown, values)] for name, values in differing_settings(runs)]
    if not rows:
        return note("These runs have the same settings, paths apart.")
    return heading("Settings that differ") + table(["setting", *names], rows)


def differing_settings(runs: Sequence[Run]) -> list[tuple[str, list]]:
    """("group.key", each run's value) where they differ, paths and the run's name apart; None stands for a missing one."""
    rows = []
    for group, defaults in Config().to_dict().items():
        keys = dict.fromkeys([*defaults, *(key for run in runs for key in run.settings.get(group, {}))])
        for key in keys if group != "paths" else ():
            values = [run.settings.get(group, {}).get(key) for run in runs]
            if key != "run_name" and any(value != values[0] for value in values):
                rows.append((f"{group}.{key}", values))
    return rows


def shown(value: object) -> str:
    """A setting's value in a cell."""
    if value is None:
        return "unknown"
    return "(empty)" if value == "" else "none" if value == [] else str(value).lower() if isinstance(value, bool) else plain(value)


def plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return esc_list(value) if isinstance(value, (list, tuple)) else str(value)


def esc_list(values: Sequence[object]) -> str:
    return ", ".join(map(plain, values))


def against(run: Run, other: Run) -> tuple[str, str]:
    """(class, sentence): a run's test NDCG@10 against an earlier one's."""
    ours, theirs = run.metrics["ndcg@10"], other.metrics["ndcg@10"]
    change = f" ({100 * (ours / theirs - 1):+.0f} %)".replace("-", "−") if theirs else ""
    words = f"NDCG@10 {ours:.4f} against {theirs:.4f}{change} of {other.name}, the best earlier run beside it"
    found = difference(run, other, "ndcg@10")
    if found is None:
        return "none", f"{words}; no interval, as they have too few common users with ranks."
    if not found.clear:
        return "none", f"No clear difference to the best earlier run: {words}. Paired difference {found.words()}."
    better = "Better than" if found.mean > 0 else "Worse than"
    return ("good" if found.mean > 0 else "bad"), f"{better} the best earlier run: {words}. Paired difference {found.words()}."
