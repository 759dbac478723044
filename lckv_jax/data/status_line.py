"""How far a long reading is: a live line on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import Progress, TextColumn

EVERY_SECONDS = 10.0


class StatusLine:
    """A context. `update` makes the line live on a terminal, and is cheap; elsewhere `report` gets it every 10 s."""

    def __init__(self, report: Callable[[str], object]) -> None:
        console = Console()
        self._report, self._terminal = report, console.is_terminal
        self._live = Progress(
            TextColumn("{task.description}", markup=False), console=console, transient=True, disable=not self._terminal
        )
        self._task = self._live.add_task("", total=None)
        self._told = time.monotonic()

    def __enter__(self) -> StatusLine:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def update(self, line: Callable[[], str]) -> None:
        """line: makes the text; called only if it is shown."""
        now = time.monotonic()
        if self._terminal:
            self._live.update(self._task, description=line())
        elif now - self._told >= EVERY_SECONDS:
            self._report(line())
            self._told = now
