"""Where the processes of a run wait for each other in a save, so that a failed save fails in time."""

from __future__ import annotations

import sys
from collections.abc import Callable

import orbax.checkpoint as ocp

_SAVE_SECONDS = 14 * 86400  # measured by a clock that may be set; heartbeats and the watchdog end what takes too long


def waiting(before_commit: Callable[[], None]) -> ocp.AsyncOptions:
    """How the processes wait for each other in a save that goes on in the background.

    before_commit: called in process 0 when all files are written, while they are no step yet.
    """
    return ocp.AsyncOptions(
        timeout_secs=_SAVE_SECONDS, barrier_sync_fn=make_barrier(), post_finalization_callback=before_commit
    )


def make_barrier() -> ocp.multihost.BarrierSyncFn:
    """The barrier of orbax, but for a process whose save has failed: it does not wait, but tells.

    Orbax waits for all processes at the end of a save, also on the way out of an exception; but the others never come
    there where they wait for files that the failed one was to make.
    """
    meet = ocp.multihost.get_barrier_sync_fn()

    def barrier(*, key: str, timeout_ms: int) -> None:
        if sys.exception() is None:
            meet(key=key, timeout_ms=timeout_ms)

    return barrier
