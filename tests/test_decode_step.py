"""One token at a time on the cache, against a float64 oracle that keeps lists; and what the compiled step does."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import token_by_token

from lckv_jax import ModelConfig
from lckv_jax.decode.cache import append, bytes_held, bytes_read_per_step, fill
from lckv_jax.decode.spec import CacheSpec, slot_specs
from lckv_jax.decode.step import decode_step, decode_weights, head_logits, step_bytes
from lckv_jax.model.layers import KV
from lckv_jax.model.transformer import hidden_states, init_params

TOKENS = 20
MAPS = [
    "0_1_2_3",
    "0_2_2_3",
    "3_3_3_3",
    "0_0_2_2",
    "0s_1s_2_2",
    "1_2s_0_3",
    "0s_0_2_2s",
    "2s_2_2s_3",
    "3_1_2_3",
    "1_2_3_3",
]
CACHES = {"full": {}, "window(5)": {"window": 5}, "sinks(2,5)": {"window": 5, "sinks": 2}}


@pytest.fixture(autouse=True)
def x64():
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_enable_x64", False)


def small(sharing, **changes):
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_layers": 4, "num_heads": 4}
    sizes |= {"num_kv_heads": 2, "head_dim": 6, "window": 4, "dtype": "float64", "init_std": 0.5}
    return ModelConfig(**(sizes | {"sharing": sharing} | changes))


def make_params(config, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape) + (x.ndim == 1), jnp.float64), shapes)


@partial(jax.jit, static_argnames="config")
def solve(params, config, tokens_BT, pos_BT):
    return hidden_states(params, config, tokens_BT, positions_BT=pos_BT, passes=0.0)


def decode_logits(params, config, tokens_BT, cache, prompt=1, padding=None):
    """Logits [B, T - prompt + 1, V] of tokens fed one by one after a prompt that was solved exactly."""
    B, T = tokens_BT.shape
    padding_B = np.zeros(B, np.int32) if padding is None else np.asarray(padding, np.int32)
    specs = slot_specs(config, CacheSpec.parse(cache), T)
    pos_BT = np.maximum(np.arange(prompt, dtype=np.int32)[None] - padding_B[:, None], -1)
    hidden = hidden_states(
        params, config, jnp.asarray(tokens_BT[:, :prompt]), positions_BT=jnp.asarray(pos_BT), passes=0.0
    )
    state, weights = fill(specs, hidden.slots, jnp.asarray(padding_B)), decode_weights(params, config)
    step = jax.jit(lambda state, tokens: decode_step(weights, config, specs, state, tokens, jnp.ones(B, bool)))
    out = [head_logits(weights, hidden.x_BTD[:, -1])]
    for t in range(prompt, T):
        logits, state = step(state, jnp.asarray(tokens_BT[:, t]))
        out.append(logits)
    assert step._cache_size() == 1  # one program for every length
    return np.stack(out, 1), state, specs


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("sharing", MAPS)
def test_every_map_and_policy_equals_the_oracle(sharing, cache):
    config = small(sharing)
    params, tokens = make_params(config), np.random.default_rng(1).integers(0, 40, (2, TOKENS))
    got, _, _ = decode_logits(params, config, tokens, cache)
    for row, logits in zip(tokens, got):
        np.testing.assert_allclose(logits, token_by_token(params, config, row, **CACHES[cache]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize("policy", ["full", "sinks(2,5)"])
def test_codes_equal_the_oracle(policy, codec):
    config = small("0_2_2_3")
    params, tokens = make_params(config), np.random.default_rng(2).integers(0, 40, (1, TOKENS))
    got, _, _ = decode_logits(params, config, tokens, f"{policy}+{codec}")
    want = token_by_token(params, config, tokens[0], **CACHES[policy], largest={"int8": 127, "int4": 7}[codec])
    np.testing.assert_allclose(got[0], want, rtol=0, atol=2e-4)  # scales are float32
    raw = token_by_token(params, config, tokens[0], **CACHES[policy])
    assert np.abs(want - raw).max() > 1e-2  # so the codes were really read


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    "changes",
    [{"strict_everywhere": True}, {"attention_bias": True, "mlp_bias": True}, {"tie_embeddings": True}],
    ids=lambda changes: next(iter(changes)),
)
def test_every_kind_of_model(changes, cache):
    config = small("0_2_2_3", **changes)
    params, tokens = make_params(config), np.random.default_rng(3).integers(0, 40, (1, TOKENS))
    got, _, _ = decode_logits(params, config, tokens, cache)
    want = token_by_token(params, config, tokens[0], **CACHES[cache])
    np.testing.assert_allclose(got[0], want, rtol=0, atol=1e-9)


def test_a_head_that_is_the_embedding_is_there_once():
    tied, apart = (small("0_2_2_3", tie_embeddings=tied) for tied in (True, False))
    one, two = (jax.jit(decode_weights, static_argnums=1)(make_params(c), c) for c in (tied, apart))
    sizes = [sum(x.nbytes for x in jax.tree.leaves(weights)) for weights in (one, two)]
    assert sizes[1] - sizes[0] == 40 * 16 * 8
    assert step_bytes(one) == step_bytes(two)


@pytest.mark.parametrize("cache", ["full", "window(5)", "sinks(2,5)"])
@pytest.mark.parametrize("prompt", [4, 5, 7, 12])
def test_decoding_after_a_prompt_of_any_length(prompt, cache):
    """A cache filled with a prompt is the one that its tokens were appended to."""
    config = small("0_2_2_3")
    params, tokens = make_params(config), np.random.default_rng(4).integers(0, 40, (1, TOKENS))
    specs = slot_specs(config, CacheSpec.parse(cache), TOKENS)
    pos = jnp.arange(prompt, dtype=jnp.int32)[None]
    hidden = solve(params, config, jnp.asarray(tokens[:, :prompt]), pos)
    filled = fill(specs, hidden.slots, jnp.zeros(1, jnp.int32))
    one = fill(specs, jax.tree.map(lambda x: x[:, :1], hidden.slots), jnp.zeros(1, jnp.int32))
    for spec in specs:
        slot = one.slots[spec.owner]
        for t in range(1, prompt):
            kv = KV(*(x[:, t : t + 1] for x in hidden.slots[spec.owner]))
            slot = append(spec, slot, kv, jnp.int32(t), jnp.full(1, t, jnp.int32), jnp.ones(1, bool))
        for name, got, want in zip(slot._fields, filled.slots[spec.owner], slot):
            if want is not None:
                np.testing.assert_array_equal(got, want, err_msg=name)


def test_padding_in_front_changes_nothing():
    config = small("0s_2_2_3")
    params, rng = make_params(config), np.random.default_rng(5)
    rows = [rng.integers(0, 40, n) for n in (TOKENS, TOKENS - 3, TOKENS - 7)]
    padding = [0, 3, 7]
    tokens = np.stack([np.concatenate([np.full(p, 9), row]) for p, row in zip(padding, rows)])
    for cache in ("full", "sinks(2,5)"):
        got, state, _ = decode_logits(params, config, tokens, cache, prompt=8, padding=padding)
        for number, (row, pad) in enumerate(zip(rows, padding)):
            alone, _, _ = decode_logits(params, config, row[None], cache, prompt=8 - pad)
            np.testing.assert_allclose(got[number], alone[0], rtol=0, atol=1e-12, err_msg=cache)
        assert all((np.asarray(slot.pos).max(axis=(1, 2)) == [19, 16, 12]).all() for slot in state.slots.values())


def test_a_cache_that_loses_nothing_is_the_full_one_bit_for_bit():
    config = small("0_2_2_3")
    params, tokens = make_params(config), np.random.default_rng(6).integers(0, 40, (1, TOKENS))
    full, _, _ = decode_logits(params, config, tokens, "full")
    for cache in (f"window({TOKENS})", f"sinks(1,{TOKENS})"):
        np.testing.assert_array_equal(decode_logits(params, config, tokens, cache)[0], full, err_msg=cache)


@pytest.mark.parametrize("cache", ["full", "window(5)+int8", "sinks(2,5)", "int8", "int4"])
def test_bytes_by_formula_are_those_of_the_arrays(cache):
    config = small("0s_2_2_3")
    params, tokens = make_params(config), np.random.default_rng(7).integers(0, 40, (3, TOKENS))
    _, state, specs = decode_logits(params, config, tokens, cache)
    assert list(state.slots) == [0, 2, 3]  # owners only
    held = sum(x.nbytes for x in jax.tree.leaves(state.slots))
    assert bytes_held(config, specs, 3) == held
    one = {spec.owner: bytes_held(config, (spec,), 3) for spec in specs}
    assert bytes_read_per_step(config, specs, 3) == one[0] + 2 * one[2] + one[3]


def test_no_growth_of_error_over_ten_thousand_steps_of_sinks():
    """Keys are never rotated again: a bfloat16 stream is as near to float64 at its end as near its beginning."""
    config = small("0_1_2_3")  # an upward map is recurrent, so that it carries any error on
    params = make_params(config)
    low = config.model_copy(update={"dtype": "bfloat16"})
    spec = CacheSpec.parse("sinks(4,28)")
    tokens = np.random.default_rng(8).integers(0, 40, 10_001)

    def run(config, params):
        specs, weights = slot_specs(config, spec, 10_001), decode_weights(params, config)
        hidden = solve(params, config, jnp.asarray(tokens[None, :1]), jnp.zeros((1, 1), jnp.int32))
        state = fill(specs, hidden.slots, jnp.zeros(1, jnp.int32))

        def one(state, token):
            logits, state = decode_step(weights, config, specs, state, token[None], jnp.ones(1, bool))
            return state, logits[0]

        return jax.jit(lambda state: jax.lax.scan(one, state, jnp.asarray(tokens[1:]))[1])(state)

    exact, rough = run(config, params), run(low, params)
    errors = np.abs(np.asarray(exact) - np.asarray(rough, np.float64)).mean(axis=1)
    assert errors[-1000:].mean() < 1.1 * errors[1000:2000].mean()
    assert errors.mean() > 1e-4  # it is bfloat16 indeed
