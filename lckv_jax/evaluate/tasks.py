"""Zero-shot tasks of lm-evaluation-harness, one at a time; prompts, metrics and standard errors are its own."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lckv_jax.errors import UserError
from lckv_jax.evaluate.task_files import LoadedTask, load_hub, load_local, local_files, quiet

if TYPE_CHECKING:
    from lckv_jax.evaluate.harness import HarnessModel

FOLDER = Path(__file__).parents[2] / "configs" / "eval"
_SAMPLE_ITEMS = 50  # of a task are also scored by exact passes
_BOOTSTRAP = 1000  # resamples for a standard error that has no formula


class ExactDifference(NamedTuple):
    """What exact passes change in the first items of a task.

    items: compared. mean, largest: |difference| of a request's log-likelihood, in nats. changed: items that are decided
    otherwise: another choice is the likeliest, or greedy decoding no longer gives the target, or gives it now. metrics:
    of those items, by the passes of the run and exactly.
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
    and lost their beginning. seconds: of everything, with compilation. compilations: programs for log-likelihoods that
    this task was the first to need. data, sha256, version: see LoadedTask. exact: whether the passes are.
    exact_difference: None if they are, and for tasks that generate text.
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

    names: of a file in `folder` (without .yaml), of the task in it, or of a task or group of the hub, which becomes its
    tasks. data: the folder of the jsonl files; None = the current one.
    Raises UserError for an unknown name (telling near ones), a missing or empty file, a line that is no JSON object or
    has not a field that the task needs, and for hub data that cannot be fetched.
    """
    if not names:
        raise UserError("no tasks are named; name some, such as hellaswag")
    files = local_files(folder)
    tasks = []
    for name in dict.fromkeys(names):
        tasks += [load_local(name, files[name], data)] if name in files else load_hub(name, sorted(files))
    return tasks


def run_task(lm: HarnessModel, task: LoadedTask, *, limit: int | None = None, seed: int = 0) -> TaskResult:
    """The metrics of one task under a model.

    limit: only the first so many items; None = all. seed: of few-shot examples and of sampling, where a task has them.
    Raises UserError for a limit below 1, for an item that the task cannot make a prompt of, and as `lm` does.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit}; give 1 or more, or none for all items")
    started, compiled = time.monotonic(), lm.compilations
    inner = task.task
    if inner.get_config("num_fewshot") is None:
        inner.set_config("num_fewshot", 0)
    inner.set_fewshot_seed(seed)
    _build_requests(task, limit)
    chance = _check_choices(task, limit)
    lm.cut.clear()
    lm.seed = seed
    _ask(lm, inner.instances)
    exact = not lm.config.sharing.cyclic or lm.passes in ("exact", 0.0)
    difference = None if exact else _exact_difference(lm, inner, inner.instances)
    items, metrics = _metrics(inner, limit)
    return TaskResult(
        task=task.name,
        items=items,
        metrics=metrics,
        chance=chance,
        cut=len(lm.cut),
        seconds=round(time.monotonic() - started, 3),
        compilations=lm.compilations - compiled,
        data=task.data,
        sha256=task.sha256,
        version=task.version,
        passes=lm.passes,
        exact=exact,
        exact_difference=difference,
    )


def _build_requests(task: LoadedTask, limit: int | None) -> None:
    """Raises UserError for an item that the task's templates do not fit."""
    try:
        with quiet():
            task.task.build_all_requests(limit=limit)
    except Exception as error:  # whatever a template can meet; it is found again to tell in which line
        for number, doc in enumerate(islice(task.task.eval_docs, limit), 1):
            try:
                with quiet():
                    task.task.fewshot_context(doc, 0)
            except Exception as fault:
                raise UserError(
                    f"{task.data}, line {number}: {fault}, by the task file of {task.name}; mend one"
                ) from error
        raise


