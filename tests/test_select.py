"""Which tokens a budget keeps when the prompt ends, against lists; and the budgets of the slots of a pyramid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from budget_oracle import chosen

from lckv_jax.decode.select import POOL, heaviest, pyramid, spread

B, K = 3, 2


def kept(scores_BKT, padding, cells, recent, pool):
    """The columns of tokens, sorted, that each head of each row keeps."""
    real_BT = np.arange(scores_BKT.shape[-1])[None] >= np.asarray(padding)[:, None]
    index = np.asarray(heaviest(jnp.asarray(scores_BKT), jnp.asarray(real_BT), cells, recent, pool))
    assert all(len(set(head)) == cells for row in index for head in row)
    return [[sorted(head[real_BT[b, head]]) for head in row] for b, row in enumerate(index)]


@pytest.mark.parametrize("pool", [1, 3, 5, 7])
@pytest.mark.parametrize("columns", [9, 10, 16, 33])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_equals_lists(columns, pool, ties):
    """Whatever stands in the padding; ties go to the earlier token."""
    rng = np.random.default_rng(columns * 10 + pool)
    padding = [0, 3, columns - 2]  # the last row is shorter than the window
    scores = rng.integers(0, 4, (B, K, columns)) if ties else rng.random((B, K, columns))
    scores = scores.astype(np.float32)
    for b, p in enumerate(padding):
        scores[b, :, :p] = np.nan
    got = kept(scores, padding, 8, 3, pool)
    for b, p in enumerate(padding):
        for h in range(K):
            want = [p + place for place in chosen(scores[b, h, p:].tolist(), 8, 3, pool)]
            assert got[b][h] == want, (b, h)


def test_a_planted_token_is_kept_wherever_it_stands():
    rng = np.random.default_rng(0)
    for place in range(29):
        scores = rng.random((1, 1, 32)).astype(np.float32)
        scores[..., place] = 5.0
        (((*columns,),),) = kept(scores, [0], 11, 3, POOL)
        assert place in columns
        assert set(range(max(0, place - 3), min(29, place + 4))) <= set(columns)  # and what stands around it


def test_the_window_is_kept_beside_any_score_in_low_precision():
    """300 + 1 is 300 in bfloat16, so that a bonus would not do."""
    scores = jnp.full((1, 1, 64), 300.0, jnp.bfloat16)
    assert kept(scores, [0], 12, 4, POOL) == [[[*range(8), *range(60, 64)]]]


def test_scores_of_the_window_are_not_spread():
    """What is before the window competes by its own scores only."""
    scores = np.zeros((1, 1, 20), np.float32)
    scores[..., 16:] = 100.0
    scores[..., 5] = 1.0
    (((*columns,),),) = kept(scores, [0], 11, 4, POOL)
    assert columns == [*range(2, 9), *range(16, 20)]


def test_a_pool_has_a_middle():
    with pytest.raises(ValueError, match="4 scores have no middle"):
        spread(jnp.zeros((1, 1, 8)), 4)
    got = spread(jnp.asarray([[[3.0, 0.0, 1.0, 2.0]]]), 3)
    np.testing.assert_array_equal(got, [[[3.0, 3.0, 2.0, 2.0]]])
    np.testing.assert_array_equal(spread(got, 1), got)


def test_another_length_of_a_row_compiles_nothing():
    select = jax.jit(heaviest, static_argnums=(2, 3, 4))
    for p in (0, 5, 11):
        select(jnp.ones((B, K, 16)), jnp.arange(16)[None] >= jnp.full((B, 1), p), 8, 3, POOL)
    assert select._cache_size() == 1


def official(cells, recent, layers, prompt):
    """The cells of each layer in KVCache-Factory: integer floors, and clipped at the prompt."""
    cap = cells - recent
    low = cap // 20
    high = 2 * cap - low
    if high >= prompt - recent:
        high = prompt - recent
        low = 2 * cap - high
    return [high - layer * ((high - low) // (layers - 1)) + recent for layer in range(layers)]


@pytest.mark.parametrize(
    ("cells", "recent", "slots"),
    [(128, 8, 32), (72, 8, 32), (2048, 8, 32), (12, 4, 3), (5, 4, 7), (100, 1, 2), (33, 32, 16), (1000, 7, 5)],
)
def test_a_pyramid_is_exact(cells, recent, slots):
    budgets = pyramid(cells, recent, slots)
    assert len(budgets) == slots and sum(budgets) == slots * cells
    assert list(budgets) == sorted(budgets, reverse=True) and min(budgets) >= recent
    ideal = np.linspace(2 * (cells - recent) * (1 - 1 / 40), (cells - recent) / 20, slots) + recent
    assert np.abs(np.array(budgets) - ideal).max() < 1


def test_a_pyramid_of_one_slot():
    assert pyramid(64, 8, 1) == (64,)


def test_the_official_floors_overshoot_and_ours_do_not():
    """The released code keeps up to a fifth more than it says; far from the floors the two agree."""
    for cells, total in [(128, 4272), (72, 2768), (2048, 65552)]:
        assert sum(official(cells, 8, 32, 10**6)) == total
        assert sum(pyramid(cells, 8, 32)) == 32 * cells
    assert np.abs(np.subtract(official(2048, 8, 32, 10**6), pyramid(2048, 8, 32))).max() <= 2
