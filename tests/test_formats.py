"""Records of every format become numbered texts, one at a time; what cannot be read is named with its place."""

import gzip
import itertools
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from lckv_jax.config import SourceConfig
from lckv_jax.data.corpora import Document, documents, scan, split_documents
from lckv_jax.data.formats import read_texts
from lckv_jax.errors import UserError


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


def read(path: Path, field: str = "text") -> list[Document]:
    return list(documents([SourceConfig(path=str(path), field=field)]))


def lines(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


@pytest.mark.parametrize("suffix", PACK)
def test_a_text_file_is_one_document(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(PACK[suffix]("é\r\nb\n".encode()))
    assert read(path) == [(path.name, "é\r\nb\n")]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".JSONL"])
def test_json_lines_are_documents_named_by_line(kind: str, suffix: str, tmp_path: Path) -> None:
    content = lines({"text": "á", "n": 1}, {"text": " \n"}) + b"\n  \r\n" + b'{"text": "last \\u2028 \xc3\xa9"}'
    path = tmp_path / f"a{kind}{suffix}"
    path.write_bytes(PACK[suffix](content))
    assert read(path) == [(f"{path.name}#1", "á"), (f"{path.name}#5", "last \u2028 é")]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_may_be_joined(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACK[suffix](lines({"text": "one"})) + PACK[suffix](lines({"text": "two"})))
    assert [document.text for document in read(path)] == ["one", "two"]


@pytest.mark.parametrize("row_group_size", [1, 7, 1000])
@pytest.mark.parametrize(
    "kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
)
def test_parquet_rows_are_documents(kind: pyarrow.DataType, row_group_size: int, tmp_path: Path) -> None:
    texts = [f"row {number} é" if number % 10 else "  " for number in range(600)]
    table = pyarrow.table({"n": list(range(600)), "body": pyarrow.array(texts, pyarrow.string()).cast(kind)})
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path, row_group_size=row_group_size)
    expected = [(f"a.parquet#{number}", text) for number, text in enumerate(texts) if number % 10]
    assert read(path, "body") == expected


def test_one_glob_may_hold_every_kind(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.jsonl").write_bytes(lines({"body": "line"}))
    (tmp_path / "a.txt").write_text("whole")
    parquet.write_table(pyarrow.table({"body": ["row"]}), tmp_path / "b.parquet")
    found = list(documents([SourceConfig(path=f"{tmp_path}/**/*.*", field="body")]))
    assert found == [("a.txt", "whole"), ("b.parquet#0", "row"), ("sub/c.jsonl#1", "line")]


def test_records_are_held_out_one_by_one_and_always_alike(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(*({"text": f"t{number}"} for number in range(1000))))
    corpus = scan([SourceConfig(path=f"{tmp_path}/*.jsonl")], 0.05)
    parts = list(split_documents(corpus))
    assert (corpus.documents, corpus.skipped, corpus.blocks) == (1000, 0, 0)
    assert [document.text for _, document in parts] == [f"t{number}" for number in range(1000)]
    held_out = [document.name for split, document in parts if split == "valid"]
    assert 30 < len(held_out) < 70
    assert held_out[:3] == ["a.jsonl#15", "a.jsonl#47", "a.jsonl#52"]  # on any machine
    assert parts == list(split_documents(corpus))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_memory_is_bounded_by_a_document(name: str, tmp_path: Path) -> None:
    path, text = tmp_path / name, "some words " * 1000
    if name == "a.parquet":
        parquet.write_table(pyarrow.table({"text": [text] * 4000}), path, row_group_size=100)
    else:
        path.write_bytes(PACK[path.suffix if path.suffix in PACK else ""](lines({"text": text}) * 4000))
    next(read_texts(path, "text"))  # imports
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    arrow = max(pyarrow.total_allocated_bytes() for _ in read_texts(path, "text"))
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert python + arrow - before < 12e6  # of 44e6


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"body": "x", "id": 3}', r"line 2 has no field 'text'; it has body, id: name the one"),
        (b"{}", r"line 2 has no field 'text'; it has none"),
        (b'{"text": 3}', r"line 2: field 'text' is a number, not text"),
        (b'{"text": null}', r"line 2: field 'text' is null, not text"),
        (b'{"text": ["x"]}', r"line 2: field 'text' is a list, not text"),
        (b'{"text": true}', r"line 2: field 'text' is a truth value, not text"),
        (b'{"text": "x', r"line 2 is not JSON: .* at column 10; .* one object a line"),
        (b"plain", r"line 2 is not JSON: .* at column 1"),
        (b'["text"]', r"line 2 is a list, not an object with a field 'text'"),
        (b'"text"', r"line 2 is text, not an object"),
        (b'{"text": "\xe9"}', r"line 2 is not UTF-8 text, from byte 10"),
        (b'{"text": "a\\ud83d"}', r"line 2: field 'text' holds \\ud83d, half a character"),
        (b"[" * 100_000, r"line 2 is JSON nested too deeply"),
    ],
)
def test_unusable_lines_are_named(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "fine"}) + line + b"\n")
    with pytest.raises(UserError, match=r"^\S*a\.jsonl " + message):
        read(path)


