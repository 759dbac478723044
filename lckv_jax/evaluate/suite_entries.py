"""The entries of a suite: what each depends on, how it is measured, and what can be refused before any work."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from jax.sharding import Mesh
from rich.console import Console

from lckv_jax.config import ModelConfig, RunConfig, SourceConfig, config_json
from lckv_jax.errors import UserError
from lckv_jax.evaluate.cache_quality import measure_caches
from lckv_jax.evaluate.decode_path import Prompt
from lckv_jax.evaluate.perplexity import plain
from lckv_jax.evaluate.progress import telling
from lckv_jax.evaluate.rows import read_text, text_pieces
from lckv_jax.evaluate.suite_config import DecodeEntry, PerplexityEntry, SuiteConfig, TasksConfig
from lckv_jax.evaluate.windows import check_stride, measure_windows
from lckv_jax.model.layers import Params
from lckv_jax.model.refine import Passes, stop_rule
from lckv_jax.model.transformer import check_dtype
from lckv_jax.step_folder import digest

if TYPE_CHECKING:
    from lckv_jax.data.tokenizer import Tokenizer
    from lckv_jax.evaluate.tasks import LoadedTask


class Subject(NamedTuple):
    """What is measured, and where. fingerprint: of the parameters, which lie on the mesh. folder: of the results."""

    params: Params
    run: RunConfig
    tokenizer: Tokenizer | None
    step: int
    fingerprint: str
    mesh: Mesh
    passes: Passes
    folder: Path
    console: Console

    @property
    def model(self) -> ModelConfig:
        return self.run.model.model_copy(update={"attention": "auto"})  # that of the training may not run here


class Entry(NamedTuple):
    """Something to measure. settings, data: what the numbers depend on beside the checkpoint, as JSON data; data with
    the hashes of texts. measure: the numbers, as JSON data."""

    kind: str
    name: str
    settings: dict[str, Any]
    data: dict[str, Any]
    measure: Callable[[Subject], dict[str, Any]]


def suite_entries(wanted: SuiteConfig, run: RunConfig, tokenizer: Tokenizer | None) -> list[Entry]:
    """The entries of a suite under a run. Raises UserError for what could not be measured, and for absent texts."""
    windows = [_windows(f"perplexity.{name}", entry, run, tokenizer) for name, entry in wanted.perplexity.items()]
    decode = [_decode(f"decode.{name}", entry, run, tokenizer) for name, entry in wanted.decode.items()]
    return [*windows, *decode, *_tasks(wanted.tasks, run, tokenizer)]


def _windows(where: str, entry: PerplexityEntry, run: RunConfig, tokenizer: Tokenizer | None) -> Entry:
    seq_len = entry.seq_len or run.data.seq_len
    stride = entry.stride or seq_len
    check_positions(f"{where}.seq_len", seq_len, run.model)
    try:
        check_stride(stride, seq_len)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error

    def measure(subject: Subject) -> dict[str, Any]:
        text = read_text(subject.run, entry.files, entry.max_tokens, subject.tokenizer)
        with telling(subject.console, len(text.tokens) - 1) as tell:
            report = measure_windows(
                subject.params,
                subject.model,
                text,
                seq_len,
                stride,
                passes=subject.passes,
                packing=subject.run.data.packing,
                batch_size=entry.batch_size,
                by_position=entry.by_position,
                by_document=entry.by_document,
                tokenizer=subject.tokenizer,
                mesh=subject.mesh,
                tell=tell,
            )
        return {"text": text.what, **plain(report)}

    settings = {**config_json(entry), "seq_len": seq_len, "stride": stride, "packing": run.data.packing}
    return Entry(
        "perplexity", where.partition(".")[2], settings, _text_data(where, entry.files, run, tokenizer), measure
    )


def _decode(where: str, entry: DecodeEntry, run: RunConfig, tokenizer: Tokenizer | None) -> Entry:
    seq_len = entry.seq_len or run.data.seq_len

    def measure(subject: Subject) -> dict[str, Any]:
        text = read_text(subject.run, entry.files, entry.max_tokens, subject.tokenizer)
        with jax.set_mesh(subject.mesh):
            reports = measure_caches(
                subject.params,
                subject.model,
                text_pieces(text, seq_len, subject.run.data.packing),
                entry.cache,
                entry.batch_size,
                prompt=Prompt(entry.prompt_tokens, subject.passes) if entry.prompt_tokens else None,
                by_position=entry.by_position,
                text_bytes=None if entry.prompt_tokens else text.bytes,
                console=subject.console,
            )
        return {"text": text.what, "bytes": text.bytes, "caches": plain(tuple(reports))}

    settings = {**config_json(entry), "seq_len": seq_len, "packing": run.data.packing}
    return Entry("decode", where.partition(".")[2], settings, _text_data(where, entry.files, run, tokenizer), measure)


def _text_data(
    where: str, files: Sequence[SourceConfig], run: RunConfig, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """The hashes of an entry's texts, by file; of the run's own split that of its manifest, which has those of all its
    blocks."""
    from lckv_jax.data.corpora import text_hashes
    from lckv_jax.data.manifest import load_manifest

    if not files:
        read_text(run, files, 1, tokenizer)  # refuses what is not the run's
        return {"validation split": load_manifest(run.data.folder).hash}
    if tokenizer is None:
        raise UserError(
            f"{where}: the run has no tokenizer to read files with; put its tokenizer back beside checkpoints/"
        )
    return text_hashes(files)


# ---------------------------------------------------------------- tasks


def _tasks(wanted: TasksConfig, run: RunConfig, tokenizer: Tokenizer | None) -> list[Entry]:
    """An entry for each task; all of them have one model, which remembers requests that are finished."""
    if not wanted.names:
        return []
    if tokenizer is None:
        raise UserError("tasks: the run has no tokenizer to read them with; put its tokenizer back beside checkpoints/")
    from lckv_jax.evaluate.tasks import load_tasks

    max_length = wanted.max_length or run.data.seq_len
    check_positions("tasks.max_length", max_length, run.model)
    made: list[Any] = []  # the model, once a task needs it
    tell: list[Callable[..., None]] = []  # of the task under way

    def measure(task: LoadedTask, subject: Subject) -> dict[str, Any]:
        from lckv_jax.evaluate.harness import HarnessModel
        from lckv_jax.evaluate.tasks import run_task

        if not made:
            assert tokenizer is not None
            model = HarnessModel(
                subject.params,
                subject.model,
                tokenizer,
                passes=subject.passes,
                max_length=max_length,
                finished=subject.folder / "requests.jsonl",
                batch_tokens=wanted.batch_tokens,
                mesh=subject.mesh,
                fingerprint=digest({"parameters": subject.fingerprint, "model": config_json(subject.run.model)}),
                tell=lambda done, total: tell[-1](done, total),
            )
            made.append(model)
        with telling(subject.console, what="requests") as now:
            tell[:] = [now]
            return plain(run_task(made[0], task, limit=wanted.limit, seed=wanted.seed))

    settings = {**config_json(wanted), "max_length": max_length}
    settings = {key: settings[key] for key in ("limit", "seed", "max_length", "batch_tokens")}
    return [
        Entry(
            "task",
            task.name,
            {**settings, "task": _task_settings(task), "lm-eval": version("lm-eval")},
            {task.data: task.sha256},
            lambda subject, task=task: measure(task, subject),
        )
        for task in load_tasks(wanted.names, data=_data_folder(wanted))
    ]


def _task_settings(task: LoadedTask) -> dict[str, Any]:
    """What the harness knows of a task, as JSON data: prompt forms, metrics, version. Functions are left out."""
    found = {"version": task.version}
    for name, value in task.task.dump_config().items():
        with contextlib.suppress(TypeError, ValueError):
            found[name] = json.loads(json.dumps(value))
    return found


def _data_folder(wanted: TasksConfig) -> Path | None:
    """The folder of the tasks' files, which must be there."""
    if wanted.data is None:
        return None
    folder = Path(os.path.expandvars(wanted.data)).expanduser()
    if "$" in str(folder):
        raise UserError(f"tasks.data={wanted.data}: that variable is not set; set it, or give tasks.data=FOLDER")
    if not folder.is_dir():
        raise UserError(
            f"tasks.data={wanted.data} is no folder; give that of the tasks' .jsonl files (docs/evaluate.md)"
        )
    return folder


# ---------------------------------------------------------------- refusals


def check_subject(wanted: SuiteConfig, run: RunConfig, tokenizer: Tokenizer | None) -> None:
    """Raises UserError for passes that mean nothing, and for a tokenizer that is not one of the model."""
    stop_rule(run.model, wanted.passes)
    check_dtype(run.model)
    if tokenizer is not None and tokenizer.vocab_size > run.model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, but the model only {run.model.vocab_size:,}; put back "
            "the tokenizer that the checkpoint was trained with"
        )


def check_positions(what: str, tokens: int, model: ModelConfig) -> None:
    """Raises UserError for more tokens than the model says that it has positions."""
    limit = model.max_position_embeddings
    if limit is not None and tokens > limit:
        raise UserError(
            f"{what}={tokens} is longer than the model's {limit} positions (model.max_position_embeddings); give at "
            f"most {limit}"
        )
