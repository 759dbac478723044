"""Answers that outlive the process that found them: a file of JSON lines, only ever added to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from lckv_jax.errors import UserError
from lckv_jax.parallel.processes import check_same


class Finished:
    """Answers by key. With a path they are also lines of `{"key": ..., "answer": ...}` there, written as they come.

    Half a last line, as a killed process leaves it, is cut off. Of several processes all read and the first one writes.
    Raises UserError for a file that is something else, that cannot be written, or that processes do not share.
    """

    def __init__(self, path: Path | None) -> None:
        self._answers: dict[str, Any] = {}
        self._path = path
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes() if path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            check_same("file of finished requests", {"sha256": hashlib.sha256(whole).hexdigest()})
            if jax.process_index() == 0:
                with path.open("ab") as file:  # also tells now whether it can be written
                    file.truncate(len(whole))
        except OSError as error:
            raise UserError(f"{path} cannot hold finished requests: {error.strerror}; give another file") from error
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                self._answers[entry["key"]] = entry["answer"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}, line {number}: no finished request; delete the file, or give another one"
                ) from error

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:
        return self._answers[key]

    def add(self, answers: Iterable[tuple[str, Any]]) -> None:
        """Keeps the answers; when this returns, they outlive this process."""
        answers = list(answers)
        self._answers.update(answers)
        if self._path is None or jax.process_index() != 0:
            return
        lines = "".join(json.dumps({"key": key, "answer": answer}) + "\n" for key, answer in answers)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            raise UserError(f"{self._path} cannot be written: {error.strerror}; make room, and start again") from error
