"""The chunked loss against plain float64 formulas, what it never holds in memory, and initial parameters."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from lckv_jax import ModelConfig
from lckv_jax.model.loss import _cross_entropy, loss, loss_sum
from lckv_jax.model.transformer import Transformer, _embedded, forward, init_params

SIZES = {
    "vocab_size": 23, "hidden_size": 8, "intermediate_size": 12, "num_layers": 3, "num_heads": 2, "num_kv_heads": 1,
    "head_dim": 4, "init_std": 0.3, "remat": "none",
}  # fmt: skip
B, T, D, V = 2, 7, 5, 11


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def plain(logits, labels, z_loss=0.0):
    """(summed loss, summed -log p) of logits [B, T, V] for the labels [B, T] that are not -100; all logits at once."""
    logp = jax.nn.log_softmax(logits)
    valid = labels != -100
    picked = jnp.take_along_axis(logp, jnp.where(valid, labels, 0)[..., None], axis=-1)[..., 0]
    nll = -jnp.sum(jnp.where(valid, picked, 0.0))
    return nll + z_loss * jnp.sum(jnp.where(valid, jax.nn.logsumexp(logits, axis=-1) ** 2, 0.0)), nll


def problem(labels="some"):
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, V, (B, T))
    drawn[0, :2] = drawn[1, 3] = drawn[1, -1] = -100
    labels = jnp.asarray(drawn if labels == "some" else np.full((B, T), -100))
    return jnp.asarray(rng.normal(size=(B, T, D))), jnp.asarray(rng.normal(size=(D, V))), labels


# ---------------------------------------------------------------- cross entropy


@pytest.mark.parametrize(("chunk", "z_loss"), [(1, 0.3), (3, 0.3), (3, 0.0), (4, 0.3), (7, 0.3), (50, 0.0)])
def test_values_and_gradients(x64, chunk, z_loss):
    x, head, labels = problem()
    scale = 1.7  # of the cotangent: the gradients of a mean are those of the sum, scaled

    @jax.jit
    def both(x, head):
        got = jax.vjp(lambda x, head: _cross_entropy(x, head, labels, chunk, z_loss), x, head)
        want = jax.vjp(lambda x, head: plain(x @ head, labels, z_loss), x, head)
        return [(value, pull((jnp.asarray(scale), jnp.asarray(0.0)))) for value, pull in (got, want)]

    got, want = both(x, head)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), got, want)


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_no_labels_give_zero_and_finite_gradients(x64, z_loss):
    x, head, labels = problem(labels="none")
    objective = jax.value_and_grad(lambda x, head: _cross_entropy(x, head, labels, 3, z_loss)[0], (0, 1))
    assert all(np.all(np.asarray(leaf) == 0.0) for leaf in jax.tree.leaves(jax.jit(objective)(x, head)))


def test_large_logits(x64):
    x, head, labels = problem()
    got = _cross_entropy(1e4 * x, head, labels, 3, 0.0)
    np.testing.assert_allclose(got, plain(1e4 * x @ head, labels), rtol=1e-12)
    assert np.isfinite(got[0])


def test_bfloat16_inputs():
    """Logits and loss in float32, gradients in the dtype of what they belong to."""
    x, head, labels = problem()
    low = x.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    wide = tuple(a.astype(jnp.float32) for a in low)
    objective = partial(jax.value_and_grad, argnums=(0, 1))
    value, grads = jax.jit(objective(lambda x, head: _cross_entropy(x, head, labels, 3, 0.1)[0]))(*low)
    want, want_grads = jax.jit(objective(lambda x, head: plain(x @ head, labels, 0.1)[0]))(*wide)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for grad, exact in zip(grads, want_grads):
        assert grad.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(grad, np.float32), exact, atol=0.02 * np.abs(exact).max())


# ---------------------------------------------------------------- the loss of a model


def model(**changes):
    sizes = {"num_layers": 2, "sharing": "1_1", "no_grad_passes": 1, "grad_passes": 2, "dtype": "float64"}
    config = ModelConfig(**SIZES | sizes | changes)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0.0, 0.5, p.shape)), shapes)
    tokens = rng.integers(0, config.vocab_size, (3, 10))
    labels = tokens.copy()
    labels[0, :4] = labels[2, 7] = -100
    return config, params, jnp.asarray(tokens), jnp.asarray(labels)


@pytest.mark.parametrize(("tied", "z_loss"), [(False, 0.0), (True, 0.1)])
def test_loss_sum_is_the_plain_formula_on_shifted_logits(x64, tied, z_loss):
    """The model sees columns 0..T-1, the labels are those of 1..T; nothing but the first value carries a gradient."""
    config, params, tokens, labels = model(tie_embeddings=tied)

    def mine(params):
        total, aux = loss_sum(params, config, {"tokens": tokens, "labels": labels}, chunk=4, z_loss=z_loss)
        return 1.7 * total + 100.0 * aux["nll"] - 100.0 * jax.lax.stop_gradient(aux["nll"]), aux

    def theirs(params):
        total, nll = plain(forward(params, config, tokens[:, :-1]), labels[:, 1:], z_loss)
        return 1.7 * total, nll

    (total, aux), grads = jax.jit(jax.value_and_grad(mine, has_aux=True))(params)
    (want, nll), want_grads = jax.jit(jax.value_and_grad(theirs, has_aux=True))(params)
    np.testing.assert_allclose([total, aux["nll"]], [want, nll], rtol=1e-12)
    assert int(aux["count"]) == 3 * 9 - 4
    assert int(aux["passes"]) == 3
    assert ("head" in grads) != tied
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), grads, want_grads)


def test_loss_is_the_mean_over_labels_of_shifted_logits(x64):
    config, params, tokens, labels = model()
    mean = jax.jit(partial(loss, config=config, tokens_BT=tokens))
    logits = jax.jit(partial(forward, config=config, tokens_BT=tokens))(params)[:, :-1]  # each reads what is before it
    for some, count in ((labels, 23), (tokens, 27), (None, 27), (jnp.full_like(tokens, -100), 1)):
        want, _ = plain(logits, (tokens if some is None else some)[:, 1:])
        np.testing.assert_allclose(mean(params, labels_BT=some), want / count, rtol=1e-12)


def test_options_reach_the_model(x64):
    config, params, tokens, _ = model()
    options = {
        "segment_ids_BT": jnp.asarray([[1] * 4 + [2] * 6] * 3),
        "positions_BT": jnp.tile(jnp.asarray([-1, -1, *range(8)])[None], (3, 1)),
        "no_grad_passes": 0,
        "grad_passes": 1,
    }

    @jax.jit
    def both(params):
        logits = forward(params, config, tokens, **options)
        return loss(params, config, tokens, **options), plain(logits[:, :-1], tokens[:, 1:])[0] / 27

    np.testing.assert_allclose(*both(params), rtol=1e-12)


def test_sums_of_a_split_batch_add_up(x64):
    config, params, tokens, labels = model(sharing="0_0")
    step = jax.jit(lambda tokens, labels: loss_sum(params, config, {"tokens": tokens, "labels": labels}, z_loss=0.1))
    whole, aux = step(tokens, labels)
    parts = [step(tokens[i : i + 1], labels[i : i + 1]) for i in range(3)]
    np.testing.assert_allclose(sum(value for value, _ in parts), whole, rtol=1e-12)
    for name in ("count", "nll"):
        np.testing.assert_allclose(sum(aux[name] for _, aux in parts), aux[name], rtol=1e-12)


def largest_array(function, *arguments):
    """The number of elements of the largest array in the optimised program."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return max(np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"\w+\d+\[([\d,]+)\]", text))


