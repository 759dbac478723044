"""KVSharer (arXiv 2410.18517): which layers of a finished model can read another layer's keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lckv_jax.config import ModelConfig
from lckv_jax.errors import UserError
from lckv_jax.model.layers import KV, Params
from lckv_jax.model.refine import Passes, stop_rule
from lckv_jax.model.transformer import check_dtype
from lckv_jax.share.distances import Metric, Order, check_names, distance_table, position_means, ranked
from lckv_jax.share.trials import Sentences, make_trials
from lckv_jax.sharing import KVSharing


class Trial(NamedTuple):
    """One candidate: layer `hi` gives up its K,V, and it and all who read them read those of `source`.

    lo: the layer that was ranked with hi; `source` is where its K,V are by now. distance: of hi and lo. cosine: of the
    final hidden states with those of the model's own map.
    """

    hi: int
    lo: int
    source: int
    distance: float
    cosine: float
    accepted: bool


class Result(NamedTuple):
    """What a search found.

    sharing: the map found. pairs: the accepted trials, as (hi, lo, source, distance, cosine, accepted). tried: all
    trials in order. distances: [L, L], row i and column j hold that of owner i from the lower owner j, NaN elsewhere.
    asked: how many layers were to be given up.
    """

    sharing: KVSharing
    pairs: tuple[Trial, ...]
    tried: tuple[Trial, ...]
    distances: np.ndarray
    asked: int


class Verdict(NamedTuple):
    cosine: float
    accepted: bool


def search(
    params: Params,
    config: ModelConfig,
    calibration_tokens_BT: np.ndarray | jax.Array,
    num_shared: int,
    *,
    order: Order = "dissimilar",
    metric: Metric = "token_l2",
    threshold: float = 0.5,
    valid_BT: np.ndarray | jax.Array | None = None,
    seed: int = 0,
    passes: Passes = "trained",
    report: Callable[[Trial], None] = lambda trial: None,
) -> Result:
    """A map by which `num_shared` fewer layers own K,V, found without training; fewer where no candidate is left.

    Pairs of owners are ranked by the distance (`metric`, see `distances.distance_table`) of their K,V, keys after RoPE,
    averaged over the calibration sentences position by position; the most dissimilar comes first (`order`, see
    `distances.ranked`). In that order the deeper layer gives up its K,V for those of the lower one, if the final hidden
    states of the whole model then have a mean cosine above `threshold` with those of the model's own map. A layer is
    given up once, never layer 0, and never one that a layer below it reads.
    calibration_tokens_BT: one sentence a row; valid_BT: which tokens are not padding. passes: over cyclic spans, see
    `refine.stop_rule`. report: called after each trial.
    `convert.reshare.reshare(params, config, result.sharing, "own")` drops the projections.
    Raises UserError for a number that cannot be given up, naming what can be, for sentences that are none, and for a
    model whose hidden states are not finite.
    """
    check_names(order, metric)
    check_asked(config.sharing, num_shared)
    check_dtype(config)
    stop_rule(config, passes)
    sentences = _right_padded(config, calibration_tokens_BT, valid_BT)
    params = jax.tree.map(jnp.asarray, params)
    trials = make_trials(params, config.model_copy(update={"attention": "auto"}), sentences, passes)
    distances = _by_layer(config.sharing, trials.kv, sentences.valid_BT, metric)

    def accept(sources: tuple[int, ...], hi: int) -> Verdict:
        cosine = trials.similarity(sources, hi)
        accepted = cosine > threshold
        if accepted:
            trials.keep()
        return Verdict(cosine, accepted)

    allowed = _only_rows(distances, givable(config.sharing))
    tried = choose(allowed, config.sharing.sources, num_shared, accept, order=order, seed=seed, report=report)
    pairs = tuple(trial for trial in tried if trial.accepted)
    return Result(map_after(config.sharing, pairs), pairs, tried, distances, num_shared)


def choose(
    distances: np.ndarray,
    sources: Sequence[int],
    num_shared: int,
    accept: Callable[[tuple[int, ...], int], Verdict],
    *,
    order: Order = "dissimilar",
    seed: int = 0,
    report: Callable[[Trial], None] = lambda trial: None,
) -> tuple[Trial, ...]:
    """All trials until `num_shared` are accepted or no pair is left: nothing but the table and `accept` decides.

    distances: [L, L], NaN for pairs that are none; row i gives up, column j serves. sources: of the map to begin with.
    accept: from the sources of a candidate map and the layer that gives up.
    """
    home = {source: source for source in sources}  # of each owner's K,V: whose are read instead; never a chain
    tried: list[Trial] = []
    for hi, lo in ranked(distances, order, seed):
        if sum(trial.accepted for trial in tried) == num_shared:
            break
        if home[hi] != hi:
            continue
        source = home[lo]
        moved = {owner: source if now == hi else now for owner, now in home.items()}
        verdict = accept(tuple(moved[owner] for owner in sources), hi)
        tried.append(Trial(hi, lo, source, float(distances[hi, lo]), *verdict))
        report(tried[-1])
        if verdict.accepted:
            home = moved
    return tuple(tried)


def map_after(sharing: KVSharing, pairs: Sequence[Trial]) -> KVSharing:
    """The map after the accepted trials of a search that began with `sharing`."""
    sources = sharing.sources
    for pair in pairs:
        sources = tuple(pair.source if source == pair.hi else source for source in sources)
    return KVSharing(sources, sharing.windowed)


def givable(sharing: KVSharing) -> tuple[int, ...]:
    """The owners that can be given up for a lower one: all but the lowest and those that a layer below them reads."""
    upward = {source for layer, source in enumerate(sharing.sources) if sharing.upward[layer]}
    return tuple(owner for owner in sharing.owners[1:] if owner not in upward)


def check_asked(sharing: KVSharing, num_shared: int) -> None:
    """Raises UserError if so many layers cannot be given up, naming which may not be and why."""
    if num_shared < 0:
        raise UserError(f"share: {num_shared} layers cannot be given up; give 0 or more")
    can = givable(sharing)
    if num_shared <= len(can):
        return
    why = [f"layer {sharing.owners[0]} is the lowest that has K,V"]
    for owner in sharing.owners:
        readers = [layer for layer in sharing.donors(sharing.owners.index(owner)) if sharing.upward[layer]]
        if readers:
            why.append(f"layer {owner} is read from below by layer{'s' * (len(readers) > 1)} {_listed(readers)}")
    most = f"only {_listed(can)} can be given up, so ask for at most {len(can)}" if can else "no layer can be given up"
    raise UserError(f"share: {num_shared} layers of the map {sharing} cannot be given up: {'; '.join(why)}; {most}")


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _by_layer(sharing: KVSharing, kv: KV, valid_BT: jax.Array, metric: Metric) -> np.ndarray:
    """The distances [L, L] of owners from all lower ones."""
    k_CTKH, v_CTKH = (np.asarray(x) for x in position_means(kv, valid_BT))
    table = distance_table(k_CTKH, v_CTKH, metric)
    distances = np.full((sharing.num_layers, sharing.num_layers), np.nan)
    distances[np.ix_(sharing.owners, sharing.owners)] = table
    return distances


def _only_rows(distances: np.ndarray, rows: Sequence[int]) -> np.ndarray:
    """The table without the distances of other rows."""
    return np.where(np.isin(np.arange(len(distances)), rows)[:, None], distances, np.nan)


def _right_padded(
    config: ModelConfig, tokens: np.ndarray | jax.Array, valid: np.ndarray | jax.Array | None
) -> Sentences:
    """The sentences without padding between or before their tokens, and no longer than the longest."""
    tokens_BT = np.asarray(tokens)
    if tokens_BT.ndim != 2 or tokens_BT.dtype.kind not in "iu":
        raise UserError("share: calibration tokens are integers [sentences, tokens]; encode the text first")
    valid_BT = np.ones(tokens_BT.shape, bool) if valid is None else np.asarray(valid, bool)
    if valid_BT.shape != tokens_BT.shape:
        raise UserError(f"share: valid_BT has shape {valid_BT.shape}, the tokens {tokens_BT.shape}; give one for each")
    if not valid_BT.size or not valid_BT.any(axis=1).all():
        raise UserError("share: a calibration sentence has no token; leave it out, and give at least one sentence")
    if (wrong := tokens_BT[valid_BT & ((tokens_BT < 0) | (tokens_BT >= config.vocab_size))]).size:
        raise UserError(
            f"share: the calibration has token {wrong[0]}, but ids are below {config.vocab_size}; encode it with the "
            "model's own tokenizer"
        )
    lengths_B = valid_BT.sum(axis=1)
    columns_T = np.arange(lengths_B.max())
    first = np.argsort(~valid_BT, axis=1, kind="stable")[:, : len(columns_T)]
    there_BT = columns_T[None] < lengths_B[:, None]
    packed_BT = np.where(there_BT, np.take_along_axis(tokens_BT, first, axis=1), 0).astype(np.int32)
    positions_BT = np.where(there_BT, columns_T[None], -1).astype(np.int32)
    return Sentences(jnp.asarray(packed_BT), jnp.asarray(positions_BT))
