"""The cache of a decoder: one slot for each owner, however many layers read it.

A slot's kind says what it keeps of the tokens and as what. Every kind has the same functions, in a file of its own.
In a step the owner appends, every reader reads, and when all have read, the slot is committed.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lckv_jax.config import ModelConfig
from lckv_jax.decode import budget, cells, kivi
from lckv_jax.decode.spec import BudgetSpec, CellsSpec, KiviSpec, SlotSpec
from lckv_jax.model.layers import KV

_KINDS: dict[type, ModuleType] = {CellsSpec: cells, KiviSpec: kivi, BudgetSpec: budget}


class Cache(NamedTuple):
    """slots: by owner. column: of the next token, int32 scalar. padding_B: columns in front of each row's first."""

    slots: dict[int, Any]
    column: jax.Array
    padding_B: jax.Array


def next_positions(cache: Cache) -> jax.Array:
    """The position of each row's next token, int32 [B]."""
    return cache.column - cache.padding_B


def observed(spec: SlotSpec, columns: int) -> int:
    """How many of the last query columns of a prompt the slot's mass is summed over (see `fill`); 0: it needs none."""
    return budget.observed(spec, columns) if isinstance(spec, BudgetSpec) else 0


def fill(
    specs: tuple[SlotSpec, ...], kvs: dict[int, KV], padding_B: jax.Array, mass: dict[int, jax.Array] | None = None
) -> Cache:
    """The cache after prompts whose K,V are `kvs`: arrays [B, T, K, H] by owner, keys rotated, padding in front.

    mass: how much the last `observed` queries of all readers read of each token, by owner: `attention_mass`, [B, K, T].
    Budgets need it.
    """
    columns = kvs[specs[0].owner].k_BSKH.shape[1]
    pos_BT = jnp.maximum(jnp.arange(columns, dtype=jnp.int32)[None] - padding_B[:, None], cells.EMPTY)
    slots = {}
    for spec in specs:
        if isinstance(spec, BudgetSpec):
            if mass is None:
                raise ValueError(f"the budget of layer {spec.owner} needs the mass of the prompt")
            slots[spec.owner] = budget.fill(spec, kvs[spec.owner], pos_BT, mass[spec.owner])
        else:
            slots[spec.owner] = _KINDS[type(spec)].fill(spec, kvs[spec.owner], pos_BT, padding_B)
    return Cache(slots, jnp.asarray(columns, jnp.int32), padding_B)


def empty(config: ModelConfig, specs: tuple[SlotSpec, ...], batch: int) -> Cache:
    """The cache of `batch` rows before their first token."""
    nothing = jnp.zeros((batch, 0, config.num_kv_heads, config.head_dim), config.dtype)
    mass = {spec.owner: jnp.zeros((batch, config.num_kv_heads, 0)) for spec in specs}
    return fill(specs, {spec.owner: KV(nothing, nothing) for spec in specs}, jnp.zeros(batch, jnp.int32), mass)


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
) -> tuple[jax.Array, jax.Array | None]:
    """What queries at `pos_BT`, rotated there, read of the slot, [B, T, N, H]; and how much of each cell, [B, K, S], if
    `commit` needs it.

    strict, window: of the layer that reads.
    """
    got = _KINDS[type(spec)].read(config, spec, slot, q_BTNH, pos_BT, strict=strict, window=window)
    return got if isinstance(spec, BudgetSpec) else (got, None)


def commit(spec: SlotSpec, slot: Any, mass_BKS: jax.Array | None, pos_B: jax.Array, live_B: jax.Array) -> Any:
    """The slot after the step at `pos_B`, once all have read: a budget may give up tokens.

    mass_BKS: what `read` said, summed over the readers.
    """
    if not isinstance(spec, BudgetSpec) or mass_BKS is None:
        return slot
    return budget.commit(spec, slot, mass_BKS, pos_B, live_B)


def grown(spec: SlotSpec, slot: Any) -> Any:
    """The slot with as much room as `spec` says, the new cells empty; one of constant size keeps its size."""
    return _KINDS[type(spec)].grown(spec, slot)


def bytes_held(config: ModelConfig, specs: tuple[SlotSpec, ...], batch: int) -> int:
    """Bytes of the cache of `batch` rows as they lie in memory: keys, values, scales, positions, scores."""
    return batch * sum(_KINDS[type(spec)].row_bytes(config, spec) for spec in specs)


def bytes_read_per_step(config: ModelConfig, specs: tuple[SlotSpec, ...], batch: int) -> int:
    """Bytes of the cache that one decoded token of each row reads: every layer reads its source's whole slot."""
    by_owner = {
        spec.owner: budget.row_bytes_read(config, spec)
        if isinstance(spec, BudgetSpec)
        else bytes_held(config, (spec,), 1)
        for spec in specs
    }
    return batch * sum(by_owner[source] for source in config.sharing.sources)
