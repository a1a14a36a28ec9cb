"""The report's sections on one run: verdict, curves, data, quality by slice, settings, environment, commands.

Must not read files; gets what report_read.py found. What a run lacks becomes a word in the report.
"""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from charts import Value, bars, intervals, lines
from config import Config
from logger import format_duration
from ranks import Ranks
from report_compare import FEW, METRICS, against, less_baseline, plain, shown, signed
from report_html import NONE, Html, bar, count, details, esc, facts, heading, metric, note, number, percent, pre, section, table, tiles
from report_read import Run, curve
from report_users import absent, moment
from slices import MIN_USERS, worst

BASELINES = {"popularity": "popularity", "recent": "most recent", "item2item": "item-to-item"}
WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


# ---- summary ------------------------------------------------------------------------------------------------------------


def verdict(metrics: dict, ranks: Ranks | None) -> tuple[str, str]:
    """(class, sentence): the model against the best of the three baselines by NDCG@10, or why nothing can be said.

    ranks: of the same test; with the baselines' places in them the difference has its paired interval.
    """
    own = number(metrics.get("ndcg@10"))
    if own is None:
        return "none", "No test metrics: the run did not reach its evaluation on the test split."
    others = {key: value for key in BASELINES if (value := number(metrics.get(f"{key}.ndcg@10"))) is not None}
    if not others:
        return "none", f"NDCG@10 {own:.4f}; no baseline was evaluated to compare it with."
    best = max(others, key=others.__getitem__)
    words = f"NDCG@10 {own:.4f} against {others[best]:.4f} of {BASELINES[best]}"
    words += f" ({100 * (own / others[best] - 1):+.0f} %)" if others[best] else ""
    beaten = sum(own > value for value in others.values())
    beats = f"Beats {f'all {beaten}' if beaten == len(others) else f'{beaten} of {len(others)}'} baselines: {words}, the best of them"
    found = less_baseline(ranks, best, "ndcg@10")
    if found is None:
        return "good" if beaten == len(others) else "bad", f"{beats}; no interval, {_no_interval(ranks, best)}."
    if not found.clear:
        return "none", f"No clear difference to the best baseline: {words}. Paired difference {found.words()}."
    return "good" if found.mean > 0 else "bad", f"{beats}. Paired difference {found.words()}."


def _no_interval(ranks: Ranks | None, baseline: str) -> str:
    if ranks is None:
        return "as ranks.npz is missing or cannot be read"
    return "as ranks.npz has no places of this baseline" if baseline not in ranks.baselines else f"as fewer than {FEW} users have ranks"


def summary_section(run: Run, earlier: Run | None) -> Html:
    """earlier: the best comparable run beside this one, None where there is none."""
    state = run.status.get("state", "unknown")
    parts = [_verdict(*verdict(run.metrics, run.ranks))]
    if earlier is not None:
        parts.append(_verdict(*against(run, earlier)))
    if state != "finished":
        reason = f": {run.status['reason']}" if run.status.get("reason") else ""
        parts.append(_verdict("bad", f"State: {state} at step {run.status.get('step', 'unknown')}{reason}"))
    parts += [_tiles(run), _bars(run, earlier), _differences(run), _how_tested(run)]
    if run.metrics and earlier is None:
        parts.append(note("No earlier run to compare with lies in the folder beside this one."))
    parts.append(_facts(run))
    if run.metrics:
        every = facts(sorted((key, _plain(value)) for key, value in run.metrics.items()))
        parts.append(details("all of metrics.json", every))
    return section("Summary", *parts)


def _verdict(kind: str, sentence: str) -> Html:
    head, colon, rest = sentence.partition(":")
    words = f"<b>{esc(head)}{colon}</b>{esc(rest)}" if colon else f"<b>{esc(sentence)}</b>"
    return Html(f'<p class="verdict {kind}">{words}</p>')


def _tiles(run: Run) -> str:
    if number(run.metrics.get("ndcg@10")) is None:
        return ""
    rows = []
    for key, name in METRICS.items():
        best = max((value for base in BASELINES if (value := number(run.metrics.get(f"{base}.{key}"))) is not None), default=None)
        rows.append((name, metric(run.metrics.get(key)), "" if best is None else f"best baseline {best:.4f}"))
    if run.ranks is not None and (run.ranks.rank >= 0).any():
        known = run.ranks.rank[run.ranks.rank >= 0]
        rows.append(("median rank", f"{np.median(known) + 1:,.0f}", f"of {count(run.metrics.get('num_candidates'))} candidates"))
    return tiles(rows)


