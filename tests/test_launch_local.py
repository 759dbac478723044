"""launch/local.py: small scripts in the place of a training, which die, save, stop and hang."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOCAL = ROOT / "launch" / "local.py"

# What every stand-in knows: its number, OUT, the attempt, how to save a step; and that each attempt leaves its pids.
BEFORE = """
import os, signal, subprocess, sys, time
from pathlib import Path
me, out = int(os.environ["JAX_PROCESS_ID"]), Path(sys.argv[-1].removeprefix("out="))
steps = out / "checkpoints"
def save(step): (steps / str(step)).mkdir(parents=True)
def told(words):
    with (out / f"told-{me}").open("a") as file: file.write(words + "\\n")
told(str(os.getpid()))
"""


def load() -> ModuleType:
    specification = importlib.util.spec_from_file_location("launch_local", LOCAL)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


local = load()


def command(out: Path, script: str, *options: str, processes: int = 2) -> list[str]:
    out.mkdir(exist_ok=True)
    stand_in = [sys.executable, "-u", "-c", BEFORE + script, f"out={out}"]
    return [sys.executable, str(LOCAL), "-n", str(processes), *options, "--", *stand_in]


def run(out: Path, script: str, *options: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "error"}
    words = command(out, script, *options, processes=processes)
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)


def begin(out: Path, script: str, *options: str) -> subprocess.Popen[str]:
    """Starts a launcher, and waits until both of its processes have told `ready`."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    pipe = subprocess.PIPE
    launcher = subprocess.Popen(command(out, script, *options), env=environment, stdout=pipe, stderr=pipe, text=True)
    wait_for(lambda: all("ready" in told(out, me) for me in (0, 1)))
    return launcher


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def told(out: Path, me: int) -> list[str]:
    path = out / f"told-{me}"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def pids(out: Path) -> list[int]:
    """Of all processes of all attempts, and of those that they started."""
    return [int(words) for me in (0, 1) for words in told(out, me) if words.isdigit()]


def running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_all_end_well(tmp_path: Path) -> None:
    script = 'print(os.environ["JAX_COORDINATOR_ADDRESS"], os.environ["JAX_NUM_PROCESSES"], me)'
    done = run(tmp_path / "run", script, processes=3)
    assert done.returncode == 0 and done.stderr == ""
    lines = sorted(done.stdout.splitlines())
    address = re.fullmatch(r"\[0\] (127\.0\.0\.1:\d+) 3 0", lines[0])
    assert address and lines[1:] == [f"[{me}] {address[1]} 3 {me}" for me in (1, 2)]


def test_one_process_writes_as_it_is(tmp_path: Path) -> None:
    done = run(tmp_path / "run", 'print("as it is", end="")', processes=1)
    assert (done.returncode, done.stdout) == (0, "as it is")


def test_lines_stay_whole(tmp_path: Path) -> None:
    script = """
for line in range(300):
    sys.stdout.write(f"{me}:{line}:" + "x" * 500); sys.stdout.flush(); sys.stdout.write("y\\n")
sys.stderr.write("the end")
"""
    done = run(tmp_path / "run", script)
    assert sorted(done.stderr.splitlines()) == ["[0] the end", "[1] the end"]
    expected = [f"[{me}] {me}:{line}:{'x' * 500}y" for me in (0, 1) for line in range(300)]
    assert sorted(done.stdout.splitlines()) == sorted(expected)


def test_a_death_ends_all_and_the_run_goes_on_from_its_last_step(tmp_path: Path) -> None:
    """Six deaths, more than may be without progress in a row: each attempt saves one step."""
    script = """
told(os.environ["JAX_COORDINATOR_ADDRESS"])
attempt = (out / f"told-{me}").read_text().count(":")
if attempt == 7: sys.exit(0)
if me == 0: save(attempt); time.sleep(60)
while not (steps / str(attempt)).exists(): time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = run(tmp_path / "run", script, "--restarts-without-progress", "1")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("process 1 ended with 137") == 6
    assert [line for line in done.stderr.splitlines() if "again" in line] == [
        f"launch: starting again from step {step}" for step in range(1, 7)
    ]
    assert len(set(told(tmp_path / "run", 0)[1::2])) == 7  # a new port each time
    assert not any(map(running, pids(tmp_path / "run")))


def test_without_progress_it_gives_up(tmp_path: Path) -> None:
    done = run(tmp_path / "run", "if me: sys.exit(134)\ntime.sleep(60)", "--restarts-without-progress", "2")
    assert done.returncode == 134
    assert len(told(tmp_path / "run", 1)) == 3
    assert "given up at the beginning: 3 attempts in a row saved nothing newer" in done.stderr


@pytest.mark.parametrize("code", [1, 2, 130])
def test_final_codes_are_not_retried(tmp_path: Path, code: int) -> None:
    done = run(tmp_path / "run", f"if me: sys.exit({code})\ntime.sleep(60)")
    assert done.returncode == code and len(told(tmp_path / "run", 1)) == 1


@pytest.mark.parametrize("code", [42, 134, 137, 142])
def test_other_codes_are_retried(code: int) -> None:
    assert local.retryable(code)


@pytest.mark.parametrize(("first", "then"), [(1, 134), (134, 1)])
def test_the_first_death_decides(tmp_path: Path, first: int, then: int) -> None:
    """Its peers then die of it, with codes that say the contrary."""
    script = f"""
if me == 0:
    while not (out / "ready").exists(): time.sleep(0.01)
    sys.exit({first})
