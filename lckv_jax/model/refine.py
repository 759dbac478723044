"""The m + b passes over a cyclic span: parallel training of layers that read a layer above themselves.

2405.10637 section 2.2: every pass reads the K,V that the pass before produced; the first m passes carry no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lckv_jax.config import ModelConfig
from lckv_jax.model.attention import wider
from lckv_jax.model.layers import KV, Context, Params, Stack, project_kv, run_layers, take_stack
from lckv_jax.sharing import Run, Span

Slots = dict[int, KV]  # K,V by the layer that owns them


class Solved(NamedTuple):
    """A span's output, its owners' K,V of the last pass, the passes used, and the last pass' relative K,V change."""

    x_BTD: jax.Array
    slots: Slots
    passes: jax.Array
    residual: jax.Array


class Inputs(NamedTuple):
    """What every pass over a span starts from: parameters, the span's input, and the K,V of earlier spans."""

    stacks: list[Stack]
    x_BTD: jax.Array
    slots: Slots


def solve_span(
    params: Params,
    config: ModelConfig,
    span: Span,
    x_BTD: jax.Array,
    slots: Slots,
    context: Context,
    no_grad_passes: int | jax.Array,
    grad_passes: int,
) -> Solved:
    """The span evaluated once, or by m passes without and b with gradient if it is cyclic.

    no_grad_passes (m): an int, or a traced integer of at least 1. grad_passes (b): an int of at least 1.
    """
    inputs = Inputs([take_stack(params, config, run) for run in config.sharing.runs(span)], x_BTD, slots)
    if not span.cyclic:
        x, own = _last_pass(config, span, inputs, {}, context)
        return Solved(x, own, jnp.ones((), jnp.int32), jnp.zeros((), jnp.float32))
    read, passes = _start(config, span, inputs, context), jnp.zeros((), jnp.int32)
    if not (isinstance(no_grad_passes, int) and no_grad_passes == 0):
        read, passes = _no_grad_passes(config, span, inputs, read, context, no_grad_passes)
    for _ in range(grad_passes - 1):
        read = _kv_pass(config, span, inputs, read, context)
    x, own = _last_pass(config, span, inputs, read, context)
    residual = largest_change({owner: own[owner] for owner in config.sharing.upward_sources(span)}, read, context)
    return Solved(x, own, passes + grad_passes, residual)


def _start(config: ModelConfig, span: Span, inputs: Inputs, context: Context) -> Slots:
    """The K,V that the first pass reads above itself: none for a zero start, else projected from the span's input."""
    if config.start == "zero":
        return {}
    wanted = config.sharing.upward_sources(span)
    start = {
        owner: project_kv(config, _one(stack.kv, owner - run.start), inputs.x_BTD, context)
        for run, stack in zip(config.sharing.runs(span), inputs.stacks)
        for owner in wanted
        if run.start <= owner < run.stop
    }
    return jax.lax.stop_gradient(start)


def _no_grad_passes(
    config: ModelConfig, span: Span, inputs: Inputs, read: Slots, context: Context, no_grad_passes: int | jax.Array
) -> tuple[Slots, jax.Array]:
    """The K,V after m passes without gradient, and how many were made.

    One loop whose state is only K,V. The first pass from a zero start stands before it, because it has less to do:
    its upward layers have nothing to read.
    """
    inputs = jax.lax.stop_gradient(inputs)
    done = 0
    if config.start == "zero":
        read, done = _kv_pass(config, span, inputs, read, context), 1

    if config.tolerance == 0.0:
        read = jax.lax.fori_loop(done, no_grad_passes, lambda _, kv: _kv_pass(config, span, inputs, kv, context), read)
        return read, jnp.asarray(no_grad_passes, jnp.int32)

    def unfinished(state: tuple[Slots, jax.Array, jax.Array]) -> jax.Array:
        _, passes, residual = state
        return (passes < no_grad_passes) & (residual > config.tolerance)

    def one_more(state: tuple[Slots, jax.Array, jax.Array]) -> tuple[Slots, jax.Array, jax.Array]:
        old, passes, _ = state
        new = _kv_pass(config, span, inputs, old, context)
        return new, passes + 1, largest_change(new, old, context)

    state = (read, jnp.asarray(done, jnp.int32), jnp.asarray(jnp.inf, jnp.float32))
    read, passes, _ = jax.lax.while_loop(unfinished, one_more, state)
    return read, passes


def _kv_pass(config: ModelConfig, span: Span, inputs: Inputs, read: Slots, context: Context) -> Slots:
    """A pass that is not the last: the K,V that the next pass reads. The span's highest owner computes nothing else."""
    *below, top = config.sharing.runs(span)
    x, slots = _sweep(config, below, inputs, read, context)
    slots[top.start] = project_kv(config, _one(inputs.stacks[-1].kv, 0), x, context)
    return {owner: slots[owner] for owner in config.sharing.upward_sources(span)}


def _last_pass(
    config: ModelConfig, span: Span, inputs: Inputs, read: Slots, context: Context
) -> tuple[jax.Array, Slots]:
    """The pass that hands its output on: output [B, T, D] and the K,V of all owners of the span."""
    return _sweep(config, config.sharing.runs(span), inputs, read, context)


def _sweep(
    config: ModelConfig, runs: Sequence[Run], inputs: Inputs, read: Slots, context: Context
) -> tuple[jax.Array, Slots]:
    """The runs in order. Upward layers read the pass before (`read`; absent = nothing to read), others this pass."""
    x, own = inputs.x_BTD, {}
    for run, stack in zip(runs, inputs.stacks):
        source = None
        if run.source is not None:
            source = read.get(run.source) if run.upward else {**inputs.slots, **own}[run.source]
        x, new = run_layers(config, run, stack, x, source, context)
        own.update(new)
    return x, own


def _one(stack: Params | None, index: int) -> Params:
    assert stack is not None, "only owners are asked for K,V"
    return jax.tree.map(lambda p: p[index], stack)


def largest_change(new: Slots, old: Slots, context: Context) -> jax.Array:
    """The largest relative change of any single token's keys or values, float32; 1 where there was nothing before."""
    change = jnp.zeros((), jnp.float32)
    for owner, kv in jax.lax.stop_gradient(new).items():
        for index, now in enumerate(kv):
            now = now.astype(wider(now.dtype))
            before = jax.lax.stop_gradient(old[owner][index]).astype(now.dtype) if owner in old else jnp.zeros_like(now)
            moved, size = (jnp.sum(jnp.square(x), axis=(2, 3)) for x in (now - before, now))
            relative = jnp.sqrt(moved / jnp.maximum(size, jnp.finfo(size.dtype).tiny))
            change = jnp.maximum(change, jnp.where(context.pos_BT >= 0, relative, 0.0).max().astype(jnp.float32))
    return change
