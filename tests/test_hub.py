"""Hugging Face folders: exact round trips, the meaning of every config key, and a sentence for each damage."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lckv_jax.convert.hub import load_hub, to_hub
from lckv_jax.errors import UserError

CASES = [
    "p01_llama_mha",
    "p02_cla2_gqa",
    "p03_lckv_w2",
    "p04_lckv_w0_mqa",
    "p05_sandwich_middle",
    "p06_pizza_top_b1",
    "p07_lasagna_top_tied",
    "p08_yoco_window",
    "p09_mixattention",
    "p10_pizza_bottom_tied",
]
SMALL = {  # every width differs, so that no wrong axis can go unnoticed
    "model_type": "lckv-llama",
    "vocab_size": 11,
    "hidden_size": 6,
    "intermediate_size": 7,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "layer_types": "0_2_2",
}


def small_tensors(config, dtype=np.float32):
    """Random tensors for an HF config, named and shaped by HF's own rule."""
    rng = np.random.default_rng(0)
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    query, key = (config["head_dim"] * config[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        linears = {
            "self_attn.q_proj": (query, hidden),
            "self_attn.o_proj": (hidden, query),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        if str(layer) in config["layer_types"].replace("s", "").split("_"):
            linears |= {"self_attn.k_proj": (key, hidden), "self_attn.v_proj": (key, hidden)}
        for part, shape in linears.items():
            shapes[f"model.layers.{layer}.{part}.weight"] = shape
            if config.get("attention_bias" if "attn" in part else "mlp_bias"):
                shapes[f"model.layers.{layer}.{part}.bias"] = shape[:1]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (hidden,)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write_folder(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_sharded(folder, config, tensors, count=3):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {name: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        shard = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(shard, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def assert_same_tensors(left, right):
    """Same names, dtypes, shapes and bits."""
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert array.dtype == right[name].dtype, name
        assert array.shape == right[name].shape, name
        assert array.tobytes() == right[name].tobytes(), name


@pytest.mark.parametrize("case", CASES)
def test_official_checkpoints_round_trip_bit_for_bit(golden, case):
    params, config = load_hub(golden / case)
    raw = json.loads((golden / case / "config.json").read_text())
    assert str(config.sharing) == raw.get("layer_types", "0_1_2_3")
    assert config.norm_eps == raw["rms_norm_eps"] and config.tie_embeddings == raw["tie_word_embeddings"]
    if raw["model_type"] == "lckv-llama":
        passes = (config.no_grad_passes, config.grad_passes)
        assert (config.window, *passes) == (raw["sliding_window"], raw["forward_passes"], raw["backward_passes"])
    assert_same_tensors(to_hub(params, config), load_file(golden / case / "model.safetensors"))


def test_tree_has_the_designed_leaves_and_computes_what_hf_computes(tmp_path):
    config = SMALL | {"attention_bias": True, "mlp_bias": True}
    tensors = small_tensors(config)
    params, model = load_hub(write_folder(tmp_path, config, tensors))
    assert jax.tree.map(np.shape, params) == {
        "embed": (11, 6),
        "layers": {
            "attn_norm": (3, 6),
            "wq": (3, 6, 4, 8),
            "wo": (3, 4, 8, 6),
            "mlp_norm": (3, 6),
            "gate": (3, 6, 7),
            "up": (3, 6, 7),
            "down": (3, 7, 6),
            "bq": (3, 4, 8),
            "bo": (3, 6),
            "gate_bias": (3, 7),
            "up_bias": (3, 7),
            "down_bias": (3, 6),
        },
        "kv": {"wk": (2, 6, 2, 8), "wv": (2, 6, 2, 8), "bk": (2, 2, 8), "bv": (2, 2, 8)},
        "final_norm": (6,),
        "head": (6, 11),
    }
    x_D, y_F = np.random.default_rng(1).normal(size=6), np.random.default_rng(2).normal(size=7)
    hf = {name.removeprefix("model.layers."): tensor for name, tensor in tensors.items()}
    layers, kv = params["layers"], params["kv"]
    for slot, owner in enumerate(model.sharing.owners):  # 0 and 2: a slot is not a layer
        key = hf[f"{owner}.self_attn.k_proj.weight"] @ x_D + hf[f"{owner}.self_attn.k_proj.bias"]
        ours = np.einsum("D,DKH->KH", x_D, kv["wk"][slot]) + kv["bk"][slot]
        np.testing.assert_allclose(ours, key.reshape(2, 8), rtol=1e-6)  # HF: heads outside, head size inside
    query = hf["1.self_attn.q_proj.weight"] @ x_D + hf["1.self_attn.q_proj.bias"]
    ours = np.einsum("D,DNH->NH", x_D, layers["wq"][1]) + layers["bq"][1]
    np.testing.assert_allclose(ours, query.reshape(4, 8), rtol=1e-6)
    attended = hf["1.self_attn.o_proj.weight"] @ query + hf["1.self_attn.o_proj.bias"]
    out = np.einsum("NH,NHD->D", ours, layers["wo"][1]) + layers["bo"][1]
    np.testing.assert_allclose(out, attended, rtol=1e-5)
    down = hf["2.mlp.down_proj.weight"] @ y_F + hf["2.mlp.down_proj.bias"]
    np.testing.assert_allclose(y_F @ layers["down"][2] + layers["down_bias"][2], down, rtol=1e-6)
    np.testing.assert_allclose(x_D @ params["head"], tensors["lm_head.weight"] @ x_D, rtol=1e-6)
    assert_same_tensors(to_hub(params, model), tensors)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_sharded_folder_keeps_dtype_and_round_trips(tmp_path, dtype):
    tensors = small_tensors(SMALL, dtype)
    write_sharded(tmp_path, SMALL, tensors)
    params, config = load_hub(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(dtype)}
    assert_same_tensors(to_hub(params, config), tensors)


def test_layers_of_mixed_dtype_meet_in_one_that_holds_every_value(tmp_path):
    tensors = small_tensors(SMALL, ml_dtypes.bfloat16)
    odd = "model.layers.1.input_layernorm.weight"
    tensors[odd] = np.float16(1.0009765625) * np.ones(6, np.float16)
    params, _ = load_hub(write_folder(tmp_path, SMALL, tensors))
    assert params["layers"]["attn_norm"].dtype == np.float32
    np.testing.assert_array_equal(params["layers"]["attn_norm"][1], tensors[odd].astype(np.float32))
    assert params["layers"]["mlp_norm"].dtype == ml_dtypes.bfloat16


def test_gradients_are_named_and_contiguous(tmp_path):
    tensors = small_tensors(SMALL)
    params, config = load_hub(write_folder(tmp_path, SMALL, tensors))
    grads = jax.grad(lambda tree: sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))(params)
    named = to_hub(grads, config)
    assert named.keys() == tensors.keys()
    for name, grad in named.items():
        assert type(grad) is np.ndarray and grad.flags.c_contiguous
        np.testing.assert_allclose(grad, 2 * tensors[name], rtol=1e-6)


def test_to_hub_names_the_leaf_that_does_not_fit(tmp_path):
    params, config = load_hub(write_folder(tmp_path, SMALL, small_tensors(SMALL)))
    with pytest.raises(ValueError, match="head"):
        to_hub({name: leaf for name, leaf in params.items() if name != "head"}, config)
    with pytest.raises(ValueError, match=r"embed has shape \(6, 11\)"):
        to_hub(params | {"embed": params["embed"].T}, config)


def config_of(folder, **changes):
    """The ModelConfig of SMALL with changed keys."""
    return load_hub(write_folder(folder, SMALL | changes, small_tensors(SMALL | changes)))[1]


def test_keys_that_hf_may_leave_out(tmp_path):
    config = config_of(tmp_path)
    assert (config.norm_eps, config.rope_theta, config.rope_scaling, config.window) == (1e-6, 10000.0, None, 4096)
    assert (config.no_grad_passes, config.grad_passes, config.strict_everywhere) == (7, 2, False)
    bare = {key: value for key, value in SMALL.items() if key not in ("head_dim", "num_key_value_heads", "layer_types")}
    bare |= {"model_type": "llama", "hidden_size": 24, "head_dim": None}
    full = bare | {"head_dim": 6, "num_key_value_heads": 4, "layer_types": "0_1_2"}
    config = load_hub(write_folder(tmp_path / "bare", bare, small_tensors(full)))[1]
    assert (config.head_dim, config.num_kv_heads, str(config.sharing)) == (6, 4, "0_1_2")


def test_every_key_reaches_the_config(tmp_path):
    config = config_of(
        tmp_path,
        layer_types="0s_2_2s",
        sliding_window=33,
        forward_passes=3,
        backward_passes=0,
        force_nodiag=True,
        rms_norm_eps=1e-4,
        rope_theta=5e5,
        initializer_range=0.5,
    )
    assert (str(config.sharing), config.window, config.strict_everywhere) == ("0s_2_2s", 33, True)
    assert (config.no_grad_passes, config.grad_passes) == (3, 1)  # the official b = 0 acts as 1
    assert (config.norm_eps, config.rope_theta, config.init_std) == (1e-4, 5e5, 0.5)


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 5e5},
        {"rope_scaling": {"type": "llama3", **LLAMA3}, "rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    ],
)
def test_rope_scaling_in_each_spelling(tmp_path, keys):
    config = config_of(tmp_path, **keys)
    assert config.rope_theta == 5e5
    assert config.rope_scaling is not None
    assert config.rope_scaling.model_dump() == {"type": "llama3", **LLAMA3}


def test_linear_and_default_rope(tmp_path):
    linear = config_of(tmp_path, rope_scaling={"type": "linear", "factor": 2.0}).rope_scaling
    assert linear is not None and (linear.type, linear.factor) == ("linear", 2.0)
    default = config_of(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 7.0})
    assert (default.rope_scaling, default.rope_theta) == (None, 7.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers is '3'"),
        ({"head_dim": None}, "hidden_size 6 is no multiple of 4 heads"),
        ({"layer_types": "0_2"}, "layer 2 has no entry"),
        ({"layer_types": "0_2s_2", "sliding_window": "null"}, "window"),
        ({"model_type": "llama"}, "layer_types '0_2_2'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "mend high_freq_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "mend partial_rotary_factor"),
        ({"rms_norm_eps": "tiny"}, "norm_eps"),
    ],
)
def test_config_that_cannot_be_honoured(tmp_path, changes, message):
    raw = {key: value for key, value in (SMALL | changes).items() if value is not None}
    with pytest.raises(UserError, match=message) as caught:
        load_hub(write_folder(tmp_path, raw, small_tensors(SMALL)))
    assert "config.json" in str(caught.value)


def test_window_mark_without_a_window(tmp_path):
    raw = SMALL | {"layer_types": "0_2s_2", "sliding_window": None}
    with pytest.raises(UserError, match="sliding_window is null"):
        load_hub(write_folder(tmp_path, raw, small_tensors(SMALL)))
    assert load_hub(write_folder(tmp_path, SMALL | {"sliding_window": None}, small_tensors(SMALL)))[1].window == 4096


def test_missing_and_surplus_tensors_are_named(tmp_path):
    tensors = small_tensors(SMALL)
    del tensors["model.layers.2.self_attn.v_proj.weight"]
    with pytest.raises(UserError, match=r"lacks model\.layers\.2\.self_attn\.v_proj\.weight"):
        load_hub(write_folder(tmp_path, SMALL, tensors))
    tensors = small_tensors(SMALL)
    tensors["model.layers.1.self_attn.k_proj.weight"] = np.zeros((16, 6), np.float32)  # layer 1 is no owner
    with pytest.raises(UserError, match=r"holds model\.layers\.1\.self_attn\.k_proj\.weight"):
        load_hub(write_folder(tmp_path, SMALL, tensors))
    tensors = small_tensors(SMALL | {"tie_word_embeddings": True})
    with pytest.raises(UserError, match=r"lacks lm_head\.weight"):
        load_hub(write_folder(tmp_path, SMALL, tensors))


def test_projections_that_the_map_drops_are_told_where_asked_and_nothing_else_is(tmp_path):
    config = SMALL | {"attention_bias": True}
    tensors = small_tensors(config)
    whole = small_tensors(config | {"layer_types": "0_1_2"})
    surplus = {name: tensor for name, tensor in whole.items() if name not in tensors}
    assert len(surplus) == 4  # weights and biases of layer 1
    told = []
    params, model = load_hub(write_folder(tmp_path, config, tensors | surplus), report=told.append)
    assert_same_tensors(to_hub(params, model), tensors)
    names = ", ".join(sorted(surplus))
    assert told == [f"left out {names}: the map 0_2_2 has no K/V projections in layer 1"]
    for odd in ("model.layers.3.self_attn.k_proj.weight", "model.layers.1.mlp.up_proj.bias", "score.weight"):
        with pytest.raises(UserError, match=f"holds {odd}, for which"):
            load_hub(write_folder(tmp_path, config, tensors | surplus | {odd: np.zeros(3, np.float32)}), report=print)
    with pytest.raises(UserError, match=r"holds model\.layers\.1\.self_attn\.k_proj\.bias, .*bias, for which"):
        load_hub(write_folder(tmp_path, SMALL, small_tensors(SMALL) | surplus), report=print)  # no attention_bias


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_numbers_that_are_not_finite(tmp_path, value, dtype):
    tensors = small_tensors(SMALL, dtype)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = value
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        load_hub(write_folder(tmp_path, SMALL, tensors))


def test_rotary_tables_are_ignored(tmp_path):
    tensors = small_tensors(SMALL)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    params, config = load_hub(write_folder(tmp_path, SMALL, tensors | extra))
    assert_same_tensors(to_hub(params, config), tensors)


def test_wrong_shape_and_foreign_dtype(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = small_tensors(SMALL)
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    with pytest.raises(UserError, match=r"up_proj\.weight has shape \(6, 7\), but config\.json calls for \(7, 6\)"):
        load_hub(write_folder(tmp_path, SMALL, tensors))
    tensors[name] = np.zeros((7, 6), np.int8)
    with pytest.raises(UserError, match="is stored as I8"):
        load_hub(write_folder(tmp_path, SMALL, tensors))


def test_half_written_file(tmp_path):
    path = write_folder(tmp_path, SMALL, small_tensors(SMALL)) / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="cut short or damaged"):
            load_hub(tmp_path)


def test_damaged_sharded_folder(tmp_path):
    tensors = small_tensors(SMALL)
    weight_map = write_sharded(tmp_path, SMALL, tensors)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map | {"model.ghost": "model-00001-of-00003.safetensors"}}))
    with pytest.raises(UserError, match=r"lacks model\.ghost, which model\.safetensors\.index\.json places there"):
        load_hub(tmp_path)
    index.write_text(
        json.dumps({"weight_map": {name: file for name, file in weight_map.items() if "norm" not in name}})
    )
    with pytest.raises(UserError, match="does not place there"):
        load_hub(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map}))
    load_hub(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors: this shard is missing"):
        load_hub(tmp_path)
    index.write_text("{}")
    with pytest.raises(UserError, match="weight_map"):
        load_hub(tmp_path)


def test_folder_that_is_not_a_model(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        load_hub(tmp_path / "absent")
    with pytest.raises(UserError, match=r"config\.json: there is no such file"):
        load_hub(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type":')
    with pytest.raises(UserError, match="cannot be read as JSON"):
        load_hub(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        load_hub(tmp_path)


def test_single_file_beside_an_index_is_ambiguous(tmp_path):
    write_sharded(tmp_path, SMALL, small_tensors(SMALL))
    write_folder(tmp_path, SMALL, small_tensors(SMALL))
    with pytest.raises(UserError, match="holds both"):
        load_hub(str(tmp_path))
