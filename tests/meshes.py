"""Run by test_step.py: loss and gradients of step 0 on 8 fake devices in several layouts, against one device."""

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, os.getcwd())

import jax
import numpy as np
import optax

from lckv_jax import ModelConfig
from lckv_jax.config import MeshConfig
from lckv_jax.model.loss import loss_sum
from lckv_jax.parallel.mesh import batch_sharding, make_mesh, parameter_shardings, replicated_dims
from lckv_jax.train.state import init_state

config = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=8, num_kv_heads=2, head_dim=8,
    sharing="1_1_2", no_grad_passes=1, init_std=0.2, attention_bias=True, remat="none",
)  # fmt: skip
rng = np.random.default_rng(0)
tokens = rng.integers(0, 64, (8, 33)).astype(np.int32)
segments = np.sort(rng.integers(1, 4, (8, 33)), axis=1).astype(np.int32)


def loss_and_gradients(mesh_config, devices):
    mesh = make_mesh(mesh_config, devices)
    with jax.set_mesh(mesh):
        params = init_state(config, optax.sgd(1.0), mesh, 0)["params"]
        batch = jax.device_put({"tokens": tokens, "labels": tokens, "segment_ids": segments}, batch_sharding(mesh))

        def objective(params):
            total, aux = loss_sum(params, config, batch, chunk=8)
            return total / aux["count"]

        value, grads = jax.jit(jax.value_and_grad(objective))(params)
        for sharding, param in zip(jax.tree.leaves(parameter_shardings(config, mesh)), jax.tree.leaves(params)):
            assert param.sharding.is_equivalent_to(sharding, param.ndim)
        return float(value), jax.device_get(grads), mesh


want, want_grads, _ = loss_and_gradients(MeshConfig(), jax.devices()[:1])
for sizes in ({"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 4}):
    value, grads, mesh = loss_and_gradients(MeshConfig(**sizes), jax.devices())
    assert abs(value - want) <= 1e-5, (sizes, value, want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), grads, want_grads)
    assert replicated_dims(config, mesh) == ("K" if sizes.get("tensor") == 4 else "")
    largest = max(float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads)))
    print(f"{sizes} equal: loss to {abs(value - want):.1e}, gradients to {largest:.1e}")
