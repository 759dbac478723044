"""What orbax says beside its exceptions, kept off the terminal: a failure is told in our words, once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator


def quieten_orbax() -> None:
    """Keeps off the terminal what orbax logs below errors, and the stacks of errors that it also raises."""
    logging.getLogger("absl").addFilter(_is_worth_reading)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    """Orbax warns of its own habits. What it logs with a stack, it raises from the next call that waits or saves."""
    return not _is_from_orbax(record) or (record.levelno >= logging.ERROR and not record.exc_info)


def system_reason(error: BaseException) -> str | None:
    """What the operating system said, such as "No space left on device", if that is why orbax raised; else None."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return os.strerror(cause.errno)
        if match := re.search(r"os_error_code='(\d+)'", str(cause)):  # tensorstore raises ValueError
            return os.strerror(int(match[1]))
        cause = cause.__cause__
    return None


def _is_from_orbax(record: logging.LogRecord) -> bool:
    return os.path.join("orbax", "checkpoint", "") in record.pathname


@contextlib.contextmanager
def reading_quietly() -> Iterator[None]:
    """A failed read is told in our words; the log of orbax and the remains of other reads stay off the terminal."""

    def is_foreign(record: logging.LogRecord) -> bool:
        return not _is_from_orbax(record)

    logger = logging.getLogger("absl")
    logger.addFilter(is_foreign)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with draining_loops():
                yield
        finally:
            logger.removeFilter(is_foreign)


@contextlib.contextmanager
def draining_loops() -> Iterator[None]:
    """Orbax, which works in event loops of its own, leaves none of them before its reads and writes have ended."""
    policy = asyncio.get_event_loop_policy()
    before = vars(policy).get("new_event_loop")
    policy.new_event_loop = _DrainingLoop
    try:
        yield
    finally:
        del policy.new_event_loop
        if before is not None:
            policy.new_event_loop = before


class _DrainingLoop(asyncio.SelectorEventLoop):
    """Closes when its tasks are done. Orbax closes its loop at the first failure, over what is still going on."""

    def close(self) -> None:
        async def drain(tasks: set[asyncio.Task]) -> None:
            await asyncio.gather(*tasks, return_exceptions=True)

        try:
            if tasks := asyncio.all_tasks(self):
                self.run_until_complete(drain(tasks))
        finally:
            super().close()
