"""Text sources: sources -> files -> documents, and which documents are held out for validation.

Memory is bounded by the largest document, whatever the size of the corpus.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from lckv_jax.config import SourceConfig
from lckv_jax.data.formats import Texts, has_fields, read_texts
from lckv_jax.data.tfds import open_tfds, read_tfds
from lckv_jax.errors import UserError

Split = Literal["train", "valid"]

BLOCK_CHARS = 4096  # least length of what is held out from inside a document
_NOT_BUILTIN = {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages", "__pycache__"}


class Document(NamedTuple):
    """A text and its name, which does not depend on the machine: the path below the fixed part of the glob.

    `documents` says how records are named.
    """

    name: str
    text: str


class Corpus(NamedTuple):
    """What `scan` found: sources that hold at least two documents, or one that can be cut in two.

    documents: how many are not empty. skipped: built-in files that are not UTF-8.
    blocks: 0 if whole documents are held out, else the number of blocks that the corpus is cut into.
    """

    sources: tuple[SourceConfig, ...]
    validation_fraction: float
    documents: int
    skipped: int
    blocks: int


class _Part(NamedTuple):
    """A file, or a split of a TFDS folder. key: what it is read from, for finding one that is named twice."""

    name: str
    key: str
    texts: Callable[[], Texts]
    builtin: bool = False


def documents(sources: Sequence[SourceConfig], skipped: list[str] | None = None) -> Iterator[Document]:
    """The documents of all sources, always in the same order; one of white space only is no document.

    Of a text file the whole is one document, named as the file; of a file of records each record is one, named
    `FILE#NUMBER`: lines of JSON from 1, rows of parquet and TFDS examples from 0. Line ends stay as they are.
    skipped: collects the names of files of `builtin` that are not UTF-8.
    Raises UserError for a source that means nothing, a file named twice, and for whatever cannot be read as text.
    """
    parts = [part for source in sources for part in _find(source)]  # all of them before the first, long, reading
    _refuse_repeats(parts)
    for part in parts:
        try:
            for number, text in part.texts():
                if text.strip():
                    yield Document(part.name if number is None else f"{part.name}#{number}", text)
        except UserError:
            if not part.builtin:
                raise
            if skipped is not None:
                skipped.append(part.name)


def check_repeats(sources: Sequence[SourceConfig]) -> None:
    """Raises UserError if the sources name a file twice; for sources that are read one by one, or to validate on."""
    _refuse_repeats([part for source in sources for part in _find(source)])


def text_hashes(sources: Sequence[SourceConfig]) -> dict[str, str]:
    """The hex sha256 of each file of the sources by its name; of a TFDS split that of its texts, one after the other.

    Raises UserError as `documents` does, but only for files that are absent or cannot be read.
    """
    found = {}
    for part in (part for source in sources for part in _find(source)):
        name = part.key if part.name in found else part.name  # two globs may find files of one name
        try:
            with open(part.key, "rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            texts = hashlib.sha256()
            for _, text in part.texts():
                texts.update(len(text).to_bytes(8) + text.encode())
            found[name] = texts.hexdigest()
        except OSError as error:
            raise UserError(f"{part.key} cannot be read: {error.strerror}; mend it or leave it out") from error
    return found


def is_validation(name: str, fraction: float) -> bool:
    """Whether the document of this name is held out: by a hash of the name, so alike on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) < fraction * 2**64


def scan(sources: Sequence[SourceConfig], validation_fraction: float) -> Corpus:
    """Reads all sources once, counts, and decides how validation text is held out; what cannot be read is told now.

    Documents are held out whole, by a hash of their names. If that leaves a split empty, as it must for one text file,
    the corpus is cut into blocks of 4096 to 12288 characters, at blank lines where there are any, and evenly spaced
    blocks are held out. Raises UserError if there is no text, or too little to cut in two.
    """
    skipped: list[str] = []
    count = held_out = blocks = 0
    for document in documents(sources, skipped):
        count += 1
        held_out += is_validation(document.name, validation_fraction)
        if held_out in (0, count):
            blocks += len(_blocks(document.text))
    if not count:
        named = ", ".join(source.path for source in sources) or "no source"
        raise UserError(f"data.sources: empty corpus, no text but white space in {named}; name files with UTF-8 text")
    if 0 < held_out < count:
        blocks = 0
    elif blocks < 2:
        raise UserError(
            f"data.sources: nothing can be held out for validation from {count} document of fewer than "
            f"{3 * BLOCK_CHARS} characters; give more text, or a second file"
        )
    return Corpus(tuple(sources), validation_fraction, count, len(skipped), blocks)


def split_documents(corpus: Corpus) -> Iterator[tuple[Split, Document]]:
    """Each document of the corpus with its split, always in the same order.

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


def _find(source: SourceConfig) -> list[_Part]:
    """The parts that one source means, files sorted by name. Raises UserError if there is none."""
    if source.path.startswith("tfds:"):
        opened = open_tfds(source.path, source.field)
        return [_Part(opened.name, f"{os.path.realpath(opened.folder)}:{opened.split}", partial(read_tfds, opened))]
    builtin = source.path == "builtin"
    files = _builtin_files() if builtin else _matching_files(source.path)
    usual = SourceConfig.model_fields["field"].default
    if source.field != usual and not any(has_fields(path) for _, path in files):
        raise UserError(
            f"source {source.path!r}: text files have no field {source.field!r}; "
            "leave `field` out, or name .jsonl or .parquet files"
        )
    return [
        _Part(name, os.path.realpath(path), partial(read_texts, path, source.field), builtin) for name, path in files
    ]


def _builtin_files() -> list[tuple[str, Path]]:
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
    return sorted((path.relative_to(root).as_posix(), path) for path in found)


def _matching_files(pattern: str) -> list[tuple[str, Path]]:
    path = Path(pattern).expanduser()
    if path.is_file():
        return [(path.name, path)]
    if path.is_dir():
        hint = f"tfds:{path.as_posix()}" if (path / "dataset_info.json").exists() else f"{path.as_posix()}/**/*.txt"
        raise UserError(f"source {pattern!r} is a folder; write a glob of its files, as in {hint}")
    found = [Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name)]
    if not found:
        raise UserError(
            f"source {pattern!r} matches no file in {Path.cwd()}; name existing files (text, .jsonl, .parquet), "
            "a folder as tfds:FOLDER, or `builtin` for Python's own source"
        )
    root = Path(*itertools.takewhile(lambda part: not re.search(r"[*?[]", part), path.parts))
    return sorted((path.relative_to(root).as_posix(), path) for path in found)


def _refuse_repeats(parts: Sequence[_Part]) -> None:
    """The same text twice could be trained on and held out at once."""
    seen: set[str] = set()
    for part in parts:
        if part.key in seen:
            raise UserError(f"{part.key} is named twice in data.sources and data.validation; let one source name it")
        seen.add(part.key)
