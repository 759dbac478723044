"""KIVI: its codes by hand, decoding on it against a float64 oracle that keeps lists, and its compiled step."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import token_by_token
from test_decode_step import make_params, small, solve

from lckv_jax.decode import codecs, kivi
from lckv_jax.decode.cache import append, bytes_held, empty, fill, read
from lckv_jax.decode.generate import generate_rows
from lckv_jax.decode.loop import unstack
from lckv_jax.decode.spec import CacheSpec, KiviSpec, slot_specs
from lckv_jax.decode.step import decode_step, head_logits
from lckv_jax.errors import UserError
from lckv_jax.model.attention import attend_cells
from lckv_jax.model.layers import KV

step = jax.jit(decode_step, static_argnames=("config", "specs"))
jitted_fill, fill_one, append_one = (jax.jit(f, static_argnums=0) for f in (fill, kivi.fill, append))

R, GROUP = 6, 3  # a group of two is exact in any number of bits
KIVI = f"kivi(2,{GROUP},{R})"


@pytest.fixture(autouse=True)
def x64():
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_enable_x64", False)


# ---------------------------------------------------------------- the oracle


def there_and_back(x, bits):
    """One group of numbers as codes and back; its scale and low are kept in float32."""
    low, scale = np.float32(min(x)), np.float32((max(x) - min(x)) / (2**bits - 1))
    scale = 1.0 if scale == 0 else float(scale)
    return [round(min(max((n - float(low)) / scale, 0), 2**bits - 1)) * scale + float(low) for n in x]


def as_stored(bits, group, residual, at, keys, values):
    """What the token at position `at` finds of keys and values [t, K, H], counted as KIVI does."""
    tokens = at + 1  # the current one included
    coded_keys, coded_values = (tokens - 1) // residual * residual, max(0, tokens - 1 - residual)
    keys, values = keys.copy(), values.copy()
    _, heads, channels = keys.shape
    for head in range(heads):
        for first in range(0, coded_keys, group):
            for channel in range(channels):
                block = slice(first, first + group)
                keys[block, head, channel] = there_and_back(keys[block, head, channel].tolist(), bits)
        for token in range(coded_values):
            for first in range(0, channels, group):
                block = slice(first, first + group)
                values[token, head, block] = there_and_back(values[token, head, block].tolist(), bits)
    return keys, values


# ---------------------------------------------------------------- codes


@pytest.mark.parametrize("size", [4, 6, 7])
@pytest.mark.parametrize("bits", [2, 4])
def test_all_codes_survive_packing(bits, size):
    codes = jnp.asarray([[(first + i) % 2**bits for i in range(size)] for first in range(2**bits)], jnp.uint8)
    packed = codecs.pack(codes, bits)
    assert packed.shape == (2**bits, -(-size * bits // 8)) and packed.dtype == jnp.uint8
    np.testing.assert_array_equal(codecs.unpack(packed, bits, size), codes)
    packed = codecs.pack(jnp.asarray([1, 2, 3, 0, 0, 1, 2, 3], jnp.uint8), 2)
    assert packed.tolist() == [0b10_00_11_01, 0b11_01_00_10]  # every second one, the first in the lowest bits


def one_slot(bits=2, group=GROUP, residual=R, cells=2 * R, **window):
    return KiviSpec(0, cells, window.get("window"), bits, group, residual)


def decoded(codes, bits, size, axis):
    """Numbers of a slot's codes, repeated scales, in float64."""
    group = (np.array(codes.packed.shape[-2]) if axis == -2 else size) // codes.scale.shape[axis]
    scale, low = (np.repeat(np.asarray(x, np.float64), group, axis) for x in (codes.scale, codes.low))
    return np.asarray(codecs.unpack(codes.packed, bits, size)) * scale + low


def filled(spec, k, v):
    """The slot after one prompt, k and v [T, H], one head."""
    kv = KV(*(jnp.asarray(x, jnp.float64)[None, :, None] for x in (k, v)))
    pos_BT = jnp.arange(len(k), dtype=jnp.int32)[None]
    return fill_one(spec, kv, pos_BT, jnp.zeros(1, jnp.int32))


