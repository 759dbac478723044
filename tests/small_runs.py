"""The configuration of a run too small to mention, for tests that train nothing."""

from lckv_jax.config import RunConfig, build_config


def run_config(out="run", metrics=None, **model):
    """9 steps of 8 x 32 tokens with an LCKV model of 4 layers; other fields of `model` and `metrics` as given."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_layers": 4, "num_heads": 4}
    tree = {
        "out": str(out),
        "model": {**sizes, "num_kv_heads": 2, "head_dim": 4, "sharing": "0_2_2_3", **model},
        "data": {"seq_len": 32},
        "optimizer": {"warmup_steps": 0},
        "train": {"steps": 9},
        "metrics": metrics or {},
    }
    return build_config(RunConfig, tree, "test")
