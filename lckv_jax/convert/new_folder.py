"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lckv_jax.errors import Stopped, UserError


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out`, named OUT.partial, to write into; it becomes `out` at the end.

    Whatever ends the block otherwise, SIGTERM and Ctrl-C among it, it is removed; what a killed process left is
    replaced. Raises UserError if `out` exists and is not an empty folder, if another process is writing it, or if the
    system does not let it be written; Stopped at SIGTERM.
    """
    _refuse_existing(out)
    partial = out.with_name(f"{out.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with _locked(partial, out), _stopping_at_sigterm():
            try:
                for leftover in partial.iterdir():
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
                yield partial
                _refuse_existing(out)
                os.replace(partial, out)
            except BaseException:
                _remove(partial)
                raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{out} cannot be written: {reason}; nothing was left there: mend that and try again"
        ) from error


def _remove(folder: Path) -> None:
    """Also what threads of an interrupted checkpoint still write for a moment, which make folders anew."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)
        if not folder.exists():
            return


def _refuse_existing(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} exists and is not empty; choose another folder, or remove it")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another name for the folder")


@contextlib.contextmanager
def _locked(folder: Path, out: Path) -> Iterator[None]:
    """Holds the folder; the system lets go of it however the process ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is writing {out}; wait for it, or choose another folder") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # of network file systems without locks
                raise
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _stopping_at_sigterm() -> Iterator[None]:
    """SIGTERM raises Stopped; Python lets only the main thread install that."""

    def stop(*_: Any) -> None:
        raise Stopped("stopped by SIGTERM; nothing was written: the same command begins again")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
