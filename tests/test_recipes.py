"""docs/recipes/: each page's changes are made in a copy of the repository, and its commands run there, with small data and few steps.

To see one page's: python test.py tests/test_recipes.py -k new-loss
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_docs import LANGUAGES, Block, blocks_of, small_public_sets

from metrics import competition_score, hit_rate, ndcg

RECIPES = sorted(path for path in (ROOT / "docs" / "recipes").glob("*.md") if path.name != "README.md")
SMALL = "--max_steps 2 --max_eval_users 100"
MAIN = re.compile(r"^((?:\w+=\S+ )*(?:python main\.py|bash run\.sh)(?!.*--(?:inference_only|estimate|write_config|print_config)).*)$", re.M)
CHANGING = ("new-feature.md", "new-loss.md", "new-backbone.md")
SECONDS = 300  # for one block


def changes_of(block: Block) -> list[tuple[str, bool, list[tuple[str, str]]]]:
    """(file, whether it is new, [(lines before, lines after)]) of a diff block whose hunks have no line numbers."""
    files = []
    for line in block.content.splitlines():
        if line.startswith("--- "):
            new = line == "--- /dev/null"
        elif line.startswith("+++ b/"):
            files.append((line.removeprefix("+++ b/"), new, []))
        elif line == "@@":
            files[-1][2].append(([], []))
        else:
            before, after = files[-1][2][-1]
            assert line[:1] in (" ", "-", "+", ""), f"{block.document}:{block.line}: {line!r}"
            if line[:1] != "+":
                before.append(line[1:])
            if line[:1] != "-":
                after.append(line[1:])
    return [(name, new, [("\n".join(b), "\n".join(a)) for b, a in hunks]) for name, new, hunks in files]


def apply(block: Block, folder: Path) -> None:
    """Make a diff block's changes; AssertionError where a place is not found, or found twice."""
    for name, new, hunks in changes_of(block):
        path = folder / name
        if new:
            assert not path.exists() and len(hunks) == 1
            path.write_text(hunks[0][1] + "\n", encoding="utf-8")
            continue
        text = path.read_text(encoding="utf-8")
        for before, after in hunks:
            where = (
                f"{block.document}:{block.line}: {name} holds these lines {text.count(before + chr(10))} times, expected once:\n{before}"
            )
            assert before and text.count(before + "\n") == 1, where
            text = text.replace(before + "\n", after + "\n")
        path.write_text(text, encoding="utf-8")


