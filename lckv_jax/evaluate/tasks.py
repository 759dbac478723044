"""Zero-shot tasks of lm-evaluation-harness, from local jsonl or its hub, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from lckv_jax.evaluate.harness import HarnessModel

FOLDER = Path(__file__).parents[2] / "configs" / "eval"


class LoadedTask(NamedTuple):
    """A task with its documents.

    task: the harness' own object. data: the file that the documents came from, as the task file names it, or the name
    of the hub's data set. sha256: of that file; None for the hub's. version: of the prompt form, as the task tells it.
    """

    name: str
    task: Any
    data: str
    sha256: str | None
    version: str


class ExactDifference(NamedTuple):
    """What exact passes change in the first items of a task.

    items: compared. mean, largest: |difference| of a request's log-likelihood, in nats. changed: items whose decision
    differs. metrics: of those items by the passes of the run and exactly.
    """

    items: int
    mean: float
    largest: float
    changed: int
    metrics: dict[str, tuple[float, float]]


class TaskResult(NamedTuple):
    """What one task gave: plain data.

    metrics: (value, standard error) by name, by the harness' own aggregation; None where it knows no standard error.
    chance: accuracy of guessing, None where that means nothing. cut: items that were longer than the model's context
    and lost their beginning. seconds: with compilation. compilations: programs that this task was the first to need.
    exact: whether the passes are exact. exact_difference: None if they are, by the map or as asked for.
    """

    task: str
    items: int
    metrics: dict[str, tuple[float, float | None]]
    chance: float | None
    cut: int
    seconds: float
    compilations: int
    data: str
    sha256: str | None
    version: str
    passes: str | float
    exact: bool
    exact_difference: ExactDifference | None


def load_tasks(names: Sequence[str], *, folder: Path = FOLDER, data: Path | None = None) -> list[LoadedTask]:
    """The tasks of these names: those of the YAML files in `folder` over local jsonl, others from the harness' hub.

    data: the folder of the jsonl files; None = the current one. A group of the hub becomes its tasks.
    Raises UserError for an unknown name (telling near ones), a missing or empty file, a line that is no JSON object or
    has not a field that the task needs, and for hub data that cannot be fetched.
    """
    raise NotImplementedError


def run_task(lm: HarnessModel, task: LoadedTask, *, limit: int | None = None, seed: int = 0) -> TaskResult:
    """The metrics of one task under a model.

    limit: only the first so many items; None = all. seed: of few-shot examples and of sampling, where a task has them.
    Raises UserError for a limit below 1, and for what a task gives the model that it cannot do.
    """
    raise NotImplementedError