def test_all_logits_never_exist():
    config = ModelConfig(**SIZES | {"vocab_size": 512, "num_layers": 1})
    params = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((2, 33), jnp.int32)
    logits = 2 * 32 * 512

    def all_at_once(params, tokens):
        return plain(forward(params, config, tokens[:, :-1]), tokens[:, 1:])[0]

    assert largest_array(jax.grad(lambda params, tokens: loss(params, config, tokens)), params, tokens) < logits
    assert largest_array(jax.grad(all_at_once), params, tokens) >= logits  # so the size would have shown


# ---------------------------------------------------------------- initial parameters

BASE_SHAPES = {
    "embed": (23, 8),
    "layers/attn_norm": (3, 8),
    "layers/wq": (3, 8, 2, 4),
    "layers/wo": (3, 2, 4, 8),
    "layers/mlp_norm": (3, 8),
    "layers/gate": (3, 8, 12),
    "layers/up": (3, 8, 12),
    "layers/down": (3, 12, 8),
    "kv/wk": (2, 8, 1, 4),
    "kv/wv": (2, 8, 1, 4),
    "final_norm": (8,),
}
HEAD_SHAPE = {"head": (8, 23)}
ATTENTION_BIASES = {"layers/bq": (3, 2, 4), "layers/bo": (3, 8), "kv/bk": (2, 1, 4), "kv/bv": (2, 1, 4)}
MLP_BIASES = {"layers/gate_bias": (3, 12), "layers/up_bias": (3, 12), "layers/down_bias": (3, 8)}


