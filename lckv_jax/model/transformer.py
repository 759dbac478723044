"""The transformer: its parameters, declared by Flax NNX, and embed, spans in turn, norm, head."""

from __future__ import annotations

import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from lckv_jax.config import ModelConfig
from lckv_jax.errors import UserError
from lckv_jax.model.attention import wider
from lckv_jax.model.axes import constrain
from lckv_jax.model.layers import Params, make_context, rms_norm
from lckv_jax.model.refine import Passes, Slots, Stop, solve_rows, solve_span, stop_rule


def parameter_dims(config: ModelConfig) -> dict[str, str | dict[str, str]]:
    """The dims of every parameter, in the shape of the parameter tree; it does not depend on how the map is used."""
    layers = {
        "attn_norm": "LD",
        "wq": "LDNH",
        "wo": "LNHD",
        "mlp_norm": "LD",
        "gate": "LDF",
        "up": "LDF",
        "down": "LFD",
    }
    kv = {"wk": "CDKH", "wv": "CDKH"}
    if config.attention_bias:
        layers |= {"bq": "LNH", "bo": "LD"}
        kv |= {"bk": "CKH", "bv": "CKH"}
    if config.mlp_bias:
        layers |= {"gate_bias": "LF", "up_bias": "LF", "down_bias": "LD"}
    tree: dict[str, str | dict[str, str]] = {"embed": "VD", "layers": layers, "kv": kv, "final_norm": "D"}
    if not config.tie_embeddings:
        tree["head"] = "DV"
    return tree


def is_matrix(name: str) -> bool:
    """Whether the parameter of this name is a matrix, rather than a norm or a bias."""
    return not (name.endswith(("norm", "bias")) or name in ("bq", "bk", "bv", "bo"))


def dim_sizes(config: ModelConfig) -> dict[str, int]:
    """The size of each parameter dim."""
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "L": config.num_layers,
        "C": len(config.sharing.owners),
    }


class Parameters(nnx.Module):
    """A group of parameters: norms start at 1, biases at 0, everything else normal with `init_std`, in float32."""

    def __init__(self, config: ModelConfig, dims: dict, rngs: nnx.Rngs):
        sizes = dim_sizes(config)
        for name, entry in dims.items():
            if isinstance(entry, dict):
                setattr(self, name, Parameters(config, entry, rngs))
                continue
            if is_matrix(name):
                init = nnx.initializers.normal(config.init_std)
            else:
                init = nnx.initializers.ones if name.endswith("norm") else nnx.initializers.zeros
            shape = tuple(sizes[dim] for dim in entry)
            setattr(self, name, nnx.Param(init(rngs.params(), shape, jnp.float32)))


