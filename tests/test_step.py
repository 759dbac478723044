"""The compiled step: donation, no full logits, the schedule of m, the optimiser's rules; and the same on any mesh."""

import re
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lckv_jax import checkpoint
from lckv_jax.config import MeshConfig, load_config
from lckv_jax.errors import UserError
from lckv_jax.model.loss import loss_sum
from lckv_jax.model.transformer import init_params
from lckv_jax.parallel.mesh import batch_sharding, check_sizes, make_mesh
from lckv_jax.train import step as step_module
from lckv_jax.train.optimizer import make_optimizer
from lckv_jax.train.state import abstract_state, evaluated_params, init_state
from lckv_jax.train.step import (
    layer_gradient_norms,
    make_eval_step,
    make_train_step,
    mean_gradients,
    no_grad_passes_at,
)


def random_batch(config, seed=0):
    """Random tokens with unequal padding: a share of the labels that grows with the row is ignored."""
    rng = np.random.default_rng(seed)
    shape = (config.data.batch_size, config.data.seq_len + 1)
    tokens = rng.integers(0, config.model.vocab_size, shape)
    labels = np.where(rng.random(shape) < np.linspace(0, 0.9, shape[0])[:, None], -100, tokens)
    segments = np.sort(rng.integers(1, 4, shape), axis=1)
    batch = {"tokens": tokens, "labels": labels, "segment_ids": segments}
    return {name: x.astype(np.int32) for name, x in batch.items()}


def test_compiled_step_donates_the_state_and_holds_no_full_logits(tiny_config):
    overrides = ["model.vocab_size=4096", "train.loss_chunk=8", "train.ema_decay=0.9", "train.skip_spikes=6"]
    config = load_config(tiny_config, overrides)
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


def test_accumulation_equals_the_big_batch(tiny_config):
    """With unequal padding and z-loss, to 1e-6 in every gradient."""
    overrides = ["model.init_std=0.2", "data.batch_size=8", "train.z_loss=1e-2"]
    big, small = (load_config(tiny_config, [*overrides, f"train.accumulation={number}"]) for number in (1, 4))
    params, batch = init_params(big.model, jax.random.key(0)), random_batch(big)
    (want, aux), (got, more) = (
        jax.jit(partial(mean_gradients, config, no_grad_passes=2))(params, batch) for config in (big, small)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-6), got, want)
    assert min(float(jnp.abs(x).max()) for x in jax.tree.leaves(want)) > 1e-3
    assert int(aux["count"]) == int(more["count"]) == int((batch["labels"][:, 1:] != -100).sum())
    np.testing.assert_allclose(more["nll"], aux["nll"], rtol=1e-6)
    np.testing.assert_allclose(more["residual"], aux["residual"], rtol=1e-5)
    assert int(more["passes"]) == int(aux["passes"]) == 4


def test_micro_batches_that_do_not_fit_the_mesh_are_refused(tiny_config):
    config = load_config(tiny_config, ["data.batch_size=8", "train.accumulation=4"])
    with pytest.raises(UserError, match=r"train.accumulation=4 makes micro-batches of 2 rows, .* the 4 devices"):
        make_train_step(config, None, _mesh(data=2, fsdp=2, tensor=1))


POISON, SPIKE = 1, 2  # first tokens of a batch


def poisoned(*arguments, **settings):
    total, aux = loss_sum(*arguments, **settings)
    first = settings["batch"]["tokens"][0, 0]
    factor = jnp.where(first == POISON, jnp.nan, jnp.where(first == SPIKE, 50.0, 1.0))
    return total * factor, {**aux, "nll": aux["nll"] * factor}


