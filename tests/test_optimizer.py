"""Schedules against closed formulas, optimisers against their published rules in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lckv_jax.config import OptimizerConfig, load_config
from lckv_jax.model.transformer import init_params
from lckv_jax.train.optimizer import decayed, learning_rate, make_optimizer

NAMES = ("adamw", "lion", "adafactor", "muon")
SHAPES = {
    "embed": (10, 6),
    "layers": {"attn_norm": (3, 6), "wq": (3, 6, 2, 4), "wo": (3, 2, 4, 6), "gate": (3, 6, 9), "bq": (3, 2, 4)},
    "kv": {"wk": (2, 6, 1, 4)},
    "final_norm": (6,),
}


def normal_tree(seed):
    rng = np.random.default_rng(seed)
    draw = lambda shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def config_of(name, **changes):
    plain = {"schedule": "constant", "learning_rate": 0.1, "warmup_steps": 0, "weight_decay": 0.0, "clip_norm": None}
    return OptimizerConfig(name=name, **{**plain, **changes})


def updates_of(config, grads, params):
    """The update of each step, all made from the same parameters."""
    optimizer = make_optimizer(config, 100)
    state, found = optimizer.init(params), []
    for step, grad in enumerate(grads):
        update, state = optimizer.update(grad, state, params, step=jnp.asarray(step))
        found.append(update)
    return found


# ---------------------------------------------------------------- schedules


def rates(steps, **settings):
    config = OptimizerConfig(learning_rate=2.0, final_fraction=0.1, **settings)
    return [float(learning_rate(config, steps)(jnp.asarray(step))) for step in range(steps)]


def falling(schedule, done):
    """Share of the peak when `done` of the steps after warm-up are done."""
    if schedule == "cosine":
        return 0.1 + 0.9 * (1 + np.cos(np.pi * done)) / 2
    if schedule == "linear":
        return 1 - 0.9 * done
    if schedule == "wsd":  # 16 of 20 steps after the warm-up, of which the last 5 fall
        return 1 - 0.9 * max(0.0, done * 16 - 11) / 5
    return 1.0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_schedules_follow_their_formulas(schedule):
    got = rates(20, schedule=schedule, warmup_steps=4, decay_fraction=0.25)
    want = [0.5, 1.0, 1.5, 2.0, *(2.0 * falling(schedule, done / 16) for done in range(1, 17))]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(got[-1], 2.0 if schedule == "constant" else 0.2, rtol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup_steps", [0, 9])
def test_schedules_end_at_their_fraction_whatever_is_left(schedule, warmup_steps):
    got = rates(10, schedule=schedule, warmup_steps=warmup_steps, decay_fraction=1.0)
    np.testing.assert_allclose(got[-1], 0.2, rtol=1e-6)
    assert max(got) <= 2.0


# ---------------------------------------------------------------- rules


def test_only_matrices_decay(tiny_config):
    config = load_config(tiny_config, ["model.attention_bias=true", "model.mlp_bias=true"]).model
    mask = decayed(jax.eval_shape(partial(init_params, config), jax.random.key(0)))
    assert not any(mask["layers"][name] for name in ("attn_norm", "mlp_norm", "bq", "bo", "gate_bias", "down_bias"))
    assert all(mask["layers"][name] for name in ("wq", "wo", "gate", "up", "down"))
    assert mask["kv"] == {"wk": True, "wv": True, "bk": False, "bv": False}
    assert (mask["embed"], mask["head"], mask["final_norm"]) == (True, True, False)


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_means_the_same_for_all(name):
    """Without a gradient, matrices shrink by learning rate times weight decay, and the rest stays."""
    params = normal_tree(0)
    (update,) = updates_of(config_of(name, weight_decay=0.5), [jax.tree.map(np.zeros_like, params)], params)
    want = jax.tree.map(lambda x, matrix: -0.05 * x if matrix else np.zeros_like(x), params, decayed(params))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), update, want)


def test_the_rate_is_that_of_the_step_not_of_the_updates_made():
    params = normal_tree(0)
    config = config_of("lion", schedule="linear", final_fraction=0.0)
    optimizer = make_optimizer(config, 100)
    update, _ = optimizer.update(normal_tree(1), optimizer.init(params), params, step=jnp.asarray(49))
    np.testing.assert_allclose(np.abs(update["embed"]), 0.05, rtol=1e-6)


def clipped(tree):
    norm = np.sqrt(sum(np.sum(np.square(x.astype(np.float64))) for x in jax.tree.leaves(tree)))
    return jax.tree.map(lambda x: x.astype(np.float64) / max(norm, 1.0), tree)


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_adamw_and_lion_follow_their_papers(name):
    params, grads = normal_tree(0), [normal_tree(seed) for seed in (1, 2, 3)]
    config = config_of(name, b1=0.8, b2=0.7, eps=1e-3, weight_decay=0.3, clip_norm=1.0)
    got = updates_of(config, grads, params)
    first, second = ([jax.tree.map(np.zeros_like, params)] for _ in range(2))
    matrix = decayed(params)
    for count, grad in enumerate(map(clipped, grads), 1):
        moment = lambda decay, old, new: jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, old, new)  # noqa: E731
        if name == "adamw":
            first.append(moment(0.8, first[-1], grad))
            second.append(moment(0.7, second[-1], jax.tree.map(np.square, grad)))
            rule = lambda m, v, n=count: (m / (1 - 0.8**n)) / (np.sqrt(v / (1 - 0.7**n)) + 1e-3)  # noqa: E731
            want = jax.tree.map(rule, first[-1], second[-1])
        else:
            want = jax.tree.map(np.sign, moment(0.8, first[-1], grad))
            first.append(moment(0.7, first[-1], grad))
        want = jax.tree.map(lambda u, p, m: -0.1 * (u + 0.3 * m * p), want, params, matrix)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), got[count - 1], want)


def adafactor_of_one(grads):
    """1804.04235, algorithm 4 for a matrix, without the scale of the parameters; the last update."""
    row = col = 0.0
    for count, grad in enumerate(grads, 1):
        decay, square = 1 - count**-0.8, np.square(grad.astype(np.float64)) + 1e-30
        row = decay * row + (1 - decay) * square.mean(axis=1)
        col = decay * col + (1 - decay) * square.mean(axis=0)
    update = grads[-1] / np.sqrt(np.outer(row, col) / row.mean())
    return update / max(1.0, np.sqrt(np.mean(np.square(update))))


def test_adafactor_follows_its_paper_in_each_layer():
    params, grads = normal_tree(0), [normal_tree(seed) for seed in (1, 2, 3)]
    grads[-1]["layers"]["wq"][1] *= 100.0  # clipped by itself
    got = updates_of(config_of("adafactor"), grads, params)[-1]
    for layer in range(3):
        for name, inputs in (("wq", 6), ("wo", 8), ("gate", 6)):
            want = adafactor_of_one([grad["layers"][name][layer].reshape(inputs, -1) for grad in grads])
            np.testing.assert_allclose(got["layers"][name][layer].reshape(inputs, -1), -0.1 * want, rtol=1e-4)
    np.testing.assert_allclose(got["embed"], -0.1 * adafactor_of_one([g["embed"] for g in grads]), rtol=1e-4)


def test_adafactor_holds_rows_and_columns_instead_of_moments():
    state = make_optimizer(config_of("adafactor"), 100).init(normal_tree(0))
    sizes = sorted(x.shape for x in jax.tree.leaves(state) if x.ndim > 1 and x.shape[-1] > 1)
    stacked = [(3, 6), (3, 8)] * 2 + [(3, 6), (3, 9), (3, 6), (3, 8)]  # wq, wo, gate; attn_norm, bq
    assert sizes == sorted([*stacked, (2, 6), (2, 4)])


def test_muon_makes_each_layer_nearly_orthogonal_and_as_large_as_adamw():
    params, grads = normal_tree(0), normal_tree(1)
    (got,) = updates_of(config_of("muon"), [grads], params)
    for group, name, inputs in (("layers", "wq", 6), ("layers", "wo", 8), ("layers", "gate", 6), ("kv", "wk", 6)):
        for layer, update in enumerate(np.asarray(got[group][name])):
            matrix = update.reshape(inputs, -1)
            singular = np.linalg.svd(matrix / (-0.1 * 0.2 * np.sqrt(max(matrix.shape))), compute_uv=False)
            assert singular.min() >= 0.5 and singular.max() <= 1.5, (name, layer, singular)
            left, _, right = np.linalg.svd(grads[group][name][layer].reshape(inputs, -1), full_matrices=False)
            assert np.sum(-matrix * (left @ right)) > 0.9 * np.linalg.norm(matrix) * np.sqrt(min(matrix.shape))


def test_muon_of_a_stack_is_that_of_each_layer_alone():
    params, grads = normal_tree(0), [normal_tree(seed) for seed in (1, 2)]
    whole = updates_of(config_of("muon"), grads, params)[-1]
    for layer in range(3):
        one = lambda tree: {"layers": jax.tree.map(lambda x: x[layer : layer + 1], tree["layers"])}  # noqa: B023, E731
        alone = updates_of(config_of("muon"), [one(grad) for grad in grads], one(params))[-1]
        close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
        jax.tree.map(close, one(whole), alone)


def test_muon_leaves_the_rest_to_adamw():
    params, grads = normal_tree(0), [normal_tree(seed) for seed in (1, 2)]
    muon, adamw = (updates_of(config_of(name, weight_decay=0.3), grads, params)[-1] for name in ("muon", "adamw"))
    for name in ("embed", "final_norm"):
        np.testing.assert_array_equal(muon[name], adamw[name])
    for name in ("attn_norm", "bq"):
        np.testing.assert_array_equal(muon["layers"][name], adamw["layers"][name])
