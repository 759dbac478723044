"""Tiny runs of several processes, to be disturbed: how they are started, and what they leave behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from benchmarks.kill_and_resume import CLOCKS
from launch import local
from lckv_jax import checkpoint
from lckv_jax.step_folder import list_steps, read_meta
from lckv_jax.train.goodput import is_account
from lckv_jax.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent.parent
HEARTBEAT, HANG = 10, 8  # seconds, of `processes` in the config
STEPS, SAVE_EVERY = 120, 6
PATIENCE = 300.0  # seconds for anything that should happen: the machine may be busy

CONFIG = """
out: {folder}/run
model: {{vocab_size: 264, hidden_size: 32, intermediate_size: 48, num_layers: 4, num_heads: 4, num_kv_heads: 2,
        head_dim: 8, sharing: "0_2_2_3", no_grad_passes: 1, grad_passes: 1, remat: none}}
data: {{sources: ["{text}/[ab]*.py"], tokenizer: bytes, folder: {folder}/data, validation_fraction: 0.2, seq_len: 32,
       batch_size: 4}}
optimizer: {{learning_rate: 1.0e-2, warmup_steps: 2}}
train: {{steps: {steps}, log_every: 1, eval_every: {eval_every}, eval_batches: 2, save_every: {save_every}}}
processes: {{heartbeat_seconds: {heartbeat}, hang_seconds: {hang}, shutdown_seconds: 10}}
mesh: {{data: 1, fsdp: -1}}
"""


class Result(NamedTuple):
    """What a row of the table says. found: in words, with the numbers. kept: whether the promise was."""

    fault: str
    promise: str
    rounds: int
    found: str
    kept: bool
    details: dict


class Place(NamedTuple):
    """A folder with a config, its data, a compilation cache, and how many processes and devices runs in it have."""

    folder: Path
    processes: int = 2
    devices: int = 1  # pretended, of each process

    @property
    def reference(self) -> Path:
        """The undisturbed run, which keeps every checkpoint."""
        return self.folder / "reference"

    def environment(self) -> dict[str, str]:
        """No variable of JAX but these."""
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
        return plain | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(self.devices),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "PYTHONPATH": str(ROOT),
        }

    def command(self, out: Path, *overrides: str, module: str = "lckv_jax") -> list[str]:
        config = str(self.folder / "config.yaml")
        return [sys.executable, "-u", "-m", module, "train", config, f"out={out}", *overrides]

    def launch(self, out: Path, log: Path, *overrides: str, retries: int = 0) -> subprocess.Popen[bytes]:
        """The launcher of a run, which starts it again as often as `retries` says without progress."""
        launcher = [sys.executable, str(ROOT / "launch" / "local.py"), "-n", str(self.processes)]
        launcher += ["--restarts-without-progress", str(retries), "--"]
        with log.open("ab") as file:
            return subprocess.Popen(
                [*launcher, *self.command(out, *overrides)],
                env=self.environment(),
                cwd=ROOT,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )


def prepare(folder: Path, processes: int, devices: int) -> Place:
    """A place with its data, a warm compilation cache and an undisturbed run; what is there already is kept."""
    place = Place(folder, processes, devices)
    folder.mkdir(parents=True, exist_ok=True)
    text = Path(os.__file__).parent
    (folder / "config.yaml").write_text(
        CONFIG.format(
            folder=folder,
            text=text,
            steps=STEPS,
            eval_every=STEPS // 2,
            save_every=SAVE_EVERY,
            heartbeat=HEARTBEAT,
            hang=HANG,
        )
    )
    if not (place.reference / "checkpoints" / str(STEPS)).exists():
        started = time.monotonic()
        log = folder / "reference.log"
        launcher = place.launch(place.reference, log, f"train.keep={STEPS}")
        check_code(launcher.wait(timeout=PATIENCE), 0, log)
        print(f"undisturbed: {STEPS} steps in {time.monotonic() - started:.0f} s", flush=True)
    return place


def check_code(code: int, wanted: int, log: Path) -> None:
    """Ends the harness, with the last lines of the log, if a run ended otherwise than it must."""
    if code != wanted:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
        sys.exit(f"exit code {code} instead of {wanted}; the end of {log}:\n" + "\n".join(tail))


def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE, pause: float = 0.02) -> None:
    """Raises TimeoutError if `condition` does not come true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(pause)


