"""The train state: a plain dict tree {params, opt, step}, abstract first, then initialised where it lies."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lckv_jax.config import ModelConfig
from lckv_jax.model.transformer import init_params
from lckv_jax.parallel.mesh import parameter_shardings

TrainState = dict[str, Any]


def abstract_state(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without making it. Optimiser moments lie as their parameters."""
    shapes = jax.eval_shape(lambda: _initial(config, optimizer, 0))
    whole = NamedSharding(mesh, PartitionSpec())
    params = parameter_shardings(config, mesh)
    opt = optax.tree.map_params(
        optimizer, lambda _, sharding: sharding, shapes["opt"], params, transform_non_params=lambda _: whole
    )
    shardings = {"params": params, "opt": opt, "step": whole}
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def init_state(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> TrainState:
    """A fresh state, each shard made on its own device; the same numbers on every mesh."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, optimizer, mesh))
    return jax.jit(lambda: _initial(config, optimizer, seed), out_shardings=shardings)()


def _initial(config: ModelConfig, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    params = init_params(config, jax.random.key(seed))
    return {"params": params, "opt": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}
