"""Which rows of a batch this process reads, and the arrays made of them."""

from __future__ import annotations

from bisect import bisect_left
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding


@lru_cache(maxsize=8)  # asked in every step
def local_rows(sharding: NamedSharding, batch_size: int) -> tuple[int, ...]:
    """The rows of a batch that devices of this process hold, ascending.

    They follow from the sharding alone: where an axis of the mesh that splits no rows spans processes, several
    processes read the same ones.
    """
    slices = sharding.addressable_devices_indices_map((batch_size, 1)).values()
    return tuple(sorted({row for index in slices if index is not None for row in range(batch_size)[index[0]]}))


def global_batch(sharding: NamedSharding, batch_size: int, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Arrays [B, ...] of all processes, each of which gives its `local_rows` of them."""
    rows = local_rows(sharding, batch_size)

    def array(local: np.ndarray) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            first = bisect_left(rows, start)
            return local[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, shard)

    return jax.tree.map(array, batch)
