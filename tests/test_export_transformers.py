"""An exported standard map is a Llama model of stock transformers: the same logits, tokens and bits."""

# ruff: noqa: E402 (torch may be absent: nothing is imported before that is asked)

import os

from conftest import needs_torch

needs_torch()
os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from small_runs import run_config
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

from lckv_jax.checkpoint import open_checkpoints, save
from lckv_jax.convert.export import export
from lckv_jax.convert.hub import to_hub
from lckv_jax.model.transformer import forward, init_params

SIZES = dict(sharing="standard", hidden_size=24, intermediate_size=40, num_heads=4, num_kv_heads=2, head_dim=8)
MODELS = {
    "gqa": {},
    "mha": {"num_kv_heads": 4, "head_dim": 6},
    "mqa-tied": {"num_kv_heads": 1, "tie_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 500.0, "norm_eps": 1e-3},
    "llama3": {
        "rope_theta": 100.0,
        "rope_scaling": {
            "type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
}
TOKENS = np.random.default_rng(1).integers(0, 64, (2, 24)).astype(np.int32)


def exported(folder, dtype=np.float32, **model):
    """(folder of the export, model configuration, parameters) of a random model with a standard map."""
    config = run_config(folder / "run", **SIZES | model)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(partial(init_params, config.model), jax.random.key(0))
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(rng.normal("norm" in str(path), 0.3, leaf.shape).astype(dtype)), shapes
    )
    with open_checkpoints(folder / "run" / "checkpoints", keep=1) as manager:
        save(manager, {"params": params, "step": jnp.int32(1)}, config)
    return folder / "out", config.model, params


def opened(folder):
    """The model as stock transformers open it, which must miss no tensor and find none to spare."""
    model, told = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens_are_ours(tmp_path, name):
    folder, config, params = exported(tmp_path, **MODELS[name])
    assert export(tmp_path / "run", folder).format == "llama"
    model = opened(folder)
    assert model.dtype == torch.float32
    ours = jax.jit(lambda tokens: forward(params, config, tokens))
    with torch.no_grad():
        theirs = model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    logits = np.asarray(ours(TOKENS))
    assert logits.std() > 0.5  # so that 1e-4 is small
    np.testing.assert_allclose(theirs, logits, atol=1e-4, rtol=0)
    prompt = torch.tensor(TOKENS[:, :6], dtype=torch.long)
    made = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    rows = np.zeros_like(TOKENS)
    rows[:, :6] = TOKENS[:, :6]
    for length in range(6, 18):
        rows[:, length] = np.asarray(ours(rows))[:, length - 1].argmax(-1)
    np.testing.assert_array_equal(made.numpy(), rows[:, :18])


@pytest.mark.parametrize("shards", ["5GB", "4KB"])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_every_bit_arrives(tmp_path, dtype, shards):
    folder, config, params = exported(tmp_path, dtype, attention_bias=True)
    export(tmp_path / "run", folder, max_shard_size=shards)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shards == "4KB")
    found = opened(folder).state_dict()
    right = to_hub(params, config)
    assert found.keys() == right.keys()
    for name, tensor in right.items():
        assert str(found[name].dtype) == f"torch.{tensor.dtype.name}"
        bits = found[name].view(torch.int16 if tensor.itemsize == 2 else torch.int32).numpy()
        np.testing.assert_array_equal(bits, tensor.view(bits.dtype), err_msg=name)


def test_auto_classes_and_generation_config_read_the_folder(tmp_path):
    folder, config, _ = exported(tmp_path, max_position_embeddings=99)
    export(tmp_path / "run", folder, dtype="bfloat16")
    read = AutoConfig.from_pretrained(folder)
    assert (read.model_type, read.max_position_embeddings, read.head_dim) == ("llama", 99, config.head_dim)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    GenerationConfig.from_pretrained(folder).validate()
