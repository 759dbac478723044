"""One token of every row through the model, on the cache: the exact token-by-token semantics of every map."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lckv_jax.config import ModelConfig
from lckv_jax.decode.cache import Cache, append, commit, next_positions, read
from lckv_jax.decode.spec import SlotSpec
from lckv_jax.model.attention import rotate, wider
from lckv_jax.model.layers import (
    KV,
    Context,
    OutputsFirst,
    Params,
    make_context,
    mlp,
    product,
    project_out,
    project_q,
    rms_norm,
)
from lckv_jax.model.transformer import head_matrix


class Weights(NamedTuple):
    """Parameters as a decoder reads them: one array each, in the compute dtype, so that no step slices a stack.

    layers: of each layer. Matrices of the same input are one: gate and up as gate_up, and an owner's wq, wk and wv as
    wqkv, [N + 2K, H, D], its biases as bqkv; so one product and one norm serve queries, keys and values.
    head: None where it is the embedding, which is then there once.
    """

    embed_VD: jax.Array
    layers: tuple[Params, ...]
    final_norm_D: jax.Array
    head: OutputsFirst | None


_INPUTS = {"wq": 1, "wo": 2, "wk": 1, "wv": 1, "gate": 1, "up": 1, "down": 1}  # axes of inputs, the first ones
_JOINED = {"gate_up": ("gate", "up"), "wqkv": ("wq", "wk", "wv"), "bqkv": ("bq", "bk", "bv")}


def decode_weights(params: Params, config: ModelConfig) -> Weights:
    """The parameters taken apart by layers, matrices and biases cast to the compute dtype; norms stay as they are."""
    owners = config.sharing.owners

    def own(name: str, x: jax.Array) -> jax.Array | OutputsFirst:
        if name.endswith("norm"):
            return x
        x = x.astype(config.dtype)
        inputs = _INPUTS.get(name)
        return x if inputs is None else OutputsFirst(jnp.moveaxis(x, range(inputs), range(-inputs, 0)))

    def entry(layer: int) -> Params:
        p: Params = {name: own(name, x[layer]) for name, x in params["layers"].items()}
        if layer in owners:
            p |= {name: own(name, x[owners.index(layer)]) for name, x in params["kv"].items()}
        for joined, names in _JOINED.items():
            if all(name in p for name in names):
                p[joined] = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *(p.pop(name) for name in names))
        return p

    layers = tuple(entry(layer) for layer in range(config.num_layers))
    head = None if config.tie_embeddings else OutputsFirst(head_matrix(params, config).T)
    return Weights(params["embed"].astype(config.dtype), layers, params["final_norm"], head)


def apart(config: ModelConfig, p: Params) -> Params:
    """A layer's parameters with the matrices and biases of wqkv and bqkv as their own, where it has these.

    For prompts, which need an owner's keys and values without its queries; cut where they are used, so that no copy of
    all layers is made.
    """
    heads = (config.num_heads, config.num_heads + config.num_kv_heads)
    p = dict(p)
    for joined in ("wqkv", "bqkv"):
        if joined in p:
            leaves, tree = jax.tree.flatten(p.pop(joined))
            p |= {name: tree.unflatten([part]) for name, part in zip(_JOINED[joined], jnp.split(leaves[0], heads))}
    return p


def project_qkv(config: ModelConfig, p: Params, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, KV]:
    """An owner's rotated queries [B, T, N, H], and its K,V: `project_q` and `project_kv` in one product."""
    qkv = product(rms_norm(x_BTD, p["attn_norm"], config.norm_eps), p["wqkv"])
    if config.attention_bias:
        qkv = qkv + p["bqkv"][None, None]
    qk, v = jnp.split(qkv, [config.num_heads + config.num_kv_heads], axis=2)
    q, k = jnp.split(rotate(qk, context.cos, context.sin), [config.num_heads], axis=2)
    return q, KV(k, v)


def decode_step(
    weights: Weights,
    config: ModelConfig,
    specs: tuple[SlotSpec, ...],
    cache: Cache,
    tokens_B: jax.Array,
    live_B: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Logits [B, V] of what follows `tokens_B`, in float32 or wider, and the cache with these tokens.

    Layers run from the lowest to the highest, and an owner appends when it runs: a layer below it reads strictly
    earlier tokens, as upward layers shall, and it and those above read this one too. No slot gives up a token before
    all have read it. Rows that are not live append nothing, and their logits mean nothing.
    """
    sharing, spec_of = config.sharing, dict(zip(config.sharing.owners, specs))
    pos_B = next_positions(cache)
    context = make_context(config, pos_B[:, None], None)
    x = weights.embed_VD[tokens_B][:, None].astype(config.dtype)
    slots, masses = dict(cache.slots), {owner: [] for owner in sharing.owners}

    def reads(layer: int, q_BTNH: jax.Array) -> jax.Array:
        source = sharing.sources[layer]
        strict = sharing.upward[layer] or config.strict_everywhere
        window = config.window if sharing.windowed[layer] else None
        of_source = config, spec_of[source], slots[source]
        out, mass = read(*of_source, q_BTNH, context.pos_BT, strict=strict, window=window)
        masses[source] += [] if mass is None else [mass]
        return out

    for layer, p in enumerate(weights.layers):
        if layer in sharing.owners:
            q_BTNH, kv = project_qkv(config, p, x, context)
            slots[layer] = append(spec_of[layer], slots[layer], kv, cache.column, pos_B, live_B)
        else:
            q_BTNH = project_q(config, p, x, context)
        x = x + project_out(config, p, reads(layer, q_BTNH))
        x = x + mlp(config, p, x)
    for owner, mass in masses.items():
        slots[owner] = commit(spec_of[owner], slots[owner], reduce(add, mass) if mass else None, pos_B, live_B)
    x_BD = rms_norm(x, weights.final_norm_D, config.norm_eps)[:, 0]
    return head_logits(weights, x_BD), Cache(slots, cache.column + 1, cache.padding_B)


def head_logits(weights: Weights, x_BD: jax.Array) -> jax.Array:
    """Logits [B, V] in float32 or wider."""
    head_VD = weights.embed_VD if weights.head is None else weights.head.array
    return jnp.einsum("VD,BD->BV", head_VD, x_BD, preferred_element_type=wider(x_BD.dtype))


def step_bytes(weights: Weights) -> int:
    """Bytes of weights that one step reads: all but the embedding, of which it reads one row for each token, unless the
    head is the embedding."""
    tree: Any = weights if weights.head is None else weights._replace(embed_VD=None)
    return sum(x.nbytes for x in jax.tree.leaves(tree))
