"""Norm, MLP, one layer, one run of layers, and the K/V projection of an owner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lckv_jax.config import ModelConfig
from lckv_jax.model.attention import attend, rope_frequencies, rope_tables, rotate, wider
from lckv_jax.model.axes import constrain
from lckv_jax.model.kernels import save_attention
from lckv_jax.sharing import Run

Params = dict[str, Any]


class KV(NamedTuple):
    """Keys (rotated at their own positions) and values of one slot."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What every layer needs to know of the tokens: positions (-1 = padding), segments, rotary tables.

    plain: whether it is known, while tracing, that every row is one text with the positions 0..T-1.
    """

    pos_BT: jax.Array
    seg_BT: jax.Array | None
    cos: jax.Array
    sin: jax.Array
    plain: bool = field(default=False, metadata={"static": True})


class Stack(NamedTuple):
    """The parameters of one run in the compute dtype, arrays [layers of the run, ...]; kv: those that owners need for
    their K,V."""

    layers: Params
    kv: Params | None


def make_context(config: ModelConfig, pos_BT: jax.Array, seg_BT: jax.Array | None, *, plain: bool = False) -> Context:
    """The context of tokens at the given positions, with rotary tables in float32 or the wider compute dtype."""
    dtype = wider(jnp.dtype(config.dtype))
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, dtype)
    return Context(pos_BT, seg_BT, *rope_tables(pos_BT, frequencies), plain)


def take_stack(params: Params, config: ModelConfig, run: Run) -> Stack:
    """The run's slice of the stacked parameters, matrices cast to the compute dtype."""

    def slices(group: Params, start: int, stop: int) -> Params:
        return {
            name: x[start:stop] if name.endswith("norm") else x[start:stop].astype(config.dtype)
            for name, x in group.items()
        }

    kv = None
    if run.owners:
        slot = config.sharing.owners.index(run.start)
        kv = slices(params["kv"], slot, slot + run.stop - run.start)
        kv["attn_norm"] = params["layers"]["attn_norm"][run.start : run.stop]
    return Stack(slices(params["layers"], run.start, run.stop), kv)


