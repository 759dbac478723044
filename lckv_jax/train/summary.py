"""What a run says when it ends."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median

from lckv_jax.config import RunConfig
from lckv_jax.train.clock import duration
from lckv_jax.train.goodput import is_account
from lckv_jax.train.metrics import Record


def summary(
    config: RunConfig,
    records: list[Record],
    *,
    start: int,
    stop: int,
    checkpoint: Path,
    curve: Path,
) -> list[str]:
    """Lines about a run: tokens, where the time went, speed, losses, updates left out, and where to find what.

    records: those of metrics.jsonl, of all stretches of the run. This one made the steps after `start` up to `stop`.
    What nobody recorded is not told.
    """
    steps, tokens = config.train.steps, config.data.batch_size * config.data.seq_len
    made = f"done: {stop} steps" if stop >= steps else f"stopped: {stop} of {steps} steps"
    told = [record for record in records if "loss" in record]
    seen = stop * tokens
    if told:
        seen = told[-1].get("tokens_seen", seen)  # the batch may have changed its size at a resume
    lines = [f"{made} of {tokens:,} tokens, {seen:,} in all"]
    lines += _time(records, stop)
    lines += _speed([record for record in told if record["step"] > start] or told)
    lines += _saves(records)
    lines += _losses(records, config.model.vocab_size)
    if told and told[-1].get("skipped"):
        lines.append(f"{told[-1]['skipped']} of {stop} updates were left out (`skip_cause` in metrics.jsonl)")
    return [*lines, f"checkpoint {checkpoint}, loss curve {curve}"]


def _time(records: list[Record], steps: int) -> list[str]:
    """Of the whole run, as its last account tells it; parts that took no time are left out."""
    account = next((record for record in reversed(records) if is_account(record)), None)
    if account is None or not (total := sum(account["time"].values())):
        return []
    notes = {"step": " (goodput)", "lost": f" ({_counted(account['lost_steps'], 'step')} made again)"}
    parts = sorted(account["time"].items(), key=lambda part: -part[1])
    shares = ", ".join(f"{part} {spent / total:.1%}{notes.get(part, '')}" for part, spent in parts if spent)
    stretches = account["stretches"]
    made = f"{steps} steps" + (f" in {stretches} stretches" if stretches > 1 else "")
    return [f"time {duration(total)} for {made}: {shares}"]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _saves(records: list[Record]) -> list[str]:
    stalls = [record["save_stall"] for record in records if "save_stall" in record]
    written = [record["save_seconds"] for record in records if "save_seconds" in record]
    if not stalls:
        return []
    line = f"checkpoints held up the steps for {median(stalls):.3g} s each"
    return [line + (f", and were on disk after {median(written):.3g} s (medians)" if written else " (median)")]


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
