"""`describe`: what a configuration is and costs, without running it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from lckv_jax.config import ModelConfig, RunConfig
from lckv_jax.model.transformer import dim_sizes, parameter_dims
from lckv_jax.sharing import KVSharing


def count_parameters(config: ModelConfig) -> int:
    """The number of trained parameters."""
    sizes = dim_sizes(config)
    return sum(math.prod(sizes[dim] for dim in dims) for dims in jax.tree.leaves(parameter_dims(config)))


def describe(config: RunConfig) -> str:
    """The sharing map as a diagram, and the model's parameters, KV cache and FLOPs beside those of the standard map."""
    return "\n".join(_lines(config))


def _lines(config: RunConfig) -> Iterator[str]:
    model, seq_len = config.model, config.data.seq_len
    standard = model.model_copy(update={"sharing": KVSharing.parse("standard", model.num_layers)})
    yield f"sharing {model.sharing}"
    yield ""
    yield model.sharing.diagram()
    yield ""
    yield "[K,V] computes keys and values; ^ reads a layer above, v one below; +|+ layers solved together by passes"
    if model.sharing.cyclic:
        yield (
            f"passes over a cyclic span: m = {model.no_grad_passes} without and b = {model.grad_passes} with gradient, "
            f"start: {model.start}" + (f", until a change of {model.tolerance}" if model.tolerance else "")
        )
    itemsize = jnp.dtype(model.dtype).itemsize
    sizes = (model.num_kv_heads, model.head_dim, itemsize)
    flops, standard_flops = model.flops(seq_len), standard.flops(seq_len)
    rows = [
        ("parameters", count_parameters(model), count_parameters(standard)),
        ("layers with K,V", len(model.sharing.owners), model.num_layers),
        (
            f"KV cache, bytes a token ({model.dtype})",
            model.sharing.cache_bytes_per_token(*sizes),
            standard.sharing.cache_bytes_per_token(*sizes),
        ),
        ("training FLOPs a token", flops.train, standard_flops.train),
        ("prompt FLOPs a token", flops.forward, standard_flops.forward),
    ]
    yield f"{'at sequence length ' + str(seq_len):<34} {'this map':>14} {'standard':>14} {'ratio':>7}"
    for name, mine, theirs in rows:
        yield f"{name:<34} {mine:>14,.0f} {theirs:>14,.0f} {mine / theirs:>7.3f}"