def _bars(run: Run, earlier: Run | None) -> str:
    named = [("this model", run.metrics, "")] + [(name, run.metrics, f"{key}.") for key, name in BASELINES.items()]
    if earlier is not None:
        named.insert(1, (f"earlier: {earlier.name}", earlier.metrics, ""))
    found = [(name, [number(metrics.get(prefix + key)) for key in METRICS]) for name, metrics, prefix in named]
    found = [(name, values) for name, values in found if any(value is not None for value in values)]
    top = max((values[1] or 0.0 for _, values in found), default=0.0)
    rows = [[name, *map(metric, values), bar((values[1] or 0.0) / top if top else 0.0, "c0" if name == "this model" else "c5")]
            for name, values in found]  # fmt: skip
    return table(["", *METRICS.values(), "NDCG@10"], rows, "", (1, 2, 3)) if rows else ""


def _differences(run: Run) -> str:
    """The paired differences in NDCG@10 to the baselines, drawn and in figures."""
    found = [(name, less) for key, name in BASELINES.items() if (less := less_baseline(run.ranks, key, "ndcg@10")) is not None]
    if not found:
        return ""
    rows = [Value(name, less.mean, less.low, less.high, signed(less.mean), not less.clear) for name, less in found]
    unit = "95 % paired bootstrap interval"
    chart = intervals("This model less a baseline, NDCG@10", rows, reference=0.0, name="no difference", unit=unit)
    words = "; ".join(f"{name} {signed(less.mean)} ({signed(less.low)} to {signed(less.high)})" for name, less in found)
    return Html(f'<div class="single">{chart}{note(words)}</div>')


def _how_tested(run: Run) -> str:
    metrics = run.metrics
    users, hit_rate = number(metrics.get("num_users")), number(metrics.get("hr@10"))
    if not users or hit_rate is None:
        return ""
    margin = 1.96 * math.sqrt(max(hit_rate * (1 - hit_rate), 0.0) / users)
    seen = "removed" if metrics.get("seen_removed") else "kept"
    return note(f"{metrics.get('split', 'test')} split, protocol {metrics.get('protocol', 'unknown')}, {users:,.0f} users, "
                f"{number(metrics.get('num_candidates')) or 0:,.0f} candidates ranked, seen items {seen}; "
                f"95 % interval of HR@10 ± {margin:.4f}.")  # fmt: skip


def _facts(run: Run) -> Html:
    speeds = [value for record in run.log if (value := number(record.get("users_per_s"))) is not None]
    memory = [value for record in run.log if (value := number(record.get("rss_gib"))) is not None]
    used, asked = run.environment.get("device", "unknown"), run.settings.get("system", {}).get("device", "unknown")
    return facts([("state", run.status.get("state", "unknown")), ("last step", run.status.get("step", "unknown")),
                  ("device", f"{used} (asked for: {asked})"),
                  ("time running", "unknown" if run.seconds is None else format_duration(run.seconds)),
                  ("training speed", f"{statistics.median(speeds):,.0f} users/s (median)" if speeds else "unknown"),
                  ("largest memory in the log", f"{max(memory):.2f} GiB" if memory else "unknown"),
                  ("checkpoint", run.metrics.get("checkpoint", "unknown"))])  # fmt: skip


def _plain(value: object) -> str:
    return "(empty)" if value == "" else plain(value)


# ---- curves -------------------------------------------------------------------------------------------------------------


def curves_section(run: Run) -> Html:
    if not run.log:
        return section("Learning curves", note("train.log holds no lines: nothing was trained in this folder."))
    valid = {METRICS[key]: curve(run, key, "valid") for key in ("ndcg@10", "hr@10")}
    waits = [(step, 100 * share) for step, share in curve(run, "data_wait")]
    charts = [lines("Training loss", {"loss": curve(run, "loss")}, unit="mean since the line before"),
              lines("Validation", valid, marks=True, from_zero=True),
              lines("Validation loss", {"loss": curve(run, "valid_loss", "valid")}, marks=True),
              lines("Learning rate", {"lr": curve(run, "lr")}, from_zero=True),
              lines("Gradient norm", {"norm": curve(run, "grad_norm")}, unit="before clipping", from_zero=True),
              lines("Speed", {"users/s": curve(run, "users_per_s")}, unit="users/s", from_zero=True),
              lines("Waiting for data", {"wait": waits}, unit="% of the time", from_zero=True),
              lines("Memory", {"memory": curve(run, "rss_gib")}, unit="GiB resident", from_zero=True)]  # fmt: skip
    best = max(valid["NDCG@10"], key=lambda point: point[1], default=None)
    text = f"Best validation NDCG@10: {best[1]:.4f} at step {best[0]:,.0f}." if best else "No evaluation on validation was recorded."
    return section("Learning curves", f'<div class="charts">{"".join(charts)}</div>', note(text))