@pytest.mark.parametrize("bits", [2, 4])
def test_groups_are_tokens_of_a_channel_and_channels_of_a_token(bits):
    """What is far out disturbs its own group alone, by half a scale at most."""
    rng, spec = np.random.default_rng(0), one_slot(bits)
    k, v = rng.normal(size=(2, 2 * R, 6))
    k[:, 3] *= 1e6  # a channel
    v[1] *= 1e6  # a token
    slot = filled(spec, k, v)
    got_k = decoded(slot.k, bits, 6, -2)[0, 0].reshape(-1, 6)
    assert np.abs(got_k - k)[:, [0, 1, 2, 4, 5]].max() < 4 / (2**bits - 1) / 2
    assert np.abs(got_k - k)[:, 3].max() > 1e3
    got_v = decoded(slot.v, bits, 6, -1)[0, 0][:R]  # of 2R tokens, R are values of codes
    assert np.abs(got_v - v[:R])[[0, 2, 3]].max() < 4 / (2**bits - 1) / 2
    assert np.abs(got_v - v[:R])[1].max() > 1e3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_groups_without_range_are_finite_and_exact(dtype):
    k = jnp.asarray(np.repeat([[0.0, 1.0, -3.0, 1e-30, 1e30, -7.25]], 2 * R, 0), dtype)
    v = jnp.asarray(np.repeat([[0.0], [2.5], [-1e30], [1e-30]] * 2, 6, 1), dtype)
    kv = KV(k[None, :, None], v[None, :, None])
    slot = fill_one(one_slot(), kv, jnp.arange(2 * R)[None], jnp.zeros(1, jnp.int32))
    got_k, got_v = decoded(slot.k, 2, 6, -2)[0, 0].reshape(-1, 6), decoded(slot.v, 2, 6, -1)[0, 0][:R]
    stored = np.float32 if dtype == "float64" else dtype  # what scale and low are kept in
    np.testing.assert_array_equal(got_k, k.astype(stored).astype(np.float64))
    np.testing.assert_array_equal(got_v, v[:R].astype(stored).astype(np.float64))
    assert (slot.k.scale == 1).all() and (slot.v.scale == 1).all()
    assert slot.k.scale.dtype == slot.v.low.dtype == (jnp.bfloat16 if dtype == "bfloat16" else jnp.float32)


def test_a_range_too_small_for_a_scale_is_finite():
    tiny = np.finfo(np.float32).tiny
    slot = filled(one_slot(), *np.random.default_rng(0).uniform(0, tiny, (2, 2 * R, 6)))
    assert all(np.isfinite(decoded(codes, 2, 6, axis)).all() for codes, axis in ((slot.k, -2), (slot.v, -1)))
    assert np.abs(decoded(slot.k, 2, 6, -2)).max() <= tiny


@pytest.mark.parametrize("bits", [2, 4])
def test_reading_codes_in_16_bits_errs_less_than_reading_numbers_does(bits):
    """Than bfloat16 attention to the decoded numbers; with scales in queries and weights, these are rounded again."""
    rng, (B, T, K, N, H) = np.random.default_rng(0), (8, 64, 2, 4, 16)
    spec, config = one_slot(bits, group=8, residual=16, cells=80), small("0_1_2_3")
    k, v = rng.normal(size=(2, B, T, K, H))
    k[..., 3], k[..., 5] = k[..., 3] + 100, k[..., 5] * 10  # channels that are far out, as keys have them
    kv, q = (
        KV(*(jnp.asarray(x, jnp.bfloat16) for x in (k, v))),
        jnp.asarray(rng.normal(size=(B, 1, N, H)), jnp.bfloat16),
    )
    pos_BT = jnp.repeat(jnp.arange(T, dtype=jnp.int32)[None], B, 0)
    slot = fill_one(spec, kv, pos_BT, jnp.zeros(B, jnp.int32))
    got = kivi.read(config, spec, slot, q, jnp.full((B, 1), T, jnp.int32), strict=True, window=None)
    keys = decoded(slot.k, bits, H, -2).reshape(B, K, -1, H)[:, :, :T]
    raw = np.asarray(kv.v_BSKH, np.float64).swapaxes(1, 2)[:, :, T - 16 :]
    values = np.concatenate([decoded(slot.v, bits, H, -1)[:, :, : T - 16], raw], axis=2)

    def attention(dtype):
        everything = jnp.ones((B, 1, 1, T), bool)
        return np.asarray(attend_cells(*(jnp.asarray(x, dtype) for x in (q, keys, values)), everything), np.float64)

    want = attention("float64")
    assert np.std(np.asarray(got, np.float64) - want) < np.std(attention("bfloat16") - want)


