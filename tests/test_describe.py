"""What `describe` says: exact parameter counts, and numbers that follow from the map."""

import re
from functools import partial
from pathlib import Path

import jax
import pytest

from lckv_jax import KVSharing, ModelConfig
from lckv_jax.config import RunConfig, load_config
from lckv_jax.describe import count_parameters, describe
from lckv_jax.model.transformer import init_params

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.yaml"))
SIZES = {
    "vocab_size": 23, "hidden_size": 8, "intermediate_size": 12, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 6,
}  # fmt: skip


def initialised(config):
    return sum(p.size for p in jax.tree.leaves(jax.eval_shape(partial(init_params, config), jax.random.key(0))))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sharing": "0_2_2_3"},
        {"sharing": "3_3_3_3", "num_kv_heads": 1},
        {"tie_embeddings": True},
        {"attention_bias": True, "sharing": "cla"},
        {"mlp_bias": True, "tie_embeddings": True, "sharing": "yoco"},
    ],
    ids=str,
)
def test_count_equals_the_initialised_tree(changes):
    config = ModelConfig(**SIZES | changes)
    assert count_parameters(config) == initialised(config)


def test_count_of_known_models():
    """TinyLlama has 1.10 billion parameters, and 11.5 and 20 million fewer with LCKV w=10 and w=2 (2405.10637)."""
    sizes = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_layers": 22, "num_heads": 32}
    sizes |= {"num_kv_heads": 4, "head_dim": 64}
    standard, w10, w2 = (
        count_parameters(ModelConfig(**sizes, sharing=spec)) for spec in ("standard", "lckv(10)", "lckv(2)")
    )
    assert standard == 1_100_048_384
    assert standard - w10 == 11 * 2 * 2048 * 4 * 64
    assert standard - w2 == 19 * 2 * 2048 * 4 * 64


def rows(text):
    """{name: (this map, standard, ratio)} of the table."""
    found = re.findall(r"^(\S.*?)  +([\d,.]+) +([\d,.]+) +([\d.]+)$", text, re.MULTILINE)
    return {name: tuple(float(x.replace(",", "")) for x in numbers) for name, *numbers in found}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs(path):
    config = load_config(path)
    model, text = config.model, describe(config)
    standard = model.model_copy(update={"sharing": KVSharing.parse("standard", model.num_layers)})
    assert text.startswith(f"sharing {model.sharing}\n")
    assert model.sharing.diagram() in text
    assert f"at sequence length {config.data.seq_len}" in text
    assert (f"m = {model.no_grad_passes} without and b = {model.grad_passes} with" in text) == model.sharing.cyclic
    table = rows(text)
    assert len(table) == 6
    for mine, theirs, ratio in table.values():
        assert ratio == pytest.approx(mine / theirs, abs=1e-3)
    assert table["parameters"][:2] == (initialised(model), initialised(standard))
    assert table["layers with K,V"][:2] == (len(set(model.sharing.sources)), model.num_layers)
    for name, part in (("training", "train"), ("prompt", "forward")):
        want = [getattr(sizes.flops(config.data.seq_len), part) for sizes in (model, standard)]
        assert table[f"{name} FLOPs a token"][:2] == pytest.approx(want, abs=1)


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_cache_row_counts_the_dtype(dtype, size):
    model = ModelConfig(**SIZES, sharing="0_2_2_3", dtype=dtype)
    text = describe(RunConfig.model_validate({"out": "x", "model": model, "train": {"steps": 99}}))
    row = rows(text)[f"KV cache, bytes a token ({dtype})"]
    assert row == (3 * 2 * 2 * 6 * size, 4 * 2 * 2 * 6 * size, 0.75)


def test_settings_of_the_passes_are_shown():
    model = ModelConfig(**SIZES, sharing="0_2_2_3", no_grad_passes=5, grad_passes=3, start="input", tolerance=0.01)
    text = describe(RunConfig.model_validate({"out": "x", "model": model, "train": {"steps": 99}}))
    assert "m = 5 without and b = 3 with gradient, start: input, until a change of 0.01" in text
