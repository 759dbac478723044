"""One jitted update, and one jitted validation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lckv_jax.config import ModelConfig, RunConfig
from lckv_jax.errors import UserError
from lckv_jax.model.axes import activation_spec
from lckv_jax.model.loss import loss_sum
from lckv_jax.parallel.mesh import batch_sharding, parameter_shardings
from lckv_jax.train.optimizer import learning_rate
from lckv_jax.train.spikes import observe
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
    config: RunConfig, optimizer: optax.GradientTransformationExtraArgs, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
    """The state after one step, and what happened.

    An update whose loss or gradient norm is not finite, or a spike (see spikes.py), is left out: parameters, optimiser
    and average stay as they are, bit for bit, and only `step` and the counts go on.
    Metrics, scalars: loss (nats a token, without z-loss), grad_norm (before clipping), param_norm (after the update),
    learning_rate, tokens (that count), passes, residual (see transformer.Hidden; the most of all micro-batches),
    skipped (updates left out so far), skipped_in_a_row, skip_cause (of this step: an index into spikes.CAUSES).
    With metrics.layer_gradient_norms also those of `layer_gradient_norms`.
    """
    params, step = state["params"], state["step"]
    grads, aux = mean_gradients(config, params, batch, no_grad_passes_at(config, step))
    loss, grad_norm = aux["nll"] / jnp.maximum(aux["count"], 1), optax.tree.norm(grads)
    cause, spikes = observe(config.train, state["spikes"], step, loss, grad_norm)
    made = step - state["spikes"]["skipped"]
    old = {name: state[name] for name in ("params", "opt", "ema") if name in state}
    update = partial(_updated, config, optimizer)

    def branched(old: TrainState, *given: Any) -> TrainState:
        return jax.lax.cond(cause == 0, update, lambda old, *_: old, old, *given)

    def selected(old: TrainState, *given: Any) -> TrainState:
        return jax.tree.map(partial(jax.lax.select, cause == 0), update(old, *given), old)

    # GPUs would copy the whole state into a branch and out of it; CPUs would hold moments from before and after at once
    new = jax.lax.platform_dependent(old, grads, step, made, cpu=branched, default=selected)
    new |= {"spikes": spikes, "step": step + 1}
    return new, {
        "loss": loss,
        "grad_norm": grad_norm,
        "param_norm": optax.tree.norm(new["params"]),
        "learning_rate": learning_rate(config.optimizer, config.train.steps)(step),
        "tokens": aux["count"],
        "passes": aux["passes"],
        "residual": aux["residual"],
        "skipped": spikes["skipped"],
        "skipped_in_a_row": spikes["in_a_row"],
        "skip_cause": cause,
        **(layer_gradient_norms(config.model, grads) if config.metrics.layer_gradient_norms else {}),
    }


def _updated(
    config: RunConfig,
    optimizer: optax.GradientTransformationExtraArgs,
    old: TrainState,
    grads: Any,
    step: jax.Array,
    made: jax.Array,
) -> TrainState:
    """params, opt and ema after one more update."""
    updates, opt = optimizer.update(grads, old["opt"], old["params"], step=step)
    new = {"params": optax.apply_updates(old["params"], updates), "opt": opt}
    if "ema" in old:
        new["ema"] = _averaged(old["ema"], new["params"], config.train.ema_decay, made)
    return new


def mean_gradients(
    config: RunConfig, params: Any, batch: Batch, no_grad_passes: int | jax.Array
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradients of the mean loss (with z-loss) over all labels of the batch, and aux of `loss_sum` for all of it.

    `train.accumulation` micro-batches in turn add up gradients of summed losses and token counts, divided once: the
    same as one big batch, however the labels are spread. Gradients exist twice, those so far and those of a
    micro-batch, in float32 and split as the parameters. passes, residual: the largest of any micro-batch; with
    model.tolerance each stops by itself.
    """
    one = partial(_summed_gradients, config, params, no_grad_passes=no_grad_passes)
    batch = _what_the_model_reads(config, batch)
    if config.train.accumulation == 1:
        grads, aux = one(batch)
    else:
        grads, aux = _accumulated(config, one, _micro_batches(batch, config.train.accumulation))
    return jax.tree.map(lambda x: x / jnp.maximum(aux["count"], 1), grads), aux


def _summed_gradients(
    config: RunConfig, params: Any, batch: Batch, no_grad_passes: int | jax.Array
) -> tuple[Any, dict[str, jax.Array]]:
    objective = partial(
        loss_sum,
        config=config.model,
        batch=batch,
        no_grad_passes=no_grad_passes,
        chunk=config.train.loss_chunk,
        z_loss=config.train.z_loss,
    )
    (_, aux), grads = jax.value_and_grad(objective, has_aux=True)(params)
    return grads, aux


