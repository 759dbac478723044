"""How much of a training step the host spends beside waiting for the device: data, dispatch, metrics.

    python -m benchmarks.host_overhead [--steps 40] [a.b=c ...]

Trains the quick start (its data must fit its config; `data.folder=...` chooses another place) in a temporary folder
and times the loop itself: every step from one batch to the next, and in it the wait for the batch, the call that
dispatches the step, the wait for the device, and the reading, writing and showing of metrics. Host time is all but the
wait for the device. Steps that compile, validate or save are left out. Exit code 1 if the median is 5 % of a step or
more.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import jax

from benchmarks.train_step import CONFIGS
from lckv_jax.config import load_config
from lckv_jax.train import loop

PARTS = ("data", "dispatch", "device", "metrics")
steps: list[dict[str, float]] = []  # seconds of each part, a dict a step; "start" is a moment


def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            steps[-1][part] = steps[-1].get(part, 0.0) + time.perf_counter() - started

    return call


def instrument() -> None:
    """Puts clocks around what the loop calls."""
    iterate, make_train_step, read = loop.iterate, loop.make_train_step, loop._Run.read

    class Rows:
        def __init__(self, *arguments: Any) -> None:
            self.rows = iterate(*arguments)

        def __iter__(self) -> Iterator[Any]:
            return self

        def __next__(self) -> Any:
            steps.append({"start": time.perf_counter()})
            return timed("data", next)(self.rows)

        def close(self) -> None:
            self.rows.close()

    def read_timed(self: Any, pending: tuple[int, float, Any] | None) -> None:
        if pending is not None:
            timed("device", jax.block_until_ready)(pending[-1])
            timed("metrics", read)(self, pending)

    loop.iterate = Rows
    loop.make_train_step = lambda *arguments: timed("dispatch", make_train_step(*arguments))
    loop._Run.read = read_timed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    options = parser.parse_intermixed_args()
    instrument()
    with tempfile.TemporaryDirectory() as folder:
        never = options.steps + 1
        overrides = [f"out={folder}/run", f"train.steps={options.steps}", f"train.eval_every={never}"]
        overrides += [f"train.save_every={never}", "train.eval_batches=1", *options.overrides]
        loop.train(load_config(CONFIGS / "quickstart.yaml", overrides))
    # step 1 compiles, step 2 waits for that, the last one validates and saves
    told = [one | {"step": two["start"] - one["start"]} for one, two in pairwise(steps[2:])]
    median = {part: statistics.median(step.get(part, 0.0) for step in told) for part in (*PARTS, "step")}
    host = statistics.median(step["step"] - step["device"] for step in told)
    for part in (*PARTS, "step"):
        print(f"{part:>9}: {1e3 * median[part]:8.2f} ms ({median[part] / median['step']:6.2%} of a step)")
    print(f"host: {1e3 * host:.2f} ms a step, {host / median['step']:.2%} of it (goal: under 5 %)")
    return 1 if host >= 0.05 * median["step"] else 0


if __name__ == "__main__":
    sys.exit(main())
