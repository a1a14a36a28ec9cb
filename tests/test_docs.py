"""The documents keep what they promise: API.md is what the docstrings say, and every command of README.md and USAGE.md works.

A document's commands run in order, block by block, in one copy of the repository, so a block finds what those before it made.
Where a command trains, `--max_steps 2 --max_eval_users 100` is added. To see one document's: python test.py tests/test_docs.py -k USAGE
"""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from conftest import PUBLIC_DATA, ROOT

from errors import UserError
from settings import load_config

sys.path.insert(0, str(ROOT / "docs"))
import generate_api

DOCUMENTS = ("README.md", "README_CN.md", "USAGE.md")
TWINS = ("README.md", "README_CN.md")  # one text in two languages
LANGUAGES = ("bash", "python", "json", "yaml", "text")
SMALL = "--max_steps 2 --max_eval_users 100"
# (pattern, what is added behind the command; None = checked for its syntax only). The first match counts; the rest runs as it is.
RULES = (
    (r"(python3? -m )?pip |python3? -m venv |source |git |cd |curl |wget |unzip |tar |ls ", None),
    (r"(python3? -m )?tensorboard ", None),  # a server, it never ends
    (r"python test\.py|bash \.ci/run|\.ci/run", None),
    (r"torchrun |nvidia-smi|.*(--device|DEVICE=)[ ]?cuda", None),
    (r"python benchmark\.py", "--users 300 --items 500"),
    (r"python synthetic\.py", "--users 300 --items 500"),
    (r"python main\.py .*(--inference_only|--help|--write_config|--print_config)", ""),
    (r"python main\.py|bash run\.sh", SMALL),
)
PLACEHOLDER = re.compile(r"<\w[^>]*>|\.\.\.|…|\bpath/to|(?<![$\w])\b(RUN|FOLDER|PATH|SOURCE|OUT|NAME|FILE|DIR|YOUR_\w+|X|N)\b(?!=)")
SECONDS = 180  # for one block


class Block(NamedTuple):
    """A fenced block: the document, the line it begins at, its language and its content."""

    document: str
    line: int
    language: str
    content: str


def blocks_of(document: str, text: str) -> list[Block]:
    """The fenced blocks of a Markdown text, indented ones (in lists) too."""
    found, opened = [], None
    for number, line in enumerate(text.splitlines(), 1):
        fence = re.match(r"(\s*)(`{3,}|~{3,})\s*(\S*)\s*$", line)
        if opened is None and fence:
            opened = (number, fence.group(1), fence.group(2), fence.group(3), [])
        elif opened is not None and fence and fence.group(2).startswith(opened[2]) and not fence.group(3):
            found.append(Block(document, opened[0], opened[3], "\n".join(opened[4]) + "\n"))
            opened = None
        elif opened is not None:
            opened[4].append(line.removeprefix(opened[1]))
    assert opened is None, f"{document}:{opened[0]}: the block is never closed"
    return found


def commands_of(block: Block) -> list[str]:
    """The commands of a bash block: continued lines joined, comments and blank lines left out."""
    lines = re.sub(r"\\\n\s*", "", block.content).splitlines()
    without_comment = [re.sub(r"(^|\s)#.*$", "", line).strip() for line in lines]
    return [line for line in without_comment if line]


def without_assignments(command: str) -> str:
    """`A=1 B=2 python x` -> `python x`."""
    return re.sub(r"^(\w+=(\"[^\"]*\"|'[^']*'|\S*)\s+)+", "", command)


def runnable(command: str) -> str | None:
    """What is run for a documented command: with its rule's flags, None where only its syntax is checked. `&&` joins several."""
    if " && " in command:
        parts = [part for part in map(runnable, command.split(" && ")) if part is not None]
        return " && ".join(parts) or None
    for pattern, added in RULES:
        if re.match(pattern, without_assignments(command)) or re.match(pattern, command):
            if added is None:
                return None
            head, pipe, tail = command.partition(" | ")
            return f"{head} {added}".rstrip() + pipe + tail
    return command


