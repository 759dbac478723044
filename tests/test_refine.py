"""The passes against the token-by-token oracle, for every family; gradients, tolerance, schedules."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import token_by_token

from lckv_jax import ModelConfig
from lckv_jax.model import layers as L
from lckv_jax.model import transformer
from lckv_jax.model.loss import loss
from lckv_jax.model.transformer import hidden_states, init_params
from lckv_jax.sharing import Run

SIZES = dict(
    vocab_size=61, hidden_size=16, intermediate_size=20, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=6,
    window=4, init_std=0.4,
)  # fmt: skip
MAPS = [
    "standard", "lckv(warmup=2)", "lckv(warmup=0)", "cla(group=2)", "yoco", "mlkv(kv_layers=2)", "trailing(shared=2)",
    "grid(pizza,bottom,3)", "grid(pizza,middle,3)", "grid(pizza,top,3)", "grid(sandwich,bottom,3)",
    "grid(sandwich,middle,3)", "grid(sandwich,top,4)", "grid(lasagna,bottom,3)", "grid(lasagna,middle,3)",
    "grid(lasagna,top,3)", "1_2s_0_3_3_3", "2_3_2_3_4_5", "3_3_3_0_4s_4", "0_2_2_1_4_5", "0_5s_5s_5_3s_5s",
    "0s_0_2_2s_5_5",
]  # fmt: skip
T = 14
forward = jax.jit(transformer.forward, static_argnums=1, static_argnames=("no_grad_passes", "grad_passes"))


@pytest.fixture(autouse=True)
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def make(spec, **changes):
    config = ModelConfig(**SIZES | {"sharing": spec, "dtype": "float64"} | changes)
    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    params = jax.tree.map(lambda p: rng.normal(0.0, config.init_std, p.shape).astype(config.dtype), shapes)
    for group in (params["layers"], params):  # norms around 1; biases matter too
        for name in [name for name in group if name.endswith("norm")]:
            group[name] = 1 + group[name]
    params = jax.tree.map(jnp.asarray, params)
    tokens = jax.random.randint(jax.random.key(5), (2, T), 0, config.vocab_size)
    return config, params, tokens


def oracle(params, config, tokens, segments=None):
    rows = [None] * len(tokens) if segments is None else np.asarray(segments)
    return np.stack([token_by_token(params, config, row, s) for row, s in zip(np.asarray(tokens), rows)])


@pytest.mark.parametrize("spec", MAPS)
def test_enough_passes_equal_token_by_token(spec):
    config, params, tokens = make(spec)
    logits = forward(params, config, tokens, no_grad_passes=T - 1, grad_passes=1)
    np.testing.assert_allclose(logits, oracle(params, config, tokens), atol=1e-9)


@pytest.mark.parametrize("spec", ["lckv(warmup=2)", "yoco", "grid(lasagna,middle,3)"])
@pytest.mark.parametrize(
    "changes",
    [
        {"strict_everywhere": True},
        {"attention_bias": True, "mlp_bias": True},
        {"tie_embeddings": True, "num_kv_heads": 1},
        {"num_kv_heads": 4, "rope_scaling": {"type": "linear", "factor": 3.0}},
        {"rope_scaling": {"type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}},
        {"remat": "none", "norm_eps": 1e-2},
    ],
    ids=str,
)
def test_options_equal_token_by_token(spec, changes):
    config, params, tokens = make(spec, **changes)
    logits = forward(params, config, tokens, no_grad_passes=T - 1, grad_passes=1)
    np.testing.assert_allclose(logits, oracle(params, config, tokens), atol=1e-9)


@pytest.mark.parametrize("start", ["zero", "input"])
@pytest.mark.parametrize(("m", "b"), [(0, 1), (0, 3), (1, 1), (2, 2), (4, 1)])
def test_first_tokens_are_exact_after_m_plus_b_passes(start, m, b):
    config, params, tokens = make("lckv(warmup=0)", start=start)
    logits = np.asarray(forward(params, config, tokens, no_grad_passes=m, grad_passes=b))
    right = oracle(params, config, tokens)
    np.testing.assert_allclose(logits[:, : m + b], right[:, : m + b], atol=1e-9)
    assert np.abs(logits[:, m + b :] - right[:, m + b :]).max() > 1e-2  # and the rest is not yet


@pytest.mark.parametrize("spec", ["standard", "lckv(warmup=2)", "grid(sandwich,middle,3)", "yoco"])
def test_packed_documents_are_as_alone(spec):
    config, params, tokens = make(spec)
    segments = jnp.array([[1] * 5 + [2] * 9, [1] * 1 + [2] * 7 + [3] * 6])
    packed = forward(params, config, tokens, segment_ids_BT=segments, no_grad_passes=T)
    np.testing.assert_allclose(packed, oracle(params, config, tokens, segments), atol=1e-9)
    alone = forward(params, config, tokens[:1, 5:], no_grad_passes=T)
    np.testing.assert_allclose(packed[:1, 5:], alone, atol=1e-9)


def test_left_padding_changes_nothing():
    config, params, tokens = make("lckv(warmup=2)")
    padded = jnp.concatenate([jnp.full((2, 3), 7), tokens], axis=1)
    positions = jnp.tile(jnp.concatenate([jnp.full(3, -1), jnp.arange(T)])[None], (2, 1))
    got = forward(params, config, padded, positions_BT=positions)[:, 3:]
    np.testing.assert_allclose(got, forward(params, config, tokens), atol=1e-9)


@pytest.mark.parametrize("spec", MAPS)
def test_causality_by_gradients(spec):
    """The logits at t depend on tokens <= t only, and on the last of them."""
    config, params, tokens = make(spec)
    at = 6

    def logit_sum(embedded):
        identity = {**params, "embed": embedded, "head": params["head"]}
        return forward(identity, config, jnp.arange(T)[None], no_grad_passes=0, grad_passes=3)[0, at].sum()

    grads = jax.jit(jax.grad(logit_sum))(params["embed"][tokens[0]])
    assert np.all(np.asarray(grads[at + 1 :]) == 0.0)
    assert np.all(np.abs(np.asarray(grads[: at + 1])).sum(1) > 0.0) or config.sharing.windowed != (False,) * 6


@pytest.mark.parametrize("spec", ["grid(sandwich,middle,3)", "3_3_3_0_4s_4", "0_2_2_1_4_5"])
def test_no_grad_passes_carry_no_gradient(spec):
    """The gradient is that of b passes, run layer by layer, after m passes of other, constant parameters."""
    config, params, tokens = make(spec, remat="none")
    want = jax.jit(jax.grad(lambda p: _loss_by_hand(params, p, config, tokens, m=2, b=2)))(params)
    got = jax.jit(jax.grad(lambda p: loss(p, config, tokens, no_grad_passes=2, grad_passes=2)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), got, want)


def _loss_by_hand(p_frozen, p_trained, config, tokens, m, b):
    """m passes with p_frozen, b with p_trained, layer by layer without runs, scans or shortcuts."""
    sharing = config.sharing
    positions = jnp.tile(jnp.arange(tokens.shape[1])[None], (tokens.shape[0], 1))
    context = L.make_context(config, positions, None)

    def sweep(p, x, slots, span):
        for i in range(span.start, span.stop):
            source = sharing.sources[i]
            run = Run(
                i, i + 1, None if source == i else source, i in sharing.owners, sharing.upward[i], sharing.windowed[i]
            )
            stack = L.take_stack(p, config, run)
            x, own = L.run_layers(config, run, stack, x, slots.get(source), context)
            slots = {**slots, **own}
        return x, slots

    x, slots = p_trained["embed"][tokens].astype(config.dtype), {}
    x_frozen, slots_frozen = p_frozen["embed"][tokens].astype(config.dtype), {}
    for span in sharing.spans():
        if not span.cyclic:
            x, slots = sweep(p_trained, x, slots, span)
            x_frozen, slots_frozen = sweep(p_frozen, x_frozen, slots_frozen, span)
            continue
        shape = (*tokens.shape, config.num_kv_heads, config.head_dim)
        zeros = {
            o: L.KV(jnp.zeros(shape), jnp.zeros(shape)) for o in range(span.start, span.stop) if o in sharing.owners
        }
        before = {**slots_frozen, **zeros}
        for _ in range(m):
            _, before = sweep(p_frozen, x_frozen, before, span)
        mine = {**slots, **{o: before[o] for o in zeros}}
        frozen_mine = before
        for _ in range(b):
            out, mine = sweep(p_trained, x, mine, span)
            frozen_out, frozen_mine = sweep(p_frozen, x_frozen, frozen_mine, span)
        x, slots, x_frozen, slots_frozen = out, mine, frozen_out, frozen_mine
    x = L.rms_norm(x, p_trained["final_norm"], config.norm_eps)
    logits = jnp.einsum("BTD,DV->BTV", x, p_trained["head"])
    logp = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1).mean()


def test_traced_passes_equal_static_ones_and_compile_once():
    config, params, tokens = make("lckv(warmup=2)")
    step = jax.jit(jax.value_and_grad(lambda p, m: loss(p, config, tokens, no_grad_passes=m)))
    for m in (1, 4):
        value, grads = step(params, jnp.asarray(m))
        want, want_grads = jax.jit(jax.value_and_grad(lambda p, m=m: loss(p, config, tokens, no_grad_passes=m)))(params)
        np.testing.assert_allclose(value, want, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), grads, want_grads)
    assert step._cache_size() == 1


def test_tolerance_stops_early_and_reports_it():
    config, params, tokens = make("lckv(warmup=2)", no_grad_passes=40, init_std=0.1)
    full = hidden_states(params, config, tokens)
    loose = hidden_states(params, make("lckv(warmup=2)", no_grad_passes=40, tolerance=1e-3)[0], tokens)
    assert int(full.passes) == 42
    assert float(full.residual) < 1e-14
    assert 2 < int(loose.passes) < 40
    assert float(loose.residual) <= 1e-3
    np.testing.assert_allclose(loose.x_BTD, full.x_BTD, atol=2e-2)


def test_residual_is_the_largest_relative_change_of_a_token():
    config, params, tokens = make("lckv(warmup=2)")
    a = hidden_states(params, config, tokens, no_grad_passes=3, grad_passes=1)
    b = hidden_states(params, config, tokens, no_grad_passes=4, grad_passes=1)
    worst = 0.0
    for old, new in zip(a.slots[4], b.slots[4]):
        old, new = np.asarray(old, np.float64), np.asarray(new, np.float64)
        moved = np.sqrt(((new - old) ** 2).sum((2, 3)) / (new**2).sum((2, 3)))
        worst = max(worst, moved.max())
    np.testing.assert_allclose(float(b.residual), worst, rtol=1e-6)


def test_float64_without_x64_is_refused():
    config, params, tokens = make("standard")
    jax.config.update("jax_enable_x64", False)
    with pytest.raises(ValueError, match="JAX_ENABLE_X64"):
        forward(params, config, tokens)


@pytest.mark.parametrize("spec", ["lckv(warmup=2)", "standard"])
def test_bfloat16_is_near_float32_and_finite(spec):
    config, params, tokens = make(spec, dtype="float32", init_std=0.1)
    low = make(spec, dtype="bfloat16")[0]
    want, got = forward(params, config, tokens), forward(params, low, tokens)
    assert got.dtype == jnp.float32
    assert np.isfinite(got).all()
    assert np.abs(np.asarray(got - want)).max() < 0.15 * np.abs(np.asarray(want)).max()


def test_one_token_row():
    config, params, tokens = make("lckv(warmup=0)")
    logits = forward(params, config, tokens[:, :1])
    np.testing.assert_allclose(logits, oracle(params, config, tokens[:, :1]), atol=1e-9)


def test_passes_may_be_any_kind_of_integer():
    config, params, tokens = make("lckv(warmup=2)")
    want = transformer.forward(params, config, tokens, no_grad_passes=0, grad_passes=1)
    got = transformer.forward(params, config, tokens, no_grad_passes=np.int64(0), grad_passes=1)
    np.testing.assert_array_equal(got, want)


# ---------------------------------------------------------------- inference: each row until it is solved


def solve(passes):
    def states(params, config, tokens, segments, positions):
        return hidden_states(params, config, tokens, segment_ids_BT=segments, positions_BT=positions, passes=passes)

    return jax.jit(states, static_argnums=1)


def packed_and_padded(tokens):
    """One row of two documents and one that is left-padded by 3, as segments and positions."""
    segments = jnp.array([[1] * 5 + [2] * 9, [1] * T])
    return segments, jnp.array([[*range(5), *range(9)], [-1] * 3 + [*range(T - 3)]])


def logits_of(params, config, hidden):
    return np.asarray(hidden.x_BTD @ transformer.head_matrix(params, config))


@pytest.mark.parametrize(
    ("spec", "changes"),
    [
        *((spec, {}) for spec in MAPS),
        *((spec, {"start": "input"}) for spec in ("lckv(warmup=0)", "grid(lasagna,top,3)", "2_3_2_3_4_5")),
        ("grid(lasagna,middle,3)", {"strict_everywhere": True}),
        ("lckv(warmup=2)", {"strict_everywhere": True, "start": "input", "attention_bias": True}),
    ],
    ids=str,
)
def test_exact_passes_equal_token_by_token(spec, changes):
    config, params, tokens = make(spec, **changes)
    segments, positions = packed_and_padded(tokens)
    hidden = solve("exact")(params, config, tokens, segments, positions)
    got = logits_of(params, config, hidden)
    np.testing.assert_allclose(got[0], token_by_token(params, config, np.asarray(tokens[0]), segments[0]), atol=1e-9)
    np.testing.assert_allclose(got[1, 3:], token_by_token(params, config, np.asarray(tokens[1, 3:])), atol=1e-9)
    assert hidden.passes.shape == hidden.residual.shape == (2,)
    assert np.all(np.asarray(hidden.passes) <= ([9, 11] if config.sharing.cyclic else 1))


@pytest.mark.parametrize("passes", ["trained", 0.1, 0])
def test_a_row_does_not_depend_on_its_batch_mates(passes):
    """Bit for bit in batches of one shape, beside mates that need more passes, and fewer: 1, as all is padding."""
    config, params, tokens = make("lckv(warmup=0)", dtype="float32", init_std=0.2, no_grad_passes=3)
    steps = solve(passes)

    def beside(mate, mates_length, mine=10):
        positions = jnp.stack([jnp.where(jnp.arange(T) < n, jnp.arange(T), -1) for n in (mine, mates_length)])
        return steps(params, config, jnp.stack([tokens[0], mate]), None, positions)

    found = [beside(tokens[1], T), beside(tokens[1, ::-1], T), beside(tokens[1], 0)]
    alone = steps(params, config, tokens[:1, :10], None, jnp.arange(10)[None])
    for hidden in found:
        np.testing.assert_array_equal(hidden.x_BTD[0], found[0].x_BTD[0])
        for slot, kv in hidden.slots.items():
            np.testing.assert_array_equal(kv.k_BSKH[0, :10], found[0].slots[slot].k_BSKH[0, :10])
        assert int(hidden.passes[0]) == int(alone.passes[0])
    np.testing.assert_allclose(found[0].x_BTD[:1, :10], alone.x_BTD, atol=1e-5)
    mine, more, fewer = int(alone.passes[0]), int(found[0].passes[1]), int(found[2].passes[1])
    assert mine == more == fewer == 5 if passes == "trained" else fewer == 1 < mine < more
    assert mine < 10 or passes == 0  # so that stopping early is what was seen


def test_what_passes_means():
    config, params, _ = make("lckv(warmup=2)", init_std=0.1, no_grad_passes=2)
    tokens = jax.random.randint(jax.random.key(5), (2, 3 * T), 0, config.vocab_size)
    positions = jnp.tile(jnp.arange(3 * T)[None], (2, 1))
    made, changes, x = {}, {}, {}
    for passes in ("trained", "exact", 1e-2, 1e-4, 0):
        hidden = solve(passes)(params, config, tokens, None, positions)
        made[passes], changes[passes], x[passes] = np.asarray(hidden.passes), hidden.residual, hidden.x_BTD
    assert made["trained"].tolist() == [4, 4]
    assert made[0].tolist() == [3 * T, 3 * T]
    assert np.all(made[1e-2] < made[1e-4])
    assert np.all(made[1e-4] < made["exact"])
    assert np.all(made["exact"] < 3 * T)
    for passes in (1e-2, 1e-4):
        assert np.all(np.asarray(changes[passes]) <= passes)
        np.testing.assert_allclose(x[passes], x[0], atol=20 * passes)
    assert np.all(np.asarray(changes["exact"]) <= 8 * np.finfo(np.float64).eps)
    np.testing.assert_allclose(x["exact"], x[0], atol=1e-13)
    training = jax.jit(hidden_states, static_argnums=1)(params, config, tokens)
    np.testing.assert_allclose(x["trained"], training.x_BTD, atol=1e-13)
    np.testing.assert_allclose(changes["trained"].max(), training.residual, rtol=1e-5)


@pytest.mark.parametrize("start", ["zero", "input"])
def test_one_trained_pass_and_rows_of_one_token(start):
    config, params, tokens = make("lckv(warmup=0)", start=start, no_grad_passes=0, grad_passes=1)
    for passes in ("trained", "exact"):
        hidden = solve(passes)(params, config, tokens[:, :1], None, jnp.zeros((2, 1), jnp.int32))
        np.testing.assert_allclose(logits_of(params, config, hidden), oracle(params, config, tokens[:, :1]), atol=1e-9)
        assert hidden.passes.tolist() == [1, 1]
    got = solve("trained")(params, config, tokens, None, jnp.tile(jnp.arange(T)[None], (2, 1)))
    np.testing.assert_allclose(logits_of(params, config, got), forward(params, config, tokens), atol=1e-12)
