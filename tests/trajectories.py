"""Run by test_step.py: ten steps on 8 fake devices in several layouts against one device, with a cyclic map and packed
documents; and what the compiled steps hold where fsdp splits parameters: never a whole stack of them.

With the argument `all` in eight layouts, else in the three that split most.
"""

import os
import re
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, os.getcwd())

import jax
import numpy as np

from lckv_jax import ModelConfig
from lckv_jax.compiled import lower_step
from lckv_jax.config import DataConfig, MeshConfig, OptimizerConfig, RunConfig, TrainConfig
from lckv_jax.memory import train_state
from lckv_jax.parallel.mesh import batch_sharding, make_mesh
from lckv_jax.train.state import init_state

STEPS = 10
LAYOUTS = [{"fsdp": 8}, {"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]
if "all" in sys.argv[1:]:
    LAYOUTS += [{"data": 8}, {"data": 2, "fsdp": 4}, {"data": 4, "tensor": 2}, {"fsdp": 4, "tensor": 2},
                {"fsdp": 2, "tensor": 4}]  # fmt: skip


def run_config(sharing):
    model = ModelConfig(
        vocab_size=64, hidden_size=40, intermediate_size=48, num_layers=3, num_heads=8, num_kv_heads=2, head_dim=8,
        sharing=sharing, no_grad_passes=1, init_std=0.1,
    )  # fmt: skip
    return RunConfig(
        out="unused", model=model, data=DataConfig(seq_len=32, batch_size=8), train=TrainConfig(steps=100),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
    )  # fmt: skip


def batch_of(step):
    """Rows of counted-up numbers, which can be learned, in two or three documents."""
    rng = np.random.default_rng(step)
    tokens = (rng.integers(64, size=(8, 1)) + np.arange(33) * rng.integers(1, 4, size=(8, 1))) % 64
    segments = np.sort(rng.integers(1, 4, (8, 33)), axis=1)
    first = np.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    positions = np.arange(33) - np.maximum.accumulate(np.where(first, np.arange(33), 0), axis=1)
    batch = {"tokens": tokens, "labels": np.where(first, -100, tokens), "segment_ids": segments, "positions": positions}
    return {name: x.astype(np.int32) for name, x in batch.items()}


def trajectory(config, start, mesh, compiled):
    """Loss and gradient norm of each step from a state on the host."""
    told = []
    with jax.set_mesh(mesh):
        _, abstract = train_state(config, mesh)
        state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), start, abstract)
        for step in range(STEPS):
            state, metrics = compiled(state, jax.device_put(batch_of(step), batch_sharding(mesh)))
            told.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return np.array(told).T


def whole_stacks(config, text):
    """Shapes in a program of at least two layers' matrices that fsdp has not split."""
    sizes = config.model
    D, F, N, H = sizes.hidden_size, sizes.intermediate_size, sizes.num_heads, sizes.head_dim
    matrices = [(D, F), (F, D), (D, N, H), (N, H, D)]
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)}
    assert shapes & set(matrices), "one layer's are gathered, so shapes were read"
    return [shape for shape in shapes if shape[0] >= 2 and shape[1:] in matrices]


def check_sharded(config, mesh, compiled):
    """State in and out is split as the table says, and inside no stack of parameters or gradients is ever whole."""
    with jax.set_mesh(mesh):
        _, state = train_state(config, mesh)
    wanted = jax.tree.map(lambda x: x.sharding, state)
    (inputs, _), _ = compiled.input_shardings
    outputs, _ = compiled.output_shardings
    for got in (inputs, outputs):
        jax.tree.map(lambda x, a, b: np.testing.assert_(a.is_equivalent_to(b, x.ndim)), state, got, wanted)
    for part in ("params", "opt"):
        whole = [x for x in jax.tree.leaves(state[part]) if x.sharding.is_fully_replicated]
        assert max((x.size for x in whole), default=0) <= 1, "nothing but counters is whole"
    found = whole_stacks(config, compiled.as_text())
    assert not found, found


def compile_on(config, sizes, devices):
    mesh = make_mesh(MeshConfig(**sizes), devices)
    return mesh, lower_step(config, mesh).compile()


config = run_config("2_2_2")
one, compiled = compile_on(config, {"data": 1}, jax.devices()[:1])
with jax.set_mesh(one):
    start = jax.device_get(init_state(config, train_state(config, one)[0], one))
want, want_norm = trajectory(config, start, one, compiled)
assert want[-1] < want[0] - 0.05, want
for sizes in LAYOUTS:
    mesh, compiled = compile_on(config, {"data": 1} | sizes, jax.devices())
    got, norm = trajectory(config, start, mesh, compiled)
    largest, relative = np.abs(got - want).max(), np.abs(norm / want_norm - 1).max()
    assert largest <= 5e-5 and relative <= 1e-4, (sizes, largest, relative)
    print(f"{sizes} equal: losses of {STEPS} steps to {largest:.1e}, gradient norms to {relative:.1e}")
    if sizes == {"fsdp": 8}:
        check_sharded(config, mesh, compiled)
        print("split: cyclic")
standard = run_config("standard")
check_sharded(standard, *compile_on(standard, {"data": 1, "fsdp": 8}, jax.devices()))
print("split: standard")
