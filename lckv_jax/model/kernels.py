"""The fast kernels behind `attend`, and the choice between them: cuDNN on NVIDIA GPUs, splash attention on TPUs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lckv_jax.config import ModelConfig
from lckv_jax.errors import UserError
from lckv_jax.model.axes import activation_spec

SAVED = "attention"  # what `save_attention` saves is named so
PADDING = jnp.iinfo(jnp.int32).min  # the document of padding, for `splash`
_FAST = {"gpu": "cudnn", "tpu": "splash"}  # the kernel of a platform
_SPLASH_BLOCKS = (512, 256, 128)


# ---------------------------------------------------------------- the choice


class Call(NamedTuple):
    """What decides whether a kernel serves: platform, compute dtype, head size, and the lengths if they are known."""

    platform: str
    dtype: str
    head_dim: int
    q_len: int | None = None
    k_len: int | None = None


def choose_backend(config: ModelConfig, platform: str | None = None, *, seq_len: int | None = None) -> tuple[str, str]:
    """The attention kernel of a run (xla, cudnn or splash), and in a sentence why.

    platform: `cpu`, `gpu` or `tpu`; by default that of this process (see `local_platform`). seq_len: T; without it the
    length is not looked at.
    Raises UserError, naming the setting to change, if the kernel that the config asks for cannot serve.
    """
    platform = local_platform() if platform is None else platform
    return resolve(config.attention, Call(platform, config.dtype, config.head_dim, seq_len, seq_len))


def resolve(wanted: str, call: Call) -> tuple[str, str]:
    """`choose_backend` for one call: `auto` is the platform's own kernel where that serves, else xla."""
    if wanted == "xla":
        return "xla", "attention kernel: xla, as model.attention says"
    if wanted == "auto":
        fast = _FAST.get(call.platform)
        if fast is None:
            return "xla", f"attention kernel: xla, because there is no other one for {call.platform}"
        refusal = _refusal(fast, call)
        if refusal is not None:
            mend = f" (for the faster one, {refusal[1]})" if refusal[1] else ""
            return "xla", f"attention kernel: xla, because {fast} {refusal[0]}{mend}"
        return fast, f"attention kernel: {fast}, the one for {call.platform}"
    if wanted not in _FAST.values():
        raise UserError(f"model.attention={wanted}: there is no such kernel; use auto, xla, cudnn or splash")
    refusal = _refusal(wanted, call)
    if refusal is not None:
        mend = f"{refusal[1]}, or model.attention=auto" if refusal[1] else "set model.attention=auto"
        raise UserError(f"model.attention={wanted}: {wanted} {refusal[0]}; {mend}")
    return wanted, f"attention kernel: {wanted}, as model.attention says"


def local_platform() -> str:
    """`cpu`, `tpu`, `gpu` for an NVIDIA GPU of compute capability 8.0 or later, else the name of the device.

    Of this process, unless the mesh in scope is one of TPUs: a step may be compiled for those where there are none.
    """
    scope = jax.sharding.get_abstract_mesh().abstract_device
    if scope is not None and scope.platform == "tpu":
        return "tpu"
    device = jax.local_devices()[0]
    if device.platform != "gpu":
        return device.platform
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return "gpu" if major.isdigit() and minor.isdigit() and int(major) >= 8 else device.device_kind


def _refusal(kernel: str, call: Call) -> tuple[str, str] | None:
    """Why a kernel does not serve a call, and the mend beside another kernel ("": none); None if it serves."""
    needed = "gpu" if kernel == "cudnn" else "tpu"
    if call.platform != needed:
        device = "an NVIDIA GPU of compute capability 8.0 or later" if kernel == "cudnn" else "a TPU"
        return f"needs {device}, and this is {call.platform}", ""
    if kernel == "cudnn" and call.dtype != "bfloat16":
        return f"computes in bfloat16, not in {call.dtype}", "set model.dtype=bfloat16"
    if call.dtype == "float64":
        return "does not compute in float64", "set model.dtype=bfloat16"
    largest = 128 if kernel == "cudnn" else 256
    if call.head_dim % 8 or call.head_dim > largest:
        return f"takes no head size {call.head_dim}", f"set model.head_dim to a multiple of 8 up to {largest}"
    if kernel == "splash" and call.q_len != call.k_len:
        return f"reads a row against itself, not {call.k_len} keys from {call.q_len} queries", ""
    if kernel == "splash" and call.q_len is not None and call.q_len % _SPLASH_BLOCKS[-1]:
        return f"takes no length {call.q_len}", f"set data.seq_len to a multiple of {_SPLASH_BLOCKS[-1]}"
    return None


def bias_bytes(config: ModelConfig, batch: int, seq_len: int) -> int:
    """Bytes of the additive biases [B, 1, T, T] by which cuDNN learns of packed documents: one for each kind of layer
    (strict or not, windowed or not). The backward pass writes as many again, gradients that nobody reads.

    batch: rows of a micro-batch on one device.
    """
    strict = [upward or config.strict_everywhere for upward in config.sharing.upward]
    return len(set(zip(strict, config.sharing.windowed))) * batch * seq_len**2 * jnp.dtype(config.dtype).itemsize


# ---------------------------------------------------------------- the kernels


