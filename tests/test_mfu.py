"""FLOP utilisation: the peak of a device by name, and the formula with the passes that were made."""

import pytest
from small_runs import run_config

from lckv_jax.errors import UserError
from lckv_jax.train.mfu import peak_flops, utilisation


def bfloat16_run(sharing="0_2_2_3", **fields):
    return run_config(**{"sharing": sharing, "dtype": "bfloat16", **fields})


@pytest.mark.parametrize(
    ("kind", "platform", "peak"),
    [
        ("TPU v2", "tpu", 23e12),  # half a chip
        ("TPU v4", "tpu", 275e12),
        ("TPU v5 lite", "tpu", 197e12),
        ("TPU v5", "tpu", 459e12),
        ("TPU v6 lite", "tpu", 918e12),
        ("TPU7x", "tpu", 1153.5e12),
        ("NVIDIA A100-SXM4-80GB", "gpu", 312e12),
        ("NVIDIA H100 80GB HBM3", "gpu", 989.4e12),
        ("NVIDIA H100 PCIe", "gpu", 756.5e12),
        ("NVIDIA H200", "gpu", 989.4e12),
        ("NVIDIA GeForce RTX 4090", "gpu", 165.2e12),
    ],
)
def test_known_devices(kind, platform, peak):
    assert peak_flops(bfloat16_run(), kind, platform) == pytest.approx(peak)


@pytest.mark.parametrize("kind", ["Radeon", "NVIDIA H200 MIG 1g.18gb", "NVIDIA H100", "TPU v9", "Tesla V100-SXM2-16GB"])
def test_an_unknown_device_is_asked_for(kind):
    with pytest.raises(UserError, match=rf"the peak of device '{kind}' is not known: give metrics.peak_flops=\.\.\. "):
        peak_flops(bfloat16_run(), kind, "gpu")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_table_holds_for_bfloat16_only(dtype):
    assert peak_flops(bfloat16_run(), "NVIDIA H200", "gpu") == 989.4e12
    assert peak_flops(bfloat16_run(dtype=dtype), "NVIDIA H200", "gpu") is None


def test_what_is_given_decides():
    for kind, platform in (("Radeon", "gpu"), ("NVIDIA H200", "gpu"), ("cpu", "cpu")):
        assert peak_flops(bfloat16_run(metrics={"peak_flops": 2e12}, dtype="float32"), kind, platform) == 2e12
        assert peak_flops(bfloat16_run(metrics={"peak_flops": 0.0}, dtype="float32"), kind, platform) is None
    assert peak_flops(bfloat16_run(dtype="float32"), "cpu", "cpu") is None


def test_both_utilisations_are_equal_without_sharing():
    used = utilisation(bfloat16_run("standard"), 1, 1e6, 2, 1e12)
    assert used["mfu"] == used["hfu"] > 0
    assert used["device_flops_per_second"] == pytest.approx(used["hfu"] * 1e12)


def test_the_formula_by_hand():
    """A standard model without attention over others (T = 1): 6 FLOPs a token for each parameter of a product."""
    config = bfloat16_run("standard")
    config = config.model_copy(update={"data": config.data.model_copy(update={"seq_len": 1})})
    products = 4 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24) + 16 * 64
    scores = 4 * 2 * 16 * 2  # one key: q.k and its value, in each layer
    want = 3 * (2 * products + scores) * 500 / 4
    assert utilisation(config, 1, 500.0, 4, 1e9)["mfu"] == pytest.approx(want / 1e9, rel=1e-4)


def test_every_pass_counts_for_the_hardware_and_none_for_the_model():
    config = bfloat16_run(no_grad_passes=7, grad_passes=2)
    used = {passes: utilisation(config, passes, 1e6, 1, 1e12) for passes in (2, 4, 5, 9)}
    assert len({each["mfu"] for each in used.values()}) == 1
    hfu = {passes: each["hfu"] for passes, each in used.items()}
    assert hfu[2] < hfu[4] < hfu[5] < hfu[9]
    assert hfu[9] - hfu[5] == pytest.approx(4 * (hfu[5] - hfu[4]), rel=1e-3)  # each more costs the same
    assert hfu[9] == pytest.approx(config.model.flops(32).train * 1e6 / 1e12, rel=1e-4)
    assert used[9]["mfu"] == utilisation(bfloat16_run("standard"), 1, 1e6, 1, 1e12)["mfu"]


def test_without_a_peak_only_the_rate_is_told():
    assert utilisation(bfloat16_run(), 9, 1e6, 1, None).keys() == {"device_flops_per_second"}


def test_a_tolerance_may_have_stopped_before_the_first_pass():
    assert utilisation(bfloat16_run(tolerance=0.5), 2, 1e6, 1, 1e12)["hfu"] > 0
