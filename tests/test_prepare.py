"""A folder is prepared once, completely or not at all, with the same bytes each time, and never from other settings."""

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest

from lckv_jax.config import DataConfig, SourceConfig
from lckv_jax.data import prepare as prepare_module
from lckv_jax.data import shards
from lckv_jax.data.corpora import scan, split_documents
from lckv_jax.data.prepare import Manifest, load_manifest, prepare
from lckv_jax.data.tokenizer import load_tokenizer, train_sentencepiece
from lckv_jax.errors import UserError

WORDS = [f"{a}{b}" for a in ("to", "ma", "sen", "kri", "vo") for b in ("ra", "lim", "gus", "ne")]
VOCAB = 300
BUILTIN = (SourceConfig(path="builtin"),)


def quiet(line: str) -> None:
    pass


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Forty small documents, a tenth held out."""
    (tmp_path / "texts").mkdir()
    for number in range(40):
        rng = random.Random(number)
        text = "".join(rng.choice(WORDS) + rng.choice("  \n") for _ in range(rng.randint(1, 200)))
        (tmp_path / "texts" / f"{number}.txt").write_text(f"é{number}\n{text}")
    return DataConfig(
        sources=(SourceConfig(path=f"{tmp_path}/texts/*.txt"),),
        folder=str(tmp_path / "ready"),
        validation_fraction=0.1,
        seq_len=16,
    )


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a shard, several shards a split, several tokenised batches."""
    monkeypatch.setattr(shards, "BLOCK_BYTES", 256)
    monkeypatch.setattr(shards, "SHARD_BLOCKS", 3)
    monkeypatch.setattr(prepare_module, "_ENCODE_CHARS", 2000)


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("vocab_size", "dtype"), [(VOCAB, "<u2"), (65_537, "<u4")])
def test_shards_hold_every_document_between_bos_and_eos(vocab_size: int, dtype: str, data: DataConfig) -> None:
    if vocab_size != VOCAB:
        model = Path(data.folder).with_name("given.model")
        model.write_bytes(train_sentencepiece(["".join(WORDS)] * 9, 290))
        data = data.model_copy(update={"tokenizer": str(model)})
    manifest = prepare(data, vocab_size, quiet)
    folder = Path(data.folder)
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    for name, info in (("train", manifest.train), ("valid", manifest.valid)):
        corpus = scan(data.sources, 0.1)
        texts = [document.text for split, document in split_documents(corpus) if split == name]
        expected = [id for text in texts for id in (1, *tokenizer.encode(text), 2)]
        stored = [np.fromfile(folder / shard.file, dtype) for shard in info.shards]
        assert np.concatenate(stored).tolist() == expected
        assert (info.documents, info.tokens) == (len(texts), len(expected))
        assert info.bytes == sum(len(text.encode()) for text in texts)
        assert [len(tokens) for tokens in stored] == [shard.tokens for shard in info.shards]
        for shard in info.shards:
            raw = (folder / shard.file).read_bytes()
            blocks = [raw[start : start + 256] for start in range(0, len(raw), 256)]
            assert len(blocks) <= 3
            assert [hashlib.blake2b(block, digest_size=16).hexdigest() for block in blocks] == list(shard.blocks)
    assert len(manifest.train.shards) > 2
    assert (manifest.dtype, manifest.bos_id, manifest.eos_id) == (dtype, 1, 2)
    assert manifest.tokenizer_fingerprint == tokenizer.fingerprint


@pytest.mark.usefixtures("small_blocks")
def test_two_preparations_are_byte_identical(data: DataConfig) -> None:
    first = prepare(data, VOCAB, quiet)
    again = data.model_copy(update={"folder": data.folder + "2"})
    assert prepare(again, VOCAB, quiet).hash == first.hash
    assert contents(again.folder) == contents(data.folder)


def test_builtin_source_is_ready_to_train_on(tmp_path: Path) -> None:
    lines: list[str] = []
    manifest = prepare(DataConfig(folder=str(tmp_path)), 4096, lines.append)
    assert any("trained a tokenizer of 4096 ids" in line for line in lines)
    assert manifest.train.tokens > 50 * 512 * 8
    assert manifest.valid.tokens > 512 * 8
    assert 2.5 < manifest.train.bytes / manifest.train.tokens < 5
    tokens = np.fromfile(tmp_path / "train-0-00000.bin", "<u2", count=50_000)
    second = np.flatnonzero(tokens == 1)[1]
    texts = (document.text for split, document in split_documents(scan(BUILTIN, 0.02)) if split == "train")
    assert load_tokenizer(tmp_path / "tokenizer.model").decode(tokens[:second]) == next(texts)


