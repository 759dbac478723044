"""Kills a training run at random moments, restarts it each time with the same command, and compares the result.

    python -m benchmarks.kill_and_resume configs/quickstart.yaml [--kills 5] [--seed 0] [a.b=c ...]

One run goes through undisturbed; a second, with data and output folders of its own, is ended with SIGKILL again and
again, also while it prepares data, compiles or saves. Exit code 0 if both end with bit-identical parameters.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from lckv_jax.checkpoint import load
from lckv_jax.train.goodput import is_account
from lckv_jax.train.metrics import read_metrics

CLOCKS = (  # differ in every run
    "seconds",
    "tokens_per_second",
    "data_wait",
    "device_flops_per_second",
    "mfu",
    "hfu",
    "save_seconds",
)


def command(options: argparse.Namespace, folder: Path) -> list[str]:
    paths = [f"out={folder / 'run'}", f"data.folder={folder / 'data'}"]
    return [sys.executable, "-m", "lckv_jax", "train", options.config, *options.overrides, *paths]


def steps_done(folder: Path) -> int:
    return max((record["step"] for record in read_metrics(folder / "run" / "metrics.jsonl")), default=0)


def steps_saved(folder: Path) -> int:
    saved = (folder / "run" / "checkpoints").glob("*")
    return max((int(path.name) for path in saved if path.name.isdecimal()), default=0)


def without_clocks(folder: Path) -> list[dict]:
    records = read_metrics(folder / "run" / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in CLOCKS} for record in records if not is_account(record)]


def run_undisturbed(options: argparse.Namespace, folder: Path) -> float:
    started = time.monotonic()
    subprocess.run(command(options, folder), check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def run_and_kill(options: argparse.Namespace, folder: Path, seconds: float) -> bool:
    """Whether the run was still going when it was killed after `seconds`."""
    process = subprocess.Popen(command(options, folder), stdout=subprocess.DEVNULL)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    if process.returncode:
        sys.exit(f"the run failed with exit code {process.returncode}")
    return False


def differing_leaves(one: Path, other: Path) -> list[str]:
    trees = [load(folder / "run")[0] for folder in (one, other)]
    leaves = [jax.tree_util.tree_leaves_with_path(tree) for tree in trees]
    return [
        jax.tree_util.keystr(path) for (path, a), (_, b) in zip(*leaves) if not np.array_equal(a, b, equal_nan=True)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    options = parser.parse_intermixed_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as parent:
        undisturbed, disturbed = Path(parent) / "undisturbed", Path(parent) / "disturbed"
        seconds = run_undisturbed(options, undisturbed)
        print(f"undisturbed: {steps_done(undisturbed)} steps in {seconds:.0f} s", flush=True)
        for number in range(1, options.kills + 1):
            moment = moments.uniform(0.5, 2 * seconds / (options.kills + 1))
            killed = run_and_kill(options, disturbed, moment)
            word = "killed" if killed else "finished before it could be killed"
            print(
                f"{number}: {word} after {moment:.1f} s, at step {steps_done(disturbed)}, "
                f"checkpoint {steps_saved(disturbed)}",
                flush=True,
            )
        run_undisturbed(options, disturbed)
        records = [without_clocks(folder) for folder in (undisturbed, disturbed)]
        differing = differing_leaves(undisturbed, disturbed)
        print(f"finished at step {steps_done(disturbed)}; same metrics: {records[0] == records[1]}")
        print("parameters: " + (f"DIFFER in {', '.join(differing)}" if differing else "bit-identical"))
        return 1 if differing or records[0] != records[1] else 0


if __name__ == "__main__":
    sys.exit(main())
