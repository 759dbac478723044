"""The names of folders as users write them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from lckv_jax.errors import UserError


def given_path(text: str | Path, name: str) -> Path:
    """The path that was given as the argument `name`, `~` expanded. Raises UserError if it cannot be one."""
    if not os.fspath(text).strip():
        raise UserError(f"{name} is empty; write the name of a folder")
    if "\0" in os.fspath(text):
        raise UserError(f"{name} {os.fspath(text)!r} holds a NUL character, which no name of a file can; remove it")
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{name} {text}: there is no such user; write ./{text} for a folder of that name") from error
    try:
        path.lstat()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{name} {str(text)[:40]}... is too long for the name of a file; shorten it") from error
    return path