signal.signal(signal.SIGTERM, lambda *_: sys.exit({then}))
(out / "ready").touch()
time.sleep(60)
"""
    done = run(tmp_path / "run", script, "--restarts-without-progress", "0")
    assert done.returncode == first and f"process 0 ended with {first}" in done.stderr


def test_a_fatal_file_forbids_a_retry(tmp_path: Path) -> None:
    script = 'if me: (out / "FATAL").write_text("process 1: ValueError: no"); sys.exit(137)\ntime.sleep(60)'
    done = run(tmp_path / "run", script)
    assert done.returncode == 1 and "launch: process 1: ValueError: no" in done.stderr
    assert len(told(tmp_path / "run", 1)) == 1
    assert run(tmp_path / "run", "").returncode == 0  # the next start does not mind the old one


SAVES = """
def stop(number, frame): told("saved"); sys.exit(42 if number == signal.SIGTERM else 130)
signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGINT, stop)
told("ready"); time.sleep(60)
"""


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGTERM, 42), (signal.SIGHUP, 42), (signal.SIGINT, 130)], ids=["TERM", "HUP", "INT"]
)
def test_a_signal_goes_to_all_and_they_save(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    launcher = begin(tmp_path / "run", SAVES)
    launcher.send_signal(sent)
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == code, err
    assert all(told(tmp_path / "run", me)[1:] == ["ready", "saved"] for me in (0, 1)), "no second attempt"


DEAF = """
for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, signal.SIG_IGN)
told("ready"); time.sleep(60)
"""
PARENT = 'told(str(subprocess.Popen(["sleep", "60"]).pid))\n'


def test_who_does_not_stop_is_killed_after_the_grace_time(tmp_path: Path) -> None:
    launcher = begin(tmp_path / "run", PARENT + DEAF, "--grace", "0.5")
    launcher.terminate()
    assert launcher.wait(timeout=30) == 137
    assert len(pids(tmp_path / "run")) == 4 and not any(map(running, pids(tmp_path / "run")))


def test_a_second_ctrl_c_waits_for_nothing(tmp_path: Path) -> None:
    launcher = begin(tmp_path / "run", DEAF)
    launcher.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=30) == 137
    assert not any(map(running, pids(tmp_path / "run")))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends them")
def test_a_killed_launcher_leaves_no_process(tmp_path: Path) -> None:
    launcher = begin(tmp_path / "run", DEAF)
    assert all(map(running, pids(tmp_path / "run")))
    launcher.kill()
    wait_for(lambda: not any(map(running, pids(tmp_path / "run"))), 5)


def test_grandchildren_end_with_the_attempt(tmp_path: Path) -> None:
    done = run(tmp_path / "run", PARENT)
    assert done.returncode == 0 and len(pids(tmp_path / "run")) == 4
    assert not any(map(running, pids(tmp_path / "run")))


@pytest.mark.parametrize(
    ("processes", "environment", "shares"),
    [
        (2, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, ["0,1", "2,3"]),
        (2, {"CUDA_VISIBLE_DEVICES": "5, GPU-8f"}, ["5", "GPU-8f"]),
        (2, {"CUDA_VISIBLE_DEVICES": ""}, [None, None]),
        (2, {"CUDA_VISIBLE_DEVICES": "-1"}, [None, None]),
        (1, {"CUDA_VISIBLE_DEVICES": "0,1,2"}, [None]),
        (2, {"CUDA_VISIBLE_DEVICES": "0", "JAX_PLATFORMS": "cpu"}, [None, None]),
        (4, {}, ["0,1", "2,3", "4,5", "6,7"]),
    ],
)
def test_gpus_are_shared(tmp_path: Path, processes: int, environment: dict[str, str], shares: list[str | None]) -> None:
    """Without CUDA_VISIBLE_DEVICES they are the 8 that nvidia-smi lists."""
    (tmp_path / "nvidia-smi").write_text('#!/bin/sh\nfor gpu in 0 1 2 3 4 5 6 7; do echo "GPU $gpu: H100"; done')
    (tmp_path / "nvidia-smi").chmod(0o755)
    found = local.split_gpus(processes, {"PATH": str(tmp_path)} | environment)
    assert [share.get("CUDA_VISIBLE_DEVICES") for share in found] == shares


def test_gpus_that_cannot_be_shared_are_refused() -> None:
    for processes in (2, 4):
        with pytest.raises(local.LaunchError, match=rf"3 GPUs cannot be shared equally by {processes} processes; "):
            local.split_gpus(processes, {"CUDA_VISIBLE_DEVICES": "0,1,2"})


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-n", "2", "python"], "unrecognized arguments: python"),
        (["-n", "2"], "the command after --"),
        (["-n", "0", "--", "true"], "N at least 1"),
        (["-n", "2", "--", "no-such-program"], "there is no program 'no-such-program'"),
    ],
)
def test_mistakes(words: list[str], says: str) -> None:
    done = subprocess.run([sys.executable, LOCAL, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_a_training_without_out_is_warned_of() -> None:
    done = subprocess.run([sys.executable, LOCAL, "-n", "1", "--", "echo", "train"], capture_output=True, text=True)
    assert done.returncode == 0 and "names no out=OUT" in done.stderr


def test_out_is_the_last_one_named() -> None:
    assert local.out_of(["train", "c.yaml", "out=a", "out=b"]) == Path("b")
    assert local.out_of(["train", "c.yaml", "data.out=a"]) is None


def test_newest_step_looks_at_whole_steps_only(tmp_path: Path) -> None:
    assert local.newest_step(tmp_path) == local.newest_step(None) == -1
    for name in ("5", "10", "15.orbax-checkpoint-tmp-7"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert local.newest_step(tmp_path) == 10
