"""A folder is prepared once, completely or not at all, with the same bytes each time, and never from other settings."""

import hashlib
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lckv_jax.config import DataConfig, SourceConfig
from lckv_jax.data import prepare as prepare_module
from lckv_jax.data import shards
from lckv_jax.data.corpora import documents, scan, split_documents
from lckv_jax.data.manifest import SplitInfo
from lckv_jax.data.prepare import Manifest, load_manifest, prepare, verify
from lckv_jax.data.tokenizer import Bytes, load_tokenizer, train_sentencepiece
from lckv_jax.errors import Stopped, UserError

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


def weighted(data: DataConfig, *weights: float | None) -> DataConfig:
    """Documents 10 to 19, 20 to 29 and 30 to 39 as sources of their own."""
    folder = Path(data.sources[0].path).parent
    sources = tuple(
        SourceConfig(path=f"{folder}/{ten}?.txt", weight=weight) for ten, weight in enumerate(weights, start=1)
    )
    return data.model_copy(update={"sources": sources, "validation_fraction": 0.2})


def stored(folder: str | Path, info: SplitInfo) -> list[int]:
    return [int(id) for shard in info.shards for id in np.fromfile(Path(folder) / shard.file, "<u2")]


def test_each_weighted_source_is_a_component(data: DataConfig) -> None:
    data = weighted(data, 0.2, 0.3, 0.5)
    manifest = prepare(data, VOCAB, quiet)
    tokenizer = load_tokenizer(Path(data.folder) / "tokenizer.model")
    valid: list[int] = []
    for source, component in zip(data.sources, manifest.components, strict=True):
        split: dict[str, list[int]] = {"train": [], "valid": valid}
        for name, document in split_documents(scan([source], 0.2)):
            split[name] += [1, *tokenizer.encode(document.text), 2]
        assert stored(data.folder, component) == split["train"]
    assert stored(data.folder, manifest.valid) == valid
    assert stored(data.folder, manifest.train) == [
        id for component in manifest.components for id in stored(data.folder, component)
    ]
    for field in ("documents", "tokens", "bytes"):
        assert getattr(manifest.train, field) == sum(getattr(component, field) for component in manifest.components)


def test_other_weights_are_the_same_data(data: DataConfig) -> None:
    manifest = prepare(weighted(data, 0.2, 0.3, 0.5), VOCAB, quiet)
    for weights in ((0.6, 0.2, 0.2), (None, None, None)):
        assert prepare(weighted(data, *weights), VOCAB, quiet).hash == manifest.hash
    assert '"weight"' not in (Path(data.folder) / "manifest.json").read_text()


def test_weights_need_components(data: DataConfig) -> None:
    prepare(weighted(data, None, None), VOCAB, quiet)
    with pytest.raises(UserError, match=r"for data\.sources without weights, which lie in it as one, but the config"):
        prepare(weighted(data, 0.5, 0.5), VOCAB, quiet)


def test_validation_sources_leave_the_others_whole(data: DataConfig) -> None:
    data = weighted(data, None, None, None)
    *sources, last = data.sources
    data = data.model_copy(update={"sources": tuple(sources), "validation": (last,)})
    lines: list[str] = []
    manifest = prepare(data, VOCAB, lines.append)
    tokenizer = load_tokenizer(Path(data.folder) / "tokenizer.model")
    for info, named in ((manifest.train, sources), (manifest.valid, [last])):
        texts = [document.text for document in documents(named)]
        assert stored(data.folder, info) == [id for text in texts for id in (1, *tokenizer.encode(text), 2)]
    assert manifest.validation_fraction is None
    other = data.model_copy(update={"validation_fraction": 0.5})
    assert prepare(other, VOCAB, quiet) == manifest
    with pytest.raises(UserError, match=r"data\.validation=\[.*\], but the config says \[\]"):
        prepare(data.model_copy(update={"validation": ()}), VOCAB, quiet)


def test_a_file_to_train_and_validate_on_is_refused(data: DataConfig) -> None:
    with pytest.raises(UserError, match="named twice"):
        prepare(data.model_copy(update={"validation": data.sources}), VOCAB, quiet)
    with pytest.raises(UserError, match="named twice"):
        prepare(data.model_copy(update={"sources": weighted(data, 0.5).sources + data.sources}), VOCAB, quiet)


