"""The train state, a plain dict tree: abstract first, then initialised where it lies.

{params, opt, step, spikes} and, with train.ema_decay, ema: an average of the parameters for evaluation.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey

from lckv_jax.config import RunConfig
from lckv_jax.model.transformer import init_params
from lckv_jax.parallel import processes
from lckv_jax.parallel.mesh import parameter_shardings
from lckv_jax.train.spikes import no_spikes

TrainState = dict[str, Any]


def abstract_state(config: RunConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without making it.

    What has the shape of a parameter (moments, averages) lies as that parameter does; the rest, which is small, is
    whole on every device: counts, and the rows and columns of Adafactor's second moments.
    """
    shapes = jax.eval_shape(lambda: _initial(config, optimizer, _seeded(config)))
    shardings = parameter_shardings(config.model, mesh)
    params = {_names(path): x for path, x in jax.tree_util.tree_leaves_with_path(shapes["params"])}
    lies = {_names(path): sharding for path, sharding in jax.tree_util.tree_leaves_with_path(shardings)}

    def place(path: Any, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = _names(path)
        owner = next((names[-n:] for n in (2, 1) if names[-n:] in params), None)
        if owner is None or params[owner].shape != x.shape:
            sharding = NamedSharding(mesh, PartitionSpec())
        else:
            sharding = lies[owner]
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, shapes)


def _names(path: Any) -> tuple[str, ...]:
    """The names on a path; optax' tuples and fields around and below a parameter's place are left out."""
    return tuple(entry.key for entry in path if isinstance(entry, DictKey))


def init_state(
    config: RunConfig, optimizer: optax.GradientTransformation, mesh: Mesh, params: Any = None
) -> TrainState:
    """A fresh state, each shard made on its own device; the same numbers on every mesh.

    params: to begin with, laid out as `parameter_shardings` says; they are donated. None = those of `config.seed`.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, optimizer, mesh))
    if params is None:
        make = jax.jit(lambda: _initial(config, optimizer, _seeded(config)), out_shardings=shardings)
        processes.compile_together(make)
        return make()
    return jax.jit(partial(_initial, config, optimizer), out_shardings=shardings, donate_argnums=0)(params)


def _seeded(config: RunConfig) -> Any:
    return init_params(config.model, jax.random.key(config.seed))


def _initial(config: RunConfig, optimizer: optax.GradientTransformation, params: Any) -> TrainState:
    state = {
        "params": params,
        "opt": optimizer.init(params),
        "step": jnp.zeros((), jnp.int32),
        "spikes": no_spikes(config.train),
    }
    return state | ({"ema": params} if config.train.ema_decay else {})


def evaluated_params(state: TrainState) -> Any:
    """The parameters that evaluation uses: their average where the run keeps one."""
    return state.get("ema", state["params"])
