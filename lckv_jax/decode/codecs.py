"""Codes of single tokens: keys and values of each head as integers with one scale (as MaxText stores its cache)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lckv_jax.model.attention import wider

CODE_BYTES = {"raw": 0.0, "int8": 1.0, "int4": 0.5}  # of one number; raw: of the compute dtype
_LARGEST = {"int8": 127, "int4": 7}  # codes are symmetric around 0


def encode(codec: str, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """x [..., H] = codes * scale [...], to half a scale; a token of zeros has scale 1.

    raw: x itself, without a scale.
    """
    if codec == "raw":
        return x, None
    x = x.astype(wider(x.dtype))
    scale = jnp.max(jnp.abs(x), axis=-1) / _LARGEST[codec]
    scale = jnp.where(scale == 0.0, 1.0, scale)
    return jnp.round(x / scale[..., None]).astype(codec), scale


def token_bytes(codec: str, heads: int, head_dim: int, dtype: str) -> int:
    """Bytes of the keys and values of one token in one slot, with their scales."""
    numbers, size = 2 * heads * head_dim, jnp.dtype(dtype)
    if codec == "raw":
        return numbers * size.itemsize
    return int(numbers * CODE_BYTES[codec]) + 2 * heads * wider(size).itemsize
