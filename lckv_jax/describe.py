"""`describe`: what a configuration is and costs, without running it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lckv_jax.compiled import TOGETHER, compile_step
from lckv_jax.config import ModelConfig, RunConfig
from lckv_jax.map_plot import draw_map
from lckv_jax.memory import Memory, cache_bytes, memory
from lckv_jax.model.kernels import choose_backend
from lckv_jax.model.transformer import dim_sizes, parameter_dims
from lckv_jax.parallel.topology import Topology, abstract_mesh, described_devices
from lckv_jax.sharing import KVSharing


def count_parameters(config: ModelConfig) -> int:
    """The number of trained parameters."""
    sizes = dim_sizes(config)
    return sum(math.prod(sizes[dim] for dim in dims) for dims in jax.tree.leaves(parameter_dims(config)))


def attention_kernel(config: RunConfig, platform: str | None = None) -> tuple[str, str]:
    """The attention kernel that is described, and why: the config's own, or by `auto` that of the platform.

    platform: `cpu`, `gpu` or `tpu`; if not given, where the config's own kernel runs, or this machine's.
    """
    if platform is None:
        platform = {"cudnn": "gpu", "splash": "tpu"}.get(config.model.attention)  # which need not be this machine's
    return choose_backend(config.model, platform, seq_len=config.data.seq_len)


def describe(
    config: RunConfig, *, compiled: bool = False, plot: Path | None = None, topology: Topology | None = None
) -> str:
    """The sharing map as a diagram; parameters, KV cache and FLOPs beside those of the standard map; the memory of a
    device, by formula.

    compiled: also compile the train step, and tell its memory and collectives. plot: also draw the map into this file.
    topology: hardware that need not be there, instead of the devices there are; jax must not have used any yet.
    Raises UserError if the mesh does not divide what it splits.
    """
    devices = None
    if topology is not None and compiled:
        devices = described_devices(topology)
    lines = [*_map_lines(config), "", *_cost_lines(config), "", *_memory_lines(config, topology)]
    if plot is not None:
        draw_map(config.model, plot)
        lines += ["", f"map drawn in {plot}"]
    if compiled:
        lines += ["", *_compiled_lines(config, topology, devices)]
    return "\n".join(lines)


def _map_lines(config: RunConfig) -> Iterator[str]:
    model = config.model
    yield f"sharing {model.sharing}"
    yield ""
    yield model.sharing.diagram()
    yield ""
    yield "[K,V] computes keys and values; ^ reads a layer above, v one below; +|+ layers solved together by passes"
    if any(model.sharing.windowed):
        yield f"sliding window: a layer reads at most {model.window:,} tokens, its own included (model.window)"
    if model.sharing.cyclic:
        yield (
            f"passes over a cyclic span: m = {model.no_grad_passes} without and b = {model.grad_passes} with gradient, "
            f"start: {model.start}" + (f", until a change of {model.tolerance}" if model.tolerance else "")
        )


def _cost_lines(config: RunConfig) -> Iterator[str]:
    model, seq_len, batch = config.model, config.data.seq_len, config.data.batch_size
    standard = model.model_copy(update={"sharing": KVSharing.parse("standard", model.num_layers)})
    sizes = (model.num_kv_heads, model.head_dim, jnp.dtype(model.dtype).itemsize)
    flops, standard_flops = model.flops(seq_len), standard.flops(seq_len)
    rows = [
        ("parameters", count_parameters(model), count_parameters(standard)),
        ("layers with K,V", len(model.sharing.owners), model.num_layers),
        (
            f"KV cache, bytes a token ({model.dtype})",
            model.sharing.cache_bytes_per_token(*sizes),
            standard.sharing.cache_bytes_per_token(*sizes),
        ),
        (
            f"KV cache of {batch:,} full rows, MiB",
            batch * cache_bytes(model, seq_len) / 2**20,
            batch * cache_bytes(standard, seq_len) / 2**20,
        ),
        ("training FLOPs a token", flops.train, standard_flops.train),
        ("prompt FLOPs a token", flops.forward, standard_flops.forward),
    ]
    yield f"{'at sequence length ' + str(seq_len):<36} {'this map':>16} {'standard':>16} {'ratio':>7}"
    for name, mine, theirs in rows:
        digits = 3 if name.endswith("MiB") else 0
        yield f"{name:<36} {mine:>16,.{digits}f} {theirs:>16,.{digits}f} {mine / theirs:>7.3f}"


def _described_memory(config: RunConfig, topology: Topology | None, kernel: str) -> Memory:
    return memory(config, kernel, None if topology is None else abstract_mesh(config.mesh, topology))


def _memory_lines(config: RunConfig, topology: Topology | None) -> Iterator[str]:
    kernel, reason = attention_kernel(config, None if topology is None else topology.platform)
    needs = _described_memory(config, topology, kernel)
    devices = math.prod(needs.mesh.values())
    where = "" if topology is None else f" of {topology.name}"
    yield f"memory of one device of {devices}{where} ({_mesh_text(needs.mesh)})"
    if topology is None and devices != jax.device_count():
        yield f"  (this machine has {jax.device_count()}: computed for the config's mesh, an axis of -1 taken as 1)"
    named = {"params": "parameters", "opt": f"optimiser state ({config.optimizer.name})", "ema": "average (ema)"}
    for part, name in named.items():
        if part in needs.state:
            yield _memory_row(name, needs.state[part], "exact")
    accumulated = ", of the sum and of a micro-batch" if config.train.accumulation > 1 else ""
    yield _memory_row("gradients", needs.gradients, f"float32{accumulated}")
    yield _memory_row(
        "copies of weights", needs.copies, f"slices in {config.model.dtype}, gathered over fsdp, gradients"
    )
    yield _memory_row("stored activations", needs.stored, _stored_note(config, needs))
    fused = ""
    if kernel == "xla":
        working = _described_memory(config, topology, "fused").working
        fused = f"; {working / 2**20:,.1f} with a fused attention kernel"
    yield _memory_row("at work", needs.working, f"the layer or piece of the loss that needs most{fused}")
    yield _memory_row("together", sum(needs.state.values()) + needs.step, "")
    yield "  all but the exact rows by formula: within 1.5x of what XLA plans where it saves memory"
    yield reason


def _stored_note(config: RunConfig, needs: Memory) -> str:
    passes = f", b = {config.model.grad_passes}" if config.model.sharing.cyclic else ""
    return f"{needs.rows} x {config.data.seq_len:,} tokens, remat: {config.model.remat}{passes}"


def _compiled_lines(config: RunConfig, topology: Topology | None, devices: Sequence[Any] | None) -> Iterator[str]:
    step = compile_step(config, devices)
    what = f"{math.prod(step.mesh.values())} {step.device_kind if topology else step.platform} devices"
    if topology is not None:
        what = f"{topology.name}, {what}" + (f" in {topology.slices} slices" if topology.slices > 1 else "")
    yield f"train step compiled for {what} ({_mesh_text(step.mesh)}) in {step.seconds:.1f} s"
    kernel, reason = attention_kernel(config, topology and step.platform)
    if topology is not None:
        yield f"  {reason}"
        if not topology.layout:
            yield "  (fake devices of this machine: arguments and collectives are the mesh's, temporaries are a CPU's)"
    if step.memory is None:
        yield "  this compiler does not tell what memory it plans"
    else:
        yield from _planned_lines(config, topology, step.memory, kernel, step.platform)
    if not step.collectives:
        yield "  no collectives"
        return
    yield "  collectives in the program text, bytes on one device; those inside loops run several times"
    for kind, number, size in step.collectives:
        yield _memory_row(kind, size, f"{number:,} times")


def _planned_lines(
    config: RunConfig, topology: Topology | None, planned: dict[str, int], kernel: str, platform: str
) -> Iterator[str]:
    for name, size in planned.items():
        yield _memory_row(name, size, "")
    if topology is not None and topology.hbm is not None:
        share = planned[TOGETHER] / topology.hbm
        yield _memory_row("of one chip's memory", topology.hbm, f"{share:.1%}: it fits")
    formula = _described_memory(config, topology, kernel).step
    yield f"  the formula says {formula / planned['temporaries']:.2f} x these temporaries"
    if platform == "cpu":
        yield "  (on CPU XLA gives memory for parallelism, up to 2.5x where layers are not scanned)"


def _mesh_text(mesh: dict[str, int]) -> str:
    return "mesh " + ", ".join(f"{axis}={size}" for axis, size in mesh.items())


def _memory_row(name: str, size: int, note: str) -> str:
    return f"  {name:<32} {size / 2**20:>13,.1f} MiB  {note}".rstrip()
