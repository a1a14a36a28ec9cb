"""The smoke test: in under a minute, whether this machine and this clone can train. Needs no pytest; a line a check.

Exit status 1 when a check fails.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import operator
import py_compile
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from atomic import temporary_folder
from errors import ArgumentParser, run_cli

ROOT = Path(__file__).resolve().parent
COMPARE = {">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt}
STEPS = 40  # of the small training run
# Modules that need torch are imported inside the checks: where it is missing, the requirements' lines say so.


# ---- the clone and its requirements -------------------------------------------------------------------------------------


def requirements() -> list[tuple[str, str]]:
    """(name, version specifiers) of requirements.txt."""
    lines = [line.split("#")[0].split(";")[0].strip() for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()]
    return [re.fullmatch(r"([\w.-]+)(?:\[.*\])?\s*(.*)", line).groups() for line in lines if line]


def satisfies(version: str, specifiers: str) -> bool:
    """Whether a version meets comma-separated specifiers; without the packaging library only its numbers are compared."""
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return all(_compare(version, specifier.strip()) for specifier in specifiers.split(",") if specifier.strip())
    return SpecifierSet(specifiers).contains(version, prereleases=True)


def _compare(version: str, specifier: str) -> bool:
    sign, wanted = re.fullmatch(r"(>=|<=|==|!=|~=|>|<)\s*([\w.]+)", specifier).groups()
    have, want = _numbers(version), _numbers(wanted)
    if sign == "~=":
        return have >= want and have[: len(want) - 1] == want[:-1]
    length = max(len(have), len(want))
    return COMPARE[sign](have + (0,) * (length - len(have)), want + (0,) * (length - len(want)))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.match(r"\d+(?:\.\d+)*", version).group().split("."))


def check_requirement(name: str, specifiers: str) -> str:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise AssertionError("not installed; pip install -r requirements.txt") from None
    assert satisfies(version, specifiers), f"found {version}; pip install -r requirements.txt"
    return version


def check_scripts(folder: Path) -> str:
    scripts = sorted(ROOT.glob("*.py"))
    for script in scripts:
        py_compile.compile(str(script), cfile=str(folder / f"{script.stem}.pyc"), doraise=True)
    return f"{len(scripts)} scripts"


def mapped_files(readme: str) -> list[str]:
    """Files and folders named by code spans in the first column of the tables under README's heading with "map" in it."""
    section = re.search(r"^#+[^\n]*\bmap\b[^\n]*\n(.*?)(?=^#|\Z)", readme, re.IGNORECASE | re.MULTILINE | re.DOTALL)
    rows = [line for line in section.group(1).splitlines() if line.lstrip().startswith("|")] if section else []
    spans = [span for row in rows for span in re.findall(r"`([^`]+)`", row.strip().strip("|").split("|")[0])]
    return [span for span in spans if re.fullmatch(r"[\w./*-]+", span) and ("." in span or span.endswith("/"))]


def check_map() -> str:
    path = ROOT / "README.md"
    assert path.is_file(), "README.md is missing"
    names = mapped_files(path.read_text(encoding="utf-8"))
    assert names, "no table with file names under a heading with 'map' in README.md"
    missing = [name for name in names if not any(ROOT.glob(name.rstrip("/")))]
    assert not missing, f"in README.md's map, but not here: {', '.join(missing)}"
    return f"{len(names)} names"


# ---- torch --------------------------------------------------------------------------------------------------------------


def check_matmul() -> str:
    import torch

    product = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) @ torch.tensor([[5.0], [6.0]])
    assert product.tolist() == [[17.0], [39.0]], f"found {product.tolist()}"
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, CUDA {'found' if torch.cuda.is_available() else 'not found'}"


def check_autograd() -> str:
    import torch

    x = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    x.pow(3).sum().backward()
    assert x.grad.tolist() == [3.0, 12.0, 27.0], f"found {x.grad.tolist()}"
    return "gradient of x^3"


def check_attention() -> str:
    import torch
    import torch.nn.functional as F

    query, key, value = torch.randn(3, 2, 4, 6, 8, generator=torch.Generator().manual_seed(0))  # each (B, H, T, D / H)
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    scores = (query @ key.transpose(-1, -2) / math.sqrt(8)).masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf)
    difference = (mixed - scores.softmax(-1) @ value).abs().max().item()
    assert difference < 1e-5, f"differs from softmax(QK)V by {difference:.2g}"
    return "causal, equal to the formula"


# ---- files, model, training ---------------------------------------------------------------------------------------------


def check_checkpoint(folder: Path) -> str:
    import torch

    from checkpoint import load_checkpoint, save_checkpoint

    weights = torch.arange(6.0).view(2, 3)
    lists, counts = dict.fromkeys(("layout", "embeddings"), []), dict.fromkeys(("num_items", "num_users", "num_events", "epoch"), 0)
    objects, texts = dict.fromkeys(("config", "schema", "metrics"), {}), dict.fromkeys(("item_ids", "store", "torch"), "")
    meta = lists | counts | objects | texts
    path = save_checkpoint(folder / "ck", step=7, valid_loss=0.5, model_state={"w": weights}, trainer_state={"step": 7}, meta=meta)
    loaded = load_checkpoint(path, with_trainer=True)
    same = torch.equal(loaded.model_state["w"], weights) and loaded.trainer_state["step"] == 7
    assert same, "what was loaded differs from what was saved"
    return path.name


