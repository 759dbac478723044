"""Tasks of lm-evaluation-harness: its YAML files over local jsonl, or its own from the hub."""

from __future__ import annotations

import bisect
import difflib
import gzip
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from lckv_jax.errors import UserError

_OFTEN_WORDS = ("description", "gen_prefix")  # of a task file: the same for all items, or made from their fields
_LOUD = ("lm_eval", "datasets", "huggingface_hub")


class LoadedTask(NamedTuple):
    """A task with its documents.

    task: the harness' own object. data: the file of the documents, as the task file names it, or the name of the hub's
    data set. sha256: of that file; None for the hub's. version: of the prompt form, as the task tells it.
    """

    name: str
    task: Any
    data: str
    sha256: str | None
    version: str


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the harness and its libraries print, and without its processes, which do not go with JAX's
    threads."""
    levels = {name: logging.getLogger(name).level for name in _LOUD}
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        for name in _LOUD:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        os.environ.pop("DISABLE_MULTIPROC")
        if before is not None:
            os.environ["DISABLE_MULTIPROC"] = before


# ---------------------------------------------------------------- local


def local_files(folder: Path) -> dict[str, Path]:
    """The task files of a folder by their names and by those of their tasks. Raises UserError if there are none."""
    files = {}
    for path in sorted(folder.glob("*.yaml")):
        files[path.stem] = path
        files.setdefault(str(_config(path, resolve=False).get("task")), path)
    if not files:
        raise UserError(f"{folder} has no task files; give a folder with some, such as configs/eval")
    return files


def _config(path: Path, resolve: bool) -> dict[str, Any]:
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        return load_yaml(path, resolve_func=resolve)
    except (OSError, ValueError, ImportError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is no task file: {_first_line(error)}") from error


def load_local(name: str, path: Path, data: Path | None) -> LoadedTask:
    """The task of a YAML file, whose one jsonl file is in the folder `data`. Raises UserError as `load_tasks` does."""
    with quiet():
        import pyarrow as pa
        from datasets import Dataset
        from datasets.table import InMemoryTable
        from lm_eval.api.task import ConfigurableTask

        config = _config(path, resolve=True)
    split, file = _data_file(path, config, data)
    rows, sha256 = _read_rows(file, _fields(config), _words(config), path.name)
    config = {key: value for key, value in config.items() if key not in ("tag", "dataset_path", "dataset_kwargs")}
    version = str((config.get("metadata") or {}).get("version", "unknown"))
    try:
        table = pa.Table.from_pylist(rows)
    except pa.ArrowException as error:
        raise UserError(
            f"{file}, line {_first_misfit(rows)} does not fit the lines before it: {_first_line(error)}; mend it"
        ) from error
    try:
        with quiet():
            # with a fingerprint, or the library pickles everything to find one, which asks for torch
            documents = Dataset(InMemoryTable(table), fingerprint=sha256[:16])
            task = ConfigurableTask(config={**config, "custom_dataset": lambda **_: {split: documents}})
    except Exception as error:  # whatever the harness or a template can meet
        raise UserError(f"{path} does not fit {file}, line 1: {_first_line(error)}; mend one of them") from error
    return LoadedTask(name, task, file.name, sha256, version)


def _first_misfit(rows: Sequence[dict[str, Any]]) -> int:
    """The number of the first row that makes no table with those before it; there is one."""
    import pyarrow as pa

    def misfits(count: int) -> bool:
        try:
            pa.Table.from_pylist(rows[:count])
        except pa.ArrowException:
            return True
        return False

    return 1 + bisect.bisect_left(range(1, len(rows)), True, key=misfits)


def _data_file(path: Path, config: dict[str, Any], data: Path | None) -> tuple[str, Path]:
    """The split that the task evaluates, and its file."""
    split = str(config.get("test_split") or config.get("validation_split"))
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if config.get("dataset_path") != "json" or not isinstance(files, dict) or not isinstance(files.get(split), str):
        raise UserError(
            f"{path}: a local task has dataset_path: json, and in dataset_kwargs.data_files one file for its "
            "test_split or validation_split"
        )
    file = (data or Path()) / files[split]
    other = file.with_suffix("") if file.suffix == ".gz" else file.with_name(file.name + ".gz")
    for candidate in (file, other):
        if candidate.is_file():
            return split, candidate
    raise UserError(
        f"{path}: its data {file} is not there; give the folder that holds {other.name} or {file.name} as tasks.data"
    )


def _fields(config: dict[str, Any]) -> set[str] | None:
    """The fields of a line that the task's templates name; None where functions read them."""
    from jinja2 import meta
    from lm_eval.utils import env

    keys = ("doc_to_text", "doc_to_target", "doc_to_choice", "process_docs", "process_results", *_OFTEN_WORDS)
    used = {key: config.get(key) for key in keys}
    if any(callable(value) for value in used.values()):
        return None
    fields: set[str] = set()
    for key, value in used.items():
        if isinstance(value, str):
            names = meta.find_undeclared_variables(env.parse(value))
            fields |= names or ({value} if value.isidentifier() and key not in _OFTEN_WORDS else set())
    return fields


