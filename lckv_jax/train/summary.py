"""What a run says when it ends."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median

from lckv_jax.config import RunConfig
from lckv_jax.train.clock import duration
from lckv_jax.train.metrics import Record


def summary(
    config: RunConfig,
    records: list[Record],
    seconds: dict[str, float],
    *,
    start: int,
    stop: int,
    checkpoint: Path,
    curve: Path,
) -> list[str]:
    """Lines about a run: tokens, where the time went, speed, losses, updates left out, and where to find what.

    records: those of metrics.jsonl, of all stretches of the run. seconds: what the clock says of this stretch, which
    made the steps after `start` up to `stop`. What nobody recorded is not told.
    """
    steps, tokens = config.train.steps, config.data.batch_size * config.data.seq_len
    made = f"done: {stop} steps" if stop >= steps else f"stopped: {stop} of {steps} steps"
    told = [record for record in records if "loss" in record]
    seen = stop * tokens
    if told:
        seen = told[-1].get("tokens_seen", seen)  # the batch may have changed its size at a resume
    lines = [f"{made} of {tokens:,} tokens, {seen:,} in all"]
    lines += _time(seconds, stop - start)
    lines += _speed([record for record in told if record["step"] > start] or told)
    lines += _losses(records, config.model.vocab_size)
    if told and told[-1].get("skipped"):
        lines.append(f"{told[-1]['skipped']} of {stop} updates were left out (`skip_cause` in metrics.jsonl)")
    return [*lines, f"checkpoint {checkpoint}, loss curve {curve}"]


def _time(seconds: dict[str, float], steps: int) -> list[str]:
    total = sum(seconds.values())
    if not total:
        return []
    parts = sorted(seconds.items(), key=lambda part: -part[1])
    shares = ", ".join(f"{part} {spent / total:.1%}" for part, spent in parts)
    return [f"time {duration(total)} for {steps} steps: {shares}"]


def _speed(steps: list[Record]) -> list[str]:
    """Medians: the first step of a stretch, and those beside a checkpoint, are slow."""

    def middle(name: str) -> float | None:
        told = [record[name] for record in steps if record.get(name) is not None]
        return median(told) if told else None

    speed, mfu, hfu, rate = map(middle, ("tokens_per_second", "mfu", "hfu", "device_flops_per_second"))
    if speed is None:
        return []
    line = f"speed {speed:,.0f} tokens/s (median)"
    if mfu is not None and hfu is not None:
        line += f", MFU {mfu:.1%} (FLOPs of the standard model), HFU {hfu:.1%} (of every pass)"
    elif rate is not None:
        line += f", {rate / 1e12:.3g} TFLOP/s a device"
    return [line]


def _losses(records: list[Record], vocab_size: int) -> list[str]:
    told = [record for record in records if record.get("valid_loss") is not None]
    if not told:
        return []
    final, best = told[-1], min(told, key=lambda record: record["valid_loss"])
    loss = final["valid_loss"]
    perplexity = math.exp(loss) if loss < 700 else math.inf
    line = f"validation loss {loss:.4f} (ln(V) is {math.log(vocab_size):.2f}), perplexity {perplexity:,.1f}"
    if best["valid_loss"] < loss:
        line += f"; the best was {best['valid_loss']:.4f} at step {best['step']}"
    return [line]
