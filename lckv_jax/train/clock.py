"""Where the wall time of a run goes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Clock:
    """Splits wall time into parts: every moment since the clock was made belongs to one."""

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now, self._last = now, now()
        self.seconds: dict[str, float] = {}  # of each part, in the order in which they first came

    def lap(self, part: str) -> float:
        """Books the time since the last lap under `part` and returns it in seconds; never less than 0."""
        now = self._now()
        passed, self._last = max(now - self._last, 0.0), now
        self.seconds[part] = self.seconds.get(part, 0.0) + passed
        return passed


def duration(seconds: float) -> str:
    """minutes:seconds or hours:minutes:seconds."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
