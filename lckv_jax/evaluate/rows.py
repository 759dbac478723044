"""Text and token lists -> batches to score: right-padded rows of few shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lckv_jax.config import RunConfig, SourceConfig
from lckv_jax.errors import UserError
from lckv_jax.model.loss import IGNORED

if TYPE_CHECKING:
    from lckv_jax.data.batches import Packing
    from lckv_jax.data.tokenizer import Tokenizer

_READ_TOKENS = 4096  # of a prepared split at once
_BATCH_TOKENS = 8192  # of a group of lists
_LEAST_LENGTH = 16  # shorter rows are filled up to it

Batch = dict[str, np.ndarray]


class Text(NamedTuple):
    """Documents as they are trained on: BOS, tokens, EOS (unless it is BOS), one after the other, int32 [tokens].

    bytes: of their text in UTF-8; None where that is not known. documents: name and bytes of each; None where they are
    only known as tokens.
    """

    what: str
    tokens: np.ndarray
    bytes: int | None
    bos_id: int
    eos_id: int
    documents: tuple[tuple[str, int], ...] | None = None


def read_text(
    run: RunConfig, files: Sequence[SourceConfig], max_tokens: int | None, tokenizer: Tokenizer | None
) -> Text:
    """The text of the files, where there are none the run's validation split; at most 1 + max_tokens tokens of it.

    Raises UserError if there is no text, or no tokenizer to read it with, or the split is not that of the run.
    """
    limit = None if max_tokens is None else max_tokens + 1
    text = _read_files(files, limit, tokenizer) if files else _read_split(run, limit, tokenizer)
    if limit is None or len(text.tokens) <= limit:
        return text
    tokens = text.tokens[:limit]
    what, size = f"the beginning of {text.what}", None if tokenizer is None else sum(_sizes(tokens, text, tokenizer))
    return text._replace(what=what, tokens=tokens, bytes=size, documents=None)


def _read_split(run: RunConfig, limit: int | None, tokenizer: Tokenizer | None) -> Text:
    """The run's validation split, whole; where there is a limit, at least so much of it."""
    from lckv_jax.data.batches import Windows
    from lckv_jax.data.prepare import MANIFEST, prepare

    folder = Path(run.data.folder).expanduser()
    if not (folder / MANIFEST).exists() and run.init_from == run.out:  # as `import` writes it
        raise UserError(f"{run.out} is an imported model, which has no text of its own; give some as files=texts/*.txt")
    if not (folder / MANIFEST).exists():
        raise UserError(
            f"the run's text was prepared in data.folder={run.data.folder}, which is not there now; run this where it "
            "is, or give text as files=texts/*.txt"
        )
    manifest = prepare(run.data, run.model.vocab_size)  # only checks that it was made by the settings of this run
    if tokenizer is not None and tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise UserError(
            f"{folder} was prepared with another tokenizer than the run's; put the run's data back, or give text as "
            "files=texts/*.txt"
        )
    total = manifest.valid.tokens if limit is None else min(manifest.valid.tokens, limit + 1)
    pairs = Windows(folder, manifest, "valid", 1)  # neighbouring tokens
    whole = (total - 1) // _READ_TOKENS
    windows = Windows(folder, manifest, "valid", _READ_TOKENS) if whole else []
    parts = [windows[i][:-1] for i in range(whole)] + [pairs[i][:1] for i in range(whole * _READ_TOKENS, total - 1)]
    tokens = np.concatenate([*parts, pairs[total - 2][1:]])
    return Text(
        f"validation split of {run.data.folder}", tokens, manifest.valid.bytes, manifest.bos_id, manifest.eos_id
    )


def _read_files(files: Sequence[SourceConfig], limit: int | None, tokenizer: Tokenizer | None) -> Text:
    """The documents of the files; where there is a limit, at least so many tokens of them."""
    from lckv_jax.data.corpora import documents

    if tokenizer is None:
        raise UserError("the run has no tokenizer to read files with; put its tokenizer back beside checkpoints/")
    end = [tokenizer.eos_id] * (tokenizer.eos_id != tokenizer.bos_id)
    parts: list[np.ndarray] = []
    read: list[tuple[str, int]] = []
    tokens = 0
    for document in documents(files):
        ids = tokenizer.encode_batch([document.text])[0]
        parts.append(np.concatenate(([tokenizer.bos_id], ids, end)).astype(np.int32))
        read.append((document.name, len(document.text.encode())))
        tokens += len(parts[-1])
        if limit is not None and tokens > limit:
            break
    names = ", ".join(source.path for source in files)
    if not parts:
        raise UserError(f"files: no text but white space in {names}; name files with UTF-8 text")
    size = sum(size for _, size in read)
    what = f"{len(parts)} documents of {names}"
    return Text(what, np.concatenate(parts), size, tokenizer.bos_id, tokenizer.eos_id, tuple(read))


