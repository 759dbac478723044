"""A slot of a budget: each K/V head keeps the tokens that were read most, and the last ones.

SnapKV (2404.14469) and PyramidKV (2406.02069) choose when the prompt ends, H2O (2306.14048) with every token. Keys stay
rotated at their own positions, so that the order of cells means nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lckv_jax.config import ModelConfig
from lckv_jax.decode.cells import EMPTY
from lckv_jax.decode.codecs import decoded, encode, token_bytes
from lckv_jax.decode.select import POOL, heaviest
from lckv_jax.decode.spec import BudgetSpec
from lckv_jax.model.attention import attend_and_weigh, attend_cells, readable
from lckv_jax.model.layers import KV

_NUMBER_BYTES = 4  # of a position, and of a score


class Budget(NamedTuple):
    """The K,V of one owner in S cells, in which each head has tokens of its own.

    k, v: [B, K, S, H], rotated keys and values, or their codes. k_scale, v_scale: [B, K, S], None where there are no
    codes. pos: [B, K, S] int32, EMPTY where there is no token. score: [B, K, S] float32, how much has been read of each
    token: probabilities summed over queries, their heads and layers; None unless it is needed after the prompt.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None
    v_scale: jax.Array | None
    pos: jax.Array
    score: jax.Array | None


def observed(spec: BudgetSpec, columns: int) -> int:
    """How many of the last query columns of a prompt the mass for `fill` is summed over."""
    return columns if spec.select == "h2o" else min(spec.recent, columns)


def fill(spec: BudgetSpec, kv: KV, pos_BT: jax.Array, mass_BKT: jax.Array) -> Budget:
    """The slot after prompts whose rotated keys and values are `kv`, [B, T, K, H], at `pos_BT`, padding in front.

    mass_BKT: how much the `observed` queries read of each token.
    """
    B, K, T = mass_BKT.shape
    if spec.cells < T:
        column_BKS = heaviest(mass_BKT, pos_BT >= 0, spec.cells, spec.recent, 1 if spec.select == "h2o" else POOL)
    else:
        column_BKS = jnp.broadcast_to(jnp.arange(T)[None, None], (B, K, T))
    pos = jnp.take_along_axis(jnp.broadcast_to(pos_BT[:, None], (B, K, T)), column_BKS, axis=2)
    there = pos != EMPTY
    column_BSK = column_BKS.swapaxes(1, 2)[..., None]
    k, v = (jnp.take_along_axis(x, column_BSK, axis=1).swapaxes(1, 2) for x in kv)
    k, v = (jnp.where(there[..., None], x, 0) for x in (k, v))  # what padding computes shall not even be there
    score = None
    if spec.select == "h2o":
        score = jnp.where(there, jnp.take_along_axis(mass_BKT, column_BKS, axis=2), 0).astype(jnp.float32)
    return grown(spec, _encode(spec.codec, k, v, pos)._replace(score=score))


def row_bytes(config: ModelConfig, spec: BudgetSpec) -> int:
    """Bytes of one row of the slot as they lie in memory: keys, values, scales, positions and scores."""
    scores = _NUMBER_BYTES * config.num_kv_heads if spec.select == "h2o" else 0
    return row_bytes_read(config, spec) + (spec.cells + spec.new) * scores


def row_bytes_read(config: ModelConfig, spec: BudgetSpec) -> int:
    """Bytes of one row that a layer reads: all but the scores."""
    a_token = token_bytes(spec.codec, config.num_kv_heads, config.head_dim, config.dtype)
    return (spec.cells + spec.new) * (a_token + _NUMBER_BYTES * config.num_kv_heads)


def append(spec: BudgetSpec, slot: Budget, kv: KV, column: jax.Array, pos_B: jax.Array, live_B: jax.Array) -> Budget:
    """The slot with one more token of each row, [B, 1, K, H], in each head's first empty cell; `column` means nothing.

    Rows that are not live get no token.
    """
    del column
    k, v = (x[:, 0] for x in kv)
    B, K, S = slot.pos.shape
    new = _encode(spec.codec, k, v, jnp.broadcast_to(pos_B[:, None], (B, K)))
    cell_BK = jnp.argmax(slot.pos == EMPTY, axis=2)
    cell_BK = jnp.where(live_B[:, None], cell_BK, S)  # past the end, where nothing is written
    cells = jnp.arange(B)[:, None], jnp.arange(K)[None], cell_BK

    def put(old: jax.Array, x: jax.Array) -> jax.Array:
        return old.at[cells].set(x, mode="drop", unique_indices=True)

    return jax.tree.map(put, slot._replace(score=None), new)._replace(score=slot.score)


def read(
    config: ModelConfig,
    spec: BudgetSpec,
    slot: Budget,
    q_BTNH: jax.Array,
    pos_BT: jax.Array,
    *,
    strict: bool,
    window: int | None,
) -> tuple[jax.Array, jax.Array | None]:
    """What queries at `pos_BT`, rotated there, read of the slot, [B, T, N, H]; and how much of each cell, [B, K, S], if
    the slot has scores.

    strict, window: of the layer that reads.
    """
    del config
    mask_BKTS = jax.vmap(lambda pos_BS: readable(pos_BT, pos_BS, None, None, strict=strict, window=window), 1, 1)(
        slot.pos
    )
    k, v = (decoded(spec.codec, x, q_BTNH.shape[-1]) for x in (slot.k, slot.v))
    arrays = q_BTNH, k, v, mask_BKTS
    if slot.score is None:
        return attend_cells(*arrays, k_scale_BKS=slot.k_scale, v_scale_BKS=slot.v_scale), None
    return attend_and_weigh(*arrays, k_scale_BKS=slot.k_scale, v_scale_BKS=slot.v_scale)


def commit(spec: BudgetSpec, slot: Budget, mass_BKS: jax.Array, pos_B: jax.Array, live_B: jax.Array) -> Budget:
    """The slot, with scores, after all layers have read at `pos_B`: in a full one, each head gives up a token.

    It is the one with the least score of those before the last `recent`; of equal ones that in the first cell.
    mass_BKS: how much all readers together read of each cell. Rows that are not live stay as they are.
    """
    assert slot.score is not None
    held = slot.pos != EMPTY
    score = jnp.where(held & live_B[:, None, None], slot.score + mass_BKS.astype(jnp.float32), slot.score)
    old = held & (slot.pos <= pos_B[:, None, None] - spec.recent)
    least_BK = jnp.argmin(jnp.where(old, score, jnp.inf), axis=2)
    cell_S = jnp.arange(slot.pos.shape[2])
    gone = held.all(axis=2)[..., None] & (cell_S[None, None] == least_BK[..., None])  # a row that is not live has room
    return slot._replace(pos=jnp.where(gone, EMPTY, slot.pos), score=jnp.where(gone, 0.0, score))


def grown(spec: BudgetSpec, slot: Budget) -> Budget:
    """The slot with as many cells as `spec` says, the new ones empty and last."""
    more = spec.cells + spec.new - slot.pos.shape[2]

    def pad(x: jax.Array, value: int) -> jax.Array:
        return jnp.pad(x, [(0, more if axis == 2 else 0) for axis in range(x.ndim)], constant_values=value)

    return jax.tree.map(lambda x: pad(x, 0), slot)._replace(pos=pad(slot.pos, EMPTY))


def _encode(codec: str, k: jax.Array, v: jax.Array, pos: jax.Array) -> Budget:
    (k, k_scale), (v, v_scale) = encode(codec, k), encode(codec, v)
    return Budget(k, v, k_scale, v_scale, pos, None)