# Commands that stand in a text block, so that no test runs them as they are, and why.
NOT_RUN = {
    "python convert.py": "no Amazon review file and no RecBole set stand in for the real ones here; test_convert.py runs all recipes",
    "python experiments/run.py": "it trains for an hour; test_sweeps.py runs a small one",
    "python report.py --prune --yes": "it removes the runs that later blocks go on with; test_run_list.py runs it",
}  # fmt: skip


def main_arguments(command: str) -> list[str] | None:
    """The flags of a command that starts main.py (or run.sh); None for any other. `$NAME` stays a word."""
    words = shlex.split(without_assignments(command.partition(" | ")[0].partition(" > ")[0]))
    starts = words[:2] in (["python", "main.py"], ["bash", "run.sh"])
    return words[2:] if starts else None


def read_blocks() -> list[Block]:
    return [block for name in DOCUMENTS if (ROOT / name).is_file() for block in blocks_of(name, (ROOT / name).read_text(encoding="utf-8"))]


BLOCKS = read_blocks()
# A block of README_CN.md is README.md's, letter by letter (test_twins_have_the_same_commands), and runs once.
BASH = [block for block in BLOCKS if block.language == "bash" and block.document != TWINS[1]]
COMMANDS = [(block, command) for block in BASH for command in commands_of(block)]
NOTHING = pytest.mark.skip("no document is written yet")


def name_of(value) -> str:
    return f"{value.document}:{value.line}" if isinstance(value, Block) else str(value)[:60]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of the repository, as a clone would have it, with downloads that the documents name beside it and in it."""
    place = tmp_path_factory.mktemp("clone")
    made = ("cache", "logs", "tb_logs", "checkpoints", "data", "demo_data", "demo_data-eval", "results", "*.log")
    hidden = (".git", ".venv", "venv", "__pycache__", ".pytest_cache", ".hypothesis", ".ruff_cache")

    def left_out(folder: str, names: list[str]) -> set[str]:
        return shutil.ignore_patterns(*hidden, *(made if Path(folder) == ROOT else ()))(folder, names)

    shutil.copytree(ROOT, place / "main", ignore=left_out)
    small_public_sets(place / "shared" / "data")
    for path in (place / "shared" / "data").iterdir():
        (place / "main" / path.name).symlink_to(path)
    return place / "main"


def small_public_sets(folder: Path) -> None:
    """Small stand-ins with the names and the form of MovieLens-100K (ml-100k/) and S3-Rec's Beauty (s3rec-beauty/): 60 users, 80 items."""
    movies, beauty = folder / "ml-100k", folder / "s3rec-beauty"
    movies.mkdir(parents=True)
    beauty.mkdir()
    seen = {user: [1 + (7 * user + 3 * n * n + n) % 80 for n in range(12)] for user in range(1, 61)}
    events = [(user, item, n) for user, items in seen.items() for n, item in enumerate(items)]
    (movies / "u.data").write_text("".join(f"{user}\t{item}\t{1 + n % 5}\t{880_000_000 + 86_400 * n + user}\n" for user, item, n in events))
    flags = ["|".join(str(int(genre == item % 19)) for genre in range(19)) for item in range(81)]
    films = [f"{i}|Film {i} (1995)|01-Jan-1995||http://example.org/{i}|{flags[i]}\n" for i in range(1, 81)]
    (movies / "u.item").write_text("".join(films), encoding="latin-1")
    (movies / "u.genre").write_text("".join(f"genre{n}|{n}\n" for n in range(19)) + "\n")
    (movies / "u.user").write_text("".join(f"{user}|{20 + user % 50}|{'MF'[user % 2]}|student|{10000 + user}\n" for user in seen))
    (movies / "u.occupation").write_text("student\n")
    (beauty / "Beauty.txt").write_text("".join(f"{user} {' '.join(map(str, dict.fromkeys(items)))}\n" for user, items in seen.items()))
    (beauty / "Beauty_item2attributes.json").write_text(json.dumps({str(i): [1 + i % 9, 10 + i % 4] for i in range(1, 81)}))


# ---- API.md -------------------------------------------------------------------------------------------------------------


