"""The final hidden states of a model under other maps than its own, for many maps in turn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lckv_jax.convert.reshare import reshare
from lckv_jax.errors import UserError
from lckv_jax.model.attention import wider
from lckv_jax.model.layers import KV, Context, Params, Stack, layer, make_context, project_kv, rms_norm, take_stack
from lckv_jax.model.refine import Passes
from lckv_jax.model.transformer import hidden_states
from lckv_jax.model_config import ModelConfig
from lckv_jax.sharing import KVSharing, Run


class Sentences(NamedTuple):
    """Right-padded sentences. positions_BT: 0, 1, ... in each, -1 for padding."""

    tokens_BT: jax.Array
    positions_BT: jax.Array

    @property
    def valid_BT(self) -> jax.Array:
        return self.positions_BT >= 0


class Trials(NamedTuple):
    """kv: what the owners of the model's own map compute, [C, B, T, K, H]. similarity: from the sources of a map, and
    its lowest layer that differs from the last map that was kept, the cosine with the model's own final hidden states.
    keep: makes the map of the last call the one that the next differ from."""

    kv: KV
    similarity: Callable[[tuple[int, ...], int], float]
    keep: Callable[[], None]


def make_trials(params: Params, config: ModelConfig, sentences: Sentences, passes: Passes) -> Trials:
    """Trials of maps that give up owners of `config.sharing`, on these sentences.

    Without upward layers all maps are one compiled program, which recomputes only the layers from the first that
    differs. With them each map is compiled and runs its passes. Raises UserError for a model that computes what is not
    finite.
    """
    return _solved_trials(params, config, sentences, passes) if config.sharing.cyclic else _traced_trials(
        params, config, sentences
    )  # fmt: skip


def _check_finite(base_BTD: jax.Array, kv: KV, sentences: Sentences) -> None:
    """Raises UserError for a model whose own hidden states or keys and values are not finite: none is near them."""
    valid_BT = sentences.valid_BT
    found = (jnp.isfinite(base_BTD[valid_BT]), *(jnp.isfinite(x[:, valid_BT]) for x in kv))
    if not all(bool(finite.all()) for finite in found):
        raise UserError(
            "share: the model's hidden states are not finite: its parameters are of no use; give an earlier checkpoint"
        )


@jax.jit
def similarity(x_BTD: jax.Array, base_BTD: jax.Array, valid_BT: jax.Array) -> jax.Array:
    """The cosine of two hidden states, each sentence's valid tokens as one vector, averaged over the sentences."""
    x, base = (jnp.where(valid_BT[:, :, None], h.astype(wider(h.dtype)), 0.0) for h in (x_BTD, base_BTD))
    dots, squares, base_squares = ((a * b).sum(axis=(1, 2)) for a, b in ((x, base), (x, x), (base, base)))
    size = jnp.maximum(jnp.sqrt(squares) * jnp.sqrt(base_squares), jnp.finfo(dots.dtype).tiny)
    return jnp.minimum(dots / size, 1.0).mean()  # rounding must not pass a threshold of 1


# ---------------------------------------------------------------- without upward layers


class State(NamedTuple):
    """What a sweep over the layers leaves: the input of each layer, and K,V [C, B, T, K, H] of the model's owners."""

    inputs_LBTD: jax.Array
    kv: KV


def _traced_trials(params: Params, config: ModelConfig, sentences: Sentences) -> Trials:
    slot_of_owner = {owner: slot for slot, owner in enumerate(config.sharing.owners)}
    plain = bool(sentences.valid_BT.all())

    def sweep(state: State, sources: tuple[int, ...], first: int) -> tuple[jax.Array, State]:
        slots_L = np.array([slot_of_owner[source] for source in sources], np.int32)
        return sweep_layers(params, config, plain, sentences.positions_BT, state, slots_L, np.int32(first))

    start = _first_state(params, config, sentences.tokens_BT)
    base_BTD, kept = sweep(start, config.sharing.sources, 0)
    kv, tried = kept.kv, kept
    _check_finite(base_BTD, kv, sentences)

    def of(sources: tuple[int, ...], first: int) -> float:
        nonlocal tried
        x_BTD, tried = sweep(kept, sources, first)
        return float(similarity(x_BTD, base_BTD, sentences.valid_BT))

    def keep() -> None:
        nonlocal kept
        kept = tried

    return Trials(kv, of, keep)


