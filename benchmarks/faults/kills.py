"""`kill -9` at random moments, of one process, of all, of the launcher; the launcher starts the run again."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults.runs import (
    PATIENCE,
    Place,
    Result,
    check_code,
    differences,
    is_saving,
    resumed_from,
    saved_steps,
    wait_until,
)
from lckv_jax.train.metrics import read_metrics

MOMENTS = ("start", "step", "save", "save")  # while it starts, among steps, while a checkpoint is written
VICTIMS = ("first", "last", "all", "launcher")


class Finished(Exception):
    """The run ended before it could be killed."""


class Victim:
    """One run under its launcher, killed and started again until it is done."""

    def __init__(self, place: Place, number: int, choose: random.Random) -> None:
        self.place, self.choose = place, choose
        self.out, self.log = place.folder / f"killed-{number}", place.folder / f"killed-{number}.log"
        shutil.rmtree(self.out, ignore_errors=True)
        self.log.unlink(missing_ok=True)
        self.launcher: subprocess.Popen[bytes] | None = None
        self.read = 0  # bytes of the log
        self.saved = -1  # the newest checkpoint at the last kill
        self.lost = self.unusable = self.resumed = 0

    def kill_once(self) -> dict:
        """One kill, and what it hit. Raises Finished if the run is done before."""
        if self.launcher is None:
            self.launcher = self.place.launch(self.out, self.log, "train.keep_best=0", retries=10**6)
        wait_until(lambda: self._ended() or len(self._children()) == self.place.processes, "processes to start")
        victims, moment, victim = self._children(), self.choose.choice(MOMENTS), self.choose.choice(VICTIMS)
        self._wait_for(moment)
        self._check_running()
        during_save = is_saving(self.out)
        for pid in {"first": victims[:1], "last": victims[-1:], "all": victims}.get(victim, [self.launcher.pid]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        if victim == "launcher":
            self.launcher.wait()
            self.launcher = None
        wait_until(lambda: not any(map(_is_alive, victims)), "the others to end", pause=0.005)
        gone = time.monotonic() - killed
        self._look_back()
        self.saved = max(saved_steps(self.out), default=-1)
        return {"moment": moment, "victim": victim, "save": during_save, "gone": gone, "saved": self.saved}

    def finish(self) -> dict:
        """Lets the run end, undisturbed from now on; its last account."""
        if self.launcher is None:
            self.launcher = self.place.launch(self.out, self.log, "train.keep_best=0")
        check_code(self.launcher.wait(timeout=PATIENCE), 0, self.log)
        self._look_back()
        return read_metrics(self.out / "metrics.jsonl")[-1]

    def _wait_for(self, moment: str) -> None:
        if moment == "start":
            time.sleep(self.choose.uniform(0.0, 6.0))
            return
        file = self.out / "metrics.jsonl"
        before = _stamp(file)  # a new stretch writes it anew
        self._wait(lambda: _stamp(file) not in (before, None), "the first step")
        if moment == "step":
            time.sleep(self.choose.uniform(0.0, 2.0))
        else:
            for _ in range(self.choose.randrange(3)):  # of the first to the third save
                self._wait(lambda: is_saving(self.out), "a save", pause=0.001)
                self._wait(lambda: not is_saving(self.out), "its end", pause=0.001)
            self._wait(lambda: is_saving(self.out), "a save", pause=0.001)
            time.sleep(self.choose.uniform(0.0, 0.3))

    def _wait(self, condition: Callable[[], object], what: str, pause: float = 0.02) -> None:
        wait_until(lambda: condition() or self._ended(), what, pause=pause)
        self._check_running()

    def _check_running(self) -> None:
        if self._ended():
            raise Finished

    def _ended(self) -> bool:
        return self.launcher is not None and self.launcher.poll() is not None

    def _children(self) -> list[int]:
        """The processes of the run; not those of the last attempt, killed but not yet seen dead by the launcher."""
        assert self.launcher is not None
        try:
            children = Path(f"/proc/{self.launcher.pid}/task/{self.launcher.pid}/children").read_text().split()
        except FileNotFoundError:
            return []
        return sorted(pid for pid in map(int, children) if _is_alive(pid))

    def _look_back(self) -> None:
        """Whether the stretch that has ended began at the newest checkpoint of its time."""
        text = self.log.read_bytes()[self.read :].decode(errors="replace")
        self.read += len(text.encode())
        self.unusable += text.count("is unusable")
        start = resumed_from(text)
        if start is None and re.search(r"step +1/", text):
            start = -1  # from the beginning
        if start is not None:
            self.resumed += 1
            self.lost += start < self.saved


def _stamp(file: Path) -> int | None:
    with contextlib.suppress(FileNotFoundError):
        return file.stat().st_ino
    return None


def _is_alive(pid: int) -> bool:
    """Also not a zombie, whose parent has yet to look."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kills(place: Place, rounds: int, seed: int) -> Result:
    """So many kills, of as many runs as it takes; each run ends and is compared with the undisturbed one."""
    choose = random.Random(seed)
    runs: list[Victim] = []
    done: list[dict] = []
    differing: list[str] = []
    accounts: list[dict] = []
    while len(done) < rounds:
        run = Victim(place, len(runs), choose)
        runs.append(run)
        with contextlib.suppress(Finished):
            while len(done) < rounds:
                done.append(run.kill_once())
                hit = done[-1]
                print(
                    f"{len(done)}: {hit['victim']} killed, {hit['moment']}{' (saving)' * hit['save']}; the others gone "
                    f"after {hit['gone']:.1f} s; run {len(runs)} has saved step {hit['saved']}",
                    flush=True,
                )
        accounts.append(run.finish())
        differing += [f"run {len(runs)}: {what}" for what in differences(place, run.out)]
        print(f"run {len(runs)} is done: {differing or 'bit-identical'}", flush=True)
    lost, unusable = sum(run.lost for run in runs), sum(run.unusable for run in runs)
    saves = sum(hit["save"] for hit in done)
    again = sum(account["lost_steps"] for account in accounts)
    found = (
        f"{len(done)} kills ({saves} during saves), {sum(run.resumed for run in runs)} stretches: {lost} began before "
        f"the newest checkpoint, {unusable} half checkpoints met; {len(runs)} runs ended, "
        f"{len({what.partition(':')[0] for what in differing})} of them not bit-identical; {again} steps made again"
    )
    return Result(
        "`kill -9` of the first, the last, all processes or the launcher, at random moments, also during saves",
        "goes on from the newest checkpoint; the end is bit-identical",
        rounds,
        found,
        not (lost or unusable or differing),
        {"kills": done, "differing": differing, "accounts": accounts},
    )
