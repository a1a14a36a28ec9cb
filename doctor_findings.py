"""A finding of the doctor: what was looked at, how it stands, what to do. Must not look at anything."""

from __future__ import annotations

from typing import NamedTuple

PASS, WARN, FAIL = LEVELS = ("PASS", "WARN", "FAIL")  # from good to bad


class Finding(NamedTuple):
    """level: one of LEVELS. check: its name, SECTION.SUBJECT. text: what was found, one line. remedy: what to do; "" where nothing is."""

    level: str
    check: str
    text: str
    remedy: str = ""


def finding(good: bool, level: str, check: str, text: str, bad: str, remedy: str) -> Finding:
    """PASS with `text` where `good`; else `level` with `bad` and the remedy."""
    return Finding(PASS, check, text) if good else Finding(level, check, bad, remedy)
