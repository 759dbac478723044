"""Run by test_continuations.py: 8 fake devices in several layouts against one device."""

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, os.getcwd())

import jax
import numpy as np

from lckv_jax import ModelConfig
from lckv_jax.config import MeshConfig
from lckv_jax.evaluate.continuations import Continuations
from lckv_jax.model.transformer import init_params
from lckv_jax.parallel.mesh import make_mesh, parameter_shardings

config = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=4, num_heads=8, num_kv_heads=2, head_dim=8,
    sharing="0_2_2_3", no_grad_passes=2, init_std=0.2,
)  # fmt: skip
params = jax.device_get(init_params(config, jax.random.key(0)))
rng = np.random.default_rng(0)
requests = [(rng.integers(0, 64, n).tolist(), rng.integers(0, 64, 1 + n % 5).tolist()) for n in range(1, 28)]


def answers(params, mesh):
    scorer = Continuations(params, config, max_length=32, batch_tokens=320, mesh=mesh)
    found = dict(answer for batch in scorer.score(requests, "trained") for answer in batch)
    assert scorer.compilations == 1
    return [found[n] for n in range(len(requests))]


want = answers(params, None)
for sizes in ({"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}):
    mesh = make_mesh(MeshConfig(**sizes), jax.devices())
    found = answers(jax.device_put(params, parameter_shardings(config, mesh)), mesh)
    largest = max(abs(a - b) for (a, _), (b, _) in zip(found, want))
    assert largest <= 1e-5 and [g for _, g in found] == [g for _, g in want], (sizes, largest)
    print(f"{sizes} equal to {largest:.1e}")