def test_api_is_what_the_docstrings_say():
    path = ROOT / "docs" / "API.md"
    if not path.is_file() and not (ROOT / "README.md").is_file():
        pytest.skip("docs/API.md and README.md are not written yet")
    same = path.is_file() and path.read_text(encoding="utf-8") == generate_api.build()
    assert same, "docs/API.md is not up to date; renew it with: python docs/generate_api.py"


SMALL_MODULE = """'Says | so.'
class A(B, C):
    'An A.'
    x: int  # metres
    _y: int = 0
    def f(self, a, *, b: int = 1) -> str:
        'Does f.'
    def _g(self): ...
def _h(): ...
"""
SMALL_STUB = '''class A(B, C):
    """An A."""

    x: int  # metres

    def f(self, a, *, b: int = 1) -> str:
        """Does f."""
'''


def test_api_of_a_small_module(tmp_path):
    (tmp_path / "errors.py").write_text(SMALL_MODULE)
    (tmp_path / "test.py").write_text('"""Runs."""\ndef main(): ...\n')
    (tmp_path / "unknown.py").write_text("def f(" + ", ".join(f"argument_{n}: int = {n}" for n in range(8)) + "): ...\n")
    text = generate_api.build(tmp_path)
    rows = ["| [errors.py](#errorspy) | Says \\| so. |", "| [test.py](#testpy) | Runs. |", "| [unknown.py](#unknownpy) | (no docstring) |"]
    assert "\n".join(rows) in text and SMALL_STUB in text
    assert "_g" not in text and "_h" not in text and "_y" not in text and "def main" not in text
    assert "def f(\n    argument_0: int = 0,\n" in text


def test_generate_api_writes_and_checks(clone):
    (clone / "docs" / "API.md").write_text("old")
    command = [sys.executable, "docs/generate_api.py"]
    stale = subprocess.run([*command, "--check"], cwd=clone, capture_output=True, text=True)
    assert stale.returncode == 1 and "renew it with: python docs/generate_api.py" in stale.stderr
    assert subprocess.run(command, cwd=clone, capture_output=True).returncode == 0
    assert subprocess.run([*command, "--check"], cwd=clone).returncode == 0


# ---- README.md and USAGE.md ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOCUMENTS)
def test_document_has_commands_and_known_languages(name):
    if not (ROOT / name).is_file():
        pytest.skip(f"{name} is not written yet")
    blocks = [block for block in BLOCKS if block.document == name]
    assert any(block.language == "bash" for block in blocks)
    for block in blocks:
        where = f"{name}:{block.line}"
        expected = f"a block is one of {', '.join(LANGUAGES)} (text where nothing can be run)"
        assert block.language in LANGUAGES, f"{where}: {expected}, found {block.language!r}"
        if block.language == "python":
            ast.parse(block.content, where)
        if block.language == "json":
            whole = block.content.lstrip().startswith(("{\n", "[\n"))  # one value over several lines, else one value a line
            [json.loads(part) for part in ([block.content] if whole else block.content.splitlines())]
        if block.language == "yaml":
            yaml.safe_load(block.content)


def test_readme_maps_each_script():
    if not (ROOT / "README.md").is_file():
        pytest.skip("README.md is not written yet")
    import simple_test

    mapped = simple_test.mapped_files((ROOT / "README.md").read_text(encoding="utf-8"))
    unmapped = [path.name for path in sorted(ROOT.glob("*.py")) if path.name not in mapped]
    assert not unmapped, f"not in README.md's file map: {', '.join(unmapped)}"
    assert not [name for name in mapped if not any(ROOT.glob(name.rstrip("/")))], "README.md's file map names what does not exist"


def test_commands_in_text_blocks_have_a_reason():
    lines = [line for block in BLOCKS if block.language == "text" for line in commands_of(block)]
    texts = [line for line in lines if re.match(r"(\w+=\S+ )*(python|bash) ", line)]
    assert [line for line in texts if not line.startswith(tuple(NOT_RUN))] == []
    assert [start for start in NOT_RUN if not any(line.startswith(start) for line in texts)] == []


