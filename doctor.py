"""Looks over environment, paths, settings and data before a run: `python main.py --doctor`, a line a check, with the remedy.

Must not train or write, but for the store that a run would compile anyway. What it looks at: doctor_machine.py, doctor_data.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from config import Config, with_values
from doctor_data import check_candidates, check_indexer, check_store
from doctor_findings import FAIL, LEVELS, Finding
from doctor_machine import check_environment, check_paths, check_settings, check_sizes
from errors import UserError
from estimate import Data
from machine import scratch_near
from settings import ParsedArguments

ALL_LINES = 2**31 - 1  # max_bad_lines that stops at none


def examine(
    arguments: ParsedArguments,
    open_data: Callable[[Config, Callable[[str], None]], Data],
    choose_device: Callable[[Config], torch.device],
    *,
    environ: dict[str, str],
) -> list[Finding]:
    """All findings, in the order env, paths, settings, data. open_data, choose_device: main.py's."""
    config = arguments.config
    found = [*check_environment(config, environ), *check_paths(arguments)]
    device = torch.device("cpu")
    try:
        device = choose_device(config)
    except UserError as error:
        found.append(_failed("settings.device", error))
    with ExitStack() as scratch:
        data_found, data, kept = _open(config, open_data, scratch)
        found += check_settings(config, data, device)
        if data is not None:
            found += check_sizes(config, data, device)
        found += data_found
        if data is not None:
            found += [*check_store(config, data, kept=kept), *check_indexer(data.store), *check_candidates(config, data.store)]
        del data
    return found


def _open(config: Config, open_data: Callable, scratch: ExitStack) -> tuple[list[Finding], Data | None, bool]:
    """The data as a run would open it, and whether its store stays in the cache.

    Where a line stops that, a cache of its own, which goes with `scratch`, takes all lines, and each bad one counts.
    """
    silent: Callable[[str], None] = lambda _: None
    try:
        return [], open_data(config, silent), True
    except (UserError, OSError) as error:
        first = _failed("data.read", error)
    folder = scratch.enter_context(scratch_near(Path(config.paths.cache_path)))
    tolerant = with_values(config, max_bad_lines=ALL_LINES, cache_path=str(folder))
    try:
        return [first], open_data(tolerant, silent), False
    except (UserError, OSError) as error:
        second = _failed("data.read", error)
        return [first] if second == first else [first, second], None, False


def _failed(check: str, error: UserError | OSError) -> Finding:
    """A finding of an error's lines; the last of several is the remedy."""
    named = isinstance(error, OSError) and error.filename
    rows = [row.strip() for row in (f"{error.filename}: {error.strerror}" if named else str(error)).splitlines()]
    remedy = "make it a file that can be read" if named else "mend it, or get it again from its source"
    return Finding(FAIL, check, " ".join(rows[:-1] or rows), rows[-1] if len(rows) > 1 else remedy)


def verdict(findings: list[Finding]) -> str:
    """The last line: how many of each level."""
    counts = Counter(finding.level for finding in findings)
    return "doctor: " + ", ".join(f"{counts[level]} {level}" for level in LEVELS)


def lines(findings: list[Finding]) -> Iterator[str]:
    """A line a finding, and the verdict."""
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        yield f"{finding.level}  {finding.check:<{width}}  {finding.text}" + (f" -> {finding.remedy}" if finding.remedy else "")
    yield verdict(findings)


def as_json(findings: list[Finding]) -> str:
    """{"status": the worst level, "counts": {level: n}, "findings": [{level, check, text, remedy}]}."""
    counts = Counter(finding.level for finding in findings)
    worst = next((level for level in reversed(LEVELS) if counts[level]), LEVELS[0])
    tree = {"status": worst, "counts": {level: counts[level] for level in LEVELS}, "findings": [f._asdict() for f in findings]}
    return json.dumps(tree, indent=1, ensure_ascii=False)
