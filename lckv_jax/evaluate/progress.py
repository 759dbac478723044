"""How far an evaluation is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, TextColumn

_TELL_SECONDS = 10.0  # between lines where there is no terminal


@contextmanager
def telling(console: Console | None, total: int = 0, what: str = "tokens") -> Iterator[Callable[..., None]]:
    """A function to be told how many of `total` tokens are scored, or of a total that it is told, too: a live line on a
    terminal, elsewhere a line now and then, and nothing without a console."""
    if console is None:
        yield lambda done, total=total: None
        return
    told = time.monotonic()
    live = Progress(TextColumn("{task.description}"), console=console, transient=True, disable=not console.is_terminal)
    with live:
        task = live.add_task("compiling")

        def tell(done: int, total: int = total) -> None:
            nonlocal told
            line = f"scored {done:,} of {total:,} {what}"
            live.update(task, description=line)
            if not console.is_terminal and time.monotonic() - told > _TELL_SECONDS:
                console.print(line, highlight=False)
                told = time.monotonic()

        yield tell
