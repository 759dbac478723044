"""The choice of the next token from logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from pydantic import Field

from lckv_jax.model_config import Frozen, Positive


class Sampling(Frozen):
    """How tokens are drawn. The limits hold together, in the order of the fields, as in Hugging Face's `generate`."""

    repetition_penalty: float = Field(
        default=1.0, gt=0.0, description="logits of tokens seen so far are divided by it (multiplied where negative)"
    )
    temperature: float = Field(
        default=1.0, ge=0.0, description="divides the logits; smaller = more certain, 0 = always the likeliest"
    )
    top_k: Positive | None = Field(default=None, description="draw from the k likeliest tokens only")
    top_p: float = Field(
        default=1.0, gt=0.0, le=1.0, description="draw from the fewest likeliest tokens that have this probability"
    )
    min_p: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="leave out tokens with less than this share of the likeliest one's"
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="row i of a batch draws with seed + i")


def row_keys(sampling: Sampling, rows: int) -> jax.Array:
    """A random key for each of `rows` rows."""
    seeds = jnp.uint32(sampling.seed) + jnp.arange(rows, dtype=jnp.uint32)
    return jax.vmap(jax.random.key)(seeds)


def penalised(sampling: Sampling | None, logits_BV: jax.Array, seen_BV: jax.Array | None) -> jax.Array:
    """Logits with the repetition penalty (1909.05858, 4.1) on the tokens in `seen_BV`."""
    if sampling is None or sampling.repetition_penalty == 1.0 or seen_BV is None:
        return logits_BV
    penalty = sampling.repetition_penalty
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def choose(sampling: Sampling | None, logits_BV: jax.Array, keys_B: jax.Array, pos_B: jax.Array) -> jax.Array:
    """The next token of each row, int32 [B]: the likeliest if `sampling` is None or its temperature 0, else drawn.

    keys_B: as from `row_keys`. pos_B: of the tokens to draw; a row draws the same whatever its batch mates.
    """
    if sampling is None or sampling.temperature == 0.0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits = _limited(sampling, logits_BV / sampling.temperature)
    draw = jax.vmap(lambda key, pos, row: jax.random.categorical(jax.random.fold_in(key, pos), row))
    return draw(keys_B, pos_B, logits).astype(jnp.int32)


def _limited(sampling: Sampling, logits_BV: jax.Array) -> jax.Array:
    """Logits with -inf where top_k, top_p or min_p leave a token out. The likeliest always stays."""
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        least = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
    if sampling.top_p < 1.0:
        ordered = jnp.sort(logits_BV, axis=-1, descending=True)
        probability = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability  # of the likelier ones
        least = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
    if sampling.min_p > 0.0:
        likeliest = jnp.max(logits_BV, axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < likeliest + jnp.log(sampling.min_p), -jnp.inf, logits_BV)
    return logits_BV
