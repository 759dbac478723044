"""Where the time of a whole run goes: the parts add up to wall time, whatever is killed and made again."""

import math
import random

import pytest
from test_train import Killed, killed_at

from lckv_jax.config import load_config
from lckv_jax.train.clock import Clock
from lckv_jax.train.goodput import PARTS, Account, is_account, past
from lckv_jax.train.loop import train
from lckv_jax.train.metrics import MetricsFile, read_metrics

WORK = ("data", "step", "evaluation", "checkpoint")


class Run:
    """A run whose time is told, not spent, with books of its own: (step, part, seconds) of all that happened."""

    def __init__(self, path, seed):
        self.path, self.random = path, random.Random(seed)
        self.began = self.alive = self.now = 1e9 + self.random.random()
        self.done, self.lost_steps, self.saved, self.stretches = [], 0, [0], 0

    def spend(self, step, part):
        seconds = self.random.uniform(0.0, 9.0)
        self.now += seconds
        self.done.append((step, part, seconds))

    def stretch(self, start, stop, lost):
        """Goes on from `start`; dies, without a word, soon after the last record of `stop` steps."""
        if self.stretches:
            self.done.append((-1, "down", self.now - self.alive))
        self.stretches += 1
        lost_work = [step > start and part in WORK for step, part, _ in self.done]
        self.done = [(-1, "lost", done[2]) if gone else done for gone, done in zip(lost_work, self.done, strict=True)]
        self.lost_steps += lost
        clock = Clock(lambda: self.now)
        self.spend(start, "start")
        clock.lap("start")
        account = Account(read_metrics(self.path), start, clock, lambda: self.now)
        file = MetricsFile(self.path, start, account.record(start))
        self.alive = self.now
        for step in range(start + 1, stop + 1):
            if step > start + 1:
                self.spend(step, "data")
            wait = clock.lap("data")
            part = "step" if step > start + 1 else "compile"
            self.spend(step, part)
            file.write({"step": step, "loss": 1.0, "data_wait": wait, "seconds": wait + clock.lap(part)})
            if step % 3 == 0:
                self.spend(step, "evaluation")
                clock.lap("evaluation")
                if step % 6 == 0:
                    self.spend(step, "checkpoint")
                    self.saved = [s for s in self.saved if s < step] + [step]
                stall = clock.lap("checkpoint")
                file.write(account.record(step, **(account.save_begun(stall) if step % 6 == 0 else {})))
            self.alive = self.now
        file.close()
        self.now += self.random.uniform(0.0, 30.0)

    def told(self):
        """Seconds by the books, from the last sign of life backwards."""
        return {part: math.fsum(s for _, p, s in self.done if p == part) for part in PARTS}


@pytest.mark.parametrize("seed", range(20))
def test_the_parts_add_up_whatever_happens(tmp_path, seed):
    """Killed again and again, resumed from any checkpoint, also one before the newest."""
    run = Run(tmp_path / "metrics.jsonl", seed)
    start = made = 0
    for _ in range(8):
        lost = made - start
        made = start + run.random.randrange(20)
        run.stretch(start, made, lost)
        start = run.random.choice([step for step in run.saved if step <= made])
        want = run.told()
        before = past(read_metrics(run.path), made)
        assert before.seconds == pytest.approx(want, abs=1e-2)
        assert sum(before.seconds.values()) == pytest.approx(run.alive - run.began, abs=1e-2)
        assert before.ended == pytest.approx(run.alive, abs=1e-2)
        assert (before.lost_steps, before.stretches) == (run.lost_steps, run.stretches)
        after = past(read_metrics(run.path), start)
        moved = math.fsum(s for step, part, s in run.done if step > start and part in WORK)
        assert after.seconds["lost"] == pytest.approx(want["lost"] + moved, abs=1e-2)
        assert sum(after.seconds.values()) == pytest.approx(run.alive - run.began, abs=1e-2)
        assert after.lost_steps == run.lost_steps + made - start


