"""The real train step, compiled ahead of time: its memory and collectives, without a state and without running it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lckv_jax.config import RunConfig
from lckv_jax.errors import UserError
from lckv_jax.memory import train_state
from lckv_jax.parallel.mesh import batch_sharding, check_sizes, make_mesh
from lckv_jax.train.step import make_train_step

TOGETHER = "all of it at once"


class Collective(NamedTuple):
    """The collectives of one kind in a program's text: how many, and the bytes of their results on one device."""

    kind: str
    number: int
    bytes: int


class CompiledStep(NamedTuple):
    """A compiled train step: the mesh, the platform and kind of its devices, seconds of compiling, memory of one device
    in bytes (None where the compiler does not tell), and its collectives."""

    mesh: dict[str, int]
    platform: str
    device_kind: str
    seconds: float
    memory: dict[str, int] | None
    collectives: list[Collective]


def compile_step(config: RunConfig, devices: Sequence[Any] | None = None) -> CompiledStep:
    """Lowers and compiles the train step of `config`; allocates no state and runs nothing.

    devices: those there are, if not given; they may be described ones (see parallel/topology.py).
    Raises UserError if the mesh does not fit the devices or the sizes, or the step their memory.
    """
    mesh = make_mesh(config.mesh, devices)
    device = mesh.devices.flat[0]
    started = time.perf_counter()
    try:
        compiled = lower_step(config, mesh).compile()
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        if "RESOURCE_EXHAUSTED" not in reason:
            raise
        raise UserError(
            f"the train step does not fit a {device.device_kind}: {reason.partition(': ')[2].rstrip('.')}; raise "
            f"train.accumulation={config.train.accumulation}, mesh.fsdp={mesh.shape['fsdp']} or "
            f"mesh.tensor={mesh.shape['tensor']}"
        ) from error
    seconds = time.perf_counter() - started
    told = collectives(compiled.as_text() or "")
    return CompiledStep(dict(mesh.shape), device.platform, device.device_kind, seconds, _memory(compiled), told)


def lower_step(config: RunConfig, mesh: Mesh) -> jax.stages.Lowered:
    """The train step of `config`, traced for a mesh from shapes alone. Raises UserError if the sizes do not fit it."""
    check_sizes(config.model, config.data.batch_size, mesh)
    with jax.set_mesh(mesh):
        optimizer, state = train_state(config, mesh)
        shape = (config.data.batch_size, config.data.seq_len + 1)
        row = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
        batch = dict.fromkeys(("tokens", "labels", "segment_ids", "positions"), row)
        return make_train_step(config, optimizer, mesh).lower(state, batch)


def _memory(compiled: jax.stages.Compiled) -> dict[str, int] | None:
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    arguments, outputs = analysis.argument_size_in_bytes, analysis.output_size_in_bytes
    aliased, temporaries = analysis.alias_size_in_bytes, analysis.temp_size_in_bytes
    return {
        "arguments (state and batch)": arguments,
        "outputs": outputs,
        "outputs in place of arguments": aliased,
        "temporaries": temporaries,
        TOGETHER: arguments + outputs - aliased + temporaries,
    }


_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(rf"= (?P<shape>[^=]*?) (?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_FUSED = re.compile(r"^%all-reduce-scatter\S* \(.*\) -> (?P<shape>.*) \{\n(?:.*\n)*?\}", re.MULTILINE)


def collectives(hlo: str) -> list[Collective]:
    """The collectives in the text of an optimised HLO program, by kind; one inside a loop body counts once.

    Of an asynchronous pair only the start counts, and of its (operands, results, ...) only the results. On TPUs a
    reduce-scatter is a computation of its own, written as an all-reduce of which each device keeps its part.
    """
    found: dict[str, list[int]] = {kind: [] for kind in _KINDS}
    found["reduce-scatter"] += [sum(_array_bytes(match["shape"])) for match in _FUSED.finditer(hlo)]
    for match in _INSTRUCTION.finditer(_FUSED.sub("", hlo)):
        shape = match["shape"]
        if match["start"] and match["kind"] != "all-reduce":
            shape = _elements(shape)[1]
        found[match["kind"]].append(sum(_array_bytes(shape)))
    return [Collective(kind, len(sizes), sum(sizes)) for kind, sizes in found.items() if sizes]


def _elements(shape: str) -> list[str]:
    """The elements of a tuple shape such as `((f32[2], s8[3]), f32[4])`."""
    elements, depth = [""], 0
    for character in shape.strip()[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            elements.append("")
        else:
            elements[-1] += character
    return elements


def _array_bytes(shape: str) -> Iterator[int]:
    for name, bits, dims in _ARRAY.findall(shape):
        size = 1
        for dim in filter(None, dims.split(",")):
            size *= int(dim)
        yield size * (8 if name == "pred" else int(bits)) // 8
