"""The shape of the repository: direction of imports, roles, sizes, and calls that no module may contain."""

import ast
import importlib.util
import re
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs"))
from generate_api import CHAIN, ENTRY
from unsafe_loads import unsafe_loads

SOURCES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), path.name) for name, path in SOURCES.items()}
# Imported inside a function, only where data must be made.
LAZY = {("main", "synthetic"), ("simple_test", "synthetic"), ("simple_demo", "synthetic"), ("benchmark", "synthetic")}
MODULE_LINES, FUNCTION_LINES = 600, 100
ALLOWED = {"plain_pickle": ("pickle.Unpickler",)}  # the one module that may define a (restricted) unpickler


def imports(tree: ast.AST) -> set[str]:
    """Top-level modules of the repository that a tree imports, functions' own imports included."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found & SOURCES.keys()


def at_load(tree: ast.Module) -> set[str]:
    """What a module imports when it is loaded."""
    return imports(ast.Module([node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))], []))


def functions(tree: ast.AST):
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def faults(source: str, name: str) -> list[str]:
    """Swallowed exceptions and unsafe loads, as `line: what`."""
    found, lines = [], source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            idle = all(isinstance(s, ast.Pass) or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)) for s in node.body)
            if idle and (broad or "#" not in lines[node.body[0].lineno - 1]):
                found.append(f"{node.lineno}: an exception is swallowed; where that is right, name its type and say why in a comment")
            elif node.type is None:
                found.append(f"{node.lineno}: except without a type")
        elif isinstance(node, ast.Call):
            if {k.arg: ast.unparse(k.value) for k in node.keywords}.get("shell", "False") != "False":
                found.append(f"{node.lineno}: {ast.unparse(node.func)}() through a shell")
    return found + unsafe_loads(source, ALLOWED.get(name, ()))


@pytest.mark.parametrize("name", SOURCES)
def test_module_has_its_place_in_the_chain(name):
    assert name in [*CHAIN, *ENTRY], f"{name}.py: give it its place in CHAIN or ENTRY of docs/generate_api.py"
    assert not re.fullmatch(r"utils?|helpers?|common|misc", name), f"{name}.py: name the role instead"


def test_chain_lists_each_module_once():
    names = [*CHAIN, *ENTRY]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", [name for name in CHAIN if name in SOURCES])
def test_imports_point_one_way(name):
    later = imports(TREES[name]) - set(CHAIN[: CHAIN.index(name)])
    assert not later, f"{name}.py imports {', '.join(sorted(later))}, which come after it in the chain (docs/generate_api.py)"


@pytest.mark.parametrize("name", [name for name in ENTRY if name in SOURCES])
def test_nothing_imports_an_entry_script(name):
    scripts = imports(TREES[name]) & set(ENTRY)
    assert all((name, script) in LAZY for script in scripts), f"{name}.py imports the entry script {', '.join(sorted(scripts))}"
    assert not at_load(TREES[name]) & set(ENTRY), f"{name}.py imports an entry script before it is needed"


@pytest.mark.parametrize("name", SOURCES)
def test_module_names_its_role(name):
    docstring = ast.get_docstring(TREES[name])
    assert docstring, f"{name}.py: no docstring; its first line says the module's role"
    first = docstring.splitlines()[0]
    good = 20 <= len(first) <= 140 and first.endswith((".", ";", ":"))
    assert good, f"{name}.py: the first line is to be one sentence on its role: {first!r}"


@pytest.mark.parametrize("name", SOURCES)
def test_sizes(name):
    lines = SOURCES[name].read_text(encoding="utf-8").splitlines()
    assert len(lines) < MODULE_LINES, f"{name}.py: {len(lines)} lines"
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions(TREES[name]) if f.end_lineno - f.lineno + 1 >= FUNCTION_LINES}
    assert not long, f"{name}.py: functions of {FUNCTION_LINES} lines or more: {long}"


@pytest.mark.parametrize("name", SOURCES)
def test_no_swallowed_exception_and_no_unsafe_load(name):
    assert faults(SOURCES[name].read_text(encoding="utf-8"), name) == []


@pytest.mark.parametrize("folder", ["docs", "experiments", "tests"])
def test_nothing_imported_lies_in_folders(folder):
    names = {path.stem for path in (ROOT / folder).glob("*.py")}
    for name, tree in TREES.items():
        words = {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        assert not words & names - SOURCES.keys(), f"{name}.py imports from {folder}/"


@pytest.mark.parametrize(("source", "count"), [
    ("try:\n    f()\nexcept OSError:\n    pass\n", 1), ("try:\n    f()\nexcept:\n    g()\n", 1), ("import pickle\npickle.load(f)\n", 1),
    ("try:\n    f()\nexcept KeyError:\n    pass  # why\n", 0), ("try:\n    f()\nexcept Exception:\n    pass  # why\n", 1),
    ("import pickle\npickle.dump(x, f)\n", 0), ("from pickle import loads\n", 1), ("pickle.Unpickler(f)\n", 1), ("yaml.load(f)\n", 1),
    ("np.load(f, allow_pickle=True)\n", 1), ("torch.load(f, weights_only=False)\n", 1), ("torch.load(f)\n", 1),
    ("torch.load(f, weights_only=True)\n", 0), ("yaml.safe_load(f)\n", 0), ("np.load(f, allow_pickle=False)\n", 0),
    ("subprocess.run(c, shell=True)\n", 1), ("try:\n    f()\nexcept OSError:\n    return_none()\n", 0),
])  # fmt: skip
def test_faults_are_found(source, count):
    assert len(faults(source, "any")) == count


def test_lazy_and_loaded_imports_are_told_apart():
    tree = ast.parse("import errors\ndef f():\n    from synthetic import generate\n    from config import Config\n")
    assert at_load(tree) == {"errors"}
    assert imports(tree) >= {"errors", "config"}


# ---- test.py, simple_test.py, .ci/run -----------------------------------------------------------------------------------


def load(name: str):
    """A script as a module under another name: `import test` could find Python's own package."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("packaging", [True, False])
