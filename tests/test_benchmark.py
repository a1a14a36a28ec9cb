import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_trainer import final_state, make_trainer

import benchmark_child
import benchmark_parts
from benchmark import check, figure, parse, report, rows_of
from benchmark_child import PartClock, clear_places, full_layout
from benchmark_parts import BEAUTY, QUICK, REQUIRED_KEYS, Benchmark, Ratio, Sizes, median_of, part_medians, ratio_of, write_beauty
from benchmark_process import Process, descendants, memory_of
from config import ModelConfig
from errors import RunError, UserError
from features import TableLayout

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def run_script(*arguments, **options):
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmark.py"), *map(str, arguments)],
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


# ---- figures ------------------------------------------------------------------------------------------------------------


def test_ratio_is_the_median_over_rounds_of_the_rounds_medians():
    slow = [[10.0, 30.0, 20.0], [8.0], [50.0, 70.0]]  # medians 20, 8, 60
    fast = [[1.0, 2.0, 9.0], [4.0], [3.0]]  # medians 2, 4, 3: ratios 10, 2, 20
    assert ratio_of(slow, fast) == Ratio(10.0, 2.0, 20.0)
    assert median_of(fast) == 3.0
    with pytest.raises(ValueError, match="shorter|longer"):
        ratio_of(slow, fast[:2])


def test_part_medians():
    assert part_medians([{"data": 1.0, "update": 5.0}, {"data": 3.0, "update": 6.0}, {"data": 2.0, "update": 9.0}]) == {
        "data_s": 2.0, "update_s": 6.0,
    }  # fmt: skip
    assert part_medians([]) == {}


@pytest.mark.parametrize(("value", "text"), [(1234.6, "1,235"), (99.94, "99.9"), (0.01234, "0.0123"), (-250.4, "-250"), (0.0, "0")])
def test_figure(value, text):
    assert figure(value) == text


def test_rows_have_the_ratio_first_and_leave_out_what_was_not_measured():
    found = {"train.users_per_s": 2000.0, "train.reference_users_per_s": 100.0, "train.ratio": 20.0, "train.ratio_min": 18.0,
             "train.ratio_max": 21.0, "train.step_s": 0.064, "reference.step_s": 1.28, "start.seconds": None}  # fmt: skip
    assert rows_of(found) == [
        ("20x", "training, whole steps", "2,000 users/s", "100 users/s", "18 .. 21"),
        ("", "  a step", "64 ms", "1,280 ms", ""),
    ]


def test_beauty_has_its_lengths_and_all_items(tmp_path):
    path = write_beauty(tmp_path / "b.txt", 2000, 1000)
    rows = [[int(word) for word in line.split()] for line in path.read_text().splitlines()]
    lengths = [len(row) - 1 for row in rows]
    assert [row[0] for row in rows] == list(range(1, 2001))
    assert min(lengths) == BEAUTY["shortest"] and abs(statistics.mean(lengths) - BEAUTY["mean"]) < 0.3
    assert {item for row in rows for item in row[1:]} == set(range(1, 1001))
    tags = json.loads((tmp_path / "b_item2attributes.json").read_text())
    assert set(map(int, tags)) == set(range(1, 1001)) and {len(set(tag)) for tag in tags.values()} == {BEAUTY["attributes_an_item"]}


# ---- our side's pieces --------------------------------------------------------------------------------------------------


def test_full_tables_have_the_published_sizes_and_nothing_else_changes():
    model = ModelConfig(hidden_units=8, num_heads=1, user_id=True)
    sizes = [("item_id", "item", "single", 500), ("100", "item", "single", 6), ("121", "item", "single", 40), ("own", "item", "single", 3),
             ("user_id", "user", "single", 90), ("103", "user", "single", 500), ("106", "user", "multi", 14)]  # fmt: skip
    small = TableLayout.from_sizes(sizes, model)
    full = full_layout(small, model)
    assert [(f.name, f.side, f.kind, f.width) for f in full.fields] == [(f.name, f.side, f.kind, f.width) for f in small.fields]
    wanted = {"item_id": 4_783_154, "100": 6, "121": 2_135_891, "own": 3, "user_id": 1_001_845, "103": 500, "106": 14}
    assert {f.name: f.size for f in full.fields} == {f.name: f.values for f in full.fields} == wanted
    assert full.num_rows == 1 + sum(wanted.values())
    assert [f.offset for f in full.fields] == np.cumsum([0, *wanted.values()])[:-1].tolist()


