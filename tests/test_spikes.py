"""Which updates are left out, what is remembered of them, and when a run stops."""

import jax.numpy as jnp
import numpy as np
import pytest

from lckv_jax.config import TrainConfig, load_config
from lckv_jax.errors import UserError
from lckv_jax.train import step as step_module
from lckv_jax.train.loop import train
from lckv_jax.train.metrics import read_metrics
from lckv_jax.train.spikes import no_spikes, observe, refuse_to_go_on

NAN, INF = float("nan"), float("inf")


def causes(config, pairs):
    """The cause at each step, and what is remembered at the end."""
    spikes, found = no_spikes(config), []
    for step, (loss, norm) in enumerate(pairs):
        cause, spikes = observe(config, spikes, jnp.asarray(step), jnp.float32(loss), jnp.float32(norm))
        found.append(int(cause))
    return found, {name: np.asarray(x) for name, x in spikes.items()}


def reference(config, pairs):
    """The same in plain Python: a list of the pairs whose update was made."""
    made, found = [], []
    for pair in pairs:
        bad = ~np.isfinite(pair)
        held = np.asarray(made[-config.spike_window :], np.float64)
        if config.skip_spikes and 2 * len(made) >= config.spike_window:
            bad |= np.asarray(pair) > held.mean(axis=0) + config.skip_spikes * held.std(axis=0)
        found.append(1 if bad[0] else 2 if bad[1] else 0)
        if not found[-1]:
            made.append(pair)
    return found, made


def test_what_is_not_finite_is_left_out_and_counted():
    pairs = [(5, 1), (NAN, 1), (5, INF), (-INF, NAN), (5, 1), (5, NAN)]
    found, spikes = causes(TrainConfig(steps=9), pairs)
    assert found == [0, 1, 2, 1, 0, 2]
    assert spikes.keys() == {"skipped", "in_a_row"}  # nothing else is kept where nothing else is asked
    assert (spikes["skipped"], spikes["in_a_row"]) == (4, 1)


def test_spikes_are_left_out_as_in_the_plain_reference():
    config = TrainConfig(steps=9, skip_spikes=2.5, spike_window=8)
    rng = np.random.default_rng(0)
    pairs = rng.normal((5.0, 1.0), 0.1, (60, 2))
    pairs[[3, 20, 41], [0, 1, 0]] = 9.0  # the first comes before half of the window is filled
    pairs[[10, 30, 31], [0, 1, 0]] = NAN
    pairs[50:] -= 1.0  # a fall is no spike
    found, spikes = causes(config, pairs)
    want, made = reference(config, [tuple(pair) for pair in pairs])
    assert found == want
    assert (found[3], found[20], found[41], found[10], found[30], found[31]) == (0, 2, 1, 1, 2, 1)
    assert spikes["skipped"] == 60 - len(made)
    order = [index % 8 for index in range(len(made) - 8, len(made))]
    np.testing.assert_allclose(spikes["window"][:, order].T, np.asarray(made[-8:]), rtol=1e-6)


def test_a_nan_does_not_blind_the_window():
    config = TrainConfig(steps=9, skip_spikes=3.0, spike_window=4)
    found, spikes = causes(config, [(5, 1), (5.1, 1), (5, 1), (5.1, 1), (NAN, NAN), (50, 1), (INF, 1)])
    assert found == [0, 0, 0, 0, 1, 1, 1]
    assert np.isfinite(spikes["window"]).all()


def test_three_in_a_row_stop_the_run_and_two_do_not(tiny_config):
    config = load_config(tiny_config, ["train.skip_spikes=6", "out=there"])
    metrics = {"loss": 5.0, "grad_norm": 80.0, "param_norm": 1.0, "skip_cause": 2}
    refuse_to_go_on(config, {**metrics, "skipped_in_a_row": 2}, 9, 4)
    with pytest.raises(
        UserError,
        match=r"^step 9: grad_norm is 80, more than train.skip_spikes=6 standard deviations .*, update 3 in a row that "
        r"is left out; the newest checkpoint is there/checkpoints/4; .* a higher train.skip_spikes",
    ):
        refuse_to_go_on(config, {**metrics, "skipped_in_a_row": 3}, 9, 4)
    with pytest.raises(UserError, match=r"^step 9: param_norm is not finite .*; there is no checkpoint yet"):
        refuse_to_go_on(config, {**metrics, "param_norm": INF, "skipped_in_a_row": 0}, 9, None)


def test_a_run_stops_at_the_third_batch_that_is_not_finite(tiny_config, tmp_path, monkeypatch):
    loss_sum = step_module.loss_sum

    def poisoned(*arguments, **settings):
        total, aux = loss_sum(*arguments, **settings)
        return total * NAN, aux

    monkeypatch.setattr(step_module, "loss_sum", poisoned)
    with pytest.raises(UserError, match=r"step 3: grad_norm is not finite \(batch 2 of seed 0\), update 3 in a row"):
        train(load_config(tiny_config, ["train.eval_every=100"]))
    records = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in record]
    assert [record["skipped_in_a_row"] for record in records] == [1, 2, 3]
    assert all(record["grad_norm"] is None and record["param_norm"] > 0 for record in records)
