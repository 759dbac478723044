"""What `share` found and measured, as one record: JSON, Markdown, and what is printed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lckv_jax.config import ModelConfig
from lckv_jax.errors import UserError
from lckv_jax.evaluate.cache_quality import CacheReport
from lckv_jax.evaluate.perplexity import Report
from lckv_jax.share.kvsharer import Result, Trial
from lckv_jax.share.measures import Cost, Quality

Record = dict[str, Any]


def search_record(result: Result, before: ModelConfig) -> Record:
    """The part of the record that the search gives."""
    rows = [[None if math.isnan(x) else x for x in row] for row in result.distances.tolist()]
    return {
        "asked": result.asked,
        "found": len(result.pairs),
        "rejected": len(result.tried) - len(result.pairs),
        "map_before": str(before.sharing),
        "map": str(result.sharing),
        "diagram": result.sharing.diagram().splitlines(),
        "trials": [trial._asdict() for trial in result.tried],
        "distances": rows,
    }


def quality_record(found: Quality) -> Record:
    """One model's losses."""
    return {
        "prefill": [_prefill(report) for report in found.prefill],
        "decode": _decode(found.decode),
        "paths_differ_by": abs(found.prefill[-1].nats - found.decode.nats),  # the last is exact
    }


def _prefill(report: Report) -> Record:
    names = ("passes", "tokens", "nats", "perplexity")
    return {name: getattr(report, name) for name in names}


def _decode(report: CacheReport) -> Record:
    return {name: getattr(report, name) for name in ("cache", "tokens", "nats", "perplexity")}


def cache_records(before: Quality, after: Quality, costs: Sequence[Sequence[Cost]]) -> list[Record]:
    """One entry a cache: both models' losses and costs."""
    return [
        {
            "cache": old.cache,
            "tokens": old.tokens,
            **{
                when: {"nats": report.nats, "perplexity": report.perplexity, **cost._asdict()}
                for when, report, cost in (("before", old, cost[0]), ("after", new, cost[1]))
            },
            "speedup": _ratio(cost[0].step_ms, cost[1].step_ms),
        }
        for old, new, cost in zip(before.caches, after.caches, costs)
    ]


