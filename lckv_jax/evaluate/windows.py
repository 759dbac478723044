"""Sliding windows: -log p of every token of a text, each predicted once, from at least a stated number of tokens."""

from __future__ import annotations

import bisect
import contextlib
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lckv_jax.config import ModelConfig
from lckv_jax.errors import UserError
from lckv_jax.evaluate.rows import Batch, Text, document_sizes, padded_length
from lckv_jax.evaluate.statistics import Estimate, perplexity, perplexity_of, ratio
from lckv_jax.model.layers import Params
from lckv_jax.model.loss import IGNORED, token_nll
from lckv_jax.model.refine import Passes
from lckv_jax.parallel.mesh import batch_sharding

if TYPE_CHECKING:
    from lckv_jax.data.batches import Packing
    from lckv_jax.data.tokenizer import Tokenizer

_FEW = 10  # documents, too few for a standard error over them

_token_nll = jax.jit(token_nll, static_argnames=("config", "passes", "chunk"))


# ---------------------------------------------------------------- windows


class Window(NamedTuple):
    """The tokens from `start` to before `stop` of a stream, of which those from `first` on predict the next one."""

    stream: int
    start: int
    first: int
    stop: int


class Scored(NamedTuple):
    """What windows gave. The first three have an array [length - 1] for each stream, with an entry for each prediction.

    nats: -log p, float64. reads: tokens that its window shows before it. window: its number. passes, residual: of the
    rows (see `hidden_states`).
    """

    nats: list[np.ndarray]
    reads: list[np.ndarray]
    window: list[np.ndarray]
    windows: int
    passes: np.ndarray
    residual: np.ndarray


def plan_windows(lengths: Sequence[int], seq_len: int, stride: int) -> list[Window]:
    """Windows over streams of these lengths: every token of a stream after its first is predicted in exactly one.

    A window reads at most seq_len tokens, and each begins stride tokens after the one before it. The first one of a
    stream predicts from all of its tokens, the others only what is new: the tokens that those before them did not
    predict, each from more than seq_len - stride tokens. Raises UserError if the stride is longer than a window.
    """
    check_stride(stride, seq_len)
    found = []
    for stream, length in enumerate(lengths):
        done = start = 0
        while done < length - 1:
            stop = min(start + seq_len, length - 1)
            found.append(Window(stream, start, done, stop))
            start, done = start + stride, stop
    return found


def check_stride(stride: int, seq_len: int) -> None:
    """Raises UserError for windows that would leave tokens out."""
    if stride > seq_len:
        raise UserError(
            f"stride={stride} is longer than seq_len={seq_len}, and the tokens between two windows were never "
            f"predicted; give a stride of at most {seq_len}"
        )


