"""What is not there is not read: padding, empty cells and room for later may hold anything, in every kind of slot.

Of values a cell without a token must be finite, since its weight of zero is multiplied all the same, which costs no
pass over the cache; that it is, whatever padding holds, is what `fill` and `grown` promise.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decode_step import make_params, small

from lckv_jax.decode import loop as programs
from lckv_jax.decode.cache import append, fill, grown, next_positions
from lckv_jax.decode.cells import EMPTY, Cells
from lckv_jax.decode.generate import generate_rows
from lckv_jax.decode.kivi import Codes
from lckv_jax.decode.spec import CacheSpec, slot_specs
from lckv_jax.decode.step import decode_step
from lckv_jax.model.layers import KV

CACHES = ["full", "window(5)", "sinks(2,5)", "int8", "sinks(2,5)+int4", "kivi(2,3,6)", "window(8)+kivi(4,3,6)"]
PADDING, PROMPT, NEW = np.array([0, 3, 12], np.int32), 13, 9  # lengths 13, 10 and 1
LARGE = 1e30

step = jax.jit(decode_step, static_argnames=("config", "specs"))
jitted_fill = jax.jit(fill, static_argnums=0)


@pytest.fixture(autouse=True)
def x64():
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_enable_x64", False)


def model():
    config = small("0_2_2", num_layers=3)  # a layer reads before its owner appends
    return config, make_params(config)


def prompts(config, padding=0.0):
    """K,V of the prompts of three rows, by owner, with `padding` in the columns in front."""
    rng, shape = np.random.default_rng(0), (3, PROMPT, config.num_kv_heads, config.head_dim)
    there = (np.arange(PROMPT)[None] >= PADDING[:, None])[..., None, None]
    return {
        owner: KV(*(jnp.asarray(np.where(there, rng.normal(size=shape), padding)) for _ in "kv"))
        for owner in config.sharing.owners
    }


def decoded(config, params, specs, cache):
    """Logits [steps, B, V] of some tokens."""
    weights, out = programs.unstack(params, config), []
    for tokens_B in np.random.default_rng(1).integers(0, 40, (NEW, 3)):
        logits, cache = step(weights, config, specs, cache, jnp.asarray(tokens_B), jnp.ones(3, bool))
        out.append(logits)
    return np.stack(out)


def poisoned(x, there, value):
    """x [B, K, S, ...] with `value` where not there [B, S]; integers get their largest."""
    empty = ~there.reshape(there.shape[0], 1, there.shape[1], *[1] * (x.ndim - 3))
    if not jnp.issubdtype(x.dtype, jnp.floating):
        value = jnp.iinfo(x.dtype).max
    return np.where(empty, np.asarray(value, x.dtype), x)


def poisoned_cells(slot):
    there = np.asarray(slot.pos)[:, 0] != EMPTY
    fields = {"k": np.nan, "k_scale": np.nan, "v": LARGE, "v_scale": LARGE / 1e9}
    return slot._replace(
        **{name: poisoned(x, there, value) for name, value in fields.items() if (x := getattr(slot, name)) is not None}
    )


def poisoned_kivi(spec, slot):
    """All that no token of the prompts is in."""

    def ring(tokens_B, size):
        return np.arange(size)[None] < np.minimum(tokens_B, size)[:, None]

    def codes(x, there, value):
        return Codes(*(poisoned(part, there, value) for part in x))

    length, R = PROMPT - PADDING, spec.residual
    return slot._replace(
        k=codes(slot.k, ring(length // R, spec.cells // R), np.nan),
        v=codes(slot.v, ring(np.maximum(length - R, 0), spec.cells), LARGE),
        k_raw=poisoned(slot.k_raw, ring(length, R), np.nan),
        v_raw=poisoned(slot.v_raw, ring(length, R + 1), LARGE),
    )


@pytest.mark.parametrize("text", CACHES)
def test_what_is_not_there_changes_no_logit(text):
    config, params = model()
    specs = slot_specs(config, CacheSpec.parse(text), PROMPT + NEW)
    clean = jitted_fill(specs, prompts(config), PADDING)
    want = decoded(config, params, specs, clean)
    assert np.isfinite(want).all()

    padded = jitted_fill(specs, prompts(config, padding=np.nan), PADDING)
    np.testing.assert_array_equal(decoded(config, params, specs, padded), want)

    slots = {
        spec.owner: poisoned_cells(slot) if isinstance(slot, Cells) else poisoned_kivi(spec, slot)
        for spec in specs
        for slot in [clean.slots[spec.owner]]
    }
    np.testing.assert_array_equal(decoded(config, params, specs, clean._replace(slots=slots)), want)


@pytest.mark.parametrize("text", CACHES)
def test_cells_without_a_token_are_finite(text):
    """Whatever padding holds, from the prompt on, in new room, and in rows that have ended."""
    config, _ = model()
    few, many = (slot_specs(config, CacheSpec.parse(text), PROMPT + more) for more in (1, NEW + 20))
    live = jnp.asarray([True, False, True])
    token = KV(*[jnp.ones((3, 1, config.num_kv_heads, config.head_dim))] * 2)

    @jax.jit
    def later(kvs):
        cache = fill(few, kvs, jnp.asarray(PADDING))
        slots = []
        for before, after in zip(few, many):
            slot = cache.slots[before.owner]
            slot = append(before, slot, token, cache.column, next_positions(cache), live)
            slots.append(grown(after, slot))
        return slots

    for leaf in jax.tree.leaves(later(prompts(config, padding=np.nan))):
        assert np.isfinite(np.asarray(leaf, np.float64)).all()


@pytest.mark.parametrize("cache", ["sinks(2,6)+int8", "kivi(2,3,6)"])
def test_a_prompt_leaves_nothing_behind_for_the_next(cache):
    config, params = model()
    generate = partial(generate_rows, params, config, max_new_tokens=12, cache=cache)
    programs.prefill_group.clear_cache()
    programs.decode.clear_cache()
    long, short = generate([list(range(15))]), generate([[5, 7]])
    assert programs.prefill_group._cache_size() == programs.decode._cache_size() == 1
    programs.prefill_group.clear_cache()
    programs.decode.clear_cache()
    assert generate([[5, 7]]) == short
    assert generate([list(range(15))]) == long
