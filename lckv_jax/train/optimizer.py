"""The optax chain and the learning-rate schedule of a run."""

from __future__ import annotations

from typing import Any

import jax
import optax

from lckv_jax.config import OptimizerConfig
from lckv_jax.model.transformer import is_matrix


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of each update: linear from 0 to the peak, then cosine to its final fraction at the last one.

    Update 0 takes the first step of the ramp, not zero.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=steps,
        end_value=config.learning_rate * config.final_fraction,
    )
    return lambda count: schedule(count + 1)


def decayed(params: Any) -> Any:
    """True for every parameter that weight decay applies to: matrices, not norms or biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path[-1].key), params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW (1711.05101) behind clipping by global norm."""
    adamw = optax.adamw(
        learning_rate(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    return adamw if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
