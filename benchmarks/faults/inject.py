"""A training process with a fault in it: `python -m benchmarks.faults.inject train ...`, with FAULT in the environment.

FAULT is JSON: {"kind": ..., "process": I, "step": S, "stamp": FILE}. Before process I (null: every one) gets the batch
of step S the fault happens, and FILE is written. kind:

    raise   a ValueError in host code
    hang    the process sleeps for ever in host code
    exit    the process ends at once, without a word
    clock   the time of day is another one by "seconds" from then on (`time.time`; the monotonic clock never is)
"""

from __future__ import annotations

import json
import os
import runpy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lckv_jax.data import batches

_iterate = batches.iterate
_time = time.time


class _Disturbed:
    """The iterator of a run's batches, with a fault before one of them."""

    def __init__(self, rows: Any, start: int, fault: dict) -> None:
        self._rows, self._step, self._fault = rows, start, fault

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        self._step += 1
        if self._step == self._fault["step"]:
            _happen(self._fault)
        return next(self._rows)

    def close(self) -> None:
        self._rows.close()


def _happen(fault: dict) -> None:
    Path(fault["stamp"]).write_text("")
    if fault["kind"] == "raise":
        raise ValueError("a fault was injected")
    while fault["kind"] == "hang":
        time.sleep(1)
    if fault["kind"] == "exit":
        os._exit(3)
    if fault["kind"] == "clock":
        time.time = lambda: _time() + fault["seconds"]


def main() -> None:
    fault = json.loads(os.environ["FAULT"])
    if fault["process"] in (None, int(os.environ["JAX_PROCESS_ID"])):
        batches.iterate = lambda dataset, start=0, *more: _Disturbed(_iterate(dataset, start, *more), start, fault)
    runpy.run_module("lckv_jax", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