def rms_norm(x_BTD: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * weight (1910.07467), computed in float32 or wider, returned in x's dtype."""
    x = x_BTD.astype(wider(x_BTD.dtype))
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return (x * weight_D[None, None, :].astype(x.dtype)).astype(x_BTD.dtype)


def project_kv(config: ModelConfig, p: Params, x_BTD: jax.Array, context: Context) -> KV:
    """The K,V that an owner computes from its input: attn_norm, projections, rotary embedding of the keys.

    p: attn_norm [D], wk and wv [D, K, H], and bk and bv [K, H] where the model has attention biases.
    """
    h = rms_norm(x_BTD, p["attn_norm"], config.norm_eps)
    k, v = product(h, p["wk"]), product(h, p["wv"])
    if config.attention_bias:
        k, v = k + p["bk"][None, None], v + p["bv"][None, None]
    return KV(rotate(k, context.cos, context.sin), v)


class OutputsFirst(NamedTuple):
    """A matrix with the axes of its outputs before those of its inputs: [N, H, D] for wq, [D, N, H] for wo.

    A decoder keeps its weights so: read row by row, a few tokens' products run nearer to the memory's speed.
    """

    array: jax.Array


def product(x: jax.Array, matrix: jax.Array | OutputsFirst, inputs: int = 1) -> jax.Array:
    """x [B, T, inputs...] times a matrix [inputs..., outputs...]: [B, T, outputs...]. inputs: how many axes."""
    last = tuple(range(x.ndim - inputs, x.ndim))
    if isinstance(matrix, OutputsFirst):
        w = matrix.array
        y = jax.lax.dot_general(w, x, ((tuple(range(w.ndim - inputs, w.ndim)), last), ((), ())))
        return jnp.moveaxis(y, (-2, -1), (0, 1))
    return jax.lax.dot_general(x, matrix, ((last, tuple(range(inputs))), ((), ())))


Read = Callable[[jax.Array], jax.Array]  # rotated queries [B, T, N, H] -> what they read, [B, T, N, H]


def attention(config: ModelConfig, p: Params, x_BTD: jax.Array, read: Read | None, context: Context) -> jax.Array:
    """The attention half of a layer, [B, T, D], without the residual.

    read: attends to the keys and values of the layer's source, wherever they are. None: there is nothing to read, so
    zeros enter wo and only its bias comes out.
    """
    if read is None:
        return jnp.broadcast_to(p["bo"][None, None], x_BTD.shape) if config.attention_bias else jnp.zeros_like(x_BTD)
    return project_out(config, p, read(project_q(config, p, x_BTD, context)))


def project_q(config: ModelConfig, p: Params, x_BTD: jax.Array, context: Context) -> jax.Array:
    """The rotated queries of a layer, [B, T, N, H]."""
    q = product(rms_norm(x_BTD, p["attn_norm"], config.norm_eps), p["wq"])
    if config.attention_bias:
        q = q + p["bq"][None, None]
    return rotate(q, context.cos, context.sin)


def project_out(config: ModelConfig, p: Params, out_BTNH: jax.Array) -> jax.Array:
    """What heads have read, [B, T, N, H], as [B, T, D]."""
    out = product(out_BTNH, p["wo"], inputs=2)
    return out + p["bo"][None, None] if config.attention_bias else out


def mlp(config: ModelConfig, p: Params, x_BTD: jax.Array) -> jax.Array:
    """The SwiGLU half of a layer (2002.05202), [B, T, D], without the residual.

    p: gate and up [D, F], or both as one matrix, outputs first, under the name gate_up.
    """
    h = rms_norm(x_BTD, p["mlp_norm"], config.norm_eps)
    if "gate_up" in p:
        gate, up = jnp.split(product(h, p["gate_up"]), 2, axis=2)
    else:
        gate, up = product(h, p["gate"]), product(h, p["up"])
    if config.mlp_bias:
        gate, up = gate + p["gate_bias"][None, None], up + p["up_bias"][None, None]
    out = product(jax.nn.silu(gate) * up, p["down"])
    return out + p["down_bias"][None, None] if config.mlp_bias else out


def layer(
    config: ModelConfig,
    run: Run,
    context: Context,
    reads: KV | None,
    x_BTD: jax.Array,
    p: tuple[Params, Params | None],
) -> tuple[jax.Array, KV | None]:
    """One layer of a run: its output [B, T, D] and, if it is an owner, its K,V.

    reads: the K,V of the run's source (None: nothing to read yet); not used where each layer reads its own.
    p: the layer's parameters, and those of its K/V projection if it is an owner.
    """
    own, own_kv = p
    kv = project_kv(config, own_kv, x_BTD, context) if own_kv is not None else None
    source = kv if run.source is None else reads
    read = None if source is None else partial(_read, config, run, context, source)
    x = x_BTD + attention(config, own, x_BTD, read, context)
    x = x + mlp(config, own, x)
    return constrain(x, "BTD"), kv


def _read(config: ModelConfig, run: Run, context: Context, kv: KV, q_BTNH: jax.Array) -> jax.Array:
    """Attention of all tokens to the K,V of the same tokens."""
    return attend(
        q_BTNH,
        *kv,
        q_pos_BT=context.pos_BT,
        k_pos_BS=context.pos_BT,
        q_seg_BT=context.seg_BT,
        k_seg_BS=context.seg_BT,
        strict=run.upward or config.strict_everywhere,
        window=config.window if run.windowed else None,
        plain=context.plain,
        backend=config.attention,
    )


def run_layers(
    config: ModelConfig, run: Run, stack: Stack, x_BTD: jax.Array, reads: KV | None, context: Context
) -> tuple[jax.Array, dict[int, KV]]:
    """All layers of a run, scanned or unrolled: their output, and the K,V of the owners among them by layer."""
    body, length = partial(layer, config, run, context, reads), run.stop - run.start
    x, kvs = x_BTD, []
    if config.scan_layers and length > 1:
        x, stacked = jax.lax.scan(_remat(config, body, scanned=True), x, (stack.layers, stack.kv))
        kvs = [jax.tree.map(itemgetter(i), stacked) for i in range(length)]
    else:
        body = _remat(config, body, scanned=False)
        for i in range(length):
            x, kv = body(x, jax.tree.map(itemgetter(i), (stack.layers, stack.kv)))
            kvs.append(kv)
    return x, {run.start + i: kv for i, kv in enumerate(kvs) if kv is not None}


_SAVEABLE = {
    "full": None,
    "attention": save_attention,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # those with weights; attention's have batch dims
}


def _remat(config: ModelConfig, body: Callable[..., Any], *, scanned: bool) -> Callable[..., Any]:
    """The body of a layer such that its backward pass recomputes what `config.remat` does not save."""
    if config.remat == "none":
        return body
    # XLA could undo it by sharing work between forward and backward pass, but not where each is a loop of its own
    return jax.checkpoint(body, policy=_SAVEABLE[config.remat], prevent_cse=not scanned)
