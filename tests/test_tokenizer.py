"""Text round-trips through the tokenizer; what cannot be a tokenizer says so in one sentence."""

import hashlib
import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lckv_jax.data.tokenizer import (
    Bytes,
    SentencePiece,
    find_tokenizer,
    load_tokenizer,
    tokenizer_contents,
    tokenizer_files,
    train_sentencepiece,
)
from lckv_jax.errors import UserError

WORDS = [f"{a}{b}" for a in ("to", "ma", "sen", "kri", "vo") for b in ("ra", "lim", "gus", "ne")]
TEXTS = [" ".join(random.Random(seed).choices(WORDS, k=200)) + "\n" for seed in range(20)]


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_sentencepiece(TEXTS, 300)


@pytest.fixture(scope="module")
def tokenizer(model: bytes) -> SentencePiece:
    return SentencePiece(model)


def test_training_gives_the_asked_size_and_the_same_bytes(model: bytes, tokenizer: SentencePiece) -> None:
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (300, 1, 2)
    assert train_sentencepiece(iter(TEXTS), 300) == model
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))  # U+2581 stands for a space
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_text_round_trips_without_special_tokens(tokenizer: SentencePiece, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)


def test_special_tokens_in_text_stay_text(tokenizer: SentencePiece) -> None:
    ids = tokenizer.encode("a </s> <s> b")
    assert not {1, 2} & set(ids)
    assert tokenizer.decode(np.array(ids, np.int32)) == "a </s> <s> b"


def test_batch_equals_one_by_one(tokenizer: SentencePiece) -> None:
    texts = [*TEXTS, "", " lead", "\n\n\ttab"]
    batch = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts]


def test_pickles(tokenizer: SentencePiece) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert copy.fingerprint == tokenizer.fingerprint


def test_fingerprint_is_of_the_pieces(model: bytes, tokenizer: SentencePiece) -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [(processor.id_to_piece(id), processor.get_score(id) or 0.0) for id in range(300)]  # -0.0 is 0.0
    assert tokenizer.fingerprint == hashlib.sha256(json.dumps(pieces).encode()).hexdigest()
    assert SentencePiece(train_sentencepiece(TEXTS, 300)).fingerprint == tokenizer.fingerprint
    assert SentencePiece(train_sentencepiece(TEXTS, 299)).fingerprint != tokenizer.fingerprint


def test_text_in_one_long_line_is_not_dropped() -> None:
    line = "".join(TEXTS).replace("\n", " ") * 3
    assert len(line) > 20_000
    assert SentencePiece(train_sentencepiece([line], 300)).vocab_size == 300


def test_too_large_vocabulary_names_one_that_works() -> None:
    with pytest.raises(UserError, match=r"vocab_size=4096: it yields (\d+) pieces; set model\.vocab_size=\1") as error:
        train_sentencepiece(TEXTS, 4096)
    works = int(str(error.value).split("it yields ")[1].split()[0])
    assert SentencePiece(train_sentencepiece(TEXTS, works)).vocab_size == works


def test_too_small_vocabulary_names_one_that_works() -> None:
    with pytest.raises(UserError, match=r"vocab_size=200 is too small .* need (\d+);") as error:
        train_sentencepiece(TEXTS, 200)
    needed = int(str(error.value).split("alone need ")[1].split(";")[0])
    assert SentencePiece(train_sentencepiece(TEXTS, needed + 1)).vocab_size == needed + 1


def test_no_text_is_a_user_error() -> None:
    with pytest.raises(UserError, match="empty"):
        train_sentencepiece(["\n\n"], 300)


