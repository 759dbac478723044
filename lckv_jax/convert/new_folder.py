"""A folder that appears under its name when it is whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lckv_jax.errors import Stopped, UserError

_STOPS = (signal.SIGTERM, signal.SIGINT)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_new(out: str | Path) -> Path:
    """The absolute path of `out`, whose links are followed, if a new folder can take that name.

    Raises UserError if something is there that would be lost or cannot be replaced: only an empty folder may be.
    """
    path = Path(os.path.realpath(Path(out).expanduser()))
    if not os.path.lexists(path):
        return path
    if not path.is_dir():
        raise UserError(f"{out} is a file; name a folder that is not there yet")
    try:
        empty = not any(path.iterdir())
    except OSError as error:
        raise UserError(f"{out} cannot be looked into: {error.strerror}; name another folder") from error
    if not empty:
        raise UserError(f"{out} is not empty; name a folder that is not there yet, or empty it first")
    if os.path.ismount(path) or path.samefile(Path.cwd()):
        raise UserError(f"{out} is a mount point or where you are, and cannot be replaced; name a new folder inside it")
    return path


def check_space(folder: Path, size: int) -> None:
    """Raises UserError if the file system that will hold `folder` has less than `size` bytes free."""
    place = next(parent for parent in folder.parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    if free < size:
        raise UserError(
            f"{folder} needs {gigabytes(size)}, but {place} has only {gigabytes(free)} free; free the rest, "
            "or name a folder on another disk"
        )


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


@contextlib.contextmanager
def new_folder(path: Path, size: int | None = None) -> Iterator[Path]:
    """A folder beside `path` to write into; afterwards it takes that name, or is removed if anything was raised.

    path: from `check_new`. size: bytes that will be written, for what is said of a full disk. What killed processes
    left of `path` is removed. Missing parents are made. Raises UserError for what the system has against writing, and
    Stopped at SIGTERM.
    """
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(path)
            partial = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")
            partial.mkdir()
            stack.callback(shutil.rmtree, partial, ignore_errors=True)  # its own trouble must not hide what happened
            stack.enter_context(_locked(partial))
            with _stopping_at_sigterm():
                yield partial
            os.rename(partial, path)
        except OSError as error:
            raise _told(error, path, size) from error
    with contextlib.suppress(OSError):  # it has its name already
        _sync(path.parent)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """SIGTERM and Ctrl-C wait for the end of the block: other threads write in it, and cannot be stopped half-way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    noted: list[int] = []
    previous = {number: signal.signal(number, lambda number, _: noted.append(number)) for number in _STOPS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    for number in noted:
        signal.raise_signal(number)


@contextlib.contextmanager
def _stopping_at_sigterm() -> Iterator[None]:
    """SIGTERM raises Stopped; Python lets only the main thread install that.

    Once more at the end, for what is raised within a callback of the garbage collector goes no further.
    """
    stopped = Stopped("stopped by SIGTERM; nothing was written: the same command begins again")
    noted: list[int] = []

    def stop(number: int, _: Any) -> None:
        noted.append(number)
        raise stopped

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
    if noted:
        raise stopped


def _told(error: OSError, path: Path, size: int | None) -> UserError:
    reason = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    mend = "mend that, or name another folder"
    if size is not None and error.errno in _FULL:
        mend = f"it needs {gigabytes(size)}"
    return UserError(f"{path} cannot be written: {reason}; {mend}; nothing was left there")


def _remove_stale(path: Path) -> None:
    """Removes the partial folders of `path` that no living process holds."""
    name = re.compile(re.escape(path.name) + r"\.partial-[0-9a-f]{8}")
    for folder in path.parent.iterdir():
        if name.fullmatch(folder.name) and folder.is_dir():
            with _locked(folder) as alone:
                if alone:
                    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Holds a folder as long as the process lives; False if another one does, or the file system has no locks."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = True
    except OSError:
        alone = False
    try:
        yield alone
    finally:
        os.close(handle)


def _sync(folder: Path) -> None:
    """Makes a renaming in `folder` last."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