def test_hashed_tables_keep_their_rows_at_full_size():
    model = ModelConfig(hidden_units=8, num_heads=1, hash_rows=(50, 30), hashed_features=("item_id",))
    full = full_layout(TableLayout.from_sizes([("item_id", "item", "single", 500)], model), model)
    assert [(f.size, f.values) for f in full.fields] == [(50, 4_783_154), (30, 4_783_154)]


def test_clear_places_by_hand():
    items = torch.tensor([[4.0], [3.0], [3.0 - 1e-7], [2.0], [1.0], [0.5]])
    queries = torch.tensor([[1.0]])
    exact = torch.tensor([[0, 1, 2, 3, 4]])  # items 1 and 2 are too near for an answer: places 0 and 3 are clear
    assert clear_places(queries, items, exact, torch.tensor([[0, 2, 1, 3, 4]])) == (2, 0)
    assert clear_places(queries, items, exact, torch.tensor([[0, 1, 2, 4, 5]])) == (2, 1)  # 3 was missed by them
    assert clear_places(queries, items, torch.tensor([[3, 1, 2, 4, 5]]), exact) == (2, 2)  # 0 was missed by us: two places wrong


def test_parts_of_a_step_are_timed_and_sum_to_it(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.order.start_epoch(0)
    trainer.model.train()
    lookup = trainer.model.table.lookup
    trainer.model.table.lookup = lambda *arguments: time.sleep(0.05) or lookup(*arguments)  # more than all the rest takes
    before = (trainer.loss, torch.autograd.backward, trainer.model.encode, trainer.model.table.lookup)
    clock, built = PartClock(trainer), trainer._build(0)
    with clock.on():
        start = time.perf_counter()
        trainer._update(*built)
        whole = time.perf_counter() - start
    parts = clock.parts(whole)
    assert set(parts) == {"lookup", "forward", "backward", "update"} and min(parts.values()) > 0
    assert sum(parts.values()) == pytest.approx(whole)
    assert set(clock.parts(0.0).values()) == {0.0}  # set back
    assert (trainer.loss, torch.autograd.backward, trainer.model.encode) == before[:3]


def test_pauses_and_commands_between_steps_leave_the_training_as_it_is(tmp_path, monkeypatch):
    """Our child runs the trainer's own loop: after as many steps its weights and moments are those of an undisturbed run, bit for bit."""
    settings = {"max_steps": 5, "lr_scheduler": "constant", "dropout_rate": 0.3}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.fit()
    paused = make_trainer(tmp_path / "paused", **settings | {"max_steps": 1000})  # its making seeds torch
    monkeypatch.setattr(benchmark_child, "make_trainer", lambda order: paused)
    child, answers = object.__new__(benchmark_child.Ours), []
    child.order, child.answer = {"settle": 0.0}, answers.append
    commands = iter([("batches", 2), ("steps", 2), ("batches", 3), ("parts", 1), ("save", 0), ("load", 0), ("steps", 2)])

    def next_command():
        for command in commands:
            return command
        raise benchmark_child.Finished

    child.next_command = next_command
    with pytest.raises(benchmark_child.Finished):
        child.run()
    assert [next(iter(answer)) for answer in answers] == ["rows", "batches", "steps", "batches", "parts", "seconds", "seconds", "steps"]
    assert [len(answers[n][key]) for n, key in ((1, "batches"), (2, "steps"), (3, "batches"), (4, "parts"))] == [2, 2, 3, 1]
    assert all(0 < wait < step for answer in (answers[2], answers[7]) for wait, step in zip(answer["waits"], answer["steps"]))
    assert answers[5]["bytes"] > 1000
    there, here = final_state(whole), final_state(paused)
    assert there.keys() == here.keys() and all(torch.equal(there[name], here[name]) for name in there)


# ---- processes ----------------------------------------------------------------------------------------------------------

ECHO = "import sys\nprint('{\"ready\": 1}', flush=True)\nfor line in sys.stdin:\n    %s\n"


def python(tmp_path, body, head=""):
    return Process({"name": "echo"}, tmp_path, [sys.executable, "-c", head + ECHO % body])


def gone(pid):
    """Whether a process ended (a zombie that nobody waited for counts)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_commands_are_answered_in_turns(tmp_path):
    with python(tmp_path, 'print(\'{"got": "%s"}\' % line.strip(), flush=True)') as child:
        assert child.ready == {"ready": 1}
        assert child.do("steps 5") == {"got": "steps 5"}
        with child.turn():
            assert [child.ask("a"), child.ask("b")] == [{"got": "a"}, {"got": "b"}]
        pid = child.process.pid
    assert gone(pid)


def test_outside_its_turn_a_child_and_its_workers_stand_still(tmp_path):
    """A child and its child count in files, as a loader's worker makes batches; only in a turn do the counts grow."""
    worker = f"import itertools\nfor n in itertools.count():\n    open('{tmp_path}/n', 'w').write(str(n))\n"
    head = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {worker!r}])\n"
    with python(tmp_path, "print('{}', flush=True)", head) as child:
        with child.turn():
            wait_until((tmp_path / "n").exists)
            worker_pid = descendants(child.process.pid)[0]
        time.sleep(0.05)
        states = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in (child.process.pid, worker_pid)]
        assert states == ["T", "T"]
        still = (tmp_path / "n").read_text()
        time.sleep(0.1)
        assert (tmp_path / "n").read_text() == still
        with child.turn():
            wait_until(lambda: (tmp_path / "n").read_text() not in ("", still))
    wait_until(lambda: gone(worker_pid))


