"""How far apart the keys and values of two layers are on average, and in which order pairs of layers are tried."""

from __future__ import annotations

import difflib
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from lckv_jax.errors import UserError
from lckv_jax.model.attention import wider
from lckv_jax.model.layers import KV

Metric = Literal["token_l2", "flat_l2"]
Order = Literal["dissimilar", "similar", "random"]


def check_names(order: str, metric: str) -> None:
    """Raises UserError for an order or a metric that there is not."""
    for kind, name, known in (("order", order, get_args(Order)), ("metric", metric, get_args(Metric))):
        if name not in known:
            near = difflib.get_close_matches(str(name).lower(), known, 1, 0.4)
            mend = f"did you mean {near[0]}? (known: {', '.join(known)})" if near else f"known: {', '.join(known)}"
            raise UserError(f"share: there is no {kind} {name!r}; {mend}")


@jax.jit
def position_means(kv: KV, valid_BT: jax.Array) -> KV:
    """The mean over sentences at each position, [C, T, K, H], of keys and values [C, B, T, K, H] of C owners.

    Each position is divided by the number of sentences that are so long. Float32 or wider.
    """
    count_T = jnp.maximum(valid_BT.sum(axis=0), 1)

    def mean(x: jax.Array) -> jax.Array:
        x = jnp.where(valid_BT[None, :, :, None, None], x.astype(wider(x.dtype)), 0.0)
        return x.sum(axis=1) / count_T[None, :, None, None]

    return KV(mean(kv.k_BSKH), mean(kv.v_BSKH))


def distance_table(k_CTKH: np.ndarray, v_CTKH: np.ndarray, metric: Metric) -> np.ndarray:
    """The distance [C, C] of owner i (row) from each lower owner j; NaN where j is not below i. Float64.

    Half the distance of the keys plus half that of the values. `token_l2`: the norm along H, averaged over positions
    and heads (KVSharer's released code). `flat_l2`: one norm of everything (arXiv 2410.18517, section 3).
    """
    owners = len(k_CTKH)
    table = np.full((owners, owners), np.nan)
    both = [np.asarray(x, np.float64) for x in (k_CTKH, v_CTKH)]
    for i in range(owners):
        for j in range(i):
            table[i, j] = sum(_distance(x[i] - x[j], metric) for x in both) / 2
    return table


def _distance(difference_TKH: np.ndarray, metric: Metric) -> float:
    if metric == "flat_l2":
        return float(np.sqrt(np.square(difference_TKH).sum()))
    return float(np.sqrt(np.square(difference_TKH).sum(axis=-1)).mean())


def ranked(distances: np.ndarray, order: Order, seed: int = 0) -> list[tuple[int, int]]:
    """The pairs (i, j) that have a distance, in the order in which they are tried.

    `dissimilar`: the largest distance first, as KVSharer does; `similar`: the smallest first; equal ones by (i, j).
    `random`: shuffled by `seed`, whatever the distances.
    """
    pairs = [(int(i), int(j)) for i, j in np.argwhere(~np.isnan(distances))]
    if order == "random":
        return [pairs[n] for n in np.random.default_rng(seed).permutation(len(pairs))]
    sign = -1 if order == "dissimilar" else 1
    return sorted(pairs, key=lambda pair: (sign * distances[pair], pair))
