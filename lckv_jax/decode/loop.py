"""The compiled programs of a decoder: prompts into a cache, then steps on it, each choosing the next tokens."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lckv_jax.config import ModelConfig
from lckv_jax.decode.cache import Cache, fill, grown, next_positions
from lckv_jax.decode.sampling import Sampling, choose, penalised
from lckv_jax.decode.spec import SlotSpec
from lckv_jax.decode.step import Weights, decode_step, decode_weights
from lckv_jax.model.attention import wider
from lckv_jax.model.layers import Params
from lckv_jax.model.refine import Passes
from lckv_jax.model.transformer import head_matrix, hidden_states


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


@partial(jax.jit, static_argnames=("config", "specs", "passes", "sampling"))
def prefill(
    params: Params,
    config: ModelConfig,
    specs: tuple[SlotSpec, ...],
    passes: Passes,
    sampling: Sampling | None,
    tokens_BT: jax.Array,
    padding_B: jax.Array,
    keys_B: jax.Array,
    stops: jax.Array,
) -> tuple[Loop, Chosen, jax.Array]:
    """The prompts' K,V in a cache, the first new token of each row, and the passes that the row took."""
    B, T = tokens_BT.shape
    pos_BT = jnp.maximum(jnp.arange(T, dtype=jnp.int32)[None] - padding_B[:, None], -1)
    hidden = hidden_states(params, config, tokens_BT, positions_BT=pos_BT, passes=passes)
    x_BD, head = hidden.x_BTD[:, -1], head_matrix(params, config)
    logits_BV = jnp.einsum("BD,DV->BV", x_BD, head, preferred_element_type=wider(x_BD.dtype))
    seen_BV = None
    if sampling is not None and sampling.repetition_penalty != 1.0:
        rows = jnp.arange(B)[:, None]
        seen_BV = jnp.zeros((B, config.vocab_size), bool).at[rows, tokens_BT].max(pos_BT >= 0)
    loop = Loop(fill(specs, hidden.slots, padding_B), tokens_BT[:, -1], jnp.ones(B, bool), seen_BV)
    loop, chosen = _choose(sampling, loop, logits_BV, keys_B, stops)
    return loop, chosen, hidden.passes


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
    sampling: Sampling | None, loop: Loop, logits_BV: jax.Array, keys_B: jax.Array, stops: jax.Array
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