def _accumulated(config: RunConfig, one: Callable, micro_batches: Batch) -> tuple[Any, dict[str, jax.Array]]:
    def add(carry: tuple, batch: Batch) -> tuple[tuple, None]:
        (grads, aux), (more, new) = carry, one(batch)
        grads = _as_parameters(config.model, jax.tree.map(jnp.add, grads, more))
        sums = {name: aux[name] + new[name] for name in ("count", "nll")}
        return (grads, sums | {name: jnp.maximum(aux[name], new[name]) for name in ("passes", "residual")}), None

    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], micro_batches))
    grads, aux = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, (_as_parameters(config.model, grads), aux), micro_batches)[0]


def _micro_batches(batch: Batch, number: int) -> Batch:
    """[B, T+1] -> [A, B/A, T+1]: row r goes to micro-batch r mod A, so that every device keeps its own rows."""

    def split(x_BT: jax.Array) -> jax.Array:
        x = x_BT.reshape(-1, number, x_BT.shape[1]).swapaxes(0, 1)
        if jax.sharding.get_abstract_mesh().empty:
            return x
        return jax.lax.with_sharding_constraint(x, PartitionSpec(None, *activation_spec("BT")))

    return jax.tree.map(split, batch)


def _as_parameters(config: ModelConfig, grads: Any) -> Any:
    """`grads`, laid out as the parameters on the mesh in scope."""
    mesh: Any = jax.sharding.get_abstract_mesh()
    return grads if mesh.empty else jax.lax.with_sharding_constraint(grads, parameter_shardings(config, mesh))


def _what_the_model_reads(config: RunConfig, batch: Batch) -> Batch:
    """Without segments and positions where documents are joined, so that a kernel may use its plain causal mask."""
    return batch if config.data.packing == "masked" else {name: batch[name] for name in ("tokens", "labels")}


def _averaged(ema: Any, params: Any, decay: float, made: jax.Array) -> Any:
    """The moving average after one more update; its memory grows with the updates made, so that it starts warm."""
    decay_now = jnp.minimum(decay, (1.0 + made) / (10.0 + made))
    return jax.tree.map(lambda old, new: old + (1.0 - decay_now) * (new - old), ema, params)


def layer_gradient_norms(config: ModelConfig, grads: Any) -> dict[str, jax.Array]:
    """layer_grad_norms [L], that of a slot's K/V projection within its owner's, and embed_grad_norm, head_grad_norm
    (unless tied) and final_norm_grad_norm. The root of their sum of squares is grad_norm."""

    def squares(group: dict[str, jax.Array]) -> jax.Array:
        return sum(jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim))) for x in group.values())  # pyright: ignore

    owners = jnp.asarray(config.sharing.owners)
    layers = squares(grads["layers"]).at[owners].add(squares(grads["kv"]))
    single = {f"{name}_grad_norm": optax.tree.norm(x) for name, x in grads.items() if name not in ("layers", "kv")}
    return {"layer_grad_norms": jnp.sqrt(layers), **single}


def check_micro_batch(config: RunConfig, mesh: Mesh) -> None:
    """Raises UserError if the devices that split the batch do not divide the rows of a micro-batch."""
    rows, devices = config.data.batch_size // config.train.accumulation, mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % devices:
        raise UserError(
            f"data.batch_size={config.data.batch_size} over train.accumulation={config.train.accumulation} makes "
            f"micro-batches of {rows} rows, which is not divisible by the {devices} devices that split the batch; "
            "change one of them"
        )


def make_train_step(
    config: RunConfig, optimizer: optax.GradientTransformationExtraArgs, mesh: Mesh
) -> jax.stages.Wrapped:
    """`train_step`, (state, batch) -> (state, metrics), compiled for the mesh; the state is donated.

    Call it with `jax.set_mesh(mesh)` in force. Raises UserError if a micro-batch does not fit the mesh.
    """
    check_micro_batch(config, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, optimizer, mesh))
    return jax.jit(
        lambda state, batch: train_step(config, optimizer, state, batch),
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
    )


def make_eval_step(config: RunConfig) -> jax.stages.Wrapped:
    """Compiled (params, batch) -> (summed negative log-likelihood in nats, tokens), with the model config's m and b."""

    @jax.jit
    def evaluate(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        _, aux = loss_sum(params, config.model, _what_the_model_reads(config, batch), chunk=config.train.loss_chunk)
        return aux["nll"], aux["count"]

    return evaluate
