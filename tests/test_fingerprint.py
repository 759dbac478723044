"""Fingerprints: the pieces of an array give the number of the whole."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lckv_jax import fingerprint
from lckv_jax.fingerprint import host_fingerprint


def plain(bits):
    """The definition, number by number; `bits`: unsigned integers."""
    total = 0
    for place, word in enumerate(int(x) for x in bits.reshape(-1)):
        mixed = ((word ^ (place * 2654435761 % 2**32)) * 3266489917) % 2**32
        total += mixed ^ (mixed >> 15)
    return total % 2**32


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (5, 7, 2), (64,)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.int8, np.bool_])
def test_pieces_add_up_to_the_whole(monkeypatch, shape, dtype):
    monkeypatch.setattr(fingerprint, "_PIECE", 16)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32).astype(dtype)
    right = plain(x.reshape(-1).view(f"u{x.itemsize}"))
    assert host_fingerprint(x) == int(fingerprint.fingerprint(jnp.asarray(x))) == right


def test_a_changed_or_moved_element_changes_it(monkeypatch):
    monkeypatch.setattr(fingerprint, "_PIECE", 16)
    x = np.arange(100, dtype=np.float32)
    numbers = {host_fingerprint(x)}
    for place in range(100):
        changed = x.copy()
        changed.view(np.uint32)[place] ^= 1
        numbers.add(host_fingerprint(changed))
    numbers.add(host_fingerprint(np.concatenate([x[16:32], x[:16], x[32:]])))  # two pieces swapped
    assert len(numbers) == 102
