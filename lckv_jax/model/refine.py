"""The passes over a cyclic span: layers that read a layer above themselves, for all tokens at once.

2405.10637 section 2.2: every pass reads the K,V that the pass before produced. In training (`solve_span`) there are m
without and b with gradient; at inference (`solve_rows`) each row passes until it is solved.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lckv_jax.config import ModelConfig
from lckv_jax.errors import UserError
from lckv_jax.model.attention import wider
from lckv_jax.model.layers import KV, Context, Params, Stack, project_kv, run_layers, take_stack
from lckv_jax.sharing import Run, Span

Slots = dict[int, KV]  # K,V by the layer that owns them
Passes = str | float  # at inference: `trained`, `exact` or a tolerance, see `stop_rule`


class Solved(NamedTuple):
    """A span's output, its owners' K,V of the last pass, the passes used, and the last pass' relative K,V change.

    passes, residual: scalars in training; [B] at inference, where each row has its own (scalars if nothing is cyclic).
    """

    x_BTD: jax.Array
    slots: Slots
    passes: jax.Array
    residual: jax.Array


class Stop(NamedTuple):
    """When a row has passed often enough: at a relative K,V change of at most `tolerance` (negative: at none), or after
    `limit` passes (None: as many as its longest document has tokens).

    Both may be traced, the limit then one of at least 2 for each row [B], so that one program serves every rule.
    """

    tolerance: float | jax.Array
    limit: int | jax.Array | None


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
    return Solved(x, own, passes + grad_passes, residual.max())


def stop_rule(config: ModelConfig, passes: Passes | Stop) -> Stop:
    """What `passes` means for this model at inference.

    `trained`: m + b passes. `exact`: until no single token's K or V changes by more than 8 eps of the compute dtype,
    relatively: 9.5e-7 in float32, but 0.0625 in bfloat16, where a smaller tolerance may be asked for. A number below 1:
    the same test with that tolerance; 0: no test. But never more passes than the row's longest document has tokens: by
    then every token is final (token t is after t + 1 passes).
    A Stop is what it is. Raises UserError for anything else.
    """
    if isinstance(passes, Stop):
        return passes
    if passes == "trained":
        return Stop(-1.0, config.no_grad_passes + config.grad_passes)
    if passes == "exact":
        return Stop(8 * float(jnp.finfo(config.dtype).eps), None)
    if isinstance(passes, str):
        near = difflib.get_close_matches(passes.lower(), ("trained", "exact"), 1, 0.5)
        mend = f"did you mean {near[0]!r}?" if near else "use trained, exact or a tolerance such as 1e-2"
        raise UserError(f"passes: unknown name {passes!r}; {mend}")
    if isinstance(passes, bool) or not 0 <= passes < 1:  # a change of 1 is that of K,V from nothing
        raise UserError(
            f"passes: {passes} is no tolerance, which is 0 or more, below 1; use one such as 1e-2, or trained or exact"
        )
    return Stop(float(passes) or -1.0, None)


def solve_rows(
    params: Params, config: ModelConfig, span: Span, x_BTD: jax.Array, slots: Slots, context: Context, stop: Stop
) -> Solved:
    """The span evaluated once, or, if it is cyclic, by as many passes as each row needs; carries no gradient.

    The pass that hands its output on comes last and counts: a row's passes are those that made its K,V, and one.
    """
    inputs = Inputs([take_stack(params, config, run) for run in config.sharing.runs(span)], x_BTD, slots)
    if not span.cyclic:
        x, own = _last_pass(config, span, inputs, {}, context)
        return Solved(x, own, jnp.ones((), jnp.int32), jnp.zeros((), jnp.float32))
    start = _start(config, span, inputs, context)
    read, made_B, limit_B = repeat_rows(start, partial(_kv_pass, config, span, inputs, context=context), stop, context)
    x, own = _last_pass(config, span, inputs, read, context)
    return Solved(x, own, made_B + 1, last_change(config, span, own, read, stop, context, made_B + 1 >= limit_B))


def repeat_rows(
    start: Slots, kv_pass: Callable[[Slots], Slots], stop: Stop, context: Context
) -> tuple[Slots, jax.Array, jax.Array]:
    """The K,V that the last pass over a cyclic span reads, the passes that made them, and the most that each row may
    make, with the last: both int32 [B].

    kv_pass: from the K,V of the pass before to those of the next. One loop whose state is K,V. A row that is done keeps
    its K,V, so that it never depends on its batch mates.
    """
    limit_B = _longest_document(context) if stop.limit is None else jnp.full(context.pos_BT.shape[0], stop.limit)
    read, made_B = start, jnp.zeros_like(limit_B)
    if isinstance(stop.limit, int) and stop.limit == 1:
        return read, made_B, limit_B
    if not start:  # before the loop, because it has less to do
        read, made_B = kv_pass(start), jnp.minimum(1, limit_B - 1)

    def unfinished(state: tuple[Slots, jax.Array, jax.Array]) -> jax.Array:
        return state[2].any()

    def one_more(state: tuple[Slots, jax.Array, jax.Array]) -> tuple[Slots, jax.Array, jax.Array]:
        old, made_B, open_B = state
        new = kv_pass(old)
        moves_B = largest_change(new, old, context) > stop.tolerance
        new = jax.tree.map(lambda now, before: jnp.where(open_B[:, None, None, None], now, before), new, old)
        made_B = made_B + open_B.astype(made_B.dtype)
        return new, made_B, open_B & moves_B & (made_B + 1 < limit_B)

    read, made_B, _ = jax.lax.while_loop(unfinished, one_more, (read, made_B, made_B + 1 < limit_B))
    return read, made_B, limit_B


def last_change(
    config: ModelConfig, span: Span, own: Slots, read: Slots, stop: Stop, context: Context, at_limit_B: jax.Array
) -> jax.Array:
    """The relative K,V change of the last pass in each row, float32 [B].

    at_limit_B: rows that made all the passes they may.
    """
    residual_B = largest_change({owner: own[owner] for owner in config.sharing.upward_sources(span)}, read, context)
    if stop.limit is None:  # after as many passes as the longest document has tokens nothing is left to change
        residual_B = jnp.where(at_limit_B, 0.0, residual_B)
    return residual_B


def _longest_document(context: Context) -> jax.Array:
    """Bounds the tokens of the longest document in each row, int32 [B], at least 1: upward layers read strictly smaller
    positions, so no chain of them is longer."""
    tokens_B = jnp.sum(context.pos_BT >= 0, axis=1, dtype=jnp.int32)
    return jnp.maximum(jnp.minimum(tokens_B, context.pos_BT.max(axis=1).astype(jnp.int32) + 1), 1)


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
        return new, passes + 1, largest_change(new, old, context).max()

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
    """The largest relative change of any single token's keys or values in each row, float32 [B]; 1 where there was
    nothing before."""
    change_B = jnp.zeros(context.pos_BT.shape[0], jnp.float32)
    for owner, kv in jax.lax.stop_gradient(new).items():
        for index, now in enumerate(kv):
            now = now.astype(wider(now.dtype))
            before = jax.lax.stop_gradient(old[owner][index]).astype(now.dtype) if owner in old else jnp.zeros_like(now)
            moved, size = (jnp.sum(jnp.square(x), axis=(2, 3)) for x in (now - before, now))
            relative = jnp.sqrt(moved / jnp.maximum(size, jnp.finfo(size.dtype).tiny))
            relative = jnp.where(context.pos_BT >= 0, relative, 0.0)
            change_B = jnp.maximum(change_B, relative.max(axis=1).astype(jnp.float32))
    return change_B
