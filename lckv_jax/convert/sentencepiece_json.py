"""A sentencepiece model said as a tokenizer.json: the same ids, in the terms of the `tokenizers` library.

Two differences are left, of which `Model.notes` tells. The scores of a unigram path add up in float32 there and in
float64 here: where two cuts are all but equal, one word in some 10,000 may be cut otherwise in a text of 40 kB or more.
And under nfkc normalisation combining marks that are not in canonical order are sorted here and left as they are there.
"""

from __future__ import annotations

import base64
import re
import struct
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from lckv_jax.errors import UserError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece.Type
_UNIGRAM, _BPE, _WORD, _CHAR = 1, 2, 3, 4  # TrainerSpec.ModelType
_COMPOSING = ("nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf")  # what single characters become, then NFC
ALONE = "to export the model alone, move the tokenizer out of the folder"  # what a user can always do
_SPACE = "▁"  # how sentencepiece writes a space


class Piece(NamedTuple):
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float
    type: int


class Model(NamedTuple):
    """What a sentencepiece model file says, as far as it decides ids."""

    pieces: list[Piece]
    algorithm: int
    byte_fallback: bool
    space_is_suffix: bool
    normalization: str
    charsmap: bytes
    denormalizes: bool
    dummy_prefix: bool
    trims_spaces: bool
    escapes_spaces: bool

    def texts(self, *types: int) -> list[str]:
        """The pieces of some types."""
        return [piece.text for piece in self.pieces if piece.type in types]

    @property
    def written(self) -> list[str]:
        """The pieces that text can become by being written so."""
        return self.texts(_NORMAL, _USER_DEFINED)

    def notes(self) -> list[str]:
        """What no tokenizer.json can say of this model, and rare texts show."""
        notes = {
            "its tokenizer.json may cut a long text otherwise where scores are equal but for rounding": (
                self.algorithm == _UNIGRAM
            ),
            "its tokenizer.json sorts combining marks that are not in canonical order": bool(self.charsmap),
        }
        return [f"tokenizer.model: {note}" for note, holds in notes.items() if holds]

    def groups(self) -> list[list[str]]:
        """Pieces whose mixtures are telling texts: all, those that share a score with another, and the special ones."""
        scores = Counter(piece.score for piece in self.pieces if piece.type == _NORMAL)
        tied = [piece.text for piece in self.pieces if piece.type == _NORMAL and scores[piece.score] > 1]
        special = [*self.texts(_USER_DEFINED, _CONTROL, _UNKNOWN), *self.written[:10], " "]
        return [self.written, tied, special]


# ---------------------------------------------------------------- reading the file


def read_model(content: bytes) -> Model:
    """Parses a .model file, a ModelProto; protobuf's own reader is a dependency that only this would need.

    content: of a file that sentencepiece has read.
    """
    pieces, spec = [], {2: {}, 3: {}, 5: {}}
    for number, value in _fields(content):
        if number == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
            pieces.append(Piece(piece[1].decode(), score, piece.get(3, _NORMAL)))
        elif number in spec:
            spec[number] = dict(_fields(value))
    trainer, normalizer, denormalizer = spec.values()
    return Model(
        pieces=pieces,
        algorithm=trainer.get(3, _UNIGRAM),
        byte_fallback=bool(trainer.get(35, 0)),
        space_is_suffix=bool(trainer.get(24, 0)),
        normalization=normalizer.get(1, b"").decode(),
        charsmap=normalizer.get(2, b""),
        denormalizes=bool(denormalizer.get(2, b"")),
        dummy_prefix=bool(normalizer.get(3, 1)),
        trims_spaces=bool(normalizer.get(4, 1)),
        escapes_spaces=bool(normalizer.get(5, 1)),
    )


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protobuf message: int, or the bytes of anything longer."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while at < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            size = {1: 8, 5: 4}.get(key & 7) or varint()
            yield key >> 3, message[at : at + size]
            at += size


# ---------------------------------------------------------------- the parts of a tokenizer.json


