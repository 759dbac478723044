"""Cross entropy over chunks of positions, so that B x T x V logits never exist."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lckv_jax.config import ModelConfig
from lckv_jax.model.attention import wider
from lckv_jax.model.axes import batch_parts, constrain, gathered
from lckv_jax.model.layers import Params
from lckv_jax.model.refine import Passes
from lckv_jax.model.transformer import Hidden, head_matrix, hidden_states

IGNORED = -100


def loss(
    params: Params,
    config: ModelConfig,
    tokens_BT: jax.Array,
    labels_BT: jax.Array | None = None,
    *,
    segment_ids_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    no_grad_passes: int | jax.Array | None = None,
    grad_passes: int | None = None,
) -> jax.Array:
    """Mean of -log p(next token) over the labels in columns 1..T-1 that are not -100; Hugging Face's shifted loss.

    labels_BT: the tokens themselves if not given. The other arguments as in `transformer.forward`.
    """
    batch = {"tokens": tokens_BT, "labels": tokens_BT if labels_BT is None else labels_BT}
    if segment_ids_BT is not None:
        batch["segment_ids"] = segment_ids_BT
    if positions_BT is not None:
        batch["positions"] = positions_BT
    total, aux = loss_sum(params, config, batch, no_grad_passes=no_grad_passes, grad_passes=grad_passes)
    return total / jnp.maximum(aux["count"], 1)


def loss_sum(
    params: Params,
    config: ModelConfig,
    batch: dict[str, jax.Array],
    *,
    no_grad_passes: int | jax.Array | None = None,
    grad_passes: int | None = None,
    chunk: int = 256,
    z_loss: float = 0.0,
) -> tuple[jax.Array, dict[str, Any]]:
    """The summed loss of a batch of arrays [B, T+1], and {count, nll, passes, residual}, which carry no gradient.

    The model runs on columns 0..T-1 against the labels of columns 1..T.
    count: labels that are not -100. nll: the sum without the z-loss term z_loss * logsumexp^2 (2204.02311, 5).
    chunk: positions of a row whose logits exist at once.
    """
    hidden, labels_BT = _shifted(params, config, batch, no_grad_passes=no_grad_passes, grad_passes=grad_passes)
    head = gathered(head_matrix(params, config), "DV")  # once, not in every chunk
    total, nll = _cross_entropy(hidden.x_BTD, head, labels_BT, _fitting(chunk, labels_BT), z_loss)
    count = jnp.sum(labels_BT != IGNORED)
    return total, {"count": count, "nll": nll, "passes": hidden.passes, "residual": hidden.residual}


def token_nll(
    params: Params, config: ModelConfig, batch: dict[str, jax.Array], *, passes: Passes, chunk: int = 256
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """-log p of every label in columns 1..T of a batch of arrays [B, T+1], and {passes, residual} of each row.

    The first is [B, T] in float32 or wider, 0 where the label is -100. passes: see `refine.stop_rule`. For inference:
    carries no gradient. chunk: positions of a row whose logits exist at once.
    """
    hidden, labels_BT = _shifted(params, config, batch, passes=passes)
    head = constrain(head_matrix(params, config), "DV")
    xs = _chunks(hidden.x_BTD, labels_BT, _fitting(chunk, labels_BT))
    nll = jax.lax.map(lambda chunk: _chunk_logits(chunk[0], chunk[1], head).nll_BT, xs)  # [chunks, B, chunk]
    nll_BT = nll.swapaxes(0, 1).reshape(labels_BT.shape[0], -1)[:, : labels_BT.shape[1]]
    return nll_BT, {"passes": hidden.passes, "residual": hidden.residual}


def _shifted(
    params: Params, config: ModelConfig, batch: dict[str, jax.Array], **passes: Any
) -> tuple[Hidden, jax.Array]:
    """What the model makes of columns 0..T-1, and the labels of columns 1..T: the shift by one happens only here."""
    if batch["tokens"].shape[1] < 2:
        raise ValueError("the loss needs rows of at least 2 tokens: there is no next token in a row of 1")
    hidden = hidden_states(
        params,
        config,
        batch["tokens"][:, :-1],
        segment_ids_BT=_without_last(batch.get("segment_ids")),
        positions_BT=_without_last(batch.get("positions")),
        **passes,
    )
    return hidden, batch["labels"][:, 1:]


def _without_last(x_BT: jax.Array | None) -> jax.Array | None:
    return None if x_BT is None else x_BT[:, :-1]


def _fitting(chunk: int, labels_BT: jax.Array) -> int:
    return min(chunk, -(-labels_BT.shape[1] // 2))  # at least two chunks: never all logits at once


def _chunked_cross_entropy(
    x_BTD: jax.Array, head_DV: jax.Array, labels_BT: jax.Array, chunk: int, z_loss: float
) -> tuple[jax.Array, jax.Array]:
    """(summed loss with z-loss, summed loss without, which carries no gradient), float32 or wider."""

    def step(carry: tuple, xs: tuple) -> tuple[tuple, None]:
        x, labels = xs
        total, nll, _ = _chunk_loss(x, labels, head_DV, z_loss)
        return (carry[0] + total, carry[1] + nll), None

    zero = jnp.zeros((), wider(x_BTD.dtype))
    return jax.lax.scan(step, (zero, zero), _chunks(x_BTD, labels_BT, chunk))[0]


class _Logits(NamedTuple):
    """The logits of one chunk, where its labels are, which labels count, log-sum-exp and -log p (0: not counted)."""

    logits_BTV: jax.Array
    label_BTV: jax.Array
    valid_BT: jax.Array
    normalizer_BT: jax.Array
    nll_BT: jax.Array


def _chunk_logits(x_BTD: jax.Array, labels_BT: jax.Array, head_DV: jax.Array) -> _Logits:
    wide = wider(x_BTD.dtype)
    logits = constrain(jnp.einsum("BTD,DV->BTV", x_BTD, head_DV, preferred_element_type=wide), "BTV")
    label = labels_BT[:, :, None] == jnp.arange(head_DV.shape[1])[None, None, :]
    valid = (labels_BT != IGNORED).astype(wide)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    nll = valid * (normalizer - jnp.sum(jnp.where(label, logits, 0.0), axis=-1))
    return _Logits(logits, label, valid, normalizer, nll)


def _chunk_loss(
    x_BTD: jax.Array, labels_BT: jax.Array, head_DV: jax.Array, z_loss: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Summed loss with and without z-loss over one chunk, and the gradient of the first for its logits [B, T, V]."""
    logits, label, valid, normalizer, nll = _chunk_logits(x_BTD, labels_BT, head_DV)
    z_term = z_loss * valid * jnp.square(normalizer)
    probabilities = jnp.exp(logits - normalizer[:, :, None])
    grad = probabilities * (1.0 + 2.0 * z_loss * normalizer)[:, :, None] - label
    return jnp.sum(nll + z_term), jnp.sum(nll), grad * valid[:, :, None]