def _check_choices(task: LoadedTask, limit: int | None) -> float | None:
    """The accuracy of guessing, if items have choices. Raises UserError for one whose answer is none of its choices."""
    inner, by_doc = task.task, _by_doc(task.task.instances)
    if inner.OUTPUT_TYPE != "multiple_choice":
        return None
    counts = [len(by_doc[number]) // _times_asked(inner) for number in sorted(by_doc)]
    find_answer = inner.doc_to_text if inner.multiple_input else inner.doc_to_target
    for number, (doc, count) in enumerate(zip(islice(inner.eval_docs, limit), counts), 1):
        answer = find_answer(doc)
        if isinstance(answer, int) and not 0 <= answer < count:
            raise UserError(
                f"{task.data}, line {number}: answer {answer} (counted from 0) of {count} choices; mend the line"
            )
    return float(np.mean([1 / count for count in counts]))


def _times_asked(inner: Any) -> int:
    """How often an item asks for each of its choices: with the context, and after all of those perhaps without."""
    return 1 + ("acc_mutual_info" in inner.aggregation())


def _ask(lm: HarnessModel, instances: Sequence[Any]) -> None:
    """Gives each instance the model's answers, as often as it wants one."""
    by_kind = defaultdict(list)
    for instance in instances:
        instance.resps = []
        by_kind[instance.request_type] += [instance] * instance.repeats
    for kind, asked in by_kind.items():
        for instance, answer in zip(asked, getattr(lm, kind)(asked), strict=True):
            instance.resps.append(answer)


def _metrics(inner: Any, limit: int | None) -> tuple[int, dict[str, tuple[float, float | None]]]:
    """How many items there were, and the metrics of the answers that the instances now have."""
    with quiet():
        inner.apply_filters()
        docs, by_doc = list(inner.doc_iterator(limit=limit)), _by_doc(inner.instances)
        metrics = {}
        for key in inner.instances[0].filtered_resps:
            answers = [[instance.filtered_resps[key] for instance in by_doc[number]] for number, _ in docs]
            values = _values(inner, [doc for _, doc in docs], answers)
            for name, found in values.items():
                metrics[name if key == "none" else f"{name} ({key})"] = (
                    _aggregate(inner, name, found),
                    _standard_error(inner, name, found),
                )
    return len(docs), metrics


def _by_doc(instances: Sequence[Any]) -> dict[int, list[Any]]:
    by_doc = defaultdict(list)
    for instance in sorted(instances, key=lambda instance: instance.idx):
        by_doc[instance.doc_id].append(instance)
    return by_doc


def _values(inner: Any, docs: Sequence[Any], answers: Sequence[Sequence[Any]]) -> dict[str, list[Any]]:
    """What each item adds to each metric."""
    values = defaultdict(list)
    for doc, of_doc in zip(docs, answers):
        for name, value in inner.process_results(doc, of_doc).items():
            values[name].append(value)
    return values


def _aggregate(inner: Any, name: str, values: list[Any]) -> float:
    from lm_eval.api.metrics import mean

    return float(inner.aggregation().get(name, mean)(values))


def _standard_error(inner: Any, name: str, values: list[Any]) -> float | None:
    from lm_eval.api.metrics import mean, stderr_for_metric

    iters = 100 if name in ("bleu", "chrf", "chrf++", "ter") else _BOOTSTRAP
    of = stderr_for_metric(metric=inner.aggregation().get(name, mean), bootstrap_iters=iters)
    return float(of(values)) if of is not None and len(values) > 1 else None


def _exact_difference(lm: HarnessModel, inner: Any, instances: Sequence[Any]) -> ExactDifference | None:
    """What exact passes make of the first items that have been answered."""
    by_doc = dict(islice(sorted(_by_doc(instances).items()), _SAMPLE_ITEMS))
    sample = [instance for of_doc in by_doc.values() for instance in of_doc]
    kind = sample[0].request_type
    if kind == "generate_until":
        return None
    answers = iter(getattr(lm.with_passes("exact"), kind)(sample))
    ours = [[instance.resps[0] for instance in of_doc] for of_doc in by_doc.values()]
    exact = [[next(answers) for _ in of_doc] for of_doc in by_doc.values()]
    moved = [abs(_logp(a) - _logp(b)) for a, b in zip(chain(*ours), chain(*exact))]
    docs = [of_doc[0].doc for of_doc in by_doc.values()]
    asked = [len(of_doc) // _times_asked(inner) for of_doc in by_doc.values()]
    with quiet():
        both = [_values(inner, docs, found) for found in (ours, exact)]
    return ExactDifference(
        items=len(docs),
        mean=float(np.mean(moved)),
        largest=float(np.max(moved)),
        changed=sum(_decision(a[:n]) != _decision(b[:n]) for a, b, n in zip(ours, exact, asked)),
        metrics={
            name: (_aggregate(inner, name, both[0][name]), _aggregate(inner, name, both[1][name])) for name in both[0]
        },
    )


def _logp(answer: Any) -> float:
    return answer[0] if isinstance(answer, tuple) else answer


def _decision(answers: Sequence[Any]) -> Any:
    """Which of several choices is the likeliest; of one target, whether greedy decoding gives it; of text, nothing."""
    if len(answers) > 1:
        return int(np.argmax([_logp(answer) for answer in answers]))
    return answers[0][1] if isinstance(answers[0], tuple) else None
