"""Fingerprints of arrays: one number of the bits of a leaf, the same on every mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lckv_jax.parallel import processes

_PIECE = 2**22  # elements


def describe_leaves(tree: Any) -> dict[str, list]:
    """For each leaf by path: dtype, shape and fingerprint, as JSON data. Waits for the leaves."""
    leaves = leaves_by_path(tree)
    processes.compile_together(_fingerprints, leaves)
    prints = jax.device_get(_fingerprints(leaves))
    return {path: [str(leaf.dtype), list(leaf.shape), int(prints[path])] for path, leaf in leaves.items()}


@jax.jit
def _fingerprints(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """In one program: processes that run several ones at once, each with its own sum over them, wait for each other."""
    return {path: fingerprint(leaf) for path, leaf in leaves.items()}


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, such as params.layers.wq."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def host_fingerprint(x: np.ndarray) -> int:
    """The `fingerprint` of an array in host memory, made in pieces, for as a whole it takes temporary memory."""
    flat = x.reshape(-1)
    pieces = [fingerprint(flat[i : i + _PIECE], np.uint32(i % 2**32)) for i in range(0, flat.size, _PIECE)]
    return sum(map(int, pieces)) % 2**32


@jax.jit
def fingerprint(x: jax.Array | np.ndarray, start: int | np.uint32 = 0) -> jax.Array:
    """One uint32 of the bits of `x` and their places.

    start: how many elements come before those of `x`, if it is one piece of something flat. The fingerprints of the
    pieces add up, modulo 2**32, to that of the whole.

    A sum of integers has no order, so the value does not depend on mesh, sharding or number of processes. Every term
    is a bijection of its element, so a change of one element never goes unnoticed.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)  # 8 bytes: a last axis of 2
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    place += jnp.uint32(start) * jnp.uint32(2 if x.dtype.itemsize == 8 else 1)
    mixed = (bits ^ (place * jnp.uint32(2654435761))) * jnp.uint32(3266489917)
    return jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32)
