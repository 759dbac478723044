"""The compiled step: donation, no full logits, the schedule of m, the optimiser's rules; and the same on any mesh."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lckv_jax.config import MeshConfig, load_config
from lckv_jax.errors import UserError
from lckv_jax.model.transformer import init_params
from lckv_jax.parallel.mesh import batch_sharding, check_sizes, make_mesh
from lckv_jax.train.optimizer import decayed, learning_rate, make_optimizer
from lckv_jax.train.state import abstract_state
from lckv_jax.train.step import make_train_step, no_grad_passes_at


def test_compiled_step_donates_the_state_and_holds_no_full_logits(tiny_config):
    config = load_config(tiny_config, ["model.vocab_size=4096", "train.loss_chunk=8"])
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        state = abstract_state(config, optimizer, mesh)
        row = jax.ShapeDtypeStruct(
            (config.data.batch_size, config.data.seq_len + 1), jnp.int32, sharding=batch_sharding(mesh)
        )
        batch = dict.fromkeys(("tokens", "labels", "segment_ids", "positions"), row)
        text = make_train_step(config, optimizer, mesh).lower(state, batch).compile().as_text()
    aliased = re.search(r"input_output_alias=\{(.*?)\}, entry", text)[1]
    assert aliased.count("may-alias") + aliased.count("must-alias") == len(jax.tree.leaves(state))
    sizes = {int(np.prod([int(n) for n in dims.split(",")])) for dims in re.findall(r"[a-z]+\d+\[([\d,]+)\]", text)}
    logits = config.data.batch_size * config.data.seq_len * config.model.vocab_size
    assert max(sizes) < logits
    assert max(sizes) >= 4096 * 32  # the embedding is there, so shapes were read


def test_schedule_of_passes(tiny_config):
    config = load_config(tiny_config, ["train.no_grad_passes_schedule=[[0, 2], [10, 5], [20, 1]]"])
    got = [int(no_grad_passes_at(config, jnp.asarray(step))) for step in (0, 9, 10, 19, 20, 99)]
    assert got == [2, 2, 5, 5, 1, 1]
    assert no_grad_passes_at(load_config(tiny_config), jnp.asarray(3)) == 2


def test_learning_rate_warms_up_and_ends_at_its_fraction(tiny_config):
    config = load_config(
        tiny_config, ["optimizer={learning_rate: 1.0, warmup_steps: 4, final_fraction: 0.1}"]
    ).optimizer
    rates = [float(learning_rate(config, 20)(step)) for step in range(20)]
    np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(rates[-1], 0.1, rtol=1e-6)
    halfway = 0.1 + 0.9 * (1 + np.cos(np.pi * 8 / 16)) / 2
    np.testing.assert_allclose(rates[11], halfway, rtol=1e-6)
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_only_matrices_decay(tiny_config):
    config = load_config(tiny_config, ["model.attention_bias=true", "model.mlp_bias=true"]).model
    mask = decayed(jax.eval_shape(partial(init_params, config), jax.random.key(0)))
    assert not any(mask["layers"][name] for name in ("attn_norm", "mlp_norm", "bq", "bo", "gate_bias", "down_bias"))
    assert all(mask["layers"][name] for name in ("wq", "wo", "gate", "up", "down"))
    assert mask["kv"] == {"wk": True, "wv": True, "bk": False, "bv": False}
    assert (mask["embed"], mask["head"], mask["final_norm"]) == (True, True, False)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [({"data": 3}, "does not fit"), ({"data": -1, "fsdp": 5}, "does not fit"), ({"tensor": 2}, "does not fit")],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, message):
    with pytest.raises(UserError, match=message):
        make_mesh(MeshConfig(**mesh), jax.devices() * (1 if mesh.get("tensor") is None else 3))


def test_sizes_that_do_not_divide_are_refused_with_the_numbers(tiny_config):
    model = load_config(tiny_config).model

    with pytest.raises(UserError, match=r"batch_size=12 is not divisible by the 8 devices"):
        check_sizes(model, 12, _mesh(data=2, fsdp=4, tensor=1))
    with pytest.raises(UserError, match=r"num_heads=4 is not divisible by mesh.tensor=8"):
        check_sizes(model, 8, _mesh(data=1, fsdp=1, tensor=8))


def _mesh(**shape):
    return SimpleNamespace(shape=shape)  # all that is asked of a mesh here, without the devices


def test_loss_and_gradients_are_the_same_on_any_mesh():
    """In a process of its own, since the number of fake devices is fixed when jax starts."""
    result = subprocess.run(
        [sys.executable, Path(__file__).parent / "meshes.py"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("equal") == 3
