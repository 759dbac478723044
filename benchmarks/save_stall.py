"""How long a save holds up the training loop, beside the time of a step: the 50M model, saved in the background.

    python -m benchmarks.save_stall [--steps 3] [--saves 4] [--folder FOLDER] [a.b=c ...]

The stall is the time that `checkpoint.save` takes, with the device idle before it: the fingerprints of all leaves, the
copies that later steps cannot change, and, if it is still being written, the wait for the save before. The first save
also compiles. A step that runs while a save is written shares cores and memory with it; its time is told as well.
Batches are 4 x 256 tokens unless overridden; the optimiser's state is saved with the parameters. Exit code 1 if the
median stall after the first is a tenth of a step or more.
"""

import argparse
import statistics
import sys
import tempfile
import time

import jax

from benchmarks.train_step import CONFIGS, random_batch
from lckv_jax import checkpoint
from lckv_jax.config import load_config
from lckv_jax.parallel.mesh import make_mesh
from lckv_jax.train.optimizer import make_optimizer
from lckv_jax.train.state import init_state
from lckv_jax.train.step import make_train_step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="steps between saves")
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--folder", help="where to save, for the speed of that disk; removed afterwards")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    options = parser.parse_intermixed_args()
    config = load_config(CONFIGS / "lckv-50m.yaml", ["data.batch_size=4", "data.seq_len=256", *options.overrides])
    mesh = make_mesh(config.mesh)
    during: list[float] = []  # seconds of a step while a save is written
    alone: list[float] = []
    stalls: list[float] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, jax.set_mesh(mesh):
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        state = init_state(config, optimizer, mesh)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        step, batch = make_train_step(config, optimizer, mesh), random_batch(config, mesh)
        state, _ = jax.block_until_ready(step(state, batch))  # compiles
        with checkpoint.open_checkpoints(folder, keep=1) as manager:
            for _ in range(options.saves):
                for _ in range(options.steps):
                    times = during if manager.is_saving_in_progress() else alone
                    started = time.perf_counter()
                    state, _ = jax.block_until_ready(step(state, batch))
                    times.append(time.perf_counter() - started)
                started = time.perf_counter()
                checkpoint.save(manager, state, config)
                stalls.append(time.perf_counter() - started)
            started = time.perf_counter()
        written = time.perf_counter() - started
    print(f"state {size / 2**20:,.0f} MiB, batch {config.data.batch_size} x {config.data.seq_len}")
    for name, times in (("step, nothing being saved", alone), ("step while a save is written", during)):
        if times:
            print(f"{name}: {statistics.median(times):.3f} s ({min(times):.3f} - {max(times):.3f}, {len(times)} steps)")
    print(f"stall of each save: {', '.join(f'{stall:.3f}' for stall in stalls)} s; the last took {written:.1f} s more")
    share = statistics.median(stalls[1:]) / statistics.median(alone)
    print(f"stall after the first: {share:.1%} of a step (goal: under 10 %)")
    return 1 if share >= 0.1 else 0


if __name__ == "__main__":
    sys.exit(main())
