"""A disk that is full or read-only for a while, and a clock that is set: nothing that was saved is lost."""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.faults.runs import (
    Place,
    Result,
    check_code,
    differences,
    running_group,
    saved_steps,
    start_group,
)
from lckv_jax.errors import MISTAKE
from lckv_jax.train.metrics import read_metrics

SIZE = 64  # MiB


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of SIZE in memory, mounted at `folder`; only root may do that."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        sys.exit("this row mounts a small file system, which needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _fill(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / "filler").open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()


def _freeze(folder: Path) -> None:
    """Makes the checkpoints read-only for whoever opens a file of them from now on."""
    target = str(folder / "run" / "checkpoints")
    subprocess.run(["mount", "--bind", target, target], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", target], check=True)


def _thaw(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder / "run" / "checkpoints")], check=True)


def _survive(
    place: Place, rounds: int, seed: int, spoil: Callable[[Path], object], mend: Callable[[Path], object], words: str
) -> tuple[list[str], list[dict]]:
    """Spoils the disk amid the steps, mends it when the run has ended, and lets it go on; what is wrong, and facts."""
    choose, wrong, done = random.Random(seed), [], []
    for number in range(1, rounds + 1):
        with small_disk(place.folder / "disk") as disk:
            out = disk / "run"
            step = choose.randrange(10, 60)
            group = running_group(place, out, step)
            spoil(disk)
            codes = group.wait()
            mend(disk)
            before = saved_steps(out)
            if set(codes) != {MISTAKE}:
                wrong.append(f"round {number}: exit codes {codes}")
            if not any(words in group.text(process) for process in range(place.processes)):
                wrong.append(f"round {number}: the reason is not told")
            log = place.folder / "disk.log"
            check_code(place.launch(out, log).wait(), 0, log)
            resumed = [line for line in log.read_text().splitlines() if "resuming" in line][-1:]
            if before and not (resumed and resumed[0].endswith(f"step {before[0]}")):
                wrong.append(f"round {number}: saved {before}, but {resumed}")
            wrong += [f"round {number}: {what} differs" for what in differences(place, out)]
            done.append({"step": step, "codes": codes, "saved": before})
            print(f"{number}: spoilt at step {step}: exit codes {codes}, saved {before[:1]} {wrong}", flush=True)
    return wrong, done


def disk_full(place: Place, rounds: int, seed: int) -> Result:
    wrong, done = _survive(
        place, rounds, seed, _fill, lambda disk: (disk / "filler").unlink(), "No space left on device"
    )
    return Result(
        "the disk is full during a save",
        f"ends with the reason ({MISTAKE}); goes on from the newest checkpoint; the end is bit-identical",
        rounds,
        "; ".join(wrong) or f"{rounds} of {rounds} told, resumed and bit-identical",
        not wrong,
        {"rounds": done},
    )


def read_only(place: Place, rounds: int, seed: int) -> Result:
    wrong, done = _survive(place, rounds, seed, _freeze, _thaw, "Read-only file system")
    return Result(
        "the folder of the checkpoints becomes read-only",
        f"ends with the reason ({MISTAKE}); goes on from the newest checkpoint; the end is bit-identical",
        rounds,
        "; ".join(wrong) or f"{rounds} of {rounds} told, resumed and bit-identical",
        not wrong,
        {"rounds": done},
    )


def clock(place: Place, rounds: int, seed: int) -> Result:
    """The time of day jumps by up to a week to either side amid the steps, in every process."""
    choose, wrong, done = random.Random(seed), [], []
    for number in range(1, rounds + 1):
        out = place.folder / f"clock-{number}"
        shutil.rmtree(out, ignore_errors=True)
        jump = choose.choice((-1, 1)) * choose.uniform(60, 7 * 86400)
        fault = {"kind": "clock", "process": None, "step": choose.randrange(5, 60), "seconds": jump}
        codes = start_group(place, out, fault=fault | {"stamp": str(out.with_suffix(".stamp"))}).wait()
        if set(codes) != {0}:
            wrong.append(f"round {number} ({jump:+.0f} s before step {fault['step']}) ended with {codes}, and went on")
            log = place.folder / "clock.log"
            check_code(place.launch(out, log).wait(), 0, log)
        wrong += [f"round {number}: {what} differs" for what in differences(place, out)]
        account = read_metrics(out / "metrics.jsonl")[-1]
        if min(account["time"].values()) < 0 or not 0 <= account["goodput"] <= 1:
            wrong.append(f"round {number}: account {account}")
        done.append(fault | {"codes": codes})
        print(f"{number}: {jump:+.0f} s before step {fault['step']}: exit codes {codes} {wrong}", flush=True)
    return Result(
        "the clock is set to another time, up to a week off",
        "the run does not mind, no time is negative; the end is bit-identical",
        rounds,
        "; ".join(wrong) or f"{rounds} of {rounds} bit-identical",
        not wrong,
        {"rounds": done},
    )
