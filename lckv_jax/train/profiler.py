"""A trace of some steps, for XProf, TensorBoard's profile tab or Perfetto."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


class Profiler:
    """Traces the steps first..last of `window` that this stretch of the run makes into `folder`; None = no steps."""

    def __init__(self, window: tuple[int, int] | None, folder: Path, say: Callable[[str], None]):
        self._window, self._folder, self._say = window, folder, say
        self._since: int | None = None  # the first step of the running trace

    def run(self, step: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(*arguments)`, which is step number `step`. After the last traced one it waits for the result.

        Raises OSError if the folder cannot be made or written.
        """
        if self._window is None or not self._window[0] <= step <= self._window[1]:
            return function(*arguments)
        if self._since is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self._folder))
            self._since = step
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            result = function(*arguments)
        if step == self._window[1]:
            jax.block_until_ready(result)  # else the trace would end while the device is at work on the step
            self._stop(step)
        return result

    def close(self) -> None:
        """Ends and keeps a trace that is running still, because the run ends or fails inside the window."""
        if self._since is not None:
            self._stop(None)

    def _stop(self, last: int | None) -> None:
        since, self._since = self._since, None
        try:
            jax.profiler.stop_trace()
        except jax.errors.JaxRuntimeError as error:  # what it says of a folder that cannot be written
            raise OSError(errno.EIO, " ".join(str(error).split()), str(self._folder)) from error
        self._say(f"profiler trace from step {since} to {last or 'where the run stopped'}: {self._folder}")
