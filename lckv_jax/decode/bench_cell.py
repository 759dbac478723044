"""One cell of `bench`, in a process of its own: `python -m lckv_jax.decode.bench_cell CELL.json RESULT.json`."""

from __future__ import annotations

import gc
import json
import math
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lckv_jax.decode.bench_programs import (
    Timing,
    Work,
    abstract_weights,
    compile_needs,
    generation,
    plan_work,
    random_prompts,
    random_weights,
    read_per_step,
    tree_bytes,
    written_per_step,
)
from lckv_jax.decode.bench_record import (
    COPIES,
    WARM_UPS,
    Cell,
    commit,
    cpu_copy_bandwidth,
    cpu_name,
    milliseconds,
    versions,
    write_json,
)
from lckv_jax.decode.cache import bytes_held
from lckv_jax.decode.capacity import Limit, batch_by_formula, largest_batch, memory_limit, total_bytes
from lckv_jax.decode.step import step_bytes
from lckv_jax.errors import UserError
from lckv_jax.model.transformer import check_dtype, dim_sizes, parameter_dims
from lckv_jax.model_config import ModelConfig

_STEP_DOWN = 0.97  # of a batch that the analysis lets through and the device does not
_STEPS_DOWN = 8
_DEVICE_COPY_BYTES = 2**31
_IN_A_ROW = 8


class Fitted(NamedTuple):
    """The batch that is run, the bytes that the analysis says it needs, and seconds of compiling its programs."""

    batch: int
    needs: int
    compile_s: float


# ---------------------------------------------------------------- a cell


def measure(cell: Cell) -> dict[str, Any]:
    """The record of a cell: identity, facts, results, error (one sentence, and then results are null)."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    wanted = cell.identity
    passes: Any = wanted.passes
    limit = memory_limit(wanted.memory_cap_bytes)
    results, error = None, None
    try:
        check_dtype(cell.model)
        work = plan_work(cell.model, wanted.cache, wanted.prompt, wanted.new, passes, cell.bucket, cell.sample)
        results = _results(cell, work, limit)
    except UserError as unfit:
        error = str(unfit)
    identity = wanted.model_dump()
    if results is not None:
        identity["batch"] = results.pop("batch")
    facts = {**_facts(cell), "memory_limit_bytes": limit.bytes, "memory_limit": limit.what, "started": started}
    return {"identity": identity, "facts": facts, "results": results, "error": error}


def _results(cell: Cell, work: Work, limit: Limit) -> dict[str, Any]:
    """Raises UserError if the batch does not fit, or numbers are not finite."""
    if cell.identity.batch != "largest":
        fitted = _compiled(work, cell.identity.batch)
        asked = f"a batch of {fitted.batch} needs {_gb(fitted.needs)} of {_gb(limit.bytes)} ({limit.what})"
        if fitted.needs > limit.bytes:
            raise UserError(f"does not fit: {asked}; the largest that does is {_largest(work, limit)}")
        if results := _tried(cell, work, limit, fitted):
            return {**results, "largest": False}
        raise UserError(
            f"does not fit: by analysis {asked}, but memory was full when it ran; batches=[largest] steps down"
        )
    batch = _largest(work, limit)
    for _ in range(_STEPS_DOWN):
        jax.clear_caches()  # what the search has compiled counts too
        fitted = _compiled(work, batch)
        if fitted.needs <= limit.bytes and (results := _tried(cell, work, limit, fitted)):
            return {**results, "largest": True}
        batch = max(1, math.floor(batch * _STEP_DOWN))
    raise UserError(
        f"does not fit: by analysis a batch of {batch} does in {_gb(limit.bytes)} ({limit.what}), but not when it "
        "runs; give a memory_gb below what other processes leave"
    )


def _largest(work: Work, limit: Limit) -> int:
    """The largest batch that fits by analysis. Raises UserError if not even one row does."""
    row_bytes = bytes_held(work.model, work.segments[-1].specs, 1)
    weights = abstract_weights(work.model)
    guess = batch_by_formula(limit.bytes, tree_bytes(weights), row_bytes)
    batch, needs = largest_batch(lambda n: compile_needs(work, weights, n, every=False), limit.bytes, guess)
    if not batch:
        raise UserError(f"does not fit: a batch of 1 needs {_gb(needs)} of {_gb(limit.bytes)} ({limit.what})")
    return batch


def _tried(cell: Cell, work: Work, limit: Limit, fitted: Fitted) -> dict[str, Any] | None:
    """The results; None if the device's memory is not enough."""
    try:
        return _run(cell, work, limit, fitted)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
    gc.collect()  # the arrays of what failed, which an error's traceback may still hold
    return None


def _compiled(work: Work, batch: int) -> Fitted:
    started = time.perf_counter()
    needs = compile_needs(work, abstract_weights(work.model), batch, every=True)
    return Fitted(batch, needs, time.perf_counter() - started)


