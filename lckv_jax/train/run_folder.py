"""The folder of a run: who holds it, what is written into it beside checkpoints and metrics."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TypeVar

from lckv_jax.config import RunConfig, config_json
from lckv_jax.data.tokenizer import tokenizer_files
from lckv_jax.errors import UserError
from lckv_jax.parallel import processes
from lckv_jax.train.resume import Change

T = TypeVar("T")

_SEEN_SECONDS = 75.0  # until what one host writes is seen by another: NFS may remember a folder for 60
_DEAD_SECONDS = 120.0  # until a server gives away what a dead host has locked


@contextlib.contextmanager
def held(out: Path, say: Callable[[str], object]) -> Iterator[None]:
    """Makes the folder and holds it for this run; the system lets go of it however the process ends.

    A folder that is still empty in the end is removed. Raises UserError if another run holds it, or if it cannot be
    written, or if not all processes see it.
    """
    if processes.index() != 0:
        _check_seen(out)
        with processes.fatal_told_in(out):
            yield
        return
    path = out / "run.lock"
    while True:
        with written(out):
            out.mkdir(parents=True, exist_ok=True)
            lock = path.open("ab+", buffering=0)  # else a full disk would be told of again when it is closed
        with lock:
            _lock(lock, out, say)
            if not _is_there(path, lock):
                continue  # a run that has just ended removed it
            with written(path):
                lock.truncate(0)
                lock.write(_holder().encode())
                os.fsync(lock.fileno())  # NFS sends what is in an open file when it likes
            processes.from_first("run folder", _holder)
            try:
                with processes.fatal_told_in(out):
                    yield
            finally:
                with contextlib.suppress(OSError):  # it must not hide how the run ended
                    path.unlink(missing_ok=True)
                    if not any(out.iterdir()):
                        out.rmdir()
            return


def _holder() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _check_seen(out: Path) -> None:
    """Raises UserError if this process does not see the folder that process 0 holds."""
    holder = processes.from_first("run folder", _holder)

    def look() -> None:
        with contextlib.suppress(OSError):
            if (out / "run.lock").read_text(encoding="utf-8") == holder:
                return
        raise UserError(
            f"{out} of process 0 is not seen on {socket.gethostname()}; give `out` on a file system that all "
            "processes share"
        )

    seen(look)


def seen(look: Callable[[], T]) -> T:
    """What `look` returns, which raises UserError while it does not see what another host wrote; after a while so does
    this."""
    until = time.monotonic() + _SEEN_SECONDS
    while True:
        try:
            return look()
        except UserError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def check_free(out: Path) -> None:
    """Raises UserError if the folder, which holds no run yet, has a config.json of something else."""
    try:
        tree = json.loads((out / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError):
        tree = None
    if not isinstance(tree, dict) or not {"model", "train"} <= tree.keys():
        raise UserError(
            f"{out} holds a config.json that is not of a run, as an exported model does; choose another `out`"
        )


def _is_there(path: Path, lock: IO[bytes]) -> bool:
    """Whether the locked file is still the one at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(lock.fileno()))
    except FileNotFoundError:
        return False


def _lock(lock: IO[bytes], out: Path, say: Callable[[str], object]) -> None:
    """Locks the file; raises UserError if another run has it, of another host only after a while: hosts die too."""
    until = time.monotonic() + _DEAD_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().decode(errors="replace") or "another process"
            if holder.endswith(f" on {socket.gethostname()}") or time.monotonic() > until:
                raise UserError(
                    f"{out} is being trained by {holder}; wait until it ends, or choose another `out`"
                ) from error
            time.sleep(1.0)
        except OSError as error:  # some network file systems have no locks
            say(f"{out}: cannot be locked ({error.strerror}); see to it that no second run uses it")
            return


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """What the system has against writing `path` becomes a UserError."""
    try:
        yield
    except TimeoutError:  # somebody was waited for; nothing is wrong with the path
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{error.filename or path} cannot be written: {reason}; mend that and run the same command again (it goes "
            "on from the last checkpoint), or choose another `out`"
        ) from error


def claim(config: RunConfig, out: Path) -> None:
    """Writes config.json and the tokenizer, each whole or not at all."""
    contents = {"config.json": (json.dumps(config_json(config), indent=1) + "\n").encode()}
    with written(out):
        contents |= {path.name: path.read_bytes() for path in tokenizer_files(config.data.folder)}
        for name, content in contents.items():
            (out / f"{name}.partial").write_bytes(content)
            os.replace(out / f"{name}.partial", out / name)


def record_changes(out: Path, step: int, found: Sequence[Change]) -> None:
    """Appends to changes.jsonl from which step on which fields have other values; a repetition is left out."""
    if not found:
        return
    line = json.dumps({"step": step, "changes": {change.field: [change.before, change.after] for change in found}})
    path = out / "changes.jsonl"
    with written(path):
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if line not in lines[-1:]:
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
