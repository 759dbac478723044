"""What safety costs: fingerprints and watchdog beside the time of a step, and several processes beside one."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time

from benchmarks.faults.runs import PATIENCE, ROOT, Place, Result, check_code, prepare
from lckv_jax.train.metrics import read_metrics


def measure_overhead(steps: int) -> dict:
    """Seconds of a step of the 50M model, of the fingerprints of its state, and of feeding the watchdog, in turns."""
    import jax

    from benchmarks.train_step import CONFIGS, random_batch
    from lckv_jax.config import load_config
    from lckv_jax.fingerprint import describe_leaves
    from lckv_jax.parallel.mesh import make_mesh
    from lckv_jax.parallel.watchdog import Watchdog
    from lckv_jax.train.optimizer import make_optimizer
    from lckv_jax.train.state import init_state
    from lckv_jax.train.step import make_train_step

    config = load_config(CONFIGS / "lckv-50m.yaml", ["data.batch_size=4", "data.seq_len=256"])
    mesh = make_mesh(config.mesh)
    times: dict[str, list[float]] = {"step": [], "fingerprints": [], "watchdog": []}
    with jax.set_mesh(mesh), Watchdog(None) as watchdog:
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        state = init_state(config, optimizer, mesh)
        step, batch = make_train_step(config, optimizer, mesh), random_batch(config, mesh)
        state, _ = jax.block_until_ready(step(state, batch))
        describe_leaves(state)  # both are compiled now
        for _ in range(steps):
            started = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, batch))
            times["step"].append(time.perf_counter() - started)
            started = time.perf_counter()
            describe_leaves(state)
            times["fingerprints"].append(time.perf_counter() - started)
            started = time.perf_counter()
            watchdog.feed()
            times["watchdog"].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in times.items()} | {
        "save_every": config.train.save_every
    }


def overhead(place: Place, rounds: int, seed: int) -> Result:
    """In a process of its own, so that the tiny runs and this one leave each other alone."""
    code = f"import json; from benchmarks.faults.costs import measure_overhead as m; print(json.dumps(m({rounds})))"
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(place.folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    told = json.loads(done.stdout.splitlines()[-1])
    share = (told["watchdog"] + told["fingerprints"] / told["save_every"]) / told["step"]
    return Result(
        "fingerprints at every save, the watchdog at every step (50M)",
        "under 1 % of the time of the steps",
        rounds,
        f"{share:.2%}: a step {told['step']:.2f} s, fingerprints {told['fingerprints']:.3f} s every "
        f"{told['save_every']} steps, the watchdog {1e6 * told['watchdog']:.0f} us",
        share < 0.01,
        told,
    )


def processes(place: Place, rounds: int, seed: int) -> Result:
    """2 processes with 2 pretended devices each, beside 1 process with 4, on one mesh."""
    medians: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for count, seconds in medians.items():
            layout = prepare(place.folder / f"layout-{count}", count, 4 // count)
            out, log = layout.folder / "run", layout.folder / "log"
            shutil.rmtree(out, ignore_errors=True)
            launcher = layout.launch(out, log, "train.save_every=1000", "train.eval_every=1000", "mesh.fsdp=4")
            check_code(launcher.wait(timeout=PATIENCE), 0, log)
            records = [record for record in read_metrics(out / "metrics.jsonl") if "loss" in record]
            seconds.append(statistics.median(record["seconds"] for record in records[len(records) // 4 :]))
            print(f"{count} processes: {1000 * seconds[-1]:.1f} ms a step", flush=True)
    one, two = (statistics.median(medians[count]) for count in (1, 2))
    return Result(
        "2 processes x 2 pretended devices beside 1 process x 4 (tiny model)",
        "told, no promise: the tiny steps are all communication",
        rounds,
        f"{1000 * two:.1f} ms a step beside {1000 * one:.1f} ms",
        True,
        {"seconds": medians},
    )
