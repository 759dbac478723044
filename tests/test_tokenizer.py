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

from lckv_jax.data.tokenizer import SentencePiece, load_tokenizer, train_sentencepiece
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


def test_llama2_model_loads(test_data: Path) -> None:
    path = test_data / "tokenizers" / "llama2" / "tokenizer.model"
    if not path.exists():
        pytest.skip(f"no {path}")
    tokenizer = load_tokenizer(path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32000, 1, 2)
    assert tokenizer.encode("Hello world") == [15043, 3186]
    assert tokenizer.decode([1, 15043, 3186, 2]) == "Hello world"