# ---------------------------------------------------------------- which tokens are codes


def steps(spec, k, v, prompt=0):
    """(position, slot before, slot after) of each token after a prompt; k and v [T, H]."""
    slot = filled(spec, k[:prompt], v[:prompt])
    for t in range(prompt, len(k)):
        kv = KV(*(jnp.asarray(x[t], jnp.float64)[None, None, None] for x in (k, v)))
        after = append_one(spec, slot, kv, jnp.int32(t + 7), jnp.full(1, t, jnp.int32), jnp.ones(1, bool))
        yield t, slot, after
        slot = after


def test_as_many_tokens_become_codes_as_the_closed_form_says():
    """Changing what is kept raw changes nothing of what is read as codes, and the other way round."""
    spec, config = one_slot(cells=4 * R), small("0_1_2_3", num_heads=1, num_kv_heads=1)
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, 4 * R, 6))
    q = jnp.asarray(rng.normal(size=(1, 1, 1, 6)))
    look = jax.jit(partial(read, config, spec, strict=False, window=None))

    def reads(slot, at):
        return np.asarray(look(slot, q, jnp.full((1, 1), at, jnp.int32))[0])

    for t, _, slot in steps(spec, k, v):
        T = t + 1
        coded_k, coded_v = (T - 1) // R * R, max(0, T - 1 - R)  # while it attends
        if t == 0:
            continue  # all weight is on one token, whatever its key
        cells = {"k": set(), "k_raw": set(), "v": set(), "v_raw": set()}
        slot = jax.tree.map(np.asarray, slot)
        want = reads(slot, t)
        for name, size in {"k": 4 * R, "k_raw": R, "v": 4 * R, "v_raw": R + 1}.items():
            for cell in range(size):
                changed = jax.tree.map(np.copy, slot)
                if name == "k":
                    changed.k.packed[:, :, cell // R, cell % R] ^= 0b01010101
                elif name == "v":
                    changed.v.packed[:, :, cell] ^= 0b01010101
                else:
                    getattr(changed, name)[:, :, cell] += 0.5
                if not np.array_equal(reads(changed, t), want):
                    cells[name].add(cell)
        assert cells == {
            "k": set(range(coded_k)),
            "k_raw": {p % R for p in range(coded_k, T)},
            "v": set(range(coded_v)),
            "v_raw": {p % (R + 1) for p in range(coded_v, T)},
        }


def test_a_code_is_written_once():
    """After T tokens: R floor(T/R) keys and max(0, T-R) values, the old ones bit for bit as they were."""
    k, v = np.random.default_rng(1).normal(size=(2, 4 * R, 6))
    blank = filled(one_slot(cells=4 * R), k[:0], v[:0])
    for t, before, after in steps(one_slot(cells=4 * R), k, v):
        keys, values = (t + 1) // R, max(0, t + 1 - R)
        for name, count, old_count in (("k", keys, t // R), ("v", values, max(0, t - R))):
            for new, old, none in zip(getattr(after, name), getattr(before, name), getattr(blank, name)):
                np.testing.assert_array_equal(new[:, :, :old_count], old[:, :, :old_count])
                np.testing.assert_array_equal(new[:, :, count:], none[:, :, count:])
        scales = np.asarray(after.k.scale[0, 0, :keys]), np.asarray(after.v.scale[0, 0, :values])
        assert all((scale != 1).all() for scale in scales)  # the new ones as well


@pytest.mark.parametrize("spec", [one_slot(cells=4 * R), one_slot(cells=2 * R, window=6)], ids=["full", "window"])
def test_a_prompt_is_its_tokens_one_by_one(spec):
    k, v = np.random.default_rng(2).normal(size=(2, 4 * R, 6))
    for t, _, want in steps(spec, k, v):
        if t + 1 in (1, R - 1, R, R + 1, 2 * R + 3, 4 * R):
            for got, expected in zip(jax.tree.leaves(filled(spec, k[: t + 1], v[: t + 1])), jax.tree.leaves(want)):
                np.testing.assert_array_equal(got, expected)


def test_a_slot_that_grew_is_one_that_always_had_the_room():
    k, v = np.random.default_rng(7).normal(size=(2, 2 * R, 6))
    few, many = one_slot(cells=2 * R), one_slot(cells=4 * R)
    got, want = kivi.grown(many, filled(few, k, v)), filled(many, k, v)
    for leaf, expected in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_array_equal(leaf, expected)


# ---------------------------------------------------------------- decoding


def decode_rows(params, config, rows, prompts, cache, live=None, new=None):
    """Logits of each row's tokens from its last prompt token on, rows of a ragged batch with padding in front.

    prompts: prompt tokens of each row; all rows have as many tokens after them, of which the first `new` are fed.
    """
    longest = max(prompts)
    padding = np.array([longest - prompt for prompt in prompts], np.int32)
    tokens = np.stack([np.concatenate([np.full(pad, 9), row]) for pad, row in zip(padding, rows)])
    columns = tokens.shape[1]
    specs = slot_specs(config, CacheSpec.parse(cache), columns)
    pos_BT = np.maximum(np.arange(longest, dtype=np.int32)[None] - padding[:, None], -1)
    hidden = solve(params, config, jnp.asarray(tokens[:, :longest]), jnp.asarray(pos_BT))
    state, weights = jitted_fill(specs, hidden.slots, jnp.asarray(padding)), unstack(params, config)
    live = jnp.ones(len(rows), bool) if live is None else live
    out = [head_logits(weights, hidden.x_BTD[:, -1])]
    for t in range(longest, columns if new is None else longest + new):
        logits, state = step(weights, config, specs, state, jnp.asarray(tokens[:, t]), live)
        out.append(logits)
    return np.stack(out, 1), state


PROMPTS = [1, R - 1, R, R + 1, 2 * R + 3]
NEW = 2 * R + 2


def ragged_rows(seed):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 40, prompt + NEW) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("sharing", "cache"),
    [
        ("0_1_2_3", KIVI),
        ("0_2_2_3", KIVI),
        ("3_3_3_3", KIVI),
        ("0s_1s_2_2", KIVI),
        ("0_2_2_3", f"window({R + 2})+{KIVI}"),
        ("3_1_2_3", f"window({R})+{KIVI}"),
        ("0_2_2_3", "kivi(4,6,6)"),
    ],
)
def test_ragged_batches_equal_the_oracle(sharing, cache):
    config, spec = small(sharing), CacheSpec.parse(cache)
    params, rows = make_params(config), ragged_rows(3)
    got, _ = decode_rows(params, config, rows, PROMPTS, cache)
    stored = partial(as_stored, spec.bits, spec.group, spec.residual)
    for row, prompt, logits in zip(rows, PROMPTS, got):
        kept = {"prompt": prompt, "window": spec.window or None}
        want = token_by_token(params, config, row, **kept, stored=stored)[prompt - 1 :]
        np.testing.assert_allclose(logits, want, rtol=0, atol=1e-9)
    raw = token_by_token(params, config, row, **kept)[prompt - 1 :]
    assert np.abs(want - raw)[1:].max() > 1e-2  # so codes were really read


def test_a_row_is_the_row_alone():
    config = small("0_2_2_3")
    params, rows = make_params(config), ragged_rows(4)
    together, _ = decode_rows(params, config, rows, PROMPTS, KIVI)
    alone, _ = decode_rows(params, config, rows[3:4], PROMPTS[3:4], KIVI)
    np.testing.assert_allclose(together[3], alone[0], rtol=0, atol=1e-12)


def test_a_residual_as_long_as_the_text_is_the_full_cache():
    config = small("0_2_2_3")
    params, rows = make_params(config), ragged_rows(5)
    got, _ = decode_rows(params, config, rows, PROMPTS, f"kivi(2,1,{max(PROMPTS) + NEW})")
    full, _ = decode_rows(params, config, rows, PROMPTS, "full")
    np.testing.assert_allclose(got, full, rtol=0, atol=1e-13)


def test_rows_that_have_ended_change_nothing():
    config, live = small("0_2_2_3"), jnp.asarray([True, False, True, False, True])
    params, rows = make_params(config), ragged_rows(6)
    want, after = decode_rows(params, config, rows, PROMPTS, KIVI)
    got, state = decode_rows(params, config, rows, PROMPTS, KIVI, live)
    _, start = decode_rows(params, config, rows, PROMPTS, KIVI, new=0)
    np.testing.assert_array_equal(got[live], want[live])
    for ended, ran, begun in zip(*(jax.tree.leaves(cache.slots) for cache in (state, after, start))):
        np.testing.assert_array_equal(ended[live], ran[live])
        np.testing.assert_array_equal(ended[~live], begun[~live])


# ---------------------------------------------------------------- the text and the bytes


@pytest.mark.parametrize("text", ["full+kivi(2,32,128)", "window(300)+kivi(4,16,16)"])
def test_texts_round_trip(text):
    assert str(CacheSpec.parse(text)) == text
    assert CacheSpec.parse("kivi(2,32,128)") == CacheSpec.parse("full+kivi(2,32,128)")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kivi", r"write kivi\(bits,group,residual\)"),
        ("kivi(3,32,128)", "2 or 4"),
        ("kivi(2,32,100)", "no whole number of groups of 32"),
        ("sinks(4,60)+kivi(2,32,128)", "use int8 or int4"),
    ],
)
def test_what_cannot_be_is_one_sentence(text, words):
    with pytest.raises(UserError, match=words):
        CacheSpec.parse(text)


