"""Runs a command in several processes on this machine, for the tests of runs over processes."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Ended(NamedTuple):
    """How a process ended: its exit code (128 + signal if killed), what it wrote, and when, in seconds of the clock."""

    code: int
    text: str
    at: float


def free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return chosen.getsockname()[1]


class Processes:
    """N processes of one command, which find each other by the variables that launch/ sets.

    command: of Python, such as ["-m", "lckv_jax", "train", ...]; one for all, or a list of one for each.
    """

    def __init__(self, command, count, folder, devices=1, **environ):
        commands = command if isinstance(command[0], list) else [command] * count
        address = f"127.0.0.1:{free_port()}"
        base = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "SLURM_", "OMPI_"))}
        base |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
        base |= {"JAX_COMPILATION_CACHE_DIR": os.environ.get("LCKV_TEST_CACHE", ""), "PYTHONUNBUFFERED": "1"}
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"process-{number}.txt" for number in range(count)]
        self.running = []
        for number, (words, log) in enumerate(zip(commands, self.logs)):
            own = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(number)}
            with log.open("w") as file:
                self.running.append(
                    subprocess.Popen(
                        [sys.executable, *words], cwd=ROOT, stdout=file, stderr=file,
                        env=base | (own if count > 1 else {}) | environ,
                    )
                )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.running:  # whatever the test came to
            process.kill()
            process.wait()

    def text(self, number):
        return self.logs[number].read_text()

    def wait_for(self, number, words, seconds=120.0):
        """Until process `number` has written what the pattern `words` says."""
        until = time.monotonic() + seconds
        while not re.search(words, self.text(number)):
            if self.running[number].poll() is not None or time.monotonic() > until:
                raise AssertionError(f"{words!r} did not come:\n" + "\n".join(map(self.text, range(len(self.logs)))))
            time.sleep(0.05)

    def signal(self, number, what=signal.SIGTERM):
        self.running[number].send_signal(what)

    def ends(self, seconds=120.0) -> list[Ended]:
        """How each of them ended; whoever is still there after `seconds` is killed, with code 137."""
        times, until = {}, time.monotonic() + seconds
        while len(times) < len(self.running):
            late = time.monotonic() > until
            for number, process in enumerate(self.running):
                if late and process.poll() is None:
                    process.kill()
                    process.wait()
                if number not in times and process.poll() is not None:
                    times[number] = time.monotonic()
            time.sleep(0.02)
        codes = [128 - process.returncode if process.returncode < 0 else process.returncode for process in self.running]
        return [Ended(code, self.text(number), times[number]) for number, code in enumerate(codes)]


def run(command, count, folder, devices=1, seconds=180.0, **environ) -> list[Ended]:
    """All of it: how each process ended."""
    with Processes(command, count, folder, devices, **environ) as processes:
        return processes.ends(seconds)