def cudnn(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array | None,
    *,
    strict: bool,
    window: int | None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """`jax.nn.dot_product_attention` with the rows that have nothing to read set to zero, [B, T, N, H].

    mask_BTS: who may read what (`strict` and `window` are then not looked at); None: every row is one text, so that
    the kernel can skip what is masked. jax trains cuDNN attention at even lengths only, so odd ones get one row more.
    """
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    if mask_BTS is None and strict and (T == 1 or window == 1):
        return jnp.zeros_like(q_BTNH)
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q_BTNH, k_BSKH, v_BSKH))
    if mask_BTS is None:
        kernel = partial(_cudnn_causal, strict=strict, window=window, implementation=implementation)
        return _split_over_mesh(kernel, q, k, v)[:, :T]
    mask = jnp.pad(mask_BTS, ((0, 0), (0, T % 2), (0, S % 2)))
    out = _split_over_mesh(partial(_cudnn_masked, implementation=implementation), q, k, v, mask)[:, :T]
    return jnp.where(mask_BTS.any(axis=-1)[:, :, None, None], out, 0)


def _cudnn_causal(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, *, strict: bool, window: int | None, implementation: Any
) -> jax.Array:
    """Strict is causal with each query one place earlier: query t stands beside key t-1, the newest that it reads.

    The first query falls out and reads nothing; behind the last one comes a row that nobody looks at. A window w is
    then w-1 keys.
    """
    T = q_BTNH.shape[1]
    q = jnp.pad(q_BTNH[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0))) if strict else q_BTNH
    most = T if window is None else window - strict  # keys that a query reads
    local = None if most >= T else (most - 1, 0)
    out = jax.nn.dot_product_attention(
        q, k_BTKH, v_BTKH, is_causal=True, local_window_size=local, implementation=implementation
    )
    return jnp.pad(out[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0))) if strict else out


def _cudnn_masked(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array, *, implementation: Any
) -> jax.Array:
    """jax turns the mask into an additive bias in the dtype of q."""
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None], implementation=implementation)


def splash(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    documents_BT: jax.Array | None,
    *,
    strict: bool,
    window: int | None,
    interpret: bool = False,
) -> jax.Array:
    """Pallas' splash attention, with the rows that have nothing to read set to zero, [B, T, N, H].

    It masks by column and document, not by position. That is the rule of `readable` as long as queries and keys are
    the same tokens, a document is one stretch of columns, and positions count up by one along it; wherever it begins
    counting. Columns with position -1 are of the document PADDING, which nobody reads.
    documents_BT: the document of each token; None: every row is one text. interpret: run without a TPU (for tests).
    """
    if strict and window == 1:
        return jnp.zeros_like(q_BTNH)
    kernel = partial(_splash, strict=strict, window=window, interpret=interpret)
    rest = () if documents_BT is None else (documents_BT,)
    out = _split_over_mesh(kernel, q_BTNH, k_BTKH, v_BTKH, *rest)
    if documents_BT is None:
        return out.at[:, 0].set(0) if strict else out
    empty = documents_BT == PADDING
    if strict:  # a document's first token
        empty |= jnp.pad(documents_BT[:, 1:] != documents_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jnp.where(empty[:, :, None, None], 0, out)


def _splash(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    documents_BT: jax.Array | None = None,
    *,
    strict: bool,
    window: int | None,
    interpret: bool,
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    _, T, N, H = q_BTNH.shape
    block = next(size for size in _SPLASH_BLOCKS if T % size == 0)
    before = None if window is None else window - 1 - strict  # keys before the newest one that a query reads
    mask = splash_attention_mask.LocalMask((T, T), (before, 0), offset=-int(strict))
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: Any = {f"block_{name}": block for name in names}
    kernel: Any = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * N),
        block_sizes=splash_attention_kernel.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
    heads_first = [x.swapaxes(1, 2) for x in (q_BTNH * H**-0.5, k_BTKH, v_BTKH)]
    if documents_BT is None:
        out = jax.vmap(kernel)(*heads_first)
    else:
        out = jax.vmap(kernel)(*heads_first, splash_attention_kernel.SegmentIds(documents_BT, documents_BT))
    return out.swapaxes(1, 2)


def _split_over_mesh(
    kernel: Callable[..., jax.Array], q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *rest: jax.Array
) -> jax.Array:
    """kernel(q, k, v, *rest) of each device's own rows and heads, because GSPMD cannot split a kernel.

    Where the tensor axis does not divide the K/V heads, each is repeated until it does. rest: arrays [B, ...].
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(q_BTNH, k_BSKH, v_BSKH, *rest)
    (B, _, N, _), K, tensor = q_BTNH.shape, k_BSKH.shape[2], mesh.shape["tensor"]
    whole = "B" if B % (mesh.shape["data"] * mesh.shape["fsdp"]) else ""
    if N % tensor:
        whole += "NK"
    else:
        k_BSKH, v_BSKH = (jnp.repeat(x, math.lcm(K, tensor) // K, axis=2) for x in (k_BSKH, v_BSKH))
    q_spec, kv_spec, rest_spec = (activation_spec(dims, whole) for dims in ("BTNH", "BTKH", "B"))
    in_specs = (q_spec, kv_spec, kv_spec, *[rest_spec] * len(rest))
    split = jax.shard_map(kernel, in_specs=in_specs, out_specs=q_spec, check_vma=False)
    return split(q_BTNH, k_BSKH, v_BSKH, *rest)


def save_attention(primitive: Any, *args: Any, **params: Any) -> bool:
    """The policy of `jax.checkpoint` that saves what attention returns, so that no fused kernel runs twice.

    xla: its output, by name, which spares the product with V alone. splash: output and normaliser, by name. cuDNN gives
    no names to its own, so they are known by their primitive.
    """
    named = jax.checkpoint_policies.save_only_these_names(SAVED)
    return primitive.name.startswith("dot_product_attention_fwd") or bool(named(primitive, *args, **params))
