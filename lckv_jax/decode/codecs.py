"""Codes of single tokens: keys and values of each head as integers with one scale (as MaxText stores its cache)."""

from __future__ import annotations

from functools import reduce
from operator import or_

import jax
import jax.numpy as jnp

from lckv_jax.model.attention import wider

_LARGEST = {"int8": 127, "int4": 7}  # codes are symmetric around 0
_ZERO = 8  # what stands for 0 in a packed code of 4 bits


def encode(codec: str, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """x [..., H] as codes, and scales [...], such that x = codes * scale to half a scale; zeros have scale 1.

    raw: x itself, without a scale. int4: two codes a byte, see `decoded`.
    """
    if codec == "raw":
        return x, None
    x = x.astype(wider(x.dtype))
    scale = jnp.max(jnp.abs(x), axis=-1) / _LARGEST[codec]
    scale = jnp.where(scale == 0.0, 1.0, scale)
    codes = jnp.round(x / scale[..., None]).astype(jnp.int8)
    return (pack((codes + _ZERO).astype(jnp.uint8), 4) if codec == "int4" else codes), scale


def decoded(codec: str, codes: jax.Array, size: int) -> jax.Array:
    """The numbers [..., size] whose product with their scale `encode` stands for: int8 where there are codes."""
    return unpack(codes, 4, size).astype(jnp.int8) - _ZERO if codec == "int4" else codes


def token_bytes(codec: str, heads: int, head_dim: int, dtype: str) -> int:
    """Bytes of the keys and values of one token in one slot, with their scales."""
    size = jnp.dtype(dtype)
    if codec == "raw":
        return 2 * heads * head_dim * size.itemsize
    a_head = head_dim if codec == "int8" else -(-head_dim // 2)
    return 2 * heads * (a_head + wider(size).itemsize)


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Codes [..., H], uint8 below 2^bits, as W bytes [..., ceil(H * bits / 8)].

    Byte i holds the codes i, i + W, i + 2W, ..., the first in the lowest bits: so `unpack` joins rows, and need not put
    codes between each other.
    """
    each = 8 // bits
    more = -codes.shape[-1] % each
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, more)])
    return reduce(or_, (part << bits * i for i, part in enumerate(jnp.split(codes, each, axis=-1))))


def unpack(packed: jax.Array, bits: int, size: int) -> jax.Array:
    """The codes [..., size] in `pack`'s bytes."""
    parts = [(packed >> shift) & jnp.uint8(2**bits - 1) for shift in range(0, 8, bits)]
    return jnp.concatenate(parts, axis=-1)[..., :size]