def test_an_update_left_out_changes_nothing_and_the_average_follows_the_others(tiny_config, monkeypatch):
    """Batches: good, NaN, good, good, spike, NaN, good."""
    monkeypatch.setattr(step_module, "loss_sum", poisoned)
    overrides = ["train.ema_decay=0.27", "train.skip_spikes=4", "train.spike_window=6"]
    config = load_config(tiny_config, [*overrides, "train.accumulation=2"])
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        state, step = init_state(config, optimizer, mesh), make_train_step(config, optimizer, mesh)
        states, told = [jax.device_get(state)], []
        for index, first in enumerate((3, POISON, 3, 3, SPIKE, POISON, 3)):
            batch = random_batch(config, index)
            batch["tokens"][0, 0] = first
            state, metrics = step(state, batch)
            states.append(jax.device_get(state))
            told.append([int(metrics[name]) for name in ("skip_cause", "skipped", "skipped_in_a_row")])
    assert step._cache_size() == 1
    assert told == [[0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 1, 0], [1, 2, 1], [1, 3, 2], [0, 3, 0]]
    average, made = states[0]["params"], 0
    for index, (old, new) in enumerate(pairwise(states)):
        assert new["step"] == index + 1
        if told[index][0]:
            for part in ("params", "opt", "ema"):
                jax.tree.map(np.testing.assert_array_equal, old[part], new[part])
            np.testing.assert_array_equal(old["spikes"]["window"], new["spikes"]["window"])
            continue
        assert np.any(old["params"]["embed"] != new["params"]["embed"])
        decay, made = min(0.27, (1 + made) / (10 + made)), made + 1
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, average, new["params"])
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), new["ema"], average)
    assert evaluated_params(states[-1]) is states[-1]["ema"]
    assert evaluated_params({"params": 1}) == 1


@pytest.mark.parametrize("name", ["adafactor", "muon"])  # AdamW: see the resumed runs of test_train.py
def test_a_state_comes_back_from_its_checkpoint_bit_for_bit(tiny_config, tmp_path, name):
    overrides = [f"optimizer.name={name}", "train.ema_decay=0.9", "train.skip_spikes=6", "train.spike_window=4"]
    config = load_config(tiny_config, overrides)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), checkpoint.open_checkpoints(tmp_path / "checkpoints", 1) as manager:
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        rng = np.random.default_rng(0)
        drawn = lambda x: jax.device_put((rng.integers(1, 1000, x.shape) / 7).astype(x.dtype), x.sharding)  # noqa: E731
        abstract = abstract_state(config, optimizer, mesh)
        state = jax.tree.map(drawn, abstract)
        checkpoint.save(manager, state, config)
        restored = checkpoint.restore(manager, abstract)
    assert restored is not None
    jax.tree.map(np.testing.assert_array_equal, state, restored[0])


def test_norms_of_layers_add_up_to_that_of_all(tiny_config):
    config = load_config(tiny_config, ["model.attention_bias=true", "model.sharing=0_2_2_3"]).model
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    got = jax.jit(partial(layer_gradient_norms, config))(grads)
    assert got.keys() == {"layer_grad_norms", "embed_grad_norm", "head_grad_norm", "final_norm_grad_norm"}
    squares = lambda arrays: sum(np.sum(np.square(x, dtype=np.float64)) for x in arrays)  # noqa: E731
    np.testing.assert_allclose(squares(got.values()), squares(jax.tree.leaves(grads)), rtol=1e-6)
    mine = [*(x[2] for x in grads["layers"].values()), *(x[1] for x in grads["kv"].values())]  # layer 2 owns slot 1
    np.testing.assert_allclose(got["layer_grad_norms"][2] ** 2, squares(mine), rtol=1e-5)


def test_joined_documents_reach_the_model_without_segments_and_positions(tiny_config, monkeypatch):
    seen = []

    def noted(params, config, batch, **settings):
        seen.append(set(batch))
        return loss_sum(params, config, batch, **settings)

    monkeypatch.setattr(step_module, "loss_sum", noted)
    for how in ("masked", "joined"):
        config = load_config(tiny_config, [f"data.packing={how}"])
        params = jax.eval_shape(partial(init_params, config.model), jax.random.key(0))
        batch = random_batch(config)
        jax.eval_shape(partial(mean_gradients, config, no_grad_passes=2), params, batch)
        jax.eval_shape(make_eval_step(config), params, batch)
    assert seen == [{"tokens", "labels", "segment_ids"}] * 2 + [{"tokens", "labels"}] * 2


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


def on_eight_devices(script, *arguments):
    """What a script says, in a process of its own, since the number of fake devices is fixed when jax starts."""
    folder = Path(__file__).parent
    command = [sys.executable, folder / script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_loss_gradients_and_accumulation_are_the_same_on_any_mesh():
    assert on_eight_devices("meshes.py").count("equal") == 4


@pytest.mark.parametrize(
    ("which", "number"), [("some", 3), pytest.param("all", 8, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_ten_steps_are_the_same_on_any_mesh_and_fsdp_keeps_everything_split(which, number):
    said = on_eight_devices("trajectories.py", which)
    assert said.count("equal") == number and said.count("split") == 2
