"""`share --sweep`: perplexity over the number of shared layers, for each order of the pairs (2410.18517, figure 6)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from lckv_jax.convert.reshare import reshare
from lckv_jax.errors import UserError
from lckv_jax.share import report
from lckv_jax.share.distances import Order
from lckv_jax.share.job import Job, run_search, setting_of
from lckv_jax.share.kvsharer import givable, map_after
from lckv_jax.share.measures import Model, losses
from lckv_jax.share.plots import draw_sweep
from lckv_jax.sharing import KVSharing

RANDOM_SEEDS = 3


def sweep(job: Job, place: Path) -> None:
    """Measures the map after each accepted pair, dissimilar and similar ones first and in three random orders.

    Writes sweep.json and sweep.md into the new folder `place` after every row, so that a stopped sweep keeps what is
    done, and sweep.png in the end.
    """
    wanted = job.wanted
    layers = len(givable(job.model.config.sharing)) if wanted.layers is None else wanted.layers
    record = {
        "checkpoint": job.checkpoint,
        "step": job.loaded.step,
        "calibration": job.texts.what,
        "held_out": {"what": job.texts.held_out.what, "seq_len": setting_of(job).seq_len},
        "search": {name: getattr(wanted, name) for name in ("metric", "threshold", "sentences", "tokens", "passes")},
        "rows": [],
    }
    rows: list[report.Record] = record["rows"]
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{place} cannot be written: {error.strerror}; name another folder") from error
    try:
        for row in _measured(job, layers):
            rows.append(row)
            report.write(place, "sweep", record, markdown(record))
    finally:
        if rows:
            draw_sweep(
                curves(rows), f"{Path(job.checkpoint).name}: {job.model.config.num_layers} layers", place / "sweep.png"
            )
            job.say(f"{len(rows)} rows in {job.target}: sweep.md, sweep.json, sweep.png")
    for line in table(rows):
        job.say(line)


def _measured(job: Job, layers: int) -> Iterator[report.Record]:
    """One row for each order and number of layers; a map that was measured before is not measured again."""
    base, known = job.model.config.sharing, {}
    seeds = range(job.wanted.seed, job.wanted.seed + RANDOM_SEEDS)
    orders: list[tuple[Order, int]] = [("dissimilar", 0), ("similar", 0), *(("random", seed) for seed in seeds)]
    for order, seed in orders:
        job.say(f"{order}{f', seed {seed}' if order == 'random' else ''}:")
        result, _ = run_search(job, layers, order, seed)
        for number in range(len(result.pairs) + 1):
            sharing = map_after(base, result.pairs[:number])
            if sharing not in known:
                known[sharing] = _loss(job, sharing)
            nats, perplexity = known[sharing]
            cosine = result.pairs[number - 1].cosine if number else 1.0
            yield {
                "order": order,
                "seed": seed if order == "random" else None,
                "shared": number,
                "map": str(sharing),
                "cosine": cosine,
                "nats": nats,
                "perplexity": perplexity,
            }
            job.say(f"  {number} shared: perplexity {perplexity:,.3f}, map {sharing}")


def _loss(job: Job, sharing: KVSharing) -> tuple[float, float]:
    model = Model(*reshare(job.model.params, job.model.config, sharing, "own"))
    found = losses(model, setting_of(job))[0]
    return found.nats, found.perplexity


def curves(rows: Sequence[report.Record]) -> dict[str, list[list[tuple[int, float]]]]:
    """For each order a curve of (number, perplexity) for each seed."""
    found: dict[str, dict[int | None, list[tuple[int, float]]]] = {}
    for row in rows:
        found.setdefault(row["order"], {}).setdefault(row["seed"], []).append((row["shared"], row["perplexity"]))
    return {order: list(of_seed.values()) for order, of_seed in found.items()}


def table(rows: Sequence[report.Record]) -> Iterator[str]:
    """Perplexities, a line for each number of shared layers; random ones as mean and range."""
    found = curves(rows)
    yield "| shared layers | " + " | ".join(found) + " |"
    yield "| --- |" + " --- |" * len(found)
    for number in sorted({row["shared"] for row in rows}):
        cells = []
        for lines in found.values():
            values = [value for line in lines for shared, value in line if shared == number]
            cells.append(_cell(values) if values else "none left")
        yield f"| {number} | " + " | ".join(cells) + " |"


def _cell(values: Sequence[float]) -> str:
    if max(values) == min(values):
        return f"{values[0]:,.3f}"
    return f"{sum(values) / len(values):,.3f} ({min(values):,.3f} to {max(values):,.3f})"


def markdown(record: report.Record) -> str:
    """The table, what it was made of, and every row."""
    search, rows = record["search"], record["rows"]
    lines = [
        f"# Perplexity of {record['checkpoint']} over the number of shared layers",
        "",
        f"Search: {search['sentences']} sentences of {search['tokens']} tokens of {record['calibration']}, metric "
        f"{search['metric']}, threshold {search['threshold']:g}. Perplexity on {record['held_out']['what']}. Random: "
        "mean and range of three seeds, under the same threshold.",
        "",
        *table(rows),
        "",
        "![sweep](sweep.png)",
        "",
        "| order | seed | shared | map | cosine | nats | perplexity |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        seed = "" if row["seed"] is None else row["seed"]
        lines.append(
            f"| {row['order']} | {seed} | {row['shared']} | `{row['map']}` | {row['cosine']:.4f} | {row['nats']:.4f} | "
            f"{row['perplexity']:,.3f} |"
        )
    return "\n".join(lines) + "\n"
