"""One jitted update, and one jitted validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lckv_jax.config import RunConfig
from lckv_jax.model.loss import loss_sum
from lckv_jax.parallel.mesh import batch_sharding
from lckv_jax.train.optimizer import learning_rate
from lckv_jax.train.state import TrainState, abstract_state

Batch = dict[str, jax.Array]
Metrics = dict[str, Any]


def no_grad_passes_at(config: RunConfig, step: jax.Array) -> int | jax.Array:
    """m at a step: the model's, or by the schedule a traced number, so that it changes without a new compilation."""
    schedule = config.train.no_grad_passes_schedule
    if not schedule:
        return config.model.no_grad_passes
    starts, passes = (jnp.asarray(column, jnp.int32) for column in zip(*schedule))
    return passes[jnp.searchsorted(starts, step, side="right") - 1]


def train_step(
    config: RunConfig, optimizer: optax.GradientTransformation, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
    """The state after one update, and what happened: all scalars.

    Metrics: loss (nats a token, without z-loss), grad_norm (before clipping), param_norm (after the update),
    learning_rate, tokens (that count), passes, residual (see transformer.Hidden).
    """

    def objective(params: Any) -> tuple[jax.Array, dict[str, Any]]:
        total, aux = loss_sum(
            params,
            config.model,
            batch,
            no_grad_passes=no_grad_passes_at(config, state["step"]),
            chunk=config.train.loss_chunk,
            z_loss=config.train.z_loss,
        )
        return total / jnp.maximum(aux["count"], 1), aux

    (_, aux), grads = jax.value_and_grad(objective, has_aux=True)(state["params"])
    updates, opt = optimizer.update(grads, state["opt"], state["params"])
    new = {"params": optax.apply_updates(state["params"], updates), "opt": opt, "step": state["step"] + 1}
    return new, {
        "loss": aux["nll"] / jnp.maximum(aux["count"], 1),
        "grad_norm": optax.tree.norm(grads),
        "param_norm": optax.tree.norm(new["params"]),
        "learning_rate": learning_rate(config.optimizer, config.train.steps)(state["step"]),
        "tokens": aux["count"],
        "passes": aux["passes"],
        "residual": aux["residual"],
    }


def make_train_step(config: RunConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> jax.stages.Wrapped:
    """`train_step`, (state, batch) -> (state, metrics), compiled for the mesh; the state is donated.

    Call it with `jax.set_mesh(mesh)` in force.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config.model, optimizer, mesh))
    return jax.jit(
        lambda state, batch: train_step(config, optimizer, state, batch),
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
    )


def make_eval_step(config: RunConfig) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """Compiled (params, batch) -> (summed negative log-likelihood in nats, tokens), with the model config's m and b."""

    @jax.jit
    def evaluate(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        _, aux = loss_sum(params, config.model, batch, chunk=config.train.loss_chunk)
        return aux["nll"], aux["count"]

    return evaluate
