"""From one map to another: the official conversions, a naive float64 loop over random maps, and what stays as it is."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from lckv_jax import KVSharing, ModelConfig
from lckv_jax.convert.hub import load_hub, to_hub
from lckv_jax.convert.reshare import reshare
from lckv_jax.errors import UserError
from lckv_jax.model.transformer import dim_sizes, forward, init_params, parameter_dims


def model(sharing, num_layers, **changes):
    sizes = dict(vocab_size=16, hidden_size=6, intermediate_size=10, num_heads=8, num_kv_heads=4, head_dim=2)
    return ModelConfig(**{**sizes, "num_layers": num_layers, "sharing": sharing, "attention_bias": True, **changes})


def random_params(config, dtype=np.float32, seed=0):
    """numpy parameters of which no two numbers are equal."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: rng.normal(size=shape).astype(dtype), shapes(config), is_leaf=is_shape)


def shapes(config):
    sizes = dim_sizes(config)
    return jax.tree.map(lambda dims: tuple(sizes[dim] for dim in dims), parameter_dims(config))


def is_shape(x):
    return isinstance(x, tuple)


def maps(num_layers):
    entry = st.tuples(st.integers(0, num_layers - 1), st.sampled_from(["", "s"])).map(lambda e: f"{e[0]}{e[1]}")
    return st.lists(entry, min_size=num_layers, max_size=num_layers).map("_".join)


pairs_of_maps = st.integers(1, 6).flatmap(lambda n: st.tuples(maps(n), maps(n)))
hows = st.sampled_from(["mean", "own"])


def by_hand(params, config, sharing, how, num_kv_heads):
    """Every projection of every owner by loops over layers and heads, in float64."""
    old, new = config.sharing.sources, KVSharing.parse(sharing, config.num_layers).sources
    merged = config.num_kv_heads // num_kv_heads
    result = {}
    for name, stack in params["kv"].items():
        computed = {layer: stack[slot].astype(np.float64) for slot, layer in enumerate(sorted(set(old)))}
        entries = []
        for owner in sorted(set(new)):
            if how == "own":
                mean = computed[owner] if owner in computed else computed[old[owner]]
            else:
                used = [computed[old[layer]] for layer in range(config.num_layers) if new[layer] == owner]
                mean = sum(used) / len(used)
            heads = [mean[..., k * merged : (k + 1) * merged, :].mean(axis=-2) for k in range(num_kv_heads)]
            entries.append(np.stack(heads, axis=-2))
        result[name] = np.stack(entries)
    return result


@given(pairs_of_maps, hows, st.sampled_from([4, 2, 1]))
@settings(max_examples=60, deadline=None)
def test_every_projection_is_the_mean_that_a_naive_loop_finds(maps, how, heads):
    old, new = maps
    config = model(old, old.count("_") + 1)
    params = random_params(config)
    got, got_config = reshare(params, config, new, how, heads)
    want = by_hand(params, config, new, how, heads)
    assert got["kv"].keys() == want.keys() == {"wk", "wv", "bk", "bv"}
    for name, array in want.items():
        assert got["kv"][name].dtype == np.float32
        np.testing.assert_allclose(got["kv"][name], array, rtol=1e-7, atol=0, err_msg=name)
    assert (str(got_config.sharing), got_config.num_kv_heads) == (new, heads)
    assert jax.tree.map(np.shape, got) == shapes(got_config)


@given(pairs_of_maps, hows)
@settings(max_examples=40, deadline=None)
def test_what_does_not_change_is_the_very_same_array(maps, how):
    old, new = maps
    config = model(old, old.count("_") + 1)
    params = random_params(config)
    same, same_config = reshare(params, config, config.sharing, how)
    assert all(a is b for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(params), strict=True))
    assert same_config == config
    other, _ = reshare(params, config, new, how)
    for name in params.keys() - {"kv"}:
        assert all(a is b for a, b in zip(jax.tree.leaves(other[name]), jax.tree.leaves(params[name]), strict=True))


@given(st.integers(1, 6).flatmap(maps), hows, st.sampled_from([np.float32, ml_dtypes.bfloat16]))
@settings(max_examples=40, deadline=None)
def test_to_a_map_without_sharing_and_back_is_exact(sharing, how, dtype):
    """Each layer starts from what it used, and the mean of equal projections is that projection, bit for bit."""
    config = model(sharing, sharing.count("_") + 1)
    params = random_params(config, dtype)
    params["kv"]["bk"] *= np.asarray(-0.0, dtype)  # zeros of both signs
    apart, apart_config = reshare(params, config, "standard", how)
    for name, stack in params["kv"].items():
        for layer, slot in enumerate(config.sharing.slot_of):
            if how == "mean":
                assert apart["kv"][name][layer].tobytes() == stack[slot].tobytes()
    back, back_config = reshare(apart, apart_config, sharing, how)
    assert back_config == config
    for name, stack in params["kv"].items():
        assert back["kv"][name].dtype == dtype
        assert back["kv"][name].tobytes() == stack.tobytes()


