"""Prompts in groups and chunks against all of them at once, and what the tokens' masses add up to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decode_step import make_params, small

from lckv_jax.decode import loop as programs
from lckv_jax.decode.generate import generate_rows
from lckv_jax.decode.prefill import prefill_rows
from lckv_jax.decode.step import decode_weights
from lckv_jax.model.transformer import hidden_states

T, PADDING = 12, np.array([0, 5, 11])


@pytest.fixture(autouse=True)
def x64():
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_enable_x64", False)


def rows(seed=0):
    tokens_BT = np.random.default_rng(seed).integers(0, 40, (3, T))
    return jnp.asarray(tokens_BT), jnp.asarray(np.maximum(np.arange(T)[None] - PADDING[:, None], -1))


def prefilled(config, params, passes, chunk, observed=None):
    tokens_BT, pos_BT = rows()
    run = jax.jit(
        lambda w: prefill_rows(w, config, tokens_BT, pos_BT, passes, chunk=chunk, observed=observed or {}),
    )
    return run(decode_weights(params, config))


@pytest.mark.parametrize("passes", ["trained", 1e-3, 0.0])
@pytest.mark.parametrize(
    ("sharing", "start"), [("0_2_2_3", "zero"), ("3_1_2_3", "input"), ("0s_1s_2_2", "zero"), ("1_2_3_3", "zero")]
)
def test_chunks_change_nothing(sharing, start, passes):
    config = small(sharing, start=start)
    params = make_params(config)
    tokens_BT, pos_BT = rows()
    want = jax.jit(lambda p: hidden_states(p, config, tokens_BT, positions_BT=pos_BT, passes=passes))(params)
    for chunk in (T, 4):
        got = prefilled(config, params, passes, chunk)
        np.testing.assert_allclose(got.x_BD, want.x_BTD[:, -1], atol=1e-10)
        assert np.array_equal(got.passes_B, np.broadcast_to(want.passes, 3))
        np.testing.assert_allclose(got.residual_B, np.broadcast_to(want.residual, 3), atol=1e-6)
        for owner, kv in want.slots.items():
            for mine, other in zip(got.kvs[owner], kv):
                np.testing.assert_allclose(mine[pos_BT >= 0], other[pos_BT >= 0], atol=1e-10)


def test_so_many_passes_make_so_many_tokens_exact():
    config = small("3_3_3_3", no_grad_passes=2, grad_passes=1)
    params = make_params(config)
    trained, exact, no_tolerance = (prefilled(config, params, passes, 4) for passes in ("trained", "exact", 0.0))
    for kv, want, same in zip(trained.kvs[3], exact.kvs[3], no_tolerance.kvs[3]):
        np.testing.assert_allclose(want[0], same[0], rtol=1e-11)
        np.testing.assert_allclose(kv[0, :3], want[0, :3], rtol=1e-12)
        assert abs(kv[0, 4:] - want[0, 4:]).max() > 1e-3


@pytest.mark.parametrize("queries", [1, 3, T])
@pytest.mark.parametrize("sharing", ["0_1_2_3", "0_2_2_3", "0_0_2_2"])
def test_masses_are_the_probabilities_of_the_last_queries(sharing, queries):
    """Row 0 by hand for layer 0; in sum one for each query, head and reader that has something to read."""
    config = small(sharing)
    params = make_params(config)
    observed = dict.fromkeys(config.sharing.owners, queries)
    whole = prefilled(config, params, 0.0, T, observed)
    for owner, mass in prefilled(config, params, 0.0, 4, observed).masses.items():
        np.testing.assert_allclose(mass, whole.masses[owner], atol=1e-10)
    for owner, mass in whole.masses.items():
        readers = [layer for layer, source in enumerate(config.sharing.sources) if source == owner]
        for row, padding in enumerate(PADDING):
            real = min(queries, T - padding)
            nothing = sum(config.sharing.upward[layer] for layer in readers) * (real == T - padding)  # first tokens
            total = config.num_heads * (real * len(readers) - nothing)
            np.testing.assert_allclose(mass[row].sum(), total, rtol=1e-10)
            assert not mass[row, :, :padding].any()


def test_a_mass_by_hand():
    config = small("0_1_2_3")
    params = make_params(config)
    mass = prefilled(config, params, "trained", 4, {0: 2}).masses[0]
    x = np.asarray(params["embed"])[np.asarray(rows()[0])[0]]
    h = x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * np.asarray(params["layers"]["attn_norm"][0])
    freq = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    q = np.einsum("TD,DNH->TNH", h, params["layers"]["wq"][0])
    k = np.einsum("TD,DKH->TKH", h, params["kv"]["wk"][0])

    def turned(x, at):
        low, high = np.split(x, 2)
        return np.concatenate(
            [low * np.cos(at * freq) - high * np.sin(at * freq), high * np.cos(at * freq) + low * np.sin(at * freq)]
        )

    want = np.zeros((config.num_kv_heads, T))
    for t in (T - 2, T - 1):
        for n in range(config.num_heads):
            head = n // (config.num_heads // config.num_kv_heads)
            scores = np.array([turned(q[t, n], t) @ turned(k[s, head], s) for s in range(t + 1)])
            weights = np.exp(scores / np.sqrt(config.head_dim))
            want[head, : t + 1] += weights / weights.sum()
    np.testing.assert_allclose(mass[0], want, rtol=1e-9, atol=1e-12)


def test_layers_above_the_last_owner_see_one_token():
    """By the compiler's count: three of four layers above the only owner cost next to nothing."""

    def flops(sharing):
        config = small(sharing)
        tokens_BT, pos_BT = jnp.zeros((1, 64), jnp.int32), jnp.arange(64)[None]
        run = jax.jit(lambda w: prefill_rows(w, config, tokens_BT, pos_BT, "trained", chunk=64, observed={}))
        return run.lower(decode_weights(make_params(config), config)).compile().cost_analysis()["flops"]

    assert flops("0_0_0_0") < 0.25 * flops("0_1_2_3")


@pytest.mark.parametrize("batch", [4, 5])
def test_groups_change_nothing(monkeypatch, batch):
    config = small("0_2_2_3")
    params = make_params(config)
    prompts = [list(range(1, 3 + 7 * (row % 3))) for row in range(batch)]
    want = generate_rows(params, config, prompts, 6)
    monkeypatch.setattr(programs, "_GROUP_TOKENS", 2 * 16)
    monkeypatch.setattr(programs, "_GROUP_SCORES", 2 * 4 * 16 * 8)
    assert programs.tiles(config, batch, 16) == (2, 2)
    got = generate_rows(params, config, prompts, 6)
    assert [row.tokens for row in got] == [row.tokens for row in want]
    assert [row.passes for row in got] == [row.passes for row in want]
    np.testing.assert_allclose([row.logprobs for row in got], [row.logprobs for row in want], atol=1e-10)


@pytest.mark.parametrize("columns", [1, 16, 48, 2048, 65536])
def test_tiles_bound_what_goes_through_together(columns):
    config = small("0_2_2_3")
    for batch in (1, 7, 5000):
        rows, chunk = programs.tiles(config, batch, columns)
        assert 1 <= rows <= batch and columns % chunk == 0
        assert rows == 1 or rows * columns <= programs._GROUP_TOKENS
        assert rows == chunk == 1 or rows * chunk * columns * config.num_heads <= programs._GROUP_SCORES