def test_training_and_errors_are_quiet(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    train_sentencepiece(TEXTS, 300)
    (tmp_path / "bad.model").write_bytes(b"garbage")
    with pytest.raises(UserError):
        load_tokenizer(tmp_path / "bad.model")
    with pytest.raises(UserError):
        train_sentencepiece(TEXTS, 200)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("content", [b"", b"garbage", None, "cut"])
def test_broken_model_is_named(content: bytes | str | None, model: bytes, tmp_path: Path) -> None:
    path = tmp_path / "some.model"
    if content is not None:
        path.write_bytes(model[: len(model) // 2] if isinstance(content, str) else content)
    with pytest.raises(UserError, match=r"some\.model (is|cannot be read).*data\.tokenizer=train"):
        load_tokenizer(path)


@pytest.mark.parametrize(("special", "word"), [("bos_id", "begin"), ("eos_id", "end")])
def test_model_without_bos_or_eos_is_refused(special: str, word: str, tmp_path: Path) -> None:
    import sentencepiece

    ids = {"bos_id": 1, "eos_id": 2, special: -1}
    ids = {name: id if id < 0 else 1 for name, id in ids.items()}
    prefix = str(tmp_path / "some")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=prefix, vocab_size=50, model_type="bpe", minloglevel=2, **ids
    )
    with pytest.raises(UserError, match=rf"some\.model has no token for the {word}"):
        load_tokenizer(tmp_path / "some.model")


@pytest.mark.parametrize("name", ["<s>", "</s>"])
def test_model_that_takes_text_for_begin_or_end_is_refused(name: str, tmp_path: Path) -> None:
    import sentencepiece

    prefix = str(tmp_path / "some")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=prefix, vocab_size=30, user_defined_symbols=[name], minloglevel=2
    )
    with pytest.raises(UserError, match=r"some\.model has no token for the (begin|end)"):
        load_tokenizer(tmp_path / "some.model")


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_bytes_are_ids(text: str) -> None:
    tokenizer = load_tokenizer("bytes")
    assert bytes(tokenizer.encode(text)) == text.encode()
    assert tokenizer.decode([256, *tokenizer.encode(text), 257]) == text
    (ids,) = tokenizer.encode_batch([text])
    assert (ids.dtype, ids.tolist()) == (np.int32, tokenizer.encode(text))


def test_any_bytes_decode() -> None:
    tokenizer = Bytes()
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (258, 256, 257)
    assert tokenizer.decode([104, 0xC3, 105, 256]) == "h\ufffdi"
    with pytest.raises(IndexError, match="id 258 of 258"):
        tokenizer.decode(np.array([104, 258]))
    assert pickle.loads(pickle.dumps(tokenizer)).fingerprint == tokenizer.fingerprint


@pytest.fixture(scope="module")
def given_files(model: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of each kind under a name of its own."""
    from tokenizers import Tokenizer, models

    folder = tmp_path_factory.mktemp("given")
    (folder / "my.model").write_bytes(model)
    (folder / "no_suffix").write_bytes(model)
    own = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    own.add_special_tokens(["<s>", "</s>", "<e>"])
    own.save(str(folder / "my.json"))
    own.save(str(folder / "my.txt"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "<e>"}')
    return folder


KINDS = {
    "my.model": ["tokenizer.model"],
    "no_suffix": ["tokenizer.model"],
    "my.json": ["tokenizer.json", "tokenizer_config.json"],
    "my.txt": ["tokenizer.json", "tokenizer_config.json"],
    "bytes": ["tokenizer.bytes"],
}


@pytest.mark.parametrize("name", KINDS)
def test_a_tokenizer_put_into_a_folder_is_found_there(name: str, given_files: Path, tmp_path: Path) -> None:
    path = name if name == "bytes" else given_files / name
    for placed, content in tokenizer_contents(path).items():
        (tmp_path / placed).write_bytes(content)
    assert tokenizer_files(tmp_path) == [tmp_path / placed for placed in KINDS[name]]
    (tmp_path / "again").mkdir()
    for file in tokenizer_files(tmp_path):
        (tmp_path / "again" / file.name).write_bytes(file.read_bytes())
    original = load_tokenizer(path)
    for folder in (tmp_path, str(tmp_path / "again")):
        found = find_tokenizer(folder)
        assert found is not None
        assert type(found) is type(original)
        assert (found.bos_id, found.eos_id) == (original.bos_id, original.eos_id)
        assert (found.fingerprint, found.encode("ab")) == (original.fingerprint, original.encode("ab"))
    fingerprints = {load_tokenizer(given_files / "my.json").fingerprint, load_tokenizer("bytes").fingerprint}
    assert len(fingerprints) == 2


def test_a_folder_without_a_tokenizer_or_with_two_says_so(given_files: Path, tmp_path: Path) -> None:
    assert tokenizer_files(tmp_path) == []
    assert find_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert find_tokenizer(tmp_path) is None
    for name in ("bytes", given_files / "my.model"):
        for placed, content in tokenizer_contents(name).items():
            (tmp_path / placed).write_bytes(content)
    with pytest.raises(UserError, match=r"holds tokenizer\.model and tokenizer\.bytes; keep the one"):
        find_tokenizer(tmp_path)


def test_a_folder_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder; name the tokenizer\.model or tokenizer\.json in it"):
        load_tokenizer(tmp_path)


def test_a_changed_bytes_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.bytes").write_text("other")
    with pytest.raises(UserError, match=r"tokenizer\.bytes is not the file of a bytes tokenizer"):
        find_tokenizer(tmp_path)


def test_llama2_model_loads(test_data: Path) -> None:
    path = test_data / "tokenizers" / "llama2" / "tokenizer.model"
    if not path.exists():
        pytest.skip(f"no {path}")
    tokenizer = load_tokenizer(path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32000, 1, 2)
    assert tokenizer.encode("Hello world") == [15043, 3186]
    assert tokenizer.decode([1, 15043, 3186, 2]) == "Hello world"
