"""Text <-> token ids: one protocol for sentencepiece models, tokenizer.json and raw bytes, and where their files lie.

The libraries are imported only where they are used.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from lckv_jax.data.tokenizer_json import TokenizerJson
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
        """Ends every document. Where it is also `bos_id`, the next document's begin is this one's end: nothing is put
        after a document, so that each still begins at its one BOS."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that give equal ids; hex sha256."""
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


class Bytes:
    """The bytes of UTF-8 as ids 0 to 255, BOS 256, EOS 257. Any text round-trips; any ids decode."""

    vocab_size, bos_id, eos_id = 258, 256, 257
    fingerprint = hashlib.sha256(b"bytes of UTF-8, bos 256, eos 257").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """What is not UTF-8 becomes U+FFFD; IndexError for an id that is no byte, BOS or EOS."""
        ids = [int(id) for id in ids]
        if outside := [id for id in ids if not 0 <= id < self.vocab_size]:
            raise IndexError(f"id {outside[0]} of {self.vocab_size}")
        return bytes(id for id in ids if id < 256).decode(errors="replace")


# ---------------------------------------------------------------- files

_BYTES = b"Tokens are bytes: ids 0 to 255; 256 begins a document, 257 ends it.\n"
_KINDS = ("tokenizer.model", "tokenizer.json", "tokenizer.bytes")
_CONFIG = "tokenizer_config.json"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a file: a sentencepiece .model, a tokenizer.json, or what `tokenizer_contents` made of `bytes`.

    path: of the file, or the word `bytes`. Beside a tokenizer.json its tokenizer_config.json is read, if there is one.
    Raises UserError if it cannot be a tokenizer.
    """
    contents = tokenizer_contents(path)
    (kind, content), *others = contents.items()
    try:
        if kind == "tokenizer.bytes":
            if content != _BYTES:
                raise ValueError("is not the file of a bytes tokenizer")
            return Bytes()
        if kind == "tokenizer.json":
            return TokenizerJson(content, dict(others).get(_CONFIG))
        return SentencePiece(content)
    except ValueError as error:
        raise UserError(
            f"tokenizer {path} {error}; give a whole sentencepiece .model or tokenizer.json with bos and eos, "
            "or data.tokenizer=train or bytes"
        ) from error


def tokenizer_contents(path: str | Path) -> dict[str, bytes]:
    """The files, by name, that make a tokenizer when they lie in one folder; the one that tells its kind is first.

    path: as for `load_tokenizer`. Raises UserError if it cannot be read.
    """
    if path == "bytes":
        return {"tokenizer.bytes": _BYTES}
    path = Path(path).expanduser()
    try:
        content = path.read_bytes()
        config = path.with_name(_CONFIG)
        if path.suffix == ".json" or (path.suffix != ".model" and content.lstrip()[:1] == b"{"):
            return {"tokenizer.json": content, **({_CONFIG: config.read_bytes()} if config.exists() else {})}
    except IsADirectoryError as error:
        raise UserError(f"tokenizer {path} is a folder; name the tokenizer.model or tokenizer.json in it") from error
    except OSError as error:
        raise UserError(
            f"tokenizer {error.filename or path} cannot be read: {error.strerror}; give the path of a sentencepiece "
            ".model or a tokenizer.json, or data.tokenizer=train or bytes"
        ) from error
    return {"tokenizer.bytes" if path.suffix == ".bytes" else "tokenizer.model": content}


def tokenizer_files(folder: str | Path) -> list[Path]:
    """The files of the tokenizer in a prepared folder or a run's; none if it has no tokenizer.

    Raises UserError if there are files of two kinds.
    """
    folder = Path(folder).expanduser()
    found = [folder / kind for kind in _KINDS if (folder / kind).exists()]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise UserError(f"{folder} holds {names}; keep the one that belongs to it")
    config = folder / _CONFIG
    return [*found, config] if found and found[0].suffix == ".json" and config.exists() else found


def find_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer in a prepared folder or a run's, None if it has none. Raises UserError if it is damaged."""
    files = tokenizer_files(folder)
    return load_tokenizer(files[0]) if files else None


# ---------------------------------------------------------------- training


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """The bytes of a sentencepiece BPE model of exactly `vocab_size` pieces, trained on `texts`.

    Text round-trips exactly (no normalisation, byte fallback), and the same texts give the same bytes. Raises UserError
    if the texts have too many characters or too few pairs for `vocab_size`, and says which size works.
    """
    import sentencepiece

    model = io.BytesIO()
    met: list[BaseException] = []  # in `texts`; sentencepiece would make a RuntimeError of it

    def lines() -> Iterator[str]:
        try:
            yield from _lines(texts)
        except BaseException as error:
            met.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
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
        if met:
            raise met[0] from None
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
