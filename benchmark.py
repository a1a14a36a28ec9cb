"""Entry script: ours against the organisers' baseline (reference.py) and faiss, in child processes that take turns.

    python benchmark.py [--users N --items M --features {scaled,full} --hnsw --json FILE]

Both sides run configs/baseline.yaml on the same synthetic data, made on first use and kept. Must not measure: benchmark_parts.py leads
the children through their turns, benchmark_child.py is what they do.
"""

from __future__ import annotations

import argparse
import difflib
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from atomic import temporary_folder
from benchmark_parts import PARTS, QUICK, Benchmark, Sizes
from errors import ArgumentParser, UserError, run_cli

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "baseline.yaml"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags of `arguments`, or of the command line."""
    parser = ArgumentParser(description="Ours against the organisers' baseline and faiss.")
    sizes = Sizes()
    add = parser.add_argument
    add("--users", type=int, help=f"users of the synthetic data; {sizes.users:,} where not given")
    add("--items", type=int, help=f"items of the synthetic data; {sizes.items:,} where not given")
    add("--features", choices=("scaled", "full"), default="scaled", help="tables of the data's sizes, or TencentGR-1M's (%(default)s)")
    add("--hnsw", action="store_true", help="also faiss's HNSW at the baseline's settings (its build takes a quarter of an hour or more)")
    add("--json", metavar="FILE", help="write the flat results there")
    add("--parts", default=",".join(PARTS), help="what to measure, with commas between (%(default)s)")
    add("--config", metavar="FILE", default=str(DEFAULT_CONFIG), help="settings of both sides (%(default)s)")
    for name in ("hidden_units", "num_blocks", "num_heads"):
        add(f"--{name}", type=int, help=f"in place of the config's {name}, on both sides")
    add("--rounds", type=int, help=f"turns of each side; {sizes.rounds} where not given")
    add("--steps", type=int, help=f"our steps a turn, of which the reference makes a sixth; {sizes.steps} where not given")
    add("--workers", type=int, nargs="+", default=[0, 1, 2], help="reference's loader workers to try; the fastest is taken (%(default)s)")
    add("--widths", type=int, nargs="+", help=f"widths of retrieval; {' '.join(map(str, sizes.widths))} where not given")
    add("--candidates", type=int, help=f"candidates of retrieval; {sizes.candidates:,} where not given")
    add("--data", metavar="FOLDER", help="data in layout A (JSONL) in place of the synthetic")
    add("--parquet", metavar="FOLDER", help="the part compile also compiles this folder, in layout B")
    add("--cache", metavar="FOLDER", default="cache/benchmark", help="where synthetic data and stores are kept (%(default)s)")
    add("--compile", action="store_true", help="our side with training.compile")
    add("--quick", action="store_true", help="tiny sizes: shows that everything runs, measures nothing")
    add("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(arguments)


def check(flags: argparse.Namespace) -> Sizes:
    """The sizes that the flags ask for; UserError for a flag that cannot be right. flags.parts becomes a list."""
    flags.parts = [part.strip() for part in flags.parts.split(",") if part.strip()]
    for part in flags.parts:
        if part not in PARTS:
            close = difflib.get_close_matches(part, PARTS, n=1)
            raise UserError(f"--parts: {part!r}; expected some of {', '.join(PARTS)}{f' (did you mean {close[0]}?)' if close else ''}.")
    if not flags.parts:
        raise UserError(f"--parts: empty; expected some of {', '.join(PARTS)}.")
    numbers = ("users", "items", "rounds", "steps", "candidates", "hidden_units", "num_blocks", "num_heads")
    for name, least in (*((name, 1) for name in numbers), ("widths", 1), ("workers", 0)):
        given = getattr(flags, name)
        for value in given if isinstance(given, list) else [least if given is None else given]:
            if value < least:
                raise UserError(f"--{name}: {value}; expected {least} or more.")
    for flag, needed in (("data", "seq.jsonl"), ("parquet", "seq")):
        given = getattr(flags, flag)
        if given and not (Path(given) / needed).exists():
            raise UserError(f"--{flag} {given}: no {needed} there. Give a folder that synthetic.py made, or TencentGR's own.")
    if not Path(flags.config).is_file():
        raise UserError(f"--config {flags.config}: no such file.")
    if flags.json and not Path(flags.json).resolve().parent.is_dir():
        raise UserError(f"--json {flags.json}: its folder does not exist.")
    names = ("users", "items", "rounds", "steps", "candidates", "widths")
    given = {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
    return (QUICK if flags.quick else Sizes())._replace(**given)


# ---- what is printed ----------------------------------------------------------------------------------------------------


def rows_of(found: dict) -> list[tuple[str, str, str, str, str]]:
    """The table: (ratio, what, ours, the other side's, smallest and largest ratio of a round); a part without figures has no row."""
    rows = []

    def row(what: str, ours: str, ours_unit: str, theirs: str = "", *, ratio: str = "", scale: float = 1.0) -> None:
        if found.get(ours) is None:
            return
        values = [f"{figure(found[key] * scale)} {ours_unit}" if key and found.get(key) is not None else "" for key in (ours, theirs)]
        times, low, high = (found.get(f"{ratio}{end}") if ratio else None for end in (".ratio", ".ratio_min", ".ratio_max"))
        spread = f"{figure(low)} .. {figure(high)}" if low is not None else ""
        rows.append((f"{figure(times)}x" if times is not None else "", what, *values, spread))

    row("training, whole steps", "train.users_per_s", "users/s", "train.reference_users_per_s", ratio="train")
    row("  a step", "train.step_s", "ms", "reference.step_s", scale=1e3)
    for name in ("data", "lookup", "forward", "backward", "update"):
        row(f"    {name}", f"train.{name}_s", "ms", f"reference.{name}_s", scale=1e3)
    row("    data and logs, share of the time", "train.data_wait", "%", scale=100)
    row("batches alone", "batches.per_s", "a second", "batches.reference_per_s", ratio="batches")
    row("memory, training and saving: peak RssAnon", "memory.peak_mib", "MiB", "memory.reference_peak_mib", ratio="memory")
    row("  VmHWM, mapped files counted", "memory.hwm_mib", "MiB", "memory.reference_hwm_mib")
    for what in ("save", "load"):
        row(f"checkpoint: {what}", f"checkpoint.{what}_s", "s", f"checkpoint.reference_{what}_s", ratio=f"checkpoint.{what}")
    row("  size", "checkpoint.mb", "MB", "checkpoint.reference_mb")
    row("start: warm store to first batch", "start.seconds", "s", "reference.start_s")
    row("  peak RssAnon, imports included", "start.peak_anon_mib", "MiB")
    for part, name in (("compile", "JSONL"), ("compile_parquet", "parquet")):
        row(f"compile {name}", f"{part}.mb_per_s", "MB/s")
        row("  events", f"{part}.rows_per_s", "a second")
        row("  seconds", f"{part}.seconds", "s")
        row("  seconds for the embeddings besides", f"{part}.embedding_seconds", "s")
        row("  peak RssAnon, all processes", f"{part}.peak_anon_mib", "MiB")
        row("  VmHWM, all processes", f"{part}.peak_hwm_mib", "MiB")
    for width in sorted(int(key.split(".")[1]) for key in found if key.startswith("retrieval.") and key.endswith(".prepare_s")
                        and key.count(".") == 2):  # fmt: skip
        of = f"retrieval.{width}"
        row(
            f"exact top 10 of {found['retrieval.candidates']:,} x {width}",
            f"{of}.users_per_s",
            "users/s",
            f"{of}.faiss_users_per_s",
            ratio=of,
        )
        row("  with nothing removed", f"{of}.plain_users_per_s", "users/s")
    row("  HNSW (build apart)", "retrieval.users_per_s" if "hnsw.build_s" in found else "", "users/s", "hnsw.users_per_s")
    row(f"loss: full softmax of {found.get('loss.items', 0):,} items / 1,024 sampled, a step", "loss.full_step_s", "ms",
        "loss.sampled_step_s", ratio="loss", scale=1e3)  # fmt: skip
    row("  more memory", "loss.more_mib", "MiB")
    return rows


def figure(value: float) -> str:
    """A number with three digits that count, or all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def differences(run: Benchmark) -> list[str]:
    """What is not alike on both sides, in words."""
    lines, found = [], run.results
    if run.settings:
        model, training, data = (run.settings[group] for group in ("model", "training", "data"))
        dropout, workers = model["attention_dropout"] or "off (it would leave the flash kernel)", found.get("reference.num_workers")
        lines.append(f"attention dropout: ours {dropout}, the reference's {model['dropout_rate']}.")
        lines.append(f"initial weights: ours of std {model['init_std']:g} in tables, dense layers by their inputs; the reference's Xavier.")
        lines.append(
            f"state of the table: ours {training['table_optimizer']} on the rows that a step touches;\n"
            "  the reference's dense Adam updates every row of every table in each step."
        )
        lines.append(
            f"batches: ours {'of users of like length' if data['length_buckets'] else 'drawn at random'}, made ahead by "
            f"{data['num_workers']} thread(s), features as table rows;\n  the reference's drawn at random, features as dictionaries, which "
            "become tensors in its forward pass (not in 'batches alone');\n"
            f"  {workers} loader worker(s), the fastest of {run.flags.workers}."
        )
        lines.append(f"users: ours trains on {found['train.samples']:,} (the others are held out), the reference on all.")
        if run.flags.features == "full":
            lines.append("tables have TencentGR-1M's sizes on both sides; the data, and so the rows that a step touches, stay as they are.")
    if found.get("checkpoint.save_s") is not None:
        lines.append(
            "checkpoint: ours is hashed and on the disk (fsync) when the clock stops; the reference's torch.save leaves it to the system."
        )
    if found.get("memory.peak_mib") is not None:
        lines.append("memory: from the start on; the reference's loader workers are not counted (they share pages with it).")
    if found.get("start.seconds") is not None:
        lines.append(
            "start: no imports on either side; ours without the model, its store in the page cache; the reference's with its model."
        )
    if found.get("compile.seconds") is not None:
        lines.append("compile: the raw files were read before (page cache); MB are those of all raw files but the embeddings.")
    if found.get("retrieval.users_per_s") is not None:
        lines.append("retrieval: ours removes 100 seen items of each query, faiss removes none;\n  ids of both, with nothing "
                     + "removed and with every second item: "
                     + ", ".join(f"width {w}: {found[f'retrieval.{w}.wrong']} wrong of {found[f'retrieval.{w}.checked']:,} places"
                                 for w in run.sizes.widths if f"retrieval.{w}.wrong" in found) + ".")  # fmt: skip
    if "hnsw.build_s" in found:
        lines.append(f"HNSW: build {found['hnsw.build_s']:,.0f} s, recall@10 {found['hnsw.recall@10']:.3f}; ours is exact.")
    return lines + run.notes


def report(run: Benchmark) -> str:
    """The table, the machine, and what differs."""
    found, header = run.results, ("ratio", "what", "ours", "reference / faiss", "rounds from .. to")
    table = [header, *rows_of(found)]
    widths = [max(len(cells[column]) for cells in table) for column in range(len(header))]
    aligned = ["  ".join(cell.ljust(width) if column == 1 else cell.rjust(width) for column, (cell, width) in enumerate(zip(cells, widths)))
               for cells in table]  # fmt: skip
    shape = f"{found['users']:,} users x {found['items']:,} items" if run.flags.data is None else run.flags.data
    if "reference.rows" in found:
        model = run.settings["model"]
        shape += (f", hidden {model['hidden_units']}, {model['num_blocks']} block(s), {model['num_heads']} head(s), batch "
                  f"{run.settings['training']['batch_size']}, {found['table.rows']:,} rows of tables (the reference's "
                  f"{found['reference.rows']:,})")  # fmt: skip
    machine = f"machine: {found['machine.cpu']}, {found['machine.cpus']} cores, torch {found['machine.torch']}"
    machine += f" with {found['machine.threads']} threads, commit {found['machine.commit'] or 'unknown'}"
    lines = [machine, f"setting: {shape}; {run.flags.config}", ""]
    lines += [aligned[0].rstrip(), "-" * len(aligned[0]), *(line.rstrip() for line in aligned[1:]), ""]
    return "\n".join(lines + [f"- {line}" for line in differences(run)])


def main(flags: argparse.Namespace) -> None:
    """Measure what the flags ask for, print it, and write the JSON."""
    sizes = check(flags)
    cache = Path(flags.cache).resolve()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--cache {cache}: cannot be made: {error.strerror}. Give a writable folder.") from None
    signal.signal(signal.SIGTERM, _terminated)
    # Checkpoints of gigabytes go there, so not into /tmp, which may be memory.
    with temporary_folder(cache / "work") as work:
        run = Benchmark(flags, sizes, work)
        try:
            run.run()
        finally:  # a part that fails late must not lose what the others found
            if run.done:
                print(report(run), flush=True)


def _terminated(number: int, _frame: FrameType | None) -> None:
    """SIGTERM unwinds as Ctrl-C does, so that children end and folders go."""
    raise SystemExit(128 + number)


def _child(order: str) -> int:
    from benchmark_child import run_child  # torch and everything: not for --help

    return run_child(json.loads(order))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(run_cli(lambda: _child(sys.argv[2])))
    sys.exit(run_cli(lambda: main(parse(None)), debug="--debug" in sys.argv))
