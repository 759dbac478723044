"""What a run tells: metrics.jsonl, the progress line, the loss curve."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TextColumn

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


class MetricsFile:
    """Appends one strict-JSON line a record and flushes it; non-finite numbers become null and are named."""

    def __init__(self, path: Path, start_step: int):
        """Keeps the records up to `start_step`; those of work lost since then are dropped."""
        kept = [record for record in read_metrics(path) if record["step"] <= start_step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(f"{json.dumps(record)}\n" for record in kept), encoding="utf-8")
        os.replace(partial, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        bad = [name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
        if bad:
            record = {**record, **dict.fromkeys(bad), "non_finite": bad}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
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
        left = (time.monotonic() - self._started) / done * (self._steps - step) if done else math.nan
        place = f"{step:>{len(str(self._steps))}}/{self._steps}"
        line = (  # fits a terminal of 80 columns
            f"step {place}  loss {record['loss']:.4f}  {record['tokens_per_second']:>7,.0f} tok/s  "
            f"passes {record['passes']}  residual {record['residual']:.1e}  eta {_clock(left)}"
        )
        self._live.update(self._task, completed=step, description=line)
        if not self._console.is_terminal and (step % self._log_every == 0 or step in (self._first + 1, self._steps)):
            self.say(line)

    def say(self, line: str) -> None:
        """Prints a line above the live one."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._live.stop()


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-:--"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


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
    figure.savefig(path, dpi=120)
