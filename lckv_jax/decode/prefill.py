"""Prompts to K,V: the passes of `refine`, each of which sweeps over chunks of columns.

Chunks inside, passes outside: the result is that of all columns at once, whatever the passes. What no chunk needs
beyond itself is never there for all columns, and layers above the last owner see only the last ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lckv_jax.config import ModelConfig
from lckv_jax.decode.step import Weights, apart
from lckv_jax.model.attention import attend, attention_mass, readable, wider
from lckv_jax.model.layers import KV, Context, attention, make_context, mlp, project_kv, rms_norm
from lckv_jax.model.refine import Passes, Slots, last_change, repeat_rows, stop_rule
from lckv_jax.sharing import Span

Masses = dict[int, jax.Array]  # [B, K, T] float32 or wider by owner: probability that queries gave each token


class Prefilled(NamedTuple):
    """x_BD: what the head reads, of the last column. kvs: by owner, [B, T, K, H]. masses: of the owners observed.

    passes_B, residual_B: as in `refine.Solved`; ones and zeros where nothing is cyclic.
    """

    x_BD: jax.Array
    kvs: Slots
    masses: Masses
    passes_B: jax.Array
    residual_B: jax.Array


class _Prompts(NamedTuple):
    """What stays the same through all passes. observed: by owner, how many of the last columns' queries are summed."""

    weights: Weights
    config: ModelConfig
    context: Context
    observed: Mapping[int, int]
    chunk: int


class _Sweep(NamedTuple):
    """What one pass over a span makes: K,V by owner, masses, and the last columns of what goes on from it."""

    own: Slots
    masses: Masses
    x_BTD: jax.Array


def prefill_rows(
    weights: Weights,
    config: ModelConfig,
    tokens_BT: jax.Array,
    pos_BT: jax.Array,
    passes: Passes,
    *,
    chunk: int,
    observed: Mapping[int, int],
    plain: bool = False,
) -> Prefilled:
    """The prompts `tokens_BT` at `pos_BT` (-1 in front of shorter ones), passed over as `passes` says.

    chunk: columns at once, of which T is a multiple. observed: owners whose tokens' masses are wanted, and over how
    many of the last queries. plain: every row has the positions 0..T-1.
    """
    prompts = _Prompts(weights, config, make_context(config, pos_BT, None, plain=plain), observed, chunk)
    B, T = tokens_BT.shape
    tail = max([1, *observed.values()])
    tail = tail if tail <= chunk else T
    last = max(config.sharing.owners)
    x = weights.embed_VD[tokens_BT].astype(config.dtype)
    done = _Sweep({}, {}, x)
    used_B, residual_B = jnp.ones(B, jnp.int32), jnp.zeros(B, jnp.float32)
    for span in config.sharing.spans():
        width = tail if span.stop > last else T  # of what goes on from it
        if not span.cyclic:
            done = _last_sweep(prompts, span, done, {}, width)
            continue
        stop = stop_rule(config, passes)
        kv_pass = partial(_kv_pass, prompts, span, done)
        read, made_B, limit_B = repeat_rows(_start(prompts, span, done), kv_pass, stop, prompts.context)
        done = _last_sweep(prompts, span, done, read, width)
        change_B = last_change(config, span, done.own, read, stop, prompts.context, made_B + 1 >= limit_B)
        used_B, residual_B = jnp.maximum(used_B, made_B + 1), jnp.maximum(residual_B, change_B)
    x_BD = rms_norm(done.x_BTD[:, -1:], weights.final_norm_D, config.norm_eps)[:, 0]
    return Prefilled(x_BD, done.own, done.masses, used_B, residual_B)


def _start(prompts: _Prompts, span: Span, done: _Sweep) -> Slots:
    """The K,V that the first pass reads above itself: none for a zero start, else projected from the span's input."""
    weights, config, context, _, _ = prompts
    if config.start == "zero":
        return {}
    wanted = config.sharing.upward_sources(span)
    return {owner: project_kv(config, apart(config, weights.layers[owner]), done.x_BTD, context) for owner in wanted}


def _kv_pass(prompts: _Prompts, span: Span, done: _Sweep, read: Slots) -> Slots:
    """A pass that is not the last: the K,V that the next pass reads."""
    top = span.stop - 1
    swept = _over_chunks(prompts._replace(observed={}), range(span.start, top), top, done, read, 0)
    return {owner: swept.own[owner] for owner in prompts.config.sharing.upward_sources(span)}


def _last_sweep(prompts: _Prompts, span: Span, done: _Sweep, read: Slots, width: int) -> _Sweep:
    """The pass that hands its output on, of the last `width` columns: those are all that layers above the last owner,
    and its own attention, need."""
    T, last = prompts.context.pos_BT.shape[1], max(prompts.config.sharing.owners)
    if width == T:
        return _over_chunks(prompts, range(span.start, span.stop), None, done, read, T)
    if span.start <= last:
        done = _over_chunks(prompts, range(span.start, last), last, done, read, width)
    x, masses = done.x_BTD, done.masses
    for layer in range(max(span.start, last), span.stop):
        x, masses = _layer(prompts, layer, x, done.own, read, masses, T - width)
    return _Sweep(done.own, masses, x)


