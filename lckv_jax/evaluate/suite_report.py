"""What a suite found: one JSON file, one page of Markdown tables, and a line for each entry."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lckv_jax.config import config_json
from lckv_jax.decode.bench_record import commit, versions, write_json
from lckv_jax.errors import UserError
from lckv_jax.evaluate.suite_entries import Subject

Record = dict[str, Any]


def facts(
    checkpoint: str, suite: str, overrides: Sequence[str], settings: dict[str, Any], subject: Subject
) -> dict[str, Any]:
    """All that stands above the entries in results.json: what was measured, how exactly, where, and by what code."""
    model, code = subject.run.model, commit()
    devices = subject.mesh.devices.flat
    return {
        "checkpoint": {
            "path": checkpoint,
            "step": subject.step,
            "fingerprint": subject.fingerprint,
            "averaged": bool(subject.run.train.ema_decay),
            "sharing": str(model.sharing),
            "trained_seq_len": subject.run.data.seq_len,
            "model": config_json(model),
        },
        "passes": {
            "asked": subject.passes,
            "trained": [model.no_grad_passes, model.grad_passes],
            "exact": is_exact(subject),
        },
        "code": {
            "version": versions("lckv-jax")["lckv-jax"],
            "commit": code and code.removesuffix("-dirty"),
            "dirty": code and code.endswith("-dirty"),
        },
        "versions": versions("jax", "jaxlib", "flax", "numpy", "lm-eval"),
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "mesh": dict(subject.mesh.shape),
        "suite": {"file": suite, "overrides": list(overrides), **settings},
    }


def is_exact(subject: Subject) -> bool:
    """By the map, or as asked for: a tolerance of 0 is never met, so there are as many passes as tokens."""
    return subject.passes in ("exact", 0.0) or not subject.run.model.sharing.cyclic


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_report(folder: Path, results: dict[str, Any]) -> None:
    """results.json and results.md in `folder`, each whole or as it was. Raises UserError if they cannot be written."""
    results = {**results, "made": now()}
    page = folder / "results.md"
    partial = page.with_name("results.md.partial")
    try:
        write_json(folder / "results.json", results)
        partial.write_text("\n".join(markdown(results)) + "\n", encoding="utf-8")
        os.replace(partial, page)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; mend that and run the same command again") \
            from error  # fmt: skip


def one_line(record: Record) -> str:
    """The most important numbers of an entry."""
    found, name = record["results"], f"{record['kind']} {record['name']}"
    if record["kind"] == "perplexity":
        bits = "" if found["bits_per_byte"] is None else f", {_pm(found['bits_per_byte'], 4)} bits/byte"
        return f"{name}: perplexity {_pm(found['perplexity'], 3)}{bits}, {found['tokens']:,} tokens"
    if record["kind"] == "decode":
        caches = ", ".join(f"{entry['cache']} {_number(entry['perplexity'], 3)}" for entry in found["caches"])
        return f"{name}: perplexity {caches}, {found['caches'][0]['tokens']:,} tokens"
    metrics = ", ".join(f"{metric} {_metric(value)}" for metric, value in found["metrics"].items())
    return f"{name}: {metrics}, {found['items']:,} items"


# ---------------------------------------------------------------- the page


def markdown(results: dict[str, Any]) -> Iterator[str]:
    """The lines of results.md."""
    checkpoint = results["checkpoint"]
    yield f"# {checkpoint['path']}, step {checkpoint['step']}"
    yield ""
    yield from _grid(("", ""), _head(results))
    if results["missing"]:
        yield f"Not measured yet: {', '.join(results['missing'])}."
        yield ""
    sections: tuple[tuple[str, str, Callable[[Sequence[Record]], Iterator[str]]], ...] = (
        ("perplexity", "Perplexity by sliding windows", _windows),
        ("decode", "Token by token on a cache", _decode),
        ("task", "Zero-shot tasks", _tasks),
    )
    for kind, title, lines in sections:
        if records := [record for record in results["entries"] if record["kind"] == kind]:
            yield f"## {title}"
            yield ""
            yield from lines(records)
    yield "## Texts and time"
    yield ""
    yield from _grid(
        ("entry", "seconds", "measured", "text", "sha256"),
        (
            (f"{record['kind']} {record['name']}", f"{record['seconds']:,.1f}", record["made"], *_text(record["data"]))
            for record in results["entries"]
        ),
    )


def _head(results: dict[str, Any]) -> Iterator[tuple[str, str]]:
    checkpoint, passes, code = (results[key] for key in ("checkpoint", "passes", "code"))
    asked, (m, b) = passes["asked"], passes["trained"]
    how = {"trained": f"trained ({m} + {b})", "exact": "exact"}.get(asked, f"tolerance {asked}")
    yield "map", f"`{checkpoint['sharing']}`"
    yield "passes", f"{how}: {'exact' if passes['exact'] else 'not exact'}"
    yield "parameters", f"fingerprint {checkpoint['fingerprint'][:16]}{', averaged' if checkpoint['averaged'] else ''}"
    yield "trained on", f"rows of {checkpoint['trained_seq_len']:,} tokens"
    known = code["commit"] and f"commit {code['commit']}{', with changes that are not committed' * code['dirty']}"
    yield "code", ", ".join(filter(None, [code["version"], known])) or "unknown"
    yield "versions", ", ".join(f"{name} {version or 'absent'}" for name, version in results["versions"].items())
    mesh = ", ".join(f"{axis}={size}" for axis, size in results["mesh"].items())
    yield "devices", f"{results['device']}, {mesh}"
    suite = results["suite"]
    yield "suite", " ".join([suite["file"], *(f"`{override}`" for override in suite["overrides"])])
    yield "written", results["made"]


def _windows(records: Sequence[Record]) -> Iterator[str]:
    yield "Every token is predicted once, from more than window - stride tokens of its document, but for its beginning."
    yield "± is a standard error over documents, or over windows where there are fewer than ten."
    yield ""
    yield from _grid(
        ("entry", "perplexity", "nats/token", "bits/byte", "tokens", "documents", "window", "stride", "errors over",
         "passes made"),
        (
            (
                record["name"],
                _pm(found["perplexity"], 3),
                _pm(found["nats"], 4),
                _pm(found["bits_per_byte"], 4),
                f"{found['tokens']:,}",
                f"{found['documents']:,}",
                f"{record['settings']['seq_len']:,}",
                f"{record['settings']['stride']:,}",
                f"{found['clusters']:,} {found['clustered_over']}",
                f"{found['mean_passes']:.1f} ({found['max_passes']})",
            )
            for record in records
            for found in [record["results"]]
        ),
    )  # fmt: skip
    for record in records:
        found = record["results"]
        if found["by_position"]:
            yield f"{record['name']}, by position in the window:"
            yield ""
            yield from _grid(
                ("positions", "perplexity", "nats/token", "tokens"),
                (
                    (_span(bucket), _pm(bucket["perplexity"], 3), _pm(bucket["nats"], 4), f"{bucket['tokens']:,}")
                    for bucket in found["by_position"]
                ),
            )
        if found["by_document"]:
            yield from _documents(record["name"], found["by_document"])


def _documents(name: str, documents: Sequence[Record]) -> Iterator[str]:
    """The spread of documents: those at some quantiles of nats a token; all of them are in results.json."""
    order = sorted(documents, key=lambda document: document["nats"])
    ranks = dict.fromkeys(round(share * (len(order) - 1)) for share in (0.0, 0.1, 0.5, 0.9, 1.0))
    yield f"{name}, by document ({len(order):,} of them in results.json; here from the easiest to the hardest):"
    yield ""
    yield from _grid(
        ("rank", "document", "perplexity", "bits/byte", "tokens", "bytes"),
        (
            (
                f"{rank + 1:,}",
                found["name"] or f"number {found['document']}",
                _number(found["perplexity"], 3),
                _number(found["bits_per_byte"], 4),
                f"{found['tokens']:,}",
                "unknown" if found["bytes"] is None else f"{found['bytes']:,}",
            )
            for rank in ranks
            for found in [order[rank]]
        ),
    )


def _decode(records: Sequence[Record]) -> Iterator[str]:
    yield "A decode step is exact, given what the cache keeps; only prompts go through passes."
    yield "± is a standard error over the texts of rows."
    yield ""
    yield from _grid(
        ("entry", "cache", "perplexity", "nats/token", "bits/byte", "tokens", "bytes a row", "prompt"),
        (
            (
                record["name"],
                f"`{found['cache']}`",
                _number(found["perplexity"], 3),
                _pm({"value": found["nats"], "stderr": found["stderr"]}, 4),
                _number(found["bits_per_byte"], 4),
                f"{found['tokens']:,}",
                f"{found['row_bytes']:,}",
                str(record["settings"]["prompt_tokens"] or "none"),
            )
            for record in records
            for found in record["results"]["caches"]
        ),
    )
    for record in records:
        caches = record["results"]["caches"]
        if caches[0]["positions"]:
            yield f"{record['name']}, perplexity by position in the row:"
            yield ""
            yield from _grid(
                ("positions", *(f"`{found['cache']}`" for found in caches)),
                (
                    (_span(buckets[0]), *(_number(bucket["perplexity"], 3) for bucket in buckets))
                    for buckets in zip(*(found["positions"] for found in caches))
                ),
            )


def _tasks(records: Sequence[Record]) -> Iterator[str]:
    yield f"Items of more than {records[0]['settings']['max_length']:,} tokens are cut from the left."
    yield ""
    yield from _grid(
        ("task", "metric", "value", "guessing", "items", "cut"),
        (
            (record["name"], name, _metric(metric), _number(found["chance"], 4, "-"), f"{found['items']:,}",
             f"{found['cut']:,}")
            for record in records
            for found in [record["results"]]
            for name, metric in found["metrics"].items()
        ),
    )  # fmt: skip
    compared = [record for record in records if record["results"]["exact_difference"]]
    if not compared:
        return
    yield "What exact passes change, in the first items of each task:"
    yield ""
    yield from _grid(
        (
            "task",
            "items",
            "mean change of a log-likelihood",
            "largest",
            "decisions changed",
            "metrics: as above, exactly",
        ),
        (
            (
                record["name"],
                f"{found['items']:,}",
                f"{found['mean']:.2e}",
                f"{found['largest']:.2e}",
                f"{found['changed']:,}",
                "; ".join(f"{name} {_plain(a)}, {_plain(b)}" for name, (a, b) in found["metrics"].items()),
            )
            for record in compared
            for found in [record["results"]["exact_difference"]]
        ),
    )


# ---------------------------------------------------------------- cells


def _grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A Markdown table and an empty line."""
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join('---' for _ in head)} |"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
    yield ""