@partial(jax.jit, static_argnames="config")
def _first_state(params: Params, config: ModelConfig, tokens_BT: jax.Array) -> State:
    """Of a sweep from layer 0 on: only the first input is known."""
    x = params["embed"][tokens_BT].astype(config.dtype)
    slots = (len(config.sharing.owners), *tokens_BT.shape, config.num_kv_heads, config.head_dim)
    nothing = jnp.zeros(slots, config.dtype)
    return State(jnp.zeros((config.num_layers, *x.shape), x.dtype).at[0].set(x), KV(nothing, nothing))


@partial(jax.jit, static_argnames=("config", "plain"))
def sweep_layers(
    params: Params,
    config: ModelConfig,
    plain: bool,
    positions_BT: jax.Array,
    state: State,
    slots_L: jax.Array | np.ndarray,
    first: jax.Array | np.integer,
) -> tuple[jax.Array, State]:
    """The normed final hidden state [B, T, D] of the map by which layer l reads slot slots_L[l], and its state.

    A map of owners of `config.sharing`, which has no upward layers: no layer reads above itself. slots_L and first are
    traced, so all such maps are one program. first: the lowest layer that is computed; `state` is right below it.
    plain: no row has padding.
    """
    context = make_context(config, positions_BT, None, plain=plain)
    carry = state.inputs_LBTD[first], state
    for run in _alike(config.sharing):
        stack = take_stack(params, config, run)
        step = partial(_one_layer, config, run, context, stack, jnp.asarray(slots_L))
        carry = jax.lax.fori_loop(jnp.maximum(first, run.start), run.stop, step, carry)
    x, state = carry
    return rms_norm(x, params["final_norm"], config.norm_eps), state


def _one_layer(
    config: ModelConfig,
    run: Run,
    context: Context,
    stack: Stack,
    slots_L: jax.Array,
    number: jax.Array,
    carry: tuple[jax.Array, State],
) -> tuple[jax.Array, State]:
    x, (inputs_LBTD, kv) = carry
    own, own_kv = jax.tree.map(lambda leaf: leaf[number - run.start], tuple(stack))
    inputs_LBTD = inputs_LBTD.at[number].set(x)
    if own_kv is not None:
        slot = config.sharing.owners.index(run.start) + number - run.start
        kv = jax.tree.map(lambda all, new: all.at[slot].set(new), kv, project_kv(config, own_kv, x, context))
    reads = jax.tree.map(lambda all: all[slots_L[number]], kv)
    x, _ = layer(config, run, context, reads, x, (own, None))
    return x, State(inputs_LBTD, kv)


def _alike(sharing: KVSharing) -> list[Run]:
    """Stretches of layers that are computed alike, whichever slot each of them reads."""
    runs: list[Run] = []
    for number, windowed in enumerate(sharing.windowed):
        owner = number in sharing.owners
        if runs and (runs[-1].owners, runs[-1].windowed) == (owner, windowed):
            runs[-1] = runs[-1]._replace(stop=number + 1)
        else:
            runs.append(Run(number, number + 1, sharing.sources[number], owner, upward=False, windowed=windowed))
    return runs


# ---------------------------------------------------------------- with upward layers


def _solved_trials(params: Params, config: ModelConfig, sentences: Sentences, passes: Passes) -> Trials:
    base_BTD, kv = _solve(params, config, *sentences, passes)
    _check_finite(base_BTD, kv, sentences)

    def of(sources: tuple[int, ...], first: int) -> float:
        dropped, model = reshare(params, config, KVSharing(sources, config.sharing.windowed), "own")
        x_BTD, _ = _solve(dropped, model, *sentences, passes)
        return float(similarity(x_BTD, base_BTD, sentences.valid_BT))

    return Trials(kv, of, lambda: None)


@partial(jax.jit, static_argnames=("config", "passes"))
def _solve(
    params: Params, config: ModelConfig, tokens_BT: jax.Array, positions_BT: jax.Array, passes: Passes
) -> tuple[jax.Array, KV]:
    """The normed final hidden state after the passes, and K,V [C, B, T, K, H] of the owners."""
    found = hidden_states(params, config, tokens_BT, positions_BT=positions_BT, passes=passes)
    slots = [found.slots[owner] for owner in config.sharing.owners]
    return found.x_BTD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *slots)
