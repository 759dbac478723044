"""`config.json` written in each format means the model that it was written from."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lckv_jax import ModelConfig
from lckv_jax.convert.hub_config import hub_config, natural_format, read_config
from lckv_jax.errors import UserError

SIZES = dict(vocab_size=61, hidden_size=20, intermediate_size=28, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=6)
LLAMA3 = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ROPE = [None, {"type": "linear", "factor": 2.0}, LLAMA3]


def make(**changes):
    return ModelConfig(**SIZES | {"max_position_embeddings": 128} | changes)


def written(config, format, **changes):
    facts = {"max_position_embeddings": 128, "dtype": "bfloat16", "bos_id": 1, "eos_id": 2}
    return hub_config(config, format=format, **facts | changes)


def read_back(folder, tree):
    path = folder / "config.json"
    path.write_text(json.dumps(tree, allow_nan=False))
    return read_config(path)


@st.composite
def models(draw):
    """Any model, with every field that a format may have a word for."""
    mark = st.tuples(st.integers(0, 3), st.sampled_from(["", "s"])).map(lambda entry: f"{entry[0]}{entry[1]}")
    passes = draw(st.integers(0, 9))
    return make(
        sharing=draw(st.sampled_from(["standard", "0_2_2_3", "3_3_3_3"]) | st.lists(mark, min_size=4, max_size=4)),
        window=draw(st.integers(1, 99)),
        strict_everywhere=draw(st.booleans()),
        no_grad_passes=passes,
        grad_passes=draw(st.integers(1, 4)),
        start=draw(st.sampled_from(["zero", "input"])),
        tolerance=draw(st.sampled_from([0.0, 1e-3])) if passes else 0.0,
        rope_theta=draw(st.sampled_from([1e4, 5e5, 123456.789])),
        rope_scaling=draw(st.sampled_from(ROPE)),
        norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        tie_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        init_std=draw(st.sampled_from([0.02, 0.006])),
    )


def sayable(model):
    """Whether the format lckv-llama has words for all of the model."""
    return model.start == "zero" and not model.tolerance


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("configs")


@settings(max_examples=150, deadline=None)
@given(model=models())
def test_what_is_written_is_read_as_the_same_model(folder, model):
    assert read_back(folder, written(model, "lckv")) == model
    if sayable(model):
        assert read_back(folder, written(model, "lckv-llama")) == model
    else:
        with pytest.raises(UserError, match=r"no word for model\.(start|tolerance)"):
            written(model, "lckv-llama")
    if natural_format(model) == "llama":
        # a standard map makes no passes and has no window: what llama cannot say has no meaning there
        defaults = {name: ModelConfig.model_fields[name].default for name in
                    ("window", "no_grad_passes", "grad_passes", "start", "tolerance")}  # fmt: skip
        assert read_back(folder, written(model, "llama")) == model.model_copy(update=defaults)
    else:
        with pytest.raises(UserError, match="cannot be a plain llama model"):
            written(model, "llama")


@pytest.mark.parametrize(("changes", "format"), [
    ({"sharing": "standard"}, "llama"),
    ({"sharing": "0_1_2_3"}, "llama"),
    ({"sharing": "standard", "start": "input", "rope_scaling": LLAMA3}, "llama"),
    ({"sharing": "0_1_2s_3"}, "lckv"),
    ({"sharing": "standard", "strict_everywhere": True}, "lckv"),
    ({"sharing": "0_0_2_2"}, "lckv"),
    ({"sharing": "0_2_2_3"}, "lckv"),
])  # fmt: skip
def test_the_natural_format_is_llama_only_where_stock_code_computes_the_model(changes, format):
    assert natural_format(make(**changes)) == format


@pytest.mark.parametrize("format", ["llama", "lckv", "lckv-llama"])
def test_facts_about_the_folder(format):
    tree = written(make(sharing="standard"), format, dtype="float32", bos_id=None, eos_id=7)
    names = {"llama": "LlamaForCausalLM", "lckv": "LckvForCausalLM", "lckv-llama": "LCKVLlamaForCausalLM"}
    facts = {
        "model_type": format,
        "architectures": [names[format]],
        "max_position_embeddings": 128,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": 7,
    }
    assert tree | facts == tree
    assert ("auto_map" in tree) == (format == "lckv")
    assert isinstance(tree.get("layer_types", ""), str)
    assert ("layer_types" in tree) == (format == "lckv-llama")  # transformers 5 refuses a text there


def test_our_own_module_is_named_for_trust_remote_code():
    tree = written(make(sharing="0_2_2_3"), "lckv")
    assert tree["auto_map"] == {
        "AutoConfig": "modeling_lckv.LckvConfig",
        "AutoModelForCausalLM": "modeling_lckv.LckvForCausalLM",
    }
    assert (tree["sharing"], tree["passes"]) == ("0_2_2_3", "trained")


def test_our_format_needs_its_map(tmp_path):
    tree = written(make(sharing="0_2_2_3"), "lckv")
    del tree["sharing"]
    with pytest.raises(UserError, match="a lckv model without `sharing`"):
        read_back(tmp_path, tree)


LLAMA = {"model_type": "llama", "vocab_size": 61, "hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 4,
         "num_attention_heads": 4, "head_dim": 6}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": ["llama"]}, r"model_type is \['llama'\]"),
        ({"model_type": {"a": 1}}, r"model_type is {'a': 1}"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, r"the type of rope_scaling is \['linear'\]"),
        ({"rope_scaling": {"type": {}}}, "the type of rope_scaling is {}"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; at most 10,000"),
        ({"rope_scaling": 3}, "rope_scaling is 3; it must be a mapping"),
    ],
)
def test_odd_values_are_one_sentence(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        read_back(tmp_path, LLAMA | changes)


def test_a_file_nested_too_deeply_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_config(tmp_path / "config.json")


def test_both_words_for_rope_must_say_the_same(tmp_path):
    linear = {"rope_type": "linear", "factor": 2.0}
    same = LLAMA | {"rope_parameters": linear | {"rope_theta": 5e5}, "rope_scaling": {"type": "linear", "factor": 2}}
    config = read_back(tmp_path, same)
    assert (config.rope_theta, config.rope_scaling.factor) == (5e5, 2.0)
    assert read_back(tmp_path, same | {"rope_theta": 5e5}) == config
    assert read_back(tmp_path, same | {"rope_scaling": None}) == config
    for stale in ({"rope_scaling": linear | {"factor": 4.0}}, {"rope_scaling": {}}, {"rope_theta": 1e4}):
        with pytest.raises(UserError, match="rope_parameters and rope_scaling say different things"):
            read_back(tmp_path, same | stale)
