"""The optimisers and learning-rate schedules of a run, by name, from optax."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from lckv_jax.config import OptimizerConfig
from lckv_jax.model.transformer import is_matrix

_ADAM_RMS = 0.2  # the usual root mean square of an AdamW update, which Muon's are scaled to (2502.16982, 2.2)


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of each step: linear from 0 to the peak, then by `config.schedule`.

    Step 0 takes the first step of the ramp, not zero. The last of `steps` has the peak times `final_fraction`;
    `constant` stays at the peak. `wsd` stays there until `decay_fraction` of all steps are left.
    """
    peak, rest = config.learning_rate, steps - config.warmup_steps
    final = peak * config.final_fraction
    match config.schedule:
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
        case "linear":
            after = optax.linear_schedule(peak, final, rest)
        case "constant":
            after = optax.constant_schedule(peak)
        case "wsd":
            decay = min(max(round(config.decay_fraction * steps), 1), rest)
            after = optax.linear_schedule(peak, final, decay, transition_begin=rest - decay)
    if config.warmup_steps:
        ramp = optax.linear_schedule(0.0, peak, config.warmup_steps)
        after = optax.join_schedules([ramp, after], [config.warmup_steps])
    return lambda step: after(step + 1)


def decayed(params: Any) -> Any:
    """True for every parameter that weight decay applies to: matrices, not norms or biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path[-1].key), params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, the rule called `config.name`, decoupled weight decay of matrices, learning rate.

    The learning rate is that of the argument `step` of `update`, so an update that is left out does not delay it.
    What each rule uses, and peak learning rates: first for configs/quickstart.yaml (1.6M parameters; measured, see
    benchmarks/optimizers.py), then customary ones for 0.1 to 1 billion parameters.

    adamw (1711.05101): b1, b2, eps. 3e-3; 3e-4 to 1e-3.
    lion (2302.06675): b1, b2. 5e-4; 5e-5 to 2e-4. Every weight moves by the whole rate, so it is 3 to 10 times smaller
    than AdamW's, and weight_decay as much larger.
    adafactor (1804.04235): neither. 3e-3; 3e-4 to 1e-3. No momentum, and one row and one column of second moments a
    matrix; the update of each layer's array is clipped to a root mean square of 1, the rate not scaled by parameters.
    muon (2502.16982): b1, b2, eps. 3e-3; 3e-4 to 1e-3. Each layer's matrices by themselves, b1 their momentum (0.95 is
    customary), scaled so that AdamW's rate and weight decay fit; embeddings, head, norms and biases by AdamW.
    """
    parts = [
        _rule(config),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        _scale_by_step(learning_rate(config, steps)),
    ]
    # identity keeps the places of the states in the chain, so that clipping may be turned on and off at resume
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    return optax.with_extra_args_support(optax.chain(clip, *parts))


def _rule(config: OptimizerConfig) -> optax.GradientTransformation:
    """Gradients -> the direction of the update, without learning rate and weight decay."""
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    match config.name:
        case "adamw":
            return adam
        case "lion":
            return optax.scale_by_lion(b1=config.b1, b2=config.b2)
        case "adafactor":
            rule = optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=2), optax.clip_by_block_rms(1.0))
            return _each_layer(rule)
        case "muon":
            muon = contrib.scale_by_muon(beta=config.b1, eps=config.eps, weight_dimension_numbers=_muon_axes)
            return optax.partition(
                {"muon": optax.chain(muon, optax.stateless(_as_large_as_adam)), "adam": adam}, _labels
            )


def _scale_by_step(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Times minus the learning rate of the argument `step`."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        rate = jnp.asarray(schedule(extra["step"]))
        return jax.tree.map(lambda x: -rate * x, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


# ---------------------------------------------------------------- layers as matrices


def _is_layers_matrix(path: Any) -> bool:
    """Whether the path leads to stacked matrices [L or C, ...], rather than to embed, head, norms or biases."""
    return len(path) > 1 and is_matrix(path[-1].key)


def _inputs(name: str) -> int:
    """How many leading axes of one layer's matrix are its input: wo alone has two, heads and head size."""
    return 2 if name == "wo" else 1


def _labels(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if _is_layers_matrix(path) else "adam", params)


def _muon_axes(updates: Any) -> Any:
    """Which axes are input and output of a matrix; the stacked one is neither, so each layer stands alone."""

    def axes(path: Any, x: Any) -> contrib.MuonDimensionNumbers:
        split = 1 + _inputs(path[-1].key)
        return contrib.MuonDimensionNumbers(tuple(range(1, split)), tuple(range(split, x.ndim)))

    return jax.tree_util.tree_map_with_path(axes, updates)


def _as_large_as_adam(updates: Any, _: Any) -> Any:
    """An orthogonal matrix [m, n] has root mean square 1 / sqrt(max(m, n)); scaled to that of an AdamW update."""

    def scale(path: Any, x: jax.Array) -> jax.Array:
        split = 1 + _inputs(path[-1].key)
        return x * (_ADAM_RMS * math.sqrt(max(math.prod(x.shape[1:split]), math.prod(x.shape[split:]))))

    return jax.tree_util.tree_map_with_path(scale, updates)


def _each_layer(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """`rule`, applied to each layer's matrix [inputs, outputs] or vector by itself."""

    def flat(path: Any, x: jax.Array) -> jax.Array:
        name = path[-1].key
        if not is_matrix(name):
            return x.reshape(-1)
        return x.reshape(math.prod(x.shape[: _inputs(name)]), -1)

    def over_stack(path: Any, function: Callable) -> Callable:
        return jax.vmap(function) if len(path) > 1 else function

    def init_one(path: Any, param: jax.Array) -> Any:
        return over_stack(path, lambda x: rule.init(flat(path, x)))(param)

    def update_one(path: Any, grad: jax.Array, state: Any, param: jax.Array) -> tuple[jax.Array, Any]:
        def one(grad: jax.Array, state: Any, param: jax.Array) -> tuple[Any, Any]:
            update, state = rule.update(flat(path, grad), state, flat(path, param))
            return jnp.reshape(update, grad.shape), state  # pyright: ignore[reportArgumentType]

        return over_stack(path, one)(grad, state, param)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        both = jax.tree_util.tree_map_with_path(update_one, updates, state, params)
        first, second = (jax.tree.map(lambda _, pair, i=i: pair[i], updates, both) for i in (0, 1))
        return first, second

    return optax.GradientTransformation(lambda params: jax.tree_util.tree_map_with_path(init_one, params), update)