@pytest.mark.parametrize(("body", "error", "words"), [
    ("sys.exit('no more wind')", RunError, ["echo died (exit status 1) at: steps 3", "no more wind"]),
    ("import os; os.kill(os.getpid(), 9)", RunError, ["signal 9, out of memory?"]),
    ("print('noise\\nerror: the flag is wrong.\\nMend it.', file=sys.stderr); sys.exit(2)", UserError, ["the flag is wrong.\nMend it."]),
])  # fmt: skip
def test_a_death_is_told_with_the_end_of_its_messages(tmp_path, body, error, words):
    with python(tmp_path, body) as child, pytest.raises(error) as caught:
        child.do("steps 3")
    assert all(word in str(caught.value) for word in words)
    if error is UserError:
        assert str(caught.value) == words[0]


def test_a_death_before_the_first_answer(tmp_path):
    with pytest.raises(RunError, match="at: start(.|\n)*ModuleNotFoundError"):
        Process({"name": "x"}, tmp_path, [sys.executable, "-c", "import no_such_module_here"])


def test_memory_is_that_of_the_child_and_the_tree_has_its_workers_too(tmp_path):
    hold = "held = bytearray(b'x') * (40 << 20)"
    worker = f"{hold}; print(1, flush=True); input()"
    head = f"import subprocess\nw = subprocess.Popen([{sys.executable!r}, '-c', {worker!r}], stdin=-1, stdout=-1)\nw.stdout.readline()\n"
    with python(tmp_path, f"{hold}; print('{{}}', flush=True)", head) as child:
        small = child.peak_anon
        with child.sampling(0.005):
            child.do("grow")
        assert small < 40 < child.peak_anon < 70
        assert child.peak_tree > 80 and child.peak_rss > 80
        pid = child.process.pid
        assert memory_of(pid)[1] >= child.peak_anon * 0.99
    assert memory_of(pid) == (0.0, 0.0) and descendants(pid) == []


# ---- flags --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "words"), [
    (["--parts", "step,retreival"], ["retreival", "did you mean retrieval?"]),
    (["--parts", ","], ["--parts: empty"]),
    (["--users", "0"], ["--users: 0", "1 or more"]),
    (["--workers", "0", "-1"], ["--workers: -1"]),
    (["--widths", "32", "0"], ["--widths: 0"]),
    (["--data", "/no/such"], ["--data /no/such", "seq.jsonl"]),
    (["--parquet", "/no/such"], ["--parquet /no/such"]),
    (["--config", "no.yaml"], ["no.yaml: no such file"]),
    (["--json", "/no/such/x.json"], ["its folder does not exist"]),
])  # fmt: skip
def test_mistakes_in_flags(arguments, words):
    with pytest.raises(UserError) as caught:
        check(parse(arguments))
    assert all(word in str(caught.value) for word in words) and len(str(caught.value).splitlines()) <= 3


