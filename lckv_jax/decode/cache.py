"""The cache of a decoder: one slot for each owner, however many layers read it.

A slot's kind says what it keeps of the tokens and as what. Every kind has the same functions, in a file of its own.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lckv_jax.config import ModelConfig
from lckv_jax.decode import cells, kivi
from lckv_jax.decode.spec import CellsSpec, KiviSpec, SlotSpec
from lckv_jax.model.layers import KV

_KINDS: dict[type, ModuleType] = {CellsSpec: cells, KiviSpec: kivi}


class Cache(NamedTuple):
    """slots: by owner. column: of the next token, int32 scalar. padding_B: columns in front of each row's first."""

    slots: dict[int, Any]
    column: jax.Array
    padding_B: jax.Array


def next_positions(cache: Cache) -> jax.Array:
    """The position of each row's next token, int32 [B]."""
    return cache.column - cache.padding_B


def fill(specs: tuple[SlotSpec, ...], kvs: dict[int, KV], padding_B: jax.Array) -> Cache:
    """The cache after prompts whose K,V are `kvs`: arrays [B, T, K, H] by owner, keys rotated, padding in front."""
    columns = kvs[specs[0].owner].k_BSKH.shape[1]
    pos_BT = jnp.maximum(jnp.arange(columns, dtype=jnp.int32)[None] - padding_B[:, None], cells.EMPTY)
    slots = {spec.owner: _KINDS[type(spec)].fill(spec, kvs[spec.owner], pos_BT, padding_B) for spec in specs}
    return Cache(slots, jnp.asarray(columns, jnp.int32), padding_B)


def empty(config: ModelConfig, specs: tuple[SlotSpec, ...], batch: int) -> Cache:
    """The cache of `batch` rows before their first token."""
    nothing = jnp.zeros((batch, 0, config.num_kv_heads, config.head_dim), config.dtype)
    return fill(specs, {spec.owner: KV(nothing, nothing) for spec in specs}, jnp.zeros(batch, jnp.int32))


def append(spec: SlotSpec, slot: Any, kv: KV, column: jax.Array, pos_B: jax.Array, live_B: jax.Array) -> Any:
    """The slot with one more token of each row, [B, 1, K, H], at `column`; rows that are not live get no token."""
    return _KINDS[type(spec)].append(spec, slot, kv, column, pos_B, live_B)


def read(
    config: ModelConfig,
    spec: SlotSpec,
    slot: Any,
    q_BTNH: jax.Array,
    pos_BT: jax.Array,
    *,
    strict: bool,
    window: int | None,
) -> jax.Array:
    """What queries at `pos_BT`, rotated there, read of the slot, [B, T, N, H].

    strict, window: of the layer that reads.
    """
    return _KINDS[type(spec)].read(config, spec, slot, q_BTNH, pos_BT, strict=strict, window=window)


def grown(spec: SlotSpec, slot: Any) -> Any:
    """The slot with as much room as `spec` says, the new cells empty; one of constant size keeps its size."""
    return _KINDS[type(spec)].grown(spec, slot)


def bytes_held(config: ModelConfig, specs: tuple[SlotSpec, ...], batch: int) -> int:
    """Bytes of the cache of `batch` rows as they lie in memory: keys, values, scales and positions."""
    return batch * sum(_KINDS[type(spec)].row_bytes(config, spec) for spec in specs)


def bytes_read_per_step(config: ModelConfig, specs: tuple[SlotSpec, ...], batch: int) -> int:
    """Bytes of the cache that one decoded token of each row reads: every layer reads its source's whole slot."""
    by_owner = {spec.owner: bytes_held(config, (spec,), batch) for spec in specs}
    return sum(by_owner[source] for source in config.sharing.sources)
