"""The names of folders as users write them."""

from __future__ import annotations

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
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{name} {text}: there is no such user; write ./{text} for a folder of that name") from error
