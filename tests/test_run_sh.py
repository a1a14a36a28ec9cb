"""run.sh: the variables it sets, and that flags and exit status pass through."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUN_SH = Path(__file__).resolve().parents[1] / "run.sh"
VARIABLES = {
    "PYTHONUNBUFFERED": "1",
    "MALLOC_ARENA_MAX": "2",
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
STUB = """
import json, os, sys
print(json.dumps({"argv": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ), "unbuffered": sys.stdout.write_through}))
sys.exit(int(os.environ.get("STUB_STATUS", "0")))
"""


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    folder = tmp_path / "a folder with spaces"
    folder.mkdir()
    shutil.copy(RUN_SH, folder)
    (folder / "main.py").write_text(STUB)
    return folder


def run(command: list, cwd: Path, **variables: str) -> tuple[int, dict]:
    base = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | variables
    done = subprocess.run([shutil.which("bash"), *map(str, command)], cwd=cwd, env=base, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def test_sets_each_variable_where_it_is_unset(scripts: Path) -> None:
    status, seen = run(["run.sh"], scripts)
    assert status == 0 and seen["argv"] == [] and seen["unbuffered"]
    assert {name: seen["env"][name] for name in VARIABLES} == VARIABLES
    assert int(seen["env"]["OMP_NUM_THREADS"]) == len(os.sched_getaffinity(0))


def test_leaves_variables_that_are_set(scripts: Path) -> None:
    own = {name: f"own-{place}" for place, name in enumerate([*VARIABLES, "OMP_NUM_THREADS"])}
    _, seen = run(["run.sh"], scripts, **own)
    assert {name: seen["env"][name] for name in own} == own


def test_exports_nothing_else(scripts: Path) -> None:
    _, seen = run(["run.sh"], scripts)
    # bash itself adds PWD, SHLVL and _; Python may add its locale.
    assert set(seen["env"]) - {"PATH", "PWD", "OLDPWD", "SHLVL", "_", "LC_CTYPE"} == {*VARIABLES, "OMP_NUM_THREADS"}


def test_passes_flags_and_exit_status(scripts: Path) -> None:
    flags = ["--batch_size", "64", "--run_name", "two words", "--data_path", "", "--note=*"]
    status, seen = run(["run.sh", *flags], scripts, STUB_STATUS="2")
    assert status == 2 and seen["argv"] == flags
    assert run(["run.sh"], scripts, STUB_STATUS="130")[0] == 130


def test_works_from_another_directory(scripts: Path, tmp_path: Path) -> None:
    _, seen = run([scripts / "run.sh"], tmp_path)
    assert Path(seen["cwd"]) == scripts.resolve()


def test_the_platform_names_the_folder(scripts: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(scripts / "run.sh", elsewhere)
    _, seen = run([elsewhere / "run.sh"], tmp_path, RUNTIME_SCRIPT_DIR=str(scripts))
    assert Path(seen["cwd"]) == scripts.resolve()


def test_a_missing_folder_is_a_mistake(scripts: Path) -> None:
    environ = os.environ | {"RUNTIME_SCRIPT_DIR": "/nowhere"}
    done = subprocess.run(["bash", "run.sh"], cwd=scripts, env=environ, capture_output=True, check=False)
    assert done.returncode == 2 and b"/nowhere" in done.stderr and done.stdout == b""


def test_interpreter_of_choice_and_python3_alone(scripts: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python3").symlink_to(sys.executable)
    for tool in ("dirname", "nproc"):
        (tools / tool).symlink_to(shutil.which(tool))
    assert run(["run.sh"], scripts, PATH=str(tools))[0] == 0
    (tools / "python3").unlink()
    assert run(["run.sh"], scripts, PATH=str(tools), PYTHON=sys.executable)[0] == 0
