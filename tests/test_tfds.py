"""A TFDS folder prepared as array_record is read without TensorFlow, all of it or not at all."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tfds_folder import write_folder

from lckv_jax.config import SourceConfig
from lckv_jax.data.corpora import check_repeats, documents, scan, split_documents
from lckv_jax.errors import UserError

TEXTS = [f"document {number} é" for number in range(50)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real array_record folder of two splits, the first in two files. Only to be read."""
    out = tmp_path_factory.mktemp("tfds")
    return write_folder(out, {"train": TEXTS, "test": ["held out", " ", "two"]}, shards=2)


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "text_files" / "1.0.0"))


def tfds_source(folder: Path, split: str = "", field: str = "text") -> SourceConfig:
    return SourceConfig(path=f"tfds:{folder}{split}", field=field)


def change_info(folder: Path, change: Callable[[dict], object]) -> None:
    info = json.loads((folder / "dataset_info.json").read_text())
    change(info)
    (folder / "dataset_info.json").write_text(json.dumps(info))


def test_every_example_of_a_split_is_a_document(prepared: Path) -> None:
    assert len(list(prepared.glob("*array_record*"))) == 4  # two files a split
    found = list(documents([tfds_source(prepared)]))
    assert len(found) == len(TEXTS)
    assert sorted(document.text for document in found) == sorted(TEXTS)  # TFDS shuffles when it writes
    assert [document.name for document in found] == [f"text_files/1.0.0/train#{number}" for number in range(50)]
    assert found == list(documents([tfds_source(prepared, ":train")]))
    assert "tensorflow" not in sys.modules


def test_a_named_split_is_read(prepared: Path) -> None:
    found = list(documents([tfds_source(prepared, ":test")]))
    assert sorted(document.text for document in found) == ["held out", "two"]
    assert {document.name.split("#")[0] for document in found} == {"text_files/1.0.0/test"}


def test_names_do_not_depend_on_the_folder(prepared: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parent)
    assert list(documents([SourceConfig(path="tfds:1.0.0:train")])) == list(documents([tfds_source(prepared)]))


def test_examples_are_held_out_like_other_documents(prepared: Path) -> None:
    corpus = scan([tfds_source(prepared)], 0.2)
    splits = [split for split, _ in split_documents(corpus)]
    assert corpus.blocks == 0
    assert 2 <= splits.count("valid") <= 20


@pytest.mark.parametrize("kind", ["tfrecord", "riegeli", "parquet", None])
def test_another_file_format_is_refused(kind: str | None, copy: Path) -> None:
    change_info(copy, lambda info: info.update(fileFormat=kind) if kind else info.pop("fileFormat"))
    message = rf"1\.0\.0 is prepared as {kind or 'tfrecord'}, but array_record is needed; prepare it with builder\."
    with pytest.raises(UserError, match=message):
        list(documents([tfds_source(copy)]))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (":nothing/here", r"there is no folder nothing/here; give the version's folder"),
        (":text_files", r"text_files is no prepared TensorFlow Datasets folder.*did you mean 1\.0\.0 in it"),
        (":.", r"no dataset_info\.json; did you mean text_files/1\.0\.0"),
        (":empty", r"empty is no prepared TensorFlow Datasets folder.*make one with builder\."),
        (":text_files/1.0.0:valid", r"1\.0\.0 has no split 'valid'; it has train, test"),
        (":", r"'tfds:' names no folder"),
    ],
)
def test_unusable_paths_are_named(source: str, message: str, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parent.parent)
    Path("empty").mkdir()
    with pytest.raises(UserError, match=message):
        list(documents([SourceConfig(path=f"tfds{source}")]))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("body", r"has no feature 'body'; it has number, text, words: name the one"),
        ("number", r"example 0 of train: feature 'number' is a number, not text"),
        ("words", r"example 0 of train: feature 'words' is a list, not text"),
    ],
)
def test_unusable_features_are_named(field: str, message: str, prepared: Path) -> None:
    with pytest.raises(UserError, match=message):
        list(documents([tfds_source(prepared, field=field)]))


@pytest.mark.parametrize("claimed", [24, 26])
def test_another_count_than_claimed_is_refused(claimed: int, copy: Path) -> None:
    def claim(info: dict) -> None:
        lengths = info["splits"][0]["shardLengths"]
        assert sum(map(int, lengths)) == 50
        lengths[0] = str(int(lengths[0]) + claimed - 25)

    change_info(copy, claim)
    with pytest.raises(UserError, match=rf"train hold 50 examples, but dataset_info.json says {claimed + 25}"):
        list(documents([tfds_source(copy)]))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[110] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_damaged_files_are_refused(damage: Callable[[Path], None], copy: Path) -> None:
    damage(copy / "text_files-train.array_record-00001-of-00002")
    with pytest.raises(UserError, match=r"prepare .*again"):
        list(documents([tfds_source(copy)]))


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_damaged_descriptions_are_refused(name: str, copy: Path) -> None:
    (copy / name).write_text("{")
    with pytest.raises(UserError, match=r"1\.0\.0: dataset_info\.json or features\.json cannot be used"):
        list(documents([tfds_source(copy)]))


def test_a_split_named_twice_is_refused(prepared: Path) -> None:
    check_repeats([tfds_source(prepared), tfds_source(prepared, ":test")])
    with pytest.raises(UserError, match=r"1\.0\.0:train is named twice"):
        check_repeats([tfds_source(prepared), tfds_source(prepared, ":train")])