@pytest.mark.parametrize(("block", "command"), COMMANDS or [pytest.param(None, None, marks=NOTHING)], ids=name_of)
def test_command_is_well_formed(block, command):
    where = f"{block.document}:{block.line}: {command}"
    found = PLACEHOLDER.search(command)
    assert not found, f"{where}: {found.group()!r} stands for something; name a real one, or mark the block as text"
    assert subprocess.run(["bash", "-n", "-c", command], capture_output=True).returncode == 0, f"{where}: not bash"
    for part in command.split(" && "):
        words = shlex.split(without_assignments(part))
        if words[:1] in (["python"], ["bash"]) and words[1:] and not words[1].startswith("-"):
            assert (ROOT / words[1]).is_file(), f"{where}: no such script"
        arguments = main_arguments(part)
        if arguments is not None and "--help" not in arguments:
            try:
                load_config([word for word in arguments if not word.startswith("$")], {}, ROOT / "config.yaml")
            except UserError as error:
                if "no such file" not in str(error):  # a settings file that an earlier command makes
                    raise AssertionError(f"{where}: {error}") from None


@pytest.mark.parametrize("document", dict.fromkeys(block.document for block in BASH))
def test_commands_run(document, clone):
    """A document's blocks in one test, in order: a later one goes on with what an earlier one made, whichever process runs the test."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    faults, done = [], set()
    for block in (block for block in BASH if block.document == document):
        commands = [command for command in map(runnable, commands_of(block)) if command is not None]
        script = "\n".join(["set -euo pipefail", *(f"echo {shlex.quote('$ ' + command)}\n{command}" for command in commands)])
        if not commands or script in done:  # a block that stands in a document twice runs once
            continue
        done.add(script)
        result = subprocess.run(["bash", "-c", script], cwd=clone, env=environment, capture_output=True, text=True, check=False,
                                timeout=SECONDS, stdin=subprocess.DEVNULL)  # fmt: skip
        if result.returncode != 0 or "Traceback" in result.stderr:
            output = (result.stdout[-3000:] + result.stderr[-3000:]).strip()
            faults.append(f"{document}:{block.line}: exit status {result.returncode}\n{output}")
    assert not faults, "\n\n".join(faults)


# ---- README_CN.md beside README.md --------------------------------------------------------------------------------------


def twins() -> tuple[str, str]:
    return tuple((ROOT / name).read_text(encoding="utf-8") for name in TWINS)


def rows_of(text: str) -> list[list[str]]:
    """The cells of all rows of a text's tables, blocks apart."""
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in outside.splitlines() if line.startswith("|")]


def figures_of(cell: str) -> list[str]:
    """Its numbers and code spans, in ascending order: another language may name them in another one."""
    return sorted(re.findall(r"`[^`]+`|(?:\d[\d,]*)?\.?\d+", cell))


def test_twins_have_the_same_commands():
    english, chinese = (
        [(b.language, b.content) for b in blocks_of(name, text) if b.language != "text" or "python " in b.content]
        for name, text in zip(TWINS, twins())
    )
    assert english == chinese and len(english) >= 5


def test_twins_have_the_same_tables():
    english, chinese = map(rows_of, twins())
    assert len(english) == len(chinese) > 90
    for row, other in zip(english, chinese):
        where = f"| {' | '.join(row)} |\n| {' | '.join(other)} |"
        assert len(row) == len(other), where
        for number, (cell, counterpart) in enumerate(zip(row, other)):
            if number == 0 and cell.startswith("`"):
                assert cell == counterpart, where
            assert figures_of(cell) == figures_of(counterpart), f"figures or code spans differ:\n{where}"


def test_twins_have_the_same_parts_and_lead_to_each_other():
    english, chinese = twins()
    shape = [re.findall(r"^(#+ |- |\*\*|```)", text, re.MULTILINE) for text in (english, chinese)]
    assert shape[0] == shape[1]
    assert "[中文](README_CN.md)" in english.splitlines()[2] and "[English](README.md)" in chinese.splitlines()[2]
    links = [sorted(t for t in re.findall(r"\]\(([^)#]+)\)", text) if t not in TWINS) for text in (english, chinese)]
    assert links[0] == links[1] and all((ROOT / target).exists() for target in links[0])