# ---- data ---------------------------------------------------------------------------------------------------------------


def data_section(run: Run) -> Html:
    data = run.report.get("data")
    if not data:
        return section("Data", absent(run, "figures of the data"))
    splits, lengths, cold = data["splits"], data["lengths"], data["cold"]
    popular = data["popularity"]
    longest = f"10 % have at most {lengths['p10']:,.0f} and 10 % at least {lengths['p90']:,.0f}, the longest {lengths['max']:,}"
    never = (
        f"{percent(cold['candidates'])} of the candidates and {percent(cold['targets'])} of the test targets were never seen in training"
    )
    total = max(1, sum(data["actions"].values()))
    rows = [
        ("users, items, events", f"{data['num_users']:,} · {data['num_items']:,} · {data['num_events']:,}"),
        ("samples", f"{splits['train']:,} training, {splits['valid']:,} validation, {splits['test']:,} test"),
        ("events of a user", f"median {lengths['median']:,.0f}, mean {lengths['mean']:,.1f}; {longest}"),
        ("actions", ", ".join(f"{name} {percent(n / total)}" for name, n in data["actions"].items())),
        ("most popular items", f"1 % of the items have {percent(popular['top_1'])} of the events, 10 % have {percent(popular['top_10'])}"),
        ("cold", f"{never}; {percent(cold['targets_no_candidate'])} of the targets are no candidate"),
        ("rejected lines", "unknown" if data["rejected"] is None else count(data["rejected"])),
    ]
    if data.get("first_time") is not None:
        rows.insert(3, ("time", f"{moment(data['first_time'])} to {moment(data['last_time'])} UTC"))
    parts = [facts(rows), *map(note, data["notes"]), f'<div class="charts">{"".join(_data_charts(data))}</div>']
    if data["users_looked_at"] < data["num_users"]:
        parts.append(note(f"Actions, gaps, hours and weekdays are those of {data['users_looked_at']:,} users drawn at random."))
    return section("Data", *parts, heading("Features: how many have a value"), _coverage(data["coverage"]))


def _data_charts(data: dict) -> list[Html]:
    charts = [bars("Events of a user", data["lengths"]["names"], _shares(data["lengths"]["counts"]), unit="% of the users", x_name="events",
                   shares=True),
              lines("Popularity", {"events": data["popularity"]["curve"]}, unit="training events of the n-th most popular item",
                    x_name="n-th item", log=True)]  # fmt: skip
    if not data["has_time"]:
        return [*charts, note("These data carry no times: no gaps, hours or weekdays.")]
    return [*charts, bars("Gap between events of a user", data["gaps"]["names"], _shares(data["gaps"]["counts"]), unit="% of the gaps",
                           shares=True),
            bars("Hour of day", list(map(str, range(24))), _shares(data["hours"]), unit="% of the events", x_name="hour, UTC", shares=True),
            bars("Weekday", WEEKDAYS, _shares(data["weekdays"]), unit="% of the events", x_name="UTC", shares=True)]  # fmt: skip


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts)
    return [n / total for n in counts] if total else [0.0 for _ in counts]


def _coverage(features: Sequence[dict]) -> Html:
    rows = []
    for feature in features:
        name = f"{feature['id']} {feature['name']}".strip()
        kind = f"{feature['side']}, {feature['kind']}" + (
            f" of {feature['mean_values']:.1f} on average" if "mean_values" in feature else ""
        )
        kind += f", width {feature['width']:,}" if "width" in feature else ""
        rows.append(
            [
                name,
                kind,
                NONE if feature["largest"] is None else f"{feature['largest']:,}",
                percent(feature["covered"]),
                bar(feature["covered"]),
            ]
        )
    header = ["feature", "kind", "largest value", "covered", ""]
    return table(header, rows, "coverage", (2, 3)) if rows else note("The data have no features.")


# ---- quality ------------------------------------------------------------------------------------------------------------


