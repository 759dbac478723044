"""Runs N processes of one training on this machine, and starts them again while it makes progress.

    python launch/local.py -n 2 -- python -u -m lckv_jax train CONFIG out=OUT [a.b=c ...]

See docs/launch.md. It needs the standard library only, and its processes end with it, however it ends.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

SAVED = 42  # stopped by SIGTERM, and everything is saved
INTERRUPTED = 130  # Ctrl-C
MENDABLE = (1, 2)  # a bug, a mistake of the user: the next attempt would end the same way
PEERS_LEAVE = 5.0  # seconds for the others after a death; they are told of it, and need no more than two

# Runs a command that the kernel kills when its launcher dies, even by SIGKILL; exec keeps both the wish and the pid.
_TIED = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(sys.argv[1]):
        sys.exit(137)
os.execvp(sys.argv[2], sys.argv[2:])
"""


class LaunchError(ValueError):
    """What the user can mend, in one sentence."""


class _Stream(NamedTuple):
    """Where lines of a process go, what stands before them, and the line that is not finished yet."""

    target: IO[bytes]
    prefix: bytes
    rest: bytes


def launch(
    command: Sequence[str],
    processes: int,
    *,
    out: Path | None = None,
    restarts_without_progress: int = 3,
    grace: float = 60.0,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Runs `processes` processes of a command until they are done; the exit code of the run.

    Any death ends all of them, and the first death decides: 1, 2 and a file OUT/FATAL are final; after 42 and codes
    from 128 on, but for 130, all start again, at most `restarts_without_progress` times in a row without a newer step
    in OUT/checkpoints. SIGTERM, SIGHUP (as SIGTERM) and Ctrl-C go to all processes, which then have `grace` seconds,
    and nothing is started again. Raises LaunchError if it cannot start.
    """
    environment = dict(os.environ if environment is None else environment)
    environments = [environment | own for own in split_gpus(processes, environment)]
    if shutil.which(command[0], path=environment.get("PATH")) is None:
        raise LaunchError(f"there is no program {command[0]!r}; write the command after --")
    idle = 0
    with noting_signals() as noted:
        while True:
            before = newest_step(out)
            if out is not None:
                (out / "FATAL").unlink(missing_ok=True)
            code = run_once(command, environments, grace=grace, noted=noted)
            if noted or code == 0:
                return code
            if out is not None and (out / "FATAL").exists():
                _say((out / "FATAL").read_text(encoding="utf-8", errors="replace").strip())
                return code if code in MENDABLE else 1
            if not retryable(code):
                return code
            after = newest_step(out)
            idle = 0 if after > before else idle + 1
            reached = f"step {after}" if after >= 0 else "the beginning"
            if idle > restarts_without_progress:
                _say(f"given up at {reached}: {idle} attempts in a row saved nothing newer")
                return code
            _say(f"starting again from {reached}")


def retryable(code: int) -> bool:
    """Whether another attempt may end better than with this exit code."""
    return code == SAVED or (code >= 128 and code != INTERRUPTED)


def newest_step(out: Path | None) -> int:
    """The newest step that is saved in a run's folder; -1 if there is none."""
    try:
        names = [] if out is None else os.listdir(out / "checkpoints")
    except (FileNotFoundError, NotADirectoryError):
        names = []
    return max((int(name) for name in names if name.isdigit()), default=-1)


def split_gpus(processes: int, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """For each process the variable that gives it its equal share of the visible GPUs; nothing where there are none.

    Raises LaunchError if they cannot be shared equally.
    """
    gpus = _visible_gpus(environment)
    if not gpus or processes == 1:
        return [{} for _ in range(processes)]
    share, left = divmod(len(gpus), processes)
    if left or not share:
        raise LaunchError(
            f"{len(gpus)} GPUs cannot be shared equally by {processes} processes; choose another -n, other GPUs with "
            "CUDA_VISIBLE_DEVICES, or JAX_PLATFORMS=cpu"
        )
    shares = [gpus[i * share : (i + 1) * share] for i in range(processes)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(own)} for own in shares]


def _visible_gpus(environment: Mapping[str, str]) -> list[str]:
    if environment.get("JAX_PLATFORMS") == "cpu":
        return []
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        names = [name.strip() for name in chosen.split(",")]
        return names[: names.index("-1")] if "-1" in names else list(filter(None, names))
    tool = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if tool is None:
        return []
    listed = subprocess.run([tool, "--list-gpus"], capture_output=True, text=True, check=False).stdout.splitlines()
    return [str(index) for index in range(sum(line.startswith("GPU ") for line in listed))]


def run_once(
    command: Sequence[str], environments: Sequence[Mapping[str, str]], *, grace: float = 60.0, noted: Sequence[int] = ()
) -> int:
    """One attempt: a process for each environment. 0 if all ended with 0, else the code of the first death.

    `noted` grows by each signal that the launcher gets; after a second Ctrl-C nothing is waited for.
    """
    group = start(command, environments)
    streams = _read(group)
    first, killed, deadline = 0, False, math.inf
    try:
        while any(process.poll() is None for process in group):
            _pass_on(streams, 0.05)
            first = first or _first_death(group)
            if deadline == math.inf and (noted or first):
                deadline = time.monotonic() + (grace if noted or first == SAVED else PEERS_LEAVE)
                _send(group, signal.SIGINT if noted and noted[0] == signal.SIGINT else signal.SIGTERM)
            if not killed and (time.monotonic() > deadline or list(noted).count(signal.SIGINT) > 1):
                killed = True
                _send(group, signal.SIGKILL)
        first = first or _first_death(group)
    finally:
        kill_all(group)
        while _pass_on(streams, 0):
            pass
        streams.close()
        for pipe in [pipe for process in group for pipe in (process.stdout, process.stderr) if pipe is not None]:
            pipe.close()
    return first


def start(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> list[subprocess.Popen[bytes]]:
    """Starts a process of JAX for each environment, each in its own process group; they die with this process."""
    address = f"127.0.0.1:{free_port()}"
    pipe = subprocess.PIPE if len(environments) > 1 else None
    group: list[subprocess.Popen[bytes]] = []
    try:
        for index, environment in enumerate(environments):
            triple = {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(len(environments)),
                "JAX_PROCESS_ID": str(index),
            }
            tied = [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid()), *command]
            group.append(
                subprocess.Popen(
                    tied,
                    env={**environment, **triple},
                    stdin=subprocess.DEVNULL,
                    stdout=pipe,
                    stderr=pipe,
                    start_new_session=True,
                )
            )
    except BaseException:
        kill_all(group)
        raise
    return group


def free_port() -> int:
    """A port that no one listens at; new for each attempt, so that no process of an old one can join."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def noting_signals() -> Iterator[list[int]]:
    """A list that SIGTERM, SIGHUP and SIGINT are appended to, but for those that are ignored, as under nohup."""
    noted: list[int] = []
    wanted = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    previous = {number: signal.getsignal(number) for number in wanted}
    handled = [number for number in wanted if previous[number] is not signal.SIG_IGN]
    for number in handled:
        signal.signal(number, lambda number, _: noted.append(number))
    try:
        yield noted
    finally:
        for number in handled:
            signal.signal(number, previous[number])


def _first_death(group: Sequence[subprocess.Popen[bytes]]) -> int:
    """The exit code of a process that has died, and tells of it; 0 if none has.

    Of those found dead together the lowest: survivors of a bug or a SIGTERM end with a higher one.
    """
    dead = [(code, index) for index, process in enumerate(group) if (code := exit_code(process))]
    if not dead:
        return 0
    code, index = min(dead)
    _say(f"process {index} ended with {code}")
    return code


def exit_code(process: subprocess.Popen[bytes]) -> int | None:
    """As a shell tells it: 128 + the signal's number for a process that a signal ended; None while it runs."""
    code = process.poll()
    return code if code is None or code >= 0 else 128 - code


def _send(group: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in group:
        if process.poll() is None:
            process.send_signal(number)


def kill_all(group: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kills whatever is left of the processes and of those that they started."""
    for process in group:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(group: Sequence[subprocess.Popen[bytes]]) -> selectors.BaseSelector:
    """The pipes of all processes; none where there is only one process, which writes to our own streams."""
    streams = selectors.DefaultSelector()
    for index, process in enumerate(group):
        for pipe, target in ((process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer)):
            if pipe is not None:
                streams.register(pipe, selectors.EVENT_READ, _Stream(target, f"[{index}] ".encode(), b""))
    return streams


def _pass_on(streams: selectors.BaseSelector, seconds: float) -> bool:
    """Waits so long for output, and passes on its whole lines; whether there was any."""
    ready = streams.select(seconds)
    for key, _ in ready:
        stream: _Stream = key.data
        read = os.read(key.fd, 1 << 16)
        *lines, rest = (stream.rest + read).split(b"\n")
        if read:
            streams.modify(key.fileobj, selectors.EVENT_READ, stream._replace(rest=rest))
        else:
            streams.unregister(key.fileobj)
            lines += [rest] if rest else []
        stream.target.write(b"".join(stream.prefix + line + b"\n" for line in lines))
        stream.target.flush()
    return bool(ready)


def _say(sentence: str) -> None:
    print(f"launch: {sentence}", file=sys.stderr, flush=True)


def _options(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's own options, and the command after `--`."""
    parser = argparse.ArgumentParser(
        prog="python launch/local.py",
        usage="%(prog)s -n N [options] -- python -u -m lckv_jax train CONFIG out=OUT [a.b=c ...]",
        description="N processes of one run on this machine; it starts them again while OUT/checkpoints grows.",
        allow_abbrev=False,
    )
    parser.add_argument("-n", type=int, required=True, metavar="N", help="processes")
    parser.add_argument("--restarts-without-progress", type=int, default=3, metavar="K",
                        help="restarts in a row that save nothing newer (default: 3)")  # fmt: skip
    parser.add_argument("--grace", type=float, default=60.0, metavar="SECONDS",
                        help="time to save after SIGTERM or Ctrl-C (default: 60)")  # fmt: skip
    split = words.index("--") if "--" in words else len(words)
    options, command = parser.parse_args(words[:split]), list(words[split + 1 :])
    if not command or options.n < 1:
        parser.error("write -n N, with N at least 1, and the command after --")
    return options, command


def out_of(command: Sequence[str]) -> Path | None:
    """The run's folder, where the command names it as `out=OUT`."""
    named = [word.removeprefix("out=") for word in command if word.startswith("out=")]
    return Path(named[-1]).expanduser() if named else None


def main(words: Sequence[str] | None = None) -> int:
    options, command = _options(sys.argv[1:] if words is None else words)
    out = out_of(command)
    if "train" in command and out is None:
        most = options.restarts_without_progress
        _say(f"the command names no out=OUT, so progress is not seen: at most {most} restarts")
    try:
        return launch(
            command,
            options.n,
            out=out,
            restarts_without_progress=options.restarts_without_progress,
            grace=options.grace,
        )
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
