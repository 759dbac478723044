"""A slot of plain cells: everything, or a ring of the last tokens, with or without the first ones beside it.

Rows are aligned at their newest token, so that all of them write the same cell; shorter prompts have padding in front.
Positions are explicit: whether a cell is read depends on the position in it, never on its place.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lckv_jax.config import ModelConfig
from lckv_jax.decode.codecs import decoded, encode, token_bytes
from lckv_jax.decode.spec import CellsSpec
from lckv_jax.model.attention import First, attend_cells, readable, rope_frequencies, rope_tables, rotate, wider
from lckv_jax.model.layers import KV

EMPTY = -1  # the position of a cell without a token
_CELLS = 2  # the axis of cells in every array of a slot
_POSITION_BYTES = 4


class Cells(NamedTuple):
    """The K,V of one owner in S cells: the sinks, if it has some, then the others.

    k, v: [B, K, S, H], rotated keys and values, or their codes. k_scale, v_scale: [B, K, S], None where there are no
    codes. pos: [B, 1, S] int32, EMPTY where there is no token.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None
    v_scale: jax.Array | None
    pos: jax.Array


def fill(spec: CellsSpec, kv: KV, pos_BT: jax.Array, padding_B: jax.Array) -> Cells:
    """The slot after prompts whose rotated keys and values are `kv`, [B, T, K, H], at `pos_BT`, padding in front.

    Padding is held as zeros, whatever it is: cells without a token are read too, with a weight of zero.
    """
    k, v = (jnp.where(pos_BT[:, None, :, None] >= 0, x.swapaxes(1, 2), 0) for x in kv)
    tokens = _encode(spec.codec, k, v, pos_BT[:, None])
    kept = _last(tokens, spec.cells, spec.ring)
    return _joined(_first(tokens, spec.sinks, padding_B), kept) if spec.sinks else kept


def row_bytes(config: ModelConfig, spec: CellsSpec) -> int:
    """Bytes of one row of the slot as they lie in memory: keys, values, scales and positions."""
    a_token = token_bytes(spec.codec, config.num_kv_heads, config.head_dim, config.dtype) + _POSITION_BYTES
    return (spec.cells + spec.sinks) * a_token


def append(spec: CellsSpec, slot: Cells, kv: KV, column: jax.Array, pos_B: jax.Array, live_B: jax.Array) -> Cells:
    """The slot with one more token of each row, [B, 1, K, H], at `column`; rows that are not live get no token."""
    k, v = (x.swapaxes(1, 2) for x in kv)
    new = _encode(spec.codec, k, v, jnp.where(live_B, pos_B, EMPTY)[:, None, None])
    if spec.sinks:
        here_BS = jnp.arange(spec.sinks)[None] == new.pos[:, 0]  # no sink for positions past them, or EMPTY
        sinks = jax.tree.map(lambda x: x[:, :, : spec.sinks], slot)
        sinks = jax.tree.map(lambda old, x: jnp.where(_spread(here_BS[:, None], old), x, old), sinks, new)
        slot = jax.tree.map(lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x, 0, _CELLS), slot, sinks)
    cell = spec.sinks + (column % spec.cells if spec.ring else column)
    return jax.tree.map(lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x, cell, _CELLS), slot, new)


def read(
    config: ModelConfig,
    spec: CellsSpec,
    slot: Cells,
    q_BTNH: jax.Array,
    pos_BT: jax.Array,
    *,
    strict: bool,
    window: int | None,
) -> jax.Array:
    """What queries at `pos_BT`, rotated there, read of the slot, [B, T, N, H].

    strict, window: of the layer that reads. Where there are sinks, positions are those in the cache (2309.17453, 3.2):
    the tokens between sinks and window do not count. So the query moves towards the sinks, and keys are never rotated
    again.
    """
    limits = [limit for limit in (window, spec.window) if limit is not None]
    k_pos_BS = slot.pos[:, 0]
    mask = readable(pos_BT, k_pos_BS, None, None, strict=strict, window=min(limits) if limits else None)
    first = None
    if spec.sinks:
        sinks = readable(pos_BT, k_pos_BS[:, : spec.sinks], None, None, strict=strict, window=window)
        rest = mask[:, :, spec.sinks :] & (k_pos_BS[:, None, spec.sinks :] >= spec.sinks)
        mask = jnp.concatenate([sinks, rest], axis=2)
        first = First(spec.sinks, _moved(config, q_BTNH, jnp.maximum(pos_BT - (spec.sinks + spec.cells - 1), 0)))
    k, v = (decoded(spec.codec, x, q_BTNH.shape[-1]) for x in (slot.k, slot.v))
    return attend_cells(q_BTNH, k, v, mask[:, None], k_scale_BKS=slot.k_scale, v_scale_BKS=slot.v_scale, first=first)


def grown(spec: CellsSpec, slot: Cells) -> Cells:
    """The slot with as many cells as `spec` says, the new ones empty and last; a ring keeps its size."""
    size = spec.sinks + spec.cells
    return _padded(slot, size - slot.pos.shape[_CELLS])


# ---------------------------------------------------------------- cells


def _moved(config: ModelConfig, q_BTNH: jax.Array, back_BT: jax.Array) -> jax.Array:
    """Rotated queries as if they stood `back_BT` positions earlier."""
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, wider(q_BTNH.dtype))
    return rotate(q_BTNH, *rope_tables(-back_BT, frequencies))


def _encode(codec: str, k: jax.Array, v: jax.Array, pos: jax.Array) -> Cells:
    (k, k_scale), (v, v_scale) = encode(codec, k), encode(codec, v)
    return Cells(k, v, k_scale, v_scale, pos)


def _last(tokens: Cells, size: int, ring: bool) -> Cells:
    """The last `size` tokens, where `append` would have put them."""
    columns = tokens.pos.shape[_CELLS]
    if columns <= size:
        return _padded(tokens, size - columns)
    assert ring, "only a ring may be smaller than the prompt"
    shift = (columns - size) % size
    return jax.tree.map(lambda x: jnp.roll(x[:, :, -size:], shift, axis=_CELLS), tokens)


def _first(tokens: Cells, size: int, padding_B: jax.Array) -> Cells:
    """The first `size` tokens of each row, behind its padding; EMPTY where a row has fewer."""
    columns = tokens.pos.shape[_CELLS]
    place_BS = padding_B[:, None] + jnp.arange(size)[None]
    place = jnp.minimum(place_BS, columns - 1)[:, None]
    first = jax.tree.map(lambda x: jnp.take_along_axis(x, _spread(place, x), axis=_CELLS), tokens)
    return first._replace(pos=jnp.where(place_BS[:, None] < columns, first.pos, EMPTY))


def _joined(left: Cells, right: Cells) -> Cells:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=_CELLS), left, right)


def _padded(slot: Cells, more: int) -> Cells:
    def pad(x: jax.Array, value: int) -> jax.Array:
        return jnp.pad(x, [(0, more if axis == _CELLS else 0) for axis in range(x.ndim)], constant_values=value)

    padded = jax.tree.map(lambda x: pad(x, 0), slot)
    return padded._replace(pos=pad(slot.pos, EMPTY))


def _spread(x_BKS: jax.Array, like: jax.Array) -> jax.Array:
    """[B, K, S] as [B, K, S, 1] where `like` has a last axis of numbers."""
    return x_BKS if like.ndim == x_BKS.ndim else x_BKS[..., None]
