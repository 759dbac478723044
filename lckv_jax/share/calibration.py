"""The text of a search: sentences to calibrate on, and other text to measure on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lckv_jax.config import RunConfig, SourceConfig
from lckv_jax.errors import UserError
from lckv_jax.evaluate.rows import Text, read_text

if TYPE_CHECKING:
    from lckv_jax.data.tokenizer import Tokenizer

_SPREAD = 16  # how much more text is read than the calibration takes, so that it comes from many documents
_LEAST = 8  # tokens of a sentence, BOS among them


class Texts(NamedTuple):
    """Sentences [sentences, tokens] with BOS, which of their tokens are not padding, where they are from, and the text
    to measure on, which has none of them."""

    tokens_BT: np.ndarray
    valid_BT: np.ndarray
    what: str
    held_out: Text


def read_texts(
    run: RunConfig,
    tokenizer: Tokenizer | None,
    data: Sequence[SourceConfig],
    files: Sequence[SourceConfig],
    *,
    sentences: int,
    tokens: int,
    max_tokens: int,
) -> Texts:
    """The beginnings of documents of `data` as sentences, and at most 1 + max_tokens tokens of `files` beside them.

    data: where empty, the run's validation split. files: where empty, what follows the sentences in the same text.
    Raises UserError if there is too little text, or as `evaluate.rows.read_text`.
    """
    if tokenizer is not None and tokenizer.vocab_size > run.model.vocab_size:
        raise UserError(
            f"share: the tokenizer has {tokenizer.vocab_size} ids, but the model {run.model.vocab_size}, so it is "
            "not the one that the model was trained with; put that one beside checkpoints/"
        )
    limit = _SPREAD * sentences * tokens + (0 if files else max_tokens)
    try:
        source = read_text(run, data, limit, tokenizer)
    except UserError as error:
        raise UserError(str(error).replace("as files=texts/*.txt", "with --data 'texts/*.txt'")) from error
    rows, rest = cut_sentences(source, sentences, tokens)
    held_out = _beginning(rest, max_tokens)
    if files:
        held_out = without(read_text(run, files, max_tokens, tokenizer), rows)
    if len(held_out.tokens) < 2 * _LEAST:
        raise UserError(
            f"share: {held_out.what} has {len(held_out.tokens)} tokens to measure on beside the {len(rows)} sentences "
            "of the calibration; give more text with --data, or other text as files=texts/*.txt"
        )
    tokens_BT = np.zeros((len(rows), max(map(len, rows))), np.int32)
    valid_BT = np.zeros(tokens_BT.shape, bool)
    for number, row in enumerate(rows):
        tokens_BT[number, : len(row)], valid_BT[number, : len(row)] = row, True
    return Texts(tokens_BT, valid_BT, source.what, held_out)


def cut_sentences(text: Text, sentences: int, tokens: int) -> tuple[list[np.ndarray], Text]:
    """So many sentences of at most `tokens` tokens, and the text without them: whole documents before what is left of
    others.

    A sentence is BOS and the first tokens of a document; where there are too few documents, also what follows in them.
    Raises UserError if the text does not have so many.
    """
    documents = _documents(text)
    taken = [0] * len(documents)
    rows: list[np.ndarray] = []
    before = -1
    while len(rows) < sentences and len(rows) > before:
        before = len(rows)
        for number, document in enumerate(documents):
            piece = document[taken[number] : taken[number] + tokens - 1]
            if len(piece) >= _LEAST - 1 and len(rows) < sentences:
                rows.append(np.concatenate(([text.bos_id], piece)).astype(np.int32))
                taken[number] += len(piece)
    if len(rows) < sentences:
        needed = sentences * (tokens - 1)
        raise UserError(
            f"share: the calibration text is too short: {text.what} has {len(text.tokens):,} tokens in "
            f"{len(documents)} documents, which make {len(rows)} sentences, but {sentences} of {tokens} tokens "
            f"({needed:,} in all) are needed; give more with --data"
            + (f", or take fewer: sentences={len(rows)}" if rows else "")
        )
    whole_first = sorted(zip(documents, taken), key=lambda entry: entry[1] > 0)
    rest = [document[start:] for document, start in whole_first]
    what = f"{text.what} after the calibration"
    left = _joined(text._replace(what=what), [body for body in rest if len(body)])
    return rows, without(left, rows)  # the text may hold a document more than once


def without(text: Text, rows: Sequence[np.ndarray]) -> Text:
    """The text without the documents that begin with one of the sentences."""
    starts = {row[1:].tobytes() for row in rows}
    sizes = {len(row) - 1 for row in rows}
    kept = [body for body in _documents(text) if not any(body[:size].tobytes() in starts for size in sizes)]
    return _joined(text, kept) if len(kept) < len(_documents(text)) else text


def _documents(text: Text) -> list[np.ndarray]:
    """The documents without their BOS."""
    parts = np.split(text.tokens, np.flatnonzero(text.tokens == text.bos_id))
    return [part[1:] for part in parts[1:] if len(part) > 1]


def _joined(text: Text, bodies: Sequence[np.ndarray]) -> Text:
    parts = [np.concatenate(([text.bos_id], body)).astype(np.int32) for body in bodies]
    return text._replace(tokens=np.concatenate(parts) if parts else np.zeros(0, np.int32), bytes=None)


def _beginning(text: Text, max_tokens: int) -> Text:
    return text._replace(tokens=text.tokens[: max_tokens + 1])
