"""Masks, rotary embedding, and one `attend` in front of every kernel."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lckv_jax.model import kernels
from lckv_jax.model_config import RopeScaling


def wider(dtype: jnp.dtype) -> jnp.dtype:
    """float32, or `dtype` if that is wider: where norms, softmax, rotary tables and logits are computed."""
    return jnp.promote_types(dtype, jnp.float32)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, dtype: jnp.dtype) -> jax.Array:
    """Radians a position for each rotated pair, [H/2], in `dtype` (2104.09864; scaling as in Hugging Face's llama)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=dtype) / head_dim)
    if scaling is None:
        return frequencies
    if scaling.type == "linear":
        return frequencies / scaling.factor
    # llama3: long wavelengths are stretched by the factor, short ones kept, those between blended
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = jnp.clip(blend, 0.0, 1.0)
    return frequencies * (blend + (1.0 - blend) / scaling.factor)


def rope_tables(positions_BT: jax.Array, frequencies: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos, sin, each [B, T, 1, H/2], of the angles at the given positions."""
    angles = positions_BT[:, :, None, None].astype(frequencies.dtype) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x with each pair (i, i + H/2) rotated: halves, not interleaved pairs."""
    low, high = jnp.split(x_BTNH.astype(cos.dtype), 2, axis=-1)
    rotated = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def readable(
    q_pos_BT: jax.Array,
    k_pos_BS: jax.Array,
    q_seg_BT: jax.Array | None,
    k_seg_BS: jax.Array | None,
    *,
    strict: bool,
    window: int | None,
) -> jax.Array:
    """Which keys each query may read, boolean [B, T, S].

    Earlier positions of its own segment and, unless strict, its own; with a window w only the last w positions, itself
    included, so that a strict query reads w - 1. A key at position -1 is an empty cell.
    """
    q_pos, k_pos = q_pos_BT[:, :, None], k_pos_BS[:, None, :]
    mask = (k_pos >= 0) & (k_pos < q_pos if strict else k_pos <= q_pos)
    if window is not None:
        mask &= k_pos > q_pos - window
    if q_seg_BT is not None and k_seg_BS is not None:
        mask &= q_seg_BT[:, :, None] == k_seg_BS[:, None, :]
    return mask


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_pos_BT: jax.Array,
    k_pos_BS: jax.Array,
    q_seg_BT: jax.Array | None = None,
    k_seg_BS: jax.Array | None = None,
    strict: bool,
    window: int | None = None,
    plain: bool = False,
    backend: str = "xla",
) -> jax.Array:
    """Softmax attention of grouped query heads, [B, T, N, H] in the dtype of q.

    N is a multiple of K: query heads nG..nG+G-1 read K/V head n. Who may read what: see `readable`. A query with
    nothing to read gets exactly zeros. Softmax in float32 or wider.
    plain: the caller knows that both positions are 0..T-1 in every row and that there are no segments.
    backend: `xla` is the reference; `cudnn`, and `splash`, which has a condition of its own; `auto` as in
    `kernels.choose_backend`. Raises UserError for a backend that cannot serve, with the setting to change.
    """
    if (q_seg_BT is None) != (k_seg_BS is None):
        raise ValueError("give segments for both queries and keys, or for neither")
    (_, T, _, H), S = q_BTNH.shape, k_BSKH.shape[1]
    if plain and (T != S or q_seg_BT is not None):
        raise ValueError("plain attention is that of one text a row to itself")
    if backend != "xla":
        backend, _ = kernels.resolve(backend, kernels.Call(kernels.local_platform(), q_BTNH.dtype.name, H, T, S))
    if backend == "splash":
        documents_BT = None if plain else jnp.zeros_like(q_pos_BT) if q_seg_BT is None else q_seg_BT
        if documents_BT is not None:
            documents_BT = jnp.where(q_pos_BT >= 0, documents_BT, kernels.PADDING)
        return kernels.splash(q_BTNH, k_BSKH, v_BSKH, documents_BT, strict=strict, window=window)
    if backend == "cudnn" and plain:
        return kernels.cudnn(q_BTNH, k_BSKH, v_BSKH, None, strict=strict, window=window)
    mask_BTS = readable(q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS, strict=strict, window=window)
    if backend == "cudnn":
        return kernels.cudnn(q_BTNH, k_BSKH, v_BSKH, mask_BTS, strict=strict, window=window)
    return checkpoint_name(_attend_xla(q_BTNH, k_BSKH, v_BSKH, mask_BTS), kernels.SAVED)


def _attend_xla(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """The reference: all logits at once."""
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    return attend_cells(q_BTNH, k_BKSH, v_BKSH, mask_BTS[:, None])


class First(NamedTuple):
    """Queries [B, T, N, H] that stand in for the others at the first `cells` cells."""

    cells: int
    q_BTNH: jax.Array


def attend_cells(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    mask_BKTS: jax.Array,
    *,
    k_scale_BKS: jax.Array | None = None,
    v_scale_BKS: jax.Array | None = None,
    first: First | None = None,
) -> jax.Array:
    """The reference attention on keys and values as a cache holds them, heads before cells; [B, T, N, H].

    mask_BKTS: which cells each query may read; K may be 1. Scales, where given, multiply the keys and values of a cell,
    which may then be integers. A query with nothing to read gets exactly zeros. Softmax in float32 or wider.
    """
    softmax = _softmax(q_BTNH, k_BKSH, mask_BKTS, k_scale_BKS, first)
    return _values(softmax, v_BKSH, v_scale_BKS, q_BTNH.dtype)


def attend_and_weigh(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    mask_BKTS: jax.Array,
    *,
    k_scale_BKS: jax.Array | None = None,
    v_scale_BKS: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`attend_cells`, and how much was read of each cell: probabilities summed over queries and their heads, [B, K, S],
    in float32 or wider."""
    softmax = _softmax(q_BTNH, k_BKSH, mask_BKTS, k_scale_BKS, None)
    return _values(softmax, v_BKSH, v_scale_BKS, q_BTNH.dtype), _mass(softmax)


def attention_mass(q_BTNH: jax.Array, k_BSKH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """How much queries read of each key: probabilities summed over queries and their heads, [B, K, S], in float32 or
    wider.

    mask_BTS: see `readable`. All logits at once: give long prompts in pieces of T.
    """
    return _mass(_softmax(q_BTNH, k_BSKH.swapaxes(1, 2), mask_BTS[:, None], None, None))


class _Softmax(NamedTuple):
    """Probabilities as weights [B, K, G, T, S] over their total [B, K, G, T], which is never 0."""

    weights: jax.Array
    total: jax.Array


def _softmax(
    q_BTNH: jax.Array, k_BKSH: jax.Array, mask_BKTS: jax.Array, k_scale_BKS: jax.Array | None, first: First | None
) -> _Softmax:
    (B, T, N, H), K = q_BTNH.shape, k_BKSH.shape[1]
    wide = wider(q_BTNH.dtype)

    def products(q: jax.Array, k: jax.Array) -> jax.Array:
        q = (q * H**-0.5).reshape(B, T, K, N // K, H)
        return jnp.einsum("BTKGH,BKSH->BKGTS", q, k.astype(q.dtype), preferred_element_type=wide)

    logits = products(q_BTNH, k_BKSH)
    if first is not None:
        theirs = products(first.q_BTNH, k_BKSH[:, :, : first.cells])
        logits = jnp.concatenate([theirs, logits[..., first.cells :]], axis=-1)
    if k_scale_BKS is not None:
        logits *= k_scale_BKS[:, :, None, None, :].astype(wide)
    mask = mask_BKTS[:, :, None]
    logits = jnp.where(mask, logits, jnp.finfo(wide).min)
    top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(logits - top), 0.0)
    total = weights.sum(axis=-1)
    return _Softmax(weights, jnp.where(total == 0.0, 1.0, total))  # nothing to read: zeros over one


def _mass(softmax: _Softmax) -> jax.Array:
    return (softmax.weights / softmax.total[..., None]).sum(axis=(2, 3))


def _values(softmax: _Softmax, v_BKSH: jax.Array, v_scale_BKS: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """What is read of the values, [B, T, N, H]."""
    weights, total = softmax
    B, K, G, T, _ = weights.shape
    if v_scale_BKS is not None:
        weights = weights * v_scale_BKS[:, :, None, None, :].astype(weights.dtype)
    # the transposition apart: XLA's CPU backend refuses it within a bfloat16 product that gives float32
    out = jnp.einsum(
        "BKGTS,BKSH->BKGTH", weights.astype(dtype), v_BKSH.astype(dtype), preferred_element_type=total.dtype
    )
    out = jnp.einsum("BKGTH->BTKGH", out / total[..., None])
    return out.reshape(B, T, K * G, v_BKSH.shape[-1]).astype(dtype)
