"""The files of a checkpoint as they were saved: a list of sizes and hashes that is committed with them.

Fingerprints guard the leaves, whatever files they lie in. The list guards the files, also what no reader needs today:
a file that is not what it was says that the disk, or somebody, changes files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import orbax.checkpoint as ocp

LIST = "checksums.json"
_WHOLE = 2**20  # bytes; larger files hold leaves, which have their fingerprints, and are known by their size only
_READERS = 32  # shared file systems answer each request late, but many at once
# Orbax writes these two after the list, when it commits: one gets the time of it, the other tells of it.
_METADATA, _COMMITTED = "_CHECKPOINT_METADATA", "commit_success.txt"
_COMMIT_TIME = re.compile(rb'"commit_timestamp_nsecs": (null|\d+)')


def _is_in_flight(path: Path) -> bool:
    """Whether it is the folder of a save that is not committed, or never will be."""
    return path.name.removesuffix(ocp.utils.TMP_DIR_SUFFIX).isdecimal() and not path.name.isdecimal() and path.is_dir()


def write_checksums(checkpoints: Path) -> None:
    """Writes the list of the save in flight in the folder `checkpoints`; all but the commit is done by then."""
    in_flight = filter(_is_in_flight, checkpoints.iterdir())
    folder = max(in_flight, key=lambda path: path.stat().st_mtime_ns)  # that of this save, if more were copied there
    paths = [path for path in _paths(folder) if path not in (LIST, _COMMITTED)]
    with ThreadPoolExecutor(_READERS) as pool:
        files = dict(zip(paths, pool.map(lambda path: _describe(folder / path), paths), strict=True))
    content = json.dumps(files)
    (folder / LIST).write_text(f"{hashlib.sha256(content.encode()).hexdigest()}\n{content}")


def find_damage(folder: Path) -> str:
    """What is wrong with the files of a checkpoint, in a few words; "" if they are as they were saved.

    Files that are there beside those of the list are no damage. Raises OSError if a file cannot be read.
    """
    try:
        digest, _, content = (folder / LIST).read_bytes().partition(b"\n")
    except FileNotFoundError:
        return f"its {LIST} is missing"
    if digest != hashlib.sha256(content).hexdigest().encode():
        return f"its {LIST} differs from what was saved"
    files: dict[str, list] = json.loads(content)
    with ThreadPoolExecutor(_READERS) as pool:
        damage = list(filter(None, pool.map(lambda path: _difference(folder, path, files[path]), files)))
    others = f" and {len(damage) - 1} more" if len(damage) > 1 else ""
    return f"{damage[0]}{others}" if damage else _wrong_commit(folder)


def _paths(folder: Path) -> list[str]:
    """The files of a folder, but for hidden ones: orbax writes none, but file systems and their servers do."""

    def fail(error: OSError) -> NoReturn:
        raise error

    walked = os.walk(folder, onerror=fail)
    found = [Path(inner, name) for inner, _, names in walked for name in names if not name.startswith(".")]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _describe(path: Path) -> list:
    """Size and, of a file that is not large, sha256."""
    if path.name == _METADATA:  # grows when its time is known
        return [None, hashlib.sha256(_COMMIT_TIME.sub(b"", path.read_bytes())).hexdigest()]
    size = path.stat().st_size
    return [size, hashlib.sha256(path.read_bytes()).hexdigest() if size <= _WHOLE else None]


def _difference(folder: Path, path: str, saved: list) -> str:
    try:
        return "" if _describe(folder / path) == saved else f"{path} differs from what was saved"
    except FileNotFoundError:
        return f"{path} is missing"


def _wrong_commit(folder: Path) -> str:
    """Its words name the folder where the checkpoint was committed; those of its items go on from there."""
    try:
        words, inner = ((folder / item / _COMMITTED).read_bytes() for item in ("", "meta"))
    except FileNotFoundError:
        return f"{_COMMITTED} is missing"
    right = inner.startswith(words) and words.endswith(f"/{folder.name}".encode())
    return "" if right else f"{_COMMITTED} differs from what was saved"