class Transformer(Parameters):
    """All parameters of the model. The mathematics are the functions below, on the plain dict of `init_params`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config, parameter_dims(config), rngs)


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Freshly initialised parameters as a plain dict tree (see design: stacked over layers)."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, nnx.Rngs(params=key))))


class Hidden(NamedTuple):
    """The normed last hidden state, every owner's K,V, and what the passes did.

    passes: the most passes made over a cyclic span (1 if the map has none). residual: the largest relative K,V change
    of the last pass, over all cyclic spans (0 if there is none). Scalars in training, [B] with `passes`.
    """

    x_BTD: jax.Array
    slots: Slots
    passes: jax.Array
    residual: jax.Array


def check_dtype(config: ModelConfig) -> None:
    """Raises UserError if jax would silently compute in less than the configured dtype."""
    if config.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise UserError("model.dtype=float64 needs JAX_ENABLE_X64=1 in the environment; set it, or use float32")


def hidden_states(
    params: Params,
    config: ModelConfig,
    tokens_BT: jax.Array,
    *,
    segment_ids_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    no_grad_passes: int | jax.Array | None = None,
    grad_passes: int | None = None,
    passes: Passes | Stop | None = None,
) -> Hidden:
    """Everything but the head. Arguments as in `forward`.

    passes: at inference, how often each row passes over a cyclic span (see `refine.stop_rule`), instead of the m + b
    passes of training; carries no gradient.
    """
    check_dtype(config)
    params, tokens_BT = jax.tree.map(jnp.asarray, (params, tokens_BT))  # numpy cannot be indexed by traced tokens
    no_grad_passes = config.no_grad_passes if no_grad_passes is None else no_grad_passes
    if not isinstance(no_grad_passes, Tracer):
        no_grad_passes = operator.index(no_grad_passes)
    grad_passes = config.grad_passes if grad_passes is None else max(grad_passes, 1)  # an official b = 0 means 1
    plain = positions_BT is None and segment_ids_BT is None
    if positions_BT is None:
        positions_BT = positions_in_segments(tokens_BT, segment_ids_BT)
    context = make_context(config, positions_BT, segment_ids_BT, plain=plain)
    x = constrain(_embedded(params["embed"], tokens_BT, config.dtype), "BTD")
    slots: Slots = {}
    rows = () if passes is None else (tokens_BT.shape[0],)
    used, residual = jnp.ones(rows, jnp.int32), jnp.zeros(rows, jnp.float32)
    for span in config.sharing.spans():
        if passes is None:
            solved = solve_span(params, config, span, x, slots, context, no_grad_passes, grad_passes)
        else:
            solved = solve_rows(params, config, span, x, slots, context, stop_rule(config, passes))
        x, slots = solved.x_BTD, {**slots, **solved.slots}
        used, residual = jnp.maximum(used, solved.passes), jnp.maximum(residual, solved.residual)
    return Hidden(rms_norm(x, params["final_norm"], config.norm_eps), slots, used, residual)


def _lookup(embed_VD: jax.Array, tokens_BT: jax.Array, dtype: str) -> jax.Array:
    """Rows of the embedding in `dtype`. Gathered over fsdp first: a lookup in a split width would replicate."""
    return constrain(embed_VD.astype(dtype), "VD")[tokens_BT]


def _lookup_and_saved(embed_VD: jax.Array, tokens_BT: jax.Array, dtype: str) -> tuple[jax.Array, tuple]:
    return _lookup(embed_VD, tokens_BT, dtype), (embed_VD, tokens_BT)


def _lookup_gradients(dtype: str, saved: tuple[jax.Array, jax.Array], grad_BTD: jax.Array) -> tuple[jax.Array, None]:
    """Summed in the dtype of the parameter, as the lookup's own may be too narrow for that."""
    embed_VD, tokens_BT = saved
    grad_VD = jnp.zeros_like(embed_VD).at[tokens_BT].add(grad_BTD.astype(embed_VD.dtype))
    return constrain(grad_VD, "VD"), None


_embedded = jax.custom_vjp(_lookup, nondiff_argnums=(2,))
_embedded.defvjp(_lookup_and_saved, _lookup_gradients)


def positions_in_segments(tokens_BT: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    """Positions that count from 0 in each segment of each row, int32 [B, T]."""
    index = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
    if segment_ids_BT is None:
        return index
    first = jnp.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)


def head_matrix(params: Params, config: ModelConfig) -> jax.Array:
    """The output head [D, V] in the compute dtype."""
    head = params["embed"].T if config.tie_embeddings else params["head"]
    return head.astype(config.dtype)


def forward(
    params: Params,
    config: ModelConfig,
    tokens_BT: jax.Array,
    *,
    segment_ids_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    no_grad_passes: int | jax.Array | None = None,
    grad_passes: int | None = None,
) -> jax.Array:
    """Logits [B, T, V] in float32, or the compute dtype if that is wider.

    segment_ids_BT: documents packed in a row, which never see each other. positions_BT: counted in each segment if not
    given; -1 marks padding. no_grad_passes (m; may be traced if at least 1) and grad_passes (b) default to the config.
    Differentiable in reverse mode only.
    """
    x = hidden_states(
        params,
        config,
        tokens_BT,
        segment_ids_BT=segment_ids_BT,
        positions_BT=positions_BT,
        no_grad_passes=no_grad_passes,
        grad_passes=grad_passes,
    ).x_BTD
    head = head_matrix(params, config)
    return jnp.einsum("BTD,DV->BTV", x, head, preferred_element_type=wider(x.dtype))
