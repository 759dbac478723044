"""Model FLOP utilisation: what a run computes a second, against what its devices can at most."""

from __future__ import annotations

from functools import lru_cache

from lckv_jax.config import ModelConfig, RunConfig
from lckv_jax.errors import UserError
from lckv_jax.sharing import KVSharing

# Dense bfloat16 TFLOP/s of one JAX device (accumulating to float32, no sparsity, no boost by FP8), by its exact
# `device_kind`: a slice of a card (MIG) or a variant that is not listed has another peak and is asked for.
# TPU: Google Cloud's pages "System architecture" of each version; v2 and v3: Jouppi et al. 2021 (46 and 123 a chip).
# A v2, v3 or 7x chip shows as two devices. NVIDIA: data sheets, halved where they print the rate with sparsity.
_BFLOAT16_TFLOPS: dict[str, float] = {
    "TPU v2": 46 / 2,
    "TPU v3": 123 / 2,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5": 459,
    "TPU v5p": 459,
    "TPU v6 lite": 918,
    "TPU v6e": 918,
    "TPU7x": 2307 / 2,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A800-SXM4-80GB": 312,
    "NVIDIA A800 80GB PCIe": 312,
    "NVIDIA A10": 125,
    "NVIDIA A30": 165,
    "NVIDIA A40": 149.7,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA H100 80GB HBM3": 989.4,  # SXM5
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H800": 989.4,
    "NVIDIA H800 PCIe": 756.5,
    "NVIDIA H20": 148,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA B200": 2250,
    "NVIDIA GB200": 2500,
    "NVIDIA L4": 121,
    "NVIDIA L40": 181,
    "NVIDIA L40S": 362,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 5090": 209.5,
}


def peak_flops(config: RunConfig, device_kind: str, platform: str) -> float | None:
    """FLOP/s that one device can make at most in the compute dtype; None where there is no MFU to tell.

    `metrics.peak_flops` decides. Without it there is none on a CPU, and none in another dtype than bfloat16: what a
    float32 product costs depends on the precision that it is given. Raises UserError for an unknown device, instead of
    guessing.
    """
    given, dtype = config.metrics.peak_flops, config.model.dtype
    if given is not None:
        return given or None
    if platform == "cpu":
        return None
    if device_kind not in _BFLOAT16_TFLOPS:
        mend = f"give metrics.peak_flops=... (FLOP/s of one device in {dtype}), or 0 for no MFU"
        raise UserError(f"the peak of device {device_kind!r} is not known: {mend}")
    return _BFLOAT16_TFLOPS[device_kind] * 1e12 if dtype == "bfloat16" else None


def utilisation(
    config: RunConfig, passes: int, tokens_per_second: float, devices: int, peak: float | None
) -> dict[str, float]:
    """How well the devices are used, for the record of a step that made `passes` passes over its cyclic spans.

    device_flops_per_second: training FLOPs a token of this map, with every pass that was made, x tokens_per_second /
    devices. hfu (hardware FLOP utilisation): that / peak. mfu (model FLOP utilisation): the same with the training
    FLOPs a token of the standard map of the same sizes, whatever the passes cost. So mfu compares runs by the tokens
    they get through, hfu says how busy the devices were; hfu / mfu is the price of the passes. The FLOPs are those of
    the formula in KVSharing.flops: full rows, recomputation (remat) and validation not counted; `passes` is the most
    that any micro-batch made, so with a tolerance hfu is an upper bound. mfu and hfu are left out where peak is None.
    """
    seq_len = config.data.seq_len
    each = tokens_per_second / devices
    no_grad_passes = max(passes - config.model.grad_passes, 0)  # 0 where the map has no cyclic span
    executed = each * _training_flops(config.model, seq_len, no_grad_passes)  # pyright: ignore[reportArgumentType]
    record = {"device_flops_per_second": executed}
    if peak is not None:
        record["mfu"] = each * _standard_flops(config.model, seq_len) / peak  # pyright: ignore[reportArgumentType]
        record["hfu"] = executed / peak
    return {name: float(f"{value:.5g}") for name, value in record.items()}


@lru_cache(maxsize=64)  # a frozen model hashes, which pyright does not know
def _training_flops(model: ModelConfig, seq_len: int, no_grad_passes: int) -> float:
    # model_copy does not validate: a tolerance beside m = 0 is no mistake here
    return model.model_copy(update={"no_grad_passes": no_grad_passes}).flops(seq_len).train


@lru_cache(maxsize=64)
def _standard_flops(model: ModelConfig, seq_len: int) -> float:
    standard = KVSharing.parse("standard", model.num_layers)
    return model.model_copy(update={"sharing": standard}).flops(seq_len).train