def test_a_difference_between_twins_is_found():
    rows = rows_of("| a | .0912 / 1,020 |\n```text\n| no |\n```\n|---|---|\n")
    assert rows == [["a", ".0912 / 1,020"], ["---", "---"]]
    assert figures_of("20,000 of `a.py` at .5 ± 1.25") == [".5", "1.25", "20,000", "`a.py`"]
    assert figures_of("20,001 of `a.py` at .5 ± 1.25") != [".5", "1.25", "20,000", "`a.py`"]


# ---- the extraction itself ----------------------------------------------------------------------------------------------

SAMPLE = """# Title
```bash
# a comment
pip install -r requirements.txt && bash run.sh   # and go
python main.py --config a.yaml \\
    --lr 0.1
```
- in a list
  ```text
  python main.py --data_path FOLDER
  ```
~~~bash
EVAL_DATA_PATH=demo python infer.py
~~~
"""


def test_blocks_and_commands():
    blocks = blocks_of("A.md", SAMPLE)
    assert [(b.line, b.language) for b in blocks] == [(2, "bash"), (9, "text"), (12, "bash")]
    assert commands_of(blocks[0]) == ["pip install -r requirements.txt && bash run.sh", "python main.py --config a.yaml --lr 0.1"]
    assert blocks[1].content == "python main.py --data_path FOLDER\n"
    with pytest.raises(AssertionError, match="A.md:1: the block is never closed"):
        blocks_of("A.md", "```bash\nls\n")


@pytest.mark.parametrize(("command", "expected"), [
    ("pip install -r requirements.txt && bash run.sh", f"bash run.sh {SMALL}"), ("pip install x && python test.py", None),
    ("python main.py --lr 1", f"python main.py --lr 1 {SMALL}"), ("BATCH_SIZE=4 python main.py", f"BATCH_SIZE=4 python main.py {SMALL}"),
    ("python main.py --help", "python main.py --help"),
    ("python main.py --inference_only --seed 1", "python main.py --inference_only --seed 1"),
    ("python main.py --device cuda", None), ("DEVICE=cuda bash run.sh", None), ("tensorboard --logdir tb_logs", None),
    ("python test.py -k a", None), ("python3 -m venv .venv && source .venv/bin/activate", None),
    ("python simple_test.py", "python simple_test.py"), ("python main.py --help | head", "python main.py --help | head"),
    ("python main.py | tee a.txt", f"python main.py {SMALL} | tee a.txt"),
    ("python synthetic.py out --users 100000 --items 9", "python synthetic.py out --users 100000 --items 9 --users 300 --items 500"),
    ("EVAL_DATA_PATH=a python infer.py", "EVAL_DATA_PATH=a python infer.py"),
])  # fmt: skip
def test_what_is_run(command, expected):
    assert runnable(command) == expected


@pytest.mark.parametrize(("command", "found"), [
    ("python main.py --data_path FOLDER", True), ("python main.py --resume_path <run>", True), ("cat /path/to/x", True),
    ("python a.py ...", True), ("python report.py logs/demo", False), ("EVAL_DATA_PATH=data python infer.py", False),
    ("python x.py $NAME", False),
])  # fmt: skip
def test_placeholders(command, found):
    assert bool(PLACEHOLDER.search(command)) == found


def test_flags_of_main():
    assert main_arguments("A=1 B='x y' python main.py --lr 1 | head") == ["--lr", "1"]
    assert main_arguments("bash run.sh --batch_size 2 > a.txt") == ["--batch_size", "2"]
    assert main_arguments("python infer.py --output a") is None


def test_stand_ins_look_like_the_public_sets(tmp_path):
    small_public_sets(tmp_path)
    if not PUBLIC_DATA.is_dir():
        pytest.skip(f"no public data at {PUBLIC_DATA}")
    for name in ("ml-100k/u.data", "ml-100k/u.item", "ml-100k/u.user"):
        real, made = ((folder / name).read_text(encoding="latin-1").splitlines()[0] for folder in (PUBLIC_DATA, tmp_path))
        separator = "\t" if name.endswith("data") else "|"
        assert len(made.split(separator)) == len(real.split(separator)), name
    assert {path.name for path in (tmp_path / "s3rec-beauty").iterdir()} == {path.name for path in (PUBLIC_DATA / "s3rec-beauty").iterdir()}
