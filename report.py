"""Writes report.html of a run from its folder alone, lists runs, and removes those that are neither best nor last.

python report.py RUN [RUN ...]          write RUN/report.html; of several, each beside the others
python report.py --list [LOGS ...]      the runs in ./logs (or LOGS): metric, duration, size, state
python report.py --prune [LOGS ...]     what could go: neither the best of its data, nor the newest, nor unfinished
python report.py --prune --yes          remove it: run folder, checkpoints, TensorBoard events

Must not train, evaluate or read data; what a run folder lacks becomes a word in the report, never an error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from atomic import write_text_atomic
from errors import ArgumentParser, UserError, run_cli
from logger import format_table
from report_compare import compare_section
from report_html import Html, note, page, section, size_text
from report_read import Run, best_earlier, read_run
from report_sections import (
    commands_section,
    curves_section,
    data_section,
    environment_section,
    quality_section,
    settings_section,
    summary_section,
)
from report_users import users_section
from run_list import find_runs, is_run, list_rows, plan_removal, remove_run

LOGS = Path("logs")


def write_report(run_dir: Path, others: Sequence[Path] = ()) -> Path:
    """Write run_dir/report.html from the files of the run folder and return its path. RunError when the disk is full.

    others: run folders to stand beside it. Without them the best earlier run of the folder beside it is named and its settings compared.
    """
    path = Path(run_dir) / "report.html"
    write_text_atomic(path, render(read_run(run_dir), [read_run(other) for other in others]))
    return path


def render(run: Run, others: Sequence[Run] = ()) -> str:
    """The whole page."""
    earlier = best_earlier(run)
    compared = others[0] if others else earlier
    beside = list(others) or ([earlier] if earlier is not None else [])
    sections = [
        ("Summary", summary_section(run, earlier)),
        *([("Runs side by side", compare_section(run, beside))] if beside else []),
        ("Learning curves", curves_section(run)),
        ("Quality by slice", _from_report(run, "quality", "Quality by slice", quality_section)),
        ("Sample users", _from_report(run, "samples", "Sample users", users_section)),
        ("Data", _from_report(run, "data", "Data", data_section)),
        ("Configuration", settings_section(run, compared)),
        ("Environment", environment_section(run)),
        ("Commands", commands_section(run)),
    ]
    what = "Evaluation of a checkpoint" if run.status.get("kind") == "eval" else "Training run"
    when = run.status.get("time") or datetime.now().astimezone().isoformat(timespec="seconds")
    return page(run.name, what, str(when), sections)


def _from_report(run: Run, part: str, title: str, draw: Callable[[Run], Html]) -> Html:
    """A section from a part of report.json, or the word that the part is not one of ours."""
    if part in run.faults:
        return section(title, note(f"report.json is not what this version writes ({run.faults[part]}); nothing is shown."))
    return draw(run)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders; with --list and --prune folders of runs, too")
    parser.add_argument("--list", action="store_true", help="list runs")
    parser.add_argument("--prune", action="store_true", help="show, or with --yes remove, what is neither best nor last")
    parser.add_argument("--yes", action="store_true", help="with --prune: remove")
    parser.add_argument("--debug", action="store_true", help="tracebacks of mistakes, too")
    options = parser.parse_args(arguments)
    if options.yes and not options.prune:
        raise UserError("--yes confirms --prune; it does nothing without it.")
    if options.list and options.prune:
        raise UserError("--list and --prune: --prune shows what it would remove, --list all runs. Give one of them.")
    if options.list or options.prune:
        return housekeeping(options.runs or [LOGS], prune=options.prune, confirmed=options.yes)
    if not options.runs:
        raise UserError("no run folder given; expected python report.py RUN [RUN ...]. Runs lie in ./logs, or where log_path pointed.")
    for folder in options.runs:
        if not is_run(folder):
            raise UserError(f"{folder}: no run folder; expected status.json, train.log or metrics.json in it.\n"
                            "Runs lie in ./logs, or where log_path pointed.")  # fmt: skip
    given = [folder.resolve() for folder in options.runs]
    if again := [str(folder) for n, folder in enumerate(options.runs) if given[n] in given[:n]]:
        raise UserError(f"{', '.join(again)}: given twice; a run beside itself says nothing. Give each run once.")
    for n, folder in enumerate(options.runs):
        print(f"written: {write_report(folder, [*options.runs[:n], *options.runs[n + 1 :]])}")
    return 0


def housekeeping(folders: Sequence[Path], *, prune: bool, confirmed: bool) -> int:
    """--list and --prune. Removes only with `confirmed`, and only what is shown."""
    runs = find_runs(folders)
    if not prune:
        print("\n".join(format_table(*list_rows(runs))))
        return 0
    kept, removed = plan_removal(runs)
    for run, why in kept:
        print(f"keep    {run.folder}: {why}")
    gone = [run for run in removed if confirmed and remove_run(run, [one for one, _ in kept])]
    for run in removed:
        print(f"{'removed' if run in gone else 'in use ' if confirmed else 'remove '} {run.folder}: {run.words()}")
    if not removed:
        print("nothing to remove")
    elif confirmed:
        print(f"{len(gone)} of {len(removed)} runs removed, {size_text(sum(run.num_bytes for run in gone))} freed")
    else:
        print(f"{len(removed)} runs, {size_text(sum(run.num_bytes for run in removed))}; nothing was removed. To remove them: add --yes")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main, debug="--debug" in sys.argv))
