"""Log-probabilities by the decode path: token after token through `decode_step`, on a cache of any kind."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lckv_jax.config import ModelConfig
from lckv_jax.decode.cache import Cache, bytes_held, empty
from lckv_jax.decode.loop import by_groups, fill_cache, tiles, unstack, with_room
from lckv_jax.decode.spec import CacheSpec, SlotSpec, slot_specs
from lckv_jax.decode.step import Weights, decode_step
from lckv_jax.errors import UserError
from lckv_jax.evaluate.rows import groups, padded_length
from lckv_jax.model.layers import Params
from lckv_jax.model.refine import Passes
from lckv_jax.model.transformer import check_dtype

_STEPS = 64  # tokens of each row that one compiled program takes
_LEAST_CELLS = 256  # of a cache that will grow; early steps do not read what late ones need


@partial(jax.jit, static_argnames=("config", "specs"), donate_argnames="cache")
def segment(
    weights: Weights,
    config: ModelConfig,
    specs: tuple[SlotSpec, ...],
    cache: Cache,
    tokens_TB: jax.Array,
    labels_TB: jax.Array,
    live_TB: jax.Array,
) -> tuple[Cache, jax.Array]:
    """The cache with T more tokens of each row, and the log-probability [T, B] of the label of each, float32 or wider.

    Where a row is not live its token is not appended, and its number means nothing.
    """

    def one(cache: Cache, xs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Cache, jax.Array]:
        token_B, label_B, live_B = xs
        logits_BV, cache = decode_step(weights, config, specs, cache, token_B, live_B)
        return cache, _logprob(logits_BV, label_B)

    return jax.lax.scan(one, cache, (tokens_TB, labels_TB, live_TB))


Segment = Callable[..., tuple[Cache, jax.Array]]  # `segment`, or something that runs it


class Prompt(NamedTuple):
    """The first tokens of every row, which no step takes but a prefill. passes: see `refine.stop_rule`."""

    tokens: int
    passes: Passes


class Decoded(NamedTuple):
    """logprobs: of the tokens of each list after its first; after a prompt, of those after the next one, which no step
    predicts. row_bytes: of the cache of one row, as it lies in memory after the longest."""

    logprobs: list[np.ndarray]
    row_bytes: int


def decode_lists(
    params: Params, config: ModelConfig, lists: Sequence[np.ndarray], spec: CacheSpec
) -> dict[int, np.ndarray]:
    """Log-probabilities of the tokens after the first, for each list by its number that has some, from an empty cache.

    The numbers of a list are its own, whatever the others, but for rounding.
    """
    check_spec(spec, None)
    check_dtype(config)
    weights, found = unstack(params, config), {}
    for _, numbers in groups([len(tokens) for tokens in lists]):
        rows = 1 << (len(numbers) - 1).bit_length()
        decoded = decode_batch(weights, config, spec, [lists[number] for number in numbers], rows)
        found |= dict(zip(numbers, decoded.logprobs))
    return found


def check_spec(spec: CacheSpec, prompt_tokens: int | None) -> None:
    """Raises UserError for a cache that cannot be without a prompt, where there is none."""
    if spec.policy == "budget" and spec.select != "h2o" and prompt_tokens is None:
        raise UserError(
            f"cache: {spec} chooses its tokens when a prompt ends, and here there is no prompt; measure it by "
            "`evaluate` with prompt_tokens, such as prompt_tokens=512"
        )


def decode_batch(
    weights: Weights,
    config: ModelConfig,
    spec: CacheSpec,
    lists: Sequence[np.ndarray],
    rows: int,
    *,
    prompt: Prompt | None = None,
    run: Segment = segment,
) -> Decoded:
    """The lists as one batch of `rows` rows, which begin together and end one by one.

    Each list has at least two tokens more than the prompt. run: called
    as `segment` is, for each of the compiled steps.
    """
    start = prompt.tokens if prompt else 0
    longest = max(map(len, lists)) - 1
    steps = min(_STEPS, padded_length(longest - start))
    total = start + -(-(longest - start) // steps) * steps
    tokens_TB = np.zeros((total + 1, rows), np.int32)
    ends_B = np.zeros(rows, np.int64)
    for row, tokens in enumerate(lists):
        tokens_TB[: len(tokens), row], ends_B[row] = tokens, len(tokens) - 1
    specs = slot_specs(config, spec, _room(start + steps, total), total, prompt=start)
    found = []
    if prompt is None:
        cache = empty(config, specs, rows)
    else:
        cache = _after_prompt(weights, config, specs, prompt.passes, tokens_TB[:start].T)
    for column in range(start, total, steps):
        now = slice(column, column + steps)
        before, specs = specs, slot_specs(config, spec, _room(now.stop, total), total, prompt=start)
        cache = with_room(specs, before, cache)
        live_TB = np.arange(column, now.stop)[:, None] < ends_B
        cache, logprob_TB = run(
            weights, config, specs, cache, tokens_TB[now], tokens_TB[column + 1 : now.stop + 1], live_TB
        )
        found.append(np.asarray(logprob_TB))
    logprob_TB = np.concatenate(found)
    rows_of = [logprob_TB[: end - start, row] for row, end in enumerate(ends_B[: len(lists)])]
    return Decoded(rows_of, bytes_held(config, specs, 1))


def _room(columns: int, total: int) -> int:
    """Columns that a cache of `columns` tokens out of `total` has room for: few sizes, as each is compiled for."""
    return padded_length(min(max(columns, _LEAST_CELLS), total))


def _after_prompt(
    weights: Weights, config: ModelConfig, specs: tuple[SlotSpec, ...], passes: Passes, tokens_BT: np.ndarray
) -> Cache:
    """The cache after prompts of one length, as `generate` fills it."""
    rows, chunk = tiles(config, *tokens_BT.shape)
    return by_groups(len(tokens_BT), rows, lambda some: _fill(weights, config, specs, passes, chunk, tokens_BT[some]))


@partial(jax.jit, static_argnames=("config", "specs", "passes", "chunk"))
def _fill(
    weights: Weights,
    config: ModelConfig,
    specs: tuple[SlotSpec, ...],
    passes: Passes,
    chunk: int,
    tokens_BT: jax.Array,
) -> Cache:
    no_padding_B = jnp.zeros(tokens_BT.shape[0], jnp.int32)
    return fill_cache(weights, config, specs, passes, tokens_BT, no_padding_B, chunk=chunk, plain=True)[0]


def _logprob(logits_BV: jax.Array, label_B: jax.Array) -> jax.Array:
    picked_B = jnp.take_along_axis(logits_BV, label_B[:, None], axis=1)[:, 0]
    return picked_B - jax.nn.logsumexp(logits_BV, axis=-1)


class Timed:
    """Runs `segment` and adds up its seconds and live tokens, but for the first of each shape, which is compiled.

    after: called with each segment's number of live tokens.
    """

    def __init__(self, after: Callable[[int], None]) -> None:
        self.seconds, self.tokens = 0.0, 0
        self._after, self._compiled = after, set()

    def __call__(
        self, weights: Weights, config: ModelConfig, specs: tuple[SlotSpec, ...], cache: Cache, *arrays: np.ndarray
    ) -> tuple[Cache, jax.Array]:
        shape, tokens = (specs, arrays[0].shape), int(arrays[-1].sum())
        started = time.monotonic()
        done = jax.block_until_ready(segment(weights, config, specs, cache, *arrays))
        if shape in self._compiled:
            self.seconds, self.tokens = self.seconds + time.monotonic() - started, self.tokens + tokens
        self._compiled.add(shape)
        self._after(tokens)
        return done
