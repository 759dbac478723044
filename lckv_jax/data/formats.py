"""One file -> its numbered texts: plain text, JSON lines, parquet. What cannot be read is named with its place."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lckv_jax.errors import UserError

_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_JSON_LINES = (".jsonl", ".ndjson", ".json")  # C4 and others give JSON lines the name .json
_PARQUET_ROWS = 256  # decoded at once
_JSON_KINDS = {dict: "an object", list: "a list", bool: "a truth value", type(None): "null"}

Texts = Iterator[tuple[int | None, str]]  # with the number of the record, None for the one text of a text file


def has_fields(path: Path) -> bool:
    """Whether the file holds records, going by its name, so that a field must say where the text is."""
    return path.suffix.lower() == ".parquet" or _plain_suffix(path) in _JSON_LINES


def read_texts(path: Path, field: str) -> Texts:
    """The texts of one file, by its name: .jsonl, .ndjson, .json (numbered by line, from 1), .parquet (by row, from 0).

    Any other file is one UTF-8 text. All but parquet may end in .gz or .zst. Memory is bounded by one text, or 256
    rows of parquet. Blank lines count, but are no text. field: the JSON field or parquet column with the text.
    Raises UserError, with file and line or row, for what cannot be read, is damaged or cut off, or is no text.
    """
    if path.suffix.lower() == ".parquet":
        return _parquet(path, field)
    if _plain_suffix(path) in _JSON_LINES:
        return _json_lines(path, field)
    return _whole(path)


def text_of(value: Any, where: str) -> str:
    """`value`, if it is a text that can be written as UTF-8; UserError that begins with `where` if not."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where} is not UTF-8 text, from byte {error.start}; convert it or leave it out"
            ) from error
    if not isinstance(value, str):
        raise UserError(f"{where} is {_JSON_KINDS.get(type(value), 'a number')}, not text; mend it or leave it out")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            raise UserError(f"{where} holds {half}, half a character; mend it or leave it out") from error
    return value


def _plain_suffix(path: Path) -> str:
    """The last suffix but that of compression."""
    return Path(path.stem if path.suffix.lower() in _COMPRESSION else path.name).suffix.lower()


# ---------------------------------------------------------------- text and JSON lines


def _whole(path: Path) -> Texts:
    with _told(path):
        if path.suffix.lower() in _COMPRESSION:
            with _open(path) as stream:
                content = stream.read()
        else:
            content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text, from byte {error.start}; convert it (iconv -t utf-8) or leave it out"
        ) from error
    yield None, text


def _json_lines(path: Path, field: str) -> Texts:
    with _told(path), _open(path) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, _json_text(line, field, f"{path} line {number}")


def _json_text(line: bytes, field: str, where: str) -> str:
    try:
        record = json.loads(text_of(line.rstrip(), where))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where} is not JSON: {error.msg.removesuffix(' at')} at column {error.colno}; "
            "files called .jsonl or .json hold one object a line"
        ) from error
    except RecursionError as error:
        raise UserError(f"{where} is JSON nested too deeply to read; mend it or leave it out") from error
    if not isinstance(record, dict):
        kind = "text" if isinstance(record, str) else _JSON_KINDS.get(type(record), "a number")
        raise UserError(f"{where} is {kind}, not an object with a field {field!r}; one object a line is read")
    if field not in record:
        raise UserError(
            f"{where} has no field {field!r}; it has {_names(record)}: name the one with the text as the source's field"
        )
    return text_of(record[field], f"{where}: field {field!r}")


def _open(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed on the way. A cut or damaged one raises OSError while it is read."""
    compression = _COMPRESSION.get(path.suffix.lower())
    if compression is None:
        return path.open("rb")
    if not path.stat().st_size:
        raise OSError("the file is empty")  # which pyarrow takes for compressed nothing
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(path, compression=compression), 1 << 20)  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------- parquet


def _parquet(path: Path, field: str) -> Texts:
    import pyarrow
    from pyarrow import parquet

    with _told(path, pyarrow.ArrowException), parquet.ParquetFile(path, page_checksum_verification=True) as file:
        columns = file.schema_arrow
        if field not in columns.names:
            raise UserError(
                f"{path} has no column {field!r}; it has {_names(columns.names)}: "
                "name the one with the text as the source's field"
            )
        kind = columns.field(field).type
        if not _is_text(kind):
            raise UserError(f"{path}: column {field!r} holds {kind}, not text; name a column of strings")
        row = 0
        for batch in file.iter_batches(_PARQUET_ROWS, columns=[field]):
            for value in batch.column(0):
                try:
                    text = value.as_py()
                except UnicodeDecodeError as error:
                    raise UserError(f"{path} row {row}: column {field!r} is not UTF-8 text; mend it") from error
                yield row, text_of(text, f"{path} row {row}: column {field!r}")
                row += 1


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


# ---------------------------------------------------------------- errors


@contextlib.contextmanager
def _told(path: Path, *also: type[Exception]) -> Iterator[None]:
    """Turns what reading a file may raise, OSError and `also`, into a UserError that names it."""
    try:
        yield
    except (OSError, *also) as error:
        if isinstance(error, OSError) and error.strerror:
            mend = f"cannot be read: {error.strerror}; mend it or leave it out of the glob"
        else:  # of a library, about the bytes
            mend = f"is damaged or not what its name says: {first_line(error)}; fetch it again or leave it out"
        raise UserError(f"{path} {mend}") from error


def first_line(error: Exception) -> str:
    """What a library's exception says, without the pages after it."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".")


def _names(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:20]) or "none"
