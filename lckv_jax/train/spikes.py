"""Which updates are left out: those of a loss or gradient norm that is not finite, or far above the last ones."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from lckv_jax.config import RunConfig, TrainConfig
from lckv_jax.errors import UserError

CAUSES = ("", "loss", "grad_norm")  # of leaving an update out, by the number in the metrics; 0: it was made
IN_A_ROW = 3  # updates left out before the run stops

Spikes = dict[str, jax.Array]


def no_spikes(config: TrainConfig) -> Spikes:
    """What a run remembers, at its start: int32 counts `skipped` and `in_a_row` of updates left out.

    With `skip_spikes` also `window`, float32 [2, spike_window]: the losses and gradient norms of the last updates made.
    """
    counts = {name: jnp.zeros((), jnp.int32) for name in ("skipped", "in_a_row")}
    return counts | ({"window": jnp.zeros((2, config.spike_window), jnp.float32)} if config.skip_spikes else {})


def observe(
    config: TrainConfig, spikes: Spikes, step: jax.Array, loss: jax.Array, grad_norm: jax.Array
) -> tuple[jax.Array, Spikes]:
    """Why the update of `step` is left out, an index into CAUSES (0: it is made), and what is remembered after it.

    The window takes no value of an update left out, so neither a NaN nor a spike moves the mean that later ones are
    held against. It is not consulted before half of it is filled.
    """
    values = jnp.stack([loss, grad_norm]).astype(jnp.float32)
    bad = ~jnp.isfinite(values)
    made = step - spikes["skipped"]
    if config.skip_spikes:
        bad |= values > _limits(config, spikes["window"], made)
    cause = jnp.where(bad[0], 1, jnp.where(bad[1], 2, 0)).astype(jnp.int32)
    skipped = jnp.any(bad)
    new = {
        "skipped": spikes["skipped"] + skipped,
        "in_a_row": jnp.where(skipped, spikes["in_a_row"] + 1, 0),
    }
    if config.skip_spikes:
        place = made % config.spike_window  # the oldest one
        new["window"] = jnp.where(skipped, spikes["window"], spikes["window"].at[:, place].set(values))
    return cause, new


def _limits(config: TrainConfig, window: jax.Array, made: jax.Array) -> jax.Array:
    """What loss and gradient norm may be at most, [2]: mean + skip_spikes * standard deviation."""
    held = (jnp.arange(config.spike_window) < made)[None]
    count = jnp.clip(made, 1, config.spike_window)
    mean = jnp.sum(window, axis=1, where=held) / count
    variance = jnp.sum(jnp.square(window - mean[:, None]), axis=1, where=held) / count
    limits = mean + config.skip_spikes * jnp.sqrt(variance)
    return jnp.where(2 * made >= config.spike_window, limits, jnp.inf)


def refuse_to_go_on(config: RunConfig, metrics: dict[str, Any], step: int, saved: int | None) -> None:
    """Raises UserError if the metrics of a step say that training is lost.

    That is, if IN_A_ROW updates were left out one after the other, or if an update made a parameter infinite.
    saved: the step of the newest checkpoint, if there is one.
    """
    mend = "lower optimizer.learning_rate or change the seed in a new `out`"
    if not math.isfinite(metrics["param_norm"]):
        name, what, more = "param_norm", "is not finite", ""
    elif metrics["skipped_in_a_row"] >= IN_A_ROW:
        name, more = CAUSES[metrics["skip_cause"]], f", update {metrics['skipped_in_a_row']} in a row that is left out"
        what = "is not finite"
        if math.isfinite(metrics[name]):
            deviations = f"train.skip_spikes={config.train.skip_spikes:g} standard deviations"
            what = f"is {metrics[name]:.4g}, more than {deviations} above the mean of the steps before"
            mend = (
                "if that is no accident, go on with a higher train.skip_spikes or a lower optimizer.learning_rate, and "
                "allow_changes naming it"
            )
    else:
        return
    held = (
        "there is no checkpoint yet" if saved is None else f"the newest checkpoint is {config.out}/checkpoints/{saved}"
    )
    raise UserError(f"step {step}: {name} {what} (batch {step - 1} of seed {config.seed}){more}; {held}; {mend}")
