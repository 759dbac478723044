"""The real train step, compiled ahead of time: its memory and collectives, without a state and without running it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lckv_jax.config import RunConfig
from lckv_jax.memory import train_state
from lckv_jax.parallel.mesh import batch_sharding, check_sizes, make_mesh
from lckv_jax.train.step import make_train_step


class Collective(NamedTuple):
    """The collectives of one kind in a program's text: how many, and the bytes of their results on one device."""

    kind: str
    number: int
    bytes: int


class CompiledStep(NamedTuple):
    """A compiled train step: the mesh, seconds of compiling, memory of one device in bytes (None where the compiler
    does not tell), and its collectives."""

    mesh: dict[str, int]
    platform: str
    seconds: float
    memory: dict[str, int] | None
    collectives: list[Collective]


def compile_step(config: RunConfig) -> CompiledStep:
    """Lowers and compiles the train step of `config` for the devices there are; allocates no state and runs nothing.

    Raises UserError if the mesh does not fit the devices or the sizes.
    """
    mesh = make_mesh(config.mesh)
    check_sizes(config.model, config.data.batch_size, mesh)
    with jax.set_mesh(mesh):
        optimizer, state = train_state(config, mesh)
        shape = (config.data.batch_size, config.data.seq_len + 1)
        row = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
        batch = dict.fromkeys(("tokens", "labels", "segment_ids", "positions"), row)
        started = time.perf_counter()
        compiled = make_train_step(config, optimizer, mesh).lower(state, batch).compile()
        seconds = time.perf_counter() - started
    platform = mesh.devices.flat[0].platform
    return CompiledStep(dict(mesh.shape), platform, seconds, _memory(compiled), collectives(compiled.as_text() or ""))


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
        "all of it at once": arguments + outputs - aliased + temporaries,
    }


_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(rf"= (?P<shape>[^=]*?) (?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


def collectives(hlo: str) -> list[Collective]:
    """The collectives in the text of an optimised HLO program, by kind; one inside a loop body counts once.

    Of an asynchronous pair only the start counts, and of its (operands, results, ...) only the results.
    """
    found: dict[str, list[int]] = {kind: [] for kind in _KINDS}
    for match in _INSTRUCTION.finditer(hlo):
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
