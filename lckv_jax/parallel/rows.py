"""Which rows of a batch this process reads, and the arrays made of them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding


def local_rows(sharding: NamedSharding, batch_size: int) -> tuple[int, ...]:
    """The rows of a batch that devices of this process hold, ascending.

    They follow from the sharding alone: where an axis of the mesh that splits no rows spans processes, several
    processes read the same ones.
    """
    slices = sharding.addressable_devices_indices_map((batch_size, 1)).values()
    return tuple(sorted({row for index in slices if index is not None for row in range(batch_size)[index[0]]}))


def global_batch(
    sharding: NamedSharding, batch_size: int, rows: tuple[int, ...], batch: dict[str, np.ndarray]
) -> dict[str, jax.Array]:
    """Arrays [B, ...] of all processes, each of which gives its own `rows` of them, in that order."""
    place = {row: number for number, row in enumerate(rows)}

    def array(local: np.ndarray) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            return local[[place[row] for row in range(batch_size)[index[0]]]]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, shard)

    return jax.tree.map(array, batch)