def saved_steps(out: Path) -> list[int]:
    """The committed checkpoints of a run, newest first, as its own code lists them."""
    folder = out / "checkpoints"
    return list_steps(epath.Path(folder)) if folder.is_dir() else []


def is_saving(out: Path) -> bool:
    return any((out / "checkpoints").glob("*.orbax-checkpoint-tmp"))


def steps_made(out: Path) -> int:
    return max((record["step"] for record in read_metrics(out / "metrics.jsonl")), default=0)


def differences(place: Place, out: Path) -> list[str]:
    """In what a finished run is not the undisturbed one, bit by bit: parameters, state of checkpoints, metrics."""
    found = []
    trees = [checkpoint.load(run, report=lambda _: None)[0] for run in (place.reference, out)]
    leaves = [jax.tree_util.tree_leaves_with_path(tree) for tree in trees]
    for (path, one), (_, other) in zip(*leaves, strict=True):
        if np.asarray(one).tobytes() != np.asarray(other).tobytes():
            found.append(f"parameters {jax.tree_util.keystr(path)}")
    for step in saved_steps(out):
        metas = [read_meta(epath.Path(run / "checkpoints" / str(step))) for run in (place.reference, out)]
        if metas[0]["leaves"] != metas[1]["leaves"]:
            found.append(f"the state of step {step}")
    if _told(place.reference) != _told(out):
        found.append("metrics")
    return found


def _told(out: Path) -> list[dict]:
    records = [record for record in read_metrics(out / "metrics.jsonl") if not is_account(record)]
    return [{name: value for name, value in record.items() if name not in CLOCKS} for record in records]


# ---------------------------------------------------------------- processes that are disturbed one by one


class Group(NamedTuple):
    """The processes of a run, started without a launcher, so that nobody but they themselves ends them."""

    processes: list[subprocess.Popen[bytes]]
    logs: list[Path]

    def codes(self) -> list[int | None]:
        """Exit codes as a shell tells them; None of those that run."""
        return [local.exit_code(process) for process in self.processes]

    def wait(self, seconds: float = PATIENCE) -> list[int | None]:
        """The exit codes when all have ended, or after so many seconds."""
        end = time.monotonic() + seconds
        while None in self.codes() and time.monotonic() < end:
            time.sleep(0.02)
        return self.codes()

    def text(self, index: int) -> str:
        return self.logs[index].read_text(encoding="utf-8", errors="replace")

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
        local.kill_all(self.processes)


def start_group(place: Place, out: Path, *overrides: str, fault: dict | None = None) -> Group:
    """fault: what `inject` does, in which process (see there)."""
    module = "benchmarks.faults.inject" if fault else "lckv_jax"
    address = f"127.0.0.1:{local.free_port()}"
    logs = [place.folder / f"{out.name}-{index}.log" for index in range(place.processes)]
    processes = []
    for index, log in enumerate(logs):
        own = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(place.processes),
            "JAX_PROCESS_ID": str(index),
            "FAULT": json.dumps(fault),
        }
        with log.open("wb") as file:
            processes.append(
                subprocess.Popen(
                    place.command(out, *overrides, module=module),
                    env=place.environment() | own,
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    return Group(processes, logs)


def running_group(place: Place, out: Path, step: int, *overrides: str) -> Group:
    """The processes of a run, when it has made so many steps, or has ended."""
    group = start_group(place, out, *overrides)
    wait_until(lambda: steps_made(out) >= step or None not in group.codes(), f"step {step}")
    return group


def resumed_from(text: str) -> int | None:
    """The step that a stretch says it goes on from; None if it has not said so."""
    found = re.findall(r"resuming .* from step (\d+)", text)
    return int(found[-1]) if found else None


def spread(seconds: Sequence[float]) -> str:
    """Median and largest of some times."""
    return f"{float(np.median(seconds)):.1f} s (at most {max(seconds):.1f})"