def _over_chunks(
    prompts: _Prompts, layers: Iterable[int], top: int | None, done: _Sweep, read: Slots, width: int
) -> _Sweep:
    """The layers on one chunk after another, and the K,V of the owner `top` above them.

    read: K,V of the pass before, for upward layers; absent = nothing to read. width: the last columns kept of the
    output.
    """
    weights, config, context, _, chunk = prompts
    owners = [layer for layer in (*layers, top) if layer in config.sharing.owners]
    (B, T, D), size = done.x_BTD.shape, (config.num_kv_heads, config.head_dim)
    nothing = jnp.zeros((B, T, *size), config.dtype)

    def one(swept: _Sweep, start: jax.Array | int) -> tuple[_Sweep, jax.Array | None]:
        here = _columns(context, start, chunk)
        x, own, masses = jax.lax.dynamic_slice_in_dim(done.x_BTD, start, chunk, axis=1), dict(swept.own), swept.masses
        for layer in (*layers, top):
            if layer in owners:
                kv = project_kv(config, apart(config, weights.layers[layer]), x, here)
                own[layer] = KV(*(_put(whole, part, start) for whole, part in zip(own[layer], kv)))
            if layer is not None and layer != top:
                x, masses = _layer(prompts, layer, x, own, read, masses, start)
        kept = x[:, max(0, chunk - width) :] if width < T else None
        return _Sweep(own, masses, swept.x_BTD if kept is None else kept), x if width == T else None

    start = {**done.own, **{owner: KV(nothing, nothing) for owner in owners}}
    no_mass = jnp.zeros((B, size[0], T), wider(nothing.dtype))
    masses = {**done.masses, **{owner: no_mass for owner in owners if owner in prompts.observed}}
    empty = _Sweep(start, masses, jnp.zeros((B, width if width < T else 0, D), config.dtype))
    if chunk == T:
        swept, x = one(empty, 0)
    else:
        swept, xs = jax.lax.scan(one, empty, jnp.arange(0, T, chunk))
        x = None if xs is None else jnp.moveaxis(xs, 0, 1).reshape(B, T, D)
    return swept if x is None else swept._replace(x_BTD=x)


def _layer(
    prompts: _Prompts, layer: int, x_BTD: jax.Array, own: Slots, read: Slots, masses: Masses, start: jax.Array | int
) -> tuple[jax.Array, Masses]:
    """The layer on the columns from `start` on, and the masses with those of its queries."""
    weights, config, everything, observed, _ = prompts
    source, upward = config.sharing.sources[layer], config.sharing.upward[layer]
    context = _columns(everything, start, x_BTD.shape[1])
    kv, p = read.get(source) if upward else own[source], apart(config, weights.layers[layer])
    masses = dict(masses)
    strict = upward or config.strict_everywhere
    window = config.window if config.sharing.windowed[layer] else None

    def attend_to(kv: KV, q_BTNH: jax.Array) -> jax.Array:
        if source in observed:
            masses[source] += _mass(q_BTNH[:, -observed[source] :], kv)
        few = q_BTNH.shape[1] < prompts.chunk  # kernels are for many
        return attend(
            q_BTNH,
            *kv,
            q_pos_BT=context.pos_BT,
            k_pos_BS=everything.pos_BT,
            strict=strict,
            window=window,
            plain=context.plain,
            backend="xla" if few else config.attention,
        )

    def _mass(q_BTNH: jax.Array, kv: KV) -> jax.Array:
        n, T = q_BTNH.shape[1], everything.pos_BT.shape[1]
        mask_BTS = readable(context.pos_BT[:, -n:], everything.pos_BT, None, None, strict=strict, window=window)
        counts_T = start + context.pos_BT.shape[1] - n + jnp.arange(n) >= T - observed[source]
        return attention_mass(q_BTNH, kv.k_BSKH, mask_BTS & counts_T[None, :, None])

    x = x_BTD + attention(config, p, x_BTD, None if kv is None else partial(attend_to, kv), context)
    return x + mlp(config, p, x), masses


def _columns(context: Context, start: jax.Array | int, size: int) -> Context:
    """The context of some columns."""
    if size == context.pos_BT.shape[1]:
        return context
    parts = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (context.pos_BT, context.cos, context.sin))
    pos_BT, cos, sin = parts
    return Context(pos_BT, None, cos, sin)


def _put(whole: jax.Array, part: jax.Array, start: jax.Array | int) -> jax.Array:
    return part if part.shape == whole.shape else jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=1)