def convert(model: Model) -> dict[str, Any]:
    """The tree of a tokenizer.json with the same ids; without a post-processor.

    Raises UserError naming the option of sentencepiece that has no counterpart.
    """
    _refuse_foreign(model)
    bpe = model.algorithm != _UNIGRAM
    symbols = model.texts(_USER_DEFINED)
    splits = []
    if bpe and symbols:  # each stands alone, and is taken whole
        alternatives = "|".join(map(_escape, sorted(symbols, key=len, reverse=True)))
        splits.append(_split(alternatives, "Isolated"))
    splits += _hiding(model)
    special = {id: piece.text for id, piece in enumerate(model.pieces) if piece.type in (_CONTROL, _UNKNOWN)}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": text, **plain} for id, text in special.items()],
        "normalizer": {"type": "Sequence", "normalizers": [*_normalizers(model)]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits} if splits else None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": _decoders(model)},
        "model": _bpe(model, ignore_merges=bool(symbols)) if bpe else _unigram(model),
    }


def _refuse_foreign(model: Model) -> None:
    options = {
        "model_type=word": model.algorithm == _WORD,
        "treat_whitespace_as_suffix": model.space_is_suffix,
        "escape_whitespaces=false": not model.escapes_spaces,
        "a denormalization rule": model.denormalizes,
        f"normalization_rule_name={model.normalization}": model.charsmap and model.normalization not in _COMPOSING,
        "unused pieces": any(piece.type == _UNUSED for piece in model.pieces),
        "an empty piece": any(not piece.text for piece in model.pieces),
    }
    if used := [name for name, is_used in options.items() if is_used]:
        raise UserError(f"a tokenizer.json cannot say what the tokenizer.model does with {used[0]}; {ALONE}")


def _normalizers(model: Model) -> Iterator[dict[str, Any]]:
    prefix = [{"type": "Prepend", "prepend": _SPACE}] if model.dummy_prefix else []
    if not model.trims_spaces:  # the prefix is there also before a text of which the map leaves nothing
        yield from prefix
    if model.charsmap:
        yield from _composing(model.charsmap)
    if model.trims_spaces:
        yield _replace(r"\A +", "")
        yield _replace(" {2,}", " ")
        yield _replace(rf"[ {_SPACE}]+\z", "")
        yield from prefix
    yield {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if strange := [name for name in _names(model) if _is_unknown(name, model)]:  # unknown characters are one token
        yield _replace("|".join(map(_escape, strange)), "\ufdd0")  # which is no character, and no piece


def _composing(charsmap: bytes) -> Iterator[dict[str, Any]]:
    """Each character by the map, then NFC.

    The library looks up grapheme clusters and drops what the map does not know of them, so something is put between
    behind each character first that stands alone and that the map removes: U+0001. A map that keeps U+0001 removes
    nothing else either; then it is U+FFF0, and every other one of a row goes, so that those of the text stay.
    """
    precompiled = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}
    removes = not _normalized(precompiled, "\x01")
    mark = "\x01" if removes else "\ufff0"
    yield _replace(r"(?<=[\s\S])", mark)
    yield precompiled
    if not removes:
        yield _replace(rf"{mark}(?=(?:{mark}{mark})*(?!{mark}))", "")
    yield {"type": "NFC"}


def _normalized(normalizer: Mapping[str, Any], text: str) -> str:
    from tokenizers import normalizers

    return normalizers.Precompiled(base64.b64decode(normalizer["precompiled_charsmap"])).normalize_str(text)


