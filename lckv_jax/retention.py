"""Which checkpoints stay: the newest, and those with the lowest validation loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def steps_kept(losses: Mapping[int, float | None], keep: int, keep_best: int) -> set[int]:
    """The `keep` newest steps, and the `keep_best` steps of the lowest loss (the newer of equals).

    losses: validation loss of each step's checkpoint; without one, or with one that is not finite, it is never best.
    """
    newest = sorted(losses)[-keep:]
    known = [(loss, -step) for step, loss in losses.items() if loss is not None and math.isfinite(loss)]
    return {*newest, *(-step for _, step in sorted(known)[:keep_best])}


class Retention:
    """`steps_kept` as the policy that orbax asks after each save; it deletes once the new step is on disk."""

    def __init__(self, keep: int, keep_best: int, losses: Mapping[int, float | None]) -> None:
        """losses: of the steps that are on disk already."""
        self._keep, self._keep_best, self._losses = keep, keep_best, dict(losses)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Whether each of the checkpoints stays; `metrics` of one saved by this manager is {"valid_loss": loss}."""
        for checkpoint in checkpoints:
            if checkpoint.metrics is not None:
                self._losses[checkpoint.step] = checkpoint.metrics["valid_loss"]
        kept = steps_kept({c.step: self._losses.get(c.step) for c in checkpoints}, self._keep, self._keep_best)
        return [checkpoint.step in kept for checkpoint in checkpoints]
