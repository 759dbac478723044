"""Seconds a training step of the 50M models on this machine, standard against LCKV, and what the FLOP formula predicts.

    python -m benchmarks.train_step [--rounds 5] [--json FILE] [a.b=c ...]

Float32, AdamW included, random tokens, the loss waited for; compilation apart. The two models take turns.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from lckv_jax.config import RunConfig, load_config
from lckv_jax.parallel.mesh import batch_sharding, make_mesh
from lckv_jax.train.optimizer import make_optimizer
from lckv_jax.train.state import abstract_state, init_state
from lckv_jax.train.step import make_train_step

CONFIGS = Path(__file__).parent.parent / "configs"
SHAPES = [(1, 512), (4, 256)]


def random_batch(config: RunConfig, mesh: Mesh) -> dict[str, jax.Array]:
    """One document a row, of random tokens."""
    shape = (config.data.batch_size, config.data.seq_len + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    ones = np.ones(shape, np.int32)
    batch = {"tokens": tokens, "labels": tokens, "segment_ids": ones, "positions": np.cumsum(ones, 1) - 1}
    return jax.device_put({k: v.astype(np.int32) for k, v in batch.items()}, batch_sharding(mesh))


def prepare_step(config: RunConfig):
    """A function that makes one step and waits for it, and the seconds that compiling took."""
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        batch = random_batch(config, mesh)
        started = time.perf_counter()
        compiled = (
            make_train_step(config, optimizer, mesh).lower(abstract_state(config, optimizer, mesh), batch).compile()
        )
        seconds = time.perf_counter() - started
        state = init_state(config, optimizer, mesh)

    def step() -> None:
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))

    return step, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    options = parser.parse_intermixed_args()
    results = []
    print(f"{'batch':>9} {'model':>6} {'compile s':>10} {'step s (min - max)':>24} {'tok/s':>8} {'GFLOP/s':>9}")
    for rows, length in SHAPES:
        overrides = [f"data.batch_size={rows}", f"data.seq_len={length}", *options.overrides]
        configs = {name: load_config(CONFIGS / f"{name}-50m.yaml", overrides) for name in ("llama", "lckv")}
        steps = {name: prepare_step(config) for name, config in configs.items()}
        times: dict[str, list[float]] = {name: [] for name in configs}
        for round_number in range(options.rounds + 1):
            for name, (step, _) in steps.items():
                started = time.perf_counter()
                step()
                if round_number:  # the first one warms up
                    times[name].append(time.perf_counter() - started)
        flops = {name: config.model.flops(length).train for name, config in configs.items()}
        medians = {name: statistics.median(seconds) for name, seconds in times.items()}
        for name, seconds in times.items():
            print(
                f"{rows:>3} x {length:<3} {name:>6} {steps[name][1]:>10.1f} "
                f"{f'{medians[name]:.3f} ({min(seconds):.3f} - {max(seconds):.3f})':>24} "
                f"{rows * length / medians[name]:>8.0f} {rows * length * flops[name] / medians[name] / 1e9:>9.1f}"
            )
            results.append(
                {"batch": rows, "seq_len": length, "model": name, "seconds": seconds, "compile": steps[name][1]}
            )
        measured, predicted = (figure["lckv"] / figure["llama"] for figure in (medians, flops))
        print(
            f"{rows:>3} x {length:<3} LCKV/standard: measured {measured:.3f}, predicted {predicted:.3f}, "
            f"measured/predicted {measured / predicted:.3f}"
        )
    deep = ["model.num_layers=22", "model.sharing=lckv", "model.hidden_size=64", "model.intermediate_size=128"]
    deep += ["model.num_heads=4", "model.num_kv_heads=2", "model.head_dim=16", "data.batch_size=1", "data.seq_len=256"]
    seconds = prepare_step(load_config(CONFIGS / "lckv-50m.yaml", [*deep, *options.overrides]))[1]
    print(f"compiling the step of 22 layers of width 64, LCKV: {seconds:.1f} s")
    if options.json:
        options.json.write_text(
            json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__, "cells": results})
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
