"""The results of `bench` as text: a table for each prompt, number of new tokens and cache, and ratios to standard."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

Record = dict[str, Any]  # of a cell: identity, facts, results or None, error or None

_COLUMNS = {
    "batch": 7,
    "prefill ms": 11,
    "passes": 7,
    "ms/step (min-max)": 23,
    "decode/s": 9,
    "all/s": 9,
    "peak": 7,
    "held": 7,
    "read": 7,
    "roof": 6,
    "compile": 9,
}
_RATES = {"decode": "decode_tokens_per_s", "all": "tokens_per_s"}
_LEGEND = (
    "decode/s, all/s: new tokens a second, of the steps alone and with the time of the prompt",
    "held, read: bytes of the cache, and of it read by a step; weights are read besides",
    "peak: of memory, with the weights; compile: of all programs, not in the times",
    "roof: bytes of weights and cache that a step reads and writes, over its time and the copy bandwidth",
)


def one_line(record: Record) -> str:
    """What a finished cell gave."""
    identity, results = record["identity"], record["results"]
    cell = f"  {_name(record)}, {identity['cache']}, {identity['prompt']}+{identity['new']}, batch {_batch(record)}: "
    if results is None:
        return cell + record["error"]
    return cell + (
        f"prefill {_number(results['prefill_ms']['median'])} ms, decode {_number(results['decode_step_ms']['median'])} "
        f"ms a step, {results['decode_tokens_per_s']:,.0f} tokens/s; compiled in {results['compile_s']:.0f} s"
    )


def _batch(record: Record) -> str:
    """The batch, with a star if it is the largest that fits."""
    return f"{record['identity']['batch']}{'*' * _is_largest(record)}"


def _is_largest(record: Record) -> bool:
    return bool(record["results"] and record["results"].get("largest"))


def table(records: Sequence[Record]) -> Iterator[str]:
    """Lines of about 110 columns; caches in the order in which they were asked for."""
    width = max(len(_name(record)) for record in records) + 2
    caches = list(dict.fromkeys(record["identity"]["cache"] for record in records))

    def group(record: Record) -> tuple:
        identity = record["identity"]
        return identity["prompt"], identity["new"], caches.index(identity["cache"]), identity["memory_cap_bytes"]

    for (prompt, new, cache, cap), rows in itertools.groupby(sorted(records, key=group), key=group):
        group_records = list(rows)
        yield ""
        yield f"{prompt}+{new} tokens, cache {caches[cache]}{_cap_text(cap, group_records)}"
        yield " " * width + "".join(f"{name:>{size}}" for name, size in _COLUMNS.items())
        for record in group_records:
            yield f"{_name(record):<{width}}" + _row(record)
        yield from _ratios(group_records, width)
    if not any(record["results"] for record in records):
        return  # nothing to explain
    yield ""
    yield from _LEGEND
    yield from _code(records)
    if any(map(_is_largest, records)):
        yield "*: the largest batch that fits, by compiled memory analysis, and it ran"
    if any(record["results"] and record["results"]["peak_bytes_kind"] == "compiled" for record in records):
        yield "peak: here by compiled memory analysis, as a CPU does not tell"
    if any(record["identity"]["memory_cap_bytes"] for record in records):
        yield "a cap stands for a smaller card's capacity, not for its speed"
    samples = {sample for record in records if (sample := record["facts"].get("sample"))}
    if samples:
        yield f"ms/step: of {max(samples)} steps with a cache of each size, which stand for all steps with it"


def _code(records: Sequence[Record]) -> Iterator[str]:
    """Which code gave the numbers, as cells that were finished earlier are kept."""
    commits = list(dict.fromkeys(str(record["facts"].get("commit")) for record in records if record["results"]))
    if len(commits) > 1:
        yield f"code: of {len(commits)} commits, {', '.join(commits)}: to compare, measure all by one, in another `out`"
    elif commits and commits != ["None"]:
        yield f"code: commit {commits[0]}"


def _name(record: Record) -> str:
    identity = record["identity"]
    name = identity["model"] if identity["decoder"] == "lckv_jax" else f"{identity['model']}, {identity['decoder']}"
    return name if identity["passes"] == "trained" else f"{name}, {identity['passes']}"


def _cap_text(cap: int | None, records: Sequence[Record]) -> str:
    if cap is None:
        return ""
    what = next((record["facts"]["memory_limit"] for record in records if "memory_limit" in record["facts"]), "a cap")
    return f", in {cap / 1e9:g} GB ({what})"


def _row(record: Record) -> str:
    results = record["results"]
    if results is None:
        return f"{record['identity']['batch']:>{_COLUMNS['batch']}}  {record['error']}"
    step, passes = results["decode_step_ms"], results["passes_used"]
    texts = (
        _batch(record),
        _number(results["prefill_ms"]["median"]),
        "-" if passes is None else f"{passes:.1f}",
        f"{_number(step['median'])} ({_number(step['min'])}-{_number(step['max'])})",
        f"{results['decode_tokens_per_s']:,.0f}",
        f"{results['tokens_per_s']:,.0f}",
        *(_size(results[name]) for name in ("peak_bytes", "cache_bytes_held", "cache_bytes_read_per_step")),
        "-" if results["share_of_roofline"] is None else f"{results['share_of_roofline']:.0%}",
        f"{results['compile_s']:.0f} s",
    )
    return "".join(f"{text:>{size}}" for text, size in zip(texts, _COLUMNS.values()))


def _number(x: float) -> str:
    """Three digits, or all in front of the point."""
    return f"{x:,.0f}" if x >= 100 else f"{x:#.3g}"


def _size(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / 1e9:.2f}G" if size >= 1e9 else f"{size / 1e6:.1f}M" if size >= 1e6 else f"{size / 1e3:.1f}k"


# ---------------------------------------------------------------- ratios


def _is_baseline(record: Record) -> bool:
    """Whether this is our own decoder with the standard map."""
    identity = record["identity"]
    sources = [str(layer) for layer in range(identity["sharing"].count("_") + 1)]
    return identity["decoder"] == "lckv_jax" and identity["sharing"] == "_".join(sources)


def _ratios(records: Sequence[Record], width: int) -> Iterator[str]:
    """Of the others to standard: at each batch that both ran, and each at the batch that is best for it."""
    good = [record for record in records if record["results"]]
    baseline = [record for record in good if _is_baseline(record)]
    if not baseline or len(baseline) == len(good):
        return
    by_batch = {record["identity"]["batch"]: record for record in baseline}
    yield f"{'':<{width}}{'batch':>{_COLUMNS['batch']}}  over {baseline[0]['identity']['model']}"
    others = [record for record in good if not _is_baseline(record)]
    unknown = [record for record in records if _is_unknown(record)]
    for name, group in itertools.groupby(sorted(others, key=_name), key=_name):
        rows = list(group)
        for record in rows:
            if standard := by_batch.get(record["identity"]["batch"]):
                yield f"{name:<{width}}{record['identity']['batch']:>{_COLUMNS['batch']}}" + _ratio(record, standard)
        if any(_is_baseline(record) or _name(record) == name for record in unknown):
            best = "not known, as a cell failed"
        else:
            ratios = (f"{word} {_best(rows, baseline, rate)}" for word, rate in _RATES.items())
            best = f"{', '.join(ratios)}: each at its best batch"
        yield f"{name:<{width}}{'best':>{_COLUMNS['batch']}}  {best}"


def _is_unknown(record: Record) -> bool:
    """Whether the cell has no numbers for another reason than that so many rows are too many."""
    asked_too_much = record["identity"]["batch"] != "largest" and str(record["error"]).startswith("does not fit")
    return record["results"] is None and not asked_too_much


def _best(rows: Sequence[Record], baseline: Sequence[Record], rate: str) -> str:
    """The ratio of the best of each, and their batches."""
    best, standard = (max(records, key=lambda record: record["results"][rate]) for records in (rows, baseline))
    batches = f"batches {best['identity']['batch']} and {standard['identity']['batch']}"
    return f"x{best['results'][rate] / standard['results'][rate]:.2f} ({batches})"


def _ratio(record: Record, standard: Record) -> str:
    ours, theirs = record["results"], standard["results"]
    text = "  " + ", ".join(f"{word} x{ours[rate] / theirs[rate]:.2f}" for word, rate in _RATES.items())
    held = ours["cache_bytes_held"], theirs["cache_bytes_held"]
    return text + (f", held x{held[0] / held[1]:.2f}" if all(held) else "")
