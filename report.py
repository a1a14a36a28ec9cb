"""Writes report.html of a run from its folder alone: verdict, curves, settings, environment, commands. One file, opens offline.

Must not train, evaluate or read data; what a run folder lacks becomes a word in the report, never an error.

    python report.py RUN [RUN ...]
"""

from __future__ import annotations

import html
import json
import math
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import yaml

from checkpoint import write_text_atomic
from config import Config
from errors import UserError, run_cli
from logger import format_duration, read_train_log
from runs import read_status

BASELINES = {"popularity": "popularity", "recent": "most recent", "item2item": "item-to-item"}
METRICS = {"hr@10": "HR@10", "ndcg@10": "NDCG@10", "score": "score"}
MAX_POINTS = 300  # of a curve: more cannot be told apart at the width of a page
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 220, 48, 10, 10, 34  # of a chart, in pixels of a phone's screen

Points = Sequence[tuple[float, float]]


class Run(NamedTuple):
    """What a run folder holds; empty where a file is missing or cannot be read."""

    folder: Path
    log: list[dict]
    metrics: dict
    status: dict
    settings: dict
    settings_text: str
    environment: dict
    commands: list[str]


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html from the files of the run folder and return its path. RunError when the disk is full."""
    path = Path(run_dir) / "report.html"
    write_text_atomic(path, render(read_run(run_dir)))
    return path


# ---- reading ------------------------------------------------------------------------------------------------------------


def read_run(run_dir: Path) -> Run:
    """Everything that a run folder says about its run."""
    folder = Path(run_dir)
    text = _read(folder / "config.resolved.yaml", str) or ""
    settings = _read(folder / "config.resolved.yaml", lambda t: {k: v for k, v in yaml.safe_load(t).items() if isinstance(v, dict)}) or {}
    commands = _read(folder / "command.txt", str.splitlines) or []
    log = _read_log(folder / "train.log")
    metrics, environment = (_read_json(folder / name) for name in ("metrics.json", "environment.json"))
    return Run(folder, log, metrics, read_status(folder), settings, text, environment, commands)


def _read(path: Path, convert: Callable) -> object:
    """The converted text of a file, None where it is missing or no such thing."""
    try:
        return convert(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError):
        return None


def _read_log(path: Path) -> list[dict]:
    try:
        return read_train_log(path)
    except (OSError, RecursionError):
        return []


def _read_json(path: Path) -> dict:
    value = _read(path, json.loads)
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    """A number that can be drawn, None for anything else (a loss that was not finite is null in train.log)."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100
    return float(value) if good else None


def curve(run: Run, key: str, split: str | None = None) -> list[tuple[float, float]]:
    """(step, value) of the records of one split (None: training) that have a finite number under `key`."""
    pairs = [(_number(record.get("global_step")), _number(record.get(key))) for record in run.log if record.get("split") == split]
    return [(step, value) for step, value in pairs if step is not None and value is not None]


# ---- pieces of a page ---------------------------------------------------------------------------------------------------


def esc(value: object) -> str:
    return html.escape(str(value))


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table that scrolls by itself where the screen is narrow. Cells are escaped; `Html` passes as it is."""
    head = f"<thead><tr>{''.join(f'<th>{esc(name)}</th>' for name in header)}</tr></thead>" if header else ""
    body = "".join("<tr>" + "".join(f"<td>{cell if isinstance(cell, Html) else esc(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


class Html(str):
    """Text that is markup already."""


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{esc(title)}</h2>{''.join(parts)}</section>"


def note(text: str) -> str:
    return f'<p class="note">{esc(text)}</p>'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) inside [low, high], about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def label(value: float, largest: float) -> str:
    """A tick's text on an axis with this largest tick: 1500 -> 1.5k; 0.0005 -> 5e-4 where all are below 0.01."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= size and value:
            return f"{value / size:.4g}{letter}"
    if value and largest < 0.01:
        return re.sub(r"(\.0)?e-0*", "e-", f"{value:.1e}")
    return f"{value:.4g}"