@pytest.mark.parametrize("name", ["0_0_2_2", "0_2_2_3", "1_0_2_3", "3_3_3_3"])
def test_official_conversions(golden, name):
    params, config = load_hub(golden / "p01_llama_mha")
    before = to_hub(params, config)
    got = to_hub(*reshare(params, config, name))
    all_wanted = load_file(golden / "conversion.safetensors")
    want = {key.removeprefix(f"{name}/"): array for key, array in all_wanted.items() if key.startswith(f"{name}/")}
    assert {key for key in got if "k_proj" in key or "v_proj" in key} == want.keys()
    for key, array in got.items():
        if key in want:
            np.testing.assert_allclose(array, want[key], rtol=0, atol=1e-7, err_msg=key)
        else:
            assert array.tobytes() == before[key].tobytes()


def test_an_owner_takes_what_its_readers_used_or_its_own():
    config = model("standard", 4)
    params = random_params(config)
    wk = params["kv"]["wk"]
    crossed, crossed_config = reshare(params, config, "3_3_3_0")
    np.testing.assert_array_equal(crossed["kv"]["wk"][0], wk[3])
    np.testing.assert_allclose(crossed["kv"]["wk"][1], wk[:3].astype(np.float64).mean(axis=0), rtol=0, atol=1e-7)
    own, _ = reshare(params, config, [3, 3, 3, 0], "own")
    np.testing.assert_array_equal(own["kv"]["wk"], wk[[0, 3]])
    again, _ = reshare(crossed, crossed_config, "0_0_3_3", "own")  # layers 0 and 3 had one of their own, used elsewhere
    np.testing.assert_array_equal(again["kv"]["wk"], crossed["kv"]["wk"])
    again, _ = reshare(crossed, crossed_config, "standard")
    np.testing.assert_array_equal(again["kv"]["wk"], crossed["kv"]["wk"][[1, 1, 1, 0]])


def logits(params, config):
    tokens = jnp.arange(12).reshape(1, 12) % 16
    return jax.jit(lambda params: forward(params, config, tokens))(params)


def test_window_marks_alone_move_no_parameter_and_wide_windows_change_no_logit():
    config = model("0_0_3_3", 4, init_std=0.3)
    params = init_params(config, jax.random.key(0))
    windowed, windowed_config = reshare(params, config, "0s_0_3s_3s")
    assert windowed["kv"]["wk"] is params["kv"]["wk"] and str(windowed_config.sharing) == "0s_0_3s_3s"
    np.testing.assert_array_equal(logits(params, config), logits(windowed, windowed_config))


def test_merged_heads_serve_the_query_heads_of_those_they_are_made_of():
    """Where the heads to be merged are equal, so are the logits."""
    config = model("0_2_2", 3, init_std=0.3)
    params = init_params(config, jax.random.key(0))
    params["kv"] = {name: jnp.repeat(leaf[..., ::2, :], 2, axis=-2) for name, leaf in params["kv"].items()}
    fewer, fewer_config = reshare(params, config, config.sharing, num_kv_heads=2)
    assert fewer["kv"]["wk"].shape == (2, 6, 2, 2)
    np.testing.assert_allclose(logits(params, config), logits(fewer, fewer_config), atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_the_same_under_jit_on_jax_arrays(dtype, tolerance):
    config = model("0_2_2_3", 4)
    params = random_params(config, dtype)
    want, want_config = reshare(params, config, "lckv", "mean", 2)
    arrays = jax.tree.map(jnp.asarray, params)
    got = jax.jit(lambda params: reshare(params, config, "lckv", "mean", 2)[0])(arrays)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert isinstance(a, jax.Array) and a.dtype == b.dtype == dtype
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=tolerance, atol=1e-6)
    assert want_config.num_kv_heads == 2


def test_means_of_bfloat16_are_taken_in_float32():
    config = model("standard", 3, attention_bias=False)
    params = random_params(config, ml_dtypes.bfloat16)
    got = reshare(params, config, "2_2_2")[0]["kv"]["wk"]
    want = params["kv"]["wk"].astype(np.float64).mean(axis=0)
    assert got.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(got[0].astype(np.float64), want, rtol=2**-8)  # one rounding


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("0_0_2_2",), "has 4 entries .* but the model has 3 layers"),
        ((KVSharing.parse("standard", 2),), "has 2 entries .* but the model has 3 layers"),
        (("0_0_3",), "layer 2 reads layer 3, which does not exist"),
        (("0_0_2", "median"), "how='median' .* use mean or own"),
        (("0_0_2", "mean", 3), "4 K/V heads cannot be merged to 3: .* divisor of 4"),
        (("0_0_2", "mean", 8), "4 K/V heads cannot be merged to 8"),
        (("0_0_2", "mean", 0), "4 K/V heads cannot be merged to 0"),
    ],
)
def test_refusals(arguments, message):
    config = model("standard", 3)
    with pytest.raises(UserError, match=message):
        reshare(random_params(config), config, *arguments)
