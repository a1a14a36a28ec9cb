"""report.py for a run of 100,000 test users and a log of 100,000 lines: under 30 s, 1 GiB and 3 MB. Marked long."""

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from report_world import records, write_run
from tiny import tiny_store

NUM_USERS, STEPS = 100_000, 1_000_000


@pytest.mark.long
def test_a_hundred_thousand_users(tmp_path):
    store = tiny_store(num_users=NUM_USERS, num_items=2000, min_events=3, max_events=20)
    for seed, name in enumerate(("earlier", "run")):
        write_run(tmp_path / name, seed=seed, store=store)
        lines = "".join(json.dumps(record) + "\n" for record in records(STEPS))
        (tmp_path / name / "train.log").write_text(lines, encoding="utf-8")
    kept = sum((tmp_path / "run" / name).stat().st_size for name in ("report.json", "ranks.npz"))
    # The child asks the kernel itself: what wait4 says of it begins with the size of this process.
    code = "import sys; sys.path.insert(0, sys.argv[1]); import report, logger; report.main(sys.argv[2:]); print(logger.peak_rss_gib())"
    started = time.monotonic()
    command = [sys.executable, "-c", code, str(ROOT), str(tmp_path / "run")]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True)
    seconds, gib = time.monotonic() - started, float(done.stdout.split()[-1])
    size = (tmp_path / "run/report.html").stat().st_size
    print(f"{NUM_USERS:,} users, {STEPS // 10:,} log lines, two runs: {seconds:.1f} s, {gib:.2f} GiB, report.html {size / 1e6:.2f} MB, "
          f"report.json and ranks.npz {kept / 1e6:.2f} MB")  # fmt: skip
    assert seconds < 30 and gib < 1 and size < 3e6 and kept < 2e6
