"""Against hanging: a process that makes no progress ends itself, and says where it stood."""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import threading
import time
from collections import deque
from statistics import median

from lckv_jax.errors import HUNG

_LEAST_SECONDS = 300.0
_MEDIANS = 20
_POLL_SECONDS = 0.5
_LONGER = 10  # what may take longer than a step: compiling, reading and writing a checkpoint


class Watchdog:
    """Ends the process with the stacks of all its threads (exit code 142) if it is not fed for `seconds`.

    A timer of the system rings, since a process may hang where no Python runs; where one hangs all others wait, and
    each tells its own. seconds: None = 20 times the median time between feedings, at least 300; 0 = no limit.
    """

    def __init__(self, seconds: float | None):
        self._seconds = seconds
        self._fed: float | None = None
        self._times: deque[float] = deque(maxlen=100)
        self._ends = math.inf
        self._over = threading.Event()
        self._on = seconds != 0 and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Watchdog:
        if self._on:
            faulthandler.register(signal.SIGALRM, all_threads=True, chain=True)  # the stacks, then the signal's own end
            self.feed(longer=True)
            if os.getpid() == 1:
                threading.Thread(target=self._end_first_process, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._on:
            self._over.set()
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.unregister(signal.SIGALRM)

    def feed(self, *, longer: bool = False) -> None:
        """The process makes progress. longer: what comes next may take ten times as long."""
        if not self._on:
            return
        now = time.monotonic()
        if self._fed is not None:
            self._times.append(now - self._fed)
        self._fed = None if longer else now  # what takes longer is no step
        seconds = self.limit() * (_LONGER if longer else 1)
        self._ends = now + seconds
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def _end_first_process(self) -> None:
        """Ends the process a moment after its stacks are told: a container's first one outlives the signal itself."""
        while not self._over.wait(_POLL_SECONDS):
            if time.monotonic() > self._ends + _POLL_SECONDS:
                os._exit(HUNG)

    def limit(self) -> float:
        """Seconds that a step may take now."""
        if self._seconds is not None:
            return self._seconds
        return max(_LEAST_SECONDS, _MEDIANS * median(self._times)) if self._times else _LEAST_SECONDS