def pack_rows(windows: Sequence[Window], columns: int) -> list[list[int]]:
    """The numbers of windows that lie in one row of so many columns: the longest first, each in the fullest row that
    has room, so that short documents fill few rows."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # ascending: columns left, row
    order = sorted(range(len(windows)), key=lambda n: windows[n].start - windows[n].stop)
    for number in order:
        length = windows[number].stop - windows[number].start
        place = bisect.bisect_left(room, (length, -1))
        left, row = room.pop(place) if place < len(room) else (columns, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        if left > length:
            bisect.insort(room, (left - length, row))
    return rows


def score_windows(
    params: Params,
    config: ModelConfig,
    streams: Sequence[np.ndarray],
    seq_len: int,
    stride: int,
    *,
    passes: Passes,
    batch_size: int = 8,
    mesh: Mesh | None = None,
    tell: Callable[[int], None] = lambda done: None,
) -> Scored:
    """-log p of each token of the streams after its first, by windows (see `plan_windows`) that never see each other.

    streams: int32 tokens, each with its own first token. Positions count from 0 in each window. batch_size: rows of
    seq_len tokens at once; more where the mesh has more devices that split them. mesh: where params lie; None = one
    device. tell: told how many tokens are predicted.
    Raises UserError if a number is not finite.
    """
    windows = plan_windows([len(tokens) for tokens in streams], seq_len, stride)
    columns = min(seq_len, padded_length(sum(window.stop - window.start for window in windows)))
    rows = pack_rows(windows, columns)
    over = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = -(-min(batch_size, len(rows)) // over) * over
    nats = [np.full(len(tokens) - 1, np.nan) for tokens in streams]
    found, done = [], 0
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        for first in range(0, len(rows), batch_size):
            some = rows[first : first + batch_size]
            batch: Any = _batch(streams, windows, some, (batch_size, columns + 1))
            batch = batch if mesh is None else jax.device_put(batch, batch_sharding(mesh))
            nll_BT, made = jax.device_get(_token_nll(params, config, batch, passes=passes))
            for row, column, window in _places(windows, some):
                new = slice(column + window.first - window.start, column + window.stop - window.start)
                nats[window.stream][window.first : window.stop] = nll_BT[row, new]
                done += window.stop - window.first
            found.append({name: x[: len(some)] for name, x in made.items()})
            tell(done)
    if not all(np.isfinite(x).all() for x in nats):
        raise UserError("the loss is not finite; the parameters of this checkpoint are of no use, evaluate an earlier "
                        "one")  # fmt: skip
    reads, numbers = _numbered(windows, nats)
    made = {name: np.concatenate([part[name] for part in found]) for name in ("passes", "residual")}
    return Scored(nats, reads, numbers, len(windows), **made)


def _places(windows: Sequence[Window], rows: Sequence[Sequence[int]]) -> list[tuple[int, int, Window]]:
    """The row, the first column, and the window, of all windows in rows."""
    found = []
    for row, numbers in enumerate(rows):
        column = 0
        for number in numbers:
            found.append((row, column, windows[number]))
            column += windows[number].stop - windows[number].start
    return found


def _batch(
    streams: Sequence[np.ndarray], windows: Sequence[Window], rows: Sequence[Sequence[int]], shape: tuple[int, int]
) -> Batch:
    """The rows as a batch of this shape [B, T+1]; what fills it up has position -1, and no label."""
    batch = {
        "tokens": np.zeros(shape, np.int32),
        "labels": np.full(shape, IGNORED, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "positions": np.full(shape, -1, np.int32),
    }
    for row, column, (stream, start, first, stop) in _places(windows, rows):
        here = slice(column, column + stop - start)
        batch["tokens"][row, here] = streams[stream][start:stop]
        batch["segment_ids"][row, here] = batch["segment_ids"][row].max() + 1
        batch["positions"][row, here] = np.arange(stop - start)
        new = slice(column + first - start + 1, column + stop - start + 1)  # the loss shifts labels by one
        batch["labels"][row, new] = streams[stream][first + 1 : stop + 1]
    return batch


def _numbered(windows: Sequence[Window], nats: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each prediction of each stream the tokens that it is made from, and the number of its window."""
    reads, numbers = ([np.zeros(len(x), np.int64) for x in nats] for _ in range(2))
    for number, (stream, start, first, stop) in enumerate(windows):
        reads[stream][first:stop] = np.arange(first - start + 1, stop - start + 1)
        numbers[stream][first:stop] = number
    return reads, numbers


# ---------------------------------------------------------------- report


class PositionScore(NamedTuple):
    """Predictions made from more than `start` and at most `stop` tokens: the newest of these has a position in its
    window from `start` to before `stop`."""

    start: int
    stop: int
    tokens: int
    nats: Estimate
    perplexity: Estimate


class DocumentScore(NamedTuple):
    """name: None where only its number is known. bytes: of its text in UTF-8; None without a tokenizer."""

    document: int
    name: str | None
    tokens: int
    nats: float
    perplexity: float
    bytes: int | None
    bits_per_byte: float | None


class WindowReport(NamedTuple):
    """What the windows of a text gave.

    tokens: those predicted. nats: the mean of their -log p. bits_per_byte: its sum over ln 2 and the bytes of the text.
    clusters: how many documents or windows the standard errors are over: tokens of one of them are not taken to be
    independent of each other. Windows where there are fewer than ten documents; as neighbouring windows resemble each
    other, the true error is then larger. mean_passes, max_passes, residual: of the rows that windows are packed in.
    """

    tokens: int
    documents: int
    windows: int
    bytes: int | None
    nats: Estimate
    perplexity: Estimate
    bits_per_byte: Estimate | None
    clusters: int
    clustered_over: Literal["documents", "windows"]
    mean_passes: float
    max_passes: int
    residual: float
    by_position: tuple[PositionScore, ...]
    by_document: tuple[DocumentScore, ...]