def _decoders(model: Model) -> list[dict[str, Any]]:
    decoders = [{"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}]
    if model.byte_fallback:
        decoders.append({"type": "ByteFallback"})
    decoders.append({"type": "Fuse"})
    if model.dummy_prefix or model.trims_spaces:
        count = 2**31 if model.trims_spaces else 1
        decoders.append({"type": "Strip", "content": " ", "start": count, "stop": 0})
    return decoders


def _unigram(model: Model) -> dict[str, Any]:
    best = max(piece.score for piece in model.pieces if piece.type in (_NORMAL, _USER_DEFINED))
    vocab = []
    for text, score, type in model.pieces:  # a user-defined symbol is preferred to what it is made of
        vocab.append([text, len(text.encode()) * best - 0.1 if type == _USER_DEFINED else score])
    return {
        "type": "Unigram",
        "unk_id": next(id for id, piece in enumerate(model.pieces) if piece.type == _UNKNOWN),
        "vocab": vocab,
        "byte_fallback": model.byte_fallback,
    }


def _bpe(model: Model, *, ignore_merges: bool) -> dict[str, Any]:
    merges = []
    if model.algorithm == _BPE:
        _refuse_unknown_parts(model)
        normal = {piece.text: piece.score for piece in model.pieces if piece.type == _NORMAL}
        for text in sorted(normal, key=lambda text: -normal[text]):  # of equal score, the earlier first
            cuts = ((text[:at], text[at:]) for at in range(1, len(text)))
            merges += [cut for cut in cuts if normal.keys() >= {*cut}]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.texts(_UNKNOWN)[0],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": {piece.text: id for id, piece in enumerate(model.pieces)},
        "merges": merges,
    }


def _refuse_unknown_parts(model: Model) -> None:
    """sentencepiece makes pieces also of characters that are no pieces; the library does not."""
    normal = set(model.texts(_NORMAL))
    characters = {text for text in normal if len(text) == 1}
    if odd := [text for text in model.texts(_NORMAL) if not characters.issuperset(text)]:
        raise UserError(
            f"a tokenizer.json cannot hold the piece {odd[0]!r} of the tokenizer.model, of which a character is no "
            f"piece; {ALONE}"
        )


# ---------------------------------------------------------------- names that text must not become


def _hiding(model: Model) -> list[dict[str, Any]]:
    """Pre-tokenizers that cut text which reads like a control, unknown or byte token, where no piece spans the cut."""
    written = set(model.written)
    after: dict[str, list[str]] = {}
    for name in _names(model):
        if _is_unknown(name, model):
            continue
        at = _cut(name, written, fuses=not model.byte_fallback)
        if at is None:
            raise UserError(
                f"a tokenizer.json cannot keep text that reads {name!r} from becoming the token of that name of the "
                f"tokenizer.model; {ALONE}"
            )
        after.setdefault(name[:at], []).append(name[at:])
    patterns = [f"{_escape(begin)}(?={'|'.join(map(_escape, ends))})" for begin, ends in after.items()]
    return [_split("|".join(patterns), "MergedWithPrevious")] if patterns else []


def _names(model: Model) -> list[str]:
    """Pieces of a vocabulary that takes what it knows whole, which text must not become; none for other models."""
    if model.algorithm != _UNIGRAM and not model.texts(_USER_DEFINED):
        return []
    return model.texts(_CONTROL, _UNKNOWN, *([_BYTE] if model.byte_fallback else []))


def _is_unknown(name: str, model: Model) -> bool:
    """Whether text that reads `name` is one unknown token."""
    return not model.byte_fallback and set(model.written).isdisjoint(name)


def _cut(name: str, written: Collection[str], *, fuses: bool) -> int | None:
    """A place in `name` that no piece spans in a text where `name` stands; None if there is none.

    fuses: unknown characters side by side are one token, so that a place between two of them is none.
    """
    for at in range(1, len(name)):
        pair = name[at - 1 : at + 1]
        if fuses and not any(character in written for character in pair):
            continue
        if not any(pair in piece and _spans(piece, name, at) for piece in written):
            return at
    return None


def _spans(piece: str, name: str, at: int) -> bool:
    """Whether `piece` can lie over the place `at` of a `name` in a text."""
    for start in range(at - len(piece) + 1, at):  # of the piece, seen from the name
        begin, end = max(start, 0), min(start + len(piece), len(name))
        if piece[begin - start : end - start] == name[begin:end]:
            return True
    return False


def _split(pattern: str, behavior: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _escape(text: str) -> str:
    """`text` as a regular expression of Oniguruma, which the library uses."""
    return re.sub(r"([\\^$.|?*+()\[\]{}])", r"\\\1", text)
