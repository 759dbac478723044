"""Which tokens of a prompt a budget keeps, by how much was read of them."""

from __future__ import annotations

from fractions import Fraction

import jax
import jax.numpy as jnp

POOL = 7  # tokens over which SnapKV spreads a score, so that what stands around a token is kept with it
_BETA = 20  # PyramidKV: the share of its average budget that the deepest slot chooses is one in so many


def heaviest(score_BKT: jax.Array, real_BT: jax.Array, cells: int, recent: int, pool: int) -> jax.Array:
    """The columns that each K/V head keeps of T > `cells`, int32 [B, K, cells]: the last `recent`, then by score.

    real_BT: which columns hold tokens; the others come last, where a row has fewer than `cells`. pool: columns, an odd
    number, over which the scores of the columns before the last `recent` are spread; 1 = each by its own. Of equal
    scores the earlier column is kept.
    """
    last_T = jnp.arange(score_BKT.shape[-1]) >= score_BKT.shape[-1] - recent
    real = real_BT[:, None]
    score = spread(jnp.where(real & ~last_T[None, None], score_BKT.astype(jnp.float32), -jnp.inf), pool)
    # infinite, since in low precision no finite bonus is safe from a large score
    priority = jnp.where(real, jnp.where(last_T[None, None], jnp.inf, score), -jnp.inf)
    return jax.lax.top_k(priority, cells)[1]


def spread(score_BKT: jax.Array, pool: int) -> jax.Array:
    """The largest of the `pool` scores around each (SnapKV, 2404.14469, 4.1); raises ValueError for an even number."""
    if pool % 2 == 0:
        raise ValueError(f"{pool} scores have no middle; give an odd number")
    padding = ((0, 0), (0, 0), (pool // 2, pool // 2))
    return jax.lax.reduce_window(score_BKT, -jnp.inf, jax.lax.max, (1, 1, pool), (1, 1, 1), padding)


def pyramid(cells: int, recent: int, slots: int) -> tuple[int, ...]:
    """The cells of each slot, lowest first: fewer with depth, each `recent` or more, `slots` * `cells` in all.

    PyramidKV (2406.02069) in exact fractions, rounded by largest remainders.
    """
    if slots == 1:
        return (cells,)
    deepest = Fraction(cells - recent, _BETA)
    step = 2 * (cells - recent - deepest) / (slots - 1)
    exact = [recent + deepest + step * (slots - 1 - slot) for slot in range(slots)]
    whole = [int(x) for x in exact]
    by_remainder = sorted(range(slots), key=lambda slot: whole[slot] - exact[slot])  # ties: the lowest slot
    for slot in by_remainder[: slots * cells - sum(whole)]:
        whole[slot] += 1
    return tuple(whole)
