"""docs/RELIABILITY.md, rows 1, 4 and 12: runs that are killed, interrupted and resumed end as if nothing had happened."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from reliability_world import Runs, final_files, make_trainer, rounds
from tiny import tiny_store

import checkpoint as checkpoints

pytestmark = pytest.mark.reliability


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    made: dict[int, Runs] = {}

    def of(steps: int) -> Runs:
        if steps not in made:
            made[steps] = Runs(tmp_path_factory.mktemp(f"runs{steps}"), steps)
        return made[steps]

    yield of
    for runs in made.values():
        runs.driver.close()


@pytest.mark.parametrize("count", rounds(50, 2))
def test_kill_9_at_random_moments(worlds, count):
    """Row 1: a fifth of the kills inside a save, at a random write, fsync or rename of it."""
    steps = 600 if count > 5 else 60
    runs, chance = worlds(steps), random.Random(1)
    killed = {"in a save": 0, "elsewhere": 0}
    in_saves = max(1, count // 5)
    wanted = {"in a save": in_saves, "elsewhere": count - in_saves}
    number = 0
    while killed != wanted and number < 3 * count:
        name, number = f"killed{number}", number + 1
        where = "in a save" if killed["in a save"] < in_saves else "elsewhere"
        how: dict = {"after": chance.uniform(0.0, runs.seconds)}
        if where == "in a save":  # a save of this run makes some 620 writes, 5 fsyncs and a rename
            kind = chance.choice(["write", "fsync", "rename"])
            how = {"in_save": [chance.randint(1, steps // 25), kind, chance.randint(1, {"write": 600, "fsync": 5, "rename": 1}[kind])]}
        done = runs.run(name, signal=int(signal.SIGKILL), **how)
        assert where == "elsewhere" or done["status"] == -signal.SIGKILL, how
        killed[where] += done["status"] == -signal.SIGKILL
        if done["status"] == 0:  # the first runs were slower: they met other work
            runs.seconds = min(runs.seconds, done["seconds"])
        runs.went_on_exactly(name)
    assert killed == wanted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("count", rounds(20, 1))
def test_signals_at_random_moments(worlds, number, count):
    """Row 12: at any moment from the first step to the last byte of the report; each point: test_reliability_signals.py."""
    runs, chance = worlds(600 if count > 5 else 60), random.Random(int(number))
    interrupted = turn = 0
    while interrupted < count and turn < 3 * count:
        name, turn = f"signal{number}-{turn}", turn + 1
        done = runs.run(name, signal=int(number), after=chance.uniform(0.0, 1.0) * runs.seconds)
        if done["exit_seconds"] is None:
            continue  # it was done before
        assert done["exit_seconds"] < 10
        if done["status"] == 0:
            continue  # the signal came behind the last line
        assert done["status"] == 128 + number, (done, (runs.cwd / name / "console").read_text()[-2000:])
        state = runs.status(name)["state"]
        assert state == "interrupted" or (state == "finished" and runs.is_tested(name))  # in the report: that alone is missing
        interrupted += state == "interrupted"
        runs.went_on_exactly(name)
    assert interrupted == count


class TestAnotherNumberOfWorkers:
    """Row 4."""

    @pytest.mark.parametrize("count", rounds(20, 5))
    def test_no_id_is_repeated_or_lost(self, tmp_path, count):
        store, chance = tiny_store(num_users=60, num_items=30, max_events=8), random.Random(4)
        settings = {"batch_size": 3, "num_epochs": 1}

        def seen_by(folder: Path, workers: int, resume_from: Path | None, stop: int | None) -> list:
            trainer = make_trainer(folder, resume_from, store, num_workers=workers, **settings)
            users, accumulate = [], trainer._accumulate

            def note(batch, features):
                users.append(batch.users.tolist())
                accumulate(batch, features)
                if stop is not None and trainer.step + 1 == stop:
                    trainer.stop_signal = signal.SIGTERM

            trainer._accumulate = note
            trainer.fit()
            return users

        whole = seen_by(tmp_path / "whole", 0, None, None)
        assert len(whole) == 20 and sorted(user for batch in whole for user in batch) == list(range(60))
        for turn in range(count):
            first, second = sorted(chance.sample(range(1, 20), 2))
            workers, folder = chance.sample([0, 1, 2, 3], 3), tmp_path / f"r{turn}"
            users = seen_by(folder, workers[0], None, first)
            users += seen_by(folder, workers[1], checkpoints.newest_valid(folder), second)
            users += seen_by(folder, workers[2], checkpoints.newest_valid(folder), None)
            assert users == whole, (first, second, workers)
            assert final_files(folder) == final_files(tmp_path / "whole")


@pytest.mark.fast
def test_a_signal_in_a_long_evaluation_does_not_wait_for_its_end(tmp_path, monkeypatch):
    """Row 12: an evaluation may take minutes. What was cut short is due again when the run goes on, and nothing else changes."""
    import os

    import trainer as trainer_module

    whole = make_trainer(tmp_path / "whole")
    whole.fit()
    stopped = make_trainer(tmp_path / "stopped")
    rank, calls = trainer_module.Ranker.rank, []

    def slow(self, *args, **more):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return rank(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.Ranker, "rank", slow)
        stopped.fit()
    assert stopped.stop_signal == signal.SIGTERM and stopped.evaluated_step == -1 and stopped.step == 5
    resumed = make_trainer(tmp_path / "stopped", resume_from=checkpoints.newest_valid(tmp_path / "stopped"))
    resumed.fit()
    assert final_files(tmp_path / "stopped") == final_files(tmp_path / "whole")