def document_sizes(text: Text, tokenizer: Tokenizer | None) -> list[int] | None:
    """UTF-8 bytes of each document; where it is only known as tokens, of what they decode to."""
    if text.documents is not None:
        return [size for _, size in text.documents]
    return None if tokenizer is None else _sizes(text.tokens, text, tokenizer)


def _sizes(tokens: np.ndarray, text: Text, tokenizer: Tokenizer) -> list[int]:
    starts = np.flatnonzero(tokens[1:] == text.bos_id) + 1
    return [len(tokenizer.decode(part.tolist()).encode()) for part in np.split(tokens, starts)]


def text_batches(text: Text, seq_len: int, batch_size: int, packing: Packing) -> Iterator[Batch]:
    """The text in rows of seq_len + 1 that share their first or last token with a neighbour, laid out as in training.

    Every batch has one shape; what fills up the last row and the last batch has no label, and position -1.
    """
    from lckv_jax.data.batches import label_rows

    starts = range(0, len(text.tokens) - 1, seq_len)
    batch_size = min(batch_size, len(starts))
    for first in range(0, len(starts), batch_size):
        tokens_BT = np.full((batch_size, seq_len + 1), text.bos_id, np.int32)
        lengths_B = np.zeros(batch_size, np.int64)
        for row, start in enumerate(starts[first : first + batch_size]):
            part = text.tokens[start : start + seq_len + 1]
            tokens_BT[row, : len(part)], lengths_B[row] = part, len(part)
        yield _without_padding(label_rows(tokens_BT, text.bos_id, text.eos_id, packing), lengths_B)


def text_pieces(text: Text, seq_len: int, packing: Packing) -> list[np.ndarray]:
    """What each row of `text_batches` shows as one text: its documents (masked), or all of it (joined).

    Every token of a piece after its first one is predicted from those before it, as in `text_batches`.
    """
    pieces = []
    for start in range(0, len(text.tokens) - 1, seq_len):
        row = text.tokens[start : start + seq_len + 1]
        firsts = [0, *(np.flatnonzero(row[1:] == text.bos_id) + 1)] if packing == "masked" else [0]
        shared = int(text.bos_id == text.eos_id)  # the next document's BOS is the end of this one
        pieces += [row[a : b + shared] for a, b in zip(firsts, [*firsts[1:], len(row)])]
    return [piece for piece in pieces if len(piece) > 1]


def groups(lengths: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Batches of lists with something to score, longest first: the length to pad them to, and which they are."""
    order = sorted((n for n, length in enumerate(lengths) if length > 1), key=lambda n: -lengths[n])
    while order:
        length = padded_length(lengths[order[0]] - 1)
        rows = 1 << max(0, (_BATCH_TOKENS // length).bit_length() - 1)
        numbers = [n for n in order[:rows] if padded_length(lengths[n] - 1) == length]
        yield length, numbers
        order = order[len(numbers) :]


def padded_length(tokens: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: few shapes to compile for, and at most a third of a row is padding."""
    power = max(_LEAST_LENGTH, 1 << (tokens - 1).bit_length())
    return power * 3 // 4 if power > _LEAST_LENGTH and tokens <= power * 3 // 4 else power


def list_batch(lists: Sequence[np.ndarray], length: int) -> Batch:
    """A batch of [rows, length + 1] with one list a row; rows are filled up to a power of two."""
    rows = 1 << (len(lists) - 1).bit_length()
    tokens_BT = np.zeros((rows, length + 1), np.int32)
    lengths_B = np.zeros(rows, np.int64)
    for row, tokens in enumerate(lists):
        tokens_BT[row, : len(tokens)], lengths_B[row] = tokens, len(tokens)
    positions_BT = np.broadcast_to(np.arange(length + 1, dtype=np.int32), tokens_BT.shape)
    return _without_padding({"tokens": tokens_BT, "labels": tokens_BT, "positions": positions_BT}, lengths_B)


def _without_padding(batch: Batch, lengths_B: np.ndarray) -> Batch:
    """The batch without labels from each row's length on, and with position -1, which nobody reads and no pass waits
    for, from its last token on: nothing is predicted from that."""
    columns_T = np.arange(batch["tokens"].shape[1])
    labels_BT = np.where(columns_T < lengths_B[:, None], batch["labels"], np.int32(IGNORED))
    positions_BT = np.where(columns_T < lengths_B[:, None] - 1, batch["positions"], np.int32(-1))
    return {**batch, "labels": labels_BT, "positions": positions_BT}
