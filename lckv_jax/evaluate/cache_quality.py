"""What a cache costs in quality: perplexity by the decode path under each of several caches, also by position."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console

from lckv_jax.config import ModelConfig
from lckv_jax.decode.loop import unstack
from lckv_jax.decode.spec import CacheSpec
from lckv_jax.errors import UserError
from lckv_jax.evaluate.decode_path import Prompt, Timed, decode_batch
from lckv_jax.evaluate.progress import telling
from lckv_jax.evaluate.statistics import perplexity_of, ratio
from lckv_jax.model.layers import Params
from lckv_jax.model.transformer import check_dtype


class Bucket(NamedTuple):
    """What the tokens of some positions gave: those from `start` to before `stop` of their row. nats: the mean of their
    -log p. A prediction has the position of the newest token that it is made from."""

    start: int
    stop: int
    tokens: int
    nats: float
    perplexity: float


class CacheReport(NamedTuple):
    """What one cache gave.

    tokens: those predicted. nats: the mean of their -log p; stderr: its standard error over the texts of rows, None
    where there is one. bits_per_byte: its sum over ln 2 and the bytes of the text;
    None where these are not known or not all of it is predicted. row_bytes: of the cache of one row after the longest,
    as it lies in memory. tokens_per_second: of decoding, without prefill and what ran while compiling; None where that
    is all. positions: empty where not wanted.
    """

    cache: str
    tokens: int
    nats: float
    stderr: float | None
    perplexity: float
    bits_per_byte: float | None
    row_bytes: int
    tokens_per_second: float | None
    positions: tuple[Bucket, ...]


def measure_caches(
    params: Params,
    config: ModelConfig,
    pieces: Sequence[np.ndarray],
    caches: Sequence[str],
    batch_size: int,
    *,
    prompt: Prompt | None = None,
    by_position: int | None = None,
    text_bytes: int | None = None,
    console: Console | None = None,
) -> list[CacheReport]:
    """One report for each of the caches, all of them on the same pieces of text, each with its first token.

    prompt: the first tokens of every piece go through a prefill. They are not scored, nor is the next one, which the
    prefill predicts whatever the cache keeps. Pieces that end before the others are left out.
    by_position: positions of a bucket. console: shown how far it is.
    Raises UserError if nothing is left to score, or if a number is not finite.
    """
    check_dtype(config)
    skipped = prompt.tokens if prompt else 0
    longer = longer_than_prompts(pieces, skipped)
    params, ordered = jax.tree.map(jax.numpy.asarray, params), sorted(longer, key=len, reverse=True)
    weights = unstack(params, config)
    batches = [ordered[first : first + batch_size] for first in range(0, len(ordered), batch_size)]
    reports, done = [], 0
    with telling(console, len(caches) * sum(len(piece) - 1 - skipped for piece in ordered)) as tell:

        def count(tokens: int) -> None:
            nonlocal done
            tell(done := done + tokens)

        for cache in caches:
            timed, spec, found = Timed(count), CacheSpec.parse(cache), []
            for batch in batches:
                rows = min(batch_size, len(ordered))
                found.append(decode_batch(weights, config, spec, batch, rows, prompt=prompt, run=timed))
            nats = [-row.astype(np.float64) for decoded in found for row in decoded.logprobs]
            if not all(np.isfinite(row).all() for row in nats):
                raise UserError(f"cache={cache}: the loss is not finite; evaluate an earlier checkpoint, or without it")
            row_bytes = max(decoded.row_bytes for decoded in found)
            buckets = _buckets(nats, skipped, by_position) if by_position else ()
            reports.append(_report(cache, nats, text_bytes, row_bytes, timed, buckets))
    return reports


def longer_than_prompts(pieces: Sequence[np.ndarray], prompt_tokens: int) -> list[np.ndarray]:
    """The pieces that leave something to score after a prompt of so many tokens. Raises UserError if there is none."""
    longer = [piece for piece in pieces if len(piece) > prompt_tokens + 1]
    if not longer:
        raise UserError(
            f"prompt_tokens={prompt_tokens} leaves nothing to decode: no text of a row has two tokens more; give "
            "fewer, a larger seq_len, or packing=joined"
        )
    return longer


def _report(
    cache: str,
    nats: Sequence[np.ndarray],
    text_bytes: int | None,
    row_bytes: int,
    timed: Timed,
    buckets: tuple[Bucket, ...],
) -> CacheReport:
    total, tokens = math.fsum(row.sum() for row in nats), sum(map(len, nats))
    return CacheReport(
        cache=cache,
        tokens=tokens,
        nats=total / tokens,
        stderr=ratio(np.array([row.sum() for row in nats]), np.array([len(row) for row in nats])).stderr,
        perplexity=perplexity_of(total / tokens),
        bits_per_byte=total / math.log(2) / text_bytes if text_bytes else None,
        row_bytes=row_bytes,
        tokens_per_second=round(timed.tokens / timed.seconds, 1) if timed.tokens else None,
        positions=buckets,
    )


def _buckets(nats: Sequence[np.ndarray], first: int, size: int) -> tuple[Bucket, ...]:
    """Sums of rows whose predictions have the positions `first`, `first` + 1, ...; buckets without any are left out."""
    longest = first + max(map(len, nats))
    sums, counts = np.zeros(longest), np.zeros(longest, np.int64)
    for row in nats:
        sums[first : first + len(row)] += row
        counts[first : first + len(row)] += 1
    found = []
    for start in range(first // size * size, longest, size):
        tokens = int(counts[start : start + size].sum())
        mean = float(sums[start : start + size].sum()) / tokens
        found.append(Bucket(start, start + size, tokens, mean, perplexity_of(mean)))
    return tuple(found)


# ---------------------------------------------------------------- tables


def cache_table(reports: Sequence[CacheReport]) -> Iterator[str]:
    """The reports in lines, and the perplexity of each by position where that is wanted."""
    columns = {"perplexity": 12, "nats/token": 11, "bits/byte": 10, "bytes/row": 12, "tok/s": 9}
    wide = max(16, *(len(report.cache) + 1 for report in reports))
    yield f"{'cache':<{wide}}" + "".join(f"{name:>{width}}" for name, width in columns.items())
    for report in reports:
        bits = "unknown" if report.bits_per_byte is None else f"{report.bits_per_byte:.4f}"
        speed = "unknown" if report.tokens_per_second is None else f"{report.tokens_per_second:,.0f}"
        yield (
            f"{report.cache:<{wide}}{report.perplexity:>12,.3f}{report.nats:>11.5f}{bits:>10}{report.row_bytes:>12,}"
            f"{speed:>9}"
        )
    if reports[0].positions:
        widths = [max(11, len(report.cache) + 2) for report in reports]
        yield f"{'perplexity at':<16}" + "".join(f"{r.cache:>{width}}" for r, width in zip(reports, widths))
        for buckets in zip(*(report.positions for report in reports)):
            values = "".join(f"{bucket.perplexity:>{width},.3f}" for bucket, width in zip(buckets, widths))
            yield f"{f'{buckets[0].start:,}-{buckets[0].stop - 1:,}':<16}{values}"
    yield f"{reports[0].tokens:,} tokens predicted one by one"
