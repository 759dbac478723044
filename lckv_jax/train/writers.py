"""Where the records of a run go: metrics.jsonl always, TensorBoard and Weights & Biases if configured."""

from __future__ import annotations

import contextlib
import importlib
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from lckv_jax.config import MetricsConfig, RunConfig, config_json
from lckv_jax.errors import UserError
from lckv_jax.parallel import processes
from lckv_jax.train.metrics import MetricsFile, Record, naming

_FLUSH_SECONDS = 10.0  # a flush waits for the disk
_NO_METRICS = ("step", "start", "at", "done")  # when a record was made, not what it tells


class Writer(Protocol):
    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class Writers:
    """Gives every record to several writers, in order; closes all of them whatever happens."""

    def __init__(self, writers: Sequence[Writer]):
        self._writers = writers

    def write(self, record: Record) -> None:
        for writer in self._writers:
            writer.write(record)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for writer in reversed(self._writers):
                stack.callback(writer.close)


def check_writers(metrics: MetricsConfig) -> None:
    """Raises UserError if a package that the configuration asks for is not installed."""
    if metrics.tensorboard:
        _tensorboardx()
    if metrics.wandb is not None:
        _wandb()


def open_writers(config: RunConfig, out: Path, start_step: int, account: Record | None = None) -> Writers:
    """The writers that `config.metrics` asks for, in the folder `out`; nothing is written by any process but the first.

    `write` takes records of plain numbers and lists of them, with a "step"; `start_step` is the step that the run
    starts or resumes after: what lost work wrote beyond it disappears from metrics.jsonl and TensorBoard, while W&B,
    which cannot forget, keeps the first of two records of a step. `account` takes the place of what disappears from
    metrics.jsonl, so that no kill comes between. `write` and `close` raise OSError with the name of
    the file that cannot be written; opening W&B raises UserError where it refuses.
    """
    if processes.index() != 0:
        return Writers([])
    with contextlib.ExitStack() as stack:  # if one cannot be opened, the others are closed
        writers: list[Writer] = []

        def opened(writer: Writer) -> None:
            writers.append(writer)
            stack.callback(writer.close)

        opened(MetricsFile(out / "metrics.jsonl", start_step, account))
        if config.metrics.tensorboard:
            opened(TensorBoardWriter(out / "tensorboard", start_step))
        if config.metrics.wandb is not None:
            opened(WandbWriter(config, out))
        stack.pop_all()
    return Writers(writers)


def scalars(record: Record) -> dict[str, float]:
    """The numbers of a record; those of a list are called NAME/00, NAME/01, ..., those of a mapping NAME/KEY."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{key}": item for key, item in value.items() if isinstance(item, (int, float))}
        elif isinstance(value, list):
            flat |= {f"{name}/{index:02}": item for index, item in enumerate(value) if isinstance(item, (int, float))}
        elif isinstance(value, (int, float)) and name not in _NO_METRICS:
            flat[name] = value
    return flat


class TensorBoardWriter:
    """An event file for TensorBoard, one event a record, written by the calling thread.

    Not through tensorboardX's SummaryWriter: its thread dies of a full disk without a word, and the run then waits
    for it for ever.
    """

    def __init__(self, folder: Path, start_step: int):
        """Tells TensorBoard to forget what an earlier stretch of the run wrote beyond `start_step`."""
        files, events, summaries = _tensorboardx()
        self._event, self._summary = events.Event, summaries.Summary
        folder.mkdir(parents=True, exist_ok=True)
        with naming(folder):  # the suffix keeps apart two stretches that start within a second
            self._file = files.EventsWriter(str(folder / "events"), f".{start_step}")
        self._folder, self._flushed = folder, time.monotonic()
        self._put(start_step + 1, session_log=events.SessionLog(status=events.SessionLog.START))

    def write(self, record: Record) -> None:
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars(record).items()]
        self._put(record["step"], summary=self._summary(value=values))

    def close(self) -> None:
        with naming(self._folder):
            self._file.close()

    def _put(self, step: int, **content: Any) -> None:
        with naming(self._folder):
            self._file.write_event(self._event(step=step, wall_time=time.time(), **content))
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._file.flush()
                self._flushed = time.monotonic()


class WandbWriter:
    """A run of Weights & Biases, the same one after a resume: its id is kept in OUT/wandb_id."""

    def __init__(self, config: RunConfig, out: Path):
        wandb = _wandb()
        path = out / "wandb_id"
        if not path.exists():
            path.write_text(f"{secrets.token_hex(6)}\n", encoding="utf-8")
        try:
            self._run = wandb.init(
                project=config.metrics.wandb,
                id=path.read_text(encoding="utf-8").strip(),
                resume="allow",
                name=out.resolve().name,
                dir=str(out),
                config=config_json(config),
                settings=wandb.Settings(console="off"),  # it would record the live progress line
            )
        except wandb.Error as error:
            raise UserError(
                f"Weights & Biases refuses to start: {' '.join(str(error).split())}; run `wandb login`, set "
                "WANDB_MODE=offline, or metrics.wandb=null"
            ) from error

    def write(self, record: Record) -> None:
        self._run.log(scalars(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


def _tensorboardx() -> list[Any]:
    """The modules of tensorboardX that write event files: event_file_writer, event_pb2, summary_pb2."""
    names = ("event_file_writer", "proto.event_pb2", "proto.summary_pb2")
    try:
        with _torch_hidden():
            return [importlib.import_module(f"tensorboardX.{name}") for name in names]
    except ImportError as error:
        raise UserError(
            f"metrics.tensorboard cannot be served ({error}): pip install 'tensorboardX>=2.6,<3', or set it to false"
        ) from error


@contextlib.contextmanager
def _torch_hidden() -> Iterator[None]:
    """tensorboardX imports torch where there is one, for seconds and for nothing that is needed here."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType] (the import system's word for "there is none")
    try:
        yield
    finally:
        del sys.modules["torch"]


def _wandb() -> Any:
    try:
        wandb = importlib.import_module("wandb")
        if hasattr(wandb, "init"):  # else it is a folder `wandb`, in which an earlier run left its files
            return wandb
        error = ImportError("wandb is not installed")
    except ImportError as missing:
        error = missing
    raise UserError(f"metrics.wandb cannot be served ({error}): pip install wandb, or set it to null") from error
