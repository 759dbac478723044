"""Text sources: sources -> files -> documents, and which documents are held out for validation."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from lckv_jax.errors import UserError

Split = Literal["train", "valid"]

BLOCK_CHARS = 4096  # least length of what is held out from inside a document
_NOT_BUILTIN = {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages", "__pycache__"}


class Document(NamedTuple):
    """A text and its name, which does not depend on the machine: the path below the fixed part of the glob."""

    name: str
    text: str


class Corpus(NamedTuple):
    """What `scan` found: sources that hold at least two documents, or one that can be cut in two.

    documents: how many are not empty. skipped: built-in files that are not UTF-8.
    blocks: 0 if whole documents are held out, else the number of blocks that the corpus is cut into.
    """

    sources: tuple[str, ...]
    validation_fraction: float
    documents: int
    skipped: int
    blocks: int


class _File(NamedTuple):
    name: str
    path: Path
    builtin: bool


def documents(sources: Sequence[str], skipped: list[str] | None = None) -> Iterator[Document]:
    """The documents of all sources in order, one a file; a file of white space only is no document.

    sources: `builtin` (the Python standard library's own source without its tests) or globs of UTF-8 text files, where
    `**` and `~` work. skipped: collects the names of built-in files that are not UTF-8. Line ends stay as they are.
    Raises UserError for a glob without a file, a file named twice, a file that cannot be read or is not UTF-8.
    """
    files = [file for source in sources for file in _find(source)]  # all of them before the first, long, reading
    _refuse_repeats(files)
    for file in files:
        try:
            text = _read(file.path)
        except UserError:
            if not file.builtin:
                raise
            if skipped is not None:
                skipped.append(file.name)
            continue
        if text.strip():
            yield Document(file.name, text)


def is_validation(name: str, fraction: float) -> bool:
    """Whether the document of this name is held out: by a hash of the name, so alike on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) < fraction * 2**64


def scan(sources: Sequence[str], validation_fraction: float) -> Corpus:
    """Reads all sources once and decides how validation text is held out.

    Documents are held out whole, by a hash of their names. If that leaves a split empty, as it must for one text file,
    the corpus is cut into blocks of 4096 to 12288 characters, at blank lines where there are any, and evenly spaced
    blocks are held out. Raises UserError if there is no text, or too little to cut in two.
    """
    skipped: list[str] = []
    count = held_out = 0
    for document in documents(sources, skipped):
        count += 1
        held_out += is_validation(document.name, validation_fraction)
    if not count:
        raise UserError(
            f"data.sources: empty corpus, no text but white space in {', '.join(sources) or 'no source'}; "
            "name UTF-8 text files"
        )
    blocks = 0
    if held_out in (0, count):
        blocks = sum(len(_blocks(document.text)) for document in documents(sources))
        if blocks < 2:
            raise UserError(
                f"data.sources: nothing can be held out for validation from {count} document of fewer than "
                f"{3 * BLOCK_CHARS} characters; give more text, or a second file"
            )
    return Corpus(tuple(sources), validation_fraction, count, len(skipped), blocks)


def split_documents(corpus: Corpus) -> Iterator[tuple[Split, Document]]:
    """Each document of the corpus with its split, in order.

    Where blocks are held out, neighbouring blocks of one document and one split form one document, named
    `name#first_block`.
    """
    if not corpus.blocks:
        for document in documents(corpus.sources):
            yield _split(is_validation(document.name, corpus.validation_fraction)), document
        return
    held_out = min(corpus.blocks - 1, max(1, round(corpus.blocks * corpus.validation_fraction)))

    def before(block: int) -> int:  # blocks held out before this one: one from the middle of each equal stretch
        return (2 * block * held_out + corpus.blocks) // (2 * corpus.blocks)

    start = 0
    for document in documents(corpus.sources):
        numbered = list(enumerate(_blocks(document.text), start))
        for valid, group in itertools.groupby(numbered, key=lambda pair: before(pair[0] + 1) > before(pair[0])):
            run = list(group)
            name = f"{document.name}#{run[0][0] - start}"
            yield _split(valid), Document(name, "".join(text for _, text in run))
        start += len(numbered)


def _split(valid: bool) -> Split:
    return "valid" if valid else "train"


def _blocks(text: str) -> list[str]:
    """`text` in pieces of BLOCK_CHARS to 3 * BLOCK_CHARS characters; shorter only if the whole text is."""
    pieces, start = [], 0
    while len(text) - start > 3 * BLOCK_CHARS:
        low, high = start + BLOCK_CHARS, start + 2 * BLOCK_CHARS
        stop = high
        for end_of_part in ("\n\n", "\n\r\n", "\n"):
            if (found := text.find(end_of_part, low, high - len(end_of_part))) >= 0:
                stop = found + len(end_of_part)
                break
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]]


# ---------------------------------------------------------------- files


def _find(source: str) -> list[_File]:
    """The files that one entry of `data.sources` means, sorted by name."""
    return _builtin_files() if source == "builtin" else _matching_files(source)


def _builtin_files() -> list[_File]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_BUILTIN]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    if not found:
        raise UserError(
            f"data.sources: builtin needs the source files of Python's standard library, and {root} holds none "
            "(a frozen or zipped Python); give text files instead, as in data.sources=texts/*.txt"
        )
    return sorted(_File(path.relative_to(root).as_posix(), path, builtin=True) for path in found)


def _matching_files(pattern: str) -> list[_File]:
    path = Path(pattern).expanduser()
    if path.is_file():
        return [_File(path.name, path, builtin=False)]
    if path.is_dir():
        raise UserError(
            f"data.sources: {pattern!r} is a folder; write a glob of its text files, as in {path.as_posix()}/**/*.txt"
        )
    found = [Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name)]
    if not found:
        raise UserError(
            f"data.sources: {pattern!r} matches no file in {Path.cwd()}; "
            "name existing UTF-8 text files, or `builtin` for Python's own source"
        )
    root = Path(*itertools.takewhile(lambda part: not re.search(r"[*?[]", part), path.parts))
    return sorted(_File(path.relative_to(root).as_posix(), path, builtin=False) for path in found)


def _refuse_repeats(files: Sequence[_File]) -> None:
    """The same text twice could be trained on and held out at once."""
    seen: set[str] = set()
    for file in files:
        path = os.path.realpath(file.path)
        if path in seen:
            raise UserError(f"data.sources: {file.path} is named twice; let one source match it, once")
        seen.add(path)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(
            f"data.sources: {path} cannot be read: {error.strerror}; mend it or leave it out of the glob"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.sources: {path} is not UTF-8 text, from byte {error.start}; "
            "convert it (iconv -t utf-8) or leave it out of the glob"
        ) from error