def test_manifest_hash_covers_tokens_and_settings(data: DataConfig) -> None:
    manifest = prepare(data, VOCAB, quiet)
    assert load_manifest(data.folder) == manifest
    assert load_manifest(data.folder).hash == manifest.hash
    name = min(Path(data.sources[0].path).parent.iterdir())
    name.write_text(name.read_text() + "!")
    other = prepare(data.model_copy(update={"folder": data.folder + "2"}), VOCAB, quiet)
    assert other.corpus_fingerprint != manifest.corpus_fingerprint
    assert other.hash != manifest.hash


def test_prepared_folder_is_only_read(data: DataConfig) -> None:
    first = prepare(data, VOCAB, quiet)
    stamps = {path: path.stat().st_mtime_ns for path in Path(data.folder).iterdir()}
    for path in Path(data.sources[0].path).parent.iterdir():
        path.unlink()
    lines: list[str] = []
    assert prepare(data.model_copy(update={"seq_len": 8, "batch_size": 2}), VOCAB, lines.append) == first
    assert not lines
    assert {path: path.stat().st_mtime_ns for path in Path(data.folder).iterdir()} == stamps


@pytest.mark.parametrize(
    ("change", "vocab_size", "message"),
    [
        ({}, 301, r"model\.vocab_size=300, but the config says 301"),
        (
            {"sources": BUILTIN},
            VOCAB,
            r'data\.sources=\[".*txt"\], but the config says \["builtin"\]',
        ),
        ({"tokenizer": "x.model"}, VOCAB, r'data\.tokenizer="train", but the config says "x\.model"'),
        ({"validation_fraction": 0.2}, VOCAB, r"data\.validation_fraction=0\.1, but the config says 0\.2"),
    ],
)
def test_other_settings_are_refused(change: dict, vocab_size: int, message: str, data: DataConfig) -> None:
    prepare(data, VOCAB, quiet)
    before = contents(data.folder)
    with pytest.raises(UserError, match=message + "; choose another data.folder"):
        prepare(data.model_copy(update=change), vocab_size, quiet)
    assert contents(data.folder) == before


def test_tokenizer_with_too_many_ids_is_refused(data: DataConfig) -> None:
    model = Path(data.folder).with_name("given.model")
    model.write_bytes(train_sentencepiece(["".join(WORDS)] * 9, 290))
    given = data.model_copy(update={"tokenizer": str(model)})
    with pytest.raises(UserError, match=r"given\.model has 290 ids, but model\.vocab_size=289; set .* at least 290"):
        prepare(given, 289, quiet)
    assert prepare(given, 1000, quiet).vocab_size == 1000
    assert contents(given.folder)["tokenizer.model"] == model.read_bytes()


def test_tokenizer_is_trained_on_the_training_split_only(data: DataConfig) -> None:
    prepare(data, VOCAB, quiet)
    texts = [document.text for split, document in split_documents(scan(data.sources, 0.1)) if split == "train"]
    assert contents(data.folder)["tokenizer.model"] == train_sentencepiece(texts, VOCAB)


def test_missing_tokenizer_is_named(data: DataConfig) -> None:
    with pytest.raises(UserError, match=r"tokenizer none\.model cannot be read"):
        prepare(data.model_copy(update={"tokenizer": "none.model"}), VOCAB, quiet)


@pytest.mark.parametrize("damage", ["{", '{"version": 1}', "[]"])
def test_damaged_manifest_is_named(damage: str, data: DataConfig) -> None:
    prepare(data, VOCAB, quiet)
    (Path(data.folder) / "manifest.json").write_text(damage)
    with pytest.raises(UserError, match=r"manifest\.json is damaged or of another version.*delete"):
        prepare(data, VOCAB, quiet)


def test_folder_that_cannot_be_made_is_named(data: DataConfig) -> None:
    Path(data.folder).write_text("a file")
    with pytest.raises(UserError, match=r"ready cannot be written: File exists"):
        prepare(data, VOCAB, quiet)


def test_each_stage_reports_a_line(data: DataConfig) -> None:
    lines: list[str] = []
    manifest = prepare(data, VOCAB, lines.append)
    assert isinstance(manifest, Manifest)
    stages = [line.split()[0] for line in lines]
    assert stages == ["read", "trained", "tokenised", "prepared"]
    assert "40 documents" in lines[0]
    assert f"{manifest.train.tokens} tokens" in lines[2]
