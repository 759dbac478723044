"""Where the wall time of a whole run goes, over all its stretches: what was kept, what was lost, when it was down.

Some records of metrics.jsonl hold an account: the seconds of every part since the run began, so that the last one
tells all. A stretch that is killed leaves no last account, but its records of steps tell what came after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lckv_jax.train.clock import Clock
from lckv_jax.train.metrics import Record

PARTS = ("start", "compile", "data", "step", "evaluation", "checkpoint", "lost", "down")
_WORK = ("data", "step", "evaluation", "checkpoint")  # what is for nothing if its step is made again


class Past(NamedTuple):
    """The earlier stretches of a run, for one that goes on from an earlier step than they had come to.

    seconds: of each part. lost_steps: made, but again by a later stretch. stretches: how many there were.
    ended: wall-clock time (of `time.time`) of the last sign of life, None if nobody recorded it.
    """

    seconds: dict[str, float]
    lost_steps: int
    stretches: int
    ended: float | None


def is_account(record: Record) -> bool:
    """Whether a record of metrics.jsonl tells of the run's time and not of its training."""
    return "time" in record


def past(records: Sequence[Record], start: int) -> Past:
    """What a run had spent until it goes on from step `start`.

    records: all of its metrics.jsonl, also those beyond `start`: that work is moved to "lost". The start and the
    compilation of a stretch stay what they are.
    """
    spent, last = _spent(records), _last_account(records)
    kept = _spent([record for record in records if record["step"] <= start])
    lost = sum(max(spent[part] - kept[part], 0.0) for part in _WORK)
    seconds = {**spent, **{part: kept[part] for part in _WORK}, "lost": spent["lost"] + lost}
    dropped = sum("seconds" in record and record["step"] > start for record in records)
    ended = None
    if "at" in last and not last.get("done"):
        ended = last["at"] + sum(spent.values()) - sum(last["time"].values())
    return Past(seconds, last.get("lost_steps", 0) + dropped, last.get("stretches", 1 if records else 0), ended)


def _last_account(records: Sequence[Record]) -> Record:
    return next((record for record in reversed(records) if is_account(record)), {})


def _spent(records: Sequence[Record]) -> dict[str, float]:
    """Seconds of each part: those of the last account, and of the steps recorded after it."""
    account: Record = {}
    tail: list[Record] = []
    for record in records:
        if is_account(record):
            account, tail = record, []
        elif "seconds" in record:
            tail.append(record)
    seconds = {part: account.get("time", {}).get(part, 0.0) for part in PARTS}
    first = account.get("start", 0) + 1
    for record in tail:
        if record["step"] == first:  # of its stretch
            seconds["compile"] += record["seconds"]
        else:
            wait = min(record.get("data_wait", 0.0), record["seconds"])
            seconds["data"] += wait
            seconds["step"] += record["seconds"] - wait
    return seconds


class Account:
    """Keeps the account of a run during one stretch of it."""

    def __init__(self, records: Sequence[Record], start: int, clock: Clock, now: Callable[[], float] = time.time):
        """records, start: as for `past`. clock: of this stretch. now: tells the wall-clock time, which may be set."""
        before = past(records, start)
        self._seconds, self._lost_steps, self._stretches = before.seconds, before.lost_steps, before.stretches + 1
        self._start, self._clock, self._now = start, clock, now
        self._saving: float | None = None  # what the clock said when a save began that is not yet known to be on disk
        if before.ended is not None:
            began = now() - sum(clock.seconds.values())
            self._seconds["down"] += max(began - before.ended, 0.0)

    def record(self, step: int, **more: float) -> Record:
        """The account after `step`, up to the clock's last lap; `more`: what else this record tells.

        time: seconds of each of PARTS since the run began. goodput: the share of them in steps that were kept.
        lost_steps, stretches: as in `Past`, with this stretch. start: the step that this stretch goes on from.
        at: the wall-clock time.
        """
        spent = {part: self._seconds[part] + self._clock.seconds.get(part, 0.0) for part in PARTS}
        total = sum(spent.values())
        return {
            "step": step,
            "time": {part: round(seconds, 4) for part, seconds in spent.items()},
            "goodput": round(spent["step"] / total, 4) if total else 0.0,
            "lost_steps": self._lost_steps,
            "stretches": self._stretches,
            "start": self._start,
            **more,
            "at": round(self._now(), 3),
        }

    def save_begun(self, stall: float) -> Record:
        """{"save_stall": stall}. stall: seconds, just booked, for which the loop waited until a save was begun.

        A save waits for the one before, so that one is on disk now at the latest; its "save_seconds" are then told too.
        """
        before = self.saved(in_progress=False)
        self._saving = sum(self._clock.seconds.values()) - stall
        return {"save_stall": round(stall, 4), **before}

    def saved(self, in_progress: bool) -> Record:
        """{"save_seconds": ...} the first time that the last save is found on disk, else {}.

        The seconds run from the beginning of the save, stall included, up to the clock's last lap.
        """
        if self._saving is None or in_progress:
            return {}
        began, self._saving = self._saving, None
        return {"save_seconds": round(sum(self._clock.seconds.values()) - began, 4)}
