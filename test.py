"""Runs the test suites through pytest; ends with pytest's own count and exit status. Holds no test itself.

python test.py                        everything but what takes minutes
python test.py --suite long           what takes minutes
python test.py --suite reliability    kills, crashes, full disks, hostile files: docs/RELIABILITY.md
python test.py -k resume -x           pytest's own options
python test.py -n 0 --pdb             in this process, not on all cores
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from config import KEYS
from errors import ArgumentParser, run_cli

ROOT = Path(__file__).resolve().parent
# name -> (what it runs, pytest options). A new suite is a line here and a marker in pytest.ini.
SUITES = {
    "default": ("everything not marked long, and the fast part of reliability", ["-m", "not long and (fast or not reliability)"]),
    "long": ("tests marked long", ["-m", "long"]),
    "reliability": ("tests marked reliability", ["-m", "reliability"]),
    "all": ("everything", []),
}
NEEDED = {"pytest": "pytest", "hypothesis": "hypothesis", "xdist": "pytest-xdist"}  # module -> package
# Processes that share the tests. Most of a test's time is one core's, and each process takes up to 2 GiB.
MAX_PROCESSES = 8
# Variables of the platform, and of settings: a test that wants one sets it itself.
PLATFORM = ("RUNTIME_SCRIPT_DIR", "MODEL_OUTPUT_PATH", "EVAL_DATA_PATH", "EVAL_RESULT_PATH", "EVAL_INFER_PATH")


def environment(environ: dict[str, str]) -> dict[str, str]:
    """The environment tests run in: no settings from outside, one thread a process, no network by accident."""
    kept = {name: value for name, value in environ.items() if name not in PLATFORM and name not in {key.env for key in KEYS.values()}}
    # Port 9 (discard) refuses at once: a forgotten download fails instead of hanging.
    offline = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    threads = {"OMP_NUM_THREADS": environ.get("OMP_NUM_THREADS") or "1"}  # the processes share the cores; a test of threads sets them
    return kept | offline | threads | {"PYTHONUNBUFFERED": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0], epilog="Other options go to pytest.")
    suites = "; ".join(f"{name}: {what}" for name, (what, _) in SUITES.items())
    parser.add_argument("--suite", choices=SUITES, default="default", metavar="NAME", help=f"{suites} (default: %(default)s)")
    options, rest = parser.parse_known_args()
    missing = [package for name, package in NEEDED.items() if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: {', '.join(missing)} not installed in {sys.prefix}.\n"
              f"Install with: {sys.executable} -m pip install -r requirements.txt", file=sys.stderr)  # fmt: skip
        return 1
    what, chosen = SUITES[options.suite]
    files = len(list((ROOT / "tests").glob("test_*.py")))
    versions = f"Python {sys.version.split()[0]}, pytest {version('pytest')}"
    print(f"suite {options.suite}: {what}, of {files} files in tests/ ({versions})", flush=True)
    processes = ["-n", str(min(MAX_PROCESSES, len(os.sched_getaffinity(0)))), "--dist", "worksteal"]
    command = [sys.executable, "-m", "pytest", "-q", "-ra", *processes, *chosen, *rest]
    return subprocess.call(command, cwd=ROOT, env=environment(dict(os.environ)))


if __name__ == "__main__":
    sys.exit(run_cli(main))
