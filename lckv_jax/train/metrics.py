"""What a run tells: metrics.jsonl, the progress line, the loss curve."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TextColumn

from lckv_jax.train.clock import duration

Record = dict[str, Any]


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics.jsonl; a last line torn by a kill is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break  # torn: nothing after it was written
    return records


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives the OSErrors of reads and writes inside (a full disk, say) the file name that only `open` gives them."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def strict(record: Record) -> Record:
    """The record with null for each number that JSON has no word for, and the names of those in `non_finite`.

    Numbers in lists are looked at too; their name is `layer_grad_norms[3]`.
    """
    bad: list[str] = []

    def clean(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [clean(f"{name}[{index}]", item) for index, item in enumerate(value)]
        if isinstance(value, float) and not math.isfinite(value):
            bad.append(name)
            return None
        return value

    cleaned = {name: clean(name, value) for name, value in record.items()}
    return {**cleaned, "non_finite": bad} if bad else cleaned


class MetricsFile:
    """Appends one strict-JSON line a record (see `strict`) and flushes it. Raises OSError with the file's name."""

    def __init__(self, path: Path, start_step: int, account: Record | None = None):
        """Keeps the records up to `start_step`; those of work lost since then are dropped, for `account` at once."""
        self._path = path
        kept = [record for record in read_metrics(path) if record["step"] <= start_step]
        kept += [account] if account else []
        partial = path.with_suffix(".partial")
        with naming(partial):
            partial.write_text("".join(f"{json.dumps(record)}\n" for record in kept), encoding="utf-8")
        os.replace(partial, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        with naming(self._path):
            self._file.write(json.dumps(strict(record), allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        with naming(self._path):
            self._file.close()


class ProgressLine:
    """One live line on a terminal; elsewhere a printed line every `log_every` steps."""

    def __init__(self, console: Console, start: int, steps: int, log_every: int):
        self._console, self._steps, self._log_every = console, steps, log_every
        self._first, self._started = start, time.monotonic()
        self._live = Progress(TextColumn("{task.description}"), console=console, disable=not console.is_terminal)
        self._task = self._live.add_task("compiling", total=steps, completed=start)
        self._live.start()

    def update(self, record: Record) -> None:
        """Shows the metrics of one finished step."""
        step = record["step"]
        if step == self._first + 1:
            self._started = time.monotonic()  # the first step holds the compilation
        done = step - self._first - 1
        left = (time.monotonic() - self._started) / done * (self._steps - step) if done > 0 else math.nan
        line = progress_text(record, self._steps, left, self._console.width if self._console.is_terminal else 100)
        self._live.update(self._task, completed=step, description=line)
        if not self._console.is_terminal and (step % self._log_every == 0 or step in (self._first + 1, self._steps)):
            self.say(line)

    def say(self, line: str) -> None:
        """Prints a line above the live one."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._live.stop()


def progress_text(record: Record, steps: int, seconds_left: float, width: int = 100) -> str:
    """One line of fewer than `width` characters about a step: what fits of it, the most wanted first.

    The residual gives way to the MFU where the peak of the device is known; metrics.jsonl has both.
    """
    parts = [  # (rank, text): in the order they are shown; the lowest ranks are left out where the line is full
        (9, f"step {record['step']:>{len(str(steps))}}/{steps}"),
        (9, f"loss {record['loss']:.4f}"),
        (4, f"{record['tokens_per_second']:>7,.0f} tok/s"),
        (2, f"passes {record['passes']:g}"),
        (3, f"mfu {record['mfu']:.1%}") if "mfu" in record else (1, f"residual {record['residual']:.1e}"),
    ]
    if record.get("skipped"):
        parts.append((5, f"skipped {record['skipped']:g}"))
    parts.append((6, f"eta {duration(seconds_left)}"))
    while len(line := "  ".join(text for _, text in parts)) >= width:
        parts.remove(min(parts))
    return line


def draw_loss_curve(records: list[Record], vocab_size: int, path: Path) -> None:
    """Writes a PNG of the training and validation loss over tokens read, in nats a token."""
    from matplotlib.figure import Figure  # half a second to import, and only needed at the end
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(math.log(vocab_size), color="0.7", linestyle=":", label="ln(V): nothing learnt")
    for key, style, label in (("loss", "C0-", "training"), ("valid_loss", "C1o-", "validation")):
        told = [record for record in records if record.get(key) is not None]
        axes.plot([r["tokens_seen"] for r in told], [r[key] for r in told], style, lw=1, label=label)
    axes.set(xlabel="tokens", ylabel="loss (nats a token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with naming(path):
        figure.savefig(path, dpi=120)