def account(records, start, *, at=1000.0):
    """The account of a stretch that has been starting for 10 s when the clock on the wall says `at`."""
    times = iter([0.0, 10.0])
    clock = Clock(lambda: next(times))
    clock.lap("start")
    return Account(records, start, clock, lambda: at)


def test_the_time_between_two_stretches():
    first = account([], 0, at=1000.0).record(0)
    assert first["time"] == dict.fromkeys(PARTS, 0.0) | {"start": 10.0}
    assert (first["goodput"], first["stretches"], first["lost_steps"], first["at"]) == (0.0, 1, 0, 1000.0)
    step = {"step": 1, "seconds": 5.0, "data_wait": 1.0}
    second = account([first, step], 0, at=1100.0).record(0)  # alive until 1005, back since 1090
    assert second["time"] == dict.fromkeys(PARTS, 0.0) | {"start": 20.0, "compile": 5.0, "down": 85.0}
    assert (second["stretches"], second["lost_steps"]) == (2, 1)


def test_a_clock_that_was_set_back_takes_no_time_away():
    first = account([], 0, at=1000.0).record(0)
    assert account([first], 0, at=500.0).record(0)["time"] == dict.fromkeys(PARTS, 0.0) | {"start": 20.0}


def test_a_finished_run_was_not_down():
    end = account([], 0).record(9, done=True)
    assert account([end], 9, at=9000.0).record(9)["time"]["down"] == 0.0


def test_a_run_from_before_there_were_accounts():
    records = [{"step": step, "seconds": 2.0, "data_wait": 0.5} for step in range(1, 7)]
    records.insert(3, {"step": 3, "valid_loss": 1.0})
    told = account(records, 4).record(4)
    parts = {"start": 10.0, "compile": 2.0, "data": 1.5, "step": 4.5, "lost": 4.0}
    assert told["time"] == dict.fromkeys(PARTS, 0.0) | parts
    assert (told["stretches"], told["lost_steps"]) == (2, 2)


def test_how_long_a_save_takes():
    times = iter([0.0, 2.0, 3.0, 7.0, 7.5, 9.0])
    clock = Clock(lambda: next(times))
    told = Account([], 0, clock)
    assert told.saved(in_progress=False) == {}
    clock.lap("step")
    assert told.save_begun(clock.lap("checkpoint")) == {"save_stall": 1.0}
    clock.lap("step")
    assert told.saved(in_progress=True) == {}
    assert told.saved(in_progress=False) == {"save_seconds": 5.0}
    assert told.saved(in_progress=False) == {}
    assert told.save_begun(clock.lap("checkpoint")) == {"save_stall": 0.5}
    assert told.save_begun(clock.lap("checkpoint")) == {"save_stall": 1.5, "save_seconds": 2.0}  # it waited for that


def test_a_killed_and_resumed_run_tells_what_it_lost(tiny_config, tmp_path, monkeypatch, capsys):
    config = load_config(tiny_config, ["train.steps=8", "train.save_every=4"])
    with monkeypatch.context() as patch:
        killed_at(patch, 7)  # steps 5 and 6 are recorded; the checkpoint is of step 4
        with pytest.raises(Killed):
            train(config)
    before = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert before[-1]["step"] == 6
    capsys.readouterr()
    train(config)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("time")]
    for part in ("8 steps in 2 stretches", "(goodput)", "(2 steps made again)", "down", "start", "compile"):
        assert part in line
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 9))
    accounts = [record for record in records if is_account(record)]
    assert [record["step"] for record in accounts] == [0, 3, 4, 4, 6, 8, 8]
    assert [("save_stall" in record) for record in accounts] == [False, False, True, False, False, True, False]
    assert any("save_seconds" in record for record in records)
    first, last = accounts[0], accounts[-1]
    assert sum(last["time"].values()) == pytest.approx(first["time"]["start"] + last["at"] - first["at"], abs=0.05)
    assert last["time"]["lost"] >= sum(r["seconds"] for r in before if r["step"] > 4 and "seconds" in r) - 1e-3
    assert last["goodput"] == pytest.approx(last["time"]["step"] / sum(last["time"].values()), abs=1e-3)
    assert last["done"] and last["lost_steps"] == 2
