"""Text <-> token ids. One protocol; sentencepiece implements it and is imported only where it is used."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from lckv_jax.errors import UserError

_LINE_CHARS = 4096  # at most 16384 bytes of UTF-8: the trainer drops longer lines without a word
_TRAINING_LINES = 2_000_000  # a larger corpus is sampled, so that training needs bounded memory


class Tokenizer(Protocol):
    """What the rest of the code knows of a tokenizer. Implementations pickle."""

    @property
    def vocab_size(self) -> int:
        """Ids are 0..vocab_size-1."""
        ...

    @property
    def bos_id(self) -> int:
        """Begins every document."""
        ...

    @property
    def eos_id(self) -> int:
        """Ends every document."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers with equal pieces; hex sha256."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, never BOS or EOS, whatever the text: BOS is how a reader finds where documents begin."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text on all cores, int32 [tokens] each."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; BOS and EOS are no text."""
        ...


class SentencePiece:
    """A sentencepiece model (BPE or unigram) as a Tokenizer.

    model: the bytes of a .model file. Raises ValueError if they are not one, or have no BOS or EOS.
    """

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        if not model:  # parsed without complaint, then every call complains on stderr
            raise ValueError("is empty")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError("is not a sentencepiece model") from error
        if self.bos_id < 0 or self.eos_id < 0:
            missing = "begin (bos)" if self.bos_id < 0 else "end (eos)"
            raise ValueError(f"has no token for the {missing} of a document, which separates packed documents")

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    @property
    def bos_id(self) -> int:
        return self._processor.bos_id()

    @property
    def eos_id(self) -> int:
        return self._processor.eos_id()

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over the (piece, score) list: file bytes differ between versions of sentencepiece."""
        processor = self._processor
        # + 0.0: a score of -0.0 equals 0.0 but prints otherwise
        pieces = [(processor.id_to_piece(id), processor.get_score(id) + 0.0) for id in range(self.vocab_size)]
        return hashlib.sha256(json.dumps(pieces).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self._processor.encode(list(texts), out_type="numpy")

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(id) for id in ids])


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in the file `path`, a sentencepiece .model. Raises UserError if it cannot be one."""
    path = Path(path).expanduser()
    try:
        return SentencePiece(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"tokenizer {path} cannot be read: {error.strerror}; give the path of a sentencepiece .model, "
            "or data.tokenizer=train"
        ) from error
    except ValueError as error:
        raise UserError(
            f"tokenizer {path} {error}; give a whole sentencepiece .model with bos and eos, or data.tokenizer=train"
        ) from error


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """The bytes of a sentencepiece BPE model of exactly `vocab_size` pieces, trained on `texts`.

    Text round-trips exactly (no normalisation, byte fallback), and the same texts give the same bytes. Raises UserError
    if the texts have too many characters or too few pairs for `vocab_size`, and says which size works.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.9995,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * _LINE_CHARS,
            input_sentence_size=_TRAINING_LINES,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,  # the file's bytes depend on it
            minloglevel=2,
        )
    except RuntimeError as error:
        _raise_if_too_small(error, vocab_size)
        raise
    pieces = SentencePiece(model.getvalue()).vocab_size
    if pieces < vocab_size:
        raise UserError(
            f"the training text is too small for a tokenizer of model.vocab_size={vocab_size}: it yields {pieces} "
            f"pieces; set model.vocab_size={pieces} or less, or give more text"
        )
    return model.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines, as pieces never cross a line end; long ones cut."""
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _LINE_CHARS):
                yield line[start : start + _LINE_CHARS]


def _raise_if_too_small(error: RuntimeError, vocab_size: int) -> None:
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
        raise UserError(
            f"model.vocab_size={vocab_size} is too small for a tokenizer of this text: bytes, special tokens and its "
            f"characters alone need {match[1]}; set model.vocab_size to more than that"
        ) from error
    if "sentences_.empty()" in str(error):
        raise UserError("the training text for the tokenizer is empty; give more text") from error