def test_unusable_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xe9")]
    )
    parquet.write_table(pyarrow.table({"n": [1], "gap": pyarrow.array([None], pyarrow.string()), "bad": broken}), path)
    for field, message in {
        "text": r"has no column 'text'; it has n, gap, bad: name the one",
        "n": r"column 'n' holds int64, not text",
        "gap": r"row 0: column 'gap' is null, not text",
        "bad": r"row 0: column 'bad' is not UTF-8",
    }.items():
        with pytest.raises(UserError, match=r"a\.parquet:? " + message):
            read(path, field)


def damaged(content: bytes) -> dict[str, bytes]:
    flipped = bytearray(content)
    flipped[-6] ^= 4  # in the checksum
    return {"cut": content[: len(content) // 2], "flipped": bytes(flipped), "longer": content + b"x", "empty": b""}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *itertools.product(["a.txt.gz", "a.jsonl.gz", "a.parquet"], ["cut", "flipped", "longer", "empty", "plain"]),
        *itertools.product(["a.jsonl.zst"], ["cut", "longer", "empty", "plain"]),  # pyarrow writes no checksum
    ],
)
def test_damaged_files_are_named(name: str, how: str, tmp_path: Path) -> None:
    path = tmp_path / name
    records = lines(*({"text": f"text {number}"} for number in range(9999)))
    if name == "a.parquet":
        parquet.write_table(pyarrow.table({"text": ["x"] * 999}), path)
        content = path.read_bytes()
    else:
        content = PACK[path.suffix](records)
    path.write_bytes(records if how == "plain" else damaged(content)[how])
    with pytest.raises(UserError, match=rf"{name} is damaged or not what its name says: [^\n]+; fetch it again"):
        read(path)


def test_flipped_bits_of_parquet_pages_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"text {number}" for number in range(999)]})
    parquet.write_table(table, path, write_page_checksum=True, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet is damaged .*CRC"):
        read(path)


def test_a_field_for_plain_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(lines({"body": "x"}))
    for path in (f"{tmp_path}/*.txt", "builtin"):
        with pytest.raises(UserError, match=r"text files have no field 'body'; leave `field` out"):
            list(documents([SourceConfig(path=path, field="body")]))


def test_real_corpora_are_read_whole(test_data: Path) -> None:
    for name, count in {"c4_en/valid.jsonl.gz": 200, "wiki_en/valid.jsonl.gz": 324}.items():
        if not (test_data / name).exists():
            pytest.skip(f"no {name}")
        found = read(test_data / name)
        with gzip.open(test_data / name) as stream:
            assert [document.text for document in found] == [json.loads(line)["text"] for line in stream]
        assert len(found) == count