def _words(config: dict[str, Any]) -> set[str]:
    """What is a field where a line has it, and else a word of the prompt."""
    return {str(config[key]) for key in _OFTEN_WORDS if config.get(key)}


def _read_rows(
    file: Path, fields: set[str] | None, words: set[str], needed_by: str
) -> tuple[list[dict[str, Any]], str]:
    """The wanted fields of each line, and the sha256 of the file."""
    try:
        content = file.read_bytes()
        text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode()
    except (OSError, EOFError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read: {_first_line(error)}; give whole UTF-8 text, as .jsonl or .jsonl.gz"
        ) from error
    rows = []
    for number, line in enumerate(text.rstrip().split("\n") if text.strip() else [], 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{file}, line {number} is no JSON object; mend or delete it")
        if missing := sorted(name for name in fields or () if row.get(name) is None):
            raise UserError(f"{file}, line {number} has no field {missing[0]!r}, which {needed_by} needs; add it")
        rows.append(row if fields is None else {name: row[name] for name in sorted(fields | words & row.keys())})
    if not rows:
        raise UserError(f"{file} has no lines; give at least one item")
    return rows, hashlib.sha256(content).hexdigest()


# ---------------------------------------------------------------- the hub


@lru_cache(maxsize=1)
def _hub() -> Any:
    """The harness' own tasks; finding them takes seconds."""
    with quiet():
        from lm_eval.tasks import TaskManager

        return TaskManager()


def load_hub(name: str, local: Sequence[str]) -> list[LoadedTask]:
    """The harness' own task of this name, or those of a group. Raises UserError as `load_tasks` does.

    local: names to tell where an unknown one is near.
    """
    hub = _hub()
    if name not in hub.task_index:
        near = list(dict.fromkeys(difflib.get_close_matches(name, [*local, *hub.all_tasks], 3, 0.6)))
        mend = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(local)}, and the harness' own"
        raise UserError(f"unknown task {name!r}; {mend}")
    try:
        with quiet():
            found = hub.load([name])["tasks"]
    except Exception as error:  # whatever the hub's libraries meet
        raise UserError(
            f"task {name} is one of the harness' hub, which cannot be had now ({_first_line(error)}); it needs a "
            "network, or a task file of that name over local jsonl"
        ) from error
    for task_name, task in found.items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UserError(f"task {task_name} runs code that a model wrote, or shows pictures; leave it out")
    return [
        LoadedTask(
            task_name, task, "/".join(filter(None, (task.DATASET_PATH, task.DATASET_NAME))), None, str(task.VERSION)
        )
        for task_name, task in found.items()
    ]


def _first_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:200] or type(error).__name__