@pytest.mark.parametrize(("version", "specifiers", "expected"), [
    ("2.13.0+cpu", ">=2.10,<2.14", True), ("2.9.1", ">=2.10,<2.14", False), ("2.14", ">=2.10,<2.14", False), ("2.14.0", "<=2.14", True),
    ("3.0", "", True), ("1.26.4", ">=1.26,<3", True), ("6.0.3", "~=6.0", True), ("7.0", "~=6.0", False),
    ("6.0", "==6.0.0", True), ("6.1", "!=6.1", False),
])  # fmt: skip
def test_version_specifiers(monkeypatch, packaging, version, specifiers, expected):
    if not packaging:
        monkeypatch.setitem(sys.modules, "packaging.specifiers", None)
    assert load("simple_test").satisfies(version, specifiers) is expected


def test_requirements_are_read_and_a_missing_one_is_named():
    simple_test = load("simple_test")
    names = dict(simple_test.requirements())
    assert names["torch"].startswith(">=") and {"numpy", "pyyaml", "tensorboard", "pytest", "hypothesis", "pytest-xdist"} <= names.keys()
    with pytest.raises(AssertionError, match="not installed; pip install -r requirements.txt"):
        simple_test.check_requirement("no-such-package-here", ">=1")
    with pytest.raises(AssertionError, match="found .*; pip install"):
        simple_test.check_requirement("pytest", ">=999")


def test_files_of_a_map():
    rows = "| file | role |\n|---|---|\n| `main.py`, `run.sh` | makes `other.py` |\n| `tests/` | `x.y` |\n| `word` | |\n"
    readme = f"# A\n| `no.py` | x |\n## File map\n{rows}## B\n| `c.py` | |\n"
    assert load("simple_test").mapped_files(readme) == ["main.py", "run.sh", "tests/"]
    assert load("simple_test").mapped_files("# A\n| `no.py` | x |\n") == []


def test_a_failed_check_is_one_line_and_hides_none(capsys):
    checks = load("simple_test").Checks()
    results = [checks.run("a", lambda: "fine"), checks.run("b", lambda: {}["x\ny"]), checks.run("c", lambda: None)]
    assert results == ["fine", None, None]
    assert capsys.readouterr().out == "ok   a: fine\nFAIL b: KeyError: 'x\\ny'\nok   c\n"
    assert (checks.passed, checks.failed) == (2, 1)


def test_suite_environment_is_neutral_and_offline():
    given = {"BATCH_SIZE": "4", "TRAIN_DATA_PATH": "/x", "MODEL_OUTPUT_PATH": "/y", "PATH": "/bin", "OMP_NUM_THREADS": "1"}
    made = load("test").environment(given)
    assert not {"BATCH_SIZE", "TRAIN_DATA_PATH", "MODEL_OUTPUT_PATH"} & made.keys()
    assert made["PATH"] == "/bin" and made["OMP_NUM_THREADS"] == "1" and made["https_proxy"].startswith("http://127.0.0.1")
    assert load("test").environment({})["OMP_NUM_THREADS"] == "1"


def test_suites_pick_tests_and_hand_on_the_status(monkeypatch, capsys):
    script, calls = load("test"), []
    monkeypatch.setattr(script.subprocess, "call", lambda command, **options: calls.append(command) or 5)
    for arguments, chosen in ((["-k", "x"], "not long and (fast or not reliability)"), (["--suite", "long"], "long")):
        monkeypatch.setattr(sys, "argv", ["test.py", *arguments])
        assert script.main() == 5
        assert calls[-1][1:5] == ["-m", "pytest", "-q", "-ra"] and calls[-1][calls[-1].index("--dist") + 2 :][:2] == ["-m", chosen]
        assert 1 <= int(calls[-1][calls[-1].index("-n") + 1]) <= 8
    assert calls[0][-2:] == ["-k", "x"] and "suite long: tests marked long" in capsys.readouterr().out


def test_missing_pytest_is_said_with_the_remedy(monkeypatch, capsys):
    script = load("test")
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["test.py"])
    assert script.main() == 1
    message = capsys.readouterr().err
    assert "pytest, hypothesis, pytest-xdist not installed" in message and "-m pip install -r requirements.txt" in message


def test_ci_script_is_bash_and_runs_the_documented_command():
    path = ROOT / ".ci" / "run"
    assert path.stat().st_mode & 0o111, ".ci/run is not executable"
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    text = path.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text and "pip install -q -r requirements.txt" in text and text.rstrip().endswith("python test.py")


def test_lines_are_140_columns_at_most() -> None:
    files = [path for folder in ("", "tests", "converters", "docs", "experiments") for path in (ROOT / folder).glob("*.py")]
    wide = [
        f"{path.name}:{n}" for path in files for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if len(line) > 140
    ]
    assert wide == []