def test_sizes_of_flags():
    assert check(parse([])) == Sizes() and (Sizes().users, Sizes().items, Sizes().batch_size) == (100_000, 478_000, 128)
    assert check(parse(["--quick", "--users", "7", "--widths", "16", "8"])) == QUICK._replace(users=7, widths=[16, 8])
    flags = parse(["--parts", " step, loss"])
    check(flags)
    assert flags.parts == ["step", "loss"]


def test_statuses_and_messages():
    found = run_script("--parts", "stepp")
    assert (found.returncode, found.stdout) == (2, "") and found.stderr.startswith("error: --parts: 'stepp'")
    assert run_script("--no_such_flag").returncode == 2
    start = time.monotonic()
    assert run_script("--help").returncode == 0
    assert time.monotonic() - start < 1.5  # torch is not imported


# ---- the run ------------------------------------------------------------------------------------------------------------


def benchmark(tmp_path, *arguments, **methods):
    flags = parse(["--quick", "--cache", str(tmp_path), "--json", str(tmp_path / "out.json"), *arguments])
    run = Benchmark(flags, check(flags), tmp_path)
    machine = {f"machine.{key}": 1 for key in ("cpu", "cpus", "threads", "torch", "commit")} | {"users": 1, "items": 2}
    for name, method in (
        {"machine": lambda: run.results.update(machine), "prepare_data": lambda: None, "warm_store": lambda: None} | methods
    ).items():
        setattr(run, name, method)
    return run


def test_what_was_found_before_a_part_fails_is_kept(tmp_path):
    def fails():
        raise RunError("it broke")

    run = benchmark(tmp_path, "--parts", "compile,start", compile=lambda: run.results.update({"compile.mb_per_s": 80.0}), start=fails)
    with pytest.raises(RunError, match="it broke"):
        run.run()
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(REQUIRED_KEYS) <= found.keys() and found["compile.mb_per_s"] == 80.0 and found["start.seconds"] is None
    assert run.done == ["compile"] and "80 MB/s" in report(run)


def test_parts_come_in_the_order_that_lets_each_use_what_others_made(tmp_path):
    order = []
    names = ("compile", "start", "retrieval", "loss")
    methods = {name: lambda name=name: order.append(name) for name in names} | {"training": order.extend}
    benchmark(tmp_path, **methods).run()
    assert order == ["compile", "start", "step", "memory", "batches", "checkpoint", "retrieval", "loss"]
    order.clear()
    benchmark(tmp_path, "--parts", "loss,checkpoint", **methods).run()
    assert order == ["checkpoint", "loss"]


def test_the_fastest_number_of_workers_is_taken(tmp_path):
    """By steps after the first ones, which live on batches that loaders of several workers made while the model was made."""
    speeds, asked = {0: [9.0, 3.0, 3.1], 1: [9.0, 2.0, 2.2], 2: [1.0, 2.5, 2.4]}, []

    class Fake:
        def __init__(self, workers):
            self.workers = workers

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def do(self, command):
            asked.append(command)
            return {"steps": speeds[self.workers] if command == "steps 9" else [0.0]}

    run = benchmark(tmp_path, reference=Fake)
    assert run.best_workers() == 1
    assert run.results["reference.trial_2_workers_s"] == 2.4 and asked == ["steps 7", "steps 9"] * 3
    run.flags.workers = [2]
    assert run.best_workers() == 2


def test_without_faiss_its_figures_are_null_and_said_to_be_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_parts.importlib.util, "find_spec", lambda name: None)
    run = benchmark(tmp_path, "--parts", "retrieval", "--widths", "32")
    run.run()
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["retrieval.users_per_s"] > 0 and found["retrieval.faiss_users_per_s"] is None
    assert any("faiss is not installed" in note for note in found["notes"]) and "faiss is not installed" in report(run)