def copy_of_the_repository(folder: Path) -> Path:
    """The files that a clone has: those that git knows, and new ones that it does not ignore."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        names = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    else:  # an unpacked archive
        patterns = (
            "*.py",
            "*.yaml",
            "*.sh",
            "*.md",
            "*.ini",
            "tests/**/*.py",
            "configs/**/*",
            "converters/*",
            "experiments/*.py",
            "docs/*.py",
        )
        names = [str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def run(block: Block, folder: Path, environ: dict) -> str:
    script = "set -euo pipefail\n" + MAIN.sub(rf"\1 {SMALL}", block.content) + "\nenv -0 > .environment\n"
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=environ, capture_output=True, text=True, check=False,
                          timeout=SECONDS, stdin=subprocess.DEVNULL)  # fmt: skip
    output = (done.stdout[-3000:] + done.stderr[-3000:]).strip()
    assert done.returncode == 0 and "Traceback" not in done.stderr, f"{block.document}:{block.line}: status {done.returncode}\n{output}"
    if (folder / ".environment").is_file():  # a later block of the page is typed into the same shell
        pairs = (pair.partition("=") for pair in (folder / ".environment").read_text().split("\0") if pair)
        environ.update({name: value for name, _, value in pairs if name not in ("PWD", "OLDPWD", "SHLVL", "_")})
    return done.stdout


def assert_counts_as_metrics_do(page: dict) -> None:
    """The functions that the page on metrics defines give what metrics.py gives for the page's users."""
    ranks = torch.tensor(page["ranks"])
    for k in (1, 5, 10, 100):
        assert page["hr"](k) == hit_rate(ranks, k).mean()
        assert page["ndcg"](k) == pytest.approx(float(ndcg(ranks, k).mean()), abs=1e-12)
    assert round(competition_score(page["hr"](10), page["ndcg"](10)), 4) == 0.4018  # as the page says


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem, marks=[] if p.stem == "metrics" else pytest.mark.long) for p in RECIPES])
def test_recipe_works(path, tmp_path):
    folder = copy_of_the_repository(tmp_path / "copy")
    small_public_sets(tmp_path / "public")
    (folder / "ml-100k").symlink_to(tmp_path / "public" / "ml-100k")
    environ = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONDONTWRITEBYTECODE": "1"}
    output, last = {}, {}
    for block in blocks_of(path.name, path.read_text(encoding="utf-8")):
        if block.language == "diff":
            apply(block, folder)
        elif block.language == "bash":
            output[block.line] = run(block, folder, environ)
        elif block.language == "python":
            last = {}
            exec(compile(block.content, path.name, "exec"), last)  # its assertions are checks, too
    if path.stem == "metrics":
        assert_counts_as_metrics_do(last)
        return
    text = "".join(output.values())
    expected = {
        "competition": "50 {10}", "own-data": '"user": "ada"', "movielens": "Film ", "new-feature": "20 users answered",
        "new-loss": "2 passed", "new-backbone": "20 users answered",
    }  # fmt: skip
    assert expected[path.stem] in text, text[-3000:]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_changes_find_their_place(path, tmp_path):
    """In the default run: each diff fits the code as it is, what it makes is Python, and each block is of a known language."""
    blocks = blocks_of(path.name, path.read_text(encoding="utf-8"))
    diffs = [block for block in blocks if block.language == "diff"]
    assert bool(diffs) == (path.name in CHANGING)
    assert {block.language for block in blocks} <= {*LANGUAGES, "diff"}
    for name in {name for block in diffs for name, new, _ in changes_of(block) if not new}:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tests").mkdir(exist_ok=True)
    for block in diffs:
        apply(block, tmp_path)
    for made in tmp_path.rglob("*.py"):
        text = made.read_text(encoding="utf-8")
        ast.parse(text, made.name)
        assert max(map(len, text.splitlines())) <= 140
    for block in blocks:
        if block.language == "python":
            ast.parse(block.content)
        if block.language == "bash":
            done = subprocess.run(["bash", "-n", "-c", block.content], capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{path.name}:{block.line}: {done.stderr}"


def test_each_page_stands_in_the_table():
    text = (ROOT / "docs" / "recipes" / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| \[([\w-]+\.md)\]\(\1\)", text, re.M)) == [path.name for path in RECIPES]


def test_links_lead_somewhere():
    for path in [*RECIPES, ROOT / "docs" / "recipes" / "README.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_a_change_that_does_not_fit_is_said(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\ny = 1\nx = 1\n")
    for lines in ("-x = 1\n+x = 2", "-z = 1\n+z = 2"):
        (block,) = blocks_of("A.md", f"```diff\n--- a/a.py\n+++ b/a.py\n@@\n{lines}\n```\n")
        with pytest.raises(AssertionError, match="times, expected once"):
            apply(block, tmp_path)
    (block,) = blocks_of(
        "A.md", "```diff\n--- a/a.py\n+++ b/a.py\n@@\n y = 1\n-x = 1\n+x = 3\n--- /dev/null\n+++ b/b.py\n@@\n+z = 1\n```\n"
    )
    apply(block, tmp_path)
    assert (tmp_path / "a.py").read_text() == "x = 1\ny = 1\nx = 3\n" and (tmp_path / "b.py").read_text() == "z = 1\n"


def test_what_is_added_to_commands():
    found = MAIN.sub(rf"\1 {SMALL}", "A=1 python main.py --lr 1\npython main.py --estimate\nbash run.sh\npython infer.py\n")
    assert found == f"A=1 python main.py --lr 1 {SMALL}\npython main.py --estimate\nbash run.sh {SMALL}\npython infer.py\n"
