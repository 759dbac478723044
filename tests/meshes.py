"""Run by test_step.py: 8 fake devices in several layouts against one device.

Loss and gradients of step 0, accumulation of 4, and where the state of each optimiser lies.
"""

import os
import re
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, os.getcwd())

import jax
import numpy as np
import optax

from lckv_jax import ModelConfig
from lckv_jax.config import DataConfig, MeshConfig, OptimizerConfig, RunConfig, TrainConfig
from lckv_jax.model.loss import loss_sum
from lckv_jax.parallel.mesh import batch_sharding, make_mesh, parameter_shardings, replicated_dims
from lckv_jax.train.optimizer import make_optimizer
from lckv_jax.train.state import abstract_state, init_state
from lckv_jax.train.step import make_train_step

config = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=8, num_kv_heads=2, head_dim=8,
    sharing="1_1_2", no_grad_passes=1, init_std=0.2, attention_bias=True, remat="none",
)  # fmt: skip
run = RunConfig(out="unused", model=config, data=DataConfig(seq_len=32, batch_size=16), train=TrainConfig(steps=100))
rng = np.random.default_rng(0)
tokens = rng.integers(0, 64, (16, 33)).astype(np.int32)
labels = np.where(rng.random((16, 33)) < np.linspace(0, 0.9, 16)[:, None], -100, tokens).astype(np.int32)
segments = np.sort(rng.integers(1, 4, (16, 33)), axis=1).astype(np.int32)
rows = {"tokens": tokens, "labels": labels, "segment_ids": segments}


def loss_and_gradients(mesh_config, devices):
    mesh = make_mesh(mesh_config, devices)
    with jax.set_mesh(mesh):
        params = init_state(run, optax.sgd(1.0), mesh)["params"]
        batch = jax.device_put(rows, batch_sharding(mesh))

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

# Rows that the mesh cannot split evenly are refused where gradients are asked for.
mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
with jax.set_mesh(mesh):
    params = init_state(run, optax.sgd(1.0), mesh)["params"]
    six = {name: x[:6] for name, x in rows.items()}
    try:
        jax.jit(jax.grad(lambda params: loss_sum(params, config, six)[0]))(params)
    except ValueError as error:
        assert "6 rows cannot be split over the 4 devices" in str(error), error
    else:
        raise AssertionError("6 rows were split over 4 devices")


# Accumulation, with descent of rate 1, so that the update is the gradient: the same, and no row changes its device.
small = run.model_copy(update={"train": TrainConfig(steps=100, accumulation=4, ema_decay=0.9, skip_spikes=6.0)})
mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
with jax.set_mesh(mesh):
    descent, batch = optax.with_extra_args_support(optax.sgd(1.0)), jax.device_put(rows, batch_sharding(mesh))
    state, step = init_state(small, descent, mesh), make_train_step(small, descent, mesh)
    text = step.lower(state, batch).compile().as_text()
    moved = re.findall(r"s32\[\d[^ ]* (?:all-to-all|all-gather|collective-permute)\(", text)
    assert not moved, moved
    old = jax.device_get(state["params"])
    state, metrics = step(state, batch)
    got_grads = jax.tree.map(np.subtract, old, jax.device_get(state["params"]))
    largest = max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (got_grads, want_grads))))
    assert largest <= 1e-6 and abs(float(metrics["loss"]) - want) <= 1e-6 * want, (largest, metrics["loss"], want)
    step(state, batch)
    assert step._cache_size() == 1
    print(f"accumulation of 4 equal: gradients to {largest:.1e}")

    # What has the shape of a parameter lies as it does, whatever the optimiser; only small things are whole.
    lies = parameter_shardings(config, mesh)
    for name, moments in {"adamw": 2, "lion": 1, "adafactor": 0, "muon": 1}.items():
        optimizer = make_optimizer(OptimizerConfig(name=name), 100)
        state = abstract_state(small, optimizer, mesh)
        jax.tree.map(lambda x, s: np.testing.assert_(x.sharding.is_equivalent_to(s, x.ndim)), state["ema"], lies)
        whole = [x for x in jax.tree.leaves(state["opt"]) if x.sharding.is_fully_replicated]
        assert max(x.size for x in whole) < 200, name  # counts, vectors, rows and columns
        placed = [x for x in jax.tree.leaves(state["opt"]) if not x.sharding.is_fully_replicated]
        assert len(placed) >= moments * len(jax.tree.leaves(lies)) - 2, name  # two biases of K are whole
