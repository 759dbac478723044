"""What `bench` asks of a process that measures a cell, and what all of them tell alike; knows neither jax nor torch."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from lckv_jax.model_config import Frozen, ModelConfig, Positive

Decoder = Literal["lckv_jax", "transformers dynamic", "transformers static"]
PEERS: tuple[Decoder, ...] = ("transformers dynamic", "transformers static")

WARM_UPS = 2  # generations before those that are timed
COPIES = 5  # of which the fastest is the bandwidth
COPY_BYTES = 2**29  # of an array that is copied: larger than caches


class Identity(Frozen):
    """What tells a cell from others. sharing: the official string. cache: the text of its `CacheSpec`."""

    model: str
    decoder: Decoder
    sharing: str
    cache: str
    dtype: str
    prompt: Positive
    new: Annotated[int, Field(ge=2)]
    batch: Positive | Literal["largest"]
    passes: str | float = "trained"
    memory_cap_bytes: Positive | None = None


class Cell(Frozen):
    """A cell to measure. bucket, sample: as in `plan_work`, unused by peers. seed: of weights and prompts."""

    identity: Identity
    model: ModelConfig
    repeats: Annotated[int, Field(ge=5)]
    bucket: Positive | None = None
    sample: Positive | None = None
    seed: int = 0


def write_json(path: Path, record: Any) -> None:
    """Writes a file that is whole or not there."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """Median, least and most of some repeats."""
    return {name: 1e3 * f(seconds) for name, f in (("median", statistics.median), ("min", min), ("max", max))}


# ---------------------------------------------------------------- facts


def commit() -> str | None:
    """`git describe` of this code; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def versions(*names: str) -> dict[str, str | None]:
    """Of Python and of installed packages; None for those that are not."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def cores() -> int:
    """Of the CPU, those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The model of the CPU, and how many cores this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    return f"{model or platform.processor() or platform.machine()}, {cores()} cores"


def cpu_copy_bandwidth() -> tuple[float, str]:
    """Bytes read and written per second by copies on all cores, the best of some, and how they were made.

    By numpy: a jitted copy on a CPU gets fresh memory each time, and pays for the page faults.
    """
    threads = cores()
    x = np.ones(COPY_BYTES // 4, np.float32)
    into = np.zeros_like(x)
    into += 1  # touched, so that its pages are there
    parts = list(zip(np.array_split(into, threads), np.array_split(x, threads)))
    times = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(1 + COPIES):
            started = time.perf_counter()
            list(pool.map(lambda part: np.copyto(*part), parts))
            times.append(time.perf_counter() - started)
    return 2 * x.nbytes / min(times), f"numpy.copyto of {x.nbytes >> 20} MiB into warm memory, {threads} threads"