def _ratio(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else before / after


# ---------------------------------------------------------------- text


def trial_line(trial: Trial) -> str:
    reads = f"layer {trial.hi} reads {trial.source}" + (f" (for {trial.lo})" if trial.lo != trial.source else "")
    verdict = "kept" if trial.accepted else "rejected"
    return f"{reads:<24} distance {trial.distance:.4g}, cosine {trial.cosine:.4f}: {verdict}"


def found_line(result: Result, threshold: float) -> str:
    """How much of what was asked for was found."""
    rejected = len(result.tried) - len(result.pairs)
    line = f"{len(result.pairs)} of {result.asked} layers gave up their K,V; {rejected} of {len(result.tried)}"
    line += f" candidates were rejected (cosine at most {threshold:g})"
    if len(result.pairs) < result.asked:
        line += "; no candidate is left, what passed is kept"
    return line


def loss_table(record: Record) -> Iterator[str]:
    """Perplexity before and after, by both paths."""
    before, after = record["quality"]["before"], record["quality"]["after"]
    yield "| path | perplexity before | after | ratio | nats/token |"
    yield "| --- | --- | --- | --- | --- |"
    cyclic = len(before["prefill"]) > 1
    rows = [
        ("all at once" + f", passes={old['passes']}" * cyclic, old, new)
        for old, new in zip(before["prefill"], after["prefill"])
    ]
    for name, old, new in [*rows, ("token by token (decode)", before["decode"], after["decode"])]:
        yield (
            f"| {name} | {old['perplexity']:,.3f} | {new['perplexity']:,.3f} | "
            f"{new['perplexity'] / old['perplexity']:.3f} | {new['nats'] - old['nats']:+.4f} |"
        )
    yield ""
    yield (
        f"On {before['decode']['tokens']:,} predicted tokens. The two paths differ by "
        f"{before['paths_differ_by']:.1e} nats a token before and {after['paths_differ_by']:.1e} after."
    )


def cache_table(record: Record) -> Iterator[str]:
    """Perplexity, bytes and milliseconds of each cache, before and after."""
    speed = record["speed"]
    yield "| cache | perplexity before | after | held before | after | read before | after | ms | after | speed |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in record["caches"]:
        old, new = row["before"], row["after"]
        times = (
            f"{old['step_ms']:.3f} | {new['step_ms']:.3f} | {row['speedup']:.2f}x" if speed["repeats"] else "- | - | -"
        )
        yield (
            f"| `{row['cache']}` | {old['perplexity']:,.3f} | {new['perplexity']:,.3f} | {old['held']:,} | "
            f"{new['held']:,} | {old['read']:,} | {new['read']:,} | {times} |"
        )
    yield ""
    yield (
        f"Held, read: bytes of the cache of one row of {record['held_out']['seq_len']:,} tokens, and of it read by a "
        f"step. ms: of a decode step of {speed['batch']} rows, the median of {speed['repeats']} on {speed['device']}."
    )


def heal_table(record: Record) -> Iterator[str]:
    """What further training brings back."""
    heal = record["heal"]
    yield "| model | nats/token | perplexity |"
    yield "| --- | --- | --- |"
    for name, nats in heal["nats"].items():
        yield f"| {name} | {nats:.4f} | {math.exp(nats):,.3f} |"
    yield ""
    of_lost = heal["recovered"]
    yield (
        "Sharing lost nothing on this text."
        if of_lost is None
        else f"{heal['steps']} steps bring back {of_lost:.0%} of what sharing lost."
        if of_lost > 0
        else f"{heal['steps']} steps bring nothing back: the loss rises by another {-of_lost:.0%} of what sharing "
        "lost; try more steps, or a lower heal_learning_rate."
    )
    if "recovered_of_control" in heal:
        of_control = heal["recovered_of_control"]
        yield (
            "The unshared model ends no better than the shared one began, after as many steps of its own."
            if of_control is None
            else f"They close {of_control:.0%} of the distance to the unshared model after as many steps of its own."
        )


def markdown(record: Record) -> str:
    """The whole report."""
    search = record["search"]
    lines = [
        f"# {record['checkpoint']} with {record['found']} shared layers",
        "",
        f"Map `{record['map_before']}` -> `{record['map']}` ({record['found']} of {record['asked']} asked for, "
        f"{record['rejected']} candidates rejected). Order {search['order']}, metric {search['metric']}, threshold "
        f"{search['threshold']:g}, {search['sentences']} sentences of {search['tokens']} tokens of "
        f"{record['calibration']}.",
        "",
        "```",
        *record["diagram"],
        "```",
        "",
        "![map](map.png) ![distances](distances.png)",
        "",
        "## Trials",
        "",
        "| layer | ranked with | reads | distance | cosine | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for trial in record["trials"]:
        verdict = "kept" if trial["accepted"] else "rejected"
        lines.append(
            f"| {trial['hi']} | {trial['lo']} | {trial['source']} | {trial['distance']:.5g} | {trial['cosine']:.5f} | "
            f"{verdict} |"
        )
    sections = {
        "quality": ("Perplexity", loss_table),
        "caches": ("Caches", cache_table),
        "heal": ("Healing", heal_table),
    }
    for key, (title, table) in sections.items():
        if key in record:
            lines += ["", f"## {title}", "", *table(record)]
    return "\n".join(lines) + "\n"


def write(folder: Path, name: str, record: Record, text: str) -> None:
    """NAME.json and NAME.md in the folder, each whole or as it was."""
    try:
        for path, content in (
            (folder / f"{name}.json", json.dumps(record, indent=1, allow_nan=False) + "\n"),
            (folder / f"{name}.md", text),
        ):
            partial = path.with_name(f"{path.name}.partial")
            partial.write_text(content, encoding="utf-8")
            os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; mend that and run the command again") from error