def test_a_script_that_fails_to_make_data_leaves_no_folder(tmp_path):
    run = benchmark(tmp_path)
    with pytest.raises(UserError, match="synthetic.py ended with status 2"):
        run.make(tmp_path / "data", lambda out: ["synthetic.py", out, "--users", 0, "--items", 10, "--layout", "jsonl"])
    assert not (tmp_path / "data").exists()


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A whole run of tiny sizes: (finished process, its JSON, cache folder)."""
    folder = tmp_path_factory.mktemp("benchmark")
    found = run_script("--quick", "--workers", 0, "--cache", folder / "cache", "--json", folder / "out.json")
    assert found.returncode == 0, found.stderr
    return SimpleNamespace(process=found, json=json.loads((folder / "out.json").read_text()), folder=folder)


def test_quick_run_has_every_figure(quick):
    assert set(REQUIRED_KEYS) <= quick.json.keys()
    numbers = {key: quick.json[key] for key in REQUIRED_KEYS}
    has_faiss = benchmark_parts.importlib.util.find_spec("faiss") is not None
    assert all(value > 0 for key, value in numbers.items() if has_faiss or "faiss" not in key), numbers
    assert not any(isinstance(value, dict) for value in quick.json.values())
    assert quick.json["train.ratio_min"] <= quick.json["train.ratio"] <= quick.json["train.ratio_max"]


def test_medians_can_be_checked_from_the_raw_times(quick):
    ours, theirs = quick.json["train.raw_s"], quick.json["reference.raw_s"]
    assert [len(turn) for turn in ours] == [QUICK.steps] * QUICK.rounds and [len(turn) for turn in theirs] == [3] * QUICK.rounds
    assert quick.json["train.ratio"] == pytest.approx(
        statistics.median(statistics.median(t) / statistics.median(o) for o, t in zip(ours, theirs))
    )
    assert quick.json["train.users_per_s"] == pytest.approx(QUICK.batch_size / median_of(ours))
    assert quick.json["reference.step_s"] == pytest.approx(median_of(theirs))
    assert 0 < quick.json["train.data_wait"] < 1


def test_both_sides_train_on_the_same_shape(quick):
    """Losses near two times ln 2 at the start, tables of about as many rows (the reference counts a padding row a table)."""
    assert 0.5 < quick.json["train.loss"] < 1.6 and 0.5 < quick.json["reference.loss"] < 1.6
    assert abs(quick.json["table.rows"] - quick.json["reference.rows"]) <= 60


def test_table_has_the_ratio_first_and_says_what_differs(quick):
    text = quick.process.stdout
    header = next(line for line in text.splitlines() if "ratio" in line)
    assert header.split()[:2] == ["ratio", "what"]
    for word in ("machine:", "torch", "attention dropout: ours off", "adam on the rows", "removes none", "configs/baseline.yaml"):
        assert word in text


def test_faiss_and_ours_agree(quick):
    pytest.importorskip("faiss")
    for width in QUICK.widths:
        assert quick.json[f"retrieval.{width}.checked"] > 300 and quick.json[f"retrieval.{width}.wrong"] == 0


def test_data_is_kept_and_nothing_else(quick):
    left = sorted(path.name for path in (quick.folder / "cache").iterdir())
    assert left == [f"beauty-{QUICK.beauty_users}x{QUICK.beauty_items}", f"jsonl-{QUICK.users}x{QUICK.items}", "stores"]


# A benchmark whose run starts two children with a worker each; the first stands still, the second is at work.
SIGNALLED = """
import sys, time
sys.path.insert(0, {root!r})
import benchmark
from benchmark_process import Process
from errors import run_cli

WORKER = "import os, time\\nparent = os.getppid()\\nprint(flush=True)\\nwhile os.getppid() == parent: time.sleep(0.01)"
CHILD = f"import subprocess, sys; worker = subprocess.Popen([sys.executable, '-c', {{WORKER!r}}], stdout=-1); worker.stdout.readline()"
CHILD += "; print('{{}}', flush=True); sys.stdin.read()"

def run(self):
    first, second = (Process({{"name": name}}, self.work, [sys.executable, "-c", CHILD]) for name in "ab")
    with first, second, second.turn():
        print("ready", flush=True)
        time.sleep(60)

benchmark.Benchmark.run = run
flags = benchmark.parse(["--cache", {cache!r}])
sys.exit(run_cli(lambda: benchmark.main(flags)))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_children_too(tmp_path, number):
    code = SIGNALLED.format(root=str(ROOT), cache=str(tmp_path / "cache"))
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
    with parent:
        assert parent.stdout.readline() == "ready\n", parent.stderr.read()
        children = descendants(parent.pid)
        assert len(children) == 4
        parent.send_signal(number)
        assert parent.wait(timeout=20) == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
        wait_until(lambda: all(map(gone, children)))
    assert number == signal.SIGKILL or not list((tmp_path / "cache").iterdir())  # the work folder
