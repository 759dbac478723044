"""Run by test_init.py: a state that starts from a checkpoint, on 8 fake devices in several layouts and on one."""

import os
import sys
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, os.getcwd())

import jax
import numpy as np

from lckv_jax import ModelConfig, checkpoint
from lckv_jax.config import MeshConfig, RunConfig, TrainConfig
from lckv_jax.parallel.mesh import make_mesh, parameter_shardings
from lckv_jax.train import warm_start
from lckv_jax.train.optimizer import make_optimizer
from lckv_jax.train.state import init_state

model = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=8,
    sharing="standard", attention_bias=True, tie_embeddings=True,
)  # fmt: skip
folder = tempfile.TemporaryDirectory()
old = RunConfig(out=folder.name, model=model, train=TrainConfig(steps=100))
changed = {"sharing": "3_3_3_0", "num_kv_heads": 2, "tie_embeddings": False}
new = RunConfig(
    out="unused",
    model=ModelConfig(**(model.model_dump() | changed)),
    train=TrainConfig(steps=100, ema_decay=0.9),
    init_from=folder.name,
)
one = make_mesh(MeshConfig(), jax.devices()[:1])
with checkpoint.open_checkpoints(Path(folder.name) / "checkpoints", 1) as manager:
    checkpoint.save(manager, init_state(old, make_optimizer(old.optimizer, 100), one), old)

load_step = checkpoint.load_step


def assert_lies(tree, config, mesh):
    for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(parameter_shardings(config, mesh)), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def started(mesh):
    def checked(*arguments, **settings):
        """What is read lies as its own configuration says from the beginning."""
        loaded = load_step(*arguments, **settings)
        assert_lies(loaded.params, old.model, mesh)
        return loaded

    checkpoint.load_step = checked
    with jax.set_mesh(mesh):
        state = warm_start.first_state(new, make_optimizer(new.optimizer, 100), mesh, lambda line: None)
    for name in ("params", "ema"):
        assert_lies(state[name], new.model, mesh)
    return jax.device_get(state)


want = started(one)
for sizes in ({"data": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 2, "tensor": 4}):
    mesh = make_mesh(MeshConfig(**sizes), jax.devices())
    got = started(mesh)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    print(f"{sizes} equal")