def test_empty_validation_sources_are_refused(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    validation = (SourceConfig(path=f"{tmp_path}/empty.txt"),)
    with pytest.raises(UserError, match=r"data\.validation: empty corpus"):
        prepare(data.model_copy(update={"validation": validation}), VOCAB, quiet)


def test_a_small_validation_split_is_told(data: DataConfig) -> None:
    for seq_len, told in ((16, False), (1024, True)):
        lines: list[str] = []
        shaped = data.model_copy(update={"seq_len": seq_len, "folder": f"{data.folder}{seq_len}"})
        prepare(shaped, VOCAB, lines.append)
        assert any(line.startswith("the validation split is small") for line in lines) == told


def test_where_bos_is_eos_it_comes_once(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bytes, "eos_id", Bytes.bos_id)
    manifest = prepare(data.model_copy(update={"tokenizer": "bytes"}), VOCAB, quiet)
    assert manifest.eos_id == manifest.bos_id == 256
    tokens = stored(data.folder, manifest.train)
    assert (tokens[0], tokens[-1] < 256) == (256, True)
    assert tokens.count(256) == manifest.train.documents
    assert manifest.train.tokens == manifest.train.bytes + manifest.train.documents


@pytest.mark.usefixtures("small_blocks")
def test_verify_finds_all_damage(data: DataConfig) -> None:
    manifest = prepare(data, VOCAB, quiet)
    lines: list[str] = []
    assert verify(data.folder, lines.append) == manifest
    assert lines[-1].endswith("are what was prepared")
    files = [Path(data.folder) / shard.file for shard in (*manifest.train.shards, *manifest.valid.shards)]
    content = files[1].read_bytes()
    for byte, block in ((0, 0), (255, 0), (256, 1), (len(content) - 1, (len(content) - 1) // 256)):
        files[1].write_bytes(content[:byte] + bytes([content[byte] ^ 1]) + content[byte + 1 :])
        with pytest.raises(UserError, match=rf"damaged: train-0-00001\.bin block {block} .* has another hash; copy it"):
            verify(data.folder, quiet)
    files[1].write_bytes(content[:-2])
    with pytest.raises(UserError, match=rf"train-0-00001\.bin has {len(content) - 2} bytes instead of {len(content)};"):
        verify(data.folder, quiet)
    files[-1].unlink()
    with pytest.raises(UserError, match=r"train-0-00001\.bin has .*, valid-0000\d\.bin cannot be read \(No such file"):
        verify(data.folder, quiet)
    for path in files[2:5]:
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"\(and 2 more\)"):
        verify(data.folder, quiet)


def test_verify_looks_at_the_tokenizer(data: DataConfig) -> None:
    prepare(data, VOCAB, quiet)
    (Path(data.folder) / "tokenizer.model").write_bytes(train_sentencepiece(["".join(WORDS)] * 9, 290))
    with pytest.raises(UserError, match="that the tokens were made with"):
        verify(data.folder, quiet)
    with pytest.raises(UserError, match="holds no prepared data"):
        verify(Path(data.folder).parent, quiet)


def test_of_two_at_once_one_prepares(data: DataConfig) -> None:
    """The other is told to wait, or finds it done."""
    gate = threading.Barrier(2)

    def attempt(_: int) -> Manifest | str:
        gate.wait()
        try:
            return prepare(data, VOCAB, quiet)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(attempt, range(2)))
    made = [result for result in results if isinstance(result, Manifest)]
    assert made and all(result == made[0] for result in made)
    assert all("another process is preparing" in result for result in results if isinstance(result, str))
    assert verify(data.folder, quiet) == made[0]


def test_a_tokenizer_in_the_folder_to_be_made_is_not_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "ready").mkdir()
    model = tmp_path / "ready" / "tokenizer.model"
    model.write_bytes(b"somebody's own")
    data = DataConfig(tokenizer=str(model), folder=str(tmp_path / "ready"))
    with pytest.raises(UserError, match=r"lies in data\.folder"):
        prepare(data, 512)
    assert model.read_bytes() == b"somebody's own"


def test_files_that_prepare_did_not_make_stay(data: DataConfig) -> None:
    folder = Path(data.folder)
    folder.mkdir()
    for name in ("tokenizer.json", "train-00000.bin", "tokenizer.py"):
        (folder / name).write_text("somebody's own")
    for _ in range(2):
        with pytest.raises(UserError, match=r"did not make \(tokenizer.json, train-00000.bin\); choose an empty"):
            prepare(data, VOCAB, quiet)
    assert {path.read_text() for path in folder.iterdir()} == {"somebody's own"}


def test_what_interrupts_the_reading_of_texts_comes_out_as_it_is() -> None:
    def texts() -> Iterator[str]:
        yield "a text"
        raise Stopped("stopped")

    with pytest.raises(Stopped):
        train_sentencepiece(texts(), 300)