def thin(points: Points) -> Points:
    """At most MAX_POINTS points, each the mean of neighbours."""
    size = -(-len(points) // MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)] if size > 1 else [[point] for point in points]
    return [(statistics.fmean(x for x, _ in group), statistics.fmean(y for _, y in group)) for group in groups]


def _range(values: Sequence[float], from_zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    low = min(low, 0.0) if from_zero else low
    if high - low < 1e-9 * max(abs(high), abs(low)) or high == low:
        margin = abs(high) / 2 or 0.5
        return (low if from_zero else low - margin), high + margin
    margin = 0.04 * (high - low)
    return (low if from_zero else low - margin), high + margin


def chart(title: str, series: dict[str, Points], *, from_zero: bool = False, marks: bool = False) -> str:
    """A figure with one inline SVG: axes, ticks, one line a series (name -> points), a legend where there are several."""
    series = {name: thin(points) for name, points in series.items() if points}
    if not series:
        return f"<figure><figcaption>{esc(title)}</figcaption>{note('nothing recorded')}</figure>"
    left, right = _range([x for points in series.values() for x, _ in points], False)
    low, high = _range([y for points in series.values() for _, y in points], from_zero)

    def place(x: float, y: float) -> tuple[float, float]:
        share_x, share_y = (x - left) / (right - left), (y - low) / (high - low)
        return LEFT + share_x * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - share_y * (HEIGHT - TOP - BOTTOM)

    def text(x: float, y: float, words: str, anchor: str = "middle") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'

    parts = []
    levels, steps = ticks(low, high), [value for value in ticks(left, right) if value == int(value) and value >= 0]
    for value in levels:
        _, y = place(left, value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(text(LEFT - 5, y + 4, label(value, max(map(abs, levels))), "end"))
    for value in steps:
        x, _ = place(value, low)
        parts += [f'<path class="axis" d="M{x:.1f} {HEIGHT - BOTTOM}v4"/>', text(x, HEIGHT - 18, label(value, max(steps)))]
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3, "step"))
    for number, points in enumerate(series.values()):
        placed = [place(x, y) for x, y in points]
        parts.append(f'<path class="line c{number}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in placed)}"/>')
        if marks or len(points) == 1:
            parts += [f'<circle class="c{number}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in placed]
    legend = "".join(f'<span class="key c{number}">{esc(name)}</span>' for number, name in enumerate(series)) if len(series) > 1 else ""
    last = ", ".join(f"{name} {points[-1][1]:.4g}" for name, points in series.items())
    return (f'<figure><figcaption>{esc(title)} {legend}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{esc(title)} by step; last: {esc(last)}">{"".join(parts)}</svg></figure>')  # fmt: skip


# ---- sections -----------------------------------------------------------------------------------------------------------


def verdict(metrics: dict) -> tuple[str, str]:
    """(class, sentence): the model against the best of the three baselines by NDCG@10, or why nothing can be said."""
    own = _number(metrics.get("ndcg@10"))
    if own is None:
        return "none", "No test metrics: the run did not reach its evaluation on the test split."
    others = {name: value for key, name in BASELINES.items() if (value := _number(metrics.get(f"{key}.ndcg@10"))) is not None}
    if not others:
        return "none", f"NDCG@10 {own:.4f}; no baseline was evaluated to compare it with."
    best = max(others, key=others.__getitem__)
    against = f"NDCG@10 {own:.4f} against {others[best]:.4f} of {best}"
    against += f" ({100 * (own / others[best] - 1):+.0f} %)" if others[best] else ""
    beaten = sum(own > value for value in others.values())
    if beaten == len(others):
        return "good", f"Beats all {len(others)} baselines: {against}, the best of them."
    return "bad", f"Beats {beaten} of {len(others)} baselines: {against}."


def summary_section(run: Run) -> str:
    metrics, state = run.metrics, run.status.get("state", "unknown")
    kind, sentence = verdict(metrics)
    parts = [f'<p class="verdict {kind}">{esc(sentence)}</p>']
    if state != "finished":
        reason = f": {run.status['reason']}" if run.status.get("reason") else ""
        parts.append(f'<p class="verdict bad">State: {esc(state)} at step {esc(run.status.get("step", "unknown"))}{esc(reason)}</p>')
    rows = []
    top = max((_number(metrics.get(f"{k}ndcg@10")) or 0.0 for k in ("", *(f"{name}." for name in BASELINES))), default=0.0)
    for prefix, name in {"": "this model", **{f"{key}.": name for key, name in BASELINES.items()}}.items():
        values = [_number(metrics.get(prefix + key)) for key in METRICS]
        if any(value is not None for value in values):
            share = 100 * (values[1] or 0.0) / top if top else 0
            bar = Html(f'<span class="bar" style="width:{share:.0f}%"></span>')
            rows.append([name, *("–" if value is None else f"{value:.4f}" for value in values), bar])
    if rows:
        parts.append(table(["", *METRICS.values(), ""], rows))
    users, hit_rate = _number(metrics.get("num_users")), _number(metrics.get("hr@10"))
    if users and hit_rate is not None:
        margin = 1.96 * math.sqrt(max(hit_rate * (1 - hit_rate), 0.0) / users)
        seen = "removed" if metrics.get("seen_removed") else "kept"
        parts.append(note(f"{metrics.get('split', 'test')} split, protocol {metrics.get('protocol', 'unknown')}, {users:,.0f} users, "
                          f"{_number(metrics.get('num_candidates')) or 0:,.0f} candidates ranked, seen items {seen}; "
                          f"95 % interval of HR@10 ± {margin:.4f}."))  # fmt: skip
    times, speeds = ([value for r in run.log if (value := _number(r.get(key))) is not None] for key in ("time", "users_per_s"))
    facts = [("state", state), ("last step", run.status.get("step", "unknown")), ("device asked for", _setting(run, "system", "device")),
             ("first to last log line", format_duration(times[-1] - times[0]) if times else "unknown"),
             ("training speed", f"{statistics.median(speeds):,.0f} users/s (median)" if speeds else "unknown"),
             ("checkpoint", metrics.get("checkpoint", "unknown"))]  # fmt: skip
    parts.append(table([], facts))
    if metrics:
        every = table([], sorted((key, _plain(value)) for key, value in metrics.items()))
        parts.append(f"<details><summary>all of metrics.json</summary>{every}</details>")
    return section("Summary", *parts)


def _plain(value: object) -> str:
    if value == "":
        return "(empty)"
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (dict, list, bool)) else str(value)


def _setting(run: Run, group: str, key: str) -> object:
    return run.settings.get(group, {}).get(key, "unknown")


def curves_section(run: Run) -> str:
    if not run.log:
        return section("Learning curves", note("train.log holds no lines: nothing was trained in this folder."))
    valid = {METRICS[key]: curve(run, key, "valid") for key in ("ndcg@10", "hr@10")}
    charts = [chart("training loss", {"loss": curve(run, "loss")}), chart("validation", valid, marks=True),
              chart("users per second", {"users/s": curve(run, "users_per_s")}, from_zero=True),
              chart("learning rate", {"lr": curve(run, "lr")}, from_zero=True)]  # fmt: skip
    best = max(valid["NDCG@10"], key=lambda point: point[1], default=None)
    text = f"Best validation NDCG@10: {best[1]:.4f} at step {best[0]:,.0f}." if best else "No evaluation on validation was recorded."
    return section("Learning curves", f'<div class="charts">{"".join(charts)}</div>', note(text))


def settings_section(run: Run) -> str:
    if not run.settings_text:
        return section("Configuration", note("config.resolved.yaml is missing."))
    rows = []
    for group, defaults in Config().to_dict().items():
        for key, value in run.settings.get(group, {}).items():
            if key not in defaults or value != defaults[key]:
                rows.append((f"{group}.{key}", _plain(value), _plain(defaults[key]) if key in defaults else "unknown key"))
    changed = table(["setting", "this run", "default"], rows) if rows else note("Every setting has its default.")
    whole = f"<details><summary>config.resolved.yaml</summary><pre>{esc(run.settings_text)}</pre></details>"
    return section("Configuration", changed, whole)


def environment_section(run: Run) -> str:
    def words(value: object) -> str:
        if isinstance(value, list):
            return "; ".join(map(words, value)) or "none"
        if isinstance(value, dict):
            return ", ".join(f"{key} {words(item)}" for key, item in value.items()) or "none"
        return "none" if value is None else str(value)

    rows = [(key, words(value)) for key, value in run.environment.items()]
    return section("Environment", table([], rows) if rows else note("environment.json is missing."))


def commands(run: Run) -> list[tuple[str, str]]:
    """(what for, shell command) to go on with the run, evaluate it, answer with it, and do it again."""
    paths = run.settings.get("paths", {})

    def word(value: object) -> str:
        return shlex.quote(str(value))

    settings = word(run.folder / "config.resolved.yaml")
    noted = run.status.get("checkpoint_path")
    best = run.metrics.get("checkpoint") or (f"{noted}/best_model.pt" if noted else "CHECKPOINT")
    own = [key for key in ("log_path", "tensorboard_path", "checkpoint_path") if paths.get(key)]
    again = "".join(f" --{key} {word(f'{paths[key]}-again')}" for key in own)
    data = f" --data_path {word(paths['data_path'])}" if paths.get("data_path") else ""
    result = []
    if run.status.get("kind") != "eval":
        result = [("resume", f"python main.py --config {settings} --resume_path {word(run.folder)}")]
    result += [("evaluate", f"python main.py --inference_only --state_dict_path {word(best)}{data}"),
               ("infer", f"MODEL_OUTPUT_PATH={word(best)} EVAL_DATA_PATH=FOLDER EVAL_RESULT_PATH=results python infer.py")]  # fmt: skip
    commit = str(run.environment.get("commit") or "")
    checkout = f"git checkout {word(commit.removesuffix('-dirty'))} && " if commit else ""
    if run.status.get("kind") != "eval":
        result.append(("reproduce" + (" (the scripts had changes that no commit holds)" if commit.endswith("-dirty") else ""),
                       f"{checkout}python main.py --config {settings}{again}"))  # fmt: skip
    return result + [("this run was started with", f"python {line}") for line in run.commands if line.strip()]


def commands_section(run: Run) -> str:
    return section("Commands", *(f"<h3>{esc(what)}</h3><pre>{esc(line)}</pre>" for what, line in commands(run)))


STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--soft:#59636e;--edge:#d1d9e0;--card:#f6f8fa;--c0:#0a66c2;
--c1:#c2410c;--good:#116329;--bad:#a40e26}
@media (prefers-color-scheme:dark){:root{--bg:#0f1419;--fg:#e6e9ec;--soft:#9aa5b1;--edge:#313b46;--card:#182028;--c0:#6cb2ff;--c1:#ffab70;
--good:#5fd38a;--bad:#ff8c8c}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:60rem;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.4rem;line-height:1.25;margin:.2rem 0;overflow-wrap:anywhere}h2{font-size:1.1rem;margin:2rem 0 .6rem;padding-bottom:.2rem;
border-bottom:1px solid var(--edge)}
h3{font-size:.9rem;font-weight:600;margin:.8rem 0 .2rem}
.note,header p{color:var(--soft);font-size:.9rem;margin:.4rem 0}
.verdict{padding:.6rem .8rem;margin:.6rem 0;border-left:4px solid var(--soft);background:var(--card);font-weight:600;overflow-wrap:anywhere}
.verdict.good{border-color:var(--good);color:var(--good)}.verdict.bad{border-color:var(--bad);color:var(--bad)}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;width:100%}
th,td{text-align:left;padding:.3rem .7rem .3rem 0;border-bottom:1px solid var(--edge);overflow-wrap:anywhere;vertical-align:top}
th{color:var(--soft);font-weight:600;white-space:nowrap}td:has(~ td .bar){white-space:nowrap}td:first-child{white-space:nowrap}
td:has(.bar){width:30%;padding-right:0;vertical-align:middle}
@media (max-width:28rem){td:has(~ td .bar),th{padding-right:.4rem}}
.bar{display:block;height:.7rem;min-width:1px;background:var(--c0);print-color-adjust:exact;-webkit-print-color-adjust:exact}
tbody tr:first-child td:has(~ td .bar){font-weight:700}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(21rem,100%),1fr));gap:1rem}
figure{margin:0;break-inside:avoid}figcaption{font-weight:600;font-size:.9rem}
svg{display:block;width:100%;height:auto}svg text{font-size:11px;fill:var(--soft)}
.grid{stroke:var(--edge);stroke-width:.6}.axis{stroke:var(--soft);fill:none}.line{fill:none;stroke-width:1.8;stroke-linejoin:round}
.line.c0{stroke:var(--c0)}.line.c1{stroke:var(--c1);stroke-dasharray:5 3}circle.c0{fill:var(--c0)}circle.c1{fill:var(--c1)}
.key{font-weight:400;margin-left:.8rem;color:var(--soft)}.key::before{content:"";display:inline-block;width:1.4rem;margin-right:.3rem;
vertical-align:middle;border-top:3px solid var(--c0)}.key.c1::before{border-top:3px dashed var(--c1)}
pre{margin:.2rem 0;padding:.6rem .8rem;background:var(--card);font:.82rem/1.45 ui-monospace,monospace;
white-space:pre-wrap;overflow-wrap:anywhere}
details{margin:.8rem 0}summary{cursor:pointer;color:var(--soft)}
@media print{:root{color-scheme:light;--bg:#fff;--fg:#000;--soft:#444;--edge:#bbb;--card:#f4f4f4;--c0:#0a4f9c;
--c1:#b0400c;--good:#0b4d1f;--bad:#8a0c20}
body{max-width:none;padding:0;font-size:11pt}.charts{grid-template-columns:1fr 1fr}
details::details-content{content-visibility:visible;block-size:auto}}
"""


def render(run: Run) -> str:
    """The whole page. A content policy of its own forbids any request, whatever a run's files hold."""
    name = run.status.get("name") or run.folder.resolve().name
    what = "Evaluation of a checkpoint" if run.status.get("kind") == "eval" else "Training run"
    when = run.status.get("time") or datetime.now().astimezone().isoformat(timespec="seconds")
    body = "".join(part(run) for part in (summary_section, curves_section, settings_section, environment_section, commands_section))
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
            f'<link rel="icon" href="data:,"><title>{esc(name)}</title><style>{STYLE}</style></head>\n'
            f"<body><header><p>{what}</p><h1>{esc(name)}</h1><p>{esc(when)}</p></header>\n{body}</body></html>\n")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    folders = [Path(word) for word in words if word != "--debug"]
    if any(word in ("-h", "--help") for word in words):
        print(__doc__)
        return 0
    if not folders:
        raise UserError("no run folder given; expected python report.py RUN [RUN ...]. Runs lie in ./logs, or where log_path pointed.")
    for folder in folders:
        if not any((folder / name).is_file() for name in ("status.json", "train.log", "metrics.json")):
            raise UserError(f"{folder}: no run folder; expected status.json, train.log or metrics.json in it.\n"
                            "Runs lie in ./logs, or where log_path pointed.")  # fmt: skip
    for folder in folders:
        print(f"written: {write_report(folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, debug="--debug" in sys.argv))