def measure_windows(
    params: Params,
    config: ModelConfig,
    text: Text,
    seq_len: int,
    stride: int,
    *,
    passes: Passes,
    packing: Packing = "masked",
    batch_size: int = 8,
    by_position: int | None = None,
    by_document: bool = False,
    tokenizer: Tokenizer | None = None,
    mesh: Mesh | None = None,
    tell: Callable[[int], None] = lambda done: None,
) -> WindowReport:
    """The report on a text by sliding windows, those of a document where packing is `masked`, else those of all of it.

    by_position: tokens of a bucket. tokenizer: tells the bytes of documents that are only known as tokens.
    Raises UserError if there is nothing to predict, or a number is not finite.
    """
    starts = _stream_starts(text, packing)
    shared = int(text.bos_id == text.eos_id and packing == "masked")  # the next document's BOS ends this one
    streams = [text.tokens[a : b + shared] for a, b in zip(starts, [*starts[1:], len(text.tokens)])]
    if all(len(tokens) < 2 for tokens in streams):
        raise UserError(f"{text.what} has no token to predict; give more text, or a larger max_tokens")
    scored = score_windows(
        params, config, streams, seq_len, stride, passes=passes, batch_size=batch_size, mesh=mesh, tell=tell
    )
    document = np.concatenate([_documents(text)[a + 1 : a + len(tokens)] for a, tokens in zip(starts, streams)])
    nats, reads, window = (np.concatenate(x) for x in (scored.nats, scored.reads, scored.window))
    sizes = document_sizes(text, tokenizer)
    documents = len(np.unique(document))
    over = document if documents >= _FEW else window
    mean = _mean(nats, over)
    bits = None if not text.bytes else _bits_per_byte(nats, over, text.bytes, sizes if over is document else None)
    return WindowReport(
        tokens=len(nats),
        documents=documents,
        windows=scored.windows,
        bytes=text.bytes,
        nats=mean,
        perplexity=perplexity(mean),
        bits_per_byte=bits,
        clusters=len(np.unique(over)),
        clustered_over="documents" if over is document else "windows",
        mean_passes=float(scored.passes.mean()),
        max_passes=int(scored.passes.max()),
        residual=float(scored.residual.max()),
        by_position=_by_position(nats, over, reads - 1, by_position) if by_position else (),
        by_document=_by_document(nats, document, sizes, text) if by_document else (),
    )


def _stream_starts(text: Text, packing: Packing) -> list[int]:
    if packing == "joined":
        return [0]
    return [0, *(np.flatnonzero(text.tokens[1:] == text.bos_id) + 1).tolist()]


def _documents(text: Text) -> np.ndarray:
    """The number of the document that each token belongs to; a BOS that is also EOS to the one before it."""
    number = np.cumsum(text.tokens == text.bos_id) - 1
    if text.bos_id == text.eos_id:
        number = number - (text.tokens == text.bos_id)
    return np.maximum(number, 0)


# ---------------------------------------------------------------- statistics


def _mean(nats: np.ndarray, over: np.ndarray) -> Estimate:
    _, cluster = np.unique(over, return_inverse=True)
    return ratio(np.bincount(cluster, nats), np.bincount(cluster))


def _bits_per_byte(nats: np.ndarray, over: np.ndarray, size: int, sizes: Sequence[int] | None) -> Estimate:
    """sizes: bytes of each cluster that `over` names by its number; without them, bytes a token are taken as known."""
    value = math.fsum(nats) / math.log(2) / size
    if sizes is None:
        mean = _mean(nats, over)
        return Estimate(value, None if mean.stderr is None else value * mean.stderr / mean.value)
    numbers, cluster = np.unique(over, return_inverse=True)
    bits = np.bincount(cluster, nats) / math.log(2)
    return Estimate(value, ratio(bits, np.asarray(sizes, np.float64)[numbers]).stderr)


def _by_position(nats: np.ndarray, over: np.ndarray, position: np.ndarray, size: int) -> tuple[PositionScore, ...]:
    found = []
    for bucket in np.unique(position // size).tolist():
        here = position // size == bucket
        mean = _mean(nats[here], over[here])
        found.append(PositionScore(bucket * size, (bucket + 1) * size, int(here.sum()), mean, perplexity(mean)))
    return tuple(found)


def _by_document(
    nats: np.ndarray, document: np.ndarray, sizes: Sequence[int] | None, text: Text
) -> tuple[DocumentScore, ...]:
    found = []
    for number in np.unique(document).tolist():
        here = nats[document == number]
        total, mean = math.fsum(here), math.fsum(here) / len(here)
        name = text.documents[number][0] if text.documents else None
        size = sizes[number] if sizes else None
        bits = total / math.log(2) / size if size else None
        found.append(DocumentScore(number, name, len(here), mean, perplexity_of(mean), size, bits))
    return tuple(found)
