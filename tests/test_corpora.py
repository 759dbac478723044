"""Sources become named documents, and some of their text is held out, alike on every machine."""

import itertools
import random
import string
import sysconfig
from pathlib import Path

import pytest

from lckv_jax.config import SourceConfig
from lckv_jax.data.corpora import BLOCK_CHARS, documents, is_validation, scan, split_documents
from lckv_jax.errors import UserError


def paths(*names: str) -> tuple[SourceConfig, ...]:
    return tuple(SourceConfig(path=name) for name in names)


def write(folder: Path, **texts: str | bytes) -> None:
    """Files below `folder`; in a name, `__` stands for a folder."""
    for name, text in texts.items():
        path = folder / (name.replace("__", "/") + ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)


def prose(seed: int, characters: int) -> str:
    """Words in lines, with a blank line now and then."""
    rng, parts, length = random.Random(seed), [], 0
    while length < characters:
        parts.append("".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 9))) + rng.choice("    \n\n"))
        parts.append("\n" if rng.random() < 0.1 else "")
        length += len(parts[-2]) + len(parts[-1])
    return "".join(parts)[:characters]


def test_builtin_is_the_standard_library_without_tests() -> None:
    skipped: list[str] = []
    found = {document.name: document.text for document in documents(paths("builtin"), skipped)}
    assert found["json/decoder.py"] == Path(sysconfig.get_paths()["stdlib"], "json/decoder.py").read_text("utf-8")
    assert list(found) == sorted(found)
    assert sum(map(len, found.values())) > 5e6
    folders = {part for name in found for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages"}
    assert not set(skipped) & set(found)


def test_builtin_skips_and_counts_what_is_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_bytes(b"# \xe9t\xe9\n")
    for name in ("b.py", "c.py"):
        (tmp_path / name).write_text(prose(1, 9000))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    corpus = scan(paths("builtin"), 0.1)
    assert (corpus.documents, corpus.skipped) == (2, 1)
    assert {document.name.split("#")[0] for _, document in split_documents(corpus)} == {"b.py", "c.py"}


def test_builtin_without_sources_points_to_text_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match="give text files instead"):
        list(documents(paths("builtin")))


def test_globs_give_sorted_documents_named_below_their_fixed_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "texts", b="B\r\n", a__x="X", a__y__z=" \n", **{"a__[1]": "odd"})
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = [("a/[1].txt", "odd"), ("a/x.txt", "X"), ("b.txt", "B\r\n")]  # white space is no document
    for pattern in ("~/texts/**/*.txt", str(tmp_path / "texts/**/*.txt")):
        assert list(documents(paths(pattern))) == expected
    monkeypatch.chdir(tmp_path)
    assert [d.name for d in documents(paths("texts/b.txt", "texts/a/[1].txt"))] == ["b.txt", "[1].txt"]
    assert [d.name for d in documents(paths("t*/*.txt"))] == ["texts/b.txt"]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["none/*.txt"], r"'none/\*\.txt' matches no file"),
        (["texts"], r"is a folder; write a glob .* texts/\*\*/\*\.txt"),
        (["texts/latin.txt"], r"latin\.txt is not UTF-8 text, from byte 5"),
        (["texts/good.txt", "texts/g*.txt"], r"good\.txt is named twice"),
        (["texts/blank.txt"], r"empty corpus.*texts/blank\.txt"),
        ([], r"empty corpus"),
        (["texts/good.txt"], r"nothing can be held out"),
    ],
)
def test_unusable_sources_are_named(
    sources: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "texts", good="fine", latin=b"caf\xc3\xa9\xe9", blank=" \n\t\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        scan(paths(*sources), 0.1)


def test_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, a="text")

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read everything
    with pytest.raises(UserError, match=r"a\.txt cannot be read: Permission denied"):
        list(documents(paths(f"{tmp_path}/*.txt")))


def test_held_out_share_is_the_fraction_and_never_changes() -> None:
    names = [f"folder/{number}.txt" for number in range(20_000)]
    held_out = [name for name in names if is_validation(name, 0.02)]
    assert 300 < len(held_out) < 500
    assert held_out[:3] == ["folder/172.txt", "folder/218.txt", "folder/278.txt"]
    assert set(held_out) < {name for name in names if is_validation(name, 0.05)}


def test_many_files_are_held_out_whole(tmp_path: Path) -> None:
    write(tmp_path, **{f"n{number}": f"text {number}" for number in range(100)})
    corpus = scan(paths(f"{tmp_path}/*.txt"), 0.1)
    assert corpus.blocks == 0
    for split, document in split_documents(corpus):
        assert split == ("valid" if is_validation(document.name, 0.1) else "train")
    assert [document for _, document in split_documents(corpus)] == list(documents(corpus.sources))


@pytest.mark.parametrize("text", [prose(0, 200_000), "x" * 200_000, "line\r\n\r\n" * 25_000, prose(1, 12_289)])
def test_one_file_is_held_out_by_blocks(text: str, tmp_path: Path) -> None:
    write(tmp_path, only=text)
    corpus = scan(paths(f"{tmp_path}/only.txt"), 0.1)
    parts = list(split_documents(corpus))
    assert "".join(document.text for _, document in parts) == text
    assert len({document.name for _, document in parts}) == len(parts)
    assert all(len(document.text) >= BLOCK_CHARS for _, document in parts)
    assert all(before != after for (before, _), (after, _) in itertools.pairwise(parts))  # long training documents
    held_out = sum(len(document.text) for split, document in parts if split == "valid")
    if len(text) >= 200_000:
        assert 0.05 < held_out / len(text) < 0.2
    assert 0 < held_out < len(text)
    assert parts == list(split_documents(scan(corpus.sources, 0.1)))


def test_blocks_end_at_blank_lines(tmp_path: Path) -> None:
    write(tmp_path, only=prose(0, 200_000))
    parts = [document for _, document in split_documents(scan(paths(f"{tmp_path}/only.txt"), 0.1))]
    assert all(document.text.endswith("\n\n") for document in parts[:-1])


def test_few_small_files_still_give_two_splits(tmp_path: Path) -> None:
    write(tmp_path, a="first", b="second", c="third")
    splits = dict(split_documents(scan(paths(f"{tmp_path}/*.txt"), 0.001)))
    assert set(splits) == {"train", "valid"}
