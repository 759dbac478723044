"""SIGTERM: what a scheduler sends before it takes the machine away."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from lckv_jax.errors import Stopped


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """SIGTERM raises Stopped wherever the main thread is: for the time when there is nothing to save."""

    def stop(*_: Any) -> None:
        raise Stopped("stopped by SIGTERM; nothing was lost: the same command goes on from there")

    with _handling(stop):
        yield


@contextlib.contextmanager
def noting_sigterm() -> Iterator[Callable[[int], bool]]:
    """A function (step) -> whether to stop after that step; SIGTERM is noted, and nothing is interrupted.

    All processes of a run ask it once a step, from the same first step on, and get the same answer.
    """
    if jax.distributed.is_initialized():
        # JAX' own service then owns SIGTERM, and names a step that every process has yet to reach.
        yield multihost_utils.reached_preemption_sync_point
        return
    noted = threading.Event()
    with _handling(lambda *_: noted.set()):
        yield lambda step: noted.is_set()


@contextlib.contextmanager
def _handling(handler: Callable[..., None]) -> Iterator[None]:
    """`handler` for SIGTERM, the one before it afterwards.

    Python lets only the main thread install one, and would forget the one of JAX' service.
    """
    if threading.current_thread() is not threading.main_thread() or jax.distributed.is_initialized():
        yield
        return
    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
