"""Parity with the numbers of the golden fixtures: logits, loss, every gradient, K,V, and an AdamW trajectory."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from lckv_jax.convert.hub import load_hub, to_hub
from lckv_jax.model.loss import loss
from lckv_jax.model.transformer import forward, hidden_states

CASES = [
    "p01_llama_mha", "p02_cla2_gqa", "p03_lckv_w2", "p04_lckv_w0_mqa", "p05_sandwich_middle", "p06_pizza_top_b1",
    "p07_lasagna_top_tied", "p08_yoco_window", "p09_mixattention", "p10_pizza_bottom_tied",
]  # fmt: skip


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    jax.config.update("jax_enable_x64", request.param == "float64")
    yield request.param
    jax.config.update("jax_enable_x64", False)


def load_case(golden, case, dtype):
    params, config = load_hub(golden / case)
    config = config.model_copy(
        update={"dtype": dtype, "remat": "full" if dtype == "float64" else "none"}
    )  # so both ways are held to them
    params = jax.tree.map(lambda p: jnp.asarray(p, dtype), params)
    meta = json.loads((golden / case / "meta.json").read_text())
    exact = {"logits": 1e-6, "loss": 1e-6, "grads": 1e-6, "kv": 1e-6, "adamw": 1e-6}
    tolerance = exact if dtype == "float64" else meta["tolerance_float32"] | {"adamw": 1e-4}
    return params, config, load_file(golden / case / "golden.safetensors"), meta, tolerance


@pytest.mark.parametrize("case", CASES)
def test_logits_and_kv(golden, case, dtype):
    params, config, want, _, tolerance = load_case(golden, case, dtype)
    tokens = jnp.asarray(want["input_ids"])

    @jax.jit
    def run(params):
        return forward(params, config, tokens), hidden_states(params, config, tokens).slots

    logits, slots = run(params)
    np.testing.assert_allclose(logits, want["logits"], rtol=0, atol=tolerance["logits"])
    for owner, kv in slots.items():
        for name, got in zip(("key", "value"), kv):
            np.testing.assert_allclose(
                got.swapaxes(1, 2), want[f"kv.{owner}.{name}"], rtol=0, atol=tolerance["kv"], err_msg=f"{owner} {name}"
            )
    assert len(slots) == sum(name.startswith("kv.") for name in want) // 2


@pytest.mark.parametrize("case", CASES)
def test_loss_gradients_and_adamw_trajectory(golden, case, dtype):
    params, config, want, meta, tolerance = load_case(golden, case, dtype)
    value_and_grad = jax.jit(jax.value_and_grad(partial(_loss, config=config, want=want)))
    value, grads = value_and_grad(params)
    assert abs(float(value) - meta["loss"]) <= tolerance["loss"]
    named = to_hub(grads, config)
    expected = {name.removeprefix("grad."): grad for name, grad in want.items() if name.startswith("grad.")}
    assert named.keys() == expected.keys()
    for name, grad in expected.items():
        np.testing.assert_allclose(named[name], grad, rtol=0, atol=tolerance["grads"], err_msg=name)

    hyper = meta["adamw"]
    optimizer = optax.adam(hyper["learning_rate"], b1=hyper["b1"], b2=hyper["b2"], eps=hyper["eps"])
    state, losses = optimizer.init(params), []
    for _ in range(hyper["steps"]):
        value, grads = value_and_grad(params)
        losses.append(float(value))
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(losses, meta["adamw_losses"], rtol=0, atol=tolerance["adamw"])


def _loss(params, config, want):
    return loss(params, config, jnp.asarray(want["input_ids"]), jnp.asarray(want["labels"]))


CYCLIC = [CASES[i] for i in (2, 3, 4, 5, 6)]


@pytest.mark.parametrize("case", CYCLIC)
def test_enough_passes_give_the_exact_logits(golden, case, dtype):
    params, config, want, _, tolerance = load_case(golden, case, dtype)
    tokens = jnp.asarray(want["input_ids"])
    logits = jax.jit(partial(forward, config=config, tokens_BT=tokens, no_grad_passes=tokens.shape[1]))(params)
    np.testing.assert_allclose(logits, want["logits_exact"], rtol=0, atol=tolerance["logits"])