def _chunks(x_BTD: jax.Array, labels_BT: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """[chunks, B, chunk, D] and [chunks, B, chunk]; the last chunk is filled with ignored labels."""
    B, T, D = x_BTD.shape
    missing = -T % chunk
    x = jnp.pad(x_BTD, ((0, 0), (0, missing), (0, 0))).reshape(B, -1, chunk, D)
    labels = jnp.pad(labels_BT, ((0, 0), (0, missing)), constant_values=IGNORED).reshape(B, -1, chunk)
    return x.swapaxes(0, 1), labels.swapaxes(0, 1)


def _forward_with_gradients(
    x_BTD: jax.Array, head_DV: jax.Array, labels_BT: jax.Array, chunk: int, z_loss: float
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """The loss and its gradients in one sweep: logits are computed once, not again in the backward pass.

    Each device sums the head's gradient of its rows over all chunks; only then are these sums added up.
    """
    wide, parts = wider(x_BTD.dtype), batch_parts(x_BTD.shape[0])

    def step(carry: tuple, xs: tuple) -> tuple[tuple, jax.Array]:
        x, labels = xs
        total, nll, grad = _chunk_loss(x, labels, head_DV, z_loss)
        grad = grad.astype(x.dtype)
        grad_x = jnp.einsum("BTV,DV->BTD", grad, head_DV)
        x_PBTD, grad_PBTV = (y.reshape(parts, -1, *y.shape[1:]) for y in (x, grad))
        grad_head = jnp.einsum("PBTD,PBTV->PDV", x_PBTD, grad_PBTV, preferred_element_type=wide)
        return (carry[0] + total, carry[1] + nll, constrain(carry[2] + grad_head, "PDV")), grad_x

    zero = jnp.zeros((), wide)
    start = (zero, zero, constrain(jnp.zeros((parts, *head_DV.shape), wide), "PDV"))
    (total, nll, grad_head), grad_x = jax.lax.scan(step, start, _chunks(x_BTD, labels_BT, chunk))
    B, T, D = x_BTD.shape
    return (total, nll), (grad_x.swapaxes(0, 1).reshape(B, -1, D)[:, :T], grad_head.sum(axis=0))


def _scale_gradients(
    chunk: int, z_loss: float, gradients: tuple[jax.Array, jax.Array], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None]:
    """Scaled in the wide dtype: a mean's 1/count has no exact bfloat16."""
    grad_x, grad_head = gradients
    dtype, scale = grad_x.dtype, cotangents[0]
    return (grad_x.astype(scale.dtype) * scale).astype(dtype), (grad_head * scale).astype(dtype), None


_cross_entropy = jax.custom_vjp(_chunked_cross_entropy, nondiff_argnums=(3, 4))
_cross_entropy.defvjp(_forward_with_gradients, _scale_gradients)
