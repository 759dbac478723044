"""`attend` against plain loops in float64, its empty rows, causality; rotary embedding against complex numbers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import frequencies

from lckv_jax import ModelConfig
from lckv_jax.errors import UserError
from lckv_jax.model.attention import attend, rope_frequencies, rope_tables, rotate
from lckv_jax.model_config import RopeScaling

B, T, H = 2, 9, 4
NAMES = ("q", "k", "v", "q_pos", "k_pos", "q_seg", "k_seg")


@pytest.fixture(autouse=True)
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def arrays(q_pos, k_pos, q_seg=None, k_seg=None, heads=(4, 2), dtype=np.float64):
    """q, k, v from a fixed seed for queries and keys at the given positions (one row, or B rows of them)."""
    rng = np.random.default_rng(0)
    rows = [None if x is None else np.broadcast_to(np.asarray(x), (B, np.shape(x)[-1])) for x in (q_pos, k_pos)]
    rows += [None if x is None else np.broadcast_to(np.asarray(x), (B, np.shape(x)[-1])) for x in (q_seg, k_seg)]
    (N, K), (Tq, S) = heads, (rows[0].shape[1], rows[1].shape[1])
    q, k, v = (rng.normal(size=shape).astype(dtype) for shape in ((B, Tq, N, H), (B, S, K, H), (B, S, K, H)))
    return dict(zip(NAMES, (q, k, v, *rows)))


def run(a, **options):
    keywords = {"q_pos_BT": a["q_pos"], "k_pos_BS": a["k_pos"], "q_seg_BT": a["q_seg"], "k_seg_BS": a["k_seg"]}
    return attend(*(jnp.asarray(a[name]) for name in "qkv"), **jax.tree.map(jnp.asarray, keywords), **options)


def reads(a, b, t, s, strict, window):
    """Whether query t of row b may read key s."""
    q_pos, k_pos = a["q_pos"][b, t], a["k_pos"][b, s]
    same = a["q_seg"] is None or a["q_seg"][b, t] == a["k_seg"][b, s]
    distance = q_pos - k_pos
    return k_pos != -1 and same and distance >= (1 if strict else 0) and (window is None or distance < window)


def looped(a, *, strict, window=None):
    """One query, one head and one key at a time."""
    q, k, v = (np.asarray(a[name], np.float64) for name in "qkv")
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        head = n // (q.shape[2] // k.shape[2])
        seen = [s for s in range(k.shape[1]) if reads(a, b, t, s, strict, window)]
        if seen:
            weights = np.exp([q[b, t, n] @ k[b, s, head] / np.sqrt(H) for s in seen])
            out[b, t, n] = sum(w * v[b, s, head] for w, s in zip(weights / weights.sum(), seen))
    return out


LINE = np.arange(T)
DOCUMENTS = [[1] * 4 + [2] * 5, [3] * 1 + [1] * 6 + [7] * 2]
RESTART = [[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 4, 5, 0, 1]]
PADDED = [[-1, -1, -1, 0, 1, 2, 3, 4, 5], list(range(T))]
CACHE = [[0, 1, 2, 3, 4, -1, -1], [7, 8, 9, 3, 4, 5, 6]]  # a cache that is not full, and a rolling one
LAYOUTS = {
    "line": arrays(LINE, LINE),
    "documents": arrays(RESTART, RESTART, DOCUMENTS, DOCUMENTS),
    "padding": arrays(PADDED, PADDED),
    "one token": arrays([0], [0]),
    "decode": arrays([[5], [10]], CACHE),
    "decode newest": arrays([[4], [9]], CACHE),
    "chunk": arrays([[5, 6, 7], [10, 11, 12]], CACHE),
}


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_head_groups(heads, strict):
    a = arrays(LINE, LINE, heads=heads)
    np.testing.assert_allclose(run(a, strict=strict), looped(a, strict=strict), atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_against_loops(layout, strict):
    a = LAYOUTS[layout]
    for window in (None, 1, 3, 4, 50):
        got = run(a, strict=strict, window=window)
        assert got.shape == a["q"].shape
        np.testing.assert_allclose(got, looped(a, strict=strict, window=window), atol=1e-12, err_msg=str(window))


@pytest.mark.parametrize("layout", ["line", "documents", "padding", "one token", "decode"])
@pytest.mark.parametrize(("strict", "window"), [(False, None), (True, None), (True, 1)])
def test_rows_with_nothing_to_read_are_zero_and_harmless(layout, strict, window):
    a = LAYOUTS[layout]
    queries, keys = np.ndindex(a["q_pos"].shape), range(a["k"].shape[1])
    empty = {at for at in queries if not any(reads(a, *at, s, strict, window) for s in keys)}
    assert len(empty) >= 2 or not strict or layout == "decode"

    def attention(q, k, v):
        return run(a | {"q": q, "k": k, "v": v}, strict=strict, window=window)

    out, pull = jax.vjp(attention, *(jnp.asarray(a[name]) for name in "qkv"))
    out, grads = jax.device_get((out, pull(jnp.cos(out))))
    assert all(np.isfinite(grad).all() for grad in grads)
    for b, t in np.ndindex(a["q_pos"].shape):
        assert np.all(out[b, t] == 0.0) == ((b, t) in empty)
        assert (b, t) not in empty or np.all(grads[0][b, t] == 0.0)
    for b, s in np.ndindex(a["k_pos"].shape):  # and a key that nobody reads gets no gradient
        unread = not any(reads(a, b, t, s, strict, window) for t in range(a["q"].shape[1]))
        assert np.all(grads[2][b, s] == 0.0) == unread


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_causality(strict):
    """Changing k[t], v[t], even to huge numbers, changes no row before t (nor t itself, if strict), in any bit."""
    a, attention = arrays(LINE, LINE), jax.jit(partial(run, strict=strict))
    before = np.asarray(attention(a))
    for t in range(T):
        k, v = a["k"].copy(), a["v"].copy()
        k[:, t], v[:, t] = 1e6, -1e6
        after = np.asarray(attention(a | {"k": k, "v": v}))
        first = t + 1 if strict else t
        np.testing.assert_array_equal(after[:, :first], before[:, :first])
        assert np.all(np.abs(after[:, first:] - before[:, first:]).max(axis=(2, 3)) > 0.0)


def test_large_logits_do_not_overflow():
    a = arrays(LINE, LINE, dtype=np.float32)
    a |= {"q": a["q"] * 300, "k": a["k"] * 300}
    out = np.asarray(run(a, strict=False))
    assert np.isfinite(out).all()
    assert np.abs(out).max() <= np.abs(a["v"]).max() * (1 + 1e-5)


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_bfloat16_is_close(strict):
    a = arrays(LINE, LINE, dtype=jnp.bfloat16)
    got = run(a, strict=strict)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), looped(a, strict=strict), atol=0.03)


def test_logits_of_bfloat16_are_float32():
    """100 and 100.25 would be one number in bfloat16."""
    a = arrays([1], [0, 1], heads=(1, 1), dtype=jnp.bfloat16)
    a["q"][:], a["k"][:], a["v"][:] = [2, 2, 0, 0], [[[100, 0, 0, 0]], [[100, 0.25, 0, 0]]], [[[0] * 4], [[1] * 4]]
    want = np.exp(0.25) / (1 + np.exp(0.25))
    np.testing.assert_allclose(np.asarray(run(a, strict=False), np.float64), want, atol=0.004)


def test_float64_in_float64_out():
    assert run(LAYOUTS["line"], strict=False).dtype == jnp.float64


def test_unknown_backend_and_half_given_segments():
    with pytest.raises(UserError, match="attention=flash: there is no such kernel; use auto, xla"):
        run(LAYOUTS["line"], strict=False, backend="flash")
    with pytest.raises(ValueError, match="segments for both"):
        run(LAYOUTS["documents"] | {"k_seg": None}, strict=False)


# ---------------------------------------------------------------- rotary embedding

LLAMA3 = RopeScaling(type="llama3", factor=8.0)  # Llama 3.1: bands 1 and 4, trained on 8192 tokens


@pytest.mark.parametrize(
    ("head_dim", "theta", "scaling"),
    [
        (6, 10000.0, None),
        (64, 500000.0, None),
        (8, 10000.0, RopeScaling(type="linear", factor=4.0)),
        (128, 500000.0, LLAMA3),
        (64, 10000.0, RopeScaling(type="llama3", factor=32.0, low_freq_factor=0.5, high_freq_factor=9.0,
                                  original_max_position_embeddings=100)),
    ],
)  # fmt: skip
def test_frequencies(head_dim, theta, scaling):
    config = ModelConfig(
        vocab_size=1, hidden_size=1, intermediate_size=1, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=head_dim,
        rope_theta=theta, rope_scaling=scaling,
    )  # fmt: skip
    want = frequencies(config)
    for dtype, rtol in ((jnp.float64, 1e-12), (jnp.float32, 1e-5)):
        got = rope_frequencies(head_dim, theta, scaling, dtype)
        assert got.dtype == dtype
        np.testing.assert_allclose(got, want, rtol=rtol)


def test_llama3_keeps_blends_and_stretches():
    plain, scaled = (np.asarray(rope_frequencies(128, 500000.0, s, jnp.float64)) for s in (None, LLAMA3))
    kept, stretched = plain == scaled, np.isclose(scaled * 8.0, plain, rtol=1e-12)
    assert kept[:20].all() and stretched[-20:].all()
    between = ~kept & ~stretched
    assert between.any() and np.all((scaled < plain)[between] & (scaled > plain / 8.0)[between])


def test_rotation_is_complex_multiplication_of_halves():
    rng = np.random.default_rng(1)
    x, positions = rng.normal(size=(2, 3, 2, 6)), np.array([[0, 5, 300], [-1, 2, 4096]])
    freq = np.asarray(rope_frequencies(6, 10000.0, None, jnp.float64))
    turned = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * positions[:, :, None, None] * freq)
    got = rotate(jnp.asarray(x), *rope_tables(jnp.asarray(positions), jnp.asarray(freq)))
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=1e-12)


def test_scores_depend_on_the_distance_only():
    rng = np.random.default_rng(2)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8))) for _ in range(2))
    freq = rope_frequencies(8, 10000.0, LLAMA3, jnp.float64)

    def score(q_at, k_at):
        turned = (rotate(x, *rope_tables(jnp.array([[at]]), freq)) for x, at in ((q, q_at), (k, k_at)))
        return float(jnp.vdot(*turned))

    np.testing.assert_allclose([score(7, 4), score(1003, 1000)], score(3, 0), rtol=1e-9)
    assert abs(score(4, 4) - score(3, 0)) > 1e-3


def test_rotation_in_bfloat16_uses_float32_tables():
    x = jnp.ones((1, 2, 1, 4), jnp.bfloat16)
    freq = rope_frequencies(4, 10000.0, None, jnp.float32)
    cos, sin = rope_tables(jnp.array([[0, 1001]]), freq)  # 1001 is not a bfloat16
    assert cos.dtype == sin.dtype == jnp.float32
    got = rotate(x, cos, sin)
    assert got.dtype == jnp.bfloat16
    angle = 1001 * np.asarray(freq, np.float64)
    want = np.concatenate([np.cos(angle) - np.sin(angle), np.cos(angle) + np.sin(angle)])
    np.testing.assert_allclose(np.asarray(got, np.float64)[0, 1, 0], want, atol=0.01)