def small_trainer(folder: Path):
    """A trainer of a one-block model on 400 synthetic users, as main.py makes one."""
    import torch

    from config import Config, with_values
    from dataset import make_splits
    from features import TableLayout
    from logger import RunLogger
    from runs import prepare_run
    from store import open_store
    from synthetic import generate
    from trainer import Trainer

    generate(folder / "data", layout="jsonl", users=400, items=600, seed=1)
    config = with_values(Config(), hidden_units=32, num_blocks=1, max_seq_length=20, num_negatives=64, batch_size=64, max_steps=STEPS,
                         learning_rate=3e-3, log_every_steps=5, device="cpu", tensorboard=False, multimodal_features="none")  # fmt: skip
    store = open_store(folder / "data", folder / "cache", progress=False, log=lambda _: None)
    splits = make_splits(store, protocol="holdout", holdout_fraction=0.2, target="last", seed=1)
    run = prepare_run(config.paths, base=folder, log=lambda _: None)
    logger = RunLogger(run.log_dir, None, console=False)
    return Trainer(config, store, TableLayout.from_store(store, config.model), (), splits, run, logger, torch.device("cpu"))


def check_model(trainer) -> str:
    """Shapes, finite values, and causality: the last token's item changes no query before it."""
    import numpy as np
    import torch

    batch = trainer.builder.training(np.arange(8), 0, 0)
    features = trainer.columns.gather(batch.unique_ids.numpy(), batch.users.numpy())
    trainer.model.eval()
    changed = batch.item_index.clone()
    last = batch.lengths.cumsum(0) - 1
    changed[last] = 1
    with torch.no_grad():
        query, item_emb = trainer.model(batch, features)
        other, _ = trainer.model(batch._replace(item_index=changed), features)
    width = trainer.config.model.hidden_units
    shapes, expected = (tuple(query.shape), tuple(item_emb.shape)), ((len(batch.owner), width), (len(batch.unique_ids), width))
    assert shapes == expected, f"shapes {shapes}; expected {expected}"
    assert query.isfinite().all() and item_emb.isfinite().all(), "values that are not finite"
    before = torch.ones(len(query), dtype=torch.bool)
    before[last] = False
    assert torch.allclose(query[before], other[before], atol=1e-5), "an event changes what was predicted before it"
    return f"{sum(p.numel() for p in trainer.model.parameters()):,} parameters"


def check_training(trainer) -> str:
    from logger import read_train_log

    trainer.fit()
    losses = [record["loss"] for record in read_train_log(trainer.run.log_dir / "train.log") if record.get("loss") is not None]
    assert losses[-1] < 0.95 * losses[0], f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f} in {STEPS} steps"
    return f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {STEPS} steps"


def check_evaluation(trainer) -> str:
    from final_test import run_test

    run_test(trainer)
    metrics = json.loads((trainer.run.log_dir / "metrics.json").read_text(encoding="utf-8"))
    assert 0 <= metrics["ndcg@10"] <= metrics["hr@10"] <= 1, f"found HR@10 {metrics['hr@10']}, NDCG@10 {metrics['ndcg@10']}"
    return f"HR@10 {metrics['hr@10']:.3f} on {metrics['num_users']} users"


# ---- running ------------------------------------------------------------------------------------------------------------


class Checks:
    """Runs checks one after the other, prints a line each, counts failures."""

    def __init__(self) -> None:
        self.passed, self.failed = 0, 0

    def run(self, name: str, check: Callable, *arguments: object) -> object:
        """The check's result; None where it failed. Whatever it raises is its failure: one broken part must not hide the others."""
        try:
            result = check(*arguments)
        except Exception as error:
            self.failed += 1
            reason = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            print(f"FAIL {name}: {' '.join(reason.split())}", flush=True)
            return None
        self.passed += 1
        print(f"ok   {name}" + (f": {result}" if isinstance(result, str) else ""), flush=True)
        return result


def main() -> int:
    parser = ArgumentParser(prog="simple_test.py", description=__doc__.splitlines()[0])
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.parse_args()
    started, checks = time.time(), Checks()
    with temporary_folder(Path(tempfile.gettempdir()) / "simple_test", mode=0o700) as folder:
        for package, specifiers in requirements():
            checks.run(f"requirement {package}{specifiers}", check_requirement, package, specifiers)
        checks.run("scripts compile", check_scripts, folder)
        checks.run("files of the README's map", check_map)
        checks.run("torch: matrix product", check_matmul)
        checks.run("torch: autograd", check_autograd)
        checks.run("torch: attention", check_attention)
        checks.run("checkpoint: save and load", check_checkpoint, folder)
        trainer = checks.run("data, store, trainer", small_trainer, folder)
        if trainer is not None:
            checks.run("model", check_model, trainer)
            if checks.run("training loop", check_training, trainer) is not None:
                checks.run("evaluation", check_evaluation, trainer)
            trainer.logger.close()
    print(f"{checks.passed} ok, {checks.failed} failed in {time.time() - started:.0f} s")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(run_cli(main, debug="--debug" in sys.argv))