def _number(value: float | None, digits: int, absent: str = "unknown") -> str:
    return absent if value is None else f"{value:,.{digits}f}"


def _pm(estimate: dict[str, float | None] | None, digits: int) -> str:
    if estimate is None or estimate["value"] is None:
        return "unknown"
    error = "" if estimate["stderr"] is None else f" ± {estimate['stderr']:,.{digits}f}"
    return f"{estimate['value']:,.{digits}f}{error}"


def _metric(metric: Sequence[float | None]) -> str:
    value, stderr = metric
    return _plain(value) if stderr is None else f"{_plain(value)} ± {_plain(stderr)}"


def _plain(value: float | None) -> str:
    """An accuracy to four digits, a perplexity of any size."""
    return _number(value, 4) if value is None or abs(value) < 10 else f"{value:,.2f}" if value < 1e6 else f"{value:.3e}"


def _span(bucket: Record) -> str:
    return f"{bucket['start']:,} - {bucket['stop'] - 1:,}"


def _text(data: dict[str, str | None]) -> tuple[str, str]:
    """The texts of an entry and their hashes; of many files the number, and one hash."""
    if len(data) == 1:
        (name, sha256), *_ = data.items()
        return name, "unknown" if sha256 is None else sha256[:16]
    together = "".join(f"{name} {sha256}\n" for name, sha256 in data.items())
    return f"{len(data):,} files", hashlib.sha256(together.encode()).hexdigest()[:16]
