"""Remat policies by name, scanned and unrolled runs: the same numbers, and really another backward pass."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lckv_jax import ModelConfig
from lckv_jax.model.loss import loss
from lckv_jax.model.transformer import forward, init_params

POLICIES = ("none", "dots", "attention", "full")
SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=8, num_heads=4, num_kv_heads=2, head_dim=8,
    no_grad_passes=0, grad_passes=1, init_std=0.2, attention_bias=True,
)  # fmt: skip
B, T = 2, 64
UNOPTIMIZED = (
    {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
)  # compiles in half the time


def make(**changes):
    config = ModelConfig(**SIZES | changes)
    return config, jax.eval_shape(partial(init_params, config), jax.random.key(0))


def test_same_loss_and_gradients_for_every_policy_scanned_or_unrolled():
    sizes = {"sharing": "0_1_4_4_4", "num_layers": 5}
    params = init_params(make(**sizes)[0], jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (B, T), 0, 64)
    results = {}
    for scan in (True, False):
        for remat in POLICIES if scan else ("attention",):
            config, _ = make(**sizes, remat=remat, scan_layers=scan)
            step = jax.jit(
                jax.value_and_grad(partial(loss, config=config, tokens_BT=tokens)), compiler_options=UNOPTIMIZED
            )
            results[scan, remat] = jax.device_get(step(params))
    want, want_grads = results[True, "none"]
    for name, (value, grads) in results.items():
        assert abs(value - want) <= 1e-6 * want, name
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads)):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max(), err_msg=str(name))


def saved_floats(config, params):
    """Numbers kept from the forward for the backward pass, by what jax.vjp closes over."""
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    pull = jax.eval_shape(lambda p, t: jax.vjp(lambda p: forward(p, config, t), p)[1], params, tokens)
    return sum(x.size for x in jax.tree.leaves(pull) if x.dtype == jnp.float32)


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_each_policy_saves_what_it_says(scan):
    saved = {remat: saved_floats(*make(remat=remat, scan_layers=scan)) for remat in POLICIES}
    tokens, heads = B * T * SIZES["num_layers"], SIZES["num_heads"] * SIZES["head_dim"]
    assert saved["attention"] - saved["full"] == tokens * heads
    # q, k, v, what wo returns, gate and up; nobody needs what down returns; attention's own products are not saved
    widths = (
        heads + 2 * SIZES["num_kv_heads"] * SIZES["head_dim"] + SIZES["hidden_size"] + 2 * SIZES["intermediate_size"]
    )
    assert saved["dots"] - saved["full"] == pytest.approx(tokens * widths, rel=0.02)
    assert saved["none"] - saved["dots"] > tokens * SIZES["num_heads"] * T  # at least the attention weights


def test_compiled_memory_falls_with_each_policy():
    sizes = {}
    for remat in POLICIES:
        config, params = make(remat=remat, num_layers=12)
        step = jax.jit(jax.grad(lambda p, t, config=config: loss(p, config, t)), compiler_options=UNOPTIMIZED)
        compiled = step.lower(params, jax.ShapeDtypeStruct((B, T + 1), jnp.int32)).compile()
        sizes[remat] = compiled.memory_analysis().temp_size_in_bytes
    assert sizes["none"] > 1.5 * sizes["dots"] and sizes["dots"] > 1.2 * sizes["attention"]
    assert sizes["attention"] > sizes["full"]


def scans(jaxpr):
    """Lengths of all scans in a jaxpr, at any depth."""
    found = []
    for eqn in jaxpr.eqns:
        found += [eqn.params["length"]] if eqn.primitive.name == "scan" else []
        for sub in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(sub, "jaxpr", sub)
            found += scans(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.parametrize("remat", ["none", "full"])
def test_unrolled_runs_have_no_scan(remat):
    lengths = {}
    for scan in (True, False):
        config, params = make(sharing="lckv(warmup=2)", remat=remat, scan_layers=scan)
        tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
        gradient = jax.make_jaxpr(jax.grad(lambda p, t, config=config: jnp.sum(forward(p, config, t))))
        lengths[scan] = scans(gradient(params, tokens).jaxpr)
    assert lengths[True] and not lengths[False]