def test_groups_that_do_not_fit_the_heads_are_told():
    config = small("0_2_2_3")
    with pytest.raises(UserError, match=r"groups of 4 channels.*head_dim is 6.*such as 2"):
        slot_specs(config, CacheSpec.parse("kivi(2,4,8)"), 64)


def test_bytes_by_hand():
    """A row of 2 heads of 8 channels in bfloat16, 64 tokens in groups of 4, 16 of them raw."""
    config = small("0_0", num_layers=2, head_dim=8, dtype="bfloat16")
    codes, groups = 64 * 8 * 2 // 8, 64 * 8 // 4 * 2 * 2  # 2 bits; a scale and a low of 2 bytes
    specs = slot_specs(config, CacheSpec.parse("kivi(2,4,16)"), 60)
    assert bytes_held(config, specs, 3) == 3 * 2 * (2 * (codes + groups) + (16 + 17) * 8 * 2)
    ring = slot_specs(config, CacheSpec.parse("window(17)+kivi(2,4,16)"), 60)
    assert bytes_held(config, ring, 1) == 2 * (codes + groups + (16 + 17) * 8 * 2)  # two blocks instead of four


# ---------------------------------------------------------------- the compiled step


@pytest.mark.parametrize(
    ("cache", "dtype", "share"),
    [
        ("kivi(2,32,64)", "bfloat16", 0.9),
        ("kivi(4,32,64)", "float32", 0.75),
        ("window(900)+kivi(2,32,64)", "bfloat16", 0.9),
    ],
)
def test_the_compiled_step_holds_what_the_formula_says_and_copies_no_slot(cache, dtype, share):
    columns, B = 1024, 4
    sizes = {"num_layers": 8, "head_dim": 64, "num_heads": 8, "num_kv_heads": 4}
    config = small("lckv(warmup=2)", dtype=dtype, **sizes)  # layers read before their owner appends, and after
    params = jax.tree.map(lambda x: x.astype("float32"), make_params(config))
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_enable_x64", False)
    specs = slot_specs(config, CacheSpec.parse(cache), columns)
    weights = unstack(params, config)

    def run(state, tokens_B):
        def one(carry, _):
            logits, state = decode_step(weights, config, specs, *carry, jnp.ones(B, bool))
            return (state, logits.argmax(-1).astype(jnp.int32)), None

        return jax.lax.scan(one, (state, tokens_B), None, length=8)[0]

    state, tokens_B = jax.eval_shape(lambda: empty(config, specs, B)), jax.ShapeDtypeStruct((B,), jnp.int32)
    compiled = jax.jit(run, donate_argnums=0).lower(state, tokens_B).compile()
    memory, held = compiled.memory_analysis(), bytes_held(config, specs, B)
    assert memory.argument_size_in_bytes == held + 4 + 4 * B + 4 * B  # column, padding, tokens
    assert memory.alias_size_in_bytes >= held
    slot = B * config.num_kv_heads * specs[0].cells * config.head_dim
    everything = 2 * len(config.sharing.owners) * jnp.dtype(dtype).itemsize * slot
    assert memory.temp_size_in_bytes < share * everything  # not every slot as numbers at once
    copies = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", compiled.as_text())
    assert all(np.prod([int(n) for n in shape.split(",")]) < slot / 4 for shape in copies), copies


def test_generating_in_bfloat16():
    config = small("0_2_2_3", dtype="bfloat16", head_dim=8)
    rows = generate_rows(make_params(config), config, [[3, 1, 4], list(range(14))], 24, cache="kivi(2,4,8)")
    assert [len(row.tokens) for row in rows] == [24, 24]  # finite, or it would raise
