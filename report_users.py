"""The report's sample users: history, top 10, what came next, and why the answers are near. From report.json alone.

Must not choose users or compute vectors (report_samples.py does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from report_html import NONE, Html, count, details, esc, facts, heading, note, number, section, table
from report_read import Run
from schema import ACTION_NAMES

OPENED = 1  # users shown at once; the others unfold
VALUES = 4  # values of a feature that are shown


def absent(run: Run, part: str) -> Html:
    """The note in place of a part of report.json: the run has not come to its test, or it was tested by an earlier version."""
    state, step = str(run.status.get("state", "unknown")), run.status.get("step", "unknown")
    if number(run.metrics.get("ndcg@10")) is not None:
        return note(f"report.json with {part} is missing: this run was tested before the report kept them.")
    later = "" if run.status.get("kind") == "eval" else " The first of the commands below goes on with it."
    if state == "running":
        return note(f"No {part}: the run has not come to its test yet, or was killed before it.{later}")
    if state in ("interrupted", "failed"):
        ended = "was interrupted" if state == "interrupted" else "failed"
        return note(f"No {part}: the run {ended} at step {step}, before its test.{later}")
    return note(f"No {part}: the folder holds no test of the run.")


def users_section(run: Run) -> Html:
    samples = run.report.get("samples")
    if not samples:
        return section("Sample users", absent(run, "sample users"))
    coverage = run.report.get("data", {}).get("coverage", [])
    names = {feature["id"]: feature["name"] for feature in coverage if feature["name"]}
    num_candidates = run.metrics.get("num_candidates")  # for "rank 12 of 4,000"
    blocks = [_user(user, samples["items"], names, num_candidates, n < OPENED) for n, user in enumerate(samples["users"])]
    text = (
        "Test users drawn at random: some whose next item is among the ten, some in the first hundred, some farther off. Near: the cosine "
        "of item vectors. Popularity: training events of the item. Times are UTC. "
        "An item is named by its id in the data, which hold no titles."
    )
    return section("Sample users", note(text), *blocks)


def _user(user: Mapping, items: Mapping, names: Mapping, num_candidates: object, opened: bool) -> Html:
    rank, goal = user["rank"], user["next"]["item"]
    place = f"rank {rank + 1:,} of {count(num_candidates)}" if rank >= 0 else "its next item is no candidate, or its rank was not counted"
    title = Html(f"<b>{esc(user['user'])}</b>: {place}, {user['num_events']:,} events")
    before = details(f"history, newest first: the last {len(user['history'])} of {user['num_events']:,} events", _history(user, items),
                     opened=True)  # fmt: skip
    next_rows = [
        ("what came next", f"item {_raw(items, goal)}, {_action(user['next'])}, {_time(user['next'])}"),
        ("its rank", place),
        ("its popularity", count(_item(items, goal).get("count"))),
        ("its features", _features(_item(items, goal).get("features", {}), names)),
    ]
    profile = _features(user.get("features", {}), names)
    pairs = [("what came next", user["near_next"]), ("the first answer", user["near_first"])]
    near = [
        heading("Nearest items in vector space"),
        table(["to", "items (cosine)"], [(name, _neighbours(rows, items)) for name, rows in pairs]),
    ]
    parts = [facts([("profile", profile), *next_rows]), heading("Top 10"), _answers(user, items, names), *near, before]
    markup = details(title, *parts, opened=opened)
    return Html(markup.replace("<details", '<details class="user"', 1))


def _answers(user: Mapping, items: Mapping, names: Mapping) -> Html:
    rows = []
    for n, answer in enumerate(user["top"]):
        mine = answer["item"] == user["next"]["item"]
        raw = Html(f"<mark>{esc(_raw(items, answer['item']))} ✓ came next</mark>") if mine else _raw(items, answer["item"])
        nearest = answer["nearest"]
        near = NONE if nearest is None else f"{_raw(items, nearest)} ({answer['cosine']:.2f})"
        common = ", ".join(f"{names.get(name, name)}={value}" for name, value in answer["shared"])
        same = "the item itself" if nearest == answer["item"] else common or "none"
        events = count(_item(items, answer["item"]).get("count"))
        rows.append([n + 1, raw, f"{answer['score']:.3f}", events, near, same])
    header = ["#", "item", "score", "popularity", "nearest in the history (cosine)", "features shared with that"]
    return table(header, rows, "answers", (0, 2, 3))


def _history(user: Mapping, items: Mapping) -> Html:
    times = [event["time"] for event in user["history"]]
    rows = []
    for n in range(len(times) - 1, -1, -1):
        event = user["history"][n]
        after = times[n + 1] if n + 1 < len(times) else user["next"]["time"]
        gap = NONE if times[n] is None or after is None else _duration(after - times[n])
        rows.append([_time(event), gap, _action(event), _raw(items, event["item"]), count(_item(items, event["item"]).get("count"))])
    return table(["time", "before the next", "action", "item", "popularity"], rows, "wide", (4,))


def _item(items: Mapping, item: int) -> Mapping:
    return items.get(str(item), {})


def _raw(items: Mapping, item: int) -> str:
    return str(_item(items, item).get("raw", f"number {item}"))


def _action(event: Mapping) -> str:
    code = event["action"]
    return ACTION_NAMES[code] if 0 <= code < len(ACTION_NAMES) else f"action {code}"


def _time(event: Mapping) -> str:
    if event["time"] is None:
        return "no time"
    return moment(event["time"])


def moment(seconds: float) -> str:
    """Seconds since 1970 as a date and a time of day, UTC; as the bare number where no calendar holds it."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
    except (OverflowError, OSError, ValueError):
        return f"{seconds:,.0f} s"


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _features(values: Mapping[str, Sequence], names: Mapping) -> str:
    shown = (f"{names.get(name, name)}={'/'.join(map(str, found[:VALUES]))}" for name, found in values.items())
    return ", ".join(shown) or "none"


def _neighbours(rows: Sequence, items: Mapping) -> str:
    return ", ".join(f"{_raw(items, item)} ({cosine:.2f})" for item, cosine in rows) or "unknown: it has no vector among the candidates"
