"""Milliseconds of attention, forward and backward, for each kernel that this device has, against the xla reference.

    python -m benchmarks.attention [--shape B,T,N,K,H ...] [--dtype bfloat16] [--window 1024] [--repeats 5]
                                   [--peak FLOP/S] [--out FILE]

Four cases a shape: causal, strict, windowed, and strict over packed documents. Random inputs, compilation apart, the
median of the repeats after two warm-ups. `share` is of --peak, counting 3.5 times the forward pass' two matrix products
over the keys that a query may read (the backward pass makes five).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lckv_jax.errors import UserError
from lckv_jax.model import kernels
from lckv_jax.model.attention import attend, readable

DOCUMENTS = 4  # packed in a row


def cases(window: int) -> dict[str, dict[str, Any]]:
    """The options of `attend` in each case, and whether documents are packed."""
    return {
        "causal": {"strict": False, "window": None, "packed": False},
        "strict": {"strict": True, "window": None, "packed": False},
        "window": {"strict": False, "window": window, "packed": False},
        "packed": {"strict": True, "window": None, "packed": True},
    }


def read_pairs(T: int, strict: bool, window: int | None, packed: bool) -> int:
    """Pairs of a query and a key that it reads, in one row."""
    positions, segments = row(T, packed)
    return int(np.asarray(readable(positions, positions, segments, segments, strict=strict, window=window)).sum())


def row(T: int, packed: bool, rows: int = 1) -> tuple[jax.Array, jax.Array | None]:
    """Positions and segments [rows, T], the same in each row."""
    column = jnp.tile(jnp.arange(T, dtype=jnp.int32)[None], (rows, 1))
    length = -(-T // DOCUMENTS)
    return (column % length, column // length) if packed else (column, None)


def prepare(shape: tuple[int, ...], dtype: str, backend: str, case: dict[str, Any]) -> tuple[Callable[[], None], float]:
    """A function that runs forward and backward and waits, and the seconds that compiling took."""
    B, T, N, K, H = shape
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, out_gradient = (jax.random.normal(key, (B, T, n, H), dtype) for key, n in zip(keys, (N, K, K, N)))
    positions, segments = row(T, case["packed"], B)

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(
            q, k, v, q_pos_BT=positions, k_pos_BS=positions, q_seg_BT=segments, k_seg_BS=segments,
            strict=case["strict"], window=case["window"], plain=not case["packed"], backend=backend,
        )  # fmt: skip

    def both(q: jax.Array, k: jax.Array, v: jax.Array, out_gradient: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(attention, q, k, v)
        return out, *pull(out_gradient)

    started = time.perf_counter()
    compiled = jax.jit(both).lower(q, k, v, out_gradient).compile()
    seconds = time.perf_counter() - started
    return lambda: jax.block_until_ready(compiled(q, k, v, out_gradient)) and None, seconds


def measure(step: Callable[[], None], repeats: int) -> list[float]:
    """Seconds of each repeat, after two warm-ups."""
    times = []
    for number in range(repeats + 2):
        started = time.perf_counter()
        step()
        if number >= 2:
            times.append(time.perf_counter() - started)
    return times


def run_cell(
    shape: tuple[int, ...], name: str, backends: list[str], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The results of every kernel in one case, each printed as it comes; the first kernel is what others compare to."""
    (B, T, N, _, H), case = shape, cases(options.window)[name]
    flops = 3.5 * 4 * B * N * H * read_pairs(T, **case)
    results: list[dict[str, Any]] = []
    for backend in backends:
        cell: dict[str, Any] = {"shape": shape, "case": name, "backend": backend, "flops": flops}
        label = f"{','.join(map(str, shape)):>20} {name:>7} {backend:>7}"
        try:
            step, compile_seconds = prepare(shape, options.dtype, backend, case)
            seconds = measure(step, options.repeats)
        except (UserError, jax.errors.JaxRuntimeError) as error:  # such as out of memory: the others are still measured
            results.append({**cell, "error": str(error)})
            print(f"{label} {str(error).splitlines()[0]}")
            continue
        results.append({**cell, "seconds": seconds, "compile": compile_seconds})
        median, spread = statistics.median(seconds) * 1e3, f"({min(seconds) * 1e3:.3f} - {max(seconds) * 1e3:.3f})"
        against = f"{statistics.median(results[0]['seconds']) * 1e3 / median:.2f}" if "seconds" in results[0] else "-"
        share = f"{flops / median * 1e3 / options.peak:.1%}" if options.peak else "-"
        print(f"{label} {f'{median:.3f} {spread}':>28} {against:>6} {flops / median / 1e9:>8.3f} {share:>6}")
    return results


def read_shape(text: str) -> tuple[int, ...]:
    """B,T,N,K,H."""
    shape = tuple(int(size) for size in text.split(","))
    if len(shape) != 5:
        raise ValueError(text)
    return shape


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [(4, 2048, 32, 4, 64), (4, 2048, 16, 8, 128)]
    parser.add_argument("--shape", nargs="+", type=read_shape, default=shapes, metavar="B,T,N,K,H")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak", type=float, help="FLOP/s of the device in this dtype")
    parser.add_argument("--out", type=Path, help="JSON file of all numbers")
    options = parser.parse_args(arguments)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {options.dtype}")
    platform, backends = kernels.local_platform(), ["xla"]
    for backend in ("cudnn", "splash"):
        try:
            backends.append(kernels.resolve(backend, kernels.Call(platform, options.dtype, head_dim=64))[0])
        except UserError as error:
            print(f"not measured: {error}")
    print(
        f"{'B,T,N,K,H':>20} {'case':>7} {'kernel':>7} {'ms, median (min - max)':>28} {'x xla':>6} {'TFLOP/s':>8}  share"
    )
    results = [
        result
        for shape in options.shape
        for name in cases(options.window)
        for result in run_cell(shape, name, backends, options)
    ]
    if options.out:
        options.out.write_text(
            json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__, "cells": results}, indent=1)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