def quality_section(run: Run) -> Html:
    quality = run.report.get("quality")
    if not quality:
        return section("Quality by slice", absent(run, "slices"))
    slices, overall = quality["slices"], number(run.metrics.get("ndcg@10"))
    words = [f"{row['slice']} {row['group']} ({row['ndcg@10']:.4f}, {row['num_users']:,} users)" for row in worst(slices)]
    compared = "" if overall is None else f", against {overall:.4f} of all"
    text = f"No slice has two groups of {MIN_USERS} users: none is named the worst."
    if words:
        text = f"The worst by NDCG@10{compared}: {'; '.join(words)}."
    figures = [(f"{row['slice']}: {row['group']}", f"{row['num_users']:,}", metric(row["hr@10"]), metric(row["ndcg@10"])) for row in slices]
    every = details("all figures", table(["slice", "users", "HR@10", "NDCG@10"], figures, "", (1, 2, 3)))
    charts = f'<div class="charts">{_slice_chart(slices, overall)}{_rank_chart(quality["ranks"])}</div>'
    return section("Quality by slice", _verdict("none", text), charts, every)


def _slice_chart(slices: Sequence[dict], overall: float | None) -> Html:
    rows: list[Value] = []
    for before, row in zip([{}, *slices], slices):
        if row["slice"] != before.get("slice"):
            rows.append(Value(row["slice"]))
        value, few = row["ndcg@10"], row["num_users"] < MIN_USERS
        margin = math.nan if few or row["ndcg_error"] is None else 1.96 * row["ndcg_error"]
        rows.append(Value(row["group"], value, max(value - margin, 0.0), value + margin, f"{value:.3f} · {row['num_users']:,}", few))
    unit = f"figure · users; 95 % interval, none and another colour below {MIN_USERS} users"
    return intervals("NDCG@10 by slice", rows, reference=overall, name="all", unit=unit)


def _rank_chart(ranks: dict) -> Html:
    chart = bars("Rank of what came next", ranks["names"], _shares(ranks["counts"]), unit="% of the users with a rank", shares=True)
    missing = note(f"Users without a rank (the target is no candidate, was removed as seen, or was not counted): {ranks['without']:,}.")
    return Html(f"<div>{chart}{missing if ranks['without'] else ''}</div>")


# ---- settings, environment, commands ------------------------------------------------------------------------------------


def settings_section(run: Run, compared: Run | None) -> Html:
    """compared: the run whose settings stand beside this one's; None = the defaults alone."""
    if not run.settings_text:
        return section("Configuration", note("config.resolved.yaml is missing."))
    rows = []
    for group, defaults in Config().to_dict().items():
        for key, value in run.settings.get(group, {}).items():
            other = None if compared is None else compared.settings.get(group, {}).get(key)
            if key not in defaults or value != defaults[key] or (compared is not None and group != "paths" and value != other):
                row = [f"{group}.{key}", shown(value), shown(defaults[key]) if key in defaults else "unknown key"]
                rows.append(row if compared is None else [*row, shown(other)])
    header = ["setting", "this run", "default"] + ([] if compared is None else [compared.name])
    changed = table(header, rows) if rows else note("Every setting has its default.")
    return section("Configuration", changed, details("config.resolved.yaml", pre(run.settings_text)))


def environment_section(run: Run) -> Html:
    def words(value: object) -> str:
        if isinstance(value, list):
            return "; ".join(map(words, value)) or "none"
        if isinstance(value, dict):
            return ", ".join(f"{key} {words(item)}" for key, item in value.items()) or "none"
        return "none" if value is None else str(value)

    rows = [(key, words(value)) for key, value in run.environment.items()]
    return section("Environment", facts(rows) if rows else note("environment.json is missing."))


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
               ("infer", f"MODEL_OUTPUT_PATH={word(best)} EVAL_DATA_PATH={word(_users_to_predict(run))} EVAL_RESULT_PATH=results "
                         "python infer.py")]  # fmt: skip
    commit = str(run.environment.get("commit") or "")
    checkout = f"git checkout {word(commit.removesuffix('-dirty'))} && " if commit else ""
    if run.status.get("kind") != "eval":
        result.append(("reproduce" + (" (the scripts had changes that no commit holds)" if commit.endswith("-dirty") else ""),
                       f"{checkout}python main.py --config {settings}{again}"))  # fmt: skip
    return result + [("this run was started with", f"python {line}") for line in run.commands if line.strip()]


def _users_to_predict(run: Run) -> str:
    """EVAL_DATA_PATH's folder: where the run's candidates lie, if that is not the training data; else words that stand for it."""
    candidates, data = (run.settings.get(group, {}).get(key) for group, key in (("eval", "candidates"), ("paths", "data_path")))
    if not isinstance(candidates, str) or candidates in ("", "all") or Path(candidates).parent == Path(str(data)):
        return "<folder of users to predict>"
    return str(Path(candidates).parent)


def commands_section(run: Run) -> Html:
    return section("Commands", *(heading(what) + pre(line) for what, line in commands(run)))
