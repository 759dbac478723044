"""The compiled programs of a decoder: prompts into a cache, then steps on it, each choosing the next tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lckv_jax.config import ModelConfig
from lckv_jax.decode.cache import Cache, fill, grown, next_positions, observed
from lckv_jax.decode.prefill import Prefilled, prefill_rows
from lckv_jax.decode.sampling import Sampling, choose, penalised
from lckv_jax.decode.spec import SlotSpec
from lckv_jax.decode.step import Weights, decode_step, decode_weights, head_logits
from lckv_jax.model.refine import Passes

_GROUP_TOKENS = 2**16  # of prompts that go through the model together
_GROUP_SCORES = 2**28  # of their attention, where a kernel holds them all: a gigabyte


class Loop(NamedTuple):
    """What a decode step hands to the next. tokens: the newest of each row, not yet in the cache."""

    cache: Cache
    tokens_B: jax.Array
    live_B: jax.Array
    seen_BV: jax.Array | None


class Chosen(NamedTuple):
    """New tokens [B] or [steps, B]: which, how likely, and whether the row had not ended before."""

    token: jax.Array
    logprob: jax.Array
    live: jax.Array


unstack = partial(jax.jit, static_argnames="config")(decode_weights)


@partial(jax.jit, static_argnames="specs")
def grow(specs: tuple[SlotSpec, ...], cache: Cache) -> Cache:
    return cache._replace(slots={spec.owner: grown(spec, cache.slots[spec.owner]) for spec in specs})


def with_room(specs: tuple[SlotSpec, ...], before: tuple[SlotSpec, ...], cache: Cache) -> Cache:
    """The cache, which is as `before` says, as `specs` say; `cache` itself is used up.

    Slot by slot, so that only one of them is there twice; those that keep their size are not copied.
    """
    slots = cache.slots
    for spec, old in zip(specs, before):
        if spec != old:
            alone = cache._replace(slots={0: slots.pop(spec.owner)})
            slots[spec.owner] = grow((spec._replace(owner=0),), alone).slots[0]  # one program for all slots of a size
    return cache


class Prompts(NamedTuple):
    """tokens_BT with padding_B columns of padding in front, and the random keys of the rows, [B]."""

    tokens_BT: jax.Array | np.ndarray
    padding_B: jax.Array | np.ndarray
    keys_B: jax.Array


class Used(NamedTuple):
    """The passes that each prompt took, and the relative K,V change of the last, both [B]."""

    passes_B: jax.Array
    residual_B: jax.Array


class Tiles(NamedTuple):
    """How many prompts go through the model together, and how many columns of them at once."""

    rows: int
    chunk: int


def tiles(config: ModelConfig, batch: int, columns: int) -> Tiles:
    """Rows and columns such that activations stay small beside weights and cache, however many prompts there are."""
    scores = config.num_heads * columns  # of one query, in the reference attention
    chunk = max(1, min(columns, _GROUP_TOKENS // 16, _GROUP_SCORES // scores))
    chunk = max(size for size in range(1, chunk + 1) if columns % size == 0)
    rows = max(1, min(batch, _GROUP_TOKENS // columns, _GROUP_SCORES // (scores * chunk)))
    return Tiles(-(-batch // -(-batch // rows)), chunk)  # groups of one size


def prefill(
    weights: Weights,
    config: ModelConfig,
    specs: tuple[SlotSpec, ...],
    passes: Passes,
    sampling: Sampling | None,
    prompts: Prompts,
    stops: jax.Array | np.ndarray,
) -> tuple[Loop, Chosen, Used]:
    """The prompts' K,V in a cache, the first new token of each row, and the passes that the row took."""
    (B, T), plain = prompts.tokens_BT.shape, not np.asarray(prompts.padding_B).any()
    rows, chunk = tiles(config, B, T)
    group = partial(prefill_group, weights, config, specs, passes, sampling, chunk, plain)
    return by_groups(B, rows, lambda some: group(_some(prompts, some), stops))


Rows = TypeVar("Rows")  # arrays whose first axis is that of rows, and scalars


def by_groups(batch: int, rows: int, run: Callable[[slice], Rows]) -> Rows:
    """What `run` gives for all of the batch: one group of `rows` rows after another, each straight into its place.

    All groups are of one size, so that the last may do rows again.
    """
    if rows == batch:
        return run(slice(0, batch))
    whole = None
    for start in range(0, batch, rows):
        first = min(start, batch - rows)
        part = run(slice(first, first + rows))
        whole = place(room(part, batch) if whole is None else whole, part, first)
        del part  # not there beside the next one
    assert whole is not None, "there are rows"
    return whole


