"""The choice of the next token, against probabilities computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lckv_jax.decode.sampling import Sampling, choose, penalised, row_keys

LOGITS = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05]))


def frequencies(sampling, draws=20_000):
    logits = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (draws, 5))
    tokens = choose(sampling, logits, row_keys(sampling, draws), jnp.zeros(draws, jnp.int32))
    return np.bincount(np.asarray(tokens), minlength=5) / draws


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"temperature": 0.5}, np.array([16, 9, 2.25, 1, 0.25]) / 28.5),
        ({"temperature": 0.0}, [1, 0, 0, 0, 0]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_k": 99}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"top_p": 0.69}, [4 / 7, 3 / 7, 0, 0, 0]),  # the second one crosses it
        ({"top_p": 0.71}, np.array([8, 6, 3, 0, 0]) / 17),
        ({"top_p": 1e-6}, [1, 0, 0, 0, 0]),
        ({"min_p": 0.3}, np.array([8, 6, 3, 0, 0]) / 17),  # at least 0.12
        ({"top_k": 3, "top_p": 0.8}, [4 / 7, 3 / 7, 0, 0, 0]),  # of the three left the first two have 0.82
    ],
)
def test_frequencies(settings, want):
    found = frequencies(Sampling(**settings))
    np.testing.assert_allclose(found, want, atol=0.015)
    assert (found[np.asarray(want) == 0] == 0).all()


def test_greedy_is_the_first_of_the_best():
    logits = jnp.asarray([[0.0, 2.0, 2.0], [3.0, 1.0, 2.0]])
    assert choose(None, logits, row_keys(Sampling(), 2), jnp.zeros(2, jnp.int32)).tolist() == [1, 0]


def test_a_row_draws_by_its_seed_and_position_alone():
    logits = jnp.zeros((3, 1000))
    keys = row_keys(Sampling(seed=5), 3)
    first = choose(Sampling(seed=5), logits, keys, jnp.full(3, 7, jnp.int32))
    assert len(set(first.tolist())) == 3
    alone = choose(Sampling(seed=6), logits[:1], row_keys(Sampling(seed=6), 1), jnp.full(1, 7, jnp.int32))
    assert alone[0] == first[1]
    assert choose(Sampling(seed=5), logits, keys, jnp.full(3, 8, jnp.int32)).tolist() != first.tolist()


def test_repetition_penalty():
    logits, seen = jnp.asarray([[2.0, -2.0, 1.0]]), jnp.asarray([[True, True, False]])
    assert penalised(Sampling(repetition_penalty=2.0), logits, seen).tolist() == [[1.0, -4.0, 1.0]]
    assert penalised(None, logits, None) is logits
    assert jax.tree.all(jax.tree.map(np.array_equal, penalised(Sampling(), logits, seen), logits))