@pytest.mark.parametrize(
    ("changes", "shapes"),
    [
        ({}, BASE_SHAPES | HEAD_SHAPE),
        ({"tie_embeddings": True}, BASE_SHAPES),
        ({"attention_bias": True}, BASE_SHAPES | HEAD_SHAPE | ATTENTION_BIASES),
        ({"mlp_bias": True, "tie_embeddings": True}, BASE_SHAPES | MLP_BIASES),
    ],
    ids=["untied", "tied", "attention bias", "mlp bias"],
)
def test_parameter_tree(changes, shapes):
    config = ModelConfig(**SIZES | {"sharing": "0_2_2"} | changes)
    params = flatten_dict(jax.eval_shape(partial(init_params, config), jax.random.key(0)), sep="/")
    assert {name: p.shape for name, p in params.items()} == shapes
    assert {p.dtype for p in params.values()} == {jnp.dtype("float32")}


@pytest.fixture(scope="module")
def initialise():
    """Seed -> parameters by name, with init_std 0.05; from the generator that compiles fastest."""
    config = ModelConfig(**SIZES | {"init_std": 0.05, "vocab_size": 300, "attention_bias": True, "mlp_bias": True})
    compiled = jax.jit(partial(init_params, config))
    return lambda seed: flatten_dict(jax.device_get(compiled(jax.random.key(seed, impl="rbg"))), sep="/")


def test_initial_values(initialise):
    matrices = []
    for name, p in initialise(0).items():
        leaf = name.rpartition("/")[2]
        if leaf.endswith("norm"):
            assert np.all(p == 1.0), name
        elif leaf.endswith("bias") or leaf in ("bq", "bk", "bv", "bo"):
            assert np.all(p == 0.0), name
        else:
            matrices.append(p.ravel())
            assert 0.6 * 0.05 < np.std(p) < 1.4 * 0.05, name
            assert abs(np.mean(p)) < 0.02, name
    np.testing.assert_allclose(np.std(np.concatenate(matrices)), 0.05, rtol=0.05)
    assert len({float(m[0]) for m in matrices}) == len(matrices) == 9  # each from numbers of its own


def test_same_key_same_numbers(initialise):
    first, again, other = initialise(0), initialise(0), initialise(1)
    for name, p in first.items():
        np.testing.assert_array_equal(p, again[name])
        assert np.ptp(p) == 0.0 or np.all(p != other[name]), name


def test_the_module_declares_the_tree():
    config = ModelConfig(**SIZES | {"sharing": "0_2_2"})
    module = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(params=0)))
    declared = flatten_dict(nnx.to_pure_dict(nnx.state(module)), sep="/")
    assert {name: p.shape for name, p in declared.items()} == BASE_SHAPES | HEAD_SHAPE


def test_rows_of_one_token_have_no_loss():
    config = ModelConfig(
        vocab_size=5, hidden_size=4, intermediate_size=4, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=4
    )
    with pytest.raises(ValueError, match="at least 2 tokens"):
        loss({}, config, jnp.zeros((2, 1), jnp.int32))


def test_bfloat16_gradients_of_a_mean_have_the_right_scale():
    """1/count is no bfloat16 number: rounding it would shrink or stretch every gradient alike."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 109, 8)), jnp.bfloat16)
    head = jnp.asarray(rng.normal(size=(8, 16)), jnp.bfloat16)
    labels = jnp.asarray(rng.integers(0, 16, (1, 109)))
    of_sum = jax.grad(lambda x: _cross_entropy(x, head, labels, 64, 0.0)[0])(x).astype(jnp.float32)
    of_mean = jax.grad(lambda x: _cross_entropy(x, head, labels, 64, 0.0)[0] / 109)(x).astype(jnp.float32)
    ratio = float(jnp.sum(of_mean * of_sum) / jnp.sum(of_sum * of_sum)) * 109
    assert abs(ratio - 1) < 5e-4


def test_gradients_of_a_frequent_token_add_up_beyond_what_bfloat16_can_count():
    tokens_BT = jnp.zeros((1, 1000), jnp.int32)
    total = jax.grad(lambda embed_VD: _embedded(embed_VD, tokens_BT, "bfloat16").astype(jnp.float32).sum())
    grads = total(jnp.ones((3, 2)))
    np.testing.assert_array_equal(grads, [[1000.0, 1000.0], [0.0, 0.0], [0.0, 0.0]])
    assert grads.dtype == jnp.float32