def _run(cell: Cell, work: Work, limit: Limit, fitted: Fitted) -> dict[str, Any]:
    weights = random_weights(work.model, cell.seed)
    prompts = random_prompts(work, fitted.batch, cell.seed)
    timings = [generation(work, weights, *prompts) for _ in range(WARM_UPS + cell.repeats)][WARM_UPS:]
    if not all(timing.finite for timing in timings):
        raise UserError("the logits are not finite; choose a smaller model.init_std")
    peak, kind = _peak_bytes(fitted.needs)
    weight_bytes = step_bytes(weights)
    del weights, prompts
    bandwidth, how = copy_bandwidth(limit.bytes)
    return {
        "batch": fitted.batch,
        **_speeds(work, fitted.batch, timings, weight_bytes, bandwidth),
        "compile_s": round(fitted.compile_s, 2),
        "memory_model_bytes": fitted.needs,
        "peak_bytes": peak,
        "peak_bytes_kind": kind,
        "cache_bytes_held": bytes_held(work.model, work.segments[-1].specs, fitted.batch),
        "weight_bytes_read_per_step": weight_bytes,
        "copy_bandwidth_how": how,
    }


def _speeds(work: Work, batch: int, timings: list[Timing], weight_bytes: int, bandwidth: float) -> dict[str, Any]:
    steps_s = [timing.decode / work.steps for timing in timings]
    step_s = statistics.median(steps_s)
    all_s = statistics.median(timing.prefill + timing.decode for timing in timings)
    read = read_per_step(work, batch)
    moved = weight_bytes + read + written_per_step(work, batch)
    return {
        "prefill_ms": milliseconds([timing.prefill for timing in timings]),
        "passes_used": float(timings[-1].passes_B.mean()),
        "residual": float(timings[-1].residual_B.max()),
        "decode_step_ms": milliseconds(steps_s),
        "decode_tokens_per_s": batch / step_s,
        "tokens_per_s": batch * (work.steps + 1) / all_s,
        "cache_bytes_read_per_step": round(read),
        "copy_bandwidth": bandwidth,
        "share_of_roofline": moved / step_s / bandwidth,
    }


def _peak_bytes(compiled: int) -> tuple[int, str]:
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], "allocator"
    return compiled, "compiled"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


# ---------------------------------------------------------------- the machine


def copy_bandwidth(memory_bytes: int) -> tuple[float, str]:
    """Bytes read and written per second by a copy on the first device, the best of some, and how it was made.

    memory_bytes: what there is, of which an accelerator's copies take a quarter at most.
    """
    if jax.local_devices()[0].platform == "cpu":
        return cpu_copy_bandwidth()
    return _device_copy_bandwidth(min(_DEVICE_COPY_BYTES, memory_bytes // 8))


def _device_copy_bandwidth(size: int) -> tuple[float, str]:
    """Some copies one after the other for each look at the clock, which would otherwise time the start of one too."""
    x = jnp.ones(size // 4, jnp.float32)
    copy = jax.jit(lambda x, _: jnp.copy(x), donate_argnums=1, keep_unused=True)
    into = jnp.zeros_like(x)
    times = []
    for _ in range(2 + COPIES):
        started = time.perf_counter()
        for _ in range(_IN_A_ROW):
            into = copy(x, into)
        into.block_until_ready()
        times.append((time.perf_counter() - started) / _IN_A_ROW)
    return 2 * x.nbytes / min(times), f"a jitted copy of {x.nbytes >> 20} MiB into memory that is there"


def device_name() -> str:
    """What the first device calls itself; of a CPU its model and how many cores this process may use."""
    device = jax.local_devices()[0]
    return cpu_name() if device.platform == "cpu" else device.device_kind


def _facts(cell: Cell) -> dict[str, Any]:
    return {
        "parameters": count_parameters(cell.model),
        "device": device_name(),
        "versions": versions("jax", "jaxlib", "numpy"),
        "commit": commit(),
        "repeats": cell.repeats,
        "sample": cell.sample,
        "random_weights": True,
    }


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the model, as a checkpoint has them."""
    sizes = dim_sizes(config)

    def count(dims: dict[str, Any]) -> int:
        return sum(count(x) if isinstance(x, dict) else math.prod(sizes[dim] for dim in x) for x in dims.values())

    return count(parameter_dims(config))


# ---------------------------------------------------------------- the process


def machine() -> dict[str, Any]:
    """The first device: its name, platform, and the memory in bytes that one process can have at most."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    return {
        "device": device_name(),
        "platform": device.platform,
        "memory_bytes": stats.get("bytes_limit") or total_bytes(),
    }


def main(arguments: list[str]) -> int:
    """Measures the cell in the first file and writes its record to the second; `--machine` prints what is there."""
    if arguments == ["--machine"]:
        print(json.dumps(machine()))
        return 0
    jax.config.update("jax_enable_compilation_cache", False)  # seconds of compiling are measured
    cell = Cell.model_validate_json(Path(arguments[0]).read_text(encoding="utf-8"))
    write_json(Path(arguments[1]), measure(cell))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
