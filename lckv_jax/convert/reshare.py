"""A model with one sharing map -> the same model with another: copies or averages of its K/V projections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from lckv_jax.errors import UserError
from lckv_jax.model_config import ModelConfig
from lckv_jax.sharing import KVSharing

How = Literal["mean", "own"]


def reshare(
    params: Mapping[str, Any],
    config: ModelConfig,
    sharing: KVSharing | str | Sequence[int | str],
    how: How = "mean",
    num_kv_heads: int | None = None,
) -> tuple[dict[str, Any], ModelConfig]:
    """`params` and `config` of the model with the map `sharing`, and with `num_kv_heads` K/V heads where given.

    The K/V projection (weights and biases) of a new owner is the mean over its donors, the layers that read it in the
    new map, of the projection that each donor used in the old one (the official conversion, arXiv 2410.14442). With
    how="own" it is the owner's own: that which it computed in the old map, else that which it read.
    num_kv_heads divides the old number: each new head is the mean of so many consecutive old ones, those that served
    its query heads.
    params: numpy or jax arrays, also traced or sharded ones. Means of numpy arrays are taken in float64, those of jax
    arrays in float32 or wider; the result has the dtype of the leaf, and the mean of equal projections is that
    projection, bit for bit. All other leaves, and stacks that stay as they are, are the very arrays that were given.
    Raises UserError if the map is not one of this model's layers, or the heads do not divide, or `how` is unknown.
    """
    new = resharded_config(config, sharing, num_kv_heads)
    merged = config.num_kv_heads // new.num_kv_heads
    chosen = old_slots(config.sharing, new.sharing, how)
    kv = {name: _converted(stack, chosen, merged) for name, stack in params["kv"].items()}
    return {**params, "kv": kv}, new


def resharded_config(
    config: ModelConfig, sharing: KVSharing | str | Sequence[int | str], num_kv_heads: int | None = None
) -> ModelConfig:
    """The configuration that `reshare` gives; raises as it does."""
    heads = config.num_kv_heads if num_kv_heads is None else num_kv_heads
    if heads < 1 or config.num_kv_heads % heads:
        raise UserError(
            f"{config.num_kv_heads} K/V heads cannot be merged to {heads}: each new head is the mean of equally many "
            f"old ones; give a divisor of {config.num_kv_heads}"
        )
    return config.model_copy(
        update={"sharing": KVSharing.parse(sharing, config.num_layers), "num_kv_heads": heads},
    )


def old_slots(old: KVSharing, new: KVSharing, how: How) -> tuple[tuple[int, ...], ...]:
    """For each slot of the new map, the slots of the old one whose projections it is the mean of, a donor each."""
    if how not in get_args(How):
        raise UserError(f"how={how!r} is no way to convert K/V projections; use {' or '.join(get_args(How))}")
    if how == "own":
        own = {owner: slot for slot, owner in enumerate(old.owners)}
        return tuple((own.get(owner, old.slot_of[owner]),) for owner in new.owners)
    return tuple(tuple(old.slot_of[layer] for layer in new.donors(slot)) for slot in range(len(new.owners)))


def describe_change(old: ModelConfig, new: ModelConfig, how: How) -> str:
    """What `reshare` does from one to the other, in a line; empty where it does nothing."""
    told = []
    if new.sharing != old.sharing:
        told.append(f"map {old.sharing} -> {new.sharing}")
        used = old_slots(old.sharing, new.sharing, how)
        averaged = any(len(set(slots)) > 1 for slots in used)
        told.append("K/V projections averaged over the layers that read them" if averaged else "K/V projections copied")
        kept = {slot for slots in used for slot in slots}
        if dropped := [str(layer) for slot, layer in enumerate(old.sharing.owners) if slot not in kept]:
            told.append(f"dropped from layer{'s' * (len(dropped) > 1)} {', '.join(dropped)}")
    if new.num_kv_heads != old.num_kv_heads:
        told.append(f"{old.num_kv_heads} K/V heads averaged to {new.num_kv_heads}")
    return ", ".join(told)


def _converted(stack: Any, chosen: tuple[tuple[int, ...], ...], merged: int) -> Any:
    """The stack [C, ..., K, H] whose entry c is the mean of the given one's entries `chosen[c]`, its heads merged."""
    *rest, heads, size = stack.shape
    distinct = [slots[:1] if len(set(slots)) == 1 else slots for slots in chosen]
    if merged == 1 and distinct == [(slot,) for slot in range(len(stack))]:
        return stack
    groups = stack.reshape(*rest, heads // merged, merged, size)
    library = jnp if isinstance(stack, jax.Array) else np
    parts = [[groups[slot, ..., head, :] for slot in slots for head in range(merged)] for slots in distinct]
    return library.stack([_mean(arrays) for arrays in parts])


def _mean(arrays: list[Any]) -> Any:
    """The mean of equally shaped arrays."""
    dtype = arrays[0].dtype
    if len(arrays) == 1:
        return arrays[0]
    wide = np.promote_types(dtype, np.float32) if isinstance(arrays[0], jax.Array) else np.float64
    first = arrays[0].astype(wide)
    # by the distance from the first, so that equal arrays stay as they are, their -0.0 too
    return (first - sum(first - array.astype(wide) for array in arrays[1:]) / len(arrays)).astype(dtype)
