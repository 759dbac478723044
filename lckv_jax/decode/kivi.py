"""A slot of KIVI (2402.02750): codes of 2 or 4 bits in blocks of tokens, and the newest tokens as they are.

Keys have outlier channels, so a group of keys is some tokens of one channel; values have none, so a group of values is
some channels of one token. The token at position t of a row has cell t modulo `cells`, both as a code and as a reader
counts: a row's groups start at its own first token, so that it does not depend on the padding that its batch needs.

A reader at position t reads as codes the keys before R floor(t/R) and the values before t - R, R = `residual`: as KIVI
does, which encodes after each step. Here `append` encodes, and what it encodes stays as it is beside its codes until
the next step, so that layers that read before the owner's append and after it agree on what is a code.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lckv_jax.config import ModelConfig
from lckv_jax.decode.codecs import pack, unpack
from lckv_jax.decode.spec import KiviSpec
from lckv_jax.model.attention import readable, wider
from lckv_jax.model.layers import KV

_NOWHERE = jnp.iinfo(jnp.int32).max  # a place outside every array


class Codes(NamedTuple):
    """Numbers as codes * scale + low; a scale and a low for each group.

    packed: see `pack`. scale, low: bfloat16 where the model computes in 16 bits, else float32.
    """

    packed: jax.Array
    scale: jax.Array
    low: jax.Array


class Kivi(NamedTuple):
    """The K,V of one owner, R = residual, S = cells, g = group, M = S / R blocks. What holds no token reads as zeros.

    k: rotated keys, packed [B, K, M, R, .], scale and low [B, K, M, R / g, H]. v: packed [B, K, S, .], scale and low
    [B, K, S, H / g]. k_raw: [B, K, R, H], position t in cell t modulo R. v_raw: [B, K, R + 1, H], t modulo R + 1.
    """

    k: Codes
    v: Codes
    k_raw: jax.Array
    v_raw: jax.Array


def fill(spec: KiviSpec, kv: KV, pos_BT: jax.Array, padding_B: jax.Array) -> Kivi:
    """The slot after prompts whose rotated keys and values are `kv`, [B, T, K, H], at `pos_BT`, padding in front."""
    k, v = (x.swapaxes(1, 2) for x in kv)
    length_B = pos_BT.shape[1] - padding_B
    R = spec.residual

    def tokens(x: jax.Array, at_BS: jax.Array) -> jax.Array:
        """x [B, K, T, H] at positions [B, S]; zeros before the first."""
        columns_BS = jnp.where(at_BS >= 0, at_BS + padding_B[:, None], x.shape[2])
        return jnp.take_along_axis(x, columns_BS[:, None, :, None], axis=2, mode="fill", fill_value=0)

    blocks_BM = _newest(length_B // R, spec.cells // R)
    block_tokens = (blocks_BM[..., None] * R + jnp.arange(R)[None, None]).reshape(-1, spec.cells)
    return Kivi(
        _encode_keys(spec, _blocks(tokens(k, block_tokens), R)),
        _encode_values(spec, tokens(v, _newest(jnp.maximum(length_B - R, 0), spec.cells))),
        tokens(k, _newest(length_B, R)),
        tokens(v, _newest(length_B, R + 1)),
    )


def row_bytes(config: ModelConfig, spec: KiviSpec) -> int:
    """Bytes of one row of the slot as they lie in memory: codes, scales, lows, and the tokens as they are."""
    size, H = jnp.dtype(config.dtype), config.head_dim
    codes = spec.cells * -(-H * spec.bits // 8)
    groups = spec.cells * H // spec.group * 2 * _stored(size).itemsize
    raw = (2 * spec.residual + 1) * H * size.itemsize
    return config.num_kv_heads * (2 * (codes + groups) + raw)


def append(spec: KiviSpec, slot: Kivi, kv: KV, column: jax.Array, pos_B: jax.Array, live_B: jax.Array) -> Kivi:
    """The slot with one more token of each row, [B, 1, K, H], at `pos_B`; rows that are not live get no token.

    What becomes a code: the value R tokens ago, and with the last token of a block the keys of the block.
    """
    del column  # rows write where their own positions say
    R, rows = spec.residual, jnp.arange(pos_B.shape[0])

    def put(old: jax.Array, new: jax.Array, place_B: jax.Array, when_B: jax.Array | bool = True) -> jax.Array:
        place_B = jnp.where(live_B & when_B, place_B, _NOWHERE)
        at = old.at[rows, :, place_B]
        return at.set(new, mode="drop", indices_are_sorted=True, unique_indices=True)

    k_raw = put(slot.k_raw, kv.k_BSKH[:, 0], pos_B % R)
    v_raw = put(slot.v_raw, kv.v_BSKH[:, 0], pos_B % (R + 1))
    # one block of each row is encoded in every step, and mostly dropped: a branch would make an accelerator wait
    block, block_ends_B = pos_B // R % (spec.cells // R), (pos_B + 1) % R == 0
    old_B = pos_B - R
    return Kivi(
        Codes(*(put(old, new, block, block_ends_B) for old, new in zip(slot.k, _encode_keys(spec, k_raw)))),
        Codes(
            *(
                put(old, new, old_B % spec.cells, old_B >= 0)
                for old, new in zip(slot.v, _encode_values(spec, v_raw[rows, :, old_B % (R + 1)]))
            )
        ),
        k_raw,
        v_raw,
    )


def read(
    config: ModelConfig,
    spec: KiviSpec,
    slot: Kivi,
    q_BTNH: jax.Array,
    pos_BT: jax.Array,
    *,
    strict: bool,
    window: int | None,
) -> jax.Array:
    """What one query a row, at `pos_BT` and rotated there, reads of the slot, [B, 1, N, H].

    strict, window: of the layer that reads. Softmax in float32 or wider over codes and raw tokens together.
    """
    B, T, N, H = q_BTNH.shape
    assert T == 1, "what is a code and what is not is that of one moment"
    K, R, S, wide = slot.k_raw.shape[1], spec.residual, spec.cells, wider(q_BTNH.dtype)
    limits = [limit for limit in (window, spec.window) if limit is not None]
    pos_B1 = pos_BT
    pos_BS, ring_BR = _newest(pos_B1[:, 0] + 1, S), _newest(pos_B1[:, 0] + 1, R + 1)
    mask = readable(pos_BT, pos_BS, None, None, strict=strict, window=min(limits) if limits else None)[:, None]

    q = (q_BTNH * H**-0.5).reshape(B, K, N // K, H)
    raw = jnp.einsum("BKGH,BKRH->BKGR", q, slot.k_raw, preferred_element_type=wide)
    codes = _key_products(spec, q, slot.k, wide)
    is_raw = (pos_BS >= pos_B1 // R * R)[:, None, None]
    logits = jnp.where(is_raw, jnp.tile(raw, S // R), codes)
    logits = jnp.where(mask, logits, jnp.finfo(wide).min)
    weights = jnp.where(mask, jnp.exp(logits - logits.max(axis=-1, keepdims=True)), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    total = jnp.where(total == 0.0, 1.0, total)  # nothing to read: zeros over one

    held = (ring_BR >= 0) & (ring_BR > pos_B1 - S)  # a window of no more than S tokens sees no older one
    recent = jnp.take_along_axis(weights, (ring_BR % S)[:, None, None], axis=-1)
    recent = jnp.where(held[:, None, None], recent, 0.0).astype(q.dtype)
    out = jnp.einsum("BKGR,BKRH->BKGH", recent, slot.v_raw, preferred_element_type=wide)
    out += _value_products(spec, jnp.where((pos_BS < pos_B1 - R)[:, None, None], weights, 0.0), slot.v, H, q.dtype)
    return (out / total).reshape(B, T, N, H).astype(q_BTNH.dtype)


def grown(spec: KiviSpec, slot: Kivi) -> Kivi:
    """The slot with as many cells as `spec` says, the new ones empty and last; a ring keeps its size."""

    def padded(codes: Codes, size: int) -> Codes:
        widths = [[(0, size - x.shape[2] if axis == 2 else 0) for axis in range(x.ndim)] for x in codes]
        return Codes(*(jnp.pad(x, more, constant_values=value) for x, more, value in zip(codes, widths, (0, 1, 0))))

    return slot._replace(k=padded(slot.k, spec.cells // spec.residual), v=padded(slot.v, spec.cells))


# ---------------------------------------------------------------- groups and codes


def _newest(count_B: jax.Array, size: int) -> jax.Array:
    """The newest of the first `count_B` numbers in each cell of a ring, int32 [B, size]; negative where there is none.

    Number n has cell n modulo `size`.
    """
    last = count_B[:, None] - 1
    return last - (last - jnp.arange(size)[None]) % size


def _blocks(x: jax.Array, size: int) -> jax.Array:
    """[B, K, S, H] as [B, K, S / size, size, H]."""
    return x.reshape(*x.shape[:2], -1, size, x.shape[-1])


def _encode_keys(spec: KiviSpec, k: jax.Array) -> Codes:
    """Keys [..., R, H] in groups of tokens."""
    grouped = k.reshape(*k.shape[:-2], -1, spec.group, k.shape[-1])
    codes, scale, low = _encode(spec.bits, grouped, axis=-2)
    return Codes(pack(codes.reshape(k.shape), spec.bits), scale, low)


def _encode_values(spec: KiviSpec, v: jax.Array) -> Codes:
    """Values [..., H] in groups of channels."""
    grouped = v.reshape(*v.shape[:-1], -1, spec.group)
    codes, scale, low = _encode(spec.bits, grouped, axis=-1)
    return Codes(pack(codes.reshape(v.shape), spec.bits), scale, low)


def _encode(bits: int, x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """uint8 codes of x, and the scale and low of each group along `axis`; a group of one number only has scale 1."""
    stored = _stored(x.dtype)
    x = x.astype(wider(x.dtype))
    low, high = x.min(axis=axis, keepdims=True), x.max(axis=axis, keepdims=True)
    scale = ((high - low) / (2**bits - 1)).astype(stored)
    scale = jnp.where(scale < jnp.finfo(stored).tiny, 1.0, scale).astype(stored)  # no division by what is flushed to 0
    low = low.astype(stored)
    codes = jnp.round(jnp.clip((x - low.astype(x.dtype)) / scale.astype(x.dtype), 0, 2**bits - 1))
    return codes.astype(jnp.uint8), scale.squeeze(axis), low.squeeze(axis)


def _stored(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.dtype(jnp.bfloat16 if jnp.dtype(dtype).itemsize == 2 else jnp.float32)


# ---------------------------------------------------------------- products with codes
# scales and lows are taken out of the sums, q.(c * scale + low) = (q * scale).c + q.low, so that the large operand of
# each product is codes, which layers that read the same slot may share


def _key_products(spec: KiviSpec, q_BKGH: jax.Array, k: Codes, wide: jnp.dtype) -> jax.Array:
    """q.k of all cells, [B, K, G, S]: products of the queries' dtype, summed in `wide`.

    In axes P is a group of C cells, so that S = P * C.
    """
    (B, K, G, H), dtype = q_BKGH.shape, q_BKGH.dtype
    codes_BKPCH = unpack(k.packed, spec.bits, H).reshape(B, K, -1, spec.group, H).astype(dtype)
    scale_BKPH, low_BKPH = (x.reshape(B, K, -1, H) for x in (k.scale, k.low))
    scaled_BKPGH = (q_BKGH[:, :, None] * scale_BKPH[:, :, :, None]).astype(dtype)
    out = jnp.einsum("BKPCH,BKPGH->BKGPC", codes_BKPCH, scaled_BKPGH, preferred_element_type=wide)
    lows = jnp.einsum("BKPH,BKGH->BKGP", low_BKPH.astype(dtype), q_BKGH, preferred_element_type=wide)
    return (out + lows[..., None]).reshape(B, K, G, -1)


def _value_products(spec: KiviSpec, weights_BKGS: jax.Array, v: Codes, H: int, dtype: jnp.dtype) -> jax.Array:
    """Sum of all cells' values with these weights, [B, K, G, H]: products of `dtype`, summed in the weights' dtype.

    In axes P is a group of C channels, so that H = P * C.
    """
    (B, K, G, _), wide, P = weights_BKGS.shape, weights_BKGS.dtype, H // spec.group
    codes_BKSH = unpack(v.packed, spec.bits, H).astype(dtype)
    scaled_BKGPS = (weights_BKGS[:, :, :, None] * v.scale.swapaxes(2, 3)[:, :, None]).astype(dtype)
    # all channels are summed with the scales of each group, and those of the group kept: so codes stay as they lie
    out = jnp.einsum("BKSH,BKGPS->BKGPH", codes_BKSH, scaled_BKGPS, preferred_element_type=wide)
    out = jnp.einsum("BKGPPC->BKGPC", out.reshape(B, K, G, P, P, spec.group))
    lows = jnp.einsum("BKSP,BKGS->BKGP", v.low.astype(dtype), weights_BKGS.astype(dtype), preferred_element_type=wide)
    return (out + lows[..., None]).reshape(B, K, G, H)
