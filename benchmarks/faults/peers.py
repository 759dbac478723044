"""One process of several fails: how long the others stay."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults.runs import (
    HANG,
    HEARTBEAT,
    PATIENCE,
    Group,
    Place,
    Result,
    differences,
    running_group,
    saved_steps,
    spread,
    start_group,
    steps_made,
    wait_until,
)
from lckv_jax.errors import BUG, HUNG, PEER_FAILED, STOPPED

SLACK = 5.0  # seconds that a process may need to end


def _fresh(place: Place, name: str, number: int) -> Path:
    """The folder of a run, which is not there yet."""
    out = place.folder / f"peer-{name}-{number}"
    shutil.rmtree(out, ignore_errors=True)
    out.with_suffix(".stamp").unlink(missing_ok=True)
    return out


def _signalled(place: Place, out: Path, index: int, number: int, choose: random.Random) -> tuple[float, Group]:
    """Sends a signal to one process amid the steps; seconds until all others (SIGTERM: all) had ended."""
    group = running_group(place, out, choose.randrange(4, 30), "processes.hang_seconds=600")  # not the watchdog
    group.processes[index].send_signal(number)
    sent = time.monotonic()
    others = [process for i, process in enumerate(group.processes) if number == signal.SIGTERM or i != index]
    wait_until(lambda: all(process.poll() is not None for process in others), "the others to end", pause=0.005)
    return time.monotonic() - sent, group


def _injected(place: Place, out: Path, kind: str, index: int, choose: random.Random) -> tuple[float, Group]:
    """A fault inside one process; seconds from it until all processes had ended."""
    stamp = out.with_suffix(".stamp")
    fault = {"kind": kind, "process": index, "step": choose.randrange(20, 60), "stamp": str(stamp)}
    group = start_group(place, out, fault=fault)
    wait_until(lambda: stamp.exists() or None not in group.codes(), "the fault")
    happened = time.monotonic()
    group.wait()
    return time.monotonic() - happened, group


Trial = Callable[[Place, Path, int, random.Random], tuple[float, Group]]


def _killed(place: Place, out: Path, index: int, choose: random.Random) -> tuple[float, Group]:
    return _signalled(place, out, index, signal.SIGKILL, choose)


def _frozen(place: Place, out: Path, index: int, choose: random.Random) -> tuple[float, Group]:
    return _signalled(place, out, index, signal.SIGSTOP, choose)


def _stopped(place: Place, out: Path, index: int, choose: random.Random) -> tuple[float, Group]:
    return _signalled(place, out, index, signal.SIGTERM, choose)


def _raised(place: Place, out: Path, index: int, choose: random.Random) -> tuple[float, Group]:
    return _injected(place, out, "raise", index, choose)


def _hung(place: Place, out: Path, index: int, choose: random.Random) -> tuple[float, Group]:
    return _injected(place, out, "hang", index, choose)


def _try(place: Place, rounds: int, seed: int, trial: Trial, check: Callable[[Group, Path, int], str]) -> list[dict]:
    """Rounds of a trial, on each process in turn. check: of the processes, the run, the process: what is wrong."""
    choose = random.Random(seed)
    done = []
    for number in range(rounds):
        index, out = number % place.processes, _fresh(place, trial.__name__.strip("_"), number)
        seconds, group = trial(place, out, index, choose)
        try:
            wrong = check(group, out, index)
        finally:
            group.end()
        done.append({"process": index, "seconds": seconds, "codes": group.codes(), "wrong": wrong})
        print(f"{number + 1}: process {index}: gone after {seconds:.1f} s, codes {group.codes()} {wrong}", flush=True)
    return done


def _result(fault: str, promise: str, done: list[dict], limit: float) -> Result:
    wrong = [f"round {number}: {what['wrong']}" for number, what in enumerate(done, 1) if what["wrong"]]
    seconds = [what["seconds"] for what in done]
    codes = sorted({code for what in done for code in what["codes"] if code is not None})
    found = f"gone after {spread(seconds)}, exit codes {', '.join(map(str, codes))}"
    kept = not wrong and max(seconds) <= limit
    return Result(fault, promise, len(done), "; ".join([found, *wrong]), kept, {"rounds": done, "limit": limit})


def killed_peer(place: Place, rounds: int, seed: int) -> Result:
    def check(group: Group, out: Path, index: int) -> str:
        others = [code for i, code in enumerate(group.codes()) if i != index]
        return "" if set(others) == {PEER_FAILED} else f"the others ended with {others}"

    done = _try(place, rounds, seed, _killed, check)
    limit = HEARTBEAT + SLACK
    return _result("`kill -9` of one process", f"the others end ({PEER_FAILED}) within heartbeat + 5 s", done, limit)


def frozen_peer(place: Place, rounds: int, seed: int) -> Result:
    def check(group: Group, out: Path, index: int) -> str:
        others = [code for i, code in enumerate(group.codes()) if i != index]
        return "" if set(others) <= {PEER_FAILED, HUNG} else f"the others ended with {others}"

    done = _try(place, rounds, seed, _frozen, check)
    limit = HEARTBEAT + SLACK
    return _result("one process frozen (SIGSTOP)", "the others end within heartbeat + 5 s", done, limit)


def hang(place: Place, rounds: int, seed: int) -> Result:
    def check(group: Group, out: Path, index: int) -> str:
        if group.codes()[index] != HUNG:
            return f"the hanging process ended with {group.codes()[index]}"
        return "" if "inject.py" in group.text(index) else "the stack of the hanging process does not show where it is"

    done = _try(place, rounds, seed, _hung, check)
    return _result(
        "one process hangs in host code",
        f"all end within the watchdog's time + 5 s, with their stacks ({HUNG})",
        done,
        HANG + SLACK,
    )


def exception(place: Place, rounds: int, seed: int) -> Result:
    def check(group: Group, out: Path, index: int) -> str:
        if set(group.codes()) != {BUG}:
            return f"exit codes {group.codes()}"
        if not all("a fault was injected" in group.text(i) for i in range(place.processes)):
            return "not every process told why"
        return "" if (out / "FATAL").is_file() else "there is no FATAL"

    done = _try(place, rounds, seed, _raised, check)
    return _result("an exception in one process", f"all end within 2 s, with its words ({BUG})", done, 2.0)


def sigterm(place: Place, rounds: int, seed: int) -> Result:
    def check(group: Group, out: Path, index: int) -> str:
        if set(group.codes()) != {STOPPED}:
            return f"exit codes {group.codes()}"
        stopped, saved = steps_made(out), saved_steps(out)
        if saved[:1] != [stopped]:
            return f"stopped after step {stopped}, but the newest checkpoint is {saved[:1]}"
        rest = start_group(place, out)
        if set(rest.wait(PATIENCE)) != {0}:
            return f"started again, it ended with {rest.codes()}"
        return ", ".join(differences(place, out))

    done = _try(place, rounds, seed, _stopped, check)
    return _result(
        "SIGTERM to one process",
        f"all stop at one step, save it and end ({STOPPED}) within 10 s; the end is bit-identical",
        done,
        10.0,
    )