def _some(prompts: Prompts, rows: slice) -> Prompts:
    return Prompts(prompts.tokens_BT[rows], prompts.padding_B[rows], prompts.keys_B[rows])


@partial(jax.jit, static_argnames=("config", "specs", "passes", "sampling", "chunk", "plain"))
def prefill_group(
    weights: Weights,
    config: ModelConfig,
    specs: tuple[SlotSpec, ...],
    passes: Passes,
    sampling: Sampling | None,
    chunk: int,
    plain: bool,
    prompts: Prompts,
    stops: jax.Array | np.ndarray,
) -> tuple[Loop, Chosen, Used]:
    """What `prefill` does for one group of rows, `chunk` columns at once. plain: no row has padding."""
    tokens_BT, padding_B, keys_B = (jnp.asarray(x) for x in prompts)
    B = tokens_BT.shape[0]
    cache, done = fill_cache(weights, config, specs, passes, tokens_BT, padding_B, chunk=chunk, plain=plain)
    seen_BV = None
    if sampling is not None and sampling.repetition_penalty != 1.0:
        real_BT = jnp.arange(tokens_BT.shape[1])[None] >= padding_B[:, None]
        seen_BV = jnp.zeros((B, config.vocab_size), bool).at[jnp.arange(B)[:, None], tokens_BT].max(real_BT)
    loop = Loop(cache, tokens_BT[:, -1], jnp.ones(B, bool), seen_BV)
    loop, chosen = _choose(sampling, loop, head_logits(weights, done.x_BD), keys_B, stops)
    return loop, chosen, Used(done.passes_B, done.residual_B)


def fill_cache(
    weights: Weights,
    config: ModelConfig,
    specs: tuple[SlotSpec, ...],
    passes: Passes,
    tokens_BT: jax.Array,
    padding_B: jax.Array,
    *,
    chunk: int,
    plain: bool,
) -> tuple[Cache, Prefilled]:
    """The cache after prompts, and what else came of them. chunk: columns at once; plain: no row has padding."""
    T = tokens_BT.shape[1]
    pos_BT = jnp.maximum(jnp.arange(T, dtype=jnp.int32)[None] - padding_B[:, None], -1)
    queries = {spec.owner: observed(spec, T) for spec in specs}
    wanted = {owner: number for owner, number in queries.items() if number}
    done = prefill_rows(weights, config, tokens_BT, pos_BT, passes, chunk=chunk, observed=wanted, plain=plain)
    return fill(specs, done.kvs, padding_B, done.masses), done


@partial(jax.jit, static_argnames="batch")
def room(part: Rows, batch: int) -> Rows:
    """Arrays for `batch` rows of what `part` is for some."""
    return jax.tree.map(lambda x: jnp.zeros((batch, *x.shape[1:]), x.dtype) if x.ndim else x, part)


@partial(jax.jit, donate_argnames="whole")
def place(whole: Rows, part: Rows, start: jax.Array | int) -> Rows:
    """`whole` with `part` in the rows from `start` on."""

    def put(whole: jax.Array, part: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=0) if part.ndim else part

    return jax.tree.map(put, whole, part)


@partial(jax.jit, static_argnames=("config", "specs", "sampling", "steps"), donate_argnames="loop")
def decode(
    weights: Weights,
    config: ModelConfig,
    specs: tuple[SlotSpec, ...],
    sampling: Sampling | None,
    steps: int,
    loop: Loop,
    keys_B: jax.Array,
    stops: jax.Array,
) -> tuple[Loop, Chosen]:
    """`steps` new tokens of every row."""

    def one(loop: Loop, _: None) -> tuple[Loop, Chosen]:
        logits_BV, cache = decode_step(weights, config, specs, loop.cache, loop.tokens_B, loop.live_B)
        return _choose(sampling, loop._replace(cache=cache), logits_BV, keys_B, stops)

    return jax.lax.scan(one, loop, None, length=steps)


def _choose(
    sampling: Sampling | None, loop: Loop, logits_BV: jax.Array, keys_B: jax.Array, stops: jax.Array | np.ndarray
) -> tuple[Loop, Chosen]:
    """The next token of each row, and the loop that goes on from it."""
    token_B = choose(sampling, penalised(sampling, logits_BV, loop.seen_BV), keys_B, next_positions(loop.cache))
    picked_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
    logprob_B = picked_B - jax.nn.logsumexp(logits_BV, axis=-1)
    seen_BV = loop.seen_BV
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(token_B.shape[0]), token_B].set(True)
    goes_on_B = loop.live_B & ~jnp.isin(token_B, stops)
    return Loop(loop.cache, token_B, goes_on_B, seen_BV), Chosen(token_B, logprob_B, loop.live_B)
